//! What PostgreSQL alone has: triggers that wake, publication and slot, and grants.

use super::{
    super::{literal, quoted, quoted_table},
    heading, role,
};
use crate::config::{AfterPublish, Capture, Config, Rows, Source, Table};

/// A trigger for `poll.wake: notify`.
pub(super) fn notify(table: &Table) -> Vec<String> {
    let function = quoted(&format!("whippet_wake_{}", table.name.replace('.', "_")));
    let trigger = quoted("whippet_wake");
    let (name, channel) = (quoted_table(&table.name), literal(&table.name));
    vec![
        "-- For poll.wake: notify. Mind that transactions that notify commit one after the other.".into(),
        format!(
            "CREATE OR REPLACE FUNCTION {function}() RETURNS trigger LANGUAGE plpgsql AS \
             $$BEGIN PERFORM pg_notify({channel}, ''); RETURN NULL; END$$"
        ),
        format!(
            "CREATE OR REPLACE TRIGGER {trigger} AFTER INSERT ON {name} \
             FOR EACH STATEMENT EXECUTE FUNCTION {function}()"
        ),
    ]
}

/// Publication and slot, for tables that follow the log. The slot is in a comment: it cannot be made in a
/// transaction that writes, and a script may be run as one.
pub(super) fn stream(config: &Config, source: &Source) -> Vec<String> {
    let followed = || config.tables.iter().filter(|table| table.capture != Capture::Poll);
    if followed().next().is_none() {
        return Vec::new();
    }
    let stream = source.stream.clone().unwrap_or_default();
    let tables: Vec<String> = followed()
        .filter(|table| table.message_prefix().is_none())
        .map(|table| quoted_table(&table.name))
        .collect();
    let (publication, slot) = (literal(&stream.publication), literal(&stream.slot));
    vec![
        heading(
            "The log: the server needs wal_level = logical, and the relay's role the attribute REPLICATION. \
             With source.stream.create the relay makes publication and slot itself, if it owns the tables",
        ),
        format!(
            "DO $$ BEGIN\n  IF NOT EXISTS (SELECT FROM pg_publication WHERE pubname = {publication}) THEN\n    \
             {};\n  END IF;\nEND $$",
            create_publication(&stream.publication, &tables)
        ),
        "-- The slot, on its own and last; with failover => true (PostgreSQL 17) it follows to a standby:"
            .into(),
        format!("-- SELECT pg_create_logical_replication_slot({slot}, 'pgoutput');"),
    ]
}

/// A publication of the inserts into tables whose names are quoted.
pub fn create_publication(name: &str, tables: &[String]) -> String {
    let tables = match tables {
        [] => String::new(),
        tables => format!(" FOR TABLE {}", tables.join(", ")),
    };
    format!(
        "CREATE PUBLICATION {}{tables} WITH (publish = 'insert', publish_via_partition_root = true)",
        quoted(name)
    )
}

/// What a role, whose name is quoted, needs of a table.
pub fn grants_of(table: &Table, role: &str) -> Vec<String> {
    let name = quoted_table(&table.name);
    let mut grants = Vec::new();
    if let Some((schema, _)) = table.name.split_once('.') {
        grants.push(format!("GRANT USAGE ON SCHEMA {} TO {role}", quoted(schema)));
    }
    let change = match (table.after_publish, table.marked()) {
        (_, Some(column)) => {
            let delete = if table.retention.published.is_some() { ", DELETE" } else { "" };
            format!("UPDATE ({}){delete}", quoted(column))
        }
        (AfterPublish::Keep, None) if table.retention.published.is_none() => String::new(),
        _ => "DELETE".to_owned(),
    };
    let nothing = table.rows == Rows::Transient || change.is_empty();
    let change = if nothing { String::new() } else { format!(", {change}") };
    grants.push(format!("GRANT SELECT{change} ON {name} TO {role}"));
    grants
}

/// In one block that does nothing where the role does not exist, so that the script runs anywhere.
pub(super) fn grants(config: &Config, source: &Source) -> Vec<String> {
    let name = role(source.url.expose()).unwrap_or_else(|| "whippet".into());
    let (role, own) = (quoted(&name), quoted(&source.relay_schema));
    let tables = config.tables.iter().filter(|table| table.message_prefix().is_none());
    let mut grants: Vec<String> = tables.flat_map(|table| grants_of(table, &role)).collect();
    grants.push(format!("GRANT USAGE ON SCHEMA {own} TO {role}"));
    grants.push(format!("GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA {own} TO {role}"));
    vec![
        format!("-- First: CREATE ROLE {role} LOGIN PASSWORD '…';"),
        format!(
            "DO $$ BEGIN\n  IF EXISTS (SELECT FROM pg_roles WHERE rolname = {}) THEN\n    {};\n  END IF;\nEND $$",
            literal(&name),
            grants.join(";\n    ")
        ),
    ]
}
