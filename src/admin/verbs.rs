//! The verbs of the admin address: `/v1`. Each needs a token; what changes something is carried out by
//! the source of its table, under its lease, with a line in the audit log.

use std::sync::Arc;

use axum::{
    Router,
    body::Bytes,
    extract::{
        FromRequestParts, Query, State,
        rejection::{BytesRejection, QueryRejection},
    },
    http::{StatusCode, request::Parts},
    routing::{get, post},
};
use serde::{Deserialize, Serialize, de::DeserializeOwned};
use tracing::warn;

use super::{
    desk::{Answer, Desk, Done, Partial, Told},
    token,
};
use crate::{
    http::Problem,
    source::hold::{Filter, Held, Replay, Request, Scope, Verb, key_from_hex},
};

/// The end of the year 9999, in milliseconds since the Unix epoch: what both databases can hold.
const LATEST: i64 = 253_402_300_799_999;
/// Held events that one answer lists.
const LISTED_AT_MOST: i64 = 1_000;

pub fn routes() -> Router<Arc<Desk>> {
    Router::new()
        .route("/v1/pause", post(pause))
        .route("/v1/resume", post(resume))
        .route("/v1/redrive", post(redrive))
        .route("/v1/skip", post(skip))
        .route("/v1/replay", post(replay))
        .route("/v1/parked", get(parked))
}

/// The name of the token that came with a request.
struct Who(String);

impl FromRequestParts<Arc<Desk>> for Who {
    type Rejection = Problem;

    async fn from_request_parts(parts: &mut Parts, desk: &Arc<Desk>) -> Result<Who, Problem> {
        let Some(file) = desk.token_file() else {
            return Err(Problem::new(
                StatusCode::FORBIDDEN,
                "admin.token_file is not set: nothing can be changed through this address",
            ));
        };
        let presented = token::presented(&parts.headers);
        match presented.map(|presented| token::name_of(file, presented)).transpose() {
            Ok(Some(Some(name))) => Ok(Who(name)),
            Ok(_) => {
                let detail = "needs `Authorization: Bearer` with a token of admin.token_file";
                Err(Problem::new(StatusCode::UNAUTHORIZED, detail))
            }
            Err(error) => {
                warn!(%error, file = %file.display(), "cannot read admin.token_file");
                Err(Problem::new(StatusCode::SERVICE_UNAVAILABLE, "admin.token_file cannot be read"))
            }
        }
    }
}

type Body = Result<Bytes, BytesRejection>;

/// JSON, whatever its Content-Type says: a form's, as `curl --data` has it, is no reason to refuse it.
fn body<T: DeserializeOwned>(body: Body) -> Result<T, Problem> {
    let body = body.map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()))?;
    serde_json::from_slice(&body).map_err(|error| match error.is_data() {
        true => {
            Problem::new(StatusCode::UNPROCESSABLE_ENTITY, format!("nothing that this verb takes: {error}"))
        }
        false => Problem::bad(format!("the body is no JSON: {error}")),
    })
}

/// Which events, and how the verb is to be carried out. The keys that a verb does not know are errors.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Wanted {
    table: Option<String>,
    topic: Option<String>,
    key: Option<String>,
    /// For a key that is no text.
    key_hex: Option<String>,
    id: Option<String>,
    all: bool,
    /// Redrive: a cause or a part of the reason. Skip: why.
    reason: Option<String>,
    /// Why, for the audit log.
    why: Option<String>,
    dry_run: bool,
}

impl Wanted {
    fn key(&self) -> Result<Option<Vec<u8>>, Problem> {
        key(self.key.as_ref(), self.key_hex.as_ref())
    }

    fn scope(&self) -> Result<Scope, Problem> {
        if self.id.is_some() || self.all || self.reason.is_some() {
            return Err(Problem::bad("pause and resume take table, topic and key"));
        }
        self.topic.as_deref().map_or(Ok(()), legal)?;
        match (self.key()?, &self.topic) {
            (Some(key), topic) => Ok(Scope::Key { topic: topic.clone(), key }),
            (None, Some(topic)) => Ok(Scope::Topic(topic.clone())),
            (None, None) if self.table.is_some() => Ok(Scope::Table),
            (None, None) => Err(Problem::bad("say what: table, topic or key")),
        }
    }

