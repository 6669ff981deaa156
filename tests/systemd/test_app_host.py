# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""One app host from a bare system on, as a user makes it with a folder of the starter: set up, released to, rebooted, broken."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import typing as t
from pathlib import Path

import pytest

sys.path[:0] = [str(Path(__file__).parent), *(str(Path(__file__).parents[1] / name) for name in ("", "integration"))]
from machine import BARE, Machine  # noqa: E402
from starter_site import CANARIES, StarterSite  # noqa: E402


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[StarterSite]:
    """A bare host, and a folder that is filled in for it."""
    folder = tmp_path_factory.mktemp("app-host")
    machine = Machine(folder, "bare", BARE)
    made = None
    try:
        machine.start()
        made = StarterSite(folder, machine)
        made.write()
        yield made
    finally:
        machine.remove()
        if made is not None:
            made.close()


def _until(true: t.Callable[[], bool], seconds: float = 300) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_check_of_a_bare_host_says_that_it_would_be_changed_and_changes_nothing(site: StarterSite) -> None:
    packages = site.machine.run("dpkg-query", "--list")
    checked = site.first_setup("--check", "--diff")
    checked.must_succeed()
    assert checked.changed["app-1"] > 0 and "app-1 is bare" in checked.output
    assert site.machine.run("dpkg-query", "--list") == packages


def test_setup_makes_it_an_app_host_and_a_second_run_changes_nothing(site: StarterSite) -> None:
    site.first_setup().must_succeed()
    # From now on as the account that deploys.
    again = site.setup()
    again.must_succeed()
    assert again.changed == {"app-1": 0}, again.output
    for unit in ("docker", "haproxy", "ssh", "shop", "shop-prune.timer", "selfhost-delivery-firewall"):
        assert (site.machine.unit(unit, "ActiveState"), site.machine.unit(unit, "UnitFileState")) == ("active", "enabled"), unit
    assert site.machine.run("docker", "info", "--format", "{{.LiveRestoreEnabled}} {{.LoggingDriver}}") == "true json-file"


def test_ssh_takes_keys_of_the_deploy_account_and_no_password(site: StarterSite) -> None:
    assert site.machine.ssh("deploy", "sudo", "-n", "id", "--user").stdout == "0\n"
    assert site.machine.run("passwd", "--status", "deploy").split()[1] == "L", "its password is not locked"
    offered = subprocess.run(
        ["ssh", "-v", "-o", "PreferredAuthentications=none", "-o", "BatchMode=yes", "-o", f"UserKnownHostsFile={site.machine.known_hosts}",
         f"deploy@{site.machine.address}"], capture_output=True, text=True, check=False,
    ).stderr  # fmt: skip
    assert re.findall(r"Authentications that can continue: (\S+)", offered) == ["publickey"]
    forward = site.machine.forwards("deploy")
    assert "administratively prohibited" in forward, forward
    # Another user than root is not what its sudo lists.
    assert site.machine.ssh("deploy", "sudo", "-n", "-u", "haproxy", "true").returncode != 0


