//! README and docs are run as they stand there, page by page and block by block.

use std::os::unix::fs::symlink;

use serde_json::Value;
use sha2::{Digest as _, Sha256};
use uuid::Uuid;

use crate::{
    bucket::Bucket,
    collector::hex,
    db::statements,
    docs_blocks::{Page, bind, printed, validate},
    harness::{Relay, TOKEN, World, kafka, path, whippet},
};

/// An address for the admin server beside that of the page, which another relay may have.
const FREE: (&str, &str) = ("WHIPPET__ADMIN__LISTEN", "127.0.0.1:0");

fn doctor_is_content(config: &str) {
    let said = whippet(&["doctor", "--config", config]);
    assert!(said.status.success(), "{}", String::from_utf8_lossy(&said.stdout));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_readme_starts_in_a_minute() {
    let mut page = Page::of("README.md");
    let world = World::new("readme").await;
    let folder = world.folder.path();
    // The program is built already: the one that these tests are built with.
    let built = folder.join("target/debug");
    std::fs::create_dir_all(&built).unwrap();
    symlink(env!("CARGO_BIN_EXE_whippet"), built.join("whippet")).unwrap();
    let cargo = world.write("cargo", "#!/bin/sh\n[ \"$1\" = build ]\n");
    printed(&format!("chmod +x {cargo}"), folder, &[]);
    let places = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    let target = folder.join("target").display().to_string();
    let demo = format!("PATH='{places}' CARGO_TARGET_DIR='{target}' {}", page.next("sh"));
    let said = printed(&demo, &path(""), &[]);
    assert!(said.contains("every one of 2000 committed events came back"), "{said}");
    page.not_run("sh", "scripts/test\n", "it is what runs this");

    let (insert, config) = (page.next("sql"), page.next("yaml"));
    let orders = world.create_topic("orders", 1, &[]).await;
    let config =
        bind(&config, &[("postgres://relay@localhost:5432/shop", &*world.url), ("localhost:9092", &kafka())]);
    let file = world.write("whippet.yaml", &config);
    world.sql(&printed("whippet sql --dialect postgres", folder, &[])).await;
    doctor_is_content(&file);
    world.sql(&bind(&insert, &[("'orders'", &*format!("'{orders}'"))])).await;
    let relay = Relay::start_with(&file, &[FREE]);
    let mut consumer = world.consumer(&orders);
    let [record] = consumer.read(1) else { panic!() };
    assert_eq!((record.key.as_deref(), record.text()), (Some(&b"customer-7"[..]), "{\"order\": 1}"));
    for (name, value) in [("eventType", "OrderPlaced"), ("x-request-id", "r-17"), ("user-id", "42")] {
        assert_eq!(record.header(name), Some(value));
    }
    assert_eq!(relay.stop().0, Some(0));
}

/// Each line of the operator's verbs, on a relay with events for which it is meant.
#[tokio::test(flavor = "multi_thread")]
async fn the_operators_verbs() {
    let mut page = Page::of("docs/operations.md");
    let world = World::new("operations").await;
    let (orders, again) =
        (world.create_topic("orders", 1, &[]).await, world.create_topic("orders.again", 1, &[]).await);
    let config = world.config("[{ name: public.outbox, after_publish: mark }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    let admin = format!("http://{}", relay.admin);
    let token = world.write("token-of-mine", TOKEN);
    let environment = [("WHIPPET_ADMIN", &*admin), ("WHIPPET_ADMIN_TOKEN_FILE", &*token)];
    let id = Uuid::new_v4().to_string();
    world.sql("ALTER TABLE outbox ALTER COLUMN seq RESTART WITH 1000").await;
    let held = async |count| {
        world.until("SELECT count(*) FROM whippet.holds", count).await;
    };
    let insert = async |key: &str, headers: &str, id: &str| {
        let row = format!("'{id}', '{orders}', '{key}', '{{\"of\": \"{key}\"}}', {headers}");
        world.sql(&format!("INSERT INTO outbox (id, topic, key, payload, headers) VALUES ({row})")).await;
    };
    let any = || Uuid::new_v4().to_string();
    let mend = "UPDATE outbox SET headers = NULL";
    insert("customer-7", "'7'", &id).await;
    insert("other", "'7'", &any()).await;
    held(2).await;
    let mut consumer = world.consumer(&orders);
    let block = page.next("sh");
    let mut lines = block.lines();
    let mut run = |begin: &str, values: &[(&str, &str)]| {
        let line = lines.next().unwrap();
        assert!(line.starts_with(begin), "{line}");
        printed(&bind(line, values), world.folder.path(), &environment)
    };
    let said = run("whippet parked ", &[]);
    assert!(said.contains("customer-7") && said.contains("not a JSON object"), "{said}");
    let said = run("whippet parked --id ID --payload", &[("ID", &id)]);
    assert!(said.contains(r#"{"of": "customer-7"}"#), "{said}");
    world.sql(mend).await;
    run("whippet redrive --key customer-7", &[]);
    held(1).await;
    run("whippet redrive --reason", &[]);
    held(0).await;
    insert("third", "'7'", &any()).await;
    held(1).await;
    world.sql(mend).await;
    run("whippet redrive --all", &[]);
    held(0).await;
    let nothing = any();
    insert("fourth", "'7'", &nothing).await;
    held(1).await;
    run("whippet skip --id ID", &[("ID", &nothing)]);
    held(0).await;
    let topic = [("orders", orders.as_str())];
    run("whippet pause --topic orders", &topic);
    insert("fifth", "NULL", &any()).await;
    held(1).await;
    run("whippet resume --topic orders", &topic);
    held(0).await;
    world.until("SELECT count(*) FROM outbox WHERE published_at IS NULL", 0).await;
    run("whippet pause --table public.outbox", &[]);
    relay.until_status("/tables/0/state", "paused").await;
    run("whippet resume --table public.outbox", &[]);
    run("whippet replay --table public.outbox --from 1000 --to 2000", &[]);
    world.until("SELECT count(*) FROM whippet.replays WHERE place <> '1003'", 0).await;
    run("whippet replay --id ID --topic orders.again", &[("ID", &*id), ("orders.again", &*again)]);
    assert_eq!(lines.next(), None);
    let repeated = world.consumer(&again).read(1)[0].clone();
    assert_eq!((repeated.header("id"), repeated.text()), (Some(&*id), r#"{"of": "customer-7"}"#));
    // The four that were published, and again; the one that was skipped is as wrong as it was.
    consumer.read(8);
    let keys = |replayed: bool| -> Vec<String> {
        let seen = consumer.seen.iter().filter(|seen| seen.header("whippet-replay").is_some() == replayed);
        seen.map(|seen| String::from_utf8(seen.key.clone().unwrap()).unwrap()).collect()
    };
    assert_eq!(keys(false), ["customer-7", "other", "third", "fifth"]);
    assert_eq!(keys(true), ["customer-7", "other", "third", "fifth"]);
    assert_eq!(relay.stop().0, Some(0));

    let secret = world.write("client-secret", "hunter2\n");
    validate(&world, &bind(&page.next("yaml"), &[("/run/secrets/kafka/client-secret", &secret)]));
    validate(&world, &page.next("yaml"));
    kept_rows(&mut page).await;
}

/// A table that was relayed with `delete` is kept from now on, and then comes to another server.
async fn kept_rows(page: &mut Page) {
    let world = World::new("keptdocs").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = |after: &str| world.config(&format!("[{{ name: outbox, after_publish: {after} }}]"), "");
    world.install(&config("delete")).await;
    world.sql("ALTER TABLE outbox ALTER COLUMN seq RESTART WITH 4711").await;
    for statement in statements(&page.next("sql")) {
        world.sql(&statement).await;
    }
    let config = config("keep, columns: { tx: tx }");
    world.install(&config).await;
    doctor_is_content(&world.write("whippet.yaml", &config));
    let insert = async |payload: &str| {
        world
            .sql(&format!("INSERT INTO outbox (topic, key, payload) VALUES ('{topic}', 'k', '{payload}')"))
            .await;
    };
    let is_published = page.next("sql");
    let is_published = format!(
        "SELECT count(*) FROM ({}) it(published) WHERE published",
        is_published.trim().trim_end_matches(';')
    );
    insert("1").await;
    let relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    consumer.read(1);
    world.until(&is_published, 1).await;
    assert_eq!(relay.stop().0, Some(0));
    // Another server, whose transactions go on.
    let another = "UPDATE whippet.watermarks SET server = '7'";
    world.sql(another).await;
    insert("2").await;
    let refused = world.relay(&config);
    refused.wait_for("another server");
    world.sql(&page.next("sql")).await;
    consumer.read(2);
    world.until(&bind(&is_published, &[("4711", "4712")]), 1).await;
    assert_eq!(refused.stop().0, Some(0));
    // And one where they begin anew: 4711 is out, what is behind it is not.
    world.sql(&format!("{another}; UPDATE outbox SET tx = pg_current_xact_id()")).await;
    world.sql(&page.next("sql")).await;
    let relay = world.relay(&config);
    consumer.read(3);
    assert_eq!(relay.stop().0, Some(0));
    let seen: Vec<&str> = consumer.read_to_end().iter().map(|record| record.text()).collect();
    assert_eq!(seen, ["1", "2", "2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn from_debezium_and_from_a_poller() {
    let mut page = Page::of("docs/migration.md");
    let world = World::new("migration").await;
    let folder = world.folder.path();
    world.write(
        "outbox-connector.json",
        r#"{"connector.class": "io.debezium.connector.postgresql.PostgresConnector", "plugin.name": "pgoutput",
            "table.include.list": "public.outbox", "transforms": "outbox",
            "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter"}"#,
    );
    printed(&page.next("sh"), folder, &[]);
    printed("whippet validate --config whippet.yaml", folder, &[]);

    // The table of a poller, with rows that it has sent; its order number is filled from a sequence.
    world
        .sql(
            "CREATE SCHEMA sales;
             CREATE TABLE sales.events (event_no bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, event_id uuid UNIQUE \
               DEFAULT gen_random_uuid(), kind text, order_no text, body jsonb, happened_at timestamptz DEFAULT now(), \
               sent boolean DEFAULT false);
             INSERT INTO sales.events (kind, order_no, body, sent) VALUES ('placed', 'o-1', '1', true), \
               ('placed', 'o-1', '2', false)",
        )
        .await;
    for statement in [
        "ALTER TABLE sales.events ADD COLUMN sent_at timestamptz",
        "UPDATE sales.events SET sent_at = now() WHERE sent",
    ] {
        said(&page, statement);
        world.sql(statement).await;
    }
    let placed = world.create_topic("sales.placed", 1, &[]).await;
    let config = bind(
        &page.next("yaml"),
        &[
            ("postgres://relay@localhost:5432/shop", &*world.url),
            ("kafka:9092", &kafka()),
            ("\"sales.{kind}\"", &format!("\"{}\"", world.topic("sales.{kind}"))),
        ],
    );
    world.install(&config).await;
    let file = world.write("whippet.yaml", &config);
    doctor_is_content(&file);
    let relay = Relay::start_with(&file, &[FREE]);
    let mut consumer = world.consumer(&placed);
    consumer.read(1);
    world.until("SELECT count(*) FROM sales.events WHERE sent_at IS NULL", 0).await;
    assert_eq!(relay.stop().0, Some(0));
    let [record] = consumer.read_to_end() else { panic!("what was sent is sent again") };
    assert_eq!((record.key.as_deref(), record.text()), (Some(&b"o-1"[..]), "2"));
    assert_eq!(record.header("eventType"), Some("placed"));
}

/// A statement that is in the prose of a page.
fn said(page: &Page, statement: &str) {
    let text = std::fs::read_to_string(path(page.name())).unwrap();
    let prose = text.split_whitespace().collect::<Vec<_>>().join(" ");
    assert!(prose.contains(&format!("`{statement}`")), "{statement}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_context_of_a_request() {
    let mut page = Page::of("docs/context.md");
    let recipes =
        |page: &mut Page, language: &str, words: &str| page.run_by(language, "tests/it/recipes.rs", words);
    recipes(&mut page, "sql postgres", "what_the_page_says_of_postgresql_is_so");
    for language in ["java", "python", "go", "js"] {
        // With the driver that it is about; here its statement alone.
        page.run_by(language, "scripts/recipes", &format!("run_{language}()"));
    }
    recipes(&mut page, "rust", "the_program_in_rust_carries_the_context");
    recipes(&mut page, "sql mysql", "what_the_page_says_of_mysql_is_so");
    recipes(&mut page, "sql sqlite", "what_the_page_says_of_sqlite_is_so");
    recipes(&mut page, "sql postgres", "what_the_page_says_of_postgresql_is_so");

    let world = World::new("contextdocs").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = validate(&world, &page.next("yaml"));
    world.install(&config).await;
    let relay =
        Relay::start_with(&world.write("whippet.yaml", &config), &[FREE, ("WHIPPET__LOG__FORMAT", "json")]);
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, headers) VALUES ('{topic}', 'k', '{{\"x-request-id\": \"r-17\"}}'), \
             ('{topic}', 'k', '{{\"x-request-id\": \"r-18\"}}')"
        ))
        .await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0));
    world.write("relay.log", &log);
    let lines = printed(&page.next("sh"), world.folder.path(), &[]);
    let lines: Vec<Value> = lines.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(matches!(&lines[..], [line] if line["message"] == "event is published"), "{lines:?}");

    validate(&world, &page.next("yaml"));
    recipes(&mut page, "rust", "what_a_consumer_does_next_is_of_the_same_trace");
    for _ in 0..4 {
        recipes(&mut page, "sql postgres", "what_the_page_says_of_postgresql_is_so");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn events_by_http() {
    let mut page = Page::of("docs/ingest.md");
    let world = World::new("ingestdocs").await;
    let spool = world.folder.path().join("spool").display().to_string();
    validate(&world, &bind(&page.next("yaml"), &[("/var/lib/whippet", &spool)]));
    validate(&world, &page.next("yaml"));
    for language in ["sh", "python", "js", "go", "java"] {
        page.run_by(language, "tests/it/ingest.rs", "the_clients_of_the_docs_publish");
    }
}

/// As the example has it, which scripts/chart renders; and what only a cluster can do, but for the cluster.
#[test]
fn in_a_cluster() {
    let mut page = Page::of("docs/kubernetes.md");
    let is_of = |block: &str, files: &[&str]| {
        let squeezed = |text: &str| {
            let lines = text.lines().map(|line| line.split(" #").next().unwrap().trim());
            lines.filter(|line| !line.starts_with('#')).map(str::to_owned).collect::<Vec<_>>()
        };
        let there: Vec<String> =
            files.iter().flat_map(|file| squeezed(&std::fs::read_to_string(path(file)).unwrap())).collect();
        for line in squeezed(block).iter().filter(|line| *line != "---") {
            assert!(there.contains(line), "{line:?} is not in {files:?}");
        }
    };
    let shop = "helm/examples/shop";
    is_of(&bind(&page.next("yaml"), &[("file://../", "file://../../")]), &[&format!("{shop}/Chart.yaml")]);
    is_of(&page.next("yaml"), &[&format!("{shop}/templates/deployment.yaml")]);
    let values = page.next("yaml");
    let values: Value = serde_saphyr::from_str(&values).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("values.yaml");
    std::fs::write(&file, values.to_string()).unwrap();
    let shop = printed(
        &format!("helm template --kube-version 1.29 shop {shop} --values {}", file.display()),
        &path(""),
        &[],
    );
    assert!(shop.contains("whippet") && shop.contains("secretName: shop-db"), "{shop}");
    std::fs::write(&file, values["whippet"].to_string()).unwrap();
    let install = bind(
        &page.next("sh"),
        &[
            ("helm install", "helm template --kube-version 1.29"),
            ("values.yaml", &file.display().to_string()),
        ],
    );
    let relay = printed(&install, &path(""), &[]);
    assert!(relay.contains("kind: Deployment") && relay.contains("secretName: shop-db"), "{relay}");
}

/// What the policy allows is enough for a relay; nothing else is allowed.
#[tokio::test(flavor = "multi_thread")]
async fn the_policy_of_the_object_store() {
    let mut page = Page::of("docs/security.md");
    let (world, bucket) = (World::new("policy").await, Bucket::new("policy").await);
    let policy = bind(&page.next("json"), &[("BUCKET", &bucket.name), ("PREFIX", "shop")]);
    let mut policy: Value = serde_json::from_str(&policy).unwrap();
    // As the bucket's own policy, about everybody: it has no accounts.
    policy["Statement"][0]["Principal"] = serde_json::json!({ "AWS": ["*"] });
    let set = bucket.call("PUT", "?policy=", &policy.to_string()).await;
    assert_eq!(set.status, 204, "{set:?}");
    for (prefix, code, verdict) in
        [("shop", Some(0), "ok    object store: put"), ("other", Some(1), "FAIL  object store: put")]
    {
        let config =
            world.config("[{ name: outbox }]", &bucket.config(prefix, &[("skip_signature", "true")]));
        world.install(&config).await;
        let said = whippet(&["doctor", "--config", &world.write("whippet.yaml", &config)]);
        let printed = String::from_utf8(said.stdout).unwrap();
        assert!(said.status.code() == code && printed.contains(verdict), "{printed}");
    }
}

/// The examples of the format are so.
#[test]
fn the_format_of_large_payloads() {
    let mut page = Page::of("docs/large-payloads.md");
    let (namespace, set, header) = (page.next(""), page.next(""), page.next(""));
    let of = Uuid::new_v5(&Uuid::nil(), b"whippet-chunk-id");
    assert!(namespace.contains(&of.to_string()), "{of}");
    let payload = b"Hello, large world!";
    let sha = hex(&Sha256::digest(payload));
    let id = Uuid::new_v5(&of, format!("order-17/8/{sha}").as_bytes());
    let slices: Vec<&[u8]> = payload.chunks(8).collect();
    let mut expected = vec![id.to_string(), slices.len().to_string(), payload.len().to_string(), sha];
    for slice in &slices {
        expected.push(slice.iter().map(|byte| format!("{byte:02x}")).collect::<Vec<_>>().join(" "));
        expected.push(format!("\"{}\"", String::from_utf8_lossy(slice)));
    }
    for text in expected {
        assert!(set.contains(&text), "{text}");
    }
    let (upper, lower) = id.as_u64_pair();
    let second =
        format!("02 {lower:016x} {upper:016x} {:08x} {:08x} {:08x}\n", 1, slices.len(), payload.len());
    assert_eq!(header, second);
}

#[test]
fn the_picture_of_the_design() {
    Page::of("docs/design.md").not_run("", "", "it is a picture");
}
