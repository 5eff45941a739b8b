//! What is settled in a table whose rows stay when they are published (`after_publish: keep`).
//!
//! Nothing is written into the rows. A [`Frontier`] says which of them are behind it: all those that a
//! moment of the database sees, up to a number. Pure; the relay's own table has it as [`Recorded`].

mod runs;

pub use self::runs::{NotRuns, Runs};
use crate::source::log::Snapshot;

/// How far a kept table was read. A row is still to be read if it is none of
///
/// - behind: `seen` sees its transaction, its number is at most `upto`, and it is not `again`;
/// - not behind, and in `since`;
/// - held, which the table of holds says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frontier {
    /// `None` in a dialect whose numbers are in the order of commits, and where nothing was read.
    pub seen: Option<Snapshot>,
    pub upto: i64,
    /// To be read again: given back, or released.
    pub again: Runs,
    /// Handed over since it moved last.
    pub since: Runs,
    /// Those of `since` that the log had, with their transaction, which may not be seen yet.
    of_log: Vec<(i64, u32)>,
}

impl Default for Frontier {
    /// Nothing was read.
    fn default() -> Frontier {
        let (again, since) = (Runs::default(), Runs::default());
        Frontier { seen: None, upto: i64::MIN, again, since, of_log: Vec::new() }
    }
}

impl Frontier {
    /// A row was handed over; with its transaction, if the log had it.
    pub fn take(&mut self, number: i64, xid: Option<u32>) {
        self.again.remove(number);
        self.since.insert(number);
        self.of_log.extend(xid.map(|xid| (number, xid)));
    }

    /// A row that was handed over is to be read again.
    pub fn give_back(&mut self, number: i64) {
        self.since.remove(number);
        self.of_log.retain(|(of_log, _)| *of_log != number);
        self.again.insert(number);
    }

    /// All rows up to this number that this moment sees were handed over, or are held. `false` where that
    /// is no news worth writing down.
    pub fn advance(&mut self, seen: Option<Snapshot>, upto: i64) -> bool {
        let news = upto > self.upto || !self.since.is_empty();
        self.upto = self.upto.max(upto);
        self.since.remove_to(self.upto);
        self.of_log.retain(|(_, xid)| seen.as_ref().is_some_and(|seen| !seen.sees(*xid)));
        self.of_log.iter().for_each(|(number, _)| self.since.insert(*number));
        self.seen = seen;
        news
    }

    /// What is to be written down, where `unsettled` are the rows that were handed over and are not settled.
    pub fn recorded(&self, unsettled: impl Iterator<Item = i64>) -> Recorded {
        let open: Runs = self.again.iter().chain(unsettled).collect();
        let mut done = self.since.clone();
        for number in open.iter() {
            done.remove(number);
        }
        Recorded { seen: self.seen.clone(), upto: self.upto, open, done }
    }
}

/// A frontier as it is written down: nothing is on its way.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Recorded {
    pub seen: Option<Snapshot>,
    pub upto: i64,
    /// Not settled, wherever they are.
    pub open: Runs,
    /// Settled, although they may not be behind.
    pub done: Runs,
}

