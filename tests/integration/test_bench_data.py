# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""`make bench-data` measures what it says: one small run of one case with the programs that are here, and what it writes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEYS = {"case", "tool", "runs", "median_s", "min_s", "ratio_to_bare", "freeze_ms", "outage_ms"}


def test_a_small_run_writes_every_tool_with_its_ratio(tmp_path: Path) -> None:
    command = [sys.executable, "-B", str(ROOT / "tests" / "bench" / "data.py"), "--runs", "1", "--only", "restore", "--engines", "restic"]
    small = ["--files", "20", "--tree-mb", "1", "--big-mb", "10", "--output", str(tmp_path / "out"), "--work", str(tmp_path)]
    done = subprocess.run([*command, *small], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "out" / "data.json").read_text())
    assert all(set(row) == KEYS and row["runs"] == 1 for row in rows)
    by_tool = {row["tool"]: row for row in rows}
    assert set(by_tool) == {"restic, bare", "restic: restore, keep_current: false", "restic: restore, what it replaces kept", "stop, tar + zstd, start"}
    assert by_tool["restic, bare"]["ratio_to_bare"] == 1 and by_tool["stop, tar + zstd, start"]["ratio_to_bare"] is None
    ours = by_tool["restic: restore, keep_current: false"]
    assert ours["outage_ms"] < 1000 * ours["median_s"], "the app is away for a part of it"
    assert (tmp_path / "out" / "data.svg").read_text().startswith("<svg") and "| restore | restic, bare | 1 |" in (tmp_path / "out" / "data.md").read_text()
    assert not list(tmp_path.glob("bench-data-*"))
