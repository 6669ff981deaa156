# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How long a rollout takes and what it costs users, beside other tools; `make bench-rollout` runs it.

From "the image is in the registry" to "the new release serves and the old one is stopped", and back, and what happens to a release
that is broken. One host with an engine of its own, reached over SSH; on it every tool has the same app installed, a web service
and a worker, each with a port of its own. In each round every tool does a case once, in turn, with a fresh image, under the same load: clients
that keep their connection and never ask twice. What was reached is looked at afterwards: who answers, and what runs. A tool
that is not there is named and left out: no number is ever taken from elsewhere.
"""

from __future__ import annotations

import argparse
import gzip
import http.client
import io
import itertools
import json
import os
import resource
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import typing as t
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLLECTIONS = ROOT / ".cache" / "collections"
sys.path[:0] = [str(COLLECTIONS), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

from debian_root import HostError, program  # noqa: E402
from host import Host  # noqa: E402
from measure import plot  # noqa: E402

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import OCI_MANIFEST, Descriptor, Manifest  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_of  # noqa: E402

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = "application/vnd.oci.image.config.v1+json"
#: What every tool gives a release to become ready, seconds; that of one that is "ready late", by round.
TIMEOUT = 8
LATE = (1.6, 2.4, 2.0, 1.8, 2.2)
#: Bytes that are new in each release; the program itself is in a layer that all of them share.
FRESH = 3 * 2**20
CONNECTIONS = 8
#: Bounds of what is waited for; never a time that must pass.
PATIENCE, LONGEST = 30.0, 180.0
#: Labels of the images, which their containers have too: what runs is asked of the engine, whichever tool started it.
OF_TOOL, OF_RELEASE = "bench.tool", "bench.release"

FLOOR, FLOOR_SSH, ROLLOUT, PROMOTE = "floor, no SSH", "floor", "compose_rollout", "promote.yml"
COMPOSE, SCRIPT, DOCKER_ROLLOUT, SWARM = "docker compose", "shell script", "docker-rollout", "docker service"
KAMAL, KAMAL_AT_ONCE = "Kamal", "Kamal, readiness_delay: 0"
OURS = (ROLLOUT, PROMOTE)
TOOLS = (FLOOR, FLOOR_SSH, *OURS, COMPOSE, SCRIPT, DOCKER_ROLLOUT, SWARM, KAMAL, KAMAL_AT_ONCE)
#: The order is that of a round: a rollback goes back to the release that is ready late.
CASES = {
    "late": "the new release is ready after about 2 s",
    "at once": "the new release is ready at once",
    "rollback": "back to the release before, which is ready after about 2 s",
    "crash": "the new release ends as soon as it starts: until that is said",
    "never": f"the new release never gets ready, {TIMEOUT} s are given: until that is said",
}
BROKEN = ("crash", "never")


# -- the app -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Release:
    """One image in the registry; ``tag`` is what it says as its version."""

    repository: str
    tag: str
    digest: str

    @property
    def tagged(self) -> str:
        return f"{self.repository}:{self.tag}"

    @property
    def pinned(self) -> str:
        return f"{self.repository}@{self.digest}"


class Factory:
    """Makes releases and pushes them, as CI would."""

    def __init__(self, registry: str, binary: Path) -> None:
        self._registry = registry
        self._client = RegistryClient(registry, ClientOptions(plain_http=True))
        self._layers: dict[str, list[tuple[Descriptor, str]]] = {}
        self._base = _layer({"app": binary.read_bytes()})
        self._numbers = itertools.count(1)

    def release(self, tool: str, behave: str = "ok", after: float = 0.0, health: bool = False) -> Release:
        """``behave``: ok, crash, never. ``after``: seconds from start to ready. ``health``: the image has a health check."""
        tag = f"sha-{next(self._numbers):04}"
        environment = {"VERSION": tag, "BEHAVE": behave, "READY_AFTER": f"{after:g}", "PATH": "/"}
        labels = {OF_TOOL: tool, OF_RELEASE: tag, "service": short(tool)}
        content = {"entrypoint": ["/app"], "cmd": ["web"], "environment": environment, "labels": labels}
        return self.image(short(tool), tag, _layer({"release": os.urandom(FRESH)}), content, health)

    def image(self, name: str, tag: str, fresh: tuple[bytes, str], content: t.Mapping[str, t.Any], health: bool = False) -> Release:
        repository = f"bench/{name}"
        shared = self._layers.setdefault(repository, [])
        if not shared:
            shared.append((self._client.push_blob(repository, self._base[0], LAYER), self._base[1]))
        layers = [*shared, (self._client.push_blob(repository, fresh[0], LAYER), fresh[1])]
        config: dict[str, t.Any] = {
            "Entrypoint": content["entrypoint"],
            "Cmd": content["cmd"],
            "Env": [f"{key}={value}" for key, value in content["environment"].items()],
            "Labels": content["labels"],
        }
        if health:
            config["Healthcheck"] = {"Test": ["CMD", "/app", "probe"], "Interval": 10**9, "Timeout": 10**9, "Retries": TIMEOUT}
        image = {
            "architecture": "amd64",
            "os": "linux",
            "config": config,
            "rootfs": {"type": "layers", "diff_ids": [diff for dummy, diff in layers]},
        }
        manifest = Manifest.build(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": self._client.push_blob(repository, json.dumps(image).encode(), CONFIG).as_json(),
                "layers": [descriptor.as_json() for descriptor, dummy in layers],
            }
        )
        self._client.put_manifest(repository, manifest, tag)
        return Release(f"{self._registry}/{repository}", tag, manifest.digest)


def _layer(files: t.Mapping[str, bytes]) -> tuple[bytes, str]:
    """A gzip layer of programs and folders they need, and the digest of what is in it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for name in ("tmp", "data"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o777
            archive.addfile(folder)
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(data), 0o755
            archive.addfile(entry, io.BytesIO(data))
    return gzip.compress(content.getvalue(), 1), digest_of(content.getvalue())


def short(tool: str) -> str:
    """A name that repositories, projects and containers may have."""
    return "-".join("".join(letter if letter.isalnum() else " " for letter in tool.lower()).split())


def build_app() -> Path:
    """The app's program, built once; it has no dependency, so Go fetches nothing."""
    source = ROOT / "tests/bench/app"
    name = digest_of((source / "main.go").read_bytes())[7:19]
    built = ROOT / ".cache" / "bench" / f"app-{name}"
    if built.exists():
        return built
    go = next((found for found in (shutil.which("go"), str(ROOT / ".cache/gotool/bin/go")) if found and os.access(found, os.X_OK)), "")
    if not go:
        raise HostError("the app of this benchmark is built with Go, and there is none on PATH")
    with tempfile.TemporaryDirectory() as folder:
        settings = {"CGO_ENABLED": "0", "GOTOOLCHAIN": "local", "GOFLAGS": "", "GOWORK": "off", "GOCACHE": folder}
        command = [go, "build", "-trimpath", "-ldflags", "-s -w", "-o", f"{built}.part", "."]
        built.parent.mkdir(parents=True, exist_ok=True)
        done = subprocess.run(command, cwd=source, env={**os.environ, **settings}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise HostError(f"the app could not be built:\n{done.stderr}")
    return Path(f"{built}.part").rename(built)


# -- tools -------------------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """What the tools of a run share."""

    work: Path
    host: Host
    factory: Factory
    engine: Engine

    def running(self, tool: str) -> list[str]:
        """The release of each running container of a tool's app."""
        found = self.engine.containers({OF_TOOL: tool}, all=False)
        return sorted(one["Labels"][OF_RELEASE] for one in found)


Commands = list[list[str]]


class Tool:
    """One way to deploy. ``deploy`` and ``back`` are the commands that are timed, one after the other."""

    name = ""
    health = False

    def __init__(self, site: Site, port: int) -> None:
        self.site, self.port = site, port
        self.current: Release | None = None
        self.previous: Release | None = None
        self.tasks: list[int] = []

    def environment(self) -> dict[str, str]:
        return {}

    def where(self) -> Path:
        return self.site.work

    def make(self, behave: str = "ok", after: float = 0.0) -> Release:
        return self.site.factory.release(self.name, behave, after, self.health)

    def prepare(self, release: Release) -> None:
        """Put the first release there; not timed."""
        run_all(self, self.deploy(release))

    def begin(self, release: Release) -> None:
        """What must be there before the clock starts."""

    def deploy(self, release: Release) -> Commands:
        raise NotImplementedError

    def back(self, release: Release) -> Commands:
        return self.deploy(release)

    def after(self, release: Release, good: bool) -> None:
        """What is put in order after the clock has stopped."""

    def told(self, seconds: float, _output: str) -> float:
        """The time that counts, of what the clock outside says."""
        return seconds


class Floor(Tool):
    name = FLOOR

    def deploy(self, release: Release) -> Commands:
        return [["docker", "exec", self.site.host.name, "sh", "-c", self._command(release)]]

    def _command(self, release: Release) -> str:
        given = {"image": release.tagged, "project": short(self.name), "socket": "/run/bench-edge/admin.sock", "timeout": TIMEOUT}
        return f"exec python3 -I /bench/floor.py {shlex.quote(json.dumps(given))}"

    def after(self, release: Release, good: bool) -> None:
        for one in self.site.engine.containers({OF_TOOL: self.name}):
            if one["State"] != "running":
                self.site.engine.remove(one["Id"])

    def told(self, seconds: float, output: str) -> float:
        """Its own clock, since how it was started is no part of the floor; where it failed, the one outside."""
        last = output.strip().splitlines()[-1:] or [""]
        return float(last[0]) if last[0].replace(".", "").isdigit() else seconds


class FloorOverSsh(Floor):
    name = FLOOR_SSH

    def deploy(self, release: Release) -> Commands:
        return [self.site.host.ssh(self._command(release))]

    def told(self, seconds: float, _output: str) -> float:
        return seconds


class Ours(Tool):
    """What the two of ours share: Ansible as the starter configures it, over an SSH connection that each run opens anew."""

    deploy_dir = ""

    def __init__(self, site: Site, port: int) -> None:
        super().__init__(site, port)
        self.folder = site.work / short(self.name)
        self.folder.mkdir()
        (self.folder / "releases").mkdir()
        self._runs = itertools.count()
        self._control = ""

    def environment(self) -> dict[str, str]:
        self._control = tempfile.mkdtemp(prefix="cp", dir=self.site.work)
        return {
            "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
            "ANSIBLE_CONFIG": str(ROOT / "tests" / "ansible.cfg"),
            "ANSIBLE_PIPELINING": "1",
            "ANSIBLE_SSH_ARGS": "-o ControlMaster=auto -o ControlPersist=600s",
            "ANSIBLE_SSH_CONTROL_PATH_DIR": self._control,
            "ANSIBLE_STDOUT_CALLBACK": "selfhost.delivery.timeline",
            "ANSIBLE_CALLBACK_PLUGINS": str(ROOT / "tests/bench/callback"),
            "ANSIBLE_CALLBACKS_ENABLED": "task_times",
            "TASK_TIMES": str(self.site.work / "tasks.json"),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "LC_ALL": "C.UTF-8",
        }

    def after(self, release: Release, good: bool) -> None:
        for socket in Path(self._control).iterdir():
            subprocess.run(["ssh", "-o", f"ControlPath={socket}", "-O", "exit", "bench"], capture_output=True, check=False)
        times = self.site.work / "tasks.json"
        if times.exists():
            self.tasks = [*self.tasks, sum(not skipped for *dummy, skipped in json.loads(times.read_text()))]
            times.rename(self.site.work / f"{short(self.name)}-tasks.json")

    def known_after(self, release: Release) -> float:
        """Seconds from the moment at which the web service began to roll to that at which the journal says it failed."""
        journal = self.site.host.run("sh", "-c", f"cat {self.deploy_dir}/releases/*{release.tag}/journal.jsonl")
        entries = [json.loads(line) for line in journal.splitlines()]
        times = {entry["event"]: entry["time"] for entry in entries if (entry["step"], entry.get("service")) == ("rolling", "web")}
        begin, fail = (datetime.fromisoformat(times[event].replace("Z", "+00:00")) for event in ("begin", "fail"))
        return (fail - begin).total_seconds()

    def inventory(self, variables: t.Mapping[str, t.Any]) -> str:
        """The folder of an inventory with the host; returns its path."""
        host = {
            "ansible_host": self.site.host.address,
            "ansible_user": "root",
            "ansible_ssh_common_args": f"-F {self.site.host.ssh_config}",
        }
        content = {"app_hosts": {"hosts": {"bench": {**host, "ansible_python_interpreter": "/usr/bin/python3"}}, "vars": dict(variables)}}
        path = self.folder / "hosts.yml"
        path.write_text(json.dumps(content))
        return str(path)

    def ansible(self, name: str, *arguments: str) -> list[str]:
        return [str(Path(sys.executable).with_name(name)), *arguments]


SERVICES = {
    "web": {"port": 8080, "ready": {"http": "/api/ready"}, "ready_timeout": TIMEOUT},
    "worker": {"ready_timeout": TIMEOUT},
}


def compose(web: t.Mapping[str, t.Any], **more: t.Any) -> str:
    """The app as a Compose file."""
    both = {"image": "${APP_IMAGE}", "restart": "unless-stopped"}
    return json.dumps(
        {
            "services": {"web": {**both, "command": ["web"], **web}, "worker": {**both, "command": ["worker"]}, **more.pop("services", {})},
            **more,
        }
    )


class RolloutAlone(Ours):
    """One task in a play; the release folder is on the host before the clock starts, and old containers are removed after it stopped."""

    name, project, deploy_dir = ROLLOUT, "alone", "/opt/alone"

    def begin(self, release: Release) -> None:
        self.release_id = f"{next(self._runs):04}-{release.tag}"
        folder = f"{self.deploy_dir}/releases/{self.release_id}"
        self.site.host.write(f"{folder}/compose.yaml", compose({}))
        self.site.host.write(f"{folder}/deploy.env", f"APP_IMAGE={release.pinned}\n")

    def deploy(self, release: Release) -> Commands:
        folder = f"{self.deploy_dir}/releases/{self.release_id}"
        values = {
            "project_dir": self.deploy_dir,
            "project": self.project,
            "release_id": self.release_id,
            "files": [f"{folder}/compose.yaml"],
            "deploy_env": f"{folder}/deploy.env",
            "images": {"web": release.pinned, "worker": release.pinned},
            "services": SERVICES,
            "routes": {"web": 8080},
            "edge": {"type": "haproxy", "socket": "/run/bench-edge/admin.sock"},
        }
        path = self.folder / "play.yml"
        task = {"name": "Roll", "selfhost.delivery.compose_rollout": values}
        path.write_text(json.dumps([{"name": "Bench", "hosts": "app_hosts", "gather_facts": False, "tasks": [task]}]))
        return [self.ansible("ansible-playbook", "-i", self.inventory({}), str(path))]

    def after(self, release: Release, good: bool) -> None:
        super().after(release, good)
        if good:
            values = json.dumps({"state": "finished", "project_dir": self.deploy_dir, "release_id": self.release_id})
            command = ["ansible", "app_hosts", "-i", self.inventory({}), "-m", "selfhost.delivery.compose_rollout", "-a", values]
            run_all(self, [self.ansible(*command)])
            super().after(release, good)
            self.site.host.run("ln", "-sfn", f"releases/{self.release_id}", f"{self.deploy_dir}/current")


class PromoteWhole(Ours):
    """promote.yml and rollback.yml as a user calls them: gate, lock, journal, snapshot of a volume, route, records."""

    name, deploy_dir = PROMOTE, "/opt/whole"

    def __init__(self, site: Site, port: int) -> None:
        super().__init__(site, port)
        content = {"entrypoint": ["/app"], "cmd": ["keeper"], "environment": {"PATH": "/"}, "labels": {}}
        keeper = site.factory.image("keeper", "1", _layer({"data/rows": os.urandom(2**20)}), content)
        services = {"keeper": {"image": keeper.pinned, "volumes": ["data:/data"], "restart": "unless-stopped"}}
        (self.folder / "compose.yaml").write_text(compose({"depends_on": ["keeper"]}, services=services, volumes={"data": {}}))

    def variables(self) -> dict[str, t.Any]:
        host = self.site.host
        return {
            "delivery_environment": "production",
            "delivery_deploy_dir": self.deploy_dir,
            "delivery_source_dir": str(self.folder),
            "delivery_registry": {"plain_http": True},
            "delivery_edge": {"type": "haproxy", "socket": "/run/bench-edge/admin.sock"},
            "snapshots_password": "snapshots are not secret here",
            "delivery_app": {
                "name": "whole",
                "compose_files": ["compose.yaml"],
                "images": {"app": f"{host.registry}/bench/{short(self.name)}"},
                "services": {name: {"image": "app", **service} for name, service in SERVICES.items()},
                "volumes": ["data"],
                "routes": [{"service": "web"}],
                "public": {"url": f"http://{host.address}:{self.port}"},
                "policies": {"gates": ["staging"]},
            },
        }

    def setup(self, ports: t.Mapping[str, int]) -> None:
        """The host as setup.yml makes it, with the edge for all that need one: a port and a backend each."""
        others = {
            project: ports[name]
            for project, name in ((short(FLOOR), FLOOR), (short(FLOOR_SSH), FLOOR_SSH), ("alone", ROLLOUT))
            if name in ports
        }
        variables = {
            **self.variables(),
            "setup_packages": [],
            "app_host_unit": False,
            "edge_instance": "bench-edge",
            "edge_service_manager": "process",
            "edge_bind_http": [f"*:{self.port}"],
            "edge_routes": [{"project": project, "service": "web", "host": f"{project}.test", "ready": "/api/ready"} for project in others],
            "edge_extra_config": "".join(
                f"frontend {project}\n    bind *:{port}\n    default_backend {project}-web\n" for project, port in others.items()
            ),
        }
        run_all(self, [self.ansible("ansible-playbook", "-i", self.inventory(variables), str(ROOT / "playbooks/setup.yml"))])
        super().after(Release("", "", ""), True)
        self.tasks.clear()

    def begin(self, release: Release) -> None:
        """Staging has committed it."""
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {
            "environment": "staging",
            "release": f"staging-{release.tag}",
            "result": "committed",
            "app": "whole",
            "tag": release.tag,
            "ended": now,
        }
        values = json.dumps({"images": [release.pinned], "record": record, "plain_http": True})
        command = ["ansible", "localhost", "-m", "selfhost.delivery.release_record", "-a", values]
        run_all(self, [self.ansible(*command)])
        shutil.rmtree(self._control)
        (self.site.work / "tasks.json").unlink(missing_ok=True)

    def deploy(self, release: Release) -> Commands:
        return self._playbook("promote", release)

    def back(self, release: Release) -> Commands:
        return self._playbook("rollback")

    def _playbook(self, name: str, release: Release | None = None) -> Commands:
        extra = ["-e", f"tag={release.tag}"] if release else []
        return [self.ansible("ansible-playbook", "-i", self.inventory(self.variables()), str(ROOT / f"playbooks/{name}.yml"), *extra)]


class PlainCompose(Tool):
    """`docker compose pull`, `up --wait`, in one SSH session, with a health check each second."""

    name = COMPOSE
    health_check: t.ClassVar = {"test": ["CMD", "/app", "probe"], "interval": "1s", "timeout": "1s", "retries": TIMEOUT}

    def __init__(self, site: Site, port: int) -> None:
        super().__init__(site, port)
        site.host.write(f"/srv/{short(self.name)}/compose.yaml", self.file())

    def file(self) -> str:
        return compose({"ports": [f"{self.port}:8080"], "healthcheck": self.health_check})

    def at_home(self, release: Release, command: str) -> list[str]:
        return self.site.host.ssh(f"cd /srv/{short(self.name)} && export APP_IMAGE={release.tagged} && {command}")

    def deploy(self, release: Release) -> Commands:
        return [self.at_home(release, f"docker compose pull -q && docker compose up -d --wait --wait-timeout {TIMEOUT}")]


class ShellScript(PlainCompose):
    """What many a pipeline has: pull, up, and ask until it answers; an SSH session each, asked ten times a second."""

    name = SCRIPT

    def file(self) -> str:
        return compose({"ports": [f"{self.port}:8080"]})

    def deploy(self, release: Release) -> Commands:
        ask = f"curl -fsS -o /dev/null -m 1 http://127.0.0.1:{self.port}/api/ready"
        loop = f"for i in $(seq {TIMEOUT * 10}); do {ask} 2>/dev/null && exit; sleep 0.1; done; {ask}"
        return [self.at_home(release, command) for command in ("docker compose pull -q", "docker compose up -d", loop)]


class DockerRollout(PlainCompose):
    """docker-rollout for the web service, behind nginx that asks Docker's DNS each second; `up` for the worker."""

    name = DOCKER_ROLLOUT

    def __init__(self, site: Site, port: int) -> None:
        super().__init__(site, port)
        script = Path(find(DOCKER_ROLLOUT)).read_text()
        site.host.write("/usr/local/lib/docker/cli-plugins/docker-rollout", script, "0755")
        nginx(site, self.name, "web")

    def file(self) -> str:
        mounts = ["./nginx.conf:/etc/nginx/nginx.conf:ro"]
        nginx = {"image": "bench-nginx", "ports": [f"{self.port}:80"], "volumes": mounts, "restart": "unless-stopped"}
        return compose({"healthcheck": self.health_check}, services={"nginx": nginx})

    def prepare(self, release: Release) -> None:
        run_all(self, [self.at_home(release, "docker compose up -d --wait")])

    def deploy(self, release: Release) -> Commands:
        steps = ("docker compose pull -q web worker", f"docker rollout -t {TIMEOUT} web", "docker compose up -d --no-deps worker")
        return [self.at_home(release, " && ".join(steps))]


def nginx(site: Site, tool: str, service: str) -> None:
    """Make the image, and the configuration for a service that it finds in Docker's DNS."""
    site.host.run("sh", "-ec", NGINX_IMAGE)
    site.host.write(f"/srv/{short(tool)}/nginx.conf", NGINX.replace("SERVICE", service), "0644")


NGINX = """worker_processes 1;
events { worker_connections 512; }
http {
    access_log off;
    resolver 127.0.0.11 valid=1s;
    server {
        listen 80;
        location / { set $app http://SERVICE:8080; proxy_pass $app; }
    }
}
"""

#: nginx of the host's own packages as an image: the program, what it is linked with, and the folders it wants.
NGINX_IMAGE = """
tree=$(mktemp -d)
mkdir -p "$tree/etc/nginx" "$tree/var/log/nginx" "$tree/var/lib/nginx" "$tree/run" "$tree/tmp"
libraries=$(ldd /usr/sbin/nginx | grep -o '/[^ ]*')
cp -L --parents /usr/sbin/nginx $libraries "$tree"
cp -L --parents /lib/x86_64-linux-gnu/libnss_files.so.2 "$tree" 2>/dev/null || true
grep -e '^root' -e '^nobody' -e '^www-data' /etc/passwd >"$tree/etc/passwd"
grep -e '^root' -e '^nogroup' -e '^www-data' /etc/group >"$tree/etc/group"
tar -C "$tree" -c . | docker import -c 'CMD ["/usr/sbin/nginx", "-g", "daemon off;"]' - bench-nginx >/dev/null
rm -r "$tree"
"""


class Swarm(Tool):
    """`docker service update`, start-first, of a swarm of one node; rolled back by itself where the new task fails.

    Behind the same nginx as docker-rollout, since Swarm's own load balancer needs a kernel with IPVS.
    """

    name = SWARM
    health = True

    def prepare(self, release: Release) -> None:
        host = self.site.host
        nginx(self.site, self.name, "bench-web")
        host.run("docker", "swarm", "init", "--advertise-addr", "127.0.0.1")
        host.run("docker", "network", "create", "--driver", "overlay", "--attachable", "bench")
        shared = "docker service create -q --update-order start-first --rollback-order start-first --update-failure-action rollback"
        for part in ("--name bench-web --network bench --endpoint-mode dnsrr", "--name bench-worker --no-healthcheck"):
            kind = part.split()[1].rpartition("-")[2]
            host.run("sh", "-c", f"{shared} {part} {release.tagged} {kind}")
        mount = f"/srv/{short(self.name)}/nginx.conf:/etc/nginx/nginx.conf:ro"
        host.run("docker", "run", "-d", "--network", "bench", "-p", f"{self.port}:80", "-v", mount, "bench-nginx")

    def deploy(self, release: Release) -> Commands:
        # The client's exit code does not tell that it went back; the service does.
        update = "docker service update -q --image {image} bench-{kind}"
        asked = '[ "$(docker service inspect -f "{{{{.UpdateStatus.State}}}}" bench-{kind})" = completed ]'
        return [
            self.site.host.ssh(" && ".join(f"{update} && {asked}".format(image=release.tagged, kind=kind) for kind in ("web", "worker")))
        ]

    def back(self, release: Release) -> Commands:
        return [self.site.host.ssh(" && ".join(f"docker service update -q --rollback bench-{kind}" for kind in ("web", "worker")))]


class Kamal(Tool):
    """`kamal deploy --skip-push` and `kamal rollback`, with its defaults but for the time a release has to become ready."""

    name = KAMAL
    delay: int | None = None

    def __init__(self, site: Site, port: int) -> None:
        super().__init__(site, port)
        proxy = Path(find("kamal-proxy")).read_bytes()
        content = {"entrypoint": [], "cmd": ["kamal-proxy", "run"], "environment": {"HOME": "/data", "PATH": "/"}, "labels": {}}
        proxy_image = site.factory.image("kamal-proxy", KAMAL_PROXY, _layer({"kamal-proxy": proxy}), content)
        self.folder = site.work / short(self.name)
        (self.folder / "config").mkdir(parents=True)
        (self.folder / ".kamal").mkdir()
        (self.folder / ".kamal" / "secrets").write_text("KAMAL_REGISTRY_PASSWORD=none\n")
        address = site.host.address
        run = {
            "http_port": KAMAL_PORT,
            "https_port": KAMAL_PORT + 1,
            "registry": site.host.registry,
            "repository": "bench/kamal-proxy",
            "version": proxy_image.tag,
        }
        config: dict[str, t.Any] = {
            "service": short(self.name),
            "image": f"bench/{short(self.name)}",
            "servers": {"web": {"hosts": [address], "cmd": "web"}, "worker": {"hosts": [address], "cmd": "worker"}},
            "proxy": {"app_port": 8080, "host": f"{short(self.name)}.test", "healthcheck": {"path": "/api/ready"}, "run": run},
            "registry": {"server": site.host.registry, "username": "bench", "password": ["KAMAL_REGISTRY_PASSWORD"]},
            "builder": {"arch": "amd64"},
            "ssh": {"user": "root", "config": [str(site.host.ssh_config)], "keys": [str(site.host.key)], "keys_only": True},
            "deploy_timeout": TIMEOUT,
        }
        if self.delay is not None:
            config["readiness_delay"] = self.delay
        (self.folder / "config" / "deploy.yml").write_text(json.dumps(config))

    def where(self) -> Path:
        return self.folder

    def prepare(self, release: Release) -> None:
        run_all(self, [[find(KAMAL), "setup", "--skip-push", "--version", release.tag]])

    def deploy(self, release: Release) -> Commands:
        return [[find(KAMAL), "deploy", "--skip-push", "--version", release.tag]]

    def back(self, release: Release) -> Commands:
        return [[find(KAMAL), "rollback", release.tag, "--version", release.tag]]


class KamalAtOnce(Kamal):
    """The same without the seven seconds that Kamal by default looks at a container without a proxy."""

    name = KAMAL_AT_ONCE
    delay = 0


#: kamal-proxy is one for all of a host's apps; it tells them by host name. The version is that which Kamal asks for.
KAMAL_PORT, KAMAL_PROXY = 8200, "v0.9.2"
MAKERS: dict[str, type[Tool]] = {
    maker.name: maker
    for maker in (Floor, FloorOverSsh, RolloutAlone, PromoteWhole, PlainCompose, ShellScript, DockerRollout, Swarm, Kamal, KamalAtOnce)
}


def find(tool: str) -> str:
    """The program of a tool that is no part of this machine's packages: a variable names it, or it is on PATH, or in .cache/bench."""
    variable = short(tool).replace("-", "_").upper()
    named = os.environ.get(variable, "")
    if named:
        return named if os.access(named, os.R_OK) else ""
    name = short(tool)
    cached = ROOT / ".cache" / "bench" / name
    return shutil.which(name) or (str(cached) if cached.exists() else "")


def lacks(tool: str) -> str:
    """Why a tool cannot take part; empty when it can."""
    for name in {DOCKER_ROLLOUT: [DOCKER_ROLLOUT], KAMAL: [KAMAL, "kamal-proxy"], KAMAL_AT_ONCE: [KAMAL, "kamal-proxy"]}.get(tool, []):
        if not find(name):
            return f"{short(name)} is neither named by {short(name).replace('-', '_').upper()} nor on PATH"
    return ""


# -- a measurement -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """One measured rollout: seconds, what the load saw, SSH sessions, how it ended, Ansible's tasks, and seconds of this machine's
    processors, which other work on it makes longer far less than those of the clock."""

    seconds: float
    requests: int
    lost: int
    gap_ms: float
    sessions: int
    end: str
    tasks: int | None = None
    cpu: float = 0.0


class CommandFailed(HostError):
    """A tool's command did not end with 0."""


def run_all(tool: Tool, commands: Commands, environment: t.Mapping[str, str] | None = None) -> str:
    """Run them in turn; what they printed, or ``CommandFailed`` with the end of it."""
    said = ""
    for command in commands:
        done = subprocess.run(
            command,
            cwd=tool.where(),
            env={**os.environ, **(tool.environment() if environment is None else environment)},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=LONGEST,
            check=False,
        )
        said += done.stdout
        if done.returncode:
            raise CommandFailed(f"{' '.join(command)[:300]} ended with {done.returncode}:\n{said[-3000:]}")
    return said


class Load:
    """The load generator of the demo, in a process of its own, on a tool's port."""

    def __init__(self, tool: Tool, rate: float) -> None:
        self._out = tool.site.work / "load.json"
        self._out.unlink(missing_ok=True)
        url, host = address_of(tool)
        command = [sys.executable, "-B", str(ROOT / "demo/load.py"), "--url", url, "--out", str(self._out), "--rate", f"{rate:g}"]
        command += ["--connections", str(CONNECTIONS), "--seconds", f"{LONGEST:g}", "--timeout", "5", *(["--host", host] if host else [])]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def stop(self) -> dict[str, t.Any]:
        self._process.send_signal(signal.SIGTERM)
        self._process.wait(PATIENCE)
        if self._process.stdout is not None:
            self._process.stdout.close()
        return json.loads(self._out.read_text())


def address_of(tool: Tool) -> tuple[str, str]:
    """Where a tool's app is asked: URL, and the host name it is asked for."""
    port, host = (KAMAL_PORT, f"{short(tool.name)}.test") if isinstance(tool, Kamal) else (tool.port, "")
    return f"http://{tool.site.host.address}:{port}", host


def answering(tool: Tool) -> str:
    """The release that answers a client that has no connection yet; empty when none does."""
    url, host = address_of(tool)
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=2)
    try:
        connection.request("GET", "/version", headers={"Host": host} if host else {})
        answer = connection.getresponse()
        return answer.headers.get("X-Version", "") if answer.status == 200 else ""
    except (OSError, http.client.HTTPException):
        return ""
    finally:
        connection.close()


def settled(tool: Tool, release: Release, patience: float) -> bool:
    """Web and worker of ``release`` run and nothing else of the app, and it answers; asked until it is so."""
    deadline = time.monotonic() + patience
    while True:
        if tool.site.running(tool.name) == [release.tag] * 2 and answering(tool) == release.tag:
            return True
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)


