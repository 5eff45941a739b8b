//! Holds, verbs and replays in SQLite.

use std::future::Future;

use sqlx::{
    self as sql, AssertSqlSafe, Row as _, Sqlite, Transaction,
    sqlite::{SqlitePool, SqliteRow},
};

use super::{
    super::{
        Error, TableSpec, ddl,
        holds::{APPLY, Dialect, OR_NOTHING, delete, hold_methods, or_topic},
        literal, quoted,
    },
    Outbox, json_texts,
};

pub(super) fn dialect<'a>(
    own: &'a dyn Fn(&str) -> String,
    spec: &TableSpec,
    place: &str,
    place_is_int: bool,
    settled: Option<String>,
) -> Dialect<'a> {
    Dialect {
        own,
        quoted,
        literal,
        text: "text",
        bytes: "blob",
        int: "bigint",
        delete,
        or_nothing: OR_NOTHING,
        or_topic,
        // Writers take turns.
        lock: "",
        by_key: ("CROSS JOIN", ""),
        contains_4: |column| format!("instr({column}, $4) > 0"),
        moment: |column| format!("strftime('%Y-%m-%dT%H:%M:%fZ', {column})"),
        age: |column| format!("unixepoch('subsec') - unixepoch({column}, 'subsec')"),
        outbox: quoted(&spec.name),
        seq: quoted(place),
        seq_text: format!("CAST(o.{} AS TEXT)", quoted(place)),
        as_seq: Box::new(move |text| {
            format!("CAST({text} AS {})", if place_is_int { "INTEGER" } else { "TEXT" })
        }),
        numbers: None,
        between_3_4: |column| format!("unixepoch({column}, 'subsec') * 1000 BETWEEN $3 AND $4"),
        released: None,
        id: format!("o.{}", quoted(&spec.id)),
        among_5: |column| {
            format!("($5 IS NULL OR CAST({column} AS TEXT) IN (SELECT value FROM json_each($5)))")
        },
        settled,
        bucket: None,
        adopt: Vec::new(),
    }
}

/// What was held when rows were told apart by another column gets the place that it has now.
pub(super) fn adopt(spec: &TableSpec, holds: &str, place_is_int: bool) -> Option<String> {
    let (order, id) = spec.candidates().filter(|(order, id)| order != id && !spec.is_kept())?;
    let (name, outbox) = (literal(&spec.name), quoted(&spec.name));
    let (order, id) = (quoted(order), quoted(id));
    match spec.slower() {
        Some(_) => Some(format!(
            "UPDATE OR IGNORE {holds} SET place = event_id \
             WHERE table_name = {name} AND place <> event_id AND event_id <> ''"
        )),
        None => place_is_int.then(|| {
            format!(
                "UPDATE OR IGNORE {holds} AS h SET place = CAST(o.{order} AS TEXT) FROM {outbox} o \
                 WHERE h.table_name = {name} AND h.place = h.event_id AND o.{id} = h.event_id"
            )
        }),
    }
}

/// The name of one of the relay's own tables.
pub(super) fn own(prefix: &str, name: &str) -> String {
    if name == "audit" { quoted(ddl::AUDIT) } else { quoted(&format!("{prefix}_{name}")) }
}

/// `None` where ids do not matter.
fn ids(ids: &[String]) -> Option<String> {
    (!ids.is_empty()).then(|| json_texts(ids))
}

async fn begin(pool: &SqlitePool) -> Result<Transaction<'static, Sqlite>, sqlx::Error> {
    pool.begin_with("BEGIN IMMEDIATE").await
}

hold_methods!(
    transaction: Transaction<'static, Sqlite>,
    row: SqliteRow,
    error: sqlx::Error,
    begin: begin,
    inline: i64,
    ids: ids
);

impl Outbox {
    /// Deletes or marks rows as if they were published.
    async fn settle_in(
        &self,
        tx: &mut Transaction<'static, Sqlite>,
        places: &[String],
        epoch: i64,
    ) -> Result<(), Error> {
        if self.kept.is_some() {
            // That they are skipped is written down with their holds.
            return Ok(());
        }
        let numbers = || places.iter().filter_map(|place| place.parse::<i64>().ok()).collect::<Vec<i64>>();
        let places = match self.place_is_int {
            true => serde_json::Value::from(numbers()).to_string(),
            false => json_texts(places),
        };
        sqlx::query(AssertSqlSafe(self.sql.record.as_str()))
            .bind(places)
            .bind(epoch)
            .execute(&mut **tx)
            .await
            .map_err(Error::sql(APPLY))?;
        Ok(())
    }

    /// These rows were published again.
    pub async fn replayed(&self, places: &[String]) -> Result<(), Error> {
        sqlx::query(AssertSqlSafe(self.sql.replayed.as_str()))
            .bind(json_texts(places))
            .execute(&self.pool)
            .await
            .map_err(Error::sql("record what was replayed"))?;
        Ok(())
    }
}
