//! What `whippet doctor` finds about the server and its tables. Nothing is changed.

use std::{collections::BTreeSet, time::Duration};

use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use super::{
    super::{Error, Fault, TableSpec, ddl, literal, names::no_table, quoted, quoted_table, teardown},
    Postgres, check_kind,
};
use crate::{
    config::{self, AfterPublish, Config, Dialect, Wake},
    coordinate::report,
    doctor::{Finding, Fix, clocks},
    source::postgres::slot::Obstacle,
};

const SERVER: &str = "postgres: server";
const POOLER: &str = "postgres: pooler";
const OWN: &str = "postgres: the relay's own tables";
const TABLE: &str = "postgres: table";
const GRANTS: &str = "postgres: grants";
const ORDER: &str = "postgres: order";
const LOG: &str = "postgres: log";

/// What a pooler that has no server to spare may keep us waiting.
const POOLED_WITHIN: Duration = Duration::from_secs(2);

/// Whether row security keeps rows of `c` from us: there is no policy that lets us see all of them.
const HIDES: &str = "row_security_active(c.oid) AND (NOT EXISTS (SELECT FROM pg_policy p \
   WHERE p.polrelid = c.oid AND p.polpermissive AND p.polcmd = '*' AND pg_get_expr(p.polqual, c.oid) = 'true' \
     AND EXISTS (SELECT FROM unnest(p.polroles) r WHERE r = 0 OR pg_has_role(r, 'USAGE'))) \
   OR EXISTS (SELECT FROM pg_policy p WHERE p.polrelid = c.oid AND NOT p.polpermissive))";

fn sql(error: sqlx::Error) -> Error {
    Error::sql("ask the server")(error)
}

struct Server {
    role: String,
    version: String,
    number: i32,
    is_standby: bool,
    read_only: bool,
    tls: Option<String>,
    may_create: bool,
}

struct Sequence {
    name: String,
    cache: i64,
    increment: i64,
    cycles: bool,
}

/// A table: its number and kind, what it takes, what loses and hides its rows, and what our role may.
type Seen = (i64, String, i32, bool, bool, bool, bool, bool);

impl Postgres {
    /// The server, the relay's own tables, the outboxes, and the log where it is followed: one finding for
    /// each check.
    pub async fn examine(&self, config: &Config, specs: &[TableSpec]) -> Vec<Finding> {
        let mut connection = match self.connect().await {
            Ok(connection) => connection,
            Err(error) => return vec![Finding::fail(SERVER, report(&error)).mended_by(self.mends(&error))],
        };
        let mut findings = Vec::new();
        let found = self.find_all(&mut connection, config, specs, &mut findings).await;
        if let Err(error) = found {
            findings.push(Finding::fail(SERVER, report(&error)).mended_by(self.mends(&error)));
        }
        connection.close().await.ok();
        findings
    }

    async fn find_all(
        &self,
        connection: &mut PgConnection,
        config: &Config,
        specs: &[TableSpec],
        findings: &mut Vec<Finding>,
    ) -> Result<(), Error> {
        type Row = (String, String, i32, bool, bool, Option<String>, bool);
        let found: Row = sqlx::query_as(
            "SELECT current_user::text AS role, current_setting('server_version') AS version, \
               current_setting('server_version_num')::int AS number, pg_is_in_recovery() AS is_standby, \
               current_setting('default_transaction_read_only')::bool AS read_only, \
               (SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid() AND ssl) AS tls, \
               has_database_privilege(current_database(), 'CREATE') AS may_create",
        )
        .fetch_one(&mut *connection)
        .await
        .map_err(sql)?;
        let (role, version, number, is_standby, read_only, tls, may_create) = found;
        let server = Server { role, version, number, is_standby, read_only, tls, may_create };
        findings.push(of_server(&server));
        findings.push(
            clocks("postgres: clock", || async {
                let now = "SELECT extract(epoch FROM clock_timestamp())::float8";
                sqlx::query_scalar::<_, f64>(now).fetch_one(&mut *connection).await.map_err(sql)
            })
            .await?,
        );
        let pooled = self.is_pooled(connection).await?;
        findings.push(of_pooler(pooled, config));
        findings.extend(self.of_own_tables(connection, &server).await?);
        for spec in specs {
            let Some(table) = config.tables.iter().find(|table| table.name == spec.name) else { continue };
            if table.message_prefix().is_none() {
                findings.extend(self.table(connection, table, spec, &server.role).await?);
            }
        }
        if config.log().is_some() {
            findings.extend(self.log(config, specs).await);
        }
        Ok(())
    }

