//! One outbox table: its statements, made once, and what they bring.

use std::{fmt::Write as _, time::Duration};

use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, Connection as _, Row as _,
    postgres::{PgPool, PgRow},
};

use super::{
    super::{
        BACKLOG_CAP, Backlog, EXPIRED_AT_ONCE, Error, Found, Limits, OF_BUCKETS, Reach, TableSpec,
        holds::{FIXED, HoldsSql, hold_again},
        literal, quoted, quoted_table,
    },
    Postgres,
    holds::{dialect, own},
    kept::{self, KeptSql, Parts},
};
use crate::{
    config::AfterPublish,
    event::{Event, Place, Row},
    source::Hold,
};

/// Seconds from the Unix epoch to PostgreSQL's, 2000-01-01 (src/include/datatype/timestamp.h).
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

/// How the timestamp column comes over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    None,
    /// `timestamptz` in binary: microseconds since 2000-01-01.
    Timestamp,
    /// An integer column: milliseconds since the Unix epoch.
    Millis,
}

#[derive(Debug)]
pub struct Outbox {
    pub(super) name: String,
    pub(super) pool: PgPool,
    pub(super) holds: HoldsSql,
    pub(super) read_replays: String,
    pub(super) read_one: String,
    pub(super) place_is_int: bool,
    pub(super) clock: Clock,
    pub(super) columns: usize,
    pub(super) payload_index: Option<usize>,
    pub(super) max_payload: u64,
    pub(super) lock_oid: i64,
    /// Whether held events are found in their table; else their content is held with them.
    pub(super) stays: bool,
    pub(super) held_from: String,
    /// Where rows stay when they are published.
    pub(super) kept: Option<KeptSql>,
    pub(super) sql: Sql,
}

/// The statements of one table.
#[derive(Debug)]
pub(super) struct Sql {
    pub(super) read: String,
    pub(super) read_skipping_held: String,
    pub(super) payload: String,
    pub(super) record: String,
    pub(super) replayed: String,
    pub(super) hold: String,
    pub(super) expire: String,
    pub(super) epoch: String,
    pub(super) writers: &'static str,
    pub(super) backlog: String,
}

