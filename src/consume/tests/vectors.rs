//! tests/fixtures/large-payloads.json, which every reader in any language is held against.

use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Vectors {
    max_payload_bytes: usize,
    chunk_ids: Vec<ChunkId>,
    segments: Vec<Segment>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct ChunkId {
    event: String,
    chunk_bytes: usize,
    sha256: String,
    id: String,
}

#[derive(Deserialize)]
struct Segment {
    id: String,
    index: u32,
    count: u32,
    size: u32,
    hex: String,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    /// The offset to commit once everything that was handed over is done, and no error is.
    safe: i64,
    objects: std::collections::HashMap<String, String>,
    records: Vec<Given>,
    expect: Vec<Option<Expected>>,
}

#[derive(Deserialize)]
struct Given {
    key: String,
    headers: Vec<(String, Text)>,
    value: Option<String>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Text {
    Plain(String),
    Bytes { base64: String },
}

#[derive(Deserialize)]
#[serde(untagged)]
enum Expected {
    Error {
        error: String,
        first: Option<i64>,
    },
    Event {
        event: Option<String>,
        payload: Option<String>,
        travelled: String,
        first: Option<i64>,
        still_encoded: Option<String>,
    },
}

fn bytes(text: &str) -> Bytes {
    BASE64_STANDARD.decode(text).unwrap().into()
}

fn vectors() -> Vectors {
    serde_json::from_str(include_str!("../../../tests/fixtures/large-payloads.json")).unwrap()
}

/// What the file calls a problem.
fn kind(problem: &Problem) -> &'static str {
    match problem {
        Problem::Header { .. } => "header",
        Problem::TooLarge { .. } => "too_large",
        Problem::NoStore { .. } => "no_store",
        Problem::Store(_) => "store",
        Problem::WrongSize { .. } => "wrong_size",
        Problem::WrongChecksum { .. } => "wrong_checksum",
        Problem::Conflict { .. } => "conflict",
        Problem::Expired { .. } => "expired",
        Problem::NoRoom { .. } => "no_room",
        Problem::Encoding(_) => "encoding",
        Problem::Decode(_) => "decode",
    }
}

/// A record, and the object that it may ask for.
fn read(reader: &mut Reader, case: &Case, record: Incoming) -> Result<Option<Event>, ReadError> {
    use crate::store::StoreError;
    match reader.accept(record)? {
        Step::Nothing => Ok(None),
        Step::Event(event) => Ok(Some(event)),
        Step::Fetch(fetch) => {
            let uri = fetch.uri().to_owned();
            let object = match case.objects.get(&uri).map(|object| bytes(object)) {
                None => return Err(fetch.refused(StoreError::NotFound { uri })),
                Some(object) if object.len() as u64 > fetch.at_most() => {
                    let (size, at_most) = (object.len() as u64, fetch.at_most());
                    return Err(fetch.refused(StoreError::TooLarge { uri, size, at_most }));
                }
                Some(object) => object,
            };
            reader.fetched(fetch, object).map(Some)
        }
    }
}

#[test]
fn the_reader_is_what_the_vectors_say() {
    let vectors = vectors();
    for case in &vectors.cases {
        let limits = Limits { payload_bytes: vectors.max_payload_bytes, ..Limits::default() };
        let mut reader = Reader::new(limits);
        for (offset, (given, expected)) in (0..).zip(case.records.iter().zip(&case.expect)) {
            let at = format!("{}, record {offset}", case.name);
            let mut incoming = record(offset, &given.key, &[], b"");
            incoming.value = given.value.as_deref().map(bytes);
            incoming.headers = Headers(
                given
                    .headers
                    .iter()
                    .map(|(name, value)| match value {
                        Text::Plain(text) => (name.clone(), Some(Bytes::copy_from_slice(text.as_bytes()))),
                        Text::Bytes { base64 } => (name.clone(), Some(bytes(base64))),
                    })
                    .collect(),
            );
            let read = read(&mut reader, case, incoming);
            match (read, expected) {
                (Ok(None), None) => {}
                (
                    Ok(Some(found)),
                    Some(Expected::Event { event, payload, travelled, first, still_encoded }),
                ) => {
                    assert_eq!(found.id(), event.as_deref(), "{at}");
                    assert_eq!(&found.still_encoded, still_encoded, "{at}");
                    assert_eq!(found.payload, payload.as_deref().map(bytes), "{at}");
                    let how = match found.travelled {
                        Travelled::Inline => "inline",
                        Travelled::Reference => "reference",
                        Travelled::Chunks(_) => "chunks",
                    };
                    assert_eq!(how, travelled, "{at}");
                    first.inspect(|first| assert_eq!(found.place.first, *first, "{at}"));
                    reader.done(&found.place);
                }
                (Err(found), Some(Expected::Error { error, first })) => {
                    assert_eq!(kind(&found.problem), error, "{at}: {found}");
                    first.inspect(|first| assert_eq!(found.place.first, *first, "{at}"));
                }
                (found, _) => panic!("{at}: {found:?}"),
            }
        }
        assert_eq!(safe(&reader), case.safe, "{}", case.name);
    }
}

#[test]
fn ids_and_segments_are_what_the_vectors_say() {
    let vectors = vectors();
    for id in vectors.chunk_ids {
        let mut sha256 = [0; 32];
        for (byte, at) in sha256.iter_mut().zip((0..64).step_by(2)) {
            *byte = u8::from_str_radix(&id.sha256[at..at + 2], 16).unwrap();
        }
        assert_eq!(wire::chunk_id(&id.event, id.chunk_bytes, &sha256).to_string(), id.id);
    }
    for Segment { id, index, count, size, hex } in vectors.segments {
        let bytes = wire::Segment { id: id.parse().unwrap(), index, count, size }.to_bytes().unwrap();
        let text = bytes.iter().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
        assert_eq!(text, hex);
    }
}
