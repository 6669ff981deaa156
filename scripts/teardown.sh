#!/usr/bin/env bash
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Ends exactly what bootstrap.sh started by hand, and says which packages it had installed. Run again, it has nothing to do.
set -euo pipefail
# shellcheck source=scripts/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if [ -s "$started" ]; then
    while read -r name pid start; do
        if alive "$pid" "$start"; then
            say "Stopping $name (process $pid), which was started by scripts/bootstrap.sh ..."
            kill -TERM "$pid"
            # The engine needs up to its own shutdown timeout to stop its containers; it is asked, never killed.
            deadline=$((SECONDS + 60))
            while alive "$pid" "$start"; do
                [ $SECONDS -lt $deadline ] || fail "$name (process $pid) still runs 60 seconds after it was asked to stop; see .cache/$name.log"
                sleep 0.2
            done
        fi
    done <"$started"
    rm -f "$started"
fi
if [ -s "$installed" ]; then
    say "Installed by scripts/bootstrap.sh and left in place: $(sort -u "$installed" | paste -sd' ')"
    say "To remove them too: apt-get remove $(sort -u "$installed" | paste -sd' ')"
fi
