# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One call of ``grpc.health.v1.Health/Check``: a connection, a request, an answer, over HTTP/2 (RFC 9113, RFC 7541).

As much of HTTP/2 as one small call needs. What we send always fits into the window that a server starts with, and what
we take in is less than the window we start with, so no window is ever enlarged.
"""

from __future__ import annotations

import socket
import ssl
import struct
import time
from urllib.parse import unquote

from ansible_collections.selfhost.delivery.plugins.module_utils.probes.network import Options, connect, network_reason, place, secure
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.outcomes import NoAnswer, NotReady, shown_start

#: Frames are no longer unless we allow it, and we do not.
FRAME_LIMIT = 16384
#: Bytes of one answer, headers and all; a health answer has two to four.
ANSWER_LIMIT = 65535
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM, ACK, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20
STREAM = 1
_REASONS = (
    "NO_ERROR PROTOCOL_ERROR INTERNAL_ERROR FLOW_CONTROL_ERROR SETTINGS_TIMEOUT STREAM_CLOSED FRAME_SIZE_ERROR REFUSED_STREAM CANCEL "
    "COMPRESSION_ERROR CONNECT_ERROR ENHANCE_YOUR_CALM INADEQUATE_SECURITY HTTP_1_1_REQUIRED"
).split()
_STATUSES = (
    "OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS PERMISSION_DENIED RESOURCE_EXHAUSTED "
    "FAILED_PRECONDITION ABORTED OUT_OF_RANGE UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED"
).split()
_HEALTH = ("UNKNOWN", "SERVING", "NOT_SERVING", "SERVICE_UNKNOWN")


def grpc_health(options: Options, context: ssl.SSLContext | None, limit: float) -> None:
    """Return when the server says ``SERVING`` of ``options.service`` ('': of itself) within ``limit`` seconds."""
    deadline = time.monotonic() + limit
    host, port = options.get("host") or "localhost", options.get("port") or 0
    where = place(options, host, port)
    sock = connect(options, host, port, deadline, limit)
    try:
        if context is not None:
            tls = secure(sock, context, options.get("server_name") or host, where, deadline)
            sock = tls
            if tls.selected_alpn_protocol() != "h2":
                raise NotReady(f"{where} speaks TLS, but not HTTP/2 in it (no h2 in its ALPN), which gRPC needs")
        authority = options.get("server_name") or ("localhost" if options.get("unix_socket") else where)
        call = _Call(sock, where, deadline)
        call.send(authority, "http" if context is None else "https", options.get("service") or "", limit)
        call.receive()
        _judge(call, options.get("service") or "", where)
    except (TimeoutError, socket.timeout):
        raise NoAnswer(f"{where} took the connection and did not answer in gRPC within {limit:.1f} s") from None
    except OSError as exc:
        raise NotReady(network_reason(exc, where)) from exc
    finally:
        sock.close()


def _judge(call: _Call, service: str, where: str) -> None:
    first = dict(call.blocks[0]) if call.blocks else {}
    last = dict(call.blocks[-1]) if call.blocks else {}
    what = f"service {shown_start(service.encode())}" if service else "the server"
    if first.get(":status") != "200":
        raise NotReady(f"HTTP {first.get(':status', 'without a status')} from {where}, which is no answer in gRPC")
    if not first.get("content-type", "").startswith("application/grpc"):
        raise NotReady(f"{where} answers with {shown_start(first.get('content-type', '').encode())}, not in gRPC")
    code = last.get("grpc-status", "")
    message = shown_start(unquote(last["grpc-message"]).encode()) if last.get("grpc-message") else ""
    if not (code.isascii() and code.isdigit() and len(code) < 4):
        raise NotReady(f"the answer of {where} ended without a gRPC status")
    status = _STATUSES[int(code)] if int(code) < len(_STATUSES) else "unknown"
    if status == "UNIMPLEMENTED":
        raise NotReady(f"{where} has no health service (grpc.health.v1.Health)" + (f": {message}" if message else ""))
    if status == "NOT_FOUND" and service:
        raise NotReady(f"the health service of {where} does not know {what}" + (f": {message}" if message else ""))
    if status != "OK":
        raise NotReady(f"gRPC status {code} ({status}) from {where}" + (f": {message}" if message else ""))
    health = _health(call.body)
    if health is None:
        raise NotReady(f"the answer of {where} is no health answer")
    if health != 1:
        raise NotReady(f"{what} is {_HEALTH[health] if health < len(_HEALTH) else health} at {where}")


def _health(body: bytes) -> int | None:
    """``status`` of a ``HealthCheckResponse`` in one gRPC message; ``None`` when it is none."""
    if len(body) < 5 or body[0] != 0 or struct.unpack(">I", body[1:5])[0] != len(body) - 5:
        return None
    found, position = 0, 5
    try:
        while position < len(body):
            tag, position = _varint(body, position)
            if tag & 7 == 0:
                value, position = _varint(body, position)
                found = value if tag >> 3 == 1 else found
            elif tag & 7 == 2:  # a field of a later version
                length, position = _varint(body, position)
                position += length
            else:
                position += {1: 8, 5: 4}[tag & 7]
    except (IndexError, KeyError):
        return None
    return found if position == len(body) else None


def _varint(body: bytes, position: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise IndexError


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class _Call:
    """Stream 1 of a connection. ``blocks``: the answer's headers and trailers, each a list of pairs; ``body``: its message."""

    def __init__(self, sock: socket.socket, where: str, deadline: float) -> None:
        self.blocks: list[list[tuple[str, str]]] = []
        self.body = b""
        self._sock = sock
        self._where = where
        self._deadline = deadline
        self._headers = _Headers()
        self._received = 0
        self._settled = False

    def send(self, authority: str, scheme: str, service: str, limit: float) -> None:
        request = b""
        if service:
            name = service.encode()
            length = bytes([len(name)]) if len(name) < 0x80 else bytes([len(name) & 0x7F | 0x80, len(name) >> 7])
            request = b"\x0a" + length + name
        fields = {
            ":method": "POST",
            ":scheme": scheme,
            ":path": "/grpc.health.v1.Health/Check",
            ":authority": authority,
            "content-type": "application/grpc",
            "te": "trailers",
            "user-agent": "selfhost.delivery ready_wait",
            "grpc-timeout": f"{min(max(int(limit * 1000), 1), 99_999_999)}m",
        }
        block = b"".join(b"\x00" + _literal(name) + _literal(value) for name, value in fields.items())
        self._send(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(SETTINGS, 0, 0, struct.pack(">HI", 0x2, 0))  # no pushes
            + _frame(HEADERS, END_HEADERS, STREAM, block)
            + _frame(DATA, END_STREAM, STREAM, b"\0" + struct.pack(">I", len(request)) + request)
        )

    def receive(self) -> None:
        """Take frames in until the answer has ended."""
        ended = False
        while not ended:
            kind, flags, stream, payload = self._next()
            if kind == SETTINGS and not flags & ACK:
                self._send(_frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and not flags & ACK:
                self._send(_frame(PING, ACK, 0, payload))
            elif kind == GOAWAY:
                self._goes_away(payload)
            elif kind == RST_STREAM and stream == STREAM:
                raise NotReady(f"{self._where} broke the call off ({_reason(payload[:4])})")
            elif kind == HEADERS and stream == STREAM:
                block = self._unpadded(flags, payload)
                if flags & PRIORITIZED:
                    block = block[5:]
                while not flags & END_HEADERS:
                    kind, more, stream, payload = self._next()
                    if kind != CONTINUATION or stream != STREAM:
                        raise self._broken("a header block that is not continued")
                    flags |= more & END_HEADERS
                    block += payload
                fields = self._decoded(block)
                if not dict(fields).get(":status", "").startswith("1"):
                    self.blocks.append(fields)
                ended = bool(flags & END_STREAM)
            elif kind == DATA and stream == STREAM:
                self.body += self._unpadded(flags, payload)
                ended = bool(flags & END_STREAM)
            elif kind == PUSH_PROMISE:
                raise self._broken("a push, which we refused")
            # Others are of no interest to one call: windows, priorities, and kinds of a later time.

    def _goes_away(self, payload: bytes) -> None:
        if len(payload) < 8:
            raise self._broken("a GOAWAY that is too short")
        if struct.unpack(">I", payload[:4])[0] & 0x7FFFFFFF < STREAM:
            said = f": {shown_start(payload[8:])}" if payload[8:] else ""
            raise NotReady(f"{self._where} closes the connection without an answer ({_reason(payload[4:8])}{said})")

    def _next(self) -> tuple[int, int, int, bytes]:
        head = self._read(9)
        length, kind, flags, stream = int.from_bytes(head[:3], "big"), head[3], head[4], int.from_bytes(head[5:], "big") & 0x7FFFFFFF
        if not self._settled:
            if kind != SETTINGS or flags & ACK or stream or length % 6 or length > FRAME_LIMIT:
                raise self._stranger(head)
            self._settled = True
        if length > FRAME_LIMIT:
            raise self._broken(f"a frame of {length} bytes")
        return kind, flags, stream, self._read(length)

    def _stranger(self, head: bytes) -> NotReady:
        """The first thing a server of HTTP/2 sends is its settings; who is this?"""
        if head[:2] == b"\x15\x03":
            return NotReady(f"{self._where} speaks TLS: set tls to true")
        try:
            self._sock.settimeout(max(min(self._deadline - time.monotonic(), 0.2), 0.001))
            head += self._sock.recv(200)
        except OSError:
            pass
        old = "HTTP/1 only" if head.startswith(b"HTTP/1") else "no HTTP/2"
        return NotReady(f"{self._where} speaks {old}, and gRPC needs HTTP/2: its answer starts {shown_start(head.splitlines()[0])}")

    def _unpadded(self, flags: int, payload: bytes) -> bytes:
        if not flags & PADDED:
            return payload
        if not payload or payload[0] >= len(payload):
            raise self._broken("a frame that is all padding")
        return payload[1 : len(payload) - payload[0]]

    def _decoded(self, block: bytes) -> list[tuple[str, str]]:
        try:
            return self._headers.decode(block)
        except (IndexError, ValueError):
            raise self._broken("headers that cannot be decoded") from None

    def _broken(self, seen: str) -> NotReady:
        return NotReady(f"{self._where} speaks HTTP/2 wrongly: it sent {seen}")

    def _send(self, data: bytes) -> None:
        self._sock.settimeout(self._left())
        self._sock.sendall(data)

    def _read(self, count: int) -> bytes:
        self._received += count
        if self._received > ANSWER_LIMIT:
            raise NotReady(f"{self._where} says more than {ANSWER_LIMIT} bytes, which is no health answer")
        data = b""
        while len(data) < count:
            self._sock.settimeout(self._left())
            chunk = self._sock.recv(count - len(data))
            if not chunk and not self._settled and data:
                return data.ljust(count, b"\n")  # a few words, and gone: they are told
            if not chunk:
                raise NotReady(f"{self._where} closed the connection {'in mid-answer' if self._settled else 'without an answer'}")
            data += chunk
        return data

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        return left


def _reason(code: bytes) -> str:
    number = int.from_bytes(code, "big")
    return _REASONS[number] if number < len(_REASONS) else f"error {number}"


# -- HPACK (RFC 7541)


def _literal(text: str) -> bytes:
    data = text.encode()
    length = len(data)
    if length < 0x7F:
        return bytes([length]) + data
    length, coded = length - 0x7F, [0x7F]
    while length >= 0x80:
        coded.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*coded, length]) + data


