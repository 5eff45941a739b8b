//! The command line.

mod run;

use std::{path::PathBuf, process::ExitCode};

use clap::{Parser, Subcommand};

/// Done.
pub const DONE: u8 = 0;
/// Failed at run time.
pub const FAILED: u8 = 1;
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
    /// Check a configuration, offline.
    Validate {
        #[arg(long, short)]
        config: PathBuf,
    },
    /// Print the JSON Schema of the configuration file.
    Schema,
}

impl Cli {
    pub fn run(self) -> ExitCode {
        let code = match self.command {
            Command::Run { config } => run::run(&config),
            Command::Validate { config } => run::validate(&config),
            Command::Schema => run::schema(),
        };
        ExitCode::from(code)
    }
}
