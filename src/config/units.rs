//! Durations (`250ms`, `5s`, `2m`) and sizes (`900KiB`, `64MiB`) as the file writes them.

use std::time::Duration;

/// What a duration looks like, for messages.
pub(super) const DURATION: &str = "a duration such as 250ms, 5s or 2m";
/// What a duration that may be endless looks like, for messages.
pub(super) const DURATION_OR_NEVER: &str = "never, or a duration such as 30s, 10m or 2h";
/// What a size looks like, for messages.
pub(super) const SIZE: &str = "a size such as 16KiB, 64MiB or a number of bytes";
/// What a size that may be left to the relay looks like, for messages.
pub(super) const SIZE_OR_AUTO: &str = "auto, or a size such as 512KiB";

/// What an address looks like, for messages.
pub(super) const ADDRESS: &str = "an IP address and a port such as 127.0.0.1:9464 or [::]:9464";

/// Parses a duration; `None` where it is none.
pub(super) fn parse_duration(text: &str) -> Option<Duration> {
    humantime::parse_duration(text.trim()).ok()
}

/// Parses a duration or `never`, which is `Some(None)`.
#[expect(clippy::option_option, reason = "the outer one tells whether it parsed, as in its neighbours")]
pub(super) fn parse_duration_or_never(text: &str) -> Option<Option<Duration>> {
    match text.trim() {
        "never" => Some(None),
        text => parse_duration(text).map(Some),
    }
}

/// Parses a size into bytes; `None` where it is none. Units are powers of 1024 only: `12MB` is
/// refused rather than guessed at.
pub(super) fn parse_size(text: &str) -> Option<u64> {
    let text = text.trim();
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    let shift = match unit.trim_start().to_ascii_lowercase().as_str() {
        "" | "b" => 0,
        "kib" => 10,
        "mib" => 20,
        "gib" => 30,
        "tib" => 40,
        _ => return None,
    };
    number.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// Parses a size or `auto`, which is `Some(None)`.
#[expect(clippy::option_option, reason = "the outer one tells whether it parsed, as in its neighbours")]
pub(super) fn parse_size_or_auto(text: &str) -> Option<Option<u64>> {
    match text.trim() {
        "auto" => Some(None),
        text => parse_size(text).map(Some),
    }
}

/// Writes a size with the largest unit that divides it.
pub(super) fn format_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        if bytes > 0 && bytes.trailing_zeros() >= shift {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{bytes}B")
}

/// `#[serde(with = "units::duration")]` for a [`Duration`] field.
pub(super) mod duration {
    use super::*;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        let text = String::deserialize(from)?;
        parse_duration(&text).ok_or_else(|| D::Error::custom(format!("expected {DURATION}")))
    }

    pub fn serialize<S: Serializer>(value: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(&humantime::format_duration(*value))
    }
}

/// `#[serde(with = "units::duration_or_never")]` for an `Option<Duration>` field.
pub(super) mod duration_or_never {
    use super::*;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<Duration>, D::Error> {
        let text = String::deserialize(from)?;
        parse_duration_or_never(&text)
            .ok_or_else(|| D::Error::custom(format!("expected {DURATION_OR_NEVER}")))
    }

    #[expect(clippy::ref_option, reason = "serde calls it so")]
    pub fn serialize<S: Serializer>(value: &Option<Duration>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            None => to.serialize_str("never"),
            Some(duration) => to.collect_str(&humantime::format_duration(*duration)),
        }
    }
}

/// `#[serde(with = "units::size")]` for a `usize` field, in bytes.
pub(super) mod size {
    use super::*;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<usize, D::Error> {
        let text = String::deserialize(from)?;
        parse_size(&text)
            .and_then(|bytes| usize::try_from(bytes).ok())
            .ok_or_else(|| D::Error::custom(format!("expected {SIZE}")))
    }

    #[expect(clippy::trivially_copy_pass_by_ref, reason = "serde calls it so")]
    pub fn serialize<S: Serializer>(value: &usize, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&format_size(*value as u64))
    }
}

