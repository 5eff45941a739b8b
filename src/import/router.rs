//! The outbox event router: from its options to those of a table.

use super::{Error, Notes, Options, Rows, source::Connector, yaml::Node};

pub const EVENT_ROUTER: &str = "io.debezium.transforms.outbox.EventRouter";
const TRACING: &str = "io.debezium.transforms.tracing.ActivateTracingSpan";

/// What of the router has an equal; a column that is not here is that of preset `debezium`.
#[derive(Debug, Default)]
pub struct Router {
    columns: Vec<(&'static str, String)>,
    topic: Option<String>,
    key: Option<String>,
    /// Header and column, in the order in which they go out.
    headers: Vec<(String, String)>,
    fixed: Vec<(String, String)>,
}

impl Router {
    pub fn take(options: &mut Options, notes: &mut Notes) -> Result<Router, Error> {
        let chain = options.take_list("transforms");
        let mut router = None;
        for name in chain {
            let kind = options.take(&format!("transforms.{name}.type")).unwrap_or_default();
            let prefix = format!("transforms.{name}.");
            if kind == EVENT_ROUTER && router.is_none() {
                router = Some(Router::of(&prefix, options, notes));
                continue;
            }
            if kind == TRACING {
                tracing(&prefix, options, notes);
                continue;
            }
            options.take_all(&prefix);
            let says = match kind.rsplit('.').next().unwrap_or_default() {
                "DecodeLogicalDecodingMessageContent" => {
                    "not needed: logical messages are read as JSON anyway".into()
                }
                _ => format!("transform {kind} has no equal: what it changed is not changed here"),
            };
            notes.add(&format!("transforms.{name}"), says);
        }
        router.ok_or(Error::NoRouter)
    }

    fn of(prefix: &str, options: &mut Options, notes: &mut Notes) -> Router {
        let mut router = Router::default();
        let named = |option: &str| format!("{prefix}{option}");
        for (role, preset, names) in [
            ("id", "id", &["table.field.event.id"][..]),
            ("key", "aggregateid", &["table.field.event.key", "table.field.payload.id"]),
            ("type", "type", &["table.field.event.type"]),
            ("payload", "payload", &["table.field.event.payload", "table.field.payload"]),
            ("timestamp", "", &["table.field.event.timestamp"]),
        ] {
            let names: Vec<String> = names.iter().map(|name| named(name)).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            if let Some(column) = options.take_any(&names).filter(|column| column != preset) {
                router.columns.push((role, column));
            }
        }
        router.route(prefix, options, notes);
        router.placements(prefix, options, notes);
        tracing(prefix, options, notes)
            .into_iter()
            .for_each(|column| router.columns.push(("tracing_span_context", column)));

        let option = named("route.tombstone.on.empty.payload");
        if options.take_bool(&option) == Some(true) {
            notes.add(
                &option,
                "a NULL payload is a tombstone here too, an empty one is not: write NULL instead",
            );
        }
        let option = named("table.expand.json.payload");
        let expands = options.take_bool(&option) == Some(true);
        router.converters(expands, options, notes);
        if expands {
            notes.add(
                &option,
                "no equal: a payload goes out as the database returns it, and not rewritten by a converter. It is the \
                 same JSON, but for spaces, how numbers are written, and members that are null, which Debezium left out \
                 unless told otherwise",
            );
        }
        options.take(&named("table.json.payload.null.behavior"));
        options.take(&named("table.json.payload.empty.array.behavior"));
        let option = named("table.op.invalid.behavior");
        if options
            .take_any(&[&option, &named("debezium.op.invalid.behavior")])
            .is_some_and(|what| what != "warn")
        {
            notes
                .add(&option, "no equal: updates of the outbox are no events here, and are ignored silently");
        }
        let option = named("table.field.event.schema.version");
        if options.take_any(&[&option, &named("table.field.schema.version")]).is_some() {
            notes.add(
                &option,
                "no equal: records have no schema. columns.version makes a header of such a column",
            );
        }
        let option = named("table.fields.additional.error.on.missing");
        if options.take_bool(&option) == Some(false) {
            notes.add(&option, "no equal: a column that is named has to be there");
        }
        let option = named("predicate");
        options.take(&named("negate"));
        if options.take(&option).is_some() {
            notes.add(
                &option,
                "no equal: only the tables that are named here are read, and each is an outbox",
            );
        }
        router
    }

