#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Roll a release of a Compose project on this host, and take it back."""

from __future__ import annotations

DOCUMENTATION = r"""
module: compose_rollout
short_description: Roll a release of a Compose project on this host, service after service, and take it back
version_added: 0.1.0
description:
  - New containers are made beside the old ones with Docker Compose, started, asked whether they are ready, given to the edge, and only
    then the old ones are drained and stopped. An old container is removed only by O(state=finished), after the commit, so going back is
    to start it and point the edge at it again.
  - A service that cannot run twice (published host port, fixed address, one replica with a writable volume, C(single)) is stopped first;
    the plan says so, and why.
  - Every change is written to C(releases/<release_id>/journal.jsonl) before and after. What ran before the first change is kept in
    C(releases/<release_id>/rollout.json), so that O(state=reverted) works after a crash at any instant, and needs only
    O(project_dir) and O(release_id).
  - Needs Docker Engine 20.10, the Docker command line and Compose 2.20, or newer.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
attributes:
  check_mode:
    support: full
    details:
      - Makes the same checks and the same plan, and changes nothing.
  diff_mode:
    support: full
    details:
      - The lines of the plan, as what is prepared.
  idempotent:
    support: full
options:
  state:
    description:
      - V(applied) runs O(phases).
      - V(reverted) puts back exactly what ran before O(release_id), and checks that it does.
      - V(quiesced) lets all requests wait at the edge and stops all containers of O(services), old and new, so that data can be restored.
        Dependencies go on running. V(reverted) starts the old containers again.
      - V(confirmed) tells the host that the release stays, where O(confirm_within) was set; it fails when the host has gone back already.
      - V(finished) removes the old containers and lets held requests through, after the commit. What fails only warns.
      - V(synced) makes the upstreams at the edge the running containers again, as after a restart of edge or engine.
    type: str
    choices: [applied, reverted, quiesced, confirmed, finished, synced]
    default: applied
  project_dir:
    description: Deploy directory of the app, with C(releases/), C(current) and the env files.
    type: path
    required: true
  release_id:
    description: The release. Required but for O(state=synced), which takes that of C(current).
    type: str
  run_id:
    description:
      - The run that holds the lease in O(project_dir), written into the journal.
      - The lease is asked before each change, and renewed meanwhile, on the host where the release was opened (there is a
        C(release.json) in its folder), which is the coordinator.
    type: str
    default: ''
  project:
    description: Name of the Compose project.
    type: str
  files:
    description: Compose files, absolute paths, in the order Compose shall merge them.
    type: list
    elements: path
    default: []
  env_files:
    description: Env files for Compose, absolute paths. They must be owned by root (or this user) and closed to others.
    type: list
    elements: path
    default: []
  deploy_env:
    description: Path of the C(deploy.env) that pins the images. It is given to Compose as the last env file, and wins over the environment.
    type: path
  images:
    description: Compose service to C(repository@digest), the migrator's included. The rendered file must say the same.
    type: dict
    default: {}
  services:
    description:
      - The services built with the app, in the order they are rolled unless O(order) says otherwise.
      - Each is a map with the keys C(port), C(strategy) (C(auto), C(start_first), C(stop_first), C(blue_green), C(canary)), C(ready)
        (C(http), C(tcp), C(grpc), C(command) or C(log); absent means healthy, or running where there is no health check),
        C(ready_timeout) (60), C(stable) (1), C(drain_timeout) (30), C(stop_timeout) (the C(stop_grace_period) of the Compose file,
        else 10), C(single) (false). Times are seconds.
      - C(parallel), C(max_surge) and C(max_unavailable), numbers or percentages of the replicas, make batches of C(start_first) and
        C(stop_first). C(smoke) is a program with its arguments that is run in a new container before it gets requests, for at most
        C(smoke_timeout) (60). C(keep_old_for) is for how long C(blue_green) lets the old containers run after the commit.
      - C(canary) is a map with C(steps), the shares of the requests in percent, and how each of them is judged, with the keys of
        O(bake). Only with an edge of type V(haproxy).
      - A service in O(images) that is not named here gets the defaults. Everything else in the Compose files is a dependency.
    type: dict
    default: {}
  order:
    description: Order of the roll. Services not named follow, after what they depend on.
    type: list
    elements: str
    default: []
  migrator:
    description: The service that migrates data. It runs once in a release.
    type: dict
    suboptions:
      service:
        description: Its name in the Compose files.
        type: str
        required: true
      image:
        description: Name of its image. Only O(images) is read.
        type: str
      timeout:
        description: Seconds after which it is stopped and has failed.
        type: float
        default: 300
      run:
        description:
          - Set to V(false) in a release that must not migrate, such as a rollback. The service is then left alone, also where other
            services depend on it.
        type: bool
        default: true
  volumes:
    description: Volumes that must exist in the Compose files. Default all named volumes; RV(volumes) tells which exist.
    type: list
    elements: str
    default: []
  routes:
    description: Service to container port, of services that the edge routes. The backend is named C(<project>-<service>).
    type: dict
    default: {}
  edge:
    description: The edge in front of this host's containers. What each kind can and cannot do is in the collection's C(docs/edges.md).
    type: dict
    suboptions:
      type:
        description: Its kind. V(none) where nothing is in front.
        type: str
        choices: [haproxy, nginx, traefik, none]
        default: none
      socket:
        description: HAProxy's runtime socket, a path or C(host:port).
        type: str
      hold_map:
        description: Path of the map that holds requests, as HAProxy knows it.
        type: str
      directory:
        description:
          - Folder of one file a backend. With O(edge.type=nginx) it is included into the block C(http), default C(/etc/nginx/delivery).
          - With O(edge.type=traefik) it is the one that the file provider watches, default C(/etc/traefik/dynamic).
        type: path
      pid_file:
        description: File with the process id of nginx. Default C(/run/nginx.pid).
        type: path
      program:
        description: The program nginx. Default C(nginx).
        type: str
      config:
        description: Main configuration file of nginx, where it is not the program's own default.
        type: path
      confirm:
        description: Address and port on this host at which nginx tells what it has loaded. Default C(127.0.0.1:8399).
        type: str
      api:
        description: Where this host reaches Traefik's API. Default C(http://127.0.0.1:8080).
        type: str
      network:
        description: Name of the Docker network in which the edge reaches containers. Default the project's default network.
        type: str
  hold:
    description:
      - Let writes wait at the edge, and stop services without a route, from the phase V(hold) until the release is finished or reverted.
    type: bool
    default: false
  hold_after:
    description: What the edge holds after O(state=reverted). V(keep) leaves it as it is.
    type: str
    choices: ['off', keep, writes, all]
    default: 'off'
  phases:
    description:
      - Which phases of O(state=applied) to run. They always run in this order.
      - V(preflight) checks, V(pull) fetches missing images, V(dependencies) starts what the app needs, V(hold) holds writes if O(hold) is
        set, V(migrate) runs the migrator, V(roll) replaces the services, V(bake) watches them if O(bake) is set.
    type: list
    elements: str
    choices: [preflight, pull, dependencies, hold, migrate, roll, bake]
    default: [preflight, pull, dependencies, hold, migrate, roll, bake]
  journal:
    description:
      - Steps of the release that are not this module's, to be written into its journal, each with a renewal of the lease, so that
        they need no call of M(selfhost.delivery.release). With O(state=applied) and O(state=finished), on the host that has the lease.
    type: dict
    suboptions:
      before:
        description: Before anything else is done.
        type: list
        elements: dict
        default: []
        suboptions: &step
          step:
            description: As in M(selfhost.delivery.release).
            type: str
            required: true
          event:
            description: What happened to it.
            type: str
            choices: [begin, end]
            required: true
          data:
            description: Kept with the entry. Must not hold a secret.
            type: dict
            default: {}
          ttl:
            description: Seconds until the lease ends unless it is renewed. Default as long as before.
            type: int
      after:
        description: When all that was asked for went well. Not with O(state=finished).
        type: list
        elements: dict
        default: []
        suboptions: *step
  bake:
    description:
      - For how long, and by what, the services are judged after the last one was replaced. A container that ends, restarts or gets
        unhealthy fails the release; so do too many errors or slow answers, which an edge of type V(haproxy) counts.
    type: dict
    default: {}
    suboptions:
      seconds:
        description: For how long. V(0) does not watch.
        type: float
        default: 0
      max_error_rate:
        description: Percent of the answers that may be errors (5xx, refused or broken connections). Default V(1).
        type: float
      max_latency:
        description: Seconds that an answer may take on average. By default nobody asks.
        type: float
      min_requests:
        description: Requests from which on errors and times are judged before the time is over. Default V(20).
        type: int
      prometheus:
        description: A query whose values must all be at most C(max), asked from this host.
        type: dict
        suboptions:
          url:
            description: Address of Prometheus.
            type: str
            required: true
          query:
            description: PromQL. C($service) and C($release) are replaced.
            type: str
            required: true
          max:
            description: The largest value that is good.
            type: float
            default: 0
  confirm_within:
    description:
      - Seconds after which the host goes back by itself when no module has worked on it since the roll, and neither O(state=confirmed) nor
        O(state=reverted) was called. V(0) waits for ever.
      - A small process on the host does it, so a lost controller, CI job or network does not matter; it does not outlive a reboot.
    type: float
    default: 0
  take_back:
    description: When a phase fails, do what O(state=reverted) does at once. RV(reverted) says that it was done.
    type: bool
    default: true
  docker_socket:
    description: Socket of the Docker engine.
    type: path
    default: /var/run/docker.sock
  docker_config:
    description: Directory with the C(config.json) that holds the registry login for pulls.
    type: path
  min_free_mb:
    description: Megabytes that must stay free under the engine's root.
    type: int
    default: 512
  required_bytes:
    description: Bytes needed beside O(min_free_mb), for images and snapshot.
    type: int
    default: 0
"""

