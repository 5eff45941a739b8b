//! Events without a row: those of `rows: transient`, and logical messages. While they are held the relay's
//! own table has their content, and once they are released a table of their own, which is to them what the
//! outbox is to others: it is read in the order of the log, and what was published is deleted from it.

use sqlx::AssertSqlSafe;

use super::{
    super::{
        Error, TableSpec,
        holds::{FIXED, HoldsSql},
        literal, quoted,
    },
    Outbox, Postgres,
    holds::{dialect, own},
    statements::{Clock, Sql},
};
use crate::{
    event::{Event, Place, Row},
    source::Hold,
};

impl Outbox {
    /// Of a table whose rows do not stay.
    pub fn of_released(db: &Postgres, spec: &TableSpec) -> Outbox {
        let schema = quoted(&db.schema);
        let (table, name) = (format!("{schema}.released"), literal(&spec.name));
        let payload = spec.columns.iter().position(|column| *column == spec.payload);
        let length = match payload {
            Some(index) => format!("coalesce(o.unread, octet_length(o.cells[{}]))::int", index + 1),
            None => "NULL::int".to_owned(),
        };
        let cells: Vec<String> = (0..spec.columns.len())
            .map(|index| match payload {
                Some(payload) if payload == index => {
                    format!("CASE WHEN {length} <= $5 THEN o.cells[{}] END", index + 1)
                }
                _ => format!("o.cells[{}]", index + 1),
            })
            .collect();
        let list = format!("o.place, o.at_ms, {length}, {}", cells.join(", "));
        let of_table = format!("o.table_name = {name}");
        let fence = format!("EXISTS (SELECT FROM {schema}.members m WHERE m.epoch = $2)");
        let read = format!(
            "SELECT {list} FROM {table} o WHERE $1::bigint IS NOT NULL AND $2::bigint IS NOT NULL \
               AND {of_table} AND NOT (o.place = ANY($3::text[])) ORDER BY o.place COLLATE \"C\" LIMIT $4"
        );
        let nothing = "DELETE FROM pg_class WHERE false AND $1::text[] IS NULL".to_owned();
        let sql = Sql {
            read_skipping_held: read.clone(),
            read,
            payload: format!(
                "SELECT o.cells[{}] FROM {table} o WHERE {of_table} AND o.place = $1",
                payload.map_or(1, |index| index + 1)
            ),
            record: format!(
                "DELETE FROM {table} o WHERE {of_table} AND o.place = ANY($1::text[]) AND {fence}"
            ),
            replayed: nothing,
            hold: format!(
                "WITH gone AS (DELETE FROM {table} o WHERE {of_table} AND o.place = $1) \
                 INSERT INTO {schema}.holds (table_name, place, event_id, topic, key, state, cause, reason, \
                   attempts, at_ms, unread, cells) \
                 VALUES ({name}, $1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11) \
                 ON CONFLICT (table_name, place) DO NOTHING"
            ),
            expire: String::new(),
            writers: "SELECT NULL::text WHERE $1::bigint IS NULL",
            backlog: format!("SELECT count(*), NULL::float8 FROM {table} o WHERE {of_table}"),
        };
        let (pool, large) = db.pools();
        let own = |name: &str| own(&db.schema, name);
        let dialect = dialect(&own, spec, "place", "text", None, None);
        Outbox {
            name: spec.name.clone(),
            holds: HoldsSql::new(spec, &dialect),
            read_one: format!(
                "SELECT {} FROM {schema}.holds o WHERE {of_table} AND o.place = $1",
                list.replace("$5", "$2")
            ),
            read_replays: "SELECT NULL WHERE false AND $1::bigint IS NULL AND $2::int IS NULL".to_owned(),
            db: db.clone(),
            pool,
            large,
            place_is_int: false,
            clock: Clock::Millis,
            unreadable: spec.unreadable.clone(),
            columns: spec.columns.len(),
            payload_index: payload,
            max_payload: spec.max_payload as u64,
            lock_oid: 0,
            stays: false,
            kept: None,
            held_from: format!(
                "SELECT o.place FROM {schema}.holds o WHERE {of_table} AND o.place COLLATE \"C\" >= $1"
            ),
            sql,
        }
    }

    /// The places of held events from this one on.
    pub async fn held_from(&self, place: &Place) -> Result<Vec<Place>, Error> {
        let doing = "look for what is held";
        let places: Vec<String> = sqlx::query_scalar(AssertSqlSafe(self.held_from.as_str()))
            .bind(place.to_string())
            .fetch_all(&self.pool)
            .await
            .map_err(Error::sql(doing))?;
        Ok(places.into_iter().map(|place| Place::Text(place.into())).collect())
    }

    /// Commits holds together with the content of their events.
    pub(super) async fn hold_content(&self, holds: &[Hold], epoch: i64) -> Result<(), Error> {
        let doing = "hold events";
        let mut tx = self.begin(doing).await?;
        for hold in holds {
            let content = hold.content.as_deref();
            let unread = content.and_then(|event| event.unread_bytes).map(u64::cast_signed);
            sqlx::query(AssertSqlSafe(self.sql.hold.as_str()))
                .bind(hold.place.to_string())
                .bind(&hold.event_id)
                .bind(&hold.topic)
                .bind(hold.key.as_deref())
                .bind(hold.cause.state().as_str())
                .bind(hold.cause.as_str())
                .bind(&hold.reason)
                .bind(hold.attempts.cast_signed())
                .bind(content.and_then(|event| event.timestamp_ms))
                .bind(unread)
                .bind(content.map(|event| cells(event, self.columns)))
                .execute(&mut *tx)
                .await
                .map_err(Error::sql(doing))?;
        }
        self.fence(&mut tx, epoch, doing).await?;
        tx.commit().await.map_err(Error::sql(doing))
    }
}

fn cells(event: &Event, columns: usize) -> Vec<Option<&[u8]>> {
    let row: &Row = &event.row;
    (0..columns).map(|index| row.get(index)).collect()
}

const _: () = assert!(FIXED == 3, "place, timestamp and length come before the cells");
