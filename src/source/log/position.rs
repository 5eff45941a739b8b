//! A place in a binlog that outlives the relay: from where it is to be read again. Only rows that do not stay in
//! their table need one.

use std::{collections::BTreeMap, fmt};

use super::{
    Unreadable,
    gtids::{Gtid, GtidSet},
};

/// How far a log was read, in the terms in which its server can be asked to go on from there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Position {
    /// MySQL: the transactions that are behind it.
    Gtids(GtidSet),
    /// MariaDB: of each domain the last transaction, by its server and its number.
    Domains(BTreeMap<u32, (u32, u64)>),
    /// Without GTIDs: a file of one server, and the bytes before it.
    File { name: Box<str>, at: u64 },
}

/// By what a transaction is told from others.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Identity {
    #[default]
    None,
    Gtid(Gtid),
    Domain {
        domain: u32,
        server: u32,
        number: u64,
    },
}

impl Position {
    /// As the relay's own table has it.
    pub fn kind(&self) -> &'static str {
        match self {
            Position::Gtids(_) => "gtids",
            Position::Domains(_) => "domains",
            Position::File { .. } => "file",
        }
    }

    pub fn parse(kind: &str, text: &str) -> Result<Position, Unreadable> {
        let wrong = || Unreadable("a position in the binlog");
        match kind {
            "gtids" => Ok(Position::Gtids(text.parse()?)),
            "domains" => {
                let mut domains = BTreeMap::new();
                for one in text.split(',').map(str::trim).filter(|one| !one.is_empty()) {
                    let mut parts = one.split('-');
                    let mut next = || parts.next().ok_or_else(wrong);
                    let domain = next()?.parse().map_err(|_| wrong())?;
                    let server = next()?.parse().map_err(|_| wrong())?;
                    let number = next()?.parse().map_err(|_| wrong())?;
                    if parts.next().is_some() {
                        return Err(wrong());
                    }
                    domains.insert(domain, (server, number));
                }
                Ok(Position::Domains(domains))
            }
            "file" => {
                let (name, at) = text.rsplit_once(':').ok_or_else(wrong)?;
                Ok(Position::File { name: name.into(), at: at.parse().map_err(|_| wrong())? })
            }
            _ => Err(wrong()),
        }
    }

    /// Whether everything that is behind another position is behind this one.
    pub fn covers(&self, other: &Position) -> bool {
        match (self, other) {
            (Position::Gtids(set), Position::Gtids(other)) => set.includes(other),
            (Position::Domains(domains), Position::Domains(other)) => {
                let covers = |(domain, (_, number)): (&u32, &(u32, u64))| {
                    domains.get(domain).is_some_and(|(_, come)| come >= number)
                };
                other.iter().all(covers)
            }
            (Position::File { name, at }, Position::File { name: other, at: end }) => {
                // Their numbers grow, and may grow longer.
                (name.len(), name, at) >= (other.len(), other, end)
            }
            _ => false,
        }
    }

    /// Nothing, in the same terms.
    pub fn nothing(&self) -> Position {
        match self {
            Position::Gtids(_) => Position::Gtids(GtidSet::default()),
            Position::Domains(_) => Position::Domains(BTreeMap::new()),
            Position::File { .. } => Position::File { name: "".into(), at: 0 },
        }
    }

    /// A transaction that ends at this place is behind it too.
    pub fn pass(&mut self, transaction: &Identity, file: &str, end: u64) {
        match (self, transaction) {
            (Position::Gtids(set), Identity::Gtid(gtid)) => set.add(gtid),
            (Position::Domains(domains), Identity::Domain { domain, server, number }) => {
                domains.insert(*domain, (*server, *number));
            }
            (Position::File { name, at }, _) => {
                if **name != *file {
                    *name = file.into();
                }
                *at = end;
            }
            (Position::Gtids(_) | Position::Domains(_), _) => {}
        }
    }

    /// What a later position has passed is behind it too.
    pub fn join(&mut self, later: &Position) {
        match (self, later) {
            (Position::Gtids(set), Position::Gtids(more)) => set.extend(more),
            (Position::Domains(domains), Position::Domains(more)) => domains.extend(more),
            (Position::File { name, at }, Position::File { name: to, at: end }) if !to.is_empty() => {
                (*name, *at) = (to.clone(), *end);
            }
            _ => {}
        }
    }
}

