//! A moment of a database: which transactions it sees, and how far the log had come. It tells the rows
//! that polling has from those that only the log has.

use std::{fmt, str::FromStr};

use super::binlog::{Seen, SharedCommit};

/// A place in the write-ahead log of one server.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Lsn(pub u64);

impl fmt::Display for Lsn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:X}/{:X}", self.0 >> 32, self.0 & 0xffff_ffff)
    }
}

/// What is no LSN, or no snapshot.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the server sent what is not {0}")]
pub struct Unreadable(pub(super) &'static str);

impl FromStr for Lsn {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Lsn, Unreadable> {
        let half = |text: &str| u32::from_str_radix(text, 16).map_err(|_| Unreadable("an LSN"));
        let (high, low) = text.split_once('/').ok_or(Unreadable("an LSN"))?;
        Ok(Lsn(u64::from(half(high)?) << 32 | u64::from(half(low)?)))
    }
}

/// Where a row is in its log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum At {
    /// PostgreSQL's: its transaction, and the place of that transaction's commit.
    Wal { xid: u32, commit: Lsn },
    /// MySQL's and MariaDB's.
    Binlog(SharedCommit),
}

impl At {
    /// The number of the transaction, where snapshots go by it.
    pub fn xid(&self) -> Option<u32> {
        match self {
            At::Wal { xid, .. } => Some(*xid),
            At::Binlog(_) => None,
        }
    }
}

/// A moment that polling has seen, or is to see.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Moment {
    /// Every transaction that the snapshot sees has its commit before `end`.
    Wal {
        snapshot: Snapshot,
        end: Lsn,
    },
    Binlog(Seen),
}

impl Moment {
    /// Every read that begins after this moment sees it.
    pub fn sees(&self, at: &At) -> bool {
        match (self, at) {
            (Moment::Wal { snapshot, end }, At::Wal { xid, commit }) => commit <= end && snapshot.sees(*xid),
            (Moment::Binlog(seen), At::Binlog(commit)) => seen.sees(commit),
            _ => false,
        }
    }

    /// Whether nothing that could be seen at this moment comes in the log any more, when it has come here.
    pub fn is_behind(&self, at: &At) -> bool {
        match (self, at) {
            (Moment::Wal { end, .. }, At::Wal { commit, .. }) => commit > end,
            (Moment::Binlog(seen), At::Binlog(commit)) => commit.end > seen.end,
            _ => false,
        }
    }
}

/// `pg_current_snapshot()`: everything below `xmin` is seen, nothing from `xmax` on, and between them all
/// but those that were still running. (PostgreSQL documentation: "Transaction ID and Snapshot Information
/// Functions".)
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Snapshot {
    xmin: u64,
    xmax: u64,
    running: Vec<u64>,
}

impl Snapshot {
    /// No transaction from this one on is seen.
    pub fn xmax(&self) -> u64 {
        self.xmax
    }

    /// Those before it that are not seen either.
    pub fn running(&self) -> &[u64] {
        &self.running
    }

    /// Whether this moment sees a transaction that has committed. The log has the lower half of its number
    /// only; the upper one is that of the nearest number to `xmax`, which is right for the two thousand
    /// million transactions around it.
    pub fn sees(&self, xid: u32) -> bool {
        let ahead = xid.wrapping_sub(self.xmax as u32).cast_signed();
        let Some(xid) = self.xmax.checked_add_signed(i64::from(ahead)) else { return true };
        xid < self.xmin || (xid < self.xmax && self.running.binary_search(&xid).is_err())
    }
}

impl fmt::Display for Snapshot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let running: Vec<String> = self.running.iter().map(u64::to_string).collect();
        write!(f, "{}:{}:{}", self.xmin, self.xmax, running.join(","))
    }
}

impl FromStr for Snapshot {
    type Err = Unreadable;

    fn from_str(text: &str) -> Result<Snapshot, Unreadable> {
        let number = |text: &str| text.parse::<u64>().map_err(|_| Unreadable("a snapshot"));
        let mut parts = text.splitn(3, ':');
        let xmin = number(parts.next().unwrap_or_default())?;
        let xmax = number(parts.next().unwrap_or_default())?;
        let running = parts.next().unwrap_or_default().split(',').filter(|xid| !xid.is_empty());
        let mut running = running.map(number).collect::<Result<Vec<u64>, Unreadable>>()?;
        running.sort_unstable();
        Ok(Snapshot { xmin, xmax, running })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_sees_what_committed_before_it() {
        let snapshot: Snapshot = "10:20:14,12".parse().unwrap();
        for (xid, seen) in [
            (9, true),
            (10, true),
            (12, false),
            (13, true),
            (14, false),
            (19, true),
            (20, false),
            (99, false),
        ] {
            assert_eq!(snapshot.sees(xid), seen, "{xid}");
        }
        assert!("10:20:".parse::<Snapshot>().is_ok_and(|snapshot| snapshot.sees(14)));
        assert_eq!(snapshot.to_string(), "10:20:12,14");
        assert!("10".parse::<Snapshot>().is_err());
    }

    #[test]
    fn an_lsn_reads_and_writes_as_the_server_does() {
        assert_eq!("16/B374D848".parse(), Ok(Lsn(0x16_B374_D848)));
        assert_eq!(Lsn(0x16_B374_D848).to_string(), "16/B374D848");
        assert!("16".parse::<Lsn>().is_err() && "16/x".parse::<Lsn>().is_err());
    }

    #[test]
    fn a_moment_sees_nothing_that_the_log_had_not_reached() {
        let moment = Moment::Wal { snapshot: "10:20:".parse().unwrap(), end: Lsn(100) };
        let at = |xid, commit| At::Wal { xid, commit: Lsn(commit) };
        assert!(moment.sees(&at(15, 100)));
        assert!(!moment.sees(&at(15, 101)), "a number of a later turn");
        assert!(!moment.sees(&at(25, 50)));
        assert!(moment.is_behind(&at(15, 101)) && !moment.is_behind(&at(15, 100)));
    }

    #[test]
    fn numbers_go_on_after_they_have_wrapped() {
        let base = 5_u64 << 32;
        let snapshot: Snapshot = format!("{}:{}:", base - 10, base + 10).parse().unwrap();
        assert!(snapshot.sees(u32::MAX - 10) && snapshot.sees(3));
        assert!(!snapshot.sees(10) && !snapshot.sees(1 << 30));
    }
}
