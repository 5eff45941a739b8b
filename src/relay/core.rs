//! The relay's state and its rules. One owner, no locks, nothing awaited: [`Core::apply`] takes one
//! action and changes state; what has to happen outside is left in [`Effects`]. A test is a list of
//! actions.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Arc,
    time::Duration,
};

use rdkafka::types::RDKafkaErrorCode as Code;
use tracing::{error, info, warn};

use super::{
    lanes::{Gate, Lane, Lanes, Waiting},
    ledger::{Entry, Ledger},
    retry::{Decision, Policy, decide},
    topics::{State, Topics, Warmth, partition_of},
    window::Window,
};
use crate::{
    admin::metrics::{Metrics, PublishedHandles},
    config::Order,
    event::{Event, Place, TableIx},
    record::{Prepared, Rules, is_legal_topic},
    sink::{Kind, MAX_BATCH_BYTES, Report, Sink, Ticket, TopicFacts, Unit, classify},
    source::{Hold, RouteKey, Yield},
};

/// What the relay has to know of a table.
#[derive(Debug)]
pub struct Table {
    pub name: String,
    pub rules: Rules,
    pub order: Order,
    pub retry: Policy,
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
    Rebuilt(Result<(), String>),
    /// This relay may send until then; `None`: it may not.
    Lease(Option<Duration>),
    /// The time of [`Core::next_due`] has come.
    Due,
}

/// What the loop has to do after an action.
#[derive(Debug, Default)]
pub struct Effects {
    pub settled: Vec<(TableIx, Vec<Place>)>,
    pub holds: Vec<(TableIx, Vec<Hold>)>,
    pub look_up: Vec<String>,
    pub halt: Vec<TableIx>,
    /// Rebuild the sink for batches of at most so many bytes, then answer with [`Action::Rebuilt`].
    pub rebuild: Option<usize>,
    /// A new generation: after everything above, tell the sources to start it.
    pub restart: Option<u32>,
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

/// How long a failing producer may take to report on what it has.
const FAILING_AT_MOST: Duration = Duration::from_secs(1);

/// A suspect of a refused batch, tried on its own.
#[derive(Debug)]
struct Trial {
    waiting: Waiting,
    attempts: u32,
    due: Duration,
}

#[derive(Debug, Default)]
struct Progress {
    /// The generation that the source has opened.
    opened: Option<u32>,
    settled: Vec<Place>,
    holds: Vec<Hold>,
    held_events: u64,
    parked: HashSet<RouteKey>,
    halted: bool,
    /// Admitted and not settled.
    open: usize,
    last_publish_ms: Option<i64>,
    last_error: Option<String>,
}

pub struct Core {
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
    /// The rebuild that is under way: for batches of at most so many bytes.
    rebuilding: Option<usize>,
    lease_until: Option<Duration>,
    /// Whether the lease was ours when it was last looked at.
    owned: bool,
    suspects: HashSet<(TableIx, Place)>,
    trials: VecDeque<Trial>,
    /// The suspect that is in flight.
    trying: Option<(Ticket, Event, u32)>,
    /// Events whose hold is being written.
    holding: usize,
    /// What every known topic takes as one batch.
    batch_bytes: usize,
    /// When the last action was applied.
    now: Duration,
    effects: Effects,
}

impl Core {
    pub fn new(tables: Vec<Arc<Table>>, window: Arc<Window>, metrics: Arc<Metrics>) -> Core {
        Core {
            progress: tables.iter().map(|_| Progress::default()).collect(),
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
            lease_until: None,
            owned: false,
            suspects: HashSet::new(),
            trials: VecDeque::new(),
            trying: None,
            holding: 0,
            batch_bytes: MAX_BATCH_BYTES,
            now: Duration::ZERO,
            effects: Effects::default(),
        }
    }

