//! One outbox table: what is asked of it, and what a row of it is. What it is asked with is in `statements`.

use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use mysql_async::{IsolationLevel, TxOpts};
use sqlx::AssertSqlSafe;

use super::{
    super::{
        Backlog, Error, Found, LeftOut, Limits, OF_BUCKETS, Reach, TableSpec,
        holds::{Dialect, FIXED, HoldsSql},
    },
    Mysql,
    columns::{Catalogue, Column},
    contents::Contents,
    gaps::{Gone, condition},
    holds::{adopt, dialect},
    pool::Pool,
    sql::{self, Literal, Row, literal, quoted, quoted_table},
    statements::{Of, Shape, Sql},
};
use crate::{
    event::{self, Event, Place},
    source::{
        Hold,
        times::{self, Unreadable},
    },
};

/// Numbers that came by other ways than from the counter are found at least this often.
const LOOK_AT_ALL_EVERY: Duration = Duration::from_secs(10);
/// The first piece of a payload that is read in pieces.
const FIRST_PIECE: i64 = 1 << 20;
/// Holds that one statement writes.
const HOLDS_AT_ONCE: usize = 500;

#[derive(Debug)]
pub struct Outbox {
    pub(super) name: String,
    unreadable: Unreadable,
    /// Whether the column with the time of an event has neither times nor whole numbers.
    time_is_text: bool,
    pub(super) pool: Pool,
    pub(super) db: Box<Mysql>,
    /// When the pool was made.
    made: Instant,
    pub(super) holds: HoldsSql,
    pub(super) read_replays: String,
    pub(super) read_one: String,
    pub(super) columns: usize,
    pub(super) payload_index: Option<usize>,
    pub(super) place_is_int: bool,
    place: Column,
    max_payload: u64,
    /// The first piece of a large payload, and the largest, in characters or bytes.
    piece: i64,
    largest_piece: i64,
    gone: Mutex<Numbers>,
    /// The last statement has found every row that it was to delete.
    found_all: AtomicBool,
    /// Where rows do not stay: what is read are contents of events that were held.
    pub(super) contents: Option<Contents>,
    /// Where the application leaves its rows nevertheless: the table itself, or why it cannot be read again.
    pub(super) rows: Option<Result<Box<Outbox>, String>>,
    sql: Box<Sql>,
}

/// What is known of numbers that were recorded.
#[derive(Debug)]
struct Numbers {
    gone: Gone,
    looked_at_all: Instant,
}

impl Outbox {
    pub(super) fn new(db: &Mysql, spec: &TableSpec, catalogue: &Catalogue) -> Result<Outbox, Error> {
        let of = Of { table: quoted_table(&spec.name), only: String::new() };
        Outbox::of(db, spec, catalogue, &of)
    }

    pub(super) fn of(db: &Mysql, spec: &TableSpec, catalogue: &Catalogue, of: &Of) -> Result<Outbox, Error> {
        let shape = Shape::of(db, spec, catalogue, of)?;
        let own = |name: &str| db.own(name);
        let Shape { place, timestamp, .. } = shape;
        let settled = shape.settled();
        // What is to be replayed, and came to be held before it was published, waits for that.
        let only_settled = match &settled {
            Some(settled) => format!(" AND {settled}{OF_BUCKETS}"),
            None => OF_BUCKETS.to_owned(),
        };
        let dialect = Dialect {
            settled,
            numbers: shape.numbers(),
            adopt: adopt(spec, &db.own("holds"), place, shape.id()).into_iter().collect(),
            ..dialect(&own, of.table.clone(), place, shape.id_text(), shape.place_text("o."), shape.bucket())
        };
        // A character has four bytes at most.
        let largest_piece = (catalogue.packet / 8).cast_signed().max(256);
        let (pool, made) = db.pool_since();
        Ok(Outbox {
            name: spec.name.clone(),
            unreadable: spec.unreadable.clone(),
            time_is_text: timestamp.is_some_and(|column| !column.is_clock()),
            holds: HoldsSql::new(spec, &dialect),
            read_one: HoldsSql::read_one(&dialect, &shape.list("$2")) + &of.only,
            read_replays: HoldsSql::read_replays(spec, &dialect, &shape.list("$2"))
                .replace(OF_BUCKETS, &only_settled),
            pool,
            db: Box::new(db.clone()),
            made,
            columns: spec.columns.len(),
            payload_index: spec.columns.iter().position(|name| *name == spec.payload),
            place_is_int: shape.place_is_int(),
            place: place.clone(),
            max_payload: spec.max_payload as u64,
            piece: FIRST_PIECE.min(largest_piece),
            largest_piece,
            gone: Mutex::new(Numbers { gone: Gone::default(), looked_at_all: Instant::now() }),
            found_all: AtomicBool::new(false),
            contents: None,
            rows: None,
            sql: Box::new(shape.sql()),
        })
    }

