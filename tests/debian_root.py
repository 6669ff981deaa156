# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Hosts to test on: an image made of Debian packages alone, made once and kept in ``$DELIVERY_CACHE``, and the rights that such a host needs."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import typing as t
from pathlib import Path

SUITE = "bookworm"
#: `--privileged` needs more than some engines may give; this is enough for systemd, and for an engine inside an engine.
RIGHTS = (
    *("--cap-add", "ALL", "--cap-drop", "SYS_RESOURCE", "--security-opt", "seccomp=unconfined", "--security-opt", "apparmor=unconfined"),
    *("--security-opt", "systempaths=unconfined", "--cgroupns=host", "--volume", "/sys/fs/cgroup:/sys/fs/cgroup:rw"),
)
BOOT = "/usr/local/sbin/boot"


class HostError(Exception):
    """The host could not be made or did not do what it was asked; the text says what was seen."""


def program(*command: str | Path, content: bytes | None = None) -> str:
    """Standard output of a program; ``HostError`` with its last words when it fails."""
    try:
        done = subprocess.run([str(word) for word in command], input=content, capture_output=True, check=False)
    except FileNotFoundError as exc:
        raise HostError(f"there is no program {command[0]}; scripts/bootstrap.sh test installs what tests need") from exc
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).decode(errors="replace").strip().splitlines()[-15:])
        raise HostError(f"{' '.join(str(word) for word in command[:6])} ended with {done.returncode}:\n{last}")
    return done.stdout.decode()


def image(
    purpose: str,
    packages: t.Sequence[str],
    *,
    boot: str = "",
    changes: t.Sequence[str] = (),
    suite: str = SUITE,
    say: t.Callable[[str], None] = print,
) -> str:
    """The name of the image, which says what went into it; made when it is not there.

    ``boot``: a script that is put at ``BOOT`` and started by the container. ``changes``: more of what ``docker import --change`` takes.
    """
    key = hashlib.sha256(json.dumps([suite, os.uname().machine, list(packages), boot]).encode()).hexdigest()[:12]
    name = f"selfhost-delivery-{purpose}:{key}"
    if subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0:
        return name
    home = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    archive = Path(os.environ.get("DELIVERY_CACHE") or f"{home}/selfhost-delivery") / f"{purpose}-{key}.tar"
    if not archive.exists():
        say(f"Making a Debian {suite} (debootstrap; minutes, once, kept as {archive}) ...")
        archive.parent.mkdir(parents=True, exist_ok=True)
        _make(archive, packages, boot, suite)
    told = [*changes, *((f'CMD ["{BOOT}"]',) if boot else ())]
    program("docker", "import", *(word for change in told for word in ("--change", change)), archive, name)
    return name


def _make(archive: Path, packages: t.Sequence[str], boot: str, suite: str) -> None:
    # The mirror that this machine takes its own release from, where it has one; otherwise debootstrap's own default.
    asked = ["apt-get", "indextargets", "--format", "$(REPO_URI)", f"Codename: {SUITE}", "Created-By: Packages"]
    mirrors = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "root"
        program("debootstrap", "--variant=minbase", f"--include={','.join(packages)}", suite, tree, *mirrors[:1])
        if boot:
            script = tree / BOOT.lstrip("/")
            script.write_text(boot)
            script.chmod(0o755)
        for waste in ("var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(tree / waste)
            (tree / waste / "partial").mkdir(parents=True)
        part = archive.with_suffix(".part")
        program("tar", "-C", tree, "-cf", part, ".")
        part.rename(archive)
