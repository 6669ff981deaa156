# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a snapshot set and its restore cost beside the bare programs and beside tar; `make bench-data` runs it.

Every tool works on the same Docker volume, which a running container has mounted, and has a repository of its own. In each round every
tool does the case once, in turn, on the same change, so that a machine whose speed drifts is as unfair to one as to the other. Ours is one
process, as a module of Ansible runs it, with all that a set is: warm pass, window, checks, manifest, and the reading back of what was stored.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import typing as t
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLLECTIONS = ROOT / ".cache" / "collections"
sys.path[:0] = [str(COLLECTIONS), str(ROOT / "tests"), str(ROOT / "tests" / "bench")]

from e2e import shopfront  # noqa: E402
from measure import plot, run  # noqa: E402

from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import api  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import Settings, SnapshotEngine, engine_from  # noqa: E402

PASSWORD = "not-a-secret-in-a-benchmark"
ENGINES = ("kopia", "restic")
MB = 1_000_000
CASES = {
    "unchanged": "a set of {files:,} files, {tree} MB, nothing changed since the last",
    "one changed": "a set of {big} MB in files of 10 MB, one of them changed",
    "freeze": "a set of one file of {big} MB that is written to all the time, a page of 8 KiB every 50 ms",
    "restore": "{files:,} files, {tree} MB, given back",
}
#: Runs one call of a module's function and leaves its result.
_CALL = """
import json, sys
sys.path.insert(0, {collections!r})
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import api
call = json.load(open(sys.argv[1]))
result = getattr(api, call["function"])(call["engine"], call["params"], False)
json.dump(result, open(sys.argv[2], "w"))
"""
_WRITER = "while :; do /bin/busybox dd if=/dev/urandom of=/data/big bs=8k count=1 conv=notrunc seek=$((RANDOM % {pages})) 2>/dev/null; usleep 50000; done"


@dataclass
class Timed:
    """Seconds of one run, and for how long writers stood still or the app was away, milliseconds; ``None`` where that is no question."""

    wall: float
    freeze_ms: float | None = None
    outage_ms: float | None = None


@dataclass
class Place:
    """A volume with data in it, the container that uses it, and room for everything else."""

    work: Path
    volume: str
    data: Path
    container: str = ""
    number: int = 0

    def start(self, *command: str) -> None:
        argv = ["docker", "run", "--detach", "--init", "--network", "none", "-v", f"{self.volume}:/data", shopfront.KEEPER_IMAGE, *command]
        self.container = subprocess.check_output(argv, text=True).strip()

    def end(self) -> None:
        if self.container:
            subprocess.run(["docker", "rm", "--force", self.container], check=False, capture_output=True)
        self.container = ""


@dataclass
class Tool:
    """``group`` names the bare program that a ratio is of. ``prepare`` runs untimed, once a case; ``go`` is timed by itself."""

    name: str
    group: str
    prepare: t.Callable[[], None]
    go: t.Callable[[], Timed]
    runs: list[Timed] = field(default_factory=list)


def engine_at(place: Place, kind: str, name: str) -> SnapshotEngine:
    settings = Settings(repository=str(place.work / f"{kind}-{name}"), password=PASSWORD, config_dir=str(place.work / f"config-{kind}-{name}"))
    engine = engine_from(kind, settings)
    if not Path(settings.repository).exists():
        engine.create()
    engine.connect()
    return engine


def call(place: Place, function: str, kind: str, name: str, **params: t.Any) -> tuple[float, dict[str, t.Any]]:
    """Seconds and result of one module call, in a process of its own."""
    spec = {"snapshot": api.SNAPSHOT_ARGUMENTS, "restore": api.RESTORE_ARGUMENTS}[function]
    given = {key: option.get("default") for key, option in spec.items()}
    given.update(
        repository=str(place.work / f"{kind}-{name}"),
        password=PASSWORD,
        config_dir=str(place.work / f"config-{kind}-{name}"),
        manifest_dir=str(place.work / f"manifests-{kind}-{name}"),
        **params,
    )
    (place.work / "call.json").write_text(json.dumps({"function": function, "engine": kind, "params": given}))
    command = [sys.executable, "-c", _CALL.format(collections=str(COLLECTIONS)), str(place.work / "call.json"), str(place.work / "result.json")]
    done = run(command, place.work / "tool.log", {})
    return done.wall, json.loads((place.work / "result.json").read_text())


