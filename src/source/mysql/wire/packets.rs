//! Packets: three bytes of length, one that counts, and content. One of the longest length is followed by
//! more of the same content.

use std::io;

use bytes::{Buf as _, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf, split as halve},
    net::TcpStream,
};

use super::Error;

const LONGEST: usize = 0xff_ffff;
/// What is read from the socket at once.
const READ: usize = 256 << 10;
/// Of a packet that is too long, this is kept: more than the heads of all events, and mostly what a row has
/// before its payload.
const HEAD: usize = 4096;

pub trait Socket: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Socket for T {}

fn lost(error: &io::Error) -> Error {
    match error.kind() {
        // Only rustls makes these.
        io::ErrorKind::InvalidData => Error::Tls(error.to_string()),
        _ => Error::Closed,
    }
}

/// The greeting, and no byte more: TLS may come next.
pub(super) async fn first(socket: &mut TcpStream) -> Result<Vec<u8>, Error> {
    let mut head = [0; 4];
    socket.read_exact(&mut head).await.map_err(|error| lost(&error))?;
    let length = u32::from_le_bytes([head[0], head[1], head[2], 0]) as usize;
    if length > 4096 {
        return Err(Error::Protocol("no greeting of a server"));
    }
    let mut content = vec![0; length];
    socket.read_exact(&mut content).await.map_err(|error| lost(&error))?;
    Ok(content)
}

pub(super) async fn send(
    to: &mut (impl AsyncWrite + Unpin),
    content: &[u8],
    sequence: u8,
) -> Result<(), Error> {
    let length = u32::try_from(content.len()).unwrap_or(u32::MAX);
    if length as usize >= LONGEST {
        return Err(Error::Protocol("a statement that is too long"));
    }
    let mut packet = length.to_le_bytes();
    packet[3] = sequence;
    let packet = [&packet, content].concat();
    to.write_all(&packet).await.map_err(|error| lost(&error))?;
    to.flush().await.map_err(|error| lost(&error))
}

pub(super) fn split(socket: Box<dyn Socket>, limit: usize, sequence: u8) -> (Reader, Writer) {
    let (read, write) = halve(socket);
    (Reader::new(read, limit), Writer { to: write, sequence })
}

pub(super) struct Writer {
    to: WriteHalf<Box<dyn Socket>>,
    sequence: u8,
}

impl Writer {
    pub async fn send(&mut self, content: &[u8]) -> Result<(), Error> {
        send(&mut self.to, content, self.sequence).await
    }

    pub async fn command(&mut self, command: u8, content: &[u8]) -> Result<(), Error> {
        self.sequence = 0;
        self.send(&[&[command], content].concat()).await
    }

    /// The next packet answers the one of this number.
    pub fn follow(&mut self, sequence: u8) {
        self.sequence = sequence.wrapping_add(1);
    }
}

/// A packet of the server's.
#[derive(Debug, PartialEq, Eq)]
pub enum Packet<'a> {
    Whole(&'a [u8]),
    /// One that is too long: its beginning, and its length.
    Oversize {
        head: &'a [u8],
        bytes: u64,
    },
}

/// Reads packets.
pub struct Reader {
    from: ReadHalf<Box<dyn Socket>>,
    /// The other half: the connection lasts as long as both.
    other: Option<Writer>,
    parts: Parts,
}

impl Reader {
    fn new(from: ReadHalf<Box<dyn Socket>>, limit: usize) -> Reader {
        Reader { from, other: None, parts: Parts::new(limit) }
    }

    pub(super) fn keep(&mut self, other: Writer, limit: usize) {
        self.other = Some(other);
        self.parts.limit = limit;
    }

    pub(super) fn sequence(&self) -> u8 {
        self.parts.sequence
    }

    /// Waits for bytes. Cancel safe.
    pub async fn fill(&mut self) -> Result<(), Error> {
        self.parts.came.reserve(READ);
        match self.from.read_buf(&mut self.parts.came).await {
            Ok(0) => Err(Error::Closed),
            Ok(_) => Ok(()),
            Err(error) => Err(lost(&error)),
        }
    }

    /// The next packet, if it has come.
    pub fn next_packet(&mut self) -> Option<Packet<'_>> {
        self.parts.next_packet()
    }
}

