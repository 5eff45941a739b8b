//! What becomes of an event that cannot be published, and of a topic that cannot be written to.

use crate::harness::{Seen, World};

const INSERT: &str = "INSERT INTO outbox (topic, key, payload, headers)";

fn texts(seen: &[Seen]) -> Vec<&str> {
    seen.iter().map(Seen::text).collect()
}

fn of_key<'a>(seen: &'a [Seen], key: &str) -> Vec<&'a str> {
    seen.iter().filter(|one| one.key.as_deref() == Some(key.as_bytes())).map(Seen::text).collect()
}

/// First appearances of a key's numbers are in order and complete; repeats may lie between.
fn assert_in_order(seen: &[Seen], key: &str, numbers: impl Iterator<Item = i32>) {
    let mut next = numbers.peekable();
    for number in of_key(seen, key).iter().filter_map(|text| text.parse::<i32>().ok()) {
        assert!(next.peek().is_none_or(|next| number <= *next), "{number} came before {:?}", next.peek());
        next.next_if_eq(&number);
    }
    assert_eq!(next.next(), None, "{key}");
}

/// Refused by the relay itself, and refused by the broker alone: the limit was lowered behind our back.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_carries_the_original_and_its_key_flows_on() {
    let world = World::new("deadletter").await;
    let topic = world.create_topic("events", 2, &[("max.message.bytes", "200000")]).await;
    let letters = world.create_topic("events.dead", 1, &[]).await;
    let config = world
        .config("[{ name: outbox, on_failure: dead_letter, dead_letter: { topic: '{topic}.dead' } }]", "");
    // So that a large row stays one.
    let config = config.replace("kafka: {", "kafka: { compression: none,");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "{INSERT} VALUES ('{topic}', 'k', '1', NULL), ('{topic}', 'k', 'bad', '[7]'), ('{topic}', 'k', '3', NULL)"
        ))
        .await;
    let mut consumer = world.consumer(&topic);
    consumer.read(2);
    assert_eq!(of_key(&consumer.seen, "k"), ["1", "3"]);
    world.lower_limit(&topic, 2, 5_000).await;
    world
        .sql(&format!(
            "{INSERT} SELECT '{topic}', 'k', CASE i WHEN 5 THEN convert_to(repeat('x', 20000), 'UTF8') ELSE convert_to('' || i, 'UTF8') END, '{{\"user\":\"7\"}}' FROM generate_series(4, 9) i"
        ))
        .await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut dead = world.consumer(&letters);
    let dead = dead.read(2);
    assert_eq!(dead[0].text(), "bad");
    let letter = &dead[1];
    assert_eq!(
        (letter.key.as_deref(), letter.payload.as_ref().map(Vec::len)),
        (Some(&b"k"[..]), Some(20000))
    );
    assert_eq!(letter.header("user"), Some("7"), "the original's headers");
    assert!(letter.header("id").is_some_and(|id| id.len() == 36));
    assert_eq!(letter.header("whippet-error-kind"), Some("rejected"));
    assert!(letter.header("whippet-error-message").unwrap().contains("takes 5000"), "{letter:?}");
    assert_eq!(letter.header("whippet-origin-table"), Some("outbox"));
    assert_eq!(letter.header("whippet-origin-topic"), Some(topic.as_str()));
    for letter in dead {
        assert!(letter.header("whippet-attempts").unwrap().parse::<u32>().unwrap() >= 1, "{letter:?}");
    }
    assert!(letter.header("whippet-failed-at").unwrap().ends_with('Z'));
    let mut first = Vec::new();
    for text in of_key(consumer.read_to_end(), "k") {
        if !first.contains(&text) {
            first.push(text);
        }
    }
    assert_eq!(first, ["1", "3", "4", "6", "7", "8", "9"]);
    assert_eq!(world.number("SELECT count(*) FROM whippet.holds").await, 0);
    assert_eq!(relay.metric("whippet_events_dead_lettered_total", "rejected"), 2.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_whose_dead_letter_is_refused_too_is_parked() {
    let world = World::new("nodeadletter").await;
    let topic = world.create_topic("events", 1, &[("max.message.bytes", "5000")]).await;
    let small = world.create_topic("small", 1, &[]).await;
    world.create_topic("small.dlq", 1, &[("max.message.bytes", "1000")]).await;
    world.alter_topic(&small, "max.message.bytes", "900").await;
    let config = world.config("[{ name: outbox, on_failure: dead_letter }]", "");
    world.install(&config).await;
    let _relay = world.relay(&config);
    world
        .sql(&format!(
            "{INSERT} VALUES ('{topic}', 'k', 'bad', '[7]'), ('{topic}', 'k', '2', NULL), ('{topic}', 'good', '1', NULL),
             ('{small}', 'k', convert_to(repeat('x', 2000), 'UTF8'), NULL), ('{small}', 'good', '1', NULL)"
        ))
        .await;
    assert_eq!(texts(world.consumer(&topic).read(1)), ["1"]);
    assert_eq!(texts(world.consumer(&small).read(1)), ["1"]);
    world.until("SELECT count(*) FROM whippet.holds", 3).await;
    let reason = |part: &str| {
        format!("SELECT count(*) FROM whippet.holds WHERE reason LIKE '%no dead letter%{part}%'")
    };
    world.until(&reason("cannot be written to: UnknownTopicOrPartition"), 1).await;
    world.until(&reason("more than %small.dlq takes"), 1).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_table_that_halts_keeps_what_it_has_and_goes_on_when_it_is_mended() {
    let world = World::new("onhalt").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox, on_failure: halt }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'k', '1', NULL), ('{topic}', 'k', 'bad', '[7]')")).await;
    relay.wait_for("the table halts");
    relay.until_status("/tables/0/state", "halted").await;
    assert_eq!(relay.metric("whippet_table_halted", "outbox"), 1.0);
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'other', '2', NULL)")).await;
    relay.until_status("/tables/0/pending", 1).await;
    relay.kill();
    let relay = world.relay(&config);
    relay.wait_for("the table halts");
    world.sql("UPDATE outbox SET headers = NULL").await;
    relay.operate(&world, &["redrive", "--all"]);
    let mut consumer = world.consumer(&topic);
    assert_eq!(texts(consumer.read(3)), ["1", "bad", "2"]);
    relay.until_status("/tables/0/state", "running").await;
    assert_eq!(relay.metric("whippet_table_halted", "outbox"), 0.0);
}

