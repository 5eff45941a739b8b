//! From a row of the log to the same [`Event`] that polling makes of it, byte for byte.
//!
//! Polling takes bytea, text, varchar, json and xml as they are and everything else cast to text. The log
//! brings values by their type's send function where that says all, else by its output function; the two
//! differ from the cast for few types, and those are here.

use std::io::Write as _;

use super::pgoutput::{Cell, Column, Malformed, POSTGRES_EPOCH_SECONDS, Tuple};
use crate::{
    event::{Event, Place, Row},
    source::{
        database::TableSpec,
        times::{self, Unreadable},
    },
};

/// Types up to this number are the same in every server (src/include/access/transam.h, `FirstGenbkiObjectId`).
const LAST_BUILT_IN: u32 = 9_999;

/// What a type's values are in the log. Numbers are those of PostgreSQL's catalogue, pg_type.dat.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Type {
    /// Text in either form: text, varchar, json, name, enums.
    Text,
    Bytes,
    Int,
    Uuid,
    Bool,
    /// A version byte, then text.
    Jsonb,
    /// char(n), whose cast drops the blanks at its end.
    Padded,
    /// inet, whose cast never leaves the length of the network out.
    Inet,
    /// A domain over xml: polling casts it and keeps the declaration (`<?xml …?>`) that the log leaves
    /// out, so nobody but the table can tell what its text is.
    Untold,
    /// timestamptz: its text depends on the session, so it is a number here.
    Timestamp,
    /// Anything else: as text, as the output function has it.
    Other,
}

impl Type {
    /// `base` is the type under a domain, or the type itself.
    pub fn new(oid: u32, base: u32, is_enum: bool) -> Type {
        match (oid, base) {
            (25 | 1043 | 114 | 19, _) => Type::Text,
            (17, _) => Type::Bytes,
            (20 | 21 | 23, _) => Type::Int,
            (2950, _) => Type::Uuid,
            (3802, _) => Type::Jsonb,
            (1184, _) => Type::Timestamp,
            (_, 16) => Type::Bool,
            (_, 1042) => Type::Padded,
            (_, 869) => Type::Inet,
            // Polling takes xml itself as it is sent, which is what the log has.
            (142, _) => Type::Other,
            (_, 142) => Type::Untold,
            _ if is_enum => Type::Text,
            _ => Type::Other,
        }
    }

    /// Whether the binary form can be made into what polling gives.
    fn speaks_binary(self) -> bool {
        !matches!(self, Type::Other | Type::Timestamp | Type::Inet | Type::Untold)
    }
}

/// A column of the table as the catalogue has it now.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    pub name: String,
    pub oid: u32,
    pub kind: Type,
}

/// Where the event's columns are in a relation, and what they are.
#[derive(Debug)]
pub struct Layout {
    cells: Vec<Option<(usize, Type)>>,
    place: (usize, Type),
    /// Whether rows are told apart by their id, whose text is their place then.
    by_id: bool,
    timestamp: Option<(usize, Type)>,
    payload: Option<usize>,
    max_payload: usize,
    width: usize,
    table: String,
    unreadable: Unreadable,
    /// Whether the table can be asked for what the log does not tell.
    stays: bool,
}

/// Whether all columns that matter can come in binary form, which is less work for both ends.
pub fn speaks_binary(spec: &TableSpec, columns: &[Known]) -> bool {
    let of = |name: &String| columns.iter().find(|column| column.name == *name).map(|column| column.kind);
    let place = spec.place();
    let timestamp = spec.timestamps.iter().find_map(of);
    spec.columns.iter().chain([place]).filter_map(of).all(Type::speaks_binary)
        && timestamp.is_none_or(|kind| matches!(kind, Type::Timestamp | Type::Int))
}

impl Layout {
    /// `None` where the relation is not what the table was when it was looked at: its rows are the
    /// table's then. Where only the log has the rows, they are what the table was when they were inserted.
    pub fn new(spec: &TableSpec, known: &[Known], relation: &[Column]) -> Option<Layout> {
        let stays = spec.stays();
        let find = |name: &String| {
            let index = relation.iter().position(|column| column.name == *name)?;
            let oid = relation[index].type_oid;
            let same = known.iter().find(|one| one.oid == oid && (one.name == *name || !stays));
            match same {
                Some(known) => Some((index, known.kind)),
                None if stays => None,
                None if oid <= LAST_BUILT_IN => Some((index, Type::new(oid, oid, false))),
                None => Some((index, Type::Other)),
            }
        };
        let mut cells = Vec::with_capacity(spec.columns.len());
        for name in &spec.columns {
            let cell = find(name);
            // A column that may be missing is missing in both places.
            let is_there = relation.iter().any(|column| column.name == *name)
                || (stays && known.iter().any(|one| one.name == *name));
            if cell.is_none() && (is_there || !spec.optional.contains(name)) {
                return None;
            }
            cells.push(cell);
        }
        let timestamp = spec.timestamps.iter().find(|name| match stays {
            true => known.iter().any(|one| one.name == **name),
            false => find(name).is_some(),
        });
        let timestamp = match timestamp {
            Some(name) => Some(find(name)?),
            None => None,
        };
        Some(Layout {
            cells,
            place: find(spec.place())?,
            by_id: spec.slower().is_some(),
            timestamp,
            payload: spec.columns.iter().position(|name| *name == spec.payload),
            max_payload: spec.max_payload,
            width: relation.len(),
            table: spec.name.clone(),
            unreadable: spec.unreadable.clone(),
            stays,
        })
    }

