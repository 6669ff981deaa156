# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Snapshot sets as people see them: a table, the one they mean, and what giving it back would do. Pure.

A set is what the info modules return as one item of ``sets``. All times are UTC, as in the ids of the sets.
"""

from __future__ import annotations

import datetime
import difflib
import re
import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

Set = t.Mapping[str, t.Any]


@dataclass(frozen=True)
class Choice:
    """``volumes`` and ``paths`` as the set calls them; both empty for the whole set."""

    found: Set
    why: str
    volumes: list[str]
    paths: list[str]


def table(sets: t.Sequence[Set], now: datetime.datetime, project: str = "") -> list[str]:
    """Lines, newest set first."""
    if not sets:
        return ["there are no snapshot sets yet; promote.yml and snapshot.yml take them"]
    rows = [("set", "age", "size", "files", "release", "holds", "")]
    for one in sorted(sets, key=lambda item: (item["created"], item["set_id"]), reverse=True):
        whole = bool(one["complete"])
        rows.append(
            (
                one["set_id"],
                age(now - moment(one["created"])) if one["created"] else "?",
                size(one["bytes"]) if whole else "-",
                f"{one['files']:,}" if whole else "-",
                str(one["metadata"].get("tag") or "-"),
                holds(one, project) if whole else "-",
                "complete" if whole else f"INCOMPLETE: {one['why_incomplete']}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(6)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0])).rstrip() for row in rows]


def choose(
    sets: t.Sequence[Set], snapshot: str, at: str, volumes: t.Sequence[str] = (), paths: t.Sequence[str] = (), project: str = ""
) -> Choice:
    """The set of that id, the newest (``latest``), or the newest that was not taken after ``at``.

    What a restore replaced (``replaces``) is only found by its id. Raises ``DeliveryError(config)`` that names what is there.
    """
    doing = f"Choosing the set {snapshot or 'at ' + at}" if snapshot or at else "Choosing a snapshot set"
    usable = [one for one in sets if one["complete"]]
    known = ", ".join(one["set_id"] for one in usable[:5]) or "none"
    if bool(snapshot) == bool(at):
        seen = "both snapshot and at are given" if snapshot else "neither snapshot nor at is given"
        remedy = "Give -e snapshot=<set id or latest>, or -e at='2026-11-28 09:00' (UTC). -e list=true shows the sets."
        raise DeliveryError(doing, seen, remedy)
    if snapshot and snapshot != "latest":
        found = next((one for one in sets if one["set_id"] == snapshot), None)
        if found is None:
            near = difflib.get_close_matches(snapshot, [one["set_id"] for one in usable], n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise DeliveryError(doing, f"there is no such set{hint}", f"Complete sets here: {known}.")
        if not found["complete"]:
            raise DeliveryError(doing, f"it is not complete: {found['why_incomplete']}", f"Complete sets here: {known}.", "snapshot")
        why = "the set asked for"
    else:
        ordinary = [one for one in usable if not one.get("replaces")]
        if at:
            until = moment(at)
            ordinary = [one for one in ordinary if moment(one["created"]) <= until]
        found = max(ordinary, key=lambda one: (one["created"], one["set_id"]), default=None)
        if found is None:
            seen = f"no complete set is that old; complete are {known}" if at else "there is no complete one"
            raise DeliveryError(doing, seen, "-e list=true shows the sets there are." if at else "snapshot.yml takes one.", "snapshot")
        why = f"the newest not taken after {until.strftime('%Y-%m-%d %H:%M:%S')} UTC" if at else "the newest"
    return Choice(found, why, _part_names(found, "volume", volumes, project), _part_names(found, "path", paths, project))


def plan_lines(choice: Choice, planned: t.Mapping[str, t.Any], now: datetime.datetime, kept: bool = True) -> list[str]:
    """What a restore into place would do. ``planned``: what the restore modules say in check mode."""
    found = choice.found
    lines = [f"set {found['set_id']}, {choice.why}: taken {found['created']}, {age(now - moment(found['created']))} ago{_release(found)}"]
    if not planned["changed"]:
        return [*lines, "nothing to do: what is in place is what the set holds"]
    for part in planned["restored"]:
        lines.append(f"replaced: {part['kind']} {part['name']} by {part['files']:,} files, {size(part['bytes'])}")
    selected = {("volume", name) for name in choice.volumes} | {("path", name) for name in choice.paths}
    left = [part["name"] for part in found["parts"] if selected and (part["kind"], part["name"]) not in selected]
    if left:
        lines.append(f"left as it is: {', '.join(left)}")
    if kept:
        lines.append(f"kept first, if it exists: what is replaced, as replaced-{found.get('replaces') or found['set_id']}-<time>")
    stopped = ", ".join(f"{one['name']} ({one['found']})" for one in planned["containers"]) or "none, nothing runs on it"
    lines.append(f"stopped meanwhile: {stopped}")
    lines.append("writes from now until then are in the set that is kept, and not in what runs afterwards")
    return lines


def moment(text: str) -> datetime.datetime:
    """A time as people and manifests write it; without a zone it is UTC. ``DeliveryError(config)`` for anything else."""
    clean = re.sub(r" ?(Z|UTC)$", "+00:00", text.strip())
    clean = re.sub(r" (?=[+-]\d\d:\d\d$)", "", clean)
    # Python before 3.11 reads fractions of three or six digits only; engines write nine.
    clean = re.sub(r"\.(\d+)", lambda found: "." + found.group(1)[:6].ljust(6, "0"), clean)
    try:
        found = datetime.datetime.fromisoformat(clean)
    except ValueError:
        remedy = "Give one such as '2026-11-28 09:00', in UTC, or with +01:00."
        raise DeliveryError(f"Reading the time {text!r}", "it is none", remedy) from None
    return found if found.tzinfo else found.replace(tzinfo=datetime.timezone.utc)


def age(passed: datetime.timedelta) -> str:
    """``4 min``, ``3 h``, ``12 d``."""
    seconds = max(0, int(passed.total_seconds()))
    if seconds < 120:
        return f"{seconds} s"
    if seconds < 2 * 3600:
        return f"{seconds // 60} min"
    return f"{seconds // 3600} h" if seconds < 2 * 86400 else f"{seconds // 86400} d"


def size(number: float) -> str:
    """In units of a thousand, as disks are sold."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit in ("B", "kB") or number >= 100 else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def holds(one: Set, project: str) -> str:
    """``data, uploads, 2 paths``; the volumes without the prefix of the project."""
    volumes = [_short(part["name"], project) for part in one["parts"] if part["kind"] == "volume"]
    paths = sum(part["kind"] == "path" for part in one["parts"])
    return ", ".join([*volumes, *([f"{paths} path{'s' if paths > 1 else ''}"] if paths else [])])


def _release(found: Set) -> str:
    tag = found["metadata"].get("tag")
    return f", when {tag} served" if tag else ""


def _short(name: str, project: str) -> str:
    return name[len(project) + 1 :] if project and name.startswith(f"{project}_") else name


def _part_names(found: Set, kind: str, wanted: t.Sequence[str], project: str) -> list[str]:
    """Names of parts; a volume may be called as Compose or as Docker calls it."""
    have = [part["name"] for part in found["parts"] if part["kind"] == kind]
    names = []
    for asked in wanted:
        clean = asked.rstrip("/") or asked
        name = next((one for one in have if clean in (one, _short(one, project))), None)
        if name is None:
            shown = [_short(one, project) for one in have]
            near = difflib.get_close_matches(clean, shown, n=1, cutoff=0.6)
            raise DeliveryError(
                f"Restoring from the set {found['set_id']}",
                f"it does not hold the {kind} {asked}" + (f"; did you mean {near[0]}?" if near else ""),
                f"Its {kind}s are {', '.join(shown) or 'none'}.",
            )
        names.append(name)
    return names
