//! The operator's verbs: `status`, `pause`, `resume`, `parked`, `redrive`, `skip`, `replay`, through the
//! admin address of a running relay.

use std::{path::PathBuf, time::Duration};

use clap::{Args, Subcommand};
use serde_json::{Map, Value, json};

use super::{DONE, FAILED, WRONG_USAGE, print};
use crate::source::hold::key_from_hex;

#[derive(Debug, Args)]
pub struct Address {
    /// The admin address of the relay.
    #[arg(long, env = "WHIPPET_ADMIN", default_value = "http://127.0.0.1:9464")]
    admin: String,
    /// A file with the token (its last word is taken).
    #[arg(long, env = "WHIPPET_ADMIN_TOKEN_FILE")]
    token_file: Option<PathBuf>,
    /// Print what the relay answered, as JSON.
    #[arg(long)]
    json: bool,
}

/// Which held events: those that fit everything that is given.
#[derive(Debug, Args)]
pub struct Which {
    /// As in the configuration; all of them unless given.
    #[arg(long)]
    table: Option<String>,
    #[arg(long)]
    topic: Option<String>,
    #[arg(long)]
    key: Option<String>,
    /// A key that is no text, in hex.
    #[arg(long, conflicts_with = "key", value_parser = hex)]
    key_hex: Option<String>,
}

fn hex(text: &str) -> Result<String, &'static str> {
    key_from_hex(text).map(|_| text.to_owned()).ok_or("expected pairs of hex digits")
}

/// An order number, or a time.
fn bound(text: &str) -> Result<String, &'static str> {
    let is_good = text.parse::<i64>().is_ok() || chrono::DateTime::parse_from_rfc3339(text).is_ok();
    is_good.then(|| text.to_owned()).ok_or("expected an order number, or a time such as 2026-01-31T12:00:00Z")
}

impl Which {
    fn body(&self) -> Map<String, Value> {
        let mut body = Map::new();
        set(&mut body, "table", self.table.as_ref());
        set(&mut body, "topic", self.topic.as_ref());
        set(&mut body, "key", self.key.as_ref());
        set(&mut body, "key_hex", self.key_hex.as_ref());
        body
    }
}

#[derive(Debug, Args)]
pub struct Change {
    /// Count, and change nothing.
    #[arg(long)]
    dry_run: bool,
    /// Why, for the audit log.
    #[arg(long)]
    why: Option<String>,
}

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Show the state of every table.
    Status {
        #[command(flatten)]
        address: Address,
    },
    /// Stop a table, a topic or a key; what comes for it is held, or stays in its table.
    #[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["table", "topic", "key", "key_hex"]))]
    Pause {
        #[command(flatten)]
        address: Address,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        change: Change,
    },
    /// Let a table, a topic or a key go on; what was held is released in order.
    #[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["table", "topic", "key", "key_hex"]))]
    Resume {
        #[command(flatten)]
        address: Address,
        #[command(flatten)]
        which: Which,
        #[command(flatten)]
        change: Change,
    },
    /// List held events, with why they are held.
    Parked {
        #[command(flatten)]
        address: Address,
        #[command(flatten)]
        which: Which,
        #[arg(long)]
        id: Option<String>,
        /// A cause (rejected, gave_up, behind, topic, paused) or a part of the reason.
        #[arg(long)]
        reason: Option<String>,
        #[arg(long, default_value_t = 100)]
        limit: u32,
        /// Show the payload too; needs --id.
        #[arg(long, requires = "id")]
        payload: bool,
    },
    /// Release parked keys: their events are published in order, from the first one on.
    #[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["id", "reason", "all", "topic", "key", "key_hex"]))]
    Redrive {
        #[command(flatten)]
        address: Address,
        #[command(flatten)]
        which: Which,
        /// The key that this event belongs to.
        #[arg(long)]
        id: Option<String>,
        /// A cause (rejected, gave_up) or a part of the reason.
        #[arg(long)]
        reason: Option<String>,
        /// Everything that is parked.
        #[arg(long, conflicts_with_all = ["id", "reason", "topic", "key", "key_hex"])]
        all: bool,
        #[command(flatten)]
        change: Change,
    },
    /// Settle held events without publishing them.
    #[command(group = clap::ArgGroup::new("what").required(true).args(["id", "key", "key_hex"]))]
    Skip {
        #[command(flatten)]
        address: Address,
        #[command(flatten)]
        which: Which,
        #[arg(long)]
        id: Option<String>,
        /// Why, for the audit log.
        #[arg(long, required_unless_present = "dry_run")]
        reason: Option<String>,
        /// Count, and change nothing.
        #[arg(long)]
        dry_run: bool,
    },
    /// Publish rows again that are published and kept (after_publish: mark or keep).
    #[command(group = clap::ArgGroup::new("what").required(true).multiple(true).args(["from", "to", "ids"]))]
    Replay {
        #[command(flatten)]
        address: Address,
        #[arg(long)]
        table: Option<String>,
        /// The first order number, or time of publishing such as 2026-01-31T12:00:00Z.
        #[arg(long, value_parser = bound)]
        from: Option<String>,
        /// The last one.
        #[arg(long, value_parser = bound)]
        to: Option<String>,
        /// Event ids.
        #[arg(long = "id")]
        ids: Vec<String>,
        /// Another topic than the rows' own.
        #[arg(long)]
        topic: Option<String>,
        #[command(flatten)]
        change: Change,
    },
}

