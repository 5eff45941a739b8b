//! What a stream needs in the server: the settings, the slot, and the `publication`. Made where they are
//! missing and that is allowed; else a sentence says what is wrong and what mends it.

use std::fmt;

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};
use tracing::{info, warn};

use super::{
    publication::Wanted,
    rows::{Known, Type},
    wire,
};
use crate::{
    config,
    source::{
        database::{Error, Postgres, Rows, TableSpec, answered, literal, quoted, quoted_table},
        log::{Lsn, Moment},
    },
};

/// Why the log cannot be read now.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// In the words of an operator, with what mends it.
    #[error("{0}")]
    Setup(String),
    /// What only the slot had is lost.
    #[error("{0}")]
    Lost(String),
    #[error(transparent)]
    Database(#[from] Error),
    #[error(transparent)]
    Wire(#[from] wire::Error),
    #[error("{0}: {1}")]
    Malformed(&'static str, super::pgoutput::Malformed),
}

impl Obstacle {
    /// Whether the server missed the publication in the part of the log that it was about to send
    /// (undefined_object).
    pub fn is_before_the_publication(&self) -> bool {
        matches!(self, Obstacle::Wire(error) if error.code() == Some("42704"))
    }
}

/// What the stream of one source is made of.
#[derive(Clone, Debug)]
pub struct Slot {
    pub database: Postgres,
    pub settings: config::Stream,
    /// Names the relays that share a source in the list of the server's connections.
    pub application: String,
}

/// How the slot is, as the server sees it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Health {
    pub retained_bytes: i64,
    /// `None`: the server sets no limit, or knows none.
    pub safe_bytes: Option<i64>,
    pub active: bool,
}

pub(super) struct Found {
    pub plugin: Option<String>,
    pub here: bool,
    pub owner_pid: Option<i32>,
    pub owner: Option<String>,
    pub lost: Option<String>,
}

/// Which server, and which of its histories: a standby that is promoted begins another.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    pub system_identifier: String,
    pub timeline: i64,
}

impl fmt::Display for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "system {}, timeline {}", self.system_identifier, self.timeline)
    }
}

/// What the log was read from last.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Noted {
    identity: Identity,
    /// The version of the publication.
    publication: String,
}

/// What there is to be read.
pub struct Prepared {
    /// Each table's number and columns; `None` where it has none.
    pub tables: Vec<Option<(u32, Vec<Known>)>>,
    /// The version of the publication.
    pub publication: String,
}

struct Server {
    wal_level: String,
    is_standby: bool,
    version: i32,
    identity: Identity,
}

pub(super) fn sql(doing: &'static str) -> impl FnOnce(sqlx::Error) -> Error {
    move |source: sqlx::Error| Error::Sql { doing, source: source.into() }
}

impl Slot {
    /// Everything that the stream needs is there after this. `replaceable`: the slot may be made anew,
    /// because no table depends on what it alone has.
    pub async fn prepare(
        &self,
        specs: &[TableSpec],
        replaceable: bool,
        identity: Identity,
    ) -> Result<Prepared, Obstacle> {
        let server = self.server(identity).await?;
        let (mut found, mut tables) = (Vec::new(), Vec::new());
        for spec in specs {
            if matches!(spec.rows, Rows::Messages { .. }) {
                found.push(None);
                continue;
            }
            match self.columns(spec).await? {
                Some((oid, known)) => {
                    tables.push(Wanted::new(spec, oid, &known));
                    found.push(Some((oid, known)));
                }
                // Its rows stay where they are, wherever that is.
                None if spec.stays() => found.push(None),
                None => return Err(Obstacle::Setup(missing(spec))),
            }
        }
        self.publish(&tables).await?;
        let noted = self.noted().await?;
        let is_new = self.have_slot(&server, replaceable, noted.as_ref()).await?;
        let now = Noted { identity: server.identity, publication: self.version().await? };
        if noted.as_ref() != Some(&now) {
            self.follows_a_change(noted.as_ref(), &now, is_new).await?;
            self.note(&now).await?;
        }
        Ok(Prepared { tables: found, publication: now.publication })
    }

