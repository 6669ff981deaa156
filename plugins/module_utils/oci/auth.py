# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who we are to a registry: options, the Docker config file and its helpers, Basic and bearer tokens."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import threading
import time
import typing as t
from dataclasses import dataclass
from urllib.parse import urlencode, urlsplit

from ansible_collections.selfhost.delivery.plugins.module_utils import command
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import DOCKER_HUB

_HELPER_TIMEOUT = 30.0
#: Seconds before its end at which a token is not used any more.
_TOKEN_MARGIN = 5.0

#: ``fetch(method, url, headers, body) -> (status, body)``; retries and TLS are the caller's.
Fetch = t.Callable[[str, str, t.Dict[str, str], t.Optional[bytes]], t.Tuple[int, bytes]]  # noqa: UP006 - evaluated at run time


@dataclass(frozen=True)
class Credentials:
    """``identity`` is a refresh token for the token server, ``token`` a bearer token for the registry itself."""

    username: str = ""
    password: str = ""
    identity: str = ""
    token: str = ""

    def __repr__(self) -> str:
        return f"Credentials(username={self.username!r})"

    def __bool__(self) -> bool:
        return bool(self.username or self.identity or self.token)

    @property
    def basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.username}:{self.password}".encode()).decode()


@dataclass(frozen=True)
class Challenge:
    """One scheme of a ``WWW-Authenticate`` header, its name in lower case."""

    scheme: str
    parameters: t.Mapping[str, str]


_CHALLENGE_TOKEN = re.compile(
    r"""\s*(?:,\s*)*(?:
        (?P<key>[!#$%&'*+.^_`|~0-9A-Za-z-]+)\s*=\s*(?:"(?P<quoted>(?:[^"\\]|\\.)*)"|(?P<plain>[^\s,"]*))
        |(?P<scheme>[!#$%&'*+.^_`|~0-9A-Za-z-]+)(?=\s|,|\Z)
    )""",
    re.VERBOSE,
)


def parse_challenges(headers: t.Iterable[str]) -> list[Challenge]:
    """Read all ``WWW-Authenticate`` headers of one answer; what cannot be read is left out."""
    found: list[Challenge] = []
    for header in headers:
        position = 0
        parameters: dict[str, str] | None = None
        while position < len(header):
            match = _CHALLENGE_TOKEN.match(header, position)
            if not match or match.end() == position:
                break
            position = match.end()
            if match.group("scheme"):
                parameters = {}
                found.append(Challenge(match.group("scheme").lower(), parameters))
            elif parameters is not None:
                quoted = match.group("quoted")
                value = match.group("plain") if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
                parameters.setdefault(match.group("key").lower(), value)
    return found


def merge_scopes(*scopes: str) -> tuple[str, ...]:
    """Join scopes ``repository:name:pull,push`` of one resource into one, sorted, each action once."""
    actions: dict[str, set[str]] = {}
    for scope in scopes:
        resource, colon, granted = scope.rpartition(":")
        if colon:
            actions.setdefault(resource, set()).update(granted.split(","))
    return tuple(f"{resource}:{','.join(sorted(granted))}" for resource, granted in sorted(actions.items()))


# -- the Docker config file ----------------------------------------------------------------------------------------


def find_credentials(registry: str, options: ClientOptions) -> Credentials:
    """The credentials of the options, else those that Docker would use for ``registry``, else none.

    Raises ``DeliveryError`` (config) for an unreadable config file or a helper that is missing or fails.
    """
    if options.token:
        return Credentials(token=options.token)
    if options.username and options.password:
        return Credentials(options.username, options.password)
    path = config_path(options.docker_config)
    return _from_config(_load_config(path, required=bool(options.docker_config)), registry, path)


def config_path(configured: str | None) -> str:
    """The config file: the option (file or directory), else ``DOCKER_CONFIG``, else ``~/.docker``."""
    path = configured or os.environ.get("DOCKER_CONFIG") or os.path.join(os.path.expanduser("~"), ".docker")
    return os.path.join(path, "config.json") if os.path.isdir(path) or not path.endswith(".json") else path


