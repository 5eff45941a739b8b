//! MySQL's binary JSON, written as the server casts it to text. (The format is described in the server's
//! source, sql-common/json_binary.h.)
//!
//! Offsets lead where they say, so a document may be a knot; depth and length of what is written are bounded.

use std::io::Write as _;

use base64::{Engine as _, engine::general_purpose::STANDARD};

use super::{
    event::{Malformed, little},
    map::code,
    number::{write_decimal, write_double},
    time::{Clock, write_date},
};

/// The server's own limit.
const DEEPEST: u32 = 100;

/// The length of a line of base64.
const LINE: usize = 76;

const WRONG: Malformed = Malformed("an unreadable JSON document");

mod kind {
    pub const SMALL_OBJECT: u8 = 0;
    pub const LARGE_OBJECT: u8 = 1;
    pub const SMALL_ARRAY: u8 = 2;
    pub const LARGE_ARRAY: u8 = 3;
    pub const LITERAL: u8 = 4;
    pub const INT16: u8 = 5;
    pub const UINT16: u8 = 6;
    pub const INT32: u8 = 7;
    pub const UINT32: u8 = 8;
    pub const INT64: u8 = 9;
    pub const UINT64: u8 = 10;
    pub const DOUBLE: u8 = 11;
    pub const STRING: u8 = 12;
    pub const OPAQUE: u8 = 15;
}

/// Writes a document; no more than about `most` bytes.
pub fn write(document: &[u8], most: usize, out: &mut Vec<u8>) -> Result<(), Malformed> {
    // One that was made of nothing, by a server that is not strict.
    let Some((kind, rest)) = document.split_first() else {
        out.extend_from_slice(b"null");
        return Ok(());
    };
    let most = out.len().saturating_add(most);
    value(*kind, rest, 0, most, out)
}

fn value(kind: u8, bytes: &[u8], depth: u32, most: usize, out: &mut Vec<u8>) -> Result<(), Malformed> {
    if depth > DEEPEST || out.len() > most {
        return Err(WRONG);
    }
    let fixed = |width: usize| bytes.get(..width).map(little).ok_or(WRONG);
    let done = match kind {
        kind::SMALL_OBJECT => return container(bytes, 2, true, depth, most, out),
        kind::LARGE_OBJECT => return container(bytes, 4, true, depth, most, out),
        kind::SMALL_ARRAY => return container(bytes, 2, false, depth, most, out),
        kind::LARGE_ARRAY => return container(bytes, 4, false, depth, most, out),
        kind::LITERAL => {
            out.extend_from_slice(match bytes.first() {
                Some(0) => b"null",
                Some(1) => b"true",
                Some(2) => b"false",
                _ => return Err(WRONG),
            });
            Ok(())
        }
        kind::INT16 => write!(out, "{}", fixed(2)? as u16 as i16),
        kind::UINT16 => write!(out, "{}", fixed(2)?),
        kind::INT32 => write!(out, "{}", fixed(4)? as u32 as i32),
        kind::UINT32 => write!(out, "{}", fixed(4)?),
        kind::INT64 => write!(out, "{}", fixed(8)? as i64),
        kind::UINT64 => write!(out, "{}", fixed(8)?),
        kind::DOUBLE => {
            let before = out.len();
            write_double(f64::from_bits(fixed(8)?), out);
            // It stays a number with a fraction.
            if !out[before..].iter().any(|byte| matches!(byte, b'.' | b'e')) {
                out.extend_from_slice(b".0");
            }
            Ok(())
        }
        kind::STRING => {
            let (length, rest) = variable(bytes)?;
            text(rest.get(..length).ok_or(WRONG)?, out);
            Ok(())
        }
        kind::OPAQUE => {
            let (of, rest) = bytes.split_first().ok_or(WRONG)?;
            let (length, rest) = variable(rest)?;
            return opaque(*of, rest.get(..length).ok_or(WRONG)?, out);
        }
        _ => return Err(WRONG),
    };
    done.map_err(|_| WRONG)
}

/// An object or an array: how many, how long, then keys and values by their offsets, each of `width` bytes.
fn container(
    bytes: &[u8],
    width: usize,
    is_object: bool,
    depth: u32,
    most: usize,
    out: &mut Vec<u8>,
) -> Result<(), Malformed> {
    let number = |at: usize, width: usize| bytes.get(at..at + width).map(little).ok_or(WRONG);
    let at = |offset: u64| usize::try_from(offset).ok().and_then(|offset| bytes.get(offset..)).ok_or(WRONG);
    let count = number(0, width)? as usize;
    let key_width = if is_object { width + 2 } else { 0 };
    let values = 2 * width + count.checked_mul(key_width).ok_or(WRONG)?;
    out.push(if is_object { b'{' } else { b'[' });
    for index in 0..count {
        if index > 0 {
            out.extend_from_slice(b", ");
        }
        if is_object {
            let entry = 2 * width + index * key_width;
            let (key, length) = (at(number(entry, width)?)?, number(entry + width, 2)? as usize);
            text(key.get(..length).ok_or(WRONG)?, out);
            out.extend_from_slice(b": ");
        }
        let entry = values + index * (1 + width);
        let kind = *bytes.get(entry).ok_or(WRONG)?;
        let is_here = matches!(kind, kind::LITERAL | kind::INT16 | kind::UINT16)
            || (width == 4 && matches!(kind, kind::INT32 | kind::UINT32));
        let place =
            if is_here { bytes.get(entry + 1..).ok_or(WRONG)? } else { at(number(entry + 1, width)?)? };
        value(kind, place, depth + 1, most, out)?;
    }
    out.push(if is_object { b'}' } else { b']' });
    Ok(())
}

