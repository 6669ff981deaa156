# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A release over three hosts: one lock, one migrator, one end for all of them, also when one of them is lost."""

from __future__ import annotations

import contextlib
import itertools
import typing as t

import pytest
from e2e.site_under_test import Load

from .machines import Machine
from .site_of_hosts import DEPLOY_DIR, HostsSite

_numbers = itertools.count(1)
#: The coordinator cannot see that a holder elsewhere is dead; without this its lease has to end first.
TAKEOVER = ("-e", "delivery_takeover=true")


@pytest.fixture
def served(site: HostsSite) -> str:
    """The tag of a committed release that all three hosts serve."""
    tags = set(site.hosts.currents())
    if "" in tags or len(tags) > 1:
        site.promote(site.hosts, site.build("sha-base")).must_succeed()
    (tag,) = set(site.hosts.answers())
    return tag


@contextlib.contextmanager
def _load(site: HostsSite) -> t.Iterator[list[Load]]:
    """Customers of each host."""
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(Load(80, pause=0.05, address=machine.address)) for machine in site.hosts.machines]


@contextlib.contextmanager
def _setting(machine: Machine, line: str) -> t.Iterator[None]:
    """A line more in the env file of one host."""
    path = f"{DEPLOY_DIR}/.env.production"
    machine.run("sh", "-c", f"echo {line} >> {path}")
    try:
        yield
    finally:
        machine.run("sed", "-i", f"/^{line}$/d", path)


def _settled(site: HostsSite, tag: str) -> None:
    """One release serves on every host, has an end, nobody holds the lock, and nothing is left over."""
    assert site.hosts.answers() == [tag] * 3
    assert site.hosts.currents() == [tag] * 3
    assert not site.hosts.locked()
    assert [len(site.hosts.apps(machine)) for machine in site.hosts.machines] == [3, 3, 3]
    assert all(site.hosts.record(number).get("result") for number in range(-site.hosts.release_count(), 0))


def _rolls(site: HostsSite, machine: Machine, tag: str) -> bool:
    """Whether the release of ``tag`` has begun to switch a service on that host."""
    if not site.hosts.releases(machine)[-1].endswith(f"-{tag}"):
        return False
    return any(entry["step"] == "rolling" and entry.get("service") for entry in site.hosts.journal(machine))


def test_canary_first_then_batches_with_one_migrator_and_no_request_lost(site: HostsSite, served: str) -> None:
    tag = site.build("sha-batches")
    with _load(site) as loads:
        done = site.promote(site.hosts, tag, "-e", "delivery_canary_hosts=app-2", "-e", "delivery_serial=100%").must_succeed()
    assert "hosts: app-2 (canary), then app-1 + app-3" in done.output
    _settled(site, tag)
    assert [entry["data"]["rolled"] for entry in site.hosts.journal() if entry["step"] == "hosts" and entry["event"] == "note"] == [
        ["app-2"],
        ["app-1", "app-3"],
    ]
    assert [load.lost for load in loads] == [[], [], []] and [load.versions for load in loads] == [[served, tag]] * 3
    assert [migrated.count(tag) for migrated in site.hosts.migrations()] == [1, 0, 0]

    releases = site.hosts.releases()
    assert f"{tag} runs in production already: nothing changed" in site.promote(site.hosts, tag).must_succeed().output
    assert site.hosts.releases() == releases


def test_a_failure_at_the_last_service_of_the_last_host_takes_back_all_in_reverse(site: HostsSite, served: str) -> None:
    before = [site.hosts.apps(machine) for machine in site.hosts.machines]
    tag = site.build("sha-third")
    site.write_inventories(lambda variables: variables["delivery_app"].update(order=["worker", "web"]))
    with _setting(site.hosts.machines[2], "BEHAVIOUR=never"), _load(site) as loads:
        site.promote(site.hosts, tag).must_fail("app-3: Roll service after service: Waiting for web to be ready", f"Runs now: {served}")
    site.write_inventories()
    _settled(site, served)
    assert [site.hosts.apps(machine) for machine in site.hosts.machines] == before
    assert site.hosts.record()["result"] == "rolled_back" and site.hosts.record()["failure_class"] == "not_ready"
    assert [load.lost for load in loads] == [[], [], []]
    assert [load.versions for load in loads] == [[served, tag, served]] * 2 + [[served]]
    # Each host has been taken back whole before the one that was rolled before it.
    back = [[entry["time"] for entry in site.hosts.journal(machine) if entry["step"] == "reverting"] for machine in site.hosts.machines]
    assert max(back[2]) < min(back[1]) and max(back[1]) < min(back[0])


