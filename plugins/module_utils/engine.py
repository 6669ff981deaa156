# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The Docker Engine API over its Unix socket, as far as a release needs it.

One short connection a call: safe from several threads, and nothing to mend after an engine restart.
Paths carry no API version: engines drop old ones, and the fields read here have kept their meaning since 20.10.
"""

from __future__ import annotations

import codecs
import datetime
import http.client
import json
import re
import socket
import struct
import time
import typing as t
from urllib.parse import quote, urlencode

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

DEFAULT_SOCKET = "/var/run/docker.sock"

#: Bytes kept of what a program in a container says.
OUTPUT_LIMIT = 16 * 1024 * 1024

PROJECT_LABEL = "com.docker.compose.project"
SERVICE_LABEL = "com.docker.compose.service"
ONEOFF_LABEL = "com.docker.compose.oneoff"
HASH_LABEL = "com.docker.compose.config-hash"


class EngineError(DeliveryError):
    """The engine answered, and refused. ``status`` is its HTTP status, ``reason`` its own words."""

    def __init__(self, tried: str, status: int, reason: str, remedy: str = "", failure_class: str = "cutover") -> None:
        self.status = status
        self.reason = reason
        super().__init__(tried, f"the Docker engine answered {status}: {reason}", remedy, failure_class)


class EngineNotFound(EngineError):
    """No such container, image, volume or network."""


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.settimeout(self.timeout)
        try:
            connection.connect(self._path)
        except BaseException:
            connection.close()
            raise
        self.sock = connection


class Engine:
    """A Docker engine. ``timeout`` (seconds) bounds each answer; calls that wait add what they wait for.

    Every method raises ``DeliveryError`` (``transport``) when nothing answers on the socket, and
    ``EngineError`` when the engine refuses.
    """

    def __init__(self, socket: str = DEFAULT_SOCKET, timeout: float = 60.0) -> None:  # pylint: disable=redefined-outer-name
        self.socket = socket[len("unix://") :] if socket.startswith("unix://") else socket
        self.timeout = timeout

    # -- the engine itself

    def version(self) -> dict[str, t.Any]:
        """``GET /version``: ``Version``, ``ApiVersion``, ``Os``, ``Arch`` (as in images: amd64, arm64) …"""
        return self._json("GET", "/version", tried="Asking the Docker engine for its version")

    def info(self) -> dict[str, t.Any]:
        """``GET /info``: ``DockerRootDir``, ``Architecture``, ``NCPU`` …"""
        return self._json("GET", "/info", tried="Asking the Docker engine about its host")

    # -- containers

    def containers(self, labels: t.Mapping[str, str | None] | None = None, all: bool = True) -> list[dict[str, t.Any]]:
        """Containers that carry all ``labels`` (value ``None``: any value), as ``GET /containers/json`` lists them.

        ``all``: also those that do not run.
        """
        wanted = [key if value is None else f"{key}={value}" for key, value in (labels or {}).items()]
        query = {"all": "1" if all else "0", "filters": json.dumps({"label": wanted} if wanted else {})}
        return self._json("GET", "/containers/json", query, tried="Listing containers")

    def inspect(self, container: str) -> dict[str, t.Any]:
        """``GET /containers/<id>/json``; ``EngineNotFound`` when it is gone."""
        return self._json("GET", f"/containers/{quote(container)}/json", tried=f"Inspecting container {short_id(container)}")

    def start(self, container: str) -> bool:
        """Start it; ``False`` when it already ran."""
        return self._change(container, "start", "Starting")

    def stop(self, container: str, timeout: float | None = None, otherwise: float = 10) -> bool:
        """SIGTERM (or its stop signal), SIGKILL after ``timeout`` seconds; ``False`` when it did not run.

        Without ``timeout`` the container's own counts (Compose: ``stop_grace_period``), where it has one, or ``otherwise``.
        """
        if timeout is None:
            own = self.inspect(container)["Config"].get("StopTimeout")
            timeout = otherwise if own is None else own
        return self._change(container, "stop", "Stopping", {"t": str(int(timeout))}, extra=timeout + 30)

    def kill(self, container: str, signal: str = "SIGKILL") -> bool:
        """Send ``signal``; ``False`` when it did not run."""
        try:
            return self._change(container, "kill", "Killing", {"signal": signal})
        except EngineError as exc:
            if exc.status == 409:
                return False
            raise

    def pause(self, container: str) -> bool:
        """Freeze its processes; ``False`` when it is paused already."""
        return self._change(container, "pause", "Pausing", accept="already paused")

    def unpause(self, container: str) -> bool:
        """Thaw it; ``False`` when it was not paused."""
        return self._change(container, "unpause", "Unpausing", accept="is not paused")

    def remove(self, container: str, force: bool = False, volumes: bool = False) -> bool:
        """Remove it; ``volumes``: its anonymous volumes too. ``False`` when it was gone (or is just going)."""
        query = {"force": "1" if force else "0", "v": "1" if volumes else "0"}
        tried = f"Removing container {short_id(container)}"
        try:
            self._call("DELETE", f"/containers/{quote(container)}", query, tried=tried)
        except EngineNotFound:
            return False
        except EngineError as exc:
            if exc.status == 409 and "already in progress" in exc.reason:
                return False
            raise
        return True

    def rename(self, container: str, name: str) -> None:
        """Give it another name; ``EngineError`` 409 when the name is taken."""
        self._change(container, "rename", f"Renaming to {name}", {"name": name})

    def set_restart_policy(self, container: str, policy: t.Mapping[str, t.Any]) -> None:
        """``policy`` as in ``HostConfig.RestartPolicy``: ``{"Name": "always", "MaximumRetryCount": 0}``."""
        tried = f"Setting the restart policy of container {short_id(container)}"
        body = {"RestartPolicy": {"Name": policy.get("Name") or "no", "MaximumRetryCount": policy.get("MaximumRetryCount") or 0}}
        self._call("POST", f"/containers/{quote(container)}/update", body=body, tried=tried)

    def wait(self, container: str, timeout: float) -> int:
        """Wait until it does not run; its exit code. ``TimeoutError`` after ``timeout`` seconds."""
        tried = f"Waiting for container {short_id(container)} to end"
        try:
            answer = self._json("POST", f"/containers/{quote(container)}/wait", {"condition": "not-running"}, tried=tried, bound=timeout)
        except _TimedOut as exc:
            raise TimeoutError(f"{tried}: still running after {timeout:g} s") from exc
        return int(answer["StatusCode"])

    def logs(self, container: str, tail: int = 20) -> str:
        """Its last ``tail`` lines, standard output and error in the order they came; '' when its log driver keeps none."""
        tried = f"Reading the log of container {short_id(container)}"
        query = {"stdout": "1", "stderr": "1", "tail": str(tail)}
        try:
            raw = self._call("GET", f"/containers/{quote(container)}/logs", query, tried=tried)[1]
        except EngineNotFound:
            raise
        except EngineError:
            return ""
        # A container with a terminal has one plain stream, others are framed; the frame header tells which.
        lines = _text(raw).splitlines()
        return "\n".join(lines[-tail:])

    def follow(self, container: str, since: str = "", tty: bool = False) -> LogStream:
        """Its log after ``since`` (a time as the engine writes it; '': all of it), and on as it is written. ``tty``: its ``Config.Tty``."""
        query = {"stdout": "1", "stderr": "1", "follow": "1", "since": f"{max(moment(since), 0):.6f}" if since else "0"}
        tried = f"Reading the log of container {short_id(container)}"
        connection = _UnixConnection(self.socket, self.timeout)
        try:
            connection.connect()
            # In HTTP/1.0 the answer is the log as it is, without chunks, until somebody closes.
            connection.sock.sendall(f"GET /containers/{quote(container)}/logs?{urlencode(query)} HTTP/1.0\r\nHost: docker\r\n\r\n".encode())
        except OSError as exc:
            connection.close()
            raise self._silent(tried, str(exc) or type(exc).__name__) from exc
        return LogStream(connection.sock, tried, tty)

    def exec(self, container: str, argv: t.Sequence[str], timeout: float | None = None) -> tuple[int, str]:
        """Run ``argv`` in the container; exit code and output (both streams). ``TimeoutError`` after ``timeout`` seconds.

        The engine cannot end an exec from outside: after a timeout the program may still run.
        """
        tried = f"Running {argv[0] if argv else 'nothing'} in container {short_id(container)}"
        created = self._json(
            "POST",
            f"/containers/{quote(container)}/exec",
            body={"AttachStdout": True, "AttachStderr": True, "Cmd": list(argv)},
            tried=tried,
        )
        bound = timeout if timeout is not None else self.timeout
        try:
            raw = self._call("POST", f"/exec/{created['Id']}/start", body={"Detach": False, "Tty": False}, tried=tried, bound=bound)[1]
        except _TimedOut as exc:
            raise TimeoutError(f"{tried}: no end after {bound:g} s") from exc
        return self._exec_code(created["Id"], tried), _text(raw)

    # -- images, volumes, networks

    def image(self, reference: str) -> dict[str, t.Any] | None:
        """``GET /images/<reference>/json``; ``None`` when this host does not have it."""
        try:
            return self._json("GET", f"/images/{quote(reference, safe='/:@')}/json", tried=f"Inspecting image {reference}")
        except EngineNotFound:
            return None

    def images(self) -> list[dict[str, t.Any]]:
        """``GET /images/json``: all but those that only serve as layers of others."""
        return self._json("GET", "/images/json", tried="Listing images")

    def remove_image(self, reference: str) -> bool:
        """Remove a name of an image, and the image with its last name; ``False`` when it is gone already or a container needs it."""
        try:
            self._json("DELETE", f"/images/{quote(reference, safe='/:@')}", tried=f"Removing image {reference}")
        except EngineNotFound:
            return False
        except EngineError as exc:
            if exc.status != 409:
                raise
            return False
        return True

    def volumes(self, labels: t.Mapping[str, str | None] | None = None) -> list[dict[str, t.Any]]:
        """Volumes that carry all ``labels``."""
        wanted = [key if value is None else f"{key}={value}" for key, value in (labels or {}).items()]
        query = {"filters": json.dumps({"label": wanted} if wanted else {})}
        return self._json("GET", "/volumes", query, tried="Listing volumes").get("Volumes") or []

    def volume(self, name: str) -> dict[str, t.Any] | None:
        """``GET /volumes/<name>``; ``None`` when there is none."""
        try:
            return self._json("GET", f"/volumes/{quote(name)}", tried=f"Inspecting volume {name}")
        except EngineNotFound:
            return None

    def containers_using_volume(self, name: str, all: bool = True) -> list[dict[str, t.Any]]:
        """Containers that mount the volume ``name``, as ``containers`` lists them."""
        query = {"all": "1" if all else "0", "filters": json.dumps({"volume": [name]})}
        found = self._json("GET", "/containers/json", query, tried=f"Listing the containers that use volume {name}")
        # The engine's filter also matches mount points of that name.
        return [one for one in found if any(mount.get("Name") == name for mount in one.get("Mounts") or ())]

    def networks(self, labels: t.Mapping[str, str | None] | None = None) -> list[dict[str, t.Any]]:
        """Networks that carry all ``labels``."""
        wanted = [key if value is None else f"{key}={value}" for key, value in (labels or {}).items()]
        query = {"filters": json.dumps({"label": wanted} if wanted else {})}
        return self._json("GET", "/networks", query, tried="Listing networks")

    # -- transport

    def _change(
        self,
        container: str,
        action: str,
        doing: str,
        query: t.Mapping[str, str] | None = None,
        extra: float = 0.0,
        accept: str = "",
    ) -> bool:
        tried = f"{doing} container {short_id(container)}"
        try:
            status, _body = self._call("POST", f"/containers/{quote(container)}/{action}", query, tried=tried, bound=self.timeout + extra)
        except EngineError as exc:
            if accept and accept in exc.reason.lower():
                return False
            raise
        except _TimedOut as exc:
            raise self._silent(tried, f"no answer within {self.timeout + extra:g} s") from exc
        return status != 304

    def _exec_code(self, exec_id: str, tried: str) -> int:
        # The output can end a moment before the engine has noted the exit.
        pause, deadline = 0.005, time.monotonic() + 5
        while True:
            state = self._json("GET", f"/exec/{exec_id}/json", tried=tried)
            if not state.get("Running") or time.monotonic() > deadline:
                code = state.get("ExitCode")
                return -1 if code is None else int(code)
            time.sleep(pause)
            pause = min(pause * 2, 0.1)

    def _json(
        self,
        method: str,
        path: str,
        query: t.Mapping[str, str] | None = None,
        body: t.Any = None,
        *,
        tried: str,
        bound: float | None = None,
    ) -> t.Any:
        return json.loads(self._call(method, path, query, body, tried=tried, bound=bound)[1] or b"null")

    def _call(
        self,
        method: str,
        path: str,
        query: t.Mapping[str, str] | None = None,
        body: t.Any = None,
        *,
        tried: str,
        bound: float | None = None,
    ) -> tuple[int, bytes]:
        """One request; status and body. ``bound``: the caller waits that long itself and gets ``_TimedOut``."""
        connection = _UnixConnection(self.socket, self.timeout if bound is None else bound)
        target = f"{path}?{urlencode(query)}" if query else path
        data = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"} if data is not None else {}
        try:
            connection.request(method, target, body=data, headers=headers)
            if bound is None:
                response = connection.getresponse()
                payload = response.read()
            else:
                response, payload = _read_within(connection, bound)
        except (TimeoutError, socket.timeout) as exc:
            if bound is not None:
                raise _TimedOut() from exc
            raise self._silent(tried, f"no answer within {self.timeout:g} s") from exc
        except (OSError, http.client.HTTPException) as exc:
            raise self._silent(tried, str(exc) or type(exc).__name__) from exc
        finally:
            connection.close()
        if response.status >= 400:
            kind = EngineNotFound if response.status == 404 else EngineError
            raise kind(tried, response.status, _reason(payload))
        return response.status, payload

    def _silent(self, tried: str, why: str) -> DeliveryError:
        return DeliveryError(
            tried,
            f"the Docker engine does not answer on {self.socket} ({why})",
            "Start the engine, or name its socket, and see that this user may use it.",
            "transport",
        )


class LogStream:
    """A log that is being followed. Not for several threads at once."""

    def __init__(self, sock: socket.socket, tried: str, tty: bool) -> None:
        self._sock = sock
        self._tried = tried
        self._tty = tty
        self._head: bytes | None = b""
        self._pending = b""
        # A frame can cut a character in two; each of the two streams goes on with its own.
        self._decoders: dict[int, codecs.IncrementalDecoder] = {}

    def close(self) -> None:
        self._sock.close()

    def read(self) -> str | None:
        """What is new, without waiting; ``None``: nothing yet; '': it has ended. ``EngineError`` when the engine refuses."""
        self._sock.setblocking(False)
        while True:
            try:
                chunk = self._sock.recv(65536)
            except BlockingIOError:
                return None
            except OSError:  # the engine is gone, and with it the log
                return ""
            ended = not chunk
            if self._head is not None:
                chunk = self._behind_head(chunk, ended)
            text = self._decoded(chunk)
            if text or ended:
                return text

    def _behind_head(self, chunk: bytes, ended: bool) -> bytes:
        head, found, rest = ((self._head or b"") + chunk).partition(b"\r\n\r\n")
        status = int(head.split()[1]) if found else 0
        if status >= 400 and ended:
            raise (EngineNotFound if status == 404 else EngineError)(self._tried, status, _reason(rest))
        self._head = None if 0 < status < 400 else (self._head or b"") + chunk
        return rest if self._head is None else b""

    def _decoded(self, chunk: bytes) -> str:
        if self._tty:
            return self._decode(0, chunk)
        raw, position, parts = self._pending + chunk, 0, []
        while position + 8 <= len(raw):
            (length,) = struct.unpack_from(">I", raw, position + 4)
            if position + 8 + length > len(raw):
                break
            parts.append(self._decode(raw[position], raw[position + 8 : position + 8 + length]))
            position += 8 + length
        self._pending = raw[position:]
        return "".join(parts)

    def _decode(self, stream: int, data: bytes) -> str:
        return self._decoders.setdefault(stream, codecs.getincrementaldecoder("utf-8")("replace")).decode(data)


class _TimedOut(Exception):
    """The caller's own time bound passed."""


