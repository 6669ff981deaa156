# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What lies between a stored pass over a tree that moved and the tree as it was at one moment.

An engine needs seconds to store a tree, a copy of the few files that changed meanwhile takes milliseconds. So the bulk is
stored while everything runs, and the freeze lasts only for this copy. A restore writes the bulk, then lays the delta over it.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import fnmatch
import gzip
import hashlib
import os
import shutil
import stat
import typing as t
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import Entry, Scan, printable, unchanged

#: ioctl that lets two files share their blocks (Btrfs, XFS).
_FICLONE = 0x40049409
_STEP = 64 << 20
_NODES = {"fifo": stat.S_IFIFO, "character": stat.S_IFCHR, "block": stat.S_IFBLK}


def changed_since(before: Scan, after: Scan, proof: bool) -> list[bytes]:
    """Names of ``after`` that a pass begun after ``before`` may hold otherwise. ``proof``: the file system's ctime is one."""
    moved = []
    for path, entry in after.entries.items():
        earlier = before.entries.get(path)
        if not proof or earlier is None or entry.leader != earlier.leader or not unchanged(entry, earlier, before.started_ns):
            moved.append(path)
    return sorted(moved)


@dataclass
class Delta:
    """Entries to lay over a restored tree. ``names``: all that the tree may hold then, ``None`` where others may stay.

    ``clear``: patterns of names (``fnmatch``, below the root) that go before; ``blobs``: files in the delta's folder by entry.
    """

    entries: list[Entry] = field(default_factory=list)
    blobs: dict[bytes, str] = field(default_factory=dict)
    names: list[bytes] | None = None
    clear: list[str] = field(default_factory=list)

    def as_json(self) -> dict[str, t.Any]:
        """Everything but the names, which are many: see ``pack_names``."""
        records = []
        for one in self.entries:
            record = {"p": _text(one.path), "k": one.kind, "m": one.mode, "u": one.uid, "g": one.gid, "t": one.mtime_ns, "c": one.content}
            record.update({"x": dict(one.xattrs)} if one.xattrs else {}, **({"h": _text(one.leader)} if one.leader else {}))
            records.append({**record, "b": self.blobs[one.path]} if one.path in self.blobs else record)
        return {"entries": records, "clear": self.clear}

    @classmethod
    def from_json(cls, raw: t.Mapping[str, t.Any], names: list[bytes] | None) -> Delta:
        entries, blobs = [], {}
        for one in raw["entries"]:
            path = _bytes(one["p"])
            pairs = tuple(sorted(one.get("x", {}).items()))
            entries.append(
                Entry(path, one["k"], one["m"], one["u"], one["g"], 0, one["c"], pairs, _bytes(one.get("h", "")), one["t"], 0, 0)
            )
            if "b" in one:
                blobs[path] = os.path.basename(one["b"])
        return cls(entries, blobs, names, list(raw["clear"]))


def pack_names(names: t.Iterable[bytes]) -> bytes:
    return gzip.compress(b"\0".join(sorted(names)), 6, mtime=0)


def unpack_names(packed: bytes) -> list[bytes]:
    return gzip.decompress(packed).split(b"\0")


def copy_files(root: str, entries: t.Sequence[Entry], folder: str) -> dict[bytes, str]:
    """Copy the content of plain files below ``root`` into the new directory ``folder``, under numbers; raises when one is not what
    its entry says."""
    blobs: dict[bytes, str] = {}
    os.mkdir(folder, 0o700)
    for entry in entries:
        if entry.kind != "file" or entry.leader:
            continue
        name = str(len(blobs))
        source = _below(os.fsencode(root), entry.path)
        with _open(source) as handle, open(os.path.join(folder, name), "wb") as copy:
            copy_content(handle.fileno(), copy.fileno())
            now = os.fstat(handle.fileno())
        if (now.st_ino, now.st_size, now.st_mtime_ns, now.st_ctime_ns) != (entry.inode, entry.size, entry.mtime_ns, entry.ctime_ns):
            raise DeliveryError(
                f"copy {printable(source)}",
                "it changed while its containers were held still",
                "Something outside of these containers writes there; stop it.",
                "snapshot",
            )
        blobs[entry.path] = name
    return blobs