def set_tool(place: Place, kind: str, verify: bool) -> Tool:
    name = "set" if verify else "set-unread"

    def take() -> Timed:
        place.number += 1
        wall, result = call(place, "snapshot", kind, name, set_id=f"bench-{place.number}", volumes=[place.volume], verify="repository" if verify else "none")
        return Timed(wall, result["freeze_seconds"] * 1000, 0.0)

    def prepare() -> None:
        engine_at(place, kind, name)
        take()

    return Tool(f"{kind}: set" + ("" if verify else ", verify: none"), kind, prepare, take)


def bare_tool(place: Place, kind: str) -> Tool:
    """The program alone, with the settings of ours. All of its time, writers would have to stand still."""

    def take() -> Timed:
        engine = engine_at(place, kind, "bare")
        words = ["snapshot", "create", "--no-progress", "--no-auto-maintenance"] if kind == "kopia" else ["backup", "--quiet"]
        repository = [] if kind == "kopia" else ["--repo", str(place.work / f"{kind}-bare")]
        environment: dict[str, str] = engine.environment()  # type: ignore[attr-defined]
        done = run([kind, *repository, *words, str(place.data)], place.work / "tool.log", environment)
        return Timed(done.wall, done.wall * 1000, 0.0)

    def prepare() -> None:
        engine_at(place, kind, "bare").prepare([str(place.data)])
        take()

    return Tool(f"{kind}, bare", kind, prepare, take)


def tar_tools(place: Place) -> list[Tool]:
    archive = place.work / "archive.tar.zst"
    pack = ["tar", "--acls", "--xattrs", "-S", "-I", "zstd -1", "-cf", str(archive), "-C", str(place.data), "."]

    def live() -> Timed:
        return Timed(run(pack, place.work / "tool.log", {}).wall)

    def stopped() -> Timed:
        began = time.perf_counter()
        subprocess.run(["docker", "stop", place.container], check=True, capture_output=True)
        subprocess.run(pack, check=True, capture_output=True)
        subprocess.run(["docker", "start", place.container], check=True, capture_output=True)
        away = time.perf_counter() - began
        return Timed(away, away * 1000, away * 1000)

    return [Tool("tar + zstd, nothing held", "tar", lambda: None, live), Tool("stop, tar + zstd, start", "tar", lambda: None, stopped)]


def copy_tool(place: Place) -> Tool:
    """What the window is held against: a plain copy of the file that changes."""

    def copied() -> Timed:
        began = time.perf_counter()
        subprocess.run(["docker", "pause", place.container], check=True, capture_output=True)
        frozen = time.perf_counter()
        shutil.copyfile(place.data / "big", place.work / "copy")
        held = time.perf_counter() - frozen
        subprocess.run(["docker", "unpause", place.container], check=True, capture_output=True)
        (place.work / "copy").unlink()
        return Timed(time.perf_counter() - began, held * 1000, 0.0)

    return Tool("pause, plain copy", "copy", lambda: None, copied)


def restore_tools(place: Place, kinds: t.Sequence[str]) -> list[Tool]:
    tools = []
    for kind in kinds:

        def prepare(kind: str = kind) -> None:
            engine_at(place, kind, "restore")
            call(place, "snapshot", kind, "restore", set_id="given-back", volumes=[place.volume])
            engine = engine_at(place, kind, "bare")
            if not any(one.source == str(place.data) and one.tags["set"] == "bare" for one in engine.contents()):
                engine.prepare([str(place.data)])
                engine.snapshot([str(place.data)], {"set": "bare"}, True, 3600, False)

        def ours(kind: str = kind, keep: bool = False) -> Timed:
            spoil(place.data)
            wall, result = call(place, "restore", kind, "restore", set_id="given-back", keep_current=keep)
            return Timed(wall, None, result["downtime_seconds"] * 1000)

        def bare(kind: str = kind) -> Timed:
            engine = engine_at(place, kind, "bare")
            stored = next(one for one in engine.contents() if one.source == str(place.data) and one.tags["set"] == "bare")
            environment: dict[str, str] = engine.environment()  # type: ignore[attr-defined]
            target = str(place.work / "given")
            words = ["restore", "--mode=local", stored.snapshot, target]
            if kind == "restic":
                words = ["--repo", str(place.work / f"{kind}-bare"), "restore", stored.snapshot, "--target", target]
            done = run([kind, *words], place.work / "tool.log", environment)
            shutil.rmtree(target)
            # In place the app would have to be away for all of it.
            return Timed(done.wall, None, done.wall * 1000)

        tools.append(Tool(f"{kind}, bare", kind, lambda: None, bare))
        tools.append(Tool(f"{kind}: restore, keep_current: false", kind, prepare, ours))
        tools.append(Tool(f"{kind}: restore, what it replaces kept", kind, lambda: None, lambda kind=kind, ours=ours: ours(kind, True)))
    archive = place.work / "archive.tar.zst"

    def pack() -> None:
        subprocess.run(["tar", "-I", "zstd -1", "-cf", str(archive), "-C", str(place.data), "."], check=True)

    def unpack() -> Timed:
        target = place.work / "given"
        target.mkdir()
        began = time.perf_counter()
        subprocess.run(["docker", "stop", place.container], check=True, capture_output=True)
        subprocess.run(["tar", "-I", "zstd", "-xf", str(archive), "-C", str(target)], check=True)
        subprocess.run(["docker", "start", place.container], check=True, capture_output=True)
        away = time.perf_counter() - began
        shutil.rmtree(target)
        return Timed(away, None, away * 1000)

    tools.append(Tool("stop, tar + zstd, start", "tar", pack, unpack))
    return tools


