# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The roles that prepare hosts, run for real on this machine: a registry of its own, the running engine, real Compose."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import typing as t
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import yaml
from registry_fixture import registries  # noqa: F401 # pylint: disable=unused-import

from ansible_collections.selfhost.delivery.plugins.module_utils.errors import DeliveryError
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions

CHECKOUT = Path(__file__).resolve().parents[2]
COLLECTIONS = CHECKOUT / ".cache" / "collections"
ROLES = ("setup", "registry", "app_host", "_service", "_authority")
PREFIX = f"hostroles{os.getpid()}"
PUSH, PULL = "push-Word-1 $x", "pull-Word-2"


def needs(*programs: str) -> None:
    missing = [program for program in programs if shutil.which(program) is None]
    if missing:
        pytest.fail(f"this test needs {', '.join(missing)} on PATH; scripts/bootstrap.sh test installs it")


@dataclass
class Run:
    code: int
    output: str

    @property
    def changed(self) -> int:
        return sum(int(number) for number in re.findall(r"changed=(\d+)", self.output))

    def ok(self) -> Run:
        assert self.code == 0, self.output
        return self

    def failed_with(self, text: str) -> Run:
        assert self.code != 0, self.output
        assert text in " ".join(self.output.replace('\\"', '"').split()), self.output
        return self


