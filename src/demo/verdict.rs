//! What was committed against what came back.

use std::collections::HashMap;

use super::{reader::Received, shop::Expected};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Summary {
    pub events: usize,
    pub repeats: usize,
    pub keys: usize,
}

/// `Err` with every kind of thing that is wrong, and one example of each.
pub fn compare(expected: &[Expected], received: &[Received]) -> Result<Summary, Vec<String>> {
    let mut wrong: Vec<String> = Vec::new();
    let by_id: HashMap<&str, (usize, &Expected)> =
        expected.iter().enumerate().map(|(place, event)| (event.id.as_str(), (place, event))).collect();
    // The place of the last first appearance, by key.
    let mut last: HashMap<&str, usize> = HashMap::new();
    let mut seen = vec![false; expected.len()];
    let mut repeats = 0;
    for record in received {
        let id = record.header("id").unwrap_or_default();
        let Some((place, event)) = by_id.get(id) else {
            wrong.push(format!("event {id:?} was never committed"));
            continue;
        };
        if record.payload != event.payload || record.key != event.key.as_bytes() {
            wrong.push(format!("event {id} came back with other bytes"));
        }
        let lost = event.context.iter().find(|(name, value)| record.header(name) != Some(value));
        if let Some((name, _)) = lost {
            wrong.push(format!("event {id} came back without its {name}"));
        }
        if std::mem::replace(&mut seen[*place], true) {
            repeats += 1;
            continue;
        }
        if let Some(before) = last.insert(event.key.as_str(), *place)
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
        true => Ok(Summary { events: expected.len(), repeats, keys: last.len() }),
        false => Err(wrong),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    fn expected(id: &str) -> Expected {
        Expected {
            id: id.into(),
            key: "k".into(),
            payload: id.into(),
            context: vec![("user-id".into(), "7".into())],
            committed: Instant::now(),
        }
    }

    fn received(id: &str) -> Received {
        Received {
            partition: 0,
            offset: 0,
            key: "k".into(),
            payload: id.into(),
            headers: vec![("id".into(), id.into()), ("user-id".into(), "7".into())],
            at: Instant::now(),
        }
    }

    fn said(received: &[Received]) -> String {
        compare(&[expected("a"), expected("b")], received).unwrap_err().join("; ")
    }

    #[test]
    fn everything_back_in_order_is_good_and_repeats_are_counted() {
        let received = [received("a"), received("b"), received("a")];
        let summary = compare(&[expected("a"), expected("b")], &received);
        assert_eq!(summary, Ok(Summary { events: 2, repeats: 1, keys: 1 }));
    }

    #[test]
    fn loss_ghosts_disorder_and_changed_bytes_are_told() {
        assert!(said(&[received("a")]).contains("1 event(s) never came back, such as b"));
        assert!(said(&[received("a"), received("b"), received("x")]).contains("\"x\" was never committed"));
        assert!(said(&[received("b"), received("a")]).contains("event a of k came after a later one"));
        let changed = Received { payload: b"A".to_vec(), ..received("a") };
        assert!(said(&[changed, received("b")]).contains("other bytes"));
        let mut bare = received("a");
        bare.headers.pop();
        assert!(said(&[bare, received("b")]).contains("without its user-id"));
    }
}
