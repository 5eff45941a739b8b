//! How the relays of one source share its work: who is a member, who has which part, and what one of
//! them should take or let go. Pure: the database keeps the truth, [`super::keeper`] asks it.
//!
//! A part has one owner, by the number of its membership. It changes hands in two ways only: its owner
//! lets it go, or its owner's membership is gone from the database, and with it the right to record
//! anything. Both are seen before the part is taken, and it is taken only as it was seen.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// One relay works on a part at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The tables that are not shared: those that follow the log, and those that keep their rows.
    Whole,
    /// Of every shared table, the keys whose hash falls into this bucket.
    Bucket(u16),
}

impl Part {
    /// As its row has it.
    pub fn number(self) -> i32 {
        match self {
            Part::Whole => -1,
            Part::Bucket(n) => i32::from(n),
        }
    }

    pub fn of_number(number: i32) -> Option<Part> {
        match number {
            -1 => Some(Part::Whole),
            n => u16::try_from(n).ok().map(Part::Bucket),
        }
    }
}

/// A relay that takes part.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// The number of its membership, which is its fencing token: never given twice.
    pub epoch: i64,
    /// Names its process.
    pub owner: String,
    /// Until its membership runs out, by the database's clock.
    pub left: Duration,
    /// The tables that it relays.
    pub tables: BTreeSet<String>,
}

/// Whose a part is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// The membership that has it.
    pub by: Option<i64>,
    /// Counts its changes: it is taken or let go only as it was seen, so that a statement that arrives late, of
    /// whoever it is, does nothing.
    pub turn: i64,
}

/// A part as it was seen.
pub type Seen = (Part, i64);

/// The group as the database has it, in one snapshot.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct View {
    pub members: Vec<Member>,
    /// Every part that there is.
    pub parts: BTreeMap<Part, Held>,
    /// Counts the changes of what is held, by table: one relay may change what another has read.
    pub gates: BTreeMap<String, i64>,
}

impl View {
    pub fn of(&self, epoch: i64) -> impl Iterator<Item = Part> {
        self.parts.iter().filter(move |(_, held)| held.by == Some(epoch)).map(|(part, _)| *part)
    }

    fn is_member(&self, epoch: i64) -> bool {
        self.members.iter().any(|member| member.epoch == epoch)
    }
}

/// What a member should do to come nearer to a fair share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Parts to take, as they were seen.
    pub take: Vec<Seen>,
    /// Parts to let go, once nothing of them is in flight.
    pub leave: BTreeSet<Part>,
}

