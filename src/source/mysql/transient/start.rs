//! From where the log is read for tables whose rows do not stay, and whether everything since then is in it.

use tracing::{info, warn};

use crate::source::{
    database::position::{LogNow, Stored},
    log::{binlog::Coordinates, position::Position},
    mysql::{
        event::{Header, Malformed, kind},
        server::{Obstacle, Server},
        wire::{Error, From, Packet, Reader},
    },
};

/// Enough for the events before the first transaction.
const FIRST_EVENTS: usize = 1 << 20;

/// Why a position is of no use, in the words of an operator.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Refused {
    /// What was written since then is gone, or is in the log of another server.
    Lost(String),
    /// It can be mended.
    Setup(String),
}

fn number(file: &str) -> Option<u64> {
    Coordinates::new(file, 0).ok().map(|place| place.file)
}

/// Whether the log as it is now goes on from a stored position.
fn judge(stored: &Stored, now: &LogNow) -> Result<(), Refused> {
    let is_same = stored.server == now.server;
    let lost = |why: String| Err(Refused::Lost(why));
    let (here, there) = (&now.server, &stored.server);
    let begun_anew = |read: &str| {
        lost(format!("the binlog was read up to {read} on this server and has begun anew since (RESET)"))
    };
    let last = now.files.last().and_then(|file| number(file));
    if is_same && number(&stored.file) > last {
        return begun_anew(&stored.file);
    }
    match (&stored.position, &now.position) {
        (Position::Gtids(read), Position::Gtids(executed)) => {
            if !read.includes(&now.purged) {
                return lost(format!(
                    "the server has purged transactions from its binlog that were not read: it has purged \
                     {}, and was read up to {read}",
                    now.purged
                ));
            }
            if !executed.includes(read) {
                return lost(format!(
                    "the server {here} does not have all transactions that were read on {there}: its binlog has \
                     begun anew (RESET), or it is another server; it has {executed}, and {read} were read"
                ));
            }
            Ok(())
        }
        (Position::Domains(read), Position::Domains(now)) => {
            let behind = |(domain, (_, seq)): (&u32, &(u32, u64))| {
                now.get(domain).is_none_or(|(_, written)| written < seq)
            };
            if read.iter().any(behind) {
                return lost(format!(
                    "the server {here} does not have all transactions that were read on {there}: its binlog has \
                     begun anew (RESET), or it is another server; it has come to {}, and {} was read",
                    Position::Domains(now.clone()),
                    stored.position
                ));
            }
            Ok(())
        }
        (Position::File { .. }, _) if !is_same => lost(format!(
            "the binlog was read by files, of another server ({there}; this is {here}): with GTIDs it could be gone \
             on with"
        )),
        (Position::File { name, .. }, _) if now.files.iter().all(|file| **file != **name) => {
            match number(name) > last {
                true => begun_anew(name),
                false => lost(format!("the server has purged {name} of its binlog, which was not read to its end")),
            }
        }
        (Position::File { .. }, _) => Ok(()),
        (Position::Gtids(_) | Position::Domains(_), _) => Err(Refused::Setup(
            "the binlog was read by GTIDs, and the server does not write them as before (gtid_mode): switch them on \
             again"
                .into(),
        )),
    }
}

/// What a server says when it cannot send what is asked for.
pub fn is_gone(code: u16, says: &str) -> bool {
    let words = ["purged", "GTID", "Could not find first log file", "file size", "impossible position"];
    // ER_MASTER_FATAL_ERROR_READING_BINLOG. Where GTIDs were only just switched on, it is all there.
    code == 1236 && !says.contains("anonymous") && words.iter().any(|word| says.contains(word))
}

impl Server {
    /// What was lost, and how it can be gone on.
    pub fn lost(&self, why: &str) -> Obstacle {
        Obstacle::Lost(format!(
            "{why}. Events that no table has may be lost with it. See what is missing; then {} has the relay begin \
             anew, with what is written from then on",
            self.database.begin_anew()
        ))
    }

