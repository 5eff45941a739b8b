//! The source database, as the poller and the lease keeper use it: one module for each dialect, the
//! same methods. All SQL is made here, from identifiers that were checked against the catalogue and
//! quoted.

pub mod audit;
pub mod ddl;
mod group;
mod holds;
mod kept;
#[cfg(feature = "mysql")]
mod mysql;
mod positions;
#[cfg(feature = "mysql")]
pub use mysql::{Column, Mysql};
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "postgres")]
pub use postgres::Postgres;
#[cfg(feature = "sqlite")]
mod sqlite;
pub use positions::Noted;
#[cfg(feature = "sqlite")]
pub use sqlite::{Near, Sqlite};
pub mod teardown;

#[cfg(any(feature = "mysql", feature = "sqlite"))]
use std::future::ready;
use std::{collections::BTreeSet, convert::Infallible, future::Future, time::Duration};

use tokio::sync::Notify;

use crate::{
    config::{self, AfterPublish, Dialect, Order},
    coordinate::{Part, Seen, standing::Attended},
    doctor::Finding,
    event::{Event, Place},
    source::{
        ClosedKey, Gates, Hold,
        hold::{Filter, Held, Outcome, Over, Request},
        log::{Moment, Unsettled},
    },
};

/// What went wrong with the database, and what the operator can do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Setup(String),
    #[error("the lease was taken by another relay (epoch {0} is not ours any more)")]
    Fenced(i64),
    #[error("{0}: the database does not answer")]
    NoAnswer(&'static str),
    #[error("{doing}: {source}")]
    Sql {
        doing: &'static str,
        #[source]
        source: Fault,
    },
}

/// What a driver says.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Sqlx(#[from] sqlx::Error),
    #[cfg(feature = "mysql")]
    #[error(transparent)]
    Mysql(#[from] mysql_async::Error),
}

/// How long the database may take for one answer.
const ANSWER_WITHIN: Duration = Duration::from_mins(1);

/// An answer, or [`Error::NoAnswer`]: a connection can be dead without anybody telling.
pub async fn answered<T>(
    doing: &'static str,
    answer: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(ANSWER_WITHIN, answer).await.unwrap_or(Err(Error::NoAnswer(doing)))
}

impl Error {
    /// Whether the connections lead to a server that is of no use: one that does not answer, or that
    /// has become a standby (read_only_sql_transaction, or it says that it shuts down).
    pub fn needs_another_connection(&self) -> bool {
        match self {
            Error::NoAnswer(_) => true,
            Error::Sql { source: Fault::Sqlx(source), .. } => {
                let code = source.as_database_error().and_then(|error| error.code());
                matches!(code.as_deref(), Some("25006" | "57P01" | "57P02" | "57P03"))
                    || matches!(source, sqlx::Error::PoolTimedOut)
            }
            #[cfg(feature = "mysql")]
            Error::Sql { source: Fault::Mysql(source), .. } => mysql::needs_another_connection(source),
            Error::Setup(_) | Error::Fenced(_) => false,
        }
    }

    fn sql<E: Into<Fault>>(doing: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::Sql { doing, source: source.into() }
    }
}

/// Where the events of a table are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// In the table, until they are published.
    Stay,
    /// In the log only: the application deletes its rows itself.
    Transient,
    /// In the log only: logical messages with this prefix.
    Messages { prefix: String },
}

/// What a table's poller needs of the table: names as configured, columns in `Row` order.
#[derive(Clone, Debug)]
pub struct TableSpec {
    pub rows: Rows,
    /// `schema.table` or `table`.
    pub name: String,
    /// The columns that an event's row holds, in order.
    pub columns: Vec<String>,
    /// Columns among them that may be absent from the table: they are read as NULL.
    pub optional: Vec<String>,
    pub id: String,
    pub payload: String,
    pub sequence: Option<String>,
    pub order: Order,
    /// The mapped timestamp, else the creation time; whichever of them the table has.
    pub timestamps: Vec<String>,
    pub published_at: Option<String>,
    /// The number of the row's transaction, where rows are kept by it.
    pub tx: Option<String>,
    pub after_publish: AfterPublish,
    /// Published rows that are older are deleted.
    pub retention: Option<Duration>,
    /// A payload above this is not read, in bytes.
    pub max_payload: usize,
    /// Where relays share the table: by what.
    pub shared: Option<Shared>,
}

/// How the rows of a table are shared among relays: by a hash of their key, so that all of a key are one's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// The number of buckets.
    pub buckets: u16,
    /// The key as it goes out, piece by piece. A row without one, and any of a table without order, goes by its
    /// id.
    pub key: Vec<Piece>,
}

