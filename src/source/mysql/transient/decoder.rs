//! From the events of the log to rows of tables that only the log has, and to the position that may be stored.
//! Pure.
//!
//! Rows are handed over when their transaction is known to commit. The rows of one that is too large to be kept
//! are passed by; when it has committed the log is read again from where it began, and they are handed over as
//! they come. Nothing is left out: what cannot be read exactly ends the reading, before its transaction.

use std::{
    collections::HashMap,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use super::transaction::Transaction;
use crate::source::{
    database::TableSpec,
    log::{
        At, Decoded, Open, Progress, Ready, Streamed, Unsettled,
        binlog::{Coordinates, ServerId},
        position::{Identity, Position},
    },
    mysql::{
        decoder::{event_of, names, reach},
        event::{Body, Header, Insert, Malformed, kind, parse, table_id},
        map::TableMap,
        payload::{Inner, Payload, inflate},
        rows::{Known, Layout, Made, image},
        statement::Statement,
    },
};

const STATEMENT: &str = "it has a change that is told as a statement, and not as rows (binlog_format)";
const PREPARED: &str = "it is an XA transaction, which commits later or not at all";
const COLUMNS: &str = "it has rows from when columns that are needed were missing, or had other names or types; or \
                       binlog_row_metadata was not FULL";
const INCIDENT: &str = "the server says that events are missing there";
const UNTOLD: &str = "it has a row that the log does not tell as the table does (binlog_row_image)";
const LONG: &str = "an event of it is longer than may be kept (payload.max_bytes)";

/// A table's part of the decoder.
#[derive(Debug)]
pub struct Route {
    pub spec: TableSpec,
    pub known: Known,
    progress: Arc<Progress>,
}

impl Route {
    pub fn new(spec: TableSpec, known: Known, progress: Arc<Progress>) -> Route {
        Route { spec, known, progress }
    }
}

/// A transaction that cannot be read exactly.
#[derive(Debug)]
pub struct Unreadable {
    pub why: &'static str,
    pub start: Coordinates,
    /// Where to go on for whoever gives it up.
    pub behind: Position,
}

/// What a caller has to do about what was decoded.
#[derive(Debug)]
pub enum Verdict {
    GoOn,
    /// A table may have other columns from here on.
    Changed,
    /// A large transaction has committed: the log is to be read again from [`Decoder::reached`].
    Again,
    Unreadable(Box<Unreadable>),
}

/// What the decoder begins with.
pub struct Begin {
    pub server: ServerId,
    pub position: Position,
    pub era: i64,
    /// What one transaction may keep, in bytes.
    pub limit: usize,
    /// And one event that is unpacked.
    pub longest: usize,
}

pub struct Decoder {
    routes: Vec<Route>,
    /// By the number that the log has for a table: where its columns are, if they are as expected.
    layouts: HashMap<u64, (usize, Option<Layout>)>,
    transaction: Transaction,
    /// A compressed transaction, whose events are taken one by one.
    inside: Option<Payload<'static>>,
    begin: Begin,
    checksum: bool,
    /// How far the log was read, the file's name, and when the file was made.
    at: Coordinates,
    file: String,
    made: u32,
    /// Everything that was read to its end, and what of that is settled.
    reached: Position,
    open: Open<Position>,
    /// Where the transaction begins that is known to commit.
    ahead: Option<Coordinates>,
    decoded: Decoded,
}

fn unix_seconds() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}

impl Decoder {
    pub fn new(routes: Vec<Route>, begin: Begin) -> Decoder {
        let tables = routes.len();
        let open =
            Open::new(routes.iter().map(|route| route.progress.clone()).collect(), begin.position.clone());
        Decoder {
            routes,
            layouts: HashMap::new(),
            transaction: Transaction::new(Identity::None, Coordinates::default(), 0, tables),
            inside: None,
            checksum: false,
            at: Coordinates::default(),
            file: String::new(),
            made: 0,
            reached: begin.position.clone(),
            open,
            ahead: None,
            decoded: Decoded::of(tables),
            begin,
        }
    }

    pub fn at(&self) -> Coordinates {
        self.at
    }

    /// The file that is read, and when it was made.
    pub fn file(&self) -> (&str, u32) {
        (&self.file, self.made)
    }

