# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the kopia_* and restic_* modules are: one argument spec and one function for each pair of twins."""

from __future__ import annotations

import contextlib
import os
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import restore as restoring
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import sets, taking
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import (
    Settings,
    SnapshotEngine,
    engine_from,
    password_of,
)

_CONNECTION: dict[str, t.Any] = {
    "repository": {"type": "str", "required": True},
    "password": {"type": "str", "no_log": True},
    "password_file": {"type": "path", "no_log": False},
    "config_dir": {"type": "path", "default": "/var/lib/selfhost-delivery/engine"},
    "program": {"type": "path"},
    "env": {"type": "dict", "no_log": True},
    "repository_id": {"type": "str"},
    "read_only": {"type": "bool", "default": False},
    "cache_mb": {"type": "int"},
}
_DOCKER: dict[str, t.Any] = {"docker_socket": {"type": "path", "default": "/var/run/docker.sock"}}

REPOSITORY_ARGUMENTS: dict[str, t.Any] = {
    **_CONNECTION,
    "state": {"type": "str", "choices": ["present", "connected", "disconnected"], "default": "present"},
    "new_password": {"type": "str", "no_log": True},
    "new_password_file": {"type": "path", "no_log": False},
    "maintenance_owner": {"type": "bool", "default": False},
}
SNAPSHOT_ARGUMENTS: dict[str, t.Any] = {
    **_CONNECTION,
    **_DOCKER,
    "set_id": {"type": "str", "required": True},
    "manifest_dir": {"type": "path", "required": True},
    "volumes": {"type": "list", "elements": "str", "default": []},
    "paths": {"type": "list", "elements": "path", "default": []},
    "metadata": {"type": "dict", "default": {}},
    "project": {"type": "str", "default": ""},
    "volume_options": {"type": "dict", "default": {}},
    "consistency": {"type": "str", "choices": ["none", "pause", "stop", "hooks"], "default": "pause"},
    "hooks": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "container": {"type": "str", "required": True},
            "before": {"type": "list", "elements": "str", "default": []},
            "after": {"type": "list", "elements": "str", "default": []},
        },
    },
    "verify": {"type": "str", "choices": ["none", "repository", "restore"], "default": "repository"},
    "freeze_timeout": {"type": "int", "default": 600},
    "stop_timeout": {"type": "int", "default": 30},
    "keep": {"type": "int", "default": 0},
    "preflight": {"type": "bool", "default": False},
}
RESTORE_ARGUMENTS: dict[str, t.Any] = {
    **_CONNECTION,
    **_DOCKER,
    "set_id": {"type": "str", "required": True},
    "manifest_dir": {"type": "path", "required": True},
    "volumes": {"type": "list", "elements": "str", "default": []},
    "paths": {"type": "list", "elements": "path", "default": []},
    "app": {"type": "str", "default": ""},
    "keep_current": {"type": "bool", "default": True},
    "containers": {"type": "str", "choices": ["restart", "leave_stopped"], "default": "restart"},
    "project": {"type": "str", "default": ""},
    "target": {"type": "path"},
    "checks": {
        "type": "list",
        "elements": "dict",
        "default": [],
        "options": {
            "name": {"type": "str", "required": True},
            "image": {"type": "str", "required": True},
            "command": {"type": "list", "elements": "str", "required": True},
            "mount": {"type": "str", "required": True},
            "user": {"type": "str"},
            "env": {"type": "dict", "no_log": True},
            "timeout": {"type": "int", "default": 600},
        },
    },
    "stop_timeout": {"type": "int", "default": 30},
    "keep": {"type": "int", "default": 0},
}
INFO_ARGUMENTS: dict[str, t.Any] = {
    **_CONNECTION,
    "manifest_dir": {"type": "path", "required": True},
    "set_id": {"type": "str"},
    "app": {"type": "str", "default": ""},
}
#: Keyword arguments of AnsibleModule that all eight modules share.
COMMON: dict[str, t.Any] = {
    "supports_check_mode": True,
    "mutually_exclusive": [("password", "password_file")],
    "required_one_of": [("password", "password_file")],
}
REPOSITORY_COMMON: dict[str, t.Any] = {
    **COMMON,
    "mutually_exclusive": [*COMMON["mutually_exclusive"], ("new_password", "new_password_file")],
}


def repository(kind: str, params: t.Mapping[str, t.Any], check_mode: bool) -> dict[str, t.Any]:
    """``{changed, state, repository_id, free_bytes, engine_version, diff}``; the id is empty where check mode would create one."""
    with _opened(kind, params) as engine:
        there = os.path.isdir(engine.directory)
        result: dict[str, t.Any] = {"changed": False, "engine_version": engine.version(), "warnings": []}
        if params["state"] == "disconnected":
            if not there or not check_mode:  # asking for its version made the directory
                engine.disconnect()
            return {**result, "changed": there, "repository_id": "", "free_bytes": engine.free_bytes(), "diff": {"before": {}, "after": {}}}
        new = None
        if params["new_password"] is not None or params["new_password_file"] is not None:
            new = password_of(params["new_password"], params["new_password_file"])
            engine = _opened_by(kind, params, engine, new)
        found = engine.status()
        before: dict[str, t.Any] = {"repository": found.repository_id}
        if found.state != "ready" and params["state"] == "connected":
            found = engine.connect()
        elif found.state != "ready":
            result["changed"] = True
            if check_mode:
                engine.refuse_creation()
            else:
                found = engine.create()
        after = {"repository": found.repository_id or "a new one"}
        if found.state == "ready":
            policies = engine.settle_policies(params["maintenance_owner"], check_mode)
            before.update(policies[0] if not result["changed"] else {})
            after.update(policies[1])
            if new is not None and engine.settings.password != new:
                before["password"], after["password"] = "the one before", "the new one"  # noqa: S105
                if not check_mode:
                    engine.change_password(new)
        result["changed"] = before != after
        return {**result, "repository_id": found.repository_id, "free_bytes": found.free_bytes, "diff": {"before": before, "after": after}}


