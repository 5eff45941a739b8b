//! What the log brings is what the table has, byte for byte, whatever the columns and the transactions are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::harness::{Consumer, Relay, SOON, Seen, World, service};

/// A configuration with a log; slots are the server's, so their name is the database's.
fn with_log(world: &World, tables: &str, more: &str) -> String {
    let stream = format!("stream: {{ slot: {0}, publication: {0}, heartbeat: 1s }}", world.name);
    world.config(tables, more).replace("source: {", &format!("source: {{ {stream},"))
}

/// Waits until these tables, by their number in the configuration, are streamed.
async fn streams(relay: &Relay, tables: impl IntoIterator<Item = usize>) {
    for table in tables {
        relay.until_status(&format!("/tables/{table}/capture"), "stream").await;
    }
}

/// Stops the relay, and drops the slot, which outlives its database's relay.
async fn end(world: &World, relay: Relay) -> String {
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(world).await;
    log
}

async fn drop_slot(world: &World) {
    let name = &world.name;
    world
        .sql(&format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = '{name}'"
        ))
        .await;
}

/// What of a record must not depend on how its row was found. Without a key, any partition is right, and
/// without a time that Kafka knows, it is the time of publishing: later than the last that a test writes.
type Wire = (Option<i32>, Option<i64>, Option<Vec<u8>>, Option<Vec<u8>>, Vec<(String, Option<Vec<u8>>)>);

fn by_id(seen: &[Seen]) -> BTreeMap<String, Wire> {
    let records = seen.iter().map(|one| {
        let partition = one.key.as_ref().map(|_| one.partition);
        let timestamp = one.timestamp.filter(|ms| *ms <= LAST_TIME_MS);
        let wire = (partition, timestamp, one.key.clone(), one.payload.clone(), one.headers.clone());
        (one.header("id").unwrap().to_owned(), wire)
    });
    records.collect()
}

/// Asserts that two topics have the same records, and says all that differ.
fn same(polled: &[Seen], streamed: &[Seen]) {
    let (polled, streamed) = (by_id(polled), by_id(streamed));
    let ids: BTreeSet<&String> = polled.keys().chain(streamed.keys()).collect();
    let mut differ = String::new();
    for id in ids {
        if polled.get(id) != streamed.get(id) {
            let text = |wire: Option<&Wire>| {
                wire.map(|(partition, timestamp, key, value, headers)| {
                    let text = |bytes: &Option<Vec<u8>>| {
                        bytes.as_ref().map(|bytes| String::from_utf8_lossy(bytes).into_owned())
                    };
                    let headers: Vec<_> =
                        headers.iter().map(|(name, value)| (name.clone(), text(value))).collect();
                    format!(
                        "{partition:?} {timestamp:?} key {:?} value {:?} {headers:?}",
                        text(key),
                        text(value)
                    )
                })
            };
            writeln!(
                differ,
                "{id}\n  polled   {:?}\n  streamed {:?}",
                text(polled.get(id)),
                text(streamed.get(id))
            )
            .unwrap();
        }
    }
    assert!(differ.is_empty(), "\n{differ}");
}

/// Nothing was left to the table: every row came from the log.
fn only_the_log(log: &str) {
    assert!(!log.contains("left to the table") && !log.contains("not what they were"), "{log}");
}

/// A type, and values of it. `text`: whether every value is text, and so may be a header.
struct Kind {
    name: &'static str,
    values: &'static [&'static str],
    text: bool,
}

