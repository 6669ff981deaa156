# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The role edge and the HAProxy edge of rollouts, on a real HAProxy with real upstreams and clients."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
from edge_fixture import PATIENCE, EdgeHost, Later, Load, Upstream, eventually, free_port

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import edge_from

needed = [name for name in ("haproxy", "start-stop-daemon") if not shutil.which(name)]
pytestmark = [
    pytest.mark.skipif(bool(needed), reason=f"MISSING PROGRAM {' '.join(needed)}: apt-get install haproxy dpkg"),
    pytest.mark.skipif(os.geteuid() != 0, reason="NOT ROOT: the role edge starts HAProxy as root"),
]


@pytest.fixture(scope="module")
def host():
    # Not pytest's own folder: its name is too long for a Unix socket.
    folder = tempfile.mkdtemp(prefix="edge-")
    host = EdgeHost(folder)
    try:
        host.play()
        yield host
    finally:
        if host.pidfile.exists():
            host.play(tasks="stopped")
        shutil.rmtree(folder)


@pytest.fixture
def apps(host):
    """Makes upstreams on 127.0.0.2 and up; afterwards they are gone and the edge is empty."""
    made = []

    def make(number, ready=200):
        made.append(Upstream(f"127.0.0.{number}", port, ready))
        return made[-1]

    port = free_port("127.0.0.2")
    yield make
    host.empty()
    for app in made:
        app.stop()


def add(host, app, backend="shop-web"):
    return host.edge.add(backend, app.address, app.port, PATIENCE)


def test_a_second_run_changes_nothing_and_check_mode_tells_what_would(host):
    assert host.play()[0] == 0
    before = (host.folder / "edge/haproxy.cfg").read_text()
    changed, output = host.play("--check", "--diff", edge_timeout_server=33)
    assert changed == 1
    assert "+    timeout server 33s" in output
    assert (host.folder / "edge/haproxy.cfg").read_text() == before


def test_routes_go_to_the_most_particular_backend(host, apps):
    web, api, blog = apps(2), apps(3), apps(4)
    add(host, web)
    add(host, api, "shop-api")
    add(host, blog, "blog-web")
    assert host.get("/api", "shop.example.com")[1].startswith(api.address)
    assert host.get("/api/x", "SHOP.example.com:80")[1].startswith(api.address)
    assert host.get("/apix", "shop.example.com")[1].startswith(web.address)
    assert host.get("/", "blog.example.com")[1].startswith(blog.address)
    assert host.get("/", "elsewhere")[1].startswith(web.address)


def test_forty_switches_under_load_lose_no_request(host, apps):
    current = apps(2)
    add(host, current)
    load = Load(host.port)
    try:
        for turn in range(40):
            following = apps(3 + turn)
            add(host, following)
            drained = host.edge.drain("shop-web", current.address, current.port, PATIENCE)
            assert drained.sessions_cut == 0
            host.edge.remove("shop-web", current.address, current.port)
            # From here on whatever still came would be lost.
            current.stop()
            current = following
            assert [upstream.address for upstream in host.edge.upstreams("shop-web")] == [current.address]
    finally:
        load.stop()
    assert load.errors == []
    assert len(load.answers) > 400
    assert len({answer.split()[0] for answer in load.answers}) > 20


def test_add_is_idempotent_and_tells_the_slot(host, apps):
    app = apps(2)
    slot = add(host, app)
    assert add(host, app) == slot
    (upstream,) = host.edge.upstreams("shop-web")
    assert (upstream.slot, upstream.address, upstream.port, upstream.state, upstream.up) == (slot, app.address, app.port, "ready", True)
    assert upstream.weight > 0


def test_a_drained_upstream_can_be_added_again(host, apps):
    app = apps(2)
    slot = add(host, app)
    host.edge.drain("shop-web", app.address, app.port, 5)
    assert host.edge.upstreams("shop-web")[0].state == "drain"
    assert add(host, app) == slot
    assert host.get()[0] == 200


