//! A kept table in PostgreSQL. Rows are found by the number of their transaction: those that the
//! frontier's snapshot does not see have one from its `xmax` on, or one of those that were running. Both
//! are places of an index, so what is published costs nothing, and neither does a transaction that stays
//! open for hours.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use sqlx::{AssertSqlSafe, Postgres as Dialect, Row as _, postgres::PgArguments, query::Query};

use super::{
    super::{
        BACKLOG_CAP, Backlog, EXPIRED_AT_ONCE, Error, Found, Limits, TableSpec,
        holds::{FIXED, RELEASED, SKIPPED},
        kept::{Ended, Looked},
        literal, quoted, quoted_table,
    },
    Outbox, Postgres,
};
use crate::source::{
    kept::{Frontier, NotRuns, Recorded, Runs},
    log::{Snapshot, Unreadable},
};

const READ: &str = "read the outbox";
const EXPIRE: &str = "delete what was published long ago";

/// The number of this server: that of a copy which was restored elsewhere is another.
const SERVER: &str = "(SELECT system_identifier::text FROM pg_control_system())";

/// The statements of a kept table. What they have in common is bound as [`bound`] does.
#[derive(Debug)]
pub(super) struct KeptSql {
    frontier: String,
    read: String,
    strays: String,
    settle: String,
    ended_holds: String,
    forget_holds: String,
    milestone: String,
    past: String,
    expire: String,
    forget_milestones: String,
    backlog: String,
}

/// What the statements are made of.
pub(super) struct Parts<'a> {
    pub spec: &'a TableSpec,
    pub schema: &'a str,
    /// The order column, and what a read selects.
    pub seq: &'a str,
    pub list: &'a str,
    /// The age of a row in seconds.
    pub age: &'a str,
    /// The condition that the lease is of the epoch `$2`.
    pub fence: &'a str,
}

/// The condition that a row is published, for what was written down.
pub(super) fn settled(schema: &str, spec: &TableSpec, tx: &str, seq: &str) -> String {
    let name = literal(&spec.name);
    format!(
        "EXISTS (SELECT FROM {schema}.watermarks w WHERE w.table_name = {name} \
           AND NOT w.open @> o.{seq}::bigint AND (w.done @> o.{seq}::bigint \
             OR (o.{seq} <= w.upto AND pg_visible_in_snapshot(o.{tx}, w.snapshot)))) \
         AND NOT EXISTS (SELECT FROM {schema}.holds h WHERE h.table_name = {name} AND h.place = o.{seq}::text)"
    )
}

