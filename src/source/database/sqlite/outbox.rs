//! One outbox table: what is asked of it, and what a row of it is. What it is asked with is in `statements`.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, Row as _, ValueRef as _,
    sqlite::{SqlitePool, SqliteRow},
};
use tokio::sync::{Mutex, MutexGuard};

use super::{
    super::{
        Backlog, Error, Found, LeftOut, Limits, Reach, TableSpec,
        holds::{Dialect, FIXED, HoldsSql},
    },
    Sqlite,
    holds::{adopt, dialect},
    kept::KeptSql,
    statements::{Shape, Sql},
};
use crate::{
    event::{Event, Place, Row},
    source::{
        Hold,
        times::{self, Unreadable},
    },
};

#[derive(Debug)]
pub struct Outbox {
    pub(super) name: String,
    unreadable: Unreadable,
    pub(super) pool: SqlitePool,
    turn: Arc<Mutex<()>>,
    pub(super) holds: HoldsSql,
    pub(super) read_replays: String,
    pub(super) read_one: String,
    pub(super) place_is_int: bool,
    pub(super) columns: usize,
    pub(super) payload_index: Option<usize>,
    max_payload: u64,
    /// Where rows stay when they are published.
    pub(super) kept: Option<KeptSql>,
    pub(super) sql: Sql,
}

