//! What was committed against what came back.

use std::collections::HashMap;

use super::{reader::Received, shop::Expected};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub events: usize,
    pub keys: usize,
}

/// `Err` with every kind of thing that is wrong, and one example of each.
pub fn compare(expected: &[Expected], received: &[Received]) -> Result<Summary, Vec<String>> {
    let mut wrong: Vec<String> = Vec::new();
    let by_id: HashMap<&str, (usize, &Expected)> =
        expected.iter().enumerate().map(|(place, event)| (event.id.as_str(), (place, event))).collect();
    // The place of the last one that came, by topic and key.
    let mut last: HashMap<(&str, &str), usize> = HashMap::new();
    let mut seen = vec![false; expected.len()];
    for one in received {
        let (id, headers) = (one.id(), &one.event.headers);
        let Some((place, event)) = by_id.get(id) else {
            wrong.push(format!("event {id:?} was never committed"));
            continue;
        };
        if one.payload() != event.payload || one.key() != event.key.as_bytes() {
            wrong.push(format!("event {id} came back with other bytes"));
        }
        let travelled = one.event.travelled.name();
        if travelled != event.travels {
            wrong.push(format!("event {id} travelled as {travelled}, not {}", event.travels));
        }
        let lost = event.context.iter().find(|(name, value)| headers.text(name) != Some(value));
        if let Some((name, _)) = lost {
            wrong.push(format!("event {id} came back without its {name}"));
        }
        if std::mem::replace(&mut seen[*place], true) {
            wrong.push(format!("event {id} was handed over twice"));
            continue;
        }
        if let Some(before) = last.insert((event.topic, event.key.as_str()), *place)
            && before > *place
        {
            wrong.push(format!("event {id} of {} came after a later one", event.key));
        }
    }
    if let Some(lost) = seen.iter().position(|seen| !seen) {
        let count = seen.iter().filter(|seen| !**seen).count();
        wrong.push(format!("{count} event(s) never came back, such as {}", expected[lost].id));
    }
    match wrong.is_empty() {
        true => Ok(Summary { events: expected.len(), keys: last.len() }),
        false => Err(wrong),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use bytes::Bytes;

    use super::*;
    use crate::consume::{Event, Headers, Place, Travelled};

    fn expected(id: &str) -> Expected {
        Expected {
            id: id.into(),
            topic: "t",
            key: "k".into(),
            travels: "inline",
            payload: id.into(),
            context: vec![("user-id".into(), "7".into())],
            committed: Instant::now(),
        }
    }

    fn received(id: &str) -> Received {
        let header = |name: &str, value: &str| (name.to_owned(), Some(Bytes::from(value.to_owned())));
        let event = Event {
            place: Place { topic: "t".into(), partition: 0, first: 0, last: 0 },
            timestamp_ms: None,
            key: Some("k".into()),
            payload: Some(Bytes::from(id.to_owned())),
            still_encoded: None,
            headers: Headers(vec![header("id", id), header("user-id", "7")]),
            travelled: Travelled::Inline,
        };
        Received { event, sha256: None, at: Instant::now() }
    }

    fn said(received: &[Received]) -> String {
        compare(&[expected("a"), expected("b")], received).unwrap_err().join("; ")
    }

    #[test]
    fn everything_back_in_order_is_good() {
        let summary = compare(&[expected("a"), expected("b")], &[received("a"), received("b")]);
        assert_eq!(summary, Ok(Summary { events: 2, keys: 1 }));
    }

    #[test]
    fn whatever_is_not_as_it_was_written_is_told() {
        assert!(said(&[received("a")]).contains("1 event(s) never came back, such as b"));
        assert!(said(&[received("a"), received("b"), received("x")]).contains("\"x\" was never committed"));
        assert!(said(&[received("b"), received("a")]).contains("event a of k came after a later one"));
        assert!(
            said(&[received("a"), received("b"), received("a")]).contains("event a was handed over twice")
        );
        let changed = |change: &dyn Fn(&mut Event)| {
            let mut one = received("a");
            change(&mut one.event);
            said(&[one, received("b")])
        };
        assert!(changed(&|event| event.payload = Some("A".into())).contains("other bytes"));
        assert!(changed(&|event| drop(event.headers.0.pop())).contains("without its user-id"));
        assert!(changed(&|event| event.travelled = Travelled::Chunks(2)).contains("as chunks, not inline"));
    }
}
