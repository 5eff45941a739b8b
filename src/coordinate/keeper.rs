//! Keeps this relay's membership until it stops, then gives it up: asks the database, and lets
//! [`Standing`] say what the answers mean.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::{
    Lease, Part, UNKNOWN,
    drain::Drain,
    report,
    standing::{Attended, Moves, Standing},
};
use crate::{
    admin::{metrics::Metrics, status::Board},
    relay::retry::Policy,
    source::database::{Attendance, Database, Error},
};

/// Between two rounds the database has this part of the lease to itself.
const AT_REST: u32 = 20;

pub struct Keeper {
    pub database: Database,
    /// Names this process; another start of the same pod is another owner.
    pub owner: String,
    pub length: Duration,
    pub buckets: u16,
    /// Exactly once: how many relays may work.
    pub units: Option<u16>,
    /// What this relay is to relay, as its configuration says now.
    pub tables: watch::Receiver<BTreeSet<String>>,
    pub lease: watch::Sender<Lease>,
    /// The same, for tables that are not shared.
    pub whole: watch::Sender<Lease>,
    pub drain: Arc<Drain>,
    pub board: Arc<Board>,
    pub metrics: Arc<Metrics>,
}

/// The state of the loop.
#[derive(Default)]
struct State {
    standing: Standing,
    failures: u32,
    installed: bool,
}

impl Keeper {
    pub async fn run(self, stop: CancellationToken) {
        let mut state = State { standing: Standing::new(self.units), ..State::default() };
        loop {
            let pause = tokio::select! {
                pause = self.round(&mut state) => pause,
                () = stop.cancelled() => break,
            };
            let moving = state.standing.is_moving();
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = self.drain.news(), if moving => {}
                () = stop.cancelled() => break,
            }
        }
        if let Some(epoch) = state.standing.epoch()
            && let Err(error) = self.leaves(epoch).await
        {
            warn!(error = report(&error), "could not give up the membership; it runs out by itself");
        }
    }

    async fn leaves(&self, epoch: i64) -> Result<(), Error> {
        // Else whoever comes has to find out what is published.
        if self.units.is_some() && self.drain.is_clean() {
            self.database.leave_all(epoch).await?;
        }
        self.database.resign(epoch).await
    }

    /// Asks once and does what follows from the answer. Returns when to ask again.
    async fn round(&self, state: &mut State) -> Duration {
        let outcome = tokio::time::timeout(self.length / 3, async {
            if !state.installed {
                self.database.install().await?;
                state.installed = true;
            }
            let tables = self.tables.borrow().clone();
            // Not before: to make the tables may take as long as the lease is believed in.
            let asked = Instant::now();
            let attendance = Attendance {
                epoch: state.standing.epoch(),
                owner: &self.owner,
                length: self.length,
                buckets: self.buckets,
                units: self.units.unwrap_or(0),
                tables: &tables,
            };
            Ok((asked, self.database.attend(attendance).await?))
        })
        .await;
        let (asked, attended) = match outcome {
            Ok(Ok(answer)) => answer,
            Ok(Err(error)) => return self.failed(state, &error),
            Err(_) => return self.failed(state, &Error::NoAnswer("renew the lease")),
        };
        state.failures = 0;
        self.board.source_reached();
        if let Attended::Older = attended
            && self.board.role() != "standby"
        {
            info!("a relay of an older version owns the source; standing by until it is gone");
        }
        let gone = matches!(attended, Attended::Gone);
        let moves = state.standing.attended(asked, self.length, attended, self.drain.done());
        if gone {
            self.metrics.membership_lost();
            warn!("the lease ran out before it was renewed; others may have taken over");
        }
        // One that has yet to take what there is does not stand by.
        let begins = moves.begin();
        let waits = moves.take.is_empty() && !begins;
        if waits || self.board.role() == "owner" {
            self.publish(state);
        }
        let made = self.make(state, moves).await;
        if !begins {
            self.publish(state);
        }
        match made {
            Ok(()) if gone || begins => Duration::ZERO,
            // From the question on, as the lease is: answers that take long do not use it up.
            Ok(()) => {
                let pause = state.standing.look_again_in(self.length);
                pause.saturating_sub(asked.elapsed()).max(pause.min(self.length / AT_REST))
            }
            Err(error) => self.failed(state, &error),
        }
    }

    async fn make(&self, state: &mut State, moves: Moves) -> Result<(), Error> {
        let Moves { take, leave, inherit } = moves;
        let Some(epoch) = state.standing.epoch() else { return Ok(()) };
        if let Some(gone) = inherit {
            let parts = self.within(self.database.inherit(epoch, gone), "inherit").await?;
            if parts > 0 {
                if let Some(after) = state.standing.silent_for(gone, Instant::now()) {
                    self.metrics.took_over(after);
                }
                match gone {
                    UNKNOWN => {
                        info!(parts, "nobody knows who worked last: this one settles what may be left");
                    }
                    _ => info!(
                        from = gone,
                        parts, "a relay is gone: what it had is this one's, which settles what it left"
                    ),
                }
            }
        }
        if !leave.is_empty() {
            state.standing.leaves(&leave);
            self.within(self.database.leave(epoch, &leave), "let parts go").await?;
            state.standing.left(&leave);
            info!(parts = leave.len(), "let go of some of the work, which other relays take");
        }
        if !take.is_empty() {
            let taken = self.within(self.database.take(epoch, &take), "take parts").await?;
            if let Some(after) = state.standing.took(&taken, Instant::now()) {
                self.metrics.took_over(after);
            }
            if taken.iter().any(|part| !part.is_slot()) {
                let whole = taken.contains(&Part::Whole);
                let buckets = taken.iter().filter(|part| part.is_bucket()).count();
                info!(buckets, not_shared = whole, "took over some of the work");
            }
        }
        Ok(())
    }

    async fn within<T>(
        &self,
        answer: impl Future<Output = Result<T, Error>>,
        doing: &'static str,
    ) -> Result<T, Error> {
        tokio::time::timeout(self.length / 3, answer).await.unwrap_or(Err(Error::NoAnswer(doing)))
    }

    /// Notes an error and says how long to wait.
    fn failed(&self, state: &mut State, error: &Error) -> Duration {
        state.failures += 1;
        state.installed = false;
        // Without the lease no table is read, so nobody else would notice.
        self.database.failed(error);
        let text = report(error);
        self.board.source_failed(&text);
        self.publish(state);
        warn!(error = text, attempt = state.failures, "cannot reach the source database; will try again");
        // While the lease runs, a quick second try; then with growing pauses.
        let policy = Policy { max: self.length.min(Duration::from_secs(5)), ..Policy::default() };
        policy.pause(state.failures, fastrand::f64())
    }

    fn publish(&self, state: &mut State) {
        let lease = state.standing.lease();
        self.metrics.membership(&state.standing);
        let before = self.board.role();
        self.board.lease(&lease);
        let relays = state.standing.view().members.len();
        match (before, self.board.role(), &lease) {
            ("owner", "standby", _) => warn!(relays, "other relays own the source now; standing by"),
            (before, "standby", _) if before != "standby" => {
                info!(relays, eos_units = self.units, "other relays own the source; standing by");
            }
            (before, "owner", Lease::Owner { epoch, parts, .. }) if before != "owner" => {
                let (buckets, not_shared) = (parts.buckets.len(), parts.whole);
                info!(epoch, relays, buckets, not_shared, "this relay owns the source, or its share of it");
            }
            _ => {}
        }
        self.board.group(state.standing.view());
        self.whole.send_replace(lease.of_whole());
        self.lease.send_replace(lease);
    }
}
