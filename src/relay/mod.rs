//! The relay: one loop that owns all state. [`select`](Relay::run) picks what happened, a
//! synchronous [`Core::apply`] changes state, and what has to happen outside is carried out after.
//!
//! `ledger` knows what is finished, `lanes` what may not overtake, `topics` which topic can be
//! written to, `retry` what a failure means, `window` how much may be in flight, `packer` makes large
//! payloads travel.

pub mod core;
mod doubts;
mod lanes;
mod ledger;
pub mod packer;
pub mod position;
pub mod retry;
#[cfg(test)]
mod sim;
mod topics;
pub mod unit;
pub mod window;

use std::{sync::Arc, time::Duration};

use futures_util::future::Either;
use rdkafka::types::RDKafkaErrorCode;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
    time::Instant,
};
use tokio_util::sync::CancellationToken;

pub use self::core::{Action, Core, Effects, End, Rebuild, Table};
use self::{
    packer::Packer,
    unit::{DeliveryUnit, Obstacle, Takeover},
};
use crate::{
    admin::status::Board,
    coordinate::{Claim, Lease},
    event::TableIx,
    sink::{Sink, TopicFacts},
    source::{Command, Taken, Yield},
};

/// How long one question about a topic may take.
const LOOK_UP_WITHIN: Duration = Duration::from_secs(10);
/// How often the status board is brought up to date while nothing happens.
const BOARD_EVERY: Duration = Duration::from_millis(100);

/// What was left when the relay stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Left {
    /// Events read and not finished: they are read again at the next start.
    pub events: usize,
    /// Of these, sent to Kafka without an answer: they may be repeated.
    pub unanswered: usize,
    /// Exactly once: nothing is in doubt, so whoever works next has nothing to settle.
    pub clean: bool,
}

/// A table that comes, or goes, while the relay runs.
pub enum Change {
    /// At a place that is free, or the next one.
    Start {
        table: TableIx,
        rules: Arc<Table>,
        source: mpsc::UnboundedSender<Command>,
        done: oneshot::Sender<()>,
    },
    /// Answered when its source has ended, within a while after `grace` whatever Kafka does.
    Stop { table: TableIx, grace: Duration, done: oneshot::Sender<()> },
}

/// A table that is to stop.
struct Stopping {
    table: TableIx,
    /// Until when Kafka is waited for; `None` once that is over, and only its source has to end yet.
    deadline: Option<Instant>,
    done: oneshot::Sender<()>,
}

pub struct Relay<S> {
    pub core: Core,
    pub sink: Arc<S>,
    pub packer: Packer,
    pub intake: mpsc::Receiver<(TableIx, Yield)>,
    /// One for each table. Dropped at the end, which tells the sources to finish.
    pub sources: Vec<Option<mpsc::UnboundedSender<Command>>>,
    pub changes: mpsc::Receiver<Change>,
    pub lease: watch::Receiver<Lease>,
    /// Under which membership it works, and with which slot.
    pub claim: Option<Claim>,
    /// Cancelled when it would be a guess to go on.
    pub refused: CancellationToken,
    /// Exactly once: what is taken over before anything is sent.
    pub unit: Option<Arc<DeliveryUnit>>,
    pub board: Arc<Board>,
    /// The origin of the relay's monotonic clock.
    pub started: Instant,
}

type LookUp = (String, Result<TopicFacts, RDKafkaErrorCode>);

/// What is done outside of the loop, and answers with an action.
#[derive(Default)]
struct Outside {
    look_ups: JoinSet<LookUp>,
    rebuilds: JoinSet<Result<Option<Takeover>, Obstacle>>,
    ends: JoinSet<Action>,
    notes: JoinSet<Action>,
    packings: JoinSet<Action>,
    probes: JoinSet<Result<(), String>>,
}

