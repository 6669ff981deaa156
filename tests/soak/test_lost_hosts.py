# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The engine, the edge or the whole host is lost in mid-rollout: what serves, what the module says, and that the next run mends it."""

from __future__ import annotations

import json
import os
import subprocess
import time
import typing as t

import pytest
from own_engine import OwnEngine
from rollout_fixture import Load, Proxy, Site, lines_of

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import SERVICE_LABEL
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import fold
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import MARKER, _marked

Release = dict[str, t.Any]
PATIENCE = 60.0


@pytest.fixture(autouse=True)
def _an_engine_that_answers(engine: OwnEngine) -> t.Iterator[None]:
    engine.live_restore = True
    yield
    if not engine.answers():
        engine.live_restore = True
        engine.start()


@pytest.fixture
def shop(site: Site, proxy: Proxy) -> Site:
    """Deployed behind ``proxy``; what runs starts again with its engine."""
    for service in ("web", "worker", "db"):
        site.compose["services"][service]["restart"] = "always"
    site.deploy("one")
    return site


def await_line(site: Site, release: Release, process: subprocess.Popen[str], step: str, service: str | None = None, event: str = "begin") -> None:
    def there() -> bool:
        return any((one["step"], one.get("service"), one["event"]) == (step, service, event) for one in site.journal(release))

    while not there():
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def result_of(process: subprocess.Popen[str]) -> dict[str, t.Any]:
    out, err = process.communicate(timeout=240)
    assert out.strip(), err
    return json.loads(out.strip().splitlines()[-1])


def settled(site: Site, proxy: Proxy, serves: str) -> None:
    """One release, all of it, alone, behind an edge that knows where it is."""
    assert len(site.containers()) == 3 and site.containers() == site.containers(running=True)
    images = {one["Image"] for one in site.engine.containers({"com.docker.compose.project": site.project}) if one["Labels"][SERVICE_LABEL] != "db"}
    assert images == {site.images[serves]}
    (web,) = site.containers("web")
    address = site.engine.inspect(web)["NetworkSettings"]["Networks"][f"{site.project}_default"]["IPAddress"]
    assert [(up.address, up.state) for up in proxy.edge().upstreams(proxy.backend)] == [(address, "ready")]
    deadline = time.monotonic() + PATIENCE
    while True:  # an edge that has just started asks first
        try:
            assert proxy.get() == serves
            return
        except (OSError, AssertionError):
            assert time.monotonic() < deadline
        time.sleep(0.05)


def next_release(site: Site, proxy: Proxy, name: str) -> None:
    site.deploy(name)
    settled(site, proxy, name)


@pytest.mark.parametrize("live_restore", [True, False], ids=["live-restore", "without"])
def test_an_engine_that_is_killed_while_a_service_is_rolled(shop: Site, proxy: Proxy, engine: OwnEngine, live_restore: bool) -> None:
    release = shop.release("two")
    with Load(proxy.port, clients=2, slow=1) as load:
        process = shop.start(**release)
        await_line(shop, release, process, "rolling", "web")
        engine.kill()
        engine.live_restore = live_restore
        engine.start()
        result = result_of(process)
        assert result["failed"] and result["reverted"] and result["failure_class"] == "transport", result
        assert "the Docker engine does not answer" in result["msg"]
    settled(shop, proxy, "one")
    assert not shop.revert(release)["changed"]
    if live_restore:
        assert load.lost == [], load.lost[:5]
    next_release(shop, proxy, "two")


def test_an_engine_that_does_not_come_back_in_time(shop: Site, proxy: Proxy, engine: OwnEngine) -> None:
    release = shop.release("two")
    with Load(proxy.port, clients=2) as load:
        process = shop.start(**release)
        await_line(shop, release, process, "rolling", "web")
        engine.kill()
        result = result_of(process)
        assert result["failure_class"] == "rollback_failed" and result["cause_class"] == "transport", result
        assert fold(shop.journal(release)).open
        engine.start()
        assert shop.revert(release)["changed"]
    assert load.lost == [] and load.answers == {"one"}, load.lost[:5]
    settled(shop, proxy, "one")
    next_release(shop, proxy, "two")


@pytest.mark.parametrize(("step", "service"), [("migrated", None), ("rolling", "web")])
def test_an_engine_that_stalls_is_waited_for(shop: Site, proxy: Proxy, engine: OwnEngine, step: str, service: str | None) -> None:
    release = shop.release("two")
    with Load(proxy.port, clients=2, slow=1) as load:
        process = shop.start(**release)
        await_line(shop, release, process, step, service)
        engine.stall()
        try:
            seen = lines_of(shop.folder / "releases" / release["release_id"] / "journal.jsonl")
            for _look in range(20):
                assert process.poll() is None and proxy.get() in ("one", "two")
                time.sleep(0.1)
            assert lines_of(shop.folder / "releases" / release["release_id"] / "journal.jsonl") - seen <= 1, "it goes on without the engine"
        finally:
            engine.go_on()
        result = result_of(process)
        assert not result.get("failed"), result
        shop.commit(release)
    assert load.lost == [], load.lost[:5]
    settled(shop, proxy, "two")


@pytest.mark.parametrize(("step", "service", "event"), [("migrated", None, "begin"), ("rolling", "web", "begin"), ("rolling", "web", "end")])
def test_a_host_that_loses_its_power(shop: Site, proxy: Proxy, engine: OwnEngine, step: str, service: str | None, event: str) -> None:
    release = shop.release("two")
    process = shop.start(**release)
    await_line(shop, release, process, step, service, event)
    process.kill()
    proxy.process.kill()
    engine.power_off()
    process.communicate()
    for pid in _marked(f"{MARKER}={shop.project}/{release['release_id']}".encode()):
        os.kill(pid, 9)
    proxy.process.wait()
    proxy.start()
    engine.start()
    assert fold(shop.journal(release)).open
    assert shop.revert(release)["changed"]
    assert not shop.revert(release)["changed"]
    settled(shop, proxy, "one")
    next_release(shop, proxy, "two")


@pytest.mark.parametrize("event", ["begin", "end"])
def test_an_edge_that_is_killed_while_a_service_is_rolled(shop: Site, proxy: Proxy, event: str) -> None:
    """Its service manager starts it again, with the slots as they were, so that nothing has to be told to it."""
    release = shop.release("two")
    process = shop.start(**release)
    await_line(shop, release, process, "rolling", "web", event)
    before = proxy.upstreams()
    proxy.crash()
    assert event == "begin" or proxy.upstreams() == before
    result = result_of(process)
    if result.get("failed"):
        assert result["failure_class"] == "cutover" and result["reverted"], result
        settled(shop, proxy, "one")
    else:
        shop.commit(release)
        settled(shop, proxy, "two")
    next_release(shop, proxy, "two" if result.get("failed") else "one")
