# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a release needs on its hosts is packed before a task asks for it, and nothing is left where the run is over before; real runs of Ansible."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.plugin_utils import ahead

COLLECTIONS = os.path.abspath(ahead.__file__).partition(f"{os.sep}ansible_collections{os.sep}")[0]
PLAY = """
- hosts: shop
  gather_facts: false
  tasks:
    - selfhost.delivery.app_spec:
        app: {name: shop, images: {app: r.example.com/app}, services: {web: {image: app}}}
        environment: production
      delegate_to: localhost
      register: told
    - ansible.builtin.command: sh -c 'until ls %s/*/ansiballz_cache/*.modules.%s-*; do sleep 0.05; done'
      delegate_to: localhost
      when: wait | bool
"""


def run(tmp_path: Path, last: str, wait: bool, connection: str) -> list[str]:
    """The modules that were packed, when the last one was."""
    temporary = tmp_path / "tmp"
    (tmp_path / "play.yml").write_text(PLAY % (temporary, last))
    environment = {**os.environ, "ANSIBLE_COLLECTIONS_PATH": COLLECTIONS, "ANSIBLE_LOCAL_TEMP": str(temporary), "ANSIBLE_NOCOLOR": "1"}
    (tmp_path / "hosts").write_text(f"shop ansible_connection={connection}\nlocalhost ansible_connection=local\n")
    options = ["-e", f"wait={wait}", "-e", f"ansible_python_interpreter={sys.executable}"]
    command = [sys.executable, "-m", "ansible", "playbook", "-v", "-i", str(tmp_path / "hosts"), *options, str(tmp_path / "play.yml")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [word.rpartition(".")[2].partition("-")[0] for word in done.stdout.split() if "ansiballz_cache" in word and "sh -c" not in word]


@pytest.mark.parametrize(("connection", "last"), [("ssh", "snapshot_engine_info"), ("local", "compose_rollout")])
def test_what_is_needed_is_packed_meanwhile(tmp_path: Path, connection: str, last: str) -> None:
    assert any(last in one for one in run(tmp_path, last, True, connection))


def test_a_run_that_is_over_leaves_nothing(tmp_path: Path) -> None:
    run(tmp_path, "release", False, "ssh")
    deadline = time.monotonic() + 60
    while any((tmp_path / "tmp").iterdir()):
        assert time.monotonic() < deadline, list((tmp_path / "tmp").rglob("*"))
        time.sleep(0.05)
