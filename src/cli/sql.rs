//! `sql`: what the source database needs, as a script to read and to run.

use std::{collections::BTreeMap, path::Path};

use clap::ValueEnum;

use super::{BAD_CONFIG, DONE};
use crate::{
    config::{self, Config, Error},
    source::database::ddl,
};

#[derive(Clone, Copy, Debug, Default, ValueEnum)]
pub enum Dialect {
    #[default]
    Postgres,
    /// MySQL and MariaDB.
    Mysql,
    Sqlite,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum Preset {
    Whippet,
    Debezium,
}

pub fn for_config(path: &Path) -> u8 {
    show(config::load(path))
}

pub fn for_preset(dialect: Dialect, preset: Preset) -> u8 {
    let url = match dialect {
        Dialect::Postgres => "postgres://whippet@localhost/app",
        Dialect::Mysql => "mysql://whippet@localhost/app",
        Dialect::Sqlite => "sqlite://app.db",
    };
    if let Preset::Debezium = preset {
        super::print(
            "-- Preset debezium, with an order column, by which each key keeps its order when the table is polled.\n\
             -- It goes with: preset: debezium, columns: { sequence: seq }.\n",
        );
    }
    let preset = match preset {
        Preset::Whippet => "whippet",
        // With an order column, which Debezium does not need and a poller does.
        Preset::Debezium => "debezium, columns: { sequence: seq }",
    };
    let yaml = format!(
        "source: {{ url: '{url}' }}\nkafka: {{ bootstrap_servers: localhost }}\n\
         tables: [{{ name: outbox, preset: {preset} }}]\n"
    );
    show(config::parse("--preset", &yaml, &BTreeMap::new()))
}

fn show(config: Result<Config, Error>) -> u8 {
    match config {
        Ok(config) => {
            super::print(&ddl::script(&config));
            DONE
        }
        Err(error) => {
            eprintln!("{error}");
            BAD_CONFIG
        }
    }
}
