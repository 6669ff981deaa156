# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A host that systemd runs: a container made of Debian packages alone, reached over SSH."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import typing as t
from pathlib import Path

from debian_root import RIGHTS, SUITE, image, program

#: A server as it is rented: systemd, SSH and Python, nothing else.
BARE = ("ca-certificates", "dbus", "openssh-server", "python3", "systemd", "systemd-sysv")
REGISTRY = (*BARE, "apache2-utils", "curl", "docker-registry", "iproute2", "openssl", "procps", "python3-apt")
#: Much of it is the app coming up, on a machine that may do other things too.
START_SECONDS = 300.0


def docker(*arguments: str) -> str:
    return program("docker", *arguments).strip()


class Machine:
    """The host. ``variables`` are what Ansible needs to reach it."""

    def __init__(self, folder: Path, purpose: str, packages: t.Sequence[str], suite: str = SUITE) -> None:
        self.purpose, self.packages, self.suite = purpose, packages, suite
        self.name = f"delivery-{purpose}-{suite}-{os.getpid()}"
        self.folder = folder
        self.key, self.connections, self.known_hosts = folder / "key", folder / "ssh", folder / "known_hosts"
        self.address = self.gateway = ""

    def start(self) -> None:
        """Make it and await it; ``remove`` also where this fails."""
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "controller", "-f", str(self.key)], check=True)
        # Alone in a network it has the same address after each start.
        docker("network", "create", self.name)
        # /run is in memory, as systemd wants it and as on any machine: a start finds it empty. An engine needs a file system of its own.
        docker("run", "--detach", "--tty", "--name", self.name, "--hostname", self.purpose, "--network", self.name, "--stop-signal", "SIGRTMIN+3",
               "--tmpfs", "/run:exec", "--tmpfs", "/run/lock", "--volume", "/var/lib/docker", *RIGHTS,
               image(self.purpose, self.packages, suite=self.suite, changes=['CMD ["/lib/systemd/systemd"]', "ENV container=docker"]))  # fmt: skip
        self.run("install", "-d", "-m", "700", "/root/.ssh")
        docker("cp", f"{self.key}.pub", f"{self.name}:/root/.ssh/authorized_keys")
        self.run("chown", "-R", "root:root", "/root/.ssh")
        self.await_up()
        known = "{{range .NetworkSettings.Networks}}{{.IPAddress}} {{.Gateway}}{{end}}"
        self.address, self.gateway = docker("inspect", "--format", known, self.name).split()
        self.known_hosts.write_text(f"{self.address} {self.run('cat', '/etc/ssh/ssh_host_ed25519_key.pub')}\n")

    @property
    def variables(self) -> dict[str, t.Any]:
        return {
            "ansible_connection": "ssh",
            "ansible_host": self.address,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": f"-o UserKnownHostsFile={self.known_hosts}",
            "ansible_control_path_dir": str(self.connections),
            "ansible_python_interpreter": "/usr/bin/python3",
        }

    def run(self, *argv: str, check: bool = True) -> str:
        """The output of a program on it, also when that failed and ``check`` is false."""
        done = subprocess.run(["docker", "exec", self.name, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def ssh(self, user: str, *command: str) -> subprocess.CompletedProcess[str]:
        """A command over SSH as ``user``, without anybody to ask for a password."""
        options = ("-i", str(self.key), "-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "BatchMode=yes", "-o", "ControlPath=none")
        return subprocess.run(["ssh", *options, f"{user}@{self.address}", *command], capture_output=True, text=True, check=False)

    def forwards(self, user: str) -> str:
        """What the server says to one who wants to reach something through it."""
        options = ("-i", str(self.key), "-o", f"UserKnownHostsFile={self.known_hosts}", "-o", "BatchMode=yes", "-W", "127.0.0.1:22")
        return subprocess.run(["ssh", *options, f"{user}@{self.address}"], capture_output=True, text=True, check=False, input="").stderr

    def open(self, port: int) -> bool:
        """Whether somebody outside reaches that port."""
        try:
            socket.create_connection((self.address, port), timeout=3).close()
        except OSError:
            return False
        return True

    def watch_processes(self) -> t.Callable[[], str]:
        """Begin to look at all command lines and environments, as any account may; what is returned ends it and tells what was seen."""
        look = "while :; do for p in /proc/[0-9]*; do cat $p/cmdline $p/environ 2>/dev/null; echo; done; done | tr '\\0' ' ' >/seen-by-nobody"
        self.run("sh", "-c", "install -o nobody -m 600 /dev/null /seen-by-nobody")
        self.run("systemd-run", "--quiet", "--unit=watcher", "--uid=nobody", "sh", "-c", look)

        def end() -> str:
            self.run("systemctl", "stop", "watcher")
            seen = self.run("sort", "--unique", "/seen-by-nobody")
            assert "systemd" in seen, "nothing was seen"
            return seen

        return end

    def await_up(self) -> None:
        """Until systemd has started what it starts."""
        deadline = time.monotonic() + START_SECONDS
        while self.run("systemctl", "is-system-running", check=False) not in ("running", "degraded"):
            assert time.monotonic() < deadline, f"systemd does not come up: {docker('logs', self.name)[-2000:]}"
            time.sleep(0.1)

    def reboot(self, hard: bool = False) -> None:
        """Start it anew; ``hard``: as after a power failure."""
        docker(*(("kill", self.name) if hard else ("stop", "--time", "90", self.name)))
        # No connection outlives a reboot.
        shutil.rmtree(self.connections, ignore_errors=True)
        docker("start", self.name)
        self.await_up()

    def unit(self, name: str, asked: str) -> str:
        """A property of a unit, as ``systemctl show`` tells it."""
        return self.run("systemctl", "show", "--property", asked, "--value", name)

    def remove(self) -> None:
        for what in (("rm", "--force", "--volumes"), ("network", "rm")):
            subprocess.run(["docker", *what, self.name], check=False, stdout=subprocess.DEVNULL)
