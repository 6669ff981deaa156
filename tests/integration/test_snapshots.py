# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Snapshot sets on a real Docker engine with real Kopia and real restic: taken, damaged, killed, given back."""

from __future__ import annotations

import glob
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
import snapshot_fixture
from snapshot_fixture import BACKUP, COLLECTIONS, ENGINES, IN_WINDOW, MARKS, PASSWORD, Site, docker, hold_program, until

from ansible_collections.selfhost.delivery.plugins.module_utils import engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import freeze, taking
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import scan

pytestmark = MARKS
image, site, one_site = snapshot_fixture.image, snapshot_fixture.site, snapshot_fixture.one_site

#: Kills the process at its STEP-th step of a restore that counts: a note in the journal or an exchange.
KILL_AT = """
import itertools
steps, first = itertools.count(1), os.getpid()
def counted(function, counts):
    def wrapped(*arguments):
        dies = counts(*arguments) and next(steps) == STEP
        if dies and BEFORE and (GUARD_TOO or os.getpid() == first):
            os.kill(os.getpid(), signal.SIGKILL)
        answer = function(*arguments)
        if dies and not BEFORE and (GUARD_TOO or os.getpid() == first):
            os.kill(os.getpid(), signal.SIGKILL)
        return answer
    return wrapped
restore.exchange = counted(restore.exchange, lambda one, other: one.endswith("/tree"))
restore._Restoring._note = counted(restore._Restoring._note, lambda self, phase: True)
if GUARD_TOO:
    restore._recover_patiently = lambda *arguments: None
"""


def test_a_set_comes_back_byte_for_byte_and_what_it_replaces_is_kept(site: Site) -> None:
    before = site.quiet()
    taken = site.call("snapshot", set_id="one")
    assert taken["changed"] and taken["parts"][0]["stable"]
    manifest = json.loads((site.manifests / "one.manifest.json").read_text())
    assert [part["name"] for part in manifest["parts"]] == [*site.volumes, str(site.config)]
    again = site.call("snapshot", set_id="one")
    assert not again["changed"]
    docker("start", site.writer)
    site.damage()
    damaged_plain = (site.data(0) / "plain").read_bytes()

    would = site.call("restore", check_mode=True, set_id="latest")
    assert would["changed"] and would["set_id"] == "one" and len(would["restored"]) == 3
    assert (site.data(0) / "plain").read_bytes() == damaged_plain and site.leftovers() == []

    docker("stop", "-t", "5", site.writer)
    result = site.call("restore", set_id="latest")
    assert site.trees() == before
    assert site.leftovers() == []
    assert site.state() == "exited"
    assert not site.call("restore", set_id="one")["changed"]

    # Nothing is lost: the state that was replaced comes back the same way.
    assert site.sets() == {"one": True, result["replaced_set_id"]: True}
    site.call("restore", set_id=result["replaced_set_id"], keep_current=False)
    assert (site.data(0) / "plain").read_bytes() == damaged_plain and (site.data(0) / "new").read_text() == "new"
    assert site.config.read_text() == "SECRET=two\n"
    assert site.call("restore", check_mode=True, set_id="latest")["set_id"] == "one"


def test_a_pause_holds_all_volumes_at_one_moment_and_gives_back_the_states_found(site: Site, image: str) -> None:
    resting = f"{site.name}-resting"
    docker("create", "--network", "none", "--name", resting, "-v", f"{site.volumes[0]}:/a", image, "/bin/sh")
    docker("run", "-d", "--network", "none", "--name", f"{resting}2", "-v", f"{site.volumes[0]}:/a", image, "/bin/busybox", "sleep", "1000")
    docker("pause", f"{resting}2")
    try:
        result = site.call("snapshot", set_id="live")
        assert result["freeze_seconds"] > 0
        assert [one["name"] for one in result["containers"]] == [site.writer]
        assert (site.state(), site.state(resting), site.state(f"{resting}2")) == ("running", "created", "paused")
        docker("rm", "-f", resting, f"{resting}2")
        site.call("restore", set_id="live", containers="leave_stopped", keep_current=False)
        assert site.state() == "exited"
        # The writer writes a, then b: one moment means equal numbers, or a one ahead.
        a, b = (int((site.data(n) / "n").read_text()) for n in (0, 1))
        assert a - b in (0, 1)
    finally:
        subprocess.run(["docker", "rm", "-f", resting, f"{resting}2"], check=False, capture_output=True)


