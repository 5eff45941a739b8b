//! A table and its source, as naive as can be: a list of rows, and reading from the first one that is
//! neither recorded, held nor handed over.

use std::collections::{BTreeSet, VecDeque};

use super::broker::Broker;
use crate::{
    config::Order,
    event::{self, Event, Place},
    relay::{core::window_bytes, window::Window},
    source::{Command, RouteKey, Yield},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Poison {
    None,
    /// Refused before it is sent.
    Headers,
    /// Refused by the broker.
    Broker,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum State {
    Waiting,
    Recorded,
    Held,
}

#[derive(Debug)]
pub struct Row {
    pub topic: String,
    pub key: Option<String>,
    pub poison: Poison,
    pub state: State,
}

#[derive(Debug)]
pub struct Table {
    number: usize,
    pub order: Order,
    pub rows: Vec<Row>,
    generation: u32,
    opened: bool,
    known: BTreeSet<usize>,
    parked: Vec<RouteKey>,
    pub commands: VecDeque<Command>,
    pub yields: VecDeque<Yield>,
}

fn index(place: &Place) -> usize {
    match place {
        Place::Int(n) => *n as usize,
        Place::Text(_) => unreachable!("places are numbers here"),
    }
}

impl Table {
    pub fn new(number: usize, order: Order) -> Table {
        Table {
            number,
            order,
            rows: Vec::new(),
            generation: 0,
            opened: false,
            known: BTreeSet::new(),
            parked: Vec::new(),
            commands: VecDeque::new(),
            yields: VecDeque::new(),
        }
    }

    /// A row's identity in Kafka.
    pub fn id(&self, row: usize) -> String {
        format!("{}-{row}", self.number)
    }

    pub fn event(&self, number: usize) -> Event {
        let row = &self.rows[number];
        let mut cells = event::Row::default();
        // In the order in which the rules ask: id, payload, topic, key, headers.
        cells.push(Some(self.id(number).as_bytes()));
        cells.push(Some(match row.poison {
            Poison::Broker => b"poison",
            _ => b"fine",
        }));
        cells.push(Some(row.topic.as_bytes()));
        cells.push(row.key.as_ref().map(String::as_bytes));
        cells.push((row.poison == Poison::Headers).then_some(&b"[1]"[..]));
        Event { place: Place::Int(number as i64), row: cells, timestamp_ms: None, unread_bytes: None }
    }

    /// Takes one command, or reads up to `limit` rows.
    pub fn turn(&mut self, window: &Window, limit: usize, broker: &Broker) {
        match self.commands.pop_front() {
            Some(Command::Settled(places)) => {
                for place in places {
                    let number = index(&place);
                    assert!(
                        broker.has(&self.id(number)),
                        "recorded and never published: {}",
                        self.id(number)
                    );
                    assert_eq!(
                        self.rows[number].state,
                        State::Waiting,
                        "{} was held or recorded",
                        self.id(number)
                    );
                    self.rows[number].state = State::Recorded;
                    self.known.remove(&number);
                }
            }
            Some(Command::Hold(holds)) => {
                let mut tickets = Vec::new();
                for hold in holds {
                    let row = &mut self.rows[index(&hold.place)];
                    assert_ne!(row.state, State::Recorded, "held and recorded");
                    // A hold that was written before a restart is there already.
                    row.state = State::Held;
                    self.known.remove(&index(&hold.place));
                    self.parked.push((hold.topic, hold.key));
                    tickets.push(hold.ticket);
                }
                self.yields.push_back(Yield::Held { tickets });
            }
            Some(Command::Restart { generation }) => {
                self.generation = generation;
                self.opened = false;
                self.known.clear();
            }
            Some(Command::Halt | Command::Stop) => {}
            None if !self.opened => {
                self.opened = true;
                let held = self.rows.iter().filter(|row| row.state == State::Held).count();
                self.yields.push_back(Yield::Opened {
                    generation: self.generation,
                    parked: self.parked.clone(),
                    held_events: held as u64,
                });
            }
            None => self.read(window, limit),
        }
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

    /// The earlier rows of a row's lane.
    pub fn before(&self, number: usize) -> impl Iterator<Item = usize> {
        (0..number).filter(move |earlier| self.in_one_lane(&self.rows[*earlier], &self.rows[number]))
    }

    pub fn waiting(&self) -> usize {
        self.rows.iter().filter(|row| row.state == State::Waiting).count()
    }

    /// Held are the poisoned rows and those behind them, and everything else is published.
    pub fn check_end(&self, broker: &Broker) {
        for (number, row) in self.rows.iter().enumerate() {
            let stopped = row.poison != Poison::None
                || self.before(number).any(|earlier| self.rows[earlier].poison != Poison::None);
            let expected = if stopped { State::Held } else { State::Recorded };
            assert_eq!(row.state, expected, "{}: {row:?}", self.id(number));
            assert_eq!(broker.has(&self.id(number)), !stopped, "{}", self.id(number));
        }
    }
}
