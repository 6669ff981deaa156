# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The controller is killed at each step: what served goes on serving, and the next run ends the open release first."""

from __future__ import annotations

import itertools
import json
import time
import typing as t

import pytest

from .site_under_test import Environment, Load, Site

ENVIRONMENTS = ("staging",)
_numbers = itertools.count(1)

#: Where promotions are killed one after the other: each but the first mends what the one before left, and is killed itself.
ROWS = {
    "before-the-data": [("planned", "end"), ("pinned", "begin"), ("pulled", "begin"), ("snapshotted", "begin")],
    "at-the-data": [("snapshotted", "end"), ("migrated", "begin"), ("migrated", "end")],
    "while-rolling": [("rolling", "begin"), ("rolling", "end"), ("verifying", "begin")],
    "before-the-commit": [("verifying", "end"), ("committed", "begin")],
}
#: Steps inside a long module: with the controller alone killed, the module goes on working.
LONG_STEPS = [("migrated", "begin"), ("rolling", "begin")]


@pytest.fixture(scope="module")
def staging(site: Site) -> Environment:
    """One environment, serving a committed release."""
    site.build("sha-base")
    site.promote(site.staging, "sha-base").must_succeed()
    return site.staging


def _releases(environment: Environment) -> list[dict[str, t.Any]]:
    return [json.loads((folder / "release.json").read_text()) for folder in sorted((environment.deploy_dir / "releases").glob("2*"))]


def _settled(environment: Environment, serving: str) -> None:
    """One release serves, everything has an end, nobody holds the lock, and nothing is left over."""
    assert environment.serving() == serving == environment.current()
    assert all(release.get("result") for release in _releases(environment)), _releases(environment)[-2:]
    assert not (environment.deploy_dir / "lock.json").exists()
    names = environment.containers()
    assert sorted(environment.containers(all_of_them=False)) == sorted(names) and len(names) == 3, names


def _kill_in_a_row(site: Site, staging: Environment, steps: t.Sequence[tuple[str, str]], orphans: bool = False) -> None:
    """Kill a promotion at each of the steps, then let one go to its end; nothing is lost on the way, and everything has an end."""
    tags = [site.build(f"sha-k{next(_numbers)}") for _step in (*steps, "the last")]
    with Load(staging.port, pause=0.03) as load:
        for (step, event), tag in zip(steps, tags):
            reached = site.kill_at("promote", staging, step, event, "-e", f"tag={tag}", orphans=orphans)
            assert reached, f"{tag} ended before {step} {event}"
            assert staging.serving() in (staging.current(), tag), (step, event)
            assert all(release.get("result") for release in _releases(staging)[:-1]), (step, event, _releases(staging)[-3:])
        mended = site.promote(staging, tags[-1]).must_succeed()
    assert "was left open at step" in mended.output
    assert load.lost == [], (load.sent, load.lost[:5])
    _settled(staging, tags[-1])


@pytest.mark.parametrize("row", ROWS)
def test_killed_promotions_are_mended_by_the_next(site: Site, staging: Environment, row: str) -> None:
    _kill_in_a_row(site, staging, ROWS[row])


@pytest.mark.parametrize("step", LONG_STEPS, ids="-".join)
def test_a_module_that_outlives_its_controller_is_waited_for(site: Site, staging: Environment, step: tuple[str, str]) -> None:
    _kill_in_a_row(site, staging, [step], orphans=True)


@pytest.mark.parametrize(("step", "event"), [("migrated", "end"), ("rolling", "end")])
def test_killed_promotion_is_mended_by_a_rollback(site: Site, staging: Environment, step: str, event: str) -> None:
    for tag in ("sha-r1", "sha-r2", killed := f"sha-k{next(_numbers)}"):
        site.build(tag)
    site.promote(staging, "sha-r1").must_succeed()
    site.promote(staging, "sha-r2").must_succeed()
    assert site.kill_at("promote", staging, step, event, "-e", f"tag={killed}")
    site.run("rollback", staging).must_succeed()
    _settled(staging, "sha-r1")


def test_a_host_goes_back_by_itself_when_nobody_confirms(site: Site, staging: Environment) -> None:
    def confirm_within(seconds: int) -> None:
        site.write_inventories(lambda variables: variables["delivery_app"]["policies"].update(confirm_within=seconds))

    # Long enough for a busy machine to reach the step of the kill, short enough to wait for.
    confirm_within(10)
    served = staging.current()
    with Load(staging.port, pause=0.03) as load:
        assert site.kill_at("promote", staging, "verifying", "begin", "-e", f"tag={site.build('sha-unseen')}")
        deadline = time.monotonic() + 60
        while staging.confirmation() != "gone_back":
            assert time.monotonic() < deadline, (staging.confirmation(), staging.journal()[-3:])
            time.sleep(0.1)
        assert staging.serving() == served
    assert load.lost == [] and load.versions == [served, "sha-unseen", served], (load.lost[:5], load.versions)
    # The record is the next run's to write, and a release that is confirmed stays.
    confirm_within(600)
    mended = site.promote(staging, site.build("sha-seen")).must_succeed()
    assert "was left open at step" in mended.output and "the host goes back by itself" in mended.output
    assert staging.confirmation() == "confirmed"
    _settled(staging, "sha-seen")


def test_killed_breaking_migration_gives_its_data_back(site: Site, staging: Environment) -> None:
    before, rows = staging.current(), staging.data("rows")
    killed = site.build("sha-kdamage", migrate="damage")
    assert site.kill_at("promote", staging, "migrated", "end", "-e", f"tag={killed}", "-e", "delivery_migrations=breaking")
    after = site.build(f"sha-n{next(_numbers)}")
    site.promote(staging, after).must_succeed()
    assert staging.data("rows") == rows != ""
    assert before != after
    _settled(staging, after)


def test_killed_data_rollback_is_mended(site: Site, staging: Environment) -> None:
    """Killed while the data is being replaced: the next run puts back what was there before, then does its own work."""
    site.promote(staging, site.build(f"sha-n{next(_numbers)}")).must_succeed()  # so that there is a set to go back to
    rows = staging.data("rows")
    sets = sorted((staging.deploy_dir / "snapshots").glob("pre-promotion-*.manifest.json"))
    assert site.kill_at("rollback", staging, "restoring", "begin", "-e", f"snapshot={sets[-1].name.removesuffix('.manifest.json')}")
    after = site.build(f"sha-n{next(_numbers)}")
    site.promote(staging, after).must_succeed()
    assert staging.data("rows") == rows
    _settled(staging, after)
