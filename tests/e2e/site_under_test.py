# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Two environments on this machine with everything real: registry, engine, edge, snapshots, and the playbooks as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import typing as t
import urllib.error
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from . import shopfront

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass
class Outcome:
    """How a playbook ended: its exit code and all it said."""

    code: int
    output: str

    def must_succeed(self) -> Outcome:
        assert self.code == 0, self.output
        return self

    def must_fail(self, *fragments: str) -> Outcome:
        assert self.code != 0, f"it succeeded:\n{self.output}"
        flat = " ".join(self.output.split())
        for fragment in fragments:
            assert fragment in flat, f"{fragment!r} is not in:\n{self.output}"
        return self


class Load:
    """Asks the edge over one keep-alive connection every ``pause`` seconds, without retries, until it is told to stop; every failure is kept."""

    def __init__(self, port: int, pause: float = 0.01, address: str = "127.0.0.1") -> None:
        import http.client

        self._http = http.client
        self.port, self.pause, self.address = port, pause, address
        self.sent = 0
        self.lost: list[str] = []
        self.versions: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Load:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join(20)

    def _run(self) -> None:
        connection = self._http.HTTPConnection(self.address, self.port, timeout=15)
        until = time.monotonic() + 600
        while not self._stop.wait(self.pause) and time.monotonic() < until:
            self.sent += 1
            try:
                connection.request("GET", "/api/ready")
                answer = connection.getresponse()
                body = answer.read()
                if answer.status != 200:
                    self.lost.append(f"HTTP {answer.status}")
                    continue
                version = json.loads(body)["version"]
                if not self.versions or self.versions[-1] != version:
                    self.versions.append(version)
            except (OSError, ValueError, self._http.HTTPException) as error:
                self.lost.append(repr(error))
                connection.close()


