# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Holding the writers still: finding the containers, freezing them, and giving each the state it was found in."""

from __future__ import annotations

import glob
import os
import shutil
import time
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine, EngineError, EngineNotFound, moment
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.files import read_json, write_json
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.guard import Guard

#: Seconds until an engine that does not answer for a container it pauses is taken to hang; it answers in milliseconds.
PATIENCE = 1.0
#: Seconds to wait at most for a moment in which no health check runs.
QUIET_PATIENCE = 10.0
#: Seconds that pausing takes: no health check should begin within them.
_PAUSING = 0.3

#: One container held still: ``{"id", "name", "action": "pause" | "stop"}``.
Held = dict[str, str]


def users(engine: Engine, volumes: t.Collection[str], places: t.Collection[str], writers_only: bool) -> list[dict[str, t.Any]]:
    """Inspections of all containers, of any project and in any state, that mount one of ``volumes`` or a host path at or
    below one of ``places``; oldest first. ``writers_only``: those that mount one read-write."""
    found = []
    for item in engine.containers():
        mounts = [mount for mount in item.get("Mounts") or () if _concerns(mount, volumes, places)]
        if mounts and (not writers_only or any(mount.get("RW") for mount in mounts)):
            try:
                found.append(engine.inspect(item["Id"]))
            except EngineNotFound:
                continue
    return sorted(found, key=lambda one: one["Created"])


def state_of(container: t.Mapping[str, t.Any]) -> str:
    """``running``, ``paused``, ``restarting``, ``exited``, ``created`` …, from an inspection."""
    return str(container["State"]["Status"])


def name_of(container: t.Mapping[str, t.Any]) -> str:
    return str(container["Name"]).lstrip("/")


def plan_hold(containers: t.Sequence[t.Mapping[str, t.Any]], action: str) -> list[Held]:
    """Whom to hold: the running ones, newest first (an application before its database).

    ``action``: ``pause``, ``stop``, or ``stop_paused`` for a restore, which must also stop a paused one, since that would keep
    the old files open. Exited ones stay as they are; one that restarts all the time cannot be paused, so it is stopped.
    """
    held = []
    for container in reversed(containers):
        state = state_of(container)
        if state == "running":
            how = "pause" if action == "pause" else "stop"
        elif state == "restarting" or (state == "paused" and action == "stop_paused"):
            how = "stop"
        else:
            continue
        if how == "stop" and container.get("HostConfig", {}).get("AutoRemove"):
            raise DeliveryError(
                f"stop the container {name_of(container)}",
                "it was started with --rm, so stopping would remove it",
                "End it yourself, or use consistency pause.",
                "config",
            )
        held.append({"id": str(container["Id"]), "name": name_of(container), "action": how, "found": state})
    return held


def await_quiet(engine: Engine, held: t.Sequence[Held], patience: float = QUIET_PATIENCE) -> None:
    """Wait for a moment in which no health check runs, or is about to begin, in what will be paused.

    The engine hangs on a container that froze with a check in it (see ``_unpause``), and everybody who asks the app waits as long. After
    ``patience`` seconds it goes on all the same.
    """
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        try:
            if not any(check_is_due(engine.inspect(one["id"]), time.time()) for one in held if one["action"] == "pause"):
                return
        except EngineNotFound:
            return  # hold() knows what to do about that
        time.sleep(0.02)


def check_is_due(container: t.Mapping[str, t.Any], now: float) -> bool:
    """Whether its health check runs at ``now`` (seconds since 1970) or begins soon: its interval after the end of the one before."""
    health, state = container["Config"].get("Healthcheck") or {}, container["State"]
    if not health.get("Test") or health["Test"] == ["NONE"] or not state.get("Health") or not state.get("Running"):
        return False
    interval = (health.get("Interval") or 30_000_000_000) / 1e9
    log = state["Health"].get("Log") or []
    return now + min(_PAUSING, interval / 3) >= moment(log[-1]["End"] if log else state["StartedAt"]) + interval


def hold(engine: Engine, held: t.Sequence[Held], stop_timeout: float, begun: dict[str, float] | None = None) -> list[str]:
    """Freeze them; names of those that a stop had to kill (their files are like after a crash). ``begun`` gets the moment of each."""
    killed = []
    for one in held:
        if begun is not None:
            begun[one["id"]] = time.monotonic()
        try:
            if one["action"] == "pause":
                _pause(engine, one["id"])
            else:
                engine.stop(one["id"], stop_timeout)
                if engine.inspect(one["id"])["State"].get("ExitCode") == 137:
                    killed.append(one["name"])
        except EngineNotFound:
            continue
    return killed


