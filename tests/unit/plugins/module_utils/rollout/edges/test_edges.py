# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What edges say and what is understood; how they behave is in tests/integration, test_edge.py and test_edges.py."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import HOLDING, OPTIONS, edge_from, local, nginx, traefik
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.haproxy import (
    HAProxyEdge,
    merge,
    parse_servers_state,
    parse_stat,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.nginx import Server

# Recorded from HAProxy 2.6.12, `show stat` cut to the columns that are read.
STATE_HEAD = (
    "1\n# be_id be_name srv_id srv_name srv_addr srv_op_state srv_admin_state srv_uweight srv_iweight srv_time_since_last_change srv_check_status"
    " srv_check_result srv_check_health srv_check_state srv_agent_state bk_f_forced_id srv_f_forced_id srv_fqdn srv_port srvrecord srv_use_ssl"
    " srv_check_port srv_check_addr srv_agent_addr srv_agent_port\n"
)
STAT_HEAD = "# pxname,svname,scur,status,weight,check_status,check_code,last_chk,check_desc,check_rise,check_fall,check_health\n"
EMPTY = ("4 shop-web 1 s1 127.0.0.1 0 5 1 1 1 1 0 0 14 0 0 0 empty.invalid 1 - 0 0 - - 0", "shop-web,s1,0,MAINT,1,,,,,,,")
NEW = (
    "4 shop-web 1 s1 127.0.0.2 2 12 1 1 0 1 0 1 6 0 0 0 - 28900 - 0 0 - - 0",
    "shop-web,s1,0,DRAIN 1/3,1,L7OK,200,,Layer7 check passed,1,3,1",
)
PROVEN = (
    "4 shop-web 1 s1 127.0.0.2 2 12 1 1 0 15 3 3 6 0 0 0 - 28900 - 0 0 - - 0",
    "shop-web,s1,0,DRAIN,1,L7OK,200,,Layer7 check passed,1,3,3",
)
UP = ("4 shop-web 1 s1 127.0.0.2 2 4 1 1 0 15 3 3 6 0 0 0 - 28900 - 0 0 - - 0", "shop-web,s1,7,UP,1,L7OK,200,,Layer7 check passed,1,3,3")
DOWN = (
    "4 shop-web 1 s1 127.0.0.2 0 12 1 1 0 8 2 0 6 0 0 0 - 28999 - 0 0 - - 0",
    "shop-web,s1,0,DOWN,1,L4CON,,Connection refused,Layer4 connection problem,1,3,0",
)
UNCHECKED = ("4 shop-web 1 s1 ::1 2 4 1 1 0 1 0 0 0 0 0 0 - 80 - 0 0 - - 0", "shop-web,s1,0,no check,1,,,,,,,")


def slot(lines):
    (state,) = parse_servers_state(STATE_HEAD + lines[0])
    return merge(state, parse_stat(STAT_HEAD + lines[1])["s1"])


@pytest.mark.parametrize(
    ("lines", "state", "running", "filled", "weight"),
    [
        (EMPTY, "maint", False, False, 0),
        (NEW, "drain", True, True, 0),
        (UP, "ready", True, True, 1),
        (DOWN, "drain", False, True, 0),
        (UNCHECKED, "ready", True, True, 1),
    ],
)
def test_states(lines, state, running, filled, weight):
    one = slot(lines)
    assert (one.state, one.running, one.filled, one.weight) == (state, running, filled, weight)


def test_up_is_not_proven_before_a_check_succeeded():
    assert not slot(NEW).proven
    assert slot(PROVEN).proven
    assert not slot(DOWN).proven
    assert slot(UNCHECKED).proven


def test_only_a_failed_check_is_told_as_the_reason():
    assert slot(NEW).failure == ""
    assert slot(DOWN).failure == "L4CON Layer4 connection problem Connection refused"


def test_sessions_and_addresses():
    assert slot(UP).sessions == 7
    assert slot(UNCHECKED).is_at("::1", 80)


def test_an_unknown_form_is_refused():
    with pytest.raises(DeliveryError, match="unknown form"):
        parse_servers_state("1\n# something else\n")


class Recorded:
    """A socket that answers from a list and keeps what it was asked."""

    target = "127.0.0.1:1"

    def __init__(self, *answers):
        self.answers = list(answers)
        self.asked = []

    def ask(self, command):
        self.asked.append(command)
        return self.answers.pop(0)


@pytest.mark.parametrize("answer", ["No such server.", "No such backend.", "Require 'backend/server'."])
def test_an_error_in_the_answer_is_an_error(answer):
    edge = HAProxyEdge("127.0.0.1:1")
    edge.socket = Recorded(answer)
    with pytest.raises(DeliveryError, match=answer) as error:
        edge._set("shop-web", "s1", "state drain")
    assert error.value.failure_class == "cutover"


def test_an_address_that_was_taken_is_no_error():
    edge = HAProxyEdge("127.0.0.1:1")
    edge.socket = Recorded("no need to change the addr, port changed from '1' to '2' by 'stats socket command'")
    edge._set("shop-web", "s1", "addr 127.0.0.1 port 2")
    assert edge.socket.asked == ["set server shop-web/s1 addr 127.0.0.1 port 2"]


@pytest.mark.parametrize("name", ["", "a b", "a;show info", "a\nshow info", "-x"])
def test_no_name_reaches_the_socket_as_a_command(name):
    edge = HAProxyEdge("/x")
    edge.socket = Recorded()
    with pytest.raises(DeliveryError):
        edge.upstreams(name)
    with pytest.raises(DeliveryError):
        edge.hold(name, "all")
    assert edge.socket.asked == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"type": "caddy"}, "edge.type: 'caddy' .* Use haproxy, nginx, traefik or none"),
        ({}, "edge.type"),
        ({"type": "haproxy"}, "edge.socket: missing"),
        ({"type": "haproxy", "socket": "relative/path"}, "neither an absolute path nor host:port"),
        ({"type": "haproxy", "socket": "/x", "sokcet": "/y"}, "edge.sokcet: unknown key"),
        ({"type": "haproxy", "socket": "/x", "directory": "/y"}, "edge.directory: unknown key"),
        ({"type": "nginx", "socket": "/x"}, "edge.socket: unknown key for an edge of type nginx"),
        ({"type": "nginx", "directory": "relative"}, "edge.directory: 'relative' is no absolute path"),
        ({"type": "nginx", "pid_file": "nginx.pid"}, "edge.pid_file"),
        ({"type": "nginx", "confirm": "8399"}, "edge.confirm: '8399' is not address:port"),
        ({"type": "nginx", "confirm": "localhost:8399"}, "'localhost' is not an IP address"),
        ({"type": "nginx", "program": 1}, "edge.program: 1 is no text"),
        ({"type": "traefik", "directory": "relative"}, "edge.directory"),
        ({"type": "traefik", "api": "127.0.0.1:8080"}, "edge.api: '127.0.0.1:8080' is no http address"),
        ({"type": "traefik", "confirm": "127.0.0.1:1"}, "edge.confirm: unknown key for an edge of type traefik"),
        ({"type": "none", "socket": "/x"}, "edge.socket: unknown key"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(DeliveryError, match=message) as error:
        edge_from(options)
    assert error.value.failure_class == "config"


def test_what_is_not_given_is_left_to_the_edge():
    # As a module hands it over: every key there is, most of them without a value.
    options = {"socket": None, "hold_map": None, "directory": None, "pid_file": None, "program": None, "config": None, "confirm": None, "api": None}
    assert edge_from({**options, "type": "nginx", "pid_file": ""}).pid_file == "/run/nginx.pid"
    assert edge_from({**options, "type": "traefik"}).api == "http://127.0.0.1:8080"


@pytest.mark.parametrize("kind", sorted(set(OPTIONS) - set(HOLDING)))
def test_an_edge_that_cannot_hold_says_so(kind):
    edge = edge_from({"type": kind})
    assert edge.hold("shop", "off") == 0
    for what in ("writes", "all"):
        with pytest.raises(DeliveryError, match="wait.*HAProxy") as error:
            edge.hold("shop", what)
        assert error.value.failure_class == "config"
    with pytest.raises(DeliveryError, match="not one of"):
        edge.hold("shop", "some")


@pytest.mark.parametrize("name", ["", "../shop", "a b", "a/b", "a;b"])
@pytest.mark.parametrize("kind", ["nginx", "traefik"])
def test_no_name_becomes_another_path(kind, name, tmp_path):
    with pytest.raises(DeliveryError, match="not a backend name"):
        edge_from({"type": kind, "directory": str(tmp_path)})._path(name)


@pytest.mark.parametrize(
    ("text", "servers", "generation"),
    [
        ("upstream shop-web { server 127.0.0.1:1 down; }", [], 0),
        ("upstream shop-web{server 10.0.0.2:8080;}", [Server("10.0.0.2", 8080)], 0),
        (
            "# upstream other { server 10.0.0.9:1; }\n# generation 17\n"
            "upstream  shop-web {\n  server 10.0.0.2:80 down;\n  server [FD00::2]:80; # new\n keepalive 0;}",
            [Server("10.0.0.2", 80, down=True), Server("fd00::2", 80)],
            17,
        ),
    ],
)
def test_an_include_file_is_read(text, servers, generation):
    assert nginx.parse("/x", text, "shop-web") == nginx.Block(tuple(servers), generation)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no `upstream shop-web`"),
        ("upstream shop { server 10.0.0.2:80; }", "no `upstream shop-web`"),
        ("upstream shop-web { least_conn; server 10.0.0.2:80; }", "`least_conn;` would be lost"),
        ("upstream shop-web { server 10.0.0.2:80 weight=3; }", "weight=3;` would be lost"),
        ("upstream shop-web { server web:80; }", "'web' is not an IP address"),
    ],
)
def test_an_include_file_that_says_more_is_refused(text, message):
    with pytest.raises(DeliveryError, match=message):
        nginx.parse("/x", text, "shop-web")


