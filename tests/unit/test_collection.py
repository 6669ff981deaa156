# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""What the collection says about itself is what it is: roles and their specs, lists and files, documents and links."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import typing as t
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
#: Roles that people call. What starts with an underscore is a part of them, without an interface of its own.
ROLES = sorted(path.name for path in (ROOT / "roles").iterdir() if path.is_dir() and not path.name.startswith("_"))
MODULES = sorted(path.stem for path in (ROOT / "plugins" / "modules").glob("*.py"))
PLAYBOOKS = sorted(path.name for path in (ROOT / "playbooks").glob("*.yml"))
DOCUMENTS = sorted(
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.md", "docs/**/*.md", "roles/*/README.md", "demo/**/*.md", "tests/**/*.md", "molecule/**/*.md")
    for path in ROOT.glob(pattern)
)


def load(path: Path) -> t.Any:
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else None


def project_files() -> list[Path]:
    """What git holds or would hold: the files that get published."""
    command = ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# -- roles -------------------------------------------------------------------------------------------------------------


def entry_points(role: str) -> dict[str, dict[str, t.Any]]:
    spec = load(ROOT / "roles" / role / "meta" / "argument_specs.yml")
    assert spec, f"role {role} has no meta/argument_specs.yml"
    return spec["argument_specs"]


def role_options(role: str) -> dict[str, dict[str, t.Any]]:
    """Options of all entry points, in the order in which the spec names them."""
    options: dict[str, dict[str, t.Any]] = {}
    for entry in entry_points(role).values():
        options.update(entry.get("options") or {})
    return options


@pytest.mark.parametrize("role", ROLES)
def test_defaults_are_the_options_of_the_spec(role: str) -> None:
    options = role_options(role)
    defaults = load(ROOT / "roles" / role / "defaults" / "main.yml") or {}
    assert list(defaults) == [name for name, option in options.items() if not option.get("required")], (
        f"roles/{role}: defaults/main.yml and meta/argument_specs.yml must name the same variables in the same order"
    )


@pytest.mark.parametrize("role", ROLES)
def test_the_spec_tells_the_defaults_as_they_are(role: str) -> None:
    # Ansible sets nothing from `default` of a role's spec: what it says there is a promise that defaults/main.yml keeps.
    defaults = load(ROOT / "roles" / role / "defaults" / "main.yml") or {}
    promised = {name: option["default"] for name, option in role_options(role).items() if "default" in option}
    assert promised == {name: defaults[name] for name in promised}


@pytest.mark.parametrize("role", ROLES)
def test_public_variables_carry_the_name_of_their_role(role: str) -> None:
    assert [name for name in role_options(role) if not name.startswith(f"{role}_")] == []


@pytest.mark.parametrize("role", ROLES)
def test_every_entry_point_has_its_tasks(role: str) -> None:
    tasks = ROOT / "roles" / role / "tasks"
    assert [name for name in entry_points(role) if not (tasks / f"{name}.yml").exists()] == []


