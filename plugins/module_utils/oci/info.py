# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a registry knows about images: digest, platforms, labels, size."""

from __future__ import annotations

import typing as t
from concurrent.futures import ThreadPoolExecutor

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import Registries, RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import (
    Manifest,
    check_platform,
    platform_matches,
    platform_name,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import Reference


def describe_images(
    references: t.Sequence[str], options: ClientOptions, platform: str | None = None, report_missing: bool = False
) -> list[dict[str, t.Any]]:
    """One dict for each reference, in order, with the keys that image_info documents.

    Raises ``DeliveryError``: (config) bad or unknown reference, wrong platform, credentials or certificate; (transport) registry not
    reached, damaged content.
    """
    if platform:
        check_platform(platform)
    parsed = [Reference.parse(text) for text in references]
    with Registries() as registries, ThreadPoolExecutor(options.concurrency) as workers:

        def look(text: str, reference: Reference) -> dict[str, t.Any]:
            return _describe(registries.client(reference.registry, options), text, reference, platform, report_missing)

        return list(workers.map(look, references, parsed))


def _describe(client: RegistryClient, text: str, reference: Reference, platform: str | None, report_missing: bool) -> dict[str, t.Any]:
    found = client.manifest(reference.repository, reference.version) if report_missing else client.resolve(reference)
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
    if found is None:
        return entry
    entry.update(digest=found.digest, media_type=found.media_type)
    image: Manifest | None = found
    if found.is_index:
        entry["platforms"] = platforms_of(found)
        children = [child for child in found.children if child.platform and not child.attested]
        if platform:
            children = [child for child in children if platform_matches(platform, child.platform)]
            if not children:
                raise wrong_platform(reference, platform, entry["platforms"])
        image = client.manifest(reference.repository, children[0].digest) if children else None
        if children and image is None:
            raise DeliveryError(
                f"read {reference}",
                f"the registry lacks {children[0].digest} ({children[0].platform}), which the index names",
                "Push the image again.",
                "transport",
            )
    if image is None or image.is_index:
        return entry
    config = client.image_config(reference.repository, image)
    if not found.is_index:
        offered = platform_name(config)
        entry["platforms"] = [offered] if offered else []
        if platform and not platform_matches(platform, offered):
            raise wrong_platform(reference, platform, entry["platforms"])
    settings = config.get("config")
    entry["labels"] = dict((settings.get("Labels") if isinstance(settings, dict) else None) or {})
    entry["created"] = config.get("created")
    entry["size"] = sum(blob.size for blob in image.blobs)
    return entry


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