/// `#[serde(with = "units::size_or_auto")]` for an `Option<usize>` field, in bytes.
pub(super) mod size_or_auto {
    use super::*;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<usize>, D::Error> {
        let text = String::deserialize(from)?;
        parse_size_or_auto(&text)
            .and_then(|bytes| bytes.map(usize::try_from).transpose().ok())
            .ok_or_else(|| D::Error::custom(format!("expected {SIZE_OR_AUTO}")))
    }

    #[expect(clippy::ref_option, reason = "serde calls it so")]
    pub fn serialize<S: Serializer>(value: &Option<usize>, to: S) -> Result<S::Ok, S::Error> {
        match value {
            None => to.serialize_str("auto"),
            Some(bytes) => to.serialize_str(&format_size(*bytes as u64)),
        }
    }
}

/// The schema of a duration: `#[schemars(with = "units::DurationText")]`.
pub(super) struct DurationText;
/// The schema of a duration that may be endless: `#[schemars(with = "units::DurationOrNeverText")]`.
pub(super) struct DurationOrNeverText;
/// The schema of a size: `#[schemars(with = "units::SizeText")]`.
pub(super) struct SizeText;
/// The schema of a size that may be left to the relay: `#[schemars(with = "units::SizeOrAutoText")]`.
pub(super) struct SizeOrAutoText;
/// The schema of an address: `#[schemars(with = "units::AddressText")]`.
pub(super) struct AddressText;

/// The schemas differ in their `format`, which `shape` reads, and in nothing else.
macro_rules! text_schema {
    ($name:ident, $schema:tt) => {
        impl schemars::JsonSchema for $name {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                stringify!($name).into()
            }

            fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
                schemars::json_schema!($schema)
            }

            fn inline_schema() -> bool {
                true
            }
        }
    };
}

text_schema!(DurationText, { "type": "string", "format": "duration", "examples": ["250ms", "5s", "2m"] });
text_schema!(DurationOrNeverText, { "type": "string", "format": "duration-or-never", "examples": ["never", "10m"] });
text_schema!(AddressText, { "type": "string", "format": "address", "examples": ["127.0.0.1:9464"] });
text_schema!(SizeText, { "type": ["string", "integer"], "format": "size", "examples": ["900KiB", "64MiB"] });
text_schema!(SizeOrAutoText, { "type": ["string", "integer"], "format": "size-or-auto", "examples": ["auto", "512KiB"] });

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_need_a_unit() {
        let ms = Duration::from_millis;
        for (text, expected) in [
            ("250ms", Some(ms(250))),
            ("5s", Some(ms(5_000))),
            ("2m", Some(ms(120_000))),
            ("1m 30s", Some(ms(90_000))),
            ("5", None),
            ("-5s", None),
            ("", None),
            ("soon", None),
        ] {
            assert_eq!(parse_duration(text), expected, "{text}");
        }
    }

    #[test]
    fn a_duration_may_be_endless_where_that_is_allowed() {
        assert_eq!(parse_duration_or_never("never"), Some(None));
        assert_eq!(parse_duration_or_never("10m"), Some(Some(Duration::from_mins(10))));
        assert_eq!(parse_duration_or_never("soon"), None);
    }

    #[test]
    fn sizes_are_powers_of_1024() {
        for (text, expected) in [
            ("900KiB", Some(900 << 10)),
            ("64MiB", Some(64 << 20)),
            ("4 GiB", Some(4 << 30)),
            ("512", Some(512)),
            ("512B", Some(512)),
            ("12MB", None),
            ("12M", None),
            ("1.5GiB", None),
            ("-1", None),
            ("KiB", None),
            ("99999999TiB", None),
        ] {
            assert_eq!(parse_size(text), expected, "{text}");
        }
    }

    #[test]
    fn a_size_may_be_left_to_the_relay_where_that_is_allowed() {
        assert_eq!(parse_size_or_auto("auto"), Some(None));
        assert_eq!(parse_size_or_auto("512KiB"), Some(Some(512 << 10)));
        assert_eq!(parse_size_or_auto("12MB"), None);
    }

    #[test]
    fn sizes_are_written_as_they_are_read() {
        for bytes in [0, 1, 1023, 1024, 12 << 20, (12 << 20) + 1, 1 << 30] {
            assert_eq!(parse_size(&format_size(bytes)), Some(bytes));
        }
        assert_eq!(format_size(12 << 20), "12MiB");
    }
}
