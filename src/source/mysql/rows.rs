//! From a row of the log to the same [`Event`] that polling makes of it, byte for byte.
//!
//! Polling has texts and bytes as they are, and everything else cast to text; bits as 0 and 1. A value that
//! the log does not tell in the same way has its table polled.

use std::io::Write as _;

use super::{
    event::{Malformed, little, packed},
    json,
    map::{TableMap, Written, code, fraction, has_bit},
    number::{write_decimal, write_double, write_float},
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

/// How values of a column are written as text.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Kind {
    /// As they are.
    Plain,
    /// Bytes of a fixed number; the log leaves zeros at the end out.
    Padded(usize),
    Latin1,
    Int {
        unsigned: bool,
        /// With zeros in front.
        digits: usize,
    },
    /// With so many digits behind the point, or as many as it has.
    Float(Option<usize>),
    Double(Option<usize>),
    Decimal,
    Date,
    Time,
    DateTime,
    Timestamp,
    Year,
    Bits,
    Enum(Vec<String>),
    Set(Vec<String>),
    Json,
}

/// The names between the brackets of an ENUM or a SET. `None` where one has a sign that may mean another.
fn labels(column_type: &str) -> Option<Vec<String>> {
    let list = column_type.split_once('(')?.1.strip_suffix(')')?;
    let (mut labels, mut rest) = (Vec::new(), list);
    loop {
        rest = rest.trim_start_matches(',').strip_prefix('\'')?;
        let mut label = String::new();
        loop {
            let (before, after) = rest.split_once('\'')?;
            label.push_str(before);
            rest = after;
            match rest.strip_prefix('\'') {
                Some(after) => {
                    label.push('\'');
                    rest = after;
                }
                None => break,
            }
        }
        if label.contains('\\') {
            return None;
        }
        labels.push(label);
        if rest.is_empty() {
            return Some(labels);
        }
    }
}

/// The numbers between the brackets of `decimal(10,2)`.
fn numbers(full: &str) -> impl Iterator<Item = usize> {
    let list = full.split_once('(').and_then(|(_, rest)| rest.split_once(')'));
    list.map_or("", |(list, _)| list).split(',').map_while(|number| number.trim().parse().ok())
}

impl Kind {
    /// How a column is written, and its codes in the log. `None`: nobody but the table can tell.
    fn of(column: &Column) -> Option<(Kind, u8)> {
        let full = column.full.as_str();
        let text = |code| match column.charset.as_deref() {
            Some("utf8mb4" | "utf8mb3" | "utf8" | "ascii") => Some((Kind::Plain, code)),
            Some("latin1") => Some((Kind::Latin1, code)),
            _ => None,
        };
        let int = |code| {
            let digits = if full.contains("zerofill") { numbers(full).next().unwrap_or(0) } else { 0 };
            Some((Kind::Int { unsigned: full.contains("unsigned"), digits }, code))
        };
        let point = || numbers(full).nth(1);
        match column.kind.as_str() {
            "binary" => Some((Kind::Padded(numbers(full).next()?), code::STRING)),
            "varbinary" => Some((Kind::Plain, code::VARCHAR)),
            "tinyblob" | "blob" | "mediumblob" | "longblob" => Some((Kind::Plain, code::BLOB)),
            "geometry" | "point" | "linestring" | "polygon" | "multipoint" | "multilinestring"
            | "multipolygon" | "geometrycollection" | "geomcollection" => Some((Kind::Plain, code::GEOMETRY)),
            "vector" => Some((Kind::Plain, code::VECTOR)),
            "char" => text(code::STRING),
            "varchar" => text(code::VARCHAR),
            "tinytext" | "text" | "mediumtext" | "longtext" => text(code::BLOB),
            "enum" => Some((Kind::Enum(labels(&column.written)?), code::ENUM)),
            "set" => Some((Kind::Set(labels(&column.written)?), code::SET)),
            "bit" => Some((Kind::Bits, code::BIT)),
            "json" => Some((Kind::Json, code::JSON)),
            "tinyint" => int(code::TINY),
            "smallint" => int(code::SHORT),
            "mediumint" => int(code::INT24),
            "int" => int(code::LONG),
            "bigint" => int(code::LONGLONG),
            "float" if !full.contains("zerofill") => Some((Kind::Float(point()), code::FLOAT)),
            "double" if !full.contains("zerofill") => Some((Kind::Double(point()), code::DOUBLE)),
            "decimal" if !full.contains("zerofill") => Some((Kind::Decimal, code::NEWDECIMAL)),
            "date" => Some((Kind::Date, code::DATE)),
            "time" => Some((Kind::Time, code::TIME2)),
            "datetime" => Some((Kind::DateTime, code::DATETIME2)),
            "timestamp" => Some((Kind::Timestamp, code::TIMESTAMP2)),
            "year" => Some((Kind::Year, code::YEAR)),
            _ => None,
        }
    }
}