def _load_config(path: str, required: bool) -> dict[str, t.Any]:
    tried = f"read the Docker config file {path}"
    try:
        with open(path, encoding="utf-8") as handle:
            content = json.load(handle)
    except FileNotFoundError:
        if required:
            raise DeliveryError(tried, "it does not exist", "Run docker login, or correct docker_config.", "config") from None
        return {}
    except OSError as exc:
        raise DeliveryError(tried, exc.strerror or str(exc), "Make it readable for the user that runs this.", "config") from exc
    except ValueError as exc:
        raise DeliveryError(tried, "it is not JSON", "Run docker login again, or mend the file.", "config") from exc
    if not isinstance(content, dict):
        raise DeliveryError(tried, "it is not a JSON object", "Run docker login again, or mend the file.", "config")
    return content


def _from_config(config: t.Mapping[str, t.Any], registry: str, path: str) -> Credentials:
    server = "https://index.docker.io/v1/" if registry == DOCKER_HUB else registry
    helpers = config.get("credHelpers") or {}
    helper = helpers.get(registry) or helpers.get(server) or config.get("credsStore")
    if helper:
        found = _ask_helper(str(helper), server)
        if found:
            return found
    entries = config.get("auths") or {}
    for key in (server, registry):
        if key in entries:
            return _read_entry(entries[key] or {}, key, path)
    for key, entry in entries.items():
        if _host_of(key) == _host_of(server):
            return _read_entry(entry or {}, key, path)
    return Credentials()


def _host_of(key: str) -> str:
    return key.split("://", 1)[-1].split("/", 1)[0].lower()


def _read_entry(entry: t.Mapping[str, t.Any], key: str, path: str) -> Credentials:
    username, password = str(entry.get("username") or ""), str(entry.get("password") or "")
    if entry.get("auth"):
        try:
            username, _colon, password = base64.b64decode(str(entry["auth"]), validate=True).decode().rstrip("\0").partition(":")
        except (binascii.Error, UnicodeDecodeError) as exc:
            raise DeliveryError(
                f"read the Docker config file {path}", f"the entry {key!r} cannot be decoded", f"Run docker login {key} again.", "config"
            ) from exc
    return Credentials(username, password, str(entry.get("identitytoken") or ""), str(entry.get("registrytoken") or ""))


def _ask_helper(name: str, server: str) -> Credentials:
    program = f"docker-credential-{name}"
    tried = f"ask {program} for the credentials of {server}"
    if "/" in name:
        raise DeliveryError(
            tried, "a helper is named, not given by path", "Correct credHelpers or credsStore in the Docker config file.", "config"
        )
    try:
        result = command.run([program, "get"], timeout=_HELPER_TIMEOUT, stdin=server)
    except FileNotFoundError as exc:
        raise DeliveryError(
            tried,
            "the program is not installed",
            "Install it, or take it out of credHelpers or credsStore in the Docker config file.",
            "config",
        ) from exc
    if not result.ok:
        said = (result.stdout + result.stderr).lower()
        if "credentials not found" in said:
            return Credentials()
        # What a helper prints may hold a secret: only its exit code is told.
        reason = "it did not answer in time" if result.timed_out else f"it ended with exit code {result.code}"
        raise DeliveryError(tried, reason, "Run it by hand to see why.", "config")
    try:
        answer = json.loads(result.stdout)
        username, secret = str(answer["Username"]), str(answer["Secret"])
    except (ValueError, KeyError, TypeError) as exc:
        raise DeliveryError(tried, "its answer is not what Docker's helpers answer", "Run it by hand to see why.", "config") from exc
    return Credentials(identity=secret) if username == "<token>" else Credentials(username, secret)


# -- answers to challenges -----------------------------------------------------------------------------------------


