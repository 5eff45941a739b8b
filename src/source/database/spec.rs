//! What is configured of one outbox table, as its source needs it.

use std::time::Duration;

use super::{Error, Placing, names::missing_columns};
use crate::{
    config::{AfterPublish, Order},
    source::times::Unreadable,
};

/// Where the events of a table are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Rows {
    /// In the table, until they are published.
    Stay,
    /// In the log only: the application deletes its rows itself.
    Transient,
    /// In the log only: logical messages with this prefix.
    Messages { prefix: String },
}

/// What a table's poller needs of the table: names as configured, columns in `Row` order.
#[derive(Clone, Debug)]
pub struct TableSpec {
    pub rows: Rows,
    /// `schema.table` or `table`.
    pub name: String,
    /// The columns that an event's row holds, in order.
    pub columns: Vec<String>,
    /// Columns among them that may be absent from the table: they are read as NULL.
    pub optional: Vec<String>,
    pub id: String,
    pub payload: String,
    pub sequence: Option<String>,
    pub order: Order,
    /// The mapped timestamp, else the creation time; whichever of them the table has.
    pub timestamps: Vec<String>,
    /// The column that is written when a row is published, where one is.
    pub published_at: Option<String>,
    /// The number of the row's transaction, where rows are kept by it.
    pub tx: Option<String>,
    pub after_publish: AfterPublish,
    /// Published rows that are older are deleted.
    pub retention: Option<Duration>,
    /// A payload above this is not read, in bytes.
    pub max_payload: usize,
    /// Where relays share the table: by what.
    pub shared: Option<Shared>,
    /// By what its rows are told apart, once it was looked at.
    pub placing: Placing,
    /// Whether it was said that a row has no time that can be read.
    pub unreadable: Unreadable,
}

/// How the rows of a table are shared among relays: by a hash of their key, so that all of a key are one's.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shared {
    /// The number of buckets.
    pub buckets: u16,
    /// The key as it goes out, piece by piece. A row without one, and any of a table without order, goes by its
    /// id.
    pub key: Vec<Piece>,
}

/// A piece of a key: a text as it is, or a column.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    Text(String),
    Column(String),
}

#[cfg(any(feature = "postgres", feature = "mysql"))]
impl Shared {
    /// An SQL expression of the text that is hashed: `concat` joins pieces to NULL where one is NULL, and `column` is a
    /// column as text, `None` where the table does not have it.
    pub(super) fn hashed(
        &self,
        id: String,
        text: impl Fn(&str) -> String,
        column: impl Fn(&str) -> Option<String>,
        concat: impl Fn(&[String]) -> String,
    ) -> String {
        let piece = |piece: &Piece| match piece {
            Piece::Text(literal) => Some(text(literal)),
            Piece::Column(name) => column(name),
        };
        match self.key.iter().map(piece).collect::<Option<Vec<String>>>() {
            Some(pieces) if !pieces.is_empty() => format!("coalesce({}, {id})", concat(&pieces)),
            _ => id,
        }
    }
}

impl TableSpec {
    /// Whether there is a table to be read when the log cannot be.
    pub fn stays(&self) -> bool {
        self.rows == Rows::Stay
    }

    /// Whether rows can be kept by this order column.
    #[cfg(any(feature = "postgres", feature = "sqlite"))]
    pub(super) fn check_kept(&self, place: &str, kind: &str, is_int: bool) -> Result<(), Error> {
        if is_int || !self.is_kept() {
            return Ok(());
        }
        Err(Error::Setup(format!(
            "column {place} of table {} is of type {kind}, and after_publish: keep goes by an integer order \
             column: map one as columns.sequence, or choose mark",
            self.name
        )))
    }

    /// Whether nothing is written into a row that is published, and it is not deleted either: the relay's own tables have
    /// which they are.
    pub fn is_kept(&self) -> bool {
        self.after_publish == AfterPublish::Keep && self.stays()
    }

    /// The same table, where its log alone tells what is new and published rows are left in it: to read these again.
    #[cfg(feature = "mysql")]
    pub(super) fn left_behind(&self) -> Option<TableSpec> {
        let stays = TableSpec { rows: Rows::Stay, placing: Placing::default(), ..self.clone() };
        (!self.stays() && self.after_publish == AfterPublish::Keep).then_some(stays)
    }

    /// Whether it is a table, and not messages in the log.
    pub fn is_table(&self) -> bool {
        !matches!(self.rows, Rows::Messages { .. })
    }

    /// Columns that it cannot do without, and that are not among these.
    pub(super) fn missing<'a>(&'a self, present: &[String]) -> Vec<&'a str> {
        let needed = self.columns.iter().chain(&self.sequence).chain(&self.published_at).chain(&self.tx);
        needed
            .filter(|name| !present.contains(name) && !self.optional.contains(name))
            .map(String::as_str)
            .collect()
    }

    /// Whether a table with these columns, by name and type, has what is needed.
    pub(super) fn check(&self, columns: &[(String, String)]) -> Result<(), Error> {
        let present: Vec<String> = columns.iter().map(|(name, _)| name.clone()).collect();
        let missing = self.missing(&present);
        if missing.is_empty() { Ok(()) } else { Err(missing_columns(&self.name, &missing, &present)) }
    }
}
