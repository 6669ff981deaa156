# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What every edge must do, on real ones with real upstreams and clients that never retry.

nginx and Traefik are configured with the examples of docs/edges.md.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from edge_fixture import COLLECTIONS, PATIENCE, EdgeHost, Later, Load, Upstream, ask, eventually, free_port

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import edge_from, local, nginx, traefik

pytestmark = [pytest.mark.skipif(os.geteuid() != 0, reason="NOT ROOT: edges are started, killed and looked into as root")]

DOCS = Path(__file__).resolve().parents[2] / "docs" / "edges.md"
BACKEND = "shop-web"
PROGRAMS = {
    "haproxy": "MISSING PROGRAM haproxy: apt-get install haproxy",
    "nginx": "MISSING PROGRAM nginx: apt-get install nginx",
    "traefik": "MISSING PROGRAM traefik: no package of Debian has it; put a release of Traefik 3 on PATH",
}


def example(language, containing):
    """A block of the documentation, so that what it says is what is tested."""
    (block,) = [one for one in re.findall(rf"```{language}\n(.*?)```", DOCS.read_text(), re.DOTALL) if containing in one]
    return block


def replaced(text, **values):
    for old, new in values.values():
        assert old in text
        text = text.replace(old, new)
    return text


def gone(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


class HAProxy(EdgeHost):
    """The role's."""

    #: Whether clients that keep their connection lose no request.
    keeps_clients = True
    refusal = "slots are in use"

    def __init__(self, folder):
        super().__init__(folder)
        self.options = {"type": "haproxy", "socket": self.socket}

    def start(self):
        self.play()

    def stop(self):
        self.play(tasks="stopped")

    def crash(self):
        worker = int(self.edge.socket.ask("show info").split("\nPid: ")[1].split()[0])
        for pid in (int(self.pidfile.read_text()), worker):
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: not Path(f"/proc/{worker}/fd").exists() or not os.listdir(f"/proc/{worker}/fd"), "the end of the worker")

    @contextlib.contextmanager
    def refusing(self):
        """All slots are in use."""
        (used,) = [one.slot for one in self.edge.upstreams(BACKEND)]
        others = [f"s{number}" for number in range(1, 9) if f"s{number}" != used]
        for slot in others:
            self.edge.socket.ask(f"set server {BACKEND}/{slot} addr 127.0.0.99 port 9")
            self.edge.socket.ask(f"set server {BACKEND}/{slot} state drain")
        try:
            yield
        finally:
            for slot in others:
                self.edge._empty(BACKEND, slot)


class Nginx:
    keeps_clients = False
    refusal = 'unknown directive "nonsense"'

    def __init__(self, folder):
        self.folder = Path(folder)
        self.port, confirm = free_port(), free_port()
        self.include = self.folder / "delivery"
        self.include.mkdir()
        (self.folder / "beside").mkdir()
        (self.include / f"{BACKEND}.conf").write_text(f"upstream {BACKEND} {{ server 127.0.0.1:1 down; }}\n")
        http_block = replaced(
            example("nginx", "proxy_pass"),
            folder=("/etc/nginx/delivery", str(self.include)),
            port=("listen 80;", f"listen 127.0.0.1:{self.port};"),
        )
        self.config = self.folder / "nginx.conf"
        self.config.write_text(
            f"user root;\nworker_processes 2;\npid {self.folder}/nginx.pid;\nerror_log {self.folder}/error.log;\n"
            "events { worker_connections 512; }\n"
            f"http {{\naccess_log off;\nclient_body_temp_path {self.folder}/body;\nproxy_temp_path {self.folder}/proxy;\n"
            f"{http_block}\ninclude {self.folder}/beside/*.conf;\n}}\n"
        )
        self.pid_file = self.folder / "nginx.pid"
        self.options = {
            "type": "nginx",
            "directory": str(self.include),
            "pid_file": str(self.pid_file),
            "config": str(self.config),
            "confirm": f"127.0.0.1:{confirm}",
        }
        self.edge = edge_from(self.options)

    def start(self):
        subprocess.run(["nginx", "-c", str(self.config)], check=True, timeout=60)
        eventually(self.runs, "nginx")

    def runs(self):
        # After a crash there is the old number first.
        with contextlib.suppress(FileNotFoundError, ValueError):
            return local.title(int(self.pid_file.read_text())).startswith("nginx: master")
        return False

    def end(self, number):
        master = int(self.pid_file.read_text())
        pids = [master, *local.children(master)]
        for pid in pids if number == signal.SIGKILL else [master]:
            os.kill(pid, number)
        eventually(lambda: all(gone(pid) for pid in pids), "the end of nginx")

    def stop(self):
        self.end(signal.SIGTERM)

    def crash(self):
        self.end(signal.SIGKILL)

    @contextlib.contextmanager
    def refusing(self):
        """Another file of its configuration is broken."""
        broken = self.folder / "beside" / "broken.conf"
        broken.write_text("nonsense;\n")
        try:
            yield
        finally:
            broken.unlink()


