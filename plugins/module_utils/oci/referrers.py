# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What belongs to an image: signatures, SBOMs, attestations and release records.

A registry with the referrers API keeps the list itself. One without it (distribution 2 and 3) has only the fallback tag
``sha256-<hex>``: an index that every writer reads, changes and writes, so the last of two writers silently drops the
other's entry. So here each referrer also gets a tag of its own, ``sha256-<hex>.ref-<hex>``, which no other writer touches: a
dropped entry is found again by that tag and put back by the next writer. The tag also keeps the referrer from
garbage collection, which in distribution 2 takes what only an index names.
"""

from __future__ import annotations

import random
import re
import time
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import (
    OCI_EMPTY,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_tag

#: cosign v2 keeps what belongs to an image under these tags.
COSIGN_SUFFIXES = (".sig", ".att", ".sbom")
_OWN_TAG = ".ref-"
_BELONGING = re.compile(r"(?:(sha256)-([0-9a-f]{64})|sha512-[0-9a-f]{64,})(?:\..+)?\Z")
_WRITE_ATTEMPTS = 8


def list_referrers(
    client: RegistryClient, repository: str, digest: str, artifact_type: str | None = None, known: bool = False
) -> list[Descriptor]:
    """Everything that names ``digest`` as its subject, from the API, the fallback tag and our own tags, each once.

    ``known``: by the tags as they were when first asked in this run; then no tag is asked for that is not among them.
    """
    entries: dict[str, dict[str, t.Any]] = {}
    from_api = list_api(client, repository, digest)
    tags = client.known_tags(repository) if known else None
    from_fallback = _from_fallback(client, repository, digest) if tags is None or digest_tag(digest) in tags else []
    for entry in (from_api or []) + from_fallback:
        entries.setdefault(entry["digest"], entry)
    if from_api is None:
        tags = client.tags(repository) if tags is None else tags
        entries = merge_entries(list(entries.values()), _from_own_tags(client, repository, digest, tags, set(entries)))
    found = [Descriptor.from_json(entry, f"the referrers of {client.registry}/{repository}@{digest}") for entry in entries.values()]
    return [item for item in found if artifact_type is None or item.artifact_type == artifact_type]


def attach(
    client: RegistryClient,
    repository: str,
    subject: Descriptor,
    artifact_type: str,
    payload: bytes,
    annotations: t.Mapping[str, str] | None = None,
) -> str:
    """Store ``payload`` as a referrer of ``subject`` and return the digest of its manifest; equal calls make equal digests."""
    config = client.push_blob(repository, b"{}", OCI_EMPTY)
    layer = client.push_blob(repository, payload, artifact_type)
    content: dict[str, t.Any] = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": config.as_json(),
        "layers": [layer.as_json()],
        "subject": subject.as_json(),
    }
    if annotations:
        content["annotations"] = dict(annotations)
    manifest = Manifest.build(content)
    put_referrers(client, repository, subject.digest, [manifest])
    return manifest.digest


def put_referrers(client: RegistryClient, repository: str, subject: str, manifests: t.Sequence[Manifest]) -> None:
    """Write manifests whose blobs are there already, and make sure that they are listed at ``subject``."""
    unlisted: list[Manifest] = []
    claimed: list[Manifest] = []
    for manifest in manifests:
        response = client.put_manifest(repository, manifest)
        (claimed if response.headers.get("OCI-Subject") else unlisted).append(manifest)
    if claimed and client.referrers_api is None:
        list_referrers(client, repository, subject)
    if client.referrers_api is False:
        # Registries were seen that say so and list nothing.
        unlisted += claimed
    for manifest in unlisted:
        client.put_manifest(repository, manifest, tag=own_tag(subject, manifest.digest))
    if unlisted:
        _update_fallback(client, repository, subject, [manifest.referrer_descriptor() for manifest in unlisted])


def own_tag(subject: str, digest: str) -> str:
    """The tag that belongs to one referrer alone."""
    return digest_tag(subject, _OWN_TAG + digest.split(":", 1)[1][:16])


def belongs_to(tag: str) -> str | None:
    """The digest to which ``tag`` belongs by its name, as the fallback tag, our own tags and those of cosign do.

    ``None`` for a tag with a name of its own; empty where the digest is too long to stand whole in a tag (sha512).
    """
    match = _BELONGING.match(tag)
    if match is None:
        return None
    return f"{match.group(1)}:{match.group(2)}" if match.group(1) else ""


def merge_entries(present: t.Sequence[t.Mapping[str, t.Any]], added: t.Sequence[t.Mapping[str, t.Any]]) -> dict[str, dict[str, t.Any]]:
    """Entries by digest: what is there stays, in its order; what is new comes after it."""
    merged = {str(entry["digest"]): dict(entry) for entry in present}
    for entry in added:
        merged.setdefault(str(entry["digest"]), dict(entry))
    return merged


def fallback_index(entries: t.Iterable[t.Mapping[str, t.Any]]) -> Manifest:
    """The index that stands under the fallback tag."""
    return Manifest.build({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [dict(entry) for entry in entries]})


def is_fallback_index(manifest: Manifest, subject: str) -> bool:
    """Whether the fallback tag holds a list of referrers.

    Some tools copy the image itself to this tag; its children are platforms, not referrers.
    """
    return manifest.is_index and manifest.digest != subject


def list_api(client: RegistryClient, repository: str, digest: str) -> list[dict[str, t.Any]] | None:
    """The referrers API's own list, as it says it; ``None`` where the registry has no such API."""
    if client.referrers_api is False:
        return None
    entries: list[dict[str, t.Any]] = []
    path: str | None = f"/v2/{repository}/referrers/{digest}"
    while path:
        page = client.referrers_page(path, repository)
        if page is None:
            client.referrers_api = False
            return None
        client.referrers_api = True
        entries += [entry for entry in page[0] if isinstance(entry, dict) and entry.get("digest")]
        path = page[1]
    return entries


