//! The sink and the broker behind it, with librdkafka's and Kafka's behaviour where it matters:
//! batches by partition, in order; a refused batch kills the pipelined producer; a broker that knows
//! nothing of a producer on a partition lets in whatever comes next; answers get lost; what an old
//! producer had sent may land late.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    sync::Mutex,
    time::Duration,
};

use rdkafka::types::RDKafkaErrorCode as Code;

use super::{PARTITIONS, Table};
use crate::{
    record::{Record, wire},
    relay::topics::partition_of,
    sink::{Found, PositionRecord, Report, Sink, Ticket, TopicFacts, Unit},
};

type Partition = (String, usize);

/// How the topics for dead letters end.
const DEAD_LETTERS: &str = ".dlq";

#[derive(Clone, Debug)]
struct Sent {
    unit: Unit,
    ticket: Ticket,
    partition: Partition,
    id: String,
    /// Which of how many records of its event.
    chunk: (usize, usize),
    referred: bool,
    poisoned: bool,
}

#[derive(Debug, Default)]
pub struct Broker {
    /// On its way to the broker, in the order of sending.
    queue: Mutex<VecDeque<Sent>>,
    /// What old producers had sent and may still land, each a run of one partition.
    late: Vec<VecDeque<Sent>>,
    /// Partitions on which the broker knows the pipelined producer.
    known: HashSet<Partition>,
    /// The order of first appearances; an event of several records appears with the last of them.
    pub first: HashMap<String, usize>,
    /// The chunks that were seen of an event.
    chunks: HashMap<String, HashSet<usize>>,
    /// Events that came in chunks, and whose payload came as a reference.
    pub chunked: HashSet<String>,
    pub referred: HashSet<String>,
    /// The events whose dead letter was written.
    pub dead: HashSet<String>,
    pub refused: usize,
    pub rebuilt: usize,
    /// Exactly once: what was written is seen when its transaction is committed.
    transactional: bool,
    open: Vec<Sent>,
    /// Something failed in it: it cannot be committed.
    doomed: bool,
    /// The last records of the position topic.
    pub positions: HashMap<String, Vec<u8>>,
}

impl Sink for Broker {
    fn send(&self, unit: Unit, ticket: Ticket, record: &Record<'_>) -> Result<(), Code> {
        let count = if record.topic == "single" { 1 } else { PARTITIONS as usize };
        let partition = record.key.as_deref().and_then(|key| partition_of(key, count)).unwrap_or(0);
        let header = |name: &str| {
            let (_, value) = record.headers.iter().find(|(found, _)| found == name)?;
            Some(String::from_utf8(value.clone().unwrap().into_owned()).unwrap())
        };
        let number = |name| header(name).map(|value| value.parse().unwrap());
        self.queue.lock().unwrap().push_back(Sent {
            unit,
            ticket,
            partition: (record.topic.clone().into_owned(), partition),
            id: header("id").unwrap(),
            chunk: number(wire::CHUNK_INDEX).zip(number(wire::CHUNK_COUNT)).unwrap_or((0, 1)),
            referred: header(wire::REF_URI).is_some(),
            poisoned: record.payload.as_deref() == Some(b"poison") && !record.topic.ends_with(DEAD_LETTERS),
        });
        Ok(())
    }

    async fn reports(&self) -> Vec<Report> {
        std::future::pending().await
    }

    async fn rebuild(&self, _: usize) -> Result<(), rdkafka::error::KafkaError> {
        std::future::pending().await
    }

    async fn take_over(&self, _: String, _: usize, _: bool) -> Result<Option<Found>, String> {
        std::future::pending().await
    }

    fn commit(&self, _: Vec<PositionRecord>) -> impl Future<Output = Result<(), String>> + Send + 'static {
        std::future::pending()
    }

    fn abort(&self) -> impl Future<Output = Result<(), String>> + Send + 'static {
        std::future::pending()
    }

    fn look_up(
        &self,
        _: String,
        _: Duration,
    ) -> impl Future<Output = Result<TopicFacts, Code>> + Send + 'static {
        std::future::pending()
    }
}

impl Broker {
    pub fn of(transactional: bool) -> Broker {
        Broker { transactional, ..Broker::default() }
    }

    pub fn has(&self, id: &str) -> bool {
        self.first.contains_key(id)
    }

    pub fn sent(&self) -> usize {
        self.queue.lock().unwrap().len() + self.first.len()
    }

    pub fn commit(&mut self, position: Vec<PositionRecord>, tables: &[Table]) -> Result<(), String> {
        if self.doomed {
            return Err("some of it was refused".into());
        }
        assert!(self.queue.lock().unwrap().is_empty(), "committed before everything was acknowledged");
        for sent in std::mem::take(&mut self.open) {
            self.show(&sent, tables);
        }
        let part = self.chunks.iter().find(|(id, _)| !self.first.contains_key(*id));
        assert!(part.is_none(), "a part of an event was committed: {part:?}");
        self.positions.extend(position);
        Ok(())
    }

    pub fn abort(&mut self) {
        self.open.clear();
        self.doomed = false;
    }

    fn write(&mut self, sent: &Sent, tables: &[Table]) {
        match self.transactional {
            true => self.open.push(sent.clone()),
            false => self.show(sent, tables),
        }
    }

