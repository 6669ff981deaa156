# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""A repository of snapshots, for what works with either engine."""

from __future__ import annotations

import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import (
    ENGINES,
    Settings,
    SnapshotEngine,
    choose_engine,
    engine_from,
    password_of,
    program_of,
)

ARGUMENTS: dict[str, t.Any] = {
    "engine": {"type": "str", "choices": ["auto", *ENGINES], "default": "auto"},
    "repository": {"type": "str", "required": True},
    "password": {"type": "str", "no_log": True},
    "password_file": {"type": "path", "no_log": False},
    "config_dir": {"type": "path", "default": "/var/lib/selfhost-delivery/engine"},
    "program": {"type": "path"},
    "env": {"type": "dict", "no_log": True},
    "repository_id": {"type": "str"},
    "read_only": {"type": "bool", "default": False},
    "cache_mb": {"type": "int"},
    "manifest_dir": {"type": "path", "required": True},
}


def engine_of(params: t.Mapping[str, t.Any]) -> SnapshotEngine:
    """The engine that ``params`` (as ``ARGUMENTS``) describe; raises ``DeliveryError``."""
    repository = str(params["repository"])
    repository = (repository.rstrip("/") or "/") if repository.startswith("/") else repository
    kind = choose_engine(params.get("engine") or "auto", repository, {name: program_of(name) for name in ENGINES})
    return engine_from(
        kind,
        Settings(
            repository=repository,
            password=password_of(params.get("password"), params.get("password_file")),
            config_dir=params.get("config_dir") or "",
            program=params.get("program") or "",
            env={key: str(value) for key, value in (params.get("env") or {}).items()},
            repository_id=params.get("repository_id") or "",
            read_only=bool(params.get("read_only")),
            cache_mb=params.get("cache_mb"),
        ),
    )
