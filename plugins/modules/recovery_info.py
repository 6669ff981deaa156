#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Says how an unfinished release is to be ended."""

from __future__ import annotations

DOCUMENTATION = r"""
module: recovery_info
short_description: How a release without an end is finished or undone
version_added: 0.1.0
description:
  - Reads the journal of one release and says whether it is finished, undone or only closed, and whether its data goes back.
  - The rule for data is that of O(restore) and O(migrations). Data goes back by itself only where that loses nothing.
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
  deploy_dir:
    description: Folder of the app on the host.
    type: path
    required: true
  release_id:
    description: The release to look at.
    type: str
    required: true
  restore:
    description: When data goes back. Default is what the release itself recorded, else V(auto).
    type: str
    choices: [auto, always, never]
  migrations:
    description: What the release's migration was declared to be. Default is what the release itself recorded, else V(compatible).
    type: str
    choices: [compatible, breaking]
seealso:
  - module: selfhost.delivery.release
  - module: selfhost.delivery.compose_rollout
"""

EXAMPLES = r"""
- name: See what an interrupted release needs
  selfhost.delivery.recovery_info:
    deploy_dir: /opt/shop
    release_id: 20261121-101500-sha-abc
"""

RETURN = r"""
recovery:
  description: The decision and its reasons.
  returned: success
  type: dict
  contains:
    action:
      description: V(finish) the commit, V(undo) what was done, or V(abort) since nothing was.
      type: str
      sample: undo
    restore:
      description: Whether the snapshot set goes back.
      type: bool
      sample: true
    end:
      description: The end the release will have.
      type: str
      sample: rolled_back
    why:
      description: What the journal shows, in words.
      type: str
      sample: the migrator had begun
    data:
      description: What becomes of the data and why, in words.
      type: str
      sample: data was not touched
snapshot:
  description: Id of the set that goes back or could, empty when none was completed.
  returned: success
  type: str
  sample: pre-promotion-abc-20261121-101502
previous:
  description: Id of the release that served before, empty when there was none.
  returned: success
  type: str
  sample: 20261120-090000-sha-def
release:
  description: The release's C(release.json).
  returned: success
  type: dict
  sample: {tag: sha-abc}
"""

import os

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.recovery import MIGRATION_KINDS, RESTORE_POLICIES, Evidence, decide
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import fold, read_journal, read_release
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.sets import locked
from ansible_collections.selfhost.delivery.plugins.module_utils.targets import replaced_set


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            deploy_dir=dict(type="path", required=True),
            release_id=dict(type="str", required=True),
            restore=dict(type="str", choices=list(RESTORE_POLICIES)),
            migrations=dict(type="str", choices=list(MIGRATION_KINDS)),
        ),
        supports_check_mode=True,
    )
    deploy_dir, release_id = module.params["deploy_dir"], module.params["release_id"]
    try:
        record = read_release(deploy_dir, release_id)
        entries = read_journal(deploy_dir, release_id)
        folder = os.path.join(deploy_dir, "snapshots")
        if os.path.isdir(folder) and fold(entries).current_steps & {"snapshotted", "restoring"}:
            # A module that outlived its controller may still be at it; what it leaves is what has to be judged.
            with locked(folder, timeout=3600):
                pass
        evidence = Evidence.from_journal(entries, record, replaced_set(deploy_dir, entries))
    except DeliveryError as error:
        module.fail_json(**error.as_result())
    policies = record.get("plan", {}).get("policies", {})
    recovery = decide(
        evidence,
        restore=module.params["restore"] or policies.get("restore", "auto"),
        migrations=module.params["migrations"] or policies.get("migrations", "compatible"),
    )
    module.exit_json(
        changed=False,
        recovery=recovery.as_dict(),
        snapshot=evidence.replaced or evidence.snapshot,
        previous=record.get("previous") or "",
        release=record,
    )


if __name__ == "__main__":
    main()
