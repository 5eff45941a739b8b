//! The configuration changes while the relay runs and rows are written.

use std::{
    collections::HashSet,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::task::JoinHandle;

use crate::{
    checker::{Written, check},
    db::Session,
    exactly_once::exactly,
    harness::{Relay, Seen, World, calm, service, whippet},
    proxy::Proxy,
    stream::streamed,
};

/// Writes into one table until it is told to end.
struct Writers {
    stop: Arc<AtomicBool>,
    tasks: Vec<JoinHandle<Vec<Written>>>,
}

impl Writers {
    fn start(world: &World, table: &str, topic: &str) -> Writers {
        let stop = Arc::new(AtomicBool::new(false));
        let write = |writer: u64| {
            let (url, table, topic) = (world.url.clone(), table.to_owned(), topic.to_owned());
            tokio::spawn(write(url, table, topic, writer, stop.clone()))
        };
        Writers { tasks: (0..2).map(write).collect(), stop }
    }

    async fn end(self) -> Vec<Written> {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Vec::new();
        for task in self.tasks {
            all.extend(task.await.unwrap());
        }
        all
    }
}

async fn write(
    url: String,
    table: String,
    topic: String,
    writer: u64,
    stop: Arc<AtomicBool>,
) -> Vec<Written> {
    let mut session = Session::open(&url).await.unwrap();
    let mut all = Vec::new();
    for number in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        session.run("BEGIN").await.unwrap();
        let mut rows = Vec::new();
        for nth in 0..fastrand::usize(1..6) {
            let (id, key) = (uuid::Uuid::new_v4().to_string(), format!("key-{}", fastrand::u32(0..20)));
            let (payload, inserted) = (format!("{table} {number} {nth}").into_bytes(), Instant::now());
            // The others have their topic from the configuration.
            let (column, topic) = match table.as_str() {
                "outbox" => (", topic", format!(", '{topic}'")),
                _ => ("", String::new()),
            };
            let values = format!("'{id}', '{key}', {}{topic}", session.bytes(&payload));
            let insert = format!("INSERT INTO {table} (id, key, payload{column}) VALUES ({values})");
            session.run(&insert).await.unwrap();
            rows.push(Written {
                id,
                key,
                payload,
                transaction: number * 2 + writer,
                inserted,
                nth,
                committed: None,
            });
        }
        session.run("COMMIT").await.unwrap();
        let committed = Some(Instant::now());
        all.extend(rows.into_iter().map(|row| Written { committed, ..row }));
        // Some hundreds of rows a second are load enough.
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    all
}

/// What is in each of the topics: every row is in one of them, and in order within it.
struct Split {
    counts: Vec<usize>,
    /// Within a topic, and of rows that are in another one too.
    repeats: usize,
}

fn split(world: &World, written: &[Written], topics: &[&str]) -> Split {
    let mut all: HashSet<String> = HashSet::new();
    let (mut counts, mut repeats) = (Vec::new(), 0);
    for topic in topics {
        let seen: Vec<Seen> = world.consumer(topic).read_committed().to_vec();
        let ids: HashSet<String> =
            seen.iter().map(|record| record.header("id").unwrap().to_owned()).collect();
        let rows: Vec<Written> = written.iter().filter(|row| ids.contains(&row.id)).cloned().collect();
        repeats += check(&rows, &seen).repeats;
        counts.push(seen.len());
        repeats += ids.into_iter().filter(|id| !all.insert(id.clone())).count();
    }
    assert_eq!(all.len(), written.len(), "{topics:?}");
    Split { counts, repeats }
}

/// Every row is in one of the topics, once, and in order within it. Returns how many are in each.
fn check_split(world: &World, written: &[Written], topics: &[&str]) -> Vec<usize> {
    let Split { counts, repeats } = split(world, written, topics);
    assert_eq!(repeats, 0, "{topics:?}");
    counts
}

/// A file as Kubernetes has it in a ConfigMap: a link to a file in a linked folder, and that link is exchanged.
fn swap(folder: &Path, version: &str, text: &str) {
    let data = folder.join(version);
    std::fs::create_dir(&data).unwrap();
    std::fs::write(data.join("whippet.yaml"), text).unwrap();
    let (next, link) = (folder.join("..data_tmp"), folder.join("..data"));
    std::os::unix::fs::symlink(version, &next).unwrap();
    std::fs::rename(next, link).unwrap();
    let file = folder.join("whippet.yaml");
    if !file.exists() {
        std::os::unix::fs::symlink("..data/whippet.yaml", file).unwrap();
    }
}

fn success(relay: &Relay) -> f64 {
    relay.metric("whippet_config_last_reload_success", "")
}

fn names(relay: &Relay) -> Vec<String> {
    let status = relay.status();
    let tables = status["tables"].as_array().unwrap().iter();
    tables.map(|table| table["name"].as_str().unwrap().to_owned()).collect()
}

async fn until_more(relay: &Relay, labels: &str, more: f64) {
    let before = relay.metric("whippet_events_published_total", labels);
    let deadline = Instant::now() + Duration::from_secs(30);
    while relay.metric("whippet_events_published_total", labels) < before + more {
        assert!(Instant::now() < deadline, "{labels} does not flow: {}\n{}", relay.status(), relay.log());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn tables_come_change_and_go_and_the_others_do_not_notice() {
    let world = World::new("reload").await;
    let mut topics = Vec::new();
    for name in ["same", "before", "after", "gone", "new"] {
        topics.push(world.create_topic(name, 3, &[]).await);
    }
    let [same, before, after, gone, new] = &topics[..] else { unreachable!() };
    let table = |name: &str, topic: &str| format!("{{ name: {name}, topic: '{topic}' }}");
    let (one, moving, moved) = ("{ name: outbox }".to_owned(), table("moved", before), table("moved", after));
    let (going, coming) = (table("gone", gone), table("new", new));
    let of = |tables: &[&String]| {
        let tables: Vec<&str> = tables.iter().map(|table| table.as_str()).collect();
        calm(&world.config(&format!("[{}]", tables.join(", ")), ""))
    };
    world.install(&of(&[&one, &moving, &going, &coming])).await;

    let folder = world.folder.path().join("config");
    std::fs::create_dir(&folder).unwrap();
    let file = folder.join("whippet.yaml").display().to_string();
    swap(&folder, "v1", &of(&[&one, &moving, &going]));
    let relay = Relay::start(&file);
    let mut writers = Vec::new();
    for (name, topic) in [("outbox", same), ("moved", before), ("gone", gone), ("new", new)] {
        writers.push(Writers::start(&world, name, topic));
    }
    for name in ["outbox", "moved", "gone"] {
        until_more(&relay, &format!("table=\"{name}\""), 100.0).await;
    }
    let epoch = relay.metric("whippet_membership_epoch", "");

    // One comes, and one has another topic.
    let second = of(&[&one, &moved, &going, &coming]);
    swap(&folder, "v2", &second);
    relay.wait_for("\"started\":\"moved, new\"");
    assert_eq!(names(&relay), ["outbox", "moved", "gone", "new"]);
    until_more(&relay, &format!("topic=\"{after}\""), 100.0).await;
    until_more(&relay, "table=\"new\"", 100.0).await;

    // A file that is wrong is refused with the words of `validate`, and all goes on.
    swap(&folder, "v3", &second.replace("topic:", "topc:"));
    let refused = relay.wait_for("the configuration is refused");
    let validated = whippet(&["validate", "--config", &file]);
    assert_eq!(validated.status.code(), Some(78));
    let said = String::from_utf8(validated.stderr).unwrap();
    assert_eq!(refused["error"].as_str().unwrap().trim(), said.trim());
    assert!(said.contains("did you mean"), "{said}");
    assert_eq!(success(&relay), 0.0);
    until_more(&relay, &format!("topic=\"{after}\""), 50.0).await;

    // Mended it is what runs.
    swap(&folder, "v4", &second);
    relay.signal("HUP");
    relay.wait_for("nothing in the configuration has changed");
    assert_eq!(success(&relay), 1.0);

    // What a running relay cannot take up is named, and nothing of that file is applied.
    let restart = of(&[&one]).replace("lease: 10s", "lease: 3s");
    swap(&folder, "v5", &format!("{restart}limits: {{ in_flight_events: 7 }}\n"));
    relay.signal("HUP");
    relay.wait_for(
        "a running relay cannot take up a change of limits.in_flight_events, replicas.lease: restart",
    );
    assert_eq!((success(&relay), names(&relay).len()), (0.0, 4));

    // One goes, and its rows stay.
    swap(&folder, "v6", &(of(&[&coming, &one, &moved]) + "log: { level: error }\n"));
    relay.signal("HUP");
    relay.until(|status| status["tables"].as_array().unwrap().len() == 3).await;
    assert_eq!(names(&relay), ["new", "outbox", "moved"]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while success(&relay) < 1.0 {
        assert!(Instant::now() < deadline, "{}", relay.log());
        world.pause().await;
    }
    assert!(!relay.get("/metrics").1.contains("whippet_pending_events{table=\"gone\"}"));
    let left = world.number("SELECT count(*) FROM gone").await;
    for name in ["outbox", "moved", "new"] {
        until_more(&relay, &format!("table=\"{name}\""), 100.0).await;
    }
    assert!(world.number("SELECT count(*) FROM gone").await > left, "nobody reads it");
    let refused = relay.try_to(&world, &["pause", "--table", "gone"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("no table \"gone\""), "{refused:?}");
    assert_eq!(relay.operate(&world, &["pause", "--table", "new", "--dry-run"])["dry_run"], true);

    let mut written = Vec::new();
    for writers in writers {
        written.push(writers.end().await);
    }
    for name in ["outbox", "moved", "new"] {
        world.until(&format!("SELECT count(*) FROM {name}"), 0).await;
    }
    // It is the one that it was: nothing was lost to a new membership, or a new producer.
    assert_eq!(relay.metric("whippet_membership_epoch", ""), epoch);
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    let of_same = |line: &&str| line.contains("\"table\":\"outbox\"") && line.contains("the table st");
    assert_eq!(log.lines().filter(of_same).count(), 0, "{log}");
    assert!(!log.contains("producer is rebuilt"), "{log}");
    assert!(!log.contains("stopped; "), "the level is error: {log}");

    let [outbox, moved, _, new_rows] = &written[..] else { unreachable!() };
    check_split(&world, outbox, &[same]);
    let split = check_split(&world, moved, &[before, after]);
    assert!(split.iter().all(|count| *count > 100), "{split:?}");
    check_split(&world, new_rows, &[new]);
}

/// The topic was wrong: what waits for it is not waited for.
#[tokio::test]
async fn a_wrong_topic_is_mended_by_a_reload_and_what_is_held_stays() {
    let world = World::new("reload_topic").await;
    let right = world.create_topic("right", 1, &[]).await;
    let wrong = world.topic("wrong");
    let config = |topic: &str| calm(&world.config(&format!("[{{ name: outbox, topic: '{topic}' }}]"), ""));
    world.install(&config(&wrong)).await;
    let relay = world.relay(&config(&wrong));
    world.sql("INSERT INTO outbox (key, payload) SELECT 'k' || n % 3, n::text::bytea FROM generate_series(1, 30) n").await;
    world
        .sql("INSERT INTO outbox (key, payload, headers) VALUES ('bad', 'x', '[1]'), ('bad', 'y', NULL)")
        .await;
    relay.until_status("/tables/0/in_flight", 32).await;
    relay.until_status("/blocked_topics/0", wrong.as_str()).await;

    world.write("whippet.yaml", &config(&right));
    relay.signal("HUP");
    let mut consumer = world.consumer(&right);
    assert_eq!(consumer.read(30).len(), 30);
    relay.until_status("/tables/0/parked_events", 2).await;

    // Parked under a topic, it is found again under another.
    let other = world.create_topic("other", 1, &[]).await;
    world.sql("UPDATE outbox SET headers = NULL").await;
    world.write("whippet.yaml", &config(&other));
    relay.signal("HUP");
    relay.wait_for_nth("\"stopped\":\"outbox\"", 2);
    relay.until_status("/tables/0/parked_events", 2).await;
    assert_eq!(relay.operate(&world, &["redrive", "--all"])["events"], 2);
    let mut consumer = world.consumer(&other);
    let payloads: Vec<&str> = consumer.read(2).iter().map(Seen::text).collect();
    assert_eq!(payloads, ["x", "y"]);
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(relay.stop().0, Some(0));
}

/// One reader of the log serves all tables that follow it: it is another one after the reload.
#[tokio::test(flavor = "multi_thread")]
async fn tables_that_follow_the_log_come_and_change() {
    let world = World::new("reload_log").await;
    let mut topics = Vec::new();
    for name in ["same", "before", "after", "brief"] {
        topics.push(world.create_topic(name, 3, &[]).await);
    }
    let [same, before, after, brief] = &topics[..] else { unreachable!() };
    let of = |tables: &str| calm(&streamed(&world, tables));
    let second = format!(
        "{{ name: outbox }}, {{ name: moved, topic: '{after}' }}, {{ name: brief, capture: stream, rows: transient, topic: '{brief}' }}"
    );
    world.install(&of(&second)).await;
    let relay = world.relay(&of(&format!("{{ name: outbox }}, {{ name: moved, topic: '{before}' }}")));
    for index in [0, 1] {
        relay.until_status(&format!("/tables/{index}/capture"), "stream").await;
    }
    let writers =
        [("outbox", same), ("moved", before)].map(|(name, topic)| Writers::start(&world, name, topic));
    until_more(&relay, "table=\"outbox\"", 200.0).await;
    until_more(&relay, "table=\"moved\"", 200.0).await;
    world.write("whippet.yaml", &of(&second));
    relay.signal("HUP");
    relay.wait_for("\"started\":\"moved, brief\"");
    relay.until(|status| (0..3).all(|table| status["tables"][table]["capture"] == "stream")).await;
    relay.until_status("/tables/2/state", "running").await;
    until_more(&relay, &format!("topic=\"{after}\""), 200.0).await;
    until_more(&relay, "table=\"outbox\"", 200.0).await;
    world
        .sql(
            "BEGIN; INSERT INTO brief (key, payload) VALUES ('k', 'seen'); DELETE FROM brief; COMMIT;
             BEGIN; INSERT INTO brief (key, payload) VALUES ('k', 'too'); DELETE FROM brief; COMMIT",
        )
        .await;
    let mut consumer = world.consumer(brief);
    assert_eq!(consumer.read(2).iter().map(Seen::text).collect::<Vec<_>>(), ["seen", "too"]);
    // And it goes, beside others that are in the middle of it.
    world.write(
        "whippet.yaml",
        &of(&format!(
            "{{ name: outbox }}, {{ name: moved, topic: '{after}', headers: {{ static: {{ a: b }} }} }}"
        )),
    );
    relay.signal("HUP");
    relay.wait_for("\"stopped\":\"moved, brief\"");
    until_more(&relay, "table=\"moved\"", 100.0).await;
    let mut written = Vec::new();
    for writers in writers {
        written.push(writers.end().await);
    }
    for name in ["outbox", "moved"] {
        world.until(&format!("SELECT count(*) FROM {name}"), 0).await;
    }
    assert_eq!(relay.stop().0, Some(0));
    check_split(&world, &written[0], &[same]);
    check_split(&world, &written[1], &[before, after]);
}

/// What cannot be carried out is found before anything stops: there is no place left for a table.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_that_cannot_be_carried_out_changes_nothing() {
    let world = World::new("reload_fails").await;
    let before = world.create_topic("before", 3, &[]).await;
    let after = world.create_topic("after", 3, &[]).await;
    let of = |topic: &str| calm(&world.config(&format!("[{{ name: moved, topic: '{topic}' }}]"), ""));
    world.install(&of(&before)).await;
    let file = world.write("whippet.yaml", &of(&before));
    // The tables of the start have places.
    let relay = Relay::start_with(&file, &[("FAILPOINTS", "no-places=1*off->1*return->off")]);
    let writers = Writers::start(&world, "moved", &before);
    until_more(&relay, "table=\"moved\"", 100.0).await;
    world.write("whippet.yaml", &of(&after));
    relay.signal("HUP");
    let refused = relay.wait_for("the configuration is refused, and the old one goes on");
    assert_eq!(refused["error"], "too many tables");
    assert_eq!(success(&relay), 0.0);
    until_more(&relay, &format!("topic=\"{before}\""), 100.0).await;
    assert!(!relay.log().contains("the table stops"), "{}", relay.log());

    relay.signal("HUP");
    relay.wait_for("\"started\":\"moved\"");
    assert_eq!(success(&relay), 1.0);
    until_more(&relay, &format!("topic=\"{after}\""), 100.0).await;
    let written = writers.end().await;
    world.until("SELECT count(*) FROM moved", 0).await;
    assert_eq!(relay.stop().0, Some(0));
    check_split(&world, &written, &[&before, &after]);
}

/// Where events are seen once, other tables need a restart, and whoever looks is told so.
#[tokio::test(flavor = "multi_thread")]
async fn tables_that_are_delivered_exactly_once_change_with_a_restart() {
    let world = World::new("reload_once").await;
    let [before, after] =
        [world.create_topic("before", 1, &[]).await, world.create_topic("after", 1, &[]).await];
    let of = |topic: &str| {
        let config =
            calm(&world.config(&format!("[{{ name: moved, topic: '{topic}', capture: poll }}]"), ""));
        exactly(&world, &config, "exactly_once")
    };
    world.install(&of(&before)).await;
    let relay = world.relay(&of(&before));
    let writers = Writers::start(&world, "moved", &before);
    until_more(&relay, "table=\"moved\"", 100.0).await;
    world.write("whippet.yaml", &of(&after));
    relay.signal("HUP");
    let refused = relay.wait_for("the configuration is refused, and the old one goes on");
    let why = "a running relay cannot take up a change of tables (of a relay that delivers exactly once): restart it to \
               apply the file. Nothing of it is applied yet";
    assert_eq!(
        (refused["error"].as_str(), relay.status()["config_refused"].as_str()),
        (Some(why), Some(why))
    );
    assert_eq!(success(&relay), 0.0);
    until_more(&relay, &format!("topic=\"{before}\""), 100.0).await;
    assert_eq!(relay.stop().0, Some(0));

    let relay = world.relay(&of(&after));
    until_more(&relay, &format!("topic=\"{after}\""), 100.0).await;
    assert_eq!(relay.status()["config_refused"], serde_json::Value::Null);
    let written = writers.end().await;
    world.until("SELECT count(*) FROM moved", 0).await;
    assert_eq!(relay.stop().0, Some(0));
    check_split(&world, &written, &[&before, &after]);
}

/// Two tables under load, one of which is to have another topic.
struct Away {
    world: World,
    proxy: Proxy,
    relay: Relay,
    topics: [String; 3],
    writers: [Writers; 2],
}

impl Away {
    /// Kafka goes away with events in flight, and the configuration changes.
    async fn begin(name: &str, grace: &str) -> Away {
        let (world, proxy) = (World::new(name).await, Proxy::kafka());
        let mut topics = Vec::new();
        for name in ["same", "before", "after"] {
            topics.push(world.create_topic(name, 3, &[]).await);
        }
        let topics: [String; 3] = topics.try_into().unwrap();
        let of = |topic: &str| {
            let tables = format!("[{{ name: outbox }}, {{ name: moved, topic: '{topic}' }}]");
            let shutdown = format!("shutdown: {{ grace: {grace} }}");
            calm(&world.config_for(&world.url, &service("WHIPPET_TEST_KAFKA_PROXIED"), &tables, &shutdown))
        };
        world.install(&world.config("[{ name: outbox }, { name: moved, topic: t }]", "")).await;
        let relay = world.relay(&of(&topics[1]));
        let writers = [("outbox", &topics[0]), ("moved", &topics[1])]
            .map(|(name, topic)| Writers::start(&world, name, topic));
        for name in ["outbox", "moved"] {
            until_more(&relay, &format!("table=\"{name}\""), 100.0).await;
        }
        proxy.cut();
        let in_flight =
            |status: &serde_json::Value, table: usize| status["tables"][table]["in_flight"].as_u64();
        relay.until(|status| (0..2).all(|table| in_flight(status, table) > Some(50))).await;
        world.write("whippet.yaml", &of(&topics[2]));
        relay.signal("HUP");
        relay.wait_for("the table stops");
        Away { world, proxy, relay, topics, writers }
    }

    /// Kafka is back. Returns what became of both tables, and the log.
    async fn end(self) -> (Split, Split, String) {
        let Away { world, proxy, relay, topics: [same, before, after], writers } = self;
        proxy.heal();
        relay.wait_for("\"started\":\"moved\"");
        assert_eq!(success(&relay), 1.0);
        for topic in [&same, &after] {
            until_more(&relay, &format!("topic=\"{topic}\""), 100.0).await;
        }
        let [outbox, moved] = writers;
        let (outbox, moved) = (outbox.end().await, moved.end().await);
        for name in ["outbox", "moved"] {
            world.until(&format!("SELECT count(*) FROM {name}"), 0).await;
        }
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        (split(&world, &outbox, &[&same]), split(&world, &moved, &[&before, &after]), log)
    }
}

/// Kafka is away and back within `shutdown.grace`: what was in flight is waited for, and sent once.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_waits_for_kafka_and_repeats_nothing() {
    let away = Away::begin("reload_away", "60s").await;
    // A verb does not pass the table by that is to start again, as if it were not configured.
    let answer = away.relay.operate(&away.world, &["redrive", "--all", "--dry-run"]);
    assert!(answer["tables"][1]["table"] == "moved" || answer["failed"][0]["table"] == "moved", "{answer}");
    let (same, moved, log) = away.end().await;
    assert_eq!((same.repeats, moved.repeats), (0, 0), "{log}");
    assert!(moved.counts.iter().all(|count| *count > 100), "{:?}", moved.counts);
    assert!(!log.contains("rebuilt"), "{log}");
}

/// Kafka stays away for longer: the tables change all the same, and what was in flight may be repeated.
#[tokio::test(flavor = "multi_thread")]
async fn a_reload_does_not_wait_for_kafka_for_ever() {
    let away = Away::begin("reload_long", "1s").await;
    away.relay.wait_for("kafka does not answer for what was sent of a table that is to stop");
    away.relay.wait_for("\"started\":\"moved\"");
    let (same, moved, _) = away.end().await;
    eprintln!("repeats: {} of the table that stays, {} of the one that changed", same.repeats, moved.repeats);
    assert!(moved.counts.iter().all(|count| *count > 100), "{:?}", moved.counts);
}
