# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A set, or parts of it, into a new folder: nothing that is in use is looked at, stopped or replaced."""

from __future__ import annotations

import errno
import os
import re
import shutil
import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import carried, sets
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import SnapshotEngine
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import sync_file_systems

Part = t.Mapping[str, t.Any]


@dataclass(frozen=True)
class Found:
    """A complete set of a repository. ``parts``: those that were asked for."""

    catalog: sets.Catalog
    info: sets.SetInfo
    parts: list[Part]

    @property
    def bytes(self) -> int:
        return sum(part["bytes"] for part in self.parts)


def find(
    engine: SnapshotEngine, manifest_dir: str, set_id: str, app: str, volumes: t.Sequence[str] = (), paths: t.Sequence[str] = ()
) -> Found:
    """The set of that id, or the ``latest`` of ``app``. Without volumes and paths all of its parts."""
    repository = engine.connect()
    catalog = sets.Catalog(engine, repository.repository_id, manifest_dir)
    info = catalog.complete(set_id, app)
    wanted = {("volume", name) for name in volumes} | {("path", os.path.normpath(path)) for path in paths}
    have = {(part["kind"], part["name"]) for part in info.manifest["parts"]}
    if wanted - have:
        raise DeliveryError(
            f"copy the set {info.set_id}",
            f"it does not hold {', '.join(sorted(name for _kind, name in wanted - have))}",
            f"It holds {', '.join(sorted(name for _kind, name in have))}.",
        )
    return Found(catalog, info, [part for part in info.manifest["parts"] if not wanted or (part["kind"], part["name"]) in wanted])


def place(into: str, part: Part) -> str:
    """Where a part lies in a copy: ``volumes/<name>``, or ``paths`` and then its whole path."""
    return os.path.join(into, "volumes" if part["kind"] == "volume" else "paths", part["name"].lstrip("/"))


def check_folder(into: str, needed: int) -> None:
    """``into`` must be a new or empty folder with room for so many bytes."""
    tried = f"copy a set into {into}"
    if not re.match(r"/[^/]", into) or os.path.normpath(into) != into:
        raise DeliveryError(tried, "it is no absolute path", "Give a full path, such as /srv/restored.")
    if os.path.lexists(into) and (os.path.islink(into) or not os.path.isdir(into) or os.listdir(into)):
        raise DeliveryError(tried, "something is there already", "Give a new or empty folder.")
    parent = into
    while not os.path.isdir(parent):
        parent = os.path.dirname(parent)
    space = os.statvfs(parent)
    free = space.f_bavail * space.f_frsize
    if needed + needed // 20 + (8 << 20) > free:
        raise DeliveryError(tried, f"{sets.megabytes(free)} are free there, {sets.megabytes(needed)} are needed", "Make room.", "capacity")


def copy(found: Found, into: str) -> list[str]:
    """Write the parts below ``into`` and hold each against the manifest; warnings. When it fails, the caller removes what was written.

    The folder is root's own, since what is in it is as secret as the app's data.
    """
    engine, warnings = found.catalog.engine, []
    for folder in (into, os.path.join(into, "volumes"), os.path.join(into, "paths")):
        os.makedirs(folder, mode=0o700, exist_ok=True)
    os.chmod(into, 0o700)
    manifests = os.path.join(into, ".set")
    os.mkdir(manifests, 0o700)
    try:
        brought = found.catalog.bring(found.info, manifests)
        stored = {(part["kind"], part["name"]): one for part, one in zip(found.info.manifest["parts"], found.info.parts)}
        for part in found.parts:
            target = place(into, part)
            os.makedirs(os.path.dirname(target), mode=0o700, exist_ok=True)
            engine.restore(stored[part["kind"], part["name"]], target)
            if not carried.put_together(target, part, found.info.manifest["parts"].index(part), brought)[1]:
                warnings.append(f"{part['name']} changed while it was taken; its content could not be compared")
        sync_file_systems([into])
    except OSError as exc:
        full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DeliveryError(
            f"copy the set {found.info.set_id} into {into}", os.strerror(exc.errno or 0), "", "capacity" if full else "snapshot"
        ) from exc
    finally:
        shutil.rmtree(manifests, ignore_errors=True)
    return warnings