def release(engine: Engine, held: t.Sequence[Held], last_error: DeliveryError | None = None, ended: dict[str, float] | None = None) -> None:
    """Give the state found back to each, in the opposite order. Says at the end which could not be. ``ended`` gets the moment of each.

    Safe to repeat: who runs already is left alone, who is gone is skipped.
    """
    problems = []
    for one in reversed(held):
        try:
            if one["action"] == "pause":
                _unpause(engine, one["id"])
            else:
                state = engine.inspect(one["id"])["State"]
                if not state.get("Running"):
                    engine.start(one["id"])
                if one.get("found") == "paused" and not engine.inspect(one["id"])["State"].get("Paused"):
                    engine.pause(one["id"])
        except EngineNotFound:
            continue
        except DeliveryError as exc:
            problems.append(f"{one['name']} ({exc.seen})")
        if ended is not None:
            ended[one["id"]] = time.monotonic()
    if problems:
        raise DeliveryError(
            "give the containers back the state they were found in",
            "; ".join(problems) + (f"; before that: {last_error.message}" if last_error else ""),
            "Start or unpause them by hand.",
            "snapshot",
        )


class Window:
    """The time in which nothing writes. A context manager around the final pass of a snapshot.

    ``record``: file that names what is frozen, so that a later run can mend even what the guard could not.
    ``hooks``: ``[{"container", "before": [argv], "after": [argv]}]``. ``lock`` is called just before the freeze,
    ``folder`` removed when this process dies. After it: ``seconds``,
    ``killed``, and ``freeze_ms`` of each container by its id.
    """

    def __init__(
        self,
        engine: Engine,
        held: t.Sequence[Held],
        hooks: t.Sequence[t.Mapping[str, t.Any]],
        record: str,
        limit: float,
        stop_timeout: float,
        lock: t.Callable[[], None] = lambda: None,
        folder: str = "",
    ) -> None:
        self.lock, self.folder = lock, folder
        self.engine, self.held, self.hooks, self.record = engine, list(held), list(hooks), record
        self.limit, self.stop_timeout = limit, stop_timeout
        self.seconds = 0.0
        self.killed: list[str] = []
        self._begun: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._guard = Guard(lambda: mend_patiently(engine, record), limit + 60)
        self._began = 0.0

    @property
    def freeze_ms(self) -> dict[str, int]:
        return {one: round((self._ended[one] - began) * 1000) for one, began in self._begun.items() if one in self._ended}

    def __enter__(self) -> Window:
        if not self.held and not self.hooks:
            self.lock()
            return self
        await_quiet(self.engine, self.held)
        after = [{"container": hook["container"], "argv": list(hook["after"])} for hook in self.hooks if hook.get("after")]
        write_json(self.record, {"held": self.held, "after": after, "folder": self.folder})
        self._guard.arm()
        self._began = time.monotonic()
        try:
            for hook in self.hooks:
                if hook.get("before"):
                    _run_hook(self.engine, hook["container"], hook["before"], self.limit)
            self.lock()
            self.killed = hold(self.engine, self.held, self.stop_timeout, self._begun)
        except DeliveryError as exc:
            self._end(exc)
            raise
        except BaseException:
            self._end(None)
            raise
        return self

    def __exit__(self, kind: t.Any, error: BaseException | None, trace: t.Any) -> None:
        if self.held or self.hooks:
            self._end(error if isinstance(error, DeliveryError) else None)
            if error is None and self.seconds > self.limit:
                raise DeliveryError(
                    "freeze the containers",
                    f"it took {self.seconds:.0f} s, more than {self.limit:.0f} s",
                    "Raise freeze_timeout, or use consistency stop.",
                    "snapshot",
                )

    def _end(self, error: DeliveryError | None) -> None:
        try:
            mend(self.engine, self.record, error, self._ended)
        finally:
            self.seconds = round(time.monotonic() - self._began, 3)
            # Only a thaw that worked sends the guard home: otherwise it goes on trying after this process ended.
            if not os.path.exists(self.record):
                self._guard.disarm()


