# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Confirmed or undone: a process on the host takes a release back when nobody has confirmed it in time.

``confirm.json`` in the release folder holds the state: ``armed`` before the first cutover; then ``confirmed`` (the controller has seen
that it is good, or has taken it back itself), ``gone_back``, or ``failed`` (with ``msg``). Who changes it has the host to itself
(``releases.busy``), so a confirmation and the way back never meet.
"""

from __future__ import annotations

import os
import time
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.detached import detached
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json, write_json
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import busy, release_path

POLL = 0.2


def confirm_path(project_dir: str, release_id: str) -> str:
    return os.path.join(release_path(project_dir, release_id), "confirm.json")


def read_confirm(project_dir: str, release_id: str) -> dict[str, t.Any]:
    """``{state, within, pid}``, with ``msg`` where the way back failed; empty where nobody waits for a confirmation."""
    return read_json(confirm_path(project_dir, release_id)) or {}


def _note(project_dir: str, release_id: str, state: str, **more: t.Any) -> None:
    write_json(confirm_path(project_dir, release_id), {**read_confirm(project_dir, release_id), "state": state, **more})


class Waiter:
    """Start it while no other thread runs, arm it before the first cutover. Both by whoever has the host to itself."""

    def __init__(self, project_dir: str, release_id: str, within: float, go_back: t.Callable[[], None]) -> None:
        self.project_dir, self.release_id, self.within = project_dir, release_id, within
        self._go_back = go_back
        self.pid = detached(self._wait)

    def arm(self) -> None:
        _note(self.project_dir, self.release_id, "armed", within=self.within, pid=self.pid)

    def _wait(self) -> None:
        heard = time.monotonic()
        while True:
            time.sleep(POLL)
            try:
                with busy(self.project_dir, timeout=0):
                    if read_confirm(self.project_dir, self.release_id).get("state") != "armed":
                        return
                    if time.monotonic() - heard >= self.within:
                        self._end()
                        return
            except DeliveryError:
                # A module works here: the controller lives, and the time begins anew when it is done.
                heard = time.monotonic()

    def _end(self) -> None:
        try:
            self._go_back()
        except DeliveryError as exc:
            if exc.failure_class != "lock":  # another run is at it
                _note(self.project_dir, self.release_id, "failed", msg=exc.message)
        except Exception as exc:  # noqa: BLE001 - nobody else is there to tell
            _note(self.project_dir, self.release_id, "failed", msg=f"{type(exc).__name__}: {exc}")
            raise
        else:
            _note(self.project_dir, self.release_id, "gone_back")


def confirm(project_dir: str, release_id: str, check_mode: bool = False) -> bool:
    """The release is good: the host need not go back any more. False where nothing waited.

    Raises ``DeliveryError`` (cutover) when the host has gone back already.
    """
    with busy(project_dir):
        known = read_confirm(project_dir, release_id)
        state = known.get("state")
        if state in ("gone_back", "failed"):
            raise DeliveryError(
                f"Confirming release {release_id}",
                f"nobody confirmed it within {known['within']:g} s, so this host has gone back by itself"
                + (f", which failed: {known['msg']}" if state == "failed" else ""),
                "Raise policies.confirm_within if the controller needs longer between its steps.",
                "cutover",
            )
        if state != "armed":
            return False
        if not check_mode:
            _note(project_dir, release_id, "confirmed")
        return True


def disarm(project_dir: str, release_id: str) -> None:
    """Whoever takes the release back now does the host's work. For a caller that has the host to itself."""
    if read_confirm(project_dir, release_id).get("state") == "armed":
        _note(project_dir, release_id, "confirmed")
