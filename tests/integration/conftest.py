# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tests of one file share what they started and stay together, where they need more than themselves."""

from __future__ import annotations

import sys
import typing as t
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import rollout_fixture  # noqa: E402
from scheduling import GroupScheduling, longest_first  # noqa: E402

# Fixtures of the tests of compose_rollout.
images, proxy, site = rollout_fixture.images, rollout_fixture.proxy, rollout_fixture.site

#: Files whose tests take longest together.
LONG = ("test_registry_collection", "test_host_roles", "test_edges", "test_edge", "test_move_images")
#: Files whose tests share nothing.
ALONE = ("test_rollout", "test_strategies", "test_snapshots")


def pytest_xdist_make_scheduler(config: pytest.Config, log: t.Any) -> GroupScheduling:
    return GroupScheduling(config, log, ALONE)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    longest_first(items, LONG, ALONE)
