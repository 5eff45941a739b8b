//! The disk of a spool: full, failing, stuck, and after a loss of power.

use std::{
    io::{ErrorKind, Read as _, Write as _},
    net::TcpStream,
    path::PathBuf,
    process::Command,
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    harness::{Relay, SOON, World},
    ingest::{address, answer, config, post},
    ingest_callers::Caller,
};

/// A relay whose spool is on a disk of its own, which nobody else sees; the folder is as given in `/proc/PID/root`.
pub fn on_a_disk_of(world: &World, size: &str, topics: &str, more: &str) -> Relay {
    let disk = world.folder.path().join("disk");
    std::fs::create_dir_all(&disk).unwrap();
    let config = config(world, topics, "", more).replace("/spool'", "/disk'");
    let file = world.write("disk.yaml", &config);
    let script = format!(
        "mount -t tmpfs -o size={size} tmpfs {} && exec {} run --config {file}",
        disk.display(),
        env!("CARGO_BIN_EXE_whippet")
    );
    let mut command = Command::new("unshare");
    command.args(["--map-root-user", "--mount", "sh", "-c", &script]);
    Relay::start_by(command)
}

/// The disk is full in the middle: refused cleanly; what was answered is published; and what is published makes
/// room again.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_refuses_and_recovers() {
    let world = World::new("ingestdisk").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let relay = on_a_disk_of(&world, "40m", &topic, "");
    relay.wait_for("it is memory");
    let ingest = address(&relay);
    // The disk as the relay sees it.
    let disk = format!("/proc/{}/root{}/disk", relay.id(), world.folder.path().display());
    relay.operate(&world, &["pause", "--table", "ingest"]);
    let body = vec![b'x'; 100_000];
    let mut taken = 0;
    let send = |id: usize| post(&ingest, &topic, &format!("Whippet-Id: {id}\r\nWhippet-Key: k\r\n"), &body);
    while send(taken).code == 202 {
        taken += 1;
    }
    let refused = send(taken);
    assert_eq!(refused.code, 507, "{}", refused.body);
    assert!(refused.body["detail"].as_str().unwrap().contains("MiB are free"), "{}", refused.body);
    assert!(taken > 20, "{taken}");
    assert_eq!(send(0).code, 202, "it was taken before, and needs no room");
    // Somebody else takes the rest, but for what the relay needs.
    let filler = format!("{disk}/filler");
    std::fs::write(&filler, vec![0; 8 << 20]).unwrap();
    assert_eq!(send(taken).code, 507);
    relay.operate(&world, &["resume", "--table", "ingest"]);
    let mut consumer = world.consumer(&topic);
    let ids: Vec<String> =
        consumer.read(taken).iter().map(|record| record.header("id").unwrap().to_owned()).collect();
    assert_eq!(ids, (0..taken).map(|id| id.to_string()).collect::<Vec<_>>(), "and nothing that was refused");
    relay.until_status("/tables/0/pending", 0).await;
    std::fs::remove_file(&filler).unwrap();
    let deadline = Instant::now() + SOON;
    while send(taken).code != 202 {
        assert!(Instant::now() < deadline, "{}", relay.log());
        world.pause().await;
    }
    relay.wait_for("the spool can be written to again");
    consumer.read(taken + 1);
}

