# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The demo's images, built where no image can be pulled: a root file system of the machine's own distribution, then thin layers.

* two root file systems from packages of the machine's own apt sources (debootstrap), trimmed: Python with psycopg2, and PostgreSQL;
  cached as tarballs under a name made of everything that goes into them, so a changed recipe is another name;
* the database image: the second with an entrypoint;
* ``app`` and ``migrator``: one pair per release on the first, tagged ``sha-<what is in it>``.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import hashlib
import json
import os
import shutil
import subprocess
import tempfile
import time
import typing as t
from pathlib import Path

HERE = Path(__file__).resolve().parent
#: Every image of the demo carries it, so that demo-down finds them all.
LABEL = "delivery.selfhost.demo"

PACKAGES = ("python3-minimal", "python3-psycopg2", "postgresql")

#: What neither Python nor PostgreSQL needs at run time; patterns below the tree.
TRIM = (
    "usr/share/{doc,doc-base,info,man,locale,i18n,bash-completion,common-licenses,lintian,perl,perl5,zoneinfo}/*",
    "usr/share/postgresql/*/man",
    "usr/lib/*-linux-gnu/{perl,perl-base,gconv}",
    "usr/lib/*-linux-gnu/{libLLVM*,libz3*,libperl*,libapt-*,libdb-5*}",
    "usr/lib/llvm-*",
    "usr/bin/perl*",
    # Just-in-time compilation is optional in PostgreSQL: without its library it is off.
    "usr/lib/postgresql/*/lib/{llvmjit*,bitcode,pgxs}",
    "usr/lib/python3*/{pydoc_data,ensurepip,idlelib,lib2to3,distutils,test,unittest,tkinter}",
    "usr/{lib,libexec}/{apt,dpkg,systemd}",
    "usr/lib/udev",
    "{etc,var/lib,var/log}/{apt,dpkg}",
    "var/{cache,log,tmp}/*",
    "var/lib/postgresql/*",
    "etc/postgresql",
    "run/*",
    "tmp/*",
)


class ImageError(Exception):
    """An image could not be made; the text says what was tried and what was seen."""


@dataclasses.dataclass(frozen=True)
class Distribution:
    codename: str
    mirror: str


@dataclasses.dataclass(frozen=True)
class Rootfs:
    """The two root file systems, as images of the local engine, and where PostgreSQL's programs are in the second."""

    python: str
    postgres: str
    pg_bin: str


def run_program(command: list[str], **options: t.Any) -> str:
    """Standard output of a program; when it fails, its last words are the error."""
    done: subprocess.CompletedProcess[str] = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-15:])
        raise ImageError(f"{' '.join(command[:3])} … ended with {done.returncode}:\n{last}")
    return done.stdout


def distribution() -> Distribution:
    """This machine's release and the mirror apt already uses for it."""
    facts = dict(
        line.split("=", 1) for line in Path("/etc/os-release").read_text().splitlines() if "=" in line and not line.startswith("#")
    )
    codename = facts.get("VERSION_CODENAME", "").strip('"')
    rows = run_program(["apt-get", "indextargets", "--format", "$(CODENAME) $(RELEASE) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"])
    for row in rows.splitlines():
        name, release, component, uri = row.split(" ", 3)
        if codename in (name, release) and component == "main":
            return Distribution(codename, uri.rstrip("/"))
    raise ImageError(f"no apt source for {codename or 'this release'} main: run apt-get update, or add one")


def recipe_key(source: Distribution) -> str:
    """Names one state of the recipe: release, architecture, packages, what is trimmed."""
    facts = json.dumps([source.codename, os.uname().machine, PACKAGES, TRIM])
    return hashlib.sha256(facts.encode()).hexdigest()[:12]


def braces(pattern: str) -> list[str]:
    """``a/{b,c}/d`` is ``a/b/d`` and ``a/c/d``; glob has no such thing."""
    head, brace, rest = pattern.partition("{")
    if not brace:
        return [pattern]
    choices, _brace, tail = rest.partition("}")
    return [full for choice in choices.split(",") for full in braces(head + choice + tail)]


def trim(tree: Path) -> None:
    for pattern in TRIM:
        for full in braces(pattern):
            for found in glob.glob(str(tree / full)):
                path = Path(found)
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink()


def make_tree(tree: Path, source: Distribution) -> None:
    """A bootable-looking tree from packages alone, proved by starting both programs in it."""
    log = tree.with_suffix(".log")
    with log.open("w") as stream:
        code = subprocess.run(
            ["debootstrap", "--variant=minbase", f"--include={','.join(PACKAGES)}", source.codename, str(tree), source.mirror],
            stdout=stream,
            stderr=subprocess.STDOUT,
            check=False,
        ).returncode
    if code:
        last = "\n".join(log.read_text(errors="replace").splitlines()[-10:])
        raise ImageError(f"debootstrap {source.codename} ended with {code}:\n{last}")
    trim(tree)
    run_program(["chroot", str(tree), "/usr/bin/python3", "-c", "import http.server, json, psycopg2, queue, ssl"])
    run_program(["chroot", str(tree), f"/{postgres_bin(tree)}/postgres", "--version"])
    # Owned by root and started as root, the entrypoint moves to the user postgres.
    (tree / "var/lib/postgresql/data").mkdir(parents=True, exist_ok=True)


def postgres_bin(tree: Path) -> str:
    return str(next(tree.glob("usr/lib/postgresql/*/bin")).relative_to(tree))


