# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Going forward: from what runs to what the release describes, on one host, phase by phase, the journal ahead of each change."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import stat
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import PROJECT_LABEL, SERVICE_LABEL, short_id
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import write_atomically
from ansible_collections.selfhost.delivery.plugins.module_utils.probes import parse_checks
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import (
    Keepalive,
    busy,
    current_id,
    release_path,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout import plan as planning
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout import undo
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import OLDEST_COMPOSE, Compose, parse_version
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.confirm import Waiter
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import WEIGHING
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.history import expected
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.host import (
    Container,
    Host,
    alive_ids,
    read_rollout,
    ready_check,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.plan import PHASES, Plan, ServiceSpec, Spec, Step
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.roll import Move, Roller
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.watch import Judgement, Watch

OLDEST_ENGINE = (20, 10)
DEPENDENCY_TIMEOUT = 120.0
DEPENDENCY_STOP_TIMEOUT = 30.0
MIGRATOR_STOP_TIMEOUT = 10.0
PARALLEL_PULLS = 2


def apply(
    spec: Spec,
    phases: t.Sequence[str] = PHASES,
    run_id: str = "",
    take_back: bool = True,
    check_mode: bool = False,
    journal: t.Mapping[str, t.Any] | None = None,
) -> dict[str, t.Any]:
    """Run ``phases`` in their order; the module's result. On failure: take back (when asked), then raise the first error.

    Nothing is changed when ``check_mode`` is set or when ``phases`` is only ``preflight``, but for the ``journal``: steps of the
    controller that are written ``before`` the first phase, and ``after`` the last when all went well (see ``Host.tell``).
    """
    told = {} if check_mode else journal or {}
    rollout = Rollout(spec, run_id)
    with contextlib.ExitStack() as stack:
        changing = not check_mode and set(phases) - {"preflight"}
        if changing:
            stack.enter_context(busy(spec.project_dir))
            lease = rollout.host.lease
            if lease is not None:
                lease.check()
            if spec.confirm_within and "roll" in phases:
                rollout.waiter = Waiter(spec.project_dir, spec.release_id, spec.confirm_within, lambda: undo.go_back_alone(spec, run_id))
            if lease is not None:
                stack.enter_context(Keepalive(lease, ttl=float((lease.read() or {}).get("ttl") or 900)))
        rollout.host.tell(told.get("before") or ())
        rollout.read()
        if "preflight" in phases:
            with rollout.timed("preflight"):
                rollout.preflight()
        planned = rollout.plan
        if not changing:
            rollout.host.tell(told.get("after") or ())
            rollout.changed = bool(set(phases) - {"preflight"}) and planned.changes
            return rollout.result(planned)
        try:
            for phase in PHASES[1:]:
                if phase in phases:
                    with rollout.timed(phase):
                        getattr(rollout, phase)()
            rollout.host.tell(told.get("after") or ())
        except (DeliveryError, OSError) as caught:
            exc = caught if isinstance(caught, DeliveryError) else _unwritable(spec, caught)
            exc.details.update(rollout.result(planned), changed=rollout.changed)
            lost_lease = exc.failure_class == "lock"  # whoever has it now also undoes
            if take_back and not lost_lease:
                exc.details["reverted"] = _take_back(rollout, exc)
            raise exc from caught.__cause__
    return rollout.result(planned)


def _unwritable(spec: Spec, exc: OSError) -> DeliveryError:
    """Everything that is asked of others says what is wrong itself; what is left are the files of the release."""
    where = exc.filename or release_path(spec.project_dir, spec.release_id)
    return DeliveryError(f"Writing {where}", exc.strerror or str(exc), "Make room, or make it writable.", "capacity")


def _take_back(rollout: Rollout, cause: DeliveryError) -> bool:
    try:
        undone = undo.revert_held(rollout.host)
    except DeliveryError as exc:
        raise DeliveryError(
            f"Taking back the release after it failed ({cause.message})",
            exc.seen,
            exc.remedy,
            "rollback_failed",
            **{**cause.details, **exc.details, "cause": cause.as_result()["msg"], "cause_class": cause.failure_class},
        ) from cause
    cause.details["undo"] = undone
    return True


class Rollout:
    """The phases. Each can be called again: what has been done is seen in the journal and in the engine, and not done twice."""

    def __init__(self, spec: Spec, run_id: str) -> None:
        self.spec = spec
        self.host = Host(spec, run_id)
        self.engine = self.host.engine
        self.compose = Compose(
            spec.project_dir,
            spec.project,
            spec.files,
            [*spec.env_files, *((spec.deploy_env,) if spec.deploy_env else ())],
            self.engine.socket,
            undo.marker(spec),
            spec.docker_config,
        )
        self.changed = False
        self.warnings: list[str] = []
        self.durations: dict[str, float] = {}
        self.done: dict[str, dict[str, t.Any]] = {}
        self.model: dict[str, t.Any] = {}
        self.hashes: dict[str, str] = {}
        self.plan = Plan((), None, ())
        self._remembered = False
        self.waiter: Waiter | None = None
        self.volumes: list[dict[str, t.Any]] = []

    # -- reading

    def read(self) -> None:
        """Render the project and make the plan."""
        self._check_files()
        self.engine.version()  # its plain "does not answer" comes before whatever the docker program would say
        self.model, warnings = self.compose.model()
        self.hashes = self.compose.hashes(self.model)
        planning.check_names(self.spec, self.model)
        planning.check_images(self.spec, self.model)
        self.replan()
        migrator = self.spec.migrator.service if self.spec.migrator else ""
        self.plan = replace(self.plan, expected=expected(self.spec.project_dir, self.spec.release_id, migrator))
        self.warnings = [*warnings, *self.plan.warnings]

    def replan(self) -> None:
        containers = self.host.containers()
        kept = self.host.kept()
        self.plan = planning.build(self.spec, self.model, self.hashes, containers, kept=kept)
        if self.spec.migrator is not None and self.spec.migrator.run and self._nothing_to_migrate():
            self.plan = planning.build(self.spec, self.model, self.hashes, containers, migrated=True, kept=kept)

    def _nothing_to_migrate(self) -> bool:
        if any(entry["step"] == "migrated" and entry["event"] == "end" for entry in self.host.journal.entries()):
            return True
        if any(step.changes for step in self.plan.services):
            return False
        # Nothing of the app changes: a migrator of the same image has run with the release that runs now.
        current = current_id(self.spec.project_dir)
        before = read_rollout(self.spec.project_dir, current) if current and current != self.spec.release_id else None
        service = self.spec.migrator.service if self.spec.migrator else ""
        return before is not None and before["spec"]["images"].get(service) == self.spec.images.get(service)

    def _check_files(self) -> None:
        for path in self.spec.files:
            if not os.path.isfile(path):
                raise DeliveryError("Reading the Compose files", f"{path} does not exist", "Check the paths in files.")
        for path in (*self.spec.env_files, *((self.spec.deploy_env,) if self.spec.deploy_env else ())):
            self._check_env_file(path)

    def _check_env_file(self, path: str) -> None:
        tried = f"Checking env file {path}"
        try:
            found = os.stat(path)
        except FileNotFoundError:
            raise DeliveryError(tried, "it does not exist", "Create it on this host: owner root, mode 0600.") from None
        if not stat.S_ISREG(found.st_mode):
            raise DeliveryError(tried, "it is no file", "Create it on this host: owner root, mode 0600.")
        if found.st_uid not in (0, os.geteuid()):
            raise DeliveryError(tried, f"its owner is user {found.st_uid}", f"Run: chown root:root {path}")
        if stat.S_IMODE(found.st_mode) & 0o077:
            raise DeliveryError(
                tried, f"its mode {stat.S_IMODE(found.st_mode):04o} gives others access to secrets", f"Run: chmod 0600 {path}"
            )

    # -- preflight

    def preflight(self) -> None:
        """Refuse what would fail later, before anything is touched."""
        version = self.engine.version()
        number = parse_version(str(version.get("Version", "")))
        if number is None:
            self.warnings.append(f"the Docker engine calls its version {version.get('Version')!r}; 20.10 or newer is needed")
        elif number < OLDEST_ENGINE:
            raise DeliveryError("Checking the Docker engine", f"its version is {version['Version']}", "Install 20.10 or newer.")
        compose = self.compose.version()
        if parse_version(compose) is None:
            oldest = ".".join(map(str, OLDEST_COMPOSE))
            self.warnings.append(f"Docker Compose calls its version {compose!r}; {oldest} or newer is needed")
        planning.check_shapes(self.spec, self.model, self.plan)
        self._check_readiness()
        self._check_edge()
        self._check_ports()
        self._check_disk()
        self._check_architecture(str(version.get("Arch", "")))
        self._check_networks()
        self.volumes = self._data_volumes()

    def _data_volumes(self) -> list[dict[str, t.Any]]:
        """The volumes that hold the app's data, with the names the engine knows them by: ``{key, name, exists}``."""
        known = self.model.get("volumes") or {}
        found = []
        for key in self.spec.volumes or known:
            name = str((known[key] or {}).get("name") or f"{self.spec.project}_{key}")
            found.append({"key": key, "name": name, "exists": self.engine.volume(name) is not None})
        return found

    def _check_readiness(self) -> None:
        for given in self.spec.services.values():
            try:
                parse_checks([ready_check(given, lambda: "127.0.0.1", "container")])
            except DeliveryError as exc:
                key = exc.tried[len("checks[0]") :] if exc.tried.startswith("checks[0]") else ""
                raise DeliveryError(f"Reading services.{given.name}.ready{key}", exc.seen, exc.remedy) from exc

    def _check_edge(self) -> None:
        planning.check_hold(self.spec)
        for service in self.spec.routes:
            self.host.edge.check(self.spec.backend(service))

    def _check_ports(self) -> None:
        theirs: dict[tuple[int, str], str] = {}
        for container in self.engine.containers(all=False):
            ours = container["Labels"].get(PROJECT_LABEL) == self.spec.project
            for port in container.get("Ports") or ():
                if port.get("PublicPort"):
                    name = "" if ours else str((container.get("Names") or ["?"])[0]).lstrip("/")
                    theirs[(port["PublicPort"], port.get("Type", "tcp"))] = name
        for step in (*self.plan.dependencies, *self.plan.services):
            if not step.changes:
                continue
            for port in self.model["services"][step.service].get("ports") or ():
                published, protocol = str(port.get("published") or ""), port.get("protocol", "tcp")
                if not published.isdigit():
                    continue
                holder = theirs.get((int(published), protocol))
                if holder == "":
                    continue
                if holder is None and _port_free(str(port.get("host_ip") or ""), int(published), protocol):
                    continue
                raise DeliveryError(
                    f"Checking host port {published} of {step.service}",
                    f"it is in use by {f'container {holder}' if holder else 'another program'}",
                    "Free it, or publish another port.",
                )

    def _check_disk(self) -> None:
        root = str(self.engine.info().get("DockerRootDir") or "")
        try:
            found = os.statvfs(root)
        except OSError:
            self.warnings.append(f"the engine's root {root} is not on this machine: free disk space not checked")
            return
        free, wanted = found.f_bavail * found.f_frsize, self.spec.min_free_mb * 2**20 + self.spec.required_bytes
        if free < wanted:
            raise DeliveryError(
                f"Checking the disk space under {root}",
                f"{free // 2**20} MB are free, {wanted // 2**20} MB are needed",
                "Free space there (old images: docker image prune), or lower min_free_mb.",
                "capacity",
            )

    def _check_architecture(self, host: str) -> None:
        for reference in dict.fromkeys(self.spec.images.values()):
            image = self.engine.image(reference)
            if image and host and image.get("Architecture") and image["Architecture"] != host:
                raise DeliveryError(
                    f"Checking image {reference}",
                    f"it is built for {image['Architecture']}, this host is {host}",
                    f"Build it for linux/{host} too.",
                )

    def _check_networks(self) -> None:
        """Compose remakes a network whose definition changed, and stops every container on it for that."""
        current = current_id(self.spec.project_dir)
        before = read_rollout(self.spec.project_dir, current) if current else None
        known = self._networks()
        if known and before is not None and before.get("networks") == known:
            return
        present = [one["ImageID"] for one in self.host.containers()]
        scales = {step.service: len(step.old_ids) + 1 for step in self.plan.steps if step.action in ("roll", "create", "run")}
        if not present or not scales:
            return
        changed = self.compose.shared_changes(scales, present[0])
        if changed:
            raise DeliveryError(
                "Checking the networks of the project",
                f"the definition of {', '.join(changed)} has changed; Compose would stop every container on it to make it again",
                "Give the changed network a new name, or make the change by hand with `docker compose down` and `up`.",
            )

    def _networks(self) -> str:
        """Networks as this Compose has made them from these files; the same again: it would leave them alone. Empty: not known."""
        there = sorted(one["Id"] for one in self.engine.networks({PROJECT_LABEL: self.spec.project}))
        identity = self.compose.identity
        if not identity or not there:
            return ""
        return hashlib.sha256(json.dumps([identity, there, self.model.get("networks")], sort_keys=True).encode()).hexdigest()

    # -- what was before

    def remember(self) -> None:
        if not self._remembered:
            self.host.remember(step.service for step in self.plan.steps)
            self._remembered = True

    # -- phases that change something

    def pull(self) -> None:
        references = []
        for step in self.plan.steps:
            if step.changes and step.new and step.new not in references and self.engine.image(step.new) is None:
                references.append(step.new)
        if references:
            with self.host.step("pulled", images=references):
                with ThreadPoolExecutor(max_workers=PARALLEL_PULLS) as pool:
                    list(pool.map(self.compose.pull, references))
                self.changed = True
        self._check_architecture(str(self.engine.version().get("Arch", "")))

    def dependencies(self) -> None:
        steps = [step for step in self.plan.dependencies if step.changes]
        self.host.await_dependencies(
            {step.service: step.old_ids for step in self.plan.dependencies if not step.changes}, DEPENDENCY_TIMEOUT
        )
        self._report_unchanged(self.plan.dependencies)
        if not steps:
            return
        self.remember()
        by_name = {step.service: step for step in steps}
        with self.host.step("dependencies", services=list(by_name)):
            self.changed = True
            created = self._create([step for step in steps if step.action != "start"])
            for names in planning.levels(list(by_name), self.model["services"]):
                self.host.side_by_side(lambda name: self._bring_up(by_name[name], created.get(name, [])), names)

    def _bring_up(self, step: Step, created: list[str]) -> None:
        started = time.monotonic()
        if step.action == "start":
            created = self._startable(step)
        alive = [one for one in alive_ids(self.host.of_service(step.service)) if one not in created]
        with self.host.step("dependencies", step.service, old=alive, new=created) as ended:
            self.host.retire(alive, None, DEPENDENCY_STOP_TIMEOUT)
            for container in created:
                self.engine.start(container)
            if step.action == "run":
                self._run_to_end(step.service, created)
            else:
                self.host.gate(step.service, ServiceSpec(step.service), created, DEPENDENCY_TIMEOUT)
            ended["seconds"] = round(time.monotonic() - started, 3)
        self._report(step, {"ready": ended["seconds"]}, ended["seconds"])

    def _run_to_end(self, service: str, containers: t.Sequence[str]) -> None:
        for container in containers:
            try:
                code = self.engine.wait(container, DEPENDENCY_TIMEOUT)
            except TimeoutError as exc:
                raise DeliveryError(f"Running {service} to its end", f"no end after {DEPENDENCY_TIMEOUT:g} s", "", "not_ready") from exc
            if code:
                seen = f"exit code {code}\nIts last lines:\n{self.host.last_lines(container)}\n"
                raise DeliveryError(f"Running {service} to its end", seen, "", "not_ready")

    def hold(self) -> None:
        """Writes wait at the edge, and services without a route, which could write too, stop."""
        if not self.spec.hold:
            return
        self.remember()
        unrouted = [name for name in self.spec.services if name not in self.spec.routes]
        found = self.host.containers()
        writers = {name: alive_ids(one for one in found if one["Labels"].get(SERVICE_LABEL) == name) for name in unrouted}
        writers = {name: ids for name, ids in writers.items() if ids}
        with self.host.step("held", stopped=writers):
            self.changed = True
            if self.spec.routes:
                unfinished = self.host.edge.hold(self.spec.project, "writes")
                if unfinished:
                    raise DeliveryError(
                        f"Holding writes of {self.spec.project} at the edge",
                        f"{unfinished} requests that had been let through before are still open",
                        "Try again when they have ended.",
                        "cutover",
                    )
            self.host.side_by_side(
                lambda name: self.host.retire(writers[name], self.spec.services[name].stop_timeout), list(writers)
            )

    def migrate(self) -> None:
        """The migrator, once: its container is made, named after the release, journaled, started, waited for."""
        step = self.plan.migrator
        if step is None or self.spec.migrator is None:
            return
        if not step.changes:
            self._report_unchanged((step,))
            return
        self.remember()
        service, started = step.service, time.monotonic()
        name = undo.migrator_name(self.spec)
        with self.host.step("migrated", migrator=service, image=step.new) as ended:
            self.changed = True
            container = self._leftover_migrator(service, name)
            if container is None:
                (container,) = self._create([step])[service]
                self.engine.rename(container, name)
                self.engine.set_restart_policy(container, {"Name": "no"})
                self.host.journal.note("migrated", container=container)
                self.engine.start(container)
            ended.update(container=container, **self._await_migrator(container, self.spec.migrator.timeout))
            self.engine.remove(container, force=True, volumes=True)
        seconds = time.monotonic() - started
        self._report(step, {"run": round(seconds, 3)}, seconds)

    def _leftover_migrator(self, service: str, name: str) -> str | None:
        """A migrator that a killed run left. Of this release: it is waited for, not doubled. Of another: it is stopped first."""
        mine = None
        for one in self.host.of_service(service):
            if f"/{name}" in (one.get("Names") or ()) and one["State"] != "created":
                mine = one["Id"]
            elif planning.is_alive(one):
                self.host.retire([one["Id"]], MIGRATOR_STOP_TIMEOUT)
            elif f"/{name}" in (one.get("Names") or ()):
                self.engine.remove(one["Id"], force=True, volumes=True)
        return mine

    def _await_migrator(self, container: str, timeout: float) -> dict[str, t.Any]:
        tried = "Running the migrator"
        try:
            code = self.engine.wait(container, timeout)
        except TimeoutError:
            self.host.retire([container], MIGRATOR_STOP_TIMEOUT)
            seen = f"it did not end within {timeout:g} s and was stopped"
        else:
            if code == 0:
                return {"code": 0}
            seen = f"it ended with exit code {code}"
        path = self._keep_log(container)
        logs = self.host.last_lines(container)
        seen += f"\nIts last lines:\n{logs}\n" if logs else "; it wrote nothing"
        raise DeliveryError(tried, seen, f"The whole log is in {path}.", "migration", logs=logs.splitlines(), container=container)

    def _keep_log(self, container: str) -> str:
        path = os.path.join(release_path(self.spec.project_dir, self.spec.release_id), "migrator.log")
        write_atomically(path, self.engine.logs(container, 10000) + "\n")
        return path

    def roll(self) -> None:
        """Service after service. All new containers are made first, with one call of Compose, and started in their turn."""
        self.replan()  # what `hold` stopped has to be started again even where nothing changed
        steps = [step for step in self.plan.services if step.changes]
        self._report_unchanged(self.plan.services)
        self.remember()
        kept = self._take_kept(steps)
        if not steps:
            self._let_requests_in()
            return
        fresh = [step for step in steps if step.action not in ("start", "swap")]
        created: dict[str, list[str]] = {}
        if fresh:
            # Not routed: making containers switches nothing.
            with self.host.step("rolling", None, routed=False, creating=[step.service for step in fresh]) as ended:
                self.changed = True
                created = self._create(fresh)
                ended["created"] = created
                self.host.note_record(networks=self._networks())
        if self.waiter is not None:
            self.waiter.arm()
        self.changed = True
        roller = Roller(self.host)
        moves = [self._move(step, created.get(step.service, []), kept) for step in steps]
        group = [move for move in moves if move.step.strategy == "blue_green"]
        first = moves.index(group[0]) if group else len(moves)
        roller.run(moves[:first])
        if group:
            roller.run_group(group, self.model["services"])
            roller.run([move for move in moves[first:] if move not in group])
        for move in moves:
            self._report(move.step, move.phases, move.seconds, cut=move.cut, containers=move.new)
        self.warnings += roller.warnings
        self._let_requests_in()

    def _take_kept(self, steps: t.Sequence[Step]) -> dict[str, dict[str, t.Any]]:
        """What the release that serves has kept ends here, but for what this one swaps to. Returns all of it, by container."""
        current = current_id(self.spec.project_dir)
        if not current or current == self.spec.release_id:
            return {}
        return self.host.end_kept(current, [container for step in steps for container in step.kept_ids])

    def _move(self, step: Step, created: list[str], kept: t.Mapping[str, t.Mapping[str, t.Any]]) -> Move:
        service = step.service
        port = self.spec.routes.get(service) if self.host.has_edge else None
        new = list(step.kept_ids) or created or self._startable(step)
        old = [one for one in alive_ids(self.host.of_service(service)) if one not in new]
        policies = {container: kept[container]["restart"] for container in step.kept_ids if container in kept}
        if step.action == "start":
            before = (read_rollout(self.spec.project_dir, self.spec.release_id) or {}).get("before", {}).get("containers", {})
            policies = {container: before[container]["restart"] for container in new if container in before}
        return Move(step, self.spec.services[service], port, old, new, policies)

    def bake(self) -> None:
        """Watch all of the app for a while after the last service: whatever goes bad now takes the release back."""
        judgement = Judgement.from_dict(self.spec.bake)
        if not judgement.seconds:
            return
        found, kept = self.host.containers(), self.host.kept()
        containers = {
            name: alive_ids(one for one in found if one["Labels"].get(SERVICE_LABEL) == name and one["Id"] not in kept)
            for name in self.spec.services
        }
        counting = self.spec.routes if self.spec.edge.get("type") in WEIGHING else {}
        upstreams = {
            self.spec.backend(name): [(self.host.address(container), port) for container in containers[name]]
            for name, port in counting.items()
        }
        with self.host.step("baking", seconds=judgement.seconds) as ended:
            watch = Watch(self.host, judgement, containers, upstreams)
            counted = watch.hold_out(f"Watching release {self.spec.release_id}")
            ended.update(requests=counted.requests, errors=counted.errors)
        self.warnings += watch.warnings

    def _let_requests_in(self) -> None:
        """What `quiesced` held is let through: the new containers serve. Writes go on waiting where this release holds them."""
        if self.spec.routes and self.host.has_edge:
            # Whoever held it, this release or one whose way back failed: what is asked now to confirm the release may pass.
            self.host.edge.hold(self.spec.project, "writes" if self.spec.hold else "off")

    def _startable(self, step: Step) -> list[str]:
        """The newest stopped containers that are right as they are."""
        wanted = self.hashes.get(step.service)
        found = [one for one in self.host.of_service(step.service) if one["Labels"].get(planning.HASH_LABEL) == wanted]
        found.sort(key=lambda one: one["Created"])
        return [one["Id"] for one in found[-step.replicas :]] if step.action == "start" else []

    def _create(self, steps: t.Sequence[Step]) -> dict[str, list[str]]:
        """New containers beside the old ones: the ids that are there afterwards and were not before."""
        if not steps:
            return {}

        def by_service(found: t.Iterable[Container]) -> dict[str, list[str]]:
            names = {step.service for step in steps}
            there: dict[str, list[str]] = {name: [] for name in names}
            for one in found:
                if one["Labels"].get(SERVICE_LABEL) in names:
                    there[one["Labels"][SERVICE_LABEL]].append(one["Id"])
            return there

        before = by_service(self.host.containers())
        self.compose.create({step.service: len(before[step.service]) + step.replicas for step in steps})
        after = by_service(self.host.containers())
        created = {name: [one for one in ids if one not in before[name]] for name, ids in after.items()}
        for step in steps:
            if len(created[step.service]) != step.replicas:
                raise DeliveryError(
                    f"Creating containers of {step.service}",
                    f"Compose made {', '.join(map(short_id, created[step.service])) or 'none'}, {step.replicas} were asked for",
                    "See that nothing else works on this project at the same time.",
                    "cutover",
                )
        return created

    # -- the result

    @contextlib.contextmanager
    def timed(self, phase: str) -> t.Iterator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.durations[phase] = round(time.monotonic() - started, 3)

    def _report(self, step: Step, phases: t.Mapping[str, float], seconds: float, **more: t.Any) -> None:
        self.done[step.service] = {
            "action": step.action,
            "strategy": step.strategy,
            "reason": step.reason,
            "seconds": round(seconds, 3),
            "phases": dict(phases),
            **more,
        }

    def _report_unchanged(self, steps: t.Iterable[Step]) -> None:
        for step in steps:
            if not step.changes:
                self._report(step, {}, 0.0)

    def result(self, planned: Plan) -> dict[str, t.Any]:
        return {
            "changed": self.changed,
            "plan": planned.as_dict(),
            "lines": planned.lines,
            "services": self.done,
            "durations": self.durations,
            "delivery_warnings": self.warnings,
            "volumes": self.volumes,
        }


def _port_free(address: str, port: int, protocol: str) -> bool:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
    with socket.socket(family, kind) as probe:
        if kind == socket.SOCK_STREAM:
            # Connections that are just going do not hold the port; a listener does, also with this set.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True
