//! What the log brings is what the table has, byte for byte, whatever the columns and the transactions are.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt::Write as _,
};

use crate::{
    harness::{Relay, Seen, World, calm},
    stream::drop_slot,
    stream_sizes::numbers,
};

/// A configuration with a log; slots are the server's, so their name is the database's.
pub fn with_log(world: &World, tables: &str, more: &str) -> String {
    let stream = format!("stream: {{ slot: {0}, publication: {0}, heartbeat: 1s }}", world.name);
    world.config(tables, more).replace("source: {", &format!("source: {{ {stream},"))
}

/// Waits until these tables, by their number in the configuration, are streamed.
pub async fn streams(relay: &Relay, tables: impl IntoIterator<Item = usize>) {
    for table in tables {
        relay.until_status(&format!("/tables/{table}/capture_reason"), "the log is read").await;
    }
}

/// Stops the relay, and drops the slot, which outlives its database's relay.
pub async fn end(world: &World, relay: Relay) -> String {
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    drop_slot(world).await;
    log
}

/// What of a record must not depend on how its row was found. Without a key, any partition is right, and
/// without a time that Kafka knows, it is the time of publishing: later than the last that a test writes.
type Wire = (Option<i32>, Option<i64>, Option<Vec<u8>>, Option<Vec<u8>>, Vec<(String, Option<Vec<u8>>)>);

pub fn by_id(seen: &[Seen]) -> BTreeMap<String, Wire> {
    let records = seen.iter().map(|one| {
        let partition = one.key.as_ref().map(|_| one.partition);
        let timestamp = one.timestamp.filter(|ms| *ms <= LAST_TIME_MS);
        let wire = (partition, timestamp, one.key.clone(), one.payload.clone(), one.headers.clone());
        (one.header("id").unwrap().to_owned(), wire)
    });
    records.collect()
}

/// Asserts that two topics have the same records, and says all that differ.
pub fn same(polled: &[Seen], streamed: &[Seen]) {
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
pub fn only_the_log(log: &str) {
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

pub const TYPES: &str = "CREATE EXTENSION hstore; CREATE EXTENSION citext; CREATE EXTENSION ltree;
    CREATE TYPE mood AS ENUM ('happy', 'so so', 'größer'); CREATE DOMAIN mood_too AS mood;
    CREATE DOMAIN flag AS boolean; CREATE DOMAIN flag_of_flag AS flag; CREATE DOMAIN padded AS char(5);
    CREATE DOMAIN words AS text; CREATE DOMAIN raw AS bytea; CREATE DOMAIN number AS integer;
    CREATE DOMAIN address AS inet; CREATE DOMAIN page AS xml; CREATE DOMAIN document AS json;
    CREATE DOMAIN binary_document AS jsonb; CREATE DOMAIN key_of AS uuid; CREATE DOMAIN moment AS timestamptz;
    CREATE TYPE pair AS (a int, b text)";

/// 2026-01-02 03:04:05.678, the latest of [`TIMES`].
pub const LAST_TIME_MS: i64 = 1_767_323_045_678;
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
    let config = calm(&with_log(&world, &format!("[{}]", tables.join(",\n  ")), ""));
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
                .sql(&format!(
                    "CREATE TABLE {table}{number} (event {id} NOT NULL UNIQUE, no {order}, at {time})"
                ))
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
            shape("text", "'no time at all'", "bigint", "1", ["text", "'junk'"]),
            shape("text", "'a number'", "bigint", "1", ["numeric", "1767323045678"]),
            shape("text", "'for ever'", "bigint", "1", ["timestamptz", "'infinity'"]),
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
    let read = relay.metric("whippet_events_read_total", "table=\"outbox\"");
    let log = end(&world, relay).await;
    assert!(log.contains("left to the table"));
    assert_eq!(read, 6.0, "one that the log leaves to the table is read there: {log}");
    let seen: Vec<_> = consumer
        .read_to_end()
        .iter()
        .map(|one| (one.header("id").unwrap(), one.payload.as_deref()))
        .collect();
    let page = Some(page.as_bytes());
    assert_eq!(
        seen,
        [("x1", page), ("y1", None), ("x2", page), ("y2", None), ("x3", page), ("y3", None)],
        "{log}"
    );
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
