//! The statements about holds, pauses, replays and the audit log: parameters `$1`, `$2`; everything that differs
//! between the dialects is a field of [`Dialect`].

use super::{
    super::{OF_BUCKETS, TableSpec},
    RELEASED, SKIPPED,
};
use crate::config::Order;

/// What the dialects say differently.
pub(in crate::source::database) struct Dialect<'a> {
    /// Quoted name of one of the relay's own tables.
    pub own: &'a dyn Fn(&str) -> String,
    pub quoted: fn(&str) -> String,
    pub literal: fn(&str) -> String,
    /// The types that parameters are cast to.
    pub text: &'static str,
    pub bytes: &'static str,
    pub int: &'static str,
    /// Deletes what a condition on `h` is true for, of one table: the condition may look at the holds too.
    pub delete: fn(holds: &str, table: &str, condition: &str) -> String,
    /// How an INSERT ends that changes nothing where the row is there.
    pub or_nothing: &'static str,
    /// How an INSERT into the replays ends: what is there gets the new topic.
    pub or_topic: fn(replays: &str) -> String,
    /// Keeps the membership's row where it is until the transaction ends; where that can be said, it may be renewed.
    pub lock: &'static str,
    /// How keys are joined with what is held of them, and a hint behind the table that it is found by its key: the
    /// statistics of a table that has just filled say that it is empty.
    pub by_key: (&'static str, &'static str),
    /// `$4` is a part of the column.
    pub contains_4: fn(&str) -> String,
    /// A moment of a hold as RFC 3339 text, and as its age in seconds.
    pub moment: fn(&str) -> String,
    pub age: fn(&str) -> String,
    /// The outbox: its quoted name, its order column, that as text, and the type to compare it with.
    pub outbox: String,
    pub seq: String,
    pub seq_text: String,
    /// The text of a place as a value of the order column.
    pub as_seq: Box<dyn Fn(&str) -> String + 'a>,
    /// The order column, where it has integers.
    pub numbers: Option<String>,
    /// The condition that a column with the time of publishing is between `$3` and `$4`, in ms.
    pub between_3_4: fn(&str) -> String,
    /// Where released events go, if not into their table, which they never left.
    pub released: Option<String>,
    /// The column of the id, as text.
    pub id: String,
    /// The condition that the id is among `$5`.
    pub among_5: fn(&str) -> String,
    /// The condition that a row is published, where rows are kept.
    pub settled: Option<String>,
    /// Of a shared table: an expression of the bucket of a row `o`.
    pub bucket: Option<String>,
    /// Gives what is held the places that its rows have now.
    pub adopt: Vec<String>,
}

#[derive(Debug)]
pub(in crate::source::database) struct HoldsSql {
    pub fence: String,
    pub closed_keys: String,
    pub counts: String,
    pub held_topics: String,
    pub pauses: String,
    pub list: String,
    pub oldest_parked: String,
    /// `$1` to `$4`: id, key, topic, reason.
    pub count_redriven_keys: String,
    pub redrive: String,
    pub count_skipped_keys: String,
    pub skipped_places: String,
    pub skip: String,
    /// What is held behind nothing.
    pub release_orphans: String,
    /// `$1`: the topic.
    pub release_topic: String,
    pub release_store: String,
    /// `$1` to `$3`: scope, topic, key.
    pub pause: String,
    pub resume: String,
    pub release_paused: String,
    /// `$1` to `$6`: who, action, what, why, keys, events.
    pub audit: String,
    /// `$1` to `$6`: first and last sequence, first and last time, ids, topic. `None` where rows are
    /// not kept.
    pub replay: Option<String>,
    /// Whether a row has the time of its publishing.
    pub replays_by_time: bool,
    pub has_replays: String,
    /// Of a shared table: an expression of a row's bucket.
    pub bucket: Option<String>,
    pub make_gates: String,
    pub adopt: Vec<String>,
    pub replays_by_number: bool,
    pub version: String,
    pub bump: String,
    pub forget_replays: String,
}

