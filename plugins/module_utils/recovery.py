# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How an open release is ended: forward, or back, and whether its data goes back with it.

Pure decisions on a folded journal; nothing here touches a host.
"""

from __future__ import annotations

import typing as t
from dataclasses import asdict, dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.releases import fold

RESTORE_POLICIES = ("auto", "always", "never")
MIGRATION_KINDS = ("compatible", "breaking")


@dataclass(frozen=True)
class Evidence:
    """What the journal shows of one release.

    ``snapshot`` is the id of the complete set taken before anything changed, or empty.
    ``held`` says that the edge held all writes from before the snapshot until now. ``replaced`` is the set that kept the data which a
    rollback's own restore replaced, or empty.
    ``had_previous`` says that another release served before this one. ``given_back``: the set that would go back has gone back already,
    and what was written since must stay.
    """

    changed: bool
    migrated: bool
    commit_begun: bool
    snapshot: str
    held: bool
    had_previous: bool
    replaced: str = ""
    given_back: bool = False

    @classmethod
    def from_journal(cls, entries: t.Sequence[t.Mapping[str, t.Any]], record: t.Mapping[str, t.Any], replaced: str = "") -> Evidence:
        """Read the evidence off a journal (``releases.Journal.entries``) and the release's ``release.json``."""
        state = fold(entries)
        restored = any(entry["step"] == "restoring" for entry in entries)
        ended = [entry["step"] for entry in entries if entry["event"] == "end"]
        held = "held" in ended and (not state.snapshot or ended.index("held") < ended.index("snapshotted"))
        ours = replaced if record.get("kind") == "rollback" and restored else ""
        wanted = ours or state.snapshot
        back = [entry for entry in entries if entry["step"] == "restoring" and entry["event"] == "end"]
        return cls(
            changed=state.changed or restored,
            migrated=state.migrated,
            commit_begun=state.commit_begun,
            snapshot=state.snapshot,
            held=held,
            had_previous=bool(record.get("previous")),
            replaced=ours,
            given_back=bool(wanted) and any((entry.get("data") or {}).get("set_id") == wanted for entry in back),
        )


@dataclass(frozen=True)
class Recovery:
    """What to do: ``action`` is ``finish``, ``undo`` or ``abort``; ``restore`` only ever goes with ``undo``."""

    action: str
    restore: bool
    end: str
    why: str
    data: str

    def as_dict(self) -> dict[str, t.Any]:
        return asdict(self)


def decide(evidence: Evidence, restore: str = "auto", migrations: str = "compatible") -> Recovery:
    """Choose the way back (or forward) for a release that has no end.

    Data goes back by itself only where nothing can be lost by it: a ``breaking`` migration whose writes were held
    since before the snapshot. ``always`` takes the snapshot back whenever a migrator had begun; ``never`` leaves data alone.
    """
    if restore not in RESTORE_POLICIES or migrations not in MIGRATION_KINDS:
        raise ValueError(f"restore {restore!r} or migrations {migrations!r} is not a known policy")
    if evidence.commit_begun:
        return Recovery("finish", False, "committed", "it was verified and its commit had begun", "data stays as it is")
    if not evidence.changed:
        return Recovery("abort", False, "aborted", "nothing had been changed yet", "data was not touched")
    if evidence.given_back:
        return Recovery("undo", False, "rolled_back", "it was being taken back", "data had gone back already; what was written since stays")
    if evidence.replaced:
        return Recovery("undo", True, "rolled_back", "a rollback had begun to give data back",
                        "data goes back to what it was before the rollback; requests were held meanwhile, so none is lost")
    if not evidence.migrated:
        return Recovery("undo", False, "rolled_back", "containers had been changed, data had not", "data was not touched")
    if not evidence.snapshot:
        data = "no snapshot set to go back to: data stays as the migrator left it"
        return Recovery("undo", False, "rolled_back", "the migrator had begun", data)
    if restore == "never":
        data = "data stays as the migrator left it: delivery_restore is 'never'"
        return Recovery("undo", False, "rolled_back", "the migrator had begun", data)
    if restore == "always":
        data = "data goes back to the snapshot set: delivery_restore is 'always'"
        return Recovery("undo", True, "rolled_back", "the migrator had begun", data)
    if migrations == "breaking" and evidence.held:
        return Recovery("undo", True, "rolled_back", "a breaking migration had begun",
                        "data goes back to the snapshot set; writes through the edge were held since before it, so none of them is lost")
    if migrations == "breaking":
        return Recovery("undo", False, "rolled_back", "a breaking migration had begun",
                        "data stays as the migrator left it: writes were not held, a restore could lose some")
    return Recovery("undo", False, "rolled_back", "the migrator had begun",
                    "data stays: the migration is declared compatible, and a restore would lose what was written since")
