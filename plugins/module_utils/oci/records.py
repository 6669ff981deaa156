# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Release records: what an environment did with an image, kept beside the image in its registry, and proven where keys are given.

A proof is an in-toto statement about the image whose predicate is the record, in a Sigstore bundle: what ``cosign attest`` attaches too.
"""

from __future__ import annotations

import datetime
import json
import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import Registries, RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.cosign import (
    BUNDLE_PREDICATE,
    BUNDLE_TYPE,
    Cosign,
    Signer,
    SigningKey,
    subjects_of,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Descriptor, Manifest, canonical_json
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import Reference
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import attach, list_referrers

RECORD_TYPE = "application/vnd.selfhost.delivery.release.v1+json"
_PREFIX = "delivery.selfhost."
_CREATED = "org.opencontainers.image.created"
#: Predicate of a proof.
PREDICATE = "https://selfhost.delivery/release/v1"
_BUNDLE = f"{BUNDLE_TYPE}.v0.3+json"
#: What makes two records the same one.
IDENTITY = ("environment", "release", "result")


#: ``(digest, bundle)`` to the record (a dict) that somebody who counts has signed, or ``None``.
Prove = t.Callable[[str, bytes], t.Any]
#: ``(name, digest, record)`` to a bundle.
Sign = t.Callable[[str, str, t.Mapping[str, t.Any]], bytes]


def check_record(record: t.Mapping[str, t.Any]) -> dict[str, t.Any]:
    """A copy with ``created`` (unless given: ``ended``, else now in UTC).

    Raises ``DeliveryError`` (config) when a part of the identity is missing.
    """
    missing = [key for key in IDENTITY if not isinstance(record.get(key), str) or not record[key]]
    if missing:
        raise DeliveryError(
            "read the release record",
            f"it has no {' and no '.join(missing)}",
            "A record needs the texts environment, release and result.",
            "config",
        )
    now = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")
    return {**record, "created": str(record.get("created") or record.get("ended") or now)}


def said_in(manifest: Manifest) -> dict[str, str] | None:
    """The identity of the record that ``manifest`` is, from its annotations; ``None`` when it is no record."""
    if manifest.content.get("artifactType") != RECORD_TYPE:
        return None
    told = manifest.content.get("annotations") or {}
    return {key: str(told.get(_PREFIX + key) or "unknown") for key in IDENTITY}


def attach_record(client: RegistryClient, repository: str, subject: Descriptor, record: t.Mapping[str, t.Any]) -> str:
    """Attach a checked record to the image ``subject``; returns the artifact's digest."""
    return attach(client, repository, subject, RECORD_TYPE, canonical_json(record), _annotations(record))


def read_records(client: RegistryClient, repository: str, digest: str, prove: Prove | None = None) -> list[dict[str, t.Any]]:
    """All records of an image, newest ``created`` first, as they were attached, and each with its ``signer``.

    Where ``prove`` accepts a proof, the record is the one that was proven and ``signer`` who signed it; else that is ``None``, whatever
    the record itself says.
    """
    records = []
    proven: dict[tuple[str, ...], dict[str, t.Any]] = {}
    for referrer in list_referrers(client, repository, digest):
        is_proof = referrer.artifact_type == _BUNDLE and referrer.annotations.get(BUNDLE_PREDICATE, PREDICATE) == PREDICATE
        if referrer.artifact_type != RECORD_TYPE and not (prove and is_proof):
            continue
        manifest = client.manifest(repository, referrer.digest)
        if manifest is None or manifest.subject != digest:
            # A list may name what was deleted since, or what never belonged here.
            continue
        blobs = [blob for blob in manifest.blobs if blob.media_type == referrer.artifact_type]
        content = client.read_blob(repository, blobs[0]) if blobs else b""
        if is_proof:
            record = prove(digest, content) if prove else None
            if record is not None:
                proven[_identity(record)] = record
            continue
        try:
            record = json.loads(content)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            raise DeliveryError(
                f"read the release record {client.registry}/{repository}@{referrer.digest}",
                "it is not a JSON object",
                "Delete this artifact in the registry.",
                "transport",
            )
        records.append({**record, "signer": None})
    unproven = [record for record in records if _identity(record) not in proven]
    return sorted([*unproven, *proven.values()], key=lambda record: str(record.get("created") or ""), reverse=True)


