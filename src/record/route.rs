//! Where a row goes: topic and key, from columns or from templates over columns.

use std::borrow::Cow;

use super::{Columns, Rejection, RuleError, Spec, text};
use crate::event::Row;

/// (topic, key) as they go out.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route<'a> {
    pub topic: Cow<'a, str>,
    pub key: Option<Cow<'a, [u8]>>,
}

/// A text with columns in it: `orders.{aggregatetype}`. `{{` and `}}` are the braces themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Template {
    parts: Vec<Part>,
}

/// Kept apart, not rendered: the same template is an SQL expression too, where relays share a table.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(String),
    Column(String),
}

#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    #[error("a {{ without its }}; write {{{{ for the character itself")]
    Unclosed,
    #[error("a }} without its {{; write }}}} for the character itself")]
    Unopened,
    #[error("{{}} names no column")]
    NoName,
}

impl Template {
    pub fn parse(source: &str) -> Result<Template, TemplateError> {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = source;
        while let Some(at) = rest.find(['{', '}']) {
            literal.push_str(&rest[..at]);
            let brace = &rest[at..=at];
            rest = &rest[at + 1..];
            if rest.starts_with(brace) {
                literal.push_str(brace);
                rest = &rest[1..];
                continue;
            }
            if brace == "}" {
                return Err(TemplateError::Unopened);
            }
            let end = rest.find(['{', '}']).filter(|end| rest[*end..].starts_with('}'));
            let end = end.ok_or(TemplateError::Unclosed)?;
            let name = rest[..end].trim();
            if name.is_empty() {
                return Err(TemplateError::NoName);
            }
            if !literal.is_empty() {
                parts.push(Part::Literal(std::mem::take(&mut literal)));
            }
            parts.push(Part::Column(name.to_owned()));
            rest = &rest[end + 1..];
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal));
        }
        Ok(Template { parts })
    }

    /// The text with its names replaced; `None` where one has no value.
    pub fn fill<'a>(&self, value: impl Fn(&str) -> Option<&'a str>) -> Option<String> {
        let part = |part: &Part| match part {
            Part::Literal(text) => Some(text.clone()),
            Part::Column(name) => value(name).map(str::to_owned),
        };
        self.parts.iter().map(part).collect()
    }

    /// Its texts and columns in order, each as the caller has them.
    pub fn map<T>(&self, text: impl Fn(&str) -> T, column: impl Fn(&str) -> T) -> Vec<T> {
        let part = |part: &Part| match part {
            Part::Literal(literal) => text(literal),
            Part::Column(name) => column(name),
        };
        self.parts.iter().map(part).collect()
    }

    /// Whether it is the name of a topic for some values of its columns.
    pub fn may_be_topic(&self) -> bool {
        let text = self.map(str::to_owned, |_| String::new()).concat();
        match self.columns().next() {
            None => is_legal_topic(&text),
            Some(_) => text.is_empty() || is_legal_topic(&format!("{text}-")),
        }
    }

    /// The columns that it names.
    pub fn columns(&self) -> impl Iterator<Item = &str> {
        self.parts.iter().filter_map(|part| match part {
            Part::Column(name) => Some(name.as_str()),
            Part::Literal(_) => None,
        })
    }
}

/// A template with its columns found.
#[derive(Debug)]
enum Piece {
    Literal(String),
    Column(usize),
}

#[derive(Debug)]
enum Source {
    None,
    Column(usize),
    Pieces(Vec<Piece>),
}

impl Source {
    fn of(template: Option<&Template>, column: Option<&String>, columns: &mut Columns) -> Source {
        let Some(template) = template else {
            return columns.optional(column).map_or(Source::None, Source::Column);
        };
        let mut pieces: Vec<Piece> = template
            .parts
            .iter()
            .map(|part| match part {
                Part::Literal(text) => Piece::Literal(text.clone()),
                Part::Column(name) => Piece::Column(columns.index(name)),
            })
            .collect();
        // `{aggregateid}` alone borrows from the row, like a mapped column.
        match pieces.as_slice() {
            [Piece::Column(index)] => Source::Column(*index),
            _ => {
                pieces.shrink_to_fit();
                Source::Pieces(pieces)
            }
        }
    }

