//! Large payloads are fetched after their rows are found, two at once: what happens in between.

use std::collections::HashSet;

use crate::{
    harness::{Seen, World, kafka, service},
    proxy::Proxy,
};

const SIZE: usize = 900_000;

/// Rows of one transaction: one read finds all of them. Their types are their numbers.
fn insert(topic: &str, rows: std::ops::RangeInclusive<usize>) -> String {
    format!(
        "INSERT INTO outbox (topic, key, type, payload) \
         SELECT '{topic}', 'k', i, convert_to(repeat(chr(96 + i), {SIZE}), 'UTF8') \
         FROM generate_series({}, {}) i ORDER BY i",
        rows.start(),
        rows.end()
    )
}

fn number(record: &Seen) -> usize {
    record.header("eventType").unwrap().parse().unwrap()
}

/// As it was inserted.
fn is_whole(record: &Seen) -> bool {
    let letter = 96 + u8::try_from(number(record)).unwrap();
    record.payload.as_ref().unwrap() == &vec![letter; SIZE]
}

fn proxied(world: &World) -> String {
    let (_, name) = world.url.rsplit_once('/').unwrap();
    format!("postgres://postgres@127.0.0.1:{}/{name}", service("WHIPPET_TEST_PG_PROXIED_PORT"))
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_that_change_after_they_were_found_go_as_they_are_and_those_that_are_gone_do_not() {
    let proxy = Proxy::kafka();
    let world = World::new("prefetchchanges").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let kafka = service("WHIPPET_TEST_KAFKA_PROXIED");
    let config =
        world.config_for(&world.url, &kafka, "[{ name: outbox }]", "limits: { in_flight_bytes: 4MiB }");
    world.install(&config).await;
    let relay = world.relay(&config);
    world.sql(&insert(&topic, 1..=1)).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    proxy.cut();
    world.sql(&insert(&topic, 2..=8)).await;
    // The window has room for four; the others are found, and wait for theirs.
    relay.until(|_| relay.metric("whippet_in_flight_events", "") == 4.0).await;
    world.sql("DELETE FROM outbox WHERE type = '6'").await;
    world.sql("UPDATE outbox SET payload = repeat('longer', 160000)::bytea WHERE type = '7'").await;
    world.sql("UPDATE outbox SET payload = NULL WHERE type = '8'").await;
    proxy.heal();
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut consumer = world.consumer(&topic);
    let (mut seen, mut known) = (consumer.read_to_end().to_vec(), HashSet::new());
    // What was on its way when Kafka went may come twice.
    seen.retain(|record| known.insert(number(record)));
    assert_eq!(seen.iter().map(number).collect::<Vec<_>>(), [1, 2, 3, 4, 5, 7, 8]);
    assert!(seen[..5].iter().all(is_whole));
    assert_eq!(seen[5].text(), "longer".repeat(160_000));
    assert_eq!(seen[6].payload, None);
    // What was claimed for the row that is gone is given back.
    relay.until(|_| relay.metric("whippet_in_flight_bytes", "") == 0.0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_that_are_lost_in_the_middle_of_payloads_cost_neither_rows_nor_order() {
    let proxy = Proxy::postgres();
    let world = World::new("prefetchlost").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let url = proxied(&world);
    // It gets on by a row or two each time.
    let table = "[{ name: outbox, retry: { max: 200ms } }]";
    let config = world.config_for(&url, &kafka(), table, "log: { level: debug }");
    world.install(&config).await;
    // Every connection has room for one payload, and ends in the middle of its second.
    proxy.cut_after("downstream", SIZE * 3 / 2);
    world.sql(&insert(&topic, 1..=12)).await;
    let relay = world.relay(&config);
    world.until("SELECT count(*) FROM outbox", 0).await;
    assert!(relay.log().contains("a connection for large payloads is made anew"), "{}", relay.log());
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read_to_end();
    assert_eq!(seen.iter().map(number).collect::<Vec<_>>(), (1..=12).collect::<Vec<_>>());
    assert!(seen.iter().all(is_whole));
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
}

/// Of two connections one is left, whichever tables have large payloads.
#[tokio::test(flavor = "multi_thread")]
async fn the_lease_is_renewed_while_payloads_are_fetched_that_take_longer_than_it() {
    let proxy = Proxy::postgres();
    let world = World::new("prefetchlease").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let tables =
        "[{ name: outbox, payload: { oversize: chunk } }, { name: other, payload: { oversize: chunk } }]";
    let config = world.config_for(&proxied(&world), &kafka(), tables, "limits: { in_flight_bytes: 64MiB }");
    let config =
        config.replace("source: {", "source: { max_connections: 2,").replace("lease: 2s", "lease: 4s");
    world.install(&config).await;
    let relay = world.relay(&config);
    relay.wait_for("this relay owns the source");
    // Five seconds for each payload; the lease has four.
    proxy.limit_from(4 << 20);
    for table in ["outbox", "other"] {
        let payload = "convert_to(repeat('x', 20 * 1024 * 1024), 'UTF8')";
        world
            .sql(&format!("INSERT INTO {table} (topic, key, payload) VALUES ('{topic}', 'k', {payload})"))
            .await;
    }
    let fetches = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                   AND state = 'active' AND query LIKE 'SELECT o.\"payload\" FROM%'";
    world.until(fetches, 1).await;
    // Those of the pool, and the one that it has given up.
    let connections = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
                       AND application_name IN ('whippet', 'whippet-payloads')";
    world.until(connections, 2).await;
    let mut most = 0;
    while world.number("SELECT (SELECT count(*) FROM outbox) + (SELECT count(*) FROM other)").await > 0 {
        most = most.max(world.number(fetches).await);
        world.pause().await;
    }
    assert_eq!(most, 1, "payloads that were fetched at once");
    world.until(connections, 2).await;
    let (code, log) = relay.stop();
    assert_eq!((code, log.matches("this relay owns the source").count()), (Some(0), 1), "{log}");
}