@pytest.mark.parametrize("role", ROLES)
def test_the_readme_lists_exactly_the_options(role: str) -> None:
    readme = ROOT / "roles" / role / "README.md"
    assert readme.exists(), f"role {role} has no README.md"
    listed = re.findall(rf"^\|\s*`({role}_\w+)`\s*\|", readme.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert listed == list(role_options(role)), f"roles/{role}/README.md: the table must list the options of the spec, in its order"


# -- modules and playbooks -----------------------------------------------------------------------------------------------


def test_the_action_group_is_every_module() -> None:
    runtime = load(ROOT / "meta" / "runtime.yml")
    assert runtime["action_groups"]["delivery"] == MODULES


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_that_it_is_in_the_action_group(module: str) -> None:
    text = (ROOT / "plugins" / "modules" / f"{module}.py").read_text(encoding="utf-8")
    assert "- selfhost.delivery.attributes.delivery_group\n" in text


def test_every_action_plugin_is_documented_by_a_module() -> None:
    actions = {path.stem for path in (ROOT / "plugins" / "action").glob("*.py")} - {"__init__"}
    assert actions - set(MODULES) == set()


@pytest.mark.parametrize("playbook", PLAYBOOKS)
def test_playbook_parses(playbook: str, tmp_path: Path) -> None:
    collections = tmp_path / "collections" / "ansible_collections" / "selfhost"
    collections.mkdir(parents=True)
    (collections / "delivery").symlink_to(ROOT)
    command = [str(Path(sys.executable).with_name("ansible-playbook")), "-i", "localhost,", "--syntax-check"]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("ANSIBLE_")},
        "ANSIBLE_COLLECTIONS_PATH": str(tmp_path / "collections"),
        "ANSIBLE_CONFIG": str(ROOT / "tests" / "ansible.cfg"),
        "LC_ALL": "C.UTF-8",
    }
    run = subprocess.run(
        [*command, f"selfhost.delivery.{Path(playbook).stem}"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stdout + run.stderr


# -- documents ---------------------------------------------------------------------------------------------------------


def without_code(markdown: str) -> str:
    markdown = re.sub(r"^( *)(```|~~~).*?^\1\2[ \t]*$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", markdown)


def anchors(document: Path) -> set[str]:
    """The anchors that a forge makes of the headings."""
    text = re.sub(r"^( *)(```|~~~).*?^\1\2[ \t]*$", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6}\s+(.+?)\s*#*$", text, flags=re.MULTILINE):
        words = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        anchor = re.sub(r"[^\w\- ]", "", words).replace(" ", "-")
        number = 0
        while (anchor if not number else f"{anchor}-{number}") in found:
            number += 1
        found.add(anchor if not number else f"{anchor}-{number}")
    return found


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_between_documents_lead_somewhere(document: str) -> None:
    source = ROOT / document
    broken = []
    for target in re.findall(r"\]\(<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\)", without_code(source.read_text(encoding="utf-8"))):
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _hash, anchor = target.partition("#")
        destination = (source.parent / name).resolve() if name else source
        if not destination.exists() or (anchor and destination.suffix == ".md" and anchor not in anchors(destination)):
            broken.append(target)
    assert broken == []


def test_the_index_leads_to_every_document() -> None:
    index = (ROOT / "docs" / "index.md").read_text(encoding="utf-8")
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"index.md"}
    assert pages - set(re.findall(r"\]\(([^)#\s]+)", index)) == set()


def test_the_one_test_command_is_what_the_readme_says() -> None:
    called = [line for line in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines() if line.startswith("exec ")]
    assert called == ["exec make test"]
    assert "make test" in (ROOT / "README.md").read_text(encoding="utf-8")


# -- what gets published -----------------------------------------------------------------------------------------------

#: Text that would tie the project to one machine or give something away. Written so that no pattern finds itself.
FORBIDDEN = {
    "a path of the machine it was written on": re.compile(r"(?<![\w./-])/(?:work/(?:main|shared|[.])|opt/(?:dev/|wheels))"),
    "a mirror of a package registry": re.compile(
        r"(?:index-url|INDEX_URL|GOPROXY|registry-mirrors)\W{1,4}https?://(?!pypi\.org|proxy\.golang\.org)", re.IGNORECASE
    ),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*" + "PRIVATE KEY-----\n[A-Za-z0-9+/]{32}"),
}


def test_no_file_holds_what_must_not_be_published() -> None:
    found = []
    for path in project_files():
        text = path.read_text(encoding="utf-8", errors="replace")
        found += [f"{path.relative_to(ROOT)}: {what}" for what, pattern in FORBIDDEN.items() if pattern.search(text)]
    assert found == []


def test_every_python_file_says_whose_it_is() -> None:
    head = "# Copyright (c) 2026, selfhost.delivery contributors\n"
    licence = "# SPDX-License-Identifier: GPL-3.0-or-later\n"
    missing = []
    for path in project_files():
        if path.suffix == ".py":
            first = path.read_text(encoding="utf-8")[:400]
            if first and not (head in first and licence in first):
                missing.append(str(path.relative_to(ROOT)))
    assert missing == []
