//! PostgreSQL 14 to 18: the pool, the lease and the relay's own tables.

mod doctor;
mod group;
mod holds;
mod kept;
mod large;
mod outbox;
mod places;
mod released;
mod statements;

use std::{
    convert::Infallible,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sqlx::{
    AssertSqlSafe, Connection as _,
    postgres::{PgConnectOptions, PgConnection, PgListener, PgPool, PgPoolOptions, PgSslMode},
};
use tokio::sync::Notify;
use tracing::info;

use self::large::Large;
pub use self::outbox::Outbox;
use super::{
    Error, GROUP, LEASE_NAME, TableSpec,
    claims::Claims,
    ddl,
    names::no_table,
    place::{Candidates, Distinct},
    quoted, quoted_table, teardown,
};
use crate::{
    config::{self, AfterPublish, TlsMode},
    doctor::Fix,
    source::{
        dial::without_brackets,
        password::{LOOK_EVERY, Password},
        postgres::wire,
    },
};

#[derive(Clone, Debug)]
pub struct Postgres {
    connections: Arc<Mutex<Connections>>,
    most: u32,
    password: Password,
    url_password: Option<config::Secret>,
    schema: String,
    claims: Claims,
}

#[derive(Debug)]
struct Connections {
    pool: PgPool,
    /// Those that are for large payloads, of the pool's number.
    large: Arc<Large>,
    options: PgConnectOptions,
    tls: config::Tls,
    made: Instant,
    /// When the password's file was looked at, and a number that changes with what it had.
    looked: Instant,
    seen: Option<u64>,
}

impl Connections {
    /// For the connections that are made from now on; those that there are go on.
    fn take_up(&mut self, password: &str) {
        let now = Some(fingerprint(password));
        if now != self.seen {
            if self.seen.is_some() {
                info!("the password of the database has changed and is taken up");
            }
            self.seen = now;
            self.options = self.options.clone().password(password);
            self.pool.set_connect_options(self.options.clone());
        }
    }
}

fn fingerprint(password: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    password.hash(&mut hasher);
    hasher.finish()
}

fn pool(options: &PgConnectOptions, most: u32) -> PgPool {
    PgPoolOptions::new()
        .max_connections(most)
        .acquire_timeout(Duration::from_secs(10))
        // A dead connection shows as an error of the statement, which is tried again anyway.
        .test_before_acquire(false)
        .connect_lazy_with(options.clone())
}

/// The password in a URL, or that of the environment, as sqlx finds it.
fn url_password(url: &str) -> Option<config::Secret> {
    let url = url::Url::parse(url).ok();
    let parameter = |url: &url::Url| {
        url.query_pairs().find(|(name, _)| name == "password").map(|(_, value)| value.into_owned())
    };
    let authority = |url: &url::Url| {
        let decoded = percent_encoding::percent_decode_str(url.password()?).decode_utf8_lossy();
        Some(decoded.into_owned())
    };
    url.as_ref()
        .and_then(|url| parameter(url).or_else(|| authority(url)))
        .or_else(|| std::env::var("PGPASSWORD").ok())
        .map(config::Secret::new)
}

impl Postgres {
    pub fn new(source: &config::Source) -> Result<Postgres, Error> {
        let mut options = PgConnectOptions::from_str(source.url.expose())
            .map_err(|error| Error::Setup(format!("source.url: {error}")))?
            .application_name("whippet")
            .ssl_mode(match source.tls.mode {
                TlsMode::Disable => PgSslMode::Disable,
                TlsMode::Prefer => PgSslMode::Prefer,
                TlsMode::Require => PgSslMode::Require,
                TlsMode::VerifyCa => PgSslMode::VerifyCa,
                TlsMode::VerifyFull => PgSslMode::VerifyFull,
            });
        // The driver looks a name in brackets up.
        let host = without_brackets(options.get_host()).to_owned();
        if host != options.get_host() {
            options = options.host(&host);
        }
        if let Some(ca) = &source.tls.ca_file {
            options = options.ssl_root_cert(ca);
        }
        if let Some(cert) = &source.tls.cert_file {
            options = options.ssl_client_cert(cert);
        }
        if let Some(key) = &source.tls.key_file {
            options = options.ssl_client_key(key);
        }
        let most = source.max_connections;
        let (pool, now) = (pool(&options, most), Instant::now());
        let large = Arc::default();
        let tls = source.tls.clone();
        let connections = Connections { pool, large, options, tls, made: now, looked: now, seen: None };
        Ok(Postgres {
            connections: Arc::new(Mutex::new(connections)),
            most,
            password: Password::of(source),
            url_password: url_password(source.url.expose()),
            schema: source.relay_schema.clone(),
            claims: Claims::default(),
        })
    }

    /// With the password that its file has now. Certificates are read by the driver for each connection.
    fn connections(&self) -> MutexGuard<'_, Connections> {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if connections.looked.elapsed() >= LOOK_EVERY {
            connections.looked = Instant::now();
            if let Some(password) = self.password.in_file() {
                connections.take_up(&password);
            }
        }
        connections
    }

    pub(in crate::source) fn pool(&self) -> PgPool {
        self.connections().pool.clone()
    }

    fn pools(&self) -> (PgPool, Arc<Large>) {
        let connections = self.connections();
        (connections.pool.clone(), connections.large.clone())
    }

    pub(in crate::source) fn schema(&self) -> &str {
        &self.schema
    }

    /// How to connect, with the password as it was last known.
    pub(in crate::source) fn options(&self) -> PgConnectOptions {
        self.connections().options.clone()
    }

    /// The password as it is now, or that of the URL.
    pub(in crate::source) async fn password(&self) -> Result<Option<String>, Error> {
        let of_url = || self.url_password.as_ref().map(|password| password.expose().to_owned());
        Ok(self.read_password().await?.or_else(of_url))
    }

    /// How to connect without the driver; the password is asked for each time. Values as text are to be those that polling
    /// gets, so the session is as sqlx makes its own.
    fn wire(&self, application: &str) -> wire::Settings {
        let options = self.options();
        let parameter = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        wire::Settings {
            host: match options.get_socket() {
                Some(socket) => socket.display().to_string(),
                None => options.get_host().to_owned(),
            },
            port: options.get_port(),
            user: options.get_username().to_owned(),
            password: None,
            database: options.get_database().unwrap_or(options.get_username()).to_owned(),
            tls: self.connections().tls.clone(),
            replication: false,
            parameters: vec![
                parameter("application_name", application),
                parameter("DateStyle", "ISO, MDY"),
                parameter("TimeZone", "UTC"),
                parameter("extra_float_digits", "2"),
            ],
        }
    }

    /// How to connect for replication.
    pub fn replication(&self, application: &str) -> wire::Settings {
        let mut settings = self.wire(application);
        settings.parameters.push(("bytea_output".to_owned(), "hex".to_owned()));
        wire::Settings { replication: true, ..settings }
    }

    /// Throws all connections away that are older than `age`: the next ones may lead to another server. Those that hang do so
    /// on their own.
    pub fn renew(&self, age: Duration) {
        let mut connections = self.connections();
        if connections.made.elapsed() >= age {
            connections.pool = pool(&connections.options, self.most);
            connections.large = Arc::new(connections.large.renewed());
            connections.made = Instant::now();
        }
    }

    /// Connects, and makes the relay's own tables where they are missing. Called again after every
    /// failure, so this is also where a rotated password is taken up. On a connection of its own:
    /// the pool tries a refused one again in silence until its time is up, and hides why.
    pub async fn install(&self) -> Result<(), Error> {
        let mut connection = self.connect().await?;
        self.make_tables(&mut connection).await?;
        connection.close().await.map_err(Error::sql("connect to the source database"))
    }

    /// The password as it is now, which the pool takes up too.
    async fn read_password(&self) -> Result<Option<String>, Error> {
        let password = self.password.read().await?;
        if let Some(password) = &password {
            self.connections().take_up(password);
        }
        Ok(password)
    }

    /// The server refuses the login.
    pub fn login_refused(&self) {
        let this = self.clone();
        self.password.refused(move |password| this.connections().take_up(password));
    }

    /// A connection of its own, with the password as it is now.
    pub async fn connect(&self) -> Result<PgConnection, Error> {
        self.read_password().await?;
        let options = self.connections().options.clone();
        PgConnection::connect_with(&options).await.map_err(Error::sql("connect to the source database"))
    }

    async fn make_tables(&self, connection: &mut PgConnection) -> Result<(), Error> {
        let there: bool = sqlx::query_scalar(
            "SELECT bool_and(to_regclass(format('%I.%I', $1::text, name)) IS NOT NULL) FROM unnest($2::text[]) name",
        )
        .bind(&self.schema)
        .bind(teardown::own_tables())
        .fetch_one(&mut *connection)
        .await
        .map_err(Error::sql("look for the relay's own tables"))?;
        if there {
            return Ok(());
        }
        let additions = ddl::additions_postgres(&self.schema);
        for statement in ddl::relay_tables_postgres(&self.schema).into_iter().chain([additions]) {
            sqlx::query(AssertSqlSafe(statement)).execute(&mut *connection).await.map_err(|source| {
                match source.as_database_error().and_then(|error| error.code()).as_deref() {
                    // insufficient_privilege
                    Some("42501") => Error::Setup(format!(
                        "the relay's own tables are missing from schema {} and this role may not \
                         make them ({source}): run the statements of `whippet sql` as the owner \
                         of the database",
                        self.schema
                    )),
                    _ => Error::Sql { doing: "make the relay's own tables", source: source.into() },
                }
            })?;
        }
        Ok(())
    }

    /// Keeps a relay of an older version, which knows of one lease only, from working beside the group. `false`
    /// where one works now.
    async fn hold_off_older(&self, length: Duration) -> Result<bool, Error> {
        let sql = format!(
            "INSERT INTO {schema}.leases AS l (name, owner, epoch, expires_at) \
             VALUES ($1, $2, 1, clock_timestamp() + make_interval(secs => $3)) \
             ON CONFLICT (name) DO UPDATE SET \
               owner = excluded.owner, expires_at = excluded.expires_at, \
               epoch = CASE WHEN l.owner = excluded.owner THEN l.epoch ELSE l.epoch + 1 END \
             WHERE l.owner = excluded.owner OR l.expires_at <= clock_timestamp()",
            schema = quoted(&self.schema)
        );
        let done = sqlx::query(AssertSqlSafe(sql))
            .bind(LEASE_NAME)
            .bind(GROUP)
            .bind(length.as_secs_f64())
            .execute(&self.pool())
            .await
            .map_err(Error::sql("renew the lease"))?;
        Ok(done.rows_affected() > 0)
    }

    async fn join(&self, join: &str, owner: &str, micros: i64, tables: &str) -> Result<i64, Error> {
        let join = format!("{join} RETURNING epoch");
        let join = sqlx::query_scalar(AssertSqlSafe(join)).bind(owner).bind(micros).bind(tables);
        join.fetch_one(&self.pool()).await.map_err(Error::sql("join the group"))
    }

    /// Listens on the channel named like the table and passes every NOTIFY on. Ends with an error
    /// of the connection, which is its own: it would hold one of the pool's for ever.
    pub async fn listen(&self, table: &str, heard: &Notify) -> Result<Infallible, Error> {
        let options = self.connections().options.clone();
        let pool = PgPoolOptions::new().max_connections(1).connect_lazy_with(options);
        let ended: Result<Infallible, sqlx::Error> = async {
            let mut listener = PgListener::connect_with(&pool).await?;
            listener.listen(table).await?;
            // What was notified before we listened.
            heard.notify_one();
            loop {
                listener.recv().await?;
                heard.notify_one();
            }
        }
        .await;
        ended.map_err(Error::sql("listen for notifications"))
    }

    pub async fn outbox(&self, spec: &TableSpec) -> Result<Outbox, Error> {
        let table = quoted_table(&spec.name);
        let found: Option<(i64, String, i32)> = sqlx::query_as(
            "SELECT oid::bigint, relkind::text, pg_relation_is_updatable(oid, true) FROM pg_class \
             WHERE oid = to_regclass($1)",
        )
        .bind(&table)
        .fetch_optional(&self.pool())
        .await
        .map_err(Error::sql("look for the table"))?;
        let Some((oid, kind, takes)) = found else {
            return Err(no_table(&spec.name, self.meant(spec).await?.as_deref()));
        };
        check_kind(spec, &kind, takes)?;
        let columns: Vec<(String, String)> = sqlx::query_as(
            "SELECT attname::text, format_type(atttypid, NULL) FROM pg_attribute \
             WHERE attrelid = $1::bigint::oid AND attnum > 0 AND NOT attisdropped ORDER BY attnum",
        )
        .bind(oid)
        .fetch_all(&self.pool())
        .await
        .map_err(Error::sql("read the table's columns"))?;
        // The sequence's lock tells which transactions have taken a number; without a sequence of
        // its own, the lock on the table tells which have inserted.
        let sequence_oid: Option<i64> = match &spec.sequence {
            Some(sequence) if columns.iter().any(|(name, _)| name == sequence) => {
                sqlx::query_scalar("SELECT pg_get_serial_sequence($1, $2)::regclass::oid::bigint")
                    .bind(&table)
                    .bind(sequence)
                    .fetch_one(&self.pool())
                    .await
                    .map_err(Error::sql("look for the table's sequence"))?
            }
            _ => None,
        };
        spec.check(&columns)?;
        self.tell_apart(spec, oid).await?;
        if let Some(tx) = &spec.tx {
            self.check_tx(spec, oid, tx).await?;
        }
        Outbox::new(self, spec, &columns, sequence_oid.unwrap_or(oid))
    }

    /// The table that may be meant by a name that there is not: its name has the same letters.
    async fn meant(&self, spec: &TableSpec) -> Result<Option<String>, Error> {
        let (schema, table) = spec.name.split_once('.').unzip();
        sqlx::query_scalar(
            "SELECT CASE WHEN $1 IS NULL THEN relname ELSE concat(nspname, '.', relname) END \
             FROM pg_class c JOIN pg_namespace n ON n.oid = relnamespace \
             WHERE relkind IN ('r', 'p', 'v', 'f') AND lower(relname) = lower($2) \
               AND CASE WHEN $1 IS NULL THEN pg_table_is_visible(c.oid) ELSE lower(nspname) = lower($1) END \
             ORDER BY 1 LIMIT 1",
        )
        .bind(schema)
        .bind(table.unwrap_or(&spec.name))
        .fetch_optional(&self.pool())
        .await
        .map_err(Error::sql("look for the table"))
    }

    /// Refuses a table that is relayed by another name; decides by what its rows are told apart. An index that is
    /// deferred tells too: only what is committed is read. So does a sequence of the column's own, whose numbers are
    /// given once.
    pub(in crate::source) async fn tell_apart(&self, spec: &TableSpec, oid: i64) -> Result<(), Error> {
        self.claims.claim(oid.to_string(), spec)?;
        let Some((order, id)) = spec.candidates() else { return Ok(()) };
        let found: Vec<(String, bool, bool, bool, bool)> = sqlx::query_as(
            "SELECT a.attname::text, a.atttypid IN ('int2'::regtype, 'int4'::regtype, 'int8'::regtype), \
               (SELECT bool_or(TRUE) FROM pg_index i WHERE i.indrelid = c.oid AND i.indisunique AND i.indisvalid \
                 AND i.indpred IS NULL AND i.indnkeyatts = 1 AND i.indkey[0] = a.attnum \
                 AND NOT inherited) IS TRUE \
                 OR pg_get_serial_sequence(c.oid::regclass::text, a.attname) IS NOT NULL, \
               a.attnotnull OR c.relkind IN ('v', 'f'), inherited OR c.relkind IN ('v', 'f', 'p') \
             FROM pg_class c JOIN pg_attribute a ON a.attrelid = c.oid AND NOT a.attisdropped, \
               LATERAL (SELECT c.relkind <> 'p' AND c.relhassubclass) AS of(inherited) \
             WHERE c.oid = $1::bigint::oid AND a.attname = ANY($2)",
        )
        .bind(oid)
        .bind([order, id])
        .fetch_all(&self.pool())
        .await
        .map_err(Error::sql("look for the table's unique indexes"))?;
        if !found.iter().any(|(name, ..)| name == order) {
            return Ok(());
        }
        let table = quoted_table(&spec.name);
        let of = |wanted: &str| {
            let column = found.iter().find(|(name, ..)| name == wanted);
            let (is_int, unique, filled, is_untold) = column
                .map_or((true, false, false, false), |(_, is_int, unique, filled, is_untold)| {
                    (*is_int, *unique, *filled, *is_untold)
                });
            let name = quoted(wanted);
            let index = (!unique).then(|| format!("CREATE UNIQUE INDEX CONCURRENTLY ON {table} ({name})"));
            let fill = (!filled).then(|| format!("ALTER TABLE {table} ALTER COLUMN {name} SET NOT NULL"));
            let statements: Vec<String> = match is_int || wanted == id {
                true => index.into_iter().chain(fill).collect(),
                // Two times may be the same.
                false => vec![format!(
                    "ALTER TABLE {table} ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY UNIQUE -- then \
                     columns.sequence: seq"
                )],
            };
            let mend = (!is_untold && !statements.is_empty()).then(|| statements.join("; "));
            (Distinct { unique, filled, mend }, is_untold)
        };
        let ((order, is_untold), (id, _)) = (of(order), of(id));
        spec.tell_apart(Candidates { order, id, is_untold })
    }
}

