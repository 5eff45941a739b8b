//! From a row of the log to the same [`Event`] that polling makes of it, byte for byte.
//!
//! Polling has texts and bytes as they are, and everything else cast to text; bits as 0 and 1. A value that
//! the log does not tell in the same way has its table polled.

use super::{
    cell::{Cell, integer},
    event::{Malformed, packed},
    kind::Kind,
    map::{TableMap, Written, code, has_bit},
};
use crate::{
    event::{Event, Place, Row},
    source::database::{Column, TableSpec},
};

/// A table as the catalogue has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub database: String,
    pub name: String,
    pub columns: Vec<Column>,
}

/// Where the event's columns are in a table's rows.
#[derive(Debug)]
pub struct Layout {
    columns: Vec<Written>,
    cells: Vec<Option<Cell>>,
    id: Option<usize>,
    place: Cell,
    timestamp: Option<Cell>,
    payload: Option<usize>,
    max_payload: usize,
}

/// A value of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Value<'a> {
    /// The log does not have it.
    Absent,
    Null,
    Is(&'a [u8]),
}

/// A column of a table that cannot be followed, in the words of an operator.
pub fn obstacle(spec: &TableSpec, known: &Known) -> Option<String> {
    let of = |name: &String| known.columns.iter().find(|column| column.name.eq_ignore_ascii_case(name));
    let place = spec.sequence.as_ref().unwrap_or(&spec.id);
    let timestamp = spec.timestamps.iter().find_map(of);
    let needed = spec.columns.iter().chain([place]).filter_map(of).chain(timestamp);
    let column = needed.into_iter().find(|column| Kind::of(column).is_none())?;
    Some(format!(
        "column {} of table {} is of type {}{}, which the binlog does not tell as the table does",
        column.name,
        spec.name,
        column.full,
        column.charset.as_ref().map(|charset| format!(" ({charset})")).unwrap_or_default()
    ))
}

impl Layout {
    /// `None` where the map is not what the table was when it was looked at.
    pub fn new(spec: &TableSpec, known: &Known, map: &TableMap<'_>) -> Option<Layout> {
        let columns = map.columns.clone()?;
        if map.names.is_none() && columns.len() != known.columns.len() {
            return None;
        }
        let find = |name: &str| -> Option<Option<Cell>> {
            let Some(at) = known.columns.iter().position(|one| one.name.eq_ignore_ascii_case(name)) else {
                return Some(None);
            };
            let column = &known.columns[at];
            let index = match &map.names {
                Some(names) => names.iter().position(|one| *one == column.name.as_bytes())?,
                None => at,
            };
            let (kind, code) = Kind::of(column)?;
            let written = *columns.get(index)?;
            let is = if written.code == code::STRING { written.of_string() } else { written.code };
            let is_bytes = column.is_bytes();
            let is_uuid = column.full == "binary(16)";
            (is == code).then_some(Some(Cell { index, kind, written, is_bytes, is_uuid }))
        };
        let mut cells = Vec::with_capacity(spec.columns.len());
        for name in &spec.columns {
            let cell = find(name)?;
            if cell.is_none() && !spec.optional.contains(name) {
                return None;
            }
            cells.push(cell);
        }
        let mut timestamp = None;
        for name in &spec.timestamps {
            timestamp = find(name)?;
            if timestamp.is_some() {
                break;
            }
        }
        let is_time = |cell: &Cell| {
            matches!(cell.kind, Kind::Int { .. } | Kind::Date | Kind::DateTime | Kind::Timestamp)
        };
        if timestamp.as_ref().is_some_and(|cell| !is_time(cell)) {
            return None;
        }
        let is_id = |name: &String| *name == spec.id && *name != spec.payload;
        Some(Layout {
            cells,
            id: spec.columns.iter().position(is_id),
            place: find(spec.sequence.as_ref().unwrap_or(&spec.id))??,
            timestamp,
            payload: spec.columns.iter().position(|name| *name == spec.payload),
            max_payload: spec.max_payload,
            columns,
        })
    }