#[tokio::test(flavor = "multi_thread")]
async fn past_the_most_that_may_be_held_a_table_goes_on_after_a_release() {
    let world = World::new("unhalt").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config("[{ name: outbox, hold: { max_events: 3 } }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world.sql(&format!("{INSERT} SELECT '{topic}', 'bad', 'x', '7' FROM generate_series(1, 4)")).await;
    relay.wait_for("the table halts");
    world.sql(&format!("{INSERT} VALUES ('{topic}', 'good', 'through', NULL)")).await;
    relay.operate(&world, &["skip", "--key", "bad", "--reason", "test"]);
    assert_eq!(texts(world.consumer(&topic).read(1)), ["through"]);
    relay.until_status("/tables/0/state", "running").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_past_give_up_after_is_parked_and_other_topics_flow() {
    let world = World::new("giveup").await;
    let there = world.create_topic("there", 1, &[]).await;
    let gone = world.topic("gone");
    let tables = "[{ name: outbox, retry: { max: 200ms, give_up_after: 2s } }]";
    let config = world.config(tables, "");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "{INSERT} VALUES ('{gone}', 'k', '1', NULL), ('{gone}', 'k', '2', NULL), ('{gone}', 'l', '3', NULL), ('{there}', 'k', '1', NULL)"
        ))
        .await;
    world.consumer(&there).read(1);
    world.until("SELECT count(*) FROM whippet.holds WHERE cause = 'gave_up'", 2).await;
    world.until("SELECT count(*) FROM whippet.holds WHERE cause = 'behind'", 1).await;
    world.create_topic("gone", 1, &[]).await;
    // The one that watches the topic is the relay; parked keys are the operator's.
    relay.wait_for("kafka topic can be written to");
    relay.operate(&world, &["redrive", "--reason", "gave_up"]);
    let mut consumer = world.consumer(&gone);
    consumer.read(3);
    assert_eq!(of_key(&consumer.seen, "k"), ["1", "2"]);
}

