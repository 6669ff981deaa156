# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One server to deploy to: a container with a Docker engine of its own, a registry and sshd, reached over SSH like any other."""

from __future__ import annotations

import json
import os
import subprocess
import time
import typing as t
from pathlib import Path

import debian_root
from debian_root import RIGHTS, HostError, program

PACKAGES = (
    "ca-certificates",
    "curl",
    "docker.io",
    "docker-registry",
    "haproxy",
    "iproute2",
    "iptables",
    "nginx-light",
    "openssh-server",
    "openssl",
    "procps",
    "python3",
    "python3-apt",
    "python3-jmespath",
    "restic",
)
PATIENCE = 60.0
REGISTRY_PORT = 5000


class Host:
    """A running host. ``address`` is its IP; ``folder`` is seen by it as /bench."""

    def __init__(self, folder: Path, say: t.Callable[[str], None]) -> None:
        self.name = f"bench-rollout-{os.getpid()}"
        self.folder = folder
        self.key = folder / "ssh" / "id"
        image = debian_root.image("bench-host", PACKAGES, say=say)
        (folder / "ssh").mkdir(mode=0o700)
        program("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", self.key)
        program("docker", "volume", "create", self.name)
        try:
            self._start(image)
        except BaseException:
            self.remove()
            raise

    def _start(self, image: str) -> None:
        program(
            *(
                "docker",
                "run",
                "--detach",
                "--init",
                "--name",
                self.name,
                "--hostname",
                "bench",
                "--volume",
                f"{self.name}:/var/lib/docker",
            ),
            *("--volume", f"{self.folder}:/bench", *RIGHTS, image, "sleep", "infinity"),
        )
        self.address = program("docker", "inspect", "--format", "{{.NetworkSettings.IPAddress}}", self.name).strip()
        self.registry = f"{self.address}:{REGISTRY_PORT}"
        plugin = _compose_plugin()
        self.run("mkdir", "-p", "/usr/local/lib/docker/cli-plugins", "/root/.ssh", "/run/sshd", "/etc/docker")
        program("docker", "cp", "--follow-link", plugin, f"{self.name}:/usr/local/lib/docker/cli-plugins/docker-compose")
        self.write("/root/.ssh/authorized_keys", self.key.with_suffix(".pub").read_text())
        # VERBOSE names every session that is opened on a connection.
        self.write(
            "/etc/ssh/sshd_config.d/bench.conf", "LogLevel VERBOSE\nPermitRootLogin prohibit-password\nMaxSessions 100\nMaxStartups 100\n"
        )
        self.write("/etc/docker/daemon.json", json.dumps({"insecure-registries": [self.registry]}))
        storage = {"filesystem": {"rootdirectory": "/var/lib/docker/bench-registry"}, "delete": {"enabled": True}}
        registry = {"version": 0.1, "log": {"level": "error"}, "storage": storage, "http": {"addr": f":{REGISTRY_PORT}"}}
        self.write("/etc/registry.json", json.dumps(registry))
        self.run("/usr/sbin/sshd", "-E", "/bench/sshd.log")
        self.behind("dockerd", "-H unix:///var/run/docker.sock -H unix:///bench/docker.sock")
        self.behind("docker-registry", "serve /etc/registry.json")
        self._until("its engine answers", lambda: self.run("docker", "version"))
        self._until("its registry answers", lambda: self.run("curl", "-fsS", f"http://{self.registry}/v2/"))
        options = {
            "IdentityFile": self.key,
            "IdentitiesOnly": "yes",
            "UserKnownHostsFile": self.folder / "ssh" / "known_hosts",
            "StrictHostKeyChecking": "accept-new",
            "LogLevel": "ERROR",
        }
        lines = [f"Host {self.address}", "  User root", *(f"  {name} {value}" for name, value in options.items())]
        (self.folder / "ssh" / "config").write_text("\n".join(lines) + "\n")
        program("ssh", "-F", self.ssh_config, self.address, "true")

    @property
    def ssh_config(self) -> Path:
        return self.folder / "ssh" / "config"

    @property
    def engine_socket(self) -> str:
        return str(self.folder / "docker.sock")

    def ssh(self, command: str) -> list[str]:
        """The command line that runs ``command`` there in one session."""
        return ["ssh", "-F", str(self.ssh_config), self.address, command]

    def run(self, *command: str, content: bytes | None = None) -> str:
        """Run something there without SSH."""
        return program("docker", "exec", "--interactive", self.name, *command, content=content)

    def behind(self, name: str, arguments: str) -> None:
        program("docker", "exec", "--detach", self.name, "sh", "-c", f"exec {name} {arguments} >/bench/{name}.log 2>&1")

    def write(self, path: str, text: str, mode: str = "0600") -> None:
        self.run(
            "sh", "-c", 'mkdir -p "$(dirname "$1")" && umask 077 && cat >"$1" && chmod "$2" "$1"', "sh", path, mode, content=text.encode()
        )

    def sessions(self) -> int:
        """How many SSH sessions were opened so far: commands and file transfers, on however few connections."""
        return (self.folder / "sshd.log").read_text(errors="replace").count("Starting session: ")

    def _until(self, what: str, question: t.Callable[[], t.Any]) -> None:
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                question()
                return
            except HostError as exc:
                if time.monotonic() > deadline:
                    raise HostError(f"the host was started, but not seen that {what}: {exc}") from exc
                time.sleep(0.1)

    def remove(self) -> None:
        subprocess.run(["docker", "rm", "--force", "--volumes", self.name], capture_output=True, check=False)
        subprocess.run(["docker", "volume", "rm", self.name], capture_output=True, check=False)


def _compose_plugin() -> str:
    """Compose as it is on this machine, for the host too."""
    plugins = json.loads(program("docker", "info", "--format", "{{json .ClientInfo.Plugins}}"))
    found = [str(plugin["Path"]) for plugin in plugins or () if plugin.get("Name") == "compose"]
    if not found:
        raise HostError("docker has no plugin compose here; scripts/bootstrap.sh test installs it")
    return found[0]
