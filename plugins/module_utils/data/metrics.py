# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Numbers for Prometheus, as the text files that node_exporter's textfile collector reads."""

from __future__ import annotations

import os
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.files import write_atomically


def text(values: t.Mapping[str, tuple[str, float | None]], labels: t.Mapping[str, str]) -> str:
    """``values``: metric name to its help and value; ``None`` leaves it out."""
    told = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())
    lines = []
    for name, (help_text, value) in values.items():
        if value is not None:
            lines += [f"# HELP {name} {help_text}", f"# TYPE {name} gauge", f"{name}{{{told}}} {value:.15g}"]
    return "\n".join(lines) + "\n"


def write(folder: str, name: str, values: t.Mapping[str, tuple[str, float | None]], labels: t.Mapping[str, str]) -> str:
    """Write ``<folder>/<name>.prom``, readable by everyone; '' where ``folder`` is empty or not there."""
    if not folder or not os.path.isdir(folder):
        return ""
    path = os.path.join(folder, f"{name}.prom")
    write_atomically(path, text(values, labels), mode=0o644)
    return path


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