def copy_content(source: int, target: int) -> None:
    """One file's bytes to another, empty one: by shared blocks where the file system can, else without its holes."""
    try:
        fcntl.ioctl(target, _FICLONE, source)
        return
    except OSError:
        pass
    size = os.fstat(source).st_size
    position = 0
    while position < size:
        try:
            begin = os.lseek(source, position, os.SEEK_DATA)
        except OSError as exc:
            if exc.errno == errno.ENXIO:  # nothing but a hole from here
                break
            begin, end = position, size
        else:
            end = os.lseek(source, begin, os.SEEK_HOLE)
        os.lseek(source, begin, os.SEEK_SET)
        os.lseek(target, begin, os.SEEK_SET)
        while begin < end:
            moved = os.sendfile(target, source, None, min(_STEP, end - begin))
            if moved == 0:  # it shrank; who compares the times will see it
                break
            begin += moved
        position = end
    os.ftruncate(target, size)


def checksum(path: str | bytes) -> str:
    """SHA-256 of a blob; that of nothing, which is no blob's, where there is none."""
    total = hashlib.sha256()
    try:
        with open(path, "rb", buffering=0) as handle:
            while True:
                block = handle.read(1 << 20)
                if not block:
                    return total.hexdigest()
                total.update(block)
    except FileNotFoundError:
        return ""


def apply(root: str, delta: Delta, folder: str, there: t.Iterable[bytes]) -> None:
    """Lay ``delta`` with its blobs in ``folder`` over the fresh tree ``root``, of which ``there`` are the names. The tree must be out of
    reach of others."""
    base = os.fsencode(root)
    times: dict[bytes, int] = {}
    for entry in delta.entries:
        if entry.path:
            parent = os.path.dirname(_below(base, entry.path))
            with contextlib.suppress(FileNotFoundError):
                times.setdefault(parent, os.lstat(parent).st_mtime_ns)
    allowed = None if delta.names is None else set(delta.names)
    for path in sorted(there, reverse=True):
        cleared = any(fnmatch.fnmatchcase(os.fsdecode(path), pattern) for pattern in delta.clear)
        if path and (cleared or (allowed is not None and path not in allowed)):
            _remove(_below(base, path))
    for entry in sorted(delta.entries, key=lambda one: (bool(one.leader), one.path)):
        _put(base, entry, os.path.join(folder, delta.blobs[entry.path]) if entry.path in delta.blobs else "")
    for path, moment in times.items():
        if os.path.isdir(path):
            os.utime(path, ns=(moment, moment))
    for entry in sorted((one for one in delta.entries if one.kind == "directory"), key=lambda one: one.path, reverse=True):
        os.utime(_below(base, entry.path), ns=(entry.mtime_ns, entry.mtime_ns))


def _put(base: bytes, entry: Entry, blob: str) -> None:
    path = _below(base, entry.path)
    if entry.kind == "directory" and os.path.isdir(path) and not os.path.islink(path):
        for name in os.listxattr(path):
            if name != "security.selinux":
                os.removexattr(path, name)
    elif os.path.lexists(path):
        _remove(path)
    if entry.leader:
        os.link(_below(base, entry.leader), path, follow_symlinks=False)
        return
    if entry.kind == "file":
        with open(blob, "rb") as source, open(path, "xb") as target:
            copy_content(source.fileno(), target.fileno())
    elif entry.kind == "directory":
        os.makedirs(path, exist_ok=True)
    elif entry.kind == "link":
        os.symlink(_bytes(entry.content), path)
    else:
        os.mknod(path, _NODES[entry.kind] | 0o600, int(entry.content or 0))
    os.chown(path, entry.uid, entry.gid, follow_symlinks=False)
    if entry.kind != "link":
        os.chmod(path, entry.mode)
    for name, value in entry.xattrs:
        os.setxattr(path, name, base64.b64decode(value), follow_symlinks=False)
    os.utime(path, ns=(entry.mtime_ns, entry.mtime_ns), follow_symlinks=False)


def _remove(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    else:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)


def _open(path: bytes) -> t.BinaryIO:
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb", buffering=0)


def _below(root: bytes, path: bytes) -> bytes:
    return root + b"/" + path if path else root


def _text(path: bytes) -> str:
    return base64.b64encode(path).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
