//! The tables of a part: how one is made, started and stopped, also while the relay runs.
//!
//! A table is known to everybody by its place, which is free again when the last word of its source has been
//! heard. So nothing that was said of one table can be taken for another's.
//!
//! Whatever can fail of another configuration is tried before a table stops ([`Roster::plan`]); from then on only the
//! end of the relay comes between.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::Context as _;
use tokio::{
    sync::{Semaphore, mpsc, oneshot, watch},
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{info, warn};

use super::{
    backlog::{Watched, watch_backlog},
    log::Log,
    places::Places,
    reload::Refused,
    tables::{policy, record_spec, shared as shared_by, table_spec},
};
use crate::{
    admin::{
        desk::{self, Desk},
        metrics::Metrics,
        status::Board,
    },
    config::{self, Config, Dialect, Difference, Poll},
    coordinate::{Lease, drain::Drain},
    event::TableIx,
    record::{Rules, Watch},
    relay::{self, Change, retry::GiveUp, window::Window},
    source::{Command, Feed, Source as _, Yield, database::Database, log::Unsettled, table::TableSource},
};

/// What the tables of a part have in common.
pub(super) struct Common {
    pub database: Database,
    pub board: Arc<Board>,
    pub metrics: Arc<Metrics>,
    pub window: Arc<Window>,
    /// Has a turn for each large payload that may be fetched at once.
    pub fetches: Arc<Semaphore>,
    pub has_store: bool,
    pub watch: Watch,
    /// One producer publishes all of them.
    pub exactly_once: bool,
    /// Of the tables that are shared, and of those that are not.
    pub lease: watch::Receiver<Lease>,
    pub whole: watch::Receiver<Lease>,
    pub drain: Arc<Drain>,
    pub events: mpsc::Sender<(TableIx, Yield)>,
    /// The spool tells of every commit, and its relay is in the same process.
    pub is_spool: bool,
}

/// A table that is not started.
pub(super) struct Made {
    pub rules: Arc<relay::Table>,
    pub tell: mpsc::UnboundedSender<Command>,
    pub watched: Watched,
    source: TableSource,
    feed: Feed,
}

struct Running {
    name: String,
    table: TableIx,
    is_shared: bool,
    backlog: AbortOnDropHandle<()>,
}

/// Another configuration of the tables.
pub(super) struct Reload {
    pub to: Arc<Config>,
    pub difference: Difference,
    pub done: oneshot::Sender<Result<(), Refused>>,
}

/// A table that is to start: all of it that could be refused is there.
struct Coming<'a> {
    at: TableIx,
    table: &'a config::Table,
    rules: Rules,
}

/// The relay has ended, or is about to.
struct Stops;

impl From<Stops> for Refused {
    fn from(_: Stops) -> Refused {
        Refused::Stops
    }
}

pub(super) struct Roster {
    common: Common,
    log: Log,
    desk: Arc<Desk>,
    changes: mpsc::Sender<Change>,
    /// What the group is told that is relayed here.
    names: watch::Sender<BTreeSet<String>>,
    running: Vec<Running>,
    places: Places,
    sources: JoinSet<()>,
}

/// The rules of a table's records.
fn compile(table: &config::Table, has_store: bool, watch: &Watch) -> anyhow::Result<Rules> {
    Rules::compile(&record_spec(table, has_store, watch)).with_context(|| format!("table {}", table.name))
}

