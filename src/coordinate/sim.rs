//! The group under virtual time: seeded histories of relays that stop and go on, of clocks that run at
//! different speeds, of answers that are lost and of statements that arrive late, against a database that
//! does what the real ones do. Two relays never believe at the same time that a part is theirs, but for a relay
//! that stood still: that one finds out before it sends anything new, or within what it had in its hands.
//!
//! Exactly once nobody works on a part of which something may be published under a slot that it has not taken over.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

use fastrand::Rng;
use tokio::time::Instant;

use super::{
    Claim, Held, Lease, Member, Part, Seen, UNKNOWN, View,
    standing::{Attended, Standing},
};

const LENGTH: Duration = Duration::from_secs(10);
const BUCKETS: u16 = 16;
/// The longest that a statement is on its way, there or back, and longer than anybody waits for it.
const LATE: u64 = 5_000;
/// How often a relay stands still, or is killed: at most so many milliseconds apart.
const NAP_EVERY: u64 = 40_000;
const KILL_EVERY: u64 = 120_000;
/// How much faster or slower a relay's clock may run, in percent.
const SKEW: i64 = 10;

/// The relay's tables. Times are the database's, in milliseconds.
#[derive(Default)]
struct Database {
    next: i64,
    members: BTreeMap<i64, (usize, u64)>,
    parts: BTreeMap<Part, Held>,
    /// Exactly once: of each part the slots under which something may be published that is not recorded.
    in_doubt: BTreeMap<Part, BTreeSet<Part>>,
}

#[derive(Clone, Debug)]
enum Statement {
    Join,
    Renew(i64),
    Sweep,
    Look,
    Take(i64, Vec<Seen>),
    Leave(i64, Vec<Seen>),
    Inherit(i64, i64),
}

#[derive(Clone, Debug)]
enum Said {
    Epoch(Option<i64>),
    Done,
    View(View),
    Taken(Vec<Part>),
}

impl Database {
    /// A member fences whoever produced with its slots, and has what those left recorded. One slot stays its own.
    fn take_over(&mut self, epoch: i64) -> Option<Part> {
        let slots: Vec<Part> = self.parts.keys().copied().filter(|part| part.is_slot()).collect();
        let slots: Vec<Part> = slots.into_iter().filter(|slot| self.parts[slot].by == Some(epoch)).collect();
        if !self.members.contains_key(&epoch) {
            return None;
        }
        for slot in &slots {
            self.in_doubt.values_mut().for_each(|under| {
                under.remove(slot);
            });
        }
        for slot in slots.iter().skip(1) {
            let turn = self.parts[slot].turn + 1;
            self.parts.insert(*slot, Held { by: None, turn });
        }
        slots.first().copied()
    }

    fn run(&mut self, relay: usize, statement: &Statement, now: u64) -> Said {
        let expires = now + LENGTH.as_millis() as u64;
        match statement {
            Statement::Join => {
                self.next += 1;
                self.members.insert(self.next, (relay, expires));
                Said::Epoch(Some(self.next))
            }
            Statement::Renew(epoch) => match self.members.get_mut(epoch) {
                Some((_, until)) if *until > now => {
                    *until = expires;
                    Said::Epoch(Some(*epoch))
                }
                _ => Said::Epoch(None),
            },
            Statement::Sweep => {
                self.members.retain(|_, (_, until)| *until > now);
                Said::Done
            }
            Statement::Look => Said::View(View {
                members: self
                    .members
                    .iter()
                    .map(|(epoch, (relay, until))| Member {
                        epoch: *epoch,
                        owner: relay.to_string(),
                        left: Duration::from_millis(until.saturating_sub(now)),
                        tables: BTreeSet::new(),
                    })
                    .collect(),
                parts: self.parts.clone(),
                gates: BTreeMap::new(),
            }),
            Statement::Take(epoch, wanted) => {
                let mut taken = Vec::new();
                for (part, seen) in wanted {
                    if self.members.contains_key(epoch) && self.parts[part].turn == *seen {
                        self.parts.insert(*part, Held { by: Some(*epoch), turn: seen + 1 });
                        taken.push(*part);
                    }
                }
                Said::Taken(taken)
            }
            Statement::Leave(epoch, parts) => {
                for (part, seen) in parts {
                    if self.parts[part] == (Held { by: Some(*epoch), turn: *seen }) {
                        self.parts.insert(*part, Held { by: None, turn: seen + 1 });
                        // It was waited for, and was this member's alone.
                        self.in_doubt.remove(part);
                    }
                }
                Said::Done
            }
            Statement::Inherit(epoch, gone) => {
                if self.members.contains_key(epoch) {
                    for held in self.parts.values_mut().filter(|held| held.by == Some(*gone)) {
                        *held = Held { by: Some(*epoch), turn: held.turn + 1 };
                    }
                }
                Said::Done
            }
        }
    }
}