    /// What mends a connection that does not come about, or a server that refuses a question.
    fn mends(&self, error: &Error) -> Fix {
        let options = self.options();
        let (role, database) = (options.get_username(), options.get_database().unwrap_or_default());
        let (quoted_role, quoted_database) = (quoted(role), quoted(database));
        let config = |text: &str| Fix::Config(text.to_owned());
        let Error::Sql { source: Fault::Sqlx(error), .. } = error else {
            return config("source.password_file, source.password_command: (what can be read, or run, here)");
        };
        let says = error.as_database_error().map(|error| error.message()).unwrap_or_default();
        match error.as_database_error().and_then(|error| error.code()).as_deref() {
            // invalid_password
            Some("28P01") => config("source.password_file: (a file with the password of this role)"),
            // invalid_authorization_specification
            Some("28000") if says.contains("no encryption") => config("source.tls: { mode: require }"),
            Some("28000") if says.contains("does not exist") => {
                Fix::Sql(format!("CREATE ROLE {quoted_role} LOGIN"))
            }
            Some("28000") if says.contains("not permitted to log in") => {
                Fix::Sql(format!("ALTER ROLE {quoted_role} LOGIN"))
            }
            Some("28000") => Fix::Shell(format!(
                "(in pg_hba.conf) host {database} {role} (this host's address)/32 scram-sha-256"
            )),
            // invalid_catalog_name
            Some("3D000") => Fix::Sql(format!("CREATE DATABASE {quoted_database}")),
            // insufficient_privilege
            Some("42501") => {
                let what = says.strip_prefix("permission denied for ").and_then(|what| what.split_once(' '));
                let right = match what {
                    Some(("view" | "table", name)) => format!("SELECT ON {name}"),
                    Some(("function", name)) => format!("EXECUTE ON FUNCTION {name}"),
                    _ => format!("CONNECT ON DATABASE {quoted_database}"),
                };
                Fix::Sql(format!("GRANT {right} TO {quoted_role}"))
            }
            // too_many_connections
            Some("53300") if says.contains("for role") => {
                Fix::Sql(format!("ALTER ROLE {quoted_role} CONNECTION LIMIT -1"))
            }
            Some("53300") if says.contains("for database") => {
                Fix::Sql(format!("ALTER DATABASE {quoted_database} CONNECTION LIMIT -1"))
            }
            Some("53300") => config("source.max_connections: (less)"),
            _ if error.to_string().contains("certificate") => {
                config("source.tls.ca_file: (the authority that signed the server's certificate)")
            }
            _ => config("source.url: (the address of a server that can be reached from here)"),
        }
    }

    /// Whether a pooler hands servers out by the transaction: then another one may be behind the next statement of
    /// one connection, or the same one behind two.
    async fn is_pooled(&self, one: &mut PgConnection) -> Result<bool, Error> {
        let pid = "SELECT pg_backend_pid()";
        let before: i32 = sqlx::query_scalar(pid).fetch_one(&mut *one).await.map_err(sql)?;
        let asked = async {
            let mut other = PgConnection::connect_with(&self.options()).await?;
            let mut transaction = other.begin().await?;
            let held: i32 = sqlx::query_scalar(pid).fetch_one(&mut *transaction).await?;
            let after: i32 = sqlx::query_scalar(pid).fetch_one(&mut *one).await?;
            transaction.rollback().await?;
            other.close().await?;
            Ok::<bool, sqlx::Error>(held == before || after != before)
        };
        // It has no second server for us.
        tokio::time::timeout(POOLED_WITHIN, asked).await.unwrap_or(Ok(true)).map_err(sql)
    }

