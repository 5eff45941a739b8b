//! The codecs of a single payload: what `content-encoding` and `whippet-ref-encoding` name.
//!
//! | name | format |
//! | --- | --- |
//! | `gzip` | RFC 1952 |
//! | `zstd` | RFC 8878 |
//! | `lz4` | the LZ4 frame format (`lz4_Frame_format.md` of the lz4 project), not a bare block |
//! | `snappy` | the raw block format (`format_description.txt` of the snappy project), not the framing format |
//!
//! Pure, and in memory. What is decoded was written by others: the result has a limit, which is
//! kept while decoding, and a stream that is cut or damaged is an error.

use std::{
    fmt,
    io::{self, Write as _},
};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// zstd's and gzip's own default levels.
const ZSTD_LEVEL: i32 = 3;
const GZIP_LEVEL: u32 = 6;

/// The largest window that a decoder of zstd is asked to have (RFC 8878, 3.1.1.1.2), as a power of two.
const ZSTD_WINDOW_LOG: u32 = 23;

/// How a payload is encoded on its own, apart from what Kafka does to its batches.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Codec {
    Gzip,
    Zstd,
    Lz4,
    Snappy,
}

/// Why bytes are not decoded.
#[derive(Debug, thiserror::Error)]
pub enum DecodeError {
    #[error(
        "the {codec} payload is larger than {at_most} bytes once decoded: raise the reader's limit if it is genuine"
    )]
    TooLarge { codec: Codec, at_most: usize },
    #[error("the payload is not a whole {codec} stream ({source}): it was cut, damaged, or is named wrongly")]
    Corrupt { codec: Codec, source: io::Error },
}

impl fmt::Display for Codec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl Codec {
    pub const ALL: [Codec; 4] = [Codec::Gzip, Codec::Zstd, Codec::Lz4, Codec::Snappy];

    /// The name in headers and in configuration.
    pub fn name(self) -> &'static str {
        match self {
            Codec::Gzip => "gzip",
            Codec::Zstd => "zstd",
            Codec::Lz4 => "lz4",
            Codec::Snappy => "snappy",
        }
    }

    pub fn from_name(name: &str) -> Option<Codec> {
        Codec::ALL.into_iter().find(|codec| codec.name() == name)
    }

    /// Encodes a payload. The same payload gives the same bytes, as long as the libraries are the same.
    pub fn encode(self, payload: &[u8]) -> Vec<u8> {
        self.encoded(payload).expect("writing to memory does not fail")
    }

    fn encoded(self, payload: &[u8]) -> io::Result<Vec<u8>> {
        match self {
            Codec::Gzip => {
                let level = flate2::Compression::new(GZIP_LEVEL);
                let mut encoder = flate2::write::GzEncoder::new(Vec::new(), level);
                encoder.write_all(payload)?;
                encoder.finish()
            }
            Codec::Zstd => {
                let mut encoder = zstd::Encoder::new(Vec::new(), ZSTD_LEVEL)?;
                // Readers learn early how large it is, and damage is found here.
                encoder.set_pledged_src_size(Some(payload.len() as u64))?;
                encoder.include_contentsize(true)?;
                encoder.include_checksum(true)?;
                encoder.write_all(payload)?;
                encoder.finish()
            }
            Codec::Lz4 => {
                let frame = lz4_flex::frame::FrameInfo::new().content_checksum(true);
                let mut encoder = lz4_flex::frame::FrameEncoder::with_frame_info(frame, Vec::new());
                encoder.write_all(payload)?;
                Ok(encoder.finish()?)
            }
            Codec::Snappy => Ok(snap::raw::Encoder::new().compress_vec(payload)?),
        }
    }

    /// Decodes a payload of at most `at_most` bytes, all of it or nothing. No more than that is
    /// allocated for it, beside the codec's own window (8 MiB, or `at_most` where that is more).
    pub fn decode(self, bytes: &[u8], at_most: usize) -> Result<Vec<u8>, DecodeError> {
        let decoded = match self {
            // Every codec writes something for an empty payload as well.
            _ if bytes.is_empty() => Err(io::ErrorKind::UnexpectedEof.into()),
            Codec::Gzip => bounded(flate2::read::MultiGzDecoder::new(bytes), at_most),
            Codec::Zstd => unzstd(bytes, at_most),
            Codec::Lz4 => unlz4(bytes, at_most),
            Codec::Snappy => unsnappy(bytes, at_most),
        };
        match decoded {
            Ok(Some(payload)) => Ok(payload),
            Ok(None) => Err(DecodeError::TooLarge { codec: self, at_most }),
            Err(source) => Err(DecodeError::Corrupt { codec: self, source }),
        }
    }
}

