# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The playbook that moves whole repositories: many signed images from one real registry to another; a hundred with ``MOVED_IMAGES=50``."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from registry_fixture import Registry, registries, start_registry  # noqa: F401 # pylint: disable=unused-import
from test_image_verify import Signing, signing  # noqa: F401 # pylint: disable=unused-import
from test_images import Start, client_of, no_login, push_image  # noqa: F401 # pylint: disable=unused-import

REPOSITORY = Path(__file__).resolve().parents[2]
REPOSITORIES = ("shop/app", "shop/migrator")
#: Images of each repository. Most of the time goes into signing them.
EACH = int(os.environ.get("MOVED_IMAGES") or 16)
ALL = EACH * len(REPOSITORIES)


class Outcome:
    def __init__(self, done: subprocess.CompletedProcess[str]) -> None:
        self.code, self.output = done.returncode, " ".join(done.stdout.split())


def move(source: Registry, destination: Registry, folder: Path, *options: str, **variables: object) -> Outcome:
    """Call the playbook as a user does; secrets go through a file."""
    told = {
        "move_from": source.address,
        "move_to": f"{destination.address}/mirror",
        "move_repositories": list(REPOSITORIES),
        "move_from_auth": source.options,
        "move_to_auth": destination.options,
        "ansible_python_interpreter": sys.executable,
        **variables,
    }
    given = folder / "move.yml"
    given.write_text(json.dumps(told))
    playbook = [str(Path(sys.executable).parent / "ansible-playbook"), str(REPOSITORY / "playbooks" / "move_images.yml")]
    environment = {
        **os.environ,
        "ANSIBLE_COLLECTIONS_PATH": str(REPOSITORY / ".cache" / "collections"),
        "ANSIBLE_STDOUT_CALLBACK": "selfhost.delivery.timeline",
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_LOCAL_TEMP": str(folder / "tmp"),
    }
    done = subprocess.run(
        [*playbook, "-i", "localhost,", "-c", "local", "-e", f"@{given}", *options],
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    return Outcome(done)


@pytest.mark.slow
def test_many_images_move_with_their_signatures(registries: Start, signing: Signing, tmp_path: Path) -> None:
    source, destination = registries(), registries(htpasswd=True, tls=True)
    images = [(name, f"sha-{number:03d}") for name in REPOSITORIES for number in range(EACH)]
    for name, tag in images:
        push_image(client_of(source), name, tag, [name.encode(), tag.encode()])
    reach = ["--new-bundle-format=false", "--tlog-upload=false", "--use-signing-config=false", "--allow-http-registry", "--key", "ours.key"]
    signing.cosign("sign", *reach, *(f"{source.address}/{name}:{tag}" for name, tag in images))
    keys = {"move_keys": [signing.path("ours.pub")]}

    foretold = move(source, destination, tmp_path, "--check")
    assert foretold.code == 0 and f"{ALL} tags would be at" in foretold.output, foretold.output
    counts = re.search(r"digest for digest: (.*)", foretold.output)
    assert counts is not None, foretold.output
    assert client_of(destination).tags(f"mirror/{REPOSITORIES[0]}") == frozenset()
    done = move(source, destination, tmp_path, **keys)
    assert done.code == 0 and f"{ALL} tags in 2 repositories, with {ALL} signatures" in done.output, done.output
    assert f"{ALL} signatures, attestations and records brought along" in done.output, done.output
    assert counts.group(1) in done.output, (counts.group(1), done.output)
    assert str(destination.password) not in done.output
    for name in REPOSITORIES:
        old, new = client_of(source), client_of(destination)
        tags = old.tags(name)
        assert len(tags) == 2 * EACH and new.tags(f"mirror/{name}") == tags  # the images, and the tag of each signature
        for tag in tags:
            before, after = old.manifest(name, tag), new.manifest(f"mirror/{name}", tag)
            assert before is not None and after is not None and before.body == after.body, (name, tag)
    again = move(source, destination, tmp_path)
    assert again.code == 0 and "0 blobs copied (0.0 MB)" in again.output and "0 signatures, attestations and records brought" in again.output


def test_an_image_that_nobody_signed_stops_the_move_before_it_begins(registries: Start, signing: Signing, tmp_path: Path) -> None:
    source, destination = registries(), registries()
    for name in REPOSITORIES:
        push_image(client_of(source), name, "sha-one", [name.encode()])
    refused = move(source, destination, tmp_path, move_keys=[signing.path("ours.pub")])
    assert refused.code != 0 and "it is not signed" in refused.output, refused.output
    assert client_of(destination).tags(f"mirror/{REPOSITORIES[0]}") == frozenset()


def test_a_move_without_its_variables_says_which_to_give(registries: Start, tmp_path: Path) -> None:
    source = registries()
    refused = move(source, source, tmp_path, move_repositories=[])
    assert refused.code != 0 and "Give move_from, move_to and move_repositories" in refused.output, refused.output
