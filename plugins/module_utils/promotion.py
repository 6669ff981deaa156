# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""From an app, a tag and its digests to everything the steps of a release are told. Pure: the same input gives the same release."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.app import App
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import gate_passed


@dataclass(frozen=True)
class Site:
    """Where and how an environment runs its apps; what the inventory says beside the app."""

    deploy_dir: str
    edge: t.Mapping[str, t.Any]
    docker_socket: str = "/var/run/docker.sock"
    min_free_mb: int = 512


@dataclass(frozen=True)
class Wish:
    """What a run asks for beyond the app's own policies; empty means the policy."""

    kind: str = "promote"
    restore: str = ""
    migrations: str = ""
    override_gates: str = ""
    #: Release a rollback goes back to, and the snapshot set whose data goes back with it.
    target: str = ""
    snapshot: str = ""


@dataclass(frozen=True)
class PlannedRelease:
    """``plan`` is kept in ``release.json``, ``files`` in the release folder, ``rollout`` is what ``compose_rollout`` takes."""

    release_id: str
    snapshot_id: str
    plan: dict[str, t.Any]
    files: list[dict[str, str]]
    rollout: dict[str, t.Any]
    copies: list[dict[str, str]]
    lines: list[str] = field(default_factory=list)


def gate_findings(app: App, digests: t.Mapping[str, str], records: t.Mapping[str, t.Sequence[t.Mapping[str, t.Any]]]) -> list[str]:
    """Why the gates of ``app.policies`` do not hold, one line a digest and gate; empty when they do.

    ``digests``: image name to digest. ``records``: ``repository@digest`` to what the registry knows of it.
    """
    findings = []
    for gate in app.policies.gates:
        for name, digest in digests.items():
            passed, why = gate_passed(records.get(f"{app.images[name].source}@{digest}", ()), gate, digest)
            if not passed:
                findings.append(f"{name}: {why}")
    return findings


def plan_release(
    app: App,
    tag: str,
    digests: t.Mapping[str, str],
    files: t.Sequence[t.Mapping[str, str]],
    release_id: str,
    site: Site,
    wish: Wish,
) -> PlannedRelease:
    """Work out one release. ``digests``: image name to ``sha256:…``; ``files``: the Compose files, ``name`` and ``content``."""
    missing = sorted(set(app.images) - set(digests))
    if missing:
        raise DeliveryError(f"Planning {tag}", f"no digest for {', '.join(missing)}", "Every image of the app needs one.")
    references = {name: f"{image.repository}@{digests[name]}" for name, image in app.images.items()}
    folder = f"{site.deploy_dir}/releases/{release_id}"
    migrations = wish.migrations or app.policies.migrations
    restore = wish.restore or app.policies.restore
    rollback = wish.kind == "rollback"
    # A rollback names the migrator too, so that it is not taken for a dependency, but does not run it.
    migrator = {**app.rollout["migrator"], "run": not rollback} if app.migrator else None
    migrates = migrator is not None and not rollback
    services = {name: image for name, image in app.service_images.items() if not rollback or name in app.services}
    rollout = {
        **app.rollout,
        "migrator": migrator,
        "project_dir": site.deploy_dir,
        "project": app.project,
        "release_id": release_id,
        "files": [f"{folder}/{entry['name']}" for entry in files],
        "env_files": [f"{site.deploy_dir}/{name}" for name in app.env_files],
        "deploy_env": f"{folder}/deploy.env",
        "images": {service: references[image] for service, image in services.items()},
        "volumes": app.volumes or [],
        "edge": dict(site.edge),
        "hold": bool(wish.snapshot) or (migrations == "breaking" and migrates),
        "docker_socket": site.docker_socket,
        "docker_config": f"{site.deploy_dir}/.docker",
        "min_free_mb": site.min_free_mb,
    }
    plan = {
        "images": references,
        # Records go to the source too: whoever promotes the same build elsewhere asks there.
        "recorded": list(dict.fromkeys([*references.values(), *(f"{image.source}@{digests[name]}" for name, image in app.images.items())])),
        "environment_tags": [
            {"source": references[name], "destination": f"{image.repository}:{app.environment}"} for name, image in app.images.items()
        ],
        "files": [dict(entry) for entry in files],
        "policies": {"restore": restore, "migrations": migrations},
        "override_gates": wish.override_gates,
        "target": wish.target,
        "restores": wish.snapshot,
    }
    short = tag[4:] if tag.startswith("sha-") else tag
    return PlannedRelease(
        release_id=release_id,
        snapshot_id=f"pre-{'rollback' if rollback else 'promotion'}-{short}-{release_id[:15]}",
        plan=plan,
        files=[*({"name": entry["name"], "content": entry["content"]} for entry in files),
               {"name": "deploy.env", "content": deploy_env(app, references, tag, release_id)}],
        rollout=rollout,
        copies=[
            {"source": f"{image.source}@{digests[name]}", "destination": f"{image.repository}:{tag}"}
            for name, image in app.images.items()
            if image.source != image.repository
        ],
        lines=_lines(app, tag, digests, release_id, wish, restore, migrations),
    )


def deploy_env(app: App, references: t.Mapping[str, str], tag: str, release_id: str) -> str:
    """The pins of a release, as Compose reads them with ``--env-file``."""
    values = {app.image_variables[name]: reference for name, reference in sorted(references.items())}
    values.update(DELIVERY_TAG=tag, DELIVERY_RELEASE=release_id, DELIVERY_ENVIRONMENT=app.environment)
    return "".join(f"{key}={value}\n" for key, value in values.items())


def _lines(app: App, tag: str, digests: t.Mapping[str, str], release_id: str, wish: Wish, restore: str, migrations: str) -> list[str]:
    verb = "roll back" if wish.kind == "rollback" else "promote"
    width = max(len(name) for name in digests)
    lines = [f"{verb} {app.name} to {tag} in {app.environment}   release {release_id}"]
    lines += [f"  {name:<{width}}  {app.images[name].repository}@{digest[:19]}…" for name, digest in digests.items()]
    if app.migrator and wish.kind == "promote":
        held = "writes are held from before the snapshot until the commit" if migrations == "breaking" else "the old release must run on it"
        lines.append(f"  migration {migrations}: {held}; data goes back: {restore}")
    if wish.override_gates:
        lines.append(f"  gates overridden: {wish.override_gates}")
    return lines
