//! The command line, as a script would use it.

use crate::harness::{path, whippet};

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

#[test]
fn wrong_usage_is_2_and_a_wrong_configuration_78() {
    assert_eq!(whippet(&["fly"]).status.code(), Some(2));
    assert_eq!(whippet(&["run"]).status.code(), Some(2));
    // What a verb is for has to be said, and is looked at before a relay is asked.
    for verb in [
        &["pause"][..],
        &["resume", "--dry-run"],
        &["redrive"],
        &["redrive", "--table", "outbox"],
        &["redrive", "--all", "--key", "k"],
        &["skip", "--reason", "test"],
        &["skip", "--key-hex", "zz", "--reason", "test"],
        &["replay"],
        &["replay", "--table", "outbox"],
        &["replay", "--from", "soon"],
        &["parked", "--payload"],
        &["purge", "--config", "w.yaml"],
        &["purge", "--config", "w.yaml", "--prefix", ""],
    ] {
        assert_eq!(whippet(verb).status.code(), Some(2), "{verb:?}");
    }
    let missing = whippet(&["run", "--config", "/nowhere/whippet.yaml"]);
    assert_eq!(missing.status.code(), Some(78));
    assert!(text(&missing.stderr).contains("/nowhere/whippet.yaml"), "{}", text(&missing.stderr));

    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("w.yaml");
    for (yaml, expected) in [
        ("source: { url: [", "malformed YAML"),
        (
            "source: { url: postgres://x/y }\nkafka: { bootstrap_servers: k }\ntables: [{ nme: outbox }]\n",
            ":3:12: tables[0].nme: unknown key; did you mean `name`?",
        ),
        (
            "source: { url: postgres://x/y }\nkafka: { bootstrap_servers: k, linger: soon }\ntables: [{ name: outbox }]\n",
            "kafka.linger: expected a duration",
        ),
    ] {
        std::fs::write(&file, yaml).unwrap();
        for command in ["validate", "run", "sql"] {
            let said = whippet(&[command, "--config", file.to_str().unwrap()]);
            assert_eq!(said.status.code(), Some(78), "{command} {yaml}");
            assert!(text(&said.stderr).contains(expected), "{}", text(&said.stderr));
            assert!(said.stdout.is_empty());
        }
    }
}

/// A script that is run with one, and a configuration that is run with the other, must not miss each other.
#[test]
fn the_script_of_preset_debezium_says_which_configuration_it_goes_with() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("w.yaml");
    let sql = |arguments: &[&str]| {
        let said = whippet(&[&["sql"], arguments].concat());
        assert_eq!(said.status.code(), Some(0), "{}", text(&said.stderr));
        text(&said.stdout).to_owned()
    };
    let table = |script: &str| {
        let from = script.find("CREATE TABLE").unwrap();
        script[from..].split(';').next().unwrap().to_owned()
    };
    for (dialect, url) in
        [("postgres", "postgres://x/y"), ("mysql", "mysql://x/y"), ("sqlite", "sqlite:///y.db")]
    {
        let by_dialect = sql(&["--dialect", dialect, "--preset", "debezium"]);
        let by_config = |more: &str| {
            let yaml = format!(
                "source: {{ url: '{url}' }}\nkafka: {{ bootstrap_servers: k }}\n\
                 tables: [{{ name: outbox, preset: debezium{more} }}]\n"
            );
            std::fs::write(&file, yaml).unwrap();
            sql(&["--config", file.to_str().unwrap()])
        };
        let mapped = ", columns: { sequence: seq }";
        assert!(by_dialect.contains("preset: debezium, columns: { sequence: seq }"), "{by_dialect}");
        assert_eq!(table(&by_dialect), table(&by_config(mapped)), "{dialect}");
        assert!(!by_config(mapped).contains("no order column"));
        let without = by_config("");
        assert!(
            without.contains("outbox has no order column") && !table(&without).contains("seq"),
            "{without}"
        );
    }
}

#[test]
fn a_good_configuration_is_0_and_the_schema_is_json() {
    let file = path("config/whippet.yaml");
    let said = whippet(&["validate", "--config", file.to_str().unwrap()]);
    assert_eq!(said.status.code(), Some(0), "{}", text(&said.stderr));
    let schema: serde_json::Value = serde_json::from_slice(&whippet(&["schema"]).stdout).unwrap();
    assert!(schema["properties"]["tables"]["items"]["properties"]["order"].is_object());
    assert!(schema["$schema"].is_string());
}

