# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Which snapshot sets are kept: the newest few, and the newest of each of the last so many days, weeks and months. Pure."""

from __future__ import annotations

import datetime
import typing as t

#: Period to the name of the one that a moment lies in.
_PERIODS: dict[str, str] = {"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G-%V", "monthly": "%Y-%m", "yearly": "%Y"}
KEYS = ("last", *_PERIODS)


def retained(sets: t.Iterable[tuple[str, datetime.datetime]], policy: t.Mapping[str, int]) -> set[str]:
    """Ids to keep of ``(id, moment)``; a period in which nothing was taken uses up none of its number."""
    newest_first = sorted(sets, key=lambda one: (one[1], one[0]), reverse=True)
    kept = {set_id for set_id, _moment in newest_first[: policy.get("last", 0)]}
    for period, form in _PERIODS.items():
        seen: set[str] = set()
        for set_id, moment in newest_first:
            name = moment.strftime(form)
            if name not in seen and len(seen) < policy.get(period, 0):
                seen.add(name)
                kept.add(set_id)
    return kept
