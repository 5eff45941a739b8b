//! What `whippet doctor` finds, and how it is shown. Each part of the program has its own checks.

mod positions;
mod telemetry;
mod token;
mod topics;

use std::fmt::Display;

use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use serde::Serialize;
use tracing::{debug, error, warn};

use crate::{
    app,
    config::{Config, Oversize, Table},
    record::Template,
    sink::{self, Cleanup, Survey},
    source::database::{Database, Error},
    store::{self, Topic},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Works, and an operator should know something.
    Warn,
    /// As it is printed, too.
    #[serde(rename = "FAIL")]
    Fail,
}

/// What mends a finding, to be taken as it is; what only a human knows is in brackets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Fix {
    /// For the source, as somebody who may.
    Sql(String),
    /// For a shell.
    Shell(String),
    /// A key of the configuration.
    Config(String),
    /// A statement for the policy of the relay's account at the object store, as S3 has them.
    Policy(String),
}

impl Fix {
    pub fn text(&self) -> &str {
        match self {
            Fix::Sql(text) | Fix::Shell(text) | Fix::Config(text) | Fix::Policy(text) => text,
        }
    }
}

/// One check: what it was, how it went, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub verdict: Verdict,
    pub check: &'static str,
    pub says: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fix: Option<Fix>,
}

impl Finding {
    pub fn ok(check: &'static str, says: impl Display) -> Finding {
        Finding { verdict: Verdict::Ok, check, says: says.to_string(), fix: None }
    }

    pub fn warn(check: &'static str, says: impl Display) -> Finding {
        Finding { verdict: Verdict::Warn, check, says: says.to_string(), fix: None }
    }

    /// Becomes a finding by what mends it: there is no FAIL without.
    pub fn fail(check: &'static str, says: impl Display) -> Broken {
        Broken(Finding { verdict: Verdict::Fail, check, says: says.to_string(), fix: None })
    }

    pub fn mended_by(self, fix: Fix) -> Finding {
        Finding { fix: Some(fix), ..self }
    }

    pub fn is_warn(&self) -> bool {
        self.verdict == Verdict::Warn
    }

    pub fn is_fail(&self) -> bool {
        self.verdict == Verdict::Fail
    }
}

/// What fails, before it is said what mends it.
#[must_use]
pub struct Broken(Finding);

impl Broken {
    pub fn mended_by(self, fix: Fix) -> Finding {
        self.0.mended_by(fix)
    }
}

/// How far the clock of a server is from ours, by what it says now, in seconds since the Unix epoch. Leases go by the
/// server's clock alone; what suffers are ages and times.
pub async fn clocks<F>(check: &'static str, ask: impl FnOnce() -> F) -> Result<Finding, Error>
where
    F: Future<Output = Result<f64, Error>>,
{
    let here = || chrono::Utc::now().timestamp_micros() as f64 / 1e6;
    let before = here();
    let there = ask().await?;
    let apart = there - f64::midpoint(before, here());
    let says = format!("the server's clock and this host's are {:.3} s apart", apart.abs());
    Ok(match apart.abs() < CLOCKS_APART {
        true => Finding::ok(check, says),
        false => Finding::warn(check, format!("{says}: ages and end-to-end times will be wrong; see to NTP")),
    })
}

/// More than this, in seconds, is seen in what is measured.
const CLOCKS_APART: f64 = 1.0;

/// Chunks and the topics that they go to.
const CHUNKS: &str = "kafka: chunks";

/// Everything that is checked.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = source(config).await;
    let token = token::examine(config).await;
    let may_log_in = !token.as_ref().is_some_and(Finding::is_fail);
    findings.extend(token);
    let survey = match may_log_in {
        true => survey(config).await,
        // Nobody would answer, and why is said.
        false => Err(KafkaError::Global(RDKafkaErrorCode::Authentication)),
    };
    match &survey {
        Ok(survey) => findings.extend(topics::examine(config, survey)),
        Err(error) if may_log_in => findings.push(topics::unreachable(error)),
        Err(_) => {}
    }
    if survey.is_ok() {
        findings.extend(positions::examine(config).await);
    }
    findings.extend(examine_sink(config, survey).await);
    if let Some(url) = &config.telemetry.otlp_endpoint {
        findings.push(telemetry::examine(url).await);
    }
    #[cfg(feature = "sqlite")]
    findings.extend(config.ingest.iter().flat_map(crate::ingest::check::check));
    findings
}

async fn source(config: &Config) -> Vec<Finding> {
    let Some(source) = &config.source else { return Vec::new() };
    match (Database::new(source), app::table_specs(config)) {
        (Ok(database), Ok(specs)) => database.examine(config, &specs).await,
        (Err(error), _) => {
            let fix = "source.url: (postgres://USER@HOST:PORT/DATABASE, mysql://… or sqlite://FILE)";
            vec![Finding::fail("source", error).mended_by(Fix::Config(fix.into()))]
        }
        (_, Err(error)) => {
            let fix = Fix::Shell("whippet validate --config FILE".into());
            vec![Finding::fail("source", format!("{error:#}")).mended_by(fix)]
        }
    }
}

