# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Batches, blue-green, canary and the time after the last switch: on a real engine, behind a real HAProxy, under load."""

from __future__ import annotations

import json
import time
import typing as t

import pytest
from rollout_fixture import Load, Proxy, Site, kill_at

PATIENCE = 60.0


def eventually(true: t.Callable[[], t.Any], said: str = "") -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline, said or "it did not come to that"
        time.sleep(0.05)


def lives(site: Site, service: str) -> list[tuple[str, str]]:
    """When each container of the service started and ended; no end sorts last."""
    found = []
    for container in site.containers(service):
        state = site.engine.inspect(container)["State"]
        found.append((state["StartedAt"], "9" if state["Running"] else state["FinishedAt"]))
    return found


def most_and_least(intervals: list[tuple[str, str]], since: str) -> tuple[int, int]:
    """The largest and the smallest number that ran at once after ``since``."""
    moments = sorted({moment for one in intervals for moment in one if since < moment < "9"})
    counts = [sum(start <= moment < end for start, end in intervals) for moment in moments]
    return max(counts), min(counts)


@pytest.mark.parametrize(
    ("limits", "most", "least"),
    [({"parallel": 1}, 4, 3), ({"max_surge": 1, "max_unavailable": "34%"}, 4, 2)],
    ids=["one-at-a-time", "surge-and-unavailable"],
)
def test_batches_keep_to_their_limits_and_lose_nothing(site: Site, proxy: Proxy, limits: dict[str, t.Any], most: int, least: int) -> None:
    site.compose["services"]["web"]["deploy"] = {"replicas": 3}
    site.services["web"].update(limits)
    site.deploy("one")
    before = lives(site, "web")
    with Load(proxy.port) as load:
        result = site.ok(**site.release("two"))
    assert load.lost == [] and load.answers == {"one", "two"}
    assert most_and_least(lives(site, "web"), max(start for start, _end in before)) == (most, least), result["lines"]
    assert len(proxy.upstreams()) == 3 and all(one.endswith(" ready") for one in proxy.upstreams())


