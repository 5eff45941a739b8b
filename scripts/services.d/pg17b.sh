# A streaming standby of pg17, which keeps a copy of pg17's logical slots that have `failover`. It starts
# pg17 if it needs it to make the copy. Once promoted it is a server of its own, until it is reset.

PG17B_PORT=$((${WHIPPET_PG17B_PORT:-15418} + SHIFT))

pg17b_install() { pg17_install; }

pg17b_start() {
  local data=$STATE/pg17b/data
  # pg17 was reset since: this standby could never follow it.
  if [ -f "$data/standby.signal" ] && [ -d "$STATE/pg17/data" ] && ! pg17b_is_copy; then rm -rf "$data"; fi
  if [ ! -f "$data/PG_VERSION" ]; then
    up pg17
    pg17b_copy
  fi
  # After the primary is back, 5 s until the next try is a long time for a test.
  pg_maven_start pg17b "$PG17_VERSION" "$PG17B_PORT" "\
primary_conninfo = 'host=127.0.0.1 port=$PG17_PORT user=postgres dbname=postgres application_name=pg17b'
primary_slot_name = 'pg17b'
hot_standby_feedback = on
sync_replication_slots = on
wal_retrieve_retry_interval = 500ms"
}

# A control file begins with the system identifier: initdb makes it, and copies have the same.
pg17b_is_copy() { cmp --quiet --bytes=8 "$STATE/pg17/data/global/pg_control" "$STATE/pg17b/data/global/pg_control"; }

# What pg_basebackup does, by hand: the jar has none, and Debian's refuses a newer server. The session
# that begins a backup must end it, so psql itself runs tar. The standby fetches all WAL by its slot.
pg17b_copy() {
  local dir=$STATE/pg17b data=$STATE/pg17b/data new=$STATE/pg17b/data.new
  rm -rf "$data" "$new"
  [ "$EUID" != 0 ] || chown postgres: "$dir"
  cd "$dir"
  as_pg mkdir --mode 700 "$new"
  # tar's 1 is a file that changed or went away while it was read: the WAL has what is missing.
  cat >"$dir/copy.sh" <<'COPY'
tar --create --directory "$1" --exclude='./pg_wal/*' --exclude='./pg_replslot/*' \
  --exclude=./postmaster.pid --exclude=./postmaster.opts --exclude='pgsql_tmp*' . >"$2/copy.tar" || [ $? = 1 ] || exit
tar --extract --directory "$2/data.new" --file "$2/copy.tar" && touch "$2/copied"
COPY
  chmod a+r "$dir/copy.sh"
  rm -f "$dir/copied"
  as_pg "$(pg_bin)/psql" --quiet --no-psqlrc --no-align --tuples-only --host 127.0.0.1 --port "$PG17_PORT" \
    --username postgres --dbname postgres --set ON_ERROR_STOP=1 >"$dir/copy.log" 2>&1 <<SQL ||
SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = 'pg17b';
SELECT pg_create_physical_replication_slot('pg17b', true);
SELECT pg_backup_start('pg17b', true);
\! sh ${dir@Q}/copy.sh ${STATE@Q}/pg17/data ${dir@Q}
SELECT labelfile FROM pg_backup_stop(false) \g '$new/backup_label'
SQL
    die "copying pg17 failed; see $dir/copy.log"
  [ -f "$dir/copied" ] || die "copying pg17 failed; see $dir/copy.log"
  as_pg touch "$new/standby.signal"
  rm -f "$dir"/{copy.tar,copy.sh,copied}
  mv "$new" "$data"
}

pg17b_ready() { pg_answers "$PG17B_PORT"; }

# From here on pg17 gives a logical slot with failover only what the standby has too.
pg17b_after() { if running pg17 && pg17_has_standby; then pg17_wait_for pg17b; fi; }

# Not after a kill: a standby that is lost is one of the things to test.
pg17b_stop() {
  if running pg17 && pg17_ready; then pg17_wait_for ''; fi
  terminate pg17b INT 30
}

pg17b_env() { echo "export WHIPPET_TEST_PG17B=postgres://postgres@127.0.0.1:$PG17B_PORT/postgres"; }
