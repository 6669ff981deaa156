# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A module gives the same result in Ansible's worker as in an interpreter of its own, and is run there only where it may be.

Driven by real runs of Ansible; which way was taken is told by ``-vvv``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from ansible_collections.selfhost.delivery.plugins.action.release import describe_controller
from ansible_collections.selfhost.delivery.plugins.plugin_utils import in_worker

COLLECTIONS = os.path.abspath(in_worker.__file__).partition(f"{os.sep}ansible_collections{os.sep}")[0]
HERE, APART = "in the worker", "Using module file"
SPEC = {
    "app": {"name": "shop", "compose": ["compose.yaml"], "services": {"web": {"image": "registry.example.com/shop/web"}}},
    "environment": "production",
}


def play(tmp_path, task, *, variables=None, environ=None, options=("-vvv",)):
    """What Ansible says of a play with one task, and of the warnings in its result."""
    variables = {"ansible_connection": "local", "ansible_python_interpreter": sys.executable, **(variables or {})}
    plays = [{"hosts": "all", "gather_facts": False, "tasks": [{"register": "result", **task}, {"debug": {"var": "result.warnings"}}]}]
    (tmp_path / "play.yml").write_text(json.dumps(plays))
    (tmp_path / "hosts.json").write_text(json.dumps({"all": {"hosts": {"here": variables}}}))
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")},
        "ANSIBLE_COLLECTIONS_PATH": COLLECTIONS,
        "ANSIBLE_HOME": str(tmp_path / "home"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_CALLBACK_RESULT_FORMAT": "json",
        "PYTHONDONTWRITEBYTECODE": "1",
        **(environ or {}),
    }
    command = [sys.executable, "-m", "ansible", "playbook", "-i", "hosts.json", *options, "play.yml"]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=tmp_path, timeout=120, check=False
    )
    return done.stdout


def result_of(output):
    """The result that the default callback shows with ``-v``."""
    start = output.index("=> {") + 3
    return json.JSONDecoder().raw_decode(output[start:])[0]


def both_ways(tmp_path, task, *options):
    here = play(tmp_path, task, options=("-vvv", *options))
    apart = play(tmp_path, task, environ={"DELIVERY_IN_WORKER": "0"}, options=("-vvv", *options))
    assert HERE in here and APART not in here, here
    assert APART in apart and HERE not in apart, apart
    return here, apart


def release(tmp_path, **arguments):
    deploy_dir = tmp_path / "shop"
    deploy_dir.mkdir(exist_ok=True)
    given = {"app": "shop", "environment": "production", "deploy_dir": str(deploy_dir), "state": "unlocked", **arguments}
    return {"selfhost.delivery.release": given}


@pytest.mark.parametrize(
    "task",
    [
        pytest.param({"selfhost.delivery.app_spec": SPEC}, id="good"),
        pytest.param({"selfhost.delivery.app_spec": {**SPEC, "app": {"name": "shop"}}, "ignore_errors": True}, id="refused"),
        pytest.param({"selfhost.delivery.image_info": {"refrences": []}, "ignore_errors": True}, id="unknown-option"),
        pytest.param({"selfhost.delivery.snapshot_engine_info": {"repository": "/nowhere"}}, id="facts"),
        pytest.param(
            {"selfhost.delivery.ready_wait": {"checks": [{"name": "no", "kind": "nothing"}]}, "ignore_errors": True}, id="bad-value"
        ),
    ],
)
def test_the_result_is_the_same(tmp_path, task):
    here, apart = both_ways(tmp_path, task)
    assert result_of(here) == result_of(apart)


def test_check_mode_and_diff_reach_the_module(tmp_path):
    task = release(tmp_path, state="started", tag="sha-a")
    here, apart = both_ways(tmp_path, task, "--check", "--diff")
    assert result_of(here)["changed"] and result_of(apart)["changed"]
    assert os.listdir(tmp_path / "shop") == []


def test_a_warning_is_shown_and_part_of_the_result(tmp_path):
    holder = describe_controller(os.getpid())
    play(tmp_path, release(tmp_path, state="started", tag="sha-a", holder=holder, run_id="here"))
    here, apart = both_ways(tmp_path, release(tmp_path, state="started", tag="sha-b"), "--check")
    for output in (here, apart):
        assert output.count("[WARNING]: A real run would be refused") == 1, output
        shown = output[output.index('"result.warnings": [') :]
        assert "A real run would be refused" in shown, output


def test_secrets_are_taken_out_of_the_result(tmp_path):
    task = {
        "selfhost.delivery.notify": {"text": "shop runs", "webhooks": [{"url": "http://127.0.0.1:9/hunter2-of-the-hook"}]},
        "ignore_errors": True,
    }
    for output in both_ways(tmp_path, task):
        assert "hunter2" not in output


def test_one_item_of_a_loop_knows_nothing_of_the_one_before(tmp_path):
    task = {
        "selfhost.delivery.snapshot_engine_info": {"repository": "/nowhere", "engine": "{{ item }}"},
        "loop": ["kopia", "wrong", "restic"],
        "ignore_errors": True,
    }
    here, apart = both_ways(tmp_path, task)
    for output in (here, apart):
        assert '"engine": "kopia"' in output and "value of engine must be one of" in output and '"engine": "restic"' in output


@pytest.mark.parametrize(
    "task, variables",
    [
        pytest.param({"environment": {"HTTPS_PROXY": "http://proxy.example.com:3128"}}, {}, id="environment"),
        pytest.param({"become": True, "become_method": "ansible.builtin.su"}, {}, id="become"),
        pytest.param({"async": 30, "poll": 1}, {}, id="async"),
        pytest.param({}, {"ansible_python_interpreter": "/usr/bin/python3"}, id="other-python"),
        pytest.param({}, {"ansible_python_interpreter": "auto_silent"}, id="python-to-be-found"),
    ],
)
def test_where_it_would_not_be_the_same_it_runs_apart(tmp_path, task, variables):
    output = play(tmp_path, {"selfhost.delivery.snapshot_engine_info": {"repository": "/nowhere"}, **task}, variables=variables)
    assert APART in output and HERE not in output, output


def test_delegation_asks_the_host_that_it_goes_to(tmp_path):
    task = {"selfhost.delivery.snapshot_engine_info": {"repository": "/nowhere"}, "delegate_to": "localhost"}
    output = play(tmp_path, task, variables={"ansible_connection": "ssh", "ansible_host": "192.0.2.1"})
    assert HERE in output and "UNREACHABLE" not in output, output
