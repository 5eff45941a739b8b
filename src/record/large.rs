//! The size ladder: how a payload travels. As it is; else encoded; else as a reference to an object
//! store, or in chunks; else not at all. docs/large-payloads.md has the format.
//!
//! Pure. [`Rules::packing`] decides before anything is sent, from what the topic takes; the relay has
//! the work done elsewhere, and [`Packed`] is what comes back and how a record wears it.

mod worn;

pub use self::worn::{Form, Packed};
use super::{
    Columns, Header, Record, Rejection, RuleError, Rules, Spec, Template,
    encode::Codec,
    envelope::{CONTENT_TYPE, Envelope},
    wire,
};
use crate::{event::Event, store::safe_key};

/// What becomes of a payload that does not fit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Oversize {
    /// It fails, as every event that can never be published.
    #[default]
    Fail,
    /// It is parked, or becomes a dead letter, whatever others do.
    Park,
    DeadLetter,
    ClaimCheck,
    Chunk,
}

/// What a table's configuration says about its payloads.
#[derive(Clone, Debug, Default)]
pub struct LargeSpec {
    pub content_type: String,
    /// And from which size on, in bytes.
    pub encode: Option<(Codec, usize)>,
    /// The largest payload in a record, in bytes, where the topic would take more.
    pub inline_max: Option<usize>,
    pub oversize: Oversize,
    /// Template of an object's key, over columns and `topic`, `id`, `sha256`.
    pub reference_key: String,
    pub whippet: bool,
    pub bakdata: bool,
    /// The largest chunk, in bytes, where the topic would take more.
    pub chunk_bytes: Option<usize>,
    pub silverback: bool,
    pub linkedin: bool,
}

/// Names, in `reference.key`, that are no columns.
const TOPIC: &str = "topic";
const ID: &str = "id";
const SHA256: &str = "sha256";
/// Stands for the hash until it is known; no key has it.
const HASH_TO_COME: &str = "\0";
/// What a record or batch is at most, where the topic's own limit is not known: a broker's default.
const LIKELY_LIMIT: usize = crate::sink::MAX_BATCH_BYTES;
/// Chunks are whole multiples of this: small differences of headers do not change them.
const CHUNK_STEP: usize = 1 << 10;

#[derive(Debug)]
pub(super) struct LargeRules {
    spec: LargeSpec,
    key: Template,
    columns: Vec<(String, usize)>,
}

impl LargeRules {
    pub fn compile(spec: &Spec, columns: &mut Columns) -> Result<LargeRules, RuleError> {
        let spec = spec.large.clone();
        let wrong = |error| RuleError::ReferenceKey(spec.reference_key.clone(), error);
        let key = Template::parse(&spec.reference_key).map_err(wrong)?;
        let named = key.columns().filter(|name| ![TOPIC, ID, SHA256].contains(name));
        let columns = named.map(|name| (name.to_owned(), columns.index(name))).collect();
        Ok(LargeRules { spec, key, columns })
    }

    /// Whether readers of dialect `bakdata` are told on every record where the payload is.
    pub fn flags_inline(&self) -> bool {
        self.spec.oversize == Oversize::ClaimCheck && self.spec.bakdata
    }
}

/// What is to be done with a payload before its record can be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packing {
    /// Encode it first, and see whether that makes it smaller.
    pub codec: Option<Codec>,
    /// It may stay in the record up to this size, in bytes.
    pub inline: usize,
    pub oversize: Then,
}

/// What is done with a payload that is larger than [`Packing::inline`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Then {
    /// Nothing more can be.
    Refuse {
        why: String,
    },
    Refer {
        key: ObjectKey,
        content_type: String,
    },
    Chunk {
        event_id: String,
        bytes: usize,
    },
}

/// An object's key, but for the hash of its content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectKey(String);

impl ObjectKey {
    pub fn with(&self, sha256: &str) -> String {
        self.0.replace(HASH_TO_COME, sha256)
    }
}

impl Rules {
    pub fn oversize(&self) -> Oversize {
        self.large.spec.oversize
    }

    /// Where the payload of an event is among its columns.
    pub fn payload_column(&self) -> usize {
        self.payload
    }

    /// Whether an event is far too small to be packed: asked for every one, and cheap.
    pub fn is_small(&self, event: &Event, limit: Option<usize>) -> bool {
        let spec = &self.large.spec;
        let payload = event.row.get(self.payload).map_or(0, <[u8]>::len);
        // In an envelope it may grow by half, and text by more.
        let bytes = event.row.bytes() * if self.dress.envelope == Envelope::Structured { 2 } else { 1 };
        // Headers have a budget; the rest is routes, static headers and overhead.
        let around = self.headers.max_bytes() * self.dress.growth() + (4 << 10);
        spec.encode.is_none_or(|(_, above)| payload <= above)
            && spec.inline_max.is_none_or(|max| payload <= max)
            && bytes + around <= limit.unwrap_or(LIKELY_LIMIT)
    }

