//! `whippet doctor` on servers of PostgreSQL that do not let it in, or are not what they have to be as a whole: each is
//! mended by what it printed.

use std::time::Instant;

use serde_json::Value;

use crate::{
    doctor_fixes::{Role, break_and_mend, fails, fix, is_green, without_tls},
    harness::{SOON, World, kafka, service, services, whippet},
    stream::{of_slot, streamed},
    stream_faults::{Other, Setting, lose_slot},
};

pub const TABLE: &str = "[{ name: outbox }]";
const PG: &str = "postgres: server";

/// What is said of a check, among whatever else fails.
pub fn of(config: &str, check: &str) -> Vec<Value> {
    fails(config).into_iter().filter(|fail| fail["check"] == check).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_postgresql_does_not_let_in() {
    let world = World::new("fix_in").await;
    world.install(&world.config(TABLE, "")).await;
    let config = |url: &str, source: &str| {
        let text = world.config_for(url, &kafka(), TABLE, "");
        world.write("whippet.yaml", &text.replace("source: {", &format!("source: {{ {source}")))
    };
    let plain = "tls: { mode: disable }, ";
    let name = &world.name;

    // By statements: a role, its attribute, its right to the database, and the database.
    let role = format!("{name}_r");
    let of_role = config(&world.url.replace("postgres@", &format!("{role}@")), plain);
    world.sql(&fix(&of_role, PG, "sql")).await;
    assert_eq!(of(&of_role, PG), [Value::Null; 0]);
    for broken in [
        format!("ALTER ROLE {role} NOLOGIN"),
        format!("REVOKE CONNECT ON DATABASE {name} FROM PUBLIC"),
        format!("ALTER ROLE {role} CONNECTION LIMIT 1"),
        format!("ALTER DATABASE {name} CONNECTION LIMIT 0"),
    ] {
        world.sql(&broken).await;
        world.sql(&fix(&of_role, PG, "sql")).await;
        assert_eq!(of(&of_role, PG), [Value::Null; 0], "{broken}");
    }
    let other = format!("{name}_n");
    let of_other = config(&world.url.replace(name, &other), plain);
    world.sql(&fix(&of_other, PG, "sql")).await;
    assert_eq!(of(&of_other, PG), [Value::Null; 0]);
    world.sql(&format!("DROP DATABASE {other} WITH (FORCE)")).await;

    // By the server's list of who may come from where.
    let hba: String = sqlx::query_scalar("SHOW hba_file").fetch_one(world.db.pg()).await.unwrap();
    let before = std::fs::read_to_string(&hba).unwrap();
    let reload = async || world.sql("SELECT pg_reload_conf()").await;
    let of_role = config(&world.url.replace("postgres@", &format!("{role}@")), "");
    std::fs::write(&hba, format!("host {name} {role} 127.0.0.1/32 reject\n{before}")).unwrap();
    reload().await;
    let deadline = Instant::now() + SOON;
    while of(&of_role, PG).is_empty() {
        assert!(Instant::now() < deadline, "it is let in");
        world.pause().await;
    }
    let line = of(&of_role, PG)[0]["fix"]["shell"].as_str().unwrap().to_owned();
    let line = line.strip_prefix("(in pg_hba.conf) ").unwrap().replace("(this host's address)", "127.0.0.1");
    // There is no password here.
    let line = line.replace("scram-sha-256", "trust");
    std::fs::write(&hba, format!("{line}\n{before}")).unwrap();
    reload().await;
    while !of(&of_role, PG).is_empty() {
        assert!(Instant::now() < deadline, "{:#?}", of(&of_role, PG));
        world.pause().await;
    }
    std::fs::write(&hba, before).unwrap();
    reload().await;
    world
        .sql(&format!("DROP OWNED BY {role}; DROP ROLE {role}; GRANT CONNECT ON DATABASE {name} TO PUBLIC"))
        .await;

    // By settings: passwords, TLS, the address.
    let on = |variable: &str| {
        let server = service(variable);
        format!("{}/{name}", server.rsplit_once('/').unwrap().0)
    };
    let (password, tls) = (on("WHIPPET_TEST_PG_PASSWORD_ROLE"), on("WHIPPET_TEST_PG_TLS"));
    let mended = |wanted: &str, url: &str, source: &str, url_then: &str, then: &str| {
        let said = of(&config(url, source), PG);
        assert!(
            said.len() == 1 && said[0]["fix"]["config"].as_str().unwrap().starts_with(wanted),
            "{said:#?}"
        );
        assert_eq!(of(&config(url_then, then), PG), [Value::Null; 0], "{wanted}");
    };
    let wrong = password.replace("whippet-pw", "wrong");
    let file = format!("password_file: '{}', ", world.write("password", "whippet-pw\n"));
    mended("source.password_file: ", &wrong, "", &wrong, &file);
    mended("source.password_file, ", &wrong, "password_file: '/nowhere', ", &wrong, &file);
    mended("source.tls: { mode: require }", &tls, plain, &tls, "tls: { mode: require }, ");
    let ca = |file: &str| format!("tls: {{ mode: verify-full, ca_file: '{file}' }}, ");
    let of_others = ca(&service("WHIPPET_TEST_MARIADB_CA"));
    mended("source.tls.ca_file: ", &tls, &of_others, &tls, &ca(&service("WHIPPET_TEST_PG_CA")));
    mended("source.url: ", "postgres://postgres@127.0.0.1:9/none", "", &world.url, "");
}

/// By a function that says so: there is none of that age to be had.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_postgresql_that_is_too_old() {
    let world = World::new("fix_old").await;
    world.install(&world.config(TABLE, "")).await;
    let config = world.write("whippet.yaml", &without_tls(&world.config(TABLE, "")));
    world
        .sql(&format!(
            "CREATE SCHEMA old; CREATE FUNCTION old.current_setting(text) RETURNS text LANGUAGE sql AS $$ SELECT \
               CASE $1 WHEN 'server_version' THEN '13.21' WHEN 'server_version_num' THEN '130021' \
               ELSE pg_catalog.current_setting($1) END $$; \
             ALTER DATABASE {} SET search_path = old, pg_catalog, public",
            world.name
        ))
        .await;
    assert_eq!(fix(&config, PG, "config"), "source.url: (a server of PostgreSQL 14 or later)");
    world.sql(&format!("ALTER DATABASE {} RESET search_path", world.name)).await;
    is_green(&config);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_standby_of_postgresql() {
    // A standby that was made before starts without its primary.
    for name in ["pg17", "pg17b"] {
        tokio::task::spawn_blocking(move || services("up", name)).await.unwrap();
    }
    let world = World::on(&service("WHIPPET_TEST_PG17"), "fix_standby").await;
    let primary = without_tls(&world.config(TABLE, ""));
    world.install(&primary).await;
    let standby = service("WHIPPET_TEST_PG17B");
    let standby = format!("{}/{}", standby.rsplit_once('/').unwrap().0, world.name);
    let config = world.write("standby.yaml", &primary.replace(&world.url, &standby));
    // The database, and then its tables, have to arrive there.
    let deadline = Instant::now() + SOON;
    while !fails(&config).iter().all(|fail| fail["says"].as_str().unwrap().contains("it is a standby")) {
        assert!(Instant::now() < deadline, "{:#?}", fails(&config));
        world.pause().await;
    }
    assert_eq!(fix(&config, PG, "config"), "source.url: (the address of the primary)");
    is_green(&world.write("whippet.yaml", &primary));
    tokio::task::spawn_blocking(|| services("down", "pg17b")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slot_that_is_lost_or_of_others() {
    let slot = "postgres: slot";
    let world = World::new("fix_slot").await;
    let text = without_tls(&streamed(&world, "{ name: outbox, capture: stream }"));
    world.install(&text).await;
    let stays = text.replace("heartbeat: 1s", "heartbeat: 1s, create: false");
    let other = format!("{}_t", world.name);
    // Of this one the events are nowhere else.
    let transient = text
        .replace("capture: stream", "capture: stream, rows: transient")
        .replace(&format!("slot: {}", world.name), &format!("slot: {other}"));
    let (stays, transient) = (world.write("stays.yaml", &stays), world.write("transient.yaml", &transient));
    let make = |name: &str| format!("SELECT pg_create_logical_replication_slot('{name}', 'pgoutput')");
    for name in [&world.name, &other] {
        world.sql(&make(name)).await;
    }
    is_green(&stays);
    is_green(&transient);
    let taken = Other::new(&world);
    world.until(&of_slot(&world, "count(*) FILTER (WHERE active)"), 1).await;
    let another = fix(&stays, slot, "config");
    let free = another.replace("source.stream.", "").replace("(a name that nobody has)", &other);
    is_green(&world.write(
        "free.yaml",
        &std::fs::read_to_string(&stays).unwrap().replace(&format!("slot: {}", world.name), &free),
    ));
    drop(taken);
    world.until(&of_slot(&world, "count(*) FILTER (WHERE active)"), 0).await;

    let limit = Setting::new(&world, "max_slot_wal_keep_size", "16MB").await;
    lose_slot(&world).await;
    drop(limit);
    let mend = fix(&stays, slot, "sql");
    for statement in mend.split(";\n") {
        world.sql(statement).await;
    }
    is_green(&stays);
    let said = fix(&transient, slot, "shell");
    let mut command = said.split(' ').map(|word| if word == "FILE" { transient.as_str() } else { word });
    assert_eq!(command.next(), Some("whippet"));
    let done = whippet(&command.collect::<Vec<_>>());
    assert!(done.status.success(), "{done:?}");
    is_green(&transient);
    // Whoever may not look for slots.
    world.install(&text).await;
    let role = Role::of(&world).await;
    world.sql(&format!("ALTER ROLE {} REPLICATION; GRANT ALL ON outbox TO {0}", role.1)).await;
    world
        .sql(&format!(
            "GRANT USAGE ON SCHEMA whippet TO {0}; GRANT ALL ON ALL TABLES IN SCHEMA whippet TO {0}",
            role.1
        ))
        .await;
    let text = std::fs::read_to_string(&stays).unwrap();
    let blind = world.write("blind.yaml", &text.replace(&world.url, &role.url(&world)));
    is_green(&blind);
    break_and_mend(&world, &blind, &[("REVOKE SELECT ON pg_replication_slots FROM PUBLIC", "postgres: log")])
        .await;
    world.sql(&of_slot(&world, "pg_drop_replication_slot(slot_name)")).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_kept_rows_are_found_by() {
    let table = "postgres: table";
    let world = World::new("fix_kept").await;
    let text = without_tls(&world.config("[{ name: outbox, after_publish: keep, columns: { tx: tx } }]", ""));
    world.install(&text).await;
    let config = world.write("whippet.yaml", &text);
    world.sql("INSERT INTO outbox (topic) VALUES ('t')").await;
    break_and_mend(
        &world,
        &config,
        &[
            ("DROP INDEX outbox_tx", table),
            ("ALTER TABLE outbox ALTER tx DROP DEFAULT", table),
            ("ALTER TABLE outbox ALTER tx DROP NOT NULL; UPDATE outbox SET tx = NULL", table),
            ("ALTER TABLE outbox ALTER tx DROP DEFAULT, ALTER tx TYPE text", table),
            ("ALTER TABLE outbox DROP tx", table),
            ("UPDATE outbox SET tx = '9000000000000'", table),
        ],
    )
    .await;
    // An order that is none of numbers.
    world.sql("ALTER TABLE outbox ADD UNIQUE (id)").await;
    let by_id = text.replace("columns: { tx: tx }", "columns: { tx: tx, sequence: id }");
    let mark = fix(&world.write("by-id.yaml", &by_id), table, "config");
    let marked = by_id.replace("after_publish: keep, columns: { tx: tx, ", &format!("{mark}, columns: {{ "));
    world.sql("ALTER TABLE outbox ADD COLUMN published_at timestamptz").await;
    is_green(&world.write("marked.yaml", &marked));
}