    /// The rows of an insert whose columns come first, each handed to `found`; `None` for one that the
    /// table has to be asked for.
    pub fn rows(
        &self,
        present: &[u8],
        mut bytes: &[u8],
        found: &mut dyn FnMut(Option<Event>),
    ) -> Result<(), Malformed> {
        let wrong = Malformed("rows that do not fit their table");
        let there: Vec<bool> = (0..self.columns.len()).map(|index| has_bit(present, index)).collect();
        let nulls_of = there.iter().filter(|there| **there).count().div_ceil(8);
        if nulls_of == 0 {
            return Err(wrong);
        }
        let mut values = vec![Value::Absent; self.columns.len()];
        while !bytes.is_empty() {
            let (nulls, mut rest) = bytes.split_at_checked(nulls_of).ok_or(wrong)?;
            let mut nth = 0;
            for ((column, there), value) in self.columns.iter().zip(&there).zip(&mut values) {
                *value = Value::Absent;
                if !there {
                    continue;
                }
                if has_bit(nulls, nth) {
                    *value = Value::Null;
                } else {
                    let (content, after) = column.value(rest).ok_or(wrong)?;
                    *value = Value::Is(content);
                    rest = after;
                }
                nth += 1;
            }
            bytes = rest;
            found(self.event(&values)?);
        }
        Ok(())
    }

    fn event(&self, values: &[Value<'_>]) -> Result<Option<Event>, Malformed> {
        let at = |cell: &Cell| values.get(cell.index).copied().unwrap_or(Value::Absent);
        let length = |cell: &Cell| if let Value::Is(value) = at(cell) { value.len() } else { 0 };
        let size = self.cells.iter().flatten().map(length).sum::<usize>();
        let mut row = Row::with_capacity(self.cells.len(), size + 32);
        for (number, cell) in self.cells.iter().enumerate() {
            let Some(cell) = cell else {
                row.push(None);
                continue;
            };
            let before = row.bytes();
            match at(cell) {
                Value::Absent => return Ok(None),
                Value::Null => row.push(None),
                Value::Is(value) => {
                    let mut failed = None;
                    let made = row.push_made(|out| {
                        let written = match Some(number) == self.id {
                            true => cell.write_id(value, out),
                            false => cell.write(value, self.max_payload, out),
                        };
                        written.unwrap_or_else(|error| {
                            failed = Some(error);
                            false
                        })
                    });
                    if let Some(error) = failed {
                        return Err(error);
                    }
                    if !made {
                        return Ok(None);
                    }
                }
            }
            if Some(number) == self.payload && row.bytes() - before > self.max_payload {
                return Ok(None);
            }
        }
        let Some(place) = self.place(at(&self.place))? else { return Ok(None) };
        let timestamp_ms = match &self.timestamp {
            None => None,
            Some(cell) => match at(cell) {
                Value::Absent => return Ok(None),
                Value::Null => None,
                Value::Is(value) => cell.milliseconds(value),
            },
        };
        Ok(Some(Event { place, row, timestamp_ms, unread_bytes: None, replay: None }))
    }

    fn place(&self, value: Value<'_>) -> Result<Option<Place>, Malformed> {
        let (Value::Is(value), cell) = (value, &self.place) else { return Ok(None) };
        if let Kind::Int { unsigned, .. } = cell.kind {
            let number = integer(value, unsigned);
            return Ok(i64::try_from(number).ok().map(Place::Int));
        }
        let mut text = Vec::new();
        if !cell.write_id(value, &mut text)? {
            return Ok(None);
        }
        Ok(String::from_utf8(text).ok().map(|text| Place::Text(text.into())))
    }
}

/// The columns that rows have, as bits, and the rows.
pub fn image(rest: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let wrong = Malformed("rows that are cut short");
    let (width, rest) = packed(rest)?;
    let width = usize::try_from(width).map_err(|_| wrong)?;
    rest.split_at_checked(width.div_ceil(8)).ok_or(wrong)
}
