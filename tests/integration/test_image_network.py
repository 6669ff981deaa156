# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What stands before a registry: TLS in a real HAProxy, client certificates, redirects, size limits, and a real forward proxy."""

from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest
from registry_fixture import (  # noqa: F401 # pylint: disable=unused-import
    PASSWORD,
    USERNAME,
    Registry,
    both_versions,
    make_certificate,
    registries,
)
from test_images import (  # noqa: F401 # pylint: disable=unused-import
    CuttingProxy,
    Result,
    Start,
    TokenServer,
    assert_refused,
    assert_whole,
    call,
    client_of,
    no_login,
    push_image,
    push_index,
    token_server,
)

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "bench"))
from measure import Counter  # noqa: E402

from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Descriptor  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import RECORD_TYPE  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_of  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import attach, list_referrers  # noqa: E402

Call = t.Callable[..., Result]
Front = t.Callable[..., "HAProxy"]
PATIENCE = 20


def eventually(question: t.Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + PATIENCE
    while not question():
        assert time.monotonic() < deadline, f"never saw: {what}"
        time.sleep(0.02)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def listens(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), 1).close()
    except OSError:
        return False
    return True


class HAProxy:
    """HAProxy before a registry. ``address`` is where it speaks TLS; its certificates lie in ``directory``."""

    def __init__(self, directory: Path, registry: Registry, bind: str = "", front: str = "", host: str = "127.0.0.1", more: str = "") -> None:
        directory.mkdir()
        make_certificate(directory)
        (directory / "both.pem").write_text((directory / "server.pem").read_text() + (directory / "server.key").read_text())
        self.directory = directory
        self.ca_path = str(directory / "ca.pem")
        port = free_port()
        self.address = f"{host}:{port}"
        self.log = directory / "log"
        (directory / "haproxy.cfg").write_text(
            f"""
global
  log stdout format raw local0
defaults
  mode http
  log global
  option httplog
  timeout connect 5s
  timeout client 30s
  timeout server 30s
frontend front
  bind {host}:{port} ssl crt {directory}/both.pem {bind.format(directory=directory)}
  http-request capture req.hdr(Authorization) len 20
  {front.format(directory=directory)}
  default_backend registry
backend registry
  server one {registry.address}
{more.format(directory=directory, registry=registry.address)}
"""
        )
        with self.log.open("wb") as sink:
            self.process = subprocess.Popen(["haproxy", "-db", "-f", str(directory / "haproxy.cfg")], stdout=sink, stderr=sink)
        eventually(lambda: listens(host, port) or self.process.poll() is not None, "HAProxy listening")
        assert self.process.poll() is None, self.log.read_text()

    @property
    def options(self) -> dict[str, t.Any]:
        return {"ca_path": self.ca_path}

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait(10)


@pytest.fixture
def front(tmp_path: Path) -> t.Iterator[Front]:
    if not shutil.which("haproxy"):
        pytest.fail("these tests need haproxy: install the package haproxy")
    running: list[HAProxy] = []

    def start(registry: Registry, **options: t.Any) -> HAProxy:
        running.append(HAProxy(tmp_path / f"haproxy{len(running)}", registry, **options))
        return running[-1]

    yield start
    for one in running:
        one.stop()


# -- TLS before the registry ---------------------------------------------------------------------------------------


@both_versions
def test_behind_a_tls_proxy_that_does_not_tell_its_scheme(registries: Start, front: Front, call: Call) -> None:
    a = registries()
    edge = front(registries())
    index, _children = push_index(client_of(a), "app", "sha-abc")
    attach(client_of(a), "app", index.descriptor(), RECORD_TYPE, b"{}")
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{edge.address}/app", "source_auth": a.options, "destination_auth": edge.options}
    assert call("image_promote", **wish)["blobs"]["copied"] == 5
    assert not call("image_promote", **wish)["changed"]
    there = RegistryClient(edge.address, ClientOptions(**edge.options))
    assert_whole(there, "app", "sha-abc", index.digest)
    assert len(list_referrers(there, "app", index.digest)) == 1


