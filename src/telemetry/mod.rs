//! Traces by OTLP: spans of events whose trace is recorded, as their `traceparent` says. Nothing is made
//! of any other, and nothing at all where no endpoint is configured.
//!
//! `span` makes them, `export` sends them in batches. Whoever makes one never waits: where the collector
//! cannot keep up, or is away, spans are dropped and the log says so once in a while.

mod export;
mod span;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use anyhow::Context as _;
use opentelemetry::{InstrumentationScope, KeyValue};
use opentelemetry_otlp::{
    Protocol, SpanExporter, WithExportConfig as _, WithTonicConfig as _,
    tonic_types::transport::ClientTlsConfig,
};
use opentelemetry_sdk::{
    Resource,
    trace::{SpanData, SpanExporter as _},
};
use tokio::{sync::mpsc, task::JoinHandle};
use tracing::warn;

pub use self::span::{Processing, Sending};
use crate::record::w3c::Parent;

/// Spans that wait for the collector, at most.
const QUEUE: usize = 2048;
/// How long the collector may take for a batch.
const EXPORT_WITHIN: Duration = Duration::from_secs(10);
/// The port of OTLP over HTTP; gRPC has 4317.
const HTTP_PORT: u16 = 4318;
const HTTP_PATH: &str = "/v1/traces";
const SCOPE: &str = "whippet";

/// What makes spans. Cheap to clone; never waits.
#[derive(Clone, Debug)]
pub struct Spans {
    queue: mpsc::Sender<SpanData>,
    dropped: Arc<AtomicU64>,
    scope: InstrumentationScope,
    /// Of every span: where Kafka is.
    server: Vec<KeyValue>,
}

/// The sending of spans, until [`flush`](Telemetry::flush).
pub struct Telemetry {
    pub spans: Spans,
    exporting: JoinHandle<()>,
}

/// A base URL, or one of the signal itself. Whoever uses the usual port of HTTP means HTTP.
#[derive(Debug, PartialEq, Eq)]
enum Endpoint {
    Grpc(String),
    Http(String),
}

fn endpoint(url: &str) -> Result<Endpoint, &'static str> {
    let parsed = url::Url::parse(url).ok().filter(|url| url.has_host());
    let parsed = parsed.filter(|url| matches!(url.scheme(), "http" | "https"));
    let parsed = parsed.ok_or("expected http://host:4317 (gRPC), http://host:4318 (HTTP), or https://")?;
    match parsed.path().trim_end_matches('/') {
        "" if parsed.port() == Some(HTTP_PORT) => {
            Ok(Endpoint::Http(format!("{}{HTTP_PATH}", url.trim_end_matches('/'))))
        }
        "" => Ok(Endpoint::Grpc(url.to_owned())),
        path if path.ends_with(HTTP_PATH) => Ok(Endpoint::Http(url.to_owned())),
        _ => Err("expected no path (gRPC, or HTTP on port 4318), or one that ends in /v1/traces (HTTP)"),
    }
}

/// Whether a URL can be an endpoint, and what is wrong with it.
pub fn check(url: &str) -> Result<(), &'static str> {
    endpoint(url).map(drop)
}

impl Telemetry {
    /// Connects when there is something to send. `service` is whose spans they are, unless the environment says so,
    /// `instance` names this process, and `servers` are Kafka's.
    pub fn open(url: &str, service: &str, instance: &str, servers: &str) -> anyhow::Result<Telemetry> {
        let at = endpoint(url).map_err(|why| anyhow::anyhow!("{why}")).context("telemetry.otlp_endpoint")?;
        let exporter = match at {
            Endpoint::Grpc(url) => {
                let builder =
                    SpanExporter::builder().with_tonic().with_endpoint(&url).with_timeout(EXPORT_WITHIN);
                match url.starts_with("https:") {
                    true => builder.with_tls_config(ClientTlsConfig::new().with_enabled_roots()).build(),
                    false => builder.build(),
                }
            }
            Endpoint::Http(url) => SpanExporter::builder()
                .with_http()
                .with_protocol(Protocol::HttpBinary)
                .with_endpoint(url)
                .with_timeout(EXPORT_WITHIN)
                .build(),
        };
        let mut exporter = exporter.context("telemetry.otlp_endpoint")?;
        exporter.set_resource(&resource(service, instance));
        let (queue, spans) = mpsc::channel(QUEUE);
        let dropped = Arc::new(AtomicU64::new(0));
        let exporting = tokio::spawn(export::export(spans, exporter, dropped.clone()));
        let scope = InstrumentationScope::builder(SCOPE).with_version(env!("CARGO_PKG_VERSION")).build();
        Ok(Telemetry { spans: Spans { queue, dropped, scope, server: server(servers) }, exporting })
    }

