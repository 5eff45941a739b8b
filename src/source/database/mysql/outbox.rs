//! One outbox table: its statements, made once, and what they bring.

use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mysql_async::{IsolationLevel, Pool, TxOpts};
use sqlx::AssertSqlSafe;

use super::{
    super::{
        BACKLOG_CAP, Backlog, EXPIRED_AT_ONCE, Error, Found, Limits, OF_BUCKETS, Reach, TableSpec,
        holds::{FIXED, HoldsSql},
    },
    Mysql,
    columns::{Catalogue, Column},
    gaps::{Gone, condition},
    holds::dialect,
    sql::{self, Literal, Row, literal, quoted, quoted_table},
};
use crate::{
    config::AfterPublish,
    event::{self, Event, Place},
    source::Hold,
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
    pub(super) pool: Pool,
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
    sql: Sql,
}

/// What is known of numbers that were recorded.
#[derive(Debug)]
struct Numbers {
    gone: Gone,
    looked_at_all: Instant,
}

/// The statements of one table, or their beginnings and ends: MySQL has no arrays, so places are put in as
/// lists.
#[derive(Debug)]
struct Sql {
    /// `$1`: the longest payload that comes along. Then a condition on places, one of the two ends, and a limit.
    read: String,
    end: String,
    end_skipping_held: String,
    table: String,
    /// The payload's length.
    length: String,
    /// The payload, and whether it is a piece of it.
    payload: (String, bool),
    /// Before and behind the places joined to the table. `$1`: the epoch.
    record: (String, String),
    recorded: String,
    replayed: String,
    hold: String,
    /// `$1`: microseconds. `$2`: the epoch.
    expire: String,
    epoch: String,
    backlog: String,
}

