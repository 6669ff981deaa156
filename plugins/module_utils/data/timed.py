# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The program that timers of a host start, without a controller: ``… snapshot CONFIG`` takes a set, ``… drill CONFIG`` does a drill.

``CONFIG`` is a JSON file with the parameters of ``snapshot_drill`` and those named in ``set_of``; it holds no password, but where it is.
Exit code 0: done, or nothing to do; 1: it failed, and the last line says why.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import signal
import socket
import sys
import time
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils import releases
from ansible_collections.selfhost.delivery.plugins.module_utils.data import metrics
from ansible_collections.selfhost.delivery.plugins.module_utils.data.choice import moment, size
from ansible_collections.selfhost.delivery.plugins.module_utils.data.connection import engine_of
from ansible_collections.selfhost.delivery.plugins.module_utils.data.drill import Request, drill
from ansible_collections.selfhost.delivery.plugins.module_utils.data.retention import retained
from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import Compose
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import api, sets
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import SnapshotEngine

#: Seconds that the lock is held for at most without being renewed.
_TTL = 900.0
Config = t.Mapping[str, t.Any]


def drill_request(params: Config) -> Request:
    """From the parameters of ``snapshot_drill``."""
    names = ("app", "environment", "project", "deploy_dir", "manifest_dir", "set_id", "env_files", "built", "services", "checks", "folder")
    given: dict[str, t.Any] = {name: params[name] for name in names}
    given.update(metrics_dir=params["metrics_dir"] or "", docker_config=params["docker_config"] or "")
    return Request(**given, timeout=float(params["timeout"]))


def take(config: Config, now: t.Optional[float] = None) -> dict[str, t.Any]:
    """Take a set of what runs, and forget what ``retention`` does not keep. ``skipped``: why none was, where that is no failure."""
    began = time.time() if now is None else now
    deploy_dir = config["deploy_dir"]
    current = releases.current_release(deploy_dir)
    if current is None:
        return {"skipped": "nothing was promoted here yet"}
    lease = releases.Lease(deploy_dir)
    run_id = f"scheduled-{os.getpid()}-{int(began)}"
    try:
        lease.acquire(run_id, _holder(), "", _TTL)
    except DeliveryError as exc:
        if exc.failure_class != "lock":
            raise
        return {"skipped": f"{exc.seen}; a release takes a set of its own"}
    try:
        with releases.Keepalive(lease, _TTL, "scheduled snapshot"):
            return _take(config, current, began)
    finally:
        lease.release()


def _take(config: Config, current: t.Mapping[str, t.Any], began: float) -> dict[str, t.Any]:
    volumes, paths = set_of(config, current, Engine(config["docker_socket"]))
    if not volumes:
        return {"skipped": "there is no data yet"}
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(began))
    params = {name: option.get("default") for name, option in api.SNAPSHOT_ARGUMENTS.items()}
    params.update({name: config[name] for name in params if name in config})
    params.update(
        set_id=f"scheduled-{stamp}",
        volumes=volumes,
        paths=paths,
        metadata={
            "app": config["app"],
            "environment": config["environment"],
            "release": "",
            "previous": current["id"],
            "tag": current["tag"],
        },
        keep=0 if config["retention"] else config["keep"],
    )
    with contextlib.closing(engine_of(config)) as engine:
        result = api.snapshot(engine.name, params, False)
        if config["retention"]:
            result.update(_forget(engine, config, result))
    return result


