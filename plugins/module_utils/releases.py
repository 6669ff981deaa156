# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Releases of an app on its coordinator: the lease that lets one run work, the journal of what it began, and the folders.

Times in files are UTC, ``2026-11-21T09:00:00.123Z``. Everything written here survives a crash at any instruction:
a reader sees the state before or after a write, never a part of it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
import time
import typing as t
from dataclasses import asdict, dataclass, field
from datetime import datetime, timedelta, timezone

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import (
    point_symlink,
    read_json,
    sync_directory,
    write_atomically,
    write_json,
)

STEPS = (
    "planned",
    "locked",
    "preflighted",
    "pinned",
    "pulled",
    "snapshotted",
    "dependencies",
    "held",
    "hosts",
    "migrated",
    "rolling",
    "verifying",
    "baking",
    "committed",
)
UNDO_STEPS = ("reverting", "restoring")
ENDS = ("committed", "aborted", "rolled_back", "frozen", "rollback_failed")
EVENTS = ("begin", "end", "fail", "note")
KINDS = ("promote", "rollback")

#: Once one of these has begun, there is something to undo.
CHANGING_STEPS = frozenset(("dependencies", "held", "hosts", "migrated", "rolling"))

RELEASE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_TIME_FORMAT = "%Y-%m-%dT%H:%M:%S.%fZ"
_ID_TIME = "%Y%m%d-%H%M%S"
_POLL_SECONDS = 0.25


def timestamp(moment: datetime | None = None) -> str:
    """``moment`` (default: now) as it is written into files."""
    moment = moment or datetime.now(timezone.utc)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def parse_time(text: str) -> datetime:
    """The opposite of ``timestamp``; ``ValueError`` for anything else."""
    return datetime.strptime(text, _TIME_FORMAT).replace(tzinfo=timezone.utc)


# --- journal ------------------------------------------------------------------------------------------------------------


class Journal:
    """The append-only record of one release: ``releases/<id>/journal.jsonl``.

    Each call appends one line and returns only after it is on the disk. A line that a crash cut short is ignored by
    readers and cut off by the next append.
    """

    def __init__(self, path: str, run_id: str) -> None:
        self.path = path
        self.run_id = run_id

    @classmethod
    def open(cls, path: str, run_id: str) -> Journal:
        return cls(path, run_id)

    def begin(self, step: str, service: str | None = None, **data: t.Any) -> dict[str, t.Any]:
        """To be called before the first change of ``step``."""
        return self.append("begin", step, service, data)

    def end(self, step: str, service: str | None = None, **data: t.Any) -> dict[str, t.Any]:
        return self.append("end", step, service, data)

    def fail(self, step: str, service: str | None = None, **data: t.Any) -> dict[str, t.Any]:
        return self.append("fail", step, service, data)

    def note(self, step: str, service: str | None = None, **data: t.Any) -> dict[str, t.Any]:
        return self.append("note", step, service, data)

    def append(self, event: str, step: str, service: str | None, data: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
        """Write one entry and return it. ``data`` must be JSON-able and hold no secret."""
        if event not in EVENTS:
            raise ValueError(f"unknown journal event {event!r}")
        created = not os.path.exists(self.path)
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)
        with os.fdopen(descriptor, "r+b") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            entries, whole = _parse_journal(handle.read(), self.path)
            entry: dict[str, t.Any] = {
                "seq": entries[-1]["seq"] + 1 if entries else 1,
                "time": timestamp(),
                "run": self.run_id,
                "step": step,
                "event": event,
            }
            if service is not None:
                entry["service"] = service
            entry["data"] = dict(data)
            handle.truncate(whole)
            handle.seek(whole)
            handle.write(json.dumps(entry, separators=(", ", ": ")).encode() + b"\n")
            handle.flush()
            os.fsync(handle.fileno())
        if created:
            sync_directory(os.path.dirname(os.path.abspath(self.path)))
        return entry

    def entries(self) -> list[dict[str, t.Any]]:
        """All whole entries, oldest first; none when the file does not exist."""
        return _read_journal_file(self.path)

    def append_once(self, event: str, step: str, service: str | None = None, data: t.Mapping[str, t.Any] | None = None) -> bool:
        """``append``, unless this run has said the same last about this step, as a task does that is tried again. A note is always new."""
        about = [one for one in self.entries() if one["step"] == step and one.get("service") == service and one["event"] != "note"]
        if about and event != "note" and about[-1]["event"] == event and about[-1]["run"] == self.run_id:
            return False
        self.append(event, step, service, data or {})
        return True


def _read_journal_file(path: str) -> list[dict[str, t.Any]]:
    try:
        with open(path, "rb") as handle:
            return _parse_journal(handle.read(), path)[0]
    except FileNotFoundError:
        return []


def _parse_journal(content: bytes, path: str) -> tuple[list[dict[str, t.Any]], int]:
    """The whole entries, and the number of bytes they take."""
    entries: list[dict[str, t.Any]] = []
    whole = 0
    lines = content.splitlines(keepends=True)
    for number, line in enumerate(lines, 1):
        entry = None
        if line.endswith(b"\n"):
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
        if isinstance(entry, dict) and isinstance(entry.get("seq"), int):
            entries.append(entry)
            whole += len(line)
        elif number == len(lines):
            break  # the crash came in the middle of this write: it was never acknowledged
        else:
            raise DeliveryError(
                f"Reading the journal {path}",
                f"line {number} is not a journal entry",
                "The file was changed by something else. Look at it, repair or remove that line, and run again.",
            )
    return entries, whole


