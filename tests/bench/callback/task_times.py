# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A callback for the benchmark: what was run, and how long each task took, in seconds."""

from __future__ import annotations

import json
import os
import time

from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):
    """Writes ``[[name, action, seconds, skipped], …]`` to the file that ``TASK_TIMES`` names: from the start of a task to its last result."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "task_times"
    CALLBACK_NEEDS_ENABLED = True

    def __init__(self):
        super().__init__()
        self._tasks = []

    def v2_playbook_on_task_start(self, task, is_conditional):
        self._begin = time.perf_counter()
        self._tasks.append([task.get_name(), task.action, 0.0, True])

    def _ended(self, skipped):
        self._tasks[-1][2] = time.perf_counter() - self._begin
        self._tasks[-1][3] = self._tasks[-1][3] and skipped

    def v2_runner_on_ok(self, result):
        self._ended(False)

    def v2_runner_on_failed(self, result, ignore_errors=False):
        self._ended(False)

    def v2_runner_on_unreachable(self, result):
        self._ended(False)

    def v2_runner_on_skipped(self, result):
        self._ended(True)

    def v2_playbook_on_stats(self, stats):
        with open(os.environ["TASK_TIMES"], "w", encoding="utf-8") as handle:
            json.dump(self._tasks, handle)
