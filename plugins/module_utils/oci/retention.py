# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Retention: which images of a repository may go, and their deletion.

``judge`` and ``decide`` are pure: from what a repository holds (``Inventory``) to what goes and why. What is not shown to be
unused stays. A digest goes as a whole, since a registry that deletes a manifest drops every tag on it.

Deletion runs from the top down: an index before its children, an image before what belongs to it. So no tag ever
names something incomplete, and a look that says "leave it" finds everything still there. What has no tag of its own would be
lost from sight when its parent goes, so it is written down before, in the registry under ``WORKLIST_TAG``: a run that
was cut short is ended by the next one.

Registries have no "delete if unchanged", so the repository is read again before the first deletion and every few seconds after;
only what the plan and the latest look both condemn goes.
"""

from __future__ import annotations

import datetime
import json
import re
import time
import typing as t
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import Registries, RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import OCI_EMPTY, OCI_MANIFEST, Descriptor, Manifest
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.records import said_in
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import Reference, check_digest, digest_of
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import belongs_to, list_api
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transport import Interrupted

WORKLIST_TAG = "selfhost-delivery-retention"
WORKLIST_TYPE = "application/vnd.selfhost.delivery.retention.v1+json"
#: Named in requests that ask whether deletion works; no manifest has this digest and nobody this tag.
_NO_DIGEST = digest_of(b"selfhost.delivery asks whether manifests can be deleted")
_NO_TAG = "selfhost-delivery-no-such-tag"
#: Seconds for which a look at the repository is believed while it is deleted from.
_FRESH = 5.0
#: Builders that want equal bytes for equal input say that everything was built in 1970 or 1980.
_OLDEST = datetime.datetime(1981, 1, 1, tzinfo=datetime.timezone.utc)
_MOMENT = re.compile(r"(\d{4}-\d\d-\d\d)[Tt ](\d\d:\d\d:\d\d)(?:\.\d+)?(?:[Zz]|([+-]\d\d:\d\d))\Z")


# -- what is asked for ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Which tags may go: those that match, but not the newest ``keep`` images of each series nor any younger than ``younger_than`` days.

    A series is what the groups of ``pattern`` matched, so ``^(.+)-[0-9a-f]{7}$`` makes one of each branch.
    """

    pattern: re.Pattern[str]
    keep: int
    younger_than: float | None = None

    @classmethod
    def parse(cls, raw: t.Mapping[str, t.Any]) -> Rule:
        """Read a rule ``{pattern, keep, younger_than, keep_none}``; raises ``DeliveryError`` (config)."""
        tried = f"read the retention rule for {raw.get('pattern')!r}"
        if not raw.get("pattern"):
            raise DeliveryError("read a retention rule", "it has no pattern", "Write a Python regular expression for tags.", "config")
        try:
            pattern = re.compile(str(raw["pattern"]))
        except re.error as exc:
            raise DeliveryError(tried, str(exc), "Write a Python regular expression for tags.", "config") from exc
        keep, younger_than = raw.get("keep"), raw.get("younger_than")
        if keep is None or keep < 0:
            raise DeliveryError(tried, "it does not say how many images to keep", "Give it keep, 1 or more.", "config")
        if (keep == 0) != bool(raw.get("keep_none")):
            seen = "it keeps none, and does not say that this is meant" if keep == 0 else f"it has keep_none and keeps {keep}"
            raise DeliveryError(tried, seen, "keep 0 and keep_none true go together, and never alone.", "config")
        if younger_than is not None and younger_than <= 0:
            raise DeliveryError(tried, f"younger_than is {younger_than}", "Give a number of days above 0, or leave it out.", "config")
        return cls(pattern, keep, younger_than)

    def series(self, tag: str) -> tuple[str | None, ...] | None:
        """The series that ``tag`` is in, ``None`` when it does not match."""
        match = self.pattern.search(tag)
        return match.groups() if match else None


