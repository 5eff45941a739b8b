//! Which events of a partition have been handed over: the last so many of them.

use std::collections::{HashSet, VecDeque};

use sha2::{Digest as _, Sha256};

/// Half a sha256: no two events share one by chance.
pub type Mark = [u8; 16];

/// The mark of an event by its key and its id.
pub fn mark(key: Option<&[u8]>, id: &[u8]) -> Mark {
    let mut hash = Sha256::new();
    // The length keeps key and id apart; no key is not the empty one.
    hash.update(key.map_or(u64::MAX, |key| key.len() as u64).to_be_bytes());
    hash.update(key.unwrap_or_default());
    hash.update(id);
    let mut mark = Mark::default();
    mark.copy_from_slice(&hash.finalize()[..16]);
    mark
}

#[derive(Debug, Default)]
pub struct Seen {
    known: HashSet<Mark>,
    oldest_first: VecDeque<Mark>,
}

impl Seen {
    pub fn has(&self, mark: &Mark) -> bool {
        self.known.contains(mark)
    }

    /// Remembers a mark, and at most `window` of them.
    pub fn insert(&mut self, mark: Mark, window: usize) {
        if window == 0 || !self.known.insert(mark) {
            return;
        }
        self.oldest_first.push_back(mark);
        while self.oldest_first.len() > window {
            if let Some(oldest) = self.oldest_first.pop_front() {
                self.known.remove(&oldest);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_window_is_of_the_last_ones() {
        let mut seen = Seen::default();
        let marks: Vec<Mark> = (0..4_u8).map(|n| mark(None, &[n])).collect();
        for mark in &marks {
            seen.insert(*mark, 3);
            seen.insert(*mark, 3);
        }
        let known: Vec<bool> = marks.iter().map(|mark| seen.has(mark)).collect();
        assert_eq!(known, [false, true, true, true]);
        assert_eq!((seen.known.len(), seen.oldest_first.len()), (3, 3));
        seen.insert(marks[0], 0);
        assert!(!seen.has(&marks[0]));
    }

    #[test]
    fn key_and_id_are_not_taken_for_one_another() {
        let marks: HashSet<Mark> =
            [mark(None, b"ab"), mark(Some(b""), b"ab"), mark(Some(b"a"), b"b"), mark(Some(b"ab"), b"")]
                .into();
        assert_eq!(marks.len(), 4);
    }
}
