//! What the demo shows: a live table on a terminal, plain lines elsewhere.

use std::{
    fmt::Write as _,
    io::{IsTerminal as _, Write as _},
    net::SocketAddr,
    path::Path,
    time::{Duration, Instant},
};

use super::{Progress, reader::Received, verdict::Summary};
use crate::{
    admin::status::Status,
    config::Config,
    consume::Travelled,
    record::wire::{self, hex, sha256},
};

const LINE_EVERY: Duration = Duration::from_secs(1);
const BAR: usize = 30;

pub struct Screen {
    live: bool,
    color: bool,
    events: usize,
    started: Instant,
    last_line: Option<Instant>,
    /// Lines of the table that stand on the terminal.
    drawn: usize,
}

impl Screen {
    pub fn new(events: usize) -> Screen {
        let live = std::io::stdout().is_terminal();
        let color = live && std::env::var_os("NO_COLOR").is_none();
        Screen { live, color, events, started: Instant::now(), last_line: None, drawn: 0 }
    }

    pub fn begin(
        &mut self,
        config: &Config,
        folder: &Path,
        broker: &str,
        admin: Option<SocketAddr>,
        ingest: Option<SocketAddr>,
    ) {
        let mut text = String::new();
        let _ = writeln!(text, "{}\n", self.bold("whippet demo: from a committed row to a Kafka record"));
        let _ = writeln!(text, "  database   SQLite, {}", folder.join("shop.db").display());
        let _ = writeln!(
            text,
            "  broker     Kafka protocol inside this process, {broker} (a stand-in, not a real broker)"
        );
        if let Some(store) = &config.object_store {
            let _ = writeln!(text, "  payloads   that do not fit into a record: {}, or in chunks", store.url);
        }
        if let Some(admin) = admin {
            let _ = writeln!(text, "  admin      http://{admin}/status and /metrics");
        }
        if let Some(ingest) = ingest {
            let _ = writeln!(
                text,
                "  ingest     http://{ingest}, every fourth event; the spool is in {}",
                folder.display()
            );
        }
        let tables: Vec<&str> = config.all_tables().map(|table| table.name.as_str()).collect();
        let _ = writeln!(text, "  tables     {}\n", tables.join(", "));
        print(&text);
    }

    pub fn draw(&mut self, progress: &Progress, status: &Status) {
        if self.live {
            let table = self.table(progress, status);
            let mut text = String::new();
            if self.drawn > 0 {
                // Up to where the table began, and clear to the end of the screen.
                let _ = write!(text, "\x1b[{}A\x1b[J", self.drawn);
            }
            text.push_str(&table);
            self.drawn = table.lines().count();
            print(&text);
        } else if self.last_line.is_none_or(|last| last.elapsed() >= LINE_EVERY) {
            self.last_line = Some(Instant::now());
            let (p50, p99) = lags(progress);
            print(&format!(
                "{:>5.1} s  committed {}  rolled back {}  consumed {}  lag p50 {p50} p99 {p99}\n",
                self.started.elapsed().as_secs_f64(),
                progress.expected.len(),
                progress.rolled_back,
                progress.received.len(),
            ));
        }
    }

