//! A word for the options that nobody took.

use super::{Notes, Options};

/// Options that mean nothing here and need nothing, by the beginning of their name; `$` ends one.
const IDLE: [&str; 58] = [
    "name$",
    "tasks.max",
    "topic.prefix$",
    "database.server.name$",
    "topic.naming.strategy$",
    "topic.delimiter$",
    "topic.cache.size$",
    "topic.heartbeat.prefix$",
    "heartbeat.topics.prefix$",
    "heartbeat.action.query$",
    "slot.stream.params$",
    "slot.max.retries$",
    "slot.retry.delay.ms$",
    "slot.failover$",
    "status.update.interval.ms$",
    "xmin.fetch.interval.ms$",
    "publish.via.partition.root$",
    "snapshot.",
    "incremental.snapshot.",
    "max.batch.size$",
    "max.queue.size",
    "poll.interval.ms$",
    "tombstones.on.delete$",
    "skipped.operations$",
    "include.schema.c",
    "include.unknown.datatypes$",
    "provide.transaction.metadata$",
    "decimal.handling.mode$",
    "time.precision.mode$",
    "hstore.handling.mode$",
    "interval.handling.mode$",
    "bigint.unsigned.handling.mode$",
    "schema.name.adjustment.mode$",
    "field.name.adjustment.mode$",
    "schema.refresh.mode$",
    "read.only$",
    "streaming.delay.ms$",
    "retriable.restart.connector.wait.ms$",
    "errors.max.retries$",
    "errors.retry.",
    "errors.log.",
    "database.tcpKeepAlive$",
    "connect.",
    "schema.history.internal",
    "database.history",
    "offset.",
    "custom.metric.tags$",
    "flush.lsn.source$",
    "gtid.",
    "enable.time.adjuster$",
    "inconsistent.schema.handling.mode$",
    "min.row.count.to.stream.results$",
    "query.fetch.size$",
    "table.ignore.builtin$",
    "executor.",
    "internal.",
    "quarkus.",
    "datatype.propagate.source.type$",
];

/// Options that have no equal, by the beginning of their name, and what to do.
const NO_EQUAL: [(&str, &str); 21] = [
    ("predicates", "no equal: only the tables that are named here are read, and each is an outbox"),
    ("converters", "no equal: a payload goes out as the database returns it"),
    ("binary.handling.mode", "no equal: bytes go out untouched, and not as text"),
    (
        "errors.tolerance",
        "no equal: an event that cannot be published parks its key; on_failure has other answers",
    ),
    ("errors.deadletterqueue", "no equal: see on_failure: dead_letter"),
    ("event.processing.failure.handling.mode", "no equal: what cannot be read parks its key, see on_failure"),
    ("exactly.once.support", "no equal: delivery is at least once, with the same header id on every repeat"),
    ("signal.", "no equal: whippet pause, resume and replay do by hand what signals did"),
    ("notification.", "no equal: see /status and the metrics"),
    ("message.key.columns", "no equal: the key is columns.key, or the template tables[].key"),
    ("column.include.list", "no equal: only the columns that are mapped here are read"),
    ("column.exclude.list", "no equal: only the columns that are mapped here are read"),
    ("column.", "no equal: values go out as they are. What must not go out has to be kept out of the outbox"),
    ("schema.include.list", "no equal: the tables are named"),
    ("schema.exclude.list", "no equal: the tables are named"),
    ("database.include.list", "no equal: the tables are named"),
    ("database.exclude.list", "no equal: the tables are named"),
    ("table.exclude.list", "no equal: the tables are named"),
    ("database.initial.statements", "no equal: set it for the role in the database"),
    ("database.connectionTimeZone", "no equal: times without a zone are taken for UTC"),
    ("debezium.sink.", "no equal: events go to Kafka"),
];

pub fn explain(options: &Options, notes: &mut Notes) {
    for name in options.names() {
        let is = |pattern: &str| match pattern.strip_suffix('$') {
            Some(whole) => name == whole,
            None => name.starts_with(pattern),
        };
        if name == "debezium.sink.type" || IDLE.iter().any(|pattern| is(pattern)) {
            notes.idle.push(name.to_owned());
        } else if let Some((_, says)) = NO_EQUAL.iter().find(|(pattern, _)| is(pattern)) {
            notes.add(name, *says);
        } else {
            notes.add(name, "not understood, and left out");
        }
    }
}
