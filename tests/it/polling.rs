//! What polling finds, and in which order.

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::{
    exactly_once::exactly,
    harness::{World, calm},
};

const LATE: usize = 500;
const BEFORE: usize = 20;

/// Of one key: what is visible first is published first.
fn insert(topic: &str, kind: &str, rows: usize) -> String {
    format!(
        "INSERT INTO outbox (topic, key, payload) \
         SELECT '{topic}', 'k', convert_to('{kind} ' || i, 'UTF8') FROM generate_series(1, {rows}) i"
    )
}

/// They fill hundreds of reads, below what was read before, and what is looked at shrinks meanwhile.
async fn late_rows(name: &str, delivery: &str) {
    let world = World::new(name).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config =
        calm(&exactly(&world, &world.config("[{ name: outbox, poll: { batch: 2 } }]", ""), delivery));
    world.install(&config).await;
    let relay = world.relay(&config);
    let mut sleeper = PgConnection::connect(&world.url).await.unwrap();
    let mut late = sleeper.begin().await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(insert(&topic, "late", LATE))).execute(&mut *late).await.unwrap();
    world.sql(&insert(&topic, "before", BEFORE)).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(BEFORE);
    late.commit().await.unwrap();
    world.sql(&insert(&topic, "last", 1)).await;
    // What was visible with it is there by then.
    let seen = consumer.read_until(|seen| seen.iter().any(|one| one.text() == "last 1"));
    assert_eq!(seen.len(), BEFORE + LATE + 1);
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    let of = |kind: &str, rows: usize| (1..=rows).map(|i| format!("{kind} {i}")).collect::<Vec<_>>();
    let expected = [of("before", BEFORE), of("late", LATE), of("last", 1)].concat();
    assert!(consumer.read_committed().iter().map(|one| one.text().to_owned()).eq(expected));
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_commit_late_are_found_however_many_and_before_what_follows() {
    late_rows("latepoll", "at_least_once").await;
}

/// What is published and not recorded is known for longer.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_commit_late_are_found_where_delivery_is_exactly_once() {
    late_rows("latepollonce", "exactly_once").await;
}