def rootfs(cache: Path) -> Rootfs:
    """The two root file systems as local images: from the engine, else from the cached tarballs, else made now (about a minute)."""
    source = distribution()
    key = recipe_key(source)
    names = {kind: f"selfhost-delivery-demo/{kind}-rootfs:{key}" for kind in ("python", "postgres")}
    tarballs = {kind: cache / f"{kind}-rootfs-{key}.tar" for kind in names}
    note = cache / f"rootfs-{key}.json"
    if not (note.exists() and all(tarball.exists() for tarball in tarballs.values())):
        make_tarballs(source, tarballs, note)
    for kind, name in names.items():
        if not has_image(name):
            run_program(["docker", "import", "--change", f"LABEL {LABEL}={kind}-rootfs", str(tarballs[kind]), name])
    return Rootfs(names["python"], names["postgres"], json.loads(note.read_text())["pg_bin"])


def make_tarballs(source: Distribution, tarballs: dict[str, Path], note: Path) -> None:
    note.parent.mkdir(parents=True, exist_ok=True)
    without = {
        "python": ("./usr/lib/postgresql", "./usr/share/postgresql", "./usr/lib/*/libicu*", "./usr/lib/*/libxml2*"),
        "postgres": ("./usr/lib/python3*", "./usr/bin/python3*"),
    }
    # Not in /tmp, which may be small or mounted without devices.
    with tempfile.TemporaryDirectory(prefix="rootfs-", dir=note.parent) as scratch:
        tree = Path(scratch) / "tree"
        make_tree(tree, source)
        for kind, tarball in tarballs.items():
            excluded = [f"--exclude={path}" for path in (*without[kind], "./dev/*", "./proc/*", "./sys/*")]
            run_program(["tar", "--numeric-owner", "-C", str(tree), *excluded, "-cf", f"{tarball}.part", "."])
            os.replace(f"{tarball}.part", tarball)
        note.write_text(json.dumps({"pg_bin": f"/{postgres_bin(tree)}", "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}))


def engine_answers() -> bool:
    return shutil.which("docker") is not None and subprocess.run(["docker", "version"], capture_output=True, check=False).returncode == 0


def has_image(name: str) -> bool:
    return subprocess.run(["docker", "image", "inspect", name], capture_output=True, check=False).returncode == 0


def build(context: Path, dockerfile: Path, name: str, target: str = "", **arguments: str) -> None:
    """``docker build`` with whatever builder the engine has; no step runs anything, so nothing is fetched."""
    command = ["docker", "build", "--quiet", "--pull=false", "--file", str(dockerfile), "--tag", name, "--label", f"{LABEL}=image"]
    command += ["--target", target] if target else []
    for key, value in arguments.items():
        command += ["--build-arg", f"{key}={value}"]
    run_program([*command, str(context)])


def build_postgres(base: Rootfs, repository: str) -> str:
    """The database image, its tag made of its content."""
    recipe = [HERE / "image" / "postgres.Dockerfile", HERE / "image" / "postgres-entrypoint.sh"]
    name = f"{repository}:{base.postgres.rpartition(':')[2]}-{digest_of(recipe)[:8]}"
    if not has_image(name):
        build(HERE / "image", recipe[0], name, ROOTFS=base.postgres, PG_BIN=base.pg_bin)
    return name


def digest_of(files: t.Iterable[Path], *more: str) -> str:
    """SHA-256 over names and contents, the same on every machine."""
    total = hashlib.sha256("\0".join(more).encode())
    for file in sorted(files, key=lambda one: one.name):
        total.update(f"{file.name}\0{hashlib.sha256(file.read_bytes()).hexdigest()}\0".encode())
    return total.hexdigest()


@functools.cache
def releases() -> dict[int, dict[str, t.Any]]:
    return {int(number): facts for number, facts in json.loads((HERE / "app" / "releases.json").read_text()).items()}


def release_files(number: int) -> tuple[list[Path], list[Path]]:
    """Code and migrations of one release; its migrations end at the schema it needs."""
    schema = releases()[number]["schema"]
    code = sorted((HERE / "app").glob("*.py"))
    return code, [file for file in sorted((HERE / "app" / "migrations").glob("*.sql")) if int(file.name[:3]) <= schema]


def release_tag(number: int, base: Rootfs, run: str) -> str:
    """``sha-<12 hex>`` of everything that goes into the release's images; here it plays the commit.

    ``run`` makes every run of the demo a new commit: with the builds of an earlier run staging's gate would already be passed.
    """
    code, migrations = release_files(number)
    facts = json.dumps(releases()[number], sort_keys=True)
    return f"sha-{digest_of([*code, *migrations, HERE / 'image' / 'app.Dockerfile'], run, str(number), facts, base.python)[:12]}"


def build_release(number: int, base: Rootfs, repositories: dict[str, str], run: str) -> str:
    """Build both images of a release as ``<repository>:<tag>`` and return the tag."""
    tag = release_tag(number, base, run)
    code, migrations = release_files(number)
    with tempfile.TemporaryDirectory(prefix="shop-") as scratch:
        context = Path(scratch)
        for folder, files in (("app", code), ("migrations", migrations)):
            (context / folder).mkdir()
            for file in files:
                shutil.copyfile(file, context / folder / file.name)
        (context / "app" / "releases.json").write_text(json.dumps({str(number): releases()[number]}))
        # mkdtemp is private; the image's user must be able to read what is copied from it.
        for path in context.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)
        for target, repository in repositories.items():
            arguments = {"ROOTFS": base.python, "RELEASE": str(number), "VERSION": tag}
            build(context, HERE / "image" / "app.Dockerfile", f"{repository}:{tag}", target, **arguments)
    return tag
