# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The demo: a small shop goes through four releases on real components, and each claim is checked by what was seen.

    demo.py run     the whole story; exit code 0 only when every claim was seen to be true
    demo.py down    remove everything the demo made

Each step is an ``ansible-playbook`` command that is printed first and can be repeated by hand. Around it the demo asks the public route,
the database and a load generator, prints the claim with the evidence, and sums up at the end.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import shlex
import subprocess
import sys
import threading
import time
import typing as t
from pathlib import Path

import images
import stage as ground
from images import ImageError

CHECKOUT = Path(__file__).resolve().parent.parent
IMPORTED_ORDERS = 5000


class StoryEnded(Exception):
    """What follows would prove nothing after what just happened."""


@dataclasses.dataclass(frozen=True)
class Claim:
    chapter: str
    text: str
    evidence: str
    true: bool


@dataclasses.dataclass(frozen=True)
class Ran:
    """One playbook run: its exit code, what it said, how long it took in seconds."""

    code: int
    output: str
    seconds: float


class Load:
    """The load generator, in a process of its own, against the edge of production."""

    def __init__(self, stage: ground.Stage, name: str) -> None:
        self._result = stage.folder / "load" / f"{name}.json"
        self._pid_file = stage.folder / "load" / f"{name}.pid"
        self._result.parent.mkdir(parents=True, exist_ok=True)
        self._result.unlink(missing_ok=True)
        command = [sys.executable, str(Path(__file__).with_name("load.py")), "--url", f"http://127.0.0.1:{stage.ports['production']}"]
        command += ["--out", str(self._result), "--seconds", "900"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._pid_file.write_text(str(self._process.pid))
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def end(self) -> dict[str, t.Any]:
        """Stop it and return its result; a generator that ended before it was told to proves nothing."""
        early = self._process.poll() is not None
        self._process.terminate()
        self._process.wait()
        self._pid_file.unlink(missing_ok=True)
        if early or not self._result.exists():
            raise StoryEnded(f"the load generator ended by itself with {self._process.returncode}")
        return t.cast("dict[str, t.Any]", json.loads(self._result.read_text()))


class Witness:
    """Looks at production's rows while a promotion runs, and remembers the worst it saw."""

    def __init__(self, database: ground.Database) -> None:
        self.damaged = 0
        self._database = database
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self.damaged and not self._over.wait(0.3):
            # The database is paused for the snapshot and stopped for the restore; then there is nothing to be seen.
            with contextlib.suppress(ImageError):
                self.damaged = self._database.number("SELECT count(*) FROM orders WHERE total_cents <= 0")

    def end(self) -> int:
        self._over.set()
        self._thread.join()
        return self.damaged


class Demo:
    """The story, its claims and its clock."""

    def __init__(self, stage: ground.Stage) -> None:
        self.stage = stage
        self.claims: list[Claim] = []
        self.times: dict[str, float] = collections.OrderedDict()
        self.tags: dict[int, str] = {}
        self._chapter = ""
        self._began = time.monotonic()

    # How it is told

    @contextlib.contextmanager
    def chapter(self, title: str) -> t.Iterator[None]:
        self._chapter = title
        print(f"\n━━━ {title} {'━' * max(3, 100 - len(title))}", flush=True)
        began = time.monotonic()
        try:
            yield
        finally:
            self.times[title] = time.monotonic() - began

    def claim(self, text: str, true: bool, evidence: object) -> bool:
        made = Claim(self._chapter, text, str(evidence), bool(true))
        self.claims.append(made)
        print(f"  {'✓' if made.true else '✗'} {text}: {made.evidence}", flush=True)
        return made.true

    def must(self, text: str, true: bool, evidence: object) -> None:
        """A claim without which the rest of the story makes no sense."""
        if not self.claim(text, true, evidence):
            raise StoryEnded(f"not true: {text}")

    def playbook(self, name: str, environment: str, **variables: str) -> Ran:
        """Run one playbook as a user would, with its output shown as it comes."""
        shown = ["ansible-playbook", f"playbooks/{name}.yml", "-i", f"demo/inventories/{environment}"]
        for key, value in variables.items():
            shown += ["-e", f"{key}={value}"]
        print(f"\n$ {shlex.join(shown)}", flush=True)
        began = time.monotonic()
        process = subprocess.Popen(
            [str(Path(sys.executable).with_name("ansible-playbook")), *shown[1:]],
            cwd=CHECKOUT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            errors="replace",
        )
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line)
            sys.stdout.write(f"  │ {line}")
            sys.stdout.flush()
        code = process.wait()
        ran = Ran(code, "".join(lines), time.monotonic() - began)
        print(f"  └ exit code {code} after {ran.seconds:.1f} s", flush=True)
        return ran

    # What it looks at

    def answers(self, environment: str) -> ground.Answer:
        return ground.ask(self.stage.ports[environment])

    def serves(self, environment: str, release: int, *, still: bool = False) -> bool:
        """Claim that the public route of an environment is answered by this release, ready."""
        answer = self.answers(environment)
        text = f"{environment} {'still ' if still else ''}answers as release {release} ({self.tags[release]})"
        return self.claim(text, answer.status == 200 and answer.version == self.tags[release], answer)

    def promoted(self, environment: str, release: int, **variables: str) -> None:
        """Promote, and claim that it worked."""
        ran = self.playbook("promote", environment, tag=self.tags[release], **variables)
        self.must(f"release {release} was promoted to {environment}", ran.code == 0, f"exit code {ran.code}, {ran.seconds:.1f} s")
        if not self.serves(environment, release):
            raise StoryEnded(f"{environment} does not answer as release {release}")

    def lost_nothing(self, result: dict[str, t.Any], database: ground.Database) -> None:
        latency = result["latency_ms"]
        lost = f"{result['lost']} lost {result['failures'] if result['failures'] else ''}".strip()
        self.claim(
            "no request was lost",
            result["sent"] > 0 and result["lost"] == 0,
            f"{result['sent']} requests sent, {lost}, in {result['seconds']:.0f} s; longest gap {result['longest_gap_ms']:.0f} ms,"
            f" p50 {latency['p50']} ms, p99 {latency['p99']} ms",
        )
        found = database.number(f"SELECT count(*) FROM orders WHERE item = '{result['run']}'")
        self.claim(
            "every order that was acknowledged is in the database",
            result["writes"] > 0 and found == result["writes"],
            f"{result['writes']} acknowledged, {found} found",
        )

    # The story

    def prepare(self) -> None:
        stage = self.stage
        print("Every command below can be repeated by hand in this folder, as root, after:")
        settings = {
            "ANSIBLE_CONFIG": "demo/ansible.cfg",
            **{name: os.environ[name] for name in sorted(os.environ) if name.startswith("DEMO_")},
        }
        print(f"  export PATH=$PWD/.venv/bin:$PATH {shlex.join(f'{name}={value}' for name, value in settings.items())}")
        with self.chapter("Prepare: base images, registry, edges, four builds of the shop"):
            ground.reset(stage)
            taken = ground.taken_ports(stage)
            if taken:
                variables = "DEMO_REGISTRY_PORT, DEMO_STAGING_PORT and DEMO_PRODUCTION_PORT"
                raise StoryEnded(f"port {', '.join(map(str, taken))} is used by another program; choose others with {variables}")
            secrets_were_there = (stage.folder / "secrets.yml").exists()
            ground.keep_secrets(stage)
            print(f"  passwords: {'kept' if secrets_were_there else 'made'}, in {stage.folder}/secrets.yml", flush=True)
            began = time.monotonic()
            base = images.rootfs(stage.cache)
            database = images.build_postgres(base, f"{stage.registry}/base/postgres")
            print(f"  base images from {images.distribution().codename} packages: {time.monotonic() - began:.1f} s", flush=True)
            ground.write_env_files(stage, database)
            for environment in ground.ENVIRONMENTS:
                ran = self.playbook("setup", environment)
                self.must(f"{environment} was set up", ran.code == 0, f"exit code {ran.code}, {ran.seconds:.1f} s")
            began = time.monotonic()
            run = time.strftime("%Y%m%d%H%M%S", time.gmtime())
            names = [database]
            for number in images.releases():
                repositories = {image: stage.repository(image) for image in ("app", "migrator")}
                self.tags[number] = images.build_release(number, base, repositories, run)
                names += [f"{repository}:{self.tags[number]}" for repository in repositories.values()]
            built = time.monotonic() - began
            ground.push(stage, names)
            pushed = time.monotonic() - began - built
            print(f"  built {len(names) - 1} images in {built:.1f} s, pushed in {pushed:.1f} s: ", end="")
            print(", ".join(f"release {number} = {tag}" for number, tag in self.tags.items()), flush=True)

    def first_release(self) -> None:
        with self.chapter("Release 1: to staging, then to production"):
            ran = self.playbook("promote", "production", tag=self.tags[1])
            made = ground.containers(self.stage.project("production"), everything=True)
            self.claim(
                "production refuses a build that staging has not seen, before anything changes",
                ran.code != 0 and not made,
                f"exit code {ran.code}, {len(made)} containers",
            )
            self.promoted("staging", 1)
            self.promoted("production", 1)
            ground.Database(self.stage.project("production")).import_orders(IMPORTED_ORDERS)
            print(f"  {IMPORTED_ORDERS} orders of the old shop imported into production", flush=True)

    def second_release(self) -> None:
        database = ground.Database(self.stage.project("production"))
        with self.chapter("Release 2: to production while customers use it"):
            self.promoted("staging", 2)
            load = Load(self.stage, "release-2")
            try:
                self.promoted("production", 2)
            finally:
                result = load.end()
            self.lost_nothing(result, database)
            seen = [version["version"] for version in result["versions"]]
            self.claim(
                "customers saw release 1, then release 2, and nothing else",
                seen == [self.tags[1], self.tags[2]],
                " → ".join(f"{version['version']} ({version['answers']} answers)" for version in result["versions"]),
            )

    def third_release(self) -> None:
        database = ground.Database(self.stage.project("production"))
        with self.chapter("Release 3: never gets ready in production, where a setting was forgotten"):
            self.promoted("staging", 3)
            before = running(self.stage.project("production"))
            load = Load(self.stage, "release-3")
            try:
                ran = self.playbook("promote", "production", tag=self.tags[3])
            finally:
                result = load.end()
            self.claim("the promotion failed and said so", ran.code != 0, f"exit code {ran.code} after {ran.seconds:.1f} s")
            self.serves("production", 2, still=True)
            after = running(self.stage.project("production"))
            self.claim("the same containers run as before", bool(before) and before == after, ", ".join(sorted(after)))
            self.lost_nothing(result, database)
            seen = [version["version"] for version in result["versions"]]
            self.claim("no customer ever saw release 3", seen == [self.tags[2]], ", ".join(seen))

    def fourth_release(self) -> None:
        database = ground.Database(self.stage.project("production"))
        with self.chapter("Release 4: its migration damages rows; taken back with its data"):
            self.promoted("staging", 4, delivery_migrations="breaking")
            database.settle()
            before = database.dump()
            witness = Witness(database)
            try:
                ran = self.playbook("promote", "production", tag=self.tags[4], delivery_migrations="breaking")
            finally:
                damaged = witness.end()
            self.claim("the promotion failed and said so", ran.code != 0, f"exit code {ran.code} after {ran.seconds:.1f} s")
            self.claim("its migration had really damaged rows", damaged > 0, f"{damaged} orders seen without their total")
            self.serves("production", 2, still=True)
            self.same_rows("every row is back as it was", before, database.dump())

    def back_to_the_first(self) -> None:
        database = ground.Database(self.stage.project("production"))
        with self.chapter("Back to release 1 by its tag: images alone, data stays"):
            database.settle()
            before = database.dump()
            ran = self.playbook("rollback", "production", tag=self.tags[1])
            self.claim("the rollback worked", ran.code == 0, f"exit code {ran.code}, {ran.seconds:.1f} s")
            self.serves("production", 1)
            self.same_rows("no row changed", before, database.dump())

    def status(self) -> None:
        with self.chapter("What happened, as the host remembers it"):
            ran = self.playbook("status", "production")
            rows = [line for line in ran.output.splitlines() if "sha-" in line]
            expected = [(1, "committed"), (2, "committed"), (3, "rolled_back"), (4, "rolled_back"), (1, "committed")]
            missing = [
                f"release {number} {end}"
                for (number, end), wanted in collections.Counter(expected).items()
                if sum(self.tags[number] in row and end in row for row in rows) < wanted
            ]
            self.claim("status.yml tells all five releases and their ends", ran.code == 0 and not missing, f"missing: {missing or 'none'}")

    def same_rows(self, text: str, before: dict[str, list[str]], after: dict[str, list[str]]) -> None:
        different = {
            table: len(set(before.get(table, [])) ^ set(after.get(table, [])))
            for table in sorted({*before, *after})
            if before.get(table) != after.get(table)
        }
        counts = ", ".join(f"{table} {len(rows)}" for table, rows in before.items() if not table.startswith("("))
        evidence = f"differing rows: {different}" if different else f"compared row by row: {counts}"
        self.claim(text, bool(before.get("orders")) and not different, evidence)

    def run(self) -> int:
        ended = ""
        try:
            for step in (
                self.prepare,
                self.first_release,
                self.second_release,
                self.third_release,
                self.fourth_release,
                self.back_to_the_first,
                self.status,
            ):
                step()
        except (StoryEnded, ImageError) as error:
            ended = str(error)
            print(f"\n✗ The story ends here: {ended}", flush=True)
        return self.sum_up(ended)

    def sum_up(self, ended: str) -> int:
        print(f"\n━━━ Summary {'━' * 92}")
        for title, seconds in self.times.items():
            print(f"\n{title}  ({seconds:.0f} s)")
            for claim in self.claims:
                if claim.chapter == title:
                    print(f"  {'✓' if claim.true else '✗'} {claim.text}\n      {claim.evidence}")
        wrong = sum(not claim.true for claim in self.claims)
        seconds = time.monotonic() - self._began
        print(f"\n{len(self.claims)} claims, {len(self.claims) - wrong} seen to be true, {wrong} not. {seconds:.0f} s in all.")
        if ended:
            print(f"The story did not get to its end: {ended}")
        else:
            places = (f"{environment}: http://127.0.0.1:{port}/" for environment, port in self.stage.ports.items())
            print(f"It still runs. {'   '.join(places)}   make demo-down removes all of it.")
        return 1 if wrong or ended else 0


