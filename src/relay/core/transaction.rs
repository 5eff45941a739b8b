//! Exactly once: what is sent is in a Kafka transaction, and settled when that is committed. Pure bookkeeping
//! of the one transaction that is open; `docs/decisions/0012-exactly-once.md` has the whole.
//!
//! A transaction closes when it is large or old enough: nothing more is taken in, what was sent is waited for,
//! and it is committed with the position. Whatever fails ends the generation, and the transaction with it.

use std::{sync::Arc, time::Duration};

use tracing::{info, warn};

use super::{Core, Phase, Table};
use crate::{
    event::{Place, TableIx},
    relay::{ledger::Entry, position::Position, unit::Takeover},
    sink::{PositionRecord, Sink},
    source::database::Noted,
};

/// A transaction closes with so many events, or after so long; later if it has many already, because each costs a
/// pause of the pipeline.
const EVENTS: usize = 10_000;
const OPEN_FOR: Duration = Duration::from_millis(50);
const MANY: usize = 1_000;
const OPEN_FOR_WITH_MANY: Duration = Duration::from_millis(100);
/// One that cannot be closed is dropped before the broker does it.
const CLOSES_WITHIN: Duration = Duration::from_secs(15);
/// How often the source notes how far the positions have come, and after how long nothing is in doubt any more.
const NOTE_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing was sent in it.
    Empty,
    Open {
        since: Duration,
    },
    /// Nothing more is taken in; what was sent is waited for.
    Closing {
        since: Duration,
    },
    /// It is being committed, or dropped.
    Ending,
}

/// What is told to the sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Commit(Vec<PositionRecord>),
    Abort,
}

/// The open transaction, and what Kafka knows.
#[derive(Debug)]
pub(super) struct Transaction {
    state: State,
    /// Events that were sent in it.
    sent: usize,
    /// Acknowledged in it, and whether that is their publication.
    acknowledged: Vec<(Entry, bool)>,
    /// As whom, and what; `None` before the unit was taken over.
    position: Option<Position>,
    noted: Noted,
    noting: bool,
    note_at: Duration,
    /// When the last one was committed, and whether it had something in doubt.
    committed_at: Duration,
    had_doubts: bool,
    /// The relay stops: nothing more will come.
    stops: bool,
}

impl Transaction {
    pub fn new() -> Transaction {
        Transaction {
            state: State::Empty,
            sent: 0,
            acknowledged: Vec::new(),
            position: None,
            noted: Noted::default(),
            noting: false,
            note_at: Duration::ZERO,
            committed_at: Duration::ZERO,
            had_doubts: false,
            stops: false,
        }
    }

    /// Its events are read again, by a generation that has taken the unit over.
    pub fn start_over(&mut self) {
        *self = Transaction { stops: self.stops, ..Transaction::new() };
    }

    pub fn is_empty(&self) -> bool {
        self.state == State::Empty
    }

    /// Whether events may be sent in it.
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Empty | State::Open { .. })
    }

    pub fn is_ending(&self) -> bool {
        self.state == State::Ending
    }

    /// An event was sent in it.
    pub fn sends(&mut self, now: Duration) {
        self.sent += 1;
        if self.state == State::Empty {
            self.state = State::Open { since: now };
        }
    }

    /// Closes it with what it has.
    pub fn close(&mut self, now: Duration) {
        if self.is_open() {
            self.state = State::Closing { since: now };
        }
    }

    pub fn acknowledged(&mut self, entry: Entry, published: bool) {
        self.acknowledged.push((entry, published));
    }

    /// Acknowledged, and not committed yet.
    pub fn uncommitted(&self) -> usize {
        self.acknowledged.len() + usize::from(self.state == State::Ending)
    }

    pub fn next_due(&self) -> Option<Duration> {
        let state = match self.state {
            State::Empty => self.clears_at(),
            State::Open { since } => Some(self.closes_at(since)),
            State::Closing { since } => Some(since + CLOSES_WITHIN),
            State::Ending => return None,
        };
        state.into_iter().chain(self.notes_at()).min()
    }

    fn closes_at(&self, since: Duration) -> Duration {
        match self.sent {
            EVENTS.. => since,
            MANY.. => since + OPEN_FOR_WITH_MANY,
            _ => since + OPEN_FOR,
        }
    }

    /// When the source is to note how far the positions have come.
    fn notes_at(&self) -> Option<Duration> {
        let position = self.position.as_ref().filter(|_| !self.noting && self.state != State::Ending)?;
        (position.counter > self.noted.counter).then_some(self.note_at)
    }

    /// When a position without doubts is due, after the last events: what is in doubt is not to be so for ever.
    fn clears_at(&self) -> Option<Duration> {
        let clear = self.position.as_ref().is_some_and(|position| !position.has_doubts());
        let after = if self.stops { Duration::ZERO } else { NOTE_EVERY };
        (clear && self.had_doubts).then(|| self.committed_at + after)
    }
}

impl Core {
    /// Whether what came in may lead to something being sent: not while a transaction closes.
    pub fn may_send(&self) -> bool {
        self.transaction.as_ref().is_none_or(Transaction::is_open)
    }

    /// Whether anything may be changed that may lead to something being sent, held or given up.
    pub fn is_committing(&self) -> bool {
        self.transaction.as_ref().is_some_and(Transaction::is_ending)
    }

    /// Nothing more is read. What is in doubt then is not to be so until the next start.
    pub fn stops(&mut self) {
        if let Some(transaction) = &mut self.transaction {
            transaction.stops = true;
        }
    }