impl Outbox {
    pub fn new(
        db: &Postgres,
        spec: &TableSpec,
        columns: &[(String, String)],
        lock_oid: i64,
    ) -> Result<Outbox, Error> {
        let type_of =
            |name: &str| columns.iter().find(|(column, _)| column == name).map(|(_, kind)| kind.as_str());
        spec.check(columns)?;
        let place = spec.sequence.as_ref().unwrap_or(&spec.id);
        // By these names a type without its length has one of 1.
        let place_type = match type_of(place).unwrap_or("text") {
            "character" => "bpchar",
            "bit" => "\"bit\"",
            other => other,
        };
        let place_type = place_type.to_owned();
        let place_is_int = matches!(place_type.as_str(), "bigint" | "integer" | "smallint");
        spec.check_kept(place, &place_type, place_is_int)?;

        let timestamp = spec.timestamps.iter().find(|name| type_of(name).is_some());
        let (clock, timestamp) = match timestamp.map(|name| (type_of(name), quoted(name))) {
            None => (Clock::None, "NULL::text".to_owned()),
            Some((Some("bigint" | "integer"), name)) => (Clock::Millis, format!("o.{name}::bigint")),
            Some((_, name)) => (Clock::Timestamp, format!("o.{name}::timestamptz")),
        };

        let select = |name: &String| match type_of(name) {
            None => "NULL::text".to_owned(),
            Some("bytea" | "text" | "character varying" | "json" | "xml") => format!("o.{}", quoted(name)),
            Some(_) => format!("o.{}::text", quoted(name)),
        };
        let payload = quoted(&spec.payload);
        let length = match type_of(&spec.payload) {
            Some("bytea" | "text" | "character varying") => format!("octet_length(o.{payload})"),
            _ => format!("octet_length(o.{payload}::text)"),
        };
        let mut cells = Vec::new();
        for name in &spec.columns {
            let cell = select(name);
            if *name == spec.payload {
                // `$5`: the longest payload that comes along.
                cells.push(format!("CASE WHEN {length} <= $5 THEN {cell} END"));
            } else {
                cells.push(cell);
            }
        }
        let place_cell = if place_is_int {
            format!("o.{}::bigint", quoted(place))
        } else {
            format!("o.{}::text", quoted(place))
        };
        let list = format!("{place_cell}, {timestamp}, {length}, {}", cells.join(", "));

        let table = quoted_table(&spec.name);
        let seq = quoted(place);
        let pending = match (&spec.after_publish, &spec.published_at) {
            (AfterPublish::Mark, Some(column)) => format!(" AND o.{} IS NULL", quoted(column)),
            _ => String::new(),
        };
        let schema = quoted(&db.schema);
        let name = literal(&spec.name);
        let unheld = format!(
            " AND NOT EXISTS (SELECT FROM {schema}.holds h \
              WHERE h.table_name = {name} AND h.place = o.{seq}::text)"
        );
        let read = |unheld: &str| {
            if place_is_int {
                // Late commits first, then the tail: one statement, one snapshot. When the late rows
                // alone fill the read, no row of the tail may come yet.
                format!(
                    "WITH late AS MATERIALIZED ( \
                       SELECT o.{seq}::bigint AS seq FROM {table} o \
                       WHERE o.{seq} > $1 AND o.{seq} <= $2{pending}{unheld}{OF_BUCKETS} \
                         AND NOT (SELECT $3::text::int8multirange) @> o.{seq}::bigint \
                       ORDER BY 1 LIMIT $4) \
                     SELECT x.* FROM late, LATERAL ( \
                       SELECT {list} FROM {table} o WHERE o.{seq} = late.seq LIMIT 1) x \
                     UNION ALL \
                     (SELECT {list} FROM {table} o \
                      WHERE o.{seq} > $2{pending}{unheld}{OF_BUCKETS} \
                        AND (SELECT count(*) FROM late) < $4 \
                      ORDER BY o.{seq} LIMIT $4)"
                )
            } else {
                // No number to go by: every read starts at the head and leaves out what is known.
                let order = match &spec.sequence {
                    Some(_) => format!(" ORDER BY o.{seq}"),
                    None => String::new(),
                };
                format!(
                    "SELECT {list} FROM {table} o \
                     WHERE $1::bigint IS NOT NULL AND $2::bigint IS NOT NULL \
                       AND NOT (o.{seq} = ANY($3::text[]::{place_type}[])){pending}{unheld}{OF_BUCKETS}{order} \
                     LIMIT $4"
                )
            }
        };
        let places = if place_is_int {
            "ANY(ARRAY(SELECT generate_series(lower(r), coalesce(upper(r) - 1, 9223372036854775807)) \
             FROM unnest($1::text::int8multirange) r))"
                .to_owned()
        } else {
            format!("ANY($1::text[]::{place_type}[])")
        };
        let fence = format!("EXISTS (SELECT FROM {schema}.members m WHERE m.epoch = $2)");
        let record = match (&spec.after_publish, &spec.published_at) {
            (AfterPublish::Mark, Some(column)) => format!(
                "UPDATE {table} o SET {} = now() WHERE o.{seq} = {places}{pending} AND {fence}",
                quoted(column)
            ),
            _ => format!("DELETE FROM {table} o WHERE o.{seq} = {places} AND {fence}"),
        };
        let bucket = spec.shared.as_ref().map(|shared| {
            let column = |name: &str| match type_of(name) {
                None => None,
                Some("bytea") => Some(format!("encode(o.{}, 'hex')", quoted(name))),
                Some(_) => Some(format!("o.{}::text", quoted(name))),
            };
            let id = column(&spec.id).unwrap_or_else(|| "''".into());
            let hashed = shared.hashed(id, literal, column, |pieces| format!("({})", pieces.join(" || ")));
            let n = shared.buckets;
            format!("mod(mod(hashtextextended({hashed}, 0), {n}) + {n}, {n})")
        });
        // A verb by way of another relay changes the gates first: either it waits for the hold, or the hold for
        // it, and is refused.
        let (known_gates, if_known) = match spec.shared {
            Some(_) => (
                format!(
                    "WITH known AS MATERIALIZED (SELECT FROM {schema}.gates \
                       WHERE table_name = {name} AND version = $10 FOR SHARE) "
                ),
                " AND EXISTS (SELECT FROM known)",
            ),
            None => (String::new(), ""),
        };
        let oldest = match clock {
            Clock::None => "NULL::timestamptz".to_owned(),
            Clock::Timestamp => timestamp.clone(),
            Clock::Millis => format!("to_timestamp({timestamp} / 1000.0)"),
        };
        let age = format!("extract(epoch FROM clock_timestamp() - {oldest})::float8");
        let kept = spec.tx.as_ref().map(|tx| {
            let (schema, fence) = (schema.as_str(), fence.as_str());
            // The longest payload that comes along is the seventh parameter there.
            let list = list.replace("$5", "$7");
            KeptSql::new(&Parts { spec, schema, seq: &seq, list: &list, age: &age, fence }, tx)
        });
        let settled = spec.tx.as_ref().map(|tx| kept::settled(&schema, spec, &quoted(tx), &seq));
        let payload_place = if place_is_int { "$1::bigint" } else { "$1::text" };
        let sql = Sql {
            read: read(""),
            read_skipping_held: read(&unheld),
            payload: format!(
                "SELECT {} FROM {table} o WHERE o.{seq} = {payload_place}::{place_type}",
                select(&spec.payload)
            ),
            record,
            hold: format!(
                "{known_gates}INSERT INTO {schema}.holds AS h \
                   (table_name, place, event_id, topic, key, state, cause, reason, attempts) \
                 SELECT {name}, p, i, t, k, s, c, r, a FROM unnest( \
                   $1::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::text[], $8::text[], $9::int[]) \
                   AS held(p, i, t, k, s, c, r, a) \
                 WHERE {fence}{if_known} \
                 ON CONFLICT (table_name, place) DO {again}",
                again = hold_again(spec)
            ),
            expire: match &spec.published_at {
                Some(column) => format!(
                    "DELETE FROM {table} o WHERE o.{seq} IN ( \
                       SELECT i.{seq} FROM {table} i WHERE i.{column} < now() - make_interval(secs => $1) \
                       LIMIT {EXPIRED_AT_ONCE}) \
                     AND NOT EXISTS (SELECT FROM {schema}.replays r \
                       WHERE r.table_name = {name} AND r.place = o.{seq}::text) AND {fence}",
                    column = quoted(column)
                ),
                None => String::new(),
            },
            replayed: format!(
                "DELETE FROM {schema}.replays WHERE table_name = {name} AND place = ANY($1::text[])"
            ),
            epoch: format!("SELECT epoch FROM {schema}.members WHERE epoch = $1"),
            writers: "SELECT DISTINCT virtualtransaction FROM pg_locks \
                      WHERE locktype = 'relation' AND relation = $1::bigint::oid \
                        AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                        AND mode = 'RowExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid()",
            backlog: format!(
                "SELECT (SELECT count(*) FROM (SELECT FROM {table} o WHERE true{pending}{unheld} \
                   LIMIT {BACKLOG_CAP}) waiting), \
                 (SELECT {age} FROM {table} o WHERE true{pending}{unheld} ORDER BY o.{seq} LIMIT 1)"
            ),
        };
        let own = |name: &str| own(&db.schema, name);
        let dialect = dialect(&own, spec, place, &place_type, settled, bucket);
        Ok(Outbox {
            name: spec.name.clone(),
            holds: HoldsSql::new(spec, &dialect),
            read_one: HoldsSql::read_one(&dialect, &list.replace("$5", "$2")),
            read_replays: HoldsSql::read_replays(spec, &dialect, &list.replace("$5", "$2")),
            pool: db.pool(),
            place_is_int,
            clock,
            columns: spec.columns.len(),
            payload_index: spec.columns.iter().position(|name| *name == spec.payload),
            max_payload: spec.max_payload as u64,
            lock_oid,
            stays: true,
            held_from: String::new(),
            kept,
            sql,
        })
    }