@dataclass(frozen=True)
class OpenStep:
    """A step that was begun and whose end nobody wrote."""

    step: str
    service: str | None
    since: str


@dataclass
class ReleaseState:
    """What a journal says.

    ``status`` is ``open`` or one of ``ENDS``; ``phase`` the last step that ended; ``current`` what had begun without an end.
    ``services`` maps each service whose roll began, in that order, to ``rolling``, ``rolled``, ``failed``, ``reverting`` or
    ``reverted``. ``durations`` are seconds per finished or failed step, what ran side by side counted once;
    ``service_durations`` those of each service of ``rolling``.
    ``changed``: something that needs undo began. ``migrated``: the migrator began. ``serving_new``: a routed service may have
    been switched (a ``rolling`` entry counts unless its data says ``routed: false``) and was not taken back.
    ``commit_begun``: the release was verified, so that it has to be finished, not undone.
    ``snapshot``: the id of the set whose making ended well. ``failed``: the last ``fail`` entry.
    """

    status: str = "open"
    phase: str = ""
    current: OpenStep | None = None
    services: dict[str, str] = field(default_factory=dict)
    durations: dict[str, float] = field(default_factory=dict)
    service_durations: dict[str, float] = field(default_factory=dict)
    changed: bool = False
    migrated: bool = False
    serving_new: bool = False
    commit_begun: bool = False
    snapshot: str = ""
    failed: dict[str, t.Any] | None = None
    begun: list[str] = field(default_factory=list)

    @property
    def current_steps(self) -> set[str]:
        """Steps that were begun and neither ended nor failed."""
        return set(self.begun)

    @property
    def open(self) -> bool:
        return self.status == "open"

    @property
    def rolled(self) -> list[str]:
        """Services that run the new image, in the order they were rolled."""
        return [name for name, state in self.services.items() if state == "rolled"]

    def as_dict(self) -> dict[str, t.Any]:
        return {**asdict(self), "open": self.open, "rolled": self.rolled}


def fold(entries: t.Iterable[t.Mapping[str, t.Any]]) -> ReleaseState:
    """Read a journal from its first line to its last."""
    state = ReleaseState()
    begun: dict[tuple[str, str | None], str] = {}
    worked_since: dict[str, str] = {}
    switched: set[str | None] = set()
    for entry in entries:
        step, event, service = entry["step"], entry["event"], entry.get("service")
        data = entry.get("data") or {}
        key = (step, service)
        if event == "begin":
            begun.pop(key, None)
            if not any(open_step == step for open_step, dummy in begun):
                worked_since[step] = entry["time"]
            begun[key] = entry["time"]
            state.changed |= step in CHANGING_STEPS
            state.migrated |= step == "migrated"
            state.commit_begun |= step == "committed"
        elif event in ("end", "fail"):
            since = begun.pop(key, None)
            if since is not None:
                # A step's services may be within its own begin and end, or run side by side: its time is counted once.
                if not any(open_step == step for open_step, dummy in begun):
                    _add_seconds(state.durations, step, worked_since[step], entry["time"])
                if step == "rolling" and service is not None:
                    _add_seconds(state.service_durations, service, since, entry["time"])
            if event == "fail":
                state.failed = dict(entry)
            else:
                state.phase = step
                if step in ENDS:
                    state.status = step
                if step == "snapshotted":
                    state.snapshot = str(data.get("set_id") or data.get("snapshot") or state.snapshot)
        if step == "rolling" and data.get("routed") is not False and event != "note":
            switched.add(service)
        if step == "reverting" and event == "end":
            switched.discard(service)
        if service is not None and step in ("rolling", "reverting"):
            _fold_service(state.services, service, step, event)
    state.serving_new = bool(switched)
    state.begun = list(dict.fromkeys(step for step, dummy in begun))
    if begun and state.status == "open":
        (step, service), since = list(begun.items())[-1]
        state.current = OpenStep(step, service, since)
    return state


def _add_seconds(durations: dict[str, float], name: str, since: str, until: str) -> None:
    seconds = max(0.0, (parse_time(until) - parse_time(since)).total_seconds())
    durations[name] = round(durations.get(name, 0.0) + seconds, 3)


def _fold_service(services: dict[str, str], service: str, step: str, event: str) -> None:
    if event == "note":
        return
    names = {"begin": "rolling", "end": "rolled"} if step == "rolling" else {"begin": "reverting", "end": "reverted"}
    services[service] = names.get(event, "failed")


# --- who holds the lock -------------------------------------------------------------------------------------------------


def process_started(pid: int) -> str | None:
    """When process ``pid`` started, in clock ticks since boot; ``None`` when there is no such process or it is a zombie."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as handle:
            fields = handle.read().rpartition(")")[2].split()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESRCH):
            return None
        raise
    return None if fields[0] in ("Z", "X", "x") else fields[19]


def boot_id() -> str:
    """Identity of this boot of this kernel, empty where there is none."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as handle:
            return handle.read().strip()
    except OSError:
        return ""


