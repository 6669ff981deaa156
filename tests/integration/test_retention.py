# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""image_retention against real registries: what goes, what stays whole, and what a garbage collection then frees."""

from __future__ import annotations

import copy
import datetime
import json
import os
import shutil
import typing as t
from pathlib import Path

import pytest
from registry_fixture import Registry, programs, registries  # noqa: F401 # pylint: disable=unused-import
from test_images import (  # noqa: F401 # pylint: disable=unused-import
    RECORD,
    Result,
    Start,
    TokenServer,
    assert_refused,
    assert_whole,
    call,
    client_of,
    no_login,
    token_server,
)

from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import OCI_INDEX, OCI_MANIFEST, Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import attach_record, read_records_for
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_of, digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import attach, fallback_index, list_referrers
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.retention import WORKLIST_TAG
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transport import Response

Call = t.Callable[..., Result]
TODAY = datetime.datetime.now(datetime.timezone.utc)
RULES = [{"pattern": "^sha-", "keep": 2, "younger_than": 3}, {"pattern": "^(main|fix)-", "keep": 1}]


@pytest.fixture(params=programs(), ids=lambda path: Path(path).name)
def program(request: pytest.FixtureRequest) -> str:
    """Each registry program that this machine has."""
    return str(request.param)


# -- a repository with history -------------------------------------------------------------------------------------


def push(client: RegistryClient, repository: str, tag: str | None, layers: t.Sequence[bytes], age: float, arch: str = "amd64") -> Manifest:
    """An image that was built ``age`` days ago."""
    built = TODAY - datetime.timedelta(days=age)
    config = {"architecture": arch, "os": "linux", "created": built.strftime("%Y-%m-%dT%H:%M:%S.123456789Z"), "config": {}}
    content = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": client.push_blob(repository, json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json").as_json(),
        "layers": [client.push_blob(repository, layer, "application/vnd.oci.image.layer.v1.tar").as_json() for layer in layers],
    }
    manifest = Manifest.build(content)
    client.put_manifest(repository, manifest, tag)
    return manifest


def push_list(client: RegistryClient, repository: str, tag: str, children: t.Mapping[str, Manifest]) -> Manifest:
    listed = [{**child.descriptor().as_json(), "platform": {"os": "linux", "architecture": arch}} for arch, child in children.items()]
    index = Manifest.build({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed})
    client.put_manifest(repository, index, tag)
    return index


