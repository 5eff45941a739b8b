//! Every reason why there is no event, and that what is wrong is never handed over.

use super::*;

fn refused(reader: &mut Reader, record: &Incoming) -> ReadError {
    reader.accept(record.clone()).expect_err("it was taken")
}

fn says(error: &ReadError, expected: &str) {
    let text = error.to_string();
    assert!(text.contains(expected), "{text:?} does not say {expected:?}");
}

#[test]
fn headers_that_are_no_headers_of_a_relay_are_errors() {
    let chunk = chunked("1", "k", b"abcd", 2, None).remove(0);
    let there = referring(0, "1", b"abcd", None);
    let upper = wire::hex(&wire::sha256(b"abcd")).to_uppercase();
    for (record, name, value, expected) in [
        (&chunk, wire::CHUNK_ID, Some(""), "expected text"),
        (&chunk, wire::CHUNK_INDEX, None, "it is missing"),
        (&chunk, wire::CHUNK_INDEX, Some("2"), "not below the count"),
        (&chunk, wire::CHUNK_INDEX, Some("-1"), "a decimal number"),
        (&chunk, wire::CHUNK_INDEX, Some("+1"), "a decimal number"),
        (&chunk, wire::CHUNK_INDEX, Some("4294967296"), "a decimal number"),
        (&chunk, wire::CHUNK_COUNT, Some("0"), "not below the count"),
        (&chunk, wire::CHUNK_COUNT, Some("5"), "more chunks than bytes"),
        (&chunk, wire::CHUNK_SIZE, Some("x"), "a decimal number"),
        (&chunk, wire::CHUNK_SIZE, None, "it is missing"),
        (&chunk, wire::CHUNK_SHA256, None, "it is missing"),
        (&chunk, wire::CHUNK_SHA256, Some("abc"), "64 lowercase hexadecimal digits"),
        (&chunk, wire::CHUNK_SHA256, Some(&*upper), "64 lowercase hexadecimal digits"),
        (&there, wire::REF_URI, Some("s3://bucket/other"), "not what the value says"),
        (&there, wire::REF_SIZE, None, "it is missing"),
        (&there, wire::REF_SIZE, Some("1e3"), "a decimal number"),
        (&there, wire::REF_SHA256, None, "it is missing"),
        (&there, wire::REF_ENCODING, Some("brotli"), "encoded as \"brotli\""),
    ] {
        says(&refused(&mut reader(), &with(record, name, value)), expected);
    }
    for name in [wire::REF_URI, wire::CHUNK_ID] {
        let empty = Incoming { value: None, ..record(0, "k", &[(name, "x")], b"") };
        says(&refused(&mut reader(), &empty), "there is no value beside it");
    }
    for (of, expected) in [
        (&[(wire::BACKED_VALUE, "\u{2}")][..], "one byte, 0 or 1"),
        (&[(wire::BACKED_VALUE, "")], "one byte, 0 or 1"),
        (
            &[(wire::BACKED_VALUE, "\0"), (wire::BACKED_COMPRESSION[0], "\u{2}")],
            "snappy of Kafka's own framing",
        ),
        (&[(wire::BACKED_VALUE, "\0"), (wire::BACKED_COMPRESSION[1], "\u{3}")], "lz4 of Kafka's own framing"),
        (&[(wire::BACKED_VALUE, "\0"), (wire::BACKED_COMPRESSION[1], "\u{5}")], "a byte from 0 to 4"),
        (&[(wire::CONTENT_ENCODING, "")], "expected text"),
    ] {
        says(&refused(&mut reader(), &record(0, "k", of, b"v")), expected);
    }
}

#[test]
fn an_object_that_is_not_what_was_promised_is_never_handed_over() {
    let mut reader = reader();
    let there = referring(5, "1", b"payload", None);
    for (object, expected) in [
        (&b"payloaD"[..], "another sha256"),
        (b"payloa", "has 6 bytes where 7"),
        (b"payload2", "has 8 bytes where 7"),
    ] {
        let fetch = fetch(&mut reader, &there);
        says(&reader.fetched(fetch, Bytes::from_static(object)).unwrap_err(), expected);
        assert_eq!(safe(&reader), 5, "the error holds commits back");
    }
    let larger = crate::store::StoreError::TooLarge { uri: "u".into(), size: 9, at_most: 7 };
    says(&fetch(&mut reader, &there).refused(larger), "has 9 bytes where 7 were promised");
    // It was mended: the same record is an event, and no repeat.
    let fetch = fetch(&mut reader, &there);
    assert!(reader.fetched(fetch, Bytes::from_static(b"payload")).is_ok());
    // A checksum that is right, of bytes that are not what their encoding says.
    let there = referring(6, "2", b"no gzip", Some(Codec::Gzip));
    let fetch = super::fetch(&mut reader, &there);
    says(&reader.fetched(fetch, Bytes::from_static(b"no gzip")).unwrap_err(), "not a whole gzip stream");
}

