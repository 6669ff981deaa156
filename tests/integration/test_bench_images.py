# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The benchmark of images runs, checks what was copied and writes what it promises. How fast it is, is not for a test to say."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "bench"))

from images import OURS_TAG, PACKED, Results, Run  # noqa: E402
from measure import Counter  # noqa: E402


def test_a_small_run_writes_what_it_promises(tmp_path: Path) -> None:
    size = ["--small-mib", "1", "--runs", "1", "--only", "re-tag,nothing", "--tools", f"{OURS_TAG};{PACKED};crane"]
    command = [sys.executable, "-B", str(ROOT / "tests/bench/images.py"), *size, "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "images.json").read_text())
    for row in rows:
        assert list(row) == ["case", "tool", "runs", "median_s", "min_s", "peak_rss_mib", "ratio_to_fastest_peer"]
        assert row["runs"] == 1 and 0 < row["min_s"] <= row["median_s"]
    ours = [row for row in rows if row["tool"] == OURS_TAG]
    assert [row["case"] for row in ours] == ["re-tag", "nothing"]
    # The worker's memory is for the most part what it shares with ansible-playbook; the module by itself shows its own.
    assert [row["peak_rss_mib"] < 64 for row in rows if row["tool"] == PACKED] == [True, True]
    # A tool that is not here has no numbers and is named; without any other there is no ratio.
    here = any(row["tool"] == "crane" for row in rows)
    assert here != ("NO CRANE" in done.stdout)
    assert all((row["ratio_to_fastest_peer"] is not None) == here for row in rows)
    assert "| nothing: 300 MB, all there already | image_promote, verify: tag " in done.stdout
    counted = {line.split(" | ")[0]: line.split(" | ")[-2:] for line in done.stdout.splitlines() if OURS_TAG in line and line.startswith("|")}
    assert [requests for requests, _rounds in counted.values()] == ["3", "1"]
    ElementTree.fromstring((tmp_path / "out" / "images.svg").read_text())


def test_rounds_are_requests_that_waited_for_each_other() -> None:
    assert Counter.rounds([]) == 0
    assert Counter.rounds([(0.0, 1.0, "a"), (0.1, 1.2, "b"), (1.3, 2.0, "c"), (1.4, 2.1, "d"), (2.5, 3.0, "e")]) == 3


def test_ratios_are_of_medians_and_to_the_fastest_other_tool() -> None:
    walls = {"image_promote": (1.0, 9.0, 2.0), "crane": (1.0, 1.0, 1.0), "skopeo": (4.0, 4.0, 4.0)}
    results = Results({("case", tool): [Run(wall, 0.0, 10.0) for wall in times] for tool, times in walls.items()})
    assert {row["tool"]: row["ratio_to_fastest_peer"] for row in results.rows()} == {"image_promote": 2.0, "crane": 1.0, "skopeo": 4.0}