@dataclass
class Environment:
    """One inventory with its deploy dir and its edge."""

    name: str
    inventory: Path
    deploy_dir: Path
    port: int
    edge_dir: Path

    @property
    def project(self) -> str:
        return f"shopfront-{self.name}-{self.port}"  # several runs share one engine

    def serving(self) -> str:
        """The version that the public route answers, or the reason why it does not."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/api/ready", timeout=10) as answer:
                return json.load(answer)["version"]
        except (urllib.error.URLError, OSError, ValueError) as error:
            return f"nothing: {error}"

    def journal(self) -> list[dict[str, t.Any]]:
        """Entries of the newest release."""
        folders = sorted((self.deploy_dir / "releases").glob("2*"))
        if not folders:
            return []
        path = folders[-1] / "journal.jsonl"
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def confirmation(self) -> str:
        """What ``confirm.json`` of the newest release says."""
        path = sorted((self.deploy_dir / "releases").glob("2*"))[-1] / "confirm.json"
        return json.loads(path.read_text())["state"] if path.exists() else ""

    def newest(self) -> dict[str, t.Any]:
        return json.loads((sorted((self.deploy_dir / "releases").glob("2*"))[-1] / "release.json").read_text())

    def release_count(self) -> int:
        return len(list((self.deploy_dir / "releases").glob("2*")))

    def current(self) -> str:
        link = self.deploy_dir / "current"
        return json.loads((link / "release.json").read_text())["tag"] if link.exists() else ""

    def containers(self, all_of_them: bool = True) -> list[str]:
        argv = ["docker", "ps", "--format", "{{.Names}}", "--filter", f"label=com.docker.compose.project={self.project}"]
        return subprocess.check_output([*argv, *["--all"] * all_of_them], text=True).split()

    def data(self, name: str) -> str:
        """A file of the data volume, read through the container that has it mounted."""
        argv = ["docker", "run", "--rm", "--network", "none", "-v", f"{self.project}_data:/data", shopfront.KEEPER_IMAGE, "/bin/cat", f"/data/{name}"]
        return subprocess.run(argv, capture_output=True, text=True, check=False).stdout


@dataclass
class Site:
    """Everything of one test run, below one folder."""

    folder: Path
    registry: t.Any
    staging: Environment
    production: Environment
    built: set[str] = field(default_factory=set)

    @property
    def app(self) -> str:
        return f"{self.registry.address}/shopfront/app"

    @property
    def migrator(self) -> str:
        return f"{self.registry.address}/shopfront/migrator"

    def build(self, tag: str, web: str = "ok", migrate: str = "ok", architecture: str = "") -> str:
        """Build and push one tag, as CI would."""
        if tag not in self.built:
            for reference in shopfront.build(self.app, self.migrator, tag, web, migrate, architecture):
                subprocess.run(["docker", "--config", str(self.folder / "docker"), "push", "--quiet", reference], check=True, stdout=subprocess.DEVNULL)
                subprocess.run(["docker", "rmi", reference], check=True, stdout=subprocess.DEVNULL)
            self.built.add(tag)
        return tag

    def command(self, playbook: str, environment: Environment, *extra: str) -> list[str]:
        tool = Path(sys.executable).parent / "ansible-playbook"
        return [str(tool), str(REPOSITORY / "playbooks" / f"{playbook}.yml"), "-i", str(environment.inventory), *extra]

    def environ(self) -> dict[str, str]:
        return {
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / ".cache" / "collections"),
            "ANSIBLE_STDOUT_CALLBACK": "selfhost.delivery.timeline",
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_LOCAL_TEMP": str(self.folder / "ansible-tmp"),
            "ANSIBLE_REMOTE_TEMP": str(self.folder / "ansible-tmp"),
        }

    def run(self, playbook: str, environment: Environment, *extra: str, timeout: float = 300) -> Outcome:
        """Call a playbook as a user does."""
        return _outcome_of(self.command(playbook, environment, *extra), self.environ(), self.folder, timeout)

    def promote(self, environment: Environment, tag: str, *extra: str) -> Outcome:
        return self.run("promote", environment, "-e", f"tag={tag}", *extra)

    def kill_at(self, playbook: str, environment: Environment, step: str, event: str, *extra: str, orphans: bool = False) -> bool:
        """Start a playbook and SIGKILL it, with all it started, when the journal shows ``step`` and ``event``.

        ``orphans``: only the controller is killed, the module it was running goes on. ``False`` when the playbook ended before that was seen.
        """
        before = environment.release_count()
        process = subprocess.Popen(
            self.command(playbook, environment, *extra),
            env=self.environ(),
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            while process.poll() is None:
                if environment.release_count() > before and any(
                    entry["step"] == step and entry["event"] == event for entry in environment.journal()
                ):
                    return True
                time.sleep(0.005)
            return False
        finally:
            for pid in [process.pid] if orphans else _family(process.pid):
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            process.wait()

    def write_inventories(self, change: t.Callable[[dict[str, t.Any]], None] | None = None) -> None:
        """(Re)write both inventories; ``change`` may edit the variables of each, ``delivery_environment`` tells which it is."""
        for environment in (self.staging, self.production):
            variables = self._variables(environment)
            if change:
                change(variables)
            folder = environment.inventory
            folder.mkdir(parents=True, exist_ok=True)
            inventory = {"app_hosts": {"hosts": {environment.name: {"ansible_connection": "local"}}, "vars": variables}}
            (folder / "hosts.yml").write_text(yaml.safe_dump(inventory, sort_keys=False))

    def promote_from_starter(self, tag: str) -> Outcome:
        """As a user does from a folder that the starter wrote: the collection installed in it, its examples replaced by this site."""
        folder, programs = self.folder / "shopfront-deploy", Path(sys.executable).parent
        own = {name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")}

        def run(*command: str, where: Path = self.folder, **environ: str) -> Outcome:
            return _outcome_of([str(programs / command[0]), *command[1:]], {**own, "ANSIBLE_NOCOLOR": "1", **environ}, where)

        installed = self.environ()["ANSIBLE_COLLECTIONS_PATH"]
        run("ansible-playbook", "selfhost.delivery.init", "-e", "app=shopfront", "-e", f"into={folder}", ANSIBLE_COLLECTIONS_PATH=installed).must_succeed()
        run("ansible-galaxy", "collection", "build", "--output-path", str(self.folder / "built"), str(REPOSITORY)).must_succeed()
        (tarball,) = (self.folder / "built").iterdir()
        run("ansible-galaxy", "collection", "install", "--offline", "--no-deps", "-p", str(folder / "collections"), str(tarball)).must_succeed()
        variables = self._variables(self.production)
        del variables["delivery_source_dir"]
        (folder / "app.yml").write_text(yaml.safe_dump({"delivery_app": variables.pop("delivery_app")}))
        (folder / "inventories" / "production" / "group_vars" / "all" / "environment.yml").write_text(yaml.safe_dump(variables))
        hosts = {"app_hosts": {"hosts": {self.production.name: {"ansible_connection": "local"}}}}
        (folder / "inventories" / "production" / "hosts.yml").write_text(yaml.safe_dump(hosts))
        (folder / "compose.yaml").write_text((self.folder / "compose.yaml").read_text())
        return run("ansible-playbook", "promote.yml", "-e", f"tag={tag}", where=folder)

    def _variables(self, environment: Environment) -> dict[str, t.Any]:
        def image(name: str) -> t.Any:
            source = f"{self.registry.address}/shopfront/{name}"
            return source if environment is self.staging else {"source": source, "repository": f"{self.registry.address}/production/shopfront/{name}"}

        return {
            "ansible_python_interpreter": "{{ ansible_playbook_python }}",
            "delivery_environment": environment.name,
            "delivery_deploy_dir": str(environment.deploy_dir),
            "delivery_source_dir": str(self.folder),
            "delivery_registry": self.registry.options,
            "delivery_edge": {"type": "haproxy", "socket": str(environment.edge_dir / "run" / "admin.sock")},
            "delivery_min_free_mb": 64,
            "delivery_app": {
                "name": "shopfront",
                "project": environment.project,
                "compose_files": ["compose.yaml"],
                "env_files": [f".env.{environment.name}"],
                "images": {"app": image("app"), "migrator": image("migrator")},
                "services": {
                    "web": {"image": "app", "port": 8080, "ready": {"http": "/api/ready"}, "ready_timeout": 6, "stable": 3, "stop_timeout": 2},
                    "worker": {"image": "app", "stop_timeout": 2},
                },
                "migrator": {"service": "migrate", "image": "migrator", "timeout": 5},
                "volumes": ["data"],
                "routes": [{"service": "web"}],
                "public": {"url": f"http://127.0.0.1:{environment.port}", "ready": "/api/ready", "version": "version", "timeout": 10},
                "policies": {"gates": ["staging"] if environment is self.production else []},
            },
            "app_host_registry_auth": {self.registry.address: {"username": self.registry.username, "password": self.registry.password}},
            "app_host_env": {f".env.{environment.name}": "SHOP_PASSWORD=not-a-real-one\n"},
            "edge_instance": environment.project,
            "edge_config_dir": str(environment.edge_dir),
            "edge_bind_http": [f"127.0.0.1:{environment.port}"],
            "edge_service_manager": "process",
            "snapshots_engine": os.environ.get("DELIVERY_SNAPSHOTS_ENGINE", "auto"),
            "snapshots_repository": str(self.folder / f"snapshots-{environment.name}"),
            "snapshots_password": "snapshots-are-not-secret-here",
        }


def _outcome_of(command: list[str], environ: dict[str, str], where: Path, timeout: float = 300) -> Outcome:
    done = subprocess.run(
        command,
        env=environ,
        cwd=where,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Outcome(done.returncode, done.stdout)


def _family(pid: int) -> list[int]:
    """``pid`` and all its descendants, also those in sessions of their own."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [pid], [pid]
    while queue:
        for child in children.get(queue.pop(), []):
            found.append(child)
            queue.append(child)
    return found
