# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Probes that talk over TCP or a Unix socket: a connection, HTTP and HTTPS. Every wait in them ends with the try."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import ssl
import time
import typing as t
from urllib.parse import unquote, urljoin, urlsplit, urlunsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.outcomes import NoAnswer, NotReady, shown_start
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.query import must_be_true

BODY_LIMIT = 1024 * 1024
#: Of a body that is only shown; an error page has no need to end.
SHOWN_LIMIT = 2000
REDIRECTS = 5
#: Share of a try that the connection may take. A lost SYN is sent again by the kernel after 1, 3 and 7 s; a new try is sooner.
CONNECT_SHARE = 0.25
CONNECT_LEAST = 0.25

Options = t.Mapping[str, t.Any]


def tcp(options: Options, limit: float) -> None:
    """Return when the connection is accepted within ``limit`` seconds."""
    connect(options, options.get("host") or "", options.get("port") or 0, time.monotonic() + limit, limit).close()


# -- connections


def place(options: Options, host: str, port: int) -> str:
    """Where was asked, for people."""
    return str(options.get("unix_socket") or f"{f'[{host}]' if ':' in host else host}:{port}")


def connect(options: Options, host: str, port: int, deadline: float, limit: float) -> socket.socket:
    """A connection to ``options.unix_socket`` or else ``host``; ``NotReady`` that says why there is none."""
    where = place(options, host, port)
    limit = max(min(max(limit * CONNECT_SHARE, CONNECT_LEAST), deadline - time.monotonic()), 0.001)
    targets: list[tuple[t.Any, t.Any]] = [(socket.AF_UNIX, options.get("unix_socket"))]
    try:
        if not options.get("unix_socket"):
            targets = [(entry[0], entry[4]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        for index, (family, address) in enumerate(targets):
            plain = socket.socket(family, socket.SOCK_STREAM)
            try:
                plain.settimeout(limit)
                plain.connect(address)
                return plain
            except BaseException as exc:
                plain.close()
                if not isinstance(exc, OSError) or index == len(targets) - 1 or time.monotonic() >= deadline:
                    raise
    except (TimeoutError, socket.timeout):
        raise NoAnswer(f"no connection to {where} within {limit:.1f} s") from None
    except (OSError, ValueError) as exc:
        raise NotReady(network_reason(exc, where)) from exc
    raise NotReady(f"the name {host} has no address")


def secure(plain: socket.socket, context: ssl.SSLContext, name: str, where: str, deadline: float) -> ssl.SSLSocket:
    """TLS on ``plain``, its certificate checked against ``name`` as ``context`` says; ``NotReady`` that says why not."""
    plain.settimeout(max(deadline - time.monotonic(), 0.001))
    try:
        return context.wrap_socket(plain, server_hostname=name)
    except (TimeoutError, socket.timeout):
        raise NoAnswer(f"{where} took the connection and did not answer in TLS within this try") from None
    except (OSError, ValueError) as exc:
        raise NotReady(network_reason(exc, where)) from exc


def tls_context(options: Options, path: str) -> ssl.SSLContext:
    """As ``ca_path`` and ``validate_certs`` say; ``DeliveryError`` (config) when the file cannot be read."""
    try:
        context = ssl.create_default_context(cafile=options.get("ca_path") or None)
    except OSError as exc:
        raise DeliveryError(path, f"{options['ca_path']!r} cannot be read as certificates ({exc.strerror or exc})") from exc
    if not options.get("validate_certs", True):
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def network_reason(exc: Exception, where: str) -> str:
    """What ``exc`` means for somebody who wonders why ``where`` does not answer."""
    if isinstance(exc, ConnectionRefusedError):
        return f"connection refused by {where}"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate of {where} is not trusted: {exc.verify_message}"
    if isinstance(exc, ssl.SSLError) and exc.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
        return f"{where} does not speak TLS"
    if isinstance(exc, socket.gaierror):
        return f"the name {where.rpartition(':')[0]} cannot be resolved: {exc.strerror}"
    if isinstance(exc, UnicodeError):
        return f"{where.rpartition(':')[0]!r} is no name of a host: {exc}"
    if isinstance(exc, FileNotFoundError):
        return f"no socket {where}"
    if isinstance(exc, (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError, ssl.SSLEOFError)):
        return f"{where} closed the connection without an answer"
    if isinstance(exc, http.client.IncompleteRead):
        return f"{where} closed the connection in mid-answer"
    if isinstance(exc, http.client.HTTPException):
        return f"{where} does not answer in HTTP: {exc.__class__.__name__} {shown_start(str(exc).encode())}"
    return f"{where}: {getattr(exc, 'strerror', None) or exc}"


class _Bounded(io.RawIOBase):
    """What ``sock`` receives until ``deadline``: its own timeout starts anew with every byte that drips in."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        super().__init__()
        self._sock = sock
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: t.Any) -> int:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._sock.settimeout(left)
        return self._sock.recv_into(buffer)


class _Wire:
    """The part of a socket that ``http.client`` uses, bounded; who made the socket closes it."""

    def __init__(self, sock: socket.socket, deadline: float) -> None:
        self._sock = sock
        self._deadline = deadline

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_Bounded(self._sock, self._deadline))

    def sendall(self, data: t.Any) -> None:
        self._sock.settimeout(max(self._deadline - time.monotonic(), 0.001))
        self._sock.sendall(data)

    def close(self) -> None:
        pass


# -- HTTP


def http_get(options: Options, query: t.Any, context: t.Callable[[], ssl.SSLContext], limit: float) -> None:
    """Return when the answer has a wanted status and ``query`` (compiled JMESPath, or ``None``) holds for it.

    ``context`` is only called where TLS is spoken: to make one takes longer than to ask.
    """
    deadline = time.monotonic() + limit
    url, method = options["url"], str(options.get("method", "GET")).upper()
    for _hop in range(REDIRECTS + 1):
        try:
            status, location, body = _request(method, url, options, query is not None, context, deadline, limit)
            if not (options.get("follow_redirects") and status in (301, 302, 303, 307, 308) and location):
                break
            there = urljoin(url, location)
            if urlsplit(there).scheme not in ("http", "https") or not urlsplit(there).hostname or urlsplit(there).port == 0:
                raise ValueError
        except ValueError:
            raise NotReady(f"HTTP {status} from {shown_url(url)} leads to {shown_start(location.encode())}, which is not http") from None
        url = there
        if status == 303 and method != "HEAD" or status in (301, 302) and method == "POST":
            method = "GET"
    else:
        raise NotReady(f"more than {REDIRECTS} redirects from {shown_url(options['url'])}")
    if not _wanted(status, options):
        said = f": body starts {shown_start(body)}" if body.strip() else ""
        raise NotReady(f"HTTP {status} from {shown_url(url)}{said}")
    if query is not None:
        if len(body) >= BODY_LIMIT:
            raise NotReady(f"HTTP {status} from {shown_url(url)}, but its body is longer than {BODY_LIMIT} bytes")
        try:
            document = json.loads(body)
        except (ValueError, RecursionError):
            raise NotReady(f"HTTP {status} from {shown_url(url)}, but the body is not JSON: it starts {shown_start(body)}") from None
        must_be_true(query, document)


def _wanted(status: int, options: Options) -> bool:
    return status in options["status"] if options.get("status") else 200 <= status <= 299


def _request(
    method: str,
    url: str,
    options: Options,
    need_body: bool,
    context: t.Callable[[], ssl.SSLContext],
    deadline: float,
    limit: float,
) -> tuple[int, str, bytes]:
    """Status, ``Location`` and as much of the body as somebody will look at."""
    parts = urlsplit(url)
    host, port = parts.hostname or "", parts.port or (443 if parts.scheme == "https" else 80)
    same_place = (parts.scheme, parts.netloc) == urlsplit(options["url"])[:2]
    there, its_port = host, port
    if same_place and options.get("connect_to"):
        # Only the address differs: name and certificate are still the URL's.
        there, _colon, number = str(options["connect_to"]).rpartition(":")
        there, its_port = there.strip("[]"), int(number)
    where = place(options, there, its_port)
    headers = {"User-Agent": "selfhost.delivery ready_wait", "Connection": "close", "Accept": "application/json, */*"}
    if same_place:  # what identifies us goes to no other host
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
            headers["Authorization"] = "Basic " + base64.b64encode(login.encode()).decode()
        if options.get("bearer_token"):
            headers["Authorization"] = f"Bearer {options['bearer_token']}"
        headers.update({key: str(value) for key, value in (options.get("headers") or {}).items()})
    target = urlunsplit(("", "", parts.path or "/", parts.query, ""))
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = 443 if parts.scheme == "https" else 80  # the port that Host does not name
    sock = connect(options, there, its_port, deadline, limit)
    status = 0
    try:
        if parts.scheme == "https":
            sock = secure(sock, context(), (options.get("server_name") if same_place else None) or host, where, deadline)
        connection.sock = _Wire(sock, deadline)
        connection.request(method, target, headers=headers)
        response = connection.getresponse()
        status = response.status
        body = b""
        if need_body or not _wanted(status, options):
            while len(body) < (BODY_LIMIT if need_body else SHOWN_LIMIT):
                chunk = response.read1(65536)
                if not chunk:
                    break
                body += chunk
        return status, response.getheader("Location") or "", body
    except (TimeoutError, socket.timeout):
        if status:
            raise NoAnswer(f"HTTP {status} from {shown_url(url)}, but its body did not end within {limit:.1f} s") from None
        raise NoAnswer(f"no answer from {where} within {limit:.1f} s") from None
    except (OSError, http.client.HTTPException, ValueError) as exc:
        raise NotReady(network_reason(exc, where)) from exc
    finally:
        sock.close()


def shown_url(url: str) -> str:
    """The URL without the login it may hold."""
    try:
        parts = urlsplit(url)
        return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))
    except ValueError:
        return url.rpartition("@")[2]
