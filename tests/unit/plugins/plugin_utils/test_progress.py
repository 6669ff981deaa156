# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A line when something changes: by a real ansible-playbook, whose module takes its time."""

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.selfhost.delivery.plugins.plugin_utils.progress import line_of


def entry(step: str, event: str, service: str | None = None, **data: t.Any) -> dict[str, t.Any]:
    return {"seq": 1, "time": "", "run": "", "step": step, "event": event, "service": service, "data": data}


@pytest.mark.parametrize(
    ("told", "said"),
    [
        (entry("rolling", "begin", "web", strategy="canary", old=["a"], new=["b", "c"]), "web: canary, 2 new for 1 old"),
        (entry("rolling", "note", "web", share=10, weights=[28, 256]), "web: 10 % of the requests go to the new"),
        (entry("rolling", "note", "web", share=10, requests=120, errors=0), "web: 10 % was good, 120 requests, 0 errors"),
        (entry("rolling", "note", "web", batch=[2, 6]), "web: 2 of 6 changed places"),
        (entry("rolling", "end", "web", seconds=3.25, cut=0), "web: the new serve after 3.25 s"),
        (entry("rolling", "end", "web", seconds=3.25, cut=2), "web: the new serve after 3.25 s, 2 requests were cut"),
        (entry("rolling", "begin", None, creating=["web"]), ""),
        (entry("rolling", "fail", "web", msg="long"), "web: failed"),
        (entry("migrated", "begin"), "migrating"),
        (entry("migrated", "note", container="abc"), ""),
        (entry("baking", "begin", seconds=60.0), "watching for 60 s"),
        (entry("reverting", "end", "web"), "web: as it was"),
        (entry("dependencies", "begin", "db"), "db: starting"),
        (entry("a step of tomorrow", "begin"), ""),
    ],
)
def test_what_people_read_of_an_entry(told: dict[str, t.Any], said: str) -> None:
    assert line_of(told) == said
