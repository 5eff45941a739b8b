//! What one relay believes of its own place in the group. Pure: [`super::keeper`] asks the database and
//! tells it here what was answered, and the simulation does the same with a database that lies in wait.
//!
//! A relay believes in its membership for two thirds of its length only, counted on its own monotonic clock
//! from *before* it asked. So it stops sending well before the database lets another one in, whatever
//! the clocks of the two say, as long as they do not differ in speed by a third.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use tokio::time::Instant;

use super::{
    Lease, Parts,
    group::{Part, Plan, Seen, View, plan},
};

/// What the database says to a member, or to one that wants to be.
#[derive(Clone, Debug)]
pub enum Attended {
    Member {
        epoch: i64,
        view: View,
    },
    /// The membership is gone: a new one is to be had at once.
    Gone,
    /// A relay of an older version works on the source, alone.
    Older,
}

/// What is to be asked of the database next.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Moves {
    pub take: Vec<Seen>,
    pub leave: Vec<Seen>,
    pub inherit: Option<i64>,
}

impl Moves {
    /// Whether the right to work is taken, and what there is to do is seen after that.
    pub fn begin(&self) -> bool {
        self.inherit.is_some() || self.take.iter().any(|(part, _)| part.is_slot())
    }
}

#[derive(Debug, Default)]
pub struct Standing {
    epoch: Option<i64>,
    until: Option<Instant>,
    view: View,
    mine: BTreeSet<Part>,
    /// Parts that are not worked on any more, and since which list of parts.
    leaving: BTreeMap<Part, u64>,
    /// Parts that were asked to be let go, without an answer yet: it may still happen, at any time, until it is seen
    /// to have happened.
    in_doubt: BTreeSet<Part>,
    parts: Arc<Parts>,
    /// Exactly once: how many relays may work.
    units: Option<u16>,
    slots: BTreeSet<Part>,
    moved: u64,
    /// When members renewed last, as far as it was seen.
    alive: BTreeMap<i64, Instant>,
}

impl Standing {
    /// `units`: exactly once, how many relays may work.
    pub fn new(units: Option<u16>) -> Standing {
        Standing { units, ..Standing::default() }
    }

    /// The number of the membership to renew.
    pub fn epoch(&self) -> Option<i64> {
        self.epoch
    }

    /// How many parts were taken or let go since the start.
    pub fn moved(&self) -> u64 {
        self.moved
    }

    pub fn view(&self) -> &View {
        &self.view
    }

    pub fn lease(&self) -> Lease {
        match (self.epoch, self.until) {
            (Some(epoch), Some(until)) if self.units.is_none() || !self.slots.is_empty() => {
                Lease::Owner { epoch, until, parts: self.parts.clone() }
            }
            _ => Lease::Standby,
        }
    }

    /// What was answered to a question of this moment. Parts that are left are let go once everything of them
    /// is done: when the tables have seen the list of parts of this number off. `None`: nothing may be let go.
    pub fn attended(
        &mut self,
        asked: Instant,
        length: Duration,
        answer: Attended,
        done: Option<u64>,
    ) -> Moves {
        let Attended::Member { epoch, view } = answer else {
            self.lost();
            return Moves::default();
        };
        if self.epoch != Some(epoch) {
            self.lost();
        }
        self.epoch = Some(epoch);
        self.until = Some(asked + length * 2 / 3);
        let before = std::mem::replace(&mut self.mine, view.of(epoch).collect());
        self.moved += before.symmetric_difference(&self.mine).count() as u64;
        self.in_doubt.retain(|part| self.mine.contains(part));
        let Plan { take, mut leave, inherit } = plan(epoch, self.units, &view);
        if done.is_none() {
            leave.clear();
        }
        let next = self.parts.serial + 1;
        self.leaving.retain(|part, _| self.mine.contains(part));
        self.leaving.retain(|part, _| leave.contains(part) || self.in_doubt.contains(part));
        for part in leave.iter().filter(|part| self.mine.contains(part)) {
            self.leaving.entry(*part).or_insert(next);
        }
        for member in &view.members {
            if let Some(renewed) = asked.checked_sub(length.saturating_sub(member.left)) {
                self.alive.insert(member.epoch, renewed);
            }
        }
        let owns = |epoch: &i64| view.parts.values().any(|held| held.by == Some(*epoch));
        self.alive.retain(|epoch, _| owns(epoch) || view.members.iter().any(|member| member.epoch == *epoch));
        self.view = view;
        self.publish();
        let ready = self.leaving.iter().filter(|(_, since)| done.is_some_and(|done| **since <= done));
        let seen = ready.filter_map(|(part, _)| Some((*part, self.view.parts.get(part)?.turn)));
        Moves { take, leave: seen.collect(), inherit }
    }

