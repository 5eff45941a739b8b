//! Slices in, wholes out: sets of chunks that are not complete yet, in bounded memory.
//!
//! Pure. Chunks of several sets lie between one another, may come again, and may never be followed by
//! the rest. A set takes its whole size of the memory from its first chunk on, so a set that has begun is
//! not short of room later; to begin one, the stalest others are given up. A set that was given up
//! begins anew with its chunk 0 and not before: the rest of it alone would never be complete.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    sync::Arc,
};

use bytes::Bytes;

use super::{
    Limits, Problem,
    shape::{Chunk, Whole},
};
use crate::record::wire;

/// A topic's partition.
pub type Partition = (Arc<str>, i32);

/// What a slice costs beside its bytes.
const SLICE_COST: usize = 64;

/// The sets of a partition that were given up and are remembered.
const GIVEN_UP: usize = 1000;

/// What came of a chunk.
#[derive(Debug, PartialEq, Eq)]
pub enum Joined {
    /// The set that begins at this offset waits for more.
    Waits { first: i64 },
    /// A chunk of a set that was given up.
    Ignored,
    /// All are there, and are what they were promised to be.
    Whole { first: i64, bytes: Bytes },
}

/// A set that is no more, and where it began.
#[derive(Debug)]
pub struct Lost {
    pub partition: Partition,
    pub first: i64,
    pub last: i64,
    pub problem: Problem,
}

#[derive(Debug)]
pub struct Joiner {
    limits: Limits,
    partitions: HashMap<Partition, Sets>,
    /// Memory and number of all sets.
    taken: usize,
    sets: usize,
    /// Counts chunks, so that the stalest set can be told.
    clock: u64,
    lost: VecDeque<Lost>,
}

#[derive(Debug, Default)]
struct Sets {
    by_id: HashMap<String, Set>,
    given_up: VecDeque<String>,
    /// No set is overdue before this offset.
    none_overdue_before: i64,
}

#[derive(Debug)]
struct Set {
    whole: Whole,
    key: Option<Bytes>,
    /// The slices from 0 on without a gap, and where each ends. Chunks come in order, but for faults: so the whole
    /// is there once and not twice.
    joined: Vec<u8>,
    ends: Vec<usize>,
    /// Those behind a gap.
    ahead: BTreeMap<u32, Bytes>,
    bytes: u64,
    first: i64,
    last: i64,
    touched: u64,
}

impl Joiner {
    pub fn new(limits: Limits) -> Joiner {
        Joiner { limits, partitions: HashMap::new(), taken: 0, sets: 0, clock: 0, lost: VecDeque::new() }
    }

    /// Takes a chunk. An error ends its set; the offset is where that began.
    pub fn add(
        &mut self,
        partition: &Partition,
        offset: i64,
        key: Option<&Bytes>,
        chunk: Chunk,
        slice: Bytes,
    ) -> Result<Joined, (i64, Problem)> {
        self.clock += 1;
        let sets = self.partitions.entry(partition.clone()).or_default();
        if !sets.by_id.contains_key(&chunk.id) {
            if let Some(at) = sets.given_up.iter().position(|id| *id == chunk.id) {
                if chunk.index > 0 {
                    return Ok(Joined::Ignored);
                }
                sets.given_up.remove(at);
            }
            if let Err(problem) = self.begin(partition, offset, key, &chunk) {
                self.remember(partition, chunk.id);
                return Err((offset, problem));
            }
        }
        let sets = self.partitions.entry(partition.clone()).or_default();
        let Some(set) = sets.by_id.get_mut(&chunk.id) else { return Ok(Joined::Ignored) };
        set.first = set.first.min(offset);
        set.last = set.last.max(offset);
        set.touched = self.clock;
        let first = set.first;
        match set.take(key, &chunk, slice) {
            Ok(false) => Ok(Joined::Waits { first }),
            Ok(true) => {
                let joined =
                    self.end(partition, &chunk.id).map_or(Ok(Bytes::new()), |set| set.join(&chunk.id));
                joined.map(|bytes| Joined::Whole { first, bytes }).map_err(|problem| (first, problem))
            }
            Err(why) => {
                self.give_up(partition, &chunk.id);
                Err((first, Problem::Conflict { id: chunk.id, why }))
            }
        }
    }

    fn begin(
        &mut self,
        partition: &Partition,
        offset: i64,
        key: Option<&Bytes>,
        chunk: &Chunk,
    ) -> Result<(), Problem> {
        let cost = cost(&chunk.whole);
        let at_most = self.limits.payload_bytes.min(self.limits.chunk_bytes);
        if chunk.whole.size > at_most as u64 || cost > self.limits.chunk_bytes {
            return Err(Problem::TooLarge { size: chunk.whole.size, at_most: at_most as u64 });
        }
        while self.taken + cost > self.limits.chunk_bytes || self.sets >= self.limits.chunk_sets.max(1) {
            let Some((partition, id)) = self.stalest() else { break };
            if let Some(set) = self.give_up(&partition, &id) {
                let (event, have, count) = (set.whole.event.clone(), set.have(), set.whole.count);
                let problem = Problem::NoRoom { id, event, have, count };
                self.lost.push_back(Lost { partition, first: set.first, last: set.last, problem });
            }
        }
        self.taken += cost;
        self.sets += 1;
        let set = Set {
            whole: chunk.whole.clone(),
            key: key.cloned(),
            // Costs nothing before it is written to, and is never moved.
            joined: Vec::with_capacity(chunk.whole.size as usize),
            ends: Vec::new(),
            ahead: BTreeMap::new(),
            bytes: 0,
            first: offset,
            last: offset,
            touched: self.clock,
        };
        let sets = self.partitions.entry(partition.clone()).or_default();
        sets.by_id.insert(chunk.id.clone(), set);
        sets.none_overdue_before = sets.none_overdue_before.min(offset.saturating_add(self.limits.chunk_gap));
        Ok(())
    }

