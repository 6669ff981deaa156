#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Waits until everything asked about is ready at the same time."""

from __future__ import annotations

DOCUMENTATION = r"""
module: ready_wait
short_description: Wait until services answer as ready
version_added: 0.1.0
description:
  - Asks all checks side by side until all are ready at the same time. The pause between two tries is a twentieth of the time waited,
    from 20 ms to 250 ms, so that what gets ready after two seconds is seen 0.1 s later at most.
  - A try that takes long is followed by a pause as long, up to 250 ms. A hundred checks side by side keep to half a
    processor core.
  - Ends at once when a container has exited, restarts again and again or was removed, and shows its last log lines.
  - Fails with the number of ready checks and with what each of the others last answered.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.delivery_group
attributes:
  check_mode:
    support: full
    details: Nothing is asked and nothing is waited for in check mode, and the result says so.
  diff_mode:
    support: none
    details: Nothing is ever changed.
  idempotent:
    support: full
options:
  checks:
    description: What must be ready. Each check has exactly one probe.
    type: list
    elements: dict
    required: true
    suboptions:
      name:
        description: Name of the check in results and messages. Default is what is asked. Names are unique.
        type: str
      stable:
        description: Consecutive successes of this check. Default is O(stable).
        type: int
      timeout:
        description: Seconds until this check must be ready. Default, and upper limit, is O(timeout).
        type: float
      watch:
        description: Name or id of a container behind the probe. When it exits or loops, the wait ends.
        type: str
      http:
        description: An HTTP or HTTPS request. Proxies of the environment are not used.
        type: dict
        suboptions:
          url:
            description: Address. A login in it is used and never shown.
            type: str
            required: true
          status:
            description: Statuses that are a success. Default is 200 to 299.
            type: list
            elements: int
          headers:
            description: Headers to send. Shown with C(-vvv), so secrets belong into O(checks[].http.bearer_token).
            type: dict
          bearer_token:
            description: Sent as C(Authorization).
            type: str
          query:
            description:
              - JMESPath over the JSON body that must be true.
              - Needs the Python library C(jmespath) on the host that asks.
            type: str
          method:
            description: Method of the request.
            type: str
            default: GET
          validate_certs:
            description: Whether the certificate must be trusted.
            type: bool
            default: true
          ca_path:
            description: File with the certificates to trust instead of the system's.
            type: path
          server_name:
            description: Name to ask for in TLS, and to look for in the certificate. Default is the host of O(checks[].http.url).
            type: str
          follow_redirects:
            description: Whether to follow up to 5 redirects. Logins and headers are not sent to another host.
            type: bool
            default: false
          connect_to:
            description:
              - C(host:port) to connect to instead of what the URL names, as the edge of one of several hosts. The URL's host is still the
                C(Host) header and the name that the certificate must have.
            type: str
          unix_socket:
            description: Unix socket to ask through; the host in the URL is then only the C(Host) header.
            type: path
          timeout:
            description: Seconds for one try. A quarter of it may pass before the connection is there.
            type: float
            default: 5
      tcp:
        description: A connection that is accepted, over TCP or to a Unix socket.
        type: dict
        suboptions:
          host:
            description: Name or address. Either it and O(checks[].tcp.port) are required, or O(checks[].tcp.unix_socket).
            type: str
          port:
            description: Port.
            type: int
          unix_socket:
            description: Unix socket.
            type: path
          timeout:
            description: Seconds for one try. A quarter of it may pass before the connection is there.
            type: float
            default: 5
      grpc:
        description:
          - A gRPC server whose health service (C(grpc.health.v1.Health)) answers V(SERVING).
          - Nothing but Python is needed on the host that asks.
        type: dict
        suboptions:
          host:
            description: Name or address. Either it and O(checks[].grpc.port) are required, or O(checks[].grpc.unix_socket).
            type: str
          port:
            description: Port.
            type: int
          unix_socket:
            description: Unix socket.
            type: path
          service:
            description: Name of the service to ask about, as the server registered it. Default is the server as a whole.
            type: str
          tls:
            description: Whether to speak TLS.
            type: bool
            default: false
          validate_certs:
            description: Whether the certificate must be trusted.
            type: bool
            default: true
          ca_path:
            description: File with the certificates to trust instead of the system's.
            type: path
          server_name:
            description: Name to ask for, and to look for in the certificate. Default is O(checks[].grpc.host).
            type: str
          timeout:
            description: Seconds for one try. A quarter of it may pass before the connection is there.
            type: float
            default: 5
      container:
        description: A container of the Docker engine on the host that asks.
        type: dict
        suboptions:
          name:
            description: Name or id.
            type: str
            required: true
            aliases: [id]
          state:
            description: V(healthy) needs a health check, V(running) does not look at it, V(auto) uses it where there is one.
            type: str
            choices: [auto, healthy, running]
            default: auto
      service:
        description: All containers of a Compose service, at least one. Stopped ones beside living ones are of an older release.
        type: dict
        suboptions:
          project:
            description: Compose project.
            type: str
            required: true
          service:
            description: Compose service.
            type: str
            required: true
          state:
            description: As in O(checks[].container.state).
            type: str
            choices: [auto, healthy, running]
            default: auto
      log:
        description:
          - A line in the log of a container that matches. Only lines of its present run count, those from before its last start do not.
          - It stays ready until the container is started again. A line that was rotated away cannot be found.
        type: dict
        suboptions:
          container:
            description: Name or id.
            type: str
            required: true
          pattern:
            description: Python regular expression that is searched for in each line, in its first 4 KiB.
            type: str
            required: true
      systemd:
        description: A unit that is active. One that failed or is being restarted ends the wait, with its last log lines.
        type: dict
        suboptions:
          unit:
            description: Name of the unit.
            type: str
            required: true
      command:
        description: A command that ends with code 0.
        type: dict
        suboptions:
          argv:
            description: Program and arguments; no shell.
            type: list
            elements: str
            required: true
          container:
            description: Name or id of the container to run it in. Default is the host that asks.
            type: str
          timeout:
            description: Seconds for one try.
            type: float
            default: 5
  timeout:
    description: Seconds until all checks must be ready.
    type: float
    default: 60
  stable:
    description: Consecutive successes that make a check ready. Such tries are 200 ms apart.
    type: int
    default: 1
  fail_fast:
    description: Whether the wait ends as soon as a container or unit cannot become ready any more.
    type: bool
    default: true
  docker_socket:
    description: Socket of the Docker engine.
    type: path
    default: /var/run/docker.sock
"""

