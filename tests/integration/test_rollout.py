# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""compose_rollout on a real engine, real Compose, a real registry and a real HAProxy, called as Ansible calls it: as a process."""

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

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import PROJECT_LABEL, SERVICE_LABEL, Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import fold
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import MARKER, _marked
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import edge_from

MODULE = Path(__file__).resolve().parents[2] / "plugins/modules/compose_rollout.py"
COLLECTIONS = Path(__file__).resolve().parents[2] / ".cache/collections"
_numbers = itertools.count(1)

#: What the images do: `web` and `worker` run, `migrate` ends; BEHAVE says which of them misbehaves.
APP = """\
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
  httpd -f -p 8080 -h /www & child=$!
else
  sleep 100000 & child=$!
fi
wait
"""


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[dict[str, str]]:
    """Name to ``repository@digest`` in a real registry; removed from the engine, so that a rollout has to pull them."""
    for program in ("docker", "busybox"):
        if not shutil.which(program):
            pytest.fail(f"this test needs the program {program} (busybox: the package busybox-static)")
    registry = start_registry(tmp_path_factory.mktemp("registry") / "r")
    found = {}
    try:
        for name in ("one", "two", "never", "crash", "failing", "hanging"):
            reference = f"{registry.address}/rollout-test/app:{name}"
            changes = [f"ENV VERSION={name} BEHAVE={name} PATH=/bin", 'ENTRYPOINT ["/bin/sh", "/app.sh"]']
            argv = ["docker", "import", *(word for change in changes for word in ("-c", change)), "-", reference]
            _docker(argv, _root_filesystem(name))
            _docker(["docker", "push", reference])
            details = Engine().image(reference)
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
        for applet in ("sh", "sleep", "httpd", "mkdir"):
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
        self.engine = Engine()
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
            **self.options,
        }

    def start(self, PATH: str = os.environ["PATH"], **options: t.Any) -> subprocess.Popen[str]:
        environment = {**os.environ, "PATH": PATH, "PYTHONPATH": str(COLLECTIONS), "PYTHONDONTWRITEBYTECODE": "1"}
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
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

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
defaults
    mode http
    option http-server-close
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
    server-template s 1-8 127.0.0.1:1 check inter 1s fastinter 50ms rise 2 fall 3 disabled