/// One of the event's columns: where it is in the map, and how it is written.
#[derive(Clone, Debug)]
struct Cell {
    index: usize,
    kind: Kind,
    written: Written,
    /// Bytes that are an id: as a UUID, or as digits.
    is_bytes: bool,
    is_uuid: bool,
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

fn integer(value: &[u8], unsigned: bool) -> i128 {
    let number = little(value);
    let bits = 8 * value.len().min(8) as u32;
    match unsigned || bits == 0 || number >> (bits - 1) & 1 == 0 {
        true => i128::from(number),
        false => i128::from(number) - (1_i128 << bits),
    }
}

impl Cell {
    /// Writes a value as polling would have it; `false` where that cannot be told.
    fn write(&self, value: &[u8], most: usize, out: &mut Vec<u8>) -> Result<bool, Malformed> {
        let digits = self.written.meta[0];
        let done = match &self.kind {
            Kind::Plain => {
                out.extend_from_slice(value);
                Ok(())
            }
            Kind::Padded(width) => {
                out.extend_from_slice(value);
                out.resize(out.len() + width.saturating_sub(value.len()), 0);
                Ok(())
            }
            Kind::Latin1 => {
                // MySQL's is what the web's is: the bytes from 0x80 to 0x9f are signs too.
                let (text, _) = encoding_rs::WINDOWS_1252.decode_without_bom_handling(value);
                out.extend_from_slice(text.as_bytes());
                Ok(())
            }
            Kind::Int { unsigned, digits } => {
                let (number, digits) = (integer(value, *unsigned), *digits);
                write!(out, "{number:0digits$}")
            }
            Kind::Float(point) => {
                let Some(number) = value.first_chunk().map(|bytes| f32::from_le_bytes(*bytes)) else {
                    return Ok(false);
                };
                match point {
                    Some(point) => write!(out, "{number:.point$}"),
                    None => {
                        write_float(number, out);
                        Ok(())
                    }
                }
            }
            Kind::Double(point) => {
                let Some(number) = value.first_chunk().map(|bytes| f64::from_le_bytes(*bytes)) else {
                    return Ok(false);
                };
                match point {
                    Some(point) => write!(out, "{number:.point$}"),
                    None => {
                        write_double(number, out);
                        Ok(())
                    }
                }
            }
            Kind::Decimal => return Ok(write_decimal(value, digits, self.written.meta[1], out)),
            Kind::Date => {
                let number = little(value);
                write!(out, "{:04}-{:02}-{:02}", number >> 9, number >> 5 & 15, number & 31)
            }
            Kind::Time => {
                Clock::of_time(value).write(digits, out);
                Ok(())
            }
            Kind::DateTime => {
                let (date, clock) = date_and_time(value);
                write_date(date, out);
                out.push(b' ');
                clock.write(digits, out);
                Ok(())
            }
            Kind::Timestamp => write_timestamp(value, digits, out),
            Kind::Year => match value.first() {
                Some(0) | None => write!(out, "0000"),
                Some(year) => write!(out, "{}", 1900 + u32::from(*year)),
            },
            Kind::Bits => {
                let bits = usize::from(digits) + 8 * usize::from(self.written.meta[1]);
                let number = super::event::big(value);
                write!(out, "{number:0bits$b}")
            }
            Kind::Enum(labels) => match little(value) {
                0 => Ok(()),
                nth => match labels.get(nth as usize - 1) {
                    Some(label) => {
                        out.extend_from_slice(label.as_bytes());
                        Ok(())
                    }
                    None => return Ok(false),
                },
            },
            Kind::Set(labels) => {
                let bits = little(value);
                let names = labels.iter().enumerate().filter(|(nth, _)| bits >> nth & 1 == 1);
                let names: Vec<&str> = names.map(|(_, label)| label.as_str()).collect();
                out.extend_from_slice(names.join(",").as_bytes());
                Ok(())
            }
            Kind::Json => {
                json::write(value, most.saturating_add(1 << 20), out)?;
                Ok(())
            }
        };
        Ok(done.is_ok())
    }

