//! Days and times of the log.

use std::io::Write as _;

use super::{event::big, map::fraction};

/// Hours, minutes and seconds as they are packed: the latter two in six bits each.
pub struct Clock {
    pub is_negative: bool,
    pub packed: u64,
    pub micros: u32,
}

impl Clock {
    pub fn parts(&self) -> (u32, u32, u32) {
        let packed = self.packed as u32;
        (packed >> 12 & 0x3ff, packed >> 6 & 0x3f, packed & 0x3f)
    }

    /// A time in its own form: above zero by so much as it is above the middle.
    pub fn of_time(value: &[u8]) -> Clock {
        let places = value.len().saturating_sub(3);
        // As with its fraction: one number, so that less than nothing is as simple as more.
        let whole = big(value) as i64 - (0x80_0000 << (8 * places));
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

/// A DATETIME: its date as [`write_date`] takes it.
pub fn date_and_time(value: &[u8]) -> (u64, Clock) {
    let (whole, rest) = value.split_at_checked(5).unwrap_or((value, &[]));
    let whole = big(whole) & 0x7f_ffff_ffff;
    (whole >> 17, Clock { is_negative: false, packed: whole & 0x1_ffff, micros: fraction(rest) })
}

pub fn write_timestamp(value: &[u8], digits: u8, out: &mut Vec<u8>) -> std::io::Result<()> {
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
