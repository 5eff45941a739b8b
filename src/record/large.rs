//! The size ladder: how a payload travels. As it is; else encoded; else as a reference to an object
//! store, or in chunks; else not at all. docs/large-payloads.md has the format.
//!
//! Pure. [`Rules::packing`] decides before anything is sent, from what the topic takes; the relay has
//! the work done elsewhere, and [`Packed`] is what comes back and how a record wears it.

use std::borrow::Cow;

use bytes::Bytes;
use uuid::Uuid;

use super::{
    Columns, Record, Rejection, RuleError, Rules, Spec, Template,
    encode::Codec,
    envelope::{DATAREF, Envelope},
    wire::{self, Segment},
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

/// A payload as it travels.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packed {
    pub encoding: Option<Codec>,
    pub form: Form,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Form {
    Inline(Bytes),
    Reference { uri: String, size: usize, sha256: String },
    Chunks { whole: Bytes, each: usize, id: Uuid, sha256: String },
}

impl Packed {
    /// How many records it takes.
    pub fn records(&self) -> u32 {
        match &self.form {
            Form::Chunks { whole, each, .. } => {
                u32::try_from(whole.len().div_ceil(*each)).unwrap_or(u32::MAX)
            }
            Form::Inline(_) | Form::Reference { .. } => 1,
        }
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
                    content_type: spec.content_type.clone(),
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
        let segment = |value: &str| value.split('/').map(safe_key).collect::<Vec<_>>().join("_2F");
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

    /// Puts what was packed into a record; `index` is that of the chunk.
    pub(super) fn wear<'a>(&'a self, record: &mut Record<'a>, packed: &'a Packed, index: u32) {
        let spec = &self.large.spec;
        let text = |text: String| Some(text.into_bytes().into());
        let headers = &mut record.headers;
        match &packed.form {
            Form::Inline(payload) => record.payload = Some(Cow::Borrowed(payload)),
            Form::Reference { uri, size, sha256 } => {
                record.payload = Some(uri.as_bytes().into());
                if self.dress.envelope == Envelope::Binary {
                    headers.push((DATAREF.into(), Some(uri.as_bytes().into())));
                }
                if spec.whippet {
                    headers.push((wire::REF_URI.into(), Some(uri.as_bytes().into())));
                    headers.push((wire::REF_SIZE.into(), text(size.to_string())));
                    headers.push((wire::REF_SHA256.into(), Some(sha256.as_bytes().into())));
                    headers.push((wire::REF_CONTENT_TYPE.into(), Some(spec.content_type.as_bytes().into())));
                    if let Some(codec) = packed.encoding {
                        headers.push((wire::REF_ENCODING.into(), Some(codec.name().as_bytes().into())));
                    }
                }
                if spec.bakdata {
                    headers.retain(|(name, _)| name != wire::BACKED_VALUE);
                    headers.push((wire::BACKED_VALUE.into(), Some((&[wire::BACKED][..]).into())));
                    if let Some(byte) = packed.encoding.and_then(backed_codec) {
                        for name in wire::BACKED_COMPRESSION {
                            headers.push((name.into(), Some(vec![byte].into())));
                        }
                    }
                }
            }
            Form::Chunks { whole, each, id, sha256 } => {
                let count = packed.records();
                let start = index as usize * each;
                record.payload = Some((&whole[start..whole.len().min(start + each)]).into());
                headers.push((wire::CHUNK_ID.into(), text(id.to_string())));
                headers.push((wire::CHUNK_INDEX.into(), text(index.to_string())));
                headers.push((wire::CHUNK_COUNT.into(), text(count.to_string())));
                headers.push((wire::CHUNK_SIZE.into(), text(whole.len().to_string())));
                headers.push((wire::CHUNK_SHA256.into(), Some(sha256.as_bytes().into())));
                if spec.silverback {
                    headers.push((wire::SILVERBACK_INDEX.into(), text(index.to_string())));
                    headers.push((wire::SILVERBACK_COUNT.into(), text(count.to_string())));
                    if index + 1 == count {
                        headers.push((wire::SILVERBACK_LAST.into(), text("True".into())));
                    }
                }
                let size = u32::try_from(whole.len()).unwrap_or(u32::MAX);
                let segment = Segment { id: *id, index, count, size };
                if let Some(segment) = segment.to_bytes().filter(|_| spec.linkedin) {
                    headers.push((wire::LINKEDIN.into(), Some(segment.to_vec().into())));
                }
            }
        }
        if let Some(codec) = packed.encoding
            && !matches!(packed.form, Form::Reference { .. })
        {
            headers.push((wire::CONTENT_ENCODING.into(), Some(codec.name().as_bytes().into())));
        }
    }
}

/// The byte of dialect `bakdata`, for the codecs that its readers decode; of the others it has formats of
/// its own.
fn backed_codec(codec: Codec) -> Option<u8> {
    let known = matches!(codec, Codec::Gzip | Codec::Zstd);
    let byte = wire::BACKED_CODECS.iter().position(|name| *name == codec.name()).filter(|_| known)?;
    u8::try_from(byte).ok()
}

/// What a header adds to [`Record::wire_size`], in bytes.
fn header_size(name: &str, value: usize) -> usize {
    10 + name.len() + value
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::event::{Place, Row};

    fn rules(large: LargeSpec) -> Rules {
        let column = |name: &str| Some(name.to_owned());
        Rules::compile(&Spec {
            id: "id".into(),
            payload: "payload".into(),
            topic: column("topic"),
            key: column("key"),
            headers: column("headers"),
            allow: vec!["*".into()],
            headers_max_bytes: 16 << 10,
            large: LargeSpec { reference_key: "{tenant}/{topic}/{id}-{sha256}".into(), ..large },
            ..Spec::default()
        })
        .unwrap()
    }

    fn event(rules: &Rules, values: &[(&str, &[u8])]) -> Event {
        let mut row = Row::default();
        for column in rules.columns() {
            row.push(values.iter().find(|(name, _)| name == column).map(|(_, value)| *value));
        }
        Event { place: Place::Int(1), row, timestamp_ms: None, unread_bytes: None, replay: None }
    }

    fn of_size(rules: &Rules, size: usize) -> Event {
        let payload = vec![b'x'; size];
        event(
            rules,
            &[("id", b"e1"), ("topic", b"t"), ("key", b"k"), ("tenant", b"a/b"), ("payload", &payload)],
        )
    }

    fn packing(rules: &Rules, event: &Event, limit: Option<usize>) -> Result<Option<Packing>, Rejection> {
        rules.packing(event, &rules.prepare(event, None).unwrap().record, limit)
    }

    #[test]
    fn the_last_byte_that_fits_stays_and_the_next_one_moves() {
        for oversize in [Oversize::ClaimCheck, Oversize::Chunk] {
            let rules = rules(LargeSpec { oversize, bakdata: true, ..LargeSpec::default() });
            let around = rules.prepare(&of_size(&rules, 0), None).unwrap().record.wire_size();
            let fits = of_size(&rules, 5_000);
            assert_eq!(packing(&rules, &fits, Some(around + 5_000)), Ok(None), "{oversize:?}");
            assert!(packing(&rules, &fits, Some(around + 4_999)).unwrap().is_some(), "{oversize:?}");
            // What a topic takes that says nothing about it.
            assert_eq!(packing(&rules, &of_size(&rules, LIKELY_LIMIT - around), None), Ok(None));
            assert!(packing(&rules, &of_size(&rules, LIKELY_LIMIT - around + 1), None).unwrap().is_some());
        }
        let nowhere = rules(LargeSpec::default());
        assert_eq!(
            packing(&nowhere, &of_size(&nowhere, 5_000), Some(4_000)),
            Ok(None),
            "it is refused later"
        );
    }

    #[test]
    fn a_null_stays_null_and_an_encoded_payload_is_not_encoded_again() {
        let spec = LargeSpec {
            encode: Some((Codec::Gzip, 10)),
            oversize: Oversize::ClaimCheck,
            inline_max: Some(0),
            ..LargeSpec::default()
        };
        let rules = rules(spec);
        let null = event(&rules, &[("id", b"e1"), ("topic", b"t"), ("tenant", b"a")]);
        assert_eq!(packing(&rules, &null, Some(1_000)), Ok(None));
        let headers = br#"{"content-encoding":"br"}"#;
        let values: [(&str, &[u8]); 5] =
            [("id", b"e1"), ("topic", b"t"), ("tenant", b"a"), ("headers", headers), ("payload", &[7; 100])];
        let encoded = event(&rules, &values);
        assert_eq!(packing(&rules, &encoded, Some(1_000)).unwrap().unwrap().codec, None);
    }

    #[test]
    fn an_objects_key_keeps_every_value_in_its_segment() {
        let rules = rules(LargeSpec { oversize: Oversize::ClaimCheck, ..LargeSpec::default() });
        let Ok(Some(Packing { oversize: Then::Refer { key, .. }, .. })) =
            packing(&rules, &of_size(&rules, 5_000), Some(1_000))
        else {
            panic!("it does not fit");
        };
        assert_eq!(key.with("ab12"), "a_2Fb/t/e1-ab12");
        let nobody = event(&rules, &[("id", b"e1"), ("topic", b"t"), ("payload", &[0; 5_000])]);
        let said = packing(&rules, &nobody, Some(1_000)).unwrap_err().to_string();
        assert!(said.contains("column tenant"), "{said}");
    }

    #[test]
    fn a_row_cannot_say_how_its_payload_travels() {
        let rules =
            rules(LargeSpec { oversize: Oversize::ClaimCheck, bakdata: true, ..LargeSpec::default() });
        let headers = br#"{"whippet-ref-uri":"s3://x/y","whippet-chunk-id":"1","__large.message.backed.value":"1","a":"b"}"#;
        let event =
            event(&rules, &[("id", b"e1"), ("topic", b"t"), ("headers", headers), ("payload", b"inline")]);
        let prepared = rules.prepare(&event, None).unwrap();
        let names: Vec<&str> = prepared.record.headers.iter().map(|(name, _)| name.as_ref()).collect();
        assert_eq!(names, ["id", "a", wire::BACKED_VALUE]);
        assert_eq!(prepared.record.headers[2].1.as_deref(), Some(&[wire::INLINE][..]));
    }

    proptest! {
        /// Whatever is asked for, every record fits into what the topic takes, and the chunks are the whole.
        #[test]
        fn every_record_fits_and_nothing_is_lost(
            size in 0..60_000usize,
            limit in 900..20_000usize,
            inline_max in proptest::option::of(0..30_000usize),
            chunk_bytes in proptest::option::of(1_024..30_000usize),
            encode in any::<bool>(),
            chunks in any::<bool>(),
            dialects in any::<bool>(),
        ) {
            let rules = rules(LargeSpec {
                encode: encode.then_some((Codec::Lz4, 100)),
                inline_max,
                oversize: if chunks { Oversize::Chunk } else { Oversize::ClaimCheck },
                whippet: true,
                bakdata: dialects,
                chunk_bytes,
                silverback: dialects,
                linkedin: dialects,
                content_type: "application/json".into(),
                ..LargeSpec::default()
            });
            let event = of_size(&rules, size);
            let Some(packing) = packing(&rules, &event, Some(limit)).unwrap() else {
                let record = rules.prepare(&event, None).unwrap().record;
                prop_assert!(record.wire_size() <= limit && record.payload.as_ref().unwrap().len() == size);
                return Ok(());
            };
            let whole = Bytes::from(match packing.codec {
                Some(codec) => codec.encode(&vec![b'x'; size]),
                None => vec![b'x'; size],
            });
            let sha256 = wire::hex(&wire::sha256(&whole));
            let form = match packing.oversize {
                _ if whole.len() <= packing.inline => Form::Inline(whole.clone()),
                Then::Chunk { bytes, .. } => {
                    Form::Chunks { whole: whole.clone(), each: bytes, id: Uuid::nil(), sha256 }
                }
                Then::Refer { key, .. } => {
                    Form::Reference { uri: format!("s3://bucket/{}", key.with(&sha256)), size: whole.len(), sha256 }
                }
                Then::Refuse { .. } => unreachable!("it can be moved"),
            };
            let packed = Packed { encoding: packing.codec, form };
            let mut joined = Vec::new();
            for index in 0..packed.records() {
                let record = rules.prepare(&event, Some((&packed, index))).unwrap().record;
                prop_assert!(record.wire_size() <= limit, "{} > {limit}", record.wire_size());
                joined.extend_from_slice(record.payload.as_deref().unwrap());
            }
            if let Form::Reference { uri, .. } = &packed.form {
                prop_assert_eq!(&joined[..], uri.as_bytes());
            } else {
                prop_assert_eq!(&joined[..], &whole[..]);
            }
        }
    }
}