def pid_namespace() -> str:
    """Identity of the namespace in which our process ids have their meaning, empty where there is none."""
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def provably_dead(holder: t.Mapping[str, t.Any]) -> bool:
    """Whether ``holder`` ran on this very kernel and process table and is gone; ``False`` whenever that cannot be known."""
    pid, started = holder.get("pid"), holder.get("pid_started")
    if not pid or not started or not holder.get("boot_id") or not holder.get("pid_namespace"):
        return False
    if holder["boot_id"] != boot_id() or holder["pid_namespace"] != pid_namespace():
        return False
    return process_started(int(pid)) != str(started)


def describe_holder(lock: t.Mapping[str, t.Any]) -> str:
    """Who, since when, at which step, for a person: ``deploy@ci-1 (pid 42), since …, at step rolling, release …``."""
    holder = lock.get("holder") or {}
    who = f"{holder.get('user') or 'someone'}@{holder.get('host') or 'an unknown host'}"
    parts = [f"{who} (pid {holder['pid']})" if holder.get("pid") else who, f"since {lock.get('since', 'an unknown time')}"]
    if lock.get("step"):
        parts.append(f"at step {lock['step']}")
    if lock.get("release_id"):
        parts.append(f"release {lock['release_id']}")
    if holder.get("ci_url"):
        parts.append(str(holder["ci_url"]))
    return ", ".join(parts)


@dataclass(frozen=True)
class Acquired:
    """``previous_dead_holder``: the whole lock of the run that was replaced, when there was one.

    ``reentered``: this run had the lease already.
    """

    previous_dead_holder: dict[str, t.Any] | None = None
    reentered: bool = False


class Lease:
    """``lock.json`` of a deploy dir: one run at a time, across processes and machines.

    A process that was handed a run id (a module called by a role) makes ``Lease(deploy_dir, run_id)`` and uses ``check`` and
    ``renew``; only the first one of a run calls ``acquire``.
    """

    def __init__(self, deploy_dir: str, run_id: str = "") -> None:
        self.deploy_dir = deploy_dir
        self.run_id = run_id
        self.path = os.path.join(deploy_dir, "lock.json")

    def read(self) -> dict[str, t.Any] | None:
        """The lock as it is now, ``None`` when nobody holds it."""
        try:
            lock = read_json(self.path)
        except ValueError:
            lock = {}
        if lock is not None and not (isinstance(lock, dict) and lock.get("run_id")):
            raise DeliveryError(
                f"Reading the lock {self.path}",
                "it is not a lock of this collection",
                "Make sure that no promotion is running, then remove the file.",
                "lock",
            )
        return lock

    @staticmethod
    def status(lock: t.Mapping[str, t.Any]) -> str:
        """``held``, ``dead`` (its process is provably gone), ``expired`` or ``freeze`` (until a person lifts it)."""
        if lock.get("kind") == "freeze":
            return "freeze"
        if provably_dead(lock.get("holder") or {}):
            return "dead"
        try:
            expired = parse_time(lock["expires"]) < datetime.now(timezone.utc)
        except (KeyError, ValueError):
            expired = False
        return "expired" if expired else "held"

    def acquire(
        self,
        run_id: str,
        holder: t.Mapping[str, t.Any],
        release_id: str,
        ttl: float,
        wait: float = 0,
        on_wait: t.Callable[[dict[str, t.Any], float], None] | None = None,
        takeover: bool = False,
    ) -> Acquired:
        """Become the only run for ``ttl`` seconds, renewable.

        A living holder is waited for up to ``wait`` seconds (``on_wait(lock, seconds left)`` about once a second); a freeze
        never is. ``takeover`` takes it from anyone. Raises ``DeliveryError(lock)`` that says who holds it.
        """
        deadline = time.monotonic() + wait
        told = 0.0
        while True:
            with self._guard():
                lock = self.read()
                status = self.status(lock) if lock else "free"
                same = lock is not None and lock["run_id"] == run_id and status != "freeze"
                if same or takeover or status in ("free", "dead", "expired"):
                    self._create(run_id, holder, release_id, ttl, replaced=lock, since=lock["since"] if same and lock else None)
                    self.run_id = run_id
                    return Acquired(None if same else lock, same)
            if lock is None:
                raise AssertionError("only a lock that is there can be in the way")
            left = deadline - time.monotonic()
            if status == "freeze" or left <= 0:
                raise lock_error(self.deploy_dir, lock)
            if on_wait and time.monotonic() - told >= 1:
                told = time.monotonic()
                on_wait(lock, left)
            time.sleep(min(_POLL_SECONDS, max(left, 0.01)))

    def renew(self, step: str | None = None, ttl: float | None = None) -> None:
        """Push the expiry ``ttl`` seconds (default: as long as before) into the future, and note ``step``; raises when it is lost."""
        with self._guard():
            lock = self._own()
            lock["ttl"] = ttl or lock.get("ttl") or 900
            now = datetime.now(timezone.utc)
            lock.update(heartbeat=timestamp(now), expires=timestamp(now + timedelta(seconds=lock["ttl"])))
            if step is not None:
                lock["step"] = step
            write_json(self.path, lock)

    def release(self) -> bool:
        """Give it back; ``False`` when this run does not hold it, which is no error. A freeze stays."""
        with self._guard():
            lock = self.read()
            if lock is None or lock["run_id"] != self.run_id or lock.get("kind") == "freeze":
                return False
            self._remove()
            return True

    def check(self) -> None:
        """Raise ``DeliveryError(lock)`` unless this run still holds the lease; to be asked before each change."""
        self._own()

    def freeze(self, reason: str, holder: t.Mapping[str, t.Any] | None = None, release_id: str | None = None) -> None:
        """Turn the lease of this run, or a free lock, into one that only a person lifts (``unlock``)."""
        with self._guard():
            lock = self.read()
            if lock is not None and lock["run_id"] != self.run_id:
                raise lock_error(self.deploy_dir, lock)
            now = timestamp()
            lock = {"since": now, "step": "", **(lock or {})}
            lock.update(run_id=self.run_id, kind="freeze", reason=reason, heartbeat=now, expires=None)
            lock["holder"] = dict(holder or lock.get("holder") or {})
            lock["release_id"] = release_id or lock.get("release_id") or ""
            write_json(self.path, lock)

    def unlock(self, takeover: bool = False) -> dict[str, t.Any] | None:
        """Remove a freeze or a lock whose holder is gone, with ``takeover`` any lock; return what was removed."""
        with self._guard():
            lock = self.read()
            if lock is None:
                return None
            if not takeover and self.status(lock) == "held" and lock["run_id"] != self.run_id:
                raise lock_error(self.deploy_dir, lock)
            self._remove()
            return lock

    def _own(self) -> dict[str, t.Any]:
        lock = self.read()
        if lock is None or lock["run_id"] != self.run_id or lock.get("kind") == "freeze":
            seen = "lease lost: nobody holds it any more" if lock is None else f"lease lost: it is held by {describe_holder(lock)}"
            raise DeliveryError(
                f"Working in {self.deploy_dir}",
                seen,
                "Another run took over or a person removed the lock. This one stops here and changes nothing more.",
                "lock",
                lock=lock,
            )
        return lock

    def _create(
        self,
        run_id: str,
        holder: t.Mapping[str, t.Any],
        release_id: str,
        ttl: float,
        replaced: dict[str, t.Any] | None,
        since: str | None,
    ) -> None:
        now = datetime.now(timezone.utc)
        lock = {
            "run_id": run_id,
            "kind": "run",
            "holder": dict(holder),
            "release_id": release_id,
            "step": "locked",
            "since": since or timestamp(now),
            "heartbeat": timestamp(now),
            "expires": timestamp(now + timedelta(seconds=ttl)),
            "ttl": ttl,
        }
        if replaced is not None:
            write_json(self.path, lock)
            return
        # Exclusive even against a writer that does not know the guard, and never there without its content.
        temporary = f"{self.path}.{os.getpid()}-{threading.get_ident()}"
        write_json(temporary, lock)
        try:
            os.link(temporary, self.path)
        except FileExistsError:
            raise lock_error(self.deploy_dir, self.read() or lock) from None
        finally:
            os.unlink(temporary)
        sync_directory(self.deploy_dir)

    def _remove(self) -> None:
        os.unlink(self.path)
        sync_directory(self.deploy_dir)

    def _guard(self) -> t.ContextManager[None]:
        """Make read-decide-write on ``lock.json`` one step.

        Held for milliseconds, and not ``.busy``: a takeover must be able to stop a module that holds that one for minutes.
        The file is never removed, so that nobody can lock another file of the same name.
        """
        return _flocked(self.deploy_dir, ".lock", 30, "The lock's guard file stays locked; look for a stopped process that holds it.")


