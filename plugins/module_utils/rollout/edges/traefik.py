# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Traefik 3 with its file provider, for who already has it: one file a backend in the watched folder, seen through its API.

JSON is YAML, so the file is written as JSON. Traefik is told to keep no idle connections to the upstreams of such a backend:
so each connection is one request, and the kernel counts for Traefik, which has no count for a server.
"""

from __future__ import annotations

import http.client
import json
import os
import threading
import time
import typing as t
from dataclasses import dataclass, replace
from urllib.parse import quote, urlsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import write_json
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import (
    DrainResult,
    Upstream,
    hold_nothing,
    known_name,
    plain_address,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.local import (
    POLL,
    await_listener,
    connections,
    named,
    until,
)

PROGRAM = "traefik"
CONFIRM_TIMEOUT = 20.0
ASK_TIMEOUT = 5.0


@dataclass(frozen=True)
class Server:
    address: str
    port: int
    #: 0: Traefik gives it nothing.
    weight: int = 1
    up: bool = True

    @property
    def url(self) -> str:
        return f"http://[{self.address}]:{self.port}" if ":" in self.address else f"http://{self.address}:{self.port}"

    def is_at(self, address: str, port: int) -> bool:
        return (self.address, self.port) == (address, port)


class TraefikEdge:
    """See ``Edge``. What is drained stays in the file with weight 0 until it is removed."""

    def __init__(self, directory: str = "/etc/traefik/dynamic", api: str = "http://127.0.0.1:8080") -> None:
        if not os.path.isabs(directory):
            raise DeliveryError("edge.directory", f"{directory!r} is no absolute path")
        parts = urlsplit(api)
        if parts.scheme != "http" or not parts.hostname:
            raise DeliveryError("edge.api", f"{api!r} is no http address", "Give where this host reaches Traefik's API.")
        self.directory = directory
        self.api = api.rstrip("/")
        # Several upstreams of a backend are drained side by side.
        self._lock = threading.RLock()

    # -- what is there

    def check(self, backend: str) -> None:
        tried = f"Looking at backend {backend} of Traefik"
        try:
            known = self._running(backend) is not None or self._read(backend)
            routers = self._ask("/api/http/routers?per_page=1000") or []
            self._processes()
        except DeliveryError as exc:
            raise DeliveryError(exc.tried, exc.seen, exc.remedy, "config") from exc
        if not os.path.isdir(self.directory):
            raise DeliveryError(tried, f"there is no {self.directory}", "Set edge.directory to the folder that Traefik watches.")
        if not known and not any(router.get("service") in (backend, f"{backend}@file") for router in routers):
            raise DeliveryError(tried, f"no router of it names the service {backend}@file", "Write one; docs/edges.md has an example.")

    def upstreams(self, backend: str) -> list[Upstream]:
        # What the file says is what Traefik has, or will have in a moment, should somebody have been killed just after writing it.
        running = {server.url: server.up for server in self._running(backend) or ()}
        servers, pids = self._read(backend), self._processes()
        return [
            Upstream(
                slot=f"{server.address}:{server.port}",
                address=server.address,
                port=server.port,
                state="ready" if server.weight else "drain",
                up=running.get(server.url, False),
                sessions=connections(pids, server.address, server.port),
                weight=server.weight,
            )
            for server in servers
        ]

    # -- changes

    def add(self, backend: str, address: str, port: int, timeout: float) -> str:
        server = Server(plain_address(address), port)
        tried = f"Adding {server.address}:{port} to backend {backend} of Traefik"
        deadline = time.monotonic() + timeout
        with self._lock:
            self._processes()
            await_listener(tried, server.address, port, timeout, deadline)
            before = self._read(backend)
            servers = tuple(server if one.is_at(server.address, port) else one for one in before)
            self._load(tried, backend, servers if server in servers else (*servers, server), deadline)
        return f"{server.address}:{port}"

    def drain(self, backend: str, address: str, port: int, timeout: float) -> DrainResult:
        address = plain_address(address)
        started = time.monotonic()
        with self._lock:
            before = self._read(backend)
            if not any(one.is_at(address, port) for one in before):
                return DrainResult(sessions_cut=0, waited=0.0)
            servers = tuple(replace(one, weight=0) if one.is_at(address, port) else one for one in before)
            self._load(f"Draining {address}:{port} of backend {backend}", backend, servers, started + CONFIRM_TIMEOUT)
        quiet = 0
        while True:
            left = connections(self._processes(), address, port)
            # Twice, since a request that was given to the server just before the drain is connected a moment later.
            quiet = quiet + 1 if left == 0 else 0
            waited = time.monotonic() - started
            if quiet >= 2 or (left and waited >= timeout):
                return DrainResult(sessions_cut=left, waited=round(waited, 3))
            time.sleep(POLL)

    def remove(self, backend: str, address: str, port: int) -> None:
        address = plain_address(address)
        with self._lock:
            before = self._read(backend)
            rest = tuple(one for one in before if not one.is_at(address, port))
            if rest != before:
                self._load(f"Removing {address}:{port} from backend {backend}", backend, rest, time.monotonic() + CONFIRM_TIMEOUT)

    def hold(self, project: str, what: str, timeout: float = 30.0) -> int:
        return hold_nothing(project, what, "Traefik cannot let requests wait")

    # -- the file

    def _path(self, backend: str) -> str:
        return os.path.join(self.directory, f"{known_name(backend)}.yml")

    def _read(self, backend: str) -> tuple[Server, ...]:
        path = self._path(backend)
        try:
            with open(path, encoding="utf-8") as handle:
                return servers_of(json.load(handle)["http"]["services"][backend])
        except FileNotFoundError:
            return ()
        except (OSError, ValueError, KeyError, TypeError) as exc:
            raise DeliveryError(
                f"Reading {path}", f"it is not what this collection has written: {exc}", "Move it away, under another name.", "cutover"
            ) from exc

    def _write(self, backend: str, servers: t.Sequence[Server]) -> None:
        path = self._path(backend)
        balancer = {"servers": [{"url": one.url, "weight": one.weight} for one in servers], "serversTransport": backend}
        content = {
            "http": {
                "services": {backend: {"loadBalancer": balancer}},
                # Less than none: the client library takes 0 for its own default.
                "serversTransports": {backend: {"maxIdleConnsPerHost": -1}},
            }
        }
        try:
            write_json(path, content, 0o644)
        except OSError as exc:
            raise DeliveryError(f"Writing {path}", exc.strerror or str(exc), "", "cutover") from exc

    # -- from the file into Traefik

    def _load(self, tried: str, backend: str, servers: tuple[Server, ...], deadline: float) -> None:
        """Make Traefik know ``servers``. What fails leaves the file as it was."""
        before = self._read(backend) if os.path.exists(self._path(backend)) else None
        if (before or ()) == servers and self._confirmed(backend, servers):
            return
        if before != servers:
            self._write(backend, servers)
        try:
            if not until(lambda: self._confirmed(backend, servers), deadline):
                raise DeliveryError(
                    tried,
                    "Traefik did not take the new file in time, so the old one is there again",
                    f"Look at its log: a broken file beside {self._path(backend)} stops all of that folder.",
                    "cutover",
                )
        except BaseException:
            if before is None:
                os.unlink(self._path(backend))
            else:
                self._write(backend, before)
            raise

    def _confirmed(self, backend: str, servers: t.Sequence[Server]) -> bool:
        wanted = {(one.url, one.weight) for one in servers}
        # Twice: the entry points are switched one right after the other, and the API's may be the first of them.
        return all({(one.url, one.weight) for one in self._running(backend) or ()} == wanted for dummy in range(2))

    def _running(self, backend: str) -> tuple[Server, ...] | None:
        """The servers as Traefik has them; ``None`` when it does not know the service."""
        service = self._ask(f"/api/http/services/{quote(known_name(backend))}@file")
        return None if service is None else servers_of(service)

    def _ask(self, path: str) -> t.Any:
        """What the API says; ``None`` when there is no such thing."""
        tried = f"Asking Traefik at {self.api}"
        parts = urlsplit(self.api)
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port or 80, timeout=ASK_TIMEOUT)
        try:
            connection.request("GET", parts.path + path, headers={"Connection": "close"})
            response = connection.getresponse()
            text = response.read()
            if response.status == 404 and b"not found" in text and text.startswith(b"{"):
                return None
            if response.status != 200:
                raise DeliveryError(tried, f"HTTP {response.status}", "Is edge.api the address of its API?", "cutover")
            return json.loads(text)
        except (OSError, http.client.HTTPException, ValueError) as exc:
            raise DeliveryError(
                tried, str(exc) or exc.__class__.__name__, "Does it run, and is edge.api the address of its API?", "cutover"
            ) from exc
        finally:
            connection.close()

    def _processes(self) -> list[int]:
        pids = named(PROGRAM)
        if not pids:
            seen = f"no process named {PROGRAM} runs on this host"
            raise DeliveryError("Looking for Traefik", seen, "Start it; it must run on the host of the containers.", "cutover")
        return pids


def servers_of(service: t.Mapping[str, t.Any]) -> tuple[Server, ...]:
    """The servers of a service, in a file or in the API's words."""
    status = service.get("serverStatus") or {}
    found = []
    for one in (service.get("loadBalancer") or {}).get("servers") or ():
        parts = urlsplit(one["url"])
        up = status.get(one["url"], "UP") == "UP"
        found.append(Server(plain_address(parts.hostname or ""), parts.port or 80, int(one.get("weight", 1)), up))
    return tuple(found)
