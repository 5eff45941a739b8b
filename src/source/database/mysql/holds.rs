//! Holds, verbs and replays in MySQL.

use std::future::Future;

use sqlx::AssertSqlSafe;

use super::{
    super::{
        Error, TableSpec,
        holds::{APPLY, Dialect, hold_methods},
    },
    Outbox,
    columns::Column,
    sql::{self, Row, Tx, literal, quoted, quoted_table},
};
use crate::event::Place;

pub(super) fn dialect<'a>(
    own: &'a dyn Fn(&str) -> String,
    outbox: String,
    place: &'a Column,
    id: String,
    place_text: String,
    bucket: Option<String>,
) -> Dialect<'a> {
    Dialect {
        own,
        quoted,
        literal,
        text: "CHAR",
        bytes: "BINARY",
        int: "SIGNED",
        // A table that is deleted from may be looked at in a derived table only.
        delete: |holds, table, condition| {
            format!(
                "DELETE h FROM {holds} h JOIN (SELECT DISTINCT h.place FROM {holds} h WHERE {condition}) gone \
                 ON gone.place = h.place WHERE h.table_name = {table}"
            )
        },
        or_nothing: "ON DUPLICATE KEY UPDATE table_name = table_name",
        or_topic: |replays| format!("ON DUPLICATE KEY UPDATE {replays}.topic = VALUES(topic)"),
        // As both servers have it.
        lock: " LOCK IN SHARE MODE",
        by_key: ("STRAIGHT_JOIN", " FORCE INDEX (by_key)"),
        contains_4: |column| format!("INSTR({column}, $4) > 0"),
        moment: |column| {
            format!(
                "CONCAT(DATE_FORMAT({column}, '%Y-%m-%dT%H:%i:%s.'), \
                 LPAD(MICROSECOND({column}) DIV 1000, 3, '0'), 'Z')"
            )
        },
        age: |column| format!("TIMESTAMPDIFF(MICROSECOND, {column}, UTC_TIMESTAMP(6)) / 1e6"),
        outbox,
        seq: quoted(&place.name),
        seq_text: place_text,
        as_seq: Box::new(|text| place.of_text(text)),
        numbers: None,
        between_3_4: |column| {
            format!("{column} BETWEEN FROM_UNIXTIME($3 / 1000) AND FROM_UNIXTIME($4 / 1000)")
        },
        released: None,
        id,
        among_5: |id| {
            format!(
                "($5 IS NULL OR CONVERT({id} USING utf8mb4) COLLATE utf8mb4_bin IN \
                 (SELECT one.id FROM JSON_TABLE($5, '$[*]' COLUMNS (id VARCHAR(512) PATH '$')) one))"
            )
        },
        settled: None,
        bucket,
        adopt: Vec::new(),
    }
}

/// What was held when rows were told apart by another column gets the place that it has now.
pub(super) fn adopt(spec: &TableSpec, holds: &str, place: &Column, id: Option<&Column>) -> Option<String> {
    let (order, id_name) = spec.candidates()?;
    if order == id_name {
        return None;
    }
    let name = literal(&spec.name);
    match (spec.slower(), id) {
        (Some(_), _) => Some(format!(
            "UPDATE IGNORE {holds} SET place = event_id \
             WHERE table_name = {name} AND place <> event_id AND event_id <> ''"
        )),
        (None, Some(id)) if place.is_int() => Some(format!(
            "UPDATE IGNORE {holds} h STRAIGHT_JOIN {outbox} o ON o.{column} = {value} \
             SET h.place = CAST(o.{order} AS CHAR) WHERE h.table_name = {name} AND h.place = h.event_id",
            outbox = quoted_table(&spec.name),
            column = quoted(&id.name),
            value = id.of_text("h.event_id"),
            order = quoted(&place.name),
        )),
        (None, _) => None,
    }
}

/// `None` where ids do not matter.
fn ids(ids: &[String]) -> Option<String> {
    (!ids.is_empty()).then(|| serde_json::Value::from(ids.to_vec()).to_string())
}

hold_methods!(
    transaction: Tx,
    row: Row,
    error: mysql_async::Error,
    begin: Tx::begin,
    inline: i64,
    ids: ids
);

impl Outbox {
    /// Deletes or marks rows as if they were published.
    async fn settle_in(&self, tx: &mut Tx, places: &[String], _epoch: i64) -> Result<(), Error> {
        let place = |text: &String| match self.place_is_int {
            true => text.parse().ok().map(Place::Int),
            false => Some(Place::Text(text.as_str().into())),
        };
        let places: Vec<Place> = places.iter().filter_map(place).collect();
        if places.is_empty() {
            return Ok(());
        }
        let text = self.record_sql(&places);
        let query = sql::query(AssertSqlSafe(&text));
        query.execute(&mut **tx).await.map(drop).map_err(Error::sql(APPLY))
    }
}
