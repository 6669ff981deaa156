# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""``delivery_app``: the one description of an app, read strictly, with every default filled in.

Everything wrong with a description is said at once, each by its path, and before anything is touched.
"""

from __future__ import annotations

import difflib
import re
import typing as t
from dataclasses import asdict, dataclass
from urllib.parse import urlsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

STRATEGIES = ("auto", "start_first", "stop_first")
CONSISTENCIES = ("none", "pause", "stop", "hooks")
RESTORE_POLICIES = ("auto", "always", "never")
MIGRATION_KINDS = ("compatible", "breaking")

#: Tags that move by their nature, whatever ``policies.immutable_tags`` says.
MOVING_TAGS = frozenset(
    ("latest", "main", "master", "trunk", "stable", "edge", "nightly", "dev", "develop", "local", "development", "staging", "production")
)
#: Names inside a release folder that belong to the collection.
RESERVED_FILES = frozenset(("deploy.env", "release.json", "rollout.json", "journal.jsonl"))

_PROJECT = re.compile(r"[a-z0-9][a-z0-9_-]*")
_SERVICE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_IMAGE_NAME = re.compile(r"[a-z][a-z0-9_-]*")
_ENVIRONMENT = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_TAG = _ENVIRONMENT
_HOST = re.compile(r"(\*\.)?[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)*")
_REPOSITORY = re.compile(
    r"(?:(?:[A-Za-z0-9.-]+|\[[0-9a-fA-F:]+\])(?::[0-9]+)?/)?[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*)*"
)


@dataclass(frozen=True)
class Image:
    """``source``: where CI pushed it; ``repository``: where this environment pulls it from. Both without a tag."""

    source: str
    repository: str


@dataclass(frozen=True)
class Service:
    """A built service. Times in seconds. ``ready``: one probe (``http``, ``tcp`` or ``command``), empty for health or running."""

    image: str
    port: int | None
    strategy: str
    ready: dict[str, t.Any]
    ready_timeout: float
    stable: int
    drain_timeout: float
    stop_timeout: float
    single: bool


@dataclass(frozen=True)
class Migrator:
    service: str
    image: str
    timeout: float


@dataclass(frozen=True)
class Snapshot:
    """``hooks``: ``{container, before, after}``, the last two a program and its arguments."""

    consistency: str
    paths: list[str]
    hooks: list[dict[str, t.Any]]


@dataclass(frozen=True)
class Route:
    """``host`` empty: every name."""

    service: str
    host: str


@dataclass(frozen=True)
class Public:
    """``version``: JMESPath into the ready answer, empty when it is not asked."""

    url: str
    ready: str
    version: str
    validate_certs: bool
    timeout: float


@dataclass(frozen=True)
class Policies:
    restore: str
    migrations: str
    immutable_tags: list[str]
    gates: list[str]
    keep_releases: int


@dataclass(frozen=True)
class App:
    """A description that holds together. ``volumes`` is ``None`` for every named volume of the project.

    ``notify`` may hold secrets (addresses of webhooks, a password).
    """

    name: str
    environment: str
    project: str
    compose_files: list[str]
    env_files: list[str]
    images: dict[str, Image]
    services: dict[str, Service]
    order: list[str]
    migrator: Migrator | None
    volumes: list[str] | None
    snapshot: Snapshot
    routes: list[Route]
    public: Public | None
    policies: Policies
    notify: dict[str, t.Any]
    git: dict[str, t.Any]

    def as_dict(self) -> dict[str, t.Any]:
        return asdict(self)

    @property
    def image_variables(self) -> dict[str, str]:
        """Image name to the variable the Compose file uses: ``app`` to ``APP_IMAGE``."""
        return {name: image_variable(name) for name in self.images}

    @property
    def service_images(self) -> dict[str, str]:
        """Compose service to image name, the migrator's included."""
        images = {name: service.image for name, service in self.services.items()}
        if self.migrator:
            images[self.migrator.service] = self.migrator.image
        return images

    @property
    def rollout(self) -> dict[str, t.Any]:
        """The parts of ``compose_rollout`` that this description decides: ``services``, ``order``, ``migrator``, ``routes``."""
        return {
            "services": {name: asdict(service) for name, service in self.services.items()},
            "order": self.order,
            "migrator": asdict(self.migrator) if self.migrator else None,
            "routes": {route.service: self.services[route.service].port for route in self.routes},
        }

    def public_check(self, tag: str | None = None) -> dict[str, t.Any] | None:
        """The check for ``ready_wait`` on the public route; without ``tag`` its query holds ``{tag}`` to be filled in."""
        if self.public is None:
            return None
        http: dict[str, t.Any] = {
            "url": self.public.url + self.public.ready,
            "validate_certs": self.public.validate_certs,
        }
        if self.public.version:
            version = self.public.version
            expression = version if re.fullmatch(r"[\w.]+", version) else f"({version})"
            http["query"] = f"{expression} == '{tag or '{tag}'}'"
        return {"name": "public", "http": http}

    def check_tag(self, tag: str) -> None:
        """Refuse a tag that is none, or that may mean another build tomorrow."""
        doing = f"Promoting {tag!r} to {self.environment}"
        patterns = ", ".join(self.policies.immutable_tags)
        if not _TAG.fullmatch(tag):
            raise DeliveryError(doing, "that is not a tag", "Give the tag of one build, such as sha-<commit>.")
        moving = tag.lower() in MOVING_TAGS or tag in (self.environment, *self.policies.gates)
        if moving or not any(re.search(pattern, tag) for pattern in self.policies.immutable_tags):
            seen = f"{tag!r} moves" if moving else f"{tag!r} does not match policies.immutable_tags ({patterns}), so it may move"
            raise DeliveryError(doing, seen, "Give an immutable tag such as sha-<commit>.", "policy")


