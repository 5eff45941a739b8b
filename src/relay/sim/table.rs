//! A table and its source, as naive as can be: a list of rows, reading from the first one that is
//! neither recorded, held nor handed over, and an operator who changes what is held.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use super::broker::Broker;
use crate::{
    config::Order,
    event::{self, Event, Place},
    relay::{core::window_bytes, window::Window},
    source::{
        Cause, Command, Gates, Hold, Yield,
        hold::{Counts, Over, Scope, State as Who},
    },
};

/// Bytes of a payload that does not fit into a record.
pub const LARGE: usize = 600;
/// A payload that does not fit, and that the object store refuses.
pub const REFUSED: [u8; LARGE] = [b'r'; LARGE];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poison {
    None,
    /// Refused before it is sent.
    Headers,
    /// Refused by the broker.
    Broker,
    /// The object store refuses its payload.
    Store,
    /// Its topic could not be written to, or the object store not be reached, for too long.
    GaveUp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Waiting,
    Recorded,
    Held,
    Skipped,
}

#[derive(Debug)]
pub struct Row {
    pub topic: String,
    pub key: Option<String>,
    pub poison: Poison,
    /// Whether its payload is more than a record may have.
    pub large: bool,
    pub state: State,
}

/// Whether a table is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    Runs,
    /// It is to stop: once its source has heard so, it is read no more.
    Stops,
    /// Its source has ended: nothing reaches it.
    Ended,
}

/// What an operator wants, or the relay.
#[derive(Clone, Debug)]
pub enum Wish {
    /// The lane of this row, and whether what is wrong with it was mended.
    Redrive(usize, bool),
    Skip(usize),
    Pause(Scope),
    Resume(Scope),
    Release(Over),
}

#[derive(Debug)]
pub struct Table {
    number: usize,
    pub order: Order,
    pub rows: Vec<Row>,
    generation: u32,
    /// Exactly once: nothing is read before a takeover; what is settled is recorded later, or forgotten.
    exactly_once: bool,
    taken: bool,
    owed: Vec<Place>,
    opened: bool,
    gates_due: bool,
    barred: bool,
    look_again: bool,
    serial: u32,
    known: BTreeSet<usize>,
    held: BTreeMap<usize, Hold>,
    pending: Vec<Hold>,
    pub paused: Vec<Scope>,
    pub wishes: VecDeque<Wish>,
    pub commands: VecDeque<Command>,
    pub yields: VecDeque<Yield>,
    pub stage: Stage,
    /// Whether its source has heard that it is to stop.
    stopping: bool,
}

fn index(place: &Place) -> usize {
    match place {
        Place::Int(n) => *n as usize,
        Place::Text(_) => unreachable!("places are numbers here"),
    }
}

impl Table {
    pub fn new(number: usize, order: Order, exactly_once: bool) -> Table {
        Table {
            exactly_once,
            taken: false,
            owed: Vec::new(),
            number,
            order,
            rows: Vec::new(),
            generation: 0,
            opened: false,
            gates_due: false,
            barred: false,
            look_again: false,
            serial: 0,
            known: BTreeSet::new(),
            held: BTreeMap::new(),
            pending: Vec::new(),
            paused: Vec::new(),
            wishes: VecDeque::new(),
            commands: VecDeque::new(),
            yields: VecDeque::new(),
            stage: Stage::Runs,
            stopping: false,
        }
    }

    pub fn hear(&mut self, command: Command) {
        if self.stage != Stage::Ended {
            self.commands.push_back(command);
        }
    }

    /// The relay has closed the channel.
    pub fn finish(&mut self, broker: &Broker) {
        while let Some(command) = self.commands.pop_front() {
            self.take(command, broker);
        }
        assert!(self.pending.is_empty(), "holds that the relay did not wait for: {:?}", self.pending);
        self.stage = Stage::Ended;
        self.yields.push_back(Yield::Ended);
    }