def running(project: str) -> set[str]:
    """Names and images of the containers that run now."""
    return {f"{container['name']} ({container['image'].rpartition('/')[2][:25]})" for container in ground.containers(project)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Walk a small product through four releases on real components.")
    parser.add_argument("command", choices=("run", "down"))
    command = parser.parse_args().command
    if os.geteuid() != 0:
        print(f"The demo starts containers and services: run it as root, for example: sudo make demo{'-down' if command == 'down' else ''}")
        return 1
    # The demo's own output is UTF-8 whatever the terminal says.
    for stream in (sys.stdout, sys.stderr):
        t.cast("t.Any", stream).reconfigure(encoding="utf-8", errors="replace")
    stage = ground.Stage.from_environment()
    if command == "down":
        print(f"Removing the demo in {stage.folder}")
        ground.down(stage, keep_cache=bool(os.environ.get("KEEP_CACHE")))
        return 0
    if not images.engine_answers():
        print("No container engine answers here; make demo sets this machine up first.")
        return 1
    os.environ["ANSIBLE_CONFIG"] = str(CHECKOUT / "demo" / "ansible.cfg")
    os.environ.setdefault("LC_ALL", "C.UTF-8")
    return Demo(stage).run()


if __name__ == "__main__":
    sys.exit(main())
