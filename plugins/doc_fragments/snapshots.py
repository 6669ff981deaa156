# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Options that the kopia_* and restic_* modules share."""

from __future__ import annotations


class ModuleDocFragment:
    """Parts: the repository itself, and ``DOCKER`` for modules that hold containers still."""

    DOCUMENTATION = r"""
options:
  repository:
    description:
      - Where the snapshots are kept.
      - An absolute path, or for restic whatever restic takes, or for Kopia V(s3://bucket/prefix?endpoint=…&region=…&tls=false),
        V(b2://bucket/prefix), V(sftp://user@host:22/path?keyfile=…&known_hosts=…), V(webdav://host/path), or
        V(kopia://host:port?fingerprint=…) for a Kopia server.
      - Secrets of such a place belong into O(env), never into the URL.
    type: str
    required: true
  password:
    description:
      - Password of the repository. Reaches the program in its environment only.
      - Exactly one of O(password) and O(password_file) is required.
    type: str
  password_file:
    description: File on the host that holds the password in one line; others must not be able to read it.
    type: path
  config_dir:
    description:
      - Directory for the private configuration, cache and logs of each repository (0700).
      - It also remembers which repository was seen under O(repository), so that an unmounted disk is not taken for an empty one.
      - These working files may be made in check mode too.
    type: path
    default: /var/lib/selfhost-delivery/engine
  program:
    description: The engine's program, when it is not on E(PATH) under its own name.
    type: path
  env:
    description: More environment variables for the program, such as the keys of a bucket. Taken for secret.
    type: dict
  read_only:
    description: Open the repository without writing to it, as a drill does. Whatever must write is refused.
    type: bool
    default: false
  cache_mb:
    description:
      - Megabytes of contents that Kopia keeps on the host for this repository, set when it connects. The default is V(0) for one on a
        file system, where a cache makes a restore slower, and V(64) for others.
      - restic has no limit; V(0) turns its cache off.
    type: int
  repository_id:
    description: Fail unless the repository has this id, as RV(repository_id) returned it.
    type: str
requirements:
  - Kopia 0.21 or newer for the kopia modules; restic 0.14 or newer for the restic modules
  - root on the host, since modes and owners of others are read and written
"""

    DOCKER = r"""
options:
  docker_socket:
    description: Unix socket of the Docker engine whose volumes and containers are meant.
    type: path
    default: /var/run/docker.sock
"""
