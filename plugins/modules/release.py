#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The lease, the journal and the end of a release."""

from __future__ import annotations

DOCUMENTATION = r"""
module: release
short_description: Take the lock of an app, open a release, journal its steps, end it
version_added: 0.1.0
description:
  - Runs on the coordinator, the first host of the app, but for V(laid_out) and V(adopted), which are for the other hosts. One run at a
    time works on an app. The lock is a lease that is renewed with each step and is recovered, not ignored, when its holder died.
  - A release is a folder below C(releases/) of the deploy dir with C(release.json), C(journal.jsonl) and the files that were given.
    The folder appears whole or not at all.
  - With O(state=started), when an earlier release has no end, or was not taken back on one of O(hosts), nothing new is made. The lock is
    taken and RV(recover) says what has to be finished or undone first.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
attributes:
  check_mode:
    support: full
    details:
      - With O(state=started) the lock and an open release are reported; a lock held by another run is a warning, since nothing is taken.
  diff_mode:
    support: none
  idempotent:
    support: partial
    details:
      - A step that has begun or ended in this run, and an end, are not written twice. A note always is.
options:
  app:
    description: Name of the app.
    type: str
    required: true
  environment:
    description: Name of the environment.
    type: str
    required: true
  deploy_dir:
    description: Folder of the app on this host. It must exist.
    type: path
    required: true
  state:
    description:
      - V(started) takes the lock and makes the release.
      - V(step) appends to its journal and renews the lease.
      - V(committed) moves C(current) to it. V(rolled_back), V(aborted) and V(rollback_failed) are the other ends.
        All of them give the lock back.
      - V(frozen) ends it and leaves a lock that is never waited for and never expires, until a person lifts it.
      - V(failed) records a failure. Where nothing had been changed the release ends as aborted, else it stays open and RV(recover) says
        what is owed.
      - V(unlocked) lifts a freeze, or the lock of a run that is gone.
      - V(laid_out) writes O(files) into the release folder of a host that is not the coordinator; V(adopted) moves C(current) there and
        removes old folders. They know no lock and no journal.
    type: str
    required: true
    choices: [started, step, committed, failed, rolled_back, aborted, frozen, rollback_failed, unlocked, laid_out, adopted]
  release_id:
    description: The release. Required but for V(started), where the default is made of time and tag, and for V(unlocked).
    type: str
  run_id:
    description: Who owns the lock. Default is the same for all tasks of one C(ansible-playbook) process.
    type: str
  holder:
    description: What others are told about who holds the lock. Default is the C(ansible-playbook) process on the controller.
    type: dict
    suboptions:
      user:
        description: Name of the user on the controller.
        type: str
      host:
        description: Name of the controller.
        type: str
      pid:
        description: Process that holds the lock.
        type: int
      pid_started:
        description: When that process started, in clock ticks since boot.
        type: str
      boot_id:
        description: Boot id of the controller.
        type: str
      pid_namespace:
        description: Process id namespace of the controller.
        type: str
      ci_url:
        description: Page of the CI job.
        type: str
  kind:
    description: What the release is for.
    type: str
    choices: [promote, rollback]
    default: promote
  tag:
    description: The immutable tag. Required with V(started).
    type: str
  plan:
    description:
      - Kept in C(release.json), so that going back needs nothing else.
      - C(images), image name to reference by digest, counts when releases are compared; C(policies) is read by a recovery.
    type: dict
    default: {}
  files:
    description: Files of the release folder, for V(started), V(step) and V(laid_out).
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Path inside the release folder.
        type: str
        required: true
      content:
        description: The text.
        type: str
        required: true
      mode:
        description: Octal permissions.
        type: str
        default: "0600"
  step:
    description: Required with V(step).
    type: str
    choices:
      - planned
      - locked
      - preflighted
      - pinned
      - pulled
      - snapshotted
      - dependencies
      - held
      - hosts
      - migrated
      - rolling
      - verifying
      - baking
      - committed
      - reverting
      - restoring
  event:
    description: Required with V(step).
    type: str
    choices: [begin, end, note, fail]
  service:
    description: The Compose service, for steps that are taken service by service.
    type: str
  data:
    description: Kept with the journal entry. Must not hold a secret.
    type: dict
    default: {}
  ttl:
    description: Seconds until the lease ends unless it is renewed.
    type: int
    default: 900
  lock_wait:
    description: Seconds to wait for another run.
    type: int
    default: 0
  busy_timeout:
    description: Seconds to wait for a module of an earlier run that still works on this host.
    type: int
    default: 60
  failure:
    description:
      - Why the release failed. C(class) is the failure class, C(message) one sentence for people.
    type: dict
  takeover:
    description: Take the lock from a living holder or lift a freeze. Only when it is known that nothing works there any more.
    type: bool
    default: false
  unchanged_ok:
    description: With V(started), when the same tag, digests and files are current already, answer RV(unchanged) and keep no lock.
    type: bool
    default: true
  hosts:
    description:
      - With V(started), the hosts of this run. With an end, those that the release was taken back on.
    type: list
    elements: str
    default: []
  lost:
    description:
      - With V(rolled_back), those of O(hosts) that were not reached, so that they still run what they ran. The release ends as
        V(rollback_failed) then, and the next V(started) with one of them in its O(hosts) is told by RV(recover).
    type: list
    elements: str
    default: []
  keep_lock:
    description: With an end, keep the lock for the same run, as after a recovery.
    type: bool
    default: false
  keep_releases:
    description:
      - With V(committed) and V(adopted), how many release folders stay. The current one, on the coordinator also the one before it and
        those without an end always do.
      - V(0) keeps all.
    type: int
    default: 10
seealso:
  - module: selfhost.delivery.release_info
  - module: selfhost.delivery.recovery_info
  - module: selfhost.delivery.compose_rollout
"""

