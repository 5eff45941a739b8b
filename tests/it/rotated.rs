//! Secrets of the database and of the object store that change while the relay runs.

use bytes::Bytes;

use crate::{
    bucket::Bucket,
    harness::{World, service},
    load::{Load, Plan},
    stream::until_published,
};

/// A password that lives for minutes, as clouds have them: a command prints the one that is good now.
#[tokio::test(flavor = "multi_thread")]
async fn a_command_prints_the_password_of_the_database() {
    let world = World::new("command").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let plain = world.config("[{ name: outbox }]", "");
    world.install(&plain).await;
    world
        .sql(
            "ALTER ROLE whippet_pw PASSWORD 'whippet-pw';
             GRANT ALL ON SCHEMA public, whippet TO whippet_pw; ALTER TABLE outbox OWNER TO whippet_pw;
             GRANT ALL ON ALL TABLES IN SCHEMA whippet TO whippet_pw; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO whippet_pw",
        )
        .await;
    let url = service("WHIPPET_TEST_PG_PASSWORD_ROLE");
    let (server, _) = url.rsplit_once('/').unwrap();
    let url = format!("{}/{}", server.replace(":whippet-pw@", "@"), world.name);
    let issued = world.write("issued", "wrong");
    let config = plain.replace(&world.url, &url).replace(
        "source: {",
        &format!("source: {{ password_command: [sh, -c, 'echo asked >&2; cat {issued}'],"),
    );
    let relay = world.relay(&config);
    relay.wait_for("password authentication failed");
    world.write("issued", "whippet-pw\n");
    let insert = format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', 'x')");
    world.sql(&insert).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    // The next one; every connection is made anew.
    world.write("issued", "rotated");
    world
        .sql("ALTER ROLE whippet_pw PASSWORD 'rotated'; SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'whippet_pw'")
        .await;
    world.sql(&insert).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.sql("ALTER ROLE whippet_pw PASSWORD 'whippet-pw'").await;
    // One that fails says so, and is asked again.
    std::fs::remove_file(&issued).unwrap();
    world.sql("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = 'whippet_pw'").await;
    relay.wait_for("source.password_command sh: exit status: 1");
    world.write("issued", "whippet-pw");
    world.sql(&insert).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (_, log) = relay.stop();
    assert!(!log.contains("rotated"), "{log}");
}

/// The file is looked at while every connection is busy; nobody is asked by a failure of the keeper of the lease, which
/// has no reason to connect.
#[tokio::test(flavor = "multi_thread")]
async fn a_password_in_a_file_is_rotated_under_load() {
    rotated_under_load("password_file: '{issued}'", true).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_of_a_command_is_rotated_under_load() {
    rotated_under_load("password_command: [cat, '{issued}']", false).await;
}

async fn rotated_under_load(password: &str, is_looked_at: bool) {
    const PLAN: Plan = Plan { writers: 6, keys: 50, rows: 1_000_000, pause_ms: 20, poison: None };
    let world = World::new("busy").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let plain = world.config("[{ name: outbox, poll: { wake: notify } }]", "");
    world.install(&plain).await;
    world
        .sql(
            "ALTER ROLE whippet_pw PASSWORD 'first';
             GRANT ALL ON SCHEMA public, whippet TO whippet_pw; ALTER TABLE outbox OWNER TO whippet_pw;
             GRANT ALL ON ALL TABLES IN SCHEMA whippet TO whippet_pw; GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO whippet_pw",
        )
        .await;
    let url = service("WHIPPET_TEST_PG_PASSWORD_ROLE").replace(":whippet-pw@", "@");
    let (server, _) = url.rsplit_once('/').unwrap();
    let issued = world.write("issued", "first\n");
    let config = plain
        .replace(&world.url, &format!("{server}/{}", world.name))
        .replace(
            "source: {",
            &format!("source: {{ max_connections: 2, {},", password.replace("{issued}", &issued)),
        )
        .replace("lease: 2s", "lease: 2m");
    let relay = world.relay(&config);
    let mut load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    until_published(&relay, 100.0).await;
    let of_role = "FROM pg_stat_activity WHERE usename = 'whippet_pw'";
    world.write("issued", "second\n");
    if is_looked_at {
        relay.wait_for("has changed and is taken up");
    }
    let end = format!("SELECT pg_terminate_backend(pid) {of_role}");
    world.sql(&format!("ALTER ROLE whippet_pw PASSWORD 'second'; {end}")).await;
    until_published(&relay, 100.0).await;
    world.until(&format!("SELECT count(*) {of_role} AND query LIKE 'LISTEN %'"), 1).await;
    load.stop();
    load.ended().await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    load.check(&world);
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    assert!(!log.contains("second"), "{log}");
    world.sql("ALTER ROLE whippet_pw PASSWORD 'whippet-pw'").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_of_the_object_store_are_rotated() {
    let bucket = Bucket::new("rotated").await;
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("secret");
    let good = service("WHIPPET_TEST_S3_SECRET");
    std::fs::write(&file, &good).unwrap();
    let mut options = Bucket::options();
    options.remove("secret_access_key");
    options.insert("secret_access_key_file".into(), file.display().to_string());
    let store = whippet::store::Store::open(&bucket.url("rotated"), &options).unwrap();
    let put = async || store.put("a", Bytes::from_static(b"x"), "text/plain").await;
    put().await.unwrap();
    // As if that key had been taken away, until the next one is there.
    std::fs::write(&file, "another-secret").unwrap();
    let deadline = std::time::Instant::now() + crate::harness::SOON;
    while put().await.is_ok() {
        assert!(std::time::Instant::now() < deadline, "the old key stays in use");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    // A file that is away for a moment changes nothing.
    std::fs::remove_file(&file).unwrap();
    assert!(put().await.is_err());
    std::fs::write(&file, format!("{good}\n")).unwrap();
    let deadline = std::time::Instant::now() + crate::harness::SOON;
    while let Err(error) = put().await {
        assert!(std::time::Instant::now() < deadline, "{error}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
}