@dataclass(frozen=True)
class Policy:
    """``keep_digests`` stay wherever they are; ``orphans``: what belongs to an image that is gone may go too."""

    rules: tuple[Rule, ...]
    keep_digests: frozenset[str] = frozenset()
    orphans: bool = False

    @classmethod
    def parse(cls, rules: t.Sequence[t.Mapping[str, t.Any]], keep_digests: t.Sequence[str] = (), orphans: bool = False) -> Policy:
        """Read user input; raises ``DeliveryError`` (config). A digest may come with a repository before it."""
        if not rules:
            remedy = "Name the tags that may go, for example {pattern: '^sha-', keep: 20}."
            raise DeliveryError("read the retention rules", "there are none", remedy, "config")
        digests = (check_digest(text.rpartition("@")[2], text) for text in keep_digests)
        return cls(tuple(Rule.parse(rule) for rule in rules), frozenset(digests), orphans)


# -- what a repository holds ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Content:
    """What a manifest holds on to. ``images`` are its children without attestations; ``blobs`` are sizes in bytes by digest."""

    digest: str
    size: int = 0
    is_index: bool = False
    children: tuple[str, ...] = ()
    images: tuple[str, ...] = ()
    config: Descriptor | None = None
    blobs: t.Mapping[str, int] = field(default_factory=dict, hash=False)
    subject: str | None = None
    record: t.Mapping[str, str] | None = field(default=None, hash=False)

    @classmethod
    def of(cls, manifest: Manifest) -> Content:
        children = manifest.children
        return cls(
            manifest.digest,
            len(manifest.body),
            manifest.is_index,
            tuple(child.digest for child in children),
            tuple(child.digest for child in children if not child.attested),
            None if manifest.is_index else manifest.config,
            {} if manifest.is_index else {blob.digest: blob.size for blob in manifest.blobs},
            manifest.subject if manifest.subject and ":" in manifest.subject else None,
            said_in(manifest),
        )


@dataclass
class Inventory:
    """One look at a repository.

    ``tags``: digest by tag, ``None`` for a tag that names nothing. ``created``: when images that rules match were built, ``None`` where
    that is not known. ``loose``: there without a tag, seen only because something says it belongs to them. ``pending``: condemned
    by an earlier run that did not end; ``worklist`` is the manifest that says so.
    """

    tags: dict[str, str | None] = field(default_factory=dict)
    contents: dict[str, Content] = field(default_factory=dict)
    created: dict[str, datetime.datetime | None] = field(default_factory=dict)
    loose: set[str] = field(default_factory=set)
    pending: set[str] = field(default_factory=set)
    worklist: str | None = None

    def own_tags(self) -> dict[str, str]:
        """Tags with a name of their own, which are what rules are about, and what each names."""
        return {tag: digest for tag, digest in self.tags.items() if digest and belongs_to(tag) is None}

    def belongings(self) -> dict[str, set[str]]:
        """What belongs to each digest, by its own word or by its tag."""
        found: dict[str, set[str]] = {}
        for content in self.contents.values():
            if content.subject:
                found.setdefault(content.subject, set()).add(content.digest)
        for tag, digest in self.tags.items():
            subject = belongs_to(tag)
            if subject and digest and digest != subject:
                found.setdefault(subject, set()).add(digest)
        return found


# -- deciding ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kept:
    """A tag that stays."""

    tag: str
    digest: str | None
    reason: str


@dataclass(frozen=True)
class Removal:
    """A manifest that goes with all its ``tags``; ``what`` is ``tag`` where only the tag goes."""

    digest: str
    tags: tuple[str, ...]
    what: str
    reason: str


@dataclass
class Decision:
    """``deleted`` in the order of deletion, ``untagged`` after it. ``held``: why a digest stays, where it does not follow from another."""

    kept: list[Kept]
    deleted: list[Removal]
    untagged: list[Removal]
    held: dict[str, str]