/// What a relay waits for.
#[derive(Clone, Debug)]
enum Step {
    Renewing,
    Sweeping(i64),
    Looking(i64),
    Leaving(Vec<Seen>, Vec<Seen>),
    Taking { begins: bool },
    Inheriting,
}

struct Relay {
    standing: Standing,
    /// On its own clock.
    asked: Instant,
    step: Option<Step>,
    /// Counts its questions: an answer to an older one is not waited for any more.
    question: u64,
    next_round: u64,
    gives_up: u64,
    /// Stands still until then.
    asleep_until: u64,
    speed: i64,
    /// Until when something of the parts that it leaves may be in flight.
    busy_until: u64,
    next_nap: u64,
    next_kill: u64,
    /// Exactly once: what is being taken over, and until when; then what was, and the slot that is its own.
    takes_over: Option<(u64, Claim)>,
    taken_over: Option<(Claim, Part)>,
}

struct World {
    units: Option<u16>,
    random: Rng,
    origin: Instant,
    now: u64,
    database: Database,
    relays: Vec<Relay>,
    /// On the way to the database: when, from whom, its question, and what.
    requests: Vec<(u64, usize, u64, Statement)>,
    answers: Vec<(u64, usize, u64, Said)>,
    faults: bool,
    taken_over: u64,
}

impl World {
    fn new(seed: u64, relays: usize, units: Option<u16>) -> World {
        let mut random = Rng::with_seed(seed);
        let origin = Instant::now();
        let parts = (0..BUCKETS)
            .map(Part::Bucket)
            .chain([Part::Whole])
            .chain((0..units.unwrap_or(0)).map(Part::Slot));
        let parts = parts.map(|part| (part, Held::default())).collect();
        let relays = (0..relays).map(|_| Relay {
            standing: Standing::new(units),
            asked: origin,
            step: None,
            question: 0,
            next_round: random.u64(0..3_000),
            gives_up: 0,
            asleep_until: 0,
            speed: 100 + random.i64(-SKEW..=SKEW),
            busy_until: 0,
            next_nap: random.u64(0..NAP_EVERY),
            next_kill: random.u64(0..KILL_EVERY),
            takes_over: None,
            taken_over: None,
        });
        let relays = relays.collect();
        World {
            units,
            random,
            origin,
            now: 0,
            database: Database { parts, ..Database::default() },
            relays,
            requests: Vec::new(),
            answers: Vec::new(),
            faults: true,
            taken_over: 0,
        }
    }

    /// A relay's own clock: it goes on while the relay stands still.
    fn clock(&self, relay: usize) -> Instant {
        self.origin + Duration::from_millis(self.now * self.relays[relay].speed as u64 / 100)
    }

    fn send(&mut self, relay: usize, step: Step, statement: Statement) {
        let way = if self.faults && self.random.u32(0..20) == 0 { LATE } else { 30 };
        let at = self.now + self.random.u64(0..way);
        let own = &mut self.relays[relay];
        own.question += 1;
        own.gives_up = self.now + LENGTH.as_millis() as u64 / 3;
        own.step = Some(step);
        let question = own.question;
        self.requests.push((at, relay, question, statement));
    }

