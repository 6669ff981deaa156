# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

from __future__ import annotations

import datetime
import typing as t
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.data import metrics
from ansible_collections.selfhost.delivery.plugins.module_utils.data.choice import choose, moment, plan_lines, size, table
from ansible_collections.selfhost.delivery.plugins.module_utils.data.retention import retained
from ansible_collections.selfhost.delivery.plugins.module_utils.data.scratch import LABEL, scratch_project
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

NOW = datetime.datetime(2026, 11, 29, 9, 0, tzinfo=datetime.timezone.utc)


def a_set(set_id: str, created: str, complete: bool = True, replaces: str = "") -> dict[str, t.Any]:
    parts = [
        {"kind": "volume", "name": "shop_data", "files": 1200, "bytes": 2_000_000},
        {"kind": "volume", "name": "shop_uploads", "files": 3, "bytes": 10},
        {"kind": "path", "name": "/opt/shop/.env", "files": 1, "bytes": 9},
    ]
    return {
        "set_id": set_id, "created": created, "complete": complete, "why_incomplete": "" if complete else "its taking did not end",
        "replaces": replaces, "metadata": {"app": "shop", "tag": "sha-abc"}, "files": 1204, "bytes": 2_000_019, "parts": parts,
    }  # fmt: skip


SETS = [
    a_set("scheduled-4", "2026-11-29T08:58:30.500Z"),
    a_set("replaced-1", "2026-11-29T08:00:00.000Z", replaces="scheduled-1"),
    a_set("broken-3", "2026-11-28T10:00:00.123456789Z", complete=False),
    a_set("scheduled-2", "2026-11-28T09:00:00.000Z"),
    a_set("scheduled-1", "2026-11-01T03:00:00.000Z"),
]


def test_the_table_says_what_each_set_is() -> None:
    head, newest, _replaced, broken, *_older, oldest = table(list(reversed(SETS)), NOW, "shop")
    assert head.split() == ["set", "age", "size", "files", "release", "holds"]
    assert newest.split() == ["scheduled-4", "89", "s", "2.0", "MB", "1,204", "sha-abc", "data,", "uploads,", "1", "path", "complete"]
    assert "INCOMPLETE: its taking did not end" in broken and " 28 d " in oldest
    assert len({line.index("sha-abc") for line in (newest, broken, oldest)}) == 1, "columns stand below each other"


@pytest.mark.parametrize(
    ("snapshot", "at", "found"),
    [
        ("latest", "", "scheduled-4"),
        ("replaced-1", "", "replaced-1"),
        ("", "2026-11-28 09:00", "scheduled-2"),
        ("", "2026-11-28T08:59:59Z", "scheduled-1"),
        ("", "2026-11-28 10:00 +01:00", "scheduled-2"),
        ("", "2026-11-29 08:30", "scheduled-2"),  # what a restore replaced is asked for by its id
    ],
)
def test_a_set_is_found_by_id_as_the_newest_and_by_time(snapshot: str, at: str, found: str) -> None:
    assert choose(SETS, snapshot, at).found["set_id"] == found


@pytest.mark.parametrize(
    ("snapshot", "at", "volumes", "says"),
    [
        ("scheduled-5", "", [], "did you mean scheduled-4?"),
        ("broken-3", "", [], "its taking did not end"),
        ("", "2026-10-01 00:00", [], "no complete set is that old"),
        ("", "noon", [], "Reading the time 'noon'"),
        ("latest", "2026-11-28 09:00", [], "both snapshot and at"),
        ("", "", [], "neither snapshot nor at"),
        ("latest", "", ["upload"], "does not hold the volume upload; did you mean uploads?. Its volumes are data, uploads"),
    ],
)
def test_what_is_not_there_is_refused_by_name(snapshot: str, at: str, volumes: list[str], says: str) -> None:
    with pytest.raises(DeliveryError, match=".*") as refused:
        choose(SETS, snapshot, at, volumes, project="shop")
    assert says in refused.value.message


def test_the_plan_names_what_is_replaced_kept_left_and_stopped() -> None:
    choice = choose(SETS, "", "2026-11-28 09:00", ["uploads"], project="shop")
    assert choice.volumes == ["shop_uploads"]
    planned = {"changed": True, "restored": [choice.found["parts"][1]], "containers": [{"name": "shop-web-1", "found": "running"}]}
    said = "\n".join(plan_lines(choice, planned, NOW))
    wanted = ("24 h ago", "volume shop_uploads by 3 files", "left as it is: shop_data, /opt/shop/.env", "replaced-scheduled-2-<time>", "shop-web-1 (running)")
    assert [fragment for fragment in wanted if fragment not in said] == []
    assert "nothing to do" in plan_lines(choice, {"changed": False}, NOW)[-1]


