# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The same from a bare Debian 13, whose packages bring Compose: set up, released to, rebooted."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / name) for name in ("", "integration"))]
from machine import BARE, Machine  # noqa: E402
from starter_site import StarterSite  # noqa: E402


def test_a_bare_debian_13_becomes_an_app_host(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("debian-13")
    machine = Machine(folder, "bare", BARE, "trixie")
    site = None
    try:
        machine.start()
        site = StarterSite(folder, machine)
        site.write()
        site.first_setup().must_succeed()
        again = site.setup()
        again.must_succeed()
        assert again.changed == {"app-1": 0}, again.output
        site.hand_out_keeper()
        site.promote(site.build("sha-first")).must_succeed()
        assert site.serving() == "sha-first"
        machine.reboot(hard=True)
        site.await_serving("sha-first")
    finally:
        machine.remove()
        if site is not None:
            site.close()
