# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Retention: what rules mean, what stays with what, and in which order the rest goes."""

from __future__ import annotations

import datetime
import typing as t

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_tag
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.referrers import belongs_to
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.retention import (
    Content,
    Decision,
    Inventory,
    Kept,
    Outcome,
    Policy,
    Removal,
    decide,
    judge,
    parse_moment,
)

NOW = datetime.datetime(2026, 11, 21, 9, 0, tzinfo=datetime.timezone.utc)
Rules = t.List[t.Dict[str, t.Any]]  # noqa: UP006


def digest(name: str) -> str:
    """A digest that can be read in a failed test: ``a`` is ``sha256:aaaa…``."""
    return "sha256:" + (name.encode().hex() * 64)[:64]


def days_ago(number: float) -> datetime.datetime:
    return NOW - datetime.timedelta(days=number)


def inventory(tags: dict[str, str], ages: dict[str, float | None] | None = None, **contents: Content) -> Inventory:
    """Tags name digests by their short names; ``ages`` in days make images of their own."""
    ages = ages or {}
    found = Inventory({tag: digest(name) for tag, name in tags.items()})
    found.contents = {digest(name): Content(digest(name)) for name in (*tags.values(), *ages)}
    found.contents.update({content.digest: content for content in contents.values()})
    found.created = {digest(name): None if age is None else days_ago(age) for name, age in ages.items()}
    return found


def decided(found: Inventory, rules: Rules, keep: t.Sequence[str] = (), orphans: bool = False) -> Decision:
    return decide(found, Policy.parse(rules, [digest(name) for name in keep], orphans), NOW)


def gone(decision: Decision) -> list[str]:
    return [removal.digest for removal in decision.deleted]


def reasons(decision: Decision) -> dict[str, str]:
    return {kept.tag: kept.reason for kept in decision.kept}


# -- rules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rules, words",
    [
        ([], "there are none"),
        ([{"keep": 3}], "it has no pattern"),
        ([{"pattern": "", "keep": 3}], "it has no pattern"),
        ([{"pattern": "(", "keep": 3}], "'('"),
        ([{"pattern": "^sha-"}], "how many images to keep"),
        ([{"pattern": "^sha-", "keep": -1}], "how many images to keep"),
        ([{"pattern": "^sha-", "keep": 0}], "does not say that this is meant"),
        ([{"pattern": "^sha-", "keep": 2, "keep_none": True}], "it has keep_none and keeps 2"),
        ([{"pattern": "^sha-", "keep": 2, "younger_than": 0}], "younger_than is 0"),
    ],
)
def test_rules_that_are_refused(rules: Rules, words: str) -> None:
    with pytest.raises(DeliveryError) as caught:
        Policy.parse(rules)
    assert words in caught.value.message and caught.value.failure_class == "config"


def test_digests_to_keep_are_read_with_and_without_their_repository() -> None:
    rules: Rules = [{"pattern": ".", "keep": 1}]
    assert Policy.parse(rules, [digest("a"), f"r.example/app@{digest('b')}"]).keep_digests == {digest("a"), digest("b")}
    with pytest.raises(DeliveryError, match="is not a digest"):
        Policy.parse(rules, ["r.example/app:sha-abc"])


def verdicts(ages: dict[str, float | None], *rules: dict[str, t.Any], same: dict[str, str] | None = None) -> dict[str, tuple[bool, str]]:
    """Judge tags that each name an image of their own, or the one that ``same`` says."""
    tags = {tag: digest((same or {}).get(tag, tag)) for tag in ages}
    created = {tags[tag]: None if age is None else days_ago(age) for tag, age in ages.items()}
    return judge(tags, created, Policy.parse(list(rules)).rules, NOW)


def stays(judged: dict[str, tuple[bool, str]]) -> set[str]:
    return {tag for tag, (keep, _reason) in judged.items() if keep}


