# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.app import App, parse_app
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.promotion import (
    Site,
    Wish,
    calls_of,
    gate_findings,
    host_batches,
    plan_release,
)

ONE, TWO = "sha256:" + "1" * 64, "sha256:" + "2" * 64
DIGESTS = {"app": ONE, "migrator": TWO}
FILES = [{"name": "compose.yaml", "content": "services: {}\n"}]
RELEASE = "20261121-101500-sha-abc"
SITE = Site("/opt/shop", {"type": "none"})


def app(environment: str = "production", **changes: t.Any) -> App:
    raw = {
        "name": "shop",
        "env_files": [".env"],
        "images": {"app": {"source": "ci.example.com/app", "repository": "prod.example.com/app"}, "migrator": "ci.example.com/migrator"},
        "services": {"web": {"image": "app", "port": 8080}, "worker": {"image": "app"}},
        "migrator": {"service": "migrate", "image": "migrator"},
        "routes": [{"service": "web"}],
        **changes,
    }
    return parse_app(raw, environment)


def plan(wish: Wish | None = None, **changes: t.Any):
    return plan_release(app(**changes), "sha-abc", DIGESTS, FILES, RELEASE, SITE, wish or Wish())


def test_everything_is_pinned_by_the_digest_of_the_environments_repository() -> None:
    planned = plan()
    pinned = f"prod.example.com/app@{ONE}"
    assert planned.rollout["images"] == {"web": pinned, "worker": pinned, "migrate": f"ci.example.com/migrator@{TWO}"}
    assert f"APP_IMAGE={pinned}\n" in planned.files[-1]["content"]
    assert planned.files[-1]["name"] == "deploy.env"
    assert planned.snapshot_id == "pre-promotion-abc-20261121-101500"


def test_only_images_whose_repository_differs_are_copied() -> None:
    assert plan().copies == [{"source": f"ci.example.com/app@{ONE}", "destination": "prod.example.com/app:sha-abc"}]


def test_records_go_to_source_and_environment() -> None:
    assert plan().plan["recorded"] == [f"prod.example.com/app@{ONE}", f"ci.example.com/migrator@{TWO}", f"ci.example.com/app@{ONE}"]


@pytest.mark.parametrize(
    ("wish", "held"),
    [
        (Wish(), False),
        (Wish(migrations="breaking"), True),
        (Wish(kind="rollback", migrations="breaking"), False),
        (Wish(kind="rollback", snapshot="set"), True),
    ],
)
def test_writes_are_held_for_breaking_migrations_and_for_data_that_goes_back(wish: Wish, held: bool) -> None:
    assert plan(wish).rollout["hold"] is held


@pytest.mark.parametrize(
    ("wish", "within", "line"),
    [
        (Wish(), 60, "not confirmed within 60 s of the last word, the host goes back by itself"),
        (Wish(kind="rollback", target="x", restore="always"), 60, "not confirmed within 60 s"),
        (Wish(migrations="breaking"), 0, "does not hold"),
        (Wish(restore="always"), 0, "does not hold"),
        (Wish(kind="rollback", target="x", snapshot="set"), 0, "does not hold"),
    ],
)
def test_a_host_goes_back_alone_only_where_data_stays(wish: Wish, within: int, line: str) -> None:
    planned = plan(wish, policies={"confirm_within": 60})
    assert planned.rollout["confirm_within"] == within and line in "\n".join(planned.lines)
    assert plan(wish).rollout["confirm_within"] == 0


def test_a_rollback_runs_no_migrator() -> None:
    planned = plan(Wish(kind="rollback", target="20261120-000000-sha-abc"))
    assert planned.rollout["migrator"]["run"] is False and "migrate" not in planned.rollout["images"]
    assert plan().rollout["migrator"]["run"] is True


def test_an_image_without_a_digest_is_refused() -> None:
    with pytest.raises(DeliveryError, match="no digest for migrator"):
        plan_release(app(), "sha-abc", {"app": ONE}, FILES, RELEASE, SITE, Wish())


