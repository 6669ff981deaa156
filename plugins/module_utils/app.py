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
from urllib.parse import SplitResult, urlsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

READY_KINDS = ("http", "tcp", "grpc", "command", "log")
STRATEGIES = ("auto", "start_first", "stop_first", "blue_green", "canary")
CONSISTENCIES = ("none", "pause", "stop", "hooks")
#: And what a single volume can have: the database that keeps its files there.
VOLUME_CONSISTENCIES = (*CONSISTENCIES, "postgresql", "mysql", "redis", "sqlite")
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
    """A built service. Times in seconds. ``ready``: one probe of ``READY_KINDS``, empty for health or running.
    ``stop_timeout``: ``None`` where the Compose file says it.

    ``parallel``, ``max_surge``, ``max_unavailable``: a number of containers, a percentage of the replicas, or ``None``. ``canary``:
    ``steps`` (percent of the requests) and how each is judged, as ``policies.bake``; empty with other strategies.
    """

    image: str
    port: int | None
    strategy: str
    ready: dict[str, t.Any]
    ready_timeout: float
    stable: int
    drain_timeout: float
    stop_timeout: float | None
    single: bool
    parallel: int | str | None
    max_surge: int | str | None
    max_unavailable: int | str | None
    smoke: list[str]
    smoke_timeout: float
    keep_old_for: float
    canary: dict[str, t.Any]


@dataclass(frozen=True)
class Migrator:
    service: str
    image: str
    timeout: float


@dataclass(frozen=True)
class Snapshot:
    """``hooks``: ``{container, before, after}``, the last two a program and its arguments. ``volume_options``: ``{consistency, service}``
    of those volumes that differ."""

    consistency: str
    paths: list[str]
    hooks: list[dict[str, t.Any]]
    volume_options: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Drill:
    """What ``drill.yml`` starts on a restored set and asks there.

    ``checks``: ``{name, service, command, expect}``; ``timeout`` in seconds.
    """

    services: list[str]
    checks: list[dict[str, t.Any]]
    timeout: float


@dataclass(frozen=True)
class Route:
    """``host`` empty: every name."""

    service: str
    host: str


@dataclass(frozen=True)
class Public:
    """``version``: JMESPath into the ready answer, empty when it is not asked. ``on_host``: a host's own edge, as the host reaches it."""

    url: str
    ready: str
    version: str
    validate_certs: bool
    timeout: float
    on_host: str


@dataclass(frozen=True)
class Policies:
    """``bake``: how what runs is judged between the last switch and the commit (``seconds``, ``max_error_rate``, ``max_latency``,
    ``min_requests``, ``prometheus``); empty where it is not."""

    restore: str
    migrations: str
    immutable_tags: list[str]
    gates: list[str]
    keep_releases: int
    confirm_within: int
    bake: dict[str, t.Any]


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
    drill: Drill

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

    def host_check(self) -> dict[str, t.Any] | None:
        """``public_check`` of one host: asked on it, of its own edge, under the public name. ``{tag}`` is to be filled in."""
        check = self.public_check()
        if check is None or self.public is None or not self.public.on_host:
            return None
        public, there = urlsplit(self.public.url), urlsplit(self.public.on_host)
        check["http"]["url"] = there._replace(netloc=public.netloc, path=public.path + self.public.ready).geturl()
        check["http"]["connect_to"] = f"{there.netloc.rpartition(':')[0] if there.port else there.netloc}:{_port(there)}"
        return {**check, "name": "host"}

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

    def count(self, key: str) -> int | str | None:
        """A number of things, 0 or more, or a percentage such as ``25%``; ``None`` when the key is absent."""
        value = self.raw.get(key)
        if isinstance(value, str) and re.fullmatch(r"\d{1,3}%", value) and int(value[:-1]) <= 100:
            return value
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 0):
            self.problem(key, f"must be a whole number, 0 or more, or a percentage such as 25%, is {value!r}")
            return None
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
    "drill",
)
_SERVICE_KEYS = (
    "image",
    "port",
    "strategy",
    "ready",
    "ready_timeout",
    "stable",
    "drain_timeout",
    "stop_timeout",
    "single",
    "parallel",
    "max_surge",
    "max_unavailable",
    "smoke",
    "smoke_timeout",
    "keep_old_for",
    "canary",
)
_JUDGED_KEYS = ("seconds", "max_error_rate", "max_latency", "min_requests", "prometheus")


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
    volumes, volume_options = _read_volumes(top)
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
        volumes=volumes,
        snapshot=_read_snapshot(top, volume_options),
        routes=_read_routes(top, services),
        public=_read_public(top),
        policies=_read_policies(top, environment),
        notify=_read_notify(top),
        git=_read_git(top),
        drill=_read_drill(top),
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
        if single and strategy not in ("auto", "stop_first"):
            one.problem("strategy", f"{strategy} runs old and new at once, which single: true forbids")
        _check_keys_of_strategy(one, strategy)
        found[name] = Service(
            image=image,
            port=port,
            strategy=strategy,
            ready=_read_ready(one, name, port),
            ready_timeout=one.number("ready_timeout", 60, least=1),
            stable=one.integer("stable", 1, 1) or 1,
            drain_timeout=one.number("drain_timeout", 30),
            stop_timeout=one.number("stop_timeout", 0) if "stop_timeout" in one.raw else None,
            single=single,
            parallel=one.count("parallel"),
            max_surge=one.count("max_surge"),
            max_unavailable=one.count("max_unavailable"),
            smoke=one.command("smoke"),
            smoke_timeout=one.number("smoke_timeout", 60, least=1),
            keep_old_for=one.number("keep_old_for", 0),
            canary=_read_canary(one, strategy),
        )
    return found