def test_client_certificates(registries: Start, front: Front, call: Call) -> None:
    a = registries()
    edge = front(a, bind="verify required ca-file {directory}/ca.pem")
    other = front(a)
    image = push_image(client_of(a), "app", "sha-abc", [b"layer"])
    images = [f"{edge.address}/app:sha-abc"]
    own = {"client_cert": str(edge.directory / "server.pem"), "client_key": str(edge.directory / "server.key")}
    assert call("image_info", images=images, **edge.options, **own)["images"][0]["digest"] == image.digest
    together = {"client_cert": str(edge.directory / "both.pem")}
    assert call("image_info", images=images, **edge.options, **together)["images"][0]["exists"]
    assert_refused(call("image_info", images=images, **edge.options, retries=3), "config", edge.address, "wants a client certificate")
    foreign = {"client_cert": str(other.directory / "both.pem")}
    assert_refused(call("image_info", images=images, **edge.options, **foreign), "config", edge.address, "does not accept the certificate")
    unfit = {**own, "client_key": str(other.directory / "server.key")}
    assert_refused(call("image_info", images=images, **edge.options, **unfit), "config", "no certificate with a fitting key")
    locked = edge.directory / "locked.key"
    subprocess.run(["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", own["client_key"], "-out", str(locked)], check=True, capture_output=True)
    assert_refused(call("image_info", images=images, **edge.options, **{**own, "client_key": str(locked)}), "config", "passphrase")
    assert_refused(call("image_info", images=images, client_key=own["client_key"]), "config", "without client_cert")
    # Each side of a promotion has its own.
    sides = {"source_auth": {**edge.options, **own}, "destination_auth": a.options}
    assert call("image_promote", source=images[0], destination=f"{a.address}/copy", **sides)["changed"]


def test_a_connection_that_the_proxy_closed_meanwhile_costs_nothing(registries: Start, front: Front) -> None:
    edge = front(registries(), front="timeout http-keep-alive 50ms")
    client = RegistryClient(edge.address, ClientOptions(ca_path=edge.ca_path, retries=0))
    for _round in range(3):
        location = client.start_upload("app")
        (idle,) = next(iter(client.transport._idle.values()))
        assert idle.sock is not None
        assert select.select([idle.sock], [], [], PATIENCE)[0], "the proxy never closed an idle connection"
        # A body that exists once cannot be sent again: the connection has to be known as closed before.
        data = os.urandom(1000)
        client.finish_upload("app", location, Descriptor("", digest_of(data), len(data)), [data])


def test_a_limit_on_bodies_makes_smaller_parts(registries: Start, front: Front, call: Call) -> None:
    a = registries()
    # As nginx says it for what is above client_max_body_size.
    edge = front(registries(), front="http-request deny deny_status 413 if {{ req.hdr_val(content-length) gt 1048576 }}")
    image = push_image(client_of(a), "app", "sha-abc", [os.urandom(3_000_000), os.urandom(3_000_001), b"x"])
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{edge.address}/app", "source_auth": a.options, "destination_auth": edge.options}
    done = call("image_promote", **wish, retries=1)
    assert done.get("changed"), done["msg"]
    assert_whole(RegistryClient(edge.address, ClientOptions(**edge.options)), "app", "sha-abc", image.digest)


def test_a_registry_that_only_claims_to_list_referrers(registries: Start, front: Front) -> None:
    a = registries()
    edge = front(a, front="http-response set-header OCI-Subject sha256:0 if {{ capture.req.method PUT }}")
    image = push_image(client_of(a), "app", "sha-abc", [b"layer"])
    made = attach(RegistryClient(edge.address, ClientOptions(**edge.options)), "app", image.descriptor(), RECORD_TYPE, b"{}")
    assert [item.digest for item in list_referrers(client_of(a), "app", image.digest)] == [made]


# -- redirects -----------------------------------------------------------------------------------------------------


