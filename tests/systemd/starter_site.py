# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A deploy folder as the starter writes it, filled in as its README says, for one host over SSH."""

from __future__ import annotations

import base64
import http.client
import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import sys
import time
import types
import typing as t
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import yaml
from e2e import shopfront
from e2e.site_under_test import REPOSITORY, Load, Outcome
from machine import Machine, docker
from registry_fixture import start_registry

DEPLOY_DIR = "/opt/shop"
#: Each is looked for in everything that others than its owner can read.
CANARIES = {name: f"canary-{name}-9d41" for name in ("snapshots", "env")}


@dataclass
class Run(Outcome):
    @property
    def changed(self) -> dict[str, int]:
        """Host to the number of tasks that changed it."""
        return {host: int(number) for host, number in re.findall(r"^(\S+) +: ok=\d+ +changed=(\d+)", self.output, re.MULTILINE)}


class StarterSite:
    """``run`` calls a playbook in the folder, ``build`` is CI. Nothing but what a user has is set: no ANSIBLE_ variables."""

    def __init__(self, folder: Path, machine: Machine) -> None:
        self.folder, self.machine, self.deploy = folder, machine, folder / "shop-deploy"
        self.registry = start_registry(folder / "registry", htpasswd=True, tls=True, also=machine.gateway)
        self.name = f"{machine.gateway}:{self.registry.address.rpartition(':')[2]}"
        (folder / "docker").mkdir(mode=0o700)
        (folder / "docker" / "config.json").write_text(json.dumps({"auths": {self.registry.address: {"auth": self.login}}}))

    @property
    def login(self) -> str:
        return base64.b64encode(f"{self.registry.username}:{self.registry.password}".encode()).decode()

    # -- as README.md of the project and of the folder say

    def write(self) -> None:
        """Init, install the collection into it, fill in the examples."""
        checkout = {"ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / ".cache" / "collections")}
        self._call("ansible-playbook", "selfhost.delivery.init", "-e", "app=shop", "-e", f"into={self.deploy}", **checkout).must_succeed()
        self._call("ansible-galaxy", "collection", "build", "--output-path", str(self.folder / "built"), str(REPOSITORY)).must_succeed()
        (tarball,) = (self.folder / "built").iterdir()
        install = ("ansible-galaxy", "collection", "install", "--offline", "--no-deps", "-p", str(self.deploy / "collections"), str(tarball))
        self._call(*install).must_succeed()
        (self.deploy / "compose.yaml").write_text(shopfront.COMPOSE)
        inventory = self.deploy / "inventories" / "staging"
        self._edit(inventory / "hosts.yml", self._hosts)
        self._edit(inventory / "group_vars" / "all" / "environment.yml", self._environment)
        self._edit(self.deploy / "app.yml", self._app)
        vault = yaml.safe_load((inventory / "group_vars" / "all" / "vault.yml.example").read_text())
        vault.update(
            vault_registry_username=self.registry.username,
            vault_registry_password=self.registry.password,
            vault_snapshots_password=CANARIES["snapshots"],
            app_host_env={".env.staging": f"SHOP_PASSWORD={CANARIES['env']}\n"},
        )
        (inventory / "group_vars" / "all" / "vault.yml").write_text(yaml.safe_dump(vault))
        (self.folder / "vault-password").write_text("opens the vault\n")
        encrypt = ("ansible-vault", "encrypt", "--vault-password-file", str(self.folder / "vault-password"))
        self._call(*encrypt, str(inventory / "group_vars" / "all" / "vault.yml")).must_succeed()

    @staticmethod
    def _edit(path: Path, change: t.Callable[[dict[str, t.Any]], None]) -> None:
        content = yaml.safe_load(path.read_text())
        change(content)
        path.write_text(yaml.safe_dump(content, sort_keys=False))

    def _hosts(self, content: dict[str, t.Any]) -> None:
        content["app_hosts"]["hosts"] = {"app-1": {"ansible_host": self.machine.address}}
        # What stands for ~/.ssh of the one who deploys.
        content["app_hosts"]["vars"].update(
            ansible_ssh_private_key_file=str(self.machine.key),
            ansible_ssh_common_args=f"-o UserKnownHostsFile={self.machine.known_hosts}",
            ansible_control_path_dir=str(self.machine.connections),
        )

    def _environment(self, content: dict[str, t.Any]) -> None:
        plugin = docker("info", "--format", '{{range .ClientInfo.Plugins}}{{if eq .Name "compose"}}{{.Path}}{{end}}{{end}}')
        login = content.pop("app_host_registry_auth").popitem()[1]
        content["delivery_registry"]["ca_path"] = str(self.registry.ca_path)
        content.update(
            delivery_domain=self.machine.address,
            delivery_min_free_mb=64,
            app_host_registry_auth={self.name: login},
            app_host_registry_ca={self.name: Path(str(self.registry.ca_path)).read_text()},
            setup_deploy_keys=[Path(f"{self.machine.key}.pub").read_text()],
            setup_compose="binary" if self.machine.suite == "bookworm" else "package",
            setup_compose_binary=plugin,
            edge_ca_fetch_to=str(self.folder / "edge-ca.crt"),
        )

    def _app(self, content: dict[str, t.Any]) -> None:
        app = content["delivery_app"]
        app["images"] = {name: f"{self.name}/shopfront/{name}" for name in ("app", "migrator")}
        app["services"]["web"].update(stop_timeout=2, ready_timeout=20)
        app["services"]["worker"].update(stop_timeout=2)
        app["volumes"] = ["data"]
        # Here nobody resolves names.
        app["routes"] = [{"service": "web"}]

    def run(self, playbook: str, *extra: str, timeout: float = 900, **environ: str) -> Run:
        vault = ("--vault-password-file", str(self.folder / "vault-password"))
        argv = ("ansible-playbook", f"{playbook}.yml", "-i", "inventories/staging", *vault, *extra)
        return self._call(*argv, where=self.deploy, timeout=timeout, **environ)

    def begin(self, playbook: str, *extra: str) -> subprocess.Popen[str]:
        """Start one, in a session of its own."""
        vault = ("--vault-password-file", str(self.folder / "vault-password"))
        return subprocess.Popen(
            [str(Path(sys.executable).parent / "ansible-playbook"), f"{playbook}.yml", "-i", "inventories/staging", *vault, *extra],
            cwd=self.deploy,
            env={name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")} | {"LC_ALL": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    def setup(self, *extra: str) -> Run:
        # The output that counts what changed.
        return self.run("setup", *extra, timeout=1500, ANSIBLE_STDOUT_CALLBACK="ansible.builtin.default")

    def first_setup(self, *extra: str) -> Run:
        """As the folder's README says for a bare host, on which nobody but root can log in."""
        return self.setup("-e", "ansible_user=root", "-e", "ansible_become=false", *extra)

    def promote(self, tag: str, *extra: str) -> Run:
        return self.run("promote", "-e", f"tag={tag}", *extra)

    def _call(self, *command: str, where: Path | None = None, timeout: float = 600, **environ: str) -> Run:
        own = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}
        done = subprocess.run(
            [str(Path(sys.executable).parent / command[0]), *command[1:]],
            env={**own, "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8", **environ},
            cwd=where or self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout,
            check=False,
        )
        return Run(done.returncode, done.stdout)

    # -- CI

    def build(self, tag: str, web: str = "ok") -> str:
        for reference in shopfront.build(*(f"{self.registry.address}/shopfront/{name}" for name in ("app", "migrator")), tag, web):
            subprocess.run(["docker", "--config", str(self.folder / "docker"), "push", "--quiet", reference], check=True, stdout=subprocess.DEVNULL)
            subprocess.run(["docker", "rmi", reference], check=True, stdout=subprocess.DEVNULL)
        return tag

    def hand_out_keeper(self) -> None:
        """The data keeper's image comes from no registry."""
        shopfront.build_keeper()
        docker("save", "--output", str(self.folder / "keeper.tar"), shopfront.KEEPER_IMAGE)
        docker("cp", str(self.folder / "keeper.tar"), f"{self.machine.name}:/keeper.tar")
        self.machine.run("docker", "load", "--quiet", "--input", "/keeper.tar")

    # -- a client

    def trust(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.folder / "edge-ca.crt"))

    def serving(self) -> str:
        """The version that the public route answers, or the reason why it does not."""
        try:
            with urllib.request.urlopen(f"https://{self.machine.address}/api/ready", timeout=5, context=self.trust()) as answer:
                return str(json.load(answer)["version"])
        except (OSError, ValueError) as error:
            return f"nothing: {error}"

    def await_serving(self, tag: str, seconds: float = 300) -> None:
        deadline = time.monotonic() + seconds
        while (seen := self.serving()) != tag:
            assert time.monotonic() < deadline, f"{seen}\n{self.machine.run('journalctl', '-u', 'shop*', '-n', '30', '--no-pager', check=False)}"
            time.sleep(0.1)

    def load(self) -> Load:
        """The tests' load generator, over TLS."""
        load = Load(443, pause=0.02, address=self.machine.address)
        context = self.trust()
        load._http = types.SimpleNamespace(  # type: ignore[assignment]
            HTTPConnection=lambda address, port, timeout: http.client.HTTPSConnection(address, port, timeout=timeout, context=context),
            HTTPException=http.client.HTTPException,
        )
        return load

    def certificate(self, name: str, foreign_key: bool = False) -> Path:
        """A file of variables that gives the edge a new certificate of its own making, for ``name``."""
        folder = self.folder / f"certificate-{time.monotonic_ns()}"
        folder.mkdir()
        for key in ("a.key", "b.key"):
            made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "30", "-subj", f"/CN={name}"]
            subprocess.run([*made, "-addext", f"subjectAltName=DNS:{name}", "-keyout", key, "-out", f"{key}.crt"], cwd=folder, check=True, capture_output=True)
        pem = (folder / ("b.key" if foreign_key else "a.key")).read_text() + (folder / "a.key.crt").read_text()
        (folder / "variables.json").write_text(json.dumps({"edge_certificate_contents": {"shop": pem}}))
        return folder / "variables.json"

    @staticmethod
    def serial(variables: Path) -> bytes:
        """The certificate in such a file."""
        return ssl.PEM_cert_to_DER_cert((variables.parent / "a.key.crt").read_text())

    def served_for(self, name: str) -> bytes:
        """The certificate that a client gets which asks for ``name``."""
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        with socket.create_connection((self.machine.address, 443), timeout=10) as raw:
            with context.wrap_socket(raw, server_hostname=name) as secured:
                found = secured.getpeercert(binary_form=True)
        assert found is not None
        return found

    def worker(self) -> str:
        """The process that serves; a reload makes another."""
        return self.ask_edge("show info").partition("\nPid: ")[2].split()[0]

    def ask_edge(self, command: str) -> str:
        asked = f"import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/haproxy/admin.sock'); s.sendall({command.encode() + bytes([10])!r})"
        return self.machine.run("python3", "-c", f"{asked}; print(b''.join(iter(lambda: s.recv(65536), b'')).decode())")

    def slots(self) -> dict[str, str]:
        """Filled slots of the edge's backend of the web service: name to address."""
        told = self.ask_edge("show servers state shop-web")
        rows = [line.split() for line in told.splitlines() if line and line[0].isdigit() and " " in line]
        return {row[3]: row[4] for row in rows if row[4] != "127.0.0.1"}

    def container_address(self, service: str, *filters: str) -> str:
        """Addresses of its running containers, separated by newlines."""
        asked = [word for one in (f"label=com.docker.compose.service={service}", *filters) for word in ("--filter", one)]
        found = self.machine.run("docker", "ps", "--quiet", *asked).split()
        form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
        return self.machine.run("docker", "inspect", "--format", form, *found) if found else ""

    def journal(self, tag: str) -> str:
        """The journal of the newest release of a tag, empty before there is one."""
        return self.machine.run("sh", "-c", f"cat $(ls -d {DEPLOY_DIR}/releases/*-{tag} | tail -n 1)/journal.jsonl", check=False)

    def close(self) -> None:
        images = docker("image", "ls", "--quiet", "--filter", f"reference={self.registry.address}/*/*").split()
        if images:
            subprocess.run(["docker", "rmi", "--force", *set(images)], check=False, stdout=subprocess.DEVNULL)
        self.registry.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
