# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Watching containers while they serve: does one end, restart or get unhealthy, and what do the edge and Prometheus count?"""

from __future__ import annotations

import http.client
import json
import math
import time
import typing as t
from dataclasses import dataclass
from string import Template
from urllib.parse import urlencode, urlsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import EngineNotFound, short_id
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import Figures, WeighingEdge, seconds_between
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.host import Host

POLL = 0.5
PROMETHEUS_TIMEOUT = 5.0
#: One answer that does not come may be chance.
PROMETHEUS_TRIES = 3
PROMETHEUS_PAUSE = 5.0


@dataclass(frozen=True)
class Prometheus:
    """Each value that ``query`` gives must be at most ``most``. ``$service`` and ``$release`` stand for these in the query."""

    url: str
    query: str
    most: float


@dataclass(frozen=True)
class Judgement:
    """What counts as good for ``seconds``. ``error_rate``: percent of answers, judged from ``min_requests`` on; ``latency``: seconds on
    average, ``None`` where it is not asked."""

    seconds: float
    error_rate: float = 1.0
    latency: float | None = None
    min_requests: int = 20
    prometheus: Prometheus | None = None

    @classmethod
    def from_dict(cls, raw: t.Mapping[str, t.Any]) -> Judgement:
        asked = raw.get("prometheus") or None
        return cls(
            seconds=float(raw.get("seconds") or 0),
            error_rate=float(raw["max_error_rate"]) if raw.get("max_error_rate") is not None else cls.error_rate,
            latency=float(raw["max_latency"]) if raw.get("max_latency") is not None else None,
            min_requests=int(raw["min_requests"]) if raw.get("min_requests") is not None else cls.min_requests,
            prometheus=Prometheus(str(asked["url"]), str(asked["query"]), float(asked.get("max") or 0)) if asked else None,
        )


@dataclass
class Counted:
    """Between two looks at the edge. ``seconds``: the average to an answer, ``None`` without requests."""

    requests: int = 0
    errors: int = 0
    seconds: float | None = None

    @property
    def error_rate(self) -> float:
        """Percent. What never became an answer counts as a request too."""
        return 100.0 * self.errors / max(self.requests, self.errors, 1)

    def __str__(self) -> str:
        took = f", {self.seconds * 1000:.0f} ms on average" if self.seconds is not None else ""
        return f"{self.requests} requests, {self.errors} errors{took}"


Look = dict[tuple[str, str, int], Figures]


def counted(before: Look, after: Look) -> Counted:
    """The sum over the upstreams, ``(backend, address, port)``, that are in both looks."""
    total, busy = Counted(), 0.0
    for target, since in before.items():
        now = after.get(target)
        if now is None:
            continue
        requests = now.requests - since.requests
        total.requests += requests
        total.errors += now.errors - since.errors
        busy += (seconds_between(since, now) or 0.0) * requests
    if total.requests > 0:
        total.seconds = busy / total.requests
    return total