def _forget(engine: SnapshotEngine, config: Config, result: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    catalog = sets.Catalog(engine, result["repository_id"], config["manifest_dir"])
    complete = [(one.set_id, moment(one.created)) for one in catalog.sets() if one.complete]
    never = retained(complete, config["retention"]) | {result["set_id"]}
    forgotten, warnings = sets.forget(engine, config["manifest_dir"], result["repository_id"], 0, never)
    return {"forgotten": forgotten, "warnings": result["warnings"] + warnings}


def set_of(config: Config, current: t.Mapping[str, t.Any], docker: Engine) -> tuple[list[str], list[str]]:
    """What a set of the release that serves holds, as a promotion takes it: its volumes, env files, further paths and release folder.

    Of ``config``: ``project``, ``deploy_dir``, ``env_files``, ``volumes`` (empty for all of the Compose files) and ``paths``.
    """
    folder = releases.release_path(config["deploy_dir"], current["id"])
    env_files = [os.path.join(config["deploy_dir"], name) for name in config["env_files"]]
    files = [os.path.join(folder, one["name"]) for one in current["plan"]["files"]]
    pinned = os.path.join(folder, "deploy.env")
    compose = Compose(config["deploy_dir"], config["project"], files, [*env_files, pinned], config["docker_socket"], "")
    model, _warned = compose.model()
    known = model.get("volumes") or {}
    names = [(known.get(key) or {}).get("name") or f"{config['project']}_{key}" for key in config["volumes"] or known]
    return [name for name in names if docker.volume(name) is not None], [*env_files, *config["paths"], folder]


def main(arguments: t.Sequence[str]) -> int:
    if len(arguments) != 2 or arguments[0] not in ("snapshot", "drill"):
        sys.stderr.write("usage: snapshot|drill CONFIG\n")
        return 2
    # A stop of the unit is to clean up like any other end.
    signal.signal(signal.SIGTERM, _stop)
    config = read_json(arguments[1])
    if config is None:
        sys.stderr.write(f"there is no {arguments[1]}; setup.yml writes it\n")
        return 2
    try:
        return _snapshot(config) if arguments[0] == "snapshot" else _drill(config)
    except DeliveryError as exc:
        sys.stderr.write(f"{exc.message}\n")
        return 1


def _stop(_number: int, _frame: t.Any) -> None:
    raise SystemExit(143)


def _drill(config: Config) -> int:
    with contextlib.closing(engine_of(config)) as engine:
        result = drill(engine, Engine(config["docker_socket"]), drill_request(config))
    sys.stdout.write("\n".join(result["lines"]) + "\n")
    return 0 if result["verdict"] == "passed" else 1


def _snapshot(config: Config) -> int:
    began = time.time()
    failure: t.Optional[DeliveryError] = None
    result: dict[str, t.Any] = {}
    try:
        result = take(config, began)
    except DeliveryError as exc:
        failure = exc
    if result.get("skipped"):
        sys.stdout.write(f"no set was taken: {result['skipped']}\n")
        return 0
    _tell(config, result, began, failure)
    if failure is not None:
        raise failure
    for warning in result["warnings"]:
        sys.stdout.write(f"warning: {warning}\n")
    sys.stdout.write(
        f"set {result['set_id']}: {result['files']:,} files, {size(result['bytes'])}, frozen for {result['freeze_seconds']:.2f} s, "
        f"{time.time() - began:.1f} s in all; forgotten: {', '.join(result['forgotten']) or 'none'}\n"
    )
    return 0


def _tell(config: Config, result: t.Mapping[str, t.Any], began: float, failure: t.Optional[DeliveryError]) -> None:
    """Metrics; the time of the last success is read from the manifests, so that it outlives a failure."""
    newest = 0.0
    try:
        names = [name for name in os.listdir(config["manifest_dir"]) if name.startswith("scheduled-") and name.endswith(".manifest.json")]
        newest = max((os.path.getmtime(os.path.join(config["manifest_dir"], name)) for name in names), default=0.0)
    except OSError:
        pass
    name = "selfhost_delivery_snapshot_"
    metrics.write(
        config["metrics_dir"] or "",
        f"selfhost_delivery_snapshot_{config['app']}_{config['environment']}",
        {
            f"{name}last_success_timestamp_seconds": ("When a scheduled set was taken last, 0 for never.", newest),
            f"{name}last_run_timestamp_seconds": ("When the last try ended.", time.time()),
            f"{name}success": ("Whether the last try took a set.", float(failure is None)),
            f"{name}duration_seconds": ("How long it took.", time.time() - began),
            f"{name}freeze_seconds": ("How long the app's writers stood still.", result.get("freeze_seconds")),
            f"{name}bytes": ("What the set holds.", result.get("bytes")),
            f"{name}files": ("How many files it holds.", result.get("files")),
        },
        {"app": config["app"], "environment": config["environment"]},
    )


def _holder() -> dict[str, t.Any]:
    return {
        "user": getpass.getuser(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_started": releases.process_started(os.getpid()),
        "boot_id": releases.boot_id(),
        "pid_namespace": releases.pid_namespace(),
        "ci_url": "",
    }
