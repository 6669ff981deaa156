# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The shop's database: where it is (from the environment), and a small pool of connections."""

from __future__ import annotations

import contextlib
import os
import queue
import select
import typing as t

import psycopg2
import psycopg2.extensions


def connect() -> psycopg2.extensions.connection:
    """One connection in autocommit mode; the settings come from the env file of the environment."""
    connection = psycopg2.connect(
        host=os.environ.get("POSTGRES_HOST", "db"),
        dbname=os.environ.get("POSTGRES_DB", "shop"),
        user=os.environ.get("POSTGRES_USER", "shop"),
        password=os.environ["POSTGRES_PASSWORD"],
        connect_timeout=5,
        application_name=f"shop {os.environ.get('SHOP_VERSION', '')}",
    )
    connection.autocommit = True
    return connection


class Pool:
    """At most ``size`` connections, made when first wanted; a request waits for a free one.

    A connection that the server closed meanwhile, or on which anything went wrong, is thrown away: after a restart of the database
    the next request gets a new one.
    """

    def __init__(self, size: int = 8) -> None:
        self._free: queue.LifoQueue[psycopg2.extensions.connection | None] = queue.LifoQueue()
        for _unused in range(size):
            self._free.put(None)

    @contextlib.contextmanager
    def cursor(self) -> t.Iterator[psycopg2.extensions.cursor]:
        connection = self._free.get()
        try:
            if connection is None or connection.closed or said_goodbye(connection):
                connection = connect()
            with connection.cursor() as cursor:
                yield cursor
        except psycopg2.Error:
            if connection is not None:
                with contextlib.suppress(psycopg2.Error):
                    connection.close()
            connection = None
            raise
        finally:
            self._free.put(connection)


def said_goodbye(connection: psycopg2.extensions.connection) -> bool:
    """The server sent something on an idle connection; it has nothing to say there but that it ends."""
    readable, _writable, _failed = select.select([connection.fileno()], [], [], 0)
    return bool(readable)
