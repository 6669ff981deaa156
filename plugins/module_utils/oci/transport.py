# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""HTTP/1.1 over kept-alive connections: origins, TLS, proxies, redirects, and what may be asked again.

Several connections with one request each beat one multiplexed connection as soon as there is a round trip to wait
for, so this is plain ``http.client`` with a pool that threads share.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import http.client
import ipaddress
import json
import os
import random
import re
import select
import socket
import ssl
import threading
import time
import typing as t
import urllib.request
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from urllib.parse import unquote, urljoin, urlsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions

RETRY_STATUSES = frozenset((408, 429, 500, 502, 503, 504))
#: Longest wait, in seconds, that a registry may ask of us before it counts as not available.
LONGEST_WAIT = 60.0
_REDIRECTS = frozenset((301, 302, 303, 307, 308))
_MAX_REDIRECTS = 5
USER_AGENT = "selfhost.delivery"

#: What a server says that is not content with the client's certificate, or with none.
_CLIENT_ALERT = re.compile(r"ALERT.*(CERTIFICATE|UNKNOWN_CA|HANDSHAKE_FAILURE|ACCESS_DENIED)")

_TIMEOUTS = (TimeoutError, socket.timeout)  # noqa: UP041 - two classes before Python 3.10


class Interrupted(DeliveryError):
    """The network or the other side failed in a way that may be gone when asked again."""

    #: What a ``Retry-After`` of the answer asked for.
    retry_after: str | None = None
    #: Its budget is used up, so nobody above asks again either: budgets do not multiply.
    final = False

    def __init__(self, tried: str, seen: str, remedy: str = "", **details: t.Any) -> None:
        super().__init__(tried, seen, remedy, "transport", **details)

    def during(self, tried: str) -> Interrupted:
        """The same, told of the work that it interrupted and not of the request."""
        told = Interrupted(tried, self.seen, self.remedy, **self.details)
        told.retry_after, told.final = self.retry_after, self.final
        return told


@dataclass(frozen=True)
class RetryPolicy:
    """How long to wait before asking again. ``retries`` is the budget of one request."""

    retries: int
    base: float = 0.5
    ceiling: float = 10.0

    def delay(self, attempt: int, retry_after: str | None = None) -> float | None:
        """Seconds to wait after failure number ``attempt`` (from 0), or ``None`` to give up.

        ``Retry-After`` is kept to where it asks for no more than ``LONGEST_WAIT``.
        """
        if attempt >= self.retries:
            return None
        backoff = min(self.ceiling, self.base * 2**attempt) * random.uniform(0.5, 1.0)
        asked = parse_retry_after(retry_after)
        if asked is None:
            return backoff
        return None if asked > LONGEST_WAIT else max(asked, backoff)


class Patience:
    """What is left of one budget of retries; ``wait`` spends it."""

    def __init__(self, policy: RetryPolicy, sleep: t.Callable[[float], object] | None = None) -> None:
        self._policy, self._sleep = policy, sleep
        self._attempt = 0

    def wait(self, retry_after: str | None = None) -> bool:
        """Pause before the next attempt; ``False``, and no pause, when there is none left."""
        delay = self._policy.delay(self._attempt, retry_after)
        if delay is None:
            return False
        self._attempt += 1
        (self._sleep or time.sleep)(delay)
        return True


def parse_retry_after(value: str | None) -> float | None:
    """Seconds of a ``Retry-After`` header, which may be a date; ``None`` for a missing header or nonsense."""
    text = (value or "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


@dataclass(frozen=True)
class Origin:
    """Where a connection goes. Credentials for one origin are never sent to another."""

    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        parts = urlsplit(url)
        return cls(parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80))

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"


class Response:
    """An answer. A streamed one must be read or closed; others are read already (``body``)."""

    def __init__(self, raw: http.client.HTTPResponse, url: str, release: t.Callable[[bool], None]) -> None:
        self._raw = raw
        self._release: t.Callable[[bool], None] | None = release
        self.url = url
        self.status = raw.status
        self.headers = raw.headers
        self.body = b""

    def readinto(self, buffer: t.Any) -> int:
        """Fill a part of ``buffer``; 0 at the end. Raises ``Interrupted`` when the connection breaks."""
        try:
            count = self._raw.readinto(buffer)
        except (OSError, http.client.HTTPException) as exc:
            self.close()
            raise Interrupted(f"read {without_query(self.url)}", describe(exc)) from exc
        if not count and len(buffer):
            self._check_end()
        return count

    def read_all(self, limit: int | None = None) -> bytes:
        """The whole body, the connection given back; more than ``limit`` bytes is a ``DeliveryError``."""
        try:
            self.body = self._raw.read() if limit is None else self._raw.read(limit + 1)
            if limit is not None and len(self.body) > limit:
                raise DeliveryError(f"read {without_query(self.url)}", f"the answer is larger than {limit} bytes", "", "transport")
            self._check_end()
        except (OSError, http.client.HTTPException) as exc:
            raise Interrupted(f"read {without_query(self.url)}", describe(exc)) from exc
        finally:
            self.close()
        return self.body

    def _check_end(self) -> None:
        # Reads with a bound tell of a broken connection only by what is left.
        left = self._raw.length
        if left:
            self.close()
            raise Interrupted(f"read {without_query(self.url)}", f"the connection broke off {left} bytes before the end")

    def close(self) -> None:
        """Give the connection back, or drop it when the body was not read to its end."""
        release, self._release = self._release, None
        if release:
            whole = self._raw.isclosed() and not self._raw.will_close
            self._raw.close()
            release(whole)


