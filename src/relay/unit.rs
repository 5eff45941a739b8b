//! The delivery unit, where delivery is exactly once: taking it over, which is the one way in after a start, a
//! crash, a lost answer or another relay's turn. What is in doubt is learned here and settled by the sources
//! before they read.
//!
//! A relay has the unit of its slot, and those of relays that are gone until what they left in doubt is in its own
//! position: then they are nobody's, and free.

use std::{
    collections::{BTreeMap, BTreeSet},
    convert::Infallible,
    sync::Arc,
};

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use super::{doubts::Doubts, position::Position};
use crate::{
    coordinate::{Claim, Lease, Part, Seen, View, drain::Drain, report},
    sink::{Sink, Units},
    source::database::{Database, Error, Noted},
};

#[derive(Clone, Debug)]
pub struct DeliveryUnit {
    pub database: Database,
    pub position_topic: String,
    /// The tables that are relayed here.
    pub tables: watch::Receiver<BTreeSet<String>>,
    pub drain: Arc<Drain>,
    pub lease: watch::Receiver<Lease>,
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

impl From<Error> for Obstacle {
    fn from(error: Error) -> Obstacle {
        Obstacle::Trouble(report(&error))
    }
}

/// A unit that was taken over.
#[derive(Clone, Debug)]
pub struct Takeover {
    pub claim: Claim,
    pub position: Position,
    /// What the source remembers.
    pub noted: Noted,
    /// Whether another producer had fenced this relay's.
    pub was_fenced: bool,
}

/// The slots that a membership has, the lowest first.
fn slots_of(view: &View, epoch: i64) -> Vec<(u16, Seen)> {
    let of = |part: &Part| match part {
        Part::Slot(slot) => Some((*slot, (*part, view.parts.get(part)?.turn))),
        _ => None,
    };
    view.of(epoch).filter_map(|part| of(&part)).collect()
}

impl DeliveryUnit {
    /// Fences everybody else who produces as the units of this relay's slots, and finds what they have published. From
    /// then on it has one of them.
    pub async fn take_over<S: Sink>(
        &self,
        sink: &S,
        claim: Claim,
        batch_bytes: usize,
    ) -> Result<Takeover, Obstacle> {
        let epoch = claim.epoch;
        let slots = slots_of(&self.database.look().await?, epoch);
        let all = self.database.units().await?;
        let mut ours = Vec::new();
        for (slot, _) in &slots {
            ours.push(self.database.unit(&all, *slot).await?);
        }
        let Some((main, others)) = ours.split_first() else {
            return Err(Obstacle::Trouble("this relay has no slot to produce with any more".into()));
        };
        let before = self.noted().await?;
        let server = self.database.server().await?;
        self.check_sources(&before, &server, &all).map_err(Obstacle::Refused)?;
        let others: Vec<String> = others.iter().map(|noted| noted.unit.clone()).collect();
        let units = Units { all: all.clone(), main: main.unit.clone(), others };
        debug!(unit = units.main, others = ?units.others, "fences whoever else produces as these");
        let given_up = CancellationToken::new();
        let found = tokio::select! {
            found = sink.take_over(units.clone(), batch_bytes, before.is_empty(), given_up.clone()) => found?,
            never = self.gives_up(claim, given_up) => match never {},
        };
        let Some(found) = found else {
            return Err(Obstacle::Refused(format!(
                "topic {} has the positions of this source and is gone, so nobody knows what of the last transactions \
                 is published: bring it back, or empty the relay's own table `positions` (what was published last may \
                 be repeated)",
                self.position_topic
            )));
        };
        self.check_clusters(&before, &found.cluster).map_err(Obstacle::Refused)?;
        let mut known = Position::decode_all(&found.positions).map_err(Obstacle::Refused)?;
        // Others may have gone on while this relay stood still: what the topic knows was noted before it was read.
        let after = self.noted().await?;
        check_counters(&before, &after, &known, &self.position_topic).map_err(Obstacle::Refused)?;
        self.are_ours(&slots, epoch).await?;

        let last = known.remove(&units.main).unwrap_or_default();
        let mut position = Position {
            unit: units.main.clone(),
            server: server.clone(),
            counter: last.counter + 1,
            noted: main.counter,
            doubts: last.doubts,
            ..Position::default()
        };
        let mut records = Vec::new();
        for unit in &units.others {
            let Some(left) = known.remove(unit) else { continue };
            let (unit, counter, noted) = (unit.clone(), left.counter + 1, left.noted);
            position.takes_over(left);
            let empty = Position { unit, server: server.clone(), counter, noted, ..Position::default() };
            records.extend(empty.encode());
        }
        records.extend(position.encode());
        // A position of our own, before the first event: the source remembers that there are some. In the same
        // transaction nothing is in doubt of the others any more.
        sink.relieve();
        sink.commit(records).await?;
        let noted = Noted {
            unit: units.main,
            server,
            cluster: found.cluster,
            topic: self.position_topic.clone(),
            counter: position.counter,
        };
        self.database.note_position(&noted, epoch).await?;
        let free: Vec<Seen> = slots.iter().skip(1).map(|(_, seen)| *seen).collect();
        self.database.leave(epoch, &free).await?;
        self.see_to_strange_tables(&position);
        let in_doubt: usize = position.doubts.values().map(Doubts::len).sum();
        info!(
            unit = noted.unit,
            counter = noted.counter,
            of_others = free.len(),
            in_doubt,
            "this relay is the one producer of its delivery unit; what may not be recorded is recorded first"
        );
        let position = Position { noted: noted.counter, ..position };
        Ok(Takeover { claim, position, noted, was_fenced: found.was_fenced })
    }

