#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Thin shell over ``module_utils/snapshots/api.py``; its twin is ``kopia_snapshot``."""

from __future__ import annotations

DOCUMENTATION = r"""
module: restic_snapshot
short_description: Snapshot Docker volumes and host paths as one set with restic
version_added: 0.1.0
author: selfhost.delivery contributors (@selfhost-delivery)
description:
  - Takes all given volumes and paths at one moment under one id.
  - The set counts only once its manifest is written, which is last.
  - With O(consistency=pause) the data is stored while the app runs; then every running container that mounts one of
    the volumes or paths read-write, of whatever project, is paused while the files that changed since are copied.
    Only where there is no room for these copies beside O(config_dir) does the engine itself read them in the pause.
  - A process of its own thaws them when the module dies.
  - A complete set of the same id is left as it is. Whatever a broken run left under the id is removed first.
  - restic keeps extended attributes, ACLs, hard links, devices and every name. Sockets are left out.
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
    description: Names of Docker volumes of the driver local. With O(paths) also empty, everything of O(project).
    type: list
    elements: str
    default: []
  paths:
    description: Absolute paths of files and directories on the host; no links.
    type: list
    elements: path
    default: []
  project:
    description:
      - A Compose project. The keys of O(volume_options) may then be volumes as its Compose file calls them.
      - With neither O(volumes) nor O(paths), the set holds all its volumes, external and unnamed ones too, and the host paths that its
        containers mount, without those of the system.
    type: str
    default: ''
  volume_options:
    description:
      - How single volumes or paths are taken, by their name, or by that of the volume in the Compose file. Each is a map of
        C(consistency) and C(service).
      - C(consistency) is one of O(consistency) or a database. V(postgresql) is read while it runs, between the start and stop of its
        backup API, with the log of that time. V(redis) forks a dump at the moment of the set. Neither is held still.
        V(mysql), MariaDB as well, locks and closes what is not transactional, and is paused.
        V(sqlite) is paused, and a copy of each database is recovered and checked.
      - A database is asked with the client program in its container and the account in its environment, C(POSTGRES_USER),
        C(POSTGRES_PASSWORD), C(MARIADB_ROOT_PASSWORD), C(MYSQL_ROOT_PASSWORD), C(REDIS_PASSWORD) or the same with C(_FILE).
        It is in the only running container that writes to the volume, or in the one of C(service), which may be a container's name too.
        Where none runs, its files are at rest and taken as they are.
    type: dict
    default: {}
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
    description:
      - V(repository) reads every byte of the set back from the repository before it counts.
      - V(restore) restores it to one side, beside O(config_dir), and compares it.
      - V(none) trusts the repository.
    type: str
    choices: [none, repository, restore]
    default: repository
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
  - module: selfhost.delivery.kopia_snapshot
"""

EXAMPLES = r"""
- name: Snapshot everything the release could damage
  selfhost.delivery.restic_snapshot:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    manifest_dir: /opt/shop/snapshots
    set_id: pre-promotion-4f2a91c-20261121-090000
    volumes: [shop_pgdata, shop_uploads]
    paths: [/opt/shop/.env.production]
    metadata: {app: shop, tag: sha-4f2a91c}

- name: Snapshot everything of a project, its PostgreSQL without holding it
  selfhost.delivery.restic_snapshot:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    manifest_dir: /opt/shop/snapshots
    set_id: manual-20261121-090000
    project: shop
    volume_options:
      pgdata: {consistency: postgresql, service: db}
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
    consistency:
      description: How it was taken.
      type: str
freeze_seconds:
  description: From the first hold, or hook, to the last release.
  type: float
  returned: success
containers:
  description: Containers that were, or would be, held still.
  type: list
  elements: dict
  returned: when the set did not exist
  contains:
    name:
      description: Name of the container.
      type: str
    action:
      description: V(pause) or V(stop).
      type: str
    found:
      description: The state it had; outside check mode.
      type: str
    freeze_ms:
      description: Milliseconds from the call that held it to the end of the one that let it go; outside check mode.
      type: int
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
        result = snapshot("restic", module.params, module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    for warning in result.pop("warnings"):
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