class _Headers:
    """Decodes the header blocks of one connection, in their order. ``IndexError`` or ``ValueError``: they are wrong."""

    def __init__(self, size: int = 4096) -> None:
        self._dynamic: list[tuple[str, str]] = []
        self._limit = size
        self._size = size

    def decode(self, block: bytes) -> list[tuple[str, str]]:
        fields: list[tuple[str, str]] = []
        position = 0
        while position < len(block):
            first = block[position]
            if first & 0x80:
                index, position = _integer(block, position, 7)
                fields.append(self._entry(index))
                continue
            if first & 0xE0 == 0x20:
                size, position = _integer(block, position, 5)
                if size > self._limit:
                    raise ValueError
                self._size = size
                self._evict()
                continue
            remembered = bool(first & 0x40)
            index, position = _integer(block, position, 6 if remembered else 4)
            if index:
                name = self._entry(index)[0]
            else:
                name, position = _string(block, position)
            value, position = _string(block, position)
            fields.append((name, value))
            if remembered:
                self._dynamic.insert(0, (name, value))
                self._evict()
        return fields

    def _entry(self, index: int) -> tuple[str, str]:
        if index == 0:
            raise IndexError
        return _STATIC[index - 1] if index <= len(_STATIC) else self._dynamic[index - len(_STATIC) - 1]

    def _evict(self) -> None:
        while sum(len(name) + len(value) + 32 for name, value in self._dynamic) > self._size:
            self._dynamic.pop()


