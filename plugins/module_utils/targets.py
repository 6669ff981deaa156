# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a rollback goes back to: a release, and a snapshot set when data goes back too."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils import releases
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json


@dataclass(frozen=True)
class Target:
    """``release``: its ``release.json``; ``snapshot``: id of the set whose data goes back, empty for images alone."""

    release: dict[str, t.Any]
    snapshot: str
    why: str


def manifest_path(deploy_dir: str, set_id: str) -> str:
    return os.path.join(deploy_dir, "snapshots", f"{set_id}.manifest.json")


def replaced_set(deploy_dir: str, entries: t.Iterable[t.Mapping[str, t.Any]]) -> str:
    """The set that kept what the restore of a journal replaced, or ''.

    A restore keeps that set before it replaces anything, so it is there also when the journal's ``end`` is not.
    """
    restoring = [entry for entry in entries if entry["step"] == "restoring"]
    if not restoring:
        return ""
    # The first one counts: a second is the undo giving this very set back.
    wanted = str(restoring[0]["data"].get("set_id", ""))
    for entry in restoring:
        if entry["event"] == "end" and entry["data"].get("set_id", wanted) == wanted:
            return str(entry["data"].get("replaced") or "")
    try:
        names = os.listdir(os.path.join(deploy_dir, "snapshots"))
    except FileNotFoundError:
        return ""
    begun = restoring[0]["time"]
    kept = []
    for name in sorted(names):
        if name.endswith(".manifest.json"):
            manifest = read_json(os.path.join(deploy_dir, "snapshots", name)) or {}
            if manifest.get("replaces") == wanted and str(manifest.get("created", "")) >= begun[:19]:
                kept.append((str(manifest["created"]), name[: -len(".manifest.json")]))
    # The first one of this release holds the data as it was before anything of it was replaced.
    return min(kept)[1] if kept else ""


def find_target(deploy_dir: str, tag: str = "", snapshot: str = "", data: bool = False, data_alone: bool = False) -> Target:
    """Choose where to go back to.

    Without ``tag`` and ``snapshot``: the committed release before the current one, with ``data`` together with the set
    that was taken when it was left. ``tag``: the newest committed release of it. ``snapshot``: the release that served when
    that set was taken, and its data. ``data_alone``: today's images, with the data of ``snapshot``, which may be ``latest``.
    """
    if data_alone:
        return _data_alone(deploy_dir, snapshot)
    doing = "Looking for what to go back to"
    if snapshot:
        return _by_snapshot(deploy_dir, snapshot, tag)
    committed = [one for one in releases.list_releases(deploy_dir) if one["state"]["status"] == "committed"]
    if tag:
        found = next((one for one in committed if one["tag"] == tag), None)
        if found is None:
            known = ", ".join(dict.fromkeys(one["tag"] for one in committed)) or "none"
            raise DeliveryError(doing, f"{tag} was never committed here; committed are {known}", "Choose one of them, or promote the tag.")
        if data:
            remedy = "Give the set: -e snapshot=<set id>; -e list=true shows them."
            raise DeliveryError(doing, "a tag alone does not say which data", remedy)
        return Target(_plain(found), "", f"the newest committed release of {tag}")
    unfinished = releases.open_release(deploy_dir)
    if unfinished is not None and unfinished["state"]["commit_begun"] and unfinished["id"] != releases.current_id(deploy_dir):
        # Its commit is finished first, so what `current` says now is the release before it.
        found, left = releases.current_release(deploy_dir), {**unfinished, "snapshot": unfinished["state"]["snapshot"]}
    else:
        found, left = releases.previous_committed(deploy_dir), releases.current_release(deploy_dir) or {}
    if found is None:
        raise DeliveryError(doing, "there is no committed release before the current one", "-e list=true shows what there is.")
    if not data:
        return Target(_plain(found), "", "the committed release before the current one")
    if not left.get("snapshot") or left.get("kind") != "promote":
        raise DeliveryError(
            doing, f"release {left.get('id')} took no snapshot set of the data before it", "Give one: -e snapshot=<set id>."
        )
    return _by_snapshot(deploy_dir, str(left["snapshot"]), "")


def _data_alone(deploy_dir: str, set_id: str) -> Target:
    doing = f"Restoring snapshot set {set_id or '(none given)'}"
    current = releases.current_release(deploy_dir)
    if current is None:
        raise DeliveryError(doing, "nothing was promoted here yet, so no containers could use the data", "Promote a tag first.")
    if set_id == "latest":
        folder = os.path.join(deploy_dir, "snapshots")
        found = [read_json(os.path.join(folder, name)) or {} for name in os.listdir(folder) if name.endswith(".manifest.json")]
        # What a restore replaced is kept to be asked for by name: going back and forth between two sets is not "latest".
        usable = [one for one in found if not str(one.get("set_id", "")).startswith("replaced-")]
        set_id = str(max(usable, key=lambda one: str(one.get("created", "")), default={}).get("set_id", ""))
    if not set_id or os.sep in set_id or not os.path.exists(manifest_path(deploy_dir, set_id)):
        seen = f"there is no manifest of it in {deploy_dir}/snapshots"
        raise DeliveryError(doing, seen, "snapshot.yml -e list=true shows the sets there are.")
    return Target(current, set_id, "the images that run now, with the data of the set")


def _by_snapshot(deploy_dir: str, set_id: str, tag: str) -> Target:
    doing = f"Going back to snapshot set {set_id}"
    if os.sep in set_id or set_id.startswith("."):
        raise DeliveryError(doing, "that is no id of a set", "-e list=true shows them.")
    manifest = read_json(manifest_path(deploy_dir, set_id))
    if not isinstance(manifest, dict):
        raise DeliveryError(doing, f"there is no manifest of it in {deploy_dir}/snapshots", "-e list=true shows the sets there are.")
    served = str((manifest.get("metadata") or {}).get("previous") or "")
    if not served:
        raise DeliveryError(doing, "no release served when it was taken", "restore.yml -e snapshot=<set id> gives its data alone back.")
    release = releases.read_release(deploy_dir, served)
    if tag and release.get("tag") != tag:
        raise DeliveryError(doing, f"{release.get('tag')} served when it was taken, not {tag}", "Leave out tag, or choose another set.")
    return Target(release, set_id, "the release that served when the set was taken, with its data")


def _plain(listed: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    return {key: value for key, value in listed.items() if key != "state"}
