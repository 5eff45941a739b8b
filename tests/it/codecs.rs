//! Payloads that the relay encodes, in records and in objects, as the consumer kit has them again.

use whippet::{
    consume::{Event, Travelled},
    record::{encode::Codec, wire},
};

use crate::large::{Large, MIB, noise};

/// Noise and its repetition: a codec makes at best a half of it.
fn half(seed: usize, size: usize) -> Vec<u8> {
    let pieces = (0..size / 2000).flat_map(|piece| noise(seed + piece, 1000).repeat(2));
    pieces.collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_codec_is_undone_by_a_reader_wherever_the_payload_travels() {
    let mut stage = Large::set("codecs", &[]).await;
    let table = |codec: &Codec| {
        format!("{{ name: {codec}_outbox, payload: {{ encode: {{ codec: {codec}, above: 10KiB }} }} }}")
    };
    let tables: Vec<String> = Codec::ALL.iter().map(table).collect();
    let config = stage.world.config(&format!("[{}]", tables.join(", ")), &stage.bucket.config("", &[]));
    let relay = stage.relay(&config).await;
    let mut expected = Vec::new();
    for codec in Codec::ALL {
        let table = format!("{codec}_outbox");
        for (payload, encoded, travels) in [
            // In the record, though it would not fit as it is.
            (half(1, MIB + MIB / 2), true, Travelled::Inline),
            (half(2, 200_000), true, Travelled::Inline),
            (half(3, 4 * MIB), true, Travelled::Reference),
            // At most as large as `above`, and what does not shrink.
            (vec![7; 10 << 10], false, Travelled::Inline),
            (noise(4, 200_000), false, Travelled::Inline),
            (noise(5, 2 * MIB), false, Travelled::Reference),
        ] {
            let id = stage.insert_into(&table, codec.name(), payload).await;
            expected.push((id, encoded.then_some(codec), travels));
        }
    }
    for codec in Codec::ALL {
        stage.world.until(&format!("SELECT count(*) FROM {codec}_outbox"), 0).await;
    }
    let (_, events) = stage.end_of("gzip_outbox", relay).await;
    for (id, codec, travels) in expected {
        let event: &Event = events.iter().find(|event| event.id() == Some(&id)).unwrap();
        let codec = codec.map(Codec::name);
        let (in_record, in_object) = match travels {
            Travelled::Reference => (None, codec),
            _ => (codec, None),
        };
        assert_eq!(event.travelled, travels, "{codec:?}");
        assert_eq!(event.headers.text(wire::CONTENT_ENCODING), in_record);
        assert_eq!(event.headers.text(wire::REF_ENCODING), in_object);
    }
}