    /// The event of a row. `Ok(None)`: the table has to be asked for it, if it has it: else what the log does
    /// not tell is what the log has, or nothing.
    pub fn event<'a>(
        &self,
        tuple: Tuple<'a>,
        scratch: &mut Vec<Cell<'a>>,
    ) -> Result<Option<Event>, Malformed> {
        scratch.clear();
        for cell in tuple.cells() {
            scratch.push(cell?);
        }
        if scratch.len() != self.width {
            return Ok(None);
        }
        let size: usize = self.cells.iter().flatten().map(|(index, _)| length(scratch[*index])).sum();
        let mut row = Row::with_capacity(self.cells.len(), size);
        let mut unread_bytes = None;
        for (number, cell) in self.cells.iter().enumerate() {
            let Some((index, kind)) = cell else {
                row.push(None);
                continue;
            };
            let before = row.bytes();
            let made = match (scratch[*index], kind) {
                (Cell::Null, _) => {
                    row.push(None);
                    true
                }
                (value, Type::Untold) if !self.stays => row.push_made(|out| write(value, Type::Other, out)),
                (value, kind) => row.push_made(|out| write(value, *kind, out)),
            };
            let bytes = row.bytes() - before;
            if Some(number) == self.payload && bytes > self.max_payload {
                unread_bytes = Some(bytes as u64);
            }
            if !made || (self.stays && unread_bytes.is_some()) {
                return Ok(None);
            }
        }
        if let (Some(_), Some(payload)) = (unread_bytes, self.payload) {
            row = row.with(payload, None);
        }
        let place = match place(scratch[self.place.0], self.place.1) {
            Some(Place::Int(number)) if self.by_id => Place::Text(number.to_string().into()),
            Some(place) => place,
            // It has its place in the log.
            None if !self.stays => Place::Int(0),
            None => return Ok(None),
        };
        let timestamp_ms = match self.timestamp {
            None => None,
            Some((index, kind)) => match milliseconds(scratch[index], kind) {
                None if self.stays => return Ok(None),
                found => {
                    let found = found.flatten();
                    if found.is_none() && scratch[index] != Cell::Null {
                        self.unreadable.tell(&self.table, &place);
                    }
                    found
                }
            },
        };
        Ok(Some(Event { place, row, timestamp_ms, unread_bytes, replay: None }))
    }
}

impl Layout {
    /// The event of a row that is too large to be read: the values that are in the part that came, without
    /// the payload.
    pub fn unread(&self, tuple: Tuple<'_>, bytes: usize) -> Event {
        let came: Vec<Cell<'_>> = tuple.cells().map_while(Result::ok).collect();
        let mut row = Row::with_capacity(self.cells.len(), 256);
        for (number, cell) in self.cells.iter().enumerate() {
            let value = cell.and_then(|(index, kind)| Some((*came.get(index)?, kind)));
            let made = match value {
                Some((value, kind)) if Some(number) != self.payload && value != Cell::Null => {
                    row.push_made(|out| write(value, kind, out))
                }
                _ => false,
            };
            if !made {
                row.push(None);
            }
        }
        let place = Place::Int(0);
        Event { place, row, timestamp_ms: None, unread_bytes: Some(bytes as u64), replay: None }
    }
}

fn length(cell: Cell<'_>) -> usize {
    match cell {
        Cell::Null => 0,
        Cell::Text(value) | Cell::Binary(value) => value.len(),
    }
}

