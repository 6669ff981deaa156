# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What belongs to an image in a registry that has the referrers API: zot, where it is on PATH. Distribution has no such API."""

from __future__ import annotations

import typing as t
from pathlib import Path

import pytest
from registry_fixture import Zot, registries, start_zot  # noqa: F401 # pylint: disable=unused-import
from test_images import (  # noqa: F401 # pylint: disable=unused-import
    RECORD,
    Result,
    Start,
    assert_whole,
    call,
    client_of,
    no_login,
    push_image,
    push_index,
)
from test_retention import Shop

from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import RECORD_TYPE, read_records
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import attach, list_api, list_referrers

Call = t.Callable[..., Result]


@pytest.fixture
def zot(tmp_path: Path) -> t.Iterator[Zot]:
    registry = start_zot(tmp_path / "zot")
    yield registry
    registry.stop()


def listed(registry: Zot, repository: str, digest: str) -> set[str]:
    """What the registry itself lists, without any fallback."""
    entries = list_api(client_of(registry), repository, digest)
    assert entries is not None, "it has no referrers API"
    return {entry["digest"] for entry in entries}


def test_referrers_travel_there_and_back_and_leave_no_fallback_tag(zot: Zot, registries: Start, call: Call) -> None:
    a, c = registries(), registries()
    source, target = client_of(a), client_of(zot)
    index, children = push_index(source, "app", "sha-abc")
    sbom = attach(source, "app", children["amd64"].descriptor(), "application/spdx+json", b"{}")
    stored = source.manifest("app", sbom)
    assert stored is not None
    proof = attach(source, "app", stored.descriptor(), "application/vnd.test.signature", b"signed")
    cosign = push_image(source, "app", digest_tag(index.digest, ".sig"), [b"signature"])
    there = {"source": f"{a.address}/app:sha-abc", "destination": f"{zot.address}/prod/app", "plain_http": True}

    done = call("image_promote", **there)
    assert done.get("changed") and done["results"][0]["referrers"] == 3, done
    assert_whole(target, "prod/app", "sha-abc", index.digest)
    assert listed(zot, "prod/app", children["amd64"].digest) == {sbom} and listed(zot, "prod/app", sbom) == {proof}
    assert target.tags("prod/app") == {"sha-abc", digest_tag(index.digest, ".sig")}
    assert not call("image_promote", **there)["changed"]

    late = attach(source, "app", index.descriptor(), "application/vnd.test.late", b"attached since")
    done = call("image_promote", **there)
    assert done["changed"] and done["results"][0]["referrers"] == 1 and listed(zot, "prod/app", index.digest) == {late}

    # From repository to repository of it, and to one without the API, which needs the fallback again.
    mounted = call("image_promote", source=f"{zot.address}/prod/app:sha-abc", destination=f"{zot.address}/other", plain_http=True)
    assert mounted.get("changed") and mounted["results"][0]["referrers"] == 4, mounted
    assert listed(zot, "other", sbom) == {proof}
    back = {"source": f"{zot.address}/other:sha-abc", "destination": f"{c.address}/app", "plain_http": True}
    assert call("image_promote", **back)["results"][0]["referrers"] == 4
    for digest, expected in ((index.digest, late), (children["amd64"].digest, sbom), (sbom, proof)):
        assert [item.digest for item in list_referrers(client_of(c), "app", digest)] == [expected]
    assert_whole(client_of(c), "app", digest_tag(index.digest, ".sig"), cosign.digest)
    assert not call("image_promote", **back)["changed"]

    found = call("image_info", images=[f"{zot.address}/other:sha-abc"], referrers=True, plain_http=True)["images"][0]["referrers"]
    assert {(item["digest"], item["subject"]) for item in found} == {
        (late, index.digest),
        (sbom, children["amd64"].digest),
        (proof, sbom),
        (cosign.digest, index.digest),
    }
    assert {item["artifact_type"] for item in found} >= {"application/spdx+json", "application/vnd.test.late"}


def test_release_records(zot: Zot, registries: Start, call: Call) -> None:
    a = registries()
    client = client_of(zot)
    image = push_image(client, "app", "sha-abc", [b"layer"])
    wish = {"images": [f"{zot.address}/app@{image.digest}"], "record": RECORD, "plain_http": True}
    first = call("release_record", **wish)
    assert first.get("changed"), first
    assert not call("release_record", **wish)["changed"]
    assert call("release_record", **{**wish, "record": {**RECORD, "release": "20261121-100000-sha-abc"}})["changed"]
    assert client.tags("app") == {"sha-abc"} and len(listed(zot, "app", image.digest)) == 2
    call("image_promote", source=f"{zot.address}/app:sha-abc", destination=f"{a.address}/app", plain_http=True)
    for side in (client, client_of(a)):
        releases = [record["release"] for record in read_records(side, "app", image.digest)]
        assert sorted(releases) == [RECORD["release"], "20261121-100000-sha-abc"], releases
        assert {item.artifact_type for item in list_referrers(side, "app", image.digest)} == {RECORD_TYPE}


def test_retention_keeps_referrers_with_their_image_and_deletes_them_with_it(zot: Zot, call: Call) -> None:
    shop = Shop(zot)
    assert shop.client.referrers_api
    assert not [tag for tag in shop.tags() if tag.startswith("sha256-") and not tag.endswith(".sig")]
    foretold = call("image_retention", check=True, **shop.wish)
    assert {entry["digest"] for entry in foretold["deleted"]} == shop.condemned, foretold
    reasons = {entry["tag"]: entry["reason"] for entry in foretold["kept"]}
    assert set(reasons) == set(Shop.STAYS) and reasons["sha-3"] == "staging ran it (release 20261121-090000-sha-abc)"
    done = call("image_retention", **shop.wish)
    for name in ("changed", "kept", "deleted", "bytes"):
        assert done[name] == foretold[name], name
    assert shop.present(shop.condemned) == set()
    shop.assert_kept()
    shop.assert_all_tags_whole()
    again = call("image_retention", **shop.wish)
    assert not again["changed"] and again["deleted"] == [] and again["bytes"] == 0
