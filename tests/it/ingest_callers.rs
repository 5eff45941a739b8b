//! Callers of ingest that do not do as they should, and the relay that stops meanwhile.

use std::{
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use crate::{
    harness::{SOON, World},
    ingest::{address, answer, config, post},
};

/// A caller that keeps its connection, and tries again until it is told 202.
pub struct Caller {
    address: String,
    stream: Option<BufReader<TcpStream>>,
}

impl Caller {
    pub fn new(address: &str) -> Caller {
        Caller { address: address.to_owned(), stream: None }
    }

    /// The code of the answer; `None` where none came.
    pub fn send(&mut self, topic: &str, key: &str, id: &str, body: &[u8]) -> Option<u16> {
        let code = self.try_to_send(topic, key, id, body).ok();
        if code.is_none() {
            self.stream = None;
        }
        code
    }

    fn try_to_send(&mut self, topic: &str, key: &str, id: &str, body: &[u8]) -> std::io::Result<u16> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => {
                let stream = TcpStream::connect(&self.address)?;
                stream.set_read_timeout(Some(SOON))?;
                stream.set_nodelay(true)?;
                none.insert(BufReader::new(stream))
            }
        };
        let mut request = format!(
            "POST /v1/topics/{topic}/events HTTP/1.1\r\nHost: x\r\nWhippet-Key: {key}\r\nWhippet-Id: {id}\r\n\
             Content-Length: {}\r\n\r\n",
            body.len()
        )
        .into_bytes();
        request.extend_from_slice(body);
        stream.get_mut().write_all(&request)?;
        let (mut code, mut length, mut line) = (0, 0, String::new());
        loop {
            line.clear();
            if stream.read_line(&mut line)? == 0 {
                return Err(std::io::ErrorKind::UnexpectedEof.into());
            }
            let text = line.trim_end().to_ascii_lowercase();
            if text.is_empty() {
                break;
            }
            if let Some(status) = text.strip_prefix("http/1.1 ") {
                code = status[..3].parse().unwrap();
            }
            if let Some(value) = text.strip_prefix("content-length: ") {
                length = value.parse().unwrap();
            }
        }
        stream.read_exact(&mut vec![0; length])?;
        Ok(code)
    }
}

fn open(address: &str, head: &str) -> TcpStream {
    let mut stream = TcpStream::connect(address).unwrap();
    stream.set_read_timeout(Some(SOON)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    stream
}

/// Slow callers and half a body take nothing from others, and leave nothing behind.
#[tokio::test(flavor = "multi_thread")]
async fn slow_callers_and_half_bodies_are_cut_off() {
    let world = World::new("ingestslow").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let relay = world.relay(&config(&world, &topic, "", ""));
    let ingest = address(&relay);
    let open = |head: &str| open(&ingest, head);
    let head = format!("POST /v1/topics/{topic}/events HTTP/1.1\r\nHost: x\r\n");
    let begun = Instant::now();
    let mut half_a_head = open(&head);
    // Half of them would be half of a payload, and the connection ends.
    for _ in 0..20 {
        drop(open(&format!("{head}Content-Length: 10\r\n\r\nhalf")));
    }
    // One announces all the room that bodies have, and sends nothing.
    let mut nothing = open(&format!("{head}Content-Length: 3000000\r\n\r\n"));
    let stop = Arc::new(AtomicBool::new(false));
    let drips: Vec<_> = (0..10)
        .map(|_| {
            let (mut stream, stop) = (open(&format!("{head}Content-Length: 1000\r\n\r\n")), stop.clone());
            std::thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) && stream.write_all(b"x").is_ok() {
                    std::thread::sleep(Duration::from_millis(200));
                }
                answer(&mut stream).code
            })
        })
        .collect();
    let mut caller = Caller::new(&ingest);
    let mut slowest = Duration::ZERO;
    for number in 0..200 {
        let before = Instant::now();
        assert_eq!(caller.send(&topic, "k", &number.to_string(), b"x"), Some(202));
        slowest = slowest.max(before.elapsed());
    }
    assert!(slowest < Duration::from_secs(8), "others were not held up: {slowest:?}");
    assert_eq!(answer(&mut nothing).code, 408);
    let mut rest = Vec::new();
    half_a_head.read_to_end(&mut rest).ok();
    assert!(!String::from_utf8_lossy(&rest).contains(" 202"));
    for drip in drips {
        assert_eq!(drip.join().unwrap(), 408);
    }
    stop.store(true, Ordering::Relaxed);
    assert!(begun.elapsed() < Duration::from_secs(25), "{:?}", begun.elapsed());
    let mut consumer = world.consumer(&topic);
    consumer.read(200);
    assert_eq!(relay.stop().0, Some(0));
    assert_eq!(consumer.read_to_end().len(), 200, "nothing of what was cut off");
}