class Shop:
    """A repository in which something of each kind may go, and something of each kind stays.

    Goes: ``sha-1``; the index ``sha-2`` with one platform, its signature, and the SBOM of that platform with its own signature; ``main-1``.
    Stays: ``sha-3``, which staging ran; ``sha-4``, which is also ``production``; ``sha-5`` by its digest; the index ``sha-6``, which shares
    a platform with ``sha-2``; ``sha-7``; ``main-2``; ``fix-1``; ``latest``.
    """

    STAYS = ("sha-3", "sha-4", "production", "sha-5", "sha-6", "sha-7", "main-2", "fix-1", "latest")
    GOES = ("sha-1", "sha-2", "main-1")

    def __init__(self, registry: Registry, repository: str = "shop/app") -> None:
        self.registry = registry
        self.repository = repository
        self.name = f"{registry.address}/{repository}"
        self.client = client_of(registry)
        client, base = self.client, b"the base of all" * 1000
        self.images = {
            tag: push(client, repository, tag, [base, f"{repository} {tag}".encode() * 500], age)
            for tag, age in (("sha-1", 20), ("sha-3", 18), ("sha-4", 17), ("sha-5", 16), ("sha-7", 5), ("latest", 30))
        }
        self.images.update(
            {tag: push(client, repository, tag, [base, tag.encode()], age) for tag, age in (("main-1", 4), ("main-2", 3), ("fix-1", 90))}
        )
        shared = push(client, repository, None, [base, b"arm64" * 900], 19, "arm64")
        self.alone = push(client, repository, None, [base, b"amd64, old" * 900], 19)
        self.images["sha-2"] = push_list(client, repository, "sha-2", {"amd64": self.alone, "arm64": shared})
        newer = push(client, repository, None, [base, b"amd64, new" * 900], 15)
        self.images["sha-6"] = push_list(client, repository, "sha-6", {"amd64": newer, "arm64": shared})
        client.put_manifest(repository, self.images["sha-4"], "production")
        self.images["production"] = self.images["sha-4"]
        self.sbom = self.attach(self.alone, "application/spdx+json", b'{"of": "what goes"}' * 50)
        self.proof = self.attach(self.sbom, "application/vnd.test.signature", b"signed, and goes")
        self.kept_sbom = self.attach(shared, "application/spdx+json", b'{"of": "what stays"}' * 50)
        self.signature = push(client, repository, digest_tag(self.images["sha-2"].digest, ".sig"), [b"signature that goes"], 1)
        self.kept_signature = push(client, repository, digest_tag(self.images["sha-6"].digest, ".sig"), [b"signature that stays"], 1)
        self.record = self.attach(self.images["sha-3"], "", b"", record=True)

    def attach(self, subject: Manifest, kind: str, payload: bytes, record: bool = False) -> Manifest:
        if record:
            digest = attach_record(self.client, self.repository, subject.descriptor(), {**RECORD, "created": "2026-11-21T09:00:00Z"})
        else:
            digest = attach(self.client, self.repository, subject.descriptor(), kind, payload)
        found = self.client.manifest(self.repository, digest)
        assert found is not None
        return found

    def copy(self, repository: str) -> Shop:
        """The same in another repository, copied on the registry's disk."""
        other = copy.copy(self)
        other.repository, other.name = repository, f"{self.registry.address}/{repository}"
        root = self.registry.storage / "docker/registry/v2/repositories"
        shutil.copytree(root / self.repository, root / repository)
        return other

    @property
    def wish(self) -> dict[str, t.Any]:
        kept = self.images["sha-5"].digest
        return {"repositories": [self.name], "rules": RULES, "keep_digests": [kept], **self.registry.options}

    @property
    def condemned(self) -> set[str]:
        """Digests of all manifests that go; where there is no referrers API, the lists of referrers too."""
        manifests = [self.images[tag] for tag in self.GOES] + [self.alone, self.sbom, self.proof, self.signature]
        return {manifest.digest for manifest in manifests} | (set() if self.client.referrers_api else self.lists)

    @property
    def lists(self) -> set[str]:
        subjects = [(self.alone, self.sbom), (self.sbom, self.proof)]
        return {fallback_index([referrer.referrer_descriptor()]).digest for _subject, referrer in subjects}

    def tags(self) -> set[str]:
        return set(self.client.tags(self.repository) or ())

    def present(self, digests: t.Iterable[str]) -> set[str]:
        return {digest for digest in digests if self.client.manifest(self.repository, digest)}

    def assert_all_tags_whole(self) -> None:
        for tag in self.tags() - {WORKLIST_TAG}:
            manifest = self.client.manifest(self.repository, tag)
            assert manifest is not None, tag
            assert_whole(self.client, self.repository, tag, manifest.digest)

    def assert_kept(self) -> None:
        for tag in self.STAYS:
            assert_whole(self.client, self.repository, tag, self.images[tag].digest)
        shared = self.images["sha-6"].children[1].digest
        assert [item.digest for item in list_referrers(self.client, self.repository, shared)] == [self.kept_sbom.digest]
        assert [item.digest for item in list_referrers(self.client, self.repository, self.images["sha-3"].digest)] == [self.record.digest]
        for manifest in (self.kept_sbom, self.record, self.kept_signature):
            assert_whole(self.client, self.repository, manifest.digest, manifest.digest)


# -- what goes and what stays --------------------------------------------------------------------------------------


