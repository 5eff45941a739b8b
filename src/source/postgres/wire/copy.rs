//! The two sides of a stream, over any socket: messages are lent from one buffer of a promised size.

use std::{io, ops::Range};

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{Error, patience::Patience};

/// What of a message that is too long is kept.
pub const HEAD: usize = 64 * 1024;
/// The buffer, except while a longer message is in it.
const NORMAL: usize = 256 * 1024;
/// Less room than this at the end of the buffer is not worth a read.
const READ: usize = 64 * 1024;
/// A message's tag and length.
const HEADER: usize = 5;

pub enum Message<'a> {
    /// The content of one CopyData.
    Data(&'a [u8]),
    /// A CopyData of `bytes` bytes, more than the limit: its first [`HEAD`] bytes. The rest is thrown away as
    /// it comes.
    Oversize { head: &'a [u8], bytes: usize },
    /// CopyDone: the server has ended the stream.
    Done,
}

/// The receiving side of a stream.
pub struct Reader {
    socket: Box<dyn AsyncRead + Send + Unpin>,
    /// `data[start..]` was received and not yet taken. Never grows by itself, see `room`.
    pub(super) data: Vec<u8>,
    start: usize,
    /// How much of what comes next is thrown away.
    skip: usize,
    /// What the message at `start` needs in the buffer, if that is known and not yet there.
    need: usize,
    pub(super) limit: usize,
    pub(super) patience: Patience,
}

impl Reader {
    pub(super) fn new(socket: Box<dyn AsyncRead + Send + Unpin>, limit: usize) -> Reader {
        let (data, patience) = (Vec::with_capacity(NORMAL), Patience::NONE);
        Reader { socket, data, start: 0, skip: 0, need: 0, limit, patience }
    }

    /// The next message that is completely in the buffer. Never waits.
    #[expect(clippy::should_implement_trait, reason = "an iterator cannot lend from itself")]
    pub fn next(&mut self) -> Result<Option<Message<'_>>, Error> {
        if self.data.capacity() > NORMAL && self.need == 0 {
            self.room();
        }
        while let Some((tag, length)) = self.header()? {
            match tag {
                b'd' if length > self.limit => {
                    let head = self.take(length.min(HEAD), length);
                    return Ok(head.map(|head| Message::Oversize { head: &self.data[head], bytes: length }));
                }
                b'd' => {
                    let content = self.take(length, length);
                    return Ok(content.map(|content| Message::Data(&self.data[content])));
                }
                b'c' => {
                    self.take(0, length);
                    return Ok(Some(Message::Done));
                }
                // However long it may be, its head is enough to say what it is.
                b'E' => match self.take(length.min(HEAD), length) {
                    Some(content) => return Err(Error::server(&self.data[content])),
                    None => return Ok(None),
                },
                // Notices; and after the end of the stream, that the statement is complete.
                b'N' | b'S' | b'A' | b'C' | b'Z' => {
                    self.take(0, length);
                }
                _ => return Err(Error::unexpected(tag, "in the stream")),
            }
        }
        Ok(None)
    }

    /// Reads more into the buffer. Cancel safe.
    pub async fn fill(&mut self) -> Result<(), Error> {
        self.room();
        if self.data.len() == self.data.capacity() {
            // Full of messages that the caller has not taken yet; a read would make it grow.
            return Ok(());
        }
        match self.socket.read_buf(&mut self.data).await {
            Ok(0) => Err(Error::Closed),
            Ok(_) => Ok(()),
            Err(error) => Err(Error::lost(&error)),
        }
    }

    /// The tag and the content's length of the message at `start`.
    pub(super) fn header(&mut self) -> Result<Option<(u8, usize)>, Error> {
        let skipped = self.skip.min(self.data.len() - self.start);
        self.start += skipped;
        self.skip -= skipped;
        let Some([tag, length @ ..]) = self.data[self.start..].first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = i32::from_be_bytes(*length);
        match usize::try_from(length).ok().and_then(|length| length.checked_sub(4)) {
            Some(content) => Ok(Some((*tag, content))),
            None => Err(Error::Protocol(format!("a message of {length} bytes"))),
        }
    }

    /// Takes the message at `start`, once the first `wanted` of the `length` bytes of its content are there:
    /// their place in the buffer. The others are thrown away.
    pub(super) fn take(&mut self, wanted: usize, length: usize) -> Option<Range<usize>> {
        let content = self.start + HEADER;
        if self.data.len() < content + wanted {
            self.need = HEADER + wanted;
            return None;
        }
        self.need = 0;
        self.start = content + wanted;
        self.skip = length - wanted;
        Some(content..self.start)
    }

    /// What was not taken of the last message, in a buffer of its own size. A call that was cancelled leaves the reader
    /// unusable.
    pub(super) async fn rest(&mut self) -> Result<Vec<u8>, Error> {
        let mut rest = Vec::with_capacity(self.skip);
        let there = self.skip.min(self.data.len() - self.start);
        rest.extend_from_slice(&self.data[self.start..self.start + there]);
        self.start += there;
        let mut socket = (&mut self.socket).take((self.skip - there) as u64);
        while socket.limit() > 0 {
            self.patience.wait_for(socket.limit() as usize);
            match socket.read_buf(&mut rest).await {
                Ok(0) => return Err(Error::Closed),
                Ok(_) => {}
                Err(error) => return Err(Error::lost(&error)),
            }
        }
        self.patience.wait_for(1);
        self.skip = 0;
        Ok(rest)
    }

    /// Makes room for a read, and gives back what a long message needed.
    fn room(&mut self) {
        let size = self.need.max(NORMAL);
        let room = self.data.capacity() - self.data.len();
        let fits = self.start + self.need <= self.data.capacity();
        if self.start == self.data.len() {
            self.data.clear();
            self.start = 0;
        } else if self.start > 0 && (room < READ || !fits || self.data.capacity() > size) {
            // Moves less than one message, and no byte twice, if all whole messages were taken.
            self.data.drain(..self.start);
            self.start = 0;
        }
        if self.data.capacity() > size {
            self.data.shrink_to(size);
        } else if self.data.capacity() < size {
            // Not `reserve`, which doubles: the memory is promised.
            self.data.reserve_exact(size - self.data.len());
        }
    }
}

