# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Release records that are signed with the real cosign, and what of them is believed."""

from __future__ import annotations

import json
import typing as t

import pytest
from registry_fixture import Registry, registries, start_registry  # noqa: F401 # pylint: disable=unused-import
from test_image_verify import Signing, image, registry, signing  # noqa: F401 # pylint: disable=unused-import
from test_images import (  # noqa: F401 # pylint: disable=unused-import
    RECORD,
    Result,
    assert_refused,
    call,
    client_of,
    no_login,
    push_image,
)

from ansible_collections.selfhost.delivery.plugins.module_utils.oci.cosign import statement_of
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import PREDICATE, RECORD_TYPE, attach_record
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import attach, list_referrers, put_referrers

Call = t.Callable[..., Result]


class Recording:
    """One image, and the modules that write and read its records."""

    def __init__(self, registry: Registry, image: tuple[str, Manifest], call: Call) -> None:
        self.registry, self.call, self.manifest = registry, call, image[1]
        self.repository = image[0].partition(":")[0]
        self.reference = f"{registry.address}/{self.repository}@{image[1].digest}"

    def attach(self, check: bool = False, **options: t.Any) -> Result:
        record = {**RECORD, "created": "2026-11-21T09:00:00Z", **options.pop("record", {})}
        return self.call("release_record", check=check, images=[self.reference], record=record, **self.registry.options, **options)

    def read(self, *keys: str) -> list[dict[str, t.Any]]:
        options = {"app": "shop", "environment": "production", "images": [self.reference], "record_keys": list(keys)}
        read = self.call("release_info", **options, **self.registry.options)
        assert not read.get("failed"), read
        return read["records"][self.reference]


@pytest.fixture
def recording(registry: Registry, image: tuple[str, Manifest], call: Call) -> Recording:
    return Recording(registry, image, call)


def test_a_signed_record_is_believed_and_an_unsigned_one_is_told(recording: Recording, signing: Signing) -> None:
    before = recording.registry.snapshot()
    key = {"key": signing.path("ours.key"), "key_password": ""}
    foretold = recording.attach(check=True, **key)
    assert foretold["changed"] and foretold["results"][0]["proof"] is None and recording.registry.snapshot() == before
    done = recording.attach(**key)
    assert done["changed"] and done["results"][0]["proof"] != done["results"][0]["artifact"]
    again = recording.attach(**key)
    assert not again["changed"] and again["results"] == [{**done["results"][0], "changed": False}]
    recording.attach(record={"release": "unsigned", "created": "2026-11-21T10:00:00Z"})
    read = recording.read(signing.path("theirs.pub"), signing.path("ours.pub"))
    assert [(record["release"], record["signer"]) for record in read] == [
        ("unsigned", None),
        (RECORD["release"], f"key {signing.fingerprint('ours')}"),
    ]
    assert [record["signer"] for record in recording.read()] == [None, None]
    assert [record["signer"] for record in recording.read(signing.path("theirs.pub"))] == [None, None]


def test_a_record_attached_before_there_was_a_key_gets_its_proof(recording: Recording, signing: Signing) -> None:
    plain = recording.attach()["results"][0]
    signed = recording.attach(key=signing.path("ours.key"))["results"][0]
    assert (plain["proof"], signed["changed"], signed["artifact"]) == (None, True, plain["artifact"])
    assert [record["signer"] for record in recording.read(signing.path("ours.pub"))] == [f"key {signing.fingerprint('ours')}"]


def test_a_record_that_claims_to_be_signed_is_not(recording: Recording, signing: Signing) -> None:
    subject = recording.manifest.descriptor()
    lie = {**RECORD, "created": "2026-11-21T09:00:00Z", "signer": f"key {signing.fingerprint('ours')}"}
    attach_record(client_of(recording.registry), recording.repository, subject, lie)
    assert [record["signer"] for record in recording.read(signing.path("ours.pub"))] == [None]


