//! The columns of a table by their types: how each is read as text or bytes, and what it can be.

use mysql_async::{Conn, prelude::Queryable as _};
use sqlx::AssertSqlSafe;

use super::{
    super::{
        Error, TableSpec,
        names::no_table,
        place::{Candidates, Distinct},
    },
    doctor::variable,
    pool::Pool,
    sql::{self, Literal, literal, quoted, quoted_table},
};
use crate::event::Place;

/// The length of a payload that the server cannot tell, because it is more than it takes in one value.
pub(super) const TOO_LONG: u64 = u32::MAX as u64;

/// A column as the catalogue has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Column {
    pub name: String,
    /// In lower case, without length: `bigint`, `varchar`, `json`.
    pub kind: String,
    /// The same with its length: `binary(16)`.
    pub full: String,
    /// The same as it was written: names of an ENUM are in it.
    pub written: String,
    pub charset: Option<String>,
    pub collation: Option<String>,
    pub bits: Option<u64>,
    pub nullable: bool,
    /// Whether it has a unique index of its own.
    pub unique: bool,
}

/// How values of a column come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Form {
    /// As they are.
    Bytes,
    Text,
    /// A text in another character set, which the server converts.
    Foreign,
    /// A document, or a number, or a time, which the server writes as text.
    Cast,
    /// A string of 0 and 1, as long as the column.
    Bits,
}

impl Column {
    pub fn is_int(&self) -> bool {
        matches!(self.kind.as_str(), "tinyint" | "smallint" | "mediumint" | "int" | "bigint")
    }

    pub fn is_bytes(&self) -> bool {
        self.form() == Form::Bytes
    }

    pub fn is_time(&self) -> bool {
        matches!(self.kind.as_str(), "datetime" | "timestamp" | "date")
    }

    /// Whether each value is a time: a number is in milliseconds.
    pub fn is_clock(&self) -> bool {
        self.is_time() || self.is_int()
    }

    fn form(&self) -> Form {
        match self.kind.as_str() {
            "binary" | "varbinary" | "tinyblob" | "blob" | "mediumblob" | "longblob" | "geometry"
            | "point" | "linestring" | "polygon" | "multipoint" | "multilinestring" | "multipolygon"
            | "geometrycollection" | "geomcollection" | "vector" => Form::Bytes,
            "bit" => Form::Bits,
            "char" | "varchar" | "tinytext" | "text" | "mediumtext" | "longtext" | "enum" | "set" => {
                match self.charset.as_deref() {
                    Some("utf8mb4" | "utf8mb3" | "utf8" | "ascii") => Form::Text,
                    _ => Form::Foreign,
                }
            }
            _ => Form::Cast,
        }
    }

    fn name(&self, alias: &str) -> String {
        format!("{alias}{}", quoted(&self.name))
    }

    /// The value as text or bytes. `alias` is that of the table with its dot, or nothing.
    pub fn cell(&self, alias: &str) -> String {
        let name = self.name(alias);
        match self.form() {
            Form::Bytes | Form::Text => name,
            Form::Foreign => format!("CONVERT({name} USING utf8mb4)"),
            Form::Cast => format!("CAST({name} AS CHAR CHARACTER SET utf8mb4)"),
            Form::Bits => format!("LPAD(BIN({name}), {}, '0')", self.bits.unwrap_or(1)),
        }
    }

    /// A piece of the cell: from `$1` on, `$2` of it at most. `None` where the server makes the whole of it
    /// for that.
    pub fn piece(&self, alias: &str) -> Option<String> {
        let is_as_it_is = matches!(self.form(), Form::Bytes | Form::Text);
        is_as_it_is.then(|| format!("SUBSTRING({}, $1, $2)", self.cell(alias)))
    }

    /// The length of the cell. A document that is longer as text than a value may be has one too.
    pub fn length(&self, alias: &str) -> String {
        let cell = self.cell(alias);
        match self.form() {
            Form::Bytes | Form::Text => format!("OCTET_LENGTH({cell})"),
            Form::Foreign | Form::Cast | Form::Bits => {
                format!("IF({} IS NULL, NULL, COALESCE(OCTET_LENGTH({cell}), {TOO_LONG}))", self.name(alias))
            }
        }
    }

