# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""HAProxy over its runtime socket: empty slots are filled and emptied, nothing is ever reloaded."""

from __future__ import annotations

import csv
import os
import re
import socket
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import write_atomically
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import (
    HOLDS,
    NAME,
    DrainResult,
    Figures,
    Upstream,
    known_name,
    plain_address,
)

#: Where an empty slot points; nothing listens there, so a slot enabled by mistake takes no request.
EMPTY = ("127.0.0.1", 1)
INFLIGHT_TABLE = "_delivery_inflight"

POLL = 0.02
SOCKET_TIMEOUT = 5.0

# Bits of srv_admin_state in `show servers state` (management.txt): forced, inherited, resolution and hostname maintenance; drain.
_MAINT = 0x01 | 0x02 | 0x20 | 0x40
_DRAIN = 0x08 | 0x10
# Of srv_check_state.
_CHECK_ENABLED = 0x04
#: Requests over which HAProxy's averages slide (TIME_STATS_SAMPLES).
SAMPLES = 512


@dataclass(frozen=True)
class Slot:
    """One server line of a backend: what the operator wants (``state``) and what the check has found."""

    name: str
    address: str
    port: int
    state: str
    running: bool
    weight: int
    given_weight: int
    sessions: int
    figures: Figures
    checked: bool
    check_health: int
    check_rise: int
    check_fall: int
    check_text: str

    @property
    def proven(self) -> bool:
        """A check has succeeded since the slot left maintenance; true where there is no check.

        Leaving maintenance, HAProxy sets the health to ``rise``, which counts as up without any check; the first success lifts it
        to ``rise + fall - 1``. So this number, and not ``UP``, tells an upstream that answered from one that was not asked yet.
        """
        return not self.checked or self.check_health >= self.check_rise + self.check_fall - 1

    @property
    def failure(self) -> str:
        """What the check found wrong; '' before a check has failed, when ``check_text`` may be of who was in the slot before."""
        return self.check_text if self.checked and self.check_health < self.check_rise else ""

    @property
    def filled(self) -> bool:
        return (self.address, self.port) != EMPTY

    def is_at(self, address: str, port: int) -> bool:
        return (self.address, self.port) == (address, port)

    def describe(self) -> str:
        text = f"{self.name} {self.address}:{self.port} {self.state}"
        return f"{text}, check: {self.failure}" if self.failure else text


class RuntimeSocket:
    """One question, one answer, one connection, as HAProxy wants it."""

    def __init__(self, target: str, timeout: float = SOCKET_TIMEOUT) -> None:
        self.target = target
        self.timeout = timeout

    def ask(self, command: str) -> str:
        """The answer to ``command`` without its closing newlines; ``DeliveryError(cutover)`` when HAProxy does not answer."""
        if "\n" in command or ";" in command:
            raise ValueError(f"not one command: {command!r}")
        try:
            with self._connect() as connection:
                connection.sendall(command.encode() + b"\n")
                chunks = []
                while True:
                    chunk = connection.recv(65536)
                    if not chunk:
                        break
                    chunks.append(chunk)
        except OSError as exc:
            raise DeliveryError(
                f"Asking HAProxy at {self.target}",
                str(exc.strerror or exc) or exc.__class__.__name__,
                "Is the edge running, and may this user use its socket?",
                "cutover",
            ) from exc
        answer = b"".join(chunks).decode(errors="replace").strip()
        if answer.startswith(("Unknown command", "Permission denied")):
            raise DeliveryError(
                f"Asking HAProxy at {self.target} to {' '.join(command.split()[:2])}",
                answer.splitlines()[0],
                "The socket must be of `level admin`, of HAProxy 2.6 or newer.",
                "cutover",
            )
        return answer

    def _connect(self) -> socket.socket:
        if self.target.startswith("/"):
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                connection.settimeout(self.timeout)
                connection.connect(self.target)
            except BaseException:
                connection.close()
                raise
            return connection
        host, _colon, port = self.target.rpartition(":")
        return socket.create_connection((host.strip("[]"), int(port)), timeout=self.timeout)


