//! How the relays of one source share its work: who is a member, who has which part, and what one of
//! them should take or let go. Pure: the database keeps the truth, [`super::keeper`] asks it.
//!
//! A part has one owner, by the number of its membership. It changes hands in two ways only: its owner
//! lets it go, or its owner's membership is gone from the database, and with it the right to record
//! anything. Both are seen before the part is taken, and it is taken only as it was seen.
//!
//! Exactly once the right to record is not all that matters: what a relay that is gone has published is found by whoever
//! fences its producers, which belong to a slot. So nobody takes a part of a relay that is gone and had a slot: one
//! other relay inherits all that it had, slot and parts, in one statement ([`Plan::inherit`]), and lets go of what is
//! too much for it once that is settled.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};

/// The number of no membership. Exactly once it has what nobody knows the last owner of, because the table `parts` is new
/// and the source has positions: as of a relay that is gone, all of that is inherited by one.
pub const UNKNOWN: i64 = 0;

/// One relay works on a part at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    /// The tables that are not shared: those that follow the log, and those that keep their rows.
    Whole,
    /// Of every shared table, the keys whose hash falls into this bucket.
    Bucket(u16),
    /// Exactly once: the right to produce, as a delivery unit. A relay has one, and that of a relay that is gone until
    /// what that one left is settled.
    Slot(u16),
}

impl Part {
    /// As its row has it.
    pub fn number(self) -> i32 {
        match self {
            Part::Whole => -1,
            Part::Bucket(n) => i32::from(n),
            Part::Slot(n) => -2 - i32::from(n),
        }
    }

    pub fn of_number(number: i32) -> Option<Part> {
        match number {
            -1 => Some(Part::Whole),
            0.. => u16::try_from(number).ok().map(Part::Bucket),
            _ => u16::try_from(-2 - number).ok().map(Part::Slot),
        }
    }

    pub fn is_bucket(self) -> bool {
        matches!(self, Part::Bucket(_))
    }

    pub fn is_slot(self) -> bool {
        matches!(self, Part::Slot(_))
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

    fn has_slot(&self, epoch: i64) -> bool {
        self.of(epoch).any(Part::is_slot)
    }

    fn buckets_of(&self, epoch: i64) -> usize {
        self.of(epoch).filter(|part| part.is_bucket()).count()
    }
}

/// What a member should do to come nearer to a fair share.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Plan {
    /// Parts to take, as they were seen.
    pub take: Vec<Seen>,
    /// Parts to let go, once nothing of them is in flight.
    pub leave: BTreeSet<Part>,
    /// A membership that is gone and had a slot: everything that it had is to be taken.
    pub inherit: Option<i64>,
}

/// `units`: exactly once, how many relays may work, each with a slot; else all of them do.
///
/// Every member that sees the same comes to the same.
pub fn plan(me: i64, units: Option<u16>, view: &View) -> Plan {
    let mut workers: Vec<i64> = view.members.iter().map(|member| member.epoch).collect();
    if let Some(units) = units {
        // What a relay has left comes first, then a slot, then the work.
        let succession = succession(me, units, view);
        if succession != Plan::default() {
            return succession;
        }
        workers.retain(|epoch| view.has_slot(*epoch));
    }
    let is_free = |held: &Held| {
        let heirs = |epoch| units.is_some() && view.has_slot(epoch);
        held.by.is_none_or(|epoch| !view.is_member(epoch) && !heirs(epoch))
    };
    share(me, workers, is_free, view)
}

/// Who inherits from whom, and who takes which slot. Those that stand by come first: it is no pause of anything.
fn succession(me: i64, units: u16, view: &View) -> Plan {
    let slots = || view.parts.iter().filter(|(part, _)| part.is_slot());
    let gone = slots().filter_map(|(_, held)| held.by).filter(|epoch| !view.is_member(*epoch));
    let gone: Vec<i64> = gone.collect::<BTreeSet<_>>().into_iter().collect();
    let members: BTreeSet<i64> = view.members.iter().map(|member| member.epoch).collect();
    let (mut workers, mut idle): (Vec<i64>, Vec<i64>) =
        members.into_iter().partition(|epoch| view.has_slot(*epoch));
    idle.truncate(usize::from(units).saturating_sub(workers.len()));
    let mut plan = Plan::default();
    if let Some(rank) = idle.iter().position(|epoch| *epoch == me) {
        let is_ours = |part: &Part| matches!(part, Part::Slot(n) if *n < units);
        let free = slots().filter(|(part, held)| is_ours(part) && held.by.is_none());
        let mut free = free.map(|(part, held)| (*part, held.turn));
        match rank.checked_sub(gone.len()) {
            None => plan.inherit = Some(gone[rank]),
            Some(rank) => plan.take.extend(free.nth(rank)),
        }
    } else {
        workers.sort_by_key(|epoch| (view.buckets_of(*epoch), *epoch));
        let left = gone.iter().skip(idle.len());
        let mut heirs = left.zip(workers.iter().cycle()).filter(|(_, heir)| **heir == me);
        plan.inherit = heirs.next().map(|(epoch, _)| *epoch);
    }
    plan
}

