# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Readiness probes: asked side by side until all are ready at the same time, or until it is known that one cannot be."""

from __future__ import annotations

from ansible_collections.selfhost.delivery.plugins.module_utils.probes.checks import PROBES, TRY_TIMEOUT, Check, parse_checks
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.wait import WaitResult, wait_ready

__all__ = ["PROBES", "TRY_TIMEOUT", "Check", "WaitResult", "parse_checks", "wait_ready"]
