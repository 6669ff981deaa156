#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Works out one release from an app, a tag and its digests."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_plan
short_description: Work out one release from an app, a tag and its digests
version_added: 0.1.0
description:
  - Holds the digests against the gates and returns what every later step is told. Touches nothing.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.info_module
  - selfhost.delivery.attributes.delivery_group
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  app:
    description: Description of the app, C(delivery_app).
    type: dict
    required: true
  environment:
    description: Name of the environment.
    type: str
    required: true
  tag:
    description: The immutable tag.
    type: str
    required: true
  digests:
    description: Image name to digest.
    type: dict
    required: true
  records:
    description: What the registry knows of them, C(repository@digest) to records, as M(selfhost.delivery.release_info) returns it.
    type: dict
    default: {}
  signed_records:
    description: Let only records count that were signed.
    type: bool
    default: false
  files:
    description: The Compose files.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: File name in the release folder.
        type: str
        required: true
      content:
        description: The text.
        type: str
        required: true
  release_id:
    description: Id of the release, C(<YYYYmmdd-HHMMSS>-<tag>).
    type: str
    required: true
  kind:
    description: A rollback runs no migrator and passes no gate.
    type: str
    choices: [promote, rollback]
    default: promote
  target:
    description: With O(kind=rollback), the release gone back to.
    type: str
    default: ""
  snapshot:
    description: With O(kind=rollback), the snapshot set whose data goes back too.
    type: str
    default: ""
  deploy_dir:
    description: Folder of the app on its hosts.
    type: path
    required: true
  edge:
    description: The edge of the hosts, as in M(selfhost.delivery.compose_rollout).
    type: dict
    default: {type: none}
  docker_socket:
    description: Engine of the hosts.
    type: path
    default: /var/run/docker.sock
  min_free_mb:
    description: Megabytes that must stay free.
    type: int
    default: 512
  hosts:
    description: The hosts of this run, in the order of the inventory.
    type: list
    elements: str
    default: []
  serial:
    description:
      - How many hosts are rolled side by side, as in Ansible's own C(serial). A number, a share of all hosts such as V(50%), or a list of
        these, whose last goes on to the end.
    type: raw
    default: 1
  canary:
    description: Hosts that are rolled before all others, one at a time.
    type: list
    elements: str
    default: []
  restore:
    description: Overrides C(policies.restore) of the app.
    type: str
    default: ""
  migrations:
    description: Overrides C(policies.migrations) of the app.
    type: str
    default: ""
  override_gates:
    description: Why gates that do not hold are passed. Recorded with the release.
    type: str
    default: ""
seealso:
  - module: selfhost.delivery.app_spec
  - module: selfhost.delivery.release
"""

EXAMPLES = r"""
- name: Work out a release
  selfhost.delivery.release_plan:
    app: "{{ delivery_app }}"
    environment: production
    tag: sha-abc
    digests:
      app: sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
    files:
      - name: compose.yaml
        content: "{{ lookup('ansible.builtin.file', 'compose.yaml') }}"
    release_id: 20261121-101500-sha-abc
    deploy_dir: /opt/shop
"""

RETURN = r"""
release:
  description: Everything the steps of the release are told.
  returned: success
  type: dict
  contains:
    release_id:
      description: Its id.
      type: str
      sample: 20261121-101500-sha-abc
    snapshot_id:
      description: Id of the snapshot set that is taken before anything changes.
      type: str
      sample: pre-promotion-abc-20261121-101500
    plan:
      description: What C(release.json) keeps.
      type: dict
    files:
      description: What the release folder holds.
      type: list
      elements: dict
    rollout:
      description: What M(selfhost.delivery.compose_rollout) takes.
      type: dict
    copies:
      description: Images to copy to the environment's repositories.
      type: list
      elements: dict
    lines:
      description: The plan for people.
      type: list
      elements: str
    batches:
      description: The hosts that are rolled side by side, batch after batch.
      type: list
      elements: list
      sample: [[app-2], [app-1], [app-3]]
gates:
  description: Why gates do not hold but were overridden, one line each.
  returned: success
  type: list
  elements: str
  sample: []
public_check:
  description: >-
    The check of the public route for M(selfhost.delivery.ready_wait), with C({tag}) where the version is asked for.
    Null when the app has none.
  returned: success
  type: dict
  sample: {name: public, http: {url: https://shop.example.com/api/ready}}
host_check:
  description: The same check of one host, to be asked on it, of its own edge. Null when the app has no public route or the hosts no edge.
  returned: success
  type: dict
  sample: {name: host, http: {url: https://shop.example.com/api/ready, connect_to: "127.0.0.1:443"}}
"""

from dataclasses import asdict

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.app import MIGRATION_KINDS, RESTORE_POLICIES, parse_app
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.promotion import Site, Wish, gate_findings, plan_release


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            app=dict(type="dict", required=True),
            environment=dict(type="str", required=True),
            tag=dict(type="str", required=True),
            digests=dict(type="dict", required=True),
            records=dict(type="dict", default={}),
            signed_records=dict(type="bool", default=False),
            files=dict(
                type="list",
                elements="dict",
                required=True,
                options=dict(name=dict(type="str", required=True), content=dict(type="str", required=True)),
            ),
            release_id=dict(type="str", required=True),
            kind=dict(type="str", choices=["promote", "rollback"], default="promote"),
            target=dict(type="str", default=""),
            snapshot=dict(type="str", default=""),
            deploy_dir=dict(type="path", required=True),
            edge=dict(type="dict", default={"type": "none"}),
            docker_socket=dict(type="path", default="/var/run/docker.sock"),
            min_free_mb=dict(type="int", default=512),
            hosts=dict(type="list", elements="str", default=[]),
            serial=dict(type="raw", default=1),
            canary=dict(type="list", elements="str", default=[]),
            restore=dict(type="str", default=""),
            migrations=dict(type="str", default=""),
            override_gates=dict(type="str", default=""),
        ),
        supports_check_mode=True,
    )
    given = module.params
    try:
        for name, choices in (("restore", RESTORE_POLICIES), ("migrations", MIGRATION_KINDS)):
            if given[name] not in ("", *choices):
                raise DeliveryError(f"Reading delivery_{name}", f"it is {given[name]!r}", f"Use one of {', '.join(choices)}.")
        app = parse_app(given["app"], given["environment"])
        findings = gate_findings(app, given["digests"], given["records"], given["signed_records"]) if given["kind"] == "promote" else []
        if findings and not given["override_gates"]:
            raise DeliveryError(
                f"Holding {given['tag']} against the gates of {given['environment']}",
                "; ".join(findings),
                f"Promote it to {' and '.join(app.policies.gates)} first, "
                "or give a reason that is recorded: -e \"delivery_override_gates='…'\".",
                "policy",
            )
        planned = plan_release(
            app,
            given["tag"],
            given["digests"],
            given["files"],
            given["release_id"],
            Site(*(given[key] for key in ("deploy_dir", "edge", "docker_socket", "min_free_mb", "hosts", "serial", "canary"))),
            Wish(given["kind"], given["restore"], given["migrations"], given["override_gates"], given["target"], given["snapshot"]),
        )
    except DeliveryError as error:
        module.fail_json(**error.as_result())
    host_check = app.host_check() if given["edge"].get("type") != "none" else None
    module.exit_json(changed=False, release=asdict(planned), gates=findings, public_check=app.public_check(), host_check=host_check)


if __name__ == "__main__":
    main()
