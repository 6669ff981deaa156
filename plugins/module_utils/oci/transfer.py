# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Promotion: the same bytes in another place, under another tag.

All images of a call are planned before anything is written, then all blobs are copied, then manifests from the children
up, then what belongs to them, and the tags last. So a tag never names what is not whole, and a refusal for one image
leaves the others untouched too.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import threading
import time
import typing as t
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import Registries, RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.info import platforms_of, wrong_platform
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import Descriptor, Manifest, platform_matches, platform_name
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import Reference, check_digest, check_tag, digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import COSIGN_SUFFIXES, list_referrers, put_referrers
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.remembered import Remembered
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.transport import Interrupted, Patience

#: Large reads keep SHA-256 and TLS busy outside the interpreter lock; two buffers a thread.
_CHUNK = 1024 * 1024
#: How much of the destination is looked at before it is believed, the most first; image_promote documents them.
VERIFY = ("blobs", "manifests", "tag")
#: Seconds for which a look at an immutable tag holds. No registry writes a tag "unless it changed", so some window is left in any case.
_FRESH = 1.0
_T = t.TypeVar("_T")
_R = t.TypeVar("_R")


@dataclass(frozen=True)
class Wish:
    """One image to promote. ``tags`` are written in order, the last one last."""

    source: Reference
    destination: Reference
    tags: tuple[str, ...]
    expected_digest: str | None = None

    @classmethod
    def parse(cls, source: str, destination: str, extra_tags: t.Sequence[str] = (), expected_digest: str | None = None) -> Wish:
        """Read user input; raises ``DeliveryError`` (config).

        A destination without a tag gets the source's tag. A destination with a digest is one more expectation of it.
        """
        origin, target = Reference.parse(source), Reference.parse(destination)
        if not origin.tag and not origin.digest:
            raise DeliveryError(
                f"read the source {source!r}", "it has neither tag nor digest", "Name the one to promote; no tag is assumed.", "config"
            )
        for digest in (expected_digest, target.digest):
            if digest:
                check_digest(digest)
        if expected_digest and target.digest and expected_digest != target.digest:
            raise DeliveryError(
                f"read the destination {destination!r}",
                f"its digest is not the expected_digest {expected_digest}",
                "Give one of the two.",
                "config",
            )
        first = target.tag or (origin.tag if not target.digest else None)
        tags = [tag for tag in (first, *extra_tags) if tag]
        return cls(origin, target, tuple(dict.fromkeys(check_tag(tag) for tag in tags)), expected_digest or target.digest)


@dataclass(frozen=True)
class Rules:
    """What holds for all images of a call. ``platforms`` empty: all of them. ``verify``: one of :data:`VERIFY`."""

    platforms: tuple[str, ...] = ()
    referrers: bool = True
    immutable_tags: tuple[str, ...] = ("^sha-",)
    concurrency: int = 4
    verify: str = "blobs"

    def immutable(self, tag: str) -> bool:
        return any(re.search(pattern, tag) for pattern in self.immutable_tags)


@dataclass
class Outcome:
    """What a promotion did, or in check mode would do. ``tags_before`` holds a digest or ``None`` for each tag."""

    wish: Wish
    source_digest: str = ""
    digest: str = ""
    media_type: str = ""
    platforms: list[str] = field(default_factory=list)
    tags_before: dict[str, str | None] = field(default_factory=dict)
    manifests: int = 0
    referrers: int = 0
    blobs: dict[str, int] = field(default_factory=lambda: {"mounted": 0, "copied": 0, "present": 0})
    bytes_copied: int = 0
    warnings: list[str] = field(default_factory=list)

    @property
    def changed(self) -> bool:
        moved = any(before != self.digest for before in self.tags_before.values())
        return bool(moved or self.manifests or self.referrers or self.blobs["mounted"] or self.blobs["copied"])

    def as_dict(self) -> dict[str, t.Any]:
        return {
            "source": str(self.wish.source),
            "destination": self.wish.destination.name,
            "reference": f"{self.wish.destination.name}@{self.digest}",
            "source_digest": self.source_digest,
            "digest": self.digest,
            "media_type": self.media_type,
            "platforms": self.platforms,
            "tags": list(self.wish.tags),
            "manifests": self.manifests,
            "referrers": self.referrers,
            "blobs": dict(self.blobs),
            "bytes_copied": self.bytes_copied,
            "changed": self.changed,
        }

    def diff(self) -> dict[str, str]:
        """Tags before and after, and what the destination lacked."""
        before = [f"{tag}: {digest or 'absent'}" for tag, digest in self.tags_before.items()]
        after = [f"{tag}: {self.digest}" for tag in self.tags_before]
        for name, count in (
            ("manifests", self.manifests),
            ("blobs", self.blobs["mounted"] + self.blobs["copied"]),
            ("referrers", self.referrers),
        ):
            if count:
                before.append(f"{name} missing: {count}")
                after.append(f"{name} missing: 0")
        header = self.wish.destination.name
        return {"before_header": header, "after_header": header, "before": "\n".join(before) + "\n", "after": "\n".join(after) + "\n"}


