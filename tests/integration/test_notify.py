# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Webhooks and e-mail against a real HTTP and a real SMTP server; a messenger never fails a release."""

from __future__ import annotations

import http.server
import json
import socket
import ssl
import threading
import typing as t
from pathlib import Path

import pytest
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import AuthResult, LoginPassword
from ansible.module_utils.testing import patch_module_args
from registry_fixture import make_certificate

from ansible_collections.selfhost.delivery.plugins.modules import notify


class Hook(http.server.BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        self.server.got.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))  # type: ignore[attr-defined]
        self.send_response(204 if self.path == "/ok" else 500)
        self.end_headers()

    def log_message(self, format: str, *args: t.Any) -> None:
        pass


@pytest.fixture()
def hook() -> t.Iterator[t.Any]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hook)
    server.got = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


class Mailbox:
    def __init__(self) -> None:
        self.mails: list[t.Any] = []

    async def handle_DATA(self, server: t.Any, session: t.Any, envelope: t.Any) -> str:
        self.mails.append(envelope)
        return "250 OK"


def run(capsys: pytest.CaptureFixture[str], **arguments: t.Any) -> dict[str, t.Any]:
    with patch_module_args(arguments), pytest.raises(SystemExit):
        notify.main()
    return json.loads(capsys.readouterr().out)


def test_everybody_gets_it_and_a_broken_receiver_is_a_warning(hook: t.Any, capsys: pytest.CaptureFixture[str]) -> None:
    base = f"http://127.0.0.1:{hook.server_address[1]}"
    mailbox = Mailbox()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mail = Controller(mailbox, hostname="127.0.0.1", port=port)
    mail.start()
    try:
        result = run(
            capsys,
            text="shop sha-abc runs in production\nsecond line",
            release={"tag": "sha-abc"},
            webhooks=[f"{base}/ok", f"{base}/broken?token=secret-token"],
            email={"to": ["ops@example.com"], "from": "delivery@example.com", "host": "127.0.0.1", "port": port},
        )
    finally:
        mail.stop()
    assert hook.got[0] == {"text": "shop sha-abc runs in production\nsecond line", "release": {"tag": "sha-abc"}}
    assert b"Subject: shop sha-abc runs in production\r\n" in mailbox.mails[0].content
    assert mailbox.mails[0].rcpt_tos == ["ops@example.com"]
    assert result["sent"] == 2 and result["problems"] == ["webhook 2: HTTP 500"]
    assert not result.get("failed") and "secret-token" not in json.dumps(result)


def test_check_mode_sends_nothing(hook: t.Any, capsys: pytest.CaptureFixture[str]) -> None:
    result = run(capsys, text="x", webhooks=[f"http://127.0.0.1:{hook.server_address[1]}/ok"], _ansible_check_mode=True)
    assert hook.got == [] and result["sent"] == 0


def test_mail_goes_over_tls_with_a_login_and_never_to_who_cannot_prove_to_be_the_server(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_certificate(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.pem", tmp_path / "server.key")
    mailbox, tried = Mailbox(), []

    def authenticate(_server: t.Any, session: t.Any, _envelope: t.Any, _mechanism: str, login: LoginPassword) -> AuthResult:
        tried.append((session.ssl is not None, login.login, login.password))
        return AuthResult(success=login.password == b"mail-Secret-5", handled=False)

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = Controller(
        mailbox, hostname="127.0.0.1", port=port, tls_context=context, require_starttls=True, authenticator=authenticate, auth_required=True
    )
    server.start()
    login = {"to": ["ops@example.com"], "host": "127.0.0.1", "port": port, "starttls": True, "username": "ci", "password": "mail-Secret-5"}
    try:
        trusted = {**login, "ca_path": str(tmp_path / "ca.pem")}
        assert run(capsys, text="out", email=trusted)["sent"] == 1
        assert tried == [(True, b"ci", b"mail-Secret-5")] and len(mailbox.mails) == 1
        tried.clear()
        wrong = run(capsys, text="out", email={**trusted, "password": "another-Word-6"})
        assert wrong["sent"] == 0 and "535" in wrong["problems"][0] and "another-Word-6" not in json.dumps(wrong["problems"])
        tried.clear()
        stranger = run(capsys, text="out", email=login)
        assert stranger["sent"] == 0 and "CERTIFICATE_VERIFY_FAILED" in stranger["problems"][0]
        clear = run(capsys, text="out", email={**trusted, "starttls": False})
        assert clear["problems"] == ["e-mail: a login is sent over an encrypted connection only: set starttls"]
        assert tried == [] and len(mailbox.mails) == 1
    finally:
        server.stop()