    /// Whether the pool is still the one that connections are to come from.
    pub fn is_current(&self) -> bool {
        self.made == self.db.pool_since().1
    }

    /// Every read starts at the head of the table: [`super::gaps`] tells why, and why that costs little.
    pub fn has_cursor(&self) -> bool {
        false
    }

    fn numbers(&self) -> MutexGuard<'_, Numbers> {
        self.gone.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub async fn read(
        &self,
        _reach: Reach,
        known: &LeftOut,
        limits: Limits,
        skip_held: bool,
        buckets: Option<&[u16]>,
    ) -> Result<Vec<Found>, Error> {
        let doing = "read the outbox";
        let places = match (self.place_is_int, known.texts.as_slice()) {
            (true, _) => {
                let mut numbers = self.numbers();
                let look_at_all = numbers.looked_at_all.elapsed() >= LOOK_AT_ALL_EVERY;
                if look_at_all {
                    numbers.looked_at_all = Instant::now();
                }
                let gone = Some(&numbers.gone).filter(|_| !look_at_all);
                condition(&format!("o.{}", quoted(&self.place.name)), &known.numbers, gone)
            }
            (false, []) => "TRUE".to_owned(),
            (false, known) => format!("NOT {}", self.place.among("o.", known)),
        };
        let Sql { read, end, end_skipping_held, .. } = &*self.sql;
        let end = if skip_held { end_skipping_held } else { end };
        let text = format!("{read}{places}{}{}", self.of_buckets(end, buckets), limits.rows);
        let query =
            sql::query(AssertSqlSafe(&text)).bind(i64::try_from(limits.inline_bytes).unwrap_or(i64::MAX));
        let rows = query.fetch_all(&self.pool).await.map_err(Error::sql(doing))?;
        let found: Result<Vec<Found>, _> = rows.iter().map(|row| self.decode(row)).collect();
        let found = found.map_err(Error::sql(doing))?;
        if self.place_is_int {
            let mut numbers = self.numbers();
            // They begin anew, as after TRUNCATE: nothing is certain of those that were recorded.
            let again = |found: &Found| found.event.place.number().is_some_and(|n| numbers.gone.has(n));
            if found.iter().any(again) {
                numbers.gone.clear();
            }
        }
        Ok(found)
    }

    pub(super) fn decode(&self, row: &Row) -> Result<Found, mysql_async::Error> {
        if self.contents.is_some() {
            return self.decode_contents(row);
        }
        let place = match self.place_is_int {
            true => Place::Int(row.try_get(0)?),
            false => Place::Text(row.try_get::<String>(0)?.into()),
        };
        let timestamp_ms = match self.time_is_text {
            true => row.bytes(1).and_then(|text| times::milliseconds(str::from_utf8(text).ok()?)),
            false => row.try_get(1)?,
        };
        if timestamp_ms.is_none() && row.bytes(1).is_some() {
            self.unreadable.tell(&self.name, &place);
        }
        let length: Option<u64> = row.try_get(2)?;
        let cells = (0..self.columns).map(|index| row.bytes(FIXED + index));
        let size = cells.clone().map(|cell| cell.map_or(0, <[u8]>::len)).sum();
        let mut content = event::Row::with_capacity(self.columns, size);
        cells.clone().for_each(|cell| content.push(cell));
        let payload_came = self.payload_index.is_none_or(|index| row.bytes(FIXED + index).is_some());
        let missing = length.filter(|_| !payload_came);
        Ok(Found {
            event: Event {
                place,
                row: content,
                timestamp_ms,
                unread_bytes: missing.filter(|bytes| *bytes > self.max_payload),
                replay: None,
            },
            deferred_bytes: missing.filter(|bytes| *bytes <= self.max_payload),
        })
    }

