# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Snapshot sets of real databases; a stage of its own, since each takes its time."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "integration")]
import debian_root  # noqa: E402


@pytest.fixture(scope="session")
def databases() -> str:
    """The image with all of them, from Debian's packages."""
    needed = [name for name in ("docker", "debootstrap") if not shutil.which(name)]
    if needed or os.geteuid() != 0:
        pytest.skip(f"MISSING: {' '.join(needed) or 'root'}; real databases are not tested here")
    return debian_root.image("databases", ("postgresql", "mariadb-server", "redis-server", "sqlite3", "procps"))
