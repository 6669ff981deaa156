# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is expected of a release, from the journals of those before it."""

from __future__ import annotations

import json
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.releases import timestamp
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.history import Expected, expected, seconds

BEGUN = datetime(2026, 11, 21, 9, tzinfo=timezone.utc)


def journal(folder: Path, name: str, web: float, end: str = "committed", migrated: float = 0, opened: bool = True, rolled: bool = True) -> None:
    lines, moment = [], BEGUN

    def line(step: str, event: str, after: float = 0.0, **more: str) -> None:
        nonlocal moment
        moment += timedelta(seconds=after)
        lines.append(json.dumps({"seq": len(lines) + 1, "time": timestamp(moment), "run": "r", "step": step, "event": event, "data": {}, **more}))

    line("planned", "begin")
    if migrated:
        line("migrated", "begin", 1)
        line("migrated", "end", migrated)
    if rolled:
        line("rolling", "begin", 1, service="web")
        line("rolling", "end", web, service="web")
    if end:
        line(end, "end", 1)
    release = folder / "releases" / name
    release.mkdir(parents=True)
    (release / "journal.jsonl").write_text("\n".join(lines) + "\n")
    if opened:
        (release / "release.json").write_text("{}")


def test_nothing_is_promised_before_there_is_a_release(tmp_path: Path) -> None:
    assert expected(str(tmp_path), "r1") == Expected() and Expected().line == ""


def test_the_median_of_the_last_five_that_came_out(tmp_path: Path) -> None:
    journal(tmp_path, "20260101-000000-a", 1000)  # the sixth, too long ago
    for number, web in enumerate((2, 40, 4, 3, 5), 1):
        journal(tmp_path, f"20260102-00000{number}-a", web, migrated=0 if number == 1 else 10 * number)
    journal(tmp_path, "20260103-000000-a", 500, end="rolled_back")
    journal(tmp_path, "20260104-000000-a", 500, end="")
    journal(tmp_path, "20260105-000000-a", 0, rolled=False)  # nothing to do: says nothing of what takes time
    journal(tmp_path, "20260106-000000-a", 500)
    found = expected(str(tmp_path), "20260106-000000-a", "migrate")
    assert found.releases == 5 and found.services == {"web": 4.0, "migrate": 35.0}
    assert found.whole == 46.0  # of 4, 63, 37, 46, 58 seconds and one before, between and after
    assert found.line == "expected: about 46 s in all, from the last 5 releases"


def test_a_host_that_only_takes_part_knows_its_services(tmp_path: Path) -> None:
    journal(tmp_path, "20260102-000000-a", 3, end="", opened=False)
    found = expected(str(tmp_path), "20260103-000000-b")
    assert (found.releases, found.whole, found.services, found.line) == (1, None, {"web": 3.0}, "")


def test_a_journal_that_cannot_be_read_is_left_out(tmp_path: Path) -> None:
    journal(tmp_path, "20260102-000000-a", 3)
    journal(tmp_path, "20260103-000000-a", 3)
    (tmp_path / "releases" / "20260103-000000-a" / "journal.jsonl").write_text("no\njournal\n")
    assert expected(str(tmp_path), "r").releases == 1


@pytest.mark.parametrize(("value", "text"), [(0.04, "0.1 s"), (0.44, "0.4 s"), (3.6, "4 s"), (18.2, "18 s"), (119, "119 s"), (200, "3 min")])
def test_as_exact_as_it_can_be(value: float, text: str) -> None:
    assert seconds(value) == text
