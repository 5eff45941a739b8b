//! By what the rows of a table are told apart: recorded, held and left out of reads.
//!
//! By the order column, where the catalogue says that no two rows can have the same value and none can be
//! without. Else by the id, which has to be such a column itself: reads still go by the order column, then by
//! the id, and each begins at the head of the table and leaves out what is known.

use std::sync::{Arc, OnceLock};

use tracing::warn;

use super::{Error, TableSpec};
use crate::doctor::{Finding, Fix};

/// What was found when the table was looked at first. Clones share it: all that have a part in the table go by
/// the same for as long as it is relayed, so places of both kinds never meet.
#[derive(Clone, Debug, Default)]
pub struct Placing(pub(super) Arc<OnceLock<Placed>>);

#[derive(Debug)]
pub enum Placed {
    ByOrder,
    ById(Slower),
}

/// Why rows are told apart by their id, and the statements that mend it, if any do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Slower {
    pub why: String,
    pub mend: Option<String>,
}

impl Slower {
    /// The same, as `whippet doctor` says it.
    pub(super) fn finding(&self, check: &'static str) -> Finding {
        let finding = Finding::warn(check, &self.why);
        match self.mend.clone() {
            Some(statements) => finding.mended_by(Fix::Sql(statements)),
            None => finding,
        }
    }
}

/// What the catalogue says of a column.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Distinct {
    /// No two rows have the same value.
    pub unique: bool,
    /// No row is without one.
    pub filled: bool,
    /// The statements that make it so, where there are any.
    pub mend: Option<String>,
}

impl Distinct {
    fn tells(&self) -> bool {
        self.unique && self.filled
    }

    /// What it lacks, in the words of an operator.
    fn lacks(&self) -> &'static str {
        match (self.unique, self.filled) {
            (true, _) => "may be NULL",
            (false, true) => "has no unique index of its own",
            (false, false) => "may be NULL and has no unique index of its own",
        }
    }
}

/// The two columns that may tell rows apart.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Candidates {
    pub order: Distinct,
    pub id: Distinct,
    /// Whether no index could say that the id is unique: of a view, and of a table in partitions.
    pub is_untold: bool,
}

impl TableSpec {
    /// The column that rows are recorded by.
    pub fn place(&self) -> &String {
        match (self.placing.0.get(), &self.sequence) {
            (Some(Placed::ById(_)), _) | (_, None) => &self.id,
            (_, Some(sequence)) => sequence,
        }
    }

    /// Set where rows have an order column and are told apart by their id nevertheless.
    pub fn slower(&self) -> Option<&Slower> {
        match self.placing.0.get() {
            Some(Placed::ById(slower)) => Some(slower),
            Some(Placed::ByOrder) | None => None,
        }
    }

    /// The columns to choose from, the order column first, where there is a choice.
    pub(super) fn candidates(&self) -> Option<(&str, &str)> {
        let order = self.sequence.as_deref().filter(|_| self.stays())?;
        Some((order, &self.id))
    }

