# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A host that systemd runs: a container made of Debian packages alone, reached over SSH."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import typing as t
from pathlib import Path

from debian_root import RIGHTS, image, program

PACKAGES = (
    "apache2-utils", "ca-certificates", "curl", "dbus", "docker-registry", "iproute2", "openssh-server", "openssl", "procps", "python3",
    "python3-apt", "systemd", "systemd-sysv",
)  # fmt: skip
START_SECONDS = 60.0


def docker(*arguments: str) -> str:
    return program("docker", *arguments).strip()


class Machine:
    """The host. ``variables`` are what Ansible needs to reach it."""

    def __init__(self, folder: Path) -> None:
        self.name = f"delivery-systemd-{os.getpid()}"
        self.key, self.connections = folder / "key", folder / "ssh"
        self.address = ""

    def start(self) -> None:
        """Make it and await it; ``remove`` also where this fails."""
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True)
        # Alone in a network it has the same address after each start.
        docker("network", "create", self.name)
        # /run is in memory, as systemd wants it and as on any machine: a start finds it empty.
        docker("run", "--detach", "--tty", "--name", self.name, "--hostname", "registry", "--network", self.name, "--stop-signal", "SIGRTMIN+3",
               "--tmpfs", "/run", "--tmpfs", "/run/lock", *RIGHTS,
               image("systemd", PACKAGES, changes=['CMD ["/lib/systemd/systemd"]', "ENV container=docker"]))  # fmt: skip
        self.run("install", "-d", "-m", "700", "/root/.ssh")
        docker("cp", f"{self.key}.pub", f"{self.name}:/root/.ssh/authorized_keys")
        self.run("chown", "-R", "root:root", "/root/.ssh")
        self.await_up()
        # As the role leaves it where it installs the package itself.
        self.run("systemctl", "disable", "--quiet", "--now", "docker-registry")
        self.address = docker("inspect", "--format", "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", self.name)

    @property
    def variables(self) -> dict[str, t.Any]:
        return {
            "ansible_connection": "ssh",
            "ansible_host": self.address,
            "ansible_user": "root",
            "ansible_ssh_private_key_file": str(self.key),
            "ansible_ssh_common_args": "-o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null",
            "ansible_control_path_dir": str(self.connections),
            "ansible_python_interpreter": "/usr/bin/python3",
        }

    def run(self, *argv: str, check: bool = True) -> str:
        """The output of a program on it, also when that failed and ``check`` is false."""
        done = subprocess.run(["docker", "exec", self.name, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{' '.join(argv)}: {done.stdout}{done.stderr}"
        return done.stdout.strip()

    def await_up(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while self.run("systemctl", "is-system-running", check=False) not in ("running", "degraded"):
            assert time.monotonic() < deadline, f"systemd does not come up: {docker('logs', self.name)[-2000:]}"
            time.sleep(0.1)

    def reboot(self, hard: bool = False) -> None:
        """Start it anew; ``hard``: as after a power failure."""
        docker(*(("kill", self.name) if hard else ("stop", "--time", "30", self.name)))
        # No connection outlives a reboot.
        shutil.rmtree(self.connections, ignore_errors=True)
        docker("start", self.name)
        self.await_up()

    def remove(self) -> None:
        for what in (("rm", "--force", "--volumes"), ("network", "rm")):
            subprocess.run(["docker", *what, self.name], check=False, stdout=subprocess.DEVNULL)
