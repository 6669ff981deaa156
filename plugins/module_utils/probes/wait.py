# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Readiness probes: asked side by side until all are ready at the same time, or until it is known that one cannot be."""

from __future__ import annotations

import contextlib
import ssl
import threading
import time
import typing as t
from dataclasses import dataclass

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.checks import TRY_TIMEOUT, Check
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.containers import ContainerWatch, LogWatch, ServiceWatch
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.grpc_health import grpc_health
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.network import http_get, tcp, tls_context
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.outcomes import Hopeless, NoAnswer, NotReady
from ansible_collections.selfhost.delivery.plugins.module_utils.probes.programs import command, systemd

FIRST_PAUSE = 0.02
LONGEST_PAUSE = 0.25
#: Part of the time waited so far that a pause takes: what gets ready after 2 s is seen 0.1 s later at most.
PAUSE_SHARE = 1 / 20
#: Between two successes that must follow each other: asked at once, the second would prove nothing.
STABLE_PAUSE = 0.2
#: Between two looks at what is ready while others are not.
READY_PAUSE = 0.5
#: Of one core, what all checks of a wait may take together.
CPU_SHARE = 0.5
#: Before the end of the wait, so that what the last try has to tell is heard.
LAST_WORDS = 0.05
#: A try that was given less than this, and its own timeout, and got no answer proves nothing.
SHORTEST_TRY = 1.0


@dataclass
class WaitResult:
    """How a wait ended.

    ``checks``: name to ``{"ready": bool, "attempts": int, "ready_after": seconds or None, "last_error": str or None}``;
    ``ended_early``: the reason where waiting on made no sense or was stopped, else ''.
    """

    ready: bool
    elapsed: float
    checks: dict[str, dict[str, t.Any]]
    ended_early: str = ""

    def raise_unless_ready(self, timeout: float) -> None:
        """``DeliveryError(not_ready)`` that says how many of how many, and why."""
        if self.ready:
            return
        waiting = {name: entry for name, entry in self.checks.items() if not entry["ready"]}
        reasons = "; ".join(f"{name}: {entry['last_error']}" for name, entry in waiting.items())
        how = "given up early" if self.ended_early else f"timeout {timeout:g} s"
        ready = f"{len(self.checks) - len(waiting)} of {len(self.checks)}"
        raise DeliveryError(
            "Waiting for readiness",
            f"{ready} ready after {self.elapsed:.1f} s ({how}). {reasons or self.ended_early}",
            "",
            "not_ready",
            elapsed=self.elapsed,
            checks=self.checks,
        )


def next_pause(elapsed: float, took: float = 0.0, cpu: float = 0.0, asking: int = 1) -> float:
    """Seconds until a check that is not ready is asked again, ``elapsed`` seconds after the wait began.

    ``took`` and ``cpu``: seconds that the last try lasted and that it kept this process busy; ``asking``: how many checks ask side by side.
    At least as long as the try lasted, so that whoever is asked has as much time for itself. Between 20 and 250 ms.
    """
    wanted = max(elapsed * PAUSE_SHARE, took, cpu * asking / CPU_SHARE, FIRST_PAUSE)
    return min(wanted, LONGEST_PAUSE)


# -- waiting


@dataclass
class _Progress:
    """What is known about one check; written by its own thread under the wait's lock."""

    check: Check
    ready: bool = False
    attempts: int = 0
    streak: int = 0
    ready_after: float | None = None
    last_error: str | None = "not asked yet"
    #: Since when a try is under way; None between two.
    asked_at: float | None = None
    #: Whether the last try got no answer at all.
    unanswered: bool = False

    def entry(self) -> dict[str, t.Any]:
        return {
            "ready": self.ready,
            "attempts": self.attempts,
            "ready_after": self.ready_after,
            "last_error": None if self.ready else self.last_error,
        }


def wait_ready(
    checks: t.Sequence[Check],
    timeout: float,
    stable: int = 1,
    fail_fast: bool = True,
    engine: Engine | None = None,
    stop: threading.Event | t.Callable[[], bool] | None = None,
    on_change: t.Callable[[str, dict[str, t.Any]], None] | None = None,
) -> WaitResult:
    """Ask all ``checks`` side by side until all are ready at the same time, or ``timeout`` seconds have passed.

    ``stable`` consecutive successes make a check ready; it is asked on until all are, and is not ready again when it fails.
    ``fail_fast`` ends the wait as soon as a container (of a check, or watched beside one) has exited, loops or is gone.
    ``stop`` ends it from outside. ``on_change(name, entry)`` is called in the caller's thread when readiness or the reason changed.
    """
    return _Wait(checks, timeout, stable, fail_fast, engine or Engine(timeout=TRY_TIMEOUT), stop, on_change).run()


