# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The edge as a rollout sees it: which upstreams take requests, changed without a reload and always acknowledged."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

HOLDS = ("off", "writes", "all")


@dataclass(frozen=True)
class Upstream:
    """One filled slot of a backend.

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


def edge_from(options: t.Mapping[str, t.Any]) -> Edge:
    """``{"type": "haproxy", "socket": "/run/haproxy/admin.sock" or "host:port", "hold_map": path}`` or ``{"type": "none"}``."""
    # Imported here because both need the names above.
    from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.haproxy import HAProxyEdge
    from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.none import NoEdge

    known = {"haproxy": ("type", "socket", "hold_map"), "none": ("type",)}
    kind = options.get("type")
    if kind not in known:
        raise DeliveryError("edge.type", f"{kind!r} is not an edge this collection knows", "Use haproxy or none.")
    for key, value in options.items():
        if key not in known[kind] and value is not None:
            raise DeliveryError(f"edge.{key}", f"unknown key for an edge of type {kind}", f"Known are {', '.join(known[kind])}.")
    if kind == "none":
        return NoEdge()
    socket = options.get("socket")
    if not isinstance(socket, str) or not socket:
        raise DeliveryError("edge.socket", "missing", "Give the path of HAProxy's runtime socket, or host:port.")
    return HAProxyEdge(socket, hold_map=options.get("hold_map") or "")