    /// Decides by what rows are told apart, the first time; later on whether that still holds.
    pub(super) fn tell_apart(&self, found: Candidates) -> Result<(), Error> {
        let Some((name, id_name)) = self.candidates() else { return Ok(()) };
        let Candidates { order, id, is_untold } = found;
        if order.tells() {
            self.placing.0.get_or_init(|| Placed::ByOrder);
            return Ok(());
        }
        let table = &self.name;
        let lacks = format!("column {name} of table {table} {}", order.lacks());
        let fix = order.mend.clone().or_else(|| id.mend.clone()).map_or_else(
            || {
                Fix::Config(
                    "columns.sequence: (a column that is NOT NULL and has a unique index of its own)".into(),
                )
            },
            Fix::Sql,
        );
        let refused = |says: &str| Err(Error::Refused { says: format!("{lacks}{says}"), fix });
        if self.is_kept() {
            return refused(", and after_publish: keep goes by a number that no other row has");
        }
        if matches!(self.placing.0.get(), Some(Placed::ByOrder)) {
            return refused(
                ", and rows were told apart by it when this relay began: restart the relay, or make the column what it \
                 was",
            );
        }
        if name == id_name || !id.filled || !(id.unique || is_untold) {
            let of_id = match name == id_name {
                true => String::new(),
                false => format!(", nor does the id: column {id_name} {}", id.lacks()),
            };
            return refused(&format!(
                ", so it does not tell rows apart, and one that is held could be taken for another{of_id}"
            ));
        }
        let mut decided = false;
        let placed = self.placing.0.get_or_init(|| {
            decided = true;
            let untold = if is_untold { ", which its writers alone keep unique" } else { "" };
            let why = format!(
                "{lacks}: rows are told apart by their id ({id_name}{untold}), which is slower, because each read \
                 begins at the head of the table"
            );
            Placed::ById(Slower { why, mend: order.mend })
        });
        if let (true, Placed::ById(Slower { why, mend })) = (decided, placed) {
            warn!(table, mend, "{why}");
        }
        Ok(())
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::{
        config::{AfterPublish, Order},
        source::{database::Rows, times::Unreadable},
    };

    pub fn spec(sequence: &str, after_publish: AfterPublish) -> TableSpec {
        TableSpec {
            rows: Rows::Stay,
            name: "outbox".into(),
            columns: vec![],
            optional: vec![],
            id: "id".into(),
            payload: "payload".into(),
            sequence: Some(sequence.into()),
            order: Order::Key,
            timestamps: vec![],
            published_at: None,
            tx: None,
            after_publish,
            retention: None,
            max_payload: 0,
            shared: None,
            placing: Placing::default(),
            unreadable: Unreadable::default(),
        }
    }

    fn found(order: [bool; 2], id: [bool; 2], is_untold: bool) -> Candidates {
        let distinct = |[unique, filled]: [bool; 2], mend: &str| {
            let mend = (!unique || !filled).then(|| mend.to_owned());
            Distinct { unique, filled, mend }
        };
        Candidates { order: distinct(order, "MEND seq"), id: distinct(id, "MEND id"), is_untold }
    }

    const GOOD: [bool; 2] = [true, true];
    const BAD: [[bool; 2]; 3] = [[false, true], [true, false], [false, false]];

    #[test]
    fn rows_go_by_the_order_column_where_that_tells_them_apart_and_else_by_the_id() {
        let by_order = spec("seq", AfterPublish::Delete);
        by_order.tell_apart(found(GOOD, BAD[2], false)).unwrap();
        assert_eq!((by_order.place().as_str(), by_order.slower()), ("seq", None));
        for order in BAD {
            let by_id = spec("seq", AfterPublish::Mark);
            by_id.tell_apart(found(order, GOOD, false)).unwrap();
            assert_eq!(by_id.clone().place(), "id");
            let slower = by_id.slower().unwrap();
            assert!(slower.why.contains("column seq of table outbox"), "{}", slower.why);
            assert_eq!(slower.mend.as_deref(), Some("MEND seq"));
            // It stays as it was decided: places of both kinds never meet.
            by_id.tell_apart(found(GOOD, GOOD, false)).unwrap();
            assert_eq!(by_id.place(), "id");
            let error = by_order.tell_apart(found(order, GOOD, false)).unwrap_err().to_string();
            assert!(error.contains("restart the relay") && error.contains("MEND seq"), "{error}");
        }
    }

    #[test]
    fn what_nothing_tells_apart_is_refused() {
        for order in BAD {
            for id in BAD {
                let refused = spec("seq", AfterPublish::Delete);
                let error = refused.tell_apart(found(order, id, false)).unwrap_err().to_string();
                assert!(error.contains("nor does the id") && error.contains("MEND seq"), "{error}");
                // The index of a table in partitions has the column that these go by too.
                let untold = spec("seq", AfterPublish::Delete).tell_apart(found(order, id, true));
                assert_eq!(untold.is_ok(), id[1]);
            }
            let same = spec("id", AfterPublish::Delete);
            let error = same.tell_apart(found(order, order, false)).unwrap_err().to_string();
            assert!(!error.contains("nor does the id"), "{error}");
            let kept = spec("seq", AfterPublish::Keep);
            let error = kept.tell_apart(found(order, GOOD, false)).unwrap_err().to_string();
            assert!(error.contains("keep") && error.contains("MEND seq"), "{error}");
        }
    }
}
