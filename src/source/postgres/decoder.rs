//! From the frames of the log to rows of tables, and to the place that may be confirmed. Pure.

use std::{
    collections::{HashMap, VecDeque},
    sync::Arc,
};

use tracing::warn;

use super::{
    pgoutput::{Cell, Frame, Malformed, Message, Relation, Tuple},
    rows::{Known, Layout},
    slot::{HEARTBEAT, Obstacle},
};
use crate::source::{
    database::TableSpec,
    log::{At, Lsn, Progress, Streamed},
};

/// Enough to hand over, in rows and in bytes.
const BATCH_ROWS: usize = 512;
const BATCH_BYTES: usize = 256 << 10;
/// Transactions that are told apart. Beyond it several are confirmed as one.
const OPEN_AT_MOST: usize = 4096;

/// A table's part of the decoder.
#[derive(Debug)]
pub struct Route {
    spec: TableSpec,
    oid: u32,
    known: Vec<Known>,
    progress: Arc<Progress>,
    /// Rows that came so far.
    came: u64,
    rows: Vec<Streamed>,
    bytes: usize,
}

impl Route {
    pub fn new(spec: TableSpec, oid: u32, known: Vec<Known>, progress: Arc<Progress>) -> Route {
        Route { spec, oid, known, progress, came: 0, rows: Vec::new(), bytes: 0 }
    }
}

/// Rows of one table that may be handed over.
#[derive(Debug)]
pub struct Ready {
    pub table: usize,
    pub rows: Vec<Streamed>,
    pub bytes: usize,
}

/// A transaction that has rows of ours, or several in a row.
#[derive(Debug)]
struct Open {
    end: Lsn,
    /// For each table: how many of its rows must be settled.
    marks: Vec<(usize, u64)>,
}

pub struct Decoder {
    routes: Vec<Route>,
    /// By the relation's number, which is the table's: where its columns are, if they are as expected.
    layouts: HashMap<u32, (usize, Option<Layout>)>,
    /// What our heartbeats of this reading say.
    token: String,
    transaction: Option<At>,
    /// Tables of which the transaction has rows.
    touched: Vec<usize>,
    open: VecDeque<Open>,
    confirmed: Lsn,
    rows: usize,
    bytes: usize,
}

impl Decoder {
    pub fn new(routes: Vec<Route>, token: String) -> Decoder {
        Decoder {
            routes,
            layouts: HashMap::new(),
            token,
            transaction: None,
            touched: Vec::new(),
            open: VecDeque::new(),
            confirmed: Lsn::default(),
            rows: 0,
            bytes: 0,
        }
    }

    pub fn is_full(&self) -> bool {
        self.rows >= BATCH_ROWS || self.bytes >= BATCH_BYTES
    }

    /// What was decoded since the last time.
    pub fn take_ready(&mut self) -> Vec<Ready> {
        (self.rows, self.bytes) = (0, 0);
        let with_rows = self.routes.iter_mut().enumerate().filter(|(_, route)| !route.rows.is_empty());
        with_rows
            .map(|(table, route)| Ready {
                table,
                rows: std::mem::take(&mut route.rows),
                bytes: std::mem::take(&mut route.bytes),
            })
            .collect()
    }

    pub fn take(&mut self, frame: &[u8]) -> Result<(), Obstacle> {
        self.frame(frame).map_err(|error| Obstacle::Malformed("the log cannot be read", error))
    }

    /// A frame that is too large, by its beginning: its row is its table's.
    pub fn take_head(&mut self, head: &[u8]) {
        // Else it is a message of somebody else's.
        if let Ok((relation, _)) = Tuple::of_head(head) {
            self.row(relation, None);
        }
    }

    fn frame(&mut self, frame: &[u8]) -> Result<(), Malformed> {
        let message = match Frame::parse(frame)? {
            Frame::Data(message) => Message::parse(message)?,
            Frame::Keepalive { wal_end, .. } => {
                if self.transaction.is_none() {
                    self.reached(wal_end);
                }
                return Ok(());
            }
        };
        match message {
            Message::Insert { relation, tuple } => self.insert(relation, tuple)?,
            Message::Begin { commit, xid } => self.transaction = Some(At { xid, commit }),
            Message::Commit { end } => self.commit(end),
            Message::Relation(relation) => self.relation(&relation),
            Message::Logical { prefix, content, .. } => {
                if prefix == HEARTBEAT && content == self.token.as_bytes() {
                    self.routes.iter().for_each(|route| route.progress.set_current());
                }
            }
            Message::Other => {}
        }
        Ok(())
    }

    fn relation(&mut self, relation: &Relation) {
        let Some(table) = self.routes.iter().position(|route| route.oid == relation.id) else {
            self.layouts.remove(&relation.id);
            return;
        };
        let route = &self.routes[table];
        let layout = Layout::new(&route.spec, &route.known, &relation.columns);
        if layout.is_none() {
            warn!(
                table = route.spec.name.as_str(),
                "the table's columns are not what they were when the log began to be read; its rows are polled"
            );
        }
        self.layouts.insert(relation.id, (table, layout));
    }

    fn insert(&mut self, relation: u32, tuple: Tuple<'_>) -> Result<(), Malformed> {
        let Some((_, layout)) = self.layouts.get(&relation) else { return Ok(()) };
        let mut cells: Vec<Cell<'_>> = Vec::with_capacity(16);
        let event = match layout {
            Some(layout) => layout.event(tuple, &mut cells)?,
            None => None,
        };
        self.row(relation, event);
        Ok(())
    }

    fn row(&mut self, relation: u32, event: Option<crate::event::Event>) {
        let (Some((table, _)), Some(at)) = (self.layouts.get(&relation), self.transaction) else { return };
        let (table, route) = (*table, &mut self.routes[*table]);
        if !self.touched.contains(&table) {
            self.touched.push(table);
        }
        let bytes = event.as_ref().map_or(0, crate::relay::core::window_bytes);
        route.came += 1;
        route.bytes += bytes;
        self.rows += 1;
        self.bytes += bytes;
        route.rows.push(Streamed { at, event });
    }

    fn commit(&mut self, end: Lsn) {
        self.transaction = None;
        if self.touched.is_empty() {
            return self.reached(end);
        }
        let marks: Vec<(usize, u64)> =
            self.touched.drain(..).map(|table| (table, self.routes[table].came)).collect();
        let many = self.open.len() >= OPEN_AT_MOST;
        match self.open.back_mut() {
            Some(last) if many => {
                last.end = end;
                for (table, came) in marks {
                    match last.marks.iter_mut().find(|(there, _)| *there == table) {
                        Some((_, mark)) => *mark = came,
                        None => last.marks.push((table, came)),
                    }
                }
            }
            _ => self.open.push_back(Open { end, marks }),
        }
    }

    /// The log has come to here without anything of ours.
    fn reached(&mut self, end: Lsn) {
        match self.open.back_mut() {
            Some(last) => last.end = last.end.max(end),
            None => self.confirmed = self.confirmed.max(end),
        }
    }

    /// Up to where every row is settled.
    pub fn confirmed(&mut self) -> Lsn {
        while let Some(first) = self.open.front()
            && first.marks.iter().all(|(table, count)| self.routes[*table].progress.settled() >= *count)
        {
            self.confirmed = self.confirmed.max(first.end);
            self.open.pop_front();
        }
        self.confirmed
    }
}
