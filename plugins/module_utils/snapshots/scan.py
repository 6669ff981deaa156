# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is in a directory tree, exactly: the one measure both sides of a snapshot are compared with.

A scan covers names (raw bytes), kinds, modes, owners, sizes, contents, link targets, extended attributes (so ACLs and
capabilities too), hard links and device numbers. Times are left out, since no engine keeps all of them; sockets are
left out, since a program makes its own.
"""

from __future__ import annotations

import base64
import concurrent.futures
import ctypes
import errno
import hashlib
import json
import os
import stat
import time
import typing as t
from dataclasses import dataclass, field, replace

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

#: File systems that write-protect pages after a sync, so that a later store through mmap moves the ctime:
#: ext2/3/4, XFS, btrfs. On any other one an unchanged ctime proves nothing.
_CTIME_FILE_SYSTEMS = (0xEF53, 0x58465342, 0x9123683E)

#: A file changed this close to the moment it was read may change again within the same clock tick.
_RACY_NS = 2_000_000_000

_BLOCK = 1 << 20

# Scan.bytes hides the type.
Names = t.Iterable[bytes]
NameList = t.MutableSequence[bytes]


@dataclass(frozen=True)
class Entry:
    """One name in a tree. ``content`` is a SHA-256, a link target or a device number; ``leader`` is set on the
    second and later names of one file and holds its first name."""

    path: bytes
    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    content: str
    xattrs: tuple[tuple[str, str], ...]
    leader: bytes
    mtime_ns: int
    ctime_ns: int
    inode: int

    def identity(self) -> list[t.Any]:
        """The part of the entry that a restore must bring back."""
        labels = [pair for pair in self.xattrs if pair[0] != "security.selinux"]
        return [_text(self.path), self.kind, self.mode, self.uid, self.gid, self.size, self.content, labels, _text(self.leader)]


@dataclass
class Scan:
    """All entries of one tree by name, and when reading began (``time.time_ns``)."""

    root: str
    started_ns: int
    entries: dict[bytes, Entry] = field(default_factory=dict)
    sockets: int = 0

    def _count(self, kind: str) -> int:
        return sum(1 for entry in self.entries.values() if entry.kind == kind)

    @property
    def files(self) -> int:
        return self._count("file")

    @property
    def directories(self) -> int:
        return self._count("directory")

    @property
    def links(self) -> int:
        return self._count("link")

    @property
    def bytes(self) -> int:
        return sum(entry.size for entry in self.entries.values() if entry.kind == "file")

    @property
    def digest(self) -> str:
        """``sha256:…`` over the identities of all entries, in the order of their names."""
        return self.digest_of(self.entries)

    def digest_of(self, names: Names) -> str:
        """The same over some entries, all of which must be there."""
        total = hashlib.sha256()
        for path in sorted(names):
            total.update(json.dumps(self.entries[path].identity(), separators=(",", ":")).encode() + b"\n")
        return f"sha256:{total.hexdigest()}"

    def settled(self, later: Scan) -> NameList:
        """Names of what did not move between this scan and a later one; of a hard link only where its first name did not either."""
        same = {
            path
            for path, entry in self.entries.items()
            if path in later.entries
            and entry.identity() == later.entries[path].identity()
            and (entry.kind == "directory" or _times(entry) == _times(later.entries[path]))
        }
        return sorted(path for path in same if not self.entries[path].leader or self.entries[path].leader in same)

    def first_move(self, later: Scan) -> str:
        """The first name that came, went or has other times in a later scan; empty when none has. Needs no contents."""
        for path in sorted(set(self.entries) | set(later.entries)):
            mine, theirs = self.entries.get(path), later.entries.get(path)
            if mine is None or theirs is None or (mine.kind, _times(mine)) != (theirs.kind, _times(theirs)):
                return printable(path)
        return ""

    def first_difference(self, other: Scan) -> str:
        """A sentence about one entry that differs, for messages; empty when the identities are equal."""
        for path in sorted(set(self.entries) | set(other.entries)):
            mine, theirs = self.entries.get(path), other.entries.get(path)
            if mine is None or theirs is None:
                return f"{printable(path)} is only on one side"
            if mine.identity() != theirs.identity():
                names = ("name", "kind", "mode", "owner", "group", "size", "content", "extended attributes", "hard link")
                fields = [n for n, a, b in zip(names, mine.identity(), theirs.identity()) if a != b]
                return f"{printable(path)} differs in {', '.join(fields)}"
        return ""


def printable(path: bytes) -> str:
    """A name for messages: control characters and bytes that are not UTF-8 are escaped."""
    text = path.decode("utf-8", "backslashreplace") or "."
    return text if text.isprintable() else repr(text)


def scan(root: str, known: Scan | None = None, contents: bool = True, vanishing: bool = False) -> Scan:
    """Read the tree (or the single file) at ``root`` without following links.

    ``known``: an earlier scan of the same place; what has not moved since (inode, size, times) is taken from there
    unread, provided that the file system makes that a proof.
    ``contents`` false: no checksums but the known ones. ``vanishing`` true: names may go away meanwhile.
    Raises ``DeliveryError(snapshot)`` for what cannot be read.
    """
    result = Scan(root, time.time_ns())
    trusted = known if known is not None and ctime_is_proof(root) else None
    pending: list[tuple[bytes, os.stat_result]] = []
    first_names: dict[tuple[int, int], bytes] = {}
    for path, info in _walk(os.fsencode(root), vanishing):
        if stat.S_ISSOCK(info.st_mode):
            result.sockets += 1
            continue
        leader = b""
        if stat.S_ISREG(info.st_mode) and info.st_nlink > 1:
            leader = first_names.setdefault((info.st_dev, info.st_ino), path)
            leader = b"" if leader == path else leader
        earlier = trusted.entries.get(path) if trusted is not None else None
        if earlier is not None and trusted is not None and _is_unchanged(earlier, info, trusted.started_ns):
            result.entries[path] = earlier if earlier.leader == leader else replace(earlier, leader=leader)
            continue
        try:
            entry = _entry(os.fsencode(root), path, info, leader)
        except FileNotFoundError:
            if not vanishing:
                raise
            continue
        if entry.kind == "file" and contents:
            pending.append((path, info))
        result.entries[path] = entry
    _checksum(result, pending, vanishing)
    return result


def needs_full_read(before: Scan, after: Scan, warm_end_ns: int, by_ctime: bool) -> bool:
    """Whether an engine that skips files by their times could keep stale bytes of something that changed since ``before``.

    ``by_ctime``: it compares ctime and inode too, so only a change within one clock tick escapes it. Any other one sees a
    change for sure only when the new mtime lies after the end of its last pass (``warm_end_ns``) and not in the future.
    """
    if not ctime_is_proof(after.root):
        return True
    for path, entry in after.entries.items():
        if entry.kind != "file":
            continue
        earlier = before.entries.get(path)
        if earlier is not None and unchanged(entry, earlier, before.started_ns):
            continue
        if by_ctime:
            if earlier is not None and _times(entry) == _times(earlier) and entry.content != earlier.content:
                return True
        elif not (warm_end_ns < entry.mtime_ns <= after.started_ns and (earlier is None or earlier.mtime_ns != entry.mtime_ns)):
            return True
    return False


def sidecar(tree: Scan, without: t.Collection[bytes] = ()) -> list[dict[str, t.Any]]:
    """What Kopia does not keep of ``tree``, one JSON-able record a name: ``p`` (base64 name) with ``x`` (extended attributes),
    ``h`` (hard link to that base64 name), ``n`` (FIFO or device: kind, mode, uid, gid, number) or ``t`` (mtime of a directory, ns).
    Of the names in ``without`` only the times of directories."""
    records = []
    for path in sorted(tree.entries):
        entry = tree.entries[path]
        record: dict[str, t.Any] = {}
        if path in without:
            if entry.kind == "directory":
                records.append({"p": _text(path), "t": entry.mtime_ns})
            continue
        if entry.leader:
            record["h"] = _text(entry.leader)
        elif entry.xattrs:
            record["x"] = dict(entry.xattrs)
        if entry.kind in ("fifo", "character", "block"):
            record["n"] = [entry.kind, entry.mode, entry.uid, entry.gid, entry.content]
        if entry.kind == "directory":
            record["t"] = entry.mtime_ns
        if record:
            records.append({"p": _text(path), **record})
    return records


def apply_sidecar(root: str, records: t.Sequence[dict[str, t.Any]]) -> None:
    """Bring back in the fresh tree ``root`` what ``sidecar`` recorded. The tree must be out of reach of others."""
    base = os.fsencode(root)
    for record in records:
        path = _join(base, _bytes(record["p"]))
        if "h" in record:
            os.unlink(path)
            os.link(_join(base, _bytes(record["h"])), path, follow_symlinks=False)
        if "n" in record:
            kind, mode, uid, gid, number = record["n"]
            flag = {"fifo": stat.S_IFIFO, "character": stat.S_IFCHR, "block": stat.S_IFBLK}[kind]
            os.mknod(path, flag | 0o600, int(number or 0))
            os.chown(path, uid, gid)
            os.chmod(path, mode)
        for name, value in record.get("x", {}).items():
            os.setxattr(path, name, base64.b64decode(value), follow_symlinks=False)
    for record in reversed(records):
        if "t" in record:
            os.utime(_join(base, _bytes(record["p"])), ns=(record["t"], record["t"]))


def sync_file_systems(paths: t.Iterable[str]) -> None:
    """Write everything dirty of the file systems that hold ``paths`` to disk, each once: on a busy disk one sync takes seconds."""
    for path in {os.stat(path).st_dev: path for path in paths}.values():
        _sync_file_system(path)


def _sync_file_system(path: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        if libc.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            failure = "capacity" if number in (errno.ENOSPC, errno.EDQUOT) else "snapshot"
            raise DeliveryError(f"write the file system of {path} to disk", os.strerror(number), "Check the disk.", failure)
    finally:
        os.close(descriptor)


def ctime_is_proof(path: str) -> bool:
    """Whether an unchanged ctime on the file system of ``path`` proves unchanged bytes."""
    libc = ctypes.CDLL(None, use_errno=True)
    answer = (ctypes.c_long * 32)()
    if libc.statfs(os.fsencode(path), ctypes.byref(answer)) != 0:
        return False
    return (answer[0] & 0xFFFFFFFF) in _CTIME_FILE_SYSTEMS


def _walk(root: bytes, vanishing: bool) -> t.Iterator[tuple[bytes, os.stat_result]]:
    """Relative names below ``root``, itself first as the empty name, each directory's names sorted."""
    top = os.lstat(root)
    yield b"", top
    if not stat.S_ISDIR(top.st_mode):
        return
    waiting = [b""]
    while waiting:
        folder = waiting.pop()
        try:
            with os.scandir(_join(root, folder)) as found:
                names = sorted(item.name for item in found)
        except OSError as exc:
            if vanishing and exc.errno in (errno.ENOENT, errno.ENOTDIR):
                continue
            raise DeliveryError(
                f"read the directory {printable(_join(root, folder))}", os.strerror(exc.errno or 0), "Check the disk.", "snapshot"
            ) from exc
        below = []
        for name in names:
            path = folder + b"/" + name if folder else name
            try:
                info = os.lstat(_join(root, path))
            except FileNotFoundError:
                if not vanishing:
                    raise
                continue
            yield path, info
            if stat.S_ISDIR(info.st_mode):
                below.append(path)
        waiting.extend(reversed(below))