    /// Whether everything that was read is finished, and nothing in doubt.
    pub fn is_drained(&self) -> bool {
        let in_doubt = self.transaction.as_ref().is_some_and(|transaction| transaction.had_doubts);
        self.unanswered() == 0 && !in_doubt
    }

    /// The unit is ours: the sources settle what is in doubt, then read.
    pub(super) fn taken_over(&mut self, mut takeover: Takeover, now: Duration) {
        let Some(transaction) = &mut self.transaction else { return };
        takeover.position.is_for(|name| self.tables.iter().any(|table| table.name == name));
        transaction.had_doubts = takeover.position.has_doubts();
        (transaction.note_at, transaction.committed_at) = (now + NOTE_EVERY, now);
        let doubts = |table: &Arc<Table>| -> Vec<Place> {
            takeover.position.doubts.get(&table.name).into_iter().flatten().cloned().collect()
        };
        self.effects.settle = Some((takeover.epoch, self.tables.iter().map(doubts).collect()));
        transaction.position = Some(takeover.position);
        transaction.noted = takeover.noted;
        self.effects.restart = Some(self.ledger.generation());
    }

    /// The source has recorded these: they are in doubt no more.
    pub(super) fn recorded(&mut self, table: TableIx, places: &[Place]) {
        let name = &self.tables[table.0 as usize].name;
        if let Some(position) = self.transaction.as_mut().and_then(|open| open.position.as_mut()) {
            position.recorded(name, places);
        }
    }

    /// Moves the transaction on, if its time has come.
    pub(super) fn look_at_transaction(&mut self, now: Duration) {
        let trial = self.trying.is_none()
            && self.trials.iter().any(|trial| trial.due <= now && self.is_ready_for(trial));
        let Some(transaction) = &mut self.transaction else { return };
        match transaction.state {
            State::Empty if transaction.clears_at().is_some_and(|at| at <= now) => self.commit(),
            State::Open { since } if now >= transaction.closes_at(since) || trial => {
                transaction.close(now);
                self.look_at_transaction(now);
            }
            State::Closing { .. } if self.ledger.in_sink() == 0 => self.commit(),
            State::Closing { since } if now >= since + CLOSES_WITHIN => {
                warn!("kafka does not acknowledge all of a transaction; it is dropped and read again");
                self.phase = Phase::Failing { since: now };
            }
            State::Empty | State::Open { .. } | State::Closing { .. } | State::Ending => {}
        }
        if let Some(transaction) = &mut self.transaction
            && transaction.notes_at().is_some_and(|at| at <= now)
            && let Some(position) = &transaction.position
        {
            transaction.noting = true;
            let noted = Noted { counter: position.counter, ..transaction.noted.clone() };
            self.effects.note = Some((self.ledger.generation(), noted));
        }
    }

    fn commit(&mut self) {
        let Some(transaction) = &mut self.transaction else { return };
        let Some(position) = &mut transaction.position else { return };
        transaction.state = State::Ending;
        position.counter += 1;
        for (entry, _) in &transaction.acknowledged {
            let table = &self.tables[entry.table.0 as usize].name;
            match position.doubts.get_mut(table) {
                Some(places) => places.insert(entry.place.clone()),
                None => position.doubts.entry(table.clone()).or_default().insert(entry.place.clone()),
            };
        }
        self.effects.end = Some((self.ledger.generation(), End::Commit(position.encode())));
    }

    /// The event that was tried alone is refused: it had a transaction of its own.
    pub(super) fn drop_transaction(&mut self) {
        let generation = self.ledger.generation();
        let Some(transaction) = self.transaction.as_mut().filter(|open| !open.is_ending()) else { return };
        transaction.state = State::Ending;
        transaction.acknowledged.clear();
        self.effects.end = Some((generation, End::Abort));
    }

    /// The transaction of a generation has ended, or nobody knows.
    pub(super) fn ended<S: Sink>(
        &mut self,
        generation: u32,
        result: Result<(), String>,
        now: Duration,
        wall_ms: i64,
        sink: &S,
    ) {
        if generation != self.ledger.generation() {
            return;
        }
        let Some(transaction) = self.transaction.as_mut().filter(|open| open.is_ending()) else { return };
        if let Err(error) = result {
            warn!(
                error,
                "nobody knows whether a transaction is committed; the producer is made anew, which tells"
            );
            self.phase = Phase::Failing { since: now };
            return;
        }
        (transaction.state, transaction.sent) = (State::Empty, 0);
        transaction.committed_at = now;
        transaction.had_doubts = transaction.position.as_ref().is_some_and(Position::has_doubts);
        for (entry, published) in std::mem::take(&mut transaction.acknowledged) {
            self.settled(&entry, published, now, wall_ms);
        }
        // What waits to be tried alone comes first, or it would wait for every transaction that follows.
        self.start_trials(now, sink);
    }

    /// The source has noted a position, or could not.
    pub(super) fn noted(&mut self, generation: u32, result: Result<Noted, String>, now: Duration) {
        let current = generation == self.ledger.generation();
        let Some(transaction) = self.transaction.as_mut().filter(|_| current) else { return };
        transaction.noting = false;
        transaction.note_at = now + NOTE_EVERY;
        match result {
            Ok(noted) => {
                if let Some(position) = &mut transaction.position {
                    position.noted = noted.counter;
                }
                transaction.noted = noted;
            }
            Err(error) => info!(error, "the source could not note the position; will try again"),
        }
    }
}
