//! The address of ingest: what is asked of a request, in which order, and how long it may take.

use std::{sync::Arc, time::Duration};

use axum::{
    Json, Router,
    body::{Body, HttpBody as _},
    extract::{DefaultBodyLimit, Path, State, rejection::PathRejection},
    http::{HeaderMap, StatusCode, header},
    response::{IntoResponse, Response},
    routing::{get, post},
};
use bytes::{Bytes, BytesMut};
use futures_util::StreamExt as _;
use serde::Serialize;
use tokio::{
    net::TcpListener,
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Instant,
};
use tokio_util::sync::CancellationToken;
use tracing::warn;

use super::{
    request::{Head, Rules},
    spool::{Intake, Refused},
};
use crate::{
    admin::{metrics::Metrics, token},
    config::{self, Table},
    http::{self, Problem},
};

const CONNECTIONS_AT_MOST: usize = 512;
/// A body has to be here within this, and a second more for each MiB.
const BODY_WITHIN: Duration = Duration::from_secs(10);
/// How long a request waits for room for its body, and for the disk.
const ROOM_WITHIN: Duration = Duration::from_secs(10);
const DISK_WITHIN: Duration = Duration::from_secs(30);
/// When to try again what was refused for want of room.
const AGAIN_AFTER: Duration = Duration::from_secs(1);
/// Smaller bodies need no room of their own.
const SMALL: usize = 16 << 10;
/// The share of the window that bodies may have beside it.
const BODIES_SHARE: usize = 4;
/// Room is counted in these, because a semaphore counts in small numbers.
const UNIT: usize = 1 << 10;

/// The OpenAPI document, which is docs/openapi.yaml.
const OPENAPI: &str = include_str!("../../docs/openapi.yaml");

/// A problem, and the name that its metric has.
type Refusal = (&'static str, Problem);

/// What the address needs.
pub struct Ingest {
    rules: Rules,
    token_file: Option<std::path::PathBuf>,
    intake: Intake,
    /// Room for bodies that are on their way to the disk.
    room: Arc<Semaphore>,
    room_units: usize,
    metrics: Arc<Metrics>,
    openapi: serde_json::Value,
}

#[derive(Debug, Serialize)]
struct Accepted {
    ids: Vec<String>,
}

impl Ingest {
    pub fn new(
        ingest: &config::Ingest,
        table: &Table,
        in_flight_bytes: usize,
        intake: Intake,
        metrics: Arc<Metrics>,
    ) -> anyhow::Result<Ingest> {
        let room_units = (in_flight_bytes / BODIES_SHARE / UNIT).max(SMALL / UNIT);
        Ok(Ingest {
            rules: Rules::new(ingest, table),
            token_file: ingest.token_file.clone(),
            intake,
            room: Arc::new(Semaphore::new(room_units)),
            room_units,
            metrics,
            openapi: serde_saphyr::from_str(OPENAPI)?,
        })
    }

    /// Serves until `stop`; what was begun is answered.
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let router = Router::new()
            .route("/v1/topics/{topic}/events", post(publish))
            .route("/openapi.json", get(openapi))
            .fallback(async || Problem::new(StatusCode::NOT_FOUND, "see /openapi.json for what there is"))
            .method_not_allowed_fallback(async || {
                Problem::new(StatusCode::METHOD_NOT_ALLOWED, "events are sent with POST")
            })
            .layer(DefaultBodyLimit::disable())
            .with_state(Arc::new(self));
        http::serve("ingest", listener, router, CONNECTIONS_AT_MOST, stop).await;
    }

    async fn publish(&self, topic: String, headers: &HeaderMap, body: Body) -> Result<Vec<String>, Refusal> {
        self.authorize(headers)?;
        let head = self.rules.head(topic, headers).map_err(named)?;
        let length = self.length(&head, headers, &body)?;
        // What is surely new is refused before it is read.
        if !self.intake.has_room() && !head.may_be_known() {
            return Err(refusal(&Refused::Full));
        }
        let room = self.room_for(length).await?;
        let body = read(body, length).await?;
        let events = self.rules.events(head, &body).map_err(named)?;
        // The spool has the only copy.
        drop(body);
        let ids = events.iter().map(|event| event.id.clone()).collect();
        match tokio::time::timeout(DISK_WITHIN, self.intake.put(events, room)).await {
            Ok(put) => put.map_err(|refused| refusal(&refused))?,
            // It may be written yet: the id tells, where it comes again.
            Err(_) => return Err(refusal(&Refused::Failed("the disk does not answer".into()))),
        }
        Ok(ids)
    }

    fn authorize(&self, headers: &HeaderMap) -> Result<(), Refusal> {
        let Some(file) = &self.token_file else { return Ok(()) };
        match token::presented(headers).map(|presented| token::name_of(file, presented)).transpose() {
            Ok(Some(Some(_))) => Ok(()),
            Ok(_) => {
                let detail = "needs `Authorization: Bearer` with a token of ingest.token_file";
                Err(("unauthorized", Problem::new(StatusCode::UNAUTHORIZED, detail)))
            }
            Err(error) => {
                warn!(%error, file = %file.display(), "cannot read ingest.token_file");
                let problem =
                    Problem::new(StatusCode::SERVICE_UNAVAILABLE, "ingest.token_file cannot be read");
                Err(("failed", problem.retry_after(AGAIN_AFTER)))
            }
        }
    }

    /// The length of a body, which has to be said. One that is not said may be a body that was forgotten.
    fn length(&self, head: &Head, headers: &HeaderMap, body: &Body) -> Result<usize, Refusal> {
        // As the server understood it, whatever the headers say besides.
        let length = body.size_hint().exact().filter(|_| headers.contains_key(header::CONTENT_LENGTH));
        let Some(length) = length.and_then(|length| usize::try_from(length).ok()) else {
            let detail = "say Content-Length: room for the body is found before it is read";
            return Err(("bad", Problem::new(StatusCode::LENGTH_REQUIRED, detail)));
        };
        let most = self.rules.body_at_most(head);
        if length > most {
            let detail = format!("the body is above {most} bytes");
            return Err(("too_large", Problem::new(StatusCode::PAYLOAD_TOO_LARGE, detail)));
        }
        Ok(length)
    }

    /// Room for a body of this length. One above all there is travels alone.
    async fn room_for(&self, length: usize) -> Result<Option<OwnedSemaphorePermit>, Refusal> {
        if length <= SMALL {
            return Ok(None);
        }
        let units = length.div_ceil(UNIT).min(self.room_units);
        let room = self.room.clone().acquire_many_owned(u32::try_from(units).unwrap_or(u32::MAX));
        match tokio::time::timeout(ROOM_WITHIN, room).await {
            Ok(room) => Ok(room.ok()),
            Err(_) => {
                let detail = "other bodies are on their way; this one found no room";
                let problem = Problem::new(StatusCode::SERVICE_UNAVAILABLE, detail);
                Err(("busy", problem.retry_after(AGAIN_AFTER)))
            }
        }
    }
}

