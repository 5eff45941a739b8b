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
    source::{
        database::{Column, TableSpec},
        times::Unreadable,
    },
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
    /// `None` where rows do not stay: their place is one in the log.
    place: Option<Cell>,
    /// Whether rows are told apart by their id, whose text is their place then.
    by_id: bool,
    timestamp: Option<Cell>,
    table: String,
    unreadable: Unreadable,
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

/// What became of a row.
#[derive(Debug)]
pub enum Made {
    Whole(Event),
    /// Its payload is longer than it may be: the event without it.
    Long(Event),
    /// The log does not tell it as the table does.
    Untold,
}

/// A column of a table that cannot be followed, in the words of an operator.
pub fn obstacle(spec: &TableSpec, known: &Known) -> Option<String> {
    let of = |name: &String| known.columns.iter().find(|column| column.name.eq_ignore_ascii_case(name));
    let place = spec.place();
    let timestamp = spec.timestamps.iter().find_map(of);
    let place = Some(place).filter(|_| spec.stays());
    let needed = spec.columns.iter().chain(place).filter_map(of).chain(timestamp);
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
        let is_id = |name: &String| *name == spec.id && *name != spec.payload;
        Some(Layout {
            cells,
            id: spec.columns.iter().position(is_id),
            place: match spec.stays() {
                true => Some(find(spec.place())??),
                false => None,
            },
            by_id: spec.slower().is_some(),
            timestamp,
            table: spec.name.clone(),
            unreadable: spec.unreadable.clone(),
            payload: spec.columns.iter().position(|name| *name == spec.payload),
            max_payload: spec.max_payload,
            columns,
        })
    }

    /// The rows of an insert whose columns come first, each handed to `found`.
    pub fn rows(
        &self,
        present: &[u8],
        mut bytes: &[u8],
        found: &mut dyn FnMut(Made),
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

    /// The event of a row that is too long to be kept, by its first part: without what did not come, and without
    /// its payload.
    pub fn unread(&self, present: &[u8], bytes: &[u8], whole: u64) -> Result<Event, Malformed> {
        let wrong = Malformed("rows that do not fit their table");
        let there: Vec<bool> = (0..self.columns.len()).map(|index| has_bit(present, index)).collect();
        let nulls_of = there.iter().filter(|there| **there).count().div_ceil(8);
        let (nulls, mut rest) = bytes.split_at_checked(nulls_of).ok_or(wrong)?;
        let mut values = vec![Value::Null; self.columns.len()];
        let present = self.columns.iter().zip(&mut values).zip(there).filter(|(_, there)| *there);
        for (nth, ((column, value), _)) in present.enumerate() {
            if has_bit(nulls, nth) {
                continue;
            }
            let Some((content, after)) = column.value(rest) else { break };
            *value = Value::Is(content);
            rest = after;
        }
        if let Some(Some(payload)) = self.payload.map(|index| &self.cells[index]) {
            values[payload.index] = Value::Null;
        }
        match self.event(&values)? {
            Made::Whole(event) | Made::Long(event) => Ok(Event { unread_bytes: Some(whole), ..event }),
            Made::Untold => Err(Malformed("the beginning of a row that is too long to be kept")),
        }
    }

    fn event(&self, values: &[Value<'_>]) -> Result<Made, Malformed> {
        let at = |cell: &Cell| values.get(cell.index).copied().unwrap_or(Value::Absent);
        let length = |cell: &Cell| if let Value::Is(value) = at(cell) { value.len() } else { 0 };
        let size = self.cells.iter().flatten().map(length).sum::<usize>();
        let mut row = Row::with_capacity(self.cells.len(), size + 32);
        let mut unread_bytes = None;
        for (number, cell) in self.cells.iter().enumerate() {
            let Some(cell) = cell else {
                row.push(None);
                continue;
            };
            let before = row.bytes();
            match at(cell) {
                Value::Absent => return Ok(Made::Untold),
                Value::Null => row.push(None),
                Value::Is(value) if Some(number) == self.payload && value.len() > self.longest() => {
                    unread_bytes = Some(value.len() as u64);
                    row.push(None);
                }
                Value::Is(value) => {
                    let (mut failed, mut came) = (None, 0);
                    let made = row.push_made(|out| {
                        let written = match Some(number) == self.id {
                            true => cell.write_id(value, out),
                            false => cell.write(value, self.max_payload, out),
                        };
                        came = out.len() - before;
                        written.unwrap_or_else(|error| {
                            failed = Some(error);
                            false
                        })
                    });
                    if failed.is_some() && Some(number) == self.payload && came > self.max_payload {
                        // A document that was given up because of its length.
                        unread_bytes = Some(came as u64);
                        row.push(None);
                        continue;
                    }
                    if let Some(error) = failed {
                        return Err(error);
                    }
                    if !made {
                        return Ok(Made::Untold);
                    }
                }
            }
            let written = row.bytes() - before;
            if Some(number) == self.payload && written > self.max_payload {
                unread_bytes = Some(written as u64);
            }
        }
        let place = match &self.place {
            None => Place::Int(0),
            Some(cell) => match place(cell, at(cell), self.by_id)? {
                Some(place) => place,
                None => return Ok(Made::Untold),
            },
        };
        let timestamp_ms = match &self.timestamp {
            None => None,
            Some(cell) => match at(cell) {
                Value::Absent => return Ok(Made::Untold),
                Value::Null => None,
                Value::Is(value) => match cell.milliseconds(value) {
                    None if !cell.is_clock() => {
                        self.unreadable.tell(&self.table, &place);
                        None
                    }
                    found => found,
                },
            },
        };
        if let (Some(_), Some(payload)) = (unread_bytes, self.payload) {
            row = row.with(payload, None);
        }
        let event = Event { place, row, timestamp_ms, unread_bytes, replay: None };
        Ok(if unread_bytes.is_some() { Made::Long(event) } else { Made::Whole(event) })
    }

    /// A payload that is longer in the log is longer as text too: a form of JSON is shorter there by no more.
    fn longest(&self) -> usize {
        self.max_payload.saturating_mul(2).saturating_add(1 << 10)
    }
}

fn place(cell: &Cell, value: Value<'_>, by_id: bool) -> Result<Option<Place>, Malformed> {
    let Value::Is(value) = value else { return Ok(None) };
    if let Kind::Int { unsigned, .. } = cell.kind {
        let number = integer(value, unsigned);
        return Ok(match by_id {
            true => Some(Place::Text(number.to_string().into())),
            false => i64::try_from(number).ok().map(Place::Int),
        });
    }
    let mut text = Vec::new();
    if !cell.write_id(value, &mut text)? {
        return Ok(None);
    }
    Ok(String::from_utf8(text).ok().map(|text| Place::Text(text.into())))
}

/// The columns that rows have, as bits, and the rows.
pub fn image(rest: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let wrong = Malformed("rows that are cut short");
    let (width, rest) = packed(rest)?;
    let width = usize::try_from(width).map_err(|_| wrong)?;
    rest.split_at_checked(width.div_ceil(8)).ok_or(wrong)
}
