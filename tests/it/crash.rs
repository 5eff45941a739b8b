//! Whatever happens to the relay or the broker: nothing is lost, nothing overtakes.

use std::time::{Duration, Instant};

use sqlx::{Connection as _, PgConnection};

use crate::{
    harness::{Relay, World, calm, services},
    load::{Load, Plan},
};

const ROWS: usize = 100_000;
const KILLS: u32 = 10;

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_and_nothing_overtakes_through_ten_kills_and_a_broker_restart() {
    let world = World::new("crash").await;
    let topic = world.create_topic("events", 6, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let plan = Plan { writers: 8, keys: 1_000, rows: ROWS as u64, pause_ms: 60, poison: None };
    let seed = fastrand::u64(..1_000_000) * plan.writers;
    let mut load = Load::start(&world, &topic, plan, seed).await;

    // The faults run in a thread of their own, which a slow `scripts/services` may block.
    let file = world.write("whippet.yaml", &config);
    let faults = std::thread::spawn(move || {
        let mut random = fastrand::Rng::with_seed(seed);
        for kill in 0..KILLS {
            let relay = Relay::start(&file);
            if kill == KILLS / 2 {
                services("restart", "kafka");
            }
            // From before it owns the source to well into its work.
            std::thread::sleep(Duration::from_millis(random.u64(500..5_000)));
            relay.kill();
        }
        Relay::start(&file)
    });
    load.ended().await;
    let relay = tokio::task::spawn_blocking(|| faults.join().unwrap()).await.unwrap();
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");

    let (verdict, rolled_back) = load.check(&world);
    assert!(rolled_back > 0 && verdict.pairs > ROWS);
    // Each of the eleven faults repeats what was in flight, at most.
    assert!(verdict.repeats < 11 * 20_000, "{verdict:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_sleeps_thirty_seconds_is_published_and_stalls_nobody() {
    let world = World::new("late").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = calm(&world.config("[{ name: outbox }]", ""));
    world.install(&config).await;
    let relay = world.relay(&config);

    let insert = |key: &str, n: i64| {
        format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', '{key}', '{n}')")
    };
    let mut sleeper = PgConnection::connect(&world.url).await.unwrap();
    let mut late = sleeper.begin().await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(insert("late", 0))).execute(&mut *late).await.unwrap();
    // Its start is not what is measured.
    let mut consumer = world.consumer(&topic);
    let mut sent = 1;
    world.sql(&insert("others", sent)).await;
    consumer.read(1);
    let began = Instant::now();
    let mut slowest = Duration::ZERO;
    while began.elapsed() < Duration::from_secs(30) {
        let before = Instant::now();
        sent += 1;
        world.sql(&insert("others", sent)).await;
        consumer.read(sent as usize);
        slowest = slowest.max(before.elapsed());
    }
    late.commit().await.unwrap();
    let seen = consumer.read(sent as usize + 1);
    assert_eq!(seen.last().unwrap().key.as_deref(), Some(&b"late"[..]));
    assert_eq!(seen.len() as i64, sent + 1, "nothing is published twice");
    // Each waited for its own trip through the relay only, while the late one was open.
    assert!(slowest < Duration::from_secs(2), "the slowest took {slowest:?}");
    eprintln!("{sent} events went by while one waited, the slowest in {slowest:?}");
    let (_, log) = relay.stop();
    assert!(!log.contains("\"ERROR\""), "{log}");
}

/// A number below everything that was read, taken from no sequence and long after: only the sweep of the
/// whole table can see it.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_with_a_number_of_its_own_is_found() {
    let world = World::new("sweep").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox, after_publish: mark }]", "");
    world.install(&config).await;
    let _relay = world.relay(&config);
    let insert = |columns: &str, values: &str| {
        format!(
            "INSERT INTO outbox ({columns} topic, key, payload) OVERRIDING SYSTEM VALUE VALUES ({values} '{topic}', 'k', 'x')"
        )
    };
    let mut consumer = world.consumer(&topic);
    // Enough reads for the lower end of what is looked at to rise.
    for n in 1..=40 {
        world.sql(&insert("", "")).await;
        consumer.read(n);
    }
    world.sql(&insert("seq,", "-5,")).await;
    consumer.read(41);
    world.until("SELECT count(*) FROM outbox WHERE published_at IS NULL", 0).await;
}
