# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import typing as t

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.app import App, parse_app
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.promotion import Site, Wish, gate_findings, plan_release

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
