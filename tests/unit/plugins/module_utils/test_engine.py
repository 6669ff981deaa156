# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The engine's client against a server on a Unix socket that says what engines have been seen to say."""

from __future__ import annotations

import http.server
import json
import os
import socket
import socketserver
import struct
import threading
import typing as t
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine, EngineError, EngineNotFound, LogStream, moment
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

Answer = tuple[int, t.Any]


class Fake:
    """Answers by method and path without query; keeps what it was asked."""

    def __init__(self, path: str) -> None:
        self.answers: dict[str, Answer] = {}
        self.asked: list[tuple[str, t.Any]] = []
        self.hang = threading.Event()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = self.rfile.read(length)
                fake.asked.append((f"{self.command} {self.path}", json.loads(body) if body else None))
                status, content = fake.answers.get(f"{self.command} {self.path.partition('?')[0]}", (404, {"message": "no such thing"}))
                if content == "hang":
                    fake.hang.wait(10)
                    content = {}
                data = content if isinstance(content, bytes) else json.dumps(content).encode()
                self.send_response(status)
                if status not in (204, 304):
                    self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if status not in (204, 304):
                    self.wfile.write(data)

            do_GET = do_POST = do_DELETE = _answer

            def log_message(self, *_args: t.Any) -> None:
                pass

            def address_string(self) -> str:
                return "unix"

        class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
            daemon_threads = True

            def handle_error(self, *_args: t.Any) -> None:
                pass  # a client that did not wait for the answer

        self.server = Server(path, Handler)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def stop(self) -> None:
        self.hang.set()
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def fake(tmp_path: Path) -> t.Iterator[Fake]:
    # A socket's path has at most 107 bytes.
    path = os.path.relpath(tmp_path / "s")
    made = Fake(path)
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def engine(fake: Fake) -> Engine:
    return Engine(f"unix://{fake.server.server_address}", timeout=5)


def frame(stream: int, text: str) -> bytes:
    return bytes([stream, 0, 0, 0]) + struct.pack(">I", len(text.encode())) + text.encode()


def test_nothing_answers_names_the_socket(tmp_path: Path) -> None:
    with pytest.raises(DeliveryError) as error:
        Engine(str(tmp_path / "none")).version()
    assert error.value.failure_class == "transport" and str(tmp_path / "none") in error.value.message


def test_a_silent_engine_is_transport(fake: Fake) -> None:
    fake.answers["GET /version"] = (200, "hang")
    with pytest.raises(DeliveryError) as error:
        Engine(str(fake.server.server_address), timeout=0.05).version()
    assert error.value.failure_class == "transport" and "0.05 s" in error.value.message


def test_refusals_keep_the_engines_words(fake: Fake, engine: Engine) -> None:
    fake.answers["POST /containers/c/start"] = (500, {"message": "port is already allocated"})
    with pytest.raises(EngineError) as error:
        engine.start("c")
    assert error.value.status == 500 and "port is already allocated" in error.value.message
    with pytest.raises(EngineNotFound):
        engine.inspect("gone")


def test_start_and_stop_say_whether_they_did_anything(fake: Fake, engine: Engine) -> None:
    fake.answers.update({"POST /containers/c/start": (204, b""), "POST /containers/c/stop": (304, b"")})
    assert engine.start("c") is True
    assert engine.stop("c", 7) is False
    assert fake.asked[-1][0] == "POST /containers/c/stop?t=7"


@pytest.mark.parametrize(("own", "seconds"), [('"StopTimeout": 90', 90), ('"StopTimeout": 0', 0), ('"StopTimeout": null', 30), ("", 30)])
def test_a_container_knows_how_long_it_may_take_to_stop(fake: Fake, engine: Engine, own: str, seconds: int) -> None:
    inspected = b'{"Config": {%s}}' % own.encode()
    fake.answers.update({"GET /containers/c/json": (200, inspected), "POST /containers/c/stop": (204, b"")})
    engine.stop("c", otherwise=30)
    assert fake.asked[-1][0] == f"POST /containers/c/stop?t={seconds}"


def test_states_that_are_there_already_are_no_errors(fake: Fake, engine: Engine) -> None:
    fake.answers["POST /containers/c/pause"] = (409, {"message": "Container c is already paused"})
    fake.answers["POST /containers/c/unpause"] = (500, {"message": "Container c is not paused"})
    fake.answers["POST /containers/c/kill"] = (409, {"message": "Container c is not running"})
    fake.answers["DELETE /containers/c"] = (409, {"message": "removal of container c is already in progress"})
    assert not engine.pause("c") and not engine.unpause("c") and not engine.kill("c")
    assert not engine.remove("c") and not engine.remove("gone")
    fake.answers["POST /containers/c/pause"] = (409, {"message": "Container c is not running"})
    with pytest.raises(EngineError):
        engine.pause("c")


def test_labels_become_one_filter(fake: Fake, engine: Engine) -> None:
    fake.answers["GET /containers/json"] = (200, [])
    engine.containers({"a": "1", "b": None}, all=False)
    asked = fake.asked[-1][0]
    assert "all=0" in asked and "%22a%3D1%22%2C+%22b%22" in asked