    /// Changes state by one action. `now` is on the monotonic clock that the lease uses too, and
    /// `wall_ms` is the time of day in milliseconds since the Unix epoch, for latency metrics only.
    pub fn apply<S: Sink>(&mut self, action: Action, now: Duration, wall_ms: i64, sink: &S) -> Effects {
        self.now = now;
        match action {
            Action::FromSource(table, yielded) => self.yielded(table, yielded, now, sink),
            Action::Reports(reports) => {
                for report in reports {
                    self.report(report, now, wall_ms, sink);
                }
            }
            Action::LookedUp { topic, result } => self.looked_up(&topic, result, now, sink),
            Action::Rebuilt(Ok(())) => match self.rebuilding.take() {
                // A topic that takes smaller batches turned up meanwhile.
                Some(batch_bytes) if batch_bytes > self.batch_bytes => self.rebuild(),
                _ => self.phase = Phase::Running,
            },
            Action::Rebuilt(Err(error)) => {
                error!(error, "cannot make a kafka producer; will try again");
                self.rebuilding = None;
                self.rebuilds += 1;
                self.phase = Phase::Pausing { until: now + rebuild_pause(self.rebuilds) };
            }
            Action::Lease(until) => {
                // What was taken in without a lease was not sent: it may not wait for later ones to pass.
                if self.lease_until.is_none() && until.is_some() && self.ledger.open() > 0 {
                    self.start_over();
                }
                self.lease_until = until;
                self.owned |= until.is_some();
            }
            Action::Due => {}
        }
        self.upkeep(now, sink);
        self.take_effects()
    }

    /// Whether events may come in now. While a producer is rebuilt they wait in the channel.
    pub fn wants_events(&self) -> bool {
        self.phase == Phase::Running
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
        [phase, trial, self.topics.next_due(), self.lease_until].into_iter().flatten().min()
    }

    /// Events that are not finished: admitted, and neither acknowledged nor held.
    pub fn open(&self) -> usize {
        self.ledger.open()
    }

    /// Events that Kafka has not answered for yet, and holds that are being written.
    pub fn unanswered(&self) -> usize {
        self.ledger.in_sink() + self.holding
    }

    pub fn parked_keys(&self, table: TableIx) -> usize {
        self.progress[table.0 as usize].parked.len()
    }

    pub fn held_events(&self, table: TableIx) -> u64 {
        self.progress[table.0 as usize].held_events
    }

    /// Events of a table that are read and not settled.
    pub fn in_flight(&self, table: TableIx) -> usize {
        self.progress[table.0 as usize].open
    }

    /// When Kafka last acknowledged an event of a table, in milliseconds since the Unix epoch.
    pub fn last_publish_ms(&self, table: TableIx) -> Option<i64> {
        self.progress[table.0 as usize].last_publish_ms
    }

    /// What last went wrong with an event of a table.
    pub fn last_error(&self, table: TableIx) -> Option<&str> {
        self.progress[table.0 as usize].last_error.as_deref()
    }

    pub fn halted(&self, table: TableIx) -> bool {
        self.progress[table.0 as usize].halted
    }

    /// Topics that cannot be written to now.
    pub fn blocked_topics(&self) -> Vec<String> {
        self.topics.blocked().map(|topic| topic.name.clone()).collect()
    }