    async fn of_own_tables(
        &self,
        connection: &mut PgConnection,
        server: &Server,
    ) -> Result<Vec<Finding>, Error> {
        let (schema, role) = (quoted(&self.schema), quoted(&server.role));
        let statements = || {
            let additions = ddl::additions_postgres(&self.schema);
            ddl::relay_tables_postgres(&self.schema).into_iter().chain([additions])
        };
        let grants = format!(
            "GRANT USAGE ON SCHEMA {schema} TO {role}; \
             GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {schema} TO {role}"
        );
        let names: Vec<String> =
            teardown::own_tables().iter().map(|name| format!("{schema}.{}", quoted(name))).collect();
        // By the catalogue: a schema that we may not use hides its tables from regclass.
        let (there, all): (i64, bool) = sqlx::query_as(
            "SELECT count(*), coalesce(bool_and( \
               has_schema_privilege(n.oid, 'USAGE') AND has_table_privilege(c.oid, 'SELECT') \
               AND has_table_privilege(c.oid, 'INSERT') AND has_table_privilege(c.oid, 'UPDATE') \
               AND has_table_privilege(c.oid, 'DELETE')), false) \
             FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace \
             WHERE n.nspname = $1 AND c.relname = ANY($2)",
        )
        .bind(&self.schema)
        .bind(teardown::own_tables())
        .fetch_one(&mut *connection)
        .await
        .map_err(sql)?;
        Ok(vec![match (there == names.len() as i64, all, server.may_create) {
            (true, true, _) => Finding::ok(OWN, format!("they are in schema {}", self.schema)),
            (true, false, _) => {
                let says = format!("{} may not use those in schema {}", server.role, self.schema);
                Finding::fail(OWN, says).mended_by(Fix::Sql(grants))
            }
            (false, _, true) => Finding::ok(OWN, "some are missing, and are made when a relay starts"),
            (false, _, false) => {
                let says = format!("some are missing, and {} may not make them", server.role);
                let make: Vec<String> = statements().chain([grants]).collect();
                Finding::fail(OWN, says).mended_by(Fix::Sql(make.join(";\n")))
            }
        }])
    }