fn set<T: Into<Value> + Clone>(body: &mut Map<String, Value>, name: &str, value: Option<&T>) {
    if let Some(value) = value {
        body.insert(name.to_owned(), value.clone().into());
    }
}

/// What went wrong, for stderr, and the exit code.
struct Failed(String, u8);

fn failed(why: String) -> Failed {
    Failed(why, FAILED)
}

impl Verb {
    fn address(&self) -> &Address {
        match self {
            Verb::Status { address }
            | Verb::Pause { address, .. }
            | Verb::Resume { address, .. }
            | Verb::Parked { address, .. }
            | Verb::Redrive { address, .. }
            | Verb::Skip { address, .. }
            | Verb::Replay { address, .. } => address,
        }
    }

    /// Whether everything that was asked for by its id is in the answer: then it is not in a table that has none.
    fn has_found(&self, answer: &Value) -> bool {
        let events = answer["events"].as_u64().unwrap_or_default();
        match self {
            Verb::Parked { id: Some(_), .. } => !list_of(&answer["parked"]).is_empty(),
            Verb::Redrive { id: Some(_), .. } | Verb::Skip { id: Some(_), .. } => events > 0,
            Verb::Replay { from: None, to: None, ids, .. } => events >= ids.len() as u64,
            _ => false,
        }
    }
}

pub fn run(verb: &Verb) -> u8 {
    let address = verb.address();
    let answer = match ask(verb, address) {
        Ok(answer) => answer,
        Err(Failed(why, code)) => {
            eprintln!("{why}");
            return code;
        }
    };
    print(&match verb {
        _ if address.json => format!("{answer:#}\n"),
        Verb::Status { .. } => status(&answer),
        Verb::Parked { .. } => parked(&answer),
        _ => done(verb, &answer),
    });
    for told in list_of(&answer["left_out"]) {
        eprintln!("left out: {}", text(&told["detail"]));
    }
    let not_done = list_of(&answer["failed"]);
    for told in not_done {
        eprintln!("table {}: {}", text(&told["table"]), text(&told["detail"]));
    }
    if not_done.is_empty() || verb.has_found(&answer) { DONE } else { FAILED }
}

