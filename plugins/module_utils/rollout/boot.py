# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a host does without a controller: bring its app back after a start of machine or engine, stop it cleanly before, tidy up.

A start gives containers other addresses, so the edge is pointed anew. Who serves is decided as a release decides it: after the
commit has begun what is new, before that what ran before. Compose is not asked, and nothing is made or removed.

``main`` is what the unit ``<app>.service`` calls, out of the archive that the module ``boot_program`` packs.
"""

from __future__ import annotations

import os
import re
import sys
import typing as t
from datetime import datetime, timezone

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import SERVICE_LABEL, short_id
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import (
    Lease,
    busy,
    current_id,
    describe_holder,
    fold,
    parse_time,
    release_ids,
    release_path,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import pinned
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.host import Container, Host, await_engine, read_rollout
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.plan import Spec, is_alive

#: The engine of a machine that just starts; its unit may be up before it answers.
ENGINE_TIMEOUT = 120.0
DEPENDENCY_TIMEOUT = 120.0
#: Seconds that a container which does not say otherwise has for its end, as long as Compose's dependencies have in a release.
STOP_TIMEOUT = 30.0
#: What Compose notes on a container of the services it depends on, each ``name:condition:restart``.
DEPENDS_LABEL = "com.docker.compose.depends_on"


def bring_up(project_dir: str) -> list[str]:
    """Start what has to run and point the edge at it; what was done, one line each. The first ``DeliveryError`` after all was tried."""
    release = _deciding_release(project_dir)
    if release is None:
        return ["no release was committed here yet: nothing to bring up"]
    lock = Lease(project_dir).read()
    if lock is not None and _is_under_way(lock):
        return [f"a release is under way ({describe_holder(lock)}): it decides what runs"]
    with busy(project_dir):
        record = read_rollout(project_dir, release) or {}
        host = Host(Spec.from_dict(record["spec"]))
        await_engine(host.engine, ENGINE_TIMEOUT)
        return _Return(host, record["before"]["containers"], release == current_id(project_dir)).run()


def _deciding_release(project_dir: str) -> str | None:
    """The newest release that changed something here, ``None`` before the first commit."""
    current = current_id(project_dir)
    if not current:
        return None
    ids = sorted({*release_ids(project_dir), current}, reverse=True)
    return next((one for one in ids if "before" in (read_rollout(project_dir, one) or {})), None)


def _is_under_way(lock: t.Mapping[str, t.Any]) -> bool:
    """Somebody may still be working here: nobody from before the start of this machine is."""
    if Lease.status(lock) != "held":
        return False
    try:
        return parse_time(str(lock["heartbeat"])) > booted()
    except (KeyError, ValueError):
        return True


def booted() -> datetime:
    """When the first process of this machine started, which in a container is its own start."""
    with open("/proc/1/stat", encoding="utf-8", errors="replace") as handle:
        ticks = int(handle.read().rpartition(")")[2].split()[19])
    with open("/proc/stat", encoding="utf-8") as handle:
        kernel = next(int(line.split()[1]) for line in handle if line.startswith("btime "))
    return datetime.fromtimestamp(kernel + ticks / os.sysconf("SC_CLK_TCK"), timezone.utc)


class _Return:
    """One way back up. ``before``: the containers there were before the release that decides."""

    def __init__(self, host: Host, before: t.Mapping[str, t.Mapping[str, t.Any]], committed: bool) -> None:
        self.host, self.before = host, before
        self.forward = committed or fold(host.journal.entries()).commit_begun
        kept = host.kept()
        self.now = [one for one in host.containers() if one["Id"] not in kept]
        self.to_end = _that_run_to_end(self.now)
        self.said: list[str] = []
        self.errors: list[DeliveryError] = []

    def run(self) -> list[str]:
        spec = self.host.spec
        migrator = spec.migrator.service if spec.migrator else ""
        names = list(dict.fromkeys(one["Labels"].get(SERVICE_LABEL, "") for one in self.now))
        needed = [name for name in names if name not in spec.services and name != migrator and name not in self.to_end]
        serving = {name: self._serving(name) for name in (*needed, *spec.services)}
        for name in needed:
            self._try(self._start, name, serving[name])
        self._try(self.host.await_dependencies, {name: serving[name] for name in needed}, DEPENDENCY_TIMEOUT)
        for name in spec.services:
            self._try(self._start, name, serving[name])
        if self.host.has_edge:
            for name, port in spec.routes.items():
                self._try(self._point, name, port, serving[name])
        if self.errors:
            self.errors[0].details["said"] = self.said
            raise self.errors[0]
        return self.said or ["everything runs, and the edge points at it"]

    def _serving(self, service: str) -> list[str]:
        """The containers that have to run."""
        ours = [one for one in self.now if one["Labels"].get(SERVICE_LABEL) == service]
        old = [one for one in ours if self.before.get(one["Id"], {}).get("running")]
        new = [one for one in ours if one["Id"] not in self.before]
        if self.forward:
            chosen = new or old
        else:
            # Not both beside each other: that may be what the release had to avoid.
            chosen = [one for one in old if is_alive(one)] or [one for one in new if is_alive(one)] or old
        return [one["Id"] for one in chosen]

    def _start(self, service: str, containers: t.Sequence[str]) -> None:
        if not containers:
            raise DeliveryError(
                f"Starting {service}",
                "none of its containers is left",
                "Promote the current tag again, which makes a new one.",
                "not_ready",
            )
        for container in containers:
            policy = self.before.get(container, {}).get("restart")
            if policy and self.host.engine.inspect(container)["HostConfig"]["RestartPolicy"] != policy:
                self.host.engine.set_restart_policy(container, policy)
            if self.host.engine.start(container):
                self.said.append(f"{service}: started {short_id(container)}")

    def _point(self, service: str, port: int, containers: t.Sequence[str]) -> None:
        addresses = [self.host.address(container) for container in containers]
        if not addresses:
            return  # said where it could not be started
        switched = self.host.point(service, port, addresses, 0)
        if switched["added"] or switched["removed"]:
            self.said.append(f"{service}: the edge points at {', '.join(f'{address}:{port}' for address in addresses)}")

    def _try(self, action: t.Callable[..., None], *arguments: t.Any) -> None:
        try:
            action(*arguments)
        except DeliveryError as exc:
            self.errors.append(exc)
            self.said.append(exc.message)


def _that_run_to_end(containers: t.Iterable[Container]) -> set[str]:
    """Services that others wait for to end well: they have, and do not run again."""
    noted = ",".join(one["Labels"].get(DEPENDS_LABEL) or "" for one in containers)
    return set(re.findall(r"([^,:]+):service_completed_successfully", noted))


def take_down(project_dir: str) -> list[str]:
    """Stop everything of the app: what the others need last."""
    release = _deciding_release(project_dir)
    if release is None:
        return ["no release was committed here yet: nothing to stop"]
    host = Host(Spec.from_dict((read_rollout(project_dir, release) or {})["spec"]))
    running = [one for one in host.containers() if is_alive(one)]
    apps = [one for one in running if one["Labels"].get(SERVICE_LABEL) in host.spec.services]
    for group in (apps, [one for one in running if one not in apps]):
        host.side_by_side(lambda one: _stop(host, one), group)
    return [f"stopped {len(running)} containers"]


def _stop(host: Host, container: Container) -> None:
    given = host.spec.services.get(container["Labels"].get(SERVICE_LABEL, ""))
    host.engine.stop(container["Id"], given.stop_timeout if given else None, STOP_TIMEOUT)


def prune(project_dir: str) -> list[str]:
    """Remove images that releases here have had and no release folder names any more.

    The folders of the current release, of the one that a rollback goes to, and of one that is open are always there, so their images
    stay; so does what any container was made of. Images of other repositories are nobody's business here.
    """
    with busy(project_dir):
        release = _deciding_release(project_dir)
        if release is None:
            return ["no release was committed here yet: nothing to remove"]
        ids = {*release_ids(project_dir), current_id(project_dir) or release}
        files = [os.path.join(release_path(project_dir, one), "deploy.env") for one in ids]
        named = {value for path in files for value in pinned(path).values() if "@" in value}
        engine = Host(Spec.from_dict((read_rollout(project_dir, release) or {})["spec"])).engine
        repositories = {value.partition("@")[0] for value in named}
        there = [reference for image in engine.images() for reference in image.get("RepoDigests") or ()]
        doomed = [one for one in there if one.partition("@")[0] in repositories and one not in named]
        removed = [one for one in doomed if engine.remove_image(one)]
    return [f"removed {one}" for one in removed] or ["no image is left over"]


def main(argv: t.Sequence[str]) -> int:
    actions = {"up": bring_up, "down": take_down, "prune": prune}
    if len(argv) != 2 or argv[0] not in actions:
        sys.stderr.write("usage: up|down|prune DEPLOY_DIR\n")
        return 2
    try:
        for line in actions[argv[0]](argv[1]):
            sys.stdout.write(f"{line}\n")
            sys.stdout.flush()
    except DeliveryError as exc:
        sys.stderr.write("\n".join(exc.details.get("said", (exc.message,))) + "\n")
        return 1
    return 0