def read_records_for(references: list[str], client_options: ClientOptions, prove: Prove | None = None) -> dict[str, list[dict[str, t.Any]]]:
    """``read_records`` for several images side by side, by the reference as given.

    A reference by tag is resolved first; an unknown tag raises ``DeliveryError`` (config). By digest, an image without
    records, or one that the registry does not have, is an empty list.
    """
    with Registries() as registries, ThreadPoolExecutor(client_options.concurrency) as workers:

        def read(text: str) -> list[dict[str, t.Any]]:
            reference = Reference.parse(text)
            client = registries.client(reference.registry, client_options)
            digest = reference.digest or client.resolve(reference).digest
            return read_records(client, reference.repository, digest, prove)

        names = list(dict.fromkeys(references))
        return dict(zip(names, workers.map(read, names)))


def prover(cosign: Cosign, signers: t.Sequence[Signer]) -> Prove:
    """What ``read_records`` asks of a bundle: the record that one of ``signers`` has signed about this digest, or ``None``."""

    def prove(digest: str, bundle: bytes) -> dict[str, t.Any] | None:
        for signer in signers:
            for statement in cosign.bundle(signer, digest, bundle, PREDICATE).statements:
                record = statement.get("predicate")
                # cosign has checked type and subject already; whatever makes it wrong must not make us wrong.
                if statement.get("predicateType") == PREDICATE and digest in subjects_of(statement) and isinstance(record, dict):
                    return {**record, "signer": signer.name}
        return None

    return prove


def attach_record_to(
    images: t.Sequence[str],
    record: t.Mapping[str, t.Any],
    options: ClientOptions,
    check: bool = False,
    sign: Sign | None = None,
) -> list[dict[str, t.Any]]:
    """Attach ``record`` to each image that does not have it; one ``{image, artifact, proof, changed}`` for each, in order.

    With ``sign`` also its proof, before the record. Everything is signed before anything is attached. All images must be given by digest
    and exist, else nothing is written and a ``DeliveryError`` (config) raised.
    """
    content = check_record(record)
    references = [Reference.parse(text) for text in images]
    for text, reference in zip(images, references):
        if not reference.digest:
            raise DeliveryError(
                f"attach a record to {text}", "it is not given by digest", "A tag can move; resolve it with image_info first.", "config"
            )
    with Registries() as registries, ThreadPoolExecutor(options.concurrency) as workers:

        def look(reference: Reference) -> tuple[RegistryClient, Descriptor, dict[str, str], bytes]:
            client = registries.client(reference.registry, options)
            subject = client.resolve(reference).descriptor()
            there = _find(client, reference.repository, subject.digest, content)
            bundle = b""
            if sign and _BUNDLE not in there:
                bundle = sign(f"{reference.registry}/{reference.repository}", subject.digest, content)
            return client, subject, there, bundle

        results = []
        for text, reference, (client, subject, there, bundle) in zip(images, references, list(workers.map(look, references))):
            changed = RECORD_TYPE not in there or bool(bundle)
            if bundle and not check:
                marks = {**_annotations(content), "dev.sigstore.bundle.content": "dsse-envelope", BUNDLE_PREDICATE: PREDICATE}
                there[_BUNDLE] = attach(client, reference.repository, subject, _BUNDLE, bundle, marks)
            if RECORD_TYPE not in there and not check:
                there[RECORD_TYPE] = attach_record(client, reference.repository, subject, content)
            results.append({"image": text, "artifact": there.get(RECORD_TYPE), "proof": there.get(_BUNDLE), "changed": changed})
        return results


def signer_with(cosign: Cosign, key: SigningKey) -> Sign:
    """What ``attach_record_to`` asks for: the bundle in which ``key`` says a record about a digest."""
    return lambda subject, digest, record: cosign.sign(key, subject, digest, PREDICATE, record)


def _find(client: RegistryClient, repository: str, digest: str, record: t.Mapping[str, t.Any]) -> dict[str, str]:
    """Digests of what already says what ``record`` says, by artifact type: the record, and a proof of it."""
    wanted = _annotations(record)
    found: dict[str, str] = {}
    for referrer in list_referrers(client, repository, digest):
        told = referrer.annotations
        if referrer.artifact_type in (RECORD_TYPE, _BUNDLE) and all(told.get(_PREFIX + key) == wanted[_PREFIX + key] for key in IDENTITY):
            found.setdefault(referrer.artifact_type, referrer.digest)
    return found


def _identity(record: t.Mapping[str, t.Any]) -> tuple[str, ...]:
    return tuple(str(record.get(key)) for key in IDENTITY)


def _annotations(record: t.Mapping[str, t.Any]) -> dict[str, str]:
    return {_CREATED: str(record.get("created") or ""), **{_PREFIX + key: str(record[key]) for key in IDENTITY}}
