//! A bad topic is its own problem: events of a topic that is missing or forbidden wait here, in
//! order, while the others flow. Pure; the relay asks the broker.

use std::{
    collections::{HashMap, VecDeque},
    time::Duration,
};

use super::lanes::Waiting;
use crate::sink::TopicFacts;

#[derive(Debug)]
pub enum State {
    /// The broker was asked and has not answered.
    Asking,
    Ready(TopicFacts),
    /// Not there, or not ours to write to: asked again at `due`, on the relay's clock.
    Blocked { due: Duration },
}

#[derive(Debug)]
pub struct Topic {
    pub name: String,
    pub state: State,
    /// Failed look-ups in a row.
    pub attempts: u32,
    pub waiting: VecDeque<Waiting>,
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
            waiting: VecDeque::new(),
        });
        (index, true)
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

    /// Topics that are not usable now, by name.
    pub fn blocked(&self) -> impl Iterator<Item = &Topic> {
        self.all.iter().filter(|topic| matches!(topic.state, State::Blocked { .. }))
    }

    /// A new generation reads the waiting events again.
    pub fn forget_waiting(&mut self) {
        for topic in &mut self.all {
            topic.waiting.clear();
        }
    }
}
