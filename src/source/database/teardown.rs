//! Dropping what the relay made in a source.

use super::{Database, Error};
#[cfg(feature = "postgres")]
use super::{Postgres, ddl, literal, quoted};
use crate::config::Source;

/// Something that the relay made, and how it is dropped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Made {
    pub what: String,
    statement: String,
}

/// What is there of the relay's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Remains {
    pub made: Vec<Made>,
    /// A relay that owns the source now.
    pub owner: Option<String>,
    /// Held events whose only copy is in the relay's own tables.
    pub only_copies: u64,
}

impl Database {
    #[cfg_attr(
        not(any(feature = "postgres", feature = "sqlite")),
        expect(unused_variables, reason = "its tables have one name")
    )]
    pub async fn remains(&self, source: &Source) -> Result<Remains, Error> {
        match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(db) => db.remains().await,
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => db.remains(source).await,
            #[cfg(feature = "sqlite")]
            Database::Sqlite(db) => db.remains(source).await,
        }
    }

    pub async fn drop_made(&self, made: &Made) -> Result<(), Error> {
        match self {
            #[cfg(feature = "mysql")]
            Database::Mysql(db) => db.drop_made(&made.statement).await,
            #[cfg(feature = "postgres")]
            Database::Postgres(db) => {
                let done =
                    sqlx::raw_sql(sqlx::AssertSqlSafe(made.statement.as_str())).execute(&db.pool()).await;
                done.map(drop).map_err(Error::sql("drop it"))
            }
            #[cfg(feature = "sqlite")]
            Database::Sqlite(db) => {
                let done =
                    sqlx::raw_sql(sqlx::AssertSqlSafe(made.statement.as_str())).execute(&db.pool).await;
                done.map(drop).map_err(Error::sql("drop it"))
            }
        }
    }
}

/// The relay's own tables, without the prefix that some dialects give them.
#[cfg(any(feature = "postgres", feature = "sqlite"))]
const TABLES: [&str; 10] = [
    "leases",
    "members",
    "parts",
    "gates",
    "positions",
    "holds",
    "pauses",
    "replays",
    "watermarks",
    "milestones",
];

/// All of them in PostgreSQL.
#[cfg(feature = "postgres")]
pub(super) fn own_tables() -> Vec<&'static str> {
    [&TABLES[..], &["released", "slots", ddl::AUDIT]].concat()
}

#[cfg(feature = "postgres")]
impl Postgres {
    async fn remains(&self, source: &Source) -> Result<Remains, Error> {
        let doing = "look for what the relay made";
        let pool = self.pool();
        let exists = async |sql: &'static str, name: &str| -> Result<bool, Error> {
            let found: Option<i32> =
                sqlx::query_scalar(sql).bind(name).fetch_optional(&pool).await.map_err(Error::sql(doing))?;
            Ok(found.is_some())
        };
        let mut remains = Remains::default();
        let stream = source.stream.clone().unwrap_or_default();
        let (slot, publication) = (&stream.slot, &stream.publication);
        if exists("SELECT 1 FROM pg_replication_slots WHERE slot_name = $1 AND plugin = 'pgoutput' AND database = current_database()", slot).await? {
            remains.made.push(Made {
                what: format!("replication slot {slot}"),
                statement: format!("SELECT pg_drop_replication_slot({})", literal(slot)),
            });
        }
        if exists("SELECT 1 FROM pg_publication WHERE pubname = $1", publication).await? {
            remains.made.push(Made {
                what: format!("publication {publication}"),
                statement: format!("DROP PUBLICATION {}", quoted(publication)),
            });
        }
        let schema = self.schema();
        for table in own_tables() {
            let name = format!("{}.{}", quoted(schema), quoted(table));
            if !exists("SELECT 1 WHERE to_regclass($1) IS NOT NULL", &name).await? {
                continue;
            }
            let ask = match table {
                "members" => format!("SELECT owner FROM {name} WHERE expires_at > clock_timestamp() LIMIT 1"),
                "holds" => format!("SELECT count(*)::text FROM {name} WHERE cells IS NOT NULL"),
                "released" => format!("SELECT count(*)::text FROM {name}"),
                _ => String::new(),
            };
            if !ask.is_empty() {
                let found: Option<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(ask))
                    .fetch_optional(&pool)
                    .await
                    .map_err(Error::sql(doing))?;
                match table {
                    "members" => remains.owner = found,
                    _ => {
                        remains.only_copies += found.and_then(|count| count.parse::<u64>().ok()).unwrap_or(0);
                    }
                }
            }
            remains.made.push(Made {
                what: format!("table {schema}.{table}"),
                statement: format!("DROP TABLE {name}"),
            });
        }
        if exists("SELECT 1 FROM pg_namespace WHERE nspname = $1", schema).await? {
            // Only where it is empty by then: it may be somebody else's too.
            remains.made.push(Made {
                what: format!("schema {schema}, if it is empty"),
                statement: format!(
                    "DO $$ BEGIN DROP SCHEMA {}; EXCEPTION WHEN dependent_objects_still_exist THEN NULL; END $$",
                    quoted(schema)
                ),
            });
        }
        Ok(remains)
    }
}

#[cfg(feature = "mysql")]
impl super::mysql::Mysql {
    async fn remains(&self) -> Result<Remains, Error> {
        let mut remains = Remains { owner: self.owner().await?, ..Remains::default() };
        for table in self.own_tables().await? {
            if table.ends_with("_contents") {
                remains.only_copies = self.count(&table).await?;
            }
            let statement = format!("DROP TABLE `{table}`");
            remains.made.push(Made { what: format!("table {table}"), statement });
        }
        Ok(remains)
    }
}

#[cfg(feature = "sqlite")]
impl super::sqlite::Sqlite {
    async fn remains(&self, source: &Source) -> Result<Remains, Error> {
        use super::{ddl, quoted};
        let doing = "look for what the relay made";
        let prefix = &source.relay_schema;
        let mut remains = Remains::default();
        let audit = ddl::AUDIT.to_owned();
        for table in TABLES.iter().map(|table| format!("{prefix}_{table}")).chain([audit]) {
            let found: Option<i64> =
                sqlx::query_scalar("SELECT 1 FROM sqlite_master WHERE type = 'table' AND name = $1")
                    .bind(&table)
                    .fetch_optional(&self.pool)
                    .await
                    .map_err(Error::sql(doing))?;
            if found.is_none() {
                continue;
            }
            if table.ends_with("_members") {
                let ask = format!(
                    "SELECT owner FROM {} WHERE expires_at > (julianday('now') - 2440587.5) * 86400 LIMIT 1",
                    quoted(&table)
                );
                remains.owner = sqlx::query_scalar(sqlx::AssertSqlSafe(ask))
                    .fetch_optional(&self.pool)
                    .await
                    .map_err(Error::sql(doing))?;
            }
            let statement = format!("DROP TABLE {}", quoted(&table));
            remains.made.push(Made { what: format!("table {table}"), statement });
        }
        Ok(remains)
    }
}
