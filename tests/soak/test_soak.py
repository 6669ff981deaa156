# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Many rollouts in a row, each with a strategy and a fault by lot, under load all the time. After each one everything is looked at.

``SOAK_ROLLOUTS`` (200), ``SOAK_SEED`` (printed; by the clock) and ``SOAK_FAULTS`` (names with `;` between; all) come from the environment.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import random
import signal
import subprocess
import threading
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from own_engine import OwnEngine
from rollout_fixture import Load, Proxy, Site, kill_at, lines_of

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import SERVICE_LABEL
from ansible_collections.selfhost.delivery.plugins.module_utils.releases import Journal, busy, fold, process_started
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import MARKER, _marked
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.confirm import read_confirm
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.haproxy import parse_servers_state

REPLICAS = 2
#: The most lines that a journal gets before its end, so that a fault may come anywhere.
LINES = 14

STRATEGIES: dict[str, dict[str, t.Any]] = {
    "start_first": {},
    "one at a time": {"parallel": 1},
    "surge and unavailable": {"max_surge": 1, "max_unavailable": 1},
    "blue_green": {"strategy": "blue_green"},
    "blue_green, kept": {"strategy": "blue_green", "keep_old_for": 3600},
    "canary": {"strategy": "canary", "canary": {"steps": [20, 60], "seconds": 0.3, "min_requests": 5}},
}

Release = dict[str, t.Any]


