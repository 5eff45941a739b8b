//! Gives the texts of a tree their types, by the schema of [`Config`], and reports every value that
//! does not fit.

use std::collections::BTreeSet;

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use super::{
    Config,
    error::{Problems, join},
    units,
};

/// The schema of what the structs of this folder take.
pub(super) fn schema() -> Value {
    let settings = SchemaSettings::draft2020_12().with(|settings| settings.inline_subschemas = true);
    settings.into_generator().into_root_schema_for::<Config>().to_value()
}

/// The schema, for editors: of what may stand in a file, where any value may be `${…}` or in quotes, a text may look like
/// a number, and a key may have nothing behind it.
pub(super) fn as_written(mut schema: Value) -> Value {
    write(&mut schema);
    schema
}

fn write(schema: &mut Value) {
    for key in ["properties", "$defs"] {
        schema[key].as_object_mut().into_iter().flatten().for_each(|(_, child)| write(child));
    }
    for key in ["items", "additionalProperties"] {
        if schema[key].is_object() {
            write(&mut schema[key]);
        }
    }
    // An object or a list that may be absent.
    for either in schema["anyOf"].as_array_mut().into_iter().flatten() {
        if ["object", "array"].contains(&kind(either)) {
            write(either);
        }
    }
    let Some(fields) = schema.as_object_mut() else { return };
    fields.retain(|_, value| !value.is_null());
    let whole = Value::Object(fields.clone());
    // A rule beside the type, such as which of its keys are needed, says nothing of the kind.
    let has_type = fields.contains_key("type");
    let kind = kind(if has_type { &whole } else { not_null(&whole) });
    let others = match kind {
        "object" if has_type => {
            fields.insert("type".into(), json!(["object", "null"]));
            return;
        }
        "object" | "array" => return,
        "integer" => json!({ "type": "string", "pattern": r"^\d+$|\$\{" }),
        "boolean" => json!({ "type": "string", "pattern": r"^(true|false)$|\$\{" }),
        _ if choices(not_null(&whole)).is_empty() && whole.get("format").is_none() => {
            json!({ "type": ["number", "boolean"] })
        }
        _ => json!({ "type": "string", "pattern": r"\$\{" }),
    };
    let about = ["description", "default", "title"];
    let kept: Map<String, Value> =
        about.into_iter().filter_map(|key| Some((key.to_owned(), fields.remove(key)?))).collect();
    let value = Value::Object(std::mem::take(fields));
    fields.extend(kept);
    fields.insert("anyOf".into(), json!([value, others]));
}

/// The typed tree; `None` where something was missing or wrong.
pub(super) fn shape(tree: Value, schema: &Value, problems: &mut Problems) -> Option<Value> {
    value(tree, schema, "", problems)
}

fn value(tree: Value, schema: &Value, path: &str, problems: &mut Problems) -> Option<Value> {
    if tree.is_null() && is_nullable(schema) {
        return Some(Value::Null);
    }
    let schema = not_null(schema);
    match kind(schema) {
        "object" => object(tree, schema, path, problems),
        "array" => list(tree, schema, path, problems),
        _ => scalar(tree, schema, path, problems),
    }
}

fn object(tree: Value, schema: &Value, path: &str, problems: &mut Problems) -> Option<Value> {
    let entries = match tree {
        Value::Object(entries) => entries,
        // A key with nothing behind it, as one leaves it when its lines are commented out.
        Value::Null => Map::new(),
        _ => {
            problems.add(path, "expected a mapping of keys");
            return None;
        }
    };
    let empty = Map::new();
    let known = schema["properties"].as_object().unwrap_or(&empty);
    let others = schema.get("additionalProperties").filter(|others| others.is_object());
    let mut shaped = Map::new();
    let mut complete = true;
    let mut written = BTreeSet::new();
    for (key, child) in entries {
        written.insert(key.clone());
        let path = join(path, &key);
        let Some(schema) = known.get(&key).or(others) else {
            problems.add_key(&path, unknown(&path, &key, known));
            complete = false;
            continue;
        };
        match value(child, schema, &path, problems) {
            Some(child) => {
                shaped.insert(key, child);
            }
            None => complete = false,
        }
    }
    for key in schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str) {
        if !written.contains(key) {
            problems.missing(&join(path, key), &expected(&known[key]));
            complete = false;
        }
    }
    complete.then_some(Value::Object(shaped))
}

fn unknown(path: &str, key: &str, known: &Map<String, Value>) -> String {
    // It is gone by now: every table has taken what it gives.
    let defaults = (path == key).then_some("defaults");
    let known = || known.keys().map(String::as_str).chain(defaults);
    let near = known()
        .map(|candidate| (strsim::jaro_winkler(key, candidate), candidate))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0));
    match near {
        Some((_, near)) => format!("unknown key; did you mean `{near}`?"),
        None => {
            let names: Vec<&str> = known().collect();
            format!("unknown key; expected one of {}", names.join(", "))
        }
    }
}