def test_the_last_of_a_pattern_stay_and_what_no_rule_matches() -> None:
    judged = verdicts({"sha-a": 1, "sha-b": 2, "sha-c": 3, "latest": 99}, {"pattern": "^sha-", "keep": 2})
    assert stays(judged) == {"sha-a", "sha-b", "latest"}
    assert judged["sha-a"][1] == "one of the last 2 of ^sha-"
    assert judged["sha-c"][1] == "not one of the last 2 of ^sha-"
    assert judged["latest"][1] == "no rule matches it"


def test_each_text_that_the_groups_match_is_a_series() -> None:
    ages = {"main-1": 1.0, "main-2": 2.0, "fix_x-1": 8.0, "fix_x-2": 9.0, "fix_y-1": 50.0}
    judged = verdicts(dict(ages), {"pattern": r"^(.+)-\d$", "keep": 1})
    assert stays(judged) == {"main-1", "fix_x-1", "fix_y-1"}
    assert judged["fix_y-1"][1] == r"one of the last 1 of ^(.+)-\d$ (fix_y)"


def test_younger_ones_stay_whatever_their_number() -> None:
    judged = verdicts({"a": 1, "b": 2, "c": 6.9, "d": 7, "e": 8}, {"pattern": ".", "keep": 1, "younger_than": 7})
    assert stays(judged) == {"a", "b", "c"}
    assert judged["c"][1] == "younger than 7 days"
    assert judged["d"][1] == "not one of the last 1 of . and older than 7 days"


def test_old_ones_stay_while_there_are_not_more() -> None:
    assert stays(verdicts({"a": 100, "b": 200}, {"pattern": ".", "keep": 2, "younger_than": 7})) == {"a", "b"}


def test_keep_none_leaves_only_what_is_young() -> None:
    assert stays(verdicts({"a": 1, "b": 8}, {"pattern": ".", "keep": 0, "keep_none": True, "younger_than": 7})) == {"a"}


def test_an_image_of_unknown_age_stays_and_takes_nobodys_place() -> None:
    judged = verdicts({"a": None, "b": 2, "c": 3}, {"pattern": ".", "keep": 1})
    assert stays(judged) == {"a", "b"}
    assert judged["a"][1] == "when it was built is not known"


def test_images_of_the_same_moment_stay_together() -> None:
    assert stays(verdicts({"a": 1, "b": 2, "c": 2, "d": 3}, {"pattern": ".", "keep": 2})) == {"a", "b", "c"}


def test_tags_of_one_image_count_once() -> None:
    judged = verdicts({"a": 1, "a2": 1, "b": 2, "c": 3}, {"pattern": ".", "keep": 2}, same={"a2": "a"})
    assert stays(judged) == {"a", "a2", "b"}


def test_a_tag_goes_only_when_every_rule_lets_it() -> None:
    rules = ({"pattern": "^sha-", "keep": 1}, {"pattern": "-old$", "keep": 2})
    assert stays(verdicts({"sha-a": 1, "sha-b-old": 2, "sha-c-old": 3, "sha-d-old": 4}, *rules)) == {"sha-a", "sha-b-old", "sha-c-old"}
    assert stays(verdicts({"sha-a": 1, "sha-b-old": 2, "sha-c-old": 3, "sha-d-old": 4}, *reversed(rules))) == {"sha-a", "sha-b-old", "sha-c-old"}


@pytest.mark.parametrize(
    "text, moment",
    [
        ("2026-11-21T09:00:00Z", NOW),
        ("2026-11-21T09:00:00.123456789Z", NOW),
        ("2026-11-21T10:00:00+01:00", NOW),
        ("1970-01-01T00:00:00Z", None),
        ("1980-01-01T00:00:01Z", None),
        ("0001-01-01T00:00:00Z", None),
        ("2026-13-21T09:00:00Z", None),
        ("yesterday", None),
        ("", None),
        (None, None),
        (17, None),
    ],
)
def test_when_an_image_was_built(text: t.Any, moment: datetime.datetime | None) -> None:
    assert parse_moment(text) == moment


# -- what stays with what ------------------------------------------------------------------------------------------

LAST: Rules = [{"pattern": "^sha-", "keep": 1}]


