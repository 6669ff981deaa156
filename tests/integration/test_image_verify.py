# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""image_verify with the real cosign, against images in real registries."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import typing as t
from pathlib import Path

import pytest
from registry_fixture import Registry, registries, start_registry  # noqa: F401 # pylint: disable=unused-import
from test_images import (  # noqa: F401 # pylint: disable=unused-import
    Result,
    Start,
    assert_refused,
    call,
    client_of,
    no_login,
    push_image,
    push_index,
)

from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import list_referrers, put_referrers

Call = t.Callable[..., Result]
SPDX = "https://spdx.dev/Document"
ISSUER = "https://issuer.example.com"
ANNA = "anna@example.com"


class Signing:
    """cosign as those use it who sign: two keys, and a CA of its own whose certificates name people."""

    def __init__(self, directory: Path) -> None:
        if shutil.which("cosign") is None:
            pytest.fail("these tests need cosign on PATH: scripts/bootstrap.sh test builds it")
        self.directory = directory
        for name in ("ours", "theirs"):
            self.cosign("generate-key-pair", "--output-key-prefix", name)
        (directory / "sbom.json").write_text('{"spdxVersion": "SPDX-2.3"}')
        self.trusted_root = self._make_ca()

    def path(self, name: str) -> str:
        return str(self.directory / name)

    def cosign(self, *arguments: str, password: str = "") -> str:
        done = subprocess.run(
            ["cosign", *arguments],
            cwd=self.directory,
            env={**os.environ, "COSIGN_PASSWORD": password, "COSIGN_YES": "true", "HOME": str(self.directory)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"cosign {arguments}\n{done.stderr}"
        return done.stdout

    def _put(self, action: str, registry: Registry, image: str, form: str, key: str, arguments: t.Sequence[str]) -> None:
        reach = ["--registry-cacert", registry.ca_path] if registry.ca_path else ["--allow-http-registry"]
        if registry.username and registry.password:
            reach += ["--registry-username", registry.username, "--registry-password", registry.password]
        kind = [f"--new-bundle-format={'true' if form == 'bundle' else 'false'}", "--tlog-upload=false", "--use-signing-config=false"]
        self.cosign(action, *kind, "--key", f"{key}.key", *reach, *arguments, f"{registry.address}/{image}")

    def sign(self, registry: Registry, image: str, form: str = "tag", key: str = "ours", *arguments: str) -> None:
        self._put("sign", registry, image, form, key, arguments)

    def attest(self, registry: Registry, image: str, form: str = "tag", key: str = "ours") -> None:
        self._put("attest", registry, image, form, key, ["--type", "spdxjson", "--predicate", "sbom.json"])

    def fingerprint(self, key: str) -> str:
        der = subprocess.run(
            ["openssl", "pkey", "-pubin", "-in", self.path(f"{key}.pub"), "-outform", "DER"], check=True, capture_output=True
        )
        return f"sha256:{hashlib.sha256(der.stdout).hexdigest()}"

    def _openssl(self, *arguments: str) -> bytes:
        return subprocess.run(["openssl", *arguments], cwd=self.directory, check=True, capture_output=True).stdout

    def _make_ca(self) -> str:
        """A root, a key ``anna`` with a certificate as Fulcio issues them, and a trusted root that names the CA."""
        curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
        usage = ("-addext", "keyUsage=critical,keyCertSign", "-addext", "basicConstraints=critical,CA:TRUE")
        self._openssl(
            "req", "-x509", *curve, "-keyout", "root.key", "-out", "root.pem", "-days", "2", "-subj", "/O=test/CN=signing CA", *usage
        )
        self._openssl("req", *curve, "-keyout", "anna.pem", "-out", "anna.csr", "-subj", "/O=test")
        (self.directory / "names").write_text(
            "keyUsage=critical,digitalSignature\nextendedKeyUsage=codeSigning\n"
            f"subjectAltName=critical,email:{ANNA}\n1.3.6.1.4.1.57264.1.8=ASN1:UTF8String:{ISSUER}\n"
            f"1.3.6.1.4.1.57264.1.1=DER:{ISSUER.encode().hex()}\n"
        )
        ca = ("-CA", "root.pem", "-CAkey", "root.key", "-CAcreateserial", "-days", "1", "-extfile", "names")
        self._openssl("x509", "-req", "-in", "anna.csr", *ca, "-out", "anna.crt")
        self.cosign("import-key-pair", "--key", "anna.pem", "--output-key-prefix", "anna")
        der = self._openssl("x509", "-in", "root.pem", "-outform", "DER")
        root = {
            "mediaType": "application/vnd.dev.sigstore.trustedroot+json;version=0.1",
            "certificateAuthorities": [
                {
                    "subject": {"organization": "test", "commonName": "signing CA"},
                    "uri": "https://ca.example.com",
                    "certChain": {"certificates": [{"rawBytes": base64.b64encode(der).decode()}]},
                    "validFor": {"start": "2020-01-01T00:00:00Z"},
                }
            ],
        }
        (self.directory / "trusted_root.json").write_text(json.dumps(root))
        return self.path("trusted_root.json")

    #: What makes a signature one of Anna's.
    certificate = ("--certificate", "anna.crt", "--certificate-chain", "root.pem")


@pytest.fixture(scope="module")
def signing(tmp_path_factory: pytest.TempPathFactory) -> Signing:
    return Signing(tmp_path_factory.mktemp("signing"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Registry]:
    """One for all tests that need nothing special; each pushes into a repository of its own."""
    running = start_registry(tmp_path_factory.mktemp("verify") / "registry")
    yield running
    running.stop()


@pytest.fixture
def image(registry: Registry, request: pytest.FixtureRequest) -> tuple[str, Manifest]:
    """``repository:tag`` of a new image, and the image."""
    repository = "shop/" + hashlib.sha256(request.node.name.encode()).hexdigest()[:12]
    return f"{repository}:sha-abc", push_image(client_of(registry), repository, "sha-abc", [request.node.name.encode()])


def wish(registry: Registry, *images: str, **options: t.Any) -> dict[str, t.Any]:
    return {"images": [f"{registry.address}/{name}" for name in images], "insecure_ignore_tlog": True, **registry.options, **options}


# -- signatures by key ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tag", "bundle"])
def test_a_signature_by_our_key_counts(registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], form: str) -> None:
    name, manifest = image
    signing.sign(registry, name, form)
    before = registry.snapshot()
    for check in (True, False):
        done = call("image_verify", check=check, **wish(registry, name, key=signing.path("ours.pub")))
        # `skipped` would make Ansible show the task as one.
        assert done.get("failed") is None and done["changed"] is False and "skipped" not in done, done
        assert done["cosign"].startswith("v") and done["unchecked"] == ["the transparency log (insecure_ignore_tlog)"]
        (verdict,) = done["images"]
        assert verdict["verified"] and verdict["digest"] == manifest.digest and verdict["reasons"] == [] and verdict["attestations"] == []
        (signature,) = verdict["signatures"]
        assert signature["key"] == signing.fingerprint("ours") and signature["identity"] is None and signature["format"] == form
    assert registry.snapshot() == before


def test_the_digest_is_what_is_verified_not_the_tag(registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest]) -> None:
    name, signed = image
    repository = name.partition(":")[0]
    signing.sign(registry, name)
    moved = push_image(client_of(registry), repository, "sha-abc", [b"another build"])
    key = (signing.directory / "ours.pub").read_text()
    done = call(
        "image_verify", **wish(registry, name, f"{repository}@{signed.digest}", f"{name}@{signed.digest}", key=key, unverified="report")
    )
    assert [(entry["verified"], entry["digest"]) for entry in done["images"]] == [
        (False, moved.digest),
        (True, signed.digest),
        (True, signed.digest),
    ]


def test_annotations_must_be_in_the_signature(registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest]) -> None:
    signing.sign(registry, image[0], "tag", "ours", "-a", "stage=ci", "-a", "run=7")
    asked = wish(registry, image[0], key=signing.path("ours.pub"))
    done = call("image_verify", annotations={"stage": "ci", "run": 7}, **asked)
    assert done["images"][0]["signatures"][0]["annotations"] == {"stage": "ci", "run": "7"}
    assert_refused(call("image_verify", annotations={"stage": "release"}, **asked), "policy", "lacks the annotation stage=release")


