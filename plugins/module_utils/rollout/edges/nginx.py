# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""nginx, for who already has it: one include file a backend, tested, loaded by a reload, and seen in every worker.

nginx has no door through which a running configuration could be asked. But each worker keeps the log files open that its
configuration names, from its start to its end. So each change of a backend names a log of its own, its generation, and the
kernel tells which worker knows what: whether all that accept requests know the change, and whether one is left that does not.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import signal
import threading
import time
from dataclasses import dataclass, replace

from ansible_collections.selfhost.delivery.plugins.module_utils.command import CommandResult, run
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import write_atomically
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
    children,
    connections,
    open_files,
    title,
    until,
)

#: What stands in a backend without upstreams, since nginx takes no empty one; `down`, so it is never asked.
EMPTY = "127.0.0.1:1"
COMMAND_TIMEOUT = 30.0
CONFIRM_TIMEOUT = 20.0
ASK_TIMEOUT = 2.0
#: From here on nginx keeps idle connections to upstreams unless it is told not to; before, it does not know this line.
KEEPS_IDLE = (1, 29, 7)

_GENERATION = re.compile(r"^# generation (\d+)$", re.MULTILINE)
_SERVER = re.compile(r"server\s+(\S+):(\d{1,5})(\s+down)?")


@dataclass(frozen=True)
class Server:
    address: str
    port: int
    down: bool = False

    @property
    def shown(self) -> str:
        return f"[{self.address}]:{self.port}" if ":" in self.address else f"{self.address}:{self.port}"

    def is_at(self, address: str, port: int) -> bool:
        return (self.address, self.port) == (address, port)


@dataclass(frozen=True)
class Block:
    """What an include file says. ``generation`` grows with every change that nginx has to load; 0: not written by us yet."""

    servers: tuple[Server, ...] = ()
    generation: int = 0