def test_a_restore_under_a_running_writer_stops_it_keeps_its_last_write_and_starts_it(site: Site) -> None:
    site.call("snapshot", set_id="one")
    stored = json.loads((site.manifests / "one.manifest.json").read_text())["parts"]
    site.damage()
    result = site.call("restore", set_id="one")
    assert result["containers"] == [{"name": site.writer, "found": "running"}]
    assert site.state() == "running" and site.leftovers() == []
    site.quiet()
    assert (site.data(0) / "dir" / "inner").read_text() == "inner" and not (site.data(0) / "new").exists()
    site.call("restore", set_id="one", keep_current=False)
    assert [scan(str(site.data(n))).digest for n in (0, 1)] == [part["digest"] for part in stored[:2]]


def test_content_changed_under_the_same_size_and_time_is_not_kept_stale(site: Site) -> None:
    """The writer runs, so there is a warm pass; the change comes after it, before the freeze."""
    target = site.data(0) / "stale"
    target.write_text("AAAA")
    os.utime(target, ns=(10**18, 10**18))
    wrapper, reached = hold_program(site, BACKUP[site.kind], 1)
    site.call("snapshot", set_id="first")
    process = site.start("snapshot", set_id="second", program=str(wrapper), setup="")
    # The wrapper stands before the warm pass: the change falls between the warm scan and the window.
    pid = int(until(lambda: reached.exists() and reached.read_text(), "the warm pass"))
    target.write_text("BBBB")
    os.utime(target, ns=(10**18, 10**18))
    os.kill(pid, signal.SIGKILL)
    answer = json.loads(process.communicate()[0])
    assert not answer.get("failed"), answer
    target.unlink()
    site.call("restore", set_id="second", keep_current=False)
    assert (site.data(0) / "stale").read_text() == "BBBB"


def test_stop_stops_and_starts(one_site: Site) -> None:
    started = docker("inspect", "--format", "{{.State.StartedAt}}", one_site.writer)
    result = one_site.call("snapshot", set_id="stopped", consistency="stop")
    (held,) = result["containers"]
    assert (held["name"], held["action"], held["found"]) == (one_site.writer, "stop", "running") and held["freeze_ms"] > 0
    assert one_site.state() == "running"
    assert docker("inspect", "--format", "{{.State.StartedAt}}", one_site.writer) != started


def test_hooks_run_before_and_after_even_when_the_snapshot_fails(one_site: Site, image: str) -> None:
    # Beside hooks nobody is held still, and the writer's files come and go: it rests.
    one_site.quiet()
    helper = f"{one_site.writer}-helper"
    docker(
        "run",
        "--detach",
        "--network",
        "none",
        "--name",
        helper,
        "-e",
        "PATH=/bin",
        "-v",
        f"{one_site.volumes[1]}:/b",
        image,
        "/bin/sh",
        "-c",
        "busybox sleep 600",
    )
    hooks = [
        {"container": helper, "before": ["/bin/sh", "-c", "echo before > /b/hook"], "after": ["/bin/sh", "-c", "echo after >> /b/hook"]}
    ]
    try:
        one_site.call("snapshot", set_id="hooked", consistency="hooks", hooks=hooks)
        assert (one_site.data(1) / "hook").read_text() == "before\nafter\n"
        bad = one_site.root / "bad"
        bad.write_text(f'#!/bin/sh\ncase "$*" in *"{BACKUP[one_site.kind]}"*) exit 9;; esac\nexec {shutil.which(one_site.kind)} "$@"\n')
        bad.chmod(0o755)
        with pytest.raises(DeliveryError):
            one_site.call("snapshot", set_id="hooked2", consistency="hooks", hooks=hooks, program=str(bad))
        assert (one_site.data(1) / "hook").read_text() == "before\nafter\n" and one_site.leftovers() == []
        with pytest.raises(DeliveryError, match="it ended with 3"):
            failing = [{"container": helper, "before": ["/bin/sh", "-c", "exit 3"], "after": []}]
            one_site.call("snapshot", set_id="hooked3", consistency="hooks", hooks=failing)
        assert one_site.sets() == {"hooked": True}
    finally:
        docker("rm", "--force", helper)


