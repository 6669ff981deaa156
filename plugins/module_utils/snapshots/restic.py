# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""restic (0.14 as in Debian, and newer) as a snapshot engine."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
import typing as t
import uuid
from dataclasses import replace

from ansible_collections.selfhost.delivery.plugins.module_utils.command import CommandResult
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import Base, RepositoryStatus, Stored


class Restic(Base):
    """See ``engines.SnapshotEngine``. Repositories: whatever restic takes; one snapshot holds all sources of a call."""

    name = "restic"
    keeps_everything = True
    sees_every_change = True

    #: Config file and status of the repository when it was last opened.
    _opened: tuple[bytes, RepositoryStatus] = (b"", RepositoryStatus("absent"))

    def environment(self) -> dict[str, str]:
        return {
            **self.settings.env,
            "RESTIC_REPOSITORY": self.settings.repository,
            "RESTIC_PASSWORD": self.settings.password,
            "RESTIC_CACHE_DIR": os.path.join(self.directory, "cache"),
        }

    def version(self) -> str:
        return self.call("version", timeout=60).stdout.strip()

    def status(self) -> RepositoryStatus:
        nothing = RepositoryStatus("missing" if self.remembered_id() else "absent", free_bytes=self.free_bytes())
        config = self._config()
        if config is None:
            return nothing
        if config and config == self._opened[0]:
            # It holds the id, encrypted: the same bytes are the same repository, and opening it costs most of a second.
            return replace(self._opened[1], free_bytes=self.free_bytes())
        answer = self.call("cat", "config", "--json", timeout=300)
        if answer.ok:
            self._opened = config, self.remember(RepositoryStatus("ready", str(json.loads(answer.stdout)["id"]), self.free_bytes()))
            return self._opened[1]
        if answer.code == 10 or "Is there a repository at the following location?" in answer.stderr:
            return nothing
        tried = f"open the restic repository {self._shown}"
        if answer.code == 12 or "wrong password" in answer.stderr:
            raise DeliveryError(tried, "the password is wrong", "Give the password it was created with.", "config")
        raise self.failure(tried, answer, "Check that its disk is mounted and readable.")

    def create(self) -> RepositoryStatus:
        self.refuse_creation()
        made = self.call("init", timeout=300)
        if not made.ok:
            raise self.failure(f"create the restic repository {self._shown}", made, "Check the place and its rights.")
        return self.status()

    def connect(self) -> RepositoryStatus:
        found = self.status()
        if found.state == "ready":
            return found
        seen = "there is no repository any more, though this host used one there" if found.state == "missing" else "there is no repository"
        raise DeliveryError(
            f"open the restic repository {self._shown}", seen, "Mount its disk, or create it with restic_repository.", "config"
        )

    def change_password(self, password: str) -> None:
        self.refuse_writing("change the password")
        self.prepare_directories()
        descriptor, path = tempfile.mkstemp(dir=self.directory)  # 0600; restic takes it from a file only
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as handle:
                handle.write(password + "\n")
            done = self.call("key", "passwd", "--new-password-file", path, timeout=300)
        finally:
            os.unlink(path)
        if not done.ok:
            raise self.failure(f"change the password of the restic repository {self._shown}", done)

    def call(self, *arguments: str, **options: t.Any) -> CommandResult:
        shared = [*(["--no-lock"] if self.settings.read_only else []), *(["--no-cache"] if self.settings.cache_mb == 0 else [])]
        return super().call(*shared, *arguments, **options)

    def prepare(self, sources: t.Sequence[str]) -> None:
        """restic has no policies."""

    def snapshot(self, sources: t.Sequence[str], tags: t.Mapping[str, str], full_read: bool, timeout: float, moving: bool) -> list[Stored]:
        self.refuse_writing("take a snapshot")
        for source in sources:
            # restic ends with 0 when one of several sources is not there.
            if not os.path.lexists(source):
                raise DeliveryError("take a restic snapshot", f"{source} does not exist", "Check volumes and paths.", "snapshot")
        mark = uuid.uuid4().hex
        every = {**tags, "call": mark}
        marks = [argument for key, value in every.items() for argument in ("--tag", f"{key}={value}")]
        result: CommandResult | None = None
        try:
            result = self.call("backup", "--json", *(["--force"] if full_read else []), *marks, "--", *sources, timeout=timeout)
            skipped = _skipped(result.stdout + "\n" + result.stderr) if moving and result.code == 3 else []
            if result.ok or skipped:
                # What the summary does not tell (0.14 gives a part of the id) is asked for later: writers may be held still now.
                told = _summary(result.stdout)
                counts = int(told["total_files_processed"]), int(told["total_bytes_processed"])
                return [
                    Stored(
                        source, told["snapshot_id"], "", every, "", *counts, skipped=_below(source, skipped), added=told.get("data_added")
                    )
                    for source in sources
                ]
        except BaseException:
            self._discard(mark)
            raise
        self._discard(mark)
        raise self.failure("take a restic snapshot", result, "Make every file readable and try again.")

    def identified(self, stored: t.Sequence[Stored]) -> list[Stored]:
        listed = self._listed()
        found = []
        for one in stored:
            made = [item for item in listed if item["id"].startswith(one.snapshot)]
            if len(made) != 1:
                raise DeliveryError(
                    f"find the snapshot {one.snapshot} in the restic repository {self._shown}",
                    f"{len(made)} have this id after it was stored",
                    "The repository was exchanged or unmounted meanwhile.",
                    "snapshot",
                )
            found += [replace(part, skipped=one.skipped, added=one.added) for part in _parts(made[0], [one.source], one.files, one.bytes)]
        return found

    def contents(self) -> list[Stored]:
        found = [one for item in self._listed() for one in _parts(item, item["paths"])]
        return sorted((one for one in found if "set" in one.tags), key=lambda one: one.created)

    def restore(self, stored: Stored, target: str) -> None:
        # 0.14 restores to <target>/<full source path> only; it is moved out afterwards, on the same file system.
        box = f"{target}.box"
        os.mkdir(box, 0o700)
        pattern = re.sub(r"([\\*?\[\]])", r"\\\1", stored.source)
        done = self.call("restore", stored.snapshot, "--target", box, "--include", pattern)
        inside = box + stored.source
        if not done.ok or not os.path.lexists(inside):
            raise self.failure(f"restore {stored.source} from restic", done)
        os.rename(inside, target)
        shutil.rmtree(box)

    def verify(self, stored: t.Sequence[Stored]) -> None:
        for snapshot in sorted({one.snapshot for one in stored}):
            # check would read nothing, or the whole repository; a dump reads exactly this snapshot, each blob against its hash.
            done = self.call("dump", "--archive", "tar", snapshot, "/", keep_stdout=False)
            if not done.ok:
                raise self.failure("read the snapshot back from restic", done, "The repository is damaged; do not rely on it.")

    def delete(self, stored: t.Sequence[Stored]) -> None:
        if not stored:
            return
        ids = sorted({one.snapshot for one in stored})
        if self.call("forget", *ids, timeout=3600).ok:
            return
        # One may be gone already, or a killed backup has left a lock: unlock takes those of dead processes, forget wants none.
        self.call("unlock", timeout=300)
        left = sorted(item["id"] for item in self._listed() if item["id"].startswith(tuple(ids)))
        if left:
            done = self.call("forget", *left, timeout=3600)
            if not done.ok:
                raise self.failure("delete restic snapshots", done)

    def prune(self) -> None:
        self.call("unlock", timeout=300)
        done = self.call("prune")
        if not done.ok:
            raise self.failure("prune the restic repository", done)

    def _config(self) -> bytes | None:
        """The config file of a repository on a file system, ``None`` where it has none; empty where only restic can tell."""
        if not self.settings.local_path:
            return b""
        try:
            with open(os.path.join(self.settings.local_path, "config"), "rb") as handle:
                return handle.read()
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
            return None
        except OSError:
            return b""

    @property
    def _shown(self) -> str:
        """The repository without what may be a password in its URL."""
        return re.sub(r"//[^/@]*@", "//********@", self.settings.repository)

    def _listed(self) -> list[dict[str, t.Any]]:
        answer = self.call("snapshots", "--json", timeout=600)
        if not answer.ok:
            raise self.failure(f"list the restic repository {self._shown}", answer)
        return json.loads(answer.stdout) or []

    def _discard(self, mark: str) -> None:
        answer = self.call("snapshots", "--json", "--tag", f"call={mark}", timeout=600)
        ids = [item["id"] for item in (json.loads(answer.stdout) or [])] if answer.ok else []
        if ids:
            self.call("unlock", timeout=300)
            self.call("forget", *ids, timeout=3600)