impl HoldsSql {
    pub fn new(spec: &TableSpec, dialect: &Dialect<'_>) -> HoldsSql {
        let own = dialect.own;
        let (holds, pauses, replays) = (own("holds"), own("pauses"), own("replays"));
        let (members, gates, audit) = (own("members"), own("gates"), own("audit"));
        let (name, key) = ((dialect.literal)(&spec.name), (dialect.quoted)("key"));
        let Dialect { text, bytes, int, .. } = dialect;
        // Where rows are kept, what becomes of a hold is written down until their frontier has it.
        let kept = spec.is_kept();
        let of_table = |alias: &str| match kept {
            true => format!("{alias}.table_name = {name} AND {alias}.state IN ('parked', 'held')"),
            false => format!("{alias}.table_name = {name}"),
        };
        let matches = |alias: &str| {
            format!(
                "{mine} AND (CAST($1 AS {text}) IS NULL OR {alias}.event_id = $1) \
                 AND (CAST($2 AS {bytes}) IS NULL OR {alias}.key = $2) \
                 AND (CAST($3 AS {text}) IS NULL OR {alias}.topic = $3) \
                 AND (CAST($4 AS {text}) IS NULL OR {alias}.cause = $4 OR {part})",
                mine = of_table(alias),
                part = (dialect.contains_4)(&format!("{alias}.reason")),
            )
        };
        // A key is released as a whole: nothing of it may pass an earlier event. So is a table that is
        // one lane; an event without order goes alone.
        let chosen = format!("m.state = 'parked' AND {}", matches("m"));
        let (join, hint) = dialect.by_key;
        // The keys first, each once, and then what is held of them: looked at event by event, a key of many events would
        // be searched as often as it has any. A derived table is made once, whatever the planner thinks of the rest.
        let held_of = |keys: &str, and: &str| {
            format!(
                "SELECT b.place FROM ({keys}) lane {join} {holds} b{hint} \
                 ON b.table_name = {name} AND b.topic = lane.topic AND b.key = lane.key{and}"
            )
        };
        let lane = match spec.order {
            Order::Key => format!(
                "h.place IN (SELECT c.place FROM (SELECT m.place FROM {holds} m WHERE {chosen} AND m.key IS NULL \
                 UNION ALL {of_keys}) c)",
                of_keys = held_of(
                    &format!(
                        "SELECT DISTINCT m.topic, m.key FROM {holds} m WHERE {chosen} AND m.key IS NOT NULL"
                    ),
                    ""
                )
            ),
            Order::None => format!("h.place IN (SELECT m.place FROM {holds} m WHERE {chosen})"),
            Order::Table => format!("EXISTS (SELECT 1 FROM {holds} m WHERE {chosen})"),
        };
        let redriven = format!("{} AND h.state = 'parked' AND {lane}", of_table("h"));
        // What the others of its lane wait for.
        let head = format!("{} AND m.state = 'parked' AND m.cause <> 'behind'", of_table("m"));
        let orphans = match spec.order {
            Order::Table => format!("NOT EXISTS (SELECT 1 FROM {holds} m WHERE {head})"),
            Order::Key | Order::None => format!(
                "h.place IN (SELECT c.place FROM ({}) c)",
                held_of(
                    &format!(
                        "SELECT DISTINCT w.topic, w.key FROM (SELECT DISTINCT m.topic, m.key FROM {holds} m \
                         WHERE {} AND m.cause = 'behind') w WHERE NOT EXISTS (SELECT 1 FROM {holds} m{hint} \
                         WHERE {head} AND m.topic = w.topic AND m.key = w.key)",
                        of_table("m")
                    ),
                    " AND b.cause = 'behind'"
                )
            ),
        };
        let keys = |condition: &str| {
            format!(
                "SELECT count(*) FROM (SELECT DISTINCT h.topic, h.key FROM {holds} h WHERE {condition}) k"
            )
        };
        let of_scope = |alias: &str| {
            format!(
                "($1 = 'table' OR ($1 = 'topic' AND {alias}.topic = $2) \
                 OR ($1 = 'key' AND {alias}.key = $3 AND ($2 = '' OR {alias}.topic = $2)))"
            )
        };
        let release = |condition: String| {
            let delete = (dialect.delete)(&holds, &name, &condition);
            match &dialect.released {
                None if kept => format!("UPDATE {holds} AS h SET state = '{RELEASED}' WHERE {condition}"),
                None => delete,
                Some(released) => format!(
                    "WITH gone AS ({delete} RETURNING h.*) \
                     INSERT INTO {released} (table_name, place, at_ms, unread, cells) \
                     SELECT table_name, place, at_ms, unread, cells FROM gone"
                ),
            }
        };
        let keyed = if spec.order == Order::Table { "" } else { " AND h.key IS NOT NULL" };
        let published = match &spec.published_at {
            Some(column) => {
                let column = format!("o.{}", (dialect.quoted)(column));
                Some((format!("{column} IS NOT NULL"), (dialect.between_3_4)(&column)))
            }
            // By time is refused before: a kept row has none.
            None => dialect.settled.clone().map(|settled| (settled, format!("CAST($4 AS {int}) IS NULL"))),
        };
        let of_topic = if spec.order == Order::Table { "$1 <> ''" } else { "h.topic = $1" };
        HoldsSql {
            fence: format!("SELECT epoch FROM {members} WHERE epoch = $1{}", dialect.lock),
            closed_keys: format!(
                "SELECT DISTINCT h.topic, h.key, h.cause = 'store' FROM {holds} h \
                 WHERE {} AND (h.state = 'parked' OR h.cause = 'store'){keyed}",
                of_table("h")
            ),
            counts: format!(
                "SELECT h.cause, count(*) FROM {holds} h WHERE {} GROUP BY h.cause",
                of_table("h")
            ),
            held_topics: format!(
                "SELECT DISTINCT h.topic FROM {holds} h WHERE {} AND h.cause = 'topic'",
                of_table("h")
            ),
            pauses: format!("SELECT p.scope, p.topic, p.{key} FROM {pauses} p WHERE p.table_name = {name}"),
            list: format!(
                "SELECT h.place, h.event_id, h.topic, h.key, h.state, h.cause, h.reason, h.attempts, {moment}, \
                   {age} FROM {holds} h WHERE {matches} ORDER BY h.since, length(h.place), h.place LIMIT $5",
                moment = (dialect.moment)("h.since"),
                age = (dialect.age)("h.since"),
                matches = matches("h"),
            ),
            oldest_parked: format!(
                "SELECT {} FROM {holds} h WHERE {} AND h.state = 'parked'",
                (dialect.age)("min(h.since)"),
                of_table("h")
            ),
            count_redriven_keys: keys(&redriven),
            redrive: release(redriven.clone()),
            count_skipped_keys: keys(&matches("h")),
            skipped_places: format!("SELECT h.place FROM {holds} h WHERE {}", matches("h")),
            skip: match kept {
                true => format!("UPDATE {holds} AS h SET state = '{SKIPPED}' WHERE {}", matches("h")),
                false => (dialect.delete)(&holds, &name, &matches("h")),
            },
            release_orphans: release(format!("{} AND h.cause = 'behind' AND {orphans}", of_table("h"))),
            release_topic: release(format!("{} AND h.cause = 'topic' AND {of_topic}", of_table("h"))),
            release_store: release(format!("{} AND h.cause = 'store'", of_table("h"))),
            pause: format!(
                "INSERT INTO {pauses} (table_name, scope, topic, {key}) VALUES ({name}, $1, $2, $3) {}",
                dialect.or_nothing
            ),
            resume: format!(
                "DELETE FROM {pauses} WHERE table_name = {name} AND scope = $1 AND topic = $2 AND {key} = $3"
            ),
            release_paused: release(format!(
                "{} AND h.cause = 'paused' AND {}",
                of_table("h"),
                of_scope("h")
            )),
            audit: format!(
                "INSERT INTO {audit} (who, action, table_name, what, why, {}, events) \
                 VALUES ($1, $2, {name}, $3, $4, $5, $6)",
                (dialect.quoted)("keys")
            ),
            replays_by_time: spec.published_at.is_some(),
            replay: published.map(|(published, times)| {
                let numbers = match &dialect.numbers {
                    Some(number) => format!("{number} BETWEEN $1 AND $2"),
                    // Refused before: there is no order column.
                    None => format!("CAST($2 AS {int}) IS NULL"),
                };
                format!(
                    "INSERT INTO {replays} (table_name, place, topic) \
                     SELECT {name}, {seq}, CAST($6 AS {text}) FROM {outbox} o WHERE {published} \
                       AND (CAST($1 AS {int}) IS NULL OR {numbers}) \
                       AND (CAST($3 AS {int}) IS NULL OR {times}) AND {ids} {or_topic}",
                    or_topic = (dialect.or_topic)(&replays),
                    seq = dialect.seq_text,
                    outbox = dialect.outbox,
                    ids = (dialect.among_5)(&dialect.id),
                )
            }),
            bucket: dialect.bucket.clone(),
            adopt: dialect.adopt.clone(),
            replays_by_number: dialect.numbers.is_some(),
            make_gates: format!(
                "INSERT INTO {gates} (table_name, version) VALUES ({name}, 0) {}",
                dialect.or_nothing
            ),
            version: format!("SELECT version FROM {gates} WHERE table_name = {name}"),
            bump: format!("UPDATE {gates} SET version = version + 1 WHERE table_name = {name}"),
            has_replays: format!("SELECT count(*) FROM {replays} WHERE table_name = {name}"),
            // Those whose row is gone.
            forget_replays: format!(
                "DELETE FROM {replays} WHERE table_name = {name} AND NOT EXISTS ( \
                   SELECT 1 FROM {outbox} o WHERE o.{seq} = {place})",
                outbox = dialect.outbox,
                seq = dialect.seq,
                place = (dialect.as_seq)(&format!("{replays}.place")),
            ),
        }
    }