impl Outbox {
    pub(super) fn new(db: &Sqlite, spec: &TableSpec, columns: &[(String, String)]) -> Result<Outbox, Error> {
        let shape = Shape::of(db, spec, columns)?;
        let own = |name: &str| db.own(name);
        let place_is_int = shape.place_is_int;
        let dialect = Dialect {
            numbers: shape.numbers(),
            adopt: adopt(spec, &db.own("holds"), place_is_int).into_iter().collect(),
            ..dialect(&own, spec, spec.place(), place_is_int, shape.settled())
        };
        Ok(Outbox {
            name: spec.name.clone(),
            unreadable: spec.unreadable.clone(),
            holds: HoldsSql::new(spec, &dialect),
            read_one: HoldsSql::read_one(&dialect, &shape.list("$2")),
            read_replays: HoldsSql::read_replays(spec, &dialect, &shape.list("$2")),
            pool: db.pool.clone(),
            turn: db.near.turn.clone(),
            place_is_int,
            columns: spec.columns.len(),
            payload_index: spec.columns.iter().position(|column| *column == spec.payload),
            max_payload: spec.max_payload as u64,
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
        _buckets: Option<&[u16]>,
    ) -> Result<Vec<Found>, Error> {
        let sql = if skip_held { &self.sql.read_skipping_held } else { &self.sql.read };
        let known = if self.place_is_int { "[]".to_owned() } else { json(&known.texts) };
        let mut rows = sqlx::query(AssertSqlSafe(sql.as_str()))
            .bind(reach.cursor)
            .bind(known)
            .bind(i64::try_from(limits.rows).unwrap_or(i64::MAX))
            .bind(i64::try_from(limits.inline_bytes).unwrap_or(i64::MAX))
            .fetch(&self.pool);
        let mut found = Vec::new();
        while let Some(row) = rows.try_next().await.map_err(Error::sql("read the outbox"))? {
            found.push(self.decode(&row).map_err(Error::sql("read the outbox"))?);
        }
        Ok(found)
    }

    pub(super) fn decode(&self, row: &SqliteRow) -> Result<Found, sqlx::Error> {
        let place = match self.place_is_int {
            true => Place::Int(row.try_get(0)?),
            false => Place::Text(row.try_get::<&str, _>(0)?.into()),
        };
        let time: Option<&[u8]> = row.try_get_unchecked(1)?;
        let timestamp_ms = time.and_then(|text| times::milliseconds(str::from_utf8(text).ok()?));
        if timestamp_ms.is_none() && time.is_some() {
            self.unreadable.tell(&self.name, &place);
        }
        let length: Option<i64> = row.try_get(2)?;
        let mut cells = Row::with_capacity(self.columns, 256);
        let mut payload_came = true;
        for index in 0..self.columns {
            let null = row.try_get_raw(FIXED + index)?.is_null();
            let cell: Option<&[u8]> = match null {
                true => None,
                // A text column decodes as bytes too, once its type is not checked.
                false => Some(row.try_get_unchecked(FIXED + index)?),
            };
            if Some(index) == self.payload_index {
                payload_came = !null;
            }
            cells.push(cell);
        }
        let missing = length.map(i64::unsigned_abs).filter(|_| !payload_came);
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
        let query = sqlx::query(AssertSqlSafe(self.sql.payload.as_str()));
        let query = match &event.place {
            Place::Int(n) => query.bind(*n),
            Place::Text(text) => query.bind(text.to_string()),
        };
        let row = query.fetch_optional(&self.pool).await.map_err(Error::sql("read a large payload"))?;
        let Some(row) = row else { return Ok(None) };
        // Borrowed: it may be large.
        let payload: Option<&[u8]> = row.try_get(0).map_err(Error::sql("read a large payload"))?;
        let payload = payload.map(Bytes::copy_from_slice);
        let row = self.payload_index.map(|index| event.row.with(index, payload));
        Ok(Some(Event { row: row.unwrap_or_default(), ..event }))
    }

    /// Waits until it is our turn to write.
    pub(super) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    pub async fn record(&self, places: &[Place], epoch: i64) -> Result<u64, Error> {
        let _turn = self.turn().await;
        // Those that were noted when rows were told apart by another column say nothing: their rows come again.
        let is_ours = |place: &&Place| matches!(place, Place::Int(_)) == self.place_is_int;
        let ours: Vec<Place> = places.iter().filter(is_ours).cloned().collect();
        let done = sqlx::query(AssertSqlSafe(self.sql.record.as_str()))
            .bind(json(&ours))
            .bind(epoch)
            .execute(&self.pool)
            .await
            .map_err(Error::sql("record what was published"))?;
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

    /// Its tables are not shared: nobody else changes the gates.
    pub async fn hold(&self, holds: &[Hold], epoch: i64, _version: i64) -> Result<bool, Error> {
        let _turn = self.turn().await;
        let mut transaction =
            self.pool.begin_with("BEGIN IMMEDIATE").await.map_err(Error::sql("hold events"))?;
        let mut held = 0;
        for hold in holds {
            let done = sqlx::query(AssertSqlSafe(self.sql.hold.as_str()))
                .bind(hold.place.to_string())
                .bind(epoch)
                .bind(&hold.event_id)
                .bind(&hold.topic)
                .bind(&hold.key)
                .bind(hold.cause.state().as_str())
                .bind(hold.cause.as_str())
                .bind(&hold.reason)
                .bind(hold.attempts)
                .execute(&mut *transaction)
                .await
                .map_err(Error::sql("hold events"))?;
            held += done.rows_affected();
        }
        transaction.commit().await.map_err(Error::sql("hold events"))?;
        if held == 0 {
            self.check_fence(epoch).await?;
        }
        Ok(true)
    }

    /// Nothing was written: because the lease is not ours any more?
    async fn check_fence(&self, epoch: i64) -> Result<(), Error> {
        let doing = "check the lease";
        let mut tx = self.begin(doing).await?;
        self.fence(&mut tx, epoch, doing).await
    }

    /// Writers take turns: none can hold a number that is lower than one already committed.
    #[expect(clippy::unused_async, reason = "the same shape as the other dialect's")]
    pub async fn writers(&self) -> Result<Vec<String>, Error> {
        Ok(Vec::new())
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

/// Places as a JSON array: SQLite takes no array parameters.
fn json(places: &[Place]) -> String {
    let values: Vec<serde_json::Value> = places
        .iter()
        .map(|place| match place {
            Place::Int(n) => (*n).into(),
            Place::Text(text) => (**text).into(),
        })
        .collect();
    serde_json::Value::Array(values).to_string()
}
