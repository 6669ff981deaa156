# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Parsing, reasons and the wait itself; real containers and servers are in tests/integration/test_ready_wait.py."""

from __future__ import annotations

import re
import socket
import sys
import threading

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import EngineNotFound
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.probes import parse_checks, wait_ready
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.network import network_reason
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.outcomes import NotReady
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.query import must_be_true
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.wait import next_pause

HTTP = {"url": "http://127.0.0.1/ready"}


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ([], "at least one"),
        ([{"name": "a"}], "checks[0]: no probe given"),
        ([{"http": HTTP, "tcp": {"host": "a", "port": 1}}], "checks[0]: http and tcp given"),
        ([{"http": HTTP, "tpc": {}}], "checks[0].tpc: unknown key; did you mean tcp?"),
        ([{"http": {"url": "http://a", "prot": 1}}], "checks[0].http.prot: unknown key"),
        ([{"http": {}}], "checks[0].http.url: missing"),
        ([{"http": {"url": "ftp://user:secret@a"}}], "'ftp://a' is not an http or https URL"),
        ([{"http": {"url": "http://a", "status": [2000]}}], "checks[0].http.status"),
        ([{"http": {"url": "http://a", "query": "version =="}}], "checks[0].http.query: 'version ==' is not JMESPath"),
        ([{"http": {"url": "http://a", "ca_path": "/nowhere.pem"}}], "checks[0].http.ca_path: '/nowhere.pem' cannot be read"),
        ([{"tcp": {"host": "a", "port": True}}], "checks[0].tcp.port"),
        ([{"http": {"url": "http://[::1"}}], "'http://[::1' is not an http or https URL"),
        ([{"http": {"url": "http://me:secret@a/b c"}}], "'http://a/b c' is not an http or https URL"),
        ([{"http": {"url": "http://a", "method": "GET /"}}], "checks[0].http.method"),
        ([{"http": {"url": "http://a", "headers": {"X-A": "secret\r\nX-B: c"}}}], "checks[0].http.headers.X-A: holds a line end"),
        ([{"http": {"url": "http://a", "headers": {"X A": "b"}}}], "checks[0].http.headers: 'X A' is no name of a header"),
        ([{"http": {"url": "http://a", "bearer_token": "secret\n"}}], "checks[0].http.bearer_token: holds a line end"),
        ([{"http": {"url": "https://a", "server_name": "a b"}}], "checks[0].http.server_name: 'a b' is no name"),
        ([{"http": {"url": "http://a", "timeout": 0}}], "checks[0].http.timeout: 0 is no number of seconds above 0"),
        ([{"http": HTTP, "timeout": float("nan")}], "checks[0].timeout"),
        ([{"tcp": {}}], "checks[0].tcp: must have either host and port, or unix_socket"),
        ([{"tcp": {"host": "a"}}], "checks[0].tcp.port: missing"),
        ([{"tcp": {"host": "a", "port": 1, "unix_socket": "/s"}}], "checks[0].tcp: must have either"),
        ([{"tcp": {"host": "a", "port": 70000}}], "checks[0].tcp.port: 70000 is no port"),
        ([{"grpc": {"service": "a"}}], "checks[0].grpc: must have either"),
        ([{"grpc": {"host": "a", "port": 1, "servce": "a"}}], "checks[0].grpc.servce: unknown key; did you mean service?"),
        ([{"grpc": {"host": "a", "port": 1, "ca_path": "/c"}}], "checks[0].grpc.ca_path: is only used with tls: true"),
        ([{"grpc": {"host": "a", "port": 1, "tls": True, "ca_path": "/nowhere.pem"}}], "checks[0].grpc.ca_path: '/nowhere.pem' cannot be"),
        ([{"grpc": {"host": "a", "port": 1, "service": "a" * 1001}}], "checks[0].grpc.service: is longer than 1000 bytes"),
        ([{"log": {"container": "a"}}], "checks[0].log.pattern: missing"),
        ([{"log": {"container": "a", "pattern": "("}}], "checks[0].log.pattern: '(' is no regular expression"),
        ([{"command": {"argv": []}}], "checks[0].command.argv: not a list of words"),
        ([{"container": {"name": "a", "state": "fine"}}], "checks[0].container.state: 'fine' is not one of"),
        ([{"http": {"url": "http://a", "connect_to": "127.0.0.1"}}], "checks[0].http.connect_to: '127.0.0.1' is not host:port"),
        ([{"http": HTTP, "stable": 0}], "checks[0].stable"),
        ([{"name": "a", "http": HTTP}, {"name": "a", "http": HTTP}], "checks[1].name: 'a' is there twice"),
    ],
)
def test_mistakes_are_refused_by_path(raw, message):
    with pytest.raises(DeliveryError) as error:
        parse_checks(raw)
    assert message in error.value.message
    assert error.value.failure_class == "config"
    assert "secret" not in error.value.message


