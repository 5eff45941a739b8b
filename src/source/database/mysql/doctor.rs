//! What `whippet doctor` finds about the server and its tables.

use mysql_async::{Conn, prelude::Queryable as _};

use super::{
    super::{Error, Fault, TableSpec, ddl},
    Mysql, columns,
    outbox::Outbox,
    position::metadata_refusal,
    sql::{quoted, quoted_table},
};
use crate::{
    config::{Config, Stream, Table},
    coordinate::report,
    doctor::{Finding, Fix, clocks},
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

/// What mends a server that [`refuse`] refuses.
async fn mends_server(connection: &mut Conn) -> Result<Fix, Error> {
    let by_statement = variable(connection, "binlog_format").await?.as_deref() == Some("STATEMENT");
    Ok(Fix::Sql(match by_statement {
        true => "SET GLOBAL binlog_format = 'ROW'".into(),
        false => "SELECT group_replication_switch_to_single_primary_mode()".into(),
    }))
}

/// Why an account may not carry out a statement. To have it explained asks for the same rights, and changes
/// nothing.
async fn refused(connection: &mut Conn, statement: &str) -> Option<mysql_async::Error> {
    match connection.query_drop(format!("EXPLAIN {statement}")).await {
        // ER_OPTION_PREVENTS_STATEMENT, ER_BINLOG_STMT_MODE_AND_ROW_ENGINE: the server is told of by itself.
        Err(mysql_async::Error::Server(error)) if matches!(error.code, 1290 | 1665) => None,
        Err(error) => Some(error),
        Ok(()) => None,
    }
}

/// As a grant names it: an account has a host.
async fn account(connection: &mut Conn) -> Result<String, Error> {
    let account: Option<String> =
        connection.query_first("SELECT CURRENT_USER()").await.map_err(Error::sql("ask who we are"))?;
    let account = account.unwrap_or_default();
    let (user, host) = account.rsplit_once('@').unwrap_or((&account, "%"));
    Ok(format!("'{}'@'{}'", user.replace('\'', "''"), host.replace('\'', "''")))
}

impl Mysql {
    /// The server, the relay's own tables and the outboxes, one finding for each check.
    /// That of the binlog where it is to be read.
    pub async fn examine(&self, config: &Config, specs: &[TableSpec]) -> Vec<Finding> {
        let mut connection = match self.connect().await {
            Ok(connection) => connection,
            Err(error) => return vec![self.failed(SERVER, &error)],
        };
        let mut findings = Vec::new();
        match self.server(&mut connection).await {
            Ok(server) => findings.extend(server),
            Err(error) => findings.push(self.failed(SERVER, &error)),
        }
        match self.of_own_tables(&mut connection).await {
            Ok(own) => findings.push(own),
            Err(error) => findings.push(self.failed(OWN, &error)),
        }
        for spec in specs {
            let Some(table) = config.tables.iter().find(|table| table.name == spec.name) else { continue };
            match self.table(&mut connection, table, spec).await {
                Ok(table) => findings.extend(table),
                Err(error) => findings.push(self.failed(TABLE, &error)),
            }
        }
        if let Some(log) = config.log() {
            findings.extend(self.log(&mut connection, specs, &log).await);
        }
        connection.disconnect().await.ok();
        findings
    }

    /// A connection that does not come about, or a server that refuses a question, with what mends that.
    fn failed(&self, check: &'static str, error: &Error) -> Finding {
        if let Some(finding) = error.refusal(check) {
            return finding;
        }
        let config = |text: &str| Fix::Config(text.to_owned());
        let fix = match error {
            Error::Sql { source: Fault::Mysql(mysql_async::Error::Server(error)), .. } => match error.code {
                // ER_ACCESS_DENIED_ERROR, ER_ACCESS_DENIED_NO_PASSWORD_ERROR
                1045 | 1698 => config("source.password_file: (a file with the password of this account)"),
                // ER_DBACCESS_DENIED_ERROR; it has the account as a grant names it.
                1044 => {
                    let account = error.message.split('\'').skip(1).step_by(2).take(2).collect::<Vec<_>>();
                    let account = format!("'{}'", account.join("'@'"));
                    Fix::Sql(format!("GRANT SELECT ON {}.* TO {account}", quoted(&self.database)))
                }
                // ER_BAD_DB_ERROR
                1049 => Fix::Sql(format!("CREATE DATABASE {}", quoted(&self.database))),
                // ER_CON_COUNT_ERROR
                1040 => config("source.max_connections: (less)"),
                _ => config("source.url: (the address of a server that answers this)"),
            },
            Error::Sql { .. } if report(error).contains("certificate") => {
                config("source.tls.ca_file: (the authority that signed the server's certificate)")
            }
            Error::Setup(says) if says.contains("source.tls") => {
                config("source.tls: (files that can be read here)")
            }
            Error::Setup(_) => {
                config("source.password_file, source.password_command: (what can be read, or run, here)")
            }
            _ => config("source.url: (the address of a server that can be reached from here)"),
        };
        Finding::fail(check, report(error)).mended_by(fix)
    }

    async fn of_own_tables(&self, connection: &mut Conn) -> Result<Finding, Error> {
        let there = self.tables_of(connection).await?;
        if there.len() < ddl::relay_table_names(&self.prefix).len() {
            let account = account(connection).await?;
            let own = ddl::relay_tables_mysql(&self.prefix);
            if Mysql::may(connection, "CREATE", &account).await? {
                let says = "some are missing: the relay makes them when it starts, if its account may; else run \
                            `whippet sql`";
                return Ok(Finding::warn(OWN, says).mended_by(Fix::Sql(own.join(";\n"))));
            }
            let says = "some are missing, or not to be seen, and this account may not make them";
            let make: Vec<String> = own.into_iter().chain(self.own_grants(&account)).collect();
            return Ok(Finding::fail(OWN, says).mended_by(Fix::Sql(make.join(";\n"))));
        }
        for name in &there {
            let table = quoted_table(name);
            for statement in [
                format!("SELECT * FROM {table} WHERE FALSE"),
                format!("INSERT INTO {table} SELECT * FROM {table} WHERE FALSE"),
                format!("DELETE FROM {table} WHERE FALSE"),
            ] {
                if let Some(error) = refused(connection, &statement).await {
                    let account = account(connection).await?;
                    let grants = self.own_grants(&account);
                    let says = format!("this account may not use {name} ({error})");
                    return Ok(Finding::fail(OWN, says).mended_by(Fix::Sql(grants.join(";\n"))));
                }
            }
        }
        Ok(Finding::ok(OWN, "they are there"))
    }

    fn own_grants(&self, account: &str) -> Vec<String> {
        let names = ddl::relay_table_names(&self.prefix);
        let grant = |name: &String| {
            let (database, table) = (quoted(&self.database), quoted(name));
            format!("GRANT SELECT, INSERT, UPDATE, DELETE ON {database}.{table} TO {account}")
        };
        names.iter().map(grant).collect()
    }

    /// Whether the binlog can be followed, and by which tables.
    async fn log(&self, connection: &mut Conn, specs: &[TableSpec], log: &Stream) -> Vec<Finding> {
        let mut findings = Vec::new();
        let mut checked = Mysql::check_log(connection, log.server_id).await;
        if checked.is_ok()
            && let Ok(account) = account(connection).await
            && !Mysql::may(connection, "REPLICATION SLAVE", &account).await.unwrap_or(true)
        {
            checked = Err(Error::Setup("this account may not read the binlog (REPLICATION SLAVE)".into()));
        }
        findings.push(match checked {
            Ok(()) => Finding::ok(LOG, "it can be followed"),
            Err(error) => match self.mends_log(connection, log).await {
                Ok(fix) => Finding::fail(LOG, report(&error)).mended_by(fix),
                Err(error) => self.failed(LOG, &error),
            },
        });
        for spec in specs {
            if let Ok(Some(known)) = self.known(spec).await
                && let Some(why) = obstacle(spec, &known)
            {
                findings.push(match spec.stays() {
                    true => Finding::warn(LOG, format!("{why}: the table is polled")),
                    false => Finding::fail(LOG, format!("{why}, and only the binlog has its rows"))
                        .mended_by(Fix::Config("tables[].rows: stay".into())),
                });
            }
        }
        if specs.iter().any(|spec| !spec.stays()) {
            findings.extend(self.log_alone(connection).await);
        }
        findings
    }

    /// Whether the log tells enough for rows that only it has, and how far it was read.
    async fn log_alone(&self, connection: &mut Conn) -> Vec<Finding> {
        let refused = metadata_refusal(connection).await;
        let mut findings = Vec::new();
        match refused {
            Ok(None) => {}
            Ok(Some(why)) => {
                let fix = Fix::Sql("SET GLOBAL binlog_row_metadata = 'FULL'".into());
                findings.push(Finding::fail(LOG, why).mended_by(fix));
            }
            Err(error) => findings.push(self.failed(LOG, &error)),
        }
        // Before the first start there is no such table.
        if let Ok(stored) = self.stored().await {
            findings.push(match stored {
                Some(stored) => Finding::ok(LOG, format!("rows that do not stay are read from {}", stored.position)),
                None => Finding::warn(
                    LOG,
                    "no place in the binlog is stored: rows that do not stay are read from the relay's start on",
                ),
            });
        }
        findings
    }

    /// In the order in which a server is asked whether its binlog can be followed.
    async fn mends_log(&self, connection: &mut Conn, log: &Stream) -> Result<Fix, Error> {
        if variable(connection, "log_bin").await?.is_none_or(|value| value != "ON") {
            return Ok(Fix::Shell("(start the server with) --log-bin".into()));
        }
        for (name, good) in [
            ("binlog_format", &["ROW"][..]),
            ("binlog_row_image", &["FULL", "FULL_NODUP"]),
            ("binlog_order_commits", &["ON"]),
        ] {
            let value = variable(connection, name).await?;
            if value.is_some_and(|value| !value.is_empty() && !good.contains(&value.as_str())) {
                return Ok(Fix::Sql(format!("SET GLOBAL {name} = '{}'", good[0])));
            }
        }
        if variable(connection, "server_id").await?.is_some_and(|id| id == log.server_id.to_string()) {
            let free = log.server_id.wrapping_add(1);
            return Ok(Fix::Config(format!("source.stream.server_id: {free}")));
        }
        if Mysql::filters(connection).await.is_ok_and(|filters| !filters.is_empty()) {
            return Ok(Fix::Shell("(start the server without) --binlog-do-db and --binlog-ignore-db".into()));
        }
        let account = account(connection).await?;
        Ok(Fix::Sql(format!("GRANT REPLICATION SLAVE, REPLICATION CLIENT ON *.* TO {account}")))
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
            let fix = Fix::Config("source.url: (a server of that version or later)".into());
            findings.push(Finding::fail(SERVER, says).mended_by(fix));
        }
        if let Err(error) = refuse(connection).await {
            findings.push(Finding::fail(SERVER, error).mended_by(mends_server(connection).await?));
        }
        for name in ["super_read_only", "read_only"] {
            if variable(connection, name).await?.is_some_and(|value| value == "ON") {
                let says = format!("{name} is ON: connect to the primary, or, if this is the primary");
                let fix = Fix::Sql("SET GLOBAL read_only = OFF".into());
                findings.push(Finding::fail(SERVER, says).mended_by(fix));
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
            let fix = Fix::Sql("SET GLOBAL auto_increment_increment = 1".into());
            findings.push(Finding::warn(SERVER, says).mended_by(fix));
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
        let clock = clocks("mysql: clock", || async {
            let now = "SELECT CAST(UNIX_TIMESTAMP(NOW(6)) AS CHAR)";
            let now: Option<String> = connection.query_first(now).await.map_err(Error::sql(doing))?;
            Ok(now.and_then(|now| now.parse().ok()).unwrap_or_default())
        });
        findings.push(clock.await?);
        Ok(findings)
    }

    /// What an account needs of a table.
    fn grant(&self, spec: &TableSpec, account: &str) -> String {
        let table = match spec.name.contains('.') {
            true => quoted_table(&spec.name),
            false => format!("{}.{}", quoted(&self.database), quoted(&spec.name)),
        };
        let change = match &spec.published_at {
            Some(column) => {
                let delete = if spec.retention.is_some() { ", DELETE" } else { "" };
                format!("UPDATE ({}){delete}", quoted(column))
            }
            None => "DELETE".into(),
        };
        if !spec.stays() {
            return format!("GRANT SELECT ON {table} TO {account}");
        }
        format!("GRANT SELECT, {change} ON {table} TO {account}")
    }

    /// Whether an account has a right, as far as it can be told: a role may give it.
    async fn may(connection: &mut Conn, right: &str, account: &str) -> Result<bool, Error> {
        let rights: Option<i64> = connection
            .exec_first(
                "SELECT (SELECT COUNT(*) FROM information_schema.user_privileges \
                   WHERE privilege_type = ? AND grantee = ?) \
                 + (SELECT COUNT(*) FROM information_schema.schema_privileges \
                   WHERE privilege_type = ? AND grantee = ? AND DATABASE() LIKE table_schema) \
                 + (COALESCE(CURRENT_ROLE(), 'NONE') <> 'NONE')",
                (right, account, right, account),
            )
            .await
            .map_err(Error::sql("ask for our rights"))?;
        Ok(rights.is_some_and(|rights| rights > 0))
    }

    /// What is missing of a table so that the relay could look at it.
    async fn lacks(
        &self,
        connection: &mut Conn,
        table: &Table,
        spec: &TableSpec,
    ) -> Result<Option<Fix>, Error> {
        let (database, name) = spec.name.split_once('.').unwrap_or((&self.database, &spec.name));
        let doing = "look for the table";
        let engine: Option<Option<String>> = connection
            .exec_first(
                "SELECT engine FROM information_schema.tables WHERE table_schema = ? AND table_name = ?",
                (database, name),
            )
            .await
            .map_err(Error::sql(doing))?;
        let quoted_name = quoted_table(&spec.name);
        let Some(engine) = engine else {
            if let Some(meant) = columns::meant(connection, &self.database, spec).await? {
                return Ok(Some(Fix::Config(format!("tables[].name: {meant}"))));
            }
            // Or it is there, and not to be seen.
            let make = ddl::outbox_mysql(table).into_iter().take(1);
            let account = account(connection).await?;
            let make: Vec<String> = make.chain([self.grant(spec, &account)]).collect();
            return Ok(Some(Fix::Sql(make.join(";\n"))));
        };
        if engine.is_some_and(|engine| engine != "InnoDB") {
            return Ok(Some(Fix::Sql(format!("ALTER TABLE {quoted_name} ENGINE = InnoDB"))));
        }
        let names: Vec<String> = connection
            .exec(
                "SELECT column_name FROM information_schema.columns WHERE table_schema = ? AND table_name = ?",
                (database, name),
            )
            .await
            .map_err(Error::sql(doing))?;
        let missing = spec.missing(&names);
        let kinds = ddl::columns_mysql(table);
        let add = missing.iter().map(|missing| {
            let kind = kinds.iter().find(|(column, _)| column == missing).map_or("TEXT", |(_, kind)| kind);
            format!("ALTER TABLE {quoted_name} ADD COLUMN {} {kind}", quoted(missing))
        });
        let add: Vec<String> = add.collect();
        Ok((!add.is_empty()).then(|| Fix::Sql(add.join(";\n"))))
    }

    async fn table(
        &self,
        connection: &mut Conn,
        table: &Table,
        spec: &TableSpec,
    ) -> Result<Vec<Finding>, Error> {
        let looked = match self.catalogue(spec).await {
            Ok(catalogue) if spec.stays() => Outbox::new(self, spec, &catalogue).map(|_| catalogue),
            Ok(catalogue) => catalogue.check(spec).map(|()| catalogue),
            Err(error) => Err(error),
        };
        let catalogue = match looked {
            Ok(catalogue) => catalogue,
            Err(error) => {
                return Ok(vec![match self.lacks(connection, table, spec).await? {
                    Some(fix) => Finding::fail(TABLE, report(&error)).mended_by(fix),
                    None => self.failed(TABLE, &error),
                }]);
            }
        };
        let (name, table) = (&spec.name, quoted_table(&spec.name));
        let change = match &spec.published_at {
            Some(column) => {
                format!("UPDATE {table} SET {} = NULL WHERE FALSE", quoted(column))
            }
            None => format!("DELETE FROM {table} WHERE FALSE"),
        };
        let mut findings = Vec::new();
        let change = Some(change).filter(|_| spec.stays());
        for statement in [format!("SELECT * FROM {table} WHERE FALSE")].into_iter().chain(change) {
            if let Some(error) = refused(connection, &statement).await {
                let says =
                    format!("{name}: this account may not do it ({error}): see the grants of `whippet sql`");
                let fix = self.grant(spec, &account(connection).await?);
                findings.push(Finding::fail(TABLE, says).mended_by(Fix::Sql(fix)));
            }
        }
        findings.extend(spec.slower().map(|slower| slower.finding(TABLE)));
        if !spec.stays() {
            // Its rows are in the order of the log, and nobody looks for them.
        } else if spec.sequence.is_none() {
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
