//! The relay's state and its rules. One owner, no locks, nothing awaited: [`Core::apply`] takes one
//! action and changes state; what has to happen outside is left in [`Effects`]. A test is a list of
//! actions.

mod away;
mod breaker;
mod holds;
mod packing;
mod passing;
mod recovery;
mod reports;
mod suspects;
mod tables;
mod told;
mod transaction;
mod view;

use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use rdkafka::types::RDKafkaErrorCode as Code;
use tracing::error;

pub use self::{packing::Job, transaction::End};
use self::{
    packing::Packings,
    recovery::{FAILING_AT_MOST, rebuild_pause},
    suspects::Trial,
    transaction::Transaction,
};
use super::{
    lanes::{Closed, Lane, Lanes},
    ledger::Ledger,
    packer::Unpacked,
    retry::{GiveUp, Policy},
    topics::Topics,
    unit::{Obstacle, Takeover},
    window::Window,
};
use crate::{
    admin::metrics::{Metrics, PublishedHandles},
    config::Order,
    coordinate::Claim,
    event::{Event, Place, TableIx},
    record::{Packed, Rules},
    sink::{MAX_BATCH_BYTES, Report, Sink, Ticket, TopicFacts},
    source::{
        Hold, Yield,
        database::Noted,
        hold::{Counts, Over, Scope},
    },
    telemetry::Spans,
};

/// What the relay has to know of a table.
#[derive(Debug)]
pub struct Table {
    pub name: String,
    pub rules: Rules,
    pub order: Order,
    /// Whether an event can be read from its table again; else a hold has its content.
    pub keeps_rows: bool,
    pub retry: Policy,
    pub give_up: GiveUp,
    /// Held events past this halt the table.
    pub max_held: u64,
}

/// Something that happened. Times are on the relay's own monotonic clock.
#[derive(Debug)]
pub enum Action {
    FromSource(TableIx, Yield),
    Reports(Vec<Report>),
    LookedUp {
        topic: String,
        result: Result<TopicFacts, Code>,
    },
    /// With what was found, where a delivery unit was taken over.
    Rebuilt(Result<Option<Takeover>, Obstacle>),
    /// What became of the transaction of a generation.
    Ended {
        generation: u32,
        result: Result<(), String>,
    },
    /// Whether the source has noted a position of a generation.
    Noted {
        generation: u32,
        result: Result<Noted, String>,
    },
    /// What was made of a payload, and how long it took.
    Packed {
        ticket: Ticket,
        number: u64,
        result: Result<Packed, Unpacked>,
        took: Duration,
    },
    /// Whether the object store takes anything again.
    Probed(Result<(), String>),
    /// This relay may send until then; `None`: it may not.
    Lease(Option<Duration>),
    /// Exactly once: what a relay had that is gone is this one's, and what it left is to be found.
    Inherits,
    /// A table is to stop, for good or to be started anew.
    Retire(TableIx),
    /// A table is to stop, and what was sent of it had its time to be answered.
    WaitNoLonger(TableIx),
    /// The time of [`Core::next_due`] has come.
    Due,
}

/// What the loop has to do after an action.
#[derive(Debug, Default)]
pub struct Effects {
    pub settled: Vec<(TableIx, Vec<Place>)>,
    pub holds: Vec<(TableIx, Vec<Hold>)>,
    pub look_up: Vec<String>,
    /// Given back: to be read again after a while.
    pub forgotten: Vec<(TableIx, Vec<Place>)>,
    /// The gates of a table, by their number, are known: it may go on, unless it is halted.
    pub go: Vec<(TableIx, u32, bool)>,
    /// What is held for a trouble that is over is to be released.
    pub release: Vec<(TableIx, Over)>,
    /// Payloads to be packed; each is answered with [`Action::Packed`].
    pub pack: Vec<Job>,
    /// Ask the object store whether it takes anything, and answer with [`Action::Probed`].
    pub probe: bool,
    pub halt: Vec<TableIx>,
    /// Rebuild the sink, then answer with [`Action::Rebuilt`].
    pub rebuild: Option<Rebuild>,
    /// A new generation: what is being packed is given up; after everything above, tell the sources to
    /// start it.
    pub restart: Option<u32>,
    /// Exactly once: with this taken over the sources start it, with what each table is to record first.
    pub settle: Option<(Claim, Vec<Vec<Place>>)>,
    /// How the transaction of this generation is to end; answered with [`Action::Ended`].
    pub end: Option<(u32, End)>,
    /// It would be a guess to go on: the relay stops.
    pub refuse: bool,
    /// Have the source note this; answered with [`Action::Noted`].
    pub note: Option<(u32, Noted)>,
}

