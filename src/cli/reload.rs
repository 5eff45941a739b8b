//! `run` looks whether its configuration has changed, and takes it up.
//!
//! The file is read once a second and compared. It has some KB, so that costs nothing; and unlike a notification of
//! the file system it cannot miss how a ConfigMap changes (a link to a link to a folder that is exchanged), works on
//! every file system, and is not stirred by a time that changes alone.

use std::{path::PathBuf, time::Duration};

use tokio::time::MissedTickBehavior;
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::{
    app::{Refused, Reloader},
    config::{self, Level},
};

const LOOK_EVERY: Duration = Duration::from_secs(1);

/// What a file says, or `None` where it cannot be read.
pub type Content = Option<Vec<u8>>;

pub fn content(path: &std::path::Path) -> Content {
    std::fs::read(path).ok()
}

/// Tells when a file has changed and stays so: one that is being written is not half read.
struct Watched {
    /// As it was taken up, or refused.
    known: Content,
    /// As it was seen last.
    last: Content,
}

impl Watched {
    fn new(known: Content) -> Watched {
        Watched { last: known.clone(), known }
    }

    /// Whether it is time to take it up.
    fn look(&mut self, now: Content) -> bool {
        let steady = self.last == now;
        self.last = now;
        steady && self.last != self.known && {
            self.known.clone_from(&self.last);
            true
        }
    }
}

pub struct Reload {
    pub path: PathBuf,
    pub reloader: Reloader,
    pub set_level: Box<dyn Fn(Level) + Send + Sync>,
}

impl Reload {
    /// Takes up what changes in the file, and on SIGHUP, until `stop`. `first` is the file as it was at the start.
    pub async fn watch(mut self, first: Content, stop: CancellationToken) {
        use tokio::signal::unix::{SignalKind, signal};
        let Ok(mut hangup) = signal(SignalKind::hangup()) else {
            error!("cannot listen for SIGHUP");
            return;
        };
        let mut watched = Watched::new(first);
        let mut tick = tokio::time::interval(LOOK_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                Some(()) = hangup.recv() => {
                    info!(signal = "SIGHUP", "the configuration file is read again");
                    watched = Watched::new(content(&self.path));
                }
                _ = tick.tick() => {
                    if !watched.look(content(&self.path)) {
                        continue;
                    }
                    info!(file = %self.path.display(), "the configuration file has changed");
                }
            }
            self.take_up().await;
        }
    }

    async fn take_up(&mut self) {
        let next = match config::load(&self.path) {
            Ok(next) => next,
            Err(error) => {
                self.reloader.refuse(error.to_string());
                error!(error = error.to_string(), "the configuration is refused, and the old one goes on");
                return;
            }
        };
        for warning in &next.warnings {
            warn!("{warning}");
        }
        match self.reloader.take_up(next).await {
            Ok(difference) if difference.is_nothing() => info!("nothing in the configuration has changed"),
            Ok(difference) => {
                (self.set_level)(self.reloader.running().log.level);
                info!(
                    started = difference.start.join(", "),
                    stopped = difference.stop.join(", "),
                    keys = difference.live.join(", "),
                    "the configuration is reloaded"
                );
            }
            Err(Refused::Stops) => info!("the relay stops: the configuration is not taken up any more"),
            Err(refused) => {
                error!(error = refused.to_string(), "the configuration is refused, and the old one goes on");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_once_and_when_it_stays() {
        let some = |text: &str| Some(text.as_bytes().to_vec());
        let mut watched = Watched::new(some("a"));
        let looks = [
            (some("a"), false),
            (some("b"), false),
            (some("b"), true),
            (some("b"), false),
            // Half written.
            (some(""), false),
            (some("c"), false),
            (some("c"), true),
            // Gone for a moment, and back.
            (None, false),
            (some("c"), false),
            (some("c"), false),
            (None, false),
            (None, true),
            (some("a"), false),
            (some("a"), true),
        ];
        for (index, (now, changed)) in looks.into_iter().enumerate() {
            assert_eq!(watched.look(now), changed, "look {index}");
        }
    }
}
