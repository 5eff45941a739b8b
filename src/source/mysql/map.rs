//! Table maps: before its rows, the log tells of a table how its columns are written. And how long each
//! value is, so that one that nobody wants can be passed by.

use super::event::{Malformed, big, little, packed, table_id};

/// Types of columns as the log has them.
pub mod code {
    pub const TINY: u8 = 1;
    pub const SHORT: u8 = 2;
    pub const LONG: u8 = 3;
    pub const FLOAT: u8 = 4;
    pub const DOUBLE: u8 = 5;
    pub const TIMESTAMP: u8 = 7;
    pub const LONGLONG: u8 = 8;
    pub const INT24: u8 = 9;
    pub const DATE: u8 = 10;
    pub const TIME: u8 = 11;
    pub const DATETIME: u8 = 12;
    pub const YEAR: u8 = 13;
    pub const VARCHAR: u8 = 15;
    pub const BIT: u8 = 16;
    pub const TIMESTAMP2: u8 = 17;
    pub const DATETIME2: u8 = 18;
    pub const TIME2: u8 = 19;
    /// MariaDB's compressed columns.
    pub const BLOB_COMPRESSED: u8 = 140;
    pub const VARCHAR_COMPRESSED: u8 = 141;
    pub const VECTOR: u8 = 242;
    pub const JSON: u8 = 245;
    pub const NEWDECIMAL: u8 = 246;
    pub const ENUM: u8 = 247;
    pub const SET: u8 = 248;
    pub const BLOB: u8 = 252;
    pub const STRING: u8 = 254;
    pub const GEOMETRY: u8 = 255;
}

/// A column's type, and what it has besides: its length, its digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Written {
    pub code: u8,
    pub meta: [u8; 2],
}

#[derive(Debug, PartialEq, Eq)]
pub struct TableMap<'a> {
    pub id: u64,
    pub database: &'a [u8],
    pub table: &'a [u8],
    /// `None`: one of the columns is written in a way that is not known.
    pub columns: Option<Vec<Written>>,
    /// With `binlog_row_metadata = FULL`.
    pub names: Option<Vec<&'a [u8]>>,
}

impl<'a> TableMap<'a> {
    pub fn parse(bytes: &'a [u8]) -> Result<TableMap<'a>, Malformed> {
        let wrong = Malformed("an unreadable map of a table");
        let (id, rest) = table_id(bytes)?;
        let rest = rest.get(2..).ok_or(wrong)?;
        let text = |bytes: &'a [u8]| {
            let (length, rest) = bytes.split_first()?;
            let (text, rest) = rest.split_at_checked(usize::from(*length))?;
            Some((text, rest.get(1..)?))
        };
        let (database, rest) = text(rest).ok_or(wrong)?;
        let (table, rest) = text(rest).ok_or(wrong)?;
        let (count, rest) = packed(rest)?;
        let count = usize::try_from(count).map_err(|_| wrong)?;
        let (codes, rest) = rest.split_at_checked(count).ok_or(wrong)?;
        let (length, rest) = packed(rest)?;
        let length = usize::try_from(length).map_err(|_| wrong)?;
        let (metas, rest) = rest.split_at_checked(length).ok_or(wrong)?;
        let more = rest.get(count.div_ceil(8)..).ok_or(wrong)?;
        let names = names(more)?.filter(|names| names.len() == count);
        Ok(TableMap { id, database, table, columns: written(codes, metas), names })
    }
}

fn written(codes: &[u8], mut metas: &[u8]) -> Option<Vec<Written>> {
    let mut columns = Vec::with_capacity(codes.len());
    for code in codes {
        let width = match *code {
            code::FLOAT
            | code::DOUBLE
            | code::TIMESTAMP2
            | code::DATETIME2
            | code::TIME2
            | code::BLOB_COMPRESSED
            | code::VECTOR
            | code::JSON
            | code::BLOB
            | code::GEOMETRY => 1,
            code::VARCHAR | code::BIT | code::VARCHAR_COMPRESSED | code::NEWDECIMAL | code::STRING => 2,
            code::TINY
            | code::SHORT
            | code::LONG
            | code::TIMESTAMP
            | code::LONGLONG
            | code::INT24
            | code::DATE
            | code::TIME
            | code::DATETIME
            | code::YEAR => 0,
            _ => return None,
        };
        let (meta, rest) = metas.split_at_checked(width)?;
        metas = rest;
        columns.push(Written {
            code: *code,
            meta: [meta.first().copied().unwrap_or(0), meta.get(1).copied().unwrap_or(0)],
        });
    }
    Some(columns)
}

