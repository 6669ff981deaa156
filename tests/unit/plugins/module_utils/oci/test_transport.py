# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is asked again, where credentials go, and how a registry's answers are told; against a small HTTP server."""

from __future__ import annotations

import http.server
import threading
import time
import typing as t
from email.utils import formatdate

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci import transport as transport_module
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Descriptor
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_of
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transport import Interrupted, Origin, RetryPolicy, Transport, proxy_for

Answer = t.Tuple[int, t.Dict[str, str], bytes]  # noqa: UP006


class Server:
    """Answers from a script: a list of (status, headers, body), the last one again and again. Remembers requests."""

    def __init__(self) -> None:
        self.script: list[Answer] = [(200, {}, b"")]
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.connections = 0
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self) -> None:
                super().setup()
                outer.connections += 1

            def answer(self) -> None:
                self.rfile.read(int(self.headers.get("Content-Length") or 0))
                outer.requests.append((self.command, self.path, {name.lower(): value for name, value in self.headers.items()}))
                status, headers, body = outer.script.pop(0) if len(outer.script) > 1 else outer.script[0]
                if status == 0:
                    self.close_connection = True
                    return
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)
                if headers.get("Connection") == "close":
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = answer

            def log_message(self, format: str, *args: t.Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server() -> t.Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture
def other() -> t.Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Pauses are noted instead of waited for."""
    waited: list[float] = []
    monkeypatch.setattr(transport_module.time, "sleep", waited.append)
    return waited


def client(server: Server, **options: t.Any) -> RegistryClient:
    values: dict[str, t.Any] = {"plain_http": True, "timeout": 10, "docker_config": None, **options}
    return RegistryClient(server.address, ClientOptions(**values))


def test_retry_policy() -> None:
    policy = RetryPolicy(3)
    for attempt, longest in ((0, 0.5), (1, 1), (2, 2)):
        delay = policy.delay(attempt)
        assert delay is not None and longest / 2 <= delay <= longest
    assert policy.delay(3) is None and RetryPolicy(0).delay(0) is None
    assert policy.delay(0, "7") == 7 and policy.delay(0, " 60 ") == 60
    assert policy.delay(0, "61") is None, "more patience than we have"
    late = policy.delay(0, "Wed, 21 Oct 2026 07:28:00 GMT")
    assert late is not None and late < 1, "a date that has passed"
    soon = policy.delay(0, formatdate(time.time() + 30, usegmt=True))
    assert soon is not None and 25 < soon < 31
    assert policy.delay(0, formatdate(time.time() + 3600, usegmt=True)) is None
    assert policy.delay(0, "soon") is not None
    assert RetryPolicy(99).delay(50) is not None and t.cast(float, RetryPolicy(99).delay(50)) <= 10


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
def test_patience_is_kept_within_the_budget(server: Server, no_waiting: list[float], status: int) -> None:
    server.script = [(status, {"Retry-After": "2"}, b""), (status, {}, b""), (200, {}, b"x")]
    assert client(server, retries=2).request("GET", "/v2/", []).body == b"x"
    assert no_waiting[0] == 2 and len(server.requests) == 3
    server.script = [(status, {}, b"overloaded")]
    with pytest.raises(Interrupted, match=f"answered {status} overloaded"):
        client(server, retries=2).request("GET", "/v2/", [])
    assert len(server.requests) == 6


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 413, 416])
def test_other_answers_are_final(server: Server, status: int) -> None:
    server.script = [(status, {}, b"")]
    assert client(server, retries=5).request("GET", "/v2/", []).status == status
    assert len(server.requests) == 1


def test_a_cut_connection_is_asked_again(server: Server) -> None:
    server.script = [(0, {}, b""), (200, {"Content-Length": "10"}, b"short"), (200, {}, b"whole")]
    server.script[1][1]["Connection"] = "close"
    assert client(server, retries=2).request("GET", "/v2/", []).body == b"whole"
    server.script = [(0, {}, b"")]
    with pytest.raises(Interrupted, match="closed before an answer"):
        client(server, retries=1).request("GET", "/v2/", [])


def test_an_idle_connection_that_was_closed_costs_no_retry(server: Server) -> None:
    made = client(server, retries=0)
    server.script = [(200, {}, b"one"), (0, {}, b""), (200, {}, b"two")]
    assert made.request("GET", "/v2/", []).body == b"one"
    assert made.request("GET", "/v2/", []).body == b"two"


def test_connections_are_kept(server: Server) -> None:
    made = client(server)
    for _number in range(5):
        made.request("GET", "/v2/", [])
        made.request("HEAD", "/v2/", [])
    assert server.connections == 1


def test_credentials_do_not_follow_a_redirect_to_another_origin(server: Server, other: Server) -> None:
    other.script = [(200, {}, b"blob")]
    blob = Descriptor("", digest_of(b"blob"), 4)
    server.script = [
        (401, {"WWW-Authenticate": 'Basic realm="r"'}, b""),
        (307, {"Location": f"http://{other.address}/bucket?signature=s"}, b""),
    ]
    made = client(server, username="u", password="p")
    assert made.read_blob("a", blob) == b"blob"
    assert "authorization" in server.requests[-1][2] and "authorization" not in other.requests[-1][2]
    server.script = [(307, {"Location": "/elsewhere"}, b""), (200, {}, b"blob")]
    assert made.read_blob("a", blob) == b"blob"
    assert server.requests[-1][1] == "/elsewhere" and "authorization" in server.requests[-1][2]


def test_a_challenge_of_another_origin_is_not_answered(server: Server, other: Server) -> None:
    other.script = [(401, {"WWW-Authenticate": 'Basic realm="give me"'}, b"")]
    server.script = [(307, {"Location": f"http://{other.address}/x"}, b"")]
    response = client(server, username="u", password="p").request("GET", "/v2/", [])
    assert response.status == 401 and len(other.requests) == 1 and "authorization" not in other.requests[0][2]


def test_nothing_is_sent_in_the_clear_unless_asked_for(server: Server) -> None:
    made = RegistryClient("r.example", ClientOptions(username="u", password="p"))
    with pytest.raises(DeliveryError, match="unencrypted"):
        made.request("GET", f"http://{server.address}/v2/", [])
    assert server.requests == []


def test_pages_that_a_registry_names_on_another_host_in_the_clear_are_refused(server: Server) -> None:
    made = client(server)
    made._origin = Origin("https", "r.example", 443)
    server.script = [(200, {"Link": f'<http://{server.address}/v2/a/tags/list?n=1>; rel="next"'}, b'{"tags":[]}')]
    with pytest.raises(DeliveryError, match=f"sends us to http://{server.address}"):
        made.tags("a")


def test_redirects_end(server: Server) -> None:
    server.script = [(307, {"Location": "/again"}, b"")]
    with pytest.raises(DeliveryError, match="redirected more than"):
        client(server).request("GET", "/v2/", [])
    server.script = [(307, {"Location": "ftp://x.example/"}, b"")]
    with pytest.raises(DeliveryError, match="sends us on to ftp://x.example"):
        client(server).request("GET", "/v2/", [])


def test_an_upload_on_another_origin_gets_no_credentials(server: Server, other: Server) -> None:
    server.script = [(401, {"WWW-Authenticate": "Basic"}, b""), (202, {"Location": f"http://{other.address}/up?state=1"}, b"")]
    other.script = [(201, {}, b"")]
    made = client(server, username="u", password="p")
    location = made.start_upload("a")
    made.finish_upload("a", location, Descriptor("", digest_of(b"x"), 1), [b"x"])
    method, path, headers = other.requests[0]
    assert (method, path) == ("PUT", "/up?state=1&digest=" + digest_of(b"x").replace(":", "%3A")) and "authorization" not in headers


def test_a_refused_mount_becomes_an_upload(server: Server) -> None:
    server.script = [(403, {}, b""), (202, {"Location": "/v2/a/blobs/uploads/1"}, b"")]
    assert client(server).mount_blob("a", Descriptor("", digest_of(b"x"), 1), "b") == f"http://{server.address}/v2/a/blobs/uploads/1"
    assert [path for _method, path, _headers in server.requests][0].endswith(f"?mount={digest_of(b'x').replace(':', '%3A')}&from=b")


def test_a_registry_that_changes_manifests_is_found_out(server: Server) -> None:
    body = b'{"schemaVersion":2,"layers":[]}'
    server.script = [(200, {"Docker-Content-Digest": "sha256:" + "a" * 64}, body)]
    with pytest.raises(DeliveryError, match="its bytes have the digest"):
        client(server).manifest("a", "x")
    server.script = [(200, {}, body)]
    with pytest.raises(DeliveryError, match="its bytes have the digest"):
        client(server).manifest("a", "sha256:" + "b" * 64)
    found = client(server).manifest("a", "x")
    assert found is not None and server.requests[-1][2]["accept"].count("application/") == 4
    server.script = [(201, {"Docker-Content-Digest": "sha256:" + "c" * 64}, b"")]
    with pytest.raises(DeliveryError, match="the registry made sha256:c"):
        client(server).put_manifest("a", found)
    server.script = [(415, {}, b'{"errors":[{"code":"MANIFEST_INVALID"}]}')]
    with pytest.raises(DeliveryError, match=r"does not take manifests of the type application/vnd.oci.image.manifest.v1\+json"):
        client(server).put_manifest("a", found)


def test_pages_of_tags_are_followed(server: Server) -> None:
    server.script = [(200, {"Link": '</v2/a/tags/list?n=1000&last=one>; rel="next"'}, b'{"tags":["one"]}'), (200, {}, b'{"tags":["two"]}')]
    assert client(server).tags("a") == {"one", "two"}
    assert server.requests[-1][1] == "/v2/a/tags/list?n=1000&last=one"
    server.script = [(403, {}, b"")]
    assert client(server).tags("a") is None


def test_the_words_of_a_registry_reach_the_reader(server: Server) -> None:
    server.script = [(403, {}, b'{"errors":[{"code":"DENIED","message":"not yours"}]}')]
    with pytest.raises(DeliveryError, match=r"refused the user 'u' \(403 DENIED: not yours\)"):
        client(server, username="u", password="p").manifest("a", "x")
    server.script = [(418, {}, b"<html>teapot</html>")]
    with pytest.raises(DeliveryError, match="answered 418 <html>teapot"):
        client(server).manifest("a", "x")


def test_a_blob_that_breaks_off_is_damaged_though_head_says_otherwise(server: Server) -> None:
    blob = Descriptor("", digest_of(b"blob"), 4)
    cut = (206, {"Content-Range": "bytes 0-0/4", "Content-Length": "1", "Connection": "close"}, b"")
    server.script = [cut]
    assert client(server, retries=0).probe_blob("a", blob) == "damaged"
    server.script = [cut, (206, {"Content-Range": "bytes 0-0/4"}, b"b")]
    assert client(server, retries=0).probe_blob("a", blob) == "present"
    server.script = [(206, {"Content-Range": "bytes 0-0/3"}, b"b")]
    assert client(server).probe_blob("a", blob) == "damaged"
    server.script = [(200, {}, b"blob")]
    assert client(server).probe_blob("a", blob) == "present"
    server.script = [(404, {}, b"")]
    assert client(server).probe_blob("a", blob) == "absent"


@pytest.mark.parametrize(
    "environment, url, expected",
    [
        ({}, "https://r.example", None),
        ({"https_proxy": "http://p:3128"}, "https://r.example", "http://p:3128"),
        ({"https_proxy": "p:3128"}, "https://r.example", "http://p:3128"),
        ({"http_proxy": "http://p:3128"}, "https://r.example", None),
        ({"all_proxy": "http://p:3128"}, "https://r.example", "http://p:3128"),
        ({"https_proxy": "http://p:3128", "no_proxy": "r.example"}, "https://r.example:5000", None),
        ({"https_proxy": "http://p:3128", "no_proxy": ".example"}, "https://r.example", None),
        ({"https_proxy": "http://p:3128", "no_proxy": "*"}, "https://r.example", None),
        ({"https_proxy": "http://p:3128", "no_proxy": "a.example, example"}, "https://r.example", None),
        ({"https_proxy": "http://p:3128", "no_proxy": "*.example"}, "https://r.example", None),
        ({"https_proxy": "http://p:3128", "no_proxy": "r.example:5000"}, "https://r.example", "http://p:3128"),
        ({"https_proxy": "http://p:3128", "no_proxy": "r.example:5000"}, "https://r.example:5000", None),
        ({"https_proxy": "http://p:3128", "no_proxy": "xr.example,r.exampl"}, "https://r.example", "http://p:3128"),
        ({"https_proxy": "http://p:3128", "no_proxy": "10.0.0.0/8"}, "https://10.1.2.3", None),
        ({"https_proxy": "http://p:3128", "no_proxy": "10.0.0.0/8:5000"}, "https://10.1.2.3", "http://p:3128"),
        ({"https_proxy": "http://p:3128", "no_proxy": "10.0.0.0/8"}, "https://11.1.2.3", "http://p:3128"),
        ({"https_proxy": "http://p:3128", "no_proxy": "10.0.0.0/8"}, "https://r10.example", "http://p:3128"),
        ({"https_proxy": "http://p:3128", "no_proxy": "fd00::/8"}, "https://[fd00::1]:5000", None),
        ({"https_proxy": "http://p:3128", "no_proxy": "[fd00::1]:5000"}, "https://[fd00::1]:5000", None),
        ({"http_proxy": "http://p:3128"}, "http://localhost:5000", None),
        ({"http_proxy": "http://p:3128"}, "http://127.0.0.1:5000", None),
    ],
)
def test_proxies(monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], url: str, expected: str | None) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(Origin.of(url)) == expected


def test_a_proxy_is_used_and_gets_its_own_credentials(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:secret@{server.address}")
    monkeypatch.delenv("no_proxy", raising=False)
    made = Transport(ClientOptions(plain_http=True, retries=0))
    assert made.send("GET", "http://r.example:5000/v2/?a=b", {}).status == 200
    _method, path, headers = server.requests[0]
    assert (
        path == "http://r.example:5000/v2/?a=b"
        and headers["host"] == "r.example:5000"
        and headers["proxy-authorization"] == "Basic bWU6c2VjcmV0"
    )
    with pytest.raises(DeliveryError, match="socks5 proxy"):
        monkeypatch.setenv("http_proxy", "socks5://p:1080")
        proxy_for(Origin.of("http://r.example"))
