//! What the relay says of itself: a board for each source, which its loops write on and the admin address
//! reads.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use serde::Serialize;
use tokio::time::Instant;

use crate::{
    coordinate::{Lease, Member, Part, View},
    event::TableIx,
    relay::Core,
    source::database::Backlog,
};

/// A loop that has not turned for this long is stuck: `/livez` fails.
const STUCK_AFTER: Duration = Duration::from_secs(30);

/// A table in which the oldest row has waited for this long, and of which nothing was published for as
/// long, is stalled.
const STALLED_AFTER: Duration = Duration::from_secs(30);

/// The answer of `/status`.
#[derive(Clone, Debug, Serialize)]
pub struct Status {
    pub version: &'static str,
    /// Names this process among its replicas.
    pub replica: String,
    /// `owner`, `standby` or `unreachable`.
    pub role: &'static str,
    pub last_source_error: Option<String>,
    /// Why the configuration file, as it is now, is not what runs.
    pub config_refused: Option<String>,
    /// Kafka topics that cannot be written to now.
    pub blocked_topics: Vec<String>,
    /// The relays that share the source, as the database had them last.
    pub group: Vec<MemberStatus>,
    pub tables: Vec<TableStatus>,
}

/// A relay of the group.
#[derive(Clone, Debug, Serialize)]
pub struct MemberStatus {
    pub replica: String,
    /// The fencing number of its membership.
    pub epoch: i64,
    /// Until its membership ends, if it is not renewed; by the database's clock.
    pub expires_in_seconds: f64,
    pub buckets: usize,
    /// Whether it works on the tables that are not shared.
    pub not_shared: bool,
}

#[derive(Clone, Debug, Serialize)]
pub struct TableStatus {
    pub name: String,
    /// `starting`, `running`, `standby`, `failing`, `stalled`, `paused` or `halted`.
    pub state: &'static str,
    /// Why it is `halted`, `stalled` or `standby`, and what mends it.
    pub state_reason: Option<String>,
    pub capture: &'static str,
    pub capture_reason: String,
    /// Rows that wait in the table, held ones apart; counted up to a cap.
    pub pending: u64,
    /// By the database's clock, in seconds.
    pub oldest_pending_age_seconds: Option<f64>,
    pub in_flight: u64,
    pub parked_keys: u64,
    pub parked_events: u64,
    /// Events that the relay releases by itself: their topic cannot be written to, the object store is away, or
    /// they are paused.
    pub held_events: u64,
    /// Of these, by what they wait for.
    pub held_for: HeldFor,
    /// What an operator paused.
    pub paused: Vec<String>,
    /// Since this process started.
    pub published_events: u64,
    /// RFC 3339.
    pub last_publish: Option<String>,
    /// What is wrong with the table, or with the event that was parked last; nothing once that is over.
    pub last_error: Option<String>,
    /// When that was. RFC 3339.
    pub last_error_at: Option<String>,
}

/// Events that the relay releases by itself, by what they wait for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct HeldFor {
    /// Their topic cannot be written to.
    pub topic: u64,
    /// The object store is away.
    pub store: u64,
    /// Topic or key is paused.
    pub pause: u64,
}

fn rfc3339(unix_ms: i64) -> Option<String> {
    let time = chrono::DateTime::from_timestamp_millis(unix_ms)?;
    Some(time.to_rfc3339_opts(chrono::SecondsFormat::Millis, true))
}

/// Why a state is what it is, where the state alone does not say so.
fn reason(state: &str, halted: Option<&str>, lost: bool) -> Option<String> {
    match state {
        "halted" if lost => Some(
            "the slot is gone, and with it events that only the log had: see the runbook WhippetTableHalted"
                .into(),
        ),
        "halted" => halted.map(str::to_owned),
        "stalled" => Some(format!(
            "rows wait, and none was published for {} s: look whether Kafka, a topic or the object store is away",
            STALLED_AFTER.as_secs()
        )),
        "standby" => Some("another relay works on this table; this one takes over when that is gone".into()),
        _ => None,
    }
}

