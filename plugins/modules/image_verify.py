#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Says whether images were signed by whom they have to be."""

from __future__ import annotations

DOCUMENTATION = r"""
module: image_verify
short_description: Verify cosign signatures and attestations of images
version_added: 0.1.0
description:
  - Resolves each image to its digest, reads what was signed about this digest, and lets the program C(cosign) check it against the
    keys and identities that count. The verdict is about the digest; deploy by it, since a tag can move afterwards.
  - Finds signatures and attestations of cosign 2 (the tags C(sha256-<hex>.sig) and C(.att)), and those of cosign 3 (Sigstore bundles
    among the referrers, by the API or the fallback tag).
  - C(cosign) gets files and no credentials, and does not talk to the registry. It reaches the network only for Sigstore's public
    root, and only where O(trusted_root) is not given and O(keys) alone do not decide.
  - A signature on an index is one for the index. Nothing is said about its images by their own digests.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
requirements:
  - cosign 2.6.0 or newer on the host that runs the module. Attestations of cosign 2 by O(identities) need cosign 3.
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
      - With tag and digest the digest is what is verified.
    type: list
    elements: str
    required: true
  keys:
    description:
      - Public keys whose signatures count, each the path of a PEM file on the host that runs the module or its content. Any of them
        will do, so that keys can be changed one after the other.
      - One of O(keys) and O(identities) is required; where both are given, either will do.
    type: list
    elements: str
    default: []
    aliases: [key]
  identities:
    description: Identities in certificates that count (keyless signatures). Any of them will do.
    type: list
    elements: dict
    default: []
    suboptions:
      subject:
        description: Mail address or URI in the certificate, for a CI job for example its workflow.
        type: str
      subject_regexp:
        description: The same as a regular expression of Go. It matches anywhere; begin it with C(^) and end it with C($).
        type: str
      issuer:
        description: Who vouched for the subject, an OIDC issuer like V(https://token.actions.githubusercontent.com).
        type: str
      issuer_regexp:
        description: The same as a regular expression of Go.
        type: str
  trusted_root:
    description:
      - Sigstore trusted root (JSON) on the host that runs the module, with the CAs and logs to trust; C(cosign trusted-root create)
        writes one. With it nothing is fetched.
      - Without it C(cosign) fetches Sigstore's public root, unless only O(keys) count and O(insecure_ignore_tlog) is set.
    type: path
  min_signers:
    description:
      - How many different keys or identities must have signed each image. Several signatures by one of them count once.
      - V(0) asks for O(attestations) alone.
    type: int
    default: 1
  annotations:
    description: Annotations (C(cosign sign -a key=value)) that a signature must carry to count.
    type: dict
    default: {}
  attestations:
    description:
      - Predicate types of which each image needs an attestation by one of O(keys) or O(identities).
      - URIs, or the short names of cosign, V(custom), V(cyclonedx), V(link), V(openvex), V(slsaprovenance), V(slsaprovenance02),
        V(slsaprovenance1), V(spdx), V(spdxjson) and V(vuln).
    type: list
    elements: str
    default: []
  insecure_ignore_tlog:
    description:
      - Do without a proof that the signature was written to a transparency log. Right for keys of your own and C(cosign sign
        --tlog-upload=false).
      - With O(identities) it means that a stolen certificate is not noticed, and that a certificate must still be valid today, unless a
        timestamp (RFC 3161) in its bundle, by an authority that O(trusted_root) names, says that it was when it signed.
    type: bool
    default: false
  insecure_ignore_sct:
    description: Do without a proof that a certificate was written to a certificate log. Only for a CA of your own that has no such log.
    type: bool
    default: false
  unverified:
    description: What to do about an image that fails the policy.
    type: str
    choices:
      fail: The task fails, with C(failure_class) V(policy) and all reasons for all images in one message.
      report: It is returned with RV(images[].verified=false).
    default: fail
  cosign_program:
    description: Name on E(PATH) or path of C(cosign).
    type: str
    default: cosign
seealso:
  - module: selfhost.delivery.image_info
  - module: selfhost.delivery.image_promote
"""

