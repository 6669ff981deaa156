# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The way back, with data and without: by itself after a bad migration, by hand otherwise. The tests build on each other, in this order."""

from __future__ import annotations

import subprocess
import typing as t

import pytest

from . import shopfront
from .site_under_test import Load, Site

ENVIRONMENTS = ("production",)


@pytest.fixture(scope="module", autouse=True)
def three_releases(site: Site) -> None:
    """Production has run three releases and serves the last of them."""
    for tag in ("sha-one", "sha-two", "sha-hotfix"):
        site.promote(site.production, site.build(tag), "-e", "delivery_override_gates=testing").must_succeed()


def test_breaking_migration_is_taken_back_with_its_data(site: Site) -> None:
    rows = site.production.data("rows")
    site.build("sha-damage", web="never", migrate="damage")
    extra = ("-e", "delivery_migrations=breaking", "-e", "delivery_override_gates=testing")
    site.promote(site.production, "sha-damage", *extra).must_fail("data goes back to the snapshot set", "Runs now: sha-hotfix")
    assert site.production.data("rows") == rows != ""
    assert site.production.serving() == "sha-hotfix"
    kept = list((site.production.deploy_dir / "snapshots").glob("replaced-*.manifest.json"))
    assert kept, "the damaged state was not kept"


def test_compatible_migration_is_taken_back_without_its_data(site: Site) -> None:
    site.build("sha-damage2", web="never", migrate="damage")
    rows = site.production.data("rows")
    site.promote(site.production, "sha-damage2", "-e", "delivery_override_gates=testing").must_fail("data stays")
    assert site.production.data("rows").strip() == "damaged" != rows.strip()
    assert site.production.serving() == "sha-hotfix"


# --- the way back -----------------------------------------------------------------------------------------------------------


def test_rollback_without_argument_goes_to_the_release_before(site: Site) -> None:
    with Load(site.production.port, pause=0.02) as load:
        site.run("rollback", site.production).must_succeed()
    assert site.production.serving() == site.production.current() == "sha-two"
    assert load.lost == [], load.lost[:5]
    assert site.production.newest()["kind"] == "rollback"


def test_rollback_to_a_tag(site: Site) -> None:
    site.run("rollback", site.production, "-e", "tag=sha-one").must_succeed()
    assert site.production.serving() == "sha-one"
    site.run("rollback", site.production, "-e", "tag=sha-nobody").must_fail("was never committed here", "sha-two")


def test_rollback_to_a_snapshot_set_brings_its_data(site: Site) -> None:
    site.promote(site.production, "sha-two", "-e", "delivery_override_gates=testing").must_succeed()
    release = site.production.newest()
    rows = site.production.data("rows")
    assert rows.strip() == "damaged"  # since the compatible migration above
    first = sorted((site.production.deploy_dir / "snapshots").glob("pre-promotion-two-*.manifest.json"))[0].name.removesuffix(
        ".manifest.json"
    )
    site.run("rollback", site.production, "-e", f"snapshot={first}").must_succeed()
    assert site.production.serving() == "sha-one"
    assert site.production.data("rows").strip() == "row 1"
    assert release["tag"] == "sha-two"


def test_list_of_what_there_is(site: Site) -> None:
    shown = site.run("rollback", site.production, "-e", "list=true").must_succeed().output
    assert "sha-hotfix" in shown and "pre-promotion-two-" in shown


def test_snapshot_and_restore_by_hand(site: Site) -> None:
    site.run("snapshot", site.production).must_succeed()
    taken = sorted((site.production.deploy_dir / "snapshots").glob("manual-*.manifest.json"))[-1]
    volume = f"{site.production.project}_data"
    write = ["docker", "run", "--rm", "-v", f"{volume}:/data", shopfront.KEEPER_IMAGE, "/bin/sh", "-c", "echo other > /data/rows"]
    subprocess.run(write, check=True)
    site.run("restore", site.production, "-e", f"snapshot={taken.name.removesuffix('.manifest.json')}").must_succeed()
    assert site.production.data("rows").strip() == "row 1"
    assert site.production.serving() == "sha-one"


def test_same_tag_again_repairs_what_does_not_run(site: Site) -> None:
    tag = site.production.current()
    worker = next(name for name in site.production.containers() if "-worker-" in name)
    subprocess.run(["docker", "rm", "--force", worker], check=True, stdout=subprocess.DEVNULL)
    with Load(site.production.port, pause=0.02) as load:
        repaired = site.promote(site.production, tag, "-e", "delivery_override_gates=testing").must_succeed()
    assert "something else runs" in repaired.output
    running = site.production.containers(all_of_them=False)
    assert len(running) == 3 and any("-worker-" in name for name in running), running
    assert load.lost == [] and site.production.serving() == tag


def test_what_blue_green_kept_is_swapped_back_to(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Last in this file: the description of the app is another one from here on."""
    monkeypatch.setenv("DELIVERY_PROGRESS", "0.5")

    def watched(variables: dict[str, t.Any]) -> None:
        variables["delivery_app"]["services"]["web"].update(strategy="blue_green", keep_old_for=600)
        variables["delivery_app"]["policies"]["bake"] = {"seconds": 1, "min_requests": 5}

    site.write_inventories(watched)
    gate = ("-e", "delivery_override_gates=testing")
    for tag in ("sha-blue", "sha-green"):
        promoted = site.promote(site.production, site.build(tag), *gate).must_succeed()
        assert "watched for 1 s after the last switch" in promoted.output
        assert "watching for 1 s on " in promoted.output, "said while it is so, not only at the end"
    with Load(site.production.port, pause=0.02) as load:
        back = site.run("rollback", site.production).must_succeed()
    assert "swap (its containers of before are still there)" in back.output
    assert site.production.serving() == "sha-blue" and load.lost == [], load.lost[:5]
    assert any(one["step"] == "baking" and one["event"] == "end" for one in site.production.journal())