    /// Starts anew. What is held, paused and wished is in the database.
    pub fn start(&mut self, generation: u32) {
        (self.stage, self.stopping) = (Stage::Runs, false);
        (self.generation, self.opened) = (generation, false);
        (self.gates_due, self.barred, self.look_again, self.serial) = (false, false, false, 0);
        self.known.clear();
    }

    /// The id of a row: `table-number`.
    pub fn id(&self, number: usize) -> String {
        format!("{}-{number}", self.number)
    }

    pub fn event(&self, number: usize) -> Event {
        let row = &self.rows[number];
        let mut cells = event::Row::default();
        // In the order in which the rules ask: id, payload, topic, key, headers.
        cells.push(Some(self.id(number).as_bytes()));
        let large = [b'x'; LARGE];
        cells.push(Some(match row.poison {
            Poison::Broker => b"poison",
            Poison::Store => &REFUSED,
            _ if row.large => &large,
            _ => b"fine",
        }));
        cells.push(Some(row.topic.as_bytes()));
        cells.push(row.key.as_ref().map(String::as_bytes));
        cells.push((row.poison == Poison::Headers).then_some(&b"[1]"[..]));
        Event {
            place: Place::Int(number as i64),
            row: cells,
            timestamp_ms: None,
            unread_bytes: None,
            replay: None,
        }
    }

    /// Takes one command, or changes what is held, or reads up to `limit` rows.
    pub fn turn(&mut self, window: &Window, limit: usize, broker: &Broker) {
        if self.stage == Stage::Ended {
            return;
        }
        if let Some(command) = self.commands.pop_front() {
            return self.take(command, broker);
        }
        if self.exactly_once && !self.taken {
            return;
        }
        if !self.owed.is_empty() {
            return self.record(broker);
        }
        if !self.opened {
            self.opened = true;
            self.known.clear();
            self.gates_due = true;
        }
        if self.gates_due {
            return self.tell_gates();
        }
        if self.barred {
            return;
        }
        if std::mem::take(&mut self.look_again) {
            self.forget_holds();
        }
        if !self.pending.is_empty() {
            return self.hold();
        }
        match self.wishes.pop_front() {
            Some(wish) => {
                self.fulfil(wish);
                self.tell_gates();
            }
            None if self.paused.contains(&Scope::Table) || self.stopping => {}
            None => self.read(window, limit),
        }
    }

    fn take(&mut self, command: Command, broker: &Broker) {
        match command {
            Command::Settled(places) => {
                self.owed.extend(places);
                if !self.exactly_once {
                    self.record(broker);
                }
            }
            Command::Hold(holds) => self.pending.extend(holds),
            Command::Restart { generation, taken } => {
                if let Some(taken) = taken {
                    self.taken = true;
                    // What was recorded already is in doubt until that is heard.
                    self.owed = taken.doubts;
                    self.owed.retain(|place| self.rows[index(place)].state != State::Recorded);
                    self.yields.push_back(Yield::Recorded {
                        places: (0..self.rows.len())
                            .filter(|number| self.rows[*number].state == State::Recorded)
                            .map(|number| Place::Int(number as i64))
                            .collect(),
                    });
                }
                self.generation = generation;
                self.opened = false;
                self.pending.clear();
            }
            Command::Go { serial, .. } if serial == self.serial => {
                self.barred = false;
                self.look_again = true;
            }
            Command::Release(over) => self.wishes.push_back(Wish::Release(over)),
            Command::Stop => self.stopping = true,
            Command::Go { .. } | Command::Halt => {}
            Command::Forget(_) | Command::Verb(_) => unreachable!("there are none here"),
        }
    }

    fn record(&mut self, broker: &Broker) {
        let places = std::mem::take(&mut self.owed);
        for number in places.iter().map(index) {
            let id = self.id(number);
            assert!(broker.has(&id) || broker.dead.contains(&id), "recorded and never published: {id}");
            let state = &mut self.rows[number].state;
            assert_eq!(*state, State::Waiting, "{id} was held or recorded");
            *state = State::Recorded;
            self.known.remove(&number);
        }
        if self.exactly_once {
            self.yields.push_back(Yield::Recorded { places });
        }
    }

