//! Changes of what is held: an operator's verbs, and releases of the relay.
//!
//! A change is committed first. Then the relay is told all gates anew, and nothing is read or held
//! until it has answered: by then its wishes that rest on the old gates are here, and are forgotten.
//! Reading goes on at the head of the table, so what was released comes before anything newer.

use std::time::Duration;

use tokio::time::Instant;
use tracing::{field::display, info, warn};

use super::{Task, Wish};
use crate::{
    coordinate::report,
    event::Place,
    record::Context,
    source::{
        Refusal, Yield,
        database::{Error, Limits, Listed, Outbox, answered},
        hold::{Held, Outcome, Over, Request, Scope, State, Verb},
    },
};

/// Replays of a topic that cannot be written to are tried again after this.
const REPLAY_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// When it is looked again whether the log is settled as far as a replay needs it.
const SETTLED_AGAIN_AFTER: Duration = Duration::from_millis(250);
/// Of how many events that one verb changes the log is told, at most: each is read for it.
const TOLD_AT_MOST: i64 = 1_000;

/// What is told of a verb that has begun.
fn refusal(error: &Error) -> Refusal {
    match error {
        Error::Setup(why) => Refusal::Wrong(why.clone()),
        _ if error.leaves_in_doubt() => Refusal::Unknown(report(error)),
        _ => Refusal::Failed(report(error)),
    }
}

impl Task {
    /// Writes holds down and carries wishes out, one change at a time.
    pub(super) async fn change_gates(&mut self, epoch: i64) -> Result<(), Error> {
        if self.state.opening.gates_due || !self.state.holds.is_empty() || !self.state.wishes.is_empty() {
            self.recorded().await?;
        }
        if self.state.opening.gates_due {
            self.tell_gates(epoch).await?;
        }
        if self.state.opening.barred {
            return Ok(());
        }
        if std::mem::take(&mut self.state.opening.look_again) {
            self.forget_holds().await;
        }
        self.hold(epoch).await?;
        match self.state.wishes.pop_front() {
            None => return Ok(()),
            Some(Wish::Release(over)) => {
                // Whatever becomes of it, the relay is to see the gates as they are then.
                self.state.opening.gates_due = true;
                self.release(&over, epoch).await?;
            }
            Some(Wish::Verb(asked)) => {
                let Some((request, answer)) = asked.begin() else { return Ok(()) };
                self.state.opening.gates_due = !request.dry_run;
                let outcome = self.carry_out(&request, epoch).await;
                let told = outcome.as_ref().map(|outcome| *outcome).map_err(refusal);
                answer.send(told).ok();
                match outcome {
                    Ok(_) | Err(Error::Setup(_)) => {}
                    Err(error) => return Err(error),
                }
            }
        }
        if self.state.opening.gates_due { self.tell_gates(epoch).await } else { Ok(()) }
    }

    async fn release(&self, over: &Over, epoch: i64) -> Result<(), Error> {
        let Some(outbox) = &self.outbox else { return Ok(()) };
        let events = answered("release what was held", outbox.release(over, epoch)).await?;
        let table = self.source.spec.name.as_str();
        match over {
            Over::Topic(topic) => {
                info!(table, topic, events, "the topic can be written to: what was held for it is released");
            }
            Over::Store => {
                info!(table, events, "the object store is back: what was held for it is released");
            }
        }
        Ok(())
    }

    async fn carry_out(&mut self, request: &Request, epoch: i64) -> Result<Outcome, Error> {
        let Some(outbox) = &self.outbox else { return Ok(Outcome::default()) };
        let meant = if request.dry_run { Vec::new() } else { self.meant(outbox, &request.verb).await? };
        let outcome = answered("carry out an operator's verb", outbox.apply(request, epoch)).await?;
        if !request.dry_run {
            self.tell_of(&request.verb, &meant);
            warn!(
                table = self.source.spec.name.as_str(),
                verb = request.verb.name(),
                what = request.verb.describe(),
                who = request.who,
                why = request.why.as_deref().unwrap_or("-"),
                keys = outcome.keys,
                events = outcome.events,
                "an operator changed something"
            );
            self.state.replay.wanted |= matches!(request.verb, Verb::Replay(_));
        }
        Ok(outcome)
    }

    /// The events that a verb releases or skips, with what the log is to have of them: nothing, unless
    /// `log.context` asks for it.
    async fn meant(&self, outbox: &Outbox, verb: &Verb) -> Result<Vec<(Held, Context)>, Error> {
        let (filter, only) = match verb {
            Verb::Redrive(filter) => (filter, Some(State::Parked)),
            Verb::Skip(filter) => (filter, None),
            Verb::Pause(_) | Verb::Resume(_) | Verb::Replay(_) => return Ok(Vec::new()),
        };
        let rules = &self.source.table.rules;
        if !rules.tells_the_log() {
            return Ok(Vec::new());
        }
        let mut meant = Vec::new();
        for held in outbox.list(filter, TOLD_AT_MOST).await? {
            if only.is_some_and(|only| held.state != only.as_str()) {
                continue;
            }
            let found = outbox.one(&held.place).await?;
            if let Some(context) = found.and_then(|found| rules.log_context(&found.event)) {
                meant.push((held, context));
            }
        }
        Ok(meant)
    }