def _entry(root: bytes, path: bytes, info: os.stat_result, leader: bytes) -> Entry:
    full = _join(root, path)
    kind, content, size = "file", "", info.st_size
    if stat.S_ISDIR(info.st_mode):
        kind, size = "directory", 0
    elif stat.S_ISLNK(info.st_mode):
        kind, content, size = "link", _text(os.readlink(full)), 0
    elif stat.S_ISFIFO(info.st_mode):
        kind, size = "fifo", 0
    elif stat.S_ISCHR(info.st_mode):
        kind, content, size = "character", str(info.st_rdev), 0
    elif stat.S_ISBLK(info.st_mode):
        kind, content, size = "block", str(info.st_rdev), 0
    mode = 0 if kind == "link" else stat.S_IMODE(info.st_mode)
    return Entry(
        path, kind, mode, info.st_uid, info.st_gid, size, content, _xattrs(full), leader, info.st_mtime_ns, info.st_ctime_ns, info.st_ino
    )


def _xattrs(path: bytes) -> tuple[tuple[str, str], ...]:
    try:
        names = sorted(os.listxattr(path, follow_symlinks=False))
        return tuple((name, base64.b64encode(os.getxattr(path, name, follow_symlinks=False)).decode()) for name in names)
    except OSError as exc:
        if exc.errno in (errno.ENOTSUP, errno.ENODATA, errno.EPERM):
            return ()
        raise


