//! The places of a part's tables. Everybody knows a table by its place, which is free again when the last word of its
//! source has been heard.

use anyhow::ensure;

use crate::event::TableIx;

const AT_MOST: usize = u16::MAX as usize + 1;

#[derive(Debug, Default)]
pub(super) struct Places {
    free: Vec<TableIx>,
    /// So many were ever in use.
    used: usize,
}

impl Places {
    /// So many places, or none of them.
    pub fn take(&mut self, count: usize) -> anyhow::Result<Vec<TableIx>> {
        fail::fail_point!("no-places", |_| Err(anyhow::anyhow!("too many tables")));
        let there = self.free.len() + (AT_MOST - self.used);
        ensure!(count <= there, "too many tables: there is room for {there} more, and {count} are to start");
        let mut taken = self.free.split_off(self.free.len().saturating_sub(count));
        let new = self.used..self.used + (count - taken.len());
        self.used = new.end;
        taken.extend(new.map(|index| TableIx(index as u16)));
        Ok(taken)
    }

    pub fn give_back(&mut self, place: TableIx) {
        self.free.push(place);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn indexes(taken: Vec<TableIx>) -> Vec<u16> {
        taken.into_iter().map(|place| place.0).collect()
    }

    #[test]
    fn free_places_are_taken_first_and_new_ones_in_their_order() {
        let mut places = Places::default();
        assert_eq!(indexes(places.take(3).unwrap()), [0, 1, 2]);
        places.give_back(TableIx(1));
        assert_eq!(indexes(places.take(3).unwrap()), [1, 3, 4]);
        assert!(places.take(0).unwrap().is_empty());
    }

    #[test]
    fn too_many_take_none() {
        let mut places = Places::default();
        places.take(AT_MOST - 1).unwrap();
        places.give_back(TableIx(7));
        let refused = places.take(3).unwrap_err().to_string();
        assert_eq!(refused, "too many tables: there is room for 2 more, and 3 are to start");
        assert_eq!(indexes(places.take(2).unwrap()), [7, u16::MAX]);
        assert!(places.take(1).is_err());
    }
}
