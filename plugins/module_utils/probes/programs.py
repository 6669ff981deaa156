# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Probes that run a program: one of this host, one in a container, and systemd's own."""

from __future__ import annotations

import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.command import run
from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.containers import LOG_LINES
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.outcomes import Hopeless, NoAnswer, NotReady, shown_start


def systemd(unit: str, left: float) -> None:
    wanted = "LoadState,ActiveState,SubState,Result"
    try:
        result = run(["systemctl", "show", "--property", wanted, "--", unit], timeout=max(left, 1.0))
    except FileNotFoundError:
        raise Hopeless("this host has no systemctl") from None
    if not result.ok:
        raise NotReady(f"systemctl: {result.last_lines(1)}")
    facts = dict(line.split("=", 1) for line in result.stdout.splitlines() if "=" in line)
    if facts.get("LoadState") in ("not-found", "bad-setting", "error", "masked"):
        raise NotReady(f"unit {unit} is {facts['LoadState']}")
    active, sub = facts.get("ActiveState", "unknown"), facts.get("SubState", "unknown")
    if active == "active":
        return
    text = f"unit {unit} is {active} ({sub})"
    if active == "failed" or sub == "auto-restart":
        lines = run(["journalctl", "--no-pager", "--quiet", "-o", "cat", "-n", str(LOG_LINES), "-u", unit], timeout=5.0).stdout.strip()
        raise Hopeless(f"{text}, {facts.get('Result')}; last log lines:\n{lines}")
    raise NotReady(text)


def command(options: t.Mapping[str, t.Any], engine: Engine, limit: float) -> None:
    argv = options["argv"]
    late = NoAnswer(f"{argv[0]} did not end within {limit:.1f} s")
    if options.get("container"):
        try:
            code, said = engine.exec(options["container"], argv, timeout=limit)
        except TimeoutError:
            raise late from None
    else:
        try:
            result = run(argv, timeout=limit, grace=1.0)
        except OSError as exc:
            raise NotReady(f"{argv[0]} cannot be run: {exc.strerror}") from exc
        if result.timed_out:
            raise late
        code, said = result.code, result.last_lines(3)
    if code != 0:
        said = said.strip()
        raise NotReady(f"{argv[0]} ended with {code}" + (f" and says {shown_start(said[-600:].encode())}" if said else ""))
