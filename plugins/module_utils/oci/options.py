# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How to reach registries: the options all registry modules share."""

from __future__ import annotations

import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

#: Shared part of an argument spec; documented in plugins/doc_fragments/registry.py.
CONNECTION_ARGUMENTS: dict[str, t.Any] = {
    "docker_config": {"type": "path"},
    "ca_path": {"type": "path"},
    "client_cert": {"type": "path"},
    "client_key": {"type": "path"},
    "validate_certs": {"type": "bool", "default": True},
    "plain_http": {"type": "bool", "default": False},
    "retries": {"type": "int", "default": 3},
    "timeout": {"type": "float", "default": 60.0},
    "concurrency": {"type": "int", "default": 4},
}
#: Questions have no body to speak of, and each costs a wait: so many of them go beside each other for one blob that flows.
_QUESTIONS_PER_BLOB = 4
CREDENTIAL_ARGUMENTS: dict[str, t.Any] = {
    "username": {"type": "str"},
    "password": {"type": "str", "no_log": True},
    "token": {"type": "str", "no_log": True},
}
REGISTRY_ARGUMENTS: dict[str, t.Any] = {**CREDENTIAL_ARGUMENTS, **CONNECTION_ARGUMENTS}

#: One side of a promotion: its credentials, and what differs from the module's own connection options.
SIDE_ARGUMENTS: dict[str, t.Any] = {
    "type": "dict",
    "options": {
        **CREDENTIAL_ARGUMENTS,
        "docker_config": {"type": "path"},
        "ca_path": {"type": "path"},
        "client_cert": {"type": "path"},
        "client_key": {"type": "path"},
        "validate_certs": {"type": "bool"},
        "plain_http": {"type": "bool"},
    },
    "required_together": [("username", "password")],
    "mutually_exclusive": [("username", "token")],
}


@dataclass(frozen=True)
class ClientOptions:
    """Plain values; ``timeout`` in seconds for each wait on the network, ``concurrency`` in blobs that flow side by side."""

    username: str | None = None
    password: str | None = None
    token: str | None = None
    docker_config: str | None = None
    ca_path: str | None = None
    client_cert: str | None = None
    client_key: str | None = None
    validate_certs: bool = True
    plain_http: bool = False
    retries: int = 3
    timeout: float = 60.0
    concurrency: int = 4

    def __post_init__(self) -> None:
        if bool(self.username) != bool(self.password):
            raise _refusal("username and password only go together", "Give both, or neither and log in with a Docker config file.")
        if self.token and self.username:
            raise _refusal("token and username exclude each other", "Give one of the two.")
        if self.client_key and not self.client_cert:
            raise _refusal("client_key is given without client_cert", "Give both, or a client_cert that holds its key.")
        if self.retries < 0 or self.timeout <= 0 or not 1 <= self.concurrency <= 64:
            raise _refusal(
                f"retries {self.retries}, timeout {self.timeout}, concurrency {self.concurrency}",
                "retries is 0 or more, timeout more than 0 seconds, concurrency 1 to 64.",
            )

    @property
    def questions(self) -> int:
        """How many questions a registry gets at a time."""
        return self.concurrency * _QUESTIONS_PER_BLOB

    def __repr__(self) -> str:
        # Tracebacks and logs show this object; they must not show what is in it.
        return f"ClientOptions(username={self.username!r}, plain_http={self.plain_http}, validate_certs={self.validate_certs})"


def client_options_from(params: t.Mapping[str, t.Any], prefix: str = "") -> ClientOptions:
    """Build options from module parameters.

    With ``prefix`` (``source_``, ``destination_``) credentials come from the dict ``<prefix>auth``, whose keys also
    win over the module's own ``docker_config``, ``ca_path``, ``client_cert`` (with its ``client_key``),
    ``validate_certs`` and ``plain_http``.
    Raises ``DeliveryError`` (config) for combinations that mean nothing.
    """
    values = {name: params[name] for name in CONNECTION_ARGUMENTS if params.get(name) is not None}
    own: t.Mapping[str, t.Any] = (params.get(f"{prefix}auth") or {}) if prefix else {key: params.get(key) for key in CREDENTIAL_ARGUMENTS}
    if own.get("client_cert"):
        # The key of another certificate does not fit.
        values.pop("client_key", None)
    values.update({key: value for key, value in own.items() if value is not None})
    return ClientOptions(**values)


def _refusal(seen: str, remedy: str) -> DeliveryError:
    return DeliveryError("read the registry options", seen, remedy, "config")
