# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a release would do to each service, and why: worked out from the rendered file and the containers there are. Changes nothing."""

from __future__ import annotations

import difflib
import typing as t
from dataclasses import asdict, dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import HASH_LABEL, SERVICE_LABEL
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.batches import Limits, limits_of
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import HOLD_REMEDY, HOLDING, WEIGHING
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.history import Expected, seconds

PHASES = ("preflight", "pull", "dependencies", "hold", "migrate", "roll", "bake")
STRATEGIES = ("auto", "start_first", "stop_first", "blue_green", "canary")
#: Strategies in which old and new run side by side.
SIDE_BY_SIDE = ("start_first", "blue_green", "canary")


@dataclass(frozen=True)
class ServiceSpec:
    """One built service, as ``delivery_app.services`` describes it. Times in seconds.

    ``parallel``, ``max_surge``, ``max_unavailable``: a number or a percentage, see ``batches.limits_of``. ``smoke``: a program and its
    arguments, run in a new container before it gets requests. ``canary``: ``steps`` (percent) and what ``watch.Judgement`` reads.
    ``stop_timeout``: ``None`` where the container knows.
    """

    name: str
    port: int | None = None
    strategy: str = "auto"
    ready: t.Mapping[str, t.Any] | None = None
    ready_timeout: float = 60
    stable: int = 1
    drain_timeout: float = 30
    stop_timeout: float | None = None
    single: bool = False
    parallel: int | str | None = None
    max_surge: int | str | None = None
    max_unavailable: int | str | None = None
    smoke: tuple[str, ...] = ()
    smoke_timeout: float = 60
    keep_old_for: float = 0
    canary: t.Mapping[str, t.Any] = field(default_factory=dict)

    def limits(self, strategy: str, replicas: int) -> Limits:
        return limits_of(strategy, replicas, self.parallel, self.max_surge, self.max_unavailable)


@dataclass(frozen=True)
class MigratorSpec:
    """``run`` false: this release migrates nothing (a rollback), but the service is known as what it is."""

    service: str
    timeout: float = 300
    run: bool = True


@dataclass(frozen=True)
class Spec:
    """All inputs of a release on one host; what ``rollout.json`` keeps."""

    project_dir: str
    project: str
    release_id: str
    files: tuple[str, ...]
    env_files: tuple[str, ...]
    deploy_env: str
    images: t.Mapping[str, str]
    services: t.Mapping[str, ServiceSpec]
    order: tuple[str, ...] = ()
    migrator: MigratorSpec | None = None
    volumes: tuple[str, ...] = ()
    routes: t.Mapping[str, int] = field(default_factory=dict)
    edge: t.Mapping[str, t.Any] = field(default_factory=lambda: {"type": "none"})
    hold: bool = False
    docker_socket: str = "/var/run/docker.sock"
    docker_config: str = ""
    min_free_mb: int = 512
    required_bytes: int = 0
    confirm_within: float = 0
    bake: t.Mapping[str, t.Any] = field(default_factory=dict)

    def backend(self, service: str) -> str:
        return f"{self.project}-{service}"

    def as_dict(self) -> dict[str, t.Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, raw: t.Mapping[str, t.Any]) -> Spec:
        """Build it from module parameters or ``rollout.json``; ``DeliveryError`` (config) on values that cannot be."""
        services = {name: _service_spec(name, value or {}) for name, value in (raw.get("services") or {}).items()}
        migrator = raw.get("migrator") or None
        images = dict(raw.get("images") or {})
        for name in images:
            if name not in services and not (migrator and migrator.get("service") == name):
                services[name] = ServiceSpec(name)
        edge = {key: value for key, value in (raw.get("edge") or {}).items() if value is not None}
        return cls(
            project_dir=str(raw["project_dir"]),
            project=str(raw["project"]),
            release_id=str(raw["release_id"]),
            files=tuple(raw.get("files") or ()),
            env_files=tuple(raw.get("env_files") or ()),
            deploy_env=str(raw.get("deploy_env") or ""),
            images=images,
            services=services,
            order=tuple(raw.get("order") or ()),
            migrator=_migrator_spec(migrator) if migrator else None,
            volumes=tuple(raw.get("volumes") or ()),
            routes={name: int(port) for name, port in (raw.get("routes") or {}).items()},
            edge=edge or {"type": "none"},
            hold=bool(raw.get("hold")),
            docker_socket=str(raw.get("docker_socket") or "/var/run/docker.sock"),
            docker_config=str(raw.get("docker_config") or ""),
            min_free_mb=int(raw.get("min_free_mb") or 0),
            required_bytes=int(raw.get("required_bytes") or 0),
            confirm_within=float(raw.get("confirm_within") or 0),
            bake=dict(raw.get("bake") or {}),
        )