EXAMPLES = r"""
- name: Start a release
  selfhost.delivery.release:
    app: shop
    environment: production
    deploy_dir: /opt/shop
    state: started
    tag: sha-abc
    plan:
      images:
        app: registry.example.com/shop/app@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef
    files:
      - name: compose.yaml
        content: "{{ lookup('ansible.builtin.file', 'compose.yaml') }}"
  register: started

- name: Say that pulling begins
  selfhost.delivery.release:
    app: shop
    environment: production
    deploy_dir: /opt/shop
    state: step
    release_id: "{{ started.release_id }}"
    step: pulled
    event: begin

- name: Commit
  selfhost.delivery.release:
    app: shop
    environment: production
    deploy_dir: /opt/shop
    state: committed
    release_id: "{{ started.release_id }}"

- name: Lift a freeze
  selfhost.delivery.release:
    app: shop
    environment: production
    deploy_dir: /opt/shop
    state: unlocked
"""

RETURN = r"""
release_id:
  description: The release. With RV(recover), the open one.
  returned: when there is one
  type: str
  sample: 20261121-101500-sha-abc
release_dir:
  description: Its folder.
  returned: when there is one
  type: str
  sample: /opt/shop/releases/20261121-101500-sha-abc
journal:
  description: Its journal file.
  returned: when there is one
  type: str
  sample: /opt/shop/releases/20261121-101500-sha-abc/journal.jsonl
run_id:
  description: The run that owns the lock.
  returned: success
  type: str
  sample: ci-1-4242-123456
previous:
  description: The C(release.json) of the release that C(current) pointed at before, null when there was none.
  returned: with O(state=started)
  type: dict
  sample: {id: 20261120-090000-sha-def, tag: sha-def}
unchanged:
  description: The same tag, digests and files are current already. No release was made and no lock is held.
  returned: with O(state=started)
  type: bool
  sample: false
recover:
  description: What has to be ended first, null when nothing has.
  returned: with O(state=started) and O(state=failed)
  type: dict
  contains:
    id:
      description: The open release.
      type: str
      sample: 20261121-101500-sha-abc
    action:
      description: V(finish) when its commit had begun, V(undo) when it had changed something, else V(abort).
      type: str
      sample: undo
    phase:
      description: The last step that ended.
      type: str
      sample: migrated
    state:
      description: The folded journal.
      type: dict
      sample: {status: open}
    release:
      description: Its C(release.json).
      type: dict
      sample: {tag: sha-abc}
    hosts:
      description: Where alone it has to be undone, empty for everywhere.
      type: list
      elements: str
      sample: [app-3]
took_over:
  description: The lock of the dead run that was replaced, null when there was none.
  returned: with O(state=started)
  type: dict
  sample: null
lock:
  description:
    - The lock that was found, in check mode, or that was removed, with O(state=unlocked).
    - With a failure of class V(lock), the lock in the way.
  returned: in check mode, with O(state=unlocked), and on failure
  type: dict
  sample: {run_id: ci-1-4242-123456, step: rolling}
release:
  description:
    - The C(release.json) of RV(release_id), after the end when one was given.
    - Null in check mode, when the release does not exist.
  returned: with O(state=started), and with an end outside check mode
  type: dict
  sample: {id: 20261121-101500-sha-abc, result: committed, seconds: 41.2, durations: {pulled: 3.1}}
lines:
  description: How it ended, for people.
  returned: with an end, outside check mode
  type: list
  elements: str
  sample: ["sha-abc committed in production, release 20261121-101500-sha-abc, 41.2 s"]
pruned:
  description: Ids of the release folders that were removed.
  returned: with O(state=committed) and O(state=adopted)
  type: list
  elements: str
  sample: []
failure_class:
  description: Stable name of what went wrong, V(lock) for a lock that is held or lost.
  returned: failure
  type: str
  sample: lock
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils import releases
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError


class ReleaseManager:
    """One call of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        params = module.params
        self.module = module
        self.params = params
        self.deploy_dir: str = params["deploy_dir"]
        self.run_id: str = params["run_id"] or ""
        self.lease = releases.Lease(self.deploy_dir, self.run_id)

    def run(self) -> dict[str, t.Any]:
        state = self.params["state"]
        if not self.run_id:
            raise DeliveryError("Starting", "there is no run_id", "Call this module as a task, or give run_id.")
        if state == "started":
            result = self.started()
        elif state == "step":
            result = self.step()
        elif state == "unlocked":
            result = self.unlocked()
        elif state in ("laid_out", "adopted"):
            result = self.elsewhere(state)
        elif state == "failed":
            result = self.failed()
        else:
            result = self.ended(state)
        return {"run_id": self.run_id, **result}

    def _folder(self, release_id: str) -> dict[str, t.Any]:
        return {
            "release_id": release_id,
            "release_dir": releases.release_path(self.deploy_dir, release_id),
            "journal": releases.journal_path(self.deploy_dir, release_id),
        }

    # --- started

    def started(self) -> dict[str, t.Any]:
        release_id = self.params["release_id"] or releases.new_release_id(self.params["tag"], deploy_dir=self.deploy_dir)
        releases.release_path(self.deploy_dir, release_id)
        if self.module.check_mode:
            return self._started_check(release_id)
        params = self.params
        acquired = self.lease.acquire(
            self.run_id, params["holder"] or {}, release_id, params["ttl"], wait=params["lock_wait"], takeover=params["takeover"]
        )
        keep = False
        try:
            # An orphaned module of a dead run stops at its next look at the lock; only then is the journal complete.
            with releases.busy(self.deploy_dir, params["busy_timeout"]):
                result = self._started_locked(release_id)
            keep = not result["unchanged"]
        finally:
            if not keep:
                self.lease.release()
        return {"took_over": acquired.previous_dead_holder, **result}

    def _started_locked(self, release_id: str) -> dict[str, t.Any]:
        params = self.params
        previous = releases.current_release(self.deploy_dir)
        result: dict[str, t.Any] = {"changed": True, "previous": previous, "unchanged": False, "recover": None}
        unfinished = self._unfinished()
        if unfinished is not None:
            self.lease.acquire(self.run_id, params["holder"] or {}, unfinished["id"], params["ttl"])
            result.update(self._folder(unfinished["id"]), release=releases.read_release(self.deploy_dir, unfinished["id"]))
            if self._is_this_one(unfinished):
                return {**result, "changed": False}
            return {**result, "recover": releases.recovery_owed(unfinished)}
        if not params["release_id"] and releases.release_ids(self.deploy_dir)[:1] >= [release_id]:
            # While this one waited for the lock, another that asked later had it.
            release_id = releases.new_release_id(params["tag"], deploy_dir=self.deploy_dir)
            self.lease.acquire(self.run_id, params["holder"] or {}, release_id, params["ttl"])
        identity = releases.fingerprint(params["tag"], params["plan"].get("images") or {}, params["files"], release_id)
        if params["unchanged_ok"] and previous is not None and self._is_current(previous, identity):
            return {**result, **self._folder(previous["id"]), "changed": False, "unchanged": True, "release": previous}
        record = {
            "id": release_id,
            "app": params["app"],
            "environment": params["environment"],
            "kind": params["kind"],
            "tag": params["tag"],
            "run_id": self.run_id,
            "holder": params["holder"] or {},
            "plan": params["plan"],
            "fingerprint": identity,
            "previous": previous["id"] if previous else None,
            "started": releases.timestamp(),
            "ended": None,
            "result": None,
        }
        releases.create_release(self.deploy_dir, record, self.run_id, params["files"])
        return {**result, **self._folder(release_id), "release": record}

    def _unfinished(self) -> dict[str, t.Any] | None:
        return releases.open_release(self.deploy_dir) or releases.owed_release(self.deploy_dir, self.params["hosts"])

    def _is_current(self, previous: dict[str, t.Any], identity: str) -> bool:
        """The same tag, digests and files; after a way back that failed, what is current need not be what runs."""
        if previous.get("fingerprint") != identity:
            return False
        newer = (one for one in releases.list_releases(self.deploy_dir) if one["id"] > previous["id"])
        return not any(one["state"]["status"] in ("rollback_failed", "frozen") for one in newer)

    def _is_this_one(self, unfinished: dict[str, t.Any]) -> bool:
        """Whether this very run made that release just before (a retried task) and has done nothing with it yet."""
        same = all(unfinished.get(key) == self.params[key] for key in ("run_id", "kind", "tag"))
        return same and unfinished["state"]["phase"] == "locked" and unfinished["state"]["current"] is None

    def _started_check(self, release_id: str) -> dict[str, t.Any]:
        params = self.params
        lock = self.lease.read()
        if lock and self.lease.status(lock) in ("held", "freeze") and lock["run_id"] != self.run_id and not params["takeover"]:
            self.module.warn(f"A real run would be refused, or wait: {releases.lock_error(self.deploy_dir, lock).message}")
        previous = releases.current_release(self.deploy_dir)
        unfinished = self._unfinished()
        identity = releases.fingerprint(params["tag"], params["plan"].get("images") or {}, params["files"], release_id)
        unchanged = bool(not unfinished and params["unchanged_ok"] and previous and self._is_current(previous, identity))
        shown = unfinished["id"] if unfinished else previous["id"] if unchanged and previous else release_id
        return {
            "changed": not unchanged,
            "previous": previous,
            "unchanged": unchanged,
            "recover": releases.recovery_owed(unfinished) if unfinished else None,
            "took_over": None,
            "lock": lock,
            "release": releases.read_release(self.deploy_dir, shown) if unfinished or unchanged else None,
            **self._folder(shown),
        }

    # --- under way

    def step(self) -> dict[str, t.Any]:
        params = self.params
        release_id, step, event, service = params["release_id"], params["step"], params["event"], params["service"]
        result = {"changed": True, **self._folder(release_id)}
        if self.module.check_mode:
            return result  # the release itself may not exist: started made none
        releases.read_release(self.deploy_dir, release_id)
        self.lease.renew(step, params["ttl"])
        changed = bool(releases.write_files(result["release_dir"], params["files"]))
        changed = releases.Journal(result["journal"], self.run_id).append_once(event, step, service, params["data"]) or changed
        return {**result, "changed": changed}

    # --- the ends

    def failed(self) -> dict[str, t.Any]:
        release_id = self.params["release_id"]
        result: dict[str, t.Any] = {"changed": True, "recover": None, **self._folder(release_id)}
        if self.module.check_mode:
            return result
        record = releases.read_release(self.deploy_dir, release_id)
        state = releases.fold(releases.read_journal(self.deploy_dir, release_id))
        if not state.open:
            return {**result, "changed": self._give_back(), "release": record}
        if not state.changed and not state.commit_begun:
            return self.ended("aborted")
        self.lease.check()
        failure = self._failure()
        with releases.busy(self.deploy_dir, self.params["busy_timeout"]):
            if state.current is not None:
                journal = releases.Journal(result["journal"], self.run_id)
                journal.fail(state.current.step, state.current.service, failure_class=failure["class"], message=failure["message"])
            releases.update_release(self.deploy_dir, release_id, failure_class=failure["class"], failure=failure["message"])
        self._give_back()
        unfinished = releases.open_release(self.deploy_dir)
        return {
            **result,
            "recover": releases.recovery_owed(unfinished) if unfinished else None,
            "release": releases.read_release(self.deploy_dir, release_id),
        }

    def ended(self, end: str) -> dict[str, t.Any]:
        release_id = self.params["release_id"]
        result: dict[str, t.Any] = {"changed": True, **self._folder(release_id)}
        if self.module.check_mode:
            return result
        record = releases.read_release(self.deploy_dir, release_id)
        state = releases.fold(releases.read_journal(self.deploy_dir, release_id))
        failure = self._failure() if self.params["failure"] else None
        changed, pruned = False, []
        owed: list[str] = []
        if end in ("rolled_back", "rollback_failed"):
            owed = releases.owed_after(record, self.params["hosts"], self.params["lost"])
        if owed:
            end = "rollback_failed"
        if state.status != end or owed != (record.get("owed") or []):
            self.lease.check()
            with releases.busy(self.deploy_dir, self.params["busy_timeout"]):
                if end == "frozen":
                    # Before the end is written: a crash in between must not leave a frozen release without its freeze.
                    reason = failure["message"] if failure else f"release {release_id} needs a decision"
                    self.lease.freeze(reason, release_id=release_id)
                changed = releases.finish_release(self.deploy_dir, release_id, self.run_id, end, failure, owed)
                if end == "committed" and self.params["keep_releases"]:
                    pruned = self._prune()
        changed = self._give_back() or changed
        if changed:
            record = releases.read_release(self.deploy_dir, release_id)
        if end == "committed":
            result["pruned"] = pruned
        if self.params["state"] == "failed":
            result["recover"] = None
        state = releases.fold(releases.read_journal(self.deploy_dir, release_id))
        return {**result, "changed": changed, "release": record, "lines": releases.sum_up(record, state)}

    def _prune(self) -> list[str]:
        """Cleaning up never fails a release that is committed."""
        try:
            pruned, warnings = releases.prune_releases(self.deploy_dir, self.params["keep_releases"])
        except (DeliveryError, OSError) as error:
            pruned, warnings = [], [f"old release folders were not removed: {error}"]
        for warning in warnings:
            self.module.warn(warning)
        return pruned

    def _failure(self) -> dict[str, str]:
        failure = self.params["failure"] or {}
        unknown = sorted(set(failure) - {"class", "message"})
        if unknown:
            raise DeliveryError("Reading failure", f"it does not know {', '.join(unknown)}", "Give class and message.")
        return {"class": str(failure.get("class") or ""), "message": str(failure.get("message") or "no reason was given")}

    def _give_back(self) -> bool:
        return False if self.params["keep_lock"] else self.lease.release()

    # --- on the other hosts

    def elsewhere(self, state: str) -> dict[str, t.Any]:
        release_id, keep = self.params["release_id"], self.params["keep_releases"]
        result: dict[str, t.Any] = {"changed": True, **self._folder(release_id)}
        if self.module.check_mode:
            return result
        if state == "laid_out":
            return {**result, "changed": releases.lay_out(self.deploy_dir, release_id, self.params["files"])}
        moved, pruned, warnings = releases.adopt(self.deploy_dir, release_id, keep)
        for warning in warnings:
            self.module.warn(warning)
        return {**result, "changed": moved or bool(pruned), "pruned": pruned}

    def unlocked(self) -> dict[str, t.Any]:
        if self.module.check_mode:
            lock = self.lease.read()
            return {"changed": lock is not None, "lock": lock}
        lock = self.lease.unlock(self.params["takeover"])
        return {"changed": lock is not None, "lock": lock}


