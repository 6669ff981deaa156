# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The output people read at 3 a.m.: what changed, how long it took, what is being waited for."""

from __future__ import annotations

DOCUMENTATION = r"""
name: timeline
type: stdout
short_description: A line when something changes, a heartbeat while waiting, the whole truth on failure
description:
  - Prints one timestamped line for each task that changed something or took noticeable time, the text of C(debug) tasks as it is,
    and on failure the message of the module with its failure class.
  - Tasks that changed nothing stay silent. With C(-v) and more it prints what the default callback prints.
version_added: 0.1.0
author: selfhost.delivery contributors (@selfhost-delivery)
requirements:
  - Set as C(stdout_callback = selfhost.delivery.timeline) in C(ansible.cfg).
extends_documentation_fragment:
  - default_callback
options:
  heartbeat:
    description: Seconds of silence after which the running task is named once more. V(0) turns the heartbeat off.
    type: float
    default: 15
    ini:
      - section: callback_timeline
        key: heartbeat
    env:
      - name: SELFHOST_DELIVERY_HEARTBEAT
  noticeable:
    description: Seconds from which an unchanged task is worth a line.
    type: float
    default: 2
    ini:
      - section: callback_timeline
        key: noticeable
    env:
      - name: SELFHOST_DELIVERY_NOTICEABLE
"""

import threading
import time
import typing as t

from ansible import constants as C
from ansible.plugins.callback.default import CallbackModule as DefaultCallback


