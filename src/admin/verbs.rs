//! The verbs of the admin address: `/v1`. Each needs a token; what changes something is carried out by
//! the source of its table, under its lease, with a line in the audit log.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use axum::{
    Json, Router,
    extract::{
        FromRequestParts, Query, State,
        rejection::{JsonRejection, QueryRejection},
    },
    http::{StatusCode, request::Parts},
    routing::{get, post},
};
use serde::{Deserialize, Serialize};
use tokio::sync::{mpsc::WeakUnboundedSender, oneshot};
use tracing::warn;

use super::token;
use crate::{
    config::Order,
    coordinate::report,
    http::Problem,
    source::{
        Command, Refusal,
        database::{Database, TableSpec, answered},
        hold::{Filter, Held, Outcome, Replay, Request, Scope, Verb},
    },
};

/// How long a verb may take before its caller is told that it did not happen.
const CARRIED_OUT_WITHIN: Duration = Duration::from_secs(30);
/// The end of the year 9999, in milliseconds since the Unix epoch: what both databases can hold.
const LATEST: i64 = 253_402_300_799_999;
/// Held events that one answer lists.
const LISTED_AT_MOST: i64 = 1_000;

/// A table as the verbs see it.
pub struct Table {
    pub spec: TableSpec,
    /// Where it is.
    pub database: Database,
    /// To its source; weak, because the channel's end tells the source to finish.
    pub source: WeakUnboundedSender<Command>,
}

