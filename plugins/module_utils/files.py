# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Files that survive a crash: written beside, synced, renamed."""

from __future__ import annotations

import json
import os
import tempfile
import typing as t


def sync_directory(path: str) -> None:
    """Make a rename or creation inside ``path`` durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: str, content: str | bytes, mode: int = 0o600) -> None:
    """Replace ``path`` by ``content``: readers see the old or the new bytes, never a part."""
    data = content.encode() if isinstance(content, str) else content
    parent = os.path.dirname(os.path.abspath(path))
    descriptor, temporary = tempfile.mkstemp(prefix=".tmp-", dir=parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            os.fchmod(handle.fileno(), mode)
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.unlink(temporary)
        raise
    sync_directory(parent)


def write_json(path: str, value: t.Any, mode: int = 0o600) -> None:
    """Write ``value`` as indented JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2, sort_keys=True) + "\n", mode)


def read_json(path: str) -> t.Any:
    """Parse ``path``; ``None`` when it does not exist."""
    try:
        with open(path, encoding="utf-8") as handle:
            return json.load(handle)
    except FileNotFoundError:
        return None


def point_symlink(link: str, target: str) -> bool:
    """Make ``link`` point at ``target`` by rename; say whether that changed anything."""
    if os.path.islink(link) and os.readlink(link) == target:
        return False
    temporary = f"{link}.new-{os.getpid()}"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, link)
    sync_directory(os.path.dirname(os.path.abspath(link)))
    return True