def test_a_batch_that_does_not_get_ready_is_taken_back_with_those_before_it(site: Site, proxy: Proxy) -> None:
    """The first of the new ones serves already when the second fails."""
    site.compose["services"]["web"]["deploy"] = {"replicas": 2}
    site.services["web"].update(parallel=1, ready_timeout=3)
    site.deploy("one")
    old = site.containers("web")
    release = site.release("two")
    path = site.folder / "releases" / release["release_id"] / "journal.jsonl"

    def second() -> list[str]:
        found = [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.exists() else []
        return next((one["data"]["new"] for one in found if one.get("service") == "web" and one["event"] == "begin"), [])

    with Load(proxy.port) as load:
        process = site.start(**release)
        eventually(second)
        # Out of the way before its turn: what the engine cannot start is a batch that fails.
        site.engine.remove(second()[1], force=True)
        result = json.loads(process.communicate(timeout=120)[0].splitlines()[-1])
    assert result["failed"] and result["reverted"], result
    assert load.lost == [] and site.containers("web") == old == site.containers("web", running=True)


def test_blue_green_swaps_all_at_once_and_back(site: Site, proxy: Proxy) -> None:
    site.services["web"].update(strategy="blue_green", keep_old_for=600, smoke=["/bin/true"])
    site.services["worker"].update(strategy="blue_green", keep_old_for=600)
    site.deploy("one")
    old = {name: site.containers(name) for name in ("web", "worker")}
    with Load(proxy.port) as load:
        site.deploy("two")
        assert proxy.get() == "two" and len(proxy.upstreams()) == 1
        new = {name: site.containers(name, running=True) for name in ("web", "worker")}
        assert set(old["web"]) < set(new["web"]), "kept, and runs"
        assert site.containers("worker", running=False) == old["worker"], "kept, but what works by itself must not go on"
        assert not site.ok(**site.release("two"), _ansible_check_mode=True)["changed"], "what is kept is no difference"
        assert not site.ok(state="synced", project_dir=str(site.folder))["changed"]
        back = site.release("one")
        check = site.ok(**back, _ansible_check_mode=True)
        assert [step["action"] for step in check["plan"]["services"]] == ["swap", "swap"], check["lines"]
        back["services"] = {name: {**given, "keep_old_for": 1} for name, given in site.services.items()}
        result = site.ok(**back)
        site.commit(back)
    assert load.lost == [] and load.answers == {"one", "two"}
    assert site.containers("worker", running=True) == old["worker"] and set(old["web"]) < set(site.containers("web", running=True))
    assert result["services"]["worker"]["containers"] == old["worker"]
    assert site.engine.inspect(old["worker"][0])["HostConfig"]["RestartPolicy"]["Name"] == "always"
    assert proxy.get() == "one" and len(proxy.upstreams()) == 1
    eventually(
        lambda: (site.containers("web"), site.containers("worker")) == (old["web"], old["worker"]), "what was kept for 1 s is still there"
    )
    assert proxy.get() == "one"


def test_a_release_ends_what_was_kept_and_its_failure_does_not_bring_it_back(site: Site, proxy: Proxy) -> None:
    site.services["web"].update(strategy="blue_green", keep_old_for=600, ready_timeout=1)
    site.deploy("one")
    site.deploy("two")
    (serving,) = site.containers("worker", running=True)
    failed = site.call(**site.release("never"))
    assert failed["failed"] and failed["reverted"]
    assert len(site.containers("web")) == 1 and site.containers("worker") == [serving] and proxy.get() == "two"


def test_a_smoke_test_that_fails_keeps_the_new_one_from_every_request(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    site.services["web"].update(strategy="blue_green", smoke=["/bin/sh", "-c", "echo cart is empty; exit 3"])
    with Load(proxy.port, clients=2) as load:
        result = site.call(**site.release("two"))
    assert result["failed"] and result["reverted"] and result["failure_class"] == "not_ready"
    assert "Running the smoke test of web" in result["msg"] and "ended with 3" in result["msg"] and "cart is empty" in result["msg"]
    assert load.lost == [] and load.answers == {"one"}


def test_canary_goes_by_shares(site: Site, proxy: Proxy) -> None:
    site.compose["services"]["web"]["deploy"] = {"replicas": 2}
    site.services["web"].update(strategy="canary", canary={"steps": [10, 50], "seconds": 2, "max_error_rate": 1, "max_latency": 2})
    site.deploy("one")
    release = site.release("two")
    with Load(proxy.port) as load:
        result = site.ok(**release)
    assert load.lost == [] and load.answers == {"one", "two"}
    notes = [one["data"] for one in site.journal(release) if one["event"] == "note" and "requests" in one["data"]]
    assert [one["share"] for one in notes] == [10, 50]
    # Of what was sent in equal times, which here is about the same each time.
    assert 0 < notes[0]["requests"] < notes[1]["requests"] / 2
    assert result["services"]["web"]["strategy"] == "canary" and len(proxy.upstreams()) == 2
    assert {up.weight for up in proxy.edge().upstreams(proxy.backend)} == {1}, "the weights are as before"


def test_a_bad_canary_goes_back_at_once(site: Site, proxy: Proxy) -> None:
    site.deploy("one")
    old = site.containers("web")
    site.services["web"].update(strategy="canary", canary={"steps": [20], "seconds": 600, "max_error_rate": 5, "min_requests": 10})
    release = site.release("broken")
    with Load(proxy.port) as load:
        result = site.call(**release)
    assert result["failed"] and result["reverted"] and result["failure_class"] == "regression", result
    assert "Giving 20 % of the requests to the new web" in result["msg"] and "100.0 % errors, at most 5 % are allowed" in result["msg"]
    assert set(load.lost) == {"HTTP 500"} and len(load.lost) < load.sent / 4
    assert site.containers("web", running=True) == old == site.containers("web") and proxy.get() == "one"
    assert {up.weight for up in proxy.edge().upstreams(proxy.backend)} == {1}


def test_a_canary_needs_an_edge_that_shares_out(site: Site) -> None:
    site.services["web"].update(strategy="canary", canary={"steps": [10], "seconds": 1})
    result = site.call(**site.release("one"))
    assert result["failed"] and result["failure_class"] == "config" and "shares no requests out by weight" in result["msg"]
    assert not site.containers()


@pytest.mark.parametrize(("strategy", "line"), [("blue_green", 0), ("canary", -1)])
def test_killed_at_the_lines_of_the_roll(site: Site, proxy: Proxy, strategy: str, line: int) -> None:
    """At each second line of either; `make soak` comes to all of them."""
    more = {"blue_green": {"keep_old_for": 600}, "canary": {"canary": {"steps": [50], "seconds": 0.1}}}[strategy]
    site.services["web"].update(strategy=strategy, **more)
    site.deploy("one")
    before = site.containers()
    site.ok(**site.release("two"), phases=["pull", "dependencies", "migrate"])
    killed = True
    while killed:
        line += 2
        release = site.release("two")
        with Load(proxy.port, clients=2) as load:
            path = site.folder / "releases" / release["release_id"] / "journal.jsonl"
            killed = kill_at(site.start(**release, phases=["roll"]), path, line)
            site.revert(release)
            assert site.containers() == before == site.containers(running=True), f"line {line}: not exactly what ran before"
        assert load.lost == [] and proxy.get() == "one" and len(proxy.upstreams()) == 1, line
        assert not site.revert(release)["changed"], line
    assert line > 5


def test_what_goes_bad_after_the_last_switch_is_taken_back(site: Site, proxy: Proxy) -> None:
    site.options["bake"] = {"seconds": 600, "min_requests": 10}
    del site.compose["services"]["worker"]["restart"]
    first = site.release("one")
    site.ok(**{**first, "bake": {"seconds": 0.1}})
    site.commit(first)
    release = site.release("two")
    process = site.start(**release)
    eventually(lambda: any(one["step"] == "baking" for one in site.journal(release)))
    (worker,) = site.containers("worker", running=True)
    site.engine.kill(worker)
    result = json.loads(process.communicate(timeout=120)[0].splitlines()[-1])
    assert result["failed"] and result["reverted"] and result["failure_class"] == "regression"
    assert "of worker has ended with exit code 137" in result["msg"] and proxy.get() == "one"
    with Load(proxy.port, clients=2):
        result = site.call(**site.release("broken"))
    assert result["reverted"] and "100.0 % errors, at most 1 % are allowed" in result["msg"] and proxy.get() == "one"
