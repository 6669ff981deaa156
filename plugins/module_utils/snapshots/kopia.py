# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Kopia as a snapshot engine. The traps it avoids are named where they are avoided."""

from __future__ import annotations

import contextlib
import glob
import json
import os
import typing as t
import uuid
from urllib.parse import parse_qs, urlsplit

from ansible_collections.selfhost.delivery.plugins.module_utils.command import CommandResult
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.snapshots.engines import Base, RepositoryStatus, Stored

#: Nothing may be left out quietly, and nothing may be expired by a snapshot: only this collection deletes.
_POLICY = (
    "--inherit=false",
    "--clear-ignore",
    "--clear-dot-ignore",
    "--ignore-cache-dirs=false",
    "--max-file-size=0",
    "--ignore-file-errors=false",
    "--ignore-dir-errors=false",
    "--ignore-unknown-types=true",
    "--keep-latest=1000000",
    "--compression=zstd-fastest",
)

#: The same as Kopia shows it, where another value would lose something.
_WANTED: dict[str, t.Any] = {
    "retention.keepLatest": 1000000,
    "files.ignore": None,
    "files.maxFileSize": None,
    "files.ignoreDotFiles": None,
    "files.ignoreCacheDirs": False,
    "errorHandling.ignoreFileErrors": False,
    "errorHandling.ignoreDirectoryErrors": False,
    "compression.compressorName": "zstd-fastest",
}

_PIN = "selfhost-delivery"
#: What the places of a repository are called in its URL, their options there, and what goes before the last part of the path.
_PLACES: dict[str, tuple[str, tuple[str, ...]]] = {
    "s3": ("s3", ("endpoint", "region", "tls")),
    "b2": ("b2", ()),
    "sftp": ("sftp", ("keyfile", "known_hosts")),
    "webdav": ("webdav", ()),
    "kopia": ("server", ("fingerprint",)),
}


