#!/usr/bin/env bash
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Gets the tools that the benchmark of images compares with: crane and regctl from their pinned Go modules into .cache/bench,
# skopeo as a package. What cannot be had is said and left out; the benchmark says so again.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/../../scripts/lib.sh"

folder=$cache/bench
modules=$checkout/tests/bench/peers
mkdir -p "$folder"

if ! [ -x "$folder/crane" ] || ! [ -x "$folder/regctl" ] || [ "$modules/go.sum" -nt "$folder/regctl" ]; then
    floor=$(sed -n 's|^go \([0-9.]*\)$|\1|p' "$modules/go.mod")
    version=$(GOTOOLCHAIN=local go env GOVERSION 2>/dev/null) || version=
    if [ -z "$version" ] || ! dpkg --compare-versions "${version#go}" ge "$floor"; then
        say "WARNING: crane and regctl are left out: they are built with Go $floor or later, and here is ${version:-no Go at all}."
    else
        say "Building crane and regctl ..."
        (
            cd "$modules"
            GOTOOLCHAIN=local GOWORK=off CGO_ENABLED=0 GOFLAGS='-mod=readonly -modcacherw' GOCACHE=$folder/build \
                go build -trimpath -ldflags '-s -w' -o "$folder/" \
                github.com/google/go-containerregistry/cmd/crane github.com/regclient/regclient/cmd/regctl
        ) || say "WARNING: crane and regctl are left out: they could not be built (above)."
        rm -rf "$folder/build"
    fi
fi
if ! have skopeo; then
    if [ "$(id -u)" = 0 ] && have apt-get; then
        say "Installing the package skopeo ..."
        DEBIAN_FRONTEND=noninteractive apt-get -qq -y --no-install-recommends -o Dpkg::Use-Pty=0 install skopeo >"$folder/apt.log" 2>&1 ||
            say "WARNING: skopeo is left out: the package could not be installed; see $folder/apt.log."
    else
        say "WARNING: skopeo is left out: install the package skopeo as root."
    fi
fi
