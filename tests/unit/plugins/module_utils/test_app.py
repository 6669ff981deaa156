# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What a description may say, and the exact words for what it may not."""

from __future__ import annotations

import copy
import os

import pytest
import yaml

from ansible_collections.selfhost.delivery.plugins.module_utils import app as app_module
from ansible_collections.selfhost.delivery.plugins.module_utils.app import parse_app
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError

SMALL = {
    "name": "shop",
    "images": {"app": "registry.example.com/shop/app", "migrator": "registry.example.com/shop/migrator"},
    "services": {"web": {"image": "app", "port": 8080}, "worker": {"image": "app"}},
}
ROOT = os.path.join(os.path.dirname(app_module.__file__), "..", "..")


def changed(path, value):
    """``SMALL`` with one key, ``a.b.c``, set."""
    raw = copy.deepcopy(SMALL)
    *parents, last = path.split(".")
    place = raw
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = value
    return raw


def problems_of(raw, environment="production"):
    with pytest.raises(DeliveryError) as caught:
        parse_app(raw, environment)
    assert caught.value.failure_class == "config"
    return caught.value.details["problems"]


def test_defaults():
    app = parse_app(SMALL, "production").as_dict()
    assert app["project"] == "shop"
    assert app["compose_files"] == ["compose.yaml"] and app["env_files"] == []
    assert app["images"]["app"] == {"source": "registry.example.com/shop/app", "repository": "registry.example.com/shop/app"}
    assert app["services"]["worker"] == {
        "image": "app",
        "port": None,
        "strategy": "auto",
        "ready": {},
        "ready_timeout": 60,
        "stable": 1,
        "drain_timeout": 30,
        "stop_timeout": 10,
        "single": False,
    }
    assert app["order"] == ["web", "worker"]
    assert app["migrator"] is None and app["volumes"] is None and app["public"] is None
    assert app["snapshot"] == {"consistency": "pause", "paths": [], "hooks": []}
    assert app["policies"] == {
        "restore": "auto",
        "migrations": "compatible",
        "immutable_tags": ["^sha-"],
        "gates": ["staging"],
        "keep_releases": 10,
    }
    assert app["notify"] == {"webhooks": [], "email": {}} and app["git"] == {"repository": "", "push": False}


def test_only_production_has_a_gate_by_itself():
    assert parse_app(SMALL, "staging").policies.gates == []
    assert parse_app(changed("policies.gates", []), "production").policies.gates == []


def test_the_example_of_the_manual_is_thirty_lines_and_good():
    with open(os.path.join(ROOT, "docs", "app.md"), encoding="utf-8") as handle:
        example = handle.read().split("```yaml\n", 1)[1].split("```", 1)[0]
    assert len(example.splitlines()) <= 30
    app = parse_app(yaml.safe_load(example)["delivery_app"], "production")
    assert len(app.services) == 3 and app.migrator and app.public


def test_the_manual_knows_every_key():
    with open(os.path.join(ROOT, "docs", "app.md"), encoding="utf-8") as handle:
        manual = handle.read()
    for key in (*app_module._TOP_KEYS, *app_module._SERVICE_KEYS):
        assert f"`{key}`" in manual, key


