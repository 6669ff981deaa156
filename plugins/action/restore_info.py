# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Runs the module ``restore_info`` in Ansible's worker where that is the same; see ``plugin_utils/in_worker.py``."""

from __future__ import annotations

from ansible_collections.selfhost.delivery.plugins.modules import restore_info
from ansible_collections.selfhost.delivery.plugins.plugin_utils.in_worker import InWorker


class ActionModule(InWorker):
    module = restore_info
