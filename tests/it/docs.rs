//! README and docs say what is: links lead somewhere, configurations are good, keys and commands are there.

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use clap::{Parser as _, error::ErrorKind};
use serde_json::Value;
use whippet::cli::Cli;

use crate::harness::{path, whippet};

/// Every page, and its text.
pub fn pages() -> Vec<(PathBuf, String)> {
    let mut pages: Vec<PathBuf> =
        ["README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"].map(path).to_vec();
    for folder in ["docs", "docs/decisions", "docs/runbooks"] {
        let entries = std::fs::read_dir(path(folder)).unwrap().map(|entry| entry.unwrap().path());
        pages.extend(entries.filter(|path| path.extension().is_some_and(|kind| kind == "md")));
    }
    assert!(pages.len() > 15, "{pages:?}");
    pages.into_iter().map(|page| (page.clone(), std::fs::read_to_string(&page).unwrap())).collect()
}

/// Lines outside of blocks of code, and the blocks with their language.
pub fn prose_and_blocks(text: &str) -> (String, Vec<(String, String)>) {
    let (mut prose, mut blocks) = (String::new(), Vec::new());
    let mut block: Option<(String, String, usize)> = None;
    for line in text.lines() {
        let (indent, bare) = (line.len() - line.trim_start().len(), line.trim_start());
        block = match (block, bare.strip_prefix("```")) {
            (None, Some(language)) => Some((language.to_owned(), String::new(), indent)),
            (None, None) => {
                prose += line;
                prose.push('\n');
                None
            }
            (Some((language, content, _)), Some("")) => {
                blocks.push((language, content));
                None
            }
            (Some((language, content, indent)), _) => {
                let line = line.get(indent..).unwrap_or(line.trim_start());
                Some((language, content + line + "\n", indent))
            }
        };
    }
    assert!(block.is_none(), "a block without an end");
    (prose, blocks)
}

/// What stands in backquotes, over the ends of lines too.
pub fn quoted(prose: &str) -> Vec<String> {
    let parts = prose.split('`').skip(1).step_by(2);
    parts.map(|part| part.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}

/// How a heading is called in a link.
fn anchor(heading: &str) -> String {
    let kept = heading.trim().to_lowercase();
    let kept = kept.chars().filter(|c| c.is_alphanumeric() || " -_".contains(*c));
    kept.map(|c| if c == ' ' { '-' } else { c }).collect()
}

#[test]
fn links_lead_somewhere() {
    let mut checked = 0;
    let mut dead = Vec::new();
    for (page, text) in pages() {
        let (prose, _) = prose_and_blocks(&text);
        for (_, rest) in prose.match_indices("](").map(|(at, _)| prose.split_at(at + 2)) {
            let Some((target, _)) = rest.split_once(')') else { continue };
            if target.contains("://") {
                continue;
            }
            let (file, heading) =
                target.split_once('#').map_or((target, None), |(file, it)| (file, Some(it)));
            let file = if file.is_empty() { page.clone() } else { page.parent().unwrap().join(file) };
            let has = |heading: &str| {
                let text = std::fs::read_to_string(&file).unwrap();
                let (prose, _) = prose_and_blocks(&text);
                prose
                    .lines()
                    .filter(|line| line.starts_with('#'))
                    .any(|line| anchor(line.trim_start_matches('#')) == heading)
            };
            if !file.exists() || heading.is_some_and(|heading| !has(heading)) {
                dead.push(format!("{}: {target}", page.display()));
            }
            checked += 1;
        }
    }
    assert!(dead.is_empty(), "{dead:#?}");
    assert!(checked > 40, "{checked}");
}

/// The schema below a path of keys.
fn below<'a>(schema: &'a Value, keys: &[&str]) -> Option<&'a Value> {
    let Some((key, rest)) = keys.split_first() else { return Some(schema) };
    let either = || schema["anyOf"].as_array().into_iter().flatten();
    if let Some(found) = either().find_map(|one| below(one, keys)) {
        return Some(found);
    }
    let key = key.split('[').next().unwrap();
    let child = match &schema["properties"][key] {
        Value::Null => schema.get("additionalProperties").filter(|others| others.is_object())?,
        child => child,
    };
    let child = if child["items"].is_object() { &child["items"] } else { child };
    below(child, rest)
}

fn schema() -> Value {
    serde_json::from_slice(&whippet(&["schema"]).stdout).unwrap()
}

fn keys_of(schema: &Value) -> BTreeSet<String> {
    schema["properties"].as_object().unwrap().keys().cloned().collect()
}

