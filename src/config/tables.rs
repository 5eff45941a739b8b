//! `defaults` and presets, filled in under what each table says itself.

use std::collections::BTreeSet;

use serde_json::{Map, Value, json};

use super::{error::Problems, table::MESSAGE};

/// Fills in every table. Returns, for each, the keys of `columns` that the user wrote.
pub(super) fn fill_in(tree: &mut Value, problems: &mut Problems) -> Vec<BTreeSet<String>> {
    let Value::Object(root) = tree else { return Vec::new() };
    let defaults = match root.remove("defaults") {
        None | Some(Value::Null) => Value::Object(Map::new()),
        Some(defaults @ Value::Object(_)) => defaults,
        Some(_) => {
            problems.add("defaults", "expected a mapping of keys that a table has");
            Value::Object(Map::new())
        }
    };
    let streams = root.get("source").and_then(|source| source.get("stream")).is_some_and(|it| !it.is_null());
    let url = root.get("source").and_then(|source| source.get("url")).and_then(Value::as_str);
    let is_mysql = url.is_some_and(|url| url.starts_with("mysql:"));
    if defaults.get("name").is_some() {
        problems.add_key("defaults.name", "each table has its own name");
    }
    let Some(Value::Array(tables)) = root.get_mut("tables") else { return Vec::new() };
    let mut explicit = Vec::new();
    for (index, table) in tables.iter_mut().enumerate() {
        if !table.is_object() {
            explicit.push(BTreeSet::new());
            continue;
        }
        under(table, &defaults);
        let path = format!("tables[{index}]");
        let text =
            |table: &Value, key: &str| table.get(key).and_then(Value::as_str).unwrap_or_default().to_owned();
        if is_mysql && text(table, "after_publish") == "keep" && text(table, "capture") == "stream" {
            keep_by_the_log(table, &path, problems);
        }
        let is_message = text(table, "name").starts_with(MESSAGE);
        let only_in_log = is_message || text(table, "rows") == "transient";
        if table.get("capture").is_none_or(Value::is_null) {
            match (is_message, streams) {
                // There is no table that could be polled.
                (true, _) => table["capture"] = "stream".into(),
                (false, true) => table["capture"] = "auto".into(),
                (false, false) => {}
            }
        }
        let columns = table.get("columns").and_then(Value::as_object);
        explicit.push(columns.map(|map| map.keys().cloned().collect()).unwrap_or_default());
        let ordered_by = table.get("order").cloned();
        if is_message {
            under(table, &message());
        } else if let Some(preset) = preset(table.get("preset").and_then(Value::as_str)) {
            under(table, &preset);
        }
        // The log has an order of its own.
        if !only_in_log && table.pointer("/columns/sequence").is_none_or(Value::is_null) {
            no_sequence(table, ordered_by.as_ref(), &path, problems);
        }
    }
    explicit
}

/// Nothing in MySQL's tables tells which rows are published: the binlog alone says what is new. So it is read as where rows
/// do not stay, by a place that is stored, and what the application leaves in its table stays there.
fn keep_by_the_log(table: &mut Value, path: &str, problems: &mut Problems) {
    table["rows"] = "transient".into();
    if table.pointer("/retention/published").is_some_and(|age| !age.is_null() && age != "never") {
        let why = "MySQL does not tell when kept rows were published; leave it out, and delete them yourself";
        problems.add(&format!("{path}.retention.published"), why);
        table["retention"] = Value::Null;
    }
}

/// Without an order column nobody can tell which row was first.
fn no_sequence(table: &mut Value, order: Option<&Value>, path: &str, problems: &mut Problems) {
    match order.and_then(Value::as_str) {
        Some("none") => {}
        Some(_) => problems.add(
            &format!("{path}.order"),
            "needs columns.sequence, a column filled from a sequence; without one only `none` is possible",
        ),
        None => {
            table["order"] = "none".into();
            problems.warn(
                path,
                "no columns.sequence: rows are published in no particular order (order: none). Add a \
                 column filled from a sequence and map it to keep the order of each key",
            );
        }
    }
}

/// Lays `lower` under `upper`: what is there stays.
fn under(upper: &mut Value, lower: &Value) {
    let (Value::Object(upper), Value::Object(lower)) = (upper, lower) else { return };
    for (key, value) in lower {
        match upper.get_mut(key) {
            None => {
                upper.insert(key.clone(), value.clone());
            }
            Some(there) => under(there, value),
        }
    }
}

/// The members of a logical message.
fn message() -> Value {
    json!({
        "columns": {
            "id": "id", "topic": "topic", "key": "key", "type": "type", "payload": "payload", "headers": "headers",
        },
    })
}

/// What a preset fills in; `None` where there is no such preset, which the schema reports.
fn preset(name: Option<&str>) -> Option<Value> {
    match name {
        None | Some("whippet") => Some(json!({
            "columns": {
                "id": "id", "sequence": "seq", "topic": "topic", "key": "key", "type": "type",
                "payload": "payload", "headers": "headers", "created_at": "created_at",
                "published_at": "published_at",
            },
        })),
        Some("debezium") => Some(json!({
            "columns": {
                "id": "id", "key": "aggregateid", "type": "type", "payload": "payload",
                "tracing_span_context": "tracingspancontext",
            },
            "topic": "outbox.event.{aggregatetype}",
        })),
        Some(_) => None,
    }
}
