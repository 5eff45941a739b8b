//! `demo`.

use tokio_util::sync::CancellationToken;
use tracing_subscriber::EnvFilter;

use super::{
    DONE, FAILED,
    run::{runtime, stop_on_signal},
};
use crate::demo;

pub fn demo(events: usize, ingest: bool, keep: bool) -> u8 {
    // What goes wrong is shown; what goes well is on the screen already.
    tracing_subscriber::fmt()
        .with_env_filter(EnvFilter::new("error,whippet=warn"))
        .with_writer(std::io::stderr)
        .init();
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start: {error}");
            return FAILED;
        }
    };
    let good = runtime.block_on(async {
        let stop = CancellationToken::new();
        tokio::spawn(stop_on_signal(stop.clone()));
        Box::pin(demo::run(events, ingest, keep, stop)).await
    });
    match good {
        Ok(true) => DONE,
        Ok(false) => FAILED,
        Err(error) => {
            eprintln!("the demo failed: {error:#}");
            FAILED
        }
    }
}