impl From<Recorded> for Frontier {
    fn from(recorded: Recorded) -> Frontier {
        let Recorded { seen, upto, open, done } = recorded;
        Frontier { seen, upto, again: open, since: done, of_log: Vec::new() }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;

    /// What a row is to the frontier.
    fn is_to_be_read(frontier: &Frontier, number: i64, xid: u32) -> bool {
        let seen = frontier.seen.as_ref().is_some_and(|seen| seen.sees(xid));
        match seen && number <= frontier.upto {
            true => frontier.again.contains(number),
            false => !frontier.since.contains(number),
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        /// A transaction begins, with rows.
        Insert(u8),
        Commit(prop::sample::Index),
        /// Polling reads so many rows; whether all were handed over.
        Poll(usize, bool),
        /// The log brings a row, which may not be seen yet.
        Log(prop::sample::Index),
        /// Whether the log has everything that is seen.
        Look,
        Settle(prop::sample::Index),
        Record,
        Crash,
    }

    fn step() -> impl Strategy<Value = Step> {
        let index = any::<prop::sample::Index>;
        prop_oneof![
            4 => (1..4_u8).prop_map(Step::Insert),
            4 => index().prop_map(Step::Commit),
            6 => (1..6_usize, prop::bool::weighted(0.8)).prop_map(|(rows, all)| Step::Poll(rows, all)),
            4 => index().prop_map(Step::Log),
            2 => Just(Step::Look),
            8 => index().prop_map(Step::Settle),
            3 => Just(Step::Record),
            1 => Just(Step::Crash),
        ]
    }

    /// A database of rows by number, with their transaction; those that are open, and those not yet seen.
    #[derive(Default)]
    struct World {
        rows: BTreeMap<i64, u32>,
        xid: u32,
        open: Vec<u32>,
    }

    impl World {
        fn snapshot(&self) -> Snapshot {
            let open: Vec<String> = self.open.iter().map(ToString::to_string).collect();
            let xmin = self.open.iter().min().copied().unwrap_or(self.xid + 1);
            format!("{xmin}:{}:{}", self.xid + 1, open.join(",")).parse().unwrap()
        }

        fn seen(&self) -> impl Iterator<Item = (i64, u32)> {
            let seen = self.rows.iter().filter(|(_, xid)| !self.open.contains(xid));
            seen.map(|(number, xid)| (*number, *xid))
        }
    }

    proptest! {
        /// Polling, the log and crashes in any order: a row is handed over again only if it was not
        /// recorded as settled, and in the end all were.
        #[test]
        fn every_row_is_handed_over_and_none_twice(steps in prop::collection::vec(step(), 0..120)) {
            let mut world = World::default();
            let mut frontier = Frontier::default();
            let mut recorded = frontier.recorded([].into_iter());
            let (mut known, mut settled, mut durable) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
            let drain = [Step::Crash].into_iter().chain((0..400).map(|_| Step::Poll(3, true)));
            for step in steps.into_iter().chain(drain) {
                match step {
                    Step::Insert(rows) => {
                        world.xid += 1;
                        world.open.push(world.xid);
                        // Numbers of transactions are among each other.
                        for nth in 0..i64::from(rows) {
                            world.rows.insert(nth * 1000 + i64::from(world.xid), world.xid);
                        }
                    }
                    Step::Commit(index) if !world.open.is_empty() => {
                        world.open.swap_remove(index.index(world.open.len()));
                    }
                    Step::Poll(most, all) => {
                        let wanted = |(number, xid): &(i64, u32)| is_to_be_read(&frontier, *number, *xid);
                        let (late, tail): (Vec<_>, Vec<_>) =
                            world.seen().filter(wanted).partition(|(number, _)| *number <= frontier.upto);
                        let late_full = late.len() >= most;
                        let room = if late_full { 0 } else { most };
                        let mut found: Vec<i64> = late.iter().take(most).chain(tail.iter().take(room)).map(|row| row.0).collect();
                        let last = found.last().copied();
                        if !all {
                            found.truncate(found.len() / 2);
                        }
                        for number in found {
                            prop_assert!(known.insert(number), "{} was on its way", number);
                            prop_assert!(!durable.contains(&number), "{} was settled", number);
                            frontier.take(number, None);
                        }
                        if all && !late_full {
                            frontier.again = Runs::default();
                            frontier.advance(Some(world.snapshot()), last.unwrap_or(i64::MIN));
                        }
                    }
                    Step::Log(index) => {
                        // It never brings what polling or it had brought.
                        let fresh: Vec<(i64, u32)> = world.rows.iter().map(|(number, xid)| (*number, *xid))
                            .filter(|(number, xid)| is_to_be_read(&frontier, *number, *xid) && !known.contains(number) && !settled.contains(number))
                            .collect();
                        if !fresh.is_empty() {
                            let (number, xid) = fresh[index.index(fresh.len())];
                            known.insert(number);
                            frontier.take(number, Some(xid));
                        }
                    }
                    Step::Look => {
                        let strays: Vec<i64> = world.seen()
                            .filter(|(number, xid)| is_to_be_read(&frontier, *number, *xid))
                            .map(|row| row.0).collect();
                        strays.iter().for_each(|number| frontier.again.insert(*number));
                        let last = frontier.since.last().max(frontier.again.last());
                        frontier.advance(Some(world.snapshot()), last.unwrap_or(i64::MIN));
                    }
                    Step::Settle(index) if !known.is_empty() => {
                        settled.insert(*known.iter().nth(index.index(known.len())).unwrap());
                    }
                    Step::Commit(_) | Step::Settle(_) => {}
                    Step::Record => {
                        recorded = frontier.recorded(known.difference(&settled).copied());
                        known.retain(|number| !settled.contains(number));
                        durable.clone_from(&settled);
                    }
                    Step::Crash => {
                        frontier = recorded.clone().into();
                        // Of the log's rows that could not be seen yet nothing more is known than that they
                        // are done: they may come once more.
                        world.open.clear();
                        known.clear();
                        settled.clone_from(&durable);
                    }
                }
            }
            let all: BTreeSet<i64> = world.rows.keys().copied().collect();
            let handed: BTreeSet<i64> = known.union(&durable).copied().collect();
            prop_assert_eq!(handed, all);
        }
    }
}