impl KeptSql {
    pub fn new(parts: &Parts<'_>, tx: &str) -> KeptSql {
        let Parts { spec, schema, seq, list, age, fence } = parts;
        let (table, name, tx) = (quoted_table(&spec.name), literal(&spec.name), quoted(tx));
        let unheld = |number: &str| {
            format!(
                "NOT EXISTS (SELECT FROM {schema}.holds h WHERE h.table_name = {name} \
                   AND h.place = {number}::text AND h.state <> '{RELEASED}')"
            )
        };
        let since = |number: &str| format!("(SELECT $2::text::int8multirange) @> {number}");
        // A row whose transaction is of the future came from another server: it is read once.
        let unseen = |more: &str| {
            format!(
                "SELECT o.{seq}::bigint AS seq FROM {table} o WHERE o.{tx} >= $3::text::xid8 \
                   AND o.{tx} < pg_snapshot_xmax(pg_current_snapshot()){more} \
                 UNION ALL \
                 SELECT o.{seq}::bigint FROM {table} o WHERE o.{tx} = ANY($4::text[]::xid8[]){more}"
            )
        };
        // Behind the number that was read to: what commits late, and what is to be read again.
        let late = format!(
            "whippet_late AS MATERIALIZED ( \
               SELECT n.seq FROM ( \
                 SELECT u.seq FROM ({unseen}) u WHERE NOT {since} \
                 UNION \
                 SELECT x.seq FROM (SELECT generate_series(lower(r), coalesce(upper(r) - 1, {max})) AS seq \
                   FROM unnest($5::text::int8multirange) r) a, \
                   LATERAL (SELECT a.seq FROM {table} o WHERE o.{seq} = a.seq LIMIT 1) x WHERE a.seq <= $1) n \
               WHERE {unheld} ORDER BY 1 LIMIT $6)",
            unseen = unseen(&format!(" AND o.{seq} <= $1")),
            since = since("u.seq"),
            unheld = unheld("n.seq"),
            max = i64::MAX,
        );
        // When the late rows alone fill the read, no row of the tail may come yet.
        let tail = |columns: &str| {
            format!(
                "(SELECT {columns} FROM {table} o WHERE o.{seq} > $1 AND NOT {since} AND {unheld} \
                    AND (SELECT count(*) FROM whippet_late) < $6 ORDER BY o.{seq} LIMIT $6)",
                since = since(&format!("o.{seq}::bigint")),
                unheld = unheld(&format!("o.{seq}")),
            )
        };
        let of_table = |alias: &str| format!("{alias}.table_name = {name}");
        let held = format!(
            "(SELECT range_agg(CASE h.place::bigint WHEN {max} THEN int8range({max}, NULL) \
                ELSE int8range(h.place::bigint, h.place::bigint + 1) END) \
              FROM {schema}.holds h WHERE {of})",
            max = i64::MAX,
            of = of_table("h"),
        );
        let ended = format!("state IN ('{RELEASED}', '{SKIPPED}')");
        KeptSql {
            frontier: format!(
                "SELECT w.snapshot::text, w.upto, w.open::text, w.done::text, w.server, {SERVER} \
                 FROM {schema}.watermarks w WHERE {}",
                of_table("w")
            ),
            read: format!(
                "WITH {late} SELECT {nothing}, pg_current_snapshot()::text \
                 UNION ALL SELECT x.*, NULL FROM whippet_late, LATERAL ( \
                   SELECT {list} FROM {table} o WHERE o.{seq} = whippet_late.seq LIMIT 1) x \
                 UNION ALL {tail}",
                nothing = vec!["NULL"; FIXED + spec.columns.len()].join(", "),
                tail = tail(&format!("{list}, NULL::text")),
            ),
            strays: format!(
                "SELECT pg_current_snapshot()::text, ARRAY(SELECT u.seq FROM ({unseen}) u \
                   WHERE NOT {since} AND {unheld} AND $1::bigint IS NOT NULL AND $5::text IS NOT NULL LIMIT $6)",
                unseen = unseen(""),
                since = since("u.seq"),
                unheld = unheld("u.seq"),
            ),
            settle: format!(
                "INSERT INTO {schema}.watermarks (table_name, server, snapshot, upto, open, done) \
                 SELECT {name}, {SERVER}, $1::text::pg_snapshot, $3, $4::text::int8multirange, \
                   $5::text::int8multirange WHERE {fence} \
                 ON CONFLICT (table_name) DO UPDATE SET snapshot = excluded.snapshot, upto = excluded.upto, \
                   open = excluded.open, done = excluded.done, at = excluded.at"
            ),
            ended_holds: format!(
                "SELECT h.place, h.state FROM {schema}.holds h WHERE {} AND h.{ended}",
                of_table("h")
            ),
            forget_holds: format!(
                "DELETE FROM {schema}.holds h WHERE {} AND h.{ended} AND h.place = ANY($1::text[]) AND {fence}",
                of_table("h")
            ),
            // Of what is held now it will not be known when it was published.
            milestone: format!(
                "INSERT INTO {schema}.milestones (table_name, snapshot, upto, open) \
                 SELECT {name}, w.snapshot, w.upto, w.open + coalesce({held}, '{{}}') \
                 FROM {schema}.watermarks w WHERE {} AND {fence} AND NOT EXISTS ( \
                   SELECT FROM {schema}.milestones m WHERE {} AND (m.at > w.at \
                     OR m.at > clock_timestamp() - make_interval(secs => $1)))",
                of_table("w"),
                of_table("m"),
            ),
            past: format!(
                "SELECT m.at::text, m.snapshot::text, m.upto, m.open::text \
                 FROM {schema}.milestones m WHERE {} AND m.at <= clock_timestamp() - make_interval(secs => $1) \
                 ORDER BY m.at DESC LIMIT 1",
                of_table("m")
            ),
            expire: format!(
                "DELETE FROM {table} o WHERE o.{seq} IN ( \
                   SELECT i.{seq} FROM {table} i WHERE i.{tx} < $1::text::xid8 AND i.{seq} <= $4 \
                     AND pg_visible_in_snapshot(i.{tx}, $3::text::pg_snapshot) \
                     AND NOT (SELECT $5::text::int8multirange) @> i.{seq}::bigint \
                     AND NOT EXISTS (SELECT FROM {schema}.holds h WHERE {} AND h.place = i.{seq}::text) \
                     AND NOT EXISTS (SELECT FROM {schema}.replays r WHERE {} AND r.place = i.{seq}::text) \
                   ORDER BY i.{tx} LIMIT {EXPIRED_AT_ONCE}) AND {fence}",
                of_table("h"),
                of_table("r"),
            ),
            forget_milestones: format!(
                "DELETE FROM {schema}.milestones m WHERE {} AND m.at <= $1::text::timestamptz AND {fence}",
                of_table("m")
            ),
            backlog: format!(
                "WITH {late}, whippet_waiting AS MATERIALIZED ( \
                   SELECT seq FROM whippet_late UNION SELECT h.place::bigint FROM {schema}.holds h \
                     WHERE {of} AND h.state = '{RELEASED}' UNION {tail}) \
                 SELECT (SELECT count(*) FROM (SELECT FROM whippet_waiting LIMIT {BACKLOG_CAP}) n), \
                   (SELECT {age} FROM {table} o WHERE o.{seq} = (SELECT min(seq) FROM whippet_waiting) LIMIT 1)",
                of = of_table("h"),
                tail = tail(&format!("o.{seq}::bigint")),
            ),
        }
    }
}

