//! A broker that lies: everything goes through to the real one, but for its answers about the
//! cluster, which say that the broker is here, or that there is no broker at all.
//!
//! The bytes are those of the Kafka protocol guide, "Metadata API", responses of versions 9 and later.

use std::{
    collections::HashMap,
    io::{self, Read, Write},
    net::{TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use crate::harness::kafka;

const METADATA: i16 = 3;

/// Whether it says that there are no brokers.
pub struct Impostor(Arc<AtomicBool>);

impl Impostor {
    /// And its address.
    pub fn start() -> (Impostor, String) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let lie = Arc::new(AtomicBool::new(false));
        let shared = lie.clone();
        thread::spawn(move || {
            for client in listener.incoming() {
                let (client, broker) = (client.unwrap(), TcpStream::connect(kafka()).unwrap());
                // A connection that ends is the peers' business.
                let (lie, asked) = (shared.clone(), Arc::new(Mutex::new(HashMap::new())));
                let (requests, answers) = (both(&client, &broker), both(&broker, &client));
                let asking = asked.clone();
                thread::spawn(move || forward(requests, |frame| note(frame, &asking)));
                thread::spawn(move || forward(answers, |frame| answer(frame, &asked, port, &lie)));
            }
        });
        (Impostor(lie), format!("127.0.0.1:{port}"))
    }

    /// Says from now on that there are no brokers.
    pub fn denies_all_brokers(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    pub fn is_honest(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}

fn both(from: &TcpStream, to: &TcpStream) -> (TcpStream, TcpStream) {
    (from.try_clone().unwrap(), to.try_clone().unwrap())
}

/// Whole frames, one by one: a length of four bytes and what follows.
fn forward(
    (mut from, mut to): (TcpStream, TcpStream),
    mut change: impl FnMut(Vec<u8>) -> Vec<u8>,
) -> io::Result<()> {
    let mut one = || -> io::Result<()> {
        let mut length = [0; 4];
        from.read_exact(&mut length)?;
        let mut frame = vec![0; u32::from_be_bytes(length) as usize];
        from.read_exact(&mut frame)?;
        let frame = change(frame);
        to.write_all(&u32::try_from(frame.len()).unwrap().to_be_bytes())?;
        to.write_all(&frame)
    };
    loop {
        if let Err(error) = one() {
            from.shutdown(std::net::Shutdown::Both).ok();
            to.shutdown(std::net::Shutdown::Both).ok();
            return Err(error);
        }
    }
}

/// Remembers which answers will be about the cluster: correlation id and version.
fn note(frame: Vec<u8>, asked: &Mutex<HashMap<i32, i16>>) -> Vec<u8> {
    if i16_at(&frame, 0) == METADATA {
        asked.lock().unwrap().insert(i32_at(&frame, 4), i16_at(&frame, 2));
    }
    frame
}

fn answer(frame: Vec<u8>, asked: &Mutex<HashMap<i32, i16>>, port: u16, no_brokers: &AtomicBool) -> Vec<u8> {
    let Some(version) = asked.lock().unwrap().remove(&i32_at(&frame, 0)) else { return frame };
    assert!(version >= 9, "a metadata answer of version {version} is not understood here");
    // Correlation id, no tags, throttle time; then the brokers: how many (plus one), and each of them.
    let brokers = 4 + 1 + 4;
    let count = usize::from(frame[brokers]) - 1;
    assert!(count < 100, "one byte is enough for the number of brokers");
    let (mut frame, mut at) = (frame, brokers + 1);
    for _ in 0..count {
        // Node id, host (length plus one), port, rack (length plus one, or 0 for none), no tags.
        at += 4;
        at += usize::from(frame[at]);
        frame[at..at + 4].copy_from_slice(&i32::from(port).to_be_bytes());
        at += 4;
        at += usize::from(frame[at]).max(1) + 1;
    }
    if no_brokers.load(Ordering::SeqCst) {
        frame.splice(brokers..at, [1]);
    }
    frame
}

fn i16_at(frame: &[u8], at: usize) -> i16 {
    i16::from_be_bytes(frame[at..at + 2].try_into().unwrap())
}

fn i32_at(frame: &[u8], at: usize) -> i32 {
    i32::from_be_bytes(frame[at..at + 4].try_into().unwrap())
}