    /// What is to be done, and said, where the server or the publication is not what it was.
    async fn follows_a_change(
        &self,
        before: Option<&Noted>,
        now: &Noted,
        slot_is_new: bool,
    ) -> Result<(), Obstacle> {
        if let Some(before) = before
            && before.identity != now.identity
        {
            warn!(
                slot = self.settings.slot,
                before = %before.identity,
                now = %now.identity,
                "another server has taken over: its log is read, and what only the one before had committed is gone"
            );
        }
        // A new slot has waited for them.
        if !slot_is_new && before.is_none_or(|before| before.publication != now.publication) {
            self.outlive_writers().await?;
        }
        Ok(())
    }

    async fn server(&self, identity: Identity) -> Result<Server, Obstacle> {
        let ask = sqlx::query_as(
            "SELECT current_setting('wal_level') AS wal_level, pg_is_in_recovery() AS is_standby, \
             current_setting('server_version_num')::int AS version",
        );
        let (wal_level, is_standby, version): (String, bool, i32) = answered("ask the server", async {
            ask.fetch_one(&self.database.pool()).await.map_err(sql("ask the server"))
        })
        .await?;
        let server = Server { wal_level, is_standby, version, identity };
        if server.is_standby {
            return Err(Obstacle::Setup("the server is a standby: it cannot be streamed from".into()));
        }
        if server.wal_level != "logical" {
            return Err(Obstacle::Setup(format!(
                "wal_level is {}: set it to logical and restart the server",
                server.wal_level
            )));
        }
        Ok(server)
    }

    /// A table's number and columns; `None` where there is no such table.
    pub async fn columns(&self, table: &TableSpec) -> Result<Option<(u32, Vec<Known>)>, Obstacle> {
        let columns: Vec<(i64, String, i64, i64, bool)> = answered("read the table's columns", async {
            sqlx::query_as(
                "WITH RECURSIVE base(of_type, oid, under) AS ( \
                   SELECT t.oid, t.oid, t.typbasetype FROM pg_type t \
                   WHERE t.oid IN (SELECT atttypid FROM pg_attribute WHERE attrelid = to_regclass($1)) \
                   UNION ALL SELECT base.of_type, t.oid, t.typbasetype FROM base JOIN pg_type t ON t.oid = base.under) \
                 SELECT a.attrelid::bigint, a.attname::text, a.atttypid::bigint, base.oid::bigint, t.typtype = 'e' \
                 FROM pg_attribute a JOIN pg_type t ON t.oid = a.atttypid \
                   JOIN base ON base.of_type = a.atttypid AND base.under = 0 \
                 WHERE a.attrelid = to_regclass($1) AND a.attnum > 0 AND NOT a.attisdropped ORDER BY a.attnum",
            )
            .bind(quoted_table(&table.name))
            .fetch_all(&self.database.pool())
            .await
            .map_err(sql("read the table's columns"))
        })
        .await?;
        let Some((oid, ..)) = columns.first() else { return Ok(None) };
        self.database.tell_apart(table, *oid).await.or_else(|error| match error {
            // The table's own end says so.
            Error::Refused { .. } if table.stays() => Ok(()),
            error => Err(error),
        })?;
        let oid = *oid as u32;
        let known = |(_, name, oid, base, is_enum): (i64, String, i64, i64, bool)| Known {
            name,
            oid: oid as u32,
            kind: Type::new(oid as u32, base as u32, is_enum),
        };
        Ok(Some((oid, columns.into_iter().map(known).collect())))
    }

