# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What can be asked: one check is a name and exactly one probe, read strictly."""

from __future__ import annotations

import difflib
import re
import typing as t
from dataclasses import dataclass
from urllib.parse import urlsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.network import shown_url, tls_context
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.query import compile_query

_SECONDS = (int, float)
_TLS: dict[str, tuple[t.Any, bool]] = {"validate_certs": (bool, False), "ca_path": (str, False), "server_name": (str, False)}

#: Keys of each probe: the type, and whether it is required.
PROBES: dict[str, dict[str, tuple[t.Any, bool]]] = {
    "http": {
        "url": (str, True),
        "status": (list, False),
        "headers": (dict, False),
        "bearer_token": (str, False),
        "query": (str, False),
        "method": (str, False),
        **_TLS,
        "follow_redirects": (bool, False),
        "unix_socket": (str, False),
        "connect_to": (str, False),
        "timeout": (_SECONDS, False),
    },
    "tcp": {"host": (str, False), "port": (int, False), "unix_socket": (str, False), "timeout": (_SECONDS, False)},
    "grpc": {
        "host": (str, False),
        "port": (int, False),
        "unix_socket": (str, False),
        "service": (str, False),
        "tls": (bool, False),
        **_TLS,
        "timeout": (_SECONDS, False),
    },
    "container": {"name": (str, True), "state": (str, False)},
    "service": {"project": (str, True), "service": (str, True), "state": (str, False)},
    "log": {"container": (str, True), "pattern": (str, True)},
    "systemd": {"unit": (str, True)},
    "command": {"argv": (list, True), "container": (str, False), "timeout": (_SECONDS, False)},
}
COMMON: dict[str, tuple[t.Any, bool]] = {
    "name": (str, False),
    "stable": (int, False),
    "timeout": (_SECONDS, False),
    "watch": (str, False),
}
CONTAINER_STATES = ("auto", "healthy", "running")
#: Seconds for one try of a probe that talks to something.
TRY_TIMEOUT = 5.0
#: Longest name of a gRPC service: with it the whole request still fits into the window that every server starts with.
GRPC_NAME = 1000
_HEADER = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True)
class Check:
    """One parsed check. ``stable`` and ``timeout`` (seconds) are ``None`` where the caller's count; ``watch`` is a container.

    ``compiled``: the JMESPath expression of an HTTP check with ``query``, the regular expression of a log check.
    """

    name: str
    kind: str
    options: t.Mapping[str, t.Any]
    stable: int | None = None
    timeout: float | None = None
    watch: str = ""
    compiled: t.Any = None