def lock_error(deploy_dir: str, lock: t.Mapping[str, t.Any]) -> DeliveryError:
    """Why ``lock`` cannot be taken and what a person does about it."""
    if lock.get("kind") == "freeze":
        return DeliveryError(
            f"Taking the lock of {deploy_dir}",
            f"it is frozen ({lock.get('reason') or 'no reason given'}), by {describe_holder(lock)}",
            "A person has to decide: look at what runs now, then lift it with selfhost.delivery.release state=unlocked "
            "or start with takeover=true.",
            "lock",
            lock=dict(lock),
        )
    return DeliveryError(
        f"Taking the lock of {deploy_dir}",
        f"another run holds it: {describe_holder(lock)}, expires {lock.get('expires')} unless renewed",
        "Wait for it to end (lock_wait), or if it is known to be dead start with takeover=true: its release is then recovered first.",
        "lock",
        lock=dict(lock),
    )


class Keepalive:
    """Renews ``lease`` in the background during a long step.

    ``with Keepalive(lease, ttl, step):`` renews at once and then every quarter of ``ttl``. When another run took over,
    ``lost`` holds the error, ``on_lost`` is called once (from the thread), and leaving the block raises it.
    """

    def __init__(
        self,
        lease: Lease,
        ttl: float = 900,
        step: str | None = None,
        on_lost: t.Callable[[DeliveryError], None] | None = None,
    ) -> None:
        self.lease = lease
        self.ttl = ttl
        self.step = step
        self.on_lost = on_lost
        self.lost: DeliveryError | None = None
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease-keepalive", daemon=True)

    def __enter__(self) -> Keepalive:
        self.lease.renew(self.step, self.ttl)
        self._thread.start()
        return self

    def __exit__(self, kind: t.Any, value: t.Any, traceback: t.Any) -> None:
        self._stop.set()
        self._thread.join()
        if self.lost is not None and kind is None:
            raise self.lost

    def _run(self) -> None:
        while not self._stop.wait(self.ttl / 4):
            try:
                self.lease.renew(self.step, self.ttl)
            except DeliveryError as error:
                self.lost = error
                if self.on_lost:
                    self.on_lost(error)
                return
            except OSError:
                continue  # a full disk must not end the step; the next quarter tries again


