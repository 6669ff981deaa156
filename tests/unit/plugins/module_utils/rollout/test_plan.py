# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The plan: what happens to each service, and why."""

from __future__ import annotations

import typing as t
from dataclasses import replace
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import HASH_LABEL, SERVICE_LABEL
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout import plan as planning
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout import undo
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.history import Expected
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.host import Host
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.plan import Plan, Spec, Step

OLD, NEW = "r/app@sha256:" + "a" * 64, "r/app@sha256:" + "b" * 64


def spec(**more: t.Any) -> Spec:
    raw: dict[str, t.Any] = {
        "project_dir": "/opt/shop",
        "project": "shop",
        "release_id": "r1",
        "files": ["/f"],
        "images": {"web": NEW},
        "services": {"web": {"port": 8080}},
        "routes": {"web": 8080},
    }
    return Spec.from_dict({**raw, **more})


def container(service: str, number: int = 1, state: str = "running", image: str = OLD, config: str = "old", **more: t.Any) -> dict[str, t.Any]:
    labels = {SERVICE_LABEL: service, HASH_LABEL: config}
    return {"Id": f"{service}{number}", "Labels": labels, "State": state, "Image": image, "Status": "", **more}


def build(given: Spec, services: dict[str, t.Any], containers: t.Sequence[dict[str, t.Any]] = (), **more: t.Any) -> Plan:
    return planning.build(given, {"services": services}, {name: "new" for name in services}, containers, **more)


def web(**more: t.Any) -> dict[str, t.Any]:
    return {"image": NEW, **more}


def first(file: dict[str, t.Any], /, containers: t.Sequence[dict[str, t.Any]] = (), **more: t.Any) -> Step:
    return build(spec(**more), file, containers).services[0]


def test_a_changed_image_behind_the_edge_starts_first() -> None:
    step = first({"web": web()}, [container("web")])
    assert (step.action, step.strategy, step.old, step.new, step.old_ids) == ("roll", "start_first", OLD, NEW, ("web1",))


def test_the_same_image_and_configuration_that_runs_is_left_alone() -> None:
    same = container("web", image=NEW, config="new")
    assert first({"web": web()}, [same]).action == "unchanged"
    assert first({"web": web()}, [{**same, "State": "restarting"}]).action == "roll"
    assert first({"web": web()}, [{**same, "State": "exited"}]).action == "start"
    assert first({"web": web()}, [container("web", image=NEW, config="old")]).action == "roll"
    assert first({"web": web(deploy={"replicas": 2})}, [same]).action == "roll"
    assert first({"web": web()}, [same, container("web", 2, "exited")]).action == "unchanged", "what an older release left is no matter"


def test_what_was_kept_is_swapped_to_and_otherwise_no_matter() -> None:
    serving, kept = container("web"), container("web", 2, image=NEW, config="new")
    services = {"web": {"port": 8080, "strategy": "blue_green"}}

    def step(state: str, *, wanted: str = "web2") -> Step:
        containers = [serving, {**kept, "State": state}]
        return build(spec(services=services), {"web": web()}, containers, kept=[wanted]).services[0]

    assert (step("running").action, step("running").old_ids, step("running").kept_ids) == ("swap", ("web1",), ("web2",))
    assert step("exited").action == "swap", "what takes no requests is kept stopped"
    assert build(spec(services=services), {"web": web()}, [kept, serving], kept=["web1"]).services[0].action == "unchanged"
    assert build(spec(), {"web": web()}, [serving, {**kept, "Image": OLD}], kept=["web2"]).services[0].action == "roll"


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"strategy": "canary", "canary": {"steps": [10, 50], "seconds": 30}}, "10 %, 50 % of the requests for 30 s each, then all"),
        ({"strategy": "blue_green", "keep_old_for": 600}, "all at once, the old ones stay for 600 s"),
        ({"strategy": "start_first", "parallel": 1}, "1 at a time"),
    ],
)
def test_the_plan_says_how(given: dict[str, t.Any], words: str) -> None:
    found = build(spec(services={"web": {"port": 8080, **given}}), {"web": web(deploy={"replicas": 3})}, [container("web")])
    assert words in found.lines[0]


def test_old_and_new_side_by_side_is_refused_where_that_cannot_be() -> None:
    with pytest.raises(DeliveryError, match="old and new cannot run side by side: host network"):
        first({"web": web(network_mode="host")}, services={"web": {"strategy": "blue_green"}})
    found = build(spec(services={"web": {"max_surge": 1}}), {"web": web(network_mode="host")})
    with pytest.raises(DeliveryError, match="max_surge is 1, but old and new are not to run side by side"):
        planning.check_shapes(spec(services={"web": {"max_surge": 1}}), {"services": {"web": web()}}, found)


