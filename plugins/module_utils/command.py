# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Running an outside program: a list of arguments, a bound in time, no terminal, no shell."""

from __future__ import annotations

import os
import signal
import subprocess
import typing as t
from dataclasses import dataclass


@dataclass(frozen=True)
class CommandResult:
    """What a program answered. ``timed_out`` programs have ``code`` -1."""

    argv: tuple[str, ...]
    code: int
    stdout: str
    stderr: str
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        return self.code == 0

    def last_lines(self, count: int = 10) -> str:
        """The end of what it said, standard error first since that holds the reason."""
        text = self.stderr.strip() or self.stdout.strip()
        return "\n".join(text.splitlines()[-count:])


def run(
    argv: t.Sequence[str],
    timeout: float | None = None,
    env: t.Mapping[str, str] | None = None,
    cwd: str | None = None,
    stdin: str | None = None,
    grace: float = 10.0,
    keep_stdout: bool = True,
) -> CommandResult:
    """Run ``argv`` in its own process group and wait for its end.

    ``env`` is added to the current environment (secrets go there or into ``stdin``, never into ``argv``).
    After ``timeout`` seconds the whole group gets SIGTERM, and SIGKILL after ``grace`` more.
    Without ``keep_stdout`` standard output is thrown away unread, however long it is.
    A missing program raises ``FileNotFoundError``.
    """
    # AnsibleModule.run_command, which sanity would rather see, bounds no time and ends no group; and this runs where there is no module.
    process = subprocess.Popen(  # pylint: disable=ansible-bad-function
        list(argv),
        stdin=subprocess.PIPE if stdin is not None else subprocess.DEVNULL,
        stdout=subprocess.PIPE if keep_stdout else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        cwd=cwd,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    timed_out = False
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        timed_out = True
        _signal_group(process, signal.SIGTERM)
        try:
            stdout, stderr = process.communicate(timeout=grace)
        except subprocess.TimeoutExpired:
            _signal_group(process, signal.SIGKILL)
            stdout, stderr = process.communicate()
    except BaseException:
        _signal_group(process, signal.SIGKILL)
        process.wait()
        raise
    return CommandResult(tuple(argv), -1 if timed_out else process.returncode, stdout or "", stderr, timed_out)


def _signal_group(process: subprocess.Popen[str], number: int) -> None:
    try:
        os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
