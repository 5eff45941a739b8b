use proptest::prelude::*;
use tokio::sync::Notify;

use super::*;
use crate::{
    config::{AfterPublish, Order},
    event::Place,
    source::{
        database::{Column, Placing, Rows},
        mysql::{
            event::tests::{event, query_body},
            map::code,
            payload::tests::compress,
        },
        times::Unreadable,
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
        nullable: false,
        unique: false,
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
        placing: Placing::default(),
        unreadable: Unreadable::default(),
    };
    let columns = vec![
        column("seq", "bigint", "bigint"),
        column("id", "varchar", "varchar(36)"),
        column("payload", "blob", "blob"),
    ];
    let known = Known { database: "d".into(), name: "outbox".into(), columns };
    let progress = Arc::new(Progress::new(Arc::new(Notify::new())));
    let start = Coordinates { file: 1, at: 4 };
    let routes = vec![Route::new(spec, Some(known), progress)];
    let mut decoder = Decoder::new(routes, 0, start, start, limit);
    decoder.checksum = true;
    decoder
}

fn query(text: &str) -> Vec<u8> {
    event(kind::QUERY, 100, &query_body(text))
}

fn map() -> Vec<u8> {
    let columns = [3, code::LONGLONG, code::VARCHAR, code::BLOB, 3, 144, 0, 2, 0];
    event(kind::TABLE_MAP, 200, &[&[7, 0, 0, 0, 0, 0, 1, 0][..], b"\x01d\0\x06outbox\0", &columns].concat())
}

fn insert(seq: u8, payload: &[u8]) -> Vec<u8> {
    let mut body = vec![7, 0, 0, 0, 0, 0, 1, 0, 2, 0, 3, 0b111, 0, seq, 0, 0, 0, 0, 0, 0, 0, 2, b'i', b'd'];
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
        let events = [&[query("BEGIN"), map(), insert(1, b"a")], between, &[insert(2, b"b"), end]].concat();
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
    assert_eq!(run(&mut decoder(2000), &payload(&good)), Ok(vec![1, 2]));
    assert_eq!(run(&mut decoder(500), &payload(&good)), Ok(vec![0]));
    for end in 0..good.len() {
        assert!(run(&mut decoder(2000), &payload(&good[..end])).is_err(), "cut at {end}");
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

/// A file's beginning and one transaction, as the documentation of these versions has them ("Event Classes and
/// Types", "Gtid_log_event", "Table_map_event", "Rows_event"): no server of theirs runs in the tests.
#[test]
fn rows_of_mysql_5_7_and_8_0_are_rows() {
    let format = |version: &str, kinds: usize| {
        let mut name = version.as_bytes().to_vec();
        name.resize(50, 0);
        // Its time, the length of heads, the lengths of what comes behind them by kind, and CRC32.
        let body = [&4_u16.to_le_bytes()[..], &name, &[0; 4], &[19], &vec![8; kinds], &[1]].concat();
        event(kind::FORMAT_DESCRIPTION, 126, &body)
    };
    let begin = {
        // A thread, its time, the length of the database's name, no error; two variables: flags and the SQL mode.
        let variables = [&[0, 0, 0, 0, 0][..], &[1, 0, 0, 0, 0, 0, 0, 0, 0]].concat();
        let head = [&[9, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0][..], &(variables.len() as u16).to_le_bytes()].concat();
        event(kind::QUERY, 250, &[&head[..], &variables, b"d\0BEGIN"].concat())
    };
    let columns = [3, code::LONGLONG, code::VARCHAR, code::BLOB, 3, 144, 0, 2, 0b110];
    let map = |more: &[u8]| {
        let head = [&[7, 0, 0, 0, 0, 0, 1, 0][..], b"\x01d\0\x06outbox\0"].concat();
        event(kind::TABLE_MAP, 300, &[&head[..], &columns, more].concat())
    };
    // The number of the table, the end of a statement, what is more and its length, and all three columns.
    let rows = |more: &[u8]| {
        let head = [&[7, 0, 0, 0, 0, 0, 1, 0][..], more, &[3, 0b111]].concat();
        let row = [&[0b100, 5, 0, 0, 0, 0, 0, 0, 0][..], b"\x02id"].concat();
        event(
            kind::WRITE_ROWS,
            400,
            &[&head[..], &row, &[0, 6, 0, 0, 0, 0, 0, 0, 0], b"\x02id\x01\0p"].concat(),
        )
    };
    // The order in which a replica may apply them.
    let order = [&[2][..], &1_u64.to_le_bytes(), &2_u64.to_le_bytes()].concat();
    let old = [
        format("5.7.44-log", 38),
        event(35, 154, &[0; 8]),
        event(kind::ANONYMOUS_GTID, 219, &[&[0; 25][..], &order].concat()),
        begin.clone(),
        map(&[]),
        rows(&[2, 0]),
        commit(),
    ];
    assert_eq!(run(&mut decoder(1000), &old), Ok(vec![5, 6]));
    let sid: Vec<u8> = (1..17).collect();
    // When it committed, how long it is, and which version made it.
    let gtid =
        [&[1][..], &sid, &9_u64.to_le_bytes(), &order, &[0; 7], &[0xfc, 0x2c, 1], &80_036_u32.to_le_bytes()];
    let new = [
        format("8.0.36", 41),
        event(35, 157, &[0; 8]),
        event(kind::GTID, 236, &gtid.concat()),
        begin,
        // Which numbers have a sign, and the character set of texts: binlog_row_metadata = MINIMAL.
        map(&[1, 1, 0, 2, 1, 45]),
        // The partition of a row.
        rows(&[5, 0, 1, 3, 0]),
        commit(),
    ];
    let decoder = &mut decoder(1000);
    for event in &new {
        decoder.take(&[&[0][..], event].concat()).unwrap();
    }
    let ready = decoder.take_ready();
    let gtid = Gtid { source: "01020304-0506-0708-090a-0b0c0d0e0f10".into(), number: 9 };
    let commit = Commit { gtid: Some(gtid), end: Coordinates { file: 1, at: 400 } };
    let at: Vec<&At> = ready[0].rows.iter().map(|row| &row.at).collect();
    assert_eq!(at, [&At::Binlog(Arc::new(commit)); 2]);
    assert!(ready[0].rows.iter().all(|row| row.event.is_some()));
}

#[test]
fn a_log_of_another_server_is_refused() {
    let mut first = event(kind::ROTATE, 0, b"\x04\0\0\0\0\0\0\0binlog.000001");
    first[..4].copy_from_slice(&[0; 4]);
    assert_eq!(run(&mut decoder(1000), &[first.clone()]), Ok(vec![]));
    first[5] = 7;
    assert!(run(&mut decoder(1000), &[first]).is_err());
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
