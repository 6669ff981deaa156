# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Releases judged by a query of a real Prometheus, which asks a shop that counts failed orders."""

from __future__ import annotations

import http.server
import json
import shutil
import socket
import subprocess
import threading
import time
import typing as t
from pathlib import Path

import pytest
from rollout_fixture import Load, Proxy, Site

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.watch import prometheus_values

pytestmark = pytest.mark.skipif(
    not shutil.which("prometheus"), reason="MISSING PROGRAM prometheus: no query was judged on a real Prometheus (apt-get install prometheus)"
)
PATIENCE = 60.0


class Orders:
    """``failed`` orders of each release, as Prometheus reads them, and the Prometheus."""

    def __init__(self, folder: Path) -> None:
        self.failed: dict[str, float] = {}
        orders = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = "".join(f'orders_failed{{release="{name}"}} {count}\n' for name, count in orders.failed.items()).encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_args: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        folder.mkdir()
        job = {"job_name": "shop", "scrape_interval": "200ms", "scrape_timeout": "200ms"}
        job["static_configs"] = [{"targets": [f"127.0.0.1:{self.server.server_address[1]}"]}]  # type: ignore[assignment]
        (folder / "prometheus.yml").write_text(json.dumps({"scrape_configs": [job]}))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.url = f"http://127.0.0.1:{probe.getsockname()[1]}"
        argv = ["prometheus", f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data", f"--web.listen-address={self.url[7:]}"]
        self.process = subprocess.Popen([*argv, "--log.level=warn"])

    def tell(self, release: dict[str, t.Any], count: float) -> None:
        """Until Prometheus knows it."""
        self.failed[release["release_id"]] = count
        deadline = time.monotonic() + PATIENCE
        while self.asked(release) != [count]:
            assert self.process.poll() is None and time.monotonic() < deadline, "Prometheus does not read what it is told"
            time.sleep(0.05)

    def asked(self, release: dict[str, t.Any]) -> list[float]:
        try:
            return prometheus_values(self.url, f'orders_failed{{release="{release["release_id"]}"}}')
        except DeliveryError:
            return []

    def query(self, most: float) -> dict[str, t.Any]:
        return {"url": self.url, "query": 'orders_failed{release="$release"}', "max": most}

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def orders(tmp_path: Path) -> t.Iterator[Orders]:
    made = Orders(tmp_path / "prometheus")
    try:
        yield made
    finally:
        made.stop()


def test_a_canary_goes_by_the_query(site: Site, proxy: Proxy, orders: Orders) -> None:
    site.deploy("one")
    site.services["web"].update(strategy="canary", canary={"steps": [50], "seconds": 1, "min_requests": 1, "prometheus": orders.query(2)})
    release = site.release("two")
    orders.tell(release, 3)
    with Load(proxy.port, clients=2) as load:
        result = site.call(**release)
    assert result["failed"] and result["reverted"] and result["failure_class"] == "regression", result
    assert f"Prometheus says 3 for orders_failed{{release=\"{release['release_id']}\"}}, at most 2 is allowed" in result["msg"]
    assert load.lost == [] and proxy.get() == "one"
    good = site.release("two")
    orders.tell(good, 2)
    with Load(proxy.port, clients=2):
        assert not site.ok(**good)["delivery_warnings"]
    site.commit(good)
    # What nobody counts is told, and no failure.
    unknown = site.release("one")
    with Load(proxy.port, clients=2):
        assert any("Prometheus has no value for orders_failed" in one for one in site.ok(**unknown)["delivery_warnings"])


def test_bake_goes_by_the_query_to_its_end(site: Site, proxy: Proxy, orders: Orders) -> None:
    site.deploy("one")
    site.options["bake"] = {"seconds": 600, "min_requests": 1, "prometheus": orders.query(2)}
    release = site.release("two")
    orders.tell(release, 0)
    with Load(proxy.port, clients=2) as load:
        process = site.start(**release)
        deadline = time.monotonic() + PATIENCE
        while not any(one["step"] == "baking" for one in site.journal(release)):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.02)
        orders.tell(release, 5)
        result = json.loads(process.communicate(timeout=PATIENCE)[0].splitlines()[-1])
    assert result["reverted"] and result["failure_class"] == "regression" and "Prometheus says 5" in result["msg"], result
    assert load.lost == [] and proxy.get() == "one"
    # One that is gone is asked three times.
    release = site.release("two")
    orders.stop()
    with Load(proxy.port, clients=2) as load:
        result = site.call(**release)
    assert result["reverted"] and "what Prometheus says could not be judged" in result["msg"], result
    assert load.lost == [] and proxy.get() == "one"
