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
import os
import re
import stat
import tempfile
import time
import typing as t
from dataclasses import dataclass, field, replace

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import PROJECT_LABEL, Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json, sync_directory
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import databases, freeze
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import SnapshotEngine, Stored
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import scan

#: 1 had no deltas.
SCHEMA = 2
VOLUME_LABEL = "com.docker.compose.volume"
_SET_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,159}\Z")
_SUFFIX = ".manifest.json"
#: Room that must stay free whatever is written.
RESERVE = 32 << 20
#: How the writers of a part may be held, or its database asked.
CONSISTENCIES = ("none", "pause", "stop", "hooks", *databases.DATABASES)


@dataclass(frozen=True)
class Part:
    """One volume (``name`` is Docker's) or one host path (``name`` is the path); ``source`` is where its bytes lie.

    ``service``: the Compose service or container of its database; empty for the only one that writes there.
    """

    kind: str
    name: str
    source: str
    volume: t.Mapping[str, t.Any] = field(default_factory=dict)
    consistency: str = "pause"
    service: str = ""


@dataclass(frozen=True)
class Request:
    """What to take. ``hooks`` as in ``freeze.Window``; times in seconds; ``keep`` 0 keeps every set.
    ``verify``: ``none``, ``repository`` (all of it is read back) or ``restore`` (it is restored to one side and compared).

    ``options``: ``{consistency, service}`` of single parts, by the name of the volume, its key in the Compose file, or the path.
    ``project``: the Compose project of services and keys; with neither volumes nor paths, all its data is taken.
    ``replaces``: id of the set for which this one keeps the state that a restore replaces.
    """

    set_id: str
    manifest_dir: str
    volumes: t.Sequence[str] = ()
    paths: t.Sequence[str] = ()
    metadata: t.Mapping[str, t.Any] = field(default_factory=dict)
    options: t.Mapping[str, t.Mapping[str, t.Any]] = field(default_factory=dict)
    project: str = ""
    consistency: str = "pause"
    hooks: t.Sequence[t.Mapping[str, t.Any]] = ()
    verify: str = "repository"
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
    def sequence(self) -> int:
        """Grows from set to set, whatever the clock does."""
        return int(self.manifest.get("sequence", 0))

    @property
    def created(self) -> str:
        return str(self.manifest.get("created") or (self.stored[0].created if self.stored else ""))

    def age(self) -> int | None:
        """Seconds since it was taken, as this host's clock has it; ``None`` where nobody knows."""
        if not self.manifest.get("created"):
            return None
        return round(time.time() - datetime.datetime.fromisoformat(self.manifest["created"].replace("Z", "+00:00")).timestamp())

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
            "parts": [
                {
                    **{key: part[key] for key in ("kind", "name", "files", "bytes", "digest", "stable")},
                    "consistency": part.get("consistency", ""),
                }
                for part in parts
            ],
            "seconds": self.manifest.get("seconds"),
            "new_bytes": self.manifest.get("new_bytes"),
            "freeze_seconds": self.manifest.get("freeze_seconds", 0.0),
            "containers": self.manifest.get("containers", []),
            "age_seconds": self.age(),
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
        names += freeze.mend(docker, record, died=True)
    return names


def resolve(docker: Engine, request: Request) -> list[Part]:
    """Where the bytes of each volume and path lie, and how each is taken. Refuses by name what cannot be snapshotted and swapped."""
    volumes, paths = list(request.volumes), list(request.paths)
    if request.project and not volumes and not paths:
        volumes, paths = project_data(docker, request.project)
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
    return _with_options(parts, request)


def _with_options(parts: t.Sequence[Part], request: Request) -> list[Part]:
    used, found = set(), []
    for part in parts:
        labels = part.volume.get("labels") or {}
        keys = [part.name]
        if request.project and labels.get(PROJECT_LABEL) == request.project:
            keys.append(str(labels.get(VOLUME_LABEL)))
        elif request.project and part.name.startswith(f"{request.project}_"):
            keys.append(part.name[len(request.project) + 1 :])
        options = next((request.options[key] for key in keys if key in request.options), {})
        used.update(keys)
        consistency = str(options.get("consistency") or request.consistency)
        if consistency not in CONSISTENCIES:
            raise DeliveryError(
                f"snapshot {part.name}", f"there is no consistency {consistency}", f"Known: {', '.join(CONSISTENCIES)}.", "config"
            )
        if consistency == "hooks" and not request.hooks:
            raise DeliveryError(f"snapshot {part.name}", "its consistency is hooks, and there are none", "Give hooks.", "config")
        found.append(replace(part, consistency=consistency, service=str(options.get("service") or "")))
    unknown = sorted(set(request.options) - used)
    if unknown:
        raise DeliveryError(
            "take a snapshot set",
            f"there are options for {', '.join(unknown)}, which is not in it",
            f"It holds {', '.join(part.name for part in parts)}.",
            "config",
        )
    return found


def project_data(docker: Engine, project: str) -> tuple[list[str], list[str]]:
    """Volumes, external and unnamed ones too, and host paths of a Compose project: what it made, and what its containers mount."""
    volumes = {str(one["Name"]) for one in docker.volumes({PROJECT_LABEL: project})}
    paths: set[str] = set()
    for container in docker.containers({PROJECT_LABEL: project}):
        for mount in container.get("Mounts") or ():
            source = str(mount.get("Source") or "")
            if mount.get("Type") == "volume":
                volumes.add(str(mount["Name"]))
            elif mount.get("Type") == "bind" and _is_data(source):
                paths.add(os.path.realpath(source))
    outer = sorted(path for path in paths if not any(path.startswith(other + "/") for other in paths))
    return sorted(volumes), outer


def _is_data(path: str) -> bool:
    """Whether a host path that a container mounts is the app's: neither a socket nor a part of the system."""
    try:
        kind = os.stat(path).st_mode
    except OSError:
        return False
    system = ("/proc", "/sys", "/dev", "/run", "/var/run", "/boot", "/usr", "/lib", "/bin", "/sbin", "/etc/localtime", "/etc/timezone")
    real = os.path.realpath(path)
    return (stat.S_ISREG(kind) or stat.S_ISDIR(kind)) and real != "/" and not any((real + "/").startswith(one + "/") for one in system)


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
        return sorted(found, key=lambda one: (one.sequence, one.created, one.set_id), reverse=True)

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
        owner = found.manifest.get("metadata", {}).get("app", "")
        if app and owner and owner != app:
            raise DeliveryError(
                f"find the snapshot set {set_id} of {app}", f"it is of another app, {owner}", "Name a set of this app.", "config"
            )
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
        if manifest.get("schema") not in (1, SCHEMA) or manifest.get("set_id") != found.set_id:
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
    needed = new + new // 20 + RESERVE
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


def _manifest_stored(stored: t.Sequence[Stored]) -> list[Stored]:
    return [one for one in stored if one.tags.get("kind") == "manifest" and not one.broken]