    /// What was read to its end, settled or not.
    pub fn reached(&self) -> &Position {
        &self.reached
    }

    pub fn is_full(&self) -> bool {
        self.decoded.is_full()
    }

    /// What was decoded since the last time.
    pub fn take_ready(&mut self) -> Vec<Ready> {
        self.decoded.take()
    }

    /// The log is read again from [`Decoder::reached`] on: the transaction there has committed.
    pub fn rewind(&mut self) {
        self.ahead = Some(self.transaction.start);
        self.inside = None;
        self.layouts.clear();
        self.transaction = self.fresh(Identity::None, Coordinates::default(), 0);
    }

    /// The tables have these columns from here on, those that are there.
    pub fn learn(&mut self, tables: Vec<Option<Known>>) {
        for (route, known) in self.routes.iter_mut().zip(tables) {
            route.known = known.unwrap_or_else(|| route.known.clone());
        }
        self.layouts.clear();
    }

    fn fresh(&self, identity: Identity, start: Coordinates, seconds: u32) -> Transaction {
        Transaction::new(identity, start, seconds, self.routes.len())
    }

    /// An event, as the server sends it: behind a byte that says that it is one.
    pub fn take(&mut self, packet: &[u8]) -> Result<Verdict, Malformed> {
        let bytes = event_of(packet)?;
        let (header, _) = Header::parse(bytes)?;
        // Before it is told whether events have checksums there is one: the name of the file.
        let is_told = header.kind == kind::ROTATE && header.seconds == 0;
        if is_told && header.server != self.begin.server {
            return Err(Malformed(
                "it is of another server than the tables: more than one answers at this address",
            ));
        }
        let (header, body) = if is_told {
            // It has one, or has none; a sum that is right is no accident.
            parse(bytes, true).or_else(|_| parse(bytes, false))?
        } else {
            parse(bytes, self.checksum)?
        };
        match body {
            Body::Format { checksum } => {
                (self.checksum, self.made) = (checksum, header.seconds);
                return Ok(Verdict::GoOn);
            }
            Body::Rotate { file, at } => {
                self.at = Coordinates::new(file, at).map_err(|_| Malformed("no number of the next file"))?;
                file.clone_into(&mut self.file);
                // Numbers of tables are those of a run of the server.
                self.layouts.clear();
                if !is_told {
                    self.pass(&Identity::None, 0, []);
                }
                return Ok(Verdict::GoOn);
            }
            _ => reach(&mut self.at, &header),
        }
        match body {
            Body::Payload(payload) => {
                self.inside = Some(Payload::owned(payload, self.begin.longest)?);
                Ok(Verdict::GoOn)
            }
            body => self.body(&header, bytes.len(), body),
        }
    }

    /// Whether there is more of a compressed transaction.
    pub fn is_inside(&self) -> bool {
        self.inside.is_some()
    }

    /// The next event of a compressed transaction.
    pub fn take_inside(&mut self) -> Result<Verdict, Malformed> {
        let Some(mut payload) = self.inside.take() else { return Ok(Verdict::GoOn) };
        let verdict = match payload.next_event()? {
            None => return Ok(Verdict::GoOn),
            Some(Inner::Whole(event)) => {
                let (header, body) = parse(event, false)?;
                self.body(&header, event.len(), body)?
            }
            Some(Inner::Oversize { head, bytes }) => self.oversize(head, bytes)?,
        };
        self.inside = Some(payload);
        Ok(verdict)
    }

    /// An event that is too long to be kept, by its beginning.
    pub fn take_head(&mut self, head: &[u8], bytes: u64) -> Result<Verdict, Malformed> {
        let event = event_of(head)?;
        reach(&mut self.at, &Header::parse(event)?.0);
        self.oversize(event, bytes)
    }