def busy(deploy_dir: str, timeout: float = 60) -> t.ContextManager[None]:
    """Held by a module while it changes the host; waits up to ``timeout`` seconds for another module, then ``DeliveryError(lock)``."""
    remedy = "A module of an earlier run still works on this host. Wait until it has stopped, then run again."
    return _flocked(deploy_dir, ".busy", timeout, remedy)


@contextlib.contextmanager
def _flocked(deploy_dir: str, name: str, timeout: float, remedy: str) -> t.Iterator[None]:
    path = os.path.join(deploy_dir, name)
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
    except (FileNotFoundError, NotADirectoryError):
        raise DeliveryError(f"Locking {path}", "the deploy dir does not exist", "Run setup.yml for this host first.") from None
    except PermissionError:
        raise DeliveryError(f"Locking {path}", "permission denied", "Run as the owner of the deploy dir (become: true).") from None
    try:
        deadline = time.monotonic() + timeout
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise DeliveryError(f"Locking {path}", f"it was held for {timeout:g} seconds", remedy, "lock") from None
                time.sleep(0.02)
        yield
    finally:
        os.close(descriptor)


# --- release folders ----------------------------------------------------------------------------------------------------


def new_release_id(tag: str, moment: datetime | None = None, deploy_dir: str = "") -> str:
    """``<YYYYmmdd-HHMMSS>-<tag>``, UTC; later than every one in ``deploy_dir``.

    Ids say what came after what. So where the clock was set back, or two begin within a second, this is not quite the time.
    """
    stamp = (moment or datetime.now(timezone.utc)).strftime(_ID_TIME)
    known = (re.match(r"\d{8}-\d{6}(?=-)", name) for name in release_ids(deploy_dir)) if deploy_dir else ()
    newest = next((found.group() for found in known if found), "")
    if stamp <= newest:
        with contextlib.suppress(ValueError):  # of digits that are no time
            stamp = (datetime.strptime(newest, _ID_TIME) + timedelta(seconds=1)).strftime(_ID_TIME)
    return f"{stamp}-{tag}"


def release_path(deploy_dir: str, release_id: str) -> str:
    """The folder of a release; refuses an id that is no plain name."""
    if not RELEASE_ID.fullmatch(release_id):
        raise DeliveryError("Looking for a release", f"{release_id!r} is no release id", "Take one from status.yml.")
    return os.path.join(deploy_dir, "releases", release_id)


def journal_path(deploy_dir: str, release_id: str) -> str:
    return os.path.join(release_path(deploy_dir, release_id), "journal.jsonl")


def read_journal(deploy_dir: str, release_id: str) -> list[dict[str, t.Any]]:
    """All entries of a release, oldest first."""
    return _read_journal_file(journal_path(deploy_dir, release_id))


def read_release(deploy_dir: str, release_id: str) -> dict[str, t.Any]:
    """``release.json`` of a release; ``DeliveryError(config)`` when there is none."""
    path = os.path.join(release_path(deploy_dir, release_id), "release.json")
    try:
        record = read_json(path)
    except ValueError:
        remedy = "The file was changed by something else; repair or remove this release's folder."
        raise DeliveryError(f"Reading {path}", "it is not JSON", remedy) from None
    if not isinstance(record, dict):
        raise DeliveryError("Looking for a release", f"{release_id} is not in {deploy_dir}/releases", "status.yml lists what there is.")
    return record


def create_release(
    deploy_dir: str, record: t.Mapping[str, t.Any], run_id: str, files: t.Iterable[t.Mapping[str, t.Any]] = ()
) -> str:
    """Make the folder of a release, whole or not at all, with its first journal entries ``planned`` and ``locked``; return its path."""
    path = release_path(deploy_dir, record["id"])
    parent = os.path.dirname(path)
    with contextlib.suppress(FileExistsError):
        os.mkdir(parent, 0o750)
        sync_directory(deploy_dir)
    for name in os.listdir(parent):
        if name.startswith(".new-"):  # left by a run that died right here
            shutil.rmtree(os.path.join(parent, name))
    if os.path.exists(path):
        raise DeliveryError("Starting a release", f"{record['id']} exists already", "Give another release_id, or none.")
    draft = os.path.join(parent, f".new-{record['id']}")
    os.mkdir(draft, 0o750)
    write_json(os.path.join(draft, "release.json"), dict(record))
    write_files(draft, files)
    journal = Journal(os.path.join(draft, "journal.jsonl"), run_id)
    journal.begin("planned", kind=record.get("kind"), tag=record.get("tag"))
    journal.end("planned")
    journal.begin("locked")
    journal.end("locked")
    os.rename(draft, path)
    sync_directory(parent)
    return path


def lay_out(deploy_dir: str, release_id: str, files: t.Iterable[t.Mapping[str, t.Any]]) -> bool:
    """The release folder on a host that is not the coordinator: its files, no ``release.json``. Says whether anything changed."""
    path = release_path(deploy_dir, release_id)
    made = not os.path.isdir(path)
    os.makedirs(path, 0o750, exist_ok=True)
    return bool(write_files(path, files)) or made


