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
from pathlib import Path

import pytest

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


def test_each_reason_is_told(app, tmp_path):
    closed = socket.socket()
    closed.bind(("127.0.0.1", 0))  # bound and not listening: refuses
    port = closed.getsockname()[1]
    app.answer = lambda path, headers: {
        "/busy": (503, "database\nis starting"),
        "/version": (200, '{"version": "sha-1"}'),
        "/html": (200, "<html>"),
        "/moved": (302, "/busy"),
    }[path]
    result = ready_wait(
        {"name": "busy", "http": {"url": app.url + "/busy"}},
        {"name": "version", "http": {"url": app.url + "/version", "query": "version == 'sha-2'"}},
        {"name": "html", "http": {"url": app.url + "/html", "query": "version"}},
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
        "moved": f'HTTP 302 from {app.url}/moved: body starts "/busy"',
        "followed": f'HTTP 503 from {app.url}/busy: body starts "database is starting"',
        "refused": f"connection refused by 127.0.0.1:{port}",
        "closed": f"connection refused by 127.0.0.1:{port}",
        "false": 'sh ended with 4 and says "no queue"',
        "accepted": None,
    }
    assert result["failure_class"] == "not_ready"
    assert "1 of 9 ready" in result["msg"]
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


def test_certificates_are_checked_unless_told_otherwise(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost,IP:127.0.0.1"
    subprocess.run([*command.split(), "-keyout", str(key), "-out", str(certificate)], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = Server(("127.0.0.1", 0), context=context)
    url = server.url.replace("http:", "https:")
    result = ready_wait(
        {"name": "untrusted", "http": {"url": url}},
        {"name": "trusted", "http": {"url": url, "ca_path": str(certificate)}},
        {"name": "unchecked", "http": {"url": url, "validate_certs": False}},
        timeout=3,
    )
    server.shutdown()
    server.server_close()
    assert "is not trusted: self-signed certificate" in result["checks"]["untrusted"]["last_error"]
    assert result["checks"]["trusted"]["ready"]
    assert result["checks"]["unchecked"]["ready"]


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