    /// Has the slot. Whether it had to be made.
    async fn have_slot(
        &self,
        server: &Server,
        replaceable: bool,
        noted: Option<&Noted>,
    ) -> Result<bool, Obstacle> {
        let name = &self.settings.slot;
        let found = self.find().await?;
        if !replaceable && let Some(Noted { identity: made_on, .. }) = noted {
            // What was in it, and in no table, is gone: nobody is to overlook that.
            let lost = match &found {
                None => Some(format!("slot {name} is gone")),
                Some(Found { lost: Some(reason), .. }) => {
                    Some(format!("the server has invalidated slot {name} ({reason})"))
                }
                Some(_) if made_on.system_identifier != server.identity.system_identifier => {
                    Some(format!("slot {name} was made on another server ({})", made_on.system_identifier))
                }
                Some(_) => None,
            };
            if let Some(why) = lost {
                return Err(Obstacle::Lost(format!(
                    "{why}, and with it events that no table has. See what is missing, then begin anew: \
                     whippet teardown, and start the relay again"
                )));
            }
        }
        let Some(found) = found else {
            return self.create(server).await.map(|()| true);
        };
        if found.plugin.as_deref() != Some("pgoutput") || !found.here {
            return Err(Obstacle::Setup(format!(
                "slot {name} is there, but is no pgoutput slot of this database: name another in source.stream.slot"
            )));
        }
        if let Some(pid) = found.owner_pid {
            let owner = found.owner.unwrap_or_default();
            if owner != self.application {
                return Err(Obstacle::Setup(format!(
                    "slot {name} is in use by {owner:?}, process {pid} of the server"
                )));
            }
            // A connection of ours, of before: the lease says that nobody else may have it.
            warn!(
                slot = name,
                pid, "the slot is still held by an old connection of this relay's, which is ended"
            );
            answered("end an old connection", async {
                sqlx::query("SELECT pg_terminate_backend($1)")
                    .bind(pid)
                    .execute(&self.database.pool())
                    .await
                    .map_err(sql("end an old connection"))
            })
            .await?;
        }
        let Some(reason) = found.lost else { return Ok(false) };
        if !replaceable || !self.settings.create {
            return Err(Obstacle::Setup(format!("the server has invalidated slot {name} ({reason})")));
        }
        warn!(slot = name, reason, "the server has invalidated the slot; it is made anew");
        self.drop_slot().await?;
        self.create(server).await.map(|()| true)
    }

    pub(super) async fn find(&self) -> Result<Option<Found>, Error> {
        // Later columns by their JSON, so that one statement is right for every version.
        type Columns = (Option<String>, bool, Option<i32>, Option<String>, Option<String>);
        let found: Option<Columns> = answered("look for the slot", async {
            sqlx::query_as(
                "SELECT s.plugin::text, coalesce(s.database = current_database(), false) AS here, \
                   a.pid AS owner_pid, a.application_name AS owner, \
                   CASE WHEN s.wal_status = 'lost' \
                     THEN coalesce(to_jsonb(s) ->> 'invalidation_reason', 'its WAL was removed: max_slot_wal_keep_size') \
                     ELSE to_jsonb(s) ->> 'invalidation_reason' END AS lost \
                 FROM pg_replication_slots s LEFT JOIN pg_stat_activity a ON a.pid = s.active_pid \
                 WHERE s.slot_name = $1",
            )
            .bind(&self.settings.slot)
            .fetch_optional(&self.database.pool())
            .await
            .map_err(sql("look for the slot"))
        })
        .await?;
        Ok(found.map(|(plugin, here, owner_pid, owner, lost)| Found { plugin, here, owner_pid, owner, lost }))
    }

    async fn create(&self, server: &Server) -> Result<(), Obstacle> {
        let name = &self.settings.slot;
        // From 17 on a slot may follow its server to a standby.
        let failover = if server.version >= 170_000 { ", failover => true" } else { "" };
        let statement =
            format!("SELECT pg_create_logical_replication_slot({}, 'pgoutput'{failover})", literal(name));
        if !self.settings.create {
            return Err(Obstacle::Setup(format!(
                "slot {name} does not exist, and source.stream.create is false: run {statement}"
            )));
        }
        // The server waits for every transaction that is open now, however long that takes.
        info!(slot = name, "making the slot; the server waits for open transactions");
        self.change(&statement).await?;
        info!(slot = name, failover = !failover.is_empty(), "slot made");
        Ok(())
    }

    /// What the relay noted when it began to read the log last.
    async fn noted(&self) -> Result<Option<Noted>, Error> {
        let doing = "look where the slot was";
        let ask = format!(
            "SELECT system_identifier, timeline, publication FROM {}.slots WHERE name = $1",
            quoted(self.database.schema())
        );
        let noted: Option<(String, i64, String)> = answered(doing, async {
            sqlx::query_as(AssertSqlSafe(ask))
                .bind(&self.settings.slot)
                .fetch_optional(&self.database.pool())
                .await
                .map_err(sql(doing))
        })
        .await?;
        Ok(noted.map(|(system_identifier, timeline, publication)| Noted {
            identity: Identity { system_identifier, timeline },
            publication,
        }))
    }

