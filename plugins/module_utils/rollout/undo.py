# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Going back, and tidying up: from ``rollout.json`` and what the engine and the edge say now, whatever instant the release died at.

``rollout.json`` was written before the first change and lists the containers there were. Every other container of a service
in its scope is new. That holds after a SIGKILL between any two instructions, so nothing here depends on how far the release came.
"""

from __future__ import annotations

import contextlib
import time
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.detached import detached
from ansible_collections.selfhost.delivery.plugins.module_utils.engine import SERVICE_LABEL, EngineNotFound, short_id
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import busy, current_id, describe_holder, fold
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import end_leftovers
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.confirm import disarm
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import WeighingEdge
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.host import (
    Container,
    Host,
    alive_ids,
    await_engine,
    read_rollout,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.plan import SIDE_BY_SIDE, ServiceSpec, Spec, is_alive, short_image

HOLD_AFTER = ("off", "keep", "all", "writes")
DEPENDENCY_TIMEOUT = 120.0
DEPENDENCY_STOP_TIMEOUT = 30.0
#: Seconds that whoever ends what was kept waits for a module that works there.
KEEPER_PATIENCE = 3600.0


def marker(spec: Spec) -> str:
    return f"{spec.project}/{spec.release_id}"


def migrator_name(spec: Spec) -> str:
    """The name of the migrator's container: it tells of which release a leftover is."""
    if spec.migrator is None:
        raise AssertionError("asked for the migrator of a release that has none")
    return f"{spec.project}-{spec.migrator.service}-{spec.release_id}"


class _Found:
    """One look at the host: what was before, what is there now."""

    def __init__(self, host: Host, record: t.Mapping[str, t.Any]) -> None:
        self.before: dict[str, dict[str, t.Any]] = record["before"]["containers"]
        self.scope: list[str] = record["scope"]
        self.old_routes: dict[str, int] = record["before"]["routes"]
        self.old_services: dict[str, t.Any] = record["before"]["services"]
        kept = host.kept()
        self.now: list[Container] = [one for one in host.containers() if one["Id"] not in kept]

    def new(self, service: str) -> list[Container]:
        return [one for one in self.now if one["Labels"].get(SERVICE_LABEL) == service and one["Id"] not in self.before]

    def old(self, service: str) -> list[str]:
        """Containers that ran before."""
        return [key for key, one in self.before.items() if one["service"] == service and one["running"]]

    def alive(self, ids: t.Iterable[str]) -> list[str]:
        running = set(alive_ids(self.now))
        return [one for one in ids if one in running]

    def given(self, service: str) -> ServiceSpec:
        raw = self.old_services.get(service)
        return ServiceSpec(**raw) if raw else ServiceSpec(service)


def _load(project_dir: str, release_id: str, run_id: str) -> tuple[Host, dict[str, t.Any]] | None:
    record = read_rollout(project_dir, release_id)
    if not record or "before" not in record:
        return None
    return Host(Spec.from_dict(record["spec"]), run_id), record


def summary(changed: bool = False, **more: t.Any) -> dict[str, t.Any]:
    """The result of a state that is not ``applied``."""
    return {"changed": changed, "services": {}, "durations": {}, "lines": [], "delivery_warnings": [], **more}


# -- reverted


def revert(project_dir: str, release_id: str, run_id: str = "", hold_after: str = "off", check_mode: bool = False) -> dict[str, t.Any]:
    """Put back exactly what ran before the release, and see that it does; ``DeliveryError`` (rollback_failed) when it does not.

    ``hold_after``: what the edge holds afterwards; ``keep`` leaves it as it is. Repeating it changes nothing.
    """
    loaded = _load(project_dir, release_id, run_id)
    if loaded is None:
        return summary()
    host, record = loaded
    state = fold(host.journal.entries())
    if state.status == "committed":
        raise DeliveryError(
            f"Taking back release {release_id}", "it has been committed", "Go back with a new release: the playbook rollback."
        )
    if check_mode:
        await_engine(host.engine)
        todo = _to_undo(host, _Found(host, record))
        return summary(bool(todo), lines=[f"{service}  back to what ran before" for service in todo])
    with busy(project_dir):
        if host.lease is not None:
            host.lease.check()
        return revert_held(host, hold_after)


