# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Promotions that something happens to: after each of them no tag names what is not whole, and a second run ends right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import typing as t
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from registry_fixture import PROGRAMS, Registry, both_versions, registries  # noqa: F401 # pylint: disable=unused-import
from test_images import (  # noqa: F401 # pylint: disable=unused-import
    CuttingProxy,
    Result,
    Start,
    assert_refused,
    assert_whole,
    call,
    client_of,
    no_login,
    push_image,
    push_index,
)

from ansible_collections.selfhost.delivery.plugins.module_utils import errors
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import attach

SIZE = 4_000_000
COLLECTIONS = Path(errors.__file__).absolute().parents[5]
Call = t.Callable[..., Result]


class Between:
    """A source with one image of one large layer and a destination, and a proxy before one of them."""

    def __init__(self, start: Start, call: Call) -> None:
        self.call = call
        self.a, self.b = start(), start()
        self.image = push_image(client_of(self.a), "app", "sha-abc", [os.urandom(SIZE)])
        self.layer = self.image.blobs[1]
        self.proxy: CuttingProxy | None = None

    def put(self, before: str, cuts: int, after: int = SIZE // 2, **options: t.Any) -> CuttingProxy:
        self.before = before
        registry = self.a if before == "source" else self.b
        self.proxy = CuttingProxy(registry.address, cuts, after, uploads=before == "destination", **options)
        return self.proxy

    def wish(self) -> dict[str, t.Any]:
        addresses = {"source": self.a.address, "destination": self.b.address}
        if self.proxy:
            addresses[self.before] = self.proxy.address
        return {"source": f"{addresses['source']}/app:sha-abc", "destination": f"{addresses['destination']}/app", "plain_http": True}

    def promote(self, **options: t.Any) -> Result:
        return self.call("image_promote", **{**self.wish(), "timeout": 20, "concurrency": 1, **options})

    def assert_refused(self, result: Result, *words: str) -> None:
        """It says which blob, which registry and what was seen, and left no tag."""
        address = self.proxy.address if self.proxy else self.b.address
        assert_refused(result, "transport", self.layer.digest, address, *words)
        assert client_of(self.b).tags("app") == frozenset()

    def assert_mended(self) -> None:
        if self.proxy:
            self.proxy.close()
            self.proxy = None
        assert self.promote()["changed"]
        assert_whole(client_of(self.b), "app", "sha-abc", self.image.digest)
        assert not self.promote()["changed"]

    def requests(self, registry: Registry, pattern: str) -> int:
        return len(re.findall(pattern, (registry.directory / "log").read_text()))


@pytest.fixture
def between(registries: Start, call: Call) -> t.Iterator[Between]:
    made = Between(registries, call)
    yield made
    if made.proxy:
        made.proxy.close()


# -- connections ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("before", ["source", "destination"])
@pytest.mark.parametrize("how, words", [("cut", ""), ("reset", ""), ("stall", "in")])
def test_a_connection_that_ends_or_falls_silent_in_a_blob(between: Between, before: str, how: str, words: str) -> None:
    between.put(before, cuts=1, how=how)
    between.assert_refused(between.promote(timeout=1), words)
    between.put(before, cuts=1, how=how)
    done = between.promote(retries=1, timeout=1)
    assert done["changed"] and done["bytes_copied"] >= SIZE
    assert_whole(client_of(between.b), "app", "sha-abc", between.image.digest)
    assert not between.promote()["changed"]


def test_a_source_goes_on_where_it_was_cut(between: Between) -> None:
    between.put("source", cuts=1)
    assert between.promote(retries=1)["changed"]
    assert between.requests(between.a, rf'"GET /v2/app/blobs/{between.layer.digest} HTTP/1.1" 206') == 1
    # The upload never noticed: one for each of the two blobs.
    assert between.requests(between.b, r'"POST /v2/app/blobs/uploads/ HTTP/1.1" 202') == 2


@both_versions
def test_an_upload_goes_on_where_it_was_cut_or_begins_anew(between: Between) -> None:
    between.put("destination", cuts=1)
    assert between.promote(retries=1)["changed"]
    resumed = between.requests(between.b, r'"PATCH /v2/app/blobs/uploads/')
    begun = between.requests(between.b, r'"POST /v2/app/blobs/uploads/ HTTP/1.1" 202')
    # Version 2 refuses to tell how far an upload came that broke off, version 3 tells it.
    assert (resumed, begun) == ((0, 3) if os.path.basename(between.b._program) == PROGRAMS[0] else (1, 2))
    assert_whole(client_of(between.b), "app", "sha-abc", between.image.digest)


def test_bytes_that_change_on_the_way_are_not_stored(between: Between) -> None:
    def flip(data: bytes) -> bytes:
        return data[:-1] + bytes((data[-1] ^ 1,)) if len(data) > 30000 else data

    between.put("source", cuts=0, change=flip)
    between.assert_refused(between.promote(), "its bytes have the digest", f"{between.proxy.address if between.proxy else ''}/app")
    between.put("destination", cuts=0, change=flip)
    between.assert_refused(between.promote(), "DIGEST_INVALID")
    between.assert_mended()


@pytest.mark.parametrize("told, words", [(SIZE + 1000, "announces 4001000 of 4000000 bytes"), (SIZE - 1000, "announces 3999000 of 4000000")])
def test_a_length_that_lies(between: Between, told: int, words: str) -> None:
    lie = f"Content-Length: {told}\r".encode()
    between.put("source", cuts=0, change=lambda data: data.replace(f"Content-Length: {SIZE}\r".encode(), lie))
    between.assert_refused(between.promote(), words)
    between.assert_mended()


def test_a_body_that_ends_early_though_its_length_is_right(between: Between) -> None:
    # The connection is closed in order, as by a proxy whose own source broke.
    between.put("source", cuts=9)
    between.assert_refused(between.promote(retries=1), "broke off", "bytes before the end")
    between.assert_mended()


# -- registries ----------------------------------------------------------------------------------------------------


@both_versions
@pytest.mark.parametrize("before", ["source", "destination"])
def test_a_registry_is_killed_in_a_blob(between: Between, before: str) -> None:
    registry = between.a if before == "source" else between.b

    def kill() -> None:
        assert registry._process is not None
        registry._process.kill()
        registry._process.wait()

    between.put(before, cuts=1, how=kill)
    assert_refused(between.promote(), "transport", between.layer.digest)
    registry.start()
    assert client_of(between.b).tags("app") == frozenset()

    def restart() -> None:
        kill()
        registry.start()

    between.put(before, cuts=1, how=restart)
    assert between.promote(retries=2)["changed"]
    assert_whole(client_of(between.b), "app", "sha-abc", between.image.digest)


@both_versions
def test_a_destination_whose_disk_is_full(between: Between) -> None:
    storage = str(between.b.storage)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", storage], check=True)
    try:
        between.assert_refused(between.promote(), "500", "no space left on device")
        subprocess.run(["mount", "-o", "remount,size=64m", storage], check=True)
        between.assert_mended()
    finally:
        between.b.stop()
        subprocess.run(["umount", storage], check=True)


def test_two_promotions_of_one_image_at_once(registries: Start) -> None:
    a, b = registries(), registries()
    index, _children = push_index(client_of(a), "app", "sha-abc")
    large = push_image(client_of(a), "large", "sha-abc", [os.urandom(SIZE)])
    images = [{"source": f"{a.address}/{name}:sha-abc", "destination": f"{b.address}/{name}"} for name in ("app", "large")]
    with ThreadPoolExecutor(3) as runs:
        ended = [run.result() for run in [runs.submit(promote_in_a_process, {"images": images, "plain_http": True}) for _number in range(3)]]
    assert all(code == 0 for code, _output in ended), [output.get("msg") for _code, output in ended]
    assert any(output["changed"] for _code, output in ended)
    assert_whole(client_of(b), "app", "sha-abc", index.digest)
    assert_whole(client_of(b), "large", "sha-abc", large.digest)


@both_versions
def test_a_link_that_another_promotion_writes_at_this_moment(between: Between) -> None:
    link = between.b.blob_link("app", between.layer.digest)
    held: list[bytes] = []

    def rewrite(data: bytes) -> bytes:
        # A registry empties the file before it writes it.
        if data.startswith(b"PUT /v2/app/manifests/") and not held:
            held.append(link.read_bytes())
            link.write_bytes(b"")
        elif data.startswith(b"GET /v2/app/blobs/") and held:
            link.write_bytes(held[0])
        return data

    between.put("destination", cuts=0, change=rewrite)
    assert between.promote(retries=1)["changed"] and held
    assert between.requests(between.b, r'"PUT /v2/app/manifests/sha-abc HTTP/1.1" 400') == 1
    assert_whole(client_of(between.b), "app", "sha-abc", between.image.digest)


# -- the controller ------------------------------------------------------------------------------------------------

MAIN = """
import json, sys
from ansible.module_utils.testing import patch_module_args
from ansible_collections.selfhost.delivery.plugins.modules import image_promote
with patch_module_args(json.load(sys.stdin)):
    image_promote.main()
"""


def start_process() -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", MAIN],
        env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def promote_in_a_process(parameters: dict[str, t.Any]) -> tuple[int, Result]:
    process = start_process()
    output, _errors = process.communicate(json.dumps(parameters), timeout=60)
    return process.returncode, json.loads(output)


STAGES = {
    "asking": (b"HEAD /v2/|GET /v2/app/manifests/sha-abc", 0),
    "first upload": (b"POST /v2/app/blobs/uploads/", 0),
    "in a blob": (b"PUT /v2/app/blobs/uploads/", 1),
    "child manifest": (b"PUT /v2/app/manifests/sha256:", 0),
    "referrer": (b"PUT /v2/app/manifests/sha256-", 0),
    "tag": (b"PUT /v2/app/manifests/sha-abc", 0),
    "tag, sent": (b"PUT /v2/app/manifests/sha-abc", 1),
    "second tag": (b"PUT /v2/app/manifests/production", 0),
}


@pytest.mark.parametrize("stage", STAGES)
def test_the_controller_is_killed(registries: Start, call: Call, stage: str) -> None:
    a, b = registries(), registries()
    source, target = client_of(a), client_of(b)
    index = indexed_with_referrer(source)
    pattern, sent = STAGES[stage]
    process = start_process()
    reached = threading.Event()

    def watch(data: bytes) -> bytes:
        if not reached.is_set() and re.match(pattern, data):
            reached.set()
            if not sent:
                process.kill()
                raise OSError("the controller is gone")
            # The registry has it, and nobody hears its answer.
            threading.Timer(0.05, process.kill).start()
        return data

    proxy = CuttingProxy(b.address, 0, 0, uploads=True, change=watch)
    wish = {"source": f"{a.address}/app:sha-abc", "extra_tags": ["production"], "plain_http": True, "concurrency": 1}
    process.communicate(json.dumps({**wish, "destination": f"{proxy.address}/app"}), timeout=60)
    assert reached.is_set(), f"the promotion never came to {pattern!r}"
    proxy.close()

    for tag in ("sha-abc", "production"):
        if target.manifest("app", tag) is not None:
            assert_whole(target, "app", tag, index.digest)
    again = call("image_promote", **wish, destination=f"{b.address}/app")
    assert not again.get("failed"), again
    for tag in ("sha-abc", "production"):
        assert_whole(target, "app", tag, index.digest)
    assert not call("image_promote", **wish, destination=f"{b.address}/app")["changed"]


def indexed_with_referrer(client: RegistryClient) -> Manifest:
    index, _children = push_index(client, "app", "sha-abc")
    attach(client, "app", index.descriptor(), "application/vnd.test.sbom", b"{}")
    return index