    /// A consumer sees it; nothing of its lane that is earlier may be unseen.
    fn show(&mut self, sent: &Sent, tables: &[Table]) {
        if sent.partition.0.ends_with(DEAD_LETTERS) {
            let new = self.dead.insert(sent.id.clone());
            assert!(new || !self.transactional, "the dead letter of {} is seen twice", sent.id);
            return;
        }
        let (index, count) = sent.chunk;
        let seen = self.chunks.entry(sent.id.clone()).or_default();
        let new = seen.insert(index);
        assert!(new || !self.transactional, "{} is seen twice", sent.id);
        if seen.len() == count {
            let place = self.first.len();
            self.first.entry(sent.id.clone()).or_insert(place);
        }
        if count > 1 {
            self.chunked.insert(sent.id.clone());
        }
        if sent.referred {
            self.referred.insert(sent.id.clone());
        }
        let (table, number) = sent.id.split_once('-').unwrap();
        let table: &Table = &tables[table.parse::<usize>().unwrap()];
        for earlier in table.before(number.parse().unwrap()) {
            let earlier = table.id(earlier);
            assert!(self.has(&earlier) || self.dead.contains(&earlier), "{} overtook {earlier}", sent.id);
        }
    }

    /// The broker takes the next batch of some partition, or something goes wrong.
    pub fn turn(&mut self, random: &mut fastrand::Rng, faults: bool, tables: &[Table]) -> Vec<Report> {
        if !self.late.is_empty() && random.bool() {
            let run = random.usize(..self.late.len());
            match self.late[run].pop_front() {
                Some(sent) => self.write(&sent, tables),
                None => {
                    self.late.swap_remove(run);
                }
            }
            return Vec::new();
        }
        let queue = std::mem::take(&mut *self.queue.lock().unwrap());
        let Some(first) = queue.front() else { return Vec::new() };
        let partition = queue[random.usize(..queue.len())].partition.clone();
        if faults && random.u32(0..60) == 0 {
            return self.die(random, &queue, tables);
        }
        let size = random.usize(1..5);
        let unit = queue.iter().find(|sent| sent.partition == partition).unwrap_or(first).unit;
        let mut batch = Vec::new();
        let mut rest = VecDeque::new();
        for sent in queue {
            match sent.partition == partition && sent.unit == unit && batch.len() < size {
                true => batch.push(sent),
                false => rest.push_back(sent),
            }
        }
        let reports = if faults && unit == Unit::Suspects && random.u32(0..3) == 0 {
            // The careful producer is new, and is told that the topic is not there.
            self.doomed = true;
            batch.iter().map(|sent| failed(sent, Code::UnknownTopicOrPartition)).collect()
        } else if batch.iter().any(|sent| sent.poisoned) {
            self.refused += 1;
            self.doomed = true;
            let mut reports: Vec<Report> =
                batch.iter().map(|sent| failed(sent, Code::PolicyViolation)).collect();
            if unit == Unit::Main {
                // The rest of the producer is told off, but requests in flight on a partition where the
                // broker knows nothing of it are taken all the same.
                let hole = !self.known.contains(&partition);
                for sent in take(&mut rest, |sent| sent.unit == Unit::Main) {
                    if hole && sent.partition == partition && !sent.poisoned {
                        self.write(&sent, tables);
                    }
                    reports.push(failed(&sent, Code::GaplessGuarantee));
                }
            }
            reports
        } else {
            if unit == Unit::Main {
                self.known.insert(partition);
            }
            batch.iter().for_each(|sent| self.write(sent, tables));
            batch.iter().map(|sent| Report { ticket: sent.ticket, result: Ok(()) }).collect()
        };
        *self.queue.lock().unwrap() = rest;
        reports
    }

    /// The pipelined producer fails for good. A part of what it had was written, and nobody knows.
    fn die(&mut self, random: &mut fastrand::Rng, queue: &VecDeque<Sent>, tables: &[Table]) -> Vec<Report> {
        self.doomed = true;
        let mut cut: HashSet<Partition> = HashSet::new();
        for sent in queue {
            if sent.poisoned || random.bool() {
                cut.insert(sent.partition.clone());
            }
            if !cut.contains(&sent.partition) {
                self.write(sent, tables);
            }
        }
        queue.iter().map(|sent| failed(sent, Code::Fatal)).collect()
    }

    /// New producers. Of what the old ones had sent, a run of each partition may land later.
    pub fn rebuild(&mut self, random: &mut fastrand::Rng) {
        self.rebuilt += 1;
        self.known.clear();
        if self.transactional {
            // The old ones are fenced: what they have sent cannot be seen any more.
            self.queue.lock().unwrap().clear();
            return self.abort();
        }
        let mut runs: HashMap<Partition, VecDeque<Sent>> = HashMap::new();
        let mut cut: HashSet<Partition> = HashSet::new();
        for sent in std::mem::take(&mut *self.queue.lock().unwrap()) {
            if sent.poisoned || sent.unit == Unit::Suspects || random.u32(0..3) == 0 {
                cut.insert(sent.partition.clone());
            }
            if !cut.contains(&sent.partition) {
                runs.entry(sent.partition.clone()).or_default().push_back(sent);
            }
        }
        // In a fixed order: a history is a function of its seed.
        let mut runs: Vec<_> = runs.into_iter().collect();
        runs.sort_by(|a, b| a.0.cmp(&b.0));
        self.late.extend(runs.into_iter().map(|(_, run)| run));
    }
}

fn failed(sent: &Sent, code: Code) -> Report {
    Report { ticket: sent.ticket, result: Err(code) }
}

/// Takes out what `which` says, in order.
fn take(queue: &mut VecDeque<Sent>, which: impl Fn(&Sent) -> bool) -> VecDeque<Sent> {
    let (taken, left) = std::mem::take(queue).into_iter().partition(which);
    *queue = left;
    taken
}
