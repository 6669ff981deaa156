# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A site for tests of compose_rollout: images in a real registry, an app on the real engine, a real HAProxy, and load."""

from __future__ import annotations

import http.client
import io
import itertools
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import threading
import time
import typing as t
from pathlib import Path

import pytest
from registry_fixture import start_registry

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import DEFAULT_SOCKET, PROJECT_LABEL, SERVICE_LABEL, Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import Journal
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import Edge, edge_from

MODULE = Path(__file__).resolve().parents[2] / "plugins/modules/compose_rollout.py"
COLLECTIONS = Path(__file__).resolve().parents[2] / ".cache/collections"
_numbers = itertools.count(1)

#: What the images do: `web` and `worker` run, `migrate` ends; BEHAVE says which of them misbehaves. `broken` is ready, and answers errors.
#: /cgi-bin/slow takes its time.
APP = """\
BROKEN='#!/bin/sh
echo "Status: 500 Internal Server Error"
echo'
case "$1-$BEHAVE" in
  web-crash) echo "line one"; echo "no config: giving up" >&2; exit 3;;
  migrate-failing) echo "ALTER TABLE"; echo "column exists" >&2; exit 7;;
  migrate-hanging) echo "waiting for a lock";;
  migrate-*) echo "$VERSION" >> /data/migrated; exit 0;;
esac
trap 'kill $child; exit 0' TERM
if [ "$1" = web ]; then
  mkdir -p /www/api; echo "$VERSION" > /www/index.html
  [ "$BEHAVE" = never ] || echo "$VERSION" > /www/api/ready
  mkdir -p /www/cgi-bin
  echo "#!/bin/sh
sleep 1
echo
echo $VERSION" > /www/cgi-bin/slow; chmod +x /www/cgi-bin/slow
  [ "$BEHAVE" = broken ] && rm /www/index.html && echo "$BROKEN" > /www/cgi-bin/index.cgi && chmod +x /www/cgi-bin/index.cgi
  httpd -f -p 8080 -h /www & child=$!
else
  sleep 100000 & child=$!
fi
wait
"""


def docker_socket() -> str:
    """Of the engine that the tests use; the docker program takes the same."""
    return os.environ.get("DOCKER_HOST") or DEFAULT_SOCKET


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[dict[str, str]]:
    """Name to ``repository@digest`` in a real registry; removed from the engine, so that a rollout has to pull them."""
    for program in ("docker", "busybox"):
        if not shutil.which(program):
            pytest.fail(f"this test needs the program {program} (busybox: the package busybox-static)")
    registry = start_registry(tmp_path_factory.mktemp("registry") / "r")
    found = {}
    try:
        for name in ("one", "two", "never", "crash", "broken", "failing", "hanging"):
            reference = f"{registry.address}/rollout-test/app:{name}"
            changes = [f"ENV VERSION={name} BEHAVE={name} PATH=/bin", 'ENTRYPOINT ["/bin/sh", "/app.sh"]']
            argv = ["docker", "import", *(word for change in changes for word in ("-c", change)), "-", reference]
            _docker(argv, _root_filesystem(name))
            _docker(["docker", "push", reference])
            details = Engine(docker_socket()).image(reference)
            assert details
            found[name] = details["RepoDigests"][0]
            _docker(["docker", "image", "rm", "-f", details["Id"]])
        yield found
    finally:
        for reference in found.values():
            subprocess.run(["docker", "image", "rm", "-f", reference], check=False, capture_output=True)
        registry.stop()


def _docker(argv: list[str], content: bytes | None = None) -> None:
    result = subprocess.run(argv, input=content, capture_output=True, check=False)
    assert result.returncode == 0, f"{argv}: {result.stderr.decode()}"


def _root_filesystem(name: str) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        for folder in ("bin", "tmp", "data", "www"):
            entry = tarfile.TarInfo(folder)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o777
            archive.addfile(entry)
        archive.add(os.path.realpath(str(shutil.which("busybox"))), "bin/busybox")
        for applet in ("sh", "sleep", "httpd", "mkdir", "rm", "chmod", "true", "false"):
            entry = tarfile.TarInfo(f"bin/{applet}")
            entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(entry)
        for path, text in (("app.sh", APP), ("build", name)):
            entry = tarfile.TarInfo(path)
            entry.size = len(text.encode())
            archive.addfile(entry, io.BytesIO(text.encode()))
    return content.getvalue()


