#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Says which snapshot engine a repository needs."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot_engine_info
short_description: Find the snapshot engine of a repository
version_added: 0.1.0
description:
  - Chooses between Kopia and restic, and says where their programs are on the host.
  - A repository on a file system belongs to the engine that made it, whatever was installed since. Without one, it is Kopia where
    it is on E(PATH), otherwise restic.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.info_module
  - selfhost.delivery.attributes.delivery_group
options:
  repository:
    description: The repository as the engine's modules take it.
    type: str
    required: true
  engine:
    description: V(auto) chooses as above; another value is taken as it is.
    type: str
    choices: [auto, kopia, restic]
    default: auto
seealso:
  - module: selfhost.delivery.kopia_repository
  - module: selfhost.delivery.restic_repository
"""

EXAMPLES = r"""
- name: Find what took the snapshots
  selfhost.delivery.snapshot_engine_info:
    repository: /var/backups/shop
"""

RETURN = r"""
engine:
  description: V(kopia) or V(restic).
  returned: success
  type: str
  sample: kopia
programs:
  description: Each engine's program on the host, empty where there is none.
  returned: success
  type: dict
  sample: {kopia: /usr/bin/kopia, restic: ""}
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import ENGINES, choose_engine, program_of


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            repository=dict(type="str", required=True),
            engine=dict(type="str", choices=["auto", *ENGINES], default="auto"),
        ),
        supports_check_mode=True,
    )
    programs = {name: program_of(name) for name in ENGINES}
    module.exit_json(
        changed=False,
        engine=choose_engine(module.params["engine"], module.params["repository"], programs),
        programs=programs,
    )


if __name__ == "__main__":
    main()
