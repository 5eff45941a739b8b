use std::{collections::BTreeSet, path::Path};

use super::*;

#[test]
fn the_docs_are_those_of_this_file() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/metrics.md");
    let written = std::fs::read_to_string(path).unwrap_or_default();
    if written != docs() {
        std::fs::write(path, docs()).unwrap();
        panic!("docs/metrics.md was stale; it is written anew: commit it");
    }
}

const RULES: &str = include_str!("../../../helm/whippet-sidecar/files/whippet.rules.yaml");
const DASHBOARD: &str = include_str!("../../../helm/whippet-sidecar/files/dashboard.json");

/// The metrics that a text names, as they are described: a histogram by its name without a suffix.
fn named(text: &str) -> BTreeSet<&str> {
    let word = |c: char| !(c.is_ascii_alphanumeric() || c == '_');
    let histogram = |name: &str| ALL.iter().any(|metric| metric.name == name && metric.kind == "histogram");
    let described = |name| {
        let suffixes = ["_bucket", "_sum", "_count"].into_iter();
        suffixes.filter_map(|suffix| str::strip_suffix(name, suffix)).find(|n| histogram(n)).unwrap_or(name)
    };
    let of_ours = |word: &&str| word.strip_prefix("whippet_").is_some_and(|name| !name.is_empty());
    text.split(word).filter(of_ours).map(described).collect()
}

fn all() -> BTreeSet<&'static str> {
    ALL.iter().map(|metric| metric.name).collect()
}

#[test]
fn the_dashboard_shows_every_metric_and_no_other() {
    assert_eq!(named(DASHBOARD), all(), "scripts/dashboard.py, then `scripts/chart write`");
}

#[test]
fn alerts_and_documents_name_metrics_that_exist() {
    // What else is called like that: tables where there are no schemas, and others.
    let others = ["audit", "holds", "members", "context", "reader", "binlog", "contents"]
        .map(|name| format!("whippet_{name}"));
    let others: BTreeSet<&str> = others.iter().map(String::as_str).collect();
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = ["docs", "docs/runbooks", "docs/decisions"].map(|folder| root.join(folder));
    let files =
        folders.iter().flat_map(|folder| std::fs::read_dir(folder).unwrap()).map(|e| e.unwrap().path());
    let documents =
        files.chain([root.join("README.md")]).filter(|path| path.extension() == Some("md".as_ref()));
    let mut texts = vec![("the alerts".to_owned(), RULES.to_owned())];
    texts.extend(documents.map(|path| (path.display().to_string(), std::fs::read_to_string(&path).unwrap())));
    for (place, text) in &texts {
        let known: BTreeSet<&str> = all().union(&others).copied().collect();
        let unknown: Vec<&str> = named(text).difference(&known).copied().collect();
        assert!(unknown.is_empty(), "{place} names {unknown:?}");
    }
}

#[test]
fn every_alert_has_a_page_and_a_test() {
    let alerts: BTreeSet<&str> =
        RULES.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    assert!(alerts.len() > 15, "{alerts:?}");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pages = std::fs::read_dir(root.join("docs/runbooks")).unwrap();
    let pages: Vec<String> =
        pages.map(|page| page.unwrap().path().file_stem().unwrap().to_string_lossy().into_owned()).collect();
    assert_eq!(pages.iter().map(String::as_str).collect::<BTreeSet<_>>(), alerts);
    let tests = std::fs::read_to_string(root.join("tests/prometheus/whippet.test.yaml")).unwrap();
    for alert in alerts {
        assert!(RULES.contains(&format!("runbook_url: docs/runbooks/{alert}.md")), "{alert}");
        assert!(
            tests.contains(&format!("alertname=\"{alert}\", alertstate=\"firing\", severity")),
            "{alert}"
        );
    }
}

#[test]
fn every_described_metric_is_exposed_and_no_other() {
    let metrics = Metrics::new(&["outbox"]);
    metrics.published("outbox", "orders").acknowledged(Some(Duration::ZERO), Some(3), 1);
    metrics.context_dropped.with_label_values(&["outbox", "denied"]).inc();
    let text = metrics.text();
    let mut exposed: Vec<&str> =
        text.lines().filter_map(|line| line.strip_prefix("# TYPE ")?.split(' ').next()).collect();
    let mut described: Vec<&str> = ALL.iter().map(|metric| metric.name).collect();
    exposed.sort_unstable();
    described.sort_unstable();
    assert_eq!(exposed, described);
}
