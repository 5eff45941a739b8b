//! `source`: the database that has the outbox, and how it is reached.

use std::{path::PathBuf, time::Duration};

use schemars::JsonSchema;
use serde::Deserialize;

use super::{Secret, units};

/// The database that has the outbox.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Source {
    /// postgres://user@host:5432/database, mysql://user@host:3306/database (MySQL and MariaDB) or
    /// sqlite://path/to/file.db
    pub url: Secret,
    /// Holds the password; looked at every second, so that it can be rotated.
    #[serde(default)]
    pub password_file: Option<PathBuf>,
    /// A program and its arguments, which prints the password; run again whenever a login is refused.
    #[serde(default)]
    pub password_command: Vec<String>,
    #[serde(default)]
    pub tls: Tls,
    /// How the database's log is read, for tables that follow it.
    #[serde(default)]
    pub stream: Option<Stream>,
    /// Connections of one relay to the database, at most; the log is read by one more.
    #[serde(default = "Source::max_connections")]
    #[schemars(range(min = 2, max = 100))]
    pub max_connections: u32,
    /// Where the relay keeps its own tables. MySQL and SQLite: the prefix of their names.
    #[serde(default = "Source::relay_schema")]
    pub relay_schema: String,
}

/// Reading the log of the database.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Stream {
    /// The replication slot (PostgreSQL).
    pub slot: String,
    /// PostgreSQL.
    pub publication: String,
    /// Make slot and publication where they are missing.
    pub create: bool,
    /// What the relay is to the server's binlog, which has one reader of a number (MySQL).
    #[schemars(range(min = 1))]
    pub server_id: u32,
    /// How often a heartbeat goes through the log, so that a dead connection shows and an idle database does
    /// not hold its log.
    #[serde(with = "units::duration")]
    #[schemars(with = "units::DurationText")]
    pub heartbeat: Duration,
    /// What the server may keep of its log for the slot, in bytes. Past it the slot is dropped and the
    /// tables are polled, if all of them have capture: auto.
    #[serde(with = "units::size")]
    #[schemars(with = "units::SizeText")]
    pub max_retained_wal: usize,
}

impl Default for Stream {
    fn default() -> Stream {
        Stream {
            slot: "whippet".into(),
            publication: "whippet".into(),
            create: true,
            server_id: 5400,
            heartbeat: Duration::from_secs(10),
            max_retained_wal: 4 << 30,
        }
    }
}

/// The SQL dialect of a source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Dialect {
    Postgres,
    /// MySQL and MariaDB.
    Mysql,
    Sqlite,
}

impl Source {
    fn max_connections() -> u32 {
        4
    }

    fn relay_schema() -> String {
        "whippet".into()
    }

    /// By the scheme of the URL; `check` has refused all others.
    pub fn dialect(&self) -> Dialect {
        match self.url.expose().split_once(':') {
            Some(("sqlite", _)) => Dialect::Sqlite,
            Some(("mysql", _)) => Dialect::Mysql,
            _ => Dialect::Postgres,
        }
    }
}

#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Tls {
    pub mode: TlsMode,
    /// The certificate authority of the server, PEM.
    pub ca_file: Option<PathBuf>,
    /// The client's certificate, PEM.
    pub cert_file: Option<PathBuf>,
    /// The key of `cert_file`, PEM.
    pub key_file: Option<PathBuf>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum TlsMode {
    Disable,
    #[default]
    Prefer,
    Require,
    VerifyCa,
    VerifyFull,
}
