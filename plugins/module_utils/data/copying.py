# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A set, or parts of it, into a new folder: nothing that is in use is looked at, stopped or replaced."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import restore as restoring
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import sets
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import SnapshotEngine

Part = t.Mapping[str, t.Any]


@dataclass(frozen=True)
class Found:
    """A complete set of a repository."""

    catalog: sets.Catalog
    info: sets.SetInfo

    @property
    def parts(self) -> list[Part]:
        return list(self.info.manifest["parts"])

    @property
    def bytes(self) -> int:
        return sum(part["bytes"] for part in self.parts)


def find(engine: SnapshotEngine, manifest_dir: str, set_id: str, app: str) -> Found:
    """The set of that id, or the ``latest`` of ``app``."""
    repository = engine.connect()
    catalog = sets.Catalog(engine, repository.repository_id, manifest_dir)
    return Found(catalog, catalog.complete(set_id, app))


def place(into: str, part: Part) -> str:
    """Where a part lies in a copy: ``volumes/<name>``, or ``paths`` and then its whole path."""
    return os.path.join(into, "volumes" if part["kind"] == "volume" else "paths", part["name"].lstrip("/"))


def check_room(into: str, needed: int) -> None:
    """Refuse a place without room for so many bytes."""
    while not os.path.isdir(into):
        into = os.path.dirname(into)
    space = os.statvfs(into)
    free = space.f_bavail * space.f_frsize
    if needed + needed // 20 + (8 << 20) > free:
        seen = f"{sets.megabytes(free)} are free there, {sets.megabytes(needed)} are needed"
        raise DeliveryError(f"copy a set into {into}", seen, "Make room.", "capacity")


def copy(found: Found, docker: Engine, into: str) -> list[str]:
    """Write all parts below the new folder ``into`` and hold each against the manifest; warnings.

    Its transaction lies in ``into``, not with the manifests: a release that begins meanwhile need not wait for it.
    """
    os.makedirs(into, mode=0o700)
    own = os.path.join(into, ".transaction")
    request = restoring.Request(set_id=found.info.set_id, manifest_dir=own, keep_current=False, target=into)
    return list(restoring.restore(found.catalog.engine, docker, request)["warnings"])