    fn begin(&mut self, relay: usize) {
        self.relays[relay].asked = self.clock(relay);
        let statement = match self.relays[relay].standing.epoch() {
            Some(epoch) => Statement::Renew(epoch),
            None => Statement::Join,
        };
        self.send(relay, Step::Renewing, statement);
    }

    fn end_round(&mut self, relay: usize) {
        let pause = self.relays[relay].standing.look_again_in(LENGTH).as_millis() as u64;
        self.end_round_for(relay, pause);
    }

    fn end_round_for(&mut self, relay: usize, pause: u64) {
        let own = &mut self.relays[relay];
        own.step = None;
        own.next_round = self.now + pause.max(1);
    }

    fn heard(&mut self, relay: usize, said: Said) {
        let asked = self.relays[relay].asked;
        match (self.relays[relay].step.take(), said) {
            (Some(Step::Renewing), Said::Epoch(Some(epoch))) => {
                self.send(relay, Step::Sweeping(epoch), Statement::Sweep);
            }
            (Some(Step::Renewing), Said::Epoch(None)) => {
                self.relays[relay].standing.attended(asked, LENGTH, Attended::Gone, None);
                self.relays[relay].next_round = self.now;
            }
            (Some(Step::Sweeping(epoch)), Said::Done) => {
                self.send(relay, Step::Looking(epoch), Statement::Look);
            }
            (Some(Step::Looking(epoch)), Said::View(view)) => {
                // What is in flight is done after a while.
                let done = if self.relays[relay].busy_until <= self.now { u64::MAX } else { 0 };
                let claim = self.relays[relay].standing.lease().claim();
                let settled = self.relays[relay].taken_over.is_some_and(|(taken, _)| Some(taken) == claim);
                let done = (self.units.is_none() || settled).then_some(done);
                let answer = Attended::Member { epoch, view };
                let was_moving = self.relays[relay].standing.is_moving();
                let moves = self.relays[relay].standing.attended(asked, LENGTH, answer, done);
                if !was_moving && self.relays[relay].standing.is_moving() {
                    self.relays[relay].busy_until = self.now + self.random.u64(0..4_000);
                }
                if let Some(gone) = moves.inherit {
                    self.send(relay, Step::Inheriting, Statement::Inherit(epoch, gone));
                } else {
                    self.moves(relay, moves.leave, moves.take);
                }
            }
            (Some(Step::Inheriting), Said::Done) => self.end_round_for(relay, 0),
            (Some(Step::Leaving(parts, take)), Said::Done) => {
                self.relays[relay].standing.left(&parts);
                self.moves(relay, Vec::new(), take);
            }
            (Some(Step::Taking { begins }), Said::Taken(parts)) => {
                self.taken_over += parts.len() as u64;
                let now = self.clock(relay);
                self.relays[relay].standing.took(&parts, now);
                if begins { self.end_round_for(relay, 0) } else { self.end_round(relay) }
            }
            (step, said) => panic!("{step:?} {said:?}"),
        }
    }

    fn moves(&mut self, relay: usize, leave: Vec<Seen>, take: Vec<Seen>) {
        let Some(epoch) = self.relays[relay].standing.epoch() else { return self.end_round(relay) };
        if !leave.is_empty() {
            self.relays[relay].standing.leaves(&leave);
            let statement = Statement::Leave(epoch, leave.clone());
            self.send(relay, Step::Leaving(leave, take), statement);
        } else if take.is_empty() {
            self.end_round(relay);
        } else {
            let begins = take.iter().any(|(part, _)| part.is_slot());
            self.send(relay, Step::Taking { begins }, Statement::Take(epoch, take));
        }
    }