    /// How much of a payload one statement has, in bytes.
    pub(super) fn largest_piece(&self) -> usize {
        usize::try_from(self.largest_piece).unwrap_or(usize::MAX)
    }

    /// The payload comes in pieces: the driver has several copies of what it reads. They grow, because the
    /// server reads all of it for each.
    pub async fn with_payload(&self, event: Event) -> Result<Option<Event>, Error> {
        let doing = "read a large payload";
        let Some(index) = self.payload_index else { return Ok(Some(event)) };
        let places = self.place.among("o.", std::slice::from_ref(&event.place));
        let (what, in_pieces) = &self.sql.payload;
        let Sql { table, only, .. } = &*self.sql;
        let text = format!("SELECT {what} FROM {table} o WHERE {places}{only} LIMIT 1");
        let mut one_state = TxOpts::default();
        one_state.with_isolation_level(IsolationLevel::RepeatableRead).with_readonly(true);
        let mut tx = self.pool.start_transaction(one_state).await.map_err(Error::sql(doing))?;
        let (length, cells) = (self.sql.length.as_str(), 0..self.columns);
        let length = format!("SELECT {length} FROM {table} o WHERE {places}{only} LIMIT 1");
        let length: Option<Option<u64>> = sql::query_scalar(AssertSqlSafe(&length))
            .fetch_optional(&mut tx)
            .await
            .map_err(Error::sql(doing))?;
        let Some(length) = length else { return Ok(None) };
        let length = length.unwrap_or(0).min(self.max_payload) as usize;
        let mut row = event::Row::with_capacity(self.columns, event.row.bytes() + length);
        cells.clone().take(index).for_each(|column| row.push(event.row.get(column)));
        row.push(None);
        let (mut from, mut most) = (1, self.piece);
        loop {
            let query = sql::query(AssertSqlSafe(&text)).bind(from).bind(most);
            let piece = query.fetch_optional(&mut tx).await.map_err(Error::sql(doing))?;
            let Some(piece) = piece.as_ref().and_then(|piece| piece.bytes(0)) else { break };
            row.extend_last(piece);
            if !in_pieces || (piece.len() as i64) < most {
                break;
            }
            from += most;
            most = most.max(from / 16).min(self.largest_piece);
        }
        tx.commit().await.map_err(Error::sql(doing))?;
        cells.skip(index + 1).for_each(|column| row.push(event.row.get(column)));
        Ok(Some(Event { row, ..event }))
    }

    /// The statement that deletes or marks these rows.
    pub(super) fn record_sql(&self, places: &[Place]) -> String {
        let (list, on) = self.place.joined("o.", places);
        let Sql { record: (before, behind), recorded, .. } = &*self.sql;
        format!("{before}{list} STRAIGHT_JOIN {recorded} ON {on}{behind}")
    }

    /// The same where the places are a run of numbers, each of which has a row: it ends with the last row, and looks at
    /// none behind it, which may be one that is not committed. Were one of them gone it would, so the other
    /// statement is used until it has found all that it was asked for.
    fn delete_run(&self, places: &[Place]) -> Option<sql::Query> {
        let (Some(Place::Int(first)), Some(Place::Int(last))) = (places.first(), places.last()) else {
            return None;
        };
        let follows = |two: &[Place]| matches!(two, [Place::Int(one), Place::Int(next)] if one.checked_add(1) == Some(*next));
        let is_run = self.found_all.load(Ordering::Relaxed) && places.windows(2).all(follows);
        let text = self.sql.delete_run.as_deref().filter(|_| is_run)?;
        Some(sql::query(AssertSqlSafe(text)).bind(*first).bind(*last).bind(places.len() as i64))
    }

    pub async fn record(&self, places: &[Place], epoch: i64) -> Result<u64, Error> {
        let doing = "record what was published";
        // Those that were noted when rows were told apart by another column say nothing: their rows come again.
        let is_ours = |place: &Place| matches!(place, Place::Int(_)) == self.place_is_int;
        let ours: Vec<Place>;
        let places = match places.iter().all(is_ours) {
            true => places,
            false => {
                ours = places.iter().filter(|place| is_ours(place)).cloned().collect();
                &ours
            }
        };
        if places.is_empty() {
            return Ok(0);
        }
        let statement =
            self.delete_run(places).unwrap_or_else(|| sql::query(AssertSqlSafe(&self.record_sql(places))));
        let done = self.change(statement, epoch, doing).await?;
        self.found_all.store(done == places.len() as u64, Ordering::Relaxed);
        if self.place_is_int {
            self.numbers().gone.add(places.iter().filter_map(Place::number));
        }
        Ok(done)
    }