    fn tell_of(&self, verb: &Verb, meant: &[(Held, Context)]) {
        let table = self.source.spec.name.as_str();
        for (Held { place, id, .. }, context) in meant {
            let context = display(context);
            if let Verb::Skip(_) = verb {
                info!(table, place, id, context, "event is skipped: it will not be published");
            } else {
                info!(table, place, id, context, "event is released: it is tried again");
            }
        }
    }

    /// Lists all gates to the relay, and waits for its answer.
    async fn tell_gates(&mut self, epoch: i64) -> Result<(), Error> {
        let Some(outbox) = &self.outbox else { return Ok(()) };
        let generation = self.state.opening.generation;
        let piece = |keys| self.send(Yield::Closed { generation, keys });
        let Listed { gates, replays, version } = outbox.gates(piece).await?;
        self.share.version = version;
        self.gather(epoch).await?;
        let state = &mut self.state;
        state.opening.gates_due = false;
        state.opening.barred = true;
        state.opening.serial += 1;
        let serial = state.opening.serial;
        state.paused = gates.paused.contains(&Scope::Table);
        state.replay.wanted = replays > 0;
        state.replay.behind = None;
        // From the head: what was released lies before anything that is new.
        state.held.clear();
        state.skip_held = gates.held.all() > 0;
        state.read_from_head(self.outbox.as_deref());
        self.back_to_the_table();
        self.next_read = Instant::now();
        self.send(Yield::Gates { generation, serial, gates }).await;
        Ok(())
    }

    /// What the relay wanted to be held before it knew the gates is read again. What it wants to be
    /// parked for its own sake stays.
    async fn forget_holds(&mut self) {
        let (kept, forgotten) =
            std::mem::take(&mut self.state.holds).into_iter().partition(|hold| hold.cause.is_its_own());
        self.state.holds = kept;
        let forgotten: Vec<crate::source::Hold> = forgotten;
        let places: Vec<Place> = forgotten.iter().map(|hold| hold.place.clone()).collect();
        let tickets: Vec<_> = forgotten
            .into_iter()
            .map(|hold| {
                self.state.known.remove(&hold.place);
                if let Some(kept) = &mut self.state.kept {
                    kept.give_back(&hold.place);
                }
                hold.ticket
            })
            .collect();
        self.is_done_with(&places);
        if !tickets.is_empty() {
            self.read_the_log_again();
            self.send(Yield::Forgotten { tickets }).await;
        }
    }

    /// The lease is not ours: nothing can be changed.
    pub(super) fn without_lease(&mut self) {
        let refusal = match self.source.board.why_unreachable() {
            Some(why) => Refusal::Failed(why),
            None => {
                // Whatever failed is another's now.
                self.source.board.table_rests(self.feed.table);
                Refusal::NotOwner
            }
        };
        self.refuse_verbs(&refusal);
        self.state.wishes.clear();
    }

    /// Tells everybody whose verb has not begun.
    pub(super) fn refuse_verbs(&mut self, refusal: &Refusal) {
        for wish in std::mem::take(&mut self.state.wishes) {
            match wish {
                Wish::Verb(asked) => asked.refuse(refusal.clone()),
                Wish::Release(_) => self.state.wishes.push_back(wish),
            }
        }
    }

    /// Hands over what is to be published again, some rows at a time.
    pub(super) async fn read_replays(&mut self, limits: Limits) -> Result<(), Error> {
        let state = &mut self.state;
        let waits = state.replay.again.is_some_and(|at| Instant::now() < at);
        if !state.replay.wanted || !state.replay.rows.is_empty() || waits {
            return Ok(());
        }
        let Some(outbox) = self.outbox.clone() else { return Ok(()) };
        let settled = outbox.is_settled(&mut self.state.replay.behind);
        if !answered("look how far the log is settled", settled).await? {
            self.await_store();
            self.state.replay.again = Some(Instant::now() + SETTLED_AGAIN_AFTER);
            return Ok(());
        }
        let found =
            answered("read what is to be replayed", outbox.replays(limits, self.share.buckets())).await?;
        if found.is_empty() {
            self.state.replay.wanted = false;
            info!(table = self.source.spec.name.as_str(), "everything that was to be replayed is published");
            return Ok(());
        }
        self.hand_over(found).await?;
        Ok(())
    }

    /// The relay gives replays back: they stay in their list.
    pub(super) fn forget(&mut self, places: Vec<Place>) {
        for place in places {
            self.state.replay.rows.remove(&place);
        }
        self.state.replay.again = Some(Instant::now() + REPLAY_AGAIN_AFTER);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_may_have_been_done_is_not_said_to_have_failed() {
        assert!(matches!(refusal(&Error::NoAnswer("commit")), Refusal::Unknown(_)));
        assert!(matches!(refusal(&Error::Fenced(7)), Refusal::Failed(_)));
        assert_eq!(refusal(&Error::Setup("no".into())), Refusal::Wrong("no".into()));
    }
}