    /// Reads one row by the text of its place, `$1`, with its payload if that has `$2` bytes at most.
    pub fn read_one(dialect: &Dialect<'_>, columns: &str) -> String {
        format!(
            "SELECT {columns} FROM {outbox} o WHERE o.{seq} = {place}",
            outbox = dialect.outbox,
            seq = dialect.seq,
            place = (dialect.as_seq)(&format!("CAST($1 AS {})", dialect.text)),
        )
    }

    /// Reads the rows that are to be replayed: `$1` rows at most, and `$2` the longest payload that comes
    /// along. `columns` are those of every read.
    pub fn read_replays(spec: &TableSpec, dialect: &Dialect<'_>, columns: &str) -> String {
        let replays = (dialect.own)("replays");
        format!(
            "SELECT {columns}, r.topic, {requested} FROM {replays} r \
             JOIN {outbox} o ON o.{seq} = {place} \
             WHERE r.table_name = {name}{OF_BUCKETS} ORDER BY o.{seq} LIMIT $1",
            requested = (dialect.moment)("r.requested"),
            outbox = dialect.outbox,
            seq = dialect.seq,
            place = (dialect.as_seq)("r.place"),
            name = (dialect.literal)(&spec.name),
        )
    }
}

/// What becomes of a hold that is there already: one that was released may be held again.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(in crate::source::database) fn hold_again(spec: &TableSpec) -> String {
    match spec.is_kept() {
        false => "NOTHING".into(),
        true => format!(
            "UPDATE SET topic = excluded.topic, key = excluded.key, state = excluded.state, \
               cause = excluded.cause, reason = excluded.reason, attempts = excluded.attempts \
             WHERE h.state = '{RELEASED}'"
        ),
    }
}

/// What the dialects say alike that take an alias and the table itself in a DELETE.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(in crate::source::database) fn delete(holds: &str, _table: &str, condition: &str) -> String {
    format!("DELETE FROM {holds} AS h WHERE {condition}")
}

#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(in crate::source::database) const OR_NOTHING: &str = "ON CONFLICT DO NOTHING";

#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(in crate::source::database) fn or_topic(_replays: &str) -> String {
    "ON CONFLICT (table_name, place) DO UPDATE SET topic = excluded.topic".into()
}
