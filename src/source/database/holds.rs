//! The statements about holds, pauses, replays and the audit log, as all dialects take them:
//! parameters `$1`, `$2`; everything that differs is a field of [`Dialect`].
//!
//! One relay changes a table's holds, and that only in transactions that begin with
//! [`HoldsSql::fence`]: an owner that lost its lease changes nothing.

use super::{OF_BUCKETS, TableSpec};
use crate::{config::Order, source::hold::Scope};

pub(super) const APPLY: &str = "carry out an operator's verb";
/// Parked keys that one piece of their list has.
pub(super) const KEYS_AT_ONCE: usize = 2_000;
/// A payload above this is not shown, in bytes.
pub(super) const SHOWN_AT_MOST: i16 = 32_000;
/// States of a hold of a kept row which is one no more: the row is to be read again, or is settled.
pub(super) const RELEASED: &str = "released";
pub(super) const SKIPPED: &str = "skipped";
/// The columns that every read has before those of the event: place, timestamp, payload length.
pub(super) const FIXED: usize = 3;

/// A scope as the words of its row.
pub(super) fn words_of(scope: &Scope) -> (&'static str, &str, &[u8]) {
    match scope {
        Scope::Table => ("table", "", b""),
        Scope::Topic(topic) => ("topic", topic, b""),
        Scope::Key { topic, key } => ("key", topic.as_deref().unwrap_or_default(), key),
    }
}

pub(super) fn scope_of(word: &str, topic: String, key: Vec<u8>) -> Scope {
    match word {
        "topic" => Scope::Topic(topic),
        "key" => Scope::Key { topic: Some(topic).filter(|topic| !topic.is_empty()), key },
        _ => Scope::Table,
    }
}

/// What becomes of a hold that is there already: one that was released may be held again.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(super) fn hold_again(spec: &TableSpec) -> String {
    match spec.is_kept() {
        false => "NOTHING".into(),
        true => format!(
            "UPDATE SET topic = excluded.topic, key = excluded.key, state = excluded.state, \
               cause = excluded.cause, reason = excluded.reason, attempts = excluded.attempts \
             WHERE h.state = '{RELEASED}'"
        ),
    }
}

/// What the dialects say differently.
pub(super) struct Dialect<'a> {
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
    /// Keeps the membership's row as it is until the transaction ends.
    pub lock: &'static str,
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
    pub place_is_int: bool,
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
}