/// What is behind the frontier, as `$1` to `$5`, and `$6`: the most rows.
fn bound<'q>(sql: &'q str, frontier: &Frontier, most: usize) -> Query<'q, Dialect, PgArguments> {
    let seen = frontier.seen.as_ref();
    let running = seen.map_or(&[][..], Snapshot::running);
    sqlx::query(AssertSqlSafe(sql))
        .bind(frontier.upto)
        .bind(frontier.since.multirange())
        .bind(seen.map_or(0, Snapshot::xmax).to_string())
        .bind(running.iter().map(u64::to_string).collect::<Vec<_>>())
        .bind(frontier.again.multirange())
        .bind(i64::try_from(most).unwrap_or(i64::MAX))
}

/// What the relay itself has written, and cannot read.
fn garbled(error: impl std::error::Error + Send + Sync + 'static) -> sqlx::Error {
    sqlx::Error::Decode(Box::new(error))
}

fn snapshot(text: Option<&str>) -> Result<Option<Snapshot>, sqlx::Error> {
    text.map(str::parse).transpose().map_err(|error: Unreadable| garbled(error))
}

impl Outbox {
    fn kept(&self) -> Result<&KeptSql, Error> {
        self.kept
            .as_ref()
            .ok_or_else(|| Error::Setup(format!("the rows of table {} are not kept", self.name)))
    }

    pub async fn frontier(&self) -> Result<Option<Recorded>, Error> {
        let doing = "read how far the table is published";
        let row: Option<(Option<String>, i64, String, String, String, String)> =
            sqlx::query_as(AssertSqlSafe(self.kept()?.frontier.as_str()))
                .fetch_optional(&self.pool)
                .await
                .map_err(Error::sql(doing))?;
        let Some((seen, upto, open, done, server, here)) = row else { return Ok(None) };
        if server != here {
            return Err(Error::Setup(format!(
                "what is published of table {} was written down on another server ({server}, this is {here}), \
                 where transactions have other numbers: see \"Kept rows on another server\" in \
                 docs/operations.md",
                self.name
            )));
        }
        let runs = |text: &str| {
            Runs::from_multirange(text).map_err(|error: NotRuns| Error::sql(doing)(garbled(error)))
        };
        Ok(Some(Recorded {
            seen: snapshot(seen.as_deref()).map_err(Error::sql(doing))?,
            upto,
            open: runs(&open)?,
            done: runs(&done)?,
        }))
    }

    pub async fn read_kept(&self, frontier: &Frontier, limits: Limits) -> Result<Looked<Found>, Error> {
        let query = bound(&self.kept()?.read, frontier, limits.rows)
            .bind(i32::try_from(limits.inline_bytes).unwrap_or(i32::MAX));
        let mut looked = Looked { found: Vec::new(), seen: None };
        {
            let mut rows = query.fetch(&self.pool);
            while let Some(row) = rows.try_next().await.map_err(Error::sql(READ))? {
                let seen = row.try_get(FIXED + self.columns).map_err(Error::sql(READ))?;
                match snapshot(seen).map_err(Error::sql(READ))? {
                    None => looked.found.push(self.decode(&row).map_err(Error::sql(READ))?),
                    seen => looked.seen = seen,
                }
            }
        }
        looked.found.sort_by(|a, b| a.event.place.cmp(&b.event.place));
        Ok(looked)
    }

