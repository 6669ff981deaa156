# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a service's ``ready`` becomes; hosts themselves are in tests/integration/test_rollout.py."""

from __future__ import annotations

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.probes import parse_checks
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import Lease, create_release, read_journal
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.host import Host, ready_check
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.plan import ServiceSpec, Spec


@pytest.mark.parametrize(
    ("ready", "check"),
    [
        (None, {"container": {"name": "c"}}),
        ({"http": None}, {"container": {"name": "c"}}),
        ({"http": "/r"}, {"http": {"url": "http://[fd00::1]:80/r"}}),
        ({"tcp": True}, {"tcp": {"host": "fd00::1", "port": 80}}),
        ({"grpc": True}, {"grpc": {"host": "fd00::1", "port": 80}}),
        ({"grpc": {"service": "a", "tls": True}}, {"grpc": {"host": "fd00::1", "port": 80, "service": "a", "tls": True}}),
        ({"command": ["true"]}, {"command": {"argv": ["true"], "container": "c"}}),
        ({"log": "^up"}, {"log": {"container": "c", "pattern": "^up"}}),
    ],
)
def test_each_kind_is_a_check(ready, check):
    found = ready_check(ServiceSpec("web", port=80, ready=ready), lambda: "fd00::1", "c")
    assert found == check
    parse_checks([found])


@pytest.mark.parametrize(
    "ready", [{"tcp": False}, {"http": ""}, {"grpc": {}}, {"log": ""}, {"htpp": "/"}, {"http": "/", "log": "a"}, {"grpc": True, "tcp": True}]
)
def test_what_is_no_probe_is_refused(ready):
    with pytest.raises(DeliveryError, match="services.web.ready: it has"):
        ready_check(ServiceSpec("web", port=80, ready=ready), lambda: "a", "c")


@pytest.mark.parametrize("kind", ["http", "tcp", "grpc"])
def test_what_is_asked_at_a_port_needs_one(kind):
    with pytest.raises(DeliveryError, match="there is no port to ask"):
        ready_check(ServiceSpec("web", ready={kind: True}), lambda: "a", "c")


def test_steps_of_the_controller_are_written_once_and_renew_its_lease(tmp_path):
    deploy_dir, release_id = str(tmp_path), "20261121-100000-sha-a"
    create_release(deploy_dir, {"id": release_id, "tag": "sha-a"}, "r1")
    steps = [{"step": "verifying", "event": "end"}, {"step": "committed", "event": "begin", "data": {"why": "it answered"}, "ttl": 77}]

    def host(run_id):
        spec = Spec.from_dict({"project_dir": deploy_dir, "project": "shop", "release_id": release_id})
        return Host(spec, run_id)

    with pytest.raises(DeliveryError, match="lease lost"):
        host("r1").tell(steps)
    Lease(deploy_dir, "r1").acquire("r1", {}, release_id, ttl=900)
    host("r1").tell(steps)
    host("r1").tell(steps)
    written = [(entry["step"], entry["event"], entry["data"]) for entry in read_journal(deploy_dir, release_id)][4:]
    assert written == [("verifying", "end", {}), ("committed", "begin", {"why": "it answered"})]
    assert {key: Lease(deploy_dir).read()[key] for key in ("step", "ttl")} == {"step": "committed", "ttl": 77}
    # Another host of the release has its own journal, and no lease to renew.
    (tmp_path / "releases" / release_id / "release.json").unlink()
    host("r2").tell([{"step": "verifying", "event": "begin"}])
    assert len(read_journal(deploy_dir, release_id)) == 6