@pytest.mark.parametrize(
    "path, value, problem",
    [
        ("nmae", "x", "nmae: unknown key; did you mean name?"),
        ("zzz", "x", "zzz: unknown key"),
        ("name", "Shop!", "name: 'Shop!' is no name: use a-z, 0-9, _ and -, beginning with a letter or digit"),
        ("name", None, "name: is required"),
        ("name", 7, "name: must be text, is a number"),
        ("services.web.prot", 8080, "services.web.prot: unknown key; did you mean port?"),
        ("services.web.port", "8080", "services.web.port: must be a whole number, is text"),
        ("services.web.port", 70000, "services.web.port: must be 1 to 65535, is 70000"),
        ("services.web.image", "ap", "services.web.image: 'ap' is not in delivery_app.images; did you mean app?"),
        ("services.web.image", None, "services.web.image: is required"),
        ("services.cron", None, "services.cron.image: is required"),
        (
            "services.web.strategy",
            "start-first",
            "services.web.strategy: must be one of auto, start_first, stop_first, is 'start-first'; did you mean start_first?",
        ),
        ("services.web", "app", "services.web: must be a map of keys, is text"),
        ("services.web.single", "yes", "services.web.single: must be true or false, is text"),
        ("services.web.ready_timeout", True, "services.web.ready_timeout: must be a number, is true or false"),
        ("services.web.ready_timeout", 0, "services.web.ready_timeout: must be 1 or more, is 0"),
        ("services.web.stable", 0, "services.web.stable: must be 1 or more, is 0"),
        ("services.web.ready", {"htpp": "/"}, "services.web.ready.htpp: unknown key; did you mean http?"),
        ("services.web.ready", {"http": "/", "tcp": True}, "services.web.ready: must be one of http, tcp, command; has http and tcp"),
        ("services.web.ready", {"http": "api"}, "services.web.ready.http: 'api' is no path: begin it with /"),
        ("services.web.ready", {"http": {"status": 200}}, "services.web.ready.http.path: is required"),
        (
            "services.web.ready",
            {"http": {"path": "/", "status": "ok"}},
            "services.web.ready.http.status: must be an HTTP status or a list of them, 100 to 599",
        ),
        ("services.web.ready", {"command": "pg_isready"}, "services.web.ready.command: must be a list of texts, the program first"),
        ("services.web.ready", {"tcp": False}, "services.web.ready.tcp: can only be true; leave ready out to wait for health or running"),
        ("services.worker.ready", {"http": "/"}, "services.worker.ready.http: needs delivery_app.services.worker.port"),
        ("services", {}, "services: must name at least one service"),
        ("services", None, "services: is required"),
        (
            "images.app",
            "registry.example.com/shop/app:latest",
            "images.app: 'registry.example.com/shop/app:latest' is no repository: give host[:port]/path without tag and digest",
        ),
        ("images.db-x", {"source": "r/x", "repositry": "r/y"}, "images.db-x.repositry: unknown key; did you mean repository?"),
        ("images.9x", "r/x", "images.9x: is no image name: use a-z, 0-9, _ and -, beginning with a letter"),
        ("images.db", None, "images.db: is empty; give the repository"),
        ("order", ["web"], "order: must name every service once; worker is missing"),
        ("order", ["web", "worker", "wrker"], "order[2]: 'wrker' is not in delivery_app.services; did you mean worker?"),
        ("order", ["web", "worker", "web"], "order[2]: 'web' is there twice"),
        (
            "migrator",
            {"service": "web", "image": "migrator"},
            "migrator.service: 'web' is in delivery_app.services too; a migrator runs once and is not rolled",
        ),
        (
            "migrator",
            {"service": "migrate", "image": "migrate"},
            "migrator.image: 'migrate' is not in delivery_app.images; did you mean migrator?",
        ),
        ("migrator", {"image": "migrator"}, "migrator.service: is required"),
        ("compose_files", "compose.yaml", "compose_files: must be a list, is text"),
        ("compose_files", [], "compose_files: must name at least one file"),
        ("compose_files", ["../x.yaml"], "compose_files[0]: '../x.yaml' must be relative and stay inside its folder"),
        (
            "compose_files",
            ["a/c.yaml", "b/c.yaml"],
            "compose_files[1]: 'b/c.yaml' and 'a/c.yaml' have the same name; a release keeps them side by side",
        ),
        ("compose_files", ["deploy.env"], "compose_files[0]: the name 'deploy.env' belongs to the release folder; rename the file"),
        ("env_files", ["/etc/env"], "env_files[0]: '/etc/env' must be relative and stay inside its folder"),
        ("volumes", ["/data"], "volumes[0]: '/data' is no volume name; folders go into delivery_app.snapshot.paths"),
        ("snapshot.consistency", "freeze", "snapshot.consistency: must be one of none, pause, stop, hooks, is 'freeze'"),
        ("snapshot.consistency", "hooks", "snapshot.hooks: is required with consistency: hooks"),
        ("snapshot.hooks", [{"container": "db", "after": ["x"]}], "snapshot.hooks: are only run with consistency: hooks, which is pause"),
        ("snapshot", {"consistency": "hooks", "hooks": [{"container": "db"}]}, "snapshot.hooks[0].before: is required, or after"),
        (
            "snapshot",
            {"consistency": "hooks", "hooks": [{"container": "db", "before": "x"}]},
            "snapshot.hooks[0].before: must be a list of texts, the program first",
        ),
        ("routes", [{"service": "wbe"}], "routes[0].service: 'wbe' is not in delivery_app.services; did you mean web?"),
        ("routes", [{"service": "worker"}], "routes[0].service: needs delivery_app.services.worker.port"),
        ("routes", [{"service": "web", "host": "no host"}], "routes[0].host: 'no host' is no host name"),
        ("routes", [{"service": "web"}, {"service": "web"}], "routes[1].host: every name has a route already"),
        ("public", {"url": "shop.example.com"}, "public.url: 'shop.example.com' is no http or https address"),
        ("public", {"url": "https://shop.example.com/?a=1"}, "public.url: must have neither login, query nor fragment"),
        ("public", {"url": "https://x.example.com", "vresion": "v"}, "public.vresion: unknown key; did you mean version?"),
        ("policies.restore", "sometimes", "policies.restore: must be one of auto, always, never, is 'sometimes'"),
        (
            "policies.migrations",
            "compatable",
            "policies.migrations: must be one of compatible, breaking, is 'compatable'; did you mean compatible?",
        ),
        (
            "policies.immutable_tags",
            ["("],
            "policies.immutable_tags[0]: '(' is no regular expression: missing ), unterminated subpattern at position 0",
        ),
        ("policies.immutable_tags", [], "policies.immutable_tags: must hold at least one pattern"),
        ("policies.gates", ["production"], "policies.gates[0]: 'production' cannot be its own gate"),
        ("policies.keep_releases", 1, "policies.keep_releases: must be 2 or more, is 1"),
        ("notify.webhooks", ["s3cret"], "notify.webhooks[0]: is no http or https address"),
        ("notify.email", {"to": ["a@b"], "username": "x"}, "notify.email.password: is required: username and password go together"),
        ("git", {"repo": "x"}, "git.repo: unknown key"),
    ],
)
def test_refused_by_its_path(path, value, problem):
    assert problems_of(changed(path, value)) == [f"delivery_app.{problem}"]


