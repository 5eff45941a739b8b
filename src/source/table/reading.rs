//! Reading: how much, from where, and handing it over.

use std::time::Duration;

use tokio::time::Instant;

use super::{Horizon, Task, following::InLog, recording::RECORD_EVERY};
use crate::{
    event::{Event, Place},
    relay::core::window_bytes,
    source::{
        Yield,
        database::{Error, Found, Limits, Reach, answered},
    },
};

/// Rows whose number did not come from the sequence are found at least this often.
const FULL_SWEEP_EVERY: Duration = Duration::from_secs(10);
/// How often open transactions are looked for, while rows come.
const HORIZON_EVERY: Duration = Duration::from_millis(100);
/// Payload bytes that one read may bring along, and no more than this share of the window: the driver has
/// them beside the window, and the bound on memory is told in windows.
const READ_SHARE: usize = 4;
const READ_BYTES: usize = 4 << 20;

impl Task {
    /// How much the next read may bring; `None` while the window has no worthwhile room.
    pub(super) fn limits(&self) -> Option<Limits> {
        let (room, window) = (self.source.window.room(), &self.source.window);
        let batch = self.source.poll.batch;
        let idle = window.used().events == 0;
        let enough =
            room.events >= batch.min(window.limit().events / 4) && room.bytes >= window.limit().bytes / 4;
        if !enough && !idle {
            return None;
        }
        let bytes = READ_BYTES.min(window.limit().bytes / READ_SHARE).min(room.bytes).max(1);
        let typical = (2.0 * self.state.payload_mean).max(1024.0);
        let rows = (bytes as f64 / typical) as usize;
        let rows = rows.clamp(1, batch.min(room.events).max(1));
        Some(Limits { rows, inline_bytes: bytes / rows })
    }

    /// One read of the table. Returns how many rows it found; `None` where not all were handed over.
    pub(super) async fn read(&mut self, limits: Limits) -> Result<Option<usize>, Error> {
        if self.source.spec.is_kept() {
            return self.read_kept(limits).await;
        }
        let full_sweep = self.last_full_sweep.elapsed() >= FULL_SWEEP_EVERY || self.is_closing();
        let Some(outbox) = &self.outbox else { return Ok(None) };
        let state = &mut self.state;
        let mut reach = state.reach.unwrap_or(Reach::NOTHING);
        if full_sweep {
            reach.low = i64::MIN;
        }
        let above_low = |place: &&Place| match place {
            Place::Int(n) => *n > reach.low,
            Place::Text(_) => true,
        };
        let known: Vec<Place> = state.known.keys().chain(&state.held).filter(above_low).cloned().collect();
        // Held rows are left out by SQL only where memory does not list them: on the first pass
        // over the table, and on a full sweep.
        let some = self.share.buckets();
        if some.is_some_and(<[u16]>::is_empty) {
            return Ok(Some(0));
        }
        let read = outbox.read(reach, &known, limits, state.skip_held, some);
        let mut found = answered("read the outbox", read).await?;
        fail::fail_point!("read", |_| std::process::abort());
        if full_sweep {
            self.last_full_sweep = Instant::now();
        }
        let last = found.iter().rev().find_map(|found| match found.event.place {
            Place::Int(n) => Some(n),
            Place::Text(_) => None,
        });
        // All rows of a horizon whose transactions have ended were visible to this read.
        if let (Some(horizon), Some(reach)) = (&state.horizon, &mut state.reach)
            && horizon.writers.is_empty()
            && found.len() < limits.rows
        {
            reach.low = horizon.cursor;
            state.held.retain(|place| matches!(place, Place::Int(n) if *n > reach.low));
            state.horizon = None;
        }
        let rows = found.len();
        // After a release the read begins at the head again, where others are on their way.
        found.retain(|found| !state.known.contains_key(&found.event.place));
        let handed_over = found.is_empty() || self.hand_over(found).await?;
        if let (true, Some(last), Some(reach)) = (handed_over, last, &mut self.state.reach) {
            reach.cursor = reach.cursor.max(last);
        }
        Ok(handed_over.then_some(rows))
    }

