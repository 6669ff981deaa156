#!/bin/sh
# Starts PostgreSQL; makes the cluster on first start. Wants POSTGRES_PASSWORD, POSTGRES_USER and POSTGRES_DB in the environment.
# The image stops it with SIGINT: a fast shutdown, which ends sessions instead of waiting for them.
set -eu
umask 077
: "${POSTGRES_PASSWORD:?is not set}" "${POSTGRES_USER:=shop}" "${POSTGRES_DB:=shop}" "${PGDATA:=/var/lib/postgresql/data/pgdata}"
export PGDATA

if [ "$(id -u)" = 0 ]; then
    mkdir -p "$PGDATA" /run/postgresql
    chown postgres: "$PGDATA" "$(dirname "$PGDATA")" /run/postgresql
    exec setpriv --reuid postgres --regid postgres --init-groups "$0" "$@"
fi

if [ ! -e "$PGDATA/.ready" ]; then
    # An initdb that was cut leaves no mark: start over instead of serving half a cluster.
    find "$PGDATA" -mindepth 1 -delete
    secret=$(mktemp)
    printf '%s\n' "$POSTGRES_PASSWORD" >"$secret"
    initdb --username="$POSTGRES_USER" --pwfile="$secret" --auth-local=trust --auth-host=scram-sha-256 --encoding=UTF8 --locale=C >/dev/null
    rm -f "$secret"
    printf 'host all all all scram-sha-256\n' >>"$PGDATA/pg_hba.conf"
    # Single-user mode: the database exists before the first connection can be made.
    printf 'CREATE DATABASE "%s"\n' "$POSTGRES_DB" | postgres --single postgres >/dev/null
    touch "$PGDATA/.ready"
fi
unset POSTGRES_PASSWORD
exec postgres -c listen_addresses='*' -c unix_socket_directories=/run/postgresql "$@"
