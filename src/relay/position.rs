//! What Kafka knows of a source, where delivery is exactly once: pure. A position is committed in the
//! transaction of the events, so that what is in it and what is published are one.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::doubts::Doubts;
use crate::{event::Place, sink::PositionRecord};

/// A record of the position topic is about so large, at most.
const RECORD_BYTES: usize = 400_000;

/// The position of a delivery unit.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    pub unit: String,
    /// The server that the source is on, where it can be told.
    pub server: String,
    /// Counts the transactions.
    pub counter: i64,
    /// The source has noted this counter, or a later one.
    pub noted: i64,
    /// By table: published, and perhaps not recorded in the source.
    pub doubts: BTreeMap<String, Doubts>,
    /// The same, of tables that are not relayed now: kept for the relay that does.
    pub elsewhere: BTreeMap<String, Doubts>,
}

/// A record of it. Large ones are several: the first has the key of the unit, the others a number more.
#[derive(Debug, Default, Serialize, Deserialize)]
struct Piece {
    counter: i64,
    noted: i64,
    server: String,
    /// How many records there are. The name that it had was of relays with one producer: they would not fence the other
    /// one, and cannot read this.
    #[serde(alias = "pieces")]
    records: usize,
    doubts: BTreeMap<String, Places>,
}

#[derive(Debug, Default, Serialize, Deserialize)]
struct Places {
    /// First and last number of runs.
    numbers: Vec<(i64, i64)>,
    texts: Vec<String>,
}

impl Position {
    pub fn has_doubts(&self) -> bool {
        self.doubts.values().any(|places| !places.is_empty())
    }

    /// What is in doubt of other tables than these is not ours to settle.
    pub fn is_for(&mut self, is_ours: impl Fn(&str) -> bool) {
        for (table, places) in std::mem::take(&mut self.doubts) {
            let kept = if is_ours(&table) { &mut self.doubts } else { &mut self.elsewhere };
            kept.insert(table, places);
        }
    }

    /// The source has recorded these.
    pub fn recorded(&mut self, table: &str, places: &[Place]) {
        if let Some(doubts) = self.doubts.get_mut(table) {
            for place in places {
                doubts.remove(place);
            }
        }
    }

    /// As records of the position topic.
    pub fn encode(&self) -> Vec<PositionRecord> {
        let mut pieces = vec![Piece::default()];
        let mut bytes = 0;
        for (table, places) in self.doubts.iter().chain(&self.elsewhere) {
            let mut add = |size: usize, add: &mut dyn FnMut(&mut Places)| {
                if bytes + size > RECORD_BYTES {
                    pieces.push(Piece::default());
                    bytes = 0;
                }
                bytes += size;
                if let Some(piece) = pieces.last_mut() {
                    add(piece.doubts.entry(table.clone()).or_default());
                }
            };
            for text in places.texts() {
                add(text.len() + 8, &mut |places| places.texts.push(text.to_owned()));
            }
            for run in places.runs() {
                add(44, &mut |places| places.numbers.push(run));
            }
        }
        let count = pieces.len();
        let record = |(number, piece): (usize, Piece)| {
            let piece = Piece {
                counter: self.counter,
                noted: self.noted,
                server: self.server.clone(),
                records: count,
                ..piece
            };
            (key(&self.unit, number), serde_json::to_vec(&piece).unwrap_or_default())
        };
        pieces.into_iter().enumerate().map(record).collect()
    }

    /// Of every unit that has one.
    pub fn decode_all(records: &HashMap<String, Vec<u8>>) -> Result<BTreeMap<String, Position>, String> {
        let units = records.keys().filter(|key| !key.contains('/'));
        units.filter_map(|unit| Some((unit.clone(), Position::decode(unit, records).transpose()?))).try_fold(
            BTreeMap::new(),
            |mut all, (unit, position)| {
                all.insert(unit, position?);
                Ok(all)
            },
        )
    }

    /// What another unit has in doubt is in doubt here from now on.
    pub fn takes_over(&mut self, other: Position) {
        for (table, places) in other.doubts {
            self.doubts.entry(table).or_default().extend(places.iter());
        }
    }

