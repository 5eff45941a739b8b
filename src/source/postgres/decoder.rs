//! From the frames of the log to rows of tables, and to the place that may be confirmed. Pure.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant},
};

use tracing::warn;

use super::{
    message,
    pgoutput::{Cell, Frame, Malformed, Message, POSTGRES_EPOCH_SECONDS, Relation, Tuple},
    rows::{Known, Layout},
    slot::{HEARTBEAT, Obstacle},
};
use crate::{
    event::{Event, Place},
    source::{
        database::{Rows, TableSpec},
        log::{At, Decoded, Lsn, Open, Progress, Ready, Streamed, Unsettled},
    },
};

/// A table's part of the decoder.
#[derive(Debug)]
pub struct Route {
    spec: TableSpec,
    /// The table's number and columns; `None` for logical messages.
    table: Option<(u32, Vec<Known>)>,
    /// A frame above this is left to the table, or parked unread, in bytes.
    limit: usize,
    progress: Arc<Progress>,
}

impl Route {
    pub fn new(
        spec: TableSpec,
        table: Option<(u32, Vec<Known>)>,
        limit: usize,
        progress: Arc<Progress>,
    ) -> Route {
        Route { spec, table, limit, progress }
    }

    fn has_prefix(&self, prefix: &str) -> bool {
        matches!(&self.spec.rows, Rows::Messages { prefix: ours } if ours == prefix)
    }
}

/// The transaction that is being read.
#[derive(Clone, Copy, Debug)]
struct Transaction {
    xid: u32,
    commit: Lsn,
    committed_ms: i64,
    /// Events of ours that it has had.
    events: u32,
}

impl Transaction {
    /// The next event's place: in the order of the log, as text too, and the same whenever the log is read.
    fn next_place(&mut self) -> Place {
        let place = format!("{:016X}.{:08X}", self.commit.0, self.events);
        self.events += 1;
        Place::Text(place.into())
    }
}

pub struct Decoder {
    routes: Vec<Route>,
    /// By the relation's number, which is the table's: where its columns are, if they are as expected.
    layouts: HashMap<u32, (usize, Option<Layout>)>,
    /// What our heartbeats of this reading say.
    token: String,
    transaction: Option<Transaction>,
    /// Tables of which the transaction has rows.
    touched: Vec<usize>,
    open: Open<Lsn>,
    /// How much the server's clock is ahead of ours.
    ahead_ms: i64,
    decoded: Decoded,
    changed: bool,
}

fn micros_now() -> i64 {
    chrono::Utc::now().timestamp_micros() - POSTGRES_EPOCH_SECONDS * 1_000_000
}

impl Decoder {
    pub fn new(routes: Vec<Route>, token: String) -> Decoder {
        let open = Open::new(routes.iter().map(|route| route.progress.clone()).collect(), Lsn::default());
        Decoder {
            decoded: Decoded::of(routes.len()),
            routes,
            layouts: HashMap::new(),
            token,
            transaction: None,
            touched: Vec::new(),
            open,
            ahead_ms: 0,
            changed: false,
        }
    }

    pub fn is_full(&self) -> bool {
        self.decoded.is_full()
    }

    /// What was decoded since the last time.
    pub fn take_ready(&mut self) -> Vec<Ready> {
        self.decoded.take()
    }

    pub fn take(&mut self, frame: &[u8]) -> Result<(), Obstacle> {
        self.frame(frame).map_err(|error| Obstacle::Malformed("the log cannot be read", error))
    }

    /// A frame that is too large, by its beginning: its row is its table's, or is parked unread.
    pub fn take_head(&mut self, head: &[u8], bytes: usize) {
        if let Some(prefix) = Tuple::prefix_of_head(head) {
            if let Some(index) = self.routes.iter().position(|route| route.has_prefix(prefix)) {
                self.event(index, |spec, place, at| Some(message::unread(spec, bytes, place, at)));
            }
        } else if let Ok((relation, tuple)) = Tuple::of_head(head)
            && let Some((index, layout)) = self.layouts.get(&relation)
        {
            let unread = match (&self.routes[*index].spec.rows, layout) {
                (Rows::Transient, Some(layout)) => Some(layout.unread(tuple, bytes)),
                _ => None,
            };
            self.event(*index, |_, place, _| unread.map(|event| Event { place, ..event }));
        }
    }

    fn frame(&mut self, frame: &[u8]) -> Result<(), Malformed> {
        let message = match Frame::parse(frame)? {
            Frame::Data(message) => Message::parse(message)?,
            Frame::Keepalive { wal_end, clock, .. } => {
                self.ahead_ms = (clock - micros_now()) / 1000;
                if self.transaction.is_none() {
                    self.reached(wal_end);
                }
                return Ok(());
            }
        };
        match message {
            Message::Insert { relation, tuple } => return self.insert(relation, tuple, frame.len()),
            Message::Begin { commit, micros, xid } => self.begin(xid, commit, micros),
            Message::Commit { end } => self.commit(end),
            Message::Relation(relation) => self.relation(&relation),
            Message::Logical { transactional, at, prefix, content } => {
                if prefix == HEARTBEAT && content == self.token.as_bytes() {
                    self.routes.iter().for_each(|route| route.progress.set_current());
                }
                let Some(index) = self.routes.iter().position(|route| route.has_prefix(prefix)) else {
                    return Ok(());
                };
                // One that belongs to no transaction is one of its own.
                let alone = !transactional && self.transaction.is_none();
                if alone {
                    self.begin(0, at, micros_now());
                }
                self.event(index, |spec, place, at| Some(message::event(spec, content, place, at)));
                if alone {
                    self.commit(Lsn(at.0 + 1));
                }
            }
            Message::Other => {}
        }
        Ok(())
    }