    async fn table(
        &self,
        connection: &mut PgConnection,
        table: &config::Table,
        spec: &TableSpec,
        role: &str,
    ) -> Result<Vec<Finding>, Error> {
        let (name, shown) = (quoted_table(&spec.name), &spec.name);
        let grants = ddl::grants_of(table, &quoted(role)).join(";\n");
        let schema = spec.name.split_once('.').map(|(schema, _)| schema);
        if let Some(schema) = schema {
            let hidden: bool = sqlx::query_scalar(
                "SELECT EXISTS (SELECT FROM pg_namespace WHERE nspname = $1 AND NOT has_schema_privilege(oid, 'USAGE'))",
            )
            .bind(schema)
            .fetch_one(&mut *connection)
            .await
            .map_err(sql)?;
            if hidden {
                let says = format!("{shown}: {role} may not use schema {schema}");
                let usage = format!("GRANT USAGE ON SCHEMA {} TO {}", quoted(schema), quoted(role));
                return Ok(vec![Finding::fail(GRANTS, says).mended_by(Fix::Sql(usage))]);
            }
        }
        let changed = match &spec.published_at {
            Some(column) => format!(
                "has_any_column_privilege(c.oid, 'UPDATE') AND NOT EXISTS (SELECT FROM pg_attribute a \
                WHERE a.attrelid = c.oid AND a.attname = {} AND NOT has_column_privilege(c.oid, a.attnum, 'UPDATE'))",
                literal(column)
            ),
            None => "true".into(),
        };
        let seen: Option<Seen> = sqlx::query_as(AssertSqlSafe(format!(
            "SELECT c.oid::bigint AS oid, c.relkind::text AS kind, pg_relation_is_updatable(c.oid, true) AS takes, \
               c.relpersistence = 'u' AS unlogged, \
               {HIDES} AS row_security, has_table_privilege(c.oid, 'SELECT') AS may_select, \
               {changed} AS may_change, has_table_privilege(c.oid, 'DELETE') AS may_delete \
             FROM pg_class c WHERE c.oid = to_regclass($1)"
        )))
        .bind(&name)
        .fetch_optional(&mut *connection)
        .await
        .map_err(sql)?;
        let Some((oid, kind, takes, unlogged, row_security, may_select, may_change, may_delete)) = seen
        else {
            let meant = self.meant(spec).await?;
            let fix = match &meant {
                Some(meant) => Fix::Config(format!("tables[].name: {meant}")),
                None => {
                    let make = ddl::outbox(table, Dialect::Postgres).into_iter().chain([grants]);
                    let make: Vec<String> = make.filter(|statement| !statement.starts_with("--")).collect();
                    Fix::Sql(make.join(";\n"))
                }
            };
            let says = report(&no_table(shown, meant.as_deref()));
            return Ok(vec![Finding::fail(TABLE, says).mended_by(fix)]);
        };
        if let Err(error) = check_kind(spec, &kind, takes) {
            return Ok(error.refusal(TABLE).into_iter().collect());
        }
        let mut findings = Vec::new();
        if let Some(finding) = self.columns(connection, table, spec, oid, grants.clone()).await? {
            // The rights to what is not there are another matter.
            return Ok(vec![finding]);
        }
        let deletes = match (spec.after_publish, spec.retention) {
            (AfterPublish::Delete, _) => spec.stays(),
            (AfterPublish::Mark | AfterPublish::Keep, retention) => retention.is_some(),
        };
        if !may_select || !may_change || (deletes && !may_delete) {
            let says = format!("{shown}: {role} may not read it and record what is published");
            findings.push(Finding::fail(GRANTS, says).mended_by(Fix::Sql(grants)));
        }
        if row_security {
            let says =
                format!("{shown}: row security hides rows from {role}, which would be lost without a word");
            let policy = format!("CREATE POLICY whippet ON {name} TO {} USING (true)", quoted(role));
            findings.push(Finding::fail(GRANTS, says).mended_by(Fix::Sql(policy)));
        }
        if unlogged {
            let says = format!("{shown} is UNLOGGED: a crash of the server empties it");
            let fix = Fix::Sql(format!("ALTER TABLE {name} SET LOGGED"));
            findings.push(Finding::warn(TABLE, says).mended_by(fix));
        }
        if !findings.iter().any(Finding::is_fail) {
            findings.push(Finding::ok(TABLE, format!("{shown}: has what is needed, and may be used")));
        }
        findings.extend(self.order(connection, spec, oid).await?);
        Ok(findings)
    }

