//! The databases of the tests, by the scheme of their URL: a pool beside the relay, and single sessions.

use std::fmt::{self, Write as _};

use mysql_async::prelude::Queryable as _;
use sqlx::{
    AssertSqlSafe, Connection as _, PgConnection, PgPool, SqliteConnection, SqlitePool,
    postgres::{PgConnectOptions, PgPoolOptions},
};

/// What went wrong: whether it was the connection or the server, and not the statement.
#[derive(Debug)]
pub struct Failed {
    pub is_gone: bool,
    text: String,
}

impl fmt::Display for Failed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl From<sqlx::Error> for Failed {
    fn from(error: sqlx::Error) -> Failed {
        let code = error.as_database_error().and_then(|error| error.code());
        // admin_shutdown, crash_shutdown, cannot_connect_now
        let is_gone = matches!(error, sqlx::Error::Io(_))
            || matches!(code.as_deref(), Some("57P01" | "57P02" | "57P03"));
        Failed { is_gone, text: error.to_string() }
    }
}

impl From<mysql_async::Error> for Failed {
    fn from(error: mysql_async::Error) -> Failed {
        let is_gone = match &error {
            // ER_SERVER_SHUTDOWN, ER_CONNECTION_KILLED, and MariaDB's
            mysql_async::Error::Server(error) => matches!(error.code, 1053 | 1927),
            mysql_async::Error::Io(_) | mysql_async::Error::Driver(_) => true,
            _ => false,
        };
        Failed { is_gone, text: error.to_string() }
    }
}

fn is_mysql(url: &str) -> bool {
    url.starts_with("mysql:")
}

/// A file; of a server's URL, a folder of them.
fn is_sqlite(url: &str) -> bool {
    url.starts_with("sqlite:")
}

/// The statements of a script; a server takes no comment alone for one.
pub fn statements(script: &str) -> impl Iterator<Item = String> {
    let lines = script.lines().filter(|line| !line.trim_start().starts_with("--"));
    let script: Vec<&str> = lines.collect();
    let split: Vec<String> =
        script.join("\n").split(";\n").map(|one| one.trim().trim_end_matches(';').to_owned()).collect();
    split.into_iter().filter(|statement| !statement.is_empty())
}

#[derive(Clone)]
pub enum Db {
    Postgres(PgPool),
    Mysql(mysql_async::Pool),
    Sqlite(SqlitePool),
}

impl Db {
    pub async fn open(url: &str) -> Db {
        if is_mysql(url) {
            return Db::Mysql(mysql_async::Pool::from_url(url).unwrap());
        }
        if is_sqlite(url) {
            return Db::Sqlite(SqlitePool::connect(url).await.unwrap());
        }
        let options: PgConnectOptions = url.parse().unwrap();
        Db::Postgres(PgPoolOptions::new().max_connections(32).connect_with(options).await.unwrap())
    }

    /// A database of this name on a server, as a URL.
    pub async fn create(server: &str, name: &str) -> String {
        if is_sqlite(server) {
            return format!("{server}/{name}.db?mode=rwc");
        }
        let statement = format!("CREATE DATABASE {name}");
        Session::open(server).await.unwrap().run(&statement).await.unwrap();
        match is_mysql(server) {
            true => format!("{server}/{name}"),
            false => format!("{}/{name}", server.rsplit_once('/').unwrap().0),
        }
    }

    /// Best effort, and from where nobody can wait.
    pub fn drop(server: &str, name: &str) {
        if is_sqlite(server) {
            // It goes with its folder.
            return;
        }
        let force = if is_mysql(server) { "" } else { " WITH (FORCE)" };
        run_on(server, &[&format!("DROP DATABASE {name}{force}")]).unwrap();
    }

    pub fn pg(&self) -> &PgPool {
        match self {
            Db::Postgres(pool) => pool,
            Db::Mysql(_) | Db::Sqlite(_) => panic!("this test is about PostgreSQL"),
        }
    }

    pub async fn sql(&self, script: &str) -> Result<(), Failed> {
        match self {
            Db::Postgres(pool) => {
                sqlx::raw_sql(AssertSqlSafe(script)).execute(pool).await?;
            }
            Db::Mysql(pool) => {
                let mut connection = pool.get_conn().await?;
                for statement in statements(script) {
                    connection.query_drop(statement).await?;
                }
            }
            Db::Sqlite(pool) => {
                sqlx::raw_sql(AssertSqlSafe(script)).execute(pool).await?;
            }
        }
        Ok(())
    }