class Traefik:
    keeps_clients = True
    refusal = "a broken file beside"

    def __init__(self, folder):
        self.folder = Path(folder)
        self.port, api = free_port(), free_port()
        self.dynamic = self.folder / "dynamic"
        self.dynamic.mkdir()
        (self.dynamic / "routers.yml").write_text(example("yaml", "routers:"))
        self.config = self.folder / "traefik.yml"
        self.config.write_text(
            replaced(
                example("yaml", "providersThrottleDuration"),
                folder=("/etc/traefik/dynamic", str(self.dynamic)),
                port=('":80"', f'"127.0.0.1:{self.port}"'),
                api=('"127.0.0.1:8080"', f'"127.0.0.1:{api}"'),
            )
        )
        self.options = {"type": "traefik", "directory": str(self.dynamic), "api": f"http://127.0.0.1:{api}"}
        self.edge = edge_from(self.options)
        self.process = None

    def answers(self):
        with contextlib.suppress(DeliveryError):
            return self.edge._ask("/api/http/routers/shop@file") is not None
        return False

    def start(self):
        with open(self.folder / "log", "a") as log:
            self.process = subprocess.Popen(["traefik", f"--configFile={self.config}"], stdout=log, stderr=log)
        eventually(self.answers, "Traefik's API")

    def stop(self):
        self.process.terminate()
        self.process.wait(60)

    def crash(self):
        self.process.kill()
        self.process.wait(60)

    @contextlib.contextmanager
    def refusing(self):
        """Another file of its folder is broken."""
        broken = self.dynamic / "broken.yml"
        broken.write_text("http: [\n")
        try:
            yield
        finally:
            broken.unlink()


KINDS = {"haproxy": HAProxy, "nginx": Nginx, "traefik": Traefik}


@pytest.fixture(scope="module", params=list(KINDS))
def site(request):
    """A running edge with the backend ``shop-web``, which everything on ``port`` goes to."""
    if not shutil.which(request.param):
        pytest.skip(PROGRAMS[request.param])
    # Not pytest's own folder: its name is too long for a Unix socket.
    folder = tempfile.mkdtemp(prefix="edges-")
    site = KINDS[request.param](folder)
    try:
        site.start()
        yield site
    finally:
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, AttributeError):
            site.stop()
        shutil.rmtree(folder)


@pytest.fixture
def apps(site):
    """Makes upstreams on 127.0.0.2 and up; afterwards they are gone and the edge is empty."""
    made = []

    def make(number):
        made.append(Upstream(f"127.0.0.{number}", port))
        return made[-1]

    port = free_port("127.0.0.2")
    yield make
    for upstream in site.edge.upstreams(BACKEND):
        site.edge.remove(BACKEND, upstream.address, upstream.port)
    for app in made:
        app.stop()


def add(site, app, timeout=PATIENCE):
    return site.edge.add(BACKEND, app.address, app.port, timeout)


def drain(site, app, timeout=PATIENCE):
    return site.edge.drain(BACKEND, app.address, app.port, timeout)


def remove(site, app):
    site.edge.remove(BACKEND, app.address, app.port)


def states(site):
    return sorted((one.address, one.state) for one in site.edge.upstreams(BACKEND))


def who_answers(site):
    status, text, _headers = ask(site.port)
    assert status == 200, text
    return text.split()[0]


def test_the_backend_is_known_and_others_are_not(site):
    site.edge.check(BACKEND)
    with pytest.raises(DeliveryError, match="shop-nope") as unknown:
        site.edge.check("shop-nope")
    assert unknown.value.failure_class == "config"


def test_add_returns_when_requests_reach_the_upstream_and_again_changes_nothing(site, apps):
    for number in range(2, 8):
        app = apps(number)
        slot = add(site, app)
        assert who_answers(site) == app.address
        assert add(site, app) == slot
        (upstream,) = site.edge.upstreams(BACKEND)
        assert (upstream.slot, upstream.address, upstream.port) == (slot, app.address, app.port)
        assert (upstream.state, upstream.up, upstream.weight > 0) == ("ready", True, True)
        remove(site, app)


def test_adding_again_what_is_there_disturbs_nobody(site, apps):
    one, other = apps(2), apps(3)
    add(site, one)
    add(site, other)
    client = http.client.HTTPConnection("127.0.0.1", site.port, timeout=PATIENCE)
    client.connect()
    kept = client.sock
    for again in (one, other, one):
        client.request("GET", "/")
        assert client.getresponse().read()
        add(site, again)
    client.request("GET", "/")
    assert client.getresponse().status == 200
    assert client.sock is kept
    client.close()