    pub async fn strays(&self, frontier: &Frontier, most: usize) -> Result<Looked<i64>, Error> {
        let doing = "look for rows that the log is yet to bring";
        let row = bound(&self.kept()?.strays, frontier, most)
            .fetch_one(&self.pool)
            .await
            .map_err(Error::sql(doing))?;
        let looked = || {
            let seen = snapshot(row.try_get(0)?)?;
            Ok(Looked { found: row.try_get(1)?, seen })
        };
        looked().map_err(Error::sql::<sqlx::Error>(doing))
    }

    pub async fn settle(&self, recorded: &Recorded, epoch: i64) -> Result<(), Error> {
        let done = sqlx::query(AssertSqlSafe(self.kept()?.settle.as_str()))
            .bind(recorded.seen.as_ref().map(ToString::to_string))
            .bind(epoch)
            .bind(recorded.upto)
            .bind(recorded.open.multirange())
            .bind(recorded.done.multirange())
            .execute(&self.pool)
            .await
            .map_err(Error::sql("record what was published"))?;
        if done.rows_affected() == 0 { Err(Error::Fenced(epoch)) } else { Ok(()) }
    }

    pub async fn ended_holds(&self) -> Result<Ended, Error> {
        let rows: Vec<(String, String)> = sqlx::query_as(AssertSqlSafe(self.kept()?.ended_holds.as_str()))
            .fetch_all(&self.pool)
            .await
            .map_err(Error::sql("look for what is released"))?;
        Ok(Ended::of(rows))
    }

    pub async fn forget_holds(&self, places: &[String], epoch: i64) -> Result<(), Error> {
        sqlx::query(AssertSqlSafe(self.kept()?.forget_holds.as_str()))
            .bind(places)
            .bind(epoch)
            .execute(&self.pool)
            .await
            .map_err(Error::sql("forget what was held"))?;
        Ok(())
    }

    pub async fn milestone(&self, apart: Duration, epoch: i64) -> Result<(), Error> {
        sqlx::query(AssertSqlSafe(self.kept()?.milestone.as_str()))
            .bind(apart.as_secs_f64())
            .bind(epoch)
            .execute(&self.pool)
            .await
            .map_err(Error::sql("note what is published now"))?;
        Ok(())
    }

    /// Deletes what the newest milestone of that time sees.
    pub(super) async fn expire_kept(&self, kept: Duration, epoch: i64) -> Result<u64, Error> {
        let sql = self.kept()?;
        let past: Option<(String, Option<String>, i64, String)> =
            sqlx::query_as(AssertSqlSafe(sql.past.as_str()))
                .bind(kept.as_secs_f64())
                .fetch_optional(&self.pool)
                .await
                .map_err(Error::sql(EXPIRE))?;
        let Some((at, seen, upto, open)) = past else { return Ok(0) };
        let xmax = snapshot(seen.as_deref()).map_err(Error::sql(EXPIRE))?.map(|seen| seen.xmax().to_string());
        let done = sqlx::query(AssertSqlSafe(sql.expire.as_str()))
            .bind(xmax)
            .bind(epoch)
            .bind(seen)
            .bind(upto)
            .bind(open)
            .execute(&self.pool)
            .await
            .map_err(Error::sql(EXPIRE))?;
        if done.rows_affected() < EXPIRED_AT_ONCE {
            sqlx::query(AssertSqlSafe(sql.forget_milestones.as_str()))
                .bind(at)
                .bind(epoch)
                .execute(&self.pool)
                .await
                .map_err(Error::sql(EXPIRE))?;
        }
        Ok(done.rows_affected())
    }

    pub(super) async fn backlog_kept(&self) -> Result<Backlog, Error> {
        let frontier = self.frontier().await?.map(Frontier::from).unwrap_or_default();
        let doing = "count what waits";
        let row = bound(&self.kept()?.backlog, &frontier, BACKLOG_CAP as usize)
            .fetch_one(&self.pool)
            .await
            .map_err(Error::sql(doing))?;
        let count = || Ok((row.try_get::<i64, _>(0)?, row.try_get(1)?));
        let (rows, oldest_seconds) = count().map_err(Error::sql::<sqlx::Error>(doing))?;
        Ok(Backlog { rows: rows.unsigned_abs(), oldest_seconds })
    }
}

/// The column that rows are kept by, as it is.
struct TxColumn {
    kind: String,
    not_null: bool,
    has_default: bool,
    indexed: bool,
}

