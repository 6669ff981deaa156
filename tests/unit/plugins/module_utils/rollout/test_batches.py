# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How many change places at a time: the promises hold for all small numbers, not only for chosen ones."""

from __future__ import annotations

import itertools

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.batches import Batch, Limits, batches, count_of, limits_of
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.roll import weights


@pytest.mark.parametrize("surge, unavailable, parallel", [one for one in itertools.product(range(5), range(5), range(1, 5)) if one[0] or one[1]])
def test_never_more_and_never_fewer_than_promised(surge: int, unavailable: int, parallel: int) -> None:
    for old, new in itertools.product(range(1, 8), range(1, 8)):
        left, up = old, 0
        for batch in batches(old, new, Limits(surge, unavailable, parallel)):
            left -= batch.before
            assert left + up >= min(old, new) - unavailable, "too few serve while new ones start"
            assert 0 < batch.starts <= parallel and left + up + batch.starts <= max(old, new) + surge, "too many run"
            up += batch.starts
            left -= batch.after
            assert left >= 0 and left + up >= min(old, new) - unavailable, "too few serve after a batch"
        assert (left, up) == (0, new)


def test_by_itself_everything_at_once() -> None:
    assert batches(3, 3, limits_of("start_first", 3, None, None, None)) == [Batch(0, 3, 3)]
    assert batches(3, 3, limits_of("stop_first", 3, None, None, None)) == [Batch(3, 3, 0)]
    assert batches(0, 3, limits_of("start_first", 3, 1, None, None)) == [Batch(0, 3, 0)], "there is nothing to be careful with"
    assert batches(3, 0, limits_of("start_first", 0, 1, None, None)) == [Batch(3, 0, 0)]


def test_parallel_is_how_many_change_places_at_a_time() -> None:
    assert batches(3, 3, limits_of("start_first", 3, 1, None, None)) == [Batch(0, 1, 1)] * 3
    assert batches(3, 3, limits_of("stop_first", 3, 2, None, None)) == [Batch(2, 2, 0), Batch(1, 1, 0)]
    assert limits_of("start_first", 4, "50%", None, None) == Limits(2, 0, 2)


def test_percentages_never_take_away_more_than_they_say() -> None:
    assert count_of("25%", 3, up=True) == 1 and count_of("25%", 3, up=False) == 0
    assert limits_of("start_first", 3, None, "25%", "25%") == Limits(1, 0, 3)
    assert limits_of("stop_first", 3, None, 0, "25%") == Limits(0, 1, 3), "something has to move"


@pytest.mark.parametrize("percent", [1, 5, 10, 33, 50, 90, 99])
@pytest.mark.parametrize("new, old", [(1, 1), (2, 2), (3, 1), (1, 4)])
def test_weights_give_the_share_that_was_asked_for(percent: int, new: int, old: int) -> None:
    mine, theirs = weights(percent, new, old)
    assert 1 <= mine <= 256 and 1 <= theirs <= 256
    share = 100 * mine * new / (mine * new + theirs * old)
    assert abs(share - percent) <= max(0.2 * percent, 0.6), share


def test_all_requests_leave_nothing_to_the_old_ones() -> None:
    assert weights(100, 2, 2) == (256, 0)
