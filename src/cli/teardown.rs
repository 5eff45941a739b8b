//! `teardown`: the relay goes, and takes along what it made in the source. The outbox is the application's
//! and stays.

use std::path::Path;

use super::{BAD_CONFIG, DONE, FAILED, print, run::runtime};
use crate::{config, coordinate::report, source::database::Database};

pub fn teardown(path: &Path, dry_run: bool, force: bool) -> u8 {
    let config = match config::load(path) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return BAD_CONFIG;
        }
    };
    let done = runtime().map_err(|error| format!("cannot start: {error}")).and_then(|runtime| {
        runtime.block_on(async {
            let database = Database::new(&config.source).map_err(|error| report(&error))?;
            database.connect().await.map_err(|error| report(&error))?;
            let remains = database.remains(&config).await.map_err(|error| report(&error))?;
            if let (Some(owner), false) = (&remains.owner, dry_run) {
                return Err(format!("relay {owner} owns the source now: stop it first"));
            }
            if remains.only_copies > 0 && !force && !dry_run {
                return Err(format!(
                    "{} events are held in the relay's own tables and nowhere else: redrive or skip them first, \
                     or add --force to drop them too",
                    remains.only_copies
                ));
            }
            if remains.made.is_empty() {
                print("nothing is there that the relay made\n");
            }
            for made in &remains.made {
                if dry_run {
                    print(&format!("would drop {}\n", made.what));
                    continue;
                }
                database
                    .drop_made(made)
                    .await
                    .map_err(|error| format!("{} could not be dropped: {}", made.what, report(&error)))?;
                print(&format!("dropped {}\n", made.what));
            }
            Ok(())
        })
    });
    match done {
        Ok(()) => DONE,
        Err(why) => {
            eprintln!("{why}");
            FAILED
        }
    }
}
