//! The statements of one outbox table, made once from what the catalogue says of its columns.

use super::{
    super::{
        BACKLOG_CAP, EXPIRED_AT_ONCE, Error, OF_BUCKETS, TableSpec, holds::hold_again, literal, quoted,
        quoted_table,
    },
    kept::{self, KeptSql, Parts},
};

/// The statements of one table.
#[derive(Debug)]
pub(super) struct Sql {
    pub(super) read: String,
    pub(super) read_skipping_held: String,
    pub(super) payload: String,
    pub(super) record: String,
    pub(super) replayed: String,
    pub(super) hold: String,
    pub(super) expire: String,
    pub(super) writers: &'static str,
    pub(super) backlog: String,
}

/// How the timestamp column comes over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Clock {
    None,
    /// `timestamptz` in binary: microseconds since 2000-01-01.
    Timestamp,
    /// An integer column: milliseconds since the Unix epoch.
    Millis,
    /// Any other, as text.
    Text,
}

/// What the statements of a table have in common. The table is `o` in each of them.
pub(super) struct Shape<'a> {
    spec: &'a TableSpec,
    /// By name and type.
    columns: &'a [(String, String)],
    /// Quoted: the schema of the relay's own tables, the table, and the column that its rows are told apart by.
    schema: String,
    table: String,
    seq: String,
    /// The table's name, as a literal.
    name: String,
    pub place_type: String,
    /// Whether reads go by numbers: where rows are told apart by them.
    pub place_is_int: bool,
    pub clock: Clock,
    timestamp: String,
}

impl<'a> Shape<'a> {
    pub fn of(
        schema: &str,
        spec: &'a TableSpec,
        columns: &'a [(String, String)],
    ) -> Result<Shape<'a>, Error> {
        spec.check(columns)?;
        let type_of = |name: &str| type_of(columns, name);
        let place = spec.place();
        let place_type = cast_type(type_of(place));
        let place_is_int = is_int(type_of(place)) && spec.slower().is_none();
        spec.check_kept(place, &place_type, place_is_int)?;

