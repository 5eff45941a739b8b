//! The tables: the outbox of a preset, and the relay's own. What `whippet sql` prints and what the
//! relay makes by itself where it may.

mod mysql;

use super::{
    holds::{RELEASED, SKIPPED},
    literal, quoted, quoted_table,
};
use crate::{
    config::{AfterPublish, Capture, Config, Dialect, Rows, Source, Table, Wake},
    record::Template,
};
pub use mysql::{columns as columns_mysql, outbox as outbox_mysql, relay_table_names, relay_tables_mysql};

/// The audit log has this name in every dialect.
pub const AUDIT: &str = "whippet_audit";

/// The relay's own tables in PostgreSQL, statement by statement. Safe to run again.
pub fn relay_tables_postgres(schema: &str) -> Vec<String> {
    let schema = quoted(schema);
    vec![
        format!("CREATE SCHEMA IF NOT EXISTS {schema}"),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.leases (
  name text PRIMARY KEY,
  owner text NOT NULL,
  epoch bigint NOT NULL,
  expires_at timestamptz NOT NULL
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.holds (
  table_name text NOT NULL,
  place text NOT NULL,
  event_id text NOT NULL,
  topic text NOT NULL,
  key bytea,
  state text NOT NULL,
  cause text NOT NULL,
  reason text NOT NULL,
  attempts integer NOT NULL,
  since timestamptz NOT NULL DEFAULT now(),
  at_ms bigint,
  unread bigint,
  cells bytea[],
  PRIMARY KEY (table_name, place)
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.released (
  table_name text NOT NULL,
  place text NOT NULL,
  at_ms bigint,
  unread bigint,
  cells bytea[] NOT NULL,
  PRIMARY KEY (table_name, place)
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.watermarks (
  table_name text PRIMARY KEY,
  server text NOT NULL,
  snapshot pg_snapshot,
  upto bigint NOT NULL,
  open int8multirange NOT NULL,
  done int8multirange NOT NULL,
  at timestamptz NOT NULL DEFAULT clock_timestamp()
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.milestones (
  table_name text NOT NULL,
  at timestamptz NOT NULL DEFAULT clock_timestamp(),
  snapshot pg_snapshot,
  upto bigint NOT NULL,
  open int8multirange NOT NULL,
  PRIMARY KEY (table_name, at)
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.slots (
  name text PRIMARY KEY,
  system_identifier text NOT NULL,
  timeline bigint NOT NULL,
  publication text NOT NULL,
  noted timestamptz NOT NULL DEFAULT now()
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.members (
  epoch bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  owner text NOT NULL,
  expires_at timestamptz NOT NULL,
  tables text NOT NULL
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.parts (
  part integer PRIMARY KEY,
  epoch bigint,
  turn bigint NOT NULL DEFAULT 0
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.gates (
  table_name text PRIMARY KEY,
  version bigint NOT NULL
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.positions (
  part integer PRIMARY KEY,
  unit text NOT NULL,
  server text NOT NULL,
  cluster text NOT NULL,
  topic text NOT NULL,
  counter bigint NOT NULL,
  turn bigint NOT NULL DEFAULT 0
)"
        ),
        format!("CREATE INDEX IF NOT EXISTS holds_by_key ON {schema}.holds (table_name, topic, key)"),
        format!(
            "CREATE INDEX IF NOT EXISTS holds_ended ON {schema}.holds (table_name) \
             WHERE state IN ('{RELEASED}', '{SKIPPED}')"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.pauses (
  table_name text NOT NULL,
  scope text NOT NULL,
  topic text NOT NULL,
  key bytea NOT NULL,
  since timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (table_name, scope, topic, key)
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.replays (
  table_name text NOT NULL,
  place text NOT NULL,
  topic text,
  requested timestamptz NOT NULL DEFAULT now(),
  PRIMARY KEY (table_name, place)
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {schema}.{AUDIT} (
  id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  at timestamptz NOT NULL DEFAULT now(),
  who text NOT NULL,
  action text NOT NULL,
  table_name text NOT NULL,
  what text NOT NULL,
  why text,
  keys bigint NOT NULL,
  events bigint NOT NULL
)"
        ),
    ]
}

/// What a relay adds to tables of before, when events without a row were not known.
pub fn additions_postgres(schema: &str) -> String {
    format!(
        "ALTER TABLE {}.holds ADD COLUMN IF NOT EXISTS at_ms bigint, ADD COLUMN IF NOT EXISTS unread bigint, \
         ADD COLUMN IF NOT EXISTS cells bytea[]",
        quoted(schema)
    )
}

/// The relay's own tables in SQLite, statement by statement. Safe to run again.
pub fn relay_tables_sqlite(prefix: &str) -> Vec<String> {
    let leases = quoted(&format!("{prefix}_leases"));
    let holds = quoted(&format!("{prefix}_holds"));
    let (pauses, replays) = (quoted(&format!("{prefix}_pauses")), quoted(&format!("{prefix}_replays")));
    let (watermarks, milestones) =
        (quoted(&format!("{prefix}_watermarks")), quoted(&format!("{prefix}_milestones")));
    let (members, parts) = (quoted(&format!("{prefix}_members")), quoted(&format!("{prefix}_parts")));
    let gates = quoted(&format!("{prefix}_gates"));
    let positions = quoted(&format!("{prefix}_positions"));
    let ended = quoted(&format!("{prefix}_holds_ended"));
    let audit = quoted(AUDIT);
    vec![
        format!(
            "CREATE TABLE IF NOT EXISTS {watermarks} (
  table_name TEXT PRIMARY KEY,
  upto INTEGER NOT NULL,
  open TEXT NOT NULL,
  done TEXT NOT NULL,
  at REAL NOT NULL
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {milestones} (
  table_name TEXT NOT NULL,
  at REAL NOT NULL,
  upto INTEGER NOT NULL,
  open TEXT NOT NULL,
  PRIMARY KEY (table_name, at)
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {members} (
  epoch INTEGER PRIMARY KEY AUTOINCREMENT,
  owner TEXT NOT NULL,
  expires_at REAL NOT NULL,
  tables TEXT NOT NULL
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {parts} (part INTEGER PRIMARY KEY, epoch INTEGER, turn INTEGER NOT NULL DEFAULT 0)"
        ),
        format!("CREATE TABLE IF NOT EXISTS {gates} (table_name TEXT PRIMARY KEY, version INTEGER NOT NULL)"),
        format!(
            "CREATE TABLE IF NOT EXISTS {positions} (
  part INTEGER PRIMARY KEY,
  unit TEXT NOT NULL,
  server TEXT NOT NULL,
  cluster TEXT NOT NULL,
  topic TEXT NOT NULL,
  counter INTEGER NOT NULL,
  turn INTEGER NOT NULL DEFAULT 0
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {leases} (
  name TEXT PRIMARY KEY,
  owner TEXT NOT NULL,
  epoch INTEGER NOT NULL,
  expires_at REAL NOT NULL
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {holds} (
  table_name TEXT NOT NULL,
  place TEXT NOT NULL,
  event_id TEXT NOT NULL,
  topic TEXT NOT NULL,
  key BLOB,
  state TEXT NOT NULL,
  cause TEXT NOT NULL,
  reason TEXT NOT NULL,
  attempts INTEGER NOT NULL,
  since TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ')),
  PRIMARY KEY (table_name, place)
)"
        ),
        format!(
            "CREATE INDEX IF NOT EXISTS {ended} ON {holds} (table_name) \
             WHERE state IN ('{RELEASED}', '{SKIPPED}')"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {pauses} (
  table_name TEXT NOT NULL,
  scope TEXT NOT NULL,
  topic TEXT NOT NULL,
  key BLOB NOT NULL,
  since TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ')),
  PRIMARY KEY (table_name, scope, topic, key)
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {replays} (
  table_name TEXT NOT NULL,
  place TEXT NOT NULL,
  topic TEXT,
  requested TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ')),
  PRIMARY KEY (table_name, place)
)"
        ),
        format!(
            "CREATE TABLE IF NOT EXISTS {audit} (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ')),
  who TEXT NOT NULL,
  action TEXT NOT NULL,
  table_name TEXT NOT NULL,
  what TEXT NOT NULL,
  why TEXT,
  keys INTEGER NOT NULL,
  events INTEGER NOT NULL
)"
        ),
    ]
}

/// Everything that a configuration needs in the source database, as one script.
pub fn script(config: &Config) -> String {
    let Some(source) = &config.source else {
        return "-- There is no source; the spool of ingest makes its own tables.\n".into();
    };
    let dialect = source.dialect();
    let schema = &source.relay_schema;
    if dialect == Dialect::Mysql {
        return joined(mysql::script(config, source));
    }
    let mut script = vec![heading("The outbox")];
    for table in config.tables.iter().filter(|table| table.message_prefix().is_none()) {
        script.extend(outbox(table, dialect));
    }
    script.extend(stream(config, source));
    script.push(heading("The relay's own tables; it makes them by itself where it may"));
    script.extend(match dialect {
        Dialect::Postgres => relay_tables_postgres(schema),
        Dialect::Sqlite | Dialect::Mysql => relay_tables_sqlite(schema),
    });
    if dialect == Dialect::Postgres {
        script.push(heading("What the relay's role may do: no more than this"));
        script.extend(grants(config, source));
    }
    joined(script)
}

fn joined(script: Vec<String>) -> String {
    let mut text = String::new();
    for statement in script {
        text.push_str(&statement);
        text.push_str(if statement.starts_with("--") { "\n" } else { ";\n\n" });
    }
    text
}

fn heading(text: &str) -> String {
    format!("-- {text}.")
}

/// The columns of an outbox, by name, and what each is declared as.
pub fn columns(table: &Table, dialect: Dialect) -> Vec<(String, &'static str)> {
    let columns = &table.columns;
    let postgres = dialect == Dialect::Postgres;
    let kind = |postgres_type, sqlite_type| if postgres { postgres_type } else { sqlite_type };
    let mut lines: Vec<(String, &'static str)> = Vec::new();
    let mut add = |name: &str, kind| {
        if !lines.iter().any(|(known, _)| known == name) {
            lines.push((name.to_owned(), kind));
        }
    };
    let templates: Vec<Template> = [&table.topic, &table.key]
        .into_iter()
        .flatten()
        .filter_map(|source| Template::parse(source).ok())
        .collect();
    let (context, now) = (
        "json DEFAULT nullif(current_setting('whippet.context', true), '')::json",
        "TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ'))",
    );
    if let Some(sequence) = &columns.sequence {
        // CACHE 1 (the default): a session that keeps numbers back would break the order.
        add(
            sequence,
            kind(
                "bigint GENERATED ALWAYS AS IDENTITY (CACHE 1) PRIMARY KEY",
                "INTEGER PRIMARY KEY AUTOINCREMENT",
            ),
        );
    }
    add(
        &columns.id,
        match (columns.sequence.is_some(), postgres) {
            (true, true) => "uuid NOT NULL DEFAULT gen_random_uuid()",
            (false, true) => "uuid PRIMARY KEY DEFAULT gen_random_uuid()",
            (true, false) => "TEXT NOT NULL DEFAULT (lower(hex(randomblob(16))))",
            (false, false) => "TEXT PRIMARY KEY DEFAULT (lower(hex(randomblob(16))))",
        },
    );
    for name in templates.iter().flat_map(Template::columns) {
        add(name, kind("text NOT NULL", "TEXT NOT NULL"));
    }
    if let Some(topic) = columns.topic.as_ref().filter(|_| table.topic.is_none()) {
        add(topic, kind("text NOT NULL", "TEXT NOT NULL"));
    }
    for name in columns.key.iter().chain(&columns.kind) {
        add(name, kind("text", "TEXT"));
    }
    add(&columns.payload, kind("bytea", "BLOB"));
    if let Some(headers) = &columns.headers {
        add(headers, kind(context, "TEXT"));
    }
    let named = table.headers.columns.iter().map(|(_, column)| column);
    for name in
        table.headers.from.iter().chain(named).chain(&columns.version).chain(&columns.tracing_span_context)
    {
        add(name, kind("text", "TEXT"));
    }
    if let Some(partition) = &columns.partition {
        add(partition, kind("integer", "INTEGER"));
    }
    if let Some(timestamp) = &columns.timestamp {
        add(timestamp, kind("timestamptz", "TEXT"));
    }
    if let Some(created_at) = &columns.created_at {
        add(created_at, kind("timestamptz NOT NULL DEFAULT now()", now));
    }
    let marked = columns.published_at.as_ref().filter(|_| table.after_publish == AfterPublish::Mark);
    if let Some(published_at) = marked {
        add(published_at, kind("timestamptz", "TEXT"));
    }

    let kept_by = columns.tx.as_ref().filter(|_| table.after_publish == AfterPublish::Keep);
    if let Some(tx) = kept_by {
        add(tx, "xid8 NOT NULL DEFAULT pg_current_xact_id()");
    }
    lines
}

/// An outbox table by its mapped columns. A table that is there already stays as it is.
pub fn outbox(table: &Table, dialect: Dialect) -> Vec<String> {
    let (columns, lines) = (&table.columns, columns(table, dialect));
    let marked = columns.published_at.as_ref().filter(|_| table.after_publish == AfterPublish::Mark);
    let kept_by = columns.tx.as_ref().filter(|_| table.after_publish == AfterPublish::Keep);
    let name = quoted_table(&table.name);
    let list: Vec<String> = lines.iter().map(|(name, kind)| format!("  {} {kind}", quoted(name))).collect();
    let mut statements = vec![format!("CREATE TABLE IF NOT EXISTS {name} (\n{}\n)", list.join(",\n"))];
    if let (Some(published_at), Some(sequence)) = (marked, &columns.sequence) {
        let index = quoted(&format!("{}_unpublished", table.name.replace('.', "_")));
        statements.push("-- Finds what waits without walking over what is published.".into());
        statements.push(format!(
            "CREATE INDEX IF NOT EXISTS {index} ON {name} ({}) WHERE {} IS NULL",
            quoted(sequence),
            quoted(published_at)
        ));
    }
    if let (Some(published_at), Some(_)) = (marked, table.retention.published) {
        let index = quoted(&format!("{}_published", table.name.replace('.', "_")));
        let column = quoted(published_at);
        statements.push("-- Finds what is to be deleted for its age.".into());
        statements.push(format!(
            "CREATE INDEX IF NOT EXISTS {index} ON {name} ({column}) WHERE {column} IS NOT NULL"
        ));
    }
    if let Some(tx) = kept_by {
        let index = quoted(&format!("{}_tx", table.name.replace('.', "_")));
        statements.push("-- Finds what is new without walking over what is published.".into());
        statements.push(format!("CREATE INDEX IF NOT EXISTS {index} ON {name} ({})", quoted(tx)));
    }
    if dialect == Dialect::Postgres && kept_by.is_none() {
        statements.push("-- Rows come and go: vacuum by their number, not by a share of the table.".into());
        statements.push(format!(
            "ALTER TABLE {name} SET (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 10000)"
        ));
    }
    if table.poll.wake == Wake::Notify {
        statements.extend(notify(table));
    }
    statements
}

/// A trigger for `poll.wake: notify`.
fn notify(table: &Table) -> Vec<String> {
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
fn stream(config: &Config, source: &Source) -> Vec<String> {
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
    let change = match (table.after_publish, &table.columns.published_at) {
        (AfterPublish::Mark, Some(column)) => {
            let delete = if table.retention.published.is_some() { ", DELETE" } else { "" };
            format!("UPDATE ({}){delete}", quoted(column))
        }
        (AfterPublish::Keep, _) if table.retention.published.is_none() => String::new(),
        _ => "DELETE".to_owned(),
    };
    let nothing = table.rows == Rows::Transient || change.is_empty();
    let change = if nothing { String::new() } else { format!(", {change}") };
    grants.push(format!("GRANT SELECT{change} ON {name} TO {role}"));
    grants
}

/// In one block that does nothing where the role does not exist, so that the script runs anywhere.
fn grants(config: &Config, source: &Source) -> Vec<String> {
    let name = super::role(source.url.expose()).unwrap_or_else(|| "whippet".into());
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