impl Common {
    fn make(&self, config: &Config, at: TableIx, table: &config::Table, rules: Rules, log: &mut Log) -> Made {
        let retry = policy(&table.retry);
        let dialect = config.source.as_ref().map_or(Dialect::Sqlite, config::Source::dialect);
        let shared = (!self.is_spool).then(|| shared_by(table, dialect, config.replicas.buckets)).flatten();
        let spec = table_spec(table, &rules, shared);
        let is_shared = spec.shared.is_some();
        let (waits, waited) = watch::channel(0.0);
        let (unsettled, only_in_log) = watch::channel(Unsettled::default());
        let end = log.follow(dialect, table, &spec, waited, unsettled);
        let (tell, commands) = mpsc::unbounded_channel::<Command>();
        let feed = Feed { table: at, events: self.events.clone(), commands };
        let lease = if is_shared { self.lease.clone() } else { self.whole.clone() };
        let rules = Arc::new(relay::Table {
            name: table.name.clone(),
            rules,
            order: table.order,
            keeps_rows: spec.stays(),
            retry,
            give_up: GiveUp { after: table.retry.give_up_after, then: table.on_failure },
            max_held: table.hold.max_events,
        });
        let source = TableSource {
            log: end,
            database: self.database.clone(),
            spec: spec.clone(),
            poll: self.poll(table),
            retry,
            window: self.window.clone(),
            fetches: self.fetches.clone(),
            lease: lease.clone(),
            drain: is_shared.then(|| self.drain.clone()),
            exactly_once: self.exactly_once,
            board: self.board.clone(),
            metrics: self.metrics.clone(),
            table: rules.clone(),
        };
        if is_shared {
            self.drain.begins(at);
        }
        Made { rules, tell, watched: Watched { spec, lease, waits, only_in_log }, source, feed }
    }

    fn poll(&self, table: &config::Table) -> Poll {
        match self.is_spool {
            true => Poll { wake: config::Wake::Notify, ..table.poll.clone() },
            false => table.poll.clone(),
        }
    }
}

impl Roster {
    pub fn new(
        common: Common,
        desk: Arc<Desk>,
        changes: mpsc::Sender<Change>,
        names: watch::Sender<BTreeSet<String>>,
    ) -> Roster {
        Roster {
            common,
            log: Log::default(),
            desk,
            changes,
            names,
            running: Vec::new(),
            places: Places::default(),
            sources: JoinSet::new(),
        }
    }

    /// Makes tables, or none of them.
    pub fn make_all(&mut self, config: &Config, tables: &[config::Table]) -> anyhow::Result<Vec<Made>> {
        let coming = self.plan(tables)?;
        Ok(coming.into_iter().map(|coming| self.make(config, coming)).collect())
    }

