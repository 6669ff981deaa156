# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What tests of edges share: upstreams and clients that notice whatever is lost, and the HAProxy that the role edge makes."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ansible_collections.selfhost.delivery.plugins.module_utils import errors
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import edge_from

COLLECTIONS = Path(errors.__file__).absolute().parents[5]
HOLD_TIMEOUT = 2
# Bounds for what is asked again and again; never a time that must pass.
PATIENCE = 20


def free_port(address="127.0.0.1"):
    with socket.socket() as probe:
        probe.bind((address, 0))
        return probe.getsockname()[1]


def eventually(question, what):
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        answer = question()
        if answer:
            return answer
        time.sleep(0.01)
    raise AssertionError(f"never saw: {what}")


def ask(port, path="/", host="x", body=None):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    try:
        connection.request("POST" if body is not None else "GET", path, body=body, headers={"Host": host})
        response = connection.getresponse()
        return response.status, response.read().decode(), {name.lower(): value for name, value in response.getheaders()}
    finally:
        connection.close()


class Upstream:
    """An app on an address of its own: says where it is, waits on demand, takes bodies."""

    def __init__(self, address, port, ready=200):
        self.address, self.port, self.ready = address, port, ready
        self.requests = 0
        self.lock = threading.Lock()
        self.go_on = threading.Event()
        upstream = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                if self.path == "/api/ready":
                    return self.say(upstream.ready, "ready")
                with upstream.lock:
                    upstream.requests += 1
                if self.path == "/tunnel":
                    return self.echo()
                if self.path == "/wait":
                    upstream.go_on.wait(PATIENCE)
                return self.say(200, f"{upstream.address} {len(body)}")

            do_GET = do_POST = answer

            def echo(self):
                """What a WebSocket is to an edge: an upgraded connection without an end of its own."""
                self.send_response(101)
                self.send_header("Upgrade", "echo")
                self.send_header("Connection", "Upgrade")
                self.end_headers()
                self.close_connection = True
                while chunk := self.connection.recv(1000):
                    self.wfile.write(chunk)

            def say(self, status, text):
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, *_args):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_args):
                pass

        self.server = Server((address, port), Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def stop(self):
        self.go_on.set()
        self.server.shutdown()
        self.server.server_close()


class EdgeHost:
    """One edge in its own folder, made by the role."""

    def __init__(self, folder):
        self.folder = Path(folder)
        self.port = free_port()
        self.socket = str(self.folder / "edge/run/admin.sock")
        self.pidfile = self.folder / "edge/run/haproxy.pid"
        self.edge = edge_from({"type": "haproxy", "socket": self.socket})

    def play(self, *arguments, tasks="main", **variables):
        """Run the role; returns (changed, output)."""
        values = {
            "ansible_python_interpreter": sys.executable,
            "edge_instance": "test-edge",
            "edge_config_dir": str(self.folder / "edge"),
            "edge_service_manager": "process",
            "edge_bind_http": [f"127.0.0.1:{self.port}"],
            "edge_hold_timeout": HOLD_TIMEOUT,
            "edge_routes": [
                {"project": "shop", "service": "web", "ready": "/api/ready"},
                {"project": "shop", "service": "api", "host": "shop.example.com", "path": "/api", "ready": "/api/ready"},
            ],
            "delivery_app": {
                "name": "blog",
                "services": {"web": {"image": "a"}},
                "routes": [{"service": "web", "host": "blog.example.com"}],
            },
            **variables,
        }
        role = {"ansible.builtin.include_role": {"name": "selfhost.delivery.edge", "tasks_from": tasks, "public": True}}
        play = [{"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": [role]}]
        (self.folder / "play.yml").write_text(json.dumps(play))
        (self.folder / "vars.json").write_text(json.dumps(values))
        program = Path(sys.executable).parent / "ansible-playbook"
        done = subprocess.run(
            [str(program), "-i", "localhost,", "-e", f"@{self.folder / 'vars.json'}", str(self.folder / "play.yml"), *arguments],
            env={
                **os.environ,
                "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
                "ANSIBLE_LOCAL_TEMP": str(self.folder / "ansible"),
                "ANSIBLE_NOCOLOR": "1",
                "ANSIBLE_INJECT_FACT_VARS": "false",
            },
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        recap = done.stdout[done.stdout.rindex("changed=") :]
        return int(recap.split("=")[1].split()[0]), done.stdout

    def get(self, *arguments, **named):
        return ask(self.port, *arguments, **named)

    def empty(self):
        for backend in ("shop-web", "shop-api", "blog-web"):
            for upstream in self.edge.upstreams(backend):
                self.edge.remove(backend, upstream.address, upstream.port)
        self.edge.hold("shop", "off")


class Later:
    """A call in the background."""

    def __init__(self, call, *arguments, **named):
        self.answer = None

        def run():
            self.answer = call(*arguments, **named)

        self.thread = threading.Thread(target=run, daemon=True)
        self.thread.start()

    def result(self):
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive(), "no answer"
        return self.answer


class Load:
    """Clients that never retry: whatever is lost, they see. They keep their connection unless ``keep`` is false."""

    def __init__(self, port, clients=8, keep=True):
        self.port = port
        self.keep = keep
        self.over = threading.Event()
        self.sent = itertools.count()
        self.errors = []
        self.answers = []
        self.threads = [threading.Thread(target=self.run, args=(number,), daemon=True) for number in range(clients)]
        for thread in self.threads:
            thread.start()

    def run(self, number):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)
        body = None if number % 2 else b"x" * 2000
        while not self.over.is_set():
            try:
                connection.request("POST" if body else "GET", "/", body=body)
                response = connection.getresponse()
                text = response.read().decode()
                if response.status != 200:
                    self.errors.append(f"HTTP {response.status} {text[:80]}")
                self.answers.append(text)
            except (OSError, http.client.HTTPException) as exc:
                self.errors.append(repr(exc))
                connection.close()
            if not self.keep:
                connection.close()
            self.over.wait(0.02)
        connection.close()

    def stop(self):
        self.over.set()
        for thread in self.threads:
            thread.join(PATIENCE)
