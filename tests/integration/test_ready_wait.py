# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The module ready_wait against real servers, sockets, containers and units."""

from __future__ import annotations

import http.server
import io
import json
import os
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import tarfile
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from grpc_fixture import make_certificate, start_grpc

from ansible_collections.selfhost.delivery.plugins.module_utils import errors

COLLECTIONS = Path(errors.__file__).absolute().parents[5]
NAME = f"test-ready-{os.getpid()}"
# Waits that must end early are given this; the runner's own limit is far below it.
FOREVER = 600


def ready_wait(*checks, check_mode=False, **options):
    """Run the module as Ansible does; its result."""
    program = Path(sys.executable).parent / "ansible"
    arguments = json.dumps({"checks": list(checks), "timeout": 20, **options})
    done = subprocess.run(
        [str(program), "localhost", "-m", "selfhost.delivery.ready_wait", "-a", arguments, *(["--check"] if check_mode else [])],
        env={
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
            "ANSIBLE_NOCOLOR": "1",
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "ANSIBLE_PYTHON_INTERPRETER": sys.executable,
        },
        capture_output=True,
        text=True,
        timeout=90,
        check=False,
    )
    for mark in ("localhost | SUCCESS => ", "localhost | FAILED! => "):
        if mark in done.stdout:
            result = json.loads(done.stdout[done.stdout.index(mark) + len(mark) :])
            assert result["changed"] is False
            assert ("FAILED" in mark) == ("failure_class" in result)
            return result
    raise AssertionError(done.stdout + done.stderr)


class App(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        self.send_response(303)
        self.send_header("Location", self.path)
        self.end_headers()

    def do_GET(self):
        status, body = self.server.answer(self.path, self.headers)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", body)
        self.end_headers()
        self.wfile.write(body.encode())

    def address_string(self):
        return "unix"

    def log_message(self, *_args):
        pass


class Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address, unix=False, context=None):
        if unix:
            self.address_family = socket.AF_UNIX
        self.unix = unix
        super().__init__(address, App)
        if context:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        self.answer = lambda path, headers: (200, '{"ready": true, "version": "sha-1"}')
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def server_bind(self):
        if self.unix:
            socketserver.TCPServer.server_bind(self)
            self.server_name, self.server_port = "unix", 0
        else:
            super().server_bind()

    def handle_error(self, *_args):
        pass

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


@pytest.fixture
def app():
    server = Server(("127.0.0.1", 0))
    yield server
    server.shutdown()
    server.server_close()


def test_http_query_tcp_and_command_side_by_side(app, tmp_path):
    started = time.monotonic()
    # Ready only when asked for the third time.
    asked = []
    app.answer = lambda path, headers: (asked.append(path), (200 if len(asked) > 2 else 503, '{"version": "sha-1"}'))[1]
    result = ready_wait(
        {"name": "http", "http": {"url": app.url + "/ready", "query": "version == 'sha-1'"}},
        {"name": "tcp", "tcp": {"host": "127.0.0.1", "port": app.server_address[1]}},
        {"name": "command", "command": {"argv": ["sh", "-c", "true"]}},
    )
    assert result["ready"]
    assert {name: entry["ready"] for name, entry in result["checks"].items()} == {"http": True, "tcp": True, "command": True}
    assert result["checks"]["http"]["attempts"] == 3
    assert 0 < result["checks"]["http"]["ready_after"] <= result["elapsed"] <= time.monotonic() - started


def test_a_hundred_checks_in_one_task(app):
    asked = Counter()
    app.answer = lambda path, headers: (asked.update([path]), (200 if asked[path] > 2 else 503, '{"version": "sha-1"}'))[1]
    paths = [f"/{number}" for number in range(100)]
    result = ready_wait(*({"name": path, "http": {"url": app.url + path, "query": "version == 'sha-1'"}} for path in paths), timeout=60)
    assert result["ready"]
    assert {path for path, entry in result["checks"].items() if entry["attempts"] > 2} == set(paths)


