//! Exactly once: what is sent is in a Kafka transaction, and settled when that is committed. Pure bookkeeping
//! of the transaction that is open, and of the one before it while that is being committed;
//! `docs/decisions/0012-exactly-once.md` has the whole.
//!
//! A transaction closes when it is large or old enough: what was sent is waited for, and it is committed with the
//! position. The next one is open meanwhile, with another producer, and is not committed before that is known; what is of
//! a lane of which something is waited for waits too. Where something is to be on its own, or the one before is not
//! committed yet, nothing is taken in until then. Whatever fails ends the generation, and its transactions with it.

use std::{sync::Arc, time::Duration};

use tracing::{info, warn};

use super::{Core, Phase, Table};
use crate::{
    event::{Place, TableIx},
    relay::{doubts::Doubts, ledger::Entry, position::Position, unit::Takeover},
    sink::{PositionRecord, Sink},
    source::database::Noted,
};

/// A transaction closes with so many events, or after so long; later if it has many already, because each costs a
/// pause of the pipeline.
const EVENTS: usize = 10_000;
const OPEN_FOR: Duration = Duration::from_millis(50);
const MANY: usize = 1_000;
const OPEN_FOR_WITH_MANY: Duration = Duration::from_millis(100);
/// Nothing more comes: everything of one that has many is acknowledged, and for so long nothing was sent.
const QUIET: Duration = Duration::from_millis(30);
/// While the one before is not committed there is no hurry to close the next: up to so many events.
const EVENTS_AT_MOST: usize = 4 * EVENTS;
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
    /// Nothing more is taken in; what was sent is waited for, and the end of the one before.
    Closing {
        since: Duration,
    },
    /// Nothing is taken in until the one before has ended.
    Barred,
}

/// What is told to the sink.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    Commit(Vec<PositionRecord>),
    Abort,
}

/// What was acknowledged in a transaction, and whether that is its publication.
type Acknowledged = Vec<(Entry, bool)>;

/// A transaction whose producer was relieved of the next: what was sent in it is waited for.
#[derive(Debug)]
struct Relieved {
    since: Duration,
    unanswered: usize,
    acknowledged: Acknowledged,
}

/// The open transaction, those before it, and what Kafka knows.
#[derive(Debug)]
pub(super) struct Transaction {
    state: State,
    /// Events that were sent in it, and when the last one was.
    sent: usize,
    sent_at: Duration,
    acknowledged: Acknowledged,
    relieved: Option<Relieved>,
    /// The one that is being committed, or dropped.
    ending: Option<Acknowledged>,
    /// As whom, and what; `None` before the unit was taken over.
    position: Option<Position>,
    noted: Noted,
    /// The counter of the last one that is known to be committed.
    committed: i64,
    noting: bool,
    note_at: Duration,
    /// When the last one ended, and whether the last position had something in doubt.
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
            sent_at: Duration::ZERO,
            acknowledged: Vec::new(),
            relieved: None,
            ending: None,
            position: None,
            noted: Noted::default(),
            committed: 0,
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

    /// Whether nothing was sent that is not committed.
    pub fn is_idle(&self) -> bool {
        self.state == State::Empty && self.is_first()
    }

    /// Whether none is before it that is not committed.
    fn is_first(&self) -> bool {
        self.relieved.is_none() && self.ending.is_none()
    }

    /// Whether events may be sent in it.
    pub fn is_open(&self) -> bool {
        matches!(self.state, State::Empty | State::Open { .. })
    }

    pub fn is_barred(&self) -> bool {
        self.state == State::Barred
    }

