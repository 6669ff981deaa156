# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Probes of containers on the engine of this host: their state, their health, all of a service, their log."""

from __future__ import annotations

import re
import time
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import (
    ONEOFF_LABEL,
    PROJECT_LABEL,
    SERVICE_LABEL,
    Engine,
    EngineError,
    EngineNotFound,
    LogStream,
    short_id,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.checks import TRY_TIMEOUT
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.outcomes import Hopeless, NotReady, shown_start

LOG_LINES = 20
#: Of a line in a log; longer ones are cut. On a line of 64 KiB a pattern such as ``.*ready.*`` would keep all checks waiting for a minute.
LINE_LIMIT = 4096


class ContainerWatch:
    """Looks at containers again and again, and knows what it saw before."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._restarts: dict[str, int] = {}

    def look(self, container: str) -> dict[str, t.Any]:
        """What the engine says about it; ``Hopeless`` when it exited, loops or is gone, ``NotReady`` when it is not there yet."""
        try:
            facts = self.engine.inspect(container)
        except EngineNotFound:
            if container in self._restarts:
                raise Hopeless(f"container {short_id(container)} was removed") from None
            raise NotReady(f"no container {short_id(container)}") from None
        state = facts["State"]
        name = facts["Name"].lstrip("/")
        restarts = int(facts.get("RestartCount") or 0)
        before = self._restarts.setdefault(container, restarts)
        code = state.get("ExitCode")
        if restarts > before or state["Status"] == "restarting":
            raise Hopeless(self._with_logs(facts, f"container {name} restarts again and again ({restarts} times, last exit code {code})"))
        if state["Status"] in ("exited", "dead", "removing"):
            killed = ", out of memory" if state.get("OOMKilled") else ""
            wrong = f": {state['Error']}" if state.get("Error") else ""
            raise Hopeless(self._with_logs(facts, f"container {name} {state['Status']} with code {code}{killed}{wrong}"))
        return facts

    def ready(self, container: str, wanted: str) -> None:
        """Return when it is healthy, or running where it has no health check (``auto``); ``healthy`` insists on one."""
        facts = self.look(container)
        state = facts["State"]
        name = facts["Name"].lstrip("/")
        if state["Status"] != "running":
            raise NotReady(f"container {name} is {state['Status']}")
        health = (state.get("Health") or {}).get("Status", "none")
        if wanted == "running" or (wanted == "auto" and health == "none"):
            return
        if health == "none":
            raise NotReady(f"container {name} has no health check")
        if health != "healthy":
            raise NotReady(f"container {name} is {health}{_health_log(facts)}")

    def _with_logs(self, facts: t.Mapping[str, t.Any], text: str) -> str:
        try:
            lines = self.engine.logs(facts["Id"], LOG_LINES).strip()
        except DeliveryError as exc:
            lines = f"(no log: {exc.seen})"
        return f"{text}{_health_log(facts)}; last log lines:\n{lines}" if lines else f"{text}{_health_log(facts)}; its log is empty"


def _health_log(facts: t.Mapping[str, t.Any]) -> str:
    """The last answer of the health check, where there is one."""
    entries = (facts["State"].get("Health") or {}).get("Log") or []
    if not entries:
        return ""
    said = shown_start(str(entries[-1].get("Output") or "").encode())
    return f", its health check ended with {entries[-1].get('ExitCode')} and says {said}"


class LogWatch:
    """Reads a container's log as it is written, for a line of its present run that a pattern is found in."""

    def __init__(self, engine: Engine, container: str, pattern: re.Pattern[str]) -> None:
        self.watch = ContainerWatch(engine)
        self.engine = engine
        self.container = container
        self.pattern = pattern
        self._stream: LogStream | None = None
        self._run = ""
        self._found = False
        self._lines = 0
        self._last = ""
        self._rest = ""

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None

    def ready(self, left: float) -> None:
        deadline = time.monotonic() + min(left, TRY_TIMEOUT)
        facts = self.watch.look(self.container)
        state, name = facts["State"], facts["Name"].lstrip("/")
        if state["Status"] not in ("running", "paused"):
            raise NotReady(f"container {name} is {state['Status']}")
        if self._run != state["StartedAt"]:  # another run of it has other lines
            self.close()
            self._run, self._found = state["StartedAt"], False
        if not self._found:
            if self._stream is None:
                # Its first lines can be older than StartedAt, which is noted after the start; so, from the end of the run before on.
                tty = bool((facts.get("Config") or {}).get("Tty"))
                self._stream = self.engine.follow(facts["Id"], state.get("FinishedAt") or "", tty)
                self._lines, self._last, self._rest = 0, "", ""
            try:
                self._found = self._look_on(self._stream, deadline)
            except EngineError as exc:
                self.close()
                if exc.status == 501:
                    raise Hopeless(f"the log of container {name} cannot be read: {exc.reason}") from None
                raise
        if not self._found:
            seen = f"lines so far: {self._lines}, the last {shown_start(self._last.encode())}" if self._lines else "there is none so far"
            raise NotReady(f"no line in the log of container {name} has {self.pattern.pattern!r}; {seen}")
        self.close()

    def _look_on(self, stream: LogStream, deadline: float) -> bool:
        """Whether the pattern is in what has come since the last look."""
        while time.monotonic() < deadline:
            text = stream.read()
            if text is None:
                return False
            if not text:  # it ends with the run, or with the engine: both are looked at again
                self.close()
                text = "\n" if self._rest else ""
            *lines, rest = (self._rest + text).split("\n")
            self._rest = rest[:LINE_LIMIT]
            for line in lines:
                self._lines, self._last = self._lines + 1, line or self._last
                if self.pattern.search(line[:LINE_LIMIT].rstrip("\r")):
                    return True
            if self._stream is None:
                return False
        return False


class ServiceWatch:
    """All containers of one Compose service. Those that had stopped before the first look are of an older release, and left out."""

    def __init__(self, engine: Engine, options: t.Mapping[str, t.Any]) -> None:
        self.watch = ContainerWatch(engine)
        self.engine = engine
        self.project = options["project"]
        self.service = options["service"]
        self.wanted = options.get("state", "auto")
        self._seen: set[str] = set()

    def ready(self) -> None:
        listed = self.engine.containers({PROJECT_LABEL: self.project, SERVICE_LABEL: self.service})
        listed = [one for one in listed if (one.get("Labels") or {}).get(ONEOFF_LABEL, "False").lower() != "true"]
        alive = {one["Id"] for one in listed if one["State"] not in ("exited", "dead", "removing")}
        ended = {one["Id"] for one in listed} - alive
        # A whole service that has stopped is the news itself; beside living containers, stopped ones are history.
        relevant = alive | (ended & self._seen if alive else ended)
        self._seen |= alive
        if not relevant:
            raise NotReady(f"no container of service {self.service} of project {self.project}")
        waiting = []
        for container in sorted(relevant):
            try:
                self.watch.ready(container, self.wanted)
            except NotReady as exc:
                waiting.append(str(exc))
        if waiting:
            raise NotReady(f"{len(relevant) - len(waiting)} of {len(relevant)} containers ready; " + "; ".join(waiting))
