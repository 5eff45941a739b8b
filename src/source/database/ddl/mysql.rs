//! What MySQL and MariaDB need, as one script for both: where they differ, each skips the other's words
//! as a comment.

use super::{AUDIT, heading, without_order};
use crate::{
    config::{Config, Dialect, Rows, Source, Table},
    record::Template,
};

/// Texts are compared byte by byte, trailing blanks included: two keys, topics or ids that differ are two.
const EXACT: &str =
    "CHARACTER SET = utf8mb4 COLLATE = /*!80017 utf8mb4_0900_bin */ /*M! utf8mb4_nopad_bin */";
const NOW: &str = "DATETIME(6) NOT NULL DEFAULT (UTC_TIMESTAMP(6))";

fn quoted(name: &str) -> String {
    format!("`{}`", name.replace('`', "``"))
}

fn quoted_table(name: &str) -> String {
    name.split('.').map(quoted).collect::<Vec<_>>().join(".")
}

/// The names of the relay's own tables.
pub fn relay_table_names(prefix: &str) -> Vec<String> {
    let names = [
        "leases",
        "members",
        "parts",
        "gates",
        "positions",
        "holds",
        "pauses",
        "replays",
        "contents",
        "binlog",
    ];
    names.iter().map(|name| format!("{prefix}_{name}")).chain([AUDIT.to_owned()]).collect()
}

/// The relay's own tables, statement by statement. Safe to run again.
pub fn relay_tables_mysql(prefix: &str) -> Vec<String> {
    let columns = [
        "name VARCHAR(64) NOT NULL PRIMARY KEY,
  owner VARCHAR(255) NOT NULL,
  epoch BIGINT NOT NULL,
  expires_at DATETIME(6) NOT NULL"
            .to_owned(),
        "epoch BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
  owner VARCHAR(255) NOT NULL,
  expires_at DATETIME(6) NOT NULL,
  tables TEXT NOT NULL"
            .to_owned(),
        "part INT NOT NULL PRIMARY KEY,
  epoch BIGINT,
  turn BIGINT NOT NULL DEFAULT 0"
            .to_owned(),
        "table_name VARCHAR(128) NOT NULL PRIMARY KEY,
  version BIGINT NOT NULL"
            .to_owned(),
        "part INT NOT NULL PRIMARY KEY,
  unit VARCHAR(255) NOT NULL,
  server VARCHAR(255) NOT NULL,
  cluster VARCHAR(255) NOT NULL,
  topic VARCHAR(255) NOT NULL,
  counter BIGINT NOT NULL,
  turn BIGINT NOT NULL DEFAULT 0"
            .to_owned(),
        format!(
            "table_name VARCHAR(128) NOT NULL,
  place VARCHAR(512) NOT NULL,
  event_id TEXT NOT NULL,
  topic TEXT NOT NULL,
  `key` LONGBLOB,
  state VARCHAR(16) NOT NULL,
  cause VARCHAR(16) NOT NULL,
  reason TEXT NOT NULL,
  attempts INT NOT NULL,
  since {NOW},
  PRIMARY KEY (table_name, place),
  KEY by_key (table_name, topic(128), `key`(128))"
        ),
        format!(
            "table_name VARCHAR(128) NOT NULL,
  scope VARCHAR(16) NOT NULL,
  topic VARCHAR(255) NOT NULL,
  `key` VARBINARY(767) NOT NULL,
  since {NOW},
  PRIMARY KEY (table_name, scope, topic, `key`)"
        ),
        format!(
            "table_name VARCHAR(128) NOT NULL,
  place VARCHAR(512) NOT NULL,
  topic TEXT,
  requested {NOW},
  PRIMARY KEY (table_name, place)"
        ),
        // Of `rows: transient`: events that are held, or released and not published, and how far the log was read.
        "place VARCHAR(512) NOT NULL,
  table_name VARCHAR(128) NOT NULL,
  at_ms BIGINT,
  cells LONGBLOB NOT NULL,
  payload LONGBLOB,
  PRIMARY KEY (place, table_name)"
            .to_owned(),
        format!(
            "name VARCHAR(64) NOT NULL PRIMARY KEY,
  kind VARCHAR(16) NOT NULL,
  position LONGTEXT NOT NULL,
  server VARCHAR(64) NOT NULL,
  file VARCHAR(255) NOT NULL,
  made BIGINT NOT NULL,
  era BIGINT NOT NULL,
  noted {NOW}"
        ),
        format!(
            "id BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY,
  at {NOW},
  who TEXT NOT NULL,
  action VARCHAR(64) NOT NULL,
  table_name VARCHAR(128) NOT NULL,
  what TEXT NOT NULL,
  why TEXT,
  `keys` BIGINT NOT NULL,
  events BIGINT NOT NULL"
        ),
    ];
    let names = relay_table_names(prefix);
    let make = |(name, columns): (&String, String)| {
        format!("CREATE TABLE IF NOT EXISTS {} (\n  {columns}\n) ENGINE = InnoDB, {EXACT}", quoted(name))
    };
    names.iter().zip(columns).map(make).collect()
}

