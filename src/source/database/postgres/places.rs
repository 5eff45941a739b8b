//! Places of rows as parameters of a statement.

use std::fmt::Write as _;

use crate::event::Place;

pub(super) fn ints(places: &[Place]) -> Vec<i64> {
    places.iter().filter_map(Place::number).collect()
}

/// Numbers as a multirange: those of an outbox mostly follow one another, and a statement is to be short. A
/// long one is several packets, and sqlx 0.9.0 leaves Nagle's algorithm on, which then has each wait for the
/// server's delayed acknowledgement (launchbadge/sqlx#4335: about 40 ms).
pub(super) fn ranges(mut numbers: Vec<i64>) -> String {
    numbers.sort_unstable();
    let mut text = String::from("{");
    for run in numbers.chunk_by(|one, next| one.checked_add(1) == Some(*next)) {
        if let (Some(first), Some(last)) = (run.first(), run.last()) {
            let comma = if text.len() > 1 { "," } else { "" };
            // A range ends before a number, and there is none behind the last.
            let _ = match *last {
                i64::MAX => write!(text, "{comma}[{first},)"),
                last => write!(text, "{comma}[{first},{last}]"),
            };
        }
    }
    text.push('}');
    text
}

/// Numbers that were noted before rows were told apart by their ids say nothing: their rows come again.
pub(super) fn texts(places: &[Place]) -> Vec<String> {
    places
        .iter()
        .filter_map(|place| match place {
            Place::Text(text) => Some(text.to_string()),
            Place::Int(_) => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::ranges;

    #[test]
    fn numbers_are_written_as_runs() {
        assert_eq!(ranges(vec![]), "{}");
        assert_eq!(ranges(vec![7]), "{[7,7]}");
        assert_eq!(ranges(vec![3, 1, 2, 9, -5, 10]), "{[-5,-5],[1,3],[9,10]}");
        assert_eq!(ranges(vec![4, 4, 5]), "{[4,4],[4,5]}");
        assert_eq!(
            ranges(vec![i64::MAX, i64::MAX - 1, i64::MIN]),
            format!("{{[{0},{0}],[{1},)}}", i64::MIN, i64::MAX - 1)
        );
    }
}
