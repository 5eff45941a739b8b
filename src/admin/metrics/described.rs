//! Every metric: its name, labels and help. docs/metrics.md is generated from this file by a test.

use prometheus::Opts;

/// Name, labels and help of one metric, for the docs.
#[derive(Clone, Copy, Debug)]
pub struct Described {
    pub name: &'static str,
    pub kind: &'static str,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

pub(super) const EVENTS_READ: Described =
    counter("whippet_events_read_total", &["table"], "Rows read from the source, repeats included.");
pub(super) const EVENTS_PUBLISHED: Described =
    counter("whippet_events_published_total", &["table", "topic"], "Events that Kafka acknowledged.");
pub(super) const EVENTS_DEAD_LETTERED: Described = counter(
    "whippet_events_dead_lettered_total",
    &["table", "reason"],
    "Events whose dead letter Kafka acknowledged, by reason: rejected, gave_up.",
);
pub(super) const PUBLISH_FAILURES: Described = counter(
    "whippet_publish_failures_total",
    &["table", "kind"],
    "Events that Kafka or the relay refused, and tries of a topic that is not there, by kind: transient, rejected, fatal.",
);
pub(super) const RETRIES: Described = counter(
    "whippet_retries_total",
    &["table", "kind"],
    "Tries that were repeated: an event's own or its topic's (transient), or the source's after an error (source).",
);
pub(super) const PUBLISH_DURATION: Described = histogram(
    "whippet_publish_duration_seconds",
    &[],
    "From handing a record to the producer to its acknowledgement.",
);
pub(super) const END_TO_END: Described = histogram(
    "whippet_end_to_end_seconds",
    &["table"],
    "From the row's timestamp, by the clock that wrote it, to the acknowledgement, by this host's clock.",
);
pub(super) const OLDEST_PENDING_AGE: Described = gauge(
    "whippet_oldest_pending_age_seconds",
    &["table"],
    "Age of the oldest row that waits, by the database's clock; held rows apart. Where only the log has the \
     rows: of those that were read. 0 when none waits.",
);
pub(super) const PENDING_EVENTS: Described = gauge(
    "whippet_pending_events",
    &["table"],
    "Rows that wait in the table, counted up to 100000; held rows apart. Where only the log has the rows: \
     those that were read and are not settled. Owner only.",
);
pub(super) const PARKED_KEYS: Described =
    gauge("whippet_parked_keys", &["table"], "Keys that are parked until an operator releases them.");
pub(super) const PARKED_EVENTS: Described = gauge(
    "whippet_parked_events",
    &["table"],
    "Events held because they, or an earlier one of their key, can never be published.",
);
pub(super) const HELD_EVENTS: Described = gauge(
    "whippet_held_events",
    &["table", "cause"],
    "Held events, by cause: parked (an operator releases them), topic, store and paused (the relay does).",
);
pub(super) const OLDEST_PARKED_AGE: Described = gauge(
    "whippet_oldest_parked_age_seconds",
    &["table"],
    "How long the oldest parked event has been parked, by the database's clock. 0 when none is.",
);
pub(super) const TABLE_HALTED: Described = gauge(
    "whippet_table_halted",
    &["table"],
    "1 while a table is halted: too much is held, or on_failure is halt and an event failed.",
);
pub(super) const IN_FLIGHT_EVENTS: Described =
    gauge("whippet_in_flight_events", &[], "Events read and not settled, of all tables.");
pub(super) const IN_FLIGHT_BYTES: Described =
    gauge("whippet_in_flight_bytes", &[], "Bytes of the events in flight, as the window counts them.");
pub(super) const OFFLOAD: Described = counter(
    "whippet_offload_total",
    &["table", "mode", "result"],
    "Payloads that were encoded, moved to the object store or sliced (mode: encode, claim_check, chunk), by \
     result: ok, away (the object store is, it is tried again), refused.",
);
pub(super) const OFFLOAD_BYTES: Described = counter(
    "whippet_offload_bytes_total",
    &["table", "mode"],
    "Bytes of these payloads as they travel or are stored, encoded where they are.",
);
pub(super) const OFFLOAD_DURATION: Described =
    histogram("whippet_offload_duration_seconds", &[], "What encoding, hashing and moving a payload took.");
pub(super) const CAPTURE_MODE: Described =
    gauge("whippet_capture_mode", &["table", "mode"], "1 for the mode in which a table is captured now.");
pub(super) const SLOT_RETAINED_BYTES: Described = gauge(
    "whippet_slot_retained_bytes",
    &[],
    "What the server keeps of its log for the slot. 0 without one.",
);
pub(super) const SLOT_MAX_RETAINED_BYTES: Described = gauge(
    "whippet_slot_max_retained_bytes",
    &[],
    "source.stream.max_retained_wal. 0 where no log is followed.",
);
pub(super) const SLOT_SAFE_BYTES: Described = gauge(
    "whippet_slot_safe_bytes",
    &[],
    "What may still be written before the server gives the slot up (safe_wal_size); +Inf without a limit.",
);
pub(super) const SLOT_ACTIVE: Described = gauge("whippet_slot_active", &[], "1 while the slot is read.");
pub(super) const LEASES_HELD: Described = gauge(
    "whippet_leases_held",
    &["table"],
    "Buckets of a shared table that this relay has, or 1 for a table that \
     is not shared and is its own.",
);
pub(super) const GROUP_MEMBERS: Described =
    gauge("whippet_group_members", &[], "Relays that share the source, as far as it is known.");
pub(super) const MEMBERSHIP_EPOCH: Described =
    gauge("whippet_membership_epoch", &[], "The fencing number of this relay's membership. 0 without one.");
pub(super) const PARTS_MOVED: Described =
    counter("whippet_leases_moved_total", &[], "Buckets that this relay took or let go.");
pub(super) const MEMBERSHIPS_LOST: Described = counter(
    "whippet_memberships_lost_total",
    &[],
    "Times that the membership ran out before it was renewed.",
);
pub(super) const TAKEOVER: Described = histogram(
    "whippet_takeover_seconds",
    &[],
    "When work of a relay that is gone was taken over: the time since its last sign of life.",
);
pub(super) const TRANSACTIONS: Described = counter(
    "whippet_transactions_total",
    &["result"],
    "Exactly once: Kafka transactions that were ended, by result: committed, dropped (a refused event was alone in it), \
     unknown (no answer: the takeover that follows tells).",
);
pub(super) const TRANSACTION_COMMIT: Described = histogram(
    "whippet_transaction_commit_seconds",
    &[],
    "Exactly once: what ending a transaction took, from its position to the broker's answer.",
);
pub(super) const TRANSACTION_EVENTS: Described = histogram(
    "whippet_transaction_events",
    &[],
    "Exactly once: events of a transaction that was to be committed. Empty ones are not counted.",
);
pub(super) const UNIT_TAKEOVERS: Described = counter(
    "whippet_unit_takeovers_total",
    &[],
    "Exactly once: times that this relay became the one producer of its delivery unit: at its start, after a relay that \
     is gone, and after each transaction that failed.",
);
pub(super) const UNIT_FENCED: Described = counter(
    "whippet_unit_fenced_total",
    &[],
    "Exactly once: takeovers after another producer had fenced this relay's.",
);
pub(super) const LAST_PUBLISH: Described = gauge(
    "whippet_last_publish_timestamp_seconds",
    &["table"],
    "When Kafka last acknowledged an event of the table, since the Unix epoch.",
);
pub(super) const CONTEXT_DROPPED: Described = counter(
    "whippet_context_dropped_total",
    &["table", "reason"],
    "Headers of rows that were dropped, by reason.",
);
pub(super) const CONFIG_LAST_RELOAD_SUCCESS: Described = gauge(
    "whippet_config_last_reload_success",
    &[],
    "1 when the configuration in use is the one that was last read; 0 when that one was refused.",
);
pub(super) const BUILD_INFO: Described = gauge("whippet_build_info", &["version", "commit"], "Always 1.");
pub(super) const RESIDENT_BYTES: Described =
    gauge("whippet_resident_memory_bytes", &[], "Resident memory of this process (Linux, /proc/self/statm).");
pub(super) const INGEST_ACCEPTED: Described =
    counter("whippet_ingest_accepted_total", &[], "Events that came by HTTP and are on the disk.");
pub(super) const INGEST_REPEATED: Described = counter(
    "whippet_ingest_repeated_total",
    &[],
    "Events that came by HTTP with an id that was known, and were not taken again.",
);
pub(super) const INGEST_REFUSED: Described = counter(
    "whippet_ingest_refused_total",
    &["reason"],
    "Requests that were refused: bad, unauthorized, topic, too_large, slow, full (the spool), busy, disk, failed, \
     stopping.",
);
pub(super) const INGEST_ANSWER: Described = histogram(
    "whippet_ingest_answer_seconds",
    &[],
    "From the head of a request to its answer, of those answered with 202.",
);
pub(super) const INGEST_COMMIT: Described =
    histogram("whippet_ingest_commit_seconds", &[], "What a transaction of the spool took, with its fsync.");
pub(super) const INGEST_COMMIT_EVENTS: Described =
    histogram("whippet_ingest_commit_events", &[], "Events that a transaction of the spool had.");
pub(super) const INGEST_SPOOL_BYTES: Described =
    gauge("whippet_ingest_spool_bytes", &[], "What is in use of the spool. 0 without one.");
pub(super) const INGEST_SPOOL_MAX_BYTES: Described =
    gauge("whippet_ingest_spool_max_bytes", &[], "ingest.max_bytes. 0 without a spool.");
pub(super) const INGEST_REMEMBERED_IDS: Described = gauge(
    "whippet_ingest_remembered_ids",
    &[],
    "Ids of published events that are remembered, so that a repeat is known.",
);

/// Why ingest refuses a request.
pub const REFUSALS: [&str; 10] =
    ["bad", "unauthorized", "topic", "too_large", "slow", "full", "busy", "disk", "failed", "stopping"];

/// Every metric, in the order of the docs.
pub const ALL: [Described; 49] = [
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
    SLOT_MAX_RETAINED_BYTES,
    SLOT_SAFE_BYTES,
    SLOT_ACTIVE,
    LEASES_HELD,
    GROUP_MEMBERS,
    MEMBERSHIP_EPOCH,
    PARTS_MOVED,
    MEMBERSHIPS_LOST,
    TAKEOVER,
    TRANSACTIONS,
    TRANSACTION_COMMIT,
    TRANSACTION_EVENTS,
    UNIT_TAKEOVERS,
    UNIT_FENCED,
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
    pub(super) fn opts(&self) -> Opts {
        Opts::new(self.name, self.help)
    }
}

/// docs/metrics.md.
pub fn docs() -> String {
    let mut text = String::from(
        "# Metrics\n\nGenerated from `src/admin/metrics/described.rs` by `cargo test`; do not edit.\n\n\
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
