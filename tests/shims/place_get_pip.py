# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Lets `ansible-test` make its environments where its own download server cannot be reached.

ansible-test fetches `get-pip-<version>.py` from one server and keeps it under `~/.ansible/test/cache`. Where the file is not
there yet and the server does not answer, `get_pip.py` of this folder takes its place, with pip's wheel from the package index.
A file that is already there is left alone.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import urllib.request
from pathlib import Path
from types import SimpleNamespace

from ansible_test._internal.python_requirements import get_venv_packages

ADDRESS = "https://ci-files.testing.ansible.com/ansible-test/get-pip-{}.py"
CACHE = Path.home() / ".ansible" / "test" / "cache"


def can_be_downloaded(version: str) -> bool:
    try:
        with urllib.request.urlopen(ADDRESS.format(version), timeout=10) as answer:
            return answer.status == 200
    except OSError:
        return False


def main() -> None:
    python = SimpleNamespace(version="{}.{}".format(*sys.version_info[:2]))
    version = get_venv_packages(python)["pip"]
    script = CACHE / f"get_pip_{version.replace('.', '_')}.py"
    if script.exists() or can_be_downloaded(version):
        return
    CACHE.mkdir(parents=True, exist_ok=True)
    print(f"ansible-test's download server cannot be reached; pip {version} comes from the package index instead ({script})")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(CACHE), f"pip=={version}"]
    subprocess.run(command, check=True)
    shutil.copyfile(Path(__file__).with_name("get_pip.py"), script)


if __name__ == "__main__":
    main()
