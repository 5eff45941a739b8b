//! What goes on beside the reading of the log, and no table can starve: the server hears that we are there and
//! how far everything is settled, the slot is measured, the tables are looked for.

use std::{
    sync::{
        Arc,
        atomic::{AtomicI64, AtomicU64, Ordering},
    },
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior},
};
use tracing::debug;

use super::{
    pgoutput::status_update,
    slot::{Health, Slot},
    wire::Writer,
};
use crate::{admin::metrics::Metrics, coordinate::report, source::log::Lsn};

/// How often the server is told how far everything is settled, and how often it is asked to answer.
const FEEDBACK_EVERY: Duration = Duration::from_millis(100);
const ASK_EVERY: Duration = Duration::from_secs(1);
const MEASURE_EVERY: Duration = Duration::from_secs(5);

/// How far everything is settled, for the task that tells the server.
#[derive(Default)]
pub struct Confirmed {
    pub at: AtomicU64,
    /// Tell it now.
    pub now: Notify,
}

/// Tells the server how far everything is settled, whatever else happens; and asks it to answer, so that a
/// dead connection shows.
pub async fn feed_back(mut writer: Writer, confirmed: Arc<Confirmed>) {
    let mut tick = tokio::time::interval(FEEDBACK_EVERY);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut told, mut asked) = (0, None::<Instant>);
    loop {
        tokio::select! {
            _ = tick.tick() => {}
            () = confirmed.now.notified() => {}
        }
        let at = confirmed.at.load(Ordering::Acquire);
        let ask = asked.is_none_or(|asked| asked.elapsed() >= ASK_EVERY);
        if at == told && !ask {
            continue;
        }
        told = at;
        asked = if ask { Some(Instant::now()) } else { asked };
        // Microseconds since 2000-01-01, which the server only shows.
        let now = chrono::Utc::now().timestamp_micros() - 946_684_800_000_000;
        if writer.send(&status_update(Lsn(at), now, ask)).await.is_err() {
            // The reader sees it too, and ends the session.
            return;
        }
    }
}

/// What is looked at while the log is read.
pub struct Watch {
    pub slot: Slot,
    /// What our heartbeats of this reading say.
    pub token: String,
    pub metrics: Arc<Metrics>,
    /// What the server keeps of its log, in bytes.
    pub retained: Arc<AtomicI64>,
    /// The tables by name, with their numbers, and the version of the publication.
    pub tables: Vec<(String, Option<i64>)>,
    pub publication: String,
    /// Told when these are not what they were.
    pub differs: Arc<Notify>,
}

impl Watch {
    /// Measures what the server keeps for the slot, writes the heartbeats, and sees whether the tables are
    /// still the same.
    pub async fn keep(self) {
        let Watch { slot, token, metrics, retained, tables, publication, differs } = self;
        let mut measure = tokio::time::interval(MEASURE_EVERY);
        let mut beat = tokio::time::interval(slot.settings.heartbeat.max(Duration::from_millis(100)));
        let mut compare = tokio::time::interval_at(Instant::now() + MEASURE_EVERY, MEASURE_EVERY);
        for interval in [&mut measure, &mut beat, &mut compare] {
            interval.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            let done = tokio::select! {
                _ = compare.tick() => slot.has_still(&tables, &publication).await.map(|same| if !same { differs.notify_one() }),
                _ = beat.tick() => slot.beat(&token).await.map(drop),
                _ = measure.tick() => slot.health().await.map(|health| {
                    let health = health.unwrap_or_default();
                    retained.store(health.retained_bytes, Ordering::Relaxed);
                    show(&metrics, health);
                }),
            };
            if let Err(error) = done {
                debug!(error = report(&error), "cannot look after the slot");
            }
        }
    }
}

pub fn show(metrics: &Metrics, health: Health) {
    metrics.slot_retained_bytes.set(health.retained_bytes);
    metrics.slot_safe_bytes.set(health.safe_bytes.map_or(f64::INFINITY, |bytes| bytes as f64));
    metrics.slot_active.set(i64::from(health.active));
}