def test_an_upstream_that_is_not_ready_gets_no_request_and_the_old_one_stays(host, apps):
    old, sick = apps(2), apps(3, ready=503)
    add(host, old)
    load = Load(host.port)
    try:
        with pytest.raises(DeliveryError) as sick_error:
            host.edge.add("shop-web", sick.address, sick.port, 3)
        with pytest.raises(DeliveryError) as dead_error:
            host.edge.add("shop-web", "127.0.0.99", sick.port, 3)
    finally:
        load.stop()
    assert sick_error.value.failure_class == dead_error.value.failure_class == "cutover"
    assert "503" in sick_error.value.message
    assert "Connection refused" in dead_error.value.message
    assert load.errors == []
    assert sick.requests == 0
    assert [upstream.address for upstream in host.edge.upstreams("shop-web")] == [old.address]


def test_drain_counts_what_is_still_open_and_waits_for_it(host, apps):
    old, new = apps(2), apps(3)
    add(host, old)
    long_one = Later(host.get, "/wait")
    eventually(lambda: host.edge.upstreams("shop-web")[0].sessions == 1, "the long request on the upstream")
    add(host, new)
    assert host.edge.drain("shop-web", old.address, old.port, 0.2).sessions_cut == 1
    # Drained means that nothing new comes, long before the last request ends.
    assert {host.get()[1].split()[0] for dummy in range(6)} == {new.address}
    waiting = Later(host.edge.drain, "shop-web", old.address, old.port, PATIENCE)
    old.go_on.set()
    assert waiting.result().sessions_cut == 0
    assert long_one.result()[0] == 200


def test_removing_what_is_not_there_is_fine(host):
    host.edge.remove("shop-web", "127.0.0.77", 80)
    assert host.edge.drain("shop-web", "127.0.0.77", 80, 1).sessions_cut == 0


def test_full_slots_are_told_and_nothing_is_pushed_out(host, apps):
    several = [apps(2 + number) for number in range(8)]
    for app in several:
        add(host, app)
    extra = apps(50)
    with pytest.raises(DeliveryError, match="all 8 slots are in use"):
        add(host, extra)
    assert len(host.edge.upstreams("shop-web")) == 8


def test_stale_slots_of_a_killed_run_are_used_again(host, apps):
    app = apps(2)
    for number in range(1, 9):
        host.edge.socket.ask(f"set server shop-web/s{number} addr 127.0.0.98 port {app.port}")
    assert add(host, app) == "s1"
    assert host.get()[0] == 200


def test_held_writes_wait_with_their_bodies_and_reads_go_on(host, apps):
    app = apps(2)
    add(host, app)
    assert host.edge.hold("shop", "writes") == 0
    body = b"x" * 300_000
    written = [Later(host.get, "/", body=body) for dummy in range(4)]
    assert host.get()[0] == 200
    assert all(one.answer is None for one in written)
    before = app.requests
    host.edge.hold("shop", "off")
    assert [one.result()[:2] for one in written] == [(200, f"{app.address} {len(body)}")] * 4
    assert app.requests == before + 4


def test_a_held_request_is_answered_by_who_is_there_at_its_release(host, apps):
    old, new = apps(2), apps(3)
    add(host, old)
    assert host.edge.hold("shop", "all") == 0
    waiting = Later(host.get)
    assert host.edge.upstreams("shop-web")[0].sessions == 0
    add(host, new)
    host.edge.remove("shop-web", old.address, old.port)
    host.edge.hold("shop", "off")
    assert waiting.result()[:2] == (200, f"{new.address} 0")


def test_a_hold_concerns_its_own_project_and_ends_with_503(host, apps):
    shop, blog = apps(2), apps(3)
    add(host, shop)
    add(host, blog, "blog-web")
    host.edge.hold("shop", "all")
    assert host.get("/", "blog.example.com")[0] == 200
    status, text, headers = host.get()
    assert (status, headers["retry-after"]) == (503, "5")
    assert "release" in text
    assert shop.requests == 0