def test_each_reason_is_told(app, tmp_path):
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses
    port = closed.getsockname()[1]
    app.answer = lambda path, headers: {
        "/busy": (503, "database\nis starting"),
        "/version": (200, '{"version": "sha-1"}'),
        "/html": (200, "<html>"),
        "/big": (200, json.dumps({"version": "sha-1" * 2**18})),
        "/moved": (302, "/busy"),
    }[path]
    result = ready_wait(
        {"name": "busy", "http": {"url": app.url + "/busy"}},
        {"name": "version", "http": {"url": app.url + "/version", "query": "version == 'sha-2'"}},
        {"name": "html", "http": {"url": app.url + "/html", "query": "version"}},
        {"name": "big", "http": {"url": app.url + "/big", "query": "version"}},
        {"name": "unread", "http": {"url": app.url + "/big"}},
        {"name": "moved", "http": {"url": app.url + "/moved"}},
        {"name": "followed", "http": {"url": app.url + "/moved", "follow_redirects": True}},
        {"name": "refused", "http": {"url": f"http://me:hunter2@127.0.0.1:{port}/"}},
        {"name": "closed", "tcp": {"host": "127.0.0.1", "port": port}},
        {"name": "false", "command": {"argv": ["sh", "-c", "echo no queue; exit 4"]}},
        {"name": "accepted", "http": {"url": app.url + "/busy", "status": [503]}},
        timeout=3,
    )
    closed.close()
    said = {name: entry["last_error"] for name, entry in result["checks"].items()}
    assert said == {
        "busy": f'HTTP 503 from {app.url}/busy: body starts "database is starting"',
        "version": "JMESPath `version == 'sha-2'` was false, version is \"sha-1\"",
        "html": f'HTTP 200 from {app.url}/html, but the body is not JSON: it starts "<html>"',
        "big": f"HTTP 200 from {app.url}/big, but its body is longer than 1048576 bytes",
        "unread": None,
        "moved": f'HTTP 302 from {app.url}/moved: body starts "/busy"',
        "followed": f'HTTP 503 from {app.url}/busy: body starts "database is starting"',
        "refused": f"connection refused by 127.0.0.1:{port}",
        "closed": f"connection refused by 127.0.0.1:{port}",
        "false": 'sh ended with 4 and says "no queue"',
        "accepted": None,
    }
    assert result["failure_class"] == "not_ready"
    assert "2 of 11 ready" in result["msg"]
    assert all(reason in result["msg"] for reason in said.values() if reason)
    assert "hunter2" not in json.dumps(result)


def test_headers_and_tokens_arrive_and_do_not_follow_to_another_host(app):
    seen = []
    other = Server(("127.0.0.1", 0))
    other.answer = lambda path, headers: (seen.append(dict(headers)), (200, ""))[1]
    app.answer = lambda path, headers: (seen.append(dict(headers)), (302, other.url + "/there"))[1]
    check = {"url": app.url, "headers": {"X-Who": "me"}, "bearer_token": "tokentokentoken", "follow_redirects": True}
    result = ready_wait({"name": "a", "http": check})
    other.shutdown()
    other.server_close()
    assert result["ready"]
    assert (seen[0]["X-Who"], seen[0]["Authorization"]) == ("me", "Bearer tokentokentoken")
    assert "X-Who" not in seen[1]
    assert "Authorization" not in seen[1]


@pytest.fixture
def secure_app(tmp_path):
    """An app that speaks TLS, with a certificate for two names, and the file of it."""
    make_certificate(tmp_path, "DNS:localhost,DNS:shop.example.com")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = Server(("127.0.0.1", 0), context=context)
    server.certificate = str(tmp_path / "cert.pem")
    yield server
    server.shutdown()
    server.server_close()


def test_certificates_are_checked_unless_told_otherwise(app, secure_app):
    port = secure_app.server_address[1]
    by_name, by_number = f"https://localhost:{port}", f"https://127.0.0.1:{port}"
    trusted = {"ca_path": secure_app.certificate}
    app.answer = lambda path, headers: (302, by_name)
    result = ready_wait(
        {"name": "untrusted", "http": {"url": by_name}},
        {"name": "trusted", "http": {"url": by_name, **trusted}},
        {"name": "unchecked", "http": {"url": by_number, "validate_certs": False}},
        {"name": "other name", "http": {"url": by_number, **trusted}},
        {"name": "told name", "http": {"url": by_number, **trusted, "server_name": "shop.example.com"}},
        {"name": "wrong name", "http": {"url": by_number, **trusted, "server_name": "example.org"}},
        {"name": "sent there", "http": {"url": app.url, **trusted, "follow_redirects": True}},
        {"name": "plain", "http": {"url": app.url.replace("http:", "https:")}},
        timeout=3,
    )
    said = {name: entry["last_error"] for name, entry in result["checks"].items()}
    assert "is not trusted: self-signed certificate" in said.pop("untrusted")
    assert "is not trusted: IP address mismatch" in said.pop("other name")
    assert "is not trusted: Hostname mismatch, certificate is not valid for 'example.org'" in said.pop("wrong name")
    assert said.pop("plain") == f"127.0.0.1:{app.server_address[1]} does not speak TLS"
    assert said == {"trusted": None, "unchecked": None, "told name": None, "sent there": None}