    fn oversize(&mut self, event: &[u8], bytes: u64) -> Result<Verdict, Malformed> {
        let (header, rest) = Header::parse(event)?;
        match header.kind {
            of if kind::SILENT.contains(&of) => Ok(Verdict::GoOn),
            kind::WRITE_ROWS | kind::WRITE_ROWS_V1 => {
                let Body::Insert(insert) = parse(event, false)?.1 else {
                    return Err(Malformed("the beginning of a row"));
                };
                // More than that only one row takes: see `metadata_refusal`.
                let Some((index, layout)) = self.layouts.get(&insert.table) else { return Ok(Verdict::GoOn) };
                let Some(layout) = layout else {
                    self.transaction.cannot_be_read(COLUMNS);
                    return Ok(Verdict::GoOn);
                };
                let (present, row) = image(insert.rest)?;
                let event = layout.unread(present, row, bytes)?;
                let (index, Begin { era, limit, .. }) = (*index, &self.begin);
                self.transaction.take(index, event, *era, *limit);
                self.hand_over_if_it_commits();
                Ok(Verdict::GoOn)
            }
            kind::WRITE_ROWS_COMPRESSED | kind::WRITE_ROWS_COMPRESSED_V1 => {
                if self.layouts.contains_key(&table_id(rest)?.0) {
                    self.transaction.cannot_be_read(LONG);
                }
                Ok(Verdict::GoOn)
            }
            kind::TRANSACTION_PAYLOAD => {
                // It is all of its transaction.
                self.transaction.cannot_be_read(LONG);
                Ok(self.commit())
            }
            kind::QUERY | kind::QUERY_COMPRESSED if !self.transaction.is_open => {
                self.end();
                Ok(Verdict::Changed)
            }
            _ => {
                self.transaction.cannot_be_read(LONG);
                Ok(Verdict::GoOn)
            }
        }
    }

    fn body(&mut self, header: &Header, length: usize, body: Body<'_>) -> Result<Verdict, Malformed> {
        match body {
            Body::Gtid(gtid) => {
                let identity = gtid.map_or(Identity::None, Identity::Gtid);
                self.begin(identity, header, length)?;
            }
            Body::MariadbGtid { domain, number, alone, .. } => {
                let identity = Identity::Domain { domain, server: header.server, number };
                self.begin(identity, header, length)?;
                self.transaction.is_open = !alone;
            }
            Body::Query(text) => return Ok(self.statement(text)),
            Body::Commit => return Ok(self.commit()),
            Body::Prepared if self.transaction.has_rows() || self.transaction.unreadable.is_some() => {
                return Ok(self.unreadable(PREPARED));
            }
            Body::Prepared => self.end(),
            Body::TableMap(map) => self.map(&map),
            Body::Insert(insert) => self.insert(insert)?,
            Body::Incident => return Ok(self.unreadable(INCIDENT)),
            Body::Opaque if self.transaction.is_open => self.transaction.cannot_be_read(STATEMENT),
            // A long statement, or something that only replicas know.
            Body::Opaque => {
                self.end();
                return Ok(Verdict::Changed);
            }
            Body::Silent | Body::Heartbeat | Body::Format { .. } | Body::Rotate { .. } | Body::Payload(_) => {
            }
        }
        Ok(Verdict::GoOn)
    }

    fn begin(&mut self, identity: Identity, header: &Header, length: usize) -> Result<(), Malformed> {
        let start = Coordinates { at: self.at.at.saturating_sub(length as u64), ..self.at };
        self.transaction = self.fresh(identity, start, header.seconds);
        if let Some(ahead) = self.ahead.take() {
            if ahead != start {
                return Err(Malformed("it is not what it was when it was read before"));
            }
            self.transaction.commits = true;
        }
        Ok(())
    }

    fn statement(&mut self, text: &[u8]) -> Verdict {
        let transaction = &mut self.transaction;
        match Statement::of(text) {
            Statement::Begin | Statement::XaStart => transaction.is_open = true,
            Statement::Commit => return self.commit(),
            // Prepared before, and without rows of ours: that would have ended the reading.
            Statement::XaCommit | Statement::Rollback | Statement::XaRollback => {
                let (identity, start) = (std::mem::take(&mut transaction.identity), transaction.start);
                self.transaction = self.fresh(identity, start, 0);
                self.end();
            }
            Statement::Savepoint(name) => transaction.savepoint(name),
            Statement::RollbackTo(name) => transaction.roll_back_to(name),
            Statement::XaEnd => {}
            Statement::Definition if transaction.is_open => {}
            Statement::Other if transaction.is_open => transaction.cannot_be_read(STATEMENT),
            Statement::Definition | Statement::Other => {
                self.end();
                if self.routes.iter().any(|route| names(text, &route.spec)) {
                    return Verdict::Changed;
                }
            }
        }
        Verdict::GoOn
    }

