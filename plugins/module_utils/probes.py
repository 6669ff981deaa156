# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Readiness probes: asked side by side until all are ready at the same time, or until it is known that one cannot be."""

from __future__ import annotations

import base64
import difflib
import http.client
import json
import re
import socket
import ssl
import threading
import time
import typing as t
from dataclasses import dataclass
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.command import run
from ansible_collections.selfhost.delivery.plugins.module_utils.engine import (
    ONEOFF_LABEL,
    PROJECT_LABEL,
    SERVICE_LABEL,
    Engine,
    EngineNotFound,
    short_id,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

FIRST_PAUSE = 0.02
LONGEST_PAUSE = 0.5
#: Between two successes that must follow each other: asked at once, the second would prove nothing.
STABLE_PAUSE = 0.2
LOG_LINES = 20
BODY_LIMIT = 1024 * 1024
REDIRECTS = 5

#: Keys of each probe: the type, and whether it is required.
PROBES: dict[str, dict[str, tuple[t.Any, bool]]] = {
    "http": {
        "url": (str, True),
        "status": (list, False),
        "headers": (dict, False),
        "bearer_token": (str, False),
        "query": (str, False),
        "method": (str, False),
        "validate_certs": (bool, False),
        "ca_path": (str, False),
        "follow_redirects": (bool, False),
        "unix_socket": (str, False),
        "timeout": ((int, float), False),
    },
    "tcp": {"host": (str, True), "port": (int, True), "timeout": ((int, float), False)},
    "container": {"name": (str, True), "state": (str, False)},
    "service": {"project": (str, True), "service": (str, True), "state": (str, False)},
    "systemd": {"unit": (str, True)},
    "command": {"argv": (list, True), "container": (str, False), "timeout": ((int, float), False)},
}
COMMON: dict[str, tuple[t.Any, bool]] = {
    "name": (str, False),
    "stable": (int, False),
    "timeout": ((int, float), False),
    "watch": (str, False),
}
CONTAINER_STATES = ("auto", "healthy", "running")
#: Seconds for one try of a probe that talks to something.
TRY_TIMEOUT = 5.0


@dataclass(frozen=True)
class Check:
    """One parsed check. ``stable`` and ``timeout`` (seconds) are ``None`` where the caller's count; ``watch`` is a container."""

    name: str
    kind: str
    options: t.Mapping[str, t.Any]
    stable: int | None = None
    timeout: float | None = None
    watch: str = ""
    #: A compiled JMESPath expression, of an HTTP check with ``query``.
    query: t.Any = None


@dataclass
class WaitResult:
    """How a wait ended.

    ``checks``: name to ``{"ready": bool, "attempts": int, "ready_after": seconds or None, "last_error": str or None}``;
    ``ended_early``: the reason where waiting on made no sense or was stopped, else ''.
    """

    ready: bool
    elapsed: float
    checks: dict[str, dict[str, t.Any]]
    ended_early: str = ""

    def raise_unless_ready(self, timeout: float) -> None:
        """``DeliveryError(not_ready)`` that says how many of how many, and why."""
        if self.ready:
            return
        waiting = {name: entry for name, entry in self.checks.items() if not entry["ready"]}
        reasons = "; ".join(f"{name}: {entry['last_error']}" for name, entry in waiting.items())
        how = "given up early" if self.ended_early else f"timeout {timeout:g} s"
        ready = f"{len(self.checks) - len(waiting)} of {len(self.checks)}"
        raise DeliveryError(
            "Waiting for readiness",
            f"{ready} ready after {self.elapsed:.1f} s ({how}). {reasons or self.ended_early}",
            "",
            "not_ready",
            elapsed=self.elapsed,
            checks=self.checks,
        )


class NotReady(Exception):
    """This try failed; the next may not."""


class Hopeless(Exception):
    """It cannot become ready any more."""


# -- parsing


def parse_checks(raw: t.Sequence[t.Mapping[str, t.Any]]) -> list[Check]:
    """Check a list of one-probe dicts; every mistake is ``DeliveryError(config)`` with the path of the key."""
    if not isinstance(raw, (list, tuple)) or not raw:
        raise DeliveryError("checks", "not a list of at least one check")
    checks = [_parse_check(entry, f"checks[{index}]") for index, entry in enumerate(raw)]
    for index, check in enumerate(checks):
        if check.name in {other.name for other in checks[:index]}:
            raise DeliveryError(f"checks[{index}].name", f"{check.name!r} is there twice", "Results are told by name.")
    return checks


def _parse_check(entry: t.Any, path: str) -> Check:
    if not isinstance(entry, dict):
        raise DeliveryError(path, "not a map")
    # A module's argument spec fills absent keys with None.
    given = {key: value for key, value in entry.items() if value is not None}
    _known(given, [*COMMON, *PROBES], path)
    kinds = [kind for kind in PROBES if kind in given]
    if len(kinds) != 1:
        raise DeliveryError(path, f"{' and '.join(kinds) or 'no probe'} given", f"Give exactly one of {', '.join(PROBES)}.")
    kind = kinds[0]
    options = given[kind]
    if not isinstance(options, dict):
        raise DeliveryError(f"{path}.{kind}", "not a map")
    options = {key: value for key, value in options.items() if value is not None}
    if kind == "container" and "id" in options:
        options.setdefault("name", options.pop("id"))
        options.pop("id", None)
    _known(options, list(PROBES[kind]), f"{path}.{kind}")
    _typed(options, PROBES[kind], f"{path}.{kind}")
    _typed({key: value for key, value in given.items() if key in COMMON}, COMMON, path)
    if given.get("stable", 1) < 1:
        raise DeliveryError(f"{path}.stable", "must be 1 or more")
    if options.get("state", "auto") not in CONTAINER_STATES:
        raise DeliveryError(f"{path}.{kind}.state", f"{options['state']!r} is not one of {', '.join(CONTAINER_STATES)}")
    query = None
    if kind == "http":
        _parse_url(options["url"], f"{path}.http.url")
        if not all(isinstance(code, int) and 100 <= code <= 599 for code in options.get("status", ())):
            raise DeliveryError(f"{path}.http.status", f"{options['status']!r} is not a list of HTTP statuses")
        if options.get("query"):
            query = _compile(options["query"], f"{path}.http.query")
        if options.get("ca_path"):
            _tls_context(options, f"{path}.http.ca_path")
    elif kind == "command" and not (options["argv"] and all(isinstance(word, str) for word in options["argv"])):
        raise DeliveryError(f"{path}.command.argv", "not a list of words")
    return Check(
        name=given.get("name") or _default_name(kind, options),
        kind=kind,
        options=options,
        stable=given.get("stable"),
        timeout=given.get("timeout"),
        watch=given.get("watch", ""),
        query=query,
    )


def _known(given: t.Mapping[str, t.Any], known: t.Sequence[str], path: str) -> None:
    for key in given:
        if key not in known:
            close = difflib.get_close_matches(str(key), known, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise DeliveryError(f"{path}.{key}", f"unknown key{hint}", f"Known: {', '.join(known)}.")


def _typed(given: t.Mapping[str, t.Any], spec: t.Mapping[str, tuple[t.Any, bool]], path: str) -> None:
    for key, (kind, required) in spec.items():
        if key not in given:
            if required:
                raise DeliveryError(f"{path}.{key}", "missing")
            continue
        value = given[key]
        # bool is an int to Python, and `port: true` is none to us.
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
            raise DeliveryError(f"{path}.{key}", f"{value!r} is not of type {wanted}")


def _default_name(kind: str, options: t.Mapping[str, t.Any]) -> str:
    if kind == "http":
        return _shown(options["url"])
    if kind == "tcp":
        return f"{options['host']}:{options['port']}"
    if kind == "service":
        return f"{options['project']}/{options['service']}"
    return str(options.get("name") or options.get("unit") or options["argv"][0])


def _parse_url(url: str, path: str) -> t.Any:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
    except ValueError:
        good = False
    if not good:
        raise DeliveryError(path, f"{_shown(url)!r} is not an http or https URL")
    return parts


def _shown(url: str) -> str:
    """The URL without the login it may hold."""
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def _compile(expression: str, path: str) -> t.Any:
    try:
        import jmespath  # only where a query asks for it: app hosts need not have it
        import jmespath.exceptions
    except ImportError as exc:
        raise DeliveryError(
            path,
            "the Python library jmespath is missing on the host that asks",
            "Install python3-jmespath there (the playbook setup does), or leave `query` out.",
        ) from exc
    try:
        return jmespath.compile(expression)
    except (jmespath.exceptions.JMESPathError, ValueError) as exc:
        raise DeliveryError(path, f"{expression!r} is not JMESPath ({str(exc).splitlines()[0].rstrip(':')})") from exc


# -- waiting


@dataclass
class _Progress:
    """What is known about one check; written by its own thread under the wait's lock."""

    check: Check
    ready: bool = False
    attempts: int = 0
    streak: int = 0
    ready_after: float | None = None
    last_error: str | None = "not asked yet"

    def entry(self) -> dict[str, t.Any]:
        return {
            "ready": self.ready,
            "attempts": self.attempts,
            "ready_after": self.ready_after,
            "last_error": None if self.ready else self.last_error,
        }


def wait_ready(
    checks: t.Sequence[Check],
    timeout: float,
    stable: int = 1,
    fail_fast: bool = True,
    engine: Engine | None = None,
    stop: threading.Event | t.Callable[[], bool] | None = None,
    on_change: t.Callable[[str, dict[str, t.Any]], None] | None = None,
) -> WaitResult:
    """Ask all ``checks`` side by side until all are ready at the same time, or ``timeout`` seconds have passed.

    ``stable`` consecutive successes make a check ready; it is asked on until all are, and is not ready again when it fails.
    ``fail_fast`` ends the wait as soon as a container (of a check, or watched beside one) has exited, loops or is gone.
    ``stop`` ends it from outside. ``on_change(name, entry)`` is called in the caller's thread when readiness or the reason changed.
    """
    return _Wait(checks, timeout, stable, fail_fast, engine or Engine(timeout=TRY_TIMEOUT), stop, on_change).run()


class _Wait:
    def __init__(
        self,
        checks: t.Sequence[Check],
        timeout: float,
        stable: int,
        fail_fast: bool,
        engine: Engine,
        stop: threading.Event | t.Callable[[], bool] | None,
        on_change: t.Callable[[str, dict[str, t.Any]], None] | None,
    ) -> None:
        self.timeout = timeout
        self.stable = stable
        self.fail_fast = fail_fast
        self.engine = engine
        self.stop = stop.is_set if isinstance(stop, threading.Event) else stop
        self.on_change = on_change
        self.progress = [_Progress(check) for check in checks]
        self.changed = threading.Condition()
        self.over = threading.Event()
        self.ended_early = ""
        self.started = time.monotonic()

    def run(self) -> WaitResult:
        for progress in self.progress:
            # Daemons: a probe that hangs in the network must not hold up the answer.
            threading.Thread(target=self._ask, args=(progress,), daemon=True).start()
            if progress.check.watch:
                threading.Thread(target=self._watch, args=(progress,), daemon=True).start()
        told: dict[str, tuple[bool, str | None]] = {}
        try:
            with self.changed:
                while True:
                    entries = {progress.check.name: progress.entry() for progress in self.progress}
                    self._tell(entries, told)
                    now = self._elapsed()
                    if all(progress.ready for progress in self.progress):
                        return WaitResult(True, round(now, 3), entries)
                    if not self.ended_early and self.stop is not None and self.stop():
                        self.ended_early = "stopped from outside"
                    late = [one for one in self.progress if not one.ready and now >= self._limit(one.check)]
                    if self.ended_early or late:
                        return WaitResult(False, round(now, 3), entries, self.ended_early)
                    left = min(self._limit(one.check) for one in self.progress if not one.ready) - now
                    # `stop` may be a function, which nobody announces.
                    self.changed.wait(min(left, 0.1) if self.stop is not None else left)
        finally:
            self.over.set()

    def _tell(self, entries: t.Mapping[str, dict[str, t.Any]], told: dict[str, tuple[bool, str | None]]) -> None:
        if self.on_change is None:
            return
        for name, entry in entries.items():
            state = (entry["ready"], entry["last_error"])
            if told.get(name) != state:
                told[name] = state
                self.on_change(name, dict(entry))

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _limit(self, check: Check) -> float:
        return self.timeout if check.timeout is None else min(check.timeout, self.timeout)

    def _pause(self) -> float:
        """Short at first and a tenth of the time waited later: the wait costs at most a tenth more than what it waits for."""
        return min(max(self._elapsed() / 10, FIRST_PAUSE), LONGEST_PAUSE)

    def _ask(self, progress: _Progress) -> None:
        check = progress.check
        needed = check.stable or self.stable
        probe = _probe(check, self.engine)
        while not self.over.is_set():
            error: str | None = None
            hopeless = False
            try:
                probe(max(self._limit(check) - self._elapsed(), 0.05))
            except NotReady as exc:
                error = str(exc)
            except Hopeless as exc:
                error, hopeless = str(exc), self.fail_fast
            except DeliveryError as exc:
                error = exc.message
            except Exception as exc:  # a probe that breaks is a check that fails, and says why
                error = f"{exc.__class__.__name__}: {exc}"
            with self.changed:
                if self.over.is_set():
                    return
                progress.attempts += 1
                progress.last_error = error
                progress.streak = progress.streak + 1 if error is None else 0
                ready = progress.streak >= needed
                if error is None and not ready:
                    progress.last_error = f"{progress.streak} of {needed} successes in a row"
                if ready and not progress.ready:
                    progress.ready_after = round(self._elapsed(), 3)
                if not ready:
                    progress.ready_after = None
                progress.ready = ready
                if hopeless:
                    self.ended_early = self.ended_early or f"{check.name}: {error}"
                self.changed.notify_all()
            if progress.ready:
                pause = LONGEST_PAUSE
            elif progress.streak:
                pause = STABLE_PAUSE
            else:
                pause = self._pause()
            self.over.wait(pause)

    def _watch(self, progress: _Progress) -> None:
        """Look at the container behind another probe; its end is the end of the wait."""
        watcher = ContainerWatch(self.engine)
        while self.fail_fast and not self.over.is_set():
            try:
                watcher.look(progress.check.watch)
            except Hopeless as exc:
                with self.changed:
                    if not self.over.is_set():
                        # The container's end is the reason; that its port is closed is only the result.
                        progress.ready, progress.streak, progress.last_error = False, 0, str(exc)
                        self.ended_early = self.ended_early or f"{progress.check.name}: {exc}"
                        self.changed.notify_all()
                return
            except (NotReady, DeliveryError):
                pass  # the probe itself tells what is missing
            self.over.wait(self._pause())


# -- probes: called with the seconds that are left, return when ready, else raise NotReady or Hopeless


def _probe(check: Check, engine: Engine) -> t.Callable[[float], None]:
    if check.kind == "http":
        context = _tls_context(check.options, check.name) if urlsplit(check.options["url"]).scheme == "https" else None
        return lambda left: _http(check, context, left)
    if check.kind == "tcp":
        return lambda left: _tcp(check.options, left)
    if check.kind == "container":
        watch = ContainerWatch(engine)
        return lambda left: watch.ready(check.options["name"], check.options.get("state", "auto"))
    if check.kind == "service":
        service = ServiceWatch(engine, check.options)
        return lambda left: service.ready()
    if check.kind == "systemd":
        return lambda left: _systemd(check.options["unit"], left)
    return lambda left: _command(check.options, engine, left)


def _http(check: Check, context: ssl.SSLContext | None, left: float) -> None:
    options = check.options
    deadline = time.monotonic() + min(options.get("timeout", TRY_TIMEOUT), left)
    url = options["url"]
    for _hop in range(REDIRECTS + 1):
        status, location, body = _request(url, options, context, deadline)
        if not (options.get("follow_redirects") and status in (301, 302, 303, 307, 308) and location):
            break
        there = urljoin(url, location)
        if urlsplit(there).scheme not in ("http", "https"):
            raise NotReady(f"HTTP {status} from {_shown(url)} leads to {_shown(there)}, which is not http")
        if urlsplit(there).scheme == "https" and context is None:
            context = _tls_context(options, check.name)
        url = there
    else:
        raise NotReady(f"more than {REDIRECTS} redirects from {_shown(options['url'])}")
    wanted = options.get("status") or ()
    if status not in wanted if wanted else not 200 <= status <= 299:
        said = f": body starts {_start(body)}" if body.strip() else ""
        raise NotReady(f"HTTP {status} from {_shown(url)}{said}")
    if check.query is not None:
        try:
            document = json.loads(body)
        except ValueError:
            raise NotReady(f"HTTP {status} from {_shown(url)}, but the body is not JSON: it starts {_start(body)}") from None
        _query(check.query, document)


def _request(url: str, options: t.Mapping[str, t.Any], context: ssl.SSLContext | None, deadline: float) -> tuple[int, str, bytes]:
    parts = urlsplit(url)
    limit = max(deadline - time.monotonic(), 0.001)
    if options.get("unix_socket"):
        connection: http.client.HTTPConnection = _UnixHTTP(parts.hostname or "", options["unix_socket"], limit, context)
    elif parts.scheme == "https":
        connection = http.client.HTTPSConnection(parts.hostname or "", parts.port, timeout=limit, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=limit)
    headers = {"User-Agent": "selfhost.delivery ready_wait", "Connection": "close", "Accept": "application/json, */*"}
    same_place = (parts.scheme, parts.netloc) == urlsplit(options["url"])[:2]
    if same_place:  # what identifies us goes to no other host
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        if options.get("bearer_token"):
            headers["Authorization"] = f"Bearer {options['bearer_token']}"
        headers.update({key: str(value) for key, value in (options.get("headers") or {}).items()})
    target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
    try:
        connection.request(options.get("method", "GET").upper(), target, headers=headers)
        sock = connection.sock
        response = connection.getresponse()
        body = b""
        while len(body) < BODY_LIMIT:
            # A socket's timeout bounds one read; an answer that drips must not hold the check longer than its try.
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise TimeoutError
            if sock is not None and sock.fileno() >= 0:
                sock.settimeout(remaining)
            chunk = response.read1(65536)
            if not chunk:
                break
            body += chunk
        return response.status, response.getheader("Location") or "", body
    except (OSError, http.client.HTTPException, ValueError) as exc:
        where = options.get("unix_socket") or f"{parts.hostname}:{parts.port or (443 if parts.scheme == 'https' else 80)}"
        raise NotReady(_network_reason(exc, where, limit)) from exc
    finally:
        connection.close()


class _UnixHTTP(http.client.HTTPConnection):
    """HTTP over a Unix socket, with TLS on it where the URL says https."""

    def __init__(self, host: str, path: str, timeout: float, context: ssl.SSLContext | None) -> None:
        super().__init__(host, timeout=timeout)
        self._path = path
        self._context = context

    def connect(self) -> None:
        plain = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        plain.settimeout(self.timeout)
        try:
            plain.connect(self._path)
            self.sock = self._context.wrap_socket(plain, server_hostname=self.host) if self._context else plain
        except BaseException:
            plain.close()
            raise


def _tls_context(options: t.Mapping[str, t.Any], path: str) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=options.get("ca_path") or None)
    except (OSError, ssl.SSLError) as exc:
        raise DeliveryError(path, f"{options['ca_path']!r} cannot be read as certificates ({exc.strerror or exc})") from exc
    if not options.get("validate_certs", True):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def _network_reason(exc: Exception, where: str, limit: float) -> str:
    if isinstance(exc, ConnectionRefusedError):
        return f"connection refused by {where}"
    if isinstance(exc, (TimeoutError, socket.timeout)):
        return f"no answer from {where} within {limit:.1f} s"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate of {where} is not trusted: {exc.verify_message}"
    if isinstance(exc, socket.gaierror):
        return f"the name of {where} is not known: {exc.strerror}"
    if isinstance(exc, FileNotFoundError):
        return f"no socket {where}"
    if isinstance(exc, (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError)):
        return f"{where} closed the connection without an answer"
    if isinstance(exc, http.client.HTTPException):
        return f"{where} does not answer in HTTP: {exc.__class__.__name__} {_start(str(exc).encode())}"
    return f"{where}: {getattr(exc, 'strerror', None) or exc}"


def _start(body: bytes) -> str:
    """The beginning of a body, on one line."""
    text = re.sub(r"\s+", " ", body[:2000].decode("utf-8", "replace")).strip()
    text = "".join(char for char in text if char.isprintable())
    return json.dumps(text if len(text) <= 160 else text[:160] + "…", ensure_ascii=False)


def _query(compiled: t.Any, document: t.Any) -> None:
    import jmespath.exceptions

    try:
        result = compiled.search(document)
    except jmespath.exceptions.JMESPathError as exc:
        raise NotReady(f"JMESPath `{compiled.expression}` cannot be asked of this body: {str(exc).splitlines()[0]}") from exc
    # False as JMESPath means it: false, null and everything empty; the number 0 is true.
    if result is None or result is False or (isinstance(result, (str, list, dict)) and not result):
        values = ", ".join(f"{name} is {_value(value)}" for name, value in _fields(compiled.parsed, document).items())
        raise NotReady(f"JMESPath `{compiled.expression}` was {_value(result)}" + (f", {values}" if values else ""))


def _value(value: t.Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "…"


def _fields(node: t.Mapping[str, t.Any], document: t.Any) -> dict[str, t.Any]:
    """The plain paths (``a.b``) in an expression that start at the top of ``document``, with what it has there."""
    path = _path(node)
    if path is not None:
        value = document
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return {".".join(path): value}
    found: dict[str, t.Any] = {}
    if node["type"] in ("comparator", "and_expression", "or_expression", "not_expression", "function_expression", "pipe"):
        # Behind a pipe, names start at what is before it.
        children = node["children"][:1] if node["type"] == "pipe" else node["children"]
        for child in children:
            found.update(_fields(child, document))
    return found


def _path(node: t.Mapping[str, t.Any]) -> list[str] | None:
    if node["type"] == "field":
        return [node["value"]]
    if node["type"] == "subexpression":
        parts = [_path(child) for child in node["children"]]
        if all(part is not None for part in parts):
            return [name for part in parts for name in part or ()]
    return None


def _tcp(options: t.Mapping[str, t.Any], left: float) -> None:
    limit = min(options.get("timeout", TRY_TIMEOUT), left)
    try:
        socket.create_connection((options["host"], options["port"]), timeout=limit).close()
    except OSError as exc:
        raise NotReady(_network_reason(exc, f"{options['host']}:{options['port']}", limit)) from exc


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
    return f", its health check ended with {entries[-1].get('ExitCode')} and says {_start(str(entries[-1].get('Output') or '').encode())}"


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


def _systemd(unit: str, left: float) -> None:
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


def _command(options: t.Mapping[str, t.Any], engine: Engine, left: float) -> None:
    argv = options["argv"]
    limit = min(options.get("timeout", TRY_TIMEOUT), left)
    late = NotReady(f"{argv[0]} did not end within {limit:.1f} s")
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
        raise NotReady(f"{argv[0]} ended with {code}" + (f" and says {_start(said[-600:].encode())}" if said else ""))