/// A piece of a key: a text as it is, or a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Text(String),
    Column(String),
}

#[cfg(any(feature = "postgres", feature = "mysql"))]
impl Shared {
    /// An SQL expression of the text that is hashed: `concat` joins pieces to NULL where one is NULL, and `column` is a
    /// column as text, `None` where the table does not have it.
    fn hashed(
        &self,
        id: String,
        text: impl Fn(&str) -> String,
        column: impl Fn(&str) -> Option<String>,
        concat: impl Fn(&[String]) -> String,
    ) -> String {
        let piece = |piece: &Piece| match piece {
            Piece::Text(literal) => Some(text(literal)),
            Piece::Column(name) => column(name),
        };
        match self.key.iter().map(piece).collect::<Option<Vec<String>>>() {
            Some(pieces) if !pieces.is_empty() => format!("coalesce({}, {id})", concat(&pieces)),
            _ => id,
        }
    }
}

impl TableSpec {
    /// Whether there is a table to be read when the log cannot be.
    pub fn stays(&self) -> bool {
        self.rows == Rows::Stay
    }

    /// Whether rows can be kept by this order column.
    #[cfg(any(feature = "postgres", feature = "sqlite"))]
    fn check_kept(&self, place: &str, kind: &str, is_int: bool) -> Result<(), Error> {
        if is_int || !self.is_kept() {
            return Ok(());
        }
        Err(Error::Setup(format!(
            "column {place} of table {} is of type {kind}, and after_publish: keep goes by an integer order \
             column: map one as columns.sequence, or choose mark",
            self.name
        )))
    }

    /// Whether nothing is written into a row that is published, and it is not deleted either.
    pub fn is_kept(&self) -> bool {
        self.after_publish == AfterPublish::Keep
    }

    /// Whether it is a table, and not messages in the log.
    pub fn is_table(&self) -> bool {
        !matches!(self.rows, Rows::Messages { .. })
    }

    /// Columns that it cannot do without, and that are not among these.
    fn missing<'a>(&'a self, present: &[String]) -> Vec<&'a str> {
        let needed = self.columns.iter().chain(&self.sequence).chain(&self.published_at).chain(&self.tx);
        needed
            .filter(|name| !present.contains(name) && !self.optional.contains(name))
            .map(String::as_str)
            .collect()
    }

    /// Whether a table with these columns, by name and type, has what is needed.
    fn check(&self, columns: &[(String, String)]) -> Result<(), Error> {
        let present: Vec<String> = columns.iter().map(|(name, _)| name.clone()).collect();
        let missing = self.missing(&present);
        if missing.is_empty() { Ok(()) } else { Err(missing_columns(&self.name, &missing, &present)) }
    }
}

/// How far a poller has read, for tables with an integer order column.
///
/// Everything visible up to `cursor` was handed over, is held or is settled, except rows that commit
/// late; those can only appear above `low`: no open transaction holds a smaller number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    pub low: i64,
    pub cursor: i64,
}

impl Reach {
    pub const NOTHING: Reach = Reach { low: i64::MIN, cursor: i64::MIN };
}

/// What one read may bring.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    pub rows: usize,
    /// A payload above this many bytes comes as its length only and is fetched on its own.
    pub inline_bytes: usize,
}

/// A row as it was read.
#[derive(Debug)]
pub struct Found {
    pub event: Event,
    /// The payload's length, where it is not in the row yet.
    pub deferred_bytes: Option<u64>,
}

/// The number of rows that wait and the age of the oldest, by the database's clock.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Backlog {
    /// Capped: see [`BACKLOG_CAP`].
    pub rows: u64,
    pub oldest_seconds: Option<f64>,
}

impl Backlog {
    /// Adds what only the log has.
    pub fn add(&mut self, unsettled: Unsettled) {
        self.rows += unsettled.rows;
        let age = unsettled.since.map(|since| since.elapsed().as_secs_f64());
        self.oldest_seconds = match (self.oldest_seconds, age) {
            (Some(a), Some(b)) => Some(a.max(b)),
            (a, b) => a.or(b),
        };
    }
}

/// Where a read says which buckets it is of.
const OF_BUCKETS: &str = "/* of all buckets */";

/// A statement with that place filled in: `bucket` is an expression of a row's bucket.
fn of_buckets(statement: &str, bucket: &str, buckets: &[u16]) -> String {
    let list: Vec<String> = buckets.iter().map(ToString::to_string).collect();
    let condition =
        if list.is_empty() { "false".into() } else { format!("{bucket} IN ({})", list.join(",")) };
    statement.replace(OF_BUCKETS, &format!(" AND {condition}"))
}

