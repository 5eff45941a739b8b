//! Headers: what is generated, what the row brings along, and what is dropped.
//!
//! Order on the wire: `id`, `eventType`, `version`, the `from` columns, the named columns, the static
//! ones, then the row's own in the row's order. A generated header wins over a row's of the same name.

use std::{borrow::Cow, fmt};

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use wildmatch::WildMatch;

use super::{
    Columns, Header, Rejection, Spec,
    envelope::{ATTRIBUTE, Envelope},
    properties,
    w3c::{BAGGAGE, TRACEPARENT, TRACESTATE, is_traceparent},
    wire,
};
use crate::event::Row;

/// How many headers did not make it, by reason.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Dropped([u32; REASONS.len()]);

/// The values of the metric label `reason`, by [`Reason`].
const REASONS: [&str; 5] = ["denied", "shadowed", "bad_traceparent", "orphan_tracestate", "over_budget"];

#[derive(Clone, Copy, Debug)]
enum Reason {
    /// Not allowed, or denied.
    Denied,
    /// A generated header has the same name.
    Shadowed,
    /// Not what W3C Trace Context says a `traceparent` is.
    BadTraceparent,
    /// A `tracestate` means nothing without its `traceparent`.
    OrphanTracestate,
    /// `headers.max_bytes` was used up.
    OverBudget,
}

impl Dropped {
    fn count(&mut self, reason: Reason) {
        self.0[reason as usize] += 1;
    }

    /// Reason and number, all reasons.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u32)> {
        REASONS.into_iter().zip(self.0)
    }
}

#[derive(Debug)]
pub(super) struct HeaderRules {
    event_type: Option<usize>,
    version: Option<usize>,
    from: Vec<(String, usize)>,
    named: Vec<(String, usize)>,
    fixed: Vec<(String, String)>,
    own: Option<usize>,
    tracing: Option<usize>,
    filter: Filter,
}

/// Which headers of somebody else's go along.
#[derive(Clone, Debug)]
pub struct Filter {
    /// `None`: everything.
    allow: Option<Vec<WildMatch>>,
    deny: Vec<WildMatch>,
    max_bytes: usize,
    /// Whether `ce_…` is the relay's own.
    in_envelope: bool,
}

/// A record's headers, before they are dressed.
#[derive(Debug)]
pub(super) struct Gathered<'a> {
    pub headers: Vec<Header<'a>>,
    /// How many of them describe the event itself.
    pub about: usize,
    pub dropped: Dropped,
}

impl Filter {
    /// Globs over names, without regard to case; `deny` wins. `max_bytes` is for all headers together.
    pub fn new(allow: &[String], deny: &[String], max_bytes: usize) -> Filter {
        let globs = |patterns: &[String]| -> Vec<WildMatch> {
            patterns.iter().map(|pattern| WildMatch::new_case_insensitive(pattern)).collect()
        };
        let everything = allow.iter().any(|pattern| pattern == "*");
        Filter {
            allow: (!everything).then(|| globs(allow)),
            deny: globs(deny),
            max_bytes,
            in_envelope: false,
        }
    }
}

impl HeaderRules {
    pub fn compile(spec: &Spec, columns: &mut Columns) -> HeaderRules {
        let filter = Filter::new(&spec.allow, &spec.deny, spec.headers_max_bytes);
        HeaderRules {
            event_type: columns.optional(spec.kind.as_ref().filter(|_| spec.event_type_header)),
            version: columns.optional(spec.version.as_ref()),
            from: spec.headers_from.iter().map(|name| (name.clone(), columns.index(name))).collect(),
            named: spec
                .headers_columns
                .iter()
                .map(|(header, column)| (header.clone(), columns.index(column)))
                .collect(),
            fixed: spec.headers_static.clone(),
            own: columns.optional(spec.headers.as_ref()),
            tracing: columns.optional(spec.tracing_span_context.as_ref()),
            filter: Filter { in_envelope: spec.envelope != Envelope::None, ..filter },
        }
    }

