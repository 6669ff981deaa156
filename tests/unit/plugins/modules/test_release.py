# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The module as a task calls it, on a real deploy dir."""

from __future__ import annotations

import json
import os

import pytest
from ansible.module_utils.testing import patch_module_args

from ansible_collections.selfhost.delivery.plugins.module_utils import releases
from ansible_collections.selfhost.delivery.plugins.modules import release

IMAGES = {"app": "registry.example.com/shop/app@sha256:1"}
FAILURE = {"class": "not_ready", "message": "web never got ready"}


@pytest.fixture
def call(tmp_path, capsys):
    """Run the module; the result as JSON. ``run`` is the run id."""

    def run_module(state, run="r1", check=False, **options):
        arguments = {
            "app": "shop",
            "environment": "production",
            "deploy_dir": str(tmp_path),
            "state": state,
            "run_id": run,
            # Another machine: nobody can say whether that process lives.
            "holder": {
                "user": "deploy",
                "host": f"ci-{run}",
                "pid": 7,
                "pid_started": "1",
                "boot_id": "elsewhere",
                "pid_namespace": "pid:[1]",
            },
            "_ansible_check_mode": check,
            **options,
        }
        with patch_module_args(arguments), pytest.raises(SystemExit):
            release.main()
        return json.loads(capsys.readouterr().out)

    return run_module


def start(call, tag="sha-a", **options):
    options.setdefault("release_id", f"20261121-090000-{tag}")
    return call("started", tag=tag, plan={"images": IMAGES}, files=[{"name": "compose.yaml", "content": "services: {}\n"}], **options)


def tree(path):
    found = {}
    for folder, _folders, names in os.walk(path):
        for name in names:
            with open(os.path.join(folder, name)) as handle:
                found[os.path.relpath(os.path.join(folder, name), path)] = handle.read()
    return found


def test_the_way_of_a_release(call, tmp_path):
    started = start(call, release_id=None)
    release_id = started["release_id"]
    assert started["changed"] and release_id.endswith("-sha-a") and started["previous"] is None
    assert not started["unchanged"] and started["recover"] is None and started["took_over"] is None
    assert started["release_dir"] == str(tmp_path / "releases" / release_id)
    assert (tmp_path / "releases" / release_id / "compose.yaml").read_text() == "services: {}\n"
    stepped = call("step", release_id=release_id, step="pulled", event="begin", data={"images": 1})
    assert stepped["changed"] and releases.Lease(str(tmp_path)).read()["step"] == "pulled"
    assert call("step", release_id=release_id, step="pulled", event="begin")["changed"] is False
    call("step", release_id=release_id, step="pulled", event="end")
    committed = call("committed", release_id=release_id)
    assert committed["changed"] and committed["pruned"] == []
    assert started["release"]["tag"] == "sha-a" and committed["lines"][0].startswith(
        f"sha-a committed in production, release {release_id}, "
    )
    assert committed["release"]["result"] == "committed" and committed["release"]["durations"]["pulled"] >= 0
    assert os.readlink(tmp_path / "current") == f"releases/{release_id}"
    assert not (tmp_path / "lock.json").exists()
    before = tree(tmp_path)
    assert call("committed", release_id=release_id)["changed"] is False
    assert tree(tmp_path) == before
    journal = [(entry["step"], entry["event"]) for entry in releases.read_journal(str(tmp_path), release_id)]
    assert journal == [
        ("planned", "begin"),
        ("planned", "end"),
        ("locked", "begin"),
        ("locked", "end"),
        ("pulled", "begin"),
        ("pulled", "end"),
        ("committed", "begin"),
        ("committed", "end"),
    ]