def test_an_upstream_that_is_not_there_is_refused_and_nothing_has_changed(site, apps):
    old = apps(2)
    add(site, old)
    load = Load(site.port)
    try:
        with pytest.raises(DeliveryError, match="127.0.0.99") as error:
            site.edge.add(BACKEND, "127.0.0.99", old.port, 1)
    finally:
        load.stop()
    assert error.value.failure_class == "cutover"
    assert "Connection refused" in error.value.message
    # It was asked before anything was changed, so not even nginx has closed a connection.
    assert load.errors == []
    assert states(site) == [(old.address, "ready")]


def test_forty_switches_under_load_lose_no_request(site, apps):
    current = apps(2)
    add(site, current)
    used = [current]
    keeping, fresh = Load(site.port, clients=4), Load(site.port, clients=4, keep=False)
    try:
        for turn in range(40):
            following = apps(3 + turn)
            used.append(following)
            add(site, following)
            assert drain(site, current).sessions_cut == 0
            remove(site, current)
            # From here on whatever still came would be lost.
            current.stop()
            current = following
            assert states(site) == [(current.address, "ready")]
    finally:
        keeping.stop()
        fresh.stop()
    assert fresh.errors == []
    if site.keeps_clients:
        assert keeping.errors == []
    # Only closed connections, and nothing that an upstream has seen was lost with one of them.
    assert [error for error in keeping.errors if not error.startswith(CLOSED)] == []
    assert sum(app.requests for app in used) == len(keeping.answers) + len(fresh.answers)
    assert len(keeping.answers) > 200
    assert len({answer.split()[0] for answer in fresh.answers}) > 20
    print(f"{type(site).__name__}: {len(keeping.errors)} of {len(keeping.answers) + len(keeping.errors)} requests on kept connections lost")


#: What a client sees that was about to use a connection which the edge has just closed.
CLOSED = ("RemoteDisconnected(", "ConnectionResetError(", "BrokenPipeError(")


def test_drain_counts_what_is_still_open_and_waits_for_it(site, apps):
    old, new = apps(2), apps(3)
    add(site, old)
    assert who_answers(site) == old.address
    # A connection that an edge keeps for later is nothing to wait for.
    eventually(lambda: site.edge.upstreams(BACKEND)[0].sessions == 0, "the upstream at rest")
    long_one = Later(ask, site.port, "/wait")
    eventually(lambda: old.requests == 2, "the long request on the upstream")
    assert site.edge.upstreams(BACKEND)[0].sessions == 1
    add(site, new)
    assert drain(site, old, 0.2).sessions_cut == 1
    # Drained means that nothing new comes, long before the last request ends.
    assert {who_answers(site) for dummy in range(6)} == {new.address}
    assert states(site) == [(old.address, "drain"), (new.address, "ready")]
    waiting = Later(drain, site, old)
    old.go_on.set()
    assert waiting.result().sessions_cut == 0
    assert long_one.result()[0] == 200


def test_a_tunnel_outlives_the_switch_and_is_counted(site, apps):
    old, new = apps(2), apps(3)
    add(site, old)
    with socket.create_connection(("127.0.0.1", site.port), timeout=PATIENCE) as tunnel:
        tunnel.sendall(b"GET /tunnel HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: echo\r\n\r\n")
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += tunnel.recv(1000)
        assert answer.startswith(b"HTTP/1.1 101")
        add(site, new)
        assert drain(site, old, 0.2).sessions_cut == 1
        assert who_answers(site) == new.address
        tunnel.sendall(b"still there")
        assert tunnel.recv(1000) == b"still there"
    assert drain(site, old).sessions_cut == 0


def test_a_request_that_is_still_coming_in_is_not_lost(site, apps, monkeypatch):
    """nginx gives a request to an upstream only when all of it is there, and to one that it knew when the request began."""
    old, new = apps(2), apps(3)
    add(site, old)
    looks = []
    for module in (nginx, traefik):
        monkeypatch.setattr(module, "connections", lambda *asked: looks.append(asked) or local.connections(*asked))
    client = http.client.HTTPConnection("127.0.0.1", site.port, timeout=PATIENCE)
    client.putrequest("POST", "/")
    client.putheader("Content-Length", "10")
    client.endheaders(b"begin")
    add(site, new)
    done = []

    def switch():
        drain(site, old)
        remove(site, old)
        old.stop()
        done.append(True)

    looks.clear()
    switching = Later(switch)
    # A drain that ends too early ends here; one that waits has looked several times.
    eventually(lambda: done or len(looks) > 2 or site.options["type"] == "haproxy", "the drain at work")
    client.send(b" end.")
    response = client.getresponse()
    assert (response.status, response.read().decode().split()[1]) == (200, "10")
    client.close()
    switching.result()
    assert states(site) == [(new.address, "ready")]


