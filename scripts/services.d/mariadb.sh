# MariaDB from Debian, with a data folder of its own. The package is the server alone: nothing is made
# or started by it. It runs as `nobody` when we are root. The functions my_* are for mysql too.

MARIADB_PORT=$((${WHIPPET_MARIADB_PORT:-15306} + SHIFT))

my_user() { [ "$EUID" != 0 ] || printf '%s\n' --user=nobody; }

# As durable as in production, and with a log that can be followed.
my_options() { # NAME PORT
  printf '%s\n' --bind-address=127.0.0.1 "--port=$2" "--datadir=$STATE/$1/data" \
    "--socket=$STATE/$1/data/server.sock" "--pid-file=$STATE/$1/data/server.pid" \
    --log-bin=binlog --binlog-format=ROW --binlog-row-metadata=FULL "--server-id=$2" \
    --sync-binlog=1 --innodb-flush-log-at-trx-commit=1 --innodb-buffer-pool-size=256M \
    --character-set-server=utf8mb4 --max-allowed-packet=64M --max-connections=200 --skip-name-resolve \
    --default-time-zone=+02:00 # nobody may rely on it
  my_user
}

# A CA, and a certificate from it for the names that the tests connect to. The CA's key stays: tests sign the
# certificates of clients.
my_tls() { # NAME
  local tls=$STATE/$1/tls new=$STATE/$1/tls.new
  local key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
  [ -f "$tls/ca.key" ] && return
  rm -rf "$tls" "$new"
  mkdir "$new"
  {
    openssl req -x509 "${key[@]}" -days 3650 -subj "/CN=whippet test CA" -keyout "$new/ca.key" -out "$new/ca.crt" &&
      openssl req "${key[@]}" -subj "/CN=localhost" -keyout "$new/server.key" -out "$new/server.csr" &&
      openssl x509 -req -in "$new/server.csr" -CA "$new/ca.crt" -CAkey "$new/ca.key" -CAcreateserial -days 3650 \
        -extfile <(printf '%s\n' basicConstraints=critical,CA:FALSE extendedKeyUsage=serverAuth \
          subjectAltName=DNS:localhost) -out "$new/server.crt"
  } >"$STATE/$1/tls.log" 2>&1 || die "making certificates failed; see $STATE/$1/tls.log"
  rm "$new"/{ca.srl,server.csr}
  chmod 755 "$STATE/$1" "$new"
  chmod 644 "$new"/*.crt
  chmod 600 "$new"/*.key
  [ "$EUID" != 0 ] || chown -R nobody: "$new"
  mv "$new" "$tls"
}

my_tls_options() { # NAME
  printf '%s\n' "--ssl-ca=$STATE/$1/tls/ca.crt" "--ssl-cert=$STATE/$1/tls/server.crt" "--ssl-key=$STATE/$1/tls/server.key"
}

# One that was killed leaves them, and its process id until that is buried: the next one would take them for
# a server that runs, and refuse.
my_forget_socket() { rm -f "$STATE/$1"/data/server.{sock,sock.lock,pid}; }

# It says its version to everybody who connects.
my_answers() { # PORT
  (exec 3<>"/dev/tcp/127.0.0.1/$1" && timeout 2 head -c 5 <&3 | grep -q .) 2>/dev/null
}

# What the tests connect as: `whippet` may do all, the others have a password and their ways to tell it.
my_accounts() { # WHAT THE LAST ONE AUTHENTICATES BY
  cat <<SQL
CREATE USER whippet@'127.0.0.1', whippet@localhost;
GRANT ALL ON *.* TO whippet@'127.0.0.1' WITH GRANT OPTION;
GRANT ALL ON *.* TO whippet@localhost WITH GRANT OPTION;
CREATE USER whippet_pw@'%' IDENTIFIED $1;
GRANT ALL ON *.* TO whippet_pw@'%';
CREATE USER whippet_tls@'%' IDENTIFIED $1 REQUIRE SSL;
GRANT ALL ON *.* TO whippet_tls@'%';
SQL
}

# Whether there is a data folder with these accounts: one that an earlier script has made may have others.
my_has_data() { # NAME ACCOUNTS
  [ -d "$STATE/$1/data" ] && [ "$(cat "$STATE/$1/accounts.sql" 2>/dev/null)" = "$2" ]
}

my_env() { # NAME PORT
  echo "export WHIPPET_TEST_${1^^}=mysql://whippet@127.0.0.1:$2"
  echo "export WHIPPET_TEST_${1^^}_PASSWORD=mysql://whippet_pw:whippet-pw@127.0.0.1:$2"
  echo "export WHIPPET_TEST_${1^^}_TLS=mysql://whippet_tls:whippet-pw@localhost:$2"
  echo "export WHIPPET_TEST_${1^^}_CA=$STATE/$1/tls/ca.crt"
}

mariadb_install() {
  command -v openssl >/dev/null || apt_need openssl
  [ -x /usr/sbin/mariadbd ] || apt_need mariadb-server-core
  mariadb_plugin >/dev/null
}

# The plugin for ed25519 is in the package that makes a server; only the one file is taken out of it.
mariadb_plugin() {
  local folder=$CACHE/mariadb-plugin
  if [ ! -f "$folder/auth_ed25519.so" ]; then
    say "fetching MariaDB's plugin for ed25519"
    rm -rf "$folder.new"
    mkdir -p "$folder.new"
    (cd "$folder.new" && apt-get -qq -o APT::Sandbox::User= download mariadb-server >&2 && dpkg-deb -x mariadb-server_*.deb . &&
      mv usr/lib/mysql/plugin/auth_ed25519.so . && rm -rf usr etc var lib mariadb-server_*.deb)
    mv "$folder.new" "$folder"
  fi
  printf '%s\n' "$folder"
}

mariadb_start() {
  local dir=$STATE/mariadb options accounts more
  accounts=$(my_accounts "VIA ed25519 USING PASSWORD('whippet-pw')")
  mkdir -p "$dir/plugin"
  cp "$(mariadb_plugin)/auth_ed25519.so" "$dir/plugin/"
  my_tls mariadb
  if ! my_has_data mariadb "$accounts"; then
    rm -rf "$dir"/data{,.new}
    mkdir "$dir/data.new"
    printf '%s\n' "$accounts" >"$dir/accounts.sql"
    {
      mariadb_bootstrap
      echo "INSTALL SONAME 'auth_ed25519';"
      cat "$dir/accounts.sql"
    } >"$dir/bootstrap.sql"
    /usr/sbin/mariadbd --no-defaults --bootstrap --datadir="$dir/data.new" --plugin-dir="$dir/plugin" \
      --lc-messages-dir=/usr/share/mysql <"$dir/bootstrap.sql" >"$dir/install.log" 2>&1 ||
      die "making the data folder failed; see $dir/install.log"
    [ "$EUID" != 0 ] || chown -R nobody: "$dir/data.new"
    mv "$dir/data.new" "$dir/data"
  fi
  mapfile -t options < <(my_options mariadb "$MARIADB_PORT"; my_tls_options mariadb)
  my_forget_socket mariadb
  # Some settings are the server's from its start: what a test wants otherwise comes last.
  read -ra more <<<"${WHIPPET_MARIADB_OPTIONS:-}"
  spawn mariadb /usr/sbin/mariadbd --no-defaults "${options[@]}" --plugin-dir="$dir/plugin" --gtid-strict-mode=1 "${more[@]}"
}

# What mariadb-install-db feeds it; that one wants an operating system's user for the server.
mariadb_bootstrap() {
  printf '%s;\n' "CREATE DATABASE mysql" "USE mysql" "SET @auth_root_socket = NULL" # one a line
  cat /usr/share/mysql/{mysql_system_tables,mysql_performance_tables,mysql_system_tables_data,fill_help_tables,maria_add_gis_sp_bootstrap,mysql_sys_schema}.sql
  echo "FLUSH PRIVILEGES;"
}

mariadb_ready() { my_answers "$MARIADB_PORT"; }

mariadb_stop() { terminate mariadb TERM 30; }

mariadb_env() { my_env mariadb "$MARIADB_PORT"; }
