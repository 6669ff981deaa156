#!/usr/bin/env bash
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Tries a command of the README where nothing of ours is installed: in a container that holds a plain Debian and git, make
# and certificates, with an engine of its own inside once the command has installed one.
#
#   tests/fresh/run.sh [--suite bookworm] [--worktree] [--keep] [--name NAME] [--] [command …]        default: make test
#
#   --suite      Debian release: bookworm (12), trixie (13)
#   --worktree   the files as they are, not only what is committed
#   --keep       leave the container for a look; it says how to enter and how to remove it
#
# The base system is made once by debootstrap and kept in $DELIVERY_CACHE (default ~/.cache/selfhost-delivery).
# How this machine reaches its package registries (apt sources, pip and Go settings, proxies, certificate authorities) is
# handed in when the container starts; nothing of it is in the repository or in the cached image.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd -P)
checkout=$(cd "$here/../.." && pwd -P)
cache=${DELIVERY_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/selfhost-delivery}
suite=bookworm
worktree=false
keep=false
name=fresh-$$

while [ $# -gt 0 ]; do
    case $1 in
    --suite) suite=$2 && shift 2 ;;
    --worktree) worktree=true && shift ;;
    --keep) keep=true && shift ;;
    --name) name=$2 && shift 2 ;;
    --) shift && break ;;
    -*) echo "tests/fresh/run.sh: unknown option $1" >&2 && exit 2 ;;
    *) break ;;
    esac
