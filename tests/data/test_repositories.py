# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Repositories: their password, their policies, who may write, and places other than a directory."""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import typing as t
from pathlib import Path

import pytest
from snapshot_fixture import ENGINES, MARKS, PASSWORD, PREFIX, Store, until

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

pytestmark = MARKS
NEW = "an$other 's3cr3t"


class Folder(Store):
    """A directory and a repository; nothing of Docker's is in it."""

    def __init__(self, root: Path, kind: str) -> None:
        super().__init__(root, kind, f"{PREFIX}-{root.name}")
        self.place = root / "app" / "data"
        self.place.mkdir()
        (self.place / "one").write_bytes(os.urandom(100_000))

    def take(self, set_id: str = "one", **more: t.Any) -> dict[str, t.Any]:
        return self.call("snapshot", set_id=set_id, paths=[str(self.place)], **more)


@pytest.fixture(params=ENGINES)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Folder:
    folder = Folder(tmp_path, request.param)
    folder.open()
    return folder


def told_argv(folder: Folder) -> tuple[str, Path]:
    """A program that is the engine, and a file with all its arguments."""
    log, program = folder.root / "argv", folder.root / "engine-with-log"
    program.write_text(f'#!/bin/sh\necho "$*" >> {log}\nexec {shutil.which(folder.kind)} "$@"\n')
    program.chmod(0o755)
    return str(program), log


def everything(place: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in place.rglob("*")}


def test_a_new_password_takes_the_place_of_the_old_one(folder: Folder) -> None:
    folder.take()
    program, log = told_argv(folder)
    would = folder.call("repository", check_mode=True, new_password=NEW)
    assert would["changed"] and not folder.call("repository")["changed"]
    done = folder.call("repository", new_password=NEW, program=program)
    assert done["changed"] and NEW not in json.dumps(done)
    assert NEW not in log.read_text() and PASSWORD not in log.read_text()
    found = subprocess.run(["grep", "-rlF", NEW, str(folder.root)], check=False, capture_output=True, text=True).stdout
    assert found == ""
    assert not folder.call("repository", new_password=NEW)["changed"]
    with pytest.raises(DeliveryError, match="the password is wrong"):
        folder.take("two")
    (folder.place / "one").write_bytes(b"damaged")
    assert folder.call("restore", set_id="one", password=NEW, paths=[str(folder.place)])["changed"]
    with pytest.raises(DeliveryError, match="the password is wrong"):
        folder.call("repository", password="neither", new_password="nor that")


def test_a_policy_that_loses_files_is_told_and_mended(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "kopia")
    folder.open()
    assert not folder.call("repository")["changed"]
    (config,) = (folder.root / "engine").glob("kopia-*/kopia.config")
    env = {**os.environ, "KOPIA_PASSWORD": PASSWORD, "KOPIA_CONFIG_PATH": str(config), "KOPIA_CHECK_FOR_UPDATES": "false"}
    evil = ["policy", "set", "--global", "--add-ignore=*.bak", "--max-file-size=1000", "--ignore-file-errors=true", "--keep-latest=2"]
    subprocess.run(["kopia", *evil], env=env, check=True, capture_output=True)
    # A set is not touched by it: its sources inherit nothing.
    (folder.place / "a.bak").write_bytes(bytes(2000))
    folder.take()
    shutil.rmtree(folder.place)
    folder.call("restore", set_id="one", keep_current=False)
    assert (folder.place / "a.bak").stat().st_size == 2000
    would = folder.call("repository", check_mode=True)
    before, after = would["diff"]["before"], would["diff"]["after"]
    assert would["changed"] and before["files.ignore"] == ["*.bak"] and after["files.ignore"] is None
    assert before["retention.keepLatest"] == 2 and after["retention.keepLatest"] == 1000000
    mended = folder.call("repository")
    assert mended["changed"] and mended["diff"] == would["diff"]
    assert not folder.call("repository")["changed"]
    owned = folder.call("repository", maintenance_owner=True)
    assert owned["diff"]["after"]["maintenance.owner"].startswith("selfhost-delivery@")
    assert not folder.call("repository", maintenance_owner=True)["changed"]


