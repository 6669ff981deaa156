#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Finds what a rollback goes back to."""

from __future__ import annotations

DOCUMENTATION = r"""
module: rollback_info
short_description: Find what a rollback goes back to
version_added: 0.1.0
description:
  - Reads the releases and snapshot sets of an app on its coordinator and chooses the target of a rollback.
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
  tag:
    description: Go back to the newest committed release of this tag.
    type: str
    default: ""
  snapshot:
    description: Go back to the release that served when this set was taken, and to its data.
    type: str
    default: ""
  data:
    description: Without O(tag) and O(snapshot), take back the data too, to the set that was taken before the current release.
    type: bool
    default: false
  data_alone:
    description: Today's images with the data of O(snapshot), which may be V(latest).
    type: bool
    default: false
seealso:
  - module: selfhost.delivery.release_info
"""

EXAMPLES = r"""
- name: Find the release before the current one
  selfhost.delivery.rollback_info:
    deploy_dir: /opt/shop
"""

RETURN = r"""
target:
  description: The C(release.json) of the release gone back to.
  returned: success
  type: dict
  sample: {id: 20261120-090000-sha-def, tag: sha-def}
digests:
  description: Its images, name to digest.
  returned: success
  type: dict
  sample: {app: "sha256:0123"}
snapshot:
  description: The set whose data goes back, empty for images alone.
  returned: success
  type: str
  sample: ""
why:
  description: How it was chosen.
  returned: success
  type: str
  sample: the committed release before the current one
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.targets import find_target


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            deploy_dir=dict(type="path", required=True),
            tag=dict(type="str", default=""),
            snapshot=dict(type="str", default=""),
            data=dict(type="bool", default=False),
            data_alone=dict(type="bool", default=False),
        ),
        supports_check_mode=True,
    )
    try:
        target = find_target(**module.params)
    except DeliveryError as error:
        module.fail_json(**error.as_result())
    images = target.release.get("plan", {}).get("images", {})
    module.exit_json(
        changed=False,
        target=target.release,
        digests={name: reference.rpartition("@")[2] for name, reference in images.items()},
        snapshot=target.snapshot,
        why=target.why,
    )


if __name__ == "__main__":
    main()
