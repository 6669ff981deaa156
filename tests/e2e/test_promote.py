# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The main job as a user does it, and what it refuses. The tests build on each other, in this order."""

from __future__ import annotations

import http.server
import json
import os
import subprocess
import threading
import typing as t
from pathlib import Path

import pytest

from .site_under_test import Load, Site


@pytest.fixture(autouse=True)
def _inventories_as_they_were(site: Site) -> t.Iterator[None]:
    yield
    site.write_inventories()


def tree(folder: Path) -> dict[str, tuple[float, int]]:
    """Files below a folder with their times, to see whether anything was written. The module's own lock file does not count."""
    return {str(path): (path.lstat().st_mtime, path.lstat().st_size) for path in folder.rglob("*") if path.name != ".busy"}


# --- the way forward ---------------------------------------------------------------------------------------------------


def test_production_refuses_what_staging_never_committed(site: Site) -> None:
    site.build("sha-one")
    site.promote(site.production, "sha-one").must_fail("no record of staging", "Promote it to staging first")
    assert site.production.release_count() == 0


def test_first_release_to_staging_and_production(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    # Each module packed and started on its own, as on a host that is not the controller.
    monkeypatch.setenv("DELIVERY_IN_WORKER", "0")
    site.promote(site.staging, "sha-one").must_succeed()
    site.promote(site.production, "sha-one").must_succeed()
    assert site.staging.serving() == site.production.serving() == "sha-one"
    assert site.production.current() == "sha-one"
    assert site.production.data("migrations").split() == ["sha-one"]


def test_check_mode_shows_the_plan_and_changes_nothing(site: Site) -> None:
    site.build("sha-two")
    site.promote(site.staging, "sha-two").must_succeed()
    files, containers = tree(site.production.deploy_dir), site.production.containers()
    shown = site.promote(site.production, "sha-two", "--check").must_succeed()
    assert "start_first" in shown.output and "migrate" in shown.output, shown.output
    assert "in all, from the last release" in shown.output, shown.output
    assert tree(site.production.deploy_dir) == files
    assert site.production.containers() == containers
    assert site.production.serving() == "sha-one"


def test_second_release_from_a_starters_folder_loses_no_request(site: Site) -> None:
    with Load(site.production.port) as load:
        site.promote_from_starter("sha-two").must_succeed()
    assert load.sent > 100 and load.lost == [], (load.sent, load.lost[:5])
    # Both serve between the moment the new one is let in and the moment the old one is drained.
    assert (load.versions[0], load.versions[-1], set(load.versions)) == ("sha-one", "sha-two", {"sha-one", "sha-two"})
    assert site.production.data("migrations").split() == ["sha-one", "sha-two"]
    release = site.production.newest()
    assert release["snapshot"].startswith("pre-promotion-two-")
    assert (site.production.deploy_dir / "snapshots" / f"{release['snapshot']}.manifest.json").exists()


def test_same_tag_again_changes_nothing(site: Site) -> None:
    count, containers = site.production.release_count(), site.production.containers()
    again = site.promote(site.production, "sha-two").must_succeed()
    assert "nothing changed" in again.output, again.output
    assert (site.production.release_count(), site.production.containers()) == (count, containers)


def test_status_tells_what_ran(site: Site) -> None:
    table = site.run("status", site.production).must_succeed().output
    assert "sha-one" in table and "sha-two" in table and "committed" in table
    assert json.loads((site.production.deploy_dir / "current" / "release.json").read_text())["result"] == "committed"
    assert "sha-two" in site.run("status", site.staging).must_succeed().output


# --- bad input: one clear message before anything changed ----------------------------------------------------------------


def _refused(site: Site, tag: str, *fragments: str, extra: tuple[str, ...] = ()) -> None:
    count, serving, lock = site.production.release_count(), site.production.serving(), site.production.deploy_dir / "lock.json"
    containers = site.production.containers()
    site.promote(site.production, tag, *extra).must_fail(*fragments)
    # A refusal after the lock leaves a closed release and its reason; it never leaves a lock or another container.
    assert site.production.release_count() <= count + 1
    assert not lock.exists() and site.production.serving() == serving and site.production.containers() == containers
    if site.production.release_count() > count:
        assert site.production.newest()["result"] == "aborted"


def test_unknown_tag(site: Site) -> None:
    _refused(site, "sha-nobody", "sha-nobody")


@pytest.mark.parametrize("tag", ["latest", "main", "production", "1.2"])
def test_moving_tag(site: Site, tag: str) -> None:
    _refused(site, tag, "Give an immutable tag such as sha-<commit>")


def test_unknown_key_is_refused_by_name(site: Site) -> None:
    def misspell(variables: dict[str, t.Any]) -> None:
        variables["delivery_app"]["services"]["web"]["prot"] = 8080

    site.write_inventories(misspell)
    _refused(site, "sha-two", "delivery_app.services.web.prot: unknown key; did you mean port?")


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        (lambda app: app["services"].update(wbe={"image": "app"}), "wbe"),
        (lambda app: app.update(volumes=["dta"]), "dta"),
    ],
)
def test_service_or_volume_that_compose_does_not_have(site: Site, change: t.Callable[[t.Any], None], fragment: str) -> None:
    site.write_inventories(lambda variables: change(variables["delivery_app"]))
    site.build("sha-three")
    site.promote(site.staging, "sha-two")
    _refused(site, "sha-three", fragment, extra=("-e", "delivery_override_gates=testing"))


