# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The small interface behind which Kopia and restic are the same thing.

An engine moves bytes between this host and its repository, and says what it holds. It knows nothing of containers,
manifests or restore transactions: those are in ``sets`` and ``restore``.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import typing as t
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.command import CommandResult, run
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json, write_json

Names = t.Sequence[bytes]


@dataclass(frozen=True)
class Stored:
    """One source inside the repository.

    ``snapshot`` is the engine's id, ``root`` names the stored content itself (Kopia: object id; restic: tree id).
    ``broken`` says why it must not be used (empty: sound). ``files`` and ``bytes`` are the engine's own counts, -1 if it has none.
    ``skipped``: names below the source that could not be read; ``added``: bytes that the repository grew by, for the whole snapshot.
    """

    source: str
    snapshot: str
    root: str
    tags: t.Mapping[str, str]
    created: str
    files: int = -1
    bytes: int = -1
    broken: str = ""
    skipped: Names = ()
    added: int | None = None


@dataclass(frozen=True)
class RepositoryStatus:
    """``state``: ``ready``, ``absent`` (nothing there, it may be created) or ``missing`` (the place itself is not there)."""

    state: str
    repository_id: str = ""
    free_bytes: int | None = None


@dataclass(frozen=True)
class Settings:
    """How to reach one repository. ``password`` and ``env`` are secret: they travel in the environment only."""

    repository: str
    password: str = field(repr=False)
    config_dir: str = ""
    program: str = ""
    env: t.Mapping[str, str] = field(default_factory=dict, repr=False)
    repository_id: str = ""
    read_only: bool = False
    cache_mb: int | None = None
    timeout: float = 86400.0

    @property
    def local_path(self) -> str:
        """The directory of a repository on a file system, else empty."""
        return self.repository if self.repository.startswith("/") else ""


class SnapshotEngine(t.Protocol):
    """What ``sets`` and ``restore`` need. All methods raise ``DeliveryError``; none puts a secret in it."""

    name: str
    settings: Settings
    #: Private directory of this repository on this host, 0700.
    directory: str
    #: True: names, attributes, hard links and devices all come back; false: ``scan.sidecar`` must carry the rest.
    keeps_everything: bool
    #: True: changed files are found by ctime and inode, so a second pass never keeps stale bytes.
    sees_every_change: bool

    def version(self) -> str: ...

    def close(self) -> None:
        """Leave no secret of the repository's place on the host."""

    def status(self) -> RepositoryStatus: ...

    def create(self) -> RepositoryStatus: ...

    def refuse_creation(self) -> None: ...

    def disconnect(self) -> bool:
        """Forget the repository on this host; whether there was something to forget."""

    def settle_policies(self, owner: bool, check_mode: bool) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
        """What is set in the repository itself, before and after this; ``owner``: this host is to do its maintenance."""

    def change_password(self, password: str) -> None:
        """From now on the repository opens with this one, and with the one before no more."""

    def free_bytes(self) -> int | None: ...

    def connect(self) -> RepositoryStatus: ...

    def prepare(self, sources: t.Sequence[str]) -> None:
        """Whatever the engine must know about the sources before the first pass."""

    def snapshot(self, sources: t.Sequence[str], tags: t.Mapping[str, str], full_read: bool, timeout: float, moving: bool) -> list[Stored]:
        """Store all sources in one call; one sound ``Stored`` for each, in order, or nothing is left behind and it raises.

        ``moving``: files may change and go away meanwhile; what could not be read is then in ``skipped``.

        It tells at once what it can without asking the repository again; the rest is for ``identified``.
        """

    def identified(self, stored: t.Sequence[Stored]) -> list[Stored]:
        """The same, each with the whole id and ``root``; raises when the repository does not have them."""

    def contents(self) -> list[Stored]:
        """Everything in the repository that carries a ``set`` tag, sound or not, oldest first."""

    def restore(self, stored: Stored, target: str) -> None:
        """Write the source to ``target``, which must not exist; its parent is private to root."""

    def verify(self, stored: t.Sequence[Stored]) -> None:
        """Read every byte of these back from the repository."""

    def delete(self, stored: t.Sequence[Stored]) -> None:
        """Forget exactly these. Gone already is fine."""

    def prune(self) -> None:
        """Give back the space of what was forgotten."""