def test_signers_are_counted_not_signatures(registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest]) -> None:
    asked = wish(registry, image[0], keys=[signing.path("ours.pub"), signing.path("theirs.pub")])
    signing.sign(registry, image[0], "tag", "ours", "-a", "run=1")
    signing.sign(registry, image[0], "bundle", "ours")
    assert len(call("image_verify", **asked)["images"][0]["signatures"]) == 2
    assert_refused(
        call("image_verify", min_signers=2, **asked), "policy", "2 signatures found, and 1 of the 2 signers", signing.fingerprint("ours")
    )
    signing.sign(registry, image[0], "bundle", "theirs")
    assert call("image_verify", min_signers=2, **asked)["images"][0]["verified"]


def test_the_signature_of_an_index_is_for_the_index(registry: Registry, signing: Signing, call: Call) -> None:
    index, children = push_index(client_of(registry), "shop/multi", "sha-abc")
    signing.sign(registry, "shop/multi:sha-abc")
    signing.attest(registry, "shop/multi:sha-abc")
    child = f"shop/multi@{children['arm64'].digest}"
    asked = wish(registry, "shop/multi:sha-abc", child, key=signing.path("ours.pub"), attestations=["spdx"], unverified="report")
    done = call("image_verify", **asked)
    assert [(entry["verified"], entry["digest"]) for entry in done["images"]] == [(True, index.digest), (False, children["arm64"].digest)]


