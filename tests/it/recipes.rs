//! The recipes of docs/context.md, as they stand there. What is SQL is run; of each program its statement is.
//! `scripts/recipes` runs the programs themselves, with drivers that the tests do without.

use sqlx::{AssertSqlSafe, Connection as _, SqliteConnection};

use crate::{
    db::{Session, statements},
    harness::{World, path, service, whippet},
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
