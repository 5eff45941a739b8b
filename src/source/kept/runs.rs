//! A set of numbers as runs: those of an outbox mostly follow one another.

use std::{collections::BTreeMap, fmt};

/// Not a set of numbers as [`Runs`] writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("not a set of numbers")]
pub struct NotRuns;

/// The first number of each run, and its last. Runs neither meet nor touch.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Runs(BTreeMap<i64, i64>);

impl Runs {
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// How many runs there are.
    pub fn runs(&self) -> usize {
        self.0.len()
    }

    pub fn last(&self) -> Option<i64> {
        self.0.values().next_back().copied()
    }

    pub fn contains(&self, number: i64) -> bool {
        self.around(number).is_some()
    }

    /// The run that has this number: its first and its last.
    pub fn around(&self, number: i64) -> Option<(i64, i64)> {
        let (first, last) = self.0.range(..=number).next_back()?;
        (*last >= number).then_some((*first, *last))
    }

    pub fn insert(&mut self, number: i64) {
        if self.contains(number) {
            return;
        }
        let before = number.checked_sub(1).and_then(|before| self.around(before));
        let after = number.checked_add(1).and_then(|after| self.0.remove(&after));
        self.0.insert(before.map_or(number, |(first, _)| first), after.unwrap_or(number));
    }

    /// Whether it was there.
    pub fn remove(&mut self, number: i64) -> bool {
        let Some((first, last)) = self.around(number) else { return false };
        self.0.remove(&first);
        if first < number {
            self.0.insert(first, number - 1);
        }
        if number < last {
            self.0.insert(number + 1, last);
        }
        true
    }

    /// Removes everything up to this number.
    pub fn remove_to(&mut self, number: i64) {
        while let Some(run) = self.0.first_entry().filter(|run| *run.key() <= number) {
            let (_, last) = run.remove_entry();
            if last > number {
                self.0.insert(number + 1, last);
            }
        }
    }

    /// The runs that have numbers above this one.
    pub fn above(&self, number: i64) -> Runs {
        Runs(self.ranges().filter(|(_, last)| *last > number).collect())
    }

    /// The first number of each run, and its last.
    pub fn ranges(&self) -> impl Iterator<Item = (i64, i64)> {
        self.0.iter().map(|(first, last)| (*first, *last))
    }

    /// Adds the numbers from `first` to `last`.
    pub fn insert_range(&mut self, first: i64, last: i64) {
        let mut run = (first, last);
        let touches = |one: &(i64, i64), run: &(i64, i64)| {
            one.0 <= run.1.saturating_add(1) && run.0 <= one.1.saturating_add(1)
        };
        while let Some(other) = self
            .0
            .range(..=run.1.saturating_add(1))
            .next_back()
            .map(|(f, l)| (*f, *l))
            .filter(|one| touches(one, &run))
        {
            self.0.remove(&other.0);
            run = (run.0.min(other.0), run.1.max(other.1));
        }
        self.0.insert(run.0, run.1);
    }

    pub fn iter(&self) -> impl Iterator<Item = i64> {
        self.0.iter().flat_map(|(first, last)| *first..=*last)
    }

    /// As the text of a multirange of PostgreSQL, as it prints one.
    pub fn multirange(&self) -> String {
        self.to_string()
    }

    pub fn from_multirange(text: &str) -> Result<Runs, NotRuns> {
        let inner = text.strip_prefix('{').and_then(|rest| rest.strip_suffix('}')).ok_or(NotRuns)?;
        let mut runs = BTreeMap::new();
        for range in inner.split_terminator(')') {
            let range = range.trim_start_matches(',').strip_prefix('[').ok_or(NotRuns)?;
            let (first, end) = range.split_once(',').ok_or(NotRuns)?;
            let first = first.parse().map_err(|_| NotRuns)?;
            let last = match end {
                "" => i64::MAX,
                end => end.parse::<i64>().map_err(|_| NotRuns)? - 1,
            };
            runs.insert(first, last);
        }
        Ok(Runs(runs))
    }

    /// As a JSON array of pairs: first and last.
    pub fn json(&self) -> String {
        serde_json::json!(self.0.iter().collect::<Vec<_>>()).to_string()
    }

    pub fn from_json(text: &str) -> Result<Runs, NotRuns> {
        let pairs: Vec<(i64, i64)> = serde_json::from_str(text).map_err(|_| NotRuns)?;
        Ok(Runs(pairs.into_iter().collect()))
    }
}

impl fmt::Display for Runs {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("{")?;
        for (nth, (first, last)) in self.0.iter().enumerate() {
            let comma = if nth > 0 { "," } else { "" };
            // A range ends before a number, and there is none behind the last.
            match last.checked_add(1) {
                Some(end) => write!(f, "{comma}[{first},{end})")?,
                None => write!(f, "{comma}[{first},)")?,
            }
        }
        f.write_str("}")
    }
}

impl FromIterator<i64> for Runs {
    fn from_iter<I: IntoIterator<Item = i64>>(numbers: I) -> Runs {
        let mut numbers: Vec<i64> = numbers.into_iter().collect();
        numbers.sort_unstable();
        numbers.dedup();
        let runs = numbers.chunk_by(|one, next| one.checked_add(1) == Some(*next));
        Runs(runs.map(|run| (run[0], run[run.len() - 1])).collect())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// Against a set.
        #[test]
        fn they_are_a_set(steps in prop::collection::vec((0..5_u8, 0..40_i64), 0..200), high: bool) {
            let (mut runs, mut set) = (Runs::default(), BTreeSet::new());
            let at = |n: i64| if high { i64::MAX - n } else { i64::MIN + n };
            for (what, n) in steps {
                let (step, n) = (n, at(n));
                match what {
                    4 => {
                        let (first, last) = (n.min(at(step / 2)), n.max(at(step / 2)));
                        runs.insert_range(first, last);
                        set.extend(first..=last);
                    }
                    0 | 1 => {
                        runs.insert(n);
                        set.insert(n);
                    }
                    2 => prop_assert_eq!(runs.remove(n), set.remove(&n)),
                    _ if n % 5 == 0 => {
                        runs.remove_to(n);
                        set.retain(|one| *one > n);
                    }
                    _ => prop_assert_eq!(runs.contains(n), set.contains(&n)),
                }
                prop_assert_eq!(runs.iter().collect::<Vec<_>>(), set.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(&runs, &set.iter().copied().collect::<Runs>());
                prop_assert_eq!(runs.last(), set.last().copied());
                let above = runs.above(n);
                prop_assert!(set.iter().filter(|one| **one > n).all(|one| above.contains(*one)));
                prop_assert!(above.ranges().all(|(_, last)| last > n && runs.contains(last)));
            }
            prop_assert_eq!(&Runs::from_multirange(&runs.multirange()), &Ok(runs.clone()));
            prop_assert_eq!(&Runs::from_json(&runs.json()), &Ok(runs));
        }
    }

    #[test]
    fn they_are_written_as_the_databases_read_them() {
        let runs: Runs = [3, 1, 2, 9, i64::MAX].into_iter().collect();
        assert_eq!(runs.multirange(), "{[1,4),[9,10),[9223372036854775807,)}");
        assert_eq!(runs.json(), "[[1,3],[9,9],[9223372036854775807,9223372036854775807]]");
        assert_eq!((Runs::default().multirange(), Runs::default().json()), ("{}".into(), "[]".into()));
        assert!(Runs::from_multirange("[1,2)").is_err() && Runs::from_json("{}").is_err());
    }
}