def _opened_by(kind: str, params: t.Mapping[str, t.Any], engine: SnapshotEngine, new: str) -> SnapshotEngine:
    """The engine with the new password where that is the repository's already, else as it is."""
    changed = _engine(kind, {**params, "password": new, "password_file": None})
    try:
        if changed.status().state == "ready":
            return changed
    except DeliveryError:
        pass  # the old one says what is wrong, if anything is
    return engine


def snapshot(kind: str, params: t.Mapping[str, t.Any], check_mode: bool) -> dict[str, t.Any]:
    """See ``taking.take_locked``; the items of the set are laid out flat."""
    with _opened(kind, params) as engine:
        if params["read_only"]:
            raise DeliveryError("take a snapshot set", "the repository is to be read only", "Leave read_only out.", "config")
        kinds = {params["consistency"], *(dict(one or {}).get("consistency") for one in params["volume_options"].values())}
        if ("hooks" in kinds) != bool(params["hooks"]):
            raise DeliveryError(
                "take a snapshot set", "consistency hooks and the option hooks need each other", "Give both or neither.", "config"
            )
        request = sets.Request(
            set_id=params["set_id"],
            manifest_dir=params["manifest_dir"],
            volumes=params["volumes"],
            paths=params["paths"],
            metadata=params["metadata"],
            options={name: _part_options(name, one) for name, one in params["volume_options"].items()},
            project=params["project"],
            consistency=params["consistency"],
            hooks=params["hooks"],
            verify=params["verify"],
            freeze_timeout=float(params["freeze_timeout"]),
            stop_timeout=float(params["stop_timeout"]),
            keep=params["keep"],
        )
        only_look = check_mode or params["preflight"]
        result = taking.take(engine, Engine(params["docker_socket"]), request, check_mode=only_look)
        taken = result.pop("set", {})
        result.update({key: taken.get(key) for key in ("created", "bytes", "files", "parts")} if taken else {})
        if params["preflight"]:
            result["changed"] = False
        return result


def restore(kind: str, params: t.Mapping[str, t.Any], check_mode: bool) -> dict[str, t.Any]:
    """See ``restore.restore``."""
    with _opened(kind, params) as engine:
        if params["read_only"] and params["keep_current"]:
            raise DeliveryError(
                "restore from a repository that is read only",
                "what is replaced could not be kept there",
                "Set keep_current false.",
                "config",
            )
        request = restoring.Request(
            set_id=params["set_id"],
            manifest_dir=params["manifest_dir"],
            volumes=params["volumes"],
            paths=params["paths"],
            app=params["app"],
            keep_current=params["keep_current"],
            restart=params["containers"] == "restart",
            stop_timeout=float(params["stop_timeout"]),
            keep=params["keep"],
            project=params["project"],
            target=params["target"] or "",
            checks=params["checks"],
        )
        return restoring.restore(engine, Engine(params["docker_socket"]), request, check_mode=check_mode)


def info(kind: str, params: t.Mapping[str, t.Any], check_mode: bool) -> dict[str, t.Any]:
    """``{changed: False, repository_id, sets}``, newest first."""
    with _opened(kind, params) as engine:
        found = engine.connect()
        catalog = sets.Catalog(engine, found.repository_id, params["manifest_dir"])
        if params["set_id"]:
            chosen = [catalog.get(params["set_id"])] if params["set_id"] in catalog.ids() else []
        else:
            chosen = catalog.sets(params["app"])
        return {
            "changed": False,
            "repository_id": found.repository_id,
            "sets": [one.as_result() for one in chosen],
            "warnings": [],
        }


def _part_options(name: str, raw: t.Any) -> dict[str, t.Any]:
    if not isinstance(raw, t.Mapping) or set(raw) - {"consistency", "service"}:
        raise DeliveryError(
            f"read volume_options.{name}", "it is no map of consistency and service", "Give such a map for each name.", "config"
        )
    return dict(raw)


def _engine(kind: str, params: t.Mapping[str, t.Any]) -> SnapshotEngine:
    return engine_from(
        kind,
        Settings(
            repository=params["repository"].rstrip("/") if params["repository"].startswith("/") else params["repository"],
            password=password_of(params["password"], params["password_file"]),
            config_dir=params["config_dir"],
            program=params["program"] or "",
            env={key: str(value) for key, value in (params["env"] or {}).items()},
            repository_id=params["repository_id"] or "",
            read_only=bool(params["read_only"]),
            cache_mb=params["cache_mb"],
        ),
    )


@contextlib.contextmanager
def _opened(kind: str, params: t.Mapping[str, t.Any]) -> t.Iterator[SnapshotEngine]:
    """The engine, which leaves no secret on the host. What the operating system refuses is told like any other failure."""
    engine = _engine(kind, params)
    try:
        yield engine
    except OSError as exc:
        place = f" ({os.fsdecode(exc.filename)})" if exc.filename else ""
        raise DeliveryError(
            "work on a snapshot set", f"{exc.strerror or exc}{place}", "Run as root; check the disk and the place.", "snapshot"
        ) from exc
    finally:
        engine.close()