    fn stalest(&self) -> Option<(Partition, String)> {
        let all = self.partitions.iter().flat_map(|(partition, sets)| {
            sets.by_id.iter().map(move |(id, set)| (set.touched, partition, id))
        });
        all.min_by_key(|(touched, ..)| *touched).map(|(_, partition, id)| (partition.clone(), id.clone()))
    }

    /// A record of the partition was read: sets that have waited for too long are given up.
    pub fn pass(&mut self, partition: &Partition, offset: i64) {
        let gap = self.limits.chunk_gap;
        let Some(sets) = self.partitions.get_mut(partition) else { return };
        if sets.by_id.is_empty() || offset < sets.none_overdue_before {
            return;
        }
        let due = |set: &Set| set.last.saturating_add(gap);
        let overdue: Vec<String> =
            sets.by_id.iter().filter(|(_, set)| due(set) < offset).map(|(id, _)| id.clone()).collect();
        sets.none_overdue_before =
            sets.by_id.values().map(due).filter(|due| *due >= offset).min().unwrap_or(0);
        for id in overdue {
            if let Some(set) = self.give_up(partition, &id) {
                let (event, have, count) = (set.whole.event.clone(), set.have(), set.whole.count);
                let problem = Problem::Expired { id, event, have, count, gap };
                let partition = partition.clone();
                self.lost.push_back(Lost { partition, first: set.first, last: set.last, problem });
            }
        }
    }

    /// The event has come whole: what there is of it besides was left by a crash. Where those began.
    pub fn supersede(&mut self, partition: &Partition, event: &str) -> Vec<i64> {
        let Some(sets) = self.partitions.get(partition) else { return Vec::new() };
        let of_it = sets.by_id.iter().filter(|(_, set)| set.whole.event.as_deref() == Some(event));
        let ids: Vec<String> = of_it.map(|(id, _)| id.clone()).collect();
        ids.iter().filter_map(|id| self.end(partition, id)).map(|set| set.first).collect()
    }

    /// The next set that was given up for lack of room or because it waited for too long.
    pub fn lost(&mut self) -> Option<Lost> {
        self.lost.pop_front()
    }

    /// Forgets a partition, which somebody else reads now.
    pub fn forget(&mut self, partition: &Partition) {
        self.lost.retain(|lost| lost.partition != *partition);
        let ids = self.partitions.get(partition).map(|sets| sets.by_id.keys().cloned().collect::<Vec<_>>());
        for id in ids.unwrap_or_default() {
            self.end(partition, &id);
        }
        self.partitions.remove(partition);
    }

    fn give_up(&mut self, partition: &Partition, id: &str) -> Option<Set> {
        let set = self.end(partition, id)?;
        self.remember(partition, id.to_owned());
        Some(set)
    }

    fn remember(&mut self, partition: &Partition, id: String) {
        let given_up = &mut self.partitions.entry(partition.clone()).or_default().given_up;
        given_up.push_back(id);
        if given_up.len() > GIVEN_UP {
            given_up.pop_front();
        }
    }

    fn end(&mut self, partition: &Partition, id: &str) -> Option<Set> {
        let set = self.partitions.get_mut(partition)?.by_id.remove(id)?;
        self.taken -= cost(&set.whole);
        self.sets -= 1;
        Some(set)
    }
}

/// The memory of a set, at most.
fn cost(whole: &Whole) -> usize {
    let size = usize::try_from(whole.size).unwrap_or(usize::MAX);
    size.saturating_add((whole.count as usize).saturating_mul(SLICE_COST))
}

impl Set {
    /// Whether the set is complete now.
    fn take(&mut self, key: Option<&Bytes>, chunk: &Chunk, slice: Bytes) -> Result<bool, &'static str> {
        if self.whole != chunk.whole {
            return Err("they differ in count, size, sha256, encoding or event");
        }
        if self.key.as_ref() != key {
            return Err("they differ in their key");
        }
        if let Some(known) = self.slice(chunk.index) {
            return if *known == *slice { Ok(false) } else { Err("a chunk that came again has other bytes") };
        }
        if slice.is_empty() && self.whole.size > 0 {
            return Err("a chunk is empty");
        }
        self.bytes += slice.len() as u64;
        if self.bytes > self.whole.size {
            return Err("they are larger than their whole");
        }
        self.ahead.insert(chunk.index, slice);
        while let Some(next) = self.ahead.remove(&(self.ends.len() as u32)) {
            self.joined.extend_from_slice(&next);
            self.ends.push(self.joined.len());
        }
        Ok(self.ends.len() == self.whole.count as usize)
    }

    fn slice(&self, index: u32) -> Option<&[u8]> {
        let at = index as usize;
        match self.ends.get(at) {
            Some(end) => Some(&self.joined[at.checked_sub(1).map_or(0, |before| self.ends[before])..*end]),
            None => self.ahead.get(&index).map(|slice| &**slice),
        }
    }

    fn have(&self) -> usize {
        self.ends.len() + self.ahead.len()
    }

    /// The whole.
    fn join(self, id: &str) -> Result<Bytes, Problem> {
        let what = || format!("the whole of chunks {id}");
        if self.bytes != self.whole.size {
            return Err(Problem::WrongSize { what: what(), expected: self.whole.size, found: self.bytes });
        }
        if wire::sha256(&self.joined) != self.whole.sha256 {
            return Err(Problem::WrongChecksum { what: what() });
        }
        Ok(self.joined.into())
    }
}