def _integer(block: bytes, position: int, bits: int) -> tuple[int, int]:
    value = block[position] & ((1 << bits) - 1)
    position += 1
    if value < (1 << bits) - 1:
        return value, position
    for shift in range(0, 28, 7):
        byte = block[position]
        position += 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError


def _string(block: bytes, position: int) -> tuple[str, int]:
    coded = block[position] & 0x80
    length, position = _integer(block, position, 7)
    data = block[position : position + length]
    if len(data) < length:
        raise IndexError
    # Latin-1, so that each byte counts as one in the size of the table.
    return (_unsqueezed(data) if coded else data).decode("latin-1"), position + length


def _unsqueezed(data: bytes) -> bytes:
    """Huffman coding undone."""
    found = bytearray()
    code = bits = 0
    for byte in data:
        for shift in range(7, -1, -1):
            code, bits = code << 1 | byte >> shift & 1, bits + 1
            symbol = _SYMBOLS.get((bits, code))
            if symbol is not None:
                if symbol == 256:
                    raise ValueError
                found.append(symbol)
                code = bits = 0
    if bits > 7 or code != (1 << bits) - 1:  # the rest of the last byte is the beginning of the end mark
        raise ValueError
    return bytes(found)


def _symbols() -> dict[tuple[int, int], int]:
    """Length and code to byte (256: the end mark). The code is canonical: in order of length, then of symbol."""
    found, code, before = {}, -1, 0
    for length, symbol in sorted((length, symbol) for symbol, length in enumerate(_LENGTHS)):
        code = code + 1 << length - before
        before = length
        found[length, code] = symbol
    return found