def _migrator_spec(raw: t.Mapping[str, t.Any]) -> MigratorSpec:
    return MigratorSpec(str(raw["service"]), float(raw.get("timeout") or 300), raw.get("run") is not False)


def _service_spec(name: str, raw: t.Mapping[str, t.Any]) -> ServiceSpec:
    defaults = ServiceSpec(name)
    strategy = raw.get("strategy") or defaults.strategy
    if strategy not in STRATEGIES:
        raise DeliveryError(f"Reading services.{name}.strategy", f"it is {strategy!r}", f"Use one of {', '.join(STRATEGIES)}.")

    def number(key: str, default: float) -> float:
        value = raw.get(key)
        return default if value is None else float(value)

    return ServiceSpec(
        name=name,
        port=int(raw["port"]) if raw.get("port") is not None else None,
        strategy=str(strategy),
        ready=raw.get("ready") or None,
        ready_timeout=number("ready_timeout", defaults.ready_timeout),
        stable=int(number("stable", defaults.stable)),
        drain_timeout=number("drain_timeout", defaults.drain_timeout),
        stop_timeout=float(raw["stop_timeout"]) if raw.get("stop_timeout") is not None else None,
        single=bool(raw.get("single")),
        parallel=raw.get("parallel"),
        max_surge=raw.get("max_surge"),
        max_unavailable=raw.get("max_unavailable"),
        smoke=tuple(str(word) for word in raw.get("smoke") or ()),
        smoke_timeout=number("smoke_timeout", defaults.smoke_timeout),
        keep_old_for=number("keep_old_for", defaults.keep_old_for),
        canary=dict(raw.get("canary") or {}),
    )


@dataclass(frozen=True)
class Step:
    """What happens to one service.

    ``kind``: ``app``, ``dependency``, ``migrator``. ``action``: ``unchanged``, ``roll`` (new containers replace old ones), ``swap``
    (containers that were kept from before replace them), ``create`` (there were none), ``start`` (the right ones are there, stopped),
    ``run`` (migrator, or a dependency that runs to its end). ``old`` and ``new`` are image references; ``old_ids`` the containers there
    are, ``kept_ids`` those that a ``swap`` takes.
    """

    service: str
    kind: str
    action: str
    strategy: str
    reason: str
    old: str
    new: str
    replicas: int
    old_ids: tuple[str, ...] = ()
    kept_ids: tuple[str, ...] = ()

    @property
    def changes(self) -> bool:
        return self.action != "unchanged"

    def as_dict(self) -> dict[str, t.Any]:
        return {**asdict(self), "old_ids": list(self.old_ids), "kept_ids": list(self.kept_ids)}


@dataclass(frozen=True)
class Plan:
    dependencies: tuple[Step, ...]
    migrator: Step | None
    services: tuple[Step, ...]
    warnings: tuple[str, ...] = ()
    expected: Expected = Expected()

    @property
    def steps(self) -> tuple[Step, ...]:
        return (*self.dependencies, *((self.migrator,) if self.migrator else ()), *self.services)

    @property
    def changes(self) -> bool:
        return any(step.changes for step in self.steps)

    @property
    def lines(self) -> list[str]:
        """For people: one aligned line a service that changes, then how long it will take where that is known."""
        shown = [step for step in self.steps if step.changes]
        width = max((len(step.service) for step in shown), default=0)
        lines = [_line(step, width, self.expected.services.get(step.service)) for step in shown]
        return [*lines, self.expected.line] if lines and self.expected.line else lines

    def as_dict(self) -> dict[str, t.Any]:
        return {
            "dependencies": [step.as_dict() for step in self.dependencies],
            "migrator": self.migrator.as_dict() if self.migrator else None,
            "services": [step.as_dict() for step in self.services],
            "warnings": list(self.warnings),
            "expected": self.expected.as_dict(),
        }


def _line(step: Step, width: int, taken: float | None) -> str:
    images = short_image(step.new) if step.old in ("", step.new) else f"{short_image(step.old)} -> {short_image(step.new)}"
    how = {"roll": step.strategy, "swap": "swap", "create": "new", "start": "start again", "run": "run once"}[step.action]
    about = f", about {seconds(taken)}" if taken is not None else ""
    return f"{step.service:<{width}}  {images}  {how}" + (f" ({step.reason})" if step.reason else "") + about


def short_image(reference: str) -> str:
    """``sha256:ab12cd34ef56…`` of a reference by digest, the reference itself otherwise."""
    digest = reference.rpartition("@")[2] if "@" in reference else reference
    return f"{digest[:19]}…" if digest.startswith("sha256:") else reference or "none"


