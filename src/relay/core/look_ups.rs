//! What the broker says of topics, and what waits for it.

use std::time::Duration;

use rdkafka::types::RDKafkaErrorCode as Code;
use tracing::{info, warn};

use super::{Core, Phase};
use crate::{
    relay::{retry::Policy, topics::State},
    sink::{Sink, TopicFacts, classify},
};

impl Core {
    pub(super) fn looked_up<S: Sink>(
        &mut self,
        name: &str,
        result: Result<TopicFacts, Code>,
        now: Duration,
        sink: &S,
    ) {
        let Some(index) = self.topics.find(name) else { return };
        match result {
            Ok(facts) => {
                let topic = self.topics.get_mut(index);
                if topic.attempts > 0 {
                    info!(topic = name, "kafka topic can be written to");
                }
                topic.attempts = 0;
                topic.is_ready(facts);
                if let Some(limit) = facts.max_message_bytes
                    && limit < self.batch_bytes
                {
                    // A batch larger than the topic takes would be refused whole, however small its
                    // records are.
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
                let waited = std::mem::take(&mut topic.waiting);
                self.pass_all(waited, now, sink);
            }
            Err(code) => {
                self.topics.get_mut(index).state = State::Asking;
                self.block_topic(Some(index), code, now);
            }
        }
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

    pub(super) fn block_topic(&mut self, topic: Option<u32>, code: Code, now: Duration) {
        let Some(topic) = topic else { return };
        let topic = self.topics.get_mut(topic);
        if matches!(topic.state, State::Blocked { .. }) {
            return;
        }
        topic.attempts += 1;
        let pause = Policy::default().pause(topic.attempts, fastrand::f64());
        let cure = match classify::is_about_topic(code) {
            true => "create the topic, or allow this relay to write to it",
            false => "see whether kafka can be reached at kafka.bootstrap_servers",
        };
        warn!(
            topic = topic.name, error = %code, attempt = topic.attempts, cure,
            "kafka topic cannot be written to; its events wait, other topics flow"
        );
        topic.state = State::Blocked { due: now + pause };
    }
}
