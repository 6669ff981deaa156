# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The ground the demo stands on: its folders and ports, its containers, its database, the answers of its public route, and its end."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
import typing as t
from pathlib import Path

import images

ENVIRONMENTS = ("staging", "production")


@dataclasses.dataclass(frozen=True)
class Stage:
    """Where this demo lives; every value can be set by an environment variable of the same meaning (see Makefile)."""

    folder: Path
    cache: Path
    name: str
    registry_port: int
    ports: dict[str, int]

    @classmethod
    def from_environment(cls) -> Stage:
        stage = cls(
            folder=Path(os.environ.get("DEMO_DIR") or "/opt/selfhost-delivery-demo"),
            cache=Path(os.environ.get("DELIVERY_CACHE") or Path.home() / ".cache" / "selfhost-delivery"),
            name=os.environ.get("DEMO_NAME") or "delivery-demo",
            registry_port=int(os.environ.get("DEMO_REGISTRY_PORT") or 15443),
            ports={
                "staging": int(os.environ.get("DEMO_STAGING_PORT") or 18081),
                "production": int(os.environ.get("DEMO_PRODUCTION_PORT") or 18080),
            },
        )
        # The inventories read the same variables; what was not set gets its default there through here.
        os.environ.update(
            DEMO_DIR=str(stage.folder),
            DEMO_NAME=stage.name,
            DEMO_REGISTRY_PORT=str(stage.registry_port),
            DEMO_STAGING_PORT=str(stage.ports["staging"]),
            DEMO_PRODUCTION_PORT=str(stage.ports["production"]),
        )
        return stage

    @property
    def registry(self) -> str:
        return f"127.0.0.1:{self.registry_port}"

    def repository(self, image: str) -> str:
        """Where this demo's CI pushes an image of the shop."""
        return f"{self.registry}/ci/shop/{image}"

    def project(self, environment: str) -> str:
        return f"{self.name}-{environment}"

    def deploy_dir(self, environment: str) -> Path:
        return self.folder / environment


def docker(*arguments: str, **options: t.Any) -> str:
    return images.run_program(["docker", *arguments], **options)


def taken_ports(stage: Stage) -> list[int]:
    """Ports the demo wants that some other program has; ask after ``reset``, which frees those of the edges."""
    wanted = list(stage.ports.values())
    if not own_processes(stage.folder / "registry"):
        wanted.append(stage.registry_port)
    found = []
    for port in wanted:
        with socket.socket() as probe:
            # As servers do: connections that have just ended do not count.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                found.append(port)
    return found


# What is there before the first playbook --------------------------------------------------------------------------------


def write_private(path: Path, text: str) -> None:
    """A file that only its owner can read, from its first byte on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(f"{path}.part", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as stream:
        stream.write(text)
    os.replace(f"{path}.part", path)


def keep_secrets(stage: Stage) -> dict[str, str]:
    """Passwords of this machine's demo, made once; the inventories read the same file (JSON is YAML)."""
    path = stage.folder / "secrets.yml"
    stage.folder.mkdir(parents=True, exist_ok=True)
    # The registry's own account has to get to its folder.
    stage.folder.chmod(0o755)
    if not path.exists():
        names = ("registry_password", "snapshots_password", "staging_database_password", "production_database_password")
        write_private(path, json.dumps({name: secrets.token_urlsafe(24) for name in names}) + "\n")
    return t.cast("dict[str, str]", json.loads(path.read_text()))


def write_env_files(stage: Stage, database_image: str) -> None:
    """The long-lived settings of the shop, as an administrator writes them once on each host."""
    passwords = keep_secrets(stage)
    for environment in ENVIRONMENTS:
        settings = {
            "SHOP_ENVIRONMENT": environment,
            "POSTGRES_USER": "shop",
            "POSTGRES_DB": "shop",
            "POSTGRES_PASSWORD": passwords[f"{environment}_database_password"],
            "DB_IMAGE": database_image,
        }
        if environment == "staging":
            # Release 3 needs it. In production it was forgotten: that is why the release never gets ready there.
            settings["MAIL_FROM"] = "shop@staging.example.com"
        folder = stage.deploy_dir(environment)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o750)
        write_private(folder / f".env.{environment}", "".join(f"{key}={value}\n" for key, value in settings.items()))


