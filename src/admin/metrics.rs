//! Metrics, which call sites use as typed handles.

mod described;
#[cfg(test)]
mod tests;

use std::time::Duration;

use prometheus::{
    Encoder, Gauge, GaugeVec, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge,
    IntGaugeVec, Registry, TextEncoder,
};

use self::described::Described;
pub use self::described::{ALL, REFUSALS, docs};
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

/// Events of one Kafka transaction.
const TRANSACTION_BUCKETS: [f64; 10] =
    [1.0, 10.0, 100.0, 500.0, 1000.0, 2500.0, 5000.0, 10_000.0, 20_000.0, 40_000.0];

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
    pub slot_max_retained_bytes: IntGauge,
    pub slot_safe_bytes: Gauge,
    pub slot_active: IntGauge,
    leases_held: IntGaugeVec,
    group_members: IntGauge,
    membership_epoch: IntGauge,
    parts_moved: IntCounter,
    memberships_lost: IntCounter,
    takeover: Histogram,
    transactions: IntCounterVec,
    transaction_commit: Histogram,
    transaction_events: Histogram,
    unit_takeovers: IntCounter,
    unit_fenced: IntCounter,
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
        let config = registered!(r, IntGauge::with_opts(described::CONFIG_LAST_RELOAD_SUCCESS.opts()));
        config.set(1);
        ints(&described::BUILD_INFO)
            .with_label_values(&[
                env!("CARGO_PKG_VERSION"),
                option_env!("WHIPPET_COMMIT").unwrap_or("unknown"),
            ])
            .set(1);
        let metrics = Metrics {
            events_read: counters(&described::EVENTS_READ),
            events_published: counters(&described::EVENTS_PUBLISHED),
            events_dead_lettered: counters(&described::EVENTS_DEAD_LETTERED),
            publish_failures: counters(&described::PUBLISH_FAILURES),
            retries: counters(&described::RETRIES),
            publish_duration: registered!(r, Histogram::with_opts(buckets(&described::PUBLISH_DURATION))),
            end_to_end: registered!(
                r,
                HistogramVec::new(buckets(&described::END_TO_END), described::END_TO_END.labels)
            ),
            oldest_pending_age: floats(&described::OLDEST_PENDING_AGE),
            pending_events: ints(&described::PENDING_EVENTS),
            parked_keys: ints(&described::PARKED_KEYS),
            parked_events: ints(&described::PARKED_EVENTS),
            held_events: ints(&described::HELD_EVENTS),
            oldest_parked_age: floats(&described::OLDEST_PARKED_AGE),
            table_halted: ints(&described::TABLE_HALTED),
            in_flight_events: registered!(r, IntGauge::with_opts(described::IN_FLIGHT_EVENTS.opts())),
            in_flight_bytes: registered!(r, IntGauge::with_opts(described::IN_FLIGHT_BYTES.opts())),
            offload: counters(&described::OFFLOAD),
            offload_bytes: counters(&described::OFFLOAD_BYTES),
            offload_duration: registered!(r, Histogram::with_opts(buckets(&described::OFFLOAD_DURATION))),
            capture_mode: ints(&described::CAPTURE_MODE),
            slot_retained_bytes: registered!(r, IntGauge::with_opts(described::SLOT_RETAINED_BYTES.opts())),
            slot_max_retained_bytes: int(&described::SLOT_MAX_RETAINED_BYTES),
            slot_safe_bytes: registered!(r, Gauge::with_opts(described::SLOT_SAFE_BYTES.opts())),
            slot_active: registered!(r, IntGauge::with_opts(described::SLOT_ACTIVE.opts())),
            leases_held: ints(&described::LEASES_HELD),
            group_members: int(&described::GROUP_MEMBERS),
            membership_epoch: int(&described::MEMBERSHIP_EPOCH),
            parts_moved: count(&described::PARTS_MOVED),
            memberships_lost: count(&described::MEMBERSHIPS_LOST),
            takeover: registered!(
                r,
                Histogram::with_opts(buckets(&described::TAKEOVER).buckets(TAKEOVER_BUCKETS.to_vec()))
            ),
            transactions: counters(&described::TRANSACTIONS),
            transaction_commit: registered!(r, Histogram::with_opts(buckets(&described::TRANSACTION_COMMIT))),
            transaction_events: registered!(
                r,
                Histogram::with_opts(
                    buckets(&described::TRANSACTION_EVENTS).buckets(TRANSACTION_BUCKETS.to_vec())
                )
            ),
            unit_takeovers: count(&described::UNIT_TAKEOVERS),
            unit_fenced: count(&described::UNIT_FENCED),
            last_publish: floats(&described::LAST_PUBLISH),
            context_dropped: counters(&described::CONTEXT_DROPPED),
            config_last_reload_success: config,
            resident_bytes: registered!(r, Gauge::with_opts(described::RESIDENT_BYTES.opts())),
            ingest_accepted: count(&described::INGEST_ACCEPTED),
            ingest_repeated: count(&described::INGEST_REPEATED),
            ingest_refused: counters(&described::INGEST_REFUSED),
            ingest_answer: registered!(r, Histogram::with_opts(buckets(&described::INGEST_ANSWER))),
            ingest_commit: registered!(r, Histogram::with_opts(buckets(&described::INGEST_COMMIT))),
            ingest_commit_events: registered!(
                r,
                Histogram::with_opts(
                    buckets(&described::INGEST_COMMIT_EVENTS).buckets(GROUP_BUCKETS.to_vec())
                )
            ),
            ingest_spool_bytes: int(&described::INGEST_SPOOL_BYTES),
            ingest_spool_max_bytes: int(&described::INGEST_SPOOL_MAX_BYTES),
            ingest_remembered_ids: int(&described::INGEST_REMEMBERED_IDS),
            registry,
        };
        for reason in REFUSALS {
            metrics.ingest_refused.with_label_values(&[reason]);
        }
        for result in ["committed", "dropped", "unknown"] {
            metrics.transactions.with_label_values(&[result]);
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

    /// A transaction of the spool, with new events.
    pub fn ingested(&self, events: u64, took: Duration) {
        self.ingest_accepted.inc_by(events);
        self.ingest_commit.observe(took.as_secs_f64());
        self.ingest_commit_events.observe(events as f64);
    }

    /// Events came whose ids are known.
    pub fn ingested_again(&self, events: u64) {
        self.ingest_repeated.inc_by(events);
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

    /// A transaction was told to commit so many events.
    pub fn commits(&self, events: usize) {
        if events > 0 {
            self.transaction_events.observe(events as f64);
        }
    }

    /// A transaction has ended: it was to be committed, or dropped.
    pub fn transaction_ended(&self, committed: bool, is_known: bool, took: Duration) {
        let result = match (is_known, committed) {
            (false, _) => "unknown",
            (true, true) => "committed",
            (true, false) => "dropped",
        };
        self.transactions.with_label_values(&[result]).inc();
        self.transaction_commit.observe(took.as_secs_f64());
    }

    /// This relay became the one producer, again where it had been fenced.
    pub fn unit_taken_over(&self, was_fenced: bool) {
        self.unit_takeovers.inc();
        self.unit_fenced.inc_by(was_fenced.into());
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