/// Brighter#3155, sarama#466: a bad topic slows others.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_topic_that_fills_its_quarter_of_the_window_is_held_and_others_keep_their_rate() {
    let world = World::new("breaker").await;
    let there = world.create_topic("there", 4, &[]).await;
    let later = world.topic("later");
    let tables = "[{ name: outbox, retry: { max: 1s } }]";
    let config = world.config(tables, "limits: { in_flight_events: 2000 }");
    world.install(&config).await;
    let relay = world.relay(&config);
    // Ten times the window for the topic that is not there, and the others in between.
    world
        .sql(&format!(
            "{INSERT} SELECT CASE WHEN i % 2 = 0 THEN '{later}' ELSE '{there}' END, 'k' || i % 14, convert_to('' || i, 'UTF8'), NULL FROM generate_series(1, 40000) i"
        ))
        .await;
    let mut others = world.consumer(&there);
    others.read_until(|seen| seen.len() >= 20_000);
    relay.wait_for("the topic's events are held from now on");
    world.until("SELECT count(*) FROM whippet.holds WHERE state = 'held' AND cause = 'topic'", 20_000).await;
    relay.until_status("/tables/0/held_events", 20_000).await;
    relay.until_status("/tables/0/in_flight", 0).await;
    // A restart knows what is held, and holds what follows.
    relay.kill();
    let relay = world.relay(&config);
    world
        .sql(&format!("{INSERT} VALUES ('{later}', 'k0', 'last', NULL), ('{there}', 'k0', 'last', NULL)"))
        .await;
    others.read_until(|seen| seen.iter().any(|one| one.text() == "last"));
    world.create_topic("later", 4, &[]).await;
    let mut consumer = world.consumer(&later);
    consumer.read_until(|seen| seen.iter().any(|one| one.text() == "last"));
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.until("SELECT count(*) FROM whippet.holds", 0).await;
    let seen = consumer.read_to_end();
    for key in 0..7 {
        let mut numbers: Vec<i64> =
            of_key(seen, &format!("k{}", 2 * key)).iter().filter_map(|text| text.parse().ok()).collect();
        assert!(numbers.is_sorted(), "key {key}");
        numbers.dedup();
        assert_eq!(numbers.len(), (1..=40_000).filter(|i| i % 14 == 2 * key).count());
    }
    assert_eq!(of_key(seen, "k0").last(), Some(&"last"));
    relay.until_status("/tables/0/held_events", 0).await;
}

/// Brighter#3155: the topic goes away while its events are in flight.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_is_deleted_in_flight_is_held_and_others_keep_their_rate() {
    let world = World::new("goneinflight").await;
    let there = world.create_topic("there", 1, &[]).await;
    let gone = world.create_topic("gone", 1, &[]).await;
    let config = world.config("[{ name: outbox }]", "limits: { in_flight_events: 400 }");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!("{INSERT} VALUES ('{gone}', 'k0', 'before', NULL), ('{there}', 'k0', 'before', NULL)"))
        .await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.delete_topic(&gone).await;
    world
        .sql(&format!(
            "{INSERT} SELECT CASE WHEN i % 2 = 0 THEN '{gone}' ELSE '{there}' END, 'k' || i % 4, convert_to('' || i, 'UTF8'), NULL FROM generate_series(1, 4000) i"
        ))
        .await;
    relay.wait_for("kafka topic cannot be written to");
    let mut others = world.consumer(&there);
    others.read_until(|seen| seen.len() >= 2001);
    world.until("SELECT count(*) FROM whippet.holds WHERE cause = 'topic'", 2000).await;
    world.create_topic("gone", 1, &[]).await;
    let mut consumer = world.consumer(&gone);
    consumer.read_until(|seen| seen.len() >= 2000);
    world.until("SELECT count(*) FROM outbox", 0).await;
    for key in ["k0", "k2"] {
        assert_in_order(&consumer.seen, key, (1..=4000).filter(|i| format!("k{}", i % 4) == key));
    }
}

