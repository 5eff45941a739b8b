//! Debezium's outbox connector as a configuration of this relay: `whippet import debezium`.
//!
//! Pure: from the text of a file to the text of another, and to notes that say what has no equal. Every option is taken
//! by whoever knows it (`source`, `router`, `kafka`); `rest` has a word for those that nobody took. Passwords and
//! whatever else may be secret are never repeated, neither in the configuration nor in a note.

mod kafka;
mod options;
mod rest;
mod router;
mod source;
mod yaml;

use self::{options::Options, yaml::Node};

/// Why a file is no outbox connector.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    #[error("neither JSON nor Java properties: {0}")]
    Unreadable(String),
    #[error(
        "no connector.class in it: expected the configuration of a Debezium connector, as JSON or properties"
    )]
    NoConnector,
    #[error(
        "connector.class is {0}: only Debezium's connectors for PostgreSQL, MySQL and MariaDB have an equal here"
    )]
    OtherConnector(String),
    #[error(
        "no {} among its transforms: the connector publishes changes of tables, not events of an outbox, and has no \
         equal here",
        router::EVENT_ROUTER
    )]
    NoRouter,
}

/// Where the rows of the outbox are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Rows {
    /// Taken from the log only, as Debezium does; the table is left alone.
    Log,
    /// They stay until the relay has published and deleted them.
    Table,
}

/// What is to be known about an option.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Note {
    /// The option, or the key of the configuration that needs a value.
    pub about: String,
    pub says: String,
}

/// A configuration, and what is to be known about it.
#[derive(Debug)]
pub struct Imported {
    pub yaml: String,
    pub notes: Vec<Note>,
}

/// Collects what is to be known, in the order in which it is found.
#[derive(Debug, Default)]
struct Notes {
    list: Vec<Note>,
    /// Options that mean nothing here, and need nothing.
    idle: Vec<String>,
}

impl Notes {
    fn add(&mut self, about: &str, says: impl Into<String>) {
        self.list.push(Note { about: about.to_owned(), says: says.into() });
    }
}

/// Reads a connector. `rows` is what the user says of the table; the connector does not.
pub fn debezium(name: &str, text: &str, rows: Option<Rows>) -> Result<Imported, Error> {
    let mut options = Options::read(text)?;
    let mut notes = Notes::default();
    let connector = source::Connector::of(&mut options)?;
    let mut router = router::Router::take(&mut options, &mut notes)?;
    router.about_itself(connector, &mut options, &mut notes);
    // Nothing but the table can bring back what a binlog no longer has.
    let rows = if connector.is_postgres() { rows.unwrap_or(Rows::Log) } else { Rows::Table };
    let source = source::source(connector, rows, &mut options, &mut notes);
    let kafka = kafka::kafka(&mut options, &mut notes);
    let tables = source.tables.iter().map(|table| router.table(table, connector, rows)).collect();
    router.explain(connector, rows, &source.tables, &mut notes);
    rest::explain(&options, &mut notes);
    let config = Node::map([("source", source.node), ("kafka", kafka), ("tables", Node::List(tables))]);
    let yaml = format!("{}{}", heading(name, &notes), config.text());
    Ok(Imported { yaml, notes: notes.list })
}

/// The notes, as comments above the configuration.
fn heading(name: &str, notes: &Notes) -> String {
    let mut text = yaml::comment("", &format!("Made from {name} by `whippet import debezium`."));
    text += "# How to hand over without loss: docs/migration.md. Before the first start:\n";
    for note in &notes.list {
        text += &yaml::comment("- ", &format!("{}: {}", note.about, note.says));
    }
    if !notes.idle.is_empty() {
        text += &yaml::comment("", &format!("Not needed here: {}.", notes.idle.join(", ")));
    }
    text + "\n"
}

#[cfg(test)]
mod tests;
