//! What a row becomes on the wire, on every shape of table.

use crate::harness::{World, whippet};

#[tokio::test(flavor = "multi_thread")]
async fn a_row_of_preset_whippet_carries_everything_the_contract_says() {
    let world = World::new("preset").await;
    let topic = world.create_topic("orders", 3, &[]).await;
    let config = world.config(
        "[{ name: public.outbox, columns: { partition: part, version: rev },
            headers: { from: [tenant_id], static: { source: shop }, deny: [X-Secret-*] } }]",
        "",
    );
    world.install(&config).await;
    let relay = world.relay(&config);
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    world
        .sql(&format!(
            r#"BEGIN;
            SELECT set_config('whippet.context', '{{"x-request-id":"r-1","traceparent":"{trace}","x-secret-token":"s","id":"mine"}}', true);
            INSERT INTO public.outbox (id, topic, key, type, payload, part, rev, tenant_id, created_at)
            VALUES ('11111111-1111-1111-1111-111111111111', '{topic}', 'k', 'OrderPlaced', '{{"a": 1}}', 2, '7', 'acme', '2026-01-02 03:04:05.678+00');
            COMMIT;
            INSERT INTO public.outbox (topic, key, payload, tenant_id, headers) VALUES ('{topic}', '', NULL, NULL, '{{"traceparent":"00-bad"}}');
            INSERT INTO public.outbox (topic, key, payload) VALUES ('{topic}', NULL, '');"#
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    consumer.read(3);
    let one = consumer.seen.iter().find(|record| record.key.as_deref() == Some(b"k")).unwrap();
    assert_eq!((one.partition, one.timestamp), (2, Some(1_767_323_045_678)));
    assert_eq!(one.text(), r#"{"a": 1}"#);
    let headers: Vec<(&str, &str)> =
        one.headers.iter().map(|(name, _)| (name.as_str(), one.header(name).unwrap())).collect();
    assert_eq!(
        headers,
        [
            ("id", "11111111-1111-1111-1111-111111111111"),
            ("eventType", "OrderPlaced"),
            ("version", "7"),
            ("tenant_id", "acme"),
            ("source", "shop"),
            ("x-request-id", "r-1"),
            ("traceparent", trace),
        ]
    );
    let tombstone = consumer.seen.iter().find(|record| record.key.as_deref() == Some(b"")).unwrap();
    assert_eq!(tombstone.payload, None);
    assert!(tombstone.header("traceparent").is_none() && tombstone.header("eventType").is_none());
    let keyless = consumer.seen.iter().find(|record| record.key.is_none()).unwrap();
    assert_eq!(keyless.payload.as_deref(), Some(&b""[..]));

    world.until("SELECT count(*) FROM outbox", 0).await;
    assert_eq!(relay.metric("whippet_context_dropped_total", "bad_traceparent"), 1.0);
    assert_eq!(relay.metric("whippet_context_dropped_total", "denied"), 1.0);
    assert_eq!(relay.metric("whippet_context_dropped_total", "shadowed"), 1.0);
    assert_eq!(relay.metric("whippet_events_published_total", &topic), 3.0);
    assert_eq!(relay.get("/livez").0, 200);
    assert_eq!(relay.get("/readyz").0, 200);
    relay.until_status("/tables/0/state", "running").await;
    relay.until(|status| status["tables"][0]["last_publish"].is_string()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_lands_where_a_java_producer_puts_it() {
    let world = World::new("murmur").await;
    let topic = world.create_topic("keys", 12, &[]).await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let _relay = world.relay(&config);
    world
        .sql(&format!("INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'key-' || i, 'x' FROM generate_series(0, 99) i"))
        .await;
    let mut consumer = world.consumer(&topic);
    for record in consumer.read(100) {
        let hash = murmur2(record.key.as_deref().unwrap());
        assert_eq!(record.partition, ((hash & 0x7fff_ffff) % 12).cast_signed(), "{:?}", record.key);
    }
}

/// org.apache.kafka.common.utils.Utils.murmur2, written from its description.
fn murmur2(data: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    let mut h = 0x9747_b28c ^ data.len() as u32;
    let mut chunks = data.chunks_exact(4);
    for chunk in &mut chunks {
        let mut k = u32::from_le_bytes(chunk.try_into().unwrap()).wrapping_mul(M);
        k ^= k >> 24;
        h = h.wrapping_mul(M) ^ k.wrapping_mul(M);
    }
    let rest = chunks.remainder();
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            h ^= u32::from(*byte) << (8 * index);
        }
        h = h.wrapping_mul(M);
    }
    h ^= h >> 13;
    h = h.wrapping_mul(M);
    h ^ (h >> 15)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_debezium_outbox_goes_out_as_debezium_sends_it() {
    let world = World::new("debezium").await;
    let config = world.config("[{ name: outbox, preset: debezium, topic: 'TOPIC.{aggregatetype}' }]", "");
    let topic = world.create_topic("order", 1, &[]).await;
    let config = config.replace("TOPIC", &world.name);
    // As Debezium's documentation has it, with the payload as JSON; no order column.
    world
        .sql(
            "CREATE TABLE outbox (id uuid NOT NULL PRIMARY KEY, aggregatetype varchar(255) NOT NULL,
             aggregateid varchar(255) NOT NULL, type varchar(255) NOT NULL, payload jsonb,
             tracingspancontext varchar(256))",
        )
        .await;
    let relay = world.relay(&config);
    relay.wait_for("no columns.sequence");
    world
        .sql(
            "INSERT INTO outbox VALUES ('22222222-2222-2222-2222-222222222222', 'order', '42', 'Created', '{\"b\":1, \"a\":2}',
             E'#Mon Jan 01\\ntraceparent=00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01\\n')",
        )
        .await;
    let mut consumer = world.consumer(&topic);
    let record = &consumer.read(1)[0];
    assert_eq!(record.key.as_deref(), Some(&b"42"[..]));
    assert_eq!(record.text(), r#"{"a": 2, "b": 1}"#, "as the database returns it");
    let names: Vec<&str> = record.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["id", "traceparent"]);
    assert_eq!(record.header("id"), Some("22222222-2222-2222-2222-222222222222"));
    world.until("SELECT count(*) FROM outbox", 0).await;
}

/// Every column type that can be a payload, marked instead of deleted, in a table of its own shape.
#[tokio::test(flavor = "multi_thread")]
async fn any_shape_and_any_type_goes_out_and_is_marked() {
    let world = World::new("shapes").await;
    let topic = world.create_topic("shapes", 1, &[]).await;
    let types = [
        ("bytea", r"'\x00ff10'", &b"\x00\xff\x10"[..]),
        ("text", "'grüße'", "grüße".as_bytes()),
        ("varchar(20)", "'v'", b"v"),
        ("json", r#"'{ "b":1,  "a":[] }'"#, br#"{ "b":1,  "a":[] }"#),
        ("jsonb", r#"'{ "b":1,  "a":[] }'"#, br#"{"a": [], "b": 1}"#),
        ("xml", "'<a/>'", b"<a/>"),
        ("uuid", "'33333333-3333-3333-3333-333333333333'", b"33333333-3333-3333-3333-333333333333"),
        ("integer", "7", b"7"),
        ("numeric", "1.50", b"1.50"),
        ("boolean", "true", b"true"),
        ("timestamptz", "'2026-01-02 03:04:05+00'", b"2026-01-02 03:04:05+00"),
        ("integer[]", "'{1,2}'", b"{1,2}"),
        ("char(3)", "'ab'", b"ab"),
    ];
    let mut tables = Vec::new();
    for (index, (kind, ..)) in types.iter().enumerate() {
        world
            .sql(&format!(
                "CREATE TABLE t{index} (event_no bigserial PRIMARY KEY, event_id text, body {kind}, sent_at timestamptz, at bigint)"
            ))
            .await;
        tables.push(format!(
            "{{ name: t{index}, topic: '{topic}', key: 'k', after_publish: mark, columns: {{ id: event_id, sequence: event_no,
               topic: null, key: null, type: null, payload: body, headers: null, created_at: null, timestamp: at, published_at: sent_at }} }}"
        ));
    }
    let config = world.config(&format!("[{}]", tables.join(",\n  ")), "");
    let relay = world.relay(&config);
    for (index, (_, value, _)) in types.iter().enumerate() {
        world.sql(&format!("INSERT INTO t{index} (event_id, body, at) VALUES ('e{index}', {value}, 1700000000000 + {index})")).await;
    }
    let mut consumer = world.consumer(&topic);
    consumer.read(types.len());
    for (index, (kind, _, expected)) in types.iter().enumerate() {
        let id = format!("e{index}");
        let record = consumer.seen.iter().find(|record| record.header("id") == Some(&id)).unwrap();
        let payload = record.payload.as_deref().unwrap();
        assert_eq!(String::from_utf8_lossy(payload), String::from_utf8_lossy(expected), "{kind}");
        assert_eq!(record.timestamp, Some(1_700_000_000_000 + index as i64), "{kind}");
        world.until(&format!("SELECT count(*) FROM t{index} WHERE sent_at IS NOT NULL"), 1).await;
    }
    drop(relay);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_sql_is_enough_for_a_role_that_may_do_no_more() {
    let world = World::new("grants").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let url = world.url.replace("postgres@", "whippet_pw:whippet-pw@");
    for (table, after) in [("deleted", "delete"), ("marked", "mark")] {
        let tables = format!("[{{ name: public.{table}, after_publish: {after} }}]");
        let config = world.config_for(&url, &crate::harness::kafka(), &tables, "");
        let output = whippet(&["sql", "--config", &world.write("sql.yaml", &config)]);
        let script = String::from_utf8(output.stdout).unwrap();
        // Twice: it is safe to run again.
        world.sql(&script).await;
        world.sql(&script).await;
        let relay = world.relay(&config);
        world
            .sql(&format!(
                "INSERT INTO public.{table} (topic, key, payload) VALUES ('{topic}', 'k', '{table}')"
            ))
            .await;
        let pending = match after {
            "mark" => format!("SELECT count(*) FROM {table} WHERE published_at IS NULL"),
            _ => format!("SELECT count(*) FROM {table}"),
        };
        world.until(&pending, 0).await;
        // Everything that an operator can do, too.
        world
            .sql(&format!(
                "INSERT INTO public.{table} (topic, key, payload, headers) VALUES ('{topic}', 'bad', 'x', '7'), ('{topic}', 'bad', 'y', NULL)"
            ))
            .await;
        relay.until_status("/tables/0/parked_events", 2).await;
        relay.operate(&world, &["pause", "--topic", "elsewhere"]);
        relay.operate(&world, &["resume", "--topic", "elsewhere"]);
        relay.operate(&world, &["redrive", "--all"]);
        // The status is a moment behind; the table is not.
        world.until("SELECT count(*) FROM whippet.holds", 2).await;
        assert_eq!(relay.operate(&world, &["skip", "--key", "bad", "--reason", "test"])["events"], 2);
        if after == "mark" {
            assert_eq!(relay.operate(&world, &["replay", "--from", "1", "--to", "1"])["events"], 1);
            world.until("SELECT count(*) FROM whippet.replays", 0).await;
        }
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
    }
    let mut consumer = world.consumer(&topic);
    assert_eq!(
        consumer.read(3).iter().map(super::harness::Seen::text).collect::<Vec<_>>(),
        ["deleted", "marked", "marked"]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn large_rows_travel_within_the_window_and_a_giant_is_parked_unread() {
    let world = World::new("large").await;
    let topic = world.create_topic("large", 1, &[("max.message.bytes", "40000000")]).await;
    let config = world.config(
        "[{ name: outbox, payload: { max_bytes: 32MiB } }]",
        "limits: { in_flight_bytes: 4MiB }\nreplicas: { lease: 2s }",
    );
    let config = config.replacen("replicas: { lease: 2s }\n", "", 1);
    world.install(&config).await;
    // 300 rows of 700 KB, one of 20 MB that is larger than the window, one of 40 MB that is too large.
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'k' || i % 3, convert_to(repeat(chr(97 + i % 26), 700000), 'UTF8') FROM generate_series(1, 300) i;
             INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'big', convert_to(repeat('b', 20000000), 'UTF8')),
               ('{topic}', 'giant', convert_to(repeat('g', 40000000), 'UTF8')), ('{topic}', 'big', 'after');"
        ))
        .await;
    let relay = world.relay(&config);
    world.until("SELECT count(*) FROM outbox", 1).await;
    world.until("SELECT count(*) FROM whippet.holds WHERE reason LIKE '%40000000 bytes%'", 1).await;
    let peak = peak_resident(relay.id());
    eprintln!("peak resident memory {} MiB", peak >> 20);
    // contract.md section 5: 40 MiB + 2 × in_flight_bytes + 3 × the largest row in flight.
    assert!(peak < (40 << 20) + 2 * (4 << 20) + 3 * 20_000_000, "{} MiB", peak >> 20);
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read(302);
    let big: Vec<usize> =
        seen.iter().filter(|r| r.key.as_deref() == Some(b"big")).map(|r| r.text().len()).collect();
    assert_eq!(big, [20_000_000, 5]);
    assert!(seen[..300].iter().all(|record| record.payload.as_ref().unwrap().len() == 700_000));
}