def adopt(deploy_dir: str, release_id: str, keep: int) -> tuple[bool, list[str], list[str]]:
    """The commit on a host that is not the coordinator: ``current`` moves, and all but the ``keep`` newest folders go.

    Returns whether ``current`` moved, the ids removed, and warnings. Nothing is gone back to from these folders: what a rollback needs is
    on the coordinator.
    """
    moved = current_id(deploy_dir) != release_id
    if moved:
        point_symlink(os.path.join(deploy_dir, "current"), os.path.join("releases", release_id))
    old = [name for name in release_ids(deploy_dir)[max(keep, 1):] if name != release_id] if keep else []
    return (moved, *_remove_releases(deploy_dir, old))


def write_files(folder: str, files: t.Iterable[t.Mapping[str, t.Any]]) -> list[str]:
    """Write ``{name, content, mode}`` files into ``folder``, each atomically; return the names of those that changed."""
    changed = []
    for spec in files:
        name, mode = spec["name"], int(str(spec.get("mode") or "0600"), 8)
        parts = name.split("/")
        if not all(parts) or {"..", "."} & set(parts) or name in ("release.json", "journal.jsonl", "rollout.json"):
            seen = f"{name!r} is no name for a file in it"
            raise DeliveryError("Writing the release folder", seen, "Give a relative path inside the folder.")
        path = os.path.join(folder, name)
        content = spec.get("content") or ""
        try:
            with open(path, encoding="utf-8") as handle:
                if handle.read() == content and os.fstat(handle.fileno()).st_mode & 0o7777 == mode:
                    continue
        except (FileNotFoundError, UnicodeDecodeError):
            os.makedirs(os.path.dirname(path), 0o750, exist_ok=True)
        write_atomically(path, content, mode)
        changed.append(name)
    return changed


def update_release(deploy_dir: str, release_id: str, **fields: t.Any) -> bool:
    """Set fields of ``release.json``; say whether that changed anything."""
    record = read_release(deploy_dir, release_id)
    if all(key in record and record[key] == value for key, value in fields.items()):
        return False
    write_json(os.path.join(release_path(deploy_dir, release_id), "release.json"), {**record, **fields})
    return True


def fingerprint(tag: str, images: t.Mapping[str, t.Any], files: t.Iterable[t.Mapping[str, t.Any]], release_id: str) -> str:
    """A hash of everything that makes two releases the same: tag, digests, files. The release's own id inside a file does not count."""
    content = {str(spec["name"]): str(spec.get("content") or "").replace(release_id, "<release>") for spec in files}
    text = json.dumps({"tag": tag, "images": dict(images), "files": content}, sort_keys=True)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def release_ids(deploy_dir: str) -> list[str]:
    """Ids of all release folders, newest first."""
    try:
        names = os.listdir(os.path.join(deploy_dir, "releases"))
    except (FileNotFoundError, NotADirectoryError):
        return []
    return sorted((name for name in names if RELEASE_ID.fullmatch(name)), reverse=True)


def current_id(deploy_dir: str) -> str | None:
    """The id ``current`` points at, or ``None``."""
    try:
        return os.path.basename(os.readlink(os.path.join(deploy_dir, "current"))) or None
    except OSError:
        return None


def list_releases(deploy_dir: str, limit: int | None = None) -> list[dict[str, t.Any]]:
    """Newest first: each release's ``release.json`` with ``state``, its folded journal (see ``ReleaseState.as_dict``)."""
    found = []
    for release_id in release_ids(deploy_dir)[:limit]:
        try:
            record = read_release(deploy_dir, release_id)
        except DeliveryError:
            if os.path.exists(os.path.join(release_path(deploy_dir, release_id), "release.json")):
                raise
            continue  # not one of ours: folders appear whole, with their release.json
        found.append({**record, "id": release_id, "state": fold(read_journal(deploy_dir, release_id)).as_dict()})
    return found


def current_release(deploy_dir: str) -> dict[str, t.Any] | None:
    """The ``release.json`` that ``current`` points at, or ``None``."""
    release_id = current_id(deploy_dir)
    return read_release(deploy_dir, release_id) if release_id else None


def open_release(deploy_dir: str) -> dict[str, t.Any] | None:
    """The newest release without an end, as in ``list_releases``, or ``None``."""
    return next((release for release in list_releases(deploy_dir) if release["state"]["open"]), None)


def previous_committed(deploy_dir: str) -> dict[str, t.Any] | None:
    """The release a rollback without argument goes to: the committed one before the one that serves now.

    A rollback takes back what was promoted since: nobody is led to a release that was left for the one before it, neither right
    after that nor after the next promotion.
    """
    current = current_release(deploy_dir)
    if current is None:
        return None
    found = [r for r in reversed(list_releases(deploy_dir)) if r["state"]["status"] == "committed" and r["id"] <= current["id"]]
    way: list[dict[str, t.Any]] = []  # what a walk back comes through, the one that serves last
    for release in found:
        tag = release.get("tag")
        if release.get("kind") == "rollback":
            if any(one.get("tag") == tag for one in way):
                while way[-1].get("tag") != tag:
                    way.pop()
                continue
            if not any(r.get("tag") == tag and r.get("kind") != "rollback" and r["id"] < release["id"] for r in found):
                way.clear()  # its promotion is older than what is kept here, so all of this came after it
        if not way or way[-1].get("tag") != tag:
            way.append(release)
    return way[-2] if len(way) > 1 else None


