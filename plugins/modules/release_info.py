#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What was released, what runs, who holds the lock, and what the registry recorded."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_info
short_description: Releases of an app on its coordinator, and the records of its images in the registry
version_added: 0.1.0
description:
  - With O(deploy_dir) reads lock, releases and journals of this host.
  - With O(images) reads the records that promotions attached to these images in the registry.
  - Never takes a lock and never changes anything.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.info_module
  - selfhost.delivery.attributes.delivery_group
  - selfhost.delivery.registry
  - selfhost.delivery.registry.connection
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
  idempotent:
    support: full
options:
  app:
    description: Name of the app.
    type: str
    required: true
  environment:
    description: Name of the environment.
    type: str
    required: true
  deploy_dir:
    description: Folder of the app on this host. One that does not exist yet has no releases.
    type: path
  limit:
    description: How many releases to return, newest first. V(0) returns all.
    type: int
    default: 20
  images:
    description: Images to read the records of, each C(host[:port]/repository@digest).
    type: list
    elements: str
    default: []
  record_keys:
    description:
      - Public keys, each the path of a PEM file on the host this runs on or its content. With them every record says who signed it.
      - A record that none of them signed is returned too, with a C(signer) of V(none).
    type: list
    elements: str
    default: []
  cosign_program:
    description: Name on E(PATH) or path of C(cosign), 2.6 or newer. Only asked where O(record_keys) is given.
    type: str
    default: cosign
seealso:
  - module: selfhost.delivery.release
  - module: selfhost.delivery.release_record
"""

EXAMPLES = r"""
- name: Read the releases of this host
  selfhost.delivery.release_info:
    app: shop
    environment: production
    deploy_dir: /opt/shop
  register: status

- name: Show them
  ansible.builtin.debug:
    msg: "{{ status.table }}"

- name: See what environments did with an image
  selfhost.delivery.release_info:
    app: shop
    environment: production
    images:
      - registry.example.com/shop/app@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
  register: evidence
"""

RETURN = r"""
lock:
  description:
    - The lock as it is, with C(status) V(held), V(dead), V(expired) or V(freeze) and C(text) for people.
    - Null when nobody holds it.
  returned: success
  type: dict
  sample: {run_id: ci-1-4242-123456, step: rolling, status: held, text: "deploy@ci-1 (pid 4242), at step rolling"}
current:
  description: The C(release.json) that C(current) points at, null when there is none.
  returned: success
  type: dict
  sample: {id: 20261121-101500-sha-abc, tag: sha-abc}
previous_committed:
  description: The C(release.json) of the release a rollback without argument goes to, null when there is none.
  returned: success
  type: dict
  sample: {id: 20261120-090000-sha-def, tag: sha-def}
open:
  description: The release without an end and what is owed to it (RV(selfhost.delivery.release#module:recover)), null when there is none.
  returned: success
  type: dict
  sample: {id: 20261121-101500-sha-abc, action: undo, phase: migrated}
releases:
  description: Newest first.
  returned: success
  type: list
  elements: dict
  contains:
    id:
      description: The release.
      type: str
      sample: 20261121-101500-sha-abc
    tag:
      description: Its tag.
      type: str
      sample: sha-abc
    kind:
      description: V(promote) or V(rollback).
      type: str
      sample: promote
    result:
      description: V(open) or how it ended.
      type: str
      sample: committed
    phase:
      description: The last step that ended.
      type: str
      sample: committed
    current:
      description: Whether it serves now.
      type: bool
      sample: true
    started:
      description: When it began, UTC.
      type: str
      sample: "2026-11-21T10:15:00.000Z"
    ended:
      description: When it ended, UTC, null while it is open.
      type: str
      sample: "2026-11-21T10:15:41.200Z"
    seconds:
      description: From begin to end.
      type: float
      sample: 41.2
    phases:
      description: Seconds by step.
      type: dict
      sample: {pulled: 3.1}
    snapshot:
      description: Id of its snapshot set, or empty.
      type: str
      sample: pre-promotion-abc-20261121-101502
    failure_class:
      description: What went wrong, or empty.
      type: str
      sample: ""
    failure:
      description: The same in words.
      type: str
      sample: ""
    owed:
      description: Hosts that it was not taken back on, since they were not reached. The next run that reaches one does that first.
      type: list
      elements: str
      sample: []
table:
  description: RV(releases) as lines for people.
  returned: success
  type: list
  elements: str
  sample: ["release                    tag      result"]
records:
  description:
    - The records of each of O(images), newest first. C(signer) in each is the key of O(record_keys) whose signature was found good,
      and V(none) where there is none or nobody asked.
  returned: success
  type: dict
  sample: {"registry.example.com/shop/app@sha256:0123": [{environment: staging, result: committed, signer: null}]}
"""

import contextlib
import os
import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils import releases
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.cosign import Cosign
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import REGISTRY_ARGUMENTS, client_options_from
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import prover, read_records_for


def read_host(deploy_dir: str | None, limit: int) -> dict[str, t.Any]:
    """Everything below one deploy dir, as in RETURN."""
    result: dict[str, t.Any] = {"lock": None, "current": None, "previous_committed": None, "open": None, "releases": [], "table": []}
    if deploy_dir is None or not os.path.isdir(deploy_dir):
        return result
    lock = releases.Lease(deploy_dir).read()
    if lock is not None:
        result["lock"] = {**lock, "status": releases.Lease.status(lock), "text": releases.describe_holder(lock)}
    unfinished = releases.open_release(deploy_dir)
    found = releases.list_releases(deploy_dir, limit or None)
    current = releases.current_id(deploy_dir)
    result["current"] = releases.current_release(deploy_dir)
    result["previous_committed"] = without_state(releases.previous_committed(deploy_dir))
    result["open"] = releases.recovery_owed(unfinished) if unfinished else None
    result["releases"] = [releases.summarize(release, current) for release in found]
    result["table"] = releases.table(result["releases"])
    return result


def read_evidence(params: t.Mapping[str, t.Any]) -> dict[str, list[dict[str, t.Any]]]:
    """The records of ``images``, held against ``record_keys`` where there are any."""
    with contextlib.ExitStack() as stack:
        prove = None
        if params["record_keys"]:
            cosign = stack.enter_context(Cosign(params["cosign_program"], ignore_tlog=True))
            prove = prover(cosign, [cosign.key(text) for text in params["record_keys"]])
        return read_records_for(params["images"], client_options_from(params), prove)


def without_state(release: dict[str, t.Any] | None) -> dict[str, t.Any] | None:
    """``release.json`` alone."""
    return None if release is None else {key: value for key, value in release.items() if key != "state"}


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            REGISTRY_ARGUMENTS,
            app=dict(type="str", required=True),
            environment=dict(type="str", required=True),
            deploy_dir=dict(type="path"),
            limit=dict(type="int", default=20),
            images=dict(type="list", elements="str", default=[]),
            record_keys=dict(type="list", elements="str", default=[], no_log=False),
            cosign_program=dict(type="str", default="cosign"),
        ),
        supports_check_mode=True,
    )
    params = module.params
    try:
        result = read_host(params["deploy_dir"], params["limit"])
        result["records"] = read_evidence(params) if params["images"] else {}
    except DeliveryError as error:
        module.fail_json(**error.as_result())
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
