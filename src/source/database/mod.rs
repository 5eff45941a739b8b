//! The source database, as the poller and the lease keeper use it: one module for each dialect, the
//! same methods. All SQL is made here, from identifiers that were checked against the catalogue and
//! quoted.

pub mod audit;
#[cfg(any(feature = "postgres", feature = "mysql"))]
mod claims;
pub mod ddl;
mod error;
mod group;
mod holds;
mod kept;
#[cfg(feature = "mysql")]
mod mysql;
mod names;
mod place;
mod positions;
#[cfg(feature = "mysql")]
pub use mysql::{Column, Mysql, position};
#[cfg(feature = "postgres")]
mod postgres;
#[cfg(feature = "postgres")]
pub use postgres::Postgres;
mod spec;
#[cfg(feature = "sqlite")]
mod sqlite;
pub mod teardown;
pub(super) use names::{literal, quoted, quoted_table};
#[cfg(all(test, feature = "sqlite"))]
pub(super) use place::tests::spec as a_spec;
#[cfg(feature = "sqlite")]
pub use sqlite::{Near, Sqlite};
pub use {
    error::{Error, Fault, answered},
    place::Placing,
    positions::{Noted, unit_id},
    spec::{Piece, Rows, Shared, TableSpec},
};

#[cfg(any(feature = "mysql", feature = "sqlite"))]
use std::future::ready;
use std::{collections::BTreeSet, convert::Infallible, future::Future, time::Duration};

use tokio::sync::Notify;

use crate::{
    config::{self, Dialect},
    coordinate::{Part, Seen, View, standing::Attended},
    doctor::Finding,
    event::{Event, Place},
    source::{
        ClosedKey, Gates, Hold,
        hold::{Filter, Held, Outcome, Over, Request, Verb},
        kept::Runs,
        log::{Moment, Unsettled, position::Position},
    },
};

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

/// Places that a read leaves out.
#[derive(Clone, Debug, Default)]
pub struct LeftOut {
    pub numbers: Runs,
    pub texts: Vec<Place>,
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
    /// Exactly once: how many relays may work; else 0.
    pub units: u16,
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

/// The same about rows that were published, which are elsewhere where only a log tells what is new.
macro_rules! of_rows {
    ($self:expr, $inner:ident => $call:expr) => {
        match $self {
            #[cfg(feature = "mysql")]
            Self::Mysql($inner) => {
                let $inner = $inner.rows()?;
                $call
            }
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

    /// What an error calls for before a statement is tried again.
    pub fn failed(&self, error: &Error) {
        if let Some(age) = error.renews_older_than() {
            match self {
                #[cfg(feature = "mysql")]
                Database::Mysql(db) => db.renew(age),
                #[cfg(feature = "postgres")]
                Database::Postgres(db) => db.renew(age),
                // A file, whatever its age.
                #[cfg(feature = "sqlite")]
                Database::Sqlite(_) => _ = age,
            }
        }
        if error.refuses_login() {
            match self {
                #[cfg(feature = "mysql")]
                Database::Mysql(db) => db.login_refused(),
                #[cfg(feature = "postgres")]
                Database::Postgres(db) => db.login_refused(),
                // A file.
                #[cfg(feature = "sqlite")]
                Database::Sqlite(_) => {}
            }
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

    /// Takes everything that a member has left who is gone. Returns how many parts that were.
    pub async fn inherit(&self, epoch: i64, gone: i64) -> Result<u64, Error> {
        each!(self, db => db.inherit(epoch, gone).await)
    }

    /// Lets everything go.
    pub async fn leave_all(&self, epoch: i64) -> Result<(), Error> {
        each!(self, db => db.leave_all(epoch).await)
    }

    /// The group, in one snapshot.
    pub async fn look(&self) -> Result<View, Error> {
        each!(self, db => db.look().await)
    }

    /// What the ids of all delivery units of this source begin with, made the first time.
    pub async fn units(&self) -> Result<String, Error> {
        each!(self, db => db.units().await)
    }

    /// The delivery unit of a slot, which is made the first time.
    pub async fn unit(&self, units: &str, slot: u16) -> Result<Noted, Error> {
        each!(self, db => db.unit(units, slot).await)
    }

    /// The delivery units that have a position, and the statement that has them forgotten.
    pub async fn noted(&self) -> Result<(Vec<Noted>, String), Error> {
        each!(self, db => db.noted().await)
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
    /// Whether its connections are those that are to be had now; the other drivers change those of a pool that there is.
    pub fn is_current(&self) -> bool {
        match self {
            #[cfg(feature = "mysql")]
            Outbox::Mysql(outbox) => outbox.is_current(),
            #[cfg(feature = "postgres")]
            Outbox::Postgres(_) => true,
            #[cfg(feature = "sqlite")]
            Outbox::Sqlite(_) => true,
        }
    }

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
        match request.verb {
            Verb::Replay(_) => of_rows!(self, outbox => outbox.apply(request, epoch).await),
            _ => each!(self, outbox => outbox.apply(request, epoch).await),
        }
    }

    /// Published rows that are to be published again, in order.
    pub async fn replays(&self, limits: Limits, buckets: Option<&[u16]>) -> Result<Vec<Found>, Error> {
        of_rows!(self, outbox => outbox.replays(limits, buckets).await)
    }

    /// These rows were published again.
    pub async fn replayed(&self, places: &[String]) -> Result<(), Error> {
        of_rows!(self, outbox => outbox.replayed(places).await)
    }

    /// Whether what was committed by then, without a time by now, is published or held, as far as only a log tells it.
    /// What is replayed before may not have been published yet.
    #[cfg_attr(not(feature = "mysql"), expect(clippy::unused_async, reason = "asks MySQL"))]
    pub async fn is_settled(&self, by: &mut Option<Position>) -> Result<bool, Error> {
        match self {
            #[cfg(feature = "mysql")]
            Outbox::Mysql(outbox) => outbox.is_settled(by).await,
            #[cfg(any(feature = "postgres", feature = "sqlite"))]
            // Which is so: nobody has noted a time.
            _ => Ok(by.is_none()),
        }
    }

    /// One read: one statement, one snapshot; of these buckets only, if not of all. `known` are the places that
    /// were handed over and are not recorded (all of them, or the numbers above `reach.low` where there is a cursor),
    /// and `skip_held` says whether the table has held rows to leave out.
    pub async fn read(
        &self,
        reach: Reach,
        known: &LeftOut,
        limits: Limits,
        skip_held: bool,
        buckets: Option<&[u16]>,
    ) -> Result<Vec<Found>, Error> {
        each!(self, outbox => outbox.read(reach, known, limits, skip_held, buckets).await)
    }

    /// The event with its payload; `None` where the row is gone.
    pub async fn with_payload(&self, event: Event) -> Result<Option<Event>, Error> {
        match event.replay {
            Some(_) => of_rows!(self, outbox => outbox.with_payload(event).await),
            None => each!(self, outbox => outbox.with_payload(event).await),
        }
    }

    /// Deletes or marks settled rows, if the lease is still of this epoch. Returns how many it has found.
    pub async fn record(&self, places: &[Place], epoch: i64) -> Result<u64, Error> {
        each!(self, outbox => outbox.record(places, epoch).await)
    }

    /// The places of held events from this one on, for events without a row: the log may bring them again.
    pub async fn held_from(&self, place: &Place) -> Result<Vec<Place>, Error> {
        match self {
            #[cfg(feature = "mysql")]
            Outbox::Mysql(outbox) => outbox.contents_from(place).await,
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
