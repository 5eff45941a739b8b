//! What is compressed in the log: MySQL's whole transactions, MariaDB's rows. Unpacked piece by piece and
//! within bounds; what cannot be unpacked whole is an error, never less than it was.

use std::io::{BufRead, Cursor, ErrorKind, Read};

use super::event::{HEADER, Malformed, big, packed};

/// What unpacking may look back, as a power of two: 8 MiB, which is what all levels up to 19 need at most.
const WINDOW_LOG: u32 = 23;

/// Of an event that is too long, this is kept.
const HEAD: u64 = 4096;

const WRONG: Malformed = Malformed("a compressed transaction that cannot be unpacked");

/// An event out of a compressed transaction.
#[derive(Debug, PartialEq, Eq)]
pub enum Inner<'a> {
    Whole(&'a [u8]),
    /// One that is too long: its beginning, and its length.
    Oversize {
        head: &'a [u8],
        bytes: u64,
    },
}

/// The events of a compressed transaction, one after the other.
pub struct Payload<'a> {
    from: Box<dyn Read + Send + 'a>,
    /// How many bytes must still come.
    left: u64,
    event: Vec<u8>,
    limit: usize,
}

/// What is told of the events before they come.
#[derive(Default)]
struct Head {
    algorithm: Option<u64>,
    length: Option<u64>,
    size: Option<u64>,
}

impl Head {
    /// Fields with a type and a length, an end, and then the events.
    fn parse(mut body: &[u8]) -> Result<(Head, &[u8]), Malformed> {
        let mut head = Head::default();
        loop {
            let (field, rest) = packed(body)?;
            body = rest;
            if field == 0 {
                break;
            }
            let (width, rest) = packed(body)?;
            let width = usize::try_from(width).map_err(|_| WRONG)?;
            let (content, rest) = rest.split_at_checked(width).ok_or(WRONG)?;
            body = rest;
            match field {
                1 => head.size = Some(packed(content)?.0),
                2 => head.algorithm = Some(packed(content)?.0),
                3 => head.length = Some(packed(content)?.0),
                _ => {}
            }
        }
        if head.size.is_some_and(|size| size != body.len() as u64) {
            return Err(WRONG);
        }
        Ok((head, body))
    }
}

impl Payload<'static> {
    /// With a copy of what is compressed, so that its events can be taken one by one.
    pub fn owned(body: &[u8], limit: usize) -> Result<Payload<'static>, Malformed> {
        let (head, packed) = Head::parse(body)?;
        Payload::of(&head, Cursor::new(packed.to_vec()), packed.len(), limit)
    }
}

impl<'a> Payload<'a> {
    pub fn parse(body: &'a [u8], limit: usize) -> Result<Payload<'a>, Malformed> {
        let (head, packed) = Head::parse(body)?;
        Payload::of(&head, packed, packed.len(), limit)
    }

    fn of(
        head: &Head,
        packed: impl BufRead + Send + 'a,
        size: usize,
        limit: usize,
    ) -> Result<Payload<'a>, Malformed> {
        let from: Box<dyn Read + Send + 'a> = match head.algorithm {
            Some(0) => {
                let mut from = zstd::stream::read::Decoder::with_buffer(packed).map_err(|_| WRONG)?;
                from.window_log_max(WINDOW_LOG).map_err(|_| WRONG)?;
                Box::new(from)
            }
            Some(255) => Box::new(packed),
            _ => return Err(Malformed("a transaction that is compressed in an unknown way")),
        };
        let left = head.length.unwrap_or(size as u64);
        Ok(Payload { from, left, event: Vec::new(), limit })
    }

    /// The next one; `None` when all of them have come.
    pub fn next_event(&mut self) -> Result<Option<Inner<'_>>, Malformed> {
        if self.left == 0 {
            // And no more than was said.
            return match self.from.read(&mut [0]) {
                Ok(0) => Ok(None),
                _ => Err(WRONG),
            };
        }
        self.event.clear();
        self.event.shrink_to(self.limit);
        let mut head = [0; HEADER];
        self.from.read_exact(&mut head).map_err(|_| WRONG)?;
        let length = u32::from_le_bytes([head[9], head[10], head[11], head[12]]);
        let body = u64::from(length).checked_sub(HEADER as u64).ok_or(WRONG)?;
        self.left = self.left.checked_sub(u64::from(length)).ok_or(WRONG)?;
        let mut content = (&mut self.from).take(body);
        self.event.extend_from_slice(&head);
        if length as usize > self.limit {
            let kept = (&mut content).take(HEAD).read_to_end(&mut self.event).map_err(|_| WRONG)?;
            let passed = std::io::copy(&mut content, &mut std::io::sink()).map_err(|_| WRONG)?;
            let oversize = Inner::Oversize { head: &self.event, bytes: length.into() };
            return if kept as u64 + passed == body { Ok(Some(oversize)) } else { Err(WRONG) };
        }
        match content.read_to_end(&mut self.event) {
            Ok(read) if read as u64 == body => Ok(Some(Inner::Whole(&self.event))),
            _ => Err(WRONG),
        }
    }
}