/// The disk fails in the middle of a write, with no warning: as where a quota ends (here, RLIMIT_FSIZE).
#[tokio::test(flavor = "multi_thread")]
async fn a_write_that_fails_half_way_leaves_nothing() {
    let world = World::new("ingestwrite").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let file = world.write("whippet.yaml", &config(&world, &topic, "", ""));
    let mut command = Command::new("sh");
    // In blocks of 512 bytes; without the signal that would end the process.
    let script =
        format!("trap '' XFSZ; ulimit -f 4096; exec {} run --config {file}", env!("CARGO_BIN_EXE_whippet"));
    command.args(["-c", &script]);
    let relay = Relay::start_by(command);
    let ingest = address(&relay);
    assert_eq!(post(&ingest, &topic, "Whippet-Id: before\r\nWhippet-Key: k\r\n", b"x").code, 202);
    // Above what one file may have, in two lines of which the first would fit.
    let lines = format!(
        "{{\"id\":\"small\",\"key\":\"k\",\"payload\":1}}\n{{\"id\":\"large\",\"key\":\"k\",\"payload\":\"{}\"}}\n",
        "x".repeat(3 << 20)
    );
    let refused = post(&ingest, &topic, "Content-Type: application/x-ndjson\r\n", lines.as_bytes());
    assert_eq!(refused.code, 507, "{}", refused.body);
    assert_eq!(post(&ingest, &topic, "Whippet-Id: after\r\nWhippet-Key: k\r\n", b"x").code, 202);
    let mut consumer = world.consumer(&topic);
    consumer.read(2);
    relay.until_status("/tables/0/pending", 0).await;
    let ids: Vec<&str> = consumer.read_to_end().iter().map(|record| record.header("id").unwrap()).collect();
    assert_eq!(ids, ["before", "after"], "not half a batch");
    relay.signal("TERM");
    assert_eq!(relay.ended().code(), Some(0));
}

/// A disk whose power may fail, and which may be stuck: disk.c.
struct Disk {
    library: String,
    spool: PathBuf,
    safe: PathBuf,
}

impl Disk {
    fn new(world: &World) -> Disk {
        let at = |name: &str| world.folder.path().join(name);
        let disk = Disk { library: world.compile("disk.c"), spool: at("spool"), safe: at("safe") };
        std::fs::create_dir(&disk.safe).unwrap();
        disk
    }

    fn relay(&self, world: &World, config: &str) -> Relay {
        let [spool, safe] = [&self.spool, &self.safe].map(|path| path.to_str().unwrap());
        let environment = [("LD_PRELOAD", &*self.library), ("DISK_OF", spool), ("DISK_SAFE", safe)];
        Relay::start_with(&world.write("whippet.yaml", config), &environment)
    }

    fn stuck(&self, stuck: bool) {
        let file = self.safe.join("stuck");
        match stuck {
            true => std::fs::write(file, "").unwrap(),
            false => std::fs::remove_file(file).unwrap(),
        }
    }