def test_absent_options_of_a_module_are_absent_here():
    (check,) = parse_checks([{"name": None, "http": None, "tcp": {"host": "db", "port": 5432, "timeout": None}, "stable": None}])
    assert (check.name, check.kind, check.stable) == ("db:5432", "tcp", None)


def test_a_container_may_be_given_by_id():
    assert parse_checks([{"container": {"id": "abc"}}])[0].options["name"] == "abc"


def test_a_query_without_the_library_is_refused_before_waiting(monkeypatch):
    monkeypatch.setitem(sys.modules, "jmespath", None)
    with pytest.raises(DeliveryError, match="jmespath is missing") as error:
        parse_checks([{"http": {"url": "http://a", "query": "a"}}])
    assert error.value.failure_class == "config"
    parse_checks([{"http": {"url": "http://a"}}])


@pytest.mark.parametrize(
    ("query", "reason"),
    [
        ("version == 'sha-2'", "JMESPath `version == 'sha-2'` was false, version is \"sha-1\""),
        ("ready && checks.db == 'up'", 'was false, ready is true, checks.db is "down"'),
        ("nothing", "JMESPath `nothing` was null, nothing is null"),
        ("length(errors) == `0`", 'was false, errors is ["a"]'),
        ("checks | db == 'up'", 'was false, checks is {"db": "down"}'),
        ("starts_with(number, 'a')", "cannot be asked of this body"),
    ],
)
def test_a_false_query_tells_what_was_there(query, reason):
    document = {"version": "sha-1", "ready": True, "checks": {"db": "down"}, "errors": ["a"], "number": 0}
    (check,) = parse_checks([{"http": {"url": "http://a", "query": query}}])
    with pytest.raises(NotReady) as error:
        must_be_true(check.compiled, document)
    assert reason in str(error.value)


@pytest.mark.parametrize("query", ["version", "number", "version == 'sha-1'", "!nothing"])
def test_a_true_query_passes(query):
    (check,) = parse_checks([{"http": {"url": "http://a", "query": query}}])
    must_be_true(check.compiled, {"version": "sha-1", "number": 0})


def test_the_pause_grows_with_the_time_waited_and_has_a_floor_and_a_ceiling():
    assert next_pause(0) == 0.02
    assert next_pause(0.4) == pytest.approx(0.02)
    assert next_pause(1.9) == pytest.approx(0.095)
    assert next_pause(5) == pytest.approx(0.25)
    assert next_pause(600) == 0.25
    # Over a whole wait: late by a twentieth at most, at whatever moment it gets ready.
    now = 0.0
    while now < 60:
        pause = next_pause(now)
        assert pause <= max(0.02, now / 20) + 1e-9
        now += pause


def test_what_is_dear_is_asked_less_often():
    # A try that lasted 0.1 s is followed by as long a pause; one that hung, by no more than the ceiling.
    assert next_pause(0, took=0.1) == 0.1
    assert next_pause(0, took=5) == 0.25
    # A hundred checks of 0.5 ms each keep to half a core, one alone need not care.
    assert next_pause(0, cpu=0.0005, asking=100) == pytest.approx(0.1)
    assert next_pause(0, cpu=0.0005) == 0.02


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ConnectionRefusedError(), "connection refused by db:1"),
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "the name db cannot be resolved: Name or service not known"),
        (ConnectionResetError(), "db:1 closed the connection without an answer"),
        (OSError(113, "No route to host"), "db:1: No route to host"),
    ],
)
def test_what_went_wrong_on_the_way_is_told_apart(error, reason):
    assert network_reason(error, "db:1") == reason


def test_a_name_that_is_none_is_told():
    checks = parse_checks([{"name": "c", "tcp": {"host": "a..b", "port": 1}}])
    assert "'a..b' is no name of a host" in wait_ready(checks, 0.2).checks["c"]["last_error"]


class FakeEngine:
    """Containers as a list of what ``inspect`` says, one after another; the last one stays."""

    def __init__(self, **containers):
        self.facts = containers

    def inspect(self, container):
        answers = self.facts.get(container)
        if not answers:
            raise EngineNotFound("Inspecting", 404, "no such container")
        facts = answers.pop(0) if len(answers) > 1 else answers[0]
        if facts is None:
            raise EngineNotFound("Inspecting", 404, "no such container")
        return facts

    def containers(self, _labels):
        return [
            {"Id": name, "State": answers[0]["State"]["Status"], "Labels": answers[0].get("Labels")} for name, answers in self.facts.items()
        ]

    def logs(self, container, _tail):
        return f"log of {container}"


