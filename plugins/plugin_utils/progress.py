# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Reads the journal of a release while a module writes it on the host, so that people see a line when something changes.

A module can only speak when it has ended. The journal is followed over a connection of its own, in a thread of Ansible's worker; what it
shows is never needed, so whatever goes wrong with it is silence.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shlex
import threading
import time
import typing as t

from ansible.plugins.action import ActionBase
from ansible.utils.display import Display

#: Between two looks, in seconds. Each is a command on the host; a task that is quicker has none, its own line says it all.
INTERVAL = 5.0
#: Connections of which a copy can be used beside the original: each command is a process of its own.
TRANSPORTS = ("local", "ssh")


def line_of(entry: t.Mapping[str, t.Any]) -> str:
    """One entry of ``journal.jsonl`` for people, '' where it says nothing to them."""
    step, event, data = entry.get("step"), entry.get("event"), entry.get("data") or {}
    service = entry.get("service")
    if event == "fail":
        return f"{service or step}: failed"
    if step == "rolling" and service:
        change = _rolling(str(event), data)
        return f"{service}: {change}" if change else ""
    if service:
        words = {
            ("dependencies", "begin"): "starting",
            ("dependencies", "end"): "ready",
            ("reverting", "begin"): "going back",
            ("reverting", "end"): "as it was",
        }
        said = words.get((str(step), str(event)))
        return f"{service}: {said}" if said else ""
    return {
        ("held", "begin"): "requests that write are held",
        ("migrated", "begin"): "migrating",
        ("migrated", "end"): "migrated",
        ("baking", "begin"): f"watching for {data.get('seconds', 0):g} s",
    }.get((str(step), str(event)), "")


def _rolling(event: str, data: t.Mapping[str, t.Any]) -> str:
    if event == "begin":
        return f"{data.get('strategy')}, {len(data.get('new') or ())} new for {len(data.get('old') or ())} old"
    if event == "end":
        cut = f", {data['cut']} requests were cut" if data.get("cut") else ""
        return f"the new serve after {data.get('seconds', 0):g} s{cut}"
    if "requests" in data:
        return f"{data['share']} % was good, {data['requests']} requests, {data['errors']} errors"
    if "share" in data:
        return f"{data['share']} % of the requests go to the new"
    if "batch" in data:
        done, total = data["batch"]
        return f"{done} of {total} changed places"
    return ""


class Follower:
    """Shows the entries of ``steps`` in the journal ``path`` on the task's host, from ``start`` to ``stop``; ``where`` ends each line."""

    def __init__(self, action: ActionBase, path: str, steps: t.Container[str], where: str, interval: float = INTERVAL) -> None:
        self._path, self._steps, self._where, self._interval = path, steps, where, interval
        self._read = 0
        self._shown = False
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._action = copy.copy(action)
        # The original is busy with the module, and a become plugin remembers the command that it has just wrapped.
        self._action._connection = copy.copy(action._connection)
        if action._connection.become is not None:
            self._action._connection.set_become_plugin(copy.copy(action._connection.become))

    def start(self) -> None:
        if self._action._connection.transport in TRANSPORTS:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def stop(self) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self) -> None:
        with contextlib.suppress(Exception):
            while not self._stop.wait(self._interval):
                self._look()
            if self._shown:  # what was begun is ended
                self._look()

    def _look(self) -> None:
        found = self._action._low_level_execute_command(f"tail -c +{self._read + 1} {shlex.quote(self._path)}")
        if found.get("rc") != 0:
            return
        whole, newline, _part = str(found["stdout"]).rpartition("\n")
        self._read += len((whole + newline).encode())
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                said = line_of(entry) if entry.get("step") in self._steps else ""
                if said:
                    self._shown = True
                    Display().display(f"{time.strftime('%H:%M:%S')}           {said}{self._where}")
