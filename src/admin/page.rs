//! The status page at `/`, and what it needs beside `/status`: which keys are parked, and why.
//!
//! The page is one file that asks for nothing from elsewhere; its policy allows the style and the script that are in it,
//! by their hashes, and requests to this address. Reading is open, as with `/status`: whoever reaches the address sees
//! the keys that are parked. Ids, headers and payloads need a token (`/v1/parked`).

use std::{
    collections::HashMap,
    sync::{Arc, LazyLock},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::State,
    http::{HeaderName, header},
    response::{Html, IntoResponse, Response},
    routing::get,
};
use base64::{Engine as _, prelude::BASE64_STANDARD};
use serde::Serialize;
use sha2::{Digest as _, Sha256};
use tokio::{sync::Mutex, time::Instant};

use super::desk::{Desk, Told};
use crate::{
    http::Problem,
    source::hold::{Filter, Held},
};

const PAGE: &str = include_str!("page.html");
/// However many pages are open, the database is asked once in so long.
const ASKED_EVERY: Duration = Duration::from_secs(2);
/// Events that are looked at, of each table.
const EVENTS_AT_MOST: i64 = 1_000;
const KEYS_AT_MOST: usize = 100;
/// Characters of a key; one is a foreign text of any length.
const KEY_LENGTH: usize = 200;

static POLICY: LazyLock<String> = LazyLock::new(|| {
    let hash = |tag: &str| {
        let (begin, end) = (format!("<{tag}>"), format!("</{tag}>"));
        let inside = PAGE
            .split_once(&begin)
            .and_then(|(_, rest)| rest.split_once(&end))
            .map_or("", |(inside, _)| inside);
        BASE64_STANDARD.encode(Sha256::digest(inside))
    };
    format!(
        "default-src 'none'; style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; connect-src 'self'; \
         base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        hash("style"),
        hash("script")
    )
});

/// What was parked a moment ago.
pub struct Parked {
    desk: Arc<Desk>,
    listed: Mutex<Option<(Instant, Listed)>>,
}

#[derive(Clone, Debug, Default, Serialize)]
struct Listed {
    keys: Vec<ParkedKey>,
    /// Whether there are more than these.
    more: bool,
    /// Tables that could not be looked at.
    failed: Vec<Told>,
}

/// A key that waits for an operator.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct ParkedKey {
    table: String,
    topic: String,
    /// `null` where the event has no key: then it is parked alone.
    key: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_hex: Option<String>,
    /// Of the first event, which the others wait for.
    reason: String,
    since: String,
    events: u64,
}

pub fn routes(desk: Arc<Desk>) -> Router {
    Router::new()
        .route("/", get(page))
        .route("/parked", get(parked))
        .with_state(Arc::new(Parked { desk, listed: Mutex::new(None) }))
}

async fn page() -> Response {
    let headers = [
        (header::CONTENT_SECURITY_POLICY, POLICY.as_str()),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
        (header::REFERRER_POLICY, "no-referrer"),
        (header::CACHE_CONTROL, "no-cache"),
        (HeaderName::from_static("cross-origin-resource-policy"), "same-origin"),
    ];
    (headers, Html(PAGE)).into_response()
}

async fn parked(State(parked): State<Arc<Parked>>) -> Result<Json<Listed>, Problem> {
    let mut listed = parked.listed.lock().await;
    if let Some((at, listed)) = &*listed
        && at.elapsed() < ASKED_EVERY
    {
        return Ok(Json(listed.clone()));
    }
    let mut new = Listed::default();
    let (lists, failed) = parked.desk.list(None, &Filter::default(), EVENTS_AT_MOST, false).await?;
    new.failed = failed;
    for held in lists {
        new.more |= held.len() as i64 >= EVENTS_AT_MOST;
        new.keys.extend(by_key(held));
    }
    new.more |= new.keys.len() > KEYS_AT_MOST;
    new.keys.truncate(KEYS_AT_MOST);
    *listed = Some((Instant::now(), new.clone()));
    Ok(Json(new))
}

/// The parked ones of a table's held events, which are in order.
fn by_key(held: Vec<Held>) -> Vec<ParkedKey> {
    let mut keys: Vec<ParkedKey> = Vec::new();
    let mut known: HashMap<(String, Option<String>, String), usize> = HashMap::new();
    for one in held.into_iter().filter(|one| one.state == "parked") {
        let cut = |text: String| text.chars().take(KEY_LENGTH).collect::<String>();
        if let Some(key) = &one.key {
            let place = (one.topic.clone(), one.key_hex.clone(), key.clone());
            if let Some(index) = known.get(&place) {
                keys[*index].events += 1;
                continue;
            }
            known.insert(place, keys.len());
        }
        keys.push(ParkedKey {
            table: one.table,
            topic: one.topic,
            key: one.key.map(cut),
            key_hex: one.key_hex.map(cut),
            reason: one.reason,
            since: one.since,
            events: 1,
        });
    }
    keys
}

#[cfg(test)]
mod tests {
    use super::*;

    fn held(key: Option<&str>, state: &str, reason: &str) -> Held {
        Held {
            table: "outbox".into(),
            place: "1".into(),
            id: "e1".into(),
            topic: "orders".into(),
            key: key.map(str::to_owned),
            key_hex: None,
            state: state.into(),
            cause: "rejected".into(),
            reason: reason.into(),
            attempts: 1,
            since: "2026-01-01T00:00:00Z".into(),
            age_seconds: 1.0,
            payload: None,
        }
    }

    #[test]
    fn events_are_counted_by_key_and_the_first_has_the_reason() {
        let long = "k".repeat(KEY_LENGTH + 1);
        let keys = by_key(vec![
            held(Some("a"), "parked", "too large"),
            held(Some("b"), "held", "the topic is away"),
            held(None, "parked", "one"),
            held(Some("a"), "parked", "behind"),
            held(None, "parked", "two"),
            held(Some(&long), "parked", "x"),
        ]);
        let found: Vec<(Option<usize>, &str, u64)> = keys
            .iter()
            .map(|key| (key.key.as_ref().map(String::len), key.reason.as_str(), key.events))
            .collect();
        assert_eq!(
            found,
            [(Some(1), "too large", 2), (None, "one", 1), (None, "two", 1), (Some(KEY_LENGTH), "x", 1)]
        );
    }

    /// The style and the script are where the policy looks for them, and nothing is loaded from elsewhere.
    #[test]
    fn the_page_is_one_file() {
        for tag in ["style", "script"] {
            assert_eq!(PAGE.matches(&format!("<{tag}>")).count(), 1, "{tag}");
            assert_eq!(PAGE.matches(&format!("</{tag}>")).count(), 1, "{tag}");
        }
        let policy = POLICY.as_str();
        let empty = BASE64_STANDARD.encode(Sha256::digest(""));
        assert!(!policy.contains(&empty) && policy.matches("sha256-").count() == 2, "{policy}");
        // The name of SVG's elements is no address that is asked.
        let addresses = PAGE.matches("://").count();
        assert_eq!(addresses, PAGE.matches("http://www.w3.org/2000/svg").count(), "an address of elsewhere");
        assert!(!PAGE.contains("style=") && !PAGE.contains("onclick="), "the policy forbids these");
    }
}
