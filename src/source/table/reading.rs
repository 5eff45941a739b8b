//! Reading: how much, from where, and handing it over.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use tokio::{sync::Semaphore, time::Instant};
use tokio_util::task::AbortOnDropHandle;

use super::{Horizon, Task};
use crate::{
    event::{Event, Place},
    relay::core::window_bytes,
    source::{
        Yield,
        database::{Error, Found, Limits, Outbox, Reach, answered},
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

/// Room that is no good part of the window is taken after this: what has the rest may have it for long.
const ANY_ROOM_AFTER: Duration = Duration::from_millis(5);

/// Large payloads that a table fetches at once, each on a connection.
const FETCHES: usize = 2;
const FETCH: &str = "read a large payload";
/// Rows of large payloads that one read finds.
const FEW_ROWS: usize = 8;

/// A row that has its room in the window, and is handed over after those before it.
struct Coming {
    /// Of its room.
    bytes: usize,
    row: Arriving,
}

/// `None`: the row is gone.
type Fetch = AbortOnDropHandle<Result<Option<Event>, Error>>;

enum Arriving {
    Now(Event),
    Later(Fetch),
}

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
        let rows = rows.max(FEW_ROWS).min(batch.min(room.events).max(1));
        // A payload that is longer than it may be is not read at all.
        Some(Limits { rows, inline_bytes: (bytes / rows).min(self.source.spec.max_payload) })
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
        let known = state.known.left_out(&state.held, reach.low);
        let some = self.share.buckets();
        if some.is_some_and(<[u16]>::is_empty) {
            return Ok(Some(0));
        }
        // Held rows are left out by SQL only where memory does not list them: on the first pass
        // over the table, and on a full sweep.
        let read = outbox.read(reach, &known, limits, state.skip_held, some);
        let mut found = answered("read the outbox", read).await?;
        fail::fail_point!("read", |_| std::process::abort());
        if full_sweep {
            self.last_full_sweep = Instant::now();
        }
        let last = found.iter().rev().find_map(|found| found.event.place.number());
        let is_late =
            |found: &&Found| found.event.place.number().is_some_and(|number| number <= reach.cursor);
        let (rows, late) = (found.len(), found.iter().filter(is_late).count());
        // After a release the read begins at the head again, where others are on their way.
        found.retain(|found| !state.known.contains(&found.event.place));
        let handed_over = found.is_empty() || self.hand_over(found).await?;
        let state = &mut self.state;
        if let (true, Some(last), Some(reach)) = (handed_over, last, &mut state.reach) {
            reach.cursor = reach.cursor.max(last);
        }
        // All rows of a horizon whose transactions have ended were visible to this read, unless late ones alone filled it.
        if let (Some(horizon), Some(reach)) = (&state.horizon, &mut state.reach)
            && horizon.writers.is_empty()
            && (handed_over && late < limits.rows)
        {
            reach.low = horizon.cursor;
            state.held.retain(|place| matches!(place, Place::Int(n) if *n > reach.low));
            state.horizon = None;
        }
        Ok(handed_over.then_some(rows))
    }

    /// Hands rows over in order, as far as the window has room; a large payload is fetched when its
    /// turn comes. `false` where the rest is to be read again.
    pub(super) async fn hand_over(&mut self, found: Vec<Found>) -> Result<bool, Error> {
        self.source.metrics.events_read(&self.source.spec.name).inc_by(found.len() as u64);
        let mut line = VecDeque::new();
        let done = self.line_up(found, &mut line).await;
        for Coming { bytes, .. } in line {
            self.source.window.release(1, bytes);
        }
        done
    }

    async fn line_up(&mut self, found: Vec<Found>, line: &mut VecDeque<Coming>) -> Result<bool, Error> {
        let Some(outbox) = self.outbox.clone() else { return Ok(false) };
        let generation = self.state.opening.generation;
        let mut ready = Vec::with_capacity(found.len());
        for Found { event, deferred_bytes } in found {
            let size = event.row.bytes() + deferred_bytes.unwrap_or(0) as usize;
            self.state.payload_mean += (size as f64 - self.state.payload_mean) / 256.0;
            let bytes = window_bytes(&event) + deferred_bytes.unwrap_or(0) as usize;
            if !self.source.window.claim(1, bytes) {
                if !self.advance(line, 0, &mut ready).await? {
                    return Ok(false);
                }
                self.send(Yield::Events { generation, events: std::mem::take(&mut ready) }).await;
                if !self.claim(bytes).await? {
                    return Ok(false);
                }
            }
            let row = match deferred_bytes {
                Some(_) => {
                    if !self.advance(line, FETCHES - 1, &mut ready).await? {
                        self.source.window.release(1, bytes);
                        return Ok(false);
                    }
                    Arriving::Later(fetch(self.source.fetches.clone(), outbox.clone(), event))
                }
                None if line.is_empty() => {
                    self.goes(&event);
                    ready.push(event);
                    continue;
                }
                None => Arriving::Now(event),
            };
            line.push_back(Coming { bytes, row });
        }
        if !self.advance(line, 0, &mut ready).await? {
            return Ok(false);
        }
        self.send(Yield::Events { generation, events: ready }).await;
        Ok(true)
    }

    /// Takes rows off the line, in order, and waits for their payloads until no more than so many are being
    /// fetched. What got settled is recorded elsewhere, while the window is full: it takes as long, and what is
    /// fetched would wait for it. `false` where the rest of the read is to be forgotten; nothing is left in
    /// `ready` then.
    async fn advance(
        &mut self,
        line: &mut VecDeque<Coming>,
        fetches: usize,
        ready: &mut Vec<Event>,
    ) -> Result<bool, Error> {
        let generation = self.state.opening.generation;
        let is_fetched = |coming: &&Coming| matches!(coming.row, Arriving::Later(_));
        let mut left = line.iter().filter(is_fetched).count();
        while let Some(coming) = line.front_mut() {
            if let Arriving::Later(fetch) = &mut coming.row {
                if left <= fetches {
                    break;
                }
                // What is ready need not wait for this one.
                self.send(Yield::Events { generation, events: std::mem::take(ready) }).await;
                while let Ok(command) = self.feed.commands.try_recv() {
                    self.take(command);
                }
                if self.source.lease.borrow().epoch().is_none() || !self.is_wanted() {
                    return Ok(false);
                }
                let Some(event) = fetch.await.unwrap_or(Err(Error::NoAnswer(FETCH)))? else {
                    // As if it had gone before it was found.
                    self.source.window.release(1, coming.bytes);
                    line.pop_front();
                    left -= 1;
                    continue;
                };
                // The row may have changed since its length was read.
                self.source.window.adjust(coming.bytes, window_bytes(&event));
                coming.row = Arriving::Now(event);
                left -= 1;
            }
            if let Some(Coming { row: Arriving::Now(event), .. }) = line.pop_front() {
                self.goes(&event);
                ready.push(event);
            }
        }
        Ok(true)
    }

    /// An event is handed over next.
    fn goes(&mut self, event: &Event) {
        if event.replay.is_some() {
            self.state.replay.rows.insert(event.place.clone());
            return;
        }
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
        self.state.known.polls(&event.place);
    }

    /// Waits for room that is worth it, or a moment for any, recording what gets settled meanwhile. `false` where the
    /// rest of the read is to be forgotten.
    pub(super) async fn claim(&mut self, bytes: usize) -> Result<bool, Error> {
        let any_after = Instant::now() + ANY_ROOM_AFTER;
        loop {
            let is_late = any_after <= Instant::now();
            if (is_late || self.source.window.is_worth_it()) && self.source.window.claim(1, bytes) {
                return Ok(true);
            }
            tokio::select! {
                () = self.source.window.worth_it() => {}
                () = self.source.window.freed(), if is_late => {}
                () = tokio::time::sleep_until(any_after), if !is_late => {}
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
        let elsewhere = state.opening.gates_due || !state.wishes.is_empty();
        state.opening.opened && !state.stopping && !state.halted && !elsewhere
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

/// Fetches the payload of an event, whatever its table does meanwhile.
fn fetch(turns: Arc<Semaphore>, outbox: Arc<Outbox>, event: Event) -> Fetch {
    AbortOnDropHandle::new(tokio::spawn(async move {
        let _turn = turns.acquire().await;
        answered(FETCH, outbox.with_payload(event)).await
    }))
}
