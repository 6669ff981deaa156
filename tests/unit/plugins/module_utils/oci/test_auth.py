# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Challenges, tokens and the Docker config file."""

from __future__ import annotations

import base64
import json
import typing as t
from pathlib import Path

import pytest

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci import auth
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.auth import (
    Authenticator,
    Challenge,
    Credentials,
    config_path,
    find_credentials,
    merge_scopes,
    parse_challenges,
)
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions

PULL, PUSH = "repository:a:pull", "repository:a:pull,push"


@pytest.mark.parametrize(
    "headers, expected",
    [
        (['Basic realm="r"'], [("basic", {"realm": "r"})]),
        (
            ['Bearer realm="https://t.example/token",service="s",scope="repository:a:pull,push repository:b:pull"'],
            [("bearer", {"realm": "https://t.example/token", "service": "s", "scope": "repository:a:pull,push repository:b:pull"})],
        ),
        (['Bearer realm="https://t/?a=b,c" , service=s'], [("bearer", {"realm": "https://t/?a=b,c", "service": "s"})]),
        (['Basic realm="a", Bearer realm="b"'], [("basic", {"realm": "a"}), ("bearer", {"realm": "b"})]),
        (['Basic realm="a"', 'Bearer realm="b"'], [("basic", {"realm": "a"}), ("bearer", {"realm": "b"})]),
        (['BASIC Realm="quo\\"ted"'], [("basic", {"realm": 'quo"ted'})]),
        (["Negotiate, Basic realm=x"], [("negotiate", {}), ("basic", {"realm": "x"})]),
        (["Basic"], [("basic", {})]),
        (['realm="no scheme"'], []),
        ([""], []),
        (['Bearer realm="never closed'], [("bearer", {})]),
    ],
)
def test_challenges(headers: list[str], expected: list[tuple[str, dict[str, str]]]) -> None:
    found = [(challenge.scheme, dict(challenge.parameters)) for challenge in parse_challenges(headers)]
    if "never closed" in headers[0]:
        # Anything but an exception or an endless loop will do.
        assert found[0][0] == "bearer"
    else:
        assert found == expected


def test_scopes_of_one_resource_are_one() -> None:
    assert merge_scopes(PULL, PUSH, "repository:b:pull") == (PUSH, "repository:b:pull")
    assert merge_scopes("registry:catalog:*", PULL) == ("registry:catalog:*", PULL)
    assert merge_scopes() == () and merge_scopes("nonsense") == ()
    assert merge_scopes("repository:h:5000/a:push,pull") == ("repository:h:5000/a:pull,push",)


class TokenServer:
    def __init__(self, status: int = 200, lifetime: float = 300) -> None:
        self.status, self.lifetime = status, lifetime
        self.asked: list[tuple[str, str, dict[str, str], bytes | None]] = []

    def __call__(self, method: str, url: str, headers: dict[str, str], body: bytes | None) -> tuple[int, bytes]:
        self.asked.append((method, url, headers, body))
        return self.status, json.dumps({"token": f"token{len(self.asked)}", "expires_in": self.lifetime}).encode()


BEARER = [Challenge("bearer", {"realm": "https://t.example/token?x=1", "service": "s", "scope": PULL})]
LOGIN = Credentials("u", "p")


def made(server: TokenServer, credentials: Credentials = LOGIN, plain: bool = False) -> Authenticator:
    return Authenticator("r.example", lambda: credentials, server, plain)


def test_nothing_is_sent_before_the_registry_asks() -> None:
    server = TokenServer()
    assert made(server).header([PULL]) is None and server.asked == []


def test_one_token_for_each_set_of_scopes() -> None:
    server = TokenServer()
    session = made(server)
    assert session.answer(BEARER, [PULL], None) == "Bearer token1"
    method, url, headers, body = server.asked[0]
    assert (method, body) == ("GET", None) and headers == {"Authorization": LOGIN.basic}
    assert url == "https://t.example/token?x=1&service=s&scope=repository%3Aa%3Apull&account=u"
    assert session.header([PULL]) == "Bearer token1" and len(server.asked) == 1
    assert session.header([PUSH, "repository:b:pull"]) == "Bearer token2"
    assert "scope=repository%3Aa%3Apull%2Cpush&scope=repository%3Ab%3Apull" in server.asked[1][1]


def test_a_token_near_its_end_is_renewed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(auth.time, "monotonic", lambda: now[0])
    session = made(TokenServer(lifetime=60))
    session.answer(BEARER, [PULL], None)
    now[0] += 54
    assert session.header([PULL]) == "Bearer token1"
    now[0] += 2
    assert session.header([PULL]) == "Bearer token2"


def test_a_refused_token_is_renewed_once_and_a_refused_password_is_not_tried_again() -> None:
    session = made(TokenServer())
    first = session.answer(BEARER, [PULL], None)
    assert session.answer(BEARER, [PULL], first) == "Bearer token2"
    basic = made(TokenServer())
    assert basic.answer([Challenge("basic", {})], [PULL], None) == LOGIN.basic == basic.header([PULL])
    assert basic.answer([Challenge("basic", {})], [PULL], LOGIN.basic) is None
    assert made(TokenServer(), Credentials()).answer([Challenge("basic", {})], [PULL], None) is None


