# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options of all modules that talk to a registry (plugins/module_utils/oci/options.py holds their spec)."""

from __future__ import annotations


class ModuleDocFragment:
    # How the registry is reached, without credentials.
    CONNECTION = r"""
options:
  docker_config:
    description:
      - Docker config file, or the directory it is in, for credentials that are not given as options. Its C(credHelpers), C(credsStore)
        and C(auths) are used.
      - Default is the directory in the environment variable E(DOCKER_CONFIG), else C(~/.docker) of the user that runs the module.
    type: path
  ca_path:
    description: PEM file, or directory of hashed ones, with CAs to trust beside those of the system.
    type: path
  client_cert:
    description: PEM file with the certificate that the registry wants from its clients (mutual TLS), and with its key where there is no O(client_key).
    type: path
  client_key:
    description: PEM file with the key of O(client_cert), without a passphrase.
    type: path
  validate_certs:
    description: Whether the registry's certificate is checked. Rather name its CA in O(ca_path) than turn this off.
    type: bool
    default: true
  plain_http:
    description:
      - Talk plain HTTP. Nothing else makes these modules do so, not even an address on this machine.
      - Credentials travel unencrypted.
    type: bool
    default: false
  retries:
    description:
      - How often a request is repeated after a broken connection or an answer 408, 429 or 5xx, with growing pauses.
        C(Retry-After), seconds or a date, is kept to up to 60 seconds.
      - No other answer is asked for again.
      - A blob whose transfer broke off goes on where it stopped, where the registry can do that, and begins anew where not.
    type: int
    default: 3
  timeout:
    description: Seconds to wait for the network at each step, not for the whole.
    type: float
    default: 60
  concurrency:
    description:
      - Blobs that flow side by side, 1 to 64. Of what has no body to speak of, four times as many are asked of a registry at a time.
    type: int
    default: 4
notes:
  - Proxies are taken from the environment variables E(https_proxy), E(http_proxy), E(all_proxy) and E(no_proxy),
    which takes names, C(.suffixes), addresses and networks like C(10.0.0.0/8), each with an optional port.
    Addresses of this machine are never asked through a proxy.
"""

    # Credentials for the one registry that is meant; goes with `registry.connection`.
    DOCUMENTATION = r"""
options:
  username:
    description:
      - User at the registry. It is sent to every registry that the task names; for several registries use a Docker config file.
      - Requires O(password).
    type: str
  password:
    description: Password or access token of O(username).
    type: str
  token:
    description: Bearer token for the registry, sent as it is. Excludes O(username).
    type: str
"""
