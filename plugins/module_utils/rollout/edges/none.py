# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""No edge: nothing stands between clients and containers, so nothing can be switched, drained or held."""

from __future__ import annotations

from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import DrainResult, Upstream, hold_nothing


class NoEdge:
    """For apps without routes. Switching is nothing to do; holding requests is something it cannot promise."""

    def check(self, backend: str) -> None:
        return None

    def upstreams(self, backend: str) -> list[Upstream]:
        return []

    def add(self, backend: str, address: str, port: int, timeout: float) -> str:
        return ""

    def drain(self, backend: str, address: str, port: int, timeout: float) -> DrainResult:
        return DrainResult(sessions_cut=0, waited=0.0)

    def remove(self, backend: str, address: str, port: int) -> None:
        return None

    def hold(self, project: str, what: str, timeout: float = 30.0) -> int:
        return hold_nothing(project, what, "there is no edge in front of this app that could let them wait")
