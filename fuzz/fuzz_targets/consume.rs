//! Whatever becomes of records on their way, an event is what was written, or there is none; and nothing
//! panics or outgrows its limit.
//!
//! The input is a list of steps, four bytes each: which record of a few good ones comes next, and what of it
//! is changed by how much.

#![no_main]

use std::sync::LazyLock;

use bytes::Bytes;
use libfuzzer_sys::fuzz_target;
use whippet::{
    consume::{Headers, Incoming, Limits, Reader, Step},
    record::{encode::Codec, wire},
};

const LIMITS: Limits = Limits {
    payload_bytes: 4096,
    chunk_bytes: 2048,
    chunk_sets: 3,
    chunk_gap: 20,
    remembered_ids: 4,
};

/// The headers and values of good records; the event's id is the first header, and its number.
struct Good {
    payloads: Vec<Vec<u8>>,
    records: Vec<(Vec<(&'static str, String)>, Vec<u8>)>,
}

static GOOD: LazyLock<Good> = LazyLock::new(|| {
    let payloads: Vec<Vec<u8>> =
        (0..6_u8).map(|n| (0..40 * usize::from(n)).map(|at| at as u8 / 3 ^ n).collect()).collect();
    let mut records = Vec::new();
    for (n, payload) in payloads.iter().enumerate() {
        let id = ("id", n.to_string());
        let codec = Codec::ALL.get(n).copied();
        let whole = codec.map_or_else(|| payload.clone(), |codec| codec.encode(payload));
        let encoding = codec.map(|codec| (wire::CONTENT_ENCODING, codec.name().to_owned()));
        records.push(([id.clone()].into_iter().chain(encoding.clone()).collect(), whole.clone()));
        let (size, sha256) = (whole.len().to_string(), wire::sha256(&whole));
        let uri = format!("s3://bucket/{n}");
        let mut reference = vec![
            id.clone(),
            (wire::REF_URI, uri.clone()),
            (wire::REF_SIZE, size.clone()),
            (wire::REF_SHA256, wire::hex(&sha256)),
        ];
        reference.extend(codec.map(|codec| (wire::REF_ENCODING, codec.name().to_owned())));
        records.push((reference, uri.into_bytes()));
        for bytes in [17, 50] {
            let slices: Vec<&[u8]> = if whole.is_empty() { vec![&[]] } else { whole.chunks(bytes).collect() };
            for (index, slice) in slices.iter().enumerate() {
                let mut chunk = vec![
                    id.clone(),
                    (wire::CHUNK_ID, wire::chunk_id(&id.1, bytes, &sha256).to_string()),
                    (wire::CHUNK_INDEX, index.to_string()),
                    (wire::CHUNK_COUNT, slices.len().to_string()),
                    (wire::CHUNK_SIZE, size.clone()),
                    (wire::CHUNK_SHA256, wire::hex(&sha256)),
                ];
                chunk.extend(encoding.clone());
                records.push((chunk, slice.to_vec()));
            }
        }
    }
    Good { payloads, records }
});

fn changed(value: &[u8], at: u8, by: u8) -> Bytes {
    let mut value = value.to_vec();
    if let Some(length) = std::num::NonZeroUsize::new(value.len()) {
        value[usize::from(at) % length] ^= by;
    }
    value.into()
}

/// Only where a checksum or a length is between it and the event can a change be told from what was meant.
fn has_checksum(headers: &[(&str, String)]) -> bool {
    headers.iter().any(|(name, _)| *name == wire::CHUNK_ID || *name == wire::REF_URI)
}

fn history(steps: &[u8]) {
    let mut reader = Reader::new(LIMITS);
    for (offset, step) in (0..).zip(steps.chunks_exact(4)) {
        let (headers, value) = &GOOD.records[usize::from(step[0]) % GOOD.records.len()];
        // 0 leaves it as it is; the id decides nothing about the bytes and stays.
        let target = if has_checksum(headers) { usize::from(step[1]) % (headers.len() + 1) } else { 0 };
        let header = |(n, (name, text)): (usize, &(&str, String))| {
            let value = match n == target && n > 0 {
                true => changed(text.as_bytes(), step[2], step[3]),
                false => Bytes::copy_from_slice(text.as_bytes()),
            };
            ((*name).to_owned(), Some(value))
        };
        let record = Incoming {
            topic: "t".into(),
            partition: 0,
            offset,
            timestamp_ms: None,
            key: None,
            value: Some(match target == headers.len() {
                true => changed(value, step[2], step[3]),
                false => Bytes::copy_from_slice(value),
            }),
            headers: Headers(headers.iter().enumerate().map(header).collect()),
        };
        let id: usize = headers[0].1.parse().expect("a number");
        let event = match reader.accept(record) {
            Ok(Step::Event(event)) => Some(event),
            Ok(Step::Fetch(fetch)) => {
                assert!(fetch.at_most() <= LIMITS.payload_bytes as u64);
                let codec = Codec::ALL.get(id).copied();
                let payload = &GOOD.payloads[id];
                let object = codec.map_or_else(|| payload.clone(), |codec| codec.encode(payload));
                reader.fetched(fetch, object.into()).ok()
            }
            Ok(Step::Nothing) | Err(_) => None,
        };
        if let Some(event) = event {
            // A codec's name that was changed is a name that is unknown, and said to be.
            if event.still_encoded.is_none() {
                assert_eq!(event.payload.as_deref(), Some(&GOOD.payloads[id][..]));
            }
            if step[3] & 1 == 0 {
                reader.done(&event.place);
            }
        }
        while let Some(lost) = reader.lost() {
            reader.done(&lost.place);
        }
        let (_, _, safe) = reader.safe_offsets().next().expect("one partition");
        assert!((0..=offset + 1).contains(&safe));
    }
}

fuzz_target!(|bytes: &[u8]| {
    history(bytes);
    if let Some(segment) = wire::Segment::from_bytes(bytes) {
        assert_eq!(&segment.to_bytes().expect("it was read")[..], bytes);
    }
    for codec in Codec::ALL {
        if let Ok(decoded) = codec.decode(bytes, 1 << 16) {
            assert!(decoded.len() <= 1 << 16);
        }
    }
});
