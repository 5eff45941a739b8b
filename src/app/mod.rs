//! From a configuration to a running relay: everything is built first, then spawned, and stopped in
//! the order in which events flow.
//!
//! A relay has several sources: the application's database, and the spool of ingest. Each is a
//! part (`part`) with a lease and producers of its own.

mod backlog;
#[cfg(feature = "sqlite")]
mod ingest;
mod log;
mod part;
mod places;
mod reload;
mod roster;
mod tables;

use std::{net::SocketAddr, pin::pin, sync::Arc, time::Duration};

use futures_util::future::join_all;
use tokio::{net::TcpListener, sync::mpsc, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use self::{
    part::{Owner, Part, Shared},
    roster::Reload,
};
pub use self::{
    reload::{Refused, Reloader},
    tables::table_specs,
};
use crate::{
    admin::{desk::Desk, metrics::Metrics, server::Admin, status::Board},
    config::{self, Config},
    http,
    record::Watch,
    relay::{
        Left,
        packer::Packer,
        window::{Room, Window},
    },
    source::database::Database,
    telemetry::Telemetry,
};

/// How long the last spans may take where nothing is left of `shutdown.grace`.
const FLUSH_AT_LEAST: Duration = Duration::from_millis(200);

/// Everything that a relay is made of, and nothing running yet.
pub struct App {
    source: Option<Part>,
    #[cfg(feature = "sqlite")]
    ingest: Option<ingest::Ingest>,
    admin: Option<(Admin, TcpListener)>,
    boards: Vec<Arc<Board>>,
    telemetry: Option<Telemetry>,
    refused: CancellationToken,
    config: Arc<Config>,
    metrics: Arc<Metrics>,
    reload: mpsc::Sender<Reload>,
    reloads: mpsc::Receiver<Reload>,
}

impl App {
    pub async fn build(config: &Config) -> anyhow::Result<App> {
        let config = &Arc::new(config.clone());
        let names: Vec<&str> = config.all_tables().map(|table| table.name.as_str()).collect();
        let store = config.object_store.as_ref().map(config::ObjectStore::open).transpose()?;
        let replica = replica_name();
        let telemetry = match &config.telemetry.otlp_endpoint {
            Some(url) => Some(Telemetry::open(url, "whippet", &replica, &config.kafka.bootstrap_servers)?),
            None => None,
        };
        let shared = Shared {
            replica,
            window: Window::new(Room {
                events: config.limits.in_flight_events,
                bytes: config.limits.in_flight_bytes,
            }),
            metrics: Arc::new(Metrics::new(&names)),
            has_store: store.is_some(),
            packer: Packer::new(store),
            watch: Watch { log: config.log.context.clone(), traces: telemetry.is_some() },
            spans: telemetry.as_ref().map(|telemetry| telemetry.spans.clone()),
            refused: CancellationToken::new(),
            desk: Arc::new(Desk::new(config.admin.token_file.clone())),
        };
        let refused = shared.refused.clone();
        let source = match &config.source {
            Some(source) => {
                let database = Database::new(source)?;
                Some(Part::build(config, &config.tables, &database, &Owner::Lease, &shared)?)
            }
            None => None,
        };
        #[cfg(feature = "sqlite")]
        let ingest = ingest::Ingest::build(config, &shared).await?;
        let parts = || {
            #[cfg(feature = "sqlite")]
            let spool = ingest.as_ref().map(|ingest| &ingest.part);
            #[cfg(not(feature = "sqlite"))]
            let spool = None;
            source.iter().chain(spool)
        };
        let boards: Vec<Arc<Board>> = parts().map(|part| part.board.clone()).collect();
        let admin = match config.admin.listen {
            Some(listen) => {
                let listener = http::bind("admin.listen", listen).await?;
                let Shared { window, metrics, desk, .. } = shared.clone();
                Some((Admin { boards: boards.clone(), metrics, window, desk }, listener))
            }
            None => None,
        };
        let (reload, reloads) = mpsc::channel(1);
        Ok(App {
            source,
            #[cfg(feature = "sqlite")]
            ingest,
            admin,
            boards,
            telemetry,
            refused,
            config: config.clone(),
            metrics: shared.metrics,
            reload,
            reloads,
        })
    }

    /// Cancelled when it would be a guess to go on: somebody has to look, and the log says at what.
    pub fn refused(&self) -> CancellationToken {
        self.refused.clone()
    }

    /// Hands it another configuration once it runs.
    pub fn reloader(&self) -> Reloader {
        Reloader {
            running: self.config.clone(),
            part: self.source.as_ref().map(|_| self.reload.clone()),
            metrics: self.metrics.clone(),
            boards: self.boards.clone(),
        }
    }

    /// The state as `/status` shows it, a board for each source.
    pub fn boards(&self) -> Vec<Arc<Board>> {
        self.boards.clone()
    }

    /// Where the admin address is, once its port is chosen.
    pub fn admin_address(&self) -> Option<SocketAddr> {
        self.admin.as_ref().and_then(|(_, listener)| listener.local_addr().ok())
    }

    /// Where events are taken, once its port is chosen.
    #[cfg(feature = "sqlite")]
    pub fn ingest_address(&self) -> Option<SocketAddr> {
        self.ingest.as_ref().and_then(ingest::Ingest::address)
    }

    /// Runs until `stop`. Returns what was left unfinished.
    pub async fn run(self, stop: CancellationToken) -> Left {
        let after_relay = CancellationToken::new();
        let admin = self.admin.map(|(admin, listener)| {
            if let Ok(address) = listener.local_addr() {
                info!(%address, "admin address is open");
            }
            tokio::spawn(admin.serve(listener, after_relay.clone()))
        });
        let grace = self.config.shutdown.grace;
        let mut running = Vec::new();
        if let Some(part) = self.source {
            running.push(tokio::spawn(part.run(self.reloads, stop.clone(), grace)));
        }
        #[cfg(feature = "sqlite")]
        if let Some(ingest) = self.ingest {
            running.push(tokio::spawn(ingest.run(stop.clone(), grace)));
        }
        let mut all = Left { events: 0, unanswered: 0, clean: true };
        let mut stopped_at = Instant::now();
        let mut ended = pin!(join_all(running));
        let lefts = tokio::select! {
            biased;
            lefts = &mut ended => lefts,
            () = stop.cancelled() => {
                stopped_at = Instant::now();
                ended.await
            }
        };
        for left in lefts {
            match left {
                Ok(left) => {
                    all.events += left.events;
                    all.unanswered += left.unanswered;
                    all.clean &= left.clean;
                }
                Err(error) => warn!(%error, "a relay ended before its time; what it had is read again"),
            }
        }
        if let Some(telemetry) = self.telemetry {
            telemetry.flush(grace.saturating_sub(stopped_at.elapsed()).max(FLUSH_AT_LEAST)).await;
        }
        after_relay.cancel();
        if let Some(admin) = admin {
            tokio::time::timeout(Duration::from_secs(1), admin).await.ok();
        }
        all
    }
}

/// Pod and start: two starts of one pod are two owners.
fn replica_name() -> String {
    let host = std::env::var("HOSTNAME")
        .ok()
        .or_else(|| std::fs::read_to_string("/etc/hostname").ok())
        .map_or_else(|| "whippet".to_owned(), |name| name.trim().to_owned());
    format!("{host}-{}", &uuid::Uuid::new_v4().simple().to_string()[..8])
}
