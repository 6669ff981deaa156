# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a host remembers of the last pass over a source, so that the next one need not read again what has not moved since.

It is only as good as the repository: it counts where the newest stored pass of this source is still the one it was made with.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import os
import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.files import write_atomically
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import Stored
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import Entry, Scan


@dataclass(frozen=True)
class Pass:
    """A scan, and when the engine was done with the pass that followed it (``time.time_ns``)."""

    scan: Scan
    end_ns: int


def load(directory: str, source: str, stored: t.Sequence[Stored]) -> Pass | None:
    """The last pass over ``source``; ``stored``: what the repository holds, oldest first."""
    newest = [one for one in stored if one.source == source][-1:]
    try:
        with gzip.open(_place(directory, source), "rt", encoding="ascii") as handle:
            raw = json.load(handle)
        if not newest or newest[0].broken or newest[0].root != raw["root"] or source != raw["source"]:
            return None
        found = Scan(source, int(raw["started_ns"]))
        for path, leader, xattrs, *rest in raw["entries"]:
            name = base64.b64decode(path)
            kind, mode, uid, gid, size, content, mtime_ns, ctime_ns, inode = rest
            pairs = tuple((key, value) for key, value in xattrs)
            found.entries[name] = Entry(
                name, kind, mode, uid, gid, size, content, pairs, base64.b64decode(leader), mtime_ns, ctime_ns, inode
            )
        return Pass(found, int(raw["end_ns"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # then everything is read


def save(directory: str, source: str, root: str, last: Pass) -> None:
    """Remember a pass that was stored as ``root``."""
    entries = [
        [
            *(base64.b64encode(one.path).decode(), base64.b64encode(one.leader).decode(), one.xattrs),
            *(one.kind, one.mode, one.uid, one.gid, one.size, one.content, one.mtime_ns, one.ctime_ns, one.inode),
        ]
        for one in last.scan.entries.values()
    ]
    raw = {"source": source, "root": root, "started_ns": last.scan.started_ns, "end_ns": last.end_ns, "entries": entries}
    os.makedirs(os.path.dirname(_place(directory, source)), mode=0o700, exist_ok=True)
    write_atomically(_place(directory, source), gzip.compress(json.dumps(raw).encode("ascii"), 1))


def _place(directory: str, source: str) -> str:
    return os.path.join(directory, "known", hashlib.sha256(os.fsencode(source)).hexdigest()[:32] + ".json.gz")