def test_disconnected_is_forgotten_on_the_host_alone(folder: Folder) -> None:
    folder.take()
    assert folder.call("repository", check_mode=True, state="disconnected")["changed"]
    assert folder.call("repository", state="disconnected")["changed"]
    assert list((folder.root / "engine").iterdir()) == []
    assert not folder.call("repository", state="disconnected")["changed"]
    assert not folder.call("repository", state="connected")["changed"] and folder.sets() == {"one": True}


def test_read_only_writes_nothing(folder: Folder) -> None:
    folder.take()
    before = everything(folder.root / "repository")
    (folder.place / "one").write_bytes(b"damaged")
    for what, more in (("snapshot", {"paths": [str(folder.place)]}), ("restore", {}), ("repository", {"new_password": NEW})):
        with pytest.raises(DeliveryError, match="read only"):
            folder.call(what, set_id="two" if what == "snapshot" else "one", read_only=True, **more)
    assert not folder.call("repository", state="connected", read_only=True)["changed"]
    assert [one["complete"] for one in folder.call("info", read_only=True)["sets"]] == [True]
    assert folder.call("restore", set_id="one", read_only=True, keep_current=False)["changed"]
    assert (folder.place / "one").stat().st_size == 100_000
    assert everything(folder.root / "repository") == before


def test_a_disk_that_became_read_only_is_told(folder: Folder) -> None:
    folder.take()
    place = str(folder.root / "repository")
    subprocess.run(["mount", "--bind", place, place], check=True)
    try:
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)
        with pytest.raises(DeliveryError) as caught:
            folder.take("two")
        assert caught.value.failure_class == "snapshot" and "read-only" in caught.value.message
        assert [path.name for path in folder.manifests.glob(".*")] == [".lock"]
    finally:
        subprocess.run(["umount", "-l", place], check=True)
    assert folder.sets() == {"one": True} and folder.take("two")["changed"]


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@contextlib.contextmanager
def serving(argv: t.Sequence[str], port: int, env: t.Mapping[str, str] | None = None, log: Path | None = None) -> t.Iterator[None]:
    """A server on loopback until the end."""

    def answers() -> bool:
        assert process.poll() is None, log.read_text() if log else argv
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
        return False

    with open(log or os.devnull, "w") as said:
        process = subprocess.Popen(argv, stdout=said, stderr=said, env={**os.environ, **(env or {})})
        try:
            until(answers, f"an answer of {argv[0]}")
            yield
        finally:
            process.terminate()
            process.wait()


def there_and_back(folder: Folder, env: t.Mapping[str, str] | None = None, state: str = "present", **more: t.Any) -> None:
    """A set into a repository elsewhere, and back on a host that knows nothing."""
    more["env"] = env
    made = folder.call("repository", state=state, **more)
    assert made["changed"] == (state == "present") and made["free_bytes"] is None
    assert not folder.call("repository", state=state, **more)["changed"]
    assert folder.take(**more)["changed"]
    content = (folder.place / "one").read_bytes()
    shutil.rmtree(folder.place)
    shutil.rmtree(folder.root / "engine")
    shutil.rmtree(folder.manifests)
    assert folder.call("restore", set_id="latest", **more)["changed"]
    assert (folder.place / "one").read_bytes() == content


