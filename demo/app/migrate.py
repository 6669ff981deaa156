# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Bring the database to the schema of this build: each ``migrations/NNN_name.sql`` once, in order, each in its own transaction.

What ran is in the table ``schema_migrations``. An advisory lock keeps two migrators apart. Exit code 0 when the schema is there.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import psycopg2
from database import connect

#: Any number that nothing else in this database uses as an advisory lock.
LOCK = 7_311_946_002


def migrate(folder: Path) -> None:
    files = sorted(folder.glob("[0-9][0-9][0-9]_*.sql"))
    connection = connect()
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_advisory_lock(%s)", (LOCK,))
        cursor.execute(
            "CREATE TABLE IF NOT EXISTS schema_migrations"
            " (number integer PRIMARY KEY, name text NOT NULL, sha256 text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now())"
        )
        cursor.execute("SELECT number, sha256 FROM schema_migrations")
        done = dict(cursor.fetchall())
        for file in files:
            number = int(file.name[:3])
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            if number in done:
                if done[number] != sha256:
                    raise SystemExit(f"{file.name} was changed after it was applied; write a new migration instead")
                continue
            print(f"applying {file.name}", flush=True)
            # The migration and the row that says it ran are one transaction.
            connection.autocommit = False
            try:
                cursor.execute(file.read_text())
                cursor.execute("INSERT INTO schema_migrations (number, name, sha256) VALUES (%s, %s, %s)", (number, file.name, sha256))
                connection.commit()
            except BaseException:
                connection.rollback()
                raise
            finally:
                connection.autocommit = True
    connection.close()
    print(f"schema is {max(int(file.name[:3]) for file in files)}", flush=True)


if __name__ == "__main__":
    try:
        migrate(Path(__file__).parent / "migrations")
    except psycopg2.Error as error:
        sys.exit(f"migration failed: {str(error).strip()}")
