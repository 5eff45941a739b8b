//! A bad topic is its own problem: events of a topic that is missing or forbidden wait here, in
//! order, while the others flow. Pure; the relay asks the broker.
//!
//! Here is also which partitions are warm. A broker that knows nothing of a producer on a partition
//! takes its first batch whatever the sequence number says (Kafka's `ProducerAppendInfo`): were the
//! true first one refused, the second would be let in, and with it a later event of the same key.
//! So a new producer sends one record to each partition and pipelines once that is acknowledged;
//! from then on the broker refuses what follows a gap.

use std::{
    collections::{HashMap, HashSet, VecDeque},
    time::Duration,
};

use rdkafka::types::RDKafkaErrorCode as Code;

use super::lanes::Waiting;
use crate::sink::{Takes, Ticket, TopicFacts};

/// A broker that has not told at the start what a topic takes is asked so often again before chunks go to it: it may be
/// slow. One that answers nothing at all, or does not let us ask, is not waited for any longer.
const ASK_IN_VAIN: u32 = 2;

#[derive(Debug)]
pub enum State {
    /// The broker was asked and has not answered.
    Asking,
    Ready,
    /// Not there, or not ours to write to: asked again at `due`, on the relay's clock.
    Blocked {
        due: Duration,
    },
}

/// Why a topic is not used now.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trouble {
    /// When it began, on the relay's clock.
    pub since: Duration,
    /// The time of day when it was last seen, in milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// What the broker said; `None`: it takes records and never acknowledges them.
    pub code: Option<Code>,
    /// Whether the topic is the cause, and not the way to the broker.
    pub its_own: bool,
}

#[derive(Debug)]
pub struct Topic {
    pub name: String,
    pub state: State,
    /// Failed look-ups in a row.
    pub attempts: u32,
    pub trouble: Option<Trouble>,
    /// The breaker is open: events of this topic are held, until it can be written to.
    pub tripped: bool,
    /// How often it stopped acknowledging since it last did.
    pub stalls: u32,
    /// When the broker last said that the topic is fine although it does not acknowledge.
    pub fine_but_stalled: Option<Duration>,
    pub waiting: VecDeque<Waiting>,
    /// Bytes of `waiting`, as the window counts them.
    pub waiting_bytes: usize,
    /// What the topic takes, where the broker told us, in bytes.
    pub max_message_bytes: Option<usize>,
    /// The broker keeps only the last record of a key.
    pub compacted: bool,
    /// How often events had the broker asked what the topic takes, while it has never told.
    asked_in_vain: u32,
    /// When the broker was last asked what the topic takes, on the relay's clock.
    pub known_at: Duration,
    /// The broker is being asked what the topic takes, and events wait for the answer.
    pub asked_what_it_takes: bool,
    /// Whether the limit was asked for again after a refusal, and is still the same.
    pub asked_for_limit: bool,
    /// Whether the broker has ever told what the topic takes.
    told: bool,
    partitions: Vec<Partition>,
    /// Partitions that are not warm.
    cold: usize,
}

#[derive(Debug, Default)]
enum Partition {
    #[default]
    Cold,
    /// Its first record is on its way, and these come next.
    Warming(VecDeque<Waiting>),
    Warm,
}

/// How well the broker knows the producer on the partition of an event.
#[derive(Debug)]
pub enum Warmth {
    Warm,
    /// Not at all. Who is sent first warms it: [`Topic::warms`], then [`Topic::warmed`].
    Cold(u32),
    /// Another event warms it: [`Topic::wait_for_warmth`].
    Warming(u32),
}

impl Topic {
    /// The broker said what the topic is like.
    pub fn is_ready(&mut self, facts: TopicFacts, now: Duration) {
        self.known_at = now;
        // Without an answer it is what it was: above all, chunks are not for a topic that was compacted.
        if let Some(Takes { max_message_bytes, compacted }) = facts.takes {
            self.told = true;
            self.compacted = compacted;
            self.asked_for_limit &= max_message_bytes == self.max_message_bytes;
            self.max_message_bytes = max_message_bytes;
        }
        let count = usize::try_from(facts.partitions).unwrap_or(0);
        self.partitions.resize_with(count, Partition::default);
        self.cold = self.partitions.iter().filter(|one| !matches!(one, Partition::Warm)).count();
        self.state = State::Ready;
    }

    /// The broker was asked what the topic takes because an event needs to know, and has told it or not. `true` the
    /// first time that it is not waited for any longer.
    pub fn was_described(&mut self, now: Duration) -> bool {
        // Whatever the answer was, it is not asked again at once.
        self.known_at = now;
        if self.told {
            return false;
        }
        self.asked_in_vain = self.asked_in_vain.saturating_add(1);
        self.asked_in_vain == ASK_IN_VAIN
    }