class NginxEdge:
    """See ``Edge``. What is drained stays in the file as `down` until it is removed."""

    def __init__(
        self,
        directory: str = "/etc/nginx/delivery",
        pid_file: str = "/run/nginx.pid",
        program: str = "nginx",
        config: str = "",
        confirm: str = "127.0.0.1:8399",
    ) -> None:
        for key, path in (("directory", directory), ("pid_file", pid_file), ("config", config)):
            if path and not os.path.isabs(path):
                raise DeliveryError(f"edge.{key}", f"{path!r} is no absolute path")
        host, _colon, port = confirm.rpartition(":")
        if not host or not port.isdigit():
            raise DeliveryError("edge.confirm", f"{confirm!r} is not address:port")
        # What a process has open is told without symbolic links.
        self.directory = os.path.realpath(directory)
        self.pid_file = pid_file
        self.command = [program, *(("-c", config) if config else ())]
        self.confirm = Server(plain_address(host.strip("[]")), int(port))
        # Several upstreams of a backend are drained side by side.
        self._lock = threading.RLock()
        self._keeps_idle: bool | None = None

    # -- what is there

    def check(self, backend: str) -> None:
        tried = f"Looking at backend {backend} of nginx"
        try:
            self._read(backend)
            self._workers()
        except DeliveryError as exc:
            raise DeliveryError(exc.tried, exc.seen, exc.remedy, "config") from exc
        dump = self._run(tried, "-T")
        if not dump.ok:
            raise DeliveryError(tried, f"its configuration is not good: {dump.last_lines(3)}", "Mend it until `nginx -t` is content.")
        files = re.findall(r"^# configuration file (.+):$", dump.stdout, re.MULTILINE)
        if self._path(backend) not in [os.path.realpath(file) for file in files]:
            raise DeliveryError(
                tried,
                f"its configuration does not include {self._path(backend)}",
                f"Write `include {self.directory}/*.conf;` into its block http.",
            )

    def upstreams(self, backend: str) -> list[Upstream]:
        servers, workers = self._read(backend).servers, self._workers()
        return [
            Upstream(
                slot=server.shown,
                address=server.address,
                port=server.port,
                state="drain" if server.down else "ready",
                up=True,
                sessions=connections(workers, server.address, server.port),
                weight=0 if server.down else 1,
            )
            for server in servers
        ]

    # -- changes

    def add(self, backend: str, address: str, port: int, timeout: float) -> str:
        server = Server(plain_address(address), port)
        tried = f"Adding {server.shown} to backend {backend} of nginx"
        deadline = time.monotonic() + timeout
        with self._lock:
            block = self._read(backend)
            self._workers()
            await_listener(tried, server.address, port, timeout, deadline)
            there = any(one.is_at(server.address, port) for one in block.servers)
            servers = tuple(server if one.is_at(server.address, port) else one for one in block.servers)
            self._load(tried, backend, block, servers if there else (*servers, server), deadline)
        return server.shown

    def drain(self, backend: str, address: str, port: int, timeout: float) -> DrainResult:
        address = plain_address(address)
        started = time.monotonic()
        with self._lock:
            block = self._read(backend)
            if not any(one.is_at(address, port) for one in block.servers):
                return DrainResult(sessions_cut=0, waited=0.0)
            servers = tuple(replace(one, down=True) if one.is_at(address, port) else one for one in block.servers)
            tried = f"Draining {address}:{port} of backend {backend}"
            generation = self._load(tried, backend, block, servers, started + CONFIRM_TIMEOUT)
        while True:
            # Not only what is connected: a worker that knows the upstream may be receiving a request that it will pass there.
            workers = self._workers()
            old = [pid for pid in workers if self._generation_of(pid, backend) < generation]
            left = connections(workers, address, port)
            waited = time.monotonic() - started
            if (not old and not left) or waited >= timeout:
                return DrainResult(sessions_cut=left, waited=round(waited, 3))
            time.sleep(POLL)

    def remove(self, backend: str, address: str, port: int) -> None:
        address = plain_address(address)
        with self._lock:
            block = self._read(backend)
            here = [one for one in block.servers if one.is_at(address, port)]
            if not here:
                return
            rest = tuple(one for one in block.servers if one not in here)
            if all(one.down for one in here) and self._confirmed(backend, block.generation):
                # To nginx it is the same with and without a server that is down: nothing to load, so no connection to close.
                self._write(backend, self._render(backend, replace(block, servers=rest)))
                return
            self._load(f"Removing {address}:{port} from backend {backend}", backend, block, rest, time.monotonic() + CONFIRM_TIMEOUT)

    def hold(self, project: str, what: str, timeout: float = 30.0) -> int:
        return hold_nothing(project, what, "nginx cannot let requests wait")

    # -- the include file

    def _path(self, backend: str) -> str:
        return os.path.join(self.directory, f"{known_name(backend)}.conf")

    def _mark(self, backend: str, generation: int) -> str:
        """The log that only workers of this generation, and later ones that changed nothing of it, have open."""
        return os.path.join(self.directory, f"{backend}.{generation}.generation")

    def _read(self, backend: str) -> Block:
        path = self._path(backend)
        try:
            with open(path, encoding="utf-8") as handle:
                return parse(path, handle.read(), backend)
        except FileNotFoundError:
            raise DeliveryError(
                f"Looking at backend {backend} of nginx",
                f"there is no {path}",
                f"Begin it with: upstream {backend} {{ server {EMPTY} down; }}",
                "cutover",
            ) from None
        except OSError as exc:
            raise DeliveryError(f"Reading {path}", exc.strerror or str(exc), "", "cutover") from exc

    def _render(self, backend: str, block: Block) -> str:
        lines = [f"    server {one.shown}{' down' if one.down else ''};" for one in block.servers] or [f"    server {EMPTY} down;"]
        if self._keeps_idle is None:
            version = re.search(r"nginx/(\d+)\.(\d+)\.(\d+)", self._run("Asking nginx for its version", "-v").stderr)
            self._keeps_idle = version is not None and tuple(int(part) for part in version.groups()) >= KEEPS_IDLE
        if self._keeps_idle:
            lines.append("    keepalive 0;")
        return TEMPLATE.format(
            backend=backend,
            generation=block.generation,
            lines="\n".join(lines),
            confirm=self.confirm.shown,
            mark=self._mark(backend, block.generation),
        )

    def _write(self, backend: str, text: str) -> None:
        path = self._path(backend)
        try:
            write_atomically(path, text, 0o644)
        except OSError as exc:
            raise DeliveryError(f"Writing {path}", exc.strerror or str(exc), "", "cutover") from exc

    # -- from the file into the workers

    def _load(self, tried: str, backend: str, block: Block, servers: tuple[Server, ...], deadline: float) -> int:
        """Make nginx know ``servers``; the generation that does. What fails leaves file and workers as they were."""
        if servers == block.servers and self._confirmed(backend, block.generation):
            return block.generation
        with open(self._path(backend), encoding="utf-8") as handle:
            before = handle.read()
        # Later than every other, also than those of a file that was lost.
        after = Block(servers, max(block.generation + 1, time.time_ns()))
        rendered, signalled = self._render(backend, after), False
        self._write(backend, rendered)
        try:
            test = self._run(tried, "-t")
            if not test.ok:
                raise DeliveryError(
                    tried,
                    f"nginx refuses the configuration, so nothing was changed: {test.last_lines(3)}",
                    "Mend it until `nginx -t` is content.",
                    "cutover",
                )
            self._reload(tried)
            signalled = True
            if not until(lambda: self._confirmed(backend, after.generation), deadline):
                raise DeliveryError(
                    tried,
                    "its workers did not take the new configuration in time, so the old one is there again",
                    f"Look at its error log. Is {self.confirm.shown} (edge.confirm) free?",
                    "cutover",
                )
        except BaseException:
            self._write(backend, before)
            if signalled:
                with contextlib.suppress(DeliveryError):  # the first error is the one worth telling
                    self._reload(tried)
            self._sweep(backend, block.generation)
            raise
        self._sweep(backend, after.generation)
        return after.generation

    def _run(self, tried: str, option: str) -> CommandResult:
        try:
            return run([*self.command, option], timeout=COMMAND_TIMEOUT)
        except OSError as exc:
            raise DeliveryError(tried, f"{self.command[0]} does not run: {exc.strerror}", "Set edge.program to nginx's path.") from exc

    def _reload(self, tried: str) -> None:
        try:
            os.kill(self._master(), signal.SIGHUP)
        except OSError as exc:
            raise DeliveryError(tried, f"nginx could not be told to reload: {exc.strerror}", "Become root.", "cutover") from exc

    def _master(self) -> int:
        seen = f"{self.pid_file} names no nginx that runs"
        try:
            with open(self.pid_file, encoding="utf-8") as handle:
                pid = int(handle.read())
            if title(pid).startswith("nginx: master process"):
                return pid
        except (OSError, ValueError) as exc:
            seen += f": {exc}"
        raise DeliveryError("Looking for nginx", seen, "Start it, or set edge.pid_file to the path that its `pid` names.", "cutover")

    def _workers(self) -> list[int]:
        """All workers, those that are shutting down too. One that was just forked still has the title of its master."""
        return [pid for pid in children(self._master()) if not title(pid).startswith("nginx: cache")]

    def _generation_of(self, pid: int, backend: str) -> int:
        """What the worker knows of the backend; -1 when it was there before the backend was."""
        mark = re.compile(re.escape(f"{self.directory}/{backend}.") + r"(\d+)\.generation(?: \(deleted\))?")
        found = [int(match.group(1)) for match in map(mark.fullmatch, open_files(pid)) if match]
        return max(found, default=-1)

    def _confirmed(self, backend: str, generation: int) -> bool:
        """Every worker that accepts requests knows this generation, and one of them has answered with it."""
        accepting = []
        for pid in self._workers():
            known, called = self._generation_of(pid, backend), title(pid)
            # Read after its files: a worker first takes this title and then, before anything else, stops accepting.
            if called and "shutting down" not in called:
                accepting.append(known)
        return bool(accepting) and set(accepting) == {generation} and self._answer(backend) == f"{backend} {generation}"

    def _answer(self, backend: str) -> str:
        connection = http.client.HTTPConnection(self.confirm.address, self.confirm.port, timeout=ASK_TIMEOUT)
        try:
            connection.request("GET", "/", headers={"Host": backend, "Connection": "close"})
            return connection.getresponse().read(1000).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException):
            return ""
        finally:
            connection.close()

    def _sweep(self, backend: str, generation: int) -> None:
        """Remove the logs of other generations; who still has one open keeps it. Left ones are only clutter."""
        for name in os.listdir(self.directory):
            if re.fullmatch(re.escape(backend) + r"\.\d+\.generation", name) and name != os.path.basename(self._mark(backend, generation)):
                with contextlib.suppress(OSError):
                    os.unlink(os.path.join(self.directory, name))