def test_blobs_from_another_origin_are_fetched_without_credentials(registries: Start, front: Front, call: Call) -> None:
    a, b = registries(htpasswd=True), registries()
    image = push_image(client_of(a), "app", "sha-abc", [os.urandom(100_000)])
    # Object storage, as far as it matters here: another origin, which answers 400 to a request with an Authorization header.
    storage = front(
        a,
        front="http-request deny deny_status 400 if {{ req.hdr(Authorization) -m found }}\n"
        "  http-request set-header Authorization 'Basic Y2k6Y29ycmVjdCBob3JzZSBiYXR0ZXJ5'",
    )
    edge = front(a, front=f"http-request redirect code 307 prefix https://{storage.address} if {{{{ path_sub /blobs/sha256: }}}} METH_GET")
    trusted = edge.directory / "both-ca.pem"
    trusted.write_text(Path(edge.ca_path).read_text() + Path(storage.ca_path).read_text())
    login = {"username": USERNAME, "password": PASSWORD, "ca_path": str(trusted)}
    wish = {"source": f"{edge.address}/app:sha-abc", "destination": f"{b.address}/app", "destination_auth": b.options}
    assert call("image_promote", **wish, source_auth=login)["changed"]
    assert_whole(client_of(b), "app", "sha-abc", image.digest)
    asked = storage.log.read_text()
    assert f"GET /v2/app/blobs/{image.blobs[1].digest}" in asked and "{Basic" not in asked
    assert "{Basic" in edge.log.read_text()


def test_a_redirect_to_plain_http_is_refused(registries: Start, front: Front, call: Call) -> None:
    a, b = registries(), registries()
    push_image(client_of(a), "app", "sha-abc", [b"layer"])
    edge = front(a, front=f"http-request redirect code 307 prefix http://{a.address} if {{{{ path_sub /blobs/sha256: }}}} METH_GET")
    wish = {"source": f"{edge.address}/app:sha-abc", "destination": f"{b.address}/app", "destination_auth": b.options}
    assert_refused(call("image_promote", **wish, source_auth=edge.options), "config", f"sends us on to http://{a.address}")


def test_a_limit_on_requests_is_waited_for(registries: Start, front: Front, call: Call) -> None:
    a = registries()
    image = push_image(client_of(a), "app", "sha-abc", [b"layer"])
    limited = (
        "stick-table type ip size 10 expire 1m store http_req_cnt\n  http-request track-sc0 src\n"
        "  http-request return status 429 hdr Retry-After 1 content-type text/plain string 'slow down' if {{ sc_http_req_cnt(0) eq 1 }}"
    )
    assert call("image_info", images=[f"{front(a, front=limited).address}/app:sha-abc"], validate_certs=False, retries=1)["images"][0]["digest"]
    edge = front(a, front="http-request return status 429 hdr Retry-After 3600 content-type text/plain string 'slow down'")
    refused = call("image_info", images=[f"{edge.address}/app@{image.digest}"], **edge.options, retries=3)
    assert_refused(refused, "transport", edge.address, "429 slow down", "3600 seconds of patience")
    assert edge.log.read_text().count("GET /v2/app/manifests") == 1


# -- a forward proxy -----------------------------------------------------------------------------------------------