/// The sending side of a stream.
pub struct Writer {
    socket: Box<dyn AsyncWrite + Send + Unpin>,
    /// What a cancelled call has not sent; the next one sends it first, so that no message is torn.
    out: BytesMut,
}

impl Writer {
    pub(super) fn new(socket: Box<dyn AsyncWrite + Send + Unpin>) -> Writer {
        Writer { socket, out: BytesMut::new() }
    }

    /// One CopyData, flushed.
    pub async fn send(&mut self, content: &[u8]) -> Result<(), Error> {
        self.write(|out| {
            frontend::CopyData::new(content)?.write(out);
            Ok(())
        })
        .await
    }

    /// CopyDone, so that the server ends the stream in its turn.
    pub async fn finish(&mut self) -> Result<(), Error> {
        self.write(|out| {
            frontend::copy_done(out);
            Ok(())
        })
        .await
    }

    pub(super) async fn write(
        &mut self,
        encode: impl FnOnce(&mut BytesMut) -> io::Result<()>,
    ) -> Result<(), Error> {
        let before = self.out.len();
        if let Err(error) = encode(&mut self.out) {
            self.out.truncate(before);
            return Err(Error::Protocol(format!("a message that cannot be sent: {error}")));
        }
        self.socket.write_all_buf(&mut self.out).await.map_err(|error| Error::lost(&error))?;
        self.socket.flush().await.map_err(|error| Error::lost(&error))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 1000;

    fn frame(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = i32::try_from(content.len() + 4).unwrap();
        [&[tag][..], &length.to_be_bytes(), content].concat()
    }

    /// Everything that a reader says, and the largest buffer that it had.
    async fn read_all(socket: impl AsyncRead + Send + Unpin + 'static, limit: usize) -> (Vec<String>, usize) {
        let mut reader = Reader::new(Box::new(socket), limit);
        let (mut said, mut largest) = (Vec::new(), 0);
        loop {
            largest = largest.max(reader.data.capacity());
            match reader.next() {
                Ok(Some(Message::Data(content))) => said.push(format!("data {}", content.escape_ascii())),
                Ok(Some(Message::Oversize { head, bytes })) => {
                    let x = head.iter().take_while(|byte| **byte == b'x').count();
                    said.push(format!("oversize {x} x of {bytes}"));
                }
                Ok(Some(Message::Done)) => said.push("done".to_owned()),
                Ok(None) => match reader.fill().await {
                    Ok(()) => {}
                    Err(error) => {
                        said.push(error.to_string());
                        return (said, largest);
                    }
                },
                Err(error @ Error::Server { .. }) => said.push(error.to_string()),
                Err(error) => {
                    said.push(error.to_string());
                    return (said, largest);
                }
            }
        }
    }

    const LOST: &str = "the connection to the server was lost";

    #[tokio::test]
    async fn frames_may_be_split_anywhere() {
        let error = b"SERROR\0C42704\0Mno such slot\0DIt is gone.\0HMake one.\0\0";
        let bytes = [
            frame(b'd', b"one"),
            frame(b'N', b"notice"),
            frame(b'd', b""),
            frame(b'E', error),
            frame(b'S', b"a\0b\0"),
            frame(b'c', b""),
        ]
        .concat();
        let server = "the server says: no such slot. It is gone. Make one. (SQLSTATE 42704)";
        for split in 0..=bytes.len() {
            let (first, second) = bytes.split_at(split);
            let socket = Cursor::new(first.to_vec()).chain(Cursor::new(second.to_vec()));
            let (said, _) = read_all(socket, LIMIT).await;
            assert_eq!(said, ["data one", "data ", server, "done", LOST], "split at {split}");
        }
    }

    #[tokio::test]
    async fn what_is_too_long_is_not_stored() {
        let bytes =
            [frame(b'd', &vec![b'x'; 5_000_000]), frame(b'd', &[b'x'; LIMIT + 1]), frame(b'd', b"next")];
        let (said, largest) = read_all(Cursor::new(bytes.concat()), LIMIT).await;
        assert_eq!(said, ["oversize 65536 x of 5000000", "oversize 1001 x of 1001", "data next", LOST]);
        assert_eq!(largest, NORMAL);
    }

    #[tokio::test]
    async fn a_long_message_gets_what_it_needs_and_gives_it_back() {
        let long = vec![b'x'; 5_000_000];
        let bytes = [frame(b'd', b"one"), frame(b'd', &long), frame(b'd', b"two")].concat();
        let mut reader = Reader::new(Box::new(Cursor::new(bytes)), long.len());
        let mut lengths = Vec::new();
        while lengths.len() < 3 {
            if let Some(Message::Data(content)) = reader.next().unwrap() {
                lengths.push(content.len());
            } else {
                reader.fill().await.unwrap();
                assert!([NORMAL, long.len() + HEADER].contains(&reader.data.capacity()));
            }
        }
        assert_eq!((lengths, reader.data.capacity()), (vec![3, long.len(), 3], NORMAL));
    }

    #[tokio::test]
    async fn lengths_that_lie_are_errors() {
        for length in [-1, 0, 3, i32::MIN] {
            let (said, _) = read_all(Cursor::new([&b"d"[..], &length.to_be_bytes()].concat()), LIMIT).await;
            assert_eq!(said, [format!("the replication protocol was broken: a message of {length} bytes")]);
        }
        for (tag, limit) in [(b'd', LIMIT), (b'E', usize::MAX), (b'N', usize::MAX)] {
            let bytes = [&[tag][..], &i32::MAX.to_be_bytes(), b"xxx"].concat();
            let (said, largest) = read_all(Cursor::new(bytes), limit).await;
            assert_eq!((said, largest), (vec![LOST.to_owned()], NORMAL));
        }
    }

    #[tokio::test]
    async fn a_cancelled_call_does_not_tear_a_message() {
        let (near, mut far) = tokio::io::duplex(4);
        let mut writer = Writer { socket: Box::new(near), out: BytesMut::new() };
        tokio::select! {
            biased;
            _ = writer.send(b"first") => panic!("there was no room for it"),
            () = std::future::ready(()) => {}
        }
        let mut received = Vec::new();
        let send = async move { writer.send(b"second").await };
        let (sent, read) = tokio::join!(send, far.read_to_end(&mut received));
        assert!(sent.is_ok() && read.is_ok());
        assert_eq!(received, [frame(b'd', b"first"), frame(b'd', b"second")].concat());
    }

    fn run(bytes: Vec<u8>, pieces: usize, limit: usize) -> (Vec<String>, usize) {
        let (near, mut far) = tokio::io::duplex(pieces);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let write = async move { drop(far.write_all(&bytes).await) };
            tokio::join!(read_all(near, limit), write).0
        })
    }

    proptest! {
        #[test]
        fn no_bytes_break_a_reader(
            bytes in prop::collection::vec(prop_oneof![Just(0), Just(b'd'), Just(b'x'), any::<u8>()], 0..400),
            pieces in 1..100_usize,
            limit in 0..50_usize,
        ) {
            drop(super::super::row(&bytes));
            drop(Error::server(&bytes));
            let (_, largest) = run(bytes, pieces, limit);
            prop_assert!(largest == NORMAL);
        }

        #[test]
        fn frames_come_out_as_they_went_in(
            frames in prop::collection::vec((prop_oneof![Just(b'd'), Just(b'N'), Just(b'c')], 0..600_000_usize), 0..8),
            pieces in 1..300_000_usize,
            limit in 0..600_000_usize,
        ) {
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for (tag, length) in frames {
                bytes.extend(frame(tag, &vec![b'x'; length]));
                match tag {
                    b'd' if length > limit => expected.push(format!("oversize {} x of {length}", length.min(HEAD))),
                    b'd' => expected.push(format!("data {}", "x".repeat(length))),
                    b'c' => expected.push("done".to_owned()),
                    _ => {}
                }
            }
            expected.push(LOST.to_owned());
            let (said, largest) = run(bytes, pieces, limit);
            prop_assert!(said == expected);
            prop_assert!(largest <= NORMAL.max(limit + HEADER));
        }
    }
}
