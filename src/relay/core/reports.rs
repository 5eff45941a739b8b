//! What Kafka answers: an event is finished with its last record, or tried again.

use std::time::Duration;

use super::{
    Core,
    suspects::{Step, Trial},
};
use crate::{
    relay::ledger::{Acknowledged, Entry},
    sink::{Report, Sink},
};

impl Core {
    /// What became of a record.
    pub(super) fn report<S: Sink>(&mut self, report: Report, now: Duration, wall_ms: i64, sink: &S) {
        let tried = self.trying.take_if(|(ticket, _)| *ticket == report.ticket).map(|(_, trial)| trial);
        let acknowledged = match report.result {
            Ok(landed) => Ok(self.ledger.acknowledged(report.ticket, landed)),
            Err(code) => Err(code),
        };
        match (acknowledged, tried) {
            (Ok(Acknowledged::Unknown), _) => {}
            (Ok(Acknowledged::Part(warmed)), None) => {
                fail::fail_point!("mid-chunks", |_| std::process::abort());
                self.window.release(0, self.ledger.shrinks(report.ticket));
                if let Some((topic, partition)) = warmed {
                    let waited = self.topics.get_mut(topic).warmed(partition);
                    self.pass_all(waited, now, sink);
                }
            }
            // The next record of the same event.
            (Ok(Acknowledged::Part(_)), Some(trial)) => self.start_trial(trial, now, sink),
            (Ok(Acknowledged::Whole(entry)), None) => {
                let (lane, warmed) = (entry.lane, entry.topic.zip(entry.warms));
                self.acknowledged(entry, true, now, wall_ms);
                let crossed = self.lanes.delivered(lane);
                self.pass_all(crossed, now, sink);
                if let Some((topic, partition)) = warmed {
                    let waited = self.topics.get_mut(topic).warmed(partition);
                    self.pass_all(waited, now, sink);
                }
            }
            (Ok(Acknowledged::Whole(entry)), Some(Trial { waiting, step, .. })) => {
                self.packing.forget(report.ticket);
                let (table, lane, letter) = (entry.table, entry.lane, matches!(step, Step::Bury { .. }));
                self.suspects.remove(&(table, entry.place.clone()));
                self.acknowledged(entry, !letter, now, wall_ms);
                if let Step::Bury { cause, failure, letters } = step {
                    let rules = self.tables[table.0 as usize].clone();
                    self.buried(&rules, &waiting.event, cause, &failure, letters);
                }
                let waited = self.lanes.open(lane);
                self.pass_all(waited, now, sink);
            }
            (Err(code), None) => self.failed_in_pipeline(report.ticket, code, now),
            (Err(code), Some(trial)) => {
                self.trace_failed(report.ticket, code);
                self.ledger.returned(report.ticket);
                self.failed_on_trial(trial, code, now);
            }
        }
    }

    /// Kafka has an event, or its dead letter. In a transaction that is settled by its commit.
    fn acknowledged(&mut self, entry: Entry, published: bool, now: Duration, wall_ms: i64) {
        self.window.release(1, entry.bytes);
        match &mut self.transaction {
            Some(transaction) => transaction.acknowledges(entry, published),
            None => self.settled(&entry, published, now, wall_ms),
        }
    }

    /// An event is finished, and its source is to record it.
    pub(super) fn settled(&mut self, entry: &Entry, published: bool, now: Duration, wall_ms: i64) {
        if let Some(trail) = &entry.trail {
            self.trace(entry, trail, None);
            if published {
                self.tell_published(entry, trail);
            }
        }
        self.rebuilds = 0;
        if !self.failed_once.is_empty() {
            self.failed_once.remove(&(entry.table, entry.place.clone()));
        }
        let table = entry.table.0 as usize;
        let progress = &mut self.progress[table];
        progress.settled.push(entry.place.clone());
        progress.open -= 1;
        let Some(topic) = entry.topic else { return };
        self.topics.get_mut(topic).stalls = 0;
        if published {
            progress.last_publish_ms = Some(wall_ms);
            progress.published += 1;
            let (name, topics, metrics) = (&self.tables[table].name, &self.topics, &self.metrics);
            let handles = self
                .published
                .entry((entry.table, topic))
                .or_insert_with(|| metrics.published(name, &topics.get(topic).name));
            let publish = entry.sent_at.map(|sent| now.saturating_sub(sent));
            let end_to_end = entry.timestamp_ms.map(|created| wall_ms.saturating_sub(created));
            handles.acknowledged(publish, end_to_end, wall_ms);
        }
    }
}