    /// The budget of all headers of a record, in bytes.
    pub fn max_bytes(&self) -> usize {
        self.filter.max_bytes
    }

    /// A record's headers. Headers never fail a row, except where the row's own are no JSON object
    /// of plain values: then nobody can tell what was meant.
    pub fn headers<'a>(
        &'a self,
        id: &'a str,
        row: &'a Row,
        columns: &[String],
    ) -> Result<Gathered<'a>, Rejection> {
        let mut dropped = Dropped::default();
        let generated = self.from.len() + self.named.len() + self.fixed.len();
        let mut headers: Vec<Header<'a>> = Vec::with_capacity(8 + generated);
        headers.push(("id".into(), Some(id.as_bytes().into())));
        for (name, index) in [("eventType", self.event_type), ("version", self.version)] {
            if let Some(value) = index.and_then(|index| row.get(index)) {
                headers.push((name.into(), Some(value.into())));
            }
        }
        let about = headers.len();
        for (name, index) in &self.from {
            if let Some(value) = row.get(*index) {
                headers.push((name.as_str().into(), Some(value.into())));
            }
        }
        for (name, index) in &self.named {
            headers.push((name.as_str().into(), row.get(*index).map(Into::into)));
        }
        for (name, value) in &self.fixed {
            headers.push((name.as_str().into(), Some(value.as_bytes().into())));
        }

        let mut own = Vec::new();
        if let Some(index) = self.own
            && let Some(value) = row.get(index)
        {
            own = json(value, &columns[index])?;
        }
        if let Some(index) = self.tracing
            && let Some(value) = row.get(index)
        {
            let entries = properties::parse(value, &columns[index])?.into_iter();
            own.extend(entries.map(|(name, value)| (name.into(), Some(value.into_bytes().into()))));
        }
        if !own.is_empty() {
            self.filter.admit(own, &mut headers, &mut dropped);
        }
        Ok(Gathered { headers, about, dropped })
    }
}

impl Filter {
    /// Adds those of a row's own headers that may go along.
    pub fn admit<'a>(&self, own: Vec<Header<'a>>, headers: &mut Vec<Header<'a>>, dropped: &mut Dropped) {
        let generated = headers.len();
        let mut kept: Vec<Header<'a>> = Vec::with_capacity(own.len());
        let mut no_parent = false;
        for header in own {
            let name = header.0.as_ref();
            let reason = if !self.allows(name) {
                Reason::Denied
            } else if headers[..generated].iter().any(|(taken, _)| taken == name) || self.is_ours(name) {
                Reason::Shadowed
            } else if name.eq_ignore_ascii_case(TRACEPARENT) && !is_traceparent(header.1.as_deref()) {
                no_parent = true;
                Reason::BadTraceparent
            } else {
                kept.push(header);
                continue;
            };
            dropped.count(reason);
        }
        if no_parent {
            let before = kept.len();
            kept.retain(|(name, _)| !name.eq_ignore_ascii_case(TRACESTATE));
            (kept.len()..before).for_each(|_| dropped.count(Reason::OrphanTracestate));
        }
        self.keep_budget(&mut kept, headers, dropped);
        headers.append(&mut kept);
    }

    fn allows(&self, name: &str) -> bool {
        self.allow.as_ref().is_none_or(|allow| allow.iter().any(|glob| glob.matches(name)))
            && !self.deny.iter().any(|glob| glob.matches(name))
    }

    fn is_ours(&self, name: &str) -> bool {
        tells_of_the_record(name, self.in_envelope)
    }

    /// Where the budget is short, the trace context is the last to go.
    fn keep_budget(&self, kept: &mut Vec<Header<'_>>, generated: &[Header<'_>], dropped: &mut Dropped) {
        let size = |header: &Header<'_>| header.0.len() + header.1.as_ref().map_or(0, |v| v.len());
        let mut left = self.max_bytes.saturating_sub(generated.iter().map(size).sum());
        if kept.iter().map(size).sum::<usize>() <= left {
            return;
        }
        let mut fits = vec![false; kept.len()];
        for first in [true, false] {
            for (index, header) in kept.iter().enumerate() {
                if is_w3c(&header.0) == first && size(header) <= left {
                    left -= size(header);
                    fits[index] = true;
                }
            }
        }
        let mut fits = fits.into_iter();
        kept.retain(|_| {
            let fits = fits.next().unwrap_or(false);
            if !fits {
                dropped.count(Reason::OverBudget);
            }
            fits
        });
    }
}

