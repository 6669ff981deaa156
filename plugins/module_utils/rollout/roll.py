# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How new containers of a service take the place of the old ones: in batches, as one group (blue-green), or by shares (canary)."""

from __future__ import annotations

import contextlib
import threading
import time
import typing as t
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import short_id
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.batches import batches
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import WeighingEdge
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.host import EDGE_TIMEOUT, Host
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.plan import ServiceSpec, Step, levels
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.watch import Judgement, Watch

#: Of 256 that HAProxy knows; a product of two small numbers has to fit.
FULL_WEIGHT = 256


@dataclass
class Move:
    """One service under way: ``old`` containers give way to ``new`` ones, in this order.

    ``policies``: restart policy of those that were retired once and have to get it back. ``phases``: seconds of each.
    """

    step: Step
    given: ServiceSpec
    port: int | None
    old: list[str]
    new: list[str]
    policies: t.Mapping[str, t.Mapping[str, t.Any]]
    phases: dict[str, float] = field(default_factory=dict)
    cut: int = 0
    seconds: float = 0.0
    #: Set when all the new ones are ready and have the requests; only the old ones are left to be drained and stopped then.
    serves: threading.Event = field(default_factory=threading.Event)

    @property
    def service(self) -> str:
        return self.step.service

    @contextlib.contextmanager
    def timed(self, phase: str) -> t.Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.phases[phase] = round(self.phases.get(phase, 0.0) + time.monotonic() - begun, 3)


