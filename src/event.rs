//! What a source yields: one committed outbox row, on its way to one Kafka record.
//!
//! An [`Event`] is the row's columns as the database returned them, in the order in which the
//! table's rules asked for them. Nothing is interpreted here; `record` reads the columns by role.

use std::fmt;

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
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Row {
    bytes: Vec<u8>,
    cells: Vec<Cell>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Cell {
    end: u32,
    null: bool,
}

impl Row {
    /// A row about to receive `columns` columns of `bytes` bytes together.
    pub fn with_capacity(columns: usize, bytes: usize) -> Row {
        Row { bytes: Vec::with_capacity(bytes), cells: Vec::with_capacity(columns) }
    }

    /// Adds the next column.
    pub fn push(&mut self, value: Option<&[u8]>) {
        self.bytes.extend_from_slice(value.unwrap_or_default());
        let end = u32::try_from(self.bytes.len()).expect("a row above 4 GiB is parked unread");
        self.cells.push(Cell { end, null: value.is_none() });
    }

    /// Adds a column that `make` writes; `false`, and nothing is added, where it cannot.
    pub fn push_made(&mut self, make: impl FnOnce(&mut Vec<u8>) -> bool) -> bool {
        let before = self.bytes.len();
        if !make(&mut self.bytes) {
            self.bytes.truncate(before);
            return false;
        }
        let end = u32::try_from(self.bytes.len()).expect("a row above 4 GiB is parked unread");
        self.cells.push(Cell { end, null: false });
        true
    }

    /// The column at `index`; `None` for NULL.
    pub fn get(&self, index: usize) -> Option<&[u8]> {
        let cell = self.cells[index];
        let start = index.checked_sub(1).map_or(0, |before| self.cells[before].end);
        (!cell.null).then(|| &self.bytes[start as usize..cell.end as usize])
    }

    /// The same row with another value at `index`. One copy of the value: it may be large.
    pub fn with(&self, index: usize, value: Option<&[u8]>) -> Row {
        let bytes = self.bytes.len() + value.map_or(0, <[u8]>::len);
        let mut row = Row::with_capacity(self.cells.len(), bytes);
        for column in 0..self.cells.len() {
            row.push(if column == index { value } else { self.get(column) });
        }
        row
    }

    /// The size of all columns, in bytes: what the windows count.
    pub fn bytes(&self) -> usize {
        self.bytes.len()
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
    }
}