    /// Whether the broker has yet to be asked what the topic takes, so that chunks do not go to one that is compacted.
    pub fn is_to_be_described(&self) -> bool {
        !self.told && self.asked_in_vain < ASK_IN_VAIN
    }

    pub fn partition_count(&self) -> usize {
        self.partitions.len()
    }

    /// `partition` is where the event goes; it is asked for only while some are cold.
    pub fn warmth(&self, partition: impl FnOnce(usize) -> Option<usize>) -> Warmth {
        if self.cold == 0 {
            return Warmth::Warm;
        }
        let Some(index) = partition(self.partitions.len()) else { return Warmth::Warm };
        let number = u32::try_from(index).unwrap_or(u32::MAX);
        match self.partitions.get(index) {
            Some(Partition::Cold) => Warmth::Cold(number),
            Some(Partition::Warming(_)) => Warmth::Warming(number),
            // A partition that the topic does not have: the broker will say so.
            Some(Partition::Warm) | None => Warmth::Warm,
        }
    }

    pub fn wait(&mut self, waiting: Waiting, bytes: usize) {
        self.waiting.push_back(waiting);
        self.waiting_bytes += bytes;
    }

    /// Everything that waits for the topic or for one of its partitions, in order of waiting.
    pub fn take_waiting(&mut self) -> Vec<Waiting> {
        self.waiting_bytes = 0;
        let mut all: Vec<Waiting> = std::mem::take(&mut self.waiting).into();
        for partition in &mut self.partitions {
            if let Partition::Warming(queue) = partition {
                all.extend(std::mem::take(queue));
            }
        }
        all
    }

    /// The first record of a partition was sent.
    pub fn warms(&mut self, partition: u32) {
        if let Some(state @ Partition::Cold) = self.partitions.get_mut(partition as usize) {
            *state = Partition::Warming(VecDeque::new());
        }
    }

    pub fn wait_for_warmth(&mut self, partition: u32, waiting: Waiting) {
        if let Some(Partition::Warming(queue)) = self.partitions.get_mut(partition as usize) {
            queue.push_back(waiting);
        }
    }

    /// The first record of a partition is acknowledged: returns what waited for it, in order.
    pub fn warmed(&mut self, partition: u32) -> VecDeque<Waiting> {
        match self.partitions.get_mut(partition as usize) {
            Some(state @ Partition::Warming(_)) => {
                self.cold -= 1;
                match std::mem::replace(state, Partition::Warm) {
                    Partition::Warming(queue) => queue,
                    Partition::Cold | Partition::Warm => VecDeque::new(),
                }
            }
            _ => VecDeque::new(),
        }
    }
}

/// Where `murmur2_random` sends a key: Kafka's murmur2 over the key, its sign bit cleared, modulo
/// the number of partitions (org.apache.kafka.clients.producer.internals.BuiltInPartitioner and
/// org.apache.kafka.common.utils.Utils). Used to know which partition has to be warm; the record
/// itself is placed by librdkafka.
pub fn partition_of(key: &[u8], partitions: usize) -> Option<usize> {
    let hash = usize::try_from(murmur2(key) & 0x7fff_ffff).ok()?;
    hash.checked_rem(partitions)
}

fn murmur2(key: &[u8]) -> u32 {
    const M: u32 = 0x5bd1_e995;
    const SEED: u32 = 0x9747_b28c;
    let mut hash = SEED ^ key.len() as u32;
    let (words, rest) = key.as_chunks::<4>();
    for word in words {
        let word = u32::from_le_bytes(*word).wrapping_mul(M);
        hash = hash.wrapping_mul(M) ^ (word ^ (word >> 24)).wrapping_mul(M);
    }
    if !rest.is_empty() {
        for (index, byte) in rest.iter().enumerate() {
            hash ^= u32::from(*byte) << (8 * index);
        }
        hash = hash.wrapping_mul(M);
    }
    hash = (hash ^ (hash >> 13)).wrapping_mul(M);
    hash ^ (hash >> 15)
}

#[derive(Debug, Default)]
pub struct Topics {
    by_name: HashMap<String, u32>,
    all: Vec<Topic>,
}

