//! The reader as a whole, without Kafka: records in, events, errors and safe offsets out.

mod errors;
mod histories;
mod round_trips;
mod vectors;

use std::sync::Arc;

use bytes::Bytes;

use super::{headers::tests::headers, *};
use crate::record::{encode::Codec, wire};

/// A record of the one partition that most tests have.
fn record(offset: i64, key: &str, of: &[(&str, &str)], value: &[u8]) -> Incoming {
    Incoming {
        topic: Arc::from("t"),
        partition: 0,
        offset,
        timestamp_ms: None,
        key: Some(Bytes::copy_from_slice(key.as_bytes())),
        value: Some(Bytes::copy_from_slice(value)),
        headers: headers(of),
    }
}

/// An event in chunks, at offsets from 0.
fn chunked(id: &str, key: &str, payload: &[u8], chunk_bytes: usize, codec: Option<Codec>) -> Vec<Incoming> {
    let whole = codec.map_or_else(|| payload.to_vec(), |codec| codec.encode(payload));
    let sha256 = wire::sha256(&whole);
    let chunk_id = wire::chunk_id(id, chunk_bytes, &sha256).to_string();
    let slices: Vec<&[u8]> = if whole.is_empty() { vec![&[]] } else { whole.chunks(chunk_bytes).collect() };
    let (count, size, sha256) = (slices.len().to_string(), whole.len().to_string(), wire::hex(&sha256));
    let chunk = |(index, slice): (usize, &&[u8])| {
        let index_text = index.to_string();
        let mut of = vec![
            ("id", id),
            ("traceparent", "trace"),
            (wire::CHUNK_ID, &*chunk_id),
            (wire::CHUNK_INDEX, &*index_text),
            (wire::CHUNK_COUNT, &*count),
            (wire::CHUNK_SIZE, &*size),
            (wire::CHUNK_SHA256, &*sha256),
        ];
        of.extend(codec.map(|codec| (wire::CONTENT_ENCODING, codec.name())));
        record(index as i64, key, &of, slice)
    };
    slices.iter().enumerate().map(chunk).collect()
}

/// A record that refers to `object`.
fn referring(offset: i64, id: &str, object: &[u8], codec: Option<Codec>) -> Incoming {
    let (size, sha256) = (object.len().to_string(), wire::hex(&wire::sha256(object)));
    let uri = format!("s3://bucket/{id}");
    let mut of =
        vec![("id", id), (wire::REF_URI, &*uri), (wire::REF_SIZE, &*size), (wire::REF_SHA256, &*sha256)];
    of.extend(codec.map(|codec| (wire::REF_ENCODING, codec.name())));
    record(offset, "k", &of, uri.as_bytes())
}

/// The same records, one after the other.
fn at_offsets(records: impl IntoIterator<Item = Incoming>) -> Vec<Incoming> {
    records.into_iter().zip(0..).map(|(record, offset)| Incoming { offset, ..record }).collect()
}

fn with(record: &Incoming, name: &str, value: Option<&str>) -> Incoming {
    let mut record = record.clone();
    record.headers.0.retain(|(known, _)| known != name);
    record
        .headers
        .0
        .extend(value.map(|value| (name.to_owned(), Some(Bytes::copy_from_slice(value.as_bytes())))));
    record
}

fn reader() -> Reader {
    Reader::new(Limits::default())
}

fn accept(reader: &mut Reader, record: &Incoming) -> Option<Event> {
    match reader.accept(record.clone()).unwrap() {
        Step::Event(event) => Some(event),
        Step::Nothing => None,
        Step::Fetch(fetch) => panic!("it asks for {}", fetch.uri()),
    }
}

fn fetch(reader: &mut Reader, record: &Incoming) -> Fetch {
    match reader.accept(record.clone()).unwrap() {
        Step::Fetch(fetch) => fetch,
        other => panic!("{other:?}"),
    }
}

fn safe(reader: &Reader) -> i64 {
    let mut all: Vec<i64> = reader.safe_offsets().map(|(.., offset)| offset).collect();
    assert_eq!(all.len(), 1, "{all:?}");
    all.remove(0)
}

#[test]
fn an_inline_event_is_handed_over_once_whatever_its_encoding() {
    let mut reader = reader();
    for (n, codec) in [None].into_iter().chain(Codec::ALL.map(Some)).enumerate() {
        let id = n.to_string();
        let mut of = vec![("id", &*id), ("eventType", "Placed"), ("traceparent", "trace")];
        of.extend(codec.map(|codec| (wire::CONTENT_ENCODING, codec.name())));
        let value = codec.map_or_else(|| b"payload".to_vec(), |codec| codec.encode(b"payload"));
        let event = accept(&mut reader, &record(n as i64, "k", &of, &value)).unwrap();
        assert_eq!(event.payload.as_deref(), Some(&b"payload"[..]));
        assert_eq!(
            (event.id(), event.kind(), event.travelled),
            (Some(&*id), Some("Placed"), Travelled::Inline)
        );
        assert_eq!(event.headers.onward(), headers(&[("traceparent", "trace")]));
        assert!(accept(&mut reader, &record(n as i64, "k", &of, &value)).is_none(), "a repeat");
    }
}