class Transport:
    """Connections to any number of origins; safe to use from several threads."""

    def __init__(self, options: ClientOptions) -> None:
        self._options = options
        self._lock = threading.Lock()
        self._idle: dict[Origin, list[http.client.HTTPConnection]] = {}
        # Whoever asks, from however many threads: no more questions at a time than the registry was to get.
        self._turns = threading.BoundedSemaphore(options.questions)
        self._tls: ssl.SSLContext | None = None
        self.policy = RetryPolicy(options.retries)

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()

    def send(
        self,
        method: str,
        url: str,
        headers: t.Mapping[str, str],
        body: bytes | None = None,
        chunks: t.Iterable[t.Any] | None = None,
        stream: bool = False,
        limit: int | None = None,
        retry: bool = True,
    ) -> Response:
        """Send one request, follow redirects of GET and HEAD, and ask again what may be asked again.

        ``chunks`` is a body that exists once, so such a request is never repeated here. An answer that asks for
        patience (408, 429, 5xx) comes back as ``Interrupted`` when the budget is used up; every other status is the caller's to judge.
        """
        if urlsplit(url).scheme == "http" and not self._options.plain_http:
            tried = f"{method} {without_query(url)}"
            raise DeliveryError(tried, "it would be sent unencrypted", "Set plain_http if that is meant.", "config")
        patience = Patience(self.policy)
        # A body that exists once cannot be sent again.
        again = retry and chunks is None
        while True:
            retry_after = None
            try:
                # A stream has its turn until it begins, an upload none: it lasts as long as what feeds it, perhaps from the same registry.
                with self._turns if chunks is None else contextlib.nullcontext():
                    response = self._follow(method, url, headers, body, chunks, stream)
                    if response.status not in RETRY_STATUSES:
                        if not stream:
                            response.read_all(limit)
                        return response
                    retry_after = response.headers.get("Retry-After")
                    response.read_all()
                asked = parse_retry_after(retry_after)
                failure = Interrupted(
                    f"{method} {without_query(url)}",
                    f"the registry answered {answer_of(response)}",
                    f"It asks for {asked:.0f} seconds of patience." if asked else "Look at the registry's log, then run again.",
                )
                failure.retry_after = retry_after
            except Interrupted as exc:
                failure = exc
            if not again or not patience.wait(retry_after):
                failure.final = again
                raise failure

    def _follow(
        self, method: str, url: str, headers: t.Mapping[str, str], body: bytes | None, chunks: t.Iterable[t.Any] | None, stream: bool
    ) -> Response:
        own = Origin.of(url)
        current, sent = url, dict(headers)
        for _hop in range(_MAX_REDIRECTS + 1):
            response = self._once(method, current, sent, body, chunks)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or method not in ("GET", "HEAD") or not location:
                return response
            response.read_all()
            current = urljoin(current, location)
            target = Origin.of(current)
            if target.scheme not in ("http", "https") or (target.scheme == "http" and not self._options.plain_http):
                raise DeliveryError(
                    f"read {without_query(url)}",
                    f"the registry sends us on to {target.scheme}://{target.netloc}",
                    "Correct the redirect in the registry's storage settings.",
                    "config",
                )
            if target != own:
                sent.pop("Authorization", None)
        raise DeliveryError(
            f"read {without_query(url)}",
            f"it is redirected more than {_MAX_REDIRECTS} times",
            "Correct the registry's storage settings.",
            "config",
        )

    def _once(self, method: str, url: str, headers: t.Mapping[str, str], body: bytes | None, chunks: t.Iterable[t.Any] | None) -> Response:
        origin = Origin.of(url)
        parts = urlsplit(url)
        proxy = proxy_for(origin)
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        values = {"User-Agent": USER_AGENT, **headers}
        if proxy and origin.scheme == "http":
            target = f"http://{origin.netloc}{target}"
            values.update(_proxy_headers(proxy))
        while True:
            connection, fresh = self._connection(origin, proxy)
            try:
                raw = self._exchange(connection, method, target, values, body, chunks)
            except (OSError, http.client.HTTPException) as exc:
                connection.close()
                # The server may have closed a kept-alive connection a moment before we used it: not a failure yet.
                if not fresh and chunks is None and not isinstance(exc, _TIMEOUTS):
                    continue
                raise self._failure(method, url, origin, proxy, exc) from exc
            except BaseException:
                connection.close()
                raise
            if proxy and raw.status == 407:
                connection.close()
                raise _proxy_refusal(origin, proxy, "407 Proxy Authentication Required")
            return Response(raw, url, functools.partial(self._give_back, origin, connection))

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        target: str,
        headers: t.Mapping[str, str],
        body: bytes | None,
        chunks: t.Iterable[t.Any] | None,
    ) -> http.client.HTTPResponse:
        try:
            connection.request(method, target, body=chunks if chunks is not None else body, headers=dict(headers))
        except (BrokenPipeError, ConnectionResetError, ssl.SSLEOFError) as exc:
            # A server that refuses a body answers and closes while we still send: its answer says more than the broken pipe.
            try:
                return connection.getresponse()
            except (OSError, http.client.HTTPException):
                raise exc from None
        return connection.getresponse()

    def _connection(self, origin: Origin, proxy: str | None) -> tuple[http.client.HTTPConnection, bool]:
        with self._lock:
            idle = self._idle.get(origin)
            while idle:
                kept = idle.pop()
                # What can be read while no answer is due is the end of the connection: a body that exists once must not find it out.
                if not _readable(kept.sock):
                    return kept, False
                kept.close()
        connection: http.client.HTTPConnection
        via = Origin.of(proxy) if proxy else origin
        if origin.scheme == "https":
            connection = http.client.HTTPSConnection(via.host, via.port, timeout=self._options.timeout, context=self._context())
            if proxy:
                connection.set_tunnel(origin.host, origin.port, headers=_proxy_headers(proxy))
        else:
            connection = http.client.HTTPConnection(via.host, via.port, timeout=self._options.timeout)
        return connection, True

    def _give_back(self, origin: Origin, connection: http.client.HTTPConnection, whole: bool) -> None:
        if whole:
            with self._lock:
                self._idle.setdefault(origin, []).append(connection)
        else:
            connection.close()

    def _context(self) -> ssl.SSLContext:
        with self._lock:
            if self._tls is None:
                self._tls = _tls_context(self._options)
            return self._tls

    def _failure(self, method: str, url: str, origin: Origin, proxy: str | None, exc: Exception) -> DeliveryError:
        tried = f"reach the registry {origin.netloc}" + (f" through the proxy {Origin.of(proxy).netloc}" if proxy else "")
        refused = re.match(r"Tunnel connection failed: (4\d\d.*)", str(exc))
        if proxy and refused:
            return _proxy_refusal(origin, proxy, refused.group(1))
        if isinstance(exc, ssl.SSLCertVerificationError):
            return DeliveryError(
                tried,
                f"its certificate is not accepted ({exc.verify_message or exc.reason})",
                "Name the CA that signed it in ca_path, or give the registry a certificate for this name.",
                "config",
            )
        if isinstance(exc, ssl.SSLError) and exc.reason in ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "RECORD_LAYER_FAILURE"):
            return DeliveryError(
                tried, "it does not speak TLS", "Set plain_http if it is meant to be reached without encryption.", "config"
            )
        if isinstance(exc, ssl.SSLError) and _CLIENT_ALERT.search(exc.reason or ""):
            given = "does not accept the certificate in client_cert" if self._options.client_cert else "wants a client certificate"
            return DeliveryError(
                tried, f"it {given} ({exc.reason})", "Name one that the registry's CA signed in client_cert and client_key.", "config"
            )
        if isinstance(exc, socket.gaierror):
            name = Origin.of(proxy).host if proxy else origin.host
            return Interrupted(tried, f"the name {name} is not known ({exc.strerror})", "Correct the name, or look at DNS.")
        if isinstance(exc, ConnectionRefusedError):
            return Interrupted(tried, "nothing listens there (connection refused)", "Start the registry, or correct the address.")
        if isinstance(exc, _TIMEOUTS):
            return Interrupted(tried, f"no answer within {self._options.timeout:g} seconds", "Look at the network and the registry.")
        return Interrupted(f"{method} {without_query(url)}", describe(exc), "Look at the network and the registry, then run again.")