EXAMPLES = r"""
- name: Only what our CI signed with our key, and with an SBOM
  selfhost.delivery.image_verify:
    images:
      - registry.example.com/shop/app:sha-abc
      - registry.example.com/shop/migrator:sha-abc
    key: /etc/delivery/cosign.pub
    annotations:
      repository: shop
    attestations: [spdxjson]
    insecure_ignore_tlog: true # signed with --tlog-upload=false
  register: shop_verified

- name: Only what a workflow on GitHub signed, without reaching Sigstore
  selfhost.delivery.image_verify:
    images: [ghcr.io/example/shop:sha-abc]
    identities:
      - subject_regexp: ^https://github\.com/example/shop/\.github/workflows/build\.yml@refs/heads/main$
        issuer: https://token.actions.githubusercontent.com
    trusted_root: /etc/delivery/trusted_root.json

- name: Two of three people
  selfhost.delivery.image_verify:
    images: [registry.example.com/shop/app:sha-abc]
    keys: "{{ ['anna', 'ben', 'carla'] | map('regex_replace', '^(.*)$', '/etc/delivery/\\1.pub') | list }}"
    min_signers: 2
    insecure_ignore_tlog: true
    unverified: report
  register: shop_release
"""

RETURN = r"""
cosign:
  description: Version of the program that checked.
  returned: success
  type: str
  sample: v2.6.5
unchecked:
  description: What was not checked because an option said so, in words; empty where everything was.
  returned: success
  type: list
  elements: str
  sample: [the transparency log (insecure_ignore_tlog)]
images:
  description: One verdict for each of O(images), in their order.
  returned: success or an image failed the policy
  type: list
  elements: dict
  contains:
    image:
      description: The reference as given.
      type: str
      returned: always
      sample: registry.example.com/shop/app:sha-abc
    digest:
      description: What the verdict is about.
      type: str
      returned: always
      sample: sha256:0d6e9c1ab1fe1b1d3f2b3d0a1c2f3e4d5c6b7a8990a1b2c3d4e5f60718293a4b
    verified:
      description: Whether the policy holds.
      type: bool
      returned: always
      sample: true
    reasons:
      description: Why it does not hold; empty where it does.
      type: list
      elements: str
      returned: always
      sample: []
    signatures:
      description: The signatures that count, of those that were found.
      type: list
      elements: dict
      returned: always
      contains:
        signer:
          description: Who signed, in words.
          type: str
          returned: always
          sample: key sha256:4c1d0a6d0a8ad6b9f0f4d9a7b9be1f1b9a8e4f3ad9fe1a3c1b1f1c5a0b7e2d11
        key:
          description: SHA-256 of the public key in DER form; V(none) for an identity.
          type: str
          returned: always
          sample: sha256:4c1d0a6d0a8ad6b9f0f4d9a7b9be1f1b9a8e4f3ad9fe1a3c1b1f1c5a0b7e2d11
        identity:
          description: Subject of the certificate; V(none) for a key.
          type: str
          returned: always
          sample: https://github.com/example/shop/.github/workflows/build.yml@refs/heads/main
        issuer:
          description: Who vouched for the subject; V(none) for a key.
          type: str
          returned: always
          sample: https://token.actions.githubusercontent.com
        annotations:
          description: What the signature says beside the digest.
          type: dict
          returned: always
          sample: {repository: shop}
        format:
          description: V(tag) for signatures of cosign 2, V(bundle) for Sigstore bundles.
          type: str
          returned: always
          sample: tag
    attestations:
      description: The attestations of O(attestations) that count, with the keys of RV(images[].signatures) except C(annotations).
      type: list
      elements: dict
      returned: always
      contains:
        predicate_type:
          description: What is attested.
          type: str
          returned: always
          sample: https://spdx.dev/Document
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import REGISTRY_ARGUMENTS
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.verification import refusal, verify_as_told


def main() -> None:
    names = {"subject": {"type": "str"}, "subject_regexp": {"type": "str"}, "issuer": {"type": "str"}, "issuer_regexp": {"type": "str"}}
    module = AnsibleModule(
        argument_spec={
            "images": {"type": "list", "elements": "str", "required": True},
            # Public keys: no_log would blank them, and what looks like them, in the result.
            "keys": {"type": "list", "elements": "str", "default": [], "aliases": ["key"], "no_log": False},
            "identities": {"type": "list", "elements": "dict", "default": [], "options": names},
            "trusted_root": {"type": "path"},
            "min_signers": {"type": "int", "default": 1},
            "annotations": {"type": "dict", "default": {}},
            "attestations": {"type": "list", "elements": "str", "default": []},
            "insecure_ignore_tlog": {"type": "bool", "default": False},
            "insecure_ignore_sct": {"type": "bool", "default": False},
            "unverified": {"type": "str", "choices": ["fail", "report"], "default": "fail"},
            "cosign_program": {"type": "str", "default": "cosign"},
            **REGISTRY_ARGUMENTS,
        },
        required_together=[("username", "password")],
        mutually_exclusive=[("username", "token")],
        supports_check_mode=True,
    )
    try:
        result = verify_as_told(module.params)
        if module.params["unverified"] == "fail" and not all(verdict["verified"] for verdict in result["images"]):
            raise refusal(result["images"])
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
