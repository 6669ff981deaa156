# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
# shellcheck shell=bash disable=SC2034
#
# What bootstrap.sh and teardown.sh share. Sourced, never run.

#: The checkout, and the one folder below it that these scripts write to.
checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
cache=$checkout/.cache

#: One line for each program that bootstrap.sh started by hand: name, process id, start time of the process.
started=$cache/started

#: One line for each distribution package that bootstrap.sh installed.
installed=$cache/installed

say() { printf '%s\n' "$*"; }
fail() {
    printf '\n%s\n' "$*" >&2
    exit 1
}

# have PROGRAM: it is on PATH.
have() { command -v "$1" >/dev/null 2>&1; }

# The kernel's start time of a process: with the id it names one process for good, an id alone is used again.
# Field 22 of /proc/<pid>/stat, counted behind the name, which may hold spaces.
process_start() {
    local stat
    stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
    # shellcheck disable=SC2086  # the fields are meant to be split
    set -- ${stat##*) }
    printf '%s\n' "${20}"
}

# alive PID START: this very process still runs.
alive() { [ "$(process_start "$1")" = "$2" ]; }

engine_answers() { docker version --format '{{.Server.Version}}' >/dev/null 2>&1; }

# The service manager that would start things for us is there and is systemd.
has_systemd() { [ -d /run/systemd/system ]; }
