//! A bad topic is its own problem. Its events wait in memory at first; once they fill a quarter of the
//! window, or after [`PATIENCE`], its breaker opens: they are held, and every later one, until the
//! topic can be written to again. Then the relay releases them, in order.
//!
//! A topic is bad when the broker says so, or when it goes on not acknowledging while the broker
//! answers for it.

use std::{sync::Arc, time::Duration};

use rdkafka::types::RDKafkaErrorCode as Code;
use tracing::{info, warn};

use super::{Core, Phase, Table, suspects::Step};
use crate::{
    event::TableIx,
    relay::{
        lanes::Waiting,
        retry::Policy,
        topics::{State, Topic, Trouble},
    },
    sink::{Kind, Sink, TopicFacts, classify},
    source::Cause,
};

/// How long events of a bad topic wait in memory.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether a topic acknowledges.
const LOOK_EVERY: Duration = Duration::from_secs(5);
/// From when on an unacknowledged record is looked into.
const SLOW: Duration = Duration::from_secs(10);
/// A topic that stalls is left alone for so long, and longer every time.
const STALLED_FOR: Policy =
    Policy { initial: Duration::from_secs(30), max: Duration::from_mins(5), jitter: false };

impl Topic {
    pub fn is_usable(&self) -> bool {
        matches!(self.state, State::Ready)
    }

    /// Whether events of the topic are past `retry.give_up_after`.
    pub fn is_given_up(&self, after: Option<Duration>, now: Duration) -> bool {
        let trouble = self.trouble.filter(|trouble| trouble.its_own);
        matches!((after, trouble), (Some(after), Some(trouble)) if now >= trouble.since + after)
    }
}

impl Core {
    /// The index of a topic, which is looked up when it is new.
    pub(super) fn topic(&mut self, name: &str) -> u32 {
        let (topic, new) = self.topics.index(name);
        if new {
            self.effects.look_up.push(name.to_owned());
        }
        topic
    }

    pub(super) fn looked_up<S: Sink>(
        &mut self,
        name: &str,
        result: Result<TopicFacts, Code>,
        now: Duration,
        sink: &S,
    ) {
        let Some(index) = self.topics.find(name) else { return };
        let was_asked = std::mem::take(&mut self.topics.get_mut(index).asked_what_it_takes);
        let silent = matches!(result, Err(Code::BrokerTransportFailure | Code::OperationTimedOut));
        match result {
            Ok(facts) => self.is_ready(index, facts, now, sink),
            // It was asked about because it stalls.
            Err(code) if self.topics.get(index).is_usable() => {
                if classify::is_about_topic(code) && self.phase == Phase::Running {
                    self.block_topic(Some(index), Some(code), now);
                    self.phase = Phase::Failing { since: now };
                }
            }
            Err(code) => {
                self.topics.get_mut(index).state = State::Asking;
                self.block_topic(Some(index), Some(code), now);
                self.count_try_of(index);
            }
        }
        if was_asked {
            self.told_what_it_takes(index, !(silent && self.topics.get(index).is_usable()), now, sink);
        }
    }

    fn is_ready<S: Sink>(&mut self, index: u32, facts: TopicFacts, now: Duration, sink: &S) {
        let topic = self.topics.get_mut(index);
        let name = topic.name.clone();
        if topic.is_usable() {
            topic.fine_but_stalled.get_or_insert(now);
        }
        topic.attempts = 0;
        topic.tripped = false;
        if topic.trouble.take().is_some() {
            info!(topic = name, "kafka topic can be written to");
        }
        topic.is_ready(facts, now);
        if let Some(limit) = facts.takes.and_then(|takes| takes.max_message_bytes)
            && limit < self.batch_bytes
        {
            // A batch larger than the topic takes would be refused whole, however small its records are.
            info!(
                topic = name,
                limit, "kafka topic takes small batches only; the producer is rebuilt for them"
            );
            self.batch_bytes = limit;
            if self.rebuilding.is_none() {
                self.phase = Phase::Failing { since: now };
            }
            return;
        }
        let topic = self.topics.get_mut(index);
        topic.waiting_bytes = 0;
        let waited = std::mem::take(&mut topic.waiting);
        self.pass_all(waited, now, sink);
    }