def test_sizes_and_times() -> None:
    assert [size(number) for number in (0, 999, 1500, 2_500_000, 999_000_000, 3_210_000_000_000)] == ["0 B", "999 B", "2 kB", "2.5 MB", "999 MB", "3.2 TB"]
    assert moment("2026-11-28 09:00") == moment("2026-11-28 10:00:00+01:00") == moment("2026-11-28T09:00:00.000000000Z")


def test_retention_keeps_the_newest_of_each_period_and_spends_nothing_on_empty_ones() -> None:
    days = [NOW - datetime.timedelta(days=number, hours=hour) for number in (0, 1, 2, 9, 40) for hour in (0, 1)]
    taken = [(day.strftime("%m%d-%H"), day) for day in days]
    assert retained(taken, {}) == set()
    assert retained(taken, {"last": 2}) == {"1129-09", "1129-08"}
    assert retained(taken, {"daily": 4}) == {"1129-09", "1128-09", "1127-09", "1120-09"}
    assert retained(taken, {"last": 1, "monthly": 5}) == {"1129-09", "1020-09"}


MODEL: dict[str, t.Any] = {
    "services": {
        "web": {"image": "web", "ports": [{"target": 80}], "depends_on": {"db": {"condition": "service_healthy"}}},
        "db": {
            "image": "db", "restart": "always", "container_name": "shop-db", "privileged": True, "network_mode": "host", "labels": {"traefik.enable": "true"},
            "ports": [{"target": 5432, "published": "5432"}], "environment": {"A": "b"}, "secrets": [{"source": "key"}],
            "networks": {"back": {"aliases": ["database"]}},
            "volumes": [
                {"type": "volume", "source": "data", "target": "/data"},
                {"type": "volume", "source": "other", "target": "/other"},
                {"type": "bind", "source": "/opt/shop/conf/db.conf", "target": "/etc/db.conf", "read_only": True},
                {"type": "bind", "source": "/srv/spool", "target": "/spool"},
                {"type": "bind", "source": "/var/run/docker.sock", "target": "/var/run/docker.sock"},
                {"type": "tmpfs", "target": "/tmp"},
            ],
        },
        "mail": {"image": "mail"},
    },
    "volumes": {"data": {"name": "shop_data"}, "other": {"name": "shop_other"}},
    "secrets": {"key": {"file": "/opt/shop/conf/key"}, "unused": {"external": True}},
}  # fmt: skip


def test_a_scratch_project_reaches_nothing_of_the_app(tmp_path: Path) -> None:
    (tmp_path / "conf").mkdir()
    for name in ("db.conf", "key"):
        (tmp_path / "conf" / name).write_text("")
    made = scratch_project(MODEL, "drill-shop", ["web"], {"shop_data": "/box/data"}, {"/opt/shop": str(tmp_path)}, "/box/empty")
    services = made.model["services"]
    assert sorted(services) == ["db", "web"], "what it depends on, and no more"
    database = services["db"]
    assert not {"ports", "container_name", "privileged", "network_mode"} & set(database)
    assert (database["restart"], database["labels"], database["networks"]) == ("no", {LABEL: "drill-shop"}, {"default": {"aliases": ["database"]}})
    assert made.model["networks"] == {"default": {"internal": True, "labels": {LABEL: "drill-shop"}}}
    volumes = made.model["volumes"]
    assert volumes["data"]["driver_opts"] == {"type": "none", "o": "bind", "device": "/box/data"}
    assert volumes["other"] == {"name": "drill-shop_other", "labels": {LABEL: "drill-shop"}}
    assert [mount.get("source") for mount in database["volumes"]] == ["data", "other", str(tmp_path / "conf" / "db.conf"), "/box/empty/srv_spool", None]
    assert made.model["secrets"] == {"key": {"file": str(tmp_path / "conf" / "key")}}
    said = "\n".join(made.notes)
    assert "empty volume other" in said and "does not hold /srv/spool" in said and "does not get /var/run/docker.sock" in said
    with pytest.raises(DeliveryError, match="no service cache; it has db, mail, web"):
        scratch_project(MODEL, "drill-shop", ["cache"], {}, {}, "/box")


def test_metrics_are_what_the_textfile_collector_reads(tmp_path: Path) -> None:
    values = {"a_seconds": ("How long.", 1.5), "a_bytes": ("How much.", 1234567890123.0), "none": ("Nothing.", None)}
    path = metrics.write(str(tmp_path), "drill", values, {"app": 'sh"op'})
    assert Path(path).read_text() == (
        '# HELP a_seconds How long.\n# TYPE a_seconds gauge\na_seconds{app="sh\\"op"} 1.5\n'
        '# HELP a_bytes How much.\n# TYPE a_bytes gauge\na_bytes{app="sh\\"op"} 1234567890123\n'
    )
    assert metrics.write(str(tmp_path / "gone"), "drill", values, {}) == ""
