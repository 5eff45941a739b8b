//! A binlog that cannot be followed: the reason is told, the table is polled, and the log is followed when it can be.

use crate::{
    harness::{run_on, service, whippet},
    mysql::{on_both, on_both_at_once, world},
    mysql_stream::{batch, follows, streamed},
    mysql_stream_faults::{distinct, in_order},
};

on_both!(a_log_that_cannot_be_followed_says_why_and_the_table_is_polled);
on_both_at_once!(settings_that_forbid_to_follow_are_found_before_and_while_the_log_is_read);

async fn a_log_that_cannot_be_followed_says_why_and_the_table_is_polled(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let name = &world.name;
    let user = format!("u{}", &name[name.len() - 8..]);
    world
        .sql(&format!(
            "CREATE USER {user}@'127.0.0.1'; \n GRANT SELECT, INSERT, UPDATE, DELETE, CREATE ON {name}.* TO {user}@'127.0.0.1';"
        ))
        .await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let config = config.replace("mysql://whippet@", &format!("mysql://{user}@"));
    let relay = world.relay(&config);
    let says = async |text: &str| {
        relay
            .until(|status| {
                let table = &status["tables"][0];
                table["capture"] == "poll"
                    && table["capture_reason"].as_str().unwrap_or_default().contains(text)
            })
            .await;
    };
    says("GRANT REPLICATION SLAVE, REPLICATION CLIENT").await;
    let doctor = || {
        let output = whippet(&["doctor", "--config", &world.write("doctor.yaml", &config)]);
        String::from_utf8(output.stdout).unwrap()
    };
    let found = doctor();
    let binlog = found.lines().find(|line| line.contains("mysql: binlog")).unwrap();
    assert!(binlog.contains("FAIL") && binlog.contains("REPLICATION CLIENT"), "{found}");
    world.sql(&batch(&topic, 1, 10)).await;
    let mut consumer = world.consumer(&topic);
    consumer.read(10);
    world.sql(&format!("GRANT REPLICATION SLAVE, REPLICATION CLIENT ON *.* TO {user}@'127.0.0.1'")).await;
    follows(&relay).await;
    assert!(doctor().contains("it can be followed"), "{}", doctor());
    world.sql(&batch(&topic, 11, 20)).await;
    consumer.read(20);
    in_order(&consumer.seen, 20);
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0), "{log}");
    world.sql(&format!("DROP USER {user}@'127.0.0.1'")).await;
}

/// Settings of the server, put back when this is dropped, also when a test fails.
struct Settings {
    server: String,
    back: Vec<String>,
}

impl Settings {
    fn set(&mut self, name: &str, to: &str, back: &str) {
        self.back.push(format!("SET GLOBAL {name} = '{back}'"));
        run_on(&self.server, &[&format!("SET GLOBAL {name} = '{to}'")]).unwrap();
    }

    fn put_back(&mut self) {
        let statements: Vec<&str> = self.back.iter().map(String::as_str).collect();
        run_on(&self.server, &statements).unwrap();
        self.back.clear();
    }
}

impl Drop for Settings {
    fn drop(&mut self) {
        self.put_back();
    }
}

async fn settings_that_forbid_to_follow_are_found_before_and_while_the_log_is_read(server: &str) {
    let world = world(server).await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = streamed(&world, "{ name: outbox }");
    world.install(&config).await;
    let url = service(&format!("WHIPPET_TEST_{}", server.to_uppercase()));
    let mut settings = Settings { server: url, back: Vec::new() };
    let mut relay = world.relay(&config);
    let mut consumer = world.consumer(&topic);
    let both = [("binlog_format", "MIXED", "ROW"), ("binlog_row_image", "MINIMAL", "FULL")];
    let of_mysql = [("binlog_order_commits", "OFF", "ON")];
    let of_server = if server == "mysql" { &of_mysql[..] } else { &[] };
    let mut last = 0;
    for (name, to, back) in both.iter().chain(of_server) {
        for restart in [false, true] {
            follows(&relay).await;
            settings.set(name, to, back);
            if restart {
                relay.kill();
                relay = world.relay(&config);
            }
            let says = format!("{name} is {to}: ");
            relay
                .until(|status| {
                    let table = &status["tables"][0];
                    let why = table["capture_reason"].as_str().unwrap_or_default();
                    table["capture"] == "poll" && why.contains(&says)
                })
                .await;
            world.sql(&batch(&topic, last + 1, last + 10)).await;
            last += 10;
            consumer.read_until(|seen| distinct(seen) >= last as usize);
            settings.put_back();
        }
    }
    follows(&relay).await;
    in_order(&consumer.seen, last);
    assert_eq!(relay.stop().0, Some(0));
}