def test_a_digest_goes_only_with_all_its_tags() -> None:
    decision = decided(inventory({"sha-a": "a", "sha-b": "b", "sha-c": "c", "production": "b"}, {"a": 1, "b": 2, "c": 3}), LAST)
    assert gone(decision) == [digest("c")]
    assert reasons(decision) == {
        "sha-a": "one of the last 1 of ^sha-",
        "sha-b": "names the same image as production",
        "production": "no rule matches it",
    }


def test_what_an_environment_ran_and_what_is_named_stays() -> None:
    record = Content(digest("r"), subject=digest("b"), record={"environment": "staging", "release": "7", "result": "rolled_back"})
    found = inventory({"sha-a": "a", "sha-b": "b", "sha-c": "c", "sha-d": "d"}, {"a": 1, "b": 2, "c": 3, "d": 4}, r=record)
    decision = decided(found, LAST, keep=["c"])
    assert gone(decision) == [digest("d")]
    assert reasons(decision)["sha-b"] == "staging ran it (release 7)"
    assert reasons(decision)["sha-c"] == "named in keep_digests"


def test_parts_go_with_their_last_index_and_referrers_with_their_subject() -> None:
    found = inventory(
        {
            "sha-a": "A",
            "sha-b": "B",
            digest_tag(digest("B"), ".sig"): "s",
            digest_tag(digest("x")): "f",
            digest_tag(digest("A"), ".att"): "t",
        },
        {"A": 1, "B": 2},
        A=Content(digest("A"), is_index=True, children=(digest("x"), digest("y"))),
        B=Content(digest("B"), is_index=True, children=(digest("y"), digest("w"), digest("z"))),
        x=Content(digest("x")),
        y=Content(digest("y")),
        w=Content(digest("w")),
        z=Content(digest("z")),
        q=Content(digest("q"), subject=digest("z")),
        n=Content(digest("n"), subject=digest("q")),
    )
    decision = decided(found, LAST)
    # The signature of the index after the parts; what belongs to a part after that part.
    assert gone(decision) == [digest(name) for name in ("B", "w", "z", "q", "n", "s")]
    assert [(removal.what, removal.reason) for removal in decision.deleted] == [
        ("index", "not one of the last 1 of ^sha-"),
        ("part", "part of sha-b"),
        ("part", "part of sha-b"),
        ("referrer", f"belongs to {digest('z')}"),
        ("referrer", f"belongs to {digest('q')}"),
        ("referrer", "belongs to sha-b"),
    ]
    assert decision.deleted[-1].tags == (digest_tag(digest("B"), ".sig"),)


def test_a_part_of_an_index_that_stays_loses_only_its_tag() -> None:
    found = inventory(
        {"v1": "A", "sha-x": "x", "sha-y": "y"}, {"x": 2, "y": 1}, A=Content(digest("A"), is_index=True, children=(digest("x"),))
    )
    decision = decided(found, LAST)
    assert decision.deleted == []
    assert [(removal.tags, removal.what) for removal in decision.untagged] == [(("sha-x",), "tag")]
    assert decision.untagged[0].reason == "not one of the last 1 of ^sha-; its image stays, since another needs it"


def test_the_subject_of_what_stays_stays() -> None:
    found = inventory({"sha-a": "a", "sha-b": "b", "my-sbom": "m"}, {"a": 1, "b": 2}, m=Content(digest("m"), subject=digest("b")))
    decision = decided(found, LAST)
    assert gone(decision) == []
    assert [removal.tags for removal in decision.untagged] == [("sha-b",)]


def test_orphans_go_only_when_asked_for() -> None:
    tag = digest_tag(digest("lost"), ".sig")
    found = inventory({"sha-a": "a", tag: "s"}, {"a": 1})
    assert reasons(decided(found, LAST))[tag] == "the image it belongs to is gone, and orphans is not set"
    decision = decided(found, LAST, orphans=True)
    assert [(removal.digest, removal.what) for removal in decision.deleted] == [(digest("s"), "orphan")]