fn unzstd(bytes: &[u8], at_most: usize) -> io::Result<Option<Vec<u8>>> {
    let mut decoder = zstd::Decoder::with_buffer(bytes)?;
    let whole = at_most.max(1).next_power_of_two().trailing_zeros();
    decoder.window_log_max(whole.clamp(ZSTD_WINDOW_LOG, 31))?;
    bounded(decoder, at_most)
}

fn unlz4(bytes: &[u8], at_most: usize) -> io::Result<Option<Vec<u8>>> {
    bounded(Frames { frame: lz4_flex::frame::FrameDecoder::new(Uncut(bytes)), ended: false }, at_most)
}

/// Frames of lz4, one after the other: the library stops after each.
struct Frames<'a> {
    frame: lz4_flex::frame::FrameDecoder<Uncut<'a>>,
    ended: bool,
}

impl io::Read for Frames<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while !self.ended {
            let read = self.frame.read(buffer)?;
            if read > 0 {
                return Ok(read);
            }
            self.ended = self.frame.get_ref().0.is_empty();
        }
        Ok(0)
    }
}

/// Bytes that nobody may ask for more than they are: the library takes the end of its input for
/// the end of a frame.
struct Uncut<'a>(&'a [u8]);

impl io::Read for Uncut<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self.0.read(buffer)? {
            0 if !buffer.is_empty() => Err(io::Error::other("it ends in the middle of a frame")),
            read => Ok(read),
        }
    }
}

fn unsnappy(bytes: &[u8], at_most: usize) -> io::Result<Option<Vec<u8>>> {
    if snap::raw::decompress_len(bytes)? > at_most {
        return Ok(None);
    }
    Ok(Some(snap::raw::Decoder::new().decompress_vec(bytes)?))
}