    /// Sends what is left, once nobody makes spans any more; not for longer than this.
    pub async fn flush(self, within: Duration) {
        let Telemetry { spans, mut exporting } = self;
        drop(spans);
        if tokio::time::timeout(within, &mut exporting).await.is_err() {
            exporting.abort();
            warn!("the last spans could not be sent in time; they are lost");
        }
    }
}

/// Who says so. The environment (`OTEL_SERVICE_NAME`, `OTEL_RESOURCE_ATTRIBUTES`) wins.
fn resource(service: &str, instance: &str) -> Resource {
    let ours = [
        KeyValue::new("service.name", service.to_owned()),
        KeyValue::new("service.instance.id", instance.to_owned()),
    ];
    let theirs = Resource::builder().build();
    let unknown = |key: &str, value: &str| key == "service.name" && value.starts_with("unknown_service");
    let theirs: Vec<KeyValue> = theirs
        .iter()
        .filter(|(key, value)| !unknown(key.as_str(), &value.as_str()))
        .map(|(key, value)| KeyValue::new(key.clone(), value.clone()))
        .collect();
    Resource::builder_empty().with_attributes(ours).with_attributes(theirs).build()
}

/// The first of Kafka's servers, as attributes.
fn server(servers: &str) -> Vec<KeyValue> {
    let first = servers.split(',').next().unwrap_or_default().trim();
    let (host, port) = first.rsplit_once(':').unwrap_or((first, ""));
    let port = port.parse::<i64>().ok().map(|port| KeyValue::new("server.port", port));
    [Some(KeyValue::new("server.address", host.to_owned())), port].into_iter().flatten().collect()
}

impl Spans {
    /// An event was sent: the spans of its wait in the outbox and of its way to Kafka.
    pub fn sent(&self, parent: &Parent, sending: &Sending<'_>) {
        for span in span::of(parent, sending, &self.scope, &self.server) {
            self.put(span);
        }
    }

    fn put(&self, span: SpanData) {
        if self.queue.try_send(span).is_err() {
            self.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_and_the_path_tell_which_protocol_is_meant() {
        let grpc = |url: &str| Ok(Endpoint::Grpc(url.to_owned()));
        let http = |url: &str| Ok(Endpoint::Http(url.to_owned()));
        assert_eq!(endpoint("http://otel:4317"), grpc("http://otel:4317"));
        assert_eq!(endpoint("https://otel.example/"), grpc("https://otel.example/"));
        assert_eq!(endpoint("http://otel:4318"), http("http://otel:4318/v1/traces"));
        assert_eq!(endpoint("http://otel:4318/"), http("http://otel:4318/v1/traces"));
        assert_eq!(endpoint("https://x.example/otlp/v1/traces"), http("https://x.example/otlp/v1/traces"));
        for wrong in ["otel:4317", "grpc://otel:4317", "http://otel:4317/elsewhere", "", "http://"] {
            assert!(endpoint(wrong).is_err(), "{wrong}");
        }
    }

    /// Nobody listens there; TLS is made ready before that shows.
    #[tokio::test]
    async fn an_https_endpoint_needs_nothing_more() {
        for url in ["https://127.0.0.1:1", "https://127.0.0.1:1/v1/traces"] {
            let telemetry = Telemetry::open(url, "test", "test-1", "kafka:9092").unwrap();
            let traceparent = b"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
            let parent = Parent::parse(traceparent, None).unwrap();
            drop(telemetry.spans.processing(&parent, "orders", "e1", None));
            drop(telemetry.spans);
            telemetry.exporting.await.unwrap();
        }
    }
}
