# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Whether images were signed by whom they have to be, said of digests and with reasons.

This finds what lies beside an image (cosign 2's tags ``.sig`` and ``.att``, bundles and cosign artifacts among the referrers) and holds
it against the policy; whether a signature is one is for :mod:`cosign` to say. What cosign confirmed is believed only
where it names the digest that was asked for.
"""

from __future__ import annotations

import base64
import binascii
import json
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import Registries, RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.cosign import (
    BUNDLE_PREDICATE,
    BUNDLE_TYPE,
    PREDICATES,
    SIGN_PREDICATE,
    Attachment,
    Checked,
    Cosign,
    Identity,
    Signer,
    certificate_names,
    statement_of,
    subjects_of,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import OCI_EMPTY, Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions, client_options_from
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import Reference, digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import list_referrers

#: What cosign 2 attaches where it was told to use referrers, with the suffix of the tag it uses otherwise.
_COSIGN_TYPES = {"application/vnd.dev.cosign.artifact.sig.v1+json": ".sig", "application/vnd.dev.cosign.artifact.att.v1+json": ".att"}
#: Attestations carry whole SBOMs.
_LARGEST_BLOB = 64 * 1024 * 1024


@dataclass(frozen=True)
class Policy:
    """``signers``: whose signatures count. ``min_signers``: how many different of them must have signed the image, with ``annotations``
    among the signature's own. ``attestations``: predicates (URI or cosign's short name) that one of them must have attested.
    """

    signers: tuple[Signer, ...]
    min_signers: int = 1
    attestations: tuple[str, ...] = ()
    annotations: t.Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        def refuse(seen: str, remedy: str) -> DeliveryError:
            return DeliveryError("read the policy for signatures", seen, remedy, "config")

        if not self.signers:
            raise refuse("it names neither keys nor identities", "Say whose signatures count.")
        if self.min_signers < 0 or (self.min_signers == 0 and not self.attestations):
            raise refuse(f"min_signers is {self.min_signers}", "Ask for one signer at least, or for attestations.")
        if self.min_signers > len(self.signers) and all(signer.fingerprint for signer in self.signers):
            raise refuse(f"{self.min_signers} signers are asked for, of {len(self.signers)} keys", "Give more keys or lower min_signers.")
        for name in self.attestations:
            if name not in PREDICATES and ":" not in name:
                raise refuse(f"{name!r} is no predicate type", f"Give its URI, or one of {', '.join(sorted(PREDICATES))}.")


@dataclass(frozen=True)
class Evidence:
    """What lies beside an image, believed by nobody yet."""

    signatures: tuple[Attachment, ...]
    attestations: tuple[Attachment, ...]
    bundles: tuple[bytes, ...]


def verify_as_told(params: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """``cosign``, ``unchecked`` and ``images`` for the parameters of image_verify. Errors are those of ``verify_images``."""
    options = client_options_from(params)
    names = {
        "insecure_ignore_tlog": "the transparency log",
        "insecure_ignore_sct": "the log of certificates",
        "validate_certs": "the registry's certificate",
    }
    ignored = {
        "insecure_ignore_tlog": params["insecure_ignore_tlog"],
        "insecure_ignore_sct": params["insecure_ignore_sct"] and params["identities"],
    }
    ignored["validate_certs"] = not options.validate_certs
    with Cosign(
        params["cosign_program"], params["trusted_root"], params["insecure_ignore_tlog"], params["insecure_ignore_sct"], options.timeout
    ) as cosign:
        signers = [cosign.key(text) for text in params["keys"]]
        signers += [cosign.identity(Identity.from_params(entry)) for entry in params["identities"]]
        policy = Policy(
            tuple(signers),
            params["min_signers"],
            tuple(params["attestations"]),
            {key: str(value) for key, value in params["annotations"].items()},
        )
        images = verify_images(params["images"], policy, cosign, options)
    return {"cosign": cosign.version, "unchecked": [f"{names[key]} ({key})" for key, said in ignored.items() if said], "images": images}


def verify_images(references: t.Sequence[str], policy: Policy, cosign: Cosign, options: ClientOptions) -> list[dict[str, t.Any]]:
    """One verdict for each reference, in order, with the keys that image_verify documents.

    An image that fails the policy is a verdict. What could not be looked at raises ``DeliveryError``: (config) unknown image,
    credentials, a key that cosign does not take; (transport) registry not reached, damaged content.
    """
    parsed = [Reference.parse(text) for text in references]
    with Registries() as registries, ThreadPoolExecutor(options.concurrency) as workers:

        def verify(text: str, reference: Reference) -> dict[str, t.Any]:
            client = registries.client(reference.registry, options)
            image = client.resolve(reference)
            if not image.digest.startswith("sha256:"):
                raise DeliveryError(
                    f"verify {text}", f"its digest is {image.digest}", "cosign knows only SHA-256; push it by that.", "config"
                )
            return judge(text, image, find_evidence(client, reference.repository, image.digest, bool(policy.attestations)), policy, cosign)

        return list(workers.map(verify, references, parsed))


def refusal(verdicts: t.Sequence[t.Mapping[str, t.Any]]) -> DeliveryError:
    """The one error for verdicts of which some are not ``verified``; it names all of those and all their reasons."""
    refused = [verdict for verdict in verdicts if not verdict["verified"]]
    told = "; ".join(f"{verdict['image']} ({verdict['digest'][:19]}…): {', and '.join(verdict['reasons'])}" for verdict in refused)
    return DeliveryError(
        f"verify {len(verdicts)} image{'s' if len(verdicts) != 1 else ''}",
        told,
        "Sign what you trust, or correct the policy; do not deploy the rest.",
        "policy",
        images=[dict(verdict) for verdict in verdicts],
    )


def find_evidence(client: RegistryClient, repository: str, digest: str, attestations: bool = True) -> Evidence:
    """Read all signatures of an image, and where asked for also what may hold attestations."""
    found: dict[str, list[Attachment]] = {".sig": [], ".att": []}
    bundles: list[bytes] = []
    wanted = (".sig", ".att") if attestations else (".sig",)
    for suffix in wanted:
        manifest = client.manifest(repository, digest_tag(digest, suffix))
        if manifest is not None and not manifest.is_index:
            found[suffix].append(_read(client, repository, manifest))
    for referrer in list_referrers(client, repository, digest):
        # cosign 2 lists its bundles in the fallback tag under the type of their empty config, so there the manifest must be asked.
        if referrer.artifact_type not in ("", OCI_EMPTY, *_COSIGN_TYPES) and not referrer.artifact_type.startswith(BUNDLE_TYPE):
            continue
        manifest = client.manifest(repository, referrer.digest)
        if manifest is None or manifest.subject != digest:
            # A list may name what was deleted since, or what never belonged here.
            continue
        kind = str(manifest.referrer_descriptor().get("artifactType") or "")
        predicate = (manifest.content.get("annotations") or {}).get(BUNDLE_PREDICATE, SIGN_PREDICATE)
        if kind in _COSIGN_TYPES and _COSIGN_TYPES[kind] in wanted:
            found[_COSIGN_TYPES[kind]].append(_read(client, repository, manifest))
        elif kind.startswith(BUNDLE_TYPE) and (attestations or predicate == SIGN_PREDICATE):
            layers = [blob for blob in manifest.blobs if blob.media_type.startswith(BUNDLE_TYPE)]
            bundles += [client.read_blob(repository, layer, _LARGEST_BLOB) for layer in layers]
    return Evidence(tuple(found[".sig"]), tuple(found[".att"]), tuple(bundles))


def judge(text: str, image: Manifest, evidence: Evidence, policy: Policy, cosign: Cosign) -> dict[str, t.Any]:
    """The verdict on one image."""
    verdict: dict[str, t.Any] = {
        "image": text,
        "digest": image.digest,
        "verified": False,
        "signatures": [],
        "attestations": [],
        "reasons": [],
    }
    if policy.min_signers:
        verdict["signatures"], reasons = _signatures(image, evidence, policy, cosign)
        verdict["reasons"] += reasons
    for name in dict.fromkeys(policy.attestations):
        proofs, reasons = _attestations(image, evidence, name, policy, cosign)
        verdict["attestations"] += proofs
        verdict["reasons"] += reasons
    verdict["verified"] = not verdict["reasons"]
    return verdict


# -- signatures ----------------------------------------------------------------------------------------------------


def _signatures(image: Manifest, evidence: Evidence, policy: Policy, cosign: Cosign) -> tuple[list[dict[str, t.Any]], list[str]]:
    """The signatures that count, and why they are too few; no reason where they are enough."""
    bundles = [bundle for bundle in evidence.bundles if (_statement(bundle) or {}).get("predicateType") == SIGN_PREDICATE]
    found = sum(len(signed.blobs) for signed in evidence.signatures) + len(bundles)
    if not found:
        return [], ["it is not signed: its repository holds neither a .sig tag nor a signature bundle for this digest"]
    reasons: list[str] = []
    proofs: list[dict[str, t.Any]] = []

    def keep(checked: Checked, signer: Signer, proven: t.Iterable[tuple[set[str], dict[str, t.Any]]]) -> None:
        if checked.refusal:
            reasons.append(f"not by {signer.name} ({checked.refusal})")
        for digests, proof in proven:
            missing = {key: value for key, value in policy.annotations.items() if str(proof["annotations"].get(key)) != value}
            if image.digest not in digests:
                # cosign has checked this already; whatever makes it wrong must not make us wrong.
                reasons.append(f"a signature by {proof['signer']} is for {_listed(digests)}, not for this image")
            elif missing:
                reasons.append(f"the signature by {proof['signer']} lacks the annotation {_listed(f'{k}={v}' for k, v in missing.items())}")
            elif proof not in proofs:
                proofs.append(proof)

    for signed in evidence.signatures:
        claimed = {digest for payload in signed.blobs.values() for digest in [_claimed(payload)] if digest}
        if claimed and image.digest not in claimed:
            reasons.append(f"a signature beside it is for {_listed(claimed)}, not for this image")
            continue
        for signer in policy.signers:
            checked = cosign.signatures(signer, image, signed)
            keep(checked, signer, [({_image_of(item)}, _tag_proof(signer, item)) for item in checked.statements])
    for bundle in bundles:
        claimed = subjects_of(_statement(bundle) or {})
        if image.digest not in claimed:
            reasons.append(f"a signature beside it is for {_listed(claimed)}, not for this image")
            continue
        for signer in policy.signers:
            checked = cosign.bundle(signer, image.digest, bundle, SIGN_PREDICATE)
            keep(checked, signer, [(subjects_of(item), _bundle_proof(signer, bundle, item)) for item in checked.statements])
    signers = {proof["signer"] for proof in proofs}
    if len(signers) >= policy.min_signers:
        return proofs, []
    count = f"{found} signature{'s' if found != 1 else ''} found"
    if signers:
        count += f", and {len(signers)} of the {policy.min_signers} signers that are needed: {_listed(signers)}"
    return proofs, [f"{count}, {'; '.join(dict.fromkeys(reasons)) or 'none of them counts'}"]


def _tag_proof(signer: Signer, payload: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    optional = payload.get("optional")
    annotations = dict(optional) if isinstance(optional, dict) else {}
    # cosign adds what it read in the certificate and the log beside what was signed.
    names = str(annotations.get("Subject") or ""), str(annotations.get("Issuer") or "")
    added = {"Subject", "Issuer", "Bundle", "RFC3161Timestamp"} if not signer.fingerprint else {"Bundle", "RFC3161Timestamp"}
    kept = {key: value for key, value in annotations.items() if key not in added and not key.startswith("1.3.6.1.4.1.57264.")}
    return _proof(signer, names, kept, "tag")


def _bundle_proof(signer: Signer, bundle: bytes, statement: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    subjects = statement.get("subject")
    first = subjects[0] if isinstance(subjects, list) and subjects and isinstance(subjects[0], dict) else {}
    return _proof(signer, _bundle_names(bundle), dict(first.get("annotations") or {}), "bundle")


def _proof(signer: Signer, names: tuple[str, str], annotations: dict[str, t.Any], form: str) -> dict[str, t.Any]:
    subject, issuer = ("", "") if signer.fingerprint else names
    return {
        "signer": f"identity {subject} by {issuer}" if subject else signer.name,
        "key": signer.fingerprint or None,
        "identity": subject or None,
        "issuer": issuer or None,
        "annotations": annotations,
        "format": form,
    }


# -- attestations --------------------------------------------------------------------------------------------------


def _attestations(
    image: Manifest, evidence: Evidence, name: str, policy: Policy, cosign: Cosign
) -> tuple[list[dict[str, t.Any]], list[str]]:
    """The attestations of one predicate that count, and why there is none."""
    predicate = PREDICATES.get(name, name)
    reasons: list[str] = []
    proofs: list[dict[str, t.Any]] = []
    others: set[str] = set()

    def keep(checked: Checked, signer: Signer, names: tuple[str, str], form: str) -> None:
        if checked.refusal:
            reasons.append(f"not by {signer.name} ({checked.refusal})")
        for statement in checked.statements:
            if statement.get("predicateType") != predicate or image.digest not in subjects_of(statement):
                reasons.append(f"one by {signer.name} is about {_listed(subjects_of(statement))}, not about this image")
                continue
            proof = _proof(signer, names, {}, form)
            del proof["annotations"]
            proof = {"predicate_type": predicate, **proof}
            if proof not in proofs:
                proofs.append(proof)

    def fits(statement: t.Mapping[str, t.Any]) -> bool:
        kind = str(statement.get("predicateType") or "")
        if kind != predicate:
            others.update({kind} - {SIGN_PREDICATE, ""})
            return False
        if image.digest not in subjects_of(statement):
            reasons.append(f"one is about {_listed(subjects_of(statement))}, not about this image")
            return False
        return True

    for attested in evidence.attestations:
        # A list: each of them is looked at, so that the reasons name them all.
        fitting = [fits(statement) for statement in map(_envelope_statement, attested.blobs.values()) if statement]
        if any(fitting):
            for signer in policy.signers:
                keep(cosign.attestations(signer, image, attested, predicate), signer, ("", ""), "tag")
    for bundle in evidence.bundles:
        if fits(_statement(bundle) or {}):
            for signer in policy.signers:
                keep(cosign.bundle(signer, image.digest, bundle, predicate), signer, _bundle_names(bundle), "bundle")
    if proofs:
        return proofs, []
    why = "; ".join(dict.fromkeys(reasons)) or (f"there are only others: {_listed(others)}" if others else "there is none")
    return [], [f"no attestation {predicate} counts: {why}"]


# -- what is claimed -----------------------------------------------------------------------------------------------


def _read(client: RegistryClient, repository: str, manifest: Manifest) -> Attachment:
    config = manifest.config.digest if manifest.config else ""
    return Attachment(
        manifest, {blob.digest: client.read_blob(repository, blob, _LARGEST_BLOB) for blob in manifest.blobs if blob.digest != config}
    )


def _json(text: bytes) -> dict[str, t.Any]:
    try:
        value = json.loads(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _claimed(payload: bytes) -> str:
    return _image_of(_json(payload))


def _image_of(payload: t.Mapping[str, t.Any]) -> str:
    """The digest that a cosign 2 payload is about, empty where it says none."""
    critical = payload.get("critical")
    image = critical.get("image") if isinstance(critical, dict) else None
    return str(image.get("docker-manifest-digest") or "") if isinstance(image, dict) else ""


def _envelope_statement(envelope: bytes) -> dict[str, t.Any] | None:
    return statement_of(_json(envelope))


def _statement(bundle: bytes) -> dict[str, t.Any] | None:
    return statement_of(_json(bundle).get("dsseEnvelope"))


def _bundle_names(bundle: bytes) -> tuple[str, str]:
    """Subject and issuer of the certificate in a bundle; empty where it was made with a key."""
    material = _json(bundle).get("verificationMaterial")
    chain = material.get("x509CertificateChain") if isinstance(material, dict) else None
    certificates = chain.get("certificates") if isinstance(chain, dict) else None
    certificate = material.get("certificate") if isinstance(material, dict) else None
    if isinstance(certificates, list) and certificates:
        certificate = certificates[0]
    if not isinstance(certificate, dict):
        return "", ""
    try:
        return certificate_names(base64.b64decode(str(certificate.get("rawBytes") or "")))
    except (ValueError, binascii.Error, IndexError):
        return "", ""


def _listed(items: t.Iterable[str]) -> str:
    return ", ".join(sorted(items)) or "nothing"