    /// The value as the text of an id: a UUID of 16 bytes as people write it, other bytes as digits.
    pub fn id(&self, alias: &str) -> String {
        let name = self.name(alias);
        match (self.form(), self.full.as_str()) {
            (Form::Bytes, "binary(16)") => format!(
                "LOWER(INSERT(INSERT(INSERT(INSERT(HEX({name}), 21, 0, '-'), 17, 0, '-'), 13, 0, '-'), 9, 0, '-'))"
            ),
            (Form::Bytes, _) => format!("LOWER(HEX({name}))"),
            _ => self.cell(alias),
        }
    }

    /// The text of an id as a value of the column, so that its index is of use.
    pub fn of_text(&self, text: &str) -> String {
        match (self.form(), self.full.as_str(), &self.charset, &self.collation) {
            (Form::Bytes, "binary(16)", ..) => format!("UNHEX(REPLACE({text}, '-', ''))"),
            (Form::Bytes, ..) => format!("UNHEX({text})"),
            (_, _, Some(charset), Some(collation)) => {
                format!("CONVERT({text} USING {charset}) COLLATE {collation}")
            }
            _ if self.is_int() => format!("CAST({text} AS SIGNED)"),
            _ => text.to_owned(),
        }
    }

    /// The condition that the value is among these. A collation may take two texts for one, so their bytes are
    /// compared too.
    pub(super) fn among(&self, alias: &str, places: &[Place]) -> String {
        let list = |write: &dyn Fn(&Place) -> String| places.iter().map(write).collect::<Vec<_>>().join(",");
        let name = self.name(alias);
        if self.is_int() {
            return format!("{name} IN ({})", list(&|place| place.to_string()));
        }
        let values = list(&|place| self.of_text(&literal(&place.to_string())));
        if self.form() == Form::Bytes {
            return format!("{name} IN ({values})");
        }
        let bytes = list(&|place| Literal::Bytes(place.to_string().into_bytes()).to_string());
        format!("({name} IN ({values}) AND CAST({} AS BINARY) IN ({bytes}))", self.cell(alias))
    }

    /// The same, for statements that change rows: the places as a table `v`, and how it is joined. For a list
    /// the server may read all of the table instead, and wait for every row that is not committed.
    pub(super) fn joined(&self, alias: &str, places: &[Place]) -> (String, String) {
        let name = self.name(alias);
        let (kind, on) = match (self.is_int(), self.form()) {
            (true, _) => ("BIGINT", format!("{name} = v.n")),
            (_, Form::Bytes) => ("VARCHAR(2048)", format!("{name} = {}", self.of_text("v.n"))),
            _ => {
                let bytes = format!("CAST({} AS BINARY) = CAST(v.n AS BINARY)", self.cell(alias));
                ("VARCHAR(2048)", format!("{name} = {} AND {bytes}", self.of_text("v.n")))
            }
        };
        let list = places.iter().map(|place| match place {
            Place::Int(number) => (*number).into(),
            Place::Text(text) => serde_json::Value::from(&**text),
        });
        let list = literal(&serde_json::Value::Array(list.collect()).to_string());
        (format!("JSON_TABLE({list}, '$[*]' COLUMNS (n {kind} PATH '$')) v"), on)
    }

    /// Milliseconds since the Unix epoch: of a number, which is that, or of a time, which is in UTC. Of a text that
    /// the server does not take for a time it is NULL.
    pub fn millis(&self, alias: &str) -> String {
        let name = self.name(alias);
        let since = |time: &str| format!("TIMESTAMPDIFF(MICROSECOND, '1970-01-01', {time}) DIV 1000");
        match (self.is_time(), self.is_int()) {
            (true, _) => since(&name),
            (_, true) => format!("CAST({name} AS SIGNED)"),
            _ => since(&format!("CAST({} AS DATETIME(6))", self.cell(alias))),
        }
    }
}