    fn yielded<S: Sink>(&mut self, table: TableIx, yielded: Yield, now: Duration, sink: &S) {
        match yielded {
            Yield::Opened { generation, parked, held_events } => {
                if generation != self.ledger.generation() {
                    return;
                }
                let rules = self.tables[table.0 as usize].clone();
                let progress = &mut self.progress[table.0 as usize];
                progress.opened = Some(generation);
                progress.held_events = held_events;
                progress.parked.clear();
                for (topic, key) in parked {
                    let lane = self.lanes.lane(table, rules.order, &topic, key.as_deref());
                    // An event without order held only itself.
                    if lane.is_some() {
                        self.lanes.park(lane);
                        progress.parked.insert((topic, key));
                    }
                }
                self.count_parked(table);
                self.halt_if_too_much_is_held(table);
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
            Yield::Held { tickets } => {
                for ticket in tickets {
                    if let Some(entry) = self.ledger.settle(ticket) {
                        self.holding -= 1;
                        self.window.release(1, entry.bytes);
                        let progress = &mut self.progress[table.0 as usize];
                        progress.held_events += 1;
                        progress.open -= 1;
                    }
                }
                self.count_parked(table);
                self.halt_if_too_much_is_held(table);
            }
        }
    }

    /// Takes a fresh event in and sends it, or lets it wait, or holds it.
    fn admit<S: Sink>(&mut self, table: TableIx, rules: &Table, event: Event, now: Duration, sink: &S) {
        let route = rules.rules.route(&event.row);
        let (topic, lane) = match &route {
            // Refused when its record is prepared; no broker need be asked.
            Ok(route) if !is_legal_topic(&route.topic) => {
                (None, self.lanes.lane(table, rules.order, &route.topic, route.key.as_deref()))
            }
            Ok(route) => {
                let (topic, new) = self.topics.index(&route.topic);
                if new {
                    self.effects.look_up.push(route.topic.clone().into_owned());
                }
                let key = route.key.as_deref();
                (Some(topic), self.lanes.lane(table, rules.order, &route.topic, key))
            }
            // Without a topic there is no key to keep in order: such an event holds only itself,
            // except where the table is one lane.
            Err(_) => (None, self.lanes.lane(table, rules.order, "", None)),
        };
        drop(route);
        self.progress[table.0 as usize].open += 1;
        let ticket = self.ledger.admit(Entry {
            table,
            place: event.place.clone(),
            lane,
            topic,
            bytes: window_bytes(&event),
            timestamp_ms: event.timestamp_ms,
            warms: None,
            sent_at: None,
        });
        self.pass(ticket, rules, event, now, sink);
    }

    /// Sends an admitted event, or stops it where it has to wait.
    fn pass<S: Sink>(&mut self, ticket: Ticket, rules: &Table, event: Event, now: Duration, sink: &S) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (table, lane, topic) = (entry.table, entry.lane, entry.topic);
        if self.phase != Phase::Running || self.lease_until.is_none_or(|until| now >= until) {
            // This generation is over, or about to be: the row is read again.
            return;
        }
        match self.lanes.gate(lane) {
            Gate::Open => {}
            Gate::Trying => return self.lanes.wait(lane, Waiting { ticket, event }),
            Gate::Parked => return self.hold(ticket, rules, &event, "behind", BEHIND.into(), 0),
        }
        if let Some(topic) = topic.map(|topic| self.topics.get_mut(topic))
            && !matches!(topic.state, State::Ready)
        {
            return topic.waiting.push_back(Waiting { ticket, event });
        }
        let limit = topic.and_then(|topic| self.topics.get(topic).max_message_bytes);
        // The partition that has to be warm first; only an event with an order minds.
        let mut cold = None;
        if let (Some(topic), true) = (topic, lane.is_some()) {
            let topic = self.topics.get_mut(topic);
            match topic.warmth(|count| partition(rules, &event, count)) {
                Warmth::Warm => {}
                Warmth::Cold(partition) => cold = Some(partition),
                Warmth::Warming(partition) => {
                    return topic.wait_for_warmth(partition, Waiting { ticket, event });
                }
            }
        }
        let prepared = match prepare(rules, &event, limit) {
            Ok(prepared) => prepared,
            Err(reason) if lane.is_none() => return self.reject(ticket, rules, &event, reason, 0),
            Err(_) => return self.try_alone(ticket, lane, event, now),
        };
        if !self.suspects.is_empty() && self.suspects.contains(&(table, event.place.clone())) {
            return self.try_alone(ticket, lane, event, now);
        }
        self.metrics.count_dropped(&rules.name, &prepared.dropped);
        match sink.send(Unit::Main, ticket, &prepared.record) {
            Ok(()) => {
                self.ledger.sent(ticket, now, cold);
                if let (Some(topic), Some(partition)) = (topic, cold) {
                    self.topics.get_mut(topic).warms(partition);
                }
            }
            Err(code) => {
                drop(prepared);
                self.failed_in_pipeline(ticket, code, now);
            }
        }
    }

