#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Brings images to another registry, repository or tag, byte for byte."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_promote
short_description: Copy images between registries, repositories and tags without changing a byte
version_added: 0.1.0
description:
  - Copies from registry to registry, mounts from repository to repository of one registry, and only writes a manifest from tag to tag
    of one repository. It runs where it is called and needs no Docker daemon; layers stream through memory, not over the disk.
  - Every byte that passes is checked against its digest, and what the destination already has is asked for before it is believed,
    down to each layer, so a destination with a missing layer is repaired. O(verify) makes that cheaper where it is not needed.
  - All images of a task are looked at before anything is written. Then come layers, manifests, what belongs to them, and the tags last.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
  - selfhost.delivery.registry.connection
attributes:
  check_mode:
    support: full
    details: Both registries are read, nothing is written. Blobs are then counted as they would be.
  diff_mode:
    support: full
    details: Shows the digest of each tag before and after, and what the destination lacked.
  idempotent:
    support: full
options:
  source:
    description: Image to promote, C(host[:port]/repository[:tag][@digest]) with a tag or a digest.
    type: str
  destination:
    description:
      - Where to, C(host[:port]/repository[:tag]). Without a tag it gets the tag of O(source).
      - A digest here is one more expectation, like O(expected_digest).
    type: str
  extra_tags:
    description: More tags in the repository of O(destination). They are written in order, after the destination's own tag.
    type: list
    elements: str
    default: []
  expected_digest:
    description: Refuse the promotion when O(source) is not this digest.
    type: str
  images:
    description: Several images in one task, over shared connections. Excludes O(source).
    type: list
    elements: dict
    suboptions:
      source:
        description: As O(source).
        type: str
        required: true
      destination:
        description: As O(destination).
        type: str
        required: true
      extra_tags:
        description: As O(extra_tags).
        type: list
        elements: str
        default: []
      expected_digest:
        description: As O(expected_digest).
        type: str
  platforms:
    description:
      - V(all), or platforms like V(linux/amd64) to take from an index.
      - One platform becomes that platform's own image, several a smaller index. Both have another digest than the whole index.
    type: list
    elements: str
    default: [all]
  referrers:
    description:
      - Whether signatures, SBOMs, attestations and release records travel with the image.
        They are found by the referrers API, by its fallback tags and by the tags of cosign.
      - A cosign tag at the destination that holds signatures which the source lacks is left as it is, with a warning.
    type: bool
    default: true
  verify:
    description:
      - How much of the destination is looked at before it is believed. What has to be written is always written whole, and
        the tags last, whatever is chosen here.
      - V(blobs) reads one byte of every blob, also of an image whose tag is right already. Only this finds and mends an image that was
        whole once and lost a layer since, to a garbage collection or a damaged disk. What a mount promises is looked at too.
      - V(manifests) looks at every manifest of an index and at referrers, and believes that a manifest which is there has its blobs.
      - V(tag) believes a tag that names the right digest. Where all tags do, nothing else is asked, one request for each tag;
        a source that is given by digest is then not asked at all, one given by tag once, in another registry by HEAD.
        Referrers that were attached at the source since are not looked for. A registry that answers a write with the right digest is
        believed without reading it back.
      - With V(blobs) and V(manifests), manifests are remembered in C(~/.cache/selfhost-delivery/images), so that the next time all
        questions about an image are asked at once. What is remembered says what to ask and never stands for an answer.
    type: str
    choices: [blobs, manifests, tag]
    default: blobs
  immutable_tags:
    description:
      - Python regular expressions. A tag that matches one is never moved to another digest.
      - It is looked at before anything is written, and again right before it is written itself where the first look is more than a second
        old. Registries offer no write that depends on what a tag names, so of two writers within that time the later one wins.
    type: list
    elements: str
    default: ['^sha-']
  source_auth:
    description: Credentials of the source, and what differs there from the module's own options. Default is the Docker config file.
    type: dict
    suboptions: &auth
      username:
        description: User. Requires C(password).
        type: str
      password:
        description: Password or access token of C(username).
        type: str
      token:
        description: Bearer token, sent as it is. Excludes C(username).
        type: str
      docker_config:
        description: As O(docker_config).
        type: path
      ca_path:
        description: As O(ca_path).
        type: path
      client_cert:
        description: As O(client_cert).
        type: path
      client_key:
        description: As O(client_key).
        type: path
      validate_certs:
        description: As O(validate_certs).
        type: bool
      plain_http:
        description: As O(plain_http).
        type: bool
  destination_auth:
    description: The same for the destination.
    type: dict
    suboptions: *auth
seealso:
  - module: selfhost.delivery.image_info
  - module: selfhost.delivery.release_record
"""

EXAMPLES = r"""
- name: Bring a build to the production registry
  selfhost.delivery.image_promote:
    source: registry.example.com/shop/app:sha-abc
    destination: production.example.com/shop/app
    expected_digest: "{{ shop_images.images[0].digest }}"

- name: Say what production runs
  selfhost.delivery.image_promote:
    source: registry.example.com/shop/app:sha-abc
    destination: registry.example.com/shop/app:production

- name: Keep a mirror up to date, cheaply; what is there already costs one request for each image
  selfhost.delivery.image_promote:
    images: "{{ shop_mirrored_images }}"
    verify: tag

- name: Promote all images of a build in one go
  selfhost.delivery.image_promote:
    images:
      - source: registry.example.com/shop/app:sha-abc
        destination: registry.example.com/production/app
        extra_tags: [production]
      - source: registry.example.com/shop/migrator:sha-abc
        destination: registry.example.com/production/migrator
    concurrency: 8

