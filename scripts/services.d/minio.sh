# MinIO, an object store that speaks S3: one process and one folder.

MINIO_VERSION=v0.0.0-20260212201848-7aac2a2c5b7c
MINIO_PORT=$((${WHIPPET_MINIO_PORT:-19000} + SHIFT))
MINIO_USER=whippet
MINIO_PASSWORD=whippet-password
MINIO=$TOOLS/bin/minio

minio_install() {
  [ -x "$MINIO" ] && [ "$(cat "$TOOLS/minio.version" 2>/dev/null)" = "$MINIO_VERSION" ] && return
  command -v go >/dev/null || apt_need golang-go
  say "building MinIO $MINIO_VERSION into $TOOLS (once, some minutes)"
  mkdir -p "$TOOLS/bin" "$TOOLS/minio.new"
  GOBIN=$TOOLS/minio.new GOFLAGS=-modcacherw go install "github.com/minio/minio@$MINIO_VERSION" >&2
  mv -f "$TOOLS/minio.new/minio" "$MINIO"
  rm -rf "$TOOLS/minio.new"
  echo "$MINIO_VERSION" >"$TOOLS/minio.version"
}

minio_start() {
  MINIO_ROOT_USER=$MINIO_USER MINIO_ROOT_PASSWORD=$MINIO_PASSWORD MINIO_BROWSER=off MINIO_UPDATE=off \
    MINIO_SITE_REGION=us-east-1 \
    spawn minio "$MINIO" server --quiet --address "127.0.0.1:$MINIO_PORT" "$STATE/minio/data"
}

# It answers before it can store; this is what it says once it can.
minio_ready() {
  (
    exec 3<>"/dev/tcp/127.0.0.1/$MINIO_PORT" || exit 1
    printf 'GET /minio/health/cluster HTTP/1.1\r\nHost: minio\r\nConnection: close\r\n\r\n' >&3
    timeout 2 head -n 1 <&3 | grep -q ' 200 '
  ) 2>/dev/null
}

minio_stop() { terminate minio TERM 20; }

minio_env() {
  echo "export WHIPPET_TEST_S3=http://127.0.0.1:$MINIO_PORT"
  echo "export WHIPPET_TEST_S3_PID=$(pid_file minio)"
  echo "export WHIPPET_TEST_S3_KEY=$MINIO_USER"
  echo "export WHIPPET_TEST_S3_SECRET=$MINIO_PASSWORD"
}