@pytest.fixture
def machine_address() -> str:
    """An address of this machine that is not loopback, since nothing on loopback is asked through a proxy."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # Sends nothing.
        return str(probe.getsockname()[0])


@pytest.fixture
def forward_proxy(tmp_path: Path) -> t.Iterator[t.Callable[[], tuple[str, Path]]]:
    """Starts tinyproxy with a user, and returns its address and log."""
    if not shutil.which("tinyproxy"):
        pytest.fail("these tests need tinyproxy: install the package tinyproxy")
    running: list[subprocess.Popen[bytes]] = []

    def start() -> tuple[str, Path]:
        port, log = free_port(), tmp_path / "tinyproxy.log"
        config = tmp_path / "tinyproxy.conf"
        config.write_text(f'Port {port}\nListen 127.0.0.1\nTimeout 60\nLogFile "{log}"\nLogLevel Connect\nBasicAuth me s3cret\n')
        running.append(subprocess.Popen(["tinyproxy", "-d", "-c", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        eventually(lambda: listens("127.0.0.1", port), "tinyproxy listening")
        return f"127.0.0.1:{port}", log

    yield start
    for process in running:
        process.terminate()
        process.wait(10)


def test_a_forward_proxy_and_what_passes_it_by(
    registries: Start,
    front: Front,
    call: Call,
    forward_proxy: t.Callable[[], tuple[str, Path]],
    machine_address: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    a = registries()
    image = push_image(client_of(a), "app", "sha-abc", [os.urandom(100_000)])
    edge = front(a, host=machine_address)
    proxy, log = forward_proxy()
    monkeypatch.setenv("https_proxy", f"http://me:s3cret@{proxy}")
    reach = {"validate_certs": False}
    asked = [f"{edge.address}/app:sha-abc"]

    monkeypatch.setenv("no_proxy", f"example.com,{machine_address}/24")
    assert call("image_info", images=asked, **reach)["images"][0]["digest"] == image.digest
    assert edge.address not in log.read_text(), "it went through the proxy, though no_proxy names the network"

    monkeypatch.setenv("no_proxy", f"example.com,{machine_address}:1")
    done = call("image_promote", source=asked[0], destination=f"{edge.address}/copy", source_auth=reach, destination_auth=reach)
    assert done["changed"] and f"CONNECT {edge.address}" in log.read_text()
    assert_whole(client_of(a), "copy", "sha-abc", image.digest)

    monkeypatch.setenv("https_proxy", f"http://me:wrong@{proxy}")
    refused = call("image_info", images=asked, **reach, retries=3)
    assert_refused(refused, "config", edge.address, f"the proxy {proxy} answered 40", "no_proxy")
    assert "wrong" not in refused["msg"]
    monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{free_port()}")
    assert_refused(call("image_info", images=asked, **reach), "transport", f"through the proxy {os.environ['https_proxy'][7:]}", "refused")


# -- tokens that end in the middle ---------------------------------------------------------------------------------


def test_tokens_that_end_in_the_middle_of_a_copy(
    registries: Start, call: Call, token_server: t.Callable[[int], TokenServer]
) -> None:
    tokens = token_server(300)
    a, b = registries(), registries(token=tokens.config)
    image = push_image(client_of(a), "app", "sha-abc", [os.urandom(4_000_000), os.urandom(3_000_000), b"small"])
    # Registries let a minute pass after the end of a token, so this one ends in two seconds, whatever is said of it.
    tokens.lifetime = -58
    issued: list[float] = []
    make = tokens.token

    def token(scopes: list[str]) -> str:
        issued.append(time.time())
        return make(scopes)

    tokens.token = token  # type: ignore[method-assign]
    held: list[float] = []

    def hold(data: bytes) -> bytes:
        # In the middle of the first layer all tokens of before come to their end.
        if len(data) > 30_000 and not held:
            held.append(time.time())
            eventually(lambda: time.time() > max(issued) + 4, "the end of the tokens")
        return data

    proxy = CuttingProxy(a.address, 0, 0, change=hold)
    wish = {"source": f"{proxy.address}/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True, "concurrency": 1}
    login = {"username": USERNAME, "password": PASSWORD}
    done = call("image_promote", **wish, destination_auth=login, retries=1)
    proxy.close()
    assert done.get("changed"), done
    assert held and [moment for moment in issued if moment > held[0]], "no token was renewed"
    tokens.lifetime = 300
    assert_whole(RegistryClient(b.address, ClientOptions(**login, plain_http=True)), "app", "sha-abc", image.digest)


# -- the budget --------------------------------------------------------------------------------------------------------


def test_a_registry_gets_no_more_at_a_time_than_concurrency_says(registries: Start, call: Call) -> None:
    a, b = registries(), registries()
    for number in range(9):
        image = push_image(client_of(a), f"app{number}", "sha-abc", [os.urandom(1000) for _layer in range(6)])
        attach(client_of(a), f"app{number}", image.descriptor(), RECORD_TYPE, b"{}")
    counters = Counter(0.02), Counter(0.02)
    source, destination = (counter.proxy(registry.address) for counter, registry in zip(counters, (a, b)))
    images = [{"source": f"{source}/app{number}:sha-abc", "destination": f"{destination}/app{number}"} for number in range(9)]
    done = call("image_promote", images=images, plain_http=True, concurrency=3)
    assert done.get("changed"), done
    for counter in counters:
        requests = counter.take()
        counter.close()
        together = [[line for begin, end, line in requests if begin <= moment < end] for moment, _end, _line in requests]
        blobs = [[line for line in lines if line.startswith("PUT") and "/blobs/" in line] for lines in together]
        asked = [[line for line in lines if line not in blobs[number]] for number, lines in enumerate(together)]
        # Three blobs flow at a time, and four times as many questions are asked, which are what a wait is spent on.
        assert len(max(blobs, key=len)) <= 3, max(blobs, key=len)
        assert 3 < len(max(asked, key=len)) <= 12, max(asked, key=len)