def build(
    spec: Spec,
    model: t.Mapping[str, t.Any],
    hashes: t.Mapping[str, str],
    containers: t.Sequence[t.Mapping[str, t.Any]],
    migrated: bool = False,
    kept: t.Collection[str] = (),
) -> Plan:
    """The plan. ``containers``: those of the project, as ``Engine.containers`` lists them, one-off ones left out.

    ``migrated``: this release's migrator has run already, or nothing calls for it. ``kept``: ids of containers that serve no more, but were
    not removed, so that going back to them is a swap.
    """
    services = model["services"]
    found: dict[str, list[t.Mapping[str, t.Any]]] = {}
    for container in containers:
        found.setdefault(container["Labels"].get(SERVICE_LABEL, ""), []).append(container)

    def compare(name: str, kind: str) -> Step:
        there = found.get(name, [])
        spare = [one for one in there if one["Id"] in kept]
        return _compare(spec, name, kind, services, hashes.get(name, ""), [one for one in there if one not in spare], spare)

    rolled = tuple(compare(name, "app") for name in roll_order(spec, services))
    needed = tuple(compare(name, "dependency") for name in dependency_order(spec, services))
    migrator = None
    if spec.migrator is not None:
        name = spec.migrator.service
        image = services[name].get("image", "")
        action, reason = ("unchanged", "nothing to migrate") if migrated or not spec.migrator.run else ("run", "before any app container")
        migrator = Step(name, "migrator", action, "", reason, "", image, 1)
    return Plan(needed, migrator, rolled, tuple(_volume_warnings(rolled, found)))


def _compare(
    spec: Spec,
    name: str,
    kind: str,
    services: t.Mapping[str, t.Any],
    wanted_hash: str,
    existing: t.Sequence[t.Mapping[str, t.Any]],
    spare: t.Sequence[t.Mapping[str, t.Any]],
) -> Step:
    service = services[name]
    image = service.get("image", "")
    replicas = replicas_of(service)
    strategy, why = choose_strategy(spec, name, kind, service, replicas)
    if kind == "app" and strategy in ("start_first", "stop_first"):
        why = ", ".join(filter(None, (spec.services[name].limits(strategy, replicas).describe(replicas), why)))
    alive = [one for one in existing if is_alive(one)]
    shown = alive or list(existing)
    old = str(shown[0].get("Image", "")) if shown else ""
    ends = runs_to_end(services, name)

    def step(action: str, reason: str, taken: t.Sequence[t.Mapping[str, t.Any]] = ()) -> Step:
        ids, kept_ids = tuple(one["Id"] for one in existing), tuple(one["Id"] for one in taken)
        return Step(name, kind, action, strategy, reason, old, image, replicas, ids, kept_ids)

    def right(one: t.Mapping[str, t.Any]) -> bool:
        return bool(one["Labels"].get(HASH_LABEL) == wanted_hash and one.get("Image") == image)

    if replicas == 0 and not alive:
        return step("unchanged", "no replica wanted")
    if not existing:
        return step("run" if ends else "create", "there is no container yet")
    fresh = [one for one in existing if right(one)]
    if ends:
        done = any(one["State"] == "exited" and "(0)" in one.get("Status", "") for one in fresh)
        return step("unchanged", "it has run to its end") if done else step("run", "it has to run to its end")
    if len(alive) == replicas and all(one in fresh and one["State"] == "running" for one in alive):
        return step("unchanged", "image and configuration are the same, and it runs")
    if not alive and len(fresh) >= replicas:
        return step("start", "it does not run")
    usable = [one for one in spare if right(one)]
    if alive and strategy in SIDE_BY_SIDE and 0 < replicas <= len(usable):
        return step("swap", "its containers of before are still there", usable[:replicas])
    return step("roll", why if alive else "it does not run")


def is_alive(container: t.Mapping[str, t.Any]) -> bool:
    """It has a process, or will have one again without anybody's doing. ``container``: as ``Engine.containers`` lists it."""
    return container["State"] in ("running", "restarting", "paused")


