//! Transactions whose rows are on their way: how far a log is settled, and what of it waits. Pure.

use std::{collections::VecDeque, sync::Arc};

use super::Progress;

/// Transactions that are told apart. Beyond it several are settled as one.
const AT_MOST: usize = 4096;

/// A transaction that has rows of ours, or several in a row.
#[derive(Debug)]
struct Transaction<P> {
    /// The place behind it, which is settled when it is.
    behind: P,
    /// When it committed, by the server's clock.
    when: i64,
    /// For each table: how many of its rows must be settled.
    marks: Vec<(usize, u64)>,
}

/// Of one reading, by places of the log.
#[derive(Debug)]
pub struct Open<P> {
    /// For each table: how far it has settled its rows, and how many came so far.
    tables: Vec<(Arc<Progress>, u64)>,
    transactions: VecDeque<Transaction<P>>,
    settled: P,
}

impl<P> Open<P> {
    pub fn new(tables: Vec<Arc<Progress>>, settled: P) -> Open<P> {
        let tables = tables.into_iter().map(|progress| (progress, 0)).collect();
        Open { tables, transactions: VecDeque::new(), settled }
    }

    /// A row of this table has come.
    pub fn came(&mut self, table: usize) {
        self.tables[table].1 += 1;
    }

    /// A transaction has ended that has rows of these tables. Returns the place that it moves, if it is not told apart
    /// from the one before.
    pub fn end(
        &mut self,
        tables: impl IntoIterator<Item = usize>,
        when: i64,
        behind: impl FnOnce() -> P,
    ) -> Option<&mut P> {
        let marks: Vec<(usize, u64)> =
            tables.into_iter().map(|table| (table, self.tables[table].1)).collect();
        if !marks.is_empty() && self.transactions.len() < AT_MOST {
            self.transactions.push_back(Transaction { behind: behind(), when, marks });
            return None;
        }
        for (table, came) in marks {
            let Some(last) = self.transactions.back_mut() else { break };
            match last.marks.iter_mut().find(|(there, _)| *there == table) {
                Some((_, mark)) => *mark = came,
                None => last.marks.push((table, came)),
            }
        }
        Some(self.last())
    }

    /// The place that moves with what has no rows of ours.
    pub fn last(&mut self) -> &mut P {
        match self.transactions.back_mut() {
            Some(last) => &mut last.behind,
            None => &mut self.settled,
        }
    }

    /// Up to where every row is settled: never in the middle of a transaction. `join` moves a place to a later one.
    pub fn settled(&mut self, join: impl Fn(&mut P, P)) -> &P {
        let is_settled = |(table, count): &(usize, u64)| self.tables[*table].0.settled() >= *count;
        while let Some(first) = self.transactions.pop_front_if(|first| first.marks.iter().all(is_settled)) {
            join(&mut self.settled, first.behind);
        }
        &self.settled
    }

    pub fn is_empty(&self) -> bool {
        self.transactions.is_empty()
    }

    /// How many rows of a table came and are not settled, and when the oldest was committed; `None`: it is in the
    /// transaction that is being read.
    pub fn unsettled(&self, table: usize) -> (u64, Option<i64>) {
        let (progress, came) = &self.tables[table];
        let settled = progress.settled();
        let waits =
            |open: &&Transaction<P>| open.marks.iter().any(|(of, count)| *of == table && settled < *count);
        let when = self.transactions.iter().find(waits).map(|open| open.when);
        (came.saturating_sub(settled), when)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settled(open: &mut Open<u64>) -> u64 {
        *open.settled(|settled, behind| *settled = behind)
    }

    #[test]
    fn a_place_is_settled_with_every_row_before_it() {
        let tables = [Arc::new(Progress::default()), Arc::new(Progress::default())];
        let mut open = Open::new(tables.to_vec(), 0);
        *open.end([], 0, || 0).unwrap() = 10;
        assert_eq!(settled(&mut open), 10, "nothing of ours");
        [0, 0, 1].into_iter().for_each(|table| open.came(table));
        assert!(open.end([0, 1], 7, || 20).is_none());
        open.came(1);
        assert!(open.end([1], 8, || 30).is_none());
        *open.last() = 35;
        assert_eq!((open.unsettled(0), open.unsettled(1)), ((2, Some(7)), (2, Some(7))));
        tables[1].settle(2);
        assert_eq!(settled(&mut open), 10, "a row of the first waits");
        assert_eq!(open.unsettled(1), (0, None));
        tables[0].settle(2);
        assert_eq!(settled(&mut open), 35);
        assert!(open.is_empty());
    }

    #[test]
    fn too_many_to_be_told_apart_are_settled_as_one() {
        let table = Arc::new(Progress::default());
        let mut open = Open::new(vec![table.clone()], 0);
        let more = 3;
        for n in 1..=(AT_MOST + more) as u64 {
            open.came(0);
            if let Some(place) = open.end([0], 0, || n) {
                *place = n;
            }
        }
        table.settle(AT_MOST as u64);
        assert_eq!(settled(&mut open), AT_MOST as u64 - 1);
        table.settle((AT_MOST + more) as u64);
        assert_eq!(settled(&mut open), (AT_MOST + more) as u64);
    }
}