    pub async fn number(&self, sql: &str) -> Result<i64, Failed> {
        Ok(match self {
            Db::Postgres(pool) => sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(pool).await?,
            Db::Mysql(pool) => pool.get_conn().await?.query_first(sql).await?.unwrap(),
            Db::Sqlite(pool) => sqlx::query_scalar(AssertSqlSafe(sql)).fetch_one(pool).await?,
        })
    }
}

/// One connection, for statements as text.
pub enum Session {
    Postgres(PgConnection),
    Mysql(mysql_async::Conn),
    Sqlite(SqliteConnection),
}

impl Session {
    pub async fn open(url: &str) -> Result<Session, Failed> {
        if is_sqlite(url) {
            return Ok(Session::Sqlite(SqliteConnection::connect(url).await?));
        }
        Ok(match is_mysql(url) {
            true => Session::Mysql(mysql_async::Conn::from_url(url).await?),
            false => Session::Postgres(PgConnection::connect(url).await?),
        })
    }

    /// Runs a statement; how many rows it changed.
    pub async fn run(&mut self, statement: &str) -> Result<u64, Failed> {
        Ok(match self {
            Session::Postgres(connection) => {
                sqlx::raw_sql(AssertSqlSafe(statement)).execute(connection).await?.rows_affected()
            }
            Session::Mysql(connection) => {
                connection.query_drop(statement).await?;
                connection.affected_rows()
            }
            Session::Sqlite(connection) => {
                sqlx::raw_sql(AssertSqlSafe(statement)).execute(connection).await?.rows_affected()
            }
        })
    }

    /// One writer at a time where rows have no locks: nobody is refused in the middle then.
    pub fn begin(&self) -> &'static str {
        match self {
            Session::Postgres(_) | Session::Mysql(_) => "BEGIN",
            Session::Sqlite(_) => "BEGIN IMMEDIATE",
        }
    }

    /// A file has no queue of writers: one that never rests leaves no room for others.
    pub async fn lets_others(&self) {
        if matches!(self, Session::Sqlite(_)) {
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
    }

    pub fn for_update(&self) -> &'static str {
        match self {
            Session::Postgres(_) | Session::Mysql(_) => "FOR UPDATE",
            Session::Sqlite(_) => "",
        }
    }

    /// How many rows a statement of MySQL shows.
    pub async fn rows(&mut self, statement: &str) -> usize {
        match self {
            Session::Postgres(_) | Session::Sqlite(_) => panic!("this is about MySQL"),
            Session::Mysql(connection) => {
                connection.query::<mysql_async::Row, _>(statement).await.unwrap().len()
            }
        }
    }

    /// Bytes as a literal.
    pub fn bytes(&self, bytes: &[u8]) -> String {
        let hex = bytes.iter().fold(String::new(), |mut hex, byte| {
            let _ = write!(hex, "{byte:02x}");
            hex
        });
        match self {
            Session::Postgres(_) => format!("decode('{hex}', 'hex')"),
            Session::Mysql(_) | Session::Sqlite(_) => format!("x'{hex}'"),
        }
    }

    /// The columns of an outbox that the writers fill.
    pub fn columns(&self) -> &'static str {
        match self {
            Session::Postgres(_) | Session::Sqlite(_) => "id, topic, key, payload, headers",
            Session::Mysql(_) => "id, topic, `key`, payload, headers",
        }
    }

    pub fn or_nothing(&self) -> &'static str {
        match self {
            Session::Postgres(_) | Session::Sqlite(_) => "ON CONFLICT DO NOTHING",
            Session::Mysql(_) => "ON DUPLICATE KEY UPDATE number = number",
        }
    }
}

/// Runs SQL on a server from where nobody can wait, one statement after the other.
pub fn run_on(server: &str, statements: &[&str]) -> Result<(), Failed> {
    let run = || {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let mut session = Session::open(server).await?;
            for statement in statements {
                session.run(statement).await?;
            }
            Ok(())
        })
    };
    std::thread::scope(|scope| scope.spawn(run).join().unwrap())
}