    /// With the fence in a statement of its own: in one statement the lease would be locked first, and could not be
    /// renewed while the application has rows locked that this one waits for.
    async fn change(&self, statement: sql::Query, epoch: i64, doing: &'static str) -> Result<u64, Error> {
        let mut tx = self.begin(doing).await?;
        let done = statement.execute(&mut *tx).await.map_err(Error::sql(doing))?;
        self.fence(&mut tx, epoch, doing).await?;
        tx.commit().await.map_err(Error::sql(doing))?;
        Ok(done.rows_affected())
    }

    pub async fn expire(&self, kept: Duration, epoch: i64) -> Result<u64, Error> {
        let micros = i64::try_from(kept.as_micros()).unwrap_or(i64::MAX);
        let statement = sql::query(AssertSqlSafe(&self.sql.expire)).bind(micros);
        self.change(statement, epoch, "delete what was published long ago").await
    }

    pub async fn hold(&self, holds: &[Hold], epoch: i64, version: i64) -> Result<bool, Error> {
        let doing = "hold events";
        let mut tx = self.begin(doing).await?;
        if self.holds.bucket.is_some() {
            let now = format!("{} LOCK IN SHARE MODE", self.holds.version);
            let now: i64 = sql::query_scalar(AssertSqlSafe(&now))
                .fetch_one(&mut *tx)
                .await
                .map_err(Error::sql(doing))?;
            if now != version {
                tx.rollback().await.map_err(Error::sql(doing))?;
                return Ok(false);
            }
        }
        self.keep_contents(&mut tx, holds).await?;
        for some in holds.chunks(HOLDS_AT_ONCE) {
            let rows: Vec<String> = some.iter().map(|hold| self.hold_row(hold)).collect();
            let text = format!("{}{} ON DUPLICATE KEY UPDATE state = state", self.sql.hold, rows.join(","));
            sql::query(AssertSqlSafe(&text)).execute(&mut *tx).await.map_err(Error::sql(doing))?;
        }
        self.fence(&mut tx, epoch, doing).await?;
        tx.commit().await.map_err(Error::sql(doing))?;
        Ok(true)
    }

    fn hold_row(&self, hold: &Hold) -> String {
        let values: [Literal; 9] = [
            (&self.name).into(),
            hold.place.to_string().into(),
            (&hold.event_id).into(),
            (&hold.topic).into(),
            hold.key.clone().into(),
            hold.cause.state().as_str().into(),
            hold.cause.as_str().into(),
            (&hold.reason).into(),
            hold.attempts.into(),
        ];
        let values: Vec<String> = values.iter().map(ToString::to_string).collect();
        format!("({})", values.join(","))
    }

    /// These rows were published again.
    pub async fn replayed(&self, places: &[String]) -> Result<(), Error> {
        let list: Vec<String> = places.iter().map(|place| literal(place)).collect();
        if list.is_empty() {
            return Ok(());
        }
        let text = format!("{}{})", self.sql.replayed, list.join(","));
        let done = sql::query(AssertSqlSafe(&text)).execute(&self.pool).await;
        done.map(drop).map_err(Error::sql("record what was replayed"))
    }

    /// Nothing is concluded from who writes: see [`super::gaps`].
    #[expect(clippy::unused_async, reason = "the same shape as the other dialects'")]
    pub async fn writers(&self) -> Result<Vec<String>, Error> {
        Ok(Vec::new())
    }

    pub async fn backlog(&self) -> Result<Backlog, Error> {
        let query = sql::query_as(AssertSqlSafe(&self.sql.backlog));
        let (rows, oldest_seconds): (u64, Option<f64>) =
            query.fetch_one(&self.pool).await.map_err(Error::sql("count what waits"))?;
        Ok(Backlog { rows, oldest_seconds })
    }
}
