# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A drill: a set is copied into a folder of its own, what depends on the data is started on the copy, asked, and all of it removed.

It has a Compose project, volumes and a network of its own, without ports and without a route to anywhere. What a drill that was
killed left behind is removed by the next one of the same app, before it begins.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import os
import re
import shutil
import time
import typing as t
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.command import run
from ansible_collections.selfhost.delivery.plugins.module_utils.data import copying, metrics
from ansible_collections.selfhost.delivery.plugins.module_utils.data.choice import age, moment, size
from ansible_collections.selfhost.delivery.plugins.module_utils.data.scratch import LABEL, Scratch, scratch_project
from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json, write_json
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import MARKER, Compose, end_leftovers
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import SnapshotEngine

#: Seconds in which a check may fail since what it asks is still starting, where no health check told that it is ready.
SETTLE = 30.0


@dataclass(frozen=True)
class Request:
    """``services`` empty: what the Compose file has beside ``built``, or those where there is nothing else.

    ``checks``: ``{name, service, command, expect}``, the last a regular expression or empty. ``deploy_dir``: as on the host the set was
    taken on. ``env_files``: relative to it. ``timeout`` in seconds, for the start and for each check.
    """

    app: str
    environment: str
    project: str
    deploy_dir: str
    manifest_dir: str
    set_id: str = "latest"
    env_files: t.Sequence[str] = ()
    built: t.Sequence[str] = ()
    services: t.Sequence[str] = ()
    checks: t.Sequence[t.Mapping[str, t.Any]] = ()
    timeout: float = 300.0
    folder: str = "/var/lib/selfhost-delivery/drills"
    metrics_dir: str = ""
    docker_config: str = ""

    @property
    def scratch(self) -> str:
        """The Compose project of the drill."""
        return f"drill-{self.project}"[:63]

    @property
    def box(self) -> str:
        return os.path.join(self.folder, self.scratch)

    @property
    def result_path(self) -> str:
        return os.path.join(self.folder, f"{self.app}-{self.environment}.json")


