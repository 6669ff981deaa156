#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Thin shell over ``module_utils/snapshots/api.py``; its twin is ``kopia_repository``."""

from __future__ import annotations

DOCUMENTATION = r"""
module: restic_repository
short_description: Create or check a restic repository
version_added: 0.1.0
author: selfhost.delivery contributors (@selfhost-delivery)
description:
  - Creates a restic repository where there is none, or only checks that the one expected is there.
  - Never creates one where this host has used another before, since then its disk is not mounted.
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
  - selfhost.delivery.snapshots
attributes:
  check_mode:
    support: full
  diff_mode:
    support: full
  idempotent:
    support: full
options:
  state:
    description:
      - V(present) creates the repository when the place is empty.
      - V(connected) fails when there is none.
      - V(disconnected) removes what this host has of it under O(config_dir), its memory of the id too. The repository stays.
    type: str
    choices: [present, connected, disconnected]
    default: present
  new_password:
    description:
      - Change the password to this one; O(password) or O(password_file) is the one before. Nothing changes where it is the new one already.
      - Every other host and file with the old one must be given the new one.
    type: str
  new_password_file:
    description: File on the host with the new password, as O(password_file).
    type: path
  maintenance_owner:
    description: Have this host do the maintenance of a Kopia repository that several share. restic has none.
    type: bool
    default: false
seealso:
  - module: selfhost.delivery.kopia_repository
"""

EXAMPLES = r"""
- name: Have a repository
  selfhost.delivery.restic_repository:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
  register: repository

- name: Fail unless the disk with this repository is mounted
  selfhost.delivery.restic_repository:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    repository_id: "{{ known_repository_id }}"
    state: connected

- name: Give it another password
  selfhost.delivery.restic_repository:
    repository: /var/backups/shop
    password_file: /etc/selfhost-delivery/snapshots.password
    new_password_file: /etc/selfhost-delivery/snapshots.password.new
"""

RETURN = r"""
repository_id:
  description: Id of the repository, for O(repository_id).
  type: str
  returned: success
  sample: eb11c0ffee77b9
free_bytes:
  description: Free space of a repository on this host's file systems; null for others.
  type: int
  returned: success
diff:
  description:
    - What is set in the repository before and after, as far as this module sets it. With Kopia its global policy, with which nothing is
      left out of a snapshot or expires by itself, and the owner of its maintenance.
  type: dict
  returned: success
engine_version:
  description: What the program says of itself.
  type: str
  returned: success
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.api import REPOSITORY_ARGUMENTS, REPOSITORY_COMMON, repository


def main() -> None:
    """Entry point of the module."""
    module = AnsibleModule(argument_spec=REPOSITORY_ARGUMENTS, **REPOSITORY_COMMON)
    try:
        result = repository("restic", module.params, module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    for warning in result.pop("warnings"):
        module.warn(warning)
    module.exit_json(**result)


if __name__ == "__main__":
    main()
