//! Tokens that somebody else makes, on the real broker: each lives for seconds, and the broker wants the next one then.

use std::time::{Duration, Instant};

use crate::{
    harness::{World, whippet},
    kafka_identity::{Stage, tls, token},
};

/// A relay that logs in by tokens.
async fn stage(name: &str, keys: impl Fn(&World) -> String) -> Stage {
    Stage::with(name, "WHIPPET_TEST_KAFKA_SASL", |world| {
        format!(
            "properties: {{ security.protocol: SASL_SSL, sasl.mechanisms: OAUTHBEARER, ssl.ca.location: '{}/ca.crt' }}, {}",
            tls(),
            keys(world)
        )
    })
    .await
}

/// The verdict of a check of `whippet doctor`, and what it says.
fn doctor(stage: &Stage, check: &str) -> (String, String) {
    let printed = whippet(&["doctor", "--json", "--config", &stage.config]).stdout;
    let findings: serde_json::Value = serde_json::from_slice(&printed).unwrap();
    let finding = findings.as_array().unwrap().iter().find(|finding| finding["check"] == check);
    let finding = finding.unwrap_or_else(|| panic!("no {check} in {findings}"));
    let text = |key: &str| finding[key].as_str().unwrap().to_owned();
    (text("verdict"), text("says"))
}

/// How many of the topic's events `whippet consume` prints.
fn consumed(stage: &Stage, count: usize) -> usize {
    let (topic, max) = (stage.topic.as_str(), count.to_string());
    let arguments = ["--topic", topic, "--from-beginning", "--max", &max];
    let done = whippet(&[&["consume", "--config", &stage.config], &arguments[..]].concat());
    assert!(done.status.success(), "{done:?}");
    String::from_utf8(done.stdout).unwrap().lines().count()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_in_a_file_is_changed_under_load() {
    let mut stage =
        stage("tokenfile", |world| format!("token_file: '{}'", world.write("kafka-token", &token(15)))).await;
    let first_ends = Instant::now() + Duration::from_secs(15);
    stage.flows().await;
    stage
        .under_load(async |stage| {
            stage.world.write("kafka-token", &token(60));
            // Connections that have logged in with the first one go on for as long as that is good.
            tokio::time::sleep_until(first_ends.into()).await;
        })
        .await;
    assert_eq!(stage.repeats(), 0);
    // What asks for topics logs in with the newest one, too.
    stage.topic = stage.world.create_topic("more", 1, &[]).await;
    stage.world.sql("TRUNCATE outbox").await;
    stage.flows().await;
    assert_eq!(doctor(&stage, "kafka: token").0, "ok");
    assert_eq!(doctor(&stage, "kafka: brokers").0, "ok");
    assert_eq!(consumed(&stage, 10), 10);
    let (_, log) = stage.relay.stop();
    assert!(!log.contains("there is no "), "{log}");
}

/// Prints a token of 4 s, and notes that it was asked.
const SIGNER: &str = r#"
encode() { openssl base64 -A | tr '+/' '-_' | tr -d '='; }
now=$(date +%s)
head=$(printf '{"alg":"RS256","typ":"JWT","kid":"test"}' | encode)
claims=$(printf '{"iss":"it","sub":"relay","aud":"kafka","iat":%s,"exp":%s}' "$now" $((now + 4)) | encode)
printf '%s.%s.' "$head" "$claims"
printf '%s' "$head.$claims" | openssl dgst -sha256 -sign "$1/issuer.key" | encode
echo >> "$2"
"#;

#[tokio::test(flavor = "multi_thread")]
async fn tokens_of_a_command_are_enough_for_transactions() {
    let started = Instant::now();
    let mut stage = stage("tokencommand", |world| {
        let (signer, calls) = (world.write("signer", SIGNER), world.write("calls", ""));
        format!("delivery: exactly_once, token_command: [sh, '{signer}', '{}', '{calls}']", tls())
    })
    .await;
    let calls = |stage: &Stage| {
        let file = std::path::Path::new(&stage.config).with_file_name("calls");
        std::fs::read_to_string(file).unwrap().len()
    };
    stage.flows().await;
    stage
        .under_load(async |stage| {
            // The first two have ended then.
            while calls(stage) < 5 {
                stage.world.pause().await;
            }
        })
        .await;
    // One for all clients, at 60 % of a life that is said in whole seconds.
    let most = 1 + started.elapsed().as_secs() as usize / 2;
    let asked = calls(&stage);
    assert!(asked <= most, "{asked} times, expected at most {most}");
    assert_eq!(stage.repeats(), 0);
    let (verdict, says) = doctor(&stage, "kafka: positions");
    assert_eq!(verdict, "ok", "{says}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_that_has_ended_is_told_and_the_next_one_is_taken_up() {
    let mut stage = stage("tokenended", |world| {
        let file = world.write("kafka-token", "");
        std::fs::remove_file(&file).unwrap();
        format!("token_file: '{file}'")
    })
    .await;
    let none = "there is no token for kafka: clients cannot log in until there is one";
    let first = stage.relay.wait_for(none);
    assert!(first["error"].as_str().unwrap().contains("No such file"), "{first}");
    stage.write(10).await;
    stage.world.write("kafka-token", &token(10));
    stage.world.until("SELECT count(*) FROM outbox", 0).await;
    let ended = stage.relay.wait_for_nth(none, 2);
    assert!(ended["error"].as_str().unwrap().contains("kafka-token: its token ended at "), "{ended}");
    let (verdict, says) = doctor(&stage, "kafka: token");
    assert!(verdict == "FAIL" && says.contains("its token ended at "), "{verdict}: {says}");
    // The broker takes it no more.
    stage.write(10).await;
    stage.relay.wait_for("kafka is in trouble; the client goes on trying");
    stage.world.write("kafka-token", &token(60));
    stage.world.until("SELECT count(*) FROM outbox", 0).await;
    stage.relay.wait_for_nth("there is a token for kafka again", 2);
    println!("repeated: {}", stage.repeats());
}