def owed_release(deploy_dir: str, hosts: t.Iterable[str]) -> dict[str, t.Any] | None:
    """The newest release that was not taken back on one of ``hosts``, which was not reached; as in ``list_releases``, or ``None``."""
    asked = set(hosts)
    failed = (one for one in list_releases(deploy_dir) if one["state"]["status"] == "rollback_failed")
    return next((one for one in failed if asked & set(one.get("owed") or ())), None)


def owed_after(record: t.Mapping[str, t.Any], hosts: t.Iterable[str], lost: t.Iterable[str]) -> list[str]:
    """Hosts that a release has yet to be taken back on, after it was on all of ``hosts`` but the ``lost``."""
    return sorted((set(record.get("owed") or ()) - set(hosts)) | set(lost))


def finish_release(
    deploy_dir: str,
    release_id: str,
    run_id: str,
    end: str,
    failure: t.Mapping[str, t.Any] | None = None,
    owed: t.Sequence[str] = (),
) -> bool:
    """Give a release its end; ``False`` when it had that end already.

    ``owed``: with ``rollback_failed``, the hosts that were not reached; the release is taken back there when they are.

    For ``committed`` a crash in between is finished by calling this again: the journal says that the commit began, so
    recovery goes forward. Order: begin, ``current``, ``release.json``, end.
    """
    if end not in ENDS:
        raise ValueError(f"{end!r} is no end of a release")
    journal = Journal(journal_path(deploy_dir, release_id), run_id)
    state = fold(journal.entries())
    if state.status == end:
        return bool(owed) and update_release(deploy_dir, release_id, owed=list(owed))
    if state.status in ("committed", "rolled_back", "aborted"):
        raise DeliveryError(
            f"Ending release {release_id} as {end}", f"it has ended as {state.status}", "An end is final; start a new release."
        )
    if end == "committed":
        if not state.commit_begun:
            journal.begin("committed")
        point_symlink(os.path.join(deploy_dir, "current"), os.path.join("releases", release_id))
    record = read_release(deploy_dir, release_id)
    if end in ("aborted", "rolled_back") and current_id(deploy_dir) == release_id:
        _point_back(deploy_dir, record.get("previous"))  # taken back after its commit had begun
    ended = datetime.now(timezone.utc)
    fields: dict[str, t.Any] = {
        "result": end,
        "ended": timestamp(ended),
        "seconds": round((ended - parse_time(record["started"])).total_seconds(), 3),
        "durations": state.durations,
        "snapshot": state.snapshot or record.get("snapshot") or "",
    }
    if owed or record.get("owed"):
        fields["owed"] = list(owed)
    if record.get("ended"):  # what was owed has been done, perhaps days later: it took no longer for that
        fields.update(ended=record["ended"], seconds=record["seconds"])
    if run_id != record.get("run_id"):
        fields["ended_by"] = run_id
    if failure:
        fields.update(failure_class=failure.get("class") or "", failure=failure.get("message") or "")
    update_release(deploy_dir, release_id, **fields)
    journal.end(end, **({"failure_class": fields["failure_class"]} if fields.get("failure_class") else {}))
    return True


def _point_back(deploy_dir: str, previous: str | None) -> None:
    link = os.path.join(deploy_dir, "current")
    if previous:
        point_symlink(link, os.path.join("releases", previous))
    else:
        os.unlink(link)
        sync_directory(deploy_dir)


def prune_releases(deploy_dir: str, keep: int) -> tuple[list[str], list[str]]:
    """Remove release folders beyond the ``keep`` newest; return ``(removed ids, warnings)``.

    Never the current one, the one a rollback goes to, one that is open or frozen, the ``keep`` newest committed ones (failed
    attempts must not push out what can be gone back to), nor one that a snapshot set goes back to.
    """
    releases = list_releases(deploy_dir)
    committed = [release["id"] for release in releases if release["state"]["status"] == "committed"]
    safe = {current_id(deploy_dir), (previous_committed(deploy_dir) or {}).get("id"), *committed[:keep], *_kept_by_sets(deploy_dir)}
    doomed = (one for one in releases[max(keep, 1):] if one["id"] not in safe and one["state"]["status"] not in ("open", "frozen"))
    return _remove_releases(deploy_dir, [release["id"] for release in doomed if not release.get("owed")])


def _remove_releases(deploy_dir: str, ids: t.Iterable[str]) -> tuple[list[str], list[str]]:
    removed, warnings = [], []
    for release_id in ids:
        path = release_path(deploy_dir, release_id)
        # Renamed first: a crash in the middle of the removal leaves no half release.
        doomed = os.path.join(os.path.dirname(path), f".new-removed-{release_id}")
        try:
            os.rename(path, doomed)
            shutil.rmtree(doomed)
            removed.append(release_id)
        except OSError as error:
            warnings.append(f"the old release folder {path} could not be removed: {error}")
    return removed, warnings


