//! The statements of one outbox table, made once from what the catalogue says of its columns.

use super::{
    super::{BACKLOG_CAP, EXPIRED_AT_ONCE, Error, OF_BUCKETS, TableSpec},
    Mysql,
    columns::{Catalogue, Column},
    sql::{literal, quoted},
};

/// Which rows of which table are read, both as they are written.
pub(super) struct Of {
    pub table: String,
    /// A condition behind others.
    pub only: String,
}

/// The statements of one table, or their beginnings and ends: MySQL has no arrays, so places are put in as
/// lists.
#[derive(Debug)]
pub(super) struct Sql {
    /// `$1`: the longest payload that comes along. Then a condition on places, one of the two ends, and a limit.
    pub read: String,
    pub end: String,
    pub end_skipping_held: String,
    pub table: String,
    pub only: String,
    /// The payload's length.
    pub length: String,
    /// The payload, and whether it is a piece of it.
    pub payload: (String, bool),
    /// Before and behind the places joined to the table.
    pub record: (String, String),
    pub recorded: String,
    /// Deletes a run of numbers. `$1`, `$2`: its ends; `$3`: how many they are. `None` where rows are
    /// not told apart so.
    pub delete_run: Option<String>,
    pub replayed: String,
    pub hold: String,
    /// `$1`: microseconds.
    pub expire: String,
    pub backlog: String,
}

/// What the statements of a table have in common. The table is `o` in most of them.
pub(super) struct Shape<'a> {
    db: &'a Mysql,
    spec: &'a TableSpec,
    catalogue: &'a Catalogue,
    of: &'a Of,
    /// By what rows are told apart.
    pub place: &'a Column,
    pub timestamp: Option<&'a Column>,
    /// The table's name, as a literal.
    name: String,
}