def test_redirects_end(app):
    there = {"/loop": "/loop", "/out": "ftp://example.com/", "/bad": "http://[bad", "/once": "/ready"}
    app.answer = lambda path, headers: (302, there[path]) if path in there else (200, "")
    follow = {"follow_redirects": True}
    checks = [{"name": path, "http": {"url": app.url + path, **follow}} for path in there]
    # Sent on with 303, what was a POST is a GET.
    checks.append({"name": "posted", "http": {"url": app.url + "/ready", "method": "POST", **follow}})
    result = ready_wait(*checks, timeout=2)
    assert result["checks"]["posted"]["ready"]
    assert {path: result["checks"][path]["last_error"] for path in there} == {
        "/loop": f"more than 5 redirects from {app.url}/loop",
        "/out": f'HTTP 302 from {app.url}/out leads to "ftp://example.com/", which is not http',
        "/bad": f'HTTP 302 from {app.url}/bad leads to "http://[bad", which is not http',
        "/once": None,
    }


class Raw:
    """A peer that misbehaves: ``serve`` gets each connection in a thread of its own."""

    def __init__(self, serve):
        self.serve = serve
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                connection, _address = self.listener.accept()
            except OSError:
                return
            threading.Thread(target=self._one, args=(connection,), daemon=True).start()

    def _one(self, connection):
        with connection:
            try:
                self.serve(connection)
            except OSError:
                pass

    def __enter__(self):
        return self

    def __exit__(self, *_exc):
        self.listener.close()


def drip(beginning, data):
    def serve(connection):
        connection.sendall(beginning)
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)

    return serve


def test_a_try_ends_however_slowly_it_is_answered():
    head = b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n"
    header, body = Raw(drip(head, b"X: " + b"a" * 500)), Raw(drip(head + b"\r\n", b"a" * 500))
    mute = Raw(lambda connection: list(iter(lambda: connection.recv(999), b"")))
    with header, body, mute:
        result = ready_wait(
            {"name": "header", "http": {"url": f"http://127.0.0.1:{header.port}", "timeout": 0.3}},
            {"name": "body", "http": {"url": f"http://127.0.0.1:{body.port}", "timeout": 0.3, "query": "ready"}},
            {"name": "mute", "http": {"url": f"http://127.0.0.1:{mute.port}", "timeout": 0.3}},
            {"name": "grpc", "grpc": {"host": "127.0.0.1", "port": mute.port, "timeout": 0.3}},
            timeout=2,
        )
    said = {name: entry["last_error"] for name, entry in result["checks"].items()}
    assert said["header"] == f"no answer from 127.0.0.1:{header.port} within 0.3 s"
    assert f"HTTP 200 from http://127.0.0.1:{body.port}, but its body did not end within 0.3 s" in said["body"]
    assert said["mute"] == f"no answer from 127.0.0.1:{mute.port} within 0.3 s"
    assert said["grpc"] == f"127.0.0.1:{mute.port} took the connection and did not answer in gRPC within 0.3 s"
    assert all(entry["attempts"] > 1 for entry in result["checks"].values())


def test_a_check_that_hangs_does_not_delay_the_others(app):
    # The one that hangs is only let go by the tries of the other.
    asked = threading.Semaphore(0)

    def hang(connection):
        for _try in range(3):
            asked.acquire()
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")

    done = []

    def answer(path, headers):
        asked.release()
        done.append(path)
        return (200, "") if len(done) > 3 else (503, "")

    app.answer = answer
    with Raw(hang) as server:
        result = ready_wait(
            {"name": "hangs", "http": {"url": f"http://127.0.0.1:{server.port}", "timeout": 60}},
            {"name": "other", "http": {"url": app.url}},
            timeout=60,
        )
    assert result["ready"]
    assert result["checks"]["hangs"]["attempts"] == 1


