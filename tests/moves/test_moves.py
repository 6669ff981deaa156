# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""An app moves to another host and back, and is drilled on a third. The tests build on each other, in this order."""

from __future__ import annotations

from e2e.site_under_test import Load
from hosts.site_of_hosts import DEPLOY_DIR

from .conftest import MovingSite

MOVE = ("-e", "from=app-1", "-e", "to=app-2")


def _reason(site: MovingSite, name: str) -> str:
    return site.machine(name).run("cat", f"{DEPLOY_DIR}/lock.json", check=False)


def test_what_cannot_move_is_refused_before_anything_changes(site: MovingSite) -> None:
    before = site.hosts.apps(site.machine("app-1"))
    site.run("migrate_host", site.hosts, "-e", "from=app-1").must_fail("give -e from=<host> and -e to=<host>")
    site.run("migrate_host", site.hosts, "-e", "from=app-2", "-e", "to=app-3").must_fail("app-1 keeps its data, not app-2")
    site.run("migrate_host", site.hosts, *MOVE).must_fail("on app-2 there is no .env.production", "Env files never leave their host")
    assert site.hosts.apps(site.machine("app-1")) == before and not _reason(site, "app-1")
    site.run("setup", site.hosts, "-e", "on=app-2", timeout=1800).must_succeed()


def test_a_move_that_fails_leaves_the_old_host_serving(site: MovingSite) -> None:
    new, env = site.machine("app-2"), f"{DEPLOY_DIR}/.env.production"
    site.write_row("app-1", "first")
    before = site.hosts.apps(site.machine("app-1"), all_of_them=False)
    new.run("sh", "-c", f"echo BEHAVIOUR=never >> {env}")
    failed = site.run("migrate_host", site.hosts, *MOVE, timeout=1800)
    failed.must_fail("shopfront did not move to app-2; app-1 serves as before", "Waiting for web to be ready")
    new.run("sed", "-i", "/^BEHAVIOUR=/d", env)
    assert site.hosts.answer(site.machine("app-1")) == "sha-one" and site.rows("app-1") == "first"
    assert site.hosts.apps(site.machine("app-1"), all_of_them=False) == before and not _reason(site, "app-1")


def test_a_move_brings_the_data_and_leaves_the_old_host_whole(site: MovingSite) -> None:
    address = site.machine("app-1").address
    with Load(80, pause=0.05, address=address) as load:
        moved = site.run("migrate_host", site.hosts, *MOVE, timeout=1800).must_succeed()
    assert "shopfront sha-one serves on app-2" in moved.output, moved.output
    assert site.hosts.answer(site.machine("app-2")) == "sha-one" and site.rows("app-2") == "first" == site.rows("app-1")
    assert site.hosts.apps(site.machine("app-1"), all_of_them=False) == [] and len(site.hosts.apps(site.machine("app-1"))) == 3
    assert "moved to app-2" in _reason(site, "app-1")
    assert load.versions == ["sha-one"]
    # Nobody promotes there by mistake.
    site.promote(site.hosts, site.build("sha-two")).must_fail("it is frozen (moved to app-2)")


def test_the_way_back_is_one_command_and_loses_nothing(site: MovingSite) -> None:
    site.write_row("app-2", "second")
    site.live_at("app-2")
    site.run("migrate_host", site.hosts, "-e", "from=app-2", "-e", "to=app-1", timeout=1800).must_succeed()
    site.live_at("app-1")
    assert site.hosts.answer(site.machine("app-1")) == "sha-one" and site.rows("app-1") == "second"
    site.promote(site.hosts, "sha-two").must_succeed()


def test_a_drill_on_another_host_needs_only_the_repository(site: MovingSite) -> None:
    other = site.machine("app-3")
    drilled = site.run("drill", site.hosts, "-e", "on=app-3", timeout=1800).must_succeed()
    assert "PASSED" in drilled.output and "start keeper" in drilled.output, drilled.output
    assert site.hosts.apps(other) == [] and other.run("docker", "volume", "ls", "-q").strip() == ""