def test_logs_with_and_without_frames(fake: Fake, engine: Engine) -> None:
    fake.answers["GET /containers/c/logs"] = (200, frame(1, "one\n") + frame(2, "two\nthr") + frame(1, "ee\n"))
    assert engine.logs("c") == "one\ntwo\nthree"
    assert engine.logs("c", tail=2) == "two\nthree"
    fake.answers["GET /containers/c/logs"] = (200, b"a terminal\r\nsays so\r\n")
    assert engine.logs("c") == "a terminal\nsays so"
    fake.answers["GET /containers/c/logs"] = (501, {"message": "configured logging driver does not support reading"})
    assert engine.logs("c") == ""


def test_wait_ends_with_the_code_or_in_time(fake: Fake, engine: Engine) -> None:
    fake.answers["POST /containers/c/wait"] = (200, {"StatusCode": 3})
    assert engine.wait("c", 5) == 3
    fake.answers["POST /containers/c/wait"] = (200, "hang")
    with pytest.raises(TimeoutError):
        engine.wait("c", 0.05)


def test_exec_returns_code_and_output(fake: Fake, engine: Engine) -> None:
    fake.answers["POST /containers/c/exec"] = (201, {"Id": "e"})
    fake.answers["POST /exec/e/start"] = (200, frame(1, "out") + frame(2, "err"))
    fake.answers["GET /exec/e/json"] = (200, {"Running": False, "ExitCode": 4})
    assert engine.exec("c", ["false"]) == (4, "outerr")
    assert fake.asked[0][1]["Cmd"] == ["false"]
    fake.answers["POST /exec/e/start"] = (200, "hang")
    with pytest.raises(TimeoutError):
        engine.exec("c", ["sleep"], timeout=0.05)


def followed(pieces: list[bytes], tty: bool = False) -> list[str | None]:
    """What a stream reads after each piece has come, and after its end."""
    ours, theirs = socket.socketpair()
    stream, seen = LogStream(ours, "Reading", tty), []
    try:
        for piece in pieces:
            theirs.sendall(piece)
            seen.append(stream.read())
        theirs.close()
        return [*seen, stream.read()]
    finally:
        theirs.close()
        stream.close()


HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: application/x\r\n\r\n"


def test_a_log_is_followed_however_it_is_cut() -> None:
    whole = HEAD + frame(1, "größe\n") + frame(2, "two\n")
    assert followed([whole]) == ["größe\ntwo\n", ""]
    bytewise = followed([whole[index : index + 1] for index in range(len(whole))])
    assert [text for text in bytewise if text] == ["größe\n", "two\n"]
    assert bytewise[:8] == [None] * 8 and bytewise[-1] == ""
    halves = [HEAD, frame(1, "gr")[:7] + b"\3gr\xc3", frame(2, "b"), frame(1, "")[:7] + b"\2\xb6\n"]
    assert followed(halves) == [None, "gr", "b", "ö\n", ""]
    assert followed([HEAD + b"plain\r\n", b"more"], tty=True) == ["plain\r\n", "more", ""]


@pytest.mark.parametrize(("status", "kind"), [(404, EngineNotFound), (501, EngineError)])
def test_a_log_that_cannot_be_followed(status: int, kind: type[EngineError]) -> None:
    with pytest.raises(kind, match="no such log") as error:
        followed([f"HTTP/1.0 {status} No\r\n\r\n".encode() + b'{"message":', b'"no such log"}'])
    assert error.value.status == status


def test_the_engines_times_have_nanoseconds() -> None:
    assert moment("2026-11-22T00:13:51.250000001Z") == pytest.approx(1795306431.25, abs=1e-6)
    assert moment("2026-11-22T01:13:51+01:00") == 1795306431
    assert moment("0001-01-01T00:00:00Z") < 0


def test_images_volumes_and_networks(fake: Fake, engine: Engine) -> None:
    reference = "127.0.0.1:5000/a/b@sha256:" + "a" * 64
    fake.answers[f"GET /images/{reference}/json"] = (200, {"Id": "x"})
    assert engine.image(reference) == {"Id": "x"} and engine.image("other") is None
    fake.answers["GET /volumes"] = (200, {"Volumes": None})
    assert engine.volumes() == [] and engine.volume("v") is None
    # The engine's filter also finds mount points of that name.
    fake.answers["GET /containers/json"] = (200, [{"Id": "1", "Mounts": [{"Name": "v"}]}, {"Id": "2", "Mounts": [{"Destination": "v"}]}])
    assert [one["Id"] for one in engine.containers_using_volume("v")] == ["1"]


def test_a_restart_policy_is_set_whole(fake: Fake, engine: Engine) -> None:
    fake.answers["POST /containers/c/update"] = (200, {"Warnings": None})
    engine.set_restart_policy("c", {"Name": "", "MaximumRetryCount": None})
    assert fake.asked[-1][1] == {"RestartPolicy": {"Name": "no", "MaximumRetryCount": 0}}