class Authenticator:
    """The ``Authorization`` of one registry, shared by all its connections.

    Nothing is sent before the registry asked for it once; from then on each scope set has its own
    token, renewed shortly before its end.
    """

    def __init__(self, registry: str, credentials: t.Callable[[], Credentials], fetch: Fetch, allow_plain: bool = False) -> None:
        self._registry = registry
        self._find = credentials
        self._fetch = fetch
        self._allow_plain = allow_plain
        self._lock = threading.Lock()
        self._credentials: Credentials | None = None
        self._basic = False
        self._realm: Challenge | None = None
        self._tokens: dict[tuple[str, ...], tuple[str, float]] = {}

    @property
    def credentials(self) -> Credentials:
        if self._credentials is None:
            self._credentials = self._find()
        return self._credentials

    def header(self, scopes: t.Sequence[str]) -> str | None:
        """What to send unasked: ``None`` until the registry has challenged us."""
        with self._lock:
            if self._basic:
                return self.credentials.basic
            if self._realm is None:
                return None
            return self._token(merge_scopes(*scopes))

    def answer(self, challenges: t.Sequence[Challenge], scopes: t.Sequence[str], sent: str | None) -> str | None:
        """What to send after a 401 to a request that carried ``sent``; ``None`` when there is nothing better.

        Raises ``DeliveryError`` (config) when the token server refuses the credentials.
        """
        with self._lock:
            for challenge in challenges:
                if challenge.scheme == "bearer" and (challenge.parameters.get("realm") or self.credentials.token):
                    self._realm = challenge
                    wanted = merge_scopes(*scopes, *challenge.parameters.get("scope", "").split())
                    cached = self._tokens.get(wanted)
                    if cached and f"Bearer {cached[0]}" == sent:
                        del self._tokens[wanted]
                    header = self._token(wanted)
                    # Requests ask by their own scopes; what the registry added must be found again under those.
                    if wanted in self._tokens:
                        self._tokens[merge_scopes(*scopes)] = self._tokens[wanted]
                    return header if header != sent else None
            for challenge in challenges:
                if challenge.scheme == "basic" and self.credentials.username:
                    self._basic = True
                    return self.credentials.basic if self.credentials.basic != sent else None
        return None

    def _token(self, scopes: tuple[str, ...]) -> str:
        if self.credentials.token:
            return f"Bearer {self.credentials.token}"
        cached = self._tokens.get(scopes)
        if cached and time.monotonic() < cached[1]:
            return f"Bearer {cached[0]}"
        token, lifetime = self._fetch_token(scopes)
        self._tokens[scopes] = (token, time.monotonic() + max(lifetime - _TOKEN_MARGIN, lifetime / 2))
        return f"Bearer {token}"

    def _fetch_token(self, scopes: tuple[str, ...]) -> tuple[str, float]:
        parameters = self._realm.parameters if self._realm else {}
        realm, service = parameters.get("realm", ""), parameters.get("service", "")
        tried = f"get a token for {self._registry} from {realm}"
        if urlsplit(realm).scheme != "https" and not (urlsplit(realm).scheme == "http" and self._allow_plain):
            raise DeliveryError(
                tried,
                "the token server is not reached over https",
                "Correct the realm in the registry's configuration, or ask for plain_http.",
                "config",
            )
        credentials = self.credentials
        if credentials.identity:
            form = {
                "grant_type": "refresh_token",
                "service": service,
                "client_id": "selfhost.delivery",
                "scope": " ".join(scopes),
                "refresh_token": credentials.identity,
            }
            status, body = self._fetch("POST", realm, {"Content-Type": "application/x-www-form-urlencoded"}, urlencode(form).encode())
        else:
            query = [("service", service)] if service else []
            query += [("scope", scope) for scope in scopes]
            if credentials.username:
                query.append(("account", credentials.username))
            url = realm + ("&" if "?" in realm else "?") + urlencode(query)
            status, body = self._fetch("GET", url, {"Authorization": credentials.basic} if credentials.username else {}, None)
        if status in (400, 401, 403):
            raise refused_credentials(tried, self._registry, credentials, f"it answered {status}")
        if status != 200:
            raise DeliveryError(tried, f"it answered {status}", "Look at the token server.", "transport")
        try:
            answer = json.loads(body)
            token = answer.get("token") or answer.get("access_token")
            lifetime = float(answer.get("expires_in") or 60)
        except (ValueError, TypeError, AttributeError) as exc:
            raise DeliveryError(tried, "its answer is not what token servers answer", "Look at the token server.", "transport") from exc
        if not token:
            raise DeliveryError(tried, "its answer holds no token", "Look at the token server.", "transport")
        return str(token), lifetime


def refused_credentials(tried: str, registry: str, credentials: Credentials, seen: str) -> DeliveryError:
    """The one message for wrong, missing or too weak credentials."""
    if not credentials:
        reason = f"{registry} wants credentials and none were given ({seen})"
        remedy = f"Give username and password, or run docker login {registry} as the user that runs this."
    elif credentials.username:
        reason = f"{registry} refused the user {credentials.username!r} ({seen})"
        remedy = "Correct the password, or give the user access to this repository."
    else:
        reason = f"{registry} refused the token ({seen})"
        remedy = "Renew it, or give it access to this repository."
    return DeliveryError(tried, reason, remedy, "config")