def test_unix_sockets_and_what_is_told_of_those_that_are_not_there(tmp_path):
    path = str(tmp_path / "app.sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        result = ready_wait(
            {"name": "there", "tcp": {"unix_socket": path}}, {"name": "absent", "tcp": {"unix_socket": path + "x"}}, timeout=1
        )
    assert {name: entry["last_error"] for name, entry in result["checks"].items()} == {"there": None, "absent": f"no socket {path}x"}


def test_a_secret_with_a_line_end_is_refused_unseen(app):
    result = ready_wait({"name": "a", "http": {"url": app.url, "bearer_token": "tokentokentoken\n"}})
    assert result["failure_class"] == "config"
    assert "checks[0].http.bearer_token: holds a line end" in result["msg"]
    assert "tokentokentoken" not in result["msg"]


@pytest.fixture(scope="module")
def grpc(tmp_path_factory):
    with start_grpc(tmp_path_factory.mktemp("grpc")) as made:
        yield made


def test_grpc_health_over_tcp_tls_and_a_unix_socket(grpc):
    secure = {"host": "127.0.0.1", "port": grpc.tls, "tls": True}
    result = ready_wait(
        {"name": "server", "grpc": {"host": "127.0.0.1", "port": grpc.plain}},
        {"name": "service", "grpc": {"host": "localhost", "port": grpc.plain, "service": "shop.v1.Orders"}},
        {"name": "late", "grpc": {"host": "127.0.0.1", "port": grpc.plain, "service": "shop.v1.Late"}, "stable": 2},
        {"name": "socket", "grpc": {"unix_socket": grpc.socket, "service": "shop.v1.Orders"}},
        {"name": "own CA", "grpc": {**secure, "ca_path": grpc.certificate, "server_name": "orders.example.com"}},
        {"name": "unchecked", "grpc": {**secure, "validate_certs": False, "service": "shop.v1.Orders"}},
    )
    assert result["ready"]
    assert result["checks"]["late"]["attempts"] == 5


def test_why_a_grpc_server_is_not_ready(app, secure_app, grpc):
    here = {"host": "127.0.0.1", "port": grpc.plain}
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        refused = closed.getsockname()[1]
        result = ready_wait(
            {"name": "not serving", "grpc": {**here, "service": "shop.v1.Stock"}},
            {"name": "unknown", "grpc": {**here, "service": "shop.v1.Nothing"}},
            {"name": "bare", "grpc": {**here, "port": grpc.bare}},
            {"name": "refused", "grpc": {**here, "port": refused}},
            {"name": "web", "grpc": {**here, "port": app.server_address[1]}},
            {"name": "web in TLS", "grpc": {**here, "port": secure_app.server_address[1], "tls": True, "validate_certs": False}},
            {"name": "no TLS", "grpc": {**here, "tls": True}},
            {"name": "TLS", "grpc": {**here, "port": grpc.tls}},
            {"name": "untrusted", "grpc": {**here, "port": grpc.tls, "tls": True}},
            {"name": "other name", "grpc": {**here, "port": grpc.tls, "tls": True, "ca_path": grpc.certificate}},
            timeout=3,
        )
    said = {name: entry["last_error"] for name, entry in result["checks"].items()}
    tls = f"127.0.0.1:{grpc.tls}"
    assert "is not trusted: self-signed certificate" in said.pop("untrusted")
    assert "is not trusted: IP address mismatch" in said.pop("other name")
    # A server that gets what is no TLS says so in TLS, or just hangs up.
    assert said.pop("TLS") in (f"{tls} speaks TLS: set tls to true", f"{tls} closed the connection without an answer")
    assert said == {
        "not serving": f'service "shop.v1.Stock" is NOT_SERVING at 127.0.0.1:{grpc.plain}',
        "unknown": f'the health service of 127.0.0.1:{grpc.plain} does not know service "shop.v1.Nothing"',
        "bare": f'127.0.0.1:{grpc.bare} has no health service (grpc.health.v1.Health): "Method not found!"',
        "refused": f"connection refused by 127.0.0.1:{refused}",
        "web": f'127.0.0.1:{app.server_address[1]} speaks no HTTP/2, and gRPC needs HTTP/2: its answer starts "<!DOCTYPE HTML>"',
        "web in TLS": f"127.0.0.1:{secure_app.server_address[1]} speaks TLS, but not HTTP/2 in it (no h2 in its ALPN), which gRPC needs",
        "no TLS": f"127.0.0.1:{grpc.plain} does not speak TLS",
    }


