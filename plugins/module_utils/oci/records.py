# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Release records: what an environment did with an image, kept beside the image in its registry."""

from __future__ import annotations

import datetime
import json
import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import Registries, RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Descriptor, Manifest, canonical_json
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import Reference
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import attach, list_referrers

RECORD_TYPE = "application/vnd.selfhost.delivery.release.v1+json"
_PREFIX = "delivery.selfhost."
_CREATED = "org.opencontainers.image.created"
#: What makes two records the same one.
IDENTITY = ("environment", "release", "result")


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


def find_record(client: RegistryClient, repository: str, digest: str, record: t.Mapping[str, t.Any]) -> str | None:
    """The digest of the artifact that already says what ``record`` says, or ``None``."""
    wanted = _annotations(record)
    for referrer in _record_referrers(client, repository, digest):
        told = referrer.annotations
        if all(told.get(_PREFIX + key) == wanted[_PREFIX + key] for key in IDENTITY):
            return referrer.digest
    return None


def said_in(manifest: Manifest) -> dict[str, str] | None:
    """The identity of the record that ``manifest`` is, from its annotations; ``None`` when it is no record."""
    if manifest.content.get("artifactType") != RECORD_TYPE:
        return None
    told = manifest.content.get("annotations") or {}
    return {key: str(told.get(_PREFIX + key) or "unknown") for key in IDENTITY}


def attach_record(client: RegistryClient, repository: str, subject: Descriptor, record: t.Mapping[str, t.Any]) -> str:
    """Attach a checked record to the image ``subject``; returns the artifact's digest."""
    return attach(client, repository, subject, RECORD_TYPE, canonical_json(record), _annotations(record))


def read_records(client: RegistryClient, repository: str, digest: str) -> list[dict[str, t.Any]]:
    """All records of an image, newest ``created`` first, as they were attached."""
    records = []
    for referrer in _record_referrers(client, repository, digest):
        manifest = client.manifest(repository, referrer.digest)
        if manifest is None or manifest.subject != digest:
            # A list may name what was deleted since, or what never belonged here.
            continue
        blobs = [blob for blob in manifest.blobs if blob.media_type == RECORD_TYPE]
        try:
            record = json.loads(client.read_blob(repository, blobs[0]))
        except (ValueError, IndexError):
            record = None
        if not isinstance(record, dict):
            raise DeliveryError(
                f"read the release record {client.registry}/{repository}@{referrer.digest}",
                "it is not a JSON object",
                "Delete this artifact in the registry.",
                "transport",
            )
        records.append(record)
    return sorted(records, key=lambda record: str(record.get("created") or ""), reverse=True)


def read_records_for(references: list[str], client_options: ClientOptions) -> dict[str, list[dict[str, t.Any]]]:
    """``read_records`` for several images side by side, by the reference as given.

    A reference by tag is resolved first; an unknown tag raises ``DeliveryError`` (config). By digest, an image without
    records, or one that the registry does not have, is an empty list.
    """
    with Registries() as registries, ThreadPoolExecutor(client_options.concurrency) as workers:

        def read(text: str) -> list[dict[str, t.Any]]:
            reference = Reference.parse(text)
            client = registries.client(reference.registry, client_options)
            digest = reference.digest or client.resolve(reference).digest
            return read_records(client, reference.repository, digest)

        names = list(dict.fromkeys(references))
        return dict(zip(names, workers.map(read, names)))


def attach_record_to(
    images: t.Sequence[str], record: t.Mapping[str, t.Any], options: ClientOptions, check: bool = False
) -> list[dict[str, t.Any]]:
    """Attach ``record`` to each image that does not have it; one ``{image, artifact, changed}`` for each, in order.

    All images must be given by digest and exist, else nothing is written and a ``DeliveryError`` (config) raised.
    """
    content = check_record(record)
    references = [Reference.parse(text) for text in images]
    for text, reference in zip(images, references):
        if not reference.digest:
            raise DeliveryError(
                f"attach a record to {text}", "it is not given by digest", "A tag can move; resolve it with image_info first.", "config"
            )
    with Registries() as registries, ThreadPoolExecutor(options.concurrency) as workers:

        def look(reference: Reference) -> tuple[RegistryClient, Descriptor, str | None]:
            client = registries.client(reference.registry, options)
            subject = client.resolve(reference).descriptor()
            return client, subject, find_record(client, reference.repository, subject.digest, content)

        results = []
        for text, reference, (client, subject, artifact) in zip(images, references, list(workers.map(look, references))):
            changed = artifact is None
            if changed and not check:
                artifact = attach_record(client, reference.repository, subject, content)
            results.append({"image": text, "artifact": artifact, "changed": changed})
        return results


def _record_referrers(client: RegistryClient, repository: str, digest: str) -> list[Descriptor]:
    return list_referrers(client, repository, digest, RECORD_TYPE)


def _annotations(record: t.Mapping[str, t.Any]) -> dict[str, str]:
    return {_CREATED: str(record.get("created") or ""), **{_PREFIX + key: str(record[key]) for key in IDENTITY}}
