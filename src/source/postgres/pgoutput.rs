//! What a logical replication stream says, version 1 of pgoutput's protocol: a transaction at a time, in
//! the order of commits. (PostgreSQL documentation: "Logical Replication
//! Message Formats" and "Streaming Replication Protocol".)
//!
//! Pure, and nothing is copied: a message borrows from the frame that it came in. A frame that ends too
//! early, or says what it may not, is an error, never a panic.

use crate::source::log::Lsn;

/// Seconds from the Unix epoch to PostgreSQL's, 2000-01-01 (src/include/datatype/timestamp.h).
pub const POSTGRES_EPOCH_SECONDS: i64 = 946_684_800;

#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server sent what is not {0}")]
pub struct Malformed(&'static str);

/// The content of one CopyData message from the server.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Frame<'a> {
    /// A message of pgoutput.
    Data(&'a [u8]),
    /// Everything up to `wal_end` was sent, as far as it concerns us. With the server's clock, in
    /// microseconds since 2000-01-01.
    Keepalive { wal_end: Lsn, clock: i64, reply: bool },
}

impl<'a> Frame<'a> {
    pub fn parse(frame: &'a [u8]) -> Result<Frame<'a>, Malformed> {
        let mut rest = Cursor { bytes: frame, what: "a replication message" };
        match rest.u8()? {
            b'w' => {
                // Start, end and time of sending: what a transaction needs is in its own messages.
                rest.take(24)?;
                Ok(Frame::Data(rest.bytes))
            }
            b'k' => {
                let wal_end = Lsn(rest.u64()?);
                let clock = rest.u64()?.cast_signed();
                Ok(Frame::Keepalive { wal_end, clock, reply: rest.u8()? != 0 })
            }
            _ => Err(Malformed("a replication message")),
        }
    }
}

/// The standby's answer: everything up to `confirmed` may be forgotten by the server.
pub fn status_update(confirmed: Lsn, now_micros: i64, reply: bool) -> [u8; 34] {
    let mut message = [0; 34];
    message[0] = b'r';
    for (index, value) in
        [confirmed.0, confirmed.0, confirmed.0, now_micros.cast_unsigned()].iter().enumerate()
    {
        message[1 + index * 8..9 + index * 8].copy_from_slice(&value.to_be_bytes());
    }
    message[33] = u8::from(reply);
    message
}

/// One message of pgoutput; those that an outbox has no use for are [`Message::Other`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message<'a> {
    /// A transaction that committed, with the place of its commit record.
    Begin {
        commit: Lsn,
        /// The time of its commit, in microseconds since 2000-01-01.
        micros: i64,
        xid: u32,
    },
    /// Its end. Confirming `end` means that the transaction is never sent again.
    Commit {
        end: Lsn,
    },
    /// What follows about this relation has these columns.
    Relation(Relation),
    Insert {
        relation: u32,
        tuple: Tuple<'a>,
    },
    /// Of `pg_logical_emit_message`.
    Logical {
        transactional: bool,
        at: Lsn,
        prefix: &'a str,
        content: &'a [u8],
    },
    Other,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relation {
    pub id: u32,
    pub schema: String,
    pub name: String,
    pub columns: Vec<Column>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    pub name: String,
    pub type_oid: u32,
}

impl<'a> Message<'a> {
    pub fn parse(message: &'a [u8]) -> Result<Message<'a>, Malformed> {
        let mut rest = Cursor { bytes: message, what: "a message of pgoutput" };
        let parsed = match rest.u8()? {
            b'I' => {
                let relation = rest.u32()?;
                if rest.u8()? != b'N' {
                    return Err(Malformed("an insert of pgoutput"));
                }
                let count = rest.u16()?;
                let tuple = Tuple { count, bytes: rest.bytes };
                tuple.check()?;
                return Ok(Message::Insert { relation, tuple });
            }
            b'B' => {
                let commit = Lsn(rest.u64()?);
                let micros = rest.u64()?.cast_signed();
                Message::Begin { commit, micros, xid: rest.u32()? }
            }
            b'C' => {
                rest.take(1 + 8)?;
                let end = Lsn(rest.u64()?);
                rest.take(8)?;
                Message::Commit { end }
            }
            b'R' => {
                let id = rest.u32()?;
                let (schema, name) = (rest.text()?.to_owned(), rest.text()?.to_owned());
                rest.take(1)?;
                let count = rest.u16()?;
                let mut columns = Vec::with_capacity(usize::from(count).min(1664));
                for _ in 0..count {
                    rest.take(1)?;
                    let name = rest.text()?.to_owned();
                    columns.push(Column { name, type_oid: rest.u32()? });
                    rest.take(4)?;
                }
                Message::Relation(Relation { id, schema, name, columns })
            }
            b'M' => {
                let transactional = rest.u8()? & 1 != 0;
                let at = Lsn(rest.u64()?);
                let prefix = rest.text()?;
                let bytes = rest.u32()?;
                Message::Logical { transactional, at, prefix, content: rest.take(bytes as usize)? }
            }
            // Type, Origin, Update, Delete, Truncate: nothing is read of them.
            b'Y' | b'O' | b'U' | b'D' | b'T' => return Ok(Message::Other),
            _ => return Err(Malformed("a message of pgoutput")),
        };
        if rest.bytes.is_empty() {
            Ok(parsed)
        } else {
            Err(Malformed("a message of pgoutput of this length"))
        }
    }
}

/// A value as it came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cell<'a> {
    Null,
    /// By its type's output function.
    Text(&'a [u8]),
    /// By its type's send function, where binary was asked for and the type has one.
    Binary(&'a [u8]),
}

/// The values of a row, in the order of its relation's columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tuple<'a> {
    count: u16,
    bytes: &'a [u8],
}

impl<'a> Tuple<'a> {
    fn check(self) -> Result<(), Malformed> {
        let mut cells = self.cells();
        for cell in cells.by_ref() {
            cell?;
        }
        if cells.rest.bytes.is_empty() { Ok(()) } else { Err(Malformed("a row of this length")) }
    }

    /// Its values. Errors can only come of a tuple that was not checked: the head of a
    /// frame that is not whole.
    pub fn cells(self) -> Cells<'a> {
        Cells { left: self.count, rest: Cursor { bytes: self.bytes, what: "a row of pgoutput" } }
    }

    /// The prefix of a logical message by the first part of its frame.
    pub fn prefix_of_head(frame: &[u8]) -> Option<&str> {
        let Ok(Frame::Data([b'M', rest @ ..])) = Frame::parse(frame) else { return None };
        let mut rest = Cursor { bytes: rest, what: "a logical message" };
        rest.take(1 + 8).ok()?;
        rest.text().ok()
    }

    /// The row in the first part of an insert whose rest was not read: its values end with an error
    /// where the part ends.
    pub fn of_head(frame: &'a [u8]) -> Result<(u32, Tuple<'a>), Malformed> {
        let Frame::Data(message) = Frame::parse(frame)? else {
            return Err(Malformed("an insert of pgoutput"));
        };
        let mut rest = Cursor { bytes: message, what: "an insert of pgoutput" };
        if rest.u8()? != b'I' {
            return Err(Malformed("an insert of pgoutput"));
        }
        let relation = rest.u32()?;
        rest.take(1)?;
        let count = rest.u16()?;
        Ok((relation, Tuple { count, bytes: rest.bytes }))
    }
}

#[derive(Debug)]
pub struct Cells<'a> {
    left: u16,
    rest: Cursor<'a>,
}

impl<'a> Iterator for Cells<'a> {
    type Item = Result<Cell<'a>, Malformed>;

    fn next(&mut self) -> Option<Self::Item> {
        self.left = self.left.checked_sub(1)?;
        let cell = self.rest.cell();
        if cell.is_err() {
            self.left = 0;
        }
        Some(cell)
    }
}

/// Reads from the front.
#[derive(Clone, Copy, Debug)]
struct Cursor<'a> {
    bytes: &'a [u8],
    what: &'static str,
}

