//! The statements of the group ([`crate::coordinate`]), as all dialects take them: parameters `$1`, `$2`;
//! everything that differs is a field of [`Dialect`]. Each is a transaction of its own and locks rows of one
//! table only, for a moment: no relay that stops can hold another one up.

use std::collections::BTreeSet;

use super::Error;
use crate::coordinate::{Part, UNKNOWN, View};

/// What the dialects say differently.
pub(super) struct Dialect<'a> {
    /// Quoted name of one of the relay's own tables.
    pub own: &'a dyn Fn(&str) -> String,
    /// This moment, and so many microseconds later, on the server's clock.
    pub now: &'static str,
    pub later: fn(&str) -> String,
    /// Seconds until a moment.
    pub seconds_until: fn(&str) -> String,
    pub int: &'static str,
    pub text: &'static str,
    pub float: &'static str,
    /// What an INSERT ends with that may find its row there.
    pub or_nothing: &'static str,
    /// Passes rows by that somebody works behind; where writers take turns, nothing.
    pub skip_locked: &'static str,
}

#[derive(Debug)]
pub(super) struct GroupSql {
    cut: (String, &'static str),
    /// `$1`: the name of the process. Its older memberships end.
    pub leave_older: String,
    /// `$1` to `$3`: the name, microseconds, and the tables as a JSON list.
    pub join: String,
    /// `$1` to `$3`: the epoch, microseconds, and the tables, which may be others since.
    pub renew: String,
    /// Memberships that ran out. One whose relay is in the middle of a transaction ends after it.
    pub expired: String,
    /// `$1`: the epoch. Looks at no other member's row, which may be locked.
    pub sweep: String,
    /// Rows of (kind, number, epoch, name, seconds, tables), in one snapshot: parts with their turns, members and
    /// gates.
    pub look: String,
    /// `$1` to `$3`: the epoch, a part, and the turn that was seen.
    pub take: String,
    pub leave: String,
    /// `$1`, `$2`: the epoch, and one that is gone.
    pub inherit: String,
    /// `$1`: the epoch.
    pub leave_all: String,
    pub resign: String,
}

impl GroupSql {
    pub fn new(dialect: &Dialect<'_>) -> GroupSql {
        let own = dialect.own;
        let (members, parts, gates) = (own("members"), own("parts"), own("gates"));
        let Dialect { now, int, text, float, .. } = dialect;
        let later = (dialect.later)("$2");
        GroupSql {
            cut: (format!("INSERT INTO {parts} (part, epoch) VALUES "), dialect.or_nothing),
            leave_older: format!("DELETE FROM {members} WHERE owner = $1"),
            join: format!("INSERT INTO {members} (owner, expires_at, tables) VALUES ($1, {later}, $3)"),
            renew: format!(
                "UPDATE {members} SET expires_at = {later}, tables = $3 WHERE epoch = $1 AND expires_at > {now}"
            ),
            expired: format!("SELECT epoch FROM {members} WHERE expires_at <= {now}{}", dialect.skip_locked),
            sweep: format!("DELETE FROM {members} WHERE epoch = $1 AND expires_at <= {now}"),
            look: format!(
                "SELECT 'part', CAST(part AS {int}), epoch, CAST(turn AS {text}), CAST(NULL AS {float}), CAST(NULL AS {text}) FROM {parts} \
                 UNION ALL SELECT 'member', CAST(0 AS {int}), epoch, owner, CAST({left} AS {float}), tables FROM {members} \
                 UNION ALL SELECT 'gates', CAST(0 AS {int}), version, table_name, CAST(NULL AS {float}), CAST(NULL AS {text}) FROM {gates}",
                left = (dialect.seconds_until)("expires_at"),
            ),
            take: format!(
                "UPDATE {parts} SET epoch = $1, turn = turn + 1 WHERE part = $2 AND turn = $3 \
                 AND EXISTS (SELECT 1 FROM {members} m WHERE m.epoch = $1)"
            ),
            leave: format!(
                "UPDATE {parts} SET epoch = NULL, turn = turn + 1 WHERE part = $2 AND turn = $3 AND epoch = $1"
            ),
            // A number is never given twice: whoever is gone stays so.
            inherit: format!(
                "UPDATE {parts} SET epoch = $1, turn = turn + 1 WHERE epoch = $2 \
                 AND EXISTS (SELECT 1 FROM {members} m WHERE m.epoch = $1)"
            ),
            leave_all: format!("UPDATE {parts} SET epoch = NULL, turn = turn + 1 WHERE epoch = $1"),
            resign: format!("DELETE FROM {members} WHERE epoch = $1"),
        }
    }
}

impl GroupSql {
    /// Has parts begin that are not there yet: free, or of an owner that nobody knows any more.
    pub fn cut(&self, parts: &[Part], of_unknown: bool) -> String {
        let owner = if of_unknown { UNKNOWN.to_string() } else { "NULL".into() };
        let rows: Vec<String> = parts.iter().map(|part| format!("({}, {owner})", part.number())).collect();
        format!("{}{} {}", self.cut.0, rows.join(","), self.cut.1)
    }
}

/// What is not there yet of the parts that the work is cut into. Slots may come later: a relay takes those that it has
/// been told of, and whoever looks finds all. Those that a relay once had are there, however many are wanted now.
pub(super) fn missing(view: &View, buckets: u16, units: u16, used: &[Part]) -> Vec<Part> {
    let cut = [Part::Whole].into_iter().chain((0..buckets).map(Part::Bucket));
    let cut = cut.filter(|_| view.parts.keys().all(|part| part.is_slot()));
    let slots = (0..units).map(Part::Slot).chain(used.iter().copied());
    let slots: BTreeSet<Part> = slots.filter(|slot| !view.parts.contains_key(slot)).collect();
    cut.chain(slots).collect()
}

/// Relays that cut keys into different buckets would not agree on whose a key is.
pub(super) fn check_buckets(view: &View, buckets: u16) -> Result<(), Error> {
    match view.parts.keys().filter(|part| part.is_bucket()).count() {
        found if found == usize::from(buckets) => Ok(()),
        found => Err(Error::Setup(format!(
            "the work on this source is cut into {found} buckets and replicas.buckets says {buckets}: set it to {found}, \
             or stop every relay, empty the relay's own table `parts` and start them anew"
        ))),
    }
}

/// A share of the work is a share of all tables. Relays of two applications would each leave half of the
/// other's rows lying.
pub(super) fn check_tables(view: &View, tables: &BTreeSet<String>) -> Result<(), Error> {
    match view.members.iter().find(|member| member.tables.is_disjoint(tables)) {
        None => Ok(()),
        Some(other) => Err(Error::Setup(format!(
            "relay {} shares these own tables and relays others ({}): relays of another application need a \
             source.relay_schema of their own",
            other.owner,
            other.tables.iter().map(String::as_str).collect::<Vec<_>>().join(", "),
        ))),
    }
}

/// What a database does for the group: the same calls in all dialects, on different types. Where it is used,
/// `sql` is the driver. A type with a method `group_sql`, one `pool`, one `hold_off_older` and one `join`.
macro_rules! group_methods {
    ($database:ty) => {
        impl $database {
            /// Renews a membership, or begins one, and says how the group is.
            pub async fn attend(&self, attendance: Attendance<'_>) -> Result<Attended, Error> {
                let doing = "renew the lease";
                let Attendance { epoch, owner, length, buckets, units, tables } = attendance;
                let statements = self.group_sql();
                if !self.hold_off_older(length).await? {
                    return Ok(Attended::Older);
                }
                let micros = i64::try_from(length.as_micros()).unwrap_or(i64::MAX);
                let list = serde_json::json!(tables).to_string();
                let epoch = match epoch {
                    Some(epoch) => {
                        let renewed = sql::query(AssertSqlSafe(statements.renew.as_str()))
                            .bind(epoch)
                            .bind(micros)
                            .bind(list.as_str())
                            .execute(&self.pool())
                            .await
                            .map_err(Error::sql(doing))?;
                        if renewed.rows_affected() == 0 {
                            return Ok(Attended::Gone);
                        }
                        epoch
                    }
                    None => {
                        // Before it is counted as one who takes a share.
                        self.look_before(buckets, units, tables).await?;
                        sql::query(AssertSqlSafe(statements.leave_older.as_str()))
                            .bind(owner)
                            .execute(&self.pool())
                            .await
                            .map_err(Error::sql(doing))?;
                        self.join(&statements.join, owner, micros, &list).await?
                    }
                };
                let mut view = self.look().await?;
                if view.members.iter().any(|member| member.left.is_zero()) && self.sweep().await? {
                    view = self.look().await?;
                }
                check_buckets(&view, buckets)?;
                Ok(Attended::Member { epoch, view })
            }

            /// Whether there were any that could be ended.
            async fn sweep(&self) -> Result<bool, Error> {
                let doing = || Error::sql("end memberships that ran out");
                let statements = self.group_sql();
                let expired: Vec<i64> = sql::query_scalar(AssertSqlSafe(statements.expired.as_str()))
                    .fetch_all(&self.pool())
                    .await
                    .map_err(doing())?;
                for epoch in &expired {
                    sql::query(AssertSqlSafe(statements.sweep.as_str()))
                        .bind(*epoch)
                        .execute(&self.pool())
                        .await
                        .map_err(doing())?;
                }
                Ok(!expired.is_empty())
            }

            /// Cuts the work into parts, the first time; every relay has to have the same number of buckets.
            async fn look_before(
                &self,
                buckets: u16,
                units: u16,
                tables: &BTreeSet<String>,
            ) -> Result<(), Error> {
                let mut view = self.look().await?;
                let used = if units > 0 { self.used_slots().await? } else { Vec::new() };
                let missing = missing(&view, buckets, units, &used);
                if !missing.is_empty() {
                    // All in one statement: nobody sees some of them.
                    let cut = self.group_sql().cut(&missing, !used.is_empty());
                    sql::query(AssertSqlSafe(&*cut))
                        .execute(&self.pool())
                        .await
                        .map_err(Error::sql("cut the work into parts"))?;
                    view = self.look().await?;
                }
                check_tables(&view, tables)?;
                check_buckets(&view, buckets)
            }

            /// The group, in one snapshot.
            pub async fn look(&self) -> Result<View, Error> {
                type Row = (String, i64, Option<i64>, Option<String>, Option<f64>, Option<String>);
                let rows: Vec<Row> = sql::query_as(AssertSqlSafe(self.group_sql().look.as_str()))
                    .fetch_all(&self.pool())
                    .await
                    .map_err(Error::sql("look at the group"))?;
                let mut view = View::default();
                for (kind, number, epoch, name, seconds, tables) in rows {
                    match (kind.as_str(), epoch, name) {
                        ("part", by, turn) => {
                            let part = i32::try_from(number).ok().and_then(Part::of_number);
                            let turn = turn.and_then(|turn| turn.parse().ok()).unwrap_or_default();
                            view.parts.extend(part.map(|part| (part, Held { by, turn })));
                        }
                        ("member", Some(epoch), Some(owner)) => {
                            let left =
                                Duration::try_from_secs_f64(seconds.unwrap_or(0.0)).unwrap_or_default();
                            let tables =
                                serde_json::from_str(&tables.unwrap_or_default()).unwrap_or_default();
                            view.members.push(Member { epoch, owner, left, tables });
                        }
                        (_, Some(version), Some(table)) => {
                            view.gates.insert(table, version);
                        }
                        _ => {}
                    }
                }
                Ok(view)
            }

            /// Takes parts that are as they were seen. Returns those that it got.
            pub async fn take(&self, epoch: i64, parts: &[Seen]) -> Result<Vec<Part>, Error> {
                let statements = self.group_sql();
                let mut taken = Vec::new();
                for (part, seen) in parts {
                    let done = sql::query(AssertSqlSafe(statements.take.as_str()))
                        .bind(epoch)
                        .bind(part.number())
                        .bind(*seen)
                        .execute(&self.pool())
                        .await
                        .map_err(Error::sql("take a part of the work"))?;
                    if done.rows_affected() > 0 {
                        taken.push(*part);
                    }
                }
                Ok(taken)
            }

            pub async fn leave(&self, epoch: i64, parts: &[Seen]) -> Result<(), Error> {
                let statements = self.group_sql();
                for (part, seen) in parts {
                    sql::query(AssertSqlSafe(statements.leave.as_str()))
                        .bind(epoch)
                        .bind(part.number())
                        .bind(*seen)
                        .execute(&self.pool())
                        .await
                        .map_err(Error::sql("let a part of the work go"))?;
                }
                Ok(())
            }

            /// Takes everything that a member has left who is gone. Returns how many parts that were.
            pub async fn inherit(&self, epoch: i64, gone: i64) -> Result<u64, Error> {
                let done = sql::query(AssertSqlSafe(self.group_sql().inherit.as_str()))
                    .bind(epoch)
                    .bind(gone)
                    .execute(&self.pool())
                    .await
                    .map_err(Error::sql("inherit the work of a relay that is gone"))?;
                Ok(done.rows_affected())
            }

            /// Lets everything go.
            pub async fn leave_all(&self, epoch: i64) -> Result<(), Error> {
                sql::query(AssertSqlSafe(self.group_sql().leave_all.as_str()))
                    .bind(epoch)
                    .execute(&self.pool())
                    .await
                    .map(drop)
                    .map_err(Error::sql("let the work go"))
            }

            /// Gives the membership up, so that others need not wait.
            pub async fn resign(&self, epoch: i64) -> Result<(), Error> {
                sql::query(AssertSqlSafe(self.group_sql().resign.as_str()))
                    .bind(epoch)
                    .execute(&self.pool())
                    .await
                    .map(drop)
                    .map_err(Error::sql("give the lease up"))
            }
        }
    };
}
pub(super) use group_methods;