class CallbackModule(DefaultCallback):
    """Quiet by default, exact on failure."""

    CALLBACK_VERSION = 2.0
    CALLBACK_TYPE = "stdout"
    CALLBACK_NAME = "selfhost.delivery.timeline"

    def __init__(self) -> None:
        super().__init__()
        self._began = time.monotonic()
        self._task_began = self._began
        self._task_name = ""
        self._last_line = self._began
        self._stop = threading.Event()
        self._pulse: t.Optional[threading.Thread] = None

    # -- what is running ---------------------------------------------------------------------------------------

    @property
    def _loud(self) -> bool:
        return self._display.verbosity > 0

    def v2_playbook_on_start(self, playbook: t.Any) -> None:
        if self._loud:
            super().v2_playbook_on_start(playbook)
        interval = float(self.get_option("heartbeat"))
        if interval > 0:
            self._pulse = threading.Thread(target=self._beat, args=(interval,), daemon=True)
            self._pulse.start()

    def v2_playbook_on_play_start(self, play: t.Any) -> None:
        if self._loud:
            super().v2_playbook_on_play_start(play)
            return
        name = play.get_name().strip()
        self._say(f"{name}{' (check mode, nothing will change)' if play.check_mode else ''}", C.COLOR_HIGHLIGHT)

    def v2_playbook_on_task_start(self, task: t.Any, is_conditional: bool) -> None:
        self._task_name = task.get_name().strip().rpartition(" : ")[2]
        self._task_began = time.monotonic()
        if self._loud:
            super().v2_playbook_on_task_start(task, is_conditional)

    def v2_playbook_on_cleanup_task_start(self, task: t.Any) -> None:
        self.v2_playbook_on_task_start(task, False)

    def v2_playbook_on_handler_task_start(self, task: t.Any) -> None:
        self.v2_playbook_on_task_start(task, False)

    def v2_playbook_on_include(self, included_file: t.Any) -> None:
        if self._loud:
            super().v2_playbook_on_include(included_file)

    # -- what came of it ---------------------------------------------------------------------------------------

    def v2_runner_on_ok(self, result: t.Any) -> None:
        if self._loud:
            super().v2_runner_on_ok(result)
            return
        outcome, task = _parts(result)
        for warning in outcome.get("warnings") or []:
            self._say(f"warning: {_text(warning)}", C.COLOR_WARN)
        if task.action in C._ACTION_DEBUG:
            for line in _as_lines(outcome.get("msg")):
                self._say(line, stamp=False)
            return
        if task.action == "selfhost.delivery.release" and task.args.get("state") == "step":
            return  # the journal's own bookkeeping: the step itself has its line
        seconds = time.monotonic() - self._task_began
        changed = bool(outcome.get("changed"))
        if outcome.get("diff") and (self._display_diff(task)):
            self._say(self._get_diff(outcome["diff"]), stamp=False)
        if changed or seconds >= float(self.get_option("noticeable")):
            self._say(f"{'changed' if changed else 'ok     '}  {self._task_name}{self._at(result)}  ({seconds:.1f} s)",
                      C.COLOR_CHANGED if changed else C.COLOR_OK)

    def v2_runner_on_failed(self, result: t.Any, ignore_errors: bool = False) -> None:
        if self._loud:
            super().v2_runner_on_failed(result, ignore_errors)
            return
        if ignore_errors:
            return
        outcome, _task = _parts(result)
        kind = outcome.get("failure_class")
        self._say(f"FAILED   {self._task_name}{self._at(result)}{f'  [{kind}]' if kind else ''}", C.COLOR_ERROR)
        for line in _as_lines(outcome.get("msg") or outcome.get("censored") or "no message; run again with -vvv"):
            self._say(f"  {line}", C.COLOR_ERROR, stamp=False)
        for item in outcome.get("results") or []:
            if isinstance(item, dict) and item.get("failed"):
                for line in _as_lines(item.get("msg")):
                    self._say(f"  {line}", C.COLOR_ERROR, stamp=False)

    def v2_runner_on_unreachable(self, result: t.Any) -> None:
        if self._loud:
            super().v2_runner_on_unreachable(result)
            return
        outcome, _task = _parts(result)
        self._say(f"UNREACHABLE  {self._task_name}{self._at(result)}: {_text(outcome.get('msg'))}", C.COLOR_UNREACHABLE)

    def v2_runner_on_skipped(self, result: t.Any) -> None:
        if self._loud:
            super().v2_runner_on_skipped(result)

    def v2_runner_item_on_ok(self, result: t.Any) -> None:
        if self._loud:
            super().v2_runner_item_on_ok(result)

    def v2_runner_item_on_skipped(self, result: t.Any) -> None:
        if self._loud:
            super().v2_runner_item_on_skipped(result)

    def v2_runner_item_on_failed(self, result: t.Any) -> None:
        if self._loud:
            super().v2_runner_item_on_failed(result)

    def v2_on_file_diff(self, result: t.Any) -> None:
        if self._loud:
            super().v2_on_file_diff(result)

    def v2_playbook_on_stats(self, stats: t.Any) -> None:
        self._stop.set()
        if self._loud:
            super().v2_playbook_on_stats(stats)

    # -- lines -------------------------------------------------------------------------------------------------

    def _display_diff(self, task: t.Any) -> bool:
        return bool(getattr(task, "diff", False))

    def _at(self, result: t.Any) -> str:
        host = getattr(result, "host", None) or getattr(result, "_host", None)
        return f" on {host.get_name()}" if host is not None else ""

    def _say(self, text: str, color: t.Optional[str] = None, stamp: bool = True) -> None:
        self._last_line = time.monotonic()
        prefix = time.strftime("%H:%M:%S  ") if stamp else ""
        self._display.display(f"{prefix}{text}", color=color)

    def _beat(self, interval: float) -> None:
        while not self._stop.wait(min(interval, 1.0)):
            if self._task_name and time.monotonic() - self._last_line >= interval:
                self._say(f"waiting  {self._task_name}  ({time.monotonic() - self._task_began:.0f} s so far)", C.COLOR_VERBOSE)


def _parts(result: t.Any) -> tuple[dict[str, t.Any], t.Any]:
    """Result dict and task, by the public names of ansible-core 2.20+ or the older private ones."""
    if hasattr(result, "result"):
        return result.result, result.task
    return result._result, result._task


def _text(value: t.Any) -> str:
    return value.strip("\n") if isinstance(value, str) else str(value)


def _as_lines(value: t.Any) -> list[str]:
    if isinstance(value, (list, tuple)):
        return [line for entry in value for line in _as_lines(entry)]
    return _text(value).splitlines() or [""]
