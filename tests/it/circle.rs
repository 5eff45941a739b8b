//! The whole circle: a request by HTTP, a record, a consumer, a row, a record, another consumer. One trace
//! and one request id everywhere.

use std::collections::BTreeMap;

use serde_json::Value;
use whippet::{
    consume::{Consumer, Event, Onward, Settings, Start},
    telemetry::Telemetry,
};

use crate::{
    collector::{Collector, Seen, hex},
    harness::{World, kafka},
    ingest::{address, post},
};

const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";

async fn next(topic: &str) -> Event {
    let mut settings = Settings::new(&kafka(), &[topic]);
    settings.start = Start::Beginning;
    settings.blob = Some("x-context".into());
    Consumer::open(&settings, None).await.unwrap().recv().await.unwrap()
}

/// `orders` by HTTP, and what follows from them by the outbox: with each way of carrying context.
async fn goes_round(name: &str, defaults: &str) {
    let (collector, otlp) = Collector::grpc().await;
    let otlp = format!("http://{otlp}");
    let world = World::new(name).await;
    let orders = world.create_topic("orders", 1, &[]).await;
    let bills = world.create_topic("bills", 1, &[]).await;
    let more = format!(
        "ingest: {{ listen: '127.0.0.1:0', topics: ['*'], spool: '{}' }}\ntelemetry: {{ otlp_endpoint: '{otlp}' }}\n\
         log: {{ context: [x-request-id] }}\ndefaults: {{ {defaults} }}",
        world.folder.path().join("spool").display()
    );
    let config = world.config("[{ name: outbox }]", &more);
    world.install(&config).await;
    let relay = world.relay(&config);

    // A request, and others beside it.
    let traceparent = format!("00-{TRACE}-00f067aa0ba902b7-01");
    let request =
        |trace: &str, id: &str| format!("traceparent: {trace}\r\nbaggage: u=7\r\nx-request-id: {id}\r\n");
    let ingest = address(&relay);
    let accepted = post(&ingest, &orders, &request(&traceparent, "r-17"), br#"{"order":1}"#);
    assert_eq!(accepted.code, 202);
    let other = "00-aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa-bbbbbbbbbbbbbbbb-00";
    assert_eq!(post(&ingest, &orders, &request(other, "r-18"), b"{}").code, 202);

    // A consumer of the application, which writes a row because of it.
    let order = next(&orders).await;
    assert_eq!(order.payload.as_deref(), Some(&br#"{"order":1}"#[..]));
    let telemetry = Telemetry::open(&otlp, "billing", "billing-1", &kafka()).unwrap();
    let work = Onward::default().traced(&telemetry.spans, Some("billing")).begin(&order);
    let mut transaction = world.db.pg().begin().await.unwrap();
    sqlx::query("SELECT set_config('whippet.context', $1, true)")
        .bind(work.context().json())
        .execute(&mut *transaction)
        .await
        .unwrap();
    sqlx::query("INSERT INTO outbox (topic, key, payload) VALUES ($1, 'b-1', $2)")
        .bind(&bills)
        .bind(&b"{\"bill\":1}"[..])
        .execute(&mut *transaction)
        .await
        .unwrap();
    transaction.commit().await.unwrap();
    drop(work);
    telemetry.flush(std::time::Duration::from_secs(10)).await;

    // Whoever reads that.
    let bill = next(&bills).await;
    assert_eq!(bill.payload.as_deref(), Some(&br#"{"bill":1}"#[..]));
    for event in [&order, &bill] {
        let context = event.headers.onward();
        assert_eq!(context.traceparent().map(|parent| &parent[3..35]), Some(TRACE), "{context:?}");
        assert_eq!((context.text("x-request-id"), context.baggage()), (Some("r-17"), Some("u=7")));
    }
    world.until("SELECT count(*) FROM outbox", 0).await;
    let (code, log) = relay.stop();
    assert_eq!(code, Some(0));

    // The log has two lines of that request, and they are its events.
    let lines = log.lines().filter(|line| line.contains("r-17"));
    let told: Vec<(String, String, String)> = lines
        .map(|line| {
            let line: Value = serde_json::from_str(line).unwrap();
            assert_eq!(line["context"]["x-request-id"], "r-17");
            let text = |name: &str| line[name].as_str().unwrap().to_owned();
            (text("message"), text("table"), text("id"))
        })
        .collect();
    let published = |table: &str, event: &Event| {
        ("event is published".to_owned(), table.to_owned(), event.id().unwrap().to_owned())
    };
    assert_eq!(told, [published("ingest", &order), published("outbox", &bill)]);

    // The spans are one trace, from the request to the last record.
    let seen = collector.seen();
    let spans: BTreeMap<&str, &Seen> = seen.iter().map(|one| (one.span.name.as_str(), one)).collect();
    let (send_order, process) = (format!("send {orders}"), format!("process {orders}"));
    let send_bill = format!("send {bills}");
    let names: Vec<&str> = spans.keys().copied().collect();
    let mut expected = ["outbox ingest", "outbox outbox", &process, &send_bill, &send_order];
    expected.sort_unstable();
    assert_eq!(names, expected, "{seen:#?}");
    assert_eq!(seen.len(), 5);
    assert!(seen.iter().all(|one| one.trace() == TRACE), "{seen:#?}");
    let processed = hex(&spans[&*process].span.span_id);
    assert_eq!((spans[&*process].service.as_str(), spans[&*process].link()), ("billing", traceparent));
    for (name, parent) in [
        ("outbox ingest", "00f067aa0ba902b7"),
        (&*send_order, "00f067aa0ba902b7"),
        (&*process, "00f067aa0ba902b7"),
        ("outbox outbox", &*processed),
        (&*send_bill, &*processed),
    ] {
        assert_eq!(spans[name].parent(), parent, "{name}");
    }
    assert_eq!(spans[&*process].attribute("messaging.consumer.group.name").as_deref(), Some("billing"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_round_as_one() {
    goes_round("circle", "").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_round_in_one_header() {
    goes_round("circleblob", "headers: { blob: x-context }").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_goes_round_in_cloudevents() {
    goes_round("circlece", "envelope: cloudevents-structured").await;
}