    /// Stops the lane behind an event that is refused, or may be: it is looked at again once nothing
    /// of the lane is on its way, so that no earlier event is held with it.
    fn try_alone(&mut self, ticket: Ticket, lane: Option<Lane>, event: Event, now: Duration) {
        self.lanes.stop(lane, lane.map_or(0, |lane| self.ledger.in_sink_of(lane)));
        self.trials.push_back(Trial { waiting: Waiting { ticket, event }, attempts: 0, due: now });
    }

    fn report<S: Sink>(&mut self, report: Report, now: Duration, wall_ms: i64, sink: &S) {
        let tried = self.trying.take_if(|(ticket, ..)| *ticket == report.ticket);
        match (report.result, tried) {
            (Ok(()), tried) => {
                let Some(entry) = self.ledger.settle(report.ticket) else { return };
                self.rebuilds = 0;
                self.acknowledged(&entry, now, wall_ms);
                if tried.is_none() {
                    self.lanes.delivered(entry.lane);
                }
                if let (Some(topic), Some(partition)) = (entry.topic, entry.warms) {
                    let waited = self.topics.get_mut(topic).warmed(partition);
                    self.pass_all(waited, now, sink);
                }
                if tried.is_some() {
                    self.suspects.remove(&(entry.table, entry.place));
                    let waited = self.lanes.open(entry.lane);
                    self.pass_all(waited, now, sink);
                }
            }
            (Err(code), None) => self.failed_in_pipeline(report.ticket, code, now),
            (Err(code), Some((ticket, event, attempts))) => {
                self.ledger.returned(ticket);
                self.failed_on_trial(ticket, event, attempts + 1, code, now);
            }
        }
    }

    fn acknowledged(&mut self, entry: &Entry, now: Duration, wall_ms: i64) {
        self.window.release(1, entry.bytes);
        let table = entry.table.0 as usize;
        let progress = &mut self.progress[table];
        progress.settled.push(entry.place.clone());
        progress.open -= 1;
        progress.last_publish_ms = Some(wall_ms);
        if let Some(topic) = entry.topic {
            let (name, topics, metrics) = (&self.tables[table].name, &self.topics, &self.metrics);
            let handles = self
                .published
                .entry((entry.table, topic))
                .or_insert_with(|| metrics.published(name, &topics.get(topic).name));
            let publish = entry.sent_at.map(|sent| now.saturating_sub(sent));
            let end_to_end = entry.timestamp_ms.map(|created| wall_ms.saturating_sub(created));
            handles.acknowledged(publish, end_to_end, wall_ms);
        }
    }

    /// A record that the pipelined producer did not deliver. Its later records of the same key may
    /// be on their way, so the producer is finished: what it has is read again, in order.
    fn failed_in_pipeline(&mut self, ticket: Ticket, code: Code, now: Duration) {
        let Some(entry) = self.ledger.returned(ticket) else { return };
        let (table, place, topic) = (entry.table, entry.place.clone(), entry.topic);
        let rules = self.tables[table.0 as usize].clone();
        let kind = classify::classify(code);
        self.metrics.publish_failures(&rules.name, kind.label()).inc();
        if classify::is_about_topic(code) {
            self.block_topic(topic, code, now);
        } else if classify::is_about_size(code) && self.ask_for_limit(topic) {
            // The new limit tells which records are too large, and how large a batch may be.
        } else if kind == Kind::Rejected {
            self.suspects.insert((table, place.clone()));
        }
        if self.phase == Phase::Running {
            warn!(
                table = rules.name.as_str(), place = %place, error = %code, kind = kind.label(),
                "kafka did not take a record; the producer is rebuilt and what it had is read again"
            );
            self.phase = Phase::Failing { since: now };
        }
    }

