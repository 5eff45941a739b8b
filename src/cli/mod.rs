//! The command line.

mod consume;
#[cfg(feature = "sqlite")]
mod demo;
mod doctor;
mod import;
mod log;
mod purge;
mod reload;
mod run;
mod sql;
mod teardown;
mod verbs;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// Done.
pub const DONE: u8 = 0;
/// Failed at run time.
pub const FAILED: u8 = 1;
/// Wrong usage; what clap refuses ends with it too.
pub const WRONG_USAGE: u8 = 2;
/// The configuration is wrong (`EX_CONFIG` of sysexits.h).
pub const BAD_CONFIG: u8 = 78;

/// A resilient transactional-outbox relay: committed rows become Kafka records, in order per key.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Run the relay until SIGTERM or SIGINT; then drain, flush and exit 0.
    Run {
        #[arg(long, short)]
        config: PathBuf,
    },
    #[cfg(feature = "sqlite")]
    /// The whole story with nothing to install: SQLite, a broker inside the process, a folder for large
    /// payloads, a consumer.
    Demo {
        /// Events to write; two of them are large.
        #[arg(long, default_value_t = 2000, value_parser = clap::value_parser!(u32).range(1..))]
        events: u32,
        /// Every fourth event comes by HTTP instead of a row.
        #[arg(long)]
        ingest: bool,
        /// Leave the relay and its admin address running until Ctrl-C.
        #[arg(long)]
        keep: bool,
    },
    /// Check a configuration, offline.
    Validate {
        #[arg(long, short)]
        config: PathBuf,
    },
    /// Print the SQL that the source needs: outbox, indexes, the relay's own tables, grants.
    #[command(group = clap::ArgGroup::new("what").required(true).args(["config", "dialect"]))]
    Sql {
        #[arg(long, short)]
        config: Option<PathBuf>,
        #[arg(long)]
        dialect: Option<sql::Dialect>,
        /// The shape of the outbox, with --dialect.
        #[arg(long, requires = "dialect", default_value = "whippet")]
        preset: sql::Preset,
    },
    /// Drop what the relay made in the source: slot, publication, its own tables. The outbox stays.
    Teardown {
        #[arg(long, short)]
        config: PathBuf,
        /// Say what would be dropped.
        #[arg(long)]
        dry_run: bool,
        /// Also where held events would be lost with it.
        #[arg(long)]
        force: bool,
    },
    /// Print events as a consumer should see them: references fetched, chunks joined, decoded, repeats
    /// dropped.
    Consume(consume::Arguments),
    /// Connect and try everything; say how to mend what is wrong. Exits 1 if something is.
    Doctor {
        #[arg(long, short)]
        config: PathBuf,
        #[arg(long)]
        json: bool,
    },
    /// Print the configuration that is equal to another program's.
    #[command(subcommand)]
    Import(import::Import),
    /// Delete offloaded payloads below a prefix: those of one person, for example.
    Purge(purge::Purge),
    /// Print the JSON Schema of the configuration file.
    Schema,
    #[command(flatten)]
    Operate(verbs::Verb),
}

impl Cli {
    pub fn run(self) -> ExitCode {
        let code = match self.command {
            Command::Run { config } => run::run(&config),
            #[cfg(feature = "sqlite")]
            Command::Demo { events, ingest, keep } => demo::demo(events as usize, ingest, keep),
            Command::Validate { config } => run::validate(&config),
            Command::Sql { config: Some(config), .. } => sql::for_config(&config),
            Command::Sql { dialect, preset, .. } => sql::for_preset(dialect.unwrap_or_default(), preset),
            Command::Teardown { config, dry_run, force } => teardown::teardown(&config, dry_run, force),
            Command::Consume(arguments) => consume::consume(&arguments),
            Command::Doctor { config, json } => doctor::doctor(&config, json),
            Command::Import(what) => import::import(&what),
            Command::Purge(wanted) => purge::purge(&wanted),
            Command::Schema => run::schema(),
            Command::Operate(verb) => verbs::run(&verb),
        };
        ExitCode::from(code)
    }
}

/// Data goes to stdout. A reader that went away (`| head`) is no reason to fail.
fn print(text: &str) {
    use std::io::Write as _;
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).ok();
}