/// SIGTERM: what was begun is answered and published; what does not end is cut off, within the grace.
#[tokio::test(flavor = "multi_thread")]
async fn what_was_begun_is_answered_when_the_relay_stops() {
    let world = World::new("ingeststop").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let relay = world.relay(&config(&world, &topic, "", "shutdown: { grace: 6s }"));
    let ingest = address(&relay);
    let head = format!("POST /v1/topics/{topic}/events HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n");
    let begin = |length: usize| {
        let mut stream = open(&ingest, &format!("{head}Content-Length: {length}\r\n\r\n"));
        let mut asked = [0; 25];
        stream.read_exact(&mut asked).unwrap();
        assert_eq!(&asked, b"HTTP/1.1 100 Continue\r\n\r\n", "its body is being read");
        stream.write_all(b"begun").unwrap();
        stream
    };
    // Time for a body of this length is more than the grace.
    let mut endless = begin(50_000_000);
    let mut begun = begin(11);
    let stopped = Instant::now();
    relay.signal("TERM");
    while TcpStream::connect(&ingest).is_ok() {
        world.pause().await;
    }
    begun.write_all(b" ended").unwrap();
    let answered = answer(&mut begun);
    assert_eq!(answered.code, 202, "{}", answered.body);
    let mut nothing = Vec::new();
    endless.read_to_end(&mut nothing).ok();
    assert!(nothing.is_empty(), "{}", String::from_utf8_lossy(&nothing));
    relay.wait_for("requests that were not finished are cut off");
    relay.wait_for("the spool is drained");
    assert!(!relay.log().contains("the disk does not answer"), "{}", relay.log());
    assert_eq!(relay.ended().code(), Some(0));
    assert!(stopped.elapsed() < Duration::from_secs(6), "{:?}", stopped.elapsed());
    let mut consumer = world.consumer(&topic);
    let seen: Vec<String> = consumer.read_to_end().iter().map(|record| record.text().to_owned()).collect();
    assert_eq!(seen, ["begun ended"]);
}

/// Heads that two servers may read in two ways are refused, and so are those that are too large; nothing of them is
/// taken for an event.
#[tokio::test(flavor = "multi_thread")]
async fn strange_requests_are_refused() {
    let world = World::new("ingeststrange").await;
    let topic = world.create_topic("events", 1, &[]).await;
    let relay = world.relay(&config(&world, &topic, "", ""));
    let ingest = address(&relay);
    let post_head = format!("POST /v1/topics/{topic}/events HTTP/1.1\r\nHost: x\r\n");
    let smuggled = format!("0\r\n\r\n{post_head}Content-Length: 8\r\n\r\nsmuggled");
    let (long, many) = ("x".repeat(200_000), "Whippet-Header-A: 1\r\n".repeat(101));
    for (head, body, code) in [
        (format!("Content-Length: {}\r\nTransfer-Encoding: chunked", smuggled.len()), &*smuggled, 411),
        (format!("Transfer-Encoding: chunked\r\nContent-Length: {}", smuggled.len()), &smuggled, 411),
        ("Transfer-Encoding: chunked\r\nConnection: close".into(), "4\r\nbody\r\n0\r\n\r\n", 411),
        ("Transfer-Encoding: gzip\r\nContent-Length: 4".into(), "body", 400),
        ("Content-Length: 4\r\nContent-Length: 5".into(), "body", 400),
        ("Content-Length: 4, 4".into(), "body", 400),
        ("Content-Length: +4".into(), "body", 400),
        ("Content-Length : 4".into(), "body", 400),
        ("Whippet-Key: a\0b\r\nContent-Length: 4".into(), "body", 400),
        ("Whippet-Key: a\r\n b\r\nContent-Length: 4".into(), "body", 400),
        (format!("Whippet-Key: {long}\r\nContent-Length: 4"), "body", 431),
        (format!("{many}Content-Length: 4"), "body", 431),
    ] {
        let shown = &head[..head.len().min(60)];
        let mut stream = TcpStream::connect(&ingest).unwrap();
        stream.set_read_timeout(Some(SOON)).unwrap();
        stream.write_all(format!("{post_head}{head}\r\n\r\n{body}").as_bytes()).ok();
        // Until the server closes: one answer, and nothing of what was smuggled.
        let refused = answer(&mut stream);
        assert_eq!(refused.code, code, "{shown}");
        assert_eq!(refused.body["status"].as_u64(), (code == 411).then_some(411), "{shown}");
    }
    for (request, code) in [("GET /v1/topics/x/events", 405), ("POST /v2", 404)] {
        let mut stream =
            open(&ingest, &format!("{request} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
        let refused = answer(&mut stream);
        assert_eq!((refused.code, refused.body["status"].as_u64()), (code, Some(u64::from(code))));
    }
    assert_eq!(post(&ingest, &topic, "", b"plain").code, 202);
    assert_eq!(relay.stop().0, Some(0));
    let mut consumer = world.consumer(&topic);
    let seen: Vec<String> = consumer.read_to_end().iter().map(|record| record.text().to_owned()).collect();
    assert_eq!(seen, ["plain"]);
}