class Base:
    """What the two engines share: the program, the private directories, the memory of which repository this is."""

    name = ""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        key = hashlib.sha256(settings.repository.encode()).hexdigest()[:16]
        base = settings.config_dir or "/var/lib/selfhost-delivery/engine"
        # A connection that must not write is another one, with settings of its own.
        self.directory = os.path.join(base, f"{self.name}-{key}{'-ro' if settings.read_only else ''}")
        self.program = settings.program or self.name
        if shutil.which(self.program) is None:
            raise DeliveryError(
                f"use the snapshot engine {self.name}",
                f"the program {self.program} is not on PATH",
                f"Install {self.name}, or give its place with the option program.",
                "config",
            )

    def prepare_directories(self) -> None:
        """Make the private directories, 0700."""
        for path in (self.directory, os.path.join(self.directory, "cache"), os.path.join(self.directory, "log")):
            os.makedirs(path, mode=0o700, exist_ok=True)
            os.chmod(path, 0o700)

    def remembered_id(self) -> str:
        """The id of the repository that this host used under this name before; empty at first."""
        return str((read_json(os.path.join(self.directory, "repository.json")) or {}).get("repository_id", ""))

    def remember(self, status: RepositoryStatus) -> RepositoryStatus:
        """Check the id of a repository against what was asked for and what was there last time, then remember it."""
        wanted, before = self.settings.repository_id, self.remembered_id()
        if wanted and wanted != status.repository_id:
            raise DeliveryError(
                f"use the repository {self.settings.repository}",
                f"its id is {status.repository_id}, not {wanted}",
                "This is another repository; check the path and what is mounted there.",
                "config",
            )
        if before and before != status.repository_id:
            raise DeliveryError(
                f"use the repository {self.settings.repository}",
                f"its id is {status.repository_id}, but this host used {before} there before",
                "Another repository took its place (an unmounted disk?). If that is meant, remove "
                f"{os.path.join(self.directory, 'repository.json')}.",
                "config",
            )
        if before != status.repository_id:
            self.prepare_directories()
            write_json(os.path.join(self.directory, "repository.json"), {"repository_id": status.repository_id})
        return status

    def refuse_creation(self) -> None:
        """A repository that this host already used must not be replaced by a new, empty one."""
        self.refuse_writing("create it")
        before = self.remembered_id()
        if before:
            raise DeliveryError(
                f"create the repository {self.settings.repository}",
                f"this host used a repository with the id {before} there, and it is gone",
                "Bring it back (mount its disk). If it is lost for good, remove "
                f"{os.path.join(self.directory, 'repository.json')} to start a new one.",
                "config",
            )
        path = self.settings.local_path
        if path and os.path.isdir(path) and os.listdir(path):
            raise DeliveryError(
                f"create the repository {path}", "the directory holds other files", "Give an empty or new directory.", "config"
            )

    def refuse_writing(self, doing: str) -> None:
        if self.settings.read_only:
            raise DeliveryError(
                f"{doing} in the repository {self.settings.repository.split('@')[-1]}",
                "it is opened to be read only",
                "Leave read_only out, or do what only reads (a restore without keep_current).",
                "config",
            )

    def disconnect(self) -> bool:
        """See ``SnapshotEngine``."""
        if not os.path.isdir(self.directory):
            return False
        shutil.rmtree(self.directory)
        return True

    def close(self) -> None:
        """See ``SnapshotEngine``; nothing by itself."""

    def settle_policies(self, owner: bool, check_mode: bool) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
        """For an engine without any."""
        return {}, {}

    def free_bytes(self) -> int | None:
        """Free space for a repository on a file system of this host; ``None`` for any other."""
        path = self.settings.local_path
        while path and not os.path.isdir(path):
            path = os.path.dirname(path)
        if not path:
            return None
        space = os.statvfs(path)
        return space.f_bavail * space.f_frsize

    def environment(self) -> dict[str, str]:
        """Variables for the program; the password is among them."""
        raise NotImplementedError

    def call(
        self, *arguments: str, timeout: float | None = None, keep_stdout: bool = True, more: t.Mapping[str, str] | None = None
    ) -> CommandResult:
        """Run the program with the private environment, and ``more`` of it."""
        self.prepare_directories()
        limit = timeout or self.settings.timeout
        env = {**self.environment(), **(more or {})}
        return run([self.program, *arguments], timeout=limit, env=env, grace=30.0, keep_stdout=keep_stdout)

    def failure(self, tried: str, result: CommandResult, remedy: str = "") -> DeliveryError:
        """A failed call as an error: the class tells a full disk from the rest, the password never shows."""
        # A panic of Go ends with its stack, which says nothing to anybody.
        told = [line for line in (result.stderr.strip() or result.stdout.strip()).splitlines() if " " in line.strip() and line[0] != "\t"]
        seen = "\n".join(told[-4:]) or f"{self.program} ended with {result.code}"
        if result.timed_out:
            seen = f"{self.program} took too long and was ended; {seen}"
        for secret in (self.settings.password, *self.settings.env.values()):
            if len(secret) > 3:
                seen = seen.replace(secret, "********")
        full = os.strerror(errno.ENOSPC).lower() in seen.lower() or "disk quota exceeded" in seen.lower()
        if full:
            remedy = "Make room on the disk, or let keep forget older sets."
        return DeliveryError(tried, seen, remedy, "capacity" if full else "snapshot")


