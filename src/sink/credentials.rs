//! Secrets and certificates of the Kafka clients, which are files: librdkafka reads them when a client is made, so
//! a client is made anew when they change.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hash as _, Hasher as _},
    time::{Duration, Instant},
};

use crate::config::Secret;

/// How often the files are looked at. They are few and small.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a moment with nothing in flight is waited for. After that what is in flight is let go of, and repeated.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a look at the files found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Look {
    Same,
    /// They changed, and whoever has nothing in flight makes new clients.
    Changed,
    /// They did so long ago that what is in flight is let go of. Said once.
    Overdue,
}

/// Follows the files that properties name.
#[derive(Debug)]
pub(super) struct Credentials {
    /// Of what the clients are made of.
    used: u64,
    looked: Instant,
    changed: Option<Instant>,
    let_go: bool,
}

impl Credentials {
    pub fn new(properties: &BTreeMap<String, Secret>, now: Instant) -> Credentials {
        Credentials { used: fingerprint(properties), looked: now, changed: None, let_go: false }
    }

    pub fn look(&mut self, properties: &BTreeMap<String, Secret>, now: Instant) -> Look {
        if now.duration_since(self.looked) >= LOOK_EVERY {
            self.looked = now;
            let is_new = fingerprint(properties) != self.used;
            self.changed = is_new.then(|| self.changed.unwrap_or(now));
        }
        match self.changed {
            None => Look::Same,
            Some(since) if now.duration_since(since) >= PATIENCE && !self.let_go => {
                self.let_go = true;
                Look::Overdue
            }
            Some(_) => Look::Changed,
        }
    }

    /// Clients are about to be made of what there is now; one that cannot be made is not tried again. Whether it is
    /// news.
    pub fn take_up(&mut self, properties: &BTreeMap<String, Secret>) -> bool {
        let now = fingerprint(properties);
        let is_new = now != self.used;
        (self.used, self.changed, self.let_go) = (now, None, false);
        is_new
    }
}

/// A number that changes with what the files have. The values of properties and the files that librdkafka itself
/// reads: `ssl.ca.location`, `sasl.oauthbearer.assertion.file` and their like.
fn fingerprint(properties: &BTreeMap<String, Secret>) -> u64 {
    let mut hasher = DefaultHasher::new();
    for (name, value) in properties {
        let value = value.expose_now();
        value.hash(&mut hasher);
        if let Some("location" | "file") = name.rsplit('.').next() {
            // One that is not there, or is a folder of authorities, is nothing.
            std::fs::read(&*value).unwrap_or_default().hash(&mut hasher);
        }
    }
    hasher.finish()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_waits_for_a_moment_and_not_for_ever() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("ca.pem");
        std::fs::write(&file, "one").unwrap();
        let properties = [("ssl.ca.location".to_owned(), Secret::new(file.display().to_string()))].into();
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut credentials = Credentials::new(&properties, start);
        assert_eq!(credentials.look(&properties, at(1)), Look::Same);
        std::fs::write(&file, "two").unwrap();
        assert_eq!(credentials.look(&properties, at(1)), Look::Same, "not looked at all the time");
        assert_eq!(credentials.look(&properties, at(2)), Look::Changed);
        assert_eq!(credentials.look(&properties, at(4)), Look::Changed);
        assert_eq!(credentials.look(&properties, at(5)), Look::Overdue);
        assert_eq!(credentials.look(&properties, at(8)), Look::Changed, "let go of once");
        assert!(credentials.take_up(&properties));
        assert!(!credentials.take_up(&properties), "no news");
        assert_eq!(credentials.look(&properties, at(9)), Look::Same);
        // Away for a moment, and back as it was.
        std::fs::remove_file(&file).unwrap();
        assert_eq!(credentials.look(&properties, at(10)), Look::Changed);
        std::fs::write(&file, "two").unwrap();
        assert_eq!(credentials.look(&properties, at(11)), Look::Same);
    }
}
