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
    rows::{Known, Layout, image},
};
use crate::{
    event::Event,
    relay::core::window_bytes,
    source::{
        database::TableSpec,
        log::{
            At, Progress, Streamed,
            binlog::{Commit, Coordinates, Gtid},
        },
    },
};

/// Enough to hand over, in rows and in bytes.
const BATCH_ROWS: usize = 512;
const BATCH_BYTES: usize = 256 << 10;

/// A table's part of the decoder.
#[derive(Debug)]
pub struct Route {
    pub spec: TableSpec,
    /// `None`: the table is not there.
    pub known: Option<Known>,
    pub progress: Arc<Progress>,
    rows: Vec<Streamed>,
    bytes: usize,
}

impl Route {
    pub fn new(spec: TableSpec, known: Option<Known>, progress: Arc<Progress>) -> Route {
        Route { spec, known, progress, rows: Vec::new(), bytes: 0 }
    }
}

/// Rows of one table that may be handed over.
#[derive(Debug)]
pub struct Ready {
    pub table: usize,
    pub rows: Vec<Streamed>,
    pub bytes: usize,
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
    /// What one transaction may keep, in bytes.
    limit: usize,
    checksum: bool,
    /// How far the log was read.
    at: Coordinates,
    /// Where the log was when it began to be read.
    current_at: Option<Coordinates>,
    rows: usize,
    bytes: usize,
}

impl Decoder {
    pub fn new(routes: Vec<Route>, start: Coordinates, current_at: Coordinates, limit: usize) -> Decoder {
        let mut decoder = Decoder {
            routes,
            layouts: HashMap::new(),
            transaction: Transaction::default(),
            limit,
            checksum: false,
            at: start,
            current_at: Some(current_at),
            rows: 0,
            bytes: 0,
        };
        decoder.is_current();
        decoder
    }

