# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The shop's worker: keeps one row per customer with the number and the sum of their orders.

It writes only what differs, so a shop without new orders has a database that does not change.
SIGTERM ends it between two rounds.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

import psycopg2
from database import Pool

ROUND = """
INSERT INTO customers (customer, orders, total_cents)
SELECT customer, count(*), sum(total_cents) FROM orders GROUP BY customer
ON CONFLICT (customer) DO UPDATE SET orders = excluded.orders, total_cents = excluded.total_cents
WHERE (customers.orders, customers.total_cents) IS DISTINCT FROM (excluded.orders, excluded.total_cents)
"""


def main() -> int:
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stopped.set())
    pool = Pool(1)
    trouble = ""
    print(f"worker of release {os.environ['SHOP_RELEASE']} ({os.environ['SHOP_VERSION']}) works", flush=True)
    while not stopped.is_set():
        try:
            with pool.cursor() as cursor:
                cursor.execute(ROUND)
            trouble = ""
        except psycopg2.Error as error:
            # The database may be away or not yet migrated; that passes, and it is said once.
            if str(error) != trouble:
                print(f"waiting: {str(error).strip()}", flush=True)
            trouble = str(error)
        stopped.wait(1)
    print("worker stopped", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
