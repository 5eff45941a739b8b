//! Places and moments of a binlog, MySQL's or MariaDB's.
//!
//! A transaction is in the log before others can see what it did: by microseconds, or for as long as a
//! semi-synchronous replica takes to answer. So how far the log had come tells nothing of what a read sees.
//! What does: a transaction that is in `gtid_executed`, or one that the server has said to be before the
//! last that it made visible.

use std::sync::Arc;

use super::Unreadable;
pub use super::gtids::{Gtid, GtidSet};

/// The number by which replicas tell a server from others.
pub type ServerId = u32;

/// A place in the log of one server: the number of the file, and the bytes before it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Coordinates {
    pub file: u64,
    pub at: u64,
}

impl Coordinates {
    /// By the file's name, which ends with its number.
    pub fn new(file: &str, at: u64) -> Result<Coordinates, Unreadable> {
        let number = file.rsplit_once('.').and_then(|(_, number)| number.parse().ok());
        number.map(|file| Coordinates { file, at }).ok_or(Unreadable("the name of a file of the binlog"))
    }
}

/// A transaction's place: its end. MariaDB's transactions are told apart by that alone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    pub gtid: Option<Gtid>,
    pub end: Coordinates,
}

/// What polling has seen, or is to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub visible: Visible,
    /// Everything that could be seen at that moment is in the log before this.
    pub end: Coordinates,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Visible {
    /// The transactions of this set.
    Gtids(GtidSet),
    /// Everything in the log up to here.
    UpTo(Coordinates),
}

impl Seen {
    pub fn sees(&self, commit: &Commit) -> bool {
        match &self.visible {
            Visible::Gtids(set) => commit.gtid.as_ref().is_some_and(|gtid| set.contains(gtid)),
            Visible::UpTo(place) => commit.end <= *place,
        }
    }
}

/// Shared by all rows of a transaction.
pub type SharedCommit = Arc<Commit>;

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: &str = "3e11fa47-71ca-11e1-9e33-c80aa9429562";

    fn gtid(source: &str, number: u64) -> Gtid {
        Gtid { source: source.into(), number }
    }

    #[test]
    fn files_are_in_the_order_of_their_numbers() {
        let at = |file, at| Coordinates::new(file, at).unwrap();
        assert!(at("binlog.000009", 900) < at("binlog.000010", 4));
        assert!(at("a.b.999999", 4) < at("a.b.1000000", 4));
        assert!(Coordinates::new("binlog", 4).is_err() && Coordinates::new("binlog.index", 4).is_err());
    }

    #[test]
    fn a_moment_sees_by_what_the_server_tells() {
        let commit = |gtid, at| Commit { gtid, end: Coordinates { file: 1, at } };
        let end = Coordinates { file: 1, at: 100 };
        let by_set = Seen { visible: Visible::Gtids(format!("{A}:1-5").parse().unwrap()), end };
        assert!(by_set.sees(&commit(Some(gtid(A, 5)), 500)));
        // It is in the log already, and cannot be seen yet.
        assert!(!by_set.sees(&commit(Some(gtid(A, 6)), 50)));
        assert!(!by_set.sees(&commit(None, 50)));
        let by_place = Seen { visible: Visible::UpTo(Coordinates { file: 1, at: 80 }), end };
        assert!(by_place.sees(&commit(None, 80)) && !by_place.sees(&commit(None, 81)));
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in ".{0,80}") {
            let _ = Coordinates::new(&text, 0);
        }
    }
}
