# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""References, manifests, options and wishes: what is read, and what is refused with which words."""

from __future__ import annotations

import json
import typing as t

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import (
    OCI_INDEX,
    OCI_MANIFEST,
    Descriptor,
    Manifest,
    check_platform,
    platform_matches,
    platform_name,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions, client_options_from
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import check_record
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import Reference, digest_of, digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import (
    fallback_index,
    is_fallback_index,
    merge_entries,
    own_tag,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transfer import Outcome, Rules, Wish, choose_children

A = "sha256:" + "a" * 64
B = "sha256:" + "b" * 64


@pytest.mark.parametrize(
    "text, registry, repository, tag, digest",
    [
        ("registry.example.com/shop/app:sha-abc", "registry.example.com", "shop/app", "sha-abc", None),
        ("registry.example.com:5000/app", "registry.example.com:5000", "app", None, None),
        ("localhost/app:1", "localhost", "app", "1", None),
        ("localhost:5000/a/b/c@" + A, "localhost:5000", "a/b/c", None, A),
        ("127.0.0.1:5000/app:x@" + A, "127.0.0.1:5000", "app", "x", A),
        ("[::1]:5000/app:x", "[::1]:5000", "app", "x", None),
        ("nginx", "docker.io", "library/nginx", None, None),
        ("nginx:1.27", "docker.io", "library/nginx", "1.27", None),
        ("grafana/grafana", "docker.io", "grafana/grafana", None, None),
        ("index.docker.io/nginx", "docker.io", "library/nginx", None, None),
        ("docker.io/grafana/grafana:11", "docker.io", "grafana/grafana", "11", None),
        ("r.example/a__b/c-d.e_f", "r.example", "a__b/c-d.e_f", None, None),
        (" r.example/app:x\n", "r.example", "app", "x", None),
    ],
)
def test_references_that_are_read(text: str, registry: str, repository: str, tag: str | None, digest: str | None) -> None:
    assert Reference.parse(text) == Reference(registry, repository, tag, digest)


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "it is empty"),
        ("https://r.example/app", "starts with https://"),
        ("r.example/", "has no repository"),
        ("r.example/App:x", "'App'"),
        ("r.example/App:x", "lower case"),
        ("r.example/a//b", "'' cannot be part"),
        ("r.example/a_-b", "'a_-b'"),
        ("r.example/app:", "'' is not a tag"),
        ("r.example/app:.x", "'.x' is not a tag"),
        ("r.example/app:" + "x" * 129, "is not a tag"),
        ("r.example/app:a b", "'a b' is not a tag"),
        ("r.example/app@sha256:abc", "'sha256:abc' is not a digest"),
        ("r.example/app@sha256:" + "A" * 64, "is not a digest"),
        ("r.example/app@md5:" + "a" * 32, "is not a digest"),
        ("r.example/app@", "'' is not a digest"),
        ("r.example:99999/app", "'r.example:99999' is not a host"),
        ("r.example:/app", "'r.example:' is not a host"),
        ("user@r.example/app", "is not a digest"),
        ("r.example/" + "a" * 256, "longer than 255"),
    ],
)
def test_references_that_are_refused(text: str, words: str) -> None:
    with pytest.raises(DeliveryError) as caught:
        Reference.parse(text)
    assert words in caught.value.message and caught.value.failure_class == "config"
    assert repr(text.strip()) in caught.value.message


def test_reference_prints_what_it_read() -> None:
    for text in ("r.example:5000/a/b:x@" + A, "r.example/a", "docker.io/library/nginx:1"):
        assert str(Reference.parse(text)) == text
    assert Reference.parse("r.example/a:x@" + A).version == A
    assert Reference.parse("r.example/a:x").version == "x"
    assert Reference.parse("r.example/a").version == "latest"


@pytest.mark.parametrize(
    "source, destination, extra, expected, tags, wanted",
    [
        ("r/a:x", "p.example/a", [], None, ("x",), None),
        ("r/a:x", "p.example/a:y", ["production"], None, ("y", "production"), None),
        ("r/a:x", "p.example/a:production", ["production"], None, ("production",), None),
        ("r/a@" + A, "p.example/a", [], None, (), None),
        ("r/a:x@" + A, "p.example/a", [], None, ("x",), None),
        ("r/a:x", "p.example/a@" + A, [], None, (), A),
        ("r/a:x", "p.example/a:x@" + A, [], A, ("x",), A),
    ],
)
def test_wishes(source: str, destination: str, extra: list[str], expected: str | None, tags: tuple[str, ...], wanted: str | None) -> None:
    wish = Wish.parse(source, destination, extra, expected)
    assert wish.tags == tags and wish.expected_digest == wanted


