# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The lease with real processes, the journal with real files, and the fold at every point a run can be killed at."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from datetime import datetime, timedelta, timezone

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils import releases
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

FORK = multiprocessing.get_context("fork")


def holder_of(pid, **more):
    return {
        "user": "deploy",
        "host": "ci-1",
        "pid": pid,
        "pid_started": releases.process_started(pid),
        "boot_id": releases.boot_id(),
        "pid_namespace": releases.pid_namespace(),
        "ci_url": "https://ci.example.com/7",
        **more,
    }


@pytest.fixture
def sleeper():
    """A real process that lives until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", "import sys; print('up', flush=True); sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    process.stdout.readline()
    yield process
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


@pytest.fixture
def deploy_dir(tmp_path):
    return str(tmp_path)


def record(release_id, **more):
    tag = release_id.split("-", 2)[2]
    return {"id": release_id, "tag": tag, "kind": "promote", "run_id": "r1", "started": releases.timestamp(), "previous": None, **more}


def make(deploy_dir, release_id, end=None, **more):
    releases.create_release(deploy_dir, record(release_id, **more), "r1")
    if end:
        releases.finish_release(deploy_dir, release_id, "r1", end)


# --- journal


def test_journal_appends_numbered_entries(deploy_dir):
    journal = releases.Journal.open(f"{deploy_dir}/journal.jsonl", "r1")
    journal.begin("pulled")
    journal.end("rolling", "web", container="c1")
    first, second = journal.entries()
    assert (first["seq"], first["step"], first["event"], first["run"], first["data"]) == (1, "pulled", "begin", "r1", {})
    assert (second["seq"], second["service"], second["data"]) == (2, "web", {"container": "c1"})
    assert os.stat(journal.path).st_mode & 0o777 == 0o600


@pytest.mark.parametrize(
    "torn",
    ['{"seq": 3, "ti', '{"seq": 3, "time": "x", "step": "rolling", "event": "begin"}', "\x00" * 40 + "\n", '{"seq": 3, "x": "' + "x" * 500],
    ids=["half", "no newline", "zeros", "long"],
)
def test_torn_last_line_is_ignored_and_cut_off_by_the_next_append(deploy_dir, torn):
    journal = releases.Journal(f"{deploy_dir}/journal.jsonl", "r1")
    journal.begin("pulled")
    journal.end("pulled")
    with open(journal.path, "a") as handle:
        handle.write(torn)
    assert [entry["seq"] for entry in journal.entries()] == [1, 2]
    journal.begin("snapshotted")
    with open(journal.path) as handle:
        lines = handle.read().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 2, 3]


def test_damage_in_the_middle_is_not_passed_over(deploy_dir):
    journal = releases.Journal(f"{deploy_dir}/journal.jsonl", "r1")
    journal.begin("pulled")
    with open(journal.path, "a") as handle:
        handle.write("rubbish\n")
    with open(journal.path, "a") as handle:
        handle.write('{"seq": 2, "time": "x", "step": "pulled", "event": "end", "data": {}}\n')
    with pytest.raises(DeliveryError, match="line 2 is not a journal entry"):
        journal.entries()


def _append_many(path, run, count):
    journal = releases.Journal(path, run)
    for _index in range(count):
        journal.note("verifying")


def test_two_writers_lose_no_entry(deploy_dir):
    path = f"{deploy_dir}/journal.jsonl"
    writers = [FORK.Process(target=_append_many, args=(path, run, 40)) for run in ("r1", "r2")]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [entry["seq"] for entry in releases.Journal(path, "r").entries()] == list(range(1, 81))


# --- fold


def entries_of(script):
    """``begin pulled``, ``end rolling web``, one second apart."""
    start = datetime(2026, 11, 21, 9, 0, tzinfo=timezone.utc)
    entries = []
    for number, (event, step, *rest) in enumerate(line.split() for line in script):
        entry = {
            "seq": number + 1,
            "time": releases.timestamp(start + timedelta(seconds=number)),
            "run": "r1",
            "step": step,
            "event": event,
            "data": {},
        }
        if rest:
            entry["service"] = rest[0]
        if step == "snapshotted" and event == "end":
            entry["data"] = {"set_id": "pre-promotion-abc"}
        entries.append(entry)
    return entries


WAY = [
    "begin planned",
    "end planned",
    "begin locked",
    "end locked",
    "begin preflighted",
    "end preflighted",
    "begin pinned",
    "end pinned",
    "begin pulled",
    "end pulled",
    "begin snapshotted",
    "end snapshotted",
    "begin dependencies",
    "end dependencies",
    "begin migrated",
    "end migrated",
    "begin rolling web",
    "end rolling web",
    "begin rolling worker",
    "end rolling worker",
    "begin verifying",
    "end verifying",
    "begin committed",
    "end committed",
]


@pytest.mark.parametrize("lines", range(len(WAY) + 1))
def test_fold_at_every_point_a_run_can_be_killed(lines):
    seen = WAY[:lines]
    state = releases.fold(entries_of(seen))
    ended = [line.split()[1] for line in seen if line.startswith("end")]
    assert state.open is (lines < len(WAY))
    assert state.status == ("open" if lines < len(WAY) else "committed")
    assert state.phase == (ended[-1] if ended else "")
    assert state.changed is (lines > WAY.index("begin dependencies"))
    assert state.migrated is (lines > WAY.index("begin migrated"))
    assert state.serving_new is (lines > WAY.index("begin rolling web"))
    assert state.commit_begun is (lines > WAY.index("begin committed"))
    assert state.snapshot == ("pre-promotion-abc" if "end snapshotted" in seen else "")
    last = seen[-1].split() if seen else ["end"]
    if last[0] == "begin":
        assert (state.current.step, state.current.service) == (last[1], last[2] if len(last) > 2 else None)
    else:
        assert state.current is None
    expected = {}
    for service in ("web", "worker"):
        if f"begin rolling {service}" in seen:
            expected[service] = "rolled" if f"end rolling {service}" in seen else "rolling"
    assert state.services == expected
    assert state.rolled == [name for name, how in expected.items() if how == "rolled"]


def test_fold_adds_up_durations():
    state = releases.fold(entries_of(WAY))
    assert state.durations["pulled"] == 1.0
    assert state.durations["rolling"] == 2.0
    assert state.service_durations == {"web": 1.0, "worker": 1.0}


@pytest.mark.parametrize(
    "script, seconds",
    [
        (["begin dependencies", "begin dependencies db", "end dependencies db", "end dependencies"], {"dependencies": 3.0}),
        (["begin rolling web", "begin rolling api", "end rolling web", "end rolling api"], {"rolling": 3.0}),
        (["begin rolling web", "end rolling web", "begin rolling api", "fail rolling api"], {"rolling": 2.0}),
    ],
    ids=["a step around its services", "services side by side", "one after the other"],
)
def test_fold_counts_what_runs_side_by_side_once(script, seconds):
    assert releases.fold(entries_of(script)).durations == seconds


def test_fold_of_an_undo():
    back = [
        "begin rolling web",
        "end rolling web",
        "begin rolling worker",
        "fail rolling worker",
        "begin reverting worker",
        "end reverting worker",
    ]
    state = releases.fold(entries_of(back))
    assert state.services == {"web": "rolled", "worker": "reverted"}
    assert state.serving_new is True
    assert (state.failed["step"], state.failed["service"]) == ("rolling", "worker")
    state = releases.fold(entries_of([*back, "begin reverting web", "end reverting web", "end rolled_back"]))
    assert state.services == {"web": "reverted", "worker": "reverted"}
    assert (state.status, state.open, state.serving_new, state.changed) == ("rolled_back", False, False, True)


def test_a_service_without_route_serves_nobody():
    entries = entries_of(["begin rolling worker", "end rolling worker"])
    for entry in entries:
        entry["data"] = {"routed": False}
    assert releases.fold(entries).serving_new is False


def test_holding_the_edge_is_a_change_to_undo():
    assert releases.fold(entries_of(["begin held"])).changed is True
    assert releases.fold(entries_of(["begin pulled", "begin snapshotted"])).changed is False


def test_every_end_closes_and_the_last_one_counts():
    for end in releases.ENDS:
        assert releases.fold(entries_of([f"end {end}"])).status == end
    assert releases.fold(entries_of(["end rollback_failed", "end rolled_back"])).status == "rolled_back"


# --- lease


def test_lease_is_taken_renewed_and_given_back(deploy_dir):
    lease = releases.Lease(deploy_dir)
    assert lease.acquire("r1", holder_of(os.getpid()), "rel-1", 60) == releases.Acquired(None, False)
    first = lease.read()
    assert set(first) >= {"run_id", "holder", "release_id", "step", "since", "heartbeat", "expires"}
    assert os.stat(lease.path).st_mode & 0o777 == 0o600
    lease.renew("pulled", 120)
    renewed = lease.read()
    assert renewed["step"] == "pulled" and renewed["expires"] > first["expires"] and renewed["since"] == first["since"]
    lease.check()
    assert lease.release() is True
    assert lease.read() is None
    assert lease.release() is False


def test_the_same_run_enters_again(deploy_dir):
    releases.Lease(deploy_dir).acquire("r1", {}, "rel-1", 60)
    lease = releases.Lease(deploy_dir)
    assert lease.acquire("r1", {}, "rel-2", 60).reentered is True
    assert lease.read()["release_id"] == "rel-2"


def test_a_living_holder_is_named(deploy_dir, sleeper):
    releases.Lease(deploy_dir).acquire("r1", holder_of(sleeper.pid), "rel-1", 60)
    releases.Lease(deploy_dir, "r1").renew("rolling")
    with pytest.raises(DeliveryError) as caught:
        releases.Lease(deploy_dir).acquire("r2", holder_of(os.getpid()), "rel-2", 60)
    assert caught.value.failure_class == "lock"
    lock = releases.Lease(deploy_dir).read()
    assert caught.value.message == (
        f"Taking the lock of {deploy_dir}: another run holds it: deploy@ci-1 (pid {sleeper.pid}), since {lock['since']}, at step rolling, "
        f"release rel-1, https://ci.example.com/7, expires {lock['expires']} unless renewed. Wait for it to end (lock_wait), "
        "or if it is known to be dead start with takeover=true: its release is then recovered first."
    )


def test_a_killed_holder_is_dead_at_once_and_its_late_module_stops(deploy_dir, sleeper):
    releases.Lease(deploy_dir).acquire("r1", holder_of(sleeper.pid), "rel-1", 3600)
    os.kill(sleeper.pid, signal.SIGKILL)
    # Not reaped yet: a zombie holds nothing.
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)
    lease = releases.Lease(deploy_dir)
    taken = lease.acquire("r2", holder_of(os.getpid()), "rel-2", 60)
    assert taken.previous_dead_holder["run_id"] == "r1"
    orphan = releases.Lease(deploy_dir, "r1")
    for use in (orphan.check, orphan.renew):
        with pytest.raises(DeliveryError, match="lease lost: it is held by deploy@ci-1"):
            use()
    assert orphan.release() is False
    lease.check()


def test_a_reused_pid_is_not_the_holder(deploy_dir, sleeper):
    assert releases.provably_dead(holder_of(sleeper.pid)) is False
    assert releases.provably_dead(holder_of(sleeper.pid, pid_started="1")) is True


@pytest.mark.parametrize(
    "unknown", [{"boot_id": "another"}, {"pid_namespace": "pid:[1]"}, {"boot_id": ""}, {"pid": None}, {"pid_started": None}]
)
def test_a_holder_elsewhere_is_never_provably_dead(sleeper, unknown):
    holder = holder_of(sleeper.pid, pid_started="1")
    holder.update(unknown)
    assert releases.provably_dead(holder) is False


def test_an_expired_lease_is_taken_over(deploy_dir, sleeper):
    releases.Lease(deploy_dir).acquire("r1", holder_of(sleeper.pid), "rel-1", -1)
    assert releases.Lease(deploy_dir).acquire("r2", {}, "rel-2", 60).previous_dead_holder["release_id"] == "rel-1"


def test_a_lost_lock_file_is_a_lost_lease(deploy_dir):
    lease = releases.Lease(deploy_dir)
    lease.acquire("r1", {}, "rel-1", 60)
    os.unlink(lease.path)
    with pytest.raises(DeliveryError, match="lease lost: nobody holds it any more"):
        lease.check()


def _compete(deploy_dir, run, gate, winners):
    gate.wait()
    try:
        releases.Lease(deploy_dir).acquire(run, holder_of(os.getppid()), f"rel-{run}", 60)
        winners.put(run)
    except DeliveryError as error:
        winners.put(error.failure_class)


@pytest.mark.parametrize("dead", [False, True], ids=["free", "takeover"])
def test_of_many_only_one_wins(deploy_dir, dead):
    if dead:
        releases.Lease(deploy_dir).acquire("r0", holder_of(os.getpid(), pid_started="1"), "rel-0", 3600)
    gate, winners = FORK.Barrier(6), FORK.Queue()
    runners = [FORK.Process(target=_compete, args=(deploy_dir, f"r{index}", gate, winners)) for index in range(1, 7)]
    for runner in runners:
        runner.start()
    answers = [winners.get(timeout=30) for _runner in runners]
    for runner in runners:
        runner.join()
    won = [answer for answer in answers if answer != "lock"]
    assert len(won) == 1
    assert releases.Lease(deploy_dir).read()["run_id"] == won[0]


def test_waiting_ends_when_the_holder_gives_back(deploy_dir):
    first = releases.Lease(deploy_dir)
    first.acquire("r1", holder_of(os.getpid()), "rel-1", 3600)
    told = []

    def on_wait(lock, left):
        told.append((lock["run_id"], left > 0))
        first.release()

    assert releases.Lease(deploy_dir).acquire("r2", {}, "rel-2", 60, wait=30, on_wait=on_wait).previous_dead_holder is None
    assert told == [("r1", True)]


def test_a_freeze_neither_expires_nor_is_waited_for(deploy_dir):
    lease = releases.Lease(deploy_dir)
    lease.acquire("r1", holder_of(os.getpid(), pid_started="1"), "rel-1", -1)
    lease.freeze("rows are damaged")
    told = []
    with pytest.raises(DeliveryError, match=r"it is frozen \(rows are damaged\)") as caught:
        releases.Lease(deploy_dir).acquire("r2", {}, "rel-2", 60, wait=30, on_wait=lambda *args: told.append(args))
    assert caught.value.failure_class == "lock" and told == []
    assert lease.release() is False
    with pytest.raises(DeliveryError, match="it is frozen"):
        releases.Lease(deploy_dir).acquire("r1", {}, "rel-1", 60)
    assert releases.Lease(deploy_dir).unlock()["reason"] == "rows are damaged"
    assert releases.Lease(deploy_dir).read() is None


def test_unlock_leaves_a_living_run_alone(deploy_dir, sleeper):
    releases.Lease(deploy_dir).acquire("r1", holder_of(sleeper.pid), "rel-1", 60)
    with pytest.raises(DeliveryError, match="another run holds it"):
        releases.Lease(deploy_dir, "r2").unlock()
    assert releases.Lease(deploy_dir, "r2").unlock(takeover=True)["run_id"] == "r1"


def test_a_foreign_lock_file_is_not_overwritten(deploy_dir):
    with open(f"{deploy_dir}/lock.json", "w") as handle:
        handle.write("{")
    with pytest.raises(DeliveryError, match="it is not a lock of this collection"):
        releases.Lease(deploy_dir).acquire("r1", {}, "rel-1", 60)


def test_keepalive_renews_and_tells_of_a_takeover(deploy_dir):
    lease = releases.Lease(deploy_dir)
    lease.acquire("r1", {}, "rel-1", 60)
    before = lease.read()["expires"]
    lost = threading.Event()
    with pytest.raises(DeliveryError, match="lease lost"):
        with releases.Keepalive(releases.Lease(deploy_dir, "r1"), ttl=0.2, step="snapshotted", on_lost=lambda error: lost.set()):
            assert lease.read()["step"] == "snapshotted" and lease.read()["expires"] < before
            releases.Lease(deploy_dir).acquire("r2", {}, "rel-2", 60, takeover=True)
            assert lost.wait(30)
    assert lease.read()["run_id"] == "r2"


def _hold_busy(deploy_dir, ready):
    with releases.busy(deploy_dir, 5):
        ready.set()
        signal.pause()


def test_busy_ends_with_the_process_that_holds_it(deploy_dir):
    ready = FORK.Event()
    other = FORK.Process(target=_hold_busy, args=(deploy_dir, ready))
    other.start()
    assert ready.wait(30)
    with pytest.raises(DeliveryError, match=r"\.busy: it was held for 0 seconds") as caught:
        with releases.busy(deploy_dir, 0):
            pass
    assert caught.value.failure_class == "lock"
    other.kill()
    other.join()
    with releases.busy(deploy_dir, 0):
        pass


def test_a_missing_deploy_dir_is_said(tmp_path):
    with pytest.raises(DeliveryError, match="the deploy dir does not exist. Run setup.yml"):
        releases.Lease(str(tmp_path / "none")).acquire("r1", {}, "rel-1", 60)


# --- release folders


def test_a_release_folder_appears_whole(deploy_dir, monkeypatch):
    def die(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(releases.os, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        make(deploy_dir, "20261121-090000-sha-a")
    assert releases.list_releases(deploy_dir) == [] and releases.open_release(deploy_dir) is None
    monkeypatch.undo()
    make(deploy_dir, "20261121-090000-sha-a")
    assert os.listdir(f"{deploy_dir}/releases") == ["20261121-090000-sha-a"]
    assert releases.open_release(deploy_dir)["state"]["phase"] == "locked"


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "release.json", "journal.jsonl", "", "a//b"])
def test_files_stay_in_the_folder(tmp_path, name):
    with pytest.raises(DeliveryError, match="is no name for a file in it"):
        releases.write_files(str(tmp_path), [{"name": name, "content": "x"}])


def test_files_are_written_once(tmp_path):
    files = [{"name": "compose.yaml", "content": "a\n", "mode": "0640"}, {"name": "conf/x", "content": "b"}]
    assert releases.write_files(str(tmp_path), files) == ["compose.yaml", "conf/x"]
    assert releases.write_files(str(tmp_path), files) == []
    assert (tmp_path / "compose.yaml").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("killed_after", ["begin", "current", "record"])
def test_a_commit_killed_anywhere_is_finished_by_calling_it_again(deploy_dir, monkeypatch, killed_after):
    make(deploy_dir, "20261121-090000-sha-a", "committed")
    make(deploy_dir, "20261121-100000-sha-b")

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    if killed_after == "begin":
        monkeypatch.setattr(releases, "point_symlink", die)
    elif killed_after == "current":
        monkeypatch.setattr(releases, "update_release", die)
    else:
        monkeypatch.setattr(releases.Journal, "end", die)
    with pytest.raises(KeyboardInterrupt):
        releases.finish_release(deploy_dir, "20261121-100000-sha-b", "r1", "committed")
    monkeypatch.undo()
    unfinished = releases.open_release(deploy_dir)
    assert unfinished["id"] == "20261121-100000-sha-b"
    assert releases.recovery_owed(unfinished)["action"] == "finish"
    assert releases.finish_release(deploy_dir, "20261121-100000-sha-b", "r2", "committed") is True
    assert releases.finish_release(deploy_dir, "20261121-100000-sha-b", "r2", "committed") is False
    assert os.readlink(f"{deploy_dir}/current") == "releases/20261121-100000-sha-b"
    committed = releases.current_release(deploy_dir)
    assert (committed["result"], committed["ended_by"]) == ("committed", "r2")
    assert releases.open_release(deploy_dir) is None


def test_taking_back_after_the_commit_began_moves_current_back(deploy_dir):
    make(deploy_dir, "20261121-090000-sha-a", "committed")
    make(deploy_dir, "20261121-100000-sha-b", previous="20261121-090000-sha-a")
    releases.Journal(releases.journal_path(deploy_dir, "20261121-100000-sha-b"), "r1").begin("committed")
    releases.point_symlink(f"{deploy_dir}/current", "releases/20261121-100000-sha-b")
    releases.finish_release(deploy_dir, "20261121-100000-sha-b", "r1", "rolled_back", {"class": "regression", "message": "bad"})
    assert releases.current_id(deploy_dir) == "20261121-090000-sha-a"
    assert releases.read_release(deploy_dir, "20261121-100000-sha-b")["failure_class"] == "regression"


def test_an_end_is_final(deploy_dir):
    make(deploy_dir, "20261121-090000-sha-a", "committed")
    with pytest.raises(DeliveryError, match="Ending release 20261121-090000-sha-a as aborted: it has ended as committed"):
        releases.finish_release(deploy_dir, "20261121-090000-sha-a", "r1", "aborted")


@pytest.mark.parametrize(
    "begun, action",
    [([], "abort"), (["snapshotted"], "abort"), (["dependencies"], "undo"), (["rolling"], "undo"), (["rolling", "committed"], "finish")],
)
def test_what_is_owed(deploy_dir, begun, action):
    make(deploy_dir, "20261121-090000-sha-a")
    for step in begun:
        releases.Journal(releases.journal_path(deploy_dir, "20261121-090000-sha-a"), "r1").begin(step)
    owed = releases.recovery_owed(releases.open_release(deploy_dir))
    assert (owed["id"], owed["action"], owed["phase"], owed["release"]["tag"]) == ("20261121-090000-sha-a", action, "locked", "sha-a")


def test_the_way_back_starts_at_what_serves_and_does_not_bounce(deploy_dir):
    assert releases.previous_committed(deploy_dir) is None
    make(deploy_dir, "20261121-010000-sha-a", "committed")
    assert releases.previous_committed(deploy_dir) is None
    make(deploy_dir, "20261121-020000-sha-b", "committed")
    make(deploy_dir, "20261121-030000-sha-x", "rolled_back")
    make(deploy_dir, "20261121-040000-sha-c", "committed")
    assert releases.previous_committed(deploy_dir)["tag"] == "sha-b"
    make(deploy_dir, "20261121-050000-sha-b", "committed", kind="rollback")
    assert releases.previous_committed(deploy_dir)["tag"] == "sha-a"
    make(deploy_dir, "20261121-060000-sha-a", "committed", kind="rollback")
    assert releases.previous_committed(deploy_dir) is None


@pytest.mark.parametrize("hours", [-30, 0, 30], ids=["back", "stands-still", "forward"])
def test_the_newest_release_stays_the_newest_when_the_clock_is_set(deploy_dir, hours):
    now = datetime(2026, 11, 21, 9, tzinfo=timezone.utc)
    for tag, moment in (("sha-z", now), ("sha-y", now + timedelta(hours=hours)), ("sha-a", now + timedelta(hours=hours))):
        make(deploy_dir, releases.new_release_id(tag, moment, deploy_dir), "committed")
    assert [name[16:] for name in releases.release_ids(deploy_dir)] == ["sha-a", "sha-y", "sha-z"]
    assert releases.previous_committed(deploy_dir)["tag"] == "sha-y"
    state = releases.fold(releases.read_journal(deploy_dir, releases.release_ids(deploy_dir)[0]))
    assert min(state.durations.values()) >= 0


def test_a_lease_when_the_clock_is_set(deploy_dir, sleeper, monkeypatch):
    """Forward, it looks expired, and whoever had it stops at its next change. Back, it lasts longer; a dead holder is dead all the same."""
    clock = [datetime.now(timezone.utc)]

    class Clock(datetime):
        @classmethod
        def now(cls, tz=None):
            return clock[0]

    monkeypatch.setattr(releases, "datetime", Clock)
    first = releases.Lease(deploy_dir)
    first.acquire("r1", holder_of(sleeper.pid), "rel-1", 900)
    clock[0] += timedelta(hours=30)
    first.renew()
    with pytest.raises(DeliveryError, match="another run holds it"):
        releases.Lease(deploy_dir).acquire("r2", {}, "rel-2", 900)
    clock[0] += timedelta(hours=30)
    assert releases.Lease(deploy_dir).acquire("r2", holder_of(sleeper.pid), "rel-2", 900).previous_dead_holder["run_id"] == "r1"
    with pytest.raises(DeliveryError, match="lease lost"):
        first.check()
    clock[0] -= timedelta(hours=60)
    with pytest.raises(DeliveryError, match="another run holds it"):
        releases.Lease(deploy_dir).acquire("r3", {}, "rel-3", 900)
    releases.Lease(deploy_dir, "r2").renew()
    assert releases.parse_time(releases.Lease(deploy_dir).read()["expires"]) == clock[0].replace(microsecond=clock[0].microsecond // 1000 * 1000) + timedelta(
        seconds=900
    )
    sleeper.kill()
    sleeper.wait()
    assert releases.Lease(deploy_dir).acquire("r3", {}, "rel-3", 900).previous_dead_holder["run_id"] == "r2"


def test_the_way_back_never_leads_to_what_was_left_for_the_one_before_it(deploy_dir):
    make(deploy_dir, "20261121-010000-sha-good", "committed")
    make(deploy_dir, "20261121-020000-sha-bad", "committed")
    make(deploy_dir, "20261121-030000-sha-good", "committed", kind="rollback")
    make(deploy_dir, "20261121-040000-sha-new", "committed")
    assert releases.previous_committed(deploy_dir)["tag"] == "sha-good"
    make(deploy_dir, "20261121-050000-sha-good", "committed", kind="rollback")
    assert releases.previous_committed(deploy_dir) is None
    # Somebody who asks for it by its tag has it back, with the same release before it.
    make(deploy_dir, "20261121-060000-sha-bad", "committed", kind="rollback")
    assert releases.previous_committed(deploy_dir)["tag"] == "sha-good"


def test_the_way_back_where_the_promotion_has_been_pruned(deploy_dir):
    make(deploy_dir, "20261121-020000-sha-bad", "committed")
    make(deploy_dir, "20261121-030000-sha-good", "committed", kind="rollback")
    assert releases.previous_committed(deploy_dir) is None
    make(deploy_dir, "20261121-040000-sha-new", "committed")
    assert releases.previous_committed(deploy_dir)["id"] == "20261121-030000-sha-good"


def test_pruning_keeps_what_is_needed_to_go_back(deploy_dir):
    make(deploy_dir, "20261121-000000-sha-o", "frozen")
    make(deploy_dir, "20261121-010000-sha-a", "committed")
    make(deploy_dir, "20261121-020000-sha-b", "committed")
    make(deploy_dir, "20261121-030000-sha-c", "committed")
    for hour in range(4, 8):
        make(deploy_dir, f"20261121-0{hour}0000-sha-x{hour}", "rolled_back")
    removed, warnings = releases.prune_releases(deploy_dir, 2)
    assert warnings == []
    assert removed == ["20261121-050000-sha-x5", "20261121-040000-sha-x4", "20261121-010000-sha-a"]
    assert sorted(os.listdir(f"{deploy_dir}/releases")) == [
        "20261121-000000-sha-o",
        "20261121-020000-sha-b",
        "20261121-030000-sha-c",
        "20261121-060000-sha-x6",
        "20261121-070000-sha-x7",
    ]


def test_fingerprint_knows_tag_digests_and_files_but_not_the_release():
    def of(tag="sha-a", images=None, text="x", release_id="r-1"):
        files = [{"name": "deploy.env", "content": f"DELIVERY_RELEASE={release_id}\nX={text}\n"}]
        return releases.fingerprint(tag, images or {"app": "a@sha256:1"}, files, release_id)

    assert of() == of(release_id="r-2")
    assert len({of(), of(tag="sha-b"), of(images={"app": "a@sha256:2"}), of(text="y")}) == 4


def test_table_is_for_people(deploy_dir):
    make(deploy_dir, "20261121-010000-sha-a", "committed")
    make(deploy_dir, "20261121-020000-sha-b")
    releases.finish_release(deploy_dir, "20261121-020000-sha-b", "r1", "rolled_back", {"class": "not_ready", "message": "no"})
    found = releases.list_releases(deploy_dir)
    summaries = [releases.summarize(one, releases.current_id(deploy_dir)) for one in found]
    head, newest, oldest = releases.table(summaries)
    assert head.split() == [
        "release",
        "tag",
        "result",
        "when",
        "total",
        "pulled",
        "snapshotted",
        "migrated",
        "rolling",
        "verifying",
        "snapshot",
    ]
    assert newest.startswith("20261121-020000-sha-b    sha-b  rolled_back (not_ready)")
    assert oldest.startswith("20261121-010000-sha-a *  sha-a  committed  ")
    assert newest.index("rolled_back") == oldest.index("committed") == head.index("result")


# --- gates


@pytest.mark.parametrize(
    "records, passed, reason",
    [
        ([], False, "sha256:1 has no record of staging: it was never committed there"),
        ([{"environment": "production", "result": "committed"}], False, "sha256:1 has no record of staging: it was never committed there"),
        ([{"environment": "staging", "result": "committed", "created": "T1"}], True, "sha256:1 was committed in staging at T1"),
        (
            [{"environment": "staging", "result": "committed", "digest": "sha256:2"}],
            False,
            "sha256:1 has no record of staging: it was never committed there",
        ),
        (
            [
                {"environment": "staging", "result": "rolled_back", "created": "T2"},
                {"environment": "staging", "result": "committed", "created": "T1"},
            ],
            False,
            "sha256:1 ended as rolled_back in staging at T2",
        ),
        (
            [
                {"environment": "staging", "result": "aborted", "created": "T2"},
                {"environment": "staging", "result": "committed", "created": "T1"},
            ],
            True,
            "sha256:1 was committed in staging at T1",
        ),
    ],
)
def test_gate(records, passed, reason):
    assert releases.gate_passed(records, "staging", "sha256:1") == (passed, reason)


def test_failed_attempts_do_not_push_out_what_can_be_gone_back_to(tmp_path):
    def make(number, end, **record):
        release_id = f"202611{number:02d}-090000-sha-{number}"
        full = {"id": release_id, "tag": f"sha-{number}", "kind": "promote", "started": releases.timestamp(), **record}
        releases.create_release(str(tmp_path), full, "r1")
        releases.finish_release(str(tmp_path), release_id, "r1", end)
        return release_id

    of_a_set = make(1, "committed")
    gone = make(2, "committed")
    kept = [make(number, "committed") for number in (3, 4)]
    failed = [make(number, "aborted") for number in range(5, 10)]
    (tmp_path / "snapshots").mkdir()
    (tmp_path / "snapshots" / "a.manifest.json").write_text(json.dumps({"metadata": {"previous": of_a_set}}))
    removed, warnings = releases.prune_releases(str(tmp_path), 2)
    assert sorted(removed) == sorted([gone, *failed[:3]]) and warnings == []
    assert sorted(releases.release_ids(str(tmp_path))) == sorted([of_a_set, *kept, *failed[3:]])

# --- several hosts


def test_what_a_lost_host_is_owed_is_asked_for_only_when_it_is_there(deploy_dir):
    make(deploy_dir, "20261121-090000-sha-a", "committed")
    make(deploy_dir, "20261121-100000-sha-b")
    releases.Journal(releases.journal_path(deploy_dir, "20261121-100000-sha-b"), "r1").begin("hosts")
    failure = {"class": "not_ready", "message": "web"}
    releases.finish_release(deploy_dir, "20261121-100000-sha-b", "r1", "rollback_failed", failure, ["app-2", "app-3"])
    first = releases.read_release(deploy_dir, "20261121-100000-sha-b")
    assert releases.open_release(deploy_dir) is None
    assert releases.owed_release(deploy_dir, ["app-1"]) is None
    owed = releases.recovery_owed(releases.owed_release(deploy_dir, ["app-1", "app-3"]))
    assert (owed["action"], owed["hosts"]) == ("undo", ["app-2", "app-3"])

    assert releases.owed_after(first, ["app-3"], []) == ["app-2"]
    releases.finish_release(deploy_dir, "20261121-100000-sha-b", "r2", "rollback_failed", None, ["app-2"])
    assert releases.owed_release(deploy_dir, ["app-1", "app-3"]) is None
    releases.finish_release(deploy_dir, "20261121-100000-sha-b", "r3", "rolled_back")
    last = releases.read_release(deploy_dir, "20261121-100000-sha-b")
    assert releases.owed_release(deploy_dir, ["app-2"]) is None
    assert (last["result"], last["owed"], last["failure"]) == ("rolled_back", [], "web")
    assert (last["seconds"], last["ended"]) == (first["seconds"], first["ended"])


@pytest.mark.parametrize(
    ("owed", "hosts", "lost", "after"),
    [
        ([], ["a", "b", "c"], [], []),
        ([], ["a", "b", "c"], ["b"], ["b"]),
        (["c"], ["c"], [], []),
        (["c"], ["c"], ["c"], ["c"]),
        (["b", "c"], ["c"], [], ["b"]),
    ],
)
def test_what_is_owed_after_a_way_back(owed, hosts, lost, after):
    assert releases.owed_after({"owed": owed}, hosts, lost) == after


def test_a_release_that_is_owed_is_not_pruned(deploy_dir):
    make(deploy_dir, "20261121-010000-sha-a")
    releases.finish_release(deploy_dir, "20261121-010000-sha-a", "r1", "rollback_failed", None, ["app-3"])
    for hour in range(2, 6):
        make(deploy_dir, f"20261121-0{hour}0000-sha-{hour}", "committed")
    assert releases.prune_releases(deploy_dir, 2) == (["20261121-030000-sha-3", "20261121-020000-sha-2"], [])


def test_another_host_has_files_and_a_current_release_and_no_more(deploy_dir):
    files = [{"name": "compose.yaml", "content": "services: {}\n"}]
    for hour in range(1, 5):
        assert releases.lay_out(deploy_dir, f"20261121-0{hour}0000-sha-a", files)
    assert not releases.lay_out(deploy_dir, "20261121-040000-sha-a", files)
    assert releases.adopt(deploy_dir, "20261121-010000-sha-a", 2) == (True, ["20261121-020000-sha-a"], [])
    assert releases.adopt(deploy_dir, "20261121-010000-sha-a", 2) == (False, [], [])
    assert releases.current_id(deploy_dir) == "20261121-010000-sha-a"
    assert releases.list_releases(deploy_dir) == []
