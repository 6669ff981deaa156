# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What waits for what when several services are rolled; that it works on real containers is in tests/integration/test_rollout.py."""

from __future__ import annotations

import contextlib
import threading
import types
import typing as t

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.plan import ServiceSpec, Step
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.roll import Move, Roller

PATIENCE = 20.0


class Stage:
    """Plays the host of a roller: ``said`` is what was asked of it, in order; ``slow`` is called before old containers stop."""

    def __init__(self, slow: t.Callable[[str], None] = lambda dummy: None, broken: str = "") -> None:
        self.said: list[str] = []
        self.journal = types.SimpleNamespace(note=lambda *dummy, **more: None)
        self.engine = types.SimpleNamespace(start=lambda container: self.said.append(f"start {container}"))
        self._slow, self._broken = slow, broken

    @contextlib.contextmanager
    def step(self, step: str, service: str, **data: t.Any) -> t.Iterator[dict[str, t.Any]]:
        self.said.append(f"begin {service}")
        yield {}
        self.said.append(f"end {service}")

    def gate(self, service: str, *dummy: t.Any) -> None:
        if service == self._broken:
            raise DeliveryError(f"Waiting for {service} to be ready", "it is not", "", "not_ready")

    def address(self, container: str) -> str:
        return container

    def let_in(self, service: str, *dummy: t.Any) -> None:
        self.said.append(f"let in {service}")

    def point(self, *dummy: t.Any) -> dict[str, t.Any]:
        return {"cut": 0}

    def retire(self, containers: t.Sequence[str], timeout: float | None) -> None:
        for one in containers:
            self._slow(one)
            self.said.append(f"stopped {one}")


def move(service: str, port: int | None) -> Move:
    step = Step(service, "app", "roll", "start_first", "", "r@1", "r@2", 1)
    return Move(step, ServiceSpec(service, port), port, [f"old {service}"], [f"new {service}"], {})


def test_what_has_no_route_begins_while_the_old_ones_before_it_end() -> None:
    begun = threading.Event()

    def slow(container: str) -> None:
        if container == "old web":
            assert begun.wait(PATIENCE), "the worker waits for the old web service"
        else:
            begun.set()

    stage = Stage(slow)
    Roller(t.cast(t.Any, stage)).run([move("web", 80), move("worker", None)])
    assert stage.said.index("let in web") < stage.said.index("begin worker") < stage.said.index("stopped old web")
    assert {"end web", "end worker"} <= set(stage.said)


def test_what_has_a_route_waits_for_all_before_it() -> None:
    stage = Stage()
    Roller(t.cast(t.Any, stage)).run([move("web", 80), move("admin", 81)])
    assert stage.said.index("end web") < stage.said.index("begin admin")


def test_nothing_begins_after_a_failure_and_what_is_under_way_ends_first() -> None:
    stage = Stage(broken="worker")
    with pytest.raises(DeliveryError, match="Waiting for worker"):
        Roller(t.cast(t.Any, stage)).run([move("web", 80), move("worker", None), move("cron", None), move("admin", 81)])
    assert "end web" in stage.said and not {"begin cron", "begin admin", "end worker", "stopped old worker"} & set(stage.said)
