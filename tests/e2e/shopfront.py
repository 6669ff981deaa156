# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A product small enough to be promoted dozens of times: a web service, a worker, a keeper of data, a migrator.

All of them are one static busybox and a few lines of shell, imported as one-layer images. How a build behaves is part of the image.
"""

from __future__ import annotations

import fcntl
import hashlib
import io
import json
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

WEB = """#!/bin/sh
# Waits as a service does that has to connect first, then answers with its version.
mkdir -p /www/api
case "$BEHAVIOUR" in
  crash) echo "web: cannot read its settings"; exit 3 ;;
  never) ;;
  flap)  ( while :; do usleep 30000; rm -f /www/api/ready; sleep 1; echo "{\\"version\\": \\"$TAG\\"}" > /www/api/ready; done ) & ;;
  *)     echo "{\\"status\\": \\"ok\\", \\"version\\": \\"$TAG\\"}" > /www/api/ready ;;
esac
exec httpd -f -p 8080 -h /www
"""

WORKER = """#!/bin/sh
trap 'exit 0' TERM
while :; do sleep 1 & wait $!; done
"""

KEEPER = """#!/bin/sh
[ -f /data/rows ] || echo "row 1" > /data/rows
exec httpd -f -p 8081 -h /data
"""

# The image of the data keeper, which no release changes. Sites that run side by side share it, and an import makes another image of the
# same files: a tag that moved would be a change to the next promotion of another site. So its name says what is in it, and it is made once.
KEEPER_IMAGE = f"shopfront-keeper:{hashlib.sha256(KEEPER.encode()).hexdigest()[:12]}"

MIGRATE = """#!/bin/sh
case "$BEHAVIOUR" in
  fail)   echo "migrate: column already exists" >&2; exit 4 ;;
  hang)   echo "migrate: waiting for a lock"; sleep 600 ;;
  damage) echo "migrate: rewriting rows"; echo "damaged" > /data/rows ;;
  *)      echo "$TAG" >> /data/migrations ;;
esac
"""

APPLETS = ("sh", "httpd", "mkdir", "sleep", "usleep", "rm", "cat", "echo", "test", "[", "wget", "true", "kill")

COMPOSE = """
services:
  web:
    image: ${APP_IMAGE}
    restart: unless-stopped
    env_file: .env.${DELIVERY_ENVIRONMENT}
    depends_on: {keeper: {condition: service_healthy}}
  worker:
    image: ${APP_IMAGE}
    command: [/worker]
    restart: unless-stopped
  migrate:
    image: ${MIGRATOR_IMAGE}
    profiles: [migrate]
    volumes: [data:/data]
  keeper:
    image: KEEPER_IMAGE
    volumes: [data:/data]
    healthcheck: {test: [CMD, test, -f, /data/rows], interval: 1s, retries: 20}
volumes:
  data:
""".replace("KEEPER_IMAGE", KEEPER_IMAGE)


def _rootfs(scripts: dict[str, str]) -> bytes:
    busybox = shutil.which("busybox")
    if busybox is None:
        raise AssertionError("busybox is missing: install the package busybox-static")
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.add(busybox, "bin/busybox")
        for applet in APPLETS:
            link = tarfile.TarInfo(f"bin/{applet}")
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        for name in ("data", "www", "tmp"):
            folder = tarfile.TarInfo(name)
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(folder)
        for name, text in scripts.items():
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(text.encode()), 0o755
            tar.addfile(entry, io.BytesIO(text.encode()))
    return buffer.getvalue()


def _import(reference: str, scripts: dict[str, str], command: str, **env: str) -> None:
    changes = [f'CMD ["{command}"]', "ENV PATH=/bin", *(f"ENV {key}={value}" for key, value in env.items())]
    argv = ["docker", "import"]
    for change in changes:
        argv += ["--change", change]
    subprocess.run([*argv, "-", reference], input=_rootfs(scripts), check=True, stdout=subprocess.DEVNULL)


def _say_architecture(reference: str, architecture: str) -> None:
    """Make an image say that it is for another machine; the engine's own build knows only its own."""
    saved = subprocess.run(["docker", "save", reference], check=True, capture_output=True).stdout
    with tarfile.open(fileobj=io.BytesIO(saved)) as tar:
        files = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}  # type: ignore[union-attr]
    manifest = json.loads(files["manifest.json"])
    config = json.loads(files.pop(manifest[0]["Config"]))
    data = json.dumps({**config, "architecture": architecture}).encode()
    manifest[0]["Config"] = f"{hashlib.sha256(data).hexdigest()}.json"
    files.update({manifest[0]["Config"]: data, "manifest.json": json.dumps(manifest).encode()})
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    subprocess.run(["docker", "load", "--quiet"], input=buffer.getvalue(), check=True, stdout=subprocess.DEVNULL)


def build_keeper() -> None:
    """Make ``KEEPER_IMAGE`` where it is not there."""
    with open(Path(tempfile.gettempdir()) / "shopfront-keeper.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if subprocess.run(["docker", "image", "inspect", KEEPER_IMAGE], check=False, capture_output=True).returncode:
            _import(KEEPER_IMAGE, {"keeper": KEEPER}, "/keeper")


def build(app: str, migrator: str, tag: str, web: str = "ok", migrate: str = "ok", architecture: str = "") -> list[str]:
    """Make both images of one build; return their references."""
    _import(f"{app}:{tag}", {"web": WEB, "worker": WORKER}, "/web", BEHAVIOUR=web, TAG=tag)
    _import(f"{migrator}:{tag}", {"migrate": MIGRATE}, "/migrate", BEHAVIOUR=migrate, TAG=tag)
    if architecture:
        _say_architecture(f"{app}:{tag}", architecture)
    return [f"{app}:{tag}", f"{migrator}:{tag}"]