def test_the_firewall_closes_what_was_not_asked_for_and_leaves_the_engine_s_rules(site: StarterSite) -> None:
    site.machine.run("systemd-run", "--quiet", "--unit=listener", "python3", "-m", "http.server", "8888")
    _until(lambda: site.machine.run("curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "http://127.0.0.1:8888/", check=False) == "200")
    assert not site.machine.open(8888) and site.machine.open(443) and site.machine.open(22)
    assert site.setup("--tags", "setup_firewall", "-e", "{setup_firewall_ports: [80, 443, 8888]}").changed["app-1"] > 0
    assert site.machine.open(8888)
    assert site.setup("--tags", "setup_firewall").changed["app-1"] > 0
    assert not site.machine.open(8888)
    site.machine.run("systemctl", "stop", "listener")
    assert "DOCKER-USER" in site.machine.run("iptables", "--list-rules", "FORWARD")
    # What it must survive: the distribution's own unit empties everything, the engine's rules too, so it is left off.
    assert site.machine.unit("nftables", "UnitFileState") != "enabled"


def test_rules_that_keep_ansible_out_are_taken_back(site: StarterSite) -> None:
    refused = site.setup("--tags", "setup_firewall", "-e", "setup_firewall_ssh_port=2222", "-e", "__setup_firewall_patience=20")
    assert refused.code != 0
    _until(lambda: site.machine.open(22))
    assert site.setup("--tags", "setup_firewall").changed["app-1"] > 0
    assert site.machine.open(22) and not site.machine.open(2222)
    assert site.setup("--tags", "setup_firewall").changed == {"app-1": 0}


def test_a_system_that_is_not_supported_is_refused_in_one_sentence(site: StarterSite) -> None:
    site.machine.run("sh", "-c", "cp --dereference /etc/os-release /etc/debian_version /root")
    try:
        site.machine.run("sed", "-i", 's/^VERSION_ID=.*/VERSION_ID="11"/; s/ 12 / 11 /; s/bookworm/bullseye/g', "/etc/os-release")
        site.machine.run("sh", "-c", "echo 11.11 >/etc/debian_version")
        site.setup().must_fail("app-1 runs Debian 11; app hosts are set up on Debian 12, Debian 13, Ubuntu 22.04, Ubuntu 24.04")
    finally:
        site.machine.run("sh", "-c", "cat /root/os-release >/etc/os-release; cat /root/debian_version >/etc/debian_version")


def test_no_secret_is_left_where_others_can_read_it(site: StarterSite) -> None:
    seen = site.machine.watch_processes()
    loud = site.setup("-vvv", "--diff", "-e", "app_host_env_update=true")
    processes = seen()
    assert loud.code == 0, loud.output[-3000:]
    key = site.machine.run("cat", "/etc/haproxy/certs/own.pem").splitlines()[1]
    secrets = {**CANARIES, "edge key": key, "registry": site.registry.password, "registry login": site.login}
    for name, secret in secrets.items():
        assert secret not in loud.output, f"{name} is in the output of -vvv"
        assert secret not in processes, f"{name} was on a command line or in an environment that others can read"
        found = site.machine.run("grep", "--recursive", "--files-with-matches", "--fixed-strings", "--no-messages", "--exclude-dir=docker", secret,
                                 "/etc", "/opt", "/var", "/root", "/home", "/tmp", "/run", "/usr/local", check=False).split()  # fmt: skip
        as_nobody = "setpriv --reuid=nobody --clear-groups cat {} >/dev/null 2>&1 && echo yes"
        readable = [path for path in found if site.machine.run("sh", "-c", as_nobody.format(path), check=False)]
        assert readable == [], f"{name} can be read by everybody in {readable}"
        assert secret not in site.machine.run("journalctl", "--no-pager"), f"{name} is in the journal"
    # The planted ones are there at all, or all this would say nothing.
    assert site.machine.run("grep", "-c", CANARIES["env"], "/opt/shop/.env.staging") == "1"


def test_the_first_promotion_serves_over_https(site: StarterSite) -> None:
    site.hand_out_keeper()
    site.promote(site.build("sha-first")).must_succeed()
    assert site.serving() == "sha-first"


def test_a_promotion_under_load_loses_no_request(site: StarterSite) -> None:
    tag = site.build("sha-second")
    with site.load() as load:
        site.promote(tag).must_succeed()
    assert load.lost == [] and load.versions == ["sha-first", "sha-second"] and load.sent > 100
    # Both have their folder: what runs and what a rollback goes to.
    site.machine.run("systemctl", "start", "shop-prune")
    assert "no image is left over" in site.machine.run("journalctl", "--unit", "shop-prune", "--no-pager")


def _reboots(site: StarterSite, hard: bool, tag: str) -> None:
    site.machine.reboot(hard)
    site.await_serving(tag)
    assert list(site.slots().values()) == [site.container_address("web")]


def test_it_serves_again_by_itself_after_a_reboot(site: StarterSite) -> None:
    _reboots(site, False, "sha-second")
    assert "stopped 3 containers" in site.machine.run("journalctl", "--unit", "shop", "--no-pager")


def test_it_serves_again_by_itself_after_a_power_failure_with_other_addresses(site: StarterSite) -> None:
    # As a start may give it; the edge still knows the one before.
    before = site.container_address("web")
    web = site.machine.run("docker", "ps", "--quiet", "--filter", "label=com.docker.compose.service=web")
    site.machine.run("docker", "network", "disconnect", "shop_default", web)
    site.machine.run("docker", "network", "connect", "--ip", "10.201.0.99", "shop_default", web)
    assert before != "10.201.0.99" and list(site.slots().values()) == [before]
    _reboots(site, True, "sha-second")
    assert site.container_address("web") == "10.201.0.99"


def test_after_a_start_of_the_machine_the_edge_leads_nowhere_until_it_is_told(site: StarterSite) -> None:
    site.machine.run("systemctl", "disable", "shop")
    site.machine.reboot(hard=True)
    assert site.machine.unit("haproxy", "ActiveState") == "active" and site.slots() == {}
    site.machine.run("systemctl", "enable", "--now", "shop")
    site.await_serving("sha-second")


def test_a_crash_of_the_edge_and_one_of_the_engine_cost_nothing_but_their_moment(site: StarterSite) -> None:
    slots = site.slots()
    workers = site.machine.run("pidof", "haproxy").split()
    site.machine.run("kill", "-KILL", *workers)
    site.await_serving("sha-second")
    assert site.slots() == slots and not set(workers) & set(site.machine.run("pidof", "haproxy").split())
    engine = site.machine.unit("docker", "MainPID")
    returned = site.machine.unit("shop-return", "ExecMainExitTimestampMonotonic")
    with site.load() as load:
        site.machine.run("kill", "-KILL", engine)
        _until(lambda: site.machine.unit("docker", "ActiveState") == "active" and site.machine.unit("docker", "MainPID") != engine)
        _until(lambda: site.machine.unit("shop-return", "ExecMainExitTimestampMonotonic") not in (returned, "0"))
    assert load.lost == [] and load.sent > 10
    # An engine that takes its containers with it gives them other addresses.
    site.machine.run("sed", "-i", 's/"live-restore": true/"live-restore": false/', "/etc/docker/daemon.json")
    site.machine.run("systemctl", "restart", "docker")
    site.await_serving("sha-second")
    _until(lambda: list(site.slots().values()) == [site.container_address("web")])
    assert site.setup("--tags", "setup").changed == {"app-1": 0}
    site.machine.run("sed", "-i", 's/"live-restore": false/"live-restore": true/', "/etc/docker/daemon.json")
    site.machine.run("systemctl", "reload", "docker")


def test_what_is_stopped_stays_stopped_when_the_engine_restarts(site: StarterSite) -> None:
    site.machine.run("systemctl", "stop", "shop")
    assert site.serving() == "nothing: HTTP Error 503: Service Unavailable"
    site.machine.run("systemctl", "restart", "docker")
    assert site.machine.unit("shop", "ActiveState") == "inactive" and site.container_address("web") == ""
    site.machine.run("systemctl", "start", "shop")
    site.await_serving("sha-second")


@pytest.mark.parametrize("step", ["migrated", "rolling"])
def test_a_reboot_in_the_middle_of_a_release_brings_back_what_served(site: StarterSite, step: str) -> None:
    cut = site.build(f"sha-cut-{step}")
    running = site.begin("promote", "-e", f"tag={cut}")
    try:
        _until(lambda: f'"step": "{step}"' in site.journal(cut) or running.poll() is not None)
        assert running.poll() is None
        site.machine.reboot(hard=True)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait()
    site.await_serving("sha-second")
    site.promote("sha-second", "-e", "delivery_takeover=true").must_succeed()
    assert site.serving() == "sha-second"


# -- TLS at the edge


def test_http_is_sent_to_https_and_http_2_is_spoken(site: StarterSite) -> None:
    with socket.create_connection((site.machine.address, 80), timeout=10) as plain:
        plain.sendall(b"GET /x?y=1 HTTP/1.1\r\nHost: shop.example.com\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: plain.recv(4096), b"")).decode()
    assert answer.startswith("HTTP/1.1 308 ") and "location: https://shop.example.com/x?y=1\r\n" in answer.lower()
    context = site.trust()
    context.set_alpn_protocols(["h2", "http/1.1"])
    with socket.create_connection((site.machine.address, 443), timeout=10) as raw:
        with context.wrap_socket(raw, server_hostname=site.machine.address) as secured:
            assert secured.selected_alpn_protocol() == "h2"
    spoken = subprocess.run(
        ["curl", "--silent", "--cacert", str(site.folder / "edge-ca.crt"), "--http2", "--write-out", " %{http_version}",
         f"https://{site.machine.address}/api/ready"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert spoken.endswith(" 2") and site.serving() in spoken


def test_a_certificate_of_the_vault_is_served_and_renewed_without_a_reload(site: StarterSite) -> None:
    # Of an authority that is nobody's here: the edge's own stays for whom it names.
    given = site.certificate("first.example.com")
    use = ("--tags", "edge", "-e", f"@{given}")
    assert site.setup(*use).changed["app-1"] > 0
    assert site.served_for("first.example.com") == site.serial(given)
    assert site.setup(*use).changed == {"app-1": 0}
    worker = site.worker()
    with site.load() as load:
        renewed = site.certificate("first.example.com")
        assert site.setup("--tags", "edge", "-e", f"@{renewed}").changed == {"app-1": 2}  # the file, and the edge told of it
        assert site.served_for("first.example.com") == site.serial(renewed) != site.serial(given)
    assert load.lost == [] and load.sent > 10 and site.worker() == worker, "it was reloaded"
    # A key of another certificate is refused, and what is served stays.
    wrong = site.certificate("first.example.com", foreign_key=True)
    refused = site.setup("--tags", "edge", "-e", f"@{wrong}")
    refused.must_fail("one of edge_certificate_contents (shop) is not a certificate together with its own key")
    site.machine.run("systemctl", "restart", "haproxy")
    assert site.served_for("first.example.com") == site.serial(renewed), "what was refused is on the disk"