/// Writes a value as polling would have it; `false` where that cannot be told.
fn write(cell: Cell<'_>, kind: Type, out: &mut Vec<u8>) -> bool {
    match (cell, kind) {
        (Cell::Binary(value), Type::Text | Type::Bytes)
        | (Cell::Text(value), Type::Text | Type::Int | Type::Uuid | Type::Jsonb | Type::Other) => {
            out.extend_from_slice(value);
        }
        (Cell::Text(value) | Cell::Binary(value), Type::Padded) => {
            out.extend_from_slice(value.trim_suffix_blanks());
        }
        (Cell::Text(value), Type::Bytes) => return unhex(value, out),
        (Cell::Text(value), Type::Inet) => {
            out.extend_from_slice(value);
            if !value.contains(&b'/') {
                out.extend_from_slice(if value.contains(&b':') { b"/128" } else { b"/32" });
            }
        }
        (Cell::Text(b"t") | Cell::Binary(&[1]), Type::Bool) => out.extend_from_slice(b"true"),
        (Cell::Text(b"f") | Cell::Binary(&[0]), Type::Bool) => out.extend_from_slice(b"false"),
        (Cell::Binary(value), Type::Int) => {
            let Some(number) = integer(value) else { return false };
            return write!(out, "{number}").is_ok();
        }
        (Cell::Binary(value), Type::Uuid) => {
            let Ok(id) = uuid::Uuid::from_slice(value) else { return false };
            out.extend_from_slice(id.hyphenated().encode_lower(&mut uuid::Uuid::encode_buffer()).as_bytes());
        }
        (Cell::Binary([1, text @ ..]), Type::Jsonb) => out.extend_from_slice(text),
        // By the session's own settings, which are those that polling has.
        (Cell::Text(value), Type::Timestamp) => out.extend_from_slice(value),
        _ => return false,
    }
    true
}

trait Blanks {
    fn trim_suffix_blanks(&self) -> &[u8];
}

impl Blanks for [u8] {
    fn trim_suffix_blanks(&self) -> &[u8] {
        let end = self.iter().rposition(|byte| *byte != b' ').map_or(0, |last| last + 1);
        &self[..end]
    }
}

/// `\x` and two digits a byte: bytea_output = hex.
fn unhex(text: &[u8], out: &mut Vec<u8>) -> bool {
    let Some(digits) = text.strip_prefix(b"\\x") else { return false };
    let (pairs, rest) = digits.as_chunks::<2>();
    let value = |digit: u8| (digit as char).to_digit(16);
    for [high, low] in pairs {
        let (Some(high), Some(low)) = (value(*high), value(*low)) else { return false };
        out.push((high << 4 | low) as u8);
    }
    rest.is_empty()
}

fn integer(value: &[u8]) -> Option<i64> {
    match value.len() {
        2 => Some(i64::from(i16::from_be_bytes(value.try_into().ok()?))),
        4 => Some(i64::from(i32::from_be_bytes(value.try_into().ok()?))),
        8 => Some(i64::from_be_bytes(value.try_into().ok()?)),
        _ => None,
    }
}

fn place(cell: Cell<'_>, kind: Type) -> Option<Place> {
    match (cell, kind) {
        (Cell::Binary(value), Type::Int) => integer(value).map(Place::Int),
        (Cell::Text(value), Type::Int) => str::from_utf8(value).ok()?.parse().ok().map(Place::Int),
        (Cell::Null, _) => None,
        (value, _) => {
            let mut text = Vec::with_capacity(36);
            let made = match (value, kind) {
                // A place is what a cast to text gives, for bytea too.
                (Cell::Text(value), Type::Bytes) => write(Cell::Text(value), Type::Other, &mut text),
                (Cell::Binary(value), Type::Bytes) => {
                    text.extend_from_slice(b"\\x");
                    value.iter().try_for_each(|byte| write!(text, "{byte:02x}")).is_ok()
                }
                _ => write(value, kind, &mut text),
            };
            String::from_utf8(text).ok().filter(|_| made).map(|text| Place::Text(text.into()))
        }
    }
}

/// From PostgreSQL's microseconds.
fn epoch_milliseconds(micros: i64) -> i64 {
    micros.div_euclid(1000) + POSTGRES_EPOCH_SECONDS * 1000
}