const fn kind(name: &'static str, values: &'static [&'static str]) -> Kind {
    Kind { name, values, text: true }
}

/// Of these alone the log brings rows in binary.
const SIMPLE: &[Kind] = &[
    kind("smallint", &["0", "-32768", "32767"]),
    kind("integer", &["0", "-2147483648", "2147483647"]),
    kind("bigint", &["0", "-9223372036854775808", "9223372036854775807"]),
    kind("text", &["''", "'grüße'", "' x '", "E'a\\nb\\t\\\\x6869'", "repeat('long', 1000)"]),
    kind("varchar(20)", &["''", "'v'", "'ends in blanks   '"]),
    kind("char(10)", &["''", "'ab'", "'  ab'", "'full   end'", "'grüße'"]),
    kind("name", &["'public'", "''"]),
    kind("boolean", &["true", "false"]),
    kind("uuid", &["'ABCDEF01-2345-6789-abcd-ef0123456789'", "'00000000-0000-0000-0000-000000000000'"]),
    kind("json", &["'{ \"b\" :1,\n  \"a\":[] ,\"b\":2}'", "' 7 '", "'null'"]),
    kind("jsonb", &["'{ \"b\" :1,\n  \"a\":[] ,\"b\":2}'", "'1.50'", "'\"\\u00fc\"'", "'null'"]),
    kind("mood", &["'happy'", "'so so'", "'größer'"]),
    kind("flag", &["true", "false"]),
    kind("padded", &["''", "'ab '"]),
    Kind { text: false, ..kind("bytea", &["''", "'\\x00ff10'", EVERY_BYTE, "'\\x5c78'"]) },
];

/// Each byte once.
const EVERY_BYTE: &str = "(SELECT decode(string_agg(lpad(to_hex(i), 2, '0'), '' ORDER BY i), 'hex') FROM generate_series(0, 255) i)";

/// With one of these, all come as text.
const ODD: &[Kind] = &[
    kind("numeric", &["0", "1.50", "'NaN'", "'Infinity'", "-1e-20", "12345678901234567890.123456789"]),
    kind("numeric(10,3)", &["1.5", "-0.0004"]),
    kind("real", &["0.1", "'NaN'", "1e30", "'-Infinity'", "16777217"]),
    kind("double precision", &["0.1", "'Infinity'", "1e-300", "'-0'", "0.1::float8 + 0.2"]),
    kind("money", &["12.34", "-1234567.89"]),
    kind("\"char\"", &["'a'", "''", "' '"]),
    kind("oid", &["4294967295"]),
    kind("regclass", &["'pg_class'"]),
    kind(
        "timestamp",
        &["'2026-01-02 03:04:05.678901'", "'1999-12-31 23:59:59.9'", "'infinity'", "'0044-03-15 BC'"],
    ),
    kind(
        "timestamptz",
        &[
            "'2026-01-02 03:04:05.678901+05:30'",
            "'1999-12-31 23:59:59.9+00'",
            "'-infinity'",
            "'0044-03-15 00:00+00 BC'",
        ],
    ),
    kind("date", &["'2026-01-02'", "'infinity'", "'0044-03-15 BC'", "'12026-01-02'"]),
    kind("time", &["'03:04:05.5'", "'24:00'"]),
    kind("timetz", &["'03:04:05.5+05:30'"]),
    kind("interval", &["'1 year 2 mons -3 days 04:05:06.5'", "'0'", "'-1 mon 1 day'"]),
    kind("point", &["'(1.5,0.1)'"]),
    kind("line", &["'{1,2,3}'"]),
    kind("lseg", &["'[(0,0),(1,1.5)]'"]),
    kind("box", &["'(1,1),(0,0.1)'"]),
    kind("path", &["'[(0,0),(1,1)]'", "'((0,0),(1,1))'"]),
    kind("polygon", &["'((0,0),(1,1),(2,0))'"]),
    kind("circle", &["'<(1,2),0.1>'"]),
    kind(
        "inet",
        &["'10.0.0.1'", "'10.0.0.1/8'", "'10.0.0.1/32'", "'::1'", "'fe80::1/64'", "'::ffff:1.2.3.4/128'"],
    ),
    kind("cidr", &["'10.0.0.0/8'", "'10.0.0.1'", "'fe80::/64'", "'::1'"]),
    kind("macaddr", &["'08-00-2B-01-02-03'"]),
    kind("macaddr8", &["'08-00-2B-01-02-03-04-05'"]),
    kind("bit(5)", &["B'10110'"]),
    kind("bit varying", &["B''", "B'101'"]),
    kind("tsvector", &["to_tsvector('english', 'the quick brown foxes''s tail')"]),
    kind("tsquery", &["'fat & (rat | !cat)'"]),
    kind(
        "xml",
        &[
            "'<a/>'",
            "xmlparse(content 'text <b>c</b>')",
            "'<?xml version=\"1.0\"?>\n<a> x </a>'",
            "'<?xml version=\"1.0\" encoding=\"UTF-8\" standalone=\"yes\"?><a/>'",
            "'<?xml version=\"1.1\" encoding=\"UTF-8\"?><ü/>'",
        ],
    ),
    kind("jsonpath", &["'$.a[*] ? (@ > 1)'"]),
    kind("text[]", &["'{}'", "ARRAY['a', NULL, '', 'b \"c\"', 'NULL']", "ARRAY[['a','b'],['c','d']]"]),
    kind("integer[]", &["'{1,2}'", "'[2:3]={1,NULL}'"]),
    kind("boolean[]", &["'{t,f}'"]),
    kind("char(3)[]", &["'{a,ab }'"]),
    kind("inet[]", &["'{10.0.0.1}'"]),
    kind("bytea[]", &["ARRAY['\\x00ff'::bytea, '']"]),
    kind("timestamptz[]", &["ARRAY['2026-01-02 03:04:05+00'::timestamptz]"]),
    kind("float8[]", &["ARRAY[0.1]"]),
    kind("mood[]", &["'{happy,\"so so\"}'"]),
    kind("int4range", &["'[1,5)'", "'empty'", "'(,3]'"]),
    kind("tstzrange", &["'[2026-01-02 03:04:05+00,)'"]),
    kind("int4multirange", &["'{[1,2),[5,7)}'"]),
    kind("pair", &["ROW(1, 'x y')", "ROW(NULL, '')"]),
    kind("pg_lsn", &["'16/B374D848'"]),
    kind("xid8", &["'7'"]),
    kind("words", &["' grüße '", "''"]),
    kind("raw", &["'\\x00ff10'", "''"]),
    kind("number", &["7"]),
    kind("flag_of_flag", &["true", "false"]),
    kind("mood_too", &["'happy'"]),
    kind("address", &["'10.0.0.1'", "'::1'", "'10.0.0.0/8'"]),
    kind("document", &["' {\"b\": 1 }'"]),
    kind("binary_document", &["' {\"b\": 1 }'"]),
    kind("key_of", &["'ABCDEF01-2345-6789-abcd-ef0123456789'"]),
    kind("moment", &["'2026-01-02 03:04:05+05:30'"]),
    kind("hstore", &["'a=>1, \"b c\"=>NULL'", "''"]),
    kind("citext", &["'Grüße'"]),
    kind("ltree", &["'top.down'"]),
];

const TYPES: &str = "CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree;
    CREATE TYPE mood AS ENUM ('happy', 'so so', 'größer'); CREATE DOMAIN mood_too AS mood;
    CREATE DOMAIN flag AS boolean; CREATE DOMAIN flag_of_flag AS flag; CREATE DOMAIN padded AS char(5);
    CREATE DOMAIN words AS text; CREATE DOMAIN raw AS bytea; CREATE DOMAIN number AS integer;
    CREATE DOMAIN address AS inet; CREATE DOMAIN page AS xml; CREATE DOMAIN document AS json;
    CREATE DOMAIN binary_document AS jsonb; CREATE DOMAIN key_of AS uuid; CREATE DOMAIN moment AS timestamptz;
    CREATE TYPE pair AS (a int, b text)";

/// 2026-01-02 03:04:05.678, the latest of [`TIMES`].
const LAST_TIME_MS: i64 = 1_767_323_045_678;
/// Times that a record may have: with parts of a millisecond, before 2000, before 1970, none.
const TIMES: &[&str] = &[
    "'2026-01-02 03:04:05.678901+00'",
    "'1999-12-31 23:59:59.9999+00'",
    "'1969-12-31 23:59:59.5+00'",
    "NULL",
];

/// Two tables for each type with the same rows, one polled and one streamed. Those of the streamed one are
/// deleted by the transaction that inserted them, so only the log can have them.
async fn every_type_is_the_same(name: &str, kinds: &[&Kind], binary: bool) {
    let world = World::new(name).await;
    let (polled, streamed) =
        (world.create_topic("polled", 3, &[]).await, world.create_topic("streamed", 3, &[]).await);
    world.sql(TYPES).await;
    let (mut tables, mut to_poll, mut to_stream, mut count) = (Vec::new(), String::new(), String::new(), 0);
    for (number, kind) in kinds.iter().enumerate() {
        for (table, capture, topic) in [("p", "poll", &polled), ("s", "stream", &streamed)] {
            let of_type = kind.name;
            world
                .sql(&format!(
                    "CREATE TABLE {table}{number} (no bigserial PRIMARY KEY, event text, body {of_type}, at timestamptz, part int)"
                ))
                .await;
            let (more, kind) = if kind.text { ("headers: { from: [body] },", "body") } else { ("", "null") };
            tables.push(format!(
                "{{ name: {table}{number}, capture: {capture}, topic: '{topic}', key: '{{body}}', {more} columns: {{ id: event,
                   sequence: no, topic: null, key: null, type: {kind}, payload: body, headers: null, created_at: at, partition: part }} }}"
            ));
        }
        for (nth, value) in kind.values.iter().chain(&["NULL"]).enumerate() {
            let at = TIMES[count % TIMES.len()];
            let part = if count % 2 == 0 { "NULL".to_owned() } else { (count % 3).to_string() };
            let row =
                format!("(event, body, at, part) VALUES ('{} {nth}', {value}, {at}, {part});\n", kind.name);
            write!(to_poll, "INSERT INTO p{number} {row}").unwrap();
            write!(to_stream, "INSERT INTO s{number} {row}").unwrap();
            count += 1;
        }
        writeln!(to_stream, "DELETE FROM s{number};").unwrap();
    }
    let config = with_log(&world, &format!("[{}]", tables.join(",\n  ")), "");
    let relay = world.relay(&config);
    streams(&relay, (0..kinds.len()).map(|number| 2 * number + 1)).await;
    let in_binary = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() \
        AND backend_type = 'walsender' AND query LIKE '%binary ''true''%'";
    assert_eq!(world.number(in_binary).await, i64::from(binary));
    world.sql(&format!("BEGIN; {to_poll} COMMIT")).await;
    world.sql(&format!("BEGIN; {to_stream} COMMIT")).await;
    let (mut of_table, mut of_log) = (world.consumer(&polled), world.consumer(&streamed));
    same(of_table.read(count), of_log.read(count));
    for number in 0..kinds.len() {
        world.until(&format!("SELECT count(*) FROM p{number}"), 0).await;
    }
    only_the_log(&end(&world, relay).await);
    assert_eq!((of_table.read_to_end().len(), of_log.read_to_end().len()), (count, count));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_in_binary_gives_the_bytes_that_polling_gives() {
    every_type_is_the_same("binarytypes", &SIMPLE.iter().collect::<Vec<_>>(), true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_as_text_gives_the_bytes_that_polling_gives_for_every_type() {
    every_type_is_the_same("alltypes", &SIMPLE.iter().chain(ODD).collect::<Vec<_>>(), false).await;
}

/// Ids, order columns and times of every type that has a use, in tables that whoever publishes a row empties.
async fn every_place_and_time_is_the_same(name: &str, shapes: &[[&str; 6]]) {
    let world = World::new(name).await;
    let (polled, streamed) =
        (world.create_topic("polled", 3, &[]).await, world.create_topic("streamed", 3, &[]).await);
    world.sql(TYPES).await;
    let (mut tables, mut rows) = (Vec::new(), String::new());
    for (number, [id, id_value, order, order_value, time, time_value]) in shapes.iter().enumerate() {
        for (table, capture, topic) in [("p", "poll", &polled), ("s", "stream", &streamed)] {
            let (ordered, nobody) = if order.is_empty() { ("null", "order: none,") } else { ("no", "") };
            let order = if order.is_empty() { "text" } else { order };
            world
                .sql(&format!("CREATE TABLE {table}{number} (event {id} UNIQUE, no {order}, at {time})"))
                .await;
            tables.push(format!(
                "{{ name: {table}{number}, capture: {capture}, topic: '{topic}', key: 'k', {nobody} columns: {{ id: event,
                   sequence: {ordered}, topic: null, key: null, type: null, payload: event, headers: null, created_at: at }} }}"
            ));
            writeln!(
                rows,
                "INSERT INTO {table}{number} (event, no, at) VALUES ({id_value}, {order_value}, {time_value});"
            )
            .unwrap();
        }
    }
    let config = with_log(&world, &format!("[{}]", tables.join(",\n  ")), "");
    let relay = world.relay(&config);
    streams(&relay, (0..shapes.len()).map(|number| 2 * number + 1)).await;
    world.sql(&rows).await;
    let (mut of_table, mut of_log) = (world.consumer(&polled), world.consumer(&streamed));
    same(of_table.read(shapes.len()), of_log.read(shapes.len()));
    for number in 0..shapes.len() {
        world.until(&format!("SELECT count(*) FROM p{number}"), 0).await;
        world.until(&format!("SELECT count(*) FROM s{number}"), 0).await;
    }
    only_the_log(&end(&world, relay).await);
    assert_eq!(by_id(&of_log.seen).len(), shapes.len(), "every shape has an id of its own");
    assert_eq!((of_table.read_to_end().len(), of_log.read_to_end().len()), (shapes.len(), shapes.len()));
}