/// Everything that a configuration needs, statement by statement.
pub(super) fn script(config: &Config, source: &Source) -> Vec<String> {
    let prefix = &source.relay_schema;
    let mut script = vec![heading("The outbox")];
    script.extend(config.tables.iter().filter_map(|table| without_order(table, Dialect::Mysql)));
    config.tables.iter().for_each(|table| script.extend(outbox(table)));
    script.push(heading("The relay's own tables; it makes them by itself where it may"));
    script.extend(relay_tables_mysql(prefix));
    script.push(heading("What the relay's account may do: no more than this"));
    script.extend(grants(config, source));
    script.push(heading(
        "What to ask of whoever runs the server. Polling needs nothing but InnoDB, and binlog_format = ROW where \
         there is a binlog: the relay reads and writes with READ COMMITTED",
    ));
    if config.log().is_some() {
        script.push(heading("The binlog is followed: it has to be there, with whole rows"));
        script.extend([
            "-- log_bin = ON, binlog_format = ROW, binlog_row_image = FULL, and best binlog_row_metadata = FULL (with \
             rows: transient it has to be that, and the binlog has to be kept for longer than the relay may be away);",
            "-- of MySQL gtid_mode = ON where that can be, and binlog_order_commits = ON;",
            "-- a server_id of the relay's own (source.stream.server_id), that no replica has",
        ].map(String::from));
    }
    script
}

/// The columns of an outbox, by name, and what each is declared as.
pub fn columns(table: &Table) -> Vec<(String, String)> {
    let columns = &table.columns;
    let mut lines: Vec<(String, String)> = Vec::new();
    let mut add = |name: &str, kind: &str| {
        if !lines.iter().any(|(known, _)| known == name) {
            lines.push((name.to_owned(), kind.to_owned()));
        }
    };
    let templates: Vec<Template> = [&table.topic, &table.key]
        .into_iter()
        .flatten()
        .filter_map(|source| Template::parse(source).ok())
        .collect();
    if let Some(sequence) = &columns.sequence {
        add(sequence, "BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY");
    }
    let key = if columns.sequence.is_some() { "" } else { " PRIMARY KEY" };
    add(&columns.id, &format!("CHAR(36) CHARACTER SET ascii NOT NULL DEFAULT (UUID()){key}"));
    for name in templates.iter().flat_map(Template::columns) {
        add(name, "VARCHAR(255) NOT NULL");
    }
    if let Some(topic) = columns.topic.as_ref().filter(|_| table.topic.is_none()) {
        add(topic, "VARCHAR(249) NOT NULL");
    }
    for name in columns.key.iter().chain(&columns.kind) {
        add(name, "VARCHAR(1024)");
    }
    add(&columns.payload, "LONGBLOB");
    if let Some(headers) = &columns.headers {
        add(headers, "JSON");
    }
    let named = table.headers.columns.iter().map(|(_, column)| column);
    for name in
        table.headers.from.iter().chain(named).chain(&columns.version).chain(&columns.tracing_span_context)
    {
        add(name, "TEXT");
    }
    if let Some(partition) = &columns.partition {
        add(partition, "INT");
    }
    if let Some(timestamp) = &columns.timestamp {
        add(timestamp, "DATETIME(6)");
    }
    if let Some(created_at) = &columns.created_at {
        add(created_at, NOW);
    }
    if let Some(published_at) = table.marked() {
        add(published_at, "DATETIME(6)");
    }
    lines
}