def test_sigkill_during_the_freeze_thaws_at_once_and_the_next_run_is_whole(site: Site) -> None:
    reached = site.root / "reached"
    process = site.start("snapshot", f"REACHED = {str(reached)!r}\n{IN_WINDOW}", set_id="killed")
    try:
        until(reached.exists, "the freeze")
        assert site.state() == "paused"
        process.kill()
        process.wait()
        until(lambda: site.state() == "running", "the writer running again")
        until(lambda: site.leftovers() == [], "nothing left by the guard")
    finally:
        process.kill()
        process.communicate()
    assert site.sets().get("killed", False) is False
    with pytest.raises(DeliveryError, match="did not end|no such set"):
        site.call("restore", set_id="killed")
    assert site.call("snapshot", set_id="killed")["changed"]
    assert site.sets() == {"killed": True}


def test_a_freeze_whose_guard_died_too_is_mended_by_the_next_run(one_site: Site) -> None:
    identity = docker("inspect", "--format", "{{.Id}}", one_site.writer)
    one_site.manifests.mkdir(mode=0o700)
    docker("pause", one_site.writer)
    record = {"held": [{"id": identity, "name": one_site.writer, "action": "pause", "found": "running"}], "after": []}
    (one_site.manifests / ".freeze-old.json").write_text(json.dumps(record))
    one_site.call("snapshot", set_id="next")
    assert one_site.state() == "running" and one_site.leftovers() == []