/// Refuses what nothing can be recorded in. `takes`: what the server says that it takes, as bits.
fn check_kind(spec: &TableSpec, kind: &str, takes: i32) -> Result<(), Error> {
    const UPDATE: i32 = 1 << 2;
    const DELETE: i32 = 1 << 4;
    let recorded = match spec.after_publish {
        AfterPublish::Delete => DELETE,
        AfterPublish::Mark => UPDATE,
        AfterPublish::Keep => 0,
    };
    let expires = if spec.retention.is_some() { DELETE } else { 0 };
    let needs = if spec.stays() { recorded | expires } else { 0 };
    let what = match kind {
        "m" => "a materialized view",
        _ if takes & needs == needs => return Ok(()),
        "v" => "a view that rows cannot be deleted from or marked in",
        "f" => "a foreign table that rows cannot be deleted from or marked in",
        _ => "no table",
    };
    Err(Error::Refused {
        says: format!("{} is {what}: what was published could not be recorded", spec.name),
        fix: Fix::Config("tables[].name: (the table that the application writes to)".into()),
    })
}

#[cfg(test)]
mod tests {
    use std::{borrow::Cow, error::Error as StdError};

    use sqlx::error::{DatabaseError, ErrorKind};

    use super::*;
    use crate::source::database::Database;