    /// The topic's limit is not what we thought: asks for it again. `false` where that was done and
    /// explained nothing.
    pub(super) fn ask_for_limit(&mut self, topic: Option<u32>) -> bool {
        let Some(topic) = topic else { return false };
        let topic = self.topics.get_mut(topic);
        match topic.state {
            State::Ready if topic.asked_for_limit => false,
            State::Ready => {
                topic.asked_for_limit = true;
                topic.state = State::Asking;
                self.effects.look_up.push(topic.name.clone());
                true
            }
            State::Asking | State::Blocked { .. } => true,
        }
    }

    /// A topic cannot be written to: it is asked about again after a pause. Without a code it stalls.
    pub(super) fn block_topic(&mut self, topic: Option<u32>, code: Option<Code>, now: Duration) {
        let Some(topic) = topic else { return };
        let topic = self.topics.get_mut(topic);
        if matches!(topic.state, State::Blocked { .. }) {
            return;
        }
        topic.attempts += 1;
        let (pause, cure) = match code {
            None => (
                STALLED_FOR.pause(topic.stalls, 1.0),
                "see whether enough replicas of its partitions are in sync (min.insync.replicas)",
            ),
            Some(code) => {
                let cure = match classify::is_about_topic(code) {
                    true => "create the topic, or allow this relay to write to it",
                    false => "see whether kafka can be reached at kafka.bootstrap_servers",
                };
                (Policy::default().pause(topic.attempts, fastrand::f64()), cure)
            }
        };
        let its_own = code.is_none_or(classify::is_about_topic);
        let since = topic.trouble.filter(|trouble| trouble.its_own == its_own).map_or(now, |old| old.since);
        let at_ms = self.wall_ms;
        topic.trouble = Some(Trouble { since, at_ms, code, its_own });
        let error = describe(code);
        warn!(
            topic = topic.name,
            error,
            attempt = topic.attempts,
            cure,
            "kafka topic cannot be written to; its events wait, other topics flow"
        );
        topic.state = State::Blocked { due: now + pause };
    }

    /// A topic was asked about in vain: a try of all tables whose events need it.
    fn count_try_of(&self, topic: u32) {
        let transient = Kind::Transient.label();
        for (rules, needs) in self.tables.iter().zip(self.needed_by(topic)) {
            if needs {
                self.metrics.publish_failures(&rules.name, transient).inc();
                if self.topics.get(topic).attempts > 1 {
                    self.metrics.retries(&rules.name, transient).inc();
                }
            }
        }
    }

    /// Of each table, whether events of it wait for a topic or are held for it: in one pass over what waits.
    pub(super) fn needed_by(&self, topic: u32) -> Vec<bool> {
        let held = |(index, rules): (u16, &Arc<Table>)| {
            self.is_held_for_topic(TableIx(index), rules.order, Some(topic))
        };
        let mut needed: Vec<bool> = (0..).zip(&self.tables).map(held).collect();
        let waiting = self.topics.get(topic).waiting.iter().filter_map(|one| self.ledger.get(one.ticket));
        let trials = self.trials.iter().filter_map(|trial| self.ledger.get(trial.waiting.ticket));
        for entry in waiting.chain(trials.filter(|entry| entry.topic == Some(topic))) {
            needed[entry.table.0 as usize] = true;
        }
        needed
    }

    /// An event of the topic goes on failing although the broker does not blame the topic.
    pub(super) fn topic_is_at_fault(&mut self, topic: Option<u32>, code: Code, now: Duration) {
        self.block_topic(topic, Some(code), now);
        if let Some(topic) = topic
            && let Some(trouble) = &mut self.topics.get_mut(topic).trouble
        {
            trouble.its_own = true;
            self.trip(topic);
        }
    }