    /// Finds out what can be wrong with tables that are to start, and gives them their places.
    fn plan<'a>(
        &mut self,
        tables: impl IntoIterator<Item = &'a config::Table>,
    ) -> anyhow::Result<Vec<Coming<'a>>> {
        let Common { has_store, watch, .. } = &self.common;
        let compiled = tables.into_iter().map(|table| Ok((table, compile(table, *has_store, watch)?)));
        let compiled: Vec<(&config::Table, Rules)> = compiled.collect::<anyhow::Result<_>>()?;
        let places = self.places.take(compiled.len())?;
        let coming = |(at, (table, rules))| Coming { at, table, rules };
        Ok(places.into_iter().zip(compiled).map(coming).collect())
    }

    fn make(&mut self, config: &Config, Coming { at, table, rules }: Coming<'_>) -> Made {
        self.common.make(config, at, table, rules, &mut self.log)
    }

    /// Starts a table that the relay knows.
    pub fn start(&mut self, made: Made) {
        let Made { source, feed, watched, tell, .. } = made;
        let (table, name) = (feed.table, watched.spec.name.clone());
        self.desk.add(desk::Table {
            spec: watched.spec.clone(),
            database: self.common.database.clone(),
            source: tell.downgrade(),
        });
        let is_shared = watched.spec.shared.is_some();
        let Common { database, board, metrics, .. } = &self.common;
        let backlog = watch_backlog(database.clone(), watched, table, board.clone(), metrics.clone());
        let backlog = AbortOnDropHandle::new(tokio::spawn(backlog));
        let events = feed.events.clone();
        self.sources.spawn(async move {
            source.run(feed).await;
            // Where the relay is gone there is nobody to be told.
            events.send((table, Yield::Ended)).await.ok();
        });
        self.running.push(Running { name, table, is_shared, backlog });
    }

    /// Begins to read the log, where a table follows it.
    pub fn open_log(&mut self, config: &Config) {
        self.log.open(config, &self.common.database, &self.common.whole, &self.common.metrics);
    }

    /// Shows the tables, in this order.
    pub fn show(&self, tables: &[config::Table]) {
        let place = |table: &config::Table| {
            let running = self.running.iter().find(|running| running.name == table.name)?;
            Some((running.table, running.is_shared))
        };
        self.common.board.show(tables.iter().filter_map(place));
    }

    /// Takes up other configurations, until `stop`.
    pub async fn serve(&mut self, mut reloads: mpsc::Receiver<Reload>, stop: CancellationToken) {
        loop {
            let Reload { to, difference, done } = tokio::select! {
                biased;
                () = stop.cancelled() => return,
                Some(reload) = reloads.recv() => reload,
            };
            tokio::select! {
                biased;
                // Whatever has come of it, everything stops now.
                () = stop.cancelled() => return,
                result = self.take_up(&to, &difference) => {
                    done.send(result).ok();
                }
            }
        }
    }

    async fn take_up(&mut self, to: &Config, difference: &Difference) -> Result<(), Refused> {
        let starts = to.tables.iter().filter(|table| difference.start.contains(&table.name));
        let coming = self.plan(starts).map_err(Refused::Failed)?;
        Ok(self.carry_out(to, difference, coming).await?)
    }

    async fn carry_out(
        &mut self,
        to: &Config,
        difference: &Difference,
        coming: Vec<Coming<'_>>,
    ) -> Result<(), Stops> {
        let followed = self.log.has_followers();
        let mut other_log = false;
        let leaving: Vec<&String> =
            difference.stop.iter().filter(|name| !difference.start.contains(*name)).collect();
        for name in &leaving {
            self.desk.remove(name);
        }
        self.stop(&difference.stop, to.shutdown.grace).await?;
        for name in &difference.stop {
            other_log |= self.log.leave(name);
        }
        if other_log {
            self.log.close().await;
        }
        let followers = self.log.followers();
        let made: Vec<Made> = coming.into_iter().map(|coming| self.make(to, coming)).collect();
        if self.log.followers() > followers {
            other_log = true;
            self.log.close().await;
        }
        for made in made {
            let (table, name) = (made.feed.table, made.watched.spec.name.clone());
            let (done, known) = oneshot::channel();
            let (rules, source) = (made.rules.clone(), made.tell.clone());
            self.tell(Change::Start { table, rules, source, done }, known).await?;
            self.common.board.begin(table, &name);
            self.common.metrics.begin(&name);
            self.start(made);
            info!(table = name, "the table starts");
        }
        if other_log {
            self.open_log(to);
        }
        if followed && !self.log.has_followers() {
            warn!(
                "no table follows the log any more; a slot stays in the database, and the server keeps its log for it \
                 until it is dropped"
            );
        }
        self.show(&to.tables);
        for name in leaving {
            self.common.metrics.end(name);
        }
        self.names.send_replace(names(&to.tables));
        Ok(())
    }

    /// Stops tables: what of them is in flight is finished within `grace`.
    async fn stop(&mut self, names: &[String], grace: Duration) -> Result<(), Stops> {
        let stopping: Vec<Running> =
            self.running.extract_if(.., |running| names.contains(&running.name)).collect();
        let mut ends = Vec::new();
        for Running { name, table, backlog, .. } in stopping {
            info!(table = name, "the table stops: no more of it is read, what is in flight is finished");
            backlog.abort();
            let (done, ended) = oneshot::channel();
            self.changes.send(Change::Stop { table, grace, done }).await.map_err(|_| Stops)?;
            ends.push((table, ended));
        }
        for (table, ended) in ends {
            ended.await.map_err(|_| Stops)?;
            self.common.drain.ended(table);
            self.places.give_back(table);
        }
        while self.sources.try_join_next().is_some() {}
        Ok(())
    }

    async fn tell(&self, change: Change, done: oneshot::Receiver<()>) -> Result<(), Stops> {
        self.changes.send(change).await.map_err(|_| Stops)?;
        done.await.map_err(|_| Stops)
    }

    /// Waits until every source has ended.
    pub async fn sources_end(&mut self) {
        while self.sources.join_next().await.is_some() {}
    }

    /// The log is the last to hear what is settled.
    pub async fn end(&mut self) {
        self.sources.shutdown().await;
        self.log.close().await;
    }
}

pub(super) fn names(tables: &[config::Table]) -> BTreeSet<String> {
    tables.iter().map(|table| table.name.clone()).collect()
}
