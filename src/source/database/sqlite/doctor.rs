//! What `whippet doctor` finds of the file and its tables. Nothing is changed.

use std::{fs::OpenOptions, path::Path};

use sqlx::{AssertSqlSafe, Connection as _, sqlite::SqliteConnection};

use super::{
    super::{Error, TableSpec, ddl, quoted},
    Sqlite,
};
use crate::{
    config::{self, Config, Dialect},
    coordinate::report,
    doctor::{Finding, Fix},
};

const FILE: &str = "sqlite: file";
const OWN: &str = "sqlite: the relay's own tables";
const TABLE: &str = "sqlite: table";
const ORDER: &str = "sqlite: order";

fn sql(error: sqlx::Error) -> Error {
    Error::sql("look at the file")(error)
}

/// Writes what is there already, and takes it back. To begin as a writer is not enough: of a file that may only be read
/// SQLite lets one begin.
async fn writes(connection: &mut SqliteConnection) -> sqlx::Result<()> {
    let version: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut *connection).await?;
    let mut transaction = connection.begin_with("BEGIN IMMEDIATE").await?;
    let same = AssertSqlSafe(format!("PRAGMA user_version = {version}"));
    sqlx::raw_sql(same).execute(&mut *transaction).await?;
    transaction.rollback().await
}

/// What forbids it: the file, its folder, where a journal is made, or the URL.
fn mends_writing(path: &Path) -> Fix {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let chmod = |what: &Path| Fix::Shell(format!("chmod u+w '{}'", what.display()));
    match OpenOptions::new().write(true).open(path) {
        Err(_) => chmod(path),
        Ok(_) if tempfile::tempfile_in(folder).is_err() => chmod(folder),
        Ok(_) => Fix::Config("source.url: (without what makes it read-only)".into()),
    }
}

impl Sqlite {
    /// The file, the relay's own tables and the outboxes: one finding for each check.
    pub async fn examine(&self, config: &Config, specs: &[TableSpec]) -> Vec<Finding> {
        let options = self.pool.connect_options();
        let path = options.get_filename().display().to_string();
        let opened = SqliteConnection::connect_with(&options).await;
        let mut connection = match opened.map_err(Error::sql("open the file")) {
            Ok(connection) => connection,
            Err(error) => {
                let fix = Fix::Config("source.url: (a file that is there and can be opened)".into());
                return vec![Finding::fail(FILE, format!("{path}: {}", report(&error))).mended_by(fix)];
            }
        };
        let mut findings = Vec::new();
        findings.push(match writes(&mut connection).await.map_err(Error::sql("write")) {
            Ok(()) => Finding::ok(FILE, format!("{path} can be written to")),
            Err(error) => {
                let says = format!("{path} cannot be written to: {}", report(&error));
                Finding::fail(FILE, says).mended_by(mends_writing(options.get_filename()))
            }
        });
        match self.find_all(&mut connection, config, specs).await {
            Ok(found) => findings.extend(found),
            Err(error) => {
                let fix = Fix::Config("source.url: (a file that is a database of SQLite)".into());
                findings.push(Finding::fail(FILE, report(&error)).mended_by(fix));
            }
        }
        connection.close().await.ok();
        findings
    }

    async fn find_all(
        &self,
        connection: &mut SqliteConnection,
        config: &Config,
        specs: &[TableSpec],
    ) -> Result<Vec<Finding>, Error> {
        let mut findings = Vec::new();
        let there: i64 = sqlx::query_scalar(
            "SELECT count(*) FROM sqlite_master WHERE type = 'table' AND substr(name, 1, length(?1)) = ?1",
        )
        .bind(format!("{}_", self.prefix))
        .fetch_one(&mut *connection)
        .await
        .map_err(sql)?;
        findings.push(match there {
            0 => Finding::ok(OWN, "they are made when a relay starts"),
            there => {
                Finding::ok(OWN, format!("{there} are there; what is missing is made when a relay starts"))
            }
        });
        for spec in specs {
            let Some(table) = config.tables.iter().find(|table| table.name == spec.name) else { continue };
            findings.extend(self.table(connection, table, spec).await?);
        }
        Ok(findings)
    }

    async fn table(
        &self,
        connection: &mut SqliteConnection,
        table: &config::Table,
        spec: &TableSpec,
    ) -> Result<Vec<Finding>, Error> {
        let shown = &spec.name;
        let made: Option<String> = sqlx::query_scalar(
            "SELECT sql FROM sqlite_master WHERE type IN ('table', 'view') AND name = ?1 COLLATE NOCASE",
        )
        .bind(shown)
        .fetch_optional(&mut *connection)
        .await
        .map_err(sql)?;
        let Some(made) = made else {
            let make = ddl::outbox(table, Dialect::Sqlite).into_iter();
            let make: Vec<String> = make.filter(|statement| !statement.starts_with("--")).collect();
            let fix = Fix::Sql(make.join(";\n"));
            return Ok(vec![Finding::fail(TABLE, format!("{shown} does not exist")).mended_by(fix)]);
        };
        let names: Vec<String> = sqlx::query_scalar("SELECT name FROM pragma_table_info(?1)")
            .bind(shown)
            .fetch_all(&mut *connection)
            .await
            .map_err(sql)?;
        let missing = spec.missing(&names);
        if !missing.is_empty() {
            let says = format!("{shown} has no column {}", missing.join(", "));
            let kinds = ddl::columns(table, Dialect::Sqlite);
            let add = missing.iter().map(|missing| {
                let kind =
                    kinds.iter().find(|(column, _)| column == missing).map_or("TEXT", |(_, kind)| kind);
                // One that is added can have neither a key nor a default that is computed.
                let kind = kind.split(' ').next().unwrap_or("TEXT");
                format!("ALTER TABLE {} ADD COLUMN {} {kind}", quoted(shown), quoted(missing))
            });
            let add: Vec<String> = add.collect();
            return Ok(vec![Finding::fail(TABLE, says).mended_by(Fix::Sql(add.join(";\n")))]);
        }
        let mut findings = vec![match self.outbox(spec).await {
            Ok(_) => Finding::ok(TABLE, format!("{shown}: has what is needed")),
            // An order column by which rows cannot be kept.
            Err(error) => error.refusal(TABLE).unwrap_or_else(|| {
                Finding::fail(TABLE, report(&error)).mended_by(Fix::Config("after_publish: mark".into()))
            }),
        }];
        findings.extend(spec.slower().map(|slower| slower.finding(ORDER)));
        if let Some(column) = &spec.sequence {
            findings.push(match made.to_uppercase().contains("AUTOINCREMENT") {
                true => Finding::ok(ORDER, format!("{shown}.{column} rises (AUTOINCREMENT)")),
                false => Finding::warn(
                    ORDER,
                    format!(
                        "{shown}.{column} is no INTEGER PRIMARY KEY AUTOINCREMENT: a number may be given again \
                         after its row was deleted; make the table as `whippet sql` does"
                    ),
                ),
            });
        }
        Ok(findings)
    }
}