/// What new producers are to be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rebuild {
    /// The largest batch.
    pub batch_bytes: usize,
    /// Exactly once: the source is ours, so its delivery unit is taken over.
    pub take_over: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Running,
    /// Something failed in the pipelined producer. Nothing more is sent; once the producer has
    /// reported on what it had, or after [`FAILING_AT_MOST`], it is thrown away.
    Failing {
        since: Duration,
    },
    /// Waits before the rebuild, because the last ones did not help.
    Pausing {
        until: Duration,
    },
    Rebuilding,
}

#[derive(Debug, Default)]
struct Progress {
    /// The generation that the source has opened.
    opened: Option<u32>,
    settled: Vec<Place>,
    forgotten: Vec<Place>,
    holds: Vec<Hold>,
    /// Closed lanes that the source is listing.
    listed: Vec<(Lane, Closed)>,
    /// Lanes that an event closes whose hold is on its way to the source.
    closing: HashMap<Ticket, (Lane, Closed)>,
    /// Whether the source was asked to release what is held for the object store.
    store_asked: bool,
    paused: Vec<Scope>,
    /// Topics that have held events, and whether the source was asked to release them.
    held_topics: BTreeMap<u32, bool>,
    held: Counts,
    halted: bool,
    /// Admitted and not settled.
    open: usize,
    last_publish_ms: Option<i64>,
    /// Events, since this process started.
    published: u64,
    /// What was wrong with the event that was parked last, while something is parked.
    parked: Option<Mishap>,
}

impl Progress {
    /// Whether something is parked, or is about to be.
    fn has_parked(&self) -> bool {
        self.held.parked > 0 || self.closing.values().any(|(_, why)| *why == Closed::Parked)
    }
}

/// What went wrong, and when, in milliseconds since the Unix epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mishap {
    pub what: String,
    pub at_ms: i64,
}

pub struct Core {
    /// Why there is no producer, when there is none.
    no_producer: Option<Mishap>,
    /// What makes the spans of events that are traced.
    spans: Option<Spans>,
    tables: Vec<Arc<Table>>,
    progress: Vec<Progress>,
    ledger: Ledger,
    lanes: Lanes,
    topics: Topics,
    window: Arc<Window>,
    metrics: Arc<Metrics>,
    published: HashMap<(TableIx, u32), PublishedHandles>,
    phase: Phase,
    /// Rebuilds since the last delivery.
    rebuilds: u32,
    /// The rebuild that is under way: for batches of at most so many bytes, and in which generation it began.
    rebuilding: Option<(usize, u32)>,
    /// Exactly once: the transaction that is open.
    transaction: Option<Transaction>,
    lease_until: Option<Duration>,
    /// Whether the lease was ours when it was last looked at.
    owned: bool,
    /// Tables that stop once nothing of them is in flight.
    retiring: BTreeSet<TableIx>,
    suspects: HashSet<(TableIx, Place)>,
    /// Events that failed in the pipeline for a reason that may pass; a second time makes a suspect.
    failed_once: HashSet<(TableIx, Place)>,
    trials: VecDeque<Trial>,
    /// The suspect that is in flight.
    trying: Option<(Ticket, Trial)>,
    /// Events whose hold is being written.
    holding: usize,
    packing: Packings,
    /// What every known topic takes as one batch.
    batch_bytes: usize,
    /// The different values of `retry.give_up_after`.
    give_up_times: Vec<Duration>,
    /// When it is to be looked again whether topics acknowledge.
    look_again: Duration,
    /// When the last action was applied, on the relay's clock and by the time of day.
    now: Duration,
    wall_ms: i64,
    effects: Effects,
}