impl<S: Sink> Relay<S> {
    /// Relays until `stop`, then finishes what is in flight, for `grace` at most.
    pub async fn run(mut self, stop: CancellationToken, grace: Duration) -> Left {
        let mut outside = Outside::default();
        let mut board_tick = tokio::time::interval(BOARD_EVERY);
        board_tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.heed_the_lease(&mut outside);
        let mut give_up: Option<Instant> = None;
        let mut stopping: Vec<Stopping> = Vec::new();
        loop {
            if give_up.is_some() && (self.core.is_drained() || give_up <= Some(Instant::now())) {
                break;
            }
            let due = self.core.next_due().map(|due| self.started + due);
            let overdue = stopping.iter().filter_map(|stopping| stopping.deadline).min();
            let wake = [due, give_up, overdue].into_iter().flatten().min();
            // Every branch only returns a value: cancelling the others loses nothing.
            let action = tokio::select! {
                biased;
                // 1. The lease first: without it nothing may be sent.
                Ok(()) = self.lease.changed() => {
                    self.heed_the_lease(&mut outside);
                    continue;
                }
                // 2. What ended makes room.
                reports = self.sink.reports() => Action::Reports(reports),
                Some(done) = outside.rebuilds.join_next() => {
                    Action::Rebuilt(done.unwrap_or_else(|error| Err(Obstacle::Trouble(error.to_string()))))
                }
                Some(done) = outside.ends.join_next() => match done {
                    Ok(ended) => ended,
                    // Given up with its generation.
                    Err(_) => Action::Due,
                },
                Some(done) = outside.notes.join_next() => done.unwrap_or(Action::Due),
                Some(done) = outside.look_ups.join_next(), if !self.core.is_barred() => match done {
                    Ok((topic, result)) => Action::LookedUp { topic, result },
                    Err(_) => Action::Due,
                },
                Some(done) = outside.packings.join_next(), if self.core.may_send() => match done {
                    Ok(packed) => packed,
                    // Given up with its generation.
                    Err(_) => Action::Due,
                },
                Some(done) = outside.probes.join_next(), if self.core.may_send() => {
                    Action::Probed(done.unwrap_or_else(|error| Err(error.to_string())))
                }
                () = at(wake) => Action::Due,
                () = stop.cancelled(), if give_up.is_none() => {
                    give_up = Some(Instant::now() + grace);
                    self.core.stops();
                    for source in self.sources.iter().flatten() {
                        source.send(Command::Stop).ok();
                    }
                    Action::Due
                }
                Some(change) = self.changes.recv() => self.change(change, &mut stopping),
                _ = board_tick.tick() => Action::Due,
                // 3. New work last.
                Some((table, yielded)) = self.intake.recv(), if self.core.wants_events() => {
                    if matches!(yielded, Yield::Ended) {
                        for ended in stopping.extract_if(.., |stopping| stopping.table == table) {
                            ended.done.send(()).ok();
                        }
                    }
                    Action::FromSource(table, yielded)
                }
            };
            self.apply(action, &mut outside);
            self.let_go(&mut stopping, &mut outside);
        }
        let clean = self.core.leaves_nothing();
        Left { events: self.core.open(), unanswered: self.core.unanswered(), clean }
    }

    fn change(&mut self, change: Change, stopping: &mut Vec<Stopping>) -> Action {
        match change {
            Change::Start { table, rules, source, done } => {
                self.core.add(table, rules);
                // It begins with the generation that there is.
                source.send(Command::Restart { generation: self.core.generation(), taken: None }).ok();
                let index = table.0 as usize;
                self.sources.resize_with(self.sources.len().max(index + 1), || None);
                self.sources[index] = Some(source);
                done.send(()).ok();
                Action::Due
            }
            Change::Stop { table, grace, done } => {
                self.tell(table, Command::Stop);
                stopping.push(Stopping { table, deadline: Some(Instant::now() + grace), done });
                Action::Retire(table)
            }
        }
    }

    /// Closes the channels of the tables that are to stop and have nothing in flight: their sources record what they
    /// owe, and end.
    fn let_go(&mut self, stopping: &mut [Stopping], outside: &mut Outside) {
        for Stopping { table, deadline, .. } in stopping {
            let there = self.sources[table.0 as usize].is_some();
            let overdue = deadline.take_if(|deadline| *deadline <= Instant::now()).is_some();
            if there && overdue && !self.core.is_drained_of(*table) {
                self.apply(Action::WaitNoLonger(*table), outside);
            }
            if there && self.core.is_drained_of(*table) {
                self.sources[table.0 as usize] = None;
            }
        }
    }

