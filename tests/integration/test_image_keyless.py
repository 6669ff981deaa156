# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""image_verify with the real cosign and signatures without keys: a certificate, the logs that saw it, and nothing ignored.

The certificates expired long ago: that the log saw a signature in time is what makes it count today.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import typing as t
from pathlib import Path

import pytest
from registry_fixture import Registry
from sigstore_proofs import BUNDLE, LONG_AGO, MINUTE, Authority, Log, Sigstore, Timestamps, b64
from test_image_verify import ANNA, ISSUER, SPDX, image, registry  # noqa: F401 # pylint: disable=unused-import
from test_images import Result, assert_refused, call, client_of, no_login  # noqa: F401 # pylint: disable=unused-import

from ansible_collections.selfhost.delivery.plugins.module_utils.oci.cosign import BUNDLE_PREDICATE, SIGN_PREDICATE
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import OCI_MANIFEST, Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import attach

Call = t.Callable[..., Result]
Bundle = t.Dict[str, t.Any]  # noqa: UP006
WHO = {"subject": ANNA, "issuer": ISSUER}
NO_LOG = "no proof of a trusted transparency log"
NO_CERTIFICATE_LOG = "its certificate has no proof of a trusted certificate log"


@pytest.fixture(scope="module")
def sigstore() -> Sigstore:
    return Sigstore()