/// What the application has encoded itself is its own affair, however it travels.
#[test]
fn what_only_the_application_can_decode_is_handed_over_as_it_is() {
    let mut reader = reader();
    let own = |record: &Incoming| with(record, wire::CONTENT_ENCODING, Some("br"));
    let inline = accept(&mut reader, &own(&record(0, "k", &[("id", "1")], b"brotli"))).unwrap();
    let there = fetch(&mut reader, &own(&referring(1, "2", b"brotli", None)));
    let there = reader.fetched(there, Bytes::from_static(b"brotli")).unwrap();
    let chunk = accept(&mut reader, &own(&chunked("3", "k", b"brotli", 10, None)[0])).unwrap();
    for event in [inline, there, chunk] {
        let found = (event.payload.as_deref(), event.still_encoded.as_deref());
        assert_eq!(found, (Some(&b"brotli"[..]), Some("br")), "{:?}", event.travelled);
    }
    // And what it has encoded in a way that is known is decoded, wherever it is.
    let zipped = Codec::Gzip.encode(b"payload");
    let there = with(&referring(4, "4", &zipped, None), wire::CONTENT_ENCODING, Some("gzip"));
    let there = fetch(&mut reader, &there);
    let event = reader.fetched(there, zipped.into()).unwrap();
    assert_eq!((event.payload.as_deref(), event.still_encoded), (Some(&b"payload"[..]), None));
}

#[test]
fn a_tombstone_is_null_and_an_empty_payload_is_empty() {
    let mut reader = reader();
    for backed in [None, Some("\0"), Some("\u{1}")] {
        let tombstone =
            Incoming { value: None, ..with(&record(0, "k", &[], b""), wire::BACKED_VALUE, backed) };
        assert_eq!(accept(&mut reader, &tombstone).unwrap().payload, None, "{backed:?}");
    }
    let empty = accept(&mut reader, &record(1, "k", &[], b"")).unwrap();
    assert_eq!(empty.payload.as_deref(), Some(&b""[..]));
}

#[test]
fn the_same_id_under_another_key_or_in_another_partition_is_another_event() {
    let mut reader = reader();
    let one = record(0, "a", &[("id", "1")], b"x");
    assert!(accept(&mut reader, &one).is_some());
    assert!(accept(&mut reader, &Incoming { key: None, offset: 1, ..one.clone() }).is_some());
    assert!(accept(&mut reader, &Incoming { partition: 1, ..one.clone() }).is_some());
    assert!(accept(&mut reader, &Incoming { topic: "u".into(), ..one.clone() }).is_some());
    assert!(accept(&mut reader, &Incoming { offset: 2, ..one }).is_none());
}

#[test]
fn a_partition_that_was_taken_away_begins_anew() {
    let mut reader = reader();
    let one = record(7, "a", &[("id", "1")], b"x");
    assert!(accept(&mut reader, &one).is_some());
    let chunks = chunked("2", "k", b"ab", 1, None);
    accept(&mut reader, &Incoming { offset: 8, ..chunks[0].clone() });
    reader.forget(&one.topic, 0);
    assert_eq!(reader.safe_offsets().count(), 0);
    assert!(
        accept(&mut reader, &Incoming { offset: 9, ..chunks[1].clone() }).is_none(),
        "half of it is forgotten"
    );
    assert!(accept(&mut reader, &one).is_some(), "its event was handed over and may not have been done");
}

#[test]
fn a_reference_is_checked_decoded_and_handed_over() {
    let mut reader = reader();
    for (n, codec) in [None].into_iter().chain(Codec::ALL.map(Some)).enumerate() {
        let object = codec.map_or_else(|| b"payload".to_vec(), |codec| codec.encode(b"payload"));
        let record = referring(n as i64, &n.to_string(), &object, codec);
        let fetch = fetch(&mut reader, &record);
        assert_eq!((fetch.uri(), fetch.at_most()), (&*format!("s3://bucket/{n}"), object.len() as u64));
        let event = reader.fetched(fetch, object.into()).unwrap();
        assert_eq!(
            (event.payload.as_deref(), event.travelled),
            (Some(&b"payload"[..]), Travelled::Reference)
        );
        assert!(accept(&mut reader, &record).is_none(), "a repeat is not even fetched");
    }
}