def test_a_container_the_engine_hangs_on_is_thawed_and_unpaused(one_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The hang is a race of the engine's own health check with its pause; the first, impatient engine plays it, the rest is real."""
    asked = []

    class Hung(engine.Engine):
        def inspect(self, container: str) -> dict[str, t.Any]:
            if self.timeout == freeze.PATIENCE and not asked:
                asked.append(container)
                raise DeliveryError("Inspecting it", "no answer", failure_class="transport")
            return super().inspect(container)

    monkeypatch.setattr(freeze, "Engine", Hung)
    identity = docker("inspect", "--format", "{{.Id}}", one_site.writer)
    docker("pause", one_site.writer)
    freeze.release(Hung(), [{"id": identity, "name": one_site.writer, "action": "pause", "found": "running"}])
    assert asked == [identity]
    assert one_site.state() == "running"
    before = (one_site.data(0) / "n").read_text()
    assert until(lambda: (one_site.data(0) / "n").read_text() not in ("", before), "the writer writing on")
    docker("stop", "-t", "5", one_site.writer)


def test_no_freeze_meets_a_health_check(image: str, tmp_path: Path) -> None:
    """One that does makes the engine keep the container frozen for seconds; a container without a check tells what is usual here."""
    checks = {"plain": [], "checked": ["--health-cmd", "true", "--health-interval", "0.3s"]}
    ids = {
        name: docker("run", "--detach", "--network", "none", *options, image, "/bin/sh", "-c", "sleep 600")
        for name, options in checks.items()
    }
    seconds: dict[str, list[float]] = {"plain": [], "checked": []}
    try:
        for turn in range(15):
            for name, identity in ids.items():
                held = [{"id": identity, "name": name, "action": "pause", "found": "running"}]
                with freeze.Window(engine.Engine(), held, (), str(tmp_path / "record"), 60, 10) as window:
                    assert docker("inspect", "--format", "{{.State.Paused}}", identity) == "true"
                seconds[name].append(window.seconds)
            time.sleep(turn * 0.03)
        assert max(seconds["checked"]) < 5 * max(seconds["plain"]) + 1, seconds
    finally:
        docker("rm", "--force", *ids.values())


# Steps of a restore of three parts: 1 staging, 2 holding, 3 swapping, 4-6 the exchanges, 7 releasing.
@pytest.mark.parametrize("guard_too", [True, False], ids=["guard-dead", "guard-alive"])
@pytest.mark.parametrize("step", [2, 3, 5, 7])
def test_sigkill_between_any_two_steps_of_a_restore_is_mended(one_site: Site, step: int, guard_too: bool) -> None:
    before = one_site.quiet()
    one_site.call("snapshot", set_id="one")
    docker("start", one_site.writer)
    one_site.damage()
    setup = f"STEP, BEFORE, GUARD_TOO = {step}, False, {guard_too}\n{KILL_AT}"
    process = one_site.start("restore", setup, set_id="one", keep_current=False)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    if guard_too:
        assert one_site.leftovers() != []
    else:
        # The guard alone brings the app back, with the old or the new data, never a mixture.
        until(lambda: one_site.leftovers() == [] and one_site.state() == "running", "the guard's work")
        new = [(one_site.data(0) / "new").exists(), one_site.config.read_text() == "SECRET=two\n"]
        assert new == ([True, True] if step < 3 else [False, False])
    result = one_site.call("restore", set_id="one", keep_current=False)
    assert len(result["recovered"]) == (1 if guard_too else 0)
    assert one_site.state() == "running" and one_site.leftovers() == []
    one_site.quiet()
    one_site.call("restore", set_id="one", keep_current=False, containers="leave_stopped")
    assert one_site.trees() == before


def test_sigkill_while_the_copy_is_written_leaves_the_live_data_and_nothing_else(site: Site) -> None:
    site.call("snapshot", set_id="one")
    site.damage()
    # Kopia's first restore is the manifest with its sidecars.
    wrapper, reached = hold_program(site, "restore ", 2)
    process = site.start("restore", set_id="one", program=str(wrapper))
    until(reached.exists, "the copy being written")
    assert site.state() == "running"
    process.kill()
    process.communicate()
    until(lambda: site.leftovers() == [], "nothing left by the guard")
    assert (site.data(0) / "plain").read_bytes() == b"damaged" and site.state() == "running"
    os.kill(int(reached.read_text()), signal.SIGKILL)


def test_damage_in_the_repository_is_found_before_anything_is_touched(site: Site) -> None:
    site.call("snapshot", set_id="one")
    site.damage()
    packs = [
        p for p in glob.glob(f"{site.root}/repository/{'p' if site.kind == 'kopia' else 'data'}/**/*", recursive=True) if os.path.isfile(p)
    ]
    largest = max(packs, key=os.path.getsize)
    os.chmod(largest, 0o600)
    with open(largest, "r+b") as handle:
        handle.seek(os.path.getsize(largest) // 3)
        block = handle.read(2000)
        handle.seek(-len(block), os.SEEK_CUR)
        handle.write(bytes(byte ^ 0xFF for byte in block))
    with pytest.raises(DeliveryError) as caught:
        site.call("restore", set_id="one")
    assert caught.value.failure_class == "snapshot"
    assert (site.data(0) / "plain").read_bytes() == b"damaged"
    assert site.state() == "running" and site.leftovers() == []


def test_a_set_without_manifest_or_parts_is_never_restored(site: Site) -> None:
    site.call("snapshot", set_id="one", keep=0)
    manifest = json.loads((site.manifests / "one.manifest.json").read_text())
    manifest["parts"][0]["root"] = "k0000"
    (site.manifests / "one.manifest.json").write_text(json.dumps(manifest))
    assert site.sets() == {"one": False}
    for wanted in ("one", "latest", "nothing"):
        with pytest.raises(DeliveryError) as caught:
            site.call("restore", set_id=wanted)
        assert caught.value.failure_class == "snapshot"
    assert site.state() == "running"


def test_another_host_finds_the_set_in_the_repository_and_makes_the_volume_anew(site: Site) -> None:
    before = site.quiet()
    site.call("snapshot", set_id="one")
    site.remove()
    site.config.unlink()
    shutil.rmtree(site.manifests)
    shutil.rmtree(site.root / "engine")
    assert site.sets() == {"one": True}
    assert site.call("restore", set_id="latest")["changed"]
    assert site.trees() == before


def test_keep_forgets_the_oldest(site: Site) -> None:
    for number in (1, 2, 3):
        result = site.call("snapshot", set_id=f"set-{number}", keep=2)
    assert result["forgotten"] == ["set-1"] and result["warnings"] == []
    assert site.sets() == {"set-2": True, "set-3": True}
    assert site.call("restore", check_mode=True, set_id="set-2")["set_id"] == "set-2"


def test_passwords_and_wrong_or_lost_repositories(site: Site) -> None:
    with pytest.raises(DeliveryError, match="the password is wrong") as caught:
        site.call("info", password="other one")
    assert "other one" not in caught.value.message
    found = site.call("repository", state="present")
    assert not found["changed"]
    with pytest.raises(DeliveryError, match=f"its id is {found['repository_id']}, not abc"):
        site.call("snapshot", set_id="one", repository_id="abc")
    # An unmounted disk: the place is there, and empty.
    os.rename(site.root / "repository", site.root / "elsewhere")
    (site.root / "repository").mkdir()
    for what, more in (
        ("snapshot", {"set_id": "one"}),
        ("info", {}),
        ("repository", {"state": "present"}),
        ("repository", {"state": "connected"}),
    ):
        with pytest.raises(DeliveryError, match="used one there|used a repository with the id"):
            site.call(what, **more)
    assert list((site.root / "repository").iterdir()) == []
    # Another repository in its place.
    (site.root / "repository").rmdir()
    site.call("repository", state="present", config_dir=str(site.root / "engine2"))
    with pytest.raises(DeliveryError, match="used .* there before|password is wrong"):
        site.call("snapshot", set_id="one")
    assert site.state() == "running" and not list(site.manifests.glob("*.manifest.json"))


def test_no_secret_on_a_command_line_or_in_a_file(site: Site) -> None:
    wrapper, reached = hold_program(site, BACKUP[site.kind], 2)
    process = site.start("snapshot", set_id="one", program=str(wrapper))
    pid = int(until(lambda: reached.exists() and reached.read_text(), "the final pass"))
    for path in glob.glob("/proc/[0-9]*/cmdline"):
        try:
            assert PASSWORD.encode() not in Path(path).read_bytes(), path
        except OSError:
            continue
    os.kill(pid, signal.SIGKILL)
    assert json.loads(process.communicate()[0])["failed"]
    assert site.state() == "running" and site.sets() == {}
    found = subprocess.run(["grep", "-rlF", PASSWORD, str(site.root)], check=False, capture_output=True, text=True).stdout
    assert found == ""
    for folder in (site.root / "engine").iterdir():
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700


def test_a_full_disk_ends_with_capacity_and_nothing_half(site: Site) -> None:
    small = site.root / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(small)], check=True)
    try:
        place = {"repository": str(small / "r"), "config_dir": str(site.root / "engine3")}
        site.call("repository", state="present", **place)
        (site.data(1) / "large").write_bytes(os.urandom(40_000_000))
        with pytest.raises(DeliveryError) as caught:
            site.call("snapshot", set_id="big", **place)
        assert caught.value.failure_class == "capacity" and "estimate" in caught.value.details
        # The same seen by the engine itself, when the estimate was wrong.
        process = site.start("snapshot", "taking.check_room = lambda *a: {}", set_id="big", **place)
        answer = json.loads(process.communicate()[0])
        assert answer["failure_class"] == "capacity", answer
        assert site.state() == "running" and not (site.manifests / "big.manifest.json").exists()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_disk_too_small_for_the_copy_is_refused_before_anything_stops(one_site: Site) -> None:
    small = one_site.root / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=30m", "none", str(small)], check=True)
    try:
        target = small / "data"
        target.mkdir()
        (target / "large").write_bytes(os.urandom(14_000_000))
        one_site.call("snapshot", set_id="one", volumes=[], paths=[str(target)])
        (target / "large").write_bytes(b"damaged")
        (small / "ballast").write_bytes(bytes(20_000_000))
        with pytest.raises(DeliveryError) as caught:
            one_site.call("restore", set_id="one")
        assert caught.value.failure_class == "capacity"
        process = one_site.start("restore", "restore._Restoring._check_space = lambda self: None", set_id="one")
        answer = json.loads(process.communicate()[0])
        assert answer["failure_class"] == "capacity", answer
        assert sorted(os.listdir(small)) == ["ballast", "data"] and (target / "large").read_bytes() == b"damaged"
        # A mount point itself cannot be exchanged, and is refused by name.
        one_site.call("snapshot", set_id="mounted", volumes=[], paths=[str(small)])
        (small / "ballast").unlink()
        with pytest.raises(DeliveryError, match="is a mount point"):
            one_site.call("restore", set_id="mounted")
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_what_an_engine_cannot_keep_is_refused_by_name(site: Site) -> None:
    docker("stop", "-t", "5", site.writer)
    (site.data(0) / "a.kopia-entry").write_text("x")
    odd = os.path.join(os.fsencode(site.data(1)), b"latin-\xe9")
    with open(odd, "w") as handle:
        handle.write("y")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(site.data(1) / "s"))
    if site.kind == "restic":
        before = site.trees()
        site.call("snapshot", set_id="one")
        site.damage()
        site.call("restore", set_id="one")
        assert site.trees() == before
    else:
        with pytest.raises(DeliveryError, match="cannot keep the name a.kopia-entry"):
            site.call("snapshot", set_id="one")
        (site.data(0) / "a.kopia-entry").unlink()
        with pytest.raises(DeliveryError, match="cannot keep the name latin-"):
            site.call("snapshot", set_id="one")
        assert site.sets() == {}