/// A table's columns, its engine, and the index that gives its rows in order.
#[derive(Debug)]
pub(super) struct Catalogue {
    /// The names as they are stored.
    pub database: String,
    pub table: String,
    pub columns: Vec<Column>,
    pub engine: String,
    /// The index that a read goes along, quoted; none means that each read sorts the table.
    pub index: Option<String>,
    /// The index that leads to a row by its place, quoted.
    pub by_place: Option<String>,
    /// Whether it passes by what is published.
    pub has_index_of_what_waits: bool,
    /// The largest value that the server makes, in bytes.
    pub packet: u64,
    /// Whether its binlog has rows, and no statements.
    pub logs_rows: bool,
}

impl Catalogue {
    /// Whether it has what is needed of a table.
    pub fn check(&self, spec: &TableSpec) -> Result<(), Error> {
        let types: Vec<_> = self.columns.iter().map(|one| (one.name.clone(), one.kind.clone())).collect();
        spec.check(&types)
    }

    pub async fn of(pool: &Pool, database: &str, spec: &TableSpec) -> Result<Catalogue, Error> {
        let (schema, table) = spec.name.split_once('.').unwrap_or((database, &spec.name));
        let (schema, table) = (literal(schema), literal(table));
        let doing = "look at the table";
        let mut connection = pool.get_conn().await.map_err(Error::sql(doing))?;
        let engine = format!(
            "SELECT COALESCE(engine, ''), table_schema, table_name, COALESCE(create_options, '') LIKE '%partitioned%' \
             FROM information_schema.tables \
             WHERE table_schema = {schema} AND table_name = {table}"
        );
        let found: Option<(String, String, String, bool)> = sql::query_as(AssertSqlSafe(&engine))
            .fetch_optional(&mut connection)
            .await
            .map_err(Error::sql(doing))?;
        let Some((engine, database, name, in_partitions)) = found else {
            let meant = meant(&mut connection, database, spec).await?;
            return Err(no_table(&spec.name, meant.as_deref()));
        };
        let columns = format!(
            "SELECT column_name, LOWER(data_type), LOWER(column_type), column_type, character_set_name, collation_name, \
               numeric_precision, is_nullable = 'YES' \
             FROM information_schema.columns WHERE table_schema = {schema} AND table_name = {table} \
             ORDER BY ordinal_position"
        );
        let mut columns: Vec<Column> =
            connection
                .query_map(columns, |(name, kind, full, written, charset, collation, bits, nullable)| {
                    Column { name, kind, full, written, charset, collation, bits, nullable, unique: false }
                })
                .await
                .map_err(Error::sql(doing))?;
        let parts = format!(
            "SELECT index_name, COALESCE(LOWER(column_name), ''), non_unique = 0 AND sub_part IS NULL FROM information_schema.statistics \
             WHERE table_schema = {schema} AND table_name = {table} \
             ORDER BY index_name <> 'PRIMARY', index_name, seq_in_index"
        );
        let parts: Vec<(String, String, bool)> = connection.query(parts).await.map_err(Error::sql(doing))?;
        for index in parts.chunk_by(|one, next| one.0 == next.0) {
            if let [(_, name, true)] = index
                && let Some(column) = columns.iter_mut().find(|one| one.name.eq_ignore_ascii_case(name))
            {
                column.unique = true;
            }
        }
        let parts: Vec<(String, String)> = parts.into_iter().map(|(index, name, _)| (index, name)).collect();
        let (order, published_at) = (spec.sequence.as_deref(), spec.published_at.as_deref());
        let found = order.and_then(|order| index(&parts, order, published_at));
        let of_all = order.and_then(|order| index(&parts, order, None));
        tell_apart(spec, &columns, in_partitions)?;
        let packet: Option<u64> =
            connection.query_first("SELECT @@max_allowed_packet").await.map_err(Error::sql(doing))?;
        let format = variable(&mut connection, "binlog_format").await?;
        Ok(Catalogue {
            database,
            table: name,
            columns,
            engine,
            has_index_of_what_waits: found.is_some() && (published_at.is_none() || found != of_all),
            by_place: index(&parts, spec.place(), None).map(quoted),
            index: found.map(quoted),
            packet: packet.unwrap_or_default(),
            // A server without the variable has nothing else.
            logs_rows: matches!(format.as_deref(), None | Some("ROW")),
        })
    }
}

