//! Holds, verbs and replays in PostgreSQL.

use std::future::Future;

use sqlx::{
    self as sql, AssertSqlSafe, Postgres, Row as _, Transaction,
    postgres::{PgArguments, PgPool, PgRow},
    query::Query,
};

use super::{
    super::{
        Error, TableSpec, ddl,
        holds::{APPLY, Dialect, OR_NOTHING, delete, hold_methods, or_topic},
        literal, quoted, quoted_table,
    },
    Outbox,
    places::ranges,
};

pub(super) fn dialect<'a>(
    own: &'a dyn Fn(&str) -> String,
    spec: &TableSpec,
    place: &str,
    place_type: &'a str,
    settled: Option<String>,
    bucket: Option<String>,
) -> Dialect<'a> {
    Dialect {
        own,
        quoted,
        literal,
        text: "text",
        bytes: "bytea",
        int: "bigint",
        delete,
        or_nothing: OR_NOTHING,
        or_topic,
        lock: " FOR KEY SHARE",
        by_key: ("JOIN", ""),
        contains_4: |column| format!("position($4 in {column}) > 0"),
        moment: |column| format!("to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')"),
        age: |column| format!("extract(epoch FROM clock_timestamp() - {column})::float8"),
        outbox: quoted_table(&spec.name),
        seq: quoted(place),
        seq_text: format!("o.{}::text", quoted(place)),
        as_seq: Box::new(move |text| format!("{text}::{place_type}")),
        numbers: None,
        between_3_4: |column| {
            format!(
                "{column} BETWEEN to_timestamp(CAST($3 AS bigint) / 1000.0) AND \
                 to_timestamp(CAST($4 AS bigint) / 1000.0)"
            )
        },
        released: (!spec.stays()).then(|| own("released")),
        id: format!("o.{}", quoted(&spec.id)),
        among_5: |column| format!("(CAST($5 AS text[]) IS NULL OR {column}::text = ANY($5))"),
        settled,
        bucket,
        adopt: Vec::new(),
    }
}

/// What was held or is to be replayed when rows were told apart by another column gets the place that it has now.
pub(super) fn adopt(
    spec: &TableSpec,
    holds: &str,
    replays: &str,
    id_type: &str,
    place_is_int: bool,
) -> Vec<String> {
    let Some((order, id)) = spec.candidates().filter(|(order, id)| order != id) else { return Vec::new() };
    // A hold has its id as people write it.
    if spec.is_kept() || id_type == "bytea" {
        return Vec::new();
    }
    let name = literal(&spec.name);
    let (outbox, order, id) = (quoted_table(&spec.name), quoted(order), quoted(id));
    let twice = |condition: &str, other: &str| {
        format!(
            "DELETE FROM {holds} h WHERE h.table_name = {name} AND {condition} AND EXISTS ( \
               SELECT FROM {holds} m WHERE m.table_name = {name} AND {other})"
        )
    };
    match spec.slower() {
        Some(_) => {
            let condition = "h.place <> h.event_id AND h.event_id <> ''";
            let is_uuid = (id_type == "uuid").then(|| {
                format!("DELETE FROM {replays} WHERE table_name = {name} AND place !~ '^[0-9a-f]{{8}}-'")
            });
            [
                twice(condition, "m.place = h.event_id"),
                format!(
                    "UPDATE {holds} h SET place = h.event_id WHERE h.table_name = {name} AND {condition}"
                ),
            ]
            .into_iter()
            .chain(is_uuid)
            .collect()
        }
        None if place_is_int => vec![
            twice("h.place = h.event_id", "m.event_id = h.event_id AND m.place <> m.event_id"),
            format!(
                "UPDATE {holds} h SET place = o.{order}::text FROM {outbox} o \
                 WHERE h.table_name = {name} AND h.place = h.event_id AND h.event_id <> '' \
                   AND o.{id} = h.event_id::{id_type}"
            ),
            format!("DELETE FROM {replays} WHERE table_name = {name} AND place !~ '^-?[0-9]+$'"),
        ],
        None => Vec::new(),
    }
}

/// The name of one of the relay's own tables.
pub(super) fn own(schema: &str, name: &str) -> String {
    let name = if name == "audit" { ddl::AUDIT } else { name };
    format!("{}.{}", quoted(schema), quoted(name))
}

/// `None` where ids do not matter.
fn ids(ids: &[String]) -> Option<Vec<String>> {
    (!ids.is_empty()).then(|| ids.to_vec())
}

async fn begin(pool: &PgPool) -> Result<Transaction<'static, Postgres>, sqlx::Error> {
    pool.begin().await
}

hold_methods!(
    transaction: Transaction<'static, Postgres>,
    row: PgRow,
    error: sqlx::Error,
    begin: begin,
    inline: i32,
    ids: ids
);

impl Outbox {
    /// Binds places as a statement takes them; those that are no number where all are numbers are left out.
    fn with_places<'q>(
        &self,
        query: Query<'q, Postgres, PgArguments>,
        places: &[String],
    ) -> Query<'q, Postgres, PgArguments> {
        match self.place_is_int {
            true => query.bind(ranges(places.iter().filter_map(|place| place.parse().ok()).collect())),
            false => query.bind(places.to_vec()),
        }
    }

    /// Deletes or marks rows as if they were published.
    async fn settle_in(
        &self,
        tx: &mut Transaction<'static, Postgres>,
        places: &[String],
        epoch: i64,
    ) -> Result<(), Error> {
        if self.kept.is_some() {
            // That they are skipped is written down with their holds.
            return Ok(());
        }
        self.with_places(sqlx::query(AssertSqlSafe(self.sql.record.as_str())), places)
            .bind(epoch)
            .execute(&mut **tx)
            .await
            .map_err(Error::sql(APPLY))?;
        Ok(())
    }

    /// These rows were published again.
    pub async fn replayed(&self, places: &[String]) -> Result<(), Error> {
        sqlx::query(AssertSqlSafe(self.sql.replayed.as_str()))
            .bind(places.to_vec())
            .execute(&self.pool)
            .await
            .map_err(Error::sql("record what was replayed"))?;
        Ok(())
    }
}