# -- what does not count -------------------------------------------------------------------------------------------


def test_all_reasons_for_all_images_are_in_one_message(registry: Registry, signing: Signing, call: Call) -> None:
    for name in ("good", "unsigned", "foreign"):
        push_image(client_of(registry), f"many/{name}", "sha-abc", [name.encode()])
    signing.sign(registry, "many/good:sha-abc")
    signing.sign(registry, "many/foreign:sha-abc", "bundle", "theirs")
    asked = wish(registry, *(f"many/{name}:sha-abc" for name in ("good", "unsigned", "foreign")), key=signing.path("ours.pub"))
    refused = call("image_verify", attestations=["spdxjson"], **asked)
    assert_refused(
        refused, "policy", "verify 3 images", "many/unsigned:sha-abc", "it is not signed", "many/foreign:sha-abc", "1 signature found"
    )
    assert refused["msg"].count(f"no attestation {SPDX} counts: there is none") == 3
    assert signing.fingerprint("ours") in refused["msg"]
    told = call("image_verify", unverified="report", **asked)
    assert [entry["verified"] for entry in told["images"]] == [True, False, False] and not told.get("failed")


@pytest.mark.parametrize("form", ["tag", "bundle"])
def test_the_wrong_key(registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], form: str) -> None:
    signing.sign(registry, image[0], form, "theirs")
    refused = call("image_verify", **wish(registry, image[0], key=signing.path("ours.pub")))
    assert_refused(refused, "policy", image[1].digest[:19], "1 signature found", f"not by key {signing.fingerprint('ours')} (another key")
    refused = call(
        "image_verify", **wish(registry, image[0], identities=[{"subject": ANNA, "issuer": ISSUER}], trusted_root=signing.trusted_root)
    )
    assert_refused(refused, "policy", "1 signature found", f"not by identity {ANNA} by {ISSUER}")


@pytest.mark.parametrize("form", ["tag", "bundle"])
def test_a_signature_moved_to_another_image(
    registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], form: str
) -> None:
    name, signed = image
    client, repository = client_of(registry), name.partition(":")[0]
    other = push_image(client, repository, "sha-bad", [b"not what was signed"])
    signing.sign(registry, name, form)
    signing.attest(registry, name, form)
    for suffix in (".sig", ".att") if form == "tag" else ():
        moved = client.manifest(repository, digest_tag(signed.digest, suffix))
        assert moved is not None
        client.put_manifest(repository, moved, digest_tag(other.digest, suffix))
    for referrer in list_referrers(client, repository, signed.digest):
        moved = client.manifest(repository, referrer.digest)
        assert moved is not None
        put_referrers(client, repository, other.digest, [Manifest.build({**moved.content, "subject": other.descriptor().as_json()})])
    asked = wish(registry, f"{repository}:sha-bad", key=signing.path("ours.pub"), attestations=[SPDX])
    refused = call("image_verify", **asked)
    assert_refused(refused, "policy", f"beside it is for {signed.digest}, not for this image", f"one is about {signed.digest}")
    assert refused["images"][0]["signatures"] == [] and refused["images"][0]["attestations"] == []


def test_a_changed_payload(registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest]) -> None:
    name, signed = image
    client, repository = client_of(registry), name.partition(":")[0]
    other = push_image(client, repository, "sha-bad", [b"not what was signed"])
    signing.sign(registry, name)
    manifest = client.manifest(repository, digest_tag(signed.digest, ".sig"))
    assert manifest is not None
    layer = manifest.content["layers"][0]
    payload = client.read_blob(repository, manifest.blobs[1]).replace(signed.digest.encode(), other.digest.encode())
    forged = {**layer, **client.push_blob(repository, payload, layer["mediaType"]).as_json()}
    client.put_manifest(repository, Manifest.build({**manifest.content, "layers": [forged]}), digest_tag(other.digest, ".sig"))
    refused = call("image_verify", **wish(registry, f"{repository}:sha-bad", key=signing.path("ours.pub")))
    assert_refused(refused, "policy", f"not by key {signing.fingerprint('ours')}", "invalid signature")


