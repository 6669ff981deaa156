# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What only Compose and the docker program can do: render the file, hash it, create containers from it, pull images."""

from __future__ import annotations

import json
import os
import re
import signal
import time
import typing as t

from ansible_collections.selfhost.delivery.plugins.module_utils.command import CommandResult, run
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

#: Set in the environment of every program a release starts, so that undo finds what a killed module left running.
MARKER = "SELFHOST_DELIVERY_ROLLOUT"

#: Where the docker program looks for its plugins, in its order, after the folder of the user's own configuration.
PLUGIN_FOLDERS = (
    "/usr/local/lib/docker/cli-plugins",
    "/usr/local/libexec/docker/cli-plugins",
    "/usr/lib/docker/cli-plugins",
    "/usr/libexec/docker/cli-plugins",
)
#: With it in its environment the plugin takes itself for started by the docker program.
AS_PLUGIN = "DOCKER_CLI_PLUGIN_ORIGINAL_CLI_COMMAND"

OLDEST_COMPOSE = (2, 20)
COMPOSE_TIMEOUT = 180.0
PULL_TIMEOUT = 1800.0
PULL_TRIES = 3

_FINAL_PULL_ERRORS = (
    (re.compile(r"unauthorized|authentication required|denied|no basic auth", re.I), "config", "Check the registry login on this host."),
    (re.compile(r"manifest unknown|not found|no such manifest|does not exist", re.I), "config", "Check that the image was pushed there."),
    (re.compile(r"no matching manifest", re.I), "config", "Build the image for this host's architecture."),
    (re.compile(r"x509|certificate|HTTP response to HTTPS", re.I), "config", "Make the engine trust the registry's certificate."),
    (re.compile(r"no space left", re.I), "capacity", "Free disk space under the engine's root."),
)


