//! Which numbers a read looks at: all but those whose rows this relay has in its hands, or has recorded.
//!
//! A number is taken when its row is inserted, and seen when its transaction commits; which transactions
//! are between the two MySQL does not tell. So nothing is concluded from a number that was passed: every
//! read begins at the head of the table, and leaves out what is known and what is gone. What is left is a
//! few ranges, because the numbers of an outbox mostly follow one another, and a row that commits late is
//! in one of them.

use std::fmt::Write as _;

use crate::source::kept::Runs;

/// More ranges than this are told to the server as one, with the known numbers of it as a list.
const RANGES_AT_MOST: usize = 64;
/// More runs of what is gone are not remembered: forgetting one costs a look over nothing.
const GONE_AT_MOST: usize = 1_000;

/// Numbers whose rows were deleted or marked here: nothing comes there again.
#[derive(Debug, Default)]
pub(super) struct Gone(Runs);

impl Gone {
    pub fn add(&mut self, numbers: impl Iterator<Item = i64>) {
        numbers.for_each(|number| self.0.insert(number));
        while self.0.runs() > GONE_AT_MOST {
            let Some((_, last)) = self.0.ranges().next() else { return };
            self.0.remove_to(last);
        }
    }

    pub fn has(&self, number: i64) -> bool {
        self.0.contains(number)
    }

    pub fn clear(&mut self) {
        self.0 = Runs::default();
    }
}

/// The condition that a number is in a gap, for a read in the order of the numbers.
pub(super) fn condition(column: &str, known: &Runs, gone: Option<&Gone>) -> String {
    let mut taken = known.clone();
    if let Some(Gone(gone)) = gone {
        gone.ranges().for_each(|(first, last)| taken.insert_range(first, last));
    }
    let ranges: Vec<(i64, i64)> = taken.ranges().collect();
    // The newest gaps one by one, the older ones as one.
    let split = ranges.len().saturating_sub(RANGES_AT_MOST);
    let mut text = String::from("(");
    let mut from = None;
    if let Some((first, _)) = ranges.get(split).filter(|_| split > 0) {
        let _ = write!(text, "{column} < {first}");
        let mut excluded =
            known.ranges().take_while(|(_, last)| last < first).flat_map(|(first, last)| first..=last);
        if let Some(one) = excluded.next() {
            let _ = write!(text, " AND {column} NOT IN ({one}");
            excluded.for_each(|number| {
                let _ = write!(text, ",{number}");
            });
            text.push(')');
        }
        text.push_str(" OR ");
    } else if let Some((first, _)) = ranges.first() {
        let _ = write!(text, "{column} < {first} OR ");
    }
    for (first, last) in &ranges[split..] {
        if let Some(from) = from {
            let _ = write!(text, "{column} BETWEEN {from} AND {} OR ", first - 1);
        }
        from = last.checked_add(1);
    }
    let _ = match (from, ranges.is_empty()) {
        (Some(from), _) => write!(text, "{column} >= {from})"),
        (None, true) => write!(text, "TRUE)"),
        (None, false) => write!(text, "FALSE)"),
    };
    text
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn runs(numbers: &[i64]) -> Runs {
        numbers.iter().copied().collect()
    }

    #[test]
    fn what_is_taken_is_left_out_as_ranges() {
        assert_eq!(condition("n", &Runs::default(), None), "(TRUE)");
        assert_eq!(condition("n", &runs(&[5, 6, 9]), None), "(n < 5 OR n BETWEEN 7 AND 8 OR n >= 10)");
        let mut gone = Gone::default();
        gone.add([1, 2, 3, 4].into_iter());
        assert_eq!(condition("n", &runs(&[5, 6, 9]), Some(&gone)), "(n < 1 OR n BETWEEN 7 AND 8 OR n >= 10)");
        assert_eq!(condition("n", &runs(&[i64::MAX]), None), format!("(n < {} OR FALSE)", i64::MAX));
    }

    #[test]
    fn many_gaps_are_one() {
        let odd: Vec<i64> = (0..200).map(|n| 2 * n).collect();
        let text = condition("n", &runs(&odd), None);
        assert!(text.starts_with("(n < 272 AND n NOT IN (0,2,4,"), "{text}");
        assert!(text.contains(",268,270) OR n BETWEEN 273 AND 273 OR "), "{text}");
        assert!(text.ends_with(" OR n >= 399)"), "{text}");
    }

    #[test]
    fn what_is_gone_is_forgotten_from_its_beginning() {
        let mut gone = Gone::default();
        gone.add((0..5_000).map(|n| 2 * n));
        assert!(!gone.has(0) && gone.has(2 * 4_999) && gone.has(2 * 4_000) && !gone.has(2 * 3_999));
    }

    /// What the condition says of a number, told by reading it.
    fn says(text: &str, number: i64) -> bool {
        let text = text.trim_start_matches('(').trim_end_matches(')');
        text.split(" OR ").any(|part| {
            let words: Vec<&str> = part.split(' ').collect();
            let value = |nth: usize| words[nth].parse::<i64>().unwrap();
            match words[..] {
                ["TRUE"] => true,
                ["FALSE"] => false,
                ["n", "<", _] => number < value(2),
                ["n", ">=", _] => number >= value(2),
                ["n", "BETWEEN", ..] => (value(2)..=value(4)).contains(&number),
                ["n", "<", _, "AND", "n", "NOT", "IN", list] => {
                    let list = list.trim_start_matches('(').trim_end_matches(')');
                    number < value(2) && !list.split(',').any(|one| one.parse::<i64>().unwrap() == number)
                }
                _ => panic!("{part}"),
            }
        })
    }

    proptest! {
        #[test]
        fn a_read_looks_at_all_but_what_is_known_and_at_nothing_of_the_newest_that_is_gone(
            known in prop::collection::btree_set(0..400_i64, 0..300),
            gone in prop::collection::btree_set(0..400_i64, 0..300),
        ) {
            let mut recorded = Gone::default();
            recorded.add(gone.iter().copied());
            let text = condition("n", &known.iter().copied().collect(), Some(&recorded));
            for number in -1..402 {
                let looked = says(&text, number);
                prop_assert!(!looked || !known.contains(&number), "{} is known: {}", number, text);
                prop_assert!(looked || known.contains(&number) || gone.contains(&number), "{} is missed: {}", number, text);
            }
        }
    }
}
