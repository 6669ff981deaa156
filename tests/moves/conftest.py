# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Three hosts, and one more that keeps the snapshots of all of them, reached over SFTP. The app serves on the first."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml
from e2e import shopfront
from e2e.site_under_test import REPOSITORY
from hosts.machines import Fleet, Machine
from hosts.site_of_hosts import DEPLOY_DIR, Hosts, HostsSite

sys.path[:0] = [str(REPOSITORY / "tests" / "integration")]
from registry_fixture import start_registry  # noqa: E402

# As a user writes it who wants sets kept elsewhere; the key is the one that logs in everywhere here.
SSH = "Host *\n  IdentityFile /delivery/client_key\n  StrictHostKeyChecking accept-new\n"


class MovingSite(HostsSite):
    """``app_hosts`` is ``home``; the other hosts are in the inventory with the same variables."""

    home: str = "app-1"
    store: str = ""

    def machine(self, name: str) -> Machine:
        return next(one for one in self.hosts.machines if one.name == name)

    def live_at(self, name: str, change: t.Callable[[dict[str, t.Any]], None] | None = None) -> None:
        """Make ``name`` the only one of app_hosts."""
        self.home = name
        self.write_inventories(change)

    def write_inventories(self, change: t.Callable[[dict[str, t.Any]], None] | None = None) -> None:
        super().write_inventories(change)
        path = self.production.inventory / "hosts.yml"
        written = yaml.safe_load(path.read_text())["app_hosts"]
        written["vars"]["delivery_app"]["public"]["url"] = f"http://{self.machine(self.home).address}"
        written["vars"]["delivery_app"]["drill"] = {"services": ["keeper"]}
        written["vars"]["snapshots_repository"] = f"sftp:root@{self.store}:/srv/shopfront"
        others = {name: host for name, host in written["hosts"].items() if name != self.home}
        inventory = {
            "all": {
                "vars": written["vars"],
                "children": {"app_hosts": {"hosts": {self.home: written["hosts"][self.home]}}, "other_hosts": {"hosts": others}},
            }
        }
        path.write_text(yaml.safe_dump(inventory, sort_keys=False))

    def rows(self, name: str) -> str:
        return self.machine(name).run("cat", "/var/lib/docker/volumes/shopfront_data/_data/rows", check=False).strip()

    def write_row(self, name: str, text: str) -> None:
        self.machine(name).run("sh", "-c", f"echo {text} > /var/lib/docker/volumes/shopfront_data/_data/rows")


@pytest.fixture(scope="session")
def site(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[MovingSite]:
    folder = Path(tmp_path_factory.mktemp("moves"))
    fleet = Fleet(folder, ("app-1", "app-2", "app-3", "store"))
    registry = None
    try:
        fleet.start()
        registry = start_registry(folder / "registry", htpasswd=True, tls=True, also=fleet.gateway)
        *apps, store = fleet.machines
        hosts = Hosts("production", folder / "inventories" / "production", Path(DEPLOY_DIR), 80, folder, apps)
        name = f"{fleet.gateway}:{registry.address.rpartition(':')[2]}"
        site = MovingSite(folder, registry, hosts, hosts, registry_name=name, client_key=str(folder / "keys" / "client_key"))
        site.store = store.address
        login = base64.b64encode(f"{registry.username}:{registry.password}".encode()).decode()
        (folder / "docker").mkdir(mode=0o700)
        (folder / "docker" / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": login}}}))
        (folder / "compose.yaml").write_text(shopfront.COMPOSE)
        site.hand_out_keeper()
        for machine in apps:
            machine.run("sh", "-c", f"mkdir -p -m 700 /root/.ssh && printf '%s' '{SSH}' > /root/.ssh/config")
        site.write_inventories()
        site.run("setup", hosts, timeout=1800).must_succeed()
        site.promote(hosts, site.build("sha-one")).must_succeed()
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
