# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Names of images: ``host[:port]/repository[:tag][@digest]``."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, replace

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

DOCKER_HUB = "docker.io"
_HUB_ALIASES = ("docker.io", "index.docker.io", "registry-1.docker.io", "registry.hub.docker.com")
_PATH_PART = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_HOST = re.compile(r"(?:[A-Za-z0-9](?:[A-Za-z0-9.-]*[A-Za-z0-9])?|\[[0-9A-Fa-f:.]+\])(?::([0-9]{1,5}))?\Z")
_HEX_LENGTH = {"sha256": 64, "sha512": 128}


def check_tag(tag: str, where: str = "") -> str:
    """Return ``tag`` if a registry can hold it, else raise ``DeliveryError``."""
    if not _TAG.match(tag):
        raise _refusal(
            where or tag,
            f"{tag!r} is not a tag",
            "A tag has 1 to 128 letters, digits, '_', '.' and '-', and does not start with '.' or '-'.",
        )
    return tag


def check_digest(digest: str, where: str = "") -> str:
    """Return ``digest`` if it is a whole sha256 or sha512 digest, else raise ``DeliveryError``."""
    algorithm, colon, value = digest.partition(":")
    length = _HEX_LENGTH.get(algorithm)
    if not colon or length is None or not re.match(r"[0-9a-f]+\Z", value) or len(value) != length:
        raise _refusal(where or digest, f"{digest!r} is not a digest", "A digest is 'sha256:' and 64 lower case hexadecimal digits.")
    return digest


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    """The digest of ``data`` as registries write it."""
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def digest_tag(digest: str, suffix: str = "") -> str:
    """The tag under which tools keep what belongs to ``digest``: ``sha256-<hex><suffix>``."""
    return digest.replace(":", "-", 1)[: 128 - len(suffix)] + suffix


@dataclass(frozen=True)
class Reference:
    """A parsed name. ``registry`` is as written, but ``docker.io`` for all names of Docker Hub."""

    registry: str
    repository: str
    tag: str | None = None
    digest: str | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Read ``text`` the way Docker does; raise ``DeliveryError`` (config) with the part that is wrong.

        No tag is made up: ``shop/app`` has neither tag nor digest.
        """
        if not isinstance(text, str) or not text.strip():
            raise _refusal(str(text), "it is empty", "Write host[:port]/repository[:tag][@digest].")
        text = text.strip()
        if "://" in text:
            raise _refusal(
                text, f"it starts with {text.split('://', 1)[0]}://", "Leave the scheme out; plain HTTP is asked for with plain_http."
            )
        name, at, digest = text.partition("@")
        if at:
            check_digest(digest, text)
        head, slash, rest = name.partition("/")
        if slash and ("." in head or ":" in head or head == "localhost" or head.startswith("[")):
            registry, path = head, rest
        else:
            registry, path = DOCKER_HUB, name
        match = _HOST.match(registry)
        if not match or (match.group(1) and not 0 < int(match.group(1)) < 65536):
            raise _refusal(text, f"{registry!r} is not a host with an optional port")
        path, colon, tag = path.partition(":")
        if colon:
            check_tag(tag, text)
        if registry.lower() in _HUB_ALIASES:
            registry = DOCKER_HUB
            if path and "/" not in path:
                path = f"library/{path}"
        _check_path(text, path)
        return cls(registry, path, tag or None, digest or None)

    @property
    def name(self) -> str:
        """Registry and repository, without tag and digest."""
        return f"{self.registry}/{self.repository}"

    @property
    def version(self) -> str:
        """What to ask the registry for: the digest where there is one, else the tag, else ``latest`` as Docker does."""
        return self.digest or self.tag or "latest"

    @property
    def pinned(self) -> bool:
        return self.digest is not None

    def with_tag(self, tag: str) -> Reference:
        return replace(self, tag=check_tag(tag), digest=None)

    def with_digest(self, digest: str) -> Reference:
        return replace(self, tag=None, digest=check_digest(digest))

    def same_repository(self, other: Reference) -> bool:
        return self.name == other.name

    def __str__(self) -> str:
        return self.name + (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")


def _check_path(text: str, path: str) -> None:
    if not path:
        raise _refusal(text, "it has no repository")
    if len(path) > 255:
        raise _refusal(text, "its repository is longer than 255 characters")
    for part in path.split("/"):
        if not _PATH_PART.match(part):
            hint = (
                "Repository names are lower case."
                if part != part.lower()
                else "Parts hold a-z, 0-9 and single separators '.', '_', '__', '-' between them."
            )
            raise _refusal(text, f"{part!r} cannot be part of a repository name", hint)


def _refusal(text: str, seen: str, remedy: str = "") -> DeliveryError:
    return DeliveryError(f"read the image reference {text!r}", seen, remedy, "config", reference=text)
