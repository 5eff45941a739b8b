//! The recipes of docs/context.md, as they stand there. What is SQL is run; of each program its statement is.
//! `scripts/recipes` runs the programs themselves, with drivers that the tests do without; those in Rust are here.

use rdkafka::{
    ClientConfig,
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use sqlx::{AssertSqlSafe, Connection as _, PgPool, Postgres, SqliteConnection, Transaction};
use whippet::{
    consume::{Consumer, Onward, Settings, Start},
    telemetry::Telemetry,
};

use crate::{
    collector::{Collector, hex},
    db::{Session, statements},
    harness::{SOON, World, kafka, path, service, whippet},
};

/// The code of the page in a language, block by block.
fn blocks(language: &str) -> Vec<String> {
    let page = std::fs::read_to_string(path("docs/context.md")).unwrap();
    let pieces = page.split("```").skip(1).step_by(2);
    let found: Vec<String> = pieces
        .filter_map(|block| block.split_once('\n').filter(|(name, _)| *name == language))
        .map(|(_, code)| code.to_owned())
        .collect();
    assert!(!found.is_empty(), "no {language} on the page");
    found
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_page_says_of_postgresql_is_so() {
    let world = World::new("recipes").await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    let of_a_request = |request: &str| {
        format!(
            "SELECT count(*) FROM outbox WHERE headers->>'x-request-id' = '{request}' AND headers->>'user-id' = '42'"
        )
    };
    for block in blocks("sql postgres") {
        world.sql(&block).await;
    }
    assert_eq!(world.number(&of_a_request("r-17")).await, 1);
    let audited = "SELECT count(*) FROM audit WHERE who = '42' AND what = 'OrderPlaced' AND which = 'o-1' AND request = 'r-17'";
    assert_eq!(world.number(audited).await, 1);
    // Again, and an older one: nothing changes.
    for block in blocks("sql postgres").iter().filter(|block| block.contains("ON CONFLICT")) {
        let (_, again) = block.split_once(";\n").unwrap();
        world.sql(&again.replace("7, 3)", "1, 2)")).await;
    }
    for count in
        ["SELECT count(*) FROM done", "SELECT count(*) FROM audit_copy", "SELECT amount - 6 FROM stock"]
    {
        assert_eq!(world.number(count).await, 1, "{count}");
    }
    for language in ["java", "python", "go", "js", "rust"] {
        let code = blocks(language).into_iter().find(|code| code.contains("set_config")).unwrap();
        let (_, statement) = code.split_once("\"SELECT set_config(").unwrap();
        let (statement, _) = statement.split_once('"').unwrap();
        let context = format!(r#"'{{"x-request-id":"r-{language}","user-id":"42"}}'"#);
        let mut statement = format!("SELECT set_config({statement}");
        for placeholder in ["?", ":context", "$1"] {
            statement = statement.replace(placeholder, &context);
        }
        world
            .sql(&format!("BEGIN; {statement}; INSERT INTO outbox (topic) VALUES ('t'), ('t'); COMMIT; INSERT INTO outbox (topic) VALUES ('later');"))
            .await;
        assert_eq!(world.number(&of_a_request(&format!("r-{language}"))).await, 2, "{language}");
    }
    assert_eq!(
        world.number("SELECT count(*) FROM outbox WHERE topic = 'later' AND headers IS NULL").await,
        5
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_page_says_of_mysql_is_so() {
    let world = World::on(&service("WHIPPET_TEST_MARIADB"), "recipes").await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    let mut session = Session::open(&world.url).await.unwrap();
    for block in blocks("sql mysql") {
        for statement in statements(&block) {
            session.run(&statement).await.unwrap();
        }
    }
    session.run("INSERT INTO outbox (topic) VALUES ('later')").await.unwrap();
    let of_it =
        r#"SELECT count(*) FROM outbox WHERE JSON_VALUE(headers, '$."user-id"') = '42' AND topic = 'orders'"#;
    assert_eq!(world.number(of_it).await, 1);
    assert_eq!(
        world.number("SELECT count(*) FROM outbox WHERE headers IS NULL AND topic = 'later'").await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_page_says_of_sqlite_is_so() {
    let folder = tempfile::tempdir().unwrap();
    let url = format!("sqlite://{}?mode=rwc", folder.path().join("shop.db").display());
    let script = whippet(&["sql", "--dialect", "sqlite"]);
    let mut session = SqliteConnection::connect(&url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(String::from_utf8(script.stdout).unwrap()))
        .execute(&mut session)
        .await
        .unwrap();
    for block in blocks("sql sqlite") {
        // Another request on the same connection.
        for script in [block.clone(), block.replace("r-17", "r-18")] {
            sqlx::raw_sql(AssertSqlSafe(script)).execute(&mut session).await.unwrap();
        }
    }
    let requests: Vec<String> =
        sqlx::query_scalar("SELECT headers->>'$.\"x-request-id\"' FROM outbox ORDER BY seq")
            .fetch_all(&mut session)
            .await
            .unwrap();
    assert_eq!(requests, ["r-17", "r-18"]);
}

/// Of a program in Rust, what matters: no spaces, and no comments.
fn squeezed(code: &str) -> String {
    let code = code.lines().map(|line| line.split("//").next().unwrap());
    code.flat_map(str::chars).filter(|c| !c.is_whitespace()).collect()
}

/// This file has the program as the page has it, line after line; what a test asks may be between.
fn is_here(program: &str) {
    let here = squeezed(include_str!("recipes.rs"));
    program.lines().map(squeezed).filter(|line| !line.is_empty()).fold(&*here, |rest, line| {
        let (_, rest) =
            rest.split_once(&*line).unwrap_or_else(|| panic!("{line} is not here, after the others"));
        rest
    });
}

async fn begin(pool: &PgPool, context: &str) -> sqlx::Result<Transaction<'static, Postgres>> {
    let mut transaction = pool.begin().await?;
    sqlx::query("SELECT set_config('whippet.context', $1, true)")
        .bind(context)
        .execute(&mut *transaction)
        .await?;
    Ok(transaction)
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_in_rust_carries_the_context() {
    is_here(&blocks("rust")[0]);
    let world = World::new("recipe_rust").await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    let mut transaction = begin(world.db.pg(), r#"{"x-request-id": "r-17"}"#).await.unwrap();
    for _ in 0..2 {
        sqlx::query("INSERT INTO outbox (topic) VALUES ('t')").execute(&mut *transaction).await.unwrap();
    }
    transaction.commit().await.unwrap();
    world.sql("INSERT INTO outbox (topic) VALUES ('later')").await;
    let with = "SELECT count(*) FROM outbox WHERE headers->>'x-request-id' = 'r-17' AND topic = 't'";
    assert_eq!(world.number(with).await, 2);
    assert_eq!(world.number("SELECT count(*) FROM outbox WHERE headers IS NULL").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_consumer_does_next_is_of_the_same_trace() {
    is_here(&blocks("rust")[1]);
    let world = World::new("recipe_onward").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let (collector, otlp) = Collector::grpc().await;
    let telemetry = Telemetry::open(&format!("http://{otlp}"), "billing", "billing-1", &kafka()).unwrap();
    let producer: FutureProducer = ClientConfig::new().set("bootstrap.servers", kafka()).create().unwrap();
    let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
    let mut headers = OwnedHeaders::new();
    for (key, value) in [
        ("id", "e-1"),
        ("traceparent", &*format!("00-{trace}-00f067aa0ba902b7-01")),
        ("x-request-id", "r-17"),
        ("x-secret-a", "hush"),
    ] {
        headers = headers.insert(Header { key, value: Some(value) });
    }
    let record = FutureRecord::to(&topic).key("k").payload("x").headers(headers);
    producer.send(record, SOON).await.unwrap();
    let mut settings = Settings::new(&kafka(), &[&topic]);
    settings.start = Start::Beginning;
    let event = Consumer::open(&settings, None).await.unwrap().recv().await.unwrap();

    let onward = Onward::new(&["*"], &["x-secret-*"], 16 << 10).traced(&telemetry.spans, Some("billing"));
    let work = onward.begin(&event);
    let headers = work.context();
    let json = work.context().json();
    assert_eq!((headers.text("x-request-id"), headers.text("x-secret-a")), (Some("r-17"), None));
    drop(work);
    drop(onward);
    telemetry.flush(SOON).await;
    let context: serde_json::Value = serde_json::from_str(&json).unwrap();
    let seen = collector.seen();
    let [span] = &seen[..] else { panic!("{seen:#?}") };
    assert_eq!(span.span.name, format!("process {topic}"));
    assert_eq!(context["traceparent"], format!("00-{trace}-{}-01", hex(&span.span.span_id)));
}
