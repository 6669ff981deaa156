# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a registry knows about images: digest, platforms, labels, size."""

from __future__ import annotations

import re
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import Registries, RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import (
    Descriptor,
    Manifest,
    check_platform,
    platform_matches,
    platform_name,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import Reference, digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import COSIGN_SUFFIXES, belongs_to, list_referrers


@dataclass(frozen=True)
class Questions:
    """What to ask beside the digest. ``tags`` are patterns for references without tag and digest; empty: ``latest`` is meant."""

    platform: str | None = None
    report_missing: bool = False
    tags: tuple[str, ...] = ()
    layers: bool = False
    referrers: bool = False


@dataclass
class _Found:
    entry: dict[str, t.Any]
    #: Layers of all its platforms, digest to size.
    layers: dict[str, int] = field(default_factory=dict)


def describe_images(references: t.Sequence[str], options: ClientOptions, questions: Questions) -> list[dict[str, t.Any]]:
    """One dict for each reference, in order, with the keys that image_info documents.

    A reference without tag and digest becomes one dict for each of its tags that ``questions.tags`` match, sorted.
    Raises ``DeliveryError``: (config) bad or unknown reference, wrong platform, credentials or certificate; (transport) registry not
    reached, damaged content.
    """
    if questions.platform:
        check_platform(questions.platform)
    patterns = [_pattern(text) for text in questions.tags]
    parsed = [Reference.parse(text) for text in references]
    with Registries() as registries, ThreadPoolExecutor(options.questions) as workers:

        def expand(text: str, reference: Reference) -> list[tuple[str, Reference]]:
            if not patterns or reference.tag or reference.digest:
                return [(text, reference)]
            tags = _matching_tags(registries.client(reference.registry, options), reference, patterns)
            return [(str(tagged), tagged) for tagged in (reference.with_tag(tag) for tag in tags)]

        def look(item: tuple[str, Reference]) -> _Found:
            text, reference = item
            return _describe(registries.client(reference.registry, options), text, reference, questions)

        found = list(workers.map(look, [item for items in workers.map(expand, references, parsed) for item in items]))
    if questions.layers:
        _compare(found)
    return [one.entry for one in found]


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as exc:
        raise DeliveryError(f"read the pattern {text!r} of tags", str(exc), "Write a Python regular expression.", "config") from exc


def _matching_tags(client: RegistryClient, reference: Reference, patterns: t.Sequence[re.Pattern[str]]) -> list[str]:
    """The tags that people gave; signatures and lists of referrers have tags too, and are no images."""
    tags = client.tags(reference.repository)
    if tags is None:
        raise DeliveryError(
            f"list the tags of {reference.name}",
            f"{client.registry} does not tell them",
            "Give the user the right to list them, or name the tags.",
            "config",
        )
    return sorted(tag for tag in tags if belongs_to(tag) is None and any(pattern.search(tag) for pattern in patterns))


def _describe(client: RegistryClient, text: str, reference: Reference, questions: Questions) -> _Found:
    found = client.manifest(reference.repository, reference.version) if questions.report_missing else client.resolve(reference)
    entry: dict[str, t.Any] = {
        "reference": text,
        "repository": reference.name,
        "tag": reference.tag,
        "exists": found is not None,
        "digest": None,
        "media_type": None,
        "platforms": [],
        "labels": {},
        "created": None,
        "size": None,
    }
    result = _Found(entry)
    if questions.layers:
        entry.update(variants=[], total_size=None, unique_size=None, shared=[])
    if questions.referrers:
        entry["referrers"] = []
    if found is None:
        return result
    entry.update(digest=found.digest, media_type=found.media_type)
    image = _image_of(client, reference, found, questions.platform)
    config = client.image_config(reference.repository, image) if image else {}
    if found.is_index:
        entry["platforms"] = platforms_of(found)
    else:
        offered = platform_name(config)
        entry["platforms"] = [offered] if offered else []
        if questions.platform and not platform_matches(questions.platform, offered):
            raise wrong_platform(reference, questions.platform, entry["platforms"])
    if image:
        settings = config.get("config")
        entry["labels"] = dict((settings.get("Labels") if isinstance(settings, dict) else None) or {})
        entry["created"] = config.get("created")
        entry["size"] = sum(blob.size for blob in image.blobs)
    if questions.layers:
        _weigh(client, reference, found, result)
    if questions.referrers:
        entry["referrers"] = _belongings(client, reference.repository, found)
    return result


def _image_of(client: RegistryClient, reference: Reference, found: Manifest, platform: str | None) -> Manifest | None:
    """The image to read labels from: ``found`` itself, of an index that for ``platform`` or the first; ``None`` where there is none."""
    if not found.is_index:
        return found
    children = [child for child in found.children if child.platform and not child.attested]
    if platform:
        children = [child for child in children if platform_matches(platform, child.platform)]
        if not children:
            raise wrong_platform(reference, platform, platforms_of(found))
    image = _child(client, reference, children[0]) if children else None
    return None if image is None or image.is_index else image


def _child(client: RegistryClient, reference: Reference, child: Descriptor) -> Manifest:
    manifest = client.manifest(reference.repository, child.digest)
    if manifest is None:
        raise DeliveryError(
            f"read {reference}",
            f"the registry lacks {child.digest} ({child.platform or child.media_type}), which the index names",
            "Push the image again.",
            "transport",
        )
    return manifest


def _weigh(client: RegistryClient, reference: Reference, found: Manifest, result: _Found) -> None:
    """Sizes of all platforms. Attestations count in the total, since they are transferred too."""
    blobs: dict[str, int] = {}
    todo: list[tuple[Descriptor | None, Manifest]] = [(None, found)]
    for descriptor, manifest in todo:
        todo += [(child, _child(client, reference, child)) for child in manifest.children]
        blobs.update((blob.digest, blob.size) for blob in manifest.blobs)
        if manifest.is_index or (descriptor and descriptor.attested):
            continue
        config = manifest.config.digest if manifest.config else None
        layers = [blob for blob in manifest.blobs if blob.digest != config]
        result.layers.update((blob.digest, blob.size) for blob in layers)
        result.entry["variants"].append(
            {
                "platform": descriptor.platform if descriptor else next(iter(result.entry["platforms"]), None),
                "digest": manifest.digest,
                "size": sum(blob.size for blob in manifest.blobs),
                "layers": len(layers),
            }
        )
    result.entry["total_size"] = sum(blobs.values())


def _compare(found: t.Sequence[_Found]) -> None:
    for one in found:
        others: set[str] = set()
        for other in found:
            common = one.layers.keys() & other.layers.keys()
            if other is one or not common:
                continue
            others |= common
            one.entry["shared"].append(
                {"reference": other.entry["reference"], "layers": len(common), "size": sum(one.layers[digest] for digest in common)}
            )
        if one.entry["exists"]:
            one.entry["unique_size"] = sum(size for digest, size in one.layers.items() if digest not in others)


def _belongings(client: RegistryClient, repository: str, found: Manifest) -> list[dict[str, t.Any]]:
    """What belongs to an image or to a child of it, and to that again, in the order in which it is found."""
    listed: list[dict[str, t.Any]] = []
    todo = [found.digest, *(child.digest for child in found.children)]
    for subject in todo:
        for item in list_referrers(client, repository, subject):
            listed.append(_belonging(subject, item, None))
            todo.append(item.digest)
        for suffix in COSIGN_SUFFIXES:
            tag = digest_tag(subject, suffix)
            # Without the API the tags have been listed already, which spares these questions.
            tags = client.known_tags(repository) if client.referrers_api is False else None
            manifest = client.manifest(repository, tag) if tags is None or tag in tags else None
            if manifest is not None:
                listed.append(_belonging(subject, Descriptor.from_json(manifest.referrer_descriptor(), tag), tag))
    return listed


def _belonging(subject: str, item: Descriptor, tag: str | None) -> dict[str, t.Any]:
    return {
        "digest": item.digest,
        "subject": subject,
        "artifact_type": item.artifact_type or None,
        "annotations": item.annotations,
        "tag": tag,
    }


def platforms_of(index: Manifest) -> list[str]:
    """The platforms that an index offers, sorted, each once; attestations are none."""
    return sorted({child.platform for child in index.children if child.platform and not child.attested})


def wrong_platform(reference: Reference, wanted: str, offered: t.Sequence[str]) -> DeliveryError:
    """The refusal of an image that does not run on ``wanted``."""
    is_for = ", ".join(_short(item, wanted) for item in offered) or "no platform that it names"
    return DeliveryError(
        f"find {wanted} in {reference}",
        f"image is for {is_for}, hosts are {_short(wanted, offered[0] if offered else wanted)}",
        f"Build and push it for {wanted}.",
        "config",
        platforms=list(offered),
    )


def _short(platform: str, beside: str) -> str:
    """Without the system where both have the same: ``arm64`` says more at a glance than ``linux/arm64``."""
    system, _slash, rest = platform.partition("/")
    return rest if rest and beside.startswith(f"{system}/") else platform