/// What the verbs need.
pub struct Desk {
    /// They come and go.
    tables: Mutex<Vec<Arc<Table>>>,
    token_file: Option<PathBuf>,
}

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
        let Some(file) = &desk.token_file else {
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

type Body<T> = Result<Json<T>, JsonRejection>;

fn body<T>(body: Body<T>) -> Result<T, Problem> {
    body.map(|Json(body)| body).map_err(|rejection| Problem::new(rejection.status(), rejection.body_text()))
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
        match (&self.key, &self.key_hex) {
            (Some(_), Some(_)) => Err(Problem::bad("key and key_hex are one thing: give one of them")),
            (Some(text), None) => Ok(Some(text.clone().into_bytes())),
            (None, Some(hex)) => {
                bytes_of(hex).map(Some).ok_or_else(|| Problem::bad("key_hex is no hex text"))
            }
            (None, None) => Ok(None),
        }
    }

    fn scope(&self) -> Result<Scope, Problem> {
        if self.id.is_some() || self.all || self.reason.is_some() {
            return Err(Problem::bad("pause and resume take table, topic and key"));
        }
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

fn bytes_of(hex: &str) -> Option<Vec<u8>> {
    let digits: Option<Vec<u8>> =
        hex.chars().map(|c| c.to_digit(16).and_then(|digit| u8::try_from(digit).ok())).collect();
    let (pairs, rest) = digits.as_deref()?.as_chunks::<2>();
    rest.is_empty().then(|| pairs.iter().map(|[high, low]| high << 4 | low).collect())
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
        if let Some(topic) = &self.topic
            && !crate::record::is_legal_topic(topic)
        {
            return Err(Problem::bad(format!("{topic:?} is not a legal topic name")));
        }
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

/// What a verb did, or would do.
#[derive(Debug, Serialize)]
struct Done {
    dry_run: bool,
    keys: u64,
    events: u64,
    tables: Vec<DoneInTable>,
}

#[derive(Debug, Serialize)]
struct DoneInTable {
    table: String,
    #[serde(flatten)]
    outcome: Outcome,
}

async fn pause(
    State(desk): State<Arc<Desk>>,
    Who(who): Who,
    wanted: Body<Wanted>,
) -> Result<Json<Done>, Problem> {
    let wanted = body(wanted)?;
    let verb = Verb::Pause(wanted.scope()?);
    let request = Request { verb, dry_run: wanted.dry_run, who, why: wanted.why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

async fn resume(
    State(desk): State<Arc<Desk>>,
    Who(who): Who,
    wanted: Body<Wanted>,
) -> Result<Json<Done>, Problem> {
    let wanted = body(wanted)?;
    let verb = Verb::Resume(wanted.scope()?);
    let request = Request { verb, dry_run: wanted.dry_run, who, why: wanted.why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

async fn redrive(
    State(desk): State<Arc<Desk>>,
    Who(who): Who,
    wanted: Body<Wanted>,
) -> Result<Json<Done>, Problem> {
    let wanted = body(wanted)?;
    let verb = Verb::Redrive(wanted.filter(wanted.reason.as_ref())?);
    let request = Request { verb, dry_run: wanted.dry_run, who, why: wanted.why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

async fn skip(
    State(desk): State<Arc<Desk>>,
    Who(who): Who,
    wanted: Body<Wanted>,
) -> Result<Json<Done>, Problem> {
    let wanted = body(wanted)?;
    if wanted.id.is_none() && wanted.key.is_none() && wanted.key_hex.is_none() {
        return Err(Problem::bad("say which: id or key; what is skipped is not published"));
    }
    let verb = Verb::Skip(wanted.filter(None)?);
    let why = wanted.why.or(wanted.reason);
    let request = Request { verb, dry_run: wanted.dry_run, who, why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

async fn replay(
    State(desk): State<Arc<Desk>>,
    Who(who): Who,
    wanted: Body<Again>,
) -> Result<Json<Done>, Problem> {
    let wanted = body(wanted)?;
    let verb = Verb::Replay(wanted.replay()?);
    if wanted.table.is_none() && desk.tables().len() > 1 {
        return Err(Problem::bad("say which table"));
    }
    let request = Request { verb, dry_run: wanted.dry_run, who, why: wanted.why };
    desk.carry_out(wanted.table.as_deref(), request).await
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Which {
    table: Option<String>,
    topic: Option<String>,
    key: Option<String>,
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
}

async fn parked(
    State(desk): State<Arc<Desk>>,
    _: Who,
    which: Result<Query<Which>, QueryRejection>,
) -> Result<Json<Listed>, Problem> {
    let Query(which) = which.map_err(|rejection| Problem::bad(rejection.body_text()))?;
    if which.payload && which.id.is_none() {
        return Err(Problem::bad("a payload is shown of one event: give its id"));
    }
    let limit = which.limit.unwrap_or(100).clamp(1, LISTED_AT_MOST);
    let key = which.key.map(String::into_bytes);
    let filter = Filter { id: which.id, key, topic: which.topic, reason: which.reason };
    let mut parked = Vec::new();
    for table in desk.chosen(which.table.as_deref())? {
        let listed = async {
            let outbox = table.database.outbox(&table.spec).await?;
            let mut listed = outbox.list(&filter, limit + 1).await?;
            if which.payload {
                for held in &mut listed {
                    held.payload = Some(outbox.payload_text(&held.place).await?);
                }
            }
            Ok(listed)
        };
        let listed = answered("list what is held", listed).await;
        parked.extend(listed.map_err(|error| Problem::new(StatusCode::SERVICE_UNAVAILABLE, report(&error)))?);
    }
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = parked.len() > limit;
    parked.truncate(limit);
    Ok(Json(Listed { parked, more }))
}

impl Desk {
    pub fn new(token_file: Option<PathBuf>) -> Desk {
        Desk { tables: Mutex::default(), token_file }
    }

    pub fn add(&self, table: Table) {
        self.tables().push(Arc::new(table));
    }

    pub fn remove(&self, name: &str) {
        self.tables().retain(|table| table.spec.name != name);
    }

    /// Those that there are now.
    pub(super) fn every(&self) -> Vec<Arc<Table>> {
        self.tables().clone()
    }

    fn tables(&self) -> MutexGuard<'_, Vec<Arc<Table>>> {
        self.tables.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The table of this name, or all of them.
    fn chosen(&self, name: Option<&str>) -> Result<Vec<Arc<Table>>, Problem> {
        let tables = self.tables();
        let Some(name) = name else { return Ok(tables.clone()) };
        match tables.iter().find(|table| table.spec.name == name) {
            Some(table) => Ok(vec![table.clone()]),
            None => {
                let names: Vec<&str> = tables.iter().map(|table| table.spec.name.as_str()).collect();
                let detail = format!("no table {name:?} is configured; there is {}", names.join(", "));
                Err(Problem::new(StatusCode::NOT_FOUND, detail))
            }
        }
    }

    async fn carry_out(&self, table: Option<&str>, request: Request) -> Result<Json<Done>, Problem> {
        let chosen = self.chosen(table)?;
        if let Verb::Pause(scope) = &request.verb
            && *scope != Scope::Table
            && let Some(one_lane) = chosen.iter().find(|table| table.spec.order == Order::Table)
        {
            let name = &one_lane.spec.name;
            return Err(Problem::bad(format!("table {name} is one lane (order: table): pause all of it")));
        }
        let mut done = Done { dry_run: request.dry_run, keys: 0, events: 0, tables: Vec::new() };
        for table in chosen {
            let outcome = table.carry_out(request.clone()).await?;
            done.keys += outcome.keys;
            done.events += outcome.events;
            done.tables.push(DoneInTable { table: table.spec.name.clone(), outcome });
        }
        Ok(Json(done))
    }
}

impl Table {
    async fn carry_out(&self, request: Request) -> Result<Outcome, Problem> {
        let stopping = || Problem::new(StatusCode::SERVICE_UNAVAILABLE, "the relay is stopping");
        let (answer, answered) = oneshot::channel();
        let source = self.source.upgrade().ok_or_else(stopping)?;
        source.send(Command::Verb(request, answer)).map_err(|_| stopping())?;
        drop(source);
        match tokio::time::timeout(CARRIED_OUT_WITHIN, answered).await {
            Ok(Ok(Ok(outcome))) => Ok(outcome),
            Ok(Ok(Err(refusal))) => {
                let code = match refusal {
                    Refusal::NotOwner => StatusCode::CONFLICT,
                    Refusal::Wrong(_) => StatusCode::BAD_REQUEST,
                    Refusal::Failed(_) => StatusCode::SERVICE_UNAVAILABLE,
                };
                Err(Problem::new(code, refusal.to_string()))
            }
            Ok(Err(_)) => Err(stopping()),
            Err(_) => Err(Problem::new(
                StatusCode::SERVICE_UNAVAILABLE,
                "the table did not get to it in time; it was taken back, see /status",
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_is_read_in_pairs() {
        assert_eq!(bytes_of("00ff7A"), Some(vec![0, 255, 0x7a]));
        assert_eq!(bytes_of("0"), None);
        assert_eq!(bytes_of("zz"), None);
    }

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
