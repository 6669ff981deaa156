# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Real databases under write load: taken by their consistency, damaged, given back, started, and compared row for row."""

from __future__ import annotations

import json
import os
import subprocess
import typing as t
from pathlib import Path

import pytest
from snapshot_fixture import ENGINES, MARKS, PREFIX, Store, docker, until

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

pytestmark = MARKS
SECRET = "s3cr3t of the database"

POSTGRES = """
export PATH=/usr/lib/postgresql/15/bin:$PATH PGDATA=/data/pgdata
mkdir -p /run/postgresql $PGDATA; chown -R postgres: /data /run/postgresql
as="setpriv --reuid postgres --regid postgres --init-groups"
printf %s "$SECRET" > /run/secret; chmod 600 /run/secret
if [ ! -e $PGDATA/PG_VERSION ]; then
  chown postgres: /run/secret
  $as initdb --username=owner --pwfile=/run/secret --auth=scram-sha-256 --encoding=UTF8 --locale=C >/dev/null
  chown root: /run/secret
fi
exec $as postgres -c max_wal_size=64MB -c checkpoint_timeout=30s -c unix_socket_directories=/run/postgresql
"""
MARIADB = """
mkdir -p /run/mysqld; chown -R mysql: /data /run/mysqld
[ -e /data/mysql ] || mariadb-install-db --user=mysql --datadir=/data --auth-root-authentication-method=normal >/dev/null
printf %s "$SECRET" > /run/secret
printf "ALTER USER root@localhost IDENTIFIED BY '%s';" "$SECRET" > /run/init.sql; chmod 644 /run/init.sql
exec mariadbd --user=mysql --datadir=/data --init-file=/run/init.sql --skip-networking --socket=/run/mysqld/mysqld.sock
"""
REDIS = 'exec redis-server --dir /data --requirepass "$REDIS_PASSWORD" --appendonly $AOF --save "" --unixsocket /run/redis.sock'


class Served(Store):
    """One app: a database on a volume, uploads on another, and who writes first a row, then a file of its number."""

    def __init__(self, root: Path, kind: str, image: str, name: str) -> None:
        super().__init__(root, kind, name)
        self.image = image
        self.volumes = [f"{name}-db", f"{name}-uploads"]
        self.database, self.writer = f"{name}-db", f"{name}-writer"
        for volume in self.volumes:
            docker("volume", "create", volume)

    def serve(self, script: str, *options: str) -> None:
        volumes = ("-v", f"{self.volumes[0]}:/data", "-v", "/run")
        docker("run", "-d", "--init", "--network", "none", "--name", self.database, *volumes, *options, self.image, "sh", "-c", script)

    def write(self, one: str, *options: str) -> None:
        """A loop that does ONE with $i, then notes its number in the other volume."""
        script = f"trap 'exit 0' TERM; i=$(ls /uploads | sort -n | tail -1); i=${{i:-0}}; while :; do i=$((i+1)); {one} && touch /uploads/$i; done"
        volumes = ("-v", f"{self.volumes[1]}:/uploads", "--volumes-from", f"{self.database}:ro")
        docker("run", "-d", "--network", "none", "--name", self.writer, *volumes, *options, self.image, "sh", "-c", script)

    def inside(self, *argv: str) -> str:
        return docker("exec", self.database, *argv)

    def asks(self, *argv: str) -> t.Callable[[], bool]:
        """Whether a command in the database's container works."""
        return lambda: subprocess.run(["docker", "exec", self.database, *argv], capture_output=True, check=False).returncode == 0

    def uploads(self) -> set[int]:
        return {int(name) for name in os.listdir(self.data(1))}

    def busy(self) -> int:
        """A number whose row was there before this returned; more are written all the time."""
        return until(lambda: len(self.uploads()) > 3 and max(self.uploads()), "the first rows")

    def take_and_return(self, consistency: str, damage: t.Callable[[], t.Any]) -> tuple[int, dict[str, t.Any]]:
        """A set under load, damage, and the set given back with the database running on it; the number that must be in it."""
        least = self.busy()
        taken = self.call("snapshot", set_id="one", volume_options={self.volumes[0]: {"consistency": consistency}})
        manifest = json.loads((self.manifests / "one.manifest.json").read_text())
        assert manifest["parts"][0]["consistency"] == consistency and manifest["parts"][0]["database"]["version"]
        more = max(self.uploads())
        assert until(lambda: max(self.uploads()) > more, "the writer going on")
        damage()
        self.call("restore", set_id="one", containers="leave_stopped", keep_current=False)
        assert self.uploads() and self.leftovers() == []
        docker("start", self.database)
        return least, taken

    def remove(self) -> None:
        subprocess.run(["docker", "rm", "-f", "-v", self.writer, self.database], check=False, capture_output=True)
        subprocess.run(["docker", "volume", "rm", "-f", *self.volumes], check=False, capture_output=True)


