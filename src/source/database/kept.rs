//! Tables whose rows stay when they are published: what each dialect has of their frontier.

#[cfg(any(feature = "mysql", feature = "sqlite"))]
use std::future::ready;
use std::time::Duration;

use super::{Error, Found, Limits, Outbox};
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

#[cfg(any(feature = "postgres", feature = "sqlite"))]
impl Ended {
    /// Of places with the states of their holds.
    pub(super) fn of(rows: Vec<(String, String)>) -> Ended {
        let mut ended = Ended::default();
        for (place, state) in rows {
            let list = if state == super::holds::RELEASED { &mut ended.released } else { &mut ended.skipped };
            list.extend(place.parse::<i64>());
        }
        ended
    }
}

/// The same call on each dialect whose rows can be kept.
macro_rules! keeping {
    ($self:expr, $outbox:ident => $call:expr) => {
        match $self {
            #[cfg(feature = "mysql")]
            Self::Mysql(_) => {
                let says = "MySQL does not tell which rows a read could not see yet: choose delete or mark";
                ready(Err(Error::Setup(says.into()))).await
            }
            #[cfg(feature = "postgres")]
            Self::Postgres($outbox) => $call,
            #[cfg(feature = "sqlite")]
            Self::Sqlite($outbox) => $call,
        }
    };
}

#[cfg_attr(
    not(any(feature = "postgres", feature = "sqlite")),
    expect(unused_variables, reason = "no dialect of this build keeps rows")
)]
impl Outbox {
    /// The frontier as it was written down; `None` where it never was.
    pub async fn frontier(&self) -> Result<Option<Recorded>, Error> {
        keeping!(self, outbox => outbox.frontier().await)
    }

    /// Rows that are not behind the frontier, in order: one statement, one snapshot.
    pub async fn read_kept(&self, frontier: &Frontier, limits: Limits) -> Result<Looked<Found>, Error> {
        keeping!(self, outbox => outbox.read_kept(frontier, limits).await)
    }

    /// The numbers of some rows that can be seen and were not handed over: the log is yet to bring them.
    pub async fn strays(&self, frontier: &Frontier, most: usize) -> Result<Looked<i64>, Error> {
        match self {
            #[cfg(feature = "postgres")]
            Outbox::Postgres(outbox) => outbox.strays(frontier, most).await,
            #[cfg(any(feature = "mysql", feature = "sqlite"))]
            _ => {
                let from = frontier.upto;
                let what = format!("there is no log that could bring {most} rows from {from} on");
                ready(Err(Error::Setup(what))).await
            }
        }
    }

    /// Writes the frontier down, if the lease is still of this epoch.
    pub async fn settle(&self, recorded: &Recorded, epoch: i64) -> Result<(), Error> {
        keeping!(self, outbox => outbox.settle(recorded, epoch).await)
    }

    pub async fn ended_holds(&self) -> Result<Ended, Error> {
        keeping!(self, outbox => outbox.ended_holds().await)
    }

    /// What became of these holds is written down elsewhere.
    pub async fn forget_holds(&self, places: &[String], epoch: i64) -> Result<(), Error> {
        keeping!(self, outbox => outbox.forget_holds(places, epoch).await)
    }

    /// Notes what is published now, so that it can be told later what was published long ago: if there is
    /// news, and so long after the last time.
    pub async fn milestone(&self, apart: Duration, epoch: i64) -> Result<(), Error> {
        keeping!(self, outbox => outbox.milestone(apart, epoch).await)
    }
}
