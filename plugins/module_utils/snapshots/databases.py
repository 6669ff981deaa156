# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a database itself does for a snapshot of its files, each by one small class with the same four moments.

``begin``  before its files are read
``lock``   just before the writers are held still
``mark``   while they are: the set is the state of this moment
``collect`` afterwards, with time: what goes over the files at a restore, as a ``Delta``

They talk to it with the client program in its own container, whose environment has the credentials: none is ever an argument, and
none leaves the container. A session ends with this process, and the database then gives up by itself what it holds for it.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import selectors
import shutil
import subprocess
import tempfile
import time
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import PROJECT_LABEL, SERVICE_LABEL, Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import freeze
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.delta import Delta, checksum, copy_content
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import Entry, Scan, printable

#: Consistencies that are a database; ``LIVE`` ones need nobody held still.
LIVE = ("postgresql", "redis")
DATABASES = (*LIVE, "mysql", "sqlite")

_FROM_ENVIRONMENT = 'secret() { eval "v=\\${$1:-}; f=\\${$1_FILE:-}"; [ -n "$v" ] || [ -z "$f" ] || v=$(cat "$f"); printf %s "$v"; }; '
_PSQL = _FROM_ENVIRONMENT + (
    'PGUSER=$(secret POSTGRES_USER); export PGUSER="${PGUSER:-postgres}" PGPASSWORD="${PGPASSWORD:-$(secret POSTGRES_PASSWORD)}"; '
    "exec psql --no-psqlrc --quiet --no-align --tuples-only --set ON_ERROR_STOP=1 --no-password --dbname postgres 2>&1"
)
_MYSQL = _FROM_ENVIRONMENT + (
    "p=$(secret MARIADB_ROOT_PASSWORD); p=${p:-$(secret MYSQL_ROOT_PASSWORD)}; "
    '[ -z "$p" ] || export MYSQL_PWD="$p"; c=$(command -v mariadb || command -v mysql) || { echo "no client program"; exit 127; }; '
    'exec "$c" --no-defaults --user=root --batch --skip-column-names --unbuffered 2>&1'
)
_REDIS = _FROM_ENVIRONMENT + (
    'p=$(secret REDIS_PASSWORD); export REDISCLI_AUTH="${REDISCLI_AUTH:-$p}"; [ -n "$REDISCLI_AUTH" ] || unset REDISCLI_AUTH; '
    'c=$(command -v redis-cli || command -v valkey-cli) || { echo "no client program"; exit 127; }; '
    'while read -r line; do set -- $line; if [ "$1" = end ]; then echo "$2"; else "$c" --no-raw "$@" 2>&1; fi; done'
)


