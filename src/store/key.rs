//! Keys of objects, and how they stand in a URI.
//!
//! Readers that others wrote take a URI apart in their own ways, so a key is made of
//! `[A-Za-z0-9._/-]` only: those mean the same in a path, in a URI and in a file's name.

use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

/// What a URI's path shows as `%XX`.
const ENCODED: AsciiSet = NON_ALPHANUMERIC.remove(b'.').remove(b'_').remove(b'-').remove(b'~').remove(b'/');

pub(super) fn encode(path: &str) -> String {
    utf8_percent_encode(path, &ENCODED).to_string()
}

pub(super) fn decode(path: &str) -> Option<String> {
    percent_decode_str(path).decode_utf8().ok().map(std::borrow::Cow::into_owned)
}

/// Whether `key` is a key as it stands.
pub fn is_safe_key(key: &str) -> bool {
    !key.is_empty() && safe_key(key) == key
}

/// `text` as a key: two texts never become the same one.
///
/// A byte outside of the alphabet becomes `_-XX`, in hexadecimal; so does a `_` that would read like
/// that itself, a `/` that would leave a segment empty, and the dots of `.` and `..`. Topics and ids
/// of every day have no such thing, so that they stay as they are.
pub fn safe_key(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut key = String::with_capacity(text.len());
    for (at, &byte) in bytes.iter().enumerate() {
        let next = |ahead: usize| bytes.get(at + ahead).copied();
        let plain = match byte {
            b'/' => !key.is_empty() && !key.ends_with('/') && next(1).is_some(),
            b'.' => !is_only_dots(bytes, at),
            b'_' => {
                next(1) != Some(b'-') || ![next(2), next(3)].into_iter().all(|byte| byte.is_some_and(is_hex))
            }
            _ => byte.is_ascii_alphanumeric() || byte == b'-',
        };
        match plain {
            true => key.push(char::from(byte)),
            false => key.push_str(&format!("_-{byte:02X}")),
        }
    }
    key
}

fn is_hex(byte: u8) -> bool {
    matches!(byte, b'0'..=b'9' | b'A'..=b'F')
}

/// Whether the segment around `at` is `.` or `..`.
fn is_only_dots(bytes: &[u8], at: usize) -> bool {
    let start = bytes[..at].iter().rposition(|&byte| byte == b'/').map_or(0, |slash| slash + 1);
    let end = bytes[at..].iter().position(|&byte| byte == b'/').map_or(bytes.len(), |slash| at + slash);
    matches!(&bytes[start..end], b"." | b"..")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_key_of_an_ordinary_event_stays_as_it_is() {
        for key in [
            "orders/0192d3c8-7a3f-7c55-9d0e-2f6b1a4c8e70-9f86d081884c7d65",
            "eu.shop.order-events/42",
            "order_events/a_b/_x",
            "orders_2024/A_0F/_-z",
            ".hidden/..a/b..",
        ] {
            assert_eq!(safe_key(key), key);
            assert!(is_safe_key(key), "{key}");
        }
    }

    #[test]
    fn what_readers_might_take_for_something_else_is_escaped() {
        for (text, key) in [
            ("a b", "a_-20b"),
            ("ünder", "_-C3_-BCnder"),
            ("50%25", "50_-2525"),
            ("a?b#c:d\\e", "a_-3Fb_-23c_-3Ad_-5Ce"),
            ("../../etc/passwd", "_-2E_-2E/_-2E_-2E/etc/passwd"),
            ("a/./b", "a/_-2E/b"),
            ("/a//b/", "_-2Fa/_-2Fb_-2F"),
            ("/", "_-2F"),
            ("a_-20b", "a_-5F-20b"),
        ] {
            assert_eq!(safe_key(text), key);
        }
        assert!(!is_safe_key("") && !is_safe_key("a b") && !is_safe_key("a/../b"));
    }

    /// The inverse, which shows that nothing is lost.
    fn back(key: &str) -> String {
        let bytes = key.as_bytes();
        let (mut text, mut at) = (Vec::new(), 0);
        while at < bytes.len() {
            match bytes.get(at..at + 4) {
                Some([b'_', b'-', hex @ ..]) if hex.iter().all(|&byte| is_hex(byte)) => {
                    text.push(u8::from_str_radix(&key[at + 2..at + 4], 16).unwrap());
                    at += 4;
                }
                _ => {
                    text.push(bytes[at]);
                    at += 1;
                }
            }
        }
        String::from_utf8(text).unwrap()
    }

    proptest! {
        #[test]
        fn every_text_has_a_key_of_its_own(text in "[A-C0-9_./ %é-]{0,12}|(_-|[A-C0-9]){0,8}|\\PC{0,12}") {
            let key = safe_key(&text);
            prop_assert_eq!(back(&key), text);
            let alphabet = |c: char| c.is_ascii_alphanumeric() || "._/-".contains(c);
            prop_assert!(key.chars().all(alphabet), "{}", key);
            let parsed = object_store::path::Path::parse(&key).unwrap();
            prop_assert_eq!(parsed.as_ref(), key.as_str());
            prop_assert_eq!(decode(&encode(&key)), Some(key));
        }

        #[test]
        fn encoding_is_undone(path in "\\PC{0,20}") {
            prop_assert_eq!(decode(&encode(&path)), Some(path));
        }
    }
}