def revert_held(host: Host, hold_after: str = "off") -> dict[str, t.Any]:
    """``revert`` for a caller that has the host to itself already."""
    with contextlib.suppress(OSError):  # on a full disk the host may go back a second time, which changes nothing
        disarm(host.spec.project_dir, host.spec.release_id)
    record = read_rollout(host.spec.project_dir, host.spec.release_id)
    if not record or "before" not in record:
        return summary()
    started = time.monotonic()
    try:
        await_engine(host.engine)
    except DeliveryError as exc:
        raise DeliveryError(exc.tried, exc.seen, exc.remedy, "rollback_failed") from exc
    end_leftovers(marker(host.spec))
    found = _Found(host, record)
    todo = _to_undo(host, found)
    services: dict[str, t.Any] = {}
    warnings: list[str] = []
    errors: list[DeliveryError] = []
    needed = [name for name in found.scope if name not in host.spec.services and name not in todo]
    try:
        host.await_dependencies({name: found.alive(found.old(name)) for name in needed}, DEPENDENCY_TIMEOUT)
    except DeliveryError as exc:
        errors.append(exc)
    for service in _undo_order(host.spec, found.scope):
        if service not in todo:
            services[service] = {"action": "unchanged", "seconds": 0.0}
            continue
        begun = time.monotonic()
        try:
            with host.step("reverting", service, routed=service in host.spec.routes):
                _revert_service(host, found, service, warnings)
        except DeliveryError as exc:
            if exc.failure_class == "lock":
                raise
            errors.append(exc)
        services[service] = {"action": "reverted", "seconds": round(time.monotonic() - begun, 3)}
    if not errors:
        errors += _verify(host, record)
    if not errors and hold_after != "keep":
        try:
            _set_hold(host, hold_after)
        except DeliveryError as exc:
            errors.append(exc)
    if errors:
        raise _failed(host, errors)
    durations = {"reverting": round(time.monotonic() - started, 3)}
    return summary(bool(todo), services=services, durations=durations, delivery_warnings=warnings)


def go_back_alone(spec: Spec, run_id: str) -> None:
    """The way back when nobody is there who asked for it. Whoever has taken the lease since does it instead: ``DeliveryError`` (lock)."""
    host = Host(spec, run_id)
    if host.lease is not None:
        host.lease.check()
    host.journal.note("reverting", reason="not_confirmed", within=spec.confirm_within)
    revert_held(host)


def _to_undo(host: Host, found: _Found) -> list[str]:
    """Services that are not as they were."""
    todo = []
    for service in found.scope:
        old = found.old(service)
        wrong = bool(found.new(service)) or len(found.alive(old)) < len(old)
        if not wrong and service in host.spec.routes and host.has_edge:
            wrong = _differs(host, found, service, old)
        if wrong:
            todo.append(service)
    return todo


def _old_addresses(host: Host, found: _Found, service: str, ids: t.Iterable[str]) -> list[tuple[str, int]]:
    port = found.old_routes.get(service, host.spec.routes.get(service, 0))
    return [(host.address(container), port) for container in ids]


def _differs(host: Host, found: _Found, service: str, old: t.Sequence[str]) -> bool:
    try:
        wanted = set(_old_addresses(host, found, service, old))
        there = host.edge.upstreams(host.spec.backend(service))
    except DeliveryError:
        return True  # said in full when it is tried
    return {(up.address, up.port) for up in there} != wanted or any(up.state != "ready" for up in there)