def _check_keys_of_strategy(service: _Section, strategy: str) -> None:
    for key in ("parallel", "max_surge", "max_unavailable"):
        if key in service.raw and strategy in ("blue_green", "canary"):
            service.problem(key, f"is for start_first and stop_first; {strategy} starts all of the new ones beside the old ones")
    if service.raw.get("parallel") in (0, "0%"):
        service.problem("parallel", "must be 1 or more")
    if service.raw.get("max_surge") in (0, "0%") and service.raw.get("max_unavailable", 0) in (0, "0%"):
        service.problem("max_surge", "and max_unavailable cannot both be 0: nothing could be replaced")
    if "keep_old_for" in service.raw and strategy != "blue_green":
        service.problem("keep_old_for", "is for strategy: blue_green")
    if "canary" in service.raw and strategy != "canary":
        service.problem("canary", "is for strategy: canary")


def _read_canary(service: _Section, strategy: str) -> dict[str, t.Any]:
    section = service.section("canary", ("steps", *_JUDGED_KEYS))
    if strategy != "canary":
        return {}
    steps = section.raw.get("steps", [10, 50])
    numbers = isinstance(steps, list) and steps and all(isinstance(one, int) and 0 < one <= 100 for one in steps)
    if not numbers or steps != sorted(set(steps)):
        section.problem("steps", "must be a list of percentages, 1 to 100, each larger than the one before")
        steps = []
    return {"steps": list(steps), **_read_judgement(section, 30)}


def _read_judgement(section: _Section, seconds: float) -> dict[str, t.Any]:
    """What ``rollout.watch`` reads; keys that were not given are left to it."""
    found: dict[str, t.Any] = {"seconds": section.number("seconds", seconds)}
    for key in ("max_error_rate", "max_latency"):
        if key in section.raw:
            found[key] = section.number(key, 0)
    if found.get("max_error_rate", 0) > 100:
        section.problem("max_error_rate", f"is a percentage, must be 100 or less, is {found['max_error_rate']:g}")
    if "min_requests" in section.raw:
        found["min_requests"] = section.integer("min_requests", 20, 1)
    if "prometheus" in section.raw:
        asked = section.section("prometheus", ("url", "query", "max"))
        url = asked.text("url")
        if url and not _is_url(url):
            asked.problem("url", f"{url!r} is no http or https address")
        found["prometheus"] = {"url": url, "query": asked.text("query"), "max": asked.number("max", 0, least=float("-inf"))}
    return found


