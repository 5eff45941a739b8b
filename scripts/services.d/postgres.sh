# PostgreSQL from Debian, with a data folder of its own. It runs as the user `postgres` when we are
# root, because it refuses root. The functions pg_* are for pg17, pg17b and pg18 too.

PG_PORT=$((${WHIPPET_PG_PORT:-15432} + SHIFT))

pg_bin() { # the newest installed, or none
  local bin
  bin=$(printf '%s\n' /usr/lib/postgresql/*/bin | sort -V | tail -n 1)
  [ -x "$bin/initdb" ] && printf '%s\n' "$bin"
}

as_pg() { if [ "$EUID" = 0 ]; then runuser -u postgres -- "$@"; else "$@"; fi; }

pg_make() { # NAME BIN DATA: the data folder, if it is missing
  local dir=$STATE/$1
  [ "$EUID" != 0 ] || chown postgres: "$dir"
  cd "$dir" # initdb and postgres complain about a working folder that they may not read
  [ -f "$3/PG_VERSION" ] && return
  rm -rf "$3" "$3.new" # moved into place at the end, so that a half-made one is never used
  as_pg "$2/initdb" --pgdata "$3.new" --username postgres --auth trust --encoding UTF8 \
    --locale C.UTF-8 --no-instructions >"$dir/initdb.log" 2>&1 || die "initdb failed; see $dir/initdb.log"
  mv "$3.new" "$3"
}

pg_trust() { # the pg_hba.conf that lets everybody in
  cat <<'HBA'
host  all          all         127.0.0.1/32  trust
host  replication  all         127.0.0.1/32  trust
local all          all                       trust
local replication  all                       trust
HBA
}

# As durable as in production: fsync and synchronous_commit stay on. Room for WAL, so that a
# benchmark does not measure checkpoints.
pg_settings() { # NAME PORT SHARED_BUFFERS
  cat <<CONF
listen_addresses = '127.0.0.1'
port = $2
unix_socket_directories = '$STATE/$1'
external_pid_file = '$(pid_file "$1")'
wal_level = logical
max_connections = 200
max_wal_senders = 20
max_replication_slots = 20
fsync = on
synchronous_commit = on
shared_buffers = $3
max_wal_size = 4GB
log_line_prefix = '%m [%p] %q%u@%d '
CONF
}

# One that was killed leaves its children for a moment, and its process id until that is buried: the
# next one would take them for a server that runs, and refuse.
pg_lingers() { # DATA
  local pid
  if read -r pid 2>/dev/null <"$1/postmaster.pid" && grep -qs '^State:.Z' "/proc/$pid/status"; then return; fi
  [ -n "$(find /proc/[0-9]*/cwd -maxdepth 0 -lname "$(realpath "$1")" 2>/dev/null)" ]
}

pg_launch() { # NAME BIN DATA
  local deadline=$((SECONDS + 20))
  while pg_lingers "$3" && [ $SECONDS -lt $deadline ]; do sleep 0.05; done
  touch "$(log_file "$1")"
  [ "$EUID" != 0 ] || chown postgres: "$3"/{pg_hba,postgresql.auto}.conf "$(log_file "$1")"
  rm -f "$(pid_file "$1")"
  # Started by its own hand, not by spawn: runuser would be the process that the pid file names.
  as_pg "$2/pg_ctl" start --no-wait --silent --pgdata "$3" --log "$(log_file "$1")" 9>&-
  # The server writes external_pid_file itself, a little later.
  until running "$1" || [ $SECONDS -ge $deadline ]; do sleep 0.05; done
}

pg_answers() { "$(pg_bin)/pg_isready" --quiet --host 127.0.0.1 --port "$1"; } # PORT

pg_psql() { # PORT ARGUMENT..
  "$(pg_bin)/psql" --quiet --no-psqlrc --host 127.0.0.1 --port "$1" --username postgres --dbname postgres \
    --set ON_ERROR_STOP=1 "${@:2}"
}

postgres_install() {
  command -v openssl >/dev/null || apt_need openssl
  pg_bin >/dev/null && return
  # Debian's package makes and starts a server on port 5432; nobody asked for that one.
  apt_need postgresql-common
  as_root sed -i 's/^#* *create_main_cluster.*/create_main_cluster = false/' /etc/postgresql-common/createcluster.conf
  apt_need postgresql
}