/// A whole body, or nothing of it.
async fn read(body: Body, length: usize) -> Result<Bytes, Refusal> {
    let mut frames = body.into_data_stream();
    let read = async {
        let mut whole: Option<Bytes> = None;
        let mut pieces = BytesMut::new();
        while let Some(frame) = frames.next().await {
            let frame = frame.map_err(|_| ("bad", Problem::bad("the body ended before its length")))?;
            // A small one comes in one piece, and is not copied.
            match whole.take() {
                None if pieces.is_empty() => whole = Some(frame),
                None => pieces.extend_from_slice(&frame),
                Some(first) => {
                    pieces.reserve(length);
                    pieces.extend_from_slice(&first);
                    pieces.extend_from_slice(&frame);
                }
            }
        }
        Ok(whole.unwrap_or_else(|| pieces.freeze()))
    };
    let within = BODY_WITHIN + Duration::from_secs((length >> 20) as u64);
    let slow = || ("slow", Problem::new(StatusCode::REQUEST_TIMEOUT, "the body did not come in time"));
    tokio::time::timeout(within, read).await.unwrap_or_else(|_| Err(slow()))
}

/// Named by what was wrong with the request.
fn named(problem: Problem) -> Refusal {
    let name = match problem.code {
        StatusCode::FORBIDDEN => "topic",
        StatusCode::PAYLOAD_TOO_LARGE => "too_large",
        _ => "bad",
    };
    (name, problem)
}

fn refusal(refused: &Refused) -> Refusal {
    let (name, code) = match refused {
        Refused::Full => ("full", StatusCode::TOO_MANY_REQUESTS),
        Refused::Disk(_) => ("disk", StatusCode::INSUFFICIENT_STORAGE),
        Refused::Failed(_) => ("failed", StatusCode::SERVICE_UNAVAILABLE),
        Refused::Stopping => ("stopping", StatusCode::SERVICE_UNAVAILABLE),
    };
    (name, Problem::new(code, refused.to_string()).retry_after(AGAIN_AFTER))
}

async fn publish(
    State(ingest): State<Arc<Ingest>>,
    topic: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    body: Body,
) -> Response {
    let begun = Instant::now();
    // What cannot be read is no legal topic.
    let topic = topic.map_or_else(|_| String::new(), |Path(topic)| topic);
    match ingest.publish(topic, &headers, body).await {
        Ok(ids) => {
            ingest.metrics.ingest_answered(None, begun.elapsed());
            (StatusCode::ACCEPTED, Json(Accepted { ids })).into_response()
        }
        Err((reason, problem)) => {
            ingest.metrics.ingest_answered(Some(reason), begun.elapsed());
            problem.into_response()
        }
    }
}

async fn openapi(State(ingest): State<Arc<Ingest>>) -> Response {
    Json(&ingest.openapi).into_response()
}