def test_sftp(tmp_path: Path) -> None:
    server = shutil.which("sshd") or next((path for path in ("/usr/sbin/sshd",) if os.path.exists(path)), "")
    program = next((path for path in ("/usr/lib/openssh/sftp-server", "/usr/libexec/sftp-server") if os.path.exists(path)), "internal-sftp")
    if not server or subprocess.run(["id", "sshd"], capture_output=True, check=False).returncode:
        pytest.skip("MISSING PROGRAM sshd: apt-get install openssh-server; a repository over SFTP is not tested here")
    for name in ("host", "client"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / name)], check=True)
    (tmp_path / "authorized").write_text((tmp_path / "client.pub").read_text())
    port = free_port()
    os.makedirs("/run/sshd", exist_ok=True)
    (tmp_path / "config").write_text(
        f"Port {port}\nListenAddress 127.0.0.1\nHostKey {tmp_path}/host\nAuthorizedKeysFile {tmp_path}/authorized\nStrictModes no\n"
        f"PidFile {tmp_path}/pid\nUsePAM no\nPermitRootLogin yes\nSubsystem sftp {program}\n"
    )
    (tmp_path / "known").write_text(f"[127.0.0.1]:{port} {(tmp_path / 'host.pub').read_text()}")
    folder = Folder(tmp_path, "kopia")
    (tmp_path / "far").mkdir()
    url = f"sftp://root@127.0.0.1:{port}{tmp_path}/far?keyfile={tmp_path}/client&known_hosts={tmp_path}/known"
    with serving([server, "-D", "-e", "-f", str(tmp_path / "config")], port, log=tmp_path / "sshd.log"):
        there_and_back(folder, repository=url)


def test_a_kopia_server(tmp_path: Path) -> None:
    folder = Folder(tmp_path, "kopia")
    folder.open()
    (config,) = (folder.root / "engine").glob("kopia-*/kopia.config")
    user, password, port = f"selfhost-delivery@{os.uname().nodename.lower()}", secrets.token_hex(8), free_port()
    env = {"KOPIA_PASSWORD": PASSWORD, "KOPIA_CONFIG_PATH": str(tmp_path / "server.config"), "KOPIA_CHECK_FOR_UPDATES": "false"}
    shutil.copy(config, tmp_path / "server.config")

    def kopia(*argv: str) -> None:
        subprocess.run(["kopia", *argv], env={**os.environ, **env}, check=True, capture_output=True)

    kopia("server", "users", "add", user, f"--user-password={password}")
    log = tmp_path / "server.log"
    argv = ["kopia", "server", "start", "--tls-generate-cert", f"--tls-cert-file={tmp_path}/cert", f"--tls-key-file={tmp_path}/key"]
    argv += [f"--address=127.0.0.1:{port}", "--no-ui"]
    env.update(KOPIA_SERVER_USERNAME="kopia", KOPIA_SERVER_PASSWORD=secrets.token_hex(8))
    with serving(argv, port, env, log):
        fingerprint = until(
            lambda: re.search(r"SHA256 fingerprint: ([0-9a-fA-F]{64})|FINGERPRINT: ([0-9a-fA-F]{64})", log.read_text()), "its certificate"
        )
        place = f"kopia://127.0.0.1:{port}?fingerprint={next(found for found in fingerprint.groups() if found)}"
        shutil.rmtree(folder.root / "engine")
        there_and_back(folder, repository=place, password=password, state="connected")


@pytest.mark.parametrize("kind", ENGINES)
def test_s3(tmp_path: Path, kind: str) -> None:
    server = shutil.which("moto_server")
    if not server or subprocess.run(["id", "sshd"], capture_output=True, check=False).returncode:
        pytest.skip("MISSING PROGRAM moto_server: pip install 'moto[server]'; a repository in a bucket is not tested here")
    folder, port = Folder(tmp_path, kind), free_port()
    keys = {"AWS_ACCESS_KEY_ID": "key", "AWS_SECRET_ACCESS_KEY": "s3cr3t-of-the-bucket"}
    place = f"s3://snapshots/shop?endpoint=127.0.0.1:{port}&tls=false" if kind == "kopia" else f"s3:http://127.0.0.1:{port}/snapshots/shop"
    with serving([server, "-p", str(port)], port):
        subprocess.run(["curl", "-sf", "-X", "PUT", f"http://127.0.0.1:{port}/snapshots"], check=True, capture_output=True)
        there_and_back(folder, keys, repository=place)
        found = subprocess.run(
            ["grep", "-rlF", keys["AWS_SECRET_ACCESS_KEY"], str(tmp_path)], check=False, capture_output=True, text=True
        ).stdout
        assert found == ""
