//! SQLite: for the demo, for small applications, and for the spool of ingest.
//!
//! Writers take turns, so a number from AUTOINCREMENT is also the commit order: no row appears below
//! the cursor, and one connection at a time is enough.

mod doctor;
mod group;
mod holds;
mod kept;

use std::{convert::Infallible, str::FromStr, sync::Arc, time::Duration};

use futures_util::TryStreamExt as _;
use sqlx::{
    AssertSqlSafe, Row as _, ValueRef as _,
    sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions, SqliteRow},
};
use tokio::sync::{Mutex, MutexGuard, Notify};

use self::kept::{KeptSql, Parts};
use super::{
    BACKLOG_CAP, Backlog, EXPIRED_AT_ONCE, Error, Found, GROUP, LEASE_NAME, Limits, Reach, TableSpec, ddl,
    holds::{FIXED, HoldsSql, hold_again},
    literal, quoted,
};
use crate::{
    config::{self, AfterPublish},
    event::{Event, Place, Row},
    source::Hold,
};

/// How often a table is read for commits that were heard of, at most.
const WAKE_EVERY: Duration = Duration::from_millis(5);
/// A lease that ends with its process, whose lock tells others so: the end of the year 9999.
const FOR_EVER: i64 = 253_402_300_799;

#[derive(Clone, Debug)]
pub struct Sqlite {
    pub(super) pool: SqlitePool,
    prefix: String,
    near: Near,
}

/// What writers of one file in one process have in common.
#[derive(Clone, Debug, Default)]
pub struct Near {
    /// Whose turn it is to write. SQLite would let them sleep and try again, in no order.
    pub turn: Arc<Mutex<()>>,
    /// Notified when rows were committed.
    pub committed: Arc<Notify>,
}

impl Sqlite {
    /// A file that this process alone uses, and another part of it writes too.
    pub fn shared(options: SqliteConnectOptions, near: Near) -> Sqlite {
        let pool = SqlitePoolOptions::new().max_connections(2).connect_lazy_with(options);
        Sqlite { pool, prefix: "whippet".into(), near }
    }

    /// Becomes the only member for good: the caller's lock says that nobody else is one. Returns its epoch.
    pub async fn seize(&self, owner: &str) -> Result<i64, Error> {
        let doing = "take the lease";
        let members = self.own("members");
        let nobody = format!("DELETE FROM {members}");
        sqlx::query(AssertSqlSafe(nobody)).execute(&self.pool).await.map_err(Error::sql(doing))?;
        let join = format!(
            "INSERT INTO {members} (owner, expires_at, tables) VALUES (?1, {FOR_EVER}, '[]') RETURNING epoch"
        );
        let join = sqlx::query_scalar(AssertSqlSafe(join)).bind(owner);
        join.fetch_one(&self.pool).await.map_err(Error::sql(doing))
    }

    pub fn new(source: &config::Source) -> Result<Sqlite, Error> {
        let options = SqliteConnectOptions::from_str(source.url.expose())
            .map_err(|error| Error::Setup(format!("source.url: {error}")))?
            // The journal mode is the application's choice: changing it needs the file for itself.
            .busy_timeout(Duration::from_secs(5));
        let pool =
            SqlitePoolOptions::new().max_connections(source.max_connections).connect_lazy_with(options);
        Ok(Sqlite { pool, prefix: source.relay_schema.clone(), near: Near::default() })
    }

    pub async fn install(&self) -> Result<(), Error> {
        for statement in ddl::relay_tables_sqlite(&self.prefix) {
            sqlx::query(AssertSqlSafe(statement))
                .execute(&self.pool)
                .await
                .map_err(Error::sql("make the relay's own tables"))?;
        }
        Ok(())
    }

    /// Keeps a relay of an older version, which knows of one lease only, from working beside the group. `false`
    /// where one works now.
    async fn hold_off_older(&self, length: Duration) -> Result<bool, Error> {
        // Seconds since the Unix epoch, with fractions: the database and the relay share one host.
        let sql = format!(
            "INSERT INTO {leases} AS l (name, owner, epoch, expires_at) \
             VALUES (?1, ?2, 1, unixepoch('subsec') + ?3) \
             ON CONFLICT (name) DO UPDATE SET \
               epoch = CASE WHEN l.owner = excluded.owner THEN l.epoch ELSE l.epoch + 1 END, \
               owner = excluded.owner, expires_at = excluded.expires_at \
             WHERE l.owner = excluded.owner OR l.expires_at <= unixepoch('subsec')",
            leases = self.own("leases")
        );
        let done = sqlx::query(AssertSqlSafe(sql))
            .bind(LEASE_NAME)
            .bind(GROUP)
            .bind(length.as_secs_f64())
            .execute(&self.pool)
            .await
            .map_err(Error::sql("renew the lease"))?;
        Ok(done.rows_affected() > 0)
    }