def _read_bake(policies: _Section) -> dict[str, t.Any]:
    """A number of seconds, or a map."""
    value = policies.raw.get("bake")
    if value is None:
        return {}
    if isinstance(value, t.Mapping):
        section = policies.section("bake", _JUDGED_KEYS)
        if "seconds" not in section.raw:
            section.problem("seconds", "is required")
        return _read_judgement(section, 0)
    seconds = policies.number("bake", 0)
    return {"seconds": seconds} if seconds else {}


def _read_ready(service: _Section, name: str, port: int | None) -> dict[str, t.Any]:
    ready = service.section("ready", READY_KINDS)
    if not ready.raw:
        return {}
    if len(ready.raw) > 1:
        service.problem("ready", f"must be one of {', '.join(READY_KINDS)}; has {' and '.join(ready.raw)}")
        return {}
    kind = next(iter(ready.raw))
    if kind in ("http", "tcp", "grpc") and port is None:
        ready.problem(kind, f"needs delivery_app.services.{name}.port")
    if kind == "tcp":
        if not ready.flag("tcp", True):
            ready.problem("tcp", "can only be true; leave ready out to wait for health or running")
        return {"tcp": True}
    if kind == "grpc":
        return {"grpc": _read_grpc(ready)}
    if kind == "command":
        return {"command": ready.command("command")}
    if kind == "log":
        return {"log": _read_pattern(ready, "log")}
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


def _read_grpc(ready: _Section) -> t.Any:
    if not isinstance(ready.raw["grpc"], t.Mapping):
        if not ready.flag("grpc", True):
            ready.problem("grpc", "can only be true or a map; leave ready out to wait for health or running")
        return True
    grpc = ready.section("grpc", ("service", "tls", "validate_certs", "ca_path", "server_name"))
    found: dict[str, t.Any] = {key: grpc.text(key) for key in ("service", "server_name") if key in grpc.raw}
    if "ca_path" in grpc.raw:
        found["ca_path"] = grpc.text("ca_path", None, re.compile(r"/.+"), "must be the absolute path of a file on the host")
    found.update({key: grpc.flag(key, True) for key in ("tls", "validate_certs") if key in grpc.raw})
    for key in ("validate_certs", "ca_path", "server_name"):
        if key in found and not found.get("tls"):
            grpc.problem(key, "is only used with tls: true")
    return found or True


def _read_pattern(section: _Section, key: str) -> str:
    pattern = section.text(key)
    try:
        re.compile(pattern)
    except re.error as error:
        section.problem(key, f"{pattern!r} is no regular expression: {error}")
    return pattern


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


def _read_volumes(top: _Section) -> tuple[list[str] | None, dict[str, dict[str, str]]]:
    """Names of the volumes, ``None`` for all, and what is said of single ones: an entry is a name, or a map with one."""
    raw = top.raw.get("volumes")
    if not isinstance(raw, list):
        return (top.texts("volumes") if "volumes" in top.raw else None), {}
    names: list[str] = []
    options: dict[str, dict[str, str]] = {}
    for index, item in enumerate(raw):
        key = f"volumes[{index}]"
        name = item
        if isinstance(item, t.Mapping):
            section = _Section(top.problems, f"{top.path}.{key}", item, ("name", "consistency", "service"))
            name = section.text("name")
            consistency = section.choice("consistency", VOLUME_CONSISTENCIES, "") if "consistency" in section.raw else ""
            service = section.text("service") if "service" in section.raw else ""
            options[name] = {key: value for key, value in (("consistency", consistency), ("service", service)) if value}
        elif not isinstance(item, str) or not item:
            top.problem(key, f"must be text or a map, is {_kind(item)}" if item != "" else "must not be empty")
            continue
        if name in names:
            top.problem(key, f"{name!r} is there twice")
        elif name and not _SERVICE.fullmatch(name):
            top.problem(key, f"{name!r} is no volume name; folders go into delivery_app.snapshot.paths")
        names.append(name)
    return names, {name: said for name, said in options.items() if said}


