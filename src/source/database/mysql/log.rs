//! What the server tells of its binlog, and what a moment is.

use mysql_async::{Conn, IsolationLevel, TxOpts, prelude::Queryable as _};

use super::{Catalogue, Mysql, doctor::variable, sql::literal};
use crate::{
    config::TlsMode,
    source::{
        database::{Error, LEASE_NAME, TableSpec},
        log::{
            Moment, Unreadable,
            binlog::{Coordinates, Seen, ServerId, Visible},
        },
        mysql::{rows::Known, wire},
    },
};

const ASK: &str = "ask where the binlog is";

/// How a server tells what can be seen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flavor {
    MariaDb,
    /// MySQL, with GTIDs or without.
    Gtids,
    Places,
}

/// Where the log is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Status {
    pub file: String,
    pub place: Coordinates,
    /// The databases whose changes are in it, or are not; mostly none are named.
    pub filters: String,
    executed: String,
}

fn unreadable(error: Unreadable) -> Error {
    Error::Setup(format!("{ASK}: {error}"))
}

/// Why the binlog cannot be followed, in the words of an operator; `None` where it can.
async fn refusal(connection: &mut Conn, server_id: u32) -> Result<Option<String>, Error> {
    let is = async |connection: &mut Conn, name: &str| {
        variable(connection, name).await.map(Option::unwrap_or_default)
    };
    let wrong = |name: &str, is: &str, mend: &str| Ok(Some(format!("{name} is {is}: {mend}")));
    if is(connection, "log_bin").await? != "ON" {
        return wrong("log_bin", "OFF", "the server has no binlog; start it with --log-bin");
    }
    let format = is(connection, "binlog_format").await?;
    if !format.is_empty() && format != "ROW" {
        return wrong("binlog_format", &format, "expected ROW: SET GLOBAL binlog_format = 'ROW'");
    }
    let image = is(connection, "binlog_row_image").await?;
    if !matches!(image.as_str(), "" | "FULL" | "FULL_NODUP") {
        return wrong("binlog_row_image", &image, "expected FULL: SET GLOBAL binlog_row_image = 'FULL'");
    }
    if is(connection, "binlog_order_commits").await? == "OFF" {
        return wrong(
            "binlog_order_commits",
            "OFF",
            "what can be seen is in another order than the binlog then; expected ON",
        );
    }
    if is(connection, "server_id").await? == server_id.to_string() {
        return wrong(
            "source.stream.server_id",
            "the server's own",
            "expected a number that neither the server nor one of its replicas has",
        );
    }
    Ok(None)
}

impl Mysql {
    pub(super) async fn flavor(connection: &mut Conn) -> Result<Flavor, Error> {
        // MariaDB has no variable of this name.
        Ok(match variable(connection, "gtid_mode").await?.as_deref() {
            None => Flavor::MariaDb,
            Some("ON") => Flavor::Gtids,
            Some(_) => Flavor::Places,
        })
    }

    pub(super) async fn status(connection: &mut Conn) -> Result<Status, Error> {
        let mut found = connection.query_first("SHOW BINARY LOG STATUS").await;
        if let Err(mysql_async::Error::Server(error)) = &found
            && error.code == 1064
        {
            // Before MySQL 8.2, and MariaDB.
            found = connection.query_first("SHOW MASTER STATUS").await;
        }
        let row: Option<mysql_async::Row> = found.map_err(|source| match &source {
            // ER_SPECIFIC_ACCESS_DENIED_ERROR
            mysql_async::Error::Server(error) if error.code == 1227 => Error::Setup(format!(
                "this account may not follow the binlog ({source}): GRANT REPLICATION SLAVE, REPLICATION CLIENT \
                 ON *.* to it"
            )),
            _ => Error::sql(ASK)(source),
        })?;
        let row = row.ok_or_else(|| Error::Setup("log_bin is OFF: the server has no binlog".into()))?;
        let text = |index| row.get::<Option<String>, _>(index).flatten().unwrap_or_default();
        let file = text(0);
        let place = Coordinates::new(&file, row.get(1).unwrap_or_default()).map_err(unreadable)?;
        let filters = [text(2), text(3)].into_iter().filter(|list| !list.is_empty());
        let filters = filters.collect::<Vec<_>>().join(", ");
        Ok(Status { file, place, filters, executed: text(4) })
    }