    async fn join(&self, join: &str, owner: &str, micros: i64, tables: &str) -> Result<i64, Error> {
        let join = sqlx::query(AssertSqlSafe(join)).bind(owner).bind(micros).bind(tables);
        let done = join.execute(&self.pool).await.map_err(Error::sql("join the group"))?;
        Ok(done.last_insert_rowid())
    }

    pub(super) fn pool(&self) -> SqlitePool {
        self.pool.clone()
    }

    pub async fn outbox(&self, spec: &TableSpec) -> Result<Outbox, Error> {
        let columns: Vec<(String, String)> =
            sqlx::query_as("SELECT name, upper(type) FROM pragma_table_info(?1)")
                .bind(&spec.name)
                .fetch_all(&self.pool)
                .await
                .map_err(Error::sql("read the table's columns"))?;
        if columns.is_empty() {
            return Err(Error::Setup(format!(
                "table {} does not exist: make it with `whippet sql`, or mend tables[].name",
                spec.name
            )));
        }
        Outbox::new(self, spec, &columns)
    }

    /// SQLite tells other processes nothing: this is about writers in this one.
    pub async fn listen(&self, _table: &str, heard: &Notify) -> Result<Infallible, Error> {
        loop {
            self.near.committed.notified().await;
            heard.notify_one();
            tokio::time::sleep(WAKE_EVERY).await;
        }
    }

    fn own(&self, name: &str) -> String {
        holds::own(&self.prefix, name)
    }
}

#[derive(Debug)]
pub struct Outbox {
    name: String,
    pool: SqlitePool,
    turn: Arc<Mutex<()>>,
    holds: HoldsSql,
    read_replays: String,
    read_one: String,
    replayed: String,
    place_is_int: bool,
    columns: usize,
    payload_index: Option<usize>,
    max_payload: u64,
    read: String,
    read_skipping_held: String,
    payload: String,
    record: String,
    expire: String,
    hold: String,
    epoch: String,
    backlog: String,
    /// Where rows stay when they are published.
    kept: Option<KeptSql>,
}