@pytest.fixture(params=ENGINES)
def app(request: pytest.FixtureRequest, tmp_path: Path, databases: str) -> t.Iterator[Served]:
    app = Served(tmp_path, request.param, databases, f"{PREFIX}-{abs(hash(request.node.name)) % 100000}")
    try:
        app.open()
        yield app
    finally:
        app.remove()


def psql(app: Served, sql: str) -> str:
    return app.inside("env", f"PGPASSWORD={SECRET}", "psql", "-XAtq", "-U", "owner", "-d", "postgres", "-c", sql)


def test_postgresql_is_taken_by_its_backup_api_without_being_held(app: Served) -> None:
    account = ("-e", f"SECRET={SECRET}", "-e", "POSTGRES_USER=owner", "-e", "POSTGRES_PASSWORD_FILE=/run/secret")
    app.serve(POSTGRES, *account)
    client = ("env", f"PGPASSWORD={SECRET}")
    until(app.asks(*client, "psql", "-U", "owner", "-d", "postgres", "-c", "SELECT 1"), "PostgreSQL")
    psql(app, "CREATE TABLE rows (number int PRIMARY KEY)")
    app.inside(*client, "/usr/lib/postgresql/15/bin/pgbench", "-i", "-q", "-s", "3", "-U", "owner", "postgres")
    load = [*client, "/usr/lib/postgresql/15/bin/pgbench", "-n", "-c", "2", "-T", "600", "-U", "owner", "postgres"]
    docker("exec", "-d", app.database, *load)
    app.write('psql -Xq -U owner -d postgres -c "INSERT INTO rows VALUES ($i)"', "-e", f"PGPASSWORD={SECRET}")
    least, taken = app.take_and_return("postgresql", lambda: psql(app, "DELETE FROM rows; TRUNCATE pgbench_accounts"))
    assert [one["name"] for one in taken["containers"]] == [app.writer] and taken["containers"][0]["freeze_ms"] > 0
    until(app.asks(*client, "psql", "-U", "owner", "-d", "postgres", "-c", "SELECT 1"), "PostgreSQL on the restored files")
    rows = {int(line) for line in psql(app, "SELECT number FROM rows").split()}
    assert rows >= app.uploads() >= set(range(1, least + 1))
    # A row is a moment older than its file; more than the one in flight would be from after the freeze.
    assert len(rows - app.uploads()) <= 1
    told = psql(app, "SELECT sum(abalance) = (SELECT sum(delta) FROM pgbench_history), count(*) FROM pgbench_accounts")
    assert told == "t|300000"
    app.inside(*client, "/usr/lib/postgresql/15/bin/pg_amcheck", "-U", "owner", "--install-missing", "--all", "--heapallindexed")
    assert psql(app, "SELECT count(*) FROM pg_replication_slots") == "0"


def test_mysql_locks_what_is_not_transactional_and_is_frozen(app: Served) -> None:
    app.serve(MARIADB, "-e", f"SECRET={SECRET}", "-e", "MARIADB_ROOT_PASSWORD_FILE=/run/secret")
    client = ("env", f"MYSQL_PWD={SECRET}", "mariadb", "-NB")
    until(app.asks(*client, "-e", "SELECT 1"), "MariaDB")

    def sql(text: str) -> str:
        return app.inside(*client, "test_data", "-e", text)

    app.inside(*client, "-e", "CREATE DATABASE test_data")
    sql("CREATE TABLE counted (number int PRIMARY KEY) ENGINE=InnoDB; CREATE TABLE plain (number int PRIMARY KEY) ENGINE=MyISAM")
    both = '"INSERT INTO plain VALUES ($i); INSERT INTO counted VALUES ($i)"'
    app.write(f"mariadb --socket=/run/mysqld/mysqld.sock test_data -e {both}", "-e", f"MYSQL_PWD={SECRET}")
    least, taken = app.take_and_return("mysql", lambda: sql("DELETE FROM counted; DROP TABLE plain"))
    assert sorted(one["name"] for one in taken["containers"]) == sorted((app.writer, app.database))
    until(app.asks(*client, "-e", "SELECT 1"), "MariaDB on the restored files")
    for table in ("counted", "plain"):
        assert {int(line) for line in sql(f"SELECT number FROM {table}").split()} >= app.uploads() >= set(range(1, least + 1))
        assert sql(f"CHECK TABLE {table} EXTENDED").split("\t")[-1] == "OK"


