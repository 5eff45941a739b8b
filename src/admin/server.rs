//! The HTTP server of the admin address. Reading is open; what changes something is in `verbs`.

use std::{sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{
    desk::Desk,
    metrics::Metrics,
    page,
    status::{self, Board},
    verbs,
};
use crate::{http, relay::window::Window};

/// A request is answered within this.
const ANSWER_WITHIN: Duration = Duration::from_secs(70);
/// The longest body, in bytes.
const BODY_AT_MOST: usize = 256 << 10;
const CONNECTIONS_AT_MOST: usize = 64;

#[derive(Clone)]
pub struct Admin {
    /// One of each source.
    pub boards: Vec<Arc<Board>>,
    pub metrics: Arc<Metrics>,
    pub window: Arc<Window>,
    pub desk: Arc<Desk>,
}

impl Admin {
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let desk = self.desk.clone();
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/status", get(show_status))
            .with_state(self)
            .merge(page::routes(desk.clone()))
            .merge(verbs::routes().with_state(desk))
            .layer(DefaultBodyLimit::max(BODY_AT_MOST))
            .layer(middleware::from_fn(in_time));
        http::serve("admin", listener, router, CONNECTIONS_AT_MOST, stop).await;
    }
}

/// Answers in time, whatever the client does with its body.
async fn in_time(request: Request, next: Next) -> Response {
    match tokio::time::timeout(ANSWER_WITHIN, next.run(request)).await {
        Ok(response) => response,
        Err(_) => StatusCode::REQUEST_TIMEOUT.into_response(),
    }
}

async fn metrics(State(admin): State<Admin>) -> Response {
    let used = admin.window.used();
    admin.metrics.in_flight_events.set(i64::try_from(used.events).unwrap_or(i64::MAX));
    admin.metrics.in_flight_bytes.set(i64::try_from(used.bytes).unwrap_or(i64::MAX));
    if let Some(bytes) = resident_bytes() {
        admin.metrics.resident_bytes.set(bytes);
    }
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], admin.metrics.text())
        .into_response()
}

async fn livez(State(admin): State<Admin>) -> Response {
    match admin.boards.iter().all(|board| board.is_alive()) {
        true => "the loops turn\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "a loop does not turn\n").into_response(),
    }
}

async fn readyz(State(admin): State<Admin>) -> Response {
    match admin.boards.iter().all(|board| board.is_ready()) {
        true => "ready\n".into_response(),
        false => {
            (StatusCode::SERVICE_UNAVAILABLE, "the source database was not reached yet\n").into_response()
        }
    }
}

async fn show_status(State(admin): State<Admin>) -> Response {
    axum::Json(status::of_all(&admin.boards)).into_response()
}

/// Resident pages of this process times the page size (proc(5), /proc/pid/statm).
fn resident_bytes() -> Option<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: f64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096.0)
}
