# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sets chosen, restored beside and into place, and drilled, as people do it. The tests build on each other, in this order."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest

from . import shopfront
from .site_under_test import REPOSITORY, Load, Site, _family

ENVIRONMENTS = ("production",)
GATE = ("-e", "delivery_override_gates=testing")
CHECK = {"name": "rows", "service": "keeper", "command": ["cat", "/data/rows"], "expect": "^(row 1|second)"}


@pytest.fixture(scope="module", autouse=True)
def a_release(site: Site) -> None:
    """Production serves a release; a set holds its first data, and what it has now is newer."""
    site.write_inventories(lambda variables: _described(site, variables))
    site.promote(site.production, site.build("sha-one"), *GATE).must_succeed()
    site.run("snapshot", site.production).must_succeed()
    _write(site, "second")


def _described(site: Site, variables: dict[str, t.Any], check: dict[str, t.Any] | None = None) -> None:
    variables["delivery_app"]["drill"] = {"services": ["keeper"], "checks": [check or CHECK], "timeout": 60}
    variables["delivery_drill_dir"] = str(site.folder / "drills")
    (site.folder / "metrics").mkdir(exist_ok=True)
    variables["delivery_metrics_dir"] = str(site.folder / "metrics")


def _write(site: Site, text: str) -> None:
    run = ["docker", "run", "--rm", "--network", "none", "-v", f"{site.production.project}_data:/data", shopfront.KEEPER_IMAGE]
    subprocess.run([*run, "/bin/sh", "-c", f"echo {text} > /data/rows"], check=True)


def _taken(site: Site) -> str:
    return sorted((site.production.deploy_dir / "snapshots").glob("manual-*.manifest.json"))[0].name.removesuffix(".manifest.json")


def _metric(site: Site, kind: str, name: str) -> float:
    text = (site.folder / "metrics" / f"selfhost_delivery_{kind}_shopfront_production.prom").read_text()
    (line,) = [one for one in text.splitlines() if one.startswith(f"selfhost_delivery_{kind}_{name}{{")]
    return float(line.rpartition(" ")[2])


def _left_of_a_drill(site: Site) -> list[str]:
    project = f"drill-{site.production.project}"
    found = []
    for kind, key in (("container", "com.docker.compose.project"), ("volume", "selfhost.delivery.drill"), ("network", "selfhost.delivery.drill")):
        extra = ["--all"] if kind == "container" else []
        found += subprocess.check_output(["docker", kind, "ls", "-q", *extra, "--filter", f"label={key}={project}"], text=True).split()
    return found + [str(path) for path in (site.folder / "drills").glob("drill-*") if path.is_dir()]


def test_the_sets_are_shown_and_bad_wishes_refused_before_anything_changes(site: Site) -> None:
    shown = site.run("restore", site.production, "-e", "list=true").must_succeed().output
    row = next(line for line in shown.splitlines() if _taken(site) in line)
    assert "sha-one" in row and "data, 2 paths" in row and "complete" in row, row
    releases = site.production.release_count()
    refusals: tuple[tuple[tuple[str, ...], str], ...] = (
        (("snapshot=manual-nothing",), "there is no such set"),
        (("at=2020-01-01 09:00",), "no complete set is that old"),
        (("at=yesterday",), "Give one such as '2026-11-28 09:00'"),
        (("snapshot=latest", "volumes=dato"), "did you mean data?"),
    )
    for wishes, answer in refusals:
        extra = [word for wish in wishes for word in ("-e", json.dumps(dict([wish.split("=", 1)])))]
        site.run("restore", site.production, *extra).must_fail(answer)
    assert site.production.data("rows").strip() == "second" and site.production.release_count() == releases


