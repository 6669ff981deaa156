# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The edge as a rollout sees it: which upstreams take requests, and every change of that acknowledged."""

from __future__ import annotations

import ipaddress
import re
import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

HOLDS = ("off", "writes", "all")
#: Kinds of edges that can let requests wait.
HOLDING = ("haproxy",)
#: Kinds of edges that share requests out by weight and count what came of them.
WEIGHING = ("haproxy",)
NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:-]*")
HOLD_REMEDY = "Put HAProxy in front of the app (role edge). Without it migrations must be compatible, and a release cannot put data back."
#: What each kind of edge can be told.
OPTIONS: t.Mapping[str, tuple[str, ...]] = {
    "haproxy": ("type", "socket", "hold_map"),
    "nginx": ("type", "directory", "pid_file", "program", "config", "confirm"),
    "traefik": ("type", "directory", "api"),
    "none": ("type",),
}


@dataclass(frozen=True)
class Upstream:
    """One filled slot of a backend; where the edge has no slots, ``slot`` is the address with the port.

    ``state`` is ``ready``, ``drain`` or ``maint``; ``up`` is what the edge's own health check says (true where it has none);
    ``sessions`` counts requests and tunnels that are on the upstream now; ``weight`` is its present share (0 in drain).
    """

    slot: str
    address: str
    port: int
    state: str
    up: bool
    sessions: int
    weight: int


@dataclass(frozen=True)
class DrainResult:
    """How a drain ended: ``sessions_cut`` is the number still open after ``waited`` seconds, so cut when the upstream stops."""

    sessions_cut: int
    waited: float


@dataclass(frozen=True)
class Figures:
    """What an edge has counted for one upstream since it counts there: take the difference of two looks.

    ``errors`` are answers with a 5xx, refused connections and answers that broke off. ``busy`` is the sum of a sliding window over the
    seconds from request to answer, ``window`` its length in requests; see ``seconds_between``.
    """

    requests: int
    errors: int
    busy: float
    window: int


def seconds_between(before: Figures, after: Figures) -> float | None:
    """The average time to an answer between two looks at one upstream, ``None`` where no request was between them.

    A sliding window forgets: of what it held before, each request takes away one part in ``window``.
    """
    count = after.requests - before.requests
    if count <= 0:
        return None
    kept = (1 - 1 / after.window) ** count
    return max(0.0, (after.busy - before.busy * kept) / (after.window * (1 - kept)))


class Edge(t.Protocol):
    """Every method returns only after the edge has confirmed; otherwise it raises ``DeliveryError``."""

    def check(self, backend: str) -> None:
        """The edge answers and knows ``backend``; else ``DeliveryError(config)``."""

    def upstreams(self, backend: str) -> list[Upstream]:
        """The filled slots of ``backend``, in slot order."""

    def add(self, backend: str, address: str, port: int, timeout: float) -> str:
        """Give requests to ``address:port`` and return its slot, once the edge says that it is up.

        Idempotent. When it does not come up within ``timeout`` seconds it is taken out again: ``DeliveryError(cutover)``.
        """

    def drain(self, backend: str, address: str, port: int, timeout: float) -> DrainResult:
        """Give no new request to ``address:port``, then wait up to ``timeout`` seconds until it has none left. Idempotent."""

    def remove(self, backend: str, address: str, port: int) -> None:
        """Empty the slot of ``address:port``. Idempotent."""

    def hold(self, project: str, what: str, timeout: float = 30.0) -> int:
        """Let requests of ``project`` wait at the edge: ``off``, ``writes`` (all but GET, HEAD, OPTIONS, TRACE) or ``all``.

        After the edge holds new ones, waits up to ``timeout`` seconds for those already let through, and returns how many
        of them are still open: 0 means that nothing can write any more through this edge.
        """


class WeighingEdge(Edge, t.Protocol):
    """What an edge of ``WEIGHING`` can do besides."""

    def add(self, backend: str, address: str, port: int, timeout: float, weight: int = 0) -> str:
        """``weight`` 1 to 256 from its first request on; 0 for the backend's own."""

    def weigh(self, backend: str, weights: t.Mapping[tuple[str, int], int]) -> None:
        """Share new requests out: ``(address, port)`` to a weight of 0 to 256; -1 for the backend's own. The others keep theirs."""

    def figures(self, backend: str) -> dict[tuple[str, int], Figures]:
        """``(address, port)`` to what was counted there."""


def known_name(backend: str) -> str:
    """``backend``, when it can be the name of one: it becomes part of commands and of paths."""
    if not NAME.fullmatch(backend):
        raise DeliveryError("Looking at the edge", f"{backend!r} is not a backend name")
    return backend


def plain_address(text: str) -> str:
    """One spelling for each address; an edge is told addresses, no names."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise DeliveryError("Talking to the edge", f"{text!r} is not an IP address") from None


def hold_nothing(project: str, what: str, seen: str) -> int:
    """``hold`` of an edge that cannot: ``off`` is true already; anything else would be a promise that nothing keeps."""
    tried = f"Holding requests of {project}"
    if what not in HOLDS:
        raise DeliveryError(tried, f"{what!r} is not one of {', '.join(HOLDS)}")
    if what != "off":
        raise DeliveryError(tried, seen, HOLD_REMEDY)
    return 0


def edge_from(options: t.Mapping[str, t.Any]) -> Edge:
    """The edge that ``type`` and the keys of ``OPTIONS`` describe, such as ``{"type": "haproxy", "socket": path or "host:port"}``."""
    kind = options.get("type")
    if not isinstance(kind, str) or kind not in OPTIONS:
        *others, last = OPTIONS
        raise DeliveryError("edge.type", f"{kind!r} is not an edge this collection knows", f"Use {', '.join(others)} or {last}.")
    for key, value in options.items():
        if key not in OPTIONS[kind] and value is not None:
            raise DeliveryError(f"edge.{key}", f"unknown key for an edge of type {kind}", f"Known are {', '.join(OPTIONS[kind])}.")
    given = {key: value for key, value in options.items() if key != "type" and value not in (None, "")}
    for key, value in given.items():
        if not isinstance(value, str):
            raise DeliveryError(f"edge.{key}", f"{value!r} is no text")
    # Imported here because all of them need the names above, and only the one that is used, since a module compiles what it imports.
    if kind == "none":
        from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.none import NoEdge

        return NoEdge()
    if kind == "nginx":
        from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.nginx import NginxEdge

        return NginxEdge(**given)
    if kind == "traefik":
        from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.traefik import TraefikEdge

        return TraefikEdge(**given)
    from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.haproxy import HAProxyEdge

    if "socket" not in given:
        raise DeliveryError("edge.socket", "missing", "Give the path of HAProxy's runtime socket, or host:port.")
    return HAProxyEdge(given["socket"], hold_map=given.get("hold_map", ""))
