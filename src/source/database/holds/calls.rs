//! What an outbox does with holds. The drivers have no type in common, so the calls are macros: where they are used,
//! `sql` is the driver.

pub(in crate::source::database) const APPLY: &str = "carry out an operator's verb";
/// Parked keys that one piece of their list has.
pub(in crate::source::database) const KEYS_AT_ONCE: usize = 2_000;
/// A payload above this is not shown, in bytes.
pub(in crate::source::database) const SHOWN_AT_MOST: i16 = 32_000;

/// Binds what a filter asks for as `$1` to `$4`.
macro_rules! matching {
    ($query:expr, $filter:expr) => {
        $query
            .bind($filter.id.as_deref())
            .bind($filter.key.as_deref())
            .bind($filter.topic.as_deref())
            .bind($filter.reason.as_deref())
    };
}

/// Rows that a statement changed.
macro_rules! execute {
    ($tx:expr, $sql:expr $(, $value:expr)*) => {
        sql::query(AssertSqlSafe($sql.as_str()))
            $(.bind($value))*
            .execute(&mut *$tx)
            .await
            .map_err(Error::sql(APPLY))?
            .rows_affected()
    };
}

macro_rules! execute_matching {
    ($tx:expr, $sql:expr, $filter:expr) => {
        matching!(sql::query(AssertSqlSafe($sql.as_str())), $filter)
            .execute(&mut *$tx)
            .await
            .map_err(Error::sql(APPLY))?
            .rows_affected()
    };
}

macro_rules! count {
    ($tx:expr, $sql:expr, $filter:expr) => {{
        let count: i64 = matching!(sql::query_scalar(AssertSqlSafe($sql.as_str())), $filter)
            .fetch_one(&mut *$tx)
            .await
            .map_err(Error::sql(APPLY))?;
        count.unsigned_abs()
    }};
}
pub(in crate::source::database) use {count, execute, execute_matching, matching};

