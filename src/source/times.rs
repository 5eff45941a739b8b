//! The time of an event, where its column has no times but texts or numbers; and what cannot be read as one.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use chrono::{DateTime, NaiveDate, NaiveDateTime, NaiveTime};
use tracing::warn;

use crate::event::Place;

/// Milliseconds since the Unix epoch, of a text: ISO 8601, which is in UTC where it does not say, or a whole number, which
/// is that already. `None` where it is neither.
pub fn milliseconds(text: &str) -> Option<i64> {
    let text = text.trim();
    if let Ok(number) = text.parse() {
        return Some(number);
    }
    let text = text.replacen('T', " ", 1);
    if let Ok(date) = NaiveDate::parse_from_str(&text, "%Y-%m-%d") {
        return Some(date.and_time(NaiveTime::MIN).and_utc().timestamp_millis());
    }
    let in_utc = NaiveDateTime::parse_from_str(&text, "%Y-%m-%d %H:%M:%S%.f").map(|time| time.and_utc());
    let with_zone = |_| DateTime::parse_from_str(&text, "%Y-%m-%d %H:%M:%S%.f%#z").map(|time| time.to_utc());
    in_utc.or_else(with_zone).ok().map(|time| time.timestamp_millis())
}

/// A time that cannot be read stops nothing: its event goes out without it. That is said once for each table. Clones
/// share it.
#[derive(Clone, Debug, Default)]
pub struct Unreadable(Arc<AtomicBool>);

impl Unreadable {
    pub fn tell(&self, table: &str, place: &Place) {
        if !self.0.swap(true, Ordering::Relaxed) {
            warn!(
                table,
                %place,
                "the time of an event cannot be read, so its record has the time of publishing; this is said once: \
                 expected a time, ISO 8601 or milliseconds in columns.timestamp, or columns.created_at"
            );
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_times_if_they_say_which() {
        for (text, expected) in [
            ("2026-01-02T03:04:05.678Z", Some(1_767_323_045_678)),
            ("2026-01-02T04:04:05.678+01:00", Some(1_767_323_045_678)),
            ("2026-01-02 03:04:05.678+00", Some(1_767_323_045_678)),
            ("2026-01-02 03:04:05.678", Some(1_767_323_045_678)),
            ("2026-01-02 03:04:05", Some(1_767_323_045_000)),
            ("2026-01-02", Some(1_767_312_000_000)),
            ("1767323045678", Some(1_767_323_045_678)),
            (" -7 ", Some(-7)),
            // Seconds, perhaps.
            ("1767323045.678", None),
            ("2026-02-30", None),
            ("infinity", None),
            ("0044-03-15 00:00:00+00 BC", None),
            ("junk", None),
            ("", None),
        ] {
            assert_eq!(milliseconds(text), expected, "{text}");
        }
    }
}
