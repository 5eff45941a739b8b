//! How far the binlog was read for tables whose rows do not stay, and what tells whether it can be gone on with.

use mysql_async::{Conn, prelude::Queryable as _};
use sqlx::AssertSqlSafe;

use super::{Mysql, doctor::variable, log::Flavor, sql};
use crate::source::{
    database::Error,
    log::{gtids::GtidSet, position::Position},
};

/// The reader of the log whose position it is: there is one.
const NAME: &str = "transient";
const ASK: &str = "ask how far the binlog goes";
/// An event that is longer has one row only: see `metadata_refusal`.
pub const ROWS_OF_ONE_EVENT: u64 = 1 << 20;

/// A position as the relay's own table has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Stored {
    pub position: Position,
    /// The server that it was read on: a UUID, or of MariaDB a number.
    pub server: String,
    /// The file that it is in there, and when that was made: the same name may come again. Empty, or 0, before that is
    /// known.
    pub file: String,
    pub made: u32,
    /// Tells logs apart whose places cannot be compared: of a later one it is greater.
    pub era: i64,
}

/// The log as it is now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogNow {
    pub server: String,
    /// Its end.
    pub position: Position,
    /// Transactions that are in no file any more.
    pub purged: GtidSet,
    pub files: Vec<String>,
    /// The server's clock, in seconds since 1970.
    pub seconds: i64,
}

impl Mysql {
    /// The statements for an operator: to go on behind a transaction, and to begin anew.
    pub fn go_on(&self, from: &Position) -> String {
        format!("UPDATE {} SET kind = '{}', position = '{from}'", self.own("binlog"), from.kind())
    }

    pub fn begin_anew(&self) -> String {
        format!("DELETE FROM {}", self.own("binlog"))
    }

    pub async fn stored(&self) -> Result<Option<Stored>, Error> {
        let doing = "look how far the binlog was read";
        let text = format!(
            "SELECT kind, position, server, file, made, era FROM {} WHERE name = '{NAME}'",
            self.own("binlog")
        );
        let found: Option<(String, String, String, String, u32, i64)> = sql::query_as(AssertSqlSafe(&text))
            .fetch_optional(&self.pool())
            .await
            .map_err(Error::sql(doing))?;
        let Some((kind, position, server, file, made, era)) = found else { return Ok(None) };
        let position = Position::parse(&kind, &position).map_err(|_| {
            Error::Setup(format!("what {} says of the binlog is no position", self.own("binlog")))
        })?;
        Ok(Some(Stored { position, server, file, made, era }))
    }

    /// Notes how far the log was read, if the lease is still of this epoch.
    pub async fn store(&self, stored: &Stored, epoch: i64) -> Result<(), Error> {
        let text = format!(
            "INSERT INTO {} (name, kind, position, server, file, made, era) \
             SELECT '{NAME}', $1, $2, $3, $4, $5, $6 FROM DUAL \
             WHERE EXISTS (SELECT 1 FROM {} m WHERE m.epoch = $7) \
             ON DUPLICATE KEY UPDATE kind = VALUES(kind), position = VALUES(position), server = VALUES(server), \
             file = VALUES(file), made = VALUES(made), era = VALUES(era), noted = UTC_TIMESTAMP(6)",
            self.own("binlog"),
            self.own("members"),
        );
        let done = sql::query(AssertSqlSafe(&text))
            .bind(stored.position.kind())
            .bind(stored.position.to_string())
            .bind(&stored.server)
            .bind(&stored.file)
            .bind(stored.made)
            .bind(stored.era)
            .bind(epoch)
            .execute(&self.pool())
            .await
            .map_err(Error::sql("note how far the binlog was read"))?;
        if done.rows_affected() == 0 { Err(Error::Fenced(epoch)) } else { Ok(()) }
    }