def test_http_at_another_address_keeps_the_name(app):
    app.answer = lambda path, headers: (200 if headers["Host"] == "shop.example.com" else 400, "")
    port = app.server_address[1]
    result = ready_wait(
        {"name": "there", "http": {"url": "http://shop.example.com/ready", "connect_to": f"127.0.0.1:{port}"}},
        {"name": "nowhere", "http": {"url": "http://shop.example.com/ready", "connect_to": "127.0.0.1:1"}},
        timeout=1,
    )
    assert result["checks"]["there"]["ready"]
    assert result["checks"]["nowhere"]["last_error"] == "connection refused by 127.0.0.1:1"


def test_http_over_a_unix_socket(tmp_path):
    path = str(tmp_path / "app.sock")
    server = Server(path, unix=True)
    server.answer = lambda path, headers: (200 if headers["Host"] == "shop.example.com" else 400, "")
    result = ready_wait({"name": "a", "http": {"url": "http://shop.example.com/ready", "unix_socket": path}})
    server.shutdown()
    server.server_close()
    assert result["ready"]


def test_check_mode_asks_nothing(app):
    asked = []
    app.answer = lambda path, headers: (asked.append(path), (200, ""))[1]
    result = ready_wait({"http": {"url": app.url}}, check_mode=True)
    assert asked == []
    assert result["ready"] is False
    assert "none of 1 checks was asked" in result["msg"]


def test_a_wrong_query_is_refused_before_anything_is_asked(app):
    asked = []
    app.answer = lambda path, headers: (asked.append(path), (200, ""))[1]
    result = ready_wait({"http": {"url": app.url, "query": "version =="}}, timeout=FOREVER)
    assert result["failure_class"] == "config"
    assert asked == []


def docker(*arguments):
    done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def docker_answers():
    return bool(shutil.which("docker")) and subprocess.run(["docker", "info"], capture_output=True, timeout=60, check=False).returncode == 0


