//! What a table has handed over and not recorded. Every read leaves that out, and every event goes in and out of here, so
//! a backlog that is polled is runs of numbers.

use std::collections::{HashMap, HashSet};

use crate::{
    event::Place,
    source::{database::LeftOut, kept::Runs, log::At},
};

/// Where a row is in the log, if it came from there.
#[derive(Clone, Debug, Default)]
pub(super) struct InLog {
    /// Its number in this reading.
    pub number: Option<u64>,
    /// Its transaction, which may not be seen yet.
    pub at: Option<At>,
}

/// Rows that were handed over and are not recorded.
#[derive(Debug, Default)]
pub(super) struct Known {
    /// The places of rows that were polled, where they are numbers.
    polled: Runs,
    /// The others; none of them is in `polled`.
    others: HashMap<Place, InLog>,
}

impl Known {
    pub fn is_empty(&self) -> bool {
        self.polled.is_empty() && self.others.is_empty()
    }

    pub fn clear(&mut self) {
        *self = Known::default();
    }

    pub fn contains(&self, place: &Place) -> bool {
        matches!(place, Place::Int(number) if self.polled.contains(*number))
            || self.others.contains_key(place)
    }

    pub fn places(&self) -> impl Iterator<Item = Place> {
        self.polled.iter().map(Place::Int).chain(self.others.keys().cloned())
    }

    /// The transaction of a row that came from the log.
    pub fn at(&self, place: &Place) -> Option<&At> {
        self.others.get(place)?.at.as_ref()
    }

    /// A row that was polled.
    pub fn polls(&mut self, place: &Place) {
        match place {
            _ if self.others.contains_key(place) => {}
            Place::Int(number) => self.polled.insert(*number),
            Place::Text(_) => {
                self.others.insert(place.clone(), InLog::default());
            }
        }
    }

    /// A row that came from the log. Returns the number of another one that had its place.
    pub fn streams(&mut self, place: Place, in_log: InLog) -> Option<u64> {
        if let Place::Int(number) = place {
            self.polled.remove(number);
        }
        self.others.insert(place, in_log)?.number
    }

    /// The log has a row that may be known, as this number. `false` where it is not, or has a number.
    pub fn is_numbered(&mut self, place: &Place, number: u64) -> bool {
        if let Place::Int(its) = place
            && self.polled.remove(*its)
        {
            self.others.insert(place.clone(), InLog::default());
        }
        match self.others.get_mut(place) {
            Some(known) if known.number.is_none() => {
                known.number = Some(number);
                true
            }
            _ => false,
        }
    }

    /// Forgets a row, and returns its number in the log.
    pub fn remove(&mut self, place: &Place) -> Option<u64> {
        match place {
            Place::Int(number) if self.polled.remove(*number) => None,
            _ => self.others.remove(place)?.number,
        }
    }

    /// What the log told of rows.
    pub fn in_log(&mut self) -> impl Iterator<Item = &mut InLog> {
        self.others.values_mut()
    }

    /// What a read leaves out: these, and what is held; numbers above `low` only.
    pub fn left_out(&self, held: &HashSet<Place>, low: i64) -> LeftOut {
        let mut left_out = LeftOut { numbers: self.polled.above(low), texts: Vec::new() };
        for place in self.others.keys().chain(held) {
            match place {
                Place::Int(number) if *number <= low => {}
                Place::Int(number) => left_out.numbers.insert(*number),
                Place::Text(_) => left_out.texts.push(place.clone()),
            }
        }
        left_out
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[derive(Clone, Debug)]
    enum Step {
        Polls(Place),
        Streams(Place),
        IsNumbered(Place),
        Remove(Place),
    }

    fn place() -> impl Strategy<Value = Place> {
        prop_oneof![4 => (0..12_i64).prop_map(Place::Int), 1 => "[ab]".prop_map(|text| Place::Text(text.into()))]
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = (0..5, place()).prop_map(|(what, place)| match what {
            0 | 1 => Step::Polls(place),
            2 => Step::Streams(place),
            3 => Step::IsNumbered(place),
            _ => Step::Remove(place),
        });
        proptest::collection::vec(step, 0..60)
    }

    proptest! {
        /// Against a map from each place to its number in the log.
        #[test]
        fn they_are_those_of_a_map(steps in steps(), held in proptest::collection::hash_set(place(), 0..4), low in -1..12_i64) {
            let (mut known, mut map) = (Known::default(), HashMap::<Place, Option<u64>>::new());
            for (number, step) in (0..).zip(steps) {
                match step {
                    Step::Polls(place) => {
                        known.polls(&place);
                        map.entry(place).or_default();
                    }
                    Step::Streams(place) => {
                        let before = known.streams(place.clone(), InLog { number: Some(number), at: None });
                        prop_assert_eq!(before, map.insert(place, Some(number)).flatten());
                    }
                    Step::IsNumbered(place) => {
                        let free = map.get_mut(&place).filter(|its| its.is_none());
                        prop_assert_eq!(known.is_numbered(&place, number), free.is_some());
                        free.into_iter().for_each(|its| *its = Some(number));
                    }
                    Step::Remove(place) => prop_assert_eq!(known.remove(&place), map.remove(&place).flatten()),
                }
                prop_assert_eq!(known.is_empty(), map.is_empty());
                let mut places: Vec<Place> = known.places().collect();
                places.sort();
                let mut all: Vec<Place> = map.keys().cloned().collect();
                all.sort();
                prop_assert_eq!(places, all, "each of them once");
            }
            let LeftOut { numbers, texts } = known.left_out(&held, low);
            let all: HashSet<&Place> = map.keys().chain(&held).collect();
            for number in (low + 1)..13 {
                prop_assert_eq!(numbers.contains(number), all.contains(&Place::Int(number)), "{}", number);
            }
            let texts: HashSet<&Place> = texts.iter().collect();
            prop_assert_eq!(texts, all.into_iter().filter(|place| matches!(place, Place::Text(_))).collect());
        }
    }
}