    /// From the last records of each key; `None` where the unit has none.
    pub fn decode(unit: &str, records: &HashMap<String, Vec<u8>>) -> Result<Option<Position>, String> {
        let read = |number: usize| -> Result<Option<Piece>, String> {
            let key = key(unit, number);
            let Some(value) = records.get(&key) else { return Ok(None) };
            serde_json::from_slice(value)
                .map(Some)
                .map_err(|error| format!("record {key} of the position topic cannot be read: {error}"))
        };
        let Some(first) = read(0)? else { return Ok(None) };
        let (counter, count) = (first.counter, first.records);
        let mut position = Position {
            unit: unit.to_owned(),
            server: first.server.clone(),
            counter,
            noted: first.noted,
            ..Position::default()
        };
        position.add(first);
        for number in 1..count {
            match read(number)? {
                Some(piece) if piece.counter == counter => position.add(piece),
                _ => return Err(format!("piece {number} of {count} of position {counter} is missing")),
            }
        }
        Ok(Some(position))
    }

    fn add(&mut self, piece: Piece) {
        for (table, Places { numbers, texts }) in piece.doubts {
            let places = self.doubts.entry(table).or_default();
            for (first, last) in numbers {
                places.extend((first..=last).map(Place::Int));
            }
            places.extend(texts.into_iter().map(|text| Place::Text(text.into())));
        }
    }
}

fn key(unit: &str, number: usize) -> String {
    if number == 0 { unit.to_owned() } else { format!("{unit}/{number}") }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn position(doubts: BTreeMap<String, Doubts>) -> Position {
        Position { unit: "u".into(), server: "s".into(), counter: 7, noted: 5, doubts, ..Position::default() }
    }

    proptest! {
        #[test]
        fn what_is_written_is_read(
            numbers in proptest::collection::hash_set(prop_oneof![any::<i64>(), -30..30_i64], 0..200),
            texts in proptest::collection::hash_set(".{0,40}", 0..20),
        ) {
            let texts = texts.into_iter().map(|text| Place::Text(text.into())).collect::<Doubts>();
            let numbers = numbers.into_iter().map(Place::Int).collect::<Doubts>();
            let doubts = [("a".to_owned(), numbers), ("b.c".to_owned(), texts)];
            let mut written = position(doubts.into());
            let records = written.encode().into_iter().collect();
            written.doubts.retain(|_, places| !places.is_empty());
            prop_assert_eq!(Position::decode("u", &records), Ok(Some(written)));
        }
    }

    #[test]
    fn a_large_position_is_in_pieces_of_one_counter() {
        let texts = (0..20_000).map(|n| Place::Text(format!("{n:036}").into())).collect();
        let written = position([("t".to_owned(), texts)].into());
        let records = written.encode();
        assert!(records.len() > 1 && records.iter().all(|(_, value)| value.len() < 2 * RECORD_BYTES));
        let mut records: HashMap<_, _> = records.into_iter().collect();
        assert_eq!(Position::decode("u", &records), Ok(Some(written.clone())));
        assert_eq!(Position::decode("another", &records), Ok(None));
        // One of an older position.
        let older = Position { counter: 6, ..written }.encode().remove(1);
        records.insert(older.0, older.1);
        assert!(Position::decode("u", &records).is_err());
    }

    #[test]
    fn a_relay_with_one_producer_is_followed_and_cannot_follow() {
        let written = position([("t".to_owned(), [Place::Int(3)].into_iter().collect())].into());
        let (key, value) = written.encode().remove(0);
        let value = String::from_utf8(value).unwrap();
        assert!(!value.contains("\"pieces\""), "{value}");
        let older = value.replace("\"records\"", "\"pieces\"");
        let records = [(key, older.into_bytes())].into();
        assert_eq!(Position::decode("u", &records), Ok(Some(written)));
    }

    #[test]
    fn numbers_in_a_row_are_one_run() {
        let numbers = (1..=10_000).chain([20_000]).map(Place::Int).collect();
        let records = position([("t".to_owned(), numbers)].into()).encode();
        assert!(records.len() == 1 && records[0].1.len() < 200, "{records:?}");
    }
}