@pytest.mark.parametrize("form", ["tag", "bundle"])
def test_a_proof_of_the_log_is_asked_for_unless_told_otherwise(
    registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], form: str
) -> None:
    signing.sign(registry, image[0], form)
    asked = wish(registry, image[0], key=signing.path("ours.pub"), trusted_root=signing.trusted_root)
    assert call("image_verify", **asked)["images"][0]["verified"]
    asked["insecure_ignore_tlog"] = False
    assert_refused(
        call("image_verify", **asked), "policy", "1 signature found", "no proof of a trusted transparency log", "insecure_ignore_tlog"
    )


# -- attestations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tag", "bundle"])
def test_attestations_by_our_key_count_and_are_no_signatures(
    registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], form: str
) -> None:
    name, _manifest = image
    asked = wish(registry, name, key=signing.path("ours.pub"))
    signing.attest(registry, name, form, "theirs")
    refused = call("image_verify", min_signers=0, attestations=["spdxjson"], **asked)
    assert_refused(refused, "policy", f"no attestation {SPDX} counts", f"not by key {signing.fingerprint('ours')}")
    signing.attest(registry, name, form)
    done = call("image_verify", min_signers=0, attestations=["spdxjson", SPDX], **asked)
    (attestation,) = done["images"][0]["attestations"][:1]
    assert attestation["predicate_type"] == SPDX and attestation["key"] == signing.fingerprint("ours") and attestation["format"] == form
    for attestations in ([], ["spdxjson"]):
        assert_refused(call("image_verify", attestations=attestations, **asked), "policy", "it is not signed")
    refused = call("image_verify", min_signers=0, attestations=["vuln"], **asked)
    assert_refused(refused, "policy", "attestation/vuln/v1 counts", f"there are only others: {SPDX}")


# -- identities ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["tag", "bundle"])
def test_identities_in_certificates(registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], form: str) -> None:
    signing.sign(registry, image[0], form, "anna", *signing.certificate)
    asked = wish(registry, image[0], trusted_root=signing.trusted_root, insecure_ignore_sct=True)
    for who in ({"subject": ANNA, "issuer": ISSUER}, {"subject_regexp": "^anna@", "issuer_regexp": "^https://issuer"}):
        done = call("image_verify", identities=[who], **asked)
        assert done.get("failed") is None, done
        assert done["unchecked"] == ["the transparency log (insecure_ignore_tlog)", "the log of certificates (insecure_ignore_sct)"]
        (signature,) = done["images"][0]["signatures"]
        assert (signature["identity"], signature["issuer"], signature["key"]) == (ANNA, ISSUER, None)
        assert "Subject" not in signature["annotations"]
    refused = call("image_verify", identities=[{"subject": "ben@example.com", "issuer": ISSUER}], **asked)
    assert_refused(refused, "policy", f"not by identity ben@example.com by {ISSUER} (its certificate is for somebody else", ANNA)
    refused = call("image_verify", identities=[{"subject": ANNA, "issuer": "https://other.example.com"}], **asked)
    assert_refused(refused, "policy", f"not by identity {ANNA} by https://other.example.com", ISSUER)
    refused = call("image_verify", identities=[{"subject": ANNA, "issuer": ISSUER}], **{**asked, "insecure_ignore_sct": False})
    assert_refused(refused, "policy", "not by identity", "insecure_ignore_sct is not set")


def test_a_certificate_of_another_ca(registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], tmp_path: Path) -> None:
    signing.sign(registry, image[0], "tag", "anna", *signing.certificate)
    signing.sign(registry, image[0], "bundle", "anna", *signing.certificate)
    (tmp_path / "other").mkdir()
    other = Signing(tmp_path / "other")
    asked = wish(registry, image[0], identities=[{"subject": ANNA, "issuer": ISSUER}], insecure_ignore_sct=True)
    assert call("image_verify", trusted_root=signing.trusted_root, **asked)["images"][0]["verified"]
    assert_refused(call("image_verify", trusted_root=other.trusted_root, **asked), "policy", "2 signatures found", "certificate")


# -- registries ----------------------------------------------------------------------------------------------------


