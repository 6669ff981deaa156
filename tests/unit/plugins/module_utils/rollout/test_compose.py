# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What is said to the docker program, and how its answers are read; the program is a script that plays it."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout import compose as compose_module
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.compose import MARKER, Compose, end_leftovers, parse_version


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder first on PATH; write a ``docker`` there with ``play``. No plugin is found beside it."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setattr(compose_module, "PLUGIN_FOLDERS", ())
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "config"))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return folder


def play(folder: Path, script: str) -> None:
    path = folder / "docker"
    path.write_text(f"#!/bin/sh\necho \"$@\" >> {folder}/asked\n{script}\n")
    path.chmod(0o755)


def asked(folder: Path) -> list[str]:
    return (folder / "asked").read_text().splitlines()


def project(tmp_path: Path, docker_config: str = "") -> Compose:
    env = tmp_path / "deploy.env"
    env.write_text("# pins\nAPP_IMAGE=r/app@sha256:1\n")
    return Compose("/opt/shop", "shop", ["/a.yaml", "/b.yaml"], [str(env)], "/run/d.sock", "shop/r1", docker_config)


def test_versions() -> None:
    assert parse_version("v2.40.3-desktop.1") == (2, 40) and parse_version("2.20.2+ds1-0ubuntu1") == (2, 20)
    assert parse_version("dev") is None


def test_the_plugin_itself_is_started_where_the_docker_program_would_find_it(docker: Path, tmp_path: Path) -> None:
    play(docker, "echo 2.20.0")
    plugin = tmp_path / "config" / "cli-plugins" / "docker-compose"
    plugin.parent.mkdir(parents=True)
    plugin.write_text(f"#!/bin/sh\necho \"$DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND: $@\" >> {docker}/told\necho 2.30.0\n")
    assert project(tmp_path).version() == "2.20.0" and project(tmp_path).identity == "", "it cannot be started"
    plugin.chmod(0o755)
    found = project(tmp_path)
    assert found.version() == "2.30.0" and str(plugin) in found.identity
    assert (docker / "told").read_text() == "docker: compose version --short\n"
    (tmp_path / "config" / "config.json").write_text('{"cliPluginsExtraDirs": ["/opt/plugins"]}')
    assert project(tmp_path).version() == "2.20.0", "folders that come first were named"


def test_an_old_compose_is_refused_and_an_unnamed_one_is_told(docker: Path, tmp_path: Path) -> None:
    play(docker, "echo 2.19.1")
    with pytest.raises(DeliveryError, match="2.19.1"):
        project(tmp_path).version()
    play(docker, "echo dev")
    assert project(tmp_path).version() == "dev"
    play(docker, "echo \"docker: 'compose' is not a docker command.\" >&2; exit 1")
    with pytest.raises(DeliveryError, match="not a docker command"):
        project(tmp_path).version()


def test_the_pinned_image_wins_over_the_environment(docker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("APP_IMAGE", "r/app:evil")
    monkeypatch.setenv("COMPOSE_FILE", "/other.yaml")
    play(docker, 'printf \'{"services": {}, "x": ["%s", "%s", "%s"]}\' "$APP_IMAGE" "$COMPOSE_FILE" "$DOCKER_HOST"')
    model, warnings = project(tmp_path).model()
    assert model["x"] == ["r/app@sha256:1", "", "unix:///run/d.sock"] and warnings == []
    assert asked(docker) == [
        "compose --ansi never --project-directory /opt/shop --project-name shop -f /a.yaml -f /b.yaml "
        f"--env-file {tmp_path}/deploy.env --profile * config --format json"
    ]


def test_what_compose_warns_and_why_it_refuses(docker: Path, tmp_path: Path) -> None:
    play(docker, """echo 'time="x" level=warning msg="The \\\\"FOO\\\\" variable is not set."' >&2; echo '{}'""")
    assert project(tmp_path).model() == ({}, ['The "FOO" variable is not set.'])
    play(docker, "echo 'validating /b.yaml: services.web additional properties imge' >&2; exit 15")
    with pytest.raises(DeliveryError, match="validating /b.yaml"):
        project(tmp_path).model()


def test_create_makes_and_starts_nothing(docker: Path, tmp_path: Path) -> None:
    play(docker, "exit 0")
    project(tmp_path).create({"web": 2, "worker": 1})
    wanted = "up --no-start --no-deps --no-recreate --no-build --pull never --scale web=2 --scale worker=1 web worker"
    assert asked(docker)[0].endswith(wanted)
    play(docker, "echo 'no such image' >&2; exit 1")
    with pytest.raises(DeliveryError, match="no such image"):
        project(tmp_path).create({"web": 2})


def test_a_network_that_would_be_made_again_is_seen(docker: Path, tmp_path: Path) -> None:
    said = "DRY-RUN MODE -  Container shop-web-1  Stopping\\nDRY-RUN MODE -  Network shop_default  Removed"
    play(docker, f"printf '{said}\\n' >&2; cat > {docker}/stdin")
    assert project(tmp_path).shared_changes({"web": 2}, "sha256:1") == ["shop_default"]
    assert (docker / "stdin").read_text() == '{"services": {"web": {"image": "sha256:1"}}}'


@pytest.mark.parametrize(
    ("said", "failure_class", "tries"),
    [
        ("unauthorized: authentication required", "config", 1),
        ("manifest unknown", "config", 1),
        ("write /x: no space left on device", "capacity", 1),
        ("dial tcp 10.0.0.1:443: connect: connection refused", "transport", 3),
    ],
)
def test_only_what_may_pass_is_tried_again(docker: Path, tmp_path: Path, said: str, failure_class: str, tries: int) -> None:
    play(docker, f"echo '{said}' >&2; exit 1")
    pauses: list[float] = []
    with pytest.raises(DeliveryError) as error:
        project(tmp_path).pull("r/app@sha256:1", pauses.append)
    assert error.value.failure_class == failure_class and said in error.value.message and "r/app@sha256:1" in error.value.message
    assert len(asked(docker)) == tries and len(pauses) == tries - 1


def test_a_pull_uses_the_login_of_the_app(docker: Path, tmp_path: Path) -> None:
    play(docker, f"echo $DOCKER_CONFIG > {docker}/config")
    project(tmp_path, "/opt/shop/.docker").pull("r/app@sha256:1")
    assert (docker / "config").read_text().strip() == "/opt/shop/.docker"


def test_only_programs_of_this_release_are_ended() -> None:
    marked = f"shop/{os.getpid()}"
    ours = subprocess.Popen(["sleep", "60"], env={**os.environ, MARKER: marked})
    deaf = subprocess.Popen(["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"], env={**os.environ, MARKER: marked})
    other = subprocess.Popen(["sleep", "60"], env={**os.environ, MARKER: marked + "0"})
    try:
        while len(compose_module._marked(f"{MARKER}={marked}".encode())) < 2:
            time.sleep(0.01)
        ended = end_leftovers(marked, timeout=0.3)
        assert {ours.pid, deaf.pid} <= set(ended)
        assert ours.wait(5) and deaf.wait(5) and other.poll() is None
        assert end_leftovers(marked) == []
    finally:
        for process in (ours, deaf, other):
            process.kill()
            process.wait()