EXAMPLES = r"""
- name: Wait until the shop answers with the new version
  selfhost.delivery.ready_wait:
    timeout: 30
    checks:
      - name: public route
        http:
          url: https://shop.example.com/api/ready
          query: version == 'sha-0b1c2d3'
        watch: shop-web-2

- name: Wait until everything a shop needs is there
  selfhost.delivery.ready_wait:
    stable: 2
    checks:
      - name: database
        service: {project: shop, service: db}
      - name: cache
        tcp: {host: 127.0.0.1, port: 6379}
      - name: orders
        grpc: {host: 127.0.0.1, port: 50051, service: shop.v1.Orders}
      - name: worker
        log: {container: shop-worker-1, pattern: ^connected to queue}
      - name: queue
        command: {argv: [rabbitmq-diagnostics, check_running], container: shop-queue-1}
      - name: engine
        systemd: {unit: docker.service}
"""

RETURN = r"""
ready:
  description: Whether all checks were ready at the same time. False in check mode, where nothing was asked.
  returned: success
  type: bool
  sample: true
elapsed:
  description: Seconds waited.
  returned: when it was asked
  type: float
  sample: 1.84
checks:
  description: What was seen, by name of the check.
  returned: when it was asked
  type: dict
  contains:
    ready:
      description: Whether it was ready at the end.
      type: bool
    attempts:
      description: How often it was asked.
      type: int
    ready_after:
      description: Seconds until it was ready; null when it was not.
      type: float
    last_error:
      description: Why it was not ready; null when it was.
      type: str
  sample:
    public route: {ready: true, attempts: 14, ready_after: 1.82, last_error: null}
"""

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.engine import Engine
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.probes import TRY_TIMEOUT, parse_checks, wait_ready