/// Among what may follow: a type, a length, and content; the names of the columns are of type 4.
fn names(mut rest: &[u8]) -> Result<Option<Vec<&[u8]>>, Malformed> {
    let wrong = Malformed("unreadable names of columns");
    while let Some((field, after)) = rest.split_first() {
        let (length, after) = packed(after)?;
        let (mut content, after) =
            after.split_at_checked(usize::try_from(length).map_err(|_| wrong)?).ok_or(wrong)?;
        rest = after;
        if *field != 4 {
            continue;
        }
        let mut names = Vec::new();
        while !content.is_empty() {
            let (length, after) = packed(content)?;
            let (name, after) =
                after.split_at_checked(usize::try_from(length).map_err(|_| wrong)?).ok_or(wrong)?;
            names.push(name);
            content = after;
        }
        return Ok(Some(names));
    }
    Ok(None)
}

impl Written {
    /// What a CHAR, an ENUM or a SET is: the first two share their code with it.
    pub fn of_string(self) -> u8 {
        match self.meta[0] {
            code::ENUM | code::SET => self.meta[0],
            _ => code::STRING,
        }
    }

    /// The value at the beginning, without what tells its length; and what follows it.
    pub fn value(self, bytes: &[u8]) -> Option<(&[u8], &[u8])> {
        let [first, second] = self.meta;
        let fraction = usize::from(first).div_ceil(2);
        let after = |prefix: usize| {
            let (length, rest) = bytes.split_at_checked(prefix)?;
            rest.split_at_checked(usize::try_from(little(length)).ok()?)
        };
        let length = match self.code {
            code::TINY | code::YEAR => 1,
            code::SHORT => 2,
            code::INT24 | code::DATE | code::TIME => 3,
            code::LONG | code::FLOAT | code::TIMESTAMP => 4,
            code::LONGLONG | code::DOUBLE | code::DATETIME => 8,
            code::TIMESTAMP2 => 4 + fraction,
            code::DATETIME2 => 5 + fraction,
            code::TIME2 => 3 + fraction,
            code::NEWDECIMAL => super::number::decimal_length(first, second)?,
            code::BIT => (usize::from(first) + 8 * usize::from(second)).div_ceil(8),
            code::STRING if self.of_string() != code::STRING => usize::from(second),
            code::STRING => {
                // Two bits of a length above 255 are, inverted, in what tells the type.
                let longest = usize::from((first & 0x30) ^ 0x30) << 4 | usize::from(second);
                return after(if longest > 255 { 2 } else { 1 });
            }
            code::VARCHAR | code::VARCHAR_COMPRESSED => {
                return after(if u16::from_le_bytes(self.meta) > 255 { 2 } else { 1 });
            }
            code::BLOB | code::BLOB_COMPRESSED | code::GEOMETRY | code::JSON | code::VECTOR => {
                return after(usize::from(first.min(4)));
            }
            _ => return None,
        };
        bytes.split_at_checked(length)
    }
}

/// The columns that rows have: one bit for each column of the table.
pub fn has_bit(bits: &[u8], index: usize) -> bool {
    bits.get(index / 8).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
}

/// Digits after the point of a second, as microseconds.
pub fn fraction(bytes: &[u8]) -> u32 {
    let number = big(bytes) as u32;
    match bytes.len() {
        1 => number * 10_000,
        2 => number * 100,
        _ => number,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_map_tells_its_columns_and_their_names() {
        let bytes = [
            &[7, 0, 0, 0, 0, 1, 1, 0][..],
            b"\x04shop\0\x06outbox\0",
            &[4, code::LONGLONG, code::VARCHAR, code::STRING, code::BLOB],
            &[5, 0, 1, 0xee, 0xfc, 3, 0b1110],
            &[1, 1, 0x80],
            &[4, 9, 2, b'i', b'd', 1, b'k', 1, b'c', 1, b'p'],
        ]
        .concat();
        let map = TableMap::parse(&bytes).unwrap();
        assert_eq!((map.id, map.database, map.table), (1 << 40 | 7, &b"shop"[..], &b"outbox"[..]));
        assert_eq!(map.names, Some(vec![&b"id"[..], b"k", b"c", b"p"]));
        let columns = map.columns.unwrap();
        assert_eq!(columns[3], Written { code: code::BLOB, meta: [3, 0] });
        assert_eq!(columns[1].value(&[2, 0, 8, 9, 10]), Some((&[8, 9][..], &[10][..])));
        // CHAR(127) of four bytes each: 508 = 1 << 8 | 0xfc, so that the length of a value has two bytes.
        assert_eq!(columns[2].value(&[1, 0, 8]), Some((&[8][..], &[][..])));
        let short = Written { code: code::STRING, meta: [0xfe, 0xfc] };
        assert_eq!(short.value(&[1, 8]), Some((&[8][..], &[][..])));
        for end in 0..bytes.len() {
            let _ = TableMap::parse(&bytes[..end]);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_taken_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..120), code in any::<u8>(), meta in any::<[u8; 2]>()) {
            let _ = TableMap::parse(&bytes);
            if let Some((value, rest)) = (Written { code, meta }).value(&bytes) {
                prop_assert!(value.len() + rest.len() <= bytes.len());
            }
        }
    }
}