# -- data ----------------------------------------------------------------------------------------------------------------


def fill_tree(data: Path, files: int, total: int) -> None:
    """Many small files and a few large ones, half of each compressible."""
    large = max(1, files // 200)
    each = {True: total * 6 // 10 // large, False: total * 4 // 10 // max(1, files - large)}
    lot = random.Random(1)
    for number in range(files):
        folder = data / f"{number % 100:02d}"
        folder.mkdir(exist_ok=True)
        _write(folder / f"file-{number}", each[number < large], lot)


def _write(path: Path, size: int, lot: random.Random) -> None:
    with path.open("wb") as handle:
        while size > 0:
            part = min(size, 1 << 20)
            handle.write(lot.randbytes(part // 2) + b"x" * (part - part // 2))
            size -= part


def spoil(data: Path) -> None:
    """One file is another one, so that there is something to give back."""
    (data / "00" / "spoilt").write_text(str(time.time_ns()))


# -- the run -------------------------------------------------------------------------------------------------------------


def run_case(name: str, place: Place, options: argparse.Namespace, kinds: t.Sequence[str]) -> list[Tool]:
    for entry in place.data.iterdir():
        shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    change: t.Callable[[int], None] = lambda _number: None  # noqa: E731
    if name in ("unchanged", "restore"):
        fill_tree(place.data, options.files, options.tree_mb * MB)
    elif name == "one changed":
        lot = random.Random(2)
        for number in range(max(1, options.big_mb // 10)):
            _write(place.data / f"part-{number}", 10 * MB, lot)

        def change(number: int) -> None:
            _write(place.data / "part-0", 10 * MB, random.Random(1000 + number))

    else:
        _write(place.data / "big", options.big_mb * MB, random.Random(3))
    pages = options.big_mb * MB // 8192
    place.start(*(("/bin/sh", "-c", _WRITER.format(pages=pages)) if name == "freeze" else ()))
    try:
        if name == "restore":
            tools = restore_tools(place, kinds)
        else:
            tools = [tool for kind in kinds for tool in (bare_tool(place, kind), set_tool(place, kind, True), set_tool(place, kind, False))]
            tools += tar_tools(place) + ([copy_tool(place)] if name == "freeze" else [])
        for tool in tools:
            tool.prepare()
        for number in range(options.runs):
            change(number)
            os.sync()
            for tool in tools[number % len(tools) :] + tools[: number % len(tools)]:
                done = tool.go()
                os.sync()
                tool.runs.append(done)
                held = "" if done.freeze_ms is None else f"  frozen {done.freeze_ms:8.0f} ms"
                away = "" if done.outage_ms is None else f"  away {done.outage_ms:8.0f} ms"
                say(f"  {name:12} {number + 1}  {tool.name:44} {done.wall:8.2f} s{held}{away}")
        return tools
    finally:
        place.end()
        for entry in place.work.iterdir():
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()


def rows_of(case: str, tools: t.Sequence[Tool]) -> list[dict[str, t.Any]]:
    """What build/bench/data.json holds. The ratio is of medians; tar and a plain copy have none."""
    bare = {tool.group: statistics.median(one.wall for one in tool.runs) for tool in tools if tool.name.endswith(", bare")}
    rows = []
    for tool in tools:
        median = statistics.median(one.wall for one in tool.runs)

        def middle(values: t.Iterable[float | None]) -> float | None:
            known = [value for value in values if value is not None]
            return round(statistics.median(known), 1) if known else None

        rows.append(
            {
                "case": case,
                "tool": tool.name,
                "runs": len(tool.runs),
                "median_s": round(median, 3),
                "min_s": round(min(one.wall for one in tool.runs), 3),
                "ratio_to_bare": round(median / bare[tool.group], 3) if tool.group in bare else None,
                "freeze_ms": middle(one.freeze_ms for one in tool.runs),
                "outage_ms": middle(one.outage_ms for one in tool.runs),
            }
        )
    return rows


def table(rows: t.Sequence[t.Mapping[str, t.Any]]) -> str:
    lines = ["| case | tool | runs | median s | minimum s | ratio to bare | writers frozen ms | app away ms |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        ratio = "" if row["ratio_to_bare"] is None else f"{row['ratio_to_bare']:.2f}"
        frozen, away = (("" if row[key] is None else f"{row[key]:,.0f}") for key in ("freeze_ms", "outage_ms"))
        lines.append(f"| {row['case']} | {row['tool']} | {row['runs']} | {row['median_s']:.2f} | {row['min_s']:.2f} | {ratio} | {frozen} | {away} |")
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=5, help="of each tool and case (default: 5)")
    parser.add_argument("--only", default=",".join(CASES), help="these cases, with commas between them: " + ", ".join(CASES))
    parser.add_argument("--engines", default=",".join(ENGINES), help="these, with a comma between them")
    parser.add_argument("--files", type=int, default=20000, help="of the tree (default: 20000)")
    parser.add_argument("--tree-mb", type=int, default=1000, help="size of the tree (default: 1000)")
    parser.add_argument("--big-mb", type=int, default=2000, help="size of the large data (default: 2000)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench", help="folder for data.json, data.md and data.svg")
    parser.add_argument("--work", type=Path, help="folder for repositories and copies (default: that of temporary files)")
    options = parser.parse_args()
    chosen = [name for name in CASES if name in options.only.split(",")]
    kinds = [kind for kind in options.engines.split(",") if shutil.which(kind)]
    for kind in options.engines.split(","):
        if kind not in kinds:
            say(f"WARNING: NO {kind.upper()} in this run: it is not on PATH")
    # Whatever ends it, the container and the volume go.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(143))
    shopfront.build_keeper()
    rows: list[dict[str, t.Any]] = []
    volume = f"bench-data-{os.getpid()}"
    data = Path(subprocess.check_output(["docker", "volume", "create", volume], text=True) and _mountpoint(volume))
    try:
        with tempfile.TemporaryDirectory(prefix="bench-data-", dir=options.work) as folder:
            os.chmod(folder, 0o700)
            for name in chosen:
                say(f"{name}: {CASES[name].format(files=options.files, tree=options.tree_mb, big=options.big_mb)}")
                place = Place(Path(folder), volume, data)
                rows += rows_of(name, run_case(name, place, options, kinds))
                # A run takes long; one that is ended early leaves the cases that are done.
                options.output.mkdir(parents=True, exist_ok=True)
                (options.output / "data.json").write_text(json.dumps(rows, indent=2) + "\n")
                (options.output / "data.md").write_text(table(rows) + "\n")
                ours = {row["tool"] for row in rows if ": " in row["tool"]}
                caption = "ratio of medians to the bare program; left of the line is faster than it"
                (options.output / "data.svg").write_text(plot(rows, ours, "Snapshot sets beside the bare programs", "ratio_to_bare", caption))
    finally:
        subprocess.run(["docker", "volume", "rm", volume], check=False, capture_output=True)
    say(f"\n{table(rows)}\n")
    say(f"{os.cpu_count()} processors, load at the end {os.getloadavg()[0]:.1f}; {', '.join(_version(kind) for kind in kinds)}")
    say(f"Written: data.json, data.md and data.svg in {options.output}")
    return 0


def _mountpoint(volume: str) -> str:
    return subprocess.check_output(["docker", "volume", "inspect", "--format", "{{.Mountpoint}}", volume], text=True).strip()


def _version(kind: str) -> str:
    words = ["version"] if kind == "restic" else ["--version"]
    return f"{kind} {subprocess.check_output([kind, *words], text=True).split(' from:', maxsplit=1)[0].strip()[:60]}"


if __name__ == "__main__":
    sys.exit(main())