    pub fn has_cursor(&self) -> bool {
        self.place_is_int && self.kept.is_none()
    }

    pub async fn read(
        &self,
        reach: Reach,
        known: &[Place],
        limits: Limits,
        skip_held: bool,
        buckets: Option<&[u16]>,
    ) -> Result<Vec<Found>, Error> {
        let sql = if skip_held { &self.sql.read_skipping_held } else { &self.sql.read };
        let sql = self.of_buckets(sql, buckets);
        let query = sqlx::query(AssertSqlSafe(&*sql)).bind(reach.low).bind(reach.cursor);
        let query = match self.place_is_int {
            true => query.bind(ranges(ints(known))),
            false => query.bind(texts(known)),
        };
        let query = query
            .bind(i64::try_from(limits.rows).unwrap_or(i64::MAX))
            .bind(i32::try_from(limits.inline_bytes).unwrap_or(i32::MAX));
        let mut found = Vec::new();
        {
            let mut rows = query.fetch(&self.pool);
            while let Some(row) = rows.try_next().await.map_err(Error::sql("read the outbox"))? {
                found.push(self.decode(&row).map_err(Error::sql("read the outbox"))?);
            }
        }
        if self.place_is_int {
            // The statement gives the late rows and the tail in order, one after the other.
            found.sort_by(|a, b| a.event.place.cmp(&b.event.place));
        }
        Ok(found)
    }

