# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The line that CI reads never says that all is well when something failed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SUM_RESULTS = Path(__file__).resolve().parents[1] / "shims" / "sum_results.py"

PASSED = '<testcase classname="a" name="passes"/>'
FAILED = '<testcase classname="a" name="fails"><failure message="no"/></testcase>'
BROKEN = '<testcase classname="a" name="breaks"><error message="no fixture"/></testcase>'
SKIPPED = '<testcase classname="a" name="waits"><skipped message="MISSING PROGRAM kopia: not tested"/></testcase>'
AVOIDABLE = '<testcase classname="a" name="waits"><skipped message="MISSING PROGRAM setfattr"/></testcase>'


@pytest.mark.parametrize(
    ("reports", "failed_stages", "last_line", "code"),
    [
        pytest.param({"unit": PASSED * 2, "e2e": PASSED}, [], "3 passed, 0 failed", 0, id="all passed"),
        pytest.param({"unit": PASSED + FAILED + BROKEN}, ["unit"], "1 passed, 2 failed", 1, id="errors are failures"),
        pytest.param({"unit": PASSED}, ["lint"], "1 passed, 1 failed", 1, id="a gate without a report"),
        pytest.param({"unit": PASSED}, ["unit"], "1 passed, 1 failed", 1, id="stopped after its report looked good"),
        pytest.param({"unit": PASSED + SKIPPED}, [], "1 passed, 0 failed", 0, id="skipped is not passed"),
        pytest.param({"unit": PASSED + AVOIDABLE}, [], "1 passed, 1 failed", 1, id="what could have been installed is no reason to skip"),
        pytest.param({}, ["lint"], "0 passed, 1 failed", 1, id="nothing got to run"),
        pytest.param({"unit": FAILED}, [], "0 passed, 1 failed", 1, id="a failed test with a good exit code"),
    ],
)
def test_last_line(tmp_path: Path, reports: dict[str, str], failed_stages: list[str], last_line: str, code: int) -> None:
    for stage, cases in reports.items():
        (tmp_path / f"{stage}.xml").write_text(f"<testsuites><testsuite>{cases}</testsuite></testsuites>", encoding="utf-8")
    command = [sys.executable, str(SUM_RESULTS), str(tmp_path), *failed_stages]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (run.stdout.splitlines()[-1], run.returncode) == (last_line, code)


def test_a_skipped_test_is_named_with_its_reason(tmp_path: Path) -> None:
    (tmp_path / "unit.xml").write_text(f"<testsuites><testsuite>{SKIPPED}</testsuite></testsuites>", encoding="utf-8")
    run = subprocess.run([sys.executable, str(SUM_RESULTS), str(tmp_path)], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[0] == "NOT TESTED  a::waits: MISSING PROGRAM kopia: not tested"