/// Reads to the end, so that the stream's own checksum is looked at; `None` where there is more
/// than `at_most`. `Vec` alone would grow to twice of it.
fn bounded(mut from: impl io::Read, at_most: usize) -> io::Result<Option<Vec<u8>>> {
    let mut out = Vec::new();
    let mut read = 0;
    loop {
        if read == out.len() {
            if read == at_most {
                return Ok((from.read(&mut [0])? == 0).then_some(out));
            }
            let grown = (2 * read).clamp(64 << 10, at_most.max(64 << 10)).min(at_most);
            out.reserve_exact(grown - read);
            out.resize(grown, 0);
        }
        match from.read(&mut out[read..])? {
            0 => {
                out.truncate(read);
                return Ok(Some(out));
            }
            more => read += more,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 1 << 20;

    #[test]
    fn a_name_is_a_codec_and_back() {
        for codec in Codec::ALL {
            assert_eq!(Codec::from_name(codec.name()), Some(codec));
            assert_eq!(serde_json::to_value(codec).unwrap(), codec.name());
        }
        assert_eq!(Codec::from_name("GZIP"), None);
        assert_eq!(Codec::from_name("none"), None);
    }

    /// What says which format it is, as the formats have it.
    #[test]
    fn the_formats_are_those_that_the_names_promise() {
        let start = |codec: Codec| codec.encode(b"whippet")[..4].to_vec();
        assert_eq!(start(Codec::Gzip)[..3], [0x1f, 0x8b, 8]);
        assert_eq!(start(Codec::Zstd), [0x28, 0xb5, 0x2f, 0xfd]);
        assert_eq!(start(Codec::Lz4), [0x04, 0x22, 0x4d, 0x18]);
        // The length, a literal of 7 bytes, and the bytes.
        assert_eq!(Codec::Snappy.encode(b"whippet"), b"\x07\x18whippet");
    }

    #[test]
    fn the_limit_is_the_last_size_that_is_decoded() {
        for codec in Codec::ALL {
            for size in [0, 1, 65_535, 65_536, 65_537, 200_000] {
                let payload = vec![7; size];
                let encoded = codec.encode(&payload);
                assert_eq!(codec.decode(&encoded, size).unwrap(), payload, "{codec} {size}");
                if let Some(less) = size.checked_sub(1) {
                    let error = codec.decode(&encoded, less).unwrap_err();
                    assert!(matches!(error, DecodeError::TooLarge { .. }), "{codec} {size}: {error}");
                }
            }
        }
    }

    /// 64 MiB in at most 2 MiB of bytes: it is not decoded to find out.
    #[test]
    fn a_bomb_is_too_large_and_costs_no_more_than_the_limit() {
        let zeros = vec![0; 64 << 20];
        for codec in Codec::ALL {
            let bomb = codec.encode(&zeros);
            assert!(bomb.len() < 4 << 20, "{codec}: {}", bomb.len());
            let mut nested = codec.decode(&bomb, 1000).unwrap_err();
            assert!(matches!(nested, DecodeError::TooLarge { at_most: 1000, .. }), "{codec}: {nested}");
            nested = codec.decode(&bomb, (64 << 20) - 1).unwrap_err();
            assert!(matches!(nested, DecodeError::TooLarge { .. }), "{codec}: {nested}");
        }
    }

    /// A frame can ask for a window that is far larger than what it holds.
    #[test]
    fn a_zstd_frame_cannot_ask_for_a_huge_window() {
        let mut encoder = zstd::Encoder::new(Vec::new(), 1).unwrap();
        encoder.window_log(30).unwrap();
        encoder.write_all(b"small").unwrap();
        let error = Codec::Zstd.decode(&encoder.finish().unwrap(), LIMIT).unwrap_err();
        assert!(matches!(error, DecodeError::Corrupt { .. }), "{error}");
    }

    #[test]
    fn several_streams_in_a_row_are_one_payload() {
        for codec in [Codec::Gzip, Codec::Zstd, Codec::Lz4] {
            let both = [codec.encode(b"one "), codec.encode(b""), codec.encode(b"two")].concat();
            assert_eq!(codec.decode(&both, LIMIT).unwrap(), b"one two", "{codec}");
        }
    }

    #[test]
    fn what_is_cut_or_followed_by_something_else_is_no_stream() {
        // Incompressible, and several blocks of every format.
        let mut random = fastrand::Rng::with_seed(7);
        let payload: Vec<u8> = std::iter::repeat_with(|| random.u8(..)).take(200_000).collect();
        for codec in Codec::ALL {
            let encoded = codec.encode(&payload);
            let mut cuts: Vec<usize> = (0..40).chain(encoded.len() - 40..encoded.len()).collect();
            cuts.extend(std::iter::repeat_with(|| random.usize(..encoded.len())).take(100));
            // Ends of blocks of lz4, where its library sees no cut: 7 bytes of head, then 64 KiB each.
            cuts.extend([7, 7 + 4 + 65_536, 7 + 2 * (4 + 65_536)]);
            for cut in cuts {
                let error = codec.decode(&encoded[..cut], LIMIT).expect_err(&format!("{codec} cut at {cut}"));
                assert!(matches!(error, DecodeError::Corrupt { .. }), "{codec} cut at {cut}: {error}");
            }
            let followed = [&encoded[..], b"trailing"].concat();
            assert!(codec.decode(&followed, LIMIT).is_err(), "{codec}");
        }
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(payload in proptest::collection::vec(0..4_u8, 0..5000)) {
            for codec in Codec::ALL {
                prop_assert_eq!(&codec.decode(&codec.encode(&payload), payload.len()).unwrap(), &payload);
            }
        }

        /// Damage is found where the format has a checksum, and never panics or outgrows the limit.
        #[test]
        fn damage_gives_an_error_or_no_more_than_the_limit(
            payload in proptest::collection::vec(0..4_u8, 1..500),
            at in any::<prop::sample::Index>(),
            flip in 1..=255_u8,
        ) {
            for codec in Codec::ALL {
                let mut encoded = codec.encode(&payload);
                let at = at.index(encoded.len());
                encoded[at] ^= flip;
                if let Ok(decoded) = codec.decode(&encoded, 600) {
                    prop_assert!(decoded.len() <= 600);
                    // gzip's time, flags and system are not under its checksum, and snappy has none.
                    let loose = codec == Codec::Snappy || (codec == Codec::Gzip && at < 10);
                    prop_assert!(loose || decoded == payload, "{} at {}", codec, at);
                }
            }
        }

        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            for codec in Codec::ALL {
                if let Ok(decoded) = codec.decode(&bytes, 1000) {
                    prop_assert!(decoded.len() <= 1000);
                }
            }
        }
    }
}
