#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Leaves on the host, as one file, what the modules for snapshots and drills are made of."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot_program
short_description: Write the program with which a host takes sets and does drills by itself
version_added: 0.1.0
description:
  - Packs the Python code that M(selfhost.delivery.kopia_snapshot), M(selfhost.delivery.restic_snapshot) and
    M(selfhost.delivery.snapshot_drill) run into one file that C(python3) runs, so that a timer of the host does just what the modules do.
  - C(python3 <path> snapshot <configuration>) takes a set, C(python3 <path> drill <configuration>) does a drill.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  path:
    description: The file; its folder must exist.
    type: path
    required: true
seealso:
  - module: selfhost.delivery.snapshot_drill
"""

EXAMPLES = r"""
- name: Have the program
  selfhost.delivery.snapshot_program:
    path: /usr/local/lib/selfhost-delivery/snapshots.pyz
"""

RETURN = r"""
path:
  description: The file.
  returned: success
  type: str
  sample: /usr/local/lib/selfhost-delivery/snapshots.pyz
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.archive import put_program
from ansible_collections.selfhost.delivery.plugins.module_utils.data import timed
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

# Loaded by name only when a repository is used; here, so that they are sent and packed.
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import kopia, restic

PACKED = (kopia, restic)


def main() -> None:
    module = AnsibleModule(argument_spec=dict(path=dict(type="path", required=True)), supports_check_mode=True)
    path = module.params["path"]
    try:
        changed = put_program(path, timed.__name__, module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    module.exit_json(changed=changed, path=path)


if __name__ == "__main__":
    main()
