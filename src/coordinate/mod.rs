//! Which relay does what. Relays of one source are members of a group, which the source database keeps:
//! by its clock, with a fencing number that every recording statement checks. The work is cut into parts
//! ([`group`]), each of which one member has.
//!
//! A membership is one thing for everything that a relay does: when it is gone, all parts are free and
//! nothing is recorded in its name any more. So a part needs no fencing number of its own. Exactly once they are
//! another's as a whole, with the slot that the relay had ([`Part::Slot`]).

pub mod drain;
pub mod group;
pub mod keeper;
#[cfg(test)]
mod sim;
pub mod standing;

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use tokio::{sync::watch, time::Instant};

pub use self::{
    group::{Held, Member, Part, Seen, UNKNOWN, View},
    keeper::Keeper,
};

/// How long a process lives at most, as far as its leases are concerned.
const FOR_LIFE: Duration = Duration::from_hours(24 * 365 * 30);

/// The parts that a relay works on.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Parts {
    /// Counts the lists.
    pub serial: u64,
    /// The tables that are not shared.
    pub whole: bool,
    /// Buckets of keys of the tables that are shared, in order.
    pub buckets: Vec<u16>,
    /// How many buckets there are.
    pub of_all: usize,
    /// Counts the changes of what is held, by table.
    pub gates: BTreeMap<String, i64>,
    /// Counts the slots that came to this relay. What belonged to the last one is known when that is taken over.
    pub slots: u64,
}

/// Exactly once: what a relay has taken over, or is to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Claim {
    /// Under which membership.
    pub epoch: i64,
    /// And with which of its slots ([`Parts::slots`]).
    pub slots: u64,
}

impl Claim {
    /// Whether whoever has taken this over knows what may be published of these parts.
    pub fn covers(self, epoch: i64, parts: &Parts) -> bool {
        self.epoch == epoch && self.slots >= parts.slots
    }
}

impl Parts {
    /// Whether no other relay works on the shared tables. Of a group that was never seen it has nothing.
    pub fn has_all(&self) -> bool {
        self.of_all > 0 && self.buckets.len() == self.of_all
    }

    /// Whether it speaks for all where one has to: a table's backlog is measured once.
    pub fn speaks(&self) -> bool {
        self.buckets.first() == Some(&0)
    }
}

/// What this relay knows of its membership.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Lease {
    /// Another relay works, or the database has not been reached.
    Standby,
    /// Ours: nothing may be sent or recorded after `until`, and only under `epoch`.
    Owner { epoch: i64, until: Instant, parts: Arc<Parts> },
}

impl Lease {
    /// The fencing number, while the lease holds.
    pub fn epoch(&self) -> Option<i64> {
        match self {
            Lease::Owner { epoch, until, .. } if Instant::now() < *until => Some(*epoch),
            _ => None,
        }
    }

    /// What it gives a right to, now or lately.
    pub fn claim(&self) -> Option<Claim> {
        match self {
            Lease::Owner { epoch, parts, .. } => Some(Claim { epoch: *epoch, slots: parts.slots }),
            Lease::Standby => None,
        }
    }

    /// Waits until it is held. `false` where nobody keeps it any more. Cancel safe.
    pub async fn held(lease: &mut watch::Receiver<Lease>) -> bool {
        while lease.borrow_and_update().epoch().is_none() {
            if lease.changed().await.is_err() {
                return false;
            }
        }
        true
    }

    /// Waits until it is not held any more. Cancel safe.
    pub async fn lost(mut lease: watch::Receiver<Lease>) {
        loop {
            let until = match *lease.borrow_and_update() {
                Lease::Owner { until, .. } if Instant::now() < until => until,
                _ => return,
            };
            tokio::select! {
                changed = lease.changed() => if changed.is_err() { return },
                () = tokio::time::sleep_until(until) => {}
            }
        }
    }

    /// Of a source that belongs to this process as long as it lives.
    pub fn for_life(epoch: i64) -> Lease {
        let parts = Arc::new(Parts { whole: true, ..Parts::default() });
        Lease::Owner { epoch, until: Instant::now() + FOR_LIFE, parts }
    }

    /// The lease, for tables that are not shared.
    pub fn of_whole(&self) -> Lease {
        match self {
            Lease::Owner { parts, .. } if parts.whole => self.clone(),
            _ => Lease::Standby,
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A table that has all buckets is read without asking for any.
    #[test]
    fn a_relay_that_has_seen_no_group_does_not_have_all_of_it() {
        let parts = |buckets: &[u16], of_all| Parts { buckets: buckets.to_vec(), of_all, ..Parts::default() };
        assert!(!Parts::default().has_all());
        assert!(!parts(&[], 2).has_all());
        assert!(!parts(&[1], 2).has_all());
        assert!(parts(&[0, 1], 2).has_all());
    }

    #[tokio::test(start_paused = true)]
    async fn a_lease_is_held_until_it_runs_out_however_often_it_was_renewed() {
        let owner = |seconds| Lease::Owner {
            epoch: 7,
            until: Instant::now() + Duration::from_secs(seconds),
            parts: Arc::default(),
        };
        let (keeps, mut lease) = watch::channel(Lease::Standby);
        let waits = Duration::from_secs(100);
        assert!(tokio::time::timeout(waits, Lease::held(&mut lease)).await.is_err(), "nobody has it");
        keeps.send_replace(owner(10));
        assert!(Lease::held(&mut lease).await);

        let began = Instant::now();
        let lost = tokio::spawn(Lease::lost(lease.clone()));
        tokio::time::sleep(Duration::from_secs(9)).await;
        keeps.send_replace(owner(10));
        lost.await.unwrap();
        assert_eq!(began.elapsed().as_secs(), 19);
        assert!(tokio::time::timeout(waits, Lease::held(&mut lease)).await.is_err(), "it ran out");

        keeps.send_replace(owner(10));
        let lost = tokio::spawn(Lease::lost(lease.clone()));
        keeps.send_replace(Lease::Standby);
        let began = Instant::now();
        lost.await.unwrap();
        assert_eq!(began.elapsed().as_secs(), 0, "it was let go");
        drop(keeps);
        assert!(!Lease::held(&mut lease).await, "nobody keeps it any more");
    }
}