def test_broken_compose_file(site: Site) -> None:
    compose = site.folder / "compose.yaml"
    whole = compose.read_text()
    try:
        compose.write_text(whole.replace("image: ${APP_IMAGE}", "imgae: ${APP_IMAGE}", 1))
        site.build("sha-three")
        _refused(site, "sha-three", "imgae", extra=("-e", "delivery_override_gates=testing"))
    finally:
        compose.write_text(whole)


def test_env_file_missing_or_open_to_others(site: Site) -> None:
    site.build("sha-three")
    override = ("-e", "delivery_override_gates=testing")
    env = site.production.deploy_dir / ".env.production"
    content = env.read_text()
    env.chmod(0o644)
    try:
        _refused(site, "sha-three", ".env.production", "0644", "chmod 0600", extra=override)
        env.unlink()
        _refused(site, "sha-three", ".env.production", "does not exist", extra=override)
    finally:
        env.write_text(content)
        env.chmod(0o600)


def test_image_for_another_architecture(site: Site) -> None:
    site.build("sha-arm", architecture="arm64")
    _refused(site, "sha-arm", "arm64", extra=("-e", "delivery_override_gates=testing"))


def test_disk_too_small(site: Site) -> None:
    site.build("sha-three")
    _refused(site, "sha-three", "MB are free", extra=("-e", "delivery_min_free_mb=90000000", "-e", "delivery_override_gates=testing"))


def test_engine_down(site: Site) -> None:
    site.build("sha-three")
    extra = ("-e", f"delivery_docker_socket={site.folder}/no.sock", "-e", "delivery_override_gates=testing")
    _refused(site, "sha-three", "no.sock", extra=extra)


def test_wrong_registry_password(site: Site) -> None:
    site.write_inventories(
        lambda variables: variables.update(delivery_registry={**variables["delivery_registry"], "password": "wrong-password-here"})
    )
    refused = site.promote(site.production, "sha-two").must_fail("401")
    assert "wrong-password-here" not in refused.output


def test_registry_with_an_unknown_certificate(site: Site) -> None:
    site.write_inventories(lambda variables: variables["delivery_registry"].pop("ca_path"))
    _refused(site, "sha-two", "certificate")


def test_registry_down(site: Site) -> None:
    site.registry.stop()
    try:
        _refused(site, "sha-two", site.registry.address)
    finally:
        site.registry.start()


