# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Three hosts, a registry that they and this machine reach, and the playbook `setup` run on them."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
from e2e import shopfront
from e2e.site_under_test import REPOSITORY

from .machines import Fleet
from .site_of_hosts import DEPLOY_DIR, Hosts, HostsSite

sys.path[:0] = [str(REPOSITORY / "tests" / "integration")]
from registry_fixture import start_registry  # noqa: E402


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[HostsSite]:
    folder = Path(tmp_path_factory.mktemp("hosts"))
    fleet = Fleet(folder, ("app-1", "app-2", "app-3"))
    registry = None
    try:
        fleet.start()
        registry = start_registry(folder / "registry", htpasswd=True, tls=True, also=fleet.gateway)
        hosts = Hosts("production", folder / "inventories" / "production", Path(DEPLOY_DIR), 80, folder, fleet.machines)
        name = f"{fleet.gateway}:{registry.address.rpartition(':')[2]}"
        site = HostsSite(folder, registry, hosts, hosts, registry_name=name, client_key=str(folder / "keys" / "client_key"))
        login = base64.b64encode(f"{registry.username}:{registry.password}".encode()).decode()
        (folder / "docker").mkdir(mode=0o700)
        (folder / "docker" / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": login}}}))
        (folder / "compose.yaml").write_text(shopfront.COMPOSE)
        site.hand_out_keeper()
        site.write_inventories()
        site.run("setup", hosts, timeout=600).must_succeed()
        yield site
    finally:
        fleet.stop()
        if registry is not None:
            argv = ["docker", "image", "ls", "--quiet", "--filter", f"reference={registry.address}/*/*"]
            images = subprocess.check_output(argv, text=True).split()
            if images:
                subprocess.run(["docker", "rmi", "--force", *set(images)], check=False, stdout=subprocess.DEVNULL)
            registry.stop()
        shutil.rmtree(folder, ignore_errors=True)