/// What stops events of a table, as it was listed.
#[derive(Clone, Debug)]
pub struct Listed {
    pub gates: Gates,
    /// Rows that are to be replayed.
    pub replays: u64,
    /// Counts the changes: a hold that rests on an older list is refused, where a table is shared.
    pub version: i64,
}

/// Rows that one statement deletes because they are old.
pub const EXPIRED_AT_ONCE: u64 = 5_000;

/// Counting every row of a large backlog costs more than the number is worth.
pub const BACKLOG_CAP: u64 = 100_000;

/// The one lease that relays before the group knew of, and whose it is while there is a group.
pub const LEASE_NAME: &str = "source";
const GROUP: &str = "the group in `members`";

/// A membership that is to be begun, or renewed.
#[derive(Clone, Copy, Debug)]
pub struct Attendance<'a> {
    pub epoch: Option<i64>,
    /// Names the process.
    pub owner: &'a str,
    pub length: Duration,
    /// Into how many buckets the work is cut.
    pub buckets: u16,
    /// What it relays.
    pub tables: &'a BTreeSet<String>,
}

/// A database, by its dialect.
#[derive(Clone, Debug)]
pub enum Database {
    #[cfg(feature = "mysql")]
    Mysql(Mysql),
    #[cfg(feature = "postgres")]
    Postgres(Postgres),
    #[cfg(feature = "sqlite")]
    Sqlite(Sqlite),
}

/// One outbox table of a database.
#[derive(Debug)]
pub enum Outbox {
    #[cfg(feature = "mysql")]
    Mysql(mysql::Outbox),
    #[cfg(feature = "postgres")]
    Postgres(postgres::Outbox),
    #[cfg(feature = "sqlite")]
    Sqlite(sqlite::Outbox),
}

/// The same call on each dialect's own.
macro_rules! each {
    ($self:expr, $inner:ident => $call:expr) => {
        match $self {
            #[cfg(feature = "mysql")]
            Self::Mysql($inner) => $call,
            #[cfg(feature = "postgres")]
            Self::Postgres($inner) => $call,
            #[cfg(feature = "sqlite")]
            Self::Sqlite($inner) => $call,
        }
    };
}

impl Database {
    /// Prepares a pool; connects when it is used.
    pub fn new(source: &config::Source) -> Result<Database, Error> {
        match source.dialect() {
            #[cfg(feature = "mysql")]
            Dialect::Mysql => Ok(Database::Mysql(Mysql::new(source)?)),
            #[cfg(feature = "postgres")]
            Dialect::Postgres => Ok(Database::Postgres(Postgres::new(source)?)),
            #[cfg(feature = "sqlite")]
            Dialect::Sqlite => Ok(Database::Sqlite(Sqlite::new(source)?)),
            #[cfg(not(feature = "mysql"))]
            Dialect::Mysql => Err(Error::Setup("this build has no support for MySQL".into())),
            #[cfg(not(feature = "postgres"))]
            Dialect::Postgres => Err(Error::Setup("this build has no support for PostgreSQL".into())),
            #[cfg(not(feature = "sqlite"))]
            Dialect::Sqlite => Err(Error::Setup("this build has no support for SQLite".into())),
        }
    }

    /// Connects, and makes the relay's own tables where they are missing.
    pub async fn install(&self) -> Result<(), Error> {
        each!(self, db => db.install().await)
    }

