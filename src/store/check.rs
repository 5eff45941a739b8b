//! Whether the object store can be used as it is configured, and whether it keeps objects for as long as
//! Kafka keeps the records that refer to them.

use std::time::Duration;

use bytes::Bytes;

use super::{
    Store, StoreError,
    bucket::Rules,
    mend::{Action, mends},
};
use crate::doctor::{Finding, Fix};

const DAY: Duration = Duration::from_hours(24);

/// A topic whose records may refer to objects.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Topic {
    pub name: String,
    /// `None`: for ever.
    pub keeps_for: Option<Duration>,
}

const PUT: &str = "object store: put";
const GET: &str = "object store: get";
const DELETE: &str = "object store: delete";
const RULES: &str = "object store: lifecycle rules";
const VERSIONS: &str = "object store: versions";

/// Puts, reads and deletes an object, and looks at the bucket's rules.
/// `endpoint` is that of the store's options.
pub async fn check(store: &Store, endpoint: Option<&str>, topics: &[Topic]) -> Vec<Finding> {
    let mut findings = probe(store, endpoint).await;
    if let Some(bucket) = &store.bucket
        && !findings.iter().any(Finding::is_fail)
    {
        match bucket.rules().await {
            Ok(rules) => findings.extend(compare(&rules, store.prefix.as_ref(), topics)),
            Err(error) => findings.push(Finding::ok(RULES, format!("not known: {error}"))),
        }
        match bucket.keeps_versions().await {
            Ok(true) => findings.push(Finding::warn(
                VERSIONS,
                format!(
                    "{store} keeps old versions, so `whippet purge` leaves them there; add a rule with \
                     NoncurrentVersionExpiration"
                ),
            )),
            Ok(false) => findings.push(Finding::ok(VERSIONS, "what is deleted is gone")),
            Err(error) => findings.push(Finding::ok(VERSIONS, format!("not known: {error}"))),
        }
    }
    findings
}

async fn probe(store: &Store, endpoint: Option<&str>) -> Vec<Finding> {
    let fix = |action, error: &StoreError| mends(store, endpoint, action, error);
    let key = format!(".whippet-probe/{}", uuid::Uuid::new_v4());
    let uri = store.uri(&key);
    let content = Bytes::from_static(b"put by whippet to see whether it can\n");
    if let Err(error) = store.put(&key, content.clone(), "text/plain").await {
        return vec![Finding::fail(PUT, &error).mended_by(fix(Action::Put, &error))];
    }
    let got = match store.get(&uri, content.len() as u64).await {
        Ok(got) if got == content => Finding::ok(GET, format!("{uri} came back as it went")),
        Ok(_) => Finding::fail(GET, format!("{uri} came back as something else; this is no object store"))
            .mended_by(Fix::Config("object_store.url: (an object store)".into())),
        Err(error @ StoreError::Denied(_)) => {
            Finding::warn(GET, format!("{error}; the relay does without, those who read the payloads do not"))
                .mended_by(fix(Action::Get, &error))
        }
        Err(error) => Finding::fail(GET, &error).mended_by(fix(Action::Get, &error)),
    };
    let deleted = match store.delete(&key).await {
        Ok(()) => Finding::ok(DELETE, format!("{uri} is gone again")),
        Err(error @ StoreError::Denied(_)) => {
            Finding::warn(DELETE, format!("{error}; the relay does without, `whippet purge` does not"))
                .mended_by(fix(Action::Delete, &error))
        }
        Err(error) => Finding::fail(DELETE, &error).mended_by(fix(Action::Delete, &error)),
    };
    vec![Finding::ok(PUT, format!("{store} takes objects")), got, deleted]
}

/// An object that goes before its record leaves a reader with a reference to nothing.
fn compare(rules: &Rules, prefix: &str, topics: &[Topic]) -> Vec<Finding> {
    let mut findings = Vec::new();
    let concerns = |rule: &str| prefix.starts_with(rule) || rule.starts_with(&format!("{prefix}/"));
    for rule in rules.expiring.iter().filter(|rule| concerns(&rule.prefix)) {
        let after = Duration::from_secs(DAY.as_secs().saturating_mul(rule.days));
        for topic in topics {
            let kept = match topic.keeps_for {
                Some(kept) if kept <= after => continue,
                Some(kept) => format!("for {}", humantime::format_duration(kept)),
                None => "for ever".to_owned(),
            };
            let gone =
                if rule.days == 0 { "at its date".into() } else { format!("after {} days", rule.days) };
            findings.push(Finding::warn(
                RULES,
                format!(
                    "rule {:?} deletes objects {gone}, and topic {} keeps the records that refer to them \
                     {kept}; make the rule longer, or retention.ms of the topic shorter",
                    rule.name, topic.name
                ),
            ));
        }
    }
    if findings.is_empty() {
        findings.push(Finding::ok(RULES, "no rule deletes an object before its record"));
    }
    if !rules.takes_unfinished {
        findings.push(Finding::ok(
            RULES,
            "none takes parts of unfinished uploads: one with AbortIncompleteMultipartUpload tidies up after a \
             relay that was killed",
        ));
    }
    findings
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::bucket::Rule;

    #[test]
    fn a_rule_shorter_than_a_topic_is_a_warning() {
        let rule = |prefix: &str, days| Rule { name: "tidy".into(), prefix: prefix.into(), days };
        let topic =
            |name: &str, days: Option<u32>| Topic { name: name.into(), keeps_for: days.map(|d| DAY * d) };
        let topics = [topic("week", Some(7)), topic("month", Some(30)), topic("ever", None)];
        let warned = |prefix: &str, expiring: Vec<Rule>| -> Vec<String> {
            let findings = compare(&Rules { expiring, takes_unfinished: true }, prefix, &topics);
            findings.into_iter().filter(Finding::is_warn).map(|finding| finding.says).collect()
        };
        assert_eq!(warned("shop", vec![rule("", 7)]).len(), 2);
        assert_eq!(
            warned("shop", vec![rule("sh", 7)])[0],
            "rule \"tidy\" deletes objects after 7 days, and topic month keeps the records that refer to them for \
             30days; make the rule longer, or retention.ms of the topic shorter"
        );
        assert_eq!(warned("shop", vec![rule("shop/orders/", 60)]).len(), 1);
        assert_eq!(warned("shop", vec![rule("", 0)]).len(), 3);
        assert_eq!(warned("shop", vec![rule("other", 1), rule("shop2/", 1)]), [""; 0]);
        assert_eq!(warned("shop", vec![]), [""; 0]);
    }
}