def test_beside_touches_nothing_that_runs(site: Site) -> None:
    into, before = site.folder / "beside", site.production.containers()
    wanted = ("-e", f"snapshot={_taken(site)}", "-e", "volumes=data", "-e", f"into={into}")
    assert "would be copied" in site.run("restore", site.production, *wanted, "--check").must_succeed().output
    assert not into.exists()
    site.run("restore", site.production, *wanted).must_succeed()
    assert (into / "volumes" / f"{site.production.project}_data" / "rows").read_text().strip() == "row 1"
    assert not (into / "paths").exists() and into.stat().st_mode & 0o777 == 0o700
    # Again: it is all there, byte for byte, so nothing changes; what is not the set's own is left alone and refused.
    copied = into / "volumes" / f"{site.production.project}_data" / "rows"
    inode = copied.stat().st_ino
    site.run("restore", site.production, *wanted).must_succeed()
    assert copied.stat().st_ino == inode
    copied.write_text("somebody works on it")
    site.run("restore", site.production, *wanted).must_fail("something is there already")
    assert copied.read_text() == "somebody works on it"
    assert site.production.data("rows").strip() == "second" and site.production.containers() == before


def test_a_drill_proves_a_set_and_leaves_nothing(site: Site) -> None:
    before = site.production.containers()
    with Load(site.production.port, pause=0.02) as load:
        done = site.run("drill", site.production).must_succeed()
    assert "PASSED" in done.output and "check rows: ok" in done.output and "row 1" in done.output, done.output
    assert _left_of_a_drill(site) == [] and site.production.containers() == before and load.lost == []
    assert _metric(site, "drill", "passed") == 1 and _metric(site, "drill", "last_success_timestamp_seconds") > 1e9
    # One whose data is not what it should be fails, and the time of the last success stays.
    succeeded = _metric(site, "drill", "last_success_timestamp_seconds")
    site.write_inventories(lambda variables: _described(site, variables, {**CHECK, "expect": "^another"}))
    site.run("drill", site.production).must_fail("it said 'row 1', which does not match '^another'")
    site.write_inventories(lambda variables: _described(site, variables))
    assert _left_of_a_drill(site) == []
    assert _metric(site, "drill", "passed") == 0 and _metric(site, "drill", "last_success_timestamp_seconds") == succeeded


def test_the_next_drill_removes_what_a_killed_one_left(site: Site) -> None:
    site.write_inventories(lambda variables: _described(site, variables, {**CHECK, "command": ["sleep", "100"]}))
    command, silent = site.command("drill", site.production), subprocess.DEVNULL
    killed = subprocess.Popen(command, env=site.environ(), cwd=site.folder, stdout=silent, stderr=silent, start_new_session=True)
    deadline = time.monotonic() + 300
    running = ["docker", "ps", "-q", "--filter", f"label=com.docker.compose.project=drill-{site.production.project}"]
    while not (subprocess.check_output(running) and killed.poll() is None):
        assert time.monotonic() < deadline and killed.poll() is None, "the drill did not start"
        time.sleep(0.1)
    for pid in _family(killed.pid):
        os.kill(pid, signal.SIGKILL)
    killed.wait()
    assert len(_left_of_a_drill(site)) > 1
    site.write_inventories(lambda variables: _described(site, variables))
    assert "an earlier drill was cut short" in site.run("drill", site.production).must_succeed().output
    assert _left_of_a_drill(site) == []