    async fn note(&self, now: &Noted) -> Result<(), Error> {
        let doing = "note where the slot is";
        let note = format!(
            "INSERT INTO {}.slots (name, system_identifier, timeline, publication) VALUES ($1, $2, $3, $4) \
             ON CONFLICT (name) DO UPDATE SET system_identifier = excluded.system_identifier, \
             timeline = excluded.timeline, publication = excluded.publication, noted = now()",
            quoted(self.database.schema())
        );
        answered(doing, async {
            sqlx::query(AssertSqlSafe(note))
                .bind(&self.settings.slot)
                .bind(&now.identity.system_identifier)
                .bind(now.identity.timeline)
                .bind(&now.publication)
                .execute(&self.database.pool())
                .await
                .map_err(sql(doing))
        })
        .await
        .map(drop)
    }

    /// Drops the slot where it is.
    pub async fn drop_slot(&self) -> Result<(), Obstacle> {
        let name = literal(&self.settings.slot);
        self.change(&format!(
            "SELECT pg_drop_replication_slot(slot_name) FROM pg_replication_slots WHERE slot_name = {name}"
        ))
        .await
    }

    /// A statement that may take long, on a connection of its own.
    pub(super) async fn change(&self, statement: &str) -> Result<(), Obstacle> {
        let doing = "prepare the stream";
        let mut connection =
            PgConnection::connect_with(&self.database.options()).await.map_err(sql(doing))?;
        let done = sqlx::raw_sql(AssertSqlSafe(statement)).execute(&mut connection).await;
        connection.close().await.ok();
        match done {
            Ok(_) => Ok(()),
            Err(source) => match source.as_database_error().and_then(|error| error.code()).as_deref() {
                // insufficient_privilege
                Some("42501") => Err(Obstacle::Setup(format!(
                    "this role may not do it ({source}): run `whippet sql` as the owner of the database, and \
                     ALTER ROLE … REPLICATION for this role; the statement was: {statement}"
                ))),
                _ => Err(Obstacle::Database(Error::Sql { doing, source: source.into() })),
            },
        }
    }

    /// `None` where there is no slot.
    pub async fn health(&self) -> Result<Option<Health>, Error> {
        let found: Option<(i64, Option<i64>, bool)> = answered("look at the slot", async {
            sqlx::query_as(
                "SELECT coalesce(pg_wal_lsn_diff(pg_current_wal_lsn(), restart_lsn), 0)::bigint AS retained_bytes, \
                   safe_wal_size AS safe_bytes, active FROM pg_replication_slots WHERE slot_name = $1",
            )
            .bind(&self.settings.slot)
            .fetch_optional(&self.database.pool())
            .await
            .map_err(sql("look at the slot"))
        })
        .await?;
        Ok(found.map(|(retained_bytes, safe_bytes, active)| Health { retained_bytes, safe_bytes, active }))
    }

    /// Writes a heartbeat into the log: it comes back through the stream, and an idle database does not
    /// hold its log.
    pub async fn beat(&self, content: &str) -> Result<Lsn, Error> {
        let at: String = answered("write a heartbeat", async {
            sqlx::query_scalar("SELECT pg_logical_emit_message(false, $1, $2)::text")
                .bind(HEARTBEAT)
                .bind(content)
                .fetch_one(&self.database.pool())
                .await
                .map_err(sql("write a heartbeat"))
        })
        .await?;
        at.parse().map_err(|error| Error::Setup(format!("write a heartbeat: {error}")))
    }
}

pub fn missing(table: &TableSpec) -> String {
    format!("table {} does not exist, or this role cannot see it", table.name)
}

/// The prefix of our own messages in the log.
pub const HEARTBEAT: &str = "whippet.heartbeat";

impl Postgres {
    /// This moment: everything that it sees, polling sees from now on.
    pub async fn moment(&self) -> Result<Moment, Error> {
        let (snapshot, end): (String, String) =
            sqlx::query_as("SELECT pg_current_snapshot()::text, pg_current_wal_insert_lsn()::text")
                .fetch_one(&self.pool())
                .await
                .map_err(sql("note the moment"))?;
        let unreadable = |error| Error::Setup(format!("note the moment: {error}"));
        Ok(Moment::Wal {
            snapshot: snapshot.parse().map_err(unreadable)?,
            end: end.parse().map_err(unreadable)?,
        })
    }
}