    fn route(&mut self, prefix: &str, options: &mut Options, notes: &mut Notes) {
        let named = |option: &str| format!("{prefix}{option}");
        let column = options.take(&named("route.by.field"));
        let regex = options.take(&named("route.topic.regex"));
        let replacement = options.take(&named("route.topic.replacement"));
        if column.is_none() && regex.is_none() && replacement.is_none() {
            return;
        }
        let column = column.unwrap_or_else(|| "aggregatetype".into());
        let regex = regex.unwrap_or_else(|| "(?<routedByValue>.*)".into());
        let replacement = replacement.unwrap_or_else(|| "outbox.event.${routedByValue}".into());
        let topic = match template(&regex, &replacement, &column) {
            Ok((topic, Match::All)) => topic,
            Ok((topic, Match::Some)) => {
                notes.add(
                    &named("route.topic.regex"),
                    format!("values that {regex:?} does not match named their topic alone; here all go by the template"),
                );
                topic
            }
            Err(why) => {
                notes.add(
                    &named("route.topic.replacement"),
                    format!(
                        "{why}: {regex:?} to {replacement:?} has no equal. tables[].topic is now the router's default, \
                         which is wrong for you: write a template, or have a column with the topic",
                    ),
                );
                format!("outbox.event.{{{column}}}")
            }
        };
        self.topic = Some(topic).filter(|topic| topic != "outbox.event.{aggregatetype}");
    }

    fn placements(&mut self, prefix: &str, options: &mut Options, notes: &mut Notes) {
        let option = format!("{prefix}table.fields.additional.placement");
        for placement in options.take_list(&option) {
            let parts: Vec<&str> = placement.split(':').map(str::trim).collect();
            match parts[..] {
                [column, "header"] => self.headers.push((column.into(), column.into())),
                [column, "header", alias] => self.headers.push((alias.into(), column.into())),
                [column, "partition"] | [column, "partition", _] => self.columns.push(("partition", column.into())),
                [column, "envelope"] | [column, "envelope", _] => notes.add(
                    &option,
                    format!(
                        "{column} in an envelope has no equal: the value is the payload alone. Put it into the payload, \
                         or into a header (headers.columns)",
                    ),
                ),
                _ => notes.add(&option, format!("{placement:?} is not column:placement:alias")),
            }
        }
        let mut seen = std::collections::BTreeSet::new();
        self.headers.retain(|(header, _)| {
            let is_new = header != "id" && seen.insert(header.clone());
            if !is_new {
                notes.add(&option, format!("header {header:?} was there twice; here it is once"));
            }
            is_new
        });
    }

