#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Thin shell over ``module_utils/data/drill.py``."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot_drill
short_description: Restore a snapshot set into a scratch project, ask it, and remove it
version_added: 0.1.0
description:
  - Copies a set into a folder of its own, holds every part against its manifest, starts what depends on the data on that copy, runs
    checks in it, and removes all of it again.
  - The scratch project has its own name, volumes and network. It has neither ports nor labels that an edge reads, and its network leads
    nowhere. Containers, volumes and files of the app itself are not touched, and need not be on the same host.
  - What a drill that was killed left is removed by the next drill of the same app, before it begins.
  - The result is also written to C(<folder>/<app>-<environment>.json), and as metrics for node_exporter's textfile collector.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
  - selfhost.delivery.snapshots
  - selfhost.delivery.snapshots.docker
attributes:
  check_mode:
    support: full
    details: Finds the set and looks whether there is room.
  diff_mode:
    support: none
  idempotent:
    support: none
    details: Each call is a drill.
options:
  engine:
    description: The engine of the repository; V(auto) as M(selfhost.delivery.snapshot_engine_info).
    type: str
    choices: [auto, kopia, restic]
    default: auto
  manifest_dir:
    description: Directory of the manifests; sets known only to the repository are found too.
    type: path
    required: true
  app:
    description: Name of the app; the newest set is looked for among its own.
    type: str
    required: true
  environment:
    description: Name of the environment.
    type: str
    required: true
  project:
    description: Compose project of the app. The drill's is called C(drill-<project>).
    type: str
    required: true
  deploy_dir:
    description: Folder of the app on the host on which the set was taken.
    type: path
    required: true
  set_id:
    description: Id of the set, or V(latest).
    type: str
    default: latest
  env_files:
    description: Env files of the app, relative to O(deploy_dir); they come out of the set.
    type: list
    elements: str
    default: []
  built:
    description: Services that are built with the app; they are left out when O(services) is empty and there are others.
    type: list
    elements: str
    default: []
  services:
    description: Services to start, with what they depend on. Empty means all but O(built).
    type: list
    elements: str
    default: []
  checks:
    description: What is asked when all of them run.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: What the check is called.
        type: str
        required: true
      service:
        description: Service in whose container it runs.
        type: str
        required: true
      command:
        description: Program and arguments; it must end with 0.
        type: list
        elements: str
        required: true
      expect:
        description: Regular expression that its output must match.
        type: str
        default: ""
  timeout:
    description: Seconds for the start, and for each check.
    type: float
    default: 300
  folder:
    description: Where the copy is made and the result is written.
    type: path
    default: /var/lib/selfhost-delivery/drills
  metrics_dir:
    description: Folder of node_exporter's textfile collector; nothing is written where it is not there.
    type: path
  docker_config:
    description: Folder of the engine's login file, for images that are not on the host.
    type: path
seealso:
  - module: selfhost.delivery.kopia_restore
  - module: selfhost.delivery.restic_restore
"""

EXAMPLES = r"""
- name: See that the newest set gives a database back
  selfhost.delivery.snapshot_drill:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    manifest_dir: /opt/shop/snapshots
    app: shop
    environment: production
    project: shop
    deploy_dir: /opt/shop
    env_files: [.env.production]
    services: [database]
    checks:
      - name: orders
        service: database
        command: [psql, -U, shop, -tAc, "select count(*) from orders"]
        expect: '^[1-9]'
"""

RETURN = r"""
verdict:
  description: V(passed) or V(failed). The module itself only fails when no drill could begin.
  returned: success
  type: str
  sample: passed
failure:
  description: Why it failed.
  returned: success
  type: str
set_id:
  description: The set that was restored.
  returned: success
  type: str
  sample: scheduled-20261129-030000
set_age_seconds:
  description: How old it was.
  returned: success
  type: int
  sample: 28800
repository_id:
  description: Id of the repository, for O(repository_id); empty when it could not be reached.
  returned: success
  type: str
  sample: eb11c0ffee77b9
seconds:
  description: How long all of it took.
  returned: success
  type: float
  sample: 21.4
steps:
  description: C(step) and C(seconds) of each step.
  returned: success
  type: list
  elements: dict
checks:
  description: C(name), C(service), C(ok), C(code), C(output) and C(seconds) of each check that ran.
  returned: success
  type: list
  elements: dict
notes:
  description: What was not as in production, and what an earlier drill had left.
  returned: success
  type: list
  elements: str
lines:
  description: All of it for people.
  returned: success
  type: list
  elements: str
"""

import contextlib

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.data.connection import ARGUMENTS, engine_of
from ansible_collections.selfhost.delivery.plugins.module_utils.data.drill import drill
from ansible_collections.selfhost.delivery.plugins.module_utils.data.timed import drill_request
from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            ARGUMENTS,
            docker_socket=dict(type="path", default="/var/run/docker.sock"),
            app=dict(type="str", required=True),
            environment=dict(type="str", required=True),
            project=dict(type="str", required=True),
            deploy_dir=dict(type="path", required=True),
            set_id=dict(type="str", default="latest"),
            env_files=dict(type="list", elements="str", default=[]),
            built=dict(type="list", elements="str", default=[]),
            services=dict(type="list", elements="str", default=[]),
            checks=dict(
                type="list",
                elements="dict",
                default=[],
                options=dict(
                    name=dict(type="str", required=True),
                    service=dict(type="str", required=True),
                    command=dict(type="list", elements="str", required=True),
                    expect=dict(type="str", default=""),
                ),
            ),
            timeout=dict(type="float", default=300),
            folder=dict(type="path", default="/var/lib/selfhost-delivery/drills"),
            metrics_dir=dict(type="path"),
            docker_config=dict(type="path"),
        ),
        supports_check_mode=True,
        mutually_exclusive=[("password", "password_file")],
        required_one_of=[("password", "password_file")],
    )
    try:
        with contextlib.closing(engine_of(module.params)) as engine:
            result = drill(engine, Engine(module.params["docker_socket"]), drill_request(module.params), module.check_mode)
    except DeliveryError as error:
        module.fail_json(**error.as_result())
    module.exit_json(**result)


if __name__ == "__main__":
    main()
