//! What the binlog brings is what the table has, byte for byte, whatever the columns are.

use crate::{
    harness::{Relay, calm},
    mysql::{on_both, world},
    mysql_stream::streamed,
    stream_rows::{only_the_log, same, streams},
};

on_both!(every_type_comes_from_the_log_as_from_the_table, a_column_that_the_log_does_not_tell_is_polled);

/// A type, and values of it.
const KINDS: &[(&str, &[&str])] = &[
    ("TINYINT", &["0", "-128", "127", "NULL"]),
    ("TINYINT UNSIGNED", &["0", "255"]),
    ("BOOLEAN", &["TRUE", "FALSE"]),
    ("SMALLINT", &["-32768", "32767"]),
    ("SMALLINT UNSIGNED", &["65535"]),
    ("MEDIUMINT", &["-8388608", "8388607", "-1"]),
    ("MEDIUMINT UNSIGNED", &["16777215"]),
    ("INT", &["-2147483648", "2147483647"]),
    ("INT UNSIGNED", &["4294967295"]),
    ("INT(7) ZEROFILL", &["0", "42", "4294967295"]),
    ("BIGINT", &["-9223372036854775808", "9223372036854775807"]),
    ("BIGINT UNSIGNED", &["18446744073709551615", "0"]),
    ("DECIMAL(20,4)", &["-1234567890123456.7800", "0", "0.0001", "-0.5"]),
    ("DECIMAL(65,30)", &["12345678901234567890123456789012345.123456789012345678901234567890", "-1e-30"]),
    ("DECIMAL(9,9)", &["0.123456789", "-0.000000001"]),
    ("DECIMAL(10,0) UNSIGNED", &["9999999999", "7"]),
    (
        "DOUBLE",
        &[
            "0",
            "0.1",
            "1.5",
            "-1e-300",
            "1e14",
            "1e15",
            "123456789012345678",
            "1.7976931348623157e308",
            "0.000123",
            "1e-14",
            "1e-15",
            "1e-16",
            "2.5e-16",
            "0.30000000000000004",
            "-0e0",
        ],
    ),
    ("DOUBLE(12,3)", &["1.5", "-123456.789", "0"]),
    ("FLOAT", &["-0.25", "0.1", "16777216", "1e30", "1234567", "1e-20", "3.402823e38", "100000", "1e15"]),
    ("FLOAT(7,2)", &["1.5", "-12345.67"]),
    ("BIT(1)", &["b'1'", "b'0'"]),
    ("BIT(5)", &["b'00101'"]),
    ("BIT(12)", &["b'101010101010'", "b'1'"]),
    ("BIT(64)", &["~0", "1"]),
    ("CHAR(5)", &["'ab'", "''", "'ab   '", "'grüße'"]),
    ("CHAR(255)", &["'ab'", "REPEAT('🐕', 255)"]),
    ("CHAR(10) CHARACTER SET latin1", &["'grüße €'", "''"]),
    ("VARCHAR(40)", &["'grüß 🐕 '", "''"]),
    ("VARCHAR(400)", &["REPEAT('ü', 400)", "'v'"]),
    ("VARCHAR(40) CHARACTER SET latin1", &["'grüße € žŠ'"]),
    ("VARCHAR(40) CHARACTER SET ascii", &["'plain'"]),
    ("VARCHAR(40) CHARACTER SET utf8mb3", &["'grüße'"]),
    ("TINYTEXT", &["'t'", "''"]),
    ("TEXT", &["''", "REPEAT('long', 2000)"]),
    ("MEDIUMTEXT", &["'it''s'", "REPEAT('x', 20000)"]),
    ("LONGTEXT", &["'long'"]),
    ("TEXT CHARACTER SET latin1", &["'grüße €'"]),
    ("BINARY(4)", &["x'00ff0a'", "x'00000000'", "x'01020304'", "x'20200000'"]),
    ("BINARY(16)", &["x'0102030405060708090a0b0c0d0e0f00'"]),
    ("VARBINARY(9)", &["x'00ff0a'", "x'0000'", "''"]),
    ("VARBINARY(300)", &["x'00ff0a'"]),
    ("TINYBLOB", &["x'00'"]),
    ("BLOB", &["x'00ff5c27'"]),
    ("MEDIUMBLOB", &["x'00ff5c27'"]),
    ("LONGBLOB", &["x''", "REPEAT(x'ff00', 5000)"]),
    (
        "JSON",
        &[
            r#"'{"a": [1, "b"]}'"#,
            r#"'{ "long key" : {"x":[]}, "b":{}, "a":null, "c": [true,false,[[]]], "bb": -1 }'"#,
            "'[0, -1, 32767, -32768, 32768, 65535, 65536, -32769, 2147483648, 4294967296, 9223372036854775807, -9223372036854775808, 18446744073709551615]'",
            "'[0.1, 1.0, -0.0, 1e20, 1.5e-7, 1e15, 1e14, 123456789012345680, 0.30000000000000004, 1e-15, 1e-16, 18446744073709551616, 2.0]'",
            r#"'"\\u00fc \\n \\t \\" \\\\ / \\u0001 \\u001f \\b \\f \\r 🐕 \\u007f"'"#,
            "'null'",
            "'true'",
            "'7'",
            "'1.5'",
            "'\"\"'",
            "'[]'",
            "'{}'",
        ],
    ),
    ("ENUM('one','tü','it''s','a,b','Mixed','')", &["'tü'", "'one'", "'it''s'", "'a,b'", "'mixed'", "''"]),
    ("ENUM('a','ä') CHARACTER SET latin1", &["'ä'"]),
    ("SET('a','b','it''s','D')", &["'d,a'", "''", "'it''s'"]),
    ("DATE", &["'2026-02-28'", "'1000-01-01'", "'9999-12-31'"]),
    ("TIME", &["'-12:34:56'", "'838:59:59'", "'00:00:01'"]),
    ("TIME(1)", &["'-12:34:56.7'", "'00:00:00.1'", "'-00:00:00.1'"]),
    ("TIME(3)", &["'-12:34:56.789'", "'01:02:03.004'", "'-00:00:00.001'"]),
    ("TIME(6)", &["'-838:59:58.999999'", "'00:00:00.000001'", "'-00:00:00.000001'"]),
    ("YEAR", &["2026", "1901", "2155"]),
    ("DATETIME", &["'2026-02-28 23:59:59'", "'1000-01-01 00:00:00'"]),
    ("DATETIME(2)", &["'2026-02-28 23:59:59.01'"]),
    ("DATETIME(6)", &["'2026-02-28 23:59:59.000001'", "'9999-12-31 23:59:59.999999'"]),
    ("TIMESTAMP NULL", &["'2026-02-28 23:59:59'", "'2037-01-01 00:00:00'", "NULL"]),
    ("TIMESTAMP(3) NULL", &["'2026-02-28 23:59:59.5'"]),
    ("TIMESTAMP(6) NULL", &["'2026-02-28 23:59:59.500001'"]),
    ("POINT", &["ST_GeomFromText('POINT(1 2.5)')"]),
    ("GEOMETRY", &["ST_GeomFromText('LINESTRING(0 0,1 1.5)')"]),
];