def test_a_host_that_is_cut_off_in_its_roll_is_owed_its_way_back(site: HostsSite, served: str) -> None:
    app_3 = site.hosts.machines[2]
    lost, after = site.build("sha-lost"), site.build("sha-after")
    failed = site.promote_and(lost, lambda: _rolls(site, app_3, lost), app_3.cut_off)
    try:
        failed.must_fail("app-3: not reached any more", "NOT taken back, since not reached: app-3", f"Runs now: {served}")
        assert site.hosts.answers()[:2] == [served] * 2
        record = site.hosts.record()
        assert (record["result"], record["owed"]) == ("rollback_failed", ["app-3"]) and not site.hosts.locked()
        # While it is away nothing begins, but with its name.
        site.promote(site.hosts, after).must_fail("app-3 cannot be reached", "nothing was changed", "--limit 'all:!app-3'")
        assert site.hosts.record() == record and not site.hosts.locked()
        # Without it everything goes on, and it stays owed.
        site.promote(site.hosts, after, "--limit", "all:!app-3").must_succeed()
        assert site.hosts.answers()[:2] == [after] * 2 and site.hosts.record(-2)["owed"] == ["app-3"]
    finally:
        app_3.join()
    mended = site.promote(site.hosts, site.build("sha-mended")).must_succeed()
    assert f"{lost} was not taken back on app-3: it is undone first" in mended.output
    _settled(site, "sha-mended")
    assert site.hosts.record(-3)["tag"] == lost and site.hosts.record(-3)["result"] == "rolled_back" and not site.hosts.record(-3)["owed"]
    assert [migrated.count(lost) for migrated in site.hosts.migrations()] == [1, 0, 0]


def test_a_coordinator_that_dies_leaves_the_release_open_for_the_next_run(site: HostsSite, served: str) -> None:
    coordinator, app_2, _app_3 = site.hosts.machines
    lost = site.build("sha-headless")
    failed = site.promote_and(lost, lambda: _rolls(site, app_2, lost), coordinator.power_off)
    try:
        failed.must_fail("NOT taken back, since not reached: app-1", f"Runs now: {served}")
        assert site.hosts.answers()[1:] == [served] * 2
    finally:
        coordinator.power_on()
    mended = site.run("rollback", site.hosts, "-e", f"tag={served}", *TAKEOVER).must_succeed()
    assert lost in mended.output and "was left open at step" in mended.output
    _settled(site, served)
    assert site.hosts.record(-2)["result"] == "rolled_back"


def test_a_controller_killed_between_two_hosts_is_mended_on_all_of_them(site: HostsSite, served: str) -> None:
    killed, after = (site.build(f"sha-k{next(_numbers)}") for _tag in range(2))
    assert site.kill_at("promote", site.hosts, "hosts", "note", "-e", f"tag={killed}")
    assert set(site.hosts.answers()) <= {served, killed}
    mended = site.promote(site.hosts, after, *TAKEOVER).must_succeed()
    assert "was left open at step" in mended.output
    _settled(site, after)
    assert site.hosts.record(-2)["result"] == "rolled_back"
    assert [migrated.count(after) for migrated in site.hosts.migrations()] == [1, 0, 0]


def test_a_canary_that_is_no_host_is_refused(site: HostsSite, served: str) -> None:
    releases = site.hosts.releases()
    site.promote(site.hosts, site.build("sha-typo"), "-e", "delivery_canary_hosts=app-4").must_fail("app-4 is not in the group app_hosts")
    assert site.hosts.releases() == releases and site.hosts.answers() == [served] * 3
