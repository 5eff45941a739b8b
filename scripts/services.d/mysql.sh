# MySQL 9 from Debian's unstable suite, in a root of its own: the system is not touched, and its own
# loader runs it with the libraries that it was built for. The packages are cached.

MYSQL_PORT=$((${WHIPPET_MYSQL_PORT:-15307} + SHIFT))
MYSQL_PACKAGES=$CACHE/mysql-9

mysql_install() {
  command -v openssl >/dev/null || apt_need openssl
  # The client is for people: the tests do not need it, and the server needs no Perl.
  debian_unstable "$MYSQL_PACKAGES" mysql-server-core '^perl'
}

mysql_server() { # ARGUMENT..: the command
  local root=$STATE/mysql/root lib=usr/lib/x86_64-linux-gnu
  printf '%s\n' "$root/usr/lib64/ld-linux-x86-64.so.2" --library-path "$root/$lib:$root/usr/lib/mysql/private" \
    "$root/usr/sbin/mysqld" --no-defaults "--basedir=$root/usr" "--lc-messages-dir=$root/usr/share/mysql" \
    "--character-sets-dir=$root/usr/share/mysql/charsets" "--plugin-dir=$root/usr/lib/mysql/plugin" \
    --secure-file-priv=NULL --mysqlx=OFF
  [ $# = 0 ] || printf '%s\n' "$@"
}

mysql_start() {
  local dir=$STATE/mysql command deb accounts
  accounts=$(my_accounts "BY 'whippet-pw'")
  # Not run from the cache: that is in a home that the server's user may not look into.
  if [ ! -d "$dir/root" ]; then
    rm -rf "$dir/root.new"
    mkdir "$dir/root.new"
    for deb in "$MYSQL_PACKAGES"/*.deb; do dpkg-deb -x "$deb" "$dir/root.new"; done
    mv "$dir/root.new" "$dir/root"
  fi
  my_tls mysql
  if ! my_has_data mysql "$accounts"; then
    rm -rf "$dir"/data{,.new}
    mkdir "$dir/data.new"
    [ "$EUID" != 0 ] || chown nobody: "$dir/data.new"
    printf '%s\n' "$accounts" >"$dir/accounts.sql"
    mapfile -t command < <(mysql_server --initialize-insecure "--datadir=$dir/data.new" "--init-file=$dir/accounts.sql" "$(my_user)")
    "${command[@]}" >"$dir/install.log" 2>&1 || die "making the data folder failed; see $dir/install.log"
    mv "$dir/data.new" "$dir/data"
  fi
  mapfile -t command < <(
    mysql_server
    my_options mysql "$MYSQL_PORT"
    my_tls_options mysql
    printf '%s\n' --gtid-mode=ON --enforce-gtid-consistency=ON --binlog-transaction-compression=ON
  )
  my_forget_socket mysql
  spawn mysql "${command[@]}"
}

mysql_ready() { my_answers "$MYSQL_PORT"; }

mysql_stop() { terminate mysql TERM 30; }

mysql_env() { my_env mysql "$MYSQL_PORT"; }