    fn apply(&mut self, action: Action, outside: &mut Outside) {
        let wall_ms = chrono::Utc::now().timestamp_millis();
        let effects = self.core.apply(action, self.started.elapsed(), wall_ms, &*self.sink);
        // A source that has ended takes no commands; what it would record is read again.
        for (table, places) in effects.settled {
            self.tell(table, Command::Settled(places));
        }
        for (table, places) in effects.forgotten {
            self.tell(table, Command::Forget(places));
        }
        for (table, holds) in effects.holds {
            self.tell(table, Command::Hold(holds));
        }
        for (table, over) in effects.release {
            self.tell(table, Command::Release(over));
        }
        for (table, serial, halted) in effects.go {
            self.tell(table, Command::Go { serial, halted });
        }
        for table in effects.halt {
            self.tell(table, Command::Halt);
        }
        for topic in effects.look_up {
            let asked = self.sink.look_up(topic.clone(), LOOK_UP_WITHIN);
            outside.look_ups.spawn(async move { (topic, asked.await) });
        }
        if let Some(Rebuild { batch_bytes, take_over }) = effects.rebuild {
            let sink = self.sink.clone();
            let ours = self.unit.clone().zip(self.claim).filter(|_| take_over);
            outside.rebuilds.spawn(async move {
                match ours {
                    Some((unit, claim)) => unit.take_over(&*sink, claim, batch_bytes).await.map(Some),
                    None => {
                        let made = sink.rebuild(batch_bytes).await.map(|()| None);
                        made.map_err(|error| Obstacle::Trouble(error.to_string()))
                    }
                }
            });
        }
        if effects.refuse {
            self.refused.cancel();
        }
        if let Some((generation, end)) = effects.end {
            let (metrics, commits, began) =
                (self.core.metrics(), matches!(end, End::Commit(_)), Instant::now());
            let ending = match end {
                End::Commit(position) => Either::Left(self.sink.commit(position)),
                End::Abort => Either::Right(self.sink.abort()),
            };
            outside.ends.spawn(async move {
                let result = ending.await;
                metrics.transaction_ended(commits, result.is_ok(), began.elapsed());
                Action::Ended { generation, result }
            });
        }
        if let (Some((generation, noted)), Some(unit), Some(claim)) = (effects.note, &self.unit, self.claim) {
            let (unit, epoch) = (unit.clone(), claim.epoch);
            outside.notes.spawn(async move {
                let result = unit.note(noted, epoch).await;
                Action::Noted { generation, result }
            });
        }
        if effects.restart.is_some() {
            outside.packings.abort_all();
        }
        for job in effects.pack {
            let packer = self.packer.clone();
            outside.packings.spawn(async move {
                let (ticket, number, began) = (job.ticket, job.number, Instant::now());
                let result = packer.pack(job).await;
                Action::Packed { ticket, number, result, took: began.elapsed() }
            });
        }
        if effects.probe {
            let packer = self.packer.clone();
            outside.probes.spawn(async move { packer.probe().await });
        }
        if let Some(generation) = effects.restart {
            let mut settle = effects.settle;
            for (index, source) in self.sources.iter().enumerate() {
                let Some(source) = source else { continue };
                let taken = settle.as_mut().map(|(claim, doubts)| Taken {
                    claim: *claim,
                    doubts: doubts.get_mut(index).map(std::mem::take).unwrap_or_default(),
                });
                source.send(Command::Restart { generation, taken }).ok();
            }
        }
        self.board.relay_turned(&self.core);
    }

    fn tell(&self, table: TableIx, command: Command) {
        if let Some(source) = &self.sources[table.0 as usize] {
            source.send(command).ok();
        }
    }

    /// Takes up until when we may send, on the relay's clock. Another membership is another lease, even if
    /// nobody noticed that the first one had ended.
    fn heed_the_lease(&mut self, outside: &mut Outside) {
        let (claim, until) = {
            let lease = self.lease.borrow_and_update();
            let until = match &*lease {
                Lease::Standby => None,
                Lease::Owner { until, .. } => Some(until.saturating_duration_since(self.started)),
            };
            (lease.claim(), until)
        };
        let before = std::mem::replace(&mut self.claim, claim);
        let (another, more) = match (before, claim) {
            (Some(before), Some(claim)) => (before.epoch != claim.epoch, before.slots != claim.slots),
            _ => (false, false),
        };
        if another {
            self.claim = None;
            self.apply(Action::Lease(None), outside);
            self.claim = claim;
        }
        self.apply(Action::Lease(until), outside);
        if more && !another {
            self.apply(Action::Inherits, outside);
        }
    }
}

/// Sleeps until then; for ever without a time.
async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}