/// An outbox table by its mapped columns. A table that is there already stays as it is.
pub fn outbox(table: &Table) -> Vec<String> {
    let (columns, lines) = (&table.columns, columns(table));
    let mut list: Vec<String> =
        lines.iter().map(|(name, kind)| format!("  {} {kind}", quoted(name))).collect();
    if let (Some(published_at), Some(sequence)) = (table.marked(), &columns.sequence) {
        list.push(format!("  KEY unpublished ({}, {})", quoted(published_at), quoted(sequence)));
    }
    let name = quoted_table(&table.name);
    let mut statements = vec![format!(
        "CREATE TABLE IF NOT EXISTS {name} (\n{}\n) ENGINE = InnoDB, CHARACTER SET = utf8mb4",
        list.join(",\n")
    )];
    if let Some(headers) = &columns.headers {
        statements.extend(context(table, headers));
    }
    statements
}

/// The request's context without columns: the application sets a variable of its session.
fn context(table: &Table, headers: &str) -> Vec<String> {
    let (name, column) = (quoted_table(&table.name), quoted(headers));
    let trigger = quoted(&format!("whippet_context_{}", table.name.replace('.', "_")));
    let trigger = match table.name.split_once('.') {
        Some((database, _)) => format!("{}.{trigger}", quoted(database)),
        None => trigger,
    };
    vec![
        "-- Headers of the request, where the application says once for its session, or before each transaction:".into(),
        "--   SET @whippet_context = '{\"traceparent\": \"…\"}'   and NULL when the session goes back to its pool.".into(),
        format!("DROP TRIGGER IF EXISTS {trigger}"),
        format!(
            "CREATE TRIGGER {trigger} BEFORE INSERT ON {name} FOR EACH ROW \
             SET NEW.{column} = COALESCE(NEW.{column}, NULLIF(@whippet_context, ''))"
        ),
    ]
}

/// As comments: an account has a host too, which only its administrator knows, and a grant to one that is not
/// there is an error.
fn grants(config: &Config, source: &Source) -> Vec<String> {
    let user = super::role(source.url.expose()).unwrap_or_else(|| "whippet".into());
    let account = format!("'{}'@'%'", user.replace('\'', "''"));
    let url = url::Url::parse(source.url.expose()).ok();
    let database = url.map(|url| url.path().trim_matches('/').to_owned()).unwrap_or_default();
    let within = |name: &str| match name.split_once('.') {
        Some(_) => quoted_table(name),
        None => format!("{}.{}", quoted(&database), quoted(name)),
    };
    let mut grants = vec![format!("-- CREATE USER IF NOT EXISTS {account} IDENTIFIED BY '…';")];
    let mut grant =
        |what: &str, name: &str| grants.push(format!("-- GRANT {what} ON {} TO {account};", within(name)));
    for table in &config.tables {
        if table.rows == Rows::Transient {
            grant("SELECT", &table.name);
            continue;
        }
        let change = match table.marked() {
            Some(column) => {
                let delete = if table.retention.published.is_some() { ", DELETE" } else { "" };
                format!("UPDATE ({}){delete}", quoted(column))
            }
            None => "DELETE".to_owned(),
        };
        grant(&format!("SELECT, {change}"), &table.name);
    }
    for name in relay_table_names(&source.relay_schema) {
        grant("SELECT, INSERT, UPDATE, DELETE", &name);
    }
    if config.log().is_some() {
        grants.push(format!("-- GRANT REPLICATION SLAVE, REPLICATION CLIENT ON *.* TO {account};"));
    }
    grants
}
