#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Thin shell over ``module_utils/snapshots/api.py``; its twin is ``restic_snapshot``."""

from __future__ import annotations

DOCUMENTATION = r"""
module: kopia_snapshot
short_description: Snapshot Docker volumes and host paths as one set with Kopia
version_added: 0.1.0
author: selfhost.delivery contributors (@selfhost-delivery)
description:
  - Takes all given volumes and paths at one moment under one id.
  - The set counts only once its manifest is written, which is last.
  - With O(consistency=pause) most data is stored while the app runs; then every running container that mounts one of
    the volumes or paths read-write, of whatever project, is paused for what changed since.
  - A process of its own thaws them when the module dies.
  - A complete set of the same id is left as it is. Whatever a broken run left under the id is removed first.
  - What Kopia itself does not keep (extended attributes, ACLs, hard links, FIFOs and devices, times of directories) goes beside it
    in the set's manifest. Names that are not UTF-8 or end in C(.kopia-entry) are refused. Sockets are left out.
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
    description: Id of the set; letters, digits, dot, dash and underscore.
    type: str
    required: true
  manifest_dir:
    description:
      - Directory of the manifests on the host; made when missing (0700).
      - Only one snapshot or restore at a time works on one directory.
    type: path
    required: true
  volumes:
    description: Names of Docker volumes of the driver local.
    type: list
    elements: str
    default: []
  paths:
    description: Absolute paths of files and directories on the host; no links.
    type: list
    elements: path
    default: []
  metadata:
    description:
      - Anything to be found in the manifest again.
      - The key C(app) is what O(selfhost.delivery.kopia_snapshot_info#module:app) asks for.
    type: dict
    default: {}
  consistency:
    description:
      - V(pause) freezes the writers, so the set is what a power cut at one moment would leave; databases recover from that.
        It is done between their health checks, for which it waits up to ten seconds; the engine keeps a container that freezes in one
        frozen for much longer.
      - V(stop) stops and starts them.
      - V(hooks) runs O(hooks) around the snapshot, and holds nobody.
      - V(none) reads while everything runs. Of a running database this is no backup.
    type: str
    choices: [none, pause, stop, hooks]
    default: pause
  hooks:
    description: Commands in containers, for O(consistency=hooks). The after commands run in any case, even when the module is killed.
    type: list
    elements: dict
    default: []
    suboptions:
      container:
        description: Name or id of the container.
        type: str
        required: true
      before:
        description: Command and arguments, run before.
        type: list
        elements: str
        default: []
      after:
        description: Command and arguments, run after.
        type: list
        elements: str
        default: []
  verify:
    description: Read every byte of the set back from the repository before it counts.
    type: bool
    default: true
  freeze_timeout:
    description: Seconds that the containers may be held still at most; the set fails when it takes longer.
    type: int
    default: 600
  stop_timeout:
    description: Seconds that a container has to stop before it is killed.
    type: int
    default: 30
  keep:
    description: Number of complete sets with a manifest in O(manifest_dir) to keep; older ones are forgotten. V(0) keeps all.
    type: int
    default: 0
  preflight:
    description: Only estimate and check the free space, whether in check mode or not.
    type: bool
    default: false
seealso:
  - module: selfhost.delivery.restic_snapshot
"""

EXAMPLES = r"""
- name: Snapshot everything the release could damage
  selfhost.delivery.kopia_snapshot:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    manifest_dir: /opt/shop/snapshots
    set_id: pre-promotion-4f2a91c-20261121-090000
    volumes: [shop_pgdata, shop_uploads]
    paths: [/opt/shop/.env.production]
    metadata: {app: shop, tag: sha-4f2a91c}
"""

RETURN = r"""
set_id:
  description: Id of the set.
  type: str
  returned: success
manifest:
  description: Path of the manifest on the host.
  type: str
  returned: success
repository_id:
  description: Id of the repository, for O(repository_id).
  type: str
  returned: success
  sample: eb11c0ffee77b9
created:
  description: When the set was taken, UTC.
  type: str
  returned: outside check mode
bytes:
  description: Size of all files of the set.
  type: int
  returned: outside check mode
files:
  description: Number of all files of the set.
  type: int
  returned: outside check mode
parts:
  description: What is in the set.
  type: list
  elements: dict
  returned: outside check mode
  contains:
    kind:
      description: V(volume) or V(path).
      type: str
    name:
      description: Name of the volume, or the path.
      type: str
    files:
      description: Number of plain files.
      type: int
    bytes:
      description: Their size.
      type: int
    digest:
      description: Checksum over names, modes, owners, attributes and contents; empty unless RV(parts[].stable).
      type: str
    stable:
      description: Whether nothing changed while it was read.
      type: bool
freeze_seconds:
  description: How long the containers were held still.
  type: float
  returned: success
containers:
  description: Containers that were, or would be, held still.
  type: list
  elements: dict
  returned: when the set did not exist
estimate:
  description: C(bytes), C(new_bytes) since the last set, and C(free_bytes) of the repository.
  type: dict
  returned: success
forgotten:
  description: Ids of older sets deleted by O(keep).
  type: list
  elements: str
  returned: success
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.api import COMMON, SNAPSHOT_ARGUMENTS, snapshot


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec=SNAPSHOT_ARGUMENTS, **COMMON)
    try:
        result = snapshot("kopia", module.params, module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    for warning in result.pop("warnings"):
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