impl fmt::Display for Position {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Position::Gtids(set) => set.fmt(f),
            Position::Domains(domains) => {
                let one =
                    |(domain, (server, number)): (&u32, &(u32, u64))| format!("{domain}-{server}-{number}");
                f.write_str(&domains.iter().map(one).collect::<Vec<_>>().join(","))
            }
            Position::File { name, at } => write!(f, "{name}:{at}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const A: &str = "3e11fa47-71ca-11e1-9e33-c80aa9429562";

    fn of(kind: &str, text: &str) -> Position {
        Position::parse(kind, text).unwrap()
    }

    #[test]
    fn it_is_written_as_the_server_takes_it_and_comes_back() {
        for (kind, text) in [
            ("gtids", format!("{A}:1-5:7,{A}:blue:1-3")),
            ("domains", "0-1-100,7-2-3".into()),
            ("domains", String::new()),
            ("file", "binlog.000012:4567".into()),
        ] {
            let position = of(kind, &text);
            assert_eq!((position.kind(), position.to_string()), (kind, text));
        }
        for (kind, text) in [("domains", "0-1"), ("domains", "0-1-2-3"), ("file", "binlog"), ("slot", "")] {
            assert!(Position::parse(kind, text).is_err(), "{kind} {text}");
        }
    }

    #[test]
    fn each_kind_passes_a_transaction_by_its_own_terms() {
        let gtid = Identity::Gtid(Gtid { source: A.into(), number: 6 });
        let domain = Identity::Domain { domain: 7, server: 3, number: 4 };
        for (kind, before, after) in [
            ("gtids", format!("{A}:1-5:7"), format!("{A}:1-7")),
            ("domains", "0-1-100,7-2-3".into(), "0-1-100,7-3-4".into()),
            ("file", "binlog.000012:4567".into(), "binlog.000013:99".into()),
        ] {
            let (mut position, mut more) = (of(kind, &before), of(kind, &before).nothing());
            for one in [&gtid, &domain] {
                more.pass(one, "binlog.000013", 99);
            }
            position.join(&more);
            position.join(&position.nothing());
            assert_eq!(position, of(kind, &after));
        }
    }

    #[test]
    fn a_position_covers_what_is_behind_it() {
        for (kind, position, covered, not_covered) in [
            ("gtids", format!("{A}:1-5:7"), format!("{A}:2-5"), format!("{A}:6")),
            ("domains", "0-1-100,7-2-3".into(), "0-9-100".into(), "0-1-5,7-2-4".into()),
            ("domains", "0-1-100".into(), String::new(), "1-1-1".into()),
            ("file", "b.999999:5".into(), "b.999999:5".into(), "b.1000000:4".into()),
            ("file", "b.000002:4".into(), "b.000001:99".into(), "b.000002:5".into()),
        ] {
            let position = of(kind, &position);
            assert!(position.covers(&of(kind, &covered)), "{position} {covered}");
            assert!(!position.covers(&of(kind, &not_covered)), "{position} {not_covered}");
        }
        assert!(!of("domains", "").covers(&of("file", "b.000001:4")));
    }

    proptest! {
        #[test]
        fn any_text_is_taken_or_refused(text in ".{0,80}", kind in "gtids|domains|file") {
            if let Ok(position) = Position::parse(&kind, &text) {
                prop_assert_eq!(Position::parse(&kind, &position.to_string()), Ok(position));
            }
        }
    }
}
