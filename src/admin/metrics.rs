//! Every metric: name, labels and help in one place; call sites use typed handles. docs/metrics.md
//! is generated from this file by a test.

use std::time::Duration;

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Opts, Registry, TextEncoder,
};

use crate::{
    coordinate::standing::Standing,
    record::{Dropped, Form, Packed},
    relay::packer::Unpacked,
    source::{Cause, hold::Counts},
};

/// Seconds: from a local broker's answer to an outage's backlog.
const LATENCY_BUCKETS: [f64; 16] =
    [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 3600.0];
/// Seconds: from a relay that says goodbye to a long lease that has to run out.
const TAKEOVER_BUCKETS: [f64; 9] = [0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 15.0, 30.0, 60.0];
/// Events of one transaction of the spool.
const GROUP_BUCKETS: [f64; 10] = [1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 2000.0];

#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    events_read: IntCounterVec,
    events_published: IntCounterVec,
    events_dead_lettered: IntCounterVec,
    publish_failures: IntCounterVec,
    retries: IntCounterVec,
    publish_duration: Histogram,
    end_to_end: HistogramVec,
    pub oldest_pending_age: GaugeVec,
    pub pending_events: IntGaugeVec,
    parked_keys: IntGaugeVec,
    parked_events: IntGaugeVec,
    held_events: IntGaugeVec,
    table_halted: IntGaugeVec,
    pub oldest_parked_age: GaugeVec,
    pub in_flight_events: IntGauge,
    pub in_flight_bytes: IntGauge,
    offload: IntCounterVec,
    offload_bytes: IntCounterVec,
    offload_duration: Histogram,
    capture_mode: IntGaugeVec,
    pub slot_retained_bytes: IntGauge,
    pub slot_safe_bytes: Gauge,
    pub slot_active: IntGauge,
    leases_held: IntGaugeVec,
    group_members: IntGauge,
    membership_epoch: IntGauge,
    parts_moved: IntCounter,
    memberships_lost: IntCounter,
    takeover: Histogram,
    last_publish: GaugeVec,
    context_dropped: IntCounterVec,
    config_last_reload_success: IntGauge,
    pub resident_bytes: Gauge,
    ingest_accepted: IntCounter,
    ingest_repeated: IntCounter,
    ingest_refused: IntCounterVec,
    ingest_answer: Histogram,
    ingest_commit: Histogram,
    ingest_commit_events: Histogram,
    pub ingest_spool_bytes: IntGauge,
    pub ingest_spool_max_bytes: IntGauge,
    pub ingest_remembered_ids: IntGauge,
}

/// The handles that one acknowledged event touches, looked up once for each table and topic.
#[derive(Debug)]
pub struct PublishedHandles {
    published: IntCounter,
    publish_duration: Histogram,
    end_to_end: Histogram,
    last_publish: Gauge,
}

impl PublishedHandles {
    /// Counts one acknowledged event: time in the sink, milliseconds since its creation, and the
    /// time of day in milliseconds since the Unix epoch.
    pub fn acknowledged(&self, publish: Option<Duration>, end_to_end_ms: Option<i64>, wall_ms: i64) {
        self.published.inc();
        if let Some(publish) = publish {
            self.publish_duration.observe(publish.as_secs_f64());
        }
        if let Some(ms) = end_to_end_ms {
            self.end_to_end.observe(ms.max(0) as f64 / 1e3);
        }
        self.last_publish.set(wall_ms as f64 / 1e3);
    }
}

/// Name, labels and help of one metric, for the docs.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    pub name: &'static str,
    pub kind: &'static str,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

const EVENTS_READ: Described =
    counter("whippet_events_read_total", &["table"], "Rows read from the source, repeats included.");
const EVENTS_PUBLISHED: Described =
    counter("whippet_events_published_total", &["table", "topic"], "Events that Kafka acknowledged.");