@pytest.mark.parametrize(
    ("service", "reason"),
    [
        ({"ports": [{"target": 80, "published": "8080"}]}, "published host port 8080"),
        ({"network_mode": "host"}, "host network"),
        ({"networks": {"default": {"ipv4_address": "10.0.0.9"}}}, "fixed address in network default"),
        ({"volumes": [{"type": "volume", "source": "data", "target": "/d"}]}, "one replica with a writable volume (data)"),
    ],
)
def test_what_cannot_run_twice_stops_first_and_says_why(service: dict[str, t.Any], reason: str) -> None:
    step = first({"web": web(**service)}, [container("web")])
    assert (step.strategy, step.reason) == ("stop_first", reason)


@pytest.mark.parametrize(
    "service",
    [
        {"ports": [{"target": 80}]},
        {"ports": [{"target": 80, "published": "8000-8010"}]},
        {"volumes": [{"type": "volume", "source": "data", "target": "/d", "read_only": True}]},
        {"volumes": [{"type": "tmpfs", "target": "/d"}]},
        {"volumes": [{"type": "volume", "source": "data", "target": "/d"}], "scale": 2},
    ],
)
def test_what_can_run_twice_starts_first(service: dict[str, t.Any]) -> None:
    assert first({"web": web(**service)}).strategy == "start_first"


def test_what_the_description_says_about_strategy_wins_where_it_can() -> None:
    assert first({"web": web()}, [container("web")], services={"web": {"single": True}}).reason == "single: true"
    assert first({"web": web()}, services={"web": {"strategy": "stop_first"}}).strategy == "stop_first"
    volume = {"volumes": [{"type": "volume", "source": "data", "target": "/d"}]}
    assert first({"web": web(**volume)}, services={"web": {"strategy": "start_first"}}).strategy == "start_first"
    with pytest.raises(DeliveryError, match="published host port 80"):
        first({"web": web(ports=[{"target": 80, "published": "80"}])}, services={"web": {"strategy": "start_first"}})
    assert "no route" in first({"web": web()}, [container("web")], routes={}).reason


def test_order_is_as_given_then_by_need() -> None:
    services = {"web": {"depends_on": {"api": {}, "db": {}}}, "api": {}, "worker": {"depends_on": {"web": {}}}, "db": {}}
    given = spec(services={"web": {}, "worker": {}, "api": {}}, images={}, routes={})
    assert planning.roll_order(given, services) == ["api", "web", "worker"]
    given = spec(services={"web": {}, "worker": {}, "api": {}}, images={}, routes={}, order=["worker"])
    assert planning.roll_order(given, services) == ["worker", "api", "web"]


def test_dependencies_are_what_the_app_needs_and_what_up_would_start() -> None:
    services = {
        "web": {"depends_on": {"db": {}}},
        "db": {"depends_on": {"net": {}}},
        "net": {"profiles": ["x"]},
        "cache": {},
        "tools": {"profiles": ["x"]},
        "migrate": {"profiles": ["x"], "depends_on": {"vault": {}}},
        "vault": {"profiles": ["x"]},
    }
    given = spec(migrator={"service": "migrate"})
    assert sorted(planning.dependency_order(given, services)) == ["cache", "db", "net", "vault"]
    assert planning.levels(["net", "db", "cache"], services) == [["net", "cache"], ["db"]]


def test_a_circle_of_dependencies_ends() -> None:
    services = {"a": {"depends_on": {"b": {}}}, "b": {"depends_on": {"a": {}}}}
    assert sorted(planning.sorted_by_need(["a"], services)) == ["a", "b"]


def test_a_dependency_is_started_or_made_again_or_left() -> None:
    services = {"web": web(depends_on={"db": {}}), "db": {"image": "db:1"}}

    def action(*containers: dict[str, t.Any]) -> str:
        return build(spec(), services, containers).dependencies[0].action

    assert action() == "create"
    assert action(container("db", image="db:1", config="new")) == "unchanged"
    assert action(container("db", state="exited", image="db:1", config="new")) == "start"
    assert action(container("db", image="db:1", config="old")) == "roll"


def test_what_others_wait_for_to_end_runs_once_a_configuration() -> None:
    services = {"web": web(depends_on={"init": {"condition": "service_completed_successfully"}}), "init": {"image": "i"}}

    def action(*containers: dict[str, t.Any]) -> str:
        return build(spec(), services, containers).dependencies[0].action

    assert action() == "run"
    assert action(container("init", state="exited", image="i", config="new", Status="Exited (0) 2 days ago")) == "unchanged"
    assert action(container("init", state="exited", image="i", config="new", Status="Exited (1) 2 days ago")) == "run"


