//! Whatever becomes of chunks on their way, an event is its payload, or it is none.

use std::collections::{HashMap, HashSet};

use proptest::{prelude::*, sample::Index};

use super::*;

/// Events of one partition, and the records of all of them: in any order, with repeats, without some.
#[derive(Clone, Debug)]
struct History {
    payloads: HashMap<String, Vec<u8>>,
    /// Those of which every chunk is there.
    complete: HashSet<String>,
    log: Vec<Incoming>,
}

fn history() -> impl Strategy<Value = History> {
    let event = (
        proptest::collection::vec(0..3_u8, 0..60),
        1..20_usize,
        prop_oneof![Just(None), Just(Some(Codec::Gzip)), Just(Some(Codec::Snappy))],
        0..2_u8,
    );
    let copies = proptest::collection::vec((any::<Index>(), any::<Index>()), 0..10);
    let dropped = proptest::collection::vec(any::<Index>(), 0..3);
    (proptest::collection::vec(event, 1..5), copies, dropped, any::<u64>(), any::<bool>()).prop_map(
        |(events, copies, dropped, seed, shuffled)| {
            let mut payloads = HashMap::new();
            let mut log = Vec::new();
            for (n, (payload, chunk_bytes, codec, key)) in events.into_iter().enumerate() {
                log.extend(chunked(&n.to_string(), &key.to_string(), &payload, chunk_bytes, codec));
                payloads.insert(n.to_string(), payload);
            }
            let all = log.clone();
            for (from, to) in copies {
                log.insert(to.index(log.len() + 1), all[from.index(all.len())].clone());
            }
            for at in dropped {
                log.remove(at.index(log.len()));
                if log.is_empty() {
                    break;
                }
            }
            if shuffled {
                fastrand::Rng::with_seed(seed).shuffle(&mut log);
            }
            let chunk = |record: &Incoming| {
                let text = |name| record.headers.text(name).unwrap().to_owned();
                (text("id"), text(wire::CHUNK_INDEX))
            };
            let there: HashSet<_> = log.iter().map(chunk).collect();
            let missing: HashSet<String> =
                all.iter().map(chunk).filter(|chunk| !there.contains(chunk)).map(|(id, _)| id).collect();
            let complete = payloads.keys().filter(|id| !missing.contains(*id)).cloned().collect();
            History { payloads, complete, log: at_offsets(log) }
        },
    )
}

/// Reads on; asserts that nothing wrong is handed over.
fn read(reader: &mut Reader, history: &History, log: &[Incoming]) -> Vec<Event> {
    let events: Vec<Event> = log.iter().filter_map(|record| accept(reader, record)).collect();
    for event in &events {
        let id = event.id().unwrap();
        assert_eq!(event.payload.as_deref(), Some(&history.payloads[id][..]), "event {id}");
    }
    events
}

fn ids(events: &[Event]) -> HashSet<String> {
    events.iter().filter_map(Event::id).map(str::to_owned).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    /// Every event of which all chunks came is handed over, once; no other is.
    #[test]
    fn what_is_complete_is_handed_over_once_and_nothing_else(history in history()) {
        let mut reader = reader();
        let events = read(&mut reader, &history, &history.log);
        prop_assert_eq!(ids(&events), history.complete.clone());
        prop_assert_eq!(events.len(), history.complete.len());
        // What is left to wait for holds the commits back, and nothing else does.
        events.iter().for_each(|event| reader.done(&event.place));
        let waits = history.log.iter().find(|record| !history.complete.contains(record.headers.text("id").unwrap()));
        let expected = waits.map_or(history.log.len() as i64, |record| record.offset);
        prop_assert_eq!(history.log.is_empty() || safe(&reader) == expected, true);
    }

    /// The consumer dies at any moment and begins again where it was safe to commit: nothing is missing.
    #[test]
    fn a_consumer_that_starts_again_misses_nothing(
        history in history(), dies in any::<Index>(), done in any::<u64>(), commits in any::<Index>(),
    ) {
        let dies = dies.index(history.log.len() + 1);
        let mut reader = reader();
        let mut finished = HashSet::new();
        let mut committed = 0;
        // The commit may be older than the end.
        let commits = commits.index(dies + 1);
        for (n, record) in history.log[..dies].iter().enumerate() {
            for event in read(&mut reader, &history, std::slice::from_ref(record)) {
                let id: u64 = event.id().unwrap().parse().unwrap();
                if done >> id & 1 == 1 {
                    finished.insert(event.id().unwrap().to_owned());
                    reader.done(&event.place);
                }
            }
            if n <= commits {
                committed = safe(&reader) as usize;
            }
        }
        let again = read(&mut super::reader(), &history, &history.log[committed..]);
        finished.extend(ids(&again));
        prop_assert_eq!(finished, history.complete);
    }

    /// Something was changed on the way: a value, a header, or both. Never a wrong event, never a panic.
    #[test]
    fn damage_never_gives_a_wrong_event(
        history in history(), damaged in proptest::collection::vec((any::<Index>(), any::<Index>(), any::<Index>(), 1..=255_u8), 1..4),
    ) {
        let mut log = history.log.clone();
        for (at, header, byte, flip) in damaged {
            if log.is_empty() {
                break;
            }
            let at = at.index(log.len());
            let record = &mut log[at];
            let names = record.headers.0.len();
            let damage = |value: &Bytes| {
                let mut value = value.to_vec();
                if !value.is_empty() {
                    let byte = byte.index(value.len());
                    value[byte] ^= flip;
                }
                Bytes::from(value)
            };
            // The id and the request's context have no checksum, and decide no bytes.
            match 2 + header.index(names - 1) {
                n if n == names => record.value = record.value.as_ref().map(damage),
                n => record.headers.0[n].1 = record.headers.0[n].1.as_ref().map(damage),
            }
        }
        let mut reader = reader();
        for record in log {
            match reader.accept(record) {
                // A codec's name that was changed is a name that is unknown, and said to be.
                Ok(Step::Event(event)) if event.still_encoded.is_some() => {}
                Ok(Step::Event(event)) => {
                    let payload = &history.payloads[event.id().unwrap()];
                    prop_assert_eq!(event.payload.as_deref(), Some(&payload[..]));
                }
                Ok(Step::Fetch(fetch)) => prop_assert!(false, "{:?}", fetch),
                Ok(Step::Nothing) | Err(_) => {}
            }
        }
    }
}