def test_a_registry_with_its_own_ca_and_users(
    registries: Start, signing: Signing, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = registries(htpasswd=True, tls=True)
    push_image(client_of(registry), "shop/app", "sha-abc", [b"layer"])
    signing.sign(registry, "shop/app:sha-abc")
    signing.sign(registry, "shop/app:sha-abc", "bundle")
    # cosign gets neither the password nor the registry: this stands in front of it and writes down what it is called with.
    log = tmp_path / "calls"
    spy = tmp_path / "cosign-spy"
    spy.write_text(f'#!/bin/sh\n{{ printf "%s\\n" "$@"; env; }} >>{log}\nexec {shutil.which("cosign")} "$@"\n')
    spy.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "work"))
    (tmp_path / "work").mkdir()
    monkeypatch.setattr("tempfile.tempdir", None)
    monkeypatch.setenv("SIGSTORE_ROOT_FILE", "/nonexistent")
    asked = wish(registry, "shop/app:sha-abc", key=signing.path("ours.pub"), cosign_program=str(spy))
    done = call("image_verify", **asked)
    assert len(done["images"][0]["signatures"]) == 2
    called = log.read_text()
    assert "--insecure-ignore-tlog" in called and "\nSIGSTORE_ROOT_FILE=\n" in called
    assert str(registry.password) not in called and registry.address not in called.replace("NO_PROXY", "")
    assert list((tmp_path / "work").iterdir()) == [], "files were left behind"
    assert_refused(call("image_verify", **{**asked, "password": "wrong"}), "config", "refused the user 'ci'")
    assert_refused(call("image_verify", **{**asked, "ca_path": None}), "config", "certificate")
    assert_refused(call("image_verify", **{**asked, "images": [f"{registry.address}/shop/app:sha-none"]}), "config", "has no tag sha-none")
    registry.stop()
    assert_refused(call("image_verify", unverified="report", **asked), "transport", registry.address)


# -- keys, roots and programs that are none ------------------------------------------------------------------------


def test_keys_and_roots_that_cannot_be_read(
    registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text("hello")
    (tmp_path / "broken.pub").write_text("-----BEGIN PUBLIC KEY-----\nAAAA\n-----END PUBLIC KEY-----\n")
    signing.sign(registry, image[0])
    for key, words in {
        str(tmp_path / "none.pub"): "there is no such file",
        str(tmp_path): "Is a directory",
        str(tmp_path / "text"): "it is not a public key in PEM",
        str(tmp_path / "broken.pub"): "Correct keys",
        signing.path("ours.key"): "it is a private key",
    }.items():
        assert_refused(call("image_verify", **wish(registry, image[0], key=key)), "config", words)
    for root, words in {str(tmp_path / "none"): "No such file", str(tmp_path / "text"): "it is not JSON"}.items():
        assert_refused(call("image_verify", **wish(registry, image[0], key=signing.path("ours.pub"), trusted_root=root)), "config", words)


def test_programs_that_are_missing_too_old_or_another(
    registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], tmp_path: Path
) -> None:
    old = tmp_path / "cosign-old"
    old.write_text('#!/bin/sh\necho \'{"gitVersion": "v2.2.4"}\'\n')
    old.chmod(0o755)
    asked = wish(registry, image[0], key=signing.path("ours.pub"))
    for program, words in {
        str(tmp_path / "cosign-none"): "Install cosign 2.6.0 or newer",
        str(old): "it is cosign v2.2.4",
        "/bin/true": "it does not answer like cosign",
        str(tmp_path): "it may not be executed",
    }.items():
        assert_refused(call("image_verify", cosign_program=program, **asked), "config", words)


def test_a_program_that_confirms_another_digest_is_not_believed(
    registry: Registry, signing: Signing, call: Call, image: tuple[str, Manifest], tmp_path: Path
) -> None:
    signing.sign(registry, image[0])
    liar = tmp_path / "cosign-liar"
    said = json.dumps([{"critical": {"image": {"docker-manifest-digest": "sha256:" + "0" * 64}}, "optional": {}}])
    liar.write_text(f'#!/bin/sh\n[ "$1" = version ] && echo \'{{"gitVersion": "v2.6.5"}}\' || echo \'{said}\'\n')
    liar.chmod(0o755)
    refused = call("image_verify", **wish(registry, image[0], key=signing.path("ours.pub"), cosign_program=str(liar)))
    assert_refused(refused, "policy", f"is for sha256:{'0' * 64}, not for this image")
