//! `whippet doctor` on servers of MySQL and MariaDB that do not let it in, or are not what they have to be as a whole:
//! each is mended by what it printed.

use serde_json::Value;

use crate::{
    doctor_fixes::{break_and_mend, fails, fix, is_green},
    doctor_servers::{TABLE, of},
    harness::{World, kafka, run_on, service, services, services_with},
};

const MY: &str = "mysql: server";

/// The same services with other settings, and as they were at the end.
struct Restarted(&'static str);

impl Restarted {
    async fn with(name: &'static str, variable: &str, options: &str) -> Restarted {
        let (variable, options) = (variable.to_owned(), options.to_owned());
        let restart = move || services_with("restart", name, &[(&variable, &options)]);
        tokio::task::spawn_blocking(restart).await.unwrap();
        Restarted(name)
    }
}

impl Drop for Restarted {
    fn drop(&mut self) {
        services("restart", self.0);
    }
}

/// A server of MySQL or MariaDB, and what its account of the tests may.
async fn whom_it_does_not_let_in(server: &str) {
    let world = World::on(&service(server), "fix_myin").await;
    world.install(&world.config(TABLE, "")).await;
    let config = |url: &str| world.write("whippet.yaml", &world.config_for(url, &kafka(), TABLE, ""));
    let lets_in = |url: &str| assert_eq!(of(&config(url), MY), [Value::Null; 0]);
    let user = format!("in_{}", &world.name[world.name.len() - 8..]);
    let account = format!("'{user}'@'127.0.0.1'");
    let url = world.url.replace("whippet@", &format!("{user}@"));
    world.sql(&format!("CREATE USER {account}")).await;
    // The rights to the database, and the database.
    world.sql(&fix(&config(&url), MY, "sql")).await;
    lets_in(&url);
    let other = format!("{}_n", world.name);
    let of_other = world.url.replace(&world.name, &other);
    world.sql(&fix(&config(&of_other), MY, "sql")).await;
    lets_in(&of_other);
    world.sql(&format!("DROP DATABASE {other}")).await;
    world.sql(&format!("DROP USER {account}")).await;
    let password = format!("{}/{}", service(&format!("{server}_PASSWORD")), world.name);
    let wrong = password.replace("whippet-pw", "wrong");
    assert!(fix(&config(&wrong), MY, "config").starts_with("source.password_file: "));
    lets_in(&password);
    let tls = format!("{}/{}", service(&format!("{server}_TLS")), world.name);
    let with = |ca: &str| {
        let text = world.config_for(&tls, &kafka(), TABLE, "");
        let source = format!("source: {{ tls: {{ mode: verify-full, ca_file: '{ca}' }}, ");
        world.write("whippet.yaml", &text.replace("source: {", &source))
    };
    let said = fix(&with(&service("WHIPPET_TEST_PG_CA")), MY, "config");
    assert!(said.starts_with("source.tls.ca_file: "), "{said}");
    assert_eq!(of(&with(&service(&format!("{server}_CA"))), MY), [Value::Null; 0]);
    let said = fix(&with("/nowhere.pem"), MY, "config");
    assert!(said.starts_with("source.tls: "), "{said}");
    let said = fix(&config("mysql://whippet@127.0.0.1:9/none"), MY, "config");
    assert!(said.starts_with("source.url: "), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_mariadb_does_not_let_in() {
    whom_it_does_not_let_in("WHIPPET_TEST_MARIADB").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn whom_mysql_does_not_let_in() {
    whom_it_does_not_let_in("WHIPPET_TEST_MYSQL").await;
}

/// Settings that one server has and the other has not, and the number that a reader of the binlog goes by.
#[tokio::test(flavor = "multi_thread")]
async fn settings_of_mysql() {
    struct Back;
    impl Drop for Back {
        fn drop(&mut self) {
            let back = [
                "SET GLOBAL super_read_only = OFF",
                "SET GLOBAL read_only = OFF",
                "SET GLOBAL binlog_order_commits = ON",
            ];
            run_on(&service("WHIPPET_TEST_MYSQL"), &back).unwrap();
        }
    }
    let binlog = "mysql: binlog";
    let world = World::on(&service("WHIPPET_TEST_MYSQL"), "fix_myset").await;
    let text = world.config("[{ name: outbox, capture: stream }]", "");
    world.install(&text).await;
    let config = world.write("whippet.yaml", &text);
    is_green(&config);
    let _back = Back;
    break_and_mend(
        &world,
        &config,
        &[("SET GLOBAL super_read_only = ON", MY), ("SET GLOBAL binlog_order_commits = OFF", binlog)],
    )
    .await;
    let taken = world.number("SELECT @@GLOBAL.server_id").await;
    let with = |line: &str| {
        let key = line.replace("source.stream.", "");
        world.write("number.yaml", &text.replace("source: {", &format!("source: {{ stream: {{ {key} }}, ")))
    };
    let free = fix(&with(&format!("source.stream.server_id: {taken}")), binlog, "config");
    is_green(&with(&free));
}

/// A real group, of one server that may be a primary beside others.
#[tokio::test(flavor = "multi_thread")]
async fn several_primaries_of_mysql() {
    struct Back;
    impl Drop for Back {
        fn drop(&mut self) {
            let back = [
                "STOP GROUP_REPLICATION",
                "SET GLOBAL super_read_only = OFF",
                "SET GLOBAL read_only = OFF",
                "UNINSTALL PLUGIN group_replication",
            ];
            run_on(&service("WHIPPET_TEST_MYSQL"), &back).unwrap();
        }
    }
    let world = World::on(&service("WHIPPET_TEST_MYSQL"), "fix_group").await;
    let text = world.config(TABLE, "");
    world.install(&text).await;
    let config = world.write("whippet.yaml", &text);
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let free = taken.local_addr().unwrap();
    world.sql("INSTALL PLUGIN group_replication SONAME 'group_replication.so'").await;
    let back = Back;
    for (setting, value) in [
        ("group_name", "'aaaaaaaa-aaaa-aaaa-aaaa-aaaaaaaaaaaa'"),
        ("single_primary_mode", "OFF"),
        ("local_address", &*format!("'{free}'")),
        ("group_seeds", &*format!("'{free}'")),
        ("bootstrap_group", "ON"),
    ] {
        world.sql(&format!("SET GLOBAL group_replication_{setting} = {value}")).await;
    }
    drop(taken);
    world.sql("START GROUP_REPLICATION").await;
    let one = fix(&config, MY, "sql");
    world.sql(&one).await;
    is_green(&config);
    drop(back);
    is_green(&config);
}

/// What only a start of the server takes up.
#[tokio::test(flavor = "multi_thread")]
async fn settings_of_mariadb_from_its_start() {
    let (binlog, variable) = ("mysql: binlog", "WHIPPET_MARIADB_OPTIONS");
    let world = World::on(&service("WHIPPET_TEST_MARIADB"), "fix_start").await;
    let text = world.config("[{ name: outbox, capture: stream }]", "");
    world.install(&text).await;
    let config = world.write("whippet.yaml", &text);
    is_green(&config);
    let _back = Restarted::with("mariadb", variable, "--skip-log-bin --version=10.5.9-MariaDB").await;
    let said = fails(&config);
    let checks: Vec<&str> = said.iter().map(|fail| fail["check"].as_str().unwrap()).collect();
    assert_eq!(checks, [MY, binlog], "{said:#?}");
    assert_eq!(said[0]["fix"]["config"], "source.url: (a server of that version or later)");
    let option = said[1]["fix"]["shell"].as_str().unwrap().strip_prefix("(start the server with) ").unwrap();
    // It may be given twice; the last one counts.
    let filtered = format!("{option} --binlog-ignore-db=none");
    std::mem::forget(Restarted::with("mariadb", variable, &filtered).await);
    let without = fix(&config, binlog, "shell");
    assert_eq!(without, "(start the server without) --binlog-do-db and --binlog-ignore-db");
    std::mem::forget(Restarted::with("mariadb", variable, option).await);
    is_green(&config);
}