/// Whether a header says how a payload travels, where a record comes from, or what envelope it is in. From a row it
/// would be a lie: that of an application which hands on all headers of a record that it consumed.
pub fn tells_of_the_record(name: &str, in_envelope: bool) -> bool {
    name.starts_with("whippet-")
        || name == wire::BACKED_VALUE
        || wire::BACKED_COMPRESSION.contains(&name)
        || (in_envelope && name.starts_with(ATTRIBUTE))
}

fn is_w3c(name: &str) -> bool {
    [TRACEPARENT, TRACESTATE, BAGGAGE].iter().any(|known| name.eq_ignore_ascii_case(known))
}

/// A row's headers: a JSON object of strings. Numbers and booleans go out as they are written.
fn json<'a>(bytes: &'a [u8], column: &str) -> Result<Vec<Header<'a>>, Rejection> {
    let refuse = || {
        Rejection::new(format!(
            "column {column} is not a JSON object: write one such as {{\"x-request-id\": \"…\"}}, or NULL"
        ))
    };
    // A JSON `null` is as good as a NULL.
    let entries: Option<Entries<'a>> = serde_json::from_slice(bytes).map_err(|_| refuse())?;
    let mut headers = Vec::new();
    for (name, raw) in entries.map_or_else(Vec::new, |entries| entries.0) {
        let raw = raw.get();
        let value = match raw.as_bytes().first() {
            Some(b'n') => None,
            Some(b'"') => {
                let Text(text) = serde_json::from_str(raw).map_err(|_| refuse())?;
                Some(match text {
                    Cow::Borrowed(text) => Cow::Borrowed(text.as_bytes()),
                    Cow::Owned(text) => Cow::Owned(text.into_bytes()),
                })
            }
            Some(b'{' | b'[') => {
                let name: String = name.chars().take(60).collect();
                return Err(Rejection::new(format!(
                    "header {name:?} in column {column} is an object or a list: write it as a string"
                )));
            }
            _ => Some(Cow::Borrowed(raw.as_bytes())),
        };
        headers.push((name, value));
    }
    Ok(headers)
}

/// A JSON string, borrowed where it has no escapes.
struct Text<'a>(Cow<'a, str>);

impl<'de> Deserialize<'de> for Text<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Text<'de>, D::Error> {
        struct TextVisitor;

        impl<'de> Visitor<'de> for TextVisitor {
            type Value = Text<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }

            fn visit_borrowed_str<E>(self, text: &'de str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Borrowed(text)))
            }

            fn visit_str<E>(self, text: &str) -> Result<Text<'de>, E> {
                Ok(Text(Cow::Owned(text.to_owned())))
            }
        }

        from.deserialize_str(TextVisitor)
    }
}

/// A JSON object's entries in the order of the text.
struct Entries<'a>(Vec<(Cow<'a, str>, &'a RawValue)>);

impl<'de> Deserialize<'de> for Entries<'de> {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Entries<'de>, D::Error> {
        struct EntriesVisitor;

        impl<'de> Visitor<'de> for EntriesVisitor {
            type Value = Entries<'de>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Entries<'de>, A::Error> {
                let mut entries = Vec::new();
                while let Some((Text(name), value)) = map.next_entry()? {
                    entries.push((name, value));
                }
                Ok(Entries(entries))
            }
        }

