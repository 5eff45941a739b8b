//! What waits in a table, measured.

use std::{sync::Arc, time::Duration};

use tokio::sync::watch;

use crate::{
    admin::{metrics::Metrics, status::Board},
    coordinate::{Lease, report},
    event::TableIx,
    source::{
        database::{Backlog, Database, TableSpec, answered},
        log::Unsettled,
    },
};

/// How often the backlog of each table is measured.
const BACKLOG_EVERY: Duration = Duration::from_secs(5);

/// A table whose backlog is measured.
pub(super) struct Watched {
    pub spec: TableSpec,
    pub lease: watch::Receiver<Lease>,
    /// Told how long the oldest row has waited, in seconds.
    pub waits: watch::Sender<f64>,
    /// What waits, where there is no table to be asked.
    pub only_in_log: watch::Receiver<Unsettled>,
}

/// Measures what waits in a table, until it is aborted; apart from the poller: it has to show when the poller is stuck.
pub(super) async fn watch_backlog(
    database: Database,
    Watched { spec, lease, waits, only_in_log }: Watched,
    table: TableIx,
    board: Arc<Board>,
    metrics: Arc<Metrics>,
) {
    let mut outbox = None;
    let mut tick = tokio::time::interval(BACKLOG_EVERY);
    tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        tick.tick().await;
        let now = lease.borrow().clone();
        let (held, speaks) = match &now {
            Lease::Owner { parts, .. } if now.epoch().is_some() => match spec.shared {
                Some(_) => (parts.buckets.len(), parts.speaks()),
                None => (1, true),
            },
            _ => (0, false),
        };
        metrics.leases(&spec.name, held);
        if !speaks {
            // Measured once, by one relay.
            metrics.pending_events.with_label_values(&[&spec.name]).set(0);
            metrics.oldest_pending_age.with_label_values(&[&spec.name]).set(0.0);
            metrics.oldest_parked_age.with_label_values(&[&spec.name]).set(0.0);
            board.backlog(table, Backlog::default());
            continue;
        }
        let measured = async {
            if outbox.is_none() {
                outbox = Some(database.outbox(&spec).await?);
            }
            match &outbox {
                Some(outbox) => Ok(Some((outbox.backlog().await?, outbox.oldest_parked().await?))),
                None => Ok(None),
            }
        };
        match answered("measure the backlog", measured).await {
            Ok(Some((mut backlog, parked))) => {
                backlog.add(*only_in_log.borrow());
                metrics.oldest_parked_age.with_label_values(&[&spec.name]).set(parked.unwrap_or(0.0));
                let oldest = backlog.oldest_seconds.unwrap_or(0.0);
                metrics
                    .pending_events
                    .with_label_values(&[&spec.name])
                    .set(i64::try_from(backlog.rows).unwrap_or(i64::MAX));
                metrics.oldest_pending_age.with_label_values(&[&spec.name]).set(oldest);
                waits.send_replace(oldest);
                board.backlog(table, backlog);
            }
            Ok(None) => {}
            // The poller says what is wrong; this one only measures.
            Err(error) => {
                outbox = None;
                tracing::debug!(table = spec.name, error = report(&error), "cannot measure the backlog");
            }
        }
    }
}