def _tls_context(options: ClientOptions) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if options.ca_path:
        try:
            if os.path.isdir(options.ca_path):
                context.load_verify_locations(capath=options.ca_path)
            else:
                context.load_verify_locations(cafile=options.ca_path)
        except (OSError, ssl.SSLError) as exc:
            reason = "it does not exist" if isinstance(exc, FileNotFoundError) else f"no certificate can be read from it ({describe(exc)})"
            raise DeliveryError(
                f"load the CA {options.ca_path}", reason, "Correct ca_path: a PEM file or a directory of hashed ones.", "config"
            ) from exc
    if options.client_cert:
        try:
            # A password that is given keeps OpenSSL from asking the terminal for one.
            context.load_cert_chain(options.client_cert, options.client_key, password="")
        except (OSError, ssl.SSLError) as exc:
            reason = (
                "a file of the two does not exist"
                if isinstance(exc, FileNotFoundError)
                else f"no certificate with a fitting key can be read ({describe(exc)})"
            )
            raise DeliveryError(
                f"load the client certificate {options.client_cert}",
                reason,
                "Correct client_cert and client_key: PEM files, the key without a passphrase.",
                "config",
            ) from exc
    if not options.validate_certs:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context


def proxy_for(origin: Origin) -> str | None:
    """The proxy that the environment names for ``origin``; never one for this machine itself."""
    if _is_loopback(origin.host):
        return None
    proxies = urllib.request.getproxies_environment()
    proxy = proxies.get(origin.scheme) or proxies.get("all")
    if not proxy or bypassed(origin, proxies.get("no") or ""):
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    parts = urlsplit(proxy)
    if parts.scheme != "http" or not parts.hostname:
        raise DeliveryError(
            f"use the proxy of {origin.scheme}_proxy",
            f"it is a {parts.scheme} proxy",
            "Only http:// proxies can be used; or name the registry in no_proxy.",
            "config",
        )
    return proxy


