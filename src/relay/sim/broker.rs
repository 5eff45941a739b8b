//! The sink and the broker behind it, with librdkafka's and Kafka's behaviour where it matters:
//! batches by partition, in order; a refused batch kills the pipelined producer; a broker that knows
//! nothing of a producer on a partition lets in whatever comes next; answers get lost; what an old
//! producer had sent may land late.

use std::{
    collections::{BTreeMap, HashMap, HashSet, VecDeque},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use rdkafka::types::RDKafkaErrorCode as Code;
use tokio_util::sync::CancellationToken;

use super::{PARTITIONS, Table};
use crate::{
    record::{Landed, Record, wire},
    relay::topics::partition_of,
    sink::{Found, PositionRecord, Report, Sink, Ticket, TopicFacts, Unit, Units},
};

type Partition = (String, usize);

/// What was written in a transaction, and whether it cannot be committed, because something failed in it.
pub type Written = (Vec<Sent>, bool);

/// How the topics for dead letters end.
const DEAD_LETTERS: &str = ".dlq";

#[derive(Clone, Debug)]
pub struct Sent {
    unit: Unit,
    /// Of which transaction it is.
    transaction: usize,
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
    /// Counts the transactions: two producers have them by turns.
    transactions: AtomicUsize,
    /// Those that are open, by their number.
    open: BTreeMap<usize, Written>,
    /// Those that were told how to end: each call is made on a thread of its own.
    ending: Vec<Written>,
    /// One of them was not committed: nothing is, until there are other producers.
    broken: bool,
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
            transaction: self.transaction(),
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

    async fn take_over(
        &self,
        _: Units,
        _: usize,
        _: bool,
        _: CancellationToken,
    ) -> Result<Option<Found>, String> {
        std::future::pending().await
    }

    fn relieve(&self) {
        self.transactions.fetch_add(1, Ordering::Relaxed);
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

    fn transaction(&self) -> usize {
        self.transactions.load(Ordering::Relaxed)
    }

    /// The relay commits the transaction before the one that it sends in, or drops that.
    pub fn ends(&mut self, commits: bool) {
        let ends = if commits { self.transaction() - 1 } else { self.transaction() };
        let unanswered = self.queue.lock().unwrap().iter().any(|sent| sent.transaction <= ends);
        assert!(!unanswered, "ended before everything was answered");
        self.ending.push(self.open.remove(&ends).unwrap_or_default());
        assert!(self.open.keys().all(|open| *open > ends), "the one before is open");
    }

    /// One of those that were told how to end. It is dropped, if it is not committed.
    pub fn ended(&mut self, which: usize) -> Written {
        self.ending.remove(which)
    }

    /// Whether the transaction that the relay sends in has something that was acknowledged.
    pub fn has_written(&self) -> bool {
        self.open.contains_key(&self.transaction())
    }

    /// Whether the last two transactions both have something on its way.
    pub fn sends_in_two(&self) -> bool {
        let queue = self.queue.lock().unwrap();
        queue.front().zip(queue.back()).is_some_and(|(first, last)| first.transaction < last.transaction)
    }

    /// Something failed in a transaction.
    fn dooms(&mut self, transaction: usize) {
        self.open.entry(transaction).or_default().1 = true;
    }

    /// The call does not reach the broker.
    pub fn loses_commit(&mut self) {
        self.broken = true;
    }

    pub fn commit(
        &mut self,
        (sent, doomed): Written,
        position: Vec<PositionRecord>,
        tables: &[Table],
    ) -> Result<(), String> {
        assert!(!self.broken, "the one before was not committed");
        if doomed {
            self.broken = true;
            return Err("some of it was refused".into());
        }
        sent.iter().for_each(|sent| self.show(sent, tables));
        let part = self.chunks.iter().find(|(id, _)| !self.first.contains_key(*id));
        assert!(part.is_none(), "a part of an event was committed: {part:?}");
        self.positions.extend(position);
        Ok(())
    }

    fn write(&mut self, sent: &Sent, tables: &[Table]) {
        if !self.transactional {
            return self.show(sent, tables);
        }
        // Readers see it in this order, whatever is committed first.
        let broken = self.broken || self.open.values().any(|(_, doomed)| *doomed);
        if !sent.partition.0.ends_with(DEAD_LETTERS) && !broken {
            let (table, number) = table_of(sent, tables);
            for earlier in table.before(number) {
                let earlier = table.id(earlier);
                let seen = self.has(&earlier) || self.dead.contains(&earlier);
                assert!(seen || self.is_written(&earlier), "{} was written before {earlier}", sent.id);
            }
        }
        self.open.entry(sent.transaction).or_default().0.push(sent.clone());
    }

    fn is_written(&self, id: &str) -> bool {
        let all = self.open.values().chain(&self.ending).flat_map(|(written, _)| written);
        all.into_iter().any(|sent| sent.id == id)
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
        let (table, number) = table_of(sent, tables);
        for earlier in table.before(number) {
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
        let any = &queue[random.usize(..queue.len())];
        // Each producer is on its own.
        let (partition, transaction) = (any.partition.clone(), any.transaction);
        if faults && random.u32(0..60) == 0 {
            return self.die(random, queue, transaction, tables);
        }
        let size = random.usize(1..5);
        let is_next = |sent: &&Sent| sent.partition == partition && sent.transaction == transaction;
        let unit = queue.iter().find(is_next).unwrap_or(first).unit;
        let mut batch = Vec::new();
        let mut rest = VecDeque::new();
        for sent in queue {
            match is_next(&&sent) && sent.unit == unit && batch.len() < size {
                true => batch.push(sent),
                false => rest.push_back(sent),
            }
        }
        let reports = if faults && unit == Unit::Suspects && random.u32(0..3) == 0 {
            // The careful producer is new, and is told that the topic is not there.
            self.dooms(transaction);
            batch.iter().map(|sent| failed(sent, Code::UnknownTopicOrPartition)).collect()
        } else if batch.iter().any(|sent| sent.poisoned) {
            self.refused += 1;
            self.dooms(transaction);
            let mut reports: Vec<Report> =
                batch.iter().map(|sent| failed(sent, Code::PolicyViolation)).collect();
            if unit == Unit::Main {
                // The rest of the producer is told off, but requests in flight on a partition where the
                // broker knows nothing of it are taken all the same.
                let hole = !self.known.contains(&partition);
                for sent in take(&mut rest, |sent| sent.unit == Unit::Main && sent.transaction == transaction)
                {
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
            batch.iter().map(|sent| Report { ticket: sent.ticket, result: Ok(Landed::default()) }).collect()
        };
        *self.queue.lock().unwrap() = rest;
        reports
    }

    /// The pipelined producer fails for good. A part of what it had was written, and nobody knows.
    fn die(
        &mut self,
        random: &mut fastrand::Rng,
        mut queue: VecDeque<Sent>,
        transaction: usize,
        tables: &[Table],
    ) -> Vec<Report> {
        self.dooms(transaction);
        let its = take(&mut queue, |sent| sent.transaction == transaction);
        *self.queue.lock().unwrap() = queue;
        let mut cut: HashSet<Partition> = HashSet::new();
        for sent in &its {
            if sent.poisoned || random.bool() {
                cut.insert(sent.partition.clone());
            }
            if !cut.contains(&sent.partition) {
                self.write(sent, tables);
            }
        }
        its.iter().map(|sent| failed(sent, Code::Fatal)).collect()
    }

    /// New producers. Of what the old ones had sent, a run of each partition may land later.
    pub fn rebuild(&mut self, random: &mut fastrand::Rng) {
        self.rebuilt += 1;
        self.known.clear();
        if self.transactional {
            // The old ones are fenced: what they have sent cannot be seen any more.
            self.queue.lock().unwrap().clear();
            self.open.clear();
            self.ending.clear();
            self.broken = false;
            return;
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

fn table_of<'a>(sent: &Sent, tables: &'a [Table]) -> (&'a Table, usize) {
    let (table, number) = sent.id.split_once('-').unwrap();
    (&tables[table.parse::<usize>().unwrap()], number.parse().unwrap())
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
