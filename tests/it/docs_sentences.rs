//! Commands and statements that stand in the sentences of README, docs and runbooks: whole ones are run.

use std::collections::BTreeSet;

use clap::Parser as _;
use uuid::Uuid;
use whippet::cli::Cli;

use crate::{
    docs::{pages, prose_and_blocks, quoted, words},
    docs_blocks::{printed, shell},
    harness::{World, kafka, path, service},
};

/// What is not run here: by which file it is, and how that calls it; or, without a file, why it is not.
const ELSEWHERE: &[(&str, &str, &str)] = &[
    ("whippet run --config FILE", "tests/it/harness/relay.rs", r#""run", "--config""#),
    ("whippet run --config whippet.yaml", "tests/it/harness/relay.rs", r#""run", "--config""#),
    (
        "ALTER TABLE sales.events ADD COLUMN sent_at timestamptz",
        "tests/it/docs_run.rs",
        "ADD COLUMN sent_at timestamptz",
    ),
    (
        "UPDATE sales.events SET sent_at = now() WHERE sent",
        "tests/it/docs_run.rs",
        "SET sent_at = now() WHERE sent",
    ),
    (
        "UPDATE outbox SET tx = pg_current_xact_id()",
        "tests/it/docs_run.rs",
        "UPDATE outbox SET tx = pg_current_xact_id()",
    ),
    (
        "DELETE FROM whippet_binlog",
        "tests/it/mysql_transient_ends.rs",
        "&cure(&relay, \"DELETE FROM\").await",
    ),
    ("UPDATE whippet_binlog …", "tests/it/mysql_transient_ends.rs", "&cure(&relay, \"UPDATE\").await"),
    ("UPDATE … SET version = version + 1 WHERE id = … AND version = …", "", "a pattern, of no table"),
    ("cargo test", "scripts/test", "cargo nextest run"),
    ("scripts/fuzz [SECONDS] [NAME..]", "", "minutes for each target, with another compiler"),
    (
        "python3 -m unittest discover clients/python/tests",
        "scripts/test",
        "python3 -m unittest discover --quiet clients/python/tests",
    ),
    ("scripts/chart test", "scripts/test", "scripts/chart test"),
    ("scripts/image test", "scripts/test", "scripts/image test"),
    ("scripts/services up | down | status | env", "scripts/test", "scripts/services up"),
    ("scripts/bench ingest", "", "minutes, on a machine with nothing else to do"),
    ("scripts/bench mysql", "", "the same"),
    ("scripts/bench payloads", "", "the same"),
    ("scripts/bench stream", "", "the same"),
    ("scripts/bench tracing", "", "the same"),
    ("docker build --build-arg COMMIT=$(git rev-parse HEAD) --tag whippet .", "scripts/image", "Dockerfile"),
    ("kubectl describe pod", "", "there is no cluster"),
    ("kubectl get pods", "", "the same"),
    ("kubectl logs --previous", "", "the same"),
    ("kubectl port-forward POD 9464", "", "the same"),
    ("ssh -L 9464:127.0.0.1:9464 HOST", "", "there is no other machine"),
];

/// With what a command or a statement of another kind than `whippet` begins.
const BEGINNINGS: &[&str] = &[
    "scripts/", "cargo ", "python3 ", "kubectl ", "docker ", "helm ", "ssh ", "curl ", "SELECT ", "INSERT ",
    "UPDATE ", "DELETE ", "ALTER ", "CREATE ", "DROP ", "GRANT ", "SET ", "SHOW ",
];

/// A command is whole where it lacks nothing, and of another kind where it has an argument.
fn found() -> BTreeSet<String> {
    let quoted = pages().into_iter().flat_map(|(_, text)| quoted(&prose_and_blocks(&text).0));
    let whole = quoted.map(|text| text.replace(" [--dry-run]", "")).filter(|text| {
        match text.strip_prefix("whippet ") {
            Some(_) => Cli::try_parse_from(words(text)).is_ok() || text.starts_with("whippet --version"),
            None => text.contains(' ') && BEGINNINGS.iter().any(|begin| text.starts_with(begin)),
        }
    });
    whole.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_in_sentences_are_run() {
    let mut commands = found();
    assert!(commands.len() > 40, "{commands:#?}");
    for (command, file, words) in ELSEWHERE {
        assert!(commands.remove(*command), "no page has {command}");
        let runs = file.is_empty() || std::fs::read_to_string(path(file)).unwrap().contains(words);
        assert!(runs, "{file} has no {words:?} for {command}");
    }
    let world = World::new("sentences").await;
    let (topic, token) =
        (world.create_topic("events", 1, &[]).await, world.write("token-of-mine", crate::harness::TOKEN));
    let dead = world.create_topic("events.dlq", 1, &[]).await;
    let store = world.folder.path().join("store");
    std::fs::create_dir(&store).unwrap();
    let text = world.config(
        "[{ name: outbox, topic: null }]",
        &format!("object_store: {{ url: 'file://{}' }}", store.display()),
    );
    world.install(&text).await;
    let file = world.write("whippet.yaml", &text);
    let connector = r#"{"connector.class": "io.debezium.connector.postgresql.PostgresConnector", "plugin.name": "pgoutput",
        "table.include.list": "public.outbox", "transforms": "outbox",
        "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter"}"#;
    let connector = world.write("connector.json", connector);
    let relay = world.relay(&text);
    let admin = format!("http://{}", relay.admin);
    let environment = [
        ("WHIPPET_ADMIN", &*admin),
        ("WHIPPET_ADMIN_TOKEN_FILE", &*token),
        ("WHIPPET_BOOTSTRAP_SERVERS", &kafka()),
    ];
    world
        .sql(&format!("INSERT INTO outbox (topic, key) VALUES ('{topic}', 'good'), ('{dead}', 'good')"))
        .await;
    // What ends a relay comes last.
    let (last, commands): (Vec<String>, Vec<String>) =
        commands.into_iter().partition(|command| command.starts_with("whippet teardown"));
    for command in commands.iter().filter(|command| command.starts_with("whippet ")) {
        let id = Uuid::new_v4().to_string();
        world
            .sql(&format!(
                "INSERT INTO outbox (id, topic, key, headers) VALUES ('{id}', '{topic}', 'of-{id}', '7')"
            ))
            .await;
        world.until(&format!("SELECT count(*) FROM whippet.holds WHERE event_id = '{id}'"), 1).await;
        let file = if command.contains("import") { &connector } else { &file };
        let mut line = command.clone();
        // Files last: the name of their folder may have any letters.
        for (from, to) in [
            ("TOPIC", &*topic),
            ("TABLE", "outbox"),
            ("KEY", &*format!("of-{id}")),
            ("ID", &*id),
            ("/etc/whippet/whippet.yaml", &**file),
            ("FILE", &**file),
        ] {
            line = line.replace(from, to);
        }
        if line.contains("whippet consume") {
            // It does not end by itself.
            line += if line.contains("--from-beginning") { " --max 1" } else { " --max 1 --from-beginning" };
        }
        printed(&line, world.folder.path(), &environment);
    }
    for sql in commands.iter().filter(|command| !command.starts_with("whippet ")) {
        statement(&world, sql).await;
    }
    assert_eq!(relay.stop().0, Some(0));
    for command in last {
        let line = command.replace("FILE", &file);
        let done = shell(&line, world.folder.path(), &environment);
        assert!(done.status.success(), "{line}: {done:?}");
    }
}

/// One that is new has to find its database here, and what it wants to be there.
async fn statement(world: &World, sql: &str) {
    let slot = &world.name;
    match sql {
        "SHOW ENGINE INNODB STATUS" => {
            let mut session = crate::db::Session::open(&service("WHIPPET_TEST_MARIADB")).await.unwrap();
            session.run(sql).await.unwrap();
        }
        "SELECT pg_drop_replication_slot('whippet')" => {
            world.sql(&format!("SELECT pg_create_logical_replication_slot('{slot}', 'pgoutput')")).await;
            world.sql(&sql.replace("'whippet'", &format!("'{slot}'"))).await;
        }
        "ALTER TABLE outbox ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY UNIQUE" => {
            world.sql(&format!("CREATE SCHEMA debezium; SET search_path = debezium; CREATE TABLE outbox (id uuid PRIMARY KEY); {sql}; RESET search_path")).await;
        }
        _ => world.sql(sql).await,
    }
}