def test_plan_deletion_and_collection_agree_and_what_stays_can_be_promoted(registries: Start, call: Call, program: str) -> None:
    a, b = registries(program=program, cache=True), registries(program=program)
    shop = Shop(a)
    before, disk = a.snapshot(), a.disk()

    foretold = call("image_retention", check=True, **shop.wish)
    assert foretold["changed"] and a.snapshot() == before, "check mode wrote something"
    assert {entry["digest"] for entry in foretold["deleted"]} == shop.condemned
    reasons = {entry["tag"]: entry["reason"] for entry in foretold["kept"]}
    assert set(reasons) == set(Shop.STAYS)
    assert reasons["sha-3"] == "staging ran it (release 20261121-090000-sha-abc)"
    assert reasons["sha-4"] == "names the same image as production"
    assert reasons["sha-5"] == "named in keep_digests"
    assert reasons["fix-1"] == "one of the last 1 of ^(main|fix)- (fix)"

    done = call("image_retention", **shop.wish)
    for name in ("changed", "kept", "deleted", "bytes", "repositories", "diff"):
        assert done[name] == foretold[name], name
    assert shop.present(shop.condemned) == set()
    assert not shop.tags() & {*Shop.GOES, WORKLIST_TAG, digest_tag(shop.images["sha-2"].digest, ".sig")}
    shop.assert_kept()
    shop.assert_all_tags_whole()
    after = a.snapshot()
    again = call("image_retention", **shop.wish)
    assert not again["changed"] and again["bytes"] == 0 and again["deleted"] == [] and a.snapshot() == after

    a.collect()
    left = a.disk()
    assert sum(disk.values()) - sum(left.values()) == foretold["bytes"]
    assert foretold["repositories"] == [{"repository": shop.name, "kept": 9, "deleted": len(shop.condemned), "bytes": foretold["bytes"]}]
    assert not shop.condemned & set(left)
    unique = {blob.digest for image in (shop.images["sha-1"], shop.alone, shop.sbom) for blob in image.blobs[1:]}
    assert unique & set(left) == {shop.images["sha-1"].blobs[1].digest}, "of these only the base is needed by others"

    images = [{"source": f"{shop.name}:{tag}", "destination": f"{b.address}/app"} for tag in Shop.STAYS]
    promoted = call("image_promote", images=images, plain_http=True)
    assert promoted.get("changed"), promoted
    target = client_of(b)
    for tag in Shop.STAYS:
        assert_whole(target, "app", tag, shop.images[tag].digest)
    assert_whole(target, "app", digest_tag(shop.images["sha-6"].digest, ".sig"), shop.kept_signature.digest)
    assert_whole(target, "app", shop.kept_sbom.digest, shop.kept_sbom.digest)


def test_repositories_that_share_layers_count_them_once(registries: Start, call: Call) -> None:
    a = registries()
    client = client_of(a)
    both, one, stays = os.urandom(5000), os.urandom(700), os.urandom(300)
    for repository, layers in (("one", [both, one, stays]), ("two", [both])):
        push(client, repository, "sha-1", layers, 20)
        push(client, repository, "sha-2", [stays if repository == "two" else b"another"], 1)
    disk = sum(a.disk().values())
    wish = {"repositories": [f"{a.address}/one", f"{a.address}/two"], "rules": [{"pattern": "^sha-", "keep": 1}], "plain_http": True}
    done = call("image_retention", **wish)
    first, second = done["repositories"]
    assert first["bytes"] > 5700 and second["bytes"] < 1000
    a.collect()
    assert disk - sum(a.disk().values()) == done["bytes"] == first["bytes"] + second["bytes"]


def test_a_tag_alone_goes_where_the_registry_can_and_is_left_where_not(registries: Start, call: Call, program: str) -> None:
    a = registries(program=program)
    client = client_of(a)
    part = push(client, "app", "sha-amd64", [b"amd64"], 20)
    index = push_list(client, "app", "v1", {"amd64": part})
    push(client, "app", "sha-new", [b"new"], 1)
    can = client.delete_manifest("app", "no-such-tag") != "unsupported"
    assert can == (Path(program).name == "registry"), "version 2 cannot, version 3 can"
    wish = {"repositories": [f"{a.address}/app"], "rules": [{"pattern": "^sha-", "keep": 1}], "plain_http": True}
    for check in (True, False):
        done = call("image_retention", check=check, **wish)
        assert done["changed"] is can and done["bytes"] == 0
        assert [entry["what"] for entry in done["deleted"]] == (["tag"] if can else [])
        told = {entry["tag"]: entry["reason"] for entry in done["kept"]}
        assert set(told) == {"v1", "sha-new"} | (set() if can else {"sha-amd64"})
        assert can or "cannot delete a tag alone" in told["sha-amd64"]
    assert client.tags("app") == {"v1", "sha-new"} | (set() if can else {"sha-amd64"})
    assert_whole(client, "app", "v1", index.digest)
    assert not call("image_retention", **wish)["changed"]


