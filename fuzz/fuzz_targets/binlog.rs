//! Whatever a server sends, the parts of the binlog's decoder take it or refuse it, and never panic.

#![no_main]

use libfuzzer_sys::fuzz_target;
use whippet::source::mysql::{
    event::{self, Body},
    json,
    map::{TableMap, Written},
    number, payload,
    wire::{Packet, Parts},
};

fuzz_target!(|bytes: &[u8]| {
    let mut parts = Parts::new(4096);
    for part in bytes.chunks(7) {
        parts.push(part);
        while let Some(packet) = parts.next_packet() {
            let (Packet::Whole(bytes) | Packet::Oversize { head: bytes, .. }) = packet;
            std::hint::black_box(event::parse(bytes, false).is_ok());
        }
    }
    if let Ok((_, Body::Payload(body))) = event::parse(bytes, false) {
        unpack(body);
    }
    unpack(bytes);
    std::hint::black_box(TableMap::parse(bytes).is_ok());
    std::hint::black_box(payload::inflate(bytes, 1 << 16).is_ok());
    let mut out = Vec::new();
    if json::write(bytes, 1 << 16, &mut out).is_ok() {
        assert!(out.len() <= (1 << 16) + 8 * bytes.len() + 16);
    }
    if let [code, first, second, rest @ ..] = bytes {
        let written = Written { code: *code, meta: [*first, *second] };
        std::hint::black_box(written.value(rest));
        number::write_decimal(rest, *first, *second, &mut out);
    }
});

fn unpack(body: &[u8]) {
    if let Ok(mut payload) = payload::Payload::parse(body, 4096) {
        while let Ok(Some(_)) = payload.next_event() {}
    }
}
