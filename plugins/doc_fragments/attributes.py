# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The attributes every module of this collection answers for.

A module extends ``selfhost.delivery.attributes`` for the wording, one of the parts below where it fits, and states
its own ``support`` (and ``details``, where ``partial``) for each attribute that no part settles.
"""

from __future__ import annotations


class ModuleDocFragment:
    """Wording of the attributes; ``ansible-doc`` merges it into each module."""

    # The wording alone: each module must state its own level of support.
    DOCUMENTATION = r"""
options: {}
attributes:
  check_mode:
    description: Can run in C(check_mode) and says what it would change without changing it.
  diff_mode:
    description: Says what changed, or would change in C(check_mode), when in diff mode.
  idempotent:
    description:
      - When run twice in a row outside check mode with the same arguments, the second run changes nothing.
      - This assumes that nothing else changed the system in between.
"""

    # For modules that only read.
    INFO_MODULE = r"""
options: {}
attributes:
  check_mode:
    support: full
    details:
      - This module only reads.
  diff_mode:
    support: N/A
    details:
      - This module only reads.
  idempotent:
    support: full
    details:
      - This module only reads.
"""

    # For modules whose shared options can be set once with `module_defaults`.
    DELIVERY_GROUP = r"""
options: {}
attributes:
  action_group:
    description: Use C(group/selfhost.delivery.delivery) in C(module_defaults) to set defaults for this module.
    support: full
    membership:
      - selfhost.delivery.delivery
"""