impl Postgres {
    /// Whether the column that rows are kept by is what it has to be.
    pub(super) async fn check_tx(&self, spec: &TableSpec, oid: i64, tx: &str) -> Result<(), Error> {
        // One that is missing is told with all others.
        let Some(column) = self.tx_column(oid, tx).await? else { return Ok(()) };
        let wrong = match &column {
            TxColumn { kind, .. } if kind != "xid8" => format!("is of type {kind}"),
            TxColumn { not_null: false, .. } => "may be NULL".to_owned(),
            TxColumn { has_default: false, .. } => "has another default".to_owned(),
            TxColumn { indexed: false, .. } => "has no index".to_owned(),
            _ => return self.check_server(spec, tx).await,
        };
        Err(Error::Setup(format!(
            "column {tx} of table {table} {wrong}: after_publish: keep needs xid8 NOT NULL DEFAULT \
             pg_current_xact_id(), and an index on it, as `whippet sql` prints them",
            table = spec.name
        )))
    }

    /// The statements that mend what [`Postgres::check_tx`] refuses.
    pub(super) async fn mends_tx(&self, spec: &TableSpec, oid: i64, tx: &str) -> Result<String, Error> {
        let (table, column) = (quoted_table(&spec.name), quoted(tx));
        let Some(found) = self.tx_column(oid, tx).await? else { return Ok(String::new()) };
        let mut mends = Vec::new();
        if found.kind != "xid8" {
            mends.push(format!(
                "ALTER TABLE {table} ALTER COLUMN {column} DROP DEFAULT, \
                 ALTER COLUMN {column} TYPE xid8 USING pg_current_xact_id()"
            ));
        }
        if !found.has_default {
            mends.push(format!("ALTER TABLE {table} ALTER COLUMN {column} SET DEFAULT pg_current_xact_id()"));
        }
        if !found.not_null {
            mends.push(format!("UPDATE {table} SET {column} = pg_current_xact_id() WHERE {column} IS NULL"));
            mends.push(format!("ALTER TABLE {table} ALTER COLUMN {column} SET NOT NULL"));
        }
        if !found.indexed {
            mends.push(format!("CREATE INDEX ON {table} ({column})"));
        }
        if mends.is_empty() {
            // Rows of another server: all of them come again, and none is lost.
            let schema = quoted(&self.schema);
            mends.push(format!("UPDATE {table} SET {column} = pg_current_xact_id()"));
            mends.push(format!("DELETE FROM {schema}.watermarks WHERE table_name = {}", literal(&spec.name)));
        }
        Ok(mends.join(";\n"))
    }

    async fn tx_column(&self, oid: i64, tx: &str) -> Result<Option<TxColumn>, Error> {
        let found: Option<(String, bool, String, bool)> = sqlx::query_as(
            "SELECT format_type(a.atttypid, NULL), a.attnotnull, coalesce(pg_get_expr(d.adbin, d.adrelid), ''), \
               EXISTS (SELECT FROM pg_index i WHERE i.indrelid = a.attrelid AND i.indkey[0] = a.attnum \
                 AND i.indisvalid AND i.indpred IS NULL) \
             FROM pg_attribute a LEFT JOIN pg_attrdef d ON d.adrelid = a.attrelid AND d.adnum = a.attnum \
             WHERE a.attrelid = $1::bigint::oid AND a.attname = $2 AND NOT a.attisdropped",
        )
        .bind(oid)
        .bind(tx)
        .fetch_optional(&self.pool())
        .await
        .map_err(Error::sql("read the table's columns"))?;
        Ok(found.map(|(kind, not_null, default, indexed)| TxColumn {
            kind,
            not_null,
            has_default: default.contains("pg_current_xact_id()"),
            indexed,
        }))
    }

    /// Rows that came with a copy have numbers of another server's transactions.
    async fn check_server(&self, spec: &TableSpec, tx: &str) -> Result<(), Error> {
        let sql = format!(
            "SELECT EXISTS (SELECT FROM {} o WHERE o.{} >= pg_snapshot_xmax(pg_current_snapshot()))",
            quoted_table(&spec.name),
            quoted(tx)
        );
        let foreign: bool = sqlx::query_scalar(AssertSqlSafe(sql))
            .fetch_one(&self.pool())
            .await
            .map_err(Error::sql("look for rows of another server"))?;
        match foreign {
            false => Ok(()),
            true => Err(Error::Setup(format!(
                "table {} has rows whose {tx} this server has not reached: they came from another one. See \
                 \"Kept rows on another server\" in docs/operations.md",
                spec.name
            ))),
        }
    }
}
