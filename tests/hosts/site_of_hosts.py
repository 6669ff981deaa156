# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One environment of three hosts, reached over SSH with the settings that the starter writes."""

from __future__ import annotations

import json
import re
import subprocess
import time
import typing as t
import urllib.error
import urllib.request
from dataclasses import dataclass, field

import yaml
from e2e import shopfront
from e2e.site_under_test import REPOSITORY, Environment, Outcome, Site

from .machines import Machine, docker

DEPLOY_DIR = "/opt/shopfront"


@dataclass
class Hosts(Environment):
    """An environment whose files are on its hosts; the first is the coordinator."""

    machines: list[Machine] = field(default_factory=list)

    @property
    def coordinator(self) -> Machine:
        return self.machines[0]

    @property
    def project(self) -> str:
        return "shopfront"

    def answers(self) -> list[str]:
        """What each host's own edge answers with: a version, or why there is none."""
        return [self.answer(machine) for machine in self.machines]

    def answer(self, machine: Machine) -> str:
        try:
            with urllib.request.urlopen(f"http://{machine.address}/api/ready", timeout=5) as answer:
                return json.load(answer)["version"]
        except (urllib.error.URLError, OSError, ValueError) as error:
            return f"nothing: {error}"

    def releases(self, machine: Machine | None = None) -> list[str]:
        return sorted((machine or self.coordinator).run("sh", "-c", f"cd {DEPLOY_DIR}/releases && ls -d 2* || true").split())

    def release_count(self) -> int:
        return len(self.releases())

    def journal(self, machine: Machine | None = None) -> list[dict[str, t.Any]]:
        """Entries of the newest release."""
        found = self.releases(machine)
        text = (machine or self.coordinator).run("cat", f"{DEPLOY_DIR}/releases/{found[-1]}/journal.jsonl", check=False) if found else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def record(self, number: int = -1) -> dict[str, t.Any]:
        """``release.json`` of a release, the newest by default."""
        return json.loads(self.coordinator.run("cat", f"{DEPLOY_DIR}/releases/{self.releases()[number]}/release.json"))

    def currents(self) -> list[str]:
        """The tag that each host has as its current one."""
        return [re.sub(r"^.*/\d{8}-\d{6}-", "", machine.run("readlink", f"{DEPLOY_DIR}/current", check=False).strip()) for machine in self.machines]

    def locked(self) -> bool:
        return any(machine.run("ls", f"{DEPLOY_DIR}/lock.json", check=False) for machine in self.machines)

    def apps(self, machine: Machine, all_of_them: bool = True) -> list[str]:
        return sorted(machine.run("docker", "ps", "--format", "{{.Names}}", *["--all"] * all_of_them).split())

    def migrations(self) -> list[list[str]]:
        """Tags that a migrator has run for, on each host."""
        read = ("docker", "run", "--rm", "--network", "none", "-v", "shopfront_data:/data", shopfront.KEEPER_IMAGE, "/bin/cat", "/data/migrations")
        return [machine.run(*read, check=False).split() for machine in self.machines]


@dataclass
class HostsSite(Site):
    """``registry_name`` is how hosts and controller call the registry; ``client_key`` logs in."""

    registry_name: str = ""
    client_key: str = ""

    @property
    def hosts(self) -> Hosts:
        assert isinstance(self.production, Hosts)
        return self.production

    def environ(self) -> dict[str, str]:
        written = (REPOSITORY / "roles" / "starter" / "templates" / "ansible.cfg.j2").read_text()
        settings = re.search(r"^ssh_args = (.*)$", written, re.MULTILINE)
        assert settings and "pipelining = true" in written, written
        return {**super().environ(), "ANSIBLE_SSH_ARGS": settings.group(1), "ANSIBLE_REMOTE_TEMP": "/tmp/.ansible", "ANSIBLE_TIMEOUT": "5"}

    def write_inventories(self, change: t.Callable[[dict[str, t.Any]], None] | None = None) -> None:
        variables = self._variables(self.production)
        variables.update(
            ansible_user="root",
            ansible_ssh_private_key_file=self.client_key,
            ansible_ssh_common_args=f"-o UserKnownHostsFile={self.folder}/known_hosts",
        )
        if change:
            change(variables)
        self.production.inventory.mkdir(parents=True, exist_ok=True)
        hosts = {machine.name: {"ansible_host": machine.address} for machine in self.hosts.machines}
        inventory = {"app_hosts": {"hosts": hosts, "vars": variables}}
        (self.production.inventory / "hosts.yml").write_text(yaml.safe_dump(inventory, sort_keys=False))

    def _variables(self, environment: Environment) -> dict[str, t.Any]:
        variables = super()._variables(environment)
        for ours in ("ansible_python_interpreter", "edge_instance", "edge_config_dir", "edge_bind_http", "delivery_edge", "snapshots_repository"):
            del variables[ours]
        app = variables["delivery_app"]
        app.update(
            project="shopfront",
            images={name: f"{self.registry_name}/shopfront/{name}" for name in ("app", "migrator")},
            public={**app["public"], "url": f"http://{self.hosts.coordinator.address}"},
            policies={"gates": []},
        )
        variables.update(
            delivery_deploy_dir=DEPLOY_DIR,
            app_host_registry_ca={self.registry_name: (self.registry.directory / "ca.pem").read_text()},
            app_host_registry_auth={self.registry_name: {"username": self.registry.username, "password": self.registry.password}},
            snapshots_engine="restic",
        )
        return variables

    def promote_and(self, tag: str, when: t.Callable[[], bool], do: t.Callable[[], object], *extra: str) -> Outcome:
        """Promote ``tag``, and ``do`` something as soon as ``when`` is true."""
        with (self.folder / "output").open("w+") as output:
            process = subprocess.Popen(
                self.command("promote", self.hosts, "-e", f"tag={tag}", *extra),
                env=self.environ(),
                cwd=self.folder,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            try:
                while not when():
                    assert process.poll() is None, (self.folder / "output").read_text()
                    time.sleep(0.05)
                do()
                process.wait(600)
            finally:
                process.kill()
                process.wait()
            return Outcome(process.returncode, (self.folder / "output").read_text())

    def hand_out_keeper(self) -> None:
        """The data keeper's image comes from no registry."""
        shopfront.build_keeper()
        archive = self.folder / "keeper.tar"
        docker("save", "--output", str(archive), shopfront.KEEPER_IMAGE)
        for machine in self.hosts.machines:
            docker("cp", str(archive), f"{machine.container}:/keeper.tar")
            machine.run("docker", "load", "--quiet", "--input", "/keeper.tar")
