#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Puts the program on a host that brings its apps back after a reboot."""

from __future__ import annotations

DOCUMENTATION = r"""
module: boot_program
short_description: Put the program on a host that brings its apps back after a reboot
version_added: 0.1.0
description:
  - Writes one file, an archive that Python runs, with the parts of this collection that start an app, point its edge at what runs,
    and stop it, without a controller. C(python3 PATH up DEPLOY_DIR) and C(python3 PATH down DEPLOY_DIR) call it.
  - C(up) starts what the last committed release has running, waits for what the app depends on, and points the edge at the containers,
    which have other addresses after a start. Where a release was cut off before its commit, it brings back what ran before. While a release
    is under way it does nothing. It makes and removes no container.
  - C(python3 PATH prune DEPLOY_DIR) removes images that releases here have had and no release folder names any more. The current
    release, the one that a rollback goes to and one that is open have theirs, so their images stay.
  - The role C(app_host) installs it and the systemd units that call it.
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
    description: Where it is written. Its folder must exist.
    type: path
    required: true
seealso:
  - module: selfhost.delivery.compose_rollout
"""

EXAMPLES = r"""
- name: Put the program in place
  selfhost.delivery.boot_program:
    path: /usr/local/lib/selfhost-delivery/app.pyz
"""

RETURN = r"""
path:
  description: Where it is.
  returned: success
  type: str
  sample: /usr/local/lib/selfhost-delivery/app.pyz
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.archive import put_program
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout import boot

# All kinds of edges: a rollout imports only the one it uses, and only what is imported here is sent and packed.
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import haproxy, nginx, none, traefik

PACKED = (haproxy, nginx, none, traefik)


def main() -> None:
    module = AnsibleModule(argument_spec=dict(path=dict(type="path", required=True)), supports_check_mode=True)
    path = module.params["path"]
    try:
        changed = put_program(path, boot.__name__, module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    module.exit_json(changed=changed, path=path)


if __name__ == "__main__":
    main()