def facts(name, status, health=None, restarts=0, code=0, **more):
    state = {"Status": status, "ExitCode": code}
    if health:
        state["Health"] = {"Status": health, "Log": [{"ExitCode": 1, "Output": "no database"}]}
    return {"Id": name, "Name": f"/{name}", "State": state, "RestartCount": restarts, **more}


def container_wait(answers, timeout=0.3, **options):
    checks = parse_checks([{"name": "c", "container": {"name": "web", **options}}])
    return wait_ready(checks, timeout, engine=FakeEngine(web=answers))


def test_running_is_enough_without_a_health_check_and_not_with_one():
    assert container_wait([facts("web", "running")]).ready
    assert not container_wait([facts("web", "running")], state="healthy").ready
    result = container_wait([facts("web", "running", health="starting")])
    assert 'is starting, its health check ended with 1 and says "no database"' in result.checks["c"]["last_error"]
    assert container_wait([facts("web", "running", health="starting")], state="running").ready
    assert container_wait([facts("web", "running", health="starting"), facts("web", "running", health="healthy")], timeout=10).ready


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        ([facts("web", "exited", code=3)], "container web exited with code 3; last log lines:\nlog of web"),
        ([facts("web", "created"), facts("web", "exited", code=1)], "exited with code 1"),
        ([facts("web", "restarting", restarts=4, code=2)], "restarts again and again (4 times, last exit code 2)"),
        ([facts("web", "running", health="starting"), facts("web", "running", health="starting", restarts=1)], "restarts again and again"),
        ([facts("web", "created"), None], "container web was removed"),
    ],
)
def test_a_container_that_ended_ends_the_wait(answers, reason):
    # Far below the timeout, or the test would take a minute.
    result = container_wait(answers, timeout=60)
    assert not result.ready
    assert reason in result.checks["c"]["last_error"]
    assert reason in result.ended_early
    with pytest.raises(DeliveryError, match="0 of 1 ready after .*given up early") as error:
        result.raise_unless_ready(60)
    assert error.value.failure_class == "not_ready"
    assert error.value.details["checks"] == result.checks


def test_restarts_of_long_ago_are_no_loop():
    assert container_wait([facts("web", "running", restarts=7)]).ready


def test_a_container_that_is_not_there_yet_may_come():
    assert container_wait([None, facts("web", "running")], timeout=10).ready


def test_without_fail_fast_an_ended_container_is_waited_for():
    checks = parse_checks([{"name": "c", "container": {"name": "web"}}])
    result = wait_ready(checks, 10, fail_fast=False, engine=FakeEngine(web=[facts("web", "exited"), facts("web", "running")]))
    assert result.ready


def service_wait(timeout=0.3, **containers):
    checks = parse_checks([{"name": "s", "service": {"project": "shop", "service": "web"}}])
    return wait_ready(checks, timeout, engine=FakeEngine(**containers))


def test_a_service_is_ready_with_all_its_containers():
    assert service_wait(a=[facts("a", "running")], b=[facts("b", "running")]).ready
    result = service_wait(a=[facts("a", "running")], b=[facts("b", "created")])
    assert result.checks["s"]["last_error"] == "1 of 2 containers ready; container b is created"
    assert "no container of service web" in service_wait().checks["s"]["last_error"]


def test_stopped_containers_of_an_older_release_do_not_count_and_a_stopped_service_does():
    assert service_wait(old=[facts("old", "exited")], new=[facts("new", "running")]).ready
    assert service_wait(timeout=60, old=[facts("old", "exited", code=9)]).ended_early.startswith("s: container old exited with code 9")
    oneoff = facts("run", "exited", Labels={"com.docker.compose.oneoff": "True"})
    assert service_wait(run=[oneoff], new=[facts("new", "running")]).ready


def command_wait(script, **options):
    checks = parse_checks([{"name": "c", "command": {"argv": ["sh", "-c", script]}}])
    return wait_ready(checks, **options)


def test_stable_counts_successes_in_a_row(tmp_path):
    # Succeeds, fails, then succeeds: the first success must not count.
    script = f"echo x >> {tmp_path}/n; test $(wc -l < {tmp_path}/n) -ne 2"
    result = command_wait(script, timeout=20, stable=3)
    assert result.ready
    assert result.checks["c"]["attempts"] == 5


def test_a_check_that_fails_again_while_others_are_awaited_is_not_ready(tmp_path):
    checks = parse_checks(
        [
            # Ready once, then never again.
            {"name": "flaps", "command": {"argv": ["sh", "-c", f"test ! -e {tmp_path}/seen && touch {tmp_path}/seen"]}},
            {"name": "late", "command": {"argv": ["test", "-e", f"{tmp_path}/late"]}},
        ]
    )
    told = []

    def on_change(name, entry):
        told.append((name, entry["ready"]))
        if name == "flaps" and not entry["ready"] and ("flaps", True) in told:
            (tmp_path / "late").touch()

    result = wait_ready(checks, 3, on_change=on_change)
    assert not result.ready
    assert result.checks["late"]["ready"]
    assert not result.checks["flaps"]["ready"]
    assert result.checks["flaps"]["ready_after"] is None