def judge(
    tags: t.Mapping[str, str], created: t.Mapping[str, datetime.datetime | None], rules: t.Sequence[Rule], now: datetime.datetime
) -> dict[str, tuple[bool, str]]:
    """For each tag whether it stays for its own sake, and why. A tag that several rules match goes only if all let it."""
    verdicts: dict[str, tuple[bool, str]] = {}
    for rule in rules:
        series: dict[tuple[str | None, ...], list[str]] = {}
        for tag in tags:
            key = rule.series(tag)
            if key is not None:
                series.setdefault(key, []).append(tag)
        for key, members in series.items():
            # Several tags on one image are one image; of images built at the same moment none is newer, so both stay.
            known = {tags[tag]: moment for tag in members for moment in (created.get(tags[tag]),) if moment}
            newest = sorted(known.values(), reverse=True)[: rule.keep]
            name = f"of {rule.pattern.pattern}" + (f" ({', '.join(part or '' for part in key)})" if key else "")
            for tag in members:
                verdict = _verdict(rule, known.get(tags[tag]), newest, name, now)
                if tag not in verdicts or (verdict[0] and not verdicts[tag][0]):
                    verdicts[tag] = verdict
    return {tag: verdicts.get(tag, (True, "no rule matches it")) for tag in tags}


def _verdict(
    rule: Rule, moment: datetime.datetime | None, newest: list[datetime.datetime], name: str, now: datetime.datetime
) -> tuple[bool, str]:
    if moment is None:
        return True, "when it was built is not known"
    if newest and (len(newest) < rule.keep or moment >= newest[-1]):
        return True, f"one of the last {rule.keep} {name}"
    if rule.younger_than is not None and now - moment < datetime.timedelta(days=rule.younger_than):
        return True, f"younger than {rule.younger_than:g} days"
    age = f" and older than {rule.younger_than:g} days" if rule.younger_than is not None else ""
    return False, f"not one of the last {rule.keep} {name}{age}"


def decide(inventory: Inventory, policy: Policy, now: datetime.datetime, left: t.Mapping[str, str] | None = None) -> Decision:
    """What goes and what stays, and why. ``left`` are digests that stay for the reasons given, whatever the rules say."""
    own, belongings, contents = inventory.own_tags(), inventory.belongings(), inventory.contents
    verdicts = judge(own, inventory.created, policy.rules, now)
    held = _held(inventory, policy, left or {})
    by_tag = {digest: tag for tag, digest in sorted(own.items(), reverse=True) if verdicts[tag][0]}
    orphaned = _orphaned_tags(inventory)

    stay = set(held) | set(by_tag)
    frontier = list(stay)
    while frontier:
        content = contents.get(frontier.pop())
        if content is None:
            continue
        near = {*content.children, *belongings.get(content.digest, ()), *([content.subject] if content.subject else [])}
        frontier += near - stay
        stay |= near

    kept, untagged = [], []
    for tag, digest in sorted(inventory.tags.items()):
        if digest is None:
            kept.append(Kept(tag, None, "it names nothing that the registry has"))
        elif digest not in stay:
            continue
        elif tag in own:
            if verdicts[tag][0]:
                kept.append(Kept(tag, digest, verdicts[tag][1]))
            elif digest in held:
                kept.append(Kept(tag, digest, held[digest]))
            elif digest in by_tag:
                kept.append(Kept(tag, digest, f"names the same image as {by_tag[digest]}"))
            else:
                untagged.append(Removal(digest, (tag,), "tag", f"{verdicts[tag][1]}; its image stays, since another needs it"))
        elif tag in orphaned and digest in held:
            kept.append(Kept(tag, digest, held[digest]))
        elif tag in orphaned or belongs_to(tag) in set(contents) - stay:
            untagged.append(Removal(digest, (tag,), "tag", "its image goes or is gone; what it names stays, since another needs it"))
    gone = set(contents) - stay
    return Decision(kept, _removals(gone, inventory, verdicts), untagged, held)


