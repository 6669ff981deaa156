# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""HPACK by the examples of its RFC, and servers that do what no real one does when asked nicely; those are in tests/integration."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.probes import grpc_health
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.outcomes import NoAnswer, NotReady

SETTINGS, HEADERS, DATA, RST, PING, GOAWAY, PUSH, MORE = 4, 1, 0, 3, 6, 7, 5, 9


# RFC 7541, C.5 and C.6: three answers on one connection, plain and squeezed, with a table of 256 bytes that entries fall out of.
RESPONSES = [
    [
        (":status", "302"),
        ("cache-control", "private"),
        ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
        ("location", "https://www.example.com"),
    ],
    [
        (":status", "307"),
        ("cache-control", "private"),
        ("date", "Mon, 21 Oct 2013 20:13:21 GMT"),
        ("location", "https://www.example.com"),
    ],
    [
        (":status", "200"),
        ("cache-control", "private"),
        ("date", "Mon, 21 Oct 2013 20:13:22 GMT"),
        ("location", "https://www.example.com"),
        ("content-encoding", "gzip"),
        ("set-cookie", "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1"),
    ],
]
PLAIN = [
    "4803333032580770726976617465611d4d6f6e2c203231204f637420323031332032303a31333a323120474d54"
    "6e1768747470733a2f2f7777772e6578616d706c652e636f6d",
    "4803333037c1c0bf",
    "88c1611d4d6f6e2c203231204f637420323031332032303a31333a323220474d54c05a04677a69707738666f6f3d4153444a4b48514b425a584f5157454f50495541"
    "585157454f49553b206d61782d6167653d333630303b2076657273696f6e3d31",
]
SQUEEZED = [
    "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3",
    "4883640effc1c0bf",
    "88c16196d07abe941054d444a8200595040b8166e084a62d1bffc05a839bd9ab77ad94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587"
    "316065c003ed4ee5b1063d5007",
]


def test_the_examples_of_the_rfc():
    decoder = grpc_health._Headers(256)
    assert [decoder.decode(bytes.fromhex(block)) for block in SQUEEZED] == RESPONSES
    decoder = grpc_health._Headers(256)
    assert [decoder.decode(bytes.fromhex(block)) for block in PLAIN] == RESPONSES


@pytest.mark.parametrize(
    "block",
    [
        "80",  # entry 0
        "ff00",  # an entry that is not there
        "c0",
        "40",  # ends in the middle
        "0003616263",
        "00056162",
        "ffffffffffff7f",  # a number without an end
        "3fe2ff7f",  # a table larger than was allowed
        "0081ff00",  # padding of eight bits
        "0084ffffffff00",  # the end mark inside a text
        "008100",  # padding that is not the end mark's
    ],
)
def test_headers_that_cannot_be_decoded(block):
    with pytest.raises((IndexError, ValueError)):
        grpc_health._Headers().decode(bytes.fromhex(block))