def bypassed(origin: Origin, no_proxy: str) -> bool:
    """Whether ``no_proxy`` names ``origin``: ``*``, a name with all below it, an address or a network, each with an optional port."""
    for entry in filter(None, re.split(r"[,\s]+", no_proxy.lower())):
        match = re.match(r"(?:\[(?P<v6>[^]]+)\]|(?P<name>[^:]*))(?::(?P<port>\d+))?\Z", entry)
        name, port = (match.group("v6") or match.group("name"), match.group("port")) if match else (entry, None)
        if port and int(port) != origin.port:
            continue
        try:
            if ipaddress.ip_address(origin.host) in ipaddress.ip_network(name, strict=False):
                return True
        except ValueError:
            # One of them is a name; nobody else asks DNS here either.
            bare = name[1:] if name.startswith("*.") else name
            if name == "*" or origin.host == bare.lstrip(".") or (bare and origin.host.endswith("." + bare.lstrip("."))):
                return True
    return False


def _proxy_refusal(origin: Origin, proxy: str, answer: str) -> DeliveryError:
    return DeliveryError(
        f"reach the registry {origin.netloc}",
        f"the proxy {Origin.of(proxy).netloc} answered {answer}",
        "Correct user and password in the proxy variable, let the proxy pass this registry, or name the registry in no_proxy.",
        "config",
    )


def _readable(connection: socket.socket | None) -> bool:
    if connection is None:
        return True
    poll = select.poll()
    poll.register(connection, select.POLLIN)
    return bool(poll.poll(0))


def _is_loopback(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _proxy_headers(proxy: str) -> dict[str, str]:
    parts = urlsplit(proxy)
    if not parts.username:
        return {}
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Proxy-Authorization": "Basic " + base64.b64encode(login.encode()).decode()}


def describe(exc: BaseException) -> str:
    """An exception of the network in a few words, without its Python name where the system has better ones."""
    if isinstance(exc, http.client.RemoteDisconnected):
        return "the connection was closed before an answer came"
    if isinstance(exc, http.client.IncompleteRead):
        return f"the connection broke off after {len(exc.partial)} bytes of the body"
    if isinstance(exc, _TIMEOUTS):
        return "no data came in time"
    if isinstance(exc, OSError) and exc.strerror:
        return exc.strerror
    return str(exc) or type(exc).__name__


def answer_of(response: Response) -> str:
    """``401 UNAUTHORIZED: authentication required`` from a registry's error body that has been read."""
    try:
        errors = json.loads(response.body).get("errors")
        words = [[error.get(key) for key in ("code", "message", "detail")] for error in errors]
        told = "; ".join(": ".join(word for word in told if word and isinstance(word, str)) for told in words)
    except (ValueError, AttributeError, TypeError):
        told = response.body[:200].decode(errors="replace").strip()
    return f"{response.status} {told}".strip()


def without_query(url: str) -> str:
    """``url`` as it may be shown: the query can hold signatures and upload state."""
    return url.split("?", 1)[0]
