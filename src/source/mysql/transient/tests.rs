use std::sync::Arc;

use proptest::prelude::*;
use tokio::sync::Notify;

use super::decoder::{Begin, Decoder, Route, Verdict};
use crate::{
    config::{AfterPublish, Order},
    source::{
        database::{Column, Placing, Rows, TableSpec},
        log::{Progress, position::Position},
        mysql::{
            event::{
                crc32, kind,
                tests::{event, query_body},
            },
            map::code,
            payload::tests::compress,
            rows::Known,
        },
        times::Unreadable,
    },
};

const A: &str = "01020304-0506-0708-090a-0b0c0d0e0f10";
const LIMIT: usize = 4000;

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

fn decoder() -> (Decoder, Arc<Progress>) {
    let spec = TableSpec {
        rows: Rows::Transient,
        name: "outbox".into(),
        columns: ["id", "payload"].map(String::from).to_vec(),
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
        max_payload: 1000,
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
    let position = Position::parse("gtids", &format!("{A}:1-5")).unwrap();
    let begin = Begin { server: 0, position, era: 7, limit: LIMIT, longest: 8000 };
    let mut decoder = Decoder::new(vec![Route::new(spec, known, progress.clone())], begin);
    assert!(run(&mut decoder, &[told("binlog.000003"), format_event()]).is_empty());
    (decoder, progress)
}

/// The name of the file, as the server tells it at the beginning.
fn told(file: &str) -> Vec<u8> {
    let mut bytes = event(kind::ROTATE, 0, &[&4_u64.to_le_bytes()[..], file.as_bytes()].concat());
    bytes[..4].fill(0);
    let end = bytes.len() - 4;
    let sum = crc32(&bytes[..end]).to_le_bytes();
    bytes[end..].copy_from_slice(&sum);
    bytes
}

fn format_event() -> Vec<u8> {
    event(kind::FORMAT_DESCRIPTION, 120, &[4, 0, 1])
}

fn gtid(number: u64, end: u32) -> Vec<u8> {
    let sid: Vec<u8> = (1..17).collect();
    event(kind::GTID, end, &[&[0][..], &sid, &number.to_le_bytes(), &[0; 20]].concat())
}

fn query(text: &str) -> Vec<u8> {
    event(kind::QUERY, 0, &query_body(text))
}

fn map(named: bool) -> Vec<u8> {
    let columns = [3, code::LONGLONG, code::VARCHAR, code::BLOB, 3, 144, 0, 2, 0];
    let names = if named { &b"\x04\x0f\x03seq\x02id\x07payload"[..] } else { b"" };
    let body = [&[7, 0, 0, 0, 0, 0, 1, 0][..], b"\x01d\0\x06outbox\0", &columns, names].concat();
    event(kind::TABLE_MAP, 0, &body)
}

fn insert(id: u8, payload: usize) -> Vec<u8> {
    let mut body = vec![7, 0, 0, 0, 0, 0, 1, 0, 2, 0, 3, 0b111, 0, id, 0, 0, 0, 0, 0, 0, 0, 1, id];
    body.extend_from_slice(&(payload as u16).to_le_bytes());
    body.resize(body.len() + payload, b'p');
    event(kind::WRITE_ROWS, 0, &body)
}

fn commit(end: u32) -> Vec<u8> {
    event(kind::XID, end, &[0; 8])
}

/// What came of events: ids of rows with the ends of their places, and what else there was.
fn run(decoder: &mut Decoder, events: &[Vec<u8>]) -> Vec<String> {
    let mut found = Vec::new();
    for event in events {
        let mut verdict = decoder.take(&[&[0][..], event].concat()).unwrap();
        loop {
            for row in decoder.take_ready().into_iter().flat_map(|ready| ready.rows) {
                let event = row.event.unwrap();
                let place = event.place.to_string();
                let (_, nth) = place.rsplit_once('.').unwrap();
                let id = String::from_utf8_lossy(event.row.get(0).unwrap()).into_owned();
                let unread = event.unread_bytes.map(|bytes| format!(" {bytes}")).unwrap_or_default();
                found.push(format!("{id}{unread} {}", nth.parse::<u32>().unwrap()));
            }
            match verdict {
                Verdict::GoOn => {}
                Verdict::Changed => found.push("changed".into()),
                Verdict::Again => found.push("again".into()),
                Verdict::Unreadable(unreadable) => {
                    found.push(format!("{} behind {}", unreadable.why, unreadable.behind));
                }
            }
            if !decoder.is_inside() {
                break;
            }
            verdict = decoder.take_inside().unwrap();
        }
    }
    found
}

#[test]
fn a_position_passes_what_is_settled_and_never_the_middle_of_a_transaction() {
    let (mut decoder, progress) = decoder();
    let events = [gtid(6, 200), query("BEGIN"), map(true), insert(b'a', 3), insert(b'b', 3)];
    assert_eq!(run(&mut decoder, &events), Vec::<String>::new());
    assert_eq!(run(&mut decoder, &[commit(300)]), ["a 0", "b 1"]);
    // Nothing of ours; and one more of ours.
    run(
        &mut decoder,
        &[gtid(7, 400), query("BEGIN"), commit(500), gtid(8, 600), query("CREATE TABLE t (a int)")],
    );
    run(&mut decoder, &[gtid(9, 700), query("BEGIN"), map(true), insert(b'c', 3), commit(800)]);
    assert_eq!(decoder.reached().to_string(), format!("{A}:1-9"));
    for (settled, position) in [(0, "1-5"), (1, "1-5"), (2, "1-8"), (3, "1-9")] {
        progress.settle(settled);
        assert_eq!(decoder.settled().to_string(), format!("{A}:{position}"));
    }
    assert!(decoder.is_settled());
    assert_eq!(decoder.file(), ("binlog.000003", 1));
}

#[test]
fn a_large_transaction_is_read_again_once_it_has_committed() {
    let (mut decoder, _) = decoder();
    let begin = [gtid(6, 200), query("BEGIN"), map(true)];
    let rows: Vec<Vec<u8>> = (b'a'..=b'l').map(|id| insert(id, 900)).collect();
    assert!(run(&mut decoder, &[&begin[..], &rows].concat()).is_empty());
    assert!(run(&mut decoder, &[query("ROLLBACK")]).is_empty());
    let begin = [gtid(7, 1200), query("BEGIN"), map(true)];
    let whole = [&begin[..], &rows, &[commit(1300)]].concat();
    assert_eq!(run(&mut decoder, &whole), ["again"]);
    assert_eq!(decoder.reached().to_string(), format!("{A}:1-6"));
    decoder.rewind();
    let (head, tail) = whole.split_at(5);
    let again = run(&mut decoder, &[&[told("binlog.000003"), format_event()], head].concat());
    assert_eq!(again, ["a 0", "b 1"], "before its end");
    assert_eq!(run(&mut decoder, tail).last().unwrap(), "l 11");
    assert_eq!(decoder.reached().to_string(), format!("{A}:1-7"));
    // Another one is there.
    assert_eq!(run(&mut decoder, &[&[gtid(8, 2000)], &whole[1..]].concat()), ["again"]);
    decoder.rewind();
    assert!(decoder.take(&[&[0][..], &told("binlog.000003")].concat()).is_ok());
    assert!(decoder.take(&[&[0][..], &format_event()].concat()).is_ok());
    assert!(decoder.take(&[&[0][..], &gtid(9, 2100)].concat()).is_err());
}

#[test]
fn a_compressed_transaction_is_handed_over_piece_by_piece() {
    let (mut decoder, _) = decoder();
    let rows = (b'a'..=b'l').map(|id| insert(id, 900));
    let events: Vec<Vec<u8>> =
        [query("BEGIN"), map(true)].into_iter().chain(rows).chain([commit(0)]).collect();
    let whole = [gtid(6, 200), event(kind::TRANSACTION_PAYLOAD, 900, &compress(&events))];
    assert_eq!(run(&mut decoder, &whole), ["again"]);
    decoder.rewind();
    let again = run(&mut decoder, &[&[told("binlog.000003"), format_event()], &whole[..]].concat());
    assert_eq!((again.len(), again[11].as_str()), (12, "l 11"));
}

#[test]
fn what_was_undone_is_not_handed_over() {
    let (mut decoder, _) = decoder();
    let events = [
        gtid(6, 200),
        query("BEGIN"),
        map(true),
        insert(b'a', 3),
        query("SAVEPOINT `one`"),
        insert(b'b', 3),
        query("SAVEPOINT `two`"),
        insert(b'c', 3),
        query("ROLLBACK TO `TWO`"),
        insert(b'd', 3),
        query("ROLLBACK TO `one`"),
        insert(b'e', 3),
        commit(300),
    ];
    assert_eq!(run(&mut decoder, &events), ["a 0", "e 4"]);
    let all = [gtid(7, 400), query("BEGIN"), map(true), insert(b'a', 3), query("ROLLBACK TO x"), commit(500)];
    assert!(run(&mut decoder, &all).is_empty());
    let rows: Vec<Vec<u8>> = (b'a'..=b'l').map(|id| insert(id, 900)).collect();
    let large = [&[gtid(8, 600), query("BEGIN"), query("SAVEPOINT a"), map(true)], &rows[..]].concat();
    let large = [&large[..], &[query("ROLLBACK TO a"), commit(700)]].concat();
    assert!(run(&mut decoder, &large)[0].contains("savepoint"));
}

#[test]
fn what_cannot_be_read_exactly_ends_the_reading_before_its_transaction() {
    let begin = |number| [gtid(number, 200), query("BEGIN"), map(true), insert(b'a', 3)];
    for (events, why) in [
        ([&begin(6)[..], &[query("INSERT INTO outbox VALUES (1)"), commit(300)]].concat(), "statement"),
        ([&begin(6)[..], &[event(200, 0, b""), commit(300)]].concat(), "statement"),
        ([&begin(6)[..], &[event(kind::XA_PREPARE, 300, &[0; 20])]].concat(), "XA"),
        (vec![gtid(6, 200), query("BEGIN"), map(false), insert(b'a', 3), commit(300)], "binlog_row_metadata"),
        (vec![gtid(6, 200), event(kind::INCIDENT, 300, &[0; 3])], "missing"),
    ] {
        let (mut decoder, _) = decoder();
        let found = run(&mut decoder, &events);
        assert_eq!(found.len(), 1, "{found:?}");
        assert!(found[0].contains(why) && found[0].ends_with(&format!("behind {A}:1-6")), "{found:?}");
        assert_eq!(decoder.reached().to_string(), format!("{A}:1-5"));
    }
    let (mut decoder, _) = decoder();
    // Undone, of nothing of ours, or a table that is made in it.
    run(
        &mut decoder,
        &[&begin(6)[..], &[query("INSERT INTO outbox VALUES (1)"), query("ROLLBACK")]].concat(),
    );
    run(&mut decoder, &[gtid(7, 200), query("XA START X'61'"), event(kind::XA_PREPARE, 300, &[0; 20])]);
    run(&mut decoder, &[gtid(8, 400), query("XA COMMIT X'61'")]);
    let made = [&begin(9)[..], &[query("CREATE TABLE t (a int) START TRANSACTION"), commit(300)]].concat();
    assert_eq!(run(&mut decoder, &made), ["a 0"]);
    assert_eq!(run(&mut decoder, &[gtid(10, 500), query("ALTER TABLE outbox ADD a int")]), ["changed"]);
    assert_eq!(decoder.reached().to_string(), format!("{A}:1-10"));
}

#[test]
fn a_row_that_is_too_long_comes_without_its_payload() {
    let (mut decoder, _) = decoder();
    let events =
        [gtid(6, 200), query("BEGIN"), map(true), insert(b'a', 1001), insert(b'b', 1000), commit(300)];
    assert_eq!(run(&mut decoder, &events), ["a 1001 0", "b 1"]);
    run(&mut decoder, &[gtid(7, 400), query("BEGIN"), map(true)]);
    let long = insert(b'c', 60_000);
    decoder.take_head(&[&[0][..], &long[..300]].concat(), 60_100).unwrap();
    assert_eq!(run(&mut decoder, &[commit(500)]), ["c 60100 0"]);
}

proptest! {
    #[test]
    fn any_bytes_are_taken_or_refused(
        bodies in prop::collection::vec((any::<u8>(), prop::collection::vec(any::<u8>(), 0..60)), 0..20),
    ) {
        let (mut decoder, _) = decoder();
        for (kind, body) in bodies {
            let event = [&[0][..], &event(kind, 300, &body)].concat();
            let _ = decoder.take(&event);
            while decoder.is_inside() && decoder.take_inside().is_ok() {}
            let _ = decoder.take_head(&event, 9000);
        }
    }
}
