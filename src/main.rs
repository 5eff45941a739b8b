//! Arguments, configuration, run, exit code. Everything else is in the library.

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    whippet::cli::Cli::parse().run()
}
