# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the kernel says of an edge that runs on this machine: its processes, what they have open, whom they are connected to.

An edge that has no count of its own is counted here. Each connection to an upstream is one request or tunnel, as long as the
edge keeps no idle ones; nginx and Traefik are told not to.
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import time
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

#: A look at all processes takes milliseconds, so not more often.
POLL = 0.05


def processes() -> t.Iterator[int]:
    for name in os.listdir("/proc"):
        if name.isdigit():
            yield int(name)


def children(parent: int) -> list[int]:
    """Processes that ``parent`` has started and that have not ended."""
    found = []
    for pid in processes():
        # The name before it stands in brackets and may hold anything.
        fields = _read(pid, "stat").rpartition(")")[2].split()
        if len(fields) > 1 and fields[1] == str(parent) and fields[0] not in ("Z", "X"):
            found.append(pid)
    return found


def named(name: str) -> list[int]:
    return [pid for pid in processes() if _read(pid, "comm").strip() == name]


def title(pid: int) -> str:
    """What the process calls itself; '' when it has ended."""
    return _read(pid, "cmdline").replace("\0", " ").strip()


def _read(pid: int, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def open_files(pid: int) -> list[str]:
    """Paths and ``socket:[inode]``; none when the process has ended. ``DeliveryError`` when this user may not look."""
    folder = f"/proc/{pid}/fd"
    found = []
    try:
        for name in os.listdir(folder):
            try:
                found.append(os.readlink(f"{folder}/{name}"))
            except FileNotFoundError:
                pass
    except PermissionError as exc:
        raise DeliveryError(
            "Looking at the processes of the edge", f"this user may not see what process {pid} has open", "Become root.", "cutover"
        ) from exc
    except OSError:
        pass
    return found


def connections(pids: t.Iterable[int], address: str, port: int) -> int:
    """How many connections to ``address:port`` these processes have, each in its own network."""
    wanted = peer_names(address, port)
    networks: dict[str, set[str]] = {}
    count = 0
    for pid in pids:
        network = _network(pid)
        if network not in networks:
            networks[network] = {inode for table in ("tcp", "tcp6") for inode in inodes_to(_read(pid, f"net/{table}"), wanted)}
        if networks[network]:
            count += len(networks[network].intersection(open_files(pid)))
    return count


def _network(pid: int) -> str:
    try:
        return os.readlink(f"/proc/{pid}/ns/net")
    except OSError:
        return f"of process {pid}"


def peer_names(address: str, port: int) -> set[str]:
    """``address:port`` as the kernel's tables write it: words in the byte order of this machine."""
    packed = ipaddress.ip_address(address).packed
    forms = [packed, b"\0" * 10 + b"\xff\xff" + packed] if len(packed) == 4 else [packed]
    return {"".join(f"{word:08X}" for word in struct.unpack(f"={len(form) // 4}I", form)) + f":{port:04X}" for form in forms}


def inodes_to(table: str, peers: t.Container[str]) -> t.Iterator[str]:
    """Of a table such as ``/proc/net/tcp``: the sockets that are connected to one of ``peers``, as ``/proc/<pid>/fd`` names them."""
    for line in table.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 9 and fields[2] in peers:
            yield f"socket:[{fields[9]}]"


def await_listener(tried: str, address: str, port: int, timeout: float, deadline: float) -> None:
    """Wait until something listens there, asking at least once; else ``DeliveryError`` (cutover), which says ``timeout``."""
    while True:
        left = max(deadline - time.monotonic(), POLL)
        try:
            with socket.create_connection((address, port), timeout=left):
                return
        except OSError as exc:
            if time.monotonic() >= deadline:
                raise DeliveryError(
                    tried,
                    f"not there within {timeout:g} s, so nothing was changed: {exc.strerror or str(exc) or exc.__class__.__name__}",
                    "The edge must reach the container's address, and the app must listen on its port.",
                    "cutover",
                ) from exc
        time.sleep(POLL)


def until(true: t.Callable[[], bool], deadline: float) -> bool:
    """Ask until it is so, at least once; false when it was not before ``deadline``."""
    while not true():
        if time.monotonic() >= deadline:
            return False
        time.sleep(POLL)
    return True
