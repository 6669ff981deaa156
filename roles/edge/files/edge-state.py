# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Keeps what an edge knows only in memory: which upstream is in which slot, and what is held.

edge-state.py SOCKET save          write both where HAProxy reads them at its start; print the process id of its worker
edge-state.py SOCKET begin STATE MARKER    before the first start of HAProxy since the machine's: empty all slots; MARKER, in /run,
                                   notes that it was done
edge-state.py SOCKET certificates FILE...  where HAProxy runs with another certificate than is in its file: give it that, without a reload;
                                   print the files it was for
edge-state.py SOCKET wait [PID]    until HAProxy answers, with another worker than PID; print its process id
"""

import hashlib
import os
import socket
import ssl
import sys
import tempfile
import time

WAIT = 15.0


def ask(target, command):
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(5)
        connection.connect(target)
        connection.sendall(command.encode() + b"\n")
        answer = b""
        while True:
            chunk = connection.recv(65536)
            if not chunk:
                return answer.decode(errors="replace").strip()
            answer += chunk


def worker(target):
    facts = dict(line.split(": ", 1) for line in ask(target, "show info").splitlines() if ": " in line)
    return facts["Pid"]


def write(path, text):
    descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=os.path.dirname(path))
    with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
        handle.write(text)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)


def save(target):
    state = ask(target, "show servers state")
    # What does not look like a state must not replace one.
    if "srv_admin_state" not in state:
        raise ValueError(f"unexpected answer to `show servers state`: {state[:100]!r}")
    state_file, hold_map = (ask(target, f"show env {name}").partition("=")[2] for name in ("EDGE_STATE_FILE", "EDGE_HOLD_MAP"))
    if state_file:
        write(state_file, state + "\n")
    if hold_map:
        entries = (line.split() for line in ask(target, f"show map {hold_map}").splitlines())
        write(hold_map, "".join(f"{entry[1]} {entry[2]}\n" for entry in entries if len(entry) == 3))


def begin(state_file, marker):
    if not os.path.exists(marker):
        write(state_file, "1\n")
        write(marker, "")


def fingerprint(pem):
    begin, end = "-----BEGIN CERTIFICATE-----", "-----END CERTIFICATE-----"
    if begin not in pem or end not in pem:
        raise ValueError("holds no certificate")
    first = pem[pem.index(begin) : pem.index(end) + len(end)]
    return hashlib.sha1(ssl.PEM_cert_to_DER_cert(first)).hexdigest().upper()  # HAProxy's choice, which only tells it apart


def certificates(target, files):
    """What HAProxy does not know yet is read with its next start or reload."""
    if not os.path.exists(target):
        return
    for path in files:
        shown = ask(target, f"show ssl cert {path}")
        known = next((line.partition(": ")[2].strip() for line in shown.splitlines() if "FingerPrint" in line), "")
        with open(path, encoding="ascii") as handle:
            pem = "\n".join(line for line in handle.read().splitlines() if line.strip())
        if not known or fingerprint(pem) == known:
            continue
        answer = ask(target, f"set ssl cert {path} <<\n{pem}\n")
        done = ask(target, f"commit ssl cert {path}") if "ransaction created" in answer or "ransaction updated" in answer else answer
        if "Success" not in done:
            ask(target, f"abort ssl cert {path}")
            raise ValueError(f"{path} was not taken: {done.splitlines()[0] if done else 'no answer'}")
        print(path)


def wait(target, other_than):
    deadline = time.monotonic() + WAIT
    while True:
        try:
            now = worker(target)
            if now != other_than:
                return now
            seen = f"still the worker {now}: the new configuration was not taken"
        except (OSError, KeyError) as exc:
            seen = f"no answer ({exc})"
        if time.monotonic() >= deadline:
            raise TimeoutError(f"{seen} after {WAIT:g} s")
        time.sleep(0.02)


def main(argv):
    try:
        if argv[1] == "save":
            save(argv[0])
            print(worker(argv[0]))
        elif argv[1] == "certificates":
            certificates(argv[0], argv[2:])
        elif argv[1] == "begin":
            begin(argv[2], argv[3])
        else:
            print(wait(argv[0], argv[2] if len(argv) > 2 else ""))
    except (OSError, ValueError, KeyError) as exc:
        return f"edge at {argv[0]}: {exc}"
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