def frame(kind, flags, stream, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def block(**fields):
    return b"".join(b"\0" + grpc_health._literal(name.replace("_", "-")) + grpc_health._literal(value) for name, value in fields.items())


HELLO = frame(SETTINGS, 0, 0)
HEAD = b"\x88" + block(content_type="application/grpc")
SERVING = b"\0\0\0\0\2\x08\1"
OK = block(grpc_status="0")
GOOD = HELLO + frame(HEADERS, 4, 1, HEAD) + frame(DATA, 0, 1, SERVING) + frame(HEADERS, 5, 1, OK)


def told(code, message="", head=HEAD):
    return HELLO + frame(HEADERS, 5, 1, head + block(grpc_status=code, **({"grpc_message": message} if message else {})))


@contextlib.contextmanager
def server(answer, folder, wait=False):
    """Says ``answer`` to whoever comes and hangs up, or waits; what it was told is in the list."""
    heard = []
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{folder}/s")
        listener.listen()

        def serve():
            with contextlib.suppress(OSError):
                connection, _address = listener.accept()
                with connection:
                    connection.sendall(answer)
                    if not wait:
                        connection.shutdown(socket.SHUT_WR)
                    while True:
                        data = connection.recv(65536)
                        if not data:
                            break
                        heard.append(data)

        thread = threading.Thread(target=serve)
        thread.start()
        yield heard
        thread.join()


def ask(answer, folder, service="", limit=5.0, wait=False):
    with server(answer, folder, wait) as heard:
        grpc_health.grpc_health({"unix_socket": f"{folder}/s", "service": service}, None, limit)
    return b"".join(heard)


@pytest.mark.parametrize(
    "answer",
    [
        GOOD,
        # Padding and priority, a block in two frames, one before the answer, kinds nobody knows, windows, other streams.
        HELLO
        + frame(SETTINGS, 1, 0)
        + frame(8, 0, 0, b"\0\0\1\0")
        + frame(HEADERS, 4, 1, block(**{":status": "103"}))
        + frame(HEADERS, 0x28, 1, b"\2" + b"\0\0\0\0\1" + HEAD[:9] + b"\0\0")
        + frame(MORE, 0, 1, HEAD[9:12])
        + frame(MORE, 4, 1, HEAD[12:])
        + frame(0xEE, 0xFF, 1, b"x")
        + frame(2, 0, 1, b"\0\0\0\0\1")
        + frame(DATA, 8, 1, b"\3" + SERVING[:4] + b"\0\0\0")
        + frame(DATA, 0, 1, SERVING[4:])
        + frame(DATA, 0, 3, b"another")
        + frame(HEADERS, 5, 1, OK),
        # It goes away, but not before this answer.
        HELLO + frame(GOAWAY, 0, 0, b"\0\0\0\1\0\0\0\0") + GOOD[len(HELLO) :],
        # A field of a later version beside the status.
        HELLO + frame(HEADERS, 4, 1, HEAD) + frame(DATA, 0, 1, b"\0\0\0\0\6\x12\2ab\x08\1") + frame(HEADERS, 5, 1, OK),
    ],
)
def test_what_is_an_answer(answer, tmp_path):
    ask(answer, tmp_path)


def test_what_is_sent(tmp_path):
    sent = ask(HELLO + frame(PING, 0, 0, b"12345678") + GOOD[len(HELLO) :], tmp_path, "shop.v1.Orders")
    assert sent.startswith(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
    assert frame(DATA, 1, 1, b"\0\0\0\0\x10\x0a\x0eshop.v1.Orders") in sent
    assert frame(SETTINGS, 1, 0) in sent
    assert frame(PING, 1, 0, b"12345678") in sent
    assert b"/grpc.health.v1.Health/Check" in sent


def test_a_long_name_is_framed_rightly(tmp_path):
    assert b"\x0a\xac\x02" + b"n" * 300 in ask(GOOD, tmp_path, "n" * 300)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (b"", "closed the connection without an answer"),
        (HELLO, "closed the connection in mid-answer"),
        (GOOD[:-3], "closed the connection in mid-answer"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", 'speaks HTTP/1 only, and gRPC needs HTTP/2: its answer starts "HTTP/1.1 400 Bad Request"'),
        (b"220 mail.example.com ESMTP\r\n", 'speaks no HTTP/2, and gRPC needs HTTP/2: its answer starts "220 mail.example.com ESMTP"'),
        (b"-ERR\r\n", 'its answer starts "-ERR"'),
        (b"\x15\x03\x01\0\2\2\x46", "speaks TLS: set tls to true"),
        (told("12", "unknown service %25"), 'has no health service (grpc.health.v1.Health): "unknown service %"'),
        (told("5"), 'the health service of {here} does not know service "a"'),
        (told("14", "no db"), 'gRPC status 14 (UNAVAILABLE) from {here}: "no db"'),
        (told("99"), "gRPC status 99 (unknown)"),
        (told("x"), "ended without a gRPC status"),
        (told("²"), "ended without a gRPC status"),
        (told("0"), "is no health answer"),
        (told("0", head=b"\x8d"), "HTTP 404 from {here}, which is no answer in gRPC"),
        (told("0", head=b"\x88" + block(content_type="text/html")), 'answers with "text/html", not in gRPC'),
        (GOOD.replace(SERVING, b"\0\0\0\0\2\x08\2"), 'service "a" is NOT_SERVING at {here}'),
        (GOOD.replace(SERVING, b"\0\0\0\0\2\x08\3"), 'service "a" is SERVICE_UNKNOWN'),
        (GOOD.replace(SERVING, b"\0\0\0\0\2\x08\x09"), 'service "a" is 9'),
        (GOOD.replace(SERVING, b"\1\0\0\0\2\x08\1"), "is no health answer"),  # compressed, which we did not allow
        (GOOD.replace(SERVING, b"\0\0\0\0\2\x08\xff"), "is no health answer"),
        (GOOD.replace(SERVING, b"\0\0\0\0\2\x12\x7f"), "is no health answer"),
        (HELLO + frame(RST, 0, 1, b"\0\0\0\7"), "broke the call off (REFUSED_STREAM)"),
        (HELLO + frame(RST, 0, 1, b"\0\0\1\0"), "broke the call off (error 256)"),
        (HELLO + frame(GOAWAY, 0, 0, b"\0\0\0\0\0\0\0\x0bcalm"), 'closes the connection without an answer (ENHANCE_YOUR_CALM: "calm")'),
        (HELLO + frame(GOAWAY, 0, 0, b"\0"), "a GOAWAY that is too short"),
        (HELLO + frame(PUSH, 4, 1, b"\0\0\0\2"), "a push, which we refused"),
        (HELLO + frame(HEADERS, 4, 1, b"\xff\0"), "headers that cannot be decoded"),
        (HELLO + frame(HEADERS, 0, 1, HEAD) + frame(DATA, 0, 1), "a header block that is not continued"),
        (HELLO + frame(HEADERS, 4, 1, HEAD) + frame(DATA, 8, 1, b"\1"), "a frame that is all padding"),
        (HELLO + frame(HEADERS, 0xC, 1, b""), "a frame that is all padding"),
        (HELLO + b"\xff\0\0\0\0\0\0\0\1", "a frame of 16711680 bytes"),
        (HELLO + frame(HEADERS, 4, 1, HEAD) + frame(DATA, 0, 1, b"x" * 16000) * 5, "says more than 65535 bytes"),
        (HELLO + frame(HEADERS, 0, 1, HEAD) + frame(MORE, 0, 1, b"\x88" * 16000) * 5, "says more than 65535 bytes"),
        (HELLO + frame(PING, 1, 0, b"12345678") * 5000, "says more than 65535 bytes"),
    ],
)
def test_the_reason_is_told(answer, reason, tmp_path):
    with pytest.raises(NotReady) as error:
        ask(answer, tmp_path, "a")
    assert reason.replace("{here}", f"{tmp_path}/s") in str(error.value)


@pytest.mark.parametrize("answer", [b"", HELLO, GOOD[:-1], b"HTTP"])
def test_who_does_not_end_is_not_waited_for(answer, tmp_path):
    with pytest.raises(NoAnswer, match="did not answer in gRPC within 0.2 s"):
        ask(answer, tmp_path, limit=0.2, wait=True)
