# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Giving a set back: beside the live data, checked whole, then exchanged in one call for each part.

The transaction file ``<manifest_dir>/.restore-<txid>.json`` says at every moment how far it is:

``staging``   fresh copies are being written and checked; undone by removing them
``holding``   containers are being stopped, the state to be replaced is snapshotted; undone by starting them again
``swapping``  all copies are sound and nobody uses the old data; continued, or undone when the file system refuses
``releasing`` the restored data is in place; continued
"""

from __future__ import annotations

import ctypes
import datetime
import errno
import glob
import os
import platform
import secrets
import shutil
import signal
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.command import run
from ansible_collections.selfhost.delivery.plugins.module_utils.engine import PROJECT_LABEL, Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json, sync_directory, write_json
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import carried, freeze, sets
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import SnapshotEngine, Stored
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.guard import Guard
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import scan, sync_file_systems
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.taking import Taking

_RENAME_EXCHANGE = 2
_SYSCALL = {"x86_64": 316, "aarch64": 276, "armv7l": 382, "riscv64": 276, "ppc64le": 357, "s390x": 347}


@dataclass(frozen=True)
class Request:
    """What to give back. Empty ``volumes`` and ``paths``: the whole set, else only the named parts.

    ``project``: volumes go to those of another Compose project. ``target``: everything else goes below this directory, into
    ``volumes/<name>`` and ``paths/<path>``, and replaces nothing. ``checks``: ``{name, image, command, mount, user, env, timeout}``, a
    program that must be content with the copy of a part before anything is replaced; what it writes is thrown away.
    ``restart`` false leaves the containers that had to be stopped as they are. ``stop_timeout`` in seconds.
    """

    set_id: str
    manifest_dir: str
    volumes: t.Sequence[str] = ()
    paths: t.Sequence[str] = ()
    app: str = ""
    keep_current: bool = True
    restart: bool = True
    stop_timeout: float = 30.0
    keep: int = 0
    project: str = ""
    target: str = ""
    checks: t.Sequence[t.Mapping[str, t.Any]] = ()


def restore(engine: SnapshotEngine, docker: Engine, request: Request, check_mode: bool = False) -> dict[str, t.Any]:
    """``{changed, set_id, restored (parts), replaced_set_id, containers, downtime_seconds, recovered, warnings}``.

    ``recovered`` names what an earlier, killed restore had left and what was done about it.
    """
    if check_mode:
        open_ones = [read_json(path)["set_id"] for path in _journals(request.manifest_dir)]
        return {**_Restoring(engine, docker, request, []).plan(), "recovered": [f"{one}: would be mended first" for one in open_ones]}
    with sets.locked(request.manifest_dir):
        sets.mend_freezes(docker, request.manifest_dir)
        recovered, held = [], []
        earlier = _journals(request.manifest_dir)
        for path in earlier:
            text, still_held = recover(path, docker, release=False)
            recovered.append(text)
            held += still_held
        try:
            result = _Restoring(engine, docker, request, held).run()
        except BaseException:
            # Whom the killed run had stopped must not stay stopped because this one could not begin.
            freeze.release(docker, held)
            raise
        finally:
            # They kept the names of the stopped containers until now.
            for path in earlier:
                os.unlink(path)
        return {**result, "changed": result["changed"] or bool(recovered), "recovered": recovered}


def recover(journal: str, docker: Engine, release: bool = True) -> tuple[str, list[freeze.Held]]:
    """Bring an open restore to an end, forward if all its copies were sound, else back; needs the lock.

    Says what was done, and which containers are still held when ``release`` is false; then the journal stays, and names only them.
    """
    state = read_json(journal)
    if state is None:
        return "", []
    _end_orphans(state["txid"])
    docker.remove(_checker(state["txid"]), force=True, volumes=True)
    forward = state["phase"] in ("swapping", "releasing")
    text = f"{state['set_id']}: undone, nothing had been replaced"
    if forward:
        try:
            _exchange_all(state)
            text = f"{state['set_id']}: finished, its data is in place"
        except OSError as exc:
            _exchange_back(state)
            forward = False
            text = f"{state['set_id']}: undone, the exchange failed ({exc.strerror})"
    # leave_stopped is about a restore that came to its end.
    held = state["held"] if state["restart"] or not forward else []
    if release:
        freeze.release(docker, held)
    _remove_boxes(state)
    if not forward:
        _remove_made_volumes(docker, state)
    if release:
        os.unlink(journal)
        return text, []
    write_json(journal, {**state, "phase": "holding", "parts": [], "made_volumes": [], "held": held})
    return text, held


def exchange(one: str, other: str) -> None:
    """Swap two names of one file system in a single step (renameat2 with RENAME_EXCHANGE). Raises ``OSError``."""
    libc = ctypes.CDLL(None, use_errno=True)
    here = -100
    number = _SYSCALL.get(platform.machine())
    if number is not None:
        result = libc.syscall(number, here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE)
    else:
        result = libc.renameat2(here, os.fsencode(one), here, os.fsencode(other), _RENAME_EXCHANGE)
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), one)


class _Restoring:
    def __init__(self, engine: SnapshotEngine, docker: Engine, request: Request, held: t.Sequence[freeze.Held]) -> None:
        self.engine, self.docker, self.request = engine, docker, request
        #: Containers that a killed run had stopped; they come back with ours.
        self.inherited = list(held)
        self.txid = secrets.token_hex(6)
        self.journal = os.path.join(request.manifest_dir, f".restore-{self.txid}.json")
        self.state: dict[str, t.Any] = {}
        self.parts: list[dict[str, t.Any]] = []
        self.stored: list[Stored] = []
        self.warnings: list[str] = []
        self.keeping: Taking | None = None

    def plan(self) -> dict[str, t.Any]:
        """Choose the set, check everything that can be checked without touching anything."""
        repository = self.engine.connect()
        self.catalog = sets.Catalog(self.engine, repository.repository_id, self.request.manifest_dir)
        self.found = self.catalog.complete(self.request.set_id, self.request.app)
        self._choose()
        result: dict[str, t.Any] = {
            "changed": False,
            "set_id": self.found.set_id,
            "created": self.found.created,
            "repository_id": repository.repository_id,
            "restored": [],
            "replaced_set_id": "",
            "containers": [],
            "downtime_seconds": 0.0,
            "checked": [],
            "warnings": self.warnings,
        }
        if all(self._same(part) for part in self.parts):
            return result
        self._check_targets()
        self._check_space()
        result["changed"] = True
        result["restored"] = [{key: part[key] for key in ("kind", "name", "files", "bytes", "target")} for part in self.parts]
        result["containers"] = [{"name": one["name"], "found": one["found"]} for one in self._users()]
        return result

    def run(self) -> dict[str, t.Any]:
        result = self.plan()
        if not result["changed"]:
            freeze.release(self.docker, self.inherited)
            return result
        self.state = {
            "txid": self.txid,
            "set_id": self.found.set_id,
            "phase": "staging",
            "restart": self.request.restart,
            "held": self.inherited,
            "parts": [{"name": p["name"], "target": p["target"], "box": p["box"]} for p in self.parts],
            "made_volumes": [],
        }
        self._note("staging")
        guard = Guard(lambda: _recover_patiently(self.request.manifest_dir, self.journal, self.docker), 7 * 86400)
        guard.arm()
        try:
            self._stage()
            result["checked"] = self._check()
            self._begin_keeping()
            began = time.monotonic()
            self._hold()
            if self.keeping is not None:
                self.warnings += self.keeping.finish(settle=False)["warnings"]
                result["replaced_set_id"] = self.keeping.request.set_id
            self._swap()
            if self.request.restart:
                freeze.release(self.docker, self.state["held"])
            result["downtime_seconds"] = round(time.monotonic() - began, 3)
            self._finish()
        except BaseException as exc:
            self._back(exc)
            raise
        finally:
            if not os.path.exists(self.journal):
                guard.disarm()
        result["containers"] = [{"name": one["name"], "found": one["found"]} for one in self.state["held"]]
        if self.request.keep:
            never = {self.found.set_id, result["replaced_set_id"]}
            self.warnings += sets.forget(self.engine, self.request.manifest_dir, result["repository_id"], self.request.keep, never)[1]
        result["warnings"] = self.warnings
        return result

    def _choose(self) -> None:
        manifest, request = self.found.manifest, self.request
        wanted = {("volume", name) for name in request.volumes} | {("path", os.path.normpath(path)) for path in request.paths}
        have = {(part["kind"], part["name"]) for part in manifest["parts"]}
        if wanted - have:
            names = ", ".join(sorted(name for _kind, name in wanted - have))
            raise DeliveryError(
                f"restore from the set {self.found.set_id}",
                f"it does not hold {names}",
                f"It holds {', '.join(sorted(name for _kind, name in have))}.",
                "config",
            )
        for number, (part, stored) in enumerate(zip(manifest["parts"], self.found.parts)):
            if wanted and (part["kind"], part["name"]) not in wanted:
                continue
            part = {**part, **self._place(part)}
            if part["kind"] == "volume":
                volume = self.docker.volume(part["name"])
                target = sets.volume_part(part["name"], volume).source if volume is not None else ""
            else:
                target = part["name"]
            self.parts.append({**part, "number": number, "target": target, "box": f"{target}.{self.txid}" if target else ""})
            self.stored.append(stored)
        for check in request.checks:
            if not any(check["name"] in part["known_as"] for part in self.parts):
                raise DeliveryError(
                    f"check the copy of {check['name']}",
                    "it is not among what is restored",
                    f"That is {', '.join(part['name'] for part in self.parts)}.",
                    "config",
                )

    def _place(self, part: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """Where a part goes, when not to where it came from: the keys of it that change."""
        name, project, target = str(part["name"]), self.request.project, self.request.target
        labels = (part.get("volume") or {}).get("labels") or {}
        known_as = [name, str(labels.get(sets.VOLUME_LABEL, name))]
        if part["kind"] == "volume" and project:
            before = str(labels.get(PROJECT_LABEL, ""))
            name = f"{project}_{name[len(before) + 1 :] if before and name.startswith(before + '_') else name}"
            labels = {**labels, **({PROJECT_LABEL: project} if before else {})}
            # A volume with a place of its own on this host would be that very place again.
            return {"name": name, "known_as": known_as, "volume": {**part["volume"], "labels": labels, "options": {}}}
        if target:
            below = os.path.join("volumes", name) if part["kind"] == "volume" else os.path.join("paths", name.lstrip("/"))
            return {"kind": "path", "name": os.path.join(os.path.normpath(target), below), "known_as": known_as, "beside": True}
        if project:
            raise DeliveryError(
                f"restore {name} for the project {project}",
                "it would replace what it was taken from",
                "Name the volumes wanted, or give a target for the paths.",
                "config",
            )
        return {"known_as": known_as}

    def _same(self, part: dict[str, t.Any]) -> bool:
        """Whether the live data is already what the set holds; counts first, since they cost no reading."""
        if not part["digest"] or not part["target"] or not os.path.lexists(part["target"]):
            return False
        rough = scan(part["target"], contents=False, vanishing=True)
        if (rough.files, rough.directories, rough.links, rough.bytes) != (part["files"], part["directories"], part["links"], part["bytes"]):
            return False
        return scan(part["target"], vanishing=True).digest == part["digest"]

    def _check_targets(self) -> None:
        for part in self.parts:
            target = part["target"]
            if not target:
                continue
            if os.path.ismount(target):
                raise DeliveryError(
                    f"restore {part['name']}",
                    f"{target} is a mount point, which cannot be exchanged in one step",
                    "Put the data in a directory below the mount point.",
                    "config",
                )
            if part.get("beside"):
                if os.path.lexists(target):
                    raise DeliveryError(f"restore beside, as {target}", "something is there already", "Give another target.", "config")
                continue
            if os.path.islink(target) or not os.path.isdir(os.path.dirname(target)):
                raise DeliveryError(
                    f"restore {part['name']}", f"{target} is a link, or its directory does not exist", "Make its directory first.", "config"
                )

    def _check_space(self) -> None:
        needed: dict[int, list[t.Any]] = {}
        for part in self.parts:
            place = os.path.dirname(part["target"]) if part["target"] else str(self.docker.info()["DockerRootDir"])
            while not os.path.isdir(place):
                place = os.path.dirname(place)
            entry = needed.setdefault(os.stat(place).st_dev, [place, 0, 0])
            entry[1] += part["bytes"]
            entry[2] += part["files"] + part["directories"] + part["links"] + 4
        for place, size, names in needed.values():
            space = os.statvfs(place)
            free = space.f_bavail * space.f_frsize
            if size + size // 20 + (8 << 20) > free or (space.f_files and names > space.f_favail):
                raise DeliveryError(
                    f"restore the set {self.found.set_id} beside the live data",
                    f"{place} has {sets.megabytes(free)} and {space.f_favail} names free; {sets.megabytes(size)} and {names} are needed",
                    "Make room there.",
                    "capacity",
                )

    def _stage(self) -> None:
        """Write every part beside its target and compare it with the manifest; the app may go on running."""
        box = ""
        try:
            for part in self.parts:
                if not part["target"]:
                    self._make_volume(part)
                if part.get("beside"):
                    os.makedirs(os.path.dirname(part["box"]), mode=0o700, exist_ok=True)
                os.mkdir(part["box"], 0o700)
            folder = os.path.join(self.parts[0]["box"], "set")
            os.mkdir(folder, 0o700)
            brought = self.catalog.bring(self.found, folder)
            if read_json(os.path.join(brought, "manifest.json")) != self.found.manifest:
                raise DeliveryError(
                    f"restore the set {self.found.set_id}",
                    f"its manifest in {self.request.manifest_dir} is not what was stored with it",
                    "Somebody changed that file. Remove it, and the one in the repository counts.",
                    "snapshot",
                )
            for part, stored in zip(self.parts, self.stored):
                box = part["box"]
                _probe_exchange(box)
                tree = os.path.join(box, "tree")
                self.engine.restore(stored, tree)
                if not carried.put_together(tree, part, part["number"], brought)[1]:
                    self.warnings.append(_said_of_moving(part))
            sync_file_systems(part["box"] for part in self.parts)
        except OSError as exc:
            full = exc.errno in (errno.ENOSPC, errno.EDQUOT)
            raise DeliveryError(
                f"restore the set {self.found.set_id} beside the live data",
                f"{os.strerror(exc.errno or 0)} ({exc.filename or box})",
                "Make room there." if full else "Nothing was replaced.",
                "capacity" if full else "snapshot",
            ) from exc

    def _check(self) -> list[str]:
        """Let the programs that were asked for look at the copies; names of the parts they were content with."""
        done = []
        for check in self.request.checks:
            part = next(one for one in self.parts if check["name"] in one["known_as"])
            box = part["box"]
            folders = {name: os.path.join(box, name) for name in ("tree", "upper", "work", "merged")}
            for name in ("upper", "work", "merged"):
                os.mkdir(folders[name], 0o700)
            options = f"lowerdir={folders['tree']},upperdir={folders['upper']},workdir={folders['work']}"
            mounted = run(["mount", "-t", "overlay", "-o", options, "overlay", folders["merged"]], timeout=60)
            if not mounted.ok:  # this file system cannot be below an overlay
                copied = run(["cp", "-a", "--reflink=auto", f"{folders['tree']}/.", folders["merged"]], timeout=86400)
                if not copied.ok:
                    raise DeliveryError(f"copy {part['name']} for its check", copied.last_lines(2), "Make room there.", "capacity")
            try:
                self._run_check(check, part, folders["merged"])
            finally:
                self.docker.remove(_checker(self.txid), force=True, volumes=True)
                if mounted.ok:
                    run(["umount", folders["merged"]], timeout=60)
                for name in ("upper", "work", "merged"):
                    shutil.rmtree(folders[name])
            done.append(part["name"])
        return done

    def _run_check(self, check: t.Mapping[str, t.Any], part: t.Mapping[str, t.Any], folder: str) -> None:
        env = {str(key): str(value) for key, value in (check.get("env") or {}).items()}
        argv = ["docker", "run", "--rm", "--network", "none", "--pull", "never", "--name", _checker(self.txid)]
        argv += ["--volume", f"{folder}:{check['mount']}", *(word for name in env for word in ("--env", name))]
        argv += ["--user", str(check["user"])] if check.get("user") else []
        command = [str(word) for word in check["command"]]
        argv += ["--entrypoint", command[0], str(check["image"]), *command[1:]]
        timeout = float(check.get("timeout") or 600)
        answer = run(argv, timeout=timeout, env={**env, "DOCKER_HOST": f"unix://{self.docker.socket}"})
        if not answer.ok:
            said = (answer.stdout + answer.stderr).strip().splitlines()[-3:]
            raise DeliveryError(
                f"check the restored copy of {part['name']} with {command[0]}",
                f"no end after {timeout:g} s" if answer.timed_out else f"it ended with {answer.code}: {' / '.join(said)}",
                "Nothing was replaced. Use another set, or look at the check.",
                "snapshot",
            )

    def _make_volume(self, part: dict[str, t.Any]) -> None:
        """A volume that is gone is made again as it was described, so that Compose takes it for its own."""
        volume = part["volume"]
        argv = ["docker", "volume", "create", "--driver", volume["driver"]]
        for key, value in sorted(volume["labels"].items()):
            argv += ["--label", f"{key}={value}"]
        for key, value in sorted(volume["options"].items()):
            argv += ["--opt", f"{key}={value}"]
        self.state["made_volumes"].append(part["name"])
        self._note("staging")
        made = run([*argv, part["name"]], timeout=60, env={"DOCKER_HOST": f"unix://{self.docker.socket}"})
        if not made.ok:
            raise DeliveryError(f"create the volume {part['name']}", made.last_lines(2), "Create it and run again.", "snapshot")
        part["target"] = sets.volume_part(part["name"], self.docker.volume(part["name"])).source
        part["box"] = f"{part['target']}.{self.txid}"
        for noted in self.state["parts"]:
            if noted["name"] == part["name"]:
                noted.update(target=part["target"], box=part["box"])
        self._note("staging")

    def _users(self) -> list[freeze.Held]:
        volumes = {part["name"] for part in self.parts if part["kind"] == "volume"}
        places = [part["target"] for part in self.parts if part["target"]]
        return freeze.plan_hold(freeze.users(self.docker, volumes, places, writers_only=False), "stop_paused")

    def _hold(self) -> None:
        ours = self._users()
        known = {one["id"] for one in ours}
        self.state["held"] = ours + [one for one in self.inherited if one["id"] not in known]
        self._note("holding")
        killed = freeze.hold(self.docker, ours, self.request.stop_timeout)
        if killed:
            self.warnings.append(f"had to be killed to stop: {', '.join(killed)}")
        running = [one["name"] for one in self._users()]
        if running:
            raise DeliveryError(
                f"restore the set {self.found.set_id}",
                f"still or again running on its data: {', '.join(running)}",
                "Stop whatever starts them.",
                "snapshot",
            )

    def _begin_keeping(self) -> None:
        """Store most of what is about to be replaced while the app runs; the rest follows when it stands still, so it is exact."""
        existing = [part for part in self.parts if os.path.lexists(part["target"]) and part["name"] not in self.state["made_volumes"]]
        if not self.request.keep_current or not existing:
            return
        now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y%m%d-%H%M%S")
        volumes = [part["name"] for part in existing if part["kind"] == "volume"]
        paths = [part["name"] for part in existing if part["kind"] == "path"]
        request = sets.Request(
            set_id=f"replaced-{self.found.manifest.get('replaces') or self.found.set_id}"[:140] + f"-{now}",
            manifest_dir=self.request.manifest_dir,
            volumes=volumes,
            paths=paths,
            metadata=self.found.manifest["metadata"],
            consistency="none",
            replaces=self.found.set_id,
        )
        parts = sets.resolve(self.docker, request)
        sets.check_room(self.catalog, parts)
        self.keeping = Taking(self.engine, self.docker, request, parts, [], {}, self.catalog)
        self.keeping.warm_up()

    def _swap(self) -> None:
        for noted in self.state["parts"]:
            noted["fresh_inode"] = os.lstat(os.path.join(noted["box"], "tree")).st_ino
            noted["had_old"] = os.path.lexists(noted["target"])
        self._note("swapping")
        try:
            _exchange_all(self.state)
        except OSError as exc:
            raise DeliveryError(
                f"put the restored data of {self.found.set_id} in place", f"{exc.strerror} ({exc.filename})", "It was undone.", "snapshot"
            ) from exc
        self._note("releasing")

    def _finish(self) -> None:
        """Prove that the replaced state is kept, then remove it."""
        if self.keeping is not None:
            try:
                self.keeping.settle()
            except DeliveryError as exc:
                boxes = ", ".join(part["box"] for part in self.state["parts"])
                self.warnings.append(f"the set of the replaced state cannot be read back ({exc.seen}); that state was left in {boxes}")
                os.unlink(self.journal)
                return
        _remove_boxes(self.state)
        os.unlink(self.journal)

    def _back(self, error: BaseException) -> None:
        """Undo after a failure that this process saw itself."""
        if self.keeping is not None and self.state["phase"] in ("staging", "holding"):
            self.keeping.abandon()
        if not os.path.exists(self.journal):
            return
        if self.state["phase"] == "releasing":
            # The data is in place; what failed is a container's start, which the next run and its error say.
            _remove_boxes(self.state)
            os.unlink(self.journal)
            return
        if self.state["phase"] == "swapping":
            _exchange_back(self.state)
        try:
            freeze.release(self.docker, self.state["held"], error if isinstance(error, DeliveryError) else None)
        finally:
            _remove_boxes(self.state)
            _remove_made_volumes(self.docker, self.state)
            os.unlink(self.journal)

    def _note(self, phase: str) -> None:
        self.state["phase"] = phase
        write_json(self.journal, self.state)


def _checker(txid: str) -> str:
    """Name of the container in which the checks of a restore run."""
    return f"selfhost-delivery-check-{txid}"


def _said_of_moving(part: t.Mapping[str, t.Any]) -> str:
    text = f"{part['name']} moved while it was taken, and could be compared only as far as it did not"
    return f"{text}; its {part['database']['kind']} makes it whole when it starts" if part.get("database") else text


def _exchange_all(state: t.Mapping[str, t.Any]) -> None:
    """Put every fresh tree in place that is not there yet; inode numbers tell new from old."""
    for part in state["parts"]:
        tree = os.path.join(part["box"], "tree")
        if os.path.lexists(part["target"]) and os.lstat(part["target"]).st_ino == part["fresh_inode"]:
            continue
        if part["had_old"]:
            exchange(tree, part["target"])
        else:
            os.rename(tree, part["target"])
        sync_directory(os.path.dirname(part["target"]))
        sync_directory(part["box"])


def _exchange_back(state: t.Mapping[str, t.Any]) -> None:
    for part in state["parts"]:
        tree = os.path.join(part["box"], "tree")
        if os.path.lexists(part["target"]) and os.lstat(part["target"]).st_ino == part["fresh_inode"]:
            if part["had_old"]:
                exchange(tree, part["target"])
            else:
                os.rename(part["target"], tree)
            sync_directory(os.path.dirname(part["target"]))


def _remove_boxes(state: t.Mapping[str, t.Any]) -> None:
    """Remove what lies beside the targets: half a copy, or the data that was replaced."""
    for part in state["parts"]:
        if part["box"] and os.path.lexists(part["box"]):
            if os.path.ismount(os.path.join(part["box"], "merged")):
                run(["umount", "--lazy", os.path.join(part["box"], "merged")], timeout=60)
            shutil.rmtree(part["box"])


def _remove_made_volumes(docker: Engine, state: t.Mapping[str, t.Any]) -> None:
    """Remove the empty volumes that a restore made and then did not fill."""
    for name in state["made_volumes"]:
        run(["docker", "volume", "rm", name], timeout=60, env={"DOCKER_HOST": f"unix://{docker.socket}"})


def _probe_exchange(box: str) -> None:
    one, other = os.path.join(box, "one"), os.path.join(box, "other")
    os.mkdir(one)
    os.mkdir(other)
    try:
        exchange(one, other)
    except OSError as exc:
        raise DeliveryError(
            f"exchange two directories in {os.path.dirname(box)}",
            exc.strerror or str(exc),
            "Use a file system that can (ext4, XFS, Btrfs, tmpfs).",
            "config",
        ) from exc
    finally:
        os.rmdir(one)
        os.rmdir(other)


def _end_orphans(txid: str) -> None:
    """End what a killed run still had writing into its boxes; the transaction id is in their command lines."""
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        pid = int(path.split("/")[2])
        try:
            with open(path, "rb") as handle:
                words = handle.read().split(b"\0")
            if pid != os.getpid() and any(f".{txid}/".encode() in word for word in words[1:]):
                os.kill(pid, signal.SIGKILL)
                while os.path.exists(f"/proc/{pid}/exe") and os.readlink(f"/proc/{pid}/exe"):
                    time.sleep(0.01)
        except (OSError, ValueError):
            continue


def _journals(manifest_dir: str) -> list[str]:
    return sorted(glob.glob(os.path.join(glob.escape(manifest_dir), ".restore-*.json")))


def _recover_patiently(manifest_dir: str, journal: str, docker: Engine) -> None:
    """``recover`` as the guard calls it: the engine may be restarting, another run may be faster."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            with sets.locked(manifest_dir):
                recover(journal, docker)
            return
        except (DeliveryError, OSError):
            time.sleep(1)
