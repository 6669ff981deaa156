# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""compose_rollout on a real engine, real Compose, a real registry and a real HAProxy, called as Ansible calls it: as a process."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import time
import typing as t
from pathlib import Path

import pytest
from grpc_fixture import start_grpc
from rollout_fixture import Load, Proxy, Site, kill_at, lines_of

from ansible_collections.selfhost.delivery.plugins.module_utils.releases import Journal, fold, process_started
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import MARKER, _marked, find_plugin
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.confirm import read_confirm
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import edge_from

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
    assert all(" s" in line.rpartition(", about ")[2] for line in result["lines"]), result["lines"]
    assert len(proxy.upstreams()) == 1 and proxy.upstreams()[0].endswith(":8080 ready")
    assert site.containers("web", running=False) == old, "kept until the commit"
    site.commit(release)
    assert len(site.containers("web")) == 1
    assert fold(site.journal(release)).rolled == ["web", "worker"]


def test_grpc_health_and_a_line_in_the_log(site: Site, tmp_path: Path) -> None:
    (tmp_path / "grpc").mkdir()
    with start_grpc(tmp_path / "grpc") as grpc:
        # The container hands its port on to a real gRPC server.
        forward = ["-ll", "-p", "8080", "-e", "/bin/busybox", "nc", "host", str(grpc.plain)]
        site.compose["services"]["web"].update(
            entrypoint=["/bin/busybox", "nc"], command=forward, extra_hosts=["host:host-gateway"]
        )
        site.compose["services"]["worker"]["entrypoint"] = ["/bin/sh", "-c", 'echo "$$VERSION takes jobs"; exec sleep 100000']
        site.services = {
            "web": {"port": 8080, "ready": {"grpc": {"service": "shop.v1.Late"}}, "ready_timeout": 20, "stop_timeout": 0},
            "worker": {"ready": {"log": "^one takes"}, "ready_timeout": 20, "stop_timeout": 0},
        }
        site.deploy("one")
        before = site.containers(running=True)
        # The new worker takes jobs too, but says something else; what was before it is asked the old question, and is ready.
        release = site.release("two")
        release["services"] = {**site.services, "worker": {**site.services["worker"], "ready": {"log": "^three"}, "ready_timeout": 1}}
        result = site.call(**release)
        assert result["failure_class"] == "not_ready" and result["reverted"] is True
        assert "was not ready before" not in json.dumps(result)
        assert "no line in the log of container" in result["msg"] and "has '^three'" in result["msg"] and '"two takes jobs"' in result["msg"]
        assert site.containers(running=True) == before


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


# -- confirmed or undone


def _armed(site: Site, release: dict[str, t.Any]) -> dict[str, t.Any]:
    return read_confirm(str(site.folder), release["release_id"])


def _await_waiter(site: Site, release: dict[str, t.Any]) -> str:
    """The state that the host's own process leaves at its end."""
    deadline = time.monotonic() + 60
    while process_started(_armed(site, release)["pid"]):
        assert time.monotonic() < deadline, "it waits for ever"
        time.sleep(0.02)
    return _armed(site, release)["state"]


def _confirm(site: Site, release: dict[str, t.Any]) -> dict[str, t.Any]:
    return site.call(state="confirmed", project_dir=str(site.folder), release_id=release["release_id"])


