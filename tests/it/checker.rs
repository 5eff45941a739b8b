//! The outside checker: what a consumer saw, against what the database committed.
//!
//! contract.md section 5: within a key, A is earlier than B if A's commit returned before B's row
//! was inserted, or both are in one transaction and A was inserted first.

use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

use crate::harness::Seen;

/// One row that a writer inserted.
#[derive(Clone, Debug)]
pub struct Written {
    pub id: String,
    pub key: String,
    pub payload: Vec<u8>,
    pub transaction: u64,
    /// Just before its INSERT was sent.
    pub inserted: Instant,
    /// Its place among the rows of its transaction.
    pub nth: usize,
    /// When COMMIT had returned; `None` where it was rolled back.
    pub committed: Option<Instant>,
}

impl Written {
    fn is_earlier_than(&self, other: &Written) -> bool {
        match self.committed {
            _ if self.transaction == other.transaction => self.nth < other.nth,
            Some(committed) => committed < other.inserted,
            None => false,
        }
    }
}

/// Partition and offset.
type At = (i32, i64);

#[derive(Debug)]
pub struct Verdict {
    pub published: usize,
    pub repeats: usize,
    /// Pairs of one key whose order was asserted.
    pub pairs: usize,
}

/// Compares, and panics at the first thing that is wrong.
pub fn check(written: &[Written], seen: &[Seen]) -> Verdict {
    let committed: HashMap<&str, &Written> =
        written.iter().filter(|row| row.committed.is_some()).map(|row| (row.id.as_str(), row)).collect();
    let mut first: HashMap<&str, At> = HashMap::new();
    for record in seen {
        let id = record.header("id").expect("every record has an id");
        let Some(row) = committed.get(id) else {
            panic!("{id} was published and never committed");
        };
        assert_eq!(record.key.as_deref(), Some(row.key.as_bytes()), "key of {id}");
        assert_eq!(record.payload.as_deref(), Some(&row.payload[..]), "payload of {id}");
        first.entry(id).or_insert((record.partition, record.offset));
    }
    let lost: Vec<&&str> = committed.keys().filter(|id| !first.contains_key(**id)).take(10).collect();
    assert!(
        lost.is_empty(),
        "{} of {} rows are lost: {lost:?} …",
        committed.len() - first.len(),
        committed.len()
    );

    let mut keys: HashMap<&str, Vec<(&Written, At)>> = HashMap::new();
    for (id, at) in &first {
        let row = committed[id];
        keys.entry(row.key.as_str()).or_default().push((row, *at));
    }
    let mut pairs = 0;
    for (key, rows) in &mut keys {
        pairs += ordered(key, rows);
    }
    Verdict { published: first.len(), repeats: seen.len() - first.len(), pairs }
}

/// Asserts the order of one key, in one walk along the partition, and returns the number of pairs that
/// have an order. Of what was passed already, the latest INSERT counts: whoever committed before that
/// one and comes only now was overtaken. (A row's COMMIT is never before an INSERT of its own
/// transaction.)
fn ordered(key: &str, rows: &mut [(&Written, At)]) -> usize {
    rows.sort_by_key(|(_, at)| *at);
    let mut latest: Option<&Written> = None;
    let mut furthest: HashMap<u64, &Written> = HashMap::new();
    for (row, at) in &*rows {
        assert_eq!(at.0, rows[0].1.0, "key {key} is on two partitions");
        for passed in latest.iter().chain(furthest.get(&row.transaction)) {
            assert!(!row.is_earlier_than(passed), "{} overtook {} in key {key}", passed.id, row.id);
        }
        if latest.is_none_or(|latest| latest.inserted < row.inserted) {
            latest = Some(row);
        }
        let in_transaction = furthest.entry(row.transaction).or_insert(row);
        if in_transaction.nth < row.nth {
            *in_transaction = row;
        }
    }
    let mut committed: Vec<Instant> = rows.iter().filter_map(|(row, _)| row.committed).collect();
    committed.sort_unstable();
    let between: usize =
        rows.iter().map(|(row, _)| committed.partition_point(|committed| *committed < row.inserted)).sum();
    let mut sizes: HashMap<u64, usize> = HashMap::new();
    for (row, _) in &*rows {
        *sizes.entry(row.transaction).or_default() += 1;
    }
    between + sizes.values().map(|size| size * (size - 1) / 2).sum::<usize>()
}

/// The checker must be able to say no.
mod tests {
    use super::*;

    fn written(id: &str, transaction: u64, nth: usize, inserted: u64, committed: Option<u64>) -> Written {
        let at = |ms| Instant::now() + Duration::from_secs(1000) + Duration::from_secs(ms);
        Written {
            id: id.into(),
            key: "k".into(),
            payload: id.into(),
            transaction,
            inserted: at(inserted),
            nth,
            committed: committed.map(at),
        }
    }

    fn seen(ids: &[&str]) -> Vec<Seen> {
        let record = |(offset, id): (usize, &&str)| Seen {
            partition: 0,
            offset: offset as i64,
            timestamp: None,
            key: Some(b"k".to_vec()),
            payload: Some(id.as_bytes().to_vec()),
            headers: vec![("id".into(), Some(id.as_bytes().to_vec()))],
        };
        ids.iter().enumerate().map(record).collect()
    }

    fn refuses(rows: &[Written], ids: &[&str]) -> bool {
        let (rows, ids) = (rows.to_vec(), seen(ids));
        std::panic::catch_unwind(move || check(&rows, &ids)).is_err()
    }

    #[test]
    fn the_checker_sees_loss_ghosts_and_every_kind_of_overtaking() {
        let rows = [
            written("a", 1, 0, 0, Some(10)),
            written("b", 1, 1, 5, Some(10)),
            written("c", 2, 0, 20, Some(30)),
            // Began before c committed: no order with it.
            written("d", 3, 0, 25, Some(40)),
            written("x", 4, 0, 1, None),
        ];
        let verdict = check(&rows, &seen(&["a", "b", "d", "a", "c"]));
        assert_eq!((verdict.published, verdict.repeats, verdict.pairs), (4, 1, 5));
        assert!(refuses(&rows, &["a", "b", "c"]), "d is lost");
        assert!(refuses(&rows, &["a", "b", "c", "d", "x"]), "x was rolled back");
        assert!(refuses(&rows, &["b", "a", "c", "d"]), "within a transaction");
        assert!(refuses(&rows, &["a", "c", "b", "d"]), "between transactions");
    }
}