def _orphaned_tags(inventory: Inventory) -> set[str]:
    """Tags that belong to a digest which the repository does not have."""
    subjects = {tag: belongs_to(tag) for tag, digest in inventory.tags.items() if digest}
    return {tag for tag, subject in subjects.items() if subject and subject not in inventory.contents}


def _held(inventory: Inventory, policy: Policy, left: t.Mapping[str, str]) -> dict[str, str]:
    held = {digest: reason for digest, reason in left.items() if digest in inventory.contents}
    for digest in policy.keep_digests & set(inventory.contents):
        held.setdefault(digest, "named in keep_digests")
    for content in inventory.contents.values():
        if content.record and content.subject in inventory.contents:
            held.setdefault(str(content.subject), f"{content.record['environment']} ran it (release {content.record['release']})")
    for digest in inventory.loose:
        held.setdefault(digest, "it is there without a tag, so something may use it by its digest")
    orphaned = _orphaned_tags(inventory)
    for tag, named in inventory.tags.items():
        if named and belongs_to(tag) == "":
            held.setdefault(named, "to which image it belongs cannot be read from its tag")
        elif named and tag in orphaned and not policy.orphans and named not in inventory.pending:
            held.setdefault(named, "the image it belongs to is gone, and orphans is not set")
    return held


def _removals(gone: set[str], inventory: Inventory, verdicts: t.Mapping[str, tuple[bool, str]]) -> list[Removal]:
    """What is said of each digest that goes, in the order of deletion."""
    belongings, contents = inventory.belongings(), inventory.contents
    tags: dict[str, list[str]] = {}
    for tag in sorted(inventory.tags):
        tags.setdefault(inventory.tags[tag] or "", []).append(tag)
    name = {digest: next((tag for tag in tags.get(digest, ()) if tag in verdicts), digest) for digest in gone}
    # A referrer that an index lists (the fallback tag) is a referrer; so those come last.
    above = {child: ("part", f"part of {name[digest]}") for digest in sorted(gone) for child in contents[digest].children}
    above.update({item: ("referrer", f"belongs to {name[digest]}") for digest in sorted(gone) for item in belongings.get(digest, ())})

    def removal(digest: str) -> Removal:
        named = tuple(tags.get(digest, ()))
        own = dict.fromkeys(verdicts[tag][1] for tag in named if tag in verdicts)
        if own:
            return Removal(digest, named, "index" if contents[digest].is_index else "image", "; ".join(own))
        if digest in above:
            return Removal(digest, named, *above[digest])
        if digest in inventory.pending:
            return Removal(digest, named, "part", "left over by an earlier run that did not end")
        return Removal(digest, named, "orphan", "the image it belongs to is gone")

    return [removal(digest) for digest in _in_order(gone, inventory, belongings)]


def _in_order(gone: set[str], inventory: Inventory, belongings: t.Mapping[str, set[str]]) -> list[str]:
    """Each digest before its children, and those before what belongs to it; the oldest images first."""
    own = set(inventory.own_tags().values())
    backwards: list[str] = []
    seen: set[str] = set()

    def visit(digest: str) -> None:
        if digest in gone and digest not in seen:
            seen.add(digest)
            for below in (*sorted(belongings.get(digest, ())), *reversed(inventory.contents[digest].children)):
                visit(below)
            backwards.append(digest)

    def newest_first(digest: str) -> tuple[bool, float, str]:
        moment = inventory.created.get(digest)
        return digest not in own, -moment.timestamp() if moment else 0.0, digest

    for digest in sorted(gone, key=newest_first):
        visit(digest)
    return backwards[::-1]


# -- reading -------------------------------------------------------------------------------------------------------