    /// Opens the breakers that are due, and gives events up whose time has come.
    pub(super) fn look_at_bad_topics<S: Sink>(&mut self, now: Duration, sink: &S) {
        let limit = self.window.limit();
        let is_bad = |topic: &Topic| topic.trouble.is_some_and(|trouble| trouble.its_own);
        let bad: Vec<u32> =
            self.topics.all().filter(|(_, topic)| is_bad(topic)).map(|(index, _)| index).collect();
        for index in bad {
            let behind = self.wait_behind_trials_of(index);
            let topic = self.topics.get_mut(index);
            let since = topic.trouble.map_or(now, |trouble| trouble.since);
            let much = topic.waiting.len() + behind >= limit.events.div_ceil(4)
                || topic.waiting_bytes >= limit.bytes / 4;
            if self.give_up_times.iter().any(|after| now >= since + *after) {
                topic.waiting_bytes = 0;
                let waiting = std::mem::take(&mut topic.waiting);
                self.pass_all(waiting, now, sink);
                self.give_up_trials_of(index, now);
            }
            if self.topics.get(index).tripped {
                // Those whose lane was not still when the breaker opened.
                self.hold_trials_of(index);
            } else if much || now >= since + PATIENCE {
                self.trip(index);
            }
        }
        self.look_for_stalls(now);
    }

    /// Opens the breaker of a topic: what waits for it is held.
    fn trip(&mut self, index: u32) {
        let reason = self.topic_trouble(index);
        let topic = self.topics.get_mut(index);
        topic.tripped = true;
        let waiting = topic.take_waiting();
        warn!(
            topic = topic.name,
            events = waiting.len(),
            "the topic's events are held from now on, until it can be written to; they are released then"
        );
        for Waiting { ticket, event } in waiting {
            let Some(entry) = self.ledger.get(ticket) else { continue };
            let rules = self.tables[entry.table.0 as usize].clone();
            self.hold(ticket, &rules, &event, Cause::Topic, reason.clone(), 0);
        }
        self.hold_trials_of(index);
    }

    /// Suspects of a topic that cannot be written to are past `retry.give_up_after`.
    fn give_up_trials_of(&mut self, index: u32, now: Duration) {
        let mut trials = std::mem::take(&mut self.trials);
        for trial in &mut trials {
            let Some(entry) = self.ledger.get(trial.waiting.ticket) else { continue };
            let rules = &self.tables[entry.table.0 as usize];
            if entry.topic == Some(index)
                && matches!(trial.step, Step::Send | Step::Wait)
                && self.topics.get(index).is_given_up(rules.give_up.after, now)
                && !self.is_held_for_topic(entry.table, rules.order, Some(index))
            {
                trial.step = Step::GiveUp;
            }
        }
        self.trials = trials;
    }

    /// Finds topics that take records and do not acknowledge them, while the broker is there.
    pub(super) fn look_for_stalls(&mut self, now: Duration) {
        if now < self.look_again || self.ledger.in_sink() == 0 {
            return;
        }
        self.look_again = now + LOOK_EVERY;
        let limit = self.window.limit().events;
        // Where there is but one topic, there is nothing to protect from it.
        let others = self.topics.all().count() > 1;
        for (index, (since, count)) in self.ledger.waits_in_sink() {
            let age = now.saturating_sub(since);
            let topic = self.topics.get_mut(index);
            if age < SLOW {
                topic.fine_but_stalled = None;
                continue;
            }
            let answered = topic.fine_but_stalled.is_some_and(|at| now >= at + LOOK_EVERY);
            let much = count >= limit.div_ceil(4);
            if answered && (much || age >= PATIENCE) && others {
                topic.stalls += 1;
                warn!(
                    topic = topic.name,
                    seconds = age.as_secs(),
                    "kafka answers for the topic and acknowledges nothing; the producer is rebuilt without it"
                );
                self.block_topic(Some(index), None, now);
                self.topics.get_mut(index).tripped = true;
                if self.phase == Phase::Running {
                    self.phase = Phase::Failing { since: now };
                }
            } else if topic.is_usable() && !topic.asked_what_it_takes {
                self.effects.look_up.push(topic.name.clone());
            }
        }
    }

    pub(super) fn topic_trouble(&self, topic: u32) -> String {
        self.topic_trouble_of(self.topics.get(topic))
    }

    pub(super) fn topic_trouble_of(&self, topic: &Topic) -> String {
        match topic.trouble {
            Some(trouble) => {
                format!("topic {} cannot be written to: {}", topic.name, describe(trouble.code))
            }
            None => format!("events of topic {} are held, and are released in order", topic.name),
        }
    }
}

fn describe(code: Option<Code>) -> String {
    match code {
        Some(code) => format!("{code} ({code:?})"),
        None => "it acknowledges nothing".into(),
    }
}
