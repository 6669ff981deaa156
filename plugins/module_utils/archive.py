# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A program that Python runs on a host on its own, in one file: one part of this collection and all that it needs of the rest.

A module is sent to a host with everything it imports; that is what goes into the archive. So nothing lists files twice.
"""

from __future__ import annotations

import io
import os
import sys
import typing as t
import zipfile

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import write_atomically

PACKAGE = __name__.rpartition(".")[0]
MODE = 0o644
#: Zip knows no time before; the same sources make the same bytes.
MOMENT = (1980, 1, 1, 0, 0, 0)


def put_program(path: str, main: str, check_mode: bool = False) -> bool:
    """Have the archive that runs ``main(argv)`` of the module of that name at ``path``, whose folder exists; whether it changed."""
    content = pack(main)
    try:
        with open(path, "rb") as handle:
            changed = handle.read() != content or os.fstat(handle.fileno()).st_mode & 0o777 != MODE
    except FileNotFoundError:
        changed = True
    if changed and not check_mode:
        try:
            write_atomically(path, content, MODE)
        except OSError as exc:
            raise DeliveryError(f"Writing {path}", exc.strerror or str(exc), "Its folder must exist and be writable.", "config") from exc
    return changed


def pack(main: str) -> bytes:
    """The archive, the same bytes for the same sources: what is imported of this collection, and a start that calls ``main``."""
    files = {"__main__.py": f"import sys\n\nfrom {main} import main\n\nsys.exit(main(sys.argv[1:]))\n".encode()}
    for name, module in sorted(sys.modules.items()):
        if name.startswith(f"{PACKAGE}.") and name != __name__:
            files.update({path: b"" for path in _parents(name) if path not in files})
            spec = module.__spec__
            folder = spec is not None and spec.submodule_search_locations is not None
            files[f"{name.replace('.', '/')}{'/__init__' if folder else ''}.py"] = _source(spec)
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, content in sorted(files.items()):
            entry = zipfile.ZipInfo(path, MOMENT)
            entry.external_attr = MODE << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return target.getvalue()


def _parents(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return ["/".join((*parts[: number + 1], "__init__.py")) for number in range(len(parts))]


def _source(spec: t.Any) -> bytes:
    if spec is None or not spec.has_location:
        return b""  # a folder without a file of its own
    return spec.loader.get_data(spec.origin)
