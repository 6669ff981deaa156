# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The registry role's garbage collection, run for real: what it frees, and what it breaks for nobody."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import threading
import typing as t
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import yaml
from edge_fixture import eventually
from registry_fixture import registries  # noqa: F401 # pylint: disable=unused-import
from test_host_roles import PREFIX, PUSH, Registry, begin, free_port, needs, registry  # noqa: F401 # pylint: disable=unused-import

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import OCI_INDEX, OCI_MANIFEST, Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transfer import Rules, Wish, promote
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transport import Interrupted

#: Where the process that collects is noted.
NOTE = Path(f"/run/{PREFIX}-collection.pid")


def push_image(client: RegistryClient, repository: str, tag: str, *layers: bytes) -> Manifest:
    kinds = ("application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.layer.v1.tar")
    config = client.push_blob(repository, json.dumps({"os": "linux", "architecture": "amd64", "tag": tag}).encode(), kinds[0])
    listed = [client.push_blob(repository, layer, kinds[1]).as_json() for layer in layers]
    image = Manifest.build({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": config.as_json(), "layers": listed})
    client.put_manifest(repository, image, tag)
    return image


def assert_whole(client: RegistryClient, repository: str, tag: str) -> None:
    """Read an image, each byte checked."""
    image = client.manifest(repository, tag)
    assert image is not None, tag
    for blob in image.blobs:
        assert len(client.read_blob(repository, blob)) == blob.size


def test_registry_collects_beside_pulls_and_breaks_no_promotion(registry: Registry, registries: t.Callable[..., t.Any]) -> None:
    client, build = registry.client(), registries()
    plain, login = ClientOptions(plain_http=True, retries=0), registry.client().options
    layers = [bytes([number]) * 20_000 for number in range(8)]
    old = push_image(client, "team/app", "sha-old", *layers)
    push_image(client, "team/app", "sha-new", layers[0], b"of the new one")
    push_image(client, "team/source", "sha-old", b"not in the repository that is collected")
    assert registry.takes_pushes() and list(registry.home.glob("data/docker/registry/v2/repositories/uploads/_uploads/*"))
    assert client.delete_manifest("team/app", old.digest) == "deleted"
    pid, before = registry.pid, registry.disk()
    assert registry.run("--check", tasks_from="collect").ok().changed == 1
    assert (registry.pid, registry.disk()) == (pid, before)

    # While it collects, images are promoted that are made of what is being deleted, and others are pulled.
    stop, promoted, refused, pulled = threading.Event(), [], [], 0

    def promote_one(number: int) -> None:
        wish = Wish.parse(f"{build.address}/app:push-{number}", f"{registry.reference}/team/app")
        promote([wish], Rules(), plain, login)

    def promote_many() -> None:
        number = 0
        while not stop.wait(0.1):
            number += 1
            push_image(RegistryClient(build.address, plain), "app", f"push-{number}", *layers, str(number).encode())
            try:
                promote_one(number)
                promoted.append(number)
            except DeliveryError as exc:
                refused.append((number, exc))

    def pull() -> None:
        nonlocal pulled
        while not stop.wait(0.1):
            try:
                assert_whole(registry.client(), "team/app", "sha-new")
                pulled += 1
            except Interrupted:
                pass  # the moment of a restart

    with ThreadPoolExecutor(2) as others:
        tasks = [others.submit(promote_many), others.submit(pull)]
        try:
            run = registry.run(tasks_from="collect").ok()
        finally:
            stop.set()
        for task in tasks:
            task.result()
    assert run.changed > 0 and registry.pid != pid
    assert pulled and promoted and any(exc.details.get("status") == 405 for _number, exc in refused), refused
    assert all("read-only" in exc.message or isinstance(exc, Interrupted) for _number, exc in refused), refused
    assert not list(registry.home.glob("data/docker/registry/v2/repositories/uploads/_uploads/*"))
    client = registry.client()
    for number in promoted:
        assert_whole(client, "team/app", f"push-{number}")
    for number, _exc in refused:
        assert client.manifest("team/app", f"push-{number}") is None
        promote_one(number)
        assert_whole(client, "team/app", f"push-{number}")
    assert_whole(client, "team/app", "sha-new")
    assert_whole(client, "team/source", "sha-old")


def kill_while_it_collects(registry: Registry, **changes: t.Any) -> None:
    """Begin a collection, and kill the run with all it started once pushes are refused."""
    with begin("registry", registry.variables(**changes), tasks_from="collect", folder=registry.folder) as killed:
        try:
            while True:
                try:
                    if not registry.takes_pushes():
                        break
                except Interrupted:
                    pass  # the moment of the restart
                assert killed.poll() is None
        finally:
            os.killpg(killed.pid, signal.SIGKILL)


def stand_in_for_a_collection(registry: Registry) -> subprocess.Popen[bytes]:
    """A collection that goes on: another process of the same program that does not end by itself."""
    settings = yaml.safe_load((registry.home / "collecting.yml").read_text())
    settings["http"]["addr"] = f"127.0.0.1:{free_port()}"
    (registry.folder / "outlived.yml").write_text(json.dumps(settings))
    command = ["docker-registry", "serve", str(registry.folder / "outlived.yml")]
    outlived = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    NOTE.write_text(f"{outlived.pid}\n")
    return outlived


def test_registry_is_brought_back_after_a_collection_that_was_killed(registry: Registry) -> None:
    client = registry.client()
    old = push_image(client, "team/killed", "sha-old", b"what is needed by nobody either")
    client.delete_manifest("team/killed", old.digest)
    kill_while_it_collects(registry)
    assert not registry.takes_pushes()
    outlived = stand_in_for_a_collection(registry)
    try:
        metrics = f"127.0.0.1:{free_port()}"
        # What it refuses it refuses after that: version 2 would delete parts of indexes that have a tag.
        wish = {"registry_metrics_address": metrics, "registry_collect_untagged": True}
        registry.run(tasks_from="collect", **wish).failed_with("is not version 3")
        assert outlived.wait(30) is not None
    finally:
        outlived.kill()
        outlived.wait()
    assert registry.takes_pushes()
    assert not NOTE.exists() and not (registry.home / "collecting.yml").exists()
    with urllib.request.urlopen(f"http://{metrics}/metrics", timeout=10) as answer:
        assert b"registry_http_requests_total" in answer.read()


def test_registry_that_no_run_comes_back_to_takes_pushes_again_by_itself(registry: Registry) -> None:
    client, log = registry.client(), registry.home / "guard.log"
    old = push_image(client, "team/left", "sha-old", b"what is left over")
    client.delete_manifest("team/left", old.digest)
    kill_while_it_collects(registry, registry_collect_grace=10)
    outlived = stand_in_for_a_collection(registry)
    try:
        # Longer than that the guard waits for the collection, however long it takes.
        eventually(lambda: "is waited for" in log.read_text(), "the guard to see the collection")
        assert not registry.takes_pushes()
    finally:
        outlived.kill()
        outlived.wait()
    eventually(lambda: "takes pushes again" in log.read_text(), "the guard to act")
    eventually(lambda: registry.status("ci", PUSH) == "200", "an answer of the registry")
    assert registry.takes_pushes()
    assert not (registry.home / "collecting.yml").exists() and not NOTE.exists()
    # It left nothing to mend.
    pid = registry.pid
    assert registry.run().ok().changed == 0 and registry.pid == pid


def test_registry_frees_what_nobody_needs_and_forgets_it(registry: Registry) -> None:
    client = registry.client()
    old = push_image(client, "team/freed", "sha-old", b"what is needed by nobody" * 1000)
    kept = push_image(client, "team/freed", "sha-new", b"what is needed")
    (layer,) = old.blobs[1:]
    assert client.request("HEAD", f"/v2/team/freed/blobs/{layer.digest}", []).status == 200
    client.delete_manifest("team/freed", old.digest)
    before = registry.disk()
    run = registry.run("-vv", tasks_from="collect").ok()
    freed = before - registry.disk()
    assert freed >= len(old.body) + layer.size and f'"registry_collected_bytes": {freed}' in run.output, run.output
    client = registry.client()
    # The memory of the registry that took the push would say 200.
    assert client.request("HEAD", f"/v2/team/freed/blobs/{layer.digest}", []).status == 404
    assert client.probe_blob("team/freed", kept.blobs[1]) == "present"
    assert registry.takes_pushes()
    pid = registry.pid
    assert registry.run(tasks_from="collect").ok().changed == 0
    assert registry.pid == pid


def test_registry_version_3_collects_what_has_no_tag(tmp_path: Path) -> None:
    needs("registry")
    made = Registry(tmp_path, free_port())
    wish = {"registry_program": shutil.which("registry"), "registry_metrics_address": f"127.0.0.1:{free_port()}"}
    try:
        made.run(**wish).ok()
        client = made.client()
        moved = push_image(client, "app", "staging", b"what staging named before")
        push_image(client, "app", "staging", b"what it names now")
        part = push_image(client, "app", "part", b"part of an index")
        index = Manifest.build({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": [part.descriptor().as_json()]})
        client.put_manifest("app", index, "v1")
        assert client.delete_manifest("app", "part") == "deleted"
        run = made.run("-vv", tasks_from="collect", registry_collect_untagged=True, **wish).ok()
        assert f'"registry_collected_bytes": {len(moved.body) + sum(blob.size for blob in moved.blobs[1:])}' in run.output, run.output
        client = made.client()
        assert client.manifest("app", moved.digest) is None
        assert client.manifest("app", "v1") is not None
        for version in (part.digest, "staging"):
            assert_whole(client, "app", version)
        assert made.takes_pushes()
    finally:
        made.run(tasks_from="stopped", **wish)
