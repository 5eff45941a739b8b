//! A line in the audit log for what an operator does beside a relay, under no lease.

use super::{Database, Error};
#[cfg(any(feature = "postgres", feature = "sqlite"))]
use super::{ddl, quoted};

/// What was done, by whom, and to how many.
#[derive(Clone, Debug)]
pub struct Line<'a> {
    pub who: &'a str,
    pub action: &'a str,
    /// What it was done to, where others have their table's name.
    pub subject: &'a str,
    pub what: &'a str,
    pub why: Option<&'a str>,
    pub events: u64,
}

impl Database {
    /// Writes a line; [`Database::install`] has made the table.
    pub async fn audit(&self, line: &Line<'_>) -> Result<(), Error> {
        match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(db) => db.audit(line).await,
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => {
                let table = format!("{}.{}", quoted(db.schema()), quoted(ddl::AUDIT));
                write!(&table, line, &db.pool())
            }
            #[cfg(feature = "sqlite")]
            Database::Sqlite(db) => write!(&quoted(ddl::AUDIT), line, &db.pool),
        }
    }
}

/// Writes a line into a table with this quoted name.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
macro_rules! write {
    ($table:expr, $line:expr, $pool:expr) => {
        sqlx::query(sqlx::AssertSqlSafe(format!(
            "INSERT INTO {} (who, action, table_name, what, why, keys, events) VALUES ($1, $2, $3, $4, $5, 0, $6)",
            $table
        )))
        .bind($line.who)
        .bind($line.action)
        .bind($line.subject)
        .bind($line.what)
        .bind($line.why)
        .bind($line.events.cast_signed())
        .execute($pool)
        .await
        .map(drop)
        .map_err(Error::sql("write the audit log"))
    };
}
#[cfg(any(feature = "postgres", feature = "sqlite"))]
use write;
