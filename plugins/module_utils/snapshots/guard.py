# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process of its own that does what must be done if this one dies.

It waits on a pipe whose other end only the guarded process holds, so that any death, SIGKILL too, wakes it at once.
"""

from __future__ import annotations

import os
import select
import signal
import typing as t

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
        ready_end, ready = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                os.setsid()
                if os.fork() == 0:
                    self._guard(wait_end, ready)
            finally:
                os._exit(0)
        os.close(wait_end)
        os.close(ready)
        os.waitpid(child, 0)
        with os.fdopen(ready_end, "rb") as handle:
            self.pid = int(handle.read())

    def disarm(self) -> None:
        """Send the guard home; nothing is left of it."""
        if self._pipe >= 0:
            try:
                os.write(self._pipe, _DISARM)
            except BrokenPipeError:
                pass
            os.close(self._pipe)
            self._pipe = -1

    def _guard(self, wait_end: int, ready: int) -> None:
        # Whoever started the module waits for the end of its output, so the guard must hold none of its files.
        for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_IGN)
        null = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(null, descriptor)
        wait_end, ready = os.dup2(wait_end, 1000), os.dup2(ready, 1001)
        os.closerange(3, 1000)
        os.closerange(1002, os.sysconf("SC_OPEN_MAX") if os.sysconf("SC_OPEN_MAX") < 1 << 20 else 1 << 16)
        os.chdir("/")
        os.write(ready, str(os.getpid()).encode())
        os.close(ready)
        told, _write, _error = select.select([wait_end], [], [], self._limit)
        if told and os.read(wait_end, 1) == _DISARM:
            os._exit(0)
        os.close(wait_end)
        self._action()
        os._exit(0)