/// Fair shares differ by one bucket at most, and those who have more already keep it: as few buckets as
/// possible move.
fn share(me: i64, workers: Vec<i64>, is_free: impl Fn(&Held) -> bool, view: &View) -> Plan {
    let mut plan = Plan::default();
    let buckets = view.parts.keys().filter(|part| part.is_bucket()).count();
    let mut ranked: Vec<(usize, i64)> =
        workers.into_iter().map(|epoch| (view.buckets_of(epoch), epoch)).collect();
    ranked.sort_by_key(|(count, epoch)| (std::cmp::Reverse(*count), *epoch));
    let Some(rank) = ranked.iter().position(|(_, epoch)| *epoch == me) else { return plan };
    let share = buckets / ranked.len() + usize::from(rank < buckets % ranked.len());
    let mine = view.buckets_of(me);
    if mine > share {
        let surplus = view.of(me).filter(|part| part.is_bucket()).collect::<Vec<_>>();
        plan.leave = surplus.into_iter().rev().take(mine - share).collect();
    }
    let free = view.parts.iter().filter(|(part, held)| part.is_bucket() && is_free(held));
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
                let plan = plan(member.epoch, None, view);
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
        assert_eq!(plan(9, None, &view(&[1], &[(0, None), (1, Some(9))])), Plan::default());
    }

    /// What all of them would do next, by their numbers.
    fn plans(units: u16, view: &View) -> Vec<(i64, Plan)> {
        let plan = |member: &Member| (member.epoch, plan(member.epoch, Some(units), view));
        view.members.iter().map(plan).filter(|(_, plan)| *plan != Plan::default()).collect()
    }

    fn takes(parts: &[Part]) -> Plan {
        Plan { take: parts.iter().map(|part| (*part, 0)).collect(), ..Plan::default() }
    }

    fn inherits(epoch: i64) -> Plan {
        Plan { inherit: Some(epoch), ..Plan::default() }
    }

    #[test]
    fn as_many_relays_work_as_there_are_slots() {
        let mut group = view(&[1, 2, 3], &[(0, None), (1, None)]);
        group.parts.extend([0, 1, 2].map(|slot| (Part::Slot(slot), Held::default())));
        let (first, second) = (takes(&[Part::Slot(0)]), takes(&[Part::Slot(1)]));
        assert_eq!(plans(2, &group), [(1, first), (2, second)], "a slot comes before the work");
        group.parts.insert(Part::Slot(0), Held { by: Some(1), turn: 1 });
        group.parts.insert(Part::Slot(1), Held { by: Some(2), turn: 1 });
        let (first, second) = (takes(&[Part::Bucket(0)]), takes(&[Part::Bucket(1)]));
        assert_eq!(plans(2, &group), [(1, first), (2, second)], "the third stands by");
    }

    #[test]
    fn what_a_relay_with_a_slot_has_left_is_inherited_by_one_and_taken_by_nobody() {
        let mut group = view(&[2, 3], &[(0, Some(1)), (1, Some(2)), (2, Some(9))]);
        let held = |epoch| Held { by: Some(epoch), turn: 0 };
        group.parts.extend([(Part::Whole, held(1)), (Part::Slot(0), held(1)), (Part::Slot(1), held(2))]);
        // 9 never had a slot.
        assert_eq!(plans(2, &group), [(2, takes(&[Part::Bucket(2)])), (3, inherits(1))]);
        // Nobody stands by: one that works does it, the one with less to do.
        group.parts.insert(Part::Slot(2), held(3));
        group.parts.remove(&Part::Bucket(2));
        assert_eq!(plans(3, &group), [(3, inherits(1))]);
        group.parts.insert(Part::Slot(3), held(4));
        assert_eq!(plans(3, &group), [(2, inherits(4)), (3, inherits(1))]);
        // And where too many work, nobody else begins to.
        group.members.push(Member { epoch: 5, ..group.members[0].clone() });
        assert_eq!(plans(2, &group), [(2, inherits(4)), (3, inherits(1))]);
    }

    #[test]
    fn a_part_is_known_by_its_number() {
        for part in [Part::Whole, Part::Bucket(0), Part::Bucket(511), Part::Slot(0), Part::Slot(63)] {
            assert_eq!(Part::of_number(part.number()), Some(part));
        }
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
