//! The relay's own tables in PostgreSQL and SQLite, statement by statement. Safe to run again.

use super::{
    super::{
        holds::{RELEASED, SKIPPED},
        quoted,
    },
    AUDIT,
};

/// Those in PostgreSQL.
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

/// Those in SQLite.
pub fn relay_tables_sqlite(prefix: &str) -> Vec<String> {
    let leases = quoted(&format!("{prefix}_leases"));
    let holds = quoted(&format!("{prefix}_holds"));
    let (pauses, replays) = (quoted(&format!("{prefix}_pauses")), quoted(&format!("{prefix}_replays")));
    let (watermarks, milestones) =
        (quoted(&format!("{prefix}_watermarks")), quoted(&format!("{prefix}_milestones")));
    let (members, parts) = (quoted(&format!("{prefix}_members")), quoted(&format!("{prefix}_parts")));
    let gates = quoted(&format!("{prefix}_gates"));
    let positions = quoted(&format!("{prefix}_positions"));
    let (by_key, ended) =
        (quoted(&format!("{prefix}_holds_by_key")), quoted(&format!("{prefix}_holds_ended")));
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
        format!("CREATE INDEX IF NOT EXISTS {by_key} ON {holds} (table_name, topic, key)"),
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