class _Reader:
    """Reads one repository, again and again: what a digest means is asked for once, what is there each time."""

    def __init__(self, client: RegistryClient, repository: str, policy: Policy, workers: ThreadPoolExecutor) -> None:
        self.client = client
        self.repository = repository
        self.policy = policy
        self.workers = workers
        #: Everything ever seen, whether it is still there or not.
        self.known: dict[str, Content] = {}
        self._created: dict[str, datetime.datetime | None] = {}

    def read(self, extra: t.Iterable[str] = ()) -> Inventory:
        """Look at everything that tags lead to, and at the digests ``extra`` and those to keep where they are there.

        Raises ``DeliveryError`` when anything cannot be read: what is not known cannot be shown to be unused.
        """
        tags = self.client.tags(self.repository)
        if tags is None:
            raise DeliveryError(
                f"list the tags of {self.client.registry}/{self.repository}",
                "the registry does not let us",
                "Give a user that may. Without the whole list nothing can be shown to be unused.",
                "config",
            )
        found = Inventory()
        names = sorted(tags - {WORKLIST_TAG})
        found.tags = dict(zip(names, self.workers.map(self.by_tag, names)))
        if WORKLIST_TAG in tags:
            found.worklist, found.pending = self._read_worklist()
        self._explore(found, {digest for digest in found.tags.values() if digest} | {*extra, *self.policy.keep_digests, *found.pending})
        while True:
            wanted = {belongs_to(tag) for tag, digest in found.tags.items() if digest} | {item.subject for item in found.contents.values()}
            missing = sorted(digest for digest in wanted if digest and digest not in found.contents)
            there = {digest for digest, content in zip(missing, self.workers.map(self._ask, missing)) if content}
            if not there:
                break
            found.loose |= there
            self._explore(found, there)
        matched = {digest for tag, digest in found.own_tags().items() if any(rule.series(tag) is not None for rule in self.policy.rules)}
        found.created = dict(zip(sorted(matched), self.workers.map(self._built, sorted(matched))))
        return found

    def by_tag(self, tag: str) -> str | None:
        """The digest that a tag names now."""
        manifest = self.client.manifest(self.repository, tag)
        if manifest is None:
            return None
        self.known.setdefault(manifest.digest, Content.of(manifest))
        return manifest.digest

    def _ask(self, digest: str) -> Content | None:
        manifest = self.client.manifest(self.repository, digest)
        if manifest is None:
            return None
        return self.known.setdefault(digest, Content.of(manifest))

    def _content(self, digest: str) -> Content | None:
        return self.known.get(digest) or self._ask(digest)

    def _explore(self, found: Inventory, frontier: set[str]) -> None:
        """Follow children and the referrers API down to the end."""
        seen = set(found.contents)
        while frontier:
            seen |= frontier
            contents = [content for content in self.workers.map(self._content, sorted(frontier)) if content]
            found.contents.update({content.digest: content for content in contents})
            frontier = {child for content in contents for child in content.children}
            for listed in self.workers.map(self._referrers, [content.digest for content in contents]):
                frontier |= listed
            frontier -= seen

    def _referrers(self, digest: str) -> set[str]:
        # Without the API they have tags, which have been read.
        return {str(entry["digest"]) for entry in list_api(self.client, self.repository, digest) or ()}

    def _read_worklist(self) -> tuple[str | None, set[str]]:
        manifest = self.client.manifest(self.repository, WORKLIST_TAG)
        if manifest is None:
            return None, set()
        blobs = [blob for blob in manifest.blobs if blob.media_type == WORKLIST_TYPE]
        try:
            digests = json.loads(self.client.read_blob(self.repository, blobs[0]))["manifests"]
            return manifest.digest, {check_digest(str(digest)) for digest in digests}
        except (ValueError, KeyError, TypeError, IndexError) as exc:
            raise DeliveryError(
                f"read {self.client.registry}/{self.repository}:{WORKLIST_TAG}",
                "it is not a list of an earlier retention",
                "Delete this tag, or keep the name for this module alone.",
                "config",
            ) from exc

    def _built(self, digest: str) -> datetime.datetime | None:
        """When an image was built, as its config says; of an index the newest of its images."""
        if digest not in self._created:
            content = self.known[digest]
            if content.is_index:
                inner = [self.known[child] for child in content.images if child in self.known and not self.known[child].is_index]
                moments = [moment for moment in (self._config_created(child) for child in inner) if moment]
                self._created[digest] = max(moments) if moments else None
            else:
                self._created[digest] = self._config_created(content)
        return self._created[digest]

    def _config_created(self, content: Content) -> datetime.datetime | None:
        if content.config is None:
            return None
        try:
            config = json.loads(self.client.read_blob(self.repository, content.config))
        except Interrupted:
            raise
        except (DeliveryError, ValueError):
            # A config that is missing or damaged says nothing, and must not stop what is done about the others.
            return None
        return parse_moment(config.get("created")) if isinstance(config, dict) else None