# A CA, and a certificate from it for the names that the tests connect to. The CA's key goes: it signs
# nothing else.
postgres_tls() {
  local tls=$STATE/postgres/tls new=$STATE/postgres/tls.new
  local key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
  [ -f "$tls/server.key" ] && return
  rm -rf "$tls" "$new"
  mkdir "$new"
  {
    openssl req -x509 "${key[@]}" -days 3650 -subj "/CN=whippet test CA" -keyout "$new/ca.key" -out "$new/ca.crt" &&
      openssl req "${key[@]}" -subj "/CN=localhost" -keyout "$new/server.key" -out "$new/server.csr" &&
      openssl x509 -req -in "$new/server.csr" -CA "$new/ca.crt" -CAkey "$new/ca.key" -CAcreateserial -days 3650 \
        -extfile <(printf '%s\n' basicConstraints=critical,CA:FALSE extendedKeyUsage=serverAuth \
          subjectAltName=DNS:localhost,IP:127.0.0.1) -out "$new/server.crt"
  } >"$STATE/postgres/tls.log" 2>&1 || die "making certificates failed; see $STATE/postgres/tls.log"
  rm "$new"/{ca.key,ca.srl,server.csr}
  chmod 755 "$STATE/postgres" "$new"
  chmod 644 "$new"/*.crt
  chmod 600 "$new/server.key"
  [ "$EUID" != 0 ] || chown -R postgres: "$new"
  mv "$new" "$tls"
}

postgres_start() {
  local bin data tls=$STATE/postgres/tls
  bin=$(pg_bin)
  data=$STATE/postgres/data-$(basename "$(dirname "$bin")")
  pg_make postgres "$bin" "$data"
  postgres_tls
  # whippet_pw needs its password, for the tests of a wrong one; whippet_tls needs TLS and its password.
  {
    cat <<'HBA'
hostssl   all          whippet_tls  127.0.0.1/32  scram-sha-256
hostssl   replication  whippet_tls  127.0.0.1/32  scram-sha-256
hostnossl all          whippet_tls  127.0.0.1/32  reject
hostnossl replication  whippet_tls  127.0.0.1/32  reject
local     all          whippet_tls                reject
local     replication  whippet_tls                reject
host      all          whippet_pw   127.0.0.1/32  scram-sha-256
HBA
    pg_trust
  } >"$data/pg_hba.conf"
  {
    pg_settings postgres "$PG_PORT" "${WHIPPET_PG_SHARED_BUFFERS:-256MB}"
    printf "%s\n" "ssl = on" "ssl_cert_file = '$tls/server.crt'" "ssl_key_file = '$tls/server.key'"
  } >"$data/postgresql.auto.conf"
  pg_launch postgres "$bin" "$data"
}

postgres_ready() { pg_answers "$PG_PORT"; }

postgres_after() {
  pg_psql "$PG_PORT" --command "DO \$\$ BEGIN
      CREATE ROLE whippet_pw LOGIN PASSWORD 'whippet-pw';
    EXCEPTION WHEN duplicate_object THEN NULL; END \$\$" --command "DO \$\$ BEGIN
      CREATE ROLE whippet_tls LOGIN REPLICATION PASSWORD 'whippet-tls';
    EXCEPTION WHEN duplicate_object THEN NULL; END \$\$"
}

# SIGINT is "fast": clients are cut off, the data is flushed.
postgres_stop() { terminate postgres INT 30; }

postgres_env() {
  echo "export WHIPPET_TEST_PG=postgres://postgres@127.0.0.1:$PG_PORT/postgres"
  echo "export WHIPPET_TEST_PG_PASSWORD_ROLE=postgres://whippet_pw:whippet-pw@127.0.0.1:$PG_PORT/postgres"
  echo "export WHIPPET_TEST_PG_TLS=postgres://whippet_tls:whippet-tls@localhost:$PG_PORT/postgres"
  echo "export WHIPPET_TEST_PG_CA=$STATE/postgres/tls/ca.crt"
  echo "export WHIPPET_TEST_PG_PID=$(pid_file postgres)"
}