def promote(
    wishes: t.Sequence[Wish], rules: Rules, source: ClientOptions, destination: ClientOptions, check: bool = False
) -> list[Outcome]:
    """Promote all ``wishes``; with ``check`` only look. Results are in the order of the wishes.

    Raises ``DeliveryError``: (config) unknown image, platform or credentials; (policy) an immutable tag would move or the digest
    is not the expected one; (transport) registry, network, damaged bytes.
    """
    for pattern in rules.immutable_tags:
        try:
            re.compile(pattern)
        except re.error as exc:
            raise DeliveryError(
                f"read the pattern {pattern!r} of immutable_tags", str(exc), "Write a Python regular expression.", "config"
            ) from exc
    several = min(rules.concurrency, max(len(wishes), 1))
    with Registries() as registries, _Workers(destination.questions) as leaves, _Workers(several) as images:
        probes, remembered = _Probes(), Remembered()
        promotions = [
            _Promotion(
                wish,
                rules,
                registries.client(wish.source.registry, source),
                registries.client(wish.destination.registry, destination),
                leaves,
                probes,
                remembered,
            )
            for wish in wishes
        ]
        images.map(lambda promotion: promotion.plan(), promotions)
        _refuse_collisions(promotions)
        _copy_blobs(promotions, leaves, rules, check)
        if not check:
            # One image under several tags: distribution empties its link for a moment each time it is written, and a reader gets a 500.
            same: dict[tuple[str, str], list[_Promotion]] = {}
            for promotion in promotions:
                same.setdefault((promotion.wish.destination.name, promotion.root.digest), []).append(promotion)
            images.map(_write_all, same.values())
            images.map(_move_all_tags, same.values())
            if rules.verify != "tag":
                remembered.note((promotion.tree for promotion in promotions), _names(promotions))
        return [promotion.outcome for promotion in promotions]


def _names(promotions: t.Iterable[_Promotion]) -> dict[str, str]:
    """What each tag that took part names now."""
    found: dict[str, str] = {}
    for promotion in promotions:
        if promotion.wish.source.tag and not promotion.wish.source.digest:
            found[str(promotion.wish.source)] = promotion.outcome.source_digest
        found.update((promotion.name_of(tag), promotion.root.digest) for tag in promotion.wish.tags)
    return found


def _write_all(promotions: t.Iterable[_Promotion]) -> None:
    for promotion in promotions:
        promotion.write()


def _move_all_tags(promotions: t.Iterable[_Promotion]) -> None:
    for promotion in promotions:
        promotion.move_tags()


class _Workers:
    """A thread pool whose first failure ends the rest."""

    def __init__(self, count: int) -> None:
        self._pool = ThreadPoolExecutor(count)
        self.stop = threading.Event()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_exc: object) -> None:
        self.stop.set()
        self._pool.shutdown(wait=True)

    def map(self, function: t.Callable[[_T], _R], items: t.Iterable[_T]) -> list[_R]:
        """Results in order. Never called from one of its own threads, so it cannot wait for itself."""
        futures = [self._pool.submit(function, item) for item in items]
        done, pending = wait(futures, return_when=FIRST_EXCEPTION)
        failed = [future for future in futures if future in done and future.exception()]
        if failed:
            self.stop.set()
            for future in pending:
                future.cancel()
            wait(pending)
            failed[0].result()
        return [future.result() for future in futures]