    /// An event was sent in it.
    pub fn sends(&mut self, now: Duration) {
        self.sent += 1;
        self.sent_at = now;
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

    /// The next one begins, with another producer, though so many events of this one are not answered.
    fn relieve(&mut self, now: Duration, unanswered: usize) {
        let acknowledged = std::mem::take(&mut self.acknowledged);
        self.relieved = Some(Relieved { since: now, unanswered, acknowledged });
        (self.state, self.sent) = (State::Empty, 0);
    }

    /// It is told how to end, and the next one begins.
    fn ends(&mut self, next: State) {
        self.ending = Some(std::mem::take(&mut self.acknowledged));
        (self.state, self.sent) = (next, 0);
    }

    pub fn acknowledges(&mut self, entry: Entry, published: bool) {
        match &mut self.relieved {
            Some(relieved) if entry.relieved => {
                relieved.unanswered -= 1;
                relieved.acknowledged.push((entry, published));
            }
            _ => self.acknowledged.push((entry, published)),
        }
    }

    /// Acknowledged, and not committed yet.
    pub fn uncommitted(&self) -> usize {
        let before = self.relieved.as_ref().map_or(0, |relieved| relieved.acknowledged.len());
        before + self.acknowledged.len() + self.ending.as_ref().map_or(0, |ending| ending.len().max(1))
    }

    pub fn next_due(&self) -> Option<Duration> {
        let state = match self.state {
            State::Empty => self.clears_at(),
            State::Open { since } => self.closes_at(since),
            State::Closing { since } => Some(since + CLOSES_WITHIN),
            State::Barred => None,
        };
        let relieved = self.relieved.as_ref().map(|relieved| relieved.since + CLOSES_WITHIN);
        state.into_iter().chain(relieved).chain(self.notes_at()).min()
    }

    /// `None`: the end of the one before tells.
    fn closes_at(&self, since: Duration) -> Option<Duration> {
        match self.sent {
            EVENTS_AT_MOST.. => Some(since),
            _ if !self.is_first() => None,
            EVENTS.. => Some(since),
            MANY.. if self.acknowledged.len() == self.sent => {
                Some((since + OPEN_FOR_WITH_MANY).min(self.sent_at + QUIET))
            }
            MANY.. => Some(since + OPEN_FOR_WITH_MANY),
            _ => Some(since + OPEN_FOR),
        }
    }

    /// When the source is to note how far the positions have come.
    fn notes_at(&self) -> Option<Duration> {
        (self.committed > self.noted.counter && !self.noting).then_some(self.note_at)
    }

    /// When a position without doubts is due, after the last events: what is in doubt is not to be so for ever.
    fn clears_at(&self) -> Option<Duration> {
        let clear = self.position.as_ref().is_some_and(|position| !position.has_doubts());
        let after = if self.stops { Duration::ZERO } else { NOTE_EVERY };
        (clear && self.had_doubts && self.is_first()).then(|| self.committed_at + after)
    }
}

impl Core {
    /// Whether what came in may lead to something being sent: not while a transaction closes.
    pub fn may_send(&self) -> bool {
        self.transaction.as_ref().is_none_or(Transaction::is_open)
    }

