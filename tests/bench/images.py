# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""How fast and how large image_promote is beside crane, regctl, skopeo and docker; `make bench-images` runs it.

Two real registries on loopback with their data in memory. In each round every tool does a case once, in turn, so that a machine
whose speed drifts is as unfair to one as to the other; what a tool left is put back before, and what it made is checked after,
outside of the timed part. A tool that is not there is named and left out: no number is ever taken from elsewhere.

image_promote is the task in a play, from its start to its result, where a play on the controller runs it: in Ansible's worker. The
process that Ansible starts anywhere else (the packed module with its arguments in it, interpreter start included) and the whole
command ansible-playbook with that one task are rows of their own.
"""

from __future__ import annotations

import argparse
import ast
import gzip
import io
import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import typing as t
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COLLECTIONS = ROOT / ".cache" / "collections"
sys.path[:0] = [str(COLLECTIONS), str(ROOT / "tests" / "integration"), str(ROOT / "tests" / "bench")]

from measure import Counter, Run, plot, run  # noqa: E402
from registry_fixture import Registry, start_registry  # noqa: E402

from ansible_collections.selfhost.delivery.plugins.module_utils.oci.client import RegistryClient  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.manifests import OCI_MANIFEST, Descriptor, Manifest  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.options import ClientOptions  # noqa: E402
from ansible_collections.selfhost.delivery.plugins.module_utils.oci.reference import digest_of  # noqa: E402

LAYER = "application/vnd.oci.image.layer.v1.tar+gzip"
CONFIG = "application/vnd.oci.image.config.v1+json"
#: The tools that are ours, and how the table calls them.
OURS, OURS_TAG, PACKED, PLAYBOOK = "image_promote", "image_promote, verify: tag", "image_promote, packed", "ansible-playbook"
PEERS = ("crane", "regctl", "skopeo", "docker")
TOOLS = (OURS, OURS_TAG, PACKED, PLAYBOOK, *PEERS)
TAGS = 100
MIB = 1024 * 1024


# -- cases -------------------------------------------------------------------------------------------------------------


@dataclass
class Site:
    """The registries of a run, and what lies in them."""

    work: Path
    source: Registry
    destination: Registry
    plain: bool = True
    images: dict[str, Manifest] = field(default_factory=dict)
    tags: list[tuple[str, Manifest]] = field(default_factory=list)


@dataclass
class Case:
    """One kind of work. ``prepare`` puts the registries back to where it begins; repositories and tags are those of a copy."""

    name: str
    what: str
    image: str
    prepare: t.Callable[[Site], None]
    source: str = "bench/image"
    source_tag: str = "sha-bench"
    destination: str = "bench/copy"
    tag: str = "sha-bench"
    one_registry: bool = False
    tools: tuple[str, ...] = TOOLS
    counted: bool = False
    #: Whether the tool did the same before, from and to the same addresses.
    again: bool = False
    tls: bool = False
    many: bool = False


def empty(site: Site) -> None:
    shutil.rmtree(site.destination.storage / "docker", ignore_errors=True)


def most_of_it(site: Site) -> None:
    """The destination holds the image whose layers are nine tenths of the large one's."""
    empty(site)
    _link_tree(site.work / "nine-tenths" / "docker", site.destination.storage / "docker")


def all_of_it(name: str) -> t.Callable[[Site], None]:
    def prepare(site: Site) -> None:
        empty(site)
        _link_tree(site.source.storage / "docker", site.destination.storage / "docker")
        repositories = site.destination.storage / "docker/registry/v2/repositories/bench"
        for folder in list(repositories.iterdir()):
            if folder.name != name:
                shutil.rmtree(folder)
        (repositories / name).rename(repositories / "copy")

    return prepare


def not_mounted(site: Site) -> None:
    shutil.rmtree(site.source.storage / "docker/registry/v2/repositories/bench/mounted", ignore_errors=True)