def main() -> None:
    need_release = ("step", "committed", "failed", "rolled_back", "aborted", "frozen", "rollback_failed", "laid_out", "adopted")
    module = AnsibleModule(
        argument_spec=dict(
            app=dict(type="str", required=True),
            environment=dict(type="str", required=True),
            deploy_dir=dict(type="path", required=True),
            state=dict(type="str", required=True, choices=["started", *need_release, "unlocked"]),
            release_id=dict(type="str"),
            run_id=dict(type="str"),
            holder=dict(
                type="dict",
                options=dict(
                    user=dict(type="str"),
                    host=dict(type="str"),
                    pid=dict(type="int"),
                    pid_started=dict(type="str"),
                    boot_id=dict(type="str"),
                    pid_namespace=dict(type="str"),
                    ci_url=dict(type="str"),
                ),
            ),
            kind=dict(type="str", choices=list(releases.KINDS), default="promote"),
            tag=dict(type="str"),
            plan=dict(type="dict", default={}),
            files=dict(
                type="list",
                elements="dict",
                default=[],
                options=dict(
                    name=dict(type="str", required=True),
                    content=dict(type="str", required=True),
                    mode=dict(type="str", default="0600"),
                ),
            ),
            step=dict(type="str", choices=[*releases.STEPS, *releases.UNDO_STEPS]),
            event=dict(type="str", choices=["begin", "end", "note", "fail"]),
            service=dict(type="str"),
            data=dict(type="dict", default={}),
            ttl=dict(type="int", default=900),
            lock_wait=dict(type="int", default=0),
            busy_timeout=dict(type="int", default=60),
            failure=dict(type="dict"),
            takeover=dict(type="bool", default=False),
            unchanged_ok=dict(type="bool", default=True),
            hosts=dict(type="list", elements="str", default=[]),
            lost=dict(type="list", elements="str", default=[]),
            keep_lock=dict(type="bool", default=False),
            keep_releases=dict(type="int", default=10),
        ),
        required_if=[("state", "started", ("tag",)), ("state", "step", ("step", "event"))]
        + [("state", state, ("release_id",)) for state in need_release],
        supports_check_mode=True,
    )
    try:
        result = ReleaseManager(module).run()
    except DeliveryError as error:
        module.fail_json(**error.as_result())
    module.exit_json(**result)


if __name__ == "__main__":
    main()
