# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What HAProxy says and what is understood; how it behaves is in tests/integration/test_edge.py."""

from __future__ import annotations

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges import edge_from
from ansible_collections.selfhost.delivery.plugins.module_utils.rollout.edges.haproxy import (
    HAProxyEdge,
    merge,
    parse_servers_state,
    parse_stat,
)

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
        ({"type": "nginx"}, "edge.type"),
        ({}, "edge.type"),
        ({"type": "haproxy"}, "edge.socket: missing"),
        ({"type": "haproxy", "socket": "relative/path"}, "neither an absolute path nor host:port"),
        ({"type": "haproxy", "socket": "/x", "sokcet": "/y"}, "edge.sokcet: unknown key"),
    ],
)
def test_wrong_options_are_refused_by_name(options, message):
    with pytest.raises(DeliveryError, match=message) as error:
        edge_from(options)
    assert error.value.failure_class == "config"


def test_no_edge_promises_nothing():
    edge = edge_from({"type": "none"})
    assert edge.upstreams("shop-web") == []
    assert edge.drain("shop-web", "127.0.0.1", 80, 1).sessions_cut == 0
    assert edge.hold("shop", "off") == 0
    with pytest.raises(DeliveryError, match="no edge"):
        edge.hold("shop", "writes")