def test_another_promotion_is_running(site: Site) -> None:
    """The holder is a real living process: this one."""
    from ansible_collections.selfhost.delivery.plugins.action.release import describe_controller
    from ansible_collections.selfhost.delivery.plugins.module_utils.releases import Lease

    site.build("sha-three")
    lease = Lease(str(site.production.deploy_dir))
    holder = {**describe_controller(os.getpid()), "user": "somebody", "ci_url": "https://ci.example.com/job/7"}
    lease.acquire("another-run", holder, "20260101-000000-sha-other", ttl=600)
    Lease(str(site.production.deploy_dir), "another-run").renew("rolling", 600)
    try:
        site.promote(site.production, "sha-three", "-e", "delivery_override_gates=testing").must_fail(
            "somebody@", "rolling", "https://ci.example.com/job/7"
        )
    finally:
        Lease(str(site.production.deploy_dir), "another-run").release()
    assert site.production.serving() == "sha-two"


class _Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
        self.send_response(204)
        self.end_headers()

    def log_message(self, format: str, *args: t.Any) -> None:
        pass


def test_override_of_a_gate_is_recorded_and_the_release_is_told(site: Site) -> None:
    """With a real webhook receiver and a real deploy repository."""
    site.build("sha-hotfix")
    deploy = site.folder / "deploy"
    git = ["git", "-C", str(deploy), "-c", "user.name=ci", "-c", "user.email=ci@example.com"]
    subprocess.run(["git", "init", "--quiet", str(deploy)], check=True)
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "-m", "state"], check=True)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Hook) as hook:
        hook.got = []  # type: ignore[attr-defined]
        threading.Thread(target=hook.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{hook.server_address[1]}/secret-of-the-hook"

        def tell(variables: dict[str, t.Any]) -> None:
            variables["delivery_app"].update(git={"repository": str(deploy)}, notify={"webhooks": [address]})

        site.write_inventories(tell)
        done = site.promote(site.production, "sha-hotfix", "-e", "delivery_override_gates='the shop is down'", "-vvv").must_succeed()
        hook.shutdown()
    assert "sha-hotfix runs in production" in hook.got[0]["text"]  # type: ignore[attr-defined]
    assert "secret-of-the-hook" not in done.output and site.registry.password not in done.output
    release = site.production.newest()["id"]
    assert subprocess.check_output([*git, "tag"], text=True).split() == [f"production/{release}"]
    assert site.production.newest()["plan"]["override_gates"] == "the shop is down"
    assert site.production.serving() == "sha-hotfix"


def test_production_believes_only_signed_records_where_it_has_keys(site: Site) -> None:
    """Staging attaches its record unsigned, then gets a key; promoting the same tag there again adds the proof."""
    site.promote(site.staging, site.build("sha-signed")).must_succeed()
    made = subprocess.run(
        ["cosign", "generate-key-pair", "--output-key-prefix", "record"],
        cwd=site.folder,
        env={**os.environ, "COSIGN_PASSWORD": "password-of-the-key"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert made.returncode == 0, made.stderr

    def believe(password: str) -> t.Callable[[dict[str, t.Any]], None]:
        def change(variables: dict[str, t.Any]) -> None:
            if variables["delivery_environment"] == "staging":
                variables.update(delivery_record_key=str(site.folder / "record.key"), delivery_record_password=password)
            else:
                variables.update(delivery_record_keys=[(site.folder / "record.pub").read_text()])

        return change

    site.write_inventories(believe("another-password"))
    _refused(site, "sha-signed", "has records of staging, but none of them was signed")
    count = site.staging.release_count()
    refused = site.promote(site.staging, "sha-signed").must_fail("Check the key and its password")
    assert site.staging.release_count() == count and "another-password" not in refused.output
    site.write_inventories(believe("password-of-the-key"))
    site.promote(site.staging, "sha-signed").must_succeed()
    site.promote(site.production, "sha-signed").must_succeed()
    assert site.production.serving() == "sha-signed"
