# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later

"""The floor of the benchmark of rollouts: the least that has to be done, by hand, on the host itself.

    python3 floor.py '{"image": …, "project": …, "socket": …, "timeout": 8}'

Pull, then the web service (create, start, ask until it is ready, into HAProxy, old one out of it, stop the old one), then the worker.
Nothing is remembered, locked, checked or taken back but a container that does not get ready. Standard library, no part of the collection.
"""

from __future__ import annotations

import http.client
import json
import socket
import sys
import time
import urllib.parse

POLL = 0.02


class Engine(http.client.HTTPConnection):
    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.connect("/var/run/docker.sock")


def call(method: str, path: str, body: object = None) -> object:
    engine = Engine("localhost")
    engine.request(method, path, json.dumps(body) if body is not None else None, {"Content-Type": "application/json"})
    answer = engine.getresponse()
    text = answer.read().decode()
    if answer.status >= 400 and answer.status != 404:
        sys.exit(f"{method} {path}: {answer.status} {text}")
    return None if answer.status in (204, 304, 404) else json.loads(text.splitlines()[-1] if text else "null")


def edge(path: str, command: str) -> list[list[str]]:
    with socket.socket(socket.AF_UNIX) as haproxy:
        haproxy.connect(path)
        haproxy.sendall(command.encode() + b"\n")
        text = b""
        while chunk := haproxy.recv(65536):
            text += chunk
    return [line.split() for line in text.decode().splitlines()]


def ready(address: str) -> bool:
    try:
        probe = http.client.HTTPConnection(address, 8080, timeout=1)
        probe.request("GET", "/api/ready")
        return probe.getresponse().status == 200
    except OSError:
        return False


def roll(given: dict, service: str) -> None:
    label = f"floor={given['project']}-{service}"
    old = call("GET", "/containers/json?filters=" + urllib.parse.quote(json.dumps({"label": [label]})))
    labels = dict([label.split("=")])
    new = call("POST", "/containers/create", {"Image": given["image"], "Cmd": [service], "Labels": labels})["Id"]
    call("POST", f"/containers/{new}/start")
    if service == "web":
        deadline = time.monotonic() + given["timeout"]
        while True:
            details = call("GET", f"/containers/{new}/json")
            address = details["NetworkSettings"]["IPAddress"]
            if details["State"]["Running"] and ready(address):
                break
            if not details["State"]["Running"] or time.monotonic() > deadline:
                call("DELETE", f"/containers/{new}?force=1")
                sys.exit(f"not ready: {details['State']['Status']}")
            time.sleep(POLL)
        switch(given["socket"], f"{given['project']}-web", address)
    for container in old:
        call("POST", f"/containers/{container['Id']}/stop?t=10")


def switch(path: str, backend: str, address: str) -> None:
    def servers() -> dict[str, str]:  # name to address
        return {row[3]: row[4] for row in edge(path, f"show servers state {backend}") if len(row) > 6 and row[1] == backend}

    slots = servers()
    free = next(name for name, there in slots.items() if there == "127.0.0.1")
    for change in (f"addr {address} port 8080", "state ready", "health up"):
        edge(path, f"set server {backend}/{free} {change}")
    left = [name for name, there in slots.items() if there != "127.0.0.1"]
    for name in left:
        edge(path, f"set server {backend}/{name} state drain")
    while any(int(sessions) for name, sessions in in_flight(path, backend) if name in left):
        time.sleep(POLL)
    for name in left:
        edge(path, f"set server {backend}/{name} state maint")
        edge(path, f"set server {backend}/{name} addr 127.0.0.1 port 1")


def in_flight(path: str, backend: str) -> list[tuple[str, str]]:
    rows = [row[0].split(",") for row in edge(path, f"show stat {backend} 4 -1") if row and not row[0].startswith("#")]
    return [(row[1], row[4]) for row in rows if len(row) > 4]


def main() -> None:
    given = json.loads(sys.argv[1])
    begin = time.perf_counter()
    if call("GET", f"/images/{given['image']}/json") is None:
        call("POST", "/images/create?fromImage=" + urllib.parse.quote(given["image"], safe=""))
    roll(given, "web")
    roll(given, "worker")
    print(time.perf_counter() - begin)


main()