def test_what_nobody_confirms_is_taken_back_by_the_host_itself(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release("two")
    with Load(proxy.port, clients=2) as load:
        site.ok(**release, confirm_within=0.5)
        assert proxy.get() == "two"
        assert _await_waiter(site, release) == "gone_back"
        assert site.containers() == before == site.containers(running=True)
    assert proxy.get() == "one" and len(proxy.upstreams()) == 1
    assert load.lost == [] and load.answers == {"one", "two"}
    assert [entry["step"] for entry in site.journal(release) if entry["data"].get("reason") == "not_confirmed"] == ["reverting"]
    result = _confirm(site, release)
    assert result["failure_class"] == "cutover" and "gone back by itself" in result["msg"], result
    assert not site.revert(release)["changed"]
    # The next release waits for a confirmation of its own.
    release = site.release("two")
    site.ok(**release, confirm_within=60)
    assert _confirm(site, release)["changed"] and _await_waiter(site, release) == "confirmed"
    assert proxy.get() == "two"


def test_a_confirmed_release_stays(site: Site) -> None:
    site.deploy("one")
    release = site.release("two")
    site.ok(**release, confirm_within=1)
    assert _confirm(site, release)["changed"]
    assert _await_waiter(site, release) == "confirmed"
    assert site.answers() == "two"
    assert not _confirm(site, release)["changed"]
    site.commit(release)


def test_a_module_that_dies_in_the_roll_is_undone_by_the_host_itself(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release("two")
    with Load(proxy.port, clients=2) as load:
        process = site.start(**release, confirm_within=0.3)
        while _armed(site, release).get("state") != "armed":
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.kill()
        process.communicate()
        assert _await_waiter(site, release) == "gone_back"
    assert site.containers() == before == site.containers(running=True)
    assert proxy.get() == "one" and load.lost == [], load.lost[:5]


def test_who_takes_it_back_sends_the_waiter_home(site: Site) -> None:
    site.deploy("one")
    release = site.release("two")
    site.ok(**release, confirm_within=1)
    site.revert(release)
    again = site.deploy("two")
    assert _await_waiter(site, release) == "confirmed"
    assert site.answers() == "two" and again["release_id"] != release["release_id"]


def test_the_waiter_leaves_it_to_whoever_has_the_lease_now(site: Site) -> None:
    site.deploy("one")
    release = site.release("two")
    (site.folder / "releases" / release["release_id"] / "release.json").write_text("{}")
    lock = {"run_id": "mine", "kind": "run", "holder": {}, "since": "2026-11-21T09:00:00.000Z", "expires": "2999-01-01T00:00:00.000Z", "ttl": 900}
    (site.folder / "lock.json").write_text(json.dumps(lock))
    site.ok(**release, run_id="mine", confirm_within=0.5)
    (site.folder / "lock.json").write_text(json.dumps({**lock, "run_id": "eve"}))
    assert _await_waiter(site, release) == "armed"
    assert site.answers() == "two"


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
            killed = kill_at(site.start(**release), path, line)
            assert killed or line == LINES, f"a whole release has only {lines_of(path)} lines"
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
    whole = lines_of(path)
    with Load(proxy.port, clients=2) as load:
        for more in range(1, 4):
            kill_at(site.start(state="reverted", project_dir=str(site.folder), release_id=release["release_id"]), path, whole + more)
        site.revert(release)
    assert site.containers() == before == site.containers(running=True)
    assert load.lost == [] and proxy.get() == "one" and len(proxy.upstreams()) == 1


def test_a_compose_that_outlives_its_module_creates_nothing_behind_undo(site: Site, tmp_path: Path) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release("two")
    slow = tmp_path / "cli-plugins"
    slow.mkdir()
    # Its output goes nowhere, or the pipe that nobody reads any more would end it.
    (slow / "docker-compose").write_text(
        f"#!/bin/sh\ncase \"$*\" in *--no-start*web*) touch {slow}/called; sleep 4; exec >/dev/null 2>&1;; esac\nexec {find_plugin()} \"$@\"\n"
    )
    (slow / "docker-compose").chmod(0o755)
    process = site.start(**release, phases=["pull", "dependencies", "roll"], DOCKER_CONFIG=str(tmp_path))
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
    _refused(site, {**release, "services": {"web": {"port": 1, "ready": {"grpc": {"servce": "a"}}}}}, "services.web.ready.grpc.servce")
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


def test_compose_is_asked_about_networks_only_where_something_can_have_changed(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plugin = tmp_path / "cli-plugins" / "docker-compose"
    plugin.parent.mkdir()
    plugin.write_text(f"#!/bin/sh\ncase \"$*\" in *--dry-run*) echo >>{tmp_path}/asked;; esac\nexec {find_plugin()} \"$@\"\n")
    plugin.chmod(0o755)
    (tmp_path / "asked").touch()
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    site.deploy("one")
    site.deploy("two")
    assert (tmp_path / "asked").read_text() == "", "the first release has made them, the second leaves them as they are"
    plugin.write_text(plugin.read_text() + "\n")
    site.deploy("one")
    assert (tmp_path / "asked").read_text() == "\n", "another Compose may see them in another way"
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


# -- faults under a rollout


def test_an_edge_that_has_no_place_left_refuses_and_the_old_one_serves(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    before = site.containers()
    for number in range(7):
        proxy.edge().socket.ask(f"set server {proxy.backend}/s{number + 2} addr 127.0.0.9 port {number + 1}")  # type: ignore[attr-defined]
        proxy.edge().socket.ask(f"set server {proxy.backend}/s{number + 2} state drain")  # type: ignore[attr-defined]
    with Load(proxy.port, clients=2) as load:
        result = site.call(**site.release("two"))
    assert result["failure_class"] == "cutover" and "all 8 slots are in use" in result["msg"] and result["reverted"]
    assert site.containers() == before == site.containers(running=True)
    assert load.lost == [] and load.answers == {"one"}


def test_an_image_that_is_removed_after_the_pull(site: Site) -> None:
    site.deploy("one")
    before = site.containers()
    release = site.release("two")
    site.ok(**release, phases=["pull"])
    subprocess.run(["docker", "image", "rm", "-f", site.images["two"]], check=True, capture_output=True)
    result = site.call(**release, phases=["dependencies", "migrate", "roll"])
    assert result["failed"] and result["reverted"] and site.containers() == before == site.containers(running=True)
    assert "No such image" in result["msg"], result["msg"]
    site.deploy("two")
    assert site.answers() == "two"


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT ROOT: a file system is mounted")
def test_a_disk_that_fills_up_on_the_way(site: Site, proxy: Proxy) -> None:
    """What cannot be journalled is not done; going back needs no room, since it is what makes some."""
    folder = site.folder / "releases"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "none", str(folder)], check=True)
    try:
        site.deploy("one")
        before = site.containers()
        release = site.release("two")
        journal = Journal.open(str(folder / release["release_id"] / "journal.jsonl"), "test")
        journal.note("planned", padding="")
        # A file of this file system grows by whole pages: this one has so much left of its last.
        journal.note("planned", padding="x" * (4096 - 2 * os.path.getsize(journal.path) - 700))
        site.ok(**release, phases=["pull", "dependencies"])
        with Load(proxy.port, clients=2) as load:
            process = site.start(**release)
            while not (folder / release["release_id"] / "rollout.json").exists():
                assert process.poll() is None
                time.sleep(0.0005)
            with open(folder / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
                while filler.write(b"x" * 512):
                    pass
            out, err = process.communicate(timeout=120)
            assert out.strip(), err
            result = json.loads(out.splitlines()[-1])
            assert result.get("failed") and result["failure_class"] == "capacity" and result["reverted"], result
        assert load.lost == [] and site.containers() == before == site.containers(running=True) and proxy.get() == "one"
        (folder / "filler").unlink()
        site.deploy("two")
        assert proxy.get() == "two"
    finally:
        site.clean()
        subprocess.run(["umount", "-l", str(folder)], check=True)