    fn tell_gates(&mut self) {
        self.gates_due = false;
        self.barred = true;
        self.serial += 1;
        let generation = self.generation;
        let mut gates = Gates { paused: self.paused.clone(), ..Gates::default() };
        let mut topics = BTreeSet::new();
        let mut keys = BTreeSet::new();
        for hold in self.held.values() {
            gates.held.add(Counts::of(hold.cause, 1));
            if hold.cause == Cause::Topic {
                topics.insert(hold.topic.clone());
            }
            if hold.cause.state() == Who::Parked || hold.cause == Cause::Store {
                keys.insert((hold.topic.clone(), hold.key.clone(), hold.cause == Cause::Store));
            }
        }
        gates.topics = topics.into_iter().collect();
        self.yields.push_back(Yield::Closed { generation, keys: keys.into_iter().collect() });
        self.yields.push_back(Yield::Gates { generation, serial: self.serial, gates });
    }

    fn hold(&mut self) {
        let (mut tickets, mut counts) = (Vec::new(), Counts::default());
        for hold in std::mem::take(&mut self.pending) {
            let number = index(&hold.place);
            let row = &mut self.rows[number];
            assert_eq!(row.state, State::Waiting, "held twice, or recorded: {hold:?}");
            row.state = State::Held;
            if hold.cause == Cause::GaveUp {
                row.poison = Poison::GaveUp;
            }
            self.known.remove(&number);
            counts.add(Counts::of(hold.cause, 1));
            tickets.push(hold.ticket);
            self.held.insert(number, hold);
        }
        self.yields.push_back(Yield::Held { tickets, counts });
    }

    fn forget_holds(&mut self) {
        let (kept, forgotten): (Vec<Hold>, Vec<Hold>) =
            std::mem::take(&mut self.pending).into_iter().partition(|hold| hold.cause.is_its_own());
        self.pending = kept;
        if !forgotten.is_empty() {
            forgotten.iter().for_each(|hold| {
                self.known.remove(&index(&hold.place));
            });
            let tickets = forgotten.iter().map(|hold| hold.ticket).collect();
            self.yields.push_back(Yield::Forgotten { tickets });
        }
    }

    fn fulfil(&mut self, wish: Wish) {
        match wish {
            Wish::Redrive(number, mended) => {
                if self.held.get(&number).is_none_or(|hold| hold.cause.state() != Who::Parked) {
                    return;
                }
                let lane: Vec<usize> = (0..self.rows.len())
                    .filter(|other| {
                        *other == number || self.in_one_lane(&self.rows[*other], &self.rows[number])
                    })
                    .collect();
                for other in lane {
                    if self.held.get(&other).is_some_and(|hold| hold.cause.state() == Who::Parked) {
                        let poison = &mut self.rows[other].poison;
                        if mended || *poison == Poison::GaveUp {
                            *poison = Poison::None;
                        }
                        self.release(other);
                    }
                }
            }
            Wish::Skip(number) => {
                if self.held.remove(&number).is_some() {
                    self.rows[number].state = State::Skipped;
                    self.release_orphans();
                }
            }
            Wish::Pause(scope) => self.paused.push(scope),
            Wish::Resume(scope) => {
                self.paused.retain(|paused| *paused != scope);
                let covered = |hold: &Hold| {
                    hold.cause == Cause::Paused && scope.covers(&hold.topic, hold.key.as_deref())
                };
                self.release_all(covered);
            }
            Wish::Release(Over::Store) => self.release_all(|hold| hold.cause == Cause::Store),
            Wish::Release(Over::Topic(topic)) => {
                let one_lane = self.order == Order::Table;
                self.release_all(|hold| hold.cause == Cause::Topic && (one_lane || hold.topic == topic));
            }
        }
    }

    fn release(&mut self, number: usize) {
        self.held.remove(&number);
        self.rows[number].state = State::Waiting;
    }