impl<'a> Shape<'a> {
    pub fn of(
        db: &'a Mysql,
        spec: &'a TableSpec,
        catalogue: &'a Catalogue,
        of: &'a Of,
    ) -> Result<Shape<'a>, Error> {
        catalogue.check(spec)?;
        if !catalogue.engine.eq_ignore_ascii_case("innodb") {
            return Err(Error::Setup(format!(
                "table {} has the engine {}, which has no transactions; expected InnoDB",
                spec.name, catalogue.engine
            )));
        }
        let place = spec.place();
        let place = column(catalogue, place).ok_or_else(|| {
            Error::Setup(format!(
                "table {} has no column {place}: map the order column as columns.sequence",
                spec.name
            ))
        })?;
        let timestamp = spec.timestamps.iter().find_map(|name| column(catalogue, name));
        Ok(Shape { db, spec, catalogue, of, place, timestamp, name: literal(&spec.name) })
    }

    pub fn sql(&self) -> Sql {
        let Shape { catalogue, name, .. } = self;
        let Of { table, only } = self.of;
        let (along, pending, unheld, order) = (self.along(), self.pending(), self.unheld(), self.order());
        let by_place =
            catalogue.by_place.as_ref().map(|index| format!(" FORCE INDEX ({index})")).unwrap_or_default();
        let payload = self.column(&self.spec.payload);
        Sql {
            read: format!("SELECT {} FROM {table} o{along} WHERE ", self.list("$1")),
            end: format!("{pending}{OF_BUCKETS}{order} LIMIT "),
            end_skipping_held: format!("{pending}{unheld}{OF_BUCKETS}{order} LIMIT "),
            payload: match payload.and_then(|column| column.piece("o.")) {
                Some(piece) => (piece, true),
                None => (payload.map_or("NULL".to_owned(), |column| column.cell("o.")), false),
            },
            table: table.clone(),
            only: only.clone(),
            length: self.length(),
            record: self.record(),
            recorded: format!("{table} o{by_place}"),
            delete_run: self.delete_run(),
            replayed: format!(
                "DELETE FROM {} WHERE table_name = {name} AND place IN (",
                self.db.own("replays")
            ),
            hold: format!(
                "INSERT INTO {} (table_name, place, event_id, topic, `key`, state, cause, reason, attempts) VALUES ",
                self.db.own("holds")
            ),
            expire: self.expire(),
            backlog: format!(
                "SELECT (SELECT count(*) FROM (SELECT 1 FROM {table} o{along} WHERE TRUE{pending}{unheld} \
                   LIMIT {BACKLOG_CAP}) waiting), \
                 (SELECT {age} FROM {table} o{along} WHERE TRUE{pending}{unheld}{order} LIMIT 1)",
                age = self.age()
            ),
        }
    }

    /// What every read brings: place, timestamp, the payload's length, and the columns of the event. `longest` is the
    /// parameter of the longest payload that comes along.
    pub fn list(&self, longest: &str) -> String {
        let spec = self.spec;
        let length = self.length();
        let cells = spec.columns.iter().map(|name| match self.column(name) {
            None => "NULL".to_owned(),
            Some(column) if *name == spec.payload => {
                format!("CASE WHEN {length} <= {longest} THEN {} END", column.cell("o."))
            }
            Some(column) if *name == spec.id => column.id("o."),
            Some(column) => column.cell("o."),
        });
        let timestamp = self.timestamp.map_or("NULL".to_owned(), |column| match column.is_clock() {
            true => column.millis("o."),
            false => column.cell("o."),
        });
        let fixed = [self.place_text("o."), timestamp, length.clone()];
        fixed.into_iter().chain(cells).collect::<Vec<_>>().join(", ")
    }

    /// Numbers tell rows apart, or are the text of an id.
    pub fn place_is_int(&self) -> bool {
        self.place.is_int() && self.spec.slower().is_none()
    }

    /// The place as text. `alias` is that of the table with its dot, or nothing.
    pub fn place_text(&self, alias: &str) -> String {
        match self.place.is_int() {
            true => format!("CAST({alias}{} AS CHAR CHARACTER SET utf8mb4)", quoted(&self.place.name)),
            false => self.place.id(alias),
        }
    }

    pub fn id(&self) -> Option<&'a Column> {
        self.column(&self.spec.id)
    }

    /// The id of a row as text.
    pub fn id_text(&self) -> String {
        self.id().map_or("NULL".into(), |column| column.id("o."))
    }

    /// Of kept rows, that one is not held. The log tells the rest: see [`super::Outbox::is_settled`].
    pub fn settled(&self) -> Option<String> {
        self.spec.is_kept().then(|| {
            format!(
                "NOT EXISTS (SELECT 1 FROM {holds} h WHERE h.table_name = {name} \
                   AND h.event_id = CONVERT({id} USING utf8mb4) COLLATE utf8mb4_bin)",
                holds = self.db.own("holds"),
                name = self.name,
                id = self.id_text(),
            )
        })
    }

    /// The order column, where it has integers.
    pub fn numbers(&self) -> Option<String> {
        let sequence = self.spec.sequence.as_deref().and_then(|name| self.column(name));
        sequence.filter(|column| column.is_int()).map(|column| format!("o.{}", quoted(&column.name)))
    }

    /// Of a shared table: an expression of a row's bucket.
    pub fn bucket(&self) -> Option<String> {
        let shared = self.spec.shared.as_ref()?;
        let column = |name: &str| self.column(name).map(|column| format!("HEX({})", column.cell("o.")));
        let text = |text: &str| format!("HEX({})", literal(text));
        let hashed =
            shared.hashed(self.id_text(), text, column, |pieces| format!("CONCAT({})", pieces.join(", ")));
        Some(format!("CRC32({hashed}) MOD {}", shared.buckets))
    }

    fn column(&self, name: &str) -> Option<&'a Column> {
        column(self.catalogue, name)
    }

    fn length(&self) -> String {
        self.column(&self.spec.payload).map_or("NULL".to_owned(), |column| column.length("o."))
    }

    /// The column that is written when a row is published.
    fn marked(&self) -> Option<String> {
        self.spec.published_at.as_deref().map(quoted)
    }

    /// That a row is one of these and not published, behind other conditions.
    fn pending(&self) -> String {
        let unmarked = self.marked().map(|column| format!(" AND o.{column} IS NULL"));
        format!("{}{}", self.of.only, unmarked.unwrap_or_default())
    }

    /// Not as EXISTS: that may become a join, and the order of the rows would be lost to a sort.
    fn unheld(&self) -> String {
        let holds = self.db.own("holds");
        format!(
            " AND (SELECT 1 FROM {holds} h WHERE h.table_name = {} AND h.place = {} LIMIT 1) IS NULL",
            self.name,
            self.place_text("o.")
        )
    }

    /// The index that a read goes along.
    fn along(&self) -> String {
        self.catalogue.index.as_ref().map(|index| format!(" FORCE INDEX ({index})")).unwrap_or_default()
    }

    /// Rows without a value come first.
    fn order(&self) -> String {
        let Some(sequence) = &self.spec.sequence else { return String::new() };
        let seq = quoted(&self.place.name);
        match self.spec.slower() {
            Some(_) => format!(" ORDER BY o.{}, o.{seq}", quoted(sequence)),
            None => format!(" ORDER BY o.{seq}"),
        }
    }

    /// The age of a row in seconds.
    fn age(&self) -> String {
        self.timestamp.map_or("NULL".to_owned(), |column| {
            format!(
                "(TIMESTAMPDIFF(MICROSECOND, '1970-01-01', UTC_TIMESTAMP(6)) DIV 1000 - {}) / 1e3",
                column.millis("o.")
            )
        })
    }

    fn record(&self) -> (String, String) {
        let only = &self.of.only;
        match self.marked() {
            Some(column) => (
                "UPDATE ".into(),
                format!(" SET o.{column} = UTC_TIMESTAMP(6) WHERE o.{column} IS NULL{only}"),
            ),
            None => ("DELETE o FROM ".into(), format!(" WHERE TRUE{only}")),
        }
    }

    fn delete_run(&self) -> Option<String> {
        let Of { table, only } = self.of;
        let is_primary = self.catalogue.by_place.as_deref() == Some("`PRIMARY`");
        let may = self.place_is_int()
            && is_primary
            && self.catalogue.logs_rows
            && self.marked().is_none()
            && only.is_empty();
        let seq = quoted(&self.place.name);
        may.then(|| format!("DELETE FROM {table} WHERE {seq} BETWEEN $1 AND $2 ORDER BY {seq} LIMIT $3"))
    }

    fn expire(&self) -> String {
        let Some(column) = self.marked() else { return String::new() };
        format!(
            "DELETE FROM {table} WHERE {column} < UTC_TIMESTAMP(6) - INTERVAL $1 MICROSECOND \
               AND NOT EXISTS (SELECT 1 FROM {replays} r \
                 WHERE r.table_name = {name} AND r.place = {place}) LIMIT {EXPIRED_AT_ONCE}",
            table = self.of.table,
            replays = self.db.own("replays"),
            name = self.name,
            place = self.place_text(""),
        )
    }
}

fn column<'a>(catalogue: &'a Catalogue, name: &str) -> Option<&'a Column> {
    catalogue.columns.iter().find(|column| column.name.eq_ignore_ascii_case(name))
}