/// The bytes that came, as packets. Pure.
#[derive(Debug, Default)]
pub struct Parts {
    came: BytesMut,
    /// What is left of the part that is being read, and whether it is the last of its packet.
    part: Option<(usize, bool)>,
    packet: Vec<u8>,
    /// The length of the packet, which may be more than is kept of it.
    bytes: u64,
    /// The packet was lent, and makes room for the next one.
    lent: bool,
    limit: usize,
    sequence: u8,
}

impl Parts {
    pub fn new(limit: usize) -> Parts {
        Parts { limit, ..Parts::default() }
    }

    pub fn push(&mut self, bytes: &[u8]) {
        self.came.extend_from_slice(bytes);
    }

    pub fn next_packet(&mut self) -> Option<Packet<'_>> {
        if std::mem::take(&mut self.lent) {
            self.packet.clear();
            self.packet.shrink_to(READ);
            self.bytes = 0;
        }
        loop {
            let (left, is_last) = match self.part {
                Some(part) => part,
                None if self.came.len() < 4 => return None,
                None => {
                    let head = self.came.split_to(4);
                    let length = u32::from_le_bytes([head[0], head[1], head[2], 0]) as usize;
                    self.sequence = head[3];
                    (length, length < LONGEST)
                }
            };
            let here = left.min(self.came.len());
            self.bytes += here as u64;
            if self.bytes <= self.limit as u64 {
                self.packet.extend_from_slice(&self.came[..here]);
            } else {
                let more = HEAD.saturating_sub(self.packet.len()).min(here);
                self.packet.extend_from_slice(&self.came[..more]);
                self.packet.truncate(HEAD);
            }
            self.came.advance(here);
            self.part = (here < left).then_some((left - here, is_last));
            if self.part.is_some() {
                return None;
            }
            if is_last {
                break;
            }
        }
        self.lent = true;
        Some(if self.bytes > self.limit as u64 {
            Packet::Oversize { head: &self.packet, bytes: self.bytes }
        } else {
            Packet::Whole(&self.packet)
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn packet(content: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for (number, part) in content.chunks(LONGEST).enumerate() {
            bytes.extend_from_slice(&(part.len() as u32).to_le_bytes()[..3]);
            bytes.push(number as u8);
            bytes.extend_from_slice(part);
        }
        if content.len().is_multiple_of(LONGEST) {
            bytes.extend_from_slice(&[0, 0, 0, 9]);
        }
        bytes
    }

    #[test]
    fn a_packet_of_several_parts_is_one() {
        for (length, limit) in [
            (LONGEST - 1, LONGEST),
            (LONGEST, LONGEST),
            (LONGEST + 1, 2 * LONGEST),
            (2 * LONGEST, 2 * LONGEST),
            (2 * LONGEST, LONGEST),
        ] {
            let content: Vec<u8> = (0..length).map(|n| (n % 251) as u8).collect();
            let mut parts = Parts::new(limit);
            parts.push(&packet(&content));
            parts.push(&packet(b"next"));
            match parts.next_packet() {
                Some(Packet::Whole(whole)) if length <= limit => assert!(whole == content),
                Some(Packet::Oversize { head, bytes }) if length > limit => {
                    assert_eq!((head, bytes), (&content[..HEAD], length as u64));
                }
                other => panic!("{length} of {limit}: {}", other.is_some()),
            }
            assert_eq!(parts.next_packet(), Some(Packet::Whole(b"next")));
            assert_eq!(parts.next_packet(), None);
        }
    }

    proptest! {
        #[test]
        fn packets_come_out_as_they_went_in(
            contents in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..700), 0..8),
            cuts in prop::collection::vec(1_usize..400, 1..40),
            limit in 0_usize..600,
        ) {
            let bytes: Vec<u8> = contents.iter().flat_map(|content| packet(content)).collect();
            let (mut parts, mut found, mut rest, mut cut) = (Parts::new(limit), Vec::new(), &bytes[..], 0);
            loop {
                while let Some(packet) = parts.next_packet() {
                    found.push(match packet {
                        Packet::Whole(whole) => (whole.to_vec(), whole.len() as u64),
                        Packet::Oversize { head, bytes } => (head.to_vec(), bytes),
                    });
                }
                if rest.is_empty() {
                    break;
                }
                let (some, more) = rest.split_at(cuts[cut % cuts.len()].min(rest.len()));
                parts.push(some);
                (rest, cut) = (more, cut + 1);
            }
            let wanted: Vec<(Vec<u8>, u64)> = contents.iter().map(|content| {
                let kept = if content.len() <= limit { content.len() } else { content.len().min(HEAD) };
                (content[..kept].to_vec(), content.len() as u64)
            }).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}