    /// The value, or the index of the column whose NULL makes it NULL.
    fn value<'a>(&self, row: &'a Row) -> Result<Cow<'a, [u8]>, Option<usize>> {
        match self {
            Source::None => Err(None),
            Source::Column(index) => row.get(*index).map(Cow::Borrowed).ok_or(Some(*index)),
            Source::Pieces(pieces) => {
                let mut value = Vec::with_capacity(64);
                for piece in pieces {
                    match piece {
                        Piece::Literal(text) => value.extend_from_slice(text.as_bytes()),
                        Piece::Column(index) => {
                            value.extend_from_slice(row.get(*index).ok_or(Some(*index))?);
                        }
                    }
                }
                Ok(Cow::Owned(value))
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct RouteRules {
    topic: Source,
    key: Source,
}

impl RouteRules {
    pub fn compile(spec: &Spec, columns: &mut Columns) -> Result<RouteRules, RuleError> {
        let parse = |source: &Option<String>| source.as_deref().map(Template::parse).transpose();
        let topic = parse(&spec.topic_template)
            .map_err(|error| RuleError::Topic(spec.topic_template.clone().unwrap_or_default(), error))?;
        let key = parse(&spec.key_template)
            .map_err(|error| RuleError::Key(spec.key_template.clone().unwrap_or_default(), error))?;
        let topic = Source::of(topic.as_ref(), spec.topic.as_ref(), columns);
        if matches!(topic, Source::None) {
            return Err(RuleError::NoTopic);
        }
        Ok(RouteRules { topic, key: Source::of(key.as_ref(), spec.key.as_ref(), columns) })
    }

    pub fn route<'a>(&self, row: &'a Row, columns: &[String]) -> Result<Route<'a>, Rejection> {
        let named = |index: Option<usize>| index.map_or("", |index| columns[index].as_str());
        let topic = self.topic.value(row).map_err(|null| {
            Rejection::new(format!("the topic (column {}) is NULL: mend the row", named(null)))
        })?;
        let topic = match topic {
            Cow::Borrowed(bytes) => text(bytes, "of the topic").map(Cow::Borrowed)?,
            Cow::Owned(bytes) => Cow::Owned(text(&bytes, "of the topic")?.to_owned()),
        };
        Ok(Route { topic, key: self.key.value(row).ok() })
    }
}

/// Kafka's rule for topic names (org.apache.kafka.common.internals.Topic): 1 to 249 of letters,
/// digits, `.`, `_` and `-`, and neither `.` nor `..`.
pub fn is_legal_topic(topic: &str) -> bool {
    let legal = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
    matches!(topic.len(), 1..=249) && topic.bytes().all(legal) && !matches!(topic, "." | "..")
}