@pytest.mark.parametrize(
    "source, destination, extra, expected, words",
    [
        ("r/a", "p.example/a", [], None, "neither tag nor digest"),
        ("r/a:x", "p.example/a", ["no good"], None, "'no good' is not a tag"),
        ("r/a:x", "p.example/a", [], "sha256:1", "not a digest"),
        ("r/a:x", "p.example/a@" + A, [], B, "not the expected_digest"),
    ],
)
def test_wishes_that_are_refused(source: str, destination: str, extra: list[str], expected: str | None, words: str) -> None:
    with pytest.raises(DeliveryError, match=words):
        Wish.parse(source, destination, extra, expected)


def test_rules_and_outcomes() -> None:
    rules = Rules(immutable_tags=("^sha-", "^v[0-9]+$"))
    assert [rules.immutable(tag) for tag in ("sha-1", "v12", "v12-rc", "production")] == [True, True, False, False]
    outcome = Outcome(Wish.parse("r/a:x", "p.example/a:x", ["y"]), digest=A, tags_before={"x": A, "y": None})
    assert outcome.changed and outcome.diff()["before"] == f"x: {A}\ny: absent\n" and outcome.diff()["after"] == f"x: {A}\ny: {A}\n"
    outcome.tags_before["y"] = A
    assert not outcome.changed
    outcome.referrers = 1
    assert outcome.changed and outcome.diff()["before"] != outcome.diff()["after"]


# -- manifests -----------------------------------------------------------------------------------------------------


def manifest(content: t.Any, digest: str | None = None, content_type: str = "") -> Manifest:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return Manifest.parse(body, digest, content_type, "r/a:x")


def test_a_manifest_is_its_bytes() -> None:
    body = b'{ "schemaVersion": 2, "config": {"digest": "' + A.encode() + b'", "size": 2}, "layers": [] }'
    found = manifest(body, digest_of(body), OCI_MANIFEST + "; charset=utf-8")
    assert found.body == body and found.digest == digest_of(body) and found.media_type == OCI_MANIFEST
    assert manifest(body, digest_of(body, "sha512")).digest.startswith("sha512:")
    with pytest.raises(DeliveryError, match=f"have the digest {digest_of(body)}, not {A}"):
        manifest(body, A)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"<html>", "not a manifest"),
        ([1], "not a manifest"),
        ({"schemaVersion": 1}, "schema 1"),
        ({"schemaVersion": 2, "manifests": [], "layers": []}, "an index and an image at once"),
    ],
)
def test_manifests_that_are_refused(content: t.Any, words: str) -> None:
    with pytest.raises(DeliveryError, match=words):
        manifest(content)


def test_blobs_are_listed_once_and_foreign_layers_not_at_all() -> None:
    layer = {"mediaType": "x", "digest": B, "size": 1}
    foreign = {
        "mediaType": "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "digest": "sha256:" + "c" * 64,
        "size": 9,
        "urls": ["x"],
    }
    found = manifest({"schemaVersion": 2, "config": {"mediaType": "c", "digest": A, "size": 2}, "layers": [layer, layer, foreign]})
    assert [blob.digest for blob in found.blobs] == [A, B]
    with pytest.raises(DeliveryError, match="without digest or size"):
        assert manifest({"schemaVersion": 2, "layers": [{"digest": B}]}).blobs


def test_platforms() -> None:
    assert platform_name({"os": "linux", "architecture": "arm", "variant": "v7"}) == "linux/arm/v7"
    assert platform_name({"os": "unknown", "architecture": "unknown"}) is None and platform_name(None) is None
    assert platform_matches("linux/arm64", "linux/arm64/v8") and platform_matches("linux/arm64/v8", "linux/arm64")
    assert not platform_matches("linux/arm/v6", "linux/arm/v7") and not platform_matches("linux/amd64", "linux/arm64")
    assert not platform_matches("linux/amd64", None)
    assert check_platform("linux/amd64") == "linux/amd64"
    for text in ("amd64", "linux/", "a/b/c/d"):
        with pytest.raises(DeliveryError, match="os/architecture"):
            check_platform(text)