    fn begin(&mut self, xid: u32, commit: Lsn, micros: i64) {
        let committed_ms = micros.div_euclid(1000) + POSTGRES_EPOCH_SECONDS * 1000;
        self.transaction = Some(Transaction { xid, commit, committed_ms, events: 0 });
    }

    fn relation(&mut self, relation: &Relation) {
        let is_its = |route: &Route| route.table.as_ref().is_some_and(|(oid, _)| *oid == relation.id);
        let Some(index) = self.routes.iter().position(is_its) else {
            self.layouts.remove(&relation.id);
            return;
        };
        let route = &self.routes[index];
        let known = route.table.as_ref().map_or(&[][..], |(_, known)| known);
        let layout = Layout::new(&route.spec, known, &relation.columns);
        if layout.is_none() {
            warn!(
                table = route.spec.name.as_str(),
                "the table's columns are not what they were when the log began to be read"
            );
            self.changed = true;
        }
        self.layouts.insert(relation.id, (index, layout));
    }

    fn insert(&mut self, relation: u32, tuple: Tuple<'_>, bytes: usize) -> Result<(), Malformed> {
        let Some((index, layout)) = self.layouts.get(&relation) else { return Ok(()) };
        let (index, route) = (*index, &self.routes[*index]);
        let mut cells: Vec<Cell<'_>> = Vec::with_capacity(16);
        let event = match layout {
            Some(layout) if bytes <= route.limit => layout.event(tuple, &mut cells)?,
            Some(layout) if !route.spec.stays() => Some(layout.unread(tuple, bytes)),
            _ => None,
        };
        let only_in_log = !route.spec.stays();
        self.event(index, |_, place, _| {
            event.map(|event| if only_in_log { Event { place, ..event } } else { event })
        });
        Ok(())
    }

    fn event(&mut self, index: usize, make: impl FnOnce(&TableSpec, Place, i64) -> Option<Event>) {
        let Some(transaction) = &mut self.transaction else { return };
        let place = match self.routes[index].spec.stays() {
            true => Place::Int(0),
            false => transaction.next_place(),
        };
        let at = At::Wal { xid: transaction.xid, commit: transaction.commit };
        let committed_ms = transaction.committed_ms;
        let event = make(&self.routes[index].spec, place, committed_ms);
        if !self.touched.contains(&index) {
            self.touched.push(index);
        }
        self.open.came(index);
        self.decoded.push(index, Streamed { at, event });
    }

    /// Whether a table's columns were not as expected, since this was asked last.
    pub fn take_changed(&mut self) -> bool {
        std::mem::take(&mut self.changed)
    }

    /// Whether this table's rows can be read as the log has them now.
    pub fn reads(&self, spec: &TableSpec) -> bool {
        self.layouts
            .values()
            .all(|(index, layout)| layout.is_some() || self.routes[*index].spec.name != spec.name)
    }

    /// The tables, with their numbers and columns as they were when the log began to be read.
    pub fn tables(&self) -> impl Iterator<Item = (&TableSpec, &(u32, Vec<Known>))> {
        self.routes.iter().filter_map(|route| Some((&route.spec, route.table.as_ref()?)))
    }

    /// The rows of a table that came and are not settled, and how old the oldest is, by the server's clock.
    pub fn unsettled(&self, table: usize) -> Unsettled {
        let (rows, first) = self.open.unsettled(table);
        let first = first.or(self.transaction.map(|transaction| transaction.committed_ms));
        let now = micros_now() / 1000 + POSTGRES_EPOCH_SECONDS * 1000 + self.ahead_ms;
        let age = first.filter(|_| rows > 0).map(|first| Duration::from_millis((now - first).max(0) as u64));
        Unsettled { rows, since: age.and_then(|age| Instant::now().checked_sub(age)) }
    }

    fn commit(&mut self, end: Lsn) {
        let committed_ms = self.transaction.take().map_or(0, |transaction| transaction.committed_ms);
        if let Some(before) = self.open.end(self.touched.drain(..), committed_ms, || end) {
            *before = end.max(*before);
        }
    }

    /// The log has come to here without anything of ours.
    fn reached(&mut self, end: Lsn) {
        let before = self.open.last();
        *before = end.max(*before);
    }

    /// Up to where every row is settled.
    pub fn confirmed(&mut self) -> Lsn {
        *self.open.settled(|settled, behind| *settled = behind.max(*settled))
    }
}