#[tokio::test(flavor = "multi_thread")]
async fn ids_order_columns_and_times_are_those_of_polling() {
    let time = "'2026-01-02 03:04:05.678'";
    let exact = ["timestamptz", "'2026-01-02 03:04:05.678+00'"];
    let shape = |id, id_value, no, no_value, [at, at_value]: [&'static str; 2]| {
        [id, id_value, no, no_value, at, at_value]
    };
    every_place_and_time_is_the_same(
        "binaryplaces",
        &[
            shape("uuid", "'ABCDEF01-2345-6789-abcd-ef0123456789'", "", "NULL", exact),
            shape("text", "'it''s \"1\", {a}'", "", "NULL", exact),
            shape("char(8)", "'abc'", "", "NULL", exact),
            shape("bytea", "'a\\\\b'", "", "NULL", exact),
            shape("bigint", "9223372036854775807", "", "NULL", exact),
            shape("integer", "1", "", "NULL", ["bigint", "1767323045678"]),
            shape("text", "'no time'", "smallint", "-7", ["timestamptz", "NULL"]),
            shape("text", "'by integer'", "integer", "7", ["integer", "1767323045"]),
            shape("text", "'by uuid'", "uuid", "'ABCDEF01-2345-6789-abcd-ef0123456789'", exact),
        ],
    )
    .await;
    every_place_and_time_is_the_same(
        "textplaces",
        &[
            shape("numeric", "1.50", "", "NULL", exact),
            shape("bytea", "'a\\\\b'", "", "NULL", exact),
            shape("bit(3)", "B'101'", "", "NULL", exact),
            shape("inet", "'10.0.0.1'", "", "NULL", exact),
            shape("words", "'a domain'", "", "NULL", exact),
            shape("text", "'without a zone'", "bigint", "1", ["timestamp", time]),
            shape("text", "'a date'", "bigint", "1", ["date", "'1999-12-31'"]),
            shape("text", "'a moment'", "bigint", "1", ["moment", "'2026-01-02 03:04:05.678+00'"]),
            shape("text", "'rfc 3339'", "bigint", "1", ["text", "'2026-01-02T04:04:05.678+01:00'"]),
            shape("text", "'by numeric'", "numeric", "1.50", exact),
            shape("text", "'by timestamp'", "timestamptz", time, exact),
            shape("text", "'by float'", "double precision", "0.1", exact),
        ],
    )
    .await;
}

