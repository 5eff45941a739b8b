//! Everything that `whippet doctor` fails with, broken on purpose and mended by what it printed.

use std::{
    process::Command,
    time::{Duration, Instant},
};

use serde_json::Value;

use crate::{
    harness::{SOON, World, kafka, run_on, service, services, services_with, whippet},
    kafka_identity::{tls, token},
    stream::{drop_slot, of_slot, streamed},
};

fn findings(config: &str) -> (Option<i32>, Vec<Value>) {
    let output = whippet(&["doctor", "--json", "--config", config]);
    assert!(output.stderr.is_empty(), "{output:?}");
    (output.status.code(), serde_json::from_slice(&output.stdout).unwrap())
}

pub fn fails(config: &str) -> Vec<Value> {
    let (code, findings) = findings(config);
    let fails: Vec<Value> = findings.into_iter().filter(|finding| finding["verdict"] == "FAIL").collect();
    assert_eq!(code, Some(i32::from(!fails.is_empty())), "{fails:#?}");
    fails
}

/// The FAILs, once they are so: Kafka's tools have the controller's word, and a broker takes it up a moment later.
pub fn fails_once(config: &str, wanted: impl Fn(&[Value]) -> bool) -> Vec<Value> {
    let deadline = Instant::now() + SOON;
    loop {
        let fails = fails(config);
        if wanted(&fails) || Instant::now() >= deadline {
            return fails;
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

pub fn is_green(config: &str) {
    assert_eq!(fails_once(config, <[Value]>::is_empty), [Value::Null; 0]);
}

/// The only FAIL, which is of this check, and its fix of this kind.
pub fn fix(config: &str, check: &str, kind: &str) -> String {
    let fails = fails(config);
    let [fail] = &fails[..] else { panic!("not one FAIL of {check}: {fails:#?}") };
    assert_eq!(fail["check"], check, "{fail}");
    fail["fix"][kind].as_str().unwrap_or_else(|| panic!("{fail}")).to_owned()
}

/// The handshakes of some dozen runs take longer than the runs.
pub fn without_tls(config: &str) -> String {
    config.replace("source: {", "source: { tls: { mode: disable },")
}

/// Breaks something and mends it, one after the other.
pub async fn break_and_mend(world: &World, config: &str, breaks: &[(&str, &str)]) {
    for (statement, check) in breaks {
        world.sql(statement).await;
        let fix = fix(config, check, "sql");
        world.sql(&fix).await;
        is_green(config);
    }
}

/// A role of the world's own, without rights; taken away at the end, before its database.
pub struct Role(String, pub String);

impl Role {
    pub async fn of(world: &World) -> Role {
        world.sql(&format!("CREATE ROLE {} LOGIN", world.name)).await;
        Role(world.url.clone(), world.name.clone())
    }

    pub fn url(&self, world: &World) -> String {
        world.url.replace("postgres@", &format!("{}@", self.1))
    }
}

impl Drop for Role {
    fn drop(&mut self) {
        let (rights, role) = (format!("DROP OWNED BY {}", self.1), format!("DROP ROLE {}", self.1));
        run_on(&self.0, &[&rights, &role]).unwrap();
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn rights_tables_and_order_of_postgresql() {
    let world = World::new("fix_pg").await;
    let role = Role::of(&world).await;
    world.sql("CREATE SCHEMA app").await;
    let tables = "[{ name: outbox }, { name: marked, after_publish: mark }, { name: app.events }]";
    let text = without_tls(&world.config_for(&role.url(&world), &kafka(), tables, ""));
    let config = world.write("whippet.yaml", &text);
    // Nothing is there, and the role may do nothing.
    let all = fails(&config);
    let checks: Vec<&str> = all.iter().map(|fail| fail["check"].as_str().unwrap()).collect();
    let (own, table) = ("postgres: the relay's own tables", "postgres: table");
    assert_eq!(checks, [own, table, table, "postgres: grants"], "{all:#?}");
    for fail in &all {
        world.sql(fail["fix"]["sql"].as_str().unwrap()).await;
    }
    world.sql(&fix(&config, table, "sql")).await;
    is_green(&config);

    let name = &role.1;
    let own_grants = format!("REVOKE INSERT ON whippet.holds FROM {name}");
    let read_only = format!("ALTER ROLE {name} SET default_transaction_read_only = on");
    let (select, delete) =
        (format!("REVOKE SELECT ON outbox FROM {name}"), format!("REVOKE DELETE ON outbox FROM {name}"));
    let update = format!("REVOKE UPDATE (published_at) ON marked FROM {name}");
    let usage = format!("REVOKE USAGE ON SCHEMA app FROM {name}");
    break_and_mend(
        &world,
        &config,
        &[
            ("ALTER SEQUENCE outbox_seq_seq CACHE 50", "postgres: order"),
            ("ALTER SEQUENCE outbox_seq_seq INCREMENT BY -1", "postgres: order"),
            ("ALTER SEQUENCE app.events_seq_seq CYCLE", "postgres: order"),
            ("ALTER TABLE outbox DROP COLUMN payload", table),
            ("ALTER TABLE marked DROP COLUMN published_at, DROP COLUMN topic", table),
            ("ALTER TABLE outbox DROP COLUMN seq", table),
            ("DROP TABLE app.events", table),
            ("DROP TABLE whippet.holds", own),
            (&own_grants, own),
            (&select, "postgres: grants"),
            (&delete, "postgres: grants"),
            (&update, "postgres: grants"),
            (&usage, "postgres: grants"),
            ("ALTER TABLE outbox ENABLE ROW LEVEL SECURITY", "postgres: grants"),
            (&read_only, "postgres: server"),
        ],
    )
    .await;
    // And a relay is content with what is there now.
    let relay = crate::harness::Relay::start(&config);
    for table in 0..3 {
        relay.until_status(&format!("/tables/{table}/state"), "running").await;
    }
    assert_eq!(relay.stop().0, Some(0));
    let bad = world.config_for("postgres://postgres@127.0.0.1:9/none", &kafka(), tables, "");
    let bad = fails(&world.write("bad.yaml", &bad));
    assert!(bad[0]["says"].as_str().unwrap().contains("connect to the source database"), "{bad:#?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_log_of_postgresql() {
    let world = World::new("fix_log").await;
    let role = Role::of(&world).await;
    let (name, url) = (&world.name, role.url(&world));
    let text = streamed(&world, "{ name: outbox, capture: stream }, { name: other, capture: stream }")
        .replace("heartbeat: 1s", "heartbeat: 1s, create: false")
        .replace(&world.url, &url);
    let config = world.write("whippet.yaml", &without_tls(&text));
    let outbox = "{ name: outbox }, { name: other }";
    world.install(&world.config_for(&url, &kafka(), &format!("[{outbox}]"), "")).await;
    let (publication, slot, replication) =
        ("postgres: publication", "postgres: slot", "postgres: replication");
    let all = fails(&config);
    let checks: Vec<&str> = all.iter().map(|fail| fail["check"].as_str().unwrap()).collect();
    assert_eq!(checks, [replication, publication, slot], "{all:#?}");
    for fail in &all {
        world.sql(fail["fix"]["sql"].as_str().unwrap()).await;
    }
    is_green(&config);
    let no_table = format!("ALTER PUBLICATION {name} DROP TABLE other");
    let no_inserts = format!("ALTER PUBLICATION {name} SET (publish = 'delete')");
    let some_rows = format!(
        "ALTER PUBLICATION {name} DROP TABLE other; ALTER PUBLICATION {name} ADD TABLE other WHERE (seq > 5)"
    );
    let some_columns = format!(
        "ALTER PUBLICATION {name} DROP TABLE other; ALTER PUBLICATION {name} ADD TABLE other (seq, id)"
    );
    let (none, no_slot) =
        (format!("DROP PUBLICATION {name}"), format!("SELECT pg_drop_replication_slot('{name}')"));
    let no_replication = format!("ALTER ROLE {name} NOREPLICATION");
    break_and_mend(
        &world,
        &config,
        &[
            (&no_table, publication),
            (&no_inserts, publication),
            (&some_rows, publication),
            (&some_columns, publication),
            (&none, publication),
            (&no_slot, slot),
            (&no_replication, replication),
        ],
    )
    .await;
    // A slot of another kind, and another name for ours.
    world.sql(&no_slot).await;
    world.sql(&format!("SELECT pg_create_physical_replication_slot('{name}')")).await;
    let other = fix(&config, slot, "config");
    assert!(other.starts_with("source.stream.slot:"), "{other}");
    drop_slot(&world).await;
    assert_eq!(world.number(&of_slot(&world, "count(*)")).await, 0);
}

/// What only a restart of the server takes up.
#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_server() {
    let replica = || services_with("restart", "pg18", &[("WHIPPET_PG18_WAL_LEVEL", "replica")]);
    tokio::task::spawn_blocking(replica).await.unwrap();
    let world = World::on(&service("WHIPPET_TEST_PG18"), "fix_wal").await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    let config = world.write("whippet.yaml", &streamed(&world, "{ name: outbox }"));
    world.sql(&fix(&config, "postgres: wal_level", "sql")).await;
    let next = "SELECT count(*) FROM (SELECT setting FROM pg_file_settings WHERE name = 'wal_level' ORDER BY seqno DESC LIMIT 1) last WHERE setting = 'logical'";
    assert_eq!(world.number(next).await, 1);
    tokio::task::spawn_blocking(|| services("restart", "pg18")).await.unwrap();
    is_green(&config);
    // All slots are taken.
    world
        .sql("DO $$ BEGIN FOR n IN 1..current_setting('max_replication_slots')::int LOOP PERFORM pg_create_physical_replication_slot('taken_' || n); END LOOP; END $$")
        .await;
    let more = fix(&config, "postgres: slot", "sql");
    world.sql(&more).await;
    world.sql("SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name LIKE 'taken%'").await;
    let raised = "SELECT count(*) FROM (SELECT setting FROM pg_file_settings WHERE name = 'max_replication_slots' ORDER BY seqno DESC LIMIT 1) last WHERE setting = '30'";
    assert_eq!(world.number(raised).await, 1);
    world.sql("ALTER SYSTEM SET max_replication_slots = 20").await;
    is_green(&config);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pooler_that_loses_notifications() {
    tokio::task::spawn_blocking(|| services("up", "pgbouncer")).await.unwrap();
    let world = World::new("fix_pooler").await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    let url = format!("{}/{}", service("WHIPPET_TEST_PGBOUNCER"), world.name);
    let text = world.config_for(&url, &kafka(), "[{ name: outbox, poll: { wake: notify } }]", "");
    let fix = fix(&world.write("whippet.yaml", &text), "postgres: pooler", "config");
    assert_eq!(fix, "poll.wake: none");
    is_green(&world.write("whippet.yaml", &text.replace("wake: notify", "wake: none")));
    // The log does not come through it at all.
    let text = streamed(&world, "{ name: outbox, capture: stream }");
    let pooled = world.write("whippet.yaml", &text.replace(&world.url, &url));
    let fix = self::fix(&pooled, "postgres: replication", "config");
    assert_eq!(fix, "source.url: (the address of the server itself, not of a pooler)");
    is_green(&world.write("whippet.yaml", &text));
    tokio::task::spawn_blocking(|| services("down", "pgbouncer")).await.unwrap();
}

/// Runs a command that may use the tools that Kafka has.
pub fn shell(world: &World, command: &str) -> std::process::Child {
    let libs = service("WHIPPET_TEST_KAFKA_LIBS");
    let classes = [
        ("topics", "org.apache.kafka.tools.TopicCommand"),
        ("configs", "kafka.admin.ConfigCommand"),
        ("acls", "org.apache.kafka.tools.AclCommand"),
    ];
    for (tool, class) in classes {
        // Another command may run it just now: then it cannot be written (ETXTBSY).
        if world.folder.path().join(format!("kafka-{tool}.sh")).exists() {
            continue;
        }
        let script = format!(
            "#!/bin/sh\nexec java -Xmx128m -XX:TieredStopAtLevel=1 -cp '{libs}/*' {class} \"$@\" >/dev/null\n"
        );
        let file = world.write(&format!("kafka-{tool}.sh"), &script);
        let made = Command::new("chmod").args(["+x", &file]).status().unwrap();
        assert!(made.success());
    }
    let path = format!("{}:{}", world.folder.path().display(), std::env::var("PATH").unwrap());
    Command::new("sh").args(["-c", command]).env("PATH", &path).spawn().unwrap()
}

/// Each topic is wrong in its own way; all are mended at once, by tools as Kafka has them.
#[tokio::test(flavor = "multi_thread")]
async fn topics() {
    let world = World::new("fix_topics").await;
    let strict = world.create_topic("strict", 1, &[("min.insync.replicas", "2")]).await;
    let small = world.create_topic("small", 1, &[("max.message.bytes", "1000")]).await;
    let compact = world.create_topic("compact", 1, &[("cleanup.policy", "compact")]).await;
    let missing = world.topic("missing");
    let tables = format!(
        "[{{ name: a, topic: '{strict}' }}, {{ name: b, topic: '{small}', payload: {{ inline_max: 10KiB, oversize: park }} }}, \
          {{ name: c, topic: '{compact}', payload: {{ oversize: chunk }} }}, {{ name: d, topic: '{missing}' }}]"
    );
    let text = world.config(&tables, "");
    world.install(&text).await;
    let config = world.write("whippet.yaml", &text);
    let found = fails(&config);
    let checks: Vec<&str> = found.iter().map(|fail| fail["check"].as_str().unwrap()).collect();
    assert_eq!(checks, ["kafka: topics", "kafka: topics", "kafka: topics", "kafka: chunks"], "{found:#?}");
    let running: Vec<std::process::Child> =
        found.iter().map(|fail| shell(&world, fail["fix"]["shell"].as_str().unwrap())).collect();
    for mut one in running {
        assert!(one.wait().unwrap().success());
    }
    // The tools have the controller's word; a broker takes it up a moment later.
    let deadline = Instant::now() + SOON;
    while !fails(&config).is_empty() && Instant::now() < deadline {
        world.pause().await;
    }
    is_green(&config);
    let away = text.replace(&kafka(), "127.0.0.1:9");
    let fix = fix(&world.write("away.yaml", &away), "kafka: brokers", "config");
    assert!(fix.starts_with("kafka.bootstrap_servers:"), "{fix}");
}

/// Without a token nobody answers: that is all that is said.
#[tokio::test(flavor = "multi_thread")]
async fn a_token_for_kafka() {
    let world = World::new("fix_token").await;
    let servers = service("WHIPPET_TEST_KAFKA_SASL");
    let text = world.config_for(&world.url, &servers, "[{ name: outbox }]", "");
    world.install(&text).await;
    let file = world.write("kafka-token", &token(0));
    let by_file = format!(
        "'{servers}', token_file: '{file}', properties: {{ security.protocol: SASL_SSL, \
         sasl.mechanisms: OAUTHBEARER, ssl.ca.location: '{}/ca.crt' }}",
        tls()
    );
    let config = world.write("whippet.yaml", &text.replace(&format!("'{servers}'"), &by_file));
    let fix = fix(&config, "kafka: token", "config");
    assert!(fix.starts_with("kafka.token_file, kafka.token_command:"), "{fix}");
    world.write("kafka-token", &token(60));
    is_green(&config);
}

#[tokio::test(flavor = "multi_thread")]
async fn mariadb() {
    rights_and_settings("WHIPPET_TEST_MARIADB").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mysql() {
    rights_and_settings("WHIPPET_TEST_MYSQL").await;
}

async fn rights_and_settings(server: &str) {
    struct Back(String, String);
    impl Drop for Back {
        fn drop(&mut self) {
            let user = format!("DROP USER IF EXISTS '{}'@'127.0.0.1'", self.1);
            let settings =
                "SET GLOBAL read_only = OFF, GLOBAL binlog_format = 'ROW', GLOBAL binlog_row_image = 'FULL'";
            run_on(&self.0, &[settings, &user]).unwrap();
        }
    }
    let world = World::on(&service(server), "fix_my").await;
    let user = format!("fix_{}", &world.name[world.name.len() - 8..]);
    let _back = Back(service(server), user.clone());
    world.sql(&format!("CREATE USER '{user}'@'127.0.0.1'")).await;
    let tables = "[{ name: outbox }, { name: marked, after_publish: mark }]";
    world.install(&world.config(tables, "")).await;
    let account = format!("'{user}'@'127.0.0.1'");
    // To connect at all.
    world.sql(&format!("GRANT CREATE TEMPORARY TABLES ON {}.* TO {account}", world.name)).await;
    let url = world.url.replace("whippet@", &format!("{user}@"));
    let streamed = world.config_for(&url, &kafka(), tables, "").replace("source: {", "source: { stream: {},");
    let config = world.write("whippet.yaml", &streamed);
    // One after the other: what is not to be seen cannot be told.
    for _ in 0..20 {
        let Some(fail) = fails(&config).into_iter().next() else { break };
        let sql = fail["fix"]["sql"].as_str().unwrap_or_else(|| panic!("{fail}")).to_owned();
        world.sql(&sql).await;
    }
    is_green(&config);
    let (own, table, server, binlog) =
        ("mysql: the relay's own tables", "mysql: table", "mysql: server", "mysql: binlog");
    let no_delete = format!("REVOKE DELETE ON {}.outbox FROM {account}", world.name);
    let no_update = format!("REVOKE UPDATE (published_at) ON {}.marked FROM {account}", world.name);
    let no_own = format!("REVOKE INSERT ON {}.whippet_holds FROM {account}", world.name);
    let no_client = format!("REVOKE REPLICATION CLIENT ON *.* FROM {account}");
    break_and_mend(
        &world,
        &config,
        &[
            (&no_delete, table),
            (&no_update, table),
            (&no_own, own),
            (&no_client, binlog),
            ("ALTER TABLE outbox DROP COLUMN payload", table),
            ("ALTER TABLE outbox ENGINE = MyISAM", table),
            ("SET GLOBAL read_only = ON", server),
            ("SET GLOBAL binlog_row_image = 'MINIMAL'", binlog),
        ],
    )
    .await;
    // Of this both have something to say, and one statement mends both.
    world.sql("SET GLOBAL binlog_format = 'STATEMENT'").await;
    let both = fails(&config);
    assert_eq!(both.len(), 2, "{both:#?}");
    assert_eq!(both[0]["fix"], both[1]["fix"]);
    world.sql(both[0]["fix"]["sql"].as_str().unwrap()).await;
    is_green(&config);
}

#[test]
fn sqlite_and_the_spool() {
    let folder = tempfile::tempdir().unwrap();
    let (file, config) = (folder.path().join("app.db"), folder.path().join("whippet.yaml"));
    let text = |spool: &str| {
        format!(
            "source: {{ url: 'sqlite://{}' }}\nkafka: {{ bootstrap_servers: '{}' }}\ntables: [{{ name: outbox }}]\n\
             ingest: {{ topics: [a], spool: '{spool}', max_bytes: 1MiB }}\n",
            file.display(),
            kafka()
        )
    };
    let spool = folder.path().join("spool").display().to_string();
    std::fs::write(&config, text(&spool)).unwrap();
    let config = config.display().to_string();
    assert_eq!(
        fix(&config, "sqlite: file", "config"),
        "source.url: (a file that is there and can be opened)"
    );
    let run = |sql: &str| {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            use sqlx::{AssertSqlSafe, Connection as _, SqliteConnection};
            let url = format!("sqlite://{}?mode=rwc", file.display());
            let mut connection = SqliteConnection::connect(&url).await.unwrap();
            sqlx::raw_sql(AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
            connection.close().await.unwrap();
        });
    };
    run("SELECT 1; CREATE TABLE other (n INTEGER)");
    run(&fix(&config, "sqlite: table", "sql"));
    is_green(&config);
    run("ALTER TABLE outbox DROP COLUMN payload");
    run(&fix(&config, "sqlite: table", "sql"));
    is_green(&config);
    // A folder that is none.
    std::fs::write(&config, text(&format!("{}/spool", file.display()))).unwrap();
    let wanted = fix(&config, "ingest: spool", "config");
    assert!(wanted.starts_with("ingest.spool: "), "{wanted}");
    std::fs::write(&config, text(&spool)).unwrap();
    is_green(&config);
}
