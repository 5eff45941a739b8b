//! What the binlog says, event by event. Pure; what is lent is lent from the packet.
//!
//! The format is from the MySQL documentation ("Replication Protocol: Binlog Event") and MariaDB's
//! ("Replication Protocol", "2-Binlog Event Header").

use mysql_common::{
    binlog::{BinlogCtx, consts::BinlogVersion, events::FormatDescriptionEvent, events::GtidEvent},
    io::ParseBuf,
    proto::MyDeserialize,
};

use super::map::TableMap;
use crate::source::log::gtids::Gtid;

/// What cannot be read, and what of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub &'static str);

pub const HEADER: usize = 19;
const CHECKSUM: usize = 4;

/// An event's kinds, by their numbers.
pub mod kind {
    pub const QUERY: u8 = 2;
    pub const ROTATE: u8 = 4;
    pub const FORMAT_DESCRIPTION: u8 = 15;
    pub const XID: u8 = 16;
    pub const TABLE_MAP: u8 = 19;
    pub const WRITE_ROWS_V1: u8 = 23;
    pub const INCIDENT: u8 = 26;
    pub const HEARTBEAT: u8 = 27;
    pub const WRITE_ROWS: u8 = 30;
    pub const GTID: u8 = 33;
    pub const ANONYMOUS_GTID: u8 = 34;
    pub const XA_PREPARE: u8 = 38;
    pub const TRANSACTION_PAYLOAD: u8 = 40;
    pub const GTID_TAGGED: u8 = 42;
    pub const MARIADB_GTID: u8 = 162;
    pub const QUERY_COMPRESSED: u8 = 165;
    pub const WRITE_ROWS_COMPRESSED_V1: u8 = 166;
    pub const WRITE_ROWS_COMPRESSED: u8 = 169;

    /// Those that say nothing of what a transaction inserts: stop, changes and deletions of rows (of all
    /// versions), what may be ignored, the statement that made the rows, and what only replicas use.
    pub const SILENT: [u8; 19] =
        [3, 24, 25, 28, 29, 31, 32, 35, 36, 37, 39, 41, 160, 161, 163, 167, 168, 170, 171];
}

/// The head of an event, which is there when the event itself was too long to be kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// When it was made, in seconds since 1970; of one that is in no file, 0.
    pub seconds: u32,
    pub kind: u8,
    /// Who made it; of one that is in no file, who sends it.
    pub server: u32,
    /// Where it ends in its file, by the lower half of that number.
    pub end: u32,
    /// Whoever does not know its kind may pass it by.
    pub may_be_ignored: bool,
}

impl Header {
    pub fn parse(bytes: &[u8]) -> Result<(Header, &[u8]), Malformed> {
        let (head, rest) = bytes.split_first_chunk::<HEADER>().ok_or(Malformed("an event without a head"))?;
        let number = |at: usize| u32::from_le_bytes([head[at], head[at + 1], head[at + 2], head[at + 3]]);
        let header = Header {
            seconds: number(0),
            kind: head[4],
            server: number(5),
            end: number(13),
            may_be_ignored: head[17] & 0x80 != 0,
        };
        Ok((header, rest))
    }
}

