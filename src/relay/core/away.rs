//! The object store is away. What needs it waits in memory, and is held once that fills a quarter of the
//! window, is in the way of others, or has lasted for [`PATIENCE`]; its keys with it. Other lanes flow.
//!
//! A small object that can be put again shows that payloads may be tried again, and a payload that was put
//! shows that the store is back. In between the trouble is not over: a store, or a way to it, that takes
//! small objects and no large ones would be tried without a pause, and nothing ever be held.

use std::time::Duration;

use tracing::{info, warn};

use super::{
    Core, Mishap, Phase, Table,
    packing::{Packings, State},
    suspects::Step,
    window_bytes,
};
use crate::{
    event::{Event, TableIx},
    relay::{
        lanes::{Closed, Lane, Waiting},
        retry::Policy,
    },
    sink::{Sink, Ticket},
    source::{Cause, hold::Over},
};

/// How long events wait in memory for an object store that is away.
const PATIENCE: Duration = Duration::from_secs(30);

#[derive(Debug)]
pub(super) struct Trouble {
    reason: String,
    since: Duration,
    /// The time of day when it was last seen, in milliseconds since the Unix epoch.
    at_ms: i64,
    attempts: u32,
    /// When it is asked again; `None`: it is being asked, or has answered.
    due: Option<Duration>,
    /// Since when it takes small objects again; it was given no payload yet.
    pub answers: Option<Duration>,
    /// What needs the store is held, and no longer waits in memory.
    tripped: bool,
}

impl Packings {
    /// Whether nothing is to be uploaded now.
    pub fn is_away(&self) -> bool {
        self.trouble.as_ref().is_some_and(|trouble| trouble.answers.is_none())
    }

    /// What is wrong with the store, and when that was last seen.
    pub fn mishap(&self) -> Option<Mishap> {
        let trouble = self.trouble.as_ref().filter(|trouble| trouble.answers.is_none())?;
        Some(Mishap { what: trouble.reason.clone(), at_ms: trouble.at_ms })
    }

    /// Why payloads cannot be moved out now.
    pub fn trouble(&self) -> String {
        self.trouble.as_ref().map_or_else(String::new, |trouble| trouble.reason.clone())
    }

    pub fn next_due(&self) -> Option<Duration> {
        let trouble = self.trouble.as_ref().filter(|trouble| trouble.answers.is_none())?;
        let patience = (!trouble.tripped && !self.heads.is_empty()).then_some(trouble.since + PATIENCE);
        [trouble.due, patience].into_iter().flatten().min()
    }

    fn is_given_up(&self, rules: &Table, now: Duration) -> bool {
        let since = self.trouble.as_ref().map(|trouble| trouble.since);
        since.zip(rules.give_up.after).is_some_and(|(since, after)| now >= since + after)
    }

    /// Events and bytes that wait for the store.
    fn waiting(&self) -> (usize, usize) {
        let away = |ticket| self.states.get(ticket) == Some(&State::Away);
        let heads = self.heads.iter().filter(|(ticket, _)| away(ticket));
        heads.fold((0, 0), |(events, bytes), (_, event)| (events + 1, bytes + window_bytes(event)))
    }
}

impl Core {
    /// What becomes of an event that needs the store while it is away.
    pub(super) fn wait_for_store(
        &mut self,
        ticket: Ticket,
        (table, lane): (TableIx, Option<Lane>),
        rules: &Table,
        event: Event,
        now: Duration,
    ) {
        if self.packing.is_given_up(rules, now) {
            self.try_alone(ticket, lane, event, Step::GiveUp, now);
        } else if self.packing.trouble.as_ref().is_some_and(|trouble| trouble.tripped) {
            self.hold_for_store(table, ticket, lane, &event);
        } else {
            self.packing.states.insert(ticket, State::Away);
            self.wait_for_packing(ticket, lane, event);
        }
    }

    pub(super) fn store_is_away(&mut self, reason: String, now: Duration) {
        let wall_ms = self.wall_ms;
        match &mut self.packing.trouble {
            Some(trouble) if trouble.answers.is_some() => {
                warn!(error = reason, "the object store takes small objects and no payload");
                trouble.reason = reason;
                trouble.answers = None;
                trouble.ask_again(now, wall_ms);
            }
            Some(trouble) => trouble.reason = reason,
            None => {
                warn!(
                    error = reason,
                    "the object store cannot be reached; events that need it wait with their keys, others flow"
                );
                let mut trouble = Trouble {
                    reason,
                    since: now,
                    at_ms: wall_ms,
                    attempts: 0,
                    due: None,
                    answers: None,
                    tripped: false,
                };
                trouble.ask_again(now, wall_ms);
                self.packing.trouble = Some(trouble);
            }
        }
    }