    pub(super) fn decode(&self, row: &PgRow) -> Result<Found, sqlx::Error> {
        let place = if self.place_is_int {
            Place::Int(row.try_get(0)?)
        } else {
            Place::Text(row.try_get::<&str, _>(0)?.into())
        };
        let timestamp_ms = match self.clock {
            Clock::None => None,
            Clock::Millis => row.try_get(1)?,
            Clock::Timestamp => bytes(row, 1)?.and_then(|raw| {
                let micros = i64::from_be_bytes(raw.try_into().ok()?);
                Some(micros.div_euclid(1000) + POSTGRES_EPOCH_SECONDS * 1000)
            }),
        };
        let length: Option<i32> = row.try_get(2)?;
        let mut size = 0;
        for index in 0..self.columns {
            size += bytes(row, FIXED + index)?.map_or(0, <[u8]>::len);
        }
        let mut cells = Row::with_capacity(self.columns, size);
        let mut payload_came = true;
        for index in 0..self.columns {
            let cell = bytes(row, FIXED + index)?;
            if Some(index) == self.payload_index {
                payload_came = cell.is_some();
            }
            cells.push(cell);
        }
        let length = length.map(|length| u64::from(length.unsigned_abs()));
        let missing = length.filter(|_| !payload_came);
        Ok(Found {
            event: Event {
                place,
                row: cells,
                timestamp_ms,
                unread_bytes: missing.filter(|bytes| *bytes > self.max_payload),
                replay: None,
            },
            deferred_bytes: missing.filter(|bytes| *bytes <= self.max_payload),
        })
    }

    pub async fn with_payload(&self, event: Event) -> Result<Event, Error> {
        let query = sqlx::query(AssertSqlSafe(self.sql.payload.as_str()));
        let query = match &event.place {
            Place::Int(n) => query.bind(*n),
            Place::Text(text) => query.bind(&**text),
        };
        let doing = "read a large payload";
        let mut connection = self.pool.acquire().await.map_err(Error::sql(doing))?;
        let row = query.fetch_optional(&mut *connection).await.map_err(Error::sql(doing))?;
        let payload = match &row {
            None => None,
            Some(row) => bytes(row, 0).map_err(Error::sql(doing))?,
        };
        let whole = self.payload_index.map(|index| event.row.with(index, payload));
        // The connection would keep a buffer of this size for the next one.
        drop(row);
        connection.shrink_buffers();
        Ok(Event { row: whole.unwrap_or_default(), ..event })
    }

    pub async fn record(&self, places: &[Place], epoch: i64) -> Result<u64, Error> {
        let query = sqlx::query(AssertSqlSafe(self.sql.record.as_str()));
        let query = match self.place_is_int {
            true => query.bind(ranges(ints(places))),
            false => query.bind(texts(places)),
        };
        let done =
            query.bind(epoch).execute(&self.pool).await.map_err(Error::sql("record what was published"))?;
        if done.rows_affected() == 0 && !places.is_empty() {
            self.check_fence(epoch).await?;
        }
        Ok(done.rows_affected())
    }

    pub async fn expire(&self, kept: Duration, epoch: i64) -> Result<u64, Error> {
        if self.kept.is_some() {
            return self.expire_kept(kept, epoch).await;
        }
        let done = sqlx::query(AssertSqlSafe(self.sql.expire.as_str()))
            .bind(kept.as_secs_f64())
            .bind(epoch)
            .execute(&self.pool)
            .await
            .map_err(Error::sql("delete what was published long ago"))?;
        Ok(done.rows_affected())
    }

    pub async fn hold(&self, holds: &[Hold], epoch: i64, version: i64) -> Result<bool, Error> {
        if !self.stays {
            return self.hold_content(holds, epoch).await.map(|()| true);
        }
        let shared = self.holds.bucket.is_some();
        let query = sqlx::query(AssertSqlSafe(self.sql.hold.as_str()))
            .bind(holds.iter().map(|hold| hold.place.to_string()).collect::<Vec<_>>())
            .bind(epoch)
            .bind(holds.iter().map(|hold| hold.event_id.clone()).collect::<Vec<_>>())
            .bind(holds.iter().map(|hold| hold.topic.clone()).collect::<Vec<_>>())
            .bind(holds.iter().map(|hold| hold.key.clone()).collect::<Vec<_>>())
            .bind(holds.iter().map(|hold| hold.cause.state().as_str()).collect::<Vec<_>>())
            .bind(holds.iter().map(|hold| hold.cause.as_str()).collect::<Vec<_>>())
            .bind(holds.iter().map(|hold| hold.reason.clone()).collect::<Vec<_>>())
            .bind(holds.iter().map(|hold| hold.attempts.cast_signed()).collect::<Vec<_>>());
        let query = if shared { query.bind(version) } else { query };
        let done = query.execute(&self.pool).await.map_err(Error::sql("hold events"))?;
        if done.rows_affected() > 0 {
            return Ok(true);
        }
        self.check_fence(epoch).await?;
        if !shared {
            return Ok(true);
        }
        let now: i64 = sqlx::query_scalar(AssertSqlSafe(self.holds.version.as_str()))
            .fetch_one(&self.pool)
            .await
            .map_err(Error::sql("hold events"))?;
        Ok(now == version)
    }

