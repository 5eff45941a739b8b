//! Sharing a table with other relays: which buckets are read here, and when nothing is left of those that
//! are not read any more.
//!
//! A bucket that is let go is not read from then on, and what was handed over of the table until then is waited for. What
//! comes anew is read from the head of the table, after the gates: others have held and released there.

use std::{collections::HashSet, sync::Arc};

use super::Task;
use crate::{
    coordinate::{Lease, Parts, drain::Drain},
    event::Place,
};

/// What a task knows of its share.
#[derive(Default)]
pub(super) struct Share {
    /// The membership under which it works.
    epoch: Option<i64>,
    parts: Arc<Parts>,
    /// Handed over before a bucket was left, and not recorded.
    leaving: HashSet<Place>,
    /// Of the gates as they were listed last.
    pub version: i64,
    pub drain: Option<Arc<Drain>>,
}

impl Share {
    pub fn new(drain: Option<Arc<Drain>>) -> Share {
        Share { drain, ..Share::default() }
    }

    /// The buckets that are read, if not all.
    pub fn buckets(&self) -> Option<&[u16]> {
        let some = self.drain.is_some() && !self.parts.has_all();
        some.then_some(&self.parts.buckets)
    }
}

impl Task {
    /// Takes up what the lease says of this table.
    pub(super) fn take_up(&mut self, lease: &Lease) {
        let Lease::Owner { epoch, parts, .. } = lease else { return };
        if self.share.epoch != Some(*epoch) {
            // What was settled or is to be held under another membership is the next owner's.
            if self.share.epoch.is_some() {
                self.forget_what_is_owed();
            }
            self.share.epoch = Some(*epoch);
            self.share.parts = Arc::default();
        }
        let before = std::mem::replace(&mut self.share.parts, parts.clone());
        if self.share.drain.is_none() {
            return;
        }
        let lacks = |one: &Parts, other: &Parts| {
            one.buckets.iter().any(|bucket| other.buckets.binary_search(bucket).is_err())
        };
        if lacks(&before, parts) {
            self.share.leaving.extend(self.state.known.places());
        }
        let table = self.source.spec.name.as_str();
        let changed = parts.gates.get(table).is_some_and(|version| *version > self.share.version);
        if lacks(parts, &before) || changed {
            self.state.opening.gates_due |= self.state.opening.opened;
        }
        self.say_what_is_left();
    }

    /// The lease is not ours, or another one: what was settled is read, and published, by its next owner. Exactly once it
    /// is not: it is recorded, by this relay if nobody takes over, or else when that one has found it.
    pub(super) fn forget_what_is_owed(&mut self) {
        if !self.source.exactly_once {
            self.state.owes_only(Vec::new());
        }
        self.state.holds.clear();
        self.state.kept = None;
    }

    /// Exactly once: whether it is known what is published of the parts that this relay has.
    pub(super) fn is_taken_over(&self) -> bool {
        let Share { epoch, parts, .. } = &self.share;
        self.state.opening.taken.zip(*epoch).is_some_and(|(taken, epoch)| taken.covers(epoch, parts))
    }

    /// Whether nothing of the table is in doubt but what is known here.
    fn is_settled(&self) -> bool {
        let is_known = self.state.opening.opened || self.state.owes_nothing();
        !self.source.exactly_once || (self.is_taken_over() && is_known)
    }

    /// Whether it sees to what one relay has to for all.
    pub(super) fn speaks(&self) -> bool {
        self.share.drain.is_none() || self.share.parts.speaks()
    }

    /// These are recorded, held, or to be read again.
    pub(super) fn is_done_with<'a>(&mut self, places: impl IntoIterator<Item = &'a Place>) {
        if self.share.leaving.is_empty() {
            return;
        }
        for place in places {
            self.share.leaving.remove(place);
        }
        self.say_what_is_left();
    }

    /// Nothing is known any more.
    pub(super) fn is_done_with_all(&mut self) {
        self.share.leaving.clear();
        self.say_what_is_left();
    }

    fn say_what_is_left(&self) {
        let Some(drain) = &self.share.drain else { return };
        let settled = self.is_settled();
        drain.is_settled(self.feed.table, settled);
        if settled && self.share.leaving.is_empty() {
            drain.seen_off(self.feed.table, self.share.parts.serial);
        }
    }
}