    /// The value as the text of an id: a UUID of 16 bytes as people write it, other bytes as digits.
    fn write_id(&self, value: &[u8], out: &mut Vec<u8>) -> Result<bool, Malformed> {
        if !self.is_bytes {
            return self.write(value, usize::MAX, out);
        }
        let mut bytes = Vec::new();
        self.write(value, usize::MAX, &mut bytes)?;
        match uuid::Uuid::from_slice(&bytes).ok().filter(|_| self.is_uuid) {
            Some(id) => write!(out, "{}", id.hyphenated()),
            None => bytes.iter().try_for_each(|byte| write!(out, "{byte:02x}")),
        }
        .map(|()| true)
        .map_err(|_| Malformed("an unreadable id"))
    }

    /// Milliseconds since the Unix epoch; `None` for what is no day.
    fn milliseconds(&self, value: &[u8]) -> Option<i64> {
        let of_day = |year: u64, month: u64, day: u64| {
            chrono::NaiveDate::from_ymd_opt(year as i32, month as u32, day as u32)
        };
        let micros = match &self.kind {
            // As a cast to a signed number has it.
            Kind::Int { unsigned, .. } => return Some(integer(value, *unsigned) as i64),
            Kind::Date => {
                let number = little(value);
                let day = of_day(number >> 9, number >> 5 & 15, number & 31)?;
                day.and_time(chrono::NaiveTime::MIN).and_utc().timestamp_micros()
            }
            Kind::DateTime => {
                let (date, clock) = date_and_time(value);
                let (hour, minute, second) = clock.parts();
                let day = of_day(date / 32 / 13, date / 32 % 13, date % 32)?;
                let time = day.and_hms_micro_opt(hour, minute, second, clock.micros)?;
                time.and_utc().timestamp_micros()
            }
            Kind::Timestamp => {
                let (seconds, rest) = value.split_first_chunk()?;
                let seconds = i64::from(u32::from_be_bytes(*seconds));
                if seconds == 0 {
                    return None;
                }
                seconds * 1_000_000 + i64::from(fraction(rest))
            }
            _ => return None,
        };
        Some(micros / 1000)
    }
}

/// Hours, minutes and seconds as they are packed: the latter two in six bits each.
pub struct Clock {
    pub is_negative: bool,
    pub packed: u64,
    pub micros: u32,
}

impl Clock {
    fn parts(&self) -> (u32, u32, u32) {
        let packed = self.packed as u32;
        (packed >> 12 & 0x3ff, packed >> 6 & 0x3f, packed & 0x3f)
    }

    /// A time in its own form: above zero by so much as it is above the middle.
    fn of_time(value: &[u8]) -> Clock {
        let places = value.len().saturating_sub(3);
        // As with its fraction: one number, so that less than nothing is as simple as more.
        let whole = super::event::big(value) as i64 - (0x80_0000 << (8 * places));
        let size = whole.unsigned_abs();
        let rest = size & ((1 << (8 * places)) - 1);
        let unit = [1_000_000, 10_000, 100, 1][places.min(3)];
        let micros = if places == 0 { 0 } else { rest as u32 * unit };
        Clock { is_negative: whole < 0, packed: size >> (8 * places), micros }
    }

