//! What the loop and the status board see of the core.

use super::{Core, Mishap, Phase, transaction::Transaction};
use crate::{
    event::TableIx,
    source::hold::{Counts, Scope},
};

impl Core {
    /// Whether events may come in now. While a producer is rebuilt they wait in the channel.
    pub fn wants_events(&self) -> bool {
        self.phase == Phase::Running && self.may_send()
    }

    /// Events that are not finished: admitted, and neither acknowledged nor held.
    pub fn open(&self) -> usize {
        self.ledger.open()
    }

    /// What they count for in the window, in bytes.
    #[cfg(test)]
    pub fn open_bytes(&self) -> usize {
        self.ledger.bytes()
    }

    /// Events that Kafka has not answered for yet, and holds that are being written.
    pub fn unanswered(&self) -> usize {
        let uncommitted = self.transaction.as_ref().map_or(0, Transaction::uncommitted);
        self.ledger.in_sink() + uncommitted + self.holding
    }

    pub fn parked_keys(&self, table: TableIx) -> usize {
        self.lanes.parked(table)
    }

    /// Held events, parked ones among them.
    pub fn held_counts(&self, table: TableIx) -> Counts {
        self.progress[table.0 as usize].held
    }

    /// What an operator paused within a table.
    pub fn paused(&self, table: TableIx) -> Vec<String> {
        self.progress[table.0 as usize].paused.iter().map(Scope::describe).collect()
    }

    /// Events of a table that are read and not settled.
    pub fn in_flight(&self, table: TableIx) -> usize {
        self.progress[table.0 as usize].open
    }

    /// Events of a table that Kafka acknowledged.
    pub fn published(&self, table: TableIx) -> u64 {
        self.progress[table.0 as usize].published
    }

    /// When Kafka last acknowledged an event of a table, in milliseconds since the Unix epoch.
    pub fn last_publish_ms(&self, table: TableIx) -> Option<i64> {
        self.progress[table.0 as usize].last_publish_ms
    }

    /// What is wrong with the events of each table: nothing can be sent, something is parked, or waits for a topic or
    /// for the object store.
    pub fn last_errors(&self) -> Vec<Option<Mishap>> {
        let mut errors: Vec<Option<Mishap>> = (self.progress.iter())
            .map(|progress| {
                let parked = || progress.parked.clone().filter(|_| progress.has_parked());
                self.no_producer.clone().or_else(parked)
            })
            .collect();
        for (index, topic) in self.topics.all() {
            let Some(trouble) = topic.trouble else { continue };
            for (error, _) in errors.iter_mut().zip(self.needed_by(index)).filter(|(_, needs)| *needs) {
                error.get_or_insert_with(|| Mishap {
                    what: self.topic_trouble_of(topic),
                    at_ms: trouble.at_ms,
                });
            }
        }
        if let Some(mishap) = self.packing.mishap() {
            let mut needs: Vec<bool> = self.progress.iter().map(|progress| progress.held.store > 0).collect();
            for entry in self.packing.heads.keys().filter_map(|ticket| self.ledger.get(*ticket)) {
                needs[entry.table.0 as usize] = true;
            }
            for (error, _) in errors.iter_mut().zip(needs).filter(|(_, needs)| *needs) {
                error.get_or_insert_with(|| mishap.clone());
            }
        }
        errors
    }

    /// Why a table is halted, where it is, and what mends it.
    pub fn why_halted(&self, table: TableIx) -> Option<String> {
        let (rules, progress) = (&self.tables[table.0 as usize], &self.progress[table.0 as usize]);
        let (held, max) = (progress.held.all(), rules.max_held);
        progress.halted.then(|| match held > max {
            true => format!(
                "{held} events are held and hold.max_events allows {max}: mend and release them (whippet redrive, \
                 whippet skip), or raise the limit"
            ),
            false => "an event cannot be published and on_failure is halt: mend it and release it (whippet \
                      redrive), or let it go (whippet skip)"
                .into(),
        })
    }

    /// Topics that cannot be written to now.
    pub fn blocked_topics(&self) -> Vec<String> {
        self.topics.troubled().map(|topic| topic.name.clone()).collect()
    }
}
