//! The collector that traces go to. One that is away costs spans and nothing else, so it is no FAIL.

use std::time::Duration;

use tokio::net::TcpStream;
use url::Url;

use super::{Finding, Fix};

const COLLECTOR: &str = "telemetry: collector";
const ANSWERS_WITHIN: Duration = Duration::from_secs(2);

pub(super) async fn examine(url: &str) -> Finding {
    let at = Url::parse(url).ok().and_then(|url| {
        Some((url.host_str()?.trim_matches(['[', ']']).to_owned(), url.port_or_known_default()?))
    });
    let Some((host, port)) = at else {
        return Finding::ok(COLLECTOR, format!("{url} names no port to look at"));
    };
    let why = match tokio::time::timeout(ANSWERS_WITHIN, TcpStream::connect((host.as_str(), port))).await {
        Ok(Ok(_)) => return Finding::ok(COLLECTOR, format!("{host}:{port} takes connections")),
        Ok(Err(error)) => error.to_string(),
        Err(_) => "no answer in time".into(),
    };
    let says = format!("{host}:{port} cannot be reached ({why}): spans are lost, events are not");
    let fix = Fix::Config("telemetry.otlp_endpoint: (a collector that can be reached from here)".into());
    Finding::warn(COLLECTOR, says).mended_by(fix)
}
