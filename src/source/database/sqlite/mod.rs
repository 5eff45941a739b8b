//! SQLite: for the demo, for small applications, and for the spool of ingest.
//!
//! Writers take turns, so a number from AUTOINCREMENT is also the commit order: no row appears below
//! the cursor, and one connection at a time is enough.

mod doctor;
mod group;
mod holds;
mod kept;
mod outbox;
mod statements;

use std::{convert::Infallible, str::FromStr, sync::Arc, time::Duration};

use sqlx::{
    AssertSqlSafe,
    sqlite::{SqliteConnectOptions, SqlitePool, SqlitePoolOptions},
};
use tokio::sync::{Mutex, Notify};

pub use self::outbox::Outbox;
use super::{
    Error, GROUP, LEASE_NAME, TableSpec, ddl,
    place::{Candidates, Distinct},
    quoted,
};
use crate::config;

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
        spec.check(&columns)?;
        self.tell_apart(spec, &columns).await?;
        Outbox::new(self, spec, &columns)
    }

    /// Decides by what the rows of a table are told apart.
    async fn tell_apart(&self, spec: &TableSpec, columns: &[(String, String)]) -> Result<(), Error> {
        let Some((order, id)) = spec.candidates() else { return Ok(()) };
        let kind = |name: &str| columns.iter().find(|(column, _)| column.eq_ignore_ascii_case(name));
        if kind(order).is_none() {
            return Ok(());
        }
        let is_view: bool =
            sqlx::query_scalar("SELECT type = 'view' FROM sqlite_master WHERE name = ?1 COLLATE NOCASE")
                .bind(&spec.name)
                .fetch_optional(&self.pool)
                .await
                .map_err(Error::sql("look for the table"))?
                .unwrap_or_default();
        let mut found = Vec::new();
        for name in [order, id] {
            // The primary key of type INTEGER is the row's own number; another has an index.
            let (is_rowid, unique, filled): (bool, bool, bool) = sqlx::query_as(
                "SELECT coalesce(max(pk > 0 AND upper(type) = 'INTEGER' AND \
                     (SELECT count(*) FROM pragma_table_info(?1) WHERE pk > 0) = 1), 0), \
                   EXISTS (SELECT 1 FROM pragma_index_list(?1) l WHERE l.\"unique\" AND NOT l.partial \
                     AND (SELECT count(*) FROM pragma_index_info(l.name)) = 1 \
                     AND EXISTS (SELECT 1 FROM pragma_index_info(l.name) i WHERE i.name = ?2 COLLATE NOCASE)), \
                   coalesce(max(\"notnull\"), 0) \
                 FROM pragma_table_info(?1) WHERE name = ?2 COLLATE NOCASE",
            )
            .bind(&spec.name)
            .bind(name)
            .fetch_one(&self.pool)
            .await
            .map_err(Error::sql("look for the table's unique indexes"))?;
            let (unique, filled) = (is_rowid || unique, is_rowid || filled || is_view);
            // A column cannot become NOT NULL, nor can a time be unique.
            let can_be = filled && (name == id || kind(name).is_some_and(|(_, kind)| kind.contains("INT")));
            let mend = (!unique && can_be && !is_view).then(|| {
                let index = quoted(&format!("{}_{name}", spec.name));
                format!("CREATE UNIQUE INDEX {index} ON {} ({})", quoted(&spec.name), quoted(name))
            });
            found.push(Distinct { unique, filled, mend });
        }
        let (id, order) = (found.pop().unwrap_or_default(), found.pop().unwrap_or_default());
        spec.tell_apart(Candidates { order, id, is_untold: is_view })
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

/// Texts as a JSON array.
fn json_texts(texts: &[String]) -> String {
    serde_json::Value::from(texts.to_vec()).to_string()
}