/// Rows wait, and nothing was published for a while: whatever the reason, it is not well.
fn is_stalled(table: &TableStatus) -> bool {
    let limit = STALLED_AFTER.as_secs_f64();
    let published = table.last_publish.as_ref().and_then(|at| chrono::DateTime::parse_from_rfc3339(at).ok());
    let quiet = published.is_none_or(|at| {
        let age = chrono::Utc::now().signed_duration_since(at);
        age.to_std().is_ok_and(|age| age >= STALLED_AFTER)
    });
    quiet && table.oldest_pending_age_seconds.is_some_and(|age| age >= limit)
}

/// The status of a relay with several sources: the tables of all; role and error of the first that has one, which
/// is the database where there is one.
pub fn of_all(boards: &[Arc<Board>]) -> Status {
    let all = boards.iter().map(|board| board.status()).reduce(|mut all, one| {
        all.last_source_error = all.last_source_error.or(one.last_source_error);
        all.config_refused = all.config_refused.or(one.config_refused);
        all.blocked_topics.extend(one.blocked_topics);
        all.blocked_topics.sort_unstable();
        all.blocked_topics.dedup();
        all.tables.extend(one.tables);
        all
    });
    all.expect("a relay has a source")
}

#[derive(Debug)]
struct Inner {
    /// With an entry for each place of a table; a place may be free.
    status: Status,
    /// The tables that there are, in the order of the configuration.
    shown: Vec<TableIx>,
    reached: bool,
    relay_turned: Instant,
    ready: Vec<bool>,
    /// Whose last error is of the table itself, and not over.
    fails: Vec<bool>,
    /// Why a table is halted, where it is.
    halted: Vec<Option<String>>,
    /// Events of the table are lost with its slot.
    lost: Vec<bool>,
    /// Which tables are shared among relays.
    shared: Vec<bool>,
    /// Whether this relay works on tables that are shared, and on those that are not.
    works: (bool, bool),
}

impl TableStatus {
    fn starts(name: String) -> TableStatus {
        TableStatus {
            name,
            state: "starting",
            state_reason: None,
            capture: "poll",
            capture_reason: "configured".into(),
            pending: 0,
            oldest_pending_age_seconds: None,
            in_flight: 0,
            parked_keys: 0,
            parked_events: 0,
            held_events: 0,
            held_for: HeldFor::default(),
            paused: Vec::new(),
            published_events: 0,
            last_publish: None,
            last_error: None,
            last_error_at: None,
        }
    }
}

#[derive(Debug)]
pub struct Board {
    inner: Mutex<Inner>,
}

impl Board {
    pub fn new(replica: String, tables: impl IntoIterator<Item = String>) -> Board {
        let tables: Vec<TableStatus> = tables.into_iter().map(TableStatus::starts).collect();
        let now = Instant::now();
        Board {
            inner: Mutex::new(Inner {
                shown: (0..tables.len()).map(|index| TableIx(index as u16)).collect(),
                reached: false,
                relay_turned: now,
                ready: vec![false; tables.len()],
                fails: vec![false; tables.len()],
                halted: vec![None; tables.len()],
                lost: vec![false; tables.len()],
                shared: vec![false; tables.len()],
                works: (false, false),
                status: Status {
                    version: env!("CARGO_PKG_VERSION"),
                    replica,
                    role: "unreachable",
                    last_source_error: None,
                    config_refused: None,
                    blocked_topics: Vec::new(),
                    group: Vec::new(),
                    tables,
                },
            }),
        }
    }

    pub fn status(&self) -> Status {
        let inner = self.lock();
        let mut status = inner.status.clone();
        for (index, table) in status.tables.iter_mut().enumerate() {
            let (why, lost) = (inner.halted[index].as_deref(), inner.lost[index]);
            let halted = why.is_some() || lost;
            let works = if inner.shared[index] { inner.works.0 } else { inner.works.1 };
            let role = if status.role == "owner" && !works { "standby" } else { status.role };
            table.state = match (role, halted, inner.ready[index]) {
                (_, true, _) => "halted",
                ("standby", ..) => "standby",
                ("owner", _, true) if table.paused.iter().any(|scope| scope == "table") => "paused",
                ("owner", _, true) if is_stalled(table) => "stalled",
                ("owner", _, true) => "running",
                (_, _, false) if table.last_error.is_some() => "failing",
                ("unreachable", ..) if inner.reached => "failing",
                _ => "starting",
            };
            table.state_reason = reason(table.state, why, lost);
        }
        status.tables = inner.shown.iter().map(|table| status.tables[table.0 as usize].clone()).collect();
        status
    }

