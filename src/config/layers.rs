//! The environment over the file: `WHIPPET__SOURCE__URL`, `WHIPPET__TABLES__0__TOPIC`.

use std::collections::BTreeMap;

use config::{Map, Source, Value as Layered, ValueKind};
use serde_json::Value;

use super::error::{Problems, join};

const PREFIX: &str = "WHIPPET__";
/// Everything hangs under one root, so that a top-level key is never read as a path expression.
const ROOT: &str = "root";
/// A list as long as this is a slip of the index.
const MOST_ELEMENTS: usize = 1000;

/// One override: its value and the path it goes to.
#[derive(Clone, Debug)]
pub(super) struct Override {
    expression: String,
    /// The last level where a property's name has dots, which an expression cannot hold.
    property: Option<String>,
    value: String,
}

/// The overrides in `env`; their paths are noted in `problems.places`.
pub(super) fn overrides(env: &BTreeMap<String, String>, problems: &mut Problems) -> Vec<Override> {
    let mut found = Vec::new();
    for (name, value) in env {
        let Some(levels) = name.strip_prefix(PREFIX) else { continue };
        let levels: Vec<String> = levels.split("__").map(str::to_ascii_lowercase).collect();
        let legal = |level: &String| {
            !level.is_empty() && level.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c))
        };
        let index = |level: &String| level.parse::<usize>().is_ok_and(|index| index >= MOST_ELEMENTS);
        if !levels.iter().all(legal) || levels.iter().any(index) {
            problems.places.variables.insert(name.clone(), name.clone());
            problems
                .add(name, "not a path of keys; expected levels joined by __, such as WHIPPET__SOURCE__URL");
            continue;
        }
        let (expression, path, property) = address(&levels);
        problems.places.variables.insert(path, name.clone());
        found.push(Override { expression, property, value: value.clone() });
    }
    found
}

/// The levels as an expression of the `config` crate, as a path for messages, and the property.
fn address(levels: &[String]) -> (String, String, Option<String>) {
    // librdkafka's names have dots and never underscores.
    if let [kafka, properties, name] = levels
        && kafka == "kafka"
        && properties == "properties"
    {
        let name = name.replace('_', ".");
        return (format!("{ROOT}.kafka.properties"), format!("kafka.properties.{name}"), Some(name));
    }
    let mut expression = ROOT.to_owned();
    let mut path = String::new();
    for level in levels {
        if let Ok(index) = level.parse::<usize>() {
            expression += &format!("[{index}]");
            path += &format!("[{index}]");
        } else {
            expression += &format!(".{level}");
            path = join(&path, level);
        }
    }
    (expression, path, None)
}

/// The tree with the overrides laid over it.
pub(super) fn merge(tree: Value, overrides: Vec<Override>, problems: &mut Problems) -> Value {
    let layers = config::Config::builder().add_source(File(tree)).add_source(Environment(overrides)).build();
    let merged = layers.and_then(|layers| layers.get::<Value>(ROOT));
    merged.unwrap_or_else(|error| {
        problems.add("", format!("the environment does not fit over the file: {error}"));
        Value::Null
    })
}

#[derive(Clone, Debug)]
struct File(Value);

impl Source for File {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Layered>, config::ConfigError> {
        Ok(Map::from_iter([(ROOT.to_owned(), layered(&self.0))]))
    }
}

fn layered(value: &Value) -> Layered {
    let kind = match value {
        Value::Null => ValueKind::Nil,
        Value::Bool(value) => ValueKind::Boolean(*value),
        Value::Number(value) => ValueKind::String(value.to_string()),
        Value::String(value) => ValueKind::String(value.clone()),
        Value::Array(items) => ValueKind::Array(items.iter().map(layered).collect()),
        Value::Object(map) => {
            ValueKind::Table(map.iter().map(|(key, value)| (key.clone(), layered(value))).collect())
        }
    };
    Layered::new(None, kind)
}

#[derive(Clone, Debug)]
struct Environment(Vec<Override>);

impl Source for Environment {
    fn clone_into_box(&self) -> Box<dyn Source + Send + Sync> {
        Box::new(self.clone())
    }

    fn collect(&self) -> Result<Map<String, Layered>, config::ConfigError> {
        let mut map: Map<String, Layered> = Map::new();
        for Override { expression, property, value } in &self.0 {
            let value = Layered::new(None, ValueKind::String(value.clone()));
            let Some(property) = property else {
                map.insert(expression.clone(), value);
                continue;
            };
            let properties = map
                .entry(expression.clone())
                .or_insert_with(|| Layered::new(None, ValueKind::Table(Map::new())));
            if let ValueKind::Table(table) = &mut properties.kind {
                table.insert(property.clone(), value);
            }
        }
        Ok(map)
    }
}