class Compose:
    """One Compose project as a release describes it. Files and env files are absolute paths, the last env file is ``deploy.env``."""

    def __init__(
        self,
        project_dir: str,
        project: str,
        files: t.Sequence[str],
        env_files: t.Sequence[str],
        socket: str,
        marker: str,
        docker_config: str = "",
    ) -> None:
        self.project = project
        self.files = list(files)
        self.docker_config = docker_config
        self.plugin = find_plugin()
        self._program = [self.plugin or "docker", "compose"]
        self._base = [*self._program, "--ansi", "never", "--project-directory", project_dir, "--project-name", project]
        self._argv = [*self._base]
        for path in files:
            self._argv += ["-f", path]
        for path in env_files:
            self._argv += ["--env-file", path]
        # Compose lets the caller's environment win over env files: what pins the images must not be overridable.
        self._env = {**(_pinned(env_files[-1]) if env_files else {}), "COMPOSE_FILE": "", "COMPOSE_PROFILES": ""}
        self._env.update({"DOCKER_HOST": f"unix://{socket}", MARKER: marker})

    @property
    def identity(self) -> str:
        """Changes when another Compose is installed; empty where that cannot be seen."""
        try:
            found = os.stat(self.plugin)
        except OSError:
            return ""
        return f"{self.plugin} {found.st_size} {found.st_mtime_ns}"

    def version(self) -> str:
        """The plugin's version; too old, or absent: ``DeliveryError`` (config). Not a number: returned as it is."""
        result = self._run([*self._program, "version", "--short"], "Asking Docker Compose for its version", 30)
        if not result.ok:
            raise DeliveryError(
                "Asking Docker Compose for its version",
                result.last_lines(3) or f"exit code {result.code}",
                "Install the Docker Compose plugin, version 2.20 or newer.",
            )
        text = result.stdout.strip()
        number = parse_version(text)
        if number is not None and number < OLDEST_COMPOSE:
            raise DeliveryError(
                "Checking Docker Compose", f"its version is {text}", "Install the Docker Compose plugin, version 2.20 or newer."
            )
        return text

    def model(self) -> tuple[dict[str, t.Any], list[str]]:
        """The rendered project with every profile, and what Compose warned about."""
        result = self._compose(["--profile", "*", "config", "--format", "json"], "Reading the Compose files")
        if not result.ok:
            raise DeliveryError(
                f"Reading the Compose file{'s' if len(self.files) > 1 else ''} {', '.join(self.files)}",
                result.last_lines(5) or f"docker compose config ended with {result.code}",
                "Correct it; `docker compose config` shows the same.",
            )
        return json.loads(result.stdout), _warnings(result.stderr)

    def hashes(self, model: t.Mapping[str, t.Any]) -> dict[str, str]:
        """Service to the hash that Compose puts on its containers. ``model``: the rendered project.

        `config --hash` of the files themselves leaves the content of ``env_file`` out, which the label on a container has in it; of the
        rendered project it says the same as the label. The model holds the app's settings, so it goes through standard input.
        """
        argv = [*self._base, "-f", "-", "--profile", "*", "config", "--hash", "*"]
        result = self._run(argv, "Hashing the Compose services", COMPOSE_TIMEOUT, stdin=json.dumps(model))
        if not result.ok:
            raise DeliveryError("Hashing the Compose services", result.last_lines(5) or f"exit code {result.code}")
        pairs = (line.split() for line in result.stdout.splitlines())
        return {pair[0]: pair[1] for pair in pairs if len(pair) == 2}

    def create(self, scales: t.Mapping[str, int]) -> None:
        """Create containers until each service has that many, running or not; start none, touch none that exist."""
        tried = f"Creating containers of {', '.join(scales)}"
        result = self._compose(_create_argv(scales), tried)
        if result.timed_out:
            raise DeliveryError(tried, f"docker compose did not end within {COMPOSE_TIMEOUT:g} s", "", "cutover")
        if not result.ok:
            raise DeliveryError(tried, result.last_lines(5) or f"exit code {result.code}", "", "cutover")

    def shared_changes(self, scales: t.Mapping[str, int], image: str) -> list[str]:
        """Names of networks that ``create`` would remove and make again, which stops all containers on them.

        Asked of Compose by a dry run. ``image`` is any image this host has, so that none has to be pulled for the question.
        """
        override = json.dumps({"services": {service: {"image": image} for service in scales}})
        argv = [*self._argv, "-f", "-", "--dry-run", *_create_argv(scales)]
        result = self._run(argv, "Asking Compose what it would change", COMPOSE_TIMEOUT, stdin=override)
        if not result.ok:
            return []  # an older Compose without dry run; those never remake a network either
        return sorted(set(re.findall(r"Network (\S+)\s+(?:Removed|Recreat)", result.stdout + result.stderr)))

    def pull(self, reference: str, pause: t.Callable[[float], None] = time.sleep) -> None:
        """``docker pull`` with two retries when the registry or the way to it failed."""
        tried = f"Pulling {reference}"
        env = {"DOCKER_CONFIG": self.docker_config} if self.docker_config else {}
        for attempt in range(PULL_TRIES):
            result = self._run(["docker", "pull", "--quiet", reference], tried, PULL_TIMEOUT, env=env)
            if result.ok:
                return
            seen = f"no end within {PULL_TIMEOUT:g} s" if result.timed_out else result.last_lines(3) or f"exit code {result.code}"
            for pattern, failure_class, remedy in _FINAL_PULL_ERRORS:
                if pattern.search(seen):
                    raise DeliveryError(tried, seen, remedy, failure_class)
            if attempt + 1 < PULL_TRIES:
                pause(0.5 * 4**attempt)
        raise DeliveryError(tried, f"{seen} ({PULL_TRIES} tries)", "Check that the registry can be reached from this host.", "transport")

    def _compose(self, argv: t.Sequence[str], tried: str) -> CommandResult:
        return self._run([*self._argv, *argv], tried, COMPOSE_TIMEOUT)

    def _run(
        self, argv: t.Sequence[str], tried: str, timeout: float, env: t.Mapping[str, str] | None = None, stdin: str | None = None
    ) -> CommandResult:
        try:
            as_plugin = {AS_PLUGIN: "docker"} if argv[0] == self.plugin else {}
            return run(argv, timeout=timeout, env={**self._env, **as_plugin, **(env or {})}, stdin=stdin)
        except FileNotFoundError as exc:
            raise DeliveryError(tried, "there is no program docker", "Install the Docker command line with the Compose plugin.") from exc


