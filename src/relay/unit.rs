//! The delivery unit, where delivery is exactly once: taking it over, which is the one way in after a start, a
//! crash, a lost answer or another relay's turn. What is in doubt is learned here and settled by the sources
//! before they read.

use std::collections::HashSet;

use tracing::info;

use super::position::Position;
use crate::{
    coordinate::{Part, report},
    sink::Sink,
    source::database::{Database, Error, Noted},
};

#[derive(Clone, Debug)]
pub struct DeliveryUnit {
    pub database: Database,
    pub position_topic: String,
}

/// Why a unit cannot be taken over.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Obstacle {
    /// It may be gone the next time.
    #[error("{0}")]
    Trouble(String),
    /// Nothing will change by itself, and going on would be a guess.
    #[error("{0}")]
    Refused(String),
}

impl From<String> for Obstacle {
    fn from(trouble: String) -> Obstacle {
        Obstacle::Trouble(trouble)
    }
}

/// A unit that was taken over under a membership.
#[derive(Clone, Debug)]
pub struct Takeover {
    pub epoch: i64,
    pub position: Position,
    /// What the source remembers.
    pub noted: Noted,
}

impl DeliveryUnit {
    /// Fences everybody else who produces for this source, and finds what they have published.
    pub async fn take_over<S: Sink>(
        &self,
        sink: &S,
        epoch: i64,
        batch_bytes: usize,
    ) -> Result<Takeover, Obstacle> {
        let said = |error: Error| Obstacle::Trouble(report(&error));
        let before = self.database.unit(Part::Whole).await.map_err(said)?;
        let server = self.database.server().await.map_err(said)?;
        self.check_source(&before, &server).map_err(Obstacle::Refused)?;
        let is_new = before.counter == 0;
        let found = sink.take_over(before.unit.clone(), batch_bytes, is_new).await?;
        let Some(found) = found else {
            return Err(Obstacle::Refused(format!(
                "topic {} has the positions of this source and is gone, so nobody knows what of the last transactions \
                 is published: bring it back, or empty the relay's own table `positions` (what was published last may \
                 be repeated)",
                self.position_topic
            )));
        };
        self.check_cluster(&before, &found.cluster).map_err(Obstacle::Refused)?;
        let last = Position::decode(&before.unit, &found.positions).map_err(Obstacle::Refused)?;
        check_counters(&before, last.as_ref(), &self.position_topic).map_err(Obstacle::Refused)?;
        let last = last.unwrap_or_default();
        let position = Position {
            unit: before.unit.clone(),
            server: server.clone(),
            counter: last.counter + 1,
            noted: before.counter,
            doubts: last.doubts,
            ..Position::default()
        };
        // A position of our own, before the first event: the source remembers that there are some.
        sink.commit(position.encode()).await?;
        let noted = Noted {
            unit: before.unit,
            server,
            cluster: found.cluster,
            topic: self.position_topic.clone(),
            counter: position.counter,
        };
        self.database.note_position(&noted, epoch).await.map_err(said)?;
        let in_doubt: usize = position.doubts.values().map(HashSet::len).sum();
        info!(
            unit = noted.unit,
            counter = noted.counter,
            in_doubt,
            "this relay is the one producer of the source; what may not be recorded is recorded first"
        );
        Ok(Takeover { epoch, position: Position { noted: noted.counter, ..position }, noted })
    }

    /// Has the source remember a position.
    pub async fn note(&self, noted: Noted, epoch: i64) -> Result<Noted, String> {
        match self.database.note_position(&noted, epoch).await {
            Ok(()) => Ok(noted),
            Err(error) => Err(report(&error)),
        }
    }

    /// Whether this is the source that the unit was made for, and the topic that has its positions.
    fn check_source(&self, noted: &Noted, server: &str) -> Result<(), String> {
        if noted.counter == 0 {
            return Ok(());
        }
        if noted.server != server {
            return Err(format!(
                "the source is on server {server}, and its positions are those of server {}: this is a copy, or it \
                 moved. If it moved, and nothing publishes from the old server any more, empty the relay's own table \
                 `positions` (what was published last may be repeated)",
                noted.server
            ));
        }
        if noted.topic != self.position_topic {
            return Err(format!(
                "the positions of this source are in topic {}, and kafka.position_topic says {}: set it back, or \
                 empty the relay's own table `positions` (what was published last may be repeated)",
                noted.topic, self.position_topic
            ));
        }
        Ok(())
    }

    fn check_cluster(&self, noted: &Noted, cluster: &str) -> Result<(), String> {
        if noted.counter == 0 || noted.cluster == cluster {
            return Ok(());
        }
        Err(format!(
            "the positions of this source are in Kafka cluster {}, and kafka.bootstrap_servers leads to {cluster}: \
             set it back, or empty the relay's own table `positions` (what was published last may be repeated)",
            noted.cluster
        ))
    }
}

/// The source has noted a counter that the topic must have, and the topic one that the source must have.
fn check_counters(noted: &Noted, last: Option<&Position>, topic: &str) -> Result<(), String> {
    let counter = last.map_or(0, |position| position.counter);
    if counter < noted.counter {
        return Err(format!(
            "topic {topic} has position {counter} of this source, and the source remembers {}: the topic was \
             truncated or made anew. Nobody knows what of the last transactions is published: bring it back, or \
             empty the relay's own table `positions` (what was published last may be repeated)",
            noted.counter
        ));
    }
    match last {
        Some(last) if last.noted > noted.counter => Err(format!(
            "topic {topic} knows that the source has noted position {}, and the source remembers {}: it was restored \
             from a backup, whose rows may have numbers of others that were published. Look at what is in the \
             outbox, then empty the relay's own table `positions`; what the backup has is published again",
            last.noted, noted.counter
        )),
        _ => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_topic_and_a_source_that_do_not_belong_together_are_told() {
        let noted = |counter| Noted { counter, ..Noted::default() };
        let last = |counter, noted| Position { counter, noted, ..Position::default() };
        let check = |source, topic: Option<Position>| {
            check_counters(&noted(source), topic.as_ref(), "positions").err().unwrap_or_default()
        };
        assert_eq!(check(0, None), "", "the first time");
        assert_eq!(check(5, Some(last(5, 4))), "");
        assert_eq!(check(5, Some(last(90, 5))), "", "the source notes now and then");
        assert!(check(5, None).contains("truncated"), "the topic is empty");
        assert!(check(5, Some(last(4, 3))).contains("truncated"));
        assert!(check(5, Some(last(90, 6))).contains("backup"));
    }
}