class Watch:
    """What is asked of ``containers`` of one or several services, from the moment this is made.

    ``upstreams``: backend to the ``(address, port)`` that are counted at the edge; empty where it counts nothing.
    """

    def __init__(
        self,
        host: Host,
        judgement: Judgement,
        containers: t.Mapping[str, t.Sequence[str]],
        upstreams: t.Mapping[str, t.Collection[tuple[str, int]]],
    ) -> None:
        self.host = host
        self.judgement = judgement
        self.containers = containers
        self.upstreams = upstreams
        self.warnings: list[str] = []
        self._starts = {one: self._started(one) for ids in containers.values() for one in ids}
        self._before = self._look()
        self._asked = float("-inf")
        self._missed = 0

    def hold_out(self, doing: str) -> Counted:
        """Watch for ``judgement.seconds``; ``DeliveryError`` (regression) at the first thing that is wrong."""
        deadline = time.monotonic() + self.judgement.seconds
        while True:
            late = time.monotonic() >= deadline
            found = self._judge(doing, late)
            if late:
                return found
            time.sleep(min(POLL, max(deadline - time.monotonic(), 0.01)))

    def _judge(self, doing: str, last: bool) -> Counted:
        for service, ids in self.containers.items():
            for container in ids:
                self._judge_container(doing, service, container)
        found = Counted()
        if self.upstreams:
            found = counted(self._before, self._look())
            self._judge_counts(doing, found, last)
        if self.judgement.prometheus and (last or time.monotonic() - self._asked >= PROMETHEUS_PAUSE):
            self._judge_prometheus(doing, self.judgement.prometheus)
        return found

    # -- containers

    def _started(self, container: str) -> tuple[int, str]:
        details = self.host.engine.inspect(container)
        return int(details.get("RestartCount") or 0), str(details["State"].get("StartedAt"))

    def _judge_container(self, doing: str, service: str, container: str) -> None:
        try:
            details = self.host.engine.inspect(container)
        except EngineNotFound as exc:
            raise self._bad(doing, f"container {short_id(container)} of {service} has been removed") from exc
        state, restarts = details["State"], int(details.get("RestartCount") or 0)
        name = f"container {short_id(container)} of {service}"
        seen = ""
        if (restarts, str(state.get("StartedAt"))) != self._starts[container]:
            seen = f"{name} has restarted, its last exit code was {state.get('ExitCode')}"
        elif not state.get("Running"):
            seen = f"{name} has ended with exit code {state.get('ExitCode')}"
        elif (state.get("Health") or {}).get("Status") == "unhealthy":
            seen = f"{name} has become unhealthy"
        if seen:
            logs = self.host.last_lines(container)
            raise self._bad(doing, f"{seen}\nIts last lines:\n{logs}\n" if logs else seen, container=container, logs=logs.splitlines())

    # -- the edge

    def _look(self) -> Look:
        edge = t.cast(WeighingEdge, self.host.edge)
        found: Look = {}
        for backend, wanted in self.upstreams.items():
            found.update({(backend, *target): figures for target, figures in edge.figures(backend).items() if target in wanted})
        return found

    def _judge_counts(self, doing: str, found: Counted, last: bool) -> None:
        wanted = self.judgement
        enough = max(found.requests, found.errors) >= wanted.min_requests
        if not (enough or last):
            return
        if found.errors and found.error_rate > wanted.error_rate:
            raise self._bad(doing, f"{found}: {found.error_rate:.1f} % errors, at most {wanted.error_rate:g} % are allowed")
        if wanted.latency is not None and found.seconds is not None and found.seconds > wanted.latency:
            raise self._bad(doing, f"{found}, at most {wanted.latency * 1000:g} ms are allowed")
        if not enough and last:
            few = f"only {found.requests} requests came in {wanted.seconds:g} s, {wanted.min_requests} are wanted to judge"
            self.warnings.append(f"{doing}: {few}")

    # -- Prometheus

    def _judge_prometheus(self, doing: str, asked: Prometheus) -> None:
        self._asked = time.monotonic()
        names = {"service": next(iter(self.containers), ""), "release": self.host.spec.release_id}
        query = Template(asked.query).safe_substitute(names)
        try:
            values = prometheus_values(asked.url, query)
        except DeliveryError as exc:
            self._missed += 1
            if self._missed >= PROMETHEUS_TRIES:
                raise self._bad(doing, f"what Prometheus says could not be judged: {exc.message}") from exc
            return
        self._missed = 0
        if not values:
            self.warnings.append(f"{doing}: Prometheus has no value for {query}")
        if values and max(values) > asked.most:
            raise self._bad(doing, f"Prometheus says {max(values):g} for {query}, at most {asked.most:g} is allowed")

    def _bad(self, doing: str, seen: str, **details: t.Any) -> DeliveryError:
        return DeliveryError(doing, seen, "", "regression", **details)


def prometheus_values(url: str, query: str) -> list[float]:
    """The values of an instant query (``GET /api/v1/query``); ``DeliveryError`` (transport) when there is no such answer."""
    tried, parts = f"Asking Prometheus at {url}", urlsplit(url)
    kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=PROMETHEUS_TIMEOUT)
    try:
        connection.request("GET", f"{parts.path.rstrip('/')}/api/v1/query?{urlencode({'query': query})}")
        response = connection.getresponse()
        body = response.read(2**20)
        if response.status != 200:
            said = body[:500].decode(errors="replace").strip()
            raise DeliveryError(tried, f"it answered {response.status}: {said}", f"Check the query {query}.", "transport")
        data = json.loads(body)["data"]
        pairs = [data["result"]] if data["resultType"] in ("scalar", "string") else [one["value"] for one in data["result"]]
        values = [float(pair[1]) for pair in pairs]
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as exc:
        raise DeliveryError(tried, str(exc) or type(exc).__name__, "Is this the address of Prometheus?", "transport") from exc
    finally:
        connection.close()
    return [value for value in values if not math.isnan(value)]  # not a number: nothing was counted
