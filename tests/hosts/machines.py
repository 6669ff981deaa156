# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hosts to deploy to: containers with an SSH server, Python, a container engine of their own and what the roles need, on a network of their own.

No service manager runs in them: what it would start is started by ``BOOT``, also after ``docker start``, which is a reboot.
"""

from __future__ import annotations

import os
import subprocess
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

from debian_root import RIGHTS, image, program

PACKAGES = (
    "ca-certificates", "curl", "docker.io", "haproxy", "iproute2", "iptables", "openssh-server", "openssl", "procps", "python3", "python3-apt",
    "python3-jmespath", "restic",
)  # fmt: skip
BOOT = """#!/bin/sh
# The packages are as new as the image; nothing has to be asked over the network.
mkdir -p /run/sshd /var/lib/apt/periodic && touch /var/lib/apt/periodic/update-success-stamp
rm -rf /run/docker.pid /run/docker /run/containerd /run/haproxy/*.sock /run/haproxy/*.pid
dockerd >>/var/log/dockerd.log 2>&1 &
# Its own configuration comes with the role `edge`; the package's knows no runtime socket there.
if [ -e /etc/haproxy/delivery.lua ]; then
    start-stop-daemon --start --background --make-pidfile --pidfile=/run/haproxy/haproxy.pid --exec=/usr/sbin/haproxy -- \\
        -W -db -f /etc/haproxy/haproxy.cfg
fi
exec /usr/sbin/sshd -D -e -h /delivery/host_key -o AuthorizedKeysFile=/delivery/authorized_keys -o StrictModes=no
"""
START_SECONDS = 60.0


def docker(*arguments: str) -> str:
    """What ``docker`` of this machine said; it must have worked."""
    return program("docker", *arguments)


@dataclass
class Machine:
    """One host: its name in the inventory, its container, where it is reached."""

    name: str
    container: str
    address: str
    network: str

    def run(self, *argv: str, check: bool = True) -> str:
        """The output of a program on it; '' when it failed and ``check`` is false."""
        done = subprocess.run(["docker", "exec", self.container, *argv], capture_output=True, text=True, check=False)
        assert done.returncode == 0 or not check, f"{self.name}: {' '.join(argv)}: {done.stderr}"
        return done.stdout if done.returncode == 0 else ""

    def await_ready(self) -> None:
        """Until SSH and the engine answer."""
        deadline = time.monotonic() + START_SECONDS
        while not (self.run("docker", "version", check=False) and self.run("sh", "-c", "ss -Hltn sport = :22 | grep .", check=False)):
            assert time.monotonic() < deadline, f"{self.name} does not come up: {self.run('tail', '-n', '20', '/var/log/dockerd.log', check=False)}"
            time.sleep(0.2)

    def cut_off(self) -> None:
        """Take it from the network: it works on, but nobody reaches it."""
        docker("network", "disconnect", self.network, self.container)

    def join(self) -> None:
        docker("network", "connect", "--ip", self.address, self.network, self.container)

    def power_off(self) -> None:
        docker("kill", self.container)

    def power_on(self) -> None:
        docker("start", self.container)
        self.await_ready()


class Fleet:
    """Machines that know one key, on a network of their own; ``gateway`` is how they reach this machine."""

    def __init__(self, folder: Path, names: t.Sequence[str]) -> None:
        self.folder, self.network = folder, f"delivery-hosts-{os.getpid()}"
        self.machines: list[Machine] = []
        self.gateway = ""
        self._names = names

    def start(self) -> None:
        made = image("host", PACKAGES, boot=BOOT)
        base = self._make_network()
        self.gateway = f"{base}.1"
        self._keys()
        plugin = docker("info", "--format", '{{range .ClientInfo.Plugins}}{{if eq .Name "compose"}}{{.Path}}{{end}}{{end}}').strip()
        assert plugin, "docker compose is missing: scripts/bootstrap.sh test installs it"
        for number, name in enumerate(self._names):
            address = f"{base}.{10 + number}"
            container = f"{self.network}-{name}"
            docker(
                "run", "--detach", "--init", "--name", container, "--hostname", name, "--network", self.network, "--ip", address, *RIGHTS,
                "--volume", "/var/lib/docker", "--volume", f"{self.folder}/keys:/delivery:ro",
                "--volume", f"{plugin}:/usr/local/lib/docker/cli-plugins/docker-compose:ro", made,
            )  # fmt: skip
            self.machines.append(Machine(name, container, address, self.network))
        known = (self.folder / "keys" / "host_key.pub").read_text()
        (self.folder / "known_hosts").write_text("".join(f"{one.address} {known}" for one in self.machines))
        for machine in self.machines:
            machine.await_ready()

    def _make_network(self) -> str:
        """A subnet that nobody has here; addresses can only be chosen in one that was."""
        for number in range(os.getpid() % 250, 250 + os.getpid() % 250):
            base = f"10.213.{number % 250}"
            argv = ["docker", "network", "create", "--subnet", f"{base}.0/24", "--gateway", f"{base}.1", self.network]
            if subprocess.run(argv, capture_output=True, check=False).returncode == 0:
                return base
        raise AssertionError("no subnet of 10.213.0.0/16 is free")

    def _keys(self) -> None:
        (self.folder / "keys").mkdir()
        for name in ("host_key", "client_key"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "test", "-f", str(self.folder / "keys" / name)], check=True)
        (self.folder / "keys" / "authorized_keys").write_text((self.folder / "keys" / "client_key.pub").read_text())

    def stop(self) -> None:
        for machine in self.machines:
            subprocess.run(["docker", "rm", "--force", "--volumes", machine.container], capture_output=True, check=False)
        subprocess.run(["docker", "network", "rm", self.network], capture_output=True, check=False)
