//! What `whippet doctor`, and a relay, say of a name that is not that of an outbox table.

use crate::{
    doctor_fixes::{fails, fix, is_green},
    harness::{World, kafka, whippet},
    mysql::{on_both, world},
};

const PG: &str = "postgres: table";

/// Nothing can be recorded in it: its rows are as they were when it was refreshed.
#[tokio::test(flavor = "multi_thread")]
async fn a_view_that_nothing_can_be_recorded_in_is_no_outbox() {
    let world = World::new("doctorview").await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    world
        .sql(
            "CREATE MATERIALIZED VIEW snapshot AS SELECT * FROM outbox; CREATE VIEW plain AS SELECT * FROM outbox; \
             CREATE VIEW grouped AS SELECT DISTINCT * FROM (SELECT seq, id, topic, key, type, payload, headers::text, \
             created_at FROM outbox) o",
        )
        .await;
    for (name, says) in [
        ("snapshot", Some("snapshot is a materialized view")),
        ("grouped", Some("grouped is a view that rows cannot be deleted from")),
        ("outbox_seq_seq", Some("outbox_seq_seq is no table")),
        ("plain", None),
    ] {
        let text = world.config(&format!("[{{ name: {name} }}]"), "");
        let config = world.write("whippet.yaml", &text);
        let Some(says) = says else {
            is_green(&config);
            continue;
        };
        let [fail] = &fails(&config)[..] else { panic!("not one FAIL: {:#?}", fails(&config)) };
        assert!(fail["check"] == PG && fail["says"].as_str().unwrap().contains(says), "{fail}");
        assert!(fail["fix"]["config"].as_str().unwrap().starts_with("tables[].name: "), "{fail}");
        let relay = world.relay(&text);
        relay.wait_for(says);
        assert_eq!(relay.stop().0, Some(0));
    }
}

/// The name that is printed is right.
fn is_mended(world: &World, name: &str, check: &str) {
    let config = |name: &str| {
        let text = world.config(&format!("[{{ name: '{name}' }}]"), "");
        (world.write("whippet.yaml", &text), text)
    };
    let (file, text) = config(name);
    let [fail] = &fails(&file)[..] else { panic!("not one FAIL: {:#?}", fails(&file)) };
    assert!(fail["says"].as_str().unwrap().contains("did you mean"), "{fail}");
    let relay = world.relay(&text);
    relay.wait_for("did you mean");
    assert_eq!(relay.stop().0, Some(0));
    let meant = fix(&file, check, "config");
    let meant = meant.strip_prefix("tables[].name: ").unwrap();
    assert_eq!(meant.to_lowercase(), name.to_lowercase());
    is_green(&config(meant).0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_name_in_the_wrong_case_is_told_from_a_table_that_is_missing() {
    let world = World::new("doctorcase").await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    is_mended(&world, "OUTBOX", PG);
    is_mended(&world, "Public.Outbox", PG);
    let missing = world.write("whippet.yaml", &world.config("[{ name: outbux }]", ""));
    world.sql(&fix(&missing, PG, "sql")).await;
    is_green(&missing);
}

on_both!(a_name_in_the_wrong_case_is_told_on_both);

async fn a_name_in_the_wrong_case_is_told_on_both(server: &str) {
    let world = world(server).await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    is_mended(&world, "OutBox", "mysql: table");
    is_mended(&world, &format!("{}.OUTBOX", world.name), "mysql: table");
}

/// To SQLite it is the same name.
#[tokio::test(flavor = "multi_thread")]
async fn sqlite_takes_a_name_in_any_case() {
    let world = World::new("doctorsqlite").await;
    let url = format!("sqlite://{}?mode=rwc", world.folder.path().join("outbox.db").display());
    let config = |name: &str| {
        world.write("whippet.yaml", &world.config_for(&url, &kafka(), &format!("[{{ name: {name} }}]"), ""))
    };
    let script = whippet(&["sql", "--config", &config("outbox")]);
    let db = sqlx::SqlitePool::connect(&url).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(String::from_utf8(script.stdout).unwrap())).execute(&db).await.unwrap();
    is_green(&config("outbox"));
    is_green(&config("OUTBOX"));
}