    /// What Connect made of key and value; `expands`: the value was an object by then, and no text.
    fn converters(&mut self, expands: bool, options: &mut Options, notes: &mut Notes) {
        let key = options.take("key.converter");
        let has_schemas = options.take_bool("key.converter.schemas.enable") != Some(false);
        match short(key.as_deref()) {
            Some("JsonConverter" | "json") if !has_schemas => {
                let column = self.columns.iter().find(|(role, _)| *role == "key").map(|(_, column)| column.as_str());
                self.key = Some(format!("\"{{{}}}\"", column.unwrap_or("aggregateid")));
                notes.add(
                    "key.converter",
                    "keys were JSON texts, with quotes around them, and stay so: tables[].key. Leave the quotes out for a \
                     column of numbers. A NULL was the text null, and is no key here",
                );
            }
            None | Some("StringConverter" | "string" | "simplestring") => {}
            Some(other) => notes.add(
                "key.converter",
                format!(
                    "{other} has no equal: a key is the bytes of its column. Its partition changes with it, so let \
                     consumers finish before they see both"
                ),
            ),
        }
        let value = options.take("value.converter");
        let has_schemas = options.take_bool("value.converter.schemas.enable") != Some(false);
        match short(value.as_deref()) {
            None
            | Some(
                "StringConverter" | "string" | "simplestring" | "ByteArrayConverter" | "BinaryDataConverter"
                | "ByteBufferConverter" | "bytearray" | "binary",
            ) => {}
            Some("JsonConverter" | "json") if has_schemas => notes.add(
                "value.converter",
                "JsonConverter has no equal: the payload alone goes out, and no object with its schema",
            ),
            Some("JsonConverter" | "json") if expands => {}
            Some("JsonConverter" | "json") => notes.add(
                "value.converter",
                "JsonConverter has no equal: a payload goes out as the database returns it, and not once more in quotes",
            ),
            Some(other) => notes.add(
                "value.converter",
                format!("{other} has no equal: a payload goes out as the database returns it, with no schema registry"),
            ),
        }
        match short(options.take("header.converter").as_deref()) {
            None | Some("SimpleHeaderConverter" | "StringConverter" | "string") => {}
            Some(other) => {
                notes.add(
                    "header.converter",
                    format!("{other} has no equal: a header is the text of its column"),
                );
            }
        }
        if key.is_none() || value.is_none() {
            notes.add(
                "key.converter, value.converter",
                "those of the worker counted, which are not in this file. Equal are StringConverter, and for bytes \
                 ByteArrayConverter and BinaryDataConverter; others are not",
            );
        }
        options.take_all("key.converter.");
        options.take_all("value.converter.");
        options.take_all("header.converter.");
    }

    /// Newer versions of Debezium add headers about themselves; 3.2 does whatever it is told.
    pub fn about_itself(&mut self, connector: Connector, options: &mut Options, notes: &mut Notes) {
        const OPTION: &str = "extended.headers.enabled";
        const HEADER: &str = "__debezium.context.";
        match options.take_bool(OPTION) {
            Some(false) => {}
            Some(true) => {
                let name = options.take("topic.prefix").unwrap_or_default();
                let header = |last: &str, value: &str| (format!("{HEADER}{last}"), value.to_owned());
                self.fixed = vec![
                    header("connectorLogicalName", &name),
                    header("taskId", "0"),
                    header("connectorName", connector.name()),
                ];
            }
            None => notes.add(
                OPTION,
                format!(
                    "headers about Debezium itself ({HEADER}…) are not sent. Where a consumer reads them, add `{OPTION}` with \
                     the value true and import again"
                ),
            ),
        }
    }

    /// An entry of `tables`.
    pub fn table(&self, name: &str, connector: Connector, rows: Rows) -> Node {
        let text = |text: &str| Node::Text(text.into());
        let mut table = vec![("name", Node::literal(name)), ("preset", text("debezium"))];
        if connector.is_postgres() && rows == Rows::Log {
            table.extend([("capture", text("stream")), ("rows", text("transient"))]);
        }
        let mut columns: Vec<(&str, Node)> =
            self.columns.iter().map(|(role, column)| (*role, Node::literal(column))).collect();
        if rows == Rows::Table {
            columns.push(("sequence", text("seq")));
        }
        if !columns.is_empty() {
            table.push(("columns", Node::map(columns)));
        }
        for (key, template) in [("topic", &self.topic), ("key", &self.key)] {
            if let Some(template) = template {
                table.push((key, Node::literal(template)));
            }
        }
        let mut headers = Vec::new();
        for (key, entries) in [("columns", &self.headers), ("static", &self.fixed)] {
            if !entries.is_empty() {
                let entries = entries.iter().map(|(header, value)| (header.clone(), Node::literal(value)));
                headers.push((key, Node::map(entries)));
            }
        }
        if !headers.is_empty() {
            table.push(("headers", Node::map(headers)));
        }
        if rows == Rows::Table {
            table.push(("after_publish", text("delete")));
        }
        Node::map(table)
    }

