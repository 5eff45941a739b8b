//! MySQL and MariaDB: how one connects, which rights are enough, and what is refused or warned of.

use crate::{
    db::statements,
    harness::{World, run_on, service, whippet},
    mysql::{on_both, texts, world},
    mysql_stream::{batch, follows, streamed},
    proxy::Proxy,
};

on_both!(
    a_password_and_a_certificate_are_checked,
    the_log_is_read_with_a_password_and_over_tls,
    the_grants_that_are_printed_are_enough,
    the_doctor_finds_what_is_wrong,
    a_network_that_hangs_is_survived,
);

/// The account of these tests' server, by what comes after the name: `_TLS` needs TLS, `_PASSWORD` does not.
fn url(server: &str, which: &str, world: &World) -> String {
    format!("{}/{}", service(&format!("WHIPPET_TEST_{}_{which}", server.to_uppercase())), world.name)
}

/// ed25519 on MariaDB, caching_sha2_password on MySQL, with and without TLS.
async fn a_password_and_a_certificate_are_checked(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    world.install(&world.config("[{ name: outbox }]", "")).await;
    let ca = service(&format!("WHIPPET_TEST_{}_CA", server.to_uppercase()));
    let other = if server == "mysql" { "MARIADB" } else { "MYSQL" };
    let wrong_ca = service(&format!("WHIPPET_TEST_{other}_CA"));
    let (tls, password) = (url(server, "TLS", &world), url(server, "PASSWORD", &world));
    let doctor = |url: &str, more: &str| {
        let config = world.config_for(url, &crate::harness::kafka(), "[{ name: outbox }]", "");
        let config = config.replace("source: {", &format!("source: {{ {more}"));
        let output = whippet(&["doctor", "--config", &world.write("doctor.yaml", &config)]);
        (output.status.code(), String::from_utf8_lossy(&output.stdout).into_owned(), config)
    };
    let verified = format!("tls: {{ mode: verify-full, ca_file: '{ca}' }},");
    let by_address = tls.replace("localhost", "127.0.0.1");
    for (url, more, wanted) in [
        (&tls, verified.as_str(), "TLSv1.3"),
        (&tls, "", "TLSv1.3"),
        (&tls, "tls: { mode: require },", "TLSv1.3"),
        (&tls, &format!("tls: {{ ca_file: '{wrong_ca}' }},"), "TLSv1.3"),
        (&password, "tls: { mode: disable },", "without TLS"),
    ] {
        let (code, printed, _) = doctor(url, more);
        assert_eq!(code, Some(0), "{more}: {printed}");
        assert!(printed.contains(wanted), "{more}: {printed}");
    }
    let untrusted = format!("tls: {{ mode: verify-full, ca_file: '{wrong_ca}' }},");
    for (url, more, wanted) in [
        (&tls, untrusted.as_str(), "connect to the source database"),
        (&tls, "tls: { mode: verify-full },", "connect to the source database"),
        (&by_address, verified.as_str(), "connect to the source database"),
        (&tls, "tls: { mode: disable },", "Access denied"),
        (&password.replace("whippet-pw", "wrong"), "", "Access denied"),
    ] {
        let (code, printed, _) = doctor(url, more);
        assert_eq!(code, Some(1), "{more}: {printed}");
        assert!(printed.contains("FAIL  mysql: server: ") && printed.contains(wanted), "{more}: {printed}");
        assert!(!printed.contains("whippet-pw"), "{printed}");
    }
    // A password of a file, which is wrong at first.
    let file = world.write("password", "wrong\n");
    let (_, _, config) =
        doctor(&tls.replace(":whippet-pw", ""), &format!("password_file: '{file}', {verified}"));
    let relay = world.relay(&config);
    relay.wait_for("Access denied");
    world.write("password", "whippet-pw\n");
    world.sql(&format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', 'x')")).await;
    world.consumer(&topic).read(1);
    assert_eq!(relay.stop().0, Some(0));
}

/// The connection that reads the binlog has a login of its own.
async fn the_log_is_read_with_a_password_and_over_tls(server: &str) {
    let ca = service(&format!("WHIPPET_TEST_{}_CA", server.to_uppercase()));
    let verified = format!("tls: {{ mode: verify-full, ca_file: '{ca}' }},");
    for (which, tls, user) in
        [("PASSWORD", "tls: { mode: disable },", "whippet_pw"), ("TLS", &verified, "whippet_tls")]
    {
        let world = world(server).await;
        let topic = world.create_topic("events", 1, &[]).await;
        let config = streamed(&world, "{ name: outbox }");
        world.install(&config).await;
        let config = config
            .replace(&world.url, &url(server, which, &world))
            .replace("source: {", &format!("source: {{ {tls}"));
        let relay = world.relay(&config);
        follows(&relay).await;
        world.sql(&batch(&topic, 1, 3)).await;
        assert_eq!(texts(world.consumer(&topic).read(3)), ["1", "2", "3"]);
        let readers = format!(
            "SELECT count(*) FROM information_schema.processlist \
             WHERE command LIKE 'Binlog Dump%' AND user = '{user}'"
        );
        // One that was left behind goes a heartbeat later.
        world.until(&readers, 1).await;
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
    }
}

/// For each way to record: what `whippet sql` prints for the relay's account is all it needs.
async fn the_grants_that_are_printed_are_enough(server: &str) {
    for (after, retention) in [("delete", ""), ("mark", ""), ("mark", ", retention: { published: 1s }")] {
        let world = world(server).await;
        let topic = world.create_topic("events", 1, &[]).await;
        let admin = service(&format!("WHIPPET_TEST_{}", server.to_uppercase()));
        let user = format!("u{}", world.name.rsplit('_').next().unwrap());
        let url = format!("{}/{}", admin.replace("whippet@", &format!("{user}:secret@")), world.name);
        let tables = format!("[{{ name: outbox, after_publish: {after}{retention} }}]");
        let config = world.config_for(&url, &crate::harness::kafka(), &tables, "");
        world.install(&config).await;
        let script = whippet(&["sql", "--config", &world.write("sql.yaml", &config)]);
        let script = String::from_utf8(script.stdout).unwrap();
        assert!(!script.contains("secret"), "{script}");
        let grants: Vec<String> = script
            .lines()
            .filter_map(|line| {
                line.strip_prefix("-- ")
                    .filter(|line| line.starts_with("GRANT") || line.starts_with("CREATE USER"))
            })
            .map(|line| line.replace('\u{2026}', "secret"))
            .collect();
        assert!(grants.len() > 5, "{script}");
        for statement in statements(&grants.join("\n")) {
            world.sql(&statement).await;
        }
        let relay = world.relay(&config);
        world
            .sql(&format!(
                "INSERT INTO outbox (topic, `key`, payload, headers) VALUES ('{topic}', 'k', '1', NULL), ('{topic}', 'bad', 'x', '7')"
            ))
            .await;
        world.consumer(&topic).read(1);
        relay.until_status("/tables/0/parked_events", 1).await;
        relay.operate(&world, &["skip", "--key", "bad", "--reason", "test"]);
        if after == "mark" && retention.is_empty() {
            relay.operate(&world, &["replay", "--from", "1", "--to", "1"]);
            world.consumer(&topic).read(2);
        } else {
            world.until("SELECT count(*) FROM outbox", 0).await;
        }
        let (code, log) = relay.stop();
        assert_eq!(code, Some(0), "{log}");
        assert!(!log.contains("denied"), "{log}");
        world.sql(&format!("DROP USER '{user}'@'%'")).await;
    }
}

async fn the_doctor_finds_what_is_wrong(server: &str) {
    let world = world(server).await;
    let tables = "[{ name: outbox }, { name: marked, after_publish: mark }, { name: myisam }, { name: unindexed }, { name: other }]";
    let config = world.config(tables, "");
    world
        .sql(
            "CREATE TABLE marked (seq BIGINT AUTO_INCREMENT PRIMARY KEY, id CHAR(36), topic TEXT, payload TEXT, published_at DATETIME);
             CREATE TABLE myisam (seq BIGINT AUTO_INCREMENT PRIMARY KEY, id CHAR(36), topic TEXT, payload TEXT) ENGINE = MyISAM;
             CREATE TABLE unindexed (seq BIGINT NOT NULL, id CHAR(36) NOT NULL UNIQUE, topic TEXT, payload TEXT);
             CREATE TABLE other (seq BIGINT AUTO_INCREMENT PRIMARY KEY, id CHAR(36), topic TEXT, body TEXT)",
        )
        .await;
    let doctor = |config: &str| {
        let output = whippet(&["doctor", "--config", &world.write("doctor.yaml", config)]);
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, printed) = doctor(&config);
    assert_eq!(code, Some(1), "{printed}");
    for wanted in [
        "ok    mysql: server: version ",
        "warn  mysql: the relay's own tables: some are missing",
        "FAIL  mysql: table: table outbox does not exist",
        "warn  mysql: table: marked: no index for what is read",
        "FAIL  mysql: table: table myisam has the engine MyISAM",
        "warn  mysql: table: unindexed: no index for what is read",
        "FAIL  mysql: table: table other has no column \"payload\"",
    ] {
        assert!(printed.contains(wanted), "{wanted}:\n{printed}");
    }
    let good = world.config("[{ name: outbox }]", "");
    world.install(&good).await;
    let (code, printed) = doctor(&good);
    assert_eq!(code, Some(0), "{printed}");
    assert!(printed.contains("ok    mysql: table: outbox: can be read and written to"), "{printed}");
    assert!(!printed.contains("warn"), "{printed}");
    // What the relay has made goes, and the outbox stays.
    let file = world.write("teardown.yaml", &good);
    let output = whippet(&["teardown", "--config", &file]);
    assert!(output.status.success(), "{output:?}");
    let own = "SELECT count(*) FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name LIKE 'whippet%'";
    assert_eq!(world.number(own).await, 0);
    assert_eq!(world.number("SELECT count(*) FROM outbox").await, 0);
}

/// What statements are told as, and several primaries: not even polling is safe there.
#[tokio::test(flavor = "multi_thread")]
async fn a_server_of_statements_and_one_of_several_primaries_are_refused() {
    struct Back(String, &'static [&'static str]);
    impl Drop for Back {
        fn drop(&mut self) {
            run_on(&self.0, self.1).unwrap();
        }
    }
    for (server, set, back, wanted) in [
        (
            "mariadb",
            &["SET GLOBAL binlog_format = 'STATEMENT'"][..],
            &["SET GLOBAL binlog_format = 'ROW'"][..],
            "binlog_format = STATEMENT",
        ),
        (
            "mysql",
            &["SET GLOBAL binlog_format = 'STATEMENT'"],
            &["SET GLOBAL binlog_format = 'ROW'"],
            "binlog_format = STATEMENT",
        ),
        (
            "mysql",
            &[
                "INSTALL PLUGIN group_replication SONAME 'group_replication.so'",
                "SET GLOBAL group_replication_group_name = 'aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa'",
                "SET GLOBAL group_replication_single_primary_mode = OFF",
            ],
            &["UNINSTALL PLUGIN group_replication"],
            "one of several primaries",
        ),
    ] {
        let world = world(server).await;
        let config = world.config("[{ name: outbox }]", "");
        world.install(&config).await;
        let url = service(&format!("WHIPPET_TEST_{}", server.to_uppercase()));
        run_on(&url, set).unwrap();
        let _back = Back(url, back);
        let output = whippet(&["doctor", "--config", &world.write("doctor.yaml", &config)]);
        let printed = String::from_utf8_lossy(&output.stdout).into_owned();
        assert_eq!(output.status.code(), Some(1), "{printed}");
        assert!(printed.contains("FAIL  mysql: server: ") && printed.contains(wanted), "{printed}");
        let relay = world.relay(&config);
        relay.wait_for(wanted);
    }
}