impl<'a> Cursor<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let (taken, rest) = self.bytes.split_at_checked(count).ok_or(Malformed(self.what))?;
        self.bytes = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], Malformed> {
        let (taken, rest) = self.bytes.split_first_chunk().ok_or(Malformed(self.what))?;
        self.bytes = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, Malformed> {
        Ok(u8::from_be_bytes(self.array()?))
    }

    fn u16(&mut self) -> Result<u16, Malformed> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    fn u32(&mut self) -> Result<u32, Malformed> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    fn u64(&mut self) -> Result<u64, Malformed> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    /// Text up to a zero byte.
    fn text(&mut self) -> Result<&'a str, Malformed> {
        let end = self.bytes.iter().position(|byte| *byte == 0).ok_or(Malformed(self.what))?;
        let text = str::from_utf8(self.take(end)?).map_err(|_| Malformed(self.what))?;
        self.take(1)?;
        Ok(text)
    }

    fn cell(&mut self) -> Result<Cell<'a>, Malformed> {
        let kind = self.u8()?;
        if kind == b'n' {
            return Ok(Cell::Null);
        }
        let bytes = self.u32()?;
        let value = self.take(bytes as usize)?;
        match kind {
            b't' => Ok(Cell::Text(value)),
            b'b' => Ok(Cell::Binary(value)),
            // An unchanged TOAST value is in updates only.
            _ => Err(Malformed(self.what)),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn text(out: &mut Vec<u8>, text: &str) {
        out.extend_from_slice(text.as_bytes());
        out.push(0);
    }

    /// A value of the odd columns comes as text.
    fn insert(relation: u32, cells: &[Option<Vec<u8>>]) -> Vec<u8> {
        let mut out = vec![b'I'];
        out.extend(relation.to_be_bytes());
        out.push(b'N');
        out.extend(u16::try_from(cells.len()).unwrap().to_be_bytes());
        for (index, cell) in cells.iter().enumerate() {
            match cell {
                None => out.push(b'n'),
                Some(value) => {
                    out.push(if index % 2 == 1 { b't' } else { b'b' });
                    out.extend(u32::try_from(value.len()).unwrap().to_be_bytes());
                    out.extend_from_slice(value);
                }
            }
        }
        out
    }

    fn relation(columns: &[(&str, u32)]) -> Vec<u8> {
        let mut out = vec![b'R'];
        out.extend(7_u32.to_be_bytes());
        text(&mut out, "public");
        text(&mut out, "outbox");
        out.push(b'd');
        out.extend(u16::try_from(columns.len()).unwrap().to_be_bytes());
        for (name, oid) in columns {
            out.push(0);
            text(&mut out, name);
            out.extend(oid.to_be_bytes());
            out.extend((-1_i32).to_be_bytes());
        }
        out
    }

    fn logical() -> Vec<u8> {
        let mut out = vec![b'M', 1];
        out.extend(9_u64.to_be_bytes());
        text(&mut out, "outbox");
        out.extend(2_u32.to_be_bytes());
        out.extend(b"{}");
        out
    }

    fn begin() -> Vec<u8> {
        let mut out = vec![b'B'];
        out.extend(0x1_0000_0002_u64.to_be_bytes());
        out.extend(0_u64.to_be_bytes());
        out.extend(77_u32.to_be_bytes());
        out
    }

    fn commit() -> Vec<u8> {
        let mut out = vec![b'C', 0];
        for n in [1_u64, 0x1_0000_0010, 3] {
            out.extend(n.to_be_bytes());
        }
        out
    }

    #[test]
    fn messages_are_what_the_server_said() {
        assert_eq!(
            Message::parse(&begin()),
            Ok(Message::Begin { commit: Lsn(0x1_0000_0002), micros: 0, xid: 77 })
        );
        assert_eq!(Message::parse(&commit()), Ok(Message::Commit { end: Lsn(0x1_0000_0010) }));
        let columns = [("seq", 20), ("payload", 17)];
        let expected = columns.map(|(name, type_oid)| Column { name: name.to_owned(), type_oid });
        let Ok(Message::Relation(found)) = Message::parse(&relation(&columns)) else { panic!() };
        assert_eq!((found.id, found.schema.as_str(), found.name.as_str()), (7, "public", "outbox"));
        assert_eq!(found.columns, expected);
        let whole = logical();
        let expected = Message::Logical { transactional: true, at: Lsn(9), prefix: "outbox", content: b"{}" };
        assert_eq!(Message::parse(&whole), Ok(expected));
    }

    #[test]
    fn a_status_update_has_its_three_places_and_its_time() {
        let message = status_update(Lsn(5), 6, true);
        assert_eq!((message[0], message[33]), (b'r', 1));
        assert_eq!(message[17..25], 5_u64.to_be_bytes());
        assert_eq!(message[25..33], 6_i64.to_be_bytes());
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in "[IBCRMYwk]") {
            let mut message = kind.into_bytes();
            message.extend(bytes);
            let _ = Message::parse(&message);
            let _ = Frame::parse(&message);
            if let Ok((_, tuple)) = Tuple::of_head(&message) {
                tuple.cells().for_each(drop);
            }
        }

        #[test]
        fn rows_come_back_and_one_cut_anywhere_is_an_error(
            cells in proptest::collection::vec(proptest::option::of(proptest::collection::vec(any::<u8>(), 0..40)), 0..8),
            cut in any::<proptest::sample::Index>(),
        ) {
            let whole = insert(3, &cells);
            let Ok(Message::Insert { relation: 3, tuple }) = Message::parse(&whole) else { panic!() };
            let back: Vec<Cell<'_>> = tuple.cells().map(Result::unwrap).collect();
            let expected = cells.iter().enumerate().map(|(index, cell)| match cell {
                None => Cell::Null,
                Some(value) if index % 2 == 1 => Cell::Text(value),
                Some(value) => Cell::Binary(value),
            });
            prop_assert_eq!(back, expected.collect::<Vec<_>>());
            prop_assert!(Message::parse(&whole[..cut.index(whole.len())]).is_err());
            let mut longer = whole.clone();
            longer.push(0);
            prop_assert!(Message::parse(&longer).is_err());
        }

        #[test]
        fn every_other_message_cut_anywhere_is_an_error(cut in any::<proptest::sample::Index>()) {
            for whole in [begin(), commit(), relation(&[("a", 1), ("b", 2)]), logical()] {
                prop_assert!(Message::parse(&whole).is_ok());
                prop_assert!(Message::parse(&whole[..cut.index(whole.len())]).is_err());
            }
        }

        #[test]
        fn the_head_of_a_row_gives_the_values_that_are_whole(split in any::<proptest::sample::Index>()) {
            let mut frame = vec![b'w'];
            frame.extend([0; 24]);
            frame.extend(insert(3, &[Some(b"12".to_vec()), None, Some(vec![b'x'; 50])]));
            let head = &frame[..split.index(frame.len())];
            if let Ok((relation, tuple)) = Tuple::of_head(head) {
                prop_assert_eq!(relation, 3);
                let whole: Vec<_> = tuple.cells().map_while(Result::ok).collect();
                prop_assert!(whole.len() < 3);
                if let Some(first) = whole.first() {
                    prop_assert_eq!(*first, Cell::Binary(b"12"));
                }
            }
        }
    }
}
