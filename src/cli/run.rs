//! `run`, `validate` and `schema`.

use std::{
    path::Path,
    pin::pin,
    time::{Duration, Instant},
};

use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use super::{
    BAD_CONFIG, DONE, FAILED, log, print,
    reload::{self, Reload},
};
use crate::{app::App, config, doctor};

pub fn run(path: &Path) -> u8 {
    let first = reload::content(path);
    let config = match config::load(path) {
        Ok(config) => config,
        Err(error) => {
            eprintln!("{error}");
            return BAD_CONFIG;
        }
    };
    let set_level = log::start(&config.log);
    end_at_panic();
    // Tests name the places where this process is to die.
    let _failpoints = fail::has_failpoints().then(fail::FailScenario::setup);
    for warning in &config.warnings {
        warn!("{warning}");
    }
    let runtime = match runtime() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("cannot start: {error}");
            return FAILED;
        }
    };
    let code = runtime.block_on(async {
        let app = match App::build(&config).await {
            Ok(app) => app,
            Err(error) => {
                error!(error = format!("{error:#}"), "cannot start");
                return FAILED;
            }
        };
        info!(version = env!("CARGO_PKG_VERSION"), tables = config.all_tables().count(), "whippet starts");
        let stop = CancellationToken::new();
        tokio::spawn(stop_on_signal(stop.clone()));
        let reload = Reload { path: path.to_owned(), reloader: app.reloader(), set_level };
        tokio::spawn(reload.watch(first, stop.clone()));
        // Beside it: a Kafka or a store that is away must not delay the start.
        let checks = tokio::spawn(doctor::may_run(config.clone()));
        let refused = app.refused();
        let mut running = pin!(app.run(stop.clone()));
        let (left, code) = tokio::select! {
            left = &mut running => (left, DONE),
            () = refused.cancelled() => {
                stop.cancel();
                (running.await, FAILED)
            }
            Ok(false) = checks => {
                error!("this configuration would lose events: the relay stops");
                stop.cancel();
                (running.await, FAILED)
            }
        };
        info!(events = left.events, unanswered = left.unanswered, "{}", farewell(left.events));
        code
    });
    // A call of the Kafka client may still wait for a broker that is away.
    runtime.shutdown_background();
    code
}

/// A panic is a fault of our own. A task that ends by it would leave a relay that does half of its work; the next start
/// goes on where this one was.
fn end_at_panic() {
    let tell = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        tell(panic);
        error!(
            panic = panic.to_string(),
            "a fault of whippet's own: it ends, and the next start goes on from here"
        );
        std::process::exit(i32::from(FAILED));
    }));
}

fn farewell(left: usize) -> &'static str {
    match left {
        0 => "stopped; everything that was read is published and recorded",
        _ => "stopped; what is left stays in the outbox and is read again at the next start",
    }
}

pub fn validate(path: &Path) -> u8 {
    match config::load(path) {
        Ok(config) => {
            for warning in &config.warnings {
                eprintln!("warning: {warning}");
            }
            print(&format!("{}: ok, {} table(s)\n", path.display(), config.tables.len()));
            DONE
        }
        Err(error) => {
            eprintln!("{error}");
            BAD_CONFIG
        }
    }
}

pub fn schema() -> u8 {
    print(&format!("{:#}\n", config::schema()));
    DONE
}

/// Two workers: the relay's loop and its sources, beside librdkafka's own threads.
pub fn runtime() -> std::io::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()
}

/// From when on another signal is a second one. Whoever stops a process and its group sends it two at once.
const SECOND_AFTER: Duration = Duration::from_secs(1);

/// Cancels on SIGTERM or SIGINT; a second one ends the process at once, which is safe.
pub async fn stop_on_signal(stop: CancellationToken) {
    use tokio::signal::unix::{SignalKind, signal};
    let (Ok(mut term), Ok(mut int)) = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()))
    else {
        error!("cannot listen for signals");
        return;
    };
    let name = tokio::select! {
        _ = term.recv() => "SIGTERM",
        _ = int.recv() => "SIGINT",
    };
    info!(signal = name, "stopping: no more is read, what is in flight is finished");
    stop.cancel();
    let first = Instant::now();
    while first.elapsed() < SECOND_AFTER {
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    }
    warn!("stopped at once by a second signal; what was in flight may be repeated");
    std::process::exit(i32::from(FAILED));
}
