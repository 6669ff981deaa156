# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module ``compose_rollout``, with a line for each change on the host while it works there."""

from __future__ import annotations

import os
import typing as t

from ansible.plugins.action.normal import ActionModule as NormalAction

from ansible_collections.selfhost.delivery.plugins.module_utils.releases import journal_path
from ansible_collections.selfhost.delivery.plugins.plugin_utils.progress import INTERVAL, Follower

#: What each phase writes into the journal; the others have nothing to tell before they end.
PHASE_STEPS = {"dependencies": "dependencies", "hold": "held", "migrate": "migrated", "roll": "rolling", "bake": "baking"}


class ActionModule(NormalAction):
    """``DELIVERY_PROGRESS`` in the environment: seconds between two looks at the host, 0 for none."""

    def run(self, tmp: t.Any = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        follower = self._follower(task_vars or {})
        if follower is None:
            return t.cast("dict[str, t.Any]", super().run(tmp, task_vars))
        follower.start()
        try:
            return t.cast("dict[str, t.Any]", super().run(tmp, task_vars))
        finally:
            follower.stop()

    def _follower(self, variables: dict[str, t.Any]) -> Follower | None:
        given = self._task.args
        state, release = given.get("state", "applied"), given.get("release_id")
        interval = _seconds(os.environ.get("DELIVERY_PROGRESS", ""))
        if not interval or self._task.check_mode or self._task.async_val or not release:
            return None
        phases = given.get("phases", list(PHASE_STEPS)) if state == "applied" else []
        steps = {PHASE_STEPS[phase] for phase in phases if phase in PHASE_STEPS}
        if state == "reverted" or (steps and given.get("take_back", True)):
            steps.add("reverting")
        if not steps:
            return None
        host = variables.get("inventory_hostname", "")
        return Follower(self, journal_path(str(given["project_dir"]), str(release)), steps, f" on {host}" if host else "", interval)


def _seconds(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return INTERVAL