/// The same calls in all dialects, on different types.
macro_rules! hold_methods {
    (transaction: $tx:ty, row: $row:ty, error: $error:ty, begin: $begin:path, inline: $inline:ty, ids: $ids:path) => {
        const _: () = {
            use std::borrow::Cow;

            use futures_util::TryStreamExt as _;
            use sqlx::AssertSqlSafe;

            use $crate::{
                event::Replay,
                source::{
                    ClosedKey, Gates,
                    database::{
                        Error, Found, Limits, Listed, answered,
                        holds::{
                            APPLY, FIXED, KEYS_AT_ONCE, SHOWN_AT_MOST, count, execute, execute_matching, matching,
                            scope_of, words_of,
                        },
                        of_buckets,
                    },
                    hold::{Counts, Filter, Held, Outcome, Over, Request, Verb, key_for_people},
                },
            };

            impl Outbox {
                /// Hands the closed keys to `piece`, some at a time, then returns the rest of the gates.
                pub async fn gates<F: Future<Output = ()>>(
                    &self,
                    mut piece: impl FnMut(Vec<ClosedKey>) -> F,
                ) -> Result<Listed, Error> {
                    let read = || Error::sql("read what is held");
                    for statement in &self.holds.adopt {
                        sql::query(AssertSqlSafe(statement.as_str())).execute(&self.pool).await.map_err(read())?;
                    }
                    // Before the list: what changes meanwhile is no part of it.
                    sql::query(AssertSqlSafe(self.holds.make_gates.as_str()))
                        .execute(&self.pool)
                        .await
                        .map_err(read())?;
                    let version: i64 = sql::query_scalar(AssertSqlSafe(self.holds.version.as_str()))
                        .fetch_one(&self.pool)
                        .await
                        .map_err(read())?;
                    {
                        let closed_keys = sql::query_as(AssertSqlSafe(self.holds.closed_keys.as_str()));
                        let mut rows = closed_keys.fetch(&self.pool);
                        let mut keys: Vec<ClosedKey> = Vec::new();
                        while let Some(key) =
                            answered("read what is held", async { rows.try_next().await.map_err(read()) }).await?
                        {
                            keys.push(key);
                            if keys.len() == KEYS_AT_ONCE {
                                piece(std::mem::take(&mut keys)).await;
                            }
                        }
                        piece(keys).await;
                    }
                    let mut held = Counts::default();
                    let counts: Vec<(String, i64)> = sql::query_as(AssertSqlSafe(self.holds.counts.as_str()))
                        .fetch_all(&self.pool)
                        .await
                        .map_err(read())?;
                    for (cause, events) in counts {
                        held.add(Counts::named(&cause, events.unsigned_abs()));
                    }
                    let topics = sql::query_scalar(AssertSqlSafe(self.holds.held_topics.as_str()))
                        .fetch_all(&self.pool)
                        .await
                        .map_err(read())?;
                    let pauses = sql::query_as(AssertSqlSafe(self.holds.pauses.as_str()));
                    let paused: Vec<(String, String, Vec<u8>)> =
                        pauses.fetch_all(&self.pool).await.map_err(read())?;
                    let paused = paused.into_iter().map(|(scope, topic, key)| scope_of(&scope, topic, key)).collect();
                    let replays: i64 = sql::query_scalar(AssertSqlSafe(self.holds.has_replays.as_str()))
                        .fetch_one(&self.pool)
                        .await
                        .map_err(read())?;
                    let gates = Gates { paused, topics, held };
                    Ok(Listed { gates, replays: replays.unsigned_abs(), version })
                }

                /// Held events, the oldest first.
                pub async fn list(&self, filter: &Filter, limit: i64) -> Result<Vec<Held>, Error> {
                    let doing = "list what is held";
                    let rows = matching!(sql::query(AssertSqlSafe(self.holds.list.as_str())), filter)
                        .bind(limit)
                        .fetch_all(&self.pool)
                        .await
                        .map_err(Error::sql(doing))?;
                    rows.iter().map(|row| self.held(row)).collect::<Result<_, _>>().map_err(Error::sql(doing))
                }

                fn held(&self, row: &$row) -> Result<Held, $error> {
                    let (key, key_hex) = key_for_people(row.try_get(3)?);
                    Ok(Held {
                        table: self.name.clone(),
                        place: row.try_get(0)?,
                        id: row.try_get(1)?,
                        topic: row.try_get(2)?,
                        key,
                        key_hex,
                        state: row.try_get(4)?,
                        cause: row.try_get(5)?,
                        reason: row.try_get(6)?,
                        attempts: row.try_get(7)?,
                        since: row.try_get(8)?,
                        age_seconds: row.try_get(9)?,
                        payload: None,
                    })
                }

                /// How long the oldest parked event has been parked, in seconds.
                pub async fn oldest_parked(&self) -> Result<Option<f64>, Error> {
                    sql::query_scalar(AssertSqlSafe(self.holds.oldest_parked.as_str()))
                        .fetch_one(&self.pool)
                        .await
                        .map_err(Error::sql("look for the oldest parked event"))
                }

                /// Releases what is held for a trouble that is over, if the lease is still of this epoch.
                pub async fn release(&self, over: &Over, epoch: i64) -> Result<u64, Error> {
                    let doing = "release what was held";
                    let mut tx = self.begin(doing).await?;
                    execute!(tx, &self.holds.bump);
                    let release = match over {
                        Over::Topic(topic) => {
                            sql::query(AssertSqlSafe(self.holds.release_topic.as_str())).bind(topic.as_str())
                        }
                        Over::Store => sql::query(AssertSqlSafe(self.holds.release_store.as_str())),
                    };
                    let done = release.execute(&mut *tx).await.map_err(Error::sql(doing))?;
                    self.fence(&mut tx, epoch, doing).await?;
                    tx.commit().await.map_err(Error::sql(doing))?;
                    Ok(done.rows_affected())
                }

                /// Carries out a verb with its line in the audit log, in one transaction, if the lease is still of
                /// this epoch. A dry run is rolled back.
                pub async fn apply(&self, request: &Request, epoch: i64) -> Result<Outcome, Error> {
                    let mut tx = self.begin(APPLY).await?;
                    execute!(tx, &self.holds.bump);
                    let outcome = match &request.verb {
                        Verb::Pause(scope) | Verb::Resume(scope) => {
                            let (word, topic, key) = words_of(scope);
                            let pausing = matches!(request.verb, Verb::Pause(_));
                            let sql = if pausing { &self.holds.pause } else { &self.holds.resume };
                            let changed = execute!(tx, sql, word, topic, key);
                            let events = match pausing {
                                true => 0,
                                false => execute!(tx, &self.holds.release_paused, word, topic, key),
                            };
                            Outcome { keys: changed, events }
                        }
                        Verb::Redrive(filter) => {
                            let keys = count!(tx, &self.holds.count_redriven_keys, filter);
                            let events = execute_matching!(tx, &self.holds.redrive, filter);
                            Outcome { keys, events }
                        }
                        Verb::Skip(filter) => {
                            let keys = count!(tx, &self.holds.count_skipped_keys, filter);
                            let skipped = sql::query_scalar(AssertSqlSafe(self.holds.skipped_places.as_str()));
                            let places: Vec<String> = matching!(skipped, filter)
                                .fetch_all(&mut *tx)
                                .await
                                .map_err(Error::sql(APPLY))?;
                            self.settle_in(&mut tx, &places, epoch).await?;
                            let events = execute_matching!(tx, &self.holds.skip, filter);
                            execute!(tx, &self.holds.release_orphans);
                            Outcome { keys, events }
                        }
                        Verb::Replay(replay) => {
                            let Some(sql) = &self.holds.replay else {
                                return Err(Error::Setup(
                                    "this table does not keep what is published so that it can be read again: replay needs after_publish: mark \
                                     or keep"
                                        .into(),
                                ));
                            };
                            if replay.times.is_some() && !self.holds.replays_by_time {
                                return Err(Error::Setup(
                                    "kept rows do not have the time of their publishing: give numbers or ids".into(),
                                ));
                            }
                            if replay.sequences.is_some() && !self.holds.replays_by_number {
                                return Err(Error::Setup("this table has no order column: give ids, or times".into()));
                            }
                            let (sequences, times) = (replay.sequences.unzip(), replay.times.unzip());
                            let done = sql::query(AssertSqlSafe(sql.as_str()))
                                .bind(sequences.0)
                                .bind(sequences.1)
                                .bind(times.0)
                                .bind(times.1)
                                .bind($ids(&replay.ids))
                                .bind(replay.topic.as_deref())
                                .execute(&mut *tx)
                                .await
                                .map_err(Error::sql(APPLY))?;
                            Outcome { keys: 0, events: done.rows_affected() }
                        }
                    };
                    if !request.dry_run {
                        sql::query(AssertSqlSafe(self.holds.audit.as_str()))
                            .bind(request.who.as_str())
                            .bind(request.verb.name())
                            .bind(request.verb.describe())
                            .bind(request.why.as_deref())
                            .bind(outcome.keys.cast_signed())
                            .bind(outcome.events.cast_signed())
                            .execute(&mut *tx)
                            .await
                            .map_err(Error::sql("write the audit log"))?;
                    }
                    self.fence(&mut tx, epoch, APPLY).await?;
                    if request.dry_run {
                        tx.rollback().await.map_err(Error::sql(APPLY))?;
                        return Ok(outcome);
                    }
                    fail::fail_point!("mid-redrive", |_| std::process::abort());
                    tx.commit().await.map_err(Error::sql(APPLY))?;
                    fail::fail_point!("redriven", |_| std::process::abort());
                    Ok(outcome)
                }

                /// The payload of a row for a person to read.
                pub async fn payload_text(&self, place: &str) -> Result<String, Error> {
                    let Some(found) = self.one(place).await? else { return Ok("(the row is gone)".into()) };
                    if let Some(bytes) = found.deferred_bytes.or(found.event.unread_bytes) {
                        return Ok(format!("({bytes} bytes: too large to be shown)"));
                    }
                    let payload = self.payload_index.and_then(|index| found.event.row.get(index));
                    let (text, hex) = key_for_people(payload.map(<[u8]>::to_vec));
                    Ok(hex.map(|hex| format!("0x{hex}")).or(text).unwrap_or_else(|| "(NULL)".into()))
                }

                /// A row by the text of its place, without its payload if that is large; `None` where it is gone.
                pub async fn one(&self, place: &str) -> Result<Option<Found>, Error> {
                    let doing = "read a row";
                    let row = sql::query(AssertSqlSafe(self.read_one.as_str()))
                        .bind(place)
                        .bind(<$inline>::from(SHOWN_AT_MOST))
                        .fetch_optional(&self.pool)
                        .await
                        .map_err(Error::sql(doing))?;
                    row.map(|row| self.decode(&row).map_err(Error::sql(doing))).transpose()
                }

                /// Published rows that are to be published again, in order. Forgets those that are gone.
                pub async fn replays(&self, limits: Limits, buckets: Option<&[u16]>) -> Result<Vec<Found>, Error> {
                    let doing = "read what is to be replayed";
                    let text = self.of_buckets(&self.read_replays, buckets);
                    let rows = sql::query(AssertSqlSafe(&*text))
                        .bind(i64::try_from(limits.rows).unwrap_or(i64::MAX))
                        .bind(<$inline>::try_from(limits.inline_bytes).unwrap_or(<$inline>::MAX))
                        .fetch_all(&self.pool)
                        .await
                        .map_err(Error::sql(doing))?;
                    if rows.is_empty() {
                        sql::query(AssertSqlSafe(self.holds.forget_replays.as_str()))
                            .execute(&self.pool)
                            .await
                            .map_err(Error::sql(doing))?;
                    }
                    let found = |row: &$row| -> Result<Found, $error> {
                        let mut found = self.decode(row)?;
                        let behind = FIXED + self.columns;
                        let replay = Replay { topic: row.try_get(behind)?, requested: row.try_get(behind + 1)? };
                        found.event.replay = Some(Box::new(replay));
                        Ok(found)
                    };
                    rows.iter().map(found).collect::<Result<_, _>>().map_err(Error::sql(doing))
                }

                /// A statement about these buckets only, if not about all.
                pub(super) fn of_buckets<'a>(&self, statement: &'a str, buckets: Option<&[u16]>) -> Cow<'a, str> {
                    match (&self.holds.bucket, buckets) {
                        (Some(bucket), Some(buckets)) => Cow::Owned(of_buckets(statement, bucket, buckets)),
                        _ => Cow::Borrowed(statement),
                    }
                }

                pub(super) async fn begin(&self, doing: &'static str) -> Result<$tx, Error> {
                    $begin(&self.pool).await.map_err(Error::sql(doing))
                }

                /// The lease is of this epoch, and stays so until the transaction ends. The last statement of each: what
                /// a transaction waits for, or works on for long, must not keep the lease from being renewed.
                pub(super) async fn fence(&self, tx: &mut $tx, epoch: i64, doing: &'static str) -> Result<(), Error> {
                    let current: Option<i64> = sql::query_scalar(AssertSqlSafe(self.holds.fence.as_str()))
                        .bind(epoch)
                        .fetch_optional(&mut **tx)
                        .await
                        .map_err(Error::sql(doing))?;
                    if current == Some(epoch) { Ok(()) } else { Err(Error::Fenced(epoch)) }
                }
            }
        };
    };
}
pub(in crate::source::database) use hold_methods;
