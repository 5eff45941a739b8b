# Apache Kafka from Maven Central: one KRaft node that is broker and controller.

KAFKA_VERSION=4.1.1
KAFKA_PORT=$((${WHIPPET_KAFKA_PORT:-19092} + SHIFT))
KAFKA_CONTROLLER_PORT=$((${WHIPPET_KAFKA_CONTROLLER_PORT:-19093} + SHIFT))
# WHIPPET_KAFKA_MORE has more lines for server.properties.
# For those who come through the proxy: this listener advertises it.
KAFKA_PROXIED_PORT=$((${WHIPPET_KAFKA_PROXIED_PORT:-19095} + SHIFT))
# With TLS: SASL asks for SCRAM-SHA-512 or OAUTHBEARER, MTLS for a certificate of the client.
KAFKA_SASL_PORT=$((${WHIPPET_KAFKA_SASL_PORT:-$((KAFKA_PORT - SHIFT + 40))} + SHIFT))
KAFKA_MTLS_PORT=$((${WHIPPET_KAFKA_MTLS_PORT:-$((KAFKA_PORT - SHIFT + 41))} + SHIFT))
KAFKA_HOME=$CACHE/kafka-$KAFKA_VERSION

kafka_install() {
  [ -d "$KAFKA_HOME" ] && command -v java >/dev/null && return
  command -v java >/dev/null || apt_need openjdk-17-jre-headless
  command -v mvn >/dev/null || apt_need maven
  command -v openssl >/dev/null || apt_need openssl
  command -v python3 >/dev/null || apt_need python3
  say "downloading Kafka $KAFKA_VERSION (93 jars, 54 MB) to $KAFKA_HOME"
  local new=$KAFKA_HOME.new
  rm -rf "$new"
  mkdir -p "$new"
  cat >"$new/pom.xml" <<POM
<project xmlns="http://maven.apache.org/POM/4.0.0">
  <modelVersion>4.0.0</modelVersion>
  <groupId>whippet</groupId><artifactId>kafka</artifactId><version>1</version><packaging>pom</packaging>
  <dependencies>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka_2.13</artifactId><version>$KAFKA_VERSION</version></dependency>
    <dependency><groupId>org.apache.kafka</groupId><artifactId>kafka-tools</artifactId><version>$KAFKA_VERSION</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-slf4j-impl</artifactId><version>2.25.1</version></dependency>
    <dependency><groupId>org.apache.logging.log4j</groupId><artifactId>log4j-core</artifactId><version>2.25.1</version></dependency>
  </dependencies>
</project>
POM
  mvn --quiet --batch-mode --file "$new/pom.xml" dependency:copy-dependencies -DoutputDirectory="$new/libs" >&2
  rm -rf "$KAFKA_HOME"
  mv "$new" "$KAFKA_HOME" # at the end, so that a half-made one is never used
}

# A CA, a certificate from it for the broker, and the key of an issuer of tokens. The tests sign clients'
# certificates and tokens with these keys.
kafka_tls() {
  local tls=$STATE/kafka/tls new=$STATE/kafka/tls.new
  local key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
  [ -f "$tls/jwks.json" ] && return
  rm -rf "$tls" "$new"
  mkdir "$new"
  {
    openssl req -x509 "${key[@]}" -days 3650 -subj "/CN=whippet test CA" -keyout "$new/ca.key" -out "$new/ca.crt" &&
      openssl req "${key[@]}" -subj "/CN=broker" -keyout "$new/broker.key" -out "$new/broker.csr" &&
      openssl x509 -req -in "$new/broker.csr" -CA "$new/ca.crt" -CAkey "$new/ca.key" -CAcreateserial -days 3650 \
        -extfile <(printf '%s\n' basicConstraints=critical,CA:FALSE extendedKeyUsage=serverAuth \
          subjectAltName=DNS:localhost,IP:127.0.0.1) -out "$new/broker.crt" &&
      cat "$new/broker.key" "$new/broker.crt" >"$new/broker.pem" &&
      openssl genrsa -out "$new/issuer.key" 2048 &&
      openssl rsa -in "$new/issuer.key" -noout -modulus >"$new/modulus" &&
      python3 - "$new/modulus" >"$new/jwks.json" <<'JWKS'
import base64, json, sys
modulus = bytes.fromhex(open(sys.argv[1]).read().strip().partition("=")[2])
coded = base64.urlsafe_b64encode(modulus).decode().rstrip("=")
print(json.dumps({"keys": [{"kty": "RSA", "use": "sig", "alg": "RS256", "kid": "test", "e": "AQAB", "n": coded}]}))
JWKS
  } >"$STATE/kafka/tls.log" 2>&1 || die "making certificates failed; see $STATE/kafka/tls.log"
  mv "$new" "$tls"
}