def find_plugin() -> str:
    """Compose's own program, the one that ``docker compose`` would start; empty where only the docker program knows.

    That one looks at all of its plugins and starts Compose twice, which takes five times as long as Compose itself.
    """
    own = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    try:
        with open(os.path.join(own, "config.json"), encoding="utf-8") as handle:
            settings = json.load(handle)
    except (OSError, ValueError):
        settings = {}
    if not isinstance(settings, dict) or settings.get("cliPluginsExtraDirs"):
        return ""
    paths = (os.path.join(folder, "docker-compose") for folder in (os.path.join(own, "cli-plugins"), *PLUGIN_FOLDERS))
    return next((path for path in paths if os.path.isfile(path) and os.access(path, os.X_OK)), "")


def _create_argv(scales: t.Mapping[str, int]) -> list[str]:
    argv = ["up", "--no-start", "--no-deps", "--no-recreate", "--no-build", "--pull", "never"]
    for service, count in scales.items():
        argv += ["--scale", f"{service}={count}"]
    return [*argv, *scales]


def _pinned(path: str) -> dict[str, str]:
    try:
        with open(path, encoding="utf-8") as handle:
            lines = handle.read().splitlines()
    except OSError:
        return {}  # preflight names the missing file
    pairs = (line.partition("=") for line in lines if "=" in line and not line.lstrip().startswith("#"))
    return {key.strip(): value.strip().strip("\"'") for key, _sep, value in pairs}


def _warnings(stderr: str) -> list[str]:
    found = []
    for line in stderr.splitlines():
        match = re.search(r'level=warning msg="((?:[^"\\]|\\.)*)"', line)
        if match:
            found.append(match.group(1).replace('\\"', '"'))
    return found


def parse_version(text: str) -> tuple[int, int] | None:
    """``v2.40.3-desktop.1`` is (2, 40); ``dev`` is None."""
    match = re.match(r"v?(\d+)\.(\d+)", text.strip())
    return (int(match.group(1)), int(match.group(2))) if match else None


def end_leftovers(marker: str, timeout: float = 10.0) -> list[int]:
    """End programs that a killed module of the same release left running, so that nothing is created behind undo's back.

    Only processes that carry ``marker`` in their environment, never this one. Returns their ids.
    """
    wanted = f"{MARKER}={marker}".encode()
    ended: list[int] = []
    deadline = time.monotonic() + timeout
    pause = 0.02
    while True:
        alive = _marked(wanted)
        if not alive:
            return ended
        late = time.monotonic() > deadline
        if time.monotonic() > deadline + 5:
            raise DeliveryError(
                "Ending what a killed run left behind",
                f"the programs {', '.join(map(str, alive))} do not end",
                "End them, then call this again.",
                "rollback_failed",
            )
        for pid in alive:
            if late or pid not in ended:
                _signal(pid, signal.SIGKILL if late else signal.SIGTERM)
        ended += [pid for pid in alive if pid not in ended]
        time.sleep(pause)
        pause = min(pause * 1.5, 0.25)


def _marked(wanted: bytes) -> list[int]:
    found = []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        try:
            with open(f"/proc/{name}/environ", "rb") as handle:
                if wanted in handle.read().split(b"\0"):
                    found.append(int(name))
        except OSError:
            continue  # gone, or another user's
    return found


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except (ProcessLookupError, PermissionError):
        pass