def test_start_first_cannot_be_single():
    raw = changed("services.worker", {"image": "app", "single": True, "strategy": "start_first"})
    assert problems_of(raw) == ["delivery_app.services.worker.strategy: start_first runs old and new at once, which single: true forbids"]


def test_two_images_must_not_share_a_variable():
    raw = changed("images", {"app": "r/a", "a-b": "r/b", "a_b": "r/c"})
    assert problems_of(raw) == ["delivery_app.images.a_b: gives the same variable A_B_IMAGE as a-b"]


def test_all_problems_are_said_at_once():
    raw = changed("services.web.prot", 1)
    raw["nmae"] = "x"
    with pytest.raises(DeliveryError) as caught:
        parse_app(raw, "production")
    assert caught.value.message == (
        "Reading the description of the app: 2 problems, nothing was touched. delivery_app.nmae: unknown key; did you mean name?\n"
        "delivery_app.services.web.prot: unknown key; did you mean port?"
    )


@pytest.mark.parametrize("raw", [None, {}, ""])
def test_no_description(raw):
    assert problems_of(raw) == ["delivery_app: there is none; docs/app.md has one of thirty lines to begin with"]


def test_not_a_map_and_no_environment():
    assert problems_of(["x"], "") == [
        "environment: '' is not a name; set delivery_environment in the inventory",
        "delivery_app: must be a map of keys, is a list",
    ]


def test_secrets_are_not_repeated():
    raw = changed("notify", {"webhooks": ["hooks/T0PS3CRET", "hooks/T0PS3CRET"], "email": {"to": ["a@b"], "password": "T0PS3CRET"}})
    assert "T0PS3CRET" not in "\n".join(problems_of(raw))


@pytest.mark.parametrize("tag", ["latest", "main", "staging", "production", "Latest"])
def test_a_moving_tag_is_refused_whatever_the_patterns(tag):
    for patterns in (["^sha-"], ["."]):
        with pytest.raises(DeliveryError) as caught:
            parse_app(changed("policies.immutable_tags", patterns), "production").check_tag(tag)
        assert caught.value.failure_class == "policy"
        assert caught.value.message == f"Promoting {tag!r} to production: {tag!r} moves. Give an immutable tag such as sha-<commit>."


@pytest.mark.parametrize(
    "tag, seen, failure_class",
    [
        ("v1", "'v1' does not match policies.immutable_tags (^sha-), so it may move", "policy"),
        ("", "that is not a tag", "config"),
        ("sha-a b", "that is not a tag", "config"),
        ("sha-a;rm", "that is not a tag", "config"),
    ],
)
def test_other_tags_that_are_refused(tag, seen, failure_class):
    with pytest.raises(DeliveryError) as caught:
        parse_app(SMALL, "production").check_tag(tag)
    assert caught.value.seen == seen and caught.value.failure_class == failure_class


def test_a_good_tag():
    parse_app(SMALL, "production").check_tag("sha-abc")
    parse_app(changed("policies.immutable_tags", ["^sha-", r"^v\d+\.\d+\.\d+$"]), "production").check_tag("v1.2.3")


def test_public_check():
    app = parse_app(changed("public", {"url": "https://shop.example.com/", "validate_certs": False}), "production")
    assert app.public_check("sha-abc") == {
        "name": "public",
        "http": {"url": "https://shop.example.com/api/ready", "validate_certs": False, "query": "version == 'sha-abc'"},
    }
    assert app.public_check()["http"]["query"] == "version == '{tag}'"
    assert (
        "query" not in parse_app(changed("public", {"url": "http://x.example.com", "version": ""}), "production").public_check("t")["http"]
    )
    app = parse_app(changed("public", {"url": "http://x.example.com", "version": "build.tag || tag"}), "production")
    assert app.public_check("t")["http"]["query"] == "(build.tag || tag) == 't'"


def test_what_the_rollout_is_told():
    raw = changed("routes", [{"service": "web", "host": "Shop.Example.com"}])
    raw["migrator"] = {"service": "migrate", "image": "migrator"}
    raw["services"]["web"]["ready"] = {"http": "/api/ready"}
    app = parse_app(raw, "production")
    assert app.rollout["routes"] == {"web": 8080}
    assert app.rollout["migrator"] == {"service": "migrate", "image": "migrator", "timeout": 300}
    assert app.rollout["services"]["web"]["ready"] == {"http": {"path": "/api/ready"}}
    assert app.service_images == {"web": "app", "worker": "app", "migrate": "migrator"}
    assert app.image_variables == {"app": "APP_IMAGE", "migrator": "MIGRATOR_IMAGE"}
    assert app.routes[0].host == "shop.example.com"