    /// What has to be done with the payload of a record that is otherwise ready; `None`: nothing, it
    /// goes as it is, or can go in no way. `limit` is what the topic takes, where that is known.
    pub fn packing(
        &self,
        event: &Event,
        record: &Record<'_>,
        limit: Option<usize>,
    ) -> Result<Option<Packing>, Rejection> {
        let spec = &self.large.spec;
        let Some(payload) = record.payload.as_deref() else { return Ok(None) };
        let encoded_already = record.headers.iter().any(|(name, _)| name == wire::CONTENT_ENCODING);
        let codec = spec
            .encode
            .filter(|(_, above)| payload.len() > *above && !encoded_already)
            .map(|(codec, _)| codec);
        let can_move = matches!(spec.oversize, Oversize::ClaimCheck | Oversize::Chunk);
        // Without a place to move it to, only the broker knows.
        let limit = limit.unwrap_or(if can_move { LIKELY_LIMIT } else { usize::MAX });
        let around = record.wire_size() - payload.len();
        let fits = record.wire_size() <= limit && spec.inline_max.is_none_or(|max| payload.len() <= max);
        if codec.is_none() && (fits || !can_move) {
            return match spec.inline_max {
                Some(max) if payload.len() > max => Err(Rejection::new(format!(
                    "the payload has {} bytes and payload.inline_max allows {max}: raise it, or move large \
                     payloads out of the record (payload.oversize)",
                    payload.len()
                ))),
                _ => Ok(None),
            };
        }
        let encoding = codec.map_or(0, |codec| header_size(wire::CONTENT_ENCODING, codec.name().len()));
        let room = limit.saturating_sub(around + encoding);
        Ok(Some(Packing {
            codec,
            inline: spec.inline_max.map_or(room, |max| max.min(room)),
            oversize: match spec.oversize {
                Oversize::ClaimCheck => Then::Refer {
                    key: self.object_key(event, &record.topic)?,
                    content_type: content_type(&record.headers, spec).to_owned(),
                },
                Oversize::Chunk => self.chunks(event, limit, around + encoding)?,
                Oversize::Fail | Oversize::Park | Oversize::DeadLetter => {
                    Then::Refuse { why: format!("topic {} takes {limit} (max.message.bytes)", record.topic) }
                }
            },
        }))
    }

    fn chunks(&self, event: &Event, limit: usize, around: usize) -> Result<Then, Rejection> {
        let spec = &self.large.spec;
        // Id, index, count, size and hash; then the other dialects.
        let mut headers = [(wire::CHUNK_ID, 36), (wire::CHUNK_SHA256, 64)]
            .into_iter()
            .chain([wire::CHUNK_INDEX, wire::CHUNK_COUNT, wire::CHUNK_SIZE].map(|name| (name, 10)))
            .collect::<Vec<_>>();
        if spec.silverback {
            headers.extend([
                (wire::SILVERBACK_INDEX, 10),
                (wire::SILVERBACK_COUNT, 10),
                (wire::SILVERBACK_LAST, 4),
            ]);
        }
        if spec.linkedin {
            headers.push((wire::LINKEDIN, 29));
        }
        let headers: usize = headers.into_iter().map(|(name, value)| header_size(name, value)).sum();
        // A larger batch than the producer makes gains nothing.
        let most = limit.min(LIKELY_LIMIT).saturating_sub(around + headers);
        let bytes = spec.chunk_bytes.map_or(most, |bytes| bytes.min(most));
        let bytes = if bytes >= CHUNK_STEP { bytes / CHUNK_STEP * CHUNK_STEP } else { bytes };
        if bytes == 0 {
            return Err(Rejection::new(format!(
                "key and headers leave no room for a chunk in the {limit} bytes that the topic takes: raise \
                 the topic's max.message.bytes"
            )));
        }
        Ok(Then::Chunk { event_id: self.id(&event.row)?.to_owned(), bytes })
    }

    fn object_key(&self, event: &Event, topic: &str) -> Result<ObjectKey, Rejection> {
        let rules = &self.large;
        let id = self.id(&event.row)?;
        // A value is one segment of the key, whatever is in it.
        let segment = |value: &str| value.split('/').map(safe_key).collect::<Vec<_>>().join("_-2F");
        let mut values = vec![(TOPIC, segment(topic)), (ID, segment(id)), (SHA256, HASH_TO_COME.to_owned())];
        for (name, index) in &rules.columns {
            let value = event.row.get(*index).and_then(|value| std::str::from_utf8(value).ok());
            let Some(value) = value.filter(|value| !value.is_empty()) else {
                return Err(Rejection::new(format!(
                    "column {name}, which payload.reference.key names, is NULL, empty or no text: mend the row"
                )));
            };
            values.push((name, segment(value)));
        }
        let value =
            |name: &str| values.iter().find(|(known, _)| *known == name).map(|(_, value)| value.as_str());
        rules
            .key
            .fill(value)
            .map(ObjectKey)
            .ok_or_else(|| Rejection::new("payload.reference.key cannot be filled"))
    }
}

/// What a header adds to [`Record::wire_size`], in bytes.
fn header_size(name: &str, value: usize) -> usize {
    10 + name.len() + value
}

/// The media type of a payload: that of the event itself, where it has one.
fn content_type<'r>(headers: &'r [Header<'_>], spec: &'r LargeSpec) -> &'r str {
    let own = headers.iter().find(|(name, _)| name.eq_ignore_ascii_case(CONTENT_TYPE));
    let own = own.and_then(|(_, value)| std::str::from_utf8(value.as_deref()?).ok());
    own.filter(|own| !own.is_empty()).unwrap_or(&spec.content_type)
}

#[cfg(test)]
mod tests;
