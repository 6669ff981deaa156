# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the tests of snapshot sets work on: an app with two volumes, a config file, a writer, and a repository of a real engine."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils import errors
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import api
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.scan import scan

COLLECTIONS = Path(errors.__file__).absolute().parents[5]
PREFIX = f"snaptest{os.getpid()}"
PASSWORD = "s3cr3t pa$$'word"
# A bound for what is asked again and again; never a time that must pass.
PATIENCE = 60
ENGINES = ("kopia", "restic")

needed = [name for name in ("docker", "busybox", "setfattr", "mount") if not shutil.which(name)]
MARKS = [
    pytest.mark.skipif(bool(needed), reason=f"MISSING PROGRAM {' '.join(needed)}: apt-get install busybox-static attr mount"),
    pytest.mark.skipif(os.geteuid() != 0, reason="NOT ROOT: volumes, owners and mounts need root"),
]

#: Runs one function of api.py in a process of its own; SETUP may first put a fault in.
RUNNER = """
import json, os, signal, sys
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots import api, restore, sets, taking
what, kind, params, setup = json.loads(sys.stdin.read())
exec(setup)
try:
    print(json.dumps(getattr(api, what)(kind, params, False)))
except DeliveryError as exc:
    print(json.dumps({"failed": True, **exc.as_result()}))
"""

#: For SETUP: stands still in the window, while the writers are held, and says so in the file REACHED.
IN_WINDOW = """
import time
def stand(*arguments):
    open(REACHED, "w").close()
    time.sleep(1000)
taking.copy_files = stand
"""


def docker(*argv: str) -> str:
    return subprocess.run(["docker", *argv], check=True, capture_output=True, text=True).stdout.strip()


def until(question: t.Callable[[], t.Any], what: str) -> t.Any:
    """Ask again and again until the answer is true."""
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline:
        answer = question()
        if answer:
            return answer
        time.sleep(0.05)
    raise AssertionError(f"never seen: {what}")


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[str]:
    root = tmp_path_factory.mktemp("image")
    (root / "bin").mkdir()
    shutil.copy(t.cast(str, shutil.which("busybox")), root / "bin" / "busybox")
    (root / "bin" / "sh").symlink_to("busybox")
    packed = subprocess.run(["tar", "-C", str(root), "-c", "."], check=True, capture_output=True).stdout
    name = f"{PREFIX}:1"
    subprocess.run(["docker", "import", "-", name], input=packed, check=True, capture_output=True)
    yield name
    subprocess.run(["docker", "rmi", "-f", name], check=False, capture_output=True)


#: An empty repository of each engine.
_EMPTY: dict[str, Path] = {}


class Store:
    """The volumes of an app and a config file, one repository, and the modules called on them."""

    volumes: t.Sequence[str] = ()
    writer = ""

    def __init__(self, root: Path, kind: str, name: str) -> None:
        self.root, self.kind, self.name = root, kind, name
        self.manifests = root / "manifests"
        self.config = root / "app" / ".env.production"
        self.config.parent.mkdir()
        self.config.write_text("SECRET=one\n")
        self.config.chmod(0o640)

    def data(self, number: int) -> Path:
        return Path(docker("volume", "inspect", "--format", "{{.Mountpoint}}", self.volumes[number]))

    def params(self, what: str, **more: t.Any) -> dict[str, t.Any]:
        spec = {
            "repository": api.REPOSITORY_ARGUMENTS,
            "snapshot": api.SNAPSHOT_ARGUMENTS,
            "restore": api.RESTORE_ARGUMENTS,
            "info": api.INFO_ARGUMENTS,
        }[what]
        mine = {
            "repository": str(self.root / "repository"),
            "config_dir": str(self.root / "engine"),
            "password": PASSWORD,
            "manifest_dir": str(self.manifests),
            "stop_timeout": 5,
        }
        if what == "snapshot":
            mine.update(volumes=self.volumes, paths=[str(self.config)], metadata={"app": self.name})
        return {key: {**mine, **more}.get(key, option.get("default")) for key, option in spec.items()}

    def call(self, what: str, check_mode: bool = False, **more: t.Any) -> dict[str, t.Any]:
        return getattr(api, what)(self.kind, self.params(what, **more), check_mode)

    def start(self, what: str, setup: str = "", **more: t.Any) -> subprocess.Popen[str]:
        """The same in a process of its own, as a module is."""
        process = subprocess.Popen(
            [sys.executable, "-c", RUNNER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(COLLECTIONS)},
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps([what, self.kind, self.params(what, **more), setup]))
        process.stdin.close()
        process.stdin = None
        return process

    def state(self, container: str = "") -> str:
        return docker("inspect", "--format", "{{.State.Status}}", container or self.writer)

    def trees(self) -> list[dict[bytes, t.Any]]:
        """What a restore must bring back, exactly, with mtimes of files."""
        found = []
        for place in (self.data(0), self.data(1), self.config):
            entries = scan(str(place)).entries.values()
            found.append({one.path: [*one.identity(), one.mtime_ns if one.kind == "file" else 0] for one in entries})
        return found

    def leftovers(self) -> list[str]:
        found = [str(p) for p in self.manifests.glob(".*") if p.name != ".lock"] if self.manifests.exists() else []
        found += [str(p) for n in (0, 1) for p in self.data(n).parent.iterdir() if p.name != "_data"]
        found += [str(p) for p in self.config.parent.iterdir() if p != self.config]
        return found + list((self.root / "engine").glob("*/manifests/*/*"))

    def sets(self) -> dict[str, bool]:
        return {one["set_id"]: one["complete"] for one in self.call("info")["sets"]}

    def open(self) -> None:
        """Have a repository; a copy of an empty one costs less than the next new one."""
        if not shutil.which(self.kind):
            pytest.skip(f"MISSING PROGRAM {self.kind}: the {self.kind} engine is not tested here")
        if self.kind not in _EMPTY:
            self.call("repository", state="present")
            _EMPTY[self.kind] = Path(shutil.copytree(self.root / "repository", self.root.parent / f"empty-{self.kind}"))
        else:
            shutil.copytree(_EMPTY[self.kind], self.root / "repository")
            self.call("repository", state="connected")