    fn table(&self, progress: &Progress, status: &Status) -> String {
        let (written, seen) = (progress.expected.len(), progress.received.len());
        let seconds = self.started.elapsed().as_secs_f64().max(0.001);
        let (p50, p99) = lags(progress);
        let parked: u64 = status.tables.iter().map(|table| table.parked_events).sum();
        let mut text = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "  {name:<12}{value}");
        };
        row("committed", format!("{written:>8}  {}", self.bar(written)));
        row("consumed", format!("{seen:>8}  {}", self.bar(seen)));
        row("rolled back", format!("{:>8}  never to be seen", progress.rolled_back));
        row("parked", format!("{parked:>8}"));
        row("rate", format!("{:>8.0}  events/s", seen as f64 / seconds));
        row("lag", format!("{p50:>8}  p50, {p99} p99, from commit to consumer"));
        for (name, travelled) in [("claim check", "reference"), ("chunks", "chunks")] {
            let large = progress.received.iter().find(|one| one.event.travelled.name() == travelled);
            row(name, large.map_or_else(|| format!("{:>8}", "-"), in_short));
        }
        if let Some(last) = progress.received.last() {
            let (key, place) = (String::from_utf8_lossy(last.key()), &last.event.place);
            row("last event", format!("{} of {key} to {} [{}]", kind(last), place.topic, place.partition));
            for (name, _) in &last.event.headers.onward().0 {
                let value = last.event.headers.text(name).unwrap_or_default();
                row("", self.dim(&format!("{name}: {value}")));
            }
        }
        text
    }

    fn bar(&self, count: usize) -> String {
        let filled = (BAR * count / self.events.max(1)).min(BAR);
        let bar = format!("{}{}", "█".repeat(filled), "░".repeat(BAR - filled));
        if self.color { format!("\x1b[36m{bar}\x1b[0m") } else { bar }
    }

    pub fn end(&mut self, progress: &Progress, verdict: &Result<Summary, Vec<String>>) {
        let seconds = self.started.elapsed().as_secs_f64();
        let (p50, p99) = lags(progress);
        let mut text = String::from("\n");
        match verdict {
            Ok(summary) => {
                let _ = writeln!(
                    text,
                    "{} every one of {} committed events came back: in order for each of {} keys, byte for byte, \
                     with its request context; {} events of rolled-back transactions stayed away.",
                    self.paint("32", "ok:"),
                    summary.events,
                    summary.keys,
                    progress.rolled_back,
                );
                let _ = writeln!(
                    text,
                    "    {seconds:.1} s in all; from commit to consumer p50 {p50}, p99 {p99}."
                );
            }
            Err(wrong) => {
                let _ = writeln!(text, "{} {} thing(s) are wrong:", self.paint("31", "FAILED:"), wrong.len());
                for one in wrong.iter().take(10) {
                    let _ = writeln!(text, "  - {one}");
                }
            }
        }
        let large: Vec<&Received> = progress.received.iter().filter(|one| one.sha256.is_some()).collect();
        if !large.is_empty() {
            text.push_str(
                "\nToo large for a record, and read back by the consumer kit, as `whippet consume` does:\n",
            );
        }
        large.iter().for_each(|one| text.push_str(&self.in_full(progress, one)));
        print(&text);
    }

    /// An event that did not fit into a record: how it travelled, and that it is what was written.
    fn in_full(&self, progress: &Progress, one: &Received) -> String {
        let (event, place) = (&one.event, &one.event.place);
        let size = one.payload().len();
        let mut text = String::new();
        let mut row = |name: &str, value: String| {
            let _ = writeln!(text, "    {name:<10}{value}");
        };
        row("event", format!("{} of {}, {size} bytes", kind(one), String::from_utf8_lossy(one.key())));
        match event.travelled {
            Travelled::Chunks(count) => row("sent", format!("in {count} chunks: {place}")),
            _ => row("sent", format!("as a claim check: {place}")),
        }
        if let Some(uri) = event.headers.text(wire::REF_URI) {
            row("object", uri.to_owned());
        }
        let written = progress.expected.iter().find(|written| written.id == one.id());
        let written = written.map_or_else(String::new, |written| hex(&sha256(&written.payload)));
        let read = one.sha256.as_deref().unwrap_or_default();
        let verdict = if read == written { self.paint("32", "equal") } else { self.paint("31", "DIFFERENT") };
        row("written", format!("sha256 {written}"));
        row("read back", format!("sha256 {read}  {verdict}"));
        format!("\n{text}")
    }

    pub fn keep(&self, admin: SocketAddr) {
        print(&format!(
            "\nThe relay goes on: http://{admin}/status, /metrics, /readyz, /livez. Ctrl-C ends it.\n"
        ));
    }

    fn bold(&self, text: &str) -> String {
        self.paint("1", text)
    }

    fn dim(&self, text: &str) -> String {
        self.paint("2", text)
    }

    fn paint(&self, code: &str, text: &str) -> String {
        if self.color { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }
}

fn print(text: &str) {
    let mut out = std::io::stdout().lock();
    // A reader that went away (`| head`) is no reason to fail.
    out.write_all(text.as_bytes()).and_then(|()| out.flush()).ok();
}

fn kind(one: &Received) -> &str {
    one.event.kind().unwrap_or("event")
}

/// An event that did not fit into a record, in a line.
fn in_short(one: &Received) -> String {
    let how = match one.event.travelled {
        Travelled::Chunks(count) => format!("in {count} records"),
        _ => "in the folder".to_owned(),
    };
    let digits = one.sha256.as_deref().unwrap_or_default().get(..16).unwrap_or_default();
    format!("{:>8}  bytes, {how}, read back with sha256 {digits}…", one.payload().len())
}

/// p50 and p99 from commit to consumer, of the first appearances.
fn lags(progress: &Progress) -> (String, String) {
    let committed: std::collections::HashMap<&str, Instant> =
        progress.expected.iter().map(|event| (event.id.as_str(), event.committed)).collect();
    let mut lags: Vec<Duration> = progress
        .received
        .iter()
        .filter_map(|record| Some(record.at.saturating_duration_since(*committed.get(record.id())?)))
        .collect();
    lags.sort_unstable();
    let at = |share: f64| match lags.len() {
        0 => "-".to_owned(),
        count => {
            format!("{:.1} ms", lags[((count as f64 * share) as usize).min(count - 1)].as_secs_f64() * 1e3)
        }
    };
    (at(0.5), at(0.99))
}