/// However many bytes a read brings with its rows.
#[tokio::test(flavor = "multi_thread")]
async fn the_longest_payload_is_published_and_one_byte_more_is_parked_unread() {
    let world = World::new("longest").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox, payload: { max_bytes: 1KiB }, poll: { batch: 10 } }]", "");
    world.install(&config).await;
    let _relay = world.relay(&config);
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload) SELECT '{topic}', 'k' || i, convert_to(repeat('x', i), 'UTF8') \
             FROM unnest('{{0,1023,1024,1025,1500,100000}}'::int[]) i"
        ))
        .await;
    world.until("SELECT count(*) FROM whippet.holds WHERE reason LIKE '%max_bytes%'", 3).await;
    world.until("SELECT count(*) FROM outbox", 3).await;
    let mut consumer = world.consumer(&topic);
    let sizes: Vec<usize> = consumer.read_to_end().iter().map(|record| record.text().len()).collect();
    assert_eq!(sizes, [0, 1023, 1024]);
}

/// VmHWM of proc(5), in bytes.
pub fn peak_resident(id: u32) -> usize {
    let status = std::fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find(|line| line.starts_with("VmHWM")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() << 10
}

#[tokio::test(flavor = "multi_thread")]
async fn a_notification_wakes_a_poller_that_sleeps_for_an_hour() {
    let world = World::new("notify").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config =
        world.config("[{ name: outbox, poll: { min_interval: 1h, max_interval: 1h, wake: notify } }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    relay.wait_for("this relay owns the source");
    let mut consumer = world.consumer(&topic);
    for n in 1..=20 {
        // Between the notifications the poller sleeps; the listener has to be there by the first.
        world.until("SELECT count(*) FROM pg_stat_activity WHERE query LIKE 'LISTEN%' AND datname = current_database()", 1).await;
        world.sql(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', '{n}')")).await;
        consumer.read(n);
    }
}

/// Published rows go after their time, some at a time; what waits, what is held and what is young stays.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_were_published_long_ago_are_deleted() {
    let world = World::new("retention").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox, after_publish: mark, retention: { published: 1h } }]", "");
    world.install(&config).await;
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload, published_at) SELECT '{topic}', 'old', '1', now() - interval '2 hours' FROM generate_series(1, 12000);
             INSERT INTO outbox (topic, key, payload, published_at) VALUES ('{topic}', 'young', '2', now() - interval '50 minutes');
             INSERT INTO outbox (topic, key, payload, headers) VALUES ('{topic}', 'bad', '3', '7'), ('{topic}', 'good', '4', NULL)"
        ))
        .await;
    let relay = world.relay(&config);
    world.until("SELECT count(*) FROM outbox", 3).await;
    world.until("SELECT count(*) FROM outbox WHERE published_at IS NULL", 1).await;
    assert_eq!(world.consumer(&topic).read(1)[0].text(), "4");
    relay.until_status("/tables/0/parked_events", 1).await;
    assert_eq!(world.number("SELECT count(*) FROM outbox WHERE key = 'young'").await, 1);
}