@dataclass
class _Record:
    """What is known so far; ends in the result file."""

    request: Request
    began: float = field(default_factory=time.time)
    steps: list[dict[str, t.Any]] = field(default_factory=list)
    checks: list[dict[str, t.Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    found: t.Optional[copying.Found] = None
    failure: str = ""
    failure_class: str = ""

    @contextlib.contextmanager
    def step(self, name: str) -> t.Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.steps.append({"step": name, "seconds": round(time.monotonic() - began, 3)})


def drill(engine: SnapshotEngine, docker: Engine, request: Request, check_mode: bool = False) -> dict[str, t.Any]:
    """The result, as it is written to the result file: ``verdict`` ``passed`` or ``failed``, ``failure``, ``steps``, ``checks``, ``lines``.

    A drill that could not even begin (another one runs, the folder cannot be used) raises.
    """
    _refuse_nonsense(request)
    if check_mode:
        found = copying.find(engine, request.manifest_dir, request.set_id, request.app)
        copying.check_room(request.folder, found.bytes)
        what = f"{found.info.set_id} ({size(found.bytes)})"
        told = f"would copy {what} into {request.box}, start it as project {request.scratch}, and remove it"
        which: dict[str, t.Any] = {"set_id": found.info.set_id, "repository_id": found.catalog.repository_id}
        nothing: dict[str, t.Any] = {"verdict": "", "failure": "", "steps": [], "checks": [], "notes": []}
        return {"changed": True, **which, **nothing, "lines": [told]}
    os.makedirs(request.folder, mode=0o700, exist_ok=True)
    record = _Record(request)
    with _alone(request):
        before = os.environ.get(MARKER)
        # Whatever this starts carries the mark, so that the next drill finds it if this one is killed.
        os.environ[MARKER] = request.scratch
        try:
            try:
                with record.step("remove what an earlier drill left"):
                    left = remove(docker, request)
                if left:
                    record.notes.append(f"an earlier drill was cut short; removed what it left: {', '.join(left)}")
                _work(engine, docker, request, record)
            except DeliveryError as exc:
                record.failure, record.failure_class = exc.message, exc.failure_class
            finally:
                with record.step("remove it all"):
                    remove(docker, request)
        finally:
            os.environ.pop(MARKER)
            if before is not None:
                os.environ[MARKER] = before
        return _written(record)


def remove(docker: Engine, request: Request) -> list[str]:
    """Remove all that a drill of this app made; what there was."""
    ended = end_leftovers(request.scratch)
    found = [f"{len(ended)} processes"] if ended else []
    project = {"com.docker.compose.project": request.scratch}
    containers = docker.containers(project)
    foreign = [one["Names"][0].lstrip("/") for one in containers if LABEL not in (one.get("Labels") or {})]
    if foreign:
        seen = f"the Compose project {request.scratch} is somebody's: {', '.join(foreign)}"
        raise DeliveryError(f"drill {request.app}", seen, "Give it another name.")
    for one in containers:
        docker.remove(one["Id"], force=True, volumes=True)
        found.append(one["Names"][0].lstrip("/"))
    label = {LABEL: request.scratch}
    for kind, names in (
        ("network", [one["Name"] for one in docker.networks(label)]),
        ("volume", [one["Name"] for one in docker.volumes(label)]),
    ):
        if names:
            gone = run(["docker", kind, "rm", *names], timeout=120, env={"DOCKER_HOST": f"unix://{docker.socket}"})
            if not gone.ok:
                raise DeliveryError(f"remove the {kind}s of a drill", gone.last_lines(3), f"Remove {', '.join(names)} by hand.", "snapshot")
            found += names
    if os.path.lexists(request.box):
        found.append(request.box)
        shutil.rmtree(request.box)
    return found


def lines(result: t.Mapping[str, t.Any]) -> list[str]:
    """A result as people read it."""
    shown = [f"drill of {result['app']} {result['environment']}: {result['verdict'].upper()} after {result['seconds']:.1f} s"]
    if result["set_id"]:
        old = age(datetime.timedelta(seconds=result["set_age_seconds"]))
        shown.append(f"set {result['set_id']}, {old} old, {result['files']:,} files, {size(result['bytes'])}")
    shown += [f"  {one['step']:<36} {one['seconds']:>8.1f} s" for one in result["steps"]]
    for one in result["checks"]:
        shown.append(f"  check {one['name']}: {'ok' if one['ok'] else 'FAILED'}, {one['seconds']:.1f} s: {one['output'] or '(no output)'}")
    shown += [f"  note: {text}" for text in result["notes"]]
    if result["failure"]:
        shown.append(f"  {result['failure']}")
    return shown


def _refuse_nonsense(request: Request) -> None:
    for one in request.checks:
        try:
            re.compile(one.get("expect") or "")
        except re.error as error:
            seen = f"{one['expect']!r} of check {one['name']} is no regular expression: {error}"
            raise DeliveryError("preparing a drill", seen) from None


def _work(engine: SnapshotEngine, docker: Engine, request: Request, record: _Record) -> None:
    with record.step("find the set"):
        record.found = found = copying.find(engine, request.manifest_dir, request.set_id, request.app)
        copying.check_room(request.folder, found.bytes)
    with record.step("copy it out and compare it"):
        record.notes += copying.copy(found, docker, request.box)
    with record.step("prepare the scratch project"):
        scratch = _prepare(docker, request, found)
        record.notes += scratch.notes
    with record.step("start " + ", ".join(scratch.model["services"])):
        _start(docker, request, scratch)
    for one in request.checks:
        with record.step(f"check {one['name']}"):
            _check(docker, request, record, one)
    if not request.checks:
        record.notes.append("no checks are described in delivery_app.drill: what is proven is that it starts")


def _prepare(docker: Engine, request: Request, found: copying.Found) -> Scratch:
    releases = os.path.join(request.deploy_dir, "releases") + "/"
    folder = next((part["name"] for part in found.parts if part["kind"] == "path" and part["name"].startswith(releases)), None)
    if folder is None:
        seen = f"the set {found.info.set_id} holds no release folder: nothing had been promoted when it was taken"
        raise DeliveryError("preparing a drill", seen, "Use another.", "snapshot")
    copied = os.path.join(request.box, "paths")
    release = os.path.join(copied, folder.lstrip("/"))
    told = read_json(os.path.join(release, "release.json")) or {}
    files = [os.path.join(release, one["name"]) for one in told.get("plan", {}).get("files", [])]
    project_dir = os.path.join(copied, request.deploy_dir.lstrip("/"))
    env_files = [os.path.join(project_dir, name) for name in request.env_files]
    env_files.append(os.path.join(release, "deploy.env"))
    compose = Compose(project_dir, request.project, files, env_files, docker.socket, request.scratch, request.docker_config)
    compose.version()
    model, _warned = compose.model()
    paths = {os.path.normpath(part["name"]): copying.place(request.box, part) for part in found.parts if part["kind"] == "path"}
    # Relative paths of the Compose file were read below the copy; those are in place already.
    paths[project_dir] = project_dir
    empty = os.path.join(request.box, "empty")
    os.makedirs(empty, mode=0o700)
    volumes = {part["name"]: copying.place(request.box, part) for part in found.parts if part["kind"] == "volume"}
    services = list(request.services) or [name for name in model["services"] if name not in request.built] or list(request.built)
    return scratch_project(model, request.scratch, services, volumes, paths, empty)


def _start(docker: Engine, request: Request, scratch: Scratch) -> None:
    env = {"DOCKER_HOST": f"unix://{docker.socket}", "COMPOSE_FILE": "", "COMPOSE_PROFILES": ""}
    if request.docker_config:
        env["DOCKER_CONFIG"] = request.docker_config
    argv = ["docker", "compose", "--ansi", "never", "--project-directory", request.box, "--project-name", request.scratch, "-f", "-"]
    argv += ["up", "--detach", "--no-build", "--quiet-pull", "--wait", "--wait-timeout", str(int(request.timeout))]
    # The model holds the app's settings, so it goes through standard input.
    started = run(argv, timeout=request.timeout + 1800, env=env, stdin=json.dumps(scratch.model))
    if started.ok:
        return
    said = []
    for one in docker.containers({"com.docker.compose.project": request.scratch}):
        state = docker.inspect(one["Id"])["State"]
        if not state.get("Running") or (state.get("Health") or {}).get("Status") not in (None, "healthy"):
            said.append(f"{one['Labels']['com.docker.compose.service']}: {docker.logs(one['Id'], 5).strip() or 'no output'}")
    raise DeliveryError(
        f"starting {', '.join(scratch.model['services'])} on the restored data",
        "; ".join([started.last_lines(3), *said]),
        "The set gives no working app back: take another and look into this one with restore.yml -e into=…",
        "not_ready",
    )


def _check(docker: Engine, request: Request, record: _Record, check: t.Mapping[str, t.Any]) -> None:
    labels = {"com.docker.compose.project": request.scratch, "com.docker.compose.service": check["service"]}
    containers = docker.containers(labels, all=False)
    if not containers:
        raise DeliveryError(
            f"check {check['name']}", f"the service {check['service']} does not run in the drill", "Name it in drill.services.", "not_ready"
        )
    began = time.monotonic()
    while True:
        try:
            code, output = docker.exec(containers[0]["Id"], list(check["command"]), request.timeout)
        except TimeoutError as exc:
            code, output = -1, str(exc)
        seconds = time.monotonic() - began
        sound = code == 0 and re.search(check.get("expect") or "", output) is not None
        if sound or code == 0 or seconds > min(SETTLE, request.timeout):
            break
        time.sleep(0.5)
    shown = " / ".join(output.strip().splitlines()[-3:])[:300]
    told = {"name": check["name"], "service": check["service"], "ok": sound, "code": code, "output": shown}
    record.checks.append({**told, "seconds": round(seconds, 3)})
    if not sound:
        seen = f"it ended with {code}: {shown}" if code else f"it said {shown!r}, which does not match {check['expect']!r}"
        raise DeliveryError(f"check {check['name']} in {check['service']}", seen, "Look whether the set or the check is wrong.", "snapshot")


def _written(record: _Record) -> dict[str, t.Any]:
    request, found = record.request, record.found
    now = time.time()
    try:
        earlier = read_json(request.result_path) or {}
    except ValueError:
        earlier = {}
    passed = not record.failure
    result: dict[str, t.Any] = {
        "app": request.app,
        "environment": request.environment,
        "verdict": "passed" if passed else "failed",
        "failure": record.failure,
        "failure_class": record.failure_class,
        "began": _time(record.began),
        "seconds": round(now - record.began, 3),
        "last_success": _time(now) if passed else earlier.get("last_success", ""),
        "set_id": found.info.set_id if found else "",
        "repository_id": found.catalog.repository_id if found else "",
        "set_created": found.info.created if found else "",
        "set_age_seconds": round(record.began - moment(found.info.created).timestamp()) if found else None,
        "bytes": found.bytes if found else 0,
        "files": sum(part["files"] for part in found.parts) if found else 0,
        "steps": record.steps,
        "checks": record.checks,
        "notes": record.notes,
    }
    write_json(request.result_path, result)
    last = moment(result["last_success"]).timestamp() if result["last_success"] else 0
    name = "selfhost_delivery_drill_"
    metrics.write(
        request.metrics_dir,
        f"selfhost_delivery_drill_{request.app}_{request.environment}",
        {
            f"{name}last_success_timestamp_seconds": ("When a drill passed last, 0 for never.", last),
            f"{name}last_run_timestamp_seconds": ("When the last drill ended.", now),
            f"{name}passed": ("Whether the last drill passed.", float(passed)),
            f"{name}duration_seconds": ("How long it took.", result["seconds"]),
            f"{name}set_age_seconds": ("How old the set was that it restored.", result["set_age_seconds"]),
            f"{name}restored_bytes": ("How much it restored.", result["bytes"]),
        },
        {"app": request.app, "environment": request.environment},
    )
    return {"changed": True, **result, "lines": lines(result)}


@contextlib.contextmanager
def _alone(request: Request) -> t.Iterator[None]:
    descriptor = os.open(f"{request.box}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DeliveryError(f"drill {request.app}", "another drill of it is running here", "Wait for its end.", "lock") from None
        yield
    finally:
        os.close(descriptor)


def _time(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.timezone.utc).isoformat(timespec="seconds").replace("+00:00", "Z")