    /// Goes on to the next thing that happens. Between two of them nobody begins to believe anything.
    fn tick(&mut self) {
        let of_relay = |relay: &Relay| {
            let due = if relay.step.is_some() { relay.gives_up } else { relay.next_round };
            let fault = if self.faults { relay.next_nap.min(relay.next_kill) } else { u64::MAX };
            due.min(fault).max(relay.asleep_until)
        };
        let awake_at = |relay: usize| self.relays[relay].asleep_until;
        let next = (self.requests.iter().map(|request| request.0))
            .chain(self.answers.iter().map(|answer| answer.0.max(awake_at(answer.1))))
            .chain(self.relays.iter().map(of_relay))
            .min();
        self.now = next.unwrap_or(0).max(self.now + 1);
        let now = self.now;
        let due: Vec<_> = self.requests.extract_if(.., |request| request.0 <= now).collect();
        for (_, relay, question, statement) in due {
            let said = self.database.run(relay, &statement, now);
            let lost = self.faults && self.random.u32(0..30) == 0;
            if !lost {
                let at = now + self.random.u64(0..30);
                self.answers.push((at, relay, question, said));
            }
        }
        let awake: Vec<bool> = self.relays.iter().map(|relay| relay.asleep_until <= now).collect();
        let due: Vec<_> = self.answers.extract_if(.., |answer| answer.0 <= now && awake[answer.1]).collect();
        for (_, relay, question, said) in due {
            if self.relays[relay].question == question && self.relays[relay].step.is_some() {
                self.heard(relay, said);
            }
        }
        for relay in (0..self.relays.len()).filter(|relay| awake[*relay]) {
            self.turn(relay);
            if self.units.is_some() {
                self.take_over(relay);
            }
        }
    }

    fn turn(&mut self, relay: usize) {
        let now = self.now;
        let own = &mut self.relays[relay];
        if self.faults && own.next_nap <= now {
            own.asleep_until = now + self.random.u64(0..25_000);
            own.next_nap = now + self.random.u64(0..NAP_EVERY);
            return;
        }
        if self.faults && own.next_kill <= now {
            // And started anew.
            own.standing = Standing::new(self.units);
            own.step = None;
            own.next_round = now + self.random.u64(0..5_000);
            own.next_kill = now + self.random.u64(0..KILL_EVERY);
        }
        if own.step.is_some() && own.gives_up <= now {
            own.step = None;
            own.next_round = now + self.random.u64(50..500);
        }
        if own.step.is_none() && own.next_round <= now {
            self.begin(relay);
        }
    }

    /// A relay that works exactly once takes over what is its own before anything else.
    fn take_over(&mut self, relay: usize) {
        let now = self.now;
        let lease = self.relays[relay].standing.lease();
        let own = &mut self.relays[relay];
        let believes = matches!(lease, Lease::Owner { until, .. } if self.origin
            + Duration::from_millis(now * own.speed as u64 / 100) < until);
        let Some(claim) = lease.claim().filter(|_| believes) else {
            (own.takes_over, own.taken_over) = (None, None);
            return;
        };
        if own.taken_over.is_some_and(|(taken, _)| taken == claim) {
            return;
        }
        match own.takes_over {
            Some((until, of)) if of == claim && until <= now => {
                own.takes_over = None;
                own.taken_over = self.database.take_over(claim.epoch).map(|slot| (claim, slot));
            }
            Some((_, of)) if of == claim => {}
            _ => own.takes_over = Some((now + self.random.u64(0..2_000), claim)),
        }
    }

    /// What a relay works on is under its own slot, and nothing else of it is in doubt.
    fn work(&mut self, relay: usize, seed: u64) {
        let Some((claim, slot)) = self.relays[relay].taken_over else { return };
        let lease = self.relays[relay].standing.lease();
        let Lease::Owner { epoch, parts, .. } = &lease else { return };
        if !claim.covers(*epoch, parts) {
            return;
        }
        for part in self.believes(relay) {
            let under = self.database.in_doubt.entry(part).or_default();
            let at = self.now;
            assert!(
                under.iter().all(|one| *one == slot),
                "seed {seed}, {at} ms: relay {relay} works on {part:?}, of which something is in doubt under {under:?}"
            );
            under.insert(slot);
        }
    }