    /// Has a takeover given up, once another is due.
    async fn gives_up(&self, claim: Claim, given_up: CancellationToken) -> Infallible {
        self.lease.clone().wait_for(|lease| lease.claim() != Some(claim)).await.ok();
        given_up.cancel();
        std::future::pending().await
    }

    async fn noted(&self) -> Result<BTreeMap<String, Noted>, Obstacle> {
        let (noted, _) = self.database.noted().await?;
        Ok(noted.into_iter().map(|noted| (noted.unit.clone(), noted)).collect())
    }

    /// After everybody else was fenced: whether the slots are this relay's still, or another one works with them.
    async fn are_ours(&self, slots: &[(u16, Seen)], epoch: i64) -> Result<(), Obstacle> {
        if slots_of(&self.database.look().await?, epoch) != slots {
            return Err(Obstacle::Trouble("the slots that this relay has are others since".into()));
        }
        Ok(())
    }

    /// What is in doubt of a table that is not relayed here is settled by a relay that does. Until then this one keeps
    /// what it has: another one might publish it again.
    fn see_to_strange_tables(&self, position: &Position) {
        let tables = self.tables.borrow();
        let strange =
            position.doubts.iter().filter(|(name, places)| !places.is_empty() && !tables.contains(*name));
        let strange: Vec<&str> = strange.map(|(name, _)| name.as_str()).collect();
        if !strange.is_empty() {
            warn!(
                tables = strange.join(", "),
                "what was published last of tables that this relay does not have may not be recorded; until a relay that \
                 has them takes over, this one lets no work go. If they are gone for good, stop all relays and empty the \
                 relay's own table `positions`"
            );
        }
        self.drain.bar(!strange.is_empty());
    }

    /// Has the source remember a position.
    pub async fn note(&self, noted: Noted, epoch: i64) -> Result<Noted, String> {
        match self.database.note_position(&noted, epoch).await {
            Ok(()) => Ok(noted),
            Err(error) => Err(report(&error)),
        }
    }

    fn check_sources(&self, noted: &BTreeMap<String, Noted>, server: &str, all: &str) -> Result<(), String> {
        if noted.contains_key(all) {
            return Err("the positions of this source are those of a relay with one delivery unit, which this version \
                        cannot take over: let that one publish what there is and stop it, then empty the relay's own \
                        table `positions`"
                .into());
        }
        noted.values().try_for_each(|noted| self.check_source(noted, server))
    }

    fn check_clusters(&self, noted: &BTreeMap<String, Noted>, cluster: &str) -> Result<(), String> {
        noted.values().try_for_each(|noted| self.check_cluster(noted, cluster))
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

/// Of all units, whoever works with them: one relay alone may have noted something since a backup was made.
fn check_counters(
    before: &BTreeMap<String, Noted>,
    after: &BTreeMap<String, Noted>,
    known: &BTreeMap<String, Position>,
    topic: &str,
) -> Result<(), String> {
    let nothing = Noted::default();
    let units: BTreeSet<&String> = before.keys().chain(known.keys()).collect();
    units.into_iter().try_for_each(|unit| {
        let (before, after) = (before.get(unit).unwrap_or(&nothing), after.get(unit).unwrap_or(&nothing));
        check_counter(before, after, known.get(unit), topic)
    })
}

/// The source has noted a counter that the topic must have, by what it noted before the topic was read; and the topic one
/// that the source must have, by what it noted after.
fn check_counter(before: &Noted, after: &Noted, last: Option<&Position>, topic: &str) -> Result<(), String> {
    let counter = last.map_or(0, |position| position.counter);
    if counter < before.counter {
        return Err(format!(
            "topic {topic} has position {counter} of this source, and the source remembers {}: the topic was \
             truncated or made anew. Nobody knows what of the last transactions is published: bring it back, or \
             empty the relay's own table `positions` (what was published last may be repeated)",
            before.counter
        ));
    }
    match last {
        Some(last) if last.noted > after.counter => Err(format!(
            "topic {topic} knows that the source has noted position {}, and the source remembers {}: it was restored \
             from a backup, whose rows may have numbers of others that were published. Look at what is in the \
             outbox, then empty the relay's own table `positions`; what the backup has is published again",
            last.noted, after.counter
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
        let check_both = |before, after, topic: Option<Position>| {
            check_counter(&noted(before), &noted(after), topic.as_ref(), "positions")
                .err()
                .unwrap_or_default()
        };
        let check = |source, topic| check_both(source, source, topic);
        assert_eq!(check(0, None), "", "the first time");
        assert_eq!(check(5, Some(last(5, 4))), "");
        assert_eq!(check(5, Some(last(90, 5))), "", "the source notes now and then");
        assert!(check(5, None).contains("truncated"), "the topic is empty");
        assert!(check(5, Some(last(4, 3))).contains("truncated"));
        assert!(check(5, Some(last(90, 6))).contains("backup"));
        assert_eq!(check_both(5, 80, Some(last(90, 80))), "", "another relay went on before it was fenced");
        assert_eq!(check_both(5, 95, Some(last(90, 5))), "", "another relay has fenced this one since");
    }
}
