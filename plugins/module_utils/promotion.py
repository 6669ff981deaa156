# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""From an app, a tag and its digests to everything the steps of a release are told. Pure: the same input gives the same release."""

from __future__ import annotations

import re
import typing as t
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.app import App
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import gate_passed


@dataclass(frozen=True)
class Site:
    """Where and how an environment runs its apps; what the inventory says beside the app.

    ``hosts`` in the inventory's order; ``serial`` and ``canary`` as in ``host_batches``.
    """

    deploy_dir: str
    edge: t.Mapping[str, t.Any]
    docker_socket: str = "/var/run/docker.sock"
    min_free_mb: int = 512
    hosts: t.Sequence[str] = ()
    serial: t.Any = 1
    canary: t.Sequence[str] = ()


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
    """``plan`` is kept in ``release.json``, ``files`` in the release folder, ``rollout`` is what ``compose_rollout`` takes.

    ``calls``: in which calls of ``compose_rollout`` its phases run, and which steps of the journal each of them writes beside its own.
    ``batches``: the hosts that are rolled side by side, batch after batch.
    """

    release_id: str
    snapshot_id: str
    plan: dict[str, t.Any]
    files: list[dict[str, str]]
    rollout: dict[str, t.Any]
    copies: list[dict[str, str]]
    lines: list[str] = field(default_factory=list)
    calls: dict[str, dict[str, t.Any]] = field(default_factory=dict)
    batches: list[list[str]] = field(default_factory=list)


#: Seconds that the lease lasts, and over a step which may take long and renews nothing meanwhile.
TTL, LONG_TTL = 900, 3600


def calls_of(kind: str, hosts: int, copies: bool = False, holds: bool = False, restores: bool = False) -> dict[str, dict[str, t.Any]]:
    """The calls ``check``, ``pull`` and ``roll`` of ``compose_rollout``: ``does`` in words, ``phases`` (none: it is left out), ``journal``.

    Each call starts SSH, Python and Compose once more. So on one host what follows on one another there is one call, and another begins
    only where the controller has something to do in between: ``copies``, a snapshot, a restore. Over several hosts each has to be good
    before any goes on, and what is between them is the role's to write down.
    """
    alone = hosts == 1
    check, pull, roll = ["preflight"], ["pull", "hold"] if alone else ["pull"], ["dependencies", "migrate", "roll"]
    words = "pull the images" + (" and hold all writes" if alone and holds else "")
    checks = "Check host, Compose file and plan"
    if alone and not copies:
        check, pull, checks = check + pull, [], f"{checks}, then {words}"
        if kind == "rollback" and not restores:
            check, roll, checks = check + roll, [], f"{checks} and roll"
    before: dict[str, list[dict[str, t.Any]]] = {"check": [], "pull": [], "roll": []}
    after: dict[str, list[dict[str, t.Any]]] = {"check": [], "pull": [], "roll": []}
    if kind == "promote":
        # Before the images are copied, which renews nothing; and the same before the snapshot.
        begin, end = ({"step": "pinned", "event": event, "ttl": LONG_TTL} for event in ("begin", "end"))
        (after if pull else before)["check"].append(begin)
        before["pull" if pull else "check"].append(end)
        after["pull" if pull else "check"].append({"step": "snapshotted", "event": "begin", "ttl": LONG_TTL})
    if alone:
        after["roll" if roll else "check"].append({"step": "verifying", "event": "begin", "ttl": TTL})
    does = {"check": checks, "pull": f"{words[0].upper()}{words[1:]}", "roll": "Start what the app depends on, migrate, roll"}
    phases = {"check": check, "pull": pull, "roll": roll}
    return {name: {"does": does[name], "phases": phases[name], "journal": {"before": before[name], "after": after[name]}} for name in does}


def host_batches(hosts: t.Sequence[str], serial: t.Any = 1, canary: t.Sequence[str] = ()) -> list[list[str]]:
    """Sort ``hosts`` into batches; each host is in exactly one.

    ``canary`` hosts come first, one at a time; those that are not in ``hosts`` count for nothing. ``serial`` sizes the batches of the
    others as Ansible's keyword does: a number, ``"50%"`` of all hosts (at least one), or a list of these, whose last goes on to the end.
    """
    sizes = [_batch_size(one, len(hosts)) for one in (serial if isinstance(serial, (list, tuple)) else [serial])]
    if not sizes:
        raise _no_serial(serial)
    first = [name for name in dict.fromkeys(canary) if name in hosts]
    rest = [name for name in hosts if name not in first]
    batches = [[name] for name in first]
    while rest:
        size = sizes.pop(0) if len(sizes) > 1 else sizes[0]
        batches.append(rest[:size])
        rest = rest[size:]
    return batches