/// The configuration on stdout is good as it is, and what has no equal is on stderr.
#[test]
fn a_connector_of_debezium_is_imported() {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: &str| {
        let path = folder.path().join(name);
        std::fs::write(&path, text).unwrap();
        path.display().to_string()
    };
    let connector = file(
        "outbox.json",
        r#"{"name": "outbox", "config": {
          "connector.class": "io.debezium.connector.postgresql.PostgresConnector", "plugin.name": "pgoutput",
          "database.hostname": "db", "database.user": "relay", "database.password": "hush", "database.dbname": "shop",
          "table.include.list": "public.outbox", "transforms": "outbox",
          "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter",
          "transforms.outbox.table.expand.json.payload": "true"}}"#,
    );
    let said = whippet(&["import", "debezium", &connector]);
    assert_eq!(said.status.code(), Some(0), "{}", text(&said.stderr));
    assert!(text(&said.stderr).contains("table.expand.json.payload: no equal"), "{}", text(&said.stderr));
    assert!(!format!("{}{}", text(&said.stdout), text(&said.stderr)).contains("hush"));
    let config = file("whippet.yaml", text(&said.stdout));
    assert_eq!(whippet(&["validate", "--config", &config]).status.code(), Some(0));

    let other =
        file("other.json", r#"{"connector.class": "io.debezium.connector.mongodb.MongoDbConnector"}"#);
    let said = whippet(&["import", "debezium", &other]);
    assert_eq!(said.status.code(), Some(78));
    assert!(said.stdout.is_empty() && text(&said.stderr).contains("other.json: connector.class is"));
    assert_eq!(whippet(&["import", "debezium", "/nowhere.json"]).status.code(), Some(78));
    assert_eq!(whippet(&["import", "debezium"]).status.code(), Some(2));
}

#[test]
fn the_demo_takes_events_by_http_too() {
    let said = whippet(&["demo", "--ingest", "--events", "200"]);
    assert_eq!(said.status.code(), Some(0), "{}{}", text(&said.stdout), text(&said.stderr));
    let stdout = text(&said.stdout);
    assert!(stdout.contains("ingest     http://127.0.0.1:"), "{stdout}");
    assert!(stdout.contains("every one of 200 committed events came back"), "{stdout}");
}

/// Without any service: the demo brings its own.
#[test]
fn the_demo_succeeds_and_says_what_it_compared() {
    let said = whippet(&["demo", "--events", "300"]);
    assert_eq!(said.status.code(), Some(0), "{}{}", text(&said.stdout), text(&said.stderr));
    let stdout = text(&said.stdout);
    assert!(stdout.contains("every one of 300 committed events came back"), "{stdout}");
    assert!(said.stderr.is_empty(), "{}", text(&said.stderr));
    // Two were too large for a record: how they travelled, and the checksums on both sides.
    let after = |begin: &str| -> Vec<&str> {
        stdout.lines().filter_map(|line| line.trim_start().strip_prefix(begin)).map(str::trim).collect()
    };
    let [claim_check, chunks] = after("event ")[..] else { panic!("{stdout}") };
    let size = |event: &str| event.rsplit(' ').nth(1).unwrap().parse::<usize>().unwrap();
    assert!(claim_check.starts_with("OrderScanned of customer-") && size(claim_check) > 5 << 20, "{stdout}");
    assert!(chunks.starts_with("ContractSigned of customer-") && size(chunks) > 3 << 20, "{stdout}");
    let sent = after("sent ");
    assert!(
        sent[0].starts_with("as a claim check: orders [") && sent[1].starts_with("in 4 chunks: contracts [")
    );
    assert!(after("object ")[0].starts_with("file:///"), "{stdout}");
    let (written, read) = (after("written "), after("read back "));
    assert!(written.len() == 2 && written[0] != written[1], "{stdout}");
    for (written, read) in written.iter().zip(read) {
        assert!(written.starts_with("sha256 ") && written.len() == "sha256 ".len() + 64, "{stdout}");
        assert_eq!(read, format!("{written}  equal"));
    }
}