/// What only the table can tell is left to it: nothing is lost, and the log is followed again.
#[tokio::test(flavor = "multi_thread")]
async fn a_row_that_the_log_cannot_tell_is_read_from_the_table() {
    let world = World::new("untold").await;
    let topic = world.create_topic("events", 1, &[]).await;
    world.sql(TYPES).await;
    world.sql("CREATE TABLE outbox (seq bigserial PRIMARY KEY, id text, body page, at timestamptz)").await;
    let config = with_log(
        &world,
        &format!(
            "[{{ name: outbox, capture: stream, topic: '{topic}', key: k, columns: {{ topic: null, key: null, type: null,
               payload: body, headers: null, created_at: at }} }}]"
        ),
        "",
    );
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let mut consumer = world.consumer(&topic);
    let page = r#"<?xml version="1.0"?><a/>"#;
    for n in 1..=3 {
        world.sql(&format!("INSERT INTO outbox (id, body) VALUES ('x{n}', '{page}')")).await;
        // Before the year 1, which no form of the log's is read for.
        world.sql(&format!("INSERT INTO outbox (id, at) VALUES ('y{n}', '0044-03-15 00:00+00 BC')")).await;
        consumer.read(2 * n);
        world.until("SELECT count(*) FROM outbox", 0).await;
        streams(&relay, [0]).await;
    }
    assert!(end(&world, relay).await.contains("left to the table"));
    let seen: Vec<_> = consumer
        .read_to_end()
        .iter()
        .map(|one| (one.header("id").unwrap(), one.payload.as_deref()))
        .collect();
    let page = Some(page.as_bytes());
    assert_eq!(seen, [("x1", page), ("y1", None), ("x2", page), ("y2", None), ("x3", page), ("y3", None)]);
}

const INSERT: &str = "INSERT INTO outbox (topic, key, payload)";

/// A preset's outbox that is streamed, and the relay that streams it.
async fn stream_outbox(world: &World, table: &str, more: &str) -> (String, Relay) {
    let config = with_log(world, &format!("[{{ name: outbox, capture: stream{table} }}]"), more);
    world.install(&config).await;
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    (config, relay)
}

/// The numbers that payloads begin with.
fn numbers(seen: &[Seen]) -> Vec<usize> {
    let number = |one: &Seen| {
        let text = one.text();
        text.split(' ').next().unwrap().parse().unwrap_or_else(|_| panic!("{text:.40}"))
    };
    seen.iter().map(number).collect()
}