const EVENTS_DEAD_LETTERED: Described = counter(
    "whippet_events_dead_lettered_total",
    &["table", "reason"],
    "Events whose dead letter Kafka acknowledged, by reason: rejected, gave_up.",
);
const PUBLISH_FAILURES: Described = counter(
    "whippet_publish_failures_total",
    &["table", "kind"],
    "Events that Kafka or the relay refused, by kind: transient, rejected, fatal.",
);
const RETRIES: Described = counter(
    "whippet_retries_total",
    &["table", "kind"],
    "Tries that were repeated: an event's own (transient), or the source's after an error (source).",
);
const PUBLISH_DURATION: Described = histogram(
    "whippet_publish_duration_seconds",
    &[],
    "From handing a record to the producer to its acknowledgement.",
);
const END_TO_END: Described = histogram(
    "whippet_end_to_end_seconds",
    &["table"],
    "From the row's timestamp, by the clock that wrote it, to the acknowledgement, by this host's clock.",
);
const OLDEST_PENDING_AGE: Described = gauge(
    "whippet_oldest_pending_age_seconds",
    &["table"],
    "Age of the oldest row that waits, by the database's clock; held rows apart. Where only the log has the \
     rows: of those that were read. 0 when none waits.",
);
const PENDING_EVENTS: Described = gauge(
    "whippet_pending_events",
    &["table"],
    "Rows that wait in the table, counted up to 100000; held rows apart. Where only the log has the rows: \
     those that were read and are not settled. Owner only.",
);
const PARKED_KEYS: Described =
    gauge("whippet_parked_keys", &["table"], "Keys that are parked until an operator releases them.");
const PARKED_EVENTS: Described = gauge(
    "whippet_parked_events",
    &["table"],
    "Events held because they, or an earlier one of their key, can never be published.",
);
const HELD_EVENTS: Described = gauge(
    "whippet_held_events",
    &["table", "cause"],
    "Held events, by cause: parked (an operator releases them), topic, store and paused (the relay does).",
);
const OLDEST_PARKED_AGE: Described = gauge(
    "whippet_oldest_parked_age_seconds",
    &["table"],
    "How long the oldest parked event has been parked, by the database's clock. 0 when none is.",
);
const TABLE_HALTED: Described = gauge(
    "whippet_table_halted",
    &["table"],
    "1 while a table is halted: too much is held, or on_failure is halt and an event failed.",
);
const IN_FLIGHT_EVENTS: Described =
    gauge("whippet_in_flight_events", &[], "Events read and not settled, of all tables.");
const IN_FLIGHT_BYTES: Described =
    gauge("whippet_in_flight_bytes", &[], "Bytes of the events in flight, as the window counts them.");
const OFFLOAD: Described = counter(
    "whippet_offload_total",
    &["table", "mode", "result"],
    "Payloads that were encoded, moved to the object store or sliced (mode: encode, claim_check, chunk), by \
     result: ok, away (the object store is, it is tried again), refused.",
);
const OFFLOAD_BYTES: Described = counter(
    "whippet_offload_bytes_total",
    &["table", "mode"],
    "Bytes of these payloads as they travel or are stored, encoded where they are.",
);
const OFFLOAD_DURATION: Described =
    histogram("whippet_offload_duration_seconds", &[], "What encoding, hashing and moving a payload took.");
const CAPTURE_MODE: Described =
    gauge("whippet_capture_mode", &["table", "mode"], "1 for the mode in which a table is captured now.");
const SLOT_RETAINED_BYTES: Described = gauge(
    "whippet_slot_retained_bytes",
    &[],
    "What the server keeps of its log for the slot. 0 without one.",
);
const SLOT_SAFE_BYTES: Described = gauge(
    "whippet_slot_safe_bytes",
    &[],
    "What may still be written before the server gives the slot up (safe_wal_size); +Inf without a limit.",
);
const SLOT_ACTIVE: Described = gauge("whippet_slot_active", &[], "1 while the slot is read.");
const LEASES_HELD: Described = gauge(
    "whippet_leases_held",
    &["table"],
    "Buckets of a shared table that this relay has, or 1 for a table that \
     is not shared and is its own.",
);
const GROUP_MEMBERS: Described =
    gauge("whippet_group_members", &[], "Relays that share the source, as far as it is known.");
const MEMBERSHIP_EPOCH: Described =
    gauge("whippet_membership_epoch", &[], "The fencing number of this relay's membership. 0 without one.");
const PARTS_MOVED: Described =
    counter("whippet_leases_moved_total", &[], "Buckets that this relay took or let go.");
