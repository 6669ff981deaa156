# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils import releases
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.targets import find_target, replaced_set


def commit(folder: Path, number: int, tag: str, snapshot: str = "", kind: str = "promote") -> str:
    """A committed release, made by the functions that make real ones."""
    release_id = f"2026112{number}-090000-{tag}"
    record = {"id": release_id, "tag": tag, "kind": kind, "started": f"2026-11-2{number}T09:00:00.000Z", "plan": {"images": {"app": f"r/app@sha256:{number}"}}}
    releases.create_release(str(folder), record, "run")
    if snapshot:
        journal = releases.Journal(releases.journal_path(str(folder), release_id), "run")
        journal.begin("snapshotted")
        journal.end("snapshotted", set_id=snapshot)
    releases.finish_release(str(folder), release_id, "run", "committed")
    return release_id


def take(folder: Path, set_id: str, previous: str, created: str = "2026-11-22T09:00:00.000Z", replaces: str = "") -> None:
    (folder / "snapshots").mkdir(exist_ok=True)
    manifest = {"set_id": set_id, "created": created, "metadata": {"previous": previous}, "replaces": replaces}
    (folder / "snapshots" / f"{set_id}.manifest.json").write_text(json.dumps(manifest))


@pytest.fixture()
def folder(tmp_path: Path) -> Path:
    first = commit(tmp_path, 1, "sha-one")
    take(tmp_path, "set-two", first)
    commit(tmp_path, 2, "sha-two", snapshot="set-two")
    return tmp_path


def test_without_argument_the_release_before(folder: Path) -> None:
    found = find_target(str(folder))
    assert (found.release["tag"], found.snapshot) == ("sha-one", "")


def test_with_data_the_set_that_was_taken_when_it_was_left(folder: Path) -> None:
    found = find_target(str(folder), data=True)
    assert (found.release["tag"], found.snapshot) == ("sha-one", "set-two")


def test_a_set_names_the_release_that_served_when_it_was_taken(folder: Path) -> None:
    assert find_target(str(folder), snapshot="set-two").release["tag"] == "sha-one"


def test_data_alone_keeps_the_images_and_takes_the_newest_set_that_no_restore_left(folder: Path) -> None:
    take(folder, "replaced-set-two-x", "", created="2026-11-25T09:00:00.000Z")
    found = find_target(str(folder), snapshot="latest", data_alone=True)
    assert (found.release["tag"], found.snapshot) == ("sha-two", "set-two")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tag": "sha-nine"}, "sha-nine was never committed here; committed are sha-two, sha-one"),
        ({"tag": "sha-one", "data": True}, "a tag alone does not say which data"),
        ({"snapshot": "set-nine"}, "there is no manifest of it"),
        ({"snapshot": "../set-two"}, "that is no id of a set"),
        ({"snapshot": "set-two", "tag": "sha-two"}, "sha-one served when it was taken, not sha-two"),
        ({"snapshot": "set-nine", "data_alone": True}, "there is no manifest of it"),
        ({"data_alone": True}, "there is no manifest of it"),
    ],
)
def test_refusals(folder: Path, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(DeliveryError, match=message):
        find_target(str(folder), **arguments)  # type: ignore[arg-type]


def test_nothing_to_go_back_to(tmp_path: Path) -> None:
    commit(tmp_path, 1, "sha-one")
    with pytest.raises(DeliveryError, match="no committed release before the current one"):
        find_target(str(tmp_path))


def entry(event: str, **data: object) -> dict[str, object]:
    return {"step": "restoring", "event": event, "time": "2026-11-22T09:00:00.000Z", "data": data}


def test_an_undo_that_gives_the_kept_set_back_does_not_hide_it(folder: Path) -> None:
    undone = [entry("begin", set_id="set-two"), entry("end", set_id="set-two", replaced="kept"), entry("begin", set_id="kept")]
    assert replaced_set(str(folder), undone) == "kept"
    assert replaced_set(str(folder), [*undone, entry("end", set_id="kept", replaced="second")]) == "kept"


def test_a_commit_that_has_begun_counts_as_what_runs(folder: Path) -> None:
    release_id = "20261123-090000-sha-three"
    record = {"id": release_id, "tag": "sha-three", "kind": "promote", "started": "2026-11-23T09:00:00.000Z", "plan": {"images": {}}}
    releases.create_release(str(folder), record, "run")
    releases.Journal(releases.journal_path(str(folder), release_id), "run").begin("committed")
    assert find_target(str(folder)).release["tag"] == "sha-two"


def test_what_a_restore_replaced_is_known_from_its_end_or_from_the_set_it_kept(folder: Path) -> None:
    assert replaced_set(str(folder), []) == ""
    assert replaced_set(str(folder), [entry("begin", set_id="set-two"), entry("end", replaced="kept")]) == "kept"
    assert replaced_set(str(folder), [entry("begin", set_id="set-two")]) == ""
    take(folder, "replaced-set-two-1", "", created="2026-11-21T09:00:00.000Z", replaces="set-two")  # of an earlier restore of the same set
    take(folder, "replaced-set-two-2", "", created="2026-11-22T09:00:05.000Z", replaces="set-two")
    take(folder, "replaced-set-two-3", "", created="2026-11-22T09:01:00.000Z", replaces="set-two")
    assert replaced_set(str(folder), [entry("begin", set_id="set-two")]) == "replaced-set-two-2"
