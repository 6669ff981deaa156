# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The one way a part of this collection says that it could not do its work."""

from __future__ import annotations

import typing as t

#: Stable names of what can go wrong; callers and alert rules match on them (docs/architecture.md, "Ends").
FAILURE_CLASSES = (
    "config",
    "policy",
    "lock",
    "capacity",
    "transport",
    "snapshot",
    "migration",
    "not_ready",
    "cutover",
    "regression",
    "rollback_failed",
)


class DeliveryError(Exception):
    """What was tried, what was seen, what to do next.

    ``details`` is JSON-able and reaches the module result beside ``msg`` and ``failure_class``;
    it must never hold a secret.
    """

    def __init__(self, tried: str, seen: str, remedy: str = "", failure_class: str = "config", **details: t.Any) -> None:
        if failure_class not in FAILURE_CLASSES:
            raise ValueError(f"unknown failure class {failure_class!r}")
        self.tried = tried.rstrip(".: ")
        self.seen = seen.strip().rstrip(".")
        self.remedy = remedy.strip()
        self.failure_class = failure_class
        self.details = details
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """One or two sentences for a person: ``<tried>: <seen>. <remedy>``."""
        text = f"{self.tried}: {self.seen}."
        return f"{text} {self.remedy}" if self.remedy else text

    def as_result(self) -> dict[str, t.Any]:
        """The keyword arguments for ``fail_json``."""
        return {**self.details, "msg": self.message, "failure_class": self.failure_class}
