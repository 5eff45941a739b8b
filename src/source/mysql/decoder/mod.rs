//! From the events of the log to rows of tables. Pure.
//!
//! Rows are handed over when their transaction has committed. A transaction that is large, and whatever the
//! log does not tell as rows (a statement, what was rolled back to a savepoint, a transaction that was
//! prepared and commits later), is left to the table: it is polled, and then the log is followed again. So
//! no transaction is kept, however large it is.

use std::{collections::HashMap, sync::Arc};

use tracing::warn;

use super::{
    event::{Body, Header, Insert, Malformed, kind, parse, table_id},
    map::TableMap,
    payload::{Inner, Payload, inflate},
    rows::{Known, Layout, Made, image},
    statement::{Statement, contains},
};
use crate::{
    event::Event,
    relay::core::window_bytes,
    source::{
        database::TableSpec,
        log::{
            At, Decoded, Progress, Ready, Streamed,
            binlog::{Commit, Coordinates, Gtid, ServerId},
        },
    },
};

/// A table's part of the decoder.
#[derive(Debug)]
pub struct Route {
    pub spec: TableSpec,
    /// `None`: the table is not there.
    pub known: Option<Known>,
    pub progress: Arc<Progress>,
}

impl Route {
    pub fn new(spec: TableSpec, known: Option<Known>, progress: Arc<Progress>) -> Route {
        Route { spec, known, progress }
    }
}

/// The transaction that is being read.
#[derive(Debug, Default)]
struct Transaction {
    gtid: Option<Gtid>,
    /// It has begun, and may have rows.
    is_open: bool,
    rows: Vec<(usize, Event)>,
    bytes: usize,
    /// Tables that have to be polled for it, by their bits; or all of them.
    left: Vec<usize>,
    all_left: bool,
}

/// What a caller has to do about what was decoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    GoOn,
    /// A table may have other columns now: the log is to be read anew.
    Changed,
}

pub struct Decoder {
    routes: Vec<Route>,
    /// By the number that the log has for a table: where its columns are, if they are as expected.
    layouts: HashMap<u64, (usize, Option<Layout>)>,
    transaction: Transaction,
    /// Whose log it is to be.
    server: ServerId,
    /// What one transaction may keep, in bytes.
    limit: usize,
    checksum: bool,
    /// How far the log was read.
    at: Coordinates,
    /// Where the log was when it began to be read.
    current_at: Option<Coordinates>,
    decoded: Decoded,
}

impl Decoder {
    /// `end`: where the log was when it began to be read.
    pub fn new(
        routes: Vec<Route>,
        server: ServerId,
        start: Coordinates,
        end: Coordinates,
        limit: usize,
    ) -> Decoder {
        let mut decoder = Decoder {
            decoded: Decoded::of(routes.len()),
            routes,
            layouts: HashMap::new(),
            transaction: Transaction::default(),
            server,
            limit,
            checksum: false,
            at: start,
            current_at: Some(end),
        };
        decoder.is_current();
        decoder
    }

    pub fn at(&self) -> Coordinates {
        self.at
    }

    pub fn is_full(&self) -> bool {
        self.decoded.is_full()
    }

    /// What was decoded since the last time.
    pub fn take_ready(&mut self) -> Vec<Ready> {
        self.decoded.take()
    }

    /// An event, as the server sends it: behind a byte that says that it is one.
    pub fn take(&mut self, packet: &[u8]) -> Result<Verdict, Malformed> {
        let bytes = event_of(packet)?;
        // Before it is told whether events have checksums there is one, the name of the first file, which
        // is known.
        let (header, body) = match Header::parse(bytes)?.0 {
            header if header.kind == kind::ROTATE && header.seconds == 0 => {
                if header.server != self.server {
                    return Err(Malformed(
                        "it is of another server than the tables: more than one answers at this address",
                    ));
                }
                return Ok(Verdict::GoOn);
            }
            _ => parse(bytes, self.checksum)?,
        };
        let verdict = match body {
            Body::Format { checksum } => {
                self.checksum = checksum;
                Verdict::GoOn
            }
            Body::Rotate { file, at } => {
                self.at = Coordinates::new(file, at).map_err(|_| Malformed("no number of the next file"))?;
                // Numbers of tables are those of a run of the server.
                self.layouts.clear();
                self.is_current();
                return Ok(Verdict::GoOn);
            }
            Body::Payload(payload) => {
                self.reach(&header);
                let limit = self.limit;
                let mut payload = Payload::parse(payload, limit)?;
                let mut verdict = Verdict::GoOn;
                while let Some(inner) = payload.next_event()? {
                    let next = match inner {
                        Inner::Whole(bytes) => self.body(parse(bytes, false)?.1)?,
                        Inner::Oversize { head, .. } => self.oversize(Header::parse(head)?.0.kind),
                    };
                    verdict = if next == Verdict::Changed { next } else { verdict };
                }
                verdict
            }
            body => {
                self.reach(&header);
                self.body(body)?
            }
        };
        self.is_current();
        Ok(verdict)
    }

