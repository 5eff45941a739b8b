//! The annotated file, the examples and the schema, which are the reference of the keys.

use super::*;

fn file(path: &str) -> String {
    std::fs::read_to_string(format!("{}/{path}", env!("CARGO_MANIFEST_DIR"))).unwrap()
}

#[test]
fn the_annotated_file_and_every_example_load() {
    let env: BTreeMap<String, String> = BTreeMap::new();
    let examples = format!("{}/config/examples", env!("CARGO_MANIFEST_DIR"));
    let mut files: Vec<String> = std::fs::read_dir(examples)
        .unwrap()
        .map(|entry| format!("config/examples/{}", entry.unwrap().file_name().display()))
        .collect();
    assert!(files.len() >= 3);
    files.push("config/whippet.yaml".into());
    for name in files {
        parse(&name, &file(&name), &env).unwrap_or_else(|error| panic!("{error}"));
    }
}

/// What `validate` takes is no error in an editor.
#[test]
fn the_schema_takes_references_and_quoted_values() {
    let schema = schema();
    let takes = |path: &[&str], value: &Value| {
        let node = path.iter().fold(&schema, |node, key| {
            // An object that may be absent is one of two.
            let object = if node["properties"].is_object() { node } else { &node["anyOf"][0] };
            &object["properties"][key]
        });
        let kinds = node["anyOf"].as_array().unwrap();
        kinds.iter().any(|kind| {
            let pattern =
                kind["pattern"].as_str().map(|pattern| pattern.split('|').any(|one| one == r"\$\{"));
            kind["type"] == "string" && value.is_string() && pattern.unwrap_or(true)
                || kind["type"]
                    .as_array()
                    .is_some_and(|many| value.is_number() && many.contains(&"number".into()))
        })
    };
    for path in [&["source", "max_connections"][..], &["shutdown", "grace"], &["log", "format"]] {
        assert!(takes(path, &"${X}".into()), "{path:?}");
    }
    assert!(takes(&["source", "relay_schema"], &7.into()));
}

/// Every key of the schema stands in the annotated file: as a key, or, if it is still to come, in a
/// comment.
#[test]
fn the_annotated_file_has_every_key() {
    let text = file("config/whippet.yaml");
    let mut missing = Vec::new();
    keys(&schema(), "", &mut |path, name| {
        if path.starts_with("defaults.") {
            return;
        }
        let there = text.lines().any(|line| {
            line.trim_start().trim_start_matches(['#', ' ', '-']).starts_with(&format!("{name}:"))
        });
        if !there {
            missing.push(path.to_owned());
        }
    });
    assert!(missing.is_empty(), "config/whippet.yaml lacks {missing:?}");
}

fn keys(schema: &Value, path: &str, found: &mut dyn FnMut(&str, &str)) {
    let nested = [&schema["items"], &schema["anyOf"][0]];
    for schema in nested.into_iter().filter(|nested| nested.is_object()) {
        keys(schema, path, found);
    }
    for (name, child) in schema["properties"].as_object().into_iter().flatten() {
        let path = if path.is_empty() { name.clone() } else { format!("{path}.{name}") };
        found(&path, name);
        keys(child, &path, found);
    }
}
