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
      - References C(host[:port]/repository[:tag][@digest]). Without tag and digest the tag C(latest) is read, as Docker does,
        or with O(tags) every tag that matches.
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
  tags:
    description:
      - Python regular expressions. Each of O(images) without tag and digest becomes all tags of its repository in which one of them is
        found, sorted; V(.) is all tags. Tags that belong to a digest, like cosign's, are left out.
    type: list
    elements: str
    default: []
  layers:
    description: Also read the manifests of all platforms, for RV(images[].variants) and what the images of this task share.
    type: bool
    default: false
  referrers:
    description: Also list what belongs to each image, for RV(images[].referrers).
    type: bool
    default: false
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

- name: See all builds, what each adds to the disk, and who signed them
  selfhost.delivery.image_info:
    images: [registry.example.com/shop/app]
    tags: ['^sha-']
    layers: true
    referrers: true
  register: shop_builds
"""

RETURN = r"""
images:
  description: One entry for each of O(images), in their order; with O(tags) one for each tag.
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
    variants:
      description: One entry for each platform.
      type: list
      elements: dict
      returned: with O(layers)
      contains:
        platform:
          description: The platform; V(none) where it does not say.
          type: str
        digest:
          description: Digest of its own manifest.
          type: str
        size:
          description: Bytes of its config and layers.
          type: int
        layers:
          description: How many layers it has.
          type: int
      sample: [{platform: linux/amd64, digest: "sha256:0d6e…", size: 31457280, layers: 7}]
    total_size:
      description: Bytes of all platforms and their attestations, each blob once.
      type: int
      returned: with O(layers)
      sample: 62914560
    unique_size:
      description: Bytes of layers that no other image of this task has.
      type: int
      returned: with O(layers)
      sample: 1048576
    shared:
      description: The other images of this task that have layers in common with this one.
      type: list
      elements: dict
      returned: with O(layers)
      contains:
        reference:
          description: The other image.
          type: str
        layers:
          description: How many layers both have.
          type: int
        size:
          description: Bytes of these layers.
          type: int
      sample: [{reference: "registry.example.com/shop/migrator:sha-abc", layers: 5, size: 30408704}]
    referrers:
      description:
        - What belongs to the image, to one of its platforms, or to another referrer; signatures, SBOMs, attestations, release records.
        - Found by the referrers API, by its fallback tags and by the tags of cosign.
      type: list
      elements: dict
      returned: with O(referrers)
      contains:
        digest:
          description: Digest of its manifest.
          type: str
        subject:
          description: Digest of what it belongs to.
          type: str
        artifact_type:
          description: Its type; V(none) where the list does not say.
          type: str
        annotations:
          description: Its annotations.
          type: dict
        tag:
          description: The tag of cosign that it was found by; V(none) for a true referrer.
          type: str
      sample:
        - digest: "sha256:51b2…"
          subject: "sha256:0d6e…"
          artifact_type: application/spdx+json
          annotations: {}
          tag:
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.info import Questions, describe_images
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import REGISTRY_ARGUMENTS, client_options_from


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {"type": "list", "elements": "str", "required": True},
            "platform": {"type": "str"},
            "missing": {"type": "str", "choices": ["fail", "report"], "default": "fail"},
            "tags": {"type": "list", "elements": "str", "default": []},
            "layers": {"type": "bool", "default": False},
            "referrers": {"type": "bool", "default": False},
            **REGISTRY_ARGUMENTS,
        },
        required_together=[("username", "password")],
        mutually_exclusive=[("username", "token")],
        supports_check_mode=True,
    )
    params = module.params
    try:
        questions = Questions(
            params["platform"], params["missing"] == "report", tuple(params["tags"]), params["layers"], params["referrers"]
        )
        images = describe_images(params["images"], client_options_from(params), questions)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    module.exit_json(changed=False, images=images)


if __name__ == "__main__":
    main()
