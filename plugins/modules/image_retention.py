#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Deletes the images of a registry that nobody needs any more."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_retention
short_description: Delete images from registries by rules, and never one that an environment runs or ran
version_added: 0.1.0
description:
  - Deletes the manifests of images that rules let go, with their platforms, signatures, SBOMs, attestations and records. The bytes on the
    registry's disk are freed by its garbage collection afterwards, which C(tasks_from=collect) of the role
    P(selfhost.delivery.registry#role) does safely.
  - A tag goes only when a rule matches it and no matching rule keeps it. An image stays with all its tags when one of them stays, when a
    release record says that an environment ran it, when it is in O(keep_digests), or when an image that stays is made of it.
  - What belongs to an image (found by the referrers API, its fallback tags, and the tags of cosign) stays and goes with it.
  - Everything is planned, for all repositories, before anything is deleted. A repository is read again before its first deletion and
    every few seconds after it; what somebody pushed, promoted, tagged or attached meanwhile is left alone.
  - An index is deleted before its platforms, and an image before what belongs to it. What then has no tag is listed in the registry
    under the tag C(selfhost-delivery-retention) until the end, so that the next run ends one that was cut short.
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
    details: The registry is read, and asked whether it deletes by the digest of a manifest that nobody has; nothing is written or deleted.
  diff_mode:
    support: full
    details: Shows the tags of each repository before and after, and what goes that has no tag.
  idempotent:
    support: full
options:
  repositories:
    description: Repositories, C(host[:port]/repository), without tag or digest.
    type: list
    elements: str
    required: true
  rules:
    description:
      - Which tags may go. A tag that no rule matches stays.
      - Tags like C(sha256-<digest>.sig) are no matter of rules; they follow their image.
    type: list
    elements: dict
    required: true
    suboptions:
      pattern:
        description:
          - Python regular expression, searched in the tag.
          - Each text that its groups match is a series of its own, so V(^(.+\)-[0-9a-f]{7}$) keeps the newest of each branch.
        type: str
        required: true
      keep:
        description:
          - How many images of each series stay, the newest first, by the creation time in the image's config.
          - Several tags of one image count once. An image whose time is not known, or is before 1981 as in reproducible builds,
            stays and does not count. Of images with the same time none is newer.
        type: int
        required: true
      younger_than:
        description: Days; younger images stay too, whatever their number.
        type: float
      keep_none:
        description: Must be V(true) where O(rules[].keep=0), which leaves nothing of a series but what stays for other reasons.
        type: bool
        default: false
  keep_digests:
    description:
      - Digests that stay in every repository, with everything they consist of, C(sha256:...) or C(host/repository@sha256:...).
      - Name here what runs by its digest and has neither a tag that stays nor a release record.
    type: list
    elements: str
    default: []
  orphans:
    description:
      - Whether signatures, lists of referrers and records that belong to an image which the repository does not have may go.
      - Leave this V(false) for a repository that holds the signatures of images of another one.
    type: bool
    default: false
notes:
  - A manifest that lost its last tag, because the tag was moved, cannot be found through a registry's API, so it is neither kept nor
    deleted by this module.
  - Blobs that a repository which is not in O(repositories) shares with a deleted image stay on the disk, so name all repositories that
    share layers for a true number in RV(bytes).
  - Docker distribution 2 cannot delete a tag alone. A tag that may go but names a part of an image that stays is then left.
seealso:
  - module: selfhost.delivery.image_info
  - module: selfhost.delivery.image_promote
  - module: selfhost.delivery.release_record
"""

EXAMPLES = r"""
- name: Keep the last twenty builds and three of each branch, and what ran anywhere
  selfhost.delivery.image_retention:
    repositories:
      - registry.example.com/shop/app
      - registry.example.com/shop/migrator
    rules:
      - pattern: ^sha-
        keep: 20
        younger_than: 14
      - pattern: ^(?!sha-)(.+)-[0-9a-f]{7}$
        keep: 3
  register: shop_retention

- name: Free the disk
  ansible.builtin.include_role:
    name: selfhost.delivery.registry
    tasks_from: collect
  when: shop_retention is changed
"""

RETURN = r"""
kept:
  description: Tags that stay, and tags whose image was left because something changed since the plan.
  returned: success
  type: list
  elements: dict
  contains:
    repository:
      description: Registry and repository.
      type: str
      returned: always
      sample: registry.example.com/shop/app
    tag:
      description: The tag.
      type: str
      returned: always
      sample: sha-abc
    digest:
      description: What it names; V(none) for a tag that names nothing which the registry has.
      type: str
      returned: always
      sample: sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    reason:
      description: Why it stays.
      type: str
      returned: always
      sample: production ran it (release 20261121-090000-sha-abc)
deleted:
  description: Manifests that were deleted, in the order of deletion, or would be in check mode.
  returned: success
  type: list
  elements: dict
  contains:
    repository:
      description: Registry and repository.
      type: str
      returned: always
      sample: registry.example.com/shop/app
    digest:
      description: Digest of the manifest.
      type: str
      returned: always
      sample: sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    tags:
      description: Tags that named it, all of them gone.
      type: list
      elements: str
      returned: always
      sample: [sha-abd]
    what:
      description:
        - V(image) or V(index) with a tag of its own, V(part) of an index, V(referrer) that belongs to another one that goes, V(orphan),
          or V(tag) where the tag alone goes.
      type: str
      returned: always
      sample: image
    reason:
      description: Why it goes.
      type: str
      returned: always
      sample: not one of the last 20 of ^sha- and older than 14 days
bytes:
  description:
    - Bytes that the next garbage collection frees, of manifests, configs and layers that nothing in O(repositories) needs any more,
      each counted once.
  returned: success
  type: int
  sample: 31457280
repositories:
  description: One entry for each repository, in order.
  returned: success
  type: list
  elements: dict
  contains:
    repository:
      description: Registry and repository.
      type: str
      returned: always
      sample: registry.example.com/shop/app
    kept:
      description: Number of tags that stay.
      type: int
      returned: always
      sample: 23
    deleted:
      description: Number of manifests deleted.
      type: int
      returned: always
      sample: 12
    bytes:
      description: Its part of RV(bytes). What several repositories share is counted in the first.
      type: int
      returned: always
      sample: 31457280
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import REGISTRY_ARGUMENTS, client_options_from
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.retention import Policy, retain


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "repositories": {"type": "list", "elements": "str", "required": True},
            "rules": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "pattern": {"type": "str", "required": True},
                    "keep": {"type": "int", "required": True},
                    "younger_than": {"type": "float"},
                    "keep_none": {"type": "bool", "default": False},
                },
            },
            "keep_digests": {"type": "list", "elements": "str", "default": []},
            "orphans": {"type": "bool", "default": False},
            **REGISTRY_ARGUMENTS,
        },
        required_together=[("username", "password")],
        mutually_exclusive=[("username", "token")],
        supports_check_mode=True,
    )
    params = module.params
    try:
        policy = Policy.parse(params["rules"], params["keep_digests"], params["orphans"])
        outcomes = retain(params["repositories"], policy, client_options_from(params), module.check_mode)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    for outcome in outcomes:
        if not outcome.tags_before:
            module.warn(f"{outcome.repository} has no tags; nothing was looked at there.")
    result = {
        "changed": any(outcome.changed for outcome in outcomes),
        "kept": [entry for outcome in outcomes for entry in outcome.kept_entries()],
        "deleted": [entry for outcome in outcomes for entry in outcome.deleted_entries()],
        "bytes": sum(outcome.freed for outcome in outcomes),
        "repositories": [outcome.summary() for outcome in outcomes],
    }
    if module._diff:
        result["diff"] = [outcome.diff() for outcome in outcomes]
    module.exit_json(**result)


if __name__ == "__main__":
    main()
