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
    /// What it may have in memory, until it is written.
    #[expect(dead_code, reason = "held, not used")]
    pub room: Option<OwnedSemaphorePermit>,
    pub answer: oneshot::Sender<Result<(), Refused>>,
}

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
        let written = self.commit(&mut group, bytes as u64).await;
        drop(turn);
        fail::fail_point!("ingest-committed", |_| std::process::abort());
        match written {
            Ok(fits) => {
                if std::mem::take(&mut self.failing) {
                    info!("the spool can be written to again");
                }
                near.committed.notify_one();
                for (job, fits) in group.into_iter().zip(fits) {
                    job.answer.send(if fits { Ok(()) } else { Err(Refused::Full) }).ok();
                }
            }
            Err(refused) => {
                if !std::mem::replace(&mut self.failing, true) {
                    warn!(error = %refused, "events are refused");
                }
                for job in group {
                    job.answer.send(Err(refused.clone())).ok();
                }
            }
        }
    }

    /// One transaction, if the disk has room for it. Returns which of the jobs fitted in.
    async fn commit(&mut self, group: &mut [Job], bytes: u64) -> Result<Vec<bool>, Refused> {
        let written = async {
            let size = self.size().await?;
            let needed = match bytes <= size.free {
                true => RESERVE_OF_LOG + bytes,
                // To the log first, and then to its page.
                false => RESERVE + 2 * bytes,
            };
            let free = free_bytes(&self.folder)?;
            if free < needed {
                return Ok(Err(Refused::Disk(format!("{} MiB are free, and some has to stay", free >> 20))));
            }
            self.insert(group, size.used).await.map(Ok)
        };
        match written.await {
            Ok(written) => written,
            Err(error) => {
                // A transaction that did not end ends with its connection.
                match self.options.connect().await {
                    Ok(connection) => self.connection = connection,
                    Err(error) => warn!(%error, "cannot open the spool again; will try again"),
                }
                Err(refused(&error))
            }
        }
    }

    async fn insert(&mut self, group: &mut [Job], mut used: u64) -> Result<Vec<bool>, sqlx::Error> {
        let limit = self.gauge.limit;
        let begun = Instant::now();
        let mut transaction = self.connection.begin_with("BEGIN IMMEDIATE").await?;
        let mut fits = Vec::with_capacity(group.len());
        let (mut put, mut repeated) = (0, 0);
        for job in group {
            let room = used + job.bytes as u64 <= limit;
            fits.push(room);
            if !room {
                continue;
            }
            used += job.bytes as u64;
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
        self.metrics.ingested(put, repeated, begun.elapsed());
        // Nothing fits: the next ones need not be read.
        self.note(if fits.contains(&true) { used } else { used.max(limit) });
        Ok(fits)
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