    fn failed_on_trial(&mut self, ticket: Ticket, event: Event, attempts: u32, code: Code, now: Duration) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (table, topic) = (entry.table, entry.topic);
        let rules = self.tables[table.0 as usize].clone();
        let kind = classify::classify(code);
        if kind != Kind::Rejected {
            self.metrics.publish_failures(&rules.name, kind.label()).inc();
        }
        match decide(kind) {
            Decision::Retry => {
                self.metrics.retries(&rules.name, kind.label()).inc();
                if classify::is_about_topic(code) {
                    self.block_topic(topic, code, now);
                }
                let due = now + rules.retry.pause(attempts, fastrand::f64());
                self.trials.push_back(Trial { waiting: Waiting { ticket, event }, attempts, due });
            }
            Decision::Park => {
                let reason = format!("kafka refused it: {code} ({code:?})");
                self.reject(ticket, &rules, &event, reason, attempts);
            }
            // The careful producer died too (a lost session, not this record): start over.
            Decision::Rebuild => self.phase = Phase::Failing { since: now },
        }
    }

    /// Parks an event's key: the event and all that waits behind it are held.
    fn reject(&mut self, ticket: Ticket, rules: &Table, event: &Event, reason: String, attempts: u32) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (table, lane) = (entry.table, entry.lane);
        self.metrics.publish_failures(&rules.name, Kind::Rejected.label()).inc();
        error!(
            table = rules.name.as_str(), place = %event.place, id = event_id(rules, event), reason,
            "event can never be published as it is: its key is parked and the rest flows on"
        );
        self.suspects.remove(&(table, event.place.clone()));
        self.progress[table.0 as usize].last_error =
            Some(format!("{} {} parked: {reason}", rules.name, event.place));
        if lane.is_some() {
            self.progress[table.0 as usize].parked.insert(route_key(rules, event));
        }
        self.hold(ticket, rules, event, "rejected", reason, attempts);
        for Waiting { ticket, event } in self.lanes.park(lane) {
            self.hold(ticket, rules, &event, "behind", BEHIND.into(), 0);
        }
        self.count_parked(table);
    }

    fn hold(
        &mut self,
        ticket: Ticket,
        rules: &Table,
        event: &Event,
        cause: &'static str,
        reason: String,
        attempts: u32,
    ) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let table = entry.table;
        let (topic, key) = route_key(rules, event);
        self.holding += 1;
        self.progress[table.0 as usize].holds.push(Hold {
            ticket,
            place: event.place.clone(),
            event_id: event_id(rules, event).to_owned(),
            topic,
            key,
            cause,
            reason,
            attempts,
        });
    }

    /// The topic's limit is not what we thought: asks for it again. `false` where that was done and
    /// explained nothing.
    fn ask_for_limit(&mut self, topic: Option<u32>) -> bool {
        let Some(topic) = topic else { return false };
        let topic = self.topics.get_mut(topic);
        match topic.state {
            State::Ready if topic.asked_for_limit => false,
            State::Ready => {
                topic.asked_for_limit = true;
                topic.state = State::Asking;
                self.effects.look_up.push(topic.name.clone());
                true
            }
            State::Asking | State::Blocked { .. } => true,
        }
    }

    fn block_topic(&mut self, topic: Option<u32>, code: Code, now: Duration) {
        let Some(topic) = topic else { return };
        let topic = self.topics.get_mut(topic);
        if matches!(topic.state, State::Blocked { .. }) {
            return;
        }
        topic.attempts += 1;
        let pause = Policy::default().pause(topic.attempts, fastrand::f64());
        warn!(
            topic = topic.name, error = %code, attempt = topic.attempts,
            "kafka topic cannot be written to; its events wait, other topics flow. \
             Create the topic, or allow this relay to write to it"
        );
        topic.state = State::Blocked { due: now + pause };
    }

    fn looked_up<S: Sink>(&mut self, name: &str, result: Result<TopicFacts, Code>, now: Duration, sink: &S) {
        let Some(index) = self.topics.find(name) else { return };
        match result {
            Ok(facts) => {
                let topic = self.topics.get_mut(index);
                if topic.attempts > 0 {
                    info!(topic = name, "kafka topic can be written to");
                }
                topic.attempts = 0;
                topic.is_ready(facts);
                if let Some(limit) = facts.max_message_bytes
                    && limit < self.batch_bytes
                {
                    // A batch larger than the topic takes would be refused whole, however small its
                    // records are.
                    info!(
                        topic = name,
                        limit, "kafka topic takes small batches only; the producer is rebuilt for them"
                    );
                    self.batch_bytes = limit;
                    if self.rebuilding.is_none() {
                        self.phase = Phase::Failing { since: now };
                    }
                    return;
                }
                let waited = std::mem::take(&mut topic.waiting);
                self.pass_all(waited, now, sink);
            }
            Err(code) => {
                self.topics.get_mut(index).state = State::Asking;
                self.block_topic(Some(index), code, now);
            }
        }
    }

    fn pass_all<S: Sink>(&mut self, waited: impl IntoIterator<Item = Waiting>, now: Duration, sink: &S) {
        for Waiting { ticket, event } in waited {
            let Some(entry) = self.ledger.get(ticket) else { continue };
            let rules = self.tables[entry.table.0 as usize].clone();
            self.pass(ticket, &rules, event, now, sink);
        }
    }

    /// What follows from the state, whatever the action was.
    fn upkeep<S: Sink>(&mut self, now: Duration, sink: &S) {
        if self.lease_until.is_some_and(|until| now >= until) {
            self.lease_until = None;
        }
        if self.lease_until.is_none() && std::mem::take(&mut self.owned) {
            warn!("the lease is lost: what is in flight is thrown away, the next owner reads it");
            self.start_over();
        }
        match self.phase {
            Phase::Failing { since } if self.ledger.in_sink() == 0 || now >= since + FAILING_AT_MOST => {
                self.rebuilds += 1;
                // The first rebuild comes at once; only one that did not help is followed by a pause.
                match self.rebuilds {
                    1 => self.start_over(),
                    n => self.phase = Phase::Pausing { until: now + rebuild_pause(n - 1) },
                }
            }
            Phase::Pausing { until } if now >= until => self.start_over(),
            _ => {}
        }
        if self.phase == Phase::Running {
            self.effects.look_up.extend(self.topics.due(now));
            self.start_trials(now, sink);
        }
    }

    /// Asks for new producers. Those of a rebuild that is under way have not been used and will do.
    fn rebuild(&mut self) {
        self.phase = Phase::Rebuilding;
        if self.rebuilding.is_none() {
            self.rebuilding = Some(self.batch_bytes);
            self.effects.rebuild = self.rebuilding;
        }
    }

    /// Ends the generation: producers and everything in flight are thrown away, and the sources
    /// read again what is not recorded.
    fn start_over(&mut self) {
        let forgotten = self.ledger.next_generation();
        let bytes = forgotten.iter().map(|entry| entry.bytes).sum();
        self.window.release(forgotten.len(), bytes);
        self.lanes.clear();
        for progress in &mut self.progress {
            progress.open = 0;
        }
        self.topics.start_over();
        self.trials.clear();
        self.trying = None;
        self.holding = 0;
        self.rebuild();
        self.effects.restart = Some(self.ledger.generation());
    }

    /// Looks at the suspects: what can be refused without the broker is, and one is sent at a time.
    fn start_trials<S: Sink>(&mut self, now: Duration, sink: &S) {
        while self.phase == Phase::Running
            && self.lease_until.is_some()
            && self.trying.is_none()
            && let Some(trial) = self.next_trial(now)
        {
            self.start_trial(trial, now, sink);
        }
    }

    fn next_trial(&mut self, now: Duration) -> Option<Trial> {
        let ready = self.trials.iter().position(|trial| trial.due <= now && self.is_ready_for(trial))?;
        self.trials.remove(ready)
    }

    fn start_trial<S: Sink>(&mut self, trial: Trial, now: Duration, sink: &S) {
        let Trial { waiting: Waiting { ticket, event }, attempts, .. } = trial;
        let Some(entry) = self.ledger.get(ticket) else { return };
        let rules = self.tables[entry.table.0 as usize].clone();
        let limit = entry.topic.and_then(|topic| self.topics.get(topic).max_message_bytes);
        let sent = match prepare(&rules, &event, limit) {
            Ok(prepared) => sink.send(Unit::Suspects, ticket, &prepared.record),
            Err(reason) => return self.reject(ticket, &rules, &event, reason, attempts),
        };
        match sent {
            Ok(()) => {
                self.ledger.sent(ticket, now, None);
                self.trying = Some((ticket, event, attempts));
            }
            Err(code) => self.failed_on_trial(ticket, event, attempts + 1, code, now),
        }
    }

    /// Whether a suspect may be looked at: its topic is known, and nothing of its lane on its way.
    fn is_ready_for(&self, trial: &Trial) -> bool {
        let Some(entry) = self.ledger.get(trial.waiting.ticket) else { return true };
        let ready = |topic| matches!(self.topics.get(topic).state, State::Ready);
        entry.topic.is_none_or(ready) && self.lanes.is_clear(entry.lane)
    }

    fn count_parked(&self, table: TableIx) {
        let progress = &self.progress[table.0 as usize];
        self.metrics.parked(&self.tables[table.0 as usize].name, progress.parked.len(), progress.held_events);
    }

    fn halt_if_too_much_is_held(&mut self, table: TableIx) {
        let (rules, progress) = (&self.tables[table.0 as usize], &mut self.progress[table.0 as usize]);
        if progress.held_events > rules.max_held && !progress.halted {
            error!(
                table = rules.name.as_str(),
                held = progress.held_events,
                max = rules.max_held,
                "more events are held than hold.max_events allows: the table halts. Mend and \
                 release the parked keys, or raise the limit"
            );
            progress.halted = true;
            self.effects.halt.push(table);
        }
    }

    fn take_effects(&mut self) -> Effects {
        for (index, progress) in self.progress.iter_mut().enumerate() {
            let table = TableIx(index as u16);
            if !progress.settled.is_empty() {
                self.effects.settled.push((table, std::mem::take(&mut progress.settled)));
            }
            if !progress.holds.is_empty() {
                self.effects.holds.push((table, std::mem::take(&mut progress.holds)));
            }
        }
        std::mem::take(&mut self.effects)
    }
}