class _Probes:
    """What became known of blobs; images of a call that share one ask once, also when they ask at the same moment."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asked: dict[tuple[str, str], Future[str]] = {}

    def state(self, client: RegistryClient, repository: str, blob: Descriptor) -> str:
        """See ``RegistryClient.probe_blob``."""
        ours: Future[str] = Future()
        with self._lock:
            answer = self._asked.setdefault((f"{client.registry}/{repository}", blob.digest), ours)
        if answer is ours:
            try:
                ours.set_result(client.probe_blob(repository, blob))
            except BaseException as exc:
                ours.set_exception(exc)
        return answer.result()


def _ask(question: t.Callable[[], t.Any]) -> t.Any:
    return question()


@dataclass
class _Belongings:
    """What the source has that belongs to ``subject``: digests of referrers, and cosign's tags with what the destination has there."""

    subject: str
    referrers: list[str]
    #: Those that the destination lists, too.
    here: set[str]
    cosign: list[tuple[str, Manifest, Manifest | None]]


@dataclass
class _Blob:
    """A blob that the destination lacks. ``damaged``: there, but not whole, so that mounting would only repeat it."""

    promotion: _Promotion
    descriptor: Descriptor
    damaged: bool = False
    mount_from: str = ""


class _Promotion:
    """One image on its way: ``plan`` reads and decides, ``write`` and ``move_tags`` do."""

    def __init__(
        self,
        wish: Wish,
        rules: Rules,
        source: RegistryClient,
        destination: RegistryClient,
        workers: _Workers,
        probes: _Probes,
        remembered: Remembered,
    ) -> None:
        self.wish = wish
        self.rules = rules
        self.source = source
        self.destination = destination
        self.workers = workers
        self.probes = probes
        self.remembered = remembered
        self.source_repo = wish.source.repository
        self.target_repo = wish.destination.repository
        self.same_registry = wish.source.registry == wish.destination.registry
        self.same_repo = wish.source.same_repository(wish.destination)
        self.outcome = Outcome(wish)
        self.blobs: list[_Blob] = []
        self.lock = threading.Lock()
        self.root: Manifest
        #: What is promoted, children first and the root last.
        self.tree: list[Manifest] = []
        #: When the tags of the destination were looked at.
        self._looked = 0.0
        #: Answers to questions that were asked before it was known that they matter: manifests there, and what belongs to a subject.
        self._there_ahead: dict[str, Manifest | None] = {}
        self._surveys_ahead: dict[str, _Belongings] = {}
        #: Whether a tag of the destination names the source's digest, so that what is below it is probably there too.
        self._expected_there = False
        self._seen_there: set[str] = set()
        self._manifests: list[Manifest] = []
        self._referrers: dict[str, list[Manifest]] = {}
        self._cosign: list[tuple[str, Manifest]] = []

    # -- plan ------------------------------------------------------------------------------------------------------

    def plan(self) -> None:
        """Read both sides and decide; nothing is written."""
        found, present = self._read()
        self.outcome.source_digest = found.digest
        if not self.rules.platforms and self._believed(found.digest, present):
            self.outcome.platforms = platforms_of(found) if found.is_index else []
            tree = [found]
        else:
            self._expected_there = not self.same_repo and any(tagged and tagged.digest == found.digest for tagged in present)
            tree = self._choose(found)
        self.tree, self.root = tree, tree[-1]
        self.outcome.digest, self.outcome.media_type = self.root.digest, self.root.media_type
        expected = self.wish.expected_digest
        if expected and expected not in (found.digest, self.root.digest):
            raise DeliveryError(
                f"promote {self.wish.source}",
                f"its digest is {found.digest}, expected was {expected}",
                "The tag has moved, or another image was meant.",
                "policy",
            )
        there = self._note_tags(present)
        if not self._believed(self.root.digest, present):
            self._look(tree, there)

    def _read(self) -> tuple[Manifest, list[Manifest | None]]:
        """The source, and what each tag of the destination names; side by side, since neither needs the other."""
        tags: list[t.Callable[[], t.Any]] = [
            functools.partial(self.destination.manifest, self.target_repo, tag) for tag in self.wish.tags
        ]
        whole: t.Callable[[], Manifest] = functools.partial(self.source.resolve, self.wish.source)
        if self.rules.verify == "tag" and tags and (self.wish.source.digest or not self.same_registry):
            # Equal digests are equal bytes, so the destination's own answer says all that is to be known.
            digest, *present = self.workers.map(_ask, [self._source_digest, *tags])
            return present[0] if digest and self._believed(digest, present) else whole(), present
        questions: list[t.Callable[[], t.Any]] = []
        if self.rules.verify != "tag" and self._with_referrers:
            questions.append(functools.partial(self.source.known_tags, self.source_repo))
        guess = self._guess()
        if guess:
            questions += self._ask_ahead(guess)
            digest, *present = self.workers.map(_ask, [self._source_digest, *tags, *questions])
            found = guess[-1] if digest == guess[-1].digest else whole()
        else:
            found, *present = self.workers.map(_ask, [whole, *tags, *questions])
        return found, present[: len(self.wish.tags)]

    def _guess(self) -> list[Manifest]:
        """What the source probably is, children first: then all that is asked about it can be asked at once."""
        if self.rules.verify == "tag" or self.rules.platforms:
            return []
        return self.remembered.tree(self.wish.source.digest or self.remembered.named(str(self.wish.source)))

    def _ask_ahead(self, guess: list[Manifest]) -> list[t.Callable[[], t.Any]]:
        """Questions about ``guess`` that do not wait for its being right; who comes to them later finds them answered."""
        root = guess[-1].digest
        here = self.same_repo or any(self.remembered.named(self.name_of(tag)) == root for tag in self.wish.tags)
        questions: list[t.Callable[[], t.Any]] = []
        # Where a tag names the root already, its own answer is the root's.
        questions += [functools.partial(self._look_ahead, manifest.digest) for manifest in (guess[:-1] if here else guess)]
        if self._with_referrers:
            questions += [functools.partial(self._survey_ahead, manifest.digest) for manifest in guess]
        if self.rules.verify == "blobs":
            # What is not here will be copied, which shows it, or mounted.
            ask = self._probe if here else self.probe_source
            if here or self.same_registry:
                questions += [functools.partial(ask, blob) for manifest in guess for blob in manifest.blobs]
        return questions

    def _look_ahead(self, digest: str) -> None:
        self._there_ahead[digest] = self.destination.manifest(self.target_repo, digest)

    def _survey_ahead(self, subject: str) -> None:
        self._surveys_ahead[subject] = self._survey(subject)

    def name_of(self, tag: str) -> str:
        return f"{self.wish.destination.name}:{tag}"

    def _source_digest(self) -> str | None:
        return self.wish.source.digest or self.source.manifest_digest(self.source_repo, self.wish.source.version)

    @property
    def _with_referrers(self) -> bool:
        return self.rules.referrers and not self.same_repo

    def _believed(self, digest: str, present: t.Sequence[Manifest | None]) -> bool:
        """Whether tags that name ``digest`` are enough to know that nothing is to be done."""
        return self.rules.verify == "tag" and bool(present) and all(manifest and manifest.digest == digest for manifest in present)

    def _choose(self, found: Manifest) -> list[Manifest]:
        """The manifests to promote, children first and the one that gets the tags last."""
        if not found.is_index:
            if self.rules.platforms:
                offered = platform_name(self.source.image_config(self.source_repo, found))
                if not any(platform_matches(wanted, offered) for wanted in self.rules.platforms):
                    raise wrong_platform(self.wish.source, self.rules.platforms[0], [offered] if offered else [])
            return [found]
        children = found.children
        if self.rules.platforms:
            chosen = choose_children(self.wish.source, children, self.rules.platforms)
            if len(chosen) < len(children):
                images = [child for child in chosen if not child.attested]
                if len(images) == 1:
                    # One platform is that platform's own image, with its own digest, as it was built.
                    return self._read_tree(images)
                keep = {child.digest for child in chosen}
                listed = [entry for entry in found.content["manifests"] if entry.get("digest") in keep]
                found = Manifest.build({**found.content, "mediaType": found.media_type, "manifests": listed})
                children = chosen
        self.outcome.platforms = platforms_of(found)
        return [*self._read_tree(children), found]

    def _read_tree(self, children: list[Descriptor]) -> list[Manifest]:
        """The manifests behind descriptors of the source, and theirs, children first."""
        tree: list[Manifest] = []
        for manifest in self.workers.map(self._read_child, children):
            tree += self._read_tree(manifest.children) if manifest.is_index else []
            tree.append(manifest)
        return list({manifest.digest: manifest for manifest in tree}.values())

    def _read_child(self, child: Descriptor) -> Manifest:
        if child.digest in self._there_ahead:
            manifest = self._there_ahead[child.digest]
        else:
            manifest = self.destination.manifest(self.target_repo, child.digest) if self._expected_there else None
        if manifest:
            # Equal digests are equal bytes, and that it is there need not be asked any more.
            self._seen_there.add(child.digest)
            return manifest
        manifest = self.source.manifest(self.source_repo, child.digest)
        if manifest is None:
            raise DeliveryError(
                f"promote {self.wish.source}",
                f"the source lacks {child.digest} ({child.platform or child.media_type}), which its index names",
                "Push the image again, or promote only the platforms that are there.",
                "transport",
            )
        return manifest

    def _note_tags(self, named: t.Sequence[Manifest | None]) -> Manifest | None:
        """Note what each tag names now, refuse to move an immutable one, and return the root where a tag has it."""
        there = None
        self._looked = time.monotonic()
        for tag, present in zip(self.wish.tags, named):
            self.outcome.tags_before[tag] = present.digest if present else None
            if present and present.digest == self.root.digest:
                there = present
            elif present:
                self._refuse_to_move(tag, present.digest)
        return there

    def _refuse_to_move(self, tag: str, present: str) -> None:
        if self.rules.immutable(tag):
            raise DeliveryError(
                f"promote {self.wish.source} to {self.wish.destination.name}:{tag}",
                f"the tag is immutable and names {present}, which is not {self.root.digest}",
                "Build under a new tag; an immutable tag never means two images.",
                "policy",
                present_digest=present,
                digest=self.root.digest,
            )

    def _look(self, tree: list[Manifest], there: Manifest | None) -> None:
        """Find out what the destination lacks. Questions that do not wait for each other's answers go side by side."""
        subjects = [manifest.digest for manifest in tree] if self._with_referrers else []
        # In one registry a blob may be mounted without asking first; see _plan_blobs.
        ahead = tree if self.rules.verify == "blobs" and (self.same_repo or not self.same_registry) else []
        questions: list[t.Callable[[], t.Any]] = [functools.partial(self._survey, subject) for subject in subjects]
        questions += [functools.partial(self._missing, manifest, there) for manifest in tree]
        questions += [functools.partial(self._probe, blob) for manifest in ahead for blob in manifest.blobs]
        answers = self.workers.map(_ask, questions)
        absent = answers[len(subjects) :]
        self._manifests = [manifest for manifest, gone in zip(tree, absent) if gone]
        self.outcome.manifests = len(self._manifests)
        looked_at = tree if self.rules.verify == "blobs" else self._manifests
        needed = [blob for manifest in looked_at for blob in manifest.blobs] + self._plan_referrers(answers[: len(subjects)])
        self._plan_blobs(list({blob.digest: blob for blob in needed}.values()))

    def _missing(self, manifest: Manifest, there: Manifest | None) -> bool:
        if (there and manifest.digest == there.digest) or manifest.digest in self._seen_there:
            return False
        if self.same_repo and (manifest is not self.root or manifest.digest == self.outcome.source_digest):
            return False
        if self.rules.verify == "tag" and self.wish.tags and manifest is self.root:
            # Written anyway, with the tag; whether it is there without one is not worth a question.
            return True
        if manifest.digest in self._there_ahead:
            return self._there_ahead[manifest.digest] is None
        return self.destination.manifest(self.target_repo, manifest.digest) is None

    def _plan_blobs(self, needed: list[Descriptor]) -> None:
        """Ask the destination for every blob: a manifest that is there says nothing about its layers."""
        # In one registry a mount is one request whether the blob is there or not, so a new image is not asked for first.
        fresh = self.same_registry and not self.same_repo and self.outcome.manifests > 0
        if fresh:
            self.blobs = [_Blob(self, blob, mount_from=self.source_repo) for blob in needed]
            self.outcome.blobs["mounted"] = len(needed)
            return
        states = self.workers.map(self._probe, needed)
        for blob, state in zip(needed, states):
            if state == "present":
                self.outcome.blobs["present"] += 1
            elif self.same_repo:
                raise DeliveryError(
                    f"promote {self.wish.source}",
                    f"its blob {blob.digest} is {state} in the registry",
                    "The image is broken there; push it again.",
                    "transport",
                )
            else:
                mount = self.source_repo if self.same_registry and state == "absent" else ""
                self.blobs.append(_Blob(self, blob, state == "damaged", mount))
                self.outcome.blobs["mounted" if mount else "copied"] += 1
                self.outcome.bytes_copied += 0 if mount else blob.size

    def _probe(self, blob: Descriptor) -> str:
        return self.probes.state(self.destination, self.target_repo, blob)

    def probe_source(self, blob: Descriptor) -> str:
        return self.probes.state(self.source, self.source_repo, blob)

    def _survey(self, subject: str) -> _Belongings:
        if subject in self._surveys_ahead:
            return self._surveys_ahead[subject]
        listed = self._listed(self.source, self.source_repo, subject)
        here = self._listed(self.destination, self.target_repo, subject) if listed else set()
        found = _Belongings(subject, sorted(listed), here, [])
        for tag in (digest_tag(subject, suffix) for suffix in COSIGN_SUFFIXES):
            manifest = self._tagged(self.source, self.source_repo, tag)
            if manifest and not manifest.is_index:
                found.cosign.append((tag, manifest, self._tagged(self.destination, self.target_repo, tag)))
        return found

    def _plan_referrers(self, surveys: list[_Belongings]) -> list[Descriptor]:
        """What belongs to the image and is not at the destination yet; returns all blobs it consists of."""
        needed: list[Descriptor] = []
        # A signature of an SBOM belongs to the SBOM. Digests cannot form a circle, so this ends.
        while surveys:
            subjects = []
            asked = [(survey, digest) for survey in surveys for digest in survey.referrers]
            for (survey, digest), (manifest, absent) in zip(asked, self.workers.map(self._read_referrer, asked)):
                if manifest is None or manifest.subject != survey.subject or manifest.is_index:
                    self.outcome.warnings.append(f"{self.wish.source}: its referrer {digest} is not there or not its own; left out")
                    continue
                if absent:
                    self._referrers.setdefault(survey.subject, []).append(manifest)
                    self.outcome.referrers += 1
                needed += manifest.blobs if absent or self.rules.verify == "blobs" else []
                subjects.append(digest)
            for survey in surveys:
                for tag, signed, present in survey.cosign:
                    needed += self._plan_cosign(tag, signed, present)
            surveys = self.workers.map(self._survey, subjects)
        return needed

    def _read_referrer(self, asked: tuple[_Belongings, str]) -> tuple[Manifest | None, bool]:
        """The manifest of a referrer, and whether the destination lacks it."""
        survey, digest = asked
        present = self.destination.manifest(self.target_repo, digest) if digest in survey.here else None
        return present or self.source.manifest(self.source_repo, digest), present is None

    def _plan_cosign(self, tag: str, manifest: Manifest, present: Manifest | None) -> list[Descriptor]:
        if present is None or present.digest != manifest.digest:
            if present and not {blob.digest for blob in present.blobs[1:]} <= {blob.digest for blob in manifest.blobs[1:]}:
                self.outcome.warnings.append(
                    f"{self.wish.destination.name}:{tag} holds signatures that the source does not have; left as it is"
                )
                return []
            self._cosign.append((tag, manifest))
            self.outcome.referrers += 1
        elif self.rules.verify != "blobs":
            return []
        return manifest.blobs

    @staticmethod
    def _listed(client: RegistryClient, repository: str, subject: str) -> set[str]:
        # One list of all tags answers for every image of the call.
        return {item.digest for item in list_referrers(client, repository, subject, known=True)}

    @staticmethod
    def _tagged(client: RegistryClient, repository: str, tag: str) -> Manifest | None:
        # The tags have been listed already: three questions less for each manifest.
        tags = client.known_tags(repository)
        return client.manifest(repository, tag) if tags is None or tag in tags else None

    # -- write -----------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Manifests by digest, children first, then what belongs to them. The blobs are there already."""
        moves = any(before != self.root.digest for before in self.outcome.tags_before.values())
        for manifest in self._manifests:
            # The first tag brings the root with it, unless something that is written before the tag refers to it.
            if manifest is not self.root or not moves or self._referrers or self._cosign:
                self.destination.put_manifest(self.target_repo, manifest)
        for subject, manifests in self._referrers.items():
            put_referrers(self.destination, self.target_repo, subject, manifests)
        for tag, manifest in self._cosign:
            self.destination.put_manifest(self.target_repo, manifest, tag=tag)

    def move_tags(self) -> None:
        """Write the tags that do not name the image yet, and read every one back."""
        told = set()
        moving = [tag for tag, before in self.outcome.tags_before.items() if before != self.root.digest]
        if self.outcome.bytes_copied or time.monotonic() - self._looked > _FRESH:
            # Somebody may have written them since the plan.
            guarded = [tag for tag in moving if self.rules.immutable(tag)]
            for tag, present in zip(guarded, self.workers.map(functools.partial(self.destination.manifest, self.target_repo), guarded)):
                if present and present.digest != self.root.digest:
                    self._refuse_to_move(tag, present.digest)
        for tag in moving:
            response = self.destination.put_manifest(self.target_repo, self.root, tag=tag)
            if self.rules.verify == "tag" and response.headers.get("Docker-Content-Digest") == self.root.digest:
                told.add(tag)
        if not self.outcome.changed:
            return
        versions = [version for version in self.wish.tags or (self.root.digest,) if version not in told]
        for version, written in zip(versions, self.workers.map(self._read_back, versions)):
            if written is None or written.digest != self.root.digest:
                raise DeliveryError(
                    f"promote {self.wish.source} to {self.wish.destination.name}",
                    f"read back, {version} names {written.digest if written else 'nothing'} and not {self.root.digest}",
                    "Somebody else writes this tag, or the registry does not keep what it accepts.",
                    "transport",
                )

    def _read_back(self, version: str) -> Manifest | None:
        """What ``version`` names now. A tag that another promotion writes at this moment may name nothing for an instant."""
        patience = Patience(self.destination.transport.policy)
        while True:
            written = self.destination.manifest(self.target_repo, version)
            if written or not patience.wait():
                return written


