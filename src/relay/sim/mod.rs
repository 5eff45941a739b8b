//! The core under virtual time: seeded random histories of writers, broker and lease, checked against
//! what contract.md section 5 promises. Nothing here waits; a history is a function of its seed.

mod broker;
mod histories;
mod large;
mod reload;
mod table;
mod transactions;

use std::{collections::VecDeque, sync::Arc, time::Duration};

use rdkafka::types::RDKafkaErrorCode as Code;

use self::{
    broker::Broker,
    table::{LARGE, Poison, REFUSED, Row, State, Table, Wish},
};
use super::{
    core::{self, Action, Core, Effects, End, Job},
    packer::Unpacked,
    retry::{GiveUp, Policy},
    unit::Obstacle,
    window::{Room, Window},
};
use crate::{
    admin::metrics::Metrics,
    config::{OnFailure, Order},
    event::TableIx,
    record::{Form, LargeSpec, Oversize, Packed, Rules, Spec, Then},
    sink::{Takes, TopicFacts},
    source::{Command, Taken, Yield, database::Noted, hold::Scope},
};

/// Partitions of every topic but `single`, which has one.
const PARTITIONS: i32 = 3;
const LEASE: Duration = Duration::from_secs(5);

struct World {
    random: fastrand::Rng,
    now: Duration,
    core: Core,
    window: Arc<Window>,
    broker: Broker,
    tables: Vec<Table>,
    rules: Vec<Arc<core::Table>>,
    look_ups: VecDeque<String>,
    packings: VecDeque<Job>,
    probes: usize,
    /// Whether the object store can be reached, and whether it takes more than small objects.
    store: bool,
    takes_payloads: bool,
    /// Payloads that were given to it.
    tries: usize,
    /// Rebuilds that were asked for and are not done.
    rebuilds: usize,
    leased: bool,
    give_up: GiveUp,
    /// Transactions: how they are to end, positions to be noted, and whether the rebuild is a takeover.
    exactly_once: bool,
    ends: VecDeque<(u32, End)>,
    /// Answers that come after the relay has given their generation up, and how many have come.
    belated: VecDeque<(u32, Result<(), String>)>,
    too_late: usize,
    notes: VecDeque<(u32, Noted)>,
    take_over: bool,
    /// Commits, those whose answer was lost, and transactions that were dropped.
    committed: usize,
    lost: usize,
    dropped: usize,
    /// Commits during which the next transaction had records; and such of which nobody heard, though they were done, and
    /// because they were not.
    overlapped: usize,
    unheard: [usize; 2],
    /// Actions after which two transactions had something on its way.
    in_two: usize,
    /// What was changed by hand, and how many breakers released what they held.
    changed: usize,
    released: usize,
    /// How many tables have stopped and started.
    reloads: usize,
    /// Whether faults still happen.
    faults: bool,
}

impl World {
    fn new(seed: u64, orders: &[Order], give_up: GiveUp) -> World {
        World::with(seed, orders, give_up, false)
    }

