//! Places that are in doubt: published, and perhaps not recorded. Pure.
//!
//! Each event goes in and out of here, and most places are numbers in near order. So numbers are bits of words: a
//! thousand that follow one another are sixteen words, and come out as the runs that a position is written in.

use std::collections::{BTreeMap, HashSet};

use crate::event::Place;

/// The places of one table.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Doubts {
    /// By their upper bits; none of the words is empty.
    words: BTreeMap<i64, u64>,
    texts: HashSet<Box<str>>,
}

/// The word of a number, and its bit there.
fn at(number: i64) -> (i64, u64) {
    (number >> 6, 1 << (number & 63))
}

impl Doubts {
    pub fn insert(&mut self, place: Place) {
        match place {
            Place::Int(number) => {
                let (word, bit) = at(number);
                *self.words.entry(word).or_default() |= bit;
            }
            Place::Text(text) => {
                self.texts.insert(text);
            }
        }
    }

    pub fn remove(&mut self, place: &Place) {
        match place {
            Place::Int(number) => {
                let (word, bit) = at(*number);
                let Some(bits) = self.words.get_mut(&word) else { return };
                *bits &= !bit;
                if *bits == 0 {
                    self.words.remove(&word);
                }
            }
            Place::Text(text) => {
                self.texts.remove(text);
            }
        }
    }

    pub fn is_empty(&self) -> bool {
        self.words.is_empty() && self.texts.is_empty()
    }

    pub fn len(&self) -> usize {
        self.words.values().map(|bits| bits.count_ones() as usize).sum::<usize>() + self.texts.len()
    }

    pub fn iter(&self) -> impl Iterator<Item = Place> {
        self.numbers().map(Place::Int).chain(self.texts().map(|text| Place::Text(text.into())))
    }

    /// In their order.
    fn numbers(&self) -> impl Iterator<Item = i64> {
        let of_word = |(word, bits): (&i64, &u64)| {
            let (first, bits) = (word << 6, *bits);
            (0..64).filter(move |bit| bits >> bit & 1 == 1).map(move |bit| first | bit)
        };
        self.words.iter().flat_map(of_word)
    }

    /// First and last of the numbers that follow one another.
    pub fn runs(&self) -> Vec<(i64, i64)> {
        let mut runs: Vec<(i64, i64)> = Vec::new();
        for number in self.numbers() {
            match runs.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(number) => *last = number,
                _ => runs.push((number, number)),
            }
        }
        runs
    }

    pub fn texts(&self) -> impl Iterator<Item = &str> {
        self.texts.iter().map(|text| &**text)
    }
}

impl Extend<Place> for Doubts {
    fn extend<T: IntoIterator<Item = Place>>(&mut self, places: T) {
        places.into_iter().for_each(|place| self.insert(place));
    }
}

impl FromIterator<Place> for Doubts {
    fn from_iter<T: IntoIterator<Item = Place>>(places: T) -> Doubts {
        let mut doubts = Doubts::default();
        doubts.extend(places);
        doubts
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn place() -> impl Strategy<Value = Place> {
        let ends = prop_oneof![Just(i64::MIN), Just(i64::MIN + 1), Just(i64::MAX - 1), Just(i64::MAX)];
        prop_oneof![
            8 => (-150..150_i64).prop_map(Place::Int),
            1 => ends.prop_map(Place::Int),
            1 => "[ab]{0,2}".prop_map(|text| Place::Text(text.into())),
        ]
    }

    proptest! {
        #[test]
        fn they_are_those_of_a_set(steps in proptest::collection::vec((place(), 0..3), 0..300)) {
            let (mut doubts, mut set) = (Doubts::default(), HashSet::new());
            for (place, what) in steps {
                if what > 0 {
                    doubts.insert(place.clone());
                    set.insert(place);
                } else {
                    doubts.remove(&place);
                    set.remove(&place);
                }
                prop_assert_eq!(doubts.is_empty(), set.is_empty());
            }
            prop_assert_eq!(doubts.len(), set.len());
            prop_assert_eq!(&doubts, &set.iter().cloned().collect::<Doubts>(), "none of the words is empty");
            prop_assert_eq!(doubts.iter().collect::<HashSet<_>>(), set.clone());
            let runs = doubts.runs();
            prop_assert!(runs.windows(2).all(|pair| pair[0].1 < pair[1].0 - 1), "{:?}", runs);
            let numbers = runs.iter().flat_map(|(first, last)| *first..=*last).map(Place::Int);
            let texts = doubts.texts().map(|text| Place::Text(text.into()));
            prop_assert_eq!(numbers.chain(texts).collect::<HashSet<_>>(), set);
        }
    }
}