def _revert_service(host: Host, found: _Found, service: str, warnings: list[str]) -> None:
    old, new = found.old(service), [one["Id"] for one in found.new(service)]
    app = host.spec.services.get(service)
    stops = (app.stop_timeout, 10.0) if app else (None, DEPENDENCY_STOP_TIMEOUT)
    drain_timeout = app.drain_timeout if app else 0
    routed = service in host.spec.routes and host.has_edge
    for container in old:
        try:
            host.engine.inspect(container)
        except EngineNotFound as exc:
            # Its replacement is all there is: it stays.
            raise DeliveryError(
                f"Going back to the old container of {service}",
                f"container {short_id(container)} ({found.before[container]['name']}) has been removed",
                f"The new one was left as it is. Promote the release of {short_image(found.before[container]['image'])} again.",
                "rollback_failed",
            ) from exc
    stopped = [one for one in old if one not in found.alive(old)]
    beside = not stopped or _can_run_beside(host, service)
    if not beside:
        if routed:
            host.point(service, 0, [], drain_timeout)
        host.retire(new, *stops)
    for container in old:
        if host.engine.inspect(container)["HostConfig"]["RestartPolicy"] != found.before[container]["restart"]:
            host.engine.set_restart_policy(container, found.before[container]["restart"])
        host.engine.start(container)
    _await_old(host, found, service, old, warnings)
    if routed:
        port = found.old_routes.get(service, host.spec.routes[service])
        addresses = [host.address(container) for container in old]
        host.point(service, port, addresses, drain_timeout)
        if app is not None and app.strategy == "canary":
            t.cast(WeighingEdge, host.edge).weigh(host.spec.backend(service), {(address, port): -1 for address in addresses})
    if beside:
        host.retire(new, *stops)
    # What a failed release wrote to volumes without a name goes with it; a dependency's may hold data.
    ours = app is not None or (host.spec.migrator is not None and service == host.spec.migrator.service)
    for container in new:
        host.engine.remove(container, force=True, volumes=ours)


def _can_run_beside(host: Host, service: str) -> bool:
    """Whether the release meant old and new to run at the same time: the journal knows the strategy it chose."""
    for entry in host.journal.entries():
        if entry["step"] == "rolling" and entry.get("service") == service and entry["event"] == "begin":
            return entry["data"].get("strategy") in SIDE_BY_SIDE
    return False


def _await_old(host: Host, found: _Found, service: str, old: t.Sequence[str], warnings: list[str]) -> None:
    given = found.given(service)
    timeout = given.ready_timeout if service in host.spec.services else DEPENDENCY_TIMEOUT
    was_ready = [one for one in old if found.before[one]["ready"]]
    if was_ready:
        host.gate(service, given, was_ready, timeout)
    if len(was_ready) < len(old):
        warnings.append(f"{service} was not ready before this release either; it runs again as it did")


def _undo_order(spec: Spec, scope: t.Sequence[str]) -> list[str]:
    """What migrates ends first; what the app needs comes back next; then the services, the one switched last first."""
    migrator = spec.migrator.service if spec.migrator else ""
    apps = [name for name in scope if name in spec.services]
    needed = [name for name in scope if name not in spec.services and name != migrator]
    return [*(name for name in scope if name == migrator), *needed, *reversed(apps)]


def _was_held(host: Host) -> bool:
    return any(entry["step"] == "held" or entry["data"].get("quiesced") for entry in host.journal.entries())


def _set_hold(host: Host, what: str) -> None:
    # Where nothing can be held, requests to an app that is stopped are refused.
    if host.can_hold and host.spec.routes:
        host.edge.hold(host.spec.project, what)


def _verify(host: Host, record: t.Mapping[str, t.Any]) -> list[DeliveryError]:
    """Ask again: the old containers run, nothing new is left, and they are the only upstreams."""
    found = _Found(host, record)
    return [
        DeliveryError(
            f"Checking {service} after going back", "it is not as it was before the release", "Look at what runs now.", "rollback_failed"
        )
        for service in _to_undo(host, found)
    ]


