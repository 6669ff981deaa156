# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""Stands in for the bootstrap script that ansible-test would download: installs pip from the wheel that lies beside it."""

from __future__ import annotations

import sys
from pathlib import Path

here = Path(__file__).resolve()
version = here.stem.replace("get_pip_", "").replace("_", ".")
sys.path.insert(0, str(here.with_name(f"pip-{version}-py3-none-any.whl")))

from pip._internal.cli.main import main  # noqa: E402  (it is in the wheel)

# These two are options of the script alone; pip itself does not know them.
arguments = [argument for argument in sys.argv[1:] if argument not in ("--no-setuptools", "--no-wheel")]
sys.exit(main(["install", "--upgrade", *arguments]))
