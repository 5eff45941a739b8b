//! The tables: the outbox of a preset, and the relay's own. What `whippet sql` prints and what the
//! relay makes by itself where it may.

mod mysql;
mod own;
mod postgres;

pub use self::{
    mysql::{columns as columns_mysql, outbox as outbox_mysql, relay_table_names, relay_tables_mysql},
    own::{additions_postgres, relay_tables_postgres, relay_tables_sqlite},
    postgres::{create_publication, grants_of},
};
use super::{quoted, quoted_table};
use crate::{
    config::{Config, Dialect, Rows, Table, Wake},
    record::Template,
};

/// The audit log has this name in every dialect.
pub const AUDIT: &str = "whippet_audit";

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
    script.extend(config.tables.iter().filter_map(|table| without_order(table, dialect)));
    for table in config.tables.iter().filter(|table| table.message_prefix().is_none()) {
        script.extend(outbox(table, dialect));
    }
    script.extend(postgres::stream(config, source));
    script.push(heading("The relay's own tables; it makes them by itself where it may"));
    script.extend(match dialect {
        Dialect::Postgres => relay_tables_postgres(schema),
        Dialect::Sqlite | Dialect::Mysql => relay_tables_sqlite(schema),
    });
    if dialect == Dialect::Postgres {
        script.push(heading("What the relay's role may do: no more than this"));
        script.extend(postgres::grants(config, source));
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

/// The role in a URL, for the grants.
fn role(url: &str) -> Option<String> {
    let (user, _) = url.split_once("://")?.1.split_once('@')?;
    let user = user.split(':').next().unwrap_or_default();
    (!user.is_empty()).then(|| user.to_owned())
}

/// What to add where nothing tells which row was first.
fn without_order(table: &Table, dialect: Dialect) -> Option<String> {
    let is_read =
        table.columns.sequence.is_none() && table.message_prefix().is_none() && table.rows == Rows::Stay;
    let column = match dialect {
        Dialect::Postgres => "seq bigint GENERATED ALWAYS AS IDENTITY (CACHE 1) PRIMARY KEY",
        Dialect::Mysql => "seq BIGINT NOT NULL AUTO_INCREMENT PRIMARY KEY",
        Dialect::Sqlite => "seq INTEGER PRIMARY KEY AUTOINCREMENT",
    };
    is_read.then(|| {
        let name = &table.name;
        format!(
            "-- {name} has no order column: rows that are polled are published in no order (order: none). For the order \
             of each key: {column}, and columns: {{ sequence: seq }} in the configuration."
        )
    })
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
    if let Some(published_at) = table.marked() {
        add(published_at, kind("timestamptz", "TEXT"));
    }

    if let Some(tx) = table.kept_by() {
        add(tx, "xid8 NOT NULL DEFAULT pg_current_xact_id()");
    }
    lines
}

/// An outbox table by its mapped columns. A table that is there already stays as it is.
pub fn outbox(table: &Table, dialect: Dialect) -> Vec<String> {
    let (columns, lines) = (&table.columns, columns(table, dialect));
    let (marked, kept_by) = (table.marked(), table.kept_by());
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
        statements.extend(postgres::notify(table));
    }
    statements
}