impl Topics {
    /// The index of a topic; `true` where it is new and has to be looked up.
    pub fn index(&mut self, name: &str) -> (u32, bool) {
        if let Some(index) = self.by_name.get(name) {
            return (*index, false);
        }
        let index = u32::try_from(self.all.len()).unwrap_or(u32::MAX);
        self.by_name.insert(name.to_owned(), index);
        self.all.push(Topic {
            name: name.to_owned(),
            state: State::Asking,
            attempts: 0,
            trouble: None,
            tripped: false,
            stalls: 0,
            fine_but_stalled: None,
            waiting: VecDeque::new(),
            waiting_bytes: 0,
            max_message_bytes: None,
            compacted: false,
            asked_in_vain: 0,
            known_at: Duration::ZERO,
            asked_what_it_takes: false,
            asked_for_limit: false,
            told: false,
            partitions: Vec::new(),
            cold: 0,
        });
        (index, true)
    }

    /// Nothing of these waits any more.
    pub fn forget(&mut self, tickets: &HashSet<Ticket>) {
        for topic in &mut self.all {
            let bytes_of = |waiting: &Waiting| super::core::window_bytes(&waiting.event);
            topic.waiting.retain(|waiting| !tickets.contains(&waiting.ticket));
            topic.waiting_bytes = topic.waiting.iter().map(bytes_of).sum();
            for partition in &mut topic.partitions {
                if let Partition::Warming(queue) = partition {
                    queue.retain(|waiting| !tickets.contains(&waiting.ticket));
                }
            }
        }
    }

    pub fn get(&self, index: u32) -> &Topic {
        &self.all[index as usize]
    }

    pub fn get_mut(&mut self, index: u32) -> &mut Topic {
        &mut self.all[index as usize]
    }

    pub fn find(&self, name: &str) -> Option<u32> {
        self.by_name.get(name).copied()
    }

    /// Blocked topics whose time has come, now being asked about again.
    pub fn due(&mut self, now: Duration) -> Vec<String> {
        let mut names = Vec::new();
        for topic in &mut self.all {
            if matches!(topic.state, State::Blocked { due } if due <= now) {
                topic.state = State::Asking;
                names.push(topic.name.clone());
            }
        }
        names
    }

    /// When the next blocked topic is due.
    pub fn next_due(&self) -> Option<Duration> {
        let due = |topic: &Topic| match topic.state {
            State::Blocked { due } => Some(due),
            _ => None,
        };
        self.all.iter().filter_map(due).min()
    }

    /// Topics that are not usable now.
    pub fn troubled(&self) -> impl Iterator<Item = &Topic> {
        self.all.iter().filter(|topic| topic.trouble.is_some())
    }

    /// Every topic, by its index.
    pub fn all(&self) -> impl Iterator<Item = (u32, &Topic)> {
        (0..).zip(&self.all)
    }

    /// A new generation reads the waiting events again, and its producer knows no partition.
    pub fn start_over(&mut self) {
        for topic in &mut self.all {
            topic.waiting.clear();
            topic.waiting_bytes = 0;
            topic.fine_but_stalled = None;
            topic.cold = topic.partitions.len();
            topic.partitions.fill_with(Partition::default);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The values of Kafka's own UtilsTest.testMurmur2.
    #[test]
    fn murmur2_is_that_of_kafka() {
        for (key, hash) in [
            ("21", -973_932_308_i32),
            ("foobar", -790_332_482),
            ("a-little-bit-long-string", -985_981_536),
            ("a-little-bit-longer-string", -1_486_304_829),
            ("lkjh234lh9fiuh90y23oiuhsafujhadof229phr9h19h89h8", -58_897_971),
            ("abc", 479_470_107),
        ] {
            assert_eq!(murmur2(key.as_bytes()).cast_signed(), hash, "{key}");
        }
    }

    #[test]
    fn a_partition_takes_one_event_until_it_is_warm() {
        let mut topics = Topics::default();
        let (index, _) = topics.index("t");
        let topic = topics.get_mut(index);
        let facts = TopicFacts { partitions: 2, takes: Some(Takes::default()) };
        topic.is_ready(facts, Duration::ZERO);
        assert!(matches!(topic.warmth(|_| Some(0)), Warmth::Cold(0)));
        topic.warms(0);
        assert!(matches!(topic.warmth(|_| Some(0)), Warmth::Warming(0)));
        assert!(matches!(topic.warmth(|_| Some(1)), Warmth::Cold(1)));
        assert!(matches!(topic.warmth(|_| None), Warmth::Warm), "no key, no order");
        topic.warmed(0);
        assert!(matches!(topic.warmth(|_| Some(0)), Warmth::Warm));
        topic.warms(1);
        topic.warmed(1);
        assert!(matches!(topic.warmth(|_| panic!("all are warm")), Warmth::Warm));
        topics.start_over();
        assert!(matches!(topics.get(index).warmth(|_| Some(0)), Warmth::Cold(0)));
    }
}