done
[ $# -gt 0 ] || set -- make test
image=selfhost-delivery-fresh:$suite

for program in docker debootstrap git; do
    command -v "$program" >/dev/null || { echo "tests/fresh/run.sh needs $program" >&2 && exit 2; }
done

work=$(mktemp -d)
# shellcheck disable=SC2317  # called by the trap
cleanup() {
    rm -rf "$work"
    if $keep; then
        echo "Kept. Enter: docker exec -it $name bash    Remove: docker rm -fv $name && docker volume rm $name"
    else
        docker rm -fv "$name" >/dev/null 2>&1 || true
        docker volume rm "$name" >/dev/null 2>&1 || true
    fi
}
trap cleanup EXIT

# The base system, once.
if ! docker image inspect "$image" >/dev/null 2>&1; then
    archive=$cache/fresh-$suite.tar
    if ! [ -e "$archive" ]; then
        echo "Making a plain Debian $suite (debootstrap; once, kept in $archive) ..."
        mkdir -p "$cache"
        # The mirror this machine takes the same release from, where it has one; otherwise debootstrap's own default.
        # shellcheck disable=SC2016  # apt-get expands this one
        mirror=$(apt-get indextargets --format '$(REPO_URI)' "Codename: $suite" 'Created-By: Packages' 2>/dev/null | head -n 1)
        # shellcheck disable=SC2086  # no mirror: no argument
        debootstrap --variant=minbase --include=ca-certificates,git,make "$suite" "$work/root" ${mirror:-} >"$work/debootstrap.log" 2>&1 || {
            tail -n 5 "$work/debootstrap.log" >&2
            exit 1
        }
        rm -rf "$work/root/var/cache/apt/archives/"*.deb "$work/root/var/lib/apt/lists/"*
        tar -C "$work/root" -cf "$archive.part" .
        mv "$archive.part" "$archive"
        rm -rf "$work/root"
    fi
    docker import "$archive" "$image" >/dev/null
fi

# How this machine reaches its package registries.
settings=$work/settings
mkdir -p "$settings/etc/apt/apt.conf.d"
# shellcheck source=/dev/null
if [ "$(. /etc/os-release && echo "${VERSION_CODENAME:-}")" = "$suite" ]; then
    for item in sources.list sources.list.d trusted.gpg.d keyrings; do
        [ ! -e "/etc/apt/$item" ] || cp -rL "/etc/apt/$item" "$settings/etc/apt/"
    done
fi
# Of apt's settings only those that say how to fetch; hooks of this machine's programs stay here.
for file in /etc/apt/apt.conf /etc/apt/apt.conf.d/*; do
    if [ -f "$file" ] && grep -q '^ *Acquire' "$file" && ! grep -Eq '^ *(DPkg|APT::Update|Dir)' "$file"; then
        cp "$file" "$settings/etc/apt/apt.conf.d/"
    fi
done
[ ! -f /etc/pip.conf ] || cp /etc/pip.conf "$settings/etc/pip.conf"
if [ -f "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" ]; then
    mkdir -p "$settings/root/.config/pip"
    cp "${XDG_CONFIG_HOME:-$HOME/.config}/pip/pip.conf" "$settings/root/.config/pip/"
fi
environment=()
for variable in http_proxy https_proxy no_proxy HTTP_PROXY HTTPS_PROXY NO_PROXY GOPROXY GOSUMDB GONOSUMDB GONOSUMCHECK GOPRIVATE \
    PIP_INDEX_URL PIP_EXTRA_INDEX_URL PIP_TRUSTED_HOST PIP_DEFAULT_TIMEOUT PIP_PROXY; do
    [ -z "${!variable:-}" ] || environment+=(--env "$variable")
done
# Certificate authorities this machine trusts, beside the container's own bundle: its packages rewrite that one at will.
bundle=${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}
if [ -f "$bundle" ]; then
    mkdir -p "$settings/etc/ssl"
    cp -L "$bundle" "$settings/etc/ssl/callers-bundle.crt"
    for variable in SSL_CERT_FILE PIP_CERT REQUESTS_CA_BUNDLE CURL_CA_BUNDLE GIT_SSL_CAINFO; do
        environment+=(--env "$variable=/etc/ssl/callers-bundle.crt")
    done
    # What runs pip with an environment of its own, as ansible-test does, reads the file.
    grep -q '^cert *=' "$settings/etc/pip.conf" 2>/dev/null || printf '[global]\ncert =\n' >>"$settings/etc/pip.conf"
    sed -i '/^cert *=/s#=.*#= /etc/ssl/callers-bundle.crt#' "$settings/etc/pip.conf"
fi

# The files to try.
git clone --quiet "file://$checkout" "$work/delivery"
if $worktree; then
    git -C "$checkout" ls-files --cached --others --exclude-standard -z |
        (cd "$checkout" && while IFS= read -r -d '' file; do [ ! -e "$file" ] || printf '%s\0' "$file"; done) |
        tar -C "$checkout" --null --files-from=- -c | tar -C "$work/delivery" -x
fi

# An engine inside an engine: a volume for its data (overlay does not stack), cgroups of the machine, and no limits on what it may call.
docker volume create "$name" >/dev/null
docker run --detach --init --name "$name" --hostname fresh --volume "$name:/var/lib/docker" \
    --cap-add ALL --cap-drop SYS_RESOURCE --security-opt seccomp=unconfined --security-opt apparmor=unconfined \
    --security-opt systempaths=unconfined --cgroupns=host --volume /sys/fs/cgroup:/sys/fs/cgroup:rw \
    "$image" sleep infinity >/dev/null
# The sources of this machine replace the base system's; both together would name each list twice.
[ ! -e "$settings/etc/apt/sources.list.d" ] || docker exec "$name" rm -f /etc/apt/sources.list
tar -C "$settings" --owner=0 --group=0 -c . | docker exec --interactive "$name" tar -C / --no-overwrite-dir -x
docker exec "$name" mkdir -p /root/delivery
tar -C "$work/delivery" --owner=0 --group=0 -c . | docker exec --interactive "$name" tar -C /root/delivery -x

echo "In a fresh Debian $suite: $*"
begin=$SECONDS
status=0
docker exec "${environment[@]}" --env HOME=/root --workdir /root/delivery "$name" "$@" || status=$?
echo "Exit code $status after $((SECONDS - begin)) seconds."
exit "$status"
