//! What a source yields: one committed outbox row, on its way to one Kafka record.
//!
//! An [`Event`] is the row's columns as the database returned them, in the order in which the
//! table's rules asked for them. Nothing is interpreted here; `record` reads the columns by role.

use std::{fmt, ops::Range};

use bytes::Bytes;

/// Which configured table an event came from; an index into the application's tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TableIx(pub u16);

/// What a source records an acknowledgement by: the row's order column where there is one, else
/// its id. Places of one table are compared for equality here and ordered by the database alone.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Place {
    Int(i64),
    Text(Box<str>),
}

impl Place {
    pub fn number(&self) -> Option<i64> {
        match self {
            Place::Int(n) => Some(*n),
            Place::Text(_) => None,
        }
    }
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Int(n) => n.fmt(f),
            Place::Text(s) => s.fmt(f),
        }
    }
}

/// One committed outbox row.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub place: Place,
    pub row: Row,
    /// The mapped `timestamp` column, else `created_at`: milliseconds since the Unix epoch.
    pub timestamp_ms: Option<i64>,
    /// Set where the payload was too large to be read: its size in bytes. The column is NULL then.
    pub unread_bytes: Option<u64>,
    /// Set where a published row is published again because an operator asked for it.
    pub replay: Option<Box<Replay>>,
}

/// How a published row is published again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Replay {
    /// Another topic than the row's own.
    pub topic: Option<String>,
    /// When it was asked for, RFC 3339: the value of the header `whippet-replay`.
    pub requested: String,
}

/// The columns of a row in one allocation, by index. A column is NULL or bytes.
#[derive(Clone, Debug, Default)]
pub struct Row {
    bytes: Content,
    cells: Vec<Cell>,
    /// A large value that came later, in the buffer in which it came.
    apart: Option<(usize, Bytes)>,
}

impl PartialEq for Row {
    fn eq(&self, other: &Row) -> bool {
        let columns = self.cells.len();
        columns == other.cells.len() && (0..columns).all(|index| self.get(index) == other.get(index))
    }
}

impl Eq for Row {}

/// A row's own, or shared with an upload that is under way: a payload may be large, and is not copied.
#[derive(Clone, Debug)]
enum Content {
    Own(Vec<u8>),
    Shared(Bytes),
}

impl Content {
    fn as_slice(&self) -> &[u8] {
        match self {
            Content::Own(bytes) => bytes,
            Content::Shared(bytes) => bytes,
        }
    }

    /// To be added to: only rows that are being made are.
    fn own(&mut self) -> &mut Vec<u8> {
        if let Content::Shared(bytes) = self {
            *self = Content::Own(bytes.to_vec());
        }
        match self {
            Content::Own(bytes) => bytes,
            Content::Shared(_) => unreachable!("it was made a row's own"),
        }
    }
}

impl Default for Content {
    fn default() -> Content {
        Content::Own(Vec::new())
    }
}

#[derive(Clone, Copy, Debug)]
struct Cell {
    end: u32,
    null: bool,
}

impl Row {
    /// A row about to receive `columns` columns of `bytes` bytes together.
    pub fn with_capacity(columns: usize, bytes: usize) -> Row {
        let bytes = Content::Own(Vec::with_capacity(bytes));
        Row { bytes, cells: Vec::with_capacity(columns), apart: None }
    }

    /// Adds the next column.
    pub fn push(&mut self, value: Option<&[u8]>) {
        let bytes = self.bytes.own();
        bytes.extend_from_slice(value.unwrap_or_default());
        let end = u32::try_from(bytes.len()).expect("a row above 4 GiB is parked unread");
        self.cells.push(Cell { end, null: value.is_none() });
    }

    /// Adds a column that `make` writes; `false`, and nothing is added, where it cannot.
    pub fn push_made(&mut self, make: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        let bytes = self.bytes.own();
        let before = bytes.len();
        if !make(bytes) {
            bytes.truncate(before);
            return false;
        }
        let end = u32::try_from(bytes.len()).expect("a row above 4 GiB is parked unread");
        self.cells.push(Cell { end, null: false });
        true
    }