#[test]
fn the_dialect_bakdata_alone_is_understood() {
    let mut reader = reader();
    let backed = |offset, flag: &str, of: &[(&str, &str)], value: &[u8]| {
        record(offset, "k", &[&[(wire::BACKED_VALUE, flag)], of].concat(), value)
    };
    let inline = accept(&mut reader, &backed(0, "\0", &[], b"payload")).unwrap();
    assert_eq!((inline.payload.as_deref(), inline.travelled), (Some(&b"payload"[..]), Travelled::Inline));
    let there = fetch(&mut reader, &backed(1, "\u{1}", &[], b"s3://bucket/key"));
    assert_eq!((there.uri(), there.at_most()), ("s3://bucket/key", 256 << 20));
    let event = reader.fetched(there, Bytes::from_static(b"payload")).unwrap();
    assert_eq!(event.payload.as_deref(), Some(&b"payload"[..]));
    // Its own header for compression, by both names.
    let zipped = Codec::Gzip.encode(b"payload");
    for (offset, name) in [2, 3].into_iter().zip(wire::BACKED_COMPRESSION) {
        let event = accept(&mut reader, &backed(offset, "\0", &[(name, "\u{1}")], &zipped)).unwrap();
        assert_eq!(event.payload.as_deref(), Some(&b"payload"[..]));
    }
    let there = fetch(
        &mut reader,
        &backed(4, "\u{1}", &[(wire::BACKED_COMPRESSION[1], "\u{4}")], b"s3://bucket/key"),
    );
    let event = reader.fetched(there, Codec::Zstd.encode(b"payload").into()).unwrap();
    assert_eq!(event.payload.as_deref(), Some(&b"payload"[..]));
}

#[test]
fn chunks_are_joined_and_decoded_and_hold_commits_back_at_the_first() {
    let payload: Vec<u8> = (0..10_000_u32).map(|n| (n * n % 251) as u8).collect();
    for codec in [None].into_iter().chain(Codec::ALL.map(Some)) {
        let mut reader = reader();
        assert!(accept(&mut reader, &record(99, "k", &[], b"before")).is_some());
        reader.done(&Place { topic: "t".into(), partition: 0, first: 99, last: 99 });
        let chunks = chunked("1", "k", &payload, 70, codec);
        let count = chunks.len();
        let last = 99 + count as i64;
        for (chunk, offset) in chunks.iter().zip(100..last) {
            assert!(accept(&mut reader, &Incoming { offset, ..chunk.clone() }).is_none());
            assert_eq!(safe(&reader), 100);
        }
        let event = accept(&mut reader, &Incoming { offset: last, ..chunks[count - 1].clone() }).unwrap();
        assert_eq!(event.payload.as_deref(), Some(&payload[..]));
        assert_eq!((event.place.first, event.place.last), (100, last));
        assert_eq!(event.travelled, Travelled::Chunks(count as u32));
        assert_eq!(event.headers.onward(), headers(&[("traceparent", "trace")]));
        assert_eq!(safe(&reader), 100, "not before it is done");
        reader.done(&event.place);
        assert_eq!(safe(&reader), last + 1);
        // A repeat of some or all of them is none.
        for chunk in chunks.iter().chain(&chunks[2..]) {
            assert!(accept(&mut reader, &Incoming { offset: last + 1, ..chunk.clone() }).is_none());
        }
        assert_eq!(safe(&reader), last + 2);
    }
}

#[test]
fn an_event_in_one_chunk_and_an_empty_one_are_events() {
    let mut reader = reader();
    let one = chunked("1", "k", b"abc", 10, None).remove(0);
    assert_eq!(accept(&mut reader, &one).unwrap().payload.as_deref(), Some(&b"abc"[..]));
    let empty = chunked("2", "k", b"", 10, None).remove(0);
    assert_eq!(accept(&mut reader, &empty).unwrap().payload.as_deref(), Some(&b""[..]));
}

/// The relay was killed in mid-set, and the topic's limit changed before the event came again.
#[test]
fn what_a_crash_left_is_superseded_by_the_event() {
    let mut reader = reader();
    let before = chunked("1", "k", b"abcdefgh", 2, None);
    let after = chunked("1", "k", b"abcdefgh", 3, None);
    let all = at_offsets(before[..3].iter().chain(&after).cloned());
    let events: Vec<Event> = all.iter().filter_map(|record| accept(&mut reader, record)).collect();
    assert_eq!(events.len(), 1);
    assert_eq!((events[0].place.first, safe(&reader)), (3, 3), "nothing waits for the first set any more");
    reader.done(&events[0].place);
    assert_eq!(safe(&reader), 6);
    // It need not even come in chunks.
    let mut reader = Reader::new(Limits { remembered_ids: 0, ..Limits::default() });
    let all = at_offsets([before[0].clone(), record(1, "k", &[("id", "1")], b"abcdefgh")]);
    let events: Vec<Event> = all.iter().filter_map(|record| accept(&mut reader, record)).collect();
    reader.done(&events[0].place);
    assert_eq!(safe(&reader), 2);
}