def test_a_proof_about_another_image_proves_nothing(recording: Recording, signing: Signing) -> None:
    """The bundle is real and signed by our key; somebody put it beside an image that it is not about."""
    recording.attach(key=signing.path("ours.key"))
    client = client_of(recording.registry)
    other = push_image(client, recording.repository, "sha-other", [b"another build"])
    for referrer in list_referrers(client, recording.repository, recording.manifest.digest):
        moved = client.manifest(recording.repository, referrer.digest)
        assert moved is not None
        content = {**moved.content, "subject": other.descriptor().as_json()}
        put_referrers(client, recording.repository, other.digest, [Manifest.build(content)])
    there = Recording(recording.registry, (f"{recording.repository}:sha-other", other), recording.call)
    assert [record["signer"] for record in there.read(signing.path("ours.pub"))] == [None]
    assert [record["signer"] for record in there.read()] == [None]


@pytest.mark.parametrize("garbage", [b"[1, 2]", b"no JSON", b"{}", b'{"dsseEnvelope": {"payload": "e30="}}'])
def test_garbage_beside_a_proof_changes_nothing(recording: Recording, signing: Signing, garbage: bytes) -> None:
    recording.attach(key=signing.path("ours.key"))
    kind = "application/vnd.dev.sigstore.bundle.v0.3+json"
    marks = {"dev.sigstore.bundle.predicateType": PREDICATE}
    attach(client_of(recording.registry), recording.repository, recording.manifest.descriptor(), kind, garbage, marks)
    assert [record["signer"] for record in recording.read(signing.path("ours.pub"))] == [f"key {signing.fingerprint('ours')}"]


def test_cosign_itself_confirms_the_record(recording: Recording, signing: Signing) -> None:
    """Whoever has cosign and the public key needs nothing of ours."""
    recording.attach(key=signing.path("ours.key"))
    reach = ["--registry-cacert", recording.registry.ca_path] if recording.registry.ca_path else ["--allow-http-registry"]
    asked = ["--key", "ours.pub", "--type", PREDICATE, "--insecure-ignore-tlog=true", "--offline=true", *reach]
    # Without a root cosign fetches Sigstore's, though only the key counts here.
    asked += ["--new-bundle-format=true", "--trusted-root", signing.trusted_root]
    statement = statement_of(json.loads(signing.cosign("verify-attestation", *asked, recording.reference)))
    assert statement is not None and statement["predicate"]["release"] == RECORD["release"]


def test_the_key_may_be_given_as_text_and_its_password_stays_secret(recording: Recording, signing: Signing) -> None:
    signing.cosign("generate-key-pair", "--output-key-prefix", "locked", password="a-password-nobody-knows")
    with open(signing.path("locked.key"), encoding="utf-8") as handle:
        text = handle.read()
    wrong = recording.attach(key=text, key_password="not-this-password")
    assert_refused(wrong, "config", "sign with cosign and the given key", "Check the key and its password")
    assert "not-this-password" not in json.dumps({**wrong, "invocation": None})
    assert list_referrers(client_of(recording.registry), recording.repository, recording.manifest.digest) == []
    assert recording.attach(key=text, key_password="a-password-nobody-knows")["changed"]
    assert [record["signer"] is not None for record in recording.read(signing.path("locked.pub"))] == [True]


def test_signed_records_travel_with_a_promotion(recording: Recording, signing: Signing, registries: t.Any) -> None:
    destination = registries()
    recording.attach(key=signing.path("ours.key"))
    source = recording.registry
    recording.call("image_promote", source=recording.reference, destination=f"{destination.address}/prod/app:sha-abc", **source.options)
    there = Recording(destination, ("prod/app:sha-abc", recording.manifest), recording.call)
    assert [record["signer"] for record in there.read(signing.path("ours.pub"))] == [f"key {signing.fingerprint('ours')}"]
    kinds = [entry.artifact_type for entry in list_referrers(client_of(destination), "prod/app", recording.manifest.digest)]
    assert RECORD_TYPE in kinds and len(kinds) == 2


def test_a_missing_cosign_is_said_before_anything_is_attached(recording: Recording, signing: Signing) -> None:
    refused = recording.attach(key=signing.path("ours.key"), cosign_program="no-such-cosign")
    assert_refused(refused, "config", "no-such-cosign", "not installed")
    assert list_referrers(client_of(recording.registry), recording.repository, recording.manifest.digest) == []