    /// Columns that are missing, or cannot be what they are configured to be.
    async fn columns(
        &self,
        connection: &mut PgConnection,
        table: &config::Table,
        spec: &TableSpec,
        oid: i64,
        grants: String,
    ) -> Result<Option<Finding>, Error> {
        let names: Vec<String> = sqlx::query_scalar(
            "SELECT attname::text FROM pg_attribute \
             WHERE attrelid = $1::bigint::oid AND attnum > 0 AND NOT attisdropped",
        )
        .bind(oid)
        .fetch_all(&mut *connection)
        .await
        .map_err(sql)?;
        let missing = spec.missing(&names);
        if !missing.is_empty() {
            let kinds = ddl::columns(table, Dialect::Postgres);
            let name = quoted_table(&spec.name);
            let add = missing.iter().map(|missing| {
                let kind =
                    kinds.iter().find(|(column, _)| column == missing).map_or("text", |(_, kind)| kind);
                // There may be rows, and a key.
                let kind = kind.replace(" PRIMARY KEY", " UNIQUE");
                let kind = if kind.contains("DEFAULT") { kind } else { kind.replace(" NOT NULL", "") };
                format!("ALTER TABLE {name} ADD COLUMN {} {kind}", quoted(missing))
            });
            let index = spec.tx.iter().filter(|tx| missing.contains(&tx.as_str()));
            let index = index.map(|tx| format!("CREATE INDEX ON {name} ({})", quoted(tx)));
            // A right to a column goes with it.
            let add: Vec<String> = add.chain(index).chain([grants]).collect();
            let says = format!("{} has no column {}", spec.name, missing.join(", "));
            return Ok(Some(Finding::fail(TABLE, says).mended_by(Fix::Sql(add.join(";\n")))));
        }
        // As the relay does when it starts.
        match self.outbox(spec).await {
            Ok(_) | Err(Error::Sql { .. }) => Ok(None),
            Err(error) => {
                if let Some(finding) = error.refusal(TABLE) {
                    return Ok(Some(finding));
                }
                let fix = match &spec.tx {
                    Some(tx) if self.check_tx(spec, oid, tx).await.is_err() => {
                        Fix::Sql(self.mends_tx(spec, oid, tx).await?)
                    }
                    // An order column by which rows cannot be kept.
                    _ => Fix::Config("after_publish: mark".into()),
                };
                Ok(Some(Finding::fail(TABLE, report(&error)).mended_by(fix)))
            }
        }
    }

    /// Whether the order column tells which row was first.
    async fn order(
        &self,
        connection: &mut PgConnection,
        spec: &TableSpec,
        oid: i64,
    ) -> Result<Vec<Finding>, Error> {
        let Some(column) = spec.sequence.as_ref().filter(|_| spec.stays()) else { return Ok(Vec::new()) };
        let (name, shown) = (quoted_table(&spec.name), format!("{}.{column}", spec.name));
        // Its own, or one that its default names.
        let sequence: Option<(String, i64, i64, bool)> = sqlx::query_as(
            "SELECT s.seqrelid::regclass::text AS name, s.seqcache AS cache, s.seqincrement AS increment, \
               s.seqcycle AS cycles FROM pg_sequence s \
             WHERE s.seqrelid IN ( \
               SELECT d.objid FROM pg_depend d JOIN pg_attribute a ON a.attrelid = d.refobjid AND a.attnum = d.refobjsubid \
               WHERE d.classid = 'pg_class'::regclass AND d.refclassid = 'pg_class'::regclass \
                 AND d.refobjid = $1::bigint::oid AND a.attname = $2 AND d.deptype IN ('a', 'i') \
               UNION SELECT d.refobjid FROM pg_attrdef f JOIN pg_attribute a ON a.attrelid = f.adrelid AND a.attnum = f.adnum \
                 JOIN pg_depend d ON d.classid = 'pg_attrdef'::regclass AND d.objid = f.oid \
                   AND d.refclassid = 'pg_class'::regclass \
               WHERE f.adrelid = $1::bigint::oid AND a.attname = $2) LIMIT 1",
        )
        .bind(oid)
        .bind(column)
        .fetch_optional(&mut *connection)
        .await
        .map_err(sql)?;
        let indexed: bool = sqlx::query_scalar(
            "SELECT EXISTS (SELECT FROM pg_index i JOIN pg_attribute a ON a.attrelid = i.indrelid \
               AND a.attnum = i.indkey[0] WHERE i.indrelid = $1::bigint::oid AND i.indisvalid AND a.attname = $2)",
        )
        .bind(oid)
        .bind(column)
        .fetch_one(&mut *connection)
        .await
        .map_err(sql)?;
        let sequence =
            sequence.map(|(name, cache, increment, cycles)| Sequence { name, cache, increment, cycles });
        let mut findings = Vec::new();
        match &sequence {
            None => findings.push(Finding::warn(
                ORDER,
                format!("{shown} is filled from no sequence: whoever fills it has to give rising numbers"),
            )),
            Some(sequence) => findings.extend(of_sequence(&shown, sequence)),
        }
        if let Some(slower) = spec.slower() {
            findings.push(slower.finding(ORDER));
        } else if !indexed {
            let says = format!("{shown} has no index: each read looks at the whole table");
            let fix = Fix::Sql(format!("CREATE INDEX CONCURRENTLY ON {name} ({})", quoted(column)));
            findings.push(Finding::warn(ORDER, says).mended_by(fix));
        }
        Ok(findings)
    }

