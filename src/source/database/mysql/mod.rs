//! MySQL 8 and later, and MariaDB 10.6 and later: the pool, the lease and the relay's own tables.

mod columns;
mod contents;
mod doctor;
mod gaps;
mod group;
mod holds;
mod log;
mod outbox;
mod pool;
pub mod position;
mod sql;
mod statements;

use std::{
    convert::Infallible,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use mysql_async::{
    ClientIdentity, Conn, DriverError, IoError, Opts, OptsBuilder, PoolConstraints, PoolOpts, SslOpts,
    prelude::Queryable as _,
};
use sqlx::AssertSqlSafe;
use tokio::sync::Notify;
use tracing::info;

use self::{
    columns::Catalogue,
    pool::Pool,
    sql::{literal, quoted},
};
pub use self::{columns::Column, outbox::Outbox};
use super::{
    Error, GROUP, LEASE_NAME, TableSpec,
    audit::Line,
    claims::Claims,
    ddl,
    error::{REFUSED, UNANSWERED},
};
use crate::{
    config::{self, TlsMode},
    source::{
        dial::without_brackets,
        password::{LOOK_EVERY, Password},
    },
};

const CONNECT: &str = "connect to the source database";
/// The longest value that the protocol has; what the server takes is its own matter.
const PACKET: usize = 1 << 30;

/// What every session of the relay has, whatever the server's defaults are: no gaps are locked, times are
/// UTC, a text that does not fit is an error. MariaDB keeps what a subquery returned by the columns that it
/// looked at, in their collation: whether `Id` is held would be answered by what was found of `ID`.
const SESSION: [&str; 3] = [
    // Constants of both kinds then have the same collation.
    "SET NAMES utf8mb4",
    "SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
    "SET SESSION time_zone = '+00:00', sql_mode = 'STRICT_TRANS_TABLES,NO_BACKSLASH_ESCAPES', autocommit = 1 \
     /*M! , optimizer_switch = 'subquery_cache=off' */",
];

#[derive(Clone, Debug)]
pub struct Mysql {
    connections: Arc<Mutex<Connections>>,
    most: usize,
    tls: config::Tls,
    password: Password,
    pub(super) database: String,
    prefix: String,
    claims: Claims,
}

#[derive(Debug)]
struct Connections {
    pool: Pool,
    options: Opts,
    made: Instant,
    /// When the files that `options` has were looked at.
    looked: Instant,
}

impl Connections {
    /// For the connections that are made from now on; those that work go on until they are done.
    fn take_up(&mut self, options: Opts) {
        let is_new = |one: &Opts| one.pass() != options.pass() || one.ssl_opts() != options.ssl_opts();
        if is_new(&self.options) {
            info!("the password or the certificates of the database are others, and are taken up");
            self.pool = Pool::new(options.clone());
            self.options = options;
            self.made = Instant::now();
        }
    }
}

/// With what the files have now: the driver reads a file once for all connections of a pool, and one that was rotated
/// has to be another pool's.
fn tls_now(tls: &config::Tls) -> Result<Option<SslOpts>, Error> {
    tls_with(tls, |file| match std::fs::read(file) {
        Ok(content) => Ok(content),
        Err(error) => Err(Error::Setup(format!("source.tls {}: {error}", file.display()))),
    })
}

fn tls_with<E>(
    tls: &config::Tls,
    read: impl Fn(&PathBuf) -> Result<Vec<u8>, E>,
) -> Result<Option<SslOpts>, E> {
    let mut options = SslOpts::default();
    if let Some(ca) = &tls.ca_file {
        options = options.with_root_certs(vec![read(ca)?.into()]).with_disable_built_in_roots(true);
    }
    if let (Some(cert), Some(key)) = (&tls.cert_file, &tls.key_file) {
        options =
            options.with_client_identity(Some(ClientIdentity::new(read(cert)?.into(), read(key)?.into())));
    }
    Ok(match tls.mode {
        TlsMode::Disable => None,
        TlsMode::Prefer | TlsMode::Require => Some(options.with_danger_accept_invalid_certs(true)),
        // `check` refuses the first: this driver has no way to leave the name out (docs/decisions/0008).
        TlsMode::VerifyCa | TlsMode::VerifyFull => Some(options),
    })
}

/// As [`Error::renews_older_than`]: of a server that shuts down, has become a replica, or is not there.
pub(super) fn renews_older_than(error: &mysql_async::Error) -> Option<Duration> {
    match error {
        // ER_OPTION_PREVENTS_STATEMENT (read_only), ER_READ_ONLY_MODE, ER_SERVER_SHUTDOWN
        mysql_async::Error::Server(error) => matches!(error.code, 1290 | 1836 | 1053).then_some(REFUSED),
        mysql_async::Error::Io(_) | mysql_async::Error::Driver(_) => Some(UNANSWERED),
        mysql_async::Error::Other(_) | mysql_async::Error::Url(_) => None,
    }
}

impl Mysql {
    pub fn new(source: &config::Source) -> Result<Mysql, Error> {
        let wrong = |error| Error::Setup(format!("source.url: {error}"));
        let url = Opts::from_url(source.url.expose()).map_err(wrong)?;
        let database = url.db_name().unwrap_or_default().to_owned();
        let most = source.max_connections as usize;
        // A file that is missing trusts nobody, until the first connection says that it is missing.
        let Ok(tls) = tls_with::<Infallible>(&source.tls, |file| Ok(std::fs::read(file).unwrap_or_default()));
        // The driver looks a name in brackets up.
        let host = without_brackets(url.ip_or_hostname()).to_owned();
        let options = OptsBuilder::from_opts(url)
            .ip_or_hostname(host)
            .ssl_opts(tls)
            // The URL says how to connect, and not the server.
            .prefer_socket(false)
            .max_allowed_packet(Some(PACKET))
            .tcp_keepalive(Some(Duration::from_secs(30)))
            .stmt_cache_size(0)
            .setup(SESSION.to_vec())
            .connect_attribute("program_name", "whippet");
        let options = pooled(options, most);
        let (pool, now) = (Pool::new(options.clone()), Instant::now());
        let connections = Connections { pool, options, made: now, looked: now };
        Ok(Mysql {
            connections: Arc::new(Mutex::new(connections)),
            most,
            tls: source.tls.clone(),
            password: Password::of(source),
            database,
            prefix: source.relay_schema.clone(),
            claims: Claims::default(),
        })
    }

    /// As the files are now.
    fn connections(&self) -> MutexGuard<'_, Connections> {
        let mut connections = self.connections.lock().unwrap_or_else(PoisonError::into_inner);
        if connections.looked.elapsed() >= LOOK_EVERY {
            connections.looked = Instant::now();
            if let Some(options) = self.as_files_are(&connections.options) {
                connections.take_up(options);
            }
        }
        connections
    }

    /// `None` where one of them is just being replaced.
    fn as_files_are(&self, options: &Opts) -> Option<Opts> {
        let mut now = OptsBuilder::from_opts(options.clone());
        // A server that has no TLS was found to have none.
        if options.ssl_opts().is_some() {
            now = now.ssl_opts(tls_now(&self.tls).ok()?);
        }
        if let Password::File(_) = self.password {
            now = now.pass(Some(self.password.in_file()?));
        }
        Some(pooled(now, self.most))
    }

    pub(super) fn pool(&self) -> Pool {
        self.connections().pool.clone()
    }

    /// The pool, and when it was made: another one has another password, other certificates, or another server.
    fn pool_since(&self) -> (Pool, Instant) {
        let connections = self.connections();
        (connections.pool.clone(), connections.made)
    }

    /// Throws all connections away that are older than `age`: the next ones may lead to another server.
    pub fn renew(&self, age: Duration) {
        let mut connections = self.connections();
        if connections.made.elapsed() >= age {
            connections.pool = Pool::new(connections.options.clone());
            connections.made = Instant::now();
        }
    }

    /// Connects, and makes the relay's own tables where they are missing. Called again after every failure, so
    /// this is also where a rotated password is taken up.
    pub async fn install(&self) -> Result<(), Error> {
        let mut connection = self.connect().await?;
        doctor::refuse(&mut connection).await?;
        self.make_tables(&mut connection).await?;
        connection.disconnect().await.map_err(Error::sql(CONNECT))
    }

    /// A connection of its own, with the password as it is now, which the pool takes up too.
    pub async fn connect(&self) -> Result<Conn, Error> {
        let mut options =
            OptsBuilder::from_opts(self.connections().options.clone()).ssl_opts(tls_now(&self.tls)?);
        if let Some(password) = self.password.read().await? {
            options = options.pass(Some(password));
        }
        let mut options = pooled(options, self.most);
        let mut connected = pool::connect(&options).await;
        let has_no_tls = matches!(
            &connected,
            Err(mysql_async::Error::Driver(DriverError::NoClientSslFlagFromServer)
                | mysql_async::Error::Io(IoError::Tls(_)))
        );
        if has_no_tls && self.tls.mode == TlsMode::Prefer {
            options = OptsBuilder::from_opts(options).ssl_opts(None).into();
            connected = pool::connect(&options).await;
        }
        let connection = connected.map_err(Error::sql(CONNECT))?;
        self.connections().take_up(options);
        Ok(connection)
    }

    /// The server refuses the login.
    pub fn login_refused(&self) {
        let this = self.clone();
        self.password.refused(move |password| {
            let mut connections = this.connections();
            let options = OptsBuilder::from_opts(connections.options.clone()).pass(Some(password));
            connections.take_up(pooled(options, this.most));
        });
    }

    async fn make_tables(&self, connection: &mut Conn) -> Result<(), Error> {
        if self.tables_of(connection).await?.len() == ddl::relay_table_names(&self.prefix).len() {
            return Ok(());
        }
        for statement in ddl::relay_tables_mysql(&self.prefix) {
            connection.query_drop(statement).await.map_err(|source| match &source {
                // ER_TABLEACCESS_DENIED_ERROR, ER_DBACCESS_DENIED_ERROR
                mysql_async::Error::Server(error) if matches!(error.code, 1142 | 1044) => Error::Setup(format!(
                    "the relay's own tables are missing from database {} and this account may not make them \
                     ({source}): run the statements of `whippet sql` as an administrator",
                    self.database
                )),
                _ => Error::Sql { doing: "make the relay's own tables", source: source.into() },
            })?;
        }
        Ok(())
    }

    /// Which of the relay's own tables there are.
    async fn tables_of(&self, connection: &mut Conn) -> Result<Vec<String>, Error> {
        let names: Vec<String> =
            ddl::relay_table_names(&self.prefix).iter().map(|name| literal(name)).collect();
        let text = format!(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = DATABASE() AND table_name IN ({})",
            names.join(", ")
        );
        connection.query(text).await.map_err(Error::sql("look for the relay's own tables"))
    }

    pub(super) async fn own_tables(&self) -> Result<Vec<String>, Error> {
        let mut connection = self.connect().await?;
        self.tables_of(&mut connection).await
    }

    /// The relay that owns the source now, if there is one.
    pub(super) async fn owner(&self) -> Result<Option<String>, Error> {
        let members = format!("{}_members", self.prefix);
        if !self.own_tables().await?.contains(&members) {
            return Ok(None);
        }
        let text =
            format!("SELECT owner FROM {} WHERE expires_at > UTC_TIMESTAMP(6) LIMIT 1", quoted(&members));
        let query = sql::query_scalar(AssertSqlSafe(&text));
        query.fetch_optional(&self.pool()).await.map_err(Error::sql("look for the owner"))
    }

    pub(super) async fn drop_made(&self, statement: &str) -> Result<(), Error> {
        sql::query(AssertSqlSafe(statement))
            .execute(&self.pool())
            .await
            .map(drop)
            .map_err(Error::sql("drop it"))
    }

    /// Keeps a relay of an older version, which knows of one lease only, from working beside the group. `false`
    /// where one works now.
    async fn hold_off_older(&self, length: Duration) -> Result<bool, Error> {
        let take = format!(
            "UPDATE {leases} SET \
               epoch = IF(owner = $1, epoch, epoch + 1), owner = $1, \
               expires_at = UTC_TIMESTAMP(6) + INTERVAL $2 MICROSECOND \
             WHERE name = {name} AND (owner = $1 OR expires_at <= UTC_TIMESTAMP(6))",
            leases = self.own("leases"),
            name = literal(LEASE_NAME),
        );
        let make = format!(
            "INSERT INTO {leases} (name, owner, epoch, expires_at) \
             SELECT {name}, '', 0, '1970-01-01' FROM DUAL \
             WHERE NOT EXISTS (SELECT 1 FROM {leases} WHERE name = {name})",
            leases = self.own("leases"),
            name = literal(LEASE_NAME),
        );
        let doing = "renew the lease";
        let length = i64::try_from(length.as_micros()).unwrap_or(i64::MAX);
        let mut connection = self.pool().get_conn().await.map_err(Error::sql(doing))?;
        let mut made = false;
        loop {
            let query = sql::query(AssertSqlSafe(&take)).bind(GROUP).bind(length);
            let taken = query.execute(&mut connection).await.map_err(Error::sql(doing))?;
            if taken.rows_affected() > 0 {
                return Ok(true);
            }
            let make = sql::query(AssertSqlSafe(&make));
            if made || make.execute(&mut connection).await.map_err(Error::sql(doing))?.rows_affected() == 0 {
                // It is there, and somebody else's.
                return Ok(false);
            }
            made = true;
        }
    }

    async fn join(&self, join: &str, owner: &str, micros: i64, tables: &str) -> Result<i64, Error> {
        let doing = "join the group";
        let mut connection = self.pool().get_conn().await.map_err(Error::sql(doing))?;
        let query = sql::query(AssertSqlSafe(join)).bind(owner).bind(micros).bind(tables);
        query.execute(&mut connection).await.map_err(Error::sql(doing))?;
        Ok(connection.last_insert_id().unwrap_or_default().cast_signed())
    }

    /// MySQL tells other sessions nothing.
    pub async fn listen(&self, _table: &str, _heard: &Notify) -> Result<Infallible, Error> {
        std::future::pending().await
    }

    pub async fn outbox(&self, spec: &TableSpec) -> Result<Outbox, Error> {
        if !spec.stays() {
            return Outbox::of_contents(self, spec).await;
        }
        let catalogue = self.catalogue(spec).await?;
        Outbox::new(self, spec, &catalogue)
    }

    /// A table as it is now. Refuses one that is relayed by another name.
    async fn catalogue(&self, spec: &TableSpec) -> Result<Catalogue, Error> {
        let catalogue = Catalogue::of(&self.pool(), &self.database, spec).await?;
        let name = format!("{}.{}", quoted(&catalogue.database), quoted(&catalogue.table));
        self.claims.claim(name, spec)?;
        Ok(catalogue)
    }

    /// Writes a line into the audit log.
    pub async fn audit(&self, line: &Line<'_>) -> Result<(), Error> {
        let text = format!(
            "INSERT INTO {} (who, action, table_name, what, why, `keys`, events) VALUES ($1, $2, $3, $4, $5, 0, $6)",
            quoted(ddl::AUDIT)
        );
        let query = sql::query(AssertSqlSafe(&text))
            .bind(line.who)
            .bind(line.action)
            .bind(line.subject)
            .bind(line.what)
            .bind(line.why)
            .bind(line.events.cast_signed());
        query.execute(&self.pool()).await.map(drop).map_err(Error::sql("write the audit log"))
    }

    /// The quoted name of one of the relay's own tables.
    pub(super) fn own(&self, name: &str) -> String {
        if name == "audit" { quoted(ddl::AUDIT) } else { quoted(&format!("{}_{name}", self.prefix)) }
    }
}