- name: From a registry with TLS to one on this machine without
  selfhost.delivery.image_promote:
    source: registry.example.com/shop/app:sha-abc
    destination: localhost:5000/shop/app
    source_auth:
      username: ci
      password: "{{ vault_registry_password }}"
    destination_auth:
      plain_http: true
"""

RETURN = r"""
digest:
  description: Digest at the destination.
  returned: success, with O(source)
  type: str
  sample: sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
tags:
  description: Tags at the destination that name it.
  returned: success, with O(source)
  type: list
  elements: str
  sample: [sha-abc, production]
media_type:
  description: Type of the manifest or index.
  returned: success, with O(source)
  type: str
  sample: application/vnd.oci.image.index.v1+json
blobs:
  description:
    - How many blobs (configs and layers) of all images were mounted, copied, and there already.
    - What O(verify) does not look at is not counted.
  returned: success
  type: dict
  sample: {mounted: 0, copied: 3, present: 5}
bytes_copied:
  description: Bytes of the copied blobs.
  returned: success
  type: int
  sample: 31457280
results:
  description: One entry for each image, in order.
  returned: success
  type: list
  elements: dict
  contains:
    source:
      description: The source, in full.
      type: str
      returned: always
      sample: registry.example.com/shop/app:sha-abc
    destination:
      description: Registry and repository of the destination.
      type: str
      returned: always
      sample: production.example.com/shop/app
    reference:
      description: The image at the destination by digest.
      type: str
      returned: always
      sample: production.example.com/shop/app@sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    source_digest:
      description: Digest of the source; differs from RV(results[].digest) only where O(platforms) leaves some out.
      type: str
      returned: always
      sample: sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    digest:
      description: As RV(digest).
      type: str
      returned: always
      sample: sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    media_type:
      description: As RV(media_type).
      type: str
      returned: always
      sample: application/vnd.oci.image.index.v1+json
    platforms:
      description: Platforms of an index; empty for a single image.
      type: list
      elements: str
      returned: always
      sample: [linux/amd64, linux/arm64]
    tags:
      description: As RV(tags).
      type: list
      elements: str
      returned: always
      sample: [sha-abc]
    manifests:
      description: Manifests that the destination lacked.
      type: int
      returned: always
      sample: 3
    referrers:
      description: Signatures, SBOMs, attestations and records that the destination lacked.
      type: int
      returned: always
      sample: 1
    blobs:
      description: As RV(blobs), of this image.
      type: dict
      returned: always
      sample: {mounted: 0, copied: 3, present: 5}
    bytes_copied:
      description: As RV(bytes_copied), of this image.
      type: int
      returned: always
      sample: 31457280
    changed:
      description: Whether anything was written for this image.
      type: bool
      returned: always
      sample: true
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import check_platform
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import CONNECTION_ARGUMENTS, SIDE_ARGUMENTS, client_options_from
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transfer import VERIFY, Outcome, Rules, Wish, promote

IMAGE_ARGUMENTS: dict[str, t.Any] = {
    "source": {"type": "str"},
    "destination": {"type": "str"},
    "extra_tags": {"type": "list", "elements": "str", "default": []},
    "expected_digest": {"type": "str"},
}


def run(params: t.Mapping[str, t.Any], check: bool) -> list[Outcome]:
    """Promote what ``params`` name; ``DeliveryError`` passes through."""
    images = [params] if params["images"] is None else params["images"]
    wishes = [Wish.parse(image["source"], image["destination"], image["extra_tags"], image["expected_digest"]) for image in images]
    platforms = tuple(check_platform(name) for name in params["platforms"] if name != "all")
    if platforms and "all" in params["platforms"]:
        raise DeliveryError("read the option platforms", "it names 'all' and others", "Name 'all' alone, or only others.", "config")
    rules = Rules(platforms, params["referrers"], tuple(params["immutable_tags"]), params["concurrency"], params["verify"])
    return promote(wishes, rules, client_options_from(params, "source_"), client_options_from(params, "destination_"), check)


def main() -> None:
    required = {"required": True}
    module = AnsibleModule(
        argument_spec={
            **IMAGE_ARGUMENTS,
            "images": {
                "type": "list",
                "elements": "dict",
                "options": {**IMAGE_ARGUMENTS, "source": {"type": "str", **required}, "destination": {"type": "str", **required}},
            },
            "platforms": {"type": "list", "elements": "str", "default": ["all"]},
            "referrers": {"type": "bool", "default": True},
            "verify": {"type": "str", "choices": list(VERIFY), "default": "blobs"},
            "immutable_tags": {"type": "list", "elements": "str", "default": ["^sha-"]},
            "source_auth": SIDE_ARGUMENTS,
            "destination_auth": SIDE_ARGUMENTS,
            **CONNECTION_ARGUMENTS,
        },
        required_one_of=[("source", "images")],
        required_together=[("source", "destination")],
        mutually_exclusive=[("source", "images"), ("expected_digest", "images")],
        supports_check_mode=True,
    )
    try:
        outcomes = run(module.params, module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    for outcome in outcomes:
        for warning in outcome.warnings:
            module.warn(warning)
    result: dict[str, t.Any] = {
        "changed": any(outcome.changed for outcome in outcomes),
        "results": [outcome.as_dict() for outcome in outcomes],
        "blobs": {name: sum(outcome.blobs[name] for outcome in outcomes) for name in ("mounted", "copied", "present")},
        "bytes_copied": sum(outcome.bytes_copied for outcome in outcomes),
    }
    if module.params["images"] is None:
        result.update({name: result["results"][0][name] for name in ("digest", "tags", "media_type")})
    if module._diff:
        result["diff"] = [outcome.diff() for outcome in outcomes]
    module.exit_json(**result)


if __name__ == "__main__":
    main()
