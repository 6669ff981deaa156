# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The same site as in the tests of compose_rollout, on an engine that may die."""

from __future__ import annotations

import os
import shutil
import sys
import typing as t
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "integration"), str(Path(__file__).resolve().parents[1])]
import rollout_fixture  # noqa: E402
from own_engine import OwnEngine  # noqa: E402

images, proxy, site = rollout_fixture.images, rollout_fixture.proxy, rollout_fixture.site


@pytest.fixture(scope="session", autouse=True)
def engine(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[OwnEngine]:
    """Started before anything asks for an engine, which then is this one."""
    for program in ("dockerd", "ip"):
        if not shutil.which(program):
            pytest.fail(f"this test needs the program {program}")
    if os.geteuid() != 0:
        pytest.fail("this test starts an engine, which takes root")
    made = OwnEngine(tmp_path_factory.mktemp("engine") / "e")
    before = os.environ.get("DOCKER_HOST")
    os.environ["DOCKER_HOST"] = f"unix://{made.socket}"
    try:
        made.start()
        yield made
    finally:
        made.stop()
        os.environ.pop("DOCKER_HOST")
        if before is not None:
            os.environ["DOCKER_HOST"] = before