const MEMBERSHIPS_LOST: Described = counter(
    "whippet_memberships_lost_total",
    &[],
    "Times that the membership ran out before it was renewed.",
);
const TAKEOVER: Described = histogram(
    "whippet_takeover_seconds",
    &[],
    "When work of a relay that is gone was taken over: the time since its last sign of life.",
);
const LAST_PUBLISH: Described = gauge(
    "whippet_last_publish_timestamp_seconds",
    &["table"],
    "When Kafka last acknowledged an event of the table, since the Unix epoch.",
);
const CONTEXT_DROPPED: Described = counter(
    "whippet_context_dropped_total",
    &["table", "reason"],
    "Headers of rows that were dropped, by reason.",
);
const CONFIG_LAST_RELOAD_SUCCESS: Described = gauge(
    "whippet_config_last_reload_success",
    &[],
    "1 when the configuration in use is the one that was last read; 0 when that one was refused.",
);
const BUILD_INFO: Described = gauge("whippet_build_info", &["version", "commit"], "Always 1.");
const RESIDENT_BYTES: Described =
    gauge("whippet_resident_memory_bytes", &[], "Resident memory of this process (Linux, /proc/self/statm).");
const INGEST_ACCEPTED: Described =
    counter("whippet_ingest_accepted_total", &[], "Events that came by HTTP and are on the disk.");
const INGEST_REPEATED: Described = counter(
    "whippet_ingest_repeated_total",
    &[],
    "Events that came by HTTP with an id that was known, and were not taken again.",
);
const INGEST_REFUSED: Described = counter(
    "whippet_ingest_refused_total",
    &["reason"],
    "Requests that were refused: bad, unauthorized, topic, too_large, slow, full (the spool), busy, disk, failed, \
     stopping.",
);
const INGEST_ANSWER: Described = histogram(
    "whippet_ingest_answer_seconds",
    &[],
    "From the head of a request to its answer, of those answered with 202.",
);
const INGEST_COMMIT: Described =
    histogram("whippet_ingest_commit_seconds", &[], "What a transaction of the spool took, with its fsync.");
const INGEST_COMMIT_EVENTS: Described =
    histogram("whippet_ingest_commit_events", &[], "Events that a transaction of the spool had.");
const INGEST_SPOOL_BYTES: Described =
    gauge("whippet_ingest_spool_bytes", &[], "What is in use of the spool. 0 without one.");
const INGEST_SPOOL_MAX_BYTES: Described =
    gauge("whippet_ingest_spool_max_bytes", &[], "ingest.max_bytes. 0 without a spool.");
const INGEST_REMEMBERED_IDS: Described = gauge(
    "whippet_ingest_remembered_ids",
    &[],
    "Ids of published events that are remembered, so that a repeat is known.",
);

/// Why ingest refuses a request.
pub const REFUSALS: [&str; 10] =
    ["bad", "unauthorized", "topic", "too_large", "slow", "full", "busy", "disk", "failed", "stopping"];

/// Every metric, in the order of the docs.
pub const ALL: [Described; 43] = [
    EVENTS_READ,
    EVENTS_PUBLISHED,
    EVENTS_DEAD_LETTERED,
    PUBLISH_FAILURES,
    RETRIES,
    PUBLISH_DURATION,
    END_TO_END,
    OLDEST_PENDING_AGE,
    PENDING_EVENTS,
    PARKED_KEYS,
    PARKED_EVENTS,
    HELD_EVENTS,
    OLDEST_PARKED_AGE,
    TABLE_HALTED,
    IN_FLIGHT_EVENTS,
    IN_FLIGHT_BYTES,
    OFFLOAD,
    OFFLOAD_BYTES,
    OFFLOAD_DURATION,
    CAPTURE_MODE,
    SLOT_RETAINED_BYTES,
    SLOT_SAFE_BYTES,
    SLOT_ACTIVE,
    LEASES_HELD,
    GROUP_MEMBERS,
    MEMBERSHIP_EPOCH,
    PARTS_MOVED,
    MEMBERSHIPS_LOST,
    TAKEOVER,
    LAST_PUBLISH,
    CONTEXT_DROPPED,
    CONFIG_LAST_RELOAD_SUCCESS,
    BUILD_INFO,
    RESIDENT_BYTES,
    INGEST_ACCEPTED,
    INGEST_REPEATED,
    INGEST_REFUSED,
    INGEST_ANSWER,
    INGEST_COMMIT,
    INGEST_COMMIT_EVENTS,
    INGEST_SPOOL_BYTES,
    INGEST_SPOOL_MAX_BYTES,
    INGEST_REMEMBERED_IDS,
];

