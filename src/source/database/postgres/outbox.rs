//! One outbox table: what is asked of it, and what a row of it is. What it is asked with is in `statements`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, Connection as _, Row as _, Value as _, ValueRef as _,
    postgres::{PgPool, PgRow, PgValue},
};

use super::{
    super::{
        Backlog, Error, Found, LeftOut, Limits, Reach, TableSpec,
        holds::{Dialect, FIXED, HoldsSql},
    },
    Postgres,
    holds::{adopt, dialect, own},
    kept::KeptSql,
    large::Large,
    places::{ints, ranges, texts},
    statements::{Clock, Shape, Sql},
};
use crate::{
    event::{Event, Place, Row},
    source::{
        Hold,
        postgres::wire::Value,
        times::{self, Unreadable},
    },
};

/// Seconds from the Unix epoch to PostgreSQL's, 2000-01-01 (src/include/datatype/timestamp.h).
const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

#[derive(Debug)]
pub struct Outbox {
    pub(super) name: String,
    pub(super) unreadable: Unreadable,
    pub(super) db: Postgres,
    pub(super) pool: PgPool,
    pub(super) large: Arc<Large>,
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

impl Outbox {
    pub fn new(
        db: &Postgres,
        spec: &TableSpec,
        columns: &[(String, String)],
        lock_oid: i64,
    ) -> Result<Outbox, Error> {
        let shape = Shape::of(&db.schema, spec, columns)?;
        let own = |name: &str| own(&db.schema, name);
        let dialect = Dialect {
            numbers: shape.numbers(),
            adopt: adopt(spec, &own("holds"), &own("replays"), &shape.id_type(), shape.place_is_int),
            ..dialect(&own, spec, spec.place(), &shape.place_type, shape.settled(), shape.bucket())
        };
        let (pool, large) = db.pools();
        Ok(Outbox {
            name: spec.name.clone(),
            unreadable: spec.unreadable.clone(),
            holds: HoldsSql::new(spec, &dialect),
            read_one: HoldsSql::read_one(&dialect, &shape.list("$2")),
            read_replays: HoldsSql::read_replays(spec, &dialect, &shape.list("$2")),
            db: db.clone(),
            pool,
            large,
            place_is_int: shape.place_is_int,
            clock: shape.clock,
            columns: spec.columns.len(),
            payload_index: spec.columns.iter().position(|name| *name == spec.payload),
            max_payload: spec.max_payload as u64,
            lock_oid,
            stays: true,
            held_from: String::new(),
            kept: shape.kept(),
            sql: shape.sql(),
        })
    }

    pub fn has_cursor(&self) -> bool {
        self.place_is_int && self.kept.is_none()
    }

    pub async fn read(
        &self,
        reach: Reach,
        known: &LeftOut,
        limits: Limits,
        skip_held: bool,
        buckets: Option<&[u16]>,
    ) -> Result<Vec<Found>, Error> {
        let sql = if skip_held { &self.sql.read_skipping_held } else { &self.sql.read };
        let sql = self.of_buckets(sql, buckets);
        let query = sqlx::query(AssertSqlSafe(&*sql)).bind(reach.low).bind(reach.cursor);
        let query = match self.place_is_int {
            true => query.bind(known.numbers.multirange()),
            false => query.bind(texts(&known.texts)),
        };
        let query = query
            .bind(i64::try_from(limits.rows).unwrap_or(i64::MAX))
            .bind(i32::try_from(limits.inline_bytes).unwrap_or(i32::MAX));
        let query = match (self.place_is_int, known.numbers.around(reach.cursor)) {
            (false, _) => query,
            // Nothing comes late where all is known without a gap up to the cursor.
            (true, Some((first, _))) => query.bind(first.saturating_sub(1)),
            (true, None) => query.bind(reach.cursor),
        };
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
            Clock::Text => row.try_get::<Option<&str>, _>(1)?.and_then(times::milliseconds),
            Clock::Timestamp => bytes(row, 1)?.and_then(|raw| {
                let micros = i64::from_be_bytes(raw.try_into().ok()?);
                // `infinity` is no time that a record can have.
                let micros = Some(micros).filter(|micros| !matches!(*micros, i64::MIN | i64::MAX))?;
                Some(micros.div_euclid(1000) + POSTGRES_EPOCH_SECONDS * 1000)
            }),
        };
        if timestamp_ms.is_none() && !row.try_get_raw(1)?.is_null() {
            self.unreadable.tell(&self.name, &place);
        }
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

    pub async fn with_payload(&self, event: Event) -> Result<Option<Event>, Error> {
        let (sql, place) = (self.sql.payload.as_str(), event.place.to_string());
        let payload = match self.large.value(&self.db, &self.pool, sql, &place).await {
            Some(Value::NoRow) => None,
            Some(Value::Null) => Some(None),
            Some(Value::Bytes(bytes)) => Some(Some(bytes.into())),
            None => self.pooled_payload(&event.place).await.map_err(Error::sql("read a large payload"))?,
        };
        let Some(payload) = payload else { return Ok(None) };
        let whole = self.payload_index.map(|index| event.row.with(index, payload));
        Ok(Some(Event { row: whole.unwrap_or_default(), ..event }))
    }

    async fn pooled_payload(&self, place: &Place) -> Result<Option<Option<Bytes>>, sqlx::Error> {
        let query = sqlx::query(AssertSqlSafe(self.sql.payload.as_str()));
        let query = match place {
            Place::Int(n) => query.bind(*n),
            Place::Text(text) => query.bind(&**text),
        };
        let mut connection = self.pool.acquire().await?;
        let Some(row) = query.fetch_optional(&mut *connection).await? else { return Ok(None) };
        let payload = shared(&row, 0)?;
        // The connection would keep a buffer of this size for the next one.
        drop(row);
        connection.shrink_buffers();
        Ok(Some(payload))
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
        let doing = "check the lease";
        let mut tx = self.begin(doing).await?;
        self.fence(&mut tx, epoch, doing).await
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
    match value.is_null() {
        true => Ok(None),
        false => value.as_bytes().map(Some).map_err(sqlx::Error::Decode),
    }
}

/// The same in the buffer that the driver received them in: what is large is not copied.
fn shared(row: &PgRow, index: usize) -> Result<Option<Bytes>, sqlx::Error> {
    struct Owner(PgValue);
    impl AsRef<[u8]> for Owner {
        fn as_ref(&self) -> &[u8] {
            self.0.as_ref().as_bytes().unwrap_or_default()
        }
    }
    let value = row.try_get_raw(index)?;
    Ok((!value.is_null()).then(|| Bytes::from_owner(Owner(sqlx::ValueRef::to_owned(&value)))))
}
