//! A kept table in SQLite. Writers take turns, so a number is all that its frontier is.

use std::time::Duration;

use futures_util::TryStreamExt as _;
use sqlx::AssertSqlSafe;

use super::{
    super::{
        BACKLOG_CAP, Backlog, EXPIRED_AT_ONCE, Error, Found, Limits, TableSpec,
        holds::{RELEASED, SKIPPED},
        kept::{Ended, Looked},
        literal, quoted,
    },
    Outbox, Sqlite, json_texts,
};
use crate::source::kept::{Frontier, NotRuns, Recorded, Runs};

const READ: &str = "read the outbox";
const EXPIRE: &str = "delete what was published long ago";

/// The statements of a kept table.
#[derive(Debug)]
pub(super) struct KeptSql {
    frontier: String,
    read: String,
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
    /// The order column, and what a read selects.
    pub seq: &'a str,
    pub list: &'a str,
    /// The age of a row in seconds.
    pub age: &'a str,
    /// The condition that the lease is of the epoch `?2`.
    pub fence: &'a str,
}

/// Whether a number is in runs, as JSON.
fn within(number: &str, runs: &str) -> String {
    format!(
        "EXISTS (SELECT 1 FROM json_each({runs}) r \
           WHERE {number} BETWEEN json_extract(r.value, '$[0]') AND json_extract(r.value, '$[1]'))"
    )
}

/// The condition that a row is published, for what was written down.
pub(super) fn settled(db: &Sqlite, spec: &TableSpec, seq: &str) -> String {
    let (name, number) = (literal(&spec.name), format!("o.{seq}"));
    format!(
        "EXISTS (SELECT 1 FROM {watermarks} w WHERE w.table_name = {name} \
           AND NOT {open} AND ({number} <= w.upto OR {done})) \
         AND NOT EXISTS (SELECT 1 FROM {holds} h WHERE h.table_name = {name} AND h.place = CAST({number} AS TEXT))",
        watermarks = db.own("watermarks"),
        holds = db.own("holds"),
        open = within(&number, "w.open"),
        done = within(&number, "w.done"),
    )
}

impl KeptSql {
    pub fn new(db: &Sqlite, parts: &Parts<'_>) -> KeptSql {
        let Parts { spec, seq, list, age, fence } = parts;
        let (table, name) = (quoted(&spec.name), literal(&spec.name));
        let (watermarks, milestones) = (db.own("watermarks"), db.own("milestones"));
        let (holds, replays) = (db.own("holds"), db.own("replays"));
        let of_table = |alias: &str| format!("{alias}.table_name = {name}");
        let ended = format!("h.state IN ('{RELEASED}', '{SKIPPED}')");
        let held = |number: &str| {
            format!(
                "EXISTS (SELECT 1 FROM {holds} h WHERE {} AND h.place = CAST({number} AS TEXT)",
                of_table("h")
            )
        };
        let to_read = format!(
            "((o.{seq} > ?1 AND NOT {since}) OR (o.{seq} <= ?1 AND o.{seq} IN (SELECT value FROM json_each(?3)))) \
             AND NOT {held} AND h.state <> '{RELEASED}')",
            since = within(&format!("o.{seq}"), "?2"),
            held = held(&format!("o.{seq}")),
        );
        KeptSql {
            frontier: format!("SELECT w.upto, w.open, w.done FROM {watermarks} w WHERE {}", of_table("w")),
            read: format!("SELECT {list} FROM {table} o WHERE {to_read} ORDER BY o.{seq} LIMIT ?4"),
            settle: format!(
                "INSERT INTO {watermarks} (table_name, upto, open, done, at) \
                 SELECT {name}, ?1, ?3, ?4, unixepoch('subsec') WHERE {fence} \
                 ON CONFLICT (table_name) DO UPDATE SET upto = excluded.upto, open = excluded.open, \
                   done = excluded.done, at = excluded.at"
            ),
            ended_holds: format!(
                "SELECT h.place, h.state FROM {holds} h WHERE {} AND {ended}",
                of_table("h")
            ),
            forget_holds: format!(
                "DELETE FROM {holds} AS h WHERE {} AND {ended} \
                   AND h.place IN (SELECT value FROM json_each(?1)) AND {fence}",
                of_table("h")
            ),
            // Of what is held now it will not be known when it was published.
            milestone: format!(
                "INSERT INTO {milestones} (table_name, at, upto, open) \
                 SELECT {name}, unixepoch('subsec'), w.upto, (SELECT json_group_array(json(v)) FROM ( \
                   SELECT r.value AS v FROM json_each(w.open) r UNION ALL \
                   SELECT json_array(CAST(h.place AS INTEGER), CAST(h.place AS INTEGER)) FROM {holds} h WHERE {})) \
                 FROM {watermarks} w WHERE {} AND {fence} AND NOT EXISTS ( \
                   SELECT 1 FROM {milestones} m WHERE {} AND (m.at > w.at OR m.at > unixepoch('subsec') - ?1))",
                of_table("h"),
                of_table("w"),
                of_table("m"),
            ),
            past: format!(
                "SELECT m.at, m.upto, m.open FROM {milestones} m WHERE {} AND m.at <= unixepoch('subsec') - ?1 \
                 ORDER BY m.at DESC LIMIT 1",
                of_table("m")
            ),
            expire: format!(
                "DELETE FROM {table} WHERE {seq} IN (SELECT o.{seq} FROM {table} o WHERE o.{seq} <= ?1 \
                   AND NOT {open} AND NOT {held}) \
                   AND NOT EXISTS (SELECT 1 FROM {replays} r WHERE {of} AND r.place = CAST(o.{seq} AS TEXT)) \
                   ORDER BY o.{seq} LIMIT {EXPIRED_AT_ONCE}) AND {fence}",
                open = within(&format!("o.{seq}"), "?3"),
                held = held(&format!("o.{seq}")),
                of = of_table("r"),
            ),
            forget_milestones: format!(
                "DELETE FROM {milestones} AS m WHERE {} AND m.at <= ?1 AND {fence}",
                of_table("m")
            ),
            backlog: format!(
                "WITH whippet_waiting AS MATERIALIZED ( \
                   SELECT o.{seq} AS seq FROM {table} o WHERE {to_read} \
                   UNION SELECT CAST(h.place AS INTEGER) FROM {holds} h WHERE {of} AND h.state = '{RELEASED}' \
                   LIMIT ?4) \
                 SELECT (SELECT count(*) FROM whippet_waiting), \
                   (SELECT {age} FROM {table} o WHERE o.{seq} = (SELECT min(seq) FROM whippet_waiting))",
                of = of_table("h"),
            ),
        }
    }
}

