//! What `whippet doctor` finds about the server and its tables.

use mysql_async::{Conn, prelude::Queryable as _};

use super::{
    super::{Error, TableSpec, ddl},
    Mysql,
    columns::Catalogue,
    outbox::Outbox,
    sql::{quoted, quoted_table},
};
use crate::{
    config::{AfterPublish, Stream},
    coordinate::report,
    doctor::Finding,
    source::mysql::rows::obstacle,
};

const SERVER: &str = "mysql: server";
const LOG: &str = "mysql: binlog";
const OWN: &str = "mysql: the relay's own tables";
const TABLE: &str = "mysql: table";

/// A variable of the server, if it has one of this name.
pub(super) async fn variable(connection: &mut Conn, name: &str) -> Result<Option<String>, Error> {
    let text = format!("SHOW GLOBAL VARIABLES LIKE '{name}'");
    let found: Option<(String, String)> =
        connection.query_first(text).await.map_err(Error::sql("ask for the server's settings"))?;
    Ok(found.map(|(_, value)| value))
}

/// Why a server cannot be the source, if so.
pub(super) async fn refuse(connection: &mut Conn) -> Result<(), Error> {
    if variable(connection, "group_replication_single_primary_mode").await?.as_deref() == Some("OFF")
        && variable(connection, "group_replication_group_name").await?.is_some_and(|name| !name.is_empty())
    {
        return Err(Error::Setup(
            "the server is one of several primaries (group_replication_single_primary_mode = OFF): numbers that \
             they give out are in no order; expected one primary"
                .into(),
        ));
    }
    if variable(connection, "log_bin").await?.as_deref() == Some("ON")
        && variable(connection, "binlog_format").await?.as_deref() == Some("STATEMENT")
    {
        return Err(Error::Setup(
            "the server has binlog_format = STATEMENT, which allows no changes with READ COMMITTED; expected ROW"
                .into(),
        ));
    }
    Ok(())
}

impl Mysql {
    /// The server, the relay's own tables and the outboxes, one finding for each check.
    /// That of the binlog where it is to be read.
    pub async fn examine(&self, specs: &[TableSpec], log: Option<&Stream>) -> Vec<Finding> {
        let mut connection = match self.connect().await {
            Ok(connection) => connection,
            Err(error) => return vec![Finding::fail(SERVER, report(&error))],
        };
        let mut findings = Vec::new();
        match self.server(&mut connection).await {
            Ok(server) => findings.extend(server),
            Err(error) => findings.push(Finding::fail(SERVER, report(&error))),
        }
        findings.push(match self.tables_of(&mut connection).await {
            Ok(there) if there.len() == ddl::relay_table_names(&self.prefix).len() => {
                Finding::ok(OWN, "they are there")
            }
            Ok(_) => Finding::warn(
                OWN,
                "some are missing: the relay makes them when it starts, if its account may; else run `whippet sql`",
            ),
            Err(error) => Finding::fail(OWN, report(&error)),
        });
        for spec in specs {
            match self.table(&mut connection, spec).await {
                Ok(table) => findings.extend(table),
                Err(error) => findings.push(Finding::fail(TABLE, report(&error))),
            }
        }
        if let Some(log) = log {
            findings.extend(self.log(specs, log).await);
        }
        connection.disconnect().await.ok();
        findings
    }

    /// Whether the binlog can be followed, and by which tables.
    async fn log(&self, specs: &[TableSpec], log: &Stream) -> Vec<Finding> {
        let mut findings = Vec::new();
        findings.push(match self.log_start(log.server_id).await {
            Ok(_) => Finding::ok(LOG, "it can be followed"),
            Err(error) => Finding::fail(LOG, report(&error)),
        });
        for spec in specs {
            if let Ok(Some(known)) = self.known(spec).await
                && let Some(why) = obstacle(spec, &known)
            {
                findings.push(Finding::warn(LOG, format!("{why}: the table is polled")));
            }
        }
        findings
    }

