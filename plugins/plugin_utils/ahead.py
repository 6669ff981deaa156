# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Has Ansible pack modules for the hosts while the controller still works out what they will be told.

Ansible packs each module once a run, at the task that first needs it, and a release waits a third of a second for it each time. Done here
by a process of its own, since a worker ends with its task; Ansible's own lock makes a task that comes too early wait for it. Nothing
depends on it: where it fails, the task packs the module itself.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import typing as t

from ansible import constants as C
from ansible.executor import module_common
from ansible.plugins.action import ActionBase
from ansible.plugins.loader import module_loader

from ansible_collections.selfhost.delivery.plugins.module_utils.detached import detached
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import process_started


def pack_ahead(action: ActionBase, names: t.Sequence[str], variables: t.Mapping[str, t.Any]) -> None:
    """Pack the modules ``names`` of this collection in this order, as for a host with ``variables``."""
    controller = os.getppid()
    started = process_started(controller)
    # The interpreter is no part of what is packed; without one Ansible would go and look for it on the host.
    settings = {**variables, "ansible_python_interpreter": sys.executable}

    def pack() -> None:
        with contextlib.suppress(Exception):
            for name in names:
                if process_started(controller) != started:
                    break
                module = f"selfhost.delivery.{name}"
                module_common.modify_module(
                    module_name=module,
                    module_path=module_loader.find_plugin_with_context(module).plugin_resolved_path,
                    module_args={},
                    templar=action._templar,
                    task_vars=settings,
                    module_compression=C.config.get_config_value("DEFAULT_MODULE_COMPRESSION", variables=settings),
                )
        if process_started(controller) != started:  # it has removed its folder, and here it may have been made again
            shutil.rmtree(C.DEFAULT_LOCAL_TMP, ignore_errors=True)

    with contextlib.suppress(OSError):
        detached(pack)
