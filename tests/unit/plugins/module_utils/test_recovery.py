# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.recovery import Evidence, decide

OPEN = dict(changed=False, migrated=False, commit_begun=False, snapshot="", held=False, had_previous=True)


def evidence(**given: object) -> Evidence:
    return Evidence(**{**OPEN, **given})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "restore", "migrations", "action", "data_goes_back"),
    [
        ({}, "auto", "compatible", "abort", False),
        ({"snapshot": "set"}, "always", "breaking", "abort", False),
        ({"changed": True}, "always", "breaking", "undo", False),
        ({"changed": True, "snapshot": "set"}, "always", "breaking", "undo", False),
        ({"changed": True, "migrated": True, "snapshot": "set"}, "auto", "compatible", "undo", False),
        ({"changed": True, "migrated": True, "snapshot": "set"}, "always", "compatible", "undo", True),
        ({"changed": True, "migrated": True, "snapshot": "set", "held": True}, "auto", "breaking", "undo", True),
        ({"changed": True, "migrated": True, "snapshot": "set", "held": True}, "auto", "compatible", "undo", False),
        ({"changed": True, "migrated": True, "snapshot": "set"}, "auto", "breaking", "undo", False),
        ({"changed": True, "migrated": True, "snapshot": "set", "held": True}, "never", "breaking", "undo", False),
        ({"changed": True, "migrated": True, "held": True}, "always", "breaking", "undo", False),
        ({"changed": True, "migrated": True, "snapshot": "set", "commit_begun": True}, "always", "breaking", "finish", False),
        ({"changed": True, "replaced": "replaced-set"}, "never", "compatible", "undo", True),
        ({"changed": True, "replaced": "replaced-set", "given_back": True}, "always", "breaking", "undo", False),
        ({"changed": True, "migrated": True, "snapshot": "set", "held": True, "given_back": True}, "auto", "breaking", "undo", False),
    ],
)
def test_data_goes_back_only_where_nothing_is_lost_or_where_it_was_asked_for(given, restore, migrations, action, data_goes_back) -> None:
    found = decide(evidence(**given), restore, migrations)
    assert (found.action, found.restore) == (action, data_goes_back)


def test_unknown_policies_are_refused() -> None:
    with pytest.raises(ValueError, match="sometimes"):
        decide(evidence(), "sometimes")


def entry(step: str, event: str, **data: object) -> dict[str, object]:
    return {"seq": 1, "time": "2026-11-21T09:00:00.000Z", "run": "r", "step": step, "event": event, "data": data}


def test_writes_count_as_held_only_when_they_were_before_the_snapshot() -> None:
    held, snapshot = [entry("held", "begin"), entry("held", "end")], [entry("snapshotted", "begin"), entry("snapshotted", "end", set_id="s")]
    assert Evidence.from_journal([*held, *snapshot], {}).held
    assert not Evidence.from_journal([*snapshot, *held], {}).held
    assert not Evidence.from_journal([entry("held", "begin"), *snapshot], {}).held


def test_data_that_has_gone_back_does_not_go_back_again() -> None:
    """What was written after the restore would be lost by a second one."""
    snapshot = [entry("snapshotted", "begin"), entry("snapshotted", "end", set_id="s")]
    restored = [entry("restoring", "begin", set_id="s"), entry("restoring", "end", set_id="s", replaced="kept")]
    assert not Evidence.from_journal([*snapshot, restored[0]], {}).given_back
    assert Evidence.from_journal([*snapshot, *restored], {}).given_back
    assert not Evidence.from_journal(restored, {"kind": "rollback"}, "kept").given_back
    again = [entry("restoring", "begin", set_id="kept"), entry("restoring", "end", set_id="kept")]
    assert Evidence.from_journal([*restored, *again], {"kind": "rollback"}, "kept").given_back


def test_what_a_rollback_replaced_is_evidence_only_for_a_rollback() -> None:
    entries = [entry("restoring", "begin", set_id="s")]
    assert Evidence.from_journal(entries, {"kind": "rollback"}, "replaced-s").replaced == "replaced-s"
    assert Evidence.from_journal(entries, {"kind": "promote"}, "replaced-s").replaced == ""
    assert Evidence.from_journal(entries, {"kind": "rollback"}).changed