def _failed(host: Host, errors: t.Sequence[DeliveryError]) -> DeliveryError:
    runs = []
    with contextlib.suppress(DeliveryError):
        runs = sorted(
            f"{one['Labels'].get(SERVICE_LABEL)}: {short_image(one.get('Image', ''))} (container {short_id(one['Id'])})"
            for one in host.containers()
            if is_alive(one)
        )
    held = " Requests may still be held at the edge." if host.can_hold and _was_held(host) else ""
    return DeliveryError(
        f"Taking back release {host.spec.release_id}",
        "; ".join(error.message.rstrip(".") for error in errors),
        f"Running now: {', '.join(runs) or 'nothing'}.{held} Mend the cause, then call this again.",
        "rollback_failed",
        running=runs,
    )


# -- quiesced


def quiesce(
    project_dir: str, release_id: str, run_id: str = "", check_mode: bool = False, spec: Spec | None = None
) -> dict[str, t.Any]:
    """Let all requests wait at the edge and stop everything of the app, old and new, so that its data can be put back.

    Dependencies go on running. ``reverted`` starts the old containers again. ``spec``: of a release that has changed nothing yet.
    """
    loaded = _load(project_dir, release_id, run_id)
    if loaded is None and spec is None:
        return summary()
    host = loaded[0] if loaded else Host(t.cast(Spec, spec), run_id)
    if check_mode:
        await_engine(host.engine)
        return summary(any(_app_containers(host).values()))
    with busy(project_dir):
        await_engine(host.engine)
        disarm(project_dir, release_id)
        end_leftovers(marker(host.spec))
        if loaded is None:
            host.remember([*host.spec.services, *((host.spec.migrator.service,) if host.spec.migrator else ())])
        running = _app_containers(host)
        # Where nothing was changed yet, this is a first change, and readers of the journal have to see it as one.
        step = "reverting" if fold(host.journal.entries()).changed else "held"
        with host.step(step, quiesced=True, stopped=running, routed=False):
            _set_hold(host, "all")
            migrator = host.spec.migrator.service if host.spec.migrator else ""

            def stop(service: str) -> None:
                given = host.spec.services.get(service)
                host.retire(running[service], given.stop_timeout if given else None)

            # What changes data ends first.
            if migrator in running:
                stop(migrator)
            host.side_by_side(stop, [service for service in running if service != migrator])
    return summary(bool(running), services={service: {"action": "stopped"} for service in running})


def _app_containers(host: Host) -> dict[str, list[str]]:
    names = [*host.spec.services, *((host.spec.migrator.service,) if host.spec.migrator else ())]
    found = host.containers()
    running = {name: alive_ids(one for one in found if one["Labels"].get(SERVICE_LABEL) == name) for name in names}
    return {name: ids for name, ids in running.items() if ids}


# -- finished


