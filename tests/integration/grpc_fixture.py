# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A real gRPC server with the health service, in a process of its own: gRPC's threads do not go well with programs that start others."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import typing as t
from pathlib import Path

#: ``Orders`` serves, ``Stock`` does not, ``Late`` does when it is asked for the fourth time. ``bare`` is a server without the health service.
SERVER = """\
import json, sys
from concurrent.futures import ThreadPoolExecutor
import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

class Health(health.HealthServicer):
    asked = 0
    def Check(self, request, context):
        if request.service == "shop.v1.Late":
            self.asked += 1
            return health_pb2.HealthCheckResponse(status="SERVING" if self.asked > 3 else "NOT_SERVING")
        return super().Check(request, context)

folder = sys.argv[1]
servicer = Health()
for service, status in {"": "SERVING", "shop.v1.Orders": "SERVING", "shop.v1.Stock": "NOT_SERVING"}.items():
    servicer.set(service, health_pb2.HealthCheckResponse.ServingStatus.Value(status))
server = grpc.server(ThreadPoolExecutor(8))
health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
pair = tuple(open(f"{folder}/{name}.pem", "rb").read() for name in ("key", "cert"))
found = {
    "plain": server.add_insecure_port("0.0.0.0:0"),
    "tls": server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([pair])),
}
server.add_insecure_port(f"unix:{folder}/grpc.sock")
bare = grpc.server(ThreadPoolExecutor(2))
found["bare"] = bare.add_insecure_port("127.0.0.1:0")
server.start()
bare.start()
print(json.dumps(found), flush=True)
sys.stdin.read()
"""


class Grpc(t.NamedTuple):
    plain: int
    tls: int
    bare: int
    socket: str
    #: Certificate of the TLS port, good for ``orders.example.com`` only.
    certificate: str


@contextlib.contextmanager
def start_grpc(folder: Path) -> t.Iterator[Grpc]:
    """``folder`` gets its key, its certificate and its Unix socket."""
    make_certificate(folder, "DNS:orders.example.com")
    argv = [sys.executable, "-c", SERVER, str(folder)]
    quiet = {**os.environ, "GRPC_VERBOSITY": "NONE"}  # it tells of every client that does not speak TLS
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=quiet) as process:
        try:
            assert process.stdout
            ports = json.loads(process.stdout.readline())
            yield Grpc(**ports, socket=str(folder / "grpc.sock"), certificate=str(folder / "cert.pem"))
        finally:
            process.kill()


def make_certificate(folder: Path, names: str) -> None:
    """``key.pem`` and ``cert.pem``, self-signed, for ``names`` as openssl writes them."""
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -addext"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run([*command.split(), f"subjectAltName={names}", *files], check=True, capture_output=True)
