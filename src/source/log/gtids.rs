//! GTIDs of MySQL, and sets of them.

use std::{collections::BTreeMap, fmt, str::FromStr};

use super::Unreadable;

/// One transaction: `source` is a UUID, with `:tag` where there is one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Gtid {
    pub source: Box<str>,
    pub number: u64,
}

/// `uuid:1-5:7:tag:1-3,uuid:…`, as `gtid_executed` has it. (MySQL documentation: "GTID Format and Storage".)
/// Of each source the intervals are in order, and none touches the next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GtidSet(BTreeMap<Box<str>, Vec<(u64, u64)>>);

impl GtidSet {
    pub fn contains(&self, gtid: &Gtid) -> bool {
        self.has(&gtid.source, gtid.number, gtid.number)
    }

    fn has(&self, source: &str, first: u64, last: u64) -> bool {
        let Some(intervals) = self.0.get(source) else { return false };
        let after = intervals.partition_point(|(begin, _)| *begin <= first);
        after.checked_sub(1).is_some_and(|index| last <= intervals[index].1)
    }

    /// Whether all of these are in it.
    pub fn includes(&self, others: &GtidSet) -> bool {
        others.intervals().all(|(source, (first, last))| self.has(source, first, last))
    }

    pub fn add(&mut self, gtid: &Gtid) {
        self.add_all(&gtid.source, gtid.number, gtid.number);
    }

    pub fn extend(&mut self, others: &GtidSet) {
        others.intervals().for_each(|(source, (first, last))| self.add_all(source, first, last));
    }

    fn add_all(&mut self, source: &str, first: u64, last: u64) {
        if first > last {
            return;
        }
        let intervals = match self.0.get_mut(source) {
            Some(intervals) => intervals,
            None => self.0.entry(source.into()).or_default(),
        };
        // Those that it touches become one with it.
        let from = intervals.partition_point(|(_, end)| end.saturating_add(1) < first);
        let to = intervals.partition_point(|(begin, _)| *begin <= last.saturating_add(1));
        let mut one = (first, last);
        if from < to {
            one = (first.min(intervals[from].0), last.max(intervals[to - 1].1));
        }
        intervals.splice(from..to, [one]);
    }

    /// By source: the first and the last number of each interval.
    fn intervals(&self) -> impl Iterator<Item = (&str, (u64, u64))> {
        self.0.iter().flat_map(|(source, intervals)| intervals.iter().map(move |one| (&**source, *one)))
    }

    pub fn sources(&self) -> impl Iterator<Item = (&str, &[(u64, u64)])> {
        self.0.iter().map(|(source, intervals)| (&**source, &intervals[..]))
    }
}

impl fmt::Display for GtidSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (nth, (source, intervals)) in self.sources().enumerate() {
            write!(f, "{}{source}", if nth == 0 { "" } else { "," })?;
            for (first, last) in intervals {
                if first == last { write!(f, ":{first}")? } else { write!(f, ":{first}-{last}")? }
            }
        }
        Ok(())
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
                set.add_all(&source, first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?);
            }
        }
        Ok(set)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    const A: &str = "3e11fa47-71ca-11e1-9e33-c80aa9429562";

    fn gtid(source: &str, number: u64) -> Gtid {
        Gtid { source: source.into(), number }
    }

    fn set_of(numbers: &BTreeSet<u64>) -> GtidSet {
        let text = numbers.iter().fold(A.to_owned(), |text, number| format!("{text}:{number}"));
        text.parse().unwrap()
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
        let written = format!("{A}:1-5:7,{A}:tag_a:2:4-6,{}:1", A.replace("3e11", "4e11"));
        assert_eq!(set.to_string(), written);
        assert_eq!("".parse::<GtidSet>(), Ok(GtidSet::default()));
        assert!("0-1-5".parse::<GtidSet>().is_err() && format!("{A}:x-").parse::<GtidSet>().is_ok());
        assert!(format!("{A}:1-x").parse::<GtidSet>().is_err());
    }

    proptest! {
        #[test]
        fn it_counts_as_a_list_would(
            numbers in prop::collection::btree_set(1_u64..60, 0..30),
            others in prop::collection::btree_set(1_u64..60, 0..30),
        ) {
            let (mut set, other) = (set_of(&numbers), set_of(&others));
            for number in 0..62 {
                prop_assert_eq!(set.contains(&gtid(A, number)), numbers.contains(&number));
            }
            prop_assert_eq!(set.includes(&other), others.is_subset(&numbers));
            prop_assert_eq!(set.to_string().parse(), Ok(set.clone()));
            set.extend(&other);
            prop_assert_eq!(set, set_of(&numbers.union(&others).copied().collect()));
        }

        #[test]
        fn the_order_in_which_they_are_added_does_not_matter(numbers in prop::collection::vec(1_u64..40, 1..60)) {
            let mut set = GtidSet::default();
            numbers.iter().for_each(|number| set.add(&gtid(A, *number)));
            prop_assert_eq!(set, set_of(&numbers.into_iter().collect()));
        }

        #[test]
        fn any_text_is_taken_or_refused(text in ".{0,80}") {
            let _ = text.parse::<GtidSet>();
        }
    }
}