/// Its packets go nowhere for a while, both ways, and nobody says so.
async fn a_network_that_hangs_is_survived(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let port = service(&format!("WHIPPET_TEST_{}_PROXIED_PORT", server.to_uppercase()));
    let url = format!("mysql://whippet@127.0.0.1:{port}/{}", world.name);
    let config = world.config_for(&url, &crate::harness::kafka(), "[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    let insert = |n: u32| format!("INSERT INTO outbox (topic, payload) VALUES ('{topic}', '{n}')");
    let mut consumer = world.consumer(&topic);
    world.sql(&insert(1)).await;
    consumer.read(1);
    let proxy = Proxy::to(server);
    proxy.blackhole();
    world.sql(&insert(2)).await;
    // By then it does not own the source any more, as it knows, and has asked on another connection.
    relay.wait_for("does not answer");
    drop(proxy);
    consumer.read(2);
    let proxy = Proxy::to(server);
    proxy.cut();
    relay.wait_for("cannot reach the source database");
    world.sql(&insert(3)).await;
    drop(proxy);
    // What was published and could not be recorded is repeated.
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "3"));
    let mut seen = texts(&consumer.seen);
    seen.dedup();
    assert_eq!(seen, ["1", "2", "3"]);
    assert_eq!(relay.stop().0, Some(0));
}