    /// Everything in the log up to here can be seen by whoever looks from now on.
    async fn visible_place(&self, connection: &mut Conn, flavor: Flavor) -> Result<Status, Error> {
        if flavor == Flavor::MariaDb {
            // The server keeps it: the end of the last transaction that it made visible.
            let mut now = TxOpts::default();
            now.with_consistent_snapshot(true).with_isolation_level(IsolationLevel::RepeatableRead);
            let mut tx = connection.start_transaction(now).await.map_err(Error::sql(ASK))?;
            let found: Vec<(String, String)> =
                tx.query("SHOW STATUS LIKE 'binlog_snapshot_%'").await.map_err(Error::sql(ASK))?;
            tx.commit().await.map_err(Error::sql(ASK))?;
            let of = |name: &str| found.iter().find(|(found, _)| found.eq_ignore_ascii_case(name));
            let file = of("Binlog_snapshot_file").map(|(_, value)| value.clone()).unwrap_or_default();
            let at = of("Binlog_snapshot_position").and_then(|(_, value)| value.parse().ok());
            let place = Coordinates::new(&file, at.unwrap_or(0)).map_err(unreadable)?;
            return Ok(Status { file, place, filters: String::new(), executed: String::new() });
        }
        // Transactions become visible in the order of the log. So when one of our own has, everything has
        // that was in the log before it.
        let status = Mysql::status(connection).await?;
        let touch = format!(
            "UPDATE {} SET expires_at = expires_at + INTERVAL 1 MICROSECOND WHERE name = {}",
            self.own("leases"),
            literal(LEASE_NAME)
        );
        connection.query_drop(touch).await.map_err(Error::sql(ASK))?;
        if connection.affected_rows() == 0 {
            return Err(Error::Setup("there is no lease yet".into()));
        }
        Ok(status)
    }

    /// This moment: everything that it sees, polling sees from now on.
    pub async fn moment(&self) -> Result<Moment, Error> {
        let mut connection = self.pool().get_conn().await.map_err(Error::sql("note the moment"))?;
        let flavor = Mysql::flavor(&mut connection).await?;
        let visible = match flavor {
            Flavor::Gtids => None,
            _ => Some(self.visible_place(&mut connection, flavor).await?.place),
        };
        let Status { place, executed, .. } = Mysql::status(&mut connection).await?;
        let visible = match visible {
            Some(place) => Visible::UpTo(place),
            None => Visible::Gtids(executed.parse().map_err(unreadable)?),
        };
        Ok(Moment::Binlog(Seen { visible, end: place }))
    }

    /// Where the log is now, and whose it is.
    pub async fn log_end(&self) -> Result<(ServerId, Coordinates), Error> {
        let mut connection = self.pool().get_conn().await.map_err(Error::sql(ASK))?;
        let server: Option<ServerId> =
            connection.query_first("SELECT @@server_id").await.map_err(Error::sql(ASK))?;
        Ok((server.unwrap_or_default(), Mysql::status(&mut connection).await?.place))
    }

    /// Why the log cannot be followed, by the server's settings as they are now.
    pub async fn log_refusal(&self, server_id: u32) -> Result<Option<String>, Error> {
        let mut connection = self.pool().get_conn().await.map_err(Error::sql(ASK))?;
        refusal(&mut connection, server_id).await
    }

    /// Where the log can be read from, the tables being polled after: everything before is visible. Refused
    /// with a reason where it cannot be.
    pub async fn log_start(&self, server_id: u32) -> Result<Status, Error> {
        let mut connection = self.pool().get_conn().await.map_err(Error::sql(ASK))?;
        Mysql::check_log(&mut connection, server_id).await?;
        let flavor = Mysql::flavor(&mut connection).await?;
        self.visible_place(&mut connection, flavor).await
    }

    /// Whether the server has a log that can be followed, and tells where it is.
    pub(super) async fn check_log(connection: &mut Conn, server_id: u32) -> Result<(), Error> {
        if let Some(why) = refusal(connection, server_id).await? {
            return Err(Error::Setup(why));
        }
        let filters = Mysql::filters(connection).await?;
        if !filters.is_empty() {
            return Err(Error::Setup(format!(
                "the server writes the changes of some databases only into its binlog ({filters}): expected \
                 neither --binlog-do-db nor --binlog-ignore-db"
            )));
        }
        Ok(())
    }

    /// The databases that the server's binlog is about, or is not.
    pub(super) async fn filters(connection: &mut Conn) -> Result<String, Error> {
        Ok(Mysql::status(connection).await?.filters)
    }

    /// A table's columns; `None` where there is no such table.
    pub async fn known(&self, spec: &TableSpec) -> Result<Option<Known>, Error> {
        match self.catalogue(spec).await {
            Ok(Catalogue { database, table, columns, .. }) => {
                Ok(Some(Known { database, name: table, columns }))
            }
            Err(Error::Setup(_)) => Ok(None),
            // The table's own end says so.
            Err(Error::Refused { .. }) if spec.stays() => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// How a connection of another kind is made, with the password as it is now.
    pub async fn replication(&self) -> Result<wire::Settings, Error> {
        // Who connects once tells the server the password, which then has it in its cache.
        self.connect().await?.disconnect().await.map_err(Error::sql("connect to the source database"))?;
        let options = self.connections().options.clone();
        let has_tls = options.ssl_opts().is_some();
        let mut tls = self.tls.clone();
        if !has_tls {
            tls.mode = TlsMode::Disable;
        }
        Ok(wire::Settings {
            host: options.ip_or_hostname().to_owned(),
            port: options.tcp_port(),
            user: options.user().unwrap_or_default().to_owned(),
            password: options.pass().map(str::to_owned),
            tls,
        })
    }
}
