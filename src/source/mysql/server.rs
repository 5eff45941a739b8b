//! What the binlog needs of the server, and what stands in the way.

use std::collections::BTreeMap;

use super::{
    event::Malformed,
    rows::{Known, obstacle},
    wire,
};
use crate::{
    config,
    source::{
        database::{Error, Mysql, TableSpec},
        log::binlog::{Coordinates, ServerId},
    },
};

/// Why the log cannot be read now.
#[derive(Debug, thiserror::Error)]
pub enum Obstacle {
    /// In the words of an operator, with what mends it.
    #[error("{0}")]
    Setup(String),
    /// What only the log had is gone, or cannot be read.
    #[error("{0}")]
    Lost(String),
    #[error(transparent)]
    Database(#[from] Error),
    #[error(transparent)]
    Wire(#[from] wire::Error),
    #[error("the binlog cannot be read: {0}")]
    Malformed(#[from] Malformed),
}

/// What the log of one source is read by.
#[derive(Clone, Debug)]
pub struct Server {
    pub database: Mysql,
    pub settings: config::Stream,
}

/// Where to begin, and what the tables are there.
pub struct Start {
    pub file: String,
    pub place: Coordinates,
    /// Where the log was after that.
    pub end: Coordinates,
    pub server: ServerId,
    /// For each table what it is, or why it is polled instead.
    pub tables: Vec<Result<Known, String>>,
}

impl Server {
    /// Looks where the log can be read from, and at the tables. They are the same before and after, or it is
    /// tried again: so what is read from there has these columns, up to a statement that tells otherwise.
    pub async fn start(&self, specs: &[TableSpec]) -> Result<Start, Obstacle> {
        let mut before = self.tables(specs).await?;
        loop {
            let status = self.database.log_start(self.settings.server_id).await?;
            let after = self.tables(specs).await?;
            if before == after {
                let (server, end) = self.database.log_end().await?;
                let tables = specs.iter().zip(after);
                let tables = tables.map(|(spec, known)| match known {
                    None => Err(format!("table {} does not exist, or this account cannot see it", spec.name)),
                    Some(known) => match obstacle(spec, &known) {
                        Some(why) => Err(why),
                        None => Ok(known),
                    },
                });
                let tables = tables.collect();
                return Ok(Start { file: status.file, place: status.place, end, server, tables });
            }
            before = after;
        }
    }

    pub async fn tables(&self, specs: &[TableSpec]) -> Result<Vec<Option<Known>>, Error> {
        let mut tables = Vec::with_capacity(specs.len());
        for spec in specs {
            tables.push(self.database.known(spec).await?);
        }
        Ok(tables)
    }

    /// Connects, and has the events sent. Above `limit` bytes they are not kept.
    pub async fn read(&self, start: &Start, limit: usize) -> Result<wire::Reader, Obstacle> {
        let Ok(at) = u32::try_from(start.place.at) else {
            return Err(Obstacle::Setup(
                "the file of the binlog is longer than 4 GiB: it is read when the next one has begun".into(),
            ));
        };
        self.dump(&[], wire::From::Place { file: &start.file, at }, limit).await
    }

    /// The same from any place. Some servers are told it by variables of the connection.
    pub async fn dump(
        &self,
        more: &[(&'static str, String)],
        from: wire::From<'_>,
        limit: usize,
    ) -> Result<wire::Reader, Obstacle> {
        let mut connection = wire::Connection::connect(&self.database.replication().await?).await?;
        let heartbeat = self.settings.heartbeat.as_nanos();
        // Both names of each: servers have one or the other. MariaDB then tells its GTIDs as events. The time
        // is that for which the server waits for us, while the tables wait for Kafka.
        let mut variables = BTreeMap::from([
            ("@master_heartbeat_period", heartbeat.to_string()),
            ("@source_heartbeat_period", heartbeat.to_string()),
            ("@master_binlog_checksum", "'CRC32'".into()),
            ("@source_binlog_checksum", "'CRC32'".into()),
            ("@mariadb_slave_capability", "4".into()),
            ("net_write_timeout", "86400".into()),
        ]);
        variables.extend(more.iter().cloned());
        let list: Vec<String> = variables.iter().map(|(name, value)| format!("{name} = {value}")).collect();
        connection.run(&format!("SET {}", list.join(", "))).await?;
        Ok(connection.dump(self.settings.server_id, from, limit).await?)
    }
}