def test_anonymous_tokens_and_fixed_ones() -> None:
    server = TokenServer()
    assert made(server, Credentials()).answer(BEARER, [PULL], None) == "Bearer token1"
    assert server.asked[0][2] == {} and "account" not in server.asked[0][1]
    fixed = made(TokenServer(), Credentials(token="mine"))
    assert fixed.answer(BEARER, [PULL], None) == "Bearer mine" and fixed.answer(BEARER, [PULL], "Bearer mine") is None


def test_an_identity_token_goes_in_the_body_and_not_in_the_address() -> None:
    server = TokenServer()
    made(server, Credentials(identity="long lived")).answer(BEARER, [PULL], None)
    method, url, _headers, body = server.asked[0]
    assert method == "POST" and "long" not in url and body is not None
    assert b"grant_type=refresh_token" in body and b"refresh_token=long+lived" in body and b"scope=repository%3Aa%3Apull" in body


@pytest.mark.parametrize(
    "status, failure_class, words", [(401, "config", "refused the user 'u'"), (403, "config", "'u'"), (404, "transport", "404")]
)
def test_a_token_server_that_refuses(status: int, failure_class: str, words: str) -> None:
    with pytest.raises(DeliveryError, match=words) as caught:
        made(TokenServer(status)).answer(BEARER, [PULL], None)
    assert caught.value.failure_class == failure_class


def test_credentials_go_to_a_plain_token_server_only_when_asked_for() -> None:
    plain = [Challenge("bearer", {"realm": "http://t.example/token"})]
    with pytest.raises(DeliveryError, match="not reached over https"):
        made(TokenServer()).answer(plain, [PULL], None)
    assert made(TokenServer(), plain=True).answer(plain, [PULL], None) == "Bearer token1"


# -- the Docker config file ----------------------------------------------------------------------------------------


def login(text: str) -> str:
    return base64.b64encode(text.encode()).decode()


@pytest.mark.parametrize(
    "registry, auths, expected",
    [
        ("r.example", {"r.example": {"auth": login("u:p")}}, ("u", "p")),
        ("r.example", {"https://r.example/v1/": {"auth": login("u:p")}}, ("u", "p")),
        ("r.example:5000", {"r.example": {"auth": login("u:p")}}, ("", "")),
        ("r.example", {"r.example": {"auth": login("u:p:with:colons")}}, ("u", "p:with:colons")),
        ("r.example", {"r.example": {"username": "u", "password": "p"}}, ("u", "p")),
        ("docker.io", {"https://index.docker.io/v1/": {"auth": login("u:p")}}, ("u", "p")),
        ("other.example", {"r.example": {"auth": login("u:p")}}, ("", "")),
        ("r.example", {"https://r.example": {"auth": login("old:p")}, "r.example": {"auth": login("u:p")}}, ("u", "p")),
    ],
)
def test_auths(tmp_path: Path, registry: str, auths: dict[str, t.Any], expected: tuple[str, str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    found = find_credentials(registry, ClientOptions(docker_config=str(tmp_path)))
    assert (found.username, found.password) == expected and bool(found) == bool(expected[0])


@pytest.mark.parametrize(
    "content, words",
    [
        ("{", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"auths": {"r.example": {"auth": "!"}}}', "cannot be decoded"),
        (None, "does not exist"),
    ],
)
def test_config_files_that_are_refused(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "config.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DeliveryError, match=words) as caught:
        find_credentials("r.example", ClientOptions(docker_config=str(path)))
    assert str(path) in caught.value.message


def test_options_win_and_a_missing_default_file_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    assert config_path(None) == str(tmp_path / "config.json")
    assert not find_credentials("r.example", ClientOptions())
    (tmp_path / "config.json").write_text("{")
    assert find_credentials("r.example", ClientOptions("u", "p")) == Credentials("u", "p")
    assert find_credentials("r.example", ClientOptions(token="t")) == Credentials(token="t")


def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, config: dict[str, t.Any]) -> ClientOptions:
    program = tmp_path / "docker-credential-test"
    program.write_text(f"#!/bin/sh\nread -r server\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    return ClientOptions(docker_config=str(tmp_path))


def test_a_helper_is_asked_on_its_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = """[ "$1" = get ] && printf '{"Username": "%s", "Secret": "s"}' "$server" """
    options = helper(tmp_path, monkeypatch, script, {"credHelpers": {"r.example": "test"}})
    assert find_credentials("r.example", options) == Credentials("r.example", "s")
    assert not find_credentials("other.example", options)
    options = helper(tmp_path, monkeypatch, script, {"credsStore": "test"})
    assert find_credentials("docker.io", options).username == "https://index.docker.io/v1/"
    options = helper(tmp_path, monkeypatch, """echo '{"Username": "<token>", "Secret": "s"}'""", {"credsStore": "test"})
    assert find_credentials("r.example", options) == Credentials(identity="s")


def test_a_helper_that_knows_nothing_or_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = {"credsStore": "test", "auths": {"r.example": {"auth": login("u:p")}}}
    options = helper(tmp_path, monkeypatch, "echo 'credentials not found in native keychain'; exit 1", config)
    assert find_credentials("r.example", options) == Credentials("u", "p")
    options = helper(tmp_path, monkeypatch, "echo 'my secret is s3cret' >&2; exit 7", config)
    with pytest.raises(DeliveryError, match="exit code 7") as caught:
        find_credentials("r.example", options)
    assert "s3cret" not in caught.value.message
    options = helper(tmp_path, monkeypatch, "", {"credsStore": "../evil"})
    with pytest.raises(DeliveryError, match="not given by path"):
        find_credentials("r.example", options)
