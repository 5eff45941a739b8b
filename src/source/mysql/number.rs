//! Numbers as the servers write them: decimals from their packed form, and floating point.

use std::io::Write as _;

use super::event::big;

/// Nine digits are four bytes; fewer of them need fewer.
const DIGITS: usize = 9;
const BYTES: [usize; DIGITS + 1] = [0, 1, 1, 2, 2, 3, 3, 4, 4, 4];

/// The length of a packed decimal of so many digits, and so many of them behind the point.
pub fn decimal_length(precision: u8, scale: u8) -> Option<usize> {
    let before = usize::from(precision.checked_sub(scale)?);
    let length = |digits: usize| digits / DIGITS * 4 + BYTES[digits % DIGITS];
    Some(length(before) + length(usize::from(scale)))
}

/// Writes a packed decimal. `false` where it is none.
pub fn write_decimal(bytes: &[u8], precision: u8, scale: u8, out: &mut Vec<u8>) -> bool {
    if decimal_length(precision, scale) != Some(bytes.len()) || bytes.is_empty() {
        return false;
    }
    let is_negative = bytes[0] & 0x80 == 0;
    let mut plain = bytes.to_vec();
    plain[0] ^= 0x80;
    if is_negative {
        plain.iter_mut().for_each(|byte| *byte = !*byte);
        out.push(b'-');
    }
    let before = usize::from(precision - scale);
    let mut rest = &plain[..];
    let mut group = |digits: usize, out: &mut Vec<u8>| -> bool {
        let (bytes, after) = rest.split_at(BYTES[digits]);
        rest = after;
        let number = big(bytes);
        number < 10_u64.pow(digits as u32) && (digits == 0 || write!(out, "{number:0digits$}").is_ok())
    };
    let mut whole = Vec::with_capacity(before + 1);
    let mut good = group(before % DIGITS, &mut whole);
    for _ in 0..before / DIGITS {
        good &= group(DIGITS, &mut whole);
    }
    let zeros = whole.iter().take_while(|digit| **digit == b'0').count();
    let whole = if zeros == whole.len() { b"0" } else { &whole[zeros..] };
    out.extend_from_slice(whole);
    if scale > 0 {
        out.push(b'.');
        for _ in 0..usize::from(scale) / DIGITS {
            good &= group(DIGITS, out);
        }
        good &= group(usize::from(scale) % DIGITS, out);
    }
    good
}

/// Without an exponent up to 15 digits before the point or 14 zeros behind it, with one beyond. So it is in
/// both servers.
const POINTS: std::ops::RangeInclusive<i32> = -14..=15;

/// Writes a number with as few digits as tell it from all others.
pub fn write_double(number: f64, out: &mut Vec<u8>) {
    let shortest = format!("{number:e}");
    write_digits(&shortest, out);
}

/// Writes a number of single precision: with six digits.
pub fn write_float(number: f32, out: &mut Vec<u8>) {
    write_digits(&format!("{:.5e}", f64::from(number)), out);
}

