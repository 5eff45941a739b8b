//! Holds, verbs and replays in PostgreSQL.

use std::{borrow::Cow, future::Future};

use futures_util::TryStreamExt as _;
use sqlx::{
    self as sql, AssertSqlSafe, Postgres, Row as _, Transaction,
    postgres::{PgArguments, PgPool, PgRow},
    query::Query,
};

use super::{
    super::{
        Error, Found, Limits, Listed, TableSpec, answered, ddl,
        holds::{
            APPLY, Dialect, FIXED, KEYS_AT_ONCE, OR_NOTHING, SHOWN_AT_MOST, count, delete, execute,
            execute_matching, hold_methods, matching, or_topic, scope_of, words_of,
        },
        literal, of_buckets, quoted, quoted_table,
    },
    Outbox,
    outbox::ranges,
};
use crate::{
    event::Replay,
    source::{
        ClosedKey, Gates,
        hold::{Counts, Filter, Held, Outcome, Over, Request, Verb, key_for_people},
    },
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
        lock: " FOR SHARE",
        contains_4: |column| format!("position($4 in {column}) > 0"),
        moment: |column| format!("to_char({column} AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.MS\"Z\"')"),
        age: |column| format!("extract(epoch FROM clock_timestamp() - {column})::float8"),
        outbox: quoted_table(&spec.name),
        seq: quoted(place),
        seq_text: format!("o.{}::text", quoted(place)),
        as_seq: Box::new(move |text| format!("{text}::{place_type}")),
        place_is_int: matches!(place_type, "bigint" | "integer" | "smallint"),
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