#[derive(Debug)]
pub(super) struct HoldsSql {
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
        let lane = match spec.order {
            Order::Key => format!(
                "(h.place IN (SELECT m.place FROM {holds} m WHERE {chosen}) OR (h.key IS NOT NULL AND EXISTS \
                 (SELECT 1 FROM {holds} m WHERE m.topic = h.topic AND m.key = h.key AND {chosen})))"
            ),
            Order::None => format!("h.place IN (SELECT m.place FROM {holds} m WHERE {chosen})"),
            Order::Table => format!("EXISTS (SELECT 1 FROM {holds} m WHERE {chosen})"),
        };
        let redriven = format!("{} AND h.state = 'parked' AND {lane}", of_table("h"));
        let same_lane = match spec.order {
            Order::Table => "",
            Order::Key | Order::None => " AND m.topic = h.topic AND m.key = h.key",
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
            release_orphans: release(format!(
                "{} AND h.cause = 'behind' AND NOT EXISTS ( \
                   SELECT 1 FROM {holds} m WHERE {} AND m.state = 'parked' AND m.cause <> 'behind'{same_lane})",
                of_table("h"),
                of_table("m"),
            )),
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
                let numbers = match dialect.place_is_int {
                    true => format!("o.{} BETWEEN $1 AND $2", dialect.seq),
                    // Refused before: there is no order column.
                    false => format!("CAST($2 AS {int}) IS NULL"),
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

/// The same, of dialects that take an alias and the table itself in a DELETE.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(super) fn delete(holds: &str, _table: &str, condition: &str) -> String {
    format!("DELETE FROM {holds} AS h WHERE {condition}")
}

#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(super) const OR_NOTHING: &str = "ON CONFLICT DO NOTHING";

#[cfg(any(feature = "postgres", feature = "sqlite"))]
pub(super) fn or_topic(_replays: &str) -> String {
    "ON CONFLICT (table_name, place) DO UPDATE SET topic = excluded.topic".into()
}

/// Binds what a filter asks for as `$1` to `$4`.
macro_rules! matching {
    ($query:expr, $filter:expr) => {
        $query
            .bind($filter.id.as_deref())
            .bind($filter.key.as_deref())
            .bind($filter.topic.as_deref())
            .bind($filter.reason.as_deref())
    };
}

/// Rows that a statement changed.
macro_rules! execute {
    ($tx:expr, $sql:expr $(, $value:expr)*) => {
        sql::query(AssertSqlSafe($sql.as_str()))
            $(.bind($value))*
            .execute(&mut *$tx)
            .await
            .map_err(Error::sql(APPLY))?
            .rows_affected()
    };
}

macro_rules! execute_matching {
    ($tx:expr, $sql:expr, $filter:expr) => {
        matching!(sql::query(AssertSqlSafe($sql.as_str())), $filter)
            .execute(&mut *$tx)
            .await
            .map_err(Error::sql(APPLY))?
            .rows_affected()
    };
}

macro_rules! count {
    ($tx:expr, $sql:expr, $filter:expr) => {{
        let count: i64 = matching!(sql::query_scalar(AssertSqlSafe($sql.as_str())), $filter)
            .fetch_one(&mut *$tx)
            .await
            .map_err(Error::sql(APPLY))?;
        count.unsigned_abs()
    }};
}
pub(super) use {count, execute, execute_matching, matching};

/// What an outbox does with holds: the same calls in all dialects, on different types. Where it is used,
/// `sql` is the driver.
macro_rules! hold_methods {
    (transaction: $tx:ty, row: $row:ty, error: $error:ty, begin: $begin:path, inline: $inline:ty, ids: $ids:path) => {
        impl Outbox {
            /// Hands the closed keys to `piece`, some at a time, then returns the rest of the gates.
            pub async fn gates<F: Future<Output = ()>>(
                &self,
                mut piece: impl FnMut(Vec<ClosedKey>) -> F,
            ) -> Result<Listed, Error> {
                let read = || Error::sql("read what is held");
                // Before the list: what changes meanwhile is no part of it.
                sql::query(AssertSqlSafe(self.holds.make_gates.as_str()))
                    .execute(&self.pool)
                    .await
                    .map_err(read())?;
                let version: i64 = sql::query_scalar(AssertSqlSafe(self.holds.version.as_str()))
                    .fetch_one(&self.pool)
                    .await
                    .map_err(read())?;
                {
                    let mut rows = sql::query_as(AssertSqlSafe(self.holds.closed_keys.as_str())).fetch(&self.pool);
                    let mut keys: Vec<ClosedKey> = Vec::new();
                    while let Some(key) =
                        answered("read what is held", async { rows.try_next().await.map_err(read()) }).await?
                    {
                        keys.push(key);
                        if keys.len() == KEYS_AT_ONCE {
                            piece(std::mem::take(&mut keys)).await;
                        }
                    }
                    piece(keys).await;
                }
                let mut held = Counts::default();
                let counts: Vec<(String, i64)> = sql::query_as(AssertSqlSafe(self.holds.counts.as_str()))
                    .fetch_all(&self.pool)
                    .await
                    .map_err(read())?;
                for (cause, events) in counts {
                    held.add(Counts::named(&cause, events.unsigned_abs()));
                }
                let topics = sql::query_scalar(AssertSqlSafe(self.holds.held_topics.as_str()))
                    .fetch_all(&self.pool)
                    .await
                    .map_err(read())?;
                let paused: Vec<(String, String, Vec<u8>)> = sql::query_as(AssertSqlSafe(self.holds.pauses.as_str()))
                    .fetch_all(&self.pool)
                    .await
                    .map_err(read())?;
                let paused = paused.into_iter().map(|(scope, topic, key)| scope_of(&scope, topic, key)).collect();
                let replays: i64 = sql::query_scalar(AssertSqlSafe(self.holds.has_replays.as_str()))
                    .fetch_one(&self.pool)
                    .await
                    .map_err(read())?;
                let gates = Gates { paused, topics, held };
                Ok(Listed { gates, replays: replays.unsigned_abs(), version })
            }

            /// Held events, the oldest first.
            pub async fn list(&self, filter: &Filter, limit: i64) -> Result<Vec<Held>, Error> {
                let rows = matching!(sql::query(AssertSqlSafe(self.holds.list.as_str())), filter)
                    .bind(limit)
                    .fetch_all(&self.pool)
                    .await
                    .map_err(Error::sql("list what is held"))?;
                rows.iter().map(|row| self.held(row)).collect::<Result<_, _>>().map_err(Error::sql("list what is held"))
            }

            fn held(&self, row: &$row) -> Result<Held, $error> {
                let (key, key_hex) = key_for_people(row.try_get(3)?);
                Ok(Held {
                    table: self.name.clone(),
                    place: row.try_get(0)?,
                    id: row.try_get(1)?,
                    topic: row.try_get(2)?,
                    key,
                    key_hex,
                    state: row.try_get(4)?,
                    cause: row.try_get(5)?,
                    reason: row.try_get(6)?,
                    attempts: row.try_get(7)?,
                    since: row.try_get(8)?,
                    age_seconds: row.try_get(9)?,
                    payload: None,
                })
            }

            /// How long the oldest parked event has been parked, in seconds.
            pub async fn oldest_parked(&self) -> Result<Option<f64>, Error> {
                sql::query_scalar(AssertSqlSafe(self.holds.oldest_parked.as_str()))
                    .fetch_one(&self.pool)
                    .await
                    .map_err(Error::sql("look for the oldest parked event"))
            }

            /// Releases what is held for a trouble that is over, if the lease is still of this epoch.
            pub async fn release(&self, over: &Over, epoch: i64) -> Result<u64, Error> {
                let doing = "release what was held";
                let mut tx = self.fenced(epoch, doing).await?;
                execute!(tx, &self.holds.bump);
                let release = match over {
                    Over::Topic(topic) => {
                        sql::query(AssertSqlSafe(self.holds.release_topic.as_str())).bind(topic.as_str())
                    }
                    Over::Store => sql::query(AssertSqlSafe(self.holds.release_store.as_str())),
                };
                let done = release.execute(&mut *tx).await.map_err(Error::sql(doing))?;
                tx.commit().await.map_err(Error::sql(doing))?;
                Ok(done.rows_affected())
            }

            /// Carries out a verb with its line in the audit log, in one transaction, if the lease is still of
            /// this epoch. A dry run is rolled back.
            pub async fn apply(&self, request: &Request, epoch: i64) -> Result<Outcome, Error> {
                let mut tx = self.fenced(epoch, APPLY).await?;
                execute!(tx, &self.holds.bump);
                let outcome = match &request.verb {
                    Verb::Pause(scope) | Verb::Resume(scope) => {
                        let (word, topic, key) = words_of(scope);
                        let pausing = matches!(request.verb, Verb::Pause(_));
                        let sql = if pausing { &self.holds.pause } else { &self.holds.resume };
                        let changed = execute!(tx, sql, word, topic, key);
                        let events = match pausing {
                            true => 0,
                            false => execute!(tx, &self.holds.release_paused, word, topic, key),
                        };
                        Outcome { keys: changed, events }
                    }
                    Verb::Redrive(filter) => {
                        let keys = count!(tx, &self.holds.count_redriven_keys, filter);
                        let events = execute_matching!(tx, &self.holds.redrive, filter);
                        Outcome { keys, events }
                    }
                    Verb::Skip(filter) => {
                        let keys = count!(tx, &self.holds.count_skipped_keys, filter);
                        let places: Vec<String> =
                            matching!(sql::query_scalar(AssertSqlSafe(self.holds.skipped_places.as_str())), filter)
                                .fetch_all(&mut *tx)
                                .await
                                .map_err(Error::sql(APPLY))?;
                        self.settle_in(&mut tx, &places, epoch).await?;
                        let events = execute_matching!(tx, &self.holds.skip, filter);
                        execute!(tx, &self.holds.release_orphans);
                        Outcome { keys, events }
                    }
                    Verb::Replay(replay) => {
                        let Some(sql) = &self.holds.replay else {
                            return Err(Error::Setup(
                                "this table does not keep what is published: replay needs after_publish: mark or keep".into(),
                            ));
                        };
                        if replay.times.is_some() && !self.holds.replays_by_time {
                            return Err(Error::Setup(
                                "kept rows do not have the time of their publishing: give numbers or ids".into(),
                            ));
                        }
                        if replay.sequences.is_some() && !self.place_is_int {
                        return Err(Error::Setup("this table has no order column: give ids, or times".into()));
                    }
                    let (sequences, times) = (replay.sequences.unzip(), replay.times.unzip());
                        let done = sql::query(AssertSqlSafe(sql.as_str()))
                            .bind(sequences.0)
                            .bind(sequences.1)
                            .bind(times.0)
                            .bind(times.1)
                            .bind($ids(&replay.ids))
                            .bind(replay.topic.as_deref())
                            .execute(&mut *tx)
                            .await
                            .map_err(Error::sql(APPLY))?;
                        Outcome { keys: 0, events: done.rows_affected() }
                    }
                };
                if request.dry_run {
                    tx.rollback().await.map_err(Error::sql(APPLY))?;
                    return Ok(outcome);
                }
                sql::query(AssertSqlSafe(self.holds.audit.as_str()))
                    .bind(request.who.as_str())
                    .bind(request.verb.name())
                    .bind(request.verb.describe())
                    .bind(request.why.as_deref())
                    .bind(outcome.keys.cast_signed())
                    .bind(outcome.events.cast_signed())
                    .execute(&mut *tx)
                    .await
                    .map_err(Error::sql("write the audit log"))?;
                fail::fail_point!("mid-redrive", |_| std::process::abort());
                tx.commit().await.map_err(Error::sql(APPLY))?;
                fail::fail_point!("redriven", |_| std::process::abort());
                Ok(outcome)
            }

            /// The payload of a row for a person to read.
        pub async fn payload_text(&self, place: &str) -> Result<String, Error> {
            let Some(found) = self.one(place).await? else { return Ok("(the row is gone)".into()) };
            if let Some(bytes) = found.deferred_bytes.or(found.event.unread_bytes) {
                return Ok(format!("({bytes} bytes: too large to be shown)"));
            }
            let payload = self.payload_index.and_then(|index| found.event.row.get(index));
            let (text, hex) = key_for_people(payload.map(<[u8]>::to_vec));
            Ok(hex.map(|hex| format!("0x{hex}")).or(text).unwrap_or_else(|| "(NULL)".into()))
        }

        /// A row by the text of its place, without its payload if that is large; `None` where it is gone.
        pub async fn one(&self, place: &str) -> Result<Option<Found>, Error> {
            let doing = "read a row";
            let row = sql::query(AssertSqlSafe(self.read_one.as_str()))
                .bind(place)
                .bind(<$inline>::from(SHOWN_AT_MOST))
                .fetch_optional(&self.pool)
                .await
                .map_err(Error::sql(doing))?;
            row.map(|row| self.decode(&row).map_err(Error::sql(doing))).transpose()
        }

        /// Published rows that are to be published again, in order. Forgets those that are gone.
            pub async fn replays(&self, limits: Limits, buckets: Option<&[u16]>) -> Result<Vec<Found>, Error> {
                let doing = "read what is to be replayed";
                let text = self.of_buckets(&self.read_replays, buckets);
                let rows = sql::query(AssertSqlSafe(&*text))
                    .bind(i64::try_from(limits.rows).unwrap_or(i64::MAX))
                    .bind(<$inline>::try_from(limits.inline_bytes).unwrap_or(<$inline>::MAX))
                    .fetch_all(&self.pool)
                    .await
                    .map_err(Error::sql(doing))?;
                if rows.is_empty() {
                    sql::query(AssertSqlSafe(self.holds.forget_replays.as_str()))
                        .execute(&self.pool)
                        .await
                        .map_err(Error::sql(doing))?;
                }
                let found = |row: &$row| -> Result<Found, $error> {
                    let mut found = self.decode(row)?;
                    let replay = Replay { topic: row.try_get(FIXED + self.columns)?, requested: row.try_get(FIXED + self.columns + 1)? };
                    found.event.replay = Some(Box::new(replay));
                    Ok(found)
                };
                rows.iter().map(found).collect::<Result<_, _>>().map_err(Error::sql(doing))
            }

            /// A statement about these buckets only, if not about all.
            pub(super) fn of_buckets<'a>(&self, statement: &'a str, buckets: Option<&[u16]>) -> Cow<'a, str> {
                match (&self.holds.bucket, buckets) {
                    (Some(bucket), Some(buckets)) => Cow::Owned(of_buckets(statement, bucket, buckets)),
                    _ => Cow::Borrowed(statement),
                }
            }

            /// A transaction in which the lease is, and stays, of this epoch.
            pub(super) async fn fenced(&self, epoch: i64, doing: &'static str) -> Result<$tx, Error> {
                let mut tx = $begin(&self.pool).await.map_err(Error::sql(doing))?;
                let current: Option<i64> = sql::query_scalar(AssertSqlSafe(self.holds.fence.as_str()))
                    .bind(epoch)
                    .fetch_optional(&mut *tx)
                    .await
                    .map_err(Error::sql(doing))?;
                if current == Some(epoch) { Ok(tx) } else { Err(Error::Fenced(epoch)) }
            }
        }
    };
}
pub(super) use hold_methods;
