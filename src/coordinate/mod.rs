//! Which relay does what: a lease in the source database, by the database's clock, with a fencing
//! number that every recording statement checks. One lease covers the whole source; a second relay
//! stands by and takes over when the first one is gone.
//!
//! The owner believes in its lease for two thirds of its length only, counted on its own monotonic
//! clock from *before* it asked. So it stops sending well before the database lets another one in,
//! whatever the two clocks say.

use std::{sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    admin::status::Board,
    relay::retry::Policy,
    source::database::{Database, Error},
};

/// What this relay knows of its lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lease {
    /// Another relay works, or the database has not been reached.
    Standby,
    /// Ours: nothing may be sent or recorded after `until`, and only under `epoch`.
    Owner { epoch: i64, until: Instant },
}

/// How long a process lives at most, as far as its leases are concerned.
const FOR_LIFE: Duration = Duration::from_hours(24 * 365 * 30);

impl Lease {
    /// Of a source that belongs to this process as long as it lives.
    pub fn for_life(epoch: i64) -> Lease {
        Lease::Owner { epoch, until: Instant::now() + FOR_LIFE }
    }

    /// The fencing number, while the lease holds.
    pub fn epoch(&self) -> Option<i64> {
        match self {
            Lease::Owner { epoch, until } if Instant::now() < *until => Some(*epoch),
            _ => None,
        }
    }
}

/// Keeps the lease until `stop`, then gives it up.
pub struct Keeper {
    pub database: Database,
    /// Names this process; another start of the same pod is another owner.
    pub owner: String,
    pub length: Duration,
    pub lease: watch::Sender<Lease>,
    pub board: Arc<Board>,
}

impl Keeper {
    pub async fn run(self, stop: CancellationToken) {
        let mut failures = 0;
        let mut installed = false;
        let mut was_owner = false;
        loop {
            let asked = Instant::now();
            let answer = async {
                if !installed {
                    self.database.install().await?;
                    installed = true;
                }
                self.database.lease(&self.owner, self.length).await
            };
            let outcome = tokio::select! {
                outcome = tokio::time::timeout(self.length / 3, answer) => outcome,
                () = stop.cancelled() => break,
            };
            let pause = match outcome {
                Ok(Ok(Some(grant))) => {
                    failures = 0;
                    self.board.source_reached();
                    let until = asked + self.length * 2 / 3;
                    self.lease.send_replace(Lease::Owner { epoch: grant.epoch, until });
                    if !was_owner {
                        info!(epoch = grant.epoch, "this relay owns the source");
                    }
                    was_owner = true;
                    self.length / 4
                }
                Ok(Ok(None)) => {
                    failures = 0;
                    self.board.source_reached();
                    if was_owner || *self.lease.borrow() != Lease::Standby {
                        warn!("another relay owns the source now; standing by");
                    } else if !self.board.standing_by() {
                        info!("another relay owns the source; standing by");
                    }
                    was_owner = false;
                    self.lease.send_replace(Lease::Standby);
                    (self.length / 8).min(Duration::from_secs(1))
                }
                failed => {
                    failures += 1;
                    installed = false;
                    let error = match failed {
                        Ok(Err(error)) => error,
                        _ => Error::NoAnswer("renew the lease"),
                    };
                    // Without the lease no table is read, so nobody else would notice.
                    if error.needs_another_connection() {
                        self.database.renew();
                    }
                    self.board.source_failed(&report(&error));
                    warn!(
                        error = report(&error),
                        attempt = failures,
                        "cannot reach the source database; will try again"
                    );
                    // While the lease runs, a quick second try; then with growing pauses.
                    let policy = Policy { max: self.length.min(Duration::from_secs(5)), ..Policy::default() };
                    policy.pause(failures, fastrand::f64())
                }
            };
            self.board.lease(&self.lease.borrow());
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => break,
            }
        }
        if was_owner && let Err(error) = self.database.release(&self.owner).await {
            warn!(error = report(&error), "could not release the lease; it runs out by itself");
        }
    }
}

/// An error and what caused it, in one line.
pub fn report(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(inner) = cause {
        let inner_text = inner.to_string();
        if !text.contains(&inner_text) {
            text.push_str(": ");
            text.push_str(&inner_text);
        }
        cause = inner.source();
    }
    text
}
