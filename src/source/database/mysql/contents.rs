//! Events without a row: those of `rows: transient`. While they are held their content is in the relay's own table
//! `contents`; and when their hold is gone they are found there, and deleted when they are published, as rows are
//! in an outbox.

use sqlx::AssertSqlSafe;

use super::{
    super::{Error, Found, TableSpec},
    Mysql, Outbox,
    columns::Catalogue,
    sql::{self, Literal, Row, Tx, literal, quoted},
    statements::Of,
};
use crate::{
    config::AfterPublish,
    event::{self, Event, Place},
    source::{Hold, log::position::Position},
};

/// The event's columns, where the table has two: all but the payload, and the payload.
#[derive(Debug)]
pub(super) struct Contents {
    insert: String,
    append: String,
    from: String,
    /// Whether something was released and is not published yet.
    released: String,
}

impl Outbox {
    /// Of a table whose rows do not stay.
    pub(super) async fn of_contents(db: &Mysql, spec: &TableSpec) -> Result<Outbox, Error> {
        let name = format!("{}_contents", db.prefix);
        let columns = ["cells", "payload"].map(String::from).to_vec();
        let as_rows = TableSpec {
            columns,
            optional: Vec::new(),
            id: "place".into(),
            payload: "payload".into(),
            sequence: Some("place".into()),
            timestamps: vec!["at_ms".into()],
            published_at: None,
            after_publish: AfterPublish::Delete,
            retention: None,
            shared: None,
            ..spec.clone()
        };
        let catalogue =
            Catalogue::of(&db.pool(), &db.database, &TableSpec { name: name.clone(), ..as_rows.clone() })
                .await?;
        let (table, of_table) = (quoted(&name), format!("o.table_name = {}", literal(&spec.name)));
        let of = Of { table: table.clone(), only: format!(" AND {of_table}") };
        let mut outbox = Outbox::of(db, &as_rows, &catalogue, &of)?;
        outbox.columns = spec.columns.len();
        outbox.payload_index = spec.columns.iter().position(|name| *name == spec.payload);
        if let Some(rows) = spec.left_behind() {
            outbox.rows = Some(match Outbox::of_rows(db, &rows).await {
                Ok(rows) => Ok(Box::new(rows)),
                // It does without, but for replays.
                Err(Error::Setup(why) | Error::Refused { says: why, .. }) => Err(why),
                Err(error) => return Err(error),
            });
        }
        let its = format!("table_name = {} AND place = $1", literal(&spec.name));
        outbox.contents = Some(Contents {
            insert: format!(
                "INSERT INTO {table} (place, table_name, at_ms, cells, payload) VALUES ($1, {}, $2, $3, $4) \
                 ON DUPLICATE KEY UPDATE place = VALUES(place)",
                literal(&spec.name)
            ),
            append: format!("UPDATE {table} SET payload = CONCAT(payload, $2) WHERE {its}"),
            from: format!("SELECT o.place FROM {table} o WHERE {of_table} AND o.place >= $1"),
            released: format!(
                "SELECT EXISTS (SELECT 1 FROM {table} o WHERE {of_table} AND NOT EXISTS ( \
                   SELECT 1 FROM {} h WHERE h.table_name = o.table_name AND h.place = o.place))",
                db.own("holds")
            ),
        });
        Ok(outbox)
    }

    async fn of_rows(db: &Mysql, spec: &TableSpec) -> Result<Outbox, Error> {
        let catalogue = Catalogue::of(&db.pool(), &db.database, spec).await?;
        Outbox::new(db, spec, &catalogue)
    }

    /// Where published rows are, to be read again.
    pub fn rows(&self) -> Result<&Outbox, Error> {
        match &self.rows {
            None => Ok(self),
            Some(Ok(rows)) => Ok(rows),
            Some(Err(why)) => Err(Error::Setup(why.clone())),
        }
    }

    /// Whether every row that was committed by then is published or held: only from the log is it known. Without a time,
    /// by now, which is noted.
    pub async fn is_settled(&self, by: &mut Option<Position>) -> Result<bool, Error> {
        let (Some(contents), Some(rows)) = (&self.contents, &self.rows) else { return Ok(true) };
        if rows.is_err() {
            return Ok(false);
        }
        let by = match by {
            Some(by) => by,
            none => none.insert(self.db.log_now().await?.position),
        };
        if !self.db.stored().await?.is_some_and(|stored| stored.position.covers(by)) {
            return Ok(false);
        }
        let released: i64 = sql::query_scalar(AssertSqlSafe(&contents.released))
            .fetch_one(&self.pool)
            .await
            .map_err(Error::sql("look for what is released"))?;
        Ok(released == 0)
    }

    /// The places of events that are held or released, from this one on.
    pub async fn contents_from(&self, place: &Place) -> Result<Vec<Place>, Error> {
        let Some(contents) = &self.contents else { return Ok(Vec::new()) };
        let query = sql::query_as(AssertSqlSafe(&contents.from)).bind(place.to_string());
        let places: Vec<(String,)> =
            query.fetch_all(&self.pool).await.map_err(Error::sql("look for what is held"))?;
        Ok(places.into_iter().map(|(place,)| Place::Text(place.into())).collect())
    }

