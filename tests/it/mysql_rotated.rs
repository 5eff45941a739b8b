//! The password and the certificates of MySQL and MariaDB, rotated while rows are written.

use crate::{
    certificates::Certificates,
    harness::{Relay, World, service},
    load::Load,
    mysql::{on_both, world},
    mysql_stream::{PLAN, follows, streamed, until_published},
};

on_both!(certificates_are_rotated_under_load, a_password_of_a_command_is_rotated_under_load);

const TAKEN_UP: &str = "are others, and are taken up";

/// An account of this test's own.
async fn account(world: &World, how: &str) -> String {
    let user = format!("u{}", world.name.rsplit('_').next().unwrap());
    world
        .sql(&format!(
            "CREATE USER '{user}'@'%' IDENTIFIED BY 'first' {how};\nGRANT ALL ON *.* TO '{user}'@'%'"
        ))
        .await;
    user
}

/// Waits until every connection is younger than this moment, but for those that read the log.
async fn only_new_ones(world: &World, user: &str) {
    let newest = world.number("SELECT CAST(CONNECTION_ID() AS SIGNED)").await;
    let newest =
        newest.max(world.number("SELECT CAST(MAX(id) AS SIGNED) FROM information_schema.processlist").await);
    // One that is being made says who it is at last.
    let whose = format!("user IN ('{user}', 'unauthenticated user')");
    let old = format!("{whose} AND id <= {newest} AND command NOT LIKE 'Binlog Dump%'");
    world.until(&format!("SELECT COUNT(*) FROM information_schema.processlist WHERE {old}"), 0).await;
}

/// The server ends each of its connections.
async fn end_all(world: &World, user: &str) {
    let of_user = format!("FROM information_schema.processlist WHERE user = '{user}'");
    let newest = world.number(&format!("SELECT CAST(MAX(id) AS SIGNED) {of_user}")).await;
    loop {
        let next = format!("SELECT CAST(COALESCE(MIN(id), 0) AS SIGNED) {of_user} AND id <= {newest}");
        match world.number(&next).await {
            0 => return,
            // It may just have ended.
            id => drop(world.db.sql(&format!("KILL {id}")).await),
        }
    }
}

/// What the relay logged.
async fn nothing_is_lost(world: &World, relay: Relay, mut load: Load, user: &str) -> String {
    load.stop();
    load.ended().await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    load.check(world);
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    world.sql(&format!("DROP USER '{user}'@'%'")).await;
    log
}

/// The authority that the server's certificate is of, and the relay's own, which the account has to have. Each
/// connection that is made later has the new one, and none is refused.
async fn certificates_are_rotated_under_load(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let ca = service(&format!("WHIPPET_TEST_{}_CA", server.to_uppercase()));
    let certificates = Certificates::of(ca.strip_suffix("/ca.crt").unwrap());
    certificates.make("first");
    certificates.make("second");
    certificates.trust("first", false);
    certificates.switch_to("first");
    let user = account(&world, "REQUIRE X509").await;
    let url = service(&format!("WHIPPET_TEST_{}_TLS", server.to_uppercase()));
    let url = format!("{}/{}", url.replace("whippet_tls:whippet-pw", &format!("{user}:first")), world.name);
    let path = |name: &str| certificates.path(&format!("current/{name}.pem"));
    let tls = format!(
        "tls: {{ mode: verify-full, ca_file: '{}', cert_file: '{}', key_file: '{}' }},",
        path("ca"),
        path("cert"),
        path("key")
    );
    let config = streamed(&world, "{ name: outbox, capture: auto }");
    world.install(&config).await;
    let config = config.replace(&world.url, &url).replace("source: {", &format!("source: {{ {tls}"));
    let relay = world.relay(&config);
    relay.wait_for("cannot reach the source database");
    certificates.trust("first", true);
    follows(&relay).await;
    relay.wait_for(TAKEN_UP);
    let load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    until_published(&relay, 100.0).await;
    let before = relay.log().matches(TAKEN_UP).count();
    certificates.switch_to("second");
    relay.wait_for_nth(TAKEN_UP, before + 1);
    only_new_ones(&world, &user).await;
    world.sql(&format!("ALTER USER '{user}'@'%' REQUIRE SUBJECT '/CN=second'")).await;
    end_all(&world, &user).await;
    until_published(&relay, 100.0).await;
    follows(&relay).await;
    let log = nothing_is_lost(&world, relay, load, &user).await;
    assert!(!log.contains("Access denied"), "{log}");
}

/// MySQL takes two passwords for a while. The second one is used before the first one ends, so no login is refused:
/// servers lock accounts that fail too often.
#[tokio::test(flavor = "multi_thread")]
async fn of_two_passwords_the_new_one_is_used_before_the_old_one_ends() {
    let world = world("mysql").await;
    let topic = world.create_topic("events", 3, &[]).await;
    let user = account(&world, "REQUIRE SSL").await;
    let url = service("WHIPPET_TEST_MYSQL_TLS").replace("whippet_tls:whippet-pw", &user);
    let file = world.write("password", "first\n");
    let config = streamed(&world, "{ name: outbox, capture: auto }");
    world.install(&config).await;
    let config = config
        .replace(&world.url, &format!("{url}/{}", world.name))
        .replace("source: {", &format!("source: {{ password_file: '{file}', max_connections: 2,"));
    let relay = world.relay(&config);
    follows(&relay).await;
    let load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    until_published(&relay, 100.0).await;
    let before = relay.log().matches(TAKEN_UP).count();
    let alter = format!("ALTER USER '{user}'@'%'");
    world.sql(&format!("{alter} IDENTIFIED BY 'second' RETAIN CURRENT PASSWORD")).await;
    world.write("password", "second\n");
    relay.wait_for_nth(TAKEN_UP, before + 1);
    only_new_ones(&world, &user).await;
    world.sql(&format!("{alter} DISCARD OLD PASSWORD")).await;
    end_all(&world, &user).await;
    until_published(&relay, 100.0).await;
    follows(&relay).await;
    let log = nothing_is_lost(&world, relay, load, &user).await;
    assert!(!log.contains("Access denied"), "{log}");
}

/// The keeper of the lease has no reason to connect meanwhile.
async fn a_password_of_a_command_is_rotated_under_load(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 3, &[]).await;
    let user = account(&world, "REQUIRE SSL").await;
    let url = service(&format!("WHIPPET_TEST_{}_TLS", server.to_uppercase()));
    let url = url.replace("whippet_tls:whippet-pw", &user);
    let issued = world.write("issued", "first\n");
    let config = streamed(&world, "{ name: outbox, capture: auto }");
    world.install(&config).await;
    let config = config
        .replace(&world.url, &format!("{url}/{}", world.name))
        .replace("lease: 2s", "lease: 2m")
        .replace(
            "source: {",
            &format!("source: {{ password_command: [cat, '{issued}'], max_connections: 2,"),
        );
    let relay = world.relay(&config);
    follows(&relay).await;
    let load = Load::start(&world, &topic, PLAN, fastrand::u64(..1_000_000) * PLAN.writers).await;
    until_published(&relay, 100.0).await;
    world.write("issued", "second\n");
    world.sql(&format!("ALTER USER '{user}'@'%' IDENTIFIED BY 'second'")).await;
    end_all(&world, &user).await;
    until_published(&relay, 100.0).await;
    follows(&relay).await;
    nothing_is_lost(&world, relay, load, &user).await;
}
