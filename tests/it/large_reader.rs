//! Large payloads that PostgreSQL sends come by connections of the relay's own: whatever lies between, and the driver
//! where these fail. The relay's log tells by which one a payload came.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use whippet::record::wire;

use crate::{
    harness::{Relay, SOON, World, kafka, service, services},
    large::noise,
    proxy::Proxy,
    stream_faults::{said, services_beside},
};

/// Too large to come along with its row, and small enough for a record.
const SIZE: usize = 900_000;
const OWN: &str = "a large payload came by a connection of its own";
const FAILS: &str = "a connection for large payloads fails";
/// Said at level debug.
const FAILS_AGAIN: &str = "a large payload comes by the driver";
const AGAIN: &str = "by connections of their own again";
const LOG: &str = "log: { level: debug }";
/// The connections of their own, in pg_stat_activity.
const THEIRS: &str =
    "FROM pg_stat_activity WHERE datname = current_database() AND application_name = 'whippet-payloads'";

/// A table of one topic, whose relay says what it does.
struct Stage {
    world: World,
    topic: String,
    /// Of a payload.
    size: usize,
    inserted: Vec<Vec<u8>>,
}

impl Stage {
    async fn new(name: &str) -> Stage {
        let world = World::new(name).await;
        let topic = world.create_topic("events", 1, &[]).await;
        world.install(&world.config("[{ name: outbox }]", "")).await;
        Stage { world, topic, size: SIZE, inserted: Vec::new() }
    }

    /// Reads from this server, by such a `source`.
    fn relay(&self, server: &str, source: &str) -> Relay {
        let url = format!("{}/{}", server.rsplit_once('/').unwrap().0, self.world.name);
        let table = "[{ name: outbox, payload: { oversize: chunk } }]";
        let config = self.world.config_for(&url, &kafka(), table, LOG).replace("lease: 2s", "lease: 1m");
        self.world.relay(&config.replace("source: {", &format!("source: {{ {source}")))
    }

    async fn insert(&mut self) {
        let payload = noise(self.inserted.len(), self.size);
        let insert = "INSERT INTO outbox (topic, key, payload) VALUES ($1, 'k', $2)";
        let insert = sqlx::query(insert).bind(&self.topic).bind(&payload);
        insert.execute(self.world.db.pg()).await.unwrap();
        self.inserted.push(payload);
    }

    async fn until_gone(&self) {
        self.world.until("SELECT count(*) FROM outbox", 0).await;
    }

    /// All that were inserted are there, whole and in order.
    fn check(&self) {
        let mut consumer = self.world.consumer(&self.topic);
        let mut found: Vec<(&str, BTreeMap<usize, &[u8]>)> = Vec::new();
        for record in consumer.read_to_end() {
            let id = record.header("id").unwrap();
            let index = record.header(wire::CHUNK_INDEX).map_or(0, |index| index.parse().unwrap());
            if found.iter().all(|(known, _)| *known != id) {
                found.push((id, BTreeMap::new()));
            }
            let (_, chunks) = found.iter_mut().find(|(known, _)| *known == id).unwrap();
            chunks.insert(index, record.payload.as_deref().unwrap());
        }
        let whole: Vec<Vec<u8>> =
            found.iter().map(|(_, chunks)| chunks.values().copied().flatten().copied().collect()).collect();
        let sizes = |payloads: &[Vec<u8>]| payloads.iter().map(Vec::len).collect::<Vec<_>>();
        assert!(whole == self.inserted, "{:?}, not {:?}", sizes(&whole), sizes(&self.inserted));
    }