    fn with(seed: u64, orders: &[Order], give_up: GiveUp, exactly_once: bool) -> World {
        let chunks = seed.is_multiple_of(2);
        let window = Window::new(Room { events: 40, bytes: 8_000 });
        let spec = Spec {
            id: "id".into(),
            payload: "payload".into(),
            topic: Some("topic".into()),
            key: Some("key".into()),
            headers: Some("headers".into()),
            allow: vec!["*".into()],
            headers_max_bytes: 1000,
            dead_letter_topic: "{topic}.dlq".into(),
            large: LargeSpec {
                inline_max: Some(LARGE / 2),
                oversize: if chunks { Oversize::Chunk } else { Oversize::ClaimCheck },
                reference_key: "{topic}/{id}-{sha256}".into(),
                whippet: true,
                chunk_bytes: Some(LARGE / 3),
                ..LargeSpec::default()
            },
            ..Spec::default()
        };
        let names: Vec<String> = (0..orders.len()).map(|n| format!("t{n}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let tables = orders.iter().zip(&names).map(|(order, name)| {
            Arc::new(core::Table {
                keeps_rows: true,
                name: (*name).to_owned(),
                rules: Rules::compile(&spec).unwrap(),
                order: *order,
                retry: Policy { jitter: false, ..Policy::default() },
                give_up,
                max_held: u64::MAX,
            })
        });
        let rules: Vec<Arc<core::Table>> = tables.collect();
        let metrics = Arc::new(Metrics::new(&names));
        let core = Core::new(rules.clone(), window.clone(), metrics);
        let mut world = World {
            random: fastrand::Rng::with_seed(seed),
            now: Duration::ZERO,
            core: if exactly_once { core.exactly_once() } else { core },
            window,
            broker: Broker::of(exactly_once),
            tables: orders.iter().enumerate().map(|(n, order)| Table::new(n, *order, exactly_once)).collect(),
            rules,
            look_ups: VecDeque::new(),
            packings: VecDeque::new(),
            probes: 0,
            store: true,
            takes_payloads: true,
            tries: 0,
            rebuilds: 0,
            leased: false,
            give_up,
            exactly_once,
            ends: VecDeque::new(),
            belated: VecDeque::new(),
            too_late: 0,
            notes: VecDeque::new(),
            take_over: false,
            committed: 0,
            lost: 0,
            dropped: 0,
            overlapped: 0,
            unheard: [0; 2],
            in_two: 0,
            changed: 0,
            released: 0,
            reloads: 0,
            faults: true,
        };
        world.lease(true);
        world
    }

    fn apply(&mut self, action: Action) {
        let effects = self.core.apply(action, self.now, 0, &self.broker);
        let Effects {
            settled,
            holds,
            forgotten,
            look_up,
            go,
            release,
            halt,
            rebuild,
            restart,
            pack,
            probe,
            settle,
            end,
            note,
            refuse,
        } = effects;
        assert!(!refuse && (self.exactly_once || (settle.is_none() && end.is_none() && note.is_none())));
        if let Some((_, end)) = &end {
            self.broker.ends(matches!(end, End::Commit(_)));
        }
        self.in_two += usize::from(self.broker.sends_in_two());
        self.ends.extend(end);
        self.notes.extend(note);
        if let Some(rebuild) = rebuild {
            self.take_over = rebuild.take_over;
        }
        assert!(forgotten.is_empty(), "nothing is replayed here");
        for (table, places) in settled {
            self.tell(table, Command::Settled(places));
        }
        for (table, holds) in holds {
            self.tell(table, Command::Hold(holds));
        }
        self.released += release.len();
        for (table, over) in release {
            self.tell(table, Command::Release(over));
        }
        for (table, serial, halted) in go {
            self.tell(table, Command::Go { serial, halted });
        }
        for table in halt {
            self.tell(table, Command::Halt);
        }
        self.look_ups.extend(look_up);
        self.rebuilds += usize::from(rebuild.is_some());
        if restart.is_some() {
            // What was done already is answered all the same.
            let done = self.random.usize(..=self.packings.len());
            self.packings.truncate(done);
        }
        self.packings.extend(pack);
        self.probes += usize::from(probe);
        if let Some(generation) = restart {
            let mut settle = settle;
            for (index, table) in self.tables.iter_mut().enumerate() {
                let taken = settle.as_mut().map(|(claim, doubts)| Taken {
                    claim: *claim,
                    doubts: std::mem::take(&mut doubts[index]),
                });
                table.hear(Command::Restart { generation, taken });
            }
        }
    }

    fn tell(&mut self, table: TableIx, command: Command) {
        self.tables[table.0 as usize].hear(command);
    }

    fn lease(&mut self, ours: bool) {
        self.leased = ours;
        self.apply(Action::Lease(ours.then(|| self.now + LEASE)));
    }

    fn insert(&mut self, count: usize) {
        let table = self.random.usize(..self.tables.len());
        for _ in 0..count {
            let key = match self.random.u32(0..6) {
                0 => None,
                n => Some(format!("k{n}")),
            };
            let poison = match self.random.u32(0..60) {
                0 => Poison::Headers,
                1 => Poison::Broker,
                2 => Poison::Store,
                _ => Poison::None,
            };
            let large = self.random.u32(0..4) == 0;
            let topic = match self.tables[table].order {
                Order::Table => "single".to_owned(),
                _ => format!("topic{}", self.random.u32(0..2)),
            };
            self.tables[table].rows.push(Row { topic, key, poison, large, state: State::Waiting });
        }
    }