/// MariaDB's compressed rows: a byte that tells the width of the length, the length, and what zlib made.
/// `Ok(None)`: there is more than `limit` bytes of it.
pub fn inflate(bytes: &[u8], limit: usize) -> Result<Option<Vec<u8>>, Malformed> {
    let wrong = Malformed("compressed rows that cannot be unpacked");
    let (head, rest) = bytes.split_first().ok_or(wrong)?;
    if head & 0x70 != 0 {
        return Err(Malformed("rows that are compressed in an unknown way"));
    }
    let (length, packed) = rest.split_at_checked(usize::from(head & 7)).ok_or(wrong)?;
    let length = usize::try_from(big(length)).map_err(|_| wrong)?;
    if length > limit {
        return Ok(None);
    }
    let mut rows = Vec::with_capacity(length);
    // One byte more would show that the length is wrong.
    let mut from = flate2::read::ZlibDecoder::new(packed).take(length as u64 + 1);
    match from.read_to_end(&mut rows) {
        Ok(read) if read == length => Ok(Some(rows)),
        Err(error) if error.kind() == ErrorKind::OutOfMemory => Ok(None),
        _ => Err(wrong),
    }
}

#[cfg(test)]
pub mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    /// A transaction as MySQL compresses it: events without checksums.
    pub fn compress(events: &[Vec<u8>]) -> Vec<u8> {
        let plain: Vec<u8> = events.iter().flat_map(|event| with_length(event)).collect();
        with_fields(plain.len(), &zstd::stream::encode_all(&plain[..], 3).unwrap())
    }

    fn with_fields(length: usize, packed: &[u8]) -> Vec<u8> {
        let number = |n: usize| [&[9, 0xfe][..], &(n as u64).to_le_bytes()].concat();
        [&[2, 1, 0][..], &[3], &number(length), &[1], &number(packed.len()), &[0], packed].concat()
    }

    fn with_length(event: &[u8]) -> Vec<u8> {
        let mut event = event[..event.len() - 4].to_vec();
        let length = (event.len() as u32).to_le_bytes();
        event[9..13].copy_from_slice(&length);
        event
    }

    fn all(bytes: &[u8], limit: usize) -> Result<Vec<Option<Vec<u8>>>, Malformed> {
        let (mut payload, mut found) = (Payload::parse(bytes, limit)?, Vec::new());
        while let Some(inner) = payload.next_event()? {
            found.push(match inner {
                Inner::Whole(event) => Some(event.to_vec()),
                Inner::Oversize { .. } => None,
            });
        }
        Ok(found)
    }

    #[test]
    fn a_transaction_that_cannot_be_unpacked_is_an_error_wherever_it_is_broken() {
        let event = super::super::event::tests::event;
        let events: Vec<Vec<u8>> = (0..50).map(|n| event(2, n, &n.to_le_bytes().repeat(9))).collect();
        let good = compress(&events);
        let found = all(&good, 1000).unwrap();
        assert_eq!(found.len(), 50);
        assert_eq!(found[7].as_ref().unwrap()[HEADER..], 7_u32.to_le_bytes().repeat(9));
        assert_eq!(all(&good, 30).unwrap(), vec![None; 50]);
        for end in 0..good.len() {
            assert!(all(&good[..end], 1000).is_err(), "cut at {end}");
        }
        let mut broken = 0;
        for index in 0..good.len() {
            let mut bad = good.clone();
            bad[index] ^= 0x55;
            // Without a checksum of its own a change may lead to other events, but to none that are missing.
            broken += usize::from(all(&bad, 1000).map_or(true, |found| found.len() != 50));
        }
        assert!(broken > good.len() / 2, "{broken} of {}", good.len());
    }

    #[test]
    fn one_that_takes_much_memory_to_unpack_is_refused() {
        let plain = with_length(&super::super::event::tests::event(2, 1, &[0; 1000]));
        for (window, is_taken) in [(20, true), (23, true), (24, false), (27, false)] {
            let mut packed = zstd::stream::write::Encoder::new(Vec::new(), 3).unwrap();
            packed.window_log(window).unwrap();
            packed.write_all(&plain).unwrap();
            let packed = packed.finish().unwrap();
            assert_eq!(all(&with_fields(plain.len(), &packed), 2000).is_ok(), is_taken, "{window}");
        }
    }

    #[test]
    fn compressed_rows_are_unpacked_whole_or_not_at_all() {
        let mut zlib = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::default());
        zlib.write_all(&[7; 1000]).unwrap();
        let packed = [&[0x82, 3, 0xe8][..], &zlib.finish().unwrap()].concat();
        assert_eq!(inflate(&packed, 1000), Ok(Some(vec![7; 1000])));
        assert_eq!(inflate(&packed, 999), Ok(None));
        for end in 0..packed.len() - 4 {
            assert!(inflate(&packed[..end], 1000).is_err(), "cut at {end}");
        }
        let mut short = packed;
        short[2] = 0xe7;
        assert!(inflate(&short, 1000).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = all(&bytes, 100);
            let _ = all(&[&[2, 1, 255, 0][..], &bytes].concat(), 100);
            let _ = inflate(&bytes, 100);
        }
    }
}
