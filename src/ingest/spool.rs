//! The spool: a folder with an SQLite file, and the lock of the one process that uses it.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, bail};
use sqlx::{
    AssertSqlSafe, ConnectOptions as _, SqliteConnection,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use tokio::{
    sync::{OwnedSemaphorePermit, mpsc, oneshot},
    task::JoinHandle,
};

use super::{
    request::Event,
    writer::{Gauge, Job, Writer},
};
use crate::{
    admin::metrics::Metrics,
    config::{INGEST, Ingest},
    source::database::{Database, Near, Sqlite},
};

const FILE: &str = "ingest.db";
const LOCK: &str = "lock";
/// The form of the tables below; a later one will know how to come from this one.
const VERSION: i64 = 1;
/// Requests that wait for the writer; each connection has one at a time.
const WAITING: usize = 1024;

/// The spool's own tables. A published row leaves its id behind, where its caller gave it.
const TABLES: [&str; 5] = [
    "CREATE TABLE IF NOT EXISTS ingest (
  seq INTEGER PRIMARY KEY AUTOINCREMENT,
  id TEXT NOT NULL,
  given INTEGER NOT NULL,
  topic TEXT NOT NULL,
  key TEXT,
  type TEXT,
  payload BLOB,
  headers TEXT,
  created_at TEXT NOT NULL DEFAULT (strftime('%Y-%m-%dT%H:%M:%fZ'))
)",
    "CREATE UNIQUE INDEX IF NOT EXISTS ingest_given ON ingest (topic, id) WHERE given",
    "CREATE TABLE IF NOT EXISTS ingest_published (
  n INTEGER PRIMARY KEY AUTOINCREMENT,
  topic TEXT NOT NULL,
  id TEXT NOT NULL,
  at INTEGER NOT NULL,
  UNIQUE (topic, id)
)",
    "CREATE INDEX IF NOT EXISTS ingest_published_at ON ingest_published (at)",
    "CREATE TRIGGER IF NOT EXISTS ingest_remember AFTER DELETE ON ingest WHEN old.given BEGIN
  INSERT OR REPLACE INTO ingest_published (topic, id, at) VALUES (old.topic, old.id, unixepoch());
END",
];

/// Why events were not put into the spool.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error(
        "the spool is full (ingest.max_bytes): it is relayed more slowly than events come, or not at all"
    )]
    Full,
    #[error("the disk of the spool takes no more: {0}")]
    Disk(String),
    #[error("the spool cannot be written to: {0}")]
    Failed(String),
    #[error("the relay is stopping")]
    Stopping,
}

/// A spool that is ours, and not written to yet.
pub struct Spool {
    writer: Writer,
    jobs: mpsc::Sender<Job>,
    /// For the relay, which reads and deletes.
    pub database: Database,
    relays: Sqlite,
    /// Ends with us.
    lock: File,
}

/// Where events are put into the spool.
#[derive(Clone)]
pub struct Intake {
    jobs: mpsc::Sender<Job>,
    gauge: Arc<Gauge>,
}

impl Spool {
    /// Opens the spool, as it was left, or makes it; and takes it for this process alone.
    pub async fn open(ingest: &Ingest, metrics: Arc<Metrics>) -> anyhow::Result<Spool> {
        let folder = &ingest.spool;
        let shown = folder.display();
        make(folder).with_context(|| format!("ingest.spool {shown}"))?;
        let lock = lock(folder)?;
        let options = options(folder);
        let doing = || format!("ingest.spool {shown}: {FILE}");
        let mut connection = options.connect().await.with_context(doing)?;
        install(&mut connection).await.with_context(doing)?;
        let near = Near::default();
        let relays = Sqlite::shared(options.clone(), near.clone());
        let database = Database::Sqlite(relays.clone());
        database.install().await.with_context(doing)?;
        let (jobs, intake) = mpsc::channel(WAITING);
        let writer =
            Writer::new(connection, options, intake, near, ingest, metrics).await.with_context(doing)?;
        Ok(Spool { writer, jobs, database, relays, lock })
    }

    /// Takes the relay's lease in the spool: nobody else has the lock.
    pub async fn own(&self, owner: &str) -> anyhow::Result<i64> {
        Ok(self.relays.seize(owner).await?)
    }

    pub fn intake(&self) -> Intake {
        Intake { jobs: self.jobs.clone(), gauge: self.writer.gauge() }
    }

    /// Writes what comes by the intakes, until they are gone. The lock ends with what is returned: the relay reads
    /// on after the last event has come.
    pub fn spawn(self) -> (JoinHandle<()>, File) {
        let Spool { writer, lock, .. } = self;
        (tokio::spawn(writer.run()), lock)
    }
}