@dataclass
class Soak:
    """What serves, and what is asked of it after each rollout."""

    site: Site
    proxy: Proxy
    engine: OwnEngine
    chance: random.Random
    serves: str = "one"
    dependency: list[str] = field(default_factory=list)
    ends: collections.Counter[str] = field(default_factory=collections.Counter)
    sent: int = 0
    lost: int = 0
    moved: int = 0
    #: Why requests may be lost in this turn; '' where none may.
    excuse: str = ""

    # -- one rollout

    def turn(self, faults: t.Sequence[str]) -> str:
        """One rollout; what was done, in words."""
        strategy = self.chance.choice(sorted(STRATEGIES))
        fault = self.chance.choice(faults)
        self.site.services["web"] = {**self.base, **STRATEGIES[strategy]}
        told = f"{strategy}, {fault}"
        self.excuse = ""
        load = Load(self.proxy.port, clients=2, slow=1)
        with load:
            end = FAULTS[fault](self, "two" if self.serves == "one" else "one")
            told += f": {end}"
            self.check(told)
        if self.excuse:
            self.lost += len(load.lost)
            told += f"; {len(load.lost)} of {load.sent} requests lost: {self.excuse}" if load.lost else ""
        else:
            assert load.lost == [] or set(load.lost) == {"HTTP 500"} and fault == "broken", (told, load.lost[:5])
        assert load.answers <= {"one", "two", *["broken"] * (fault == "broken")}, (told, load.answers)
        self.sent += load.sent
        self.ends[f"{fault}: {end}"] += 1
        return told

    @property
    def base(self) -> dict[str, t.Any]:
        return {"port": 8080, "ready": {"http": "/api/ready"}, "ready_timeout": 20, "stop_timeout": 5}

    def committed(self, release: Release, name: str) -> str:
        assert fold(self.site.journal(release)).rolled == ["web", "worker"]
        self.site.commit(release)
        self.serves = name
        return "came out"

    def taken_back(self, result: dict[str, t.Any]) -> str:
        assert result.get("failed") and result.get("reverted"), result
        return f"taken back [{result['failure_class']}]"

    def mend(self, release: Release) -> str:
        """What the next run does with a release that was left open; twice, since the second has nothing to do."""
        self.site.revert(release)
        assert not self.site.revert(release)["changed"], release["release_id"]
        return "undone by the next run"

    def ended(self, release: Release, name: str, result: dict[str, t.Any]) -> str:
        """However the module took what was done to it."""
        if not result.get("failed"):
            return self.committed(release, name)
        return self.taken_back(result) if result.get("reverted") else f"failed [{result['failure_class']}], " + self.mend(release)

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

    def killed_in_the_commit(self, name: str) -> str:
        release = self.site.release(name)
        self.site.ok(**release)
        commit = self.site.start(state="finished", project_dir=str(self.site.folder), release_id=release["release_id"])
        before = set(self.site.containers())
        deadline = time.monotonic() + self.chance.uniform(0, 2)
        while commit.poll() is None and time.monotonic() < deadline and set(self.site.containers()) == before:
            time.sleep(0.002)
        commit.kill()
        commit.communicate()
        return self.committed(release, name)

    def unconfirmed(self, name: str) -> str:
        """The controller and its module die; the host goes back by itself where it had been told to."""
        release = self.site.release(name)
        module = self.site.start(**release, confirm_within=0.5)
        if not kill_at(module, self.journal(release), self.chance.randint(1, LINES)):
            if not self.site.call(state="confirmed", project_dir=str(self.site.folder), release_id=release["release_id"]).get("failed"):
                return self.committed(release, name)
        known = read_confirm(str(self.site.folder), release["release_id"])
        if not known:
            return self.mend(release)
        deadline = time.monotonic() + 60
        while process_started(known["pid"]):
            assert time.monotonic() < deadline, "it waits for ever"
            time.sleep(0.02)
        assert read_confirm(str(self.site.folder), release["release_id"])["state"] == "gone_back", known
        assert not self.site.revert(release)["changed"]
        return "went back by itself"

    def edge_dies(self, name: str) -> str:
        """Its service manager brings it back. Who has a connection to it loses that."""
        self.excuse = "on connections of the edge that died"
        return self._meanwhile(name, self.proxy.crash)

    def edge_stalls(self, name: str) -> str:
        seconds = self.chance.choice([0.2, 1, 3, 7])

        def stall() -> None:
            self.proxy.process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            self.proxy.process.send_signal(signal.SIGCONT)

        return self._meanwhile(name, stall)

    def edge_refuses(self, name: str) -> str:
        """All of its slots are taken by somebody else; a strategy that first takes an old one out finds room."""
        edge = self.proxy.edge()
        taken = {up.slot for up in edge.upstreams(self.proxy.backend)}
        free = [f"s{number}" for number in range(1, 9) if f"s{number}" not in taken]
        ask = edge.socket.ask  # type: ignore[attr-defined]
        for number, slot in enumerate(free):
            ask(f"set server {self.proxy.backend}/{slot} addr 127.0.0.9 port {number + 1}")
            ask(f"set server {self.proxy.backend}/{slot} state drain")
        try:
            release = self.site.release(name)
            return self.ended(release, name, self.site.call(**release))
        finally:
            for number in range(len(free)):
                edge.remove(self.proxy.backend, "127.0.0.9", number + 1)

    def container_dies(self, name: str) -> str:
        """One of the new containers, as soon as there is one that runs."""
        release = self.site.release(name)
        before = set(self.site.containers("web"))
        process = self.site.start(**release)
        while process.poll() is None:
            fresh = sorted(set(self.site.containers("web", running=True)) - before)
            if fresh:
                self.excuse = "on a container that died"
                self.site.engine.kill(self.chance.choice(fresh))
                break
            time.sleep(0.01)
        result = json.loads(process.communicate(timeout=180)[0].strip().splitlines()[-1])
        if result.get("failed"):
            return self.taken_back(result)
        # It died after the rollout had looked at it for the last time: that is for the restart policy, and for whoever watches (bake).
        self.site.revert(release)
        return "undone by hand"

    def image_removed(self, name: str) -> str:
        return self._meanwhile(
            name, lambda: subprocess.run(["docker", "image", "rm", "-f", self.site.images[name]], check=False, capture_output=True)
        )

    def disk_full(self, name: str) -> str:
        """From some line of the journal on nothing can be written."""
        filler = self.site.folder / "releases" / "filler"

        def fill() -> None:
            with open(filler, "wb", buffering=0) as handle, contextlib.suppress(OSError):
                while handle.write(b"x" * 65536):
                    pass
            with open(filler, "ab", buffering=0) as handle, contextlib.suppress(OSError):
                while handle.write(b"x"):
                    pass

        release = self.site.release(name)
        journal = Journal.open(str(self.journal(release)), "test")
        journal.note("planned", padding="")
        # A file of this file system grows by whole pages: how many lines still fit into the last one is left to chance.
        journal.note("planned", padding="x" * (4096 - 2 * os.path.getsize(journal.path) - self.chance.randint(0, 2000)))
        result = self._run_and(release, fill)
        filler.unlink()
        return self.ended(release, name, result)

    def two_at_once(self, name: str) -> str:
        """A second module on the same host waits or is refused; never do both work."""
        release = self.site.release(name)
        processes = [self.site.start(**release) for _one in range(2)]
        results = [json.loads(one.communicate(timeout=180)[0].strip().splitlines()[-1]) for one in processes]
        assert any(not one.get("failed") for one in results), results
        return self.committed(release, name)

    def engine_dies(self, name: str) -> str:
        """And starts again, with or without its containers' lives."""
        after = self.chance.choice([0, 0.5, 3])

        def die() -> None:
            self.engine.live_restore = self.chance.random() < 0.5
            if not self.engine.live_restore:
                self.excuse = "while the engine started its containers again"
            self.engine.kill()
            time.sleep(after)
            self.engine.start()

        told = self._meanwhile(name, die)
        if not self.engine.live_restore:
            self.synced()
        return told

    def engine_stalls(self, name: str) -> str:
        seconds = self.chance.choice([0.5, 2, 10])

        def stall() -> None:
            self.engine.stall()
            time.sleep(seconds)
            self.engine.go_on()

        return self._meanwhile(name, stall)

    def host_reboots(self, name: str) -> str:
        """Power is gone at some line of the journal: modules, engine, containers, edge. Then all starts that starts by itself."""
        self.excuse = "while the host was off"
        release = self.site.release(name)
        module = self.site.start(**release, confirm_within=self.chance.choice([0, 0.5]))
        cut = threading.Event()

        def power() -> None:
            module.kill()
            self.proxy.process.kill()
            known = read_confirm(str(self.site.folder), release["release_id"])
            if known:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(known["pid"], signal.SIGKILL)
            self.engine.power_off()
            cut.set()

        self._at_some_line(release, module, power)
        module.communicate()
        assert cut.is_set()
        for pid in _marked(f"{MARKER}={self.site.project}/{release['release_id']}".encode()):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.proxy.process.wait()
        self.proxy.start()
        self.engine.live_restore = self.chance.random() < 0.5
        self.engine.start()
        told = self.mend(release)
        self.synced()
        return told

    def synced(self) -> None:
        """Addresses may be others after a start; where a release had ended, or changed nothing yet, none looks after that."""
        self.moved += self.site.ok(state="synced", project_dir=str(self.site.folder))["changed"]

    def _meanwhile(self, name: str, what: t.Callable[[], object]) -> str:
        release = self.site.release(name)
        return self.ended(release, name, self._run_and(release, what))

    def _run_and(self, release: Release, what: t.Callable[[], object]) -> dict[str, t.Any]:
        """The module's result, with ``what`` done at some line of its journal."""
        process = self.site.start(**release)
        with ThreadPoolExecutor(1) as beside:
            done = beside.submit(self._at_some_line, release, process, what)
            out, err = process.communicate(timeout=240)
            done.result()
        assert out.strip(), err
        return json.loads(out.strip().splitlines()[-1])

    def _at_some_line(self, release: Release, process: subprocess.Popen[str], what: t.Callable[[], object]) -> None:
        wanted = self.chance.randint(1, LINES)
        while lines_of(self.journal(release)) < wanted and process.poll() is None:
            time.sleep(0.002)
        what()

    # -- what holds after each

    def journal(self, release: Release) -> Path:
        return self.site.folder / "releases" / release["release_id"] / "journal.jsonl"

    def check(self, told: str) -> None:
        site = self.site
        with busy(str(site.folder), timeout=30):  # nobody works here any more
            pass
        current = json.loads((site.folder / "current" / "rollout.json").read_text())
        kept = set(current.get("kept") or {})
        web = [one for one in site.containers("web") if one not in kept]
        worker = [one for one in site.containers("worker") if one not in kept]
        assert len(web) == REPLICAS == len(set(web) & set(site.containers("web", running=True))), f"{told}: not the containers of one release"
        assert worker == [one for one in site.containers("worker", running=True) if one not in kept] and len(worker) == 1, told
        details = {one: site.engine.inspect(one) for one in [*web, *worker]}
        assert {one["Config"]["Image"] for one in details.values()} == {site.images[self.serves]}, told
        assert {details[one]["HostConfig"]["RestartPolicy"]["Name"] for one in [*web, *worker]} == {"always"}, told
        assert site.containers("db") == self.dependency == site.containers("db", running=True), f"{told}: what did not change was touched"
        addresses = sorted(details[one]["NetworkSettings"]["Networks"][f"{site.project}_default"]["IPAddress"] for one in web)
        ups = sorted((up.address, up.state, up.weight) for up in self.proxy.edge().upstreams(self.proxy.backend))
        assert [one[0] for one in ups] == addresses and {one[1] for one in ups} == {"ready"}, (told, ups, addresses)
        assert len({one[2] for one in ups}) == 1, f"{told}: the shares are not equal, {ups}"
        written = parse_servers_state((self.proxy.folder / "state").read_text())
        assert sorted(one["srv_addr"] for one in written if one["srv_port"] == "8080") == addresses, f"{told}: the edge would start with others"
        assert self.answer(told) == self.serves and self.proxy.post() != 503, told
        left = [one for one in site.engine.containers({"com.docker.compose.project": site.project}) if one["Labels"][SERVICE_LABEL] == "migrate"]
        assert left == [], f"{told}: a migrator is left"
        newest = max((site.folder / "releases").glob("0*"), key=lambda one: one.name)
        entries = site.journal({"release_id": newest.name})
        assert [one["seq"] for one in entries] == list(range(1, len(entries) + 1)), f"{told}: the journal has gaps"
        assert sum(1 for one in entries if one["step"] == "migrated" and one["event"] == "note") <= 1, f"{told}: migrated twice"
        assert not _marked(f"{MARKER}={site.project}/{newest.name}".encode()), f"{told}: a program is left"

    def answer(self, told: str) -> str:
        """What serves; where the edge or its containers have just started, their health checks come first."""
        deadline = time.monotonic() + (20 if self.excuse else 0)
        while True:
            try:
                return self.proxy.get()
            except (OSError, AssertionError) as exc:
                assert time.monotonic() < deadline, (told, repr(exc))
            time.sleep(0.1)


