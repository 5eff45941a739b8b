//! A line in the audit log for what an operator does beside a relay, under no lease.

use sqlx::AssertSqlSafe;

use super::{Database, Error, ddl, quoted};

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
        let table = match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(db) => return db.audit(line).await,
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => format!("{}.{}", quoted(db.schema()), quoted(ddl::AUDIT)),
            #[cfg(feature = "sqlite")]
            Database::Sqlite(_) => quoted(ddl::AUDIT),
        };
        let sql = format!(
            "INSERT INTO {table} (who, action, table_name, what, why, keys, events) VALUES ($1, $2, $3, $4, $5, 0, $6)"
        );
        macro_rules! write {
            ($pool:expr) => {
                sqlx::query(AssertSqlSafe(sql))
                    .bind(line.who)
                    .bind(line.action)
                    .bind(line.subject)
                    .bind(line.what)
                    .bind(line.why)
                    .bind(line.events.cast_signed())
                    .execute($pool)
                    .await
                    .map(drop)
            };
        }
        match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(_) => Ok(()),
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => write!(&db.pool()),
            #[cfg(feature = "sqlite")]
            Database::Sqlite(db) => write!(&db.pool),
        }
        .map_err(Error::sql("write the audit log"))
    }
}