def test_a_gate_holds_only_for_the_digest_that_was_committed_there() -> None:
    described = app(policies={"gates": ["staging"]})
    committed = {"environment": "staging", "result": "committed", "time": "2026-11-20T00:00:00Z"}
    records = {f"ci.example.com/app@{ONE}": [committed], f"ci.example.com/migrator@{TWO}": [committed]}
    assert gate_findings(described, DIGESTS, records) == []
    findings = gate_findings(described, {**DIGESTS, "app": TWO}, records)
    assert len(findings) == 1 and findings[0].startswith("app: ") and "no record of staging" in findings[0]


@pytest.mark.parametrize(
    ("serial", "canary", "batches"),
    [
        (1, (), [["a"], ["b"], ["c"], ["d"], ["e"]]),
        ("2", (), [["a", "b"], ["c", "d"], ["e"]]),
        ("50%", (), [["a", "b"], ["c", "d"], ["e"]]),
        ("1%", (), [["a"], ["b"], ["c"], ["d"], ["e"]]),
        ("100%", ("d",), [["d"], ["a", "b", "c", "e"]]),
        ([1, "60%"], (), [["a"], ["b", "c", "d"], ["e"]]),
        (9, ("e", "b", "e", "elsewhere"), [["e"], ["b"], ["a", "c", "d"]]),
    ],
)
def test_hosts_are_rolled_in_batches(serial: t.Any, canary: t.Sequence[str], batches: list[list[str]]) -> None:
    assert host_batches(["a", "b", "c", "d", "e"], serial, canary) == batches


@pytest.mark.parametrize("serial", [0, "0%", -1, "some", [], [1, "x"], True, None, 1.5])
def test_a_batch_without_a_size_is_refused(serial: t.Any) -> None:
    with pytest.raises(DeliveryError, match="Reading delivery_serial"):
        host_batches(["a", "b"], serial)


def test_the_plan_says_which_hosts_follow_which() -> None:
    site = Site("/opt/shop", {"type": "none"}, hosts=("app-1", "app-2", "app-3"), serial=2, canary=["app-3"])
    planned = plan_release(app(), "sha-abc", DIGESTS, FILES, RELEASE, site, Wish())
    assert planned.batches == [["app-3"], ["app-1", "app-2"]]
    assert planned.lines[-1] == "  hosts: app-3 (canary), then app-1 + app-2"
    assert "hosts:" not in "".join(plan().lines)


ALL = ["preflight", "pull", "hold", "dependencies", "migrate", "roll"]


@pytest.mark.parametrize(
    ("given", "phases", "steps"),
    [
        (
            ("promote", 1, True),
            (ALL[:1], ALL[1:3], ALL[3:]),
            ("", "pinned begin", "pinned end", "snapshotted begin", "", "verifying begin"),
        ),
        (("promote", 1, False), (ALL[:3], [], ALL[3:]), ("pinned begin, pinned end", "snapshotted begin", "", "", "", "verifying begin")),
        (("rollback", 1, False), (ALL, [], []), ("", "verifying begin", "", "", "", "")),
        (("rollback", 1, False, True, True), (ALL[:3], [], ALL[3:]), ("", "", "", "", "", "verifying begin")),
        (("promote", 3, False), (ALL[:1], ["pull"], ALL[3:]), ("", "pinned begin", "pinned end", "snapshotted begin", "", "")),
        (("rollback", 3, False), (ALL[:1], ["pull"], ALL[3:]), ("",) * 6),
    ],
    ids=["copies", "promote", "rollback", "data", "hosts", "rollback-of-hosts"],
)
def test_a_call_begins_only_where_the_controller_has_something_to_do(given: tuple, phases: tuple, steps: tuple) -> None:
    calls = calls_of(*given)
    assert tuple(calls[name]["phases"] for name in ("check", "pull", "roll")) == phases
    told = tuple(calls[name]["journal"][when] for name in ("check", "pull", "roll") for when in ("before", "after"))
    assert tuple(", ".join(f"{one['step']} {one['event']}" for one in entries) for entries in told) == steps


def test_the_calls_of_a_release_go_by_what_it_does() -> None:
    assert plan().calls["pull"]["does"] == "Pull the images"
    assert plan(Wish(migrations="breaking")).calls["pull"]["does"] == "Pull the images and hold all writes"
    back = plan(Wish(kind="rollback")).calls
    assert back["check"]["does"] == "Check host, Compose file and plan, then pull the images and roll" and not back["roll"]["phases"]
