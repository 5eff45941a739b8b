# PostgreSQL from Debian, with a data folder of its own. It runs as the user `postgres` when we are
# root, because it refuses root.

PG_PORT=${WHIPPET_PG_PORT:-15432}

pg_bin() { # the newest installed, or none
  local bin
  bin=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
  [ -x "$bin/initdb" ] && printf '%s\n' "$bin"
}

as_pg() { if [ "$EUID" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }

postgres_install() {
  pg_bin >/dev/null && return
  # Debian's package makes and starts a server on port 5432; nobody asked for that one.
  apt_need postgresql-common
  as_root sed -i 's/^#* *create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
  apt_need postgresql
}

postgres_start() {
  local bin dir=$STATE/postgres data
  bin=$(pg_bin)
  data=$dir/data-$(basename "$(dirname "$bin")")
  [ "$EUID" != 0 ] || chown postgres: "$dir"
  cd "$dir" # initdb and postgres complain about a working folder that they may not read
  if [ ! -f "$data/PG_VERSION" ]; then
    rm -rf "$data" "$data.new" # moved into place at the end, so that a half-made one is never used
    as_pg "$bin/initdb" --pgdata "$data.new" --username postgres --auth trust --encoding UTF8 \
      --locale C.UTF-8 --no-instructions >"$dir/initdb.log" 2>&1 || die "initdb failed; see $dir/initdb.log"
    mv "$data.new" "$data"
  fi
  # whippet_pw is the one role that needs its password, for the tests of a wrong one.
  cat >"$data/pg_hba.conf" <<HBA
host  all          whippet_pw  127.0.0.1/32  scram-sha-256
host  all          all         127.0.0.1/32  trust
host  replication  all         127.0.0.1/32  trust
local all          all                       trust
local replication  all                       trust
HBA
  # As durable as in production: fsync and synchronous_commit stay on. Room for WAL, so that a
  # benchmark does not measure checkpoints.
  cat >"$data/postgresql.auto.conf" <<CONF
listen_addresses = '127.0.0.1'
port = $PG_PORT
unix_socket_directories = '$dir'
external_pid_file = '$(pid_file postgres)'
wal_level = logical
max_connections = 200
max_wal_senders = 20
max_replication_slots = 20
fsync = on
synchronous_commit = on
shared_buffers = 256MB
max_wal_size = 4GB
log_line_prefix = '%m [%p] %q%u@%d '
CONF
  touch "$(log_file postgres)"
  [ "$EUID" != 0 ] || chown postgres: "$data"/{pg_hba,postgresql.auto}.conf "$(log_file postgres)"
  rm -f "$(pid_file postgres)"
  # Started by its own hand, not by spawn: runuser would be the process that the pid file names.
  as_pg "$bin/pg_ctl" start --no-wait --silent --pgdata "$data" --log "$(log_file postgres)" 9>&-
  # The server writes external_pid_file itself, a little later.
  local deadline=$((SECONDS + 20))
  until running postgres || [ $SECONDS -ge $deadline ]; do sleep 0.05; done
}

postgres_ready() { "$(pg_bin)/pg_isready" --quiet --host 127.0.0.1 --port "$PG_PORT"; }

postgres_after() {
  "$(pg_bin)/psql" --quiet --no-psqlrc --host 127.0.0.1 --port "$PG_PORT" --username postgres \
    --set ON_ERROR_STOP=1 --dbname postgres --command "DO \$\$ BEGIN
      CREATE ROLE whippet_pw LOGIN PASSWORD 'whippet-pw';
    EXCEPTION WHEN duplicate_object THEN NULL; END \$\$"
}

# SIGINT is "fast": clients are cut off, the data is flushed.
postgres_stop() { terminate postgres INT 30; }

postgres_env() {
  echo "export WHIPPET_TEST_PG=postgres://postgres@127.0.0.1:$PG_PORT/postgres"
  echo "export WHIPPET_TEST_PG_PASSWORD_ROLE=postgres://whippet_pw:whippet-pw@127.0.0.1:$PG_PORT/postgres"
  echo "export WHIPPET_TEST_PG_PID=$(pid_file postgres)"
}