def choose_strategy(spec: Spec, name: str, kind: str, service: t.Mapping[str, t.Any], replicas: int) -> tuple[str, str]:
    """``start_first`` or ``stop_first``, and why."""
    if kind != "app":
        return "stop_first", "a dependency"
    given = spec.services[name]
    blocker = cannot_run_twice(service)
    if given.single:
        return "stop_first", "single: true"
    if given.strategy == "stop_first":
        return "stop_first", "strategy: stop_first"
    if given.strategy in SIDE_BY_SIDE:
        if blocker:
            raise DeliveryError(
                f"Planning {name} as {given.strategy}",
                f"old and new cannot run side by side: {blocker}",
                f"Remove it, or set services.{name}.strategy to stop_first or auto.",
            )
        return given.strategy, describe_strategy(given)
    if blocker:
        return "stop_first", blocker
    writable = writable_mount(service)
    if replicas <= 1 and writable:
        return "stop_first", f"one replica with a writable volume ({writable})"
    if name in spec.routes:
        return "start_first", ""
    return "start_first", "no route: the new one starts first"


def describe_strategy(given: ServiceSpec) -> str:
    """What a strategy that was asked for will do, in a few words."""
    if given.strategy == "canary":
        steps = ", ".join(f"{percent} %" for percent in given.canary.get("steps") or ())
        return f"{steps} of the requests for {float(given.canary.get('seconds') or 0):g} s each, then all"
    if given.strategy == "blue_green":
        return f"all at once, the old ones stay for {given.keep_old_for:g} s" if given.keep_old_for else "all at once"
    return "strategy: start_first"


def cannot_run_twice(service: t.Mapping[str, t.Any]) -> str:
    """What two containers of this service cannot share, or ''."""
    for port in service.get("ports") or ():
        published = str(port.get("published") or "")
        if published and "-" not in published:
            return f"published host port {published}"
    if service.get("network_mode") == "host":
        return "host network"
    for network, options in (service.get("networks") or {}).items():
        if (options or {}).get("ipv4_address") or (options or {}).get("ipv6_address"):
            return f"fixed address in network {network}"
    return ""


def writable_mount(service: t.Mapping[str, t.Any]) -> str:
    """Where the service writes to a volume or a host folder, or ''."""
    for mount in service.get("volumes") or ():
        if mount.get("type") in ("volume", "bind") and not mount.get("read_only"):
            return str(mount.get("source") or mount.get("target"))
    return ""


def replicas_of(service: t.Mapping[str, t.Any]) -> int:
    """``scale``, else ``deploy.replicas``, else 1."""
    for value in (service.get("scale"), (service.get("deploy") or {}).get("replicas")):
        if value is not None:
            return int(value)
    return 1


def runs_to_end(services: t.Mapping[str, t.Any], name: str) -> bool:
    """Another service waits for this one's success, so it is not expected to keep running."""
    conditions = ((other.get("depends_on") or {}).get(name) or {} for other in services.values())
    return any(one.get("condition") == "service_completed_successfully" for one in conditions)


def roll_order(spec: Spec, services: t.Mapping[str, t.Any]) -> list[str]:
    """Built services: those of ``order`` as given, the others after what they depend on, in the order they were described."""
    first = [name for name in spec.order if name in spec.services]
    rest = [name for name in spec.services if name not in first]
    return first + [name for name in sorted_by_need(rest, services) if name in rest]


def dependency_order(spec: Spec, services: t.Mapping[str, t.Any]) -> list[str]:
    """Everything not built with the app that the app needs, or that ``docker compose up`` would start; needed ones first."""
    built = set(spec.services)
    if spec.migrator:
        built.add(spec.migrator.service)
    wanted = {name for name, service in services.items() if name not in built and not service.get("profiles")}
    todo = list(built)
    seen = set(todo)
    while todo:
        for name in services.get(todo.pop(), {}).get("depends_on") or {}:
            if name not in seen and name in services:
                seen.add(name)
                todo.append(name)
                if name not in built:
                    wanted.add(name)
    return [name for name in sorted_by_need([name for name in services if name in wanted], services) if name in wanted]


def sorted_by_need(names: t.Iterable[str], services: t.Mapping[str, t.Any]) -> list[str]:
    """``names`` and what they depend on, needed ones first, otherwise in the given order."""
    ordered: list[str] = []

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in ordered or name in above or name not in services:
            return
        for needed in services[name].get("depends_on") or {}:
            visit(needed, (*above, name))
        ordered.append(name)

    for name in names:
        visit(name, ())
    return ordered


def levels(names: t.Sequence[str], services: t.Mapping[str, t.Any]) -> list[list[str]]:
    """``names`` in groups: each group needs only groups before it, so its members can start together."""
    depth: dict[str, int] = {}
    for name in sorted_by_need(names, services):
        needed = [depth[other] + 1 for other in services[name].get("depends_on") or {} if other in depth]
        depth[name] = max(needed, default=0)
    grouped: dict[int, list[str]] = {}
    for name in names:
        grouped.setdefault(depth.get(name, 0), []).append(name)
    return [grouped[key] for key in sorted(grouped)]


