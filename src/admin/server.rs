//! The HTTP server of the admin address. Reading is open; what changes something is in `verbs`.

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::{
    Router,
    extract::{DefaultBodyLimit, Request, State},
    http::{StatusCode, header},
    middleware::{self, Next},
    response::{IntoResponse, Response},
    routing::get,
};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{net::TcpListener, sync::Semaphore};
use tokio_util::sync::CancellationToken;

use super::{
    metrics::Metrics,
    status::Board,
    verbs::{self, Desk},
};
use crate::relay::window::Window;

/// A request's head has to be here within this, its answer within [`ANSWER_WITHIN`].
const HEAD_WITHIN: Duration = Duration::from_secs(10);
const ANSWER_WITHIN: Duration = Duration::from_secs(70);
/// The longest body, in bytes.
const BODY_AT_MOST: usize = 256 << 10;
const CONNECTIONS_AT_MOST: usize = 64;

#[derive(Clone)]
pub struct Admin {
    pub board: Arc<Board>,
    pub metrics: Arc<Metrics>,
    pub window: Arc<Window>,
    pub desk: Arc<Desk>,
}

/// Takes the address; an address in use is a clear error before anything starts.
pub async fn bind(listen: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(listen).await.map_err(|error| anyhow::anyhow!("admin.listen {listen}: {error}"))
}

impl Admin {
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let desk = self.desk.clone();
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/status", get(status))
            .with_state(self)
            .merge(verbs::routes().with_state(desk))
            .layer(DefaultBodyLimit::max(BODY_AT_MOST))
            .layer(middleware::from_fn(in_time));
        let graceful = GracefulShutdown::new();
        let connections = Arc::new(Semaphore::new(CONNECTIONS_AT_MOST));
        loop {
            let accepted = tokio::select! {
                accepted = accept(&listener, &connections) => accepted,
                () = stop.cancelled() => break,
            };
            let (stream, permit) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Too many open files, mostly: the next one may find room.
                    tracing::warn!(%error, "cannot accept a connection to the admin address");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let connection = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEAD_WITHIN)
                .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
            let connection = graceful.watch(connection);
            tokio::spawn(async move {
                // What goes wrong with a connection is its client's business.
                connection.await.ok();
                drop(permit);
            });
        }
        graceful.shutdown().await;
    }
}

async fn accept(
    listener: &TcpListener,
    connections: &Arc<Semaphore>,
) -> std::io::Result<(tokio::net::TcpStream, Option<tokio::sync::OwnedSemaphorePermit>)> {
    // The semaphore is never closed.
    let permit = connections.clone().acquire_owned().await.ok();
    let (stream, _) = listener.accept().await?;
    Ok((stream, permit))
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
    match admin.board.is_alive() {
        true => "the loops turn\n".into_response(),
        false => (StatusCode::SERVICE_UNAVAILABLE, "a loop does not turn\n").into_response(),
    }
}

async fn readyz(State(admin): State<Admin>) -> Response {
    match admin.board.is_ready() {
        true => "ready\n".into_response(),
        false => {
            (StatusCode::SERVICE_UNAVAILABLE, "the source database was not reached yet\n").into_response()
        }
    }
}

async fn status(State(admin): State<Admin>) -> Response {
    axum::Json(admin.board.status()).into_response()
}

/// Resident pages of this process times the page size (proc(5), /proc/pid/statm).
fn resident_bytes() -> Option<f64> {
    let statm = std::fs::read_to_string("/proc/self/statm").ok()?;
    let pages: f64 = statm.split_whitespace().nth(1)?.parse().ok()?;
    Some(pages * 4096.0)
}