    /// Nothing was written: because the lease is not ours any more?
    async fn check_fence(&self, epoch: i64) -> Result<(), Error> {
        let current: Option<i64> = sqlx::query_scalar(AssertSqlSafe(self.sql.epoch.as_str()))
            .bind(epoch)
            .fetch_optional(&self.pool)
            .await
            .map_err(Error::sql("check the lease"))?;
        if current == Some(epoch) { Ok(()) } else { Err(Error::Fenced(epoch)) }
    }

    pub async fn writers(&self) -> Result<Vec<String>, Error> {
        sqlx::query_scalar(self.sql.writers)
            .bind(self.lock_oid)
            .fetch_all(&self.pool)
            .await
            .map_err(Error::sql("look for open transactions"))
    }

    pub async fn backlog(&self) -> Result<Backlog, Error> {
        if self.kept.is_some() {
            return self.backlog_kept().await;
        }
        let (rows, oldest_seconds): (i64, Option<f64>) =
            sqlx::query_as(AssertSqlSafe(self.sql.backlog.as_str()))
                .fetch_one(&self.pool)
                .await
                .map_err(Error::sql("count what waits"))?;
        Ok(Backlog { rows: rows.unsigned_abs(), oldest_seconds })
    }
}

/// A column's bytes as PostgreSQL sent them in binary: for bytea, text, varchar, json and xml these are
/// the value itself (src/backend/utils/adt: `byteasend`, `textsend`, `json_send`, `xml_send`; the last
/// leaves a declaration out that says nothing, as the log does, and a cast would not).
fn bytes(row: &PgRow, index: usize) -> Result<Option<&[u8]>, sqlx::Error> {
    let value = row.try_get_raw(index)?;
    match sqlx::ValueRef::is_null(&value) {
        true => Ok(None),
        false => value.as_bytes().map(Some).map_err(sqlx::Error::Decode),
    }
}

fn ints(places: &[Place]) -> Vec<i64> {
    places
        .iter()
        .filter_map(|place| match place {
            Place::Int(n) => Some(*n),
            Place::Text(_) => None,
        })
        .collect()
}

/// Numbers as a multirange: those of an outbox mostly follow one another, and a statement is to be short. A
/// long one is several packets, and sqlx 0.9.0 leaves Nagle's algorithm on, which then has each wait for the
/// server's delayed acknowledgement (launchbadge/sqlx#4335: about 40 ms).
pub(super) fn ranges(mut numbers: Vec<i64>) -> String {
    numbers.sort_unstable();
    let mut text = String::from("{");
    for run in numbers.chunk_by(|one, next| one.checked_add(1) == Some(*next)) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            let comma = if text.len() > 1 { "," } else { "" };
            // A range ends before a number, and there is none behind the last.
            let _ = match *last {
                i64::MAX => write!(text, "{comma}[{first},)"),
                last => write!(text, "{comma}[{first},{last}]"),
            };
        }
    }
    text.push('}');
    text
}

fn texts(places: &[Place]) -> Vec<String> {
    places.iter().map(Place::to_string).collect()
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn numbers_are_written_as_runs() {
        assert_eq!(ranges(vec![]), "{}");
        assert_eq!(ranges(vec![7]), "{[7,7]}");
        assert_eq!(ranges(vec![3, 1, 2, 9, -5, 10]), "{[-5,-5],[1,3],[9,10]}");
        assert_eq!(ranges(vec![4, 4, 5]), "{[4,4],[4,5]}");
        assert_eq!(
            ranges(vec![i64::MAX, i64::MAX - 1, i64::MIN]),
            format!("{{[{0},{0}],[{1},)}}", i64::MIN, i64::MAX - 1)
        );
    }
}