    /// The parts that a relay would send events of at this moment, by its own clock.
    fn believes(&self, relay: usize) -> Vec<Part> {
        let now = self.clock(relay);
        match self.relays[relay].standing.lease() {
            Lease::Owner { until, parts, .. } if now < until => {
                let whole = parts.whole.then_some(Part::Whole);
                parts.buckets.iter().map(|bucket| Part::Bucket(*bucket)).chain(whole).collect()
            }
            _ => Vec::new(),
        }
    }

    /// After a crash of all of them an operator empties the table that knows who had what.
    fn forget_owners(&mut self) {
        for relay in &mut self.relays {
            relay.standing = Standing::new(self.units);
            (relay.step, relay.takes_over, relay.taken_over) = (None, None, None);
        }
        self.requests.clear();
        self.answers.clear();
        self.database.members.clear();
        let nobodys = Held { by: Some(UNKNOWN), turn: 0 };
        self.database.parts.values_mut().for_each(|held| *held = nobodys);
    }

    fn check(&mut self, seed: u64) {
        if self.units.is_some() {
            (0..self.relays.len()).for_each(|relay| self.work(relay, seed));
        }
        let mut owners: BTreeMap<Part, usize> = BTreeMap::new();
        for relay in 0..self.relays.len() {
            for part in self.believes(relay) {
                if let Some(other) = owners.insert(part, relay) {
                    panic!(
                        "seed {seed}, {} ms: {part:?} is worked on by relays {other} and {relay}",
                        self.now
                    );
                }
            }
        }
    }
}

fn history(seed: u64, units: Option<u16>) -> u64 {
    let mut world = World::new(seed, 2 + (seed % 4) as usize, units);
    let mut forgets = units.is_some() && seed.is_multiple_of(3);
    while world.now < 90_000 {
        world.tick();
        world.check(seed);
        if forgets && world.now > 45_000 {
            world.forget_owners();
            forgets = false;
        }
    }
    // Left alone, they come to fair shares of everything.
    world.faults = false;
    for relay in &mut world.relays {
        relay.asleep_until = 0;
    }
    while world.now < 150_000 {
        world.tick();
        world.check(seed);
    }
    let shares: Vec<usize> = (0..world.relays.len()).map(|relay| world.believes(relay).len()).collect();
    assert_eq!(shares.iter().sum::<usize>(), usize::from(BUCKETS) + 1, "seed {seed}: {shares:?}");
    let workers = units.map_or(world.relays.len(), |units| world.relays.len().min(usize::from(units)));
    let fair = usize::from(BUCKETS) / workers;
    let (idle, working): (Vec<usize>, Vec<usize>) = shares.iter().partition(|share| **share == 0);
    assert_eq!(idle.len(), world.relays.len() - workers, "seed {seed}: {shares:?}");
    assert!(working.iter().all(|share| (fair..=fair + 2).contains(share)), "seed {seed}: {shares:?}");
    let waits = |relay: &Relay| relay.standing.lease() != Lease::Standby && relay.taken_over.is_none();
    assert!(units.is_none() || !world.relays.iter().any(waits), "seed {seed}");
    world.taken_over
}

/// How many histories there are to be.
fn histories(of: u64) -> u64 {
    std::env::var("WHIPPET_SIM_HISTORIES").ok().and_then(|n| n.parse().ok()).unwrap_or(of)
}

#[test]
fn no_part_ever_has_two_owners_who_believe_in_it() {
    let histories = histories(2_000);
    let moved: u64 = (0..histories).map(|seed| history(seed, None)).sum();
    assert!(moved > histories * 20, "{moved} parts were taken in {histories} histories");
}

#[test]
fn exactly_once_nothing_is_worked_on_before_what_another_left_of_it_is_settled() {
    let histories = histories(500);
    let moved: u64 = (0..histories).map(|seed| history(seed, Some(1 + (seed / 4 % 4) as u16))).sum();
    assert!(moved > histories * 10, "{moved} parts were taken in {histories} histories");
}