/// With a pool of so many connections. They keep what their session was set to.
fn pooled(options: OptsBuilder, most: usize) -> Opts {
    let constraints = PoolConstraints::new(0, most).unwrap_or_default();
    options.pool_opts(PoolOpts::default().with_constraints(constraints).with_reset_connection(false)).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::source::database::Database;

    #[tokio::test]
    async fn connections_to_a_server_that_refuses_are_left_sooner_than_those_to_a_silent_one() {
        let text = "{ source: { url: 'mysql://u@127.0.0.1:1/d' }, kafka: { bootstrap_servers: 'b:1' }, tables: [{ name: t }] }";
        let config = config::parse("test", text, &std::collections::BTreeMap::new()).unwrap();
        let db = Mysql::new(&config.source.unwrap()).unwrap();
        let says = |code| {
            let error = mysql_async::ServerError { code, message: String::new(), state: String::new() };
            Error::sql("test")(mysql_async::Error::Server(error))
        };
        let lost = || Error::sql("test")(mysql_async::Error::Driver(DriverError::ConnectionClosed));
        for (error, seconds, left) in [
            (says(1290), 2, true),
            (says(1053), 2, true),
            // Just made, for the same fault.
            (says(1836), 0, false),
            (lost(), 2, false),
            (lost(), 6, true),
            (Error::NoAnswer("test"), 2, false),
            (says(1064), 60, false),
        ] {
            let made = Instant::now().checked_sub(Duration::from_secs(seconds)).unwrap();
            db.connections().made = made;
            Database::Mysql(db.clone()).failed(&error);
            assert_eq!(db.connections().made != made, left, "{error:?} after {seconds} s");
        }
    }
}
