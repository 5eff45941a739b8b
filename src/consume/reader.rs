//! Records in, events out. Pure: objects are fetched by somebody else.
//!
//! For each record [`Reader::accept`] says what it is. A reference is fetched and given back with
//! [`Reader::fetched`]. Between records, [`Reader::lost`] tells of sets of chunks that were given up.
//!
//! Offsets. What was handed over, an error, and chunks that wait for more hold [`Reader::safe_offsets`]
//! back at the record where they begin. So who commits those and is started again reads every event
//! that was not done from its first chunk on.

use std::{collections::HashMap, sync::Arc};

use bytes::Bytes;

use super::{
    Event, Incoming, Limits, Place, Problem, ReadError, Travelled,
    chunks::{Joined, Joiner, Partition},
    progress::Progress,
    seen::{Mark, Seen, mark},
    shape::{Chunk, Encoding, Reference, Shape},
    unfold,
};
use crate::{record::wire, store::StoreError};

/// What a record turned out to be.
#[derive(Debug)]
pub enum Step {
    /// Nothing yet: a chunk that waits for others, or a repeat of what was handed over.
    Nothing,
    Event(Event),
    /// An event whose payload is elsewhere.
    Fetch(Fetch),
}

/// An object that a record refers to.
#[derive(Clone, Debug)]
pub struct Fetch {
    record: Incoming,
    reference: Reference,
    at_most: u64,
}

impl Fetch {
    pub fn uri(&self) -> &str {
        &self.reference.uri
    }

    /// The object's size must not be above this.
    pub fn at_most(&self) -> u64 {
        self.at_most
    }

    /// There is no object, for this reason.
    pub fn refused(&self, error: StoreError) -> ReadError {
        match (error, self.reference.promised) {
            (StoreError::TooLarge { size, .. }, Some((expected, _))) => {
                let what = format!("the object {}", self.uri());
                self.failed(Problem::WrongSize { what, expected, found: size })
            }
            (StoreError::TooLarge { size, at_most, .. }, None) => {
                self.failed(Problem::TooLarge { size, at_most })
            }
            (error, _) => self.failed(Problem::Store(error)),
        }
    }

    /// There is no event, for this reason.
    pub fn failed(&self, problem: Problem) -> ReadError {
        ReadError { place: self.record.place(), problem }
    }
}

#[derive(Debug)]
pub struct Reader {
    limits: Limits,
    /// The header that has all context, where there is one.
    blob: Option<String>,
    joiner: Joiner,
    partitions: HashMap<Partition, State>,
}

#[derive(Debug, Default)]
struct State {
    progress: Progress,
    seen: Seen,
}

impl Incoming {
    fn place(&self) -> Place {
        Place { topic: self.topic.clone(), partition: self.partition, first: self.offset, last: self.offset }
    }

    fn source(&self) -> Partition {
        (self.topic.clone(), self.partition)
    }

    fn mark(&self) -> Option<Mark> {
        self.headers.get(wire::ID).map(|id| mark(self.key.as_deref(), id))
    }
}

impl Reader {
    pub fn new(limits: Limits) -> Reader {
        Reader { limits, blob: None, joiner: Joiner::new(limits), partitions: HashMap::new() }
    }

    /// The header that has all of the context: the relay's `headers.blob`.
    pub fn with_blob(self, blob: Option<String>) -> Reader {
        Reader { blob, ..self }
    }

    /// Takes the next record of a partition.
    pub fn accept(&mut self, mut record: Incoming) -> Result<Step, ReadError> {
        unfold::headers(&mut record.headers, self.blob.as_deref());
        let source = record.source();
        self.joiner.pass(&source, record.offset);
        let state = self.partitions.entry(source).or_default();
        state.progress.read(record.offset);
        if record.mark().is_some_and(|mark| state.seen.has(&mark)) {
            return Ok(Step::Nothing);
        }
        state.progress.open(record.offset);
        let place = record.place();
        match Shape::of(&record.headers, record.value.as_deref()) {
            Ok(Shape::Nothing) => {
                Ok(Step::Event(self.hand_over(record, place, None, None, Travelled::Inline)))
            }
            Ok(Shape::Inline(encoding)) => {
                let value = record.value.clone().unwrap_or_default();
                self.finish(record, place, encoding, value, Travelled::Inline).map(Step::Event)
            }
            Ok(Shape::Reference(reference)) => self.refer(record, reference),
            Ok(Shape::Chunk(chunk)) => self.join(record, chunk),
            Err(problem) => Err(ReadError { place, problem }),
        }
    }

    fn refer(&mut self, record: Incoming, reference: Reference) -> Result<Step, ReadError> {
        let at_most = self.limits.payload_bytes as u64;
        match reference.promised {
            Some((size, _)) if size > at_most => {
                Err(ReadError { place: record.place(), problem: Problem::TooLarge { size, at_most } })
            }
            promised => {
                let at_most = promised.map_or(at_most, |(size, _)| size);
                Ok(Step::Fetch(Fetch { record, reference, at_most }))
            }
        }
    }

