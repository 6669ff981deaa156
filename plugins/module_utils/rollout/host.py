# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What going forward and going back have in common: one app on one host, its engine, edge, journal and lease."""

from __future__ import annotations

import contextlib
import os
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import (
    ONEOFF_LABEL,
    PROJECT_LABEL,
    SERVICE_LABEL,
    Engine,
    EngineNotFound,
    short_id,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json, write_json
from ansible_collections.selfhost.delivery.plugins.module_utils.probes import WaitResult, parse_checks, wait_ready
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import Journal, Lease, current_id, journal_path, release_path
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import HOLDING, Edge, edge_from
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.plan import ServiceSpec, Spec, is_alive

#: How long the edge may take to see an upstream that has just answered its readiness probe.
EDGE_TIMEOUT = 20.0
LOG_LINES = 20
#: Successes in a row that "it runs" takes where nothing better can be asked: about a second in which it does not end.
RUNNING_STABLE = 5
#: One look at what runs before the release: was it ready? It bounds how long a broken predecessor delays its replacement.
FIRST_LOOK_TIMEOUT = 2.0
#: Kinds of ``services.<name>.ready`` that ask the service at its port.
ASKED_AT_PORT = ("http", "tcp", "grpc")

Container = dict[str, t.Any]


def rollout_path(project_dir: str, release_id: str) -> str:
    return os.path.join(release_path(project_dir, release_id), "rollout.json")


def read_rollout(project_dir: str, release_id: str) -> dict[str, t.Any] | None:
    """``{"spec": inputs, "before": {"containers": {id: …}, "services": {…}, "routes": {…}}, "scope": [services]}``.

    ``None``: nothing was changed on this host by that release.
    """
    path = rollout_path(project_dir, release_id)
    try:
        return read_json(path)
    except ValueError:
        raise DeliveryError(f"Reading {path}", "it is not JSON", "The file was changed by something else; repair it.") from None


class Host:
    """``run_id`` is written into the journal.

    The lease is asked where the release was opened, which is where its ``release.json`` is: on the coordinator.
    """

    def __init__(self, spec: Spec, run_id: str = "") -> None:
        self.spec = spec
        self.engine = Engine(spec.docker_socket)
        self.edge: Edge = edge_from({key: value for key, value in spec.edge.items() if key != "network"})
        self.has_edge = spec.edge.get("type") != "none"
        self.can_hold = spec.edge.get("type") in HOLDING
        self.journal = Journal.open(journal_path(spec.project_dir, spec.release_id), run_id)
        opened = os.path.exists(os.path.join(release_path(spec.project_dir, spec.release_id), "release.json"))
        self.lease = Lease(spec.project_dir, run_id) if run_id and opened else None

    # -- what was before

    def remember(self, scope: t.Iterable[str]) -> None:
        """Write down, once and before the first change, what runs now: undo goes back to exactly this."""
        known = read_rollout(self.spec.project_dir, self.spec.release_id) or {}
        if "before" not in known:
            known["before"] = self._before()
        known.update(spec=self.spec.as_dict(), scope=list(dict.fromkeys([*known.get("scope", []), *scope])))
        os.makedirs(release_path(self.spec.project_dir, self.spec.release_id), 0o750, exist_ok=True)
        write_json(rollout_path(self.spec.project_dir, self.spec.release_id), known)

    def note_record(self, **more: t.Any) -> None:
        """Add to ``rollout.json`` what a later release may ask for."""
        record = read_rollout(self.spec.project_dir, self.spec.release_id) or {}
        write_json(rollout_path(self.spec.project_dir, self.spec.release_id), {**record, **more})

    def _before(self) -> dict[str, t.Any]:
        previous = None
        current = current_id(self.spec.project_dir)
        if current and current != self.spec.release_id:
            previous = (read_rollout(self.spec.project_dir, current) or {}).get("spec")
        # The old containers are asked the old questions: the new release may have another port or path.
        told = Spec.from_dict(previous) if previous else self.spec
        containers: dict[str, dict[str, t.Any]] = {}
        asked: dict[str, ServiceSpec] = {}
        kept = self.kept()
        for one in self.containers():
            if one["Id"] in kept:  # serves no more, so nothing goes back to it
                continue
            service = one["Labels"].get(SERVICE_LABEL, "")
            details = self.engine.inspect(one["Id"])
            running = is_alive(one)
            containers[one["Id"]] = {
                "service": service,
                "name": details["Name"].lstrip("/"),
                "image": one.get("Image", ""),
                "running": running,
                "restart": details["HostConfig"]["RestartPolicy"],
                "ready": running,
            }
            if running:
                asked[one["Id"]] = told.services.get(service) or ServiceSpec(service)

        def look(container: str) -> bool:
            try:
                return self.probe({container: asked[container]}, FIRST_LOOK_TIMEOUT, settle=False).ready
            except DeliveryError:
                return False

        for container, ready in zip(asked, self.side_by_side(look, list(asked))):
            containers[container]["ready"] = ready
        return {
            "containers": containers,
            "services": told.as_dict()["services"],
            "routes": dict(told.routes),
        }

    # -- what was kept

    def kept(self) -> dict[str, dict[str, t.Any]]:
        """Containers that the release which serves has replaced and not removed: id to ``{"service": …, "restart": policy}``."""
        current = current_id(self.spec.project_dir)
        return dict((read_rollout(self.spec.project_dir, current) or {}).get("kept") or {}) if current else {}

    def keep(self, release_id: str, containers: t.Mapping[str, t.Mapping[str, t.Any]]) -> None:
        """Write down what a release keeps, in the form of ``kept``."""
        record = read_rollout(self.spec.project_dir, release_id)
        if record is not None and (record.get("kept") or {}) != containers:
            write_json(rollout_path(self.spec.project_dir, release_id), {**record, "kept": dict(containers)})

    def end_kept(self, release_id: str, spared: t.Collection[str] = ()) -> dict[str, dict[str, t.Any]]:
        """Stop and remove what ``release_id`` has kept, but for the ``spared``, which are nobody's then. Returns all that was kept."""
        kept = dict((read_rollout(self.spec.project_dir, release_id) or {}).get("kept") or {})
        gone = [container for container in kept if container not in spared]

        def end(container: str) -> None:
            service = self.spec.services.get(kept[container]["service"])
            self.retire([container], service.stop_timeout if service else None)
            self.engine.remove(container)

        self.side_by_side(end, gone)
        self.keep(release_id, {})
        return kept

    # -- journal

    @contextlib.contextmanager
    def step(self, step: str, service: str | None = None, **data: t.Any) -> t.Iterator[dict[str, t.Any]]:
        """One transition: lease asked, ``begin`` written, then ``end`` with what the block put into the dict, or ``fail``.

        Where the disk is full, nothing goes forward; but going back goes on without its lines, since that is what frees it.
        """
        undoing = step == "reverting"
        if self.lease is not None:
            self.lease.check()
        self._write("begin", step, service, data, undoing)
        ended: dict[str, t.Any] = {key: data[key] for key in ("routed",) if key in data}
        try:
            yield ended
        except DeliveryError as exc:
            self._write("fail", step, service, {**ended, "msg": exc.message, "failure_class": exc.failure_class}, True)
            raise
        self._write("end", step, service, ended, undoing)

    def tell(self, steps: t.Iterable[t.Mapping[str, t.Any]]) -> None:
        """Write down steps that are the controller's, ``{step, event, data, ttl}``, and renew its lease for them; nothing without a lease.

        A task of its own for each would start a module on the host for one line.
        """
        if self.lease is None:
            return
        for one in steps:
            try:
                self.lease.renew(one["step"], one.get("ttl"))
                self.journal.append_once(one["event"], one["step"], data=one.get("data"))
            except OSError as exc:
                raise self._unwritable(exc) from exc

    def _write(self, event: str, step: str, service: str | None, data: t.Mapping[str, t.Any], may_fail: bool) -> None:
        try:
            self.journal.append(event, step, service, data)
        except OSError as exc:
            if not may_fail:
                raise self._unwritable(exc) from exc

    def _unwritable(self, exc: OSError) -> DeliveryError:
        tried = f"Writing the journal {self.journal.path}"
        return DeliveryError(tried, exc.strerror or str(exc), "Make room, or make it writable.", "capacity")

    # -- containers

    def containers(self) -> list[Container]:
        """Those of the project; what people started with ``docker compose run`` is theirs and left out."""
        found = self.engine.containers({PROJECT_LABEL: self.spec.project})
        return [one for one in found if one["Labels"].get(ONEOFF_LABEL, "").lower() != "true"]

    def of_service(self, service: str) -> list[Container]:
        return [one for one in self.containers() if one["Labels"].get(SERVICE_LABEL) == service]

    def retire(self, containers: t.Iterable[str], timeout: float | None, otherwise: float = 10) -> None:
        """Stop them so that they stay stopped, also over a restart of the engine. What was their policy is in ``before``.

        ``timeout`` and ``otherwise`` in seconds, as ``Engine.stop`` takes them.
        """
        targets = list(containers)

        def one(container: str) -> None:
            try:
                self.engine.stop(container, timeout, otherwise)
                # An engine that starts again also starts stopped containers with these policies. Set only now: the policy of one
                # that is just between two restarts cannot be.
                policy = self.engine.inspect(container)["HostConfig"]["RestartPolicy"]["Name"]
                if policy in ("always", "on-failure"):
                    self.engine.set_restart_policy(container, {"Name": "no"})
            except EngineNotFound:
                return

        self.side_by_side(one, targets)

    def side_by_side(self, action: t.Callable[[t.Any], t.Any], items: t.Sequence[t.Any]) -> list[t.Any]:
        """``action`` of each item, in threads when there are several; the first error after all have ended."""
        if len(items) < 2:
            return [action(item) for item in items]
        with ThreadPoolExecutor(max_workers=min(8, len(items))) as pool:
            return list(pool.map(action, items))

    def address(self, container: str) -> str:
        """Where this host reaches it: its address in ``edge.network``, else in the project's default network, else in any."""
        details = self.engine.inspect(container)
        if (details.get("HostConfig") or {}).get("NetworkMode") == "host":
            return "127.0.0.1"
        networks = (details.get("NetworkSettings") or {}).get("Networks") or {}
        asked = self.spec.edge.get("network")
        wanted = [asked, f"{self.spec.project}_{asked}"] if asked else [f"{self.spec.project}_default", *sorted(networks)]
        for name in wanted:
            network = networks.get(name) or {}
            found = network.get("IPAddress") or network.get("GlobalIPv6Address")
            if found:
                return str(found)
        state = details["State"]
        if state["Status"] != "running":
            seen = f"it is {state['Status']}, its last exit code is {state.get('ExitCode')}"
            raise DeliveryError(
                f"Looking up the address of container {short_id(container)}", seen, "", "not_ready", container=container
            )
        raise DeliveryError(
            f"Looking up the address of container {short_id(container)}",
            f"it has none in {asked or 'any network'}",
            f"It is in these networks: {', '.join(sorted(networks)) or 'none'}.",
        )

    # -- readiness

    def gate(self, service: str, given: ServiceSpec, containers: t.Sequence[str], timeout: float | None = None) -> None:
        """Wait until each container is ready; ``DeliveryError`` (not_ready) with its last log lines when one is not."""
        if not containers:
            return
        try:
            result = self.probe({container: given for container in containers}, given.ready_timeout if timeout is None else timeout)
        except DeliveryError as exc:
            if exc.failure_class == "not_ready":  # it had ended before there was anything to ask
                raise self._not_ready(service, exc.details["container"], exc.seen) from exc
            raise
        if result.ready:
            return
        wrong = next(container for container in containers if not result.checks[short_id(container)]["ready"])
        error = result.checks[short_id(wrong)]["last_error"] or "no answer"
        raise self._not_ready(service, wrong, f"not ready after {result.elapsed:.1f} s: {error}")

    def _not_ready(self, service: str, container: str, why: str) -> DeliveryError:
        logs = self.last_lines(container)
        seen = f"container {short_id(container)}: {why}"
        if logs and logs not in seen:
            seen += f"\nIts last lines:\n{logs}\n"
        return DeliveryError(
            f"Waiting for {service} to be ready", seen, "", "not_ready", service=service, container=container, logs=logs.splitlines()
        )

    def await_dependencies(self, services: t.Mapping[str, t.Sequence[str]], timeout: float) -> None:
        """Wait for those that run but are not healthy yet, as a database is after its data was restored."""
        for service, containers in services.items():
            states = {one: self.engine.inspect(one)["State"] for one in containers}
            health = {one: (state.get("Health") or {}).get("Status", "healthy") for one, state in states.items() if state.get("Running")}
            starting = [one for one, status in health.items() if status != "healthy"]
            if starting:
                self.gate(service, ServiceSpec(service), starting, timeout)

    def probe(self, containers: t.Mapping[str, ServiceSpec], timeout: float, settle: bool = True) -> WaitResult:
        """Probe all containers side by side. ``settle`` false: one success is enough."""
        raw = [self._check(container, given, settle) for container, given in containers.items()]
        return wait_ready(parse_checks(raw), timeout=timeout, fail_fast=True, engine=self.engine)

    def _check(self, container: str, given: ServiceSpec, settle: bool) -> dict[str, t.Any]:
        # Readiness is asked from outside the image; the container is watched beside it, so that its end is noticed at once.
        check = {**ready_check(given, lambda: self.address(container), container), "name": short_id(container), "stable": given.stable}
        if "log" in check:  # it looks at its container itself
            pass
        elif "container" not in check:
            check["watch"] = container
        elif not (self.engine.inspect(container).get("State") or {}).get("Health"):
            check["stable"] = max(given.stable, RUNNING_STABLE)
        if not settle:
            check["stable"] = 1
        return check

    def last_lines(self, container: str) -> str:
        with contextlib.suppress(DeliveryError):
            return self.engine.logs(container, LOG_LINES)
        return ""

    # -- the edge

    def let_in(self, service: str, port: int, addresses: t.Sequence[str]) -> list[tuple[str, int]]:
        """Give requests to ``addresses``, seen up, beside whatever has them; returns those that had none before."""
        return self._let_in(service, port, addresses)[0]

    def _let_in(self, service: str, port: int, addresses: t.Sequence[str]) -> tuple[list[tuple[str, int]], list[tuple[str, int]]]:
        """``let_in``, and beside that who else has them."""
        backend = self.spec.backend(service)
        there = {(up.address, up.port): up for up in self.edge.upstreams(backend)}
        wanted = [(address, port) for address in addresses]
        added = [target for target in wanted if target not in there or there[target].state != "ready" or not there[target].up]
        for address, number in added:
            self.edge.add(backend, address, number, EDGE_TIMEOUT)
        return added, [target for target in there if target not in wanted]

    def point(self, service: str, port: int, addresses: t.Sequence[str], drain_timeout: float) -> dict[str, t.Any]:
        """Make ``addresses`` the only upstreams of the service: added and seen up first, then the others drained and emptied.

        Returns ``{"added": […], "removed": […], "cut": sessions, "drain": seconds}``.
        """
        backend = self.spec.backend(service)
        added, others = self._let_in(service, port, addresses)
        drained = self.side_by_side(lambda target: self.edge.drain(backend, target[0], target[1], drain_timeout), others)
        for address, number in others:
            self.edge.remove(backend, address, number)
        return {
            "added": [f"{address}:{number}" for address, number in added],
            "removed": [f"{address}:{number}" for address, number in others],
            "cut": sum(result.sessions_cut for result in drained),
            "drain": round(max((result.waited for result in drained), default=0.0), 3),
        }


def ready_check(given: ServiceSpec, address: t.Callable[[], str], container: str) -> dict[str, t.Any]:
    """``services.<name>.ready`` as one check of ``parse_checks`` for one container; ``DeliveryError`` (config) when it cannot be one."""
    ready = {kind: probe for kind, probe in (given.ready or {}).items() if probe is not None}
    if not ready:
        return {"container": {"name": container}}
    where = f"Reading services.{given.name}.ready"
    if len(ready) > 1 or not ready.keys() <= {*ASKED_AT_PORT, "command", "log"} or not all(ready.values()):
        raise DeliveryError(where, f"it has {', '.join(ready)}", f"Give one of {', '.join(ASKED_AT_PORT)}, command, log, or leave it out.")
    if "command" in ready:
        return {"command": {"container": container, "argv": list(ready["command"])}}
    if "log" in ready:
        return {"log": {"container": container, "pattern": ready["log"]}}
    if not given.port:
        raise DeliveryError(where, "there is no port to ask", f"Set services.{given.name}.port to the container port.")
    host = address()
    if "tcp" in ready:
        return {"tcp": {"host": host, "port": given.port}}
    if "grpc" in ready:
        return {"grpc": {**(ready["grpc"] if isinstance(ready["grpc"], t.Mapping) else {}), "host": host, "port": given.port}}
    http = ready["http"] if isinstance(ready["http"], t.Mapping) else {"path": str(ready["http"])}
    probe = {key: http[key] for key in ("query", "headers") if http.get(key)}
    if http.get("status"):
        probe["status"] = http["status"] if isinstance(http["status"], list) else [int(http["status"])]
    path = str(http.get("path") or "/")
    shown = f"[{host}]" if ":" in host else host
    return {"http": {**probe, "url": f"http://{shown}:{given.port}{path if path.startswith('/') else '/' + path}"}}


def alive_ids(containers: t.Iterable[Container]) -> list[str]:
    return [one["Id"] for one in containers if is_alive(one)]


def await_engine(engine: Engine, timeout: float = 30.0) -> None:
    """Wait for an engine that is just starting again; ``DeliveryError`` (transport) when it does not answer in time."""
    deadline, pause = time.monotonic() + timeout, 0.05
    while True:
        try:
            engine.version()
            return
        except DeliveryError:
            if time.monotonic() >= deadline:
                raise
        time.sleep(pause)
        pause = min(pause * 1.5, 0.5)
