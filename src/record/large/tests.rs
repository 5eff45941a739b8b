use bytes::Bytes;
use proptest::prelude::*;
use uuid::Uuid;

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

#[test]
fn an_empty_id_is_no_id() {
    let rules = rules(LargeSpec::default());
    let event = event(&rules, &[("id", b""), ("topic", b"t"), ("payload", b"x")]);
    assert!(rules.prepare(&event, None).is_err_and(|why| why.to_string().contains("is NULL or empty")));
}

#[test]
fn the_media_type_is_the_events_own_where_it_has_one() {
    let spec = LargeSpec { content_type: "application/json".into(), ..LargeSpec::default() };
    let header = |name: &'static str, value: &'static str| (name.into(), Some(value.as_bytes().into()));
    assert_eq!(content_type(&[header("Content-Type", "image/gif")], &spec), "image/gif");
    assert_eq!(content_type(&[header("content-type", "")], &spec), "application/json");
    assert_eq!(content_type(&[("content-type".into(), None)], &spec), "application/json");
    assert_eq!(content_type(&[header("x", "image/gif")], &spec), "application/json");
}

fn of_size(rules: &Rules, size: usize) -> Event {
    let payload = vec![b'x'; size];
    event(rules, &[("id", b"e1"), ("topic", b"t"), ("key", b"k"), ("tenant", b"a/b"), ("payload", &payload)])
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
    assert_eq!(packing(&nowhere, &of_size(&nowhere, 5_000), Some(4_000)), Ok(None), "it is refused later");
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
    assert_eq!(key.with("ab12"), "a_-2Fb/t/e1-ab12");
    let nobody = event(&rules, &[("id", b"e1"), ("topic", b"t"), ("payload", &[0; 5_000])]);
    let said = packing(&rules, &nobody, Some(1_000)).unwrap_err().to_string();
    assert!(said.contains("column tenant"), "{said}");
}

#[test]
fn a_row_cannot_say_how_its_payload_travels() {
    let rules = rules(LargeSpec { oversize: Oversize::ClaimCheck, bakdata: true, ..LargeSpec::default() });
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
