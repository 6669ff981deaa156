# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""JMESPath over a JSON document that must be true, and what was there when it is not."""

from __future__ import annotations

import json
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.outcomes import NotReady


def compile_query(expression: str, path: str) -> t.Any:
    try:
        import jmespath  # only where a query asks for it: app hosts need not have it
        import jmespath.exceptions
    except ImportError as exc:
        raise DeliveryError(
            path,
            "the Python library jmespath is missing on the host that asks",
            "Install python3-jmespath there (the playbook setup does), or leave `query` out.",
        ) from exc
    try:
        return jmespath.compile(expression)
    except (jmespath.exceptions.JMESPathError, ValueError) as exc:
        raise DeliveryError(path, f"{expression!r} is not JMESPath ({str(exc).splitlines()[0].rstrip(':')})") from exc


def must_be_true(compiled: t.Any, document: t.Any) -> None:
    """Return when it is, else ``NotReady`` with the values that the expression speaks of."""
    import jmespath.exceptions

    try:
        result = compiled.search(document)
    except jmespath.exceptions.JMESPathError as exc:
        raise NotReady(f"JMESPath `{compiled.expression}` cannot be asked of this body: {str(exc).splitlines()[0]}") from exc
    # False as JMESPath means it: false, null and everything empty; the number 0 is true.
    if result is None or result is False or (isinstance(result, (str, list, dict)) and not result):
        values = ", ".join(f"{name} is {_value(value)}" for name, value in _fields(compiled.parsed, document).items())
        raise NotReady(f"JMESPath `{compiled.expression}` was {_value(result)}" + (f", {values}" if values else ""))


def _value(value: t.Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:80] + "…"


def _fields(node: t.Mapping[str, t.Any], document: t.Any) -> dict[str, t.Any]:
    """The plain paths (``a.b``) in an expression that start at the top of ``document``, with what it has there."""
    path = _path(node)
    if path is not None:
        value = document
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return {".".join(path): value}
    found: dict[str, t.Any] = {}
    if node["type"] in ("comparator", "and_expression", "or_expression", "not_expression", "function_expression", "pipe"):
        # Behind a pipe, names start at what is before it.
        children = node["children"][:1] if node["type"] == "pipe" else node["children"]
        for child in children:
            found.update(_fields(child, document))
    return found


def _path(node: t.Mapping[str, t.Any]) -> list[str] | None:
    if node["type"] == "field":
        return [node["value"]]
    if node["type"] == "subexpression":
        parts = [_path(child) for child in node["children"]]
        if all(part is not None for part in parts):
            return [name for part in parts for name in part or ()]
    return None
