# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An engine of its own on this machine, which a test may kill, stop and start again: its data, socket and networks are nobody else's.

It sets no packet filter rules, so that it cannot touch those of another engine: this machine reaches its containers, they reach this machine.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.local import children

START_SECONDS = 60.0


class OwnEngine:
    """``live_restore``: containers live on while the engine does not; it may be another one at each start."""

    def __init__(self, folder: Path, live_restore: bool = True) -> None:
        self.folder = folder
        self.live_restore = live_restore
        self.socket = f"{folder}/s"
        self._process: subprocess.Popen[bytes] | None = None
        self._bridges: set[str] = set()
        folder.mkdir()

    @property
    def client(self) -> Engine:
        return Engine(self.socket, timeout=10)

    def start(self) -> None:
        argv = ["dockerd", "--data-root", f"{self.folder}/data", "--exec-root", f"{self.folder}/run", "--pidfile", f"{self.folder}/pid"]
        argv += ["--host", f"unix://{self.socket}", "--bridge=none", "--iptables=false", "--ip6tables=false"]
        argv += ["--default-address-pool", f"base=10.{214 + os.getpid() % 32}.0.0/16,size=24"]
        argv += ["--live-restore"] * self.live_restore
        (self.folder / "pid").unlink(missing_ok=True)  # of one that was killed; its number may be another program's by now
        with open(self.folder / "log", "ab") as log:
            self._process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while not self.answers():
            assert self._process.poll() is None and time.monotonic() < deadline, f"dockerd does not start:\n{self.last_words()}"
            time.sleep(0.02)

    def answers(self) -> bool:
        try:
            return bool(self.client.version())
        except DeliveryError:
            return False

    def last_words(self) -> str:
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-20:])

    # -- what can happen to it

    def kill(self) -> None:
        """SIGKILL: it and its containerd are gone at once, containers are not."""
        assert self._process is not None
        self._bridges.update(f"br-{one['Id'][:12]}" for one in self.client.networks())
        self._process.kill()
        self._process.wait()
        for pid in self._processes("containerd.toml"):
            _kill(pid)
        # The next engine believes in this file for as long as nobody has taken notice of the process's end.
        (self.folder / "run" / "containerd" / "containerd.pid").unlink(missing_ok=True)

    def stall(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def go_on(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def power_off(self) -> None:
        """What a power failure leaves: no process of it, no mount, no network; the files of its data."""
        self.kill()
        self._sweep()

    def stop(self) -> None:
        """For good: nothing is left on this machine, however it ended."""
        if self._process is not None and self._process.poll() is None:
            self.go_on()
            self.power_off()
        self._sweep()
        shutil.rmtree(self.folder, ignore_errors=True)

    # -- what of this machine is its own

    def _processes(self, word: str = "") -> list[int]:
        """Its containerd and the supervisor of each container, told by its folder on their command lines."""
        found = []
        for name in os.listdir("/proc"):
            if name.isdigit() and int(name) != os.getpid():
                said = _read(f"/proc/{name}/cmdline").replace("\0", " ")
                if f"{self.folder}/run/containerd" in said and word in said:
                    found.append(int(name))
        return found

    def _sweep(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while left := self._processes():
            assert time.monotonic() < deadline, f"these do not end: {left}"
            # A container's processes are its supervisor's children; when that dies first, they are nobody's and cannot be found any more.
            for pid in sorted({child for one in left for child in children(one)} or left):
                _kill(pid)
            time.sleep(0.01)
        mounts = [line.split()[1] for line in _read("/proc/self/mounts").splitlines()]
        for path in reversed([one for one in mounts if one.startswith(f"{self.folder}/")]):
            subprocess.run(["umount", "--lazy", path], check=False, capture_output=True)
        shutil.rmtree(self.folder / "run", ignore_errors=True)
        for name in self._bridges.intersection(os.listdir("/sys/class/net")):
            subprocess.run(["ip", "link", "delete", name], check=True)


def _read(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as handle:
            return handle.read()
    except OSError:
        return ""


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