def mend(
    engine: Engine, record: str, last_error: DeliveryError | None = None, ended: dict[str, float] | None = None, died: bool = False
) -> list[str]:
    """Undo the freeze that the file ``record`` names, then remove the file. Names of the containers; none without the file.

    ``died``: who froze them is gone, and what it was working on goes as well.
    """
    found = read_json(record)
    if found is None:
        return []
    try:
        for hook in found["after"]:
            _run_hook(engine, hook["container"], hook["argv"], 300)
    finally:
        release(engine, found["held"], last_error, ended)
    if died and found.get("folder"):
        shutil.rmtree(found["folder"], ignore_errors=True)
    os.unlink(record)
    return [one["name"] for one in found["held"]]


def mend_patiently(engine: Engine, record: str) -> None:
    """``mend``, again and again for five minutes: the engine itself may be restarting."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        try:
            mend(engine, record, died=True)
            return
        except (DeliveryError, OSError):
            time.sleep(1)


def _pause(engine: Engine, container: str) -> None:
    """Pause, also where the engine hangs. A container that starts processes all the time slips away from the freezer now and then."""
    impatient = Engine(engine.socket, timeout=PATIENCE)
    for _attempt in range(9):
        try:
            impatient.pause(container)
            return
        except EngineError as exc:
            if "unable to freeze" not in exc.reason:
                raise
            time.sleep(0.1)
        except DeliveryError:
            # Thawed behind its back it comes to its end, and says that it is paused though it is not any more.
            if not _set_frozen(container, False):
                raise
            if engine.inspect(container)["State"].get("Paused") and _set_frozen(container, True):
                return
    engine.pause(container)


def _unpause(engine: Engine, container: str) -> None:
    """Unpause, also where the engine hangs: a health check that began just when the container froze makes it wait for that check
    with the container's lock in its hand, and so for ever. Thawed behind its back the check ends; frozen again, it is unpaused as usual."""
    impatient = Engine(engine.socket, timeout=PATIENCE)
    for _attempt in range(3):
        try:
            if impatient.inspect(container)["State"].get("Paused"):
                impatient.unpause(container)
            return
        except DeliveryError as exc:
            if isinstance(exc, EngineError) or not _set_frozen(container, False):
                raise
        if not engine.inspect(container)["State"].get("Paused"):
            return
        _set_frozen(container, True)  # the engine refuses to unpause what is not frozen
    engine.unpause(container)


def _set_frozen(container: str, frozen: bool) -> bool:
    """Freeze or thaw the container's processes through its control group, and wait until they are; whether there was one.

    Version 1 where there is a freezer of it: a mixed system has a version 2 beside it that the engine never thaws.
    """
    ways = (
        ("freezer/**/*{}*/freezer.state", "FROZEN" if frozen else "THAWED", "freezer.state", "FROZEN" if frozen else "THAWED"),
        ("**/*{}*/cgroup.freeze", str(int(frozen)), "cgroup.events", f"frozen {int(frozen)}"),
    )
    for pattern, word, answer, said in ways:
        found = glob.glob(os.path.join("/sys/fs/cgroup", pattern.format(container)), recursive=True)
        for path in found:
            with open(path, "w", encoding="ascii") as handle:
                handle.write(word)
            deadline = time.monotonic() + 10
            while True:
                with open(os.path.join(os.path.dirname(path), answer), encoding="ascii") as handle:
                    if said in handle.read().split("\n"):
                        break
                if time.monotonic() > deadline:
                    raise DeliveryError(f"set {path} to {word}", "its processes do not follow", "Look for what holds them.", "snapshot")
                time.sleep(0.005)
        if found:
            return True
    return False


def _run_hook(engine: Engine, container: str, argv: t.Sequence[str], timeout: float) -> None:
    tried = f"run the hook {argv[0]} in {container}"
    try:
        code, output = engine.exec(container, list(argv), timeout)
    except TimeoutError as exc:
        raise DeliveryError(tried, str(exc), "Raise freeze_timeout.", "snapshot") from exc
    if code != 0:
        said = " / ".join(output.strip().splitlines()[-3:])
        raise DeliveryError(tried, f"it ended with {code}: {said}", "Make it end with 0.", "snapshot")


def _concerns(mount: t.Mapping[str, t.Any], volumes: t.Collection[str], places: t.Collection[str]) -> bool:
    if mount.get("Type") == "volume" and mount.get("Name") in volumes:
        return True
    source = mount.get("Source") or ""
    return any(source == place or source.startswith(place.rstrip("/") + "/") for place in places)