fn numbers(runs: &Runs) -> String {
    runs.iter().collect::<serde_json::Value>().to_string()
}

impl Outbox {
    fn kept(&self) -> Result<&KeptSql, Error> {
        self.kept
            .as_ref()
            .ok_or_else(|| Error::Setup(format!("the rows of table {} are not kept", self.name)))
    }

    pub async fn frontier(&self) -> Result<Option<Recorded>, Error> {
        let doing = "read how far the table is published";
        let row: Option<(i64, String, String)> =
            sqlx::query_as(AssertSqlSafe(self.kept()?.frontier.as_str()))
                .fetch_optional(&self.pool)
                .await
                .map_err(Error::sql(doing))?;
        let Some((upto, open, done)) = row else { return Ok(None) };
        let runs = |text: &str| {
            Runs::from_json(text)
                .map_err(|error: NotRuns| Error::sql(doing)(sqlx::Error::Decode(Box::new(error))))
        };
        Ok(Some(Recorded { seen: None, upto, open: runs(&open)?, done: runs(&done)? }))
    }

    pub async fn read_kept(&self, frontier: &Frontier, limits: Limits) -> Result<Looked<Found>, Error> {
        let mut rows = sqlx::query(AssertSqlSafe(self.kept()?.read.as_str()))
            .bind(frontier.upto)
            .bind(frontier.since.json())
            .bind(numbers(&frontier.again))
            .bind(i64::try_from(limits.rows).unwrap_or(i64::MAX))
            .bind(i64::try_from(limits.inline_bytes).unwrap_or(i64::MAX))
            .fetch(&self.pool);
        let mut found = Vec::new();
        while let Some(row) = rows.try_next().await.map_err(Error::sql(READ))? {
            found.push(self.decode(&row).map_err(Error::sql(READ))?);
        }
        Ok(Looked { found, seen: None })
    }

    pub async fn settle(&self, recorded: &Recorded, epoch: i64) -> Result<(), Error> {
        let done = sqlx::query(AssertSqlSafe(self.kept()?.settle.as_str()))
            .bind(recorded.upto)
            .bind(epoch)
            .bind(recorded.open.json())
            .bind(recorded.done.json())
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
            .bind(json_texts(places))
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

    /// Deletes what the newest milestone of that time has.
    pub(super) async fn expire_kept(&self, kept: Duration, epoch: i64) -> Result<u64, Error> {
        let sql = self.kept()?;
        let past: Option<(f64, i64, String)> = sqlx::query_as(AssertSqlSafe(sql.past.as_str()))
            .bind(kept.as_secs_f64())
            .fetch_optional(&self.pool)
            .await
            .map_err(Error::sql(EXPIRE))?;
        let Some((at, upto, open)) = past else { return Ok(0) };
        let done = sqlx::query(AssertSqlSafe(sql.expire.as_str()))
            .bind(upto)
            .bind(epoch)
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
        let (rows, oldest_seconds): (i64, Option<f64>) =
            sqlx::query_as(AssertSqlSafe(self.kept()?.backlog.as_str()))
                .bind(frontier.upto)
                .bind(frontier.since.json())
                .bind(numbers(&frontier.again))
                .bind(i64::try_from(BACKLOG_CAP).unwrap_or(i64::MAX))
                .fetch_one(&self.pool)
                .await
                .map_err(Error::sql("count what waits"))?;
        Ok(Backlog { rows: rows.unsigned_abs(), oldest_seconds })
    }
}