    /// A table begins, at a place that is free or the next one.
    pub fn begin(&self, table: TableIx, name: &str) {
        let mut inner = self.lock();
        let index = table.0 as usize;
        let places = inner.status.tables.len().max(index + 1);
        inner.status.tables.resize_with(places, || TableStatus::starts(String::new()));
        inner.status.tables[index] = TableStatus::starts(name.to_owned());
        let Inner { ready, fails, halted, lost, shared, .. } = &mut *inner;
        halted.resize(places, None);
        halted[index] = None;
        for flags in [ready, fails, lost, shared] {
            flags.resize(places, false);
            flags[index] = false;
        }
    }

    /// These are the tables, in this order, and whether they are shared.
    pub fn show(&self, tables: impl IntoIterator<Item = (TableIx, bool)>) {
        let mut inner = self.lock();
        inner.shared = vec![false; inner.status.tables.len()];
        inner.shown.clear();
        for (table, shared) in tables {
            inner.shown.push(table);
            inner.shared[table.0 as usize] = shared;
        }
    }

    /// Configuration good and database reached once.
    pub fn is_ready(&self) -> bool {
        self.lock().reached
    }

    /// The loops turn.
    pub fn is_alive(&self) -> bool {
        let inner = self.lock();
        inner.relay_turned.elapsed() < STUCK_AFTER
    }