/// A table that is one lane: an event of another topic waits for the one before it, is held with it, and
/// follows it.
#[tokio::test(flavor = "multi_thread")]
async fn a_bad_topic_stops_a_table_that_is_one_lane_in_order() {
    let world = World::new("onelane").await;
    let there = world.create_topic("there", 1, &[]).await;
    let later = world.topic("later");
    let tables = "[{ name: outbox, order: table, retry: { max: 1s } }]";
    let config = world.config(tables, "limits: { in_flight_events: 100 }");
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "{INSERT} VALUES ('{there}', 'a', '0', NULL);
             {INSERT} SELECT CASE WHEN i % 3 = 1 THEN '{later}' ELSE '{there}' END, 'k' || i % 4, convert_to('' || i, 'UTF8'), NULL FROM generate_series(1, 300) i"
        ))
        .await;
    world.until("SELECT count(*) FROM whippet.holds WHERE cause = 'topic'", 300).await;
    let mut consumer = world.consumer(&there);
    assert_eq!(texts(consumer.read_to_end()), ["0"], "nothing passed the event of the missing topic");
    let refused = relay.try_to(&world, &["pause", "--topic", &there]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("one lane"), "{refused:?}");
    world.create_topic("later", 1, &[]).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let expected = |later: bool| (1..=300).filter(move |i| (i % 3 == 1) == later).map(|i| i.to_string());
    assert_eq!(texts(&consumer.read_to_end()[1..]), expected(false).collect::<Vec<_>>());
    assert_eq!(texts(world.consumer(&later).read_to_end()), expected(true).collect::<Vec<_>>());
}

/// sarama#466: writing to a topic is forbidden while its events are in flight. Nothing passes, other
/// topics flow, and what was held follows in order when it is allowed again.
#[tokio::test(flavor = "multi_thread")]
async fn a_topic_that_becomes_forbidden_is_held_and_nothing_passes() {
    let world = World::new("forbidden").await;
    let (topic, there) =
        (world.create_topic("events", 2, &[]).await, world.create_topic("there", 1, &[]).await);
    let config = world.config("[{ name: outbox, retry: { max: 1s } }]", "limits: { in_flight_events: 1000 }");
    world.install(&config).await;
    let relay = world.relay(&config);
    let rows = |from: u32, to: u32| {
        format!(
            "{INSERT} SELECT CASE WHEN i % 2 = 0 THEN '{topic}' ELSE '{there}' END, 'k' || i % 6, convert_to('' || i, 'UTF8'), NULL FROM generate_series({from}, {to}) i"
        )
    };
    world.sql(&rows(1, 1000)).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.forbid(&topic, true);
    world.sql(&rows(1001, 4000)).await;
    relay.wait_for("TopicAuthorizationFailed");
    let mut others = world.consumer(&there);
    others.read_until(|seen| seen.len() >= 2000);
    world.until("SELECT count(*) FROM whippet.holds WHERE cause = 'topic'", 1500).await;
    world.forbid(&topic, false);
    relay.wait_for("kafka topic can be written to");
    world.until("SELECT count(*) FROM outbox", 0).await;
    let mut consumer = world.consumer(&topic);
    let seen = consumer.read_to_end();
    for key in ["k0", "k2", "k4"] {
        assert_in_order(seen, key, (1..=4000).filter(|i| i % 2 == 0 && format!("k{}", i % 6) == key));
    }
}
