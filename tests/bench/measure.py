# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a benchmark of whole programs needs: one measured process, counted requests, a plot. Standard library only."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
import typing as t
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

# A process's peak memory starts at what the process that started it had, so a small one stands between.
_LAUNCHER = """
import json, os, sys, time
log = os.open(sys.argv[1], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
actions = [(os.POSIX_SPAWN_DUP2, log, 1), (os.POSIX_SPAWN_DUP2, log, 2)]
begin = time.perf_counter()
pid = os.posix_spawnp(sys.argv[2], sys.argv[2:], os.environ, file_actions=actions)
_pid, status, usage = os.wait4(pid, 0)
wall = time.perf_counter() - begin
print(json.dumps([wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, os.waitstatus_to_exitcode(status)]))
"""


@dataclass(frozen=True)
class Run:
    """One finished process with all its children: seconds of the clock and of processors, MiB of the largest of them."""

    wall: float
    cpu: float
    peak_rss_mib: float


def run(command: t.Sequence[str], log: Path, environment: t.Mapping[str, str]) -> Run:
    """Run ``command`` to its end; ``RuntimeError`` with what it printed when it fails."""
    answer = subprocess.run(
        [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(log), *command],
        env={**os.environ, **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    wall, cpu, rss, code = json.loads(answer.stdout)
    if code:
        raise RuntimeError(f"{' '.join(command)[:300]} ended with {code}:\n{log.read_text(errors='replace')[-2000:]}")
    return Run(wall, cpu, rss)


class Counter:
    """Counts requests and rounds of HTTP/1.1 over any number of proxies on loopback, each in front of one registry.

    Every request is held back for ``delay`` seconds, so that those which do not wait for each other overlap: ``rounds`` is the
    longest chain of requests of which each began after the one before it was answered.
    """

    def __init__(self, delay: float = 0.05) -> None:
        self.delay = delay
        self._lock = threading.Lock()
        self._requests: list[tuple[float, float, str]] = []
        self._listeners: list[socket.socket] = []

    def proxy(self, address: str) -> str:
        """The address of a new proxy in front of ``address``."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._listeners.append(listener)
        host, _colon, port = address.rpartition(":")
        threading.Thread(target=self._accept, args=(listener, (host, int(port))), daemon=True).start()
        return f"127.0.0.1:{listener.getsockname()[1]}"

    def close(self) -> None:
        for listener in self._listeners:
            # Closing alone does not wake a thread that waits in accept.
            listener.shutdown(socket.SHUT_RDWR)
            listener.close()

    def take(self) -> list[tuple[float, float, str]]:
        """The requests since the last call: begin, answer, and method with path."""
        with self._lock:
            taken, self._requests = self._requests, []
        return taken

    @staticmethod
    def rounds(requests: t.Iterable[tuple[float, float, str]]) -> int:
        count, last = 0, 0.0
        for begin, end, _line in sorted(requests, key=lambda request: request[1]):
            if begin >= last:
                count, last = count + 1, end
        return count

    def _accept(self, listener: socket.socket, target: tuple[str, int]) -> None:
        while True:
            try:
                near, _peer = listener.accept()
            except OSError:
                return
            far = socket.create_connection(target)
            for end in (near, far):
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            waiting: list[tuple[float, str]] = []
            threading.Thread(target=self._ask, args=(near, far, waiting), daemon=True).start()
            threading.Thread(target=self._answer, args=(far, near, waiting), daemon=True).start()

    def _ask(self, near: socket.socket, far: socket.socket, waiting: list[tuple[float, str]]) -> None:
        def watch(data: bytes) -> None:
            if not waiting:
                waiting.append((time.monotonic(), " ".join(data.split(b"\r\n", 1)[0].decode(errors="replace").split(" ")[:2])))
                time.sleep(self.delay)

        _pump(near, far, watch)

    def _answer(self, far: socket.socket, near: socket.socket, waiting: list[tuple[float, str]]) -> None:
        def watch(data: bytes) -> None:
            if waiting:
                begin, line = waiting.pop()
                with self._lock:
                    self._requests.append((begin, time.monotonic(), line))

        _pump(far, near, watch)


def _pump(source: socket.socket, sink: socket.socket, watch: t.Callable[[bytes], None]) -> None:
    try:
        while True:
            data = source.recv(65536)
            if not data:
                break
            watch(data)
            sink.sendall(data)
    except OSError:
        pass
    for end in (source, sink):
        try:
            end.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass


TO_FASTEST = "ratio of medians to the fastest other tool of the case; left of the line is faster than it"


def plot(
    rows: t.Sequence[t.Mapping[str, t.Any]],
    ours: t.Container[str],
    title: str,
    key: str = "ratio_to_fastest_peer",
    caption: str = TO_FASTEST,
) -> str:
    """An SVG with a bar for each row that has the ratio ``key``, on a logarithmic scale, by case."""
    rows = [row for row in rows if row[key]]
    left, width, height, top = 330, 560, 16, 64
    ratios = [row[key] for row in rows] or [1.0]
    low, high = min(0.5, min(ratios) * 0.8), max(2.0, max(ratios) * 1.2)

    def place(ratio: float) -> float:
        return left + width * (math.log(ratio) - math.log(low)) / (math.log(high) - math.log(low))

    parts: list[str] = []
    y, case = top, None
    for row in rows:
        if row["case"] != case:
            case = row["case"]
            y += 22
            parts.append(f'<text x="12" y="{y}" font-weight="bold">{escape(case)}</text>')
            y += 6
        ratio = row[key]
        start, end = sorted((place(1.0), place(ratio)))
        colour = "#b03a2e" if row["tool"] in ours else "#5d6d7e"
        parts.append(f'<text x="{left - 8}" y="{y + height - 4}" text-anchor="end">{escape(row["tool"])}</text>')
        parts.append(f'<rect x="{start:.1f}" y="{y}" width="{max(end - start, 1.5):.1f}" height="{height - 3}" fill="{colour}"/>')
        parts.append(f'<text x="{end + 5:.1f}" y="{y + height - 4}" fill="#555">{ratio:.2f} ({row["median_s"]:.3g} s)</text>')
        y += height
    total = y + 20
    line = f'<line x1="{place(1.0):.1f}" x2="{place(1.0):.1f}" y1="{top}" y2="{y}" stroke="#222" stroke-dasharray="3 3"/>'
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 150}" height="{total}" font-family="sans-serif" font-size="12">'
        f'<rect width="100%" height="100%" fill="#fff"/><text x="12" y="24" font-size="16">{escape(title)}</text>'
        f'<text x="12" y="44" fill="#555">{escape(caption)}</text>'
        f"{line}{''.join(parts)}</svg>\n"
    )