def test_several_are_drained_side_by_side(site, apps):
    several = [apps(2 + number) for number in range(4)]
    for app in several:
        add(site, app)
    draining = [Later(drain, site, app) for app in several[1:]]
    assert [one.result().sessions_cut for one in draining] == [0, 0, 0]
    assert states(site) == [(several[0].address, "ready"), *((app.address, "drain") for app in several[1:])]
    assert {who_answers(site) for dummy in range(8)} == {several[0].address}


def test_a_drained_upstream_can_be_added_again(site, apps):
    app = apps(2)
    slot = add(site, app)
    drain(site, app)
    assert states(site) == [(app.address, "drain")]
    assert add(site, app) == slot
    assert who_answers(site) == app.address


def test_removing_what_is_not_there_is_fine(site, apps):
    app = apps(2)
    add(site, app)
    remove(site, app)
    remove(site, app)
    assert drain(site, app, 1).sessions_cut == 0
    assert states(site) == []
    assert ask(site.port)[0] in (502, 503)


def test_a_change_that_the_edge_refuses_leaves_what_serves(site, apps):
    old, new = apps(2), apps(3)
    add(site, old)
    load = Load(site.port, keep=site.keeps_clients)
    try:
        with site.refusing():
            before = states(site)
            with pytest.raises(DeliveryError) as refused:
                add(site, new, 2)
            assert states(site) == before
    finally:
        load.stop()
    assert refused.value.failure_class == "cutover"
    assert site.refusal in refused.value.message
    assert load.errors == []
    assert new.requests == 0
    assert states(site) == [(old.address, "ready")]
    add(site, new)
    drain(site, old)
    assert who_answers(site) == new.address


@pytest.mark.parametrize("end", ["stop", "crash"])
def test_an_edge_that_was_restarted_has_the_same_upstreams(site, apps, end):
    serving, draining = apps(2), apps(3)
    add(site, serving)
    add(site, draining)
    drain(site, draining)
    before = states(site)
    getattr(site, end)()
    with pytest.raises(DeliveryError) as error:
        site.edge.check(BACKEND)
    assert error.value.failure_class == "config"
    site.start()
    assert eventually(lambda: states(site), "its upstreams") == before == [(serving.address, "ready"), (draining.address, "drain")]
    assert {who_answers(site) for dummy in range(4)} == {serving.address}
    assert drain(site, draining).sessions_cut == 0


KILLED = """
import json, os, signal, sys
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import edge_from

options, at, method, arguments = json.loads(sys.argv[1])
edge = edge_from(options)
count = 0

def watch(frame, event, argument):
    global count
    # What looks again and again would be nearly all of it.
    if event == "call" and "/module_utils/" in frame.f_code.co_filename and not frame.f_code.co_filename.endswith("/local.py"):
        count += 1
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

sys.setprofile(watch)
getattr(edge, method)(*arguments)
sys.setprofile(None)
print(count)
"""


def killed(site, at, method, *arguments):
    """Change the edge from another process, which is killed when it calls its ``at``-th function; how many it called if it was not."""
    done = subprocess.run(
        [sys.executable, "-c", KILLED, json.dumps([site.options, at, method, [BACKEND, *arguments]])],
        env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode in (0, -signal.SIGKILL), done.stderr
    return int(done.stdout) if done.returncode == 0 else 0


def test_a_change_that_was_killed_is_finished_by_the_next_one(site, apps):
    current, following = apps(2), apps(3)
    add(site, current)
    calls = killed(site, 0, "add", following.address, following.port, PATIENCE)
    assert calls
    remove(site, following)
    deaths = 0
    for eighth in range(1, 8):
        at = calls * eighth // 8
        deaths += killed(site, at, "add", following.address, following.port, PATIENCE) == 0
        # Whatever was done, somebody serves.
        assert who_answers(site) in (current.address, following.address)
        add(site, following)
        assert states(site) == sorted([(current.address, "ready"), (following.address, "ready")])
        assert {who_answers(site) for dummy in range(6)} == {current.address, following.address}
        deaths += killed(site, at, "drain", current.address, current.port, PATIENCE) == 0
        assert drain(site, current).sessions_cut == 0
        assert {who_answers(site) for dummy in range(4)} == {following.address}
        deaths += killed(site, min(at, 8), "remove", current.address, current.port) == 0
        remove(site, current)
        assert states(site) == [(following.address, "ready")]
        assert who_answers(site) == following.address
        current, following = following, current
    assert deaths > 10
