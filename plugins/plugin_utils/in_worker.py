# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs a module inside Ansible's worker where it would run on the controller anyway: no packing, no second interpreter.

A module that takes 10 ms costs 200 ms when it is packed, started and compiled; a promotion has about twenty of them. The worker is a
process forked for this one task, so the module has it for itself. Arguments and result go through the same serialisation as always.

It is done only where the ordinary way would run the same code under the same Python as the same user: a local connection, no ``become``,
no ``async``, no ``environment``, ``ansible_python_interpreter`` the controller's own. Everything else takes the ordinary way, as does all
of it with ``DELIVERY_IN_WORKER=0`` in the environment.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import types
import typing as t

from ansible.module_utils import basic
from ansible.module_utils.common.json import Direction, get_module_decoder, get_module_encoder
from ansible.plugins.action.normal import ActionModule as NormalAction
from ansible.utils.display import Display

# How arguments and results of a Python module are written down (ansible.executor.module_common).
_PROFILE = "legacy"


class InWorker(NormalAction):
    """Base of an action plugin that has the name of its module; a subclass names the module it runs."""

    module: types.ModuleType

    def run(self, tmp: t.Any = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        variables = task_vars or {}
        if not self._would_run_here(variables):
            return super().run(tmp, variables)
        Display().vvv(f"Running {self._task.action} in the worker", host=variables.get("inventory_hostname"))
        self._supports_check_mode = True  # as NormalAction: a module without it says so itself
        arguments = dict(self._task.args)
        self._update_module_args(self._task.action, arguments, variables)
        decoder = get_module_decoder(_PROFILE, Direction.MODULE_TO_CONTROLLER)
        return t.cast("dict[str, t.Any]", json.loads(self._output_of_module(arguments), cls=decoder))

    def _would_run_here(self, variables: dict[str, t.Any]) -> bool:
        if os.environ.get("DELIVERY_IN_WORKER") == "0" or self._connection.transport != "local":
            return False
        if self._connection.become is not None or self._task.async_val or any(self._task.environment or []):
            return False
        if self._task.delegate_to:
            variables = variables.get("ansible_delegated_vars", {}).get(self._task.delegate_to, {})
        return bool(self._templar.template(variables.get("ansible_python_interpreter", "")) == sys.executable)

    def _output_of_module(self, arguments: dict[str, t.Any]) -> str:
        encoder = get_module_encoder(_PROFILE, Direction.CONTROLLER_TO_MODULE)
        basic._ANSIBLE_ARGS = json.dumps({"ANSIBLE_MODULE_ARGS": arguments}, cls=encoder).encode()  # pylint: disable=protected-access
        basic._ANSIBLE_PROFILE = _PROFILE  # pylint: disable=protected-access
        output = io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.suppress(SystemExit):
            self.module.main()
        return output.getvalue()
