//! Holds: events that are settled without being published, and what releases them. One mechanism for
//! a key that is parked, a topic that cannot be written to, and an operator's pause: a row in the
//! relay's own table, while the event stays in its outbox.

use crate::{
    event::{Event, Place},
    sink::Ticket,
};

/// Who releases a hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// An operator.
    Parked,
    /// The relay, once the cause has ended.
    Held,
}

impl State {
    pub fn as_str(self) -> &'static str {
        match self {
            State::Parked => "parked",
            State::Held => "held",
        }
    }
}

/// Why an event is held.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Cause {
    /// It can never be published as it is.
    Rejected,
    /// It could not be published within `retry.give_up_after`.
    GaveUp,
    /// An earlier event of its key is parked.
    Behind,
    /// Its topic cannot be written to.
    Topic,
    /// Its payload has to be put into the object store, which is away; or an earlier one of its key has to.
    Store,
    /// An operator paused its topic or key.
    Paused,
}

impl Cause {
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Rejected => "rejected",
            Cause::GaveUp => "gave_up",
            Cause::Behind => "behind",
            Cause::Topic => "topic",
            Cause::Store => "store",
            Cause::Paused => "paused",
        }
    }

    pub fn state(self) -> State {
        match self {
            Cause::Rejected | Cause::GaveUp | Cause::Behind => State::Parked,
            Cause::Topic | Cause::Store | Cause::Paused => State::Held,
        }
    }

    /// Whether the event itself is the reason, and not something around it.
    pub fn is_its_own(self) -> bool {
        matches!(self, Cause::Rejected | Cause::GaveUp)
    }
}

/// An event that is to be held: what the relay's own table keeps of it.
#[derive(Clone, Debug)]
pub struct Hold {
    pub ticket: Ticket,
    pub place: Place,
    pub event_id: String,
    pub topic: String,
    pub key: Option<Vec<u8>>,
    pub cause: Cause,
    /// One sentence for the operator: what was wrong and what mends it.
    pub reason: String,
    pub attempts: u32,
    /// The event itself, where it has no row to be read from again.
    pub content: Option<Box<Event>>,
}

/// How many events of a table are held.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    pub parked: u64,
    /// Behind a topic that cannot be written to.
    pub topic: u64,
    /// Until the object store is back.
    pub store: u64,
    pub paused: u64,
}

impl Counts {
    pub fn of(cause: Cause, events: u64) -> Counts {
        let mut counts = Counts::default();
        match cause {
            Cause::Topic => counts.topic = events,
            Cause::Store => counts.store = events,
            Cause::Paused => counts.paused = events,
            Cause::Rejected | Cause::GaveUp | Cause::Behind => counts.parked = events,
        }
        counts
    }

    /// From the words of the table; an unknown cause is a parked one.
    pub fn named(cause: &str, events: u64) -> Counts {
        match cause {
            "topic" => Counts::of(Cause::Topic, events),
            "store" => Counts::of(Cause::Store, events),
            "paused" => Counts::of(Cause::Paused, events),
            _ => Counts::of(Cause::Behind, events),
        }
    }

    pub fn add(&mut self, other: Counts) {
        self.parked += other.parked;
        self.topic += other.topic;
        self.store += other.store;
        self.paused += other.paused;
    }

    pub fn all(self) -> u64 {
        self.parked + self.topic + self.store + self.paused
    }
}

/// A trouble of the surroundings that is over: what was held for it is released.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Over {
    /// This topic can be written to.
    Topic(String),
    /// The object store is back.
    Store,
}

/// What an operator paused within a table.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    Table,
    Topic(String),
    /// A key, in every topic unless one is named.
    Key {
        topic: Option<String>,
        key: Vec<u8>,
    },
}

impl Scope {
    /// Whether an event with this topic and key is meant.
    pub fn covers(&self, topic: &str, key: Option<&[u8]>) -> bool {
        match self {
            Scope::Table => true,
            Scope::Topic(paused) => paused == topic,
            Scope::Key { topic: only, key: paused } => {
                key == Some(paused) && only.as_deref().is_none_or(|only| only == topic)
            }
        }
    }

    pub fn describe(&self) -> String {
        match self {
            Scope::Table => "table".into(),
            Scope::Topic(topic) => format!("topic {topic}"),
            Scope::Key { topic: None, key } => format!("key {}", String::from_utf8_lossy(key)),
            Scope::Key { topic: Some(topic), key } => {
                format!("key {} of topic {topic}", String::from_utf8_lossy(key))
            }
        }
    }
}

