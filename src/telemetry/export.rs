//! Sending spans in batches, and what the log is told when they cannot be sent.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use opentelemetry_sdk::trace::{SpanData, SpanExporter};
use tokio::{
    sync::mpsc,
    time::{Instant, sleep_until},
};
use tracing::{info, warn};

/// Spans of one request.
const BATCH: usize = 512;
/// How long the first span of a batch waits for others: OpenTelemetry's own default.
const WAIT: Duration = Duration::from_secs(5);
/// How often the log has it that spans are lost.
const SAY_EVERY: Duration = Duration::from_mins(5);

/// Sends spans until there can be no more.
pub(super) async fn export(
    mut queue: mpsc::Receiver<SpanData>,
    exporter: impl SpanExporter,
    dropped: Arc<AtomicU64>,
) {
    let mut trouble = Trouble::default();
    let mut batch = Vec::new();
    while queue.recv_many(&mut batch, BATCH).await > 0 {
        let full_by = Instant::now() + WAIT;
        while batch.len() < BATCH {
            let room = BATCH - batch.len();
            tokio::select! {
                received = queue.recv_many(&mut batch, room) => if received == 0 { break },
                () = sleep_until(full_by) => break,
            }
        }
        let spans = batch.len() as u64;
        let sent = exporter.export(std::mem::take(&mut batch)).await.map_err(|error| error.to_string());
        match trouble.after(&sent, spans, dropped.swap(0, Ordering::Relaxed), Instant::now()) {
            Some(Say::Lost { spans }) => {
                let error = sent.err().unwrap_or_else(|| "it takes spans more slowly than they come".into());
                warn!(spans, error, "the trace collector does not take spans: they are lost, events are not");
            }
            Some(Say::Back) => info!("the trace collector takes spans again"),
            None => {}
        }
    }
}

/// What the log is to be told.
#[derive(Debug, PartialEq, Eq)]
enum Say {
    Lost { spans: u64 },
    Back,
}

#[derive(Debug, Default)]
struct Trouble {
    lost: u64,
    said: Option<Instant>,
    away: bool,
}

impl Trouble {
    /// After a batch was sent, or not, and others were dropped.
    fn after(&mut self, sent: &Result<(), String>, spans: u64, dropped: u64, now: Instant) -> Option<Say> {
        let was_away = std::mem::replace(&mut self.away, sent.is_err());
        self.lost += dropped + if sent.is_err() { spans } else { 0 };
        if self.lost > 0 && self.said.is_none_or(|said| now >= said + SAY_EVERY) {
            self.said = Some(now);
            return Some(Say::Lost { spans: std::mem::take(&mut self.lost) });
        }
        (was_away && !self.away).then_some(Say::Back)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn what_is_lost_is_said_at_once_and_then_once_in_a_while() {
        let mut trouble = Trouble::default();
        let (good, bad) = (Ok(()), Err("away".to_owned()));
        let mut after =
            |sent: &Result<(), String>, spans, dropped| trouble.after(sent, spans, dropped, Instant::now());
        assert_eq!(after(&good, 9, 0), None);
        assert_eq!(after(&bad, 9, 2), Some(Say::Lost { spans: 11 }));
        tokio::time::advance(SAY_EVERY.saturating_sub(Duration::from_secs(1))).await;
        assert_eq!(after(&bad, 9, 1), None);
        assert_eq!(after(&good, 9, 0), Some(Say::Back));
        assert_eq!(after(&good, 9, 3), None, "too soon");
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(after(&good, 9, 0), Some(Say::Lost { spans: 13 }), "none is left out");
        assert_eq!(after(&good, 9, 0), None);
    }
}