def test_signatures_of_images_that_are_gone_go_when_asked_for(registries: Start, call: Call) -> None:
    a = registries()
    client = client_of(a)
    gone, there = digest_of(b"an image that is gone"), push(client, "app", None, [b"there without a tag"], 50)
    for digest in (gone, there.digest):
        push(client, "app", digest_tag(digest, ".sig"), [digest.encode()], 50)
    push(client, "app", "sha-1", [b"layer"], 1)
    wish = {"repositories": [f"{a.address}/app"], "rules": [{"pattern": ".", "keep": 1}], "plain_http": True}
    left = call("image_retention", **wish)
    assert not left["changed"] and {entry["tag"] for entry in left["kept"]} == {"sha-1", digest_tag(gone, ".sig")}
    done = call("image_retention", orphans=True, **wish)
    assert [(entry["tags"], entry["what"]) for entry in done["deleted"]] == [([digest_tag(gone, ".sig")], "orphan")]
    assert client.tags("app") == {"sha-1", digest_tag(there.digest, ".sig")}


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"rules": []}, "there are none"),
        ({"rules": [{"pattern": "^sha-", "keep": 0}]}, "keeps none"),
        ({"repositories": []}, "there are none"),
        ({"repositories": ["127.0.0.1:1/app:sha-1"]}, "has a tag or a digest"),
        ({"keep_digests": ["sha-1"]}, "is not a digest"),
    ],
)
def test_requests_that_are_refused(call: Call, changes: dict[str, t.Any], words: str) -> None:
    wish = {"repositories": ["127.0.0.1:1/app"], "rules": RULES, "plain_http": True}
    assert_refused(call("image_retention", **{**wish, **changes}), "config", words)


@pytest.mark.parametrize("storage", [{"delete": {"enabled": False}}, {"maintenance": {"readonly": {"enabled": True}}}])
def test_a_registry_that_does_not_delete_says_so_before_anything_is_deleted(
    registries: Start, call: Call, program: str, storage: dict[str, t.Any]
) -> None:
    a = registries(program=program)
    push(client_of(a), "app", "sha-1", [b"old"], 20)
    push(client_of(a), "app", "sha-2", [b"new"], 1)
    a.reconfigure(**storage)
    before = a.snapshot()
    wish = {"repositories": [f"{a.address}/app"], "rules": [{"pattern": "^sha-", "keep": 1}], "plain_http": True}
    for check in (True, False):
        assert_refused(call("image_retention", check=check, **wish), "config", "does not delete; nothing was deleted", "registry_delete")
    assert a.snapshot() == before


def test_a_registry_with_tokens_is_asked_for_the_right_to_delete(
    registries: Start, call: Call, token_server: t.Callable[[int], TokenServer]
) -> None:
    tokens = token_server(300)
    a = registries(token=tokens.config)
    login = {"username": "ci", "password": "correct horse battery", "plain_http": True}
    client = RegistryClient(a.address, ClientOptions(**login))
    push(client, "app", "sha-1", [b"old"], 20)
    push(client, "app", "sha-2", [b"new"], 1)
    done = call("image_retention", repositories=[f"{a.address}/app"], rules=[{"pattern": "^sha-", "keep": 1}], **login)
    assert done["changed"] and client.tags("app") == {"sha-2"}
    assert ["repository:app:delete"] in [scopes for _method, scopes in tokens.asked]


# -- while others push, and when it is cut short -------------------------------------------------------------------


class Killed(BaseException):
    """What stands for a kill: nothing catches it."""


@pytest.fixture
def on_write(monkeypatch: pytest.MonkeyPatch) -> t.Callable[[t.Callable[[str, str], None]], None]:
    """Calls a function with method and path before each request that changes something."""

    def install(hook: t.Callable[[str, str], None]) -> None:
        send = RegistryClient.request

        def request(self: RegistryClient, method: str, path: str, *arguments: t.Any, **named: t.Any) -> Response:
            if method not in ("GET", "HEAD"):
                hook(method, path)
            return send(self, method, path, *arguments, **named)

        monkeypatch.setattr(RegistryClient, "request", request)

    return install


def test_a_kill_at_any_moment_breaks_nothing_and_the_next_run_ends_it(
    registries: Start, call: Call, on_write: t.Callable[..., None]
) -> None:
    a = registries()
    step = {"left": -1, "seen": 0}

    def kill(_method: str, _path: str) -> None:
        step["seen"] += 1
        if step["seen"] == step["left"] + 1:
            raise Killed

    on_write(kill)
    made, number = Shop(a), 0
    condemned = made.condemned
    stays = {tag for tag in made.tags() for named in (made.client.manifest(made.repository, tag),) if named and named.digest not in condemned}
    while True:
        shop = made.copy(f"shop/app{number}")
        step.update(left=number, seen=0)
        try:
            call("image_retention", **shop.wish)
            break
        except Killed:
            pass
        step["left"] = -1
        shop.assert_all_tags_whole()
        done = call("image_retention", **shop.wish)
        assert done["changed"], number
        assert shop.present(condemned) == set(), number
        assert shop.tags() == stays, number
        number += 1
    shop.assert_kept()
    # Question, list (two blobs of two requests, a manifest), each manifest, the list again.
    assert number >= len(condemned) + 4


