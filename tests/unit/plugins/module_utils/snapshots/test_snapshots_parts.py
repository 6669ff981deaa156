# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The pure parts of the snapshots room; what needs engines and containers is in tests/integration/test_snapshots.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import typing as t
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils import errors
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import databases, delta, freeze, sets
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import scan as scanning
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import Base, RepositoryStatus, Settings, password_of
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.kopia import Kopia, _stored
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.restic import Restic, _parts, _summary
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.restore import exchange
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import Scan, apply_sidecar, needs_full_read, scan, sidecar

COLLECTIONS = Path(errors.__file__).absolute().parents[5]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "dir").mkdir(parents=True)
    (root / "dir" / "f").write_text("content")
    (root / "link").symlink_to("dir/f")
    os.link(root / "dir" / "f", root / "hard")
    return root


class TestScan:
    def test_counts(self, tree: Path) -> None:
        found = scan(str(tree))
        assert (found.files, found.directories, found.links, found.bytes) == (2, 2, 1, 14)

    @pytest.mark.parametrize(
        "change",
        [
            lambda root: (root / "dir" / "f").write_text("c0ntent"),
            lambda root: os.chmod(root / "dir" / "f", 0o601),
            lambda root: os.chmod(root, 0o701),
            lambda root: (root / "new").mkdir(),
            lambda root: (root / "link").unlink() or (root / "link").symlink_to("dir"),
            lambda root: (root / "hard").unlink() or (root / "hard").write_text("content"),
        ],
        ids=["content", "mode", "root-mode", "name", "target", "hard-link"],
    )
    def test_every_change_moves_the_digest(self, tree: Path, change: t.Callable[[Path], t.Any]) -> None:
        before = scan(str(tree))
        change(tree)
        after = scan(str(tree))
        assert before.digest != after.digest and before.first_difference(after)

    def test_times_and_sockets_do_not(self, tree: Path) -> None:
        before = scan(str(tree)).digest
        os.utime(tree / "dir" / "f", ns=(1, 1))
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(tree / "s"))
        found = scan(str(tree))
        assert found.digest == before and found.sockets == 1

    def test_a_single_file_is_a_tree(self, tree: Path) -> None:
        assert scan(str(tree / "dir" / "f")).files == 1

    def test_a_known_checksum_is_kept_only_where_nothing_moved(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scanning, "ctime_is_proof", lambda path: True)
        before = scan(str(tree))
        marked = {
            path: replace(entry, content="known" if entry.kind == "file" else entry.content) for path, entry in before.entries.items()
        }
        later = time.time_ns() + 10 * scanning._RACY_NS
        assert scan(str(tree), Scan(str(tree), later, marked)).entries[b"hard"].content == "known"
        # The change may lie within the clock tick of the first reading.
        assert scan(str(tree), Scan(str(tree), before.started_ns, marked)).entries[b"hard"].content != "known"
        os.chmod(tree / "hard", 0o600)
        assert scan(str(tree), Scan(str(tree), later, marked)).entries[b"hard"].content != "known"

    def test_what_went_away_is_told_unless_expected(self, tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(scanning, "_sha256", lambda path: None)
        with pytest.raises(DeliveryError, match="went away"):
            scan(str(tree))
        assert scan(str(tree), vanishing=True).files == 0


class TestFullRead:
    """When an engine that trusts times would keep stale bytes."""

    @staticmethod
    def verdict(monkeypatch: pytest.MonkeyPatch, by_ctime: bool = False, proof: bool = True, **change: t.Any) -> bool:
        monkeypatch.setattr(scanning, "ctime_is_proof", lambda path: proof)
        old = scanning.Entry(b"f", "file", 0o644, 0, 0, 4, "aaaa", (), b"", 100, 100, 7)
        start = 10**10
        before, after = Scan("/x", start, {b"f": old}), Scan("/x", start + 10**10, {b"f": replace(old, **change)})
        return needs_full_read(before, after, start + 5 * 10**9, by_ctime)

    def test_nothing_changed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert not self.verdict(monkeypatch)
        assert self.verdict(monkeypatch, proof=False)

    def test_a_plain_write_after_the_warm_pass_is_seen(self, monkeypatch: pytest.MonkeyPatch) -> None:
        late = 10**10 + 6 * 10**9
        assert not self.verdict(monkeypatch, mtime_ns=late, ctime_ns=late, content="bbbb")

    def test_a_kept_mtime_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        late = 10**10 + 6 * 10**9
        assert self.verdict(monkeypatch, ctime_ns=late, content="bbbb")
        assert not self.verdict(monkeypatch, by_ctime=True, ctime_ns=late, content="bbbb")

    def test_a_write_during_the_warm_pass_is_not(self, monkeypatch: pytest.MonkeyPatch) -> None:
        middle = 10**10 + 2 * 10**9
        assert self.verdict(monkeypatch, mtime_ns=middle, ctime_ns=middle, content="bbbb")

    def test_a_write_within_one_tick_escapes_both(self, monkeypatch: pytest.MonkeyPatch) -> None:
        near = {"ctime_ns": 10**10, "content": "bbbb"}
        monkeypatch.setattr(scanning, "ctime_is_proof", lambda path: True)
        old = scanning.Entry(b"f", "file", 0o644, 0, 0, 4, "aaaa", (), b"", 10**10, 10**10, 7)
        before = Scan("/x", 10**10, {b"f": old})
        after = Scan("/x", 2 * 10**10, {b"f": replace(old, **near)})
        assert needs_full_read(before, after, 10**10, by_ctime=True)


def test_the_sidecar_brings_back_what_a_plain_copy_loses(tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tree / "fifo", 0o640)
    before = scan(str(tree))
    copy = tmp_path / "copy"
    (copy / "dir").mkdir(parents=True)
    for name in ("dir/f", "hard"):
        (copy / name).write_text("content")
    (copy / "link").symlink_to("dir/f")
    assert scan(str(copy)).digest != before.digest
    apply_sidecar(str(copy), sidecar(before))
    assert scan(str(copy)).digest == before.digest
    assert os.stat(copy / "dir").st_mtime_ns == os.stat(tree / "dir").st_mtime_ns


def test_exchange_swaps_files_and_directories_in_one_step(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").write_text("b")
    exchange(str(tmp_path / "a"), str(tmp_path / "b"))
    assert (tmp_path / "a").read_text() == "b" and (tmp_path / "b").is_dir()
    with pytest.raises(FileNotFoundError):
        exchange(str(tmp_path / "a"), str(tmp_path / "missing"))


GUARD = """
import os, sys, time
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.guard import Guard
path, how = sys.argv[1:]
def act():
    with open(path, "w") as handle:
        handle.write(str(os.getppid()))
guard = Guard(act, 0.2 if how == "late" else 600)
guard.arm()
print(guard.pid, flush=True)
if how == "disarm":
    guard.disarm()
elif how == "late":
    time.sleep(600)
else:
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize("how", ["kill", "disarm", "late"])
def test_the_guard_acts_on_death_and_never_after_disarm(tmp_path: Path, how: str) -> None:
    mark = tmp_path / "acted"
    process = subprocess.Popen(
        [sys.executable, "-c", GUARD, str(mark), how],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
    )
    try:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        deadline = time.monotonic() + 30
        while _alive(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not _alive(pid)
        assert mark.exists() == (how != "disarm")
    finally:
        process.kill()
        # The end of its output is reached: the guard does not hold it open.
        process.communicate(timeout=30)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


class TestKopiaAnswers:
    GOOD: t.ClassVar[dict[str, t.Any]] = {
        "id": "49f0",
        "source": {"host": "h", "userName": "u", "path": "/srv/v"},
        "startTime": "2026-11-21T06:08:20.4Z",
        "rootEntry": {"name": "v", "type": "d", "obj": "ke69a", "summ": {"size": 12, "files": 2, "dirs": 2, "numFailed": 0}},
        "tags": {"tag:set": "one", "tag:kind": "manifest"},
        "pins": ["x"],
    }

    def test_a_good_one(self) -> None:
        one = _stored(self.GOOD)
        assert (one.source, one.snapshot, one.root, one.files, one.bytes, one.broken) == ("/srv/v", "49f0", "ke69a", 2, 12, "")
        assert one.tags == {"set": "one", "kind": "manifest"}

    def test_cancelled_and_failed_ones_are_broken(self) -> None:
        assert "canceled" in _stored({**self.GOOD, "incomplete": "canceled"}).broken
        summary = {"numFailed": 1, "errors": [{"path": "fifo", "error": "unknown type"}]}
        assert "fifo: unknown type" in _stored({**self.GOOD, "rootEntry": {"obj": "k1", "summ": summary}}).broken
        assert _stored({**self.GOOD, "rootEntry": {}}).broken

    def test_places(self) -> None:
        def place(repository: str) -> list[str]:
            kopia = Kopia.__new__(Kopia)
            kopia.settings = Settings(repository, "pw")
            return kopia._place()

        assert place("/backup") == ["filesystem", "--path=/backup"]
        assert place("s3://bucket/a/b?endpoint=minio:9000&region=x") == [
            "s3",
            "--bucket=bucket",
            "--prefix=a/b/",
            "--endpoint=minio:9000",
            "--region=x",
        ]
        for bad in ("relative", "s3://user:secret@bucket", "s3://bucket?secret=x", "ftp://x"):
            with pytest.raises(DeliveryError) as caught:
                place(bad)
            assert "secret@" not in caught.value.message and ":secret" not in caught.value.message


def test_restic_answers() -> None:
    item = {"id": "c1d2", "tree": "t1", "time": "2026-11-21T09:27:32Z", "paths": ["/a", "/b"], "tags": ["set=one", "call=x=y", "plain"]}
    one, two = _parts(item, item["paths"], 3, 30)
    assert (one.source, two.source, two.snapshot, two.root, two.files) == ("/a", "/b", "c1d2", "t1", 3)
    assert one.tags == {"set": "one", "call": "x=y"}
    lines = '{"message_type":"status"}\nnoise\n{"message_type":"summary","snapshot_id":"c1"}\n'
    assert _summary(lines)["snapshot_id"] == "c1"
    with pytest.raises(DeliveryError, match="no summary"):
        _summary("")
    restic = Restic.__new__(Restic)
    restic.settings = Settings("rest:https://user:secret@host/", "pw")
    assert "secret" not in restic._shown


class TestPassword:
    def test_from_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "password"
        path.write_text("a $b'c\n")
        path.chmod(0o600)
        assert password_of(None, str(path)) == "a $b'c"
        path.chmod(0o640)
        with pytest.raises(DeliveryError, match="others may read it"):
            password_of(None, str(path))

    @pytest.mark.parametrize("bad", [None, "", " x", "x\n", "a\0b", "a\nb"])
    def test_refused(self, bad: str | None) -> None:
        with pytest.raises(DeliveryError) as caught:
            password_of(bad, None)
        assert caught.value.failure_class == "config"

    def test_never_in_an_error(self) -> None:
        from ansible_collections.selfhost.delivery.plugins.module_utils.command import CommandResult

        base = Base.__new__(Base)
        base.settings = Settings("/r", "hunter22", env={"KEY": "swordfish"})
        base.program = "kopia"
        failure = base.failure("try", CommandResult(("kopia",), 1, "", "bad hunter22 and swordfish"))
        assert "hunter22" not in failure.message and "swordfish" not in failure.message
        full = base.failure("try", CommandResult(("kopia",), 1, "", "write x: no space left on device"))
        assert full.failure_class == "capacity" and "hunter22" not in repr(base.settings)


def test_another_repository_under_the_same_name_is_refused(tmp_path: Path) -> None:
    base = Base.__new__(Base)
    base.settings, base.directory = Settings("/r", "pw"), str(tmp_path / "e")
    base.remember(RepositoryStatus("ready", "first"))
    base.remember(RepositoryStatus("ready", "first"))
    with pytest.raises(DeliveryError, match="used first there before"):
        base.remember(RepositoryStatus("ready", "second"))
    with pytest.raises(DeliveryError, match="it is gone"):
        base.refuse_creation()


def test_set_ids() -> None:
    sets.check_set_id("pre-promotion-4f2a-20261121-090000")
    for bad in ("", "latest", "../x", "a/b", "-x", "a b", "x\n", "a" * 200):
        with pytest.raises(DeliveryError):
            sets.check_set_id(bad)


def test_volumes(tmp_path: Path) -> None:
    plain = {"Driver": "local", "Mountpoint": str(tmp_path), "Options": None, "Labels": {"a": "b"}}
    assert sets.volume_part("v", plain).source == str(tmp_path)
    bind = {**plain, "Mountpoint": "/nowhere", "Options": {"type": "none", "o": "bind", "device": str(tmp_path)}}
    assert sets.volume_part("v", bind).source == str(tmp_path)
    for bad, words in (
        (None, "does not have it"),
        ({**plain, "Driver": "rexray"}, "driver is rexray"),
        ({**plain, "Options": {"type": "nfs", "device": ":/x", "o": "addr=1.2.3.4"}}, "on demand"),
        ({**plain, "Mountpoint": str(tmp_path / "gone")}, "cannot be seen"),
    ):
        with pytest.raises(DeliveryError, match=words):
            sets.volume_part("v", bad)


def container(name: str, state: str, auto_remove: bool = False) -> dict[str, t.Any]:
    return {"Id": name, "Name": f"/{name}", "State": {"Status": state}, "HostConfig": {"AutoRemove": auto_remove}}


def test_whom_to_hold() -> None:
    all_of_them = [container(state, state) for state in ("running", "paused", "restarting", "exited", "created")]
    held = {
        action: [(one["name"], one["action"]) for one in freeze.plan_hold(all_of_them, action)]
        for action in ("pause", "stop", "stop_paused")
    }
    assert held["pause"] == [("restarting", "stop"), ("running", "pause")]
    assert held["stop"] == [("restarting", "stop"), ("running", "stop")]
    assert held["stop_paused"] == [("restarting", "stop"), ("paused", "stop"), ("running", "stop")]
    assert freeze.plan_hold([container("x", "running", True)], "pause")
    with pytest.raises(DeliveryError, match="--rm"):
        freeze.plan_hold([container("x", "running", True)], "stop")


SECOND = 1_000_000_000


@pytest.mark.parametrize(
    ("now", "due"),
    [
        (100.0, False),  # it ended this moment
        (101.6, False),
        (101.8, True),  # the next one begins in 0.2 s
        (105.0, True),  # it runs
    ],
)
def test_a_health_check_runs_from_its_interval_after_the_last_one(now: float, due: bool) -> None:
    container = {
        "Config": {"Healthcheck": {"Test": ["CMD", "true"], "Interval": 2 * SECOND}},
        "State": {
            "Running": True,
            "StartedAt": "1970-01-01T00:00:00Z",
            "Health": {"Log": [{"End": "1970-01-01T01:01:40.000000000+01:00"}]},
        },
    }
    assert freeze.check_is_due(container, now) is due


@pytest.mark.parametrize("check", [None, {}, {"Test": ["NONE"]}])
def test_a_container_without_a_health_check_is_always_quiet(check: object) -> None:
    state = {"Running": True, "StartedAt": "1970-01-01T00:00:00.123456789Z"}
    assert not freeze.check_is_due({"Config": {"Healthcheck": check}, "State": state}, 10.0)
    first = {"Config": {"Healthcheck": {"Test": ["CMD", "true"]}}, "State": {**state, "Health": {"Log": None}}}
    assert [freeze.check_is_due(first, now) for now in (10.0, 30.0)] == [False, True]  # the default interval is 30 s


def test_which_mounts_concern_a_set() -> None:
    assert freeze._concerns({"Type": "volume", "Name": "v"}, {"v"}, [])
    assert freeze._concerns({"Type": "bind", "Source": "/srv/a/b"}, set(), ["/srv/a"])
    assert not freeze._concerns({"Type": "bind", "Source": "/srv/ab"}, set(), ["/srv/a"])
    # A monitor that mounts all of / keeps seeing what lies under a name, so it is left alone.
    assert not freeze._concerns({"Type": "bind", "Source": "/"}, set(), ["/srv/a"])


class TestDelta:
    """A tree that moved on, and the copy of what moved laid over the copy of before."""

    @staticmethod
    def laid_over(tree: Path, tmp_path: Path, change: t.Callable[[Path], t.Any]) -> tuple[Scan, Scan]:
        before = scan(str(tree))
        stored = tmp_path / "stored"
        subprocess.run(["cp", "-a", str(tree), str(stored)], check=True)
        # What an engine may have caught in between.
        (stored / "passing").write_text("passing")
        change(tree)
        now = scan(str(tree), before, contents=False)
        entries = [now.entries[path] for path in delta.changed_since(before, now, True)]
        blobs = delta.copy_files(str(tree), entries, str(tmp_path / "blobs"))
        made = delta.Delta(entries, blobs, delta.unpack_names(delta.pack_names(now.entries)))
        again = delta.Delta.from_json(made.as_json(), made.names)
        delta.apply(str(stored), again, str(tmp_path / "blobs"), scan(str(stored), contents=False).entries)
        return scan(str(tree)), scan(str(stored))

    @pytest.mark.parametrize(
        "change",
        [
            lambda root: None,
            lambda root: (root / "dir" / "f").write_text("other"),
            lambda root: (root / "dir" / "f").unlink(),
            lambda root: (root / "dir").rename(root / "moved"),
            lambda root: ((root / "link").unlink(), (root / "link").mkdir(0o711), (root / "link" / "x").write_text("x")),
            lambda root: os.link(root / "hard", root / "dir" / "third"),
            lambda root: (os.mkfifo(root / "fifo"), os.chmod(root / "fifo", 0o604)),
            lambda root: (os.fsencode(root), open(os.fsencode(root) + b"/odd\n\xff", "w").close()),
            lambda root: os.chmod(root / "dir", 0o2750),
        ],
        ids=["nothing", "content", "gone", "renamed", "kind", "hard-link", "fifo", "raw-name", "mode"],
    )
    def test_gives_the_tree_of_the_moment(self, tree: Path, tmp_path: Path, change: t.Callable[[Path], t.Any]) -> None:
        wanted, found = self.laid_over(tree, tmp_path, change)
        assert wanted.first_difference(found) == "" and wanted.digest == found.digest
        for path, entry in wanted.entries.items():
            assert entry.mtime_ns == found.entries[path].mtime_ns, path

    def test_a_file_that_moves_while_it_is_copied_is_refused(self, tree: Path, tmp_path: Path) -> None:
        now = scan(str(tree), contents=False)
        (tree / "dir" / "f").write_text("later")
        with pytest.raises(DeliveryError, match="changed while its containers were held still"):
            delta.copy_files(str(tree), [now.entries[b"hard"]], str(tmp_path / "blobs"))

    def test_what_goes_first_and_others_stay(self, tree: Path) -> None:
        delta.apply(str(tree), delta.Delta(clear=["dir/*"]), "", scan(str(tree)).entries)
        assert sorted(os.listdir(tree)) == ["dir", "hard", "link"] and os.listdir(tree / "dir") == []

    def test_holes_are_not_filled(self, tmp_path: Path) -> None:
        one, other = tmp_path / "one", tmp_path / "other"
        with one.open("wb") as handle:
            handle.write(b"begin")
            handle.seek(64 << 20)
            handle.write(b"end")
            handle.truncate(80 << 20)
        with one.open("rb") as source, other.open("wb") as target:
            delta.copy_content(source.fileno(), target.fileno())
        assert delta.checksum(str(one)) == delta.checksum(str(other)) and other.stat().st_blocks * 512 < 1 << 20


def test_names_of_the_log_of_postgresql() -> None:
    megabytes = 16 << 20
    assert databases._segments("0000000100000000000000FE", "000000010000000100000001", megabytes) == [
        "0000000100000000000000FE",
        "0000000100000000000000FF",
        "000000010000000100000000",
        "000000010000000100000001",
    ]
    with pytest.raises(DeliveryError, match="failover"):
        databases._segments("0000000100000000000000FE", "000000020000000000000001", megabytes)


def test_how_each_part_is_taken() -> None:
    labels = {"com.docker.compose.project": "shop", "com.docker.compose.volume": "pgdata"}
    parts = [
        sets.Part("volume", "shop_pgdata", "/v/a", {"labels": labels}),
        sets.Part("volume", "shared", "/v/b"),
        sets.Part("path", "/c", "/c"),
    ]
    options = {"pgdata": {"consistency": "postgresql", "service": "db"}, "/c": {"consistency": "none"}}
    request = sets.Request("one", "/m", options=options, project="shop", consistency="stop")
    found = sets._with_options(parts, request)
    assert [(one.consistency, one.service) for one in found] == [("postgresql", "db"), ("stop", ""), ("none", "")]
    for bad, words in (
        ({"nothing": {}}, "options for nothing"),
        ({"/c": {"consistency": "postgres"}}, "no consistency postgres"),
        ({"/c": {"consistency": "hooks"}}, "its consistency is hooks"),
    ):
        with pytest.raises(DeliveryError, match=words):
            sets._with_options(parts, replace(request, options=bad))
    with pytest.raises(DeliveryError, match="options for pgdata"):
        sets._with_options(parts, replace(request, project=""))


def test_the_word_of_a_panic_is_told_not_its_stack() -> None:
    from ansible_collections.selfhost.delivery.plugins.module_utils.command import CommandResult

    base = Base.__new__(Base)
    base.settings, base.program = Settings("/r", "pw"), "restic"
    panic = (
        "open /r/locks/1: read-only file system\ngithub.com/restic/backend.(*Local).Save\n\t/restic/local.go:121\nruntime.goexit\n\t/x.s:15"
    )
    assert base.failure("try", CommandResult(("restic",), 1, "", panic)).seen == "open /r/locks/1: read-only file system"