    fn release_all(&mut self, which: impl Fn(&Hold) -> bool) {
        let numbers: Vec<usize> =
            self.held.iter().filter(|(_, hold)| which(hold)).map(|(number, _)| *number).collect();
        numbers.into_iter().for_each(|number| self.release(number));
    }

    /// What is held behind nothing.
    fn release_orphans(&mut self) {
        let is_behind = |hold: &Hold| hold.cause == Cause::Behind;
        let orphans: Vec<usize> = self
            .held
            .iter()
            .filter(|(number, hold)| {
                let anchored = self.held.iter().any(|(other, anchor)| {
                    anchor.cause.is_its_own() && self.in_one_lane(&self.rows[*other], &self.rows[**number])
                });
                is_behind(hold) && !anchored
            })
            .map(|(number, _)| *number)
            .collect();
        orphans.into_iter().for_each(|number| self.release(number));
    }

    fn read(&mut self, window: &Window, limit: usize) {
        let mut events = Vec::new();
        for number in 0..self.rows.len() {
            if events.len() == limit {
                break;
            }
            if self.rows[number].state != State::Waiting || self.known.contains(&number) {
                continue;
            }
            let event = self.event(number);
            if !window.claim(1, window_bytes(&event)) {
                break;
            }
            self.known.insert(number);
            events.push(event);
        }
        if !events.is_empty() {
            self.yields.push_back(Yield::Events { generation: self.generation, events });
        }
    }

    /// Whether two rows have an order.
    fn in_one_lane(&self, a: &Row, b: &Row) -> bool {
        match self.order {
            Order::None => false,
            Order::Table => true,
            Order::Key => a.key.is_some() && a.key == b.key && a.topic == b.topic,
        }
    }

    /// The earlier rows of a row's lane that are to be seen before it.
    pub fn before(&self, number: usize) -> impl Iterator<Item = usize> {
        (0..number).filter(move |earlier| {
            let row = &self.rows[*earlier];
            row.state != State::Skipped && self.in_one_lane(row, &self.rows[number])
        })
    }

    pub fn waiting(&self) -> usize {
        self.rows.iter().filter(|row| row.state == State::Waiting).count()
    }

    pub fn held(&self) -> usize {
        self.held.len()
    }

    /// Whether anything is left to be done.
    pub fn is_quiet(&self) -> bool {
        let parked = |hold: &Hold| hold.cause.state() == Who::Parked;
        self.stage == Stage::Runs
            && self.commands.is_empty()
            && self.yields.is_empty()
            && self.wishes.is_empty()
            && self.pending.is_empty()
            && self.owed.is_empty()
            && self.waiting() == 0
            && self.held.values().all(parked)
    }

    /// Held are the poisoned rows and those behind them; everything else is published, or skipped, or
    /// has a dead letter.
    pub fn check_end(&self, broker: &Broker, dead_letters: bool) {
        for (number, row) in self.rows.iter().enumerate() {
            let id = self.id(number);
            if row.state == State::Skipped {
                continue;
            }
            if dead_letters {
                // Parked only where the topic for dead letters could not be written to.
                if let Some(hold) = self.held.get(&number) {
                    let unburied = hold.cause.is_its_own() && hold.reason.contains("no dead letter");
                    assert!(unburied || hold.cause == Cause::Behind, "{id}: {hold:?}");
                    continue;
                }
                assert_eq!(row.state, State::Recorded, "{id}: {row:?}");
                let bad = row.poison != Poison::None;
                assert!(broker.dead.contains(&id) || (!bad && broker.has(&id)), "{id}: {row:?}");
                continue;
            }
            let stopped = row.poison != Poison::None
                || self.before(number).any(|earlier| self.rows[earlier].poison != Poison::None);
            let expected = if stopped { State::Held } else { State::Recorded };
            assert_eq!(row.state, expected, "{id}: {row:?} {:?}", self.held.get(&number));
            // An event that was given up may have been published, and the answer lost.
            let gave_up = self.rows.iter().any(|row| row.poison == Poison::GaveUp);
            assert!(broker.has(&id) != stopped || (gave_up && stopped), "{id}: {row:?}");
        }
    }
}