def test_the_program_of_the_timers_does_the_same_without_a_controller(site: Site) -> None:
    """What systemd would start, with the configuration that the role writes."""
    program, config = site.folder / "snapshots.pyz", site.folder / "timed.json"
    tool = Path(sys.executable).parent / "ansible"
    call = [str(tool), "localhost", "-m", "selfhost.delivery.snapshot_program", "-a", f"path={program}"]
    for changed in ("CHANGED", "SUCCESS"):
        assert changed in subprocess.run(call, env=site.environ(), capture_output=True, text=True, check=True).stdout
    production, password = site.production, site.folder / "timed.password"
    password.write_text("snapshots-are-not-secret-here\n")
    password.chmod(0o600)
    settings = {
        "engine": "auto", "repository": str(site.folder / "snapshots-production"), "repository_id": "", "password_file": str(password), "env": {},
        "docker_socket": "/var/run/docker.sock", "manifest_dir": str(production.deploy_dir / "snapshots"), "app": "shopfront", "environment": "production",
        "project": production.project, "deploy_dir": str(production.deploy_dir), "env_files": [".env.production"], "volumes": ["data"], "paths": [],
        "consistency": "pause", "hooks": [], "stop_timeout": 10, "keep": 30, "retention": {"last": 2}, "set_id": "latest",
        "built": ["web", "worker", "migrate"], "services": [], "checks": [CHECK], "timeout": 60,
        "folder": str(site.folder / "drills"), "metrics_dir": str(site.folder / "metrics"), "docker_config": "",
    }  # fmt: skip
    config.write_text(json.dumps(settings))
    python = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    def timed(what: str) -> str:
        done = subprocess.run(["/usr/bin/python3", str(program), what, str(config)], env=python, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    held = production.deploy_dir / "lock.json"
    held.write_text(json.dumps({"run_id": "other", "kind": "run", "holder": {"user": "x", "host": "y"}, "expires": "2100-01-01T00:00:00.000Z"}))
    assert "no set was taken: another run holds it" in timed("snapshot")
    held.unlink()
    first = _taken(site)
    said = timed("snapshot")
    assert "set scheduled-" in said and not held.exists(), said
    assert "PASSED" in timed("drill")
    timed("snapshot")
    # Two are kept; what was taken by hand was the oldest.
    assert len(list((production.deploy_dir / "snapshots").glob("*.manifest.json"))) == 2, said
    assert not (production.deploy_dir / "snapshots" / f"{first}.manifest.json").exists()
    assert _metric(site, "snapshot", "success") == 1 and _metric(site, "snapshot", "last_success_timestamp_seconds") > 1e9


def test_into_place_by_time_and_the_state_replaced_is_kept(site: Site) -> None:
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
    _write(site, "third")
    wanted = ("-e", json.dumps({"at": moment}), "-e", "volumes=data")
    planned = site.run("restore", site.production, *wanted, "--check").must_succeed().output
    assert f"the newest not taken after {moment} UTC" in planned and "stopped meanwhile:" in planned and "left as it is:" in planned, planned
    assert site.production.data("rows").strip() == "third"
    site.run("restore", site.production, *wanted).must_succeed()
    assert site.production.data("rows").strip() == "second" and site.production.serving() == "sha-one"
    assert "nothing to do: what is in place is what the set holds" in site.run("restore", site.production, *wanted).must_succeed().output
    (kept,) = (site.production.deploy_dir / "snapshots").glob("replaced-scheduled-*.manifest.json")
    site.run("restore", site.production, "-e", f"snapshot={kept.name.removesuffix('.manifest.json')}").must_succeed()
    assert site.production.data("rows").strip() == "third"


def test_the_page_about_disasters_says_the_commands_that_bring_it_back(site: Site) -> None:
    """Everything of the host but what lies elsewhere is gone: containers, volumes, the deploy dir. Last in this file."""
    production = site.production
    rows = production.data("rows").strip()
    if not list((production.deploy_dir / "snapshots").glob("manual-*")):
        site.run("snapshot", production).must_succeed()
    subprocess.run(["docker", "rm", "--force", *production.containers()], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["docker", "volume", "rm", f"{production.project}_data"], check=True, stdout=subprocess.DEVNULL)
    shutil.rmtree(production.deploy_dir)
    page = (REPOSITORY / "docs" / "disaster.md").read_text()
    block = re.search(r"<!-- the test runs the commands of this block -->\n```console\n(.*?)```", page, re.DOTALL)
    assert block
    commands = [shlex.split(line) for line in block.group(1).splitlines()]
    assert [words[1] for words in commands] == ["setup.yml", "restore.yml", "promote.yml"]
    for program, playbook, _i, inventory, *extra in commands:
        assert (program, inventory) == ("ansible-playbook", "inventories/production")
        words = [word.replace("<tag>", "sha-one") for word in extra]
        gate = GATE if playbook == "promote.yml" else ()
        done = site.run(playbook.removesuffix(".yml"), production, *words, *gate, timeout=600).must_succeed()
        if playbook == "restore.yml":
            assert "promote.yml -e tag=sha-one" in " ".join(done.output.split()), done.output
    assert production.serving() == production.current() == "sha-one"
    assert production.data("rows").strip() in (rows, "row 1") and production.data("rows").strip() != ""