    /// Nothing is left but what was synced.
    fn lose_power(&self) {
        let folders = std::fs::read_to_string(self.safe.join("folders")).unwrap();
        let is_safe = |folder: &std::path::Path| folders.lines().any(|line| line == folder.to_str().unwrap());
        assert!(is_safe(&self.spool), "the names of its files: {folders}");
        assert!(is_safe(self.spool.parent().unwrap()), "its own name: {folders}");
        std::fs::remove_dir_all(&self.spool).unwrap();
        std::fs::create_dir(&self.spool).unwrap();
        for name in ["ingest.db", "ingest.db-wal"] {
            std::fs::copy(self.safe.join(name), self.spool.join(name)).unwrap();
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn every_202_survives_a_loss_of_power() {
    const CALLERS: usize = 20;
    // More than fits into SQLite's log: some of it has gone from there to the file.
    const TAKEN: usize = 3_000;
    let world = World::new("ingestpower").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let disk = Disk::new(&world);
    let config = config(&world, &topic, "", "");
    let relay = disk.relay(&world, &config);
    let ingest = address(&relay);
    relay.operate(&world, &["pause", "--table", "ingest"]);
    let (taken, count) = (Mutex::new(Vec::new()), AtomicUsize::new(0));
    let padding = "x".repeat(3_000);
    std::thread::scope(|scope| {
        for caller in 0..CALLERS {
            let (ingest, topic, taken, count, padding) = (&ingest, &topic, &taken, &count, &padding);
            scope.spawn(move || {
                let mut client = Caller::new(ingest);
                for number in 0.. {
                    let id = format!("{caller}-{number}");
                    // Until there is no power.
                    let Some(code) = client.send(topic, "k", &id, padding.as_bytes()) else { break };
                    assert_eq!(code, 202);
                    taken.lock().unwrap().push(id);
                    count.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
        let deadline = Instant::now() + 2 * SOON;
        while count.load(Ordering::Relaxed) < TAKEN && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
        relay.kill();
    });
    let mut taken = taken.into_inner().unwrap();
    assert!(taken.len() >= TAKEN, "{}", taken.len());
    disk.lose_power();
    let relay = world.relay(&config);
    // That was answered too.
    relay.until_status("/tables/0/state", "paused").await;
    relay.operate(&world, &["resume", "--table", "ingest"]);
    let mut consumer = world.consumer(&topic);
    consumer.read(taken.len());
    relay.until_status("/tables/0/pending", 0).await;
    let mut seen: Vec<String> =
        consumer.read_to_end().iter().map(|record| record.header("id").unwrap().to_owned()).collect();
    seen.sort_unstable();
    seen.dedup();
    taken.retain(|id| seen.binary_search(id).is_err());
    assert!(taken.is_empty(), "answered with 202 and lost: {taken:?}");
}

/// While the disk is stuck nobody is told 202, and callers that give up leave nothing behind in memory.
#[tokio::test(flavor = "multi_thread")]
async fn a_stuck_disk_holds_the_answers_and_a_bound_on_memory() {
    const CALLERS: usize = 200;
    let world = World::new("ingeststuck").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let objects = world.folder.path().join("objects");
    std::fs::create_dir(&objects).unwrap();
    let store = format!("object_store: {{ url: 'file://{}' }}", objects.display());
    let disk = Disk::new(&world);
    let relay = disk.relay(&world, &config(&world, &topic, "", &store));
    let ingest = address(&relay);
    // What the relay itself writes at its start is written.
    assert_eq!(post(&ingest, &topic, "", b"before").code, 202);
    let deadline = Instant::now() + SOON;
    while relay.metric("whippet_events_published_total", "") < 1.0 {
        assert!(Instant::now() < deadline, "{}", relay.log());
        world.pause().await;
    }
    disk.stuck(true);
    let head = format!("POST /v1/topics/{topic}/events HTTP/1.1\r\nHost: x\r\nConnection: close\r\n");
    let mut waiting = TcpStream::connect(&ingest).unwrap();
    waiting.write_all(format!("{head}Content-Length: 1\r\n\r\nx").as_bytes()).unwrap();
    waiting.set_read_timeout(Some(Duration::from_secs(1))).unwrap();
    let early = waiting.read(&mut [0]).map_err(|error| error.kind());
    assert!(matches!(early, Err(ErrorKind::WouldBlock | ErrorKind::TimedOut)), "{early:?}");
    let body = vec![b'x'; 1_000_000];
    std::thread::scope(|scope| {
        for _ in 0..CALLERS {
            scope.spawn(|| {
                let mut stream = TcpStream::connect(&ingest).unwrap();
                stream.set_write_timeout(Some(Duration::from_secs(2))).unwrap();
                let head = format!("{head}Content-Length: {}\r\n\r\n", body.len());
                // No more is taken than there is room for; then the caller goes away.
                stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body)).ok();
            });
        }
    });
    // Whoever has waited for room is sent away.
    let deadline = Instant::now() + SOON;
    while relay.metric("whippet_ingest_refused_total", "busy") < 1.0 && Instant::now() < deadline {
        world.pause().await;
    }
    let peak = relay.peak_mib();
    eprintln!("peak {peak:.0} MiB");
    // contract.md section 5: 40 MiB and twice the window, and three times the largest row; and what of each connection
    // is read ahead.
    assert!(peak < 40.0 + 24.0 + 3.0 + 16.0, "{peak} MiB");
    assert!(Instant::now() < deadline, "{}", relay.log());
    disk.stuck(false);
    waiting.set_read_timeout(Some(SOON)).unwrap();
    assert_eq!(answer(&mut waiting).code, 202);
    assert_eq!(post(&ingest, &topic, "", b"after").code, 202);
}
