#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Thin shell over ``module_utils/data/choice.py``."""

from __future__ import annotations

DOCUMENTATION = r"""
module: restore_info
short_description: Find the snapshot set that is meant, and say what giving it back does
version_added: 0.1.0
description:
  - Makes a table of snapshot sets, chooses one by id, as the newest, or by time, and checks which parts of it are asked for.
  - Works on what M(selfhost.delivery.kopia_snapshot_info) or M(selfhost.delivery.restic_snapshot_info) returned and touches nothing.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.info_module
  - selfhost.delivery.attributes.delivery_group
options:
  sets:
    description: The sets, as RV(selfhost.delivery.kopia_snapshot_info#module:sets).
    type: list
    elements: dict
    required: true
  project:
    description: Compose project; its prefix of volume names may be left out in O(volumes), and is in RV(table).
    type: str
    default: ""
  snapshot:
    description: Id of the set, or V(latest) for the newest complete one that was not itself kept by a restore.
    type: str
    default: ""
  at:
    description:
      - The newest such set that was not taken after this time, such as V(2026-11-28 09:00).
      - It is in UTC, unless an offset such as V(+01:00) follows.
    type: str
    default: ""
  volumes:
    description: Only these volumes of it, as Docker or as the Compose file calls them.
    type: list
    elements: str
    default: []
  paths:
    description: Only these paths of it.
    type: list
    elements: str
    default: []
  planned:
    description: What the restore of the chosen set says in check mode; then RV(lines) tells it in words.
    type: dict
seealso:
  - module: selfhost.delivery.kopia_restore
  - module: selfhost.delivery.restic_restore
"""

EXAMPLES = r"""
- name: Find the data of yesterday morning
  selfhost.delivery.restore_info:
    sets: "{{ found.sets }}"
    at: "2026-11-28 09:00"
    volumes: [uploads]
"""

RETURN = r"""
table:
  description: The sets, newest first, a line each.
  returned: success
  type: list
  elements: str
  sample: ["set                     age  size    files  release  holds          "]
set:
  description: The chosen set, empty without O(snapshot) and O(at).
  returned: success
  type: dict
volumes:
  description: O(volumes) as the set calls them.
  returned: success
  type: list
  elements: str
paths:
  description: O(paths) as the set calls them.
  returned: success
  type: list
  elements: str
why:
  description: How the set was chosen.
  returned: success
  type: str
  sample: the newest not taken after 2026-11-28 09:00:00 UTC
lines:
  description: What giving it back does, with O(planned).
  returned: success
  type: list
  elements: str
"""

import datetime

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.data.choice import choose, plan_lines, table
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            sets=dict(type="list", elements="dict", required=True),
            project=dict(type="str", default=""),
            snapshot=dict(type="str", default=""),
            at=dict(type="str", default=""),
            volumes=dict(type="list", elements="str", default=[]),
            paths=dict(type="list", elements="str", default=[]),
            planned=dict(type="dict"),
        ),
        supports_check_mode=True,
    )
    given = module.params
    now = datetime.datetime.now(datetime.timezone.utc)
    result = {"table": table(given["sets"], now, given["project"]), "set": {}, "volumes": [], "paths": [], "why": "", "lines": []}
    try:
        if given["snapshot"] or given["at"]:
            choice = choose(given["sets"], given["snapshot"], given["at"], given["volumes"], given["paths"], given["project"])
            result.update(set=dict(choice.found), volumes=choice.volumes, paths=choice.paths, why=choice.why)
            if given["planned"] is not None:
                result["lines"] = plan_lines(choice, given["planned"], now)
    except DeliveryError as error:
        module.fail_json(**error.as_result())
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
