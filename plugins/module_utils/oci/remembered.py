# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Manifests that this user has seen, and which one a tag named last: enough to ask all questions about an image at once.

Nothing here is evidence. A digest's bytes never change, so a remembered manifest says which questions to ask; the answers still come
from the registry, every time. What is missing, old, damaged or made up costs a round of questions and no more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Manifest

#: Larger ones are read again; an image's has a few kilobytes.
_LARGEST = 128 * 1024
#: Files; the oldest half goes when there are more.
_MOST = 4000


class Remembered:
    """A folder of small files of this user, ``~/.cache/selfhost-delivery/images``. A folder that cannot be used is one that is empty."""

    def __init__(self, folder: str | None = None) -> None:
        base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
        self.folder = folder or os.path.join(base, "selfhost-delivery", "images")

    def tree(self, digest: str) -> list[Manifest]:
        """The manifests below ``digest``, children first and itself last; empty where one of them is not known."""
        root = self._manifest(digest)
        if root is None:
            return []
        found: dict[str, Manifest] = {}
        for child in root.children:
            below = self.tree(child.digest)
            if not below:
                return []
            found.update((manifest.digest, manifest) for manifest in below)
        return [*found.values(), root]

    def named(self, name: str) -> str:
        """The digest that ``name`` was last seen to name; empty when it was not."""
        return self._read(_key(name)).decode(errors="replace")

    def note(self, trees: t.Iterable[t.Sequence[Manifest]], names: t.Mapping[str, str]) -> None:
        """Remember manifests, and digests by the names they had."""
        with contextlib.suppress(OSError):
            os.makedirs(self.folder, mode=0o700, exist_ok=True)
            for manifest in {manifest.digest: manifest for tree in trees for manifest in tree}.values():
                if len(manifest.body) <= _LARGEST and not self._manifest(manifest.digest):
                    self._write(_key(manifest.digest), json.dumps([manifest.media_type, manifest.body.decode()]).encode())
            for name, digest in names.items():
                if self.named(name) != digest:
                    self._write(_key(name), digest.encode())
            self._forget()

    def _manifest(self, digest: str) -> Manifest | None:
        try:
            media_type, body = json.loads(self._read(_key(digest)))
            return Manifest.parse(body.encode(), digest, media_type, "what is remembered")
        except (DeliveryError, ValueError, TypeError, AttributeError):
            return None

    def _read(self, key: str) -> bytes:
        try:
            with open(os.path.join(self.folder, key), "rb") as handle:
                return handle.read(2 * _LARGEST)
        except OSError:
            return b""

    def _write(self, key: str, content: bytes) -> None:
        # Renamed, so that nobody reads a half; not synced, since a lost one is no loss.
        descriptor, temporary = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content)
        os.replace(temporary, os.path.join(self.folder, key))

    def _forget(self) -> None:
        with os.scandir(self.folder) as entries:
            files = [(entry.stat().st_mtime, entry.path) for entry in entries]
        if len(files) > _MOST:
            for _time, path in sorted(files)[: len(files) - _MOST // 2]:
                os.unlink(path)


def _key(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()