    async fn server(&self, connection: &mut Conn) -> Result<Vec<Finding>, Error> {
        let doing = "ask for the server's version";
        let version: Option<String> =
            connection.query_first("SELECT VERSION()").await.map_err(Error::sql(doing))?;
        let version = version.unwrap_or_default();
        let mut findings = Vec::new();
        if is_old(&version) {
            let says =
                format!("version {version} is too old; expected MySQL 8.0.17 or MariaDB 10.6 at least");
            findings.push(Finding::fail(SERVER, says));
        }
        if let Err(error) = refuse(connection).await {
            findings.push(Finding::fail(SERVER, error));
        }
        for name in ["read_only", "super_read_only"] {
            if variable(connection, name).await?.is_some_and(|value| value == "ON") {
                findings.push(Finding::fail(SERVER, format!("{name} is ON: connect to the primary")));
                break;
            }
        }
        if variable(connection, "wsrep_on").await?.as_deref() == Some("ON") {
            let says =
                "a Galera cluster: the applications and the relay have to write to the same one of its nodes";
            findings.push(Finding::warn(SERVER, says));
        }
        if variable(connection, "auto_increment_increment").await?.is_some_and(|step| step != "1") {
            let says = "auto_increment_increment is not 1, as if there were several primaries: order holds for the \
                        rows of one";
            findings.push(Finding::warn(SERVER, says));
        }
        if findings.is_empty() {
            let tls: Option<(String, String)> = connection
                .query_first("SHOW SESSION STATUS LIKE 'Ssl_version'")
                .await
                .map_err(Error::sql(doing))?;
            let tls = tls.map(|(_, version)| version).filter(|version| !version.is_empty());
            let says = format!("version {version}, {}", tls.unwrap_or_else(|| "without TLS".into()));
            findings.push(Finding::ok(SERVER, says));
        }
        Ok(findings)
    }

    async fn table(&self, connection: &mut Conn, spec: &TableSpec) -> Result<Vec<Finding>, Error> {
        let catalogue = Catalogue::of(&self.pool(), &self.database, spec).await?;
        Outbox::new(self, spec, &catalogue)?;
        let (name, table) = (&spec.name, quoted_table(&spec.name));
        let change = match (spec.after_publish, &spec.published_at) {
            (AfterPublish::Mark, Some(column)) => {
                format!("UPDATE {table} SET {} = NULL WHERE FALSE", quoted(column))
            }
            _ => format!("DELETE FROM {table} WHERE FALSE"),
        };
        let mut findings = Vec::new();
        for statement in [format!("SELECT * FROM {table} WHERE FALSE"), change] {
            // It asks for the same rights, and changes nothing.
            if let Err(error) = connection.query_drop(format!("EXPLAIN {statement}")).await {
                let says =
                    format!("{name}: this account may not do it ({error}): see the grants of `whippet sql`");
                findings.push(Finding::fail(TABLE, says));
            }
        }
        if spec.sequence.is_none() {
            let says = format!("{name}: without columns.sequence its rows have no order");
            findings.push(Finding::warn(TABLE, says));
        } else if !catalogue.has_index_of_what_waits {
            let says = format!(
                "{name}: no index for what is read: each read may look at the whole table; see `whippet sql`"
            );
            findings.push(Finding::warn(TABLE, says));
        }
        let payload = catalogue.columns.iter().find(|column| column.name == spec.payload);
        if payload.is_some_and(|column| column.piece("").is_none())
            && catalogue.packet < spec.max_payload as u64
        {
            let says = format!(
                "{name}: a payload that is longer as text than the server's max_allowed_packet, {} bytes, is parked",
                catalogue.packet
            );
            findings.push(Finding::warn(TABLE, says));
        }
        if findings.is_empty() {
            findings.push(Finding::ok(TABLE, format!("{name}: can be read and written to")));
        }
        Ok(findings)
    }
}

fn is_old(version: &str) -> bool {
    let numbers = version.split(['.', '-']).map_while(|part| part.parse::<u32>().ok()).collect::<Vec<_>>();
    let least: &[u32] = if version.contains("MariaDB") { &[10, 6] } else { &[8, 0, 17] };
    !numbers.is_empty() && numbers.as_slice() < least
}

#[cfg(test)]
mod tests {
    use super::is_old;

    #[test]
    fn versions_are_told_from_their_names() {
        for (version, old) in [
            ("9.7.4-2", false),
            ("8.0.17", false),
            ("8.0.16-log", true),
            ("5.7.44", true),
            ("10.11.19-MariaDB-0+deb12u1-log", false),
            ("10.6.0-MariaDB", false),
            ("10.5.9-MariaDB", true),
        ] {
            assert_eq!(is_old(version), old, "{version}");
        }
    }
}
