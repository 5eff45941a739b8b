//! Whatever happens to the relay or the broker: nothing is lost, nothing overtakes.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use sqlx::{Connection as _, PgConnection};

use crate::{
    checker::{Written, check},
    harness::{Relay, World, services},
};

const WRITERS: u64 = 8;
const ROWS: usize = 100_000;
const KEYS: u32 = 1_000;
const KILLS: u32 = 10;

/// One writer: transactions of a few rows, with a pause between INSERT and COMMIT.
async fn write(
    url: String,
    topic: String,
    seed: u64,
    left: Arc<AtomicU64>,
    transactions: Arc<AtomicU64>,
    history: Arc<Mutex<Vec<Written>>>,
) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut connection = PgConnection::connect(&url).await.unwrap();
    // Half of the writers serialise each key by a row lock taken before the INSERT.
    let locks = seed.is_multiple_of(2);
    loop {
        let rows = random.u64(1..=20);
        if left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(rows)).is_err() {
            return;
        }
        let number = transactions.fetch_add(1, Ordering::Relaxed);
        let mut keys: Vec<u32> = (0..rows).map(|_| random.u32(0..KEYS)).collect();
        let mut transaction = connection.begin().await.unwrap();
        if locks {
            // In one order, or two writers would wait for each other.
            keys.sort_unstable();
            let mut distinct: Vec<i32> = keys.iter().map(|key| *key as i32).collect();
            distinct.dedup();
            for key in distinct {
                sqlx::query("SELECT 1 FROM keys WHERE key = $1 FOR UPDATE")
                    .bind(key)
                    .execute(&mut *transaction)
                    .await
                    .unwrap();
            }
        }
        let mut written = Vec::new();
        for (nth, key) in keys.iter().enumerate() {
            let row = Written {
                id: uuid::Uuid::from_u128(random.u128(..)).to_string(),
                key: format!("key-{key}"),
                payload: vec![b'x'; random.usize(0..400)],
                transaction: number,
                inserted: Instant::now(),
                nth,
                committed: None,
            };
            sqlx::query("INSERT INTO outbox (id, topic, key, payload) VALUES ($1::text::uuid, $2, $3, $4)")
                .bind(&row.id)
                .bind(&topic)
                .bind(&row.key)
                .bind(&row.payload)
                .execute(&mut *transaction)
                .await
                .unwrap();
            written.push(row);
        }
        // Mostly short, sometimes long: rows with lower numbers commit after higher ones.
        let pause = if random.u32(0..50) == 0 { random.u64(0..400) } else { random.u64(0..60) };
        tokio::time::sleep(Duration::from_millis(pause)).await;
        if random.u32(0..20) == 0 {
            transaction.rollback().await.unwrap();
        } else {
            transaction.commit().await.unwrap();
            let committed = Instant::now();
            written.iter_mut().for_each(|row| row.committed = Some(committed));
        }
        history.lock().unwrap().extend(written);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_lost_and_nothing_overtakes_through_ten_kills_and_a_broker_restart() {
    let world = World::new("crash").await;
    let topic = world.create_topic("events", 6, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    world.sql(&format!("CREATE TABLE keys AS SELECT key FROM generate_series(0, {KEYS} - 1) key")).await;
    world.sql("CREATE UNIQUE INDEX ON keys (key)").await;

    let history = Arc::new(Mutex::new(Vec::with_capacity(ROWS)));
    let (left, transactions) = (Arc::new(AtomicU64::new(ROWS as u64)), Arc::new(AtomicU64::new(0)));
    let seed = fastrand::u64(..1_000_000) * WRITERS;
    eprintln!("seed {seed}");
    let writers: Vec<_> = (0..WRITERS)
        .map(|writer| {
            let history = history.clone();
            let (url, topic) = (world.url.clone(), topic.clone());
            tokio::spawn(write(url, topic, seed + writer, left.clone(), transactions.clone(), history))
        })
        .collect();

    // The faults run in a thread of their own, which a slow `scripts/services` may block.
    let done = Arc::new(AtomicBool::new(false));
    let file = world.write("whippet.yaml", &config);
    let faults = {
        let done = done.clone();
        std::thread::spawn(move || {
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
            done.store(true, Ordering::Relaxed);
            Relay::start(&file)
        })
    };
    for writer in writers {
        writer.await.unwrap();
    }
    let relay = tokio::task::spawn_blocking(|| faults.join().unwrap()).await.unwrap();
    assert!(done.load(Ordering::Relaxed));
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");

    let history = history.lock().unwrap();
    let mut consumer = world.consumer(&topic);
    let verdict = check(&history, consumer.read_to_end());
    let rolled_back = history.iter().filter(|row| row.committed.is_none()).count();
    eprintln!("{verdict:?}, {rolled_back} rows rolled back");
    assert!(rolled_back > 0 && verdict.pairs > ROWS);
    // Each of the eleven faults repeats what was in flight, at most.
    assert!(verdict.repeats < 11 * 20_000, "{verdict:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_writer_that_sleeps_thirty_seconds_is_published_and_stalls_nobody() {
    let world = World::new("late").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);

    let insert = |key: &str, n: i64| {
        format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', '{key}', '{n}')")
    };
    let mut sleeper = PgConnection::connect(&world.url).await.unwrap();
    let mut late = sleeper.begin().await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(insert("late", 0))).execute(&mut *late).await.unwrap();
    let began = Instant::now();
    let mut consumer = world.consumer(&topic);
    let mut sent = 0;
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
