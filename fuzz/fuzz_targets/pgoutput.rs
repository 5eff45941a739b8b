//! Whatever a server sends, the decoder's parser takes it or refuses it, and never panics.

#![no_main]

use libfuzzer_sys::fuzz_target;
use whippet::source::postgres::pgoutput::{Cell, Frame, Message, Tuple};

/// Reads every byte that a value lends.
fn look(tuple: Tuple<'_>, whole: bool) {
    for cell in tuple.cells() {
        match cell {
            Ok(Cell::Null) => {}
            Ok(Cell::Text(value) | Cell::Binary(value)) => {
                std::hint::black_box(value.iter().fold(0_u8, |sum, byte| sum.wrapping_add(*byte)));
            }
            Err(_) => assert!(!whole, "a row that was checked has an error in it"),
        }
    }
}

fuzz_target!(|bytes: &[u8]| {
    if let Ok(Frame::Data(message)) = Frame::parse(bytes)
        && let Ok(Message::Insert { relation, tuple }) = Message::parse(message)
    {
        look(tuple, true);
        // The head of a frame, which may be all of it, has the same row.
        assert_eq!(Tuple::of_head(bytes), Ok((relation, tuple)));
    }
    // A message without a frame around it: the fuzzer need not find the 25 bytes first.
    if let Ok(Message::Insert { tuple, .. }) = Message::parse(bytes) {
        look(tuple, true);
    }
    if let Ok((_, tuple)) = Tuple::of_head(bytes) {
        look(tuple, false);
    }
    std::hint::black_box(Tuple::prefix_of_head(bytes));
});