    /// One thing happens, and the window still counts what is on its way and nothing else.
    fn step(&mut self) {
        self.happen();
        self.let_go();
        let on_the_way = |yielded: &Yield| match yielded {
            Yield::Events { events, .. } => {
                Room { events: events.len(), bytes: events.iter().map(core::window_bytes).sum() }
            }
            Yield::Closed { .. }
            | Yield::Gates { .. }
            | Yield::Held { .. }
            | Yield::Forgotten { .. }
            | Yield::Recorded { .. }
            | Yield::Ended => Room::default(),
        };
        let expected = Room { events: self.core.open(), bytes: self.core.open_bytes() };
        let handed_over = self.tables.iter().flat_map(|table| &table.yields).map(on_the_way);
        let expected = handed_over.fold(expected, |sum, room| Room {
            events: sum.events + room.events,
            bytes: sum.bytes + room.bytes,
        });
        assert_eq!(self.window.used(), expected);
    }

    fn happen(&mut self) {
        let table = self.random.usize(..self.tables.len());
        match self.random.u32(0..100) {
            0..30 => self.tables[table].turn(&self.window, self.random.usize(1..15), &self.broker),
            30..55 => {
                if self.core.wants_events()
                    && let Some(yielded) = self.tables[table].yields.pop_front()
                {
                    self.heard(table, yielded);
                }
            }
            55..80 => {
                let faults = self.faults;
                let reports = self.broker.turn(&mut self.random, faults, &self.tables);
                if !reports.is_empty() {
                    self.apply(Action::Reports(reports));
                }
            }
            80..83 => self.answer_look_up(),
            83..86 => self.pack(),
            86..90 => {
                if self.rebuilds > 0 {
                    self.rebuilds -= 1;
                    // Nobody waits for what is under way any more. It may be heard of all the same.
                    for (generation, end) in std::mem::take(&mut self.ends) {
                        let done = self.is_done(0, end, true);
                        self.belated.push_back((generation, done));
                    }
                    self.broker.rebuild(&mut self.random);
                    let failed = self.faults && self.random.u32(0..8) == 0;
                    self.rebuilt(failed);
                }
            }
            90..92 => (0..5).for_each(|_| self.end()),
            92..93 if self.faults => match self.random.u32(0..4) {
                3 if self.exactly_once => {}
                3 => self.reload(table),
                0 if self.random.bool() => self.store = !self.store,
                0 => self.takes_payloads = !self.takes_payloads,
                _ => self.operate(table),
            },
            92..97 => {
                let due = self.core.next_due().map_or(Duration::ZERO, |due| due.saturating_sub(self.now));
                self.now += due.min(LEASE) + Duration::from_millis(self.random.u64(0..50));
                // A lease that is not renewed in time is lost: seldom, and only while faults happen.
                let keep = !self.faults || self.random.u32(0..10) > 0;
                self.lease(keep);
                self.apply(Action::Due);
            }
            _ => {
                if self.faults && self.leased && self.random.u32(0..4) == 0 {
                    self.lease(false);
                } else if !self.leased {
                    self.lease(true);
                }
            }
        }
    }

    /// An operator changes something.
    fn operate(&mut self, table: usize) {
        let (random, table) = (&mut self.random, &mut self.tables[table]);
        let scope = match random.u32(0..4) {
            0 => Scope::Table,
            1 => Scope::Topic("topic0".into()),
            2 => Scope::Key { topic: None, key: b"k1".to_vec() },
            _ => Scope::Key { topic: Some("topic1".into()), key: b"k2".to_vec() },
        };
        // A table that is one lane is paused as a whole.
        let scope = if table.order == Order::Table { Scope::Table } else { scope };
        let held = table.held();
        let row = random.usize(..table.rows.len().max(1));
        table.wishes.push_back(match random.u32(0..8) {
            0 => Wish::Pause(scope),
            1..3 => Wish::Resume(scope),
            3 if held > 0 => Wish::Skip(row),
            _ if held > 0 => Wish::Redrive(row, random.bool()),
            _ => return,
        });
        self.changed += 1;
    }

