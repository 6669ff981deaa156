# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sets given back elsewhere, in part, after a check, or not at all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import typing as t
from pathlib import Path

import pytest
import snapshot_fixture
from snapshot_fixture import MARKS, Site, docker, until

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import carried
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import scan

pytestmark = MARKS
image, site, one_site = snapshot_fixture.image, snapshot_fixture.site, snapshot_fixture.one_site


def stored_parts(site: Site) -> list[dict[str, t.Any]]:
    return json.loads((site.manifests / "one.manifest.json").read_text())["parts"]


def test_beside_the_live_data_nobody_is_stopped_and_nothing_replaced(site: Site) -> None:
    site.call("snapshot", set_id="one")
    target = site.root / "scratch"
    would = site.call("restore", check_mode=True, set_id="one", target=str(target))
    assert would["changed"] and would["containers"] == [] and not target.exists()
    result = site.call("restore", set_id="one", target=str(target))
    assert result["containers"] == [] and result["replaced_set_id"] == "" and site.state() == "running"
    places = [*(target / "volumes" / name for name in site.volumes), target / "paths" / str(site.config).lstrip("/")]
    assert [scan(str(place)).digest for place in places] == [part["digest"] for part in stored_parts(site)]
    assert [one["target"] for one in result["restored"]] == [str(place) for place in places]
    again = site.call("restore", set_id="one", target=str(target))
    assert not again["changed"]
    (places[0] / "plain").write_bytes(b"other")
    with pytest.raises(DeliveryError, match="something is there already"):
        site.call("restore", set_id="one", target=str(target))
    assert site.sets() == {"one": True} and site.leftovers() == []


def test_for_another_project_its_own_volumes_are_made(one_site: Site) -> None:
    site = one_site
    before = site.quiet()
    site.call("snapshot", set_id="one")
    made = [f"{site.name}drill_{name}" for name in site.volumes]
    with pytest.raises(DeliveryError, match="would replace what it was taken from"):
        site.call("restore", set_id="one", project=f"{site.name}drill")
    try:
        result = site.call("restore", set_id="one", project=f"{site.name}drill", target=str(site.root / "scratch"))
        assert [one["name"] for one in result["restored"]][:2] == made
        places = [docker("volume", "inspect", "--format", "{{.Mountpoint}}", name) for name in made]
        assert [scan(place).digest for place in places] == [part["digest"] for part in stored_parts(site)[:2]]
        assert site.trees() == before
    finally:
        docker("volume", "rm", "-f", *made)


def test_one_volume_alone_leaves_the_others(one_site: Site) -> None:
    one_site.quiet()
    one_site.call("snapshot", set_id="one")
    one_site.damage()
    (one_site.data(1) / "later").touch()
    result = one_site.call("restore", set_id="one", volumes=[one_site.volumes[0]])
    assert [one["name"] for one in result["restored"]] == [one_site.volumes[0]]
    assert scan(str(one_site.data(0))).digest == stored_parts(one_site)[0]["digest"]
    assert one_site.config.read_text() == "SECRET=two\n" and (one_site.data(1) / "later").exists()


def checking(site: Site, image: str, script: str) -> list[dict[str, t.Any]]:
    command = ["/bin/busybox", "sh", "-c", script]
    return [{"name": site.volumes[0], "image": image, "mount": "/data", "command": command, "env": {"WORD": "in"}, "timeout": 60}]


def test_a_check_decides_and_what_it_writes_is_thrown_away(one_site: Site, image: str) -> None:
    site = one_site
    site.call("snapshot", set_id="one")
    site.damage()
    script = 'export PATH=/bin; [ "$(busybox cat /data/dir/${WORD}ner)" = "$1inner" ] && echo x > /data/plain && busybox rm -r /data/dir'
    with pytest.raises(DeliveryError, match="it ended with 7: broken indeed"):
        site.call("restore", set_id="one", checks=checking(site, image, "echo broken indeed; exit 7"))
    assert (site.data(0) / "plain").read_bytes() == b"damaged" and site.state() == "running" and site.leftovers() == []
    with pytest.raises(DeliveryError, match="not among what is restored"):
        site.call("restore", set_id="one", checks=[{**checking(site, image, "exit 0")[0], "name": "other"}])
    result = site.call("restore", set_id="one", checks=checking(site, image, script), containers="leave_stopped", keep_current=False)
    assert result["checked"] == [site.volumes[0]]
    assert scan(str(site.data(0))).digest == stored_parts(site)[0]["digest"] and site.leftovers() == []