/// `-1.25e3`, in the servers' way.
fn write_digits(text: &str, out: &mut Vec<u8>) {
    let (number, exponent) = text.split_once('e').unwrap_or((text, "0"));
    let (sign, number) = number.strip_prefix('-').map_or(("", number), |number| ("-", number));
    let digits: String = number.chars().filter(|c| *c != '.').collect();
    let digits = digits.trim_end_matches('0');
    out.extend_from_slice(sign.as_bytes());
    if digits.is_empty() {
        out.push(b'0');
        return;
    }
    // The point is behind so many of the digits.
    let point = exponent.parse::<i32>().unwrap_or(0) + 1;
    let behind = usize::try_from(point).unwrap_or(0);
    if !POINTS.contains(&point) {
        let (first, rest) = digits.split_at(1);
        out.extend_from_slice(first.as_bytes());
        if !rest.is_empty() {
            let _ = write!(out, ".{rest}");
        }
        let _ = write!(out, "e{}", point - 1);
    } else if point <= 0 {
        let zeros = point.unsigned_abs() as usize;
        let _ = write!(out, "0.{:0<zeros$}{digits}", "");
    } else if digits.len() <= behind {
        let _ = write!(out, "{digits:0<behind$}");
    } else {
        let (whole, rest) = digits.split_at(behind);
        let _ = write!(out, "{whole}.{rest}");
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn double(number: f64) -> String {
        let mut out = Vec::new();
        write_double(number, &mut out);
        String::from_utf8(out).unwrap()
    }

    /// A decimal of these digits in the servers' packed form.
    fn pack(whole: &str, fraction: &str, is_negative: bool) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut group = |digits: &str| {
            let number: u64 = digits.parse().unwrap_or(0);
            bytes.extend_from_slice(&number.to_be_bytes()[8 - BYTES[digits.len()]..]);
        };
        let (first, rest) = whole.split_at(whole.len() % DIGITS);
        group(first);
        rest.as_bytes().chunks(DIGITS).for_each(|digits| group(str::from_utf8(digits).unwrap()));
        fraction.as_bytes().chunks(DIGITS).for_each(|digits| group(str::from_utf8(digits).unwrap()));
        if is_negative {
            bytes.iter_mut().for_each(|byte| *byte = !*byte);
        }
        bytes[0] ^= 0x80;
        bytes
    }

    #[test]
    fn floating_point_is_written_as_the_servers_do() {
        for (number, text) in [
            (0.0, "0"),
            (-0.0, "-0"),
            (1.0, "1"),
            (-12.5, "-12.5"),
            (0.1, "0.1"),
            (1e14, "100000000000000"),
            (1e15, "1e15"),
            (123_456_789_012_345.6, "123456789012345.6"),
            (1.5e20, "1.5e20"),
            (1e-15, "0.000000000000001"),
            (1.5e-16, "1.5e-16"),
            (f64::MAX, "1.7976931348623157e308"),
        ] {
            assert_eq!(double(number), text);
        }
        let mut out = Vec::new();
        write_float(16_777_216.0, &mut out);
        assert_eq!(out, b"16777200");
    }

    #[test]
    fn a_decimal_is_written_with_all_its_digits() {
        let write = |bytes: &[u8], precision, scale| {
            let mut out = Vec::new();
            assert!(write_decimal(bytes, precision, scale, &mut out));
            String::from_utf8(out).unwrap()
        };
        // The example of the server's own source: 1234567890.1234 of decimal(14,4).
        let bytes = [0x81, 0x0d, 0xfb, 0x38, 0xd2, 0x04, 0xd2];
        assert_eq!(write(&bytes, 14, 4), "1234567890.1234");
        assert_eq!(write(&bytes.map(|byte| !byte), 14, 4), "-1234567890.1234");
        assert!(!write_decimal(&bytes, 14, 5, &mut Vec::new()));
        assert!(!write_decimal(&[0xff; 7], 14, 4, &mut Vec::new()));
    }

    proptest! {
        #[test]
        fn a_double_is_read_back_as_it_was(bits in any::<u64>()) {
            let number = f64::from_bits(bits);
            if number.is_finite() {
                prop_assert_eq!(double(number).parse::<f64>().unwrap().to_bits(), bits);
            }
        }

        #[test]
        fn a_decimal_is_unpacked_as_it_was_packed(whole in "[0-9]{0,35}", fraction in "[0-9]{0,30}", negative in any::<bool>()) {
            prop_assume!(!whole.is_empty() || !fraction.is_empty());
            let bytes = pack(&whole, &fraction, negative);
            let mut out = Vec::new();
            prop_assert!(write_decimal(&bytes, (whole.len() + fraction.len()) as u8, fraction.len() as u8, &mut out));
            let digits = whole.trim_start_matches('0');
            let wanted = format!(
                "{}{}{}{fraction}",
                if negative { "-" } else { "" },
                if digits.is_empty() { "0" } else { digits },
                if fraction.is_empty() { "" } else { "." },
            );
            prop_assert_eq!(String::from_utf8(out).unwrap(), wanted);
        }

        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..40), precision in any::<u8>(), scale in any::<u8>()) {
            let _ = write_decimal(&bytes, precision, scale, &mut Vec::new());
        }
    }
}
