#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Thin shell over ``module_utils/data/copying.py``."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot_copy
short_description: Copy a snapshot set, or parts of it, into a new folder
version_added: 0.1.0
description:
  - Writes volumes below C(<into>/volumes/<name>) and paths below C(<into>/paths), and holds each against the manifest of the set.
  - Nothing that is in use is looked at, stopped or replaced. The folder belongs to root alone, since what is in it is secret.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
  - selfhost.delivery.snapshots
attributes:
  check_mode:
    support: full
    details: Finds the set and looks whether there is room.
  diff_mode:
    support: none
  idempotent:
    support: none
    details: A folder that holds something is refused.
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
  set_id:
    description: Id of the set, or V(latest).
    type: str
    required: true
  app:
    description: Look for V(latest) only among the sets of this app.
    type: str
    default: ""
  volumes:
    description: Only these volumes. With O(paths) also empty, everything.
    type: list
    elements: str
    default: []
  paths:
    description: Only these paths. With O(volumes) also empty, everything.
    type: list
    elements: path
    default: []
  into:
    description: The folder, new or empty.
    type: path
    required: true
seealso:
  - module: selfhost.delivery.kopia_restore
  - module: selfhost.delivery.restic_restore
"""

EXAMPLES = r"""
- name: Look at the uploads of yesterday
  selfhost.delivery.snapshot_copy:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    manifest_dir: /opt/shop/snapshots
    set_id: scheduled-20261128-030000
    volumes: [shop_uploads]
    into: /srv/yesterday
"""

RETURN = r"""
repository_id:
  description: Id of the repository, for O(repository_id).
  returned: success
  type: str
  sample: eb11c0ffee77b9
set_id:
  description: The set.
  returned: success
  type: str
parts:
  description: C(kind), C(name), C(files), C(bytes) of each part, and C(place), where it is or would be.
  returned: success
  type: list
  elements: dict
"""

import shutil

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.data import copying
from ansible_collections.selfhost.delivery.plugins.module_utils.data.connection import ARGUMENTS, engine_of
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            ARGUMENTS,
            set_id=dict(type="str", required=True),
            app=dict(type="str", default=""),
            volumes=dict(type="list", elements="str", default=[]),
            paths=dict(type="list", elements="path", default=[]),
            into=dict(type="path", required=True),
        ),
        supports_check_mode=True,
        mutually_exclusive=[("password", "password_file")],
        required_one_of=[("password", "password_file")],
    )
    given = module.params
    into = given["into"].rstrip("/") or "/"
    warnings = []
    try:
        found = copying.find(engine_of(given), given["manifest_dir"], given["set_id"], given["app"], given["volumes"], given["paths"])
        copying.check_folder(into, found.bytes)
        if not module.check_mode:
            try:
                warnings = copying.copy(found, into)
            except BaseException:
                shutil.rmtree(into, ignore_errors=True)
                raise
    except DeliveryError as error:
        module.fail_json(**error.as_result())
    for warning in warnings:
        module.warn(warning)
    told = ("kind", "name", "files", "bytes")
    parts = [{**{key: part[key] for key in told}, "place": copying.place(into, part)} for part in found.parts]
    module.exit_json(changed=True, set_id=found.info.set_id, repository_id=found.catalog.repository_id, parts=parts)


if __name__ == "__main__":
    main()
