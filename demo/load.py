# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A load generator that counts what gets lost.

    load.py --url http://127.0.0.1:18080 --out result.json [--rate 150] [--connections 8] [--seconds 300]

It keeps a few connections alive, reads most of the time and writes an order now and then, and never asks twice. A request is lost when
its connection fails or is cut, when no answer comes within ``--timeout``, or when the answer is a server error (status 500 and up).
It prints ``running`` when the first answers are there. On SIGTERM, or after ``--seconds``, requests in flight are awaited and
the result is written:

    {"sent": 9000, "ok": 9000, "lost": 0, "statuses": {"200": 8100, "201": 900}, "failures": {}, "writes": 900, "run": "load-1a2b3c4d",
     "seconds": 60.0, "longest_gap_ms": 31.0, "latency_ms": {"p50": 2.1, "p99": 11.8, "max": 40.2},
     "versions": [{"version": "sha-…", "first_s": 0.0, "last_s": 31.2, "answers": 4700}, …]}

``longest_gap_ms`` is the longest time in which nobody got a good answer, ``writes`` the orders that were acknowledged;
each has ``run`` as its item, so they can be counted in the database.
"""

from __future__ import annotations

import argparse
import collections
import http.client
import json
import os
import signal
import sys
import threading
import time
import urllib.parse
import uuid

#: One request in so many is an order.
WRITE_EVERY = 10
READS = ("/orders", "/version", "/")


class Tally:
    """What all connections saw together."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.started = self._last_good = time.monotonic()
        self.sent = self.ok = self.writes = 0
        self.longest_gap = 0.0
        self.statuses: collections.Counter[str] = collections.Counter()
        self.failures: collections.Counter[str] = collections.Counter()
        self.latencies: list[float] = []
        self.versions: dict[str, dict[str, float]] = {}

    def answered(self, status: int, version: str, seconds: float, wrote: bool) -> None:
        now = time.monotonic()
        with self._lock:
            self.sent += 1
            self.statuses[str(status)] += 1
            if status >= 500:
                self.failures[f"status {status}"] += 1
                return
            self.ok += 1
            self.writes += wrote and status == 201
            self.latencies.append(seconds)
            self.longest_gap = max(self.longest_gap, now - self._last_good)
            self._last_good = now
            seen = self.versions.setdefault(version, {"first_s": now - self.started, "last_s": 0.0, "answers": 0})
            seen["last_s"] = now - self.started
            seen["answers"] += 1

    def failed(self, error: Exception) -> None:
        with self._lock:
            self.sent += 1
            self.failures[f"{type(error).__name__}: {error}"[:120]] += 1

    def result(self, run: str) -> dict[str, object]:
        now = time.monotonic()
        latencies = sorted(self.latencies) or [0.0]

        def at(share: float) -> float:
            return round(latencies[min(len(latencies) - 1, int(len(latencies) * share))] * 1000, 1)

        return {
            "sent": self.sent,
            "ok": self.ok,
            "lost": sum(self.failures.values()),
            "statuses": dict(self.statuses),
            "failures": dict(self.failures),
            "writes": self.writes,
            "run": run,
            "seconds": round(now - self.started, 1),
            # The time since the last good answer counts too: a service that went away and stayed away has a long one.
            "longest_gap_ms": round(max(self.longest_gap, now - self._last_good) * 1000, 1),
            "latency_ms": {"p50": at(0.5), "p99": at(0.99), "max": at(1.0)},
            "versions": [
                {"version": version, "first_s": round(seen["first_s"], 1), "last_s": round(seen["last_s"], 1), "answers": seen["answers"]}
                for version, seen in sorted(self.versions.items(), key=lambda item: item[1]["first_s"])
            ],
        }


def talk(tally: Tally, stop: threading.Event, options: argparse.Namespace, number: int, run: str) -> None:
    """One client: a connection, one request after the other, never faster than its share of the rate."""
    where = urllib.parse.urlsplit(options.url)
    connection = http.client.HTTPConnection(where.hostname or "", where.port or 80, timeout=options.timeout)
    pause = options.connections / options.rate
    named = {"Host": options.host} if options.host else {}
    order = json.dumps({"customer": f"customer-{number}", "item": run, "quantity": 1 + number, "unit_cents": 250}).encode()
    due = time.monotonic() + pause * number / options.connections
    count = number
    while not stop.wait(max(0.0, due - time.monotonic())):
        # A slow answer makes this client late, not the next ones faster.
        due = max(due + pause, time.monotonic())
        count += 1
        writes = count % WRITE_EVERY == 0
        begun = time.monotonic()
        try:
            if writes:
                connection.request("POST", "/orders", body=order, headers={"Content-Type": "application/json", **named})
            else:
                connection.request("GET", READS[count % len(READS)], headers=named)
            answer = connection.getresponse()
            answer.read()
            tally.answered(answer.status, answer.headers.get("X-Version", ""), time.monotonic() - begun, writes)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            tally.failed(error)
    connection.close()


def main() -> int:
    parser = argparse.ArgumentParser(description="Send requests at a steady rate and count the lost ones.")
    parser.add_argument("--url", required=True)
    parser.add_argument("--host", help="name to ask for, where it is not that of the URL")
    parser.add_argument("--out", required=True, help="file for the result")
    parser.add_argument("--rate", type=float, default=150.0, help="requests a second, all connections together")
    parser.add_argument("--connections", type=int, default=8)
    parser.add_argument("--seconds", type=float, default=300.0, help="ends by itself after so long")
    parser.add_argument("--timeout", type=float, default=30.0, help="seconds until a request without an answer is lost")
    options = parser.parse_args()

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    run = f"load-{uuid.uuid4().hex[:8]}"
    tally = Tally()
    clients = [threading.Thread(target=talk, args=(tally, stop, options, number, run)) for number in range(options.connections)]
    for client in clients:
        client.start()
    ends = time.monotonic() + options.seconds
    while tally.sent < 5 * options.connections and not stop.wait(0.05) and time.monotonic() < ends:
        pass
    print("running", flush=True)
    stop.wait(max(0.0, ends - time.monotonic()))
    stop.set()
    for client in clients:
        client.join()
    with open(f"{options.out}.part", "w") as stream:
        json.dump(tally.result(run), stream)
    os.replace(f"{options.out}.part", options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