# -- blobs ---------------------------------------------------------------------------------------------------------


def _copy_blobs(promotions: t.Sequence[_Promotion], workers: _Workers, rules: Rules, check: bool) -> None:
    """Copy all missing blobs side by side, the largest first; a blob that several images need travels once. ``check``: only count them."""
    groups: dict[tuple[int, str], list[_Blob]] = {}
    for promotion in promotions:
        promotion.outcome.blobs.update(mounted=0, copied=0)
        promotion.outcome.bytes_copied = 0
        for blob in promotion.blobs:
            groups.setdefault((id(promotion.destination), blob.descriptor.digest), []).append(blob)
    ordered = sorted(groups.values(), key=lambda group: group[0].descriptor.size, reverse=True)
    streams = threading.BoundedSemaphore(rules.concurrency)
    work: list[t.Callable[[], None]] = [functools.partial(_place, group, workers.stop, streams, check) for group in ordered]
    if rules.verify != "tag" and not check:
        # A mount gives another name to the source's file, which may be gone or cut short: look at it meanwhile.
        work += [functools.partial(_see_mounted, blob) for group in ordered for blob in group if blob.mount_from]
    workers.map(_ask, work)


def _see_mounted(blob: _Blob) -> None:
    _believe(blob, blob.promotion.probe_source(blob.descriptor))