        from.deserialize_map(EntriesVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const GOOD: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

    fn rules(spec: Spec) -> HeaderRules {
        let spec = Spec { headers: Some("headers".into()), headers_max_bytes: 16 << 10, ..spec };
        HeaderRules::compile(&spec, &mut Columns::default())
    }

    fn run(rules: &HeaderRules, headers: &str) -> (Vec<(String, Option<String>)>, Dropped) {
        let mut row = Row::default();
        row.push(Some(headers.as_bytes()));
        let Gathered { headers, dropped, .. } = rules.headers("e1", &row, &["headers".into()]).unwrap();
        let text = |bytes: Cow<'_, [u8]>| String::from_utf8(bytes.into_owned()).unwrap();
        let headers = headers.into_iter().map(|(name, value)| (name.into_owned(), value.map(text)));
        (headers.skip(1).collect(), dropped)
    }

    fn names(headers: &[(String, Option<String>)]) -> Vec<&str> {
        headers.iter().map(|(name, _)| name.as_str()).collect()
    }

    fn all() -> Spec {
        Spec { allow: vec!["*".into()], ..Spec::default() }
    }

    #[test]
    fn values_keep_their_text_and_their_order() {
        let (headers, dropped) =
            run(&rules(all()), r#"{"z":"ü\n\"q\"","a":1.10,"b":true,"c":null,"z":"again"}"#);
        let expected = [
            ("z", Some("ü\n\"q\"")),
            ("a", Some("1.10")),
            ("b", Some("true")),
            ("c", None),
            ("z", Some("again")),
        ];
        let expected = expected.map(|(n, v)| (n.to_owned(), v.map(str::to_owned)));
        assert_eq!(headers, expected);
        assert_eq!(dropped, Dropped::default());
    }

    #[test]
    fn a_generated_header_wins_over_the_rows() {
        let spec = Spec { headers_static: vec![("source".into(), "shop".into())], ..all() };
        let (headers, dropped) = run(&rules(spec), r#"{"source":"x","id":"x","Source":"other"}"#);
        assert_eq!(names(&headers), ["source", "Source"]);
        assert_eq!(headers[0].1.as_deref(), Some("shop"));
        assert_eq!(dropped.0[Reason::Shadowed as usize], 2);
    }

    #[test]
    fn a_row_does_not_say_what_only_the_relay_knows() {
        let own =
            r#"{"whippet-replay":"x","whippet-error-kind":"x","whippet-ref-uri":"s3://x","whippets":"x"}"#;
        let (headers, dropped) = run(&rules(all()), own);
        assert_eq!(names(&headers), ["whippets"]);
        assert_eq!(dropped.0[Reason::Shadowed as usize], 3);
    }

    #[test]
    fn a_named_column_keeps_its_null_and_wins_over_the_rows() {
        let named = [("eventType", "type"), ("tenant", "owner")].map(|(h, c)| (h.to_owned(), c.to_owned()));
        let spec = Spec {
            headers: Some("headers".into()),
            headers_columns: named.into(),
            headers_max_bytes: 99,
            ..all()
        };
        let mut columns = Columns::default();
        let rules = HeaderRules::compile(&spec, &mut columns);
        assert_eq!(columns.0, ["type", "owner", "headers"]);
        let mut row = Row::default();
        for value in [Some("Placed"), None, Some(r#"{"tenant":"x"}"#)] {
            row.push(value.map(str::as_bytes));
        }
        let Gathered { headers, dropped, .. } = rules.headers("e1", &row, &columns.0).unwrap();
        let expected = [("id", Some("e1")), ("eventType", Some("Placed")), ("tenant", None)];
        assert_eq!(
            headers,
            expected.map(|(name, value)| (name.into(), value.map(|v: &str| v.as_bytes().into())))
        );
        assert_eq!(dropped.0[Reason::Shadowed as usize], 1);
    }

    #[test]
    fn a_bad_traceparent_takes_its_tracestate_along_and_nothing_else() {
        let (headers, dropped) =
            run(&rules(all()), r#"{"traceparent":"00-zz","tracestate":"a=b","baggage":"u=1"}"#);
        assert_eq!(names(&headers), ["baggage"]);
        assert_eq!(dropped.0, [0, 0, 1, 1, 0]);
        let (headers, dropped) =
            run(&rules(all()), &format!(r#"{{"traceparent":"{GOOD}","tracestate":"a=b"}}"#));
        assert_eq!(names(&headers), ["traceparent", "tracestate"]);
        assert_eq!(headers[0].1.as_deref(), Some(GOOD));
        assert_eq!(dropped, Dropped::default());
    }

    #[test]
    fn where_the_budget_is_short_the_trace_context_stays() {
        let spec = Spec { headers_max_bytes: 0, ..all() };
        let mut rules = rules(spec);
        rules.filter.max_bytes = 4 + 11 + GOOD.len() + 4;
        let (headers, dropped) =
            run(&rules, &format!(r#"{{"big":"0123456789","b":"123","traceparent":"{GOOD}"}}"#));
        assert_eq!(names(&headers), ["b", "traceparent"]);
        assert_eq!(dropped.0[Reason::OverBudget as usize], 1);
    }

    /// `*` and `?` by plain recursion.
    fn naive_glob(pattern: &[u8], text: &[u8]) -> bool {
        match (pattern.first(), text.first()) {
            (None, None) => true,
            (Some(b'*'), _) => {
                naive_glob(&pattern[1..], text) || (!text.is_empty() && naive_glob(pattern, &text[1..]))
            }
            (Some(b'?'), Some(_)) => naive_glob(&pattern[1..], &text[1..]),
            (Some(p), Some(t)) => p.eq_ignore_ascii_case(t) && naive_glob(&pattern[1..], &text[1..]),
            _ => false,
        }
    }

    proptest! {
        /// Allow and deny against a naive matcher, one header after the other.
        #[test]
        fn a_header_goes_out_if_it_is_allowed_and_not_denied(
            allow in proptest::collection::vec("[ab*?X-]{1,4}", 0..3),
            deny in proptest::collection::vec("[ab*?X-]{1,4}", 0..3),
            headers in proptest::collection::vec("[abAX-]{1,4}", 0..6),
        ) {
            let rules = rules(Spec { allow: allow.clone(), deny: deny.clone(), ..Spec::default() });
            let json: Vec<String> = headers.iter().map(|name| format!("\"{name}\":\"v\"")).collect();
            let (sent, dropped) = run(&rules, &format!("{{{}}}", json.join(",")));
            let any = |globs: &[String], name: &str| {
                globs.iter().any(|glob| naive_glob(glob.as_bytes(), name.as_bytes()))
            };
            let expected: Vec<&str> = headers.iter().map(String::as_str)
                .filter(|name| any(&allow, name) && !any(&deny, name)).collect();
            prop_assert_eq!(dropped.0[Reason::Denied as usize] as usize, headers.len() - expected.len());
            prop_assert_eq!(names(&sent), expected);
        }

        /// The budget is never exceeded by the row's own headers.
        #[test]
        fn the_budget_holds(sizes in proptest::collection::vec(0..60usize, 0..12), budget in 0..300usize) {
            let mut rules = rules(all());
            rules.filter.max_bytes = budget;
            let json: Vec<String> = sizes.iter().enumerate()
                .map(|(n, size)| format!("\"h{n}\":\"{}\"", "v".repeat(*size))).collect();
            let (sent, dropped) = run(&rules, &format!("{{{}}}", json.join(",")));
            let total: usize = sent.iter().map(|(n, v)| n.len() + v.as_ref().map_or(0, String::len)).sum();
            prop_assert!(total == 0 || total + "ide1".len() <= budget);
            prop_assert_eq!(sent.len() + dropped.0[Reason::OverBudget as usize] as usize, sizes.len());
        }
    }
}