#[test]
fn what_the_store_says_is_what_the_error_says() {
    use crate::store::StoreError;
    let fetch = fetch(&mut reader(), &referring(5, "1", b"payload", None));
    let gone = fetch.refused(StoreError::NotFound { uri: fetch.uri().into() });
    says(&gone, "t [0] at offset 5: there is no object s3://bucket/1");
    assert!(!gone.is_transient());
    says(&fetch.refused(StoreError::Denied("403".into())), "does not allow it");
    assert!(fetch.refused(StoreError::Away("503".into())).is_transient());
}

#[test]
fn what_is_larger_than_the_limit_is_refused_before_it_is_read() {
    let limits = Limits { payload_bytes: 100, ..Limits::default() };
    let fine = vec![7; 100];
    let large = vec![7; 101];
    let mut reader = Reader::new(limits);
    says(&refused(&mut reader, &referring(0, "1", &large, None)), "has 101 bytes, and 100 are taken");
    assert!(matches!(reader.accept(referring(1, "2", &fine, None)), Ok(Step::Fetch(_))));
    // Bombs, however they come.
    for codec in Codec::ALL {
        let bomb = codec.encode(&vec![0; 1 << 20]);
        let limits = Limits { payload_bytes: (1 << 20) - 1, ..limits };
        let mut reader = Reader::new(limits);
        let inline = record(0, "k", &[(wire::CONTENT_ENCODING, codec.name())], &bomb);
        says(&refused(&mut reader, &inline), "larger than 1048575 bytes once decoded");
        let fetch = fetch(&mut reader, &referring(1, "1", &bomb, Some(codec)));
        says(&reader.fetched(fetch, bomb.clone().into()).unwrap_err(), "once decoded");
        let chunks = chunked("2", "k", &vec![0; 1 << 20], bomb.len().div_ceil(2), Some(codec));
        assert!(accept(&mut reader, &chunks[0]).is_none());
        says(&refused(&mut reader, &chunks[1]), "once decoded");
    }
    // bakdata promises no size: the store is asked for no more, and what it gives is looked at.
    let mut reader = Reader::new(limits);
    let backed = record(0, "k", &[(wire::BACKED_VALUE, "\u{1}")], b"s3://bucket/key");
    let fetch = fetch(&mut reader, &backed);
    assert_eq!(fetch.at_most(), 100);
    says(&reader.fetched(fetch, large.clone().into()).unwrap_err(), "has 101 bytes, and 100 are taken");
    // One error for a set, not one for each of its chunks.
    let chunks = at_offsets(chunked("3", "k", &large, 10, None));
    let error = refused(&mut reader, &chunks[0]);
    says(&error, "has 101 bytes, and 100 are taken");
    reader.done(&error.place);
    reader.done(&Place { topic: "t".into(), partition: 0, first: 0, last: 0 });
    for chunk in &chunks[1..] {
        assert!(accept(&mut reader, chunk).is_none());
    }
    assert_eq!(safe(&reader), 11);
}

#[test]
fn chunks_that_do_not_fit_together_end_their_set() {
    let chunks = at_offsets(chunked("1", "k", b"abcdefgh", 2, None));
    let whole = |value: &'static [u8], record: &Incoming| Incoming {
        value: Some(Bytes::from_static(value)),
        ..record.clone()
    };
    for (second, expected) in [
        (with(&chunks[1], wire::CHUNK_COUNT, Some("5")), "they differ in count"),
        (with(&chunks[1], wire::CHUNK_SIZE, Some("9")), "they differ in count"),
        (with(&chunks[1], wire::CHUNK_SHA256, Some(&wire::hex(&[0; 32]))), "they differ in count"),
        (with(&chunks[1], wire::CONTENT_ENCODING, Some("gzip")), "they differ in count"),
        (with(&chunks[1], "id", Some("2")), "they differ in count"),
        (Incoming { key: None, ..chunks[1].clone() }, "they differ in their key"),
        (whole(b"", &chunks[1]), "a chunk is empty"),
        (whole(b"abcdefg", &chunks[1]), "larger than their whole"),
        (whole(b"xy", &with(&chunks[1], wire::CHUNK_INDEX, Some("0"))), "came again has other bytes"),
    ] {
        let mut reader = reader();
        accept(&mut reader, &chunks[0]);
        let error = refused(&mut reader, &second);
        says(&error, expected);
        assert_eq!((error.place.first, error.place.last), (0, 1));
        // The rest of it is no new set; a repeat from its beginning is, and is the event.
        assert!(chunks[1..].iter().all(|chunk| accept(&mut reader, chunk).is_none()));
        reader.done(&error.place);
        assert_eq!(safe(&reader), 4, "{expected}");
        let events: Vec<Event> = chunks.iter().filter_map(|chunk| accept(&mut reader, chunk)).collect();
        assert_eq!(events[0].payload.as_deref(), Some(&b"abcdefgh"[..]));
    }
}