def parse_moment(text: t.Any) -> datetime.datetime | None:
    """A time as image configs tell it; ``None`` for none, nonsense, and what builders write when they do not want to tell."""
    match = _MOMENT.match(text) if isinstance(text, str) else None
    if match is None:
        return None
    try:
        moment = datetime.datetime.fromisoformat(f"{match.group(1)}T{match.group(2)}{match.group(3) or '+00:00'}")
    except ValueError:
        return None
    return moment if moment >= _OLDEST else None


# -- carrying out --------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What was done to one repository, or would be in check mode. ``freed`` in bytes, each blob counted in one repository only."""

    repository: str
    kept: list[Kept] = field(default_factory=list)
    deleted: list[Removal] = field(default_factory=list)
    freed: int = 0
    tags_before: dict[str, str | None] = field(default_factory=dict)
    #: Whether a list that an earlier run left behind goes.
    tidied: bool = False

    @property
    def changed(self) -> bool:
        return bool(self.deleted or self.tidied)

    def kept_entries(self) -> list[dict[str, t.Any]]:
        return [{"repository": self.repository, "tag": kept.tag, "digest": kept.digest, "reason": kept.reason} for kept in self.kept]

    def deleted_entries(self) -> list[dict[str, t.Any]]:
        return [
            {"repository": self.repository, "digest": item.digest, "tags": list(item.tags), "what": item.what, "reason": item.reason}
            for item in self.deleted
        ]

    def summary(self) -> dict[str, t.Any]:
        return {"repository": self.repository, "kept": len(self.kept), "deleted": len(self.deleted), "bytes": self.freed}

    def diff(self) -> dict[str, str]:
        """Tags and what each names, and manifests without a tag that go."""
        gone = {tag for removal in self.deleted for tag in removal.tags}
        before = [f"{tag}: {digest or 'nothing'}" for tag, digest in sorted(self.tags_before.items())]
        after = [line for line in before if line.partition(": ")[0] not in gone]
        before += [f"{removal.what} {removal.digest}" for removal in self.deleted if not removal.tags]
        header = self.repository
        return {"before_header": header, "after_header": header, "before": _lines(before), "after": _lines(after)}


def _lines(lines: t.Iterable[str]) -> str:
    return "".join(f"{line}\n" for line in lines)


def retain(repositories: t.Sequence[str], policy: Policy, options: ClientOptions, check: bool = False) -> list[Outcome]:
    """Apply ``policy`` to ``repositories`` (``host[:port]/name``); with ``check`` only look. One outcome for each, in order.

    All are planned before anything is deleted. Raises ``DeliveryError``: (config) input, credentials, or a registry that does
    not delete; (transport) registry or network; then a second run does what is left.
    """
    if not repositories:
        raise DeliveryError("read the repositories", "there are none", "Name at least one.", "config")
    references = list(dict.fromkeys(Reference.parse(text) for text in repositories))
    for reference in references:
        if reference.tag or reference.digest:
            raise DeliveryError(f"read the repository {reference}", "it has a tag or a digest", "Name the repository alone.", "config")
    now = datetime.datetime.now(datetime.timezone.utc)
    with Registries() as registries, ThreadPoolExecutor(options.concurrency) as workers:
        jobs = [_Job(registries.client(item.registry, options), item, policy, workers, now) for item in references]
        for job in jobs:
            job.plan()
        for job in jobs:
            job.ask_whether_it_deletes()
        if not check:
            for job in jobs:
                job.carry_out()
        return _outcomes(jobs, check)