#: The server is where a generation can be asked for and where its log is named; nothing is ever written to that log.
TEMPLATE = """\
# Written at each release and overwritten at the next one.
# generation {generation}
upstream {backend} {{
{lines}
}}
server {{
    listen {confirm};
    server_name {backend};
    access_log off;
    error_log {mark} emerg;
    default_type text/plain;
    return 200 "{backend} {generation}\\n";
}}
"""


def parse(path: str, text: str, backend: str) -> Block:
    """Read an include file; ``DeliveryError`` when it says what would be lost with the next change."""
    tried = f"Reading {path}"
    body = re.search(rf"\bupstream\s+{re.escape(backend)}\s*\{{([^{{}}]*)\}}", re.sub(r"#.*", "", text))
    if not body:
        raise DeliveryError(tried, f"it has no `upstream {backend}`", f"Write: upstream {backend} {{ server {EMPTY} down; }}", "cutover")
    servers: list[Server] = []
    for statement in (" ".join(part.split()) for part in body.group(1).split(";")):
        match = _SERVER.fullmatch(statement)
        if match and f"{match.group(1)}:{match.group(2)}" != EMPTY:
            servers.append(Server(plain_address(match.group(1).strip("[]")), int(match.group(2)), bool(match.group(3))))
        elif not match and statement not in ("", "keepalive 0"):
            raise DeliveryError(
                tried, f"`{statement};` would be lost, since the file is written anew with each change", "Take it out.", "cutover"
            )
    generation = _GENERATION.search(text)
    return Block(tuple(servers), int(generation.group(1)) if generation else 0)