FAULTS: dict[str, t.Callable[[Soak, str], str]] = {
    "none": Soak.nothing,
    "no fault": Soak.nothing,
    "never ready": lambda soak, _name: soak.bad_build("never"),
    "crash loop": lambda soak, _name: soak.bad_build("crash"),
    "failing migrator": lambda soak, _name: soak.bad_build("failing"),
    "broken": Soak.broken,
    "killed": Soak.killed,
    "killed, and the way back too": Soak.killed_twice,
    "killed in the commit": Soak.killed_in_the_commit,
    "killed, and nobody confirms": Soak.unconfirmed,
    "edge dies": Soak.edge_dies,
    "edge stalls": Soak.edge_stalls,
    "edge refuses": Soak.edge_refuses,
    "container dies": Soak.container_dies,
    "image removed": Soak.image_removed,
    "disk full": Soak.disk_full,
    "two at once": Soak.two_at_once,
    "engine dies": Soak.engine_dies,
    "engine stalls": Soak.engine_stalls,
    "host reboots": Soak.host_reboots,
}


@contextlib.contextmanager
def small_disk(folder: Path) -> t.Iterator[None]:
    """One of its own for the releases, so that it can be full."""
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_every_rollout_ends_in_one_of_two_ways(site: Site, proxy: Proxy, engine: OwnEngine) -> None:
    seed = int(os.environ.get("SOAK_SEED") or time.time())
    rollouts = int(os.environ.get("SOAK_ROLLOUTS") or 200)
    faults = [one.strip() for one in (os.environ.get("SOAK_FAULTS") or "").split(";") if one.strip()] or sorted(FAULTS)
    print(f"\nSOAK_SEED={seed} SOAK_ROLLOUTS={rollouts}", flush=True)
    # An engine 20.10 that was killed and starts again takes `unless-stopped` for stopped.
    site.compose["services"]["web"].update(deploy={"replicas": REPLICAS}, restart="always")
    site.compose["services"]["db"]["restart"] = "always"
    soak = Soak(site, proxy, engine, random.Random(seed))
    with small_disk(site.folder / "releases"):
        site.deploy("one")
        soak.dependency = site.containers("db")
        started = time.monotonic()
        for number in range(1, rollouts + 1):
            begun = time.monotonic()
            try:
                told = soak.turn(faults)
            except BaseException:
                print(f"{number:4d}  failed; the engine's last words:\n{engine.last_words()}", flush=True)
                raise
            print(f"{number:4d}  {time.monotonic() - begun:5.1f} s  {told}", flush=True)
    seconds = time.monotonic() - started
    print(f"{rollouts} rollouts in {seconds:.0f} s, {soak.sent} requests; {soak.lost} lost, each on what had died under it; {soak.moved} times the edge had to be told new addresses:")
    for end, times in sorted(soak.ends.items()):
        print(f"  {times:4d}  {end}")
