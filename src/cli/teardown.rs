//! `teardown`: the relay goes, and takes along what it made in the source, and its spool. The outbox is the
//! application's and stays.

use std::path::Path;

use super::{BAD_CONFIG, DONE, FAILED, print, run::runtime};
#[cfg(feature = "sqlite")]
use crate::ingest::spool::Remains;
use crate::{
    config::{self, Source},
    coordinate::report,
    source::database::Database,
};

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
            // Whatever refuses, nothing is dropped yet.
            #[cfg(feature = "sqlite")]
            let spool = spool(&config, dry_run, force).await?;
            if let Some(source) = &config.source {
                drop_from(source, dry_run, force).await?;
            }
            #[cfg(feature = "sqlite")]
            if let (Some((folder, remains)), false) = (&spool, dry_run) {
                remains.delete().map_err(|error| format!("{}: {error}", folder.display()))?;
                print(&format!("dropped the spool in {}\n", folder.display()));
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

async fn drop_from(source: &Source, dry_run: bool, force: bool) -> Result<(), String> {
    let database = Database::new(source).map_err(|error| report(&error))?;
    database.connect().await.map_err(|error| report(&error))?;
    let remains = database.remains(source).await.map_err(|error| report(&error))?;
    if let (Some(owner), false) = (&remains.owner, dry_run) {
        return Err(format!("relay {owner} owns the source now: stop it first"));
    }
    if remains.only_copies > 0 && !force && !dry_run {
        return Err(format!(
            "{} events are held in the relay's own tables and nowhere else: redrive or skip them first, or add \
             --force to drop them too",
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
}

/// The spool, where there is one and it may go.
#[cfg(feature = "sqlite")]
async fn spool(
    config: &config::Config,
    dry_run: bool,
    force: bool,
) -> Result<Option<(std::path::PathBuf, Remains)>, String> {
    let Some(ingest) = &config.ingest else { return Ok(None) };
    let folder = ingest.spool.clone();
    let Some(remains) = Remains::look(&folder).await.map_err(|error| format!("{error:#}"))? else {
        return Ok(None);
    };
    let (shown, events) = (folder.display(), remains.events);
    if dry_run {
        print(&format!("would drop the spool in {shown}, with {events} events\n"));
    } else if events > 0 && !force {
        return Err(format!(
            "{events} events are in the spool in {shown} and nowhere else: let a relay publish them first, or add \
             --force to drop them too"
        ));
    }
    Ok(Some((folder, remains)))
}
