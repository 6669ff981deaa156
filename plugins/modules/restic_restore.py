#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Thin shell over ``module_utils/snapshots/api.py``; its twin is ``kopia_restore``."""

from __future__ import annotations

DOCUMENTATION = r"""
module: restic_restore
short_description: Give back a snapshot set taken with restic
version_added: 0.1.0
author: selfhost.delivery contributors (@selfhost-delivery)
description:
  - Writes every part beside the live data, compares all of it with the manifest, and only then stops the containers that use it,
    keeps what is there as a set of its own, and exchanges old and new in one step for each part.
  - A restore that is killed is finished or undone at once by a process of its own, or by the next run on the same O(manifest_dir).
  - Incomplete sets are never restored. A part on a mount point of its own is refused before anything is stopped.
  - A volume that does not exist any more is made again as it was.
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
  - selfhost.delivery.snapshots
  - selfhost.delivery.snapshots.docker
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  set_id:
    description: Id of the set, or V(latest) for the newest complete one that was not itself kept by a restore.
    type: str
    required: true
  manifest_dir:
    description: Directory of the manifests on the host; sets known only to the repository are found too.
    type: path
    required: true
  volumes:
    description: Restore only these volumes of the set. With O(paths) also empty, everything.
    type: list
    elements: str
    default: []
  paths:
    description: Restore only these paths of the set. With O(volumes) also empty, everything.
    type: list
    elements: path
    default: []
  app:
    description: Look for V(latest) only among the sets whose metadata names this app.
    type: str
    default: ''
  keep_current:
    description: Snapshot what is replaced first, as the set RV(replaced_set_id). V(false) loses it.
    type: bool
    default: true
  containers:
    description: What becomes of the containers that had to be stopped; V(restart) gives each the state it was found in.
    type: str
    choices: [restart, leave_stopped]
    default: restart
  project:
    description:
      - Give the volumes of the set to this Compose project instead, with its name before theirs; they are made where there are none.
      - Paths of the set then need O(target).
    type: str
    default: ''
  target:
    description:
      - Directory below which the set is written instead, as C(volumes/<name>) and C(paths/<path>). Nothing is replaced and nobody stopped.
      - Together with O(project) this is about the paths only.
    type: path
  checks:
    description:
      - Programs that look at the copies before anything is replaced. One that does not end with 0 ends the restore.
      - Each runs in a container of its own, without network, on an overlay over the copy, so it may start the database there;
        what it writes is thrown away.
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Name of the volume, as in the set or in the Compose file, or the path.
        type: str
        required: true
      image:
        description: Image of the container, which the host must have.
        type: str
        required: true
      command:
        description: Program and arguments.
        type: list
        elements: str
        required: true
      mount:
        description: Where the container finds the copy.
        type: str
        required: true
      user:
        description: User of the program.
        type: str
      env:
        description: Environment variables. Taken for secret.
        type: dict
      timeout:
        description: Seconds it may take.
        type: int
        default: 600
  stop_timeout:
    description: Seconds that a container has to stop before it is killed.
    type: int
    default: 30
  keep:
    description: As O(selfhost.delivery.kopia_snapshot#module:keep), after the restore. Never forgets the set restored or the one replaced.
    type: int
    default: 0
seealso:
  - module: selfhost.delivery.kopia_restore
"""

EXAMPLES = r"""
- name: Go back to the data before the release
  selfhost.delivery.restic_restore:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    manifest_dir: /opt/shop/snapshots
    set_id: pre-promotion-4f2a91c-20261121-090000

- name: See what the newest set would bring back
  selfhost.delivery.restic_restore:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    manifest_dir: /opt/shop/snapshots
    set_id: latest
  check_mode: true

- name: Restore the newest set for a project of its own, and see whether PostgreSQL starts on it
  selfhost.delivery.restic_restore:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    manifest_dir: /opt/shop/snapshots
    set_id: latest
    project: shop-drill
    target: /var/tmp/shop-drill
    keep_current: false
    checks:
      - name: pgdata
        image: postgres:16
        mount: /var/lib/postgresql/data
        user: postgres
        command: [sh, -c, "pg_ctl -D /var/lib/postgresql/data -w -t 300 start && pg_ctl -D /var/lib/postgresql/data -w stop"]
"""

RETURN = r"""
set_id:
  description: Id of the set that was, or would be, restored.
  type: str
  returned: success
created:
  description: When that set was taken.
  type: str
  returned: success
repository_id:
  description: Id of the repository, for O(repository_id).
  type: str
  returned: success
  sample: eb11c0ffee77b9
restored:
  description: Parts that were, or would be, replaced; empty when the live data is already that of the set.
  type: list
  elements: dict
  returned: success
checked:
  description: Parts whose O(checks) were content.
  type: list
  elements: str
  returned: success
replaced_set_id:
  description: Id of the set that holds what was replaced; empty when there was nothing.
  type: str
  returned: success
containers:
  description: Containers that were, or would be, stopped, with the state they were found in.
  type: list
  elements: dict
  returned: success
downtime_seconds:
  description: From the first stop to the last start.
  type: float
  returned: success
recovered:
  description: What a killed restore had left, and what was done about it.
  type: list
  elements: str
  returned: success
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.api import COMMON, RESTORE_ARGUMENTS, restore


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec=RESTORE_ARGUMENTS, **COMMON)
    try:
        result = restore("restic", module.params, module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    for warning in result.pop("warnings"):
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
