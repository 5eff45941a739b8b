//! The one writer of the spool. All requests that wait are one transaction, and one fsync; they are answered
//! after it.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use sqlx::{ConnectOptions as _, Connection as _, SqliteConnection, sqlite::SqliteConnectOptions};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    time::{Instant, MissedTickBehavior},
};
use tracing::{info, warn};

use super::{request::Event, spool::Refused};
use crate::{admin::metrics::Metrics, config::Ingest, source::database::Near};

/// What one transaction may have, unless a single request has more.
const GROUP_EVENTS: usize = 2_000;
const GROUP_BYTES: usize = 8 << 20;
/// How often sizes are measured and old ids forgotten, while nothing comes.
const HOUSEKEEPING_EVERY: Duration = Duration::from_secs(1);
/// Ids that are forgotten at once: more than are published between two times.
const FORGOTTEN_AT_ONCE: u32 = 50_000;
/// An id is remembered for each so many bytes of the spool, at most. The longest, with its topic, takes 1.3 KiB.
const BYTES_PER_ID: u64 = 2 << 10;
/// What is left free on the disk while the file would have to grow: the relay needs some to record what it published,
/// or a full disk would stay full.
const RESERVE: u64 = 16 << 20;
/// The same while there is room in the file: only its log may grow.
const RESERVE_OF_LOG: u64 = 8 << 20;

const INSERT: &str = "INSERT INTO ingest (id, given, topic, key, type, payload, headers) \
    VALUES (?1, 0, ?2, ?3, ?4, ?5, ?6)";
/// One that is in the spool, or was published lately, is not taken again.
const INSERT_GIVEN: &str = "INSERT INTO ingest (id, given, topic, key, type, payload, headers) \
    SELECT ?1, 1, ?2, ?3, ?4, ?5, ?6 \
    WHERE NOT EXISTS (SELECT 1 FROM ingest_published WHERE topic = ?2 AND id = ?1) \
    ON CONFLICT DO NOTHING";
const KNOWN: &str = "SELECT EXISTS (SELECT 1 FROM ingest WHERE topic = ?2 AND id = ?1 AND given) \
    OR EXISTS (SELECT 1 FROM ingest_published WHERE topic = ?2 AND id = ?1)";
/// What the file has in use, and what deleted rows left in it for the next ones.
const SIZE: &str = "SELECT (p.page_count - f.freelist_count) * s.page_size, f.freelist_count * s.page_size \
    FROM pragma_page_count p, pragma_freelist_count f, pragma_page_size s";
/// Ids past their time, and the oldest where there are too many; some at once.
const FORGET: [&str; 2] = [
    "DELETE FROM ingest_published WHERE n IN (SELECT n FROM ingest_published \
       WHERE at < unixepoch() - ?1 ORDER BY at LIMIT ?2)",
    "DELETE FROM ingest_published WHERE n IN (SELECT n FROM ingest_published \
       WHERE n <= (SELECT max(n) FROM ingest_published) - ?1 ORDER BY n LIMIT ?2)",
];
const REMEMBERED: &str = "SELECT coalesce(max(n) - min(n) + 1, 0) FROM ingest_published";

/// What one request brings.
pub(super) struct Job {
    pub events: Vec<Event>,
    pub bytes: usize,
    /// Events of it that were found to be known, and are not among the others any more.
    pub known: u64,
    /// What it may have in memory, until it is written.
    #[expect(dead_code, reason = "held, not used")]
    pub room: Option<OwnedSemaphorePermit>,
    pub answer: oneshot::Sender<Answer>,
}

/// What the caller of a job is told.
type Answer = Result<(), Refused>;

/// How full the spool is.
#[derive(Debug)]
pub(super) struct Gauge {
    used: AtomicU64,
    limit: u64,
}

impl Gauge {
    pub fn is_full(&self) -> bool {
        self.used.load(Ordering::Relaxed) >= self.limit
    }
}

pub(super) struct Writer {
    connection: SqliteConnection,
    options: SqliteConnectOptions,
    jobs: mpsc::Receiver<Job>,
    near: Near,
    gauge: Arc<Gauge>,
    folder: PathBuf,
    dedup: Duration,
    metrics: Arc<Metrics>,
    /// The last group failed: said once, not for each.
    failing: bool,
}

