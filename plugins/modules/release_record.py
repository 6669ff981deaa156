#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Attaches what an environment did with an image to the image."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release_record
short_description: Attach a release record to images in their registry
version_added: 0.1.0
description:
  - Stores one record as an artifact of type C(application/vnd.selfhost.delivery.release.v1+json) whose subject is the image, beside
    the image in its repository. So the evidence that a digest was released somewhere lives where the digest lives.
  - Registries without the referrers API get the fallback tag C(sha256-<hex>), and a tag C(sha256-<hex>.ref-<hex>) for each record, which is
    why records of several writers at once are all kept.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
  - selfhost.delivery.registry
  - selfhost.delivery.registry.connection
attributes:
  check_mode:
    support: full
    details: The registry is read, nothing is written.
  diff_mode:
    support: none
  idempotent:
    support: full
    details: A record with the same C(environment), C(release) and C(result) is attached to an image once.
options:
  images:
    description: Images by digest, C(host[:port]/repository@digest).
    type: list
    elements: str
    required: true
  record:
    description:
      - What to say. The texts C(environment), C(release) (its id) and C(result) are required; everything else is kept as it is.
      - Without C(created) it gets C(ended), else the time of this run.
      - Everybody who can pull the image can read it.
    type: dict
    required: true
seealso:
  - module: selfhost.delivery.image_info
  - module: selfhost.delivery.release_info
"""

EXAMPLES = r"""
- name: Say that staging runs this image
  selfhost.delivery.release_record:
    images:
      - registry.example.com/shop/app@sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    record:
      environment: staging
      release: 20261121-090000-sha-abc
      result: committed
      tag: sha-abc
"""

RETURN = r"""
results:
  description: One entry for each of O(images), in their order.
  returned: success
  type: list
  elements: dict
  contains:
    image:
      description: The image as given.
      type: str
      returned: always
      sample: registry.example.com/shop/app@sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    artifact:
      description: Digest of the record's artifact; V(none) where check mode would attach it.
      type: str
      returned: always
      sample: sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08
    changed:
      description: Whether it was attached by this run.
      type: bool
      returned: always
      sample: true
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import REGISTRY_ARGUMENTS, client_options_from
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import attach_record_to


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {"type": "list", "elements": "str", "required": True},
            "record": {"type": "dict", "required": True},
            **REGISTRY_ARGUMENTS,
        },
        required_together=[("username", "password")],
        mutually_exclusive=[("username", "token")],
        supports_check_mode=True,
    )
    params = module.params
    try:
        results = attach_record_to(params["images"], params["record"], client_options_from(params), module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    module.exit_json(changed=any(entry["changed"] for entry in results), results=results)


if __name__ == "__main__":
    main()
