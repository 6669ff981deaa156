#!/usr/bin/env bash
# Copyright (c) 2026, selfhost.delivery contributors
# GNU General Public License v3.0+ (see COPYING or https://www.gnu.org/licenses/gpl-3.0.txt)
# SPDX-License-Identifier: GPL-3.0-or-later
#
# Every gate of this collection, in the order in which a mistake is cheapest to learn of. `make test` runs all of it.
#
#   tests/run.sh [STAGE ...]       stages: lint ansible-lint sanity unit build molecule integration demo e2e; default: all of these
#                                  and, only by name: data hosts systemd soak
#
#   KEEP_GOING=1        run the remaining stages after one failed
#   SANITY_PYTHON=all   ansible-test sanity on every Python found, not only on the one of .venv
#   TEST_MINUTES=75     the whole run may take this long; what would run longer is stopped and counts as failed
#
# The last line is `N passed, N failed`: pytest's numbers summed, and one failed for each gate that failed without pytest saying so.
set -euo pipefail

checkout=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$checkout"

all_stages=(lint ansible-lint sanity unit build molecule integration demo e2e)
more_stages=(data hosts systemd soak) # too long for every run
venv=$checkout/.venv/bin
cache=$checkout/.cache
results=$cache/results
collections=$cache/collections
# ansible-test wants this path; a copy under git of its own, so that it sees the files of this collection and nothing else.
copy=$cache/sanity/ansible_collections/selfhost/delivery

say() { printf '%s\n' "$*"; }

usage() {
    say "tests/run.sh: unknown stage '$1'; there are: ${all_stages[*]} ${more_stages[*]}" >&2
    exit 2
}

# What this is made of ----------------------------------------------------------------------------------------------

stages=("$@")
[ ${#stages[@]} -gt 0 ] || stages=("${all_stages[@]}")
for stage in "${stages[@]}"; do
    case " ${all_stages[*]} ${more_stages[*]} " in
    *" $stage "*) ;;
    *) usage "$stage" ;;
    esac
done

for program in ansible-playbook ansible-lint ansible-test antsibull-changelog antsibull-docs molecule mypy pytest ruff shellcheck yamllint; do
    if ! [ -x "$venv/$program" ]; then
        say "tests/run.sh: .venv has no $program. Run \`make test\`: it makes .venv first and comes back here." >&2
        exit 2
    fi
done

# Programs of .venv first; no version manager's shims, which ansible-test takes for Pythons.
PATH=$venv:$(printf '%s' "$PATH" | tr ':' '\n' | grep -v '/shims/*$' | paste -sd:)
export PATH
# Nothing outside of this checkout decides what is tested.
export ANSIBLE_COLLECTIONS_PATH=$collections
export ANSIBLE_CONFIG=$checkout/tests/ansible.cfg
export PYTHONDONTWRITEBYTECODE=1
# ansible-test and ansible speak UTF-8 only; a bare container speaks POSIX.
export LC_ALL=C.UTF-8
unset ANSIBLE_LIBRARY ANSIBLE_ROLES_PATH PYTHONPATH