class _Look:
    """What a repository holds at one moment, and what follows from it."""

    def __init__(self, inventory: Inventory, decision: Decision) -> None:
        self.inventory = inventory
        self.decision = decision
        self.belongings = inventory.belongings()
        self.condemned = {removal.digest: removal for removal in decision.deleted}

    def why_not(self, digest: str) -> str:
        """Why ``digest`` does not go."""
        if digest in self.decision.held:
            return self.decision.held[digest]
        named = next((kept for kept in self.decision.kept if kept.digest == digest), None)
        if named:
            return f"{named.tag} names it ({named.reason})"
        return "something that stays came to need it" if digest in self.inventory.contents else "nothing leads to it any more"


class _Job:
    """One repository: ``plan`` reads and decides, ``carry_out`` deletes."""

    def __init__(
        self, client: RegistryClient, reference: Reference, policy: Policy, workers: ThreadPoolExecutor, now: datetime.datetime
    ) -> None:
        self.client = client
        self.reference = reference
        self.policy = policy
        self.now = now
        self.reader = _Reader(client, reference.repository, policy, workers)
        self.inventory = Inventory()
        self.decision = Decision([], [], [], {})
        self.done: list[Removal] = []
        self.left: dict[str, str] = {}
        self.unable: set[str] = set()
        self._latest = _Look(self.inventory, self.decision)
        self._believed_until = 0.0

    def plan(self) -> None:
        self.inventory = self.reader.read()
        self.decision = decide(self.inventory, self.policy, self.now)

    def ask_whether_it_deletes(self) -> None:
        """Refuse before anything is deleted where the registry says that it does not; and learn whether it deletes a tag alone."""
        repository = self.reference.repository
        if self.decision.deleted and self.client.delete_manifest(repository, _NO_DIGEST) == "unsupported":
            raise DeliveryError(
                f"delete images of {self.reference.name}",
                "the registry answers that it does not delete; nothing was deleted",
                "Switch deletion on there (registry_delete of the role registry); if it is read-only for a collection, run again later.",
                "config",
            )
        if self.decision.untagged and self.client.delete_manifest(repository, _NO_TAG) == "unsupported":
            self.unable = {tag for removal in self.decision.untagged for tag in removal.tags}

    def carry_out(self) -> None:
        worklist = self._write_worklist()
        for removal in self.decision.deleted:
            if self._may_go(removal):
                self._delete(removal, removal.digest)
        for removal in self.decision.untagged:
            (tag,) = removal.tags
            if tag not in self.unable and removal in self._look().decision.untagged and self.reader.by_tag(tag) == removal.digest:
                self._delete(removal, tag)
        if worklist:
            self.client.delete_manifest(self.reference.repository, worklist)

    def _delete(self, removal: Removal, version: str) -> None:
        if self.client.delete_manifest(self.reference.repository, version) == "unsupported":
            raise DeliveryError(
                f"delete {self.reference.name}{'@' if ':' in version else ':'}{version}",
                f"the registry answers that it does not delete; {len(self.done)} of {len(self.decision.deleted)} are deleted",
                "Somebody switched deletion off, or its garbage is collected now. Run again afterwards.",
                "transport",
            )
        self.done.append(removal)

    def _write_worklist(self) -> str | None:
        """Write down what no tag of its own leads to; returns the digest of the list, ``None`` where there is nothing to list."""
        repository, client = self.reference.repository, self.client
        own = set(self.inventory.own_tags())
        unseen = sorted(removal.digest for removal in self.decision.deleted if not own & set(removal.tags))
        if not unseen:
            return self.inventory.worklist
        layer = client.push_blob(repository, json.dumps({"manifests": unseen}).encode(), WORKLIST_TYPE)
        config = client.push_blob(repository, b"{}", OCI_EMPTY)
        content = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "artifactType": WORKLIST_TYPE,
            "config": config.as_json(),
            "layers": [layer.as_json()],
        }
        manifest = Manifest.build(content)
        client.put_manifest(repository, manifest, tag=WORKLIST_TAG)
        if self.inventory.worklist not in (None, manifest.digest):
            client.delete_manifest(repository, str(self.inventory.worklist))
        return manifest.digest

    def _look(self) -> _Look:
        """The repository as it is now, or was a moment ago."""
        began = time.monotonic()
        if began >= self._believed_until:
            inventory = self.reader.read(self.left)
            self._latest = _Look(inventory, decide(inventory, self.policy, self.now, self.left))
            ended = time.monotonic()
            # Where a look takes long, half of the time is spent looking.
            self._believed_until = ended + max(_FRESH, ended - began)
        return self._latest

    def _may_go(self, removal: Removal) -> bool:
        """Whether nothing happened since the plan that speaks for ``removal``; what does is kept in ``left``."""
        look = self._look()
        again = look.condemned.get(removal.digest)
        reason = ""
        if again is None:
            reason = look.why_not(removal.digest)
        elif set(again.tags) - set(removal.tags):
            reason = f"{min(set(again.tags) - set(removal.tags))} was put on it"
        elif look.belongings.get(removal.digest, set()) - set(self.inventory.contents):
            reason = "something was attached to it"
        else:
            for tag in removal.tags:
                if self.reader.by_tag(tag) not in (None, removal.digest):
                    reason = f"{tag} was moved to another image"
        if not reason:
            return True
        self.left[removal.digest] = f"since the plan: {reason}"
        # What hangs on it stays too, so the next one is judged by a new look.
        self._believed_until = 0.0
        return False


