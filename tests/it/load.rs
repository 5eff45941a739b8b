//! Writers beside the relay, and the history of what they committed.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    checker::{Verdict, Written, check},
    db::{Failed, Session},
    harness::{SOON, World},
};

/// What the writers do.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    pub writers: u64,
    pub keys: u32,
    /// Rows after which the writers end.
    pub rows: u64,
    /// The longest ordinary pause between INSERT and COMMIT, in milliseconds; seldom it is longer.
    pub pause_ms: u64,
    /// One row in so many has headers that cannot be published, until they are mended.
    pub poison: Option<u32>,
}

struct Shared {
    url: String,
    topic: String,
    plan: Plan,
    /// Whether a row is deleted by the transaction that inserts it.
    deletes: bool,
    left: AtomicU64,
    transactions: AtomicU64,
    stop: AtomicBool,
    history: Mutex<Vec<Written>>,
}

pub struct Load {
    seed: u64,
    shared: Arc<Shared>,
    writers: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    pub async fn start(world: &World, topic: &str, plan: Plan, seed: u64) -> Load {
        Load::begin(world, topic, plan, seed, false).await
    }

    /// Rows of which only the log knows. MySQL's only: they are deleted by their number.
    pub async fn transient(world: &World, topic: &str, plan: Plan, seed: u64) -> Load {
        Load::begin(world, topic, plan, seed, true).await
    }

    async fn begin(world: &World, topic: &str, plan: Plan, seed: u64, deletes: bool) -> Load {
        let keys = plan.keys;
        world.sql("CREATE TABLE turns (number integer PRIMARY KEY)").await;
        let numbers: Vec<String> = (0..keys).map(|key| format!("({key})")).collect();
        world.sql(&format!("INSERT INTO turns VALUES {}", numbers.join(","))).await;
        eprintln!("seed {seed}");
        let shared = Arc::new(Shared {
            url: world.url.clone(),
            topic: topic.to_owned(),
            plan,
            deletes,
            left: AtomicU64::new(plan.rows),
            transactions: AtomicU64::new(0),
            stop: AtomicBool::new(false),
            history: Mutex::new(Vec::new()),
        });
        world.sql("CREATE TABLE transactions (number bigint PRIMARY KEY)").await;
        let mut load = Load { seed, shared, writers: Vec::new() };
        load.go_on();
        load
    }

    /// Has the writers write, as at the start, or after they have ended.
    pub fn go_on(&mut self) {
        self.shared.stop.store(false, Ordering::Relaxed);
        let writers = self.shared.plan.writers;
        let write = |writer| tokio::spawn(write(self.shared.clone(), self.seed + writer));
        self.writers = (0..writers).map(write).collect();
        self.seed += writers;
    }

    /// Rows that were inserted so far.
    pub fn written(&self) -> usize {
        self.shared.history.lock().unwrap().len()
    }

    /// Lets the writers end where they are.
    pub fn stop(&self) {
        self.shared.stop.store(true, Ordering::Relaxed);
    }

    pub async fn ended(&mut self) {
        for writer in self.writers.drain(..) {
            writer.await.unwrap();
        }
    }

    /// Compares with everything that is in the topic.
    pub fn check(&self, world: &World) -> (Verdict, usize) {
        let history = self.shared.history.lock().unwrap();
        let verdict = check(&history, world.consumer(&self.shared.topic).read_committed());
        let rolled_back = history.iter().filter(|row| row.committed.is_none()).count();
        eprintln!("{verdict:?}, {rolled_back} rows rolled back");
        (verdict, rolled_back)
    }
}