def password_of(password: str | None, password_file: str | None) -> str:
    """The password from the option or the file; a trailing end of line is no part of it.

    Raises ``DeliveryError(config)`` when there is none, when both are given, or when others may read the file.
    """
    if password is not None and password_file is not None:
        raise DeliveryError("read the repository password", "both password and password_file are given", "Give one of them.", "config")
    if password_file is not None:
        try:
            mode = os.stat(password_file).st_mode
            with open(password_file, encoding="utf-8") as handle:
                password = handle.read().rstrip("\r\n")
        except OSError as exc:
            raise DeliveryError(
                f"read the repository password from {password_file}", os.strerror(exc.errno or 0), "Create it, mode 0600.", "config"
            ) from exc
        if mode & 0o077:
            raise DeliveryError(
                f"read the repository password from {password_file}",
                f"others may read it (mode {mode & 0o777:04o})",
                "Make it 0600.",
                "config",
            )
    if not password or password != password.strip() or "\0" in password or "\n" in password:
        raise DeliveryError(
            "read the repository password",
            "it is missing or empty, or begins or ends with a space, or holds a line break",
            "Give one line without space at its ends, with password or password_file.",
            "config",
        )
    return password


#: The engines, and what only their repositories have on a file system.
ENGINES = {"kopia": "kopia.repository.f", "restic": "keys"}


def program_of(name: str) -> str:
    """The program of an engine on this host, empty where there is none."""
    return shutil.which(name) or ""


def choose_engine(asked: str, repository: str, programs: t.Mapping[str, str]) -> str:
    """The engine asked for; with ``auto`` the one that made the repository, else Kopia where its program is, otherwise restic."""
    if asked != "auto":
        return asked
    if repository.startswith("/"):
        for name, trace in ENGINES.items():
            if os.path.exists(os.path.join(repository, trace)):
                return name
    return "kopia" if programs["kopia"] else "restic"


def engine_from(name: str, settings: Settings) -> SnapshotEngine:
    """The engine called ``kopia`` or ``restic``."""
    # Imported here since both need Base from this file.
    from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.kopia import Kopia
    from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.restic import Restic

    if name == "kopia":
        return Kopia(settings)
    return Restic(settings)