EXAMPLES = r"""
- name: What would this release do?
  selfhost.delivery.compose_rollout: &rollout
    project_dir: /opt/shop
    project: shop
    release_id: 20261121-090000-sha-abc
    files: [/opt/shop/releases/20261121-090000-sha-abc/compose.yaml]
    env_files: [/opt/shop/.env.production]
    deploy_env: /opt/shop/releases/20261121-090000-sha-abc/deploy.env
    images:
      web: registry.example.com/shop/app@sha256:5d21ffde203e3d7635aa92e7cf98780a38515a2e9f8a7a03b4ca2df38d6d3197
      worker: registry.example.com/shop/app@sha256:5d21ffde203e3d7635aa92e7cf98780a38515a2e9f8a7a03b4ca2df38d6d3197
    services:
      web: {port: 8080, ready: {http: /api/ready}}
      worker: {}
    routes: {web: 8080}
    edge: {type: haproxy, socket: /run/haproxy/admin.sock}
  check_mode: true

- name: Do it; on failure the old release serves again
  selfhost.delivery.compose_rollout: *rollout

- name: Take a release back that a killed run left open
  selfhost.delivery.compose_rollout:
    state: reverted
    project_dir: /opt/shop
    release_id: 20261121-090000-sha-abc

- name: The edge was restarted, give it its upstreams again
  selfhost.delivery.compose_rollout:
    state: synced
    project_dir: /opt/shop
"""