    pub fn write(&self, digits: u8, out: &mut Vec<u8>) {
        let (hour, minute, second) = self.parts();
        let sign = if self.is_negative { "-" } else { "" };
        let _ = write!(out, "{sign}{hour:02}:{minute:02}:{second:02}");
        write_fraction(self.micros, digits, out);
    }
}

fn write_fraction(micros: u32, digits: u8, out: &mut Vec<u8>) {
    if let Some(cut) = 6_u32.checked_sub(u32::from(digits)).filter(|_| digits > 0) {
        let digits = usize::from(digits);
        let _ = write!(out, ".{:0digits$}", micros / 10_u32.pow(cut));
    }
}

/// Year and month together, times 32, and the day.
pub fn write_date(packed: u64, out: &mut Vec<u8>) {
    let months = packed / 32;
    let _ = write!(out, "{:04}-{:02}-{:02}", months / 13, months % 13, packed % 32);
}

fn date_and_time(value: &[u8]) -> (u64, Clock) {
    let (whole, rest) = value.split_at_checked(5).unwrap_or((value, &[]));
    let whole = super::event::big(whole) & 0x7f_ffff_ffff;
    (whole >> 17, Clock { is_negative: false, packed: whole & 0x1_ffff, micros: fraction(rest) })
}

fn write_timestamp(value: &[u8], digits: u8, out: &mut Vec<u8>) -> std::io::Result<()> {
    let (seconds, rest) = value.split_first_chunk().unwrap_or((&[0; 4], &[]));
    match u32::from_be_bytes(*seconds) {
        0 => write!(out, "0000-00-00 00:00:00")?,
        seconds => {
            let time = chrono::DateTime::from_timestamp(i64::from(seconds), 0).unwrap_or_default();
            write!(out, "{}", time.format("%Y-%m-%d %H:%M:%S"))?;
        }
    }
    write_fraction(fraction(rest), digits, out);
    Ok(())
}

/// The columns that rows have, as bits, and the rows.
pub fn image(rest: &[u8]) -> Result<(&[u8], &[u8]), Malformed> {
    let wrong = Malformed("rows that are cut short");
    let (width, rest) = packed(rest)?;
    let width = usize::try_from(width).map_err(|_| wrong)?;
    rest.split_at_checked(width.div_ceil(8)).ok_or(wrong)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_an_enum_are_read_as_they_were_given() {
        let of = |text: &str| labels(text);
        assert_eq!(of("enum('a','it''s','','B,c')").unwrap(), ["a", "it's", "", "B,c"]);
        assert_eq!(of(r"set('a\b')"), None);
        assert_eq!(of("enum('a"), None);
        assert_eq!(of("int"), None);
        assert_eq!(numbers("decimal(10, 2) unsigned").collect::<Vec<_>>(), [10, 2]);
    }

    #[test]
    fn times_below_zero_are_told_with_their_fraction() {
        let time = |value: &[u8], digits| {
            let mut out = Vec::new();
            Clock::of_time(value).write(digits, &mut out);
            String::from_utf8(out).unwrap()
        };
        // From the server's own source: 00:00:00.00, -00:00:00.01, -00:00:01.00.
        assert_eq!(time(&[0x80, 0, 0, 0], 2), "00:00:00.00");
        assert_eq!(time(&[0x7f, 0xff, 0xff, 0xff], 2), "-00:00:00.01");
        assert_eq!(time(&[0x7f, 0xff, 0xff, 0], 2), "-00:00:01.00");
        assert_eq!(time(&[0x7f, 0xff, 0xff], 0), "-00:00:01");
        assert_eq!(time(&[0x80, 0x10, 0x83, 0, 0, 1], 6), "01:02:03.000001");
    }

    #[test]
    fn whole_numbers_are_told_with_their_sign() {
        assert_eq!(integer(&[0xff], false), -1);
        assert_eq!(integer(&[0xff], true), 255);
        assert_eq!(integer(&[0xff; 8], true), i128::from(u64::MAX));
        assert_eq!(integer(&i64::MIN.to_le_bytes(), false), i128::from(i64::MIN));
        assert_eq!(integer(&[0, 0, 0x80], false), -8_388_608);
    }

    proptest! {
        #[test]
        fn any_text_of_a_type_is_taken_or_refused(text in ".{0,40}") {
            let _ = labels(&text);
            numbers(&text).for_each(drop);
        }
    }
}
