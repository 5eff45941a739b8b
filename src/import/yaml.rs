//! Printing: YAML in block style, and comments of a readable width.

use std::fmt::Write as _;

const WIDTH: usize = 110;

/// A value of the configuration.
#[derive(Clone, Debug)]
pub enum Node {
    Text(String),
    Map(Vec<(String, Node)>),
    List(Vec<Node>),
}

impl Node {
    pub fn map<K: Into<String>>(entries: impl IntoIterator<Item = (K, Node)>) -> Node {
        Node::Map(entries.into_iter().map(|(key, node)| (key.into(), node)).collect())
    }

    /// A text that stands for itself.
    pub fn literal(text: &str) -> Node {
        Node::Text(text.replace("${", "$${"))
    }

    /// A text in which `${…}` is meant.
    pub fn text(&self) -> String {
        let mut out = String::new();
        self.print(0, &mut out);
        out
    }

    fn print(&self, indent: usize, out: &mut String) {
        let pad = " ".repeat(indent);
        match self {
            Node::Text(text) => _ = writeln!(out, "{pad}{}", scalar(text)),
            Node::Map(entries) => {
                for (key, node) in entries {
                    let key = scalar(key);
                    match node {
                        Node::Text(text) => _ = writeln!(out, "{pad}{key}: {}", scalar(text)),
                        Node::Map(children) if children.is_empty() => _ = writeln!(out, "{pad}{key}: {{}}"),
                        _ => {
                            _ = writeln!(out, "{pad}{key}:");
                            node.print(indent + 2, out);
                        }
                    }
                }
            }
            Node::List(items) => {
                for item in items {
                    let mut text = String::new();
                    item.print(indent + 2, &mut text);
                    // The dash stands in the first line's indent.
                    _ = write!(out, "{pad}- {}", text.trim_start_matches(' '));
                }
            }
        }
    }
}

/// A scalar; in quotes where it might be read as something else. JSON's strings are YAML's.
fn scalar(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_./-".contains(c);
    let is_plain = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/') && text.chars().all(plain);
    let is_word = ["null", "true", "false", "yes", "no", "on", "off", "y", "n"]
        .iter()
        .any(|word| text.eq_ignore_ascii_case(word));
    let is_number = !text.is_empty() && text.len() < 10 && text.bytes().all(|byte| byte.is_ascii_digit());
    if (is_plain && !is_word) || is_number { text.to_owned() } else { serde_json::json!(text).to_string() }
}

/// Lines of comment. `first` stands before the text, and further lines are as far to the right.
pub fn comment(first: &str, text: &str) -> String {
    let mut out = String::new();
    let mut line = format!("#{}{first}", if first.is_empty() { " " } else { "   " });
    let indent = line.len() - 1;
    let mut is_empty = true;
    // What cannot be printed would end the comment.
    for word in text.split(|c: char| c.is_whitespace() || c.is_control()).filter(|word| !word.is_empty()) {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            out += line.trim_end();
            out.push('\n');
            line = format!("#{}", " ".repeat(indent));
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line += word;
        is_empty = false;
    }
    out + line.trim_end() + "\n"
}
