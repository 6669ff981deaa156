# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How long a release will take, from the journals of those before it."""

from __future__ import annotations

import os
import statistics
import typing as t
from dataclasses import asdict, dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import fold, parse_time, read_journal, release_path

#: Releases that are asked; what was longer ago says less.
RELEASES = 5


@dataclass(frozen=True)
class Expected:
    """Medians in seconds. ``whole``: from the first line of the journal to the commit, ``None`` where no commit is journalled.

    ``releases``: how many it is from. ``services``: of those that were rolled, the migrator among them.
    """

    releases: int = 0
    whole: float | None = None
    services: t.Mapping[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, t.Any]:
        return asdict(self)

    @property
    def line(self) -> str:
        """For people; '' where nothing is known."""
        if self.whole is None:
            return ""
        source = f"the last {self.releases} releases" if self.releases > 1 else "the last release"
        return f"expected: about {seconds(self.whole)} in all, from {source}"


def seconds(value: float) -> str:
    """``0.4 s``, ``18 s``, ``3 min``: as exact as an expectation can be."""
    if value < 9.5:
        return f"{max(value, 0.1):.1f} s" if value < 1 else f"{value:.0f} s"
    return f"{value:.0f} s" if value < 120 else f"{value / 60:.0f} min"


def expected(project_dir: str, release_id: str, migrator: str = "") -> Expected:
    """What the releases of this host before ``release_id`` took that came out and rolled something."""
    whole: list[float] = []
    services: dict[str, list[float]] = {}
    found = 0
    for name in sorted(_names(project_dir), reverse=True):
        if found == RELEASES:
            break
        if name == release_id:
            continue
        try:
            entries = read_journal(project_dir, name)
        except (DeliveryError, OSError):
            continue  # what is wrong with it is said by who works with it
        state = fold(entries)
        # A journal with an end has its release's; where there is none, it is of a host that only took part.
        opened = os.path.exists(os.path.join(release_path(project_dir, name), "release.json"))
        good = state.status == "committed" if opened else bool(state.services)
        if not good or not state.services or set(state.services.values()) != {"rolled"}:
            continue
        found += 1
        if state.status == "committed":
            whole.append((parse_time(entries[-1]["time"]) - parse_time(entries[0]["time"])).total_seconds())
        taken = dict(state.service_durations)
        if migrator and "migrated" in state.durations:
            taken[migrator] = state.durations["migrated"]
        for service, value in taken.items():
            services.setdefault(service, []).append(value)
    medians = {service: round(statistics.median(values), 3) for service, values in services.items()}
    return Expected(found, round(statistics.median(whole), 3) if whole else None, medians)


def _names(project_dir: str) -> list[str]:
    try:
        return [name for name in os.listdir(os.path.join(project_dir, "releases")) if not name.startswith(".")]
    except OSError:
        return []
