//! A dead letter: the original key, value and headers on another topic, and why it is there.

use std::borrow::Cow;

use super::{
    Columns, Header, Record, Rejection, RuleError, Rules, Spec, Template, context::Gathered,
    envelope::Wearing, route,
};
use crate::event::Event;

/// The name, in `dead_letter.topic`, for the topic that the event was meant for.
const TOPIC: &str = "topic";

/// Why an event was not published.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    /// `rejected` or `gave_up`.
    pub kind: &'static str,
    /// One sentence, without values of payloads or headers.
    pub message: String,
    /// Times that it was sent.
    pub attempts: u32,
}

#[derive(Debug)]
pub(super) struct DeadLetterRules {
    topic: Template,
    columns: Vec<(String, usize)>,
}

impl DeadLetterRules {
    pub fn compile(spec: &Spec, columns: &mut Columns) -> Result<DeadLetterRules, RuleError> {
        let topic = Template::parse(&spec.dead_letter_topic)
            .map_err(|error| RuleError::DeadLetter(spec.dead_letter_topic.clone(), error))?;
        let named = topic.columns().filter(|name| *name != TOPIC);
        let columns = named.map(|name| (name.to_owned(), columns.index(name))).collect();
        Ok(DeadLetterRules { topic, columns })
    }
}

impl Rules {
    /// Where the dead letter of an event goes.
    pub fn dead_letter_topic(&self, event: &Event) -> Result<String, Rejection> {
        let origin = self.route(event)?.topic;
        let rules = &self.dead_letter;
        let column = |name: &str| {
            let (_, index) = rules.columns.iter().find(|(column, _)| column == name)?;
            std::str::from_utf8(event.row.get(*index)?).ok()
        };
        let value = |name: &str| if name == TOPIC { Some(&*origin) } else { column(name) };
        let topic = rules.topic.fill(value).ok_or_else(|| {
            Rejection::new(
                "a column that dead_letter.topic names is NULL or no text: mend the row or the template",
            )
        })?;
        route::check_topic(&topic)?;
        Ok(topic)
    }

    /// The dead letter of an event. Headers of the row that cannot be read are left out: they may be
    /// what is wrong with it. It goes wherever its key does, whatever partition the row asks for.
    pub fn dead_letter<'a>(
        &'a self,
        event: &'a Event,
        table: &'a str,
        topic: &'a str,
        failure: &'a Failure,
        failed_at: String,
    ) -> Record<'a> {
        let row = &event.row;
        let route = self.route(event).ok();
        let id = self.id(row).unwrap_or_default();
        let (mut headers, payload) = match (self.headers.headers(id, row, &self.columns.0), &route) {
            (Ok(Gathered { headers, about, .. }), Some(route)) => {
                let wearing = Wearing { headers, about, payload: row.get(self.payload) };
                self.dress.dress(event, (id, &route.topic, route.key.as_deref()), wearing)
            }
            (gathered, _) => {
                let only_id = vec![("id".into(), Some(id.as_bytes().into()))];
                let headers: Vec<Header<'a>> = gathered.map_or(only_id, |gathered| gathered.headers);
                (headers, row.get(self.payload).map(Cow::Borrowed))
            }
        };
        let origin = route.as_ref().map(|route| route.topic.clone()).unwrap_or_default();
        for (name, value) in [
            ("whippet-error-kind", failure.kind.as_bytes().into()),
            ("whippet-error-message", failure.message.as_bytes().into()),
            ("whippet-origin-table", table.as_bytes().into()),
            ("whippet-origin-topic", origin.into_owned().into_bytes().into()),
            ("whippet-attempts", failure.attempts.to_string().into_bytes().into()),
            ("whippet-failed-at", failed_at.into_bytes().into()),
        ] {
            headers.push((name.into(), Some(value)));
        }
        Record {
            topic: topic.into(),
            partition: None,
            key: route.and_then(|route| route.key),
            payload,
            headers,
            timestamp_ms: event.timestamp_ms.filter(|ms| *ms > 0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::event::{Place, Row};

    fn rules(dead_letter_topic: &str) -> Result<Rules, RuleError> {
        Rules::compile(&Spec {
            id: "id".into(),
            payload: "payload".into(),
            topic: Some("topic".into()),
            key: Some("key".into()),
            headers: Some("headers".into()),
            allow: vec!["*".into()],
            headers_max_bytes: 1000,
            dead_letter_topic: dead_letter_topic.into(),
            ..Spec::default()
        })
    }

    /// By column name.
    fn event(rules: &Rules, values: &[(&str, &str)]) -> Event {
        let mut row = Row::default();
        for column in rules.columns() {
            row.push(values.iter().find(|(name, _)| name == column).map(|(_, value)| value.as_bytes()));
        }
        Event { place: Place::Int(1), row, timestamp_ms: None, unread_bytes: None, replay: None }
    }

    #[test]
    fn the_topic_is_a_template_over_the_records_topic_and_columns() {
        let rules = rules("{topic}.{tenant}.dlq").unwrap();
        let event_of = |tenant: &str| event(&rules, &[("id", "e"), ("topic", "orders"), ("tenant", tenant)]);
        assert_eq!(rules.dead_letter_topic(&event_of("t1")).unwrap(), "orders.t1.dlq");
        assert!(rules.dead_letter_topic(&event_of("no good")).is_err());
        assert!(rules.dead_letter_topic(&event(&rules, &[("id", "e"), ("topic", "orders")])).is_err());
    }

    #[test]
    fn a_template_that_is_none_is_told_at_start() {
        assert!(matches!(rules("{topic"), Err(RuleError::DeadLetter(..))));
    }

    #[test]
    fn the_original_is_carried_and_what_is_wrong_with_it_is_told() {
        let rules = rules("{topic}.dlq").unwrap();
        let failure = Failure { kind: "rejected", message: "no".into(), attempts: 3 };
        let letter = |headers: &str| {
            let event = event(
                &rules,
                &[("id", "e"), ("topic", "orders"), ("key", "k"), ("payload", "p"), ("headers", headers)],
            );
            let record = rules.dead_letter(&event, "outbox", "orders.dlq", &failure, "now".into());
            assert_eq!(
                (&*record.topic, record.key.as_deref(), record.payload.as_deref()),
                ("orders.dlq", Some(&b"k"[..]), Some(&b"p"[..]))
            );
            let text = |value: Option<&[u8]>| String::from_utf8(value.unwrap().to_vec()).unwrap();
            let headers = record.headers.iter();
            headers.map(|(name, value)| format!("{name}={}", text(value.as_deref()))).collect::<Vec<_>>()
        };
        let generated = [
            "whippet-error-kind=rejected",
            "whippet-error-message=no",
            "whippet-origin-table=outbox",
            "whippet-origin-topic=orders",
            "whippet-attempts=3",
            "whippet-failed-at=now",
        ];
        assert_eq!(letter(r#"{"user":"7"}"#), [&["id=e", "user=7"][..], &generated].concat());
        assert_eq!(letter("[1]"), [&["id=e"][..], &generated].concat());
    }
}