/// Which held events are meant: those that fit everything that is given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Filter {
    pub id: Option<String>,
    pub key: Option<Vec<u8>>,
    pub topic: Option<String>,
    /// A cause, or a part of the reason.
    pub reason: Option<String>,
}

impl Filter {
    pub fn describe(&self) -> String {
        let mut parts = Vec::new();
        let key = self.key.as_ref().map(|key| String::from_utf8_lossy(key).into_owned());
        for (name, value) in
            [("id", &self.id), ("key", &key), ("topic", &self.topic), ("reason", &self.reason)]
        {
            if let Some(value) = value {
                parts.push(format!("{name}={value}"));
            }
        }
        if parts.is_empty() { "all".into() } else { parts.join(" ") }
    }
}

/// Which published rows are to be published again.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Replay {
    /// Bounds of the order column, both included.
    pub sequences: Option<(i64, i64)>,
    /// Bounds of the time of publishing, milliseconds since the Unix epoch, both included.
    pub times: Option<(i64, i64)>,
    pub ids: Vec<String>,
    /// Another topic than the row's own.
    pub topic: Option<String>,
}

/// What an operator asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verb {
    Pause(Scope),
    Resume(Scope),
    /// Releases whole keys, in order: nothing may pass an earlier event.
    Redrive(Filter),
    /// Settles events without publishing them.
    Skip(Filter),
    Replay(Replay),
}

impl Verb {
    pub fn name(&self) -> &'static str {
        match self {
            Verb::Pause(_) => "pause",
            Verb::Resume(_) => "resume",
            Verb::Redrive(_) => "redrive",
            Verb::Skip(_) => "skip",
            Verb::Replay(_) => "replay",
        }
    }

    /// What it is about, for the audit log.
    pub fn describe(&self) -> String {
        match self {
            Verb::Pause(scope) | Verb::Resume(scope) => scope.describe(),
            Verb::Redrive(filter) | Verb::Skip(filter) => filter.describe(),
            Verb::Replay(Replay { sequences, times, ids, topic }) => {
                let mut parts = Vec::new();
                if let Some((from, to)) = sequences {
                    parts.push(format!("sequence {from} to {to}"));
                }
                if let Some((from, to)) = times {
                    parts.push(format!("published {from} to {to} (Unix ms)"));
                }
                if !ids.is_empty() {
                    parts.push(format!("{} ids", ids.len()));
                }
                if let Some(topic) = topic {
                    parts.push(format!("to topic {topic}"));
                }
                parts.join(", ")
            }
        }
    }
}

/// A verb with its circumstances.
#[derive(Clone, Debug)]
pub struct Request {
    pub verb: Verb,
    /// Count and change nothing.
    pub dry_run: bool,
    /// The name of the token.
    pub who: String,
    /// Why, in the operator's words.
    pub why: Option<String>,
}

/// How much a verb changed, or would have.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
pub struct Outcome {
    pub keys: u64,
    pub events: u64,
}

/// A held event as an operator sees it.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Held {
    pub table: String,
    /// The order column, or the id where there is none.
    pub place: String,
    pub id: String,
    pub topic: String,
    pub key: Option<String>,
    /// Where the key is no UTF-8 text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key_hex: Option<String>,
    pub state: String,
    pub cause: String,
    pub reason: String,
    pub attempts: i32,
    /// RFC 3339.
    pub since: String,
    pub age_seconds: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload: Option<String>,
}

/// The bytes of a key that is no text.
pub fn key_from_hex(hex: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        hex.chars().map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    let (pairs, rest) = digits.as_deref()?.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

/// A key for a person: its text, and its bytes where it is none.
pub fn key_for_people(key: Option<Vec<u8>>) -> (Option<String>, Option<String>) {
    match key.map(String::from_utf8) {
        None => (None, None),
        Some(Ok(text)) => (Some(text), None),
        Some(Err(bytes)) => {
            let bytes = bytes.into_bytes();
            let hex = bytes.iter().fold(String::new(), |hex, byte| format!("{hex}{byte:02x}"));
            (Some(String::from_utf8_lossy(&bytes).into_owned()), Some(hex))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_read_in_pairs() {
        assert_eq!(key_from_hex("00ff7A"), Some(vec![0, 255, 0x7a]));
        assert_eq!(key_from_hex("0"), None);
        assert_eq!(key_from_hex("zz"), None);
    }
}
