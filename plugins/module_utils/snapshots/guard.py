# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process of its own that does what must be done if this one dies.

It waits on a pipe whose other end only the guarded process holds, so that any death, SIGKILL too, wakes it at once.
"""

from __future__ import annotations

import os
import select
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.detached import detached

_DISARM = b"d"


class Guard:
    """``action`` runs in the guard when this process dies before ``disarm``, or after ``limit`` seconds."""

    def __init__(self, action: t.Callable[[], None], limit: float) -> None:
        self._action = action
        self._limit = limit
        self._pipe = -1
        #: Process id of the armed guard.
        self.pid = 0

    def arm(self) -> None:
        """Start the guard; it is ready when this returns. Must be called while no other thread runs."""
        wait_end, self._pipe = os.pipe()
        self.pid = detached(lambda: self._guard(wait_end), (wait_end,))
        os.close(wait_end)

    def disarm(self) -> None:
        """Send the guard home; nothing is left of it."""
        if self._pipe >= 0:
            try:
                os.write(self._pipe, _DISARM)
            except BrokenPipeError:
                pass
            os.close(self._pipe)
            self._pipe = -1

    def _guard(self, wait_end: int) -> None:
        told, _write, _error = select.select([wait_end], [], [], self._limit)
        if told and os.read(wait_end, 1) == _DISARM:
            return
        self._action()
