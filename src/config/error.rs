//! What is wrong with a configuration, all of it at once, and where.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fmt;
use std::path::PathBuf;

/// Why a configuration could not be loaded. Its Display is the whole message, a line a problem.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The file could not be read.
    #[error("{}: the configuration cannot be read: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file, or what the environment lays over it, is wrong.
    #[error("{}", lines(.0))]
    Invalid(Vec<Problem>),
}

fn lines(problems: &[Problem]) -> String {
    problems.iter().map(Problem::to_string).collect::<Vec<_>>().join("\n")
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where the value was written.
    pub place: Place,
    /// The key's path, such as `tables[0].topic`; empty for the file as a whole.
    pub path: String,
    /// What is wrong and what was expected.
    pub message: String,
}

/// Where a value was written.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Place {
    /// In the file.
    File {
        /// The file's name as it was given.
        name: String,
        /// Line and column, from 1; absent where nothing of the kind was written.
        at: Option<(u64, u64)>,
    },
    /// In the environment.
    Variable(String),
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.place {
            Place::File { name, at: Some((line, column)) } => write!(f, "{name}:{line}:{column}: ")?,
            Place::File { name, at: None } => write!(f, "{name}: ")?,
            Place::Variable(name) => write!(f, "environment variable {name}: ")?,
        }
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)
    }
}

/// Where every value of the layered configuration came from, by its key's path.
#[derive(Debug, Default)]
pub(super) struct Places {
    /// The file's name, for messages.
    pub file: String,
    /// Line and column of each key, or of a list's element.
    pub keys: HashMap<String, (u64, u64)>,
    /// Line and column of each value.
    pub values: HashMap<String, (u64, u64)>,
    /// The environment variable that set a path.
    pub variables: BTreeMap<String, String>,
    /// Paths whose value came through `${…}`: it may be a secret, so no message quotes it.
    pub hidden: HashSet<String>,
}

impl Places {
    /// The problem of `path`, placed where its value was written: for a value that a table has
    /// from `defaults`, there; for a missing one, at the nearest thing around it.
    fn locate(&self, path: &str, which: &HashMap<String, (u64, u64)>) -> (Place, String) {
        let inherited = inherited(path);
        for path in std::iter::once(path).chain(inherited.as_deref()) {
            if let Some(variable) = self.variables.get(path) {
                return (Place::Variable(variable.clone()), path.to_owned());
            }
            if let Some(at) = which.get(path) {
                return (Place::File { name: self.file.clone(), at: Some(*at) }, path.to_owned());
            }
        }
        let around = parents(path).find_map(|parent| self.keys.get(parent));
        // What belongs at the top is missing from the whole of the file, wherever that begins.
        let around = around.or_else(|| self.values.get(""));
        (Place::File { name: self.file.clone(), at: around.copied() }, path.to_owned())
    }

    /// `value` in backquotes where it stands literally in the file; else only where it is from.
    pub fn quote(&self, path: &str, value: &str) -> String {
        let inherited = inherited(path);
        for path in std::iter::once(path).chain(inherited.as_deref()) {
            if self.hidden.contains(path) {
                return "a value from ${…} that is not shown".to_owned();
            }
            if self.variables.contains_key(path) {
                return "another value".to_owned();
            }
        }
        // A URL that stands in the wrong place may have a password in it.
        if value.contains("://") { "a URL that is not shown".to_owned() } else { format!("`{value}`") }
    }
}

/// `tables[0].poll.batch` → `defaults.poll.batch`.
fn inherited(path: &str) -> Option<String> {
    let (_, rest) = path.strip_prefix("tables[")?.split_once("].")?;
    Some(format!("defaults.{rest}"))
}

/// The paths around `path`, nearest first.
fn parents(path: &str) -> impl Iterator<Item = &str> {
    std::iter::successors(Some(path), |path| path.rfind(['.', '[']).map(|end| &path[..end])).skip(1)
}

/// A list's or mapping's child in a path.
pub(super) fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Collects problems while the configuration is read to its end.
#[derive(Debug, Default)]
pub(super) struct Problems {
    pub places: Places,
    list: Vec<Problem>,
    warnings: Vec<String>,
}

impl Problems {
    pub fn new(places: Places) -> Problems {
        Problems { places, ..Problems::default() }
    }

    /// The value at `path` is wrong.
    pub fn add(&mut self, path: &str, message: impl Into<String>) {
        let (place, path) = self.places.locate(path, &self.places.values);
        self.push(Problem { place, path, message: message.into() });
    }

    /// The key at `path` is wrong, whatever its value.
    pub fn add_key(&mut self, path: &str, message: impl Into<String>) {
        let (place, path) = self.places.locate(path, &self.places.keys);
        self.push(Problem { place, path, message: message.into() });
    }

    /// Nothing is at `path`, and something has to be; silent where a wrong value was there, or
    /// around it, since that is reported already.
    pub fn missing(&mut self, path: &str, expected: &str) {
        let known = |p: &Problem| p.path == path || parents(path).any(|parent| parent == p.path);
        if !self.list.iter().any(known) {
            self.add(path, format!("missing; expected {expected}"));
        }
    }

    /// Whether the value at `path` is known to be wrong.
    pub fn has(&self, path: &str) -> bool {
        self.list.iter().any(|problem| problem.path == path)
    }

    /// Something that works, but perhaps not as intended.
    pub fn warn(&mut self, path: &str, message: &str) {
        self.warnings.push(format!("{path}: {message}"));
    }

    /// A value that came by way of `defaults` is checked for each table but reported once.
    fn push(&mut self, problem: Problem) {
        if !self.list.contains(&problem) {
            self.list.push(problem);
        }
    }

    /// `value` and the warnings, if nothing was wrong; else every problem in the file's order.
    pub fn finish<T>(mut self, value: Option<T>) -> Result<(T, Vec<String>), Error> {
        match value {
            Some(value) if self.list.is_empty() => Ok((value, self.warnings)),
            _ => {
                self.list.sort_by(|a, b| a.place.cmp(&b.place));
                Err(Error::Invalid(self.list))
            }
        }
    }
}