    pub fn at(&self) -> Coordinates {
        self.at
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

    /// An event, as the server sends it: behind a byte that says that it is one.
    pub fn take(&mut self, packet: &[u8]) -> Result<Verdict, Malformed> {
        let bytes = event_of(packet)?;
        // Before it is told whether events have checksums there is one, the name of the first file, which
        // is known.
        let (header, body) = match Header::parse(bytes)?.0 {
            header if header.kind == kind::ROTATE && header.seconds == 0 => return Ok(Verdict::GoOn),
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
                        Inner::Oversize(header) => self.oversize(header.kind),
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

    /// Files grow beyond what the events can tell; numbers go on then.
    fn reach(&mut self, header: &Header) {
        if header.end == 0 {
            return;
        }
        let high = self.at.at & !0xffff_ffff;
        let mut at = high | u64::from(header.end);
        if header.end < self.at.at as u32 && self.at.at - at > 1 << 31 {
            at += 1 << 32;
        }
        self.at.at = self.at.at.max(at);
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
            Body::MariadbGtid { alone, prepared } => {
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
        let word = |word: &str| {
            text.get(..word.len()).is_some_and(|start| start.eq_ignore_ascii_case(word.as_bytes()))
        };
        if word("BEGIN") {
            self.transaction.is_open = true;
        } else if word("COMMIT") {
            self.commit();
        } else if word("XA START") {
            (self.transaction.is_open, self.transaction.all_left) = (true, true);
        } else if word("XA COMMIT") {
            // Prepared before: which tables it is of was told then, or before the log began to be read.
            self.transaction.all_left = true;
            self.commit();
        } else if word("ROLLBACK TO") {
            self.transaction.all_left = true;
        } else if word("ROLLBACK") || word("XA ROLLBACK") {
            self.transaction = Transaction::default();
        } else if word("SAVEPOINT") || word("XA END") {
            // Nothing is done by it.
        } else if self.transaction.is_open {
            // A change that is told as a statement.
            self.transaction.all_left = true;
        } else {
            self.transaction = Transaction::default();
            let names = self.routes.iter().filter_map(|route| route.spec.name.rsplit('.').next());
            if names.into_iter().any(|name| contains(text, name)) {
                return Verdict::Changed;
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
        layout.rows(present, rows, &mut |event| match event {
            Some(event) if !is_left && bytes <= limit => {
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
                let (route, bytes) = (&mut self.routes[index], window_bytes(&event));
                route.rows.push(Streamed { at: At::Binlog(commit.clone()), event: Some(event) });
                route.bytes += bytes;
                self.bytes += bytes;
                self.rows += 1;
            }
        }
        for (index, route) in self.routes.iter_mut().enumerate() {
            if transaction.all_left || transaction.left.contains(&index) {
                route.rows.push(Streamed { at: At::Binlog(commit.clone()), event: None });
                self.rows += 1;
            }
        }
    }
}

fn event_of(packet: &[u8]) -> Result<&[u8], Malformed> {
    match packet {
        [0, event @ ..] => Ok(event),
        _ => Err(Malformed("a packet that is no event")),
    }
}

/// Whether a statement may be about a table.
fn contains(text: &[u8], name: &str) -> bool {
    text.windows(name.len().max(1)).any(|part| part.eq_ignore_ascii_case(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio::sync::Notify;

    use super::*;
    use crate::{
        config::{AfterPublish, Order},
        event::Place,
        source::{
            database::{Column, Rows},
            mysql::{
                event::tests::{event, query_body},
                map::code,
                payload::tests::compress,
            },
        },
    };

    fn column(name: &str, kind: &str, full: &str) -> Column {
        Column {
            name: name.into(),
            kind: kind.into(),
            full: full.into(),
            written: full.into(),
            charset: (kind == "varchar").then(|| "utf8mb4".into()),
            collation: None,
            bits: None,
        }
    }

    fn decoder(limit: usize) -> Decoder {
        let columns: Vec<String> = ["id", "payload"].map(String::from).to_vec();
        let spec = TableSpec {
            rows: Rows::Stay,
            name: "outbox".into(),
            columns,
            optional: vec![],
            id: "id".into(),
            payload: "payload".into(),
            sequence: Some("seq".into()),
            order: Order::Key,
            timestamps: vec![],
            published_at: None,
            tx: None,
            after_publish: AfterPublish::Delete,
            retention: None,
            max_payload: 1 << 20,
            shared: None,
        };
        let columns = vec![
            column("seq", "bigint", "bigint"),
            column("id", "varchar", "varchar(36)"),
            column("payload", "blob", "blob"),
        ];
        let known = Known { database: "d".into(), name: "outbox".into(), columns };
        let progress = Arc::new(Progress::new(Arc::new(Notify::new())));
        let start = Coordinates { file: 1, at: 4 };
        let mut decoder = Decoder::new(vec![Route::new(spec, Some(known), progress)], start, start, limit);
        decoder.checksum = true;
        decoder
    }

    fn query(text: &str) -> Vec<u8> {
        event(kind::QUERY, 100, &query_body(text))
    }

    fn map() -> Vec<u8> {
        let columns = [3, code::LONGLONG, code::VARCHAR, code::BLOB, 3, 144, 0, 2, 0];
        event(
            kind::TABLE_MAP,
            200,
            &[&[7, 0, 0, 0, 0, 0, 1, 0][..], b"\x01d\0\x06outbox\0", &columns].concat(),
        )
    }

    fn insert(seq: u8, payload: &[u8]) -> Vec<u8> {
        let mut body =
            vec![7, 0, 0, 0, 0, 0, 1, 0, 2, 0, 3, 0b111, 0, seq, 0, 0, 0, 0, 0, 0, 0, 2, b'i', b'd'];
        body.extend_from_slice(&(payload.len() as u16).to_le_bytes());
        body.extend_from_slice(payload);
        event(kind::WRITE_ROWS, 300, &body)
    }

    fn commit() -> Vec<u8> {
        event(kind::XID, 400, &[0; 8])
    }

    /// The numbers of the rows that came; 0 is one that was left to the table.
    fn run(decoder: &mut Decoder, events: &[Vec<u8>]) -> Result<Vec<i64>, Malformed> {
        for event in events {
            decoder.take(&[&[0][..], event].concat())?;
        }
        let rows = decoder.take_ready().into_iter().flat_map(|ready| ready.rows);
        let number = |row: Streamed| match row.event.map(|event| event.place) {
            Some(Place::Int(number)) => number,
            _ => 0,
        };
        Ok(rows.map(number).collect())
    }

    #[test]
    fn rows_come_when_their_transaction_has_committed() {
        let decoder = &mut decoder(1000);
        assert_eq!(run(decoder, &[query("BEGIN"), map(), insert(1, b"a"), insert(2, b"b")]), Ok(vec![]));
        assert_eq!(run(decoder, &[commit()]), Ok(vec![1, 2]));
        assert_eq!(decoder.at(), Coordinates { file: 1, at: 400 });
        let undone = [query("BEGIN"), map(), insert(3, b"a"), query("ROLLBACK")];
        assert_eq!(run(decoder, &undone), Ok(vec![]));
        let committed = [query("BEGIN"), map(), insert(4, b"a"), query("COMMIT")];
        assert_eq!(run(decoder, &committed), Ok(vec![4]));
    }

    #[test]
    fn what_is_not_told_as_rows_is_left_to_the_table() {
        let all = |between: &[Vec<u8>], end: Vec<u8>| {
            let events =
                [&[query("BEGIN"), map(), insert(1, b"a")], between, &[insert(2, b"b"), end]].concat();
            run(&mut decoder(1000), &events)
        };
        assert_eq!(all(&[query("SAVEPOINT a")], commit()), Ok(vec![1, 2]));
        assert_eq!(all(&[query("ROLLBACK TO a")], commit()), Ok(vec![0]));
        assert_eq!(all(&[query("INSERT INTO outbox SELECT 1")], commit()), Ok(vec![0]));
        // EXECUTE_LOAD_QUERY_EVENT, and one of a kind that nobody knows.
        assert_eq!(all(&[event(18, 1, b"")], commit()), Ok(vec![0]));
        assert_eq!(all(&[event(250, 1, b"")], commit()), Ok(vec![0]));
        assert_eq!(all(&[insert(3, &[b'x'; 2000])], commit()), Ok(vec![0]));
        let prepared = [query("XA START 'x'"), map(), insert(1, b"a"), query("XA END 'x'")];
        let events = [&prepared[..], &[event(kind::XA_PREPARE, 9, &[0])]].concat();
        assert_eq!(run(&mut decoder(1000), &events), Ok(vec![]));
        let events = [&events[..], &[query("XA COMMIT 'x'")]].concat();
        assert_eq!(run(&mut decoder(1000), &events), Ok(vec![0]));
        let events = [&prepared[..], &[event(kind::XA_PREPARE, 9, &[1])]].concat();
        assert_eq!(run(&mut decoder(1000), &events), Ok(vec![0]));
    }

    #[test]
    fn a_compressed_transaction_is_rows_or_an_error_and_never_nothing() {
        let events = [query("BEGIN"), map(), insert(1, b"a"), insert(2, &[b'x'; 600]), commit()];
        let good = compress(&events);
        let payload = |bytes: &[u8]| [event(kind::TRANSACTION_PAYLOAD, 900, bytes)];
        assert_eq!(run(&mut decoder(1000), &payload(&good)), Ok(vec![1, 2]));
        assert_eq!(run(&mut decoder(500), &payload(&good)), Ok(vec![0]));
        for end in 0..good.len() {
            assert!(run(&mut decoder(1000), &payload(&good[..end])).is_err(), "cut at {end}");
        }
        // One that is too long to be kept.
        let decoder = &mut decoder(1000);
        let head = &[&[0][..], &payload(&good)[0]].concat()[..40];
        assert_eq!(decoder.take_head(head), Ok(Verdict::GoOn));
        assert_eq!(run(decoder, &[]), Ok(vec![0]));
    }

    #[test]
    fn a_statement_that_names_a_table_has_the_log_read_anew() {
        let verdict = |text: &str| decoder(1000).take(&[&[0][..], &query(text)].concat());
        assert_eq!(verdict("alter table OUTBOX drop column id"), Ok(Verdict::Changed));
        assert_eq!(verdict("CREATE TABLE other (id int)"), Ok(Verdict::GoOn));
        let incident = [&[0][..], &event(kind::INCIDENT, 9, &[1, 0, 0])].concat();
        assert!(decoder(1000).take(&incident).is_err());
    }

    #[test]
    fn places_go_on_where_their_numbers_end() {
        let decoder = &mut decoder(1000);
        for (end, at) in [(0xffff_ff00, 0xffff_ff00), (50, (1 << 32) + 50), (0, (1 << 32) + 50)] {
            run(decoder, &[event(29, end, b"")]).unwrap();
            assert_eq!(decoder.at().at, at);
        }
        run(decoder, &[event(kind::ROTATE, 60, b"\x04\0\0\0\0\0\0\0binlog.000002")]).unwrap();
        assert_eq!(decoder.at(), Coordinates { file: 2, at: 4 });
    }

    proptest! {
        #[test]
        fn any_events_are_taken_or_refused(
            events in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..60)), 0..12),
            rows in prop::collection::vec(any::<u8>(), 0..60),
        ) {
            let mut decoder = decoder(200);
            let mut all = vec![query("BEGIN"), map()];
            all.push(event(kind::WRITE_ROWS, 1, &[&[7, 0, 0, 0, 0, 0, 1, 0, 2, 0, 3, 7][..], &rows].concat()));
            all.extend(events.iter().map(|(kind, body)| event(*kind, 1, body)));
            for event in all {
                let _ = decoder.take(&[&[0][..], &event].concat());
                let _ = decoder.take_head(&[&[0][..], &event].concat());
            }
            decoder.take_ready();
        }
    }
}