const BEHIND: &str = "an earlier event of its key is parked";

/// Before the next rebuild, where the last ones did not help.
fn rebuild_pause(attempt: u32) -> Duration {
    Policy::default().pause(attempt, fastrand::f64())
}

/// What an event counts for in the window: its columns, and the bookkeeping around them.
pub fn window_bytes(event: &Event) -> usize {
    event.row.bytes() + 64
}

/// Topic and key, as the relay's own table has them: an empty topic where there is none.
fn route_key(rules: &Table, event: &Event) -> RouteKey {
    match rules.rules.route(&event.row) {
        Ok(route) => (route.topic.into_owned(), route.key.map(|key| key.into_owned())),
        Err(_) => (String::new(), None),
    }
}

/// Where an event goes, as far as it can be told before its record is made.
fn partition(rules: &Table, event: &Event, count: usize) -> Option<usize> {
    match rules.rules.explicit_partition(&event.row) {
        Some(partition) => usize::try_from(partition).ok(),
        // Under `order: table` an event without a key has an order too.
        None if count == 1 => Some(0),
        None => partition_of(rules.rules.route(&event.row).ok()?.key.as_deref()?, count),
    }
}

fn event_id<'a>(rules: &Table, event: &'a Event) -> &'a str {
    rules.rules.id(&event.row).unwrap_or("")
}

/// The record of an event, or why there can be none.
fn prepare<'a>(rules: &'a Table, event: &'a Event, limit: Option<usize>) -> Result<Prepared<'a>, String> {
    if let Some(bytes) = event.unread_bytes {
        return Err(format!(
            "the payload has {bytes} bytes, more than payload.max_bytes allows: it was not read"
        ));
    }
    let prepared = rules.rules.prepare(event).map_err(|rejection| rejection.to_string())?;
    let size = prepared.record.wire_size();
    match limit {
        Some(limit) if size > limit => Err(format!(
            "the record would have {size} bytes and topic {} takes {limit} (max.message.bytes): \
             raise the topic's limit or make the payload smaller",
            prepared.record.topic
        )),
        _ => Ok(prepared),
    }
}
