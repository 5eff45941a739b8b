//! The tables: the outbox of a preset, and the relay's own. What `whippet sql` prints and what the
//! relay makes by itself where it may.

use super::quoted;

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
  PRIMARY KEY (table_name, place)
)"
        ),
        format!(
            "CREATE INDEX IF NOT EXISTS holds_by_key ON {schema}.holds (table_name, topic, key)"
        ),
    ]
}

/// The relay's own tables in SQLite, statement by statement. Safe to run again.
pub fn relay_tables_sqlite(prefix: &str) -> Vec<String> {
    let leases = quoted(&format!("{prefix}_leases"));
    let holds = quoted(&format!("{prefix}_holds"));
    vec![
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
  since TEXT NOT NULL DEFAULT CURRENT_TIMESTAMP,
  PRIMARY KEY (table_name, place)
)"
        ),
    ]
}