def test_what_an_earlier_run_condemned_goes_unless_something_needs_it_now() -> None:
    found = inventory(
        {"sha-a": "A", digest_tag(digest("B"), ".sig"): "s"},
        {"A": 1},
        A=Content(digest("A"), is_index=True, children=(digest("x"),)),
        x=Content(digest("x")),
        y=Content(digest("y")),
        s=Content(digest("s")),
    )
    found.pending = {digest("x"), digest("y"), digest("s")}
    assert set(gone(decided(found, LAST))) == {digest("y"), digest("s")}
    assert set(gone(decided(found, LAST, keep=["y"]))) == {digest("s")}


def test_what_is_there_without_a_tag_stays_with_what_belongs_to_it() -> None:
    found = inventory({"sha-a": "a", digest_tag(digest("p"), ".sig"): "s"}, {"a": 1}, p=Content(digest("p"), children=(digest("q"),)))
    found.contents[digest("q")] = Content(digest("q"))
    found.loose = {digest("p")}
    assert gone(decided(found, LAST, orphans=True)) == []


def test_a_list_that_two_images_share_stays_for_the_one_that_stays() -> None:
    # Two empty lists of referrers are one manifest.
    tags = {"sha-a": "a", "sha-b": "b", digest_tag(digest("a")): "e", digest_tag(digest("b")): "e"}
    decision = decided(inventory(tags, {"a": 1, "b": 2}), LAST)
    assert gone(decision) == [digest("b")]
    assert [removal.tags for removal in decision.untagged] == [(digest_tag(digest("b")),)]


def test_a_tag_that_names_nothing_is_told() -> None:
    found = inventory({"sha-a": "a"}, {"a": 1})
    found.tags["sha-dangling"] = None
    assert reasons(decided(found, LAST))["sha-dangling"] == "it names nothing that the registry has"


def test_what_was_left_stays_with_its_parts() -> None:
    found = inventory({"sha-a": "a", "sha-b": "B"}, {"a": 1, "B": 2}, B=Content(digest("B"), is_index=True, children=(digest("x"),)))
    found.contents[digest("x")] = Content(digest("x"))
    decision = decide(found, Policy.parse(LAST), NOW, {digest("B"): "since the plan: somebody came"})
    assert gone(decision) == [] and reasons(decision)["sha-b"] == "since the plan: somebody came"


def test_the_oldest_go_first_and_everything_after_what_names_it() -> None:
    ages: dict[str, float | None] = {name: age for age, name in enumerate("acebdf")}
    found = inventory({f"sha-{name}": name for name in "abcdef"}, ages)
    assert gone(decided(found, LAST)) == [digest(name) for name in "fdbec"]
    # An index that is newer than its parts.
    found.contents[digest("c")] = Content(digest("c"), is_index=True, children=(digest("d"), digest("f")))
    assert gone(decided(found, LAST)) == [digest(name) for name in "becdf"]


def test_names_of_tags_that_belong_to_a_digest() -> None:
    assert belongs_to(digest_tag(digest("a"))) == digest("a")
    assert belongs_to(digest_tag(digest("a"), ".ref-0123456789abcdef")) == digest("a")
    assert belongs_to(digest_tag("sha512:" + "a" * 128, ".sig")) == ""
    for tag in ("sha-abc", "sha256-abc", "latest", digest_tag(digest("a")) + "x", "x" + digest_tag(digest("a"))):
        assert belongs_to(tag) is None, tag


def test_the_diff_shows_tags_and_what_goes_without_one() -> None:
    removals = [Removal(digest("b"), ("sha-b",), "index", ""), Removal(digest("x"), (), "part", "")]
    outcome = Outcome("r.example/app", [Kept("sha-a", digest("a"), "")], removals, 7, {"sha-b": digest("b"), "sha-a": digest("a")})
    assert outcome.diff() == {
        "before_header": "r.example/app",
        "after_header": "r.example/app",
        "before": f"sha-a: {digest('a')}\nsha-b: {digest('b')}\npart {digest('x')}\n",
        "after": f"sha-a: {digest('a')}\n",
    }
    assert outcome.changed and not Outcome("r.example/app").changed