def _read_snapshot(top: _Section, volume_options: dict[str, dict[str, str]]) -> Snapshot:
    section = top.section("snapshot", ("consistency", "paths", "hooks"))
    consistency = section.choice("consistency", CONSISTENCIES, "pause")
    hooks = []
    for one in section.sections("hooks", ("container", "before", "after")):
        if "before" not in one.raw and "after" not in one.raw:
            one.problem("before", "is required, or after")
        container = one.text("container", None, _SERVICE, "is no container name")
        hooks.append({"container": container, "before": one.command("before"), "after": one.command("after")})
    wanted = {consistency, *(one.get("consistency") for one in volume_options.values())}
    if hooks and "hooks" not in wanted:
        section.problem("hooks", f"are only run with consistency: hooks, which is {consistency}")
    if "hooks" in wanted and not section.raw.get("hooks"):
        section.problem("hooks", "is required with consistency: hooks")
    return Snapshot(consistency, section.texts("paths"), hooks, volume_options)


def _read_drill(top: _Section) -> Drill:
    section = top.section("drill", ("services", "checks", "timeout"))
    checks = []
    for one in section.sections("checks", ("name", "service", "command", "expect")):
        service = one.text("service", None, _SERVICE, "is no Compose service name")
        if "command" not in one.raw:
            one.problem("command", "is required")
        command = one.command("command")
        name = one.text("name", " ".join([service, *command[:1]]) or "check")
        expect = _read_pattern(one, "expect") if "expect" in one.raw else ""
        checks.append({"name": name, "service": service, "command": command, "expect": expect})
    return Drill(section.texts("services"), checks, section.number("timeout", 300, least=1))


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
    section = top.section("public", ("url", "ready", "version", "validate_certs", "timeout", "on_host"))
    if not isinstance(top.raw["public"], t.Mapping):
        return None
    url = section.text("url")
    if url and not _is_url(url):
        section.problem("url", f"{url!r} is no http or https address")
    elif url and (urlsplit(url).query or urlsplit(url).fragment or urlsplit(url).username):
        section.problem("url", "must have neither login, query nor fragment")
    version = section.text("version", "") if "version" in section.raw else "version"
    _check_jmespath(section, "version", version)
    own = f"{urlsplit(url).scheme}://127.0.0.1:{_port(urlsplit(url))}" if url and _is_url(url) else ""
    on_host = section.text("on_host", own) if section.raw.get("on_host", own) else ""
    if on_host and (not _is_url(on_host) or urlsplit(on_host).path.strip("/") or "@" in on_host):
        section.problem("on_host", f"{on_host!r} is no http or https address without a path")
    return Public(
        url=url.rstrip("/"),
        ready=section.text("ready", "/api/ready", re.compile(r"/\S*"), "is no path: begin it with /"),
        version=version,
        validate_certs=section.flag("validate_certs", True),
        timeout=section.number("timeout", 30, least=1),
        on_host=on_host.rstrip("/"),
    )


def _port(parts: SplitResult) -> int:
    return parts.port or (443 if parts.scheme == "https" else 80)


def _is_url(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", text)
    except ValueError:
        return False


def _read_policies(top: _Section, environment: str) -> Policies:
    section = top.section("policies", ("restore", "migrations", "immutable_tags", "gates", "keep_releases", "confirm_within", "bake"))
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
        confirm_within=section.integer("confirm_within", 0, 0) or 0,
        bake=_read_bake(section),
    )


def _read_notify(top: _Section) -> dict[str, t.Any]:
    """As the module ``notify`` takes it. Values are never shown: they often hold a token."""
    section = top.section("notify", ("webhooks", "email"))
    webhooks = section.texts("webhooks", secret=True)
    for index, address in enumerate(webhooks):
        if not _is_url(address):
            section.problem(f"webhooks[{index}]", "is no http or https address")
    email = section.section("email", ("to", "from", "host", "port", "starttls", "ca_path", "username", "password"))
    found: dict[str, t.Any] = {}
    if email.raw:
        found = {
            "to": email.texts("to"),
            "from": email.text("from", "delivery@localhost"),
            "host": email.text("host", "localhost"),
            "port": email.integer("port", 25, 1, 65535),
            "starttls": email.flag("starttls", False),
        }
        found.update({key: email.text(key, "") for key in ("ca_path", "username", "password") if key in email.raw})
        if ("username" in found) != ("password" in found):
            email.problem("password" if "username" in found else "username", "is required: username and password go together")
    return {"webhooks": webhooks, "email": found}