    /// It took a payload, or said why not, or nothing needs it.
    pub(super) fn store_is_back(&mut self, now: Duration) {
        if let Some(trouble) = self.packing.trouble.take_if(|trouble| trouble.answers.is_some()) {
            info!(seconds = now.saturating_sub(trouble.since).as_secs(), "the object store is back");
        }
    }

    /// Whether the object store took the small object.
    pub(super) fn probed<S: Sink>(&mut self, result: Result<(), String>, now: Duration, sink: &S) {
        let wall_ms = self.wall_ms;
        let Some(trouble) = &mut self.packing.trouble else { return };
        match result {
            Err(reason) => {
                trouble.reason = reason;
                trouble.ask_again(now, wall_ms);
            }
            Ok(()) => {
                info!("the object store answers again");
                trouble.answers = Some(now);
                self.try_those_away_again(now, sink);
            }
        }
    }

    /// What waits for the store is packed anew, in order within its lane.
    fn try_those_away_again<S: Sink>(&mut self, now: Duration, sink: &S) {
        for (ticket, lane) in self.heads_that(|state| *state == State::Away) {
            self.packing_goes_on(ticket, lane, now, sink);
        }
    }

    /// Asks the store again when it is time, holds what has waited for long enough, and has the sources
    /// release it once the store is back.
    pub(super) fn look_at_store<S: Sink>(&mut self, now: Duration, sink: &S) {
        let answers = self.packing.trouble.as_ref().and_then(|trouble| trouble.answers);
        if self.packing.is_away() {
            self.look_at_trouble(now, sink);
        } else if self.packing.heads.is_empty() && answers.is_some_and(|since| now >= since + PATIENCE) {
            self.store_is_back(now);
        }
        for (index, progress) in self.progress.iter_mut().enumerate() {
            let can_go = !self.packing.is_away() || self.packing.is_given_up(&self.tables[index], now);
            if progress.held.store > 0 && can_go && !progress.store_asked {
                progress.store_asked = true;
                self.effects.release.push((TableIx(index as u16), Over::Store));
            }
        }
    }

    fn look_at_trouble<S: Sink>(&mut self, now: Duration, sink: &S) {
        let limit = self.window.limit();
        let (events, bytes) = self.packing.waiting();
        // Whatever is read next would wait for it: a row that needs more room than is left.
        let in_the_way = self.window.is_short() && self.ledger.in_sink() == 0;
        let Some(trouble) = &mut self.packing.trouble else { return };
        if trouble.due.is_some_and(|due| now >= due) {
            trouble.due = None;
            self.effects.probe = true;
        }
        let much = events >= limit.events.div_ceil(4) || bytes >= limit.bytes / 4;
        let long = now >= trouble.since + PATIENCE;
        if !trouble.tripped && (much || (events > 0 && (long || in_the_way))) {
            trouble.tripped = true;
            warn!(
                error = trouble.reason,
                events,
                "events that need the object store are held from now on, and released when it is back"
            );
        }
        let given_up = self.give_up_times.iter().any(|after| now >= trouble.since + *after);
        if self.phase == Phase::Running && (trouble.tripped || given_up) {
            // They are held, or given up, as if they came now.
            self.try_those_away_again(now, sink);
        }
    }

    /// Holds an event, and all that waits behind it, until the store is back.
    fn hold_for_store(&mut self, table: TableIx, ticket: Ticket, lane: Option<Lane>, event: &Event) {
        let rules = self.tables[table.0 as usize].clone();
        self.hold(ticket, &rules, event, Cause::Store, self.packing.trouble(), 0);
        if let Some(lane) = lane.filter(|_| event.replay.is_none()) {
            self.progress[table.0 as usize].closing.insert(ticket, (lane, Closed::Store));
            for Waiting { ticket, event } in self.lanes.close(table, Some(lane), Closed::Store) {
                self.hold_behind(ticket, &rules, &event, Closed::Store);
            }
        }
        self.count_held(table);
    }
}

impl Trouble {
    /// After a pause, which grows.
    fn ask_again(&mut self, now: Duration, wall_ms: i64) {
        self.at_ms = wall_ms;
        self.attempts += 1;
        self.due = Some(now + Policy::default().pause(self.attempts, fastrand::f64()));
    }
}