impl Core {
    pub fn metrics(&self) -> Arc<Metrics> {
        self.metrics.clone()
    }

    pub fn new(tables: Vec<Arc<Table>>, window: Arc<Window>, metrics: Arc<Metrics>) -> Core {
        Core {
            spans: None,
            progress: tables.iter().map(|_| Progress::default()).collect(),
            give_up_times: tables.iter().filter_map(|table| table.give_up.after).collect(),
            tables,
            ledger: Ledger::default(),
            lanes: Lanes::default(),
            topics: Topics::default(),
            window,
            metrics,
            published: HashMap::new(),
            phase: Phase::Running,
            rebuilds: 0,
            rebuilding: None,
            transaction: None,
            lease_until: None,
            owned: false,
            retiring: BTreeSet::new(),
            suspects: HashSet::new(),
            failed_once: HashSet::new(),
            trials: VecDeque::new(),
            trying: None,
            holding: 0,
            packing: Packings::default(),
            batch_bytes: MAX_BATCH_BYTES,
            look_again: Duration::ZERO,
            now: Duration::ZERO,
            no_producer: None,
            wall_ms: 0,
            effects: Effects::default(),
        }
    }

    /// The spans of events that are traced are made by these.
    pub fn with_spans(self, spans: Option<Spans>) -> Core {
        Core { spans, ..self }
    }

    /// Events are published in transactions, and settled when those are committed.
    pub fn exactly_once(mut self) -> Core {
        self.transaction = Some(Transaction::new());
        self
    }

    /// Changes state by one action. `now` is on the monotonic clock that the lease uses too, and
    /// `wall_ms` is the time of day in milliseconds since the Unix epoch, for metrics and headers only.
    pub fn apply<S: Sink>(&mut self, action: Action, now: Duration, wall_ms: i64, sink: &S) -> Effects {
        self.now = now;
        self.wall_ms = wall_ms;
        match action {
            Action::FromSource(table, yielded) => self.yielded(table, yielded, now, sink),
            Action::Reports(reports) => {
                for report in reports {
                    self.report(report, now, wall_ms, sink);
                }
            }
            Action::LookedUp { topic, result } => self.looked_up(&topic, result, now, sink),
            Action::Rebuilt(Ok(takeover)) => match self.rebuilding.take() {
                // A topic that takes smaller batches turned up meanwhile.
                Some((batch_bytes, _)) if batch_bytes > self.batch_bytes => self.rebuild(),
                // The lease came or went, and with it the right to be the one producer.
                Some((_, generation)) if self.is_overtaken_since(generation) => self.rebuild(),
                _ => {
                    self.phase = Phase::Running;
                    self.no_producer = None;
                    if let Some(takeover) = takeover {
                        self.taken_over(takeover, now);
                    }
                }
            },
            Action::Ended { generation, result } => self.ended(generation, result, now, wall_ms, sink),
            Action::Noted { generation, result } => self.noted(generation, result, now),
            // Given up for this one.
            Action::Rebuilt(Err(Obstacle::Trouble(_))) if self.is_overtaken() => {
                self.rebuilding = None;
                self.rebuild();
            }
            Action::Rebuilt(Err(error)) => {
                let refused = matches!(error, Obstacle::Refused(_));
                let (error, says) =
                    (error.to_string(), if refused { "the relay stops" } else { "will try again" });
                error!(error, "cannot make a kafka producer; {says}");
                self.no_producer = Some(Mishap { what: error, at_ms: wall_ms });
                self.effects.refuse = refused;
                self.rebuilding = None;
                self.rebuilds += 1;
                self.phase = Phase::Pausing { until: now + rebuild_pause(self.rebuilds) };
            }
            Action::Packed { ticket, number, result, took } => {
                self.packed((ticket, number), result, took, now, sink);
            }
            Action::Probed(result) => self.probed(result, now, sink),
            Action::Lease(until) => {
                let comes = self.lease_until.is_none() && until.is_some();
                self.lease_until = until;
                self.owned |= until.is_some();
                // What was taken in without a lease was not sent: it may not wait for later ones to pass. And
                // where there can be but one producer, we become that.
                if comes && (self.ledger.open() > 0 || self.transaction.is_some()) {
                    self.start_over();
                }
            }
            Action::Inherits if self.transaction.is_some() && self.lease_until.is_some() => self.start_over(),
            Action::Retire(table) => self.retire(table),
            Action::WaitNoLonger(table) => self.wait_no_longer(table),
            Action::Inherits | Action::Due => {}
        }
        self.upkeep(now, sink);
        self.take_effects()
    }

