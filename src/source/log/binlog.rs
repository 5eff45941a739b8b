//! Places and moments of a binlog, MySQL's or MariaDB's.
//!
//! A transaction is in the log before others can see what it did: by microseconds, or for as long as a
//! semi-synchronous replica takes to answer. So how far the log had come tells nothing of what a read sees.
//! What does: a transaction that is in `gtid_executed`, or one that the server has said to be before the
//! last that it made visible.

use std::{collections::HashMap, str::FromStr, sync::Arc};

use super::Unreadable;

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

/// One transaction: `source` is a UUID, with `:tag` where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gtid {
    pub source: Box<str>,
    pub number: u64,
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

/// `uuid:1-5:7:tag:1-3,uuid:…`, as `gtid_executed` has it. (MySQL documentation: "GTID Format and Storage".)
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GtidSet(HashMap<Box<str>, Vec<(u64, u64)>>);

impl GtidSet {
    pub fn contains(&self, gtid: &Gtid) -> bool {
        let Some(intervals) = self.0.get(&gtid.source) else { return false };
        let after = intervals.partition_point(|(first, _)| *first <= gtid.number);
        after.checked_sub(1).is_some_and(|index| gtid.number <= intervals[index].1)
    }
}

impl FromStr for GtidSet {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<GtidSet, Unreadable> {
        let wrong = || Unreadable("a set of GTIDs");
        let mut set = GtidSet::default();
        for one in text.split(',').map(str::trim).filter(|one| !one.is_empty()) {
            let mut parts = one.split(':').map(str::trim);
            let uuid = parts.next().filter(|uuid| uuid.len() == 36).ok_or_else(wrong)?.to_ascii_lowercase();
            let mut source = uuid.clone();
            for part in parts {
                if !part.starts_with(|c: char| c.is_ascii_digit()) {
                    source = format!("{uuid}:{part}");
                    continue;
                }
                let (first, last) = part.split_once('-').unwrap_or((part, part));
                let interval = (first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
                set.0.entry(source.as_str().into()).or_default().push(interval);
            }
        }
        set.0.values_mut().for_each(|intervals| intervals.sort_unstable());
        Ok(set)
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
    fn a_set_has_what_its_text_says() {
        let set: GtidSet = format!("{A}:7:1-5:tag_a:2:4-6,\n{}:1", A.to_uppercase().replace("3E11", "4E11"))
            .parse()
            .unwrap();
        for (source, number, has) in [
            (A.to_owned(), 1, true),
            (A.to_owned(), 5, true),
            (A.to_owned(), 6, false),
            (A.to_owned(), 7, true),
            (A.to_owned(), 8, false),
            (format!("{A}:tag_a"), 1, false),
            (format!("{A}:tag_a"), 2, true),
            (format!("{A}:tag_a"), 6, true),
            (format!("{A}:tag_b"), 6, false),
            (A.replace("3e11", "4e11"), 1, true),
        ] {
            assert_eq!(set.contains(&gtid(&source, number)), has, "{source}:{number}");
        }
        assert_eq!("".parse::<GtidSet>(), Ok(GtidSet::default()));
        assert!("0-1-5".parse::<GtidSet>().is_err() && format!("{A}:x-").parse::<GtidSet>().is_ok());
        assert!(format!("{A}:1-x").parse::<GtidSet>().is_err());
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
        fn it_counts_as_a_list_would(numbers in prop::collection::btree_set(1_u64..60, 0..30)) {
            let text = numbers.iter().fold(A.to_owned(), |text, number| format!("{text}:{number}"));
            let set: GtidSet = text.parse().unwrap();
            for number in 0..62 {
                prop_assert_eq!(set.contains(&gtid(A, number)), numbers.contains(&number));
            }
        }

        #[test]
        fn any_text_is_taken_or_refused(text in ".{0,80}") {
            let _ = text.parse::<GtidSet>();
            let _ = Coordinates::new(&text, 0);
        }
    }
}