def measure(tool: Tool, case: str, release: Release, rate: float) -> Run:
    """One rollout, from the start of its command to its end; or later, when what it says it did is only then seen."""
    broken = case in BROKEN
    before = tool.current
    assert before is not None
    if case != "rollback" or not isinstance(tool, PromoteWhole):
        tool.begin(release)
    commands = tool.back(release) if case == "rollback" else tool.deploy(release)
    environment = tool.environment()
    tasks = len(tool.tasks)
    load = Load(tool, rate)
    failure, output = "", ""
    try:
        sessions = tool.site.host.sessions()
        begin, busy = time.perf_counter(), processors()
        try:
            output = run_all(tool, commands, environment)
        except (CommandFailed, subprocess.TimeoutExpired) as exc:
            failure = str(exc)
        seconds = tool.told(time.perf_counter() - begin, output)
        ended, busy = time.perf_counter(), processors() - busy
        if not broken and not failure:
            if not settled(tool, release, PATIENCE):
                failure = f"it ended well, and {tool.site.running(tool.name)} runs, {answering(tool) or 'nothing'} answers"
            elif time.perf_counter() - ended > 0.2:
                seconds += time.perf_counter() - ended
        sessions = tool.site.host.sessions() - sessions
    finally:
        seen = load.stop()
    good = not failure and not broken
    if broken:
        end = ("said so" if failure else "said success") + (
            ", the old one serves" if settled(tool, before, 3.0) else ", the old one is gone"
        )
    else:
        end = "done"
    tool.after(release, good)
    if not broken and failure:
        raise HostError(failure)
    if good:
        tool.previous, tool.current = tool.current, release
    counted = tool.tasks[tasks] if len(tool.tasks) > tasks else None
    return Run(seconds, seen["sent"], seen["lost"], seen["longest_gap_ms"], sessions, end, counted, busy)


