# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How many containers of one service change places at a time. Pure arithmetic."""

from __future__ import annotations

import math
import typing as t
from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """``surge``: how many more than before and after may run; ``unavailable``: how many fewer may serve; ``parallel``: how many start at
    once. Not both ``surge`` and ``unavailable`` are 0."""

    surge: int
    unavailable: int
    parallel: int

    def describe(self, replicas: int) -> str:
        """``2 at a time``, or '' where it is all at once."""
        together = min(self.parallel, self.surge + self.unavailable)
        return f"{together} at a time" if together < replicas else ""


@dataclass(frozen=True)
class Batch:
    """``before`` old containers stop, then ``starts`` new ones start and serve, then ``after`` old ones stop."""

    before: int
    starts: int
    after: int


def count_of(value: t.Union[int, str], replicas: int, up: bool) -> int:
    """``3``, or ``"25%"`` of ``replicas``, rounded up or down."""
    if isinstance(value, int):
        return value
    share = int(value.rstrip("%")) * replicas / 100
    return math.ceil(share) if up else math.floor(share)


def limits_of(
    strategy: str,
    replicas: int,
    parallel: t.Union[int, str, None],
    max_surge: t.Union[int, str, None],
    max_unavailable: t.Union[int, str, None],
) -> Limits:
    """What a service's keys mean; by themselves all at once: ``start_first`` beside the old ones, ``stop_first`` after them.

    ``max_surge`` rounds up and ``max_unavailable`` down, so that a percentage never takes more away than it says.
    """
    everything = max(replicas, 1)
    together = max(count_of(parallel, replicas, up=True), 1) if parallel is not None else everything
    if max_surge is None and max_unavailable is None:
        return Limits(0, together, together) if strategy == "stop_first" else Limits(together, 0, together)
    surge = count_of(max_surge, replicas, up=True) if max_surge is not None else 0
    unavailable = min(count_of(max_unavailable, replicas, up=False) if max_unavailable is not None else 0, everything)
    if surge == 0 and unavailable == 0:
        # A percentage of few replicas may be none at all; something has to move.
        surge, unavailable = (0, 1) if strategy == "stop_first" else (1, 0)
    return Limits(surge, unavailable, together)


def batches(old: int, new: int, limits: Limits) -> list[Batch]:
    """How ``old`` containers give way to ``new`` ones within ``limits``.

    At no time more than the larger of both and ``surge`` run, or fewer than the smaller of both less ``unavailable`` serve.
    """
    if not old or not new:
        return [Batch(old, new, 0)]
    most, least = max(old, new) + limits.surge, min(old, new) - limits.unavailable
    found: list[Batch] = []
    left, up = old, 0
    while up < new:
        starts = min(new - up, limits.surge + limits.unavailable, limits.parallel)
        free = most - left - up
        before = max(0, min(starts - free, left, left + up - least))
        starts = min(starts, free + before)
        left, up = left - before, up + starts
        # In step with what is still to come.
        after = left - min(left, math.ceil(old * (new - up) / new))
        left -= after
        found.append(Batch(before, starts, after))
    return found