class Site:
    """One app on one host: its deploy dir, its project, and the module called on it."""

    def __init__(self, folder: Path, images: dict[str, str]) -> None:
        self.project = f"rollout{os.getpid()}n{next(_numbers)}"
        self.folder = folder
        self.images = images
        self.engine = Engine(docker_socket())
        self.edge: dict[str, t.Any] = {"type": "none"}
        self.compose = {
            "services": {
                "web": {"image": "${APP_IMAGE}", "command": ["web"], "depends_on": ["db"]},
                "worker": {"image": "${APP_IMAGE}", "command": ["worker"], "restart": "always"},
                "migrate": {"image": "${APP_IMAGE}", "command": ["migrate"], "profiles": ["migrate"], "volumes": ["data:/data"]},
                "db": {"image": images["one"], "command": ["db"], "volumes": ["data:/data"]},
            },
            "volumes": {"data": {}},
        }
        self.services: dict[str, t.Any] = {
            "web": {"port": 8080, "ready": {"http": "/api/ready"}, "ready_timeout": 20, "stop_timeout": 5},
            "worker": {"stop_timeout": 5},
        }
        self.options: dict[str, t.Any] = {}
        (folder / "releases").mkdir(parents=True)
        (folder / ".env").write_text("SETTING=1\n")
        (folder / ".env").chmod(0o600)

    def release(self, name: str, release_id: str = "") -> dict[str, t.Any]:
        """Write the folder of a release that runs image ``name``; the module's options."""
        release_id = release_id or f"{next(_numbers):04d}-{name}"
        folder = self.folder / "releases" / release_id
        folder.mkdir(exist_ok=True)
        (folder / "compose.yaml").write_text(json.dumps(self.compose))
        (folder / "deploy.env").write_text(f"APP_IMAGE={self.images[name]}\n")
        (folder / "deploy.env").chmod(0o600)
        return {
            "project_dir": str(self.folder),
            "project": self.project,
            "release_id": release_id,
            "files": [str(folder / "compose.yaml")],
            "env_files": [str(self.folder / ".env")],
            "deploy_env": str(folder / "deploy.env"),
            "images": {service: self.images[name] for service in ("web", "worker", "migrate") if service in self.compose["services"]},
            "services": self.services,
            "migrator": {"service": "migrate", "timeout": 20},
            "routes": {"web": 8080},
            "edge": self.edge,
            "docker_socket": self.engine.socket,
            **self.options,
        }

    def start(self, DOCKER_CONFIG: str = "", **options: t.Any) -> subprocess.Popen[str]:
        own = {"DOCKER_CONFIG": DOCKER_CONFIG} if DOCKER_CONFIG else {}
        environment = {**os.environ, **own, "PYTHONPATH": str(COLLECTIONS), "PYTHONDONTWRITEBYTECODE": "1"}
        # As Ansible's own wrapper does it, but in a process whose id is known.
        code = (
            "import json, sys\n"
            "from ansible.module_utils import basic\n"
            "from ansible.module_utils.testing import patch_module_args\n"
            "from ansible_collections.selfhost.delivery.plugins.modules import compose_rollout\n"
            "with patch_module_args(json.load(sys.stdin)):\n"
            "    compose_rollout.main()\n"
        )
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(options))
        process.stdin.close()
        process.stdin = None
        return process

    def call(self, **options: t.Any) -> dict[str, t.Any]:
        out, err = self.start(**options).communicate(timeout=180)
        assert out.strip(), err
        return json.loads(out.strip().splitlines()[-1])

    def ok(self, **options: t.Any) -> dict[str, t.Any]:
        result = self.call(**options)
        assert not result.get("failed"), result
        return result

    def commit(self, release: dict[str, t.Any]) -> None:
        self.ok(state="finished", project_dir=str(self.folder), release_id=release["release_id"])
        link = self.folder / "current"
        link.unlink(missing_ok=True)
        link.symlink_to(f"releases/{release['release_id']}")

    def deploy(self, name: str) -> dict[str, t.Any]:
        release = self.release(name)
        self.ok(**release)
        self.commit(release)
        return release

    def revert(self, release: dict[str, t.Any], **more: t.Any) -> dict[str, t.Any]:
        return self.ok(state="reverted", project_dir=str(self.folder), release_id=release["release_id"], **more)

    def containers(self, service: str | None = None, running: bool | None = None) -> list[str]:
        labels: dict[str, str | None] = {PROJECT_LABEL: self.project}
        if service:
            labels[SERVICE_LABEL] = service
        found = self.engine.containers(labels)
        return sorted(one["Id"] for one in found if running is None or (one["State"] == "running") == running)

    def journal(self, release: dict[str, t.Any]) -> list[dict[str, t.Any]]:
        path = self.folder / "releases" / release["release_id"] / "journal.jsonl"
        return Journal.open(str(path), "").entries()

    def answers(self, path: str = "/api/ready") -> str:
        """What the one running web container says."""
        (container,) = self.containers("web", running=True)
        networks = self.engine.inspect(container)["NetworkSettings"]["Networks"]
        address = networks[f"{self.project}_default"]["IPAddress"]
        connection = http.client.HTTPConnection(address, 8080, timeout=5)
        connection.request("GET", path)
        return connection.getresponse().read().decode().strip()

    def migrated(self) -> list[str]:
        code, text = self.engine.exec(self.containers("db", running=True)[0], ["/bin/busybox", "cat", "/data/migrated"])
        return text.split() if code == 0 else []

    def clean(self) -> None:
        for container in self.containers():
            self.engine.remove(container, force=True, volumes=True)
        for kind in ("network", "volume"):
            argv = ["docker", kind, "ls", "-q", "--filter", f"label={PROJECT_LABEL}={self.project}"]
            for name in subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split():
                subprocess.run(["docker", kind, "rm", name], check=True, capture_output=True)


