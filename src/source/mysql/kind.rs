//! How a column's type is written in the log, and what its values are as text.

use super::map::code;
use crate::source::database::Column;

/// How values of a column are written as text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// As they are.
    Plain,
    /// Bytes of a fixed number; the log leaves zeros at the end out.
    Padded(usize),
    Latin1,
    Int {
        unsigned: bool,
        /// With zeros in front.
        digits: usize,
    },
    /// With so many digits behind the point, or as many as it has.
    Float(Option<usize>),
    Double(Option<usize>),
    Decimal,
    Date,
    Time,
    DateTime,
    Timestamp,
    Year,
    Bits,
    Enum(Vec<String>),
    Set(Vec<String>),
    Json,
}

/// The names between the brackets of an ENUM or a SET. `None` where one has a sign that may mean another.
fn labels(column_type: &str) -> Option<Vec<String>> {
    let list = column_type.split_once('(')?.1.strip_suffix(')')?;
    let (mut labels, mut rest) = (Vec::new(), list);
    loop {
        rest = rest.trim_start_matches(',').strip_prefix('\'')?;
        let mut label = String::new();
        loop {
            let (before, after) = rest.split_once('\'')?;
            label.push_str(before);
            rest = after;
            match rest.strip_prefix('\'') {
                Some(after) => {
                    label.push('\'');
                    rest = after;
                }
                None => break,
            }
        }
        if label.contains('\\') {
            return None;
        }
        labels.push(label);
        if rest.is_empty() {
            return Some(labels);
        }
    }
}

/// The numbers between the brackets of `decimal(10,2)`.
fn numbers(full: &str) -> impl Iterator<Item = usize> {
    let list = full.split_once('(').and_then(|(_, rest)| rest.split_once(')'));
    list.map_or("", |(list, _)| list).split(',').map_while(|number| number.trim().parse().ok())
}

impl Kind {
    /// How a column is written, and its codes in the log. `None`: nobody but the table can tell.
    pub fn of(column: &Column) -> Option<(Kind, u8)> {
        let full = column.full.as_str();
        let text = |code| match column.charset.as_deref() {
            Some("utf8mb4" | "utf8mb3" | "utf8" | "ascii") => Some((Kind::Plain, code)),
            Some("latin1") => Some((Kind::Latin1, code)),
            _ => None,
        };
        let int = |code| {
            let digits = if full.contains("zerofill") { numbers(full).next().unwrap_or(0) } else { 0 };
            Some((Kind::Int { unsigned: full.contains("unsigned"), digits }, code))
        };
        let point = || numbers(full).nth(1);
        match column.kind.as_str() {
            "binary" => Some((Kind::Padded(numbers(full).next()?), code::STRING)),
            "varbinary" => Some((Kind::Plain, code::VARCHAR)),
            "tinyblob" | "blob" | "mediumblob" | "longblob" => Some((Kind::Plain, code::BLOB)),
            "geometry" | "point" | "linestring" | "polygon" | "multipoint" | "multilinestring"
            | "multipolygon" | "geometrycollection" | "geomcollection" => Some((Kind::Plain, code::GEOMETRY)),
            "vector" => Some((Kind::Plain, code::VECTOR)),
            "char" => text(code::STRING),
            "varchar" => text(code::VARCHAR),
            "tinytext" | "text" | "mediumtext" | "longtext" => text(code::BLOB),
            "enum" => Some((Kind::Enum(labels(&column.written)?), code::ENUM)),
            "set" => Some((Kind::Set(labels(&column.written)?), code::SET)),
            "bit" => Some((Kind::Bits, code::BIT)),
            "json" => Some((Kind::Json, code::JSON)),
            "tinyint" => int(code::TINY),
            "smallint" => int(code::SHORT),
            "mediumint" => int(code::INT24),
            "int" => int(code::LONG),
            "bigint" => int(code::LONGLONG),
            "float" if !full.contains("zerofill") => Some((Kind::Float(point()), code::FLOAT)),
            "double" if !full.contains("zerofill") => Some((Kind::Double(point()), code::DOUBLE)),
            "decimal" if !full.contains("zerofill") => Some((Kind::Decimal, code::NEWDECIMAL)),
            "date" => Some((Kind::Date, code::DATE)),
            "time" => Some((Kind::Time, code::TIME2)),
            "datetime" => Some((Kind::DateTime, code::DATETIME2)),
            "timestamp" => Some((Kind::Timestamp, code::TIMESTAMP2)),
            "year" => Some((Kind::Year, code::YEAR)),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_an_enum_are_read_as_they_were_given() {
        let of = |text: &str| labels(text);
        assert_eq!(of("enum('a','it''s','','B,c')").unwrap(), ["a", "it's", "", "B,c"]);
        assert_eq!(of(r"set('a\b')"), None);
        assert_eq!(of("enum('a"), None);
        assert_eq!(of("int"), None);
        assert_eq!(numbers("decimal(10, 2) unsigned").collect::<Vec<_>>(), [10, 2]);
    }

    proptest! {
        #[test]
        fn any_text_of_a_type_is_taken_or_refused(text in ".{0,40}") {
            let _ = labels(&text);
            numbers(&text).for_each(drop);
        }
    }
}
