//! The names and small formats that a producer and a reader of large payloads agree on.
//!
//! docs/large-payloads.md is the whole format. In short: values of headers are UTF-8 text (decimal
//! numbers, lowercase hexadecimal); a size and a sha256 are those of the bytes as they lie in the
//! object store or were sliced, which is after encoding.

use sha2::{Digest as _, Sha256};
use uuid::Uuid;

/// The event's id: the same on every repeat, and on every chunk of one event.
pub const ID: &str = "id";

/// A reference: where the payload is; the record's value says it again.
pub const REF_URI: &str = "whippet-ref-uri";
/// The object's size in bytes, as it is stored.
pub const REF_SIZE: &str = "whippet-ref-size";
/// The sha256 of the object as it is stored.
pub const REF_SHA256: &str = "whippet-ref-sha256";
/// The media type of the payload.
pub const REF_CONTENT_TYPE: &str = "whippet-ref-content-type";
/// The codec, where the relay has encoded the object. A [`CONTENT_ENCODING`] on a reference is the row's own.
pub const REF_ENCODING: &str = "whippet-ref-encoding";

/// Which slices belong together: see [`chunk_id`].
pub const CHUNK_ID: &str = "whippet-chunk-id";
/// Which slice of the whole this is, from 0.
pub const CHUNK_INDEX: &str = "whippet-chunk-index";
/// How many slices the whole has.
pub const CHUNK_COUNT: &str = "whippet-chunk-count";
/// The size of the whole in bytes.
pub const CHUNK_SIZE: &str = "whippet-chunk-size";
/// The sha256 of the whole.
pub const CHUNK_SHA256: &str = "whippet-chunk-sha256";

/// The codec of a payload that is in the record, or in the chunks together.
pub const CONTENT_ENCODING: &str = "content-encoding";

/// Dialect `bakdata`: one byte, [`BACKED`] where the value is a URI, [`INLINE`] where it is the payload.
pub const BACKED_VALUE: &str = "__large.message.backed.value";
pub const BACKED: u8 = 1;
pub const INLINE: u8 = 0;
/// Dialect `bakdata`: one byte, see [`BACKED_CODECS`]. The first name is that of 4.0.0 and later; all
/// earlier versions write and read the second, with its two dots.
pub const BACKED_COMPRESSION: [&str; 2] =
    ["__large.message.backed.compression", "__large.message.backed..compression"];
/// What the byte of [`BACKED_COMPRESSION`] means, by its value.
pub const BACKED_CODECS: [&str; 5] = ["none", "gzip", "snappy", "lz4", "zstd"];

/// Dialect `silverback`: the slice's index from 0, their count, `True` on the last, and on all but
/// the first the offset of the first.
pub const SILVERBACK_INDEX: &str = "x-chunk-index";
pub const SILVERBACK_COUNT: &str = "x-chunk-count";
pub const SILVERBACK_LAST: &str = "x-chunk-last";
pub const SILVERBACK_FIRST_OFFSET: &str = "x-chunk-first-offset";

/// Dialect `linkedin`: a [`Segment`] in binary.
pub const LINKEDIN: &str = "_lm";

/// The namespace of [`chunk_id`]: the UUIDv5 of the name `whippet-chunk-id` in the nil namespace.
pub const CHUNK_NAMESPACE: Uuid = Uuid::from_u128(0x2dc4_5166_b45e_5ed9_a1d1_1e1f_0b45_8812);

/// The id of an event's chunks: the UUIDv5 of `EVENT_ID/CHUNK_BYTES/SHA256` in [`CHUNK_NAMESPACE`].
///
/// `chunk_bytes` is the size of every slice but the last, `sha256` that of the whole. So a repeat has the same
/// id, and slices that do not fit together never share one.
pub fn chunk_id(event_id: &str, chunk_bytes: usize, sha256: &[u8; 32]) -> Uuid {
    let name = format!("{event_id}/{chunk_bytes}/{}", hex(sha256));
    Uuid::new_v5(&CHUNK_NAMESPACE, name.as_bytes())
}

pub fn sha256(bytes: &[u8]) -> [u8; 32] {
    Sha256::digest(bytes).into()
}