kafka_start() {
  local dir=$STATE/kafka tls=$STATE/kafka/tls
  kafka_tls
  # Everybody may do everything, until a test forbids something. Nothing is created by accident, and
  # one node holds every internal topic. Few partitions of those, and no wait for more members: a
  # consumer has its first record sooner. A broker that was killed is let in again when its session has ended.
  cat >"$dir/server.properties" <<CONF
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:$KAFKA_CONTROLLER_PORT
listeners=PLAINTEXT://127.0.0.1:$KAFKA_PORT,PROXIED://127.0.0.1:$KAFKA_PROXIED_PORT,CONTROLLER://127.0.0.1:$KAFKA_CONTROLLER_PORT,SASL://127.0.0.1:$KAFKA_SASL_PORT,MTLS://127.0.0.1:$KAFKA_MTLS_PORT
advertised.listeners=PLAINTEXT://127.0.0.1:$KAFKA_PORT,PROXIED://127.0.0.1:$((${WHIPPET_TOXIPROXY_KAFKA_PORT:-19096} + SHIFT)),SASL://127.0.0.1:$KAFKA_SASL_PORT,MTLS://127.0.0.1:$KAFKA_MTLS_PORT
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT,SASL:SASL_SSL,MTLS:SSL
ssl.keystore.type=PEM
ssl.keystore.location=$tls/broker.pem
ssl.truststore.type=PEM
ssl.truststore.location=$tls/ca.crt
listener.name.mtls.ssl.client.auth=required
listener.name.sasl.sasl.enabled.mechanisms=SCRAM-SHA-512,OAUTHBEARER
listener.name.sasl.scram-sha-512.sasl.jaas.config=org.apache.kafka.common.security.scram.ScramLoginModule required;
listener.name.sasl.oauthbearer.sasl.jaas.config=org.apache.kafka.common.security.oauthbearer.OAuthBearerLoginModule required;
listener.name.sasl.oauthbearer.sasl.server.callback.handler.class=org.apache.kafka.common.security.oauthbearer.OAuthBearerValidatorCallbackHandler
listener.name.sasl.oauthbearer.sasl.oauthbearer.jwks.endpoint.url=file://$tls/jwks.json
listener.name.sasl.oauthbearer.sasl.oauthbearer.expected.audience=kafka
listener.name.sasl.oauthbearer.connections.max.reauth.ms=3600000
inter.broker.listener.name=PLAINTEXT
controller.listener.names=CONTROLLER
log.dirs=$dir/data
auto.create.topics.enable=false
authorizer.class.name=org.apache.kafka.metadata.authorizer.StandardAuthorizer
allow.everyone.if.no.acl.found=true
min.insync.replicas=1
offsets.topic.replication.factor=1
offsets.topic.num.partitions=4
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
transaction.state.log.num.partitions=4
share.coordinator.state.topic.replication.factor=1
share.coordinator.state.topic.min.isr=1
share.coordinator.state.topic.num.partitions=4
group.initial.rebalance.delay.ms=0
broker.heartbeat.interval.ms=500
broker.session.timeout.ms=4000
log.retention.hours=24
${WHIPPET_KAFKA_MORE:-}
CONF
  cat >"$dir/log4j2.properties" <<'CONF'
rootLogger.level = INFO
rootLogger.appenderRef.out.ref = out
appender.out.type = Console
appender.out.name = out
appender.out.layout.type = PatternLayout
appender.out.layout.pattern = %d %p %m (%c)%n
CONF
  if [ ! -f "$dir/data/meta.properties" ]; then
    rm -rf "$dir/data"
    # The cluster id is any 16 bytes, as base64url: here "whippet-local-01".
    kafka_java kafka.tools.StorageTool format --standalone --cluster-id d2hpcHBldC1sb2NhbC0wMQ \
      --config "$dir/server.properties" >"$dir/format.log" 2>&1 || die "formatting failed; see $dir/format.log"
  fi
  spawn kafka java -Xmx1g -Xms256m -XX:+UseG1GC -XX:MaxGCPauseMillis=20 -Djava.awt.headless=true \
    -Dlog4j2.configurationFile="$dir/log4j2.properties" \
    -Dorg.apache.kafka.sasl.oauthbearer.allowed.urls="file://$tls/jwks.json" -cp "$KAFKA_HOME/libs/*" \
    kafka.Kafka "$dir/server.properties"
}

# Also handy by hand: scripts/services kafka-topics --list is not a verb, this is what one would run.
kafka_java() { java -Xmx256m -XX:TieredStopAtLevel=1 -cp "$KAFKA_HOME/libs/*" "$@"; }

# The log says that this start has got as far as leaders and all; the broker's answer to ApiVersions
# (version 0, correlation id 1, no client id) says that it is still there.
kafka_ready() {
  grep -q -m 1 'Kafka Server started' "$(log_file kafka)" 2>/dev/null || return
  (
    exec 3<>"/dev/tcp/127.0.0.1/$KAFKA_PORT" || exit 1
    printf '\0\0\0\012\0\022\0\0\0\0\0\001\377\377' >&3
    [ "$(timeout 2 head -c 8 <&3 | od -An -tx1 -j4 | tr -d ' \n')" = 00000001 ]
  ) 2>/dev/null
}

kafka_stop() { terminate kafka TERM 30; }

kafka_env() {
  echo "export WHIPPET_TEST_KAFKA=127.0.0.1:$KAFKA_PORT"
  echo "export WHIPPET_TEST_KAFKA_SASL=localhost:$KAFKA_SASL_PORT"
  echo "export WHIPPET_TEST_KAFKA_MTLS=localhost:$KAFKA_MTLS_PORT"
  echo "export WHIPPET_TEST_KAFKA_TLS=$STATE/kafka/tls"
  echo "export WHIPPET_TEST_KAFKA_PID=$(pid_file kafka)"
  echo "export WHIPPET_TEST_KAFKA_LIBS=$KAFKA_HOME/libs"
}