# RFC 7541, appendix B: bits of each byte's code, and of the end mark's.
_LENGTHS = (
    *(13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 28),
    *(6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12, 10),
    *(13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6),
    *(15, 5, 6, 5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28),
    *(20, 22, 20, 20, 22, 22, 22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24),
    *(22, 21, 20, 22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23),
    *(26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28, 27, 27, 27),
    *(20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28, 27, 27, 27, 27, 27, 26),
    30,
)
_SYMBOLS = _symbols()

# RFC 7541, appendix A.
_STATIC = [
    *((":authority", ""), (":method", "GET"), (":method", "POST"), (":path", "/"), (":path", "/index.html")),
    *((":scheme", "http"), (":scheme", "https")),
    *((":status", code) for code in ("200", "204", "206", "304", "400", "404", "500")),
    *(("accept-charset", ""), ("accept-encoding", "gzip, deflate")),
    *(
        (name, "")
        for name in (
            "accept-language accept-ranges accept access-control-allow-origin age allow authorization cache-control "
            "content-disposition content-encoding content-language content-length content-location content-range "
            "content-type cookie date etag expect expires from host if-match if-modified-since if-none-match if-range "
            "if-unmodified-since last-modified link location max-forwards proxy-authenticate proxy-authorization "
            "range referer refresh retry-after server set-cookie strict-transport-security transfer-encoding "
            "user-agent vary via www-authenticate"
        ).split()
    ),
]