"""
        )
        self.process = subprocess.Popen(["haproxy", "-db", "-f", str(folder / "haproxy.cfg")], stderr=subprocess.PIPE)
        deadline = time.monotonic() + 10
        while not (folder / "s").exists():
            assert self.process.poll() is None and time.monotonic() < deadline, self.process.stderr
            time.sleep(0.02)

    def upstreams(self) -> list[str]:
        return [f"{up.address}:{up.port} {up.state}" for up in edge_from(self.options).upstreams(self.backend)]

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
    """Keep-alive clients that do not retry; every failure and every answer is kept."""

    def __init__(self, port: int, clients: int = 4) -> None:
        self.port = port
        self.sent, self.lost, self.answers = 0, [], set()  # type: ignore[var-annotated]
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run) for _client in range(clients)]

    def _run(self) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        while not self._stop.is_set():
            self.sent += 1
            try:
                connection.request("GET", "/")
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


# -- going forward


def test_first_release_then_nothing_to_do(site: Site) -> None:
    release = site.release("one")
    check = site.ok(**release, _ansible_check_mode=True)
    assert check["changed"] and not site.containers() and not site.journal(release)
    result = site.ok(**release)
    assert result["lines"] == check["lines"] and len(result["lines"]) == 4
    assert [step["action"] for step in result["plan"]["services"]] == ["create", "create"]
    assert site.answers() == "one" and site.migrated() == ["one"]
    assert len(site.containers(running=True)) == len(site.containers()) == 3, "db, web, worker; the migrator is gone"
    again = site.ok(**release)
    assert not again["changed"] and again["lines"] == []
    site.commit(release)
    same = site.ok(**site.release("one"))
    assert not same["changed"], same
    assert site.migrated() == ["one"], "nothing of the app changes, so nothing migrates"


def test_start_first_loses_no_request(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    old = site.containers("web")
    release = site.release("two")
    with Load(proxy.port) as load:
        result = site.ok(**release)
        before = load.sent
        while load.sent < before + 50:
            time.sleep(0.01)
    assert load.lost == [] and load.answers == {"one", "two"} and load.sent > 100
    assert result["services"]["web"]["strategy"] == "start_first" and result["services"]["web"]["cut"] == 0
    assert {"start", "ready", "switch", "stop"} <= set(result["services"]["web"]["phases"])
    assert result["plan"]["services"][0]["old"] == site.images["one"]
    assert len(proxy.upstreams()) == 1 and proxy.upstreams()[0].endswith(":8080 ready")
    assert site.containers("web", running=False) == old, "kept until the commit"
    site.commit(release)
    assert len(site.containers("web")) == 1
    assert fold(site.journal(release)).rolled == ["web", "worker"]


def test_stop_first_where_two_cannot_run(site: Site) -> None:
    site.compose["services"]["web"]["volumes"] = ["data:/data"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    site.compose["services"]["worker"]["ports"] = [f"127.0.0.1:{port}:80"]
    site.deploy("one")
    result = site.ok(**site.release("two"))
    plan = {step["service"]: step for step in result["plan"]["services"]}
    assert plan["web"]["strategy"] == "stop_first" and "writable volume (data)" in plan["web"]["reason"]
    assert plan["worker"]["strategy"] == "stop_first" and f"published host port {port}" in plan["worker"]["reason"]
    assert site.answers() == "two" and len(site.containers(running=True)) == 3


def test_a_changed_dependency_is_made_again_and_an_unchanged_one_never_restarted(site: Site) -> None:
    site.deploy("one")
    (db,) = site.containers("db")
    site.deploy("two")
    assert site.containers("db") == [db]
    site.compose["services"]["db"]["environment"] = {"TUNED": "1"}
    release = site.release("two")
    result = site.ok(**release)
    assert result["services"]["db"]["action"] == "roll" and result["services"]["web"]["action"] == "unchanged"
    assert db not in site.containers("db", running=True) and len(site.containers("db", running=True)) == 1
    site.revert(release)
    assert site.containers("db") == [db] == site.containers("db", running=True)


def test_a_stopped_old_container_stays_stopped_when_the_engine_starts_again(site: Site) -> None:
    site.deploy("one")
    (old,) = site.containers("worker")
    release = site.release("two")
    site.ok(**release)
    assert site.engine.inspect(old)["HostConfig"]["RestartPolicy"]["Name"] == "no"
    site.revert(release)
    assert site.engine.inspect(old)["HostConfig"]["RestartPolicy"]["Name"] == "always"
    assert site.containers("worker", running=True) == [old]


def test_hold_keeps_writes_and_workers_away_while_migrating(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    (worker,) = site.containers("worker")
    release = site.release("two")
    release["hold"] = True
    site.ok(**release, phases=["preflight", "pull", "dependencies", "hold"])
    assert site.containers("worker", running=True) == [] and site.containers("worker") == [worker]
    assert proxy.post() == 503 and proxy.get() == "one"
    site.ok(**release, phases=["migrate", "roll"])
    assert proxy.get() == "two" and proxy.post() == 503
    site.commit(release)
    assert proxy.post() != 503
    assert len(site.containers("worker", running=True)) == 1 and len(site.containers()) == 3


def test_a_service_that_was_held_and_has_not_changed_runs_again(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    (worker,) = site.containers("worker")
    release = site.release("two")
    release.update(hold=True)
    release["images"]["worker"] = site.images["one"]
    text = Path(release["files"][0]).read_text()
    model = json.loads(text)
    model["services"]["worker"]["image"] = site.images["one"]
    Path(release["files"][0]).write_text(json.dumps(model))
    site.ok(**release)
    assert site.containers("worker", running=True) == [worker]
    assert site.engine.inspect(worker)["HostConfig"]["RestartPolicy"]["Name"] == "always"


# -- failures, taken back at once


def test_never_ready_is_taken_back_and_the_old_one_serves(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release("never")
    release["services"] = {**site.services, "web": {**site.services["web"], "ready_timeout": 1}}
    with Load(proxy.port) as load:
        result = site.call(**release)
    assert result["failed"] and result["failure_class"] == "not_ready" and result["reverted"] is True
    assert "404" in result["msg"]
    assert load.lost == [] and load.answers == {"one"}
    assert site.containers() == before == site.containers(running=True)
    assert len(proxy.upstreams()) == 1
    assert not site.revert(release)["changed"], "a second time there is nothing to do"


def test_crash_loop_ends_the_wait_at_once_with_its_last_lines(site: Site) -> None:
    site.compose["services"]["web"]["restart"] = "always"
    site.deploy("one")
    before = site.containers()
    release = site.release("crash")
    release["services"] = {**site.services, "web": {**site.services["web"], "ready_timeout": 100}}
    result = site.call(**release)
    assert result["failure_class"] == "not_ready" and "no config: giving up" in result["msg"], result["msg"]
    assert result["durations"]["roll"] < 60
    assert site.containers() == before == site.containers(running=True)


@pytest.mark.parametrize(("name", "words"), [("failing", "column exists"), ("hanging", "did not end within 1 s")])
def test_a_migrator_that_fails_or_hangs(site: Site, name: str, words: str) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release(name)
    release["migrator"] = {"service": "migrate", "timeout": 1}
    result = site.call(**release, take_back=False)
    assert result["failure_class"] == "migration" and words in result["msg"], result["msg"]
    (left,) = set(site.containers()) - set(before)
    assert not site.engine.inspect(left)["State"]["Running"], "kept for its log, but stopped"
    log = site.folder / "releases" / release["release_id"] / "migrator.log"
    assert log.read_text().strip() and log.stat().st_mode & 0o777 == 0o600
    site.revert(release)
    assert site.containers() == before == site.containers(running=True)


def test_going_back_that_fails_says_what_runs_and_keeps_it(site: Site) -> None:
    site.deploy("one")
    (old,) = site.containers("web")
    release = site.release("two")
    site.ok(**release)
    site.engine.remove(old)
    result = site.call(state="reverted", project_dir=str(site.folder), release_id=release["release_id"])
    assert result["failure_class"] == "rollback_failed" and "has been removed" in result["msg"]
    assert any(line.startswith("web: sha256:") for line in result["running"])
    assert site.answers() == "two"


def test_quiesced_stops_the_app_and_reverted_starts_the_old_one(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release("two")
    site.ok(**release)
    site.ok(state="quiesced", project_dir=str(site.folder), release_id=release["release_id"])
    (db,) = site.containers("db")
    assert site.containers(running=True) == [db]
    assert "all" in (subprocess.run(
        ["socat", "-", f"UNIX-CONNECT:{proxy.options['socket']}"], input=f"show map {proxy.folder}/hold.map\n",
        capture_output=True, text=True, check=True,
    ).stdout)
    site.revert(release)
    assert site.containers() == before == site.containers(running=True)
    assert proxy.get() == "one" and proxy.post() != 503


def test_synced_repairs_an_edge_that_lost_its_upstreams(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    edge = edge_from(proxy.options)
    (up,) = edge.upstreams(proxy.backend)
    edge.remove(proxy.backend, up.address, up.port)
    result = site.ok(state="synced", project_dir=str(site.folder))
    assert result["changed"] and proxy.get() == "one"
    assert not site.ok(state="synced", project_dir=str(site.folder))["changed"]


def test_the_lease_is_asked_before_each_change(site: Site) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release("two")
    (site.folder / "releases" / release["release_id"] / "release.json").write_text("{}")
    holder = {"run_id": "other", "kind": "run", "holder": {"user": "eve"}, "since": "2026-11-21T09:00:00.000Z"}
    (site.folder / "lock.json").write_text(json.dumps({**holder, "expires": "2999-01-01T00:00:00.000Z", "ttl": 900}))
    result = site.call(**release, run_id="mine")
    assert result["failure_class"] == "lock" and "eve" in result["msg"] and site.containers() == before
    site.ok(**release, run_id="other")
    finished = site.ok(state="finished", project_dir=str(site.folder), release_id=release["release_id"], run_id="mine")
    assert not finished["changed"] and "eve" in finished["delivery_warnings"][0]
    (site.folder / "lock.json").unlink()
    assert site.ok(state="finished", project_dir=str(site.folder), release_id=release["release_id"], run_id="mine")["changed"]


# -- killed at each line of the journal


#: Entries of a whole release; the test fails when there are more or fewer.
LINES = 11


def test_killed_at_any_journal_line_and_taken_back(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    before = site.containers()
    site.ok(**site.release("two"), phases=["pull"])
    for line in range(1, LINES + 1):
        release = site.release("two")
        release["hold"] = True
        path = site.folder / "releases" / release["release_id"] / "journal.jsonl"
        with Load(proxy.port, clients=2) as load:
            killed = _kill_at(site.start(**release), path, line)
            assert killed or line == LINES, f"a whole release has only {_lines(path)} lines"
            result = site.revert(release)
            assert (result["changed"] or line == 1) and result["delivery_warnings"] == [], line
            assert site.containers() == before == site.containers(running=True), f"line {line}: not exactly what ran before"
        assert proxy.get() == "one" and proxy.post() != 503, line
        assert len(proxy.upstreams()) == 1, line
        assert load.lost == [] and load.answers <= {"one", "two"}, line
        assert not site.revert(release)["changed"], line


def test_a_way_back_that_is_killed_is_gone_by_the_next_call(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release("two")
    site.ok(**release)
    path = site.folder / "releases" / release["release_id"] / "journal.jsonl"
    whole = _lines(path)
    with Load(proxy.port, clients=2) as load:
        for more in range(1, 4):
            _kill_at(site.start(state="reverted", project_dir=str(site.folder), release_id=release["release_id"]), path, whole + more)
        site.revert(release)
    assert site.containers() == before == site.containers(running=True)
    assert load.lost == [] and proxy.get() == "one" and len(proxy.upstreams()) == 1


def test_a_compose_that_outlives_its_module_creates_nothing_behind_undo(site: Site, tmp_path: Path) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release("two")
    slow = tmp_path / "bin"
    slow.mkdir()
    # Its output goes nowhere, or the pipe that nobody reads any more would end it.
    (slow / "docker").write_text(
        f"#!/bin/sh\ncase \"$*\" in *--no-start*web*) touch {slow}/called; sleep 4; exec >/dev/null 2>&1;; esac\nexec {shutil.which('docker')} \"$@\"\n"
    )
    (slow / "docker").chmod(0o755)
    process = site.start(**release, phases=["pull", "dependencies", "roll"], PATH=f"{slow}:{os.environ['PATH']}")
    while not (slow / "called").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    process.kill()
    process.communicate()
    mark = f"{MARKER}={site.project}/{release['release_id']}".encode()
    assert _marked(mark), "what was started goes on after its module's death"
    site.revert(release)
    while _marked(mark):
        time.sleep(0.02)
    assert site.containers() == before == site.containers(running=True)


def _kill_at(process: subprocess.Popen[str], path: Path, line: int) -> bool:
    """SIGKILL as soon as the journal has that many lines; whether the process still ran then."""
    while process.poll() is None and _lines(path) < line:
        time.sleep(0.0005)
    alive = process.poll() is None
    process.kill()
    process.communicate()
    return alive


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_a_migrator_left_running_is_waited_for_and_not_doubled(site: Site) -> None:
    site.deploy("one")
    release = site.release("hanging")
    process = site.start(**release, take_back=False)
    while not any(entry["step"] == "migrated" and entry["event"] == "note" for entry in site.journal(release)):
        assert process.poll() is None
        time.sleep(0.002)
    while not site.containers("migrate", running=True):
        time.sleep(0.002)
    process.kill()
    process.communicate()
    (left,) = site.containers("migrate")
    waiting = site.start(**release, take_back=False)
    begins = [entry for entry in site.journal(release) if entry["step"] == "migrated" and entry["event"] == "begin"]
    while len(begins) < 2:
        assert waiting.poll() is None
        begins = [entry for entry in site.journal(release) if entry["step"] == "migrated" and entry["event"] == "begin"]
        time.sleep(0.002)
    site.engine.stop(left, 5)  # it ends well, as one does whose lock is given at last
    result = json.loads(waiting.communicate()[0].strip().splitlines()[-1])
    assert not result.get("failed"), result
    assert sum(1 for entry in site.journal(release) if entry["event"] == "note" and entry["step"] == "migrated") == 1


# -- refused before anything changes


def _refused(site: Site, release: dict[str, t.Any], *words: str) -> None:
    before = site.containers()
    result = site.call(**release)
    assert result.get("failed"), result
    for word in words:
        assert word in result["msg"], result["msg"]
    assert site.containers() == before and not site.journal(release)


def test_refusals_of_the_description(site: Site) -> None:
    release = site.release("one")
    _refused(site, {**release, "services": {"wep": {}}}, "no service 'wep'", "Did you mean web?")
    _refused(site, {**release, "volumes": ["datta"]}, "no volume 'datta'", "Did you mean data?")
    _refused(site, {**release, "order": ["nobody"]}, "order", "no service 'nobody'")
    wrong = {**release["images"], "web": site.images["two"]}
    _refused(site, {**release, "images": wrong}, "image of web", "image: ${APP_IMAGE}")
    _refused(site, {**release, "required_bytes": 2**60}, "MB are free")
    _refused(site, {**release, "docker_socket": "/nonexistent.sock"}, "does not answer on /nonexistent.sock")
    _refused(site, {**release, "hold": True}, "no edge")
    _refused(site, {**release, "services": {"web": {"ready": {"http": "/"}}}}, "services.web.ready", "port")
    Path(release["files"][0]).write_text("services:\n  web:\n    imge: x\n")
    _refused(site, release, "compose.yaml", "imge")


def test_refusals_of_the_host(site: Site) -> None:
    release = site.release("one")
    secret = site.folder / ".env"
    secret.chmod(0o644)
    _refused(site, release, str(secret), "chmod 0600")
    secret.unlink()
    _refused(site, release, str(secret), "does not exist")
    secret.write_text("")
    secret.chmod(0o600)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        site.compose["services"]["worker"]["ports"] = [f"127.0.0.1:{taken.getsockname()[1]}:80"]
        _refused(site, site.release("one"), "in use by another program")


def test_refuses_what_compose_would_do_to_running_containers(site: Site) -> None:
    site.deploy("one")
    site.compose["services"]["web"]["container_name"] = f"{site.project}-fixed"
    _refused(site, site.release("two"), "container_name")
    del site.compose["services"]["web"]["container_name"]
    site.compose["networks"] = {"default": {"labels": {"changed": "1"}}}
    _refused(site, site.release("two"), f"{site.project}_default", "stop every container")


def test_an_image_that_is_not_there_is_named(site: Site) -> None:
    site.deploy("one")
    before = site.containers()
    missing = site.images["two"][:-4] + "0000"
    site.images = {**site.images, "gone": missing}
    result = site.call(**site.release("gone"))
    assert result["failure_class"] == "config" and missing in result["msg"] and "not found" in result["msg"]
    assert site.containers() == before == site.containers(running=True)


def test_a_registry_that_is_gone_is_transport(site: Site) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        digest = site.images["two"].rpartition("@")[2]
        site.images = {**site.images, "gone": f"127.0.0.1:{probe.getsockname()[1]}/x@{digest}"}
        result = site.call(**site.release("gone"))
    assert result["failure_class"] == "transport" and "3 tries" in result["msg"] and "127.0.0.1" in result["msg"]
