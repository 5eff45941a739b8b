//! YAML text → a tree of texts, with the line and column of every key and value.
//!
//! Scalars stay as they were written (`007`, `1.10`, `yes`) and get their type later, by what the
//! schema expects at their place: so a value means the same in the file, in `${VAR}` and in the
//! environment.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};
use serde_saphyr::{Location, Spanned};

use super::error::{Error, Place, Places, Problem, join};

/// Parses one YAML document. An empty one is an empty mapping.
pub(super) fn read(name: &str, text: &str) -> Result<(Value, Places), Error> {
    let mut places = Places { file: name.to_owned(), ..Places::default() };
    if text.lines().all(|line| matches!(line.trim().as_bytes().first(), None | Some(b'#'))) {
        places.values.insert(String::new(), (1, 1));
        return Ok((Value::Object(Map::new()), places));
    }
    // No snippets: they would print neighbouring lines, and a password with them.
    let options = serde_saphyr::options! { with_snippet: false, strict_booleans: true };
    let root: Spanned<Node> =
        serde_saphyr::from_str_with_options(text, options).map_err(|e| malformed(name, &e))?;
    let tree = root.value.into_tree(text, &root.defined, "", &mut places);
    Ok((tree, places))
}

fn malformed(name: &str, error: &serde_saphyr::Error) -> Error {
    let at = error.location().map(|at| (at.line(), at.column()));
    let mut message = error.without_snippet().to_string();
    if let Some((line, column)) = at {
        // The place is said once, in front.
        message = message.replace(&format!(" at line {line}, column {column}"), "");
        message = message.replace(&format!("line {line} column {column}: "), "");
    }
    // Its advice to programmers helps nobody who writes a file.
    for (advice, instead) in [
        (", set DuplicateKeyPolicy in Options if acceptable", ""),
        ("use from_str_multiple or from_str_multiple_with_options", "expected one"),
    ] {
        message = message.replace(advice, instead);
    }
    let message = format!("malformed YAML: {}", message.trim_start_matches("error: "));
    let place = Place::File { name: name.to_owned(), at };
    Error::Invalid(vec![Problem { place, path: String::new(), message }])
}

/// A YAML node before its scalars are read from the text.
enum Node {
    Null,
    /// Quoted, block or plain text.
    Text(String),
    /// Taken for a number or a boolean: the text is read from the document, for `1.10` to stay so.
    Plain(String),
    List(Vec<Spanned<Node>>),
    Map(Vec<(Spanned<String>, Spanned<Node>)>),
}

impl Node {
    fn into_tree(self, text: &str, at: &Location, path: &str, places: &mut Places) -> Value {
        places.values.insert(path.to_owned(), (at.line(), at.column()));
        match self {
            Node::Null => Value::Null,
            Node::Text(text) => Value::String(text),
            Node::Plain(parsed) => Value::String(written(text, at).unwrap_or(parsed)),
            Node::List(items) => items
                .into_iter()
                .enumerate()
                .map(|(index, item)| {
                    let path = format!("{path}[{index}]");
                    let at = item.referenced;
                    places.keys.insert(path.clone(), (at.line(), at.column()));
                    item.value.into_tree(text, &item.defined, &path, places)
                })
                .collect(),
            Node::Map(entries) => {
                let mut map = Map::new();
                for (key, value) in entries {
                    let path = join(path, &key.value);
                    let at = key.referenced;
                    places.keys.insert(path.clone(), (at.line(), at.column()));
                    let value = value.value.into_tree(text, &value.defined, &path, places);
                    map.insert(key.value, value);
                }
                Value::Object(map)
            }
        }
    }
}

/// The scalar at `at` as it stands in the document; `None` where it is tagged or quoted.
fn written(text: &str, at: &Location) -> Option<String> {
    let start = usize::try_from(at.span().byte_offset()?).ok()?;
    let len = usize::try_from(at.span().byte_len()?).ok()?;
    let raw = text.get(start..start.checked_add(len)?)?.trim();
    let plain = !raw.is_empty() && !raw.starts_with(['!', '&', '*', '"', '\'']);
    plain.then(|| raw.to_owned())
}

impl<'de> Deserialize<'de> for Node {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Node, D::Error> {
        from.deserialize_any(NodeVisitor)
    }
}

struct NodeVisitor;

impl<'de> Visitor<'de> for NodeVisitor {
    type Value = Node;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping, a list or a value")
    }

    fn visit_unit<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_none<E>(self) -> Result<Node, E> {
        Ok(Node::Null)
    }

    fn visit_some<D: Deserializer<'de>>(self, from: D) -> Result<Node, D::Error> {
        Node::deserialize(from)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_i128<E>(self, value: i128) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_u128<E>(self, value: u128) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Node, E> {
        Ok(Node::Plain(value.to_string()))
    }

    fn visit_str<E>(self, value: &str) -> Result<Node, E> {
        Ok(Node::Text(value.to_owned()))
    }

    fn visit_string<E>(self, value: String) -> Result<Node, E> {
        Ok(Node::Text(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Node, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = seq.next_element()? {
            items.push(item);
        }
        Ok(Node::List(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Node, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Node::Map(entries))
    }
}