    /// An event that is too long to be kept, by its beginning.
    pub fn take_head(&mut self, head: &[u8]) -> Result<Verdict, Malformed> {
        let (header, rest) = Header::parse(event_of(head)?)?;
        self.reach(&header);
        if header.kind == kind::TRANSACTION_PAYLOAD {
            // It is all of its transaction.
            self.transaction.all_left = true;
            self.commit();
            return Ok(Verdict::GoOn);
        }
        let is_insert = matches!(
            header.kind,
            kind::WRITE_ROWS
                | kind::WRITE_ROWS_V1
                | kind::WRITE_ROWS_COMPRESSED
                | kind::WRITE_ROWS_COMPRESSED_V1
        );
        if is_insert {
            let (table, _) = table_id(rest)?;
            if let Some((index, _)) = self.layouts.get(&table) {
                self.leave(*index);
            }
            return Ok(Verdict::GoOn);
        }
        Ok(self.oversize(header.kind))
    }

    fn oversize(&mut self, of: u8) -> Verdict {
        match of {
            of if kind::SILENT.contains(&of) => Verdict::GoOn,
            // A long statement, which may be about a table.
            kind::QUERY | kind::QUERY_COMPRESSED if !self.transaction.is_open => Verdict::Changed,
            _ => {
                self.transaction.all_left = true;
                Verdict::GoOn
            }
        }
    }

    fn reach(&mut self, header: &Header) {
        reach(&mut self.at, header);
    }

    /// The tables are told when the log has come to where it was when it began to be read.
    fn is_current(&mut self) {
        if self.current_at.is_some_and(|current| self.at >= current) {
            self.current_at = None;
            self.routes.iter().for_each(|route| route.progress.set_current());
        }
    }

    fn body(&mut self, body: Body<'_>) -> Result<Verdict, Malformed> {
        match body {
            Body::Gtid(gtid) => self.transaction = Transaction { gtid, ..Transaction::default() },
            Body::MariadbGtid { alone, prepared, .. } => {
                self.transaction =
                    Transaction { is_open: !alone, all_left: prepared, ..Transaction::default() };
            }
            Body::Query(text) => return Ok(self.statement(text)),
            Body::Commit => self.commit(),
            // Its rows are found when it commits.
            Body::Prepared => self.transaction = Transaction::default(),
            Body::TableMap(map) => return Ok(self.map(&map)),
            Body::Insert(insert) => self.insert(insert)?,
            Body::Incident => return Err(Malformed("the server says that events are missing from it")),
            Body::Opaque if self.transaction.is_open => self.transaction.all_left = true,
            Body::Opaque => return Ok(Verdict::Changed),
            Body::Silent | Body::Heartbeat | Body::Format { .. } | Body::Rotate { .. } | Body::Payload(_) => {
            }
        }
        Ok(Verdict::GoOn)
    }

    fn statement(&mut self, text: &[u8]) -> Verdict {
        match Statement::of(text) {
            Statement::Begin => self.transaction.is_open = true,
            Statement::Commit => self.commit(),
            Statement::XaStart => (self.transaction.is_open, self.transaction.all_left) = (true, true),
            Statement::XaCommit => {
                // Prepared before: which tables it is of was told then, or before the log began to be read.
                self.transaction.all_left = true;
                self.commit();
            }
            Statement::RollbackTo(_) => self.transaction.all_left = true,
            Statement::Rollback | Statement::XaRollback => self.transaction = Transaction::default(),
            Statement::Savepoint(_) | Statement::XaEnd => {}
            // A change that is told as a statement.
            _ if self.transaction.is_open => self.transaction.all_left = true,
            _ => {
                self.transaction = Transaction::default();
                if self.routes.iter().any(|route| names(text, &route.spec)) {
                    return Verdict::Changed;
                }
            }
        }
        Verdict::GoOn
    }