@pytest.mark.parametrize(("version", "line"), [("1.22.1", False), ("1.29.6", False), ("1.29.7", True), ("1.30.0", True), ("2.0.0", True)])
def test_what_is_written_is_read_again(version, line, tmp_path):
    program = tmp_path / "nginx"
    program.write_text(f"#!/bin/sh\necho 'nginx version: nginx/{version} (Debian)' >&2\n")
    program.chmod(0o755)
    edge = edge_from({"type": "nginx", "directory": str(tmp_path), "program": str(program)})
    for servers in ((), (Server("10.0.0.2", 80, down=True), Server("fd00::2", 8080))):
        block = nginx.Block(servers, 1732200000000000000)
        text = edge._render("shop-web", block)
        assert nginx.parse("/x", text, "shop-web") == block
        assert ("keepalive 0;" in text) is line


#: Recorded from /proc/net/tcp and tcp6 on a machine that stores the low byte first.
TCP = """  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:20CF 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 11 1 0000000000000000 100 0 0 10 0
   1: 0100007F:9C40 0200007F:1F90 01 00000000:00000000 00:00000000 00000000    33        0 12 1 0000000000000000 20 4 30 10 -1
   2: 0200007F:1F90 0100007F:9C40 01 00000000:00000000 00:00000000 00000000     0        0 13 1 0000000000000000 20 4 30 10 -1
   3: 0100007F:9C42 0200007F:1F91 01 00000000:00000000 00:00000000 00000000    33        0 14 1 0000000000000000 20 4 30 10 -1
"""
TCP6 = """  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 000080FE000000000000000001000000:9C40 0000000000000000FFFF00000200007F:1F90 01 00000000:00000000 00:00000000 00000000    33        0 15 1 0 20 4 30 10 -1
   1: 00000000000000000000000001000000:9C40 00000000000000000000000001000000:1F90 01 00000000:00000000 00:00000000 00000000    33        0 16 1 0 20 4 30 10 -1
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="RECORDED ON ANOTHER MACHINE: the kernel writes addresses in the byte order of the machine")
@pytest.mark.parametrize(
    ("address", "sockets"),
    [("127.0.0.2", ["socket:[12]", "socket:[15]"]), ("::1", ["socket:[16]"]), ("127.0.0.1", []), ("fd00::2", [])],
)
def test_connections_are_known_by_their_peer(address, sockets):
    peers = local.peer_names(address, 8080)
    assert [*local.inodes_to(TCP, peers), *local.inodes_to(TCP6, peers)] == sockets


def test_only_connections_of_the_asked_processes_count():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        address, port = server.getsockname()
        assert local.connections([os.getpid()], address, port) == 1
        assert local.connections([os.getpid(), 2**22 + 1], address, port + 1) == 0
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        try:
            assert child.pid in local.children(os.getpid())
            assert local.connections([child.pid], address, port) == 0
        finally:
            child.communicate(b"\n")
    assert child.pid not in local.children(os.getpid())


def test_a_server_of_traefik_is_read_from_its_file_and_from_its_api():
    told = {
        "loadBalancer": {"servers": [{"url": "http://10.0.0.2:80", "weight": 0}, {"url": "http://[fd00::2]:8080"}]},
        "serverStatus": {"http://10.0.0.2:80": "UP", "http://[fd00::2]:8080": "DOWN"},
    }
    old, new = traefik.servers_of(told)
    assert (old.address, old.port, old.weight, old.up) == ("10.0.0.2", 80, 0, True)
    assert (new.address, new.port, new.weight, new.up) == ("fd00::2", 8080, 1, False)
    assert new.url == "http://[fd00::2]:8080"
    assert traefik.servers_of({"loadBalancer": {"servers": []}}) == ()


def test_a_file_of_somebody_else_is_not_overwritten(tmp_path):
    (tmp_path / "shop-web.yml").write_text("http:\n  services: {}\n")
    with pytest.raises(DeliveryError, match="not what this collection has written"):
        edge_from({"type": "traefik", "directory": str(tmp_path)})._read("shop-web")


def test_no_edge_promises_nothing():
    edge = edge_from({"type": "none"})
    assert edge.upstreams("shop-web") == []
    assert edge.drain("shop-web", "127.0.0.1", 80, 1).sessions_cut == 0
    with pytest.raises(DeliveryError, match="no edge"):
        edge.hold("shop", "writes")
