//! What `whippet doctor` finds, and how it is shown. Each part of the program has its own checks.

use std::fmt::Display;

use rdkafka::error::KafkaError;
use serde::Serialize;
use tracing::{debug, error, warn};

use crate::{
    app,
    config::{Config, ObjectStore, Oversize, Table},
    record::Template,
    sink::{self, Cleanup},
    source::database::Database,
    store::{self, Topic},
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    Ok,
    /// Works, and an operator should know something.
    Warn,
    Fail,
}

/// One check: what it was, how it went, and what to do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    pub verdict: Verdict,
    pub check: &'static str,
    pub says: String,
}

impl Finding {
    pub fn ok(check: &'static str, says: impl Display) -> Finding {
        Finding { verdict: Verdict::Ok, check, says: says.to_string() }
    }

    pub fn warn(check: &'static str, says: impl Display) -> Finding {
        Finding { verdict: Verdict::Warn, check, says: says.to_string() }
    }

    pub fn fail(check: &'static str, says: impl Display) -> Finding {
        Finding { verdict: Verdict::Fail, check, says: says.to_string() }
    }

    pub fn is_warn(&self) -> bool {
        self.verdict == Verdict::Warn
    }

    pub fn is_fail(&self) -> bool {
        self.verdict == Verdict::Fail
    }
}

/// Chunks and the topics that they go to.
const CHUNKS: &str = "kafka: chunks";

/// Everything that is checked.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = source(config).await;
    findings.extend(examine_sink(config).await);
    #[cfg(feature = "sqlite")]
    findings.extend(config.ingest.iter().flat_map(crate::ingest::check::check));
    findings
}

async fn source(config: &Config) -> Vec<Finding> {
    let Some(source) = &config.source else { return Vec::new() };
    match (Database::new(source), app::table_specs(config)) {
        (Ok(database), Ok(specs)) => database.examine(&specs, config.log().as_ref()).await,
        (Err(error), _) => vec![Finding::fail("source", error)],
        (_, Err(error)) => vec![Finding::fail("source", format!("{error:#}"))],
    }
}

/// Where events go.
async fn examine_sink(config: &Config) -> Vec<Finding> {
    let chunks = config.all_tables().any(sends_chunks);
    if config.object_store.is_none() && !chunks {
        return vec![Finding::ok("object store", "none is configured")];
    }
    let mut findings = Vec::new();
    let topics = match topics(config).await {
        Ok(topics) => topics,
        Err(error) => {
            let says = format!("cannot ask what topics keep of their records: {error}");
            findings.push(Finding::warn("kafka: retention", says));
            Vec::new()
        }
    };
    if chunks {
        findings.extend(look_at_chunks(config.all_tables(), &topics));
    }
    match config.object_store.as_ref().map(ObjectStore::open) {
        None => findings.push(Finding::ok("object store", "none is configured")),
        Some(Ok(store)) => {
            let kept = |topic: Cleanup| Topic { name: topic.topic, keeps_for: topic.keeps_for };
            let topics: Vec<Topic> = topics.into_iter().map(kept).collect();
            findings.extend(store::check(&store, &topics).await);
        }
        Some(Err(error)) => findings.push(Finding::fail("object store", error)),
    }
    findings
}

/// What is found of where events go, in the log of a relay that has started; what it finds about its source
/// it says by itself. It goes on whatever is found, but for this: a topic that would lose events. Then it
/// returns `false`.
pub async fn may_run(config: Config) -> bool {
    let findings = examine_sink(&config).await;
    let loses = findings.iter().any(|finding| finding.check == CHUNKS && finding.is_fail());
    for Finding { verdict, check, says } in findings {
        match verdict {
            Verdict::Ok => debug!(check, "{says}"),
            Verdict::Warn => warn!(check, "{says}"),
            Verdict::Fail => error!(check, "{says}"),
        }
    }
    !loses
}

/// The topics that the tables' templates fit; one that a column names is known only when its event comes.
async fn topics(config: &Config) -> Result<Vec<Cleanup>, KafkaError> {
    let patterns: Vec<_> = config.all_tables().filter_map(Pattern::of).collect();
    sink::cleanup(&config.kafka, |name| patterns.iter().any(|pattern| pattern.glob.matches(name))).await
}

/// The names that a table's template can make.
struct Pattern {
    glob: wildmatch::WildMatch,
    /// Only this one.
    is_a_name: bool,
}

impl Pattern {
    fn of(table: &Table) -> Option<Pattern> {
        let template = Template::parse(table.topic.as_deref()?).ok()?;
        let glob = wildmatch::WildMatch::new(&template.fill(|_| Some("*"))?);
        Some(Pattern { glob, is_a_name: template.columns().next().is_none() })
    }
}

fn sends_chunks(table: &Table) -> bool {
    table.payload.oversize == Some(Oversize::Chunk)
}

/// The chunks of an event have one key: a compacted topic would keep the last of them.
fn look_at_chunks<'a>(tables: impl Iterator<Item = &'a Table>, topics: &[Cleanup]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for table in tables.filter(|table| sends_chunks(table)) {
        let Some(Pattern { glob, is_a_name }) = Pattern::of(table) else { continue };
        for topic in topics.iter().filter(|topic| topic.compacted && glob.matches(&topic.topic)) {
            let (name, topic) = (&table.name, &topic.topic);
            let says = format!(
                "topic {topic} is compacted (cleanup.policy), which would delete all chunks of a key but the \
                 last: use payload.oversize: claim_check for table {name}, or another topic"
            );
            findings.push(match is_a_name {
                true => Finding::fail(CHUNKS, says),
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