    /// Three payloads, each by a connection of its own.
    async fn three_by_the_reader(mut self, relay: Relay) {
        for _ in 0..3 {
            self.insert().await;
        }
        self.until_gone().await;
        self.check();
        let (code, log) = relay.stop();
        assert_eq!((code, log.matches(OWN).count(), log.matches(FAILS).count()), (Some(0), 3, 0), "{log}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn large_payloads_of_every_type_are_what_the_table_has() {
    let world = World::new("readertypes").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let kinds = ["bytea", "text", "varchar", "json", "jsonb", "xml"];
    let tables: Vec<String> = kinds.iter().map(|kind| format!("{{ name: of_{kind} }}")).collect();
    let config = world.config(&format!("[{}]", tables.join(", ")), LOG);
    world.install(&config).await;
    for kind in kinds.iter().filter(|kind| **kind != "bytea") {
        world.sql(&format!("ALTER TABLE of_{kind} ALTER payload TYPE {kind} USING NULL")).await;
    }
    let relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    for (nth, kind) in kinds.into_iter().enumerate() {
        // jsonb has no such spaces, and no order of keys.
        let text = match kind {
            "json" | "jsonb" => format!(r#"{{"long":  "{}", "a": "ä"}}"#, "ö".repeat(SIZE / 2)),
            "xml" => format!("<a>{}</a>", "ö".repeat(SIZE / 2)),
            _ => "ö".repeat(SIZE / 2),
        };
        let value = if kind == "bytea" { "convert_to($2, 'UTF8')".to_owned() } else { format!("$2::{kind}") };
        let as_text = if kind == "bytea" { "convert_from(payload, 'UTF8')" } else { "payload::text" };
        let insert =
            format!("INSERT INTO of_{kind} (topic, payload) VALUES ($1, {value}) RETURNING {as_text}");
        let insert = sqlx::query_scalar(sqlx::AssertSqlSafe(insert)).bind(&topic).bind(&text);
        let inserted: String = insert.fetch_one(world.db.pg()).await.unwrap();
        // One after the other: there are two connections, for all tables.
        let seen = consumer.read(nth + 1)[nth].text();
        assert!(seen == inserted, "{kind}: {} bytes, not {}", seen.len(), inserted.len());
    }
    let (code, log) = relay.stop();
    assert_eq!((code, log.matches(OWN).count()), (Some(0), kinds.len()), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn large_payloads_come_by_tls_with_a_password_of_a_file() {
    let stage = Stage::new("readertls").await;
    let grant = "GRANT ALL ON SCHEMA public, whippet TO whippet_tls; ALTER TABLE outbox OWNER TO whippet_tls; \
                 GRANT ALL ON ALL TABLES IN SCHEMA whippet TO whippet_tls";
    stage.world.sql(grant).await;
    let server = service("WHIPPET_TEST_PG_TLS").replace(":whippet-tls@", "@");
    let password = stage.world.write("password", "whippet-tls\n");
    let tls = format!("mode: verify-full, ca_file: '{}'", service("WHIPPET_TEST_PG_CA"));
    let relay = stage.relay(&server, &format!("password_file: '{password}', tls: {{ {tls} }},"));
    stage.three_by_the_reader(relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn large_payloads_come_by_a_pooler_of_transactions() {
    services_beside("up", "pgbouncer").await;
    let stage = Stage::new("readerpooler").await;
    let relay = stage.relay(&format!("{}/", service("WHIPPET_TEST_PGBOUNCER")), "");
    stage.three_by_the_reader(relay).await;
    services_beside("down", "pgbouncer").await;
}

/// The driver has the payloads meanwhile, which is said once; and no longer than that.
#[tokio::test(flavor = "multi_thread")]
async fn connections_for_large_payloads_that_fail_are_said_once_and_used_again() {
    let proxy = Proxy::postgres();
    let mut stage = Stage::new("readercut").await;
    let server = format!("postgres://postgres@127.0.0.1:{}/", service("WHIPPET_TEST_PG_PROXIED_PORT"));
    let relay = stage.relay(&server, "");
    stage.insert().await;
    stage.until_gone().await;
    // One that was closed for being idle says nothing.
    stage.world.sql(&format!("SELECT pg_terminate_backend(pid) {THEIRS}")).await;
    stage.world.until(&format!("SELECT count(*) {THEIRS}"), 0).await;
    stage.insert().await;
    stage.until_gone().await;
    assert_eq!((said(&relay, OWN), said(&relay, FAILS)), (2, 0), "{}", relay.log());

    // None lives until its question has come to the server.
    proxy.latency(200);
    let ends = Arc::new(AtomicBool::new(false));
    let cutting = tokio::spawn({
        let (ends, db) = (ends.clone(), stage.world.db.pg().clone());
        async move {
            while !ends.load(Ordering::Relaxed) {
                let cut = format!("SELECT count(pg_terminate_backend(pid)) {THEIRS}");
                sqlx::query(sqlx::AssertSqlSafe(cut)).execute(&db).await.unwrap();
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        }
    });
    // One that fails is tried again some seconds later, and fails again.
    let deadline = Instant::now() + SOON;
    while said(&relay, FAILS_AGAIN) == 0 {
        assert!(Instant::now() < deadline, "{}", relay.log());
        stage.insert().await;
        stage.until_gone().await;
    }
    assert_eq!((said(&relay, OWN), said(&relay, FAILS), said(&relay, AGAIN)), (2, 1, 0), "{}", relay.log());

    ends.store(true, Ordering::Relaxed);
    cutting.await.unwrap();
    proxy.heal();
    let deadline = Instant::now() + SOON;
    while said(&relay, AGAIN) == 0 {
        assert!(Instant::now() < deadline, "{}", relay.log());
        stage.insert().await;
        stage.until_gone().await;
    }
    stage.check();
    let (code, log) = relay.stop();
    assert_eq!((code, log.matches(FAILS).count(), log.matches(AGAIN).count()), (Some(0), 1, 1), "{log}");
    assert!(log.matches(OWN).count() >= 3, "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_in_the_middle_of_a_large_payload_costs_nothing() {
    let proxy = Proxy::postgres();
    let mut stage = Stage::new("readerdies").await;
    let server = format!("postgres://postgres@127.0.0.1:{}/", service("WHIPPET_TEST_PG_PROXIED_PORT"));
    let relay = stage.relay(&server, "");
    // Two seconds for each: more than lies in between.
    proxy.limit_from(8 << 20);
    stage.size = 16 << 20;
    for _ in 0..2 {
        stage.insert().await;
    }
    stage.world.until(&format!("SELECT count(*) {THEIRS} AND state = 'active'"), 1).await;
    tokio::task::spawn_blocking(|| {
        services("kill", "postgres");
        services("up", "postgres");
    })
    .await
    .unwrap();
    proxy.heal();
    // The test's own pool has dead connections as well.
    while sqlx::query("SELECT 1").execute(stage.world.db.pg()).await.is_err() {}
    stage.until_gone().await;
    // While the server comes back the reader may fail, and then it is tried again some seconds later.
    let deadline = Instant::now() + SOON;
    loop {
        stage.insert().await;
        stage.until_gone().await;
        let log = relay.log();
        if log.matches(FAILS).count() == log.matches(AGAIN).count() {
            break;
        }
        assert!(Instant::now() < deadline, "{log}");
    }
    stage.check();
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(log.contains(OWN), "{log}");
}
