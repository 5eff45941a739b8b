# PostgreSQL 18, from the same place as pg17. Started with WHIPPET_PG18_WAL_LEVEL=replica it has no log to
# stream from.

PG18_VERSION=18.0.0
PG18_PORT=$((${WHIPPET_PG18_PORT:-15419} + SHIFT))

pg18_install() { pg_maven_install "$PG18_VERSION"; }
pg18_start() { pg_maven_start pg18 "$PG18_VERSION" "$PG18_PORT" "wal_level = ${WHIPPET_PG18_WAL_LEVEL:-logical}"; }
pg18_ready() { pg_answers "$PG18_PORT"; }
pg18_stop() { terminate pg18 INT 30; }
pg18_env() { echo "export WHIPPET_TEST_PG18=postgres://postgres@127.0.0.1:$PG18_PORT/postgres"; }
