# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""From the rendered Compose project of an app to one that can run beside it and reach nothing: what a drill starts. Pure."""

from __future__ import annotations

import os
import typing as t
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

Model = t.Mapping[str, t.Any]

#: Names what belongs to drills; the value is the app's project.
LABEL = "selfhost.delivery.drill"
#: What a service keeps. Everything else (ports, labels an edge reads, rights on the host, restarts, other networks) stays behind.
_KEPT = (
    "image",
    "command",
    "entrypoint",
    "environment",
    "healthcheck",
    "user",
    "group_add",
    "working_dir",
    "shm_size",
    "ulimits",
    "tmpfs",
    "read_only",
    "init",
    "stop_signal",
    "stop_grace_period",
    "mem_limit",
    "cpus",
    "sysctls",
    "platform",
    "hostname",
    "secrets",
    "configs",
    "cap_drop",
    "security_opt",
)


@dataclass
class Scratch:
    """``model``: for ``docker compose -f -``. ``notes``: what is not as in production, in words."""

    model: dict[str, t.Any]
    notes: list[str] = field(default_factory=list)


def scratch_project(
    model: Model, project: str, services: t.Sequence[str], volumes: t.Mapping[str, str], paths: t.Mapping[str, str], empty: str
) -> Scratch:
    """The project ``project`` with ``services`` and what they depend on.

    ``volumes``: Docker's name of a volume to the folder with its copy. ``paths``: host path to the place of its copy; what lies below
    follows. ``empty``: a folder in which what no copy exists of is made, each empty.
    """
    known = model.get("services") or {}
    for name in services:
        if name not in known:
            seen = f"the Compose file of the set has no service {name}; it has {', '.join(sorted(known))}"
            raise DeliveryError("preparing a drill", seen, "Correct drill.services.")
    scratch = _Maker(model, project, volumes, paths, empty)
    result: dict[str, t.Any] = {}
    wanted = list(services)
    while wanted:
        name = wanted.pop(0)
        if name not in result:
            result[name] = scratch.service(name, known[name])
            wanted += list(result[name].get("depends_on", {}))
    made: dict[str, t.Any] = {
        "name": project,
        "services": result,
        "networks": {"default": {"internal": True, "labels": {LABEL: project}}},
        "volumes": scratch.volumes,
    }
    for kind in ("secrets", "configs"):
        used = {item["source"] for one in result.values() for item in one.get(kind, [])}
        if used:
            made[kind] = {name: scratch.file_of(kind, name) for name in sorted(used)}
    return Scratch(made, sorted(set(scratch.notes)))


class _Maker:
    def __init__(self, model: Model, project: str, volumes: t.Mapping[str, str], paths: t.Mapping[str, str], empty: str) -> None:
        self.model, self.project, self.copies, self.paths, self.empty = model, project, volumes, paths, empty
        self.notes: list[str] = []
        self.volumes: dict[str, t.Any] = {}

    def service(self, name: str, given: Model) -> dict[str, t.Any]:
        made = {key: given[key] for key in _KEPT if given.get(key) is not None}
        if "image" not in made:
            raise DeliveryError("preparing a drill", f"the service {name} has no image", "Name services with an image in drill.services.")
        needed = given.get("depends_on") or {}
        optional = {other for other, how in needed.items() if isinstance(how, t.Mapping) and how.get("required") is False}
        made["depends_on"] = {
            other: {"condition": how.get("condition", "service_started")} for other, how in needed.items() if other not in optional
        }
        made["restart"] = "no"
        made["labels"] = {LABEL: self.project}
        # Under the names by which the others know it.
        networks = given.get("networks") or {}
        aliases = sorted({alias for one in networks.values() if one for alias in one.get("aliases") or []})
        made["networks"] = {"default": {"aliases": aliases} if aliases else None}
        mounts = [mount for mount in (self.mount(name, one) for one in given.get("volumes") or []) if mount]
        if mounts:
            made["volumes"] = mounts
        return {key: value for key, value in made.items() if value not in ({}, [])}

    def mount(self, service: str, given: Model) -> dict[str, t.Any] | None:
        kind, target = given.get("type"), given["target"]
        base = {"target": target, **({"read_only": True} if given.get("read_only") else {})}
        if kind == "tmpfs":
            return dict(given)
        if kind == "volume":
            source = given.get("source")
            if not source:
                return {"type": "volume", **base}
            real = (self.model.get("volumes") or {}).get(source, {}).get("name") or source
            self.volumes[source] = {"name": f"{self.project}_{source}", "labels": {LABEL: self.project}}
            if real in self.copies:
                self.volumes[source].update(driver="local", driver_opts={"type": "none", "o": "bind", "device": self.copies[real]})
            else:
                self.notes.append(f"{service} begins with an empty volume {source}: the set does not hold it")
            extra = {key: given["volume"] for key in ("volume",) if given.get("volume")}
            return {"type": "volume", "source": source, **base, **extra}
        if kind == "bind":
            source = str(given["source"])
            if source.endswith("docker.sock"):
                self.notes.append(f"{service} does not get {source}")
                return None
            copied = self.copied(source)
            if copied:
                return {"type": "bind", "source": copied, **base}
            if given.get("read_only") and os.path.exists(source):
                self.notes.append(f"{service} reads {source} of this host: the set does not hold it")
                return {"type": "bind", "source": source, "target": target, "read_only": True}
            self.notes.append(f"{service} begins with an empty {target}: the set does not hold {source}; name it in snapshot.paths")
            place = os.path.join(self.empty, source.strip("/").replace("/", "_"))
            return {"type": "bind", "source": place, **base, "bind": {"create_host_path": True}}
        self.notes.append(f"{service} does not get the {kind} mount at {target}")
        return None

    def copied(self, source: str) -> str:
        """Where the copy of a host path is; empty when the set does not hold it."""
        clean = os.path.normpath(source)
        for path, place in self.paths.items():
            if clean == path or clean.startswith(path.rstrip("/") + "/"):
                found = place + clean[len(path) :]
                return found if os.path.lexists(found) else ""
        return ""

    def file_of(self, kind: str, name: str) -> dict[str, t.Any]:
        given = dict((self.model.get(kind) or {}).get(name) or {})
        given.pop("name", None)
        if given.get("external"):
            raise DeliveryError("preparing a drill", f"{kind[:-1]} {name} is external, so the set cannot hold it", "Use a file.")
        if given.get("file"):
            given["file"] = self.copied(str(given["file"])) or given["file"]
        return given
