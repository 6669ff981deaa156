# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Webhooks and e-mail against a real HTTP and a real SMTP server; a messenger never fails a release."""

from __future__ import annotations

import http.server
import json
import socket
import threading
import typing as t

import pytest
from aiosmtpd.controller import Controller
from ansible.module_utils.testing import patch_module_args

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
