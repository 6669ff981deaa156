# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""image_info, image_promote and release_record against real registries."""

from __future__ import annotations

import base64
import http.server
import importlib
import json
import os
import re
import shutil
import socket
import stat
import struct
import subprocess
import threading
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest
from ansible.module_utils.testing import patch_module_args
from registry_fixture import PASSWORD, USERNAME, Registry, both_versions, registries  # noqa: F401 # pylint: disable=unused-import

from ansible_collections.selfhost.delivery.plugins.module_utils.oci import transfer
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import (
    DOCKER_LIST,
    DOCKER_MANIFEST,
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import RECORD_TYPE, read_records_for
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import (
    attach,
    fallback_index,
    list_referrers,
    own_tag,
    put_referrers,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.remembered import Remembered

Start = t.Callable[..., Registry]
Result = t.Dict[str, t.Any]  # noqa: UP006
RECORD = {"environment": "staging", "release": "20261121-090000-sha-abc", "result": "committed", "tag": "sha-abc"}


@pytest.fixture(autouse=True)
def no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test uses the credentials or proxies of whoever runs it, or what another test left remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "no-docker-config"))
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> t.Callable[..., Result]:
    """Runs a module's ``main`` with these parameters and returns its result."""

    def run(name: str, check: bool = False, **params: t.Any) -> Result:
        module = importlib.import_module(f"ansible_collections.selfhost.delivery.plugins.modules.{name}")
        with patch_module_args({**params, "_ansible_check_mode": check, "_ansible_diff": True, "retries": params.get("retries", 0)}):
            with pytest.raises(SystemExit):
                module.main()
        result: Result = json.loads(capsys.readouterr().out)
        return result

    return run


# -- images to promote ---------------------------------------------------------------------------------------------


def client_of(registry: Registry) -> RegistryClient:
    return RegistryClient(registry.address, ClientOptions(**registry.options))