class _Wait:
    def __init__(
        self,
        checks: t.Sequence[Check],
        timeout: float,
        stable: int,
        fail_fast: bool,
        engine: Engine,
        stop: threading.Event | t.Callable[[], bool] | None,
        on_change: t.Callable[[str, dict[str, t.Any]], None] | None,
    ) -> None:
        self.timeout = timeout
        self.stable = stable
        self.fail_fast = fail_fast
        self.engine = engine
        self.stop = stop.is_set if isinstance(stop, threading.Event) else stop
        self.on_change = on_change
        self.progress = [_Progress(check) for check in checks]
        self.changed = threading.Condition()
        self.over = threading.Event()
        self.contexts: dict[tuple[t.Any, ...], ssl.SSLContext] = {}
        self.making_contexts = threading.Lock()
        self.ended_early = ""
        self.started = time.monotonic()

    def run(self) -> WaitResult:
        for progress in self.progress:
            # Daemons: a probe that hangs in the network must not hold up the answer.
            threading.Thread(target=self._ask, args=(progress,), daemon=True).start()
            if progress.check.watch:
                threading.Thread(target=self._watch, args=(progress,), daemon=True).start()
        told: dict[str, tuple[bool, str | None]] = {}
        try:
            with self.changed:
                while True:
                    entries = {progress.check.name: progress.entry() for progress in self.progress}
                    self._tell(entries, told)
                    now = self._elapsed()
                    if all(progress.ready for progress in self.progress):
                        return WaitResult(True, round(now, 3), entries)
                    if not self.ended_early and self.stop is not None and self.stop():
                        self.ended_early = "stopped from outside"
                    late = [one for one in self.progress if not one.ready and now >= self._limit(one.check)]
                    if self.ended_early or late:
                        return WaitResult(False, round(now, 3), self._last_entries(), self.ended_early)
                    left = min(self._limit(one.check) for one in self.progress if not one.ready) - now
                    # `stop` may be a function, which nobody announces.
                    self.changed.wait(min(left, 0.1) if self.stop is not None else left)
        finally:
            self.over.set()

    def _last_entries(self) -> dict[str, dict[str, t.Any]]:
        """With what can be said of tries that have not ended."""
        entries = {}
        for progress in self.progress:
            entry = entries[progress.check.name] = progress.entry()
            asked_at = progress.asked_at
            waited = time.monotonic() - asked_at if asked_at is not None else 0.0
            if not progress.attempts and asked_at is not None:
                entry["last_error"] = f"no answer to the first try within {waited:.1f} s"
            elif not progress.ready and waited >= 1:
                entry["last_error"] = f"{entry['last_error']}; then no answer for {waited:.1f} s"
        return entries

    def _tell(self, entries: t.Mapping[str, dict[str, t.Any]], told: dict[str, tuple[bool, str | None]]) -> None:
        if self.on_change is None:
            return
        for name, entry in entries.items():
            state = (entry["ready"], entry["last_error"])
            if told.get(name) != state:
                told[name] = state
                self.on_change(name, dict(entry))

    def _elapsed(self) -> float:
        return time.monotonic() - self.started

    def _limit(self, check: Check) -> float:
        return self.timeout if check.timeout is None else min(check.timeout, self.timeout)

    def _ask(self, progress: _Progress) -> None:
        check = progress.check
        with contextlib.ExitStack() as held:
            probe = self._probe(check, held)
            while not self.over.is_set():
                left = max(self._limit(check) - self._elapsed() - LAST_WORDS, LAST_WORDS)
                began, cpu = time.monotonic(), time.thread_time()
                progress.asked_at = began
                learnt = self._try(probe, left, progress)
                progress.asked_at = None
                took, cpu = time.monotonic() - began, time.thread_time() - cpu
                if learnt is not None and not self._note(progress, *learnt):
                    return
                if progress.ready:
                    pause = READY_PAUSE
                elif progress.streak:
                    pause = STABLE_PAUSE
                else:
                    pause = next_pause(self._elapsed(), took, cpu, len(self.progress))
                self.over.wait(pause)

    def _try(self, probe: t.Callable[[float], None], left: float, progress: _Progress) -> tuple[str | None, bool] | None:
        """Why it is not ready, if it is not, and whether it never will be; ``None`` when nothing was learnt."""
        unanswered, progress.unanswered = progress.unanswered, False
        try:
            probe(left)
        except NoAnswer as exc:
            progress.unanswered = True
            # A try that the end of the wait cut short says less than what was known before it, and a very short one nothing.
            cut = progress.attempts and left < progress.check.options.get("timeout", TRY_TIMEOUT)
            if cut and left < SHORTEST_TRY:
                return None
            if cut and not progress.streak:
                return (progress.last_error if unanswered else f"{progress.last_error}; then {exc}"), False
            return str(exc), False
        except NotReady as exc:
            return str(exc), False
        except Hopeless as exc:
            return str(exc), self.fail_fast
        except DeliveryError as exc:
            return exc.message, False
        except Exception as exc:  # a probe that breaks is a check that fails, and says why
            return f"{exc.__class__.__name__}: {exc}", False
        return None, False

    def _note(self, progress: _Progress, error: str | None, hopeless: bool) -> bool:
        """Take down how a try ended; false when the wait is over and nobody wants to know."""
        needed = progress.check.stable or self.stable
        with self.changed:
            if self.over.is_set():
                return False
            progress.attempts += 1
            progress.last_error = error
            progress.streak = progress.streak + 1 if error is None else 0
            ready = progress.streak >= needed
            if error is None and not ready:
                progress.last_error = f"{progress.streak} of {needed} successes in a row"
            if ready and not progress.ready:
                progress.ready_after = round(self._elapsed(), 3)
            if not ready:
                progress.ready_after = None
            progress.ready = ready
            if hopeless:
                self.ended_early = self.ended_early or f"{progress.check.name}: {error}"
            self.changed.notify_all()
        return True

    def _watch(self, progress: _Progress) -> None:
        """Look at the container behind another probe; its end is the end of the wait."""
        watcher = ContainerWatch(self.engine)
        while self.fail_fast and not self.over.is_set():
            try:
                watcher.look(progress.check.watch)
            except Hopeless as exc:
                with self.changed:
                    if not self.over.is_set():
                        # The container's end is the reason; that its port is closed is only the result.
                        progress.ready, progress.streak, progress.last_error = False, 0, str(exc)
                        self.ended_early = self.ended_early or f"{progress.check.name}: {exc}"
                        self.changed.notify_all()
                return
            except (NotReady, DeliveryError):
                pass  # the probe itself tells what is missing
            self.over.wait(next_pause(self._elapsed()))

    def _probe(self, check: Check, held: contextlib.ExitStack) -> t.Callable[[float], None]:
        """Called with the seconds that are left, returns when ready, else raises ``NotReady`` or ``Hopeless``.

        ``held`` closes what it keeps open from try to try.
        """
        options, kind = check.options, check.kind
        own = options.get("timeout", TRY_TIMEOUT)
        if kind == "http":
            return lambda left: http_get(options, check.compiled, lambda: self._context(options), min(own, left))
        if kind == "grpc":
            return lambda left: grpc_health(options, self._context(options, "h2") if options.get("tls") else None, min(own, left))
        if kind == "tcp":
            return lambda left: tcp(options, min(own, left))
        if kind == "container":
            watch = ContainerWatch(self.engine)
            return lambda left: watch.ready(options["name"], options.get("state", "auto"))
        if kind == "service":
            service = ServiceWatch(self.engine, options)
            return lambda left: service.ready()
        if kind == "log":
            log = LogWatch(self.engine, options["container"], check.compiled)
            held.callback(log.close)
            return log.ready
        if kind == "systemd":
            return lambda left: systemd(options["unit"], left)
        return lambda left: command(options, self.engine, min(own, left))

    def _context(self, options: t.Mapping[str, t.Any], protocol: str = "") -> ssl.SSLContext:
        """One for all that trust the same: to read the system's certificates takes longer than many tries."""
        key = (options.get("ca_path"), options.get("validate_certs", True), protocol)
        with self.making_contexts:
            if key not in self.contexts:
                self.contexts[key] = tls_context(options, "ca_path")
                if protocol:
                    self.contexts[key].set_alpn_protocols([protocol])
            return self.contexts[key]
