//! Holds, verbs and replays in MySQL.

use std::{borrow::Cow, future::Future};

use futures_util::TryStreamExt as _;
use sqlx::AssertSqlSafe;

use super::{
    super::{
        Error, Found, Limits, Listed, TableSpec, answered,
        holds::{
            APPLY, Dialect, FIXED, KEYS_AT_ONCE, SHOWN_AT_MOST, count, execute, execute_matching,
            hold_methods, matching, scope_of, words_of,
        },
        of_buckets,
    },
    Outbox,
    columns::Column,
    sql::{self, Row, Tx, literal, quoted, quoted_table},
};
use crate::{
    event::{Place, Replay},
    source::{
        ClosedKey, Gates,
        hold::{Counts, Filter, Held, Outcome, Over, Request, Verb, key_for_people},
    },
};

pub(super) fn dialect<'a>(
    own: &'a dyn Fn(&str) -> String,
    spec: &TableSpec,
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
        contains_4: |column| format!("INSTR({column}, $4) > 0"),
        moment: |column| {
            format!(
                "CONCAT(DATE_FORMAT({column}, '%Y-%m-%dT%H:%i:%s.'), \
                 LPAD(MICROSECOND({column}) DIV 1000, 3, '0'), 'Z')"
            )
        },
        age: |column| format!("TIMESTAMPDIFF(MICROSECOND, {column}, UTC_TIMESTAMP(6)) / 1e6"),
        outbox: quoted_table(&spec.name),
        seq: quoted(&place.name),
        seq_text: place_text,
        as_seq: Box::new(|text| place.of_text(text)),
        place_is_int: place.is_int(),
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
    async fn settle_in(&self, tx: &mut Tx, places: &[String], epoch: i64) -> Result<(), Error> {
        let place = |text: &String| match self.place_is_int {
            true => text.parse().ok().map(Place::Int),
            false => Some(Place::Text(text.as_str().into())),
        };
        let places: Vec<Place> = places.iter().filter_map(place).collect();
        if places.is_empty() {
            return Ok(());
        }
        let text = self.record_sql(&places);
        let query = sql::query(AssertSqlSafe(&text)).bind(epoch);
        query.execute(&mut **tx).await.map(drop).map_err(Error::sql(APPLY))
    }
}
