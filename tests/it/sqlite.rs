//! SQLite as the source, on real Kafka.

use sqlx::{AssertSqlSafe, SqlitePool};

use crate::harness::{World, kafka, whippet};

#[tokio::test(flavor = "multi_thread")]
async fn a_sqlite_outbox_is_relayed_through_a_kill_in_order_and_completely() {
    let world = World::new("sqlite").await;
    let topic = world.create_topic("events", 3, &[]).await;
    for after in ["delete", "mark", "keep"] {
        let file = world.folder.path().join(format!("{after}.db"));
        let url = format!("sqlite://{}?mode=rwc", file.display());
        let tables = format!("[{{ name: outbox, after_publish: {after} }}]");
        let config = world.config_for(&url, &kafka(), &tables, "");
        let script = whippet(&["sql", "--config", &world.write("sql.yaml", &config)]);
        let db = SqlitePool::connect(&url).await.unwrap();
        sqlx::raw_sql(AssertSqlSafe(String::from_utf8(script.stdout).unwrap())).execute(&db).await.unwrap();
        let relay = world.relay(&config);
        let mut consumer = world.consumer(&topic);
        let from = consumer.read_to_end().len();
        for n in 0..2_000 {
            sqlx::query("INSERT INTO outbox (id, topic, key, payload, headers) VALUES (?1, ?2, ?3, ?4, '{\"a\":\"b\"}')")
                .bind(format!("{after}-{n}"))
                .bind(&topic)
                .bind(format!("{after}-{}", n % 10))
                .bind(format!("{n}"))
                .execute(&db)
                .await
                .unwrap();
            if n == 1_000 {
                consumer.read(from + 100);
            }
        }
        relay.kill();
        let relay = world.relay(&config);
        let pending = match after {
            "mark" => "SELECT count(*) FROM outbox WHERE published_at IS NULL",
            "keep" => "SELECT 2000 - coalesce((SELECT upto FROM whippet_watermarks WHERE open = '[]'), 0)",
            _ => "SELECT count(*) FROM outbox",
        };
        loop {
            let left: i64 = sqlx::query_scalar(pending).fetch_one(&db).await.unwrap();
            if left == 0 {
                break;
            }
            world.pause().await;
        }
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        let seen = consumer.read_to_end();
        for key in 0..10 {
            let name = format!("{after}-{key}");
            let mut first: Vec<usize> = Vec::new();
            for record in seen[from..].iter().filter(|record| record.key.as_deref() == Some(name.as_bytes()))
            {
                let n = record.text().parse().unwrap();
                if !first.contains(&n) {
                    first.push(n);
                }
                assert_eq!(record.header("id"), Some(&*format!("{after}-{n}")));
                assert_eq!(record.header("a"), Some("b"));
                assert!(record.timestamp.unwrap() > 1_700_000_000_000);
            }
            assert_eq!(first, (0..200).map(|i| i * 10 + key).collect::<Vec<_>>(), "{name}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_operator_can_do_the_same_on_sqlite() {
    let world = World::new("sqliteverbs").await;
    for after in ["mark", "keep"] {
        an_operator(&world, after).await;
    }
}

async fn an_operator(world: &World, after: &str) {
    let topic = world.create_topic(after, 1, &[]).await;
    let file = world.folder.path().join(format!("verbs-{after}.db"));
    let url = format!("sqlite://{}?mode=rwc", file.display());
    let tables = format!("[{{ name: outbox, after_publish: {after}, retention: {{ published: 2s }} }}]");
    let config = world.config_for(&url, &kafka(), &tables, "");
    let script = whippet(&["sql", "--config", &world.write("sql.yaml", &config)]);
    let db = SqlitePool::connect(&url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(String::from_utf8(script.stdout).unwrap())).execute(&db).await.unwrap();
    // What is to be replayed must not be too old by then.
    let relay = world.relay(&config.replace(", retention: { published: 2s }", ""));
    let insert = |key: &str, payload: &str, headers: &str| {
        AssertSqlSafe(format!(
            "INSERT INTO outbox (topic, key, payload, headers) VALUES ('{topic}', '{key}', '{payload}', {headers})"
        ))
    };
    for (payload, headers) in [("1", "'[7]'"), ("2", "NULL"), ("3", "NULL")] {
        sqlx::query(insert("bad", payload, headers)).execute(&db).await.unwrap();
    }
    relay.until_status("/tables/0/parked_events", 3).await;
    let listed = relay.operate(world, &["parked", "--reason", "not a JSON object"]);
    let id = listed["parked"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(relay.operate(world, &["parked", "--id", &id, "--payload"])["parked"][0]["payload"], "1");
    sqlx::query("UPDATE outbox SET headers = NULL").execute(&db).await.unwrap();
    let mut consumer = world.consumer(&topic);
    assert_eq!(relay.operate(world, &["redrive", "--key", "bad"])["events"], 3);
    consumer.read(3);
    sqlx::query(insert("worse", "x", "'7'")).execute(&db).await.unwrap();
    sqlx::query(insert("worse", "4", "NULL")).execute(&db).await.unwrap();
    relay.until_status("/tables/0/parked_events", 2).await;
    let listed = relay.operate(world, &["parked", "--reason", "rejected"]);
    let id = listed["parked"][0]["id"].as_str().unwrap().to_owned();
    relay.operate(world, &["skip", "--id", &id, "--reason", "test"]);
    consumer.read(4);
    relay.operate(world, &["pause", "--topic", &topic]);
    sqlx::query(insert("k", "5", "NULL")).execute(&db).await.unwrap();
    relay.until_status("/tables/0/held_events", 1).await;
    relay.operate(world, &["resume", "--topic", &topic]);
    consumer.read(5);
    assert_eq!(relay.operate(world, &["replay", "--from", "2", "--to", "3"])["events"], 2);
    consumer.read(7);
    let texts: Vec<&str> = consumer.read_to_end().iter().map(crate::harness::Seen::text).collect();
    assert_eq!(texts, ["1", "2", "3", "4", "5", "2", "3"]);
    let audited: Vec<String> =
        sqlx::query_scalar("SELECT action FROM whippet_audit ORDER BY id").fetch_all(&db).await.unwrap();
    assert_eq!(audited, ["redrive", "skip", "pause", "resume", "replay"]);
    assert_eq!(relay.stop().0, Some(0));
    let relay = world.relay(&config);
    // What is parked is not published, and stays when the others have gone.
    sqlx::query(insert("bad", "6", "'[7]'")).execute(&db).await.unwrap();
    relay.until_status("/tables/0/parked_events", 1).await;
    loop {
        let left: Vec<i64> =
            sqlx::query_scalar("SELECT seq FROM outbox ORDER BY seq").fetch_all(&db).await.unwrap();
        if left.len() == 1 {
            break;
        }
        assert!(left.len() > 1, "the parked one has gone");
        world.pause().await;
    }
    assert_eq!(relay.stop().0, Some(0));
    let relay = world.relay(&config);
    sqlx::query(insert("k", "7", "NULL")).execute(&db).await.unwrap();
    consumer.read(8);
    assert_eq!(relay.stop().0, Some(0));
    assert_eq!(consumer.read_to_end().len(), 8, "nothing is repeated after a clean stop");
}
