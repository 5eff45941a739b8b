//! What `whippet doctor` finds, and how it is shown. Each part of the program has its own checks.

use std::fmt::Display;

use rdkafka::error::KafkaError;
use serde::Serialize;
use tracing::{debug, error, warn};

use crate::{
    app,
    config::{Config, Table},
    record::Template,
    sink,
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

/// Everything that is checked.
pub async fn examine(config: &Config) -> Vec<Finding> {
    let mut findings = source(config).await;
    findings.extend(store(config).await);
    findings
}

async fn source(config: &Config) -> Vec<Finding> {
    let specs = app::table_specs(config);
    match (Database::new(&config.source), specs) {
        (Ok(database), Ok(specs)) => database.examine(&specs, config.log().as_ref()).await,
        (Err(error), _) => vec![Finding::fail("source", error)],
        (_, Err(error)) => vec![Finding::fail("source", format!("{error:#}"))],
    }
}

async fn store(config: &Config) -> Vec<Finding> {
    let Some(configured) = &config.object_store else {
        return vec![Finding::ok("object store", "none is configured")];
    };
    let mut findings = Vec::new();
    let topics = match topics(config).await {
        Ok(topics) => topics,
        Err(error) => {
            let says = format!("cannot ask how long topics keep their records: {error}");
            findings.push(Finding::warn("kafka: retention", says));
            Vec::new()
        }
    };
    match configured.open() {
        Ok(store) => findings.extend(store::check(&store, &topics).await),
        Err(error) => findings.push(Finding::fail("object store", error)),
    }
    findings
}

/// What is found about the object store, in the log of a relay that has started, which goes on whatever that
/// is. What it finds about its source it says by itself.
pub async fn log(config: Config) {
    for Finding { verdict, check, says } in store(&config).await {
        match verdict {
            Verdict::Ok => debug!(check, "{says}"),
            Verdict::Warn => warn!(check, "{says}"),
            Verdict::Fail => error!(check, "{says}"),
        }
    }
}

/// The topics that the tables' templates fit; one that a column names is known only when its event comes.
async fn topics(config: &Config) -> Result<Vec<Topic>, KafkaError> {
    let glob = |table: &Table| Template::parse(table.topic.as_deref()?).ok()?.fill(|_| Some("*"));
    let globs: Vec<_> =
        config.tables.iter().filter_map(glob).map(|glob| wildmatch::WildMatch::new(&glob)).collect();
    let found = sink::retention(&config.kafka, |name| globs.iter().any(|glob| glob.matches(name))).await?;
    Ok(found.into_iter().map(|(name, keeps_for)| Topic { name, keeps_for }).collect())
}
