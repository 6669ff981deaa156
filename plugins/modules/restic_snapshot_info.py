#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Thin shell over ``module_utils/snapshots/api.py``; its twin is ``kopia_snapshot_info``."""

from __future__ import annotations

DOCUMENTATION = r"""
module: restic_snapshot_info
short_description: List snapshot sets taken with restic
version_added: 0.1.0
author: selfhost.delivery contributors (@selfhost-delivery)
description:
  - Lists complete and incomplete sets, newest first, from the manifests on the host and from the repository.
  - A set is called complete only when the repository really holds each of its parts.
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.info_module
  - selfhost.delivery.attributes.delivery_group
  - selfhost.delivery.snapshots

options:
  manifest_dir:
    description: Directory of the manifests on the host; it need not exist.
    type: path
    required: true
  set_id:
    description: Only this set.
    type: str
  app:
    description: Only sets whose metadata names this app.
    type: str
    default: ''
seealso:
  - module: selfhost.delivery.kopia_snapshot_info
"""

EXAMPLES = r"""
- name: List the sets of an app
  selfhost.delivery.restic_snapshot_info:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    manifest_dir: /opt/shop/snapshots
    app: shop
  register: snapshots
"""

RETURN = r"""
repository_id:
  description: Id of the repository, for O(repository_id).
  type: str
  returned: success
  sample: eb11c0ffee77b9
sets:
  description: The sets, newest first.
  type: list
  elements: dict
  returned: success
  contains:
    set_id:
      description: Id of the set.
      type: str
    complete:
      description: Whether it can be restored.
      type: bool
    why_incomplete:
      description: Why not.
      type: str
    created:
      description: When it was taken.
      type: str
    engine:
      description: V(kopia) or V(restic).
      type: str
    repository_id:
      description: Id of the repository that holds it.
      type: str
    consistency:
      description: How the writers were held.
      type: str
    replaces:
      description: Id of the set whose restore replaced this state; empty for an ordinary set.
      type: str
    metadata:
      description: As given when it was taken.
      type: dict
    bytes:
      description: Size of all files.
      type: int
    files:
      description: Number of all files.
      type: int
    age_seconds:
      description: Seconds since it was taken, by the clock of the host; null for a set without manifest.
      type: int
    seconds:
      description: How long its taking lasted, without reading it back.
      type: float
    new_bytes:
      description: Bytes that the repository grew by, as far as they are known.
      type: int
    freeze_seconds:
      description: From the first hold to the last release.
      type: float
    containers:
      description: Who was held still, as RV(selfhost.delivery.restic_snapshot#module:containers).
      type: list
      elements: dict
    parts:
      description: C(kind), C(name), C(files), C(bytes), C(digest), C(stable) and C(consistency) of each part.
      type: list
      elements: dict
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.api import COMMON, INFO_ARGUMENTS, info


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec=INFO_ARGUMENTS, **COMMON)
    try:
        result = info("restic", module.params, module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    for warning in result.pop("warnings"):
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