def push(stage: Stage, names: list[str]) -> None:
    """What CI does after a build: push to the registry, with CI's own login."""
    login = base64.b64encode(f"ci:{keep_secrets(stage)['registry_password']}".encode()).decode()
    folder = stage.folder / "ci-docker"
    write_private(folder / "config.json", json.dumps({"auths": {stage.registry: {"auth": login}}}))
    for name in names:
        docker("push", "--quiet", name, env={**os.environ, "DOCKER_CONFIG": str(folder)})


# What can be asked while it runs ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Answer:
    status: int
    version: str
    text: str

    def __str__(self) -> str:
        return f"{self.status or 'no answer'} {self.version or self.text}".strip()


def ask(port: int, path: str = "/api/ready") -> Answer:
    """One question to the public route, through the edge."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        text = response.read().decode(errors="replace")
    except (OSError, http.client.HTTPException) as error:
        return Answer(0, "", f"{type(error).__name__}: {error}")
    finally:
        connection.close()
    with contextlib.suppress(ValueError, AttributeError):
        return Answer(response.status, json.loads(text).get("version", ""), text.strip())
    return Answer(response.status, "", text.strip()[:200])


def containers(project: str, service: str = "", everything: bool = False) -> list[dict[str, str]]:
    """Name, image and state of a project's containers, by its Compose labels."""
    labels = [f"label=com.docker.compose.project={project}", *([f"label=com.docker.compose.service={service}"] if service else [])]
    command = ["ps", "--no-trunc", "--format", "{{.Names}}\t{{.Image}}\t{{.State}}", *(["--all"] if everything else [])]
    for label in labels:
        command += ["--filter", label]
    return [dict(zip(("name", "image", "state"), line.split("\t"))) for line in docker(*command).splitlines()]


class Database:
    """The PostgreSQL of one environment, asked from inside its container."""

    def __init__(self, project: str) -> None:
        self._project = project

    def query(self, sql: str) -> str:
        # By label each time: a release or a restore may have made another container.
        found = containers(self._project, "db")
        if not found:
            raise images.ImageError(f"no database container runs in {self._project}")
        command = ["exec", "--interactive", found[0]["name"], "psql", "-XqAt", "-v", "ON_ERROR_STOP=1", "-U", "shop", "-d", "shop"]
        return docker(*command, input=sql)

    def number(self, sql: str) -> int:
        return int(self.query(sql).strip())

    def dump(self) -> dict[str, list[str]]:
        """Every row of every table in a fixed order, and the columns, so that two states can be held against each other."""
        state = {
            "(columns)": self.query(
                "SELECT table_name, column_name, data_type, is_nullable, column_default FROM information_schema.columns"
                " WHERE table_schema = 'public' ORDER BY table_name, ordinal_position"
            ).splitlines()
        }
        for table in self.query("SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY tablename").split():
            state[table] = self.query(f'SELECT row::text FROM "{table}" AS row ORDER BY row::text COLLATE "C"').splitlines()
        return state

    def import_orders(self, number: int) -> None:
        """Orders of the old shop: they have a total and no price. Only production has such rows."""
        self.query(
            "INSERT INTO orders (customer, item, total_cents)"
            f" SELECT 'imported-' || i % 97, 'old shop ' || i, 100 + i % 4999 FROM generate_series(1, {number}) AS i"
        )

    def settle(self, seconds: float = 30.0) -> None:
        """Wait until the worker has written what follows from the orders; from then on nothing changes any more."""
        deadline = time.monotonic() + seconds
        behind = "SELECT (SELECT coalesce(sum(total_cents), 0) FROM orders) - (SELECT coalesce(sum(total_cents), 0) FROM customers)"
        while self.number(behind):
            if time.monotonic() > deadline:
                raise images.ImageError(f"the worker of {self._project} did not catch up within {seconds:.0f} seconds")
            time.sleep(0.2)


# Its end ----------------------------------------------------------------------------------------------------------------


def remove_project(project: str) -> None:
    """Containers, networks and volumes of one Compose project, and nothing else."""
    label = f"label=com.docker.compose.project={project}"
    for kind, listing, removal in (
        ("container", ["ps", "--all", "--quiet"], ["rm", "--force", "--volumes"]),
        ("network", ["network", "ls", "--quiet"], ["network", "rm"]),
        ("volume", ["volume", "ls", "--quiet"], ["volume", "rm", "--force"]),
    ):
        found = docker(*listing, "--filter", label).split()
        if found:
            docker(*removal, *found)
            print(f"  removed of {project}: {len(found)} {kind}{'s' if len(found) > 1 else ''}")


