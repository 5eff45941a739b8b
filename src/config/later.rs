//! Keys of the contract whose feature is still to come. One that asks for nothing (its default) is
//! accepted; any other value is refused with a sentence, never ignored.

use serde_json::{Value, json};

use super::error::{Problems, join};

/// Path (`[]` for every element), the value that asks for nothing, and what is missing.
const KEYS: [(&str, &str, &str); 1] =
    [("replicas.mode", "auto", "relays share the work of a source; nothing else can be chosen yet")];

/// Takes the keys to come out of the tree, and reports those that ask for something.
pub(super) fn refuse(tree: &mut Value, problems: &mut Problems) {
    for (pattern, nothing, sentence) in KEYS {
        visit(tree, pattern, "", &mut |parent, key, path| {
            if !asks_for_nothing(&parent[key], nothing) {
                problems.add_key(path, sentence);
            }
            if let Value::Object(parent) = parent {
                parent.shift_remove(key);
            }
        });
    }
}

fn asks_for_nothing(value: &Value, nothing: &str) -> bool {
    match value {
        Value::Null => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(text) => text == nothing && !nothing.is_empty(),
        _ => false,
    }
}

/// Calls `found` with the parent, the key and the path of every place that `pattern` matches.
fn visit(tree: &mut Value, pattern: &str, at: &str, found: &mut dyn FnMut(&mut Value, &str, &str)) {
    let Some((level, rest)) = pattern.split_once('.') else {
        if tree.get(pattern).is_some() {
            found(tree, pattern, &join(at, pattern));
        }
        return;
    };
    match level.strip_suffix("[]") {
        None => {
            if let Some(child) = tree.get_mut(level) {
                visit(child, rest, &join(at, level), found);
            }
        }
        Some(list) => {
            let Some(Value::Array(items)) = tree.get_mut(list) else { return };
            for (index, item) in items.iter_mut().enumerate() {
                visit(item, rest, &format!("{}[{index}]", join(at, list)), found);
            }
        }
    }
}

/// The schema, for editors, with the keys that only their default can be given to.
pub(super) fn with_keys_to_come(mut schema: Value) -> Value {
    for (pattern, nothing, sentence) in KEYS {
        let mut node = &mut schema;
        let mut levels = pattern.split('.').peekable();
        while let Some(level) = levels.next() {
            let name = level.trim_end_matches("[]");
            let properties = &mut node["properties"];
            if levels.peek().is_none() {
                properties[name] = match nothing {
                    "" => json!({ "type": "null", "description": sentence }),
                    nothing => json!({ "enum": [nothing, null], "description": sentence }),
                };
                break;
            }
            if properties.get(name).is_none() {
                properties[name] =
                    json!({ "type": "object", "additionalProperties": false, "properties": {} });
            }
            node = &mut properties[name];
            if level.ends_with("[]") {
                node = &mut node["items"];
            }
        }
    }
    let mut defaults = schema["properties"]["tables"]["items"].clone();
    if let Value::Object(defaults) = &mut defaults {
        defaults.shift_remove("required");
        defaults.insert("description".into(), "Any key of a table, for all of them.".into());
    }
    schema["properties"]["defaults"] = defaults;
    // `columns` is filled in by the preset.
    schema["properties"]["tables"]["items"]["required"] = json!(["name"]);
    for table in ["/properties/tables/items", "/properties/defaults"] {
        if let Some(Value::Object(columns)) = schema.pointer_mut(&format!("{table}/properties/columns")) {
            columns.shift_remove("required");
        }
    }
    schema["anyOf"] = json!([{ "required": ["source", "tables"] }, { "required": ["ingest"] }]);
    schema
}