class Site(Store):
    """The same with two volumes of everything that can be lost, and a writer."""

    def __init__(self, root: Path, kind: str, image: str, name: str) -> None:
        super().__init__(root, kind, name)
        self.volumes = [f"{name}-a", f"{name}-b"]
        self.writer = f"{name}-writer"
        for volume in self.volumes:
            docker("volume", "create", volume)
        self.fill()
        # As init it would ignore SIGTERM, so it asks for it.
        script = (
            "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); echo $i > /a/n.tmp; busybox mv /a/n.tmp /a/n; echo $i > /b/n.tmp; "
            "busybox mv /b/n.tmp /b/n; busybox sleep 0.02; done"
        )
        mounts = ["-v", f"{self.volumes[0]}:/a", "-v", f"{self.volumes[1]}:/b"]
        docker("run", "-d", "--network", "none", "--name", self.writer, "-e", "PATH=/bin", *mounts, image, "/bin/sh", "-c", script)
        until(lambda: (self.data(0) / "n").exists() and (self.data(1) / "n").exists(), "the writer's first files")

    def fill(self) -> None:
        """Everything an engine could lose."""
        a, b = self.data(0), self.data(1)
        (a / "dir").mkdir()
        (a / "dir" / "inner").write_text("inner")
        os.chown(a / "dir", 70, 71)
        os.chmod(a / "dir", 0o2750)
        (a / "plain").write_bytes(os.urandom(200_000))
        os.chown(a / "plain", 1000, 1001)
        os.chmod(a / "plain", 0o4711)
        os.link(a / "plain", a / "hard")
        (a / "link").symlink_to("/etc/passwd")
        os.mkfifo(a / "fifo", 0o620)
        os.mknod(a / "zero", stat.S_IFCHR | 0o606, os.makedev(1, 5))
        subprocess.run(["setfattr", "-n", "user.note", "-v", "kept", str(a / "dir" / "inner")], check=True)
        (a / ".kopiaignore").write_text("*\n")
        (a / "CACHEDIR.TAG").write_text("Signature: 8a477f597d28d172789f06886806bc55")
        (a / "space and ünicode\nnewline").write_text("x")
        (a / "locked").write_text("nobody")
        os.chmod(a / "locked", 0)
        os.chown(a, 70, 70)
        os.chmod(a, 0o1700)
        (b / "empty").mkdir()
        (b / "zero-bytes").touch()

    def quiet(self) -> list[dict[bytes, t.Any]]:
        """Stop the writer, so that a set can be compared with what is there."""
        docker("stop", "-t", "5", self.writer)
        return self.trees()

    def damage(self) -> None:
        a = self.data(0)
        (a / "plain").write_bytes(b"damaged")
        shutil.rmtree(a / "dir")
        (a / "link").unlink()
        (a / "new").write_text("new")
        os.chmod(a, 0o755)
        self.config.write_text("SECRET=two\n")

    def remove(self) -> None:
        subprocess.run(["docker", "rm", "-f", self.writer], check=False, capture_output=True)
        subprocess.run(["docker", "volume", "rm", "-f", *self.volumes], check=False, capture_output=True)


def make_site(tmp_path: Path, kind: str, image: str, request: pytest.FixtureRequest) -> Site:
    if not shutil.which(kind):
        pytest.skip(f"MISSING PROGRAM {kind}: the {kind} engine is not tested here")
    site = Site(tmp_path, kind, image, f"{PREFIX}-{kind}-{abs(hash(request.node.name)) % 100000}")
    request.addfinalizer(site.remove)
    site.open()
    return site


@pytest.fixture(params=ENGINES)
def site(request: pytest.FixtureRequest, tmp_path: Path, image: str) -> Site:
    return make_site(tmp_path, request.param, image, request)


@pytest.fixture
def one_site(request: pytest.FixtureRequest, tmp_path: Path, image: str) -> Site:
    """For what does not depend on the engine: the first that is here."""
    return make_site(tmp_path, next(kind for kind in ENGINES if shutil.which(kind) or kind == "restic"), image, request)


def hold_program(site: Site, command: str, nth: int) -> tuple[Path, Path]:
    """A program that is the engine, but stands still at its n-th COMMAND and says so with its pid in a file."""
    reached, wrapper = site.root / "reached", site.root / "wrapped-engine"
    wrapper.write_text(
        f"""#!/bin/sh
case "$*" in *"{command}"*)
  n=$(($(cat {site.root}/count 2>/dev/null || echo 0) + 1)); echo $n > {site.root}/count
  if [ $n = {nth} ]; then echo $$ > {reached}.part; mv {reached}.part {reached}; exec sleep 1000; fi;;
esac
exec {shutil.which(site.kind)} "$@"
"""
    )
    wrapper.chmod(0o755)
    return wrapper, reached


BACKUP = {"kopia": "snapshot create", "restic": "backup --json"}