    /// The column at `index`; `None` for NULL.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        match self.apart(index) {
            Some(value) => Some(value),
            None => self.range(index).map(|range| &self.bytes.as_slice()[range]),
        }
    }

    fn apart(&self, index: usize) -> Option<&Bytes> {
        self.apart.as_ref().filter(|(column, _)| *column == index).map(|(_, value)| value)
    }

    /// The column at `index`, to be kept beside the row; nothing is copied.
    pub fn share(&mut self, index: usize) -> Option<Bytes> {
        if let Some(value) = self.apart(index) {
            return Some(value.clone());
        }
        let range = self.range(index)?;
        let shared = match std::mem::take(&mut self.bytes) {
            Content::Own(bytes) => Bytes::from(bytes),
            Content::Shared(bytes) => bytes,
        };
        self.bytes = Content::Shared(shared.clone());
        Some(shared.slice(range))
    }

    fn range(&self, index: usize) -> Option<Range<usize>> {
        let cell = self.cells[index];
        let start = index.checked_sub(1).map_or(0, |before| self.cells[before].end);
        (!cell.null).then_some(start as usize..cell.end as usize)
    }

    /// The same row with another value at `index`, which is not copied: it may be large.
    pub fn with(&self, index: usize, value: Option<Bytes>) -> Row {
        let columns = 0..self.cells.len();
        let other = |column: usize| self.get(column).filter(|_| column != index);
        let bytes = columns.clone().filter_map(other).map(<[u8]>::len).sum();
        let mut row = Row::with_capacity(columns.len(), bytes);
        columns.for_each(|column| row.push(other(column)));
        row.apart = value.map(|value| (index, value));
        row
    }

    /// Adds a piece to the column that was pushed last.
    pub fn extend_last(&mut self, piece: &[u8]) {
        let bytes = self.bytes.own();
        bytes.extend_from_slice(piece);
        let end = u32::try_from(bytes.len()).expect("a row above 4 GiB is parked unread");
        if let Some(last) = self.cells.last_mut() {
            *last = Cell { end, null: false };
        }
    }

    /// The size of all columns, in bytes: what the windows count.
    pub fn bytes(&self) -> usize {
        self.bytes.as_slice().len() + self.apart.as_ref().map_or(0, |(_, value)| value.len())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_gives_back_what_was_pushed_and_tells_null_from_empty() {
        let mut row = Row::with_capacity(4, 8);
        for value in [Some(&b"one"[..]), None, Some(b""), Some(b"four")] {
            row.push(value);
        }
        assert_eq!(row.get(0), Some(&b"one"[..]));
        assert_eq!(row.get(1), None);
        assert_eq!(row.get(2), Some(&b""[..]));
        assert_eq!(row.get(3), Some(&b"four"[..]));
        assert_eq!(row.bytes(), 7);
        row.push(None);
        [&b"fi"[..], b"ve"].into_iter().for_each(|piece| row.extend_last(piece));
        assert_eq!((row.get(3), row.get(4)), (Some(&b"four"[..]), Some(&b"five"[..])));
    }

    #[test]
    fn a_shared_column_outlives_its_row_and_the_row_stays_as_it_is() {
        let mut row = Row::default();
        for value in [Some(&b"one"[..]), None, Some(b"three")] {
            row.push(value);
        }
        let before = row.clone();
        let column = row.share(2).unwrap();
        assert_eq!((row.share(1), row.share(2)), (None, Some(column.clone())));
        assert_eq!(row, before);
        row.push(Some(b"four"));
        assert_eq!((row.get(2), row.get(3)), (Some(&b"three"[..]), Some(&b"four"[..])));
        drop(row);
        assert_eq!(&column[..], b"three");
    }
    #[test]
    fn a_value_that_came_later_is_a_column_like_others_and_is_not_copied() {
        let mut row = Row::default();
        for value in [Some(&b"one"[..]), Some(b"not this"), Some(b"three")] {
            row.push(value);
        }
        let large = Bytes::from_static(b"large");
        let mut with = row.with(1, Some(large.clone()));
        assert_eq!((with.get(0), with.get(1), with.get(2)), (row.get(0), Some(&b"large"[..]), row.get(2)));
        assert_eq!(with.bytes(), 13);
        assert_eq!(with.share(1).map(|shared| shared.as_ptr()), Some(large.as_ptr()));
        let without = with.with(1, None);
        assert_eq!((without.get(1), without.bytes()), (None, 8));
        assert_ne!(with, without);
        assert_eq!(with.with(1, Some(Bytes::from_static(b"not this"))), row);
    }
}