    /// Where to go on; at the first start the server's present, which is stored before anything is read.
    pub async fn resume(&self, epoch: i64) -> Result<Stored, Obstacle> {
        self.database.check_alone(self.settings.server_id).await?;
        let now = self.database.log_now().await?;
        let Some(mut stored) = self.database.stored().await? else {
            return self.begin(now, epoch).await;
        };
        match judge(&stored, &now) {
            Ok(()) => {}
            Err(Refused::Lost(why)) => return Err(self.lost(&why)),
            Err(Refused::Setup(why)) => return Err(Obstacle::Setup(why)),
        }
        if stored.server == now.server {
            if now.files.contains(&stored.file) {
                let made = self.made(&stored.file).await?;
                if made != stored.made {
                    let file = &stored.file;
                    let why = format!(
                        "{file} is not the file that was read: the binlog has begun anew (RESET), or \
                                       it is another server's"
                    );
                    return Err(self.lost(&why));
                }
            }
            return Ok(stored);
        }
        warn!(
            before = stored.server,
            now = now.server,
            "another server has taken over, and has everything that was read: its binlog is gone on with"
        );
        let era = now.seconds.max(stored.era + 1);
        let (file, made) = self.last_file(&now).await?;
        stored = Stored { server: now.server, file, made, era, ..stored };
        self.database.store(&stored, epoch).await?;
        Ok(stored)
    }

    async fn begin(&self, now: LogNow, epoch: i64) -> Result<Stored, Obstacle> {
        let prepared = self.database.prepared().await?;
        if prepared > 0 {
            return Err(Obstacle::Setup(format!(
                "{prepared} XA transactions are prepared, and what they insert is in the log before the relay begins: it \
                 begins when they have ended (XA RECOVER lists them)"
            )));
        }
        let (file, made) = self.last_file(&now).await?;
        let LogNow { server, position, seconds: era, .. } = now;
        let stored = Stored { position, server, file, made, era };
        self.database.store(&stored, epoch).await?;
        info!(
            position = %stored.position,
            "no place in the binlog is stored: it is read from now on, and what was inserted before is not published"
        );
        Ok(stored)
    }

    /// The log from a position on.
    pub async fn read_from(&self, position: &Position, longest: usize) -> Result<Reader, Obstacle> {
        match position {
            Position::Gtids(set) => self.dump(&[], From::Gtids(set), longest).await,
            Position::Domains(_) => {
                let variables = [
                    ("@slave_connect_state", format!("'{position}'")),
                    ("@slave_gtid_strict_mode", "0".into()),
                    ("@slave_gtid_ignore_duplicates", "0".into()),
                ];
                self.dump(&variables, From::Place { file: "", at: 4 }, longest).await
            }
            Position::File { name, at } => match u32::try_from(*at) {
                Ok(at) => self.dump(&[], From::Place { file: name, at }, longest).await,
                Err(_) => Err(Obstacle::Setup(
                    "the file of the binlog is longer than 4 GiB: it is read on when the next one has begun"
                        .into(),
                )),
            },
        }
    }

    /// The file that is written, and when it was made.
    async fn last_file(&self, now: &LogNow) -> Result<(String, u32), Obstacle> {
        let file = now.files.last().cloned().unwrap_or_default();
        let made = self.made(&file).await?;
        Ok((file, made))
    }

