//! What both addresses share, the admin's and ingest's: taking connections, and how a refusal looks.

mod problem;

use std::{net::SocketAddr, sync::Arc, time::Duration};

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
};
use tokio_util::sync::CancellationToken;

pub use self::problem::Problem;

/// A request's head has to be here within this.
const HEAD_WITHIN: Duration = Duration::from_secs(10);
/// What a connection reads ahead, in bytes; a head that is longer and not at its end is refused.
const READ_AT_MOST: usize = 64 << 10;

/// Takes the address; an address in use is a clear error before anything starts.
pub async fn bind(key: &str, listen: SocketAddr) -> anyhow::Result<TcpListener> {
    TcpListener::bind(listen).await.map_err(|error| anyhow::anyhow!("{key} {listen}: {error}"))
}

/// Serves until `stop`; then answers what is under way, and takes nothing new. Dropped before it is done, it cuts off
/// what is left.
pub async fn serve(
    name: &'static str,
    listener: TcpListener,
    router: Router,
    connections_at_most: usize,
    stop: CancellationToken,
) {
    let graceful = GracefulShutdown::new();
    let room = Arc::new(Semaphore::new(connections_at_most));
    let mut connections = JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = accept(&listener, &room) => accepted,
            Some(_) = connections.join_next() => continue,
            () = stop.cancelled() => break,
        };
        let (stream, permit) = match accepted {
            Ok(accepted) => accepted,
            Err(error) => {
                // Too many open files, mostly: the next one may find room.
                tracing::warn!(%error, "cannot accept a connection to the {name} address");
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            }
        };
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEAD_WITHIN)
            .max_buf_size(READ_AT_MOST)
            .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router.clone()));
        let connection = graceful.watch(connection);
        connections.spawn(async move {
            // What goes wrong with a connection is its client's business.
            connection.await.ok();
            drop(permit);
        });
    }
    drop(listener);
    graceful.shutdown().await;
}

async fn accept(
    listener: &TcpListener,
    room: &Arc<Semaphore>,
) -> std::io::Result<(TcpStream, Option<OwnedSemaphorePermit>)> {
    // The semaphore is never closed.
    let permit = room.clone().acquire_owned().await.ok();
    let (stream, _) = listener.accept().await?;
    // An answer is small, and is waited for. A stream that is gone already says so when it is read.
    stream.set_nodelay(true).ok();
    Ok((stream, permit))
}
