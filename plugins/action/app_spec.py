# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module ``app_spec`` in Ansible's worker where that is the same. A release begins with it: what it needs next is packed then."""

from __future__ import annotations

import typing as t

from ansible_collections.selfhost.delivery.plugins.modules import app_spec
from ansible_collections.selfhost.delivery.plugins.plugin_utils.ahead import pack_ahead
from ansible_collections.selfhost.delivery.plugins.plugin_utils.in_worker import InWorker

#: What a release has run on its hosts, in this order; on the controller itself all but one run in the worker.
ON_HOSTS = ("release", "compose_rollout", "snapshot_engine_info")
ON_CONTROLLER = ("compose_rollout",)


class ActionModule(InWorker):
    module = app_spec

    def run(self, tmp: t.Any = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        result = super().run(tmp, task_vars)
        variables = task_vars or {}
        if not result.get("failed"):
            local = self._templar.template(variables.get("ansible_connection", "")) == "local"
            pack_ahead(self, ON_CONTROLLER if local else ON_HOSTS, variables)
        return result