@pytest.fixture
def site(tmp_path: Path, images: dict[str, str]) -> t.Iterator[Site]:
    made = Site(tmp_path / "deploy", images)
    try:
        yield made
    finally:
        made.clean()


class Proxy:
    """A real HAProxy with the backend of the site's web service."""

    def __init__(self, folder: Path, project: str) -> None:
        if not shutil.which("haproxy"):
            pytest.fail("this test needs the program haproxy, 2.6 or newer")
        self.folder = folder
        folder.mkdir()
        (folder / "hold.map").write_text("")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        self.backend = f"{project}-web"
        self.options = {"type": "haproxy", "socket": str(folder / "s")}
        (folder / "haproxy.cfg").write_text(
            f"""
global
    stats socket {folder}/s mode 600 level admin
    server-state-file {folder}/state
    setenv EDGE_STATE_FILE {folder}/state
defaults
    mode http
    option http-server-close
    load-server-state-from-file global
    timeout connect 2s
    timeout client 30s
    timeout server 30s
frontend f
    bind 127.0.0.1:{self.port}
    default_backend {self.backend}
backend _delivery_inflight
    stick-table type string len 128 size 10k expire 1h store conn_cur
backend {self.backend}
    http-request deny deny_status 503 if !{{ method GET }} {{ str({project}),map_str({folder}/hold.map,off) -m str writes }}
    http-request track-sc1 str({project}) table _delivery_inflight
    option httpchk GET /api/ready
    http-check expect status 200
    server-template s 1-8 empty.invalid:1 init-addr last,127.0.0.1 check inter 1s fastinter 50ms rise 2 fall 3 disabled
"""
        )
        self.start()

    def start(self) -> None:
        (self.folder / "s").unlink(missing_ok=True)
        self.process = subprocess.Popen(["haproxy", "-db", "-f", str(self.folder / "haproxy.cfg")], stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 10
        while not (self.folder / "s").exists():
            assert self.process.poll() is None and time.monotonic() < deadline, "haproxy -db -f haproxy.cfg does not start"
            time.sleep(0.02)

    def crash(self) -> None:
        """It dies, and a service manager starts it again."""
        self.process.kill()
        self.process.wait()
        self.start()

    def edge(self) -> Edge:
        return edge_from(self.options)

    def upstreams(self) -> list[str]:
        return [f"{up.address}:{up.port} {up.state}" for up in self.edge().upstreams(self.backend)]

    def get(self) -> str:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("GET", "/")
        response = connection.getresponse()
        assert response.status == 200, response.status
        return response.read().decode().strip()

    def post(self) -> int:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
        connection.request("POST", "/", body="x")
        return connection.getresponse().status

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def proxy(site: Site, tmp_path: Path) -> t.Iterator[Proxy]:
    made = Proxy(tmp_path / "edge", site.project)
    site.edge = made.options
    try:
        yield made
    finally:
        made.stop()


class Load:
    """Keep-alive clients that do not retry; every failure and every answer is kept. ``slow`` of them ask what takes its time."""

    def __init__(self, port: int, clients: int = 4, slow: int = 0) -> None:
        self.port = port
        self.sent, self.lost, self.answers = 0, [], set()  # type: ignore[var-annotated]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(path,)) for path in ["/"] * clients + ["/cgi-bin/slow"] * slow]

    def _run(self, path: str) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        while not self._stop.is_set():
            self.sent += 1
            try:
                connection.request("GET", path)
                response = connection.getresponse()
                body = response.read().decode().strip()
                if response.status == 200:
                    self.answers.add(body)
                else:
                    self.lost.append(f"HTTP {response.status}")
            except (OSError, http.client.HTTPException) as exc:
                self.lost.append(repr(exc))
                connection.close()
            self._stop.wait(0.005)

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_exc: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


def kill_at(process: subprocess.Popen[str], path: Path, line: int) -> bool:
    """SIGKILL as soon as the journal has that many lines; whether the process still ran then."""
    while process.poll() is None and lines_of(path) < line:
        time.sleep(0.0005)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def lines_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0
