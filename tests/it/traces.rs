//! Spans by OTLP, to a receiver that speaks it.

use opentelemetry_proto::tonic::trace::v1::{span::SpanKind, status::StatusCode};

use crate::{
    collector::{Collector, Seen},
    harness::World,
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const SPAN: &str = "00f067aa0ba902b7";

fn traceparent(sampled: bool) -> String {
    format!("00-{TRACE}-{SPAN}-0{}", u8::from(sampled))
}

async fn write(world: &World, topic: &str, payload: &str, headers: &str) {
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload, headers, created_at) \
             VALUES ('{topic}', 'k', '{payload}', '{headers}', now() - interval '2 seconds')"
        ))
        .await;
}

fn named<'a>(seen: &'a [Seen], name: &str) -> &'a Seen {
    seen.iter().find(|one| one.span.name == name).unwrap_or_else(|| panic!("no span {name:?} in {seen:#?}"))
}

/// An event whose trace is recorded has two spans, one that is not has none, and its record is as without.
#[tokio::test(flavor = "multi_thread")]
async fn spans_follow_the_rows_trace_and_never_replace_it() {
    let (collector, address) = Collector::grpc().await;
    let world = World::new("spans").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config =
        world.config("[{ name: outbox }]", &format!("telemetry: {{ otlp_endpoint: 'http://{address}' }}"));
    world.install(&config).await;
    let relay = world.relay(&config);
    let (recorded, not) = (traceparent(true), traceparent(false));
    write(
        &world,
        &topic,
        "1",
        &format!(r#"{{"traceparent":"{recorded}","tracestate":"v=1","baggage":"u=7"}}"#),
    )
    .await;
    write(&world, &topic, "2", &format!(r#"{{"traceparent":"{not}"}}"#)).await;
    write(&world, &topic, "3", r#"{"traceparent":"00-bad-01","x-request-id":"r"}"#).await;
    let mut consumer = world.consumer(&topic);
    let records = consumer.read(3).to_vec();
    assert_eq!(records[0].header("traceparent"), Some(recorded.as_str()));
    assert_eq!((records[0].header("tracestate"), records[0].header("baggage")), (Some("v=1"), Some("u=7")));
    assert_eq!(records[1].header("traceparent"), Some(not.as_str()));
    assert_eq!(records[2].header("traceparent"), None, "none is made up");

    // Everything is sent before the relay ends.
    assert_eq!(relay.stop().0, Some(0));
    let seen = collector.seen();
    assert_eq!(seen.len(), 2, "{seen:#?}");
    let (waited, sent) = (named(&seen, "outbox outbox"), named(&seen, &format!("send {topic}")));
    for one in [waited, sent] {
        assert_eq!((one.trace(), one.parent(), one.link()), (TRACE.into(), SPAN.into(), recorded.clone()));
        assert_eq!((one.service.as_str(), one.span.trace_state.as_str()), ("whippet", "v=1"));
    }
    assert_eq!((waited.span.kind(), sent.span.kind()), (SpanKind::Internal, SpanKind::Client));
    let seconds = |span: &Seen| (span.span.end_time_unix_nano - span.span.start_time_unix_nano) as f64 / 1e9;
    assert!((1.9..30.0).contains(&seconds(waited)), "{}", seconds(waited));
    assert_eq!(waited.span.end_time_unix_nano, sent.span.start_time_unix_nano);
    assert!(seconds(sent) < 30.0);
    for (name, expected) in [
        ("messaging.system", "kafka"),
        ("messaging.operation.name", "send"),
        ("messaging.operation.type", "send"),
        ("messaging.destination.name", &topic),
        ("messaging.message.id", records[0].header("id").unwrap()),
        ("server.address", "127.0.0.1"),
        ("messaging.destination.partition.id", "0"),
        ("messaging.kafka.offset", &records[0].offset.to_string()),
    ] {
        assert_eq!(sent.attribute(name).as_deref(), Some(expected), "{name}");
    }
    assert_eq!(sent.status().code(), StatusCode::Unset);
}

/// Over HTTP too; and what Kafka refuses is an error in the trace.
#[tokio::test(flavor = "multi_thread")]
async fn a_send_that_fails_is_an_error_in_the_trace() {
    let (collector, address) = Collector::http().await;
    let world = World::new("spanerror").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let config = world.config(
        "[{ name: outbox }]",
        &format!("telemetry: {{ otlp_endpoint: 'http://{address}/v1/traces' }}"),
    );
    let config = config.replace("kafka: {", "kafka: { compression: none,");
    world.install(&config).await;
    let relay = world.relay(&config);
    let headers = format!(r#"{{"traceparent":"{}"}}"#, traceparent(true));
    write(&world, &topic, "1", &headers).await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    world.lower_limit(&topic, 1, 5000).await;
    write(&world, &topic, &"x".repeat(20_000), &headers).await;
    world.until("SELECT count(*) FROM whippet.holds", 1).await;
    assert_eq!(relay.stop().0, Some(0));
    let seen = collector.seen();
    let failed = seen.iter().find(|one| one.status().code() == StatusCode::Error).unwrap();
    assert_eq!(failed.span.name, format!("send {topic}"));
    assert_eq!(failed.attribute("error.type").as_deref(), Some("MessageSizeTooLarge"));
    assert_eq!(seen.iter().filter(|one| one.span.name == "outbox outbox").count(), 1, "the other one waits");
}

/// A collector that is away costs spans and nothing else.
#[tokio::test(flavor = "multi_thread")]
async fn a_collector_that_is_away_hinders_nothing() {
    let world = World::new("nocollector").await;
    let topic = world.create_topic("events", 1, &[]).await;
    // It takes connections and never says a word.
    let silent = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let config = world.config(
        "[{ name: outbox }]",
        &format!(
            "telemetry: {{ otlp_endpoint: 'http://{}' }}\nshutdown: {{ grace: 2s }}",
            silent.local_addr().unwrap()
        ),
    );
    world.install(&config).await;
    let relay = world.relay(&config);
    world
        .sql(&format!(
            "INSERT INTO outbox (topic, key, payload, headers) SELECT '{topic}', 'k', '', '{{\"traceparent\":\"{}\"}}' FROM generate_series(1, 5000)",
            traceparent(true)
        ))
        .await;
    world.until("SELECT count(*) FROM outbox", 0).await;
    let began = std::time::Instant::now();
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0));
    assert!(began.elapsed().as_secs_f64() < 5.0, "{:?}", began.elapsed());
    assert!(log.contains("the last spans could not be sent in time"), "{log}");
    drop(silent);
}