const fn counter(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Described {
    Described { name, kind: "counter", labels, help }
}

const fn gauge(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Described {
    Described { name, kind: "gauge", labels, help }
}

const fn histogram(name: &'static str, labels: &'static [&'static str], help: &'static str) -> Described {
    Described { name, kind: "histogram", labels, help }
}

impl Described {
    fn opts(&self) -> Opts {
        Opts::new(self.name, self.help)
    }
}

/// Registers a collector that this file made: its name and labels are constants above.
macro_rules! registered {
    ($registry:expr, $collector:expr) => {{
        let collector = $collector.expect("constant names and labels are valid");
        $registry.register(Box::new(collector.clone())).expect("each name is registered once");
        collector
    }};
}

impl Metrics {
    /// A registry of its own, so that tests beside each other do not meet.
    pub fn new(tables: &[&str]) -> Metrics {
        let registry = Registry::new();
        let r = &registry;
        let ints = |of: &Described| registered!(r, IntGaugeVec::new(of.opts(), of.labels));
        let floats = |of: &Described| registered!(r, GaugeVec::new(of.opts(), of.labels));
        let counters = |of: &Described| registered!(r, IntCounterVec::new(of.opts(), of.labels));
        let count = |of: &Described| registered!(r, IntCounter::with_opts(of.opts()));
        let int = |of: &Described| registered!(r, IntGauge::with_opts(of.opts()));
        let buckets = |of: &Described| HistogramOpts::new(of.name, of.help).buckets(LATENCY_BUCKETS.to_vec());
        let config = registered!(r, IntGauge::with_opts(CONFIG_LAST_RELOAD_SUCCESS.opts()));
        config.set(1);
        ints(&BUILD_INFO)
            .with_label_values(&[
                env!("CARGO_PKG_VERSION"),
                option_env!("WHIPPET_COMMIT").unwrap_or("unknown"),
            ])
            .set(1);
        let metrics = Metrics {
            events_read: counters(&EVENTS_READ),
            events_published: counters(&EVENTS_PUBLISHED),
            events_dead_lettered: counters(&EVENTS_DEAD_LETTERED),
            publish_failures: counters(&PUBLISH_FAILURES),
            retries: counters(&RETRIES),
            publish_duration: registered!(r, Histogram::with_opts(buckets(&PUBLISH_DURATION))),
            end_to_end: registered!(r, HistogramVec::new(buckets(&END_TO_END), END_TO_END.labels)),
            oldest_pending_age: floats(&OLDEST_PENDING_AGE),
            pending_events: ints(&PENDING_EVENTS),
            parked_keys: ints(&PARKED_KEYS),
            parked_events: ints(&PARKED_EVENTS),
            held_events: ints(&HELD_EVENTS),
            oldest_parked_age: floats(&OLDEST_PARKED_AGE),
            table_halted: ints(&TABLE_HALTED),
            in_flight_events: registered!(r, IntGauge::with_opts(IN_FLIGHT_EVENTS.opts())),
            in_flight_bytes: registered!(r, IntGauge::with_opts(IN_FLIGHT_BYTES.opts())),
            offload: counters(&OFFLOAD),
            offload_bytes: counters(&OFFLOAD_BYTES),
            offload_duration: registered!(r, Histogram::with_opts(buckets(&OFFLOAD_DURATION))),
            capture_mode: ints(&CAPTURE_MODE),
            slot_retained_bytes: registered!(r, IntGauge::with_opts(SLOT_RETAINED_BYTES.opts())),
            slot_safe_bytes: registered!(r, Gauge::with_opts(SLOT_SAFE_BYTES.opts())),
            slot_active: registered!(r, IntGauge::with_opts(SLOT_ACTIVE.opts())),
            leases_held: ints(&LEASES_HELD),
            group_members: int(&GROUP_MEMBERS),
            membership_epoch: int(&MEMBERSHIP_EPOCH),
            parts_moved: count(&PARTS_MOVED),
            memberships_lost: count(&MEMBERSHIPS_LOST),
            takeover: registered!(
                r,
                Histogram::with_opts(buckets(&TAKEOVER).buckets(TAKEOVER_BUCKETS.to_vec()))
            ),
            last_publish: floats(&LAST_PUBLISH),
            context_dropped: counters(&CONTEXT_DROPPED),
            config_last_reload_success: config,
            resident_bytes: registered!(r, Gauge::with_opts(RESIDENT_BYTES.opts())),
            ingest_accepted: count(&INGEST_ACCEPTED),
            ingest_repeated: count(&INGEST_REPEATED),
            ingest_refused: counters(&INGEST_REFUSED),
            ingest_answer: registered!(r, Histogram::with_opts(buckets(&INGEST_ANSWER))),
            ingest_commit: registered!(r, Histogram::with_opts(buckets(&INGEST_COMMIT))),
            ingest_commit_events: registered!(
                r,
                Histogram::with_opts(buckets(&INGEST_COMMIT_EVENTS).buckets(GROUP_BUCKETS.to_vec()))
            ),
            ingest_spool_bytes: int(&INGEST_SPOOL_BYTES),
            ingest_spool_max_bytes: int(&INGEST_SPOOL_MAX_BYTES),
            ingest_remembered_ids: int(&INGEST_REMEMBERED_IDS),
            registry,
        };
        for reason in REFUSALS {
            metrics.ingest_refused.with_label_values(&[reason]);
        }
        tables.iter().for_each(|table| metrics.begin(table));
        metrics
    }

    /// A table shows from the start, with zeros: an absent series raises no alert.
    pub fn begin(&self, table: &str) {
        self.events_read(table);
        self.capture(table, "poll");
        self.leases_held.with_label_values(&[table]).set(0);
        self.oldest_pending_age.with_label_values(&[table]).set(0.0);
        self.pending_events.with_label_values(&[table]).set(0);
        self.end_to_end.with_label_values(&[table]);
        self.held(table, 0, Counts::default(), false);
        self.oldest_parked_age.with_label_values(&[table]).set(0.0);
        for cause in [Cause::Rejected, Cause::GaveUp] {
            self.dead_lettered(table, cause.as_str());
        }
        for kind in ["transient", "rejected", "fatal"] {
            self.publish_failures(table, kind);
        }
        self.retries(table, "transient");
        self.retries(table, "source");
        for mode in ["encode", "claim_check", "chunk"] {
            for result in ["ok", "away", "refused"] {
                self.offload.with_label_values(&[table, mode, result]);
            }
            self.offload_bytes.with_label_values(&[table, mode]);
        }
    }

    /// A table that is not relayed any more has no state; what was counted stays.
    pub fn end(&self, table: &str) {
        for gauges in [
            &self.parked_keys,
            &self.parked_events,
            &self.pending_events,
            &self.table_halted,
            &self.leases_held,
        ] {
            gauges.remove_label_values(&[table]).ok();
        }
        for gauges in [&self.oldest_pending_age, &self.oldest_parked_age, &self.last_publish] {
            gauges.remove_label_values(&[table]).ok();
        }
        for cause in ["parked", "topic", "store", "paused"] {
            self.held_events.remove_label_values(&[table, cause]).ok();
        }
        for mode in ["poll", "stream"] {
            self.capture_mode.remove_label_values(&[table, mode]).ok();
        }
    }

    /// Whether the configuration that was read last is in use.
    pub fn reloaded(&self, success: bool) {
        self.config_last_reload_success.set(i64::from(success));
    }

    pub fn events_read(&self, table: &str) -> IntCounter {
        self.events_read.with_label_values(&[table])
    }

    pub fn publish_failures(&self, table: &str, kind: &str) -> IntCounter {
        self.publish_failures.with_label_values(&[table, kind])
    }

    pub fn retries(&self, table: &str, kind: &str) -> IntCounter {
        self.retries.with_label_values(&[table, kind])
    }

    pub fn published(&self, table: &str, topic: &str) -> PublishedHandles {
        PublishedHandles {
            published: self.events_published.with_label_values(&[table, topic]),
            publish_duration: self.publish_duration.clone(),
            end_to_end: self.end_to_end.with_label_values(&[table]),
            last_publish: self.last_publish.with_label_values(&[table]),
        }
    }

    pub fn dead_lettered(&self, table: &str, reason: &str) -> IntCounter {
        self.events_dead_lettered.with_label_values(&[table, reason])
    }

    pub fn held(&self, table: &str, parked_keys: usize, held: Counts, halted: bool) {
        let number = |n: u64| i64::try_from(n).unwrap_or(i64::MAX);
        self.parked_keys.with_label_values(&[table]).set(number(parked_keys as u64));
        self.parked_events.with_label_values(&[table]).set(number(held.parked));
        for (cause, events) in
            [("parked", held.parked), ("topic", held.topic), ("store", held.store), ("paused", held.paused)]
        {
            self.held_events.with_label_values(&[table, cause]).set(number(events));
        }
        self.table_halted.with_label_values(&[table]).set(i64::from(halted));
    }

    /// A payload was packed, or could not be; `mode` is what would have been done with it.
    pub fn offloaded(&self, table: &str, mode: &str, result: &Result<Packed, Unpacked>, took: Duration) {
        let (mode, result, bytes) = match result {
            Ok(Packed { form: Form::Inline(payload), .. }) => ("encode", "ok", payload.len()),
            Ok(Packed { form: Form::Reference { size, .. }, .. }) => ("claim_check", "ok", *size),
            Ok(Packed { form: Form::Chunks { whole, .. }, .. }) => ("chunk", "ok", whole.len()),
            Err(Unpacked::Away(_)) => (mode, "away", 0),
            Err(Unpacked::Never { .. }) => (mode, "refused", 0),
        };
        self.offload.with_label_values(&[table, mode, result]).inc();
        self.offload_bytes.with_label_values(&[table, mode]).inc_by(bytes as u64);
        self.offload_duration.observe(took.as_secs_f64());
    }

    /// A transaction of the spool: new events, and those that were known.
    pub fn ingested(&self, events: u64, repeated: u64, took: Duration) {
        self.ingest_accepted.inc_by(events);
        self.ingest_repeated.inc_by(repeated);
        self.ingest_commit.observe(took.as_secs_f64());
        self.ingest_commit_events.observe(events as f64);
    }

    /// A request was answered: with 202, or with a refusal for one of [`REFUSALS`].
    pub fn ingest_answered(&self, refused: Option<&str>, took: Duration) {
        match refused {
            None => self.ingest_answer.observe(took.as_secs_f64()),
            Some(reason) => self.ingest_refused.with_label_values(&[reason]).inc(),
        }
    }

    /// How a table is captured now: `poll` or `stream`.
    pub fn capture(&self, table: &str, mode: &str) {
        for one in ["poll", "stream"] {
            self.capture_mode.with_label_values(&[table, one]).set(i64::from(one == mode));
        }
    }

    pub fn leases(&self, table: &str, held: usize) {
        self.leases_held.with_label_values(&[table]).set(i64::try_from(held).unwrap_or(i64::MAX));
    }

    pub fn membership(&self, standing: &Standing) {
        self.group_members.set(i64::try_from(standing.view().members.len()).unwrap_or(i64::MAX));
        self.membership_epoch.set(standing.epoch().unwrap_or(0));
        let news = standing.moved().saturating_sub(self.parts_moved.get());
        self.parts_moved.inc_by(news);
    }

    pub fn membership_lost(&self) {
        self.memberships_lost.inc();
    }

    pub fn took_over(&self, after: Duration) {
        self.takeover.observe(after.as_secs_f64());
    }

    pub fn count_dropped(&self, table: &str, dropped: &Dropped) {
        for (reason, count) in dropped.counts() {
            if count > 0 {
                self.context_dropped.with_label_values(&[table, reason]).inc_by(u64::from(count));
            }
        }
    }

    /// The text exposition format, version 0.0.4.
    pub fn text(&self) -> String {
        let mut text = Vec::new();
        TextEncoder::new()
            .encode(&self.registry.gather(), &mut text)
            .expect("writing to memory does not fail");
        String::from_utf8_lossy(&text).into_owned()
    }
}

/// docs/metrics.md.
pub fn docs() -> String {
    let mut text = String::from(
        "# Metrics\n\nGenerated from `src/admin/metrics.rs` by `cargo test`; do not edit.\n\n\
         | name | type | labels | meaning |\n| --- | --- | --- | --- |\n",
    );
    for metric in &ALL {
        let labels = match metric.labels {
            [] => "-".to_owned(),
            labels => labels.iter().map(|label| format!("`{label}`")).collect::<Vec<_>>().join(", "),
        };
        text.push_str(&format!("| `{}` | {} | {labels} | {} |\n", metric.name, metric.kind, metric.help));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use super::*;

    #[test]
    fn the_docs_are_those_of_this_file() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
        let written = std::fs::read_to_string(path).unwrap_or_default();
        if written != docs() {
            std::fs::write(path, docs()).unwrap();
            panic!("docs/metrics.md was stale; it is written anew: commit it");
        }
    }

    const RULES: &str = include_str!("../../helm/whippet-sidecar/files/whippet.rules.yaml");
    const DASHBOARD: &str = include_str!("../../helm/whippet-sidecar/files/dashboard.json");

    /// The metrics that a text names, as they are described: a histogram by its name without a suffix.
    fn named(text: &str) -> BTreeSet<&str> {
        let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
        let histogram =
            |name: &str| ALL.iter().any(|metric| metric.name == name && metric.kind == "histogram");
        let described = |name| {
            let suffixes = ["_bucket", "_sum", "_count"].into_iter();
            suffixes
                .filter_map(|suffix| str::strip_suffix(name, suffix))
                .find(|n| histogram(n))
                .unwrap_or(name)
        };
        let of_ours = |word: &&str| word.strip_prefix("whippet_").is_some_and(|name| !name.is_empty());
        text.split(word).filter(of_ours).map(described).collect()
    }

    fn all() -> BTreeSet<&'static str> {
        ALL.iter().map(|metric| metric.name).collect()
    }

    #[test]
    fn the_dashboard_shows_every_metric_and_no_other() {
        assert_eq!(named(DASHBOARD), all(), "scripts/dashboard.py, then `scripts/chart write`");
    }

    #[test]
    fn alerts_and_documents_name_metrics_that_exist() {
        // What else is called like that: tables where there are no schemas, and others.
        let others =
            ["whippet_audit", "whippet_holds", "whippet_members", "whippet_context", "whippet_reader"];
        let others = BTreeSet::from(others);
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let folders = ["docs", "docs/runbooks", "docs/decisions"].map(|folder| root.join(folder));
        let files =
            folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap()).map(|e| e.unwrap().path());
        let documents =
            files.chain([root.join("README.md")]).filter(|path| path.extension() == Some("md".as_ref()));
        let mut texts = vec![("the alerts".to_owned(), RULES.to_owned())];
        texts.extend(
            documents.map(|path| (path.display().to_string(), std::fs::read_to_string(&path).unwrap())),
        );
        for (place, text) in &texts {
            let known: BTreeSet<&str> = all().union(&others).copied().collect();
            let unknown: Vec<&str> = named(text).difference(&known).copied().collect();
            assert!(unknown.is_empty(), "{place} names {unknown:?}");
        }
    }

    #[test]
    fn every_alert_has_a_page_and_a_test() {
        let alerts: BTreeSet<&str> =
            RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
        assert!(alerts.len() > 15, "{alerts:?}");
        let root = Path::new(env!("CARGO_MANIFEST_DIR"));
        let pages = std::fs::read_dir(root.join("docs/runbooks")).unwrap();
        let pages: Vec<String> = pages
            .map(|page| page.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned())
            .collect();
        assert_eq!(pages.iter().map(String::as_str).collect::<BTreeSet<_>>(), alerts);
        let tests = std::fs::read_to_string(root.join("tests/prometheus/whippet.test.yaml")).unwrap();
        for alert in alerts {
            assert!(RULES.contains(&format!("runbook_url: docs/runbooks/{alert}.md")), "{alert}");
            assert!(
                tests.contains(&format!("alertname=\"{alert}\", alertstate=\"firing\", severity")),
                "{alert}"
            );
        }
    }

    #[test]
    fn every_described_metric_is_exposed_and_no_other() {
        let metrics = Metrics::new(&["outbox"]);
        metrics.published("outbox", "orders").acknowledged(Some(Duration::ZERO), Some(3), 1);
        metrics.context_dropped.with_label_values(&["outbox", "denied"]).inc();
        let text = metrics.text();
        let mut exposed: Vec<&str> =
            text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
        let mut described: Vec<&str> = ALL.iter().map(|metric| metric.name).collect();
        exposed.sort_unstable();
        described.sort_unstable();
        assert_eq!(exposed, described);
    }
}
