# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The archive that Python runs on a host on its own: ``rollout/boot.py`` and all of this collection that it needs.

A module is sent to a host with everything it imports; that is what goes into the archive. So nothing lists files twice.
"""

from __future__ import annotations

import io
import sys
import typing as t
import zipfile

# All kinds of edges: a rollout imports only the one it uses, and only what is imported here is sent and packed.
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout import boot
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import haproxy, nginx, none, traefik

EDGES = (haproxy, nginx, none, traefik)
PACKAGE = boot.__name__.partition(".rollout.")[0]
MAIN = f"import sys\n\nfrom {boot.__name__} import main\n\nsys.exit(main(sys.argv[1:]))\n"
#: Zip knows no time before; the same sources make the same bytes.
MOMENT = (1980, 1, 1, 0, 0, 0)


def pack() -> bytes:
    """The archive, the same bytes for the same sources."""
    files = {"__main__.py": MAIN.encode()}
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
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, content, zipfile.ZIP_DEFLATED)
    return target.getvalue()


def _parents(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return ["/".join((*parts[: number + 1], "__init__.py")) for number in range(len(parts))]


def _source(spec: t.Any) -> bytes:
    if spec is None or not spec.has_location:
        return b""  # a folder without a file of its own
    return spec.loader.get_data(spec.origin)
