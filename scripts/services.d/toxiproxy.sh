# Toxiproxy between the relay and its services, for network faults: one proxy each for Kafka,
# PostgreSQL, pg17, MariaDB, MySQL and MinIO. Kafka has a listener of its own that advertises the proxy.

TOXIPROXY_VERSION=2.12.0
TOXIPROXY_PORT=$((${WHIPPET_TOXIPROXY_PORT:-18474} + SHIFT))
TOXIPROXY_KAFKA_PORT=$((${WHIPPET_TOXIPROXY_KAFKA_PORT:-19096} + SHIFT))
TOXIPROXY_PG_PORT=$((${WHIPPET_TOXIPROXY_PG_PORT:-15433} + SHIFT))
TOXIPROXY_PG17_PORT=$((${WHIPPET_TOXIPROXY_PG17_PORT:-15434} + SHIFT))
TOXIPROXY_MARIADB_PORT=$((${WHIPPET_TOXIPROXY_MARIADB_PORT:-15308} + SHIFT))
TOXIPROXY_MYSQL_PORT=$((${WHIPPET_TOXIPROXY_MYSQL_PORT:-15309} + SHIFT))
TOXIPROXY_MINIO_PORT=$((${WHIPPET_TOXIPROXY_MINIO_PORT:-19001} + SHIFT))
TOXIPROXY=$TOOLS/bin/toxiproxy-server

toxiproxy_install() {
  [ -x "$TOXIPROXY" ] && [ "$(cat "$TOOLS/toxiproxy.version" 2>/dev/null)" = "$TOXIPROXY_VERSION" ] && return
  command -v go >/dev/null || apt_need golang-go
  say "building Toxiproxy $TOXIPROXY_VERSION into $TOOLS"
  mkdir -p "$TOOLS/bin" "$TOOLS/toxiproxy.new"
  GOBIN=$TOOLS/toxiproxy.new GOFLAGS=-modcacherw \
    go install "github.com/Shopify/toxiproxy/v2/cmd/server@v$TOXIPROXY_VERSION" >&2
  mv -f "$TOOLS/toxiproxy.new/server" "$TOXIPROXY"
  rm -rf "$TOOLS/toxiproxy.new"
  echo "$TOXIPROXY_VERSION" >"$TOOLS/toxiproxy.version"
}

toxiproxy_start() {
  local file=$STATE/toxiproxy/proxies.json
  cat >"$file" <<JSON
[
  { "name": "kafka", "listen": "127.0.0.1:$TOXIPROXY_KAFKA_PORT", "upstream": "127.0.0.1:$KAFKA_PROXIED_PORT", "enabled": true },
  { "name": "postgres", "listen": "127.0.0.1:$TOXIPROXY_PG_PORT", "upstream": "127.0.0.1:$PG_PORT", "enabled": true },
  { "name": "pg17", "listen": "127.0.0.1:$TOXIPROXY_PG17_PORT", "upstream": "127.0.0.1:$PG17_PORT", "enabled": true },
  { "name": "mariadb", "listen": "127.0.0.1:$TOXIPROXY_MARIADB_PORT", "upstream": "127.0.0.1:$MARIADB_PORT", "enabled": true },
  { "name": "mysql", "listen": "127.0.0.1:$TOXIPROXY_MYSQL_PORT", "upstream": "127.0.0.1:$MYSQL_PORT", "enabled": true },
  { "name": "minio", "listen": "127.0.0.1:$TOXIPROXY_MINIO_PORT", "upstream": "127.0.0.1:$MINIO_PORT", "enabled": true }
]
JSON
  spawn toxiproxy "$TOXIPROXY" -host 127.0.0.1 -port "$TOXIPROXY_PORT" -config "$file"
}

# It answers HTTP once all proxies listen.
toxiproxy_ready() {
  (
    exec 3<>"/dev/tcp/127.0.0.1/$TOXIPROXY_PORT" || exit 1
    printf 'GET /proxies HTTP/1.0\r\n\r\n' >&3
    timeout 2 cat <&3 | grep -q '"minio"'
  ) 2>/dev/null
}

toxiproxy_stop() { terminate toxiproxy TERM 10; }

toxiproxy_env() {
  echo "export WHIPPET_TEST_TOXIPROXY=http://127.0.0.1:$TOXIPROXY_PORT"
  echo "export WHIPPET_TEST_KAFKA_PROXIED=127.0.0.1:$TOXIPROXY_KAFKA_PORT"
  echo "export WHIPPET_TEST_PG_PROXIED_PORT=$TOXIPROXY_PG_PORT"
  echo "export WHIPPET_TEST_PG17_PROXIED_PORT=$TOXIPROXY_PG17_PORT"
  echo "export WHIPPET_TEST_MARIADB_PROXIED_PORT=$TOXIPROXY_MARIADB_PORT"
  echo "export WHIPPET_TEST_MYSQL_PROXIED_PORT=$TOXIPROXY_MYSQL_PORT"
  echo "export WHIPPET_TEST_S3_PROXIED=http://127.0.0.1:$TOXIPROXY_MINIO_PORT"
}
