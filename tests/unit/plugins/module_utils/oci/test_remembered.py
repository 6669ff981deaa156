# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is remembered of images, how much of it, and what becomes of it when somebody else wrote it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.oci import remembered
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import OCI_INDEX, OCI_MANIFEST, Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.remembered import Remembered


def image(name: str) -> Manifest:
    return Manifest.build({"schemaVersion": 2, "mediaType": OCI_MANIFEST, "layers": [], "annotations": {"name": name}})


def index(*children: Manifest) -> Manifest:
    listed = [child.descriptor().as_json() for child in children]
    return Manifest.build({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": listed})


def test_an_index_is_known_with_all_its_children_or_not_at_all(tmp_path: Path) -> None:
    memory, one, two = Remembered(str(tmp_path / "images")), image("one"), image("two")
    both, outer = index(one, two), index(index(one, two), image("three"))
    memory.note([[one, two, both]], {"r/app:main": both.digest})
    assert memory.tree(both.digest) == [one, two, both] and memory.named("r/app:main") == both.digest
    assert memory.tree(outer.digest) == [] and memory.tree("") == [] and memory.named("r/app:other") == ""
    memory.note([[one, two, both], [outer]], {"r/app:main": outer.digest})
    assert memory.named("r/app:main") == outer.digest and memory.tree(outer.digest) == [], "the child three was never seen"


def test_bytes_of_another_digest_are_not_known(tmp_path: Path) -> None:
    memory, one = Remembered(str(tmp_path)), image("one")
    memory.note([[one]], {})
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes().replace(b"one", b"two"))
    assert memory.tree(one.digest) == []


def test_the_oldest_half_is_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "_MOST", 10)
    memory, images = Remembered(str(tmp_path)), [image(str(number)) for number in range(12)]
    for number, one in enumerate(images):
        before = set(tmp_path.iterdir())
        memory.note([[one]], {})
        for path in set(tmp_path.iterdir()) - before:
            os.utime(path, (number, number))
    assert len(list(tmp_path.iterdir())) <= 10
    assert memory.tree(images[-1].digest) and not memory.tree(images[0].digest)


def test_a_folder_that_cannot_be_made_is_empty(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    memory = Remembered(str(tmp_path / "file" / "images"))
    memory.note([[image("one")]], {"r/app:main": "sha256:0"})
    assert memory.tree(image("one").digest) == [] and memory.named("r/app:main") == ""