impl Outbox {
    pub(super) fn new(db: &Mysql, spec: &TableSpec, catalogue: &Catalogue) -> Result<Outbox, Error> {
        let columns = &catalogue.columns;
        let types: Vec<_> = columns.iter().map(|one| (one.name.clone(), one.kind.clone())).collect();
        spec.check(&types)?;
        if !catalogue.engine.eq_ignore_ascii_case("innodb") {
            return Err(Error::Setup(format!(
                "table {} has the engine {}, which has no transactions; expected InnoDB",
                spec.name, catalogue.engine
            )));
        }
        let of = |name: &str| columns.iter().find(|column| column.name.eq_ignore_ascii_case(name));
        let place = spec.sequence.as_ref().unwrap_or(&spec.id);
        let place = of(place).ok_or_else(|| {
            Error::Setup(format!(
                "table {} has no column {place}: map the order column as columns.sequence",
                spec.name
            ))
        })?;
        let text_of = |alias: &str| match place.is_int() {
            true => format!("CAST({alias}{} AS CHAR CHARACTER SET utf8mb4)", quoted(&place.name)),
            false => place.id(alias),
        };
        let (table, seq) = (quoted_table(&spec.name), format!("o.{}", quoted(&place.name)));
        let (holds, members, replays) = (db.own("holds"), db.own("members"), db.own("replays"));
        let name = literal(&spec.name);
        let timestamp = spec.timestamps.iter().find_map(|name| of(name));
        let list = list(spec, &of, &text_of("o."), timestamp);
        let published_at = spec.published_at.as_deref().map(quoted);
        let mark = published_at.as_ref().filter(|_| spec.after_publish == AfterPublish::Mark);
        let pending = mark.map(|column| format!(" AND o.{column} IS NULL")).unwrap_or_default();
        // Not as EXISTS: that may become a join, and the order of the rows would be lost to a sort.
        let unheld = format!(
            " AND (SELECT 1 FROM {holds} h WHERE h.table_name = {name} AND h.place = {} LIMIT 1) IS NULL",
            text_of("o.")
        );
        let along =
            catalogue.index.as_ref().map(|index| format!(" FORCE INDEX ({index})")).unwrap_or_default();
        let by_place =
            catalogue.by_place.as_ref().map(|index| format!(" FORCE INDEX ({index})")).unwrap_or_default();
        let member = |epoch: &str| format!("EXISTS (SELECT 1 FROM {members} m WHERE m.epoch = {epoch})");
        let order = if spec.sequence.is_some() { format!(" ORDER BY {seq}") } else { String::new() };
        let age = timestamp.map_or("NULL".to_owned(), |column| {
            format!(
                "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) DIV 1000 - {}) / 1e3",
                column.millis("o.")
            )
        });
        let payload = of(&spec.payload);
        let sql = Sql {
            read: format!("SELECT {list} FROM {table} o{along} WHERE "),
            end: format!("{pending}{OF_BUCKETS}{order} LIMIT "),
            end_skipping_held: format!("{pending}{unheld}{OF_BUCKETS}{order} LIMIT "),
            payload: match payload.and_then(|column| column.piece("o.")) {
                Some(piece) => (piece, true),
                None => (payload.map_or("NULL".to_owned(), |column| column.cell("o.")), false),
            },
            table: table.clone(),
            length: payload.map_or("NULL".to_owned(), |column| column.length("o.")),
            record: match mark {
                Some(column) => (
                    "UPDATE ".into(),
                    format!(
                        " SET o.{column} = UTC_TIMESTAMP(6) WHERE o.{column} IS NULL AND {}",
                        member("$1")
                    ),
                ),
                None => ("DELETE o FROM ".into(), format!(" WHERE {}", member("$1"))),
            },
            recorded: format!("{table} o{by_place}"),
            replayed: format!("DELETE FROM {replays} WHERE table_name = {name} AND place IN ("),
            hold: format!(
                "INSERT INTO {holds} (table_name, place, event_id, topic, `key`, state, cause, reason, attempts) VALUES "
            ),
            expire: match &published_at {
                Some(column) => format!(
                    "DELETE FROM {table} WHERE {column} < UTC_TIMESTAMP(6) - INTERVAL $1 MICROSECOND \
                       AND {} AND NOT EXISTS (SELECT 1 FROM {replays} r \
                         WHERE r.table_name = {name} AND r.place = {}) LIMIT {EXPIRED_AT_ONCE}",
                    member("$2"),
                    text_of("")
                ),
                None => String::new(),
            },
            backlog: format!(
                "SELECT (SELECT count(*) FROM (SELECT 1 FROM {table} o{along} WHERE TRUE{pending}{unheld} \
                   LIMIT {BACKLOG_CAP}) waiting), \
                 (SELECT {age} FROM {table} o{along} WHERE TRUE{pending}{unheld}{order} LIMIT 1)"
            ),
            epoch: format!("SELECT epoch FROM {members} WHERE epoch = $1"),
        };
        // A character has four bytes at most.
        let largest_piece = (catalogue.packet / 8).cast_signed().max(256);
        let own = |name: &str| db.own(name);
        let id = of(&spec.id).map_or("NULL".into(), |column| column.id("o."));
        let bucket = spec.shared.as_ref().map(|shared| {
            let column = |name: &str| of(name).map(|column| format!("HEX({})", column.cell("o.")));
            let text = |text: &str| format!("HEX({})", literal(text));
            let hashed =
                shared.hashed(id.clone(), text, column, |pieces| format!("CONCAT({})", pieces.join(", ")));
            format!("CRC32({hashed}) MOD {}", shared.buckets)
        });
        let dialect = dialect(&own, spec, place, id, text_of("o."), bucket);
        Ok(Outbox {
            name: spec.name.clone(),
            holds: HoldsSql::new(spec, &dialect),
            read_one: HoldsSql::read_one(&dialect, &list.replace("$1", "$2")),
            read_replays: HoldsSql::read_replays(spec, &dialect, &list.replace("$1", "$2")),
            pool: db.pool(),
            columns: spec.columns.len(),
            payload_index: spec.columns.iter().position(|name| *name == spec.payload),
            place_is_int: place.is_int(),
            place: place.clone(),
            max_payload: spec.max_payload as u64,
            piece: FIRST_PIECE.min(largest_piece),
            largest_piece,
            gone: Mutex::new(Numbers { gone: Gone::default(), looked_at_all: Instant::now() }),
            sql,
        })
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
        known: &[Place],
        limits: Limits,
        skip_held: bool,
        buckets: Option<&[u16]>,
    ) -> Result<Vec<Found>, Error> {
        let doing = "read the outbox";
        let places = match (self.place_is_int, known) {
            (true, known) => {
                let mut numbers = self.numbers();
                let look_at_all = numbers.looked_at_all.elapsed() >= LOOK_AT_ALL_EVERY;
                if look_at_all {
                    numbers.looked_at_all = Instant::now();
                }
                let gone = Some(&numbers.gone).filter(|_| !look_at_all);
                condition(&format!("o.{}", quoted(&self.place.name)), &ints(known).collect(), gone)
            }
            (false, []) => "TRUE".to_owned(),
            (false, known) => format!("NOT {}", self.place.among("o.", known)),
        };
        let Sql { read, end, end_skipping_held, .. } = &self.sql;
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
            let again =
                |found: &Found| ints(std::slice::from_ref(&found.event.place)).any(|n| numbers.gone.has(n));
            if found.iter().any(again) {
                numbers.gone.clear();
            }
        }
        Ok(found)
    }

    pub(super) fn decode(&self, row: &Row) -> Result<Found, mysql_async::Error> {
        let place = match self.place_is_int {
            true => Place::Int(row.try_get(0)?),
            false => Place::Text(row.try_get::<String>(0)?.into()),
        };
        let timestamp_ms = row.try_get(1)?;
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

    /// The payload comes in pieces: the driver has several copies of what it reads. They grow, because the
    /// server reads all of it for each.
    pub async fn with_payload(&self, event: Event) -> Result<Event, Error> {
        let doing = "read a large payload";
        let Some(index) = self.payload_index else { return Ok(event) };
        let places = self.place.among("o.", std::slice::from_ref(&event.place));
        let (what, in_pieces) = &self.sql.payload;
        let text = format!("SELECT {what} FROM {} o WHERE {places} LIMIT 1", self.sql.table);
        let mut one_state = TxOpts::default();
        one_state.with_isolation_level(IsolationLevel::RepeatableRead).with_readonly(true);
        let mut tx = self.pool.start_transaction(one_state).await.map_err(Error::sql(doing))?;
        let (length, cells) = (self.sql.length.as_str(), 0..self.columns);
        let length = format!("SELECT {length} FROM {} o WHERE {places} LIMIT 1", self.sql.table);
        let length: Option<Option<u64>> = sql::query_scalar(AssertSqlSafe(&length))
            .fetch_optional(&mut tx)
            .await
            .map_err(Error::sql(doing))?;
        let length = length.flatten().unwrap_or(0).min(self.max_payload) as usize;
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
        Ok(Event { row, ..event })
    }

    /// The statement that deletes or marks these rows, and its fence.
    pub(super) fn record_sql(&self, places: &[Place]) -> String {
        let (list, on) = self.place.joined("o.", places);
        let Sql { record: (before, behind), recorded, .. } = &self.sql;
        format!("{before}{list} STRAIGHT_JOIN {recorded} ON {on}{behind}")
    }

    pub async fn record(&self, places: &[Place], epoch: i64) -> Result<u64, Error> {
        let doing = "record what was published";
        if places.is_empty() {
            return Ok(0);
        }
        let text = self.record_sql(places);
        let done = sql::query(AssertSqlSafe(&text))
            .bind(epoch)
            .execute(&self.pool)
            .await
            .map_err(Error::sql(doing))?;
        if done.rows_affected() == 0 {
            self.check_fence(epoch).await?;
        }
        if self.place_is_int {
            self.numbers().gone.add(ints(places));
        }
        Ok(done.rows_affected())
    }

    /// Nothing was written: because the lease is not ours any more?
    async fn check_fence(&self, epoch: i64) -> Result<(), Error> {
        let query = sql::query_scalar(AssertSqlSafe(&self.sql.epoch)).bind(epoch);
        let current: Option<i64> =
            query.fetch_optional(&self.pool).await.map_err(Error::sql("check the lease"))?;
        if current == Some(epoch) { Ok(()) } else { Err(Error::Fenced(epoch)) }
    }

    pub async fn expire(&self, kept: Duration, epoch: i64) -> Result<u64, Error> {
        let query = sql::query(AssertSqlSafe(&self.sql.expire))
            .bind(i64::try_from(kept.as_micros()).unwrap_or(i64::MAX))
            .bind(epoch);
        let done =
            query.execute(&self.pool).await.map_err(Error::sql("delete what was published long ago"))?;
        Ok(done.rows_affected())
    }

    pub async fn hold(&self, holds: &[Hold], epoch: i64, version: i64) -> Result<bool, Error> {
        let doing = "hold events";
        let mut tx = self.fenced(epoch, doing).await?;
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
        for some in holds.chunks(HOLDS_AT_ONCE) {
            let rows: Vec<String> = some.iter().map(|hold| self.hold_row(hold)).collect();
            let text = format!("{}{} ON DUPLICATE KEY UPDATE state = state", self.sql.hold, rows.join(","));
            sql::query(AssertSqlSafe(&text)).execute(&mut *tx).await.map_err(Error::sql(doing))?;
        }
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

fn ints(places: &[Place]) -> impl Iterator<Item = i64> {
    places.iter().filter_map(|place| match place {
        Place::Int(n) => Some(*n),
        Place::Text(_) => None,
    })
}

/// What every read brings: place, timestamp, the payload's length, and the columns of the event.
fn list<'a>(
    spec: &TableSpec,
    of: &dyn Fn(&str) -> Option<&'a Column>,
    place: &str,
    timestamp: Option<&Column>,
) -> String {
    let length = of(&spec.payload).map_or("NULL".to_owned(), |column| column.length("o."));
    let cells = spec.columns.iter().map(|name| match of(name) {
        None => "NULL".to_owned(),
        Some(column) if *name == spec.payload => {
            format!("CASE WHEN {length} <= $1 THEN {} END", column.cell("o."))
        }
        Some(column) if *name == spec.id => column.id("o."),
        Some(column) => column.cell("o."),
    });
    let timestamp = timestamp.map_or("NULL".to_owned(), |column| column.millis("o."));
    [place.to_owned(), timestamp, length.clone()].into_iter().chain(cells).collect::<Vec<_>>().join(", ")
}