    fn filter(&self, reason: Option<&String>) -> Result<Filter, Problem> {
        let filter = Filter {
            id: self.id.clone(),
            key: self.key()?,
            topic: self.topic.clone(),
            reason: reason.cloned(),
        };
        match (filter == Filter::default(), self.all) {
            (true, false) => Err(Problem::bad("say which: id, key, topic, reason or \"all\": true")),
            (false, true) => Err(Problem::bad("\"all\" and something else is not all")),
            _ => Ok(filter),
        }
    }
}

fn key(text: Option<&String>, hex: Option<&String>) -> Result<Option<Vec<u8>>, Problem> {
    match (text, hex) {
        (Some(_), Some(_)) => Err(Problem::bad("key and key_hex are one thing: give one of them")),
        (Some(text), None) => Ok(Some(text.clone().into_bytes())),
        (None, Some(hex)) => {
            key_from_hex(hex).map(Some).ok_or_else(|| Problem::bad("key_hex is no hex text"))
        }
        (None, None) => Ok(None),
    }
}

fn legal(topic: &str) -> Result<(), Problem> {
    match crate::record::is_legal_topic(topic) {
        true => Ok(()),
        false => Err(Problem::bad(format!("{topic:?} is not a legal topic name"))),
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Again {
    table: Option<String>,
    /// An order number, or a time of publishing as RFC 3339.
    from: Option<Bound>,
    to: Option<Bound>,
    ids: Vec<String>,
    topic: Option<String>,
    why: Option<String>,
    dry_run: bool,
}

#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Bound {
    Number(i64),
    Text(String),
}

impl Again {
    fn replay(&self) -> Result<Replay, Problem> {
        let mut replay = Replay { ids: self.ids.clone(), topic: self.topic.clone(), ..Replay::default() };
        let bounds = [&self.from, &self.to].map(|bound| bound.as_ref().map(Bound::read).transpose());
        match bounds {
            [Err(problem), _] | [_, Err(problem)] => return Err(problem),
            [Ok(None), Ok(None)] if self.ids.is_empty() => {
                return Err(Problem::bad("say which: ids, or from and to (order numbers or times)"));
            }
            [Ok(None), Ok(None)] => {}
            [Ok(from), Ok(to)] => match (from, to) {
                (Some(Edge::Sequence(_)), Some(Edge::Time(_)))
                | (Some(Edge::Time(_)), Some(Edge::Sequence(_))) => {
                    return Err(Problem::bad("from and to are both order numbers, or both times"));
                }
                (Some(Edge::Time(from)), to) => {
                    replay.times = Some((from, to.map_or(LATEST, Edge::number)));
                }
                (from, Some(Edge::Time(to))) => {
                    replay.times = Some((from.map_or(0, Edge::number), to));
                }
                (from, to) => {
                    replay.sequences =
                        Some((from.map_or(i64::MIN, Edge::number), to.map_or(i64::MAX, Edge::number)));
                }
            },
        }
        self.topic.as_deref().map_or(Ok(()), legal)?;
        Ok(replay)
    }
}

#[derive(Clone, Copy, Debug)]
enum Edge {
    Sequence(i64),
    /// Milliseconds since the Unix epoch.
    Time(i64),
}

impl Edge {
    fn number(self) -> i64 {
        match self {
            Edge::Sequence(number) | Edge::Time(number) => number,
        }
    }
}

impl Bound {
    fn read(&self) -> Result<Edge, Problem> {
        match self {
            Bound::Number(number) => Ok(Edge::Sequence(*number)),
            Bound::Text(text) => match (text.parse(), chrono::DateTime::parse_from_rfc3339(text)) {
                (Ok(number), _) => Ok(Edge::Sequence(number)),
                (_, Ok(time)) => Ok(Edge::Time(time.timestamp_millis())),
                _ => Err(Problem::bad(format!(
                    "{text:?} is neither an order number nor a time such as 2026-01-31T12:00:00Z"
                ))),
            },
        }
    }
}

async fn pause(State(desk): State<Arc<Desk>>, Who(who): Who, wanted: Body) -> Result<Answer<Done>, Problem> {
    let wanted: Wanted = body(wanted)?;
    let verb = Verb::Pause(wanted.scope()?);
    let request = Request { verb, dry_run: wanted.dry_run, who, why: wanted.why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

async fn resume(State(desk): State<Arc<Desk>>, Who(who): Who, wanted: Body) -> Result<Answer<Done>, Problem> {
    let wanted: Wanted = body(wanted)?;
    let verb = Verb::Resume(wanted.scope()?);
    let request = Request { verb, dry_run: wanted.dry_run, who, why: wanted.why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

async fn redrive(
    State(desk): State<Arc<Desk>>,
    Who(who): Who,
    wanted: Body,
) -> Result<Answer<Done>, Problem> {
    let wanted: Wanted = body(wanted)?;
    let verb = Verb::Redrive(wanted.filter(wanted.reason.as_ref())?);
    let request = Request { verb, dry_run: wanted.dry_run, who, why: wanted.why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

async fn skip(State(desk): State<Arc<Desk>>, Who(who): Who, wanted: Body) -> Result<Answer<Done>, Problem> {
    let wanted: Wanted = body(wanted)?;
    if wanted.id.is_none() && wanted.key.is_none() && wanted.key_hex.is_none() {
        return Err(Problem::bad("say which: id or key; what is skipped is not published"));
    }
    let verb = Verb::Skip(wanted.filter(None)?);
    let why = wanted.why.or(wanted.reason);
    let request = Request { verb, dry_run: wanted.dry_run, who, why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

async fn replay(State(desk): State<Arc<Desk>>, Who(who): Who, wanted: Body) -> Result<Answer<Done>, Problem> {
    let wanted: Again = body(wanted)?;
    let request =
        Request { verb: Verb::Replay(wanted.replay()?), dry_run: wanted.dry_run, who, why: wanted.why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Which {
    table: Option<String>,
    topic: Option<String>,
    key: Option<String>,
    key_hex: Option<String>,
    id: Option<String>,
    reason: Option<String>,
    limit: Option<i64>,
    payload: bool,
}

#[derive(Debug, Serialize)]
struct Listed {
    parked: Vec<Held>,
    /// Whether there is more than what is listed.
    more: bool,
    /// Tables that could not be looked at.
    failed: Vec<Told>,
}

impl Partial for Listed {
    fn failed(&self) -> &[Told] {
        &self.failed
    }
}

async fn parked(
    State(desk): State<Arc<Desk>>,
    _: Who,
    which: Result<Query<Which>, QueryRejection>,
) -> Result<Answer<Listed>, Problem> {
    let Query(which) = which.map_err(|rejection| Problem::bad(rejection.body_text()))?;
    if which.payload && which.id.is_none() {
        return Err(Problem::bad("a payload is shown of one event: give its id"));
    }
    let limit = which.limit.unwrap_or(100).clamp(1, LISTED_AT_MOST);
    let key = key(which.key.as_ref(), which.key_hex.as_ref())?;
    let filter = Filter { id: which.id, key, topic: which.topic, reason: which.reason };
    let (lists, failed) = desk.list(which.table.as_deref(), &filter, limit + 1, which.payload).await?;
    let mut parked: Vec<Held> = lists.into_iter().flatten().collect();
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = parked.len() > limit;
    parked.truncate(limit);
    Ok(Answer(Listed { parked, more, failed }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_numbers_or_times_and_not_both() {
        let of = |json: &str| serde_json::from_str::<Again>(json).unwrap().replay();
        assert_eq!(of(r#"{"from": 5, "to": "9"}"#).unwrap().sequences, Some((5, 9)));
        assert_eq!(of(r#"{"from": 5}"#).unwrap().sequences, Some((5, i64::MAX)));
        let times = of(r#"{"from": "1970-01-01T00:00:01Z", "to": "1970-01-01T00:00:02Z"}"#).unwrap().times;
        assert_eq!(times, Some((1000, 2000)));
        assert_eq!(of(r#"{"ids": ["a"]}"#).unwrap().ids, ["a"]);
        for bad in [
            "{}",
            r#"{"from": "soon"}"#,
            r#"{"from": 5, "to": "1970-01-01T00:00:02Z"}"#,
            r#"{"from": 5, "topic": "a b"}"#,
        ] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_is_meant_has_to_be_said() {
        let of = |json: &str| serde_json::from_str::<Wanted>(json).unwrap();
        assert!(of("{}").filter(None).is_err());
        assert!(of(r#"{"all": true, "id": "x"}"#).filter(None).is_err());
        assert_eq!(of(r#"{"all": true}"#).filter(None).unwrap(), Filter::default());
        assert!(of("{}").scope().is_err());
        assert_eq!(of(r#"{"table": "t"}"#).scope().unwrap(), Scope::Table);
        assert_eq!(
            of(r#"{"topic": "t", "key_hex": "6b"}"#).scope().unwrap(),
            Scope::Key { topic: Some("t".into()), key: b"k".to_vec() }
        );
    }
}