    /// Writes down what the events have, in the transaction that holds them.
    pub(super) async fn keep_contents(&self, tx: &mut Tx, holds: &[Hold]) -> Result<(), Error> {
        let Some(contents) = &self.contents else { return Ok(()) };
        let doing = "hold events";
        for hold in holds {
            let Some(event) = hold.content.as_deref() else { continue };
            let place = hold.place.to_string();
            let payload = self.payload_index.and_then(|index| event.row.get(index));
            // A statement has twice as many digits as bytes, and the server takes no more of it than of a value.
            let mut pieces = payload.unwrap_or_default().chunks(self.largest_piece());
            let first = payload.map(|_| pieces.next().unwrap_or_default());
            let insert = sql::query(AssertSqlSafe(&contents.insert))
                .bind(&place)
                .bind(event.timestamp_ms)
                .bind(pack(event, self.columns, self.payload_index))
                .bind(first.map_or(Literal::Null, Literal::from));
            let done = insert.execute(&mut **tx).await.map_err(Error::sql(doing))?;
            if done.rows_affected() == 0 {
                // It was there before.
                continue;
            }
            for piece in pieces {
                let append = sql::query(AssertSqlSafe(&contents.append)).bind(&place).bind(piece);
                append.execute(&mut **tx).await.map_err(Error::sql(doing))?;
            }
        }
        Ok(())
    }

    pub(super) fn decode_contents(&self, row: &Row) -> Result<Found, mysql_async::Error> {
        let place = Place::Text(row.try_get::<String>(0)?.into());
        let (timestamp_ms, length) = (row.try_get(1)?, row.try_get::<Option<u64>>(2)?);
        let (cells, payload) = (row.bytes(3).unwrap_or_default(), row.bytes(4));
        let (content, unread_bytes) =
            unpack(cells, payload, self.columns, self.payload_index).ok_or_else(|| {
                mysql_async::Error::Other("an unreadable event in the table of contents".into())
            })?;
        let deferred_bytes = length.filter(|_| payload.is_none());
        let event = Event { place, row: content, timestamp_ms, unread_bytes, replay: None };
        Ok(Found { event, deferred_bytes })
    }
}

/// The length of a value that is NULL.
const NULL: u32 = u32::MAX;

/// What an event has but for its payload: the length of one that was not read, and each column with its length.
fn pack(event: &Event, columns: usize, payload: Option<usize>) -> Vec<u8> {
    let mut cells = event.unread_bytes.unwrap_or(u64::MAX).to_le_bytes().to_vec();
    for index in 0..columns {
        match event.row.get(index).filter(|_| Some(index) != payload) {
            Some(value) => {
                cells.extend_from_slice(&(value.len() as u32).to_le_bytes());
                cells.extend_from_slice(value);
            }
            None => cells.extend_from_slice(&NULL.to_le_bytes()),
        }
    }
    cells
}

fn unpack(
    cells: &[u8],
    payload: Option<&[u8]>,
    columns: usize,
    payload_index: Option<usize>,
) -> Option<(event::Row, Option<u64>)> {
    let (unread, mut rest) = cells.split_first_chunk()?;
    let unread = u64::from_le_bytes(*unread);
    let mut row = event::Row::with_capacity(columns, cells.len() + payload.map_or(0, <[u8]>::len));
    // A column that was configured since then was NULL.
    for index in 0..columns {
        let mut value = None;
        if !rest.is_empty() {
            let (length, after) = rest.split_first_chunk()?;
            rest = after;
            let length = u32::from_le_bytes(*length);
            if length != NULL {
                let (content, after) = rest.split_at_checked(length as usize)?;
                (value, rest) = (Some(content), after);
            }
        }
        row.push(if Some(index) == payload_index { payload } else { value });
    }
    Some((row, Some(unread).filter(|unread| *unread != u64::MAX)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn an_event_comes_back_as_it_went(
            values in prop::collection::vec(prop::option::of(prop::collection::vec(any::<u8>(), 0..40)), 1..8),
            payload in any::<prop::sample::Index>(),
            unread in prop::option::of(0..u64::MAX),
        ) {
            let mut row = event::Row::with_capacity(values.len(), 0);
            values.iter().for_each(|value| row.push(value.as_deref()));
            let payload = Some(payload.index(values.len()));
            let event = Event { place: Place::Int(0), row, timestamp_ms: None, unread_bytes: unread, replay: None };
            let cells = pack(&event, values.len(), payload);
            let content = payload.and_then(|index| event.row.get(index));
            prop_assert_eq!(unpack(&cells, content, values.len(), payload), Some((event.row.clone(), unread)));
            for end in 0..cells.len() {
                let _ = unpack(&cells[..end], content, values.len(), payload);
            }
        }
    }
}