def finish(
    project_dir: str, release_id: str, run_id: str = "", check_mode: bool = False, journal: t.Mapping[str, t.Any] | None = None
) -> dict[str, t.Any]:
    """At the commit: let requests through, which must work, and remove the old containers, where what fails only warns.

    ``journal`` as in ``steps.apply``: with it, that the commit begins is written here.
    """
    loaded = _load(project_dir, release_id, run_id)
    if loaded is None:
        return summary()
    host, record = loaded
    if check_mode:
        return summary(bool(_replaced(_Found(host, record), record.get("kept") or {})))
    with busy(project_dir):
        host.tell((journal or {}).get("before") or ())
        # The commit has given the lease back. Whoever took it since tidies up at its own end, and may be holding writes.
        lock = host.lease.read() if host.lease is not None else None
        if lock is not None and lock["run_id"] != run_id:
            return summary(delivery_warnings=[f"nothing tidied up: another run works here ({describe_holder(lock)})"])
        disarm(project_dir, release_id)
        warnings: list[str] = []
        done: dict[str, t.Any] = {}
        changed = False
        kept = record.get("kept") or {}
        if kept:
            seconds = max(host.spec.services[one["service"]].keep_old_for for one in kept.values())
            detached(lambda: _end_kept_after(host, seconds))
        # A hold that stays would refuse every write: that is no warning. The commit has begun, so the next run comes here again.
        _set_hold(host, "off")
        try:
            replaced = _replaced(_Found(host, record), kept).items()
            gone = [(service, container) for service, ids in replaced for container in ids]
        except DeliveryError as exc:
            return summary(delivery_warnings=[*warnings, exc.message])
        for container, one in kept.items():
            done.setdefault(one["service"], {"action": "kept old", "containers": []})["containers"].append(container)
        for (service, container), failed in zip(gone, host.side_by_side(lambda one: _remove(host, one[1]), gone)):
            if failed:
                warnings.append(failed)
            else:
                changed = True
                done.setdefault(service, {"action": "removed old", "containers": []})["containers"].append(container)
        return summary(changed, services=done, delivery_warnings=warnings)


def _remove(host: Host, container: str) -> str:
    """Why it could not be removed, or ''. Its volumes without a name may be the only copy of something: they stay."""
    try:
        host.engine.remove(container)
    except DeliveryError as exc:
        return exc.message
    return ""


def _end_kept_after(host: Host, seconds: float) -> None:
    """In a process of its own: what was kept ends, unless a later release has taken or ended it, which then has emptied the record."""
    time.sleep(seconds)
    with busy(host.spec.project_dir, timeout=KEEPER_PATIENCE):
        host.end_kept(host.spec.release_id)


def _replaced(found: _Found, kept: t.Container[str]) -> dict[str, list[str]]:
    """Stopped containers from before that are not kept, of services in which a new one runs."""
    gone: dict[str, list[str]] = {}
    for service in found.scope:
        if not alive_ids(found.new(service)):
            continue
        ids = [
            one["Id"]
            for one in found.now
            if one["Labels"].get(SERVICE_LABEL) == service and one["Id"] in found.before and not is_alive(one) and one["Id"] not in kept
        ]
        if ids:
            gone[service] = ids
    return gone


# -- synced


def sync(project_dir: str, release_id: str = "", run_id: str = "", check_mode: bool = False) -> dict[str, t.Any]:
    """Make the edge's upstreams the running containers of the release (default: ``current``), as after a restart of either."""
    wanted = release_id or current_id(project_dir) or ""
    record = read_rollout(project_dir, wanted) if wanted else None
    if not record:
        return summary()
    host = Host(Spec.from_dict(record["spec"]), run_id)
    if not host.has_edge:
        return summary()
    with contextlib.ExitStack() as stack:
        if not check_mode:
            stack.enter_context(busy(project_dir))
        kept = host.kept()
        containers = [one for one in host.containers() if one["Id"] not in kept]
        services: dict[str, t.Any] = {}
        for service, port in host.spec.routes.items():
            ids = [one["Id"] for one in containers if one["Labels"].get(SERVICE_LABEL) == service and one["State"] == "running"]
            if not ids:
                raise DeliveryError(
                    f"Pointing the edge at {service}", "no container of it runs", "Start it, or promote the release again.", "not_ready"
                )
            addresses = [host.address(container) for container in ids]
            there = host.edge.upstreams(host.spec.backend(service))
            same = {(up.address, up.port) for up in there if up.state == "ready"} == {(one, port) for one in addresses}
            if same and len(there) == len(addresses):
                services[service] = {"action": "unchanged"}
                continue
            switched = {} if check_mode else host.point(service, port, addresses, host.spec.services[service].drain_timeout)
            services[service] = {"action": "repaired", **switched}
        return summary(any(one["action"] == "repaired" for one in services.values()), services=services)