def _outcomes(jobs: t.Sequence[_Job], check: bool) -> list[Outcome]:
    outcomes = []
    kept_blobs: dict[str, set[str]] = {}
    for job in jobs:
        removals = [item for item in job.decision.untagged if item.tags[0] not in job.unable]
        outcome = Outcome(job.reference.name, tags_before=dict(job.inventory.tags), tidied=job.inventory.worklist is not None)
        outcome.deleted = [*job.decision.deleted, *removals] if check else job.done
        outcome.kept = list(job.decision.kept)
        told = {tag for item in outcome.deleted for tag in item.tags}
        for item in (*job.decision.deleted, *job.decision.untagged):
            for tag in set(item.tags) - told:
                unable = "this registry cannot delete a tag alone, and its image stays, since another needs it"
                reason = unable if tag in job.unable else job.left.get(item.digest, "it changed since the plan")
                outcome.kept.append(Kept(tag, item.digest, reason))
        outcome.kept.sort(key=lambda kept: kept.tag)
        outcomes.append(outcome)
        gone = {item.digest for item in outcome.deleted if item.what != "tag"}
        blobs = kept_blobs.setdefault(job.reference.registry, set())
        for content in job.reader.known.values():
            if content.digest not in gone:
                blobs |= {content.digest, *content.blobs}
    counted: set[tuple[str, str]] = set()
    for job, outcome in zip(jobs, outcomes):
        for removal in outcome.deleted:
            content = job.reader.known[removal.digest]
            for digest, size in {content.digest: content.size, **content.blobs}.items():
                key = (job.reference.registry, digest)
                if removal.what != "tag" and digest not in kept_blobs[job.reference.registry] and key not in counted:
                    counted.add(key)
                    outcome.freed += size
    return outcomes
