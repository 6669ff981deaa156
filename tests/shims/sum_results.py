# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Sums what pytest reported into the one last line that CI reads; exits 1 when anything failed.

    sum_results.py FOLDER_OF_JUNIT_FILES [FAILED_STAGE ...]

A stage that failed although its report shows no failed test (a linter, a time limit) counts as one failed.
A skipped test counts as failed too, unless what it lacks is something that `scripts/bootstrap.sh test` cannot install.
"""

from __future__ import annotations

import sys
from pathlib import Path
from xml.etree import ElementTree

#: How the reason of a skip may begin.
NOT_INSTALLABLE = ("MISSING PROGRAM kopia", "MISSING PROGRAM traefik", "MISSING PROGRAM zot", "MISSING PROGRAM prometheus", "NO SYSTEMD RUNS HERE")


def read(report: Path) -> tuple[int, int, list[str]]:
    """Passed, failed (errors too), and the skipped tests with their reasons."""
    passed = failed = 0
    skipped: list[str] = []
    for case in ElementTree.parse(report).iter("testcase"):
        reason = case.find("skipped")
        if case.find("failure") is not None or case.find("error") is not None:
            failed += 1
        elif reason is not None:
            failed += not str(reason.get("message")).startswith(NOT_INSTALLABLE)
            skipped.append(f"{case.get('classname')}::{case.get('name')}: {reason.get('message')}")
        else:
            passed += 1
    return passed, failed, skipped


def main(folder: Path, failed_stages: list[str]) -> int:
    passed = failed = 0
    skipped: list[str] = []
    explained = set()
    for report in sorted(folder.glob("*.xml")):
        its_passed, its_failed, its_skipped = read(report)
        passed, failed, skipped = passed + its_passed, failed + its_failed, skipped + its_skipped
        if its_failed:
            explained.add(report.stem)
    failed += len(set(failed_stages) - explained)
    for line in skipped:
        print(f"NOT TESTED  {line}")
    print(f"{passed} passed, {failed} failed")
    return 1 if failed or failed_stages else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
