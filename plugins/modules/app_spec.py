#!/usr/bin/python
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Checks the description of an app and fills in what it leaves out."""

from __future__ import annotations

DOCUMENTATION = r"""
module: app_spec
short_description: Check the description of an app and work out what follows from it
version_added: 0.1.0
description:
  - Reads C(delivery_app) strictly. Every unknown key, wrong value and broken reference is named by its path, all of them at once.
  - With O(tag) refuses a tag that may mean another build tomorrow.
  - Touches nothing; meant for the controller.
author:
  - selfhost.delivery contributors (@selfhost-delivery)
extends_documentation_fragment:
  - selfhost.delivery.attributes
  - selfhost.delivery.attributes.info_module
  - selfhost.delivery.attributes.delivery_group
attributes:
  check_mode:
    support: full
  diff_mode:
    support: N/A
  idempotent:
    support: full
options:
  app:
    description: The description of the app, as in C(docs/app.md).
    type: dict
    required: true
  environment:
    description: Name of the environment it is for.
    type: str
    required: true
  tag:
    description: Immutable tag of one build. Default is to look at the description alone.
    type: str
seealso:
  - module: selfhost.delivery.release
  - module: selfhost.delivery.compose_rollout
"""

EXAMPLES = r"""
- name: Check what the inventory says
  selfhost.delivery.app_spec:
    app: "{{ delivery_app }}"
    environment: production
    tag: sha-abc
  delegate_to: localhost
  register: spec
"""

RETURN = r"""
app:
  description:
    - The description with every default filled in.
    - Without C(notify), which often holds secrets; take that from the inventory.
  returned: success
  type: dict
  sample: {name: shop, project: shop, compose_files: [compose.yaml]}
image_variables:
  description: Image name to the variable that the Compose file uses.
  returned: success
  type: dict
  sample: {app: APP_IMAGE}
service_images:
  description: Compose service to image name, the migrator's included.
  returned: success
  type: dict
  sample: {web: app, worker: app, migrate: migrator}
source_images:
  description: Image name to the repository where CI pushed it.
  returned: success
  type: dict
  sample: {app: registry.example.com/shop/app}
environment_images:
  description: Image name to the repository that this environment pulls from.
  returned: success
  type: dict
  sample: {app: registry.example.com/production/shop/app}
source_references:
  description: RV(source_images) with the tag.
  returned: with O(tag)
  type: dict
  sample: {app: "registry.example.com/shop/app:sha-abc"}
environment_references:
  description: RV(environment_images) with the tag.
  returned: with O(tag)
  type: dict
  sample: {app: "registry.example.com/production/shop/app:sha-abc"}
rollout:
  description: What M(selfhost.delivery.compose_rollout) takes as C(services), C(order), C(migrator) and C(routes).
  returned: success
  type: dict
  sample: {order: [web, worker], routes: {web: 8080}}
routes:
  description: The routes of the edge, each with the C(port) of its service.
  returned: success
  type: list
  elements: dict
  sample: [{service: web, host: shop.example.com, port: 8080}]
snapshot:
  description:
    - How the data is kept; C(volumes) is null for every named volume of the project.
    - C(volume_options) has the consistency and service of single ones, as M(selfhost.delivery.kopia_snapshot) takes them.
  returned: success
  type: dict
  sample: {consistency: pause, paths: [], hooks: [], volume_options: {pgdata: {consistency: postgresql}}, volumes: [pgdata, uploads]}
public_check:
  description:
    - A check for M(selfhost.delivery.ready_wait) on the public route, null when the app has none.
    - Without O(tag) the query holds C({tag}), to be filled in.
  returned: success
  type: dict
  sample: {name: public, http: {url: "https://shop.example.com/api/ready", query: "version == 'sha-abc'"}}
host_check:
  description: The same check of one host, asked on it, of its own edge; null when the app has none. Its query holds C({tag}).
  returned: success
  type: dict
  sample: {name: host, http: {url: "https://shop.example.com/api/ready", connect_to: "127.0.0.1:443"}}
public_timeout:
  description: Seconds the public route may take to answer with the new version.
  returned: success
  type: float
  sample: 30
problems:
  description: Everything that is wrong with the description, one line each.
  returned: failure
  type: list
  elements: str
  sample: ["delivery_app.services.web.prot: unknown key; did you mean port?"]
failure_class:
  description: V(config), or V(policy) for a tag that moves.
  returned: failure
  type: str
  sample: config
"""

import typing as t

from ansible.module_utils.basic import AnsibleModule

from ansible_collections.selfhost.delivery.plugins.module_utils.app import App, parse_app
from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError


def derive(app: App, tag: str | None) -> dict[str, t.Any]:
    """The result, as in RETURN."""
    described = app.as_dict()
    del described["notify"]
    source = {name: image.source for name, image in app.images.items()}
    environment = {name: image.repository for name, image in app.images.items()}
    result: dict[str, t.Any] = {
        "app": described,
        "image_variables": app.image_variables,
        "service_images": app.service_images,
        "source_images": source,
        "environment_images": environment,
        "rollout": app.rollout,
        "routes": [{"service": route.service, "host": route.host, "port": app.services[route.service].port} for route in app.routes],
        "snapshot": {**described["snapshot"], "volumes": app.volumes},
        "public_check": app.public_check(tag),
        "host_check": app.host_check(),
        "public_timeout": app.public.timeout if app.public else None,
    }
    if tag is not None:
        result["source_references"] = {name: f"{repository}:{tag}" for name, repository in source.items()}
        result["environment_references"] = {name: f"{repository}:{tag}" for name, repository in environment.items()}
    return result


def secrets(app: dict[str, t.Any]) -> set[str]:
    """Texts below ``notify`` that must not be shown."""
    notify = app.get("notify")
    webhooks = notify.get("webhooks") if isinstance(notify, dict) else None
    email = notify.get("email") if isinstance(notify, dict) else None
    found = list(webhooks) if isinstance(webhooks, list) else [webhooks]
    found.append(email.get("password") if isinstance(email, dict) else None)
    return {text for text in found if isinstance(text, str) and text}


def main() -> None:
    module = AnsibleModule(
        argument_spec=dict(
            app=dict(type="dict", required=True),
            environment=dict(type="str", required=True),
            tag=dict(type="str"),
        ),
        supports_check_mode=True,
        no_log=True,  # the description may hold secrets below notify; keeps it out of syslog
    )
    # The result repeats the arguments with -vvv; a dict cannot say which of its texts are secret.
    module.no_log_values.update(secrets(module.params["app"]))
    tag = module.params["tag"]
    try:
        app = parse_app(module.params["app"], module.params["environment"])
        if tag is not None:
            app.check_tag(tag)
        result = derive(app, tag)
    except DeliveryError as error:
        module.fail_json(**error.as_result())
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
