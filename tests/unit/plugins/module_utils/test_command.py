# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Programs run within their bound in time, with what they said kept or thrown away."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.command import run


def test_what_it_said_and_how_it_ended() -> None:
    done = run(["sh", "-c", 'cat; echo "$WORD" >&2; exit 3'], env={"WORD": "reason"}, stdin="in")
    assert (done.ok, done.code, done.stdout, done.stderr, done.timed_out) == (False, 3, "in", "reason\n", False)


def test_output_that_nobody_reads_is_thrown_away() -> None:
    done = run(["sh", "-c", "head -c 1000000 /dev/zero; echo reason >&2"], keep_stdout=False)
    assert (done.ok, done.stdout, done.last_lines()) == (True, "", "reason")


@pytest.mark.parametrize("keep_stdout", [True, False])
def test_a_program_that_takes_too_long_ends_with_all_it_started(tmp_path: Path, keep_stdout: bool) -> None:
    # The child ignores SIGTERM, so only SIGKILL to the whole group ends it.
    script = f"trap '' TERM; (echo $BASHPID > {tmp_path}/child; sleep 1000) & sleep 1000"
    done = run(["bash", "-c", script], timeout=0.5, grace=0.2, keep_stdout=keep_stdout)
    assert done.timed_out and not done.ok
    child = int((tmp_path / "child").read_text())
    stat = Path(f"/proc/{child}/stat")

    def ended() -> bool:
        try:
            return stat.read_text().rpartition(")")[2].split()[0] in "ZX"
        except OSError:
            return True

    deadline = time.monotonic() + 30
    while not ended() and time.monotonic() < deadline:
        time.sleep(0.01)
    # Gone, or dead and not yet collected by whoever adopted it.
    assert ended()


def test_a_missing_program_is_told() -> None:
    with pytest.raises(FileNotFoundError):
        run([os.path.join(os.sep, "nowhere", "program")])