#[derive(Debug)]
pub enum Body<'a> {
    /// The events from here on have a checksum, or have none.
    Format {
        checksum: bool,
    },
    /// The next event is in this file.
    Rotate {
        file: &'a str,
        at: u64,
    },
    Heartbeat,
    /// A transaction begins, or something that is one by itself.
    Gtid(Option<Gtid>),
    MariadbGtid {
        domain: u32,
        number: u64,
        alone: bool,
        prepared: bool,
    },
    /// A statement.
    Query(&'a [u8]),
    /// The transaction has committed.
    Commit,
    /// It has been prepared, and commits or not later.
    Prepared,
    TableMap(TableMap<'a>),
    Insert(Insert<'a>),
    /// A compressed transaction.
    Payload(&'a [u8]),
    /// The server says that something is missing here.
    Incident,
    Silent,
    /// Of a kind that may have inserted anything: a statement instead of rows, or something unknown.
    Opaque,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Insert<'a> {
    pub table: u64,
    pub compressed: bool,
    /// From the number of columns on.
    pub rest: &'a [u8],
}

/// Takes an event apart, and checks its sum where it has one.
pub fn parse(bytes: &[u8], checksum: bool) -> Result<(Header, Body<'_>), Malformed> {
    let (header, rest) = Header::parse(bytes)?;
    let is_format = header.kind == kind::FORMAT_DESCRIPTION;
    let rest = match (rest.len().checked_sub(CHECKSUM), is_format || checksum) {
        (Some(length), true) => {
            let (rest, sum) = rest.split_at(length);
            // This one has room for it, also where there are none.
            let has_sum = !is_format || rest.last() == Some(&1);
            if has_sum && crc32(&bytes[..HEADER + length]).to_le_bytes() != sum {
                return Err(Malformed("an event whose checksum is wrong"));
            }
            rest
        }
        (None, true) => return Err(Malformed("an event without its checksum")),
        (_, false) => rest,
    };
    Ok((header, body(&header, bytes.len(), rest)?))
}

pub fn crc32(bytes: &[u8]) -> u32 {
    let mut crc = flate2::Crc::new();
    crc.update(bytes);
    crc.sum()
}

fn body<'a>(header: &Header, length: usize, rest: &'a [u8]) -> Result<Body<'a>, Malformed> {
    Ok(match header.kind {
        kind::FORMAT_DESCRIPTION => {
            if rest.first_chunk() != Some(&4_u16.to_le_bytes()) {
                return Err(Malformed("a binlog of another version"));
            }
            Body::Format { checksum: rest.last() == Some(&1) }
        }
        kind::ROTATE => {
            let (at, file) = rest.split_first_chunk().ok_or(Malformed("no place of the next file"))?;
            let file = str::from_utf8(file).map_err(|_| Malformed("no name of the next file"))?;
            Body::Rotate { file, at: u64::from_le_bytes(*at) }
        }
        kind::HEARTBEAT => Body::Heartbeat,
        kind::GTID => Body::Gtid(Some(gtid(rest)?)),
        kind::GTID_TAGGED => Body::Gtid(Some(tagged(length, rest)?)),
        kind::ANONYMOUS_GTID => Body::Gtid(None),
        kind::MARIADB_GTID => {
            let head = rest.get(..13).ok_or(Malformed("an unreadable GTID"))?;
            let (number, domain, flags) = (little(&head[..8]), little(&head[8..12]) as u32, head[12]);
            Body::MariadbGtid { domain, number, alone: flags & 1 != 0, prepared: flags & 64 != 0 }
        }
        kind::QUERY => Body::Query(query(rest)?),
        kind::XID => Body::Commit,
        // It commits at once where its first byte says so.
        kind::XA_PREPARE if rest.first() == Some(&1) => Body::Commit,
        kind::XA_PREPARE => Body::Prepared,
        kind::TABLE_MAP => Body::TableMap(TableMap::parse(rest)?),
        kind::WRITE_ROWS_V1 | kind::WRITE_ROWS_COMPRESSED_V1 => {
            let (table, rest) = table_id(rest)?;
            let rest = rest.get(2..).ok_or(CUT_SHORT)?;
            Body::Insert(Insert { table, compressed: header.kind == kind::WRITE_ROWS_COMPRESSED_V1, rest })
        }
        kind::WRITE_ROWS | kind::WRITE_ROWS_COMPRESSED => {
            let (table, rest) = table_id(rest)?;
            // Flags, and more that has its own length in front.
            let more = rest.get(2..4).ok_or(CUT_SHORT)?;
            let more = usize::from(u16::from_le_bytes([more[0], more[1]]));
            let rest = rest.get(2 + more.max(2)..).ok_or(CUT_SHORT)?;
            Body::Insert(Insert { table, compressed: header.kind == kind::WRITE_ROWS_COMPRESSED, rest })
        }
        kind::TRANSACTION_PAYLOAD => Body::Payload(rest),
        kind::INCIDENT => Body::Incident,
        other if header.may_be_ignored || kind::SILENT.contains(&other) => Body::Silent,
        _ => Body::Opaque,
    })
}

const CUT_SHORT: Malformed = Malformed("rows that are cut short");

/// The number of a table, six bytes.
pub fn table_id(bytes: &[u8]) -> Result<(u64, &[u8]), Malformed> {
    let (id, rest) = bytes.split_first_chunk::<6>().ok_or(Malformed("no number of a table"))?;
    Ok((u64::from_le_bytes([id[0], id[1], id[2], id[3], id[4], id[5], 0, 0]), rest))
}

fn gtid(rest: &[u8]) -> Result<Gtid, Malformed> {
    let wrong = Malformed("an unreadable GTID");
    let (sid, rest) = rest.get(1..).and_then(|rest| rest.split_first_chunk::<16>()).ok_or(wrong)?;
    let (number, _) = rest.split_first_chunk().ok_or(wrong)?;
    let source = uuid::Uuid::from_bytes(*sid).hyphenated().to_string();
    Ok(Gtid { source: source.into(), number: u64::from_le_bytes(*number) })
}

/// These are in a form of their own, and the library knows it.
fn tagged(length: usize, rest: &[u8]) -> Result<Gtid, Malformed> {
    let format = FormatDescriptionEvent::new(BinlogVersion::Version4);
    let context = BinlogCtx::new(length, &format, kind::GTID_TAGGED);
    let event = GtidEvent::deserialize(context, &mut ParseBuf(rest));
    let event = event.map_err(|_| Malformed("an unreadable GTID with a tag"))?;
    let mut source = uuid::Uuid::from_bytes(event.sid()).hyphenated().to_string();
    if let Some(tag) = event.tag().filter(|tag| !tag.as_str().is_empty()) {
        source = format!("{source}:{}", tag.as_str());
    }
    Ok(Gtid { source: source.into(), number: event.gno() })
}

/// The text of a statement, which is behind a head of 13 bytes, variables, and the name of the database.
fn query(rest: &[u8]) -> Result<&[u8], Malformed> {
    let wrong = Malformed("an unreadable statement");
    let (head, rest) = rest.split_first_chunk::<13>().ok_or(wrong)?;
    let variables = usize::from(u16::from_le_bytes([head[11], head[12]]));
    rest.get(variables + usize::from(head[8]) + 1..).ok_or(wrong)
}

/// A number that has its length in front. (MySQL documentation: "Length-Encoded Integer Type".)
pub fn packed(bytes: &[u8]) -> Result<(u64, &[u8]), Malformed> {
    let wrong = Malformed("an unreadable number");
    let (first, rest) = bytes.split_first().ok_or(wrong)?;
    let width = match first {
        0..=0xfa => return Ok((u64::from(*first), rest)),
        0xfc => 2,
        0xfd => 3,
        0xfe => 8,
        _ => return Err(wrong),
    };
    let (number, rest) = rest.split_at_checked(width).ok_or(wrong)?;
    Ok((little(number), rest))
}

/// The lowest byte first.
pub fn little(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

/// The highest byte first.
pub fn big(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |number, byte| number << 8 | u64::from(*byte))
}

#[cfg(test)]
pub mod tests {
    use proptest::prelude::*;

    use super::*;

    /// An event as a server makes it, with its checksum.
    pub fn event(kind: u8, end: u32, body: &[u8]) -> Vec<u8> {
        let mut bytes = vec![1, 0, 0, 0, kind, 0, 0, 0, 0, 0, 0, 0, 0];
        bytes.extend_from_slice(&end.to_le_bytes());
        bytes.extend_from_slice(&[0, 0]);
        bytes.extend_from_slice(body);
        bytes.extend_from_slice(&crc32(&bytes).to_le_bytes());
        bytes
    }

    pub fn query_body(text: &str) -> Vec<u8> {
        [&[0; 8][..], &[1, 0, 0, 0, 0], b"d\0", text.as_bytes()].concat()
    }

    #[test]
    fn an_event_is_taken_apart_if_its_sum_is_right() {
        let good = event(kind::ROTATE, 9, b"\x04\0\0\0\0\0\0\0binlog.000002");
        let (header, body) = parse(&good, true).unwrap();
        assert_eq!((header.seconds, header.end), (1, 9));
        assert!(matches!(body, Body::Rotate { file: "binlog.000002", at: 4 }));
        for index in 0..good.len() {
            let mut bad = good.clone();
            bad[index] ^= 4;
            assert_eq!(parse(&bad, true).unwrap_err(), Malformed("an event whose checksum is wrong"));
        }
        let (_, without) = parse(&good[..good.len() - 4], false).unwrap();
        assert!(matches!(without, Body::Rotate { file: "binlog.000002", .. }));
        let statement = event(kind::QUERY, 9, &query_body("BEGIN"));
        assert!(matches!(parse(&statement, true), Ok((_, Body::Query(b"BEGIN")))));
        assert!(matches!(parse(&event(200, 9, b""), true), Ok((_, Body::Opaque))));
        assert!(matches!(parse(&event(29, 9, b""), true), Ok((_, Body::Silent))));
    }

    #[test]
    fn gtids_are_told_with_and_without_a_tag() {
        let sid: Vec<u8> = (1..17).collect();
        let plain = event(kind::GTID, 9, &[&[0][..], &sid, &7_u64.to_le_bytes(), &[0; 20]].concat());
        let Ok((_, Body::Gtid(Some(gtid)))) = parse(&plain, true) else { panic!() };
        assert_eq!((&*gtid.source, gtid.number), ("01020304-0506-0708-090a-0b0c0d0e0f10", 7));
        let tag = mysql_common::packets::Tag::new("blue").unwrap();
        let tagged = GtidEvent::new_tagged(sid.try_into().unwrap(), tag, 300);
        let mut body = Vec::new();
        mysql_common::proto::MySerialize::serialize(&tagged, &mut body);
        let tagged = event(kind::GTID_TAGGED, 9, &body);
        let Ok((_, Body::Gtid(Some(gtid)))) = parse(&tagged, true) else { panic!() };
        assert_eq!((&*gtid.source, gtid.number), ("01020304-0506-0708-090a-0b0c0d0e0f10:blue", 300));
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..200), kind in any::<u8>()) {
            let _ = parse(&bytes, false);
            let _ = parse(&event(kind, 1, &bytes), true);
        }

        #[test]
        fn numbers_are_read_as_they_were_written(number in any::<u64>()) {
            let bytes = match number {
                0..=0xfa => vec![number as u8],
                0xfb..=0xffff => [&[0xfc][..], &number.to_le_bytes()[..2]].concat(),
                0x1_0000..=0xff_ffff => [&[0xfd][..], &number.to_le_bytes()[..3]].concat(),
                _ => [&[0xfe][..], &number.to_le_bytes()].concat(),
            };
            prop_assert_eq!(packed(&bytes), Ok((number, &[][..])));
        }
    }
}