def test_hold_waits_for_writes_that_were_let_through(host, apps):
    app = apps(2)
    add(host, app)
    writing = Later(host.get, "/wait", body=b"x")
    eventually(lambda: app.requests == 1, "the write on the upstream")
    reading = [Later(host.get, "/wait") for dummy in range(2)]
    eventually(lambda: app.requests == 3, "the reads on the upstream")
    assert host.edge.hold("shop", "writes", timeout=0.1) == 1
    assert host.edge.hold("shop", "all", timeout=0.1) == 3
    app.go_on.set()
    assert host.edge.hold("shop", "all", timeout=PATIENCE) == 0
    assert [one.result()[0] for one in (writing, *reading)] == [200] * 3


def test_slots_and_holds_survive_a_stop_and_a_crash(host, apps):
    app, draining = apps(2), apps(3)
    add(host, app)
    add(host, draining)
    host.edge.drain("shop-web", draining.address, draining.port, 5)
    host.edge.hold("shop", "writes")
    before = [(one.slot, one.address, one.port, one.state) for one in host.edge.upstreams("shop-web")]
    assert [state for *_rest, state in before] == ["ready", "drain"]

    host.play(tasks="stopped")
    with pytest.raises(DeliveryError):
        host.edge.check("shop-web")
    assert host.play(tasks="stopped")[0] == 0
    host.play()
    assert [(one.slot, one.address, one.port, one.state) for one in host.edge.upstreams("shop-web")] == before

    # What a kill leaves is what the last change of the edge has written.
    host.edge.remove("shop-web", draining.address, draining.port)
    worker = int(host.edge.socket.ask("show info").split("\nPid: ")[1].split()[0])
    for pid in (int(host.pidfile.read_text()), worker):
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not Path(f"/proc/{worker}/fd").exists() or not os.listdir(f"/proc/{worker}/fd"), "the end of the worker")
    host.play()
    assert [(one.address, one.state) for one in host.edge.upstreams("shop-web")] == [(app.address, "ready")]
    assert host.get()[0] == 200
    held = Later(host.get, "/", body=b"x")
    assert held.result()[0] == 503


def test_a_changed_configuration_is_reloaded_with_all_slots(host, apps):
    app = apps(2)
    add(host, app)
    host.edge.hold("shop", "writes")
    changed, _output = host.play(edge_timeout_server=44)
    try:
        assert changed > 0
        assert [one.address for one in host.edge.upstreams("shop-web")] == [app.address]
        assert host.get()[0] == 200
        assert host.get("/", body=b"x")[0] == 503
        assert host.play(edge_timeout_server=44)[0] == 0
    finally:
        host.play()


def test_a_broken_configuration_is_refused_and_the_edge_goes_on(host, apps):
    app = apps(2)
    add(host, app)
    before = (host.folder / "edge/haproxy.cfg").read_text()
    with pytest.raises(AssertionError, match="unknown keyword 'nonsense'"):
        host.play(edge_extra_config="frontend broken\n    nonsense")
    assert (host.folder / "edge/haproxy.cfg").read_text() == before
    assert host.get()[0] == 200


def test_wrong_questions_are_refused(host):
    host.edge.check("shop-web")
    with pytest.raises(DeliveryError, match="no backend shop-nope") as unknown:
        host.edge.check("shop-nope")
    assert unknown.value.failure_class == "config"
    with pytest.raises(DeliveryError, match="No such file"):
        edge_from({"type": "haproxy", "socket": "/nowhere/admin.sock"}).check("shop-web")
    with pytest.raises(DeliveryError, match="not an IP address"):
        host.edge.add("shop-web", "web", 80, 1)
    with pytest.raises(DeliveryError, match="no map"):
        edge_from({"type": "haproxy", "socket": host.socket, "hold_map": "/other.map"}).hold("shop", "all")


def test_the_socket_is_for_its_owner_only(host):
    assert os.stat(host.socket).st_mode & 0o777 == 0o600