RETURN = r"""
plan:
  description:
    - What happens to each service, in the groups C(dependencies), C(migrator), C(services), and C(warnings).
    - Each has C(service), C(kind), C(action) (C(unchanged), C(roll), C(swap), C(create), C(start), C(run)), C(strategy), C(reason),
      C(old) and C(new) (image references), C(replicas), C(old_ids), C(kept_ids).
    - C(expected) has the medians of the releases before it, C(whole) and C(services) in seconds, and C(releases), how many those were.
  returned: with O(state=applied)
  type: dict
lines:
  description: The plan for people, one line a service that changes, and how long it will take where releases before it tell.
  returned: always
  type: list
  elements: str
  sample: ["web  sha256:ab12cd34ef56… -> sha256:cd34ef56ab12…  start_first"]
services:
  description: Service to what was done, with C(action), C(strategy), C(reason), C(seconds), C(phases) (seconds each) and C(cut) (requests).
  returned: always
  type: dict
durations:
  description: Seconds of each phase.
  returned: always
  type: dict
delivery_warnings:
  description: What is not wrong enough to stop, also given as warnings of the task.
  returned: always
  type: list
  elements: str
volumes:
  description: The volumes that hold the app's data, each with C(key) in the Compose files, C(name) in the engine, and C(exists).
  returned: with the phase V(preflight)
  type: list
  elements: dict
  sample: [{key: pgdata, name: shop_pgdata, exists: true}]
reverted:
  description: The release was taken back, and the old one was seen to run.
  returned: on failure, with O(take_back)
  type: bool
undo:
  description: What taking back did, shaped like the result of O(state=reverted).
  returned: on failure, when the release was taken back
  type: dict
logs:
  description: The last log lines of the container that failed.
  returned: when a container failed
  type: list
  elements: str
running:
  description: What runs now.
  returned: when going back failed
  type: list
  elements: str
failure_class:
  description: The class of the failure.
  returned: on failure
  type: str
  sample: not_ready
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout import undo
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.confirm import confirm
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.plan import PHASES, Spec
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.steps import apply

_STEPS: dict[str, t.Any] = {
    "type": "list",
    "elements": "dict",
    "default": [],
    "options": {
        "step": {"type": "str", "required": True},
        "event": {"type": "str", "choices": ["begin", "end"], "required": True},
        "data": {"type": "dict", "default": {}},
        "ttl": {"type": "int"},
    },
}


def argument_spec() -> dict[str, t.Any]:
    return {
        "state": {"type": "str", "choices": ["applied", "reverted", "quiesced", "confirmed", "finished", "synced"], "default": "applied"},
        "project_dir": {"type": "path", "required": True},
        "release_id": {"type": "str"},
        "run_id": {"type": "str", "default": ""},
        "project": {"type": "str"},
        "files": {"type": "list", "elements": "path", "default": []},
        "env_files": {"type": "list", "elements": "path", "default": []},
        "deploy_env": {"type": "path"},
        "images": {"type": "dict", "default": {}},
        "services": {"type": "dict", "default": {}},
        "order": {"type": "list", "elements": "str", "default": []},
        "migrator": {
            "type": "dict",
            "options": {
                "service": {"type": "str", "required": True},
                "image": {"type": "str"},
                "timeout": {"type": "float", "default": 300},
                "run": {"type": "bool", "default": True},
            },
        },
        "volumes": {"type": "list", "elements": "str", "default": []},
        "routes": {"type": "dict", "default": {}},
        "edge": {
            "type": "dict",
            "options": {
                "type": {"type": "str", "choices": ["haproxy", "nginx", "traefik", "none"], "default": "none"},
                "socket": {"type": "str"},
                "hold_map": {"type": "str"},
                "directory": {"type": "path"},
                "pid_file": {"type": "path"},
                "program": {"type": "str"},
                "config": {"type": "path"},
                "confirm": {"type": "str"},
                "api": {"type": "str"},
                "network": {"type": "str"},
            },
        },
        "hold": {"type": "bool", "default": False},
        "bake": {
            "type": "dict",
            "default": {},
            "options": {
                "seconds": {"type": "float", "default": 0},
                "max_error_rate": {"type": "float"},
                "max_latency": {"type": "float"},
                "min_requests": {"type": "int"},
                "prometheus": {
                    "type": "dict",
                    "options": {
                        "url": {"type": "str", "required": True},
                        "query": {"type": "str", "required": True},
                        "max": {"type": "float", "default": 0},
                    },
                },
            },
        },
        "journal": {"type": "dict", "options": {"before": _STEPS, "after": _STEPS}},
        "hold_after": {"type": "str", "choices": ["off", "keep", "writes", "all"], "default": "off"},
        "phases": {"type": "list", "elements": "str", "choices": list(PHASES), "default": list(PHASES)},
        "confirm_within": {"type": "float", "default": 0},
        "take_back": {"type": "bool", "default": True},
        "docker_socket": {"type": "path", "default": "/var/run/docker.sock"},
        "docker_config": {"type": "path"},
        "min_free_mb": {"type": "int", "default": 512},
        "required_bytes": {"type": "int", "default": 0},
    }


def main() -> None:
    module = AnsibleModule(
        argument_spec=argument_spec(),
        required_if=[
            ("state", "applied", ("project", "release_id", "files")),
            ("state", "reverted", ("release_id",)),
            ("state", "quiesced", ("release_id",)),
            ("state", "confirmed", ("release_id",)),
            ("state", "finished", ("release_id",)),
        ],
        supports_check_mode=True,
    )
    given = module.params
    where = (given["project_dir"], given["release_id"] or "", given["run_id"])
    try:
        if given["state"] == "applied":
            result = apply(Spec.from_dict(given), given["phases"], given["run_id"], given["take_back"], module.check_mode, given["journal"])
        elif given["state"] == "reverted":
            result = undo.revert(*where, hold_after=given["hold_after"], check_mode=module.check_mode)
        elif given["state"] == "quiesced":
            spec = Spec.from_dict(given) if given["project"] else None
            result = undo.quiesce(*where, check_mode=module.check_mode, spec=spec)
        elif given["state"] == "confirmed":
            result = undo.summary(confirm(given["project_dir"], given["release_id"], module.check_mode))
        elif given["state"] == "finished":
            result = undo.finish(*where, check_mode=module.check_mode, journal=given["journal"])
        else:
            result = undo.sync(*where, check_mode=module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    if module._diff and result["lines"]:
        result["diff"] = {"prepared": "\n".join(result["lines"]) + "\n"}
    for warning in result["delivery_warnings"]:
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