def recovery_owed(unfinished: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """What is owed to a release without an end (as ``open_release`` gives it).

    ``id``, ``action`` (``finish`` its commit, ``undo`` its changes, ``abort``: there were none), ``phase``, ``state``, ``release``.
    ``hosts``: where alone that is owed (see ``owed_release``), empty for everywhere.
    """
    state = unfinished["state"]
    action = "finish" if state["commit_begun"] else "undo" if state["changed"] else "abort"
    record = {key: value for key, value in unfinished.items() if key != "state"}
    hosts = list(record.get("owed") or ()) if not state["open"] else []
    return {"id": unfinished["id"], "action": action, "phase": state["phase"], "state": state, "release": record, "hosts": hosts}


# --- for people ---------------------------------------------------------------------------------------------------------

_PHASES_SHOWN = ("pulled", "snapshotted", "migrated", "rolling", "verifying", "baking")


def summarize(release: t.Mapping[str, t.Any], current: str | None = None) -> dict[str, t.Any]:
    """The short form of one of ``list_releases``; ``phases`` are seconds by step, ``current`` the id that serves."""
    state = release["state"]
    return {
        "id": release["id"],
        "tag": release.get("tag"),
        "kind": release.get("kind"),
        "result": state["status"],
        "phase": state["phase"],
        "current": release["id"] == current,
        "started": release.get("started"),
        "ended": release.get("ended"),
        "seconds": release.get("seconds"),
        "phases": state["durations"],
        "snapshot": state["snapshot"],
        "failure_class": release.get("failure_class") or "",
        "failure": release.get("failure") or "",
        "owed": list(release.get("owed") or ()),
    }


def table(summaries: t.Sequence[t.Mapping[str, t.Any]]) -> list[str]:
    """Lines for a terminal, one a release; the one that serves has a ``*``. Times are seconds, but ``when``, which is UTC."""
    shown = [phase for phase in _PHASES_SHOWN if phase != "baking" or any(one["phases"].get(phase) for one in summaries)]
    rows = [["release", "tag", "result", "when", "total", *shown, "snapshot"]]
    for one in summaries:
        result = f"{one['result']} ({one['failure_class']})" if one["failure_class"] else one["result"]
        if one["kind"] == "rollback":
            result += ", a rollback"
        if one.get("owed"):
            result += f", not taken back on {', '.join(one['owed'])}"
        rows.append(
            [
                one["id"] + (" *" if one["current"] else ""),
                str(one["tag"]),
                result,
                str(one["ended"] or one["started"] or "")[:19].replace("T", " "),
                _seconds(one["seconds"]),
                *(_seconds(one["phases"].get(phase)) for phase in shown),
                one["snapshot"] or "-",
            ]
        )
    numbers = range(4, 5 + len(shown))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = (cell.rjust(widths[column]) if column in numbers else cell.ljust(widths[column]) for column, cell in enumerate(row))
        lines.append("  ".join(cells).rstrip())
    return lines


def sum_up(record: t.Mapping[str, t.Any], state: ReleaseState) -> list[str]:
    """A few lines about one release: how it ended, what took how long, why it failed."""
    lines = [f"{record.get('tag')} {state.status.replace('_', ' ')} in {record.get('environment')}, release {record['id']}"]
    if record.get("seconds") is not None:
        lines[0] += f", {record['seconds']:.1f} s"
    phases = []
    for step, seconds in state.durations.items():
        if seconds >= 0.05:
            services = ", ".join(f"{name} {took:.1f}" for name, took in state.service_durations.items()) if step == "rolling" else ""
            phases.append(f"{step} {seconds:.1f} s" + (f" ({services})" if services else ""))
    if phases:
        lines.append("  " + ", ".join(phases))
    if state.snapshot:
        lines.append(f"  snapshot {state.snapshot}")
    if record.get("failure"):
        lines.append(f"  [{record.get('failure_class') or 'unknown'}] {record['failure']}")
    if record.get("owed"):
        lines.append(f"  not taken back, since not reached: {', '.join(record['owed'])}")
    return lines


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _kept_by_sets(deploy_dir: str) -> set[str]:
    """Releases that served when a snapshot set was taken: going back to the set needs them."""
    folder = os.path.join(deploy_dir, "snapshots")
    names = os.listdir(folder) if os.path.isdir(folder) else []
    found = set()
    for name in names:
        if name.endswith(".manifest.json"):
            with contextlib.suppress(ValueError):
                found.add(str(((read_json(os.path.join(folder, name)) or {}).get("metadata") or {}).get("previous") or ""))
    return found


# --- evidence from the registry -----------------------------------------------------------------------------------------


def gate_passed(
    records: t.Iterable[t.Mapping[str, t.Any]], environment: str, digest: str, signed: bool = False
) -> tuple[bool, str]:
    """Whether ``digest`` was committed in ``environment`` and not taken back since; and why, in words.

    ``records`` are those attached to the image. One that ended ``aborted`` counts for nothing: the image never ran. With ``signed`` only
    those count that have a ``signer``.
    """
    about = [
        record
        for record in records
        if record.get("environment") == environment and record.get("digest", digest) == digest and record.get("result") != "aborted"
    ]
    if not about:
        return False, f"{digest} has no record of {environment}: it was never committed there"
    if signed:
        about = [record for record in about if record.get("signer")]
        if not about:
            return False, f"{digest} has records of {environment}, but none of them was signed by a key of delivery_record_keys"
    newest = max(about, key=lambda record: str(record.get("created") or ""))
    when = newest.get("created") or "an unknown time"
    if newest.get("result") != "committed":
        return False, f"{digest} ended as {newest.get('result')} in {environment} at {when}"
    return True, f"{digest} was committed in {environment} at {when}"
