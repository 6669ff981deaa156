# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What brings an app back without a controller, as systemd calls it: a packed program, on a real engine and a real HAProxy."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import typing as t
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from rollout_fixture import Proxy, Site

from ansible_collections.selfhost.delivery.plugins.module_utils.releases import Journal, timestamp

CHECKOUT = Path(__file__).resolve().parents[2]


def _put(path: Path, *arguments: str) -> dict[str, t.Any]:
    """Call the module that writes the program as a task does: packed, in a process of its own."""
    told = subprocess.run(
        [str(Path(sys.executable).parent / "ansible"), "localhost", "-c", "local", "-i", "localhost,", "-o", *arguments, "-e",
         f"ansible_python_interpreter={sys.executable}", "-m", "selfhost.delivery.boot_program", "-a", json.dumps({"path": str(path)})],
        env={**os.environ, "ANSIBLE_COLLECTIONS_PATH": str(CHECKOUT / ".cache" / "collections"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stdout + told.stderr
    return t.cast("dict[str, t.Any]", json.loads(told.stdout.partition("=> ")[2]))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("boot") / "app.pyz"
    assert _put(path, "--check")["changed"] and not path.exists()
    assert _put(path)["changed"]
    assert not _put(path)["changed"] and path.stat().st_mode & 0o777 == 0o644
    return path


@pytest.fixture
def run(program: Path, site: Site) -> t.Callable[..., str]:
    def call(verb: str, code: int = 0) -> str:
        # Nothing of ours on Python's path: all it has is in the archive.
        done = subprocess.run(
            ["/usr/bin/python3", "-I", str(program), verb, str(site.folder)], env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True, check=False
        )
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    return call


def _fail_power(site: Site) -> None:
    """All of it is gone at once, and no restart policy brings it back first."""
    for container in site.containers(running=True):
        site.engine.set_restart_policy(container, {"Name": "no"})
        site.engine.kill(container)


@contextlib.contextmanager
def _others_are_first(site: Site) -> t.Iterator[None]:
    """Somebody else takes the addresses that the app's containers had, which any start may bring about."""
    argv = ["docker", "run", "--detach", "--rm", "--network", f"{site.project}_default", site.images["one"], "worker"]
    others = [subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip() for _container in range(3)]
    try:
        yield
    finally:
        subprocess.run(["docker", "rm", "--force", *others], check=True, capture_output=True)


def test_it_brings_back_what_was_committed_and_the_edge_with_it(site: Site, proxy: Proxy, run: t.Callable[..., str]) -> None:
    site.compose["services"]["prepare"] = {"image": site.images["one"], "command": ["migrate"], "volumes": ["data:/data"]}
    site.compose["services"]["db"]["depends_on"] = {"prepare": {"condition": "service_completed_successfully"}}
    site.deploy("one")
    site.deploy("two")
    ran, containers = site.containers(running=True), site.containers()
    written = site.migrated()
    assert run("up") == "everything runs, and the edge points at it\n"
    before = proxy.upstreams()
    _fail_power(site)
    with _others_are_first(site):
        said = run("up")
    assert site.containers(running=True) == ran and site.containers() == containers
    assert proxy.get() == "two" and len(proxy.upstreams()) == 1 and proxy.upstreams() != before
    assert "web: the edge points at" in said and site.migrated() == written, "neither migrator nor what runs to its end runs again"
    assert run("up") == "everything runs, and the edge points at it\n"


def test_it_stops_all_and_starts_all(site: Site, proxy: Proxy, run: t.Callable[..., str]) -> None:
    site.deploy("one")
    containers = site.containers()
    assert run("down") == "stopped 3 containers\n" and site.containers(running=True) == []
    assert run("down") == "stopped 0 containers\n"
    run("up")
    assert site.containers(running=True) == containers and proxy.get() == "one"


@pytest.mark.parametrize("begun", [False, True], ids=["before the commit", "in the commit"])
def test_a_release_that_was_cut_off_is_left_to_the_next_run_and_something_serves(
    site: Site, proxy: Proxy, run: t.Callable[..., str], begun: bool
) -> None:
    site.deploy("one")
    release = site.release("two")
    site.ok(**release)
    if begun:
        Journal.open(str(site.folder / "releases" / release["release_id"] / "journal.jsonl"), "run").begin("committed")
    _fail_power(site)
    run("up")
    assert proxy.get() == ("two" if begun else "one")
    if begun:
        site.commit(release)
    else:
        site.revert(release)
    assert proxy.get() == ("two" if begun else "one") and len(site.containers()) == 3


def test_a_container_that_is_gone_is_named_and_the_rest_comes_back(site: Site, proxy: Proxy, run: t.Callable[..., str]) -> None:
    site.deploy("one")
    (worker,) = site.containers("worker")
    site.engine.remove(worker, force=True)
    _fail_power(site)
    assert "Starting worker: none of its containers is left. Promote the current tag again" in run("up", 1)
    assert proxy.get() == "one"


def test_while_a_release_is_under_way_it_keeps_out(site: Site, proxy: Proxy, run: t.Callable[..., str]) -> None:
    assert run("up") == "no release was committed here yet: nothing to bring up\n"
    site.deploy("one")
    site.engine.kill(site.containers("web")[0])
    now = datetime.now(timezone.utc)
    holder = {"run_id": "other", "kind": "run", "holder": {"user": "eve"}, "since": timestamp(now), "ttl": 900}
    lock = site.folder / "lock.json"
    lock.write_text(json.dumps({**holder, "heartbeat": timestamp(now), "expires": timestamp(now + timedelta(hours=1))}))
    assert "a release is under way (eve" in run("up") and site.containers("web", running=True) == []
    # From before the machine started: whoever it was, nothing of it works here any more.
    lock.write_text(json.dumps({**holder, "heartbeat": "2001-01-01T00:00:00.000Z", "expires": timestamp(now + timedelta(hours=1))}))
    run("up")
    assert proxy.get() == "one"