    /// When a file of the log was made.
    async fn made(&self, file: &str) -> Result<u32, Obstacle> {
        let mut reader = self.dump(&[], From::Place { file, at: 4 }, FIRST_EVENTS).await?;
        loop {
            match reader.next_packet() {
                None => reader.fill().await?,
                Some(Packet::Whole([0xff, error @ ..])) => return Err(Error::server(error).into()),
                Some(Packet::Whole([0, event @ ..])) => {
                    let (header, _) = Header::parse(event)?;
                    if header.kind == kind::FORMAT_DESCRIPTION {
                        return Ok(header.seconds);
                    }
                }
                Some(_) => return Err(Malformed("its file does not tell its format").into()),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: &str = "3e11fa47-71ca-11e1-9e33-c80aa9429562";

    fn stored(kind: &str, position: &str) -> Stored {
        Stored {
            position: Position::parse(kind, position).unwrap(),
            server: "a".into(),
            file: "binlog.000005".into(),
            made: 7,
            era: 1,
        }
    }

    fn now(kind: &str, position: &str, purged: &str, files: std::ops::RangeInclusive<u32>) -> LogNow {
        LogNow {
            server: "a".into(),
            position: Position::parse(kind, position).unwrap(),
            purged: purged.parse().unwrap(),
            files: files.map(|n| format!("binlog.{n:06}")).collect(),
            seconds: 9,
        }
    }

    fn words(result: Result<(), Refused>) -> String {
        match result {
            Ok(()) => "goes on".into(),
            Err(Refused::Lost(why)) => format!("lost: {why}"),
            Err(Refused::Setup(why)) => format!("setup: {why}"),
        }
    }

    #[test]
    fn a_position_is_gone_on_with_if_everything_since_then_is_there() {
        let read = format!("{A}:1-50");
        let gtids = |executed: &str, purged: &str, files| {
            let of =
                |numbers: &str| if numbers.is_empty() { String::new() } else { format!("{A}:{numbers}") };
            words(judge(&stored("gtids", &read), &now("gtids", &of(executed), &of(purged), files)))
        };
        assert_eq!(gtids("1-60", "1-40", 3..=6), "goes on");
        assert_eq!(gtids("1-60", "1-50", 6..=6), "goes on");
        assert!(gtids("1-60", "1-51", 6..=6).contains("purged"));
        assert!(gtids("1-49", "", 3..=6).contains("begun anew"));
        assert!(gtids("", "", 5..=5).contains("begun anew"));
        assert!(gtids("1-60", "", 1..=2).contains("begun anew"), "its numbers have come as far again");
        let domains = |at: &str, files| {
            words(judge(&stored("domains", "0-1-50,3-1-2"), &now("domains", at, "", files)))
        };
        assert_eq!(domains("0-2-50,3-1-9,4-1-1", 5..=6), "goes on");
        assert!(domains("0-1-50", 5..=6).contains("begun anew"));
        assert!(domains("0-1-49,3-1-2", 5..=6).contains("begun anew"));
        assert!(domains("0-1-90,3-1-2", 1..=1).contains("begun anew"));
        let files =
            |files| words(judge(&stored("file", "binlog.000005:99"), &now("file", "x.1:4", "", files)));
        assert_eq!(files(5..=5), "goes on");
        assert!(files(6..=9).contains("purged"));
        assert!(files(1..=4).contains("begun anew"));
        let other = words(judge(&stored("gtids", &read), &now("file", "binlog.000005:9", "", 5..=5)));
        assert!(other.starts_with("setup"), "{other}");
    }

    #[test]
    fn another_server_is_gone_on_with_by_gtids_alone() {
        let other = |mut stored: Stored| {
            stored.server = "b".into();
            stored
        };
        let has_all = now("gtids", &format!("{A}:1-60"), "", 1..=1);
        assert_eq!(judge(&other(stored("gtids", &format!("{A}:1-50"))), &has_all), Ok(()));
        assert_eq!(judge(&other(stored("domains", "0-1-5")), &now("domains", "0-1-9", "", 1..=1)), Ok(()));
        let lacks = words(judge(&other(stored("gtids", &format!("{A}:1-61"))), &has_all));
        assert!(lacks.contains("another server"), "{lacks}");
        let by_file =
            words(judge(&other(stored("file", "binlog.000001:9")), &now("file", "b.1:9", "", 1..=1)));
        assert!(by_file.contains("another server"), "{by_file}");
    }

    #[test]
    fn what_a_server_cannot_send_is_told_from_other_errors() {
        assert!(is_gone(1236, "Could not find GTID state requested by slave in any binlog files"));
        assert!(is_gone(1236, "the source has purged required binary logs"));
        assert!(!is_gone(1236, "A slave with the same server_uuid/server_id as this slave has connected"));
        assert!(!is_gone(1236, "Cannot replicate anonymous transaction when @@GLOBAL.GTID_MODE = ON"));
        assert!(!is_gone(1227, "purged"));
    }
}
