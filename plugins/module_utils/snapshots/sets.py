# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Snapshot sets: all volumes and host paths of an app at one moment, under one id.

A set is complete when its manifest exists, and only then. The manifest goes into the repository first, so that another
host can find the set, and to ``<manifest_dir>/<set id>.manifest.json`` last.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import glob
import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
import time
import typing as t
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json, sync_directory, write_json
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import freeze
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import SnapshotEngine, Stored
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import (
    Scan,
    ctime_is_proof,
    needs_full_read,
    printable,
    scan,
    sidecar,
    sync_file_systems,
)

SCHEMA = 1
_SET_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,159}\Z")
_SUFFIX = ".manifest.json"
#: Room that must stay free whatever is written.
_RESERVE = 32 << 20
#: Bytes from which a pass ahead of the window is worth its calls; less is read within a fraction of a second.
WARM_FROM = 32 << 20


@dataclass(frozen=True)
class Part:
    """One volume (``name`` is Docker's) or one host path (``name`` is the path); ``source`` is where its bytes lie."""

    kind: str
    name: str
    source: str
    volume: t.Mapping[str, t.Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """What to take. ``hooks`` as in ``freeze.Window``; times in seconds; ``keep`` 0 keeps every set.

    ``replaces``: id of the set for which this one keeps the state that a restore replaces.
    """

    set_id: str
    manifest_dir: str
    volumes: t.Sequence[str] = ()
    paths: t.Sequence[str] = ()
    metadata: t.Mapping[str, t.Any] = field(default_factory=dict)
    consistency: str = "pause"
    hooks: t.Sequence[t.Mapping[str, t.Any]] = ()
    verify: bool = True
    freeze_timeout: float = 600.0
    stop_timeout: float = 30.0
    keep: int = 0
    replaces: str = ""


@dataclass
class SetInfo:
    """A set as found. ``why`` says what makes it incomplete; ``manifest`` is empty when there is none."""

    set_id: str
    complete: bool
    why: str
    manifest: dict[str, t.Any]
    stored: list[Stored]
    parts: list[Stored] = field(default_factory=list)

    @property
    def created(self) -> str:
        return str(self.manifest.get("created") or (self.stored[0].created if self.stored else ""))

    def as_result(self) -> dict[str, t.Any]:
        """Shape of one item of ``sets`` in the info modules."""
        parts = self.manifest.get("parts", [])
        return {
            "set_id": self.set_id,
            "complete": self.complete,
            "why_incomplete": self.why,
            "created": self.created,
            "engine": self.manifest.get("engine", ""),
            "repository_id": self.manifest.get("repository_id", ""),
            "consistency": self.manifest.get("consistency", ""),
            "replaces": self.manifest.get("replaces", ""),
            "metadata": self.manifest.get("metadata", {}),
            "bytes": sum(part["bytes"] for part in parts),
            "files": sum(part["files"] for part in parts),
            "parts": [{key: part[key] for key in ("kind", "name", "files", "bytes", "digest", "stable")} for part in parts],
        }


def check_set_id(set_id: str) -> None:
    """Refuse what could not be a file name or a tag."""
    if not _SET_ID.match(set_id) or set_id == "latest":
        raise DeliveryError(
            f"use the set id {set_id!r}",
            "it is not a name",
            "Use letters, digits, dot, dash and underscore, at most 160, and not the word latest.",
            "config",
        )


def manifest_path(manifest_dir: str, set_id: str) -> str:
    return os.path.join(manifest_dir, set_id + _SUFFIX)


@contextlib.contextmanager
def locked(manifest_dir: str, timeout: float = 60.0) -> t.Iterator[None]:
    """One snapshot or restore at a time per manifest directory, which is made (0700) when missing."""
    os.makedirs(manifest_dir, mode=0o700, exist_ok=True)
    descriptor = os.open(os.path.join(manifest_dir, ".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    deadline = time.monotonic() + timeout
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise DeliveryError(
                        f"work on the snapshot sets in {manifest_dir}",
                        "another snapshot or restore is running there",
                        "Wait for its end and run again.",
                        "lock",
                    ) from None
                time.sleep(0.1)
        yield
    finally:
        os.close(descriptor)


def mend_freezes(docker: Engine, manifest_dir: str) -> list[str]:
    """Undo freezes whose run and guard both died (the host went down); needs the lock. Names of the containers."""
    names: list[str] = []
    for record in sorted(glob.glob(os.path.join(glob.escape(manifest_dir), ".freeze-*.json"))):
        names += freeze.mend(docker, record)
    return names


def resolve(docker: Engine, volumes: t.Sequence[str], paths: t.Sequence[str]) -> list[Part]:
    """Where the bytes of each volume and path lie. Refuses by name what cannot be snapshotted and swapped from the host."""
    parts = [volume_part(name, docker.volume(name)) for name in volumes]
    for path in paths:
        clean = os.path.normpath(path)
        if not os.path.isabs(clean) or clean == "/":
            raise DeliveryError(f"snapshot the path {path}", "it is not an absolute path below /", "Give a full path.", "config")
        try:
            kind = os.lstat(clean).st_mode
        except OSError as exc:
            raise DeliveryError(f"snapshot the path {path}", os.strerror(exc.errno or 0), "Check the list of paths.", "config") from exc
        if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) or os.path.realpath(clean) != clean:
            raise DeliveryError(
                f"snapshot the path {path}",
                f"it is a link or no plain file (really {os.path.realpath(clean)})",
                "Give the real path.",
                "config",
            )
        parts.append(Part("path", clean, clean))
    if not parts:
        raise DeliveryError("take a snapshot set", "neither volumes nor paths are given", "Name at least one.", "config")
    for one in parts:
        for other in parts:
            if one is not other and (other.source == one.source or other.source.startswith(one.source + "/")):
                raise DeliveryError(
                    "take a snapshot set", f"{other.name} is or lies within {one.name}", "Name each place once, the outer one.", "config"
                )
    return parts


def volume_part(name: str, found: t.Mapping[str, t.Any] | None) -> Part:
    """A volume as the engine describes it. A bind volume lies at its device; other mounts on demand cannot be read at rest."""
    tried = f"use the volume {name}"
    if found is None:
        raise DeliveryError(tried, "the Docker engine does not have it", "Check the list of volumes.", "config")
    options = found.get("Options") or {}
    description = {"driver": found.get("Driver", ""), "options": options, "labels": found.get("Labels") or {}}
    if found.get("Driver") != "local":
        raise DeliveryError(tried, f"its driver is {found.get('Driver')}", "Only volumes of the driver local lie on this host.", "config")
    source = str(found.get("Mountpoint") or "")
    if options.get("device") or options.get("type"):
        if "bind" not in str(options.get("o", "")).split(","):
            raise DeliveryError(
                tried, f"it is a {options.get('type')} mount made on demand", "Leave it out, or snapshot where its data lies.", "config"
            )
        source = os.path.realpath(str(options.get("device")))
    if not os.path.isdir(source):
        raise DeliveryError(tried, f"its directory {source} cannot be seen from here", "Run as root on the host of the engine.", "config")
    return Part("volume", name, source, description)


class Catalog:
    """All sets that the repository and the manifest directory know of."""

    def __init__(self, engine: SnapshotEngine, repository_id: str, manifest_dir: str, stored: list[Stored] | None = None) -> None:
        """``stored``: what the engine just said that the repository holds."""
        self.engine, self.repository_id, self.manifest_dir = engine, repository_id, manifest_dir
        self.stored = engine.contents() if stored is None else stored
        self._sets: dict[str, SetInfo] = {}

    def ids(self) -> list[str]:
        """Ids of all sets, complete or not."""
        files = glob.glob(os.path.join(glob.escape(self.manifest_dir), "[!.]*" + _SUFFIX))
        return sorted({os.path.basename(path)[: -len(_SUFFIX)] for path in files} | {one.tags["set"] for one in self.stored})

    def sets(self, app: str = "") -> list[SetInfo]:
        """Newest first; ``app`` keeps those whose metadata names it."""
        found = [self.get(set_id) for set_id in self.ids()]
        if app:
            found = [one for one in found if one.manifest.get("metadata", {}).get("app") == app]
        return sorted(found, key=lambda one: (one.created, one.set_id), reverse=True)

    def get(self, set_id: str) -> SetInfo:
        """One set; an unknown id is an incomplete set of which nothing is stored."""
        if set_id not in self._sets:
            self._sets[set_id] = self._look(set_id)
        return self._sets[set_id]

    def complete(self, set_id: str, app: str = "") -> SetInfo:
        """The set to restore, ``latest`` being the newest one that was not itself taken by a restore. Refuses incomplete ones."""
        if set_id == "latest":
            for one in self.sets(app):
                if one.complete and not one.manifest.get("replaces"):
                    return one
            raise DeliveryError("find the latest snapshot set", "there is no complete one", "Take one first.", "snapshot")
        check_set_id(set_id)
        found = self.get(set_id)
        if not found.complete:
            known = [one.set_id for one in self.sets(app) if one.complete][:5]
            raise DeliveryError(
                f"find the snapshot set {set_id}",
                found.why,
                f"Complete sets here: {', '.join(known) or 'none'}.",
                "snapshot",
            )
        return found

    def bring(self, found: SetInfo, into: str) -> str:
        """The set's manifest directory (manifest and sidecars) out of the repository, as ``<into>/manifest``."""
        target = os.path.join(into, "manifest")
        self.engine.restore(_manifest_stored(found.stored)[-1], target)
        return target

    def _look(self, set_id: str) -> SetInfo:
        stored = [one for one in self.stored if one.tags["set"] == set_id]
        found = SetInfo(set_id, False, "", {}, stored)
        manifest = None
        try:
            manifest = read_json(manifest_path(self.manifest_dir, set_id))
        except ValueError:
            found.why = "its manifest on this host cannot be read"
        if manifest is None and _manifest_stored(stored):
            with tempfile.TemporaryDirectory(prefix="selfhost-delivery-") as folder:
                manifest = read_json(os.path.join(self.bring(found, folder), "manifest.json"))
        if manifest is None:
            found.why = found.why or ("it has no manifest: its taking did not end" if stored else "there is no such set")
            return found
        found.manifest = manifest
        found.why = self._flaw(found)
        found.complete = not found.why
        return found

    def _flaw(self, found: SetInfo) -> str:
        manifest = found.manifest
        if manifest.get("schema") != SCHEMA or manifest.get("set_id") != found.set_id:
            return "its manifest is of another kind or set"
        if manifest["engine"] != self.engine.name:
            return f"it was taken with {manifest['engine']}"
        if manifest["repository_id"] != self.repository_id:
            return f"it lies in another repository, with the id {manifest['repository_id']}"
        for part in manifest["parts"]:
            # By content, not by snapshot id: a later pin or tag gives a snapshot another id.
            same = [one for one in found.stored if one.source == part["source"] and one.root == part["root"]]
            if not same:
                return f"the repository does not hold {part['name']} any more"
            if same[-1].broken:
                return f"{part['name']}: {same[-1].broken}"
            found.parts.append(same[-1])
        if not _manifest_stored(found.stored):
            return "its manifest in the repository is gone"
        return ""


def take(engine: SnapshotEngine, docker: Engine, request: Request, check_mode: bool = False) -> dict[str, t.Any]:
    """Take a set, unless a complete one of that id exists. Holds the lock; see ``take_locked`` for the result."""
    check_set_id(request.set_id)
    if check_mode:
        return take_locked(engine, docker, request, check_mode=True)
    with locked(request.manifest_dir):
        mend_freezes(docker, request.manifest_dir)
        return take_locked(engine, docker, request)


def take_locked(engine: SnapshotEngine, docker: Engine, request: Request, check_mode: bool = False) -> dict[str, t.Any]:
    """``{changed, set_id, manifest (path), set (SetInfo.as_result), freeze_seconds, estimate, warnings, forgotten}``."""
    repository = engine.connect()
    catalog = Catalog(engine, repository.repository_id, request.manifest_dir)
    existing = catalog.get(request.set_id)
    parts = resolve(docker, request.volumes, request.paths) if not existing.complete else []
    result: dict[str, t.Any] = {
        "changed": False,
        "set_id": request.set_id,
        "manifest": manifest_path(request.manifest_dir, request.set_id),
        "repository_id": repository.repository_id,
        "freeze_seconds": 0.0,
        "warnings": [],
        "forgotten": [],
    }
    if existing.complete:
        _refuse_other_parts(existing, request)
        if not check_mode and not os.path.exists(result["manifest"]):
            write_json(result["manifest"], existing.manifest)
            result["changed"] = True
        return {**result, "set": existing.as_result(), "estimate": {}}
    if existing.manifest and "another" in existing.why:
        raise DeliveryError(
            f"take the snapshot set {request.set_id}", f"one of that id exists, but {existing.why}", "Use another id.", "config"
        )
    _refuse_repository_inside(engine, parts)
    result["estimate"] = check_room(catalog, parts)
    held = []
    if request.consistency in ("pause", "stop"):
        writers = freeze.users(docker, {p.name for p in parts if p.kind == "volume"}, [p.source for p in parts], writers_only=True)
        held = freeze.plan_hold(writers, request.consistency)
    result["containers"] = [{"name": one["name"], "action": one["action"]} for one in held]
    result["changed"] = True
    if check_mode:
        return result
    # What an earlier, broken run left under this id.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(result["manifest"])
    engine.delete(existing.stored)
    taking = Taking(engine, docker, request, parts, held, repository.repository_id)
    if held:
        taking.warm_up()
    manifest = taking.finish()
    result["freeze_seconds"] = manifest["freeze_seconds"]
    result["warnings"] = manifest["warnings"]
    result["set"] = SetInfo(request.set_id, True, "", manifest, []).as_result()
    if request.keep:
        forgotten, warning = forget(
            engine, request.manifest_dir, repository.repository_id, request.keep, {request.set_id, request.replaces}, taking.there
        )
        result["forgotten"] = forgotten
        result["warnings"] = result["warnings"] + warning
    return result


def forget(
    engine: SnapshotEngine,
    manifest_dir: str,
    repository_id: str,
    keep: int,
    never: t.Collection[str],
    stored: list[Stored] | None = None,
) -> tuple[list[str], list[str]]:
    """Delete all complete sets with a manifest on this host but the newest ``keep`` and ``never``: ids and warnings.

    The manifest goes first: half a deletion leaves an incomplete set, which nobody restores. ``stored``: see ``Catalog``.
    """
    catalog = Catalog(engine, repository_id, manifest_dir, stored)
    mine = [one for one in catalog.sets() if one.complete and os.path.exists(manifest_path(manifest_dir, one.set_id))]
    old = [one for one in mine[keep:] if one.set_id not in never]
    for one in old:
        os.unlink(manifest_path(manifest_dir, one.set_id))
        sync_directory(manifest_dir)
        engine.delete(one.stored)
    if not old:
        return [], []
    try:
        engine.prune()
    except DeliveryError as exc:
        return [one.set_id for one in old], [f"old sets are forgotten, but their space is not free yet: {exc.message}"]
    return [one.set_id for one in old], []


class Taking:
    """One taking of a set: a warm pass if there is someone to hold, then window, checks, manifest. Leaves a complete set or nothing."""

    def __init__(
        self,
        engine: SnapshotEngine,
        docker: Engine,
        request: Request,
        parts: t.Sequence[Part],
        held: t.Sequence[freeze.Held],
        repository_id: str,
    ) -> None:
        self.engine, self.docker, self.request, self.parts, self.held = engine, docker, request, parts, held
        self.repository_id = repository_id
        self.sources = [part.source for part in parts]
        self.tags = {"set": request.set_id}
        self.made: list[Stored] = []
        self.kept: list[Stored] = []
        #: All that the repository holds, as ``settle`` saw it.
        self.there: list[Stored] = []
        self.warnings: list[str] = []
        self.warm: list[Scan] = []
        self.warm_end = 0
        self.versions = {
            "engine": engine.version(),
            "kernel": os.uname().release,
            "docker": str(docker.version().get("Version", "")),
        }
        self.folder = os.path.join(engine.directory, "manifests", request.set_id)
        #: Whether nothing may change while the final pass reads.
        self.still = request.consistency in ("pause", "stop") or bool(request.replaces)

    def warm_up(self) -> None:
        """Store most of the data while the app still runs; only its time is lost when something moves away under it."""
        sync_file_systems(self.sources)
        scans = [scan(source, vanishing=True) for source in self.sources]
        self._refuse_names(scans)
        if sum(tree.bytes for tree in scans) < WARM_FROM:
            return
        self.engine.prepare([*self.sources, self.folder])
        try:
            full = not self.engine.sees_every_change or not all(ctime_is_proof(source) for source in self.sources)
            self.made += self.engine.snapshot(self.sources, {**self.tags, "phase": "warm"}, full, self.request.freeze_timeout * 10)
        except DeliveryError as exc:
            if exc.failure_class != "snapshot":
                raise
        else:
            self.warm, self.warm_end = scans, time.time_ns()

    def abandon(self) -> None:
        """Remove what was stored so far."""
        with contextlib.suppress(DeliveryError):
            self.engine.delete(self.made)

    def settle(self) -> None:
        """Read the set back, remove the warm pass, and ask the repository anew: one whose disk was unmounted meanwhile would
        have taken everything with a smile."""
        if self.request.verify:
            self.engine.verify(self.kept)
        ids = {one.snapshot for one in self.kept}
        self.engine.delete([one for one in self.made if one.snapshot not in ids])
        repository = self.engine.connect()
        self.there = self.engine.contents()
        there = [one.snapshot for one in self.there]
        if repository.repository_id != self.repository_id or not all(any(one.startswith(found) for one in there) for found in ids):
            raise DeliveryError(
                f"find the snapshot set {self.request.set_id} in the repository",
                "it is not there after it was stored",
                "The repository was exchanged or unmounted meanwhile.",
                "snapshot",
            )

    def finish(self, settle: bool = True) -> dict[str, t.Any]:
        """Take the final pass and write the manifest, which is returned. ``settle`` false: the caller calls it when there is time."""
        created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        try:
            if not self.warm:
                self.engine.prepare([*self.sources, self.folder])
            window = freeze.Window(
                self.docker,
                self.held,
                self.request.hooks if self.request.consistency == "hooks" else (),
                os.path.join(self.request.manifest_dir, f".freeze-{self.request.set_id}.json"),
                self.request.freeze_timeout,
                self.request.stop_timeout,
            )
            with window:
                scans, stable, stored = self._final_pass()
            self.made[-len(stored) :] = stored = self.engine.identified(stored)
            if window.killed:
                self.warnings.append(f"had to be killed to stop, so their files are like after a crash: {', '.join(window.killed)}")
            self._compare_counts(scans, stable, stored)
            manifest = self._manifest(created, window.seconds, scans, stable, stored)
            self._store_manifest(manifest, scans)
            self.kept = [*stored, self.made[-1]]
            if settle:
                self.settle()
        except BaseException:
            self.abandon()
            raise
        write_json(manifest_path(self.request.manifest_dir, self.request.set_id), manifest)
        return manifest

    def _final_pass(self) -> tuple[list[Scan], list[bool], list[Stored]]:
        sync_file_systems(self.sources)
        known: list[Scan | None] = [*self.warm] if self.warm else [None] * len(self.sources)
        scans = [scan(source, before, vanishing=not self.still) for source, before in zip(self.sources, known)]
        self._refuse_names(scans)
        by_ctime = self.engine.sees_every_change
        if self.warm:
            full = any(needs_full_read(before, after, self.warm_end, by_ctime) for before, after in zip(self.warm, scans))
        else:
            full = not by_ctime or not all(ctime_is_proof(source) for source in self.sources)
        stored = self.engine.snapshot(self.sources, self.tags, full, self.request.freeze_timeout)
        self.made += stored
        stable = []
        for part, before in zip(self.parts, scans):
            difference = before.first_difference(scan(part.source, before, vanishing=not self.still))
            if difference and self.still:
                raise DeliveryError(
                    f"snapshot {part.name}",
                    f"it changed while its containers were held still: {difference}",
                    "Something outside of these containers writes there; stop it.",
                    "snapshot",
                )
            stable.append(not difference)
        return scans, stable, stored

    def _refuse_names(self, scans: t.Sequence[Scan]) -> None:
        if self.engine.keeps_everything:
            return
        for part, tree in zip(self.parts, scans):
            for path in tree.entries:
                try:
                    reserved = path.decode("utf-8").endswith(".kopia-entry")
                except UnicodeDecodeError:
                    reserved = True
                if reserved:
                    raise DeliveryError(
                        f"snapshot {part.name} with Kopia",
                        f"Kopia cannot keep the name {printable(path)}",
                        "Rename it, or use the restic modules, which keep every name.",
                        "snapshot",
                    )

    def _compare_counts(self, scans: t.Sequence[Scan], stable: t.Sequence[bool], stored: t.Sequence[Stored]) -> None:
        """What the engine counted must be what the scan counted; one snapshot may hold several parts."""
        if not all(stable):
            moving = [part.name for part, fixed in zip(self.parts, stable) if not fixed]
            self.warnings.append(f"changed while being read, so a restore can only count them: {', '.join(moving)}")
            return
        groups: dict[str, list[int]] = {}
        for tree, one in zip(scans, stored):
            group = groups.setdefault(one.snapshot, [one.files, one.bytes, 0, 0])
            group[2] += tree.files
            group[3] += tree.bytes
        for files, size, my_files, my_size in groups.values():
            if (files, size) != (my_files, my_size):
                raise DeliveryError(
                    f"snapshot with {self.engine.name}",
                    f"it stored {files} files and {size} bytes of {my_files} files and {my_size} bytes",
                    "Look for ignore rules or other writers.",
                    "snapshot",
                )

    def _manifest(
        self, created: str, seconds: float, scans: t.Sequence[Scan], stable: t.Sequence[bool], stored: t.Sequence[Stored]
    ) -> dict[str, t.Any]:
        parts = []
        for part, tree, fixed, one in zip(self.parts, scans, stable, stored):
            parts.append(
                {
                    "kind": part.kind,
                    "name": part.name,
                    "source": part.source,
                    "volume": dict(part.volume),
                    "snapshot": one.snapshot,
                    "root": one.root,
                    "files": tree.files,
                    "directories": tree.directories,
                    "links": tree.links,
                    "bytes": tree.bytes,
                    "sockets_left_out": tree.sockets,
                    "digest": tree.digest if fixed else "",
                    "stable": fixed,
                }
            )
        return {
            "schema": SCHEMA,
            "set_id": self.request.set_id,
            "created": created,
            "engine": self.engine.name,
            "repository_id": self.repository_id,
            "metadata": dict(self.request.metadata),
            "replaces": self.request.replaces,
            "consistency": self.request.consistency,
            "freeze_seconds": seconds,
            "containers": [{key: one[key] for key in ("name", "action", "found")} for one in self.held],
            "warnings": self.warnings,
            "versions": self.versions,
            "parts": parts,
        }

    def _store_manifest(self, manifest: dict[str, t.Any], scans: t.Sequence[Scan]) -> None:
        folder = self.folder
        shutil.rmtree(folder, ignore_errors=True)
        os.makedirs(folder, mode=0o700)
        try:
            if not self.engine.keeps_everything:
                for number, (part, tree) in enumerate(zip(manifest["parts"], scans)):
                    part["sidecar"] = f"sidecar-{number}.json"
                    write_json(os.path.join(folder, part["sidecar"]), sidecar(tree))
                    part["sidecar_sha256"] = _file_sha256(os.path.join(folder, part["sidecar"]))
            write_json(os.path.join(folder, "manifest.json"), manifest)
            self.made += self.engine.snapshot([folder], {**self.tags, "kind": "manifest"}, True, 3600)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


def read_sidecar(folder: str, part: t.Mapping[str, t.Any]) -> list[dict[str, t.Any]]:
    """The sidecar records of a part out of a brought manifest directory; empty when the engine keeps everything itself."""
    if not part.get("sidecar"):
        return []
    path = os.path.join(folder, os.path.basename(part["sidecar"]))
    if _file_sha256(path) != part["sidecar_sha256"]:
        raise DeliveryError(f"restore {part['name']}", "its sidecar in the repository is damaged", "Use another set.", "snapshot")
    with open(path, encoding="utf-8") as handle:
        return json.load(handle)


def check_room(catalog: Catalog, parts: t.Sequence[Part]) -> dict[str, t.Any]:
    """``{bytes, new_bytes, free_bytes}``; ``new_bytes`` counts the files that moved since the newest complete set.

    Raises ``DeliveryError(capacity)`` when they cannot fit.
    """
    free = catalog.engine.free_bytes()
    before = next((one for one in catalog.sets() if one.complete), None)
    known = {(part["kind"], part["name"]) for part in before.manifest["parts"]} if before else set()
    since = 0
    if before:
        moment = datetime.datetime.fromisoformat(before.created.replace("Z", "+00:00"))
        since = int(moment.timestamp() * 1_000_000_000)
    total = new = 0
    for part in parts:
        for entry in scan(part.source, contents=False, vanishing=True).entries.values():
            if entry.kind == "file" and not entry.leader:
                total += entry.size
                if (part.kind, part.name) not in known or max(entry.mtime_ns, entry.ctime_ns) >= since:
                    new += entry.size
    needed = new + new // 20 + _RESERVE
    if free is not None and needed > free:
        raise DeliveryError(
            "take a snapshot set",
            f"the repository has {megabytes(free)} free, and up to {megabytes(needed)} are needed",
            "Make room, or give it another place.",
            "capacity",
            estimate={"bytes": total, "new_bytes": new, "free_bytes": free},
        )
    return {"bytes": total, "new_bytes": new, "free_bytes": free}


def megabytes(size: int) -> str:
    return f"{size / 1_000_000:,.0f} MB"


def _refuse_other_parts(existing: SetInfo, request: Request) -> None:
    have = {(part["kind"], part["name"]) for part in existing.manifest["parts"]}
    want = {("volume", name) for name in request.volumes} | {("path", os.path.normpath(path)) for path in request.paths}
    if have != want:
        different = sorted(name for _kind, name in have ^ want)
        raise DeliveryError(
            f"take the snapshot set {request.set_id}",
            f"one of that id exists with other parts ({', '.join(different)})",
            "Use another id.",
            "config",
        )


def _refuse_repository_inside(engine: SnapshotEngine, parts: t.Sequence[Part]) -> None:
    inner = os.path.realpath(engine.settings.local_path) if engine.settings.local_path else ""
    for part in parts:
        if inner and (inner + "/").startswith(os.path.realpath(part.source) + "/"):
            raise DeliveryError(
                f"snapshot {part.name}", f"the repository {inner} lies within it", "Put the repository elsewhere.", "config"
            )


def _manifest_stored(stored: t.Sequence[Stored]) -> list[Stored]:
    return [one for one in stored if one.tags.get("kind") == "manifest" and not one.broken]


def _file_sha256(path: str) -> str:
    with open(path, "rb") as handle:
        return hashlib.sha256(handle.read()).hexdigest()
