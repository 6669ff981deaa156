#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Tells people and machines how a release ended."""

from __future__ import annotations

DOCUMENTATION = r"""
module: notify
short_description: Tell webhooks and mailboxes how a release ended
version_added: 0.1.0
description:
  - Posts one JSON body to each webhook and one e-mail to each address, all side by side.
  - The body has C(text), so Slack, Mattermost, Rocket.Chat and Discord's Slack endpoint take it as it is, and C(release) for machines.
  - A receiver that cannot be reached is a warning. A release never fails because of its messenger.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
attributes:
  check_mode:
    support: full
    details: Nothing is sent in check mode.
  diff_mode:
    support: none
  idempotent:
    support: none
    details: Each run sends its messages.
options:
  text:
    description: The message, one or a few lines.
    type: str
    required: true
  subject:
    description: Subject of the e-mail. Default is the first line of O(text).
    type: str
  release:
    description: Facts of the release for machines, sent beside the text.
    type: dict
    default: {}
  webhooks:
    description: Addresses to post to. They often hold a token, so they are never shown.
    type: list
    elements: str
    default: []
  email:
    description: Where and how to send e-mail. Nothing is sent without C(to).
    type: dict
    default: {}
    suboptions:
      to:
        description: Receivers.
        type: list
        elements: str
        default: []
      from:
        description: Sender.
        type: str
        default: delivery@localhost
      host:
        description: Mail server.
        type: str
        default: localhost
      port:
        description: Its port.
        type: int
        default: 25
      starttls:
        description: Encrypt before anything is sent. The server's certificate must be good for O(email.host). Needed with a login.
        type: bool
        default: false
      ca_path:
        description: File with the certificates of authorities that the server's certificate may be of, instead of the system's.
        type: path
      username:
        description: Login at the mail server.
        type: str
      password:
        description: Password for O(email.username).
        type: str
  timeout:
    description: Seconds for each receiver.
    type: float
    default: 10
"""

EXAMPLES = r"""
- name: Say that a release is out
  selfhost.delivery.notify:
    text: "shop sha-abc runs in production"
    webhooks: "{{ vault_webhooks }}"
"""

RETURN = r"""
sent:
  description: How many receivers took the message.
  returned: always
  type: int
  sample: 2
problems:
  description: One line for each receiver that did not take it.
  returned: always
  type: list
  elements: str
  sample: ["webhook 1: HTTP 500"]
"""

import functools
import json
import smtplib
import ssl
import typing as t
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from email.message import EmailMessage

from ansible.module_utils.basic import AnsibleModule


def post(address: str, body: dict[str, t.Any], timeout: float) -> None:
    """POST ``body`` as JSON; raises ``OSError`` or ``ValueError`` with a reason that does not hold the address."""
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    if request.type not in ("http", "https"):
        raise ValueError("not an http or https address")
    try:
        # An opener of its own: this runs in threads, and Ansible's open_url installs one for the whole process.
        with urllib.request.build_opener().open(request, timeout=timeout):
            return
    except urllib.error.HTTPError as error:
        raise OSError(f"HTTP {error.code}") from None
    except urllib.error.URLError as error:
        raise OSError(f"{error.reason}") from None


def mail(settings: dict[str, t.Any], subject: str, text: str, timeout: float) -> None:
    """Send one message to all receivers; raises ``OSError``, ``ValueError`` or ``smtplib.SMTPException``."""
    if settings["username"] and not settings["starttls"]:
        raise ValueError("a login is sent over an encrypted connection only: set starttls")
    message = EmailMessage()
    message["Subject"], message["From"], message["To"] = subject, settings["from"], ", ".join(settings["to"])
    message.set_content(text)
    with smtplib.SMTP(settings["host"], settings["port"], timeout=timeout) as server:
        if settings["starttls"]:
            # Without a context smtplib takes any certificate, and with it anybody in between.
            server.starttls(context=ssl.create_default_context(cafile=settings["ca_path"]))
        if settings["username"]:
            server.login(settings["username"], settings["password"] or "")
        server.send_message(message)


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            text=dict(type="str", required=True),
            subject=dict(type="str"),
            release=dict(type="dict", default={}),
            webhooks=dict(type="list", elements="str", default=[], no_log=True),
            email=dict(
                type="dict",
                default={},
                options={
                    "to": dict(type="list", elements="str", default=[]),
                    "from": dict(type="str", default="delivery@localhost"),
                    "host": dict(type="str", default="localhost"),
                    "port": dict(type="int", default=25),
                    "starttls": dict(type="bool", default=False),
                    "ca_path": dict(type="path"),
                    "username": dict(type="str"),
                    "password": dict(type="str", no_log=True),
                },
            ),
            timeout=dict(type="float", default=10),
        ),
        supports_check_mode=True,
    )
    options = module.params
    jobs: list[tuple[str, t.Callable[[], None]]] = []
    body = {"text": options["text"], "release": options["release"]}
    for number, address in enumerate(options["webhooks"], 1):
        jobs.append((f"webhook {number}", functools.partial(post, address, body, options["timeout"])))
    if options["email"].get("to"):
        subject = options["subject"] or options["text"].splitlines()[0]
        jobs.append(("e-mail", functools.partial(mail, options["email"], subject, options["text"], options["timeout"])))
    if module.check_mode or not jobs:
        module.exit_json(changed=False, sent=0, problems=[])

    problems = []
    with ThreadPoolExecutor(max_workers=len(jobs)) as pool:
        for name, future in [(name, pool.submit(work)) for name, work in jobs]:
            try:
                future.result()
            except (OSError, ValueError, smtplib.SMTPException) as error:
                problems.append(f"{name}: {error}")
    for problem in problems:
        module.warn(f"not notified: {problem}")
    module.exit_json(changed=len(problems) < len(jobs), sent=len(jobs) - len(problems), problems=problems)


if __name__ == "__main__":
    main()
