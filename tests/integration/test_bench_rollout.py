# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the benchmark of rollouts writes of what it measured. That it measures takes a host of its own and minutes: `make bench-rollout`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench"))

import rollout  # noqa: E402
from rollout import COMPOSE, DOCKER_ROLLOUT, FLOOR_SSH, KAMAL, PROMOTE, Results, Run  # noqa: E402


def test_rows_are_of_all_runs_and_ratios_of_medians(tmp_path: Path) -> None:
    runs = {
        ("late", PROMOTE): [
            Run(seconds, 100, lost, gap, 15, "done", 62, 2.5) for seconds, lost, gap in ((9.0, 0, 20.0), (8.0, 1, 70.0), (30.0, 0, 30.0))
        ],
        ("late", KAMAL): [Run(18.0, 100, 0, 20.0, 42, "done")],
        ("late", FLOOR_SSH): [Run(3.0, 100, 0, 20.0, 1, "done")],
    }
    results = Results(runs, missing={DOCKER_ROLLOUT: "it is not here"})
    text = results.write(tmp_path)
    rows = json.loads((tmp_path / "rollout.json").read_text())
    assert [list(row) for row in rows] == [
        ["case", "tool", "runs", "median_s", "min_s", "requests", "lost", "longest_gap_ms", "ssh_sessions"]
    ] * 3
    assert [list(row.values()) for row in rows if row["tool"] == PROMOTE] == [["late", PROMOTE, 3, 9.0, 8.0, 300, 1, 70, 15]]
    assert "| late | promote.yml | 3 | 9.00 | 8.00 | 3.00 | 0.50 | 300 | 1 | 70 | 15 | 62 | 2.50 | done |" in text
    # One that is not here has a line that says so, and no number.
    assert [line for line in text.splitlines() if DOCKER_ROLLOUT in line and "NOT MEASURED" in line]
    assert not any(row["tool"] == DOCKER_ROLLOUT for row in rows)
    ElementTree.fromstring((tmp_path / "rollout.svg").read_text())


def test_a_broken_release_that_was_called_good_was_never_known(tmp_path: Path) -> None:
    ends = ("said so, the old one is gone", "said success, the old one is gone")
    results = Results({("crash", COMPOSE): [Run(1.0, 100, 50, 900.0, 1, end) for end in ends]})
    (row,) = results.rows()
    assert (row["median_s"], row["min_s"], row["lost"]) == (None, None, 100)
    assert "| never | never |" in results.write(tmp_path)


def test_a_tool_that_is_not_there_is_named_with_what_would_help(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    for variable in ("KAMAL", "KAMAL_PROXY", "DOCKER_ROLLOUT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(rollout, "ROOT", Path("/nonexistent"))
    assert rollout.lacks(DOCKER_ROLLOUT) == "docker-rollout is neither named by DOCKER_ROLLOUT nor on PATH"
    assert rollout.lacks(KAMAL) == "kamal is neither named by KAMAL nor on PATH"
    monkeypatch.setenv("KAMAL", sys.executable)
    assert rollout.lacks(KAMAL) == "kamal-proxy is neither named by KAMAL_PROXY nor on PATH"
    assert rollout.lacks(COMPOSE) == ""


def test_an_unknown_tool_is_refused_before_anything_is_made() -> None:
    command = [sys.executable, "-B", str(ROOT / "tests/bench/rollout.py"), "--tools", "floor;Capistrano", "--only", "late,early"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "There is no Capistrano, early.\n")
