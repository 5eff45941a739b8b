//! Large transactions, large rows, savepoints, and what is no insert, while streaming.

use std::fmt::Write as _;

use crate::{
    harness::{Relay, Seen, World, calm, in_soak},
    stream_rows::*,
};

pub const INSERT: &str = "INSERT INTO outbox (topic, key, payload)";

/// A preset's outbox that is streamed, and the relay that streams it.
pub async fn stream_outbox(world: &World, table: &str, more: &str) -> (String, Relay) {
    let config = calm(&with_log(world, &format!("[{{ name: outbox, capture: stream{table} }}]"), more));
    world.install(&config).await;
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    (config, relay)
}

/// The numbers that payloads begin with.
pub fn numbers(seen: &[Seen]) -> Vec<usize> {
    let number = |one: &Seen| {
        let text = one.text();
        text.split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{text:.40}"))
    };
    seen.iter().map(number).collect()
}

/// contract.md section 5.4, with the default window of 12 MiB.
pub fn within_bounds(relay: &Relay, largest_row: usize) {
    let (peak, most) = (relay.peak_mib(), 40.0 + 2.0 * 12.0 + 3.0 * largest_row as f64 / 1_048_576.0);
    eprintln!("peak resident memory {peak:.0} MiB of {most:.0}");
    assert!(peak <= most, "{peak} MiB, more than {most}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_huge_transaction_is_published_in_order_within_the_memory_that_is_promised() {
    const ROWS: usize = 300_000;
    let world = World::new("hugetransaction").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let (_, relay) = stream_outbox(&world, "", "").await;
    world
        .sql(&format!(
            "{INSERT} SELECT '{topic}', 'k' || i % 100, convert_to(rpad(i || ' ', 256, 'x'), 'UTF8') FROM generate_series(0, {ROWS} - 1) i"
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    let seen = numbers(consumer.read(ROWS));
    world.until("SELECT count(*) FROM outbox", 0).await;
    within_bounds(&relay, 256);
    only_the_log(&end(&world, relay).await);
    assert!(seen.into_iter().eq(0..ROWS), "in order, each once");
    assert_eq!(consumer.read_to_end().len(), ROWS);
}

/// One transaction writes this many rows of 1 KiB to another table before it writes one to the outbox, and
/// again as many after it: four times as many in `scripts/soak`.
async fn a_row_among_much_else(name: &str, publication: &str, rows: u32) {
    let rows = in_soak(rows, 4 * rows);
    let world = World::new(name).await;
    let topic = world.create_topic("events", 1, &[]).await;
    world.sql(publication.replace("NAME", &world.name).as_str()).await;
    let (_, relay) = stream_outbox(&world, "", "").await;
    world.sql("CREATE TABLE other (body text)").await;
    let much = format!("INSERT INTO other SELECT repeat('o', 1024) FROM generate_series(1, {rows})");
    world.sql(&format!("BEGIN; {much}; {INSERT} VALUES ('{topic}', 'k', '1'); {much}; COMMIT")).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(1);
    world.until("SELECT count(*) FROM outbox", 0).await;
    // Tables of others hold no log.
    world.sql(&much).await;
    let lag = format!(
        "SELECT (pg_current_wal_lsn() - confirmed_flush_lsn < 100000)::int::bigint FROM pg_replication_slots WHERE slot_name = '{}'",
        world.name
    );
    world.until(&lag, 1).await;
    within_bounds(&relay, 0);
    only_the_log(&end(&world, relay).await);
    assert_eq!(consumer.read_to_end().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_within_500_mb_of_other_tables_arrives_within_the_memory_that_is_promised() {
    a_row_among_much_else("muchelse", "", 250_000).await;
}

/// The publication has all tables, so all of it comes to the relay.
#[tokio::test(flavor = "multi_thread")]
async fn rows_of_tables_that_are_not_relayed_are_dropped_within_the_memory_that_is_promised() {
    a_row_among_much_else("muchmore", "CREATE PUBLICATION NAME FOR ALL TABLES", 100_000).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_100_mb_arrives_whole_and_one_above_the_limit_is_parked_unread() {
    // What the broker takes in one request is 100 MiB.
    const LARGE: usize = 100_000_000;
    let world = World::new("largerow").await;
    let topic = world.create_topic("events", 1, &[("max.message.bytes", "150000000")]).await;
    let (_, relay) = stream_outbox(&world, ", payload: { max_bytes: 110000000 }", "").await;
    // No window of a compression holds the part that repeats.
    world
        .sql(&format!(
            "CREATE FUNCTION large(size int) RETURNS bytea LANGUAGE sql AS $$
               SELECT substr(convert_to(repeat(string_agg(md5(i::text), ''), 1 + size / 160000), 'UTF8'), 1, size)
               FROM generate_series(1, 5000) i $$;
             {INSERT} VALUES ('{topic}', 'k', '1 before');
             {INSERT} VALUES ('{topic}', 'k', large({LARGE})), ('{topic}', 'k', '3 after');
             {INSERT} VALUES ('{topic}', 'giant', large(110000001)), ('{topic}', 'k', '4 flows'), ('{topic}', 'giant', '5 behind');"
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read(4);
    let expected: Vec<u8> = sqlx::query_scalar(sqlx::AssertSqlSafe(format!("SELECT large({LARGE})")))
        .fetch_one(world.db.pg())
        .await
        .unwrap();
    assert!(seen[1].payload.as_deref() == Some(&expected), "bytes differ");
    assert_eq!([&seen[0], &seen[2], &seen[3]].map(Seen::text), ["1 before", "3 after", "4 flows"]);
    world.until("SELECT count(*) FROM outbox", 2).await;
    world.until("SELECT count(*) FROM whippet.holds WHERE reason LIKE '%110000001 bytes%'", 1).await;
    world.until("SELECT count(*) FROM whippet.holds WHERE cause = 'behind'", 1).await;
    within_bounds(&relay, LARGE);
    // And from the log again.
    streams(&relay, [0]).await;
    world
        .sql(&format!(
            "BEGIN; {INSERT} VALUES ('{topic}', 'k', '6'); DELETE FROM outbox WHERE key = 'k'; COMMIT"
        ))
        .await;
    assert_eq!(consumer.read(5)[4].text(), "6");
    end(&world, relay).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn savepoints_leak_nothing_however_they_are_nested() {
    const ROWS: usize = 50_000;
    const BLOCK: usize = 500;
    let world = World::new("savepoints").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let (_, relay) = stream_outbox(&world, "", "").await;
    // Of each four blocks, the second is undone after its own savepoint was released, and the fourth at once.
    let (mut script, mut kept) = (String::new(), Vec::new());
    for from in (0..ROWS).step_by(BLOCK) {
        let to = from + BLOCK - 1;
        let rows = format!(
            "{INSERT} SELECT '{topic}', 'k', convert_to(rpad(i || ' ', 256, 'x'), 'UTF8') FROM generate_series({from}, {to}) i;"
        );
        let statements = match from / BLOCK % 4 {
            0 => format!("SAVEPOINT a; {rows} SAVEPOINT b;"),
            1 => format!("SAVEPOINT c; {rows} RELEASE c;"),
            2 => format!("ROLLBACK TO b; {rows}"),
            _ => format!("SAVEPOINT d; {rows} ROLLBACK TO d; RELEASE a;"),
        };
        writeln!(script, "{statements}").unwrap();
        if (from / BLOCK).is_multiple_of(2) {
            kept.extend(from..=to);
        }
    }
    // All of it, all of it once more and undone, and all of it in a transaction that is undone as a whole.
    world
        .sql(&format!(
            "BEGIN; {script} SAVEPOINT around; {script} ROLLBACK TO around; COMMIT; BEGIN; {script} ROLLBACK"
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    assert_eq!(numbers(consumer.read(kept.len())), kept);
    world.until("SELECT count(*) FROM outbox", 0).await;
    only_the_log(&end(&world, relay).await);
    assert_eq!(consumer.read_to_end().len(), kept.len());
}

#[tokio::test(flavor = "multi_thread")]
async fn updates_deletes_and_truncates_publish_nothing() {
    let world = World::new("updates").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let table = ", after_publish: mark";
    let config = with_log(&world, &format!("[{{ name: outbox, capture: stream{table} }}]"), "");
    world.install(&config).await;
    // By hand, with everything that a publication can have; and old rows in full.
    world
        .sql(&format!(
            "DROP PUBLICATION IF EXISTS {0};
             CREATE PUBLICATION {0} FOR ALL TABLES WITH (publish = 'insert, update, delete, truncate');
             ALTER TABLE outbox REPLICA IDENTITY FULL; ALTER TABLE outbox ALTER payload SET STORAGE EXTERNAL",
            world.name
        ))
        .await;
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let mut consumer = world.consumer(&topic);
    let large =
        |n: u32| format!("{INSERT} VALUES ('{topic}', 'k', convert_to(rpad('{n} ', 100000, 'x'), 'UTF8'))");
    // Its payload is out of line, and unchanged by what follows.
    world.sql(&large(1)).await;
    consumer.read(1);
    world.until("SELECT count(*) FROM outbox WHERE published_at IS NOT NULL", 1).await;
    for round in 0..10 {
        world
            .sql(&format!(
                "UPDATE outbox SET type = 'changed {round}'; BEGIN; {}; UPDATE outbox SET key = 'other'; DELETE FROM outbox WHERE key = 'none'; COMMIT",
                large(2 + 2 * round)
            ))
            .await;
        world.sql(&format!("BEGIN; {}; TRUNCATE outbox; COMMIT", large(3 + 2 * round))).await;
    }
    world.sql(&large(22)).await;
    let seen = numbers(consumer.read(22));
    assert_eq!(seen, (1..=22).collect::<Vec<_>>());
    world.until("SELECT count(*) FROM outbox WHERE published_at IS NULL", 0).await;
    assert!(consumer.seen.iter().all(|one| one.text().len() == 100_000));
    assert!(consumer.seen.iter().all(|one| one.key.as_deref() == Some(b"k")), "as it was inserted");
    only_the_log(&end(&world, relay).await);
    assert_eq!(consumer.read_to_end().len(), 22, "nothing extra");
}

/// Where only the log has the rows, nothing can be left to the table.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_does_not_stay_is_published_or_parked_whatever_is_in_it() {
    let world = World::new("oddtransient").await;
    let topic = world.create_topic("events", 1, &[]).await;
    world.sql(TYPES).await;
    world
        .sql("CREATE TABLE outbox (seq bigserial PRIMARY KEY, id text, key text, body page, at timestamptz)")
        .await;
    let config = with_log(
        &world,
        &format!(
            "[{{ name: outbox, capture: stream, rows: transient, topic: '{topic}', payload: {{ max_bytes: 1MiB }},
               columns: {{ topic: null, type: null, payload: body, headers: null, created_at: at }} }}]"
        ),
        "",
    );
    world.install(&config).await;
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let row = async |id, body, at| {
        let row = format!("(id, key, body, at) VALUES ('{id}', '{id}', {body}, '{at}')");
        world.sql(&format!("BEGIN; INSERT INTO outbox {row}; DELETE FROM outbox; COMMIT")).await;
    };
    row("a page", "'<?xml version=\"1.0\"?><a/>'", "2026-01-02 03:04:05+00").await;
    row("long ago", "'b'", "0044-03-15 00:00+00 BC").await;
    // Above the limit, but not above what is read of a row; above both; at the limit.
    row("large", "repeat('x', 1048577)::xml", "infinity").await;
    row("larger", "repeat('x', 4000000)::xml", "2026-01-02 03:04:05+00").await;
    row("at the limit", "repeat('x', 1048000)::xml", "2026-01-02 03:04:05+00").await;
    let mut consumer = world.consumer(&topic);
    let seen: Vec<_> =
        consumer.read(3).iter().map(|one| (one.header("id").unwrap(), one.text().len())).collect();
    assert_eq!(seen, [("a page", 4), ("long ago", 1), ("at the limit", 1_048_000)]);
    relay.until_status("/tables/0/parked_events", 2).await;
    world.until("SELECT count(*) FROM whippet.holds WHERE reason LIKE '%1048577 bytes%'", 1).await;
    end(&world, relay).await;
}