def image_variable(name: str) -> str:
    """``app`` to ``APP_IMAGE``; a dash becomes an underscore."""
    return re.sub(r"[^A-Za-z0-9]", "_", name).upper() + "_IMAGE"


class _Section:
    """One map of the description: knows its path, refuses keys it does not know, and collects problems instead of raising.

    ``keys`` are the known ones; ``None`` where the user names them. A known key without a value is as good as absent.
    """

    def __init__(self, problems: list[str], path: str, raw: t.Any, keys: t.Iterable[str] | None) -> None:
        self.problems = problems
        self.path = path
        self.raw: dict[str, t.Any] = {}
        if raw is None:
            return
        if not isinstance(raw, t.Mapping):
            self.problems.append(f"{path}: must be a map of keys, is {_kind(raw)}")
            return
        known = list(keys) if keys is not None else None
        for key, value in raw.items():
            if not isinstance(key, str):
                self.problems.append(f"{path}: the key {key!r} must be text; put it in quotes")
            elif known is not None and key not in known:
                self.problems.append(f"{path}.{key}: unknown key{suggestion(key, known)}")
            elif value is not None or known is None:
                self.raw[key] = value

    def problem(self, key: str, text: str) -> None:
        self.problems.append(f"{self.path}.{key}: {text}")

    def section(self, key: str, keys: t.Iterable[str] | None) -> _Section:
        return _Section(self.problems, f"{self.path}.{key}", self.raw.get(key), keys)

    def sections(self, key: str, keys: t.Sequence[str]) -> list[_Section]:
        """A list of maps."""
        value = self.raw.get(key, [])
        if not isinstance(value, list):
            self.problem(key, f"must be a list, is {_kind(value)}")
            return []
        return [_Section(self.problems, f"{self.path}.{key}[{index}]", item or {}, keys) for index, item in enumerate(value)]

    def text(self, key: str, default: str | None = None, pattern: re.Pattern[str] | None = None, wanted: str = "") -> str:
        """Text, never empty unless ``default`` is; required when there is no default."""
        value = self.raw.get(key)
        if value is None:
            if default is None:
                self.problem(key, "is required")
            return default or ""
        if not isinstance(value, str):
            self.problem(key, f"must be text, is {_kind(value)}")
            return default or ""
        if not value and default != "":
            self.problem(key, "must not be empty")
        elif value and pattern is not None and not pattern.fullmatch(value):
            self.problem(key, f"{value!r} {wanted}")
        return value

    def number(self, key: str, default: float, least: float = 0) -> float:
        value = self.raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            self.problem(key, f"must be a number, is {_kind(value)}")
            return default
        if not least <= value < float("inf"):
            self.problem(key, f"must be {least:g} or more, is {value:g}")
        return value

    def integer(self, key: str, default: int | None, least: int, most: int | None = None) -> int | None:
        value = self.raw.get(key, default)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            self.problem(key, f"must be a whole number, is {_kind(value)}")
            return default
        if value < least or (most is not None and value > most):
            self.problem(key, f"must be {least} to {most}, is {value}" if most is not None else f"must be {least} or more, is {value}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.raw.get(key, default)
        if not isinstance(value, bool):
            self.problem(key, f"must be true or false, is {_kind(value)}")
            return default
        return value

    def choice(self, key: str, choices: t.Sequence[str], default: str) -> str:
        value = self.raw.get(key, default)
        if value not in choices:
            self.problem(key, f"must be one of {', '.join(choices)}, is {value!r}{suggestion(value, choices)}")
            return default
        return str(value)

    def texts(self, key: str, default: t.Sequence[str] = (), secret: bool = False) -> list[str]:
        """A list of texts without empty or double ones."""
        value = self.raw.get(key, list(default))
        if not isinstance(value, list):
            self.problem(key, f"must be a list, is {_kind(value)}")
            return list(default)
        found: list[str] = []
        for index, item in enumerate(value):
            if not isinstance(item, str) or not item:
                self.problem(f"{key}[{index}]", f"must be text, is {_kind(item)}" if item != "" else "must not be empty")
            elif item in found:
                self.problem(f"{key}[{index}]", "is there twice" if secret else f"{item!r} is there twice")
            else:
                found.append(item)
        return found

    def command(self, key: str) -> list[str]:
        """A program and its arguments, none when the key is absent."""
        value = self.raw.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not value or not all(isinstance(word, str) for word in value) or not value[0]:
            self.problem(key, "must be a list of texts, the program first")
            return []
        return list(value)

    def member(self, key: str, value: str, known: t.Iterable[str], where: str) -> None:
        """``value`` has to be one of ``known``; an empty one was complained about already."""
        known = list(known)
        if value and value not in known:
            self.problem(key, f"{value!r} is not in {where}{suggestion(value, known)}")


def suggestion(value: t.Any, known: t.Iterable[str]) -> str:
    """``; did you mean port?``, or nothing when nothing is near."""
    near = difflib.get_close_matches(str(value), list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _kind(value: t.Any) -> str:
    """What a value is, without showing it."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "true or false"
    names = ((str, "text"), ((int, float), "a number"), (t.Mapping, "a map"), (list, "a list"))
    return next((name for kind, name in names if isinstance(value, kind)), type(value).__name__)


_TOP_KEYS = (
    "name",
    "project",
    "compose_files",
    "env_files",
    "images",
    "services",
    "order",
    "migrator",
    "volumes",
    "snapshot",
    "routes",
    "public",
    "policies",
    "notify",
    "git",
)
_SERVICE_KEYS = ("image", "port", "strategy", "ready", "ready_timeout", "stable", "drain_timeout", "stop_timeout", "single")


def parse_app(raw: t.Any, environment: str) -> App:
    """Read a description for one environment; raises one ``DeliveryError(config)`` with all that is wrong, in ``problems`` too."""
    problems: list[str] = []
    if not _ENVIRONMENT.fullmatch(environment or ""):
        problems.append(f"environment: {environment!r} is not a name; set delivery_environment in the inventory")
    if not raw:
        problems.append("delivery_app: there is none; docs/app.md has one of thirty lines to begin with")
    top = _Section(problems, "delivery_app", raw or None, _TOP_KEYS)
    app = _read(top, environment) if top.raw else None
    if problems or app is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DeliveryError("Reading the description of the app", f"{count}, nothing was touched", "\n".join(problems), problems=problems)
    return app


def _read(top: _Section, environment: str) -> App:
    name = top.text("name", None, _PROJECT, "is no name: use a-z, 0-9, _ and -, beginning with a letter or digit")
    images = _read_images(top)
    services = _read_services(top, images)
    migrator = _read_migrator(top, images, services)
    return App(
        name=name,
        environment=environment,
        project=top.text("project", name or "app", _PROJECT, "is no Compose project: use a-z, 0-9, _ and -"),
        compose_files=_read_files(top, "compose_files", ("compose.yaml",), in_release=True),
        env_files=_read_files(top, "env_files", ()),
        images=images,
        services=services,
        order=_read_order(top, list(services)),
        migrator=migrator,
        volumes=_read_volumes(top),
        snapshot=_read_snapshot(top),
        routes=_read_routes(top, services),
        public=_read_public(top),
        policies=_read_policies(top, environment),
        notify=_read_notify(top),
        git=_read_git(top),
    )


def _read_git(top: _Section) -> dict[str, t.Any]:
    section = top.section("git", ("repository", "push"))
    return {"repository": section.text("repository", ""), "push": section.flag("push", False)}


def _read_files(top: _Section, key: str, default: t.Sequence[str], in_release: bool = False) -> list[str]:
    files = top.texts(key, default)
    if in_release and not files and isinstance(top.raw.get(key), list) and not top.raw[key]:
        top.problem(key, "must name at least one file")
    names: dict[str, str] = {}
    for index, file in enumerate(files):
        if file.startswith("/") or ".." in file.split("/"):
            top.problem(f"{key}[{index}]", f"{file!r} must be relative and stay inside its folder")
        base = file.rpartition("/")[2]
        if in_release and base in RESERVED_FILES:
            top.problem(f"{key}[{index}]", f"the name {base!r} belongs to the release folder; rename the file")
        elif in_release and base in names:
            top.problem(f"{key}[{index}]", f"{file!r} and {names[base]!r} have the same name; a release keeps them side by side")
        names.setdefault(base, file)
    return files


def _read_images(top: _Section) -> dict[str, Image]:
    section = top.section("images", None)
    if "images" not in top.raw:
        top.problem("images", "is required")
    elif not section.raw and isinstance(top.raw["images"], t.Mapping):
        top.problem("images", "must name at least one image")
    wanted = "is no repository: give host[:port]/path without tag and digest"
    found: dict[str, Image] = {}
    variables: dict[str, str] = {}
    for name, value in section.raw.items():
        if not _IMAGE_NAME.fullmatch(name):
            section.problem(name, "is no image name: use a-z, 0-9, _ and -, beginning with a letter")
        other = variables.setdefault(image_variable(name), name)
        if other != name:
            section.problem(name, f"gives the same variable {image_variable(name)} as {other}")
        if value is None:
            section.problem(name, "is empty; give the repository")
        elif isinstance(value, str):
            source = section.text(name, None, _REPOSITORY, wanted)
            found[name] = Image(source, source)
        else:
            one = section.section(name, ("source", "repository"))
            source = one.text("source", None, _REPOSITORY, wanted) if isinstance(value, t.Mapping) else ""
            found[name] = Image(source, one.text("repository", source, _REPOSITORY, wanted))
    return found


def _read_services(top: _Section, images: t.Mapping[str, Image]) -> dict[str, Service]:
    section = top.section("services", None)
    if "services" not in top.raw:
        top.problem("services", "is required")
    elif not section.raw and isinstance(top.raw["services"], t.Mapping):
        top.problem("services", "must name at least one service")
    found: dict[str, Service] = {}
    for name in section.raw:
        if not _SERVICE.fullmatch(name):
            section.problem(name, "is no Compose service name")
        one = section.section(name, _SERVICE_KEYS)
        image = one.text("image") if isinstance(section.raw[name], (t.Mapping, type(None))) else ""
        one.member("image", image, images, "delivery_app.images")
        port = one.integer("port", None, 1, 65535)
        strategy = one.choice("strategy", STRATEGIES, "auto")
        single = one.flag("single", False)
        if single and strategy == "start_first":
            one.problem("strategy", "start_first runs old and new at once, which single: true forbids")
        found[name] = Service(
            image=image,
            port=port,
            strategy=strategy,
            ready=_read_ready(one, name, port),
            ready_timeout=one.number("ready_timeout", 60, least=1),
            stable=one.integer("stable", 1, 1) or 1,
            drain_timeout=one.number("drain_timeout", 30),
            stop_timeout=one.number("stop_timeout", 10),
            single=single,
        )
    return found


def _read_ready(service: _Section, name: str, port: int | None) -> dict[str, t.Any]:
    ready = service.section("ready", ("http", "tcp", "command"))
    if not ready.raw:
        return {}
    if len(ready.raw) > 1:
        service.problem("ready", f"must be one of http, tcp, command; has {' and '.join(ready.raw)}")
        return {}
    kind = next(iter(ready.raw))
    if kind in ("http", "tcp") and port is None:
        ready.problem(kind, f"needs delivery_app.services.{name}.port")
    if kind == "tcp":
        if not ready.flag("tcp", True):
            ready.problem("tcp", "can only be true; leave ready out to wait for health or running")
        return {"tcp": True}
    if kind == "command":
        return {"command": ready.command("command")}
    wanted = "is no path: begin it with /"
    if isinstance(ready.raw["http"], str):
        return {"http": {"path": ready.text("http", None, re.compile(r"/\S*"), wanted)}}
    http = ready.section("http", ("path", "status", "query", "headers"))
    if not isinstance(ready.raw["http"], t.Mapping):
        return {}
    found: dict[str, t.Any] = {"path": http.text("path", None, re.compile(r"/\S*"), wanted)}
    if "status" in http.raw:
        found["status"] = _read_status(http)
    if "query" in http.raw:
        found["query"] = http.text("query")
        _check_jmespath(http, "query", found["query"])
    if "headers" in http.raw:
        headers = http.section("headers", None)
        found["headers"] = {key: headers.text(key, "") for key in headers.raw}
    return {"http": found}


def _read_status(http: _Section) -> list[int]:
    value = http.raw["status"]
    codes = value if isinstance(value, list) else [value]
    if not codes or not all(isinstance(code, int) and not isinstance(code, bool) and 100 <= code <= 599 for code in codes):
        http.problem("status", "must be an HTTP status or a list of them, 100 to 599")
        return []
    return list(codes)


def _check_jmespath(section: _Section, key: str, expression: str) -> None:
    try:
        import jmespath
    except ImportError:  # the probe that needs it says so
        return
    if expression:
        try:
            jmespath.compile(expression)
        except jmespath.exceptions.JMESPathError as error:
            section.problem(key, f"{expression!r} is no JMESPath expression: {str(error).splitlines()[0].rstrip(':')}")


def _read_order(top: _Section, services: list[str]) -> list[str]:
    if "order" not in top.raw:
        return services
    order = top.texts("order")
    for index, name in enumerate(order):
        top.member(f"order[{index}]", name, services, "delivery_app.services")
    missing = [name for name in services if name not in order]
    if missing and isinstance(top.raw["order"], list):
        top.problem("order", f"must name every service once; {', '.join(missing)} is missing")
    return order


def _read_migrator(top: _Section, images: t.Mapping[str, Image], services: t.Mapping[str, Service]) -> Migrator | None:
    if "migrator" not in top.raw:
        return None
    section = top.section("migrator", ("service", "image", "timeout"))
    if not isinstance(top.raw["migrator"], t.Mapping):
        return None
    service = section.text("service", None, _SERVICE, "is no Compose service name")
    if service in services:
        section.problem("service", f"{service!r} is in delivery_app.services too; a migrator runs once and is not rolled")
    image = section.text("image")
    section.member("image", image, images, "delivery_app.images")
    return Migrator(service, image, section.number("timeout", 300, least=1))


def _read_volumes(top: _Section) -> list[str] | None:
    if "volumes" not in top.raw:
        return None
    volumes = top.texts("volumes")
    for index, name in enumerate(volumes):
        if not _SERVICE.fullmatch(name):
            top.problem(f"volumes[{index}]", f"{name!r} is no volume name; folders go into delivery_app.snapshot.paths")
    return volumes


def _read_snapshot(top: _Section) -> Snapshot:
    section = top.section("snapshot", ("consistency", "paths", "hooks"))
    consistency = section.choice("consistency", CONSISTENCIES, "pause")
    hooks = []
    for one in section.sections("hooks", ("container", "before", "after")):
        if "before" not in one.raw and "after" not in one.raw:
            one.problem("before", "is required, or after")
        container = one.text("container", None, _SERVICE, "is no container name")
        hooks.append({"container": container, "before": one.command("before"), "after": one.command("after")})
    if hooks and consistency != "hooks":
        section.problem("hooks", f"are only run with consistency: hooks, which is {consistency}")
    if consistency == "hooks" and not section.raw.get("hooks"):
        section.problem("hooks", "is required with consistency: hooks")
    return Snapshot(consistency, section.texts("paths"), hooks)


def _read_routes(top: _Section, services: t.Mapping[str, Service]) -> list[Route]:
    found: list[Route] = []
    for section in top.sections("routes", ("service", "host")):
        service = section.text("service")
        section.member("service", service, services, "delivery_app.services")
        if service in services and services[service].port is None:
            section.problem("service", f"needs delivery_app.services.{service}.port")
        host = section.text("host", "").lower()
        if host and not _HOST.fullmatch(host):
            section.problem("host", f"{host!r} is no host name")
        if any(route.host == host for route in found):
            section.problem("host", f"{host!r} has a route already" if host else "every name has a route already")
        found.append(Route(service, host))
    return found


def _read_public(top: _Section) -> Public | None:
    if "public" not in top.raw:
        return None
    section = top.section("public", ("url", "ready", "version", "validate_certs", "timeout"))
    if not isinstance(top.raw["public"], t.Mapping):
        return None
    url = section.text("url")
    if url and not _is_url(url):
        section.problem("url", f"{url!r} is no http or https address")
    elif url and (urlsplit(url).query or urlsplit(url).fragment or urlsplit(url).username):
        section.problem("url", "must have neither login, query nor fragment")
    version = section.text("version", "") if "version" in section.raw else "version"
    _check_jmespath(section, "version", version)
    return Public(
        url=url.rstrip("/"),
        ready=section.text("ready", "/api/ready", re.compile(r"/\S*"), "is no path: begin it with /"),
        version=version,
        validate_certs=section.flag("validate_certs", True),
        timeout=section.number("timeout", 30, least=1),
    )


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", text)
    except ValueError:
        return False


def _read_policies(top: _Section, environment: str) -> Policies:
    section = top.section("policies", ("restore", "migrations", "immutable_tags", "gates", "keep_releases"))
    patterns = section.texts("immutable_tags", ("^sha-",))
    if not patterns and not section.raw.get("immutable_tags", True):
        section.problem("immutable_tags", "must hold at least one pattern")
    for index, pattern in enumerate(patterns):
        try:
            re.compile(pattern)
        except re.error as error:
            section.problem(f"immutable_tags[{index}]", f"{pattern!r} is no regular expression: {error}")
    gates = section.texts("gates", ("staging",) if environment == "production" else ())
    for index, gate in enumerate(gates):
        if gate == environment:
            section.problem(f"gates[{index}]", f"{gate!r} cannot be its own gate")
        elif not _ENVIRONMENT.fullmatch(gate):
            section.problem(f"gates[{index}]", f"{gate!r} is no name of an environment")
    return Policies(
        restore=section.choice("restore", RESTORE_POLICIES, "auto"),
        migrations=section.choice("migrations", MIGRATION_KINDS, "compatible"),
        immutable_tags=patterns,
        gates=gates,
        keep_releases=section.integer("keep_releases", 10, 2) or 10,
    )


def _read_notify(top: _Section) -> dict[str, t.Any]:
    """As the module ``notify`` takes it. Values are never shown: they often hold a token."""
    section = top.section("notify", ("webhooks", "email"))
    webhooks = section.texts("webhooks", secret=True)
    for index, address in enumerate(webhooks):
        if not _is_url(address):
            section.problem(f"webhooks[{index}]", "is no http or https address")
    email = section.section("email", ("to", "from", "host", "port", "starttls", "username", "password"))
    found: dict[str, t.Any] = {}
    if email.raw:
        found = {
            "to": email.texts("to"),
            "from": email.text("from", "delivery@localhost"),
            "host": email.text("host", "localhost"),
            "port": email.integer("port", 25, 1, 65535),
            "starttls": email.flag("starttls", False),
        }
        found.update({key: email.text(key, "") for key in ("username", "password") if key in email.raw})
        if ("username" in found) != ("password" in found):
            email.problem("password" if "username" in found else "username", "is required: username and password go together")
    return {"webhooks": webhooks, "email": found}
