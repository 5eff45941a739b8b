//! Which rows of a log are settled, as a log wants to know it: how far without a gap.
//!
//! Pure. Rows are numbered from 0 in the order in which the log brought them to one table. A row is
//! settled by itself, or *deferred*: it is the table's, where polling finds it, and it counts as settled
//! once everything that polling has taken by then is.

use std::collections::VecDeque;

#[derive(Debug, Default)]
pub struct Acks {
    /// Everything below is settled.
    settled: u64,
    /// Everything from `settled` up to here is deferred.
    deferred: u64,
    /// The rows from `deferred` on: settled or not.
    rows: VecDeque<bool>,
}

impl Acks {
    /// The next row came, and waits for its own end. Returns its number.
    pub fn expect(&mut self) -> u64 {
        self.rows.push_back(false);
        self.deferred + self.rows.len() as u64 - 1
    }

    /// The next row came, and is the table's: so is everything before it.
    pub fn defer_next(&mut self) {
        self.rows.push_back(false);
        self.defer_all();
    }

    /// Everything that came and is not settled is the table's from now on.
    pub fn defer_all(&mut self) {
        self.deferred += self.rows.len() as u64;
        self.rows.clear();
    }

    /// A row is settled by itself; one that was deferred meanwhile is left to the table.
    pub fn settle(&mut self, number: u64) {
        if let Some(index) = number.checked_sub(self.deferred)
            && let Some(row) = self.rows.get_mut(index as usize)
        {
            *row = true;
        }
        self.advance();
    }

    /// What was deferred is settled.
    pub fn settle_deferred(&mut self) {
        self.settled = self.deferred;
        self.advance();
    }

    pub fn has_deferred(&self) -> bool {
        self.settled < self.deferred
    }

    /// How many rows are settled, counted from the first without a gap.
    pub fn settled(&self) -> u64 {
        self.settled
    }

    fn advance(&mut self) {
        if self.has_deferred() {
            return;
        }
        while self.rows.front() == Some(&true) {
            self.rows.pop_front();
            self.settled += 1;
        }
        self.deferred = self.settled;
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Expect,
        DeferNext,
        DeferAll,
        Settle(prop::sample::Index),
        SettleDeferred,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            4 => Just(Step::Expect),
            1 => Just(Step::DeferNext),
            1 => Just(Step::DeferAll),
            6 => any::<prop::sample::Index>().prop_map(Step::Settle),
            1 => Just(Step::SettleDeferred),
        ]
    }

    #[derive(Clone, Copy, PartialEq, Eq)]
    enum Row {
        Open,
        Deferred,
        Settled,
    }

    proptest! {
        /// Against a list of rows.
        #[test]
        fn it_counts_as_a_list_would(steps in prop::collection::vec(step(), 0..200)) {
            let mut acks = Acks::default();
            let mut rows: BTreeMap<u64, Row> = BTreeMap::new();
            for step in steps {
                let next = rows.len() as u64;
                let defer = |rows: &mut BTreeMap<u64, Row>| {
                    // One that is settled above an open one is the table's too: it looks there once more.
                    let first = rows.iter().find(|(_, row)| **row != Row::Settled).map(|(number, _)| *number);
                    for (number, row) in rows.iter_mut() {
                        if first.is_some_and(|first| *number >= first) {
                            *row = Row::Deferred;
                        }
                    }
                };
                match step {
                    Step::Expect => {
                        prop_assert_eq!(acks.expect(), next);
                        rows.insert(next, Row::Open);
                    }
                    Step::DeferNext => {
                        acks.defer_next();
                        rows.insert(next, Row::Open);
                        defer(&mut rows);
                    }
                    Step::DeferAll => {
                        acks.defer_all();
                        defer(&mut rows);
                    }
                    Step::Settle(index) if next > 0 => {
                        let number = index.index(next as usize) as u64;
                        acks.settle(number);
                        if rows[&number] == Row::Open {
                            rows.insert(number, Row::Settled);
                        }
                    }
                    Step::Settle(_) => {}
                    Step::SettleDeferred => {
                        acks.settle_deferred();
                        rows.values_mut().filter(|row| **row == Row::Deferred).for_each(|row| *row = Row::Settled);
                    }
                }
                let settled = rows.values().take_while(|row| **row == Row::Settled).count() as u64;
                prop_assert_eq!(acks.settled(), settled);
                prop_assert_eq!(acks.has_deferred(), rows.values().any(|row| *row == Row::Deferred));
            }
        }
    }
}