def parse_checks(raw: t.Sequence[t.Mapping[str, t.Any]]) -> list[Check]:
    """Check a list of one-probe dicts; every mistake is ``DeliveryError(config)`` with the path of the key."""
    if not isinstance(raw, (list, tuple)) or not raw:
        raise DeliveryError("checks", "not a list of at least one check")
    checks = [_parse_check(entry, f"checks[{index}]") for index, entry in enumerate(raw)]
    names: set[str] = set()
    for index, check in enumerate(checks):
        if check.name in names:
            raise DeliveryError(f"checks[{index}].name", f"{check.name!r} is there twice", "Results are told by name.")
        names.add(check.name)
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
    where = f"{path}.{kind}"
    options = given[kind]
    if not isinstance(options, dict):
        raise DeliveryError(where, "not a map")
    options = {key: value for key, value in options.items() if value is not None}
    if kind == "container" and "id" in options:
        options.setdefault("name", options.pop("id"))
        options.pop("id", None)
    _known(options, list(PROBES[kind]), where)
    _typed(options, PROBES[kind], where)
    _typed({key: value for key, value in given.items() if key in COMMON}, COMMON, path)
    if given.get("stable", 1) < 1:
        raise DeliveryError(f"{path}.stable", "must be 1 or more")
    for key, value in ((f"{path}.timeout", given.get("timeout", 1)), (f"{where}.timeout", options.get("timeout", 1))):
        if not 0 < value < float("inf"):
            raise DeliveryError(key, f"{value!r} is no number of seconds above 0")
    compiled = _READERS[kind](options, where) if kind in _READERS else None
    return Check(
        name=given.get("name") or _default_name(kind, options),
        kind=kind,
        options=options,
        stable=given.get("stable"),
        timeout=given.get("timeout"),
        watch=given.get("watch", ""),
        compiled=compiled,
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


# -- what each kind holds to beyond the types of its keys; what was compiled on the way


def _read_http(options: t.Mapping[str, t.Any], path: str) -> t.Any:
    _read_url(options["url"], f"{path}.url")
    if not all(isinstance(code, int) and 100 <= code <= 599 for code in options.get("status", ())):
        raise DeliveryError(f"{path}.status", f"{options['status']!r} is not a list of HTTP statuses")
    if options.get("connect_to") and not re.fullmatch(r"(\[[^]\s]+\]|[^:\s]+):\d{1,5}", options["connect_to"]):
        raise DeliveryError(f"{path}.connect_to", f"{options['connect_to']!r} is not host:port")
    if not re.fullmatch(r"[A-Za-z]+", options.get("method", "GET")):
        raise DeliveryError(f"{path}.method", f"{options['method']!r} is no HTTP method")
    for key, value in (options.get("headers") or {}).items():
        if not _HEADER.fullmatch(str(key)):
            raise DeliveryError(f"{path}.headers", f"{key!r} is no name of a header")
        _read_header(str(value), f"{path}.headers.{key}")
    _read_header(options.get("bearer_token", ""), f"{path}.bearer_token")
    _read_tls(options, path)
    return compile_query(options["query"], f"{path}.query") if options.get("query") else None


def _read_header(value: str, path: str) -> None:
    # Its value may be a secret: never shown.
    if not value.isascii() or not value.isprintable():
        seen = "holds a line end or another character that no header can"
        raise DeliveryError(path, seen, "Read from a file, text has a line end behind it.")


def _read_address(options: t.Mapping[str, t.Any], path: str) -> None:
    if bool(options.get("unix_socket")) == ("host" in options or "port" in options):
        raise DeliveryError(path, "must have either host and port, or unix_socket")
    if options.get("unix_socket"):
        return
    for key in ("host", "port"):
        if not options.get(key):
            raise DeliveryError(f"{path}.{key}", "missing")
    if not 0 < options["port"] < 65536:
        raise DeliveryError(f"{path}.port", f"{options['port']} is no port")


def _read_grpc(options: t.Mapping[str, t.Any], path: str) -> None:
    _read_address(options, path)
    if len(options.get("service", "").encode()) > GRPC_NAME:
        raise DeliveryError(f"{path}.service", f"is longer than {GRPC_NAME} bytes")
    for key in ("ca_path", "server_name"):
        if options.get(key) and not options.get("tls"):
            raise DeliveryError(f"{path}.{key}", "is only used with tls: true")
    _read_tls(options, path)


def _read_tls(options: t.Mapping[str, t.Any], path: str) -> None:
    if options.get("ca_path"):
        tls_context(options, f"{path}.ca_path")
    if not re.fullmatch(r"[A-Za-z0-9_:]([A-Za-z0-9_.:-]*[A-Za-z0-9_:])?", options.get("server_name", "a")):
        raise DeliveryError(f"{path}.server_name", f"{options['server_name']!r} is no name of a server")


def _read_log(options: t.Mapping[str, t.Any], path: str) -> re.Pattern[str]:
    try:
        return re.compile(options["pattern"])
    except (re.error, RecursionError, OverflowError) as exc:
        raise DeliveryError(f"{path}.pattern", f"{options['pattern']!r} is no regular expression: {exc}") from exc


def _read_command(options: t.Mapping[str, t.Any], path: str) -> None:
    if not options["argv"] or not all(isinstance(word, str) and "\0" not in word for word in options["argv"]) or not options["argv"][0]:
        raise DeliveryError(f"{path}.argv", "not a list of words")


def _read_state(options: t.Mapping[str, t.Any], path: str) -> None:
    if options.get("state", "auto") not in CONTAINER_STATES:
        raise DeliveryError(f"{path}.state", f"{options['state']!r} is not one of {', '.join(CONTAINER_STATES)}")


_READERS: dict[str, t.Callable[[t.Mapping[str, t.Any], str], t.Any]] = {
    "http": _read_http,
    "tcp": _read_address,
    "grpc": _read_grpc,
    "container": _read_state,
    "service": _read_state,
    "log": _read_log,
    "command": _read_command,
}


def _default_name(kind: str, options: t.Mapping[str, t.Any]) -> str:
    if kind == "http":
        return shown_url(options["url"])
    if kind in ("tcp", "grpc"):
        name = str(options.get("unix_socket") or f"{options['host']}:{options['port']}")
        return f"{name} {options['service']}" if options.get("service") else name
    if kind == "service":
        return f"{options['project']}/{options['service']}"
    if kind == "log":
        return f"{options['container']} says {options['pattern']}"
    return str(options.get("name") or options.get("unit") or options["argv"][0])


def _read_url(url: str, path: str) -> None:
    try:
        parts = urlsplit(url)
        good = parts.scheme in ("http", "https") and parts.hostname and (parts.port is None or parts.port > 0)
        # What urlsplit lets pass and no request can hold: better told now than at every try.
        good = good and (parts.path + parts.query).isascii() and url.isprintable() and " " not in url
    except ValueError:
        good = False
    if not good:
        raise DeliveryError(path, f"{shown_url(url)!r} is not an http or https URL")