    /// The object that was asked for, checked and decoded.
    pub fn fetched(&mut self, fetch: Fetch, object: Bytes) -> Result<Event, ReadError> {
        let what = || format!("the object {}", fetch.reference.uri);
        let problem = match fetch.reference.promised {
            Some((expected, _)) if expected != object.len() as u64 => {
                Some(Problem::WrongSize { what: what(), expected, found: object.len() as u64 })
            }
            Some((_, sha256)) if sha256 != wire::sha256(&object) => {
                Some(Problem::WrongChecksum { what: what() })
            }
            None if object.len() > self.limits.payload_bytes => {
                let (size, at_most) = (object.len() as u64, self.limits.payload_bytes as u64);
                Some(Problem::TooLarge { size, at_most })
            }
            _ => None,
        };
        if let Some(problem) = problem {
            return Err(fetch.failed(problem));
        }
        let place = fetch.record.place();
        self.finish(fetch.record, place, fetch.reference.encoding, object, Travelled::Reference)
    }

    fn join(&mut self, record: Incoming, chunk: Chunk) -> Result<Step, ReadError> {
        let (source, count, encoding) = (record.source(), chunk.whole.count, chunk.whole.encoding.clone());
        let slice = record.value.clone().unwrap_or_default();
        let joined = self.joiner.add(&source, record.offset, record.key.as_ref(), chunk, slice);
        let first = match &joined {
            Ok(Joined::Waits { first } | Joined::Whole { first, .. }) | Err((first, _)) => Some(*first),
            Ok(Joined::Ignored) => None,
        };
        // The first chunk of a set holds commits back for all of it.
        if first != Some(record.offset) {
            self.partitions.entry(source).or_default().progress.close(record.offset);
        }
        match joined {
            Ok(Joined::Whole { first, bytes }) => {
                let place = Place { first, ..record.place() };
                self.finish(record, place, encoding, bytes, Travelled::Chunks(count)).map(Step::Event)
            }
            Ok(_) => Ok(Step::Nothing),
            Err((first, problem)) => Err(ReadError { place: Place { first, ..record.place() }, problem }),
        }
    }

    fn finish(
        &mut self,
        mut record: Incoming,
        place: Place,
        encoding: Option<Encoding>,
        bytes: Bytes,
        travelled: Travelled,
    ) -> Result<Event, ReadError> {
        let (payload, still) = match encoding {
            None => (bytes, None),
            Some(Encoding::Own(name)) => (bytes, Some(name)),
            Some(Encoding::Codec(codec)) => match codec.decode(&bytes, self.limits.payload_bytes) {
                Ok(payload) => (payload.into(), None),
                Err(error) => return Err(ReadError { place, problem: error.into() }),
            },
        };
        let payload = unfold::structured(&mut record.headers, payload);
        Ok(self.hand_over(record, place, payload, still, travelled))
    }

    fn hand_over(
        &mut self,
        record: Incoming,
        place: Place,
        payload: Option<Bytes>,
        still_encoded: Option<String>,
        travelled: Travelled,
    ) -> Event {
        let source = record.source();
        let state = self.partitions.entry(source.clone()).or_default();
        if let Some(mark) = record.mark() {
            state.seen.insert(mark, self.limits.remembered_ids);
        }
        if let Some(event) = record.headers.text(wire::ID) {
            for first in self.joiner.supersede(&source, event) {
                state.progress.close(first);
            }
        }
        let Incoming { key, headers, timestamp_ms, .. } = record;
        Event { place, timestamp_ms, key, payload, still_encoded, headers, travelled }
    }

    /// The next set of chunks that was given up. Ask after each record, until there is none.
    pub fn lost(&mut self) -> Option<ReadError> {
        let lost = self.joiner.lost()?;
        let (topic, partition) = lost.partition;
        Some(ReadError {
            place: Place { topic, partition, first: lost.first, last: lost.last },
            problem: lost.problem,
        })
    }

    /// The event is processed, or the error is looked at: it holds commits back no longer.
    pub fn done(&mut self, place: &Place) {
        if let Some(state) = self.partitions.get_mut(&(place.topic.clone(), place.partition)) {
            state.progress.close(place.first);
        }
    }

    /// For each partition the offset to commit, and to start from again: nothing that is not done, and no
    /// chunk of an event that is not complete, lies before it.
    pub fn safe_offsets(&self) -> impl Iterator<Item = (&Arc<str>, i32, i64)> {
        self.partitions
            .iter()
            .filter_map(|((topic, partition), state)| Some((topic, *partition, state.progress.safe()?)))
    }

    /// The same, for one of them.
    pub fn safe_offset(&self, topic: &Arc<str>, partition: i32) -> Option<i64> {
        self.partitions.get(&(topic.clone(), partition))?.progress.safe()
    }

    /// Forgets a partition: somebody else reads it now, or it is read again from an earlier offset.
    pub fn forget(&mut self, topic: &Arc<str>, partition: i32) {
        let source = (topic.clone(), partition);
        self.joiner.forget(&source);
        self.partitions.remove(&source);
    }
}