def main() -> None:
    states = ["auto", "healthy", "running"]
    probes = {
        "http": {
            "url": {"type": "str", "required": True},
            "status": {"type": "list", "elements": "int"},
            "headers": {"type": "dict"},
            "bearer_token": {"type": "str", "no_log": True},
            "query": {"type": "str"},
            "method": {"type": "str", "default": "GET"},
            "validate_certs": {"type": "bool", "default": True},
            "ca_path": {"type": "path"},
            "server_name": {"type": "str"},
            "follow_redirects": {"type": "bool", "default": False},
            "connect_to": {"type": "str"},
            "unix_socket": {"type": "path"},
            "timeout": {"type": "float", "default": 5},
        },
        "tcp": {
            "host": {"type": "str"},
            "port": {"type": "int"},
            "unix_socket": {"type": "path"},
            "timeout": {"type": "float", "default": 5},
        },
        "grpc": {
            "host": {"type": "str"},
            "port": {"type": "int"},
            "unix_socket": {"type": "path"},
            "service": {"type": "str"},
            "tls": {"type": "bool", "default": False},
            "validate_certs": {"type": "bool", "default": True},
            "ca_path": {"type": "path"},
            "server_name": {"type": "str"},
            "timeout": {"type": "float", "default": 5},
        },
        "container": {
            "name": {"type": "str", "required": True, "aliases": ["id"]},
            "state": {"type": "str", "choices": states, "default": "auto"},
        },
        "service": {
            "project": {"type": "str", "required": True},
            "service": {"type": "str", "required": True},
            "state": {"type": "str", "choices": states, "default": "auto"},
        },
        "log": {"container": {"type": "str", "required": True}, "pattern": {"type": "str", "required": True}},
        "systemd": {"unit": {"type": "str", "required": True}},
        "command": {
            "argv": {"type": "list", "elements": "str", "required": True},
            "container": {"type": "str"},
            "timeout": {"type": "float", "default": 5},
        },
    }
    module = AnsibleModule(
        argument_spec={
            "checks": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str"},
                    "stable": {"type": "int"},
                    "timeout": {"type": "float"},
                    "watch": {"type": "str"},
                    **{kind: {"type": "dict", "options": options} for kind, options in probes.items()},
                },
                "mutually_exclusive": [list(probes)],
                "required_one_of": [list(probes)],
            },
            "timeout": {"type": "float", "default": 60},
            "stable": {"type": "int", "default": 1},
            "fail_fast": {"type": "bool", "default": True},
            "docker_socket": {"type": "path", "default": "/var/run/docker.sock"},
        },
        supports_check_mode=True,
    )
    params = module.params
    try:
        checks = parse_checks(params["checks"])
        if params["stable"] < 1:
            raise DeliveryError("stable", "must be 1 or more")
        if module.check_mode:
            module.exit_json(changed=False, ready=False, msg=f"Check mode: none of {len(checks)} checks was asked, nothing was waited for.")
        engine = Engine(socket=params["docker_socket"], timeout=TRY_TIMEOUT)
        result = wait_ready(checks, params["timeout"], stable=params["stable"], fail_fast=params["fail_fast"], engine=engine)
        result.raise_unless_ready(params["timeout"])
    except DeliveryError as exc:
        module.fail_json(**exc.as_result())
    module.exit_json(changed=False, ready=True, elapsed=result.elapsed, checks=result.checks)


if __name__ == "__main__":
    main()