def processors() -> float:
    """Seconds that processes which have ended here have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def repair(tool: Tool) -> None:
    """After a release that a tool left in the way: a good one, not timed."""
    assert tool.current is not None
    if not settled(tool, tool.current, 0.0):
        put(tool, tool.make())


def put(tool: Tool, release: Release, first: bool = False) -> None:
    """Deploy without a clock."""
    tool.begin(release)
    if first:
        tool.prepare(release)
    else:
        run_all(tool, tool.deploy(release))
    if not settled(tool, release, PATIENCE):
        raise HostError(
            f"{tool.name} was to put {release.tag} there; {tool.site.running(tool.name)} runs, {answering(tool) or 'nothing'} answers"
        )
    tool.after(release, True)
    tool.tasks.clear()
    tool.previous, tool.current = tool.current, release


# -- results -----------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    load: list[float] = field(default_factory=list)
    #: Seconds until ours knew that a release is broken, by case and tool.
    known: dict[tuple[str, str], list[float]] = field(default_factory=dict)

    def rows(self) -> list[dict[str, t.Any]]:
        """What build/bench/rollout.json holds. Requests and lost ones are those of all runs together, the gap is the longest of them,
        sessions are the median. Seconds are null where a tool was to say that a release is broken and said that all is well."""
        rows = []
        for case, tool in sorted(self.runs, key=lambda key: (list(CASES).index(key[0]), TOOLS.index(key[1]))):
            done = self.runs[case, tool]
            known = all(not one.end.startswith("said success") for one in done)
            rows.append(
                {
                    "case": case,
                    "tool": tool,
                    "runs": len(done),
                    "median_s": round(statistics.median(one.seconds for one in done), 3) if known else None,
                    "min_s": round(min(one.seconds for one in done), 3) if known else None,
                    "requests": sum(one.requests for one in done),
                    "lost": sum(one.lost for one in done),
                    "longest_gap_ms": round(max(one.gap_ms for one in done)),
                    "ssh_sessions": round(statistics.median(one.sessions for one in done)),
                }
            )
        return rows

    def ratio(self, row: t.Mapping[str, t.Any], other: str) -> float | None:
        """Of medians, to another tool in the same case."""
        there = [one["median_s"] for one in self.rows() if one["case"] == row["case"] and one["tool"] == other]
        return row["median_s"] / there[0] if there and there[0] and row["median_s"] else None

    def table(self) -> str:
        """Markdown: a row for each case and tool."""
        lines = [
            "| case | tool | runs | median s | minimum s | to the floor | to Kamal | requests | lost | longest gap ms | SSH sessions | tasks "
            "| processor s here | end |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
        ]
        for row in self.rows():
            done = self.runs[row["case"], row["tool"]]
            ratios = [self.ratio(row, other) for other in (FLOOR_SSH, KAMAL)]
            times = [f"{row[key]:.2f}" if row[key] is not None else "never" for key in ("median_s", "min_s")]
            counted = [one.tasks for one in done if one.tasks is not None]
            cells = [row["case"], row["tool"], row["runs"], *times, *("" if ratio is None else f"{ratio:.2f}" for ratio in ratios)]
            cells += [
                row["requests"],
                row["lost"],
                row["longest_gap_ms"],
                row["ssh_sessions"],
                round(statistics.median(counted)) if counted else "",
                f"{statistics.median(one.cpu for one in done):.2f}",
            ]
            lines.append(f"| {' | '.join(str(cell) for cell in cells)} | {'; '.join(sorted({one.end for one in done}))} |")
        for name in self.missing:
            lines.append(f"| every | {name} | 0 | not here | not here | | | | | | | | | NOT MEASURED |")
        return "\n".join(lines)

    def write(self, output: Path) -> str:
        output.mkdir(parents=True, exist_ok=True)
        rows = self.rows()
        (output / "rollout.json").write_text(json.dumps(rows, indent=2) + "\n")
        drawn = [{**row, "ratio": self.ratio(row, FLOOR_SSH)} for row in rows]
        caption = "ratio of medians to the floor over SSH: pull, create, start, ask, switch, stop by hand"
        (output / "rollout.svg").write_text(plot(drawn, OURS, "A rollout beside other tools", "ratio", caption))
        text = self.table()
        (output / "rollout.md").write_text(text + "\n")
        return text


# -- the run -----------------------------------------------------------------------------------------------------------


def say(text: str) -> None:
    print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5, help="of each tool and case (default: 5)")
    parser.add_argument("--only", help="these cases, with commas between them: " + ", ".join(CASES))
    parser.add_argument("--tools", help="these tools, with ';' between them: " + "; ".join(TOOLS))
    parser.add_argument("--rate", type=float, default=200.0, help="requests a second (default: 200)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench", help="folder for rollout.json, rollout.svg and rollout.md")
    parser.add_argument("--keep", action="store_true", help="leave the host running for a look")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    cases = [case for case in CASES if not options.only or case in options.only.split(",")]
    names = options.tools.split(";") if options.tools else list(TOOLS)
    unknown = [name for name in names if name not in TOOLS] + [
        name for name in (options.only or "").split(",") if name and name not in CASES
    ]
    if unknown:
        say(f"There is no {', '.join(unknown)}.")
        return 2
    for variable in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        os.environ.pop(variable, None)
    # An end from outside leaves nothing behind either.
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    results = Results(missing={name: lacks(name) for name in names if lacks(name)})
    for name, why in results.missing.items():
        say(f"WARNING: NO {name.upper()} in this run: {why}")
    begin = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix="bench-rollout-"))
    work.chmod(0o755)
    host: Host | None = None
    try:
        (work / "host").mkdir()
        binary = build_app()
        host = Host(work / "host", say)
        shutil.copy(ROOT / "tests/bench/floor.py", work / "host" / "floor.py")
        kopia = shutil.which("kopia")
        if kopia:
            program("docker", "cp", "--follow-link", kopia, f"{host.name}:/usr/local/bin/kopia")
        site = Site(work, host, Factory(host.registry, binary), Engine(host.engine_socket))
        tools = prepare(site, [name for name in names if name not in results.missing], results)
        if not tools:
            raise HostError("no tool is left to measure")
        say(f"Ready after {time.monotonic() - begin:.0f} s.")
        rounds(tools, cases, options, results)
    except HostError as exc:
        say(f"ERROR: {exc}")
        return 1
    finally:
        if host and options.keep:
            say(f"Kept: docker exec -it {host.name} bash; docker rm -fv {host.name}; docker volume rm {host.name}; rm -r {work}")
        elif host:
            host.remove()
        if not options.keep:
            shutil.rmtree(work, ignore_errors=True)
    say(f"\n{results.write(options.output)}\n")
    for case in cases:
        say(f"{case}: {CASES[case]}")
    say(
        f"{os.cpu_count()} processors, {options.rate:g} requests a second; {sys.version.split()[0]} runs the bench; {time.monotonic() - begin:.0f} s in all."
    )
    say(f"load of the machine over the run: median {statistics.median(results.load):.1f}, most {max(results.load):.1f}")
    for (case, name), seconds in results.known.items():
        say(
            f"{case}: {name} knew it {statistics.median(seconds):.2f} s after the web service began to roll (median), and then took it back"
        )
    for note in results.notes:
        say(f"NOTE: {note}")
    for name, why in results.missing.items():
        say(f"WARNING: NO {name.upper()} in these numbers: {why}")
    say(f"Written: rollout.json, rollout.svg and rollout.md in {options.output}")
    return 0


def prepare(site: Site, names: t.Sequence[str], results: Results) -> list[Tool]:
    """Every tool with its first release in place. One of the others that cannot is said, and left out."""
    ports = {name: 8100 + TOOLS.index(name) for name in TOOLS}
    tools: list[Tool] = []
    if {FLOOR, FLOOR_SSH, *OURS} & set(names):
        # The edge is made with promote.yml's inventory, also where that is not measured.
        say("Making the host ready with setup.yml ...")
        whole = PromoteWhole(site, ports[PROMOTE])
        whole.setup(ports)
    for name in names:
        say(f"Installing the app with {name} ...")
        try:
            tool = whole if name == PROMOTE else MAKERS[name](site, ports[name])
            put(tool, tool.make(), first=True)
            tools.append(tool)
        except (HostError, subprocess.TimeoutExpired) as exc:
            if name in (FLOOR, FLOOR_SSH, *OURS):
                raise
            results.missing[name] = f"it could not be set up here: {exc}"
            say(f"WARNING: NO {name.upper()} in this run: {exc}")
    return tools


def rounds(tools: list[Tool], cases: t.Sequence[str], options: argparse.Namespace, results: Results) -> None:
    able = {(case, tool.name) for case in cases for tool in tools}
    for number in range(options.runs):
        for case in cases:
            for tool in tools[number % len(tools) :] + tools[: number % len(tools)]:
                if (case, tool.name) not in able:
                    continue
                try:
                    one_run(tool, case, number, options.rate, results)
                except (HostError, subprocess.TimeoutExpired) as exc:
                    if tool.name in (FLOOR, FLOOR_SSH, *OURS):
                        raise
                    results.notes.append(f"{case}: {tool.name} is left out from run {number + 1} on: {exc}")
                    say(results.notes[-1])
                    able.discard((case, tool.name))
                    able -= lost_cases(tool, able)
            # A run takes long; one that is ended early leaves what is done.
            results.write(options.output)


def lost_cases(tool: Tool, able: t.Collection[tuple[str, str]]) -> set[tuple[str, str]]:
    """After a failure: nothing where the tool could be put in order again, else all that it was to do."""
    try:
        repair(tool)
        return set()
    except (HostError, subprocess.TimeoutExpired) as exc:
        say(f"  {tool.name} cannot be put in order again: {exc}")
        return {pair for pair in able if pair[1] == tool.name}


def one_run(tool: Tool, case: str, number: int, rate: float, results: Results) -> None:
    if case == "rollback":
        if tool.previous is None:
            put(tool, tool.make(after=LATE[number % len(LATE)]))
            put(tool, tool.make())
        assert tool.previous is not None
        release = tool.previous
    else:
        release = tool.make(case if case in BROKEN else "ok", LATE[number % len(LATE)] if case == "late" else 0.0)
    done = measure(tool, case, release, rate)
    results.runs.setdefault((case, tool.name), []).append(done)
    results.load.append(os.getloadavg()[0])
    say(
        f"  {case:9} {number + 1}  {tool.name:26} {done.seconds:7.2f} s  {done.lost:4} of {done.requests:5} lost  gap {done.gap_ms:6.0f} ms"
        f"  {done.sessions:3} sessions  {done.end}"
    )
    if case in BROKEN:
        if isinstance(tool, Ours):
            results.known.setdefault((case, tool.name), []).append(tool.known_after(release))
        repair(tool)


if __name__ == "__main__":
    sys.exit(main())
