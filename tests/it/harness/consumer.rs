//! What a topic's consumers see.

use std::time::{Duration, Instant};

use rdkafka::{
    ClientConfig, Message as _, Offset, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _},
    error::KafkaError,
    message::{BorrowedMessage, Headers as _},
    types::RDKafkaErrorCode,
};

use super::{SOON, kafka};

/// A record as a consumer sees it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    pub partition: i32,
    pub offset: i64,
    pub timestamp: Option<i64>,
    pub key: Option<Vec<u8>>,
    pub payload: Option<Vec<u8>>,
    pub headers: Vec<(String, Option<Vec<u8>>)>,
}

impl Seen {
    fn of(message: &BorrowedMessage<'_>) -> Seen {
        let headers = message.headers().map_or_else(Vec::new, |headers| {
            headers.iter().map(|h| (h.key.to_owned(), h.value.map(<[u8]>::to_vec))).collect()
        });
        Seen {
            partition: message.partition(),
            offset: message.offset(),
            timestamp: message.timestamp().to_millis(),
            key: message.key().map(<[u8]>::to_vec),
            payload: message.payload().map(<[u8]>::to_vec),
            headers,
        }
    }

    pub fn header(&self, name: &str) -> Option<&str> {
        let (_, value) = self.headers.iter().find(|(header, _)| header == name)?;
        Some(std::str::from_utf8(value.as_ref()?).unwrap())
    }

    pub fn text(&self) -> &str {
        std::str::from_utf8(self.payload.as_deref().unwrap()).unwrap()
    }
}

/// Reads all partitions of a topic from the beginning, with no group.
pub struct Consumer {
    consumer: BaseConsumer,
    pub seen: Vec<Seen>,
}

impl Consumer {
    pub fn new(topic: &str) -> Consumer {
        Consumer::isolated(topic, "read_committed")
    }

    pub fn isolated(topic: &str, isolation: &str) -> Consumer {
        let consumer: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", kafka())
            .set("group.id", "none")
            .set("enable.auto.commit", "false")
            .set("fetch.wait.max.ms", "20")
            .set("fetch.message.max.bytes", "50000000")
            .set("receive.message.max.bytes", "200000000")
            .set("isolation.level", isolation)
            .set("enable.partition.eof", "true")
            .create()
            .unwrap();
        // The broker may not know yet of a topic that the controller has just made.
        let deadline = Instant::now() + SOON;
        let mut list = TopicPartitionList::new();
        while list.count() == 0 {
            assert!(Instant::now() < deadline, "topic {topic} does not exist");
            let metadata = consumer.fetch_metadata(Some(topic), SOON).unwrap();
            for partition in metadata.topics()[0].partitions() {
                list.add_partition_offset(topic, partition.id(), Offset::Beginning).unwrap();
            }
        }
        consumer.assign(&list).unwrap();
        Consumer { consumer, seen: Vec::new() }
    }

    pub fn partitions(&self) -> usize {
        self.consumer.assignment().unwrap().count()
    }

    /// Reads until `enough`; panics after a while.
    pub fn read_until(&mut self, enough: impl Fn(&[Seen]) -> bool) -> &[Seen] {
        let mut deadline = Instant::now() + SOON;
        while !enough(&self.seen) {
            assert!(
                Instant::now() < deadline,
                "saw {} records and no more: {:?}",
                self.seen.len(),
                self.seen.iter().rev().take(3).collect::<Vec<_>>()
            );
            if let Some(seen) = self.poll(Duration::from_millis(100)) {
                self.seen.push(seen);
                deadline = Instant::now() + SOON;
            }
        }
        &self.seen
    }

    pub fn read(&mut self, count: usize) -> &[Seen] {
        self.read_until(|seen| seen.len() >= count)
    }

    /// Reads what is there now, to the end of every partition.
    pub fn read_to_end(&mut self) -> &[Seen] {
        let ends: Vec<(i32, i64)> = self
            .consumer
            .assignment()
            .unwrap()
            .elements()
            .iter()
            .map(|element| (element.partition(), self.end_of(element.topic(), element.partition())))
            .collect();
        let total: i64 = ends.iter().map(|(_, high)| high).sum();
        self.read(usize::try_from(total).unwrap())
    }

    /// Reads what is committed now. In topics with transactions not every offset is a record.
    pub fn read_committed(&mut self) -> &[Seen] {
        let mut at_end = std::collections::HashSet::new();
        // From the last record on: a soak has a million of them.
        let mut deadline = Instant::now() + 2 * SOON;
        while at_end.len() < self.partitions() {
            assert!(Instant::now() < deadline, "no end after {} records", self.seen.len());
            match self.consumer.poll(Duration::from_millis(100)) {
                Some(Ok(message)) => {
                    at_end.remove(&message.partition());
                    let seen = Seen::of(&message);
                    self.seen.push(seen);
                    deadline = Instant::now() + 2 * SOON;
                }
                Some(Err(KafkaError::PartitionEOF(partition))) => {
                    at_end.insert(partition);
                }
                Some(Err(_)) | None => {}
            }
        }
        &self.seen
    }

    /// The end of a partition. A broker that has just started may not have taken it up.
    fn end_of(&self, topic: &str, partition: i32) -> i64 {
        let deadline = Instant::now() + SOON;
        loop {
            match self.consumer.fetch_watermarks(topic, partition, SOON) {
                Ok((_, high)) => return high,
                Err(error) => {
                    let code = error.rdkafka_error_code();
                    assert_eq!(code, Some(RDKafkaErrorCode::NotLeaderForPartition), "{error}");
                    assert!(Instant::now() < deadline, "{error}");
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        }
    }

    fn poll(&self, within: Duration) -> Option<Seen> {
        // An error is a broker that is restarted: the client finds it again.
        let Ok(message) = self.consumer.poll(within)? else { return None };
        Some(Seen::of(&message))
    }
}