/// `None` where it cannot be told; `Some(None)` for NULL, and for what polling finds to be no time.
#[expect(clippy::option_option, reason = "the outer one tells whether it can be told")]
fn milliseconds(cell: Cell<'_>, kind: Type) -> Option<Option<i64>> {
    match (cell, kind) {
        (Cell::Null | Cell::Text(b"infinity" | b"-infinity"), _) => Some(None),
        // A number is in milliseconds already.
        (Cell::Binary(value), Type::Int) => Some(Some(integer(value)?)),
        (Cell::Text(value), Type::Int) => Some(Some(str::from_utf8(value).ok()?.parse().ok()?)),
        (Cell::Binary(value), Type::Timestamp) => {
            let micros = i64::from_be_bytes(value.try_into().ok()?);
            // `infinity` is no time that a record can have.
            let micros = Some(micros).filter(|micros| !matches!(*micros, i64::MIN | i64::MAX));
            Some(micros.map(epoch_milliseconds))
        }
        (Cell::Text(value) | Cell::Binary(value), Type::Text) => {
            Some(str::from_utf8(value).ok().and_then(times::milliseconds))
        }
        // In UTC, as the session asks for: 2026-11-25 00:35:05.123456+00, or the date alone.
        (Cell::Text(value), _) => Some(Some(times::milliseconds(str::from_utf8(value).ok()?)?)),
        (Cell::Binary(_), _) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn written(cell: Cell<'_>, kind: Type) -> Option<String> {
        let mut out = Vec::new();
        write(cell, kind, &mut out).then(|| String::from_utf8(out).unwrap())
    }

    #[test]
    fn values_are_what_a_cast_to_text_gives() {
        let id = uuid::Uuid::from_u128(1);
        for (cell, kind, expected) in [
            (Cell::Binary(b"x"), Type::Text, Some("x")),
            (Cell::Text(b"\\x6869"), Type::Bytes, Some("hi")),
            (Cell::Text(b"\\x686"), Type::Bytes, None),
            (Cell::Text(b"hi"), Type::Bytes, None),
            (Cell::Text(b"t"), Type::Bool, Some("true")),
            (Cell::Binary(&[0]), Type::Bool, Some("false")),
            (Cell::Text(b"ab  "), Type::Padded, Some("ab")),
            (Cell::Binary(&7_i32.to_be_bytes()), Type::Int, Some("7")),
            (Cell::Binary(&(-7_i64).to_be_bytes()), Type::Int, Some("-7")),
            (Cell::Binary(&[1, 2, 3]), Type::Int, None),
            (Cell::Binary(id.as_bytes()), Type::Uuid, Some("00000000-0000-0000-0000-000000000001")),
            (Cell::Binary(b"\x01{}"), Type::Jsonb, Some("{}")),
            (Cell::Binary(b"\x02{}"), Type::Jsonb, None),
            (Cell::Text(b"1.50"), Type::Other, Some("1.50")),
            (Cell::Text(b"10.0.0.1"), Type::Inet, Some("10.0.0.1/32")),
            (Cell::Text(b"10.0.0.1/8"), Type::Inet, Some("10.0.0.1/8")),
            (Cell::Text(b"::1"), Type::Inet, Some("::1/128")),
            (Cell::Text(b"<a/>"), Type::Untold, None),
            (Cell::Binary(b"?"), Type::Other, None),
        ] {
            assert_eq!(written(cell, kind).as_deref(), expected, "{cell:?} {kind:?}");
        }
    }

    #[test]
    fn times_are_milliseconds_in_every_form() {
        let micros = 1_500_000_i64.to_be_bytes();
        assert_eq!(milliseconds(Cell::Binary(&micros), Type::Timestamp), Some(Some(946_684_801_500)));
        let text = Cell::Text(b"2000-01-01 00:00:01.5+00");
        assert_eq!(milliseconds(text, Type::Timestamp), Some(Some(946_684_801_500)));
        assert_eq!(
            milliseconds(Cell::Text(b"2000-01-01 00:00:01"), Type::Other),
            Some(Some(946_684_801_000))
        );
        assert_eq!(milliseconds(Cell::Text(b"12"), Type::Int), Some(Some(12)));
        assert_eq!(milliseconds(Cell::Null, Type::Timestamp), Some(None));
        let infinity = milliseconds(Cell::Binary(&i64::MAX.to_be_bytes()), Type::Timestamp);
        assert_eq!(infinity, Some(None));
        assert_eq!(milliseconds(Cell::Text(b"infinity"), Type::Timestamp), infinity);
        assert_eq!(milliseconds(Cell::Text(b"2000-01-02"), Type::Other), Some(Some(946_771_200_000)));
        let rfc3339 = Cell::Text(b"2000-01-01T01:00:00.5+01:00");
        assert_eq!(milliseconds(rfc3339, Type::Text), Some(Some(946_684_800_500)));
        assert_eq!(milliseconds(Cell::Text(b"junk"), Type::Text), Some(None));
        assert_eq!(milliseconds(Cell::Text(b"junk"), Type::Other), None);
        assert_eq!(milliseconds(Cell::Text(b"0044-03-15 00:00:00+00 BC"), Type::Timestamp), None);
    }

    #[test]
    fn a_place_is_what_a_cast_to_text_gives() {
        let text = |text: &str| Some(Place::Text(text.into()));
        assert_eq!(place(Cell::Binary(b"\x00ab"), Type::Bytes), text("\\x006162"));
        assert_eq!(place(Cell::Text(b"\\x006162"), Type::Bytes), text("\\x006162"));
        assert_eq!(place(Cell::Binary(b"ab "), Type::Padded), text("ab"));
        assert_eq!(place(Cell::Binary(&7_i16.to_be_bytes()), Type::Int), Some(Place::Int(7)));
        assert_eq!(place(Cell::Text(b"7"), Type::Other), text("7"));
        assert_eq!(place(Cell::Null, Type::Int), None);
    }
}
