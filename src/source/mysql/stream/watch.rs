//! What is looked at beside the log: where it is, whose it is, and whether it is heard of.

use std::{
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use tokio::{
    sync::Notify,
    time::{Instant, MissedTickBehavior},
};
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use super::Ended;
use crate::{
    coordinate::report,
    source::{
        database::TableSpec,
        log::binlog::{Coordinates, ServerId},
        mysql::{
            rows::Known,
            server::{Obstacle, Server},
        },
    },
};

const COMPARE_EVERY: Duration = Duration::from_secs(5);

/// How far the log was read, and where it is, as they were last looked at.
struct Places {
    server: ServerId,
    at: Coordinates,
    end: Option<Coordinates>,
    /// The log was read further than it is, or is another server's.
    begun_anew: bool,
    /// The server's settings are such that it cannot be followed any more.
    refused: Option<String>,
}

/// Notes now and then where the log is and whether it may still be followed, and sees whether the tables are the
/// same: one that could not be followed may be mended.
async fn keep_watch(
    server: Server,
    tables: Vec<(TableSpec, Option<Known>)>,
    places: Arc<Mutex<Places>>,
    differs: Arc<Notify>,
) {
    let mut compare = tokio::time::interval_at(Instant::now() + COMPARE_EVERY, COMPARE_EVERY);
    compare.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let polled: Vec<TableSpec> =
        tables.iter().filter(|(_, known)| known.is_none()).map(|(spec, _)| spec.clone()).collect();
    let first = server.tables(&polled).await.ok();
    let places = || places.lock().unwrap_or_else(PoisonError::into_inner);
    loop {
        compare.tick().await;
        let read_before = places().at;
        match server.database.log_end().await {
            Ok((server, now)) => {
                let mut places = places();
                places.end = Some(now);
                places.begun_anew |= now < read_before || server != places.server;
            }
            Err(error) => debug!(error = report(&error), "cannot look where the log is"),
        }
        if let Ok(Some(why)) = server.database.log_refusal(server.settings.server_id).await {
            places().refused = Some(why);
        }
        if !polled.is_empty() && server.tables(&polled).await.ok() != first {
            differs.notify_one();
        }
    }
}

/// A reading that is watched.
pub struct Watch {
    places: Arc<Mutex<Places>>,
    /// A table that could not be followed is another one now.
    differs: Arc<Notify>,
    _task: AbortOnDropHandle<()>,
    heard: Instant,
    /// A place that the log had come to, and has not told us of since then; and how far it was read then.
    behind: Option<(Coordinates, Coordinates, Instant)>,
}

impl Watch {
    /// `tables` with what they are, if they can be followed; `at` is where the log is read from.
    pub fn keep(
        server: &Server,
        tables: Vec<(TableSpec, Option<Known>)>,
        id: ServerId,
        at: Coordinates,
    ) -> Watch {
        let places = Places { server: id, at, end: None, begun_anew: false, refused: None };
        let places = Arc::new(Mutex::new(places));
        let differs = Arc::new(Notify::new());
        let task = tokio::spawn(keep_watch(server.clone(), tables, places.clone(), differs.clone()));
        Watch { places, differs, _task: AbortOnDropHandle::new(task), heard: Instant::now(), behind: None }
    }

    pub async fn differs(&self) {
        self.differs.notified().await;
    }

    pub fn heard(&mut self) {
        self.heard = Instant::now();
    }

    /// What is looked at once in a while. `at`: how far the log was read; `waits`: the tables take nothing.
    pub fn look(&mut self, at: Coordinates, silent_after: Duration, waits: bool) -> Option<Ended> {
        let now = Instant::now();
        let (end, begun_anew, refused) = {
            let mut places = self.places.lock().unwrap_or_else(PoisonError::into_inner);
            places.at = at;
            (places.end, places.begun_anew, places.refused.take())
        };
        if begun_anew {
            return Some(Ended::Again("the server's binlog has begun anew, or it is another server"));
        }
        if let Some(why) = refused {
            return Some(Ended::Trouble(Obstacle::Setup(why)));
        }
        if waits {
            // Nothing is read while the tables take nothing, so nothing can be heard.
            (self.heard, self.behind) = (now, None);
            return None;
        }
        let trouble = |why: &str| Some(Ended::Trouble(Obstacle::Setup(why.into())));
        if self.heard.elapsed() > silent_after {
            return trouble("the server has stopped answering");
        }
        match (self.behind, end?) {
            (_, end) if at >= end => self.behind = None,
            // It comes nearer.
            (Some((place, then, _)), _) if at < place && at > then => self.behind = Some((place, at, now)),
            (Some((place, _, since)), _) if at < place => {
                if since.elapsed() > 2 * silent_after {
                    return trouble("the server does not tell all of its binlog");
                }
            }
            (_, end) => self.behind = Some((end, at, now)),
        }
        None
    }
}