    /// Whether nothing may be changed that may lead to something being sent, held or given up.
    pub fn is_barred(&self) -> bool {
        self.transaction.as_ref().is_some_and(Transaction::is_barred)
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

    /// Whether whoever works next has nothing to settle.
    pub fn leaves_nothing(&self) -> bool {
        let taken_over = self.transaction.as_ref().is_some_and(|transaction| transaction.position.is_some());
        taken_over && self.phase == Phase::Running && self.is_drained()
    }

    /// The unit is ours: the sources settle what is in doubt, then read.
    pub(super) fn taken_over(&mut self, mut takeover: Takeover, now: Duration) {
        let Some(transaction) = &mut self.transaction else { return };
        takeover.position.is_for(|name| self.tables.iter().any(|table| table.name == name));
        self.metrics.unit_taken_over(takeover.was_fenced);
        transaction.had_doubts = takeover.position.has_doubts();
        (transaction.note_at, transaction.committed_at) = (now + NOTE_EVERY, now);
        let doubts = |table: &Arc<Table>| -> Vec<Place> {
            takeover.position.doubts.get(&table.name).into_iter().flat_map(Doubts::iter).collect()
        };
        self.effects.settle = Some((takeover.claim, self.tables.iter().map(doubts).collect()));
        transaction.committed = takeover.position.counter;
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
    pub(super) fn look_at_transaction<S: Sink>(&mut self, now: Duration, sink: &S) {
        let (trial, alone) = (self.trial_waits(now), self.waits_to_be_alone(now));
        let Some(transaction) = &mut self.transaction else { return };
        if let Some(relieved) = &transaction.relieved {
            if relieved.unanswered == 0 && transaction.ending.is_none() {
                self.commit_relieved(now);
            } else if now >= relieved.since + CLOSES_WITHIN {
                return self.does_not_close(now);
            }
        }
        let Some(transaction) = &mut self.transaction else { return };
        match transaction.state {
            State::Empty if transaction.clears_at().is_some_and(|at| at <= now) => self.commit(now, sink),
            State::Open { since } if transaction.closes_at(since).is_some_and(|at| at <= now) || trial => {
                if alone || !transaction.is_first() || !self.relieve(now, sink) {
                    self.close(now);
                    self.look_at_transaction(now, sink);
                }
            }
            State::Closing { .. } if self.ledger.in_sink() == 0 && transaction.is_first() => {
                self.commit(now, sink);
            }
            State::Closing { since } if now >= since + CLOSES_WITHIN => return self.does_not_close(now),
            State::Empty | State::Open { .. } | State::Closing { .. } | State::Barred => {}
        }
        if let Some(transaction) = &mut self.transaction
            && transaction.notes_at().is_some_and(|at| at <= now)
        {
            transaction.noting = true;
            let noted = Noted { counter: transaction.committed, ..transaction.noted.clone() };
            self.effects.note = Some((self.ledger.generation(), noted));
        }
    }

    /// Whether a trial or a hold waits until no transaction is open.
    fn waits_to_be_alone(&self, now: Duration) -> bool {
        self.progress.iter().any(|progress| !progress.holds.is_empty()) || self.trial_waits(now)
    }

    fn trial_waits(&self, now: Duration) -> bool {
        self.trying.is_none() && self.trials.iter().any(|trial| trial.due <= now && self.is_ready_for(trial))
    }

    fn close(&mut self, now: Duration) {
        if let Some(transaction) = &mut self.transaction {
            transaction.close(now);
        }
    }

    fn does_not_close(&mut self, now: Duration) {
        warn!("kafka does not acknowledge all of a transaction; it is dropped and read again");
        self.phase = Phase::Failing { since: now };
    }

    /// Has another producer take what comes next, while what was sent is waited for. A lane of which something is
    /// waited for waits too: between two producers nothing else keeps the order. Not where something waits already: it may be
    /// earlier than what comes next.
    fn relieve<S: Sink>(&mut self, now: Duration, sink: &S) -> bool {
        let Some(lanes) = self.ledger.relieve() else { return false };
        lanes.into_iter().for_each(|lane| self.lanes.cross(lane));
        if let Some(transaction) = &mut self.transaction {
            transaction.relieve(now, self.ledger.in_sink());
        }
        sink.relieve();
        true
    }

    /// What was sent by the producer that was relieved is acknowledged.
    fn commit_relieved(&mut self, now: Duration) {
        let alone = self.waits_to_be_alone(now);
        let Some(transaction) = &mut self.transaction else { return };
        let Some(relieved) = transaction.relieved.take() else { return };
        transaction.ending = Some(relieved.acknowledged);
        if alone && transaction.state == State::Empty {
            transaction.state = State::Barred;
        }
        self.tell_to_commit();
    }

    /// Has the transaction committed. The next one is open meanwhile, unless something waits until nothing is open.
    fn commit<S: Sink>(&mut self, now: Duration, sink: &S) {
        let alone = self.waits_to_be_alone(now);
        let Some(transaction) = &mut self.transaction else { return };
        transaction.ends(if alone { State::Barred } else { State::Empty });
        sink.relieve();
        self.tell_to_commit();
    }

    /// With the position, in which what was acknowledged is in doubt.
    fn tell_to_commit(&mut self) {
        let Some(transaction) = &mut self.transaction else { return };
        let (Some(position), Some(ending)) = (&mut transaction.position, &transaction.ending) else { return };
        position.counter += 1;
        self.metrics.commits(ending.len());
        for of_table in ending.chunk_by(|(one, _), (next, _)| one.table == next.table) {
            let table = &self.tables[of_table[0].0.table.0 as usize].name;
            let places = of_table.iter().map(|(entry, _)| entry.place.clone());
            position.doubts.entry(table.clone()).or_default().extend(places);
        }
        transaction.had_doubts = position.has_doubts();
        self.effects.end = Some((self.ledger.generation(), End::Commit(position.encode())));
    }

    /// The event that was tried alone is refused: it had a transaction of its own.
    pub(super) fn drop_transaction(&mut self) {
        let generation = self.ledger.generation();
        let Some(transaction) = self.transaction.as_mut().filter(|open| open.is_first()) else {
            return;
        };
        transaction.acknowledged.clear();
        transaction.ends(State::Barred);
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
        let Some(transaction) = &mut self.transaction else { return };
        let Some(ending) = transaction.ending.take() else { return };
        if let Err(error) = result {
            warn!(
                error,
                "nobody knows whether a transaction is committed; the producer is made anew, which tells"
            );
            self.phase = Phase::Failing { since: now };
            return;
        }
        if transaction.state == State::Barred {
            transaction.state = State::Empty;
        }
        transaction.committed_at = now;
        transaction.committed = transaction.position.as_ref().map_or(0, |position| position.counter);
        for (entry, published) in ending {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::relay::ledger::tests::entry;

    #[test]
    fn the_next_transaction_closes_when_the_one_before_is_committed_or_it_is_very_large() {
        let mut transaction = Transaction::new();
        let began = Duration::from_secs(7);
        transaction.sends(began);
        assert_eq!(transaction.next_due(), Some(began + OPEN_FOR));
        transaction.close(began);
        assert!(!transaction.is_open());
        transaction.ends(State::Empty);
        assert!(transaction.is_open() && !transaction.is_idle());
        (0..EVENTS).for_each(|_| transaction.sends(began));
        assert_eq!(transaction.next_due(), None, "it would only wait");
        assert!(transaction.ending.take().is_some());
        assert_eq!(transaction.next_due(), Some(began), "at once");
        transaction.ends(State::Empty);
        (0..EVENTS_AT_MOST).for_each(|_| transaction.sends(began));
        assert_eq!(transaction.next_due(), Some(began), "its memory has a bound");
    }

    #[test]
    fn one_that_has_many_closes_soon_after_the_last_is_acknowledged() {
        let mut transaction = Transaction::new();
        let began = Duration::from_secs(7);
        (0..MANY).for_each(|_| transaction.sends(began));
        assert_eq!(transaction.next_due(), Some(began + OPEN_FOR_WITH_MANY));
        (0..MANY).for_each(|n| transaction.acknowledges(entry(n as i64), true));
        assert_eq!(transaction.next_due(), Some(began + QUIET));
        let later = began + OPEN_FOR_WITH_MANY / 2;
        transaction.sends(later);
        assert_eq!(transaction.next_due(), Some(began + OPEN_FOR_WITH_MANY), "more comes");
        transaction.acknowledges(entry(0), true);
        assert_eq!(transaction.next_due(), Some(later + QUIET));
    }
}
