//! Ingest: the address that takes events, the spool that keeps them, and the relay that publishes them.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    net::TcpListener,
    sync::mpsc,
    time::{Instant, timeout_at},
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::part::{Owner, Part, Shared};
use crate::{
    admin::status::Board,
    config::Config,
    http,
    ingest::{server, spool::Spool},
    relay::Left,
    source::database::{Database, TableSpec, answered},
};

/// The share of the grace in which what is in the spool is published yet.
const DRAIN_SHARE: f64 = 0.6;
/// How long requests that were begun may still take when the relay stops.
const ANSWER_WITHIN: Duration = Duration::from_secs(3);
const LOOK_EVERY: Duration = Duration::from_millis(50);

pub(super) struct Ingest {
    pub part: Part,
    spool: Spool,
    server: server::Ingest,
    listener: TcpListener,
    table: TableSpec,
}

impl Ingest {
    pub async fn build(config: &Arc<Config>, shared: &Shared) -> anyhow::Result<Option<Ingest>> {
        let (Some(ingest), Some(table)) = (&config.ingest, &config.spool) else { return Ok(None) };
        let spool = Spool::open(ingest, shared.metrics.clone()).await?;
        let database = spool.database.clone();
        let epoch = spool.own(&shared.replica).await?;
        let tables = std::slice::from_ref(table);
        let part = Part::build(config, tables, &database, &Owner::Process { epoch }, shared)?;
        let listener = http::bind("ingest.listen", ingest.listen).await?;
        let server = server::Ingest::new(
            ingest,
            table,
            config.limits.in_flight_bytes,
            spool.intake(),
            shared.metrics.clone(),
        )
        .context("docs/openapi.yaml")?;
        let table = part.first().clone();
        Ok(Some(Ingest { part, spool, server, listener, table }))
    }

    pub fn address(&self) -> Option<SocketAddr> {
        self.listener.local_addr().ok()
    }

    /// Takes events until `stop`, publishes what it has for a share of `grace`, and leaves the rest in the spool.
    pub async fn run(self, stop: CancellationToken, grace: Duration) -> Left {
        if let Ok(address) = self.listener.local_addr() {
            info!(%address, "ingest address is open");
        }
        let (database, board) = (self.spool.database.clone(), self.part.board.clone());
        // Held until the last row is recorded.
        let (writer, _lock) = self.spool.spawn();
        let mut server = tokio::spawn(self.server.serve(self.listener, stop.clone()));
        let drained = CancellationToken::new();
        // Its table stays as it is.
        let (_, no_reloads) = mpsc::channel(1);
        let relay =
            tokio::spawn(self.part.run(no_reloads, drained.clone(), grace.mul_f64(1.0 - DRAIN_SHARE)));
        stop.cancelled().await;
        let stopped_at = Instant::now();
        let deadline = stopped_at + grace.mul_f64(DRAIN_SHARE);
        if timeout_at(deadline.min(stopped_at + ANSWER_WITHIN), &mut server).await.is_err() {
            warn!("requests that were not finished are cut off; none of them was answered with 202");
            server.abort();
            server.await.ok();
        }
        // With the last connection goes the last intake.
        if timeout_at(deadline, writer).await.is_err() {
            warn!("the disk does not answer: what was not answered with 202 may be in the spool or not");
        }
        drain(&database, &self.table, &board, deadline).await;
        drained.cancel();
        relay.await.unwrap_or(Left { events: 0, unanswered: 0, clean: true })
    }
}

/// Waits until nothing is left in the spool but what is held, or for the deadline. Nothing is to be waited for where
/// nothing is published.
async fn drain(database: &Database, table: &TableSpec, board: &Board, deadline: Instant) {
    let waiting = async {
        let outbox = answered("look at the spool", database.outbox(table)).await?;
        loop {
            let backlog = answered("count what waits", outbox.backlog()).await?;
            let stands = board.status().tables.iter().any(|table| matches!(table.state, "paused" | "halted"));
            if backlog.rows == 0 || stands || Instant::now() >= deadline {
                return Ok::<u64, crate::source::database::Error>(backlog.rows);
            }
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    match waiting.await {
        Ok(0) => info!("the spool is drained"),
        Ok(events) => {
            warn!(events, "events stay in the spool: they are published when a relay starts on it again");
        }
        Err(error) => warn!(%error, "it cannot be told what is left in the spool"),
    }
}