    /// What a server says, by its SQLSTATE.
    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Says(&'static str);

    impl DatabaseError for Says {
        fn message(&self) -> &str {
            self.0
        }
        fn code(&self) -> Option<Cow<'_, str>> {
            Some(self.0.into())
        }
        fn as_error(&self) -> &(dyn StdError + Send + Sync + 'static) {
            self
        }
        fn as_error_mut(&mut self) -> &mut (dyn StdError + Send + Sync + 'static) {
            self
        }
        fn into_error(self: Box<Self>) -> Box<dyn StdError + Send + Sync + 'static> {
            self
        }
        fn kind(&self) -> ErrorKind {
            ErrorKind::Other
        }
    }

    #[tokio::test]
    async fn connections_to_a_server_that_refuses_are_left_sooner_than_those_to_a_silent_one() {
        let text = "{ source: { url: 'postgres://u@127.0.0.1:1/d' }, kafka: { bootstrap_servers: 'b:1' }, tables: [{ name: t }] }";
        let config = config::parse("test", text, &std::collections::BTreeMap::new()).unwrap();
        let db = Postgres::new(&config.source.unwrap()).unwrap();
        let says = |code| Error::sql("test")(sqlx::Error::Database(Box::new(Says(code))));
        for (error, seconds, left) in [
            (says("25006"), 2, true),
            (says("57P01"), 2, true),
            // Just made, for the same fault.
            (says("25006"), 0, false),
            (Error::NoAnswer("test"), 2, false),
            (Error::NoAnswer("test"), 6, true),
            (Error::sql("test")(sqlx::Error::PoolTimedOut), 2, false),
            (Error::sql("test")(sqlx::Error::PoolTimedOut), 6, true),
            (says("42601"), 60, false),
        ] {
            let made = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            db.connections().made = made;
            Database::Postgres(db.clone()).failed(&error);
            assert_eq!(db.connections().made != made, left, "{error:?} after {seconds} s");
        }
    }
}