/// A length of one to five bytes: seven bits each, the lowest first, the eighth says that more follow.
fn variable(bytes: &[u8]) -> Result<(usize, &[u8]), Malformed> {
    let mut length = 0_u64;
    for (index, byte) in bytes.iter().enumerate().take(5) {
        length |= u64::from(byte & 0x7f) << (7 * index);
        if byte & 0x80 == 0 {
            return Ok((usize::try_from(length).map_err(|_| WRONG)?, &bytes[index + 1..]));
        }
    }
    Err(WRONG)
}

fn text(content: &[u8], out: &mut Vec<u8>) {
    out.push(b'"');
    for byte in content {
        match byte {
            b'"' | b'\\' => out.extend_from_slice(&[b'\\', *byte]),
            8 => out.extend_from_slice(b"\\b"),
            9 => out.extend_from_slice(b"\\t"),
            10 => out.extend_from_slice(b"\\n"),
            12 => out.extend_from_slice(b"\\f"),
            13 => out.extend_from_slice(b"\\r"),
            0..0x20 => {
                let _ = write!(out, "\\u{byte:04x}");
            }
            _ => out.push(*byte),
        }
    }
    out.push(b'"');
}

/// What JSON has no form for: decimals, times, and bytes.
fn opaque(of: u8, content: &[u8], out: &mut Vec<u8>) -> Result<(), Malformed> {
    match of {
        code::NEWDECIMAL => {
            let [precision, scale, packed @ ..] = content else { return Err(WRONG) };
            return write_decimal(packed, *precision, *scale, out).then_some(()).ok_or(WRONG);
        }
        code::DATE | code::DATETIME | code::TIMESTAMP | code::TIME => {
            let packed = content.first_chunk().ok_or(WRONG)?;
            let packed = i64::from_le_bytes(*packed);
            let (packed, micros) = (packed.unsigned_abs() >> 24, (packed.unsigned_abs() & 0xff_ffff) as u32);
            let is_negative = i64::from_le_bytes(*content.first_chunk().ok_or(WRONG)?) < 0;
            out.push(b'"');
            if of == code::TIME {
                Clock { is_negative, packed, micros }.write(6, out);
            } else {
                write_date(packed >> 17, out);
                if of != code::DATE {
                    out.push(b' ');
                    Clock { is_negative: false, packed: packed & 0x1_ffff, micros }.write(6, out);
                }
            }
            out.push(b'"');
        }
        _ => {
            let _ = write!(out, "\"base64:type{of}:");
            // In lines, which are not told apart from a text with ends of lines.
            for (nth, line) in STANDARD.encode(content).as_bytes().chunks(LINE).enumerate() {
                out.extend_from_slice(if nth == 0 { b"" } else { b"\\n" });
                out.extend_from_slice(line);
            }
            out.push(b'"');
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn written(document: &[u8]) -> Result<String, Malformed> {
        let mut out = Vec::new();
        write(document, 10_000, &mut out).map(|()| String::from_utf8_lossy(&out).into_owned())
    }

    #[test]
    fn documents_are_written_as_the_server_casts_them() {
        // {"a": 1, "b": "x"}, as a server has it.
        let object = [0, 2, 0, 22, 0, 18, 0, 1, 0, 19, 0, 1, 0, 5, 1, 0, 12, 20, 0, b'a', b'b', 1, b'x'];
        assert_eq!(written(&object).as_deref(), Ok(r#"{"a": 1, "b": "x"}"#));
        assert_eq!(written(&[2, 0, 0, 4, 0]).as_deref(), Ok("[]"));
        assert_eq!(written(&[4, 1]).as_deref(), Ok("true"));
        assert_eq!(written(&[]).as_deref(), Ok("null"));
        assert_eq!(written(&[12, 4, b'"', 1, b'\n', b'/']).as_deref(), Ok("\"\\\"\\u0001\\n/\""));
        assert_eq!(written(&[&[11][..], &1.0_f64.to_le_bytes()].concat()).as_deref(), Ok("1.0"));
    }

    #[test]
    fn a_knot_is_refused() {
        // An array whose only value is itself.
        assert_eq!(written(&[2, 1, 0, 7, 0, 2, 0, 0]), Err(WRONG));
        // And one that has itself twice.
        assert_eq!(written(&[2, 2, 0, 10, 0, 2, 0, 0, 2, 0, 0]), Err(WRONG));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(0_u8..16, 0..80), more in prop::collection::vec(any::<u8>(), 0..80)) {
            let _ = written(&bytes);
            let _ = written(&more);
        }
    }
}
