# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Builds that turn out bad are taken back while the old one serves, and a promotion that cannot go on leaves it alone."""

from __future__ import annotations

import subprocess
import time

import pytest

from .site_under_test import Load, Site

ENVIRONMENTS = ("production",)


@pytest.fixture(scope="module", autouse=True)
def one_release(site: Site) -> None:
    """Production serves a release."""
    site.promote(site.production, site.build("sha-good"), "-e", "delivery_override_gates=testing").must_succeed()


@pytest.mark.parametrize(
    ("tag", "web", "migrate", "fragments"),
    [
        ("sha-never", "never", "ok", ("not ready", "Runs now: sha-good")),
        ("sha-crash", "crash", "ok", ("cannot read its settings", "Runs now: sha-good")),
        ("sha-flap", "flap", "ok", ("Runs now: sha-good",)),
        ("sha-migratefail", "ok", "fail", ("column already exists", "Runs now: sha-good")),
        ("sha-migratehang", "ok", "hang", ("did not end within 5 s", "Runs now: sha-good")),
    ],
)
def test_bad_build_is_taken_back_while_the_old_one_serves(site: Site, tag: str, web: str, migrate: str, fragments: tuple[str, ...]) -> None:
    site.build(tag, web=web, migrate=migrate)
    before = site.production.containers()
    with Load(site.production.port, pause=0.02) as load:
        site.promote(site.production, tag, "-e", "delivery_override_gates=testing").must_fail(*fragments)
    assert load.lost == [] and load.versions == ["sha-good"], (load.sent, load.lost[:5], load.versions)
    assert site.production.containers() == before
    assert site.production.newest()["result"] == "rolled_back"
    assert site.production.current() == "sha-good"
    assert not (site.production.deploy_dir / "lock.json").exists()


def test_registry_gone_between_resolve_and_pull(site: Site) -> None:
    site.build("sha-lost")
    process = subprocess.Popen(
        site.command("promote", site.production, "-e", "tag=sha-lost", "-e", "delivery_override_gates=testing"),
        env=site.environ(),
        cwd=site.folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    count = site.production.release_count()
    while process.poll() is None and site.production.release_count() == count:
        time.sleep(0.005)
    site.registry.stop()
    try:
        output = process.communicate(timeout=180)[0]
    finally:
        site.registry.start()
    assert process.returncode != 0 and site.registry.address in output, output
    assert site.production.serving() == "sha-good" and site.production.newest()["result"] == "aborted"