@pytest.mark.parametrize("log", ["no", "yes"], ids=["dump", "append-only"])
def test_redis_forks_at_the_moment_and_is_not_held(app: Served, log: str) -> None:
    app.serve(REDIS, "-e", f"REDIS_PASSWORD={SECRET}", "-e", f"AOF={log}")
    client = ("env", f"REDISCLI_AUTH={SECRET}", "redis-cli", "-s", "/run/redis.sock")
    until(app.asks(*client, "PING"), "Redis")
    app.write("redis-cli -s /run/redis.sock SADD rows $i >/dev/null", "-e", f"REDISCLI_AUTH={SECRET}")
    least, taken = app.take_and_return("redis", lambda: app.inside(*client, "FLUSHALL"))
    assert [one["name"] for one in taken["containers"]] == [app.writer]
    until(lambda: app.inside(*client, "PING") == "PONG", "Redis on the restored files")
    rows = {int(line) for line in app.inside(*client, "SMEMBERS", "rows").split()}
    assert rows >= app.uploads() >= set(range(1, least + 1)) and len(rows - app.uploads()) <= 1


def test_sqlite_is_copied_while_frozen_and_proved_to_be_whole(app: Served) -> None:
    app.serve("sqlite3 /data/app.db 'PRAGMA journal_mode=WAL; CREATE TABLE IF NOT EXISTS rows (number int PRIMARY KEY)'; exec sleep 1000")
    client = ("sqlite3", "-cmd", ".timeout 10000", "/data/app.db")
    until(app.asks(*client, "SELECT count(*) FROM rows"), "the table")
    # Who writes needs the database's volume writable.
    docker("rm", "-f", app.database)
    script = "trap 'exit 0' TERM; i=0; while :; do i=$((i+1)); sqlite3 -cmd '.timeout 10000' /data/app.db \"INSERT INTO rows VALUES ($i)\" && touch /uploads/$i; done"
    volumes = ("-v", f"{app.volumes[0]}:/data", "-v", f"{app.volumes[1]}:/uploads")
    docker("run", "-d", "--network", "none", "--name", app.database, *volumes, app.image, "sh", "-c", script)

    def damage() -> None:
        docker("stop", "-t", "5", app.database)
        for path in app.data(0).glob("app.db*"):
            path.write_bytes(b"damaged")

    least, _taken = app.take_and_return("sqlite", damage)
    docker("stop", "-t", "5", app.database)
    said = docker(
        "run", "--rm", "--network", "none", *volumes, app.image, *client, "PRAGMA integrity_check; SELECT number FROM rows"
    ).split()
    assert said[0] == "ok" and {int(line) for line in said[1:]} >= app.uploads() >= set(range(1, least + 1))

    # A damaged one is told now, not when it is needed; it takes someone to hold, as at rest nobody copies it.
    docker("run", "-d", "--network", "none", "--name", app.writer, *volumes, app.image, "sleep", "1000")
    with (app.data(0) / "app.db").open("r+b") as handle:
        handle.seek(4096)
        handle.write(b"\xff" * 4096)
    with pytest.raises(DeliveryError, match=r"check the SQLite database app\.db"):
        app.call("snapshot", set_id="two", volume_options={app.volumes[0]: {"consistency": "sqlite"}})
    assert app.sets() == {"one": True}


def test_what_cannot_be_asked_is_refused_before_anything_is_touched(app: Served) -> None:
    app.serve(REDIS, "-e", f"REDIS_PASSWORD={SECRET}", "-e", "AOF=no")
    options = {app.volumes[0]: {"consistency": "postgresql"}}
    with pytest.raises(DeliveryError, match="talk to the database in"):
        app.call("snapshot", set_id="one", volume_options=options)
    with pytest.raises(DeliveryError, match="no container of a service other"):
        app.call("snapshot", set_id="one", volume_options={app.volumes[0]: {"consistency": "redis", "service": "other"}})
    with pytest.raises(DeliveryError, match="options for nothing"):
        app.call("snapshot", set_id="one", volume_options={"nothing": {"consistency": "redis"}})
    # Nothing that could write runs: its files are at rest, and there is nobody to ask.
    docker("stop", app.database)
    assert app.call("snapshot", set_id="rest", volume_options={app.volumes[0]: {"consistency": "redis"}})["changed"]
    assert app.sets() == {"rest": True}
