# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is counted between two looks at an edge, and what is read from Prometheus."""

from __future__ import annotations

import http.server
import threading
import typing as t

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import Figures, seconds_between
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.haproxy import figures_of
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.watch import Counted, Judgement, counted, prometheus_values

KEY = ("shop-web", "10.0.0.2", 8080)


def sliding(times: t.Sequence[float], window: int = 512) -> Figures:
    """What an edge tells after requests that took these seconds: its sum forgets one part in ``window`` with each."""
    busy = 0.0
    for seconds in times:
        busy += seconds - busy / window
    return Figures(len(times), 0, busy, window)


@pytest.mark.parametrize("history", [[], [0.001] * 40, [2.0] * 3000], ids=["new", "fast", "slow"])
@pytest.mark.parametrize("fresh", [[0.2] * 30, [0.01] * 900])
def test_the_average_is_of_the_requests_between_two_looks(history: list[float], fresh: list[float]) -> None:
    found = seconds_between(sliding(history), sliding([*history, *fresh]))
    assert found == pytest.approx(fresh[0], rel=0.01)


def test_without_requests_there_is_no_average() -> None:
    assert seconds_between(sliding([0.1]), sliding([0.1])) is None
    assert counted({KEY: Figures(5, 1, 1.0, 512)}, {KEY: Figures(5, 1, 1.0, 512)}) == Counted(0, 0, None)


def test_counts_are_sums_over_what_is_in_both_looks() -> None:
    other = (*KEY[:2], 8081)
    before = {KEY: Figures(10, 1, 0.0, 512), other: Figures(0, 0, 0.0, 512), ("gone", "10.0.0.9", 1): Figures(7, 7, 0.0, 512)}
    found = counted(before, {KEY: Figures(30, 3, 0.0, 512), other: Figures(20, 0, 0.0, 512)})
    assert (found.requests, found.errors, found.error_rate) == (40, 2, 5.0)
    assert str(found) == "40 requests, 2 errors, 0 ms on average"


def test_refused_connections_are_errors_without_an_answer() -> None:
    assert Counted(0, 3).error_rate == 100.0 and Counted(0, 0).error_rate == 0.0


def test_haproxys_line() -> None:
    line = {"req_tot": "600", "hrsp_5xx": "3", "econ": "2", "eresp": "1", "rtime": "10"}
    assert figures_of(line) == Figures(600, 6, pytest.approx(5.12), 512)
    assert figures_of({"hrsp_2xx": "4", "hrsp_5xx": "1", "rtime": "10"}) == Figures(5, 1, pytest.approx(0.05), 512)


def test_what_is_not_given_is_judged_by_the_defaults() -> None:
    assert Judgement.from_dict({}) == Judgement(0, 1.0, None, 20, None)
    asked = Judgement.from_dict({"seconds": 5, "max_error_rate": 0, "max_latency": 0.5, "prometheus": {"url": "u", "query": "q", "max": 2}})
    assert (asked.error_rate, asked.latency, asked.prometheus and asked.prometheus.most) == (0.0, 0.5, 2.0)


@pytest.fixture
def prometheus() -> t.Iterator[tuple[str, list[tuple[int, str]]]]:
    """Answers as Prometheus documents them for `GET /api/v1/query`; the real program speaks in the manual's example."""
    answers: list[tuple[int, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:  # noqa: N802
            status, body = answers.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}/", answers
    server.shutdown()
    thread.join()
    server.server_close()


def test_values_of_a_query(prometheus: tuple[str, list[tuple[int, str]]]) -> None:
    url, answers = prometheus
    vector = '{"data": {"resultType": "vector", "result": [{"value": [1, "0.5"]}, {"value": [1, "NaN"]}, {"value": [1, "2"]}]}}'
    answers += [(200, vector), (200, '{"data": {"resultType": "scalar", "result": [1, "7"]}}')]
    answers += [(200, '{"data": {"resultType": "vector", "result": []}}')]
    assert [prometheus_values(url, query) for query in "abc"] == [[0.5, 2.0], [7.0], []]


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [(400, '{"error": "parse error"}', "it answered 400: {\"error\": \"parse error\"}"), (200, "<html>", "Is this the address of Prometheus?")],
)
def test_what_is_no_answer(prometheus: tuple[str, list[tuple[int, str]]], status: int, body: str, words: str) -> None:
    url, answers = prometheus
    answers.append((status, body))
    with pytest.raises(DeliveryError) as caught:
        prometheus_values(url, "q")
    assert words in caught.value.message and caught.value.failure_class == "transport"