def push_image(
    client: RegistryClient, repository: str, tag: str | None, layers: t.Sequence[bytes], arch: str = "amd64", media_type: str = OCI_MANIFEST
) -> Manifest:
    """A small image whose layers are the given bytes."""
    config = {"architecture": arch, "os": "linux", "created": "2026-11-21T09:00:00Z", "config": {"Labels": {"revision": "abc"}}}
    content = {
        "schemaVersion": 2,
        "mediaType": media_type,
        "config": client.push_blob(repository, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json").as_json(),
        "layers": [client.push_blob(repository, layer, "application/vnd.oci.image.layer.v1.tar").as_json() for layer in layers],
    }
    manifest = Manifest.build(content)
    client.put_manifest(repository, manifest, tag)
    return manifest


def push_index(client: RegistryClient, repository: str, tag: str, media_type: str = OCI_INDEX) -> tuple[Manifest, dict[str, Manifest]]:
    """An index for two platforms."""
    kind = OCI_MANIFEST if media_type == OCI_INDEX else DOCKER_MANIFEST
    children = {arch: push_image(client, repository, None, [arch.encode() * 1000], arch, kind) for arch in ("amd64", "arm64")}
    listed = [{**child.descriptor().as_json(), "platform": {"os": "linux", "architecture": arch}} for arch, child in children.items()]
    index = Manifest.build({"schemaVersion": 2, "mediaType": media_type, "manifests": listed})
    client.put_manifest(repository, index, tag)
    return index, children


def assert_whole(client: RegistryClient, repository: str, version: str, digest: str) -> None:
    """Read an image with everything below it, checking each byte."""
    manifest = client.manifest(repository, version)
    assert manifest is not None and manifest.digest == digest
    for child in manifest.children:
        assert_whole(client, repository, child.digest, child.digest)
    for blob in manifest.blobs:
        assert len(client.read_blob(repository, blob)) == blob.size


def assert_refused(result: Result, failure_class: str, *words: str) -> None:
    assert result.get("failed") is True, result
    assert result["failure_class"] == failure_class, result
    for word in words:
        assert word in result["msg"], result["msg"]
    assert "Traceback" not in result["msg"]


def sides(source: Registry, destination: Registry) -> dict[str, t.Any]:
    return {"source_auth": source.options, "destination_auth": destination.options}


# -- promotion -----------------------------------------------------------------------------------------------------


@both_versions
@pytest.mark.parametrize("relative_urls", [False, True])
def test_cold_copy_then_nothing_to_do(registries: Start, call: t.Callable[..., Result], relative_urls: bool) -> None:
    a, b = registries(), registries(htpasswd=True, tls=True, relative_urls=relative_urls)
    layers = [os.urandom(3 * 1024 * 1024 + 17), os.urandom(1024 * 1024), b"x"]
    image = push_image(client_of(a), "shop/app", "sha-abc", layers)
    wish = {"source": f"{a.address}/shop/app:sha-abc", "destination": f"{b.address}/prod/app", "extra_tags": ["production"], **sides(a, b)}
    before = b.snapshot()

    foretold = call("image_promote", check=True, **wish)
    assert foretold["changed"] and foretold["blobs"] == {"mounted": 0, "copied": 4, "present": 0}
    assert b.snapshot() == before, "check mode wrote something"

    done = call("image_promote", **wish)
    assert done["changed"] and done["digest"] == image.digest and done["tags"] == ["sha-abc", "production"]
    assert done["media_type"] == OCI_MANIFEST
    assert done["blobs"] == foretold["blobs"] and done["bytes_copied"] == foretold["bytes_copied"] == sum(blob.size for blob in image.blobs)
    assert done["diff"] == foretold["diff"]
    assert done["diff"][0]["before"].startswith("sha-abc: absent\nproduction: absent\n")
    assert done["diff"][0]["after"].startswith(f"sha-abc: {image.digest}\nproduction: {image.digest}\n")
    for tag in ("sha-abc", "production"):
        assert_whole(client_of(b), "prod/app", tag, image.digest)

    after = b.snapshot()
    for check in (True, False):
        again = call("image_promote", check=check, **wish)
        assert not again["changed"] and again["bytes_copied"] == 0 and again["blobs"] == {"mounted": 0, "copied": 0, "present": 4}
        assert again["diff"][0]["before"] == again["diff"][0]["after"]
    assert b.snapshot() == after, "a run with nothing to do wrote something"


@both_versions
@pytest.mark.parametrize("media_type", [OCI_INDEX, DOCKER_LIST])
def test_index_travels_with_its_children(registries: Start, call: t.Callable[..., Result], media_type: str) -> None:
    a, b = registries(), registries()
    index, _children = push_index(client_of(a), "shop/app", "sha-abc", media_type)
    done = call("image_promote", source=f"{a.address}/shop/app:sha-abc", destination=f"{b.address}/app", plain_http=True)
    assert done["digest"] == index.digest and done["media_type"] == media_type
    assert done["results"][0]["platforms"] == ["linux/amd64", "linux/arm64"]
    assert_whole(client_of(b), "app", "sha-abc", index.digest)


def test_one_platform_is_its_own_image(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    _index, children = push_index(client_of(a), "shop/app", "sha-abc")
    wish = {"source": f"{a.address}/shop/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True}
    done = call("image_promote", platforms=["linux/arm64"], **wish)
    assert done["digest"] == children["arm64"].digest
    assert client_of(b).manifest("app", children["amd64"].digest) is None
    assert_whole(client_of(b), "app", "sha-abc", children["arm64"].digest)
    assert_refused(call("image_promote", platforms=["linux/s390x"], **wish), "config", "image is for amd64, arm64, hosts are s390x")


@both_versions
def test_mount_in_one_registry_sends_no_byte(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    index, _children = push_index(client_of(a), "shop/app", "sha-abc")
    done = call("image_promote", source=f"{a.address}/shop/app:sha-abc", destination=f"{a.address}/prod/app", plain_http=True)
    assert done["blobs"] == {"mounted": 4, "copied": 0, "present": 0} and done["bytes_copied"] == 0
    assert_whole(client_of(a), "prod/app", "sha-abc", index.digest)


def test_a_mount_of_a_blob_that_is_gone_is_not_believed(registries: Start, call: t.Callable[..., Result]) -> None:
    # With descriptors in memory the registry says 201 to the mount, though the file is no more.
    a = registries(cache=True)
    image = push_image(client_of(a), "shop/app", "sha-abc", [b"layer" * 100])
    a.blob_file(image.blobs[1].digest).unlink()
    result = call("image_promote", source=f"{a.address}/shop/app:sha-abc", destination=f"{a.address}/prod/app", plain_http=True)
    assert_refused(result, "transport", image.blobs[1].digest)
    assert client_of(a).manifest("prod/app", "sha-abc") is None


def test_tag_to_tag_of_a_broken_image_is_refused(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    image = push_image(client_of(a), "app", "sha-abc", [b"layer" * 100])
    a.blob_file(image.blobs[1].digest).unlink()
    result = call("image_promote", source=f"{a.address}/app:sha-abc", destination=f"{a.address}/app:production", plain_http=True)
    assert_refused(result, "transport", image.blobs[1].digest, "push it again")
    assert client_of(a).manifest("app", "production") is None


@both_versions
def test_tag_to_tag_moves_and_is_read_back(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    client = client_of(a)
    old = push_image(client, "shop/app", "production", [b"old"])
    new = push_image(client, "shop/app", "sha-new", [b"new"])
    done = call("image_promote", source=f"{a.address}/shop/app:sha-new", destination=f"{a.address}/shop/app:production", plain_http=True)
    assert done["changed"] and done["bytes_copied"] == 0 and done["results"][0]["manifests"] == 0
    assert done["diff"][0]["before"] == f"production: {old.digest}\n"
    assert_whole(client, "shop/app", "production", new.digest)


def test_an_immutable_tag_is_never_moved(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    new = push_image(client_of(a), "app", "sha-abc", [b"new"])
    old = push_image(client_of(b), "app", "sha-abc", [b"old"])
    before = b.snapshot()
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True}
    for check in (True, False):
        assert_refused(call("image_promote", check=check, **wish), "policy", old.digest, new.digest, "immutable")
    assert b.snapshot() == before
    assert call("image_promote", immutable_tags=[], **wish)["changed"]


def test_a_refusal_for_one_image_leaves_the_others_untouched(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    push_image(client_of(a), "one", "sha-abc", [b"one"])
    two = push_image(client_of(a), "two", "sha-abc", [b"two"])
    before = b.snapshot()
    images = [{"source": f"{a.address}/{name}:sha-abc", "destination": f"{b.address}/{name}"} for name in ("one", "two")]
    images[0]["expected_digest"] = two.digest
    assert_refused(call("image_promote", images=images, plain_http=True), "policy", two.digest, "expected")
    assert b.snapshot() == before
    del images[0]["expected_digest"]
    done = call("image_promote", images=images, plain_http=True)
    assert [entry["changed"] for entry in done["results"]] == [True, True] and "digest" not in done
    assert_whole(client_of(b), "two", "sha-abc", two.digest)


def test_layers_shared_by_images_of_one_task_travel_once(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    base = os.urandom(100_000)
    for name in ("app", "migrator"):
        push_image(client_of(a), name, "sha-abc", [base, name.encode()])
    images = [{"source": f"{a.address}/{name}:sha-abc", "destination": f"{b.address}/{name}"} for name in ("app", "migrator")]
    done = call("image_promote", images=images, plain_http=True)
    # Config and base are the same blobs in both images.
    assert done["blobs"] == {"mounted": 2, "copied": 4, "present": 0}
    assert 100_000 < done["bytes_copied"] < 110_000


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("harm", ["gone", "unlinked"])
def test_a_destination_with_a_missing_blob_is_repaired(registries: Start, call: t.Callable[..., Result], harm: str, cache: bool) -> None:
    a, b = registries(), registries(cache=cache)
    image = push_image(client_of(a), "app", "sha-abc", [os.urandom(50_000), b"small"])
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True}
    call("image_promote", **wish)
    layer = image.blobs[1]
    path = b.blob_file(layer.digest) if harm == "gone" else b.blob_link("app", layer.digest)
    path.unlink()
    foretold = call("image_promote", check=True, **wish)
    if harm == "unlinked" and cache:
        # The registry still serves it from the file it remembers, so nothing is missing for anybody who pulls.
        assert not foretold["changed"]
        return
    assert foretold["changed"] and not path.exists()
    done = call("image_promote", **wish)
    assert done["changed"] and done["blobs"]["copied"] == 1 and done["diff"][0]["before"].endswith("blobs missing: 1\n")
    assert_whole(client_of(b), "app", "sha-abc", image.digest)
    assert not call("image_promote", **wish)["changed"]


@both_versions
def test_a_missing_child_of_an_index_is_repaired(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    index, children = push_index(client_of(a), "app", "sha-abc")
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True}
    call("image_promote", **wish)
    client = client_of(b)
    assert client.request("DELETE", f"/v2/app/manifests/{children['arm64'].digest}", []).status == 202
    done = call("image_promote", **wish)
    assert done["changed"] and done["results"][0]["manifests"] == 1
    assert_whole(client, "app", "sha-abc", index.digest)


@both_versions
def test_a_truncated_blob_at_the_destination_is_not_believed(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    image = push_image(client_of(a), "app", "sha-abc", [os.urandom(50_000)])
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True}
    call("image_promote", **wish)
    path = b.blob_file(image.blobs[1].digest)
    path.write_bytes(path.read_bytes()[:1000])
    # The registry keeps the file it has, so the truth is a refusal and not a repair.
    assert_refused(call("image_promote", **wish), "transport", image.blobs[1].digest, "damaged")


# -- how much is looked at -----------------------------------------------------------------------------------------


def requests_of(registry: Registry, action: t.Callable[[], t.Any]) -> list[str]:
    """What ``action`` asks of ``registry``, as its access log tells it: method and path, in order."""
    log = registry.directory / "log"

    def lines() -> list[str]:
        return re.findall(r'"((?:GET|HEAD|PUT|POST|PATCH|DELETE) /v2/\S*) HTTP', log.read_text(errors="replace"))

    before = len(lines())
    action()
    # The line of an answer may come after the answer; that of this question comes after all of them.
    mark = f"/v2/mark/manifests/{os.urandom(8).hex()}"
    client_of(registry).request("GET", mark, [])
    while not lines()[-1].endswith(mark):
        time.sleep(0.01)
    return [line for line in lines()[before:] if not line.endswith(mark)]


def test_nothing_to_do_is_one_request(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    index, children = push_index(client_of(a), "app", "sha-abc")
    wish = {"source": f"{a.address}/app@{index.digest}", "destination": f"{b.address}/app:sha-abc", "plain_http": True}
    call("image_promote", **wish)
    seen: dict[str, Result] = {}

    def run(**more: t.Any) -> None:
        seen["result"] = call("image_promote", **{**wish, "verify": "tag", **more})

    asked_of_a: list[str] = []
    asked_of_b = requests_of(b, lambda: asked_of_a.extend(requests_of(a, run)))
    assert asked_of_b == ["GET /v2/app/manifests/sha-abc"] and asked_of_a == []
    assert not seen["result"]["changed"] and seen["result"]["digest"] == index.digest and seen["result"]["media_type"] == OCI_INDEX
    assert seen["result"]["results"][0]["platforms"] == ["linux/amd64", "linux/arm64"]

    # By tag the source is asked what the tag names today, and nothing more; by HEAD, which no registry counts as a pull.
    asked_of_b = requests_of(b, lambda: asked_of_a.extend(requests_of(a, lambda: run(source=f"{a.address}/app:sha-abc"))))
    assert asked_of_a == ["HEAD /v2/app/manifests/sha-abc"] and asked_of_b == ["GET /v2/app/manifests/sha-abc"]
    assert not seen["result"]["changed"]
    run(source=f"{a.address}/app:sha-abc", expected_digest=children["amd64"].digest)
    assert_refused(seen["result"], "policy", index.digest)
    # A tag that is not right yet is not believed for the sake of one that is.
    run(extra_tags=["production"])
    assert seen["result"]["changed"]
    assert_whole(client_of(b), "app", "production", index.digest)


def test_a_deep_look_with_nothing_to_do_asks_each_question_once(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    index, children = push_index(client_of(a), "app", "sha-abc")
    record = attach(client_of(a), "app", index.descriptor(), RECORD_TYPE, b"{}")
    stored = client_of(a).manifest("app", record)
    assert stored is not None
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True}
    call("image_promote", **wish)
    seen: dict[str, Result] = {}
    asked_of_a: list[str] = []
    asked_of_b = requests_of(b, lambda: asked_of_a.extend(requests_of(a, lambda: seen.update(result=call("image_promote", **wish)))))
    assert not seen["result"]["changed"]
    lists = ["GET /v2/app/tags/list?n=1000", f"GET /v2/app/manifests/{digest_tag(index.digest)}"]
    # Without an API each asks once whether there is one, more often only side by side.
    asked_of_a, asked_of_b = ([line for line in asked if "/referrers/" not in line] for asked in (asked_of_a, asked_of_b))
    # Equal digests are equal bytes: what the destination has need not be read from the source, too.
    assert sorted(asked_of_a) == sorted([*lists, "HEAD /v2/app/manifests/sha-abc"])
    below = [f"manifests/{manifest.digest}" for manifest in (*children.values(), stored)]
    below += {f"blobs/{blob.digest}" for manifest in (*children.values(), stored) for blob in manifest.blobs}
    assert sorted(asked_of_b) == sorted([*lists, "GET /v2/app/manifests/sha-abc", *(f"GET /v2/app/{what}" for what in below)])


class Rounds:
    """Lets requests pass in rounds of these sizes only: whoever asks one after the other waits in vain. Before a registry as ``change``."""

    def __init__(self, *sizes: int) -> None:
        self.left = list(sizes)
        self.seen: list[str] = []
        self._waiting = 0
        self._turn = threading.Condition()

    def __call__(self, data: bytes) -> bytes:
        request = re.match(rb"[A-Z]+ /\S*", data)
        if request:
            with self._turn:
                self.seen.append(request.group().decode())
                if not self.left:
                    raise OSError("one more than all rounds have")
                self._waiting += 1
                if self._waiting == self.left[0]:
                    self.left.pop(0)
                    self._waiting = 0
                    self._turn.notify_all()
                else:
                    rounds = len(self.left)
                    if not self._turn.wait_for(lambda: len(self.left) < rounds, 30):
                        raise OSError("the others of this round do not come")
        return data


@pytest.fixture
def in_rounds(call: t.Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> t.Iterator[t.Callable[..., Result]]:
    # How long a round takes is no part of these tests.
    monkeypatch.setattr(transfer, "_FRESH", 1000.0)
    proxies: list[CuttingProxy] = []

    def run(wish: dict[str, t.Any], *sizes: int) -> Result:
        """image_promote with proxies in front of both registries; it fails unless its requests come in rounds of ``sizes``."""
        rounds = Rounds(*sizes)
        names = {name: str(wish[name]).partition("/")[::2] for name in ("source", "destination")}
        made = {address: CuttingProxy(address, 0, 0, uploads=True, change=rounds) for address, _rest in names.values()}
        proxies.extend(made.values())
        seen = call("image_promote", **{**wish, **{name: f"{made[address].address}/{rest}" for name, (address, rest) in names.items()}})
        assert not seen.get("failed"), (seen, rounds.seen)
        assert not rounds.left, (rounds.left, rounds.seen)
        return seen

    yield run
    for proxy in proxies:
        proxy.close()


def test_what_is_known_is_asked_about_in_one_round(
    registries: Start, call: t.Callable[..., Result], in_rounds: t.Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    """All questions of the deep look at once; nothing that is remembered takes the place of an answer."""
    a, b = registries(), registries()
    image = push_image(client_of(a), "app", "sha-abc", [b"one", b"two"])
    there = {"source": f"{a.address}/app@{image.digest}", "destination": f"{b.address}/app:sha-abc", "plain_http": True, "retries": 0}
    call("image_promote", **there)
    # The proxies have other names, so only a digest is known again: what tags name is told by hand.
    monkeypatch.setattr(Remembered, "named", lambda self, name: image.digest)
    # The source: its tags, and whether it lists referrers; the destination: the tag, config and two layers.
    assert not in_rounds(there, 6)["changed"]
    assert not in_rounds({**there, "source": f"{a.address}/app:sha-abc"}, 7)["changed"]

    monkeypatch.setattr(Remembered, "named", lambda self, name: "")
    # Tag to tag: the tag and three blobs; the write; what it names now.
    retag = {**there, "source": f"{a.address}/app@{image.digest}", "destination": f"{a.address}/app:production"}
    assert in_rounds(retag, 4, 1, 1)["changed"]
    # A mount: tag and digest there, tags, referrers and blobs here; three mounts; the write; what it names now.
    mount = {**retag, "destination": f"{a.address}/prod/app:sha-abc"}
    assert in_rounds(mount, 7, 3, 1, 1)["blobs"]["mounted"] == 3
    assert_whole(client_of(a), "prod/app", "sha-abc", image.digest)

    # A digest that was never seen takes a round more.
    fresh = push_image(client_of(a), "app", "sha-new", [b"one", b"three"])
    retag["source"] = f"{a.address}/app@{fresh.digest}"
    assert in_rounds(retag, 2, 3, 1, 1)["changed"]


def test_what_is_remembered_is_no_evidence(registries: Start, call: t.Callable[..., Result], tmp_path: Path) -> None:
    a, b = registries(), registries()
    push_index(client_of(a), "app", "staging")
    wish = {"source": f"{a.address}/app:staging", "destination": f"{b.address}/app", "plain_http": True}
    call("image_promote", **wish)
    folder = Path(os.environ["XDG_CACHE_HOME"]) / "selfhost-delivery" / "images"
    files = list(folder.iterdir())
    assert len(files) == 3 + 2 and {path.stat().st_mode & 0o777 for path in files} == {0o600} and folder.stat().st_mode & 0o777 == 0o700

    # The tag names another image since.
    image = push_image(client_of(a), "app", "staging", [b"another"])
    assert call("image_promote", check=True, **wish)["changed"] and list(folder.iterdir()) == files, "check mode remembers nothing"
    assert call("image_promote", **wish)["digest"] == image.digest
    assert_whole(client_of(b), "app", "staging", image.digest)
    assert not call("image_promote", **wish)["changed"]
    # Somebody moved it back at the destination, which took a layer with it.
    push_image(client_of(b), "app", "staging", [b"a third"])
    b.blob_file(image.blobs[1].digest).unlink()
    assert call("image_promote", **wish)["changed"]
    assert_whole(client_of(b), "app", "staging", image.digest)

    for content in (b"", b"[1, 2]", b"\xff", b'["application/x", "{}"]'):
        for path in folder.iterdir():
            path.write_bytes(content)
        assert not call("image_promote", **wish)["changed"]
    shutil.rmtree(folder)
    folder.write_text("not a folder")
    assert not call("image_promote", **wish)["changed"]


@pytest.mark.parametrize("verify", ["tag", "blobs"])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_an_immutable_tag_that_comes_while_we_work_is_not_moved(
    registries: Start, call: t.Callable[..., Result], monkeypatch: pytest.MonkeyPatch, verify: str, elsewhere: bool
) -> None:
    """Somebody writes the tag after it was looked at: while blobs are mounted, or copied."""
    a = registries()
    b = registries() if elsewhere else a
    push_image(client_of(a), "app", "sha-abc", [b"ours"])
    theirs: list[Manifest] = []

    def write_it(data: bytes) -> bytes:
        if data.startswith(b"POST /v2/prod/app/blobs/uploads/") and not theirs:
            theirs.append(push_image(client_of(b), "prod/app", "sha-abc", [b"theirs"]))
        return data

    # As if mounting took longer than that.
    monkeypatch.setattr(transfer, "_FRESH", -1.0 if not elsewhere else 1000.0)
    proxy = CuttingProxy(b.address, 0, 0, uploads=True, change=write_it)
    source = f"{a.address if elsewhere else proxy.address}/app:sha-abc"
    seen = call("image_promote", source=source, destination=f"{proxy.address}/prod/app", verify=verify, plain_http=True)
    proxy.close()
    assert theirs
    assert_refused(seen, "policy", "immutable", theirs[0].digest)
    assert_whole(client_of(b), "prod/app", "sha-abc", theirs[0].digest)


def test_tag_and_mount_take_three_rounds(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    image = push_image(client_of(a), "app", "sha-abc", [b"one", b"two"])
    tail = {"plain_http": True, "verify": "tag", "referrers": False, "source": f"{a.address}/app:sha-abc"}
    retag = requests_of(a, lambda: call("image_promote", destination=f"{a.address}/app:production", **tail))
    # The first two go side by side.
    assert sorted(retag[:2]) == ["GET /v2/app/manifests/production", "GET /v2/app/manifests/sha-abc"]
    assert retag[2:] == ["PUT /v2/app/manifests/production"]
    mount = requests_of(a, lambda: call("image_promote", destination=f"{a.address}/prod/app", **tail))
    assert sorted(mount[:2]) == ["GET /v2/app/manifests/sha-abc", "GET /v2/prod/app/manifests/sha-abc"]
    assert len(mount) == 6 and all(line.startswith("POST /v2/prod/app/blobs/uploads/?mount=") for line in mount[2:5])
    assert mount[5] == "PUT /v2/prod/app/manifests/sha-abc"
    for repository, tag in (("app", "production"), ("prod/app", "sha-abc")):
        assert_whole(client_of(a), repository, tag, image.digest)


@pytest.mark.parametrize("verify", ["tag", "manifests", "blobs"])
def test_what_is_looked_at_is_what_is_mended(registries: Start, call: t.Callable[..., Result], verify: str) -> None:
    a, b = registries(), registries()
    index, children = push_index(client_of(a), "app", "sha-abc")
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True}
    call("image_promote", **wish)
    client = client_of(b)
    assert client.request("DELETE", f"/v2/app/manifests/{children['arm64'].digest}", []).status == 202
    assert call("image_promote", verify=verify, **wish)["changed"] == (verify != "tag")
    call("image_promote", **wish)
    b.blob_file(children["amd64"].blobs[1].digest).unlink()
    assert call("image_promote", verify=verify, **wish)["changed"] == (verify == "blobs")
    call("image_promote", **wish)
    assert_whole(client, "app", "sha-abc", index.digest)


def test_a_layer_that_many_tags_share_is_looked_at_once(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    base = b"base" * 1000
    images = [push_image(client_of(a), "app", f"sha-{number}", [base, str(number).encode()]) for number in range(12)]
    wishes = [{"source": f"{a.address}/app:sha-{number}", "destination": f"{b.address}/app"} for number in range(12)]
    done = call("image_promote", images=wishes, plain_http=True)
    # The config is the same in all of them, too.
    assert done["blobs"]["copied"] == 2 + 12
    for number, image in enumerate(images):
        assert_whole(client_of(b), "app", f"sha-{number}", image.digest)
    asked = requests_of(b, lambda: call("image_promote", images=wishes, plain_http=True))
    assert sum(line.endswith(images[0].blobs[1].digest) for line in asked) == 1


@pytest.mark.parametrize("size", [5000, 3 * 1024 * 1024])
def test_a_corrupt_source_is_refused_and_nothing_is_tagged(registries: Start, call: t.Callable[..., Result], size: int) -> None:
    a, b = registries(), registries()
    image = push_image(client_of(a), "app", "sha-abc", [os.urandom(size), os.urandom(200)])
    path = a.blob_file(image.blobs[1].digest)
    data = bytearray(path.read_bytes())
    data[size // 2] ^= 1
    path.write_bytes(data)
    result = call(
        "image_promote", source=f"{a.address}/app:sha-abc", destination=f"{b.address}/app", extra_tags=["production"], plain_http=True
    )
    assert_refused(result, "transport", image.blobs[1].digest, "its bytes have the digest")
    client = client_of(b)
    assert client.tags("app") == frozenset()
    assert client.manifest("app", image.digest) is None
    assert not b.blob_file(image.blobs[1].digest).exists()
    if size == 5000:
        # Of a large one the registry keeps the broken upload until it purges it; a small one is known to be wrong before.
        begun = (b.directory / "log").read_text().count('"POST /v2/app/blobs/uploads/ HTTP')
        assert begun <= 2, "an upload was begun for a blob that is wrong"


def test_a_truncated_source_is_refused(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    image = push_image(client_of(a), "app", "sha-abc", [os.urandom(50_000)])
    path = a.blob_file(image.blobs[1].digest)
    path.write_bytes(path.read_bytes()[:-1])
    result = call("image_promote", source=f"{a.address}/app:sha-abc", destination=f"{b.address}/app", plain_http=True)
    assert_refused(result, "transport", "of 50000 bytes")
    assert client_of(b).tags("app") == frozenset()


def test_two_images_for_one_tag_are_refused(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    for tag in ("sha-1", "sha-2"):
        push_image(client_of(a), "app", tag, [tag.encode()])
    images = [{"source": f"{a.address}/app:{tag}", "destination": f"{a.address}/app:production"} for tag in ("sha-1", "sha-2")]
    assert_refused(call("image_promote", images=images, plain_http=True), "config", "sha-1", "sha-2", "differ")
    assert client_of(a).manifest("app", "production") is None


# -- what belongs to an image --------------------------------------------------------------------------------------


@both_versions
def test_referrers_and_signatures_travel(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    source, target = client_of(a), client_of(b)
    index, children = push_index(source, "app", "sha-abc")
    sbom = attach(source, "app", children["amd64"].descriptor(), "application/spdx+json", b"{}")
    stored = source.manifest("app", sbom)
    assert stored is not None
    proof = attach(source, "app", stored.descriptor(), "application/vnd.test.signature", b"signed")
    cosign = push_image(source, "app", digest_tag(index.digest, ".sig"), [b"signature"])
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{b.address}/prod/app", "plain_http": True}

    left = call("image_promote", referrers=False, **wish)
    assert left["changed"] and list_referrers(target, "prod/app", children["amd64"].digest) == []
    done = call("image_promote", **wish)
    assert done["changed"] and done["results"][0]["referrers"] == 3
    assert [item.digest for item in list_referrers(target, "prod/app", children["amd64"].digest, "application/spdx+json")] == [sbom]
    assert [item.digest for item in list_referrers(target, "prod/app", sbom)] == [proof]
    assert_whole(target, "prod/app", sbom, sbom)
    assert_whole(target, "prod/app", digest_tag(index.digest, ".sig"), cosign.digest)
    assert not call("image_promote", **wish)["changed"]


def test_signatures_of_the_destination_are_not_lost(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    image = push_image(client_of(a), "app", "sha-abc", [b"layer"])
    tag = digest_tag(image.digest, ".sig")
    push_image(client_of(a), "app", tag, [b"by CI"])
    wish = {"source": f"{a.address}/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True}
    call("image_promote", **wish)
    own = push_image(client_of(b), "app", tag, [b"by CI", b"by the owner of production"])
    done = call("image_promote", **wish)
    assert not done["changed"] and "signatures that the source does not have" in json.dumps(done["warnings"])
    assert_whole(client_of(b), "app", tag, own.digest)


def test_an_image_copied_to_the_fallback_tag_is_not_taken_for_a_list(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    index, _children = push_index(client_of(a), "app", "sha-abc")
    client_of(a).put_manifest("app", index, digest_tag(index.digest))
    assert list_referrers(client_of(a), "app", index.digest) == []
    assert (
        call("image_promote", source=f"{a.address}/app:sha-abc", destination=f"{b.address}/app", plain_http=True)["results"][0]["referrers"]
        == 0
    )


@both_versions
def test_records_are_attached_once_and_read_newest_first(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    images = [f"{a.address}/{name}@{push_image(client_of(a), name, 'sha-abc', [name.encode()]).digest}" for name in ("app", "migrator")]
    first = {**RECORD, "created": "2026-11-21T09:00:00Z", "phases": {"pull": 1.5}}
    before = a.snapshot()
    foretold = call("release_record", check=True, images=images, record=first, plain_http=True)
    assert foretold["changed"] and foretold["results"][0]["artifact"] is None and a.snapshot() == before
    done = call("release_record", images=images, record=first, plain_http=True)
    assert done["changed"]
    # Said again a minute later, it is still the same record.
    again = call("release_record", images=images, record={**first, "created": "2026-11-21T09:01:00Z"}, plain_http=True)
    assert not again["changed"] and [entry["artifact"] for entry in again["results"]] == [entry["artifact"] for entry in done["results"]]
    later = {**first, "result": "rolled_back", "created": "2026-11-21T10:00:00Z"}
    assert call("release_record", images=images[:1], record=later, plain_http=True)["changed"]

    read = read_records_for(images, ClientOptions(plain_http=True))
    first, later = {**first, "signer": None}, {**later, "signer": None}
    assert read == {images[0]: [later, first], images[1]: [first]}
    by_tag = f"{a.address}/app:sha-abc"
    assert read_records_for([by_tag], ClientOptions(plain_http=True)) == {by_tag: [later, first]}


def test_records_travel_with_a_promotion(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    image = push_image(client_of(a), "app", "sha-abc", [b"layer"])
    call("release_record", images=[f"{a.address}/app@{image.digest}"], record=RECORD, plain_http=True)
    call("image_promote", source=f"{a.address}/app:sha-abc", destination=f"{b.address}/prod/app", plain_http=True)
    (records,) = read_records_for([f"{b.address}/prod/app@{image.digest}"], ClientOptions(plain_http=True)).values()
    assert [record["release"] for record in records] == [RECORD["release"]]


@pytest.mark.parametrize("record, word", [({"release": "x", "result": "committed"}, "environment"), ({}, "no release")])
def test_a_record_without_its_identity_is_refused(registries: Start, call: t.Callable[..., Result], record: Result, word: str) -> None:
    a = registries()
    image = push_image(client_of(a), "app", "sha-abc", [b"layer"])
    assert_refused(call("release_record", images=[f"{a.address}/app@{image.digest}"], record=record, plain_http=True), "config", word)
    assert_refused(call("release_record", images=[f"{a.address}/app:sha-abc"], record=RECORD, plain_http=True), "config", "by digest")


def test_one_image_under_many_tags_in_one_call_does_not_stand_in_its_own_way(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    image = push_image(client_of(a), "app", "sha-abc", [b"layer"])
    images = [{"source": f"{a.address}/app:sha-abc", "destination": f"{b.address}/app:tag-{number}"} for number in range(40)]
    done = call("image_promote", images=images, plain_http=True, concurrency=8, retries=0)
    assert done.get("changed"), done
    for number in range(40):
        assert_whole(client_of(b), "app", f"tag-{number}", image.digest)


def test_no_record_of_concurrent_writers_is_lost(registries: Start) -> None:
    a = registries()
    image = push_image(client_of(a), "app", "sha-abc", [b"layer"])

    def write(number: int) -> str:
        # One client for each writer, as in separate processes.
        return attach(client_of(a), "app", image.descriptor(), RECORD_TYPE, f'{{"number":{number}}}'.encode())

    with ThreadPoolExecutor(4) as writers:
        written = set(writers.map(write, range(24)))
    assert len(written) == 24
    assert {item.digest for item in list_referrers(client_of(a), "app", image.digest)} == written


def test_an_entry_dropped_by_another_writer_is_found_and_put_back(registries: Start) -> None:
    a = registries()
    client = client_of(a)
    image = push_image(client, "app", "sha-abc", [b"layer"])
    first = attach(client, "app", image.descriptor(), RECORD_TYPE, b'{"number":1}')
    # What a tool without the merge does.
    client.put_manifest("app", fallback_index([]), digest_tag(image.digest))
    assert [item.digest for item in list_referrers(client, "app", image.digest)] == [first]
    second = attach(client, "app", image.descriptor(), RECORD_TYPE, b'{"number":2}')
    index = client.manifest("app", digest_tag(image.digest))
    assert index is not None and {child.digest for child in index.children} == {first, second}
    assert client.manifest("app", own_tag(image.digest, first)) is not None


# -- image_info ----------------------------------------------------------------------------------------------------


@both_versions
def test_info_of_images_and_indexes(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    client = client_of(a)
    index, children = push_index(client, "shop/app", "sha-abc")
    image = push_image(client, "shop/migrator", "sha-abc", [b"layer"])
    names = [f"{a.address}/shop/app:sha-abc", f"{a.address}/shop/migrator@{image.digest}"]
    result = call("image_info", images=names, platform="linux/amd64", plain_http=True)
    assert not result["changed"]
    first, second = result["images"]
    assert first == {
        "reference": names[0],
        "repository": f"{a.address}/shop/app",
        "tag": "sha-abc",
        "exists": True,
        "digest": index.digest,
        "media_type": OCI_INDEX,
        "platforms": ["linux/amd64", "linux/arm64"],
        "labels": {"revision": "abc"},
        "created": "2026-11-21T09:00:00Z",
        "size": sum(blob.size for blob in children["amd64"].blobs),
    }
    assert second["tag"] is None and second["digest"] == image.digest and second["platforms"] == ["linux/amd64"]


def test_info_refuses_an_image_for_another_platform(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    push_image(client_of(a), "app", "sha-arm", [b"layer"], arch="arm64")
    push_index(client_of(a), "app", "sha-two")
    result = call("image_info", images=[f"{a.address}/app:sha-arm"], platform="linux/amd64", plain_http=True)
    assert_refused(result, "config", "image is for arm64, hosts are amd64", f"{a.address}/app:sha-arm")
    result = call("image_info", images=[f"{a.address}/app:sha-two"], platform="linux/riscv64", plain_http=True)
    assert_refused(result, "config", "image is for amd64, arm64, hosts are riscv64")


def test_info_of_an_unknown_tag(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    push_image(client_of(a), "app", "sha-abc", [b"layer"])
    names = [f"{a.address}/app:sha-abc", f"{a.address}/app:sha-nope", f"{a.address}/nobody:sha-abc"]
    assert_refused(call("image_info", images=names[1:2], plain_http=True), "config", "has no tag sha-nope", "app")
    result = call("image_info", images=names, missing="report", plain_http=True)
    assert [entry["exists"] for entry in result["images"]] == [True, False, False]
    assert result["images"][1]["digest"] is None
    assert_refused(call("image_promote", source=names[1], destination=f"{a.address}/x", plain_http=True), "config", "has no tag sha-nope")


@both_versions
def test_info_of_all_tags_with_what_they_share_and_what_belongs_to_them(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    client = client_of(a)
    base = os.urandom(5000)
    one = push_image(client, "app", "sha-1", [base, b"one"])
    two = push_image(client, "app", "sha-2", [base, b"second"])
    index, children = push_index(client, "app", "sha-3")
    push_image(client, "app", "latest", [b"other"])
    sbom = attach(client, "app", children["arm64"].descriptor(), "application/spdx+json", b"{}", {"tool": "x"})
    stored = client.manifest("app", sbom)
    assert stored is not None
    proof = attach(client, "app", stored.descriptor(), "application/vnd.test.signature", b"signed")
    cosign = push_image(client, "app", digest_tag(index.digest, ".sig"), [b"signature"])

    names = [f"{a.address}/app", f"{a.address}/app@{one.digest}"]
    images = call("image_info", images=names, tags=["^sha-"], layers=True, referrers=True, plain_http=True)["images"]
    assert [entry["tag"] for entry in images] == ["sha-1", "sha-2", "sha-3", None]
    assert [entry["digest"] for entry in images] == [one.digest, two.digest, index.digest, one.digest]
    first, _second, third, _again = images
    assert first["shared"] == [
        {"reference": f"{a.address}/app:sha-2", "layers": 1, "size": 5000},
        {"reference": names[1], "layers": 2, "size": 5003},
    ]
    assert [entry["unique_size"] for entry in images] == [0, 6, 10000, 0]
    assert first["variants"] == [{"platform": "linux/amd64", "digest": one.digest, "size": first["size"], "layers": 2}]
    assert first["referrers"] == [] and third["shared"] == []
    assert [(entry["platform"], entry["digest"], entry["layers"]) for entry in third["variants"]] == [
        (f"linux/{arch}", children[arch].digest, 1) for arch in ("amd64", "arm64")
    ]
    assert third["total_size"] == sum(blob.size for child in children.values() for blob in child.blobs)
    expected = {
        (cosign.digest, index.digest, "application/vnd.oci.image.config.v1+json", digest_tag(index.digest, ".sig")),
        (sbom, children["arm64"].digest, "application/spdx+json", None),
        (proof, sbom, "application/vnd.test.signature", None),
    }
    assert {(item["digest"], item["subject"], item["artifact_type"], item["tag"]) for item in third["referrers"]} == expected
    assert [item["annotations"] for item in third["referrers"] if item["digest"] == sbom] == [{"tool": "x"}]

    listed = call("image_info", images=names[:1], tags=["."], plain_http=True)["images"]
    assert [entry["tag"] for entry in listed] == ["latest", "sha-1", "sha-2", "sha-3"]
    assert_refused(call("image_info", images=names[:1], tags=["("], plain_http=True), "config", "pattern", "regular expression")


# -- who may, and whom to trust ------------------------------------------------------------------------------------


def test_wrong_and_missing_credentials(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries(htpasswd=True)
    push_image(client_of(a), "app", "sha-abc", [b"layer"])
    images = [f"{a.address}/app:sha-abc"]
    wrong = call("image_info", images=images, plain_http=True, username=USERNAME, password="not the right one")
    assert_refused(wrong, "config", f"{a.address} refused the user 'ci'")
    assert "not the right one" not in wrong["msg"]
    assert_refused(call("image_info", images=images, plain_http=True), "config", "wants credentials and none were given", "docker login")
    assert call("image_info", images=images, plain_http=True, username=USERNAME, password=PASSWORD)["images"][0]["exists"]


def test_credentials_from_the_docker_config_and_its_helper(
    registries: Start, call: t.Callable[..., Result], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = registries(htpasswd=True)
    push_image(client_of(a), "app", "sha-abc", [b"layer"])
    images = [f"{a.address}/app:sha-abc"]
    config = tmp_path / "docker"
    config.mkdir()
    login = base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
    (config / "config.json").write_text(json.dumps({"auths": {f"https://{a.address}/v2/": {"auth": login}}}))
    assert call("image_info", images=images, plain_http=True, docker_config=str(config))["images"][0]["exists"]
    monkeypatch.setenv("DOCKER_CONFIG", str(config))
    assert call("image_info", images=images, plain_http=True)["images"][0]["exists"]

    helper = tmp_path / "bin" / "docker-credential-test"
    helper.parent.mkdir()
    answer = json.dumps({"ServerURL": a.address, "Username": USERNAME, "Secret": PASSWORD})
    helper.write_text(f"#!/bin/sh\nread -r server\n[ \"$1 $server\" = 'get {a.address}' ] || exit 3\necho '{answer}'\n")
    helper.chmod(helper.stat().st_mode | stat.S_IXUSR)
    (config / "config.json").write_text(json.dumps({"credHelpers": {a.address: "test"}}))
    assert_refused(call("image_info", images=images, plain_http=True), "config", "docker-credential-test", "not installed")
    monkeypatch.setenv("PATH", f"{helper.parent}:{os.environ['PATH']}")
    assert call("image_info", images=images, plain_http=True)["images"][0]["exists"]


def test_certificates(registries: Start, call: t.Callable[..., Result]) -> None:
    a, other = registries(tls=True), registries(tls=True)
    push_image(client_of(a), "app", "sha-abc", [b"layer"])
    images = [f"{a.address}/app:sha-abc"]
    assert call("image_info", images=images, ca_path=a.ca_path)["images"][0]["exists"]
    assert_refused(call("image_info", images=images, ca_path=other.ca_path), "config", "certificate is not accepted", "ca_path")
    assert_refused(call("image_info", images=images), "config", "certificate is not accepted")
    assert_refused(call("image_info", images=images, ca_path="/nowhere/ca.pem"), "config", "/nowhere/ca.pem", "does not exist")
    assert call("image_info", images=images, validate_certs=False)["images"][0]["exists"]
    assert_refused(call("image_info", images=images, plain_http=True), "config", "speaks TLS")


def test_plain_http_is_never_silent(registries: Start, call: t.Callable[..., Result]) -> None:
    a = registries()
    push_image(client_of(a), "app", "sha-abc", [b"layer"])
    assert_refused(call("image_info", images=[f"{a.address}/app:sha-abc"]), "config", "does not speak TLS", "plain_http")


def test_a_registry_that_is_down(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    push_image(client_of(a), "app", "sha-abc", [b"layer"])
    b.stop()
    result = call("image_promote", source=f"{a.address}/app:sha-abc", destination=f"{b.address}/app", plain_http=True, retries=1)
    assert_refused(result, "transport", b.address, "connection refused")
    b.start()
    assert call("image_promote", source=f"{a.address}/app:sha-abc", destination=f"{b.address}/app", plain_http=True)["changed"]


# -- a token server, for a registry that asks for one --------------------------------------------------------------


class TokenServer:
    """Signs tokens as distribution wants them, and remembers what was asked."""

    def __init__(self, directory: Path, lifetime: int) -> None:
        directory.mkdir()
        self.directory = directory
        self.lifetime = lifetime
        self.asked: list[tuple[str, list[str]]] = []
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "rsa:2048",
                "-nodes",
                "-keyout",
                "key.pem",
                "-out",
                "cert.pem",
                "-subj",
                "/CN=tokens",
                "-days",
                "2",
            ],
            cwd=directory,
            check=True,
            capture_output=True,
        )
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(parse_qs(urlsplit(self.path).query), self.headers.get("Authorization", ""))

            def do_POST(self) -> None:
                form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
                self._answer({**form, "scope": form["scope"][0].split()}, form["refresh_token"][0])

            def _answer(self, query: dict[str, list[str]], login: str) -> None:
                expected = "Basic " + base64.b64encode(f"{USERNAME}:{PASSWORD}".encode()).decode()
                good = login in (expected, "refresh me")
                outer.asked.append((self.command, query.get("scope", [])))
                body = json.dumps({"token": outer.token(query.get("scope", [])), "expires_in": outer.lifetime} if good else {}).encode()
                self.send_response(200 if good else 401)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: t.Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def config(self) -> dict[str, str]:
        realm = f"http://127.0.0.1:{self.server.server_address[1]}/token"
        return {"realm": realm, "service": "test", "issuer": "test", "rootcertbundle": str(self.directory / "cert.pem")}

    def token(self, scopes: list[str]) -> str:
        access = [dict(zip(("type", "name", "actions"), (*scope.split(":")[:2], scope.split(":")[2].split(",")))) for scope in scopes]
        certificate = "".join((self.directory / "cert.pem").read_text().splitlines()[1:-1])
        now = int(time.time())
        claims = {
            "iss": "test",
            "sub": USERNAME,
            "aud": "test",
            "exp": now + self.lifetime,
            "nbf": now - 60,
            "iat": now,
            "jti": os.urandom(4).hex(),
        }
        parts = [{"typ": "JWT", "alg": "RS256", "x5c": [certificate]}, {**claims, "access": access}]
        signed = ".".join(_base64url(json.dumps(part).encode()) for part in parts)
        signature = subprocess.run(
            ["openssl", "dgst", "-sha256", "-sign", "key.pem"], cwd=self.directory, input=signed.encode(), capture_output=True, check=True
        ).stdout
        return f"{signed}.{_base64url(signature)}"


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@pytest.fixture
def token_server(tmp_path: Path) -> t.Iterator[t.Callable[[int], TokenServer]]:
    running: list[TokenServer] = []

    def start(lifetime: int) -> TokenServer:
        running.append(TokenServer(tmp_path / "tokens", lifetime))
        return running[-1]

    yield start
    for server in running:
        server.server.shutdown()
        server.server.server_close()


@both_versions
def test_bearer_tokens_with_scopes(registries: Start, call: t.Callable[..., Result], token_server: t.Callable[[int], TokenServer]) -> None:
    tokens = token_server(300)
    a = registries(token=tokens.config)
    client = RegistryClient(a.address, ClientOptions(USERNAME, PASSWORD, plain_http=True))
    index, _children = push_index(client, "shop/app", "sha-abc")
    login = {"username": USERNAME, "password": PASSWORD}
    tokens.asked.clear()
    wish = {"source": f"{a.address}/shop/app:sha-abc", "destination": f"{a.address}/prod/app", "plain_http": True}
    done = call("image_promote", source_auth=login, destination_auth=login, **wish)
    assert done["blobs"]["mounted"] == 4, "a mount needs one token for both repositories"
    scopes = [tuple(scopes) for _method, scopes in tokens.asked]
    assert_whole(client, "prod/app", "sha-abc", index.digest)
    assert ("repository:prod/app:pull,push", "repository:shop/app:pull") in scopes
    assert len(scopes) == len(set(scopes)), "a token that is still good was asked for again"
    bad = {"username": USERNAME, "password": "wrong password"}
    assert_refused(call("image_promote", source_auth=bad, destination_auth=login, **wish), "config", "refused the user 'ci'")


def test_an_identity_token_is_exchanged_and_an_expired_token_renewed(
    registries: Start, call: t.Callable[..., Result], token_server: t.Callable[[int], TokenServer], tmp_path: Path
) -> None:
    tokens = token_server(300)
    a = registries(token=tokens.config)
    config = tmp_path / "login" / "config.json"
    config.parent.mkdir()
    config.write_text(json.dumps({"auths": {a.address: {"identitytoken": "refresh me"}}}))
    client = RegistryClient(a.address, ClientOptions(docker_config=str(config), plain_http=True))
    image = push_image(client, "app", "sha-abc", [b"layer"])
    assert {method for method, _scopes in tokens.asked} == {"POST"}
    # The registry's key changes, as after a restart with a new one: every token we hold is refused, and asked for anew.
    tokens.asked.clear()
    for name in list(client._auth._tokens):
        client._auth._tokens[name] = (tokens.token([]), time.monotonic() + 100)
    assert_whole(client, "app", "sha-abc", image.digest)
    assert tokens.asked, "no new token was asked for"


# -- connections that break ----------------------------------------------------------------------------------------


class CuttingProxy:
    """Passes bytes on to a registry, and breaks the first ``cuts`` connections after ``after`` bytes from it.

    ``how``: ``cut``, ``reset``, ``stall`` (nothing more comes, the connection stays), or what to call at that moment (then
    it is cut). ``uploads``: bytes to the registry count instead. ``change``: what to make of the bytes that pass, also before the break.
    """

    def __init__(
        self,
        address: str,
        cuts: int,
        after: int,
        how: str | t.Callable[[], object] = "cut",
        uploads: bool = False,
        change: t.Callable[[bytes], bytes] = bytes,
    ) -> None:
        self.target = address.rsplit(":", 1)
        self.cuts, self.after, self.how, self.uploads, self.change = cuts, after, how, uploads, change
        self.closed = threading.Event()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self.closed.set()
        self.listener.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _peer = self.listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection((self.target[0], int(self.target[1])))
            except OSError:
                near.close()
                continue
            threading.Thread(target=self._pump, args=(near, far, self.uploads), daemon=True).start()
            threading.Thread(target=self._pump, args=(far, near, not self.uploads), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket, watched: bool) -> None:
        passed = 0
        try:
            while True:
                data = source.recv(65536)
                if not data:
                    break
                if watched:
                    data = self.change(data)
                    passed += len(data)
                    if passed > self.after and self.cuts > 0:
                        self.cuts -= 1
                        self._break(source, sink)
                        break
                sink.sendall(data)
        except OSError:
            pass
        for end in (source, sink):
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _break(self, *ends: socket.socket) -> None:
        if self.how == "stall":
            self.closed.wait()
        elif self.how == "reset":
            for end in ends:
                end.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                end.close()
        elif callable(self.how):
            self.how()


def test_broken_connections_are_survived_within_the_budget(registries: Start, call: t.Callable[..., Result]) -> None:
    a, b = registries(), registries()
    image = push_image(client_of(a), "app", "sha-abc", [os.urandom(2_000_000)])
    proxy = CuttingProxy(a.address, cuts=2, after=500_000)
    wish = {"source": f"{proxy.address}/app:sha-abc", "destination": f"{b.address}/app", "plain_http": True}
    result = call("image_promote", **wish)
    assert_refused(result, "transport")
    assert client_of(b).tags("app") == frozenset() and proxy.cuts == 1
    done = call("image_promote", retries=2, **wish)
    assert done["changed"] and proxy.cuts == 0
    assert_whole(client_of(b), "app", "sha-abc", image.digest)
    assert [path for path in b.snapshot() if "_uploads" in path] == []
    proxy.close()


def test_put_referrers_lists_all_of_them(registries: Start) -> None:
    a = registries()
    client = client_of(a)
    image = push_image(client, "app", "sha-abc", [b"layer"])
    made = []
    for number in range(3):
        layer: Descriptor = client.push_blob("app", str(number).encode(), "text/plain")
        config = client.push_blob("app", b"{}", "application/vnd.oci.empty.v1+json")
        subject = image.descriptor().as_json()
        content = {"schemaVersion": 2, "mediaType": OCI_MANIFEST, "artifactType": "text/plain", "config": config.as_json()}
        made.append(Manifest.build({**content, "layers": [layer.as_json()], "subject": subject}))
    put_referrers(client, "app", image.digest, made)
    index = client.manifest("app", digest_tag(image.digest))
    assert index is not None and [child.digest for child in index.children] == [manifest.digest for manifest in made]
