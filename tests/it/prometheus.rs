//! A real Prometheus that scrapes running relays with the rules that are shipped: each alert is fired on purpose, and
//! every query of the dashboard is run. How long each one waits before it fires is in tests/prometheus.

use std::{
    collections::BTreeSet,
    net::TcpListener,
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rdkafka::{
    ClientConfig,
    producer::{BaseProducer, Producer as _},
};
use serde_json::Value;

use crate::{
    exactly_once::{LEFT, one_table},
    harness::{Relay, SOON, World, kafka, path},
    ingest,
    stream::{drop_slot, follows, streamed},
    stream_faults::Setting,
};

/// Where nobody listens.
const NOBODY: &str = "127.0.0.1:9";
const INSERT: &str = "(topic, key, payload, headers) VALUES";

struct Prometheus {
    child: Child,
    address: String,
}

impl Prometheus {
    /// Scrapes each of `relays`, by the job that it is called like.
    fn start(folder: &Path, relays: &[(&str, &Relay)]) -> Prometheus {
        let shipped = std::fs::read_to_string(path("helm/whippet-sidecar/files/whippet.rules.yaml")).unwrap();
        // As they are shipped, but that none waits before it fires.
        let mut rules = String::new();
        for line in shipped.lines() {
            let waits = line.trim_start().starts_with("for: ");
            rules += &if waits { format!("{}for: 0s", " ".repeat(8)) } else { line.to_owned() };
            rules.push('\n');
        }
        std::fs::write(folder.join("rules.yaml"), rules).unwrap();
        let mut targets = String::new();
        for (job, relay) in relays {
            let target = format!("targets: ['{}'], labels: {{ namespace: it }}", relay.admin);
            targets += &format!("- {{ job_name: {job}, static_configs: [{{ {target} }}] }}\n");
        }
        let config = format!(
            "global: {{ scrape_interval: 200ms, scrape_timeout: 200ms, evaluation_interval: 200ms }}\n\
             rule_files: [rules.yaml]\nscrape_configs:\n{targets}"
        );
        std::fs::write(folder.join("prometheus.yaml"), config).unwrap();
        let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
        let log = std::fs::File::create(folder.join("prometheus.log")).unwrap();
        let child = Command::new("prometheus")
            .arg(format!("--config.file={}", folder.join("prometheus.yaml").display()))
            .arg(format!("--storage.tsdb.path={}", folder.join("tsdb").display()))
            .arg(format!("--web.listen-address={address}"))
            .stderr(log)
            .stdout(Stdio::null())
            .spawn()
            .expect("prometheus is missing: `scripts/chart install` has it, in the folder that scripts/test adds to PATH");
        Prometheus { child, address }
    }

    /// Waits until so many relays were scraped.
    async fn scrapes(&self, relays: usize) {
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.count("count by (job) (whippet_build_info)").ok() != Some(relays) {
            assert!(Instant::now() < deadline, "nothing is scraped");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    fn get(&self, path: &str) -> Option<Value> {
        let mut answer = ureq::get(format!("http://{}{path}", self.address)).call().ok()?;
        serde_json::from_str(&answer.body_mut().read_to_string().ok()?).ok()
    }

    /// How many series a query finds; what is wrong with it otherwise.
    fn count(&self, query: &str) -> Result<usize, String> {
        let coded = percent_encoding::utf8_percent_encode(query, percent_encoding::NON_ALPHANUMERIC);
        let answer = self.get(&format!("/api/v1/query?query={coded}")).ok_or("it is refused")?;
        answer["data"]["result"].as_array().map(Vec::len).ok_or_else(|| answer.to_string())
    }

    /// The alerts that fire, as `NAME job table`.
    fn firing(&self) -> BTreeSet<String> {
        let answer = self.get("/api/v1/alerts").unwrap_or_default();
        let alerts = answer["data"]["alerts"].as_array().cloned().unwrap_or_default();
        let firing = alerts.iter().filter(|alert| alert["state"] == "firing").map(|alert| {
            let label = |name: &str| alert["labels"][name].as_str().unwrap_or("-").to_owned();
            format!("{} {} {}", label("alertname"), label("job"), label("table"))
        });
        firing.collect()
    }

    /// Until every relay is taken to be there: a busy machine may miss a scrape.
    async fn until_none_is_down(&self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.firing().iter().any(|firing| firing.starts_with("WhippetDown")) {
            assert!(Instant::now() < deadline, "{:?}", self.firing());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn until_firing(&self, wanted: &[&str]) {
        let deadline = Instant::now() + Duration::from_secs(30);
        loop {
            let firing = self.firing();
            let missing: Vec<&&str> = wanted.iter().filter(|alert| !firing.contains(**alert)).collect();
            if missing.is_empty() {
                return;
            }
            assert!(Instant::now() < deadline, "{missing:?} do not fire, of what does:\n{firing:#?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

impl Drop for Prometheus {
    fn drop(&mut self) {
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// The queries of the dashboard, with its variables filled in.
fn dashboard() -> Vec<(String, String)> {
    let text = std::fs::read_to_string(path("helm/whippet-sidecar/files/dashboard.json")).unwrap();
    let dashboard: Value = serde_json::from_str(&text).unwrap();
    let panels = dashboard["panels"].as_array().unwrap();
    let targets = panels.iter().flat_map(|panel| {
        let title = panel["title"].as_str().unwrap().to_owned();
        panel["targets"]
            .as_array()
            .cloned()
            .unwrap_or_default()
            .into_iter()
            .map(move |target| (title.clone(), target))
    });
    targets
        .map(|(title, target)| {
            let query = target["expr"].as_str().unwrap().replace("$__rate_interval", "10s");
            (
                title,
                ["$namespace", "$job", "$table"].iter().fold(query, |query, name| query.replace(name, ".*")),
            )
        })
        .collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn alerts_fire_and_the_dashboard_has_something_to_show() {
    let world = World::new("prometheus").await;
    let topic = world.create_topic("events", 1, &[]).await;
    world.create_topic("events.dlq", 1, &[]).await;
    let config = world.config(
        "[{ name: outbox, capture: poll, headers: { deny: [secret] } }, { name: halting, capture: poll, on_failure: halt },
           { name: letters, capture: poll, on_failure: dead_letter }, { name: missing, capture: poll },
           { name: large, capture: poll, payload: { inline_max: 10B, oversize: claim_check } },
           { name: waiting, capture: poll }, { name: topicless, capture: poll }, { name: followed, capture: auto },
           { name: 'message:it', capture: stream, topic: events }]",
        "limits: { in_flight_events: 40 }\nobject_store: { url: 'file:///nowhere' }",
    );
    let slot = &world.name;
    let config = config.replace(
        "source: {",
        &format!(
            "source: {{ stream: {{ slot: '{slot}', publication: '{slot}', heartbeat: 1s, create: false }},"
        ),
    );
    world.install(&config.replace("create: false", "create: true")).await;
    world.sql("DROP TABLE missing").await;
    world.sql(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
    let relay = world.relay(&config);
    relay
        .until(|status| {
            let tables = status["tables"].as_array().unwrap();
            tables.iter().any(|table| table["name"] == "followed" && table["capture"] == "stream")
        })
        .await;
    // One whose database is not there, and one whose Kafka is not.
    let lost = World::config_for(
        &world,
        &format!("postgres://relay@{NOBODY}/shop"),
        NOBODY,
        "[{ name: outbox }]",
        "",
    );
    let lost = Relay::start(&world.write("lost.yaml", &lost));
    let spool = ingest::config_to(&world, NOBODY, &topic, "max_bytes: 1MiB", "");
    let spooling = Relay::start(&world.write("spool.yaml", &spool));
    let prometheus =
        Prometheus::start(world.folder.path(), &[("relay", &relay), ("lost", &lost), ("spool", &spooling)]);
    prometheus.scrapes(3).await;
    // Nothing of that fires by itself.
    prometheus.until_none_is_down().await;
    let calm = prometheus.firing();
    for alert in ["WhippetStalled", "WhippetParkedKeys", "WhippetTableHalted", "WhippetSlotInactive"] {
        assert!(!calm.iter().any(|firing| firing.starts_with(alert)), "{calm:?}");
    }

    relay.operate(&world, &["pause", "--table", "waiting"]);
    let paused = world.create_topic("paused", 1, &[]).await;
    relay.operate(&world, &["pause", "--table", "outbox", "--topic", &paused]);
    let nowhere = world.topic("nowhere");
    world
        .sql(&format!(
            "INSERT INTO outbox {INSERT} ('{topic}', 'a', 'x', '{{\"secret\": \"1\"}}'), ('{topic}', 'bad', 'x', '[7]'),
               ('{paused}', 'b', 'x', NULL);
             INSERT INTO halting {INSERT} ('{topic}', 'bad', 'x', '[7]');
             INSERT INTO letters {INSERT} ('{topic}', 'bad', 'x', '[7]');
             INSERT INTO large {INSERT} ('{topic}', 'large', 'more than ten bytes', NULL);
             INSERT INTO waiting (topic, payload, created_at) VALUES ('{topic}', 'x', now() - interval '2 minutes');
             INSERT INTO topicless (topic, key, payload) SELECT '{nowhere}', 'k' || i, 'x' FROM generate_series(1, 30) i;
             INSERT INTO followed {INSERT} ('{topic}', 'c', 'x', NULL)"
        ))
        .await;
    let address = ingest::address(&spooling);
    let payload = vec![b'x'; 100_000];
    while ingest::post(&address, &topic, "", &payload).code == 202 {}
    prometheus
        .until_firing(&[
            "WhippetLagging relay waiting",
            "WhippetStalled relay waiting",
            "WhippetParkedKeys relay outbox",
            "WhippetPaused relay outbox",
            "WhippetTableHalted relay halting",
            "WhippetDeadLetters relay letters",
            "WhippetOffloadFailing relay large",
            "WhippetTopicHeld relay topicless",
            "WhippetSourceFails relay missing",
            "WhippetNoOwner lost outbox",
            "WhippetStalled spool ingest",
            "WhippetSpoolFills spool -",
            "WhippetIngestRefuses spool -",
        ])
        .await;
    for (title, query) in dashboard() {
        let found = prometheus.count(&query);
        assert!(found.as_ref().is_ok_and(|series| *series > 0), "{title}: {query}: {found:?}");
    }
    // The log cannot be read any more, and a relay is gone.
    world.sql(&format!("DROP PUBLICATION {slot}")).await;
    lost.kill();
    prometheus
        .until_firing(&[
            "WhippetPollsInstead relay followed",
            "WhippetSlotInactive relay -",
            "WhippetDown lost -",
        ])
        .await;
    drop(prometheus);
    drop(relay);
    world
        .until(&format!("SELECT count(*) FROM pg_replication_slots WHERE slot_name = '{slot}' AND active"), 0)
        .await;
    world.sql(&format!("SELECT pg_drop_replication_slot('{slot}')")).await;
}

/// The log is kept while Kafka is away, a file is wrong, and the process gets no time again and again.
#[tokio::test(flavor = "multi_thread")]
async fn alerts_of_the_log_the_membership_and_the_configuration_fire() {
    let world = World::new("alerts").await;
    let config = streamed(&world, "{ name: outbox, capture: auto }")
        .replace(&format!("'{}'", kafka()), &format!("'{NOBODY}'"))
        .replace("stream: {", "stream: { max_retained_wal: 64MiB,")
        .replace("lease: 2s", "lease: 1s");
    world.install(&config).await;
    let _limit = Setting::new(&world, "max_slot_wal_keep_size", "64MB").await;
    let relay = world.relay(&config);
    follows(&relay).await;
    let prometheus = Prometheus::start(world.folder.path(), &[("relay", &relay)]);
    prometheus.scrapes(1).await;
    world.sql("INSERT INTO outbox (topic, payload) VALUES ('waits', 'x')").await;
    // The limit alone, small as it is, is nothing to be woken for.
    let safe = format!("whippet_slot_safe_bytes < {}", 100 << 20);
    let deadline = Instant::now() + Duration::from_secs(20);
    while prometheus.count(&safe) != Ok(1) {
        assert!(Instant::now() < deadline, "{}", relay.metric("whippet_slot_safe_bytes", ""));
        world.pause().await;
    }
    let calm = prometheus.firing();
    for alert in
        ["WhippetSlotRetainsMuch", "WhippetSlotNearItsEnd", "WhippetReloadFailed", "WhippetMembershipLost"]
    {
        assert!(!calm.iter().any(|firing| firing.starts_with(alert)), "{calm:?}");
    }
    // A segment each, with hardly anything in it.
    for _ in 0..3 {
        world.sql("SELECT pg_logical_emit_message(false, 'noise', 'x')").await;
        world.sql("SELECT pg_switch_wal()").await;
    }
    world.write("whippet.yaml", &config.replace("tables:", "tabels:"));
    relay.signal("HUP");
    prometheus
        .until_firing(&[
            "WhippetSlotRetainsMuch relay -",
            "WhippetSlotNearItsEnd relay -",
            "WhippetReloadFailed relay -",
        ])
        .await;
    let members = "SELECT count(*) FROM whippet.members WHERE expires_at > clock_timestamp()";
    for nth in 1..=3 {
        world.until(members, 1).await;
        relay.signal("STOP");
        world.until(members, 0).await;
        relay.signal("CONT");
        relay.wait_for_nth("the lease ran out before it was renewed", nth);
    }
    prometheus.until_firing(&["WhippetMembershipLost relay -"]).await;
    drop(prometheus);
    relay.kill();
    drop_slot(&world).await;
}

/// The relay of a copy of the source produces as the same unit.
#[tokio::test(flavor = "multi_thread")]
async fn the_alert_of_two_relays_that_fence_each_other_fires() {
    let (world, topic, config) = one_table("fencing").await;
    let relay = world.relay(&config);
    let prometheus = Prometheus::start(world.folder.path(), &[("relay", &relay)]);
    prometheus.scrapes(1).await;
    for fenced in 0..5 {
        // It produces by two ids in turn, one of which is fenced.
        let deadline = Instant::now() + SOON;
        loop {
            world
                .sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', 'x')"))
                .await;
            world.until(LEFT, 0).await;
            if relay.metric("whippet_unit_fenced_total", "") >= f64::from(fenced) {
                break;
            }
            assert!(Instant::now() < deadline, "{}", relay.log());
        }
        let unit =
            sqlx::query_scalar("SELECT unit FROM whippet.positions WHERE part < -1").fetch_one(world.db.pg());
        let unit: String = unit.await.unwrap();
        let other: BaseProducer = ClientConfig::new()
            .set("bootstrap.servers", kafka())
            .set("transactional.id", unit)
            .create()
            .unwrap();
        other.init_transactions(Duration::from_secs(20)).unwrap();
    }
    prometheus.until_firing(&["WhippetUnitFenced relay -"]).await;
    drop(prometheus);
    relay.kill();
}

#[test]
fn every_alert_is_fired() {
    let rules = std::fs::read_to_string(path("helm/whippet-sidecar/files/whippet.rules.yaml")).unwrap();
    let alerts: Vec<&str> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 15, "{alerts:?}");
    for alert in alerts {
        assert!(include_str!("prometheus.rs").contains(&format!("\"{alert} ")), "{alert} is not fired here");
    }
}