    fn map(&mut self, map: &TableMap<'_>) {
        let is_its = |route: &Route| {
            route.known.database.as_bytes() == map.database && route.known.name.as_bytes() == map.table
        };
        let Some(index) = self.routes.iter().position(is_its) else {
            self.layouts.remove(&map.id);
            return;
        };
        let route = &self.routes[index];
        // Without the names nobody knows which columns those are: the table may have been another then.
        let named = Some(map).filter(|map| map.names.is_some());
        let layout = named.and_then(|map| Layout::new(&route.spec, &route.known, map));
        self.layouts.insert(map.id, (index, layout));
    }

    fn insert(&mut self, insert: Insert<'_>) -> Result<(), Malformed> {
        let Decoder { layouts, transaction, begin, .. } = self;
        let Some((index, layout)) = layouts.get(&insert.table) else { return Ok(()) };
        let Some(layout) = layout else {
            transaction.cannot_be_read(COLUMNS);
            return Ok(());
        };
        let (present, rows) = image(insert.rest)?;
        let unpacked;
        let rows = if insert.compressed {
            let Some(rows) = inflate(rows, begin.longest)? else {
                transaction.cannot_be_read(LONG);
                return Ok(());
            };
            unpacked = rows;
            &unpacked[..]
        } else {
            rows
        };
        layout.rows(present, rows, &mut |made| match made {
            Made::Whole(event) | Made::Long(event) => transaction.take(*index, event, begin.era, begin.limit),
            Made::Untold => transaction.cannot_be_read(UNTOLD),
        })?;
        self.hand_over_if_it_commits();
        Ok(())
    }

    fn hand_over_if_it_commits(&mut self) {
        if self.transaction.commits {
            self.hand_over();
        }
    }

    fn hand_over(&mut self) {
        for (index, event) in self.transaction.take_rows() {
            self.open.came(index);
            let at = At::Binlog(self.transaction.at.clone());
            self.decoded.push(index, Streamed { at, event: Some(event) });
        }
    }

    fn commit(&mut self) -> Verdict {
        if let Some(why) = self.transaction.unreadable {
            return self.unreadable(why);
        }
        if self.transaction.is_large {
            return Verdict::Again;
        }
        self.hand_over();
        self.end();
        Verdict::GoOn
    }

    fn unreadable(&self, why: &'static str) -> Verdict {
        let mut behind = self.reached.clone();
        behind.pass(&self.transaction.identity, &self.file, self.at.at);
        Verdict::Unreadable(Box::new(Unreadable { why, start: self.transaction.start, behind }))
    }

    /// The transaction has ended, or something that is one by itself.
    fn end(&mut self) {
        let ended = self.fresh(Identity::None, self.at, 0);
        let ended = std::mem::replace(&mut self.transaction, ended);
        self.pass(&ended.identity, ended.seconds, ended.tables());
    }

    fn pass(&mut self, identity: &Identity, seconds: u32, tables: impl IntoIterator<Item = usize>) {
        let Decoder { open, reached, file, at, .. } = self;
        reached.pass(identity, file, at.at);
        let before = open.end(tables, seconds.into(), || {
            let mut passed = reached.nothing();
            passed.pass(identity, file, at.at);
            passed
        });
        if let Some(before) = before {
            before.pass(identity, file, at.at);
        }
    }

    /// Up to where every row is settled: never in the middle of a transaction.
    pub fn settled(&mut self) -> &Position {
        self.open.settled(|settled, behind| settled.join(&behind))
    }

    /// Whether everything that was read to its end is settled.
    pub fn is_settled(&mut self) -> bool {
        self.settled();
        self.open.is_empty()
    }

    /// The rows of a table that came and are not settled, and how old the oldest is.
    pub fn unsettled(&self, table: usize) -> Unsettled {
        let (rows, seconds) = self.open.unsettled(table);
        let seconds = seconds.map_or(self.transaction.seconds.into(), i64::cast_unsigned);
        let age = Duration::from_secs(unix_seconds().saturating_sub(seconds));
        Unsettled { rows, since: (rows > 0).then(|| Instant::now().checked_sub(age)).flatten() }
    }
}
