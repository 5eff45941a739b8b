//! The statements of one outbox table, made once from what the catalogue says of its columns.

use super::{
    super::{BACKLOG_CAP, EXPIRED_AT_ONCE, Error, TableSpec, holds::hold_again, literal, quoted},
    Sqlite,
    kept::{self, KeptSql, Parts},
};

/// The statements of one table.
#[derive(Debug)]
pub(super) struct Sql {
    pub read: String,
    pub read_skipping_held: String,
    pub payload: String,
    pub record: String,
    pub replayed: String,
    pub hold: String,
    pub expire: String,
    pub backlog: String,
}

/// What the statements of a table have in common. The table is `o` in most of them.
pub(super) struct Shape<'a> {
    db: &'a Sqlite,
    spec: &'a TableSpec,
    /// By name and type.
    columns: &'a [(String, String)],
    /// Quoted: the table, and the column that its rows are told apart by.
    table: String,
    seq: String,
    /// The table's name, as a literal.
    name: String,
    /// Whether reads go by numbers: where rows are told apart by them.
    pub place_is_int: bool,
    timestamp: Option<String>,
}

impl<'a> Shape<'a> {
    pub fn of(
        db: &'a Sqlite,
        spec: &'a TableSpec,
        columns: &'a [(String, String)],
    ) -> Result<Shape<'a>, Error> {
        spec.check(columns)?;
        let place = spec.place();
        let place_type = type_of(columns, place);
        let place_is_int = is_int(place_type) && spec.slower().is_none();
        spec.check_kept(place, place_type.unwrap_or_default(), place_is_int)?;
        let timestamp = spec.timestamps.iter().find(|name| type_of(columns, name).is_some());
        Ok(Shape {
            db,
            spec,
            columns,
            table: quoted(&spec.name),
            seq: quoted(place),
            name: literal(&spec.name),
            place_is_int,
            timestamp: timestamp.map(|column| quoted(column)),
        })
    }

    pub fn sql(&self) -> Sql {
        let Shape { table, seq, name, .. } = self;
        Sql {
            read: self.read(""),
            read_skipping_held: self.read(&self.unheld()),
            payload: format!(
                "SELECT CAST(o.{} AS BLOB) FROM {table} o WHERE o.{seq} = ?1",
                quoted(&self.spec.payload)
            ),
            record: self.record(),
            replayed: format!(
                "DELETE FROM {} WHERE table_name = {name} AND place IN (SELECT value FROM json_each($1))",
                self.db.own("replays")
            ),
            hold: format!(
                "INSERT INTO {holds} AS h (table_name, place, event_id, topic, key, state, cause, reason, attempts) \
                 SELECT {name}, ?1, ?3, ?4, ?5, ?6, ?7, ?8, ?9 WHERE {fence} \
                 ON CONFLICT (table_name, place) DO {again}",
                holds = self.db.own("holds"),
                fence = self.fence(),
                again = hold_again(self.spec)
            ),
            expire: self.expire(),
            backlog: self.backlog(),
        }
    }

    /// Those of a table whose rows stay when they are published.
    pub fn kept(&self) -> Option<KeptSql> {
        self.spec.is_kept().then(|| {
            // The longest payload that comes along is the fifth parameter there.
            let (list, age, fence) = (self.list("?5"), self.age(), self.fence());
            let parts = Parts { spec: self.spec, seq: &self.seq, list: &list, age: &age, fence: &fence };
            KeptSql::new(self.db, &parts)
        })
    }

    /// The condition that a row is published, where rows are kept.
    pub fn settled(&self) -> Option<String> {
        self.spec.is_kept().then(|| kept::settled(self.db, self.spec, &self.seq))
    }

    /// The order column, where it has integers.
    pub fn numbers(&self) -> Option<String> {
        let sequence = self.spec.sequence.as_ref().filter(|name| is_int(self.type_of(name)))?;
        Some(format!("o.{}", quoted(sequence)))
    }

    /// What every read brings: place, timestamp, the payload's length, and the columns of the event. `longest` is the
    /// parameter of the longest payload that comes along.
    pub fn list(&self, longest: &str) -> String {
        let Shape { spec, seq, .. } = self;
        let place = match self.place_is_int {
            true => format!("o.{seq}"),
            false => format!("CAST(o.{seq} AS TEXT)"),
        };
        let timestamp = match (&self.timestamp, self.millis()) {
            (Some(column), Some(millis)) => format!("CAST(coalesce({millis}, o.{column}) AS TEXT)"),
            _ => "NULL".to_owned(),
        };
        // Of a row's header: the payload itself is not read for it.
        let length = format!("octet_length(o.{})", quoted(&spec.payload));
        let cells = spec.columns.iter().map(|column| match (self.cell(column), *column == spec.payload) {
            (Some(cell), true) => format!("CASE WHEN {length} <= {longest} THEN {cell} END"),
            (Some(cell), false) => cell,
            (None, _) => "NULL".to_owned(),
        });
        let cells: Vec<String> = cells.collect();
        format!("{place}, {timestamp}, {length}, {}", cells.join(", "))
    }

    fn type_of(&self, name: &str) -> Option<&str> {
        type_of(self.columns, name)
    }

    /// Text and blobs untouched; a number as its text.
    fn cell(&self, name: &str) -> Option<String> {
        self.type_of(name)?;
        let cell = quoted(name);
        Some(format!("CASE typeof(o.{cell}) WHEN 'blob' THEN o.{cell} ELSE CAST(o.{cell} AS TEXT) END"))
    }

    /// The time of a row, by the value, since a column may have any: a whole number, or ISO 8601 as CURRENT_TIMESTAMP
    /// writes it, in UTC.
    fn millis(&self) -> Option<String> {
        let column = self.timestamp.as_ref()?;
        Some(format!(
            "CASE typeof(o.{column}) WHEN 'integer' THEN o.{column} \
             ELSE CAST(round(unixepoch(o.{column}, 'subsec') * 1000) AS INTEGER) END"
        ))
    }

    /// The age of a row in seconds.
    fn age(&self) -> String {
        match self.millis() {
            None => "NULL".to_owned(),
            Some(millis) => format!("unixepoch('subsec') - {millis} / 1000.0"),
        }
    }

    /// The column that is written when a row is published.
    fn marked(&self) -> Option<String> {
        self.spec.published_at.as_deref().map(quoted)
    }

    /// That a row is not published, behind other conditions.
    fn pending(&self) -> String {
        self.marked().map(|column| format!(" AND o.{column} IS NULL")).unwrap_or_default()
    }

    fn unheld(&self) -> String {
        format!(
            " AND NOT EXISTS (SELECT 1 FROM {holds} h \
              WHERE h.table_name = {name} AND h.place = CAST(o.{seq} AS TEXT))",
            holds = self.db.own("holds"),
            name = self.name,
            seq = self.seq,
        )
    }

    /// That the lease is of the epoch `?2`.
    fn fence(&self) -> String {
        format!("EXISTS (SELECT 1 FROM {} m WHERE m.epoch = ?2)", self.db.own("members"))
    }

    /// Rows without a value come first.
    fn order(&self) -> Option<String> {
        let sequence = self.spec.sequence.as_ref()?;
        let seq = &self.seq;
        Some(match self.spec.slower() {
            Some(_) => format!("o.{}, o.{seq}", quoted(sequence)),
            None => format!("o.{seq}"),
        })
    }

    /// `?1`: the cursor. `?2`: what is known, as JSON, where there is no cursor.
    fn read(&self, unheld: &str) -> String {
        let Shape { table, seq, .. } = self;
        let from = match self.place_is_int {
            true => format!("o.{seq} > ?1 AND ?2 IS NOT NULL"),
            false => {
                format!("?1 IS NOT NULL AND CAST(o.{seq} AS TEXT) NOT IN (SELECT value FROM json_each(?2))")
            }
        };
        let (list, pending) = (self.list("?4"), self.pending());
        let order = self.order().map(|order| format!(" ORDER BY {order}")).unwrap_or_default();
        format!("SELECT {list} FROM {table} o WHERE {from}{pending}{unheld}{order} LIMIT ?3")
    }

    fn record(&self) -> String {
        let Shape { table, seq, .. } = self;
        let matches = match self.place_is_int {
            true => format!("{seq} IN (SELECT value FROM json_each(?1))"),
            false => format!("CAST({seq} AS TEXT) IN (SELECT CAST(value AS TEXT) FROM json_each(?1))"),
        };
        let fence = self.fence();
        match self.marked() {
            Some(column) => format!(
                "UPDATE {table} SET {column} = strftime('%Y-%m-%dT%H:%M:%fZ') WHERE {matches} AND {fence}"
            ),
            None => format!("DELETE FROM {table} WHERE {matches} AND {fence}"),
        }
    }

    fn expire(&self) -> String {
        let Shape { table, seq, name, .. } = self;
        let Some(column) = self.marked() else { return String::new() };
        format!(
            "DELETE FROM {table} WHERE {seq} IN (SELECT i.{seq} FROM {table} i \
               WHERE i.{column} < strftime('%Y-%m-%dT%H:%M:%fZ', 'now', '-' || $1 || ' seconds') \
                 AND NOT EXISTS (SELECT 1 FROM {replays} r \
                   WHERE r.table_name = {name} AND r.place = CAST(i.{seq} AS TEXT)) \
               LIMIT {EXPIRED_AT_ONCE}) AND {fence}",
            replays = self.db.own("replays"),
            fence = self.fence(),
        )
    }

    fn backlog(&self) -> String {
        let table = &self.table;
        let (age, pending, unheld) = (self.age(), self.pending(), self.unheld());
        format!(
            "SELECT (SELECT count(*) FROM (SELECT 1 FROM {table} o WHERE true{pending}{unheld} \
               LIMIT {BACKLOG_CAP})), \
             (SELECT {age} FROM {table} o WHERE true{pending}{unheld} ORDER BY {first} LIMIT 1)",
            first = self.order().unwrap_or_else(|| format!("o.{}", self.seq)),
        )
    }
}

fn type_of<'a>(columns: &'a [(String, String)], name: &str) -> Option<&'a str> {
    columns.iter().find(|(column, _)| column == name).map(|(_, kind)| kind.as_str())
}

fn is_int(kind: Option<&str>) -> bool {
    kind.is_some_and(|kind| kind.contains("INT"))
}