def _from_fallback(client: RegistryClient, repository: str, digest: str) -> list[dict[str, t.Any]]:
    manifest = client.manifest(repository, digest_tag(digest))
    if manifest is None or not is_fallback_index(manifest, digest):
        return []
    return [dict(child.raw) for child in manifest.children]


def _from_own_tags(
    client: RegistryClient, repository: str, digest: str, tags: frozenset[str] | None, known: t.AbstractSet[str]
) -> list[dict[str, t.Any]]:
    """Entries that a writer without the merge has dropped from the fallback index."""
    prefix = digest_tag(digest, _OWN_TAG)
    known_tags = {own_tag(digest, item) for item in known}
    entries = []
    for tag in sorted(tag for tag in tags or () if tag.startswith(prefix) and tag not in known_tags):
        manifest = client.manifest(repository, tag)
        if manifest is not None and manifest.subject == digest:
            entries.append(manifest.referrer_descriptor())
    return entries


def _update_fallback(client: RegistryClient, repository: str, subject: str, added: list[dict[str, t.Any]]) -> None:
    """Add entries to the fallback index, and look again whether they stayed.

    Another writer may have read the index before us and write it after us. What it drops of ours is seen here, or by the
    next reader through the own tag.
    """
    tag = digest_tag(subject)
    for attempt in range(_WRITE_ATTEMPTS):
        present = _from_fallback(client, repository, subject)
        dropped = _from_own_tags(client, repository, subject, client.tags(repository), {str(entry["digest"]) for entry in present + added})
        merged = merge_entries(present, dropped + added)
        if len(merged) > len(present):
            client.put_manifest(repository, fallback_index(merged.values()), tag=tag)
        listed = {str(entry["digest"]) for entry in _from_fallback(client, repository, subject)}
        if set(merged) <= listed:
            return
        # Writers that collided part again only if they do not keep step.
        time.sleep(random.uniform(0, 0.05 * 2**attempt))
    raise DeliveryError(
        f"list a new referrer at {client.registry}/{repository}:{tag}",
        f"other writers dropped it {_WRITE_ATTEMPTS} times",
        "Run again when fewer write at once.",
        "transport",
    )