pub(super) fn check_topic(topic: &str) -> Result<(), Rejection> {
    if is_legal_topic(topic) {
        return Ok(());
    }
    let shown: String = topic.chars().take(60).collect();
    Err(Rejection::new(format!(
        "{shown:?} is not a legal topic name (1 to 249 of letters, digits, '.', '_' and '-'): mend \
         the row or the topic template"
    )))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_template_of_which_no_topic_can_come_is_known_beforehand() {
        let long = "a".repeat(250);
        for (template, may_be) in [
            ("orders", true),
            ("orders.{type}", true),
            ("{a}{b}", true),
            (".{a}", true),
            ("", false),
            (".", false),
            ("..", false),
            ("my topic!", false),
            ("my topic.{a}", false),
            (&long, false),
            (&format!("{{a}}{long}"), false),
            (&long[1..], true),
        ] {
            assert_eq!(Template::parse(template).unwrap().may_be_topic(), may_be, "{template}");
        }
    }

    fn rules(topic: &str, key: Option<&str>) -> (RouteRules, Vec<String>) {
        let spec = Spec {
            topic_template: Some(topic.to_owned()),
            key_template: key.map(str::to_owned),
            ..Spec::default()
        };
        let mut columns = Columns::default();
        let rules = RouteRules::compile(&spec, &mut columns).unwrap();
        (rules, columns.0)
    }

    fn row(values: &[Option<&str>]) -> Row {
        let mut row = Row::default();
        values.iter().for_each(|value| row.push(value.map(str::as_bytes)));
        row
    }

    #[test]
    fn templates_fill_in_columns() {
        let (rules, columns) = rules("orders.{kind}-{ v }", Some("{{{tenant}}}"));
        assert_eq!(columns, ["kind", "v", "tenant"]);
        let row = row(&[Some("paid"), Some("2"), Some("acme")]);
        let route = rules.route(&row, &columns).unwrap();
        assert_eq!(route.topic, "orders.paid-2");
        assert_eq!(route.key.as_deref(), Some(&b"{acme}"[..]));
    }

    #[test]
    fn a_null_in_the_topic_is_refused_and_in_the_key_is_a_null_key() {
        let (rules, columns) = rules("orders.{kind}", Some("{tenant}-{id}"));
        let nulls = row(&[None, Some("t"), Some("1")]);
        assert!(rules.route(&nulls, &columns).unwrap_err().to_string().contains("column kind"));
        let row = row(&[Some("paid"), Some("t"), None]);
        assert_eq!(rules.route(&row, &columns).unwrap().key, None);
    }

    #[test]
    fn broken_templates_say_what_is_broken() {
        for (source, error) in [
            ("a{b", TemplateError::Unclosed),
            ("a{b{c}", TemplateError::Unclosed),
            ("a}b", TemplateError::Unopened),
            ("a{}", TemplateError::NoName),
            ("{ }", TemplateError::NoName),
        ] {
            assert_eq!(Template::parse(source), Err(error), "{source}");
        }
    }

    #[test]
    fn topic_names_are_those_that_kafka_takes() {
        for good in ["a", "a.b_c-D9", &"x".repeat(249)] {
            assert_eq!(check_topic(good), Ok(()), "{good}");
        }
        for bad in ["", ".", "..", "a b", "ä", "a/b", &"x".repeat(250)] {
            assert!(check_topic(bad).is_err(), "{bad}");
        }
    }

    proptest! {
        /// Literals and columns in any order against plain string building.
        #[test]
        fn rendering_is_concatenation(parts in proptest::collection::vec(
            prop_oneof!["[a-z{}. ]{1,6}".prop_map(Ok), (0..4usize).prop_map(Err)], 1..8)
        ) {
            let names = ["a", "b", "c", "d"];
            let values = ["1", "", "{x}", "ü"];
            let mut source = String::from("k");
            let mut expected = String::from("k");
            for part in &parts {
                match part {
                    Ok(text) => {
                        source.push_str(&text.replace('{', "{{").replace('}', "}}"));
                        expected.push_str(text);
                    }
                    Err(column) => {
                        source.push_str(&format!("{{{}}}", names[*column]));
                        expected.push_str(values[*column]);
                    }
                }
            }
            let (rules, columns) = rules("t", Some(&source));
            let cells: Vec<Option<&str>> = columns.iter()
                .map(|column| names.iter().position(|name| name == column).map(|index| values[index]))
                .collect();
            let row = row(&cells);
            let route = rules.route(&row, &columns).unwrap();
            prop_assert_eq!(route.key.as_deref(), Some(expected.as_bytes()));
        }

        #[test]
        fn no_text_makes_the_parser_panic(source in ".*") {
            let _ = Template::parse(&source);
        }
    }
}