def _believe(blob: _Blob, state: str) -> None:
    if state != "present":
        raise DeliveryError(
            f"place {blob.descriptor.digest} in {blob.promotion.wish.destination.name}",
            f"the registry took it, and it is {state} there",
            "Its storage is damaged: restart it, delete that blob there, then run again.",
            "transport",
        )


def _place(group: list[_Blob], stop: threading.Event, streams: threading.BoundedSemaphore, check: bool) -> None:
    """Bring one blob to all repositories of one registry that lack it."""
    home = ""
    for blob in group:
        promotion = blob.promotion
        if home == promotion.target_repo:
            # Two images of this call go to one repository.
            _count(promotion, "present")
            continue
        mount_from = blob.mount_from or (home if not blob.damaged else "")
        if check:
            copied = None if mount_from else blob.descriptor.size
        else:
            copied = _copy(promotion, blob.descriptor, mount_from, stop, streams)
        if not check and blob.damaged:
            # A registry may keep the damaged file.
            _believe(blob, promotion.destination.probe_blob(promotion.target_repo, blob.descriptor))
        _count(promotion, "mounted" if copied is None else "copied", copied or 0)
        home = promotion.target_repo


def _count(promotion: _Promotion, what: str, size: int = 0) -> None:
    with promotion.lock:
        promotion.outcome.blobs[what] += 1
        promotion.outcome.bytes_copied += size