def _volume_warnings(steps: t.Iterable[Step], found: t.Mapping[str, t.Sequence[t.Mapping[str, t.Any]]]) -> t.Iterator[str]:
    for step in steps:
        if not step.changes:
            continue
        for container in found.get(step.service, ()):
            for mount in container.get("Mounts") or ():
                name = mount.get("Name") or ""
                if mount.get("Type") == "volume" and len(name) == 64:
                    yield (
                        f"{step.service}: what it wrote to {mount.get('Destination')} is in a volume without a name, "
                        "which the new container does not get; name it in the Compose file if it matters"
                    )


# -- checks of the description against the rendered file


def check_names(spec: Spec, model: t.Mapping[str, t.Any]) -> None:
    """Refuse services and volumes that the Compose files do not have, naming the nearest one."""
    services = model["services"]
    named = [(f"services.{name}", name) for name in spec.services]
    named += [(f"images.{name}", name) for name in spec.images] + [("order", name) for name in spec.order]
    named += [(f"routes.{name}", name) for name in spec.routes]
    if spec.migrator:
        named.append(("migrator.service", spec.migrator.service))
    for where, name in named:
        if name not in services:
            raise DeliveryError(f"Reading {where}", f"the Compose file has no service {name!r}", _nearest(name, services, "services"))
    for name in spec.routes:
        if name not in spec.services:
            raise DeliveryError(f"Reading routes.{name}", f"{name!r} is not among the built services", "List it under services.")
    volumes = model.get("volumes") or {}
    for name in spec.volumes:
        if name not in volumes:
            raise DeliveryError("Reading volumes", f"the Compose file has no volume {name!r}", _nearest(name, volumes, "volumes"))


def _nearest(name: str, there: t.Iterable[str], what: str) -> str:
    names = sorted(there)
    near = difflib.get_close_matches(name, names, 1)
    if near:
        return f"Did you mean {near[0]}?"
    return f"It has these {what}: {', '.join(names)}." if names else f"It has no {what}."


def check_images(spec: Spec, model: t.Mapping[str, t.Any]) -> None:
    """Refuse a built service whose rendered image is not the pinned one: it would run something else than what was promoted."""
    for name, pinned in spec.images.items():
        rendered = model["services"][name].get("image", "")
        if rendered != pinned:
            raise DeliveryError(
                f"Checking the image of {name}",
                f"the Compose file renders to {rendered or 'no image'}, this release pins {pinned}",
                "Write `image: ${APP_IMAGE}` there, with the variable deploy.env sets for this image (<IMAGE NAME>_IMAGE).",
            )


def check_hold(spec: Spec) -> None:
    """Refuse to promise that writes wait where the edge cannot let them."""
    kind = spec.edge.get("type") or "none"
    if spec.hold and spec.routes and kind not in HOLDING:
        seen = f"an edge of type {kind} cannot let requests wait"
        if kind == "none":
            seen = "there is no edge in front of this app that could let requests wait"
        raise DeliveryError("Planning to hold writes", seen, HOLD_REMEDY)


def check_shapes(spec: Spec, model: t.Mapping[str, t.Any], plan: Plan) -> None:
    """Refuse what cannot be replaced side by side with what runs."""
    for step in (*plan.services, *plan.dependencies):
        service = model["services"][step.service]
        name = service.get("container_name")
        if name and step.action == "roll":
            raise DeliveryError(
                f"Planning {step.service}",
                f"container_name: {name} lets only one container of that name exist, but the old one is kept beside the new one "
                "until the release is committed",
                "Remove container_name; inside the project's networks the service name answers.",
            )
    for step in plan.services:
        _check_strategy(spec, step)
    for name, port in spec.routes.items():
        if not port and spec.edge.get("type") != "none":
            raise DeliveryError(f"Reading routes.{name}", "it has no port", f"Set services.{name}.port to the container port.")


def _check_strategy(spec: Spec, step: Step) -> None:
    given, tried = spec.services[step.service], f"Planning {step.service} as {step.strategy}"
    kind = spec.edge.get("type") or "none"
    if step.strategy == "canary" and (kind not in WEIGHING or step.service not in spec.routes):
        seen = f"an edge of type {kind} shares no requests out by weight" if step.service in spec.routes else "it has no route"
        raise DeliveryError(tried, seen, "Put HAProxy in front of it (role edge), or choose another strategy.")
    if step.strategy == "stop_first" and given.max_surge not in (None, 0, "0%"):
        seen = f"max_surge is {given.max_surge}, but old and new are not to run side by side"
        raise DeliveryError(tried, seen, "Leave max_surge out, max_unavailable alone holds here.")