@pytest.fixture(scope="module")
def image():
    """A few hundred KB: only a static busybox."""
    busybox = shutil.which("busybox")
    if not busybox:
        pytest.skip("MISSING PROGRAM busybox: apt-get install busybox-static")
    if not docker_answers():
        pytest.skip("NO DOCKER ENGINE ANSWERS: start one to test containers")
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        tar.add(busybox, "bin/busybox")
        for name in ("sh", "sleep", "echo", "cat", "test"):
            link = tarfile.TarInfo(f"bin/{name}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
    subprocess.run(["docker", "import", "-", f"{NAME}:1"], input=archive.getvalue(), check=True, capture_output=True)
    yield f"{NAME}:1"
    docker("image", "rm", "--force", f"{NAME}:1")


@pytest.fixture
def container(image):
    """Starts containers and removes them."""
    made = []

    def start(script, *options):
        name = f"{NAME}-{len(made)}"
        made.append(name)
        docker("run", "--detach", "--network", "none", "--name", name, *options, image, "/bin/sh", "-c", script)
        return name

    yield start
    for name in made:
        docker("rm", "--force", "--volumes", name)


def test_containers_and_services_that_are_well(container):
    labels = ["--label", f"com.docker.compose.project={NAME}", "--label", "com.docker.compose.service=web"]
    health = ["--health-cmd", "echo fine", "--health-interval", "200ms"]
    healthy = container("exec sleep 600", *labels, *health)
    plain = container("exec sleep 600", *labels)
    result = ready_wait(
        {"name": "healthy", "container": {"name": healthy, "state": "healthy"}},
        {"name": "running", "container": {"id": plain}},
        {"name": "service", "service": {"project": NAME, "service": "web"}},
        {"name": "inside", "command": {"argv": ["/bin/test", "-x", "/bin/busybox"], "container": plain}},
    )
    assert result["ready"]


def test_a_container_that_exited_ends_the_wait_with_its_last_words(container):
    name = container("echo cannot reach the database; exit 7")
    result = ready_wait({"name": "web", "container": {"name": name}}, timeout=FOREVER)
    assert f"container {name} exited with code 7; last log lines:\ncannot reach the database" in result["msg"]
    assert "given up early" in result["msg"]


def test_a_container_that_loops_ends_the_wait(container):
    name = container("echo broken again; exit 1", "--restart", "always")
    result = ready_wait({"name": "web", "container": {"name": name}, "stable": 50}, timeout=FOREVER)
    assert "restarts again and again" in result["msg"]
    assert "broken again" in result["msg"]


def test_the_container_behind_a_probe_is_watched(container):
    name = container("echo out of luck; exit 5")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/ready"
        result = ready_wait({"name": "web", "http": {"url": url}, "watch": name}, timeout=FOREVER)
    assert "exited with code 5" in result["checks"]["web"]["last_error"]
    assert "out of luck" in result["msg"]


def test_an_unhealthy_container_tells_what_its_check_said(container):
    name = container("exec sleep 600", "--health-cmd", "echo queue is full; exit 1", "--health-interval", "200ms", "--health-retries", "1")
    deadline = time.monotonic() + 30
    while docker("inspect", "--format", "{{.State.Health.Status}}", name) != "unhealthy":
        assert time.monotonic() < deadline
    result = ready_wait({"name": "web", "container": {"name": name}}, timeout=1)
    assert result["checks"]["web"]["last_error"].endswith('is unhealthy, its health check ended with 1 and says "queue is full"')


def test_a_line_in_the_log(container):
    # The first line is there before the engine has noted the start; the second run has none.
    name = container("test -e /again || echo ready at once; : > /again; sleep 0.3; echo ready $((1 + 1)) >&2; exec sleep 600")
    first = ready_wait(
        {"name": "first", "log": {"container": name, "pattern": "^ready at once$"}},
        {"name": "second", "log": {"container": name, "pattern": r"ready \d"}, "stable": 2},
    )
    assert first["ready"]
    docker("restart", "--time", "0", name)
    result = ready_wait(
        {"name": "first", "log": {"container": name, "pattern": "^ready at once$"}},
        {"name": "second", "log": {"container": name, "pattern": r"ready \d"}},
        timeout=2,
    )
    assert result["checks"]["second"]["ready"]
    assert (
        result["checks"]["first"]["last_error"]
        == f"no line in the log of container {name} has '^ready at once$'; lines so far: 1, the last \"ready 2\""
    )


def test_a_log_with_a_terminal_and_one_that_is_not_kept(container):
    terminal = container("echo up; exec sleep 600", "--tty")
    assert ready_wait({"name": "web", "log": {"container": terminal, "pattern": "^up$"}})["ready"]
    silent = container("echo up; exec sleep 600", "--log-driver", "none")
    result = ready_wait({"name": "web", "log": {"container": silent, "pattern": "^up$"}}, timeout=FOREVER)
    assert f"the log of container {silent} cannot be read" in result["checks"]["web"]["last_error"]
    assert "given up early" in result["msg"]


def test_a_container_that_exits_before_its_line_comes(container):
    name = container("sleep 1; echo no licence; exit 4")
    result = ready_wait({"name": "web", "log": {"container": name, "pattern": "ready"}}, timeout=FOREVER)
    assert f"container {name} exited with code 4; last log lines:\nno licence" in result["msg"]


def test_no_engine_is_told(tmp_path):
    result = ready_wait({"name": "web", "container": {"name": "x"}}, timeout=1, docker_socket=str(tmp_path / "none.sock"))
    assert "Docker engine does not answer" in result["msg"]


@pytest.mark.skipif(
    not Path("/run/systemd/system").exists(), reason="NO SYSTEMD RUNS HERE: the systemd probe is not tested on this machine"
)
def test_units():
    unit = f"{NAME}.service"
    subprocess.run(["systemd-run", "--unit", unit, "sh", "-c", "echo no licence; exit 3"], check=True, capture_output=True)
    try:
        result = ready_wait(
            {"name": "well", "systemd": {"unit": "dbus.service"}}, {"name": "bad", "systemd": {"unit": unit}}, timeout=FOREVER
        )
        assert result["checks"]["well"]["ready"]
        assert "failed" in result["msg"]
        assert "no licence" in result["msg"]
    finally:
        subprocess.run(["systemctl", "reset-failed", unit], check=False)