def _batch_size(given: t.Any, hosts: int) -> int:
    match = re.fullmatch(r"(\d+)(%?)", str(given).strip())
    number = int(match.group(1)) if match and not isinstance(given, bool) else 0
    if match is None or number < 1:
        raise _no_serial(given)
    return max(1, hosts * number // 100) if match.group(2) else number


def _no_serial(given: t.Any) -> DeliveryError:
    remedy = "Use a number from 1 on, a share such as '50%', or a list of them."
    return DeliveryError("Reading delivery_serial", f"{given!r} is no size of a batch", remedy)


def gate_findings(
    app: App, digests: t.Mapping[str, str], records: t.Mapping[str, t.Sequence[t.Mapping[str, t.Any]]], signed: bool = False
) -> list[str]:
    """Why the gates of ``app.policies`` do not hold, one line a digest and gate; empty when they do.

    ``digests``: image name to digest. ``records``: ``repository@digest`` to what the registry knows of it; ``signed`` as in
    ``gate_passed``.
    """
    findings = []
    for gate in app.policies.gates:
        for name, digest in digests.items():
            passed, why = gate_passed(records.get(f"{app.images[name].source}@{digest}", ()), gate, digest, signed)
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
    hold = bool(wish.snapshot) or (migrations == "breaking" and migrates)
    # The host has no key to the snapshots: where data goes back with the images, only a controller can.
    alone = not hold and not (migrates and restore == "always")
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
        "hold": hold,
        "confirm_within": app.policies.confirm_within if alone else 0,
        "bake": app.policies.bake,
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
    copies = [
        {"source": f"{image.source}@{digests[name]}", "destination": f"{image.repository}:{tag}"}
        for name, image in app.images.items()
        if image.source != image.repository
    ]
    short = tag[4:] if tag.startswith("sha-") else tag
    batches = host_batches(site.hosts, site.serial, site.canary)
    return PlannedRelease(
        release_id=release_id,
        snapshot_id=f"pre-{'rollback' if rollback else 'promotion'}-{short}-{release_id[:15]}",
        plan=plan,
        files=[*({"name": entry["name"], "content": entry["content"]} for entry in files),
               {"name": "deploy.env", "content": deploy_env(app, references, tag, release_id)}],
        rollout=rollout,
        copies=copies,
        lines=[*_lines(app, tag, digests, release_id, wish, restore, migrations, alone), *_host_lines(batches, site.canary)],
        calls=calls_of(wish.kind, max(len(site.hosts), 1), bool(copies) and not rollback, hold, bool(wish.snapshot)),
        batches=batches,
    )


def deploy_env(app: App, references: t.Mapping[str, str], tag: str, release_id: str) -> str:
    """The pins of a release, as Compose reads them with ``--env-file``."""
    values = {app.image_variables[name]: reference for name, reference in sorted(references.items())}
    values.update(DELIVERY_TAG=tag, DELIVERY_RELEASE=release_id, DELIVERY_ENVIRONMENT=app.environment)
    return "".join(f"{key}={value}\n" for key, value in values.items())


def _lines(
    app: App, tag: str, digests: t.Mapping[str, str], release_id: str, wish: Wish, restore: str, migrations: str, alone: bool
) -> list[str]:
    verb = "roll back" if wish.kind == "rollback" else "promote"
    width = max(len(name) for name in digests)
    lines = [f"{verb} {app.name} to {tag} in {app.environment}   release {release_id}"]
    lines += [f"  {name:<{width}}  {app.images[name].repository}@{digest[:19]}…" for name, digest in digests.items()]
    if app.migrator and wish.kind == "promote":
        held = "writes are held from before the snapshot until the commit" if migrations == "breaking" else "the old release must run on it"
        lines.append(f"  migration {migrations}: {held}; data goes back: {restore}")
    if app.policies.confirm_within and alone:
        lines.append(f"  not confirmed within {app.policies.confirm_within} s of the last word, the host goes back by itself")
    elif app.policies.confirm_within:
        lines.append("  policies.confirm_within does not hold: data would have to go back too, which takes a controller")
    if app.policies.bake:
        lines.append(f"  watched for {app.policies.bake['seconds']:g} s after the last switch, before it is committed")
    if wish.override_gates:
        lines.append(f"  gates overridden: {wish.override_gates}")
    return lines


def _host_lines(batches: t.Sequence[t.Sequence[str]], canary: t.Sequence[str]) -> list[str]:
    if sum(map(len, batches)) < 2:
        return []
    shown = [" + ".join(f"{name} (canary)" if name in canary else name for name in batch) for batch in batches]
    return [f"  hosts: {', then '.join(shown)}"]