def not_tagged(site: Site) -> None:
    shutil.rmtree(site.source.storage / "docker/registry/v2/repositories/bench/image/_manifests/tags/production", ignore_errors=True)


def _link_tree(source: Path, target: Path) -> None:
    """A copy of a storage whose blobs are links, since a registry never writes into one; what names them is written in place."""
    shutil.copytree(source, target, copy_function=lambda a, b: os.link(a, b) if Path(a).name == "data" else shutil.copyfile(a, b))


def cases() -> list[Case]:
    most = tuple(tool for tool in TOOLS if tool != OURS_TAG)
    no_engine = tuple(tool for tool in most if tool != "docker")
    inside: dict[str, t.Any] = {"one_registry": True, "counted": True}
    together = tuple(tool for tool in TOOLS if tool != "docker")
    return [
        Case("cold-small", "300 MB in 8 layers, nothing there", "image", empty, tools=most),
        Case("cold-small-tls", "the same over TLS", "image", empty, tools=no_engine, tls=True),
        Case("cold-large", "2 GB in 20 layers, nothing there", "large", empty, source="bench/large", tools=most),
        Case("nine-tenths", "2 GB, 18 of 20 layers there", "large", most_of_it, source="bench/large", tools=no_engine),
        Case("mount", "300 MB into another repository of the registry", "image", not_mounted, destination="bench/mounted", **inside),
        Case(
            "mount-small",
            "1 MB in 2 layers into another repository",
            "tags",
            not_mounted,
            source="bench/tags",
            source_tag="sha-000",
            destination="bench/mounted",
            **inside,
        ),
        Case("re-tag", "300 MB, another tag in its repository", "image", not_tagged, destination="bench/image", tag="production", **inside),
        Case("nothing", "300 MB, all there already", "image", all_of_it("image"), counted=True, again=True),
        Case("tags-cold", f"{TAGS} tags of one repository in one task", "tags", empty, source="bench/tags", tools=together, many=True),
        Case("tags-nothing", f"{TAGS} tags, all there already", "tags", all_of_it("tags"), source="bench/tags", tools=together, many=True),
    ]


# -- images ------------------------------------------------------------------------------------------------------------


def client_of(registry: Registry) -> RegistryClient:
    return RegistryClient(registry.address, ClientOptions(**registry.options))