def begin(role: str, variables: t.Mapping[str, t.Any], *arguments: str, tasks_from: str, folder: Path) -> subprocess.Popen[str]:
    """Begin to run one role on this machine, in a session of its own. Variables go through a file: a command line is world-readable."""
    include: dict[str, t.Any] = {"name": f"selfhost.delivery.{role}", "tasks_from": tasks_from}
    book = folder / f"{role}-{tasks_from}.yml"
    tasks = [{"ansible.builtin.include_role": include}]
    book.write_text(json.dumps([{"hosts": "localhost", "gather_facts": True, "gather_subset": ["min"], "tasks": tasks}]))
    given = folder / "variables.json"
    given.touch(mode=0o600)
    given.write_text(json.dumps({"ansible_connection": "local", "ansible_python_interpreter": sys.executable, **variables}))
    return subprocess.Popen(
        [str(Path(sys.executable).parent / "ansible-playbook"), "-i", "localhost,", "-e", f"@{given}", *arguments, str(book)],
        env={
            **os.environ,
            "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
            "ANSIBLE_CONFIG": str(CHECKOUT / "tests" / "ansible.cfg"),
            "ANSIBLE_PIPELINING": "true",
            "LC_ALL": "C.UTF-8",
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def play(role: str, variables: t.Mapping[str, t.Any], *arguments: str, tasks_from: str = "main", folder: Path) -> Run:
    """Run one role on this machine to its end."""
    with begin(role, variables, *arguments, tasks_from=tasks_from, folder=folder) as running:
        try:
            output, _nothing = running.communicate(timeout=300)
        except BaseException:
            os.killpg(running.pid, signal.SIGKILL)
            raise
        return Run(running.returncode, output)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# --- the tables people read -----------------------------------------------------------------------------------------------


def load(role: str, path: str) -> t.Any:
    return yaml.safe_load((CHECKOUT / "roles" / role / path).read_text())


def table(role: str) -> str:
    """The table of variables that a role's README must hold, made from its argument spec and its defaults."""
    defaults = load(role, "defaults/main.yml")
    rows = ["| Variable | Type | Default | Meaning |", "|---|---|---|---|"]
    for name, option in load(role, "meta/argument_specs.yml")["argument_specs"]["main"]["options"].items():
        kind = option["type"] + (f" of {option['elements']}" if "elements" in option else "")
        default = "required" if option.get("required") else f"`{json.dumps(defaults[name])}`".replace("|", "\\|")
        text = re.sub(r"[CVO]\(([^)]*)\)", r"`\1`", re.sub(r"M\(([^)]*)\)", r"`\1`", option["description"]))
        rows.append(f"| `{name}` | {kind} | {default} | {text} |")
        for inner, detail in option.get("options", {}).items():
            text = re.sub(r"[CVO]\(([^)]*)\)", r"`\1`", detail["description"])
            rows.append(f"| `{name}[].{inner}` | {detail['type']} | {'required' if detail.get('required') else ''} | {text} |")
    return "\n".join(rows)


@pytest.mark.parametrize("role", ROLES)
def test_readme_holds_the_table_of_the_argument_spec(role: str) -> None:
    assert table(role) in (CHECKOUT / "roles" / role / "README.md").read_text()


# --- registry -------------------------------------------------------------------------------------------------------------


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Registry:
    folder: Path
    port: int
    settings: dict[str, t.Any] = field(default_factory=dict)

    @property
    def reference(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def home(self) -> Path:
        return self.folder / "registry"

    @property
    def authority(self) -> Path:
        return self.home / "tls" / "ca.crt"

    @property
    def pid(self) -> int:
        return int((self.home / f"{PREFIX}.pid").read_text())

    def variables(self, **changes: t.Any) -> dict[str, t.Any]:
        return {
            "registry_name": PREFIX,
            "registry_host": "127.0.0.1",
            "registry_address": "127.0.0.1",
            "registry_port": self.port,
            "registry_dir": str(self.home),
            "registry_user": "root",
            "registry_service_manager": "process",
            "registry_users": [{"name": "ci", "password": PUSH}, {"name": "production", "password": PULL}],
            **changes,
        }

    def run(self, *arguments: str, tasks_from: str = "main", **changes: t.Any) -> Run:
        return play("registry", self.variables(**changes), *arguments, tasks_from=tasks_from, folder=self.folder)

    def status(self, user: str = "", password: str = "", authority: bool = True) -> str:
        """Status of GET /v2/ as curl sees it, 000 when there was no answer. The login goes through curl's standard input."""
        command = ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--config", "-"]
        command += ["--cacert", str(self.authority)] if authority else []
        login = "user = " + json.dumps(f"{user}:{password}") if user else ""
        return subprocess.run(
            [*command, f"https://{self.reference}/v2/"], input=login, capture_output=True, text=True, timeout=30, check=False
        ).stdout

    def client(self) -> RegistryClient:
        return RegistryClient(self.reference, ClientOptions("ci", PUSH, ca_path=str(self.authority), retries=0))

    def disk(self) -> int:
        """Bytes of all blobs on its disk."""
        return sum(path.stat().st_size for path in (self.home / "data/docker/registry/v2/blobs").rglob("data"))

    def takes_pushes(self) -> bool:
        """Whether an upload can be begun; it is left unfinished. ``False`` where the registry says that it is read-only."""
        try:
            self.client().start_upload("uploads")
        except DeliveryError as exc:
            if exc.details.get("status") != 405:
                raise
            return False
        return True

    def names(self) -> set[str]:
        context = ssl.create_default_context(cafile=str(self.authority))
        with socket.create_connection(("127.0.0.1", self.port), timeout=10) as raw:
            with context.wrap_socket(raw, server_hostname="127.0.0.1") as secured:
                certificate = secured.getpeercert()
        assert certificate is not None
        return {str(name) for _kind, name in t.cast("tuple[tuple[str, str], ...]", certificate["subjectAltName"])}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> t.Iterator[Registry]:
    needs("docker-registry", "htpasswd", "openssl", "curl", "start-stop-daemon")
    made = Registry(tmp_path_factory.mktemp("registry"), free_port())
    try:
        first = made.run("-vvv").ok()
        assert first.changed > 0
        for secret in (PUSH, PULL):
            assert secret not in first.output
        yield made
    finally:
        made.run(tasks_from="stopped")


def test_registry_answers_its_users_only(registry: Registry) -> None:
    assert registry.status("ci", PUSH) == "200"
    assert registry.status("production", PULL) == "200"
    assert registry.status("ci", PULL) == "401"
    assert registry.status() == "401"
    assert registry.status("ci", PUSH, authority=False) == "000"


def test_registry_second_run_changes_nothing(registry: Registry) -> None:
    pid = registry.pid
    assert registry.run().ok().changed == 0
    assert registry.pid == pid


def test_registry_keeps_keys_and_users_closed(registry: Registry) -> None:
    assert mode(registry.home / "tls" / "ca.key") == 0o600
    assert mode(registry.home / "users") == 0o640
    assert all(mode(key) == 0o640 for key in (registry.home / "tls").glob("server-*.key"))
    users = (registry.home / "users").read_text()
    assert users.count("$2y$") == 2 and PUSH not in users


def test_registry_takes_password_and_user_changes_without_a_restart(registry: Registry) -> None:
    pid = registry.pid
    changed = [{"name": "ci", "password": "other-Word-3"}]
    assert registry.run("--check", "--diff", registry_users=changed).ok().changed == 2  # one task sets, one removes
    assert registry.status("production", PULL) == "200"
    assert registry.run(registry_users=changed).ok().changed == 2
    assert registry.status("ci", "other-Word-3") == "200"
    assert (registry.status("ci", PUSH), registry.status("production", PULL)) == ("401", "401")
    assert registry.pid == pid


def test_registry_mends_a_run_cut_short_between_change_and_restart(registry: Registry) -> None:
    pid = registry.pid
    (registry.home / f"{PREFIX}.started-with").write_text("what an earlier run had started\n")
    registry.run().ok()
    assert registry.pid != pid
    assert registry.status("production", PULL) == "200"


def test_registry_comes_back_after_it_was_killed(registry: Registry) -> None:
    os.kill(registry.pid, signal.SIGKILL)
    assert registry.run().ok().changed == 1
    assert registry.status("ci", PUSH) == "200"


def test_registry_serves_a_new_certificate_for_other_names(registry: Registry) -> None:
    authority = registry.authority.read_bytes()
    assert {"127.0.0.1", "localhost"} == registry.names()
    registry.run(registry_extra_names=["registry.example.com", "192.0.2.7"]).ok()
    assert {"127.0.0.1", "localhost", "registry.example.com", "192.0.2.7"} == registry.names()
    assert registry.authority.read_bytes() == authority


def test_registry_stops_and_keeps_its_images(registry: Registry) -> None:
    assert registry.run(tasks_from="stopped").ok().changed == 1
    assert registry.status("ci", PUSH) == "000"
    assert registry.run(tasks_from="stopped").ok().changed == 0
    assert (registry.home / "data").is_dir()
    registry.run().ok()
    assert registry.status("ci", PUSH) == "200"


def test_registry_refuses_bad_input_before_anything_changed(tmp_path: Path) -> None:
    made = Registry(tmp_path, free_port())
    made.run(registry_users=[]).failed_with(f"registry_users is empty: anybody could push to {made.reference}.")
    twice = made.run(registry_users=[{"name": "a", "password": "short"}] * 2, registry_certificate="/x.crt")
    twice.failed_with("registry_users names a user twice.")
    twice.failed_with("A password in registry_users is shorter than 8 characters.")
    twice.failed_with("registry_certificate and registry_certificate_key belong together; only one is given.")
    assert not made.home.exists()


def test_registry_check_on_a_bare_host_touches_nothing(tmp_path: Path) -> None:
    made = Registry(tmp_path, free_port())
    assert made.run("--check").ok().changed == 1
    assert not made.home.exists()


# --- app_host -------------------------------------------------------------------------------------------------------------


def app(folder: Path, **changes: t.Any) -> dict[str, t.Any]:
    return {
        "app_host_app": {"name": PREFIX, "env_files": [".env.production"]},
        "app_host_deploy_dir": str(folder / "app"),
        "app_host_certs_dir": str(folder / "certs.d"),
        "app_host_env": {".env.production": "PASSWORD=env-Secret-4\n"},
        **changes,
    }


def test_app_host_makes_a_closed_folder_and_leaves_it_alone(tmp_path: Path) -> None:
    variables = app(tmp_path, app_host_registry_auth={"r:1": {"username": "u", "password": PULL}}, app_host_registry_ca={"r:1": "PEM\n"})
    deploy = tmp_path / "app"

    assert play("app_host", variables, "--check", folder=tmp_path).ok().changed == 1
    assert not deploy.exists()
    first = play("app_host", variables, "-vvv", "--diff", folder=tmp_path).ok()
    assert "env-Secret-4" not in first.output and PULL not in first.output
    assert (mode(deploy), mode(deploy / ".docker"), mode(deploy / "releases"), mode(deploy / "snapshots")) == (0o750, 0o700, 0o750, 0o750)
    assert mode(deploy / ".env.production") == 0o600
    assert mode(deploy / ".docker" / "config.json") == 0o600
    assert (tmp_path / "certs.d" / "r:1" / "ca.crt").read_text() == "PEM\n"
    assert play("app_host", variables, folder=tmp_path).ok().changed == 0

    other = {**variables, "app_host_env": {".env.production": "PASSWORD=new\n"}}
    assert play("app_host", other, folder=tmp_path).ok().changed == 0
    assert "env-Secret-4" in (deploy / ".env.production").read_text()
    assert play("app_host", {**other, "app_host_env_update": True}, folder=tmp_path).ok().changed == 1
    assert (deploy / ".env.production").read_text() == "PASSWORD=new\n"


def test_app_host_names_env_files_that_will_not_do(tmp_path: Path) -> None:
    variables = app(tmp_path, app_host_env={}, app_host_app={"name": PREFIX, "env_files": [".env", ".env.production"]})
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / ".env").touch(mode=0o644)
    (tmp_path / "app" / ".env").chmod(0o644)
    run = play("app_host", variables, folder=tmp_path)
    run.failed_with(f"{tmp_path}/app/.env.production is missing")
    run.failed_with(f"{tmp_path}/app/.env can be read by others than its owner")


def test_app_host_refuses_an_env_file_outside_and_an_app_without_a_name(tmp_path: Path) -> None:
    play("app_host", app(tmp_path, app_host_env={"../x": ""}), folder=tmp_path).failed_with("app_host_env: ../x is not a file name")
    play("app_host", app(tmp_path, app_host_app={}), folder=tmp_path).failed_with("delivery_app has no name")
    assert not (tmp_path / "app").exists()


@pytest.fixture
def tiny_image(tmp_path: Path) -> t.Iterator[str]:
    """An image with nothing but a static busybox, made here: no image can be pulled."""
    needs("docker", "busybox")
    root = tmp_path / "root"
    (root / "bin").mkdir(parents=True)
    shutil.copy("/bin/busybox", root / "bin" / "busybox")
    (root / "bin" / "sh").symlink_to("busybox")
    name = f"{PREFIX}:tiny"
    archive = subprocess.run(["tar", "-C", str(root), "-c", "."], capture_output=True, check=True).stdout
    subprocess.run(["docker", "import", "-", name], input=archive, capture_output=True, check=True)
    yield name
    subprocess.run(["docker", "image", "rm", "--force", name], capture_output=True, check=False)


def test_engine_pushes_and_pulls_with_what_app_host_wrote(registry: Registry, tiny_image: str, tmp_path: Path) -> None:
    variables = app(
        tmp_path,
        app_host_certs_dir="/etc/docker/certs.d",
        app_host_registry_auth={registry.reference: {"username": "ci", "password": PUSH}},
        app_host_registry_ca={registry.reference: registry.authority.read_text()},
    )
    image = f"{registry.reference}/team/tiny:1"
    certificates = Path("/etc/docker/certs.d") / registry.reference
    environment = {**os.environ, "DOCKER_CONFIG": str(tmp_path / "app" / ".docker")}
    try:
        play("app_host", variables, folder=tmp_path).ok()
        subprocess.run(["docker", "tag", tiny_image, image], check=True)
        for verb in (["push", image], ["image", "rm", image], ["pull", image]):
            done = subprocess.run(["docker", *verb], env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    finally:
        subprocess.run(["docker", "image", "rm", "--force", image], capture_output=True, check=False)
        shutil.rmtree(certificates, ignore_errors=True)


# --- setup ----------------------------------------------------------------------------------------------------------------


def test_setup_uses_the_engine_and_compose_that_are_there(tmp_path: Path) -> None:
    needs("docker")
    daemon_json = Path("/etc/docker/daemon.json")
    before = daemon_json.read_bytes() if daemon_json.exists() else None
    variables = {"setup_packages": ["ca-certificates", "openssl"]}
    play("setup", variables, folder=tmp_path).ok()
    assert play("setup", variables, folder=tmp_path).ok().changed == 0
    assert (daemon_json.read_bytes() if daemon_json.exists() else None) == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"__setup_systems": {"Debian 99": {}}}, "app hosts are set up on Debian 99, so take one of these"),
        ({"setup_compose": "present", "setup_compose_version": "99.0"}, "needs Docker Compose 99.0 or later; it has 2."),
    ],
)
def test_setup_refuses_what_will_not_work(tmp_path: Path, changes: dict[str, t.Any], message: str) -> None:
    needs("docker")
    play("setup", {"setup_packages": ["ca-certificates"], **changes}, folder=tmp_path).failed_with(message)