    /// When [`Action::Due`] is to be sent, at the latest.
    pub fn next_due(&self) -> Option<Duration> {
        let phase = match self.phase {
            Phase::Running | Phase::Rebuilding => None,
            Phase::Failing { since } => Some(since + FAILING_AT_MOST),
            Phase::Pausing { until } => Some(until),
        };
        // A trial that is due already waits for something else: a report, or a topic.
        let trial = match self.trying {
            None => self.trials.iter().map(|trial| trial.due).filter(|due| *due > self.now).min(),
            Some(_) => None,
        };
        let stalls = (self.ledger.in_sink() > 0).then_some(self.look_again);
        let transaction = self.transaction.as_ref().and_then(Transaction::next_due);
        let always = [phase, self.lease_until, stalls, transaction].into_iter().flatten().min();
        if !self.may_send() {
            // The rest has to wait for the end of the transaction.
            return always;
        }
        let store = self.packing.next_due();
        [always, trial, store, self.topics.next_due()].into_iter().flatten().min()
    }

    fn yielded<S: Sink>(&mut self, table: TableIx, yielded: Yield, now: Duration, sink: &S) {
        match yielded {
            Yield::Closed { generation, keys } => {
                if generation == self.ledger.generation() {
                    self.closed_keys_are(table, keys);
                }
            }
            Yield::Gates { generation, serial, gates } => {
                if generation == self.ledger.generation() {
                    let goes = self.retiring.contains(&table);
                    self.progress[table.0 as usize].opened = Some(generation).filter(|_| !goes);
                    self.gates_are(table, serial, gates);
                }
            }
            Yield::Events { generation, events } => {
                let current = generation == self.ledger.generation()
                    && self.progress[table.0 as usize].opened == Some(generation)
                    && self.phase == Phase::Running;
                if !current {
                    // Read again by the next generation.
                    let bytes = events.iter().map(window_bytes).sum();
                    self.window.release(events.len(), bytes);
                    return;
                }
                let rules = self.tables[table.0 as usize].clone();
                for event in events {
                    self.admit(table, &rules, event, now, sink);
                }
            }
            Yield::Recorded { places } => self.recorded(table, &places),
            Yield::Held { tickets, counts } => self.held(table, tickets, counts),
            Yield::Forgotten { tickets } => self.no_longer_holding(table, tickets),
            Yield::Ended => self.remove(table),
        }
    }

    fn take_effects(&mut self) -> Effects {
        // A hold is committed after what came before it: dropped and read again, that would be held behind it.
        let hold = self.transaction.as_ref().is_none_or(Transaction::is_idle);
        for (index, progress) in self.progress.iter_mut().enumerate() {
            let table = TableIx(index as u16);
            if !progress.settled.is_empty() {
                self.effects.settled.push((table, std::mem::take(&mut progress.settled)));
            }
            if !progress.forgotten.is_empty() {
                self.effects.forgotten.push((table, std::mem::take(&mut progress.forgotten)));
            }
            // Those that rest on older gates are looked at again by the source when it may go on.
            let goes = self.effects.go.iter().any(|(gone, ..)| *gone == table);
            if (hold || goes) && !progress.holds.is_empty() {
                self.effects.holds.push((table, std::mem::take(&mut progress.holds)));
            }
        }
        std::mem::take(&mut self.effects)
    }
}

/// What goes along with an event, in bytes: the client's message and its headers, the entries of ledger, lane and
/// source. With 64 here, a window full of rows of 256 bytes took three times what it counted.
const BESIDE_THE_ROW: usize = 384;

/// What an event counts for in the window: its columns, and the bookkeeping around them.
pub fn window_bytes(event: &Event) -> usize {
    event.row.bytes() + BESIDE_THE_ROW
}