fn list_of(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn ask(verb: &Verb, address: &Address) -> Result<Value, Failed> {
    let change = |mut body: Map<String, Value>, change: &Change| {
        body.insert("dry_run".into(), change.dry_run.into());
        set(&mut body, "why", change.why.as_ref());
        body
    };
    match verb {
        Verb::Status { .. } => address.get("/status", &[]),
        Verb::Parked { which, id, reason, limit, payload, .. } => {
            let limit = limit.to_string();
            let mut query = vec![("limit", limit.as_str())];
            for (name, value) in [
                ("table", &which.table),
                ("topic", &which.topic),
                ("key", &which.key),
                ("key_hex", &which.key_hex),
                ("id", id),
                ("reason", reason),
            ] {
                query.extend(value.as_deref().map(|value| (name, value)));
            }
            if *payload {
                query.push(("payload", "true"));
            }
            address.get("/v1/parked", &query)
        }
        Verb::Pause { which, change: how, .. } => address.post("/v1/pause", change(which.body(), how)),
        Verb::Resume { which, change: how, .. } => address.post("/v1/resume", change(which.body(), how)),
        Verb::Redrive { which, id, reason, all, change: how, .. } => {
            let mut body = which.body();
            set(&mut body, "id", id.as_ref());
            set(&mut body, "reason", reason.as_ref());
            body.insert("all".into(), (*all).into());
            address.post("/v1/redrive", change(body, how))
        }
        Verb::Skip { which, id, reason, dry_run, .. } => {
            let mut body = which.body();
            set(&mut body, "id", id.as_ref());
            set(&mut body, "reason", reason.as_ref());
            body.insert("dry_run".into(), (*dry_run).into());
            address.post("/v1/skip", body)
        }
        Verb::Replay { table, from, to, ids, topic, change: how, .. } => {
            let mut body = Map::new();
            set(&mut body, "table", table.as_ref());
            set(&mut body, "from", from.as_ref());
            set(&mut body, "to", to.as_ref());
            body.insert("ids".into(), json!(ids));
            set(&mut body, "topic", topic.as_ref());
            address.post("/v1/replay", change(body, how))
        }
    }
}

impl Address {
    fn url(&self, path: &str) -> String {
        let base = self.admin.trim_end_matches('/');
        let scheme = if base.contains("://") { "" } else { "http://" };
        format!("{scheme}{base}{path}")
    }

    /// `Bearer TOKEN`, where there is a token.
    fn authorization(&self) -> Result<Option<String>, Failed> {
        let Some(file) = &self.token_file else { return Ok(None) };
        let text = std::fs::read_to_string(file)
            .map_err(|error| failed(format!("--token-file {}: {error}", file.display())))?;
        match text.split_whitespace().last() {
            Some(token) => Ok(Some(format!("Bearer {token}"))),
            None => Err(failed(format!("--token-file {} is empty", file.display()))),
        }
    }

    fn agent() -> ureq::Agent {
        let config = ureq::Agent::config_builder()
            .timeout_global(Some(Duration::from_secs(90)))
            .http_status_as_error(false);
        config.build().into()
    }

    fn get(&self, path: &str, query: &[(&str, &str)]) -> Result<Value, Failed> {
        let mut request = Self::agent().get(self.url(path)).query_pairs(query.iter().copied());
        if let Some(authorization) = self.authorization()? {
            request = request.header("authorization", authorization);
        }
        self.answer(request.call())
    }

    fn post(&self, path: &str, body: Map<String, Value>) -> Result<Value, Failed> {
        let mut request = Self::agent().post(self.url(path)).header("content-type", "application/json");
        if let Some(authorization) = self.authorization()? {
            request = request.header("authorization", authorization);
        }
        self.answer(request.send(Value::Object(body).to_string()))
    }

    fn answer(&self, answer: Result<ureq::http::Response<ureq::Body>, ureq::Error>) -> Result<Value, Failed> {
        let unreachable = |error: ureq::Error| {
            let cure = "is the relay running, and --admin its admin.listen?";
            failed(format!("{} does not answer: {error}; {cure}", self.admin))
        };
        let mut answer = answer.map_err(unreachable)?;
        let status = answer.status();
        let text = answer.body_mut().read_to_string().map_err(unreachable)?;
        let value: Value = serde_json::from_str(&text).unwrap_or(Value::String(text));
        if status.is_success() {
            return Ok(value);
        }
        let detail = value["detail"].as_str().or(value.as_str()).unwrap_or_default().trim().to_owned();
        let cure = match (status.as_u16(), &self.token_file) {
            (401, None) => " (give --token-file)",
            _ => "",
        };
        // A request that it does not take as it is.
        let code = if status.as_u16() == 400 { WRONG_USAGE } else { FAILED };
        Err(Failed(format!("the relay refused ({status}): {detail}{cure}"), code))
    }
}

/// What was done, in a sentence.
fn done(verb: &Verb, answer: &Value) -> String {
    let (keys, events) =
        (answer["keys"].as_u64().unwrap_or_default(), answer["events"].as_u64().unwrap_or_default());
    let dry = answer["dry_run"].as_bool().unwrap_or_default();
    let text = match verb {
        Verb::Pause { .. } if keys == 0 => "it was paused already".to_owned(),
        Verb::Pause { .. } => if dry { "would be paused" } else { "paused" }.to_owned(),
        Verb::Resume { .. } if keys == 0 => "it was not paused".to_owned(),
        Verb::Resume { .. } => {
            format!("{}resumed; {events} held event(s) released", if dry { "would be " } else { "" })
        }
        Verb::Replay { .. } => {
            format!("{events} event(s) {} published again", if dry { "would be" } else { "are being" })
        }
        _ if events == 0 => "nothing that is held fits".to_owned(),
        Verb::Skip { .. } => {
            format!("{events} event(s) of {keys} key(s) {}skipped", if dry { "would be " } else { "" })
        }
        _ => format!("{events} event(s) of {keys} key(s) {}released", if dry { "would be " } else { "" }),
    };
    format!("{text}\n")
}

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".into(),
        Value::String(text) => text.clone(),
        Value::Number(number) if number.is_f64() => format!("{:.1}", number.as_f64().unwrap_or_default()),
        other => other.to_string(),
    }
}