class HAProxyEdge:
    """See ``Edge``. A backend's slots are its server lines; an empty slot is in maintenance and points at ``EMPTY``."""

    def __init__(self, target: str, hold_map: str = "") -> None:
        if not target.startswith("/") and not re.fullmatch(r".+:\d{1,5}", target):
            raise DeliveryError("edge.socket", f"{target!r} is neither an absolute path nor host:port")
        self.socket = RuntimeSocket(target)
        self.hold_map = hold_map

    # -- what is there

    def check(self, backend: str) -> None:
        try:
            self._slots(backend)
        except DeliveryError as exc:
            raise DeliveryError(exc.tried, exc.seen, exc.remedy, "config") from exc

    def upstreams(self, backend: str) -> list[Upstream]:
        return [
            Upstream(
                slot=slot.name,
                address=slot.address,
                port=slot.port,
                state=slot.state,
                up=slot.running,
                sessions=slot.sessions,
                weight=slot.weight,
            )
            for slot in self._slots(backend)
            if slot.filled
        ]

    # -- changes

    def add(self, backend: str, address: str, port: int, timeout: float, weight: int = 0) -> str:
        address = plain_address(address)
        tried = f"Adding {address}:{port} to backend {backend} of the edge"
        deadline = time.monotonic() + timeout
        slots = self._slots(backend)
        here = sorted((slot for slot in slots if slot.is_at(address, port)), key=lambda slot: slot.state == "maint")
        if here and here[0].state == "ready" and here[0].running and here[0].proven:
            self._keep()
            return here[0].name
        if here:
            name, fresh = here[0].name, here[0].state == "maint"
        else:
            name, fresh = self._free(slots, tried), True
        if fresh:
            self._set(backend, name, f"addr {address} port {port}")
            self._set(backend, name, f"weight {weight or '100%'}")
            if not self._slot(backend, name).is_at(address, port):
                raise DeliveryError(tried, f"HAProxy did not take the address into slot {name}", "Look at its log.", "cutover")
        try:
            if here and here[0].state == "ready":
                slot = self._until(backend, name, deadline, lambda slot: slot.running and slot.proven)
            else:
                # In drain the check runs and no request comes: an upstream that is not there is never given one.
                self._set(backend, name, "state drain")
                slot = self._until(backend, name, deadline, lambda slot: slot.state == "drain" and slot.proven)
                if slot and slot.checked and slot.check_fall < 2:
                    raise DeliveryError(
                        tried,
                        "the backend's health check has `fall 1`, with which HAProxy does not tell a proven upstream from a new one",
                        "Give it `fall 2` or more; the role edge does.",
                    )
                if slot:
                    self._set(backend, name, "state ready")
                    slot = self._until(
                        backend, name, deadline + SOCKET_TIMEOUT, lambda slot: slot.state == "ready" and slot.running and slot.weight > 0
                    )
            if slot:
                self._keep()
                return name
            last = self._slot(backend, name)
        except BaseException:
            self._empty_quietly(backend, name)
            raise
        self._empty(backend, name)
        raise DeliveryError(
            tried,
            f"not up within {timeout:g} s, so slot {name} is empty again; HAProxy's check says: {last.failure or 'nothing yet'}",
            "The edge must reach the container's address, and the route's ready path must answer it.",
            "cutover",
        )

    def drain(self, backend: str, address: str, port: int, timeout: float) -> DrainResult:
        address = plain_address(address)
        started = time.monotonic()
        here = [slot for slot in self._slots(backend) if slot.is_at(address, port)]
        for slot in here:
            if slot.state == "ready":
                self._set(backend, slot.name, "state drain")
                if not self._until(backend, slot.name, started + SOCKET_TIMEOUT, lambda slot: slot.state != "ready" and slot.weight == 0):
                    raise DeliveryError(
                        f"Draining {address}:{port} of backend {backend}", "HAProxy did not take it", "Look at its log.", "cutover"
                    )
        self._keep()
        names = {slot.name for slot in here}
        quiet = 0
        while True:
            left = sum(slot.sessions for slot in self._slots(backend) if slot.name in names) if names else 0
            # Twice, since a request that was given to the server just before the drain is counted a moment later.
            quiet = quiet + 1 if left == 0 else 0
            waited = time.monotonic() - started
            if quiet >= 2 or not names:
                return DrainResult(sessions_cut=0, waited=round(waited, 3))
            if waited >= timeout and left:
                return DrainResult(sessions_cut=left, waited=round(waited, 3))
            time.sleep(POLL)

    def remove(self, backend: str, address: str, port: int) -> None:
        address = plain_address(address)
        for slot in self._slots(backend):
            if slot.is_at(address, port):
                self._empty(backend, slot.name)
        self._keep()

    def weigh(self, backend: str, weights: t.Mapping[tuple[str, int], int]) -> None:
        wanted = {(plain_address(address), port): weight for (address, port), weight in weights.items()}
        for slot in self._slots(backend):
            weight = wanted.get((slot.address, slot.port))
            if weight is None or slot.state == "maint":
                continue
            self._set(backend, slot.name, f"weight {'100%' if weight < 0 else weight}")
            if weight >= 0 and self._slot(backend, slot.name).given_weight != weight:
                tried = f"Weighing {slot.describe()} of backend {backend}"
                raise DeliveryError(tried, "HAProxy did not take it", "Look at its log.", "cutover")
        self._keep()

    def figures(self, backend: str) -> dict[tuple[str, int], Figures]:
        return {(slot.address, slot.port): slot.figures for slot in self._slots(backend) if slot.filled}

    def hold(self, project: str, what: str, timeout: float = 30.0) -> int:
        tried = f"Setting the hold of {project} at the edge to {what}"
        if what not in HOLDS:
            raise DeliveryError(tried, f"known are {', '.join(HOLDS)}")
        if not NAME.fullmatch(project):
            raise DeliveryError(tried, f"{project!r} is not a project name")
        path = self._hold_map()
        if path is None:
            if what == "off":
                return 0  # where nothing can be held, nothing is
            seen = f"HAProxy has no map {self.hold_map or 'hold.map'}"
            raise DeliveryError(tried, seen, "The role edge puts it there; run the playbook setup.")
        present = self._holds(path).get(project)
        if what == "off":
            if present is not None:
                self._change(tried, f"del map {path} {project}")
        elif present is None:
            self._change(tried, f"add map {path} {project} {what}")
        elif present != what:
            self._change(tried, f"set map {path} {project} {what}")
        if self._holds(path).get(project, "off") != what:
            raise DeliveryError(tried, "HAProxy did not take it", "Look at its log.", "cutover")
        self._keep(path)
        if what == "off":
            return 0
        deadline = time.monotonic() + timeout
        quiet = 0
        while True:
            left = self._inflight(tried, project if what == "all" else f"{project}:writes")
            quiet = quiet + 1 if left == 0 else 0
            if quiet >= 2 or (left and time.monotonic() >= deadline):
                return left
            time.sleep(POLL)

    # -- the socket's language

    def _slots(self, backend: str) -> list[Slot]:
        tried = f"Looking at backend {known_name(backend)} of the edge"
        states = parse_servers_state(self._table(tried, f"show servers state {backend}", backend))
        stats = parse_stat(self._table(tried, f"show stat {backend} 4 -1", backend))
        return [merge(state, stats.get(state["srv_name"], {})) for state in states]

    def _table(self, tried: str, command: str, backend: str) -> str:
        answer = self.socket.ask(command)
        if "Can't find backend" in answer or "No such proxy" in answer or not answer:
            raise DeliveryError(
                tried,
                f"HAProxy has no backend {backend}",
                "Its name is <project>-<service>: add the service to the routes and run the playbook setup (role edge).",
                "cutover",
            )
        return answer

    def _slot(self, backend: str, name: str) -> Slot:
        for slot in self._slots(backend):
            if slot.name == name:
                return slot
        tried = f"Looking at backend {backend} of the edge"
        raise DeliveryError(tried, f"slot {name} is gone", "Was the edge changed meanwhile?", "cutover")

    def _until(self, backend: str, name: str, deadline: float, true: t.Callable[[Slot], bool]) -> Slot | None:
        """The slot as soon as ``true`` holds for it, asked at least once; ``None`` when it did not before ``deadline``."""
        while True:
            slot = self._slot(backend, name)
            if true(slot):
                return slot
            if time.monotonic() >= deadline:
                return None
            time.sleep(POLL)

    def _set(self, backend: str, name: str, what: str) -> None:
        answer = self.socket.ask(f"set server {backend}/{name} {what}")
        # `addr` tells what it changed; everything else is silent unless it failed.
        if answer and not (what.startswith("addr") and ("changed" in answer or "no need to change" in answer)):
            raise DeliveryError(f"Setting {what} on slot {name} of backend {backend}", f"HAProxy says: {answer}", "", "cutover")

    def _free(self, slots: t.Sequence[Slot], tried: str) -> str:
        """An empty slot; else one that is in maintenance, as a run that was killed may have left it."""
        free = [slot for slot in slots if slot.state == "maint"]
        if not free:
            raise DeliveryError(
                tried,
                f"all {len(slots)} slots are in use ({'; '.join(slot.describe() for slot in slots)})",
                "Empty one: `set server <backend>/<slot> state maint` on the edge's socket.",
                "cutover",
            )
        return min(free, key=lambda slot: (slot.sessions > 0, slot.filled)).name

    def _empty(self, backend: str, name: str) -> None:
        self._set(backend, name, "state maint")
        self._set(backend, name, f"addr {EMPTY[0]} port {EMPTY[1]}")
        slot = self._slot(backend, name)
        if slot.state != "maint" or slot.filled:
            raise DeliveryError(
                f"Emptying slot {name} of backend {backend}", f"HAProxy still has {slot.describe()}", "Look at its log.", "cutover"
            )

    def _empty_quietly(self, backend: str, name: str) -> None:
        """Take out what failed half way; the first error is the one worth telling."""
        try:
            self._empty(backend, name)
        except DeliveryError:
            pass

    def _keep(self, hold_map: str = "") -> None:
        """Write down what HAProxy knows, where it will read it again: a crash must not bring back the upstreams of last week.

        A safety copy: the change is made and acknowledged, so a full disk does not undo it, and the next change writes again.
        """
        answer = self.socket.ask("show env EDGE_STATE_FILE")
        path = answer.partition("=")[2]
        if not self.socket.target.startswith("/") or not os.path.isabs(path):
            return
        try:
            write_atomically(path, self.socket.ask("show servers state") + "\n")
            if hold_map:
                write_atomically(hold_map, "".join(f"{key} {value}\n" for key, value in sorted(self._holds(hold_map).items())))
        except OSError:
            pass

    # -- hold

    def _hold_map(self) -> str | None:
        """The map file as HAProxy names it: the given one, else the one that is called ``hold.map``."""
        paths = re.findall(r"^-?\d+ \((.+?)\)", self.socket.ask("show map"), re.MULTILINE)
        for path in paths:
            if path == self.hold_map or (not self.hold_map and path.rsplit("/", 1)[-1] == "hold.map"):
                return path
        return None

    def _holds(self, path: str) -> dict[str, str]:
        entries = (line.split() for line in self.socket.ask(f"show map {path}").splitlines())
        return {parts[1]: parts[2] for parts in entries if len(parts) == 3}

    def _change(self, tried: str, command: str) -> None:
        answer = self.socket.ask(command)
        if answer:
            raise DeliveryError(tried, f"HAProxy says: {answer}", "", "cutover")

    def _inflight(self, tried: str, key: str) -> int:
        answer = self.socket.ask(f"show table {INFLIGHT_TABLE} key {key}")
        if answer and not answer.startswith("# table:"):
            raise DeliveryError(tried, f"HAProxy does not count requests under way: {answer}", "Run the playbook setup (role edge) again.")
        return sum(int(number) for number in re.findall(r"\bconn_cur=(\d+)", answer))