/// One writer: transactions of a few rows. When the server goes away, it waits until there is one again.
async fn write(shared: Arc<Shared>, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut session = Session::open(&shared.url).await.unwrap();
    // Half of the writers serialise each key by a row lock taken before the INSERT.
    let locks = seed.is_multiple_of(2);
    loop {
        let rows = random.u64(1..=20);
        let left =
            shared.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(rows));
        if left.is_err() || shared.stop.load(Ordering::Relaxed) {
            return;
        }
        let number = shared.transactions.fetch_add(1, Ordering::Relaxed);
        let mut keys: Vec<u32> = (0..rows).map(|_| random.u32(0..shared.plan.keys)).collect();
        if locks {
            // In one order, or two writers would wait for each other.
            keys.sort_unstable();
        }
        let mut written = Vec::new();
        let done = transact(&shared, &mut session, &mut random, number, &keys, locks, &mut written).await;
        let committed = match done {
            Ok(committed) => committed,
            Err(error) => {
                // A deadlock, or a wait that was too long, is neither.
                assert!(error.is_gone, "{error}");
                session = connect_again(&shared.url).await;
                has_committed(&mut session, number).await.then(Instant::now)
            }
        };
        session.lets_others().await;
        written.iter_mut().for_each(|row| row.committed = committed);
        shared.history.lock().unwrap().extend(written);
    }
}

/// One transaction, with a pause between INSERT and COMMIT. Returns when it had committed, if so.
async fn transact(
    shared: &Shared,
    session: &mut Session,
    random: &mut fastrand::Rng,
    number: u64,
    keys: &[u32],
    locks: bool,
    written: &mut Vec<Written>,
) -> Result<Option<Instant>, Failed> {
    let Plan { pause_ms, poison, .. } = shared.plan;
    session.run(session.begin()).await?;
    session.run(&format!("INSERT INTO transactions VALUES ({number})")).await?;
    if locks {
        let mut distinct = keys.to_vec();
        distinct.dedup();
        for key in distinct {
            let alone = session.for_update();
            session.run(&format!("SELECT 1 FROM turns WHERE number = {key} {alone}")).await?;
        }
    }
    for (nth, key) in keys.iter().enumerate() {
        let row = Written {
            id: uuid::Uuid::from_u128(random.u128(..)).to_string(),
            key: format!("key-{key}"),
            payload: vec![b'x'; random.usize(0..400)],
            transaction: number,
            inserted: Instant::now(),
            nth,
            committed: None,
        };
        let bad = poison.is_some_and(|one_in| random.u32(0..one_in) == 0);
        let (id, topic, key, payload) = (&row.id, &shared.topic, &row.key, session.bytes(&row.payload));
        let headers = if bad { "'[\"not an object\"]'" } else { "NULL" };
        let (columns, values) =
            (session.columns(), format!("'{id}', '{topic}', '{key}', {payload}, {headers}"));
        session.run(&format!("INSERT INTO outbox ({columns}) VALUES ({values})")).await?;
        if shared.deletes {
            session.run("DELETE FROM outbox WHERE seq = LAST_INSERT_ID()").await?;
        }
        written.push(row);
    }
    // Mostly short, sometimes long: rows with lower numbers commit after higher ones.
    let pause = if random.u32(0..50) == 0 { random.u64(0..=pause_ms * 7) } else { random.u64(0..=pause_ms) };
    tokio::time::sleep(Duration::from_millis(pause)).await;
    if random.u32(0..20) == 0 {
        session.run("ROLLBACK").await?;
        return Ok(None);
    }
    session.run("COMMIT").await?;
    Ok(Some(Instant::now()))
}

async fn connect_again(url: &str) -> Session {
    let deadline = Instant::now() + SOON;
    loop {
        match Session::open(url).await {
            Ok(session) => return session,
            Err(error) => {
                assert!(Instant::now() < deadline, "{error}");
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        }
    }
}

/// What became of a transaction whose end nobody heard. One that is still open is waited for: it has
/// the number.
async fn has_committed(session: &mut Session, number: u64) -> bool {
    let ours = format!("INSERT INTO transactions VALUES ({number}) {}", session.or_nothing());
    session.run(&ours).await.unwrap() == 0
}
