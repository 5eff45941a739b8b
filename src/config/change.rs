//! What another configuration changes of the one that runs, by the keys of the two.

use std::{collections::BTreeSet, fmt};

use serde_json::{Map, Value};

use super::{Config, Delivery, INGEST, error::join};

/// Every key that was given, environment and secrets in it, presets and `defaults` filled in. Never printed.
#[derive(Clone, Default, PartialEq, Eq)]
pub(super) struct Given(pub Value);

impl fmt::Debug for Given {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("<redacted>")
    }
}

/// Keys that a running relay takes up. Tables are compared one by one.
const LIVE: [&str; 1] = ["log.level"];

/// What is to be done so that another configuration is the one that runs.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Difference {
    /// Keys that a running relay cannot take up.
    pub needs_restart: Vec<String>,
    /// Tables that are gone, or have changed: they stop.
    pub stop: Vec<String>,
    /// Tables that are new, or have changed: they start.
    pub start: Vec<String>,
    /// Other keys that are taken up.
    pub live: Vec<String>,
}

impl Difference {
    pub fn is_nothing(&self) -> bool {
        *self == Difference::default()
    }
}

impl Config {
    /// What is to be done to come from here to `next`.
    pub fn difference(&self, next: &Config) -> Difference {
        let (old, new) = (&self.given.0, &next.given.0);
        let mut paths = Vec::new();
        keys(old, new, "", &mut paths);
        let (live, mut needs_restart): (Vec<String>, Vec<String>) =
            paths.into_iter().partition(|path| LIVE.contains(&path.as_str()));
        let is_same = |name: &str| same(table(old, name), table(new, name));
        // Its server and its file are open.
        if !is_same(INGEST) && self.ingest.is_some() && next.ingest.is_some() {
            needs_restart.push("defaults (of the spool of ingest)".into());
        }
        let changed = |config: &Config| {
            let names = config.tables.iter().map(|table| table.name.clone());
            names.filter(|name| !is_same(name)).collect::<Vec<String>>()
        };
        let (stop, start) = (changed(self), changed(next));
        // What is in doubt is known by the tables of the start, and is settled before any of them is read.
        if self.kafka.delivery == Delivery::ExactlyOnce && !(stop.is_empty() && start.is_empty()) {
            needs_restart.push("tables (of a relay that delivers exactly once)".into());
        }
        Difference { needs_restart, stop, start, live }
    }
}

fn table<'a>(given: &'a Value, name: &str) -> Option<&'a Value> {
    given.get("tables")?.as_array()?.iter().find(|table| table.get("name").is_some_and(|its| its == name))
}

/// The paths of all keys that differ, those of tables apart. A mapping that is not there is one without keys.
fn keys(old: &Value, new: &Value, at: &str, differ: &mut Vec<String>) {
    let is_mapping = |value: &Value| value.is_object() || value.is_null();
    if !(is_mapping(old) && is_mapping(new)) {
        if old != new {
            differ.push(at.to_owned());
        }
        return;
    }
    let names: BTreeSet<&String> =
        [old, new].into_iter().filter_map(Value::as_object).flat_map(Map::keys).collect();
    for name in names.into_iter().filter(|name| !(at.is_empty() && *name == "tables")) {
        keys(&old[name], &new[name], &join(at, name), differ);
    }
}

fn same(old: Option<&Value>, new: Option<&Value>) -> bool {
    let mut differ = Vec::new();
    keys(old.unwrap_or(&Value::Null), new.unwrap_or(&Value::Null), "table", &mut differ);
    differ.is_empty()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::config::parse;

    const HEAD: &str = "source: { url: 'postgres://a@b/c' }\nkafka: { bootstrap_servers: 'k:9092' }\n";

    fn config(text: &str) -> Config {
        parse("test.yaml", text, &BTreeMap::new()).unwrap()
    }

    fn difference(old: &str, new: &str) -> Difference {
        config(old).difference(&config(new))
    }

    #[test]
    fn tables_are_compared_with_their_defaults_and_by_their_names() {
        let tables = |tables: &str| format!("{HEAD}tables: {tables}");
        let old = tables("[{ name: a }, { name: b, topic: t }, { name: c }]");
        let changed = difference(&old, &tables("[{ name: d }, { name: b, topic: u }, { name: a }]"));
        assert_eq!(changed.stop, ["b", "c"]);
        assert_eq!(changed.start, ["d", "b"]);
        assert!(changed.needs_restart.is_empty() && changed.live.is_empty());
        assert!(difference(&old, &tables("[{ name: c }, { name: b, topic: t }, { name: a }]")).is_nothing());
        let filled = format!("{old}\ndefaults: {{ topic: t }}");
        assert_eq!(difference(&old, &filled).start, ["a", "c"]);
        // Every key of theirs.
        let deep = tables("[{ name: a }, { name: b, topic: t, headers: { static: { x: y } } }, { name: c }]");
        assert_eq!(difference(&old, &deep).stop, ["b"]);
    }

    #[test]
    fn other_keys_are_taken_up_or_need_a_restart_by_their_path() {
        let old = format!("{HEAD}tables: [{{ name: a }}]\n");
        let new = old.replace("k:9092", "l:9092")
            + "log: { level: debug, format: text }\nlimits: { in_flight_events: 5 }\n";
        let changed = difference(&old, &new);
        assert_eq!(changed.live, ["log.level"]);
        assert_eq!(
            changed.needs_restart,
            ["kafka.bootstrap_servers", "limits.in_flight_events", "log.format"]
        );
        assert!(changed.stop.is_empty() && changed.start.is_empty());
        assert!(difference(&old, &format!("{old}log: {{}}\n")).is_nothing());
    }

    #[test]
    fn tables_that_are_delivered_exactly_once_change_with_a_restart_only() {
        let old = format!("{HEAD}tables: [{{ name: a }}]\n")
            .replace("'k:9092'", "'k:9092', delivery: exactly_once");
        let changed = difference(&old, &old.replace("name: a", "name: a, topic: t"));
        assert_eq!(changed.needs_restart, ["tables (of a relay that delivers exactly once)"]);
    }

    #[test]
    fn what_is_secret_is_compared_and_not_printed() {
        let old = config(&format!("{HEAD}tables: [{{ name: a }}]\n"));
        let new = config(&format!("{HEAD}tables: [{{ name: a }}]\n").replace("a@b", "a:hunter2@b"));
        assert_eq!(old.difference(&new).needs_restart, ["source.url"]);
        assert!(!format!("{new:?}").contains("hunter2"));
    }

    #[test]
    fn the_spool_changes_with_a_restart_only() {
        let old = "kafka: { bootstrap_servers: 'k:9092' }\ningest: { topics: [a], spool: /tmp/s }\n";
        let changed = difference(old, &format!("{old}defaults: {{ payload: {{ max_bytes: 1MiB }} }}\n"));
        assert_eq!(changed.needs_restart, ["defaults (of the spool of ingest)"]);
        assert!(changed.start.is_empty());
    }
}