    async fn log(&self, config: &Config, specs: &[TableSpec]) -> Vec<Finding> {
        let Some(source) = &config.source else { return Vec::new() };
        let follows: BTreeSet<&str> = config
            .tables
            .iter()
            .filter(|table| table.capture != config::Capture::Poll)
            .map(|table| table.name.as_str())
            .collect();
        let specs: Vec<TableSpec> =
            specs.iter().filter(|spec| follows.contains(spec.name.as_str())).cloned().collect();
        match crate::source::postgres::doctor::examine(self, source, &specs).await {
            Ok(findings) => findings,
            Err(error) => {
                let fix = match &error {
                    Obstacle::Database(error) => self.mends(error),
                    _ => Fix::Config("source.url: (the address of a server that can be read from)".into()),
                };
                vec![Finding::fail(LOG, report(&error)).mended_by(fix)]
            }
        }
    }
}

fn of_server(server: &Server) -> Finding {
    let role = quoted(&server.role);
    if server.number < 140_000 {
        let says = format!("version {} is too old; expected PostgreSQL 14 at least", server.version);
        let fix = Fix::Config("source.url: (a server of PostgreSQL 14 or later)".into());
        return Finding::fail(SERVER, says).mended_by(fix);
    }
    if server.is_standby {
        let fix = Fix::Config("source.url: (the address of the primary)".into());
        return Finding::fail(SERVER, "it is a standby, which takes no changes").mended_by(fix);
    }
    if server.read_only {
        let fix = Fix::Sql(format!("ALTER ROLE {role} SET default_transaction_read_only = off"));
        let says = format!("default_transaction_read_only is on for {}", server.role);
        return Finding::fail(SERVER, says).mended_by(fix);
    }
    let tls = server.tls.as_deref().unwrap_or("without TLS");
    Finding::ok(SERVER, format!("version {}, {tls}, as {}", server.version, server.role))
}

fn of_pooler(pooled: bool, config: &Config) -> Finding {
    let listens = config.tables.iter().find(|table| table.poll.wake == Wake::Notify);
    match (pooled, listens) {
        (true, Some(table)) => {
            let says = format!(
                "the connection goes through a pooler by the transaction, which loses LISTEN: table {} is woken by \
                 nothing",
                table.name
            );
            Finding::fail(POOLER, says).mended_by(Fix::Config("poll.wake: none".into()))
        }
        (true, None) => Finding::ok(POOLER, "one that pools transactions, which is enough"),
        (false, _) => Finding::ok(POOLER, "none that pools transactions"),
    }
}

fn of_sequence(shown: &str, sequence: &Sequence) -> Vec<Finding> {
    let Sequence { name, cache, increment, cycles } = sequence;
    let mut findings = Vec::new();
    let mut fail = |says: String, fix: String| {
        findings.push(Finding::fail(ORDER, says).mended_by(Fix::Sql(format!("ALTER SEQUENCE {name} {fix}"))));
    };
    if *cache != 1 {
        let says = format!(
            "{shown}: sequence {name} has CACHE {cache}: each session keeps numbers back, and a later row gets a \
             smaller one"
        );
        fail(says, "CACHE 1".into());
    }
    if *increment < 0 {
        fail(format!("{shown}: sequence {name} counts down"), "INCREMENT BY 1".into());
    }
    if *cycles {
        fail(format!("{shown}: sequence {name} begins anew at its end (CYCLE)"), "NO CYCLE".into());
    }
    if findings.is_empty() {
        findings.push(Finding::ok(ORDER, format!("{shown}: sequence {name} rises, with CACHE 1")));
    }
    findings
}