def unchanged(now: Entry, earlier: Entry, earlier_started_ns: int) -> bool:
    """Whether ``now`` is for sure what an earlier scan read, on a file system where the ctime is a proof."""
    if now.kind == "file" and not earlier.content:
        return False
    return now.kind == earlier.kind and _times(now) == _times(earlier) and now.ctime_ns < earlier_started_ns - _RACY_NS


def _is_unchanged(earlier: Entry, info: os.stat_result, earlier_started_ns: int) -> bool:
    """The same before anything but the name's ``lstat`` is read, which is all that a freeze has time for."""
    if earlier.kind == "file" and not earlier.content:
        return False
    now = (info.st_ino, info.st_size if stat.S_ISREG(info.st_mode) else 0, info.st_mtime_ns, info.st_ctime_ns)
    return now == _times(earlier) and info.st_ctime_ns < earlier_started_ns - _RACY_NS


def _times(entry: Entry) -> tuple[int, int, int, int]:
    return entry.inode, entry.size, entry.mtime_ns, entry.ctime_ns


def _checksum(result: Scan, pending: t.Sequence[tuple[bytes, os.stat_result]], vanishing: bool) -> None:
    if not pending:
        return
    root = os.fsencode(result.root)
    with concurrent.futures.ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        answers = pool.map(lambda item: _sha256(_join(root, item[0])), pending)
        for (path, _info), content in zip(pending, answers):
            if content is None:
                if not vanishing:
                    raise DeliveryError(
                        f"read {printable(_join(root, path))}",
                        "it went away while it was read",
                        "Something outside of the frozen containers writes there; stop it.",
                        "snapshot",
                    )
                del result.entries[path]
            else:
                result.entries[path] = replace(result.entries[path], content=content)


def _sha256(path: bytes) -> str | None:
    """Hex checksum of a file's bytes; ``None`` when it is gone or no longer a plain file."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as exc:
        if exc.errno in (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO):
            return None
        raise
    total = hashlib.sha256()
    with os.fdopen(descriptor, "rb", buffering=0) as handle:
        while True:
            block = handle.read(_BLOCK)
            if not block:
                return total.hexdigest()
            total.update(block)


def _join(root: bytes, path: bytes) -> bytes:
    return root + b"/" + path if path else root


def _text(path: bytes) -> str:
    return base64.b64encode(path).decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text)
