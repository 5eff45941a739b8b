//! What a record says about its payload: here, elsewhere, or in slices.
//!
//! Pure. Headers were written by others: each is checked before anything is done because of it.

use super::{Headers, Problem};
use crate::record::{encode::Codec, wire};

#[derive(Debug, PartialEq, Eq)]
pub enum Shape {
    /// No value: a tombstone.
    Nothing,
    /// The value is the payload, encoded perhaps.
    Inline(Option<Encoding>),
    Reference(Reference),
    Chunk(Chunk),
}

/// Where the payload is, and what is known about the object there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Reference {
    pub uri: String,
    /// Size and sha256; dialect `bakdata` alone promises nothing.
    pub promised: Option<(u64, [u8; 32])>,
    pub encoding: Option<Encoding>,
}

/// A slice, and what its set is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Chunk {
    pub id: String,
    pub index: u32,
    pub whole: Whole,
}

/// What all chunks of a set agree on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    pub count: u32,
    pub size: u64,
    pub sha256: [u8; 32],
    pub encoding: Option<Encoding>,
    /// The event's id.
    pub event: Option<String>,
}

/// How a payload is encoded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Encoding {
    Codec(Codec),
    /// By the application, in a way that only it knows.
    Own(String),
}

impl Shape {
    pub fn of(headers: &Headers, value: Option<&[u8]>) -> Result<Shape, Problem> {
        let Some(value) = value else {
            let promised =
                [wire::REF_URI, wire::CHUNK_ID].into_iter().find(|name| headers.find(name).is_some());
            return match promised {
                Some(name) => Err(bad(name, "there is no value beside it")),
                None => Ok(Shape::Nothing),
            };
        };
        if let Some(id) = text(headers, wire::CHUNK_ID)? {
            return Ok(Shape::Chunk(Chunk::of(headers, id)?));
        }
        if let Some(uri) = text(headers, wire::REF_URI)? {
            return Ok(Shape::Reference(Reference::of(headers, uri, value)?));
        }
        match headers.find(wire::BACKED_VALUE).map(Option::as_deref) {
            Some(Some([wire::BACKED])) => {
                let uri =
                    std::str::from_utf8(value).map_err(|_| bad(wire::BACKED_VALUE, "the value is no URI"))?;
                Ok(Shape::Reference(Reference {
                    uri: uri.to_owned(),
                    promised: None,
                    encoding: backed(headers)?,
                }))
            }
            Some(Some([wire::INLINE])) => Ok(Shape::Inline(backed(headers)?)),
            Some(_) => Err(bad(wire::BACKED_VALUE, "expected one byte, 0 or 1")),
            None => Ok(Shape::Inline(content_encoding(headers)?)),
        }
    }
}

impl Reference {
    fn of(headers: &Headers, uri: &str, value: &[u8]) -> Result<Reference, Problem> {
        if value != uri.as_bytes() {
            return Err(bad(wire::REF_URI, "it is not what the value says"));
        }
        let promised = (number(headers, wire::REF_SIZE)?, sha256(headers, wire::REF_SHA256)?);
        let encoding = match text(headers, wire::REF_ENCODING)? {
            Some(name) => {
                let codec = Codec::from_name(name).ok_or_else(|| Problem::Encoding(name.to_owned()))?;
                Some(Encoding::Codec(codec))
            }
            // Then it is the application's, if it is anybody's.
            None => content_encoding(headers)?,
        };
        Ok(Reference { uri: uri.to_owned(), promised: Some(promised), encoding })
    }
}

impl Chunk {
    fn of(headers: &Headers, id: &str) -> Result<Chunk, Problem> {
        let (index, count) = (number(headers, wire::CHUNK_INDEX)?, number(headers, wire::CHUNK_COUNT)?);
        let size: u64 = number(headers, wire::CHUNK_SIZE)?;
        if index >= count {
            return Err(bad(wire::CHUNK_INDEX, "it is not below the count"));
        }
        // No slice is empty, unless the whole is.
        if u64::from(count) > size.max(1) {
            return Err(bad(wire::CHUNK_COUNT, "there are more chunks than bytes"));
        }
        let whole = Whole {
            count,
            size,
            sha256: sha256(headers, wire::CHUNK_SHA256)?,
            encoding: content_encoding(headers)?,
            event: text(headers, wire::ID)?.map(str::to_owned),
        };
        Ok(Chunk { id: id.to_owned(), index, whole })
    }
}

fn bad(name: &str, why: impl Into<String>) -> Problem {
    Problem::Header { name: name.to_owned(), why: why.into() }
}

fn text<'a>(headers: &'a Headers, name: &str) -> Result<Option<&'a str>, Problem> {
    let Some(value) = headers.find(name) else { return Ok(None) };
    let text = value.as_deref().and_then(|value| std::str::from_utf8(value).ok());
    text.filter(|text| !text.is_empty()).map(Some).ok_or_else(|| bad(name, "expected text"))
}

fn needed<'a>(headers: &'a Headers, name: &str) -> Result<&'a str, Problem> {
    text(headers, name)?.ok_or_else(|| bad(name, "it is missing"))
}

/// Decimal digits and nothing else.
fn number<N: std::str::FromStr>(headers: &Headers, name: &str) -> Result<N, Problem> {
    let text = needed(headers, name)?;
    let digits = text.bytes().all(|byte| byte.is_ascii_digit());
    let number = digits.then(|| text.parse().ok()).flatten();
    number.ok_or_else(|| bad(name, "expected a decimal number"))
}

fn sha256(headers: &Headers, name: &str) -> Result<[u8; 32], Problem> {
    let text = needed(headers, name)?.as_bytes();
    let wrong = || bad(name, "expected 64 lowercase hexadecimal digits");
    let digit = |byte: u8| match byte {
        b'0'..=b'9' => Ok(byte - b'0'),
        b'a'..=b'f' => Ok(byte - b'a' + 10),
        _ => Err(wrong()),
    };
    let mut hash = [0; 32];
    if text.len() != 64 {
        return Err(wrong());
    }
    for (byte, pair) in hash.iter_mut().zip(text.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Ok(hash)
}

fn content_encoding(headers: &Headers) -> Result<Option<Encoding>, Problem> {
    let of = |name| Codec::from_name(name).map_or_else(|| Encoding::Own(name.to_owned()), Encoding::Codec);
    Ok(text(headers, wire::CONTENT_ENCODING)?.filter(|name| *name != "identity").map(of))
}

/// What a record of dialect `bakdata` says, in its way or in ours.
fn backed(headers: &Headers) -> Result<Option<Encoding>, Problem> {
    match backed_codec(headers)? {
        Some(codec) => Ok(Some(Encoding::Codec(codec))),
        None => content_encoding(headers),
    }
}

/// gzip and zstd are what they are everywhere; snappy and lz4 are in a framing of Kafka's own there.
fn backed_codec(headers: &Headers) -> Result<Option<Codec>, Problem> {
    let Some(name) = wire::BACKED_COMPRESSION.into_iter().find(|name| headers.find(name).is_some()) else {
        return Ok(None);
    };
    match headers.get(name) {
        Some([byte]) => match wire::BACKED_CODECS.get(usize::from(*byte)) {
            Some(&"none") => Ok(None),
            Some(&"gzip") => Ok(Some(Codec::Gzip)),
            Some(&"zstd") => Ok(Some(Codec::Zstd)),
            Some(other) => Err(Problem::Encoding(format!("{other} of Kafka's own framing"))),
            None => Err(bad(name, "expected a byte from 0 to 4")),
        },
        _ => Err(bad(name, "expected one byte")),
    }
}
