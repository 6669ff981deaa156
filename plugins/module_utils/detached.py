# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A process that outlives the module that starts it: a fork, so that it has the module's code, which is deleted when the module ends."""

from __future__ import annotations

import os
import signal
import typing as t


def detached(action: t.Callable[[], None], keep: t.Collection[int] = ()) -> int:
    """Run ``action`` in a process of its own and return its id once it runs there.

    It has no terminal and none of this process's files but those in ``keep``. Must be called while no other thread runs, and
    ``action`` must import nothing of this collection.
    """
    ready_end, ready = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            if os.fork() == 0:
                _settle({*keep, ready})
                os.write(ready, str(os.getpid()).encode())
                os.close(ready)
                action()
        finally:
            os._exit(0)
    os.close(ready)
    os.waitpid(child, 0)
    with os.fdopen(ready_end, "rb") as handle:
        return int(handle.read())


def _settle(keep: t.Collection[int]) -> None:
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    # Whoever started the module waits for the end of its output, and a lock lasts as long as anybody has its file.
    null = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(null, descriptor)
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) not in keep:
            try:
                os.close(int(name))
            except OSError:
                continue  # the one that listed them
    os.chdir("/")
