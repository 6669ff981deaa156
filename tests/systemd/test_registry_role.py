# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The registry role on a host that systemd runs: what only a unit and a reboot can show. The rest is in tests/integration."""

from __future__ import annotations

import os
import signal
import sys
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / name) for name in ("", "integration"))]
from machine import REGISTRY, Machine  # noqa: E402
from test_host_roles import PULL, PUSH, Registry, begin  # noqa: E402
from test_registry_collection import assert_whole, push_image  # noqa: E402

from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transport import Interrupted  # noqa: E402

NAME = "delivery-registry"


@dataclass
class RegistryHost(Registry):
    """The registry of that host, as this machine reaches it."""

    machine: Machine = t.cast(Machine, None)

    @property
    def reference(self) -> str:
        return f"{self.machine.address}:{self.port}"

    @property
    def authority(self) -> Path:
        return self.folder / "ca.crt"

    @property
    def pid(self) -> int:
        return int(self.unit("MainPID"))

    def unit(self, name: str) -> str:
        return self.machine.unit(NAME, name)

    def variables(self, **changes: t.Any) -> dict[str, t.Any]:
        users = [{"name": "ci", "password": PUSH}, {"name": "production", "password": PULL}]
        own = {"registry_host": self.machine.address, "registry_users": users, "registry_ca_fetch_to": str(self.authority)}
        return {**self.machine.variables, **own, **changes}

    def disk(self) -> int:
        return int(self.machine.run("du", "--summarize", "--bytes", f"/srv/{NAME}/data/docker/registry/v2/blobs").split()[0])

    def await_answer(self) -> None:
        """Until it answers its users; the unit is up a moment before."""
        self.machine.run("curl", "--silent", "--insecure", "--retry", "60", "--retry-delay", "1", "--retry-connrefused", "--output", "/dev/null",
                         f"https://127.0.0.1:{self.port}/v2/")  # fmt: skip
        assert (self.status("ci", PUSH), self.status("production", PULL), self.status()) == ("200", "200", "401")


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[RegistryHost]:
    folder = tmp_path_factory.mktemp("systemd")
    machine = Machine(folder, "registry", REGISTRY)
    try:
        machine.start()
        # As the role leaves it where it installs the package itself.
        machine.run("systemctl", "disable", "--quiet", "--now", "docker-registry")
        made = RegistryHost(folder, 5000, machine=machine)
        assert made.run().ok().changed > 0
        yield made
    finally:
        machine.remove()


def test_it_answers_its_users_over_tls_and_a_second_run_changes_nothing(registry: RegistryHost) -> None:
    registry.await_answer()
    assert registry.status("ci", PULL) == "401" and registry.status("ci", PUSH, authority=False) == "000"
    assert registry.machine.run("ps", "-o", "user:20=", "-p", str(registry.pid)) == "docker-registry"
    assert (registry.unit("UnitFileState"), registry.unit("ActiveState")) == ("enabled", "active")
    pid = registry.pid
    assert registry.run().ok().changed == 0 and registry.pid == pid


def test_it_comes_back_by_itself_after_a_crash_and_with_the_machine(registry: RegistryHost) -> None:
    push_image(registry.client(), "team/app", "sha-kept", b"a layer")
    pid = registry.pid
    registry.machine.run("kill", "-KILL", str(pid))
    registry.await_answer()
    assert registry.pid != pid
    for hard in (False, True):
        registry.machine.reboot(hard)
        registry.await_answer()
        assert_whole(registry.client(), "team/app", "sha-kept")
        assert registry.takes_pushes()
    assert registry.run().ok().changed == 0


def test_a_collection_frees_the_disk_and_pushes_are_taken_again(registry: RegistryHost) -> None:
    client = registry.client()
    old = push_image(client, "team/app", "sha-old", b"what nobody needs" * 1000)
    push_image(client, "team/app", "sha-new", b"what somebody needs")
    client.delete_manifest("team/app", old.digest)
    before = registry.disk()
    assert registry.run(tasks_from="collect").ok().changed > 0
    assert before - registry.disk() >= old.blobs[1].size
    assert registry.takes_pushes() and not registry.unit("DropInPaths")
    client = registry.client()
    assert client.request("HEAD", f"/v2/team/app/blobs/{old.blobs[1].digest}", []).status == 404
    assert_whole(client, "team/app", "sha-new")
    assert registry.run(tasks_from="collect").ok().changed == 0


@pytest.mark.parametrize("hard", [False, True], ids=["reboot", "power failure"])
def test_a_reboot_in_the_middle_of_a_collection_ends_the_read_only_phase(registry: RegistryHost, hard: bool) -> None:
    client = registry.client()
    old = push_image(client, "team/app", f"sha-cut-{hard}", b"needed by nobody", str(hard).encode())
    client.delete_manifest("team/app", old.digest)
    with begin("registry", registry.variables(), tasks_from="collect", folder=registry.folder) as cut:
        try:
            while True:
                try:
                    if not registry.takes_pushes():
                        break
                except Interrupted:
                    pass  # the moment of the restart
                assert cut.poll() is None
                time.sleep(0.1)
        finally:
            os.killpg(cut.pid, signal.SIGKILL)
    # Without a reboot it stays so: the collection may go on.
    assert not registry.takes_pushes()
    registry.machine.reboot(hard)
    registry.await_answer()
    assert registry.takes_pushes(), "the registry came back read-only"
    assert_whole(registry.client(), "team/app", "sha-kept")
    assert registry.run(tasks_from="collect").ok().changed > 0
    assert registry.takes_pushes() and registry.run().ok().changed == 0


def test_it_is_stopped_and_stays_so(registry: RegistryHost) -> None:
    assert registry.run(tasks_from="stopped").ok().changed > 0
    registry.machine.reboot()
    assert registry.status("ci", PUSH) == "000"
    registry.run().ok()
    registry.await_answer()
    assert_whole(registry.client(), "team/app", "sha-kept")
