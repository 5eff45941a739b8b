//! `import`: the configuration of another program as one of ours.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
};

use clap::{Subcommand, ValueEnum};

use super::{BAD_CONFIG, DONE, print};
use crate::{config, import};

#[derive(Debug, Subcommand)]
pub enum Import {
    /// A Debezium connector with the outbox event router, for PostgreSQL, MySQL or MariaDB: the JSON that Kafka Connect
    /// takes, or properties of a standalone worker or of Debezium Server. What has no equal is said on stderr, and in
    /// comments.
    Debezium {
        file: PathBuf,
        /// What becomes of the rows of the outbox. Unless told otherwise they are taken from the log alone, as Debezium
        /// does (PostgreSQL), or stay (MySQL and MariaDB).
        #[arg(long)]
        rows: Option<Rows>,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Rows {
    /// The application deletes them itself; the table is not looked at.
    Transient,
    /// They stay until the relay has published and deleted them.
    Stay,
}

pub fn import(what: &Import) -> u8 {
    let Import::Debezium { file, rows } = what;
    let rows = rows.map(|rows| match rows {
        Rows::Transient => import::Rows::Log,
        Rows::Stay => import::Rows::Table,
    });
    debezium(file, rows)
}

fn debezium(file: &Path, rows: Option<import::Rows>) -> u8 {
    let name = file.display().to_string();
    let text = match std::fs::read_to_string(file) {
        Ok(text) => text,
        Err(error) => {
            eprintln!("{name}: cannot be read: {error}");
            return BAD_CONFIG;
        }
    };
    let imported = match import::debezium(&name, &text, rows) {
        Ok(imported) => imported,
        Err(error) => {
            eprintln!("{name}: {error}");
            return BAD_CONFIG;
        }
    };
    print(&imported.yaml);
    for note in &imported.notes {
        eprintln!("{}: {}", note.about, note.says);
    }
    // A name that Debezium took may be none that can be had here.
    match config::parse("the imported configuration", &imported.yaml, &BTreeMap::new()) {
        Ok(_) => DONE,
        Err(error) => {
            eprintln!("{error}");
            BAD_CONFIG
        }
    }
}
