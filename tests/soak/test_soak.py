# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many rollouts in a row, each with a strategy and a fault by lot, under load all the time. After each one everything is looked at.

``SOAK_ROLLOUTS`` (200) and ``SOAK_SEED`` (printed; by the clock) come from the environment.
"""

from __future__ import annotations

import collections
import json
import os
import random
import subprocess
import threading
import time
import typing as t
from dataclasses import dataclass, field

from rollout_fixture import Load, Proxy, Site, kill_at, lines_of

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import SERVICE_LABEL

REPLICAS = 2
#: The most lines that a journal gets before its end, so that a kill may come anywhere.
LINES = 14

STRATEGIES: dict[str, dict[str, t.Any]] = {
    "start_first": {},
    "one at a time": {"parallel": 1},
    "surge and unavailable": {"max_surge": 1, "max_unavailable": 1},
    "blue_green": {"strategy": "blue_green"},
    "blue_green, kept": {"strategy": "blue_green", "keep_old_for": 3600},
    "canary": {"strategy": "canary", "canary": {"steps": [20, 60], "seconds": 0.3, "min_requests": 5}},
}


@dataclass
class Soak:
    """What serves, and what is asked of it after each rollout."""

    site: Site
    proxy: Proxy
    chance: random.Random
    serves: str = "one"
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    sent: int = 0

    # -- one rollout

    def turn(self) -> str:
        """One rollout; what was done, in words."""
        strategy = self.chance.choice(sorted(STRATEGIES))
        fault = self.chance.choice(sorted(FAULTS))
        self.site.services["web"] = {**self.base, **STRATEGIES[strategy]}
        told = f"{strategy}, {fault}"
        load = Load(self.proxy.port, clients=2)
        with load:
            end = FAULTS[fault](self, "two" if self.serves == "one" else "one")
            told += f": {end}"
            self.check(told)
        # Who has a connection to an edge that dies loses it. Everything else costs nobody anything.
        assert fault == "edge dies" or load.lost == [] or set(load.lost) == {"HTTP 500"} and fault == "broken", (told, load.lost[:5])
        assert load.answers <= {"one", "two"}, (told, load.answers)
        self.sent += load.sent
        self.ends[f"{fault}: {end}"] += 1
        return told

    @property
    def base(self) -> dict[str, t.Any]:
        return {"port": 8080, "ready": {"http": "/api/ready"}, "ready_timeout": 20, "stop_timeout": 5}

    def committed(self, release: dict[str, t.Any], name: str) -> str:
        self.site.commit(release)
        self.serves = name
        return "came out"

    def taken_back(self, result: dict[str, t.Any]) -> str:
        assert result.get("failed") and result.get("reverted"), result
        return f"taken back [{result['failure_class']}]"

    def mend(self, release: dict[str, t.Any]) -> str:
        """What the next run does with a release that was left open; twice, since the second has nothing to do."""
        self.site.revert(release)
        assert not self.site.revert(release)["changed"], release["release_id"]
        return "killed, and undone by the next run"

    # -- the faults

    def nothing(self, name: str) -> str:
        release = self.site.release(name)
        self.site.ok(**release)
        return self.committed(release, name)

    def bad_build(self, name: str) -> str:
        self.site.services["web"]["ready_timeout"] = 2
        return self.taken_back(self.site.call(**self.site.release(name)))

    def broken(self, _name: str) -> str:
        """Ready, and answers errors: only who looks at the answers notices."""
        self.site.options["bake"] = {"seconds": 60, "min_requests": 5}
        try:
            return self.taken_back(self.site.call(**self.site.release("broken")))
        finally:
            del self.site.options["bake"]

    def killed(self, name: str) -> str:
        release = self.site.release(name)
        if kill_at(self.site.start(**release), self.journal(release), self.chance.randint(1, LINES)):
            return self.mend(release)
        return self.committed(release, name)

    def killed_twice(self, name: str) -> str:
        release = self.site.release(name)
        if not kill_at(self.site.start(**release), self.journal(release), self.chance.randint(1, LINES)):
            return self.committed(release, name)
        back = self.site.start(state="reverted", project_dir=str(self.site.folder), release_id=release["release_id"])
        kill_at(back, self.journal(release), lines_of(self.journal(release)) + self.chance.randint(1, 4))
        return self.mend(release)

    def edge_dies(self, name: str) -> str:
        """At any time while the release goes on; its service manager brings it back."""
        release = self.site.release(name)
        stop = threading.Event()

        def crash() -> None:
            wanted = self.chance.randint(1, LINES)
            while lines_of(self.journal(release)) < wanted and not stop.is_set():
                time.sleep(0.002)
            self.proxy.crash()

        thread = threading.Thread(target=crash)
        thread.start()
        out, _err = self.site.start(**release).communicate(timeout=180)
        stop.set()
        thread.join()
        result = json.loads(out.strip().splitlines()[-1])
        if result.get("failed") and not result.get("reverted"):
            return self.mend(release)
        if result.get("failed"):
            return self.taken_back(result)
        return self.committed(release, name)

    def container_dies(self, name: str) -> str:
        """One of the new containers, as soon as there is one that runs."""
        release = self.site.release(name)
        before = set(self.site.containers("web"))
        process = self.site.start(**release)
        while process.poll() is None:
            fresh = sorted(set(self.site.containers("web", running=True)) - before)
            if fresh:
                subprocess.run(["docker", "kill", self.chance.choice(fresh)], check=False, capture_output=True)
                break
            time.sleep(0.01)
        result = json.loads(process.communicate(timeout=180)[0].strip().splitlines()[-1])
        if result.get("failed"):
            return self.taken_back(result)
        # It died after the rollout had looked at it for the last time: that is for the restart policy, and for whoever watches (bake).
        self.site.revert(release)
        return "undone by hand"

    def two_at_once(self, name: str) -> str:
        """A second module on the same host waits or is refused; never do both work."""
        release = self.site.release(name)
        processes = [self.site.start(**release) for _one in range(2)]
        results = [json.loads(one.communicate(timeout=180)[0].strip().splitlines()[-1]) for one in processes]
        assert any(not one.get("failed") for one in results), results
        return self.committed(release, name)

    # -- what holds after each

    def journal(self, release: dict[str, t.Any]) -> t.Any:
        return self.site.folder / "releases" / release["release_id"] / "journal.jsonl"

    def check(self, told: str) -> None:
        site = self.site
        current = json.loads((site.folder / "current" / "rollout.json").read_text())
        kept = set(current.get("kept") or {})
        web = [one for one in site.containers("web") if one not in kept]
        worker = [one for one in site.containers("worker") if one not in kept]
        assert len(web) == REPLICAS == len(set(web) & set(site.containers("web", running=True))), f"{told}: not the containers of one release"
        assert worker == [one for one in site.containers("worker", running=True) if one not in kept] and len(worker) == 1, told
        assert {site.engine.inspect(one)["Config"]["Image"] for one in [*web, *worker]} == {site.images[self.serves]}, told
        ups = sorted((up.address, up.state, up.weight) for up in self.proxy.edge().upstreams(self.proxy.backend))
        addresses = sorted(site.engine.inspect(one)["NetworkSettings"]["Networks"][f"{site.project}_default"]["IPAddress"] for one in web)
        assert [one[0] for one in ups] == addresses and {one[1] for one in ups} == {"ready"}, (told, ups, addresses)
        assert len({one[2] for one in ups}) == 1, f"{told}: the shares are not equal, {ups}"
        assert self.proxy.get() == self.serves and self.proxy.post() != 503, told
        left = [one for one in site.engine.containers({"com.docker.compose.project": site.project}) if one["Labels"][SERVICE_LABEL] == "migrate"]
        assert left == [], f"{told}: a migrator is left"


FAULTS: dict[str, t.Callable[[Soak, str], str]] = {
    "none": Soak.nothing,
    "no fault": Soak.nothing,
    "never ready": lambda soak, _name: soak.bad_build("never"),
    "crash loop": lambda soak, _name: soak.bad_build("crash"),
    "failing migrator": lambda soak, _name: soak.bad_build("failing"),
    "broken": Soak.broken,
    "killed": Soak.killed,
    "killed, and the way back too": Soak.killed_twice,
    "edge dies": Soak.edge_dies,
    "container dies": Soak.container_dies,
    "two at once": Soak.two_at_once,
}


def test_every_rollout_ends_in_one_of_two_ways(site: Site, proxy: Proxy) -> None:
    seed = int(os.environ.get("SOAK_SEED") or time.time())
    rollouts = int(os.environ.get("SOAK_ROLLOUTS") or 200)
    print(f"\nSOAK_SEED={seed} SOAK_ROLLOUTS={rollouts}", flush=True)
    site.compose["services"]["web"]["deploy"] = {"replicas": REPLICAS}
    soak = Soak(site, proxy, random.Random(seed))
    site.deploy("one")
    started = time.monotonic()
    for number in range(1, rollouts + 1):
        begun = time.monotonic()
        told = soak.turn()
        print(f"{number:4d}  {time.monotonic() - begun:5.1f} s  {told}", flush=True)
    print(f"{rollouts} rollouts in {time.monotonic() - started:.0f} s, {soak.sent} requests, none lost but by the edge's own death:")
    for end, times in sorted(soak.ends.items()):
        print(f"  {times:4d}  {end}")
