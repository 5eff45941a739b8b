//! A service with no transaction to join: its events go to the relay by HTTP.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use uuid::Uuid;

use super::{CLICKS, Shared, lock, shop::Expected};

const VISITORS: usize = 50;
/// How long the calling takes, so that there is something to watch.
const CALLING: Duration = Duration::from_secs(3);

/// Hands over so many events, one after the other.
pub async fn run(ingest: SocketAddr, events: usize, shared: Shared) -> anyhow::Result<()> {
    tokio::task::spawn_blocking(move || call(ingest, events, &shared)).await?
}

fn call(ingest: SocketAddr, events: usize, shared: &Shared) -> anyhow::Result<()> {
    let url = format!("http://{ingest}/v1/topics/{}/events", CLICKS.topic);
    let agent = ureq::Agent::new_with_defaults();
    let begin = Instant::now();
    for number in 0..events {
        let event = click(number);
        let mut request = agent
            .post(&url)
            .header("Content-Type", "application/json")
            .header("Whippet-Key", &event.key)
            .header("Whippet-Id", &event.id)
            .header("Whippet-Type", "PageViewed");
        for (name, value) in &event.context {
            let name = if name == "user-id" { "Whippet-Header-user-id" } else { name };
            request = request.header(name, value);
        }
        let answer = request.send(&event.payload[..]).context("an event by HTTP")?;
        anyhow::ensure!(answer.status() == 202, "an event by HTTP was answered with {}", answer.status());
        lock(shared).expected.push(Expected { committed: Instant::now(), ..event });
        let due = begin + CALLING.mul_f64(number as f64 / events as f64);
        std::thread::sleep(due.saturating_duration_since(Instant::now()));
    }
    lock(shared).writing -= 1;
    Ok(())
}

fn click(number: usize) -> Expected {
    let visitor = format!("visitor-{}", fastrand::usize(..VISITORS));
    let payload = serde_json::json!({ "number": number, "visitor": visitor, "page": "/" });
    let context = [
        ("x-request-id", Uuid::new_v4().to_string()),
        ("user-id", visitor.clone()),
        ("traceparent", format!("00-{}-{:016x}-01", Uuid::new_v4().simple(), fastrand::u64(1..))),
    ];
    Expected {
        id: Uuid::new_v4().to_string(),
        topic: CLICKS.topic,
        key: visitor,
        travels: "inline",
        payload: payload.to_string().into_bytes(),
        context: context.into_iter().map(|(name, value)| (name.to_owned(), value)).collect(),
        committed: Instant::now(),
    }
}
