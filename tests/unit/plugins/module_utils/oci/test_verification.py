# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Policies for signatures, and what is read in keys, certificates and statements."""

from __future__ import annotations

import base64
import hashlib
import json
import typing as t

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.cosign import (
    Identity,
    Signer,
    certificate_names,
    key_fingerprint,
    statement_of,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.verification import Policy, refusal

KEY = Signer("key sha256:aa", ("--key", "/k"), "sha256:aa")
PERSON = Signer("identity anna", ("--certificate-identity=anna",))


def pem(kind: str, data: bytes) -> str:
    return f"-----BEGIN {kind}-----\n{base64.b64encode(data).decode()}\n-----END {kind}-----\n"


@pytest.mark.parametrize("kind", ["PUBLIC KEY", "RSA PUBLIC KEY"])
def test_the_fingerprint_is_over_the_der_form(kind: str) -> None:
    assert key_fingerprint("comment\n" + pem(kind, b"der"), "x") == "sha256:" + hashlib.sha256(b"der").hexdigest()


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "it is not a public key in PEM"),
        (pem("CERTIFICATE", b"x"), "it is not a public key in PEM"),
        (pem("PUBLIC KEY", b"x").replace("eA", "e!"), "it is not a public key in PEM"),
        (pem("ENCRYPTED SIGSTORE " + "PRIVATE KEY", b"x"), "it is a private key"),
    ],
)
def test_what_is_no_public_key(text: str, words: str) -> None:
    with pytest.raises(DeliveryError, match=words) as caught:
        key_fingerprint(text, "the key")
    assert caught.value.failure_class == "config"


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "subject or subject_regexp"),
        ({"subject": "a"}, "issuer or issuer_regexp"),
        ({"subject": "a", "subject_regexp": "a", "issuer": "b"}, "subject or subject_regexp"),
        ({"subject": None, "issuer": "b"}, "subject or subject_regexp"),
    ],
)
def test_an_identity_needs_one_subject_and_one_issuer(given: dict[str, t.Any], words: str) -> None:
    with pytest.raises(DeliveryError, match=words):
        Identity.from_params(given)


def test_an_identity_in_words() -> None:
    assert str(Identity.from_params({"subject": "a@b", "issuer_regexp": "^https", "issuer": ""})) == "a@b by /^https/"


@pytest.mark.parametrize(
    "values, words",
    [
        ({"signers": ()}, "neither keys nor identities"),
        ({"signers": (KEY,), "min_signers": -1}, "min_signers is -1"),
        ({"signers": (KEY,), "min_signers": 0}, "min_signers is 0"),
        ({"signers": (KEY,), "min_signers": 2}, "2 signers are asked for, of 1 keys"),
        ({"signers": (KEY,), "attestations": ("sbom",)}, "'sbom' is no predicate type"),
    ],
)
def test_policies_that_mean_nothing(values: dict[str, t.Any], words: str) -> None:
    with pytest.raises(DeliveryError, match=words):
        Policy(**values)


def test_policies_that_mean_something() -> None:
    # One pattern may stand for several people.
    assert Policy((PERSON,), min_signers=2).min_signers == 2
    assert Policy((KEY,), min_signers=0, attestations=("spdx", "https://example.com/built")).attestations[1] == "https://example.com/built"


def der(tag: int, value: bytes) -> bytes:
    length = bytes([len(value)]) if len(value) < 128 else b"\x82" + len(value).to_bytes(2, "big")
    return bytes([tag]) + length + value


def extension(oid: bytes, value: bytes, critical: bool = False) -> bytes:
    return der(0x30, der(0x06, oid) + (der(0x01, b"\xff") if critical else b"") + der(0x04, value))


SAN = b"\x55\x1d\x11"
ISSUER = b"\x2b\x06\x01\x04\x01\x83\xbf\x30\x01\x08"
OLD_ISSUER = ISSUER[:-1] + b"\x01"
LONG = b"https://github.com/example/" + b"x" * 200


@pytest.mark.parametrize(
    "extensions, names",
    [
        (extension(SAN, der(0x30, der(0x81, b"anna@example.com")), critical=True), ("anna@example.com", "")),
        (
            extension(SAN, der(0x30, der(0x86, LONG))) + extension(ISSUER, der(0x0C, b"https://issuer")),
            (LONG.decode(), "https://issuer"),
        ),
        (extension(OLD_ISSUER, b"https://old"), ("", "https://old")),
        (extension(SAN, der(0x30, der(0xA0, b"other"))), ("", "")),
        (b"\x06\x03" + SAN + b"\x04", ("", "")),
        (b"", ("", "")),
    ],
)
def test_names_in_certificates(extensions: bytes, names: tuple[str, str]) -> None:
    assert certificate_names(b"\x30\x82 whatever stands before" + extensions) == names


def test_statements_in_envelopes() -> None:
    def envelope(payload: bytes) -> dict[str, str]:
        return {"payload": base64.b64encode(payload).decode()}

    assert statement_of(envelope(b'{"predicateType": "x"}')) == {"predicateType": "x"}
    for broken in (None, {}, [], {"payload": 1}, {"payload": "*"}, envelope(b"[]"), envelope(b"no JSON")):
        assert statement_of(broken) is None


def test_the_refusal_names_the_refused_with_all_reasons() -> None:
    def verdict(name: str, *reasons: str) -> dict[str, t.Any]:
        return {"image": name, "digest": "sha256:" + "a" * 64, "verified": not reasons, "reasons": list(reasons)}

    error = refusal([verdict("good"), verdict("bad", "it is not signed", "no attestation x"), verdict("worse", "another")])
    assert error.failure_class == "policy" and len(error.details["images"]) == 3
    assert "verify 3 images: bad (sha256:aaaaaaaaaaaa…): it is not signed, and no attestation x; worse (sha256" in error.message
    assert "good" not in error.message
    json.dumps(error.as_result())