def remove_images(stage: Stage, rootfs: bool) -> None:
    """Release images of the demo, with the root file systems too when asked."""
    rows = []
    for form in ("{{.Repository}}:{{.Tag}}\t{{.ID}}", "{{.Repository}}@{{.Digest}}\t{{.ID}}"):
        rows += docker("images", "--digests", "--format", form, "--filter", f"label={images.LABEL}").splitlines()
    ours = set()
    for row in rows:
        name, identity = row.split("\t")
        if name.startswith(f"{stage.registry}/") or "<none>" in name:
            ours.add(identity if "<none>" in name else name)
        elif rootfs and name.startswith("selfhost-delivery-demo/"):
            ours.add(name)
    for name in sorted(ours):
        # One image has several names here; with its last one it is gone, and the next name with it.
        subprocess.run(["docker", "rmi", "--force", name], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


def own_processes(folder: Path) -> list[int]:
    """Processes of the pid files below ``folder`` that were really started from there; an id alone may be somebody else's by now."""
    found = []
    for file in folder.rglob("*.pid"):
        with contextlib.suppress(OSError, ValueError):
            pid = int(file.read_text().split()[0])
            if os.fsencode(folder) + b"/" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def stop_processes(folder: Path) -> None:
    """The registry, the edges, a load generator that outlived its demo: as units where systemd runs them, else by their pid files."""
    for unit in Path("/etc/systemd/system").glob("*.service"):
        if f"{folder}/" in unit.read_text(errors="replace"):
            subprocess.run(["systemctl", "disable", "--now", "--quiet", unit.name], check=False)
            unit.unlink(missing_ok=True)
            subprocess.run(["systemctl", "daemon-reload"], check=False)
            print(f"  removed the unit {unit.name}")
    pids = own_processes(folder)
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in own_processes(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        deadline = time.monotonic() + 10
        while own_processes(folder) and time.monotonic() < deadline:
            time.sleep(0.1)
    if pids:
        print(f"  stopped {len(pids)} process{'es' if len(pids) > 1 else ''} of {folder}")


def forget_snapshots(stage: Stage) -> None:
    """The snapshot repositories, and what the engines remember of them on this host (they refuse a repository that came back empty)."""
    memory = Path("/var/lib/selfhost-delivery/engine")
    for environment in ENVIRONMENTS:
        key = hashlib.sha256(os.fsencode(stage.folder / "snapshots" / environment)).hexdigest()[:16]
        for engine in ("kopia", "restic"):
            shutil.rmtree(memory / f"{engine}-{key}", ignore_errors=True)
    for folder in (memory, memory.parent):
        with contextlib.suppress(OSError):
            folder.rmdir()
    shutil.rmtree(stage.folder / "snapshots", ignore_errors=True)


def reset(stage: Stage) -> None:
    """Both environments as if they had never been; registry, root file systems and secrets stay."""
    for room in ("load", "edge"):
        stop_processes(stage.folder / room)
    for environment in ENVIRONMENTS:
        remove_project(stage.project(environment))
    forget_snapshots(stage)
    for room in ("load", "edge", *ENVIRONMENTS):
        shutil.rmtree(stage.folder / room, ignore_errors=True)
    remove_images(stage, rootfs=False)


def down(stage: Stage, keep_cache: bool) -> None:
    """Nothing of the demo is left on this machine, but for the cached root file systems when they are to be kept."""
    stop_processes(stage.folder)
    if images.engine_answers():
        for environment in ENVIRONMENTS:
            remove_project(stage.project(environment))
        remove_images(stage, rootfs=True)
    else:
        print("  no engine answers: containers, volumes and images of the demo, if any, are still on its disk")
    forget_snapshots(stage)
    shutil.rmtree(stage.folder, ignore_errors=True)
    if not keep_cache:
        for pattern in ("*-rootfs-*.tar", "rootfs-*.json"):
            for file in stage.cache.glob(pattern):
                file.unlink()
        with contextlib.suppress(OSError):
            stage.cache.rmdir()