    /// Connects, with the password as it is now; makes nothing.
    pub async fn connect(&self) -> Result<(), Error> {
        match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(db) => db.connect().await.map(drop),
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => db.connect().await.map(drop),
            #[cfg(feature = "sqlite")]
            Database::Sqlite(db) => {
                db.pool.acquire().await.map(drop).map_err(Error::sql("open the database"))
            }
        }
    }

    /// What `whippet doctor` finds about the server and these tables.
    pub async fn examine(&self, config: &config::Config, specs: &[TableSpec]) -> Vec<Finding> {
        match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(db) => db.examine(config, specs).await,
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => db.examine(config, specs).await,
            #[cfg(feature = "sqlite")]
            Database::Sqlite(db) => db.examine(config, specs).await,
        }
    }

    /// Throws all connections away: the next ones may lead to another server.
    pub fn renew(&self) {
        match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(db) => db.renew(),
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => db.renew(),
            // A file.
            #[cfg(feature = "sqlite")]
            Database::Sqlite(_) => {}
        }
    }

    /// Begins or renews a membership of the group, and says how that is.
    pub async fn attend(&self, attendance: Attendance<'_>) -> Result<Attended, Error> {
        each!(self, db => db.attend(attendance).await)
    }

    /// Takes parts of the work that are as they were seen. Returns those that it got.
    pub async fn take(&self, epoch: i64, parts: &[Seen]) -> Result<Vec<Part>, Error> {
        each!(self, db => db.take(epoch, parts).await)
    }

    /// Lets parts of the work go.
    pub async fn leave(&self, epoch: i64, parts: &[Seen]) -> Result<(), Error> {
        each!(self, db => db.leave(epoch, parts).await)
    }

    /// Gives a membership up, so that others need not wait.
    pub async fn resign(&self, epoch: i64) -> Result<(), Error> {
        each!(self, db => db.resign(epoch).await)
    }

    /// The delivery unit of a part of the work, which is made the first time.
    pub async fn unit(&self, part: Part) -> Result<Noted, Error> {
        each!(self, db => db.unit(part).await)
    }

    /// Notes a position that Kafka has, if the lease is still of this epoch.
    pub async fn note_position(&self, noted: &Noted, epoch: i64) -> Result<(), Error> {
        each!(self, db => db.note_position(noted, epoch).await)
    }

    /// What tells this server from one that has a copy of its data, where it can be told; else nothing.
    pub async fn server(&self) -> Result<String, Error> {
        match self {
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => db.system_identifier().await,
            #[cfg(any(feature = "mysql", feature = "sqlite"))]
            _ => ready(Ok(String::new())).await,
        }
    }

    /// This moment of the database: what it sees, every later read sees.
    pub async fn moment(&self) -> Result<Moment, Error> {
        match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(db) => db.moment().await,
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => db.moment().await,
            #[cfg(feature = "sqlite")]
            Database::Sqlite(_) => ready(Err(Error::Setup("SQLite has no log to follow".into()))).await,
        }
    }

    /// Checks the table against the catalogue and makes its statements.
    pub async fn outbox(&self, spec: &TableSpec) -> Result<Outbox, Error> {
        match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(db) => Ok(Outbox::Mysql(db.outbox(spec).await?)),
            #[cfg(feature = "postgres")]
            Database::Postgres(db) if spec.stays() => Ok(Outbox::Postgres(db.outbox(spec).await?)),
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => Ok(Outbox::Postgres(postgres::Outbox::of_released(db, spec))),
            #[cfg(feature = "sqlite")]
            Database::Sqlite(db) => Ok(Outbox::Sqlite(db.outbox(spec).await?)),
        }
    }

    /// Passes on every hint that rows were committed, until the connection fails; waits for ever
    /// where the dialect has no hints.
    pub async fn listen(&self, table: &str, heard: &Notify) -> Result<Infallible, Error> {
        each!(self, db => db.listen(table, heard).await)
    }
}

impl Outbox {
    /// Whether reads go by an integer cursor; else each read starts at the head.
    pub fn has_cursor(&self) -> bool {
        each!(self, outbox => outbox.has_cursor())
    }

    /// Hands the closed keys to `piece`, some at a time, then returns the rest of the gates.
    pub async fn gates<F: Future<Output = ()>>(
        &self,
        piece: impl FnMut(Vec<ClosedKey>) -> F,
    ) -> Result<Listed, Error> {
        each!(self, outbox => outbox.gates(piece).await)
    }

    /// Held events, the oldest first.
    pub async fn list(&self, filter: &Filter, limit: i64) -> Result<Vec<Held>, Error> {
        each!(self, outbox => outbox.list(filter, limit).await)
    }

    /// The payload of a row, by the text of its place, for a person to read.
    pub async fn payload_text(&self, place: &str) -> Result<String, Error> {
        each!(self, outbox => outbox.payload_text(place).await)
    }

    /// A row by the text of its place, without its payload if that is large; `None` where it is gone.
    pub async fn one(&self, place: &str) -> Result<Option<Found>, Error> {
        each!(self, outbox => outbox.one(place).await)
    }

    /// How long the oldest parked event has been parked, in seconds.
    pub async fn oldest_parked(&self) -> Result<Option<f64>, Error> {
        each!(self, outbox => outbox.oldest_parked().await)
    }

    /// Releases what is held for a topic, if the lease is still of this epoch.
    pub async fn release(&self, over: &Over, epoch: i64) -> Result<u64, Error> {
        each!(self, outbox => outbox.release(over, epoch).await)
    }

    /// Carries out an operator's verb, if the lease is still of this epoch.
    pub async fn apply(&self, request: &Request, epoch: i64) -> Result<Outcome, Error> {
        each!(self, outbox => outbox.apply(request, epoch).await)
    }