def test_it_can_be_stopped_from_outside():
    stop = threading.Event()
    stop.set()
    assert command_wait("false", timeout=60, stop=stop).ended_early == "stopped from outside"
    assert command_wait("false", timeout=60, stop=lambda: True).ended_early == "stopped from outside"


def test_a_check_may_have_a_shorter_timeout_of_its_own():
    checks = parse_checks([{"name": "c", "timeout": 0.1, "command": {"argv": ["false"]}}])
    result = wait_ready(checks, 60)
    assert (result.ready, result.checks["c"]["last_error"]) == (False, "false ended with 1")


def test_a_try_that_hangs_does_not_hold_up_the_answer():
    result = command_wait("sleep 60", timeout=0.5)
    assert not result.ready
    # Which of the two is told depends on how long its end takes.
    assert re.search(r"(sh did not end|no answer to the first try) within 0\.\d s", result.checks["c"]["last_error"])


def test_a_last_try_that_is_cut_short_does_not_hide_what_was_known(tmp_path):
    result = command_wait(f"test -e {tmp_path}/seen && exec sleep 60; touch {tmp_path}/seen; echo no queue; exit 3", timeout=1)
    assert 'sh ended with 3 and says "no queue"' in result.checks["c"]["last_error"]


def test_a_last_try_that_is_cut_short_does_not_undo_what_was_ready(tmp_path):
    hangs_later = f"test -e {tmp_path}/seen && exec sleep 60; touch {tmp_path}/seen"
    checks = parse_checks(
        [{"name": "ready", "command": {"argv": ["sh", "-c", hangs_later]}}, {"name": "never", "command": {"argv": ["false"]}}]
    )
    result = wait_ready(checks, 1.2)
    assert (tmp_path / "seen").exists()
    assert result.checks["ready"]["ready"]
    assert result.checks["never"]["last_error"] == "false ended with 1"


def test_a_try_that_nothing_can_bound_is_told_of():
    class Stuck(FakeEngine):
        def inspect(self, container):
            stuck.wait(20)
            return facts(container, "running")

    stuck = threading.Event()
    checks = parse_checks([{"name": "c", "container": {"name": "web"}}])
    result = wait_ready(checks, 0.3, engine=Stuck())
    stuck.set()
    assert "no answer to the first try within 0." in result.checks["c"]["last_error"]


class FakeLog(FakeEngine):
    """A container whose log arrives in these pieces: ``None`` is nothing yet, '' the end."""

    def __init__(self, *pieces, **containers):
        super().__init__(**containers)
        self.pieces, self.followed = list(pieces), []

    def follow(self, container, since, tty):
        self.followed.append(since)
        return self

    def read(self):
        return self.pieces.pop(0) if self.pieces else None

    def close(self):
        pass


def log_wait(pattern, *pieces, timeout=10.0):
    running = facts("web", "running")
    running["State"].update(StartedAt="b", FinishedAt="a")
    engine = FakeLog(*pieces, web=[running])
    return wait_ready(parse_checks([{"name": "c", "log": {"container": "web", "pattern": pattern}}]), timeout, engine=engine), engine


@pytest.mark.parametrize(
    ("pattern", "pieces"),
    [
        ("^up$", ["one\nup\r\ntwo"]),
        ("^up$", ["one\nu", None, "p", None, "\n"]),  # a line that comes in pieces
        ("^up$", ["up", ""]),  # the end of the log ends a line
        ("^up$", ["one\n", "", None, "up\n"]),  # the engine started again, and the log is read again
        ("a{9}$", ["a" * 9 + "\n"]),
    ],
)
def test_a_line_is_found_however_it_comes(pattern, pieces):
    result, engine = log_wait(pattern, *pieces)
    assert result.ready
    assert set(engine.followed) == {"a"}


def test_a_line_that_has_not_ended_or_is_in_two_is_none():
    result, _engine = log_wait("^u.*p$", "u\np\n", "up", timeout=0.3)
    assert result.checks["c"]["last_error"] == "no line in the log of container web has '^u.*p$'; lines so far: 2, the last \"p\""


def test_a_line_without_an_end_is_not_kept_whole():
    result, _engine = log_wait("b", *["a" * 60000] * 20, "b\n", timeout=0.5)
    assert "lines so far: 1," in result.checks["c"]["last_error"]