class Verifying:
    """One image, what is put beside it, and the module asked with nothing ignored."""

    def __init__(self, registry: Registry, image: tuple[str, Manifest], call: Call, root: str) -> None:
        self.registry, self.call, self.manifest, self.root = registry, call, image[1], root
        self.repository = image[0].partition(":")[0]
        self.reference = f"{registry.address}/{image[0]}"

    def statement(self, predicate: str = SIGN_PREDICATE) -> dict[str, t.Any]:
        subject = {"digest": {"sha256": self.manifest.digest.partition(":")[2]}}
        return {"_type": "https://in-toto.io/Statement/v1", "subject": [subject], "predicateType": predicate, "predicate": {}}

    def put(self, bundle: Bundle, predicate: str = SIGN_PREDICATE) -> None:
        """As cosign 3 does."""
        marks = {"dev.sigstore.bundle.content": "dsse-envelope", BUNDLE_PREDICATE: predicate}
        attach(client_of(self.registry), self.repository, self.manifest.descriptor(), BUNDLE, json.dumps(bundle).encode(), marks)

    def put_tag(self, suffix: str, media_type: str, content: bytes, annotations: t.Mapping[str, str]) -> None:
        """As cosign 2 does."""
        client = client_of(self.registry)
        layer = {**client.push_blob(self.repository, content, media_type).as_json(), "annotations": dict(annotations)}
        config = {"architecture": "", "os": "", "rootfs": {"type": "layers", "diff_ids": [layer["digest"]]}, "config": {}}
        described = client.push_blob(self.repository, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json").as_json()
        manifest = Manifest.build({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": described, "layers": [layer]})
        client.put_manifest(self.repository, manifest, digest_tag(self.manifest.digest, suffix))

    def sign(self, form: str, made_by: Sigstore, **times: t.Any) -> None:
        if form == "tag":
            claim = {"identity": {"docker-reference": ""}, "image": {"docker-manifest-digest": self.manifest.digest}}
            payload = json.dumps({"critical": {**claim, "type": "cosign container image signature"}, "optional": None}).encode()
            annotations = made_by.signature_of_cosign_2(ANNA, ISSUER, payload, **times)
            self.put_tag(".sig", "application/vnd.dev.cosign.simplesigning.v1+json", payload, annotations)
        else:
            self.put(made_by.bundle(ANNA, ISSUER, self.statement(), **times))

    def ask(self, who: t.Mapping[str, str] | None = None, **options: t.Any) -> Result:
        asked = {"images": [self.reference], "identities": [dict(who or WHO)], "trusted_root": self.root, **self.registry.options}
        return self.call("image_verify", **{**asked, **options})

    def assert_signed_by_anna(self, form: str = "bundle", unchecked: t.Sequence[str] = (), **options: t.Any) -> None:
        done = self.ask(**options)
        assert done.get("failed") is None and done["unchecked"] == list(unchecked), done
        assert done["images"][0]["verified"] and done["images"][0]["reasons"] == []
        (signature,) = done["images"][0]["signatures"]
        assert signature["signer"] == f"identity {ANNA} by {ISSUER}" and signature["format"] == form
        assert (signature["identity"], signature["issuer"], signature["key"], signature["annotations"]) == (ANNA, ISSUER, None, {})


@pytest.fixture
def verifying(registry: Registry, image: tuple[str, Manifest], call: Call, sigstore: Sigstore, tmp_path: Path) -> Verifying:
    return Verifying(registry, image, call, sigstore.trusted_root(tmp_path / "trusted_root.json"))


# -- the log's time ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tag", "bundle"])
def test_with_all_proofs_nothing_is_left_unchecked(verifying: Verifying, sigstore: Sigstore, form: str) -> None:
    verifying.sign(form, sigstore)
    verifying.assert_signed_by_anna(form)
    assert_refused(verifying.ask({**WHO, "subject": "ben@example.com"}), "policy", "its certificate is for somebody else", ANNA)
    assert_refused(verifying.ask({**WHO, "issuer": "https://other.example.com"}), "policy", "its certificate is for somebody else", ISSUER)
    # Without the log nothing says that the certificate was valid then, and today it is not.
    told = "certificate was valid" if form == "tag" else "was not valid when it was signed (today"
    assert_refused(verifying.ask(insecure_ignore_tlog=True), "policy", f"not by identity {ANNA}", told)


def test_cosign_itself_finds_and_confirms_such_a_bundle(verifying: Verifying, sigstore: Sigstore, tmp_path: Path) -> None:
    """So what is put beside the images here is what others put there."""
    verifying.sign("bundle", sigstore)
    # Which digest it confirms is not told by every version.
    for identity, confirmed in ((ANNA, True), (f"not-{ANNA}", False)):
        asked = ["--certificate-identity", identity, "--certificate-oidc-issuer", ISSUER]
        argv = ["cosign", "verify", *asked, "--new-bundle-format=true", "--trusted-root", verifying.root, "--allow-http-registry"]
        done = subprocess.run(
            [*argv, verifying.reference], capture_output=True, text=True, check=False, env={**os.environ, "HOME": str(tmp_path)}
        )
        assert (done.returncode == 0) is confirmed, done


# -- proofs that prove nothing -------------------------------------------------------------------------------------

#: What differs from the instance that is trusted, when the log saw it, and what is said about it.
OTHERS: dict[str, tuple[t.Callable[[Sigstore], dict[str, t.Any]], dict[str, t.Any], str]] = {
    "another log": (lambda ours: {"log": Log()}, {}, NO_LOG),
    "a log with our log's name": (lambda ours: {"log": Log(known_as=ours.log.key)}, {}, NO_LOG),
    "another certificate log": (lambda ours: {"certificate_log": Log()}, {}, NO_CERTIFICATE_LOG),
    "a certificate log with ours' name": (lambda ours: {"certificate_log": Log(known_as=ours.certificate_log.key)}, {}, NO_CERTIFICATE_LOG),
    "no certificate log": (lambda ours: {"certificate_log": None}, {}, NO_CERTIFICATE_LOG),
    "another CA with our CA's name": (lambda ours: {"ca": Authority("signing CA")}, {}, "its certificate is not by a trusted CA"),
    "logged too late": (lambda ours: {}, {"logged": LONG_AGO + 30 * MINUTE}, "it was signed while its certificate was not valid"),
    "logged too early": (lambda ours: {}, {"logged": LONG_AGO - 30 * MINUTE}, "it was signed while its certificate was not valid"),
}


@pytest.mark.parametrize("form", ["tag", "bundle"])
@pytest.mark.parametrize("case", OTHERS)
def test_proofs_of_others(verifying: Verifying, sigstore: Sigstore, case: str, form: str) -> None:
    change, times, words = OTHERS[case]
    verifying.sign(form, dataclasses.replace(sigstore, **change(sigstore)), **times)
    refused = verifying.ask()
    assert_refused(refused, "policy", f"not by identity {ANNA} by {ISSUER} ({words}")
    assert refused["images"][0]["signatures"] == []


def _of_a_tree_of_its_own(entry: Bundle, other: Bundle) -> None:
    """All of the proof is another's, and so fits its checkpoint; it does not fit the entry."""
    entry["inclusionProof"] = other["inclusionProof"]


def _with_another_checkpoint(entry: Bundle, other: Bundle) -> None:
    entry["inclusionProof"]["checkpoint"] = other["inclusionProof"]["checkpoint"]


def _with_a_changed_checkpoint(entry: Bundle, other: Bundle) -> None:
    checkpoint = entry["inclusionProof"]["checkpoint"]
    checkpoint["envelope"] = checkpoint["envelope"].replace("\n2\n", "\n3\n")


#: What is done to the log's entry in a bundle, given the entry of another signature.
CHANGES: dict[str, tuple[t.Callable[[Bundle, Bundle], t.Any], str]] = {
    "nothing else fails": (lambda entry, other: None, ""),
    "the path": (lambda entry, other: entry["inclusionProof"].update(hashes=[b64(bytes(32))]), "transparency log does not hold"),
    "the root": (lambda entry, other: entry["inclusionProof"].update(rootHash=b64(bytes(32))), "transparency log does not hold"),
    "another's proof": (_of_a_tree_of_its_own, "transparency log does not hold"),
    "another's checkpoint": (_with_another_checkpoint, "transparency log does not hold"),
    "the checkpoint": (_with_a_changed_checkpoint, "transparency log does not hold"),
    # Words of ours for the log, or for a bundle that cosign 3 cannot read without it.
    "no proof": (lambda entry, other: entry.pop("inclusionProof"), "inclusion proof"),
    "no promise": (lambda entry, other: entry.pop("inclusionPromise"), "nothing that is trusted says that it was signed while"),
    "the time": (lambda entry, other: entry.update(integratedTime=str(int(entry["integratedTime"]) + 1)), NO_LOG),
    "another's entry": (lambda entry, other: entry.update(other), "its entry in the transparency log is about another signature"),
}


@pytest.mark.parametrize("case", CHANGES)
def test_an_entry_that_was_changed(verifying: Verifying, sigstore: Sigstore, case: str) -> None:
    change, words = CHANGES[case]
    bundle, other = (sigstore.bundle(ANNA, ISSUER, verifying.statement()) for _attempt in range(2))
    change(bundle["verificationMaterial"]["tlogEntries"][0], other["verificationMaterial"]["tlogEntries"][0])
    verifying.put(bundle)
    if words:
        assert_refused(verifying.ask(), "policy", f"not by identity {ANNA} by {ISSUER} (", words)
    else:
        verifying.assert_signed_by_anna()


def test_a_bundle_that_is_also_something_else(verifying: Verifying, sigstore: Sigstore) -> None:
    """Else cosign may confirm the one while the other is read: a real envelope in the older format beside a made-up one in the newer."""
    real, made_up = sigstore.bundle(ANNA, ISSUER, verifying.statement()), sigstore.bundle("eve@example.com", ISSUER, verifying.statement())
    older = b64(json.dumps(real["dsseEnvelope"]).encode())
    verifying.put({**made_up, "base64Signature": older})
    assert_refused(verifying.ask(), "policy", "the bundle holds what no bundle holds: base64Signature")
    verifying.put(real)
    verifying.assert_signed_by_anna()


# -- attestations --------------------------------------------------------------------------------------------------


def test_attestations_need_the_same_proofs(verifying: Verifying, sigstore: Sigstore) -> None:
    asked = {"min_signers": 0, "attestations": ["spdxjson"]}
    others = {"log": (Log(), NO_LOG), "certificate_log": (Log(), NO_CERTIFICATE_LOG)}
    for part, (log, words) in others.items():
        verifying.put(dataclasses.replace(sigstore, **{part: log}).bundle(ANNA, ISSUER, verifying.statement(SPDX)), SPDX)
        assert_refused(verifying.ask(**asked), "policy", f"no attestation {SPDX} counts", words)
    verifying.put(sigstore.bundle(ANNA, ISSUER, verifying.statement(SPDX), logged=LONG_AGO + 30 * MINUTE), SPDX)
    assert_refused(verifying.ask(**asked), "policy", "it was signed while its certificate was not valid")
    verifying.put(sigstore.bundle(ANNA, ISSUER, verifying.statement(SPDX)), SPDX)
    done = verifying.ask(**asked)
    assert done.get("failed") is None and done["unchecked"] == [], done
    (attestation,) = done["images"][0]["attestations"]
    assert (attestation["predicate_type"], attestation["identity"], attestation["issuer"]) == (SPDX, ANNA, ISSUER)
    assert_refused(verifying.ask({**WHO, "subject": "ben@example.com"}, **asked), "policy", "its certificate is for somebody else")
    assert_refused(verifying.ask(), "policy", "it is not signed")


def test_attestations_of_cosign_2_need_cosign_3(verifying: Verifying, sigstore: Sigstore) -> None:
    asked = {"min_signers": 0, "attestations": ["spdxjson"], "unverified": "report"}
    for log in (Log(), sigstore.log):
        theirs = dataclasses.replace(sigstore, log=log)
        envelope, annotations = theirs.attestation_of_cosign_2(theirs.bundle(ANNA, ISSUER, verifying.statement(SPDX)))
        verifying.put_tag(".att", "application/vnd.dsse.envelope.v1+json", envelope, {**annotations, "predicateType": SPDX})
        done = verifying.ask(**asked)
        (verdict,) = done["images"]
        if not done["cosign"].startswith("v3."):
            assert "cosign 2 cannot check it against a trusted root, cosign 3 can" in verdict["reasons"][0]
        elif log is not sigstore.log:
            assert NO_LOG in verdict["reasons"][0]
        else:
            assert verdict["verified"] and verdict["attestations"][0]["format"] == "tag", verdict


# -- timestamps ----------------------------------------------------------------------------------------------------

#: Version of Rekor, 0 for no log; whether the log is ignored; what is left unchecked then.
UNTIMED = [
    pytest.param(2, {}, [], id="rekor 2"),
    pytest.param(0, {"insecure_ignore_tlog": True}, ["the transparency log (insecure_ignore_tlog)"], id="no log"),
]


@pytest.fixture
def timestamps(tmp_path: Path) -> Timestamps:
    (tmp_path / "tsa").mkdir()
    return Timestamps(tmp_path / "tsa")


@pytest.mark.parametrize(("rekor", "options", "unchecked"), UNTIMED)
def test_a_timestamp_says_when_where_no_log_does(
    verifying: Verifying,
    sigstore: Sigstore,
    timestamps: Timestamps,
    tmp_path: Path,
    rekor: int,
    options: dict[str, t.Any],
    unchecked: list[str],
) -> None:
    root = sigstore.trusted_root(tmp_path / "with_timestamps.json", timestampAuthorities=[timestamps.trusted])
    # The certificate ends with the second of its signature, so that only the timestamp can say that it was in time.
    signed = sigstore.bundle(ANNA, ISSUER, verifying.statement(), timestamps=timestamps, lasting=MINUTE, rekor=rekor)
    verifying.put(signed)
    verifying.assert_signed_by_anna(unchecked=unchecked, trusted_root=root, **options)
    if rekor == 0:
        assert_refused(verifying.ask(trusted_root=root), "policy", NO_LOG)
    # The same by those who know no such authority, or another one.
    assert_refused(verifying.ask(**options), "policy", "its certificate was valid" if rekor else "was not valid when it was signed")
    (tmp_path / "other").mkdir()
    other = sigstore.trusted_root(tmp_path / "other.json", timestampAuthorities=[Timestamps(tmp_path / "other").trusted])
    assert_refused(verifying.ask(trusted_root=other, **options), "policy", "nothing that is trusted says that it was signed while")


@pytest.mark.parametrize(("rekor", "options", "unchecked"), UNTIMED)
def test_a_timestamp_after_the_end_of_the_certificate(
    verifying: Verifying,
    sigstore: Sigstore,
    timestamps: Timestamps,
    tmp_path: Path,
    rekor: int,
    options: dict[str, t.Any],
    unchecked: list[str],
) -> None:
    root = sigstore.trusted_root(tmp_path / "with_timestamps.json", timestampAuthorities=[timestamps.trusted])
    verifying.put(sigstore.bundle(ANNA, ISSUER, verifying.statement(), timestamps=timestamps, lasting=MINUTE / 4, rekor=rekor))
    assert_refused(verifying.ask(trusted_root=root, **options), "policy", "was not valid when it was signed")


def test_a_timestamp_is_no_log(verifying: Verifying, sigstore: Sigstore, timestamps: Timestamps, tmp_path: Path) -> None:
    root = sigstore.trusted_root(tmp_path / "with_timestamps.json", timestampAuthorities=[timestamps.trusted])
    for log, words in ((Log(), NO_LOG), (Log(known_as=sigstore.log.key), "transparency log does not hold")):
        theirs = dataclasses.replace(sigstore, log=log)
        verifying.put(theirs.bundle(ANNA, ISSUER, verifying.statement(), timestamps=timestamps, lasting=MINUTE, rekor=2))
        assert_refused(verifying.ask(trusted_root=root), "policy", words)


def test_a_timestamp_that_nobody_needs_does_no_harm(verifying: Verifying, sigstore: Sigstore, timestamps: Timestamps) -> None:
    """Its authority is not trusted; the log's time is."""
    verifying.put(sigstore.bundle(ANNA, ISSUER, verifying.statement(), timestamps=timestamps))
    verifying.assert_signed_by_anna()
    verifying.assert_signed_by_anna(unchecked=["the transparency log (insecure_ignore_tlog)"], insecure_ignore_tlog=True)