/// contract.md section 5.4, with the default window of 12 MiB.
fn within_bounds(relay: &Relay, largest_row: usize) {
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
/// again as many after it.
async fn a_row_among_much_else(name: &str, publication: &str, rows: u32) {
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
        .fetch_one(&world.db)
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

/// Somebody who inserts one row after the other, whatever becomes of the table meanwhile.
struct Writer {
    stop: Arc<AtomicBool>,
    task: tokio::task::JoinHandle<Vec<usize>>,
}

impl Writer {
    /// Rows have one key, and number `n` in key and payload where it belongs.
    fn start(world: &World, insert: &str) -> Writer {
        let (stop, insert) = (Arc::new(AtomicBool::new(false)), insert.to_owned());
        let (asked, db) = (stop.clone(), world.db.clone());
        let task = tokio::spawn(async move {
            let mut inserted = Vec::new();
            for n in 0.. {
                if asked.load(Ordering::Relaxed) {
                    break;
                }
                // A column may be missing at the moment: then there is no row.
                let row = insert.replace("NUMBER", &n.to_string());
                if sqlx::raw_sql(sqlx::AssertSqlSafe(row)).execute(&db).await.is_ok() {
                    inserted.push(n);
                }
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            inserted
        });
        Writer { stop, task }
    }

    /// The numbers of all rows that were committed, in order.
    async fn stop(self) -> Vec<usize> {
        self.stop.store(true, Ordering::Relaxed);
        self.task.await.unwrap()
    }
}

/// Waits until rows come from the log: until one has come that the table never showed.
async fn until_the_log_is_followed(world: &World, consumer: &mut Consumer, insert_and_delete: &str) {
    let deadline = Instant::now() + SOON;
    let from_log = |seen: &[Seen]| seen.iter().filter(|one| one.text() == "only in the log").count();
    let before = from_log(consumer.read_to_end());
    loop {
        world.sql(insert_and_delete).await;
        for _ in 0..10 {
            if from_log(consumer.read_to_end()) > before {
                return;
            }
            world.pause().await;
        }
        assert!(Instant::now() < deadline, "the log is not followed again");
    }
}

/// A table whose columns change under its inserts, one change after the other.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_may_change_while_it_is_streamed() {
    let world = World::new("schemachange").await;
    let topic = world.create_topic("events", 1, &[]).await;
    world
        .sql(&format!(
            "CREATE TABLE outbox (seq bigserial PRIMARY KEY, id uuid DEFAULT gen_random_uuid(), topic text DEFAULT '{topic}',
               key int, type text DEFAULT 't', payload text, headers json, created_at timestamptz DEFAULT now(), unmapped text)"
        ))
        .await;
    let config = with_log(&world, "[{ name: outbox, capture: stream }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let mut consumer = world.consumer(&topic);
    let writer = Writer::start(&world, "INSERT INTO outbox (key, payload) VALUES ('7', 'NUMBER')");
    let only_in_log = "BEGIN; INSERT INTO outbox (key, payload) VALUES ('7', 'only in the log');
        DELETE FROM outbox WHERE payload = 'only in the log'; COMMIT";
    for change in [
        "ADD more text",
        "ADD still_more text NOT NULL DEFAULT 'x'",
        "DROP unmapped",
        // Columns that may be missing.
        "RENAME type TO kind",
        "RENAME kind TO type",
        "DROP type",
        "ADD type text DEFAULT 'again'",
        "DROP created_at",
        "ADD created_at timestamptz DEFAULT now()",
        "ALTER key TYPE text",
        "ALTER key TYPE varchar(100)",
        "ALTER payload TYPE bytea USING convert_to(payload, 'UTF8')",
        "ALTER payload TYPE text USING convert_from(payload, 'UTF8')",
        "ALTER id TYPE text",
    ] {
        eprintln!("{change}");
        world.sql(&format!("ALTER TABLE outbox {change}")).await;
        until_the_log_is_followed(&world, &mut consumer, only_in_log).await;
    }
    assert_eq!(consumer.read_to_end().last().unwrap().header("eventType"), Some("again"));
    let inserted = writer.stop().await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    end(&world, relay).await;
    let seen: Vec<Seen> =
        consumer.read_to_end().iter().filter(|one| one.text() != "only in the log").cloned().collect();
    assert_eq!(first_seen(&numbers(&seen)), inserted, "nothing is lost, nothing overtakes");
    assert!(seen.iter().all(|one| one.key.as_deref() == Some(b"7")));
}

/// Numbers without their repeats.
fn first_seen(numbers: &[usize]) -> Vec<usize> {
    let mut seen = BTreeSet::new();
    numbers.iter().copied().filter(|n| seen.insert(*n)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_column_that_is_needed_and_goes_is_said_and_its_table_flows_when_it_is_back() {
    let world = World::new("needed").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let (_, relay) = stream_outbox(&world, "", "").await;
    let mut consumer = world.consumer(&topic);
    let writer = Writer::start(&world, &format!("{INSERT} VALUES ('{topic}', 'k', 'NUMBER')"));
    let only_in_log = format!(
        "BEGIN; {INSERT} VALUES ('{topic}', 'k', 'only in the log'); DELETE FROM outbox WHERE payload = 'only in the log'; COMMIT"
    );
    consumer.read(10);
    for (gone, back) in [
        ("RENAME payload TO body", "RENAME body TO payload"),
        ("RENAME id TO event_id", "RENAME event_id TO id"),
        ("DROP topic", &format!("ADD topic text DEFAULT '{topic}'")),
    ] {
        world.sql(&format!("ALTER TABLE outbox {gone}")).await;
        // So that there is something to read.
        let nothing = if gone == "DROP topic" {
            "INSERT INTO outbox (key) VALUES ('nothing')".to_owned()
        } else {
            format!("INSERT INTO outbox (key, topic) VALUES ('nothing', '{topic}')")
        };
        world.sql(&nothing).await;
        relay.until_status("/tables/0/state", "failing").await;
        let column = gone.split(' ').nth(1).unwrap();
        let said = format!("table outbox has no column \"{column}\"");
        relay
            .until(|status| status["tables"][0]["last_error"].as_str().is_some_and(|e| e.contains(&said)))
            .await;
        world.sql("DELETE FROM outbox WHERE key = 'nothing'").await;
        world.sql(&format!("ALTER TABLE outbox {back}")).await;
        relay.until_status("/tables/0/state", "running").await;
        until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;
    }
    let inserted = writer.stop().await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    end(&world, relay).await;
    let seen: Vec<Seen> =
        consumer.read_to_end().iter().filter(|one| one.text() != "only in the log").cloned().collect();
    assert_eq!(first_seen(&numbers(&seen)), inserted);
}

/// A role of the server is this test's alone, or its password would change under others.
async fn as_role(world: &World, config: &str, password: &str) -> String {
    let name = &world.name;
    world.install(config).await;
    world
        .sql(&format!(
            "ALTER ROLE whippet_tls PASSWORD '{password}';
             GRANT ALL ON SCHEMA public, whippet TO whippet_tls; ALTER TABLE outbox OWNER TO whippet_tls;
             GRANT CREATE ON DATABASE {name} TO whippet_tls;
             GRANT ALL ON ALL TABLES IN SCHEMA whippet TO whippet_tls; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO whippet_tls"
        ))
        .await;
    let url = service("WHIPPET_TEST_PG_TLS");
    let (server, _) = url.rsplit_once('/').unwrap();
    format!("{}/{name}", server.replace("whippet_tls:whippet-tls@", "whippet_tls@"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_is_encrypted_and_its_password_may_change_while_it_runs() {
    let world = World::new("streamtls").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let plain = with_log(&world, "[{ name: outbox, capture: stream }]", "");
    let url = as_role(&world, &plain, "whippet-tls").await;
    let password = world.write("password", "whippet-tls\n");
    let with_ca = |ca: &str| {
        let more =
            format!("source: {{ password_file: '{password}', tls: {{ mode: verify-full, ca_file: '{ca}' }},");
        plain.replace(&world.url, &url).replace("source: {", &more)
    };
    let config = with_ca(&service("WHIPPET_TEST_PG_CA"));
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let encrypted = "SELECT count(*) FROM pg_stat_ssl JOIN pg_stat_activity USING (pid) WHERE ssl AND \
        usename = 'whippet_tls' AND backend_type = 'walsender' AND datname = current_database()";
    assert_eq!(world.number(encrypted).await, 1);
    let only_in_log =
        format!("BEGIN; {INSERT} VALUES ('{topic}', 'k', 'only in the log'); DELETE FROM outbox; COMMIT");
    let mut consumer = world.consumer(&topic);
    until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;

    // Every connection is made anew.
    world.sql("ALTER ROLE whippet_tls PASSWORD 'rotated'").await;
    world.write("password", "rotated\n");
    world
        .sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'whippet_tls' AND datname = current_database()")
        .await;
    until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;
    streams(&relay, [0]).await;
    assert_eq!(world.number(encrypted).await, 1);
    world.sql("ALTER ROLE whippet_tls PASSWORD 'whippet-tls'").await;
    world.write("password", "whippet-tls\n");
    let log = end(&world, relay).await;
    assert!(!log.contains("rotated"), "a password is never printed");

    // A CA of somebody else's.
    let made = std::process::Command::new("openssl")
        .args([
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:P-256",
            "-nodes",
            "-days",
            "1",
        ])
        .args(["-subj", "/CN=somebody else", "-keyout", "/dev/null", "-out"])
        .arg(world.folder.path().join("other.crt"))
        .output()
        .unwrap();
    assert!(made.status.success(), "{made:?}");
    let relay = world.relay(&with_ca(&world.folder.path().join("other.crt").display().to_string()));
    let said = relay.wait_for("invalid peer certificate");
    assert!(said.to_string().contains("source database"), "{said}");
    assert_eq!(relay.get("/readyz").0, 503);
    assert_eq!(world.number(encrypted).await, 0);
    drop(relay);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_presets_are_streamed_as_they_are_polled() {
    const ROWS: usize = 30;
    let world = World::new("streampresets").await;
    let config = with_log(
        &world,
        "[{ name: w_polled, capture: poll }, { name: w_streamed, capture: stream },
          { name: d_polled, capture: poll, preset: debezium, topic: 'WORLD.polled.{aggregatetype}' },
          { name: d_streamed, capture: stream, preset: debezium, topic: 'WORLD.streamed.{aggregatetype}' }]",
        "",
    )
    .replace("WORLD", &world.name);
    world.install(&config).await;
    for table in ["d_polled", "d_streamed"] {
        world
            .sql(&format!(
                "DROP TABLE IF EXISTS {table}; CREATE TABLE {table} (id uuid NOT NULL PRIMARY KEY, aggregatetype varchar(255) NOT NULL,
                   aggregateid varchar(255) NOT NULL, type varchar(255) NOT NULL, payload jsonb, tracingspancontext varchar(256))"
            ))
            .await;
    }
    let mut topics = Vec::new();
    for name in ["w_polled", "w_streamed", "polled.order", "streamed.order"] {
        topics.push(world.create_topic(name, 3, &[]).await);
    }
    let relay = world.relay(&config);
    streams(&relay, [1, 3]).await;
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    for (table, topic) in [("w_polled", &topics[0]), ("w_streamed", &topics[1])] {
        world
            .sql(&format!(
                r#"BEGIN; SELECT set_config('whippet.context', '{{"x-request-id" : "r-1", "traceparent":"{trace}"}}', true);
                INSERT INTO {table} (id, topic, key, type, payload, created_at)
                SELECT md5(i::text)::uuid, '{topic}', nullif('key ' || i % 5, 'key 0'), nullif('type ' || i % 3, 'type 0'),
                  CASE WHEN i % 7 > 0 THEN decode(md5('p' || i), 'hex') END, '2026-01-02 03:04:05.678+00' FROM generate_series(1, {ROWS}) i;
                COMMIT"#
            ))
            .await;
    }
    for table in ["d_polled", "d_streamed"] {
        world
            .sql(&format!(
                r"INSERT INTO {table} SELECT md5(i::text)::uuid, 'order', 'key ' || i % 5, 'T', jsonb_build_object('b', i, 'a', 1.50),
                  CASE WHEN i % 2 = 0 THEN E'#Mon Jan 01\ntraceparent={trace}\n' END FROM generate_series(1, {ROWS}) i"
            ))
            .await;
    }
    for pair in topics.chunks(2) {
        let (mut of_table, mut of_log) = (world.consumer(&pair[0]), world.consumer(&pair[1]));
        same(of_table.read(ROWS), of_log.read(ROWS));
        assert!(of_log.seen.iter().any(|one| one.header("traceparent") == Some(trace)));
    }
    // Debezium's way: without a number, and gone when it is committed. The log has them in order.
    world
        .sql(
            "DO $$ BEGIN FOR i IN 1..100 LOOP
               INSERT INTO d_streamed VALUES (gen_random_uuid(), 'order', 'k', 'T', to_jsonb(i)); DELETE FROM d_streamed;
             END LOOP; END $$",
        )
        .await;
    let mut of_log = world.consumer(&topics[3]);
    of_log.read(ROWS + 100);
    let of_key: Vec<Seen> =
        of_log.seen.iter().filter(|one| one.key.as_deref() == Some(b"k")).cloned().collect();
    assert_eq!(numbers(&of_key), (1..=100).collect::<Vec<_>>());
    for table in ["w_polled", "w_streamed", "d_polled", "d_streamed"] {
        world.until(&format!("SELECT count(*) FROM {table}"), 0).await;
    }
    only_the_log(&end(&world, relay).await);
}

/// A partitioned outbox, as the one table that it is for those who insert; with partitions that come and go.
#[tokio::test(flavor = "multi_thread")]
async fn a_partitioned_outbox_is_streamed_as_one_table() {
    let world = World::new("partitioned").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config =
        with_log(&world, "[{ name: by_range, capture: stream }, { name: by_hash, capture: stream }]", "");
    let columns =
        "id uuid DEFAULT gen_random_uuid(), topic text, key text, type text, payload bytea, headers json,
        created_at timestamptz DEFAULT now()";
    world
        .sql(&format!(
            "CREATE TABLE by_range (seq bigserial PRIMARY KEY, {columns}) PARTITION BY RANGE (seq);
             CREATE TABLE r1 PARTITION OF by_range FOR VALUES FROM (0) TO (100);
             CREATE TABLE by_hash (seq bigserial PRIMARY KEY, {columns}) PARTITION BY HASH (seq);
             CREATE TABLE h0 PARTITION OF by_hash FOR VALUES WITH (MODULUS 2, REMAINDER 0);
             CREATE TABLE h1 PARTITION OF by_hash FOR VALUES WITH (MODULUS 2, REMAINDER 1)"
        ))
        .await;
    let relay = world.relay(&config);
    streams(&relay, [0, 1]).await;
    let rows = |table: &str, from: u32, to: u32| {
        let insert = format!("INSERT INTO {table} (topic, key, payload)");
        format!(
            "{insert} SELECT '{topic}', '{table}', convert_to('' || i, 'UTF8') FROM generate_series({from}, {to}) i"
        )
    };
    // Only in the log, so that it is the log that has them.
    for (from, to, partition) in [(1, 99, 100), (100, 199, 200), (200, 299, 300)] {
        world
            .sql(&format!(
                "BEGIN; {}; {}; DELETE FROM by_range; DELETE FROM by_hash; COMMIT;
                 CREATE TABLE r{partition} PARTITION OF by_range FOR VALUES FROM ({partition}) TO ({partition} + 100)",
                rows("by_range", from, to),
                rows("by_hash", from, to),
            ))
            .await;
    }
    // With columns in another order.
    world
        .sql(&format!(
            "CREATE TABLE other_order (payload bytea, key text, seq bigint NOT NULL, headers json, type text, id uuid, created_at timestamptz, topic text);
             ALTER TABLE by_range ATTACH PARTITION other_order FOR VALUES FROM (400) TO (1000);
             SELECT setval('by_range_seq_seq', 399); {}; DROP TABLE r1",
            rows("by_range", 300, 399)
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    consumer.read(399 + 299);
    for (table, last) in [("by_range", 399), ("by_hash", 299)] {
        let key = Some(table.as_bytes());
        let seen: Vec<Seen> = consumer.seen.iter().filter(|one| one.key.as_deref() == key).cloned().collect();
        assert_eq!(numbers(&seen), (1..=last).collect::<Vec<_>>());
        world.until(&format!("SELECT count(*) FROM {table}"), 0).await;
    }
    only_the_log(&end(&world, relay).await);
}

/// One log for all of them, and what is wrong with one is its own.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_fails_or_is_paused_leaves_the_others_of_its_log_alone() {
    let world = World::new("onelog").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = with_log(
        &world,
        "[{ name: one, capture: stream }, { name: two, capture: stream }, { name: three, capture: auto }]",
        "",
    );
    world.install(&config).await;
    let relay = world.relay(&config);
    streams(&relay, [0, 1, 2]).await;
    let mut consumer = world.consumer(&topic);
    // Of one and three, only the log can have them.
    let others = |what: &str| {
        let row = |table: &str| {
            format!(
                "BEGIN; INSERT INTO {table} (topic, key, payload) VALUES ('{topic}', '{table}', '{what}');
                 DELETE FROM {table}; COMMIT;"
            )
        };
        format!("{} {}", row("one"), row("three"))
    };
    let two =
        |what: &str| format!("INSERT INTO two (topic, key, payload) VALUES ('{topic}', 'two', '{what}')");
    let has = |seen: &[Seen], key: &str, text: &str| {
        seen.iter().any(|one| one.key.as_deref() == Some(key.as_bytes()) && one.text() == text)
    };
    let others_have = |consumer: &mut Consumer, text: &str| {
        consumer.read_until(|seen| has(seen, "one", text) && has(seen, "three", text));
    };

    relay.operate(&world, &["pause", "--table", "two"]);
    relay.until_status("/tables/1/state", "paused").await;
    // More than all buffers between the log and the table.
    world
        .sql(&format!(
            "{} FROM generate_series(1, 20000)",
            two("paused").replace("VALUES (", "SELECT ").replace("')", "'")
        ))
        .await;
    world.sql(&others("while two is paused")).await;
    others_have(&mut consumer, "while two is paused");
    assert!(!has(consumer.read_to_end(), "two", "paused"));
    relay.operate(&world, &["resume", "--table", "two"]);
    consumer.read_until(|seen| seen.iter().filter(|one| one.text() == "paused").count() == 20_000);
    streams(&relay, [1]).await;

    world.sql(&format!("{}; ALTER TABLE two RENAME payload TO body", two("before"))).await;
    world.sql(&two("failing").replace("payload", "body")).await;
    relay.until_status("/tables/1/state", "failing").await;
    streams(&relay, [0, 2]).await;
    world.sql(&others("while two fails")).await;
    others_have(&mut consumer, "while two fails");
    // The relay that starts now finds it so, and the others are streamed.
    relay.kill();
    let relay = world.relay(&config);
    streams(&relay, [0, 2]).await;
    world.sql(&others("after a start")).await;
    others_have(&mut consumer, "after a start");
    world.sql("ALTER TABLE two RENAME body TO payload").await;
    consumer.read_until(|seen| has(seen, "two", "before") && has(seen, "two", "failing"));
    streams(&relay, [0, 1, 2]).await;

    // There is no such table at all.
    world.sql("ALTER TABLE two RENAME TO elsewhere").await;
    world.sql(&two("missing").replace("INTO two", "INTO elsewhere")).await;
    relay.until_status("/tables/1/state", "failing").await;
    world.sql(&others("while two is missing")).await;
    others_have(&mut consumer, "while two is missing");
    relay.kill();
    let relay = world.relay(&config);
    streams(&relay, [0, 2]).await;
    world.sql(&others("after another start")).await;
    others_have(&mut consumer, "after another start");
    world.sql("ALTER TABLE elsewhere RENAME TO two").await;
    consumer.read_until(|seen| has(seen, "two", "missing"));
    streams(&relay, [0, 1, 2]).await;
    end(&world, relay).await;
}

/// The log says nothing about a table that is another one, or is not published any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_is_made_anew_or_taken_from_the_publication_flows_on() {
    let world = World::new("madeanew").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let (config, relay) = stream_outbox(&world, "", "").await;
    let mut consumer = world.consumer(&topic);
    let row = |what: &str| format!("{INSERT} VALUES ('{topic}', 'k', '{what}')");
    let only_in_log = format!("BEGIN; {}; DELETE FROM outbox; COMMIT", row("only in the log"));
    world.sql("ALTER TABLE outbox RENAME TO old").await;
    world.install(&config).await;
    world.sql(&row("made anew")).await;
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "made anew"));
    until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;

    world.sql(&format!("ALTER PUBLICATION {} DROP TABLE outbox", world.name)).await;
    world.sql(&row("not published")).await;
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "not published"));
    until_the_log_is_followed(&world, &mut consumer, &only_in_log).await;
    end(&world, relay).await;
}

/// Where only the log has the rows, they are what the table was when they were inserted.
#[tokio::test(flavor = "multi_thread")]
async fn rows_that_do_not_stay_outlive_a_change_of_their_table() {
    let world = World::new("transientchange").await;
    let topic = world.create_topic("events", 1, &[]).await;
    world
        .sql(&format!(
            "CREATE TABLE outbox (seq bigserial PRIMARY KEY, id uuid DEFAULT gen_random_uuid(), topic text DEFAULT '{topic}',
               key int DEFAULT 7, type text DEFAULT 't', payload text)"
        ))
        .await;
    let config = with_log(&world, "[{ name: outbox, capture: stream, rows: transient }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    let changes = [
        "ADD unmapped text",
        "RENAME type TO kind",
        "ALTER key TYPE text",
        "ADD created_at timestamptz DEFAULT '2026-01-02 03:04:05.678+00'",
        "ALTER payload TYPE bytea USING convert_to(payload, 'UTF8')",
    ];
    let row =
        |n: usize| format!("BEGIN; INSERT INTO outbox (payload) VALUES ('{n}'); DELETE FROM outbox; COMMIT");
    for (n, change) in changes.iter().enumerate() {
        world.sql(&format!("{}; ALTER TABLE outbox {change}", row(n))).await;
    }
    world.sql(&row(changes.len())).await;
    let relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    assert_eq!(numbers(consumer.read(6)), (0..6).collect::<Vec<_>>());
    assert!(consumer.seen.iter().all(|one| one.key.as_deref() == Some(b"7")));
    let types: Vec<_> = consumer.seen.iter().map(|one| one.header("eventType")).collect();
    assert_eq!(types, [Some("t"), Some("t"), None, None, None, None]);
    let at: Vec<_> = consumer.seen.iter().map(|one| one.timestamp == Some(LAST_TIME_MS)).collect();
    assert_eq!(at, [false, false, false, false, true, true]);
    streams(&relay, [0]).await;
    world.sql(&row(6)).await;
    assert_eq!(numbers(consumer.read(7))[6], 6);
    only_the_log(&end(&world, relay).await);
}