def layer(size: int) -> tuple[bytes, str]:
    """A gzip layer of about ``size`` bytes that cannot be made smaller, and the digest of what is in it."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as archive:
        entry = tarfile.TarInfo(f"data-{os.urandom(4).hex()}")
        entry.size = size
        archive.addfile(entry, io.BytesIO(os.urandom(size)))
    return gzip.compress(content.getvalue(), 0), digest_of(content.getvalue())


def push(client: RegistryClient, repository: str, tag: str, layers: t.Sequence[tuple[Descriptor, str]]) -> Manifest:
    """Tag an image of layers that are in the repository."""
    config = {
        "architecture": "amd64",
        "os": "linux",
        "config": {"Labels": {"tag": tag}},
        "rootfs": {"type": "layers", "diff_ids": [diff for _layer, diff in layers]},
    }
    content = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": client.push_blob(repository, json.dumps(config).encode(), CONFIG).as_json(),
        "layers": [descriptor.as_json() for descriptor, _diff in layers],
    }
    manifest = Manifest.build(content)
    client.put_manifest(repository, manifest, tag)
    return manifest


def push_layers(client: RegistryClient, repository: str, sizes: t.Iterable[int]) -> list[tuple[Descriptor, str]]:
    made = []
    for size in sizes:
        data, diff = layer(size)
        made.append((client.push_blob(repository, data, LAYER), diff))
    return made


def fill(site: Site, small: int, large: int, wanted: t.Collection[str]) -> None:
    """Push the images that the ``wanted`` ones of the cases need; sizes in bytes."""
    client = client_of(site.source)
    if "image" in wanted:
        site.images["image"] = push(client, "bench/image", "sha-bench", push_layers(client, "bench/image", [small // 8] * 8))
    if "tags" in wanted:
        base = push_layers(client, "bench/tags", [MIB])
        for number in range(TAGS):
            tag = f"sha-{number:03}"
            site.tags.append((tag, push(client, "bench/tags", tag, base + push_layers(client, "bench/tags", [16 * 1024]))))
        site.images["tags"] = site.tags[0][1]
    if "large" in wanted:
        layers = push_layers(client, "bench/large", [large // 20] * 20)
        # The older image first and away from the source again, with what the registry made of it, as the start of nine-tenths.
        push(client, "bench/large", "older", layers[:18])
        repositories = site.source.storage / "docker/registry/v2/repositories/bench"
        kept = site.work / "nine-tenths" / "docker/registry/v2"
        _link_tree(repositories / "large", kept / "repositories/bench/copy")
        _link_tree(site.source.storage / "docker/registry/v2/blobs", kept / "blobs")
        for descriptor, _diff in layers[18:]:
            hexes = descriptor.digest.split(":")[1]
            shutil.rmtree(kept / "repositories/bench/copy/_layers/sha256" / hexes)
            shutil.rmtree(kept / "blobs/sha256" / hexes[:2] / hexes)
        site.images["large"] = push(client, "bench/large", "sha-bench", layers)


def check(site: Site, case: Case, tool: str, thorough: bool) -> None:
    """The copy is whole and the one that was asked for, or this raises ``RuntimeError``."""
    target = site.source if case.one_registry else site.destination
    client = client_of(target)
    wanted = site.tags if case.many else [(case.tag, site.images[case.image])]
    repository = destination_of(case, tool)
    for tag, image in wanted:
        found = client.manifest(repository, tag)
        if found is None:
            raise RuntimeError(f"{tool} said it was done, and {repository}:{tag} is not there")
        if found.digest != image.digest and tool != "docker":  # the engine packs layers anew: another digest by design
            raise RuntimeError(f"{tool} made {found.digest} of {image.digest}")
        for blob in found.blobs:
            path = target.blob_file(blob.digest)
            if not target.blob_link(repository, blob.digest).exists() or path.stat().st_size != blob.size:
                raise RuntimeError(f"{tool} said it was done, and {blob.digest} is not whole in {repository}")
            if thorough and subprocess.run(["sha256sum", path], capture_output=True, text=True, check=True).stdout[:64] != blob.digest[7:]:
                raise RuntimeError(f"{tool} said it was done, and {blob.digest} has other bytes in {repository}")
    client.close()


# -- tools -------------------------------------------------------------------------------------------------------------


@dataclass
class Tool:
    """A tool that is there: how its command for a case looks between two addresses."""

    name: str
    command: t.Callable[[Site, Case, str, str], list[str]]
    environment: dict[str, str] = field(default_factory=dict)
    #: What was measured inside of the command, written there by it; without, it is the command itself.
    clock: Path | None = None


def destination_of(case: Case, tool: str) -> str:
    # `skopeo sync` keeps the last part of the source's name.
    return "bench/copy/tags" if case.many and tool == "skopeo" and case.name == "tags-cold" else case.destination


def ends(case: Case, site: Site, source: str, destination: str) -> tuple[str, str]:
    return f"{source}/{case.source}:{case.source_tag}", f"{destination}/{case.destination}:{case.tag}"


def parameters(case: Case, site: Site, source: str, destination: str, verify: str) -> dict[str, t.Any]:
    """Of image_promote. With ``verify: tag`` the source is named by digest, and nothing but the image is asked for."""
    found: dict[str, t.Any] = {"plain_http": True} if site.plain else {"ca_path": str(site.work / "ca.pem")}
    if verify != "blobs":
        found.update(verify=verify, referrers=False)
    if case.many:
        found["images"] = [
            {
                "source": f"{source}/{case.source}" + (f"@{image.digest}" if verify == "tag" else f":{tag}"),
                "destination": f"{destination}/{case.destination}:{tag}",
            }
            for tag, image in site.tags
        ]
        return found
    a, b = ends(case, site, source, destination)
    if verify == "tag" and case.name == "nothing":
        a = f"{a.rpartition(':')[0]}@{site.images[case.image].digest}"
    return {**found, "source": a, "destination": b}


class Ours:
    """image_promote as Ansible packs it, and a playbook around it."""

    def __init__(self, work: Path) -> None:
        self.work = work / "ours"
        self.work.mkdir()
        self.python = "/usr/bin/python3" if os.access("/usr/bin/python3", os.X_OK) else sys.executable
        # Ansible starts the interpreter with the packed module; this one keeps it instead of running it.
        self.catcher = self.work / "catch"
        self.catcher.write_text(f"#!/bin/sh\ncp \"$1\" {shlex.quote(str(self.work))}/caught && echo '{{\"changed\": false}}'\n")
        self.catcher.chmod(0o755)
        self.environment = {
            "ANSIBLE_COLLECTIONS_PATH": str(COLLECTIONS),
            "ANSIBLE_CONFIG": str(ROOT / "tests" / "ansible.cfg"),
            "ANSIBLE_LOCAL_TEMP": str(self.work / "tmp"),
            "ANSIBLE_REMOTE_TMP": str(self.work / "tmp"),
            "ANSIBLE_LOCALHOST_WARNING": "false",
            "LC_ALL": "C.UTF-8",
        }
        self._module = ""
        self._count = 0

    def packed(self, values: dict[str, t.Any]) -> list[str]:
        """The command for the module with these arguments: packed by Ansible once, the arguments changed where it keeps them."""
        if not self._module:
            arguments = ["-i", "localhost,", "-c", "local", "-e", f"ansible_python_interpreter={self.catcher}"]
            some = json.dumps({"source": "localhost/a:b", "destination": "localhost/c"})
            command = [_ansible("ansible"), "localhost", *arguments, "-m", "selfhost.delivery.image_promote", "-a", some]
            subprocess.run(command, env={**os.environ, **self.environment}, check=True, capture_output=True)
            self._module = (self.work / "caught").read_text()
        (line,) = [line for line in self._module.splitlines() if line.startswith("params=")]
        written = ast.literal_eval(line[len("params=") :].rstrip(","))
        content = json.loads(written)
        own = {name: value for name, value in content["ANSIBLE_MODULE_ARGS"].items() if name.startswith("_ansible_")}
        changed = json.dumps({**content, "ANSIBLE_MODULE_ARGS": {**own, **values}})
        self._count += 1
        path = self.work / f"module{self._count}.py"
        path.write_text(self._module.replace(line, line.replace(repr(written), repr(changed))))
        return [self.python, str(path)]

    def playbook(self, values: dict[str, t.Any]) -> list[str]:
        path = self.work / f"play-{digest_of(json.dumps(values).encode())[7:19]}.yml"
        task = {"name": "Promote", "selfhost.delivery.image_promote": values}
        path.write_text(json.dumps([{"name": "Bench", "hosts": "localhost", "gather_facts": False, "tasks": [task]}]))
        interpreter = f"ansible_python_interpreter={sys.executable}"
        return [_ansible("ansible-playbook"), "-i", "localhost,", "-c", "local", "-e", interpreter, str(path)]

    def tools(self) -> list[Tool]:
        def command(verify: str, pack: t.Callable[[dict[str, t.Any]], list[str]]) -> t.Callable[[Site, Case, str, str], list[str]]:
            return lambda site, case, a, b: pack(parameters(case, site, a, b, verify))

        clock = self.work / "clock.json"
        clocked = {
            **self.environment,
            "ANSIBLE_CALLBACK_PLUGINS": str(Path(__file__).parent / "callback"),
            "ANSIBLE_CALLBACKS_ENABLED": "task_clock",
            "TASK_CLOCK": str(clock),
        }
        return [
            Tool(OURS, command("blobs", self.playbook), clocked, clock),
            Tool(OURS_TAG, command("tag", self.playbook), clocked, clock),
            Tool(PACKED, command("blobs", self.packed)),
            Tool(PLAYBOOK, command("blobs", self.playbook), self.environment),
        ]


def _ansible(name: str) -> str:
    return str(Path(sys.executable).with_name(name))


def _crane(program: str) -> t.Callable[[Site, Case, str, str], list[str]]:
    def command(site: Site, case: Case, a: str, b: str) -> list[str]:
        if case.many:
            return [program, "copy", "--all-tags", f"{a}/{case.source}", f"{b}/{case.destination}"]
        return [program, "copy", *ends(case, site, a, b)]

    return command


def _regctl(program: str) -> t.Callable[[Site, Case, str, str], list[str]]:
    def command(site: Site, case: Case, a: str, b: str) -> list[str]:
        if case.many:  # it has no call for several tags
            script = f'set -e; for tag; do {shlex.quote(program)} image copy "{a}/{case.source}:$tag" "{b}/{case.destination}:$tag"; done'
            return ["sh", "-c", script, "sh", *(tag for tag, _image in site.tags)]
        return [program, "image", "copy", *ends(case, site, a, b)]

    return command


def _skopeo(program: str) -> t.Callable[[Site, Case, str, str], list[str]]:
    def command(site: Site, case: Case, a: str, b: str) -> list[str]:
        head = [program, "--insecure-policy"]
        flags = ["--src-tls-verify=false", "--dest-tls-verify=false"] if site.plain else []
        if case.many:
            parent = destination_of(case, "skopeo").rpartition("/")[0]
            if case.name == "tags-cold":
                return [*head, "sync", *flags, "--src", "docker", "--dest", "docker", f"{a}/{case.source}", f"{b}/{parent}"]
            copy = shlex.join([*head, "copy", "-q", *flags])
            script = f'set -e; for tag; do {copy} "docker://{a}/{case.source}:$tag" "docker://{b}/{case.destination}:$tag"; done'
            return ["sh", "-c", script, "sh", *(tag for tag, _image in site.tags)]
        return [*head, "copy", *flags, *(f"docker://{end}" for end in ends(case, site, a, b))]

    return command


def _docker(site: Site, case: Case, a: str, b: str) -> list[str]:
    source, destination = ends(case, site, a, b)
    return ["sh", "-c", 'docker pull -q "$1" && docker tag "$1" "$2" && docker push -q "$2"', "sh", source, destination]


def _hosts(site: Site, *addresses: str) -> dict[str, t.Any]:
    """What regctl is told about registries."""
    return {address: {"tls": "disabled"} for address in addresses} if site.plain else {}


def find_tools(names: t.Collection[str], site: Site, ours: Ours) -> tuple[list[Tool], dict[str, str]]:
    """The tools that are here, and why the others are not."""
    found, missing = [tool for tool in ours.tools() if tool.name in names], {}
    (site.work / "regctl.json").write_text(json.dumps({"hosts": _hosts(site, site.source.address, site.destination.address)}))
    known: dict[str, t.Any] = {"crane": _crane, "regctl": _regctl, "skopeo": _skopeo}
    for name, make in known.items():
        program = str(ROOT / ".cache" / "bench" / name)
        program = program if os.access(program, os.X_OK) else shutil.which(name) or ""
        if name not in names:
            continue
        if program:
            found.append(Tool(name, make(program), {"DOCKER_CONFIG": str(site.work), "REGCTL_CONFIG": str(site.work / "regctl.json")}))
        else:
            missing[name] = "it is neither in .cache/bench nor on PATH; tests/bench/peers.sh gets it where it can"
    if "docker" in names:
        reason = engine_lacks(site)
        if reason:
            missing["docker"] = reason
        else:
            found.append(Tool("docker", _docker))
    return found, missing


def engine_lacks(site: Site) -> str:
    """Why the engine cannot take part; empty when it can."""
    if not shutil.which("docker"):
        return "docker is not on PATH"
    probe = f"{site.source.address}/bench/probe:sha-probe"
    client = client_of(site.source)
    push(client, "bench/probe", "sha-probe", push_layers(client, "bench/probe", [1000]))
    done = subprocess.run(["docker", "pull", "-q", probe], capture_output=True, text=True, check=False)
    subprocess.run(["docker", "rmi", probe], capture_output=True, check=False)
    shutil.rmtree(site.source.storage / "docker/registry/v2/repositories/bench/probe")
    return "" if done.returncode == 0 else f"the engine cannot pull from a registry on loopback: {done.stderr.strip()[-200:]}"


def forget(site: Site, case: Case) -> None:
    """The engine keeps what it pulled and pushed: take back just that."""
    target = site.source if case.one_registry else site.destination
    subprocess.run(["docker", "rmi", *ends(case, site, site.source.address, target.address)], capture_output=True, check=False)


# -- the run -----------------------------------------------------------------------------------------------------------


@dataclass
class Results:
    runs: dict[tuple[str, str], list[Run]] = field(default_factory=dict)
    #: Requests and rounds, by case and tool.
    counts: dict[tuple[str, str], tuple[int, int]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[dict[str, t.Any]]:
        """What build/bench/images.json holds. The ratio is of medians, and null where no other tool ran the case."""
        medians = {key: statistics.median(one.wall for one in done) for key, done in self.runs.items()}
        rows = []
        for (case, tool), done in self.runs.items():
            peers = [median for (other, name), median in medians.items() if other == case and name in PEERS]
            rows.append(
                {
                    "case": case,
                    "tool": tool,
                    "runs": len(done),
                    "median_s": round(medians[case, tool], 4),
                    "min_s": round(min(one.wall for one in done), 4),
                    "peak_rss_mib": round(max(one.peak_rss_mib for one in done), 1),
                    "ratio_to_fastest_peer": round(medians[case, tool] / min(peers), 3) if peers else None,
                }
            )
        return rows


def run_case(site: Site, case: Case, tools: t.Sequence[Tool], runs: t.Mapping[str, int], results: Results) -> None:
    target = site.source if case.one_registry else site.destination
    log = site.work / "tool.log"
    able = [tool for tool in tools if tool.name in case.tools]
    tls = {} if site.plain else {"SSL_CERT_FILE": str(site.work / "ca.pem")}
    commands = {tool.name: tool.command(site, case, site.source.address, target.address) for tool in able}
    for number in range(max((runs[tool.name] for tool in able), default=0)):
        for tool in able[number % len(able) :] + able[: number % len(able)]:
            if number >= runs[tool.name]:
                continue
            case.prepare(site)
            if tool.name == "docker":
                forget(site, case)
            try:
                done = run(commands[tool.name], log, {**tool.environment, **tls})
                if tool.clock:
                    done = Run(*json.loads(tool.clock.read_text()))
                    tool.clock.unlink()
                check(site, case, tool.name, thorough=number == 0)
            except RuntimeError as exc:
                if tool.name not in PEERS:
                    raise
                # One that cannot do the case is said, and has no numbers in it.
                results.notes.append(f"{case.name}: {tool.name} is left out: {exc}")
                results.runs.pop((case.name, tool.name), None)
                able = [other for other in able if other is not tool]
                continue
            finally:
                if tool.name == "docker":
                    forget(site, case)
            results.runs.setdefault((case.name, tool.name), []).append(done)
            say(f"  {case.name:15} {number + 1}  {tool.name:28} {done.wall:8.3f} s  {done.cpu:7.2f} s cpu  {done.peak_rss_mib:6.1f} MiB")
        if not able:
            return
    if case.counted:
        count_requests(site, case, [tool for tool in able if tool.name != "docker"], results)


def count_requests(site: Site, case: Case, tools: t.Sequence[Tool], results: Results) -> None:
    """One run more through proxies, not timed. The engine is not asked: it talks to registries by itself."""
    counter = Counter()
    try:
        source = counter.proxy(site.source.address)
        target = source if case.one_registry else counter.proxy(site.destination.address)
        (site.work / "counted.json").write_text(json.dumps({"hosts": _hosts(site, source, target)}))
        for tool in tools:
            if (case.name, tool.name) not in results.runs:
                continue
            case.prepare(site)
            counter.take()
            environment = {**tool.environment, "REGCTL_CONFIG": str(site.work / "counted.json")}
            command = tool.command(site, case, source, target)
            if case.again:
                run(command, site.work / "tool.log", environment)
                counter.take()
            run(command, site.work / "tool.log", environment)
            requests = counter.take()
            results.counts[case.name, tool.name] = (len(requests), counter.rounds(requests))
    finally:
        counter.close()


def table(results: Results, chosen: t.Sequence[Case]) -> str:
    """Markdown: a row for each case and tool."""
    lines = [
        "| case | tool | runs | median s | minimum s | processor s | peak MiB | ratio to the fastest other | requests | rounds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    what = {case.name: case.what for case in chosen}
    for row in results.rows():
        requests, rounds = results.counts.get((row["case"], row["tool"]), ("", ""))
        ratio = "" if row["ratio_to_fastest_peer"] is None else f"{row['ratio_to_fastest_peer']:.2f}"
        cpu = statistics.median(one.cpu for one in results.runs[row["case"], row["tool"]])
        lines.append(
            f"| {row['case']}: {what[row['case']]} | {row['tool']} | {row['runs']} | {row['median_s']:.3f} | {row['min_s']:.3f} "
            f"| {cpu:.2f} | {row['peak_rss_mib']:.0f} | {ratio} | {requests} | {rounds} |"
        )
    return "\n".join(lines)


def say(text: str) -> None:
    print(text, flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--runs", type=int, default=7, help="of each tool and case (default: 7)")
    parser.add_argument("--runs-of", default="", help="of these cases another number, as in cold-large=3,tags-cold=3")
    parser.add_argument("--without", default="", help="leave a tool out of a case, as in cold-large/docker; it is said in the result")
    parser.add_argument("--docker-runs", type=int, default=3, help="of docker, which takes ten times as long (default: 3)")
    parser.add_argument("--small-mib", type=int, default=300, help="size of the small image (default: 300)")
    parser.add_argument("--large-mib", type=int, default=2048, help="size of the large image (default: 2048)")
    parser.add_argument("--only", help="these cases, with commas between them: " + ", ".join(case.name for case in cases()))
    parser.add_argument("--tools", help="these tools, with ';' between them: " + "; ".join(TOOLS))
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "bench", help="folder for images.json and images.svg")
    parser.add_argument("--work", type=Path, help="folder for the registries' data (default: /dev/shm, which is memory)")
    return parser.parse_args()


def main() -> int:
    options = arguments()
    chosen = [case for case in cases() if not options.only or case.name in options.only.split(",")]
    names = options.tools.split(";") if options.tools else list(TOOLS)
    unknown = [name for name in names if name not in TOOLS] + [
        name for name in (options.only or "").split(",") if name and name not in {case.name for case in cases()}
    ]
    if unknown:
        say(f"There is no {', '.join(unknown)}.")
        return 2
    base = options.work or (Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None)
    os.environ.pop("http_proxy", None)
    results = Results()
    # Nothing that is memory may be executed in a container, and the way to pack a module starts a program.
    with tempfile.TemporaryDirectory(prefix="bench-images-", dir=base) as folder, tempfile.TemporaryDirectory() as programs:
        os.environ["DOCKER_CONFIG"] = folder
        # What image_promote remembers: nothing at the beginning, and nothing for whoever runs this.
        os.environ["XDG_CACHE_HOME"] = programs
        ours = Ours(Path(programs))
        for tls in sorted({case.tls for case in chosen}):
            run_site(Path(folder), tls, chosen, names, ours, options, results)
    report(results, chosen, options)
    return 0


def run_site(
    folder: Path, tls: bool, everything: list[Case], names: t.Sequence[str], ours: Ours, options: argparse.Namespace, results: Results
) -> None:
    chosen = [case for case in everything if case.tls == tls]
    work = folder / ("tls" if tls else "plain")
    work.mkdir()
    registries: list[Registry] = []
    try:
        for name in ("source", "destination"):
            registries.append(start_registry(work / name, tls=tls))
        site = Site(work, *registries, plain=not tls)
        if tls:
            (work / "ca.pem").write_text("".join(Path(registry.ca_path or "").read_text() for registry in registries))
        say(f"Making images of {options.small_mib} and {options.large_mib} MiB in {work} ...")
        fill(site, options.small_mib * MIB, options.large_mib * MIB, {case.image for case in chosen})
        tools, missing = find_tools([name for name in names if any(name in case.tools for case in chosen)], site, ours)
        results.missing.update(missing)
        for name, why in missing.items():
            say(f"WARNING: NO {name.upper()} in this run: {why}")
        other = {name: int(number) for name, _equals, number in (part.partition("=") for part in options.runs_of.split(",") if part)}
        without = {tuple(pair.split("/")) for pair in options.without.split(",") if pair}
        results.notes += [f"{case}: {tool} was left out by hand" for case, tool in sorted(without) if case in {one.name for one in chosen}]
        for case in chosen:
            case.tools = tuple(name for name in case.tools if (case.name, name) not in without)
            say(f"{case.name}: {case.what}")
            usual = other.get(case.name, options.runs)
            run_case(site, case, tools, {name: min(usual, options.docker_runs) if name == "docker" else usual for name in TOOLS}, results)
            # A run takes long; one that is ended early leaves the cases that are done.
            write(results, everything, options.output)
    finally:
        for registry in registries:
            registry.stop()
        shutil.rmtree(work, ignore_errors=True)


def write(results: Results, chosen: t.Sequence[Case], output: Path) -> str:
    """Write what is known so far; returns the table."""
    order = {name: place for place, name in enumerate(TOOLS)}
    by_case = {case.name: place for place, case in enumerate(chosen)}
    results.runs = dict(sorted(results.runs.items(), key=lambda item: (by_case[item[0][0]], order[item[0][1]])))
    output.mkdir(parents=True, exist_ok=True)
    rows = results.rows()
    (output / "images.json").write_text(json.dumps(rows, indent=2) + "\n")
    (output / "images.svg").write_text(plot(rows, (OURS, OURS_TAG, PACKED, PLAYBOOK), "image_promote beside other tools"))
    text = table(results, chosen)
    (output / "images.md").write_text(text + "\n")
    return text


def report(results: Results, chosen: t.Sequence[Case], options: argparse.Namespace) -> None:
    say(f"\n{write(results, chosen, options.output)}\n")
    say(f"{os.cpu_count()} processors; registry: {_version('docker-registry', '--version')}; {sys.version.split()[0]} runs the bench.")
    say(f"load of the machine at the end: {os.getloadavg()[0]:.1f}; processor s are the tool's own, without the registries and the engine.")
    say(f"{PLAYBOOK} is the whole command around one task; docker's memory is that of its client.")
    for note in results.notes:
        say(f"NOTE: {note}")
    for name, why in results.missing.items():
        say(f"WARNING: NO {name.upper()} in these numbers: {why}")
    say(f"Written: images.json, images.svg and images.md in {options.output}")


def _version(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    except OSError:
        return "of another name"


if __name__ == "__main__":
    sys.exit(main())