/// The table that may be meant by a name that there is not: its name has the same letters.
pub(super) async fn meant(
    connection: &mut Conn,
    database: &str,
    spec: &TableSpec,
) -> Result<Option<String>, Error> {
    let (schema, table) = spec.name.split_once('.').unwrap_or((database, &spec.name));
    let text = format!(
        "SELECT table_schema, table_name FROM information_schema.tables \
         WHERE LOWER(table_schema) = LOWER({}) AND LOWER(table_name) = LOWER({}) ORDER BY 1, 2 LIMIT 1",
        literal(schema),
        literal(table)
    );
    let found: Option<(String, String)> =
        connection.query_first(text).await.map_err(Error::sql("look for the table"))?;
    Ok(found.map(|(schema, table)| match spec.name.contains('.') {
        true => format!("{schema}.{table}"),
        false => table,
    }))
}

/// Decides by what the rows of a table are told apart.
fn tell_apart(spec: &TableSpec, columns: &[Column], in_partitions: bool) -> Result<(), Error> {
    let Some((order, id)) = spec.candidates() else { return Ok(()) };
    let of = |name: &str| columns.iter().find(|column| column.name.eq_ignore_ascii_case(name));
    let (Some(order), Some(id)) = (of(order), of(id)) else { return Ok(()) };
    let table = quoted_table(&spec.name);
    let distinct = |column: &Column| {
        let name = quoted(&column.name);
        let index = (!column.unique).then(|| format!("ALTER TABLE {table} ADD UNIQUE ({name})"));
        let fill =
            column.nullable.then(|| format!("ALTER TABLE {table} MODIFY {name} {} NOT NULL", column.written));
        let statements: Vec<String> = match column.is_int() || *column == *id {
            true => index.into_iter().chain(fill).collect(),
            // Two times may be the same.
            false => vec![format!(
                "ALTER TABLE {table} ADD COLUMN seq BIGINT NOT NULL AUTO_INCREMENT UNIQUE -- then columns.sequence: seq"
            )],
        };
        let mend = (!in_partitions && !statements.is_empty()).then(|| statements.join("; "));
        Distinct { unique: column.unique, filled: !column.nullable, mend }
    };
    spec.tell_apart(Candidates { order: distinct(order), id: distinct(id), is_untold: in_partitions })
}

/// The index whose first columns are these: that of unpublished rows in order, else that of all rows.
fn index<'a>(parts: &'a [(String, String)], order: &str, published_at: Option<&str>) -> Option<&'a str> {
    let begins = |wanted: &[&str]| {
        parts.chunk_by(|one, next| one.0 == next.0).find_map(|columns| {
            let has = columns.iter().map(|(_, column)| column.as_str()).take(wanted.len());
            has.eq(wanted.iter().copied()).then_some(columns[0].0.as_str())
        })
    };
    let order = order.to_lowercase();
    published_at
        .map(str::to_lowercase)
        .and_then(|published_at| begins(&[&published_at, &order]))
        .or_else(|| begins(&[&order]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_index_is_that_of_what_waits_if_there_is_one() {
        let parts = |list: &[(&str, &str)]| -> Vec<(String, String)> {
            list.iter().map(|(name, column)| ((*name).into(), (*column).into())).collect()
        };
        let both = parts(&[("PRIMARY", "seq"), ("u", "published_at"), ("u", "seq"), ("z", "id")]);
        assert_eq!(index(&both, "SEQ", Some("published_at")), Some("u"));
        assert_eq!(index(&both, "seq", None), Some("PRIMARY"));
        assert_eq!(index(&both, "seq", Some("other")), Some("PRIMARY"));
        assert_eq!(index(&parts(&[("PRIMARY", "id"), ("PRIMARY", "seq")]), "seq", None), None);
    }
}