/// Lowercase, 64 characters.
pub fn hex(hash: &[u8; 32]) -> String {
    use std::fmt::Write as _;
    hash.iter().fold(String::with_capacity(64), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// What dialect `linkedin` says about a slice: the header `_lm` of `li-apache-kafka-clients`, version 3.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Segment {
    pub id: Uuid,
    pub index: u32,
    pub count: u32,
    /// Of the whole, in bytes.
    pub size: u32,
}

/// The first byte of version 3; 0 and 1 are versions that put a head into the value.
const LINKEDIN_V3: u8 = 2;

impl Segment {
    /// 29 bytes, big-endian: version, the *lower* half of the id, the upper half, index, count, size.
    /// `None` where a number is more than Java's `int` has room for.
    pub fn to_bytes(self) -> Option<[u8; 29]> {
        let mut bytes = [0; 29];
        let (upper, lower) = self.id.as_u64_pair();
        bytes[0] = LINKEDIN_V3;
        bytes[1..9].copy_from_slice(&lower.to_be_bytes());
        bytes[9..17].copy_from_slice(&upper.to_be_bytes());
        for (at, number) in [(17, self.index), (21, self.count), (25, self.size)] {
            let number = i32::try_from(number).ok()?;
            bytes[at..at + 4].copy_from_slice(&number.to_be_bytes());
        }
        Some(bytes)
    }

    /// `None` where it is not a header of version 3.
    pub fn from_bytes(bytes: &[u8]) -> Option<Segment> {
        let bytes: &[u8; 29] = bytes.try_into().ok()?;
        let long = |at: usize| bytes[at..at + 8].iter().fold(0, |sum, byte| sum << 8 | u64::from(*byte));
        let int = |at: usize| {
            let number = bytes[at..at + 4].iter().fold(0, |sum, byte| sum << 8 | u32::from(*byte));
            i32::try_from(number).is_ok().then_some(number)
        };
        if bytes[0] != LINKEDIN_V3 {
            return None;
        }
        let id = Uuid::from_u64_pair(long(9), long(1));
        Some(Segment { id, index: int(17)?, count: int(21)?, size: int(25)? })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_namespace_is_derived_as_it_says() {
        assert_eq!(Uuid::new_v5(&Uuid::nil(), b"whippet-chunk-id"), CHUNK_NAMESPACE);
    }

    #[test]
    fn hashes_are_lowercase_text() {
        let empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
        assert_eq!(hex(&sha256(b"")), empty);
    }

    #[test]
    fn a_chunk_id_depends_on_all_of_its_parts() {
        let id = chunk_id("e-1", 1000, &sha256(b"whole"));
        assert_eq!(id, chunk_id("e-1", 1000, &sha256(b"whole")));
        assert_eq!(id.get_version_num(), 5);
        for other in [
            chunk_id("e-2", 1000, &sha256(b"whole")),
            chunk_id("e-1", 1001, &sha256(b"whole")),
            chunk_id("e-1", 1000, &sha256(b"other")),
        ] {
            assert_ne!(id, other);
        }
    }

    /// Byte by byte, as the format was read from its project.
    #[test]
    fn a_segment_has_the_lower_half_of_its_id_first() {
        let id = Uuid::from_u128(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff);
        let bytes = Segment { id, index: 1, count: 3, size: 0x0102_0304 }.to_bytes().unwrap();
        let halves =
            [[0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff], [0, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77]];
        assert_eq!(bytes[..17], [&[2][..], &halves.concat()].concat());
        assert_eq!(bytes[17..], [0, 0, 0, 1, 0, 0, 0, 3, 1, 2, 3, 4]);
        let large = Segment { id, index: 0, count: 1, size: 1 << 31 };
        assert_eq!(large.to_bytes(), None);
    }

    proptest! {
        #[test]
        fn a_segment_is_read_as_it_was_written(id: u128, index in 0..=i32::MAX as u32, count in 0..=i32::MAX as u32, size in 0..=i32::MAX as u32) {
            let segment = Segment { id: Uuid::from_u128(id), index, count, size };
            prop_assert_eq!(Segment::from_bytes(&segment.to_bytes().unwrap()), Some(segment));
        }

        /// What is read is exactly what would be written.
        #[test]
        fn other_bytes_are_refused(bytes in proptest::collection::vec(any::<u8>(), 0..32), version in 0..4_u8) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = version;
            }
            if let Some(segment) = Segment::from_bytes(&bytes) {
                prop_assert_eq!(&segment.to_bytes().unwrap()[..], &bytes[..]);
            }
        }
    }
}
