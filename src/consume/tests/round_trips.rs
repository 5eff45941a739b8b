//! What `record` makes of an event, the reader makes into the event again.

use proptest::prelude::*;

use super::*;
use crate::{
    event::{Event as Written, Place as RowPlace, Row},
    record::{Form, LargeSpec, Oversize, Packed, Rules, Spec, Then},
};

const HEADERS: &str =
    r#"{"tenant":"acme","traceparent":"00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01"}"#;

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
        large: LargeSpec { reference_key: "{topic}/{id}-{sha256}".into(), whippet: true, ..large },
        ..Spec::default()
    })
    .unwrap()
}

fn written(rules: &Rules, id: &str, payload: &[u8]) -> Written {
    let mut row = Row::default();
    for column in rules.columns() {
        row.push(match column.as_str() {
            "id" => Some(id.as_bytes()),
            "topic" => Some(b"t"),
            "key" => Some(b"k"),
            "headers" => Some(HEADERS.as_bytes()),
            "payload" => Some(payload),
            other => panic!("column {other}"),
        });
    }
    Written { place: RowPlace::Int(1), row, timestamp_ms: None, unread_bytes: None, replay: None }
}

/// Decides, packs and dresses an event as the relay does; its records, and its object.
fn records(rules: &Rules, written: &Written, limit: usize) -> (Vec<Incoming>, Option<Bytes>) {
    let small = rules.prepare(written, None).unwrap().record;
    let packing = rules.packing(written, &small, Some(limit)).unwrap();
    let mut object = None;
    let packed = packing.map(|packing| {
        let payload = small.payload.as_deref().unwrap();
        let encoded = packing.codec.map(|codec| (codec, codec.encode(payload)));
        let (encoding, whole) = match encoded.filter(|(_, bytes)| bytes.len() < payload.len()) {
            Some((codec, bytes)) => (Some(codec), Bytes::from(bytes)),
            None => (None, Bytes::copy_from_slice(payload)),
        };
        let hash = wire::sha256(&whole);
        let form = match packing.oversize {
            _ if whole.len() <= packing.inline => Form::Inline(whole),
            Then::Chunk { event_id, bytes } => {
                let id = wire::chunk_id(&event_id, bytes, &hash);
                Form::Chunks { whole, each: bytes, id, sha256: wire::hex(&hash) }
            }
            Then::Refer { key, .. } => {
                let (size, sha256) = (whole.len(), wire::hex(&hash));
                object = Some(whole);
                Form::Reference { uri: format!("s3://bucket/{}", key.with(&sha256)), size, sha256 }
            }
            Then::Refuse { why } => panic!("{why}"),
        };
        Packed { encoding, form }
    });
    let incoming = |index: u32| {
        let packed = packed.as_ref().map(|packed| (packed, index));
        let record = rules.prepare(written, packed).unwrap().record;
        let owned = |bytes: &[u8]| Bytes::copy_from_slice(bytes);
        let headers =
            record.headers.iter().map(|(name, value)| (name.to_string(), value.as_deref().map(owned)));
        Incoming {
            topic: record.topic.as_ref().into(),
            partition: 0,
            offset: 0,
            timestamp_ms: None,
            key: record.key.as_deref().map(owned),
            value: record.payload.as_deref().map(owned),
            headers: Headers(headers.collect()),
        }
    };
    let count = packed.as_ref().map_or(1, Packed::records);
    ((0..count).map(incoming).collect(), object)
}

proptest! {
    #[test]
    fn an_event_comes_back_as_it_was_written(
        payload in proptest::collection::vec(prop_oneof![0..3_u8, any::<u8>()], 0..20_000),
        limit in 1_200..12_000_usize,
        encode in proptest::option::of((0..4_usize, 0..2_000_usize)),
        chunks in any::<bool>(),
        dialects in any::<bool>(),
    ) {
        let rules = rules(LargeSpec {
            encode: encode.map(|(codec, above)| (Codec::ALL[codec], above)),
            oversize: if chunks { Oversize::Chunk } else { Oversize::ClaimCheck },
            bakdata: dialects,
            silverback: dialects,
            linkedin: dialects,
            content_type: "application/json".into(),
            ..LargeSpec::default()
        });
        let mut reader = reader();
        let mut events = Vec::new();
        let mut offset = 0;
        // A second event of the same payload, and a repeat of the first.
        for id in ["1", "2", "1"] {
            let (records, object) = records(&rules, &written(&rules, id, &payload), limit);
            for record in records {
                match reader.accept(Incoming { offset, ..record }).unwrap() {
                    Step::Nothing => {}
                    Step::Event(event) => events.push(event),
                    Step::Fetch(fetch) => events.push(reader.fetched(fetch, object.clone().unwrap()).unwrap()),
                }
                offset += 1;
            }
        }
        let ids: Vec<&str> = events.iter().filter_map(Event::id).collect();
        prop_assert_eq!(ids, ["1", "2"]);
        for event in &events {
            prop_assert_eq!(event.payload.as_deref(), Some(&payload[..]));
            prop_assert_eq!(&event.still_encoded, &None);
            let context: serde_json::Map<String, serde_json::Value> = serde_json::from_str(HEADERS).unwrap();
            let onward = event.headers.onward();
            let onward: Vec<(&str, Option<&str>)> =
                onward.0.iter().map(|(name, _)| (name.as_str(), onward.text(name))).collect();
            let context: Vec<(&str, Option<&str>)> =
                context.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            prop_assert_eq!(onward, context);
            reader.done(&event.place);
        }
        prop_assert_eq!(safe(&reader), offset);
    }
}
