//! `whippet doctor` where payloads, spools and spans go, and files that may not be written to: mended by what it
//! printed.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpListener,
    process::Command,
};

use serde_json::Value;
use sqlx::{AssertSqlSafe, Connection as _, SqliteConnection};

use crate::{
    bucket::Bucket,
    collector::Collector,
    doctor_fixes::{fails, fix, is_green},
    harness::{World, kafka, service, whippet},
};

const TABLE: &str = "[{ name: outbox }]";
const PUT: &str = "object store: put";

fn warnings(config: &str) -> Vec<Value> {
    let output = whippet(&["doctor", "--json", "--config", config]);
    let findings: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    findings.into_iter().filter(|finding| finding["verdict"] == "warn").collect()
}

/// A file of SQLite with these tables.
async fn make(url: &str, script: &str) {
    let mut connection = SqliteConnection::connect(url).await.unwrap();
    sqlx::raw_sql(AssertSqlSafe(script)).execute(&mut connection).await.unwrap();
    connection.close().await.unwrap();
}

fn run(command: &str, path: &str) {
    let done = Command::new("sh").args(["-ec", command]).env("PATH", path).output().unwrap();
    assert!(done.status.success(), "{command}: {done:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket() {
    let (world, bucket) = (World::new("fix_bucket").await, Bucket::new("fix").await);
    world.install(&world.config(TABLE, "")).await;
    let of = |options: &[(&str, &str)]| {
        world.write("whippet.yaml", &world.config(TABLE, &bucket.config("shop", options)))
    };
    is_green(&of(&[]));
    for (options, wanted) in [
        (&[("secret_access_key", "hunter2")][..], "object_store.options: (the credentials"),
        (&[("endpoint", "http://127.0.0.1:9")], "object_store.options.endpoint: (an address"),
        (&[("region", "eu-west-1")], "object_store.options: { region: "),
    ] {
        let said = fix(&of(options), PUT, "config");
        assert!(said.starts_with(wanted), "{said}");
    }

    // Without a signature it is anybody, who is allowed what the statements say, one after the other.
    let anybody = of(&[("skip_signature", "true")]);
    let mut statements = vec![Value::from(fix(&anybody, PUT, "policy"))];
    let allow = async |statements: &[Value]| {
        let mut policy = serde_json::json!({ "Version": "2012-10-17", "Statement": [] });
        for statement in statements {
            let mut statement: Value = serde_json::from_str(statement.as_str().unwrap()).unwrap();
            statement["Principal"] = serde_json::json!({ "AWS": ["*"] });
            policy["Statement"].as_array_mut().unwrap().push(statement);
        }
        let set = bucket.call("PUT", "?policy=", &policy.to_string()).await;
        assert_eq!(set.status, 204, "{set:?}");
    };
    allow(&statements).await;
    is_green(&anybody);
    let warned = warnings(&anybody);
    assert_eq!(warned.len(), 2, "{warned:#?}");
    for warning in warned {
        assert!(warning["fix"]["policy"].is_string(), "{warning}");
        statements.push(warning["fix"]["policy"].clone());
    }
    allow(&statements).await;
    assert_eq!(warnings(&anybody), [Value::Null; 0]);

    // By a command as Amazon's client has it.
    let (key, secret) = (service("WHIPPET_TEST_S3_KEY"), service("WHIPPET_TEST_S3_SECRET"));
    let client = world.write(
        "aws",
        &format!(
            "#!/bin/sh\n[ \"$1 $2 $4\" = 's3 mb --endpoint-url' ]\nexec curl --silent --fail --request PUT \\\n\
             --user '{key}:{secret}' --aws-sigv4 aws:amz:us-east-1:s3 \"$5/${{3#s3://}}\"\n"
        ),
    );
    run(&format!("chmod +x '{client}'"), &std::env::var("PATH").unwrap());
    let missing = bucket.config("shop", &[]).replace(&bucket.name, &format!("{}-new", bucket.name));
    let missing = world.write("missing.yaml", &world.config(TABLE, &missing));
    let path = format!("{}:{}", world.folder.path().display(), std::env::var("PATH").unwrap());
    run(&fix(&missing, PUT, "shell"), &path);
    is_green(&missing);
}

/// Something that speaks HTTP, takes what is put, has other things to give, and deletes nothing.
fn no_store() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for mut client in listener.incoming().map(Result::unwrap) {
            let mut request = BufReader::new(client.try_clone().unwrap());
            let (mut line, mut first, mut length) = (String::new(), String::new(), 0);
            while request.read_line(&mut line).unwrap_or(0) > 2 {
                if first.is_empty() {
                    first.clone_from(&line);
                }
                if let Some(value) = line.to_ascii_lowercase().strip_prefix("content-length: ") {
                    length = value.trim().parse().unwrap();
                }
                line.clear();
            }
            request.read_exact(&mut vec![0; length]).unwrap();
            let status =
                if first.starts_with("DELETE") || first.starts_with("POST") { "405 No" } else { "200 OK" };
            let head = "ETag: \"1\"\r\nLast-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nContent-Length: 5";
            write!(client, "HTTP/1.1 {status}\r\n{head}\r\nConnection: close\r\n\r\nother").ok();
        }
    });
    format!("http://{address}")
}

