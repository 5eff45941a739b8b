//! The blocks of code of a page, in their order: each is run as it stands there, or it is said why not.

use std::{
    collections::VecDeque,
    path::Path,
    process::{Command, Output},
};

use serde_json::{Map, Value, json};

use crate::{
    docs::{pages, prose_and_blocks},
    harness::{World, kafka, path, whippet},
};

/// A page of which every block has to be gone through.
pub struct Page {
    name: &'static str,
    blocks: VecDeque<(String, String)>,
}

impl Page {
    pub fn of(name: &'static str) -> Page {
        let text = std::fs::read_to_string(path(name)).unwrap();
        Page { name, blocks: prose_and_blocks(&text).1.into() }
    }

    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The next block, which is of this language.
    pub fn next(&mut self, language: &str) -> String {
        let (found, text) =
            self.blocks.pop_front().unwrap_or_else(|| panic!("{}: no more blocks", self.name));
        assert_eq!(found, language, "{}: {text}", self.name);
        text
    }

    /// The next block is run by another file, which has these words.
    pub fn run_by(&mut self, language: &str, file: &str, words: &str) {
        self.next(language);
        let runs = std::fs::read_to_string(path(file)).unwrap();
        assert!(runs.contains(words), "{}: {file} has no {words:?}", self.name);
    }

    /// The next block, which begins so, is not run, and why.
    pub fn not_run(&mut self, language: &str, begin: &str, _why: &str) {
        let text = self.next(language);
        assert!(text.starts_with(begin), "{}: {text}", self.name);
    }
}

impl Drop for Page {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            assert!(
                self.blocks.is_empty(),
                "{}: neither run nor said why not: {:#?}",
                self.name,
                self.blocks
            );
        }
    }
}

#[test]
fn every_page_with_code_is_gone_through() {
    let tests = include_str!("docs_run.rs");
    for (page, text) in pages() {
        let name = page.strip_prefix(path("")).unwrap().display().to_string();
        assert_eq!(
            !prose_and_blocks(&text).1.is_empty(),
            tests.contains(&format!("Page::of(\"{name}\")")),
            "{name}: docs_run.rs goes through its blocks, or it has none"
        );
    }
}

/// What the reader has instead of what the page says. All of it has to be there.
pub fn bind(text: &str, values: &[(&str, &str)]) -> String {
    values.iter().fold(text.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "no {from:?} in {text}");
        text.replace(from, to)
    })
}

/// Runs a script in a folder as a shell would that has `whippet`.
pub fn shell(script: &str, folder: &Path, environment: &[(&str, &str)]) -> Output {
    let program = Path::new(env!("CARGO_BIN_EXE_whippet")).parent().unwrap();
    let places = format!("{}:{}", program.display(), std::env::var("PATH").unwrap());
    let mut command = Command::new("sh");
    command.args(["-ec", script]).current_dir(folder).env("PATH", places);
    command.envs(environment.iter().copied()).output().unwrap()
}

/// The same where it succeeds; what it printed.
pub fn printed(script: &str, folder: &Path, environment: &[(&str, &str)]) -> String {
    let output = shell(script, folder, environment);
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{script}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// A part of a configuration, as a whole one that is good.
pub fn validate(world: &World, part: &str) -> String {
    let part: Value = serde_saphyr::from_str(part).unwrap();
    let mut whole = json!({
        "source": { "url": world.url }, "kafka": { "bootstrap_servers": kafka() }, "tables": [{ "name": "outbox" }],
    });
    lay_over(whole.as_object_mut().unwrap(), part.as_object().unwrap());
    let file = world.write("part.yaml", &whole.to_string());
    let said = whippet(&["validate", "--config", &file]);
    assert!(said.status.success(), "{part}: {}", String::from_utf8_lossy(&said.stderr));
    whole.to_string()
}

fn lay_over(whole: &mut Map<String, Value>, part: &Map<String, Value>) {
    for (key, value) in part {
        match (whole.get_mut(key), value) {
            (Some(Value::Object(whole)), Value::Object(part)) => lay_over(whole, part),
            _ => {
                whole.insert(key.clone(), value.clone());
            }
        }
    }
}
