# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A callback for the benchmark: what the one task of a play took, in seconds of the clock and of processors, and MiB at its peak."""

from __future__ import annotations

import json
import multiprocessing
import os
import resource
import time

from ansible.plugins.callback import CallbackBase


class CallbackModule(CallbackBase):
    """Writes ``[wall, cpu, peak]`` to the file that ``TASK_CLOCK`` names: from the start of the task to its result here."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "aggregate"
    CALLBACK_NAME = "task_clock"
    CALLBACK_NEEDS_ENABLED = True

    def v2_playbook_on_task_start(self, task, is_conditional):
        self._begin = time.perf_counter()

    def v2_runner_on_ok(self, result):
        self._wall = time.perf_counter() - self._begin

    def v2_playbook_on_stats(self, stats):
        for child in multiprocessing.active_children():
            child.join(10)
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        with open(os.environ["TASK_CLOCK"], "w", encoding="utf-8") as handle:
            json.dump([self._wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024], handle)
