//! The options of a connector, from JSON or from Java properties.

use std::collections::BTreeMap;

use serde_json::{Map, Value};

use super::{Error, Notes};

/// What nobody has taken yet.
#[derive(Debug)]
pub struct Options(BTreeMap<String, String>);

impl Options {
    pub fn read(text: &str) -> Result<Options, Error> {
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let options = if text.trim_start().starts_with(['{', '[']) { json(text)? } else { properties(text)? };
        Ok(Options(options.into_iter().map(|(name, value)| (of_connect(&name), value)).collect()))
    }

    /// An option that has a value.
    pub fn take(&mut self, name: &str) -> Option<String> {
        self.0.remove(name).map(|value| value.trim().to_owned()).filter(|value| !value.is_empty())
    }

    /// The first that has a value; a later one is an older name of the first.
    pub fn take_any(&mut self, names: &[&str]) -> Option<String> {
        names.iter().map(|name| self.take(name)).fold(None, Option::or)
    }

    pub fn take_bool(&mut self, name: &str) -> Option<bool> {
        self.take(name).map(|value| value.eq_ignore_ascii_case("true"))
    }

    pub fn take_list(&mut self, name: &str) -> Vec<String> {
        let list = self.take(name).unwrap_or_default();
        list.split(',').map(|one| one.trim().to_owned()).filter(|one| !one.is_empty()).collect()
    }

    /// All whose names begin so, without that beginning.
    pub fn take_all(&mut self, prefix: &str) -> Vec<(String, String)> {
        let names: Vec<String> = self.0.keys().filter(|name| name.starts_with(prefix)).cloned().collect();
        let take = |name: String| {
            let value = self.0.remove(&name).unwrap_or_default();
            (name[prefix.len()..].to_owned(), value.trim().to_owned())
        };
        names.into_iter().map(take).collect()
    }

    /// The names of what is left.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// A value as text of the configuration. A reference to one of Connect's configuration providers becomes one to
    /// the environment, whose default keeps the configuration valid.
    pub fn value(&mut self, name: &str, default: &str, notes: &mut Notes) -> Option<String> {
        let value = self.take(name)?;
        if !value.contains("${") {
            return Some(value);
        }
        let variable = variable_of(&value).unwrap_or_else(|| shouted(name));
        let says =
            format!("came from a configuration provider of Connect: set the environment variable {variable}");
        notes.add(name, says);
        Some(format!("${{{variable}:-{default}}}"))
    }
}

/// `${env:NAME}` as a whole.
fn variable_of(value: &str) -> Option<String> {
    let name = value.strip_prefix("${env:")?.strip_suffix('}')?;
    let legal = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let is_name =
        !name.is_empty() && name.chars().all(legal) && !name.starts_with(|c: char| c.is_ascii_digit());
    is_name.then(|| name.to_owned())
}

/// `database.hostname` as the name of a variable.
fn shouted(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_uppercase() } else { '_' }).collect()
}

/// The names of Debezium Server as those of Kafka Connect.
fn of_connect(name: &str) -> String {
    let Some(rest) = name.strip_prefix("debezium.") else { return name.to_owned() };
    for (theirs, connects) in [
        ("source.", ""),
        ("sink.kafka.producer.", "producer.override."),
        ("format.key.", "key.converter."),
        ("format.value.", "value.converter."),
    ] {
        if let Some(rest) = rest.strip_prefix(theirs) {
            return format!("{connects}{rest}");
        }
    }
    match rest {
        "format.key" => "key.converter".into(),
        "format.value" => "value.converter".into(),
        "format.header" => "header.converter".into(),
        _ if rest.starts_with("transforms") || rest.starts_with("predicates") => rest.into(),
        _ => name.to_owned(),
    }
}

fn json(text: &str) -> Result<BTreeMap<String, String>, Error> {
    let tree: Value = serde_json::from_str(text).map_err(|error| Error::Unreadable(error.to_string()))?;
    let options = flat(&tree).ok_or_else(|| Error::Unreadable("not a JSON object of options".into()))?;
    let mut all = BTreeMap::new();
    for (name, value) in options {
        let value = match value {
            Value::Null => continue,
            Value::String(text) => text.clone(),
            Value::Bool(_) | Value::Number(_) => value.to_string(),
            Value::Array(_) | Value::Object(_) => {
                return Err(Error::Unreadable(format!(
                    "the value of {name} is neither text, number nor boolean"
                )));
            }
        };
        all.insert(name.clone(), value);
    }
    Ok(all)
}

/// Flat, below `config`, or below `info.config` as Connect's REST interface answers.
fn flat(tree: &Value) -> Option<&Map<String, Value>> {
    let within = |path: &str| tree.pointer(path).and_then(Value::as_object);
    within("/config").or_else(|| within("/info/config")).or_else(|| tree.as_object())
}

fn properties(text: &str) -> Result<BTreeMap<String, String>, Error> {
    let mut all = BTreeMap::new();
    java_properties::PropertiesIter::new_with_encoding(text.as_bytes(), encoding_rs::UTF_8)
        .read_into(|name, value| {
            all.insert(name, value);
        })
        .map_err(|error| {
            let line = error.line_number().map_or_else(String::new, |line| format!("line {line}: "));
            Error::Unreadable(format!("{line}not a property"))
        })?;
    Ok(all)
}
