# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Taking a snapshot set: the bulk while everything runs, a short window for what moved, checks, and the manifest last."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import shutil
import tempfile
import time
import typing as t
from dataclasses import replace

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json, write_json
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import carried, databases, freeze
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.delta import Delta, changed_since, checksum, copy_files
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import SnapshotEngine, Stored
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import (
    Entry,
    Scan,
    ctime_is_proof,
    printable,
    scan,
    sync_file_systems,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.sets import (
    RESERVE,
    SCHEMA,
    Catalog,
    Part,
    Request,
    SetInfo,
    check_room,
    check_set_id,
    forget,
    locked,
    manifest_path,
    megabytes,
    mend_freezes,
    resolve,
)


def take(engine: SnapshotEngine, docker: Engine, request: Request, check_mode: bool = False) -> dict[str, t.Any]:
    """Take a set, unless a complete one of that id exists. Holds the lock; see ``take_locked`` for the result."""
    check_set_id(request.set_id)
    if check_mode:
        return take_locked(engine, docker, request, check_mode=True)
    with locked(request.manifest_dir):
        mend_freezes(docker, request.manifest_dir)
        return take_locked(engine, docker, request)


def take_locked(engine: SnapshotEngine, docker: Engine, request: Request, check_mode: bool = False) -> dict[str, t.Any]:
    """``{changed, set_id, manifest (path), set (SetInfo.as_result), freeze_seconds, containers, estimate, warnings, forgotten}``."""
    repository = engine.connect()
    catalog = Catalog(engine, repository.repository_id, request.manifest_dir)
    existing = catalog.get(request.set_id)
    parts = resolve(docker, request) if not existing.complete or not (request.volumes or request.paths) else []
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
        _refuse_other_parts(existing, request, parts)
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
    held, found = _plan(docker, parts, request)
    result["containers"] = [{"name": one["name"], "action": one["action"]} for one in held]
    result["changed"] = True
    if check_mode:
        return result
    # What an earlier, broken run left under this id.
    with contextlib.suppress(FileNotFoundError):
        os.unlink(result["manifest"])
    engine.delete(existing.stored)
    taking = Taking(engine, docker, request, parts, held, found, catalog)
    if held:
        taking.warm_up()
    manifest = taking.finish()
    result["freeze_seconds"] = manifest["freeze_seconds"]
    result["containers"] = manifest["containers"]
    result["warnings"] = manifest["warnings"]
    result["set"] = SetInfo(request.set_id, True, "", manifest, []).as_result()
    if request.keep:
        forgotten, warning = forget(
            engine, request.manifest_dir, repository.repository_id, request.keep, {request.set_id, request.replaces}, taking.there
        )
        result["forgotten"] = forgotten
        result["warnings"] = result["warnings"] + warning
    return result


def _plan(docker: Engine, parts: t.Sequence[Part], request: Request) -> tuple[list[freeze.Held], dict[int, databases.Database]]:
    """Whom to hold still, and the database of each part that has one. Refuses what could not work, before anything is touched."""
    found: dict[int, databases.Database] = {}
    asleep = []
    for number, part in enumerate(parts):
        if part.consistency in databases.DATABASES:
            one = databases.find(docker, part.consistency, part.name, part.source, request.project, part.service)
            if one is not None:
                found[number] = one
            else:
                asleep.append(part.name)
    held: list[freeze.Held] = []
    for action in ("stop", "pause"):
        kinds = ("stop",) if action == "stop" else ("pause", "mysql", "sqlite")
        mine = [part for part in parts if part.consistency in kinds]
        if mine:
            writers = freeze.users(docker, {p.name for p in mine if p.kind == "volume"}, [p.source for p in mine], writers_only=True)
            held += [one for one in freeze.plan_hold(writers, action) if one["id"] not in {other["id"] for other in held}]
    for number, one in found.items():
        for other in held:
            if other["id"] == getattr(one, "container", "") and parts[number].consistency in databases.LIVE:
                raise DeliveryError(
                    f"take {parts[number].name} by the backup of its database",
                    f"its container {one.name} also writes to what has the consistency pause or stop, and cannot answer then",
                    f"Give {parts[number].name} the consistency pause, or the other one the same as this.",
                    "config",
                )
            if other["id"] == getattr(one, "container", "") and other["action"] == "stop":
                found = {key: value for key, value in found.items() if value is not one}
    return held, found


class Taking:
    """One taking of a set: the bulk if there is someone to hold, then window, checks, manifest. Leaves a complete set or nothing.

    Parts are of three kinds. ``live``: read while they move, as their database or nobody cares. ``within``: read between hooks, and may
    move. The others stand still in the window, and what moved since the bulk is copied then, or all of it is read.
    """

    def __init__(
        self,
        engine: SnapshotEngine,
        docker: Engine,
        request: Request,
        parts: t.Sequence[Part],
        held: t.Sequence[freeze.Held],
        found: t.Mapping[int, databases.Database],
        catalog: Catalog,
    ) -> None:
        self.engine, self.docker, self.request, self.parts, self.held = engine, docker, request, parts, held
        self.databases = dict(found)
        self.repository_id = catalog.repository_id
        self.sequence = 1 + max((one.sequence for one in catalog.sets()), default=0)
        self.tags = {"set": request.set_id}
        self.made: list[Stored] = []
        self.kept: list[Stored] = []
        #: All that the repository holds, as ``settle`` saw it.
        self.there: list[Stored] = []
        self.warnings: list[str] = []
        self.began = time.monotonic()
        #: By part: what it was when its bulk was stored, that bulk, what it was at its moment, and what goes over the bulk.
        self.warm: dict[int, Scan] = {}
        self.stored: dict[int, Stored] = {}
        self.scans: dict[int, Scan] = {}
        self.deltas: dict[int, Delta] = {}
        #: Names that did not move while a live part was read.
        self.settled: dict[int, list[bytes]] = {}
        self.versions = {
            "engine": engine.version(),
            "kernel": os.uname().release,
            "docker": str(docker.version().get("Version", "")),
        }
        # Runs on one manifest directory take turns, those on one repository need not.
        self.workshop = os.path.join(engine.directory, "manifests", hashlib.sha256(request.manifest_dir.encode()).hexdigest()[:8])
        self.folder = os.path.join(self.workshop, request.set_id)
        moving = [n for n, part in enumerate(parts) if not request.replaces and part.consistency in ("none", "hooks")]
        self.within = [n for n in moving if parts[n].consistency == "hooks"]
        self.live = [n for n in moving if n not in self.within] + [n for n in found if parts[n].consistency in databases.LIVE]
        self.still = [n for n in range(len(parts)) if n not in self.within and n not in self.live]

    def warm_up(self) -> None:
        """Store the bulk while the app still runs; only its time is lost when something moves away under it."""
        if not self.still:
            return
        self._make_folder()
        # A store through a mapping moves the ctime only where a sync began after the page was first written to.
        began = time.time_ns()
        sync_file_systems(self.parts[n].source for n in self.still)
        scans = {n: scan(self.parts[n].source, vanishing=True) for n in self.still}
        self._refuse_names(scans)
        try:
            self._store(self.still, moving=True)
        except DeliveryError as exc:
            if exc.failure_class != "snapshot":
                self.abandon()
                raise
        else:
            self.warm = {n: replace(tree, started_ns=began) for n, tree in scans.items()}

    def abandon(self) -> None:
        """Remove what was stored so far."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(DeliveryError):
            self.engine.delete(self.made)

    def settle(self) -> None:
        """Read the set back, remove what it does not need, and ask the repository anew: one whose disk was unmounted meanwhile would
        have taken everything with a smile."""
        if self.request.verify == "repository":
            self.engine.verify(self.kept)
        elif self.request.verify == "restore":
            self._restore_aside()
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

    def _restore_aside(self) -> None:
        """Write every part out of the repository and compare it, one after the other."""
        with tempfile.TemporaryDirectory(dir=self.workshop) as box:
            brought, tree = os.path.join(box, "manifest"), os.path.join(box, "tree")
            self.engine.restore(self.kept[-1], brought)
            for n, part in enumerate(read_json(os.path.join(brought, "manifest.json"))["parts"]):
                if not self._fits(part["bytes"]):
                    raise DeliveryError(
                        f"restore {part['name']} to one side, to compare it",
                        f"there is no room for {megabytes(part['bytes'])} in {self.workshop}",
                        "Make room, or use verify repository.",
                        "capacity",
                    )
                self.engine.restore(self.stored[n], tree)
                carried.put_together(tree, part, n, brought)
                shutil.rmtree(tree) if os.path.isdir(tree) else os.unlink(tree)

    def finish(self, settle: bool = True) -> dict[str, t.Any]:
        """Take what is left and write the manifest, which is returned. ``settle`` false: the caller calls it when there is time."""
        try:
            self._make_folder()
            for one in self.databases.values():
                one.begin()
            self._read_moving(self.live)
            window = freeze.Window(
                self.docker,
                self.held,
                self.request.hooks if self.within else (),
                os.path.join(self.request.manifest_dir, f".freeze-{self.request.set_id}.json"),
                self.request.freeze_timeout,
                self.request.stop_timeout,
                self._lock,
                self.folder,
            )
            with window:
                created = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="milliseconds").replace("+00:00", "Z")
                for one in self.databases.values():
                    one.mark()
                self._read_moving(self.within)
                self._read_still()
            for one in self.databases.values():
                one.released()
            self._collect()
            self._identify()
            if window.killed:
                self.warnings.append(f"had to be killed to stop, so their files are like after a crash: {', '.join(window.killed)}")
            manifest = self._manifest(created, window)
            made = self._store_manifest(manifest)
            self.kept = [*self.stored.values(), made]
            if settle:
                self.settle()
        except BaseException:
            self._close_databases()
            self.abandon()
            raise
        self._close_databases()
        write_json(manifest_path(self.request.manifest_dir, self.request.set_id), manifest)
        return manifest

    def _identify(self) -> None:
        whole = self.engine.identified(list(self.stored.values()))
        ids = {short.snapshot: one.snapshot for short, one in zip(self.stored.values(), whole)}
        self.made = [replace(one, snapshot=ids.get(one.snapshot, one.snapshot)) for one in self.made]
        self.stored = dict(zip(self.stored, whole))

    def _lock(self) -> None:
        for one in self.databases.values():
            one.lock(self.request.freeze_timeout)

    def _close_databases(self) -> None:
        for one in self.databases.values():
            one.close()

    def _make_folder(self) -> None:
        """An empty directory for what goes with the manifest; the policies of all sources, before the first pass."""
        if not self.warm:
            shutil.rmtree(self.workshop, ignore_errors=True)  # what a killed run left goes as well
            os.makedirs(self.folder, mode=0o700)
            self.engine.prepare([*(part.source for part in self.parts), self.folder])

    def _store(self, numbers: t.Sequence[int], moving: bool, full: bool | None = None) -> list[Stored]:
        """One pass of the engine over some parts; all files are read where it could miss a change."""
        sources = [self.parts[n].source for n in numbers]
        if full is None:
            full = not self.engine.sees_every_change or not all(ctime_is_proof(source) for source in sources)
        limit = self.request.freeze_timeout * (10 if moving else 1)
        stored = self.engine.snapshot(sources, self.tags, full, limit, moving)
        self.made += stored
        self.stored.update(zip(numbers, stored))
        return stored

    def _read_moving(self, numbers: t.Sequence[int]) -> None:
        """Store parts that go on moving; what did not move can be compared at a restore all the same."""
        if not numbers:
            return
        before = {n: scan(self.parts[n].source, vanishing=True) for n in numbers}
        self._refuse_names(before)
        for n, one in zip(numbers, self._store(numbers, moving=True)):
            after = scan(self.parts[n].source, before[n], vanishing=True)
            left_out = set(one.skipped)
            names = [path for path in before[n].settled(after) if path not in left_out]
            lost = sorted(path for path in left_out if path in before[n].settled(after))
            if lost:
                raise DeliveryError(
                    f"snapshot {self.parts[n].name}", f"{printable(lost[0])} could not be read", "Make every file readable.", "snapshot"
                )
            self.scans[n] = after
            if len(names) < max(len(after.entries), len(before[n].entries)):
                self.settled[n] = names
                if n not in self.databases:
                    self.warnings.append(f"{self.parts[n].name} changed while it was read, and nobody was held still for it")

    def _read_still(self) -> None:
        """What has moved in the frozen parts since their bulk is copied; without bulk, or room for the copy, all is read by the engine."""
        if not self.still:
            return
        if self.warm:
            # Only names and times are read now: nobody waits for checksums.
            now = {n: scan(self.parts[n].source, self.warm[n], contents=False) for n in self.still}
            self._refuse_names(now)
            changed = {n: self._changed(n, now[n]) for n in self.still}
            if self._fits(sum(one.size for entries in changed.values() for one in entries if one.kind == "file" and not one.leader)):
                for n in self.still:
                    blobs = copy_files(self.parts[n].source, changed[n], carried.blobs_folder(self.folder, n))
                    self.deltas[n] = Delta(changed[n], blobs, sorted(now[n].entries))
                for n in self.still:
                    self._refuse_move(n, now[n], scan(self.parts[n].source, now[n], contents=False))
                self.scans.update(now)
                return
        before = {n: scan(self.parts[n].source, self.warm.get(n)) for n in self.still}
        self._refuse_names(before)
        for n, one in zip(self.still, self._store(self.still, moving=False)):
            self._refuse_move(n, before[n], scan(self.parts[n].source, contents=False))
            self.scans[n] = before[n]
            self.stored[n] = one
        self._compare_counts()

    def _changed(self, number: int, now: Scan) -> list[Entry]:
        part, earlier = self.parts[number], self.warm[number]
        names = set(changed_since(earlier, now, ctime_is_proof(part.source)))
        names |= {path for path in self.stored[number].skipped if path in now.entries}
        one = self.databases.get(number)
        if isinstance(one, databases.SQLite):
            names |= set(one.files(now))
        # All names of one file go together.
        names |= {path for path, entry in now.entries.items() if entry.leader in names and entry.leader}
        names |= {now.entries[path].leader for path in names if now.entries[path].leader}
        return [now.entries[path] for path in sorted(names)]

    def _fits(self, size: int) -> bool:
        space = os.statvfs(self.workshop)
        return size + size // 20 + RESERVE < space.f_bavail * space.f_frsize

    def _refuse_move(self, number: int, before: Scan, after: Scan) -> None:
        moved = before.first_move(after)
        if moved:
            raise DeliveryError(
                f"snapshot {self.parts[number].name}",
                f"it changed while its containers were held still: {moved}",
                "Something outside of these containers writes there; stop it.",
                "snapshot",
            )

    def _collect(self) -> None:
        """With the writers going on: checksums of what was copied, and what the databases have to add."""
        for n, delta in self.deltas.items():
            folder = carried.blobs_folder(self.folder, n)
            sums = {path: checksum(os.path.join(folder, name)) for path, name in delta.blobs.items()}
            entries = self.scans[n].entries
            for index, entry in enumerate(delta.entries):
                if entry.kind == "file":
                    entry = replace(entry, content=sums[entry.leader or entry.path])
                    delta.entries[index] = entries[entry.path] = entry
            one = self.databases.get(n)
            if isinstance(one, databases.SQLite):
                one.prove(delta, folder)
        for n, one in self.databases.items():
            added = one.collect(carried.blobs_folder(self.folder, n)) if n in self.live else None
            if added is not None:
                self.deltas[n] = added
                self.settled.setdefault(n, sorted(self.scans[n].entries))

    def _refuse_names(self, scans: t.Mapping[int, Scan]) -> None:
        if self.engine.keeps_everything:
            return
        for n, tree in scans.items():
            for path in tree.entries:
                try:
                    reserved = path.decode("utf-8").endswith(".kopia-entry")
                except UnicodeDecodeError:
                    reserved = True
                if reserved:
                    raise DeliveryError(
                        f"snapshot {self.parts[n].name} with Kopia",
                        f"Kopia cannot keep the name {printable(path)}",
                        "Rename it, or use the restic modules, which keep every name.",
                        "snapshot",
                    )

    def _compare_counts(self) -> None:
        """What the engine counted must be what the scan counted; one snapshot may hold several parts."""
        groups: dict[str, list[int]] = {}
        for n in self.still:
            one, tree = self.stored[n], self.scans[n]
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

    def _manifest(self, created: str, window: freeze.Window) -> dict[str, t.Any]:
        parts = []
        for n, part in enumerate(self.parts):
            tree, one = self.scans[n], self.stored[n]
            parts.append(
                {
                    "kind": part.kind,
                    "name": part.name,
                    "source": part.source,
                    "volume": dict(part.volume),
                    "consistency": part.consistency,
                    "database": self.databases[n].described() if n in self.databases else {},
                    "snapshot": one.snapshot,
                    "root": one.root,
                    "files": tree.files,
                    "directories": tree.directories,
                    "links": tree.links,
                    "bytes": tree.bytes,
                    "sockets_left_out": tree.sockets,
                    "digest": "" if n in self.settled else tree.digest,
                    "stable": n not in self.settled,
                }
            )
        return {
            "schema": SCHEMA,
            "set_id": self.request.set_id,
            "created": created,
            "sequence": self.sequence,
            "engine": self.engine.name,
            "repository_id": self.repository_id,
            "metadata": dict(self.request.metadata),
            "project": self.request.project,
            "replaces": self.request.replaces,
            "consistency": self.request.consistency,
            "freeze_seconds": window.seconds,
            "containers": [
                {**{key: one[key] for key in ("name", "action", "found")}, "freeze_ms": window.freeze_ms.get(one["id"], 0)}
                for one in self.held
            ],
            "warnings": self.warnings,
            "versions": self.versions,
            "parts": parts,
            "seconds": 0.0,
            "new_bytes": None,
        }

    def _store_manifest(self, manifest: dict[str, t.Any]) -> Stored:
        try:
            for n, part in enumerate(manifest["parts"]):
                settled, delta = self.settled.get(n), self.deltas.get(n)
                part.update(carried.write(self.folder, n, self.scans[n], delta, settled, self.engine.keeps_everything))
            manifest["seconds"] = round(time.monotonic() - self.began, 3)
            added = [one.added for one in {one.snapshot: one for one in self.stored.values()}.values()]
            manifest["new_bytes"] = None if any(size is None for size in added) else sum(size or 0 for size in added)
            write_json(os.path.join(self.folder, "manifest.json"), manifest)
            self.made += self.engine.snapshot([self.folder], {**self.tags, "kind": "manifest"}, True, 3600, False)
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
        return self.made[-1]


def _refuse_other_parts(existing: SetInfo, request: Request, parts: t.Sequence[Part]) -> None:
    have = {(part["kind"], part["name"]) for part in existing.manifest["parts"]}
    want = {("volume", name) for name in request.volumes} | {("path", os.path.normpath(path)) for path in request.paths}
    want = want or {(part.kind, part.name) for part in parts}
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