    pub async fn log_now(&self) -> Result<LogNow, Error> {
        let mut connection = self.pool().get_conn().await.map_err(Error::sql(ASK))?;
        let flavor = Mysql::flavor(&mut connection).await?;
        let server = if flavor == Flavor::MariaDb { "@@server_id" } else { "@@server_uuid" };
        let text = format!("SELECT CAST({server} AS CHAR), UNIX_TIMESTAMP()");
        let found: Option<(String, i64)> = connection.query_first(text).await.map_err(Error::sql(ASK))?;
        let (server, seconds) = found.unwrap_or_default();
        // Before the end of the log is asked for: what is in none of them is behind it.
        let files: Vec<mysql_async::Row> =
            connection.query("SHOW BINARY LOGS").await.map_err(Error::sql(ASK))?;
        let files = files.iter().filter_map(|row| row.get(0)).collect();
        let mut purged = GtidSet::default();
        let unreadable = |error| Error::Setup(format!("{ASK}: {error}"));
        let position = match flavor {
            Flavor::MariaDb => {
                Position::parse("domains", &one(&mut connection, "@@GLOBAL.gtid_binlog_pos").await?)
            }
            Flavor::Gtids => {
                purged = one(&mut connection, "@@GLOBAL.gtid_purged").await?.parse().map_err(unreadable)?;
                Position::parse("gtids", &one(&mut connection, "@@GLOBAL.gtid_executed").await?)
            }
            Flavor::Places => {
                let status = Mysql::status(&mut connection).await?;
                Ok(Position::File { name: status.file.into(), at: status.place.at })
            }
        };
        Ok(LogNow { server, position: position.map_err(unreadable)?, purged, files, seconds })
    }

    /// XA transactions that are prepared, as far as this account may know of them.
    pub async fn prepared(&self) -> Result<usize, Error> {
        let mut connection = self.pool().get_conn().await.map_err(Error::sql(ASK))?;
        match connection.query::<mysql_async::Row, _>("XA RECOVER").await {
            Ok(found) => Ok(found.len()),
            Err(mysql_async::Error::Server(_)) => Ok(0),
            Err(error) => Err(Error::sql(ASK)(error)),
        }
    }

    /// Whether the log alone can be relied on, by the server's settings.
    pub async fn check_alone(&self, server_id: u32) -> Result<(), Error> {
        let mut connection = self.pool().get_conn().await.map_err(Error::sql(ASK))?;
        Mysql::check_log(&mut connection, server_id).await?;
        match metadata_refusal(&mut connection).await? {
            Some(why) => Err(Error::Setup(why)),
            None => Ok(()),
        }
    }

    pub(in super::super) async fn count(&self, table: &str) -> Result<u64, Error> {
        let text = format!("SELECT COUNT(*) FROM {}", sql::quoted(table));
        let query = sql::query_scalar(AssertSqlSafe(&text));
        query.fetch_one(&self.pool()).await.map_err(Error::sql("look for what the relay made"))
    }
}

async fn one(connection: &mut Conn, what: &str) -> Result<String, Error> {
    let found: Option<String> =
        connection.query_first(format!("SELECT {what}")).await.map_err(Error::sql(ASK))?;
    Ok(found.unwrap_or_default())
}

/// Why rows cannot be taken from the log alone, by the server's settings.
pub(super) async fn metadata_refusal(connection: &mut Conn) -> Result<Option<String>, Error> {
    let metadata = variable(connection, "binlog_row_metadata").await?.unwrap_or_default();
    if metadata != "FULL" {
        return Ok(Some(format!(
            "binlog_row_metadata is {metadata}: with rows: transient the log has to tell the names of columns; \
             expected FULL: SET GLOBAL binlog_row_metadata = 'FULL'"
        )));
    }
    let most = variable(connection, "binlog_row_event_max_size").await?;
    let most = most.and_then(|most| most.parse::<u64>().ok()).unwrap_or_default();
    Ok((most > ROWS_OF_ONE_EVENT).then(|| {
        format!(
            "binlog_row_event_max_size is {most}: expected {ROWS_OF_ONE_EVENT} at most with rows: transient"
        )
    }))
}
