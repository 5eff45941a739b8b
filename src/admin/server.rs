//! The HTTP server of the admin address. Reading only: the changing verbs come with the issue on
//! failure.

use std::{net::SocketAddr, sync::Arc};

use axum::{
    Router,
    extract::State,
    http::{StatusCode, header},
    response::{IntoResponse, Response},
    routing::get,
};
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{metrics::Metrics, status::Board};
use crate::relay::window::Window;

#[derive(Clone)]
pub struct Admin {
    pub board: Arc<Board>,
    pub metrics: Arc<Metrics>,
    pub window: Arc<Window>,
}

/// Takes the address; an address in use is a clear error before anything starts.
pub async fn bind(listen: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(listen).await.map_err(|error| anyhow::anyhow!("admin.listen {listen}: {error}"))
}

impl Admin {
    pub async fn serve(self, listener: TcpListener, stop: CancellationToken) {
        let router = Router::new()
            .route("/metrics", get(metrics))
            .route("/livez", get(livez))
            .route("/readyz", get(readyz))
            .route("/status", get(status))
            .with_state(self);
        let served =
            axum::serve(listener, router).with_graceful_shutdown(async move { stop.cancelled().await });
        if let Err(error) = served.await {
            tracing::error!(%error, "the admin address is closed");
        }
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