def _copy(
    promotion: _Promotion, blob: Descriptor, mount_from: str, stop: threading.Event, streams: threading.BoundedSemaphore
) -> int | None:
    """Mount or stream one blob; returns its size, ``None`` when it was mounted."""
    location = promotion.destination.mount_blob(promotion.target_repo, blob, mount_from) if mount_from else ""
    if location is None:
        return None
    with streams:
        return _stream(promotion, blob, location, stop)


def _stream(promotion: _Promotion, blob: Descriptor, location: str, stop: threading.Event) -> int:
    """Upload one blob, to ``location`` where an upload is open already; returns its size.

    An upload that breaks off goes on where the registry says it stopped, else begins anew; both within the budget of retries.
    """
    repository, target = promotion.target_repo, promotion.destination
    offset = 0
    patience = Patience(target.transport.policy, stop.wait)
    try:
        while True:
            try:
                # The first chunk comes before the upload is opened: a registry cannot be made to forget an upload that breaks
                # off, so what is small and wrong, or not there at all, should not begin one.
                chunks = _checked_chunks(promotion, blob, stop)
                first = next(chunks, memoryview(b""))
                location = location or target.start_upload(repository)
                target.finish_upload(repository, location, blob, _after(itertools.chain((first,), chunks), offset), offset)
                return blob.size
            except Interrupted as exc:
                # A smaller part is not a repetition.
                if exc.final or (exc.details.get("status") != 413 and not patience.wait(exc.retry_after)):
                    raise
                resumed = target.resume_upload(repository, location) if location and "status" not in exc.details else None
                if resumed is None and location:
                    target.cancel_upload(repository, location)
                    if target.probe_blob(repository, blob) == "present":
                        # Only the answer was lost.
                        return blob.size
                location, offset = resumed or ("", 0)
    except BaseException:
        if location:
            target.cancel_upload(repository, location)
        raise


