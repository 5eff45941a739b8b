# PgBouncer in front of the default PostgreSQL, which pools transactions. From Debian's unstable suite, in a root of
# its own: the stable one's is too old to keep prepared statements apart (1.21).

PGBOUNCER_PORT=$((${WHIPPET_PGBOUNCER_PORT:-15436} + SHIFT))
PGBOUNCER_PACKAGES=$CACHE/pgbouncer

pgbouncer_install() { debian_unstable "$PGBOUNCER_PACKAGES" pgbouncer '^perl\|^python\|^init-system\|^postgresql-common'; }

pgbouncer_start() {
  local dir=$STATE/pgbouncer lib=usr/lib/x86_64-linux-gnu deb
  if [ ! -d "$dir/root" ]; then
    rm -rf "$dir/root.new"
    mkdir "$dir/root.new"
    for deb in "$PGBOUNCER_PACKAGES"/*.deb; do dpkg-deb -x "$deb" "$dir/root.new"; done
    mv "$dir/root.new" "$dir/root"
  fi
  # Few connections to the server, so that one client's statements meet another's.
  cat >"$dir/pgbouncer.ini" <<CONF
[databases]
* = host=127.0.0.1 port=$PG_PORT user=postgres
[pgbouncer]
listen_addr = 127.0.0.1
listen_port = $PGBOUNCER_PORT
unix_socket_dir =
auth_type = any
pool_mode = transaction
default_pool_size = 3
max_prepared_statements = 200
server_idle_timeout = 10
ignore_startup_parameters = extra_float_digits
CONF
  [ "$EUID" != 0 ] || chown -R nobody: "$dir"
  local user=()
  [ "$EUID" != 0 ] || user=(setpriv --reuid=nobody --regid=nogroup --clear-groups)
  spawn pgbouncer "${user[@]}" "$dir/root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$dir/root/$lib" \
    "$dir/root/usr/sbin/pgbouncer" "$dir/pgbouncer.ini"
}

pgbouncer_ready() { (exec 3<>"/dev/tcp/127.0.0.1/$PGBOUNCER_PORT") 2>/dev/null; }

pgbouncer_stop() { terminate pgbouncer INT 10; }

pgbouncer_env() { echo "export WHIPPET_TEST_PGBOUNCER=postgres://postgres@127.0.0.1:$PGBOUNCER_PORT"; }