impl Writer {
    pub async fn new(
        connection: SqliteConnection,
        options: SqliteConnectOptions,
        jobs: mpsc::Receiver<Job>,
        near: Near,
        ingest: &Ingest,
        metrics: Arc<Metrics>,
    ) -> Result<Writer, sqlx::Error> {
        let limit = ingest.max_bytes as u64;
        metrics.ingest_spool_max_bytes.set(limit.cast_signed());
        let gauge = Arc::new(Gauge { used: AtomicU64::new(0), limit });
        let (folder, dedup) = (ingest.spool.clone(), ingest.dedup);
        let mut writer =
            Writer { connection, options, jobs, near, gauge, folder, dedup, metrics, failing: false };
        writer.measure().await?;
        Ok(writer)
    }

    pub fn gauge(&self) -> Arc<Gauge> {
        self.gauge.clone()
    }

    /// Writes until nobody can bring more.
    pub async fn run(mut self) {
        let mut tick = tokio::time::interval(HOUSEKEEPING_EVERY);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                job = self.jobs.recv() => match job {
                    Some(job) => self.write(job).await,
                    None => break,
                },
                _ = tick.tick() => self.keep_house().await,
            }
        }
        self.connection.close().await.ok();
    }

    /// Writes a job and all that wait behind it.
    async fn write(&mut self, first: Job) {
        let near = self.near.clone();
        let turn = near.turn.lock().await;
        // While it was another's turn, more may have come.
        let (mut events, mut bytes) = (first.events.len(), first.bytes);
        let mut group = vec![first];
        while events < GROUP_EVENTS && bytes < GROUP_BYTES {
            let Ok(job) = self.jobs.try_recv() else { break };
            events += job.events.len();
            bytes += job.bytes;
            group.push(job);
        }
        let answers = self.commit(&mut group).await;
        drop(turn);
        fail::fail_point!("ingest-committed", |_| std::process::abort());
        match answers.iter().find_map(|answer| answer.as_ref().err().filter(|why| **why != Refused::Full)) {
            None => {
                if std::mem::take(&mut self.failing) {
                    info!("the spool can be written to again");
                }
            }
            Some(refused) => {
                if !std::mem::replace(&mut self.failing, true) {
                    warn!(error = %refused, "events are refused");
                }
            }
        }
        if answers.iter().any(Result::is_ok) {
            near.committed.notify_one();
        }
        for (job, answer) in group.into_iter().zip(answers) {
            job.answer.send(answer).ok();
        }
    }

    /// One transaction, if the disk has room for it. Returns what each of the jobs is told.
    async fn commit(&mut self, group: &mut [Job]) -> Vec<Answer> {
        match self.try_to_commit(group).await {
            Ok(answers) => answers,
            Err(error) => {
                // A transaction that did not end ends with its connection.
                match self.options.connect().await {
                    Ok(connection) => self.connection = connection,
                    Err(error) => warn!(%error, "cannot open the spool again; will try again"),
                }
                vec![Err(refused(&error)); group.len()]
            }
        }
    }

    async fn try_to_commit(&mut self, group: &mut [Job]) -> Result<Vec<Answer>, sqlx::Error> {
        let size = self.size().await?;
        let free = free_bytes(&self.folder)?;
        let mut needed = bytes_of(group);
        if size.used + needed > self.gauge.limit || free < size.left_free_for(needed) {
            // What is known needs no room.
            self.leave_what_is_new(group).await?;
            needed = bytes_of(group);
        }
        if free < size.left_free_for(needed) {
            let full = Refused::Disk(format!("{} MiB are free, and some has to stay", free >> 20));
            let answer = |job: &Job| {
                if !job.events.is_empty() {
                    return Err(full.clone());
                }
                self.metrics.ingested_again(job.known);
                Ok(())
            };
            return Ok(group.iter().map(answer).collect());
        }
        self.insert(group, size.used).await
    }

    /// Takes the events out of the jobs whose ids are known.
    async fn leave_what_is_new(&mut self, group: &mut [Job]) -> Result<(), sqlx::Error> {
        for job in group {
            for event in std::mem::take(&mut job.events) {
                let question = sqlx::query_scalar(KNOWN).bind(&event.id).bind(&event.topic);
                if event.given && question.fetch_one(&mut self.connection).await? {
                    job.known += 1;
                } else {
                    job.events.push(event);
                }
            }
            job.bytes = job.events.iter().map(Event::bytes).sum();
        }
        Ok(())
    }

    async fn insert(&mut self, group: &mut [Job], mut used: u64) -> Result<Vec<Answer>, sqlx::Error> {
        let limit = self.gauge.limit;
        let begun = Instant::now();
        let mut transaction = self.connection.begin_with("BEGIN IMMEDIATE").await?;
        let mut answers = Vec::with_capacity(group.len());
        let (mut put, mut repeated) = (0, 0);
        for job in group {
            if !job.events.is_empty() && used + job.bytes as u64 > limit {
                answers.push(Err(Refused::Full));
                continue;
            }
            answers.push(Ok(()));
            used += job.bytes as u64;
            repeated += job.known;
            for event in &mut job.events {
                // Handed over, not copied: it may be large.
                let payload = event.payload.take().map(Vec::from);
                let insert = sqlx::query(if event.given { INSERT_GIVEN } else { INSERT })
                    .bind(&event.id)
                    .bind(&event.topic)
                    .bind(&event.key)
                    .bind(&event.kind)
                    .bind(payload)
                    .bind(&event.headers);
                match insert.execute(&mut *transaction).await?.rows_affected() {
                    0 => repeated += 1,
                    _ => put += 1,
                }
            }
        }
        transaction.commit().await?;
        self.metrics.ingested(put, begun.elapsed());
        self.metrics.ingested_again(repeated);
        // Nothing fits: the next ones need not be read.
        self.note(if answers.iter().any(Result::is_ok) { used } else { used.max(limit) });
        Ok(answers)
    }

    async fn keep_house(&mut self) {
        let near = self.near.clone();
        let _turn = near.turn.lock().await;
        if let Err(error) = self.forget().await {
            warn!(%error, "cannot forget old ids");
        }
        if let Err(error) = self.measure().await {
            warn!(%error, "cannot measure the spool");
        }
    }

    async fn measure(&mut self) -> Result<(), sqlx::Error> {
        let Size { used, .. } = self.size().await?;
        self.note(used);
        let remembered = sqlx::query_scalar(REMEMBERED).fetch_one(&mut self.connection).await?;
        self.metrics.ingest_remembered_ids.set(remembered);
        Ok(())
    }

    async fn size(&mut self) -> Result<Size, sqlx::Error> {
        let (used, free): (i64, i64) = sqlx::query_as(SIZE).fetch_one(&mut self.connection).await?;
        Ok(Size { used: used.unsigned_abs(), free: free.unsigned_abs() })
    }

    async fn forget(&mut self) -> Result<(), sqlx::Error> {
        let most = self.gauge.limit / BYTES_PER_ID;
        for (statement, limit) in FORGET.into_iter().zip([self.dedup.as_secs(), most]) {
            let statement = sqlx::query(statement).bind(limit.cast_signed()).bind(FORGOTTEN_AT_ONCE);
            statement.execute(&mut self.connection).await?;
        }
        Ok(())
    }

    fn note(&self, used: u64) {
        self.gauge.used.store(used, Ordering::Relaxed);
        self.metrics.ingest_spool_bytes.set(used.cast_signed());
    }
}

/// Bytes of the file.
struct Size {
    used: u64,
    /// Room in it.
    free: u64,
}

impl Size {
    /// What has to be free on the disk before so many bytes are written.
    fn left_free_for(&self, bytes: u64) -> u64 {
        match bytes <= self.free {
            true => RESERVE_OF_LOG + bytes,
            // To the log first, and then to its page.
            false => RESERVE + 2 * bytes,
        }
    }
}

fn bytes_of(group: &[Job]) -> u64 {
    group.iter().map(|job| job.bytes as u64).sum()
}

/// What an error of SQLite means for those who wait.
fn refused(error: &sqlx::Error) -> Refused {
    let code = error.as_database_error().and_then(|error| error.code()?.parse::<u32>().ok());
    // SQLITE_IOERR and SQLITE_FULL, whatever the upper byte says more.
    match code.map(|code| code & 0xff) {
        Some(10 | 13) => Refused::Disk(error.to_string()),
        _ => Refused::Failed(error.to_string()),
    }
}

/// What the disk has.
pub(super) fn free_bytes(folder: &Path) -> std::io::Result<u64> {
    let stat = rustix::fs::statvfs(folder)?;
    Ok(stat.f_bavail.saturating_mul(stat.f_frsize))
}