/// Fair shares differ by one bucket at most, and those who have more already keep it: as few buckets as
/// possible move. Every member that sees the same comes to the same shares.
pub fn plan(me: i64, view: &View) -> Plan {
    let mut plan = Plan::default();
    if !view.is_member(me) {
        return plan;
    }
    let is_free = |held: &Held| held.by.is_none_or(|epoch| !view.is_member(epoch));
    let of_buckets = |epoch| view.of(epoch).filter(|part| *part != Part::Whole).count();
    let buckets = view.parts.keys().filter(|part| **part != Part::Whole).count();
    let mut ranked: Vec<(usize, i64)> =
        view.members.iter().map(|member| (of_buckets(member.epoch), member.epoch)).collect();
    ranked.sort_by_key(|(count, epoch)| (std::cmp::Reverse(*count), *epoch));
    let rank = ranked.iter().position(|(_, epoch)| *epoch == me).unwrap_or(0);
    let share = buckets / ranked.len() + usize::from(rank < buckets % ranked.len());
    let mine = of_buckets(me);
    if mine > share {
        let surplus = view.of(me).filter(|part| *part != Part::Whole).collect::<Vec<_>>();
        plan.leave = surplus.into_iter().rev().take(mine - share).collect();
    }
    let free = view.parts.iter().filter(|(part, held)| **part != Part::Whole && is_free(held));
    let free: Vec<Seen> = free.map(|(part, held)| (*part, held.turn)).collect();
    let wanted = share.saturating_sub(mine).min(free.len());
    // Each begins elsewhere, so that they seldom want the same one.
    let start = (rank * free.len()) / ranked.len();
    plan.take = free.iter().cycle().skip(start).take(wanted).copied().collect();
    if let Some(held) = view.parts.get(&Part::Whole).filter(|held| is_free(held)) {
        plan.take.push((Part::Whole, held.turn));
    }
    plan
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn view(members: &[i64], parts: &[(u16, Option<i64>)]) -> View {
        let member = |epoch: &i64| Member {
            epoch: *epoch,
            owner: format!("relay-{epoch}"),
            left: Duration::from_secs(5),
            tables: BTreeSet::new(),
        };
        let parts = parts.iter().map(|(bucket, by)| (Part::Bucket(*bucket), Held { by: *by, turn: 0 }));
        View { members: members.iter().map(member).collect(), parts: parts.collect(), gates: BTreeMap::new() }
    }

    /// All members follow their plans until nobody has one.
    fn settle(view: &mut View) -> usize {
        let mut moved = 0;
        for _ in 0..100 {
            let mut quiet = true;
            for member in view.members.clone() {
                let plan = plan(member.epoch, view);
                quiet &= plan == Plan::default();
                for part in plan.leave {
                    let held = view.parts.get_mut(&part).unwrap();
                    *held = Held { by: None, turn: held.turn + 1 };
                }
                for (part, seen) in plan.take {
                    let held = view.parts.get_mut(&part).unwrap();
                    assert_eq!(held.turn, seen);
                    *held = Held { by: Some(member.epoch), turn: seen + 1 };
                    moved += 1;
                }
            }
            if quiet {
                return moved;
            }
        }
        panic!("no peace: {view:?}");
    }

    fn counts(view: &View) -> Vec<usize> {
        view.members.iter().map(|member| view.of(member.epoch).count()).collect()
    }

    #[test]
    fn the_first_takes_all_and_the_next_ones_a_share() {
        let free: Vec<_> = (0..64).map(|bucket| (bucket, None)).collect();
        let mut group = view(&[1], &free);
        assert_eq!(settle(&mut group), 64);
        let first = group.members[0].clone();
        group.members.push(Member { epoch: 2, ..first.clone() });
        assert_eq!(settle(&mut group), 32);
        group.members.push(Member { epoch: 3, ..first.clone() });
        assert_eq!(settle(&mut group), 21);
        assert_eq!(counts(&group), [22, 21, 21]);
        // One is gone: only what it had moves.
        group.members.remove(0);
        assert_eq!(settle(&mut group), 22);
        assert_eq!(counts(&group), [32, 32]);
    }

    #[test]
    fn what_is_not_shared_stays_where_it_is() {
        let mut group = view(&[1, 2], &[(0, Some(1)), (1, Some(2))]);
        group.parts.insert(Part::Whole, Held { by: Some(2), turn: 0 });
        assert_eq!(settle(&mut group), 0);
        group.parts.insert(Part::Whole, Held { by: Some(7), turn: 0 });
        settle(&mut group);
        assert_eq!(group.parts[&Part::Whole].by, Some(1), "from one who is no member any more");
    }

    #[test]
    fn who_is_no_member_plans_nothing() {
        assert_eq!(plan(9, &view(&[1], &[(0, None), (1, Some(9))])), Plan::default());
    }

    proptest! {
        #[test]
        fn shares_get_fair_and_no_more_than_is_needed_moves(
            members in 1..12_i64,
            owners in proptest::collection::vec(proptest::option::of(0..16_i64), 1..80),
        ) {
            let members: Vec<i64> = (0..members).collect();
            let parts: Vec<_> = owners.iter().enumerate().map(|(n, owner)| (n as u16, *owner)).collect();
            let mut group = view(&members, &parts);
            let live = |owner: &Option<i64>| owner.is_some_and(|epoch| members.contains(&epoch));
            let free = owners.iter().filter(|owner| !live(owner)).count();
            let mut before = counts(&group);
            before.sort_unstable_by(|a, b| b.cmp(a));
            let moved = settle(&mut group);
            let after = counts(&group);
            let (floor, extra) = (owners.len() / members.len(), owners.len() % members.len());
            prop_assert!(after.iter().all(|count| *count == floor || *count == floor + 1));
            prop_assert_eq!(after.iter().filter(|count| **count > floor).count(), extra % members.len());
            // What is free, and what those have who have too much.
            let surplus: usize = before
                .iter()
                .enumerate()
                .map(|(rank, count)| count.saturating_sub(floor + usize::from(rank < extra)))
                .sum();
            prop_assert!(moved <= free + surplus, "{} moved, {} free, {} too many", moved, free, surplus);
        }
    }
}