def _summary(stdout: str) -> dict[str, t.Any]:
    """The last message of ``backup --json``."""
    for line in reversed(stdout.splitlines()):
        if line.startswith("{"):
            message = json.loads(line)
            if message.get("message_type") == "summary":
                return message
    raise DeliveryError("take a restic snapshot", "restic printed no summary", "Use restic 0.14 or newer.", "snapshot")


def _skipped(output: str) -> list[str]:
    """Full names of what ``backup --json`` could not read; none when it does not say."""
    found = []
    for line in output.splitlines():
        if line.startswith("{"):
            message = json.loads(line)
            if message.get("message_type") == "error":
                item = str(message.get("item") or "")
                if not item or "\ufffd" in item:  # a name that JSON cannot hold might be any
                    return []
                found.append(item)
    return found


def _below(source: str, names: t.Iterable[str]) -> tuple[bytes, ...]:
    """Names below ``source`` as ``scan`` calls them."""
    return tuple(os.fsencode(name[len(source) + 1 :]) for name in names if name == source or name.startswith(source + "/"))


def _parts(item: t.Mapping[str, t.Any], sources: t.Iterable[str], files: int = -1, size: int = -1) -> list[Stored]:
    """One restic snapshot as one part for each of its sources; the counts are those of the whole snapshot."""
    tags = dict(tag.split("=", 1) for tag in item.get("tags") or [] if "=" in tag)
    return [Stored(source, item["id"], item["tree"], tags, item["time"], files, size) for source in sources]