class Kopia(Base):
    """See ``engines.SnapshotEngine``. Repositories: an absolute path, or a URL as in ``_PLACES``."""

    name = "kopia"
    keeps_everything = False
    sees_every_change = False

    _joined = False

    def close(self) -> None:
        # Kopia writes the keys of a bucket and the like into its configuration, wherever they came from.
        if not self.settings.local_path:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._config)

    @property
    def _config(self) -> str:
        return os.path.join(self.directory, "kopia.config")

    def environment(self) -> dict[str, str]:
        return {
            **self.settings.env,
            "KOPIA_PASSWORD": self.settings.password,
            "KOPIA_CONFIG_PATH": self._config,
            "KOPIA_LOG_DIR": os.path.join(self.directory, "log"),
            "KOPIA_CHECK_FOR_UPDATES": "false",
        }

    def version(self) -> str:
        return self.call("--version", timeout=60).stdout.strip().split(" from:", maxsplit=1)[0]

    def status(self) -> RepositoryStatus:
        path = self.settings.local_path
        # Kopia itself calls a vanished repository fine while it has the format cached, so the marker is looked at first.
        if path and not glob.glob(os.path.join(glob.escape(path), "kopia.repository*")):
            return RepositoryStatus("missing" if self.remembered_id() else "absent", free_bytes=self.free_bytes())
        if not path and not self._joined:
            self.close()  # the keys may be others today
        if not os.path.exists(self._config):
            joined = self.call("repository", "connect", *self._place(), *self._connection(), timeout=300)
            if not joined.ok:
                if "not initialized" in joined.stderr:
                    return RepositoryStatus("missing" if self.remembered_id() else "absent")
                raise self._unusable(joined)
            self._joined = True
        answer = self.call("repository", "status", "--json", timeout=300)
        if not answer.ok:
            raise self._unusable(answer)
        # A Kopia server does not tell the id of what is behind it, so it is known by its certificate.
        name = (
            str(json.loads(answer.stdout)["uniqueIDHex"]) or parse_qs(urlsplit(self.settings.repository).query)["fingerprint"][-1].lower()
        )
        return self.remember(RepositoryStatus("ready", name, self.free_bytes()))

    def create(self) -> RepositoryStatus:
        self.refuse_creation()
        path = self.settings.local_path
        if path:
            os.makedirs(path, mode=0o700, exist_ok=True)
        if self._place()[0] == "server":
            raise DeliveryError(
                f"create the Kopia repository {self._shown}", "a server has its own already", "Use state connected.", "config"
            )
        self._joined = True
        made = self.call("repository", "create", *self._place(), *self._connection(), timeout=300)
        if not made.ok:
            raise self.failure(f"create the Kopia repository {self.settings.repository}", made, "Check the place and its rights.")
        self._set_policy()
        return self.status()

    def settle_policies(self, owner: bool, check_mode: bool) -> tuple[dict[str, t.Any], dict[str, t.Any]]:
        before = self._policies(owner)
        me = f"selfhost-delivery@{os.uname().nodename.lower()}"
        after = {**_WANTED, **({"maintenance.owner": me} if owner else {})}
        if before == after or self.settings.read_only:
            return before, before
        if not check_mode:
            self._set_policy()
            if owner and before["maintenance.owner"] != me:
                done = self.call("maintenance", "set", f"--owner={me}", timeout=300)
                if not done.ok:
                    raise self.failure("set the owner of the maintenance of the Kopia repository", done)
            after = self._policies(owner)
        return before, after

    def change_password(self, password: str) -> None:
        self.refuse_writing("change the password")
        done = self.call("repository", "change-password", timeout=300, more={"KOPIA_NEW_PASSWORD": password})
        if not done.ok:
            raise self.failure(f"change the password of the Kopia repository {self._shown}", done)

    def _policies(self, owner: bool) -> dict[str, t.Any]:
        shown = self._answer("read the policy of the Kopia repository", "policy", "show", "--global", "--json")
        found: dict[str, t.Any] = {}
        for name in _WANTED:
            section, key = name.split(".")
            found[name] = (shown.get(section) or {}).get(key, False if _WANTED[name] is False else None)
        # It shows the defaults that are never asked for.
        if found["files.ignoreDotFiles"] == [".kopiaignore"]:
            found["files.ignoreDotFiles"] = None
        if owner:
            found["maintenance.owner"] = self._answer("read who maintains the Kopia repository", "maintenance", "info", "--json")["owner"]
        return found

    def _answer(self, tried: str, *arguments: str) -> dict[str, t.Any]:
        done = self.call(*arguments, timeout=300)
        if not done.ok:
            raise self.failure(tried, done)
        return json.loads(done.stdout)

    def _set_policy(self) -> None:
        done = self.call("policy", "set", "--global", *_POLICY[1:], timeout=300)
        if not done.ok:
            raise self.failure("set the policy of the Kopia repository", done)

    def connect(self) -> RepositoryStatus:
        found = self.status()
        if found.state == "ready":
            return found
        seen = "there is no repository any more, though this host used one there" if found.state == "missing" else "there is no repository"
        raise DeliveryError(
            f"open the Kopia repository {self.settings.repository}",
            seen,
            "Mount its disk, or create it with kopia_repository.",
            "config",
        )

    def prepare(self, sources: t.Sequence[str]) -> None:
        done = self.call("policy", "set", *_POLICY, *sources, timeout=300)
        if not done.ok:
            raise self.failure("set the Kopia policy of the sources", done)

    def snapshot(self, sources: t.Sequence[str], tags: t.Mapping[str, str], full_read: bool, timeout: float, moving: bool) -> list[Stored]:
        self.refuse_writing("take a snapshot")
        mark = uuid.uuid4().hex
        every = {**tags, "call": mark}
        options = [
            "--json",
            "--no-progress",
            "--no-auto-maintenance",
            "--fail-fast",
            f"--pin={_PIN}",
            f"--force-hash={100 if full_read else 0}",
        ]
        result: CommandResult | None = None
        try:
            result = self.call("snapshot", "create", *options, *(f"--tags={k}:{v}" for k, v in every.items()), *sources, timeout=timeout)
            found = {one.source: one for one in (_stored(json.loads(line)) for line in result.stdout.splitlines() if line.startswith("{"))}
            broken = [f"{one.source}: {one.broken}" for one in found.values() if one.broken]
            if result.ok and not broken and all(source in found for source in sources):
                return [found[source] for source in sources]
        except BaseException:
            self._discard(mark)
            raise
        # A cancelled or partly failed snapshot is saved, tagged and listed like a good one: it must go.
        self._discard(mark)
        if broken:
            raise DeliveryError("take a Kopia snapshot", "; ".join(broken), "Make every file readable and try again.", "snapshot")
        raise self.failure("take a Kopia snapshot", result)

    def identified(self, stored: t.Sequence[Stored]) -> list[Stored]:
        return list(stored)

    def contents(self) -> list[Stored]:
        answer = self.call("snapshot", "list", "--json", "--all", timeout=600)
        if not answer.ok:
            raise self.failure(f"list the Kopia repository {self.settings.repository}", answer)
        found = [_stored(item) for item in json.loads(answer.stdout or "[]")]
        return sorted((one for one in found if "set" in one.tags), key=lambda one: one.created)

    def restore(self, stored: Stored, target: str) -> None:
        workers = f"--parallel={max(2, os.cpu_count() or 2)}"
        done = self.call(
            "restore",
            "--mode=local",
            "--no-progress",
            "--no-ignore-permission-errors",
            "--write-sparse-files",
            workers,
            stored.snapshot,
            target,
        )
        if not done.ok:
            raise self.failure(f"restore {stored.source} from Kopia", done)

    def verify(self, stored: t.Sequence[Stored]) -> None:
        ids = sorted({one.snapshot for one in stored})
        # Without the percentage it only asks whether the blobs exist.
        done = self.call("snapshot", "verify", "--json", "--verify-files-percent=100", *ids)
        numbers: dict[str, t.Any] = {}
        try:
            numbers = json.loads(done.stdout)
        except ValueError:
            pass
        read = numbers.get("stats", {}).get("processedObjectCount", 0)
        if not done.ok or numbers.get("errorCount", 1) or not read:
            raise self.failure("read the snapshot back from Kopia", done, "The repository is damaged; do not rely on it.")

    def delete(self, stored: t.Sequence[Stored]) -> None:
        if not stored:
            return
        ids = sorted({one.snapshot for one in stored})
        if self.call("snapshot", "delete", "--delete", *ids, timeout=600).ok:
            return
        # One may be gone already, and Kopia stops at the first that is.
        left = sorted({one.snapshot for one in self.contents()}.intersection(ids))
        if left:
            done = self.call("snapshot", "delete", "--delete", *left, timeout=600)
            if not done.ok:
                raise self.failure("delete Kopia snapshots", done)

    def prune(self) -> None:
        done = self.call("maintenance", "run", "--full")
        if not done.ok:
            raise self.failure("run the Kopia maintenance", done)

    def _discard(self, mark: str) -> None:
        answer = self.call("snapshot", "list", "--json", "--all", timeout=600)
        if not answer.ok:
            return
        ids = [item["id"] for item in json.loads(answer.stdout or "[]") if item.get("tags", {}).get("tag:call") == mark]
        if ids:
            self.call("snapshot", "delete", "--delete", *ids, timeout=600)

    def _place(self) -> list[str]:
        if self.settings.local_path:
            return ["filesystem", f"--path={self.settings.local_path}"]
        url = urlsplit(self.settings.repository)
        known = _PLACES.get(url.scheme)
        if known is None or not url.netloc or url.password or (url.username and url.scheme != "sftp"):
            raise DeliveryError(
                f"use the Kopia repository {self._shown}",
                "it is neither an absolute path nor a URL that Kopia takes, without any password in it",
                "Give a path, s3://bucket/prefix, b2://bucket/prefix, sftp://user@host/path, webdav://host/path or kopia://host:port, "
                "and secrets in env.",
                "config",
            )
        given = {key: values[-1] for key, values in parse_qs(url.query).items()}
        for key in given:
            if key not in known[1]:
                raise DeliveryError(
                    "read the repository URL", f"unknown parameter {key}", f"Known: {', '.join(known[1]) or 'none'}.", "config"
                )
        place = [known[0]]
        prefix = url.path.strip("/")
        if url.scheme in ("s3", "b2"):
            place += [f"--bucket={url.netloc}", *([f"--prefix={prefix}/"] if prefix else [])]
            place += [f"--{key}={value}" for key, value in given.items() if key != "tls"]
            place += ["--disable-tls"] if given.get("tls") == "false" else []
        elif url.scheme == "sftp":
            place += [f"--host={url.hostname}", f"--port={url.port or 22}", f"--username={url.username or 'root'}", f"--path={url.path}"]
            place += [f"--keyfile={given['keyfile']}"] if "keyfile" in given else []
            place += [f"--known-hosts={given['known_hosts']}"] if "known_hosts" in given else []
        elif url.scheme == "webdav":
            place += [f"--url=https://{url.netloc}{url.path}"]
        else:
            if "fingerprint" not in given:
                raise DeliveryError(
                    f"use the Kopia server {url.netloc}", "the fingerprint of its certificate is missing", "Add ?fingerprint=….", "config"
                )
            place += [f"--url=https://{url.netloc}", f"--server-cert-fingerprint={given['fingerprint']}"]
        return place

    @property
    def _shown(self) -> str:
        """The repository without what may be a password in its URL."""
        return self.settings.repository.split("@")[-1]

    def _connection(self) -> list[str]:
        # A restore would copy every byte into the content cache; what is not on a disk still needs some for its metadata.
        megabytes = self.settings.cache_mb
        if megabytes is None:
            megabytes = 0 if self.settings.local_path else 64
        return [
            *(["--disable-repository-format-cache"] if self._place()[0] != "server" else []),
            "--no-persist-credentials",
            "--no-check-for-updates",
            f"--content-cache-size-mb={megabytes}",
            f"--cache-directory={os.path.join(self.directory, 'cache')}",
            f"--override-hostname={os.uname().nodename.lower()}",
            "--override-username=selfhost-delivery",
            *(["--readonly"] if self.settings.read_only else []),
        ]

    def _unusable(self, result: CommandResult) -> DeliveryError:
        tried = f"open the Kopia repository {self.settings.repository}"
        if "invalid repository password" in result.stderr:
            return DeliveryError(tried, "the password is wrong", "Give the password it was created with.", "config")
        return self.failure(tried, result, "Check that its disk is mounted and readable.")


def _stored(item: t.Mapping[str, t.Any]) -> Stored:
    """One manifest as ``snapshot create --json`` and ``snapshot list --json`` print it."""
    entry = item.get("rootEntry") or {}
    summary = entry.get("summ") or {}
    broken = ""
    if item.get("incomplete") or summary.get("incomplete"):
        broken = f"Kopia ended early ({item.get('incomplete') or summary.get('incomplete')})"
    elif summary.get("numFailed"):
        errors = summary.get("errors") or [{}]
        broken = f"{summary['numFailed']} entries could not be stored, first {errors[0].get('path')}: {errors[0].get('error')}"
    elif not entry.get("obj"):
        broken = "it has no content"
    tags = {key[4:] if key.startswith("tag:") else key: value for key, value in (item.get("tags") or {}).items()}
    return Stored(
        item["source"]["path"],
        item["id"],
        entry.get("obj", ""),
        tags,
        item.get("startTime", ""),
        int(summary.get("files", 0)),
        int(summary.get("size", 0)),
        broken,
    )
