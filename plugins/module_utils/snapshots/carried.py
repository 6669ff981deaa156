# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a set carries beside the stored trees, in the directory of its manifest, and how a part is put together from both.

For the part with the number N: ``sidecar-N.json`` (what the engine loses), ``delta-N.json`` with ``delta-N/`` (what goes over the stored
tree), ``names-N.gz``: all names of the part (``names: all``), or those that did not move while it was stored (``names: settled``).
"""

from __future__ import annotations

import hashlib
import json
import os
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import write_json
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import delta as deltas
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.delta import Delta
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import Scan, apply_sidecar, scan, sidecar


def blobs_folder(folder: str, number: int) -> str:
    """Where the blobs of a part's delta belong."""
    return os.path.join(folder, f"delta-{number}")


def write(
    folder: str, number: int, tree: Scan, delta: Delta | None, settled: t.Sequence[bytes] | None, keeps_everything: bool
) -> dict[str, t.Any]:
    """Write what part ``number`` needs; the keys it adds to the part in the manifest.

    ``tree``: the part at its moment; ``settled``: the names of it that did not move meanwhile, ``None`` where none could.
    """
    added: dict[str, t.Any] = {}
    laid_over = {entry.path for entry in delta.entries} if delta is not None else set()
    if not keeps_everything:
        wanted = tree.entries if settled is None else {path: tree.entries[path] for path in settled}
        records = sidecar(Scan(tree.root, tree.started_ns, dict(wanted)), laid_over if settled is None else ())
        added["sidecar"] = f"sidecar-{number}.json"
        write_json(os.path.join(folder, added["sidecar"]), records)
        added["sidecar_sha256"] = _sha256(os.path.join(folder, added["sidecar"]))
    if delta is not None:
        added["delta"] = f"delta-{number}.json"
        write_json(os.path.join(folder, added["delta"]), delta.as_json())
        added["delta_sha256"] = _sha256(os.path.join(folder, added["delta"]))
    names = settled if settled is not None else delta.names if delta is not None else None
    if names is not None:
        with open(os.path.join(folder, f"names-{number}.gz"), "wb") as handle:
            handle.write(deltas.pack_names(names))
        added["names"] = "all" if settled is None else "settled"
        added["names_sha256"] = _sha256(os.path.join(folder, f"names-{number}.gz"))
    if settled is not None:
        added["settled_digest"] = tree.digest_of(settled)
    return added


def put_together(tree: str, part: t.Mapping[str, t.Any], number: int, folder: str) -> tuple[Scan, bool]:
    """Make of a fresh ``tree``, as the engine gave it back, what the set holds: the scan of it, and whether all of it is compared.

    ``folder``: the set's manifest directory. Raises ``DeliveryError(snapshot)`` where it is not what was stored.
    """
    records: list[dict[str, t.Any]] = []
    if part.get("sidecar"):
        records = json.loads(_read(folder, part, part["sidecar"], part["sidecar_sha256"]))
    names: list[bytes] | None = None
    if part.get("names"):
        names = deltas.unpack_names(_read(folder, part, f"names-{number}.gz", part["names_sha256"]))
    delta: Delta | None = None
    blobs = blobs_folder(folder, number)
    if part.get("delta"):
        raw = json.loads(_read(folder, part, part["delta"], part["delta_sha256"]))
        delta = Delta.from_json(raw, names if part["names"] == "all" else None)
        for entry in delta.entries:
            if entry.path in delta.blobs and entry.content != deltas.checksum(os.path.join(blobs, delta.blobs[entry.path])):
                raise _damaged(part, delta.blobs[entry.path])
    if part.get("names") == "settled":
        apply_sidecar(tree, records)
        seen = scan(tree)
        if any(path not in seen.entries for path in names or ()) or seen.digest_of(names or ()) != part["settled_digest"]:
            raise _other(part, seen)
        if delta is not None:
            deltas.apply(tree, delta, blobs, seen.entries)
        return seen, False
    if delta is not None:
        deltas.apply(tree, delta, blobs, scan(tree, contents=False).entries)
    apply_sidecar(tree, records)
    seen = scan(tree)
    if part["digest"] and seen.digest != part["digest"]:
        raise _other(part, seen)
    if not part["digest"] and part["files"] and not seen.files:
        raise _other(part, seen)
    return seen, bool(part["digest"])


def _read(folder: str, part: t.Mapping[str, t.Any], name: str, wanted: str) -> bytes:
    path = os.path.join(folder, os.path.basename(name))
    try:
        with open(path, "rb") as handle:
            content = handle.read()
    except FileNotFoundError:
        content = b""
    if hashlib.sha256(content).hexdigest() != wanted:
        raise _damaged(part, name)
    return content


def _damaged(part: t.Mapping[str, t.Any], name: str) -> DeliveryError:
    return DeliveryError(
        f"restore {part['name']}",
        f"what goes with it in the repository is damaged ({name})",
        "Nothing was replaced. Use another set.",
        "snapshot",
    )


def _other(part: t.Mapping[str, t.Any], seen: Scan) -> DeliveryError:
    return DeliveryError(
        f"check the restored copy of {part['name']}",
        f"it is not what was stored ({seen.files} files and {seen.bytes} bytes; stored were {part['files']} and {part['bytes']})",
        "Nothing was replaced. Use another set.",
        "snapshot",
    )


def _sha256(path: str) -> str:
    with open(path, "rb") as handle:
        return hashlib.sha256(handle.read()).hexdigest()