def at_deletion(number: int, on_write: t.Callable[..., None], act: t.Callable[[], None]) -> None:
    """``act`` happens at the ``number``-th request for a deletion; the first asks whether the registry deletes, before anything goes."""
    waiting = [act, *[lambda: None] * number]

    def hook(method: str, _path: str) -> None:
        if method == "DELETE" and waiting:
            waiting.pop()()

    on_write(hook)


@pytest.mark.parametrize("what", ["promoted", "moved", "moved late", "released", "signed", "used"])
def test_what_changes_between_plan_and_deletion_is_left(registries: Start, call: Call, on_write: t.Callable[..., None], what: str) -> None:
    a = registries()
    shop = Shop(a)
    client, repository, old = shop.client, shop.repository, shop.images["sha-2"]

    def promoted() -> None:
        client.put_manifest(repository, old, "production")

    def moved() -> None:
        client.put_manifest(repository, shop.images["sha-7"], "sha-2")

    def released() -> None:
        call("release_record", images=[f"{shop.name}@{old.digest}"], record=RECORD, plain_http=True)

    def signed() -> None:
        push(client, repository, digest_tag(old.digest, ".att"), [b"attestation"], 1)

    def used() -> None:
        push_list(client, repository, "v1", {"amd64": shop.alone})

    acts = {"promoted": promoted, "moved": moved, "moved late": moved, "released": released, "signed": signed, "used": used}
    # Late: sha-1 goes first, and the repository was read a moment ago.
    at_deletion(1 if what == "moved late" else 0, on_write, acts[what])
    done = call("image_retention", **shop.wish)
    assert done["changed"]
    deleted = {entry["digest"] for entry in done["deleted"]}
    if what == "used":
        assert old.digest in deleted and not deleted & {shop.alone.digest, shop.sbom.digest, shop.proof.digest}
        assert {"v1"} <= shop.tags()
    else:
        assert not deleted & {old.digest, shop.alone.digest, shop.sbom.digest, shop.proof.digest, shop.signature.digest}
        told = next(entry["reason"] for entry in done["kept"] if entry["tag"] == "sha-2")
        assert told.startswith("since the plan: "), told
        assert_whole(client, repository, old.digest, old.digest)
        assert_whole(client, repository, digest_tag(old.digest, ".sig"), shop.signature.digest)
    assert shop.images["sha-1"].digest in deleted
    assert [item.digest for item in list_referrers(client, repository, shop.alone.digest)] == [shop.sbom.digest]
    assert WORKLIST_TAG not in shop.tags()
    shop.assert_all_tags_whole()
    if what == "released":
        (records,) = read_records_for([f"{shop.name}@{old.digest}"], ClientOptions(plain_http=True)).values()
        assert len(records) == 1


def test_an_index_that_lost_its_tag_since_the_plan_keeps_its_parts(registries: Start, call: Call, on_write: t.Callable[..., None]) -> None:
    a = registries()
    client = client_of(a)
    index = push_list(client, "app", "sha-1", {"amd64": push(client, "app", None, [b"old"], 20)})
    new = push(client, "app", "sha-2", [b"new"], 1)
    at_deletion(0, on_write, lambda: t.cast(None, client.put_manifest("app", new, "sha-1")))
    wish = {"repositories": [f"{a.address}/app"], "rules": [{"pattern": "^sha-", "keep": 1}], "plain_http": True}
    assert not call("image_retention", **wish)["deleted"]
    assert_whole(client, "app", index.digest, index.digest)
    assert client.tags("app") == {"sha-1", "sha-2"}


def test_deletion_switched_off_midway_is_one_message_and_the_next_run_goes_on(
    registries: Start, call: Call, on_write: t.Callable[..., None]
) -> None:
    a = registries()
    shop = Shop(a)
    deletions: list[str] = []

    def hook(method: str, path: str) -> None:
        if method == "DELETE":
            deletions.append(path)
            if len(deletions) == 4:
                a.reconfigure(maintenance={"readonly": {"enabled": True}})

    on_write(hook)
    assert_refused(call("image_retention", **shop.wish), "transport", "2 of", "Run again afterwards")
    a.reconfigure(maintenance={})
    assert call("image_retention", **shop.wish)["changed"]
    assert shop.present(shop.condemned) == set()
    shop.assert_kept()