def _after(chunks: t.Iterator[memoryview], offset: int) -> t.Iterator[memoryview]:
    """What comes after the first ``offset`` bytes, which are read and checked again but not sent."""
    for chunk in chunks:
        if offset < len(chunk):
            yield chunk[offset:]
        offset = max(0, offset - len(chunk))


def _checked_chunks(promotion: _Promotion, blob: Descriptor, stop: threading.Event) -> t.Iterator[memoryview]:
    """Read a blob of the source, each byte hashed on its way.

    The last chunk is only handed out once the whole is known to be right, so a destination never gets all bytes of a wrong blob.
    """
    tried = f"copy {blob.digest} of {promotion.wish.source}"
    algorithm, expected = blob.digest.split(":", 1)
    state = hashlib.new(algorithm)
    response = promotion.source.open_blob(promotion.source_repo, blob)
    buffers = (bytearray(min(_CHUNK, blob.size)), bytearray(min(_CHUNK, blob.size)))
    held = memoryview(b"")
    total = turn = 0
    try:
        while total < blob.size:
            if stop.is_set():
                raise DeliveryError(tried, "another part of the promotion failed", "", "transport")
            window = memoryview(buffers[turn])[: min(_CHUNK, blob.size - total)]
            filled = 0
            while filled < len(window):
                count = response.readinto(window[filled:])
                if not count:
                    raise Interrupted(
                        tried,
                        f"the source sent {total + filled} of {blob.size} bytes",
                        "The blob is cut short there, or the network broke.",
                    )
                filled += count
            state.update(window)
            total += filled
            if held:
                yield held
            held, turn = window, 1 - turn
        if response.readinto(bytearray(1)):
            raise DeliveryError(
                tried, f"the source sends more than the {blob.size} bytes that the manifest names", "Push the image again.", "transport"
            )
        if state.hexdigest() != expected:
            raise DeliveryError(
                tried,
                f"its bytes have the digest {algorithm}:{state.hexdigest()}",
                "The blob is damaged at the source; push the image again. Nothing was tagged.",
                "transport",
                blob=blob.digest,
            )
        if held:
            yield held
    finally:
        response.close()


