//! Step 2: what the log brings is handed over, but for what the table has brought already.

use std::time::Duration;

use tokio::time::Instant;
use tracing::warn;

use super::super::{Next, Task, known::InLog};
use crate::{
    event::{Event, Place},
    relay::core::window_bytes,
    source::{
        Yield,
        database::{Error, answered},
        log::{At, Batch, Streamed},
    },
};

/// When a row is looked at again that cannot be seen yet.
const UNSEEN_AGAIN_AFTER: Duration = Duration::from_millis(2);

/// Where handing over a batch has ended.
enum HandedOver {
    Whole,
    /// Before a row that the table has and the log cannot give.
    ToTheTable,
    /// Before a row that cannot be seen yet.
    Unseen,
    /// The rest is not wanted now.
    NoRoom,
}

impl Task {
    /// Hands over one batch of the log.
    pub(in crate::source::table) async fn follow(
        &mut self,
        recorded_by: Option<Instant>,
    ) -> Result<Next, Error> {
        if self.state.replay.wanted
            && let Some(limits) = self.limits()
        {
            self.read_replays(limits).await?;
        }
        let look_again = self.look_ahead().await?;
        if !self.is_streaming() {
            return Ok(Next::At(Instant::now()));
        }
        let Some(log) = &mut self.log else { return Ok(Next::Told) };
        let next = log.batch.take().or_else(|| log.incoming.as_mut()?.batches.try_recv().ok());
        let Some(mut batch) = next else {
            if log.sweep.is_some() && log.sweep_at <= Instant::now() {
                log.sweeping = true;
                self.back_to_the_table();
                return Ok(Next::At(Instant::now()));
            }
            let sweep = log.sweep.map(|_| log.sweep_at);
            let old_rows = self.source.spec.retention.map(|_| self.expire_at);
            let replay =
                self.state.replay.again.filter(|at| self.state.replay.wanted && *at > Instant::now());
            let next =
                recorded_by.into_iter().chain(old_rows).chain(look_again).chain(sweep).chain(replay).min();
            return Ok(next.map_or(Next::Told, Next::At));
        };
        if let Err(error) = self.look_for_held(&batch).await {
            self.put_back(batch);
            return Err(error);
        }
        let generation = self.state.opening.generation;
        let mut ready = Vec::with_capacity(batch.rows.len());
        let rows = batch.rows.len();
        let handed_over = self.hand_over_streamed(&mut batch, &mut ready).await;
        // What is put back is counted when it is taken again.
        let taken = rows - batch.rows.len();
        self.source.metrics.events_read(&self.source.spec.name).inc_by(taken as u64);
        // The room of a whole one is free before the window may be waited for again.
        self.put_back(batch);
        self.send(Yield::Events { generation, events: ready }).await;
        match handed_over? {
            HandedOver::Whole => {
                if let Some(log) = &mut self.log {
                    log.tell();
                }
            }
            HandedOver::ToTheTable => self.back_to_the_table(),
            HandedOver::Unseen => return Ok(Next::At(Instant::now() + UNSEEN_AGAIN_AFTER)),
            HandedOver::NoRoom => {}
        }
        Ok(Next::At(Instant::now()))
    }

    /// What is left of a batch comes before the next one.
    fn put_back(&mut self, batch: Batch) {
        if let Some(log) = self.log.as_mut().filter(|_| !batch.rows.is_empty()) {
            log.batch = Some(batch);
        }
    }

    /// Takes rows off a batch until one has to wait. `ready`: those that are not sent yet.
    async fn hand_over_streamed(
        &mut self,
        batch: &mut Batch,
        ready: &mut Vec<Event>,
    ) -> Result<HandedOver, Error> {
        while let Some(Streamed { at, event }) = batch.rows.front() {
            let Some(event) = event else {
                let table = self.source.spec.name.as_str();
                warn!(table, "a row of the log is left to the table, which is polled");
                // It counts as such when it can be seen there, which may not be yet.
                return Ok(HandedOver::ToTheTable);
            };
            if self.has_come_already(at, &event.place) {
                batch.rows.pop_front();
                continue;
            }
            if !self.may_publish(at).await? {
                return Ok(HandedOver::Unseen);
            }
            let bytes = window_bytes(event);
            if !self.source.window.claim(1, bytes) {
                let (generation, events) = (self.state.opening.generation, std::mem::take(ready));
                self.send(Yield::Events { generation, events }).await;
                if !self.claim(bytes).await? {
                    return Ok(HandedOver::NoRoom);
                }
            }
            let Some(Streamed { at, event: Some(event) }) = batch.rows.pop_front() else { break };
            self.note_handed_over(&event.place, at);
            ready.push(event);
        }
        Ok(HandedOver::Whole)
    }

    /// Whether polling has brought this row, or it is held and the log brings it again: then the log hears that it is
    /// settled when the other one is.
    fn has_come_already(&mut self, at: &At, place: &Place) -> bool {
        let Some(log) = &mut self.log else { return false };
        let known = &mut self.state.known;
        let again = log.held.as_ref().is_some_and(|held| held.contains(place) || known.contains(place));
        if !again && !log.is_old(at, place) {
            return false;
        }
        let number = log.acks.expect();
        if !known.is_numbered(place, number) {
            log.acks.settle(number);
        }
        true
    }

    fn note_handed_over(&mut self, place: &Place, at: At) {
        let Some(log) = &mut self.log else { return };
        let number = log.acks.expect();
        if let Some(kept) = &mut self.state.kept {
            kept.take(place, at.xid());
        }
        let known = InLog { number: Some(number), at: Some(at) };
        if let Some(before) = self.state.known.streams(place.clone(), known) {
            // The application used the number again while the first one is on its way.
            log.acks.settle(before);
        }
    }

    /// Before the first row of a reading: what the log brings again although it is held.
    async fn look_for_held(&mut self, batch: &Batch) -> Result<(), Error> {
        let Some(log) = self.log.as_mut().filter(|log| log.only && log.held.is_none()) else { return Ok(()) };
        let first = batch.rows.front().and_then(|row| row.event.as_ref());
        if let (Some(first), Some(outbox)) = (first, &self.outbox) {
            let held = answered("look for what is held", outbox.held_from(&first.place)).await?;
            log.held = Some(held.into_iter().collect());
        }
        Ok(())
    }
}