class Session:
    """A client program in a container that takes commands until it is closed. ``end``: the command that makes it say a given word."""

    def __init__(self, engine: Engine, container: str, name: str, script: str, end: str) -> None:
        self._tried = f"talk to the database in {name}"
        self._end = end
        self._process = subprocess.Popen(
            ["docker", "exec", "--interactive", container, "sh", "-c", script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={**os.environ, "DOCKER_HOST": f"unix://{engine.socket}"},
            start_new_session=True,
        )
        self._rest = b""

    def ask(self, command: str, timeout: float = 60.0) -> list[str]:
        """The lines it answers."""
        word = secrets.token_hex(8)
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(f"{command}\n{self._end.format(word)}\n".encode())
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # why it ended is in what it said
        deadline = time.monotonic() + timeout
        said = self._rest
        with selectors.DefaultSelector() as waiting:
            waiting.register(self._process.stdout, selectors.EVENT_READ)
            while word.encode() not in said:
                if not waiting.select(max(0.0, deadline - time.monotonic())):
                    raise DeliveryError(self._tried, f"no answer within {timeout:g} s", "Look whether it is busy or locked.", "snapshot")
                block = os.read(self._process.stdout.fileno(), 65536)
                if not block:
                    text = said.decode("utf-8", "replace").strip().splitlines()
                    raise DeliveryError(
                        self._tried,
                        " / ".join(text[-3:]) or "it ended without a word",
                        "It needs its client program and an account with the rights for a backup (docs/data.md).",
                        "snapshot",
                    )
                said += block
        answer, _word, rest = said.partition(word.encode())
        self._rest = rest.partition(b"\n")[2]
        return [line for line in answer.decode("utf-8", "replace").splitlines() if line.strip()]

    def close(self) -> None:
        """End it. A program in a container that froze meanwhile ends when it can."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Database:
    """What all have in common; by itself it does nothing. ``data`` is where its files are within the part, as of the host."""

    kind = ""
    script = ""
    end = ""

    def __init__(self, engine: Engine, container: t.Mapping[str, t.Any], part_source: str, destination: str) -> None:
        self.engine, self.source, self.destination = engine, part_source, destination
        self.container, self.name = str(container["Id"]), freeze.name_of(container)
        self.version = ""
        self._session: Session | None = None

    @property
    def session(self) -> Session:
        if self._session is None:
            self._session = Session(self.engine, self.container, self.name, self.script, self.end)
        return self._session

    def begin(self) -> None:
        """Make ready; the files may be read from now on."""

    def lock(self, timeout: float) -> None:
        """Hold back what a frozen moment could cut in two."""

    def mark(self) -> None:
        """This is the moment."""

    def collect(self, folder: str) -> Delta | None:
        """What goes over the files, its blobs in the new directory ``folder``."""
        return None

    def released(self) -> None:
        """The writers go on; nothing that keeps them waiting may be held any longer."""

    def close(self) -> None:
        """Give up everything held in the database; safe to repeat."""
        if self._session is not None:
            self._session.close()
            self._session = None

    def described(self) -> dict[str, str]:
        return {"kind": self.kind, "version": self.version, "container": self.name}

    def below(self, inside: str, proof: str) -> str:
        """A directory as the container calls it, as a name below the part; ``proof``: a file that must be in it."""
        relative = os.path.relpath(inside, self.destination)
        here = os.path.normpath(os.path.join(self.source, relative))
        if relative.startswith("..") or not os.path.lexists(os.path.join(here, proof)):
            raise DeliveryError(
                f"find the files of the database in {self.name}",
                f"it keeps them in {inside}, which is not in what is mounted on {self.destination}",
                "Declare its consistency for the volume that holds its files.",
                "config",
            )
        return "" if relative == "." else relative


class PostgreSQL(Database):
    """Its backup API: the files are read while it runs, and its log of the meantime, in the set as well, makes them whole.

    Nothing is held still. A session that ends early ends the backup and drops the slot that keeps the log.
    """

    kind = "postgresql"
    script = _PSQL
    end = "\\echo {}"

    _number = 0
    _data = ""
    _start = ""
    _stop: t.Sequence[str] = ()
    _control = b""

    def begin(self) -> None:
        (answer,) = self.session.ask(
            "SELECT concat_ws('|', current_setting('server_version_num'), current_setting('server_version'), pg_is_in_recovery(), "
            "current_setting('wal_level'), (SELECT count(*) FROM pg_tablespace), current_setting('data_directory'));"
        )
        number, self.version, standby, level, spaces, directory = answer.split("|", 5)
        self._number = int(number)
        why = ""
        if self._number < 110000:
            why = f"it is PostgreSQL {self.version}, and 11 is needed"
        elif standby == "t":
            why = "it is a standby"
        elif level == "minimal":
            why = "its wal_level is minimal"
        elif int(spaces) > 2:
            why = "it has tablespaces outside of its data directory"
        if why:
            raise DeliveryError(f"back up the PostgreSQL in {self.name}", why, "Use consistency pause for its volume.", "config")
        self._data = self.below(directory, "global/pg_control")
        if os.path.islink(os.path.join(self.source, self._data, "pg_wal")):
            raise DeliveryError(
                f"back up the PostgreSQL in {self.name}", "its pg_wal lies elsewhere", "Use consistency pause for both volumes.", "config"
            )
        slot = f"selfhost_delivery_{secrets.token_hex(4)}"
        # Where there is no slot to be had the log is kept by luck, and missed by name below.
        self.session.ask(
            f"\\set ON_ERROR_STOP 0\nSELECT 1 FROM pg_create_physical_replication_slot('{slot}', true, true);\n\\set ON_ERROR_STOP 1"
        )
        label = "selfhost-delivery"
        start = f"pg_backup_start('{label}', true)" if self._number >= 150000 else f"pg_start_backup('{label}', true, false)"
        # Both checkpoint first.
        (self._start,) = self.session.ask(f"SELECT pg_walfile_name({start});", 900)

    def mark(self) -> None:
        self._control = self._read_control()
        stop = "pg_backup_stop(false)" if self._number >= 150000 else "pg_stop_backup(false, false)"
        (answer,) = self.session.ask(
            "SELECT concat_ws('|', pg_walfile_name(lsn), encode(convert_to(labelfile, 'UTF8'), 'hex'), "
            "(SELECT setting FROM pg_settings WHERE name = 'wal_segment_size')) "
            f"FROM {stop};"
        )
        self._stop = answer.split("|")

    def collect(self, folder: str) -> Delta:
        os.mkdir(folder, 0o700)
        last, label, size = self._stop
        base = f"{self._data}/" if self._data else ""
        delta = Delta(clear=[base + name for name in ("postmaster.pid", "postmaster.opts", "backup_label*", "tablespace_map*")])
        for name in ("pg_replslot", "pg_dynshmem", "pg_notify", "pg_serial", "pg_snapshots", "pg_stat_tmp", "pg_subtrans"):
            delta.clear.append(f"{base}{name}/*")
        delta.clear += [f"{base}pg_wal/{'[0-9A-F]' * 24}*", f"{base}pg_wal/*.tmp", f"{base}pg_wal/archive_status/*", f"{base}*pgsql_tmp*"]
        wanted = _segments(self._start, last, int(size))
        for name in wanted:
            path = f"{base}pg_wal/{name}"
            try:
                with open(os.path.join(self.source, path), "rb") as source:
                    _add(delta, folder, path, os.fstat(source.fileno()), source.fileno())
            except FileNotFoundError as exc:
                raise DeliveryError(
                    f"back up the PostgreSQL in {self.name}",
                    f"its log {name} was removed before it could be kept, and it has no replication slot to prevent that",
                    "Raise max_replication_slots or wal_keep_size.",
                    "snapshot",
                ) from exc
        mine = os.stat(os.path.join(self.source, self._data, "PG_VERSION"))
        _add(delta, folder, f"{base}backup_label", mine, bytes.fromhex(label))
        _add(delta, folder, f"{base}global/pg_control", os.stat(os.path.join(self.source, self._data, "global/pg_control")), self._control)
        return delta

    def _read_control(self) -> bytes:
        """The control file, not caught in the middle of being written: two readings that agree."""
        path = os.path.join(self.source, self._data, "global/pg_control")
        before = b""
        for _attempt in range(100):
            with open(path, "rb") as handle:
                now = handle.read()
            if now == before:
                return now
            before = now
        raise DeliveryError(f"read {path}", "it changes all the time", "Try again.", "snapshot")


class Redis(Database):
    """A fork of its memory: everything acknowledged before the mark is in the dump, and nothing is held still."""

    kind = "redis"
    script = _REDIS
    end = "end {}"

    _settings: t.Mapping[str, str] = {}
    _data = ""

    def begin(self) -> None:
        facts = self._facts("server")
        self.version = facts.get("redis_version", "") or facts.get("valkey_version", "")
        if not self.version:
            raise DeliveryError(
                f"talk to the Redis in {self.name}",
                " / ".join(self.session.ask("PING")) or "it says nothing of its version",
                "Give its container REDIS_PASSWORD or REDIS_PASSWORD_FILE, if it wants a password.",
                "config",
            )
        self._settings = {name: self._setting(name) for name in ("dir", "dbfilename", "appendonly", "appendfilename", "appenddirname")}
        self._data = self.below(self._settings["dir"], ".")
        self._wait_for_end()

    def mark(self) -> None:
        deadline = time.monotonic() + 60
        while True:
            self._saved = self._facts("persistence").get("rdb_last_save_time", "")
            answer = " ".join(self.session.ask("BGSAVE"))
            if "started" in answer:
                return
            if "in progress" not in answer or time.monotonic() > deadline:
                raise DeliveryError(f"let the Redis in {self.name} save itself", answer, "Look at its log.", "snapshot")
            time.sleep(0.05)

    def collect(self, folder: str) -> Delta:
        facts = self._wait_for_end()
        if facts.get("rdb_last_bgsave_status") != "ok":
            raise DeliveryError(f"let the Redis in {self.name} save itself", "the save failed", "Look at its log and its disk.", "snapshot")
        os.mkdir(folder, 0o700)
        base = f"{self._data}/" if self._data else ""
        dump = f"{base}{self._settings['dbfilename']}"
        delta = Delta(clear=[f"{base}temp-*"])
        with open(os.path.join(self.source, dump), "rb") as source:
            info = os.fstat(source.fileno())
            _add(delta, folder, dump, info, source.fileno())
            if self._settings["appendonly"] == "yes":
                # It would read these instead of the dump; a dump is a log's beginning as well.
                log = self._settings["appendfilename"]
                if self._settings["appenddirname"]:
                    within = f"{base}{self._settings['appenddirname']}/"
                    delta.clear.append(f"{within}*")
                    _add(delta, folder, f"{within}{log}.1.base.rdb", info, source.fileno())
                    _add(delta, folder, f"{within}{log}.1.incr.aof", info, b"")
                    manifest = f"file {log}.1.base.rdb seq 1 type b\nfile {log}.1.incr.aof seq 1 type i\n"
                    _add(delta, folder, f"{within}{log}.manifest", info, manifest.encode())
                else:
                    _add(delta, folder, f"{base}{log}", info, source.fileno())
        return delta

    def _facts(self, section: str) -> dict[str, str]:
        text = "\n".join(self.session.ask(f"INFO {section}")).replace("\\r\\n", "\n")
        return dict(line.strip().strip('"').split(":", 1) for line in text.splitlines() if ":" in line)

    def _setting(self, name: str) -> str:
        found = [line.partition('"')[2].rstrip().rstrip('"') for line in self.session.ask(f"CONFIG GET {name}") if '"' in line]
        return found[1] if len(found) > 1 else ""

    def _wait_for_end(self, timeout: float = 3600) -> dict[str, str]:
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            facts = self._facts("persistence")
            if facts.get("rdb_bgsave_in_progress") == "0":
                return facts
            time.sleep(0.05)
        raise DeliveryError(f"let the Redis in {self.name} save itself", f"no end after {timeout:g} s", "Look at its log.", "snapshot")


class MySQL(Database):
    """MariaDB and MySQL: tables that are not transactional are closed and locked, then the container is frozen; the others recover as
    after a power cut."""

    kind = "mysql"
    script = _MYSQL
    end = "SELECT '{}';"

    def begin(self) -> None:
        self.version = self.session.ask("SELECT VERSION();")[0]
        directory = self.session.ask("SELECT @@datadir;")[0]
        self.below(directory, ".")

    def lock(self, timeout: float) -> None:
        # Behind a long query everybody would wait for this lock, so it does not wait long itself.
        self.session.ask(f"SET SESSION lock_wait_timeout = {max(1, int(min(timeout, 20)))}; FLUSH TABLES WITH READ LOCK;", 60)

    def released(self) -> None:
        self.close()


class SQLite(Database):
    """Its files are copied while the writers are frozen; afterwards a copy of them is opened, recovered and checked."""

    kind = "sqlite"

    def __init__(self, source: str) -> None:  # pylint: disable=super-init-not-called
        self.source = source
        self.name = self.version = ""
        self._session = None

    def files(self, tree: Scan) -> list[bytes]:
        """The databases and what belongs to each."""
        found = []
        for path, entry in tree.entries.items():
            if entry.kind == "file" and entry.size >= 512 and not path.endswith((b"-wal", b"-journal", b"-shm")):
                with contextlib.suppress(OSError), open(os.fsencode(self.source) + b"/" + path, "rb") as handle:
                    if handle.read(16) == b"SQLite format 3\0":
                        found += [name for name in (path, path + b"-wal", path + b"-journal") if name in tree.entries]
        return found

    def prove(self, delta: Delta, folder: str) -> None:
        """Open each database of the copies as after a power cut."""
        try:
            import sqlite3  # pylint: disable=import-outside-toplevel
        except ImportError as exc:
            raise DeliveryError("check SQLite databases", "this Python has no sqlite3", "Use consistency pause.", "config") from exc
        self.version = sqlite3.sqlite_version
        for path in [one for one in delta.blobs if not one.endswith((b"-wal", b"-journal"))]:
            with open(os.path.join(folder, delta.blobs[path]), "rb") as handle:
                if handle.read(16) != b"SQLite format 3\0":
                    continue
            with tempfile.TemporaryDirectory(dir=folder) as work:
                for end in (b"", b"-wal", b"-journal"):
                    if path + end in delta.blobs:
                        shutil.copyfile(os.path.join(folder, delta.blobs[path + end]), os.path.join(os.fsencode(work), b"db" + end))
                said = ""
                try:
                    with contextlib.closing(sqlite3.connect(os.path.join(work, "db"))) as connection:
                        said = str(connection.execute("PRAGMA quick_check(1)").fetchone()[0])
                except sqlite3.Error as exc:
                    said = str(exc)
                if said != "ok":
                    raise DeliveryError(
                        f"check the SQLite database {printable(path)}",
                        f"a copy of it says: {said}",
                        "The database itself is damaged, or is written from outside; look at it with PRAGMA integrity_check.",
                        "snapshot",
                    )


_KINDS: dict[str, type[Database]] = {one.kind: one for one in (PostgreSQL, Redis, MySQL)}


def find(engine: Engine, kind: str, name: str, source: str, project: str, service: str) -> Database | None:
    """The database of a part, ``None`` when nothing that could be one runs on it: then its files are at rest."""
    if kind == "sqlite":
        return SQLite(source)
    there = []
    for one in freeze.users(engine, {name}, [source], writers_only=True):
        labels = one["Config"].get("Labels") or {}
        mine = not service or service in (freeze.name_of(one), labels.get(SERVICE_LABEL))
        if mine and (not project or not service or labels.get(PROJECT_LABEL, project) == project):
            for mount in one.get("Mounts") or ():
                if mount.get("RW") and (mount.get("Name") == name or mount.get("Source") == source):
                    there.append((one, str(mount["Destination"])))
    running = [(one, place) for one, place in there if freeze.state_of(one) == "running"]
    tried = f"find the {kind} of {name}"
    if len(running) > 1:
        names = ", ".join(freeze.name_of(one) for one, _place in running)
        raise DeliveryError(tried, f"several containers write there: {names}", "Name its service.", "config")
    if service and not there:
        raise DeliveryError(tried, f"no container of a service {service} writes there", "Check the name of the service.", "config")
    held = [freeze.name_of(one) for one, _place in there if freeze.state_of(one) in ("paused", "restarting")]
    if held and not running:
        raise DeliveryError(tried, f"it does not answer: {', '.join(held)} is paused or restarting", "Mend it first.", "snapshot")
    return _KINDS[kind](engine, running[0][0], source, running[0][1]) if running else None


def _segments(first: str, last: str, size: int) -> list[str]:
    """Names of the log files from ``first`` to ``last``."""
    if not re.fullmatch("[0-9A-F]{24}", first) or first[:8] != last[:8]:
        raise DeliveryError("back up a PostgreSQL", f"its log went from {first} to {last}", "Try again after its failover.", "snapshot")
    each = (1 << 32) // size
    numbers = [int(name[8:16], 16) * each + int(name[16:], 16) for name in (first, last)]
    return [f"{first[:8]}{number // each:08X}{number % each:08X}" for number in range(numbers[0], numbers[1] + 1)]


def _add(delta: Delta, folder: str, path: str, like: os.stat_result, content: bytes | int) -> None:
    """One more file of the delta, with the owner, mode and time of another; ``content``: bytes, or a descriptor to copy from."""
    name = str(len(delta.blobs))
    with open(os.path.join(folder, name), "wb") as handle:
        if isinstance(content, int):
            copy_content(content, handle.fileno())
        else:
            handle.write(content)
    raw = os.fsencode(path)
    delta.blobs[raw] = name
    content_sum = checksum(os.path.join(folder, name))
    delta.entries.append(
        Entry(raw, "file", like.st_mode & 0o7777, like.st_uid, like.st_gid, 0, content_sum, (), b"", like.st_mtime_ns, 0, 0)
    )