def test_a_writer_outside_of_the_containers_is_noticed(one_site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_files = taking.copy_files

    def meanwhile(*arguments: t.Any) -> t.Any:
        (one_site.data(0) / "outside").touch()
        return copy_files(*arguments)

    monkeypatch.setattr(taking, "copy_files", meanwhile)
    with pytest.raises(DeliveryError, match="changed while its containers were held still"):
        one_site.call("snapshot", set_id="one")
    # The same without room for the copies, when the engine reads all of it in the window.
    monkeypatch.setattr(taking.Taking, "_fits", lambda self, size: False)
    wrapper, _reached = hold_program(one_site, BACKUP[one_site.kind], 99)
    say = f'case "$*" in *"{BACKUP[one_site.kind]}"*) date +%N > {one_site.data(0) / "outside"};; esac\ncase'
    wrapper.write_text(wrapper.read_text().replace("case", say, 1))
    with pytest.raises(DeliveryError, match="changed while its containers were held still: outside"):
        one_site.call("snapshot", set_id="one", program=str(wrapper))
    assert one_site.state() == "running" and one_site.sets() == {}


def test_without_room_for_copies_the_engine_reads_in_the_window(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(taking.Taking, "_fits", lambda self, size: False)
    site.call("snapshot", set_id="one")
    stored = json.loads((site.manifests / "one.manifest.json").read_text())["parts"]
    assert all("delta" not in part and part["digest"] for part in stored)
    site.damage()
    site.call("restore", set_id="one", keep_current=False, containers="leave_stopped")
    assert [scan(str(site.data(n))).digest for n in (0, 1)] == [part["digest"] for part in stored[:2]]


def test_bad_requests_are_refused_before_anything_is_touched(one_site: Site) -> None:
    would = one_site.call("snapshot", check_mode=True, set_id="one")
    assert would["changed"] and would["estimate"]["new_bytes"] > 0
    assert not one_site.call("snapshot", preflight=True, set_id="one")["changed"]
    assert not one_site.manifests.exists()
    link = one_site.root / "link"
    link.symlink_to(one_site.config)
    for more, words in (
        ({"volumes": ["no-such-volume"]}, "does not have it"),
        ({"paths": ["relative"]}, "not an absolute path"),
        ({"paths": [str(link)]}, "it is a link"),
        ({"paths": [str(one_site.root)]}, "lies within it"),
        ({"volumes": [], "paths": []}, "neither volumes nor paths"),
        ({"set_id": "../escape"}, "not a name"),
        ({"consistency": "hooks"}, "need each other"),
    ):
        with pytest.raises(DeliveryError, match=words) as caught:
            one_site.call("snapshot", **{"set_id": "one", **more})
        assert caught.value.failure_class == "config"
    assert one_site.state() == "running" and one_site.sets() == {}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ENGINES)
def test_the_role_prepares_takes_and_restores_twice_the_same(kind: str, tmp_path: Path) -> None:
    for program in (kind, "ansible-playbook"):
        if not (shutil.which(program) or (Path(sys.executable).parent / program).exists()):
            pytest.skip(f"MISSING PROGRAM {program}")
    data = tmp_path / "data"
    data.mkdir()
    (data / "f").write_text("one")
    extra = {
        "ansible_python_interpreter": sys.executable,
        "snapshots_app": "roletest",
        "snapshots_engine": kind,
        "snapshots_repository": str(tmp_path / "repository"),
        "snapshots_password_file": str(tmp_path / "etc" / "password"),
        "snapshots_manifest_dir": str(tmp_path / "manifests"),
        "snapshots_paths": [str(data)],
        "snapshots_set_id": "one",
    }
    role = {"name": "selfhost.delivery.snapshots"}
    includes = [{"ansible.builtin.include_role": {**role, "tasks_from": name}} for name in ("take", "info", "restore")]
    play = [{"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [{"ansible.builtin.import_role": role}]}]
    (tmp_path / "prepare.json").write_text(json.dumps(play))
    (tmp_path / "work.json").write_text(json.dumps([{**play[0], "tasks": includes}]))

    def changed(playbook: str, *options: str) -> int:
        done = subprocess.run(
            [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-e", json.dumps(extra), *options, playbook],
            cwd=tmp_path,
            env={
                **os.environ,
                "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
                "ANSIBLE_STDOUT_CALLBACK": "default",
                "ANSIBLE_NOCOLOR": "1",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return int(done.stdout.rsplit("changed=", 1)[1].split()[0])

    assert changed("prepare.json", "--check") > 0 and not (tmp_path / "etc").exists()
    assert changed("prepare.json") > 0
    assert changed("prepare.json") == 0 and changed("prepare.json", "--check") == 0
    assert stat.S_IMODE((tmp_path / "etc" / "password").stat().st_mode) == 0o600
    assert changed("work.json") == 1
    (data / "f").write_text("two")
    assert changed("work.json") == 1 and (data / "f").read_text() == "one"
    assert changed("work.json") == 0
