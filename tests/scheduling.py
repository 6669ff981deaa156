# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What runs beside what: tests that share something stay on one worker of pytest-xdist, in their order.

xdist's own marker for this, `xdist_group`, is lost with pytest 9.
"""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest
from xdist.scheduler import LoadScopeScheduling


class GroupScheduling(LoadScopeScheduling):
    """Tests of a file stay together; those of files that ``alone`` names need only themselves. Groups begin in the order of their tests."""

    def __init__(self, config: pytest.Config, log: t.Any, alone: t.Container[str]) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)
        self._alone = alone

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return nodeid if Path(file).stem in self._alone else file


def longest_first(items: list[pytest.Item], first: t.Sequence[str], last: t.Sequence[str]) -> None:
    """Order tests by their files: what takes longest begins first, and what fits into any gap ends the run."""
    ranks = {**{name: number - len(first) for number, name in enumerate(first)}, **{name: 1 + number for number, name in enumerate(last)}}
    items.sort(key=lambda item: ranks.get(item.path.stem, 0))