/// Documents of what JSON has no form for.
const OF_MYSQL: &[(&str, &[&str])] = &[
    (
        "JSON",
        &[
            "JSON_OBJECT('d', CAST('2026-02-28' AS DATE), 't', CAST('-12:34:56.5' AS TIME(1)), 'dt', CAST('2026-02-28 01:02:03.000004' AS DATETIME(6)))",
            "JSON_ARRAY(CAST(1.50 AS DECIMAL(5,2)), CAST(-0.001 AS DECIMAL(9,3)), CAST('12345678901234567890.5' AS DECIMAL(30,3)))",
            "JSON_ARRAY(x'00ff', b'101', CAST('ab' AS BINARY))",
            "JSON_ARRAY(REPEAT(x'ff00', 100))",
            "JSON_ARRAY(REPEAT('long', 20000), REPEAT('x', 200))",
            "JSON_OBJECT(REPEAT('k', 300), 1, 'z', JSON_ARRAY(1.25e0, 3e0, -1e-7))",
            "JSON_ARRAY(CAST(1 AS UNSIGNED), TRUE, NULL, POINT(1, 2))",
        ],
    ),
    ("VECTOR(3)", &["STRING_TO_VECTOR('[1,2.5,-3]')"]),
];

async fn every_type_comes_from_the_log_as_from_the_table(server: &str) {
    let world = world(server).await;
    let (polled, streaming) =
        (world.create_topic("polled", 1, &[]).await, world.create_topic("streamed", 1, &[]).await);
    let more = if server == "mysql" { OF_MYSQL } else { &[] };
    let kinds: Vec<&(&str, &[&str])> = KINDS.iter().chain(more).collect();
    let (mut tables, mut script) = (Vec::new(), String::from("SET sql_mode = '';\n"));
    for (n, (kind, _)) in kinds.iter().enumerate() {
        for (prefix, capture) in [("s", "auto"), ("p", "poll")] {
            tables.push(format!(
                "{{ name: {prefix}{n}, capture: {capture}, columns: {{ payload: v, key: n, created_at: at }} }}"
            ));
            script += &format!(
                "CREATE TABLE {prefix}{n} (skipped VARCHAR(300), seq BIGINT AUTO_INCREMENT PRIMARY KEY, \
                   id BINARY(16) NOT NULL, topic TEXT NOT NULL, n INT, v {kind}, at TIMESTAMP(3) NOT NULL);\n"
            );
        }
    }
    world.sql(&script).await;
    let config = calm(&streamed(&world, "{ name: outbox }"));
    let config = config.replace("[{ name: outbox }]", &format!("[{}]", tables.join(", ")));
    let relay = Relay::start(&world.write("whippet.yaml", &config));
    streams(&relay, (0..kinds.len()).map(|n| 2 * n)).await;
    let mut script = String::from("SET time_zone = '+05:30';\nSET sql_mode = '';\n");
    let mut rows = 0;
    for (n, (_, values)) in kinds.iter().enumerate() {
        for value in *values {
            rows += 1;
            for (prefix, topic) in [("s", &streaming), ("p", &polled)] {
                script += &format!(
                    "INSERT INTO {prefix}{n} (skipped, id, topic, n, v, at) \
                       VALUES ('{rows}', UNHEX('{rows:032x}'), '{topic}', {n}, {value}, '2026-01-01 05:30:00.123');\n"
                );
            }
        }
    }
    world.sql(&script).await;
    let mut seen = (world.consumer(&polled), world.consumer(&streaming));
    same(seen.0.read(rows), seen.1.read(rows));
    assert!(seen.1.seen.iter().all(|one| one.timestamp == Some(1_767_225_600_123)));
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    only_the_log(&log);
    eprintln!("{rows} values are the same");
}

async fn a_column_that_the_log_does_not_tell_is_polled(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox }, { name: other }");
    world.install(&config).await;
    world.sql("ALTER TABLE other MODIFY payload TEXT CHARACTER SET utf16").await;
    let relay = world.relay(&config);
    streams(&relay, [0]).await;
    let why = |status: &serde_json::Value| {
        status["tables"][1]["capture_reason"].as_str().unwrap_or_default().contains("text (utf16)")
    };
    relay.until(why).await;
    assert_eq!(relay.status()["tables"][1]["capture"], "poll");
    for table in ["outbox", "other"] {
        world.sql(&format!("INSERT INTO {table} (topic, payload) VALUES ('{topic}', 'grüße')")).await;
    }
    let mut consumer = world.consumer(&topic);
    assert!(consumer.read(2).iter().all(|one| one.text() == "grüße"));
    // It is followed when it can be.
    world.sql("ALTER TABLE other MODIFY payload LONGTEXT CHARACTER SET utf8mb4").await;
    streams(&relay, [0, 1]).await;
    world.sql(&format!("INSERT INTO other (topic, payload) VALUES ('{topic}', 'again')")).await;
    consumer.read(3);
    assert_eq!(relay.stop().0, Some(0));
}