def test_a_restore_killed_in_its_check_leaves_neither_container_nor_mount(one_site: Site, image: str) -> None:
    site = one_site
    site.call("snapshot", set_id="one")
    site.damage()
    process = site.start("restore", set_id="one", checks=checking(site, image, "busybox sleep 1000"))
    checker = until(
        lambda: docker("ps", "--quiet", "--filter", "name=selfhost-delivery-check-", "--filter", f"ancestor={image}"), "the check"
    )
    process.kill()
    assert process.wait() == -signal.SIGKILL
    until(lambda: site.leftovers() == [], "nothing left by the guard")
    assert subprocess.run(["docker", "inspect", checker], capture_output=True, check=False).returncode == 1
    assert f"{site.volumes[0]}/" not in Path("/proc/mounts").read_text() and site.state() == "running"


def test_a_set_can_be_restored_to_one_side_before_it_counts(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    site.call("snapshot", set_id="one", verify="restore")
    assert site.leftovers() == []
    put_together = carried.put_together

    def spoiled(tree: str, *arguments: t.Any) -> t.Any:
        for path in Path(tree).glob("plain"):
            path.write_bytes(b"spoiled")
        return put_together(tree, *arguments)

    monkeypatch.setattr(carried, "put_together", spoiled)
    with pytest.raises(DeliveryError, match="it is not what was stored"):
        site.call("snapshot", set_id="two", verify="restore")
    assert site.sets() == {"one": True} and site.leftovers() == [] and site.state() == "running"


def test_a_manifest_changed_by_hand_or_of_another_app_is_refused(one_site: Site) -> None:
    one_site.call("snapshot", set_id="one")
    one_site.damage()
    with pytest.raises(DeliveryError, match=f"it is of another app, {one_site.name}"):
        one_site.call("restore", set_id="one", app="other")
    path = one_site.manifests / "one.manifest.json"
    manifest = json.loads(path.read_text())
    manifest["parts"][1]["name"], manifest["parts"][1]["source"] = one_site.volumes[0], manifest["parts"][1]["source"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(DeliveryError, match="not what was stored with it"):
        one_site.call("restore", set_id="one", volumes=[one_site.volumes[0]])
    assert (one_site.data(0) / "plain").read_bytes() == b"damaged" and one_site.state() == "running" and one_site.leftovers() == []
    path.unlink()
    assert one_site.call("restore", set_id="one", keep_current=False)["changed"]


def test_the_newest_is_told_without_the_clock(one_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    one_site.call("snapshot", set_id="first")
    path = one_site.manifests / "first.manifest.json"
    # As if it had been taken while the clock was a year ahead.
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "created": manifest["created"].replace("2026", "2036")}))
    one_site.call("snapshot", set_id="second")
    assert one_site.call("restore", check_mode=True, set_id="latest")["set_id"] == "second"


def test_two_runs_at_once_take_turns(site: Site) -> None:
    runs = [site.start("snapshot", set_id=name) for name in ("one", "two")]
    answers = [json.loads(run.communicate()[0]) for run in runs]
    assert [answer.get("changed") for answer in answers] == [True, True], answers
    assert site.sets() == {"one": True, "two": True} and site.state() == "running" and site.leftovers() == []


def test_holes_stay_holes_with_kopia(site: Site) -> None:
    def sparse(path: Path) -> Path:
        with path.open("wb") as handle:
            handle.write(b"begin")
            handle.seek(200 << 20)
            handle.write(b"end")
        return path

    quiet = sparse(site.data(1) / "quiet")
    os.utime(quiet, ns=(10**18, 10**18))
    site.call("snapshot", set_id="one")
    parts = stored_parts(site)
    site.damage()
    quiet.unlink()
    site.call("restore", set_id="one", keep_current=False, containers="leave_stopped")
    assert scan(str(site.data(1))).digest == parts[1]["digest"]
    # restic 0.14 fills them.
    assert site.kind == "restic" or quiet.stat().st_blocks * 512 < 8 << 20
