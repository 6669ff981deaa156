# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Each file has a site of its own, made by the playbook that users make theirs with; the files run side by side."""

from __future__ import annotations

import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest

from . import shopfront
from .site_under_test import REPOSITORY, Environment, Site

sys.path[:0] = [str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "integration")]
from registry_fixture import start_registry  # noqa: E402
from scheduling import GroupScheduling, longest_first  # noqa: E402


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def pytest_xdist_make_scheduler(config: pytest.Config, log: t.Any) -> GroupScheduling:
    """Tests of one file build on each other, but those of killed controllers need nothing but a site."""
    return GroupScheduling(config, log, ("test_faults",))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items, ("test_promote", "test_take_back", "test_bad_builds"), ())


@pytest.fixture(scope="module")
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Site]:
    """``ENVIRONMENTS`` of a test file names those that it promotes to; default both."""
    folder = Path(tmp_path_factory.mktemp("site"))
    folder.chmod(0o755)  # the edge's worker is another user
    registry = start_registry(folder / "registry", htpasswd=True, tls=True)
    environments = [
        Environment(name, folder / "inventories" / name, folder / name, _free_port(), folder / f"edge-{name}") for name in ("staging", "production")
    ]
    site = Site(folder, registry, *environments)
    (folder / "compose.yaml").write_text(shopfront.COMPOSE)
    login = base64.b64encode(f"{registry.username}:{registry.password}".encode()).decode()
    (folder / "docker").mkdir(mode=0o700)
    (folder / "docker" / "config.json").write_text(json.dumps({"auths": {registry.address: {"auth": login}}}))
    shopfront.build_keeper()
    site.write_inventories()
    try:
        for environment in environments:
            if environment.name in getattr(request.module, "ENVIRONMENTS", (environment.name,)):
                site.run("setup", environment).must_succeed()
        yield site
    finally:
        for environment in environments:
            _clean(site, environment)
        images = subprocess.check_output(["docker", "image", "ls", "--quiet", "--filter", f"reference={registry.address}/*/*"], text=True).split()
        images += subprocess.check_output(["docker", "image", "ls", "--quiet", "--filter", f"reference={registry.address}/*/*/*"], text=True).split()
        if images:
            subprocess.run(["docker", "rmi", "--force", *set(images)], check=False, stdout=subprocess.DEVNULL)
        registry.stop()
        shutil.rmtree(folder, ignore_errors=True)


def _clean(site: Site, environment: Environment) -> None:
    pid_file = environment.edge_dir / "run" / "haproxy.pid"
    for path in [pid_file, *environment.edge_dir.rglob("*.pid")]:
        if path.exists():
            os.kill(int(path.read_text().split()[0]), 15)
            break
    names = environment.containers()
    if names:
        subprocess.run(["docker", "rm", "--force", *names], check=False, stdout=subprocess.DEVNULL)
    label = f"label=com.docker.compose.project={environment.project}"
    for kind in ("volume", "network"):
        found = subprocess.check_output(["docker", kind, "ls", "-q", "--filter", label], text=True).split()
        if found:
            subprocess.run(["docker", kind, "rm", *found], check=False, stdout=subprocess.DEVNULL)