    /// What a user has to know of the tables.
    pub fn explain(&self, connector: Connector, rows: Rows, tables: &[String], notes: &mut Notes) {
        if tables.len() > 1 {
            notes.add(
                "tables",
                "events of one key keep their order within a table, and not from one table to another",
            );
        }
        if rows == Rows::Log {
            notes.add(
                "rows",
                "as with Debezium, events are taken from the log alone and the table is left as it is. Where rows stay until \
                 they are published, import with --rows stay: then the table is polled whenever the log cannot be read",
            );
            return;
        }
        for table in tables {
            let add = match connector {
                Connector::Postgres => "ADD COLUMN seq bigint GENERATED ALWAYS AS IDENTITY UNIQUE",
                Connector::Mysql | Connector::Mariadb => {
                    "ADD COLUMN seq bigint NOT NULL AUTO_INCREMENT UNIQUE"
                }
            };
            notes.add(
                "columns.sequence",
                format!("the order of rows needs a column: ALTER TABLE {table} {add}"),
            );
        }
        notes.add(
            "after_publish",
            "Debezium left published rows where they were: delete these before the first start, or they are published \
             again. The relay deletes what it has published",
        );
        if !connector.is_postgres() {
            notes.add(
                "rows",
                "rows that the application deletes itself, in the transaction that inserts them, are found in the binlog \
                 only: let it leave them to the relay",
            );
        }
    }
}

/// The column with a span's context, where one is named.
fn tracing(prefix: &str, options: &mut Options, notes: &mut Notes) -> Option<String> {
    let column = options.take(&format!("{prefix}tracing.span.context.field"));
    for option in ["tracing.operation.name", "tracing.with.context.field.only"] {
        let option = format!("{prefix}{option}");
        if options.take(&option).is_some() {
            notes.add(
                &option,
                "no equal: the row's traceparent goes out as it is, and no span is made of reading it",
            );
        }
    }
    column.filter(|column| column != "tracingspancontext")
}

/// The class of a converter, without its package.
fn short(class: Option<&str>) -> Option<&str> {
    class.map(|class| class.rsplit('.').next().unwrap_or(class))
}

/// Whether a pattern matches every value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Match {
    All,
    Some,
}

/// A pattern that is one group, with its replacement, as a template. Others have no equal.
pub fn template(regex: &str, replacement: &str, column: &str) -> Result<(String, Match), &'static str> {
    let regex = regex.strip_prefix('^').unwrap_or(regex);
    let regex = regex.strip_suffix('$').unwrap_or(regex);
    let group = regex.strip_prefix('(').and_then(|rest| rest.strip_suffix(')'));
    let (name, body) =
        match group.and_then(|group| group.strip_prefix("?<")).and_then(|rest| rest.split_once('>')) {
            Some((name, body)) => (Some(name), body),
            None => (None, group.unwrap_or(regex)),
        };
    let several = "a pattern with several groups";
    if body.contains(['(', ')']) {
        return Err(several);
    }
    let mut topic = String::new();
    let mut rest = replacement.chars().peekable();
    while let Some(c) = rest.next() {
        match c {
            '$' if rest.peek() == Some(&'{') => {
                rest.next();
                let wanted: String = rest.by_ref().take_while(|c| *c != '}').collect();
                if name != Some(wanted.as_str()) {
                    return Err("a group that the pattern does not have");
                }
                topic += &format!("{{{column}}}");
            }
            '$' => {
                let digit = rest.next();
                match digit {
                    Some('0') => topic += &format!("{{{column}}}"),
                    Some('1') if group.is_some() => topic += &format!("{{{column}}}"),
                    _ => return Err("a group that the pattern does not have"),
                }
            }
            '\\' => topic.extend(rest.next()),
            '{' | '}' => topic.extend([c, c]),
            _ => topic.push(c),
        }
    }
    Ok((topic, if matches!(body, ".*" | ".+") { Match::All } else { Match::Some }))
}
