# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How a try of a probe ends when it does not end well, and how what was seen is shown."""

from __future__ import annotations

import json
import re


class NotReady(Exception):
    """This try failed; the next may not."""


class NoAnswer(NotReady):
    """Nothing came within the time of this try, which says less than an answer does."""


class Hopeless(Exception):
    """It cannot become ready any more."""


def shown_start(body: bytes) -> str:
    """The beginning of what somebody answered, on one line."""
    text = re.sub(r"\s+", " ", body[:2000].decode("utf-8", "replace")).strip()
    text = "".join(char for char in text if char.isprintable())
    return json.dumps(text if len(text) <= 160 else text[:160] + "…", ensure_ascii=False)
