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
        "stop_timeout": None,
        "single": False,
        "parallel": None,
        "max_surge": None,
        "max_unavailable": None,
        "smoke": [],
        "smoke_timeout": 60,
        "keep_old_for": 0,
        "canary": {},
    }
    assert app["order"] == ["web", "worker"]
    assert app["migrator"] is None and app["volumes"] is None and app["public"] is None
    assert app["snapshot"] == {"consistency": "pause", "paths": [], "hooks": [], "volume_options": {}}
    assert app["policies"] == {
        "restore": "auto",
        "migrations": "compatible",
        "immutable_tags": ["^sha-"],
        "gates": ["staging"],
        "keep_releases": 10,
        "confirm_within": 0,
        "bake": {},
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
            "services.web.strategy: must be one of auto, start_first, stop_first, blue_green, canary, is 'start-first'; did you mean start_first?",
        ),
        ("services.web", "app", "services.web: must be a map of keys, is text"),
        ("services.web.single", "yes", "services.web.single: must be true or false, is text"),
        ("services.web.ready_timeout", True, "services.web.ready_timeout: must be a number, is true or false"),
        ("services.web.ready_timeout", 0, "services.web.ready_timeout: must be 1 or more, is 0"),
        ("services.web.stable", 0, "services.web.stable: must be 1 or more, is 0"),
        ("services.web.ready", {"htpp": "/"}, "services.web.ready.htpp: unknown key; did you mean http?"),
        (
            "services.web.ready",
            {"http": "/", "tcp": True},
            "services.web.ready: must be one of http, tcp, grpc, command, log; has http and tcp",
        ),
        ("services.web.ready", {"http": "api"}, "services.web.ready.http: 'api' is no path: begin it with /"),
        ("services.web.ready", {"http": {"status": 200}}, "services.web.ready.http.path: is required"),
        (
            "services.web.ready",
            {"http": {"path": "/", "status": "ok"}},
            "services.web.ready.http.status: must be an HTTP status or a list of them, 100 to 599",
        ),
        ("services.web.ready", {"command": "pg_isready"}, "services.web.ready.command: must be a list of texts, the program first"),
        ("services.web.ready", {"tcp": False}, "services.web.ready.tcp: can only be true; leave ready out to wait for health or running"),
        (
            "services.web.ready",
            {"grpc": False},
            "services.web.ready.grpc: can only be true or a map; leave ready out to wait for health or running",
        ),
        ("services.web.ready", {"grpc": "orders"}, "services.web.ready.grpc: must be true or false, is text"),
        ("services.web.ready", {"grpc": {"servce": "a"}}, "services.web.ready.grpc.servce: unknown key; did you mean service?"),
        ("services.web.ready", {"grpc": {"service": ""}}, "services.web.ready.grpc.service: must not be empty"),
        ("services.web.ready", {"grpc": {"server_name": "a"}}, "services.web.ready.grpc.server_name: is only used with tls: true"),
        ("services.web.ready", {"grpc": {"tls": "yes"}}, "services.web.ready.grpc.tls: must be true or false, is text"),
        (
            "services.web.ready",
            {"grpc": {"tls": True, "ca_path": "ca.pem"}},
            "services.web.ready.grpc.ca_path: 'ca.pem' must be the absolute path of a file on the host",
        ),
        (
            "services.web.ready",
            {"log": "("},
            "services.web.ready.log: '(' is no regular expression: missing ), unterminated subpattern at position 0",
        ),
        ("services.web.ready", {"log": ["up"]}, "services.web.ready.log: must be text, is a list"),
        ("services.web.ready", {"log": ""}, "services.web.ready.log: must not be empty"),
        ("services.worker.ready", {"grpc": True}, "services.worker.ready.grpc: needs delivery_app.services.worker.port"),
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
        ("volumes", [{"consistency": "pause"}], "volumes[0].name: is required"),
        ("volumes", ["data", {"name": "data"}], "volumes[1]: 'data' is there twice"),
        (
            "volumes",
            [{"name": "data", "consistency": "postgres"}],
            "volumes[0].consistency: must be one of none, pause, stop, hooks, postgresql, mysql, redis, sqlite, is 'postgres'; "
            "did you mean postgresql?",
        ),
        ("volumes", [{"name": "data", "consistency": "hooks"}], "snapshot.hooks: is required with consistency: hooks"),
        ("volumes", [3], "volumes[0]: must be text or a map, is a number"),
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
        (
            "public",
            {"url": "https://x.example.com", "on_host": "127.0.0.1:80"},
            "public.on_host: '127.0.0.1:80' is no http or https address without a path",
        ),
        (
            "public",
            {"url": "https://x.example.com", "on_host": "http://127.0.0.1/shop"},
            "public.on_host: 'http://127.0.0.1/shop' is no http or https address without a path",
        ),
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
        ("policies.confirm_within", -1, "policies.confirm_within: must be 0 or more, is -1"),
        ("policies.bake", "long", "policies.bake: must be a number, is text"),
        ("policies.bake", {"max_error_rate": 1}, "policies.bake.seconds: is required"),
        (
            "policies.bake",
            {"seconds": 60, "max_error_rate": 101},
            "policies.bake.max_error_rate: is a percentage, must be 100 or less, is 101",
        ),
        (
            "policies.bake",
            {"seconds": 60, "prometheus": {"url": "prometheus:9090", "query": "up"}},
            "policies.bake.prometheus.url: 'prometheus:9090' is no http or https address",
        ),
        ("services.web.parallel", 0, "services.web.parallel: must be 1 or more"),
        (
            "services.web.max_surge",
            "many",
            "services.web.max_surge: must be a whole number, 0 or more, or a percentage such as 25%, is 'many'",
        ),
        ("services.web.max_surge", 0, "services.web.max_surge: and max_unavailable cannot both be 0: nothing could be replaced"),
        ("services.web.smoke", "curl localhost", "services.web.smoke: must be a list of texts, the program first"),
        ("services.web.keep_old_for", 60, "services.web.keep_old_for: is for strategy: blue_green"),
        ("services.web.canary", {"steps": [10]}, "services.web.canary: is for strategy: canary"),
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