/// Columns as wide as what is in them.
fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.first().map_or(0, Vec::len);
    let width = |column: usize| rows.iter().map(|row| row[column].chars().count()).max().unwrap_or(0);
    let widths: Vec<usize> = (0..count).map(width).collect();
    let mut text = String::new();
    for row in rows {
        let line: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        text.push_str(line.join("  ").trim_end());
        text.push('\n');
    }
    text
}

fn status(answer: &Value) -> String {
    let of = |value: &Value, names: &[&str]| names.iter().map(|name| text(&value[name])).collect::<Vec<_>>();
    let heads = [
        "TABLE",
        "STATE",
        "PENDING",
        "OLDEST s",
        "IN FLIGHT",
        "PARKED KEYS",
        "PARKED",
        "HELD",
        "LAST PUBLISH",
    ];
    let names = [
        "name",
        "state",
        "pending",
        "oldest_pending_age_seconds",
        "in_flight",
        "parked_keys",
        "parked_events",
        "held_events",
        "last_publish",
    ];
    let mut rows = vec![heads.map(str::to_owned).to_vec()];
    let tables = answer["tables"].as_array().cloned().unwrap_or_default();
    rows.extend(tables.iter().map(|table| of(table, &names)));
    let mut out =
        format!("{} {} ({})\n\n", text(&answer["replica"]), text(&answer["role"]), text(&answer["version"]));
    out.push_str(&columns(&rows));
    let group = answer["group"].as_array().cloned().unwrap_or_default();
    if group.len() > 1 {
        let heads = ["RELAY", "EPOCH", "BUCKETS", "NOT SHARED", "RENEWS WITHIN s"];
        let names = ["replica", "epoch", "buckets", "not_shared", "expires_in_seconds"];
        let mut rows = vec![heads.map(str::to_owned).to_vec()];
        rows.extend(group.iter().map(|member| of(member, &names)));
        out.push('\n');
        out.push_str(&columns(&rows));
    }
    let list = |value: &Value| -> Vec<String> { value.as_array().into_iter().flatten().map(text).collect() };
    let blocked = list(&answer["blocked_topics"]);
    if !blocked.is_empty() {
        out.push_str(&format!("\ntopics that cannot be written to: {}\n", blocked.join(", ")));
    }
    if let Some(error) = answer["last_source_error"].as_str() {
        out.push_str(&format!("\nsource: {error}\n"));
    }
    if let Some(error) = answer["config_refused"].as_str() {
        out.push_str(&format!("\nthe configuration file is refused, and the old one goes on: {error}\n"));
    }
    for table in &tables {
        let paused = list(&table["paused"]);
        if !paused.is_empty() {
            out.push_str(&format!("\n{}: paused: {}\n", text(&table["name"]), paused.join(", ")));
        }
        if let Some(reason) = table["state_reason"].as_str() {
            out.push_str(&format!("\n{}: {}: {reason}\n", text(&table["name"]), text(&table["state"])));
        }
        if let Some(error) = table["last_error"].as_str() {
            let at = text(&table["last_error_at"]);
            out.push_str(&format!("\n{}: last error ({at}): {error}\n", text(&table["name"])));
        }
    }
    out
}

fn parked(answer: &Value) -> String {
    let held = answer["parked"].as_array().cloned().unwrap_or_default();
    if held.is_empty() {
        return "nothing is held\n".into();
    }
    if let [one] = held.as_slice()
        && !one["payload"].is_null()
    {
        return one
            .as_object()
            .into_iter()
            .flatten()
            .fold(String::new(), |out, (name, value)| format!("{out}{name:12} {}\n", text(value)));
    }
    let mut rows: Vec<Vec<String>> = vec![
        ["TABLE", "PLACE", "ID", "TOPIC", "KEY", "CAUSE", "TRIES", "SINCE", "REASON"]
            .map(str::to_owned)
            .to_vec(),
    ];
    for event in &held {
        let names = ["table", "place", "id", "topic", "key", "cause", "attempts", "since", "reason"];
        rows.push(names.iter().map(|name| text(&event[name])).collect());
    }
    let mut out = columns(&rows);
    if answer["more"].as_bool() == Some(true) {
        out.push_str("… and more: narrow it down, or raise --limit\n");
    }
    out
}
