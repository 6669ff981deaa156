# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real registries for tests: the distribution's program, one process and one directory each, on loopback.

A test file says ``from registry_fixture import registries  # noqa: F401 # pylint: disable=unused-import`` and then, with
that fixture, ``registry = registries(htpasswd=True, tls=True)``. Outside pytest: :func:`start_registry` and ``stop()``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import ssl
import subprocess
import time
import typing as t
import urllib.error
import urllib.request
from pathlib import Path

import pytest

PROGRAMS = ("docker-registry", "registry")
USERNAME, PASSWORD = "ci", "correct horse battery"
_START_TIMEOUT = 20.0


class Registry:
    """A running registry. ``address`` is ``host:port``; ``ca_path`` is set with TLS, ``username`` and ``password`` with htpasswd."""

    def __init__(self, directory: Path, config: dict[str, t.Any], tls: bool, htpasswd: bool, program: str | None = None) -> None:
        self.directory = directory
        self.storage = directory / "storage"
        self.ca_path = str(directory / "ca.pem") if tls else None
        self.tls = tls
        self.username = USERNAME if htpasswd else None
        self.password = PASSWORD if htpasswd else None
        self._config = config
        self._program = program or programs()[0]
        self._process: subprocess.Popen[bytes] | None = None
        self.address = ""
        self.start()

    @property
    def url(self) -> str:
        return f"{'https' if self.tls else 'http'}://{self.address}"

    @property
    def options(self) -> dict[str, t.Any]:
        """Module options that reach it."""
        found: dict[str, t.Any] = {"ca_path": self.ca_path} if self.tls else {"plain_http": True}
        if self.username:
            found.update(username=self.username, password=self.password)
        return found

    def start(self) -> None:
        """Start it, after ``stop`` at the same address with what it stored."""
        log = self.directory / "log"
        log.write_bytes(b"")
        config = self.directory / "config.yml"
        config.write_text(json.dumps(self._config))
        with log.open("wb") as sink:
            self._process = subprocess.Popen([self._program, "serve", str(config)], stdout=sink, stderr=sink, stdin=subprocess.DEVNULL)
        deadline = time.monotonic() + _START_TIMEOUT
        while not self._answers(log.read_text(errors="replace")):
            if self._process.poll() is not None or time.monotonic() > deadline:
                self.stop()
                raise RuntimeError(f"the registry did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.02)
        self._keep_address()

    def _keep_address(self) -> None:
        self._config["http"]["addr"] = self.address

    #: How it tells its port.
    _listening = r"listening on (?:127\.0\.0\.1|\[::\]):(\d+)"

    def _answers(self, log: str) -> bool:
        # It chose its port itself, so no other process can have taken it meanwhile.
        match = re.search(self._listening, log)
        if not match:
            return False
        self.address = f"127.0.0.1:{match.group(1)}"
        try:
            urllib.request.urlopen(f"{self.url}/v2/", timeout=5, context=ssl._create_unverified_context() if self.tls else None).close()
        except urllib.error.HTTPError as exc:
            return exc.code == 401
        except OSError:
            return False
        return True

    def stop(self) -> None:
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None

    def reconfigure(self, **storage: t.Any) -> None:
        """Start it again with other storage settings: ``delete={"enabled": False}``, ``maintenance={"readonly": {"enabled": True}}``."""
        self.stop()
        self._config["storage"].update(storage)
        self.start()

    def collect(self) -> None:
        """Collect garbage while it is stopped."""
        self.stop()
        subprocess.run([self._program, "garbage-collect", str(self.directory / "config.yml")], check=True, capture_output=True)
        self.start()

    def disk(self) -> dict[str, int]:
        """Bytes of every blob and manifest on its disk, by digest."""
        blobs = self.storage / "docker/registry/v2/blobs/sha256"
        return {f"sha256:{path.parent.name}": path.stat().st_size for path in blobs.glob("*/*/data")}

    def blob_file(self, digest: str) -> Path:
        """Where the bytes of a blob or manifest lie."""
        value = digest.split(":", 1)[1]
        return self.storage / "docker/registry/v2/blobs/sha256" / value[:2] / value / "data"

    def blob_link(self, repository: str, digest: str) -> Path:
        """What makes a blob part of a repository."""
        return self.storage / "docker/registry/v2/repositories" / repository / "_layers/sha256" / digest.split(":", 1)[1] / "link"

    def snapshot(self) -> dict[str, bytes]:
        """All files it has stored, to see whether anything was written. Uploads in progress count too."""
        return {str(path.relative_to(self.storage)): path.read_bytes() for path in sorted(self.storage.rglob("*")) if path.is_file()}


class Zot(Registry):
    """The registry zot: another implementation, with the referrers API. Its files lie elsewhere; what reads them does not work here."""

    _listening = r'kernel chosen port","port":(\d+)'

    def _keep_address(self) -> None:
        """It is not started again."""


def start_zot(directory: Path) -> Zot:
    """Start zot in the new ``directory``, without users and TLS. Where it is not on PATH, the test is skipped, and that is said."""
    program = shutil.which("zot")
    if program is None:
        pytest.skip("MISSING PROGRAM zot: no package of Debian has it; put zot 2 on PATH to test a registry with the referrers API")
    directory.mkdir(parents=True)
    config = {
        "distSpecVersion": "1.1.1",
        "storage": {"rootDirectory": str(directory / "storage"), "gc": False},
        "http": {"address": "127.0.0.1", "port": "0", "compat": ["docker2s2"]},
        "log": {"level": "info"},
    }
    return Zot(directory, config, False, False, program)


def start_registry(
    directory: Path,
    htpasswd: bool = False,
    tls: bool = False,
    relative_urls: bool = False,
    token: dict[str, str] | None = None,
    cache: bool = False,
    program: str | None = None,
    also: str = "",
) -> Registry:
    """Start a registry in the new ``directory``, with deletion enabled.

    ``htpasswd``: user and password are ``USERNAME`` and ``PASSWORD``. ``tls``: with a certificate for 127.0.0.1 and localhost by a CA of
    its own. ``relative_urls``: uploads are answered without a host. ``token``: the ``auth.token`` section of its configuration.
    ``cache``: descriptors are kept in memory, as most installations do; such a registry answers HEAD for blobs that are gone.
    ``program``: one of :func:`programs`, by default the first. ``also``: another address of this machine that it is reached at.
    """
    directory.mkdir(parents=True)
    (directory / "storage").mkdir()
    config: dict[str, t.Any] = {
        "version": 0.1,
        "log": {"level": "info", "accesslog": {"disabled": False}},
        "storage": {"filesystem": {"rootdirectory": str(directory / "storage")}, "delete": {"enabled": True}},
        "http": {"addr": ":0" if also else "127.0.0.1:0", "relativeurls": relative_urls},
    }
    if cache:
        config["storage"]["cache"] = {"blobdescriptor": "inmemory"}
    if htpasswd:
        _need("htpasswd", "apache2-utils")
        hashed = subprocess.run(["htpasswd", "-inBC", "5", USERNAME], input=PASSWORD, capture_output=True, text=True, check=True).stdout
        (directory / "htpasswd").write_text(hashed)
        config["auth"] = {"htpasswd": {"realm": "test", "path": str(directory / "htpasswd")}}
    if token:
        config["auth"] = {"token": token}
    if tls:
        make_certificate(directory, also)
        config["http"]["tls"] = {"certificate": str(directory / "server.pem"), "key": str(directory / "server.key")}
    return Registry(directory, config, tls, htpasswd, program)


def make_certificate(directory: Path, also: str = "") -> None:
    """``ca.pem``, ``server.pem`` and ``server.key`` for 127.0.0.1, localhost and the address ``also``."""
    _need("openssl", "openssl")

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True)

    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    openssl("req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2", "-subj", f"/CN=test CA {os.urandom(4).hex()}")
    openssl("req", *curve, "-keyout", "server.key", "-out", "server.csr", "-subj", "/CN=localhost")
    (directory / "san").write_text(f"subjectAltName=DNS:localhost,IP:127.0.0.1{f',IP:{also}' if also else ''}\n")
    openssl(
        "x509",
        "-req",
        "-in",
        "server.csr",
        "-CA",
        "ca.pem",
        "-CAkey",
        "ca.key",
        "-CAcreateserial",
        "-days",
        "2",
        "-extfile",
        "san",
        "-out",
        "server.pem",
    )


