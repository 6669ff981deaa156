# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The shop's web service: orders over HTTP, and a readiness answer that means something.

``GET /api/ready`` is 200 only when the database answers, its schema is new enough for this release, every setting this release needs
is there, and no order has lost its total. ``GET /version`` says which build answers, ``GET /`` says it as a page.
``GET /orders`` reads, ``POST /orders`` writes.
"""

from __future__ import annotations

import html
import json
import os
import signal
import socket
import sys
import threading
import types
import typing as t
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psycopg2
from database import Pool

RELEASE = os.environ["SHOP_RELEASE"]
VERSION = os.environ["SHOP_VERSION"]
FACTS = json.loads((Path(__file__).parent / "releases.json").read_text())[RELEASE]
#: Seconds that requests in flight have to finish after SIGTERM; shorter than the container's grace period.
DRAIN_SECONDS = 8.0

POOL = Pool()


class Refused(Exception):
    """The request itself is wrong: 400."""


def why_not_ready() -> str:
    """What keeps this release from serving, empty when nothing does."""
    missing = [name for name in FACTS.get("needs_settings", []) if not os.environ.get(name)]
    if missing:
        return f"setting {', '.join(missing)} is missing"
    with POOL.cursor() as cursor:
        cursor.execute("SELECT to_regclass('schema_migrations') IS NOT NULL")
        if not cursor.fetchone()[0]:
            return "the database has no schema yet"
        cursor.execute("SELECT coalesce(max(number), 0) FROM schema_migrations")
        schema = cursor.fetchone()[0]
        if schema < FACTS["schema"]:
            return f"schema is {schema}, this release needs {FACTS['schema']}"
        cursor.execute("SELECT count(*) FROM orders WHERE total_cents <= 0")
        damaged = cursor.fetchone()[0]
        if damaged:
            return f"{damaged} orders have lost their total"
    return ""


def latest_orders() -> dict[str, t.Any]:
    with POOL.cursor() as cursor:
        cursor.execute("SELECT id, customer, item, total_cents FROM orders ORDER BY id DESC LIMIT 10")
        names = [column.name for column in cursor.description]
        return {"orders": [dict(zip(names, row)) for row in cursor.fetchall()]}


def add_order(body: bytes) -> dict[str, t.Any]:
    try:
        order = json.loads(body)
        values = (str(order["customer"]), str(order["item"]), int(order["quantity"]), int(order["unit_cents"]))
    except (ValueError, KeyError, TypeError) as error:
        raise Refused(f"an order is a JSON object with customer, item, quantity and unit_cents: {error!r}") from error
    if min(values[2:]) < 1:
        raise Refused("quantity and unit_cents start at 1")
    total = values[2] * values[3]
    with POOL.cursor() as cursor:
        # Names its columns, so that it works before and after a migration that only adds some.
        cursor.execute(
            "INSERT INTO orders (customer, item, quantity, unit_cents, total_cents) VALUES (%s, %s, %s, %s, %s) RETURNING id",
            (*values, total),
        )
        return {"id": cursor.fetchone()[0], "total_cents": total}


def page() -> str:
    title = f"Release {html.escape(RELEASE)}: {html.escape(FACTS['says'])}"
    where = html.escape(os.environ.get("SHOP_ENVIRONMENT", ""))
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<h1>{title}</h1><p>Build <code>{html.escape(VERSION)}</code> in {where}, container {html.escape(socket.gethostname())}.</p>"
        '<p><a href="/orders">orders</a> · <a href="/api/ready">readiness</a> · <a href="/version">version</a></p></html>\n'
    )


class Server(ThreadingHTTPServer):
    """Counts the requests in flight, so that a stop can wait for them and for nothing else; says when readiness changes."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int]) -> None:
        super().__init__(address, Handler)
        self.stopping = False
        self._reason: str | None = None
        self._in_flight = 0
        self._idle = threading.Condition()

    def say_readiness(self, reason: str) -> None:
        """One line in the log when it changes, not one for each question."""
        if reason != self._reason:
            print(f"not ready: {reason}" if reason else "ready", flush=True)
            self._reason = reason

    def begin(self) -> None:
        with self._idle:
            self._in_flight += 1

    def end(self) -> None:
        with self._idle:
            self._in_flight -= 1
            self._idle.notify_all()

    def drain(self, timeout: float) -> bool:
        """Wait until no request is in flight; false when some were left at the timeout."""
        with self._idle:
            return self._idle.wait_for(lambda: self._in_flight == 0, timeout)

    def handle_error(self, request: t.Any, client_address: t.Any) -> None:
        if not isinstance(sys.exc_info()[1], (ConnectionError, TimeoutError)):
            super().handle_error(request, client_address)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server
    # A keep-alive connection that says nothing for a minute is closed.
    timeout = 60
    # Headers and body leave in one packet; otherwise delayed acknowledgements cost 40 ms a request.
    wbufsize = -1
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._answer(self._get)

    def do_POST(self) -> None:
        # The body is read whatever the path is, or its bytes would be taken for the next request.
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        self._answer(lambda: self._post(body))

    do_HEAD = do_GET

    def _get(self) -> tuple[int, dict[str, t.Any] | str]:
        path = self.path.partition("?")[0]
        if path == "/api/ready":
            reason = why_not_ready()
            self.server.say_readiness(reason)
            answer = {"status": "not ready" if reason else "ready", "version": VERSION, "release": RELEASE}
            return (503, {**answer, "reason": reason}) if reason else (200, answer)
        if path == "/version":
            return 200, {"version": VERSION, "release": RELEASE}
        if path == "/orders":
            return 200, {"version": VERSION, **latest_orders()}
        if path == "/":
            return 200, page()
        return 404, {"error": f"nothing at {path}"}

    def _post(self, body: bytes) -> tuple[int, dict[str, t.Any] | str]:
        if self.path != "/orders":
            return 404, {"error": f"nothing at {self.path}"}
        return 201, {"version": VERSION, **add_order(body)}

    def _answer(self, work: t.Callable[[], tuple[int, dict[str, t.Any] | str]]) -> None:
        self.server.begin()
        try:
            try:
                status, content = work()
            except Refused as error:
                status, content = 400, {"error": str(error)}
            except psycopg2.Error as error:
                reason = str(error).strip()
                self.server.say_readiness(reason)
                status, content = 503, {"status": "not ready", "version": VERSION, "release": RELEASE, "reason": reason}
            text = content if isinstance(content, str) else json.dumps(content) + "\n"
            payload = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8" if isinstance(content, str) else "application/json")
            self.send_header("Content-Length", str(len(payload)))
            self.send_header("X-Version", VERSION)
            if self.server.stopping:
                self.send_header("Connection", "close")
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(payload)
            self.wfile.flush()
        finally:
            self.server.end()

    def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
        # Only what went wrong; the edge logs the rest, and readiness says itself when it changes.
        if int(code) >= 400 and self.path != "/api/ready":
            super().log_request(code, size)


def main() -> int:
    server = Server(("0.0.0.0", int(os.environ.get("PORT", "8080"))))

    def stop(number: int, frame: types.FrameType | None) -> None:
        server.stopping = True
        # shutdown() waits for serve_forever(), which runs in this very thread.
        threading.Thread(target=server.shutdown).start()

    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGINT, stop)
    print(f"release {RELEASE} ({VERSION}) listens", flush=True)
    server.serve_forever(poll_interval=0.05)
    server.server_close()
    clean = server.drain(DRAIN_SECONDS)
    print(f"release {RELEASE} ({VERSION}) stopped{'' if clean else ' with requests in flight'}", flush=True)
    return 0 if clean else 1


if __name__ == "__main__":
    sys.exit(main())