fn list(tree: Value, schema: &Value, path: &str, problems: &mut Problems) -> Option<Value> {
    let Value::Array(items) = tree else {
        problems.add(path, "expected a list");
        return None;
    };
    let least = schema["minItems"].as_u64().unwrap_or(0);
    if (items.len() as u64) < least {
        problems.add(path, format!("expected at least {least} element(s)"));
        return None;
    }
    let count = items.len();
    let shaped: Vec<Value> = items
        .into_iter()
        .enumerate()
        .filter_map(|(index, item)| value(item, &schema["items"], &format!("{path}[{index}]"), problems))
        .collect();
    (shaped.len() == count).then_some(Value::Array(shaped))
}

fn scalar(tree: Value, schema: &Value, path: &str, problems: &mut Problems) -> Option<Value> {
    let Value::String(text) = tree else {
        // What could not be resolved is told already.
        if !problems.has(path) {
            problems.add(path, format!("expected {}", expected(schema)));
        }
        return None;
    };
    if let Some(shaped) = typed(&text, schema) {
        return Some(shaped);
    }
    let shown = problems.places.quote(path, &text);
    let near = choices(schema)
        .into_iter()
        .map(|choice| (strsim::jaro_winkler(&text, choice), choice))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or_else(String::new, |(_, near)| format!("; did you mean `{near}`?"));
    problems.add(path, format!("expected {}, found {shown}{near}", expected(schema)));
    None
}

fn typed(text: &str, schema: &Value) -> Option<Value> {
    let choices = choices(schema);
    if !choices.is_empty() {
        return choices.contains(&text).then(|| text.into());
    }
    match (kind(schema), schema["format"].as_str()) {
        (_, Some("duration")) => units::parse_duration(text).map(|_| text.into()),
        (_, Some("duration-or-never")) => units::parse_duration_or_never(text).map(|_| text.into()),
        (_, Some("size-or-auto")) => units::parse_size_or_auto(text).map(|_| text.into()),
        (_, Some("size")) => units::parse_size(text).map(|_| text.into()),
        (_, Some("address")) => {
            text.parse::<std::net::SocketAddr>().ok().map(|address| address.to_string().into())
        }
        ("boolean", _) => text.parse::<bool>().ok().map(Value::from),
        ("integer", _) => {
            let number: u64 = text.parse().ok()?;
            let (least, most) = range(schema);
            (least..=most).contains(&number).then(|| number.into())
        }
        _ => (!text.is_empty() || schema["minLength"].is_null()).then(|| text.into()),
    }
}

/// What belongs there, for messages.
fn expected(schema: &Value) -> String {
    let schema = not_null(schema);
    let choices = choices(schema);
    if !choices.is_empty() {
        return format!("one of {}", choices.join(", "));
    }
    match (kind(schema), schema["format"].as_str()) {
        (_, Some("duration")) => units::DURATION.into(),
        (_, Some("duration-or-never")) => units::DURATION_OR_NEVER.into(),
        (_, Some("size-or-auto")) => units::SIZE_OR_AUTO.into(),
        (_, Some("size")) => units::SIZE.into(),
        (_, Some("address")) => units::ADDRESS.into(),
        ("boolean", _) => "true or false".into(),
        ("integer", _) => match range(schema) {
            (least, u64::MAX) => format!("a whole number from {least}"),
            (least, most) => format!("a whole number from {least} to {most}"),
        },
        ("object", _) => "a mapping of keys".into(),
        ("array", _) => "a list".into(),
        _ => match schema["description"].as_str() {
            Some(like) if like.contains("://") || like.contains(':') || like.contains("or ") => {
                format!("text: {}", like.trim_end_matches('.'))
            }
            _ => "text".into(),
        },
    }
}

fn range(schema: &Value) -> (u64, u64) {
    let bound = |key: &str| schema[key].as_u64();
    let most = match schema["format"].as_str() {
        Some("uint8") => u64::from(u8::MAX),
        Some("uint16") => u64::from(u16::MAX),
        Some("uint32") => u64::from(u32::MAX),
        _ => u64::MAX,
    };
    (bound("minimum").unwrap_or(0), bound("maximum").unwrap_or(most))
}

/// The values of an enum, whether its variants have docs or not.
fn choices(schema: &Value) -> Vec<&str> {
    let listed = schema["enum"].as_array().into_iter().flatten().filter_map(Value::as_str);
    let described = schema["oneOf"].as_array().into_iter().flatten().flat_map(|one| {
        let several = one["enum"].as_array().into_iter().flatten().filter_map(Value::as_str);
        one["const"].as_str().into_iter().chain(several)
    });
    listed.chain(described).collect()
}

fn kind(schema: &Value) -> &str {
    match &schema["type"] {
        Value::String(kind) => kind,
        Value::Array(kinds) => {
            kinds.iter().filter_map(Value::as_str).find(|kind| *kind != "null").unwrap_or("string")
        }
        _ if schema["properties"].is_object() => "object",
        _ => "string",
    }
}

fn is_nullable(schema: &Value) -> bool {
    let null = |value: &Value| value == "null" || value["type"] == "null";
    let any = |key: &str| schema[key].as_array().is_some_and(|many| many.iter().any(null));
    any("type") || any("anyOf")
}

/// The other half of `anyOf: [X, null]`.
fn not_null(schema: &Value) -> &Value {
    let any = schema["anyOf"].as_array().into_iter().flatten();
    any.into_iter().find(|one| one["type"] != "null").unwrap_or(schema)
}