    /// Published rows that are to be published again, in order.
    pub async fn replays(&self, limits: Limits, buckets: Option<&[u16]>) -> Result<Vec<Found>, Error> {
        each!(self, outbox => outbox.replays(limits, buckets).await)
    }

    /// These rows were published again.
    pub async fn replayed(&self, places: &[String]) -> Result<(), Error> {
        each!(self, outbox => outbox.replayed(places).await)
    }

    /// One read: one statement, one snapshot; of these buckets only, if not of all. `known` are the places that
    /// were handed over and are not recorded (all of them, or those above `reach.low` where there is a cursor),
    /// and `skip_held` says whether the table has held rows to leave out.
    pub async fn read(
        &self,
        reach: Reach,
        known: &[Place],
        limits: Limits,
        skip_held: bool,
        buckets: Option<&[u16]>,
    ) -> Result<Vec<Found>, Error> {
        each!(self, outbox => outbox.read(reach, known, limits, skip_held, buckets).await)
    }

    /// The event with its payload, which is NULL where the row is gone.
    pub async fn with_payload(&self, event: Event) -> Result<Event, Error> {
        each!(self, outbox => outbox.with_payload(event).await)
    }

    /// Deletes or marks settled rows, if the lease is still of this epoch. Returns how many it has found.
    pub async fn record(&self, places: &[Place], epoch: i64) -> Result<u64, Error> {
        each!(self, outbox => outbox.record(places, epoch).await)
    }

    /// The places of held events from this one on, for events without a row: the log may bring them again.
    pub async fn held_from(&self, place: &Place) -> Result<Vec<Place>, Error> {
        match self {
            #[cfg(feature = "mysql")]
            Outbox::Mysql(_) => {
                ready(Err(Error::Setup(format!("MySQL's log could not bring {place} again")))).await
            }
            #[cfg(feature = "postgres")]
            Outbox::Postgres(outbox) => outbox.held_from(place).await,
            #[cfg(feature = "sqlite")]
            Outbox::Sqlite(_) => {
                ready(Err(Error::Setup(format!("SQLite has no log that could bring {place} again")))).await
            }
        }
    }

    /// Deletes some rows that were published longer ago than they are kept, if the lease is still of this
    /// epoch. Returns how many.
    pub async fn expire(&self, kept: Duration, epoch: i64) -> Result<u64, Error> {
        each!(self, outbox => outbox.expire(kept, epoch).await)
    }

    /// Commits holds, if the lease is still of this epoch. `false` where they rest on gates that another relay has
    /// changed since.
    pub async fn hold(&self, holds: &[Hold], epoch: i64, version: i64) -> Result<bool, Error> {
        each!(self, outbox => outbox.hold(holds, epoch, version).await)
    }

    /// The transactions that may still commit rows with numbers given out before now.
    pub async fn writers(&self) -> Result<Vec<String>, Error> {
        each!(self, outbox => outbox.writers().await)
    }

    /// What waits in the table, held rows apart.
    pub async fn backlog(&self) -> Result<Backlog, Error> {
        each!(self, outbox => outbox.backlog().await)
    }
}

/// A double-quoted identifier, safe in any statement of PostgreSQL and SQLite.
pub(super) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `schema.table` or `table`, quoted part by part.
pub(super) fn quoted_table(name: &str) -> String {
    name.split('.').map(quoted).collect::<Vec<_>>().join(".")
}

/// The role in a URL, for the grants.
fn role(url: &str) -> Option<String> {
    let (user, _) = url.split_once("://")?.1.split_once('@')?;
    let user = user.split(':').next().unwrap_or_default();
    (!user.is_empty()).then(|| user.to_owned())
}

/// A string literal, for constants inside statements.
pub(super) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// The error for columns that are configured and not there.
fn missing_columns(table: &str, missing: &[&str], present: &[String]) -> Error {
    let named = |name: &&str| match nearest(name, present) {
        Some(near) => format!("{name:?} (did you mean {near:?}?)"),
        None => format!("{name:?}"),
    };
    Error::Setup(format!(
        "table {table} has no column {}; it has {}. Map the names under `columns`, or make the \
         table with `whippet sql`",
        missing.iter().map(named).collect::<Vec<_>>().join(", "),
        present.join(", "),
    ))
}

fn nearest<'a>(name: &str, present: &'a [String]) -> Option<&'a str> {
    present
        .iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate.as_str()))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_and_literals_cannot_break_out() {
        assert_eq!(quoted_table("public.outbox"), r#""public"."outbox""#);
        assert_eq!(quoted(r#"a"; drop table x"#), r#""a""; drop table x""#);
        assert_eq!(literal("it's"), "'it''s'");
    }
}
