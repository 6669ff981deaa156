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
  - With O(key) it also attaches a proof, an in-toto statement about the image with the predicate type
    C(https://selfhost.delivery/release/v1) whose predicate is the record, signed by C(cosign), in a Sigstore bundle. Everybody with the
    public key can check it, also with C(cosign verify-attestation).
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
    details: The registry is read and the record is signed, nothing is written.
  diff_mode:
    support: none
  idempotent:
    support: full
    details: A record with the same C(environment), C(release) and C(result) is attached to an image once, and so is its proof.
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
  key:
    description:
      - Private key that signs the record, the path of a file made by C(cosign generate-key-pair), its content, or a URI that
        C(cosign) knows such as C(awskms://…). Without it nothing is signed.
      - No transparency log is written.
    type: str
  key_password:
    description: Password of O(key).
    type: str
  cosign_program:
    description: Name on E(PATH) or path of C(cosign), 2.6 or newer. Only asked where O(key) is given.
    type: str
    default: cosign
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

- name: Say it so that it can be proven
  selfhost.delivery.release_record:
    images:
      - registry.example.com/shop/app@sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    record:
      environment: staging
      release: 20261121-090000-sha-abc
      result: committed
    key: /etc/delivery/staging.key
    key_password: "{{ vault_staging_key_password }}"
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
    proof:
      description: Digest of the artifact with the signed record; V(none) where there is none, or check mode would attach it.
      type: str
      returned: always
      sample: sha256:2c26b46b68ffc68ff99b453c1d30413413422d706483bfa0f98a5e886266e7ae
    changed:
      description: Whether record or proof were attached by this run.
      type: bool
      returned: always
      sample: true
"""

import contextlib

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.cosign import Cosign, SigningKey
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import REGISTRY_ARGUMENTS, client_options_from
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import attach_record_to, signer_with


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "images": {"type": "list", "elements": "str", "required": True},
            "record": {"type": "dict", "required": True},
            "key": {"type": "str", "no_log": True},
            "key_password": {"type": "str", "no_log": True},
            "cosign_program": {"type": "str", "default": "cosign"},
            **REGISTRY_ARGUMENTS,
        },
        required_together=[("username", "password")],
        mutually_exclusive=[("username", "token")],
        supports_check_mode=True,
    )
    params = module.params
    try:
        with contextlib.ExitStack() as stack:
            sign = None
            if params["key"]:
                cosign = stack.enter_context(Cosign(params["cosign_program"]))
                sign = signer_with(cosign, SigningKey(params["key"], params["key_password"] or ""))
            results = attach_record_to(params["images"], params["record"], client_options_from(params), module.check_mode, sign)
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    module.exit_json(changed=any(entry["changed"] for entry in results), results=results)


if __name__ == "__main__":
    main()