def child(digest: str, architecture: str, attests: str = "") -> Descriptor:
    raw: dict[str, t.Any] = {"platform": {"os": "linux", "architecture": architecture}}
    if attests:
        raw["annotations"] = {"vnd.docker.reference.digest": attests}
    return Descriptor(OCI_MANIFEST, digest, 1, raw)


def test_children_are_chosen_with_their_attestations() -> None:
    reference = Reference.parse("r.example/a:x")
    children = [child(A, "amd64"), child(B, "arm64"), child("sha256:1", "unknown", A), child("sha256:2", "unknown", B)]
    assert choose_children(reference, children, ["linux/arm64"]) == [children[1], children[3]]
    assert choose_children(reference, children, ["linux/arm64", "linux/amd64"]) == children
    with pytest.raises(DeliveryError, match="image is for amd64, arm64, hosts are riscv64"):
        choose_children(reference, children, ["linux/riscv64"])


# -- referrers and records -----------------------------------------------------------------------------------------


def test_merging_keeps_what_is_there_and_adds_what_is_new() -> None:
    there = [{"digest": A, "annotations": {"by": "them"}}, {"digest": B}]
    merged = merge_entries(there, [{"digest": A, "annotations": {"by": "us"}}, {"digest": "sha256:c"}])
    assert list(merged) == [A, B, "sha256:c"] and merged[A] == there[0]
    assert merge_entries([], []) == {}
    assert fallback_index(merge_entries(there, there).values()).digest == fallback_index(there).digest


def test_the_fallback_tag_is_a_list_only_if_it_is_not_the_image() -> None:
    index = Manifest.build({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": []})
    image = Manifest.build({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": []})
    assert is_fallback_index(index, A)
    assert not is_fallback_index(index, index.digest) and not is_fallback_index(image, A)


def test_tags_that_belong_to_a_digest_are_tags() -> None:
    assert digest_tag(A) == "sha256-" + "a" * 64 and digest_tag(A, ".sig") == "sha256-" + "a" * 64 + ".sig"
    for digest in (A, "sha512:" + "a" * 128):
        for tag in (digest_tag(digest), digest_tag(digest, ".sbom"), own_tag(digest, B)):
            assert Reference.parse(f"r.example/a:{tag}").tag == tag


def test_records() -> None:
    record = {"environment": "staging", "release": "1", "result": "committed"}
    assert check_record({**record, "created": "then"})["created"] == "then"
    assert check_record({**record, "ended": "later"})["created"] == "later"
    assert check_record(record)["created"].endswith("Z") and "created" not in record
    for key in record:
        with pytest.raises(DeliveryError, match=f"it has no {key}"):
            check_record({**record, key: ""})


# -- options -------------------------------------------------------------------------------------------------------


def test_options_of_a_side_win_over_the_modules_own() -> None:
    params = {
        "ca_path": "/ca",
        "plain_http": False,
        "retries": 5,
        "validate_certs": True,
        "docker_config": None,
        "source_auth": {"username": "u", "password": "p", "token": None, "plain_http": True, "ca_path": None},
        "destination_auth": None,
    }
    assert client_options_from(params, "source_") == ClientOptions("u", "p", ca_path="/ca", plain_http=True, retries=5)
    assert client_options_from(params, "destination_") == ClientOptions(ca_path="/ca", retries=5)
    assert client_options_from({"username": "u", "password": "p"}) == ClientOptions("u", "p")


@pytest.mark.parametrize(
    "values", [{"username": "u"}, {"username": "u", "password": "p", "token": "t"}, {"concurrency": 0}, {"retries": -1}, {"timeout": 0}]
)
def test_options_that_mean_nothing_are_refused(values: dict[str, t.Any]) -> None:
    with pytest.raises(DeliveryError, match="read the registry options"):
        client_options_from(values)


def test_options_never_show_their_secrets() -> None:
    assert "hunter2" not in repr(ClientOptions("u", "hunter2")) + repr(ClientOptions(token="hunter2"))