#[test]
fn a_whole_that_is_not_what_was_promised_is_never_handed_over() {
    let chunks = at_offsets(chunked("1", "k", b"abcdefgh", 4, None));
    for (value, expected) in [(&b"efgH"[..], "another sha256"), (b"efg", "has 7 bytes where 8 were promised")]
    {
        let mut reader = reader();
        accept(&mut reader, &chunks[0]);
        let wrong = Incoming { value: Some(Bytes::from_static(value)), ..chunks[1].clone() };
        let error = refused(&mut reader, &wrong);
        says(&error, expected);
        assert_eq!((error.place.first, safe(&reader)), (0, 0));
    }
}

#[test]
fn a_set_that_is_not_continued_is_given_up_and_said() {
    let mut reader = Reader::new(Limits { chunk_gap: 10, ..Limits::default() });
    let chunks = chunked("1", "k", b"abcdef", 2, None);
    accept(&mut reader, &Incoming { offset: 5, ..chunks[0].clone() });
    accept(&mut reader, &Incoming { offset: 6, ..chunks[1].clone() });
    // Other partitions do not count.
    accept(&mut reader, &Incoming { partition: 1, ..record(1000, "k", &[], b"") });
    accept(&mut reader, &record(16, "k", &[], b""));
    assert!(reader.lost().is_none());
    accept(&mut reader, &record(17, "k", &[], b""));
    let lost = reader.lost().unwrap();
    says(&lost, "(event Some(\"1\")): 2 of 3 came, and no more in 10 offsets");
    assert_eq!((lost.place.first, lost.place.last), (5, 6));
    assert!(reader.lost().is_none());
    // It is held back until somebody has looked at it.
    let safe = |reader: &Reader| reader.safe_offsets().find(|(_, partition, _)| *partition == 0).unwrap().2;
    assert_eq!(safe(&reader), 5);
    reader.done(&lost.place);
    assert_eq!(safe(&reader), 16);
    // What comes too late is no new set, and what comes again from its beginning is.
    assert!(accept(&mut reader, &Incoming { offset: 18, ..chunks[2].clone() }).is_none());
    let again: Vec<Event> = (19..)
        .zip(&chunks)
        .filter_map(|(offset, chunk)| accept(&mut reader, &Incoming { offset, ..chunk.clone() }))
        .collect();
    assert_eq!((again.len(), again[0].place.first), (1, 19));
}

#[test]
fn sets_that_do_not_fit_into_the_memory_are_given_up_from_the_stalest() {
    let sets: Vec<Vec<Incoming>> =
        (0..5).map(|n| chunked(&n.to_string(), "k", &[n; 300], 100, None)).collect();
    // Interleaved: all first chunks, all second ones, all third ones.
    let all = at_offsets((0..3).flat_map(|index| sets.iter().map(move |set| set[index].clone())));
    let cost = 300 + 3 * 64;
    for (limits, kept) in [
        (Limits { chunk_bytes: 3 * cost, ..Limits::default() }, 3),
        (Limits { chunk_bytes: 3 * cost - 1, ..Limits::default() }, 2),
        (Limits { chunk_sets: 2, ..Limits::default() }, 2),
        (Limits::default(), 5),
    ] {
        let mut reader = Reader::new(limits);
        let (mut events, mut lost) = (Vec::new(), Vec::new());
        for record in &all {
            events.extend(accept(&mut reader, record));
            lost.extend(std::iter::from_fn(|| reader.lost()));
        }
        let ids: Vec<&str> = events.iter().filter_map(Event::id).collect();
        let expected: Vec<String> = (5 - kept..5).map(|n| n.to_string()).collect();
        assert_eq!(ids, expected);
        assert_eq!(lost.len(), 5 - kept);
        let firsts: Vec<i64> = lost.iter().map(|lost| lost.place.first).collect();
        assert_eq!(firsts, (0..5 - kept as i64).collect::<Vec<_>>());
        lost.iter().for_each(|lost| says(lost, "had to make room after 1 of 3: raise the reader's limits"));
    }
    // The stalest is the one that has waited for the longest, not the oldest.
    let mut reader = Reader::new(Limits { chunk_sets: 2, ..Limits::default() });
    let log = at_offsets(
        [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2)].map(|(set, index): (usize, usize)| sets[set][index].clone()),
    );
    let events: Vec<Event> = log.iter().filter_map(|record| accept(&mut reader, record)).collect();
    assert_eq!((events.len(), events[0].id()), (1, Some("0")));
    // Alone, it is too large for the memory.
    let mut reader = Reader::new(Limits { chunk_bytes: cost - 1, ..Limits::default() });
    says(&refused(&mut reader, &all[0]), "has 300 bytes, and 491 are taken at most");
}
