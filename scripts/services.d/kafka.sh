# Apache Kafka from Maven Central: one KRaft node that is broker and controller.

KAFKA_VERSION=4.1.1
KAFKA_PORT=${WHIPPET_KAFKA_PORT:-19092}
KAFKA_CONTROLLER_PORT=${WHIPPET_KAFKA_CONTROLLER_PORT:-19093}
# For those who come through the proxy: this listener advertises it.
KAFKA_PROXIED_PORT=${WHIPPET_KAFKA_PROXIED_PORT:-19095}
KAFKA_HOME=$CACHE/kafka-$KAFKA_VERSION

kafka_install() {
  [ -d "$KAFKA_HOME" ] && command -v java >/dev/null && return
  command -v java >/dev/null || apt_need openjdk-17-jre-headless
  command -v mvn >/dev/null || apt_need maven
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

kafka_start() {
  local dir=$STATE/kafka
  # Everybody may do everything, until a test forbids something. Nothing is created by accident, and
  # one node holds every internal topic. Few partitions of those, and no wait for more members: a
  # consumer has its first record sooner.
  cat >"$dir/server.properties" <<CONF
process.roles=broker,controller
node.id=1
controller.quorum.bootstrap.servers=127.0.0.1:$KAFKA_CONTROLLER_PORT
listeners=PLAINTEXT://127.0.0.1:$KAFKA_PORT,PROXIED://127.0.0.1:$KAFKA_PROXIED_PORT,CONTROLLER://127.0.0.1:$KAFKA_CONTROLLER_PORT
advertised.listeners=PLAINTEXT://127.0.0.1:$KAFKA_PORT,PROXIED://127.0.0.1:${WHIPPET_TOXIPROXY_KAFKA_PORT:-19096}
listener.security.protocol.map=PLAINTEXT:PLAINTEXT,PROXIED:PLAINTEXT,CONTROLLER:PLAINTEXT
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
log.retention.hours=24
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
    -Dlog4j2.configurationFile="$dir/log4j2.properties" -cp "$KAFKA_HOME/libs/*" \
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
  echo "export WHIPPET_TEST_KAFKA_PID=$(pid_file kafka)"
  echo "export WHIPPET_TEST_KAFKA_LIBS=$KAFKA_HOME/libs"
}