def _read_within(connection: http.client.HTTPConnection, bound: float) -> tuple[http.client.HTTPResponse, bytes]:
    # A socket timeout bounds each read; a long answer needs the bound over all of them.
    deadline = time.monotonic() + bound
    response = connection.getresponse()
    payload = bytearray()
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            response.close()
            raise TimeoutError
        if connection.sock is not None:
            connection.sock.settimeout(left)
        chunk = response.read1(65536)
        if not chunk:
            return response, bytes(payload)
        if len(payload) < OUTPUT_LIMIT:  # what it says beyond is heard, and not kept
            payload += chunk


def _reason(payload: bytes) -> str:
    try:
        return str(json.loads(payload)["message"]).strip()
    except (ValueError, KeyError, TypeError):
        return payload.decode("utf-8", "replace").strip() or "no reason given"


def _text(raw: bytes) -> str:
    """Decode a log or exec stream: 8-byte frame headers (stream, 3 zeros, length) when there are any."""
    if len(raw) < 8 or raw[0] not in (0, 1, 2) or raw[1:4] != b"\0\0\0":
        return raw.decode("utf-8", "replace")
    parts, position = [], 0
    while position + 8 <= len(raw):
        (length,) = struct.unpack(">I", raw[position + 4 : position + 8])
        parts.append(raw[position + 8 : position + 8 + length])
        position += 8 + length
    return b"".join(parts).decode("utf-8", "replace")


def moment(text: str) -> float:
    """Seconds since 1970 of the engine's times, which have nanoseconds."""
    whole, fraction, zone = re.fullmatch(r"([^.Z+]+?)(\.\d+)?(Z|[+-]\d\d:\d\d)", text).groups()  # type: ignore[union-attr]
    return datetime.datetime.fromisoformat(whole + ("+00:00" if zone == "Z" else zone)).timestamp() + float(fraction or 0)


def short_id(container: str) -> str:
    """What people see in ``docker ps``."""
    return container[:12] if len(container) == 64 else container