def programs() -> list[str]:
    """The registry programs on PATH, one for each name: Debian's ``docker-registry`` is version 2, ``registry`` version 3."""
    found = [path for path in map(shutil.which, PROGRAMS) if path]
    if not found:
        pytest.fail("these tests need a registry: install the package docker-registry (program docker-registry or registry)")
    return found


def _need(program: str, package: str) -> None:
    if shutil.which(program) is None:
        pytest.fail(f"these tests need {program}: install the package {package}")


#: For tests of what the two versions of distribution do differently, or might.
both_versions = pytest.mark.parametrize("registries", PROGRAMS, indirect=True)


@pytest.fixture
def registries(tmp_path: Path, request: pytest.FixtureRequest) -> t.Iterator[t.Callable[..., Registry]]:
    """Starts registries with the options of :func:`start_registry`; stops them after the test."""
    running: list[Registry] = []
    wanted: str | None = getattr(request, "param", None)
    if wanted:
        _need(wanted, "that scripts/bootstrap.sh test installs")

    def start(**options: t.Any) -> Registry:
        if wanted:
            options.setdefault("program", shutil.which(wanted))
        running.append(start_registry(tmp_path / f"registry{len(running)}", **options))
        return running[-1]

    yield start
    for registry in running:
        registry.stop()