/// The object store, and chunks.
async fn examine_sink(config: &Config, survey: Result<Survey, KafkaError>) -> Vec<Finding> {
    let chunks = config.all_tables().any(sends_chunks);
    if !needs_topics(config) {
        return vec![Finding::ok("object store", "none is configured")];
    }
    let mut findings = Vec::new();
    let topics = match survey {
        Ok(survey) => survey.topics,
        Err(error) => {
            let says = format!("cannot ask what topics keep of their records: {error}");
            findings.push(Finding::warn("kafka: retention", says));
            Vec::new()
        }
    };
    if chunks {
        findings.extend(look_at_chunks(config, &topics));
    }
    let Some(settings) = &config.object_store else {
        findings.push(Finding::ok("object store", "none is configured"));
        return findings;
    };
    // One with a name or a password in it is not shown.
    let endpoint = settings.options.get("endpoint").map(|endpoint| endpoint.expose_now().to_string());
    let endpoint = endpoint.filter(|endpoint| !endpoint.contains('@'));
    match settings.open() {
        Ok(store) => {
            let kept = |topic: Cleanup| Topic { name: topic.topic, keeps_for: topic.keeps_for };
            let topics: Vec<Topic> = topics.into_iter().map(kept).collect();
            findings.extend(store::check(&store, endpoint.as_deref(), &topics).await);
        }
        Err(error) => {
            let fix = Fix::Config("object_store.url, object_store.options: (as it says)".into());
            findings.push(Finding::fail("object store", error).mended_by(fix));
        }
    }
    findings
}

/// Whether how topics are cleaned up is of interest.
fn needs_topics(config: &Config) -> bool {
    config.object_store.is_some() || config.all_tables().any(sends_chunks)
}

/// What is found of where events go, in the log of a relay that has started; what it finds about its source
/// it says by itself. It goes on whatever is found, but for this: a topic that would lose events. Then it
/// returns `false`.
pub async fn may_run(config: Config) -> bool {
    let survey = if needs_topics(&config) { survey(&config).await } else { Ok(Survey::default()) };
    let findings = examine_sink(&config, survey).await;
    let loses = findings.iter().any(|finding| finding.check == CHUNKS && finding.is_fail());
    for Finding { verdict, check, says, fix } in findings {
        let says = match fix {
            Some(fix) => format!("{says}: {}", fix.text()),
            None => says,
        };
        match verdict {
            Verdict::Ok => debug!(check, "{says}"),
            Verdict::Warn => warn!(check, "{says}"),
            Verdict::Fail => error!(check, "{says}"),
        }
    }
    !loses
}

/// The topics that the tables' templates fit; one that a column names is known only when its event comes.
async fn survey(config: &Config) -> Result<Survey, KafkaError> {
    let patterns: Vec<_> = config.all_tables().filter_map(Pattern::of).collect();
    sink::survey(&config.kafka, |name| patterns.iter().any(|pattern| pattern.glob.matches(name))).await
}

/// The names that a table's template can make.
struct Pattern {
    glob: wildmatch::WildMatch,
    /// Where it is this one only.
    name: Option<String>,
}

impl Pattern {
    fn of(table: &Table) -> Option<Pattern> {
        let template = Template::parse(table.topic.as_deref()?).ok()?;
        let glob = wildmatch::WildMatch::new(&template.fill(|_| Some("*"))?);
        let name = template.columns().next().is_none().then(|| template.fill(|_| None));
        Some(Pattern { glob, name: name.flatten() })
    }
}

fn sends_chunks(table: &Table) -> bool {
    table.payload.oversize == Some(Oversize::Chunk)
}

/// The chunks of an event have one key: a compacted topic would keep the last of them.
fn look_at_chunks(config: &Config, topics: &[Cleanup]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for table in config.all_tables().filter(|table| sends_chunks(table)) {
        let Some(Pattern { glob, name: only }) = Pattern::of(table) else { continue };
        for topic in topics.iter().filter(|topic| topic.compacted && glob.matches(&topic.topic)) {
            let (name, topic) = (&table.name, &topic.topic);
            let says = format!(
                "topic {topic} is compacted (cleanup.policy), which would delete all chunks of a key but the \
                 last: use payload.oversize: claim_check for table {name}, or another topic"
            );
            let fix = topics::alter(config, topic, "cleanup.policy=delete");
            findings.push(match only.is_some() {
                true => Finding::fail(CHUNKS, says).mended_by(fix),
                // The table may never have an event for it.
                false => Finding::warn(CHUNKS, says),
            });
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(CHUNKS, "no topic that is known for them is compacted"));
    }
    findings
}