    /// Some payload is packed, in no order, or the object store is asked whether it is back.
    fn pack(&mut self) {
        if !self.core.may_send() {
            return;
        }
        if self.probes > 0 && self.random.bool() {
            self.probes -= 1;
            return self.apply(Action::Probed(if self.store { Ok(()) } else { Err("away".into()) }));
        }
        if self.packings.is_empty() {
            return;
        }
        let which = self.random.usize(..self.packings.len());
        let Some(Job { ticket, number, payload, packing, .. }) = self.packings.remove(which) else { return };
        self.tries += usize::from(matches!(packing.oversize, Then::Refer { .. }));
        let refused = || Unpacked::Never { reason: "denied".into(), oversize: false };
        let result = match packing.oversize {
            _ if payload == REFUSED[..] => Err(refused()),
            Then::Refer { .. } if !self.store || !self.takes_payloads => Err(Unpacked::Away("away".into())),
            Then::Refer { key, .. } => {
                let form = Form::Reference { uri: key.with("hash"), size: LARGE, sha256: "hash".into() };
                Ok(Packed { encoding: None, form })
            }
            Then::Chunk { bytes, .. } => {
                let form = Form::Chunks {
                    whole: payload,
                    each: bytes,
                    id: uuid::Uuid::nil(),
                    sha256: "hash".into(),
                };
                Ok(Packed { encoding: None, form })
            }
            Then::Refuse { why } => unreachable!("{why}"),
        };
        self.apply(Action::Packed { ticket, number, result, took: Duration::ZERO });
    }

    fn rebuilt(&mut self, failed: bool) {
        let takeover = (self.take_over && !failed).then(|| self.taken_over());
        self.apply(Action::Rebuilt(if failed { Err(Obstacle::Trouble("no".into())) } else { Ok(takeover) }));
    }

    fn answer_look_up(&mut self) {
        if self.core.is_barred() {
            return;
        }
        let Some(topic) = self.look_ups.pop_front() else { return };
        let result = if self.faults && self.random.u32(0..4) == 0 {
            let codes = [Code::UnknownTopicOrPartition, Code::BrokerTransportFailure, Code::PolicyViolation];
            Err(codes[self.random.usize(0..codes.len())])
        } else {
            let partitions = if topic == "single" { 1 } else { PARTITIONS };
            let tells = !self.faults || self.random.u32(0..3) > 0;
            Ok(TopicFacts { partitions, takes: tells.then(Takes::default) })
        };
        self.apply(Action::LookedUp { topic, result });
    }

    fn is_quiet(&self) -> bool {
        self.rebuilds == 0
            && self.ends.is_empty()
            && self.packings.is_empty()
            && self.tables.iter().all(Table::is_quiet)
    }

    /// Lets everything end, with no more faults, and looks at what is left.
    fn settle(&mut self, seed: u64) {
        self.faults = false;
        (self.store, self.takes_payloads) = (true, true);
        for table in &mut self.tables {
            let resume: Vec<Wish> = table.paused.iter().cloned().map(Wish::Resume).collect();
            let unpaused = |wish: &Wish| !matches!(wish, Wish::Pause(_));
            table.wishes.retain(unpaused);
            table.wishes.extend(resume);
        }
        let mut steps = 0;
        while !self.is_quiet() {
            steps += 1;
            assert!(
                steps < 200_000,
                "seed {seed}: no progress: {:?} open, {:?}",
                self.core.open(),
                self.tables.iter().map(Table::waiting).collect::<Vec<_>>()
            );
            self.step();
        }
        assert_eq!(self.core.open(), 0, "seed {seed}");
        assert_eq!(self.window.used(), Room::default(), "seed {seed}: room was not given back");
        for table in &self.tables {
            table.check_end(&self.broker, self.give_up.then == OnFailure::DeadLetter);
        }
    }
}
