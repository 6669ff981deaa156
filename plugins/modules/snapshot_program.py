#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Leaves on the host, as one file, what the modules for snapshots and drills are made of."""

from __future__ import annotations

DOCUMENTATION = r"""
module: snapshot_program
short_description: Write the program with which a host takes sets and does drills by itself
version_added: 0.1.0
description:
  - Packs the Python code that M(selfhost.delivery.kopia_snapshot), M(selfhost.delivery.restic_snapshot) and
    M(selfhost.delivery.snapshot_drill) run into one file that C(python3) runs, so that a timer of the host does just what the modules do.
  - C(python3 <path> snapshot <configuration>) takes a set, C(python3 <path> drill <configuration>) does a drill.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
attributes:
  check_mode:
    support: full
  diff_mode:
    support: none
  idempotent:
    support: full
options:
  path:
    description: The file; its folder must exist.
    type: path
    required: true
seealso:
  - module: selfhost.delivery.snapshot_drill
"""

EXAMPLES = r"""
- name: Have the program
  selfhost.delivery.snapshot_program:
    path: /usr/local/lib/selfhost-delivery/snapshots.pyz
"""

RETURN = r"""
path:
  description: The file.
  returned: success
  type: str
  sample: /usr/local/lib/selfhost-delivery/snapshots.pyz
"""

import io
import os
import sys
import zipfile

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.data import timed
from ansible_collections.selfhost.delivery.plugins.module_utils.files import write_atomically

# Loaded by name only when a repository is used; here, so that they are packed.
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import kopia, restic

_ROOT = "ansible_collections.selfhost.delivery.plugins.module_utils"
_MAIN = f"import sys\n\nfrom {timed.__name__} import main\n\nsys.exit(main(sys.argv[1:]))\n"


def packed() -> bytes:
    """The same bytes for the same code, wherever it is packed."""
    files = {"__main__.py": _MAIN}
    for name in sorted(sys.modules):
        found = sys.modules[name]
        loader = getattr(found, "__loader__", None)
        if name.startswith(f"{_ROOT}.") and not hasattr(found, "__path__") and loader is not None:
            files[name.replace(".", "/") + ".py"] = loader.get_source(name)
            parts = name.split(".")[:-1]
            for count in range(1, len(parts) + 1):
                files.setdefault("/".join(parts[:count]) + "/__init__.py", "")
        elif name.startswith(f"{_ROOT}.") and loader is not None:
            try:
                files[name.replace(".", "/") + "/__init__.py"] = loader.get_source(name) or ""
            except (AttributeError, ImportError):
                continue  # a folder without one
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in sorted(files.items()):
            archive.writestr(zipfile.ZipInfo(name, (2026, 1, 1, 0, 0, 0)), text)
    return buffer.getvalue()


def main() -> None:
    module = AnsibleModule(argument_spec=dict(path=dict(type="path", required=True)), supports_check_mode=True)
    path = module.params["path"]
    if not (timed.__name__ in sys.modules and kopia.__name__ in sys.modules and restic.__name__ in sys.modules):
        raise AssertionError("what was imported is loaded")
    content = packed()
    try:
        with open(path, "rb") as handle:
            changed = handle.read() != content
    except FileNotFoundError:
        changed = True
    if changed and not module.check_mode:
        if not os.path.isdir(os.path.dirname(path)):
            module.fail_json(msg=f"Writing {path}: its folder does not exist. Make it first.", failure_class="config")
        write_atomically(path, content, mode=0o644)
    module.exit_json(changed=changed, path=path)


if __name__ == "__main__":
    main()
