//! The tables of a part: how one is made, started and stopped, also while the relay runs.
//!
//! A table is known to everybody by its place, which is free again when the last word of its source has been
//! heard. So nothing that was said of one table can be taken for another's.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use anyhow::{Context as _, anyhow};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{info, warn};

use super::{
    backlog::{Watched, watch_backlog},
    log::Log,
    tables::{policy, record_spec, shared as shared_by, table_spec},
};
use crate::{
    admin::{
        metrics::Metrics,
        status::Board,
        verbs::{self, Desk},
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
    pub done: oneshot::Sender<anyhow::Result<()>>,
}

pub(super) struct Roster {
    common: Common,
    log: Log,
    desk: Arc<Desk>,
    changes: mpsc::Sender<Change>,
    /// What the group is told that is relayed here.
    names: watch::Sender<BTreeSet<String>>,
    running: Vec<Running>,
    free: Vec<TableIx>,
    places: u16,
    sources: JoinSet<()>,
}

/// The rules of a table's records.
pub(super) fn compile(table: &config::Table, has_store: bool, watch: &Watch) -> anyhow::Result<Rules> {
    Rules::compile(&record_spec(table, has_store, watch)).with_context(|| format!("table {}", table.name))
}

impl Common {
    fn make(&self, config: &Config, at: TableIx, table: &config::Table, rules: Rules, log: &mut Log) -> Made {
        let retry = policy(&table.retry);
        let dialect = config.source.as_ref().map_or(Dialect::Sqlite, config::Source::dialect);
        let is_whole = self.is_spool || self.exactly_once;
        let shared = (!is_whole).then(|| shared_by(table, dialect, config.replicas.buckets)).flatten();
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
        let (running, free) = (Vec::new(), Vec::new());
        Roster {
            common,
            log: Log::default(),
            desk,
            changes,
            names,
            running,
            free,
            places: 0,
            sources: JoinSet::new(),
        }
    }

    /// Makes a table, which has a place from now on.
    pub fn make(&mut self, config: &Config, table: &config::Table, rules: Rules) -> anyhow::Result<Made> {
        let at = match self.free.pop() {
            Some(at) => at,
            None => {
                let at = TableIx(self.places);
                self.places = self.places.checked_add(1).context("too many tables")?;
                at
            }
        };
        Ok(self.common.make(config, at, table, rules, &mut self.log))
    }

    /// Starts a table that the relay knows.
    pub fn start(&mut self, made: Made) {
        let Made { source, feed, watched, tell, .. } = made;
        let (table, name) = (feed.table, watched.spec.name.clone());
        self.desk.add(verbs::Table {
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

    async fn take_up(&mut self, to: &Config, difference: &Difference) -> anyhow::Result<()> {
        // What can be wrong is found out before anything stops.
        let starts = to.tables.iter().filter(|table| difference.start.contains(&table.name));
        let coming: Vec<(&config::Table, Rules)> = starts
            .map(|table| Ok((table, compile(table, self.common.has_store, &self.common.watch)?)))
            .collect::<anyhow::Result<_>>()?;
        let followed = self.log.has_followers();
        let mut other_log = false;
        self.stop(&difference.stop, to.shutdown.grace).await?;
        for name in &difference.stop {
            other_log |= self.log.leave(name);
        }
        if other_log {
            self.log.close().await;
        }
        let followers = self.log.followers();
        let mut made = Vec::new();
        for (table, rules) in coming {
            made.push(self.make(to, table, rules)?);
        }
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
        for name in difference.stop.iter().filter(|name| !difference.start.contains(*name)) {
            self.common.metrics.end(name);
        }
        self.names.send_replace(names(&to.tables));
        Ok(())
    }

    /// Stops tables: what of them is in flight is finished within `grace`.
    async fn stop(&mut self, names: &[String], grace: Duration) -> anyhow::Result<()> {
        let stopping: Vec<Running> =
            self.running.extract_if(.., |running| names.contains(&running.name)).collect();
        let mut ends = Vec::new();
        for Running { name, table, backlog, .. } in stopping {
            info!(table = name, "the table stops: no more of it is read, what is in flight is finished");
            self.desk.remove(&name);
            backlog.abort();
            let (done, ended) = oneshot::channel();
            self.changes.send(Change::Stop { table, grace, done }).await.map_err(|_| stops())?;
            ends.push((table, ended));
        }
        for (table, ended) in ends {
            ended.await.map_err(|_| stops())?;
            self.common.drain.ended(table);
            self.free.push(table);
        }
        while self.sources.try_join_next().is_some() {}
        Ok(())
    }

    async fn tell(&self, change: Change, done: oneshot::Receiver<()>) -> anyhow::Result<()> {
        self.changes.send(change).await.map_err(|_| stops())?;
        done.await.map_err(|_| stops())
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

fn stops() -> anyhow::Error {
    anyhow!("the relay stops")
}

pub(super) fn names(tables: &[config::Table]) -> BTreeSet<String> {
    tables.iter().map(|table| table.name.clone()).collect()
}