        let timestamp = spec.timestamps.iter().find(|name| type_of(name).is_some());
        let (clock, timestamp) = match timestamp.map(|name| (type_of(name), quoted(name))) {
            None => (Clock::None, "NULL::text".to_owned()),
            Some((Some("bigint" | "integer"), name)) => (Clock::Millis, format!("o.{name}::bigint")),
            Some((Some("timestamp with time zone" | "timestamp without time zone"), name)) => {
                (Clock::Timestamp, format!("o.{name}::timestamptz"))
            }
            Some((_, name)) => (Clock::Text, format!("o.{name}::text")),
        };
        Ok(Shape {
            spec,
            columns,
            schema: quoted(schema),
            table: quoted_table(&spec.name),
            seq: quoted(place),
            name: literal(&spec.name),
            place_type,
            place_is_int,
            clock,
            timestamp,
        })
    }

    pub fn sql(&self) -> Sql {
        let Shape { schema, name, .. } = self;
        Sql {
            read: self.read(""),
            read_skipping_held: self.read(&self.unheld()),
            payload: self.payload(),
            record: self.record(),
            replayed: format!(
                "DELETE FROM {schema}.replays WHERE table_name = {name} AND place = ANY($1::text[])"
            ),
            hold: self.hold(),
            expire: self.expire(),
            writers: "SELECT DISTINCT virtualtransaction FROM pg_locks \
                      WHERE locktype = 'relation' AND relation = $1::bigint::oid \
                        AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) \
                        AND mode = 'RowExclusiveLock' AND pid IS DISTINCT FROM pg_backend_pid()",
            backlog: self.backlog(),
        }
    }

    /// Those of a table whose rows stay when they are published.
    pub fn kept(&self) -> Option<KeptSql> {
        let tx = self.spec.tx.as_ref()?;
        // The longest payload that comes along is the seventh parameter there.
        let (list, age, fence) = (self.list("$7"), self.age(), self.fence());
        let parts = Parts {
            spec: self.spec,
            schema: &self.schema,
            seq: &self.seq,
            list: &list,
            age: &age,
            fence: &fence,
        };
        Some(KeptSql::new(&parts, tx))
    }

    /// The condition that a row is published, where rows are kept.
    pub fn settled(&self) -> Option<String> {
        let tx = self.spec.tx.as_ref()?;
        Some(kept::settled(&self.schema, self.spec, &quoted(tx), &self.seq))
    }

    /// The order column, where it has integers.
    pub fn numbers(&self) -> Option<String> {
        let sequence = self.spec.sequence.as_ref().filter(|name| is_int(self.type_of(name)))?;
        Some(format!("o.{}", quoted(sequence)))
    }

    pub fn id_type(&self) -> String {
        cast_type(self.type_of(&self.spec.id))
    }

    /// What every read brings: place, timestamp, the payload's length, and the columns of the event. `longest` is the
    /// parameter of the longest payload that comes along.
    pub fn list(&self, longest: &str) -> String {
        let Shape { spec, seq, timestamp, .. } = self;
        let place = match self.place_is_int {
            true => format!("o.{seq}::bigint"),
            false => format!("o.{seq}::text"),
        };
        let payload = quoted(&spec.payload);
        let length = match self.type_of(&spec.payload) {
            Some("bytea" | "text" | "character varying") => format!("octet_length(o.{payload})"),
            _ => format!("octet_length(o.{payload}::text)"),
        };
        let cells = spec.columns.iter().map(|name| match (self.cell(name), *name == spec.payload) {
            (cell, true) => format!("CASE WHEN {length} <= {longest} THEN {cell} END"),
            (cell, false) => cell,
        });
        let cells: Vec<String> = cells.collect();
        format!("{place}, {timestamp}, {length}, {}", cells.join(", "))
    }

    /// Of a shared table: an expression of a row's bucket.
    pub fn bucket(&self) -> Option<String> {
        let shared = self.spec.shared.as_ref()?;
        let column = |name: &str| match self.type_of(name) {
            None => None,
            Some("bytea") => Some(format!("encode(o.{}, 'hex')", quoted(name))),
            Some(_) => Some(format!("o.{}::text", quoted(name))),
        };
        let id = column(&self.spec.id).unwrap_or_else(|| "''".into());
        let hashed = shared.hashed(id, literal, column, |pieces| format!("({})", pieces.join(" || ")));
        let n = shared.buckets;
        Some(format!("mod(mod(hashtextextended({hashed}, 0), {n}) + {n}, {n})"))
    }

    fn type_of(&self, name: &str) -> Option<&str> {
        type_of(self.columns, name)
    }

    /// A column as its event has it: the value's own bytes.
    fn cell(&self, name: &str) -> String {
        match self.type_of(name) {
            None => "NULL::text".to_owned(),
            Some("bytea" | "text" | "character varying" | "json" | "xml") => format!("o.{}", quoted(name)),
            Some(_) => format!("o.{}::text", quoted(name)),
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
        let Shape { schema, name, seq, .. } = self;
        format!(
            " AND NOT EXISTS (SELECT FROM {schema}.holds h \
              WHERE h.table_name = {name} AND h.place = o.{seq}::text)"
        )
    }

    /// That the lease is of the epoch `$2`.
    fn fence(&self) -> String {
        format!("EXISTS (SELECT FROM {}.members m WHERE m.epoch = $2)", self.schema)
    }

    /// Rows without a value come last.
    fn order(&self) -> Option<String> {
        let sequence = self.spec.sequence.as_ref()?;
        let seq = &self.seq;
        Some(match self.spec.slower() {
            Some(_) => format!("o.{}, o.{seq}", quoted(sequence)),
            None => format!("o.{seq}"),
        })
    }

    fn read(&self, unheld: &str) -> String {
        let Shape { table, seq, place_type, .. } = self;
        let (list, pending) = (self.list("$5"), self.pending());
        if self.place_is_int {
            // Late commits first, then the tail: one statement, one snapshot. When the late rows
            // alone fill the read, no row of the tail may come yet.
            format!(
                "WITH whippet_late AS MATERIALIZED ( \
                   SELECT o.{seq}::bigint AS seq FROM {table} o \
                   WHERE o.{seq} > $1 AND o.{seq} <= $6{pending}{unheld}{OF_BUCKETS} \
                     AND NOT (SELECT $3::text::int8multirange) @> o.{seq}::bigint \
                   ORDER BY 1 LIMIT $4) \
                 SELECT x.* FROM whippet_late, LATERAL ( \
                   SELECT {list} FROM {table} o WHERE o.{seq} = whippet_late.seq LIMIT 1) x \
                 UNION ALL \
                 (SELECT {list} FROM {table} o \
                  WHERE o.{seq} > $2{pending}{unheld}{OF_BUCKETS} \
                    AND (SELECT count(*) FROM whippet_late) < $4 \
                  ORDER BY o.{seq} LIMIT $4)"
            )
        } else {
            // No number to go by: every read starts at the head and leaves out what is known.
            let order = self.order().map(|order| format!(" ORDER BY {order}")).unwrap_or_default();
            format!(
                "SELECT {list} FROM {table} o \
                 WHERE $1::bigint IS NOT NULL AND $2::bigint IS NOT NULL \
                   AND NOT (o.{seq} = ANY($3::text[]::{place_type}[])){pending}{unheld}{OF_BUCKETS}{order} \
                 LIMIT $4"
            )
        }
    }

    fn payload(&self) -> String {
        let Shape { table, seq, place_type, .. } = self;
        let place = if self.place_is_int { "$1::bigint" } else { "$1::text" };
        let cell = self.cell(&self.spec.payload);
        format!("SELECT {cell} FROM {table} o WHERE o.{seq} = {place}::{place_type}")
    }

    fn record(&self) -> String {
        let Shape { table, seq, place_type, .. } = self;
        let places = if self.place_is_int {
            "ANY(ARRAY(SELECT generate_series(lower(r), coalesce(upper(r) - 1, 9223372036854775807)) \
             FROM unnest($1::text::int8multirange) r))"
                .to_owned()
        } else {
            format!("ANY($1::text[]::{place_type}[])")
        };
        let (pending, fence) = (self.pending(), self.fence());
        match self.marked() {
            Some(column) => {
                format!("UPDATE {table} o SET {column} = now() WHERE o.{seq} = {places}{pending} AND {fence}")
            }
            None => format!("DELETE FROM {table} o WHERE o.{seq} = {places} AND {fence}"),
        }
    }

    fn hold(&self) -> String {
        let Shape { schema, name, .. } = self;
        // A verb by way of another relay changes the gates first: either it waits for the hold, or the hold for
        // it, and is refused.
        let (known_gates, if_known) = match self.spec.shared {
            Some(_) => (
                format!(
                    "WITH whippet_known AS MATERIALIZED (SELECT FROM {schema}.gates \
                       WHERE table_name = {name} AND version = $10 FOR SHARE) "
                ),
                " AND EXISTS (SELECT FROM whippet_known)",
            ),
            None => (String::new(), ""),
        };
        format!(
            "{known_gates}INSERT INTO {schema}.holds AS h \
               (table_name, place, event_id, topic, key, state, cause, reason, attempts) \
             SELECT {name}, p, i, t, k, s, c, r, a FROM unnest( \
               $1::text[], $3::text[], $4::text[], $5::bytea[], $6::text[], $7::text[], $8::text[], $9::int[]) \
               AS held(p, i, t, k, s, c, r, a) \
             WHERE {fence}{if_known} \
             ON CONFLICT (table_name, place) DO {again}",
            fence = self.fence(),
            again = hold_again(self.spec)
        )
    }

    fn expire(&self) -> String {
        let Shape { schema, table, name, seq, .. } = self;
        let Some(column) = self.marked() else { return String::new() };
        format!(
            "DELETE FROM {table} o WHERE o.{seq} IN ( \
               SELECT i.{seq} FROM {table} i WHERE i.{column} < now() - make_interval(secs => $1) \
               LIMIT {EXPIRED_AT_ONCE}) \
             AND NOT EXISTS (SELECT FROM {schema}.replays r \
               WHERE r.table_name = {name} AND r.place = o.{seq}::text) AND {fence}",
            fence = self.fence()
        )
    }

    fn backlog(&self) -> String {
        let table = &self.table;
        let (age, pending, unheld) = (self.age(), self.pending(), self.unheld());
        format!(
            "SELECT (SELECT count(*) FROM (SELECT FROM {table} o WHERE true{pending}{unheld} \
               LIMIT {BACKLOG_CAP}) waiting), \
             (SELECT {age} FROM {table} o WHERE true{pending}{unheld} ORDER BY {first} LIMIT 1)",
            first = self.order().unwrap_or_else(|| format!("o.{}", self.seq)),
        )
    }

    /// The age of a row in seconds, which no value of the column can make an error: that would be one of the whole
    /// table.
    fn age(&self) -> String {
        let (now, column) = ("clock_timestamp()", &self.timestamp);
        match self.clock {
            Clock::None => "NULL::float8".into(),
            Clock::Millis => format!("(extract(epoch FROM {now}) - {column} / 1000.0)::float8"),
            Clock::Timestamp => {
                format!("extract(epoch FROM {now} - CASE WHEN isfinite({column}) THEN {column} END)::float8")
            }
            // The day is added, since not every month has it.
            Clock::Text => format!(
                "extract(epoch FROM {now} - CASE WHEN {column} ~ '^[1-9]\\d{{3}}-(0[1-9]|1[0-2])-(0[1-9]|[12]\\d|3[01])\
                   ([T ]([01]\\d|2[0-3])(:[0-5]\\d){{2}}(\\.\\d+)?(Z|[+-](0\\d|1[0-4])(:?[0-5]\\d)?)?)?$' \
                 THEN overlay({column} placing '01' from 9 for 2)::timestamptz \
                   + make_interval(days => substr({column}, 9, 2)::int - 1) END)::float8"
            ),
        }
    }
}

fn type_of<'a>(columns: &'a [(String, String)], name: &str) -> Option<&'a str> {
    columns.iter().find(|(column, _)| column == name).map(|(_, kind)| kind.as_str())
}

fn is_int(kind: Option<&str>) -> bool {
    matches!(kind, Some("bigint" | "integer" | "smallint"))
}

/// A type as the target of a cast: by these names a type without its length has one of 1.
fn cast_type(kind: Option<&str>) -> String {
    match kind.unwrap_or("text") {
        "character" => "bpchar".to_owned(),
        "bit" => "\"bit\"".to_owned(),
        other => other.to_owned(),
    }
}