/// A whole configuration is one that has `kafka` and something to read; of others every key is looked for.
#[test]
fn configurations_in_the_docs_are_good() {
    let folder = tempfile::tempdir().unwrap();
    let (schema, file) = (schema(), folder.path().join("docs.yaml"));
    let mut whole = 0;
    for (page, text) in pages() {
        for (_, block) in prose_and_blocks(&text).1.iter().filter(|(language, _)| language == "yaml") {
            // A file of a chart, which scripts/chart tests.
            if block.starts_with("# Chart.yaml")
                || block.starts_with("# templates/")
                || block.starts_with("# values.yaml")
            {
                continue;
            }
            let tree: Value =
                serde_saphyr::from_str(block).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
            if tree.get("kafka").is_some() && (tree.get("source").is_some() || tree.get("ingest").is_some()) {
                std::fs::write(&file, block).unwrap();
                let said = whippet(&["validate", "--config", file.to_str().unwrap()]);
                let said = (said.status.code(), String::from_utf8_lossy(&said.stderr).into_owned());
                assert_eq!(said.0, Some(0), "{}: {}\n{block}", page.display(), said.1);
                whole += 1;
            } else {
                // A part: of the whole, or of a table.
                let part = if tree.as_object().unwrap().keys().all(|key| keys_of(&schema).contains(key)) {
                    &schema
                } else {
                    below(&schema, &["tables"]).unwrap()
                };
                known(&tree, part, &page);
            }
        }
    }
    assert!(whole >= 2, "{whole}");
}

fn known(tree: &Value, schema: &Value, page: &Path) {
    match tree {
        Value::Object(entries) => {
            for (key, value) in entries {
                let child =
                    below(schema, &[key]).unwrap_or_else(|| panic!("{}: no key {key}", page.display()));
                known(value, child, page);
            }
        }
        Value::Array(items) => items.iter().for_each(|item| known(item, schema, page)),
        _ => {}
    }
}

/// `source.stream.slot`, `payload.oversize`: a path in backquotes whose first key is one of ours.
#[test]
fn keys_in_the_docs_are_keys() {
    let schema = schema();
    let table = below(&schema, &["tables"]).unwrap();
    let (top, of_table) = (keys_of(&schema), keys_of(table));
    let mut checked = BTreeSet::new();
    let mut unknown = Vec::new();
    for (page, text) in pages() {
        for token in quoted(&prose_and_blocks(&text).0) {
            let path = token.split(':').next().unwrap();
            let is_path =
                path.contains('.') && path.chars().all(|c| c.is_ascii_lowercase() || "._".contains(c));
            let keys: Vec<&str> = path.split('.').collect();
            let is_key = |name: &str| top.contains(name) || of_table.contains(name);
            // One of Kafka's own begins like one of ours.
            if !is_path || !is_key(keys[0]) || path == "retention.ms" {
                continue;
            }
            // What `kafka.properties` and `object_store.options` take is not ours.
            if below(&schema, &keys).is_none() && below(table, &keys).is_none() {
                unknown.push(format!("{}: {token}", page.display()));
            }
            checked.insert(path.to_owned());
        }
    }
    assert!(unknown.is_empty(), "{unknown:#?}");
    assert!(checked.len() > 30, "{checked:?}");
}

/// A command in a block is whole; one in a sentence may leave out what has to be said.
#[test]
fn commands_in_the_docs_are_commands() {
    let mut checked = 0;
    for (page, text) in pages() {
        let (prose, blocks) = prose_and_blocks(&text);
        let lines =
            blocks.iter().filter(|(language, _)| language == "sh").flat_map(|(_, block)| block.lines());
        let whole = lines.filter(|line| line.starts_with("whippet ")).map(|line| (line.to_owned(), false));
        let mentioned = quoted(&prose).into_iter().filter(|token| token.starts_with("whippet "));
        for (command, is_part) in whole.chain(mentioned.map(|command| (command, true))) {
            checked += 1;
            let words = words(&command);
            // Options that are shown as such.
            let words = words.iter().filter(|word| !["[--dry-run]", "|", "…"].contains(&word.as_str()));
            let Err(error) = Cli::try_parse_from(words) else { continue };
            let fine = match error.kind() {
                ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => true,
                ErrorKind::MissingRequiredArgument
                | ErrorKind::MissingSubcommand
                | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => is_part,
                _ => false,
            };
            assert!(fine, "{}: {command}: {error}", page.display());
        }
    }
    assert!(checked > 40, "{checked}");
}

/// As a shell splits a line, up to a comment or what is done with the output.
pub fn words(line: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (None, '\'' | '"') => quote = Some(c),
            (Some(open), _) if c == open => quote = None,
            (None, '#' | '>' | '|' | ';') => break,
            (None, ' ') => words.push(String::new()),
            _ => words.last_mut().unwrap().push(c),
        }
    }
    words.retain(|word| !word.is_empty());
    words
}

/// `scripts/…`, `src/…`, `tests/…` and `docs/…` in backquotes are there.
#[test]
fn files_in_the_docs_are_there() {
    let mut missing = Vec::new();
    for (page, text) in pages() {
        let (prose, _) = prose_and_blocks(&text);
        for token in quoted(&prose) {
            let file = token.split(' ').next().unwrap();
            let is_file = ["scripts/", "src/", "tests/", "docs/", "config/", "deploy/", "clients/"]
                .iter()
                .any(|folder| file.starts_with(folder));
            // docs/design.md names sources by their place in src.
            let there = || path(file).exists() || path("src").join(file).exists();
            if is_file && !file.contains(['{', '*', '…']) && !there() {
                missing.push(format!("{}: {token}", page.display()));
            }
        }
    }
    assert!(missing.is_empty(), "{missing:#?}");
}