impl Outbox {
    fn new(db: &Sqlite, spec: &TableSpec, columns: &[(String, String)]) -> Result<Outbox, Error> {
        let type_of =
            |name: &str| columns.iter().find(|(column, _)| column == name).map(|(_, kind)| kind.as_str());
        spec.check(columns)?;
        let place = spec.sequence.as_ref().unwrap_or(&spec.id);
        let place_is_int = type_of(place).is_some_and(|kind| kind.contains("INT"));
        spec.check_kept(place, type_of(place).unwrap_or_default(), place_is_int)?;
        let timestamp = spec.timestamps.iter().find(|name| type_of(name).is_some());
        let timestamp_is_text =
            timestamp.is_some_and(|name| !type_of(name).is_some_and(|kind| kind.contains("INT")));

        let table = quoted(&spec.name);
        let seq = quoted(place);
        let (own_holds, members) = (db.own("holds"), db.own("members"));
        let name = literal(&spec.name);
        let payload = quoted(&spec.payload);
        // Of a row's header: the payload itself is not read for it.
        let length = format!("octet_length(o.{payload})");
        let cells: Vec<String> = spec
            .columns
            .iter()
            .map(|column| match type_of(column) {
                None => "NULL".to_owned(),
                Some(_) => {
                    // Text and blobs untouched; a number as its text.
                    let cell = quoted(column);
                    let cell = format!(
                        "CASE typeof(o.{cell}) WHEN 'blob' THEN o.{cell} ELSE CAST(o.{cell} AS TEXT) END"
                    );
                    match *column == spec.payload {
                        true => format!("CASE WHEN {length} <= ?4 THEN {cell} END"),
                        false => cell,
                    }
                }
            })
            .collect();
        let timestamp_cell = match timestamp {
            None => "NULL".to_owned(),
            Some(column) if timestamp_is_text => {
                // ISO 8601 text, as CURRENT_TIMESTAMP writes it: UTC.
                format!("CAST(round(unixepoch(o.{}, 'subsec') * 1000) AS INTEGER)", quoted(column))
            }
            Some(column) => format!("o.{}", quoted(column)),
        };
        let place_cell = match place_is_int {
            true => format!("o.{seq}"),
            false => format!("CAST(o.{seq} AS TEXT)"),
        };
        let pending = match (&spec.after_publish, &spec.published_at) {
            (AfterPublish::Mark, Some(column)) => format!(" AND o.{} IS NULL", quoted(column)),
            _ => String::new(),
        };
        let unheld = format!(
            " AND NOT EXISTS (SELECT 1 FROM {own_holds} h \
              WHERE h.table_name = {name} AND h.place = CAST(o.{seq} AS TEXT))"
        );
        let list = format!("{place_cell}, {timestamp_cell}, {length}, {}", cells.join(", "));
        let read = |unheld: &str| {
            // `?1`: the cursor. `?2`: what is known, as JSON, where there is no cursor.
            let from = match place_is_int {
                true => format!("o.{seq} > ?1 AND ?2 IS NOT NULL"),
                false => format!(
                    "?1 IS NOT NULL AND CAST(o.{seq} AS TEXT) NOT IN (SELECT value FROM json_each(?2))"
                ),
            };
            let order = if spec.sequence.is_some() { format!(" ORDER BY o.{seq}") } else { String::new() };
            format!("SELECT {list} FROM {table} o WHERE {from}{pending}{unheld}{order} LIMIT ?3")
        };
        let places = match place_is_int {
            true => "(SELECT value FROM json_each(?1))",
            false => "(SELECT CAST(value AS TEXT) FROM json_each(?1))",
        };
        let matches = match place_is_int {
            true => format!("{seq} IN {places}"),
            false => format!("CAST({seq} AS TEXT) IN {places}"),
        };
        let fence = format!("EXISTS (SELECT 1 FROM {members} m WHERE m.epoch = ?2)");
        let record = match (&spec.after_publish, &spec.published_at) {
            (AfterPublish::Mark, Some(column)) => format!(
                "UPDATE {table} SET {} = strftime('%Y-%m-%dT%H:%M:%fZ') WHERE {matches} AND {fence}",
                quoted(column)
            ),
            _ => format!("DELETE FROM {table} WHERE {matches} AND {fence}"),
        };
        let expire = match &spec.published_at {
            Some(column) => format!(
                "DELETE FROM {table} WHERE {seq} IN (SELECT i.{seq} FROM {table} i \
                   WHERE i.{column} < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-' || $1 || ' seconds') \
                     AND NOT EXISTS (SELECT 1 FROM {replays} r \
                       WHERE r.table_name = {name} AND r.place = CAST(i.{seq} AS TEXT)) \
                   LIMIT {EXPIRED_AT_ONCE}) AND {fence}",
                column = quoted(column),
                replays = quoted(&format!("{}_replays", db.prefix)),
                name = literal(&spec.name),
            ),
            None => String::new(),
        };
        let age = match (timestamp, timestamp_is_text) {
            (None, _) => "NULL".to_owned(),
            (Some(_), _) => format!("unixepoch('subsec') - {timestamp_cell} / 1000.0"),
        };
        let own = |name: &str| db.own(name);
        let kept = spec.is_kept().then(|| {
            // The longest payload that comes along is the fifth parameter here.
            let list = list.replace("?4", "?5");
            KeptSql::new(db, &Parts { spec, seq: &seq, list: &list, age: &age, fence: &fence })
        });
        let settled = spec.is_kept().then(|| kept::settled(db, spec, &seq));
        let dialect = holds::dialect(&own, spec, place, place_is_int, settled);
        Ok(Outbox {
            name: spec.name.clone(),
            holds: HoldsSql::new(spec, &dialect),
            read_one: HoldsSql::read_one(&dialect, &list.replace("?4", "$2")),
            read_replays: HoldsSql::read_replays(spec, &dialect, &list.replace("?4", "$2")),
            pool: db.pool.clone(),
            turn: db.near.turn.clone(),
            place_is_int,
            columns: spec.columns.len(),
            payload_index: spec.columns.iter().position(|column| *column == spec.payload),
            max_payload: spec.max_payload as u64,
            read: read(""),
            read_skipping_held: read(&unheld),
            payload: format!("SELECT CAST(o.{payload} AS BLOB) FROM {table} o WHERE o.{seq} = ?1"),
            expire,
            record,
            hold: format!(
                "INSERT INTO {own_holds} AS h (table_name, place, event_id, topic, key, state, cause, reason, attempts) \
                 SELECT {name}, ?1, ?3, ?4, ?5, ?6, ?7, ?8, ?9 WHERE {fence} \
                 ON CONFLICT (table_name, place) DO {again}",
                again = hold_again(spec)
            ),
            kept,
            replayed: format!(
                "DELETE FROM {} WHERE table_name = {name} AND place IN (SELECT value FROM json_each($1))",
                db.own("replays")
            ),
            epoch: format!("SELECT epoch FROM {members} WHERE epoch = ?1"),
            backlog: format!(
                "SELECT (SELECT count(*) FROM (SELECT 1 FROM {table} o WHERE true{pending}{unheld} \
                   LIMIT {BACKLOG_CAP})), \
                 (SELECT {age} FROM {table} o WHERE true{pending}{unheld} ORDER BY o.{seq} LIMIT 1)"
            ),
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
        _buckets: Option<&[u16]>,
    ) -> Result<Vec<Found>, Error> {
        let sql = if skip_held { &self.read_skipping_held } else { &self.read };
        let known = if self.place_is_int { "[]".to_owned() } else { json(known) };
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

    fn decode(&self, row: &SqliteRow) -> Result<Found, sqlx::Error> {
        let place = match self.place_is_int {
            true => Place::Int(row.try_get(0)?),
            false => Place::Text(row.try_get::<&str, _>(0)?.into()),
        };
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
                timestamp_ms: row.try_get_unchecked(1)?,
                unread_bytes: missing.filter(|bytes| *bytes > self.max_payload),
                replay: None,
            },
            deferred_bytes: missing.filter(|bytes| *bytes <= self.max_payload),
        })
    }

