# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Manifests and indexes as bytes that have been checked, and the descriptors in them."""

from __future__ import annotations

import json
import typing as t
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import check_digest, digest_of

OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_INDEX = "application/vnd.oci.image.index.v1+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"
MANIFEST_TYPES = (OCI_MANIFEST, DOCKER_MANIFEST)
INDEX_TYPES = (OCI_INDEX, DOCKER_LIST)
#: All four, always: with fewer, registries answer 404 or convert the manifest into another one with another digest.
ACCEPT = ", ".join((OCI_INDEX, OCI_MANIFEST, DOCKER_LIST, DOCKER_MANIFEST))


@dataclass(frozen=True)
class Descriptor:
    """Points at content: its type, digest and size in bytes. ``raw`` is the JSON object it came from."""

    media_type: str
    digest: str
    size: int
    raw: t.Mapping[str, t.Any] = field(default_factory=dict, compare=False, hash=False)

    @classmethod
    def from_json(cls, value: t.Any, where: str) -> Descriptor:
        """Read one descriptor of ``where``; raise ``DeliveryError`` (transport) when it is none."""
        if (
            not isinstance(value, dict)
            or not isinstance(value.get("size"), int)
            or value["size"] < 0
            or not isinstance(value.get("digest"), str)
        ):
            raise DeliveryError(
                f"read {where}", "it holds a descriptor without digest or size", "The manifest is damaged or not an image.", "transport"
            )
        check_digest(value["digest"], where)
        return cls(str(value.get("mediaType") or ""), value["digest"], value["size"], value)

    @property
    def platform(self) -> str | None:
        """``os/architecture[/variant]`` where the descriptor says it."""
        return platform_name(self.raw.get("platform"))

    @property
    def annotations(self) -> dict[str, str]:
        return dict(self.raw.get("annotations") or {})

    @property
    def artifact_type(self) -> str:
        return str(self.raw.get("artifactType") or "")

    @property
    def attested(self) -> str | None:
        """The digest of the sibling that this child of an index is an attestation of (BuildKit), else ``None``."""
        return self.annotations.get("vnd.docker.reference.digest")

    @property
    def foreign(self) -> bool:
        """A layer that registries do not hold: it is fetched from the addresses in ``urls``."""
        return bool(self.raw.get("urls")) and ("foreign" in self.media_type or "nondistributable" in self.media_type)

    def as_json(self) -> dict[str, t.Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class Manifest:
    """A manifest or index: exactly the bytes ``body``, whose digest is ``digest``."""

    media_type: str
    digest: str
    body: bytes
    content: t.Mapping[str, t.Any] = field(compare=False, hash=False, repr=False)

    @classmethod
    def parse(cls, body: bytes, digest: str | None, content_type: str, where: str) -> Manifest:
        """Check ``body`` against ``digest`` (``None``: take the SHA-256 of the body) and read it.

        Raises ``DeliveryError`` (transport) when the bytes are not the digest's or not a manifest,
        (config) for the old schema 1.
        """
        actual = digest_of(body, digest.split(":", 1)[0] if digest else "sha256")
        if digest and actual != digest:
            raise DeliveryError(
                f"read {where}",
                f"its bytes have the digest {actual}, not {digest}",
                "The registry or something before it changed or damaged the manifest.",
                "transport",
            )
        try:
            content = json.loads(body)
        except ValueError:
            content = None
        if not isinstance(content, dict):
            raise DeliveryError(f"read {where}", "the registry answered something that is not a manifest", "", "transport")
        if content.get("schemaVersion") != 2:
            raise DeliveryError(
                f"read {where}",
                f"it has the manifest schema {content.get('schemaVersion')!r}",
                "Push the image again with a current tool.",
                "config",
            )
        if "manifests" in content and ("layers" in content or "config" in content):
            # Readers would disagree about what such bytes mean.
            raise DeliveryError(
                f"read {where}", "it is an index and an image at once", "Refused: no tool writes this by accident.", "transport"
            )
        kind = str(content.get("mediaType") or content_type.split(";", 1)[0].strip())
        if kind not in MANIFEST_TYPES + INDEX_TYPES:
            kind = OCI_INDEX if "manifests" in content else OCI_MANIFEST
        return cls(kind, actual, body, content)

    @classmethod
    def build(cls, content: t.Mapping[str, t.Any]) -> Manifest:
        """Make a manifest of ours: canonical JSON, so that equal content has an equal digest."""
        body = canonical_json(content)
        return cls(str(content["mediaType"]), digest_of(body), body, content)

    @property
    def is_index(self) -> bool:
        return "manifests" in self.content

    @property
    def children(self) -> list[Descriptor]:
        """What an index lists; empty for an image."""
        return [Descriptor.from_json(child, f"the index {self.digest}") for child in self.content.get("manifests") or []]

    @property
    def config(self) -> Descriptor | None:
        return Descriptor.from_json(self.content["config"], f"the manifest {self.digest}") if self.content.get("config") else None

    @property
    def blobs(self) -> list[Descriptor]:
        """Config and layers that a registry must hold for this image, each digest once."""
        found = [self.config] if self.config else []
        found += [Descriptor.from_json(layer, f"the manifest {self.digest}") for layer in self.content.get("layers") or []]
        return list({blob.digest: blob for blob in found if not blob.foreign}.values())

    @property
    def subject(self) -> str | None:
        """The digest of the image this manifest is a referrer of."""
        subject = self.content.get("subject")
        return str(subject.get("digest")) if isinstance(subject, dict) else None

    def descriptor(self) -> Descriptor:
        value = {"mediaType": self.media_type, "digest": self.digest, "size": len(self.body)}
        return Descriptor(self.media_type, self.digest, len(self.body), value)

    def referrer_descriptor(self) -> dict[str, t.Any]:
        """How this manifest is listed among the referrers of its subject."""
        value = self.descriptor().as_json()
        kind = self.content.get("artifactType") or (self.config.media_type if self.config else "")
        if kind:
            value["artifactType"] = kind
        if self.content.get("annotations"):
            value["annotations"] = self.content["annotations"]
        return value


def canonical_json(value: t.Any) -> bytes:
    """Sorted keys, no spaces, UTF-8."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def platform_name(value: t.Any) -> str | None:
    """``os/architecture[/variant]`` of a platform object or an image config; ``None`` where it says nothing."""
    if not isinstance(value, dict) or not value.get("architecture") or value["architecture"] == "unknown":
        return None
    parts = [str(value.get("os") or "linux"), str(value["architecture"])] + ([str(value["variant"])] if value.get("variant") else [])
    return "/".join(parts)


def platform_matches(wanted: str, offered: str | None) -> bool:
    """Whether an image for ``offered`` serves ``wanted``; a variant counts only where both name one.

    ``arm64`` and ``arm64/v8`` are one platform, since builders write either.
    """
    if offered is None:
        return False
    want, have = wanted.split("/"), offered.split("/")
    return want[:2] == have[:2] and (len(want) < 3 or len(have) < 3 or want[2] == have[2])


def check_platform(text: str) -> str:
    """Return ``text`` if it reads ``os/architecture[/variant]``, else raise ``DeliveryError``."""
    parts = text.split("/")
    if not 2 <= len(parts) <= 3 or not all(parts):
        raise DeliveryError(
            f"read the platform {text!r}", "it is not os/architecture", "Write for example linux/amd64 or linux/arm/v7.", "config"
        )
    return text