mkdir -p "$results" "$collections/ansible_collections/selfhost"
[ -n "${RUN_GATE:-}" ] || rm -f "$results"/*.xml
ln -sfn "$checkout" "$collections/ansible_collections/selfhost/delivery"

warn_about_kopia() {
    command -v kopia >/dev/null 2>&1 && return
    cat <<'BOX'
+------------------------------------------------------------------------------+
|  WARNING: there is no kopia on PATH.                                         |
|  The Kopia modules ran on NO REAL KOPIA; what was tested on a real snapshot  |
|  program was tested on restic. Put kopia on PATH to test both.               |
+------------------------------------------------------------------------------+
BOX
}

# The files of the checkout: committed, and new ones that git does not ignore. Deleted ones are not there to be tested.
project_files() {
    git -C "$checkout" ls-files --cached --others --exclude-standard -z |
        while IFS= read -r -d '' file; do
            if [ -e "$checkout/$file" ] || [ -L "$checkout/$file" ]; then printf '%s\0' "$file"; fi
        done
}

fresh_copy() {
    rm -rf "$copy"
    mkdir -p "$copy"
    project_files | tar -C "$checkout" --null --files-from=- -cf - | tar -C "$copy" -xf -
    git -C "$copy" -c init.defaultBranch=main init -q
    git -C "$copy" add -A
}

# The gates -----------------------------------------------------------------------------------------------------------

run_pytest() { # run_pytest STAGE FOLDER [OPTION ...]
    local stage=$1 folder=$2
    shift 2
    if ! [ -d "$folder" ]; then
        say "There is no $folder."
        return 1
    fi
    (cd "$collections" && PYTHONPATH=. pytest -p no:cacheprovider --junitxml="$results/$stage.xml" \
        -c "$checkout/pyproject.toml" --rootdir "$collections/ansible_collections/selfhost/delivery" "$@" \
        "ansible_collections/selfhost/delivery/$folder")
}

gate_lint() { # all of them, so that one run shows all there is to mend
    local failed=()
    check() { # check NAME COMMAND ...
        say "-- $1"
        "${@:2}" || failed+=("$1")
    }
    in_collections() { (cd "$collections" && MYPYPATH=. "$@"); }
    all_shell() { project_files | grep -zE '(\.sh|^\.ci/run)$' | xargs -0 -r shellcheck --external-sources --source-path=SCRIPTDIR; }

    check ruff ruff check --no-cache --output-format concise .
    check mypy in_collections mypy --config-file "$checkout/pyproject.toml" --cache-dir "$cache/mypy" -p ansible_collections.selfhost.delivery.plugins
    check yamllint yamllint --strict .
    check shellcheck all_shell
    check antsibull-changelog antsibull-changelog lint
    check antsibull-docs antsibull-docs lint-collection-docs --plugin-docs --skip-rstcheck --validate-collection-refs self \
        --disallow-unknown-collection-refs "$collections/ansible_collections/selfhost/delivery"
    if [ ${#failed[@]} -gt 0 ]; then
        say "not good: ${failed[*]}"
        return 1
    fi
}

gate_ansible_lint() { ansible-lint --offline --strict --profile production; }

gate_sanity() {
    fresh_copy
    python tests/shims/place_get_pip.py
    local python=(--python default)
    [ "${SANITY_PYTHON:-}" != all ] || python=()
    ANSIBLE_TEST_CONTENT_ROOT=$copy ansible-test sanity --color no ${python[@]+"${python[@]}"}
}

gate_unit() { run_pytest unit tests/unit; }

gate_build() {
    local work=$cache/build
    rm -rf "$work"
    mkdir -p "$work"
    ansible-galaxy collection build --output-path "$work" "$checkout"
    local tarballs=("$work"/*.tar.gz)
    # Only what the project holds, and all of it that build_ignore does not name.
    tar -tzf "${tarballs[0]}" | grep -v '/$' | sort >"$work/in-tarball"
    { project_files | tr '\0' '\n' && printf '%s\n' MANIFEST.json FILES.json; } | sort >"$work/in-project"
    local foreign
    foreign=$(comm -23 "$work/in-tarball" "$work/in-project")
    if [ -n "$foreign" ]; then
        say "The tarball holds files that are not of the project; name them in build_ignore of galaxy.yml:"
        say "$foreign"
        return 1
    fi
    local room
    for room in meta/runtime.yml plugins/modules roles playbooks docs README.md COPYING CHANGELOG.rst; do
        if ! grep -q "^$room" "$work/in-tarball"; then
            say "The tarball lacks $room."
            return 1
        fi
    done
    # From here on nothing but the installed copy is on the way: with the checkout there, it would "already be installed".
    export ANSIBLE_COLLECTIONS_PATH=$work/installed
    ansible-galaxy collection install --offline --no-deps -p "$work/installed" "${tarballs[0]}"
    local playbook
    for playbook in playbooks/*.yml; do
        playbook=selfhost.delivery.$(basename "$playbook" .yml)
        say "ansible-playbook $playbook --syntax-check"
        (cd "$work" && ansible-playbook -i localhost, "$playbook" --syntax-check >"$work/syntax" 2>&1) || {
            cat "$work/syntax"
            return 1
        }
    done
}

gate_molecule() {
    # Its folder is this checkout's, and its own configuration the only one.
    (unset ANSIBLE_CONFIG && MOLECULE_EPHEMERAL_DIRECTORY=$cache/molecule molecule test --scenario-name default)
}

# Several groups of tests at a time, as conftest.py there makes them; more than there are cores, as they wait a lot.
gate_integration() { run_pytest integration tests/integration -n 4 --dist loadscope; }

gate_soak() { run_pytest soak tests/soak -s; } # its lines are what is to be seen

gate_e2e() { run_pytest e2e tests/e2e -n 4 --dist loadscope; }

gate_hosts() { run_pytest hosts tests/hosts; }

gate_data() { run_pytest data tests/data -n 2 --dist load; }

gate_systemd() { run_pytest systemd tests/systemd; }

# The README's main job with its own checks, on ports of its own, and where the accounts of registry and edge can reach it.
gate_demo() {
    export DEMO_DIR=/opt/selfhost-delivery-gate DEMO_NAME=delivery-gate DEMO_REGISTRY_PORT=25443 DEMO_STAGING_PORT=28181 DEMO_PRODUCTION_PORT=28180
    local code=0
    python -B demo/demo.py run || code=$?
    KEEP_CACHE=1 python -B demo/demo.py down || code=$?
    return "$code"
}

# Running them --------------------------------------------------------------------------------------------------------

# Called again by itself, one gate at a time, so that `timeout` holds all of it.
if [ -n "${RUN_GATE:-}" ]; then
    gate=$RUN_GATE
    unset RUN_GATE
    "gate_${gate//-/_}"
    exit
fi

limit_of() { # seconds
    case $1 in
    lint | ansible-lint | unit | build | molecule) say 600 ;;
    sanity | demo) say 900 ;;
    integration | e2e | systemd) say 1800 ;;
    data | hosts) say 2700 ;;
    soak) say 9000 ;;
    esac
}

started=$SECONDS
total=$((${TEST_MINUTES:-75} * 60))
failed_stages=()
aside=
trap 'jobs -pr | xargs -r kill -TERM 2>/dev/null || true; exit 130' INT TERM

begin() { # begin STAGE: in the background, as $!
    local left=$((total - (SECONDS - started))) limit
    limit=$(limit_of "$1")
    [ "$limit" -le "$left" ] || limit=$left
    say
    say "== $1 =================================================== $(date '+%H:%M:%S'), at most ${limit} s"
    if [ "$limit" -gt 0 ]; then
        RUN_GATE=$1 timeout --kill-after=20 "$limit" bash "$checkout/tests/run.sh" "$1" &
    else
        (exit 124) &
    fi
}

finish() { # finish STAGE CODE SINCE; 1 when the rest need not run
    case $2 in
    0) say "== $1: good, $((SECONDS - $3)) s" ;;
    124 | 137) say "== $1: STOPPED, it took longer than its limit" ;;
    *) say "== $1: FAILED, exit code $2, $((SECONDS - $3)) s" ;;
    esac
    [ "$2" -eq 0 ] && return
    failed_stages+=("$1")
    [ "${KEEP_GOING:-0}" = 1 ]
}

join_aside() { # wait for what runs beside the others, and show what it said; as finish
    [ -n "$aside" ] || return 0
    local stage pid since code=0
    read -r stage pid since <<<"$aside"
    aside=
    wait "$pid" || code=$?
    cat "$results/$stage.log"
    finish "$stage" "$code" "$since"
}

for stage in "${stages[@]}"; do
    began=$SECONDS
    case $stage in
    sanity) # it leaves half of the machine idle, so the quick ones run beside it
        if [ ${#stages[@]} -gt 1 ]; then
            join_aside || break
            begin "$stage" >"$results/$stage.log" 2>&1
            say
            say "== $stage runs beside the next ones"
            aside="$stage $! $began"
            continue
        fi
        ;;
    integration) join_aside || break ;;
    esac
    begin "$stage"
    code=0
    wait "$!" || code=$?
    finish "$stage" "$code" "$began" || break
done
join_aside || true

say
warn_about_kopia
say "$((SECONDS - started)) s in all.${failed_stages[*]:+ Failed: ${failed_stages[*]}.}"
python tests/shims/sum_results.py "$results" ${failed_stages[@]+"${failed_stages[@]}"}