impl Intake {
    /// Whether there is room now; the writer looks again.
    pub fn has_room(&self) -> bool {
        !self.gauge.is_full()
    }

    /// Returns once the events are on the disk, all or none of them. One whose id is known counts as put. The room that
    /// they have is given back when the writer is done with them, even if nobody waits for that any more.
    pub async fn put(&self, events: Vec<Event>, room: Option<OwnedSemaphorePermit>) -> Result<(), Refused> {
        let (answer, answered) = oneshot::channel();
        let job = Job { bytes: events.iter().map(Event::bytes).sum(), events, known: 0, room, answer };
        self.jobs.send(job).await.map_err(|_| Refused::Stopping)?;
        answered.await.unwrap_or(Err(Refused::Stopping))
    }
}

/// Makes the folder. The names of what was made are on the disk too: SQLite sees to those of its own files.
fn make(folder: &Path) -> std::io::Result<()> {
    let folder = std::path::absolute(folder)?;
    let missing: Vec<&Path> = folder.ancestors().take_while(|folder| !folder.exists()).collect();
    std::fs::create_dir_all(&folder)?;
    missing.iter().filter_map(|made| made.parent()).try_for_each(|parent| File::open(parent)?.sync_all())
}

fn options(folder: &Path) -> SqliteConnectOptions {
    SqliteConnectOptions::new()
        .filename(folder.join(FILE))
        .create_if_missing(true)
        .journal_mode(SqliteJournalMode::Wal)
        // Every commit is an fsync.
        .synchronous(SqliteSynchronous::Full)
        .busy_timeout(Duration::from_secs(10))
        // What the log grew to in a burst goes back.
        .pragma("journal_size_limit", "8388608")
}

async fn install(connection: &mut SqliteConnection) -> anyhow::Result<()> {
    let version: i64 = sqlx::query_scalar("PRAGMA user_version").fetch_one(&mut *connection).await?;
    if version > VERSION {
        bail!("it was made by a newer whippet (form {version}, this one knows {VERSION})");
    }
    for statement in TABLES {
        sqlx::query(AssertSqlSafe(statement)).execute(&mut *connection).await?;
    }
    if version < VERSION {
        sqlx::query(AssertSqlSafe(format!("PRAGMA user_version = {VERSION}"))).execute(connection).await?;
    }
    Ok(())
}

/// Whether no process uses a spool. One that is not there is nobody's.
pub(super) fn is_ours_to_take(folder: &Path) -> anyhow::Result<bool> {
    let path = folder.join(LOCK);
    if !path.exists() {
        return Ok(true);
    }
    let file = File::open(&path).with_context(|| path.display().to_string())?;
    match file.try_lock_shared() {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(error)) => Err(error).with_context(|| path.display().to_string()),
    }
}

/// The lock of a spool. The system lets it go when the process ends, however it ends.
fn lock(folder: &Path) -> anyhow::Result<File> {
    let path = folder.join(LOCK);
    let mut file = OpenOptions::new()
        .read(true)
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("ingest.spool: {}", path.display()))?;
    match file.try_lock() {
        Ok(()) => {
            // Only for a message; a full disk does not take it.
            file.set_len(0).and_then(|()| writeln!(file, "{}", std::process::id())).ok();
            Ok(file)
        }
        Err(TryLockError::WouldBlock) => {
            let mut owner = String::new();
            file.read_to_string(&mut owner).ok();
            bail!(
                "ingest.spool {}: process {} uses it; a spool belongs to one process: give each replica its own",
                folder.display(),
                owner.trim()
            )
        }
        Err(TryLockError::Error(error)) => Err(error).with_context(|| format!("lock {}", path.display())),
    }
}

/// What a teardown finds of a spool.
pub struct Remains {
    /// Taken for the teardown.
    _lock: File,
    files: Vec<PathBuf>,
    /// Events that were taken and not published.
    pub events: i64,
}

impl Remains {
    /// `None` where there is no spool. An error where a process uses it.
    pub async fn look(folder: &Path) -> anyhow::Result<Option<Remains>> {
        if !folder.join(FILE).exists() {
            return Ok(None);
        }
        let lock = lock(folder)?;
        let mut connection = options(folder).create_if_missing(false).connect().await?;
        let count = format!("SELECT count(*) FROM {INGEST}");
        let events = sqlx::query_scalar(AssertSqlSafe(count)).fetch_one(&mut connection).await?;
        sqlx::Connection::close(connection).await?;
        let files = [FILE, "ingest.db-wal", "ingest.db-shm", LOCK].map(|name| folder.join(name));
        let files = files.into_iter().filter(|file| file.exists()).collect();
        Ok(Some(Remains { _lock: lock, files, events }))
    }

    pub fn delete(&self) -> std::io::Result<()> {
        self.files.iter().try_for_each(std::fs::remove_file)
    }
}