def test_strategies_with_what_belongs_to_them():
    canary = {"steps": [5, 50], "seconds": 10, "max_latency": 0.5, "prometheus": {"url": "http://p:9090", "query": "x", "max": 0.1}}
    web = changed("services.web", {"image": "app", "port": 80, "strategy": "canary", "canary": canary})
    assert parse_app(web, "production").services["web"].canary == canary
    short = changed("services.web", {"image": "app", "port": 80, "strategy": "canary"})
    assert parse_app(short, "production").services["web"].canary == {"steps": [10, 50], "seconds": 30}
    assert parse_app(changed("policies.bake", 60), "production").policies.bake == {"seconds": 60}
    assert parse_app(changed("policies.bake", 0), "production").policies.bake == {}
    green = changed("services.web", {"image": "app", "strategy": "blue_green", "keep_old_for": 600, "smoke": ["/bin/check"]})
    assert parse_app(green, "production").services["web"].keep_old_for == 600
    batches = changed("services.web", {"image": "app", "parallel": "50%", "strategy": "start_first"})
    assert parse_app(batches, "production").services["web"].parallel == "50%"


@pytest.mark.parametrize("steps", [[], [50, 10], [10, 10], [0], [101], "10", [10.5]])
def test_steps_of_a_canary(steps):
    raw = changed("services.web", {"image": "app", "port": 80, "strategy": "canary", "canary": {"steps": steps}})
    said = "delivery_app.services.web.canary.steps: must be a list of percentages, 1 to 100, each larger than the one before"
    assert problems_of(raw) == [said]


def test_batches_are_not_for_groups_and_shares():
    raw = changed("services.web", {"image": "app", "port": 80, "strategy": "blue_green", "parallel": 1})
    said = "parallel: is for start_first and stop_first; blue_green starts all of the new ones beside the old ones"
    assert problems_of(raw) == [f"delivery_app.services.web.{said}"]


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


@pytest.mark.parametrize(
    ("ready", "read"),
    [
        ({"grpc": True}, {"grpc": True}),
        ({"grpc": {"service": "shop.v1.Orders"}}, {"grpc": {"service": "shop.v1.Orders"}}),
        ({"grpc": {"tls": True, "server_name": "a.b"}}, {"grpc": {"tls": True, "server_name": "a.b"}}),
        ({"log": r"^listening on \d+"}, {"log": r"^listening on \d+"}),
    ],
)
def test_probes_of_a_service(ready, read):
    app = parse_app(changed("services.web.ready", ready), "production")
    assert app.rollout["services"]["web"]["ready"] == read


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


@pytest.mark.parametrize(
    ("public", "url", "connect_to"),
    [
        ({"url": "https://shop.example.com"}, "https://shop.example.com/api/ready", "127.0.0.1:443"),
        ({"url": "http://shop.example.com:8080/shop"}, "http://shop.example.com:8080/shop/api/ready", "127.0.0.1:8080"),
        ({"url": "https://shop.example.com", "on_host": "http://127.0.0.1"}, "http://shop.example.com/api/ready", "127.0.0.1:80"),
        ({"url": "https://shop.example.com", "on_host": "https://[::1]:8443/"}, "https://shop.example.com/api/ready", "[::1]:8443"),
    ],
)
def test_a_host_is_asked_by_the_public_name(public, url, connect_to):
    check = parse_app(changed("public", public), "production").host_check()
    assert (check["name"], check["http"]["url"], check["http"]["connect_to"]) == ("host", url, connect_to)
    assert check["http"]["query"] == "version == '{tag}'"


def test_a_host_that_is_not_to_be_asked_is_not():
    assert parse_app(changed("public", {"url": "https://shop.example.com", "on_host": ""}), "production").host_check() is None
    without = changed("public", {"url": "https://shop.example.com"})
    del without["public"]
    assert parse_app(without, "production").host_check() is None


def test_a_volume_may_say_how_it_is_taken() -> None:
    volumes = ["uploads", {"name": "pgdata", "consistency": "postgresql", "service": "db"}, {"name": "cache"}]
    app = parse_app(changed("volumes", volumes), "production")
    assert app.volumes == ["uploads", "pgdata", "cache"]
    assert app.snapshot.volume_options == {"pgdata": {"consistency": "postgresql", "service": "db"}}