# -- platforms -----------------------------------------------------------------------------------------------------


def choose_children(reference: Reference, children: t.Sequence[Descriptor], platforms: t.Sequence[str]) -> list[Descriptor]:
    """The children for ``platforms`` with their attestations, in the index's order; a platform that is not offered is refused."""
    chosen: set[str] = set()
    for wanted in platforms:
        found = {child.digest for child in children if not child.attested and platform_matches(wanted, child.platform)}
        if not found:
            raise wrong_platform(reference, wanted, sorted({child.platform for child in children if child.platform and not child.attested}))
        chosen |= found
    return [child for child in children if child.digest in chosen or child.attested in chosen]


# -- several at once -----------------------------------------------------------------------------------------------


def _refuse_collisions(promotions: t.Sequence[_Promotion]) -> None:
    """Two different images for one tag: whichever came last would win."""
    seen: dict[str, _Promotion] = {}
    for promotion in promotions:
        for tag in promotion.wish.tags:
            other = seen.setdefault(f"{promotion.wish.destination.name}:{tag}", promotion)
            if other.root.digest != promotion.root.digest:
                raise DeliveryError(
                    f"promote to {promotion.wish.destination.name}:{tag}",
                    f"{other.wish.source} and {promotion.wish.source} are both named for it and differ",
                    "Give them different tags or repositories.",
                    "config",
                )