def parse_servers_state(text: str) -> list[dict[str, str]]:
    """The lines of ``show servers state``: version, ``# names``, one line of values a server."""
    lines = [line for line in text.splitlines() if line.strip()]
    head = next((line for line in lines if line.startswith("#")), "")
    names = head.lstrip("# ").split()
    if "srv_admin_state" not in names:
        raise DeliveryError("Reading `show servers state`", f"unknown form: {text[:120]!r}", "HAProxy 2.6 or newer is needed.", "cutover")
    return [dict(zip(names, line.split())) for line in lines[lines.index(head) + 1 :]]


def parse_stat(text: str) -> dict[str, dict[str, str]]:
    """The CSV of ``show stat``, by server name."""
    rows = csv.DictReader(text.lstrip("# ").splitlines())
    return {row["svname"]: row for row in rows if row.get("svname")}


def merge(state: t.Mapping[str, str], stat: t.Mapping[str, str]) -> Slot:
    """One slot out of its line in ``show servers state`` and its line in ``show stat``."""
    admin = int(state["srv_admin_state"])
    return Slot(
        name=state["srv_name"],
        # A server that has only a name has no address yet.
        address=state["srv_addr"] if state["srv_addr"] == "-" else plain_address(state["srv_addr"]),
        port=int(state["srv_port"]),
        state="maint" if admin & _MAINT else "drain" if admin & _DRAIN else "ready",
        running=int(state["srv_op_state"]) == 2 and not admin & _MAINT,
        weight=0 if admin & (_MAINT | _DRAIN) else int(state["srv_uweight"]),
        given_weight=int(state["srv_uweight"]),
        sessions=int(stat.get("scur") or 0),
        figures=figures_of(stat),
        checked=bool(int(state["srv_check_state"]) & _CHECK_ENABLED),
        check_health=int(state["srv_check_health"]),
        check_rise=int(stat.get("check_rise") or 0),
        check_fall=int(stat.get("check_fall") or 0),
        check_text=" ".join(stat[key] for key in ("check_status", "check_code", "check_desc", "last_chk") if stat.get(key)),
    )


def figures_of(stat: t.Mapping[str, str]) -> Figures:
    """What the line of a server in ``show stat`` counts. Its average time is over all its requests, at most over the last ``SAMPLES``."""

    def number(*keys: str) -> int:
        return sum(int(stat.get(key) or 0) for key in keys)

    requests = number("req_tot") or number("hrsp_1xx", "hrsp_2xx", "hrsp_3xx", "hrsp_4xx", "hrsp_5xx", "hrsp_other")
    return Figures(
        requests=requests,
        errors=number("hrsp_5xx", "econ", "eresp"),
        busy=number("rtime") / 1000 * min(requests, SAMPLES),
        window=SAMPLES,
    )
