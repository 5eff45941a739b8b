//! Tables whose rows stay when they are published: what each dialect has of their frontier.

#[cfg(feature = "sqlite")]
use std::future::ready;
use std::time::Duration;

use super::{Error, Found, Limits, Outbox, each, holds::RELEASED};
use crate::source::{
    kept::{Frontier, Recorded},
    log::Snapshot,
};

/// What a read of a kept table has brought, and the moment that it saw.
#[derive(Debug)]
pub struct Looked<T> {
    pub found: Vec<T>,
    pub seen: Option<Snapshot>,
}

/// Holds that are none any more: their rows are to be read again, or are settled.
#[derive(Debug, Default)]
pub struct Ended {
    pub released: Vec<i64>,
    pub skipped: Vec<i64>,
}

impl Ended {
    /// Of places with the states of their holds.
    pub(super) fn of(rows: Vec<(String, String)>) -> Ended {
        let mut ended = Ended::default();
        for (place, state) in rows {
            let list = if state == RELEASED { &mut ended.released } else { &mut ended.skipped };
            list.extend(place.parse::<i64>());
        }
        ended
    }
}

impl Outbox {
    /// The frontier as it was written down; `None` where it never was.
    pub async fn frontier(&self) -> Result<Option<Recorded>, Error> {
        each!(self, outbox => outbox.frontier().await)
    }

    /// Rows that are not behind the frontier, in order: one statement, one snapshot.
    pub async fn read_kept(&self, frontier: &Frontier, limits: Limits) -> Result<Looked<Found>, Error> {
        each!(self, outbox => outbox.read_kept(frontier, limits).await)
    }

    /// The numbers of some rows that can be seen and were not handed over: the log is yet to bring them.
    pub async fn strays(&self, frontier: &Frontier, most: usize) -> Result<Looked<i64>, Error> {
        match self {
            #[cfg(feature = "postgres")]
            Outbox::Postgres(outbox) => outbox.strays(frontier, most).await,
            #[cfg(feature = "sqlite")]
            Outbox::Sqlite(_) => {
                let from = frontier.upto;
                let what = format!("SQLite has no log that could bring {most} rows from {from} on");
                ready(Err(Error::Setup(what))).await
            }
        }
    }

    /// Writes the frontier down, if the lease is still of this epoch.
    pub async fn settle(&self, recorded: &Recorded, epoch: i64) -> Result<(), Error> {
        each!(self, outbox => outbox.settle(recorded, epoch).await)
    }

    pub async fn ended_holds(&self) -> Result<Ended, Error> {
        each!(self, outbox => outbox.ended_holds().await)
    }

    /// What became of these holds is written down elsewhere.
    pub async fn forget_holds(&self, places: &[String], epoch: i64) -> Result<(), Error> {
        each!(self, outbox => outbox.forget_holds(places, epoch).await)
    }

    /// Notes what is published now, so that it can be told later what was published long ago: if there is
    /// news, and so long after the last time.
    pub async fn milestone(&self, apart: Duration, epoch: i64) -> Result<(), Error> {
        each!(self, outbox => outbox.milestone(apart, epoch).await)
    }
}