    pub async fn with_payload(&self, event: Event) -> Result<Event, Error> {
        let query = sqlx::query(AssertSqlSafe(self.payload.as_str()));
        let query = match &event.place {
            Place::Int(n) => query.bind(*n),
            Place::Text(text) => query.bind(text.to_string()),
        };
        let row = query.fetch_optional(&self.pool).await.map_err(Error::sql("read a large payload"))?;
        // Borrowed: it may be large.
        let payload: Option<Option<&[u8]>> =
            row.as_ref().map(|row| row.try_get(0)).transpose().map_err(Error::sql("read a large payload"))?;
        let row = self.payload_index.map(|index| event.row.with(index, payload.flatten()));
        Ok(Event { row: row.unwrap_or_default(), ..event })
    }

    /// Waits until it is our turn to write.
    async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    pub async fn record(&self, places: &[Place], epoch: i64) -> Result<u64, Error> {
        let _turn = self.turn().await;
        let done = sqlx::query(AssertSqlSafe(self.record.as_str()))
            .bind(json(places))
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
        let done = sqlx::query(AssertSqlSafe(self.expire.as_str()))
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
            let done = sqlx::query(AssertSqlSafe(self.hold.as_str()))
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

    async fn check_fence(&self, epoch: i64) -> Result<(), Error> {
        let current: Option<i64> = sqlx::query_scalar(AssertSqlSafe(self.epoch.as_str()))
            .bind(epoch)
            .fetch_optional(&self.pool)
            .await
            .map_err(Error::sql("check the lease"))?;
        if current == Some(epoch) { Ok(()) } else { Err(Error::Fenced(epoch)) }
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
        let (rows, oldest_seconds): (i64, Option<f64>) = sqlx::query_as(AssertSqlSafe(self.backlog.as_str()))
            .fetch_one(&self.pool)
            .await
            .map_err(Error::sql("count what waits"))?;
        Ok(Backlog { rows: rows.unsigned_abs(), oldest_seconds })
    }
}

/// Texts as a JSON array.
fn json_texts(texts: &[String]) -> String {
    serde_json::Value::from(texts.to_vec()).to_string()
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