def test_the_same_again_is_unchanged_and_keeps_no_lock(call, tmp_path):
    first = start(call)
    call("committed", release_id=first["release_id"])
    before = tree(tmp_path)
    again = start(call, run="r2", release_id="20261121-100000-sha-a")
    assert (again["changed"], again["unchanged"], again["release_id"]) == (False, True, first["release_id"])
    assert again["release"] == again["previous"]
    assert tree(tmp_path) == before
    forced = start(call, run="r2", release_id="20261121-100000-sha-a", unchanged_ok=False)
    assert forced["changed"] and forced["previous"]["id"] == first["release_id"]


def test_another_digest_is_another_release(call):
    call("committed", release_id=start(call)["release_id"])
    other = call("started", tag="sha-a", release_id="20261121-100000-sha-a", plan={"images": {"app": "x@sha256:2"}})
    assert other["changed"] and not other["unchanged"]


def test_a_living_holder_is_reported(call):
    start(call)
    refused = start(call, run="r2", tag="sha-b")
    assert refused["failed"] and refused["failure_class"] == "lock"
    assert "another run holds it: deploy@ci-r1 (pid 7), since " in refused["msg"] and "at step locked" in refused["msg"]
    assert refused["lock"]["run_id"] == "r1"


def test_the_end_of_a_lease_is_an_open_release_to_recover(call, tmp_path):
    first = start(call, ttl=-1)
    releases.Journal(first["journal"], "r1").begin("rolling", "web")
    second = start(call, run="r2", tag="sha-b")
    assert second["recover"]["id"] == first["release_id"] == second["release_id"]
    assert (second["recover"]["action"], second["recover"]["state"]["services"]) == ("undo", {"web": "rolling"})
    assert second["recover"]["release"]["plan"] == {"images": IMAGES}
    assert second["took_over"]["run_id"] == "r1"
    assert releases.release_ids(str(tmp_path)) == [first["release_id"]]
    assert releases.Lease(str(tmp_path)).read()["run_id"] == "r2"
    # The first run comes back to life: it can do nothing any more.
    for late in (
        call("step", release_id=first["release_id"], step="rolling", event="end", service="web"),
        call("committed", release_id=first["release_id"]),
    ):
        assert late["failed"] and late["failure_class"] == "lock" and "lease lost" in late["msg"]
    ended = call("rolled_back", run="r2", release_id=first["release_id"], failure=FAILURE, keep_lock=True)
    assert ended["release"]["failure_class"] == "not_ready" and ended["release"]["ended_by"] == "r2"
    assert start(call, run="r2", tag="sha-b")["recover"] is None


def test_a_retried_start_is_the_same_release(call):
    first = start(call, release_id=None)
    again = start(call, release_id=None)
    assert (again["release_id"], again["changed"], again["recover"]) == (first["release_id"], False, None)


def test_who_waited_for_the_lock_comes_after_who_had_it(call, tmp_path, monkeypatch):
    """Two wait; the one that asked last gets it first. The other's release is the newer one, though its run is older."""
    take = releases.Lease.acquire

    def late(lease, run_id, holder, release_id, *args, **named):
        if run_id == "r2" and not (tmp_path / "releases").exists():
            later = f"{release_id[:4]}1231-235959-sha-z"
            record = {"id": later, "tag": "sha-z", "kind": "promote", "run_id": "r3", "started": releases.timestamp(), "previous": None}
            releases.create_release(str(tmp_path), record, "r3")
            releases.finish_release(str(tmp_path), later, "r3", "committed")
        return take(lease, run_id, holder, release_id, *args, **named)

    monkeypatch.setattr(releases.Lease, "acquire", late)
    begun = start(call, run="r2", tag="sha-b", release_id=None)
    assert releases.release_ids(str(tmp_path))[0] == begun["release_id"]
    assert releases.Lease(str(tmp_path)).read()["release_id"] == begun["release_id"]