    fn map(&mut self, map: &TableMap<'_>) -> Verdict {
        let is_its = |route: &Route| {
            let known = route.known.as_ref();
            known.is_some_and(|known| {
                known.database.as_bytes() == map.database && known.name.as_bytes() == map.table
            })
        };
        let Some(index) = self.routes.iter().position(is_its) else {
            self.layouts.remove(&map.id);
            return Verdict::GoOn;
        };
        let route = &self.routes[index];
        let layout = route.known.as_ref().and_then(|known| Layout::new(&route.spec, known, map));
        if layout.is_none() {
            warn!(
                table = route.spec.name.as_str(),
                "the table's columns are not what they were when the log began to be read"
            );
        }
        // A column that is written in an unknown way is no change: its rows are left to the table.
        let verdict = match layout.is_none() && map.columns.is_some() {
            true => Verdict::Changed,
            false => Verdict::GoOn,
        };
        self.layouts.insert(map.id, (index, layout));
        verdict
    }

    fn leave(&mut self, index: usize) {
        let transaction = &mut self.transaction;
        if !transaction.left.contains(&index) {
            transaction.left.push(index);
        }
        transaction.rows.retain(|(of, _)| *of != index);
        transaction.bytes = transaction.rows.iter().map(|(_, event)| window_bytes(event)).sum();
    }

    fn insert(&mut self, insert: Insert<'_>) -> Result<(), Malformed> {
        let Some((index, layout)) = self.layouts.get(&insert.table) else { return Ok(()) };
        let index = *index;
        if self.transaction.all_left || self.transaction.left.contains(&index) {
            return Ok(());
        }
        let Some(layout) = layout else {
            self.leave(index);
            return Ok(());
        };
        let (present, rows) = image(insert.rest)?;
        let unpacked;
        let rows = if insert.compressed {
            match inflate(rows, self.limit)? {
                Some(rows) => {
                    unpacked = rows;
                    &unpacked[..]
                }
                None => {
                    self.leave(index);
                    return Ok(());
                }
            }
        } else {
            rows
        };
        let (mut is_left, mut bytes, limit) = (false, self.transaction.bytes, self.limit);
        let found = &mut self.transaction.rows;
        layout.rows(present, rows, &mut |made| match made {
            Made::Whole(event) if !is_left && bytes <= limit => {
                bytes += window_bytes(&event);
                found.push((index, event));
            }
            _ => is_left = true,
        })?;
        self.transaction.bytes = bytes;
        if is_left || bytes > limit {
            self.leave(index);
        }
        Ok(())
    }

    /// What the transaction has inserted is there.
    fn commit(&mut self) {
        let transaction = std::mem::take(&mut self.transaction);
        if transaction.rows.is_empty() && transaction.left.is_empty() && !transaction.all_left {
            return;
        }
        let commit = Arc::new(Commit { gtid: transaction.gtid, end: self.at });
        if !transaction.all_left {
            for (index, event) in transaction.rows {
                self.decoded.push(index, Streamed { at: At::Binlog(commit.clone()), event: Some(event) });
            }
        }
        for index in 0..self.routes.len() {
            if transaction.all_left || transaction.left.contains(&index) {
                self.decoded.push(index, Streamed { at: At::Binlog(commit.clone()), event: None });
            }
        }
    }
}

pub(super) fn event_of(packet: &[u8]) -> Result<&[u8], Malformed> {
    match packet {
        [0, event @ ..] => Ok(event),
        _ => Err(Malformed("a packet that is no event")),
    }
}

/// The log has come to the end of this event. Files grow beyond what events can tell; numbers go on then.
pub(super) fn reach(at: &mut Coordinates, header: &Header) {
    if header.end == 0 {
        return;
    }
    let high = at.at & !0xffff_ffff;
    let mut end = high | u64::from(header.end);
    if header.end < at.at as u32 && at.at - end > 1 << 31 {
        end += 1 << 32;
    }
    at.at = at.at.max(end);
}

/// Whether a statement may be about this table.
pub(super) fn names(text: &[u8], spec: &TableSpec) -> bool {
    spec.name.rsplit('.').next().is_some_and(|name| contains(text, name))
}

#[cfg(test)]
mod tests;
