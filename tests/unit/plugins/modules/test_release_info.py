# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is told of a deploy dir."""

from __future__ import annotations

import json
import os

import pytest
from ansible.module_utils.testing import patch_module_args

from ansible_collections.selfhost.delivery.plugins.module_utils import releases
from ansible_collections.selfhost.delivery.plugins.modules import release_info


@pytest.fixture
def call(tmp_path, capsys):
    def run_module(**options):
        with (
            patch_module_args({"app": "shop", "environment": "production", "deploy_dir": str(tmp_path), **options}),
            pytest.raises(SystemExit),
        ):
            release_info.main()
        return json.loads(capsys.readouterr().out)

    return run_module


def make(deploy_dir, release_id, end=None):
    record = {"id": release_id, "tag": release_id[16:], "kind": "promote", "run_id": "r1", "started": releases.timestamp()}
    releases.create_release(str(deploy_dir), record, "r1")
    if end:
        releases.finish_release(str(deploy_dir), release_id, "r1", end)


def test_nothing_yet(call, tmp_path):
    result = call(deploy_dir=str(tmp_path / "none"))
    assert result["releases"] == [] and result["table"] == [] and result["records"] == {}
    assert [result[key] for key in ("lock", "current", "previous_committed", "open")] == [None] * 4
    assert call(deploy_dir=None)["releases"] == []


def test_what_runs_and_what_is_owed(call, tmp_path):
    make(tmp_path, "20261121-010000-sha-a", "committed")
    make(tmp_path, "20261121-020000-sha-b", "committed")
    make(tmp_path, "20261121-030000-sha-c")
    releases.Lease(str(tmp_path)).acquire("r1", {"user": "deploy", "host": "ci-1"}, "20261121-030000-sha-c", -1)
    before = sorted(os.listdir(tmp_path))
    result = call()
    assert result["changed"] is False and sorted(os.listdir(tmp_path)) == before
    assert result["current"]["tag"] == "sha-b"
    assert result["previous_committed"]["tag"] == "sha-a" and "state" not in result["previous_committed"]
    assert (result["open"]["id"], result["open"]["action"]) == ("20261121-030000-sha-c", "abort")
    assert result["lock"]["status"] == "expired" and result["lock"]["text"].startswith("deploy@ci-1, since ")
    assert [(one["tag"], one["result"], one["current"]) for one in result["releases"]] == [
        ("sha-c", "open", False),
        ("sha-b", "committed", True),
        ("sha-a", "committed", False),
    ]
    assert len(result["table"]) == 4 and "20261121-020000-sha-b *" in result["table"][2]
    assert [one["tag"] for one in call(limit=1)["releases"]] == ["sha-c"]
    assert call(limit=1)["previous_committed"]["tag"] == "sha-a"