class Roller:
    """Each method returns when the new containers are the only ones that serve, or raises with things as they are: undo mends them."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.warnings: list[str] = []

    def run(self, moves: t.Sequence[Move]) -> None:
        """One after the other. What has no route does not wait for the old ones of the service before it to be drained and stopped, which
        may take as long as their slowest request; what has one does, so that the edge is asked one thing at a time."""
        with ThreadPoolExecutor(max_workers=max(len(moves), 1)) as pool:
            begun: list[Future[None]] = []
            for move in moves:
                if move.port is not None:
                    wait(begun)
                if any(one.done() and one.exception() for one in begun):
                    break
                begun.append(pool.submit(self._run, move))
                begun[-1].add_done_callback(lambda dummy, serves=move.serves: serves.set())  # type: ignore[misc]
                move.serves.wait()
        for one in begun:
            one.result()

    def _run(self, move: Move) -> None:
        with self._journalled(move):
            if move.step.strategy == "canary" and move.old:
                self._canary(move)
            else:
                self._batches(move)

    def run_group(self, moves: t.Sequence[Move], model: t.Mapping[str, t.Any]) -> None:
        """All of ``moves`` beside what runs; when all are ready and tested, all of them at once take its place."""
        by_name = {move.service: move for move in moves}
        with contextlib.ExitStack() as stack:
            for move in moves:
                stack.enter_context(self._journalled(move))
            for names in levels(list(by_name), model):
                self.host.side_by_side(lambda name: self._bring_up(by_name[name], by_name[name].new), names)
            for move in moves:
                self._smoke(move, move.new)
            for move in moves:
                self._let_in(move)
            self._keep(moves)
            self.host.side_by_side(self._leave_old, moves)

    @contextlib.contextmanager
    def _journalled(self, move: Move) -> t.Iterator[None]:
        started = time.monotonic()
        told = {"routed": move.port is not None, "strategy": move.step.strategy, "old": move.old, "new": move.new}
        with self.host.step("rolling", move.service, **told) as ended:
            yield
            move.seconds = round(time.monotonic() - started, 3)
            ended.update(new=move.new, cut=move.cut, seconds=move.seconds)

    # -- the strategies

    def _batches(self, move: Move) -> None:
        left, up = list(move.old), list[str]()
        planned = batches(len(move.old), len(move.new), move.given.limits(move.step.strategy, move.step.replicas))
        for batch in planned:
            going, left = left[: batch.before], left[batch.before :]
            if going:
                self._point(move, [*up, *left], "drain")
                self._retire(move, going)
            fresh = move.new[len(up) : len(up) + batch.starts]
            self._bring_up(move, fresh)
            if not up:
                self._smoke(move, fresh)
            up += fresh
            going, left = left[: batch.after], left[batch.after :]
            if len(up) == len(move.new):
                self._let_in(move)
                move.serves.set()
            self._point(move, [*up, *left])
            self._retire(move, going)
            if len(planned) > 1:
                self.host.journal.note("rolling", move.service, batch=[len(up), len(move.new)])

    def _leave_old(self, move: Move) -> None:
        """What is kept runs on without requests; what takes none works by itself, so it stops, and is kept stopped."""
        self._point(move, move.new)
        if move.port is None or not move.given.keep_old_for:
            self._retire(move, move.old)

    def _canary(self, move: Move) -> None:
        if move.port is None:
            raise AssertionError("only a service with a route shares requests out")
        self._bring_up(move, move.new)
        self._smoke(move, move.new)
        edge, backend = t.cast(WeighingEdge, self.host.edge), self.host.spec.backend(move.service)
        new = [(address, move.port) for address in self._addresses(move.new)]
        old = [(up.address, up.port) for up in edge.upstreams(backend) if (up.address, up.port) not in new]
        judgement = Judgement.from_dict(move.given.canary)
        with move.timed("canary"):
            for percent in move.given.canary["steps"]:
                self._share(move, edge, backend, old, new, int(percent))
                watch = Watch(self.host, judgement, {move.service: move.new}, {backend: new})
                try:
                    found = watch.hold_out(f"Giving {percent} % of the requests to the new {move.service}")
                except DeliveryError:
                    # Not one more request to a bad one; undo does the rest.
                    edge.weigh(backend, {**dict.fromkeys(new, 0), **dict.fromkeys(old, -1)})
                    raise
                self.warnings += watch.warnings
                self.host.journal.note("rolling", move.service, share=percent, requests=found.requests, errors=found.errors)
        self._point(move, move.new)
        edge.weigh(backend, dict.fromkeys(new, -1))
        self._retire(move, move.old)

    def _share(
        self, move: Move, edge: WeighingEdge, backend: str, old: list[tuple[str, int]], new: list[tuple[str, int]], percent: int
    ) -> None:
        weight, others = weights(percent, len(new), len(old))
        edge.weigh(backend, dict.fromkeys(old, others))
        there = {(up.address, up.port) for up in edge.upstreams(backend) if up.state == "ready"}
        edge.weigh(backend, {target: weight for target in new if target in there})
        for target in new:
            if target not in there:
                edge.add(backend, *target, EDGE_TIMEOUT, weight)
        self.host.journal.note("rolling", move.service, share=percent, weights=[weight, others])

    # -- the parts

    def _addresses(self, containers: t.Iterable[str]) -> list[str]:
        return [self.host.address(container) for container in containers]

    def _bring_up(self, move: Move, containers: t.Sequence[str]) -> None:
        with move.timed("start"):
            for container in containers:
                if container in move.policies:
                    self.host.engine.set_restart_policy(container, move.policies[container])
                try:
                    self.host.engine.start(container)
                except DeliveryError as exc:
                    if exc.failure_class == "transport":
                        raise
                    raise DeliveryError(f"Starting {move.service}", exc.seen, exc.remedy, "not_ready", service=move.service) from exc
        with move.timed("ready"):
            self.host.gate(move.service, move.given, containers)

    def _smoke(self, move: Move, containers: t.Sequence[str]) -> None:
        """The user's own test, in one of the new containers, before it gets requests."""
        if not move.given.smoke or not containers:
            return
        container, tried = containers[0], f"Running the smoke test of {move.service}"
        shown = " ".join(move.given.smoke)
        with move.timed("smoke"):
            try:
                code, said = self.host.engine.exec(container, move.given.smoke, move.given.smoke_timeout)
            except TimeoutError as exc:
                seen = f"`{shown}` in container {short_id(container)} did not end within {move.given.smoke_timeout:g} s"
                raise DeliveryError(tried, seen, "", "not_ready", service=move.service) from exc
        if code:
            last = "\n".join(said.splitlines()[-20:])
            seen = f"`{shown}` in container {short_id(container)} ended with {code}\nIts last lines:\n{last}\n"
            raise DeliveryError(tried, seen, "", "not_ready", service=move.service, container=container, logs=last.splitlines())

    def _point(self, move: Move, serving: t.Sequence[str], phase: str = "switch") -> None:
        if move.port is None:
            return
        with move.timed(phase):
            switched = self.host.point(move.service, move.port, self._addresses(serving), move.given.drain_timeout)
        move.cut += switched["cut"]

    def _let_in(self, move: Move) -> None:
        if move.port is not None:
            with move.timed("switch"):
                self.host.let_in(move.service, move.port, self._addresses(move.new))

    def _retire(self, move: Move, containers: t.Sequence[str]) -> None:
        with move.timed("stop"):
            self.host.retire(containers, move.given.stop_timeout)

    def _keep(self, moves: t.Sequence[Move]) -> None:
        kept = {
            container: {"service": move.service, "restart": self.host.engine.inspect(container)["HostConfig"]["RestartPolicy"]}
            for move in moves
            if move.given.keep_old_for
            for container in move.old
        }
        self.host.keep(self.host.spec.release_id, kept)


def weights(percent: int, new: int, old: int) -> tuple[int, int]:
    """Weights of each new and of each old upstream so that all the new ones together get ``percent`` of the requests."""
    share, others = percent / new, (100 - percent) / max(old, 1)
    most = max(share, others)
    return max(1, round(FULL_WEIGHT * share / most)), max(0 if percent >= 100 else 1, round(FULL_WEIGHT * others / most))
