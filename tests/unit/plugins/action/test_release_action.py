# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Who holds the lock, told by a real run of Ansible."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys

import pytest

from ansible_collections.selfhost.delivery.plugins.action import release as action
from ansible_collections.selfhost.delivery.plugins.module_utils import releases

COLLECTIONS = os.path.abspath(action.__file__).partition(f"{os.sep}ansible_collections{os.sep}")[0]


def ansible(tmp_path, arguments, **environ):
    command = [
        sys.executable,
        "-m",
        "ansible",
        "adhoc",
        "localhost",
        "-c",
        "local",
        "-m",
        "selfhost.delivery.release",
        "-a",
        json.dumps(arguments),
    ]
    inherited = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("CI_", "BUILD_", "GITHUB_", "GITEA_", "FORGEJO_", "ANSIBLE_"))
    }
    inherited.update(
        ANSIBLE_COLLECTIONS_PATH=COLLECTIONS,
        ANSIBLE_LOAD_CALLBACK_PLUGINS="true",
        ANSIBLE_STDOUT_CALLBACK="ansible.builtin.minimal",
        ANSIBLE_LOCAL_TEMP=str(tmp_path / "tmp"),
        ANSIBLE_REMOTE_TEMP=str(tmp_path / "tmp"),
        ANSIBLE_NOCOLOR="1",
        ANSIBLE_PYTHON_INTERPRETER=sys.executable,
        PYTHONDONTWRITEBYTECODE="1",
        **environ,
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=inherited, cwd=tmp_path)
    return process.pid, process.communicate(timeout=120)[0]


def test_the_lock_names_the_ansible_process_and_its_end_is_noticed(tmp_path):
    deploy_dir = tmp_path / "shop"
    deploy_dir.mkdir()
    arguments = {"app": "shop", "environment": "production", "deploy_dir": str(deploy_dir), "state": "started", "tag": "sha-a"}
    pid, output = ansible(tmp_path, arguments, CI_JOB_URL="https://ci.example.com/7")
    assert "CHANGED" in output, output
    lock = releases.Lease(str(deploy_dir)).read()
    holder = lock["holder"]
    assert holder["pid"] == pid and holder["host"] == socket.gethostname() and holder["ci_url"] == "https://ci.example.com/7"
    assert holder["boot_id"] == releases.boot_id() and holder["pid_namespace"] == releases.pid_namespace()
    assert lock["run_id"] == f"{holder['host']}-{pid}-{holder['pid_started']}"
    # That ansible has ended: nobody has to wait for its lease.
    assert releases.Lease.status(lock) == "dead"
    _pid, output = ansible(tmp_path, {**arguments, "tag": "sha-b"})
    assert '"action": "abort"' in output and lock["run_id"] in output, output


@pytest.mark.parametrize(
    "environ, url",
    [
        ({}, ""),
        ({"CI_JOB_URL": "https://gitlab.example.com/j/1"}, "https://gitlab.example.com/j/1"),
        (
            {"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "o/r", "GITHUB_RUN_ID": "9", "GITHUB_RUN_NUMBER": "2"},
            "https://github.com/o/r/actions/runs/9",
        ),
        (
            {
                "GITHUB_SERVER_URL": "https://git.example.com/",
                "GITHUB_REPOSITORY": "o/r",
                "GITHUB_RUN_ID": "9",
                "GITHUB_RUN_NUMBER": "2",
                "GITEA_ACTIONS": "true",
            },
            "https://git.example.com/o/r/actions/runs/2",
        ),
        (
            {
                "FORGEJO_SERVER_URL": "https://code.example.com",
                "FORGEJO_REPOSITORY": "o/r",
                "FORGEJO_RUN_ID": "9",
                "FORGEJO_RUN_NUMBER": "2",
            },
            "https://code.example.com/o/r/actions/runs/2",
        ),
        ({"GITHUB_SERVER_URL": "https://github.com", "GITHUB_REPOSITORY": "o/r"}, ""),
    ],
)
def test_ci_url(environ, url):
    assert action.ci_url(environ) == url