def test_frozen_stays_until_a_person_lifts_it(call, tmp_path):
    first = start(call)
    frozen = call("frozen", release_id=first["release_id"], failure=FAILURE)
    assert frozen["release"]["result"] == "frozen"
    assert call("frozen", release_id=first["release_id"], failure=FAILURE)["changed"] is False
    refused = start(call, run="r2", tag="sha-b", lock_wait=30)
    assert refused["failure_class"] == "lock" and "it is frozen (web never got ready)" in refused["msg"]
    assert call("unlocked", run="r2")["lock"]["kind"] == "freeze"
    assert call("unlocked", run="r2")["changed"] is False
    assert start(call, run="r2", tag="sha-b")["changed"]


def test_failed_before_any_change_is_aborted(call, tmp_path):
    first = start(call)
    call("step", release_id=first["release_id"], step="snapshotted", event="begin")
    failed = call("failed", release_id=first["release_id"], failure={"class": "snapshot", "message": "disk full"})
    assert failed["release"]["result"] == "aborted" and failed["release"]["failure"] == "disk full" and failed["recover"] is None
    assert not (tmp_path / "lock.json").exists()
    assert call("failed", release_id=first["release_id"], failure=FAILURE)["changed"] is False


def test_failed_after_a_change_stays_open_and_is_owed_an_undo(call, tmp_path):
    first = start(call)
    call("step", release_id=first["release_id"], step="migrated", event="begin")
    failed = call("failed", release_id=first["release_id"], failure=FAILURE)
    assert failed["recover"]["action"] == "undo" and failed["recover"]["state"]["failed"]["step"] == "migrated"
    assert failed["release"]["result"] is None and not (tmp_path / "lock.json").exists()


def test_check_mode_touches_nothing(call, tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(release.AnsibleModule, "warn", lambda self, warning: warnings.append(warning))
    checked = start(call, check=True)
    assert checked["changed"] and checked["release_id"] == "20261121-090000-sha-a" and checked["lock"] is None
    assert os.listdir(tmp_path) == []
    for state in ("step", "committed", "failed", "rolled_back", "unlocked"):
        call(state, check=True, release_id="20261121-090000-sha-a", step="pulled", event="begin")
    assert os.listdir(tmp_path) == []
    start(call)
    before = tree(tmp_path)
    checked = start(call, run="r2", tag="sha-b", check=True)
    assert checked["lock"]["run_id"] == "r1" and checked["recover"]["action"] == "abort"
    assert len(warnings) == 1 and warnings[0].startswith("A real run would be refused, or wait: Taking the lock of")
    assert tree(tmp_path) == before


def test_old_folders_go_when_a_release_is_committed(call, tmp_path):
    for hour in range(4):
        tag = f"sha-{hour}"
        call("committed", release_id=start(call, tag=tag, release_id=f"20261121-0{hour}0000-{tag}")["release_id"])
    last = start(call, tag="sha-9", release_id="20261121-090000-sha-9")
    assert call("committed", release_id=last["release_id"], keep_releases=2)["pruned"] == [
        "20261121-020000-sha-2",
        "20261121-010000-sha-1",
        "20261121-000000-sha-0",
    ]


def test_a_failed_start_gives_the_lock_back(call, tmp_path):
    refused = call("started", tag="sha-a", files=[{"name": "../x", "content": ""}])
    assert refused["failed"] and "is no name for a file in it" in refused["msg"]
    assert not (tmp_path / "lock.json").exists() and releases.release_ids(str(tmp_path)) == []


@pytest.mark.parametrize("release_id", ["../../etc", "a/b", ".hidden", ""])
def test_a_release_id_is_a_plain_name(call, tmp_path, release_id):
    refused = call("committed", release_id=release_id)
    assert refused["failed"] and os.listdir(tmp_path) == []


def test_an_unknown_key_of_failure(call, tmp_path):
    refused = call("rolled_back", release_id=start(call)["release_id"], failure={"mesage": "x"})
    assert refused["failed"] and "Reading failure: it does not know mesage" in refused["msg"]


def test_an_unknown_release(call):
    assert "20260101-000000-sha-x is not in" in call("committed", release_id="20260101-000000-sha-x")["msg"]