    /// Hands rows over in order, as far as the window has room; a large payload is fetched when its
    /// turn comes. `false` where the rest is to be read again.
    pub(super) async fn hand_over(&mut self, found: Vec<Found>) -> Result<bool, Error> {
        self.source.metrics.events_read(&self.source.spec.name).inc_by(found.len() as u64);
        let generation = self.state.generation;
        let mut ready = Vec::with_capacity(found.len());
        for Found { mut event, deferred_bytes } in found {
            let size = event.row.bytes() + deferred_bytes.unwrap_or(0) as usize;
            self.state.payload_mean += (size as f64 - self.state.payload_mean) / 256.0;
            let bytes = window_bytes(&event) + deferred_bytes.unwrap_or(0) as usize;
            if !self.source.window.claim(1, bytes) {
                self.send(Yield::Events { generation, events: std::mem::take(&mut ready) }).await;
                if !self.claim(bytes).await? {
                    return Ok(false);
                }
            }
            if deferred_bytes.is_some() {
                // What is ready need not wait for this one.
                self.send(Yield::Events { generation, events: std::mem::take(&mut ready) }).await;
                let fetched = self.fetch(event).await;
                let Ok(Some(whole)) = fetched else {
                    self.source.window.release(1, bytes);
                    return fetched.map(|_| false);
                };
                event = whole;
                // The row may have changed since its length was read.
                let now = window_bytes(&event);
                self.source.window.adjust(bytes, now);
            }
            if event.replay.is_some() {
                self.state.replays.insert(event.place.clone());
            } else {
                if let (Some(reach), Place::Int(n)) = (&mut self.state.reach, &event.place) {
                    reach.cursor = reach.cursor.max(*n);
                }
                self.polled(&event.place);
                if !self.source.spec.stays() {
                    self.state.released.insert(event.place.clone());
                }
                if let Some(kept) = &mut self.state.kept {
                    kept.take(&event.place, None);
                }
                self.state.known.insert(event.place.clone(), InLog::default());
            }
            ready.push(event);
        }
        self.send(Yield::Events { generation, events: ready }).await;
        Ok(true)
    }

    /// Waits for room, recording what gets settled meanwhile. `false` where the rest of the read is
    /// to be forgotten.
    pub(super) async fn claim(&mut self, bytes: usize) -> Result<bool, Error> {
        loop {
            if self.source.window.claim(1, bytes) {
                return Ok(true);
            }
            tokio::select! {
                () = self.source.window.freed() => {}
                command = self.feed.commands.recv() => match command {
                    Some(command) => self.take(command),
                    None => return Ok(false),
                },
                () = tokio::time::sleep(Duration::from_secs(1)) => {}
            }
            if !self.is_wanted() {
                return Ok(false);
            }
            let Some(epoch) = self.source.lease.borrow().epoch() else { return Ok(false) };
            self.record(epoch, !self.state.holds.is_empty()).await?;
            self.hold(epoch).await?;
        }
    }

    /// Whether the rest of a read is still to be handed over.
    fn is_wanted(&self) -> bool {
        let state = &self.state;
        let elsewhere = state.gates_due || !state.wishes.is_empty();
        state.opened && !state.stopping && !state.halted && !elsewhere
    }

    /// The event with its payload. What got settled is recorded meanwhile, some at a time, because both take
    /// long where payloads are large. `None` where the rest of the read is to be forgotten.
    async fn fetch(&mut self, event: Event) -> Result<Option<Event>, Error> {
        while let Ok(command) = self.feed.commands.try_recv() {
            self.take(command);
        }
        let epoch = self.source.lease.borrow().epoch().filter(|_| self.is_wanted());
        let (Some(outbox), Some(epoch)) = (self.outbox.clone(), epoch) else { return Ok(None) };
        let whole = answered("read a large payload", outbox.with_payload(event));
        if self.last_record.elapsed() < RECORD_EVERY {
            return whole.await.map(Some);
        }
        let (whole, recorded) = tokio::join!(whole, self.record(epoch, false));
        recorded?;
        whole.map(Some)
    }

    /// Lets `low` follow the cursor, behind the transactions that are open.
    pub(super) async fn raise_low(&mut self) -> Result<(), Error> {
        let (Some(outbox), Some(reach)) = (&self.outbox, self.state.reach) else { return Ok(()) };
        if self.last_horizon.elapsed() < HORIZON_EVERY || reach.cursor == reach.low {
            return Ok(());
        }
        self.last_horizon = Instant::now();
        let open = answered("look for open transactions", outbox.writers()).await?;
        match &mut self.state.horizon {
            None => self.state.horizon = Some(Horizon { cursor: reach.cursor, writers: open }),
            Some(horizon) => horizon.writers.retain(|writer| open.contains(writer)),
        }
        Ok(())
    }
}
