#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Asks registries what images are."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_info
short_description: Resolve images to digests and read what they are
version_added: 0.1.0
description:
  - Asks the registry, not the local engine; no Docker daemon is needed, and nothing but manifests and configs is read.
  - All images of one task are asked for side by side over kept-alive connections.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.info_module
  - selfhost.delivery.attributes.delivery_group
  - selfhost.delivery.registry
  - selfhost.delivery.registry.connection
options:
  images:
    description:
      - References C(host[:port]/repository[:tag][@digest]). Without tag and digest the tag C(latest) is read, as Docker does.
      - With tag and digest the digest is what is asked for.
    type: list
    elements: str
    required: true
  platform:
    description:
      - Platform that each image must run on, like V(linux/amd64). An image that is for others only fails the task.
      - Labels, creation time and size are then those of this platform's image.
    type: str
  missing:
    description: What to do about an image that the registry does not have.
    type: str
    choices:
      fail: The task fails and names the first one.
      report: It is returned with RV(images[].exists=false).
    default: fail
seealso:
  - module: selfhost.delivery.image_promote
  - module: selfhost.delivery.release_record
"""

EXAMPLES = r"""
- name: Pin a tag
  selfhost.delivery.image_info:
    images:
      - registry.example.com/shop/app:sha-abc
      - registry.example.com/shop/migrator:sha-abc
    platform: linux/amd64
  register: shop_images

- name: Look whether a tag was built
  selfhost.delivery.image_info:
    images: [registry.example.com/shop/app:sha-def]
    missing: report
  register: shop_candidate
"""

RETURN = r"""
images:
  description: One entry for each of O(images), in their order.
  returned: success
  type: list
  elements: dict
  contains:
    reference:
      description: The reference as given.
      type: str
      returned: always
      sample: registry.example.com/shop/app:sha-abc
    repository:
      description: Registry and repository.
      type: str
      returned: always
      sample: registry.example.com/shop/app
    tag:
      description: The tag of the reference; V(none) when it has none.
      type: str
      returned: always
      sample: sha-abc
    exists:
      description: Whether the registry has it.
      type: bool
      returned: always
      sample: true
    digest:
      description: Digest of the manifest or index; V(none) when the image does not exist, as all that follows.
      type: str
      returned: always
      sample: sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    media_type:
      description: Its type.
      type: str
      returned: always
      sample: application/vnd.oci.image.index.v1+json
    platforms:
      description: Platforms that it is for; empty where it does not say.
      type: list
      elements: str
      returned: always
      sample: [linux/amd64, linux/arm64]
    labels:
      description: Labels of the image, of an index those of O(platform) or else of its first image.
      type: dict
      returned: always
      sample: {org.opencontainers.image.revision: abc}
    created:
      description: When it was built, as its config says; from the same image as RV(images[].labels).
      type: str
      returned: always
      sample: "2026-11-21T09:00:00Z"
    size:
      description: Bytes of config and layers as they are transferred; from the same image as RV(images[].labels).
      type: int
      returned: always
      sample: 31457280
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.info import describe_images
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import REGISTRY_ARGUMENTS, client_options_from


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {"type": "list", "elements": "str", "required": True},
            "platform": {"type": "str"},
            "missing": {"type": "str", "choices": ["fail", "report"], "default": "fail"},
            **REGISTRY_ARGUMENTS,
        },
        required_together=[("username", "password")],
        mutually_exclusive=[("username", "token")],
        supports_check_mode=True,
    )
    params = module.params
    try:
        images = describe_images(params["images"], client_options_from(params), params["platform"], params["missing"] == "report")
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    module.exit_json(changed=False, images=images)


if __name__ == "__main__":
    main()