    /// These are asked to be let go now; until [`left`](Self::left) nobody knows whether it has happened.
    pub fn leaves(&mut self, parts: &[Seen]) {
        self.in_doubt.extend(parts.iter().map(|(part, _)| part));
    }

    pub fn left(&mut self, parts: &[Seen]) {
        for (part, _) in parts {
            self.mine.remove(part);
            self.leaving.remove(part);
            self.in_doubt.remove(part);
        }
        self.moved += parts.len() as u64;
        self.publish();
    }

    /// Returns how long it is since the last sign of life of those that had them.
    pub fn took(&mut self, parts: &[Part], now: Instant) -> Option<Duration> {
        let owners = parts.iter().filter_map(|part| self.view.parts.get(part)?.by);
        let since = owners.filter_map(|owner| self.alive.get(&owner)).min().copied();
        self.mine.extend(parts);
        self.moved += parts.len() as u64;
        self.publish();
        since.map(|since| now.saturating_duration_since(since))
    }

    /// How long it is since the last sign of life of a member.
    pub fn silent_for(&self, epoch: i64, now: Instant) -> Option<Duration> {
        self.alive.get(&epoch).map(|since| now.saturating_duration_since(*since))
    }

    /// Nothing is ours any more.
    pub fn lost(&mut self) {
        self.epoch = None;
        self.until = None;
        self.mine.clear();
        self.leaving.clear();
        self.in_doubt.clear();
        self.publish();
    }

    /// Whether something is on its way that should not have to wait.
    pub fn is_moving(&self) -> bool {
        !self.leaving.is_empty()
    }

    /// When it is worth to look again: at the latest when a membership that is not renewed runs out.
    pub fn look_again_in(&self, length: Duration) -> Duration {
        let others = self.view.members.iter().filter(|member| Some(member.epoch) != self.epoch);
        let soonest = others.map(|member| member.left).min().unwrap_or(length);
        let usual = if self.epoch.is_some() { length / 4 } else { length / 8 };
        usual.min(soonest + Duration::from_millis(20))
    }

    /// A new list of parts, where it is another one.
    fn publish(&mut self) {
        let worked_on = || self.mine.iter().filter(|part| !self.leaving.contains_key(part));
        let bucket = |part: &Part| match part {
            Part::Bucket(n) => Some(*n),
            Part::Whole | Part::Slot(_) => None,
        };
        let buckets: Vec<u16> = worked_on().filter_map(bucket).collect();
        let whole = worked_on().any(|part| *part == Part::Whole);
        let of_all = self.view.parts.keys().filter_map(bucket).count();
        let slots: BTreeSet<Part> = self.mine.iter().copied().filter(|part| part.is_slot()).collect();
        let came = !slots.is_subset(&self.slots);
        self.slots = slots;
        let same = buckets == self.parts.buckets && whole == self.parts.whole;
        let serial = self.parts.serial + u64::from(!same);
        if !same || came || self.view.gates != self.parts.gates || of_all != self.parts.of_all {
            let (gates, slots) = (self.view.gates.clone(), self.parts.slots + u64::from(came));
            self.parts = Arc::new(Parts { serial, whole, buckets, of_all, gates, slots });
        }
    }
}
