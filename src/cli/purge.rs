//! `purge`: deletes offloaded payloads below a prefix, such as those of one person.

use std::path::PathBuf;

use clap::Args;
use serde_json::json;

use super::{BAD_CONFIG, DONE, FAILED, print, run::runtime};
use crate::{
    config::{self, Config},
    coordinate::report,
    source::database::{Database, audit::Line},
    store::{Tally, safe_key},
};

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("what").required(true).args(["prefix", "all"]))]
pub struct Purge {
    #[arg(long, short, default_value = "whippet.yaml")]
    config: PathBuf,
    /// Whole segments of the key below object_store.url, as the events have them: `orders/customer 42`.
    #[arg(long, value_parser = not_empty)]
    prefix: Option<String>,
    /// Everything below object_store.url.
    #[arg(long)]
    all: bool,
    /// Count, and delete nothing.
    #[arg(long)]
    dry_run: bool,
    /// Why, for the audit log.
    #[arg(long)]
    why: Option<String>,
    /// Who, for the audit log.
    #[arg(long, env = "USER", default_value = "command line")]
    who: String,
    #[arg(long)]
    json: bool,
}

/// What names everything has to be asked for as such.
fn not_empty(prefix: &str) -> Result<String, &'static str> {
    match safe_key(prefix.trim_matches('/')).is_empty() {
        true => Err("the prefix is empty; --all deletes everything"),
        false => Ok(prefix.to_owned()),
    }
}

pub fn purge(wanted: &Purge) -> u8 {
    let config = match config::load(&wanted.config) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return BAD_CONFIG;
        }
    };
    let done = runtime()
        .map_err(|error| format!("cannot start: {error}"))
        .and_then(|runtime| runtime.block_on(carry_out(&config, wanted)));
    match done {
        Ok(()) => DONE,
        Err(why) => {
            eprintln!("{why}");
            FAILED
        }
    }
}

async fn carry_out(config: &Config, wanted: &Purge) -> Result<(), String> {
    let configured = config.object_store.as_ref().ok_or("the configuration has no object_store")?;
    let store = configured.open().map_err(|error| error.to_string())?;
    let prefix = safe_key(wanted.prefix.as_deref().unwrap_or_default().trim_matches('/'));
    let place = if prefix.is_empty() { store.to_string() } else { store.uri(&prefix) };
    let counted = store.tally(&prefix).await.map_err(|error| error.to_string())?;
    let tell = |done: &str, tally: Tally| match wanted.json {
        true => {
            let (objects, bytes) = (tally.objects, tally.bytes);
            print(&format!(
                "{}\n",
                json!({ "place": place, "objects": objects, "bytes": bytes, "dry_run": wanted.dry_run })
            ));
        }
        false => print(&format!("{done} {} objects, {} bytes, in {place}\n", tally.objects, tally.bytes)),
    };
    if wanted.dry_run {
        tell("would delete", counted);
        return Ok(());
    }
    // Before anything is gone: there is no deletion without its line. Where nothing is there, that is on record too.
    let source =
        config.source.as_ref().ok_or("the configuration has no source, whose audit log has a line of it")?;
    let database = Database::new(source).map_err(|error| report(&error))?;
    database.install().await.map_err(|error| report(&error))?;
    let line = Line {
        who: &wanted.who,
        action: "purge",
        subject: "object_store",
        what: &place,
        why: wanted.why.as_deref(),
        events: counted.objects,
    };
    database.audit(&line).await.map_err(|error| report(&error))?;
    let gone = store
        .purge(&prefix)
        .await
        .map_err(|error| format!("{error}\nsome objects in {place} may be left: run it again"))?;
    tell("deleted", gone);
    match store.keeps_versions().await {
        Ok(Some(true)) => eprintln!(
            "warning: the bucket keeps old versions, which are still there; add a lifecycle rule with \
             NoncurrentVersionExpiration"
        ),
        Err(error) => eprintln!("warning: whether the bucket keeps old versions is not known: {error}"),
        Ok(_) => {}
    }
    Ok(())
}