#[tokio::test(flavor = "multi_thread")]
async fn something_that_is_no_store() {
    let (world, bucket) = (World::new("fix_none").await, Bucket::new("none").await);
    world.install(&world.config(TABLE, "")).await;
    let of = |options: &[(&str, &str)]| {
        world.write("whippet.yaml", &world.config(TABLE, &bucket.config("shop", options)))
    };
    let said = fails(&of(&[("endpoint", &no_store())]));
    let checks: Vec<&str> = said.iter().map(|fail| fail["check"].as_str().unwrap()).collect();
    assert_eq!(checks, ["object store: get", "object store: delete"], "{said:#?}");
    for fail in said {
        assert!(fail["fix"]["config"].as_str().unwrap().starts_with("object_store.url: "), "{fail}");
    }
    is_green(&of(&[]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_folder_and_a_collector() {
    let world = World::new("fix_folder").await;
    world.install(&world.config(TABLE, "")).await;
    let folder = world.folder.path().join("store").display().to_string();
    let config = world
        .write("whippet.yaml", &world.config(TABLE, &format!("object_store: {{ url: 'file://{folder}' }}")));
    run(&fix(&config, PUT, "shell"), &std::env::var("PATH").unwrap());
    is_green(&config);

    let (_collector, address) = Collector::grpc().await;
    let of = |address: &str| {
        let telemetry = format!("telemetry: {{ otlp_endpoint: 'http://{address}' }}");
        world.write("whippet.yaml", &world.config(TABLE, &telemetry))
    };
    let away = warnings(&of("127.0.0.1:9"));
    assert!(matches!(&away[..], [one] if one["check"] == "telemetry: collector"), "{away:#?}");
    assert!(away[0]["fix"]["config"].as_str().unwrap().starts_with("telemetry.otlp_endpoint: "));
    assert_eq!(warnings(&of(&address.to_string())), [Value::Null; 0]);
}

/// Files that the user of the relay may not write to: the root of this machine may all, so it is another.
#[test]
fn files_that_may_not_be_written_to() {
    let folder = tempfile::tempdir().unwrap();
    let at = |name: &str| folder.path().join(name).display().to_string();
    let path = std::env::var("PATH").unwrap();
    let sh = |command: &str| run(command, &path);
    sh(&format!(
        "cd '{}'; cp '{}' whippet; mkdir store spool app; chmod 755 . whippet",
        folder.path().display(),
        env!("CARGO_BIN_EXE_whippet")
    ));
    std::fs::write(
        at("whippet.yaml"),
        format!(
            "source: {{ url: 'sqlite://{}' }}\nkafka: {{ bootstrap_servers: '{}' }}\ntables: [{{ name: outbox }}]\n\
             object_store: {{ url: 'file://{}' }}\ningest: {{ topics: [a], spool: '{}', max_bytes: 1MiB }}\n",
            at("app/app.db"),
            kafka(),
            at("store"),
            at("spool")
        ),
    )
    .unwrap();
    let is_root =
        std::fs::metadata("/proc/self").is_ok_and(|own| std::os::unix::fs::MetadataExt::uid(&own) == 0);
    let as_nobody = if is_root { "setpriv --reuid=65534 --regid=65534 --clear-groups " } else { "" };
    if is_root {
        sh(&format!("chown -R 65534:65534 '{}'", folder.path().display()));
    }
    let doctor = || -> Vec<Value> {
        let command =
            format!("cd /; {as_nobody}'{}' doctor --json --config '{}'", at("whippet"), at("whippet.yaml"));
        let output = Command::new("sh").args(["-c", &command]).output().unwrap();
        let findings: Vec<Value> =
            serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{output:?}"));
        findings.into_iter().filter(|finding| finding["verdict"] == "FAIL").collect()
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let script = String::from_utf8(whippet(&["sql", "--dialect", "sqlite"]).stdout).unwrap();
    runtime.block_on(make(&format!("sqlite://{}?mode=rwc", at("app/app.db")), &script));
    std::fs::write(at("spool/lock"), "").unwrap();
    if is_root {
        sh(&format!("chown -R 65534:65534 '{}' '{}'", at("app"), at("spool")));
    }
    assert_eq!(doctor(), [Value::Null; 0]);
    for (breaks, check) in [
        (format!("chmod a-w '{}'", at("app/app.db")), "sqlite: file"),
        (format!("rm -r '{0}/.whippet-probe'; chmod a-w '{0}'", at("store")), PUT),
        (format!("chmod a-r '{}'", at("spool/lock")), "ingest: spool"),
    ] {
        sh(&breaks);
        let said = doctor();
        assert!(matches!(&said[..], [fail] if fail["check"] == check), "{breaks}: {said:#?}");
        sh(said[0]["fix"]["shell"].as_str().unwrap());
        assert_eq!(doctor(), [Value::Null; 0], "{breaks}");
    }
}

#[test]
fn a_file_of_sqlite_by_its_url() {
    let folder = tempfile::tempdir().unwrap();
    let (file, config) =
        (folder.path().join("app.db"), folder.path().join("whippet.yaml").display().to_string());
    let write = |more: &str| {
        let url = format!("sqlite://{}{more}", file.display());
        let text = format!(
            "source: {{ url: '{url}' }}\nkafka: {{ bootstrap_servers: '{}' }}\ntables: [{{ name: outbox }}]\n",
            kafka()
        );
        std::fs::write(&config, text).unwrap();
    };
    std::fs::write(&file, "no database, and long enough to be taken for none".repeat(40)).unwrap();
    write("");
    let said = fails(&config);
    assert!(said.iter().all(|fail| fail["check"] == "sqlite: file"), "{said:#?}");
    assert_eq!(said.last().unwrap()["fix"]["config"], "source.url: (a file that is a database of SQLite)");

    std::fs::remove_file(&file).unwrap();
    let script = String::from_utf8(whippet(&["sql", "--dialect", "sqlite"]).stdout).unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(make(&format!("sqlite://{}?mode=rwc", file.display()), &script));
    write("?mode=ro");
    assert_eq!(fix(&config, "sqlite: file", "config"), "source.url: (without what makes it read-only)");
    write("");
    is_green(&config);
}