def test_the_migrator_runs_unless_it_has_or_must_not() -> None:
    services = {"web": web(depends_on={"migrate": {"condition": "service_completed_successfully"}}), "migrate": {"image": NEW}}
    once = build(spec(migrator={"service": "migrate"}), services)
    assert once.migrator and once.migrator.action == "run" and once.dependencies == ()
    done = build(spec(migrator={"service": "migrate"}), services, migrated=True)
    assert done.migrator and done.migrator.action == "unchanged"
    never = build(spec(migrator={"service": "migrate", "run": False}), services)
    assert never.migrator and never.migrator.action == "unchanged" and never.dependencies == ()


def test_lines_tell_people_only_what_changes() -> None:
    services = {"web": web(), "db": {"image": "db:1"}}
    plan = build(spec(), services, [container("web"), container("db", image="db:1", config="new")])
    assert plan.lines == ["web  sha256:aaaaaaaaaaaa… -> sha256:bbbbbbbbbbbb…  start_first"]
    assert plan.changes
    told = replace(plan, expected=Expected(3, 18.0, {"web": 3.0, "db": 1.0}))
    assert told.lines == [f"{plan.lines[0]}, about 3 s", "expected: about 18 s in all, from the last 3 releases"]
    calm = build(spec(), services, [container("web", image=NEW, config="new"), container("db", image="db:1", config="new")])
    assert calm.lines == [] and not calm.changes
    assert replace(calm, expected=told.expected).lines == []


def test_a_volume_without_a_name_is_warned_about() -> None:
    mount = {"Type": "volume", "Name": "f" * 64, "Destination": "/cache"}
    plan = build(spec(), {"web": web()}, [container("web", Mounts=[mount, {"Type": "volume", "Name": "shop_data"}])])
    assert len(plan.warnings) == 1 and "/cache" in plan.warnings[0]


def test_names_that_the_file_does_not_have() -> None:
    model = {"services": {"web": {}, "worker": {}}, "volumes": {"pgdata": {}}}
    for more, words in (
        ({"images": {"wrker": NEW}}, "Did you mean worker"),
        ({"order": ["zzz"]}, "It has these services: web, worker"),
        ({"migrator": {"service": "migrate"}}, "migrator.service"),
        ({"volumes": ["pgdat"]}, "Did you mean pgdata"),
        ({"routes": {"worker": 80}}, "not among the built services"),
    ):
        with pytest.raises(DeliveryError, match=words):
            planning.check_names(spec(**more), model)
    planning.check_names(spec(volumes=["pgdata"]), model)


def test_an_image_other_than_the_pinned_one_is_refused() -> None:
    planning.check_images(spec(), {"services": {"web": web()}})
    with pytest.raises(DeliveryError, match="APP_IMAGE"):
        planning.check_images(spec(), {"services": {"web": {"image": OLD}}})


def test_a_fixed_container_name_is_refused_where_two_must_exist() -> None:
    model = {"services": {"web": web(container_name="shop")}}
    planning.check_shapes(spec(), model, build(spec(), model["services"]))
    with pytest.raises(DeliveryError, match="container_name: shop"):
        planning.check_shapes(spec(), model, build(spec(), model["services"], [container("web")]))


def test_a_spec_survives_the_file_it_is_kept_in() -> None:
    import json

    given = spec(migrator={"service": "m", "timeout": 5}, services={"web": {"port": 1, "ready": {"http": "/r"}, "stop_timeout": 0}})
    assert Spec.from_dict(json.loads(json.dumps(given.as_dict()))) == given
    assert given.services["web"].stop_timeout == 0, "zero is a value"
    with pytest.raises(DeliveryError, match="strategy"):
        spec(services={"web": {"strategy": "both"}})


@pytest.mark.parametrize("kind", ["none", "nginx", "traefik"])
def test_writes_are_not_promised_to_wait_where_the_edge_cannot_let_them(kind: str) -> None:
    held = spec(hold=True, routes={"web": 8080}, edge={"type": kind})
    with pytest.raises(DeliveryError, match="let requests wait. Put HAProxy") as error:
        planning.check_hold(held)
    assert error.value.failure_class == "config"
    for fine in (replace(held, hold=False), replace(held, routes={}), replace(held, edge={"type": "haproxy", "socket": "/x"})):
        planning.check_hold(fine)


@pytest.mark.parametrize(("kind", "held"), [("haproxy", ["all"]), ("nginx", []), ("traefik", []), ("none", [])])
def test_the_app_is_stopped_also_where_its_requests_cannot_wait(kind: str, held: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    host = Host(spec(project_dir=str(tmp_path), routes={"web": 8080}, edge={"type": kind, **({"socket": "/x"} if held else {})}))
    asked: list[str] = []
    monkeypatch.setattr(host.edge, "hold", lambda project, what: asked.append(what))
    undo._set_hold(host, "all")
    assert asked == held
