# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tells the module ``release`` who is asking: only the controller knows its own process, user and CI job."""

from __future__ import annotations

import getpass
import os
import socket
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.releases import boot_id, pid_namespace, process_started
from ansible_collections.selfhost.delivery.plugins.modules import release
from ansible_collections.selfhost.delivery.plugins.plugin_utils.in_worker import InWorker


def ci_url(environ: t.Mapping[str, str]) -> str:
    """The page of the CI job this runs in, empty outside of one."""
    for direct in ("CI_JOB_URL", "CI_PIPELINE_URL", "BUILD_URL"):
        if environ.get(direct):
            return environ[direct]
    for prefix in ("GITHUB", "GITEA", "FORGEJO"):
        server, repository, run = (environ.get(f"{prefix}_{name}") for name in ("SERVER_URL", "REPOSITORY", "RUN_ID"))
        if server and repository and run:
            number = environ.get(f"{prefix}_RUN_NUMBER", run) if prefix != "GITHUB" or environ.get("GITEA_ACTIONS") else run
            return f"{server.rstrip('/')}/{repository}/actions/runs/{number}"
    return ""


def describe_controller(pid: int) -> dict[str, t.Any]:
    """The holder of a lease taken for the controller process ``pid``."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        user = str(os.getuid())
    return {
        "user": user,
        "host": socket.gethostname(),
        "pid": pid,
        "pid_started": process_started(pid),
        "boot_id": boot_id(),
        "pid_namespace": pid_namespace(),
        "ci_url": ci_url(os.environ),
    }


class ActionModule(InWorker):
    """Fills ``holder`` and ``run_id`` and runs the module where the task runs."""

    module = release

    def run(self, tmp: t.Any = None, task_vars: dict[str, t.Any] | None = None) -> dict[str, t.Any]:
        # Each task runs in a forked worker; its parent is the ansible-playbook that lives as long as the run does.
        holder = describe_controller(os.getppid())
        arguments = self._task.args
        self._task.args = {
            **arguments,
            "holder": arguments.get("holder") or holder,
            "run_id": arguments.get("run_id") or f"{holder['host']}-{holder['pid']}-{holder['pid_started']}",
        }
        return super().run(tmp, task_vars)
