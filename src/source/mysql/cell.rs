//! One value of a row, as polling would have it.

use std::io::Write as _;

use super::{
    event::{Malformed, big, little},
    json,
    kind::Kind,
    map::{Written, fraction},
    number::{write_decimal, write_double, write_float},
    time::{Clock, date_and_time, write_date, write_timestamp},
};
use crate::source::times;

/// No time has more bytes.
const LONGEST_TIME: usize = 100;

/// One of the event's columns: where it is in the map, and how it is written.
#[derive(Clone, Debug)]
pub struct Cell {
    pub index: usize,
    pub kind: Kind,
    pub written: Written,
    /// Bytes that are an id: as a UUID, or as digits.
    pub is_bytes: bool,
    pub is_uuid: bool,
}

/// A whole number, as it is written.
pub fn integer(value: &[u8], unsigned: bool) -> i128 {
    let number = little(value);
    let bits = 8 * value.len().min(8) as u32;
    match unsigned || bits == 0 || number >> (bits - 1) & 1 == 0 {
        true => i128::from(number),
        false => i128::from(number) - (1_i128 << bits),
    }
}

impl Cell {
    /// Writes a value as polling would have it; `false` where that cannot be told.
    pub fn write(&self, value: &[u8], most: usize, out: &mut Vec<u8>) -> Result<bool, Malformed> {
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
                let number = big(value);
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
    pub fn write_id(&self, value: &[u8], out: &mut Vec<u8>) -> Result<bool, Malformed> {
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

    /// Whether each value is a time.
    pub fn is_clock(&self) -> bool {
        matches!(self.kind, Kind::Int { .. } | Kind::Date | Kind::DateTime | Kind::Timestamp)
    }

    /// Milliseconds since the Unix epoch; `None` for what is no day, and for a text that is no time.
    pub fn milliseconds(&self, value: &[u8]) -> Option<i64> {
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
            _ => {
                let mut text = Vec::new();
                let is_text = self.write(value, LONGEST_TIME, &mut text).ok()?;
                return times::milliseconds(str::from_utf8(&text).ok().filter(|_| is_text)?);
            }
        };
        Some(micros / 1000)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whole_numbers_are_told_with_their_sign() {
        assert_eq!(integer(&[0xff], false), -1);
        assert_eq!(integer(&[0xff], true), 255);
        assert_eq!(integer(&[0xff; 8], true), i128::from(u64::MAX));
        assert_eq!(integer(&i64::MIN.to_le_bytes(), false), i128::from(i64::MIN));
        assert_eq!(integer(&[0, 0, 0x80], false), -8_388_608);
    }
}
