//! PostgreSQL 14 to 18: the pool, the lease and the relay's own tables.

mod doctor;
mod group;
mod holds;
mod kept;
mod outbox;
mod released;

use std::{
    convert::Infallible,
    str::FromStr,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use sqlx::{
    AssertSqlSafe, Connection as _,
    postgres::{PgConnectOptions, PgConnection, PgListener, PgPool, PgPoolOptions, PgSslMode},
};
use tokio::sync::Notify;

pub use self::outbox::Outbox;
use super::{Error, GROUP, LEASE_NAME, TableSpec, ddl, quoted, quoted_table, teardown};
use crate::{
    config::{self, TlsMode},
    source::{password::Password, postgres::wire},
};

#[derive(Clone, Debug)]
pub struct Postgres {
    connections: Arc<Mutex<Connections>>,
    most: u32,
    password: Password,
    url_password: Option<config::Secret>,
    schema: String,
}

#[derive(Debug)]
struct Connections {
    pool: PgPool,
    options: PgConnectOptions,
    made: Instant,
}

/// A pool that was just renewed is not renewed again: several tasks notice the same fault.
const RENEW_AT_MOST_EVERY: Duration = Duration::from_secs(5);

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
        let connections = Connections { pool: pool(&options, most), options, made: Instant::now() };
        Ok(Postgres {
            connections: Arc::new(Mutex::new(connections)),
            most,
            password: Password::of(source),
            url_password: url_password(source.url.expose()),
            schema: source.relay_schema.clone(),
        })
    }

    fn connections(&self) -> MutexGuard<'_, Connections> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(in crate::source) fn pool(&self) -> PgPool {
        self.connections().pool.clone()
    }

    pub(in crate::source) fn schema(&self) -> &str {
        &self.schema
    }

    /// How to connect, with the password as it is now.
    pub(in crate::source) fn options(&self) -> PgConnectOptions {
        self.connections().options.clone()
    }

    /// The password as it is now, or that of the URL.
    pub(in crate::source) async fn password(&self) -> Result<Option<String>, Error> {
        let of_url = || self.url_password.as_ref().map(|password| password.expose().to_owned());
        Ok(self.password.read().await?.or_else(of_url))
    }

    /// How to connect for replication; the password is asked for each time.
    pub fn replication(&self, source: &config::Source, application: &str) -> wire::Settings {
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
            tls: source.tls.clone(),
            // Values as text are to be those that polling gets, so the session is as sqlx makes its own.
            parameters: vec![
                parameter("application_name", application),
                parameter("DateStyle", "ISO, MDY"),
                parameter("TimeZone", "UTC"),
                parameter("extra_float_digits", "2"),
                parameter("bytea_output", "hex"),
            ],
        }
    }

    /// Throws all connections away: the next ones may lead to another server. Those that hang do so
    /// on their own.
    pub fn renew(&self) {
        let mut connections = self.connections();
        if connections.made.elapsed() >= RENEW_AT_MOST_EVERY {
            connections.pool = pool(&connections.options, self.most);
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

    /// A connection of its own, with the password as it is now, which the pool takes up too.
    pub async fn connect(&self) -> Result<PgConnection, Error> {
        let mut options = self.connections().options.clone();
        if let Some(password) = self.password.read().await? {
            options = options.password(&password);
            let mut connections = self.connections();
            connections.pool.set_connect_options(options.clone());
            connections.options = options.clone();
        }
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
        let oid: Option<i64> = sqlx::query_scalar("SELECT to_regclass($1)::oid::bigint")
            .bind(&table)
            .fetch_one(&self.pool())
            .await
            .map_err(Error::sql("look for the table"))?;
        let Some(oid) = oid else {
            return Err(Error::Setup(format!(
                "table {} does not exist, or this role cannot see its schema: make it with \
                 `whippet sql`, or mend tables[].name",
                spec.name
            )));
        };
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
        if let Some(tx) = &spec.tx {
            self.check_tx(spec, oid, tx).await?;
        }
        Outbox::new(self, spec, &columns, sequence_oid.unwrap_or(oid))
    }
}