    /// `owner`, `standby` or `unreachable`.
    pub fn role(&self) -> &'static str {
        self.lock().status.role
    }

    /// Why nothing is known of who works on the source, where that is so.
    pub fn why_unreachable(&self) -> Option<String> {
        let inner = self.lock();
        let why = || "the source database was not reached yet".to_owned();
        (inner.status.role == "unreachable")
            .then(|| inner.status.last_source_error.clone().unwrap_or_else(why))
    }

    pub fn relay_turned(&self, core: &Core) {
        let now = Instant::now();
        let mut inner = self.lock();
        // Once a loop turn would be too often for what it costs.
        if now.duration_since(inner.relay_turned) < Duration::from_millis(50) {
            return;
        }
        inner.relay_turned = now;
        inner.status.blocked_topics = core.blocked_topics();
        for (index, error) in core.last_errors().into_iter().enumerate().take(inner.status.tables.len()) {
            let table = TableIx(index as u16);
            inner.halted[index] = core.why_halted(table);
            // What keeps the whole table from working is more than what happened to one event.
            let fails = inner.fails[index];
            let status = &mut inner.status.tables[index];
            status.in_flight = core.in_flight(table) as u64;
            status.parked_keys = core.parked_keys(table) as u64;
            let held = core.held_counts(table);
            status.parked_events = held.parked;
            status.held_events = held.topic + held.store + held.paused;
            status.held_for = HeldFor { topic: held.topic, store: held.store, pause: held.paused };
            status.paused = core.paused(table);
            status.published_events = core.published(table);
            if let Some(published) = core.last_publish_ms(table) {
                status.last_publish = rfc3339(published);
            }
            if !fails {
                status.last_error_at = error.as_ref().and_then(|error| rfc3339(error.at_ms));
                status.last_error = error.map(|error| error.what);
            }
        }
    }

    pub fn source_reached(&self) {
        let mut inner = self.lock();
        inner.reached = true;
        inner.status.last_source_error = None;
    }

    pub fn source_failed(&self, error: &str) {
        self.lock().status.last_source_error = Some(error.to_owned());
    }

    /// The configuration file is what runs, or why it is not.
    pub fn config(&self, refused: Option<String>) {
        self.lock().status.config_refused = refused;
    }

    pub fn lease(&self, lease: &Lease) {
        let mut inner = self.lock();
        inner.works = match lease {
            Lease::Owner { parts, .. } if lease.epoch().is_some() => (!parts.buckets.is_empty(), parts.whole),
            _ => (false, false),
        };
        // Buckets are of no use where no table is shared, and so on.
        let is_shared = |table: &TableIx| inner.shared[table.0 as usize];
        let (shared, whole) = (inner.shown.iter().any(is_shared), !inner.shown.iter().all(is_shared));
        let works = (inner.works.0 && shared) || (inner.works.1 && whole);
        inner.status.role = match (works, inner.reached, &inner.status.last_source_error) {
            (true, ..) => "owner",
            (false, true, None) => "standby",
            _ => "unreachable",
        };
    }

    pub fn group(&self, view: &View) {
        let member = |member: &Member| {
            let parts = || view.of(member.epoch);
            MemberStatus {
                replica: member.owner.clone(),
                epoch: member.epoch,
                expires_in_seconds: member.left.as_secs_f64(),
                buckets: parts().filter(|part| part.is_bucket()).count(),
                not_shared: parts().any(|part| part == Part::Whole),
            }
        };
        self.lock().status.group = view.members.iter().map(member).collect();
    }

    pub fn table_ready(&self, table: TableIx) {
        let mut inner = self.lock();
        inner.ready[table.0 as usize] = true;
    }

    pub fn table_failed(&self, table: TableIx, error: &str) {
        let mut inner = self.lock();
        let index = table.0 as usize;
        (inner.ready[index], inner.fails[index]) = (false, true);
        let status = &mut inner.status.tables[index];
        status.last_error = Some(error.to_owned());
        status.last_error_at = rfc3339(chrono::Utc::now().timestamp_millis());
    }

    /// What failed is over.
    pub fn table_works(&self, table: TableIx) {
        self.table_ready(table);
        self.table_rests(table);
    }

    /// What failed is nothing to this relay any more.
    pub fn table_rests(&self, table: TableIx) {
        let mut inner = self.lock();
        let index = table.0 as usize;
        if std::mem::take(&mut inner.fails[index]) {
            // Until the relay tells of its own.
            let status = &mut inner.status.tables[index];
            (status.last_error, status.last_error_at) = (None, None);
        }
    }

    /// What only the log had of a table is lost, or is not.
    pub fn lost(&self, table: TableIx, lost: bool) {
        self.lock().lost[table.0 as usize] = lost;
    }

    /// How a table is captured now, and why so.
    pub fn capture(&self, table: TableIx, mode: &'static str, why: &str) {
        let mut inner = self.lock();
        let status = &mut inner.status.tables[table.0 as usize];
        status.capture = mode;
        why.clone_into(&mut status.capture_reason);
    }

    pub fn backlog(&self, table: TableIx, backlog: Backlog) {
        let mut inner = self.lock();
        let status = &mut inner.status.tables[table.0 as usize];
        status.pending = backlog.rows;
        status.oldest_pending_age_seconds = backlog.oldest_seconds;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_loop_that_does_not_turn_shows() {
        let board = Board::new("r".into(), ["t".to_owned()]);
        assert!(board.is_alive());
        tokio::time::advance(STUCK_AFTER + Duration::from_secs(1)).await;
        assert!(!board.is_alive());
    }

    #[test]
    fn an_error_that_is_over_is_gone() {
        let board = Board::new("r".into(), ["t".to_owned()]);
        let error = || {
            let table = board.status().tables[0].clone();
            (table.last_error, table.last_error_at.is_some())
        };
        board.table_failed(TableIx(0), "away");
        assert_eq!(error(), (Some("away".into()), true));
        // It is there, and nothing was read of it yet.
        board.table_ready(TableIx(0));
        assert_eq!(error(), (Some("away".into()), true));
        board.table_works(TableIx(0));
        assert_eq!(error(), (None, false));
    }

    #[test]
    fn a_table_is_stalled_when_rows_wait_and_nothing_goes() {
        let board = Board::new("r".into(), ["t".to_owned()]);
        let mut table = board.status().tables[0].clone();
        let ago = |seconds: i64| Some((chrono::Utc::now() - chrono::Duration::seconds(seconds)).to_rfc3339());
        for (oldest, published, stalled) in [
            (None, None, false),
            (Some(5.0), None, false),
            (Some(31.0), None, true),
            (Some(31.0), ago(5), false),
            (Some(31.0), ago(40), true),
            (Some(0.0), ago(4000), false),
        ] {
            (table.oldest_pending_age_seconds, table.last_publish) = (oldest, published.clone());
            assert_eq!(is_stalled(&table), stalled, "{oldest:?} {published:?}");
        }
    }
}
