//! What the schema cannot say: values that have to fit each other, and librdkafka's properties.

#[cfg(any(feature = "postgres", feature = "sqlite"))]
use std::str::FromStr as _;
use std::{collections::BTreeMap, time::Duration};

use rdkafka::{ClientConfig, error::KafkaError};

use super::{
    AfterPublish, Capture, Config, Dialect, Encoding, Envelope, ObjectStore, Order, Oversize, Payload,
    ReferenceDialect, Rows, Source, Table, TlsMode, Wake, error::Problems, exactly_once, ingest, kafka_token,
};
use crate::{
    record::{Template, tells_of_the_record, wire::CONTENT_ENCODING},
    store::is_safe_key,
    telemetry,
};

/// The relay's own messages in the log.
const HEARTBEAT_PREFIX: &str = "whippet.heartbeat";

pub(super) fn check(config: &Config, problems: &mut Problems) {
    if let Some(configured) = &config.source {
        source(configured, problems);
    }
    ingest::check(config, problems);
    kafka(config, problems);
    kafka_token::check(&config.kafka, problems);
    exactly_once::check(config, problems);
    if let Some(Err(error)) = config.object_store.as_ref().map(ObjectStore::open) {
        let text = error.to_string();
        // `object_store.options.region: what is wrong with it`
        let (path, text) = text.split_once(": ").unwrap_or(("object_store", &text));
        problems.add_key(path, text);
    }
    let in_the_clear = config.object_store.as_ref().and_then(ObjectStore::in_the_clear);
    if let Some(name) = in_the_clear {
        let why = "payloads go over http://, for anybody on the way to read; use https://, or set the option allow_http: \
                   true if that is meant";
        problems.warn(&format!("object_store.options.{name}"), why);
    }
    let least = Duration::from_secs(1);
    if config.replicas.lease < least {
        problems.add("replicas.lease", "expected at least 1s: it is renewed several times in its length");
    }
    if !(1..=4096).contains(&config.replicas.buckets) {
        problems.add("replicas.buckets", "expected 1 to 4096");
    }
    if config.limits.in_flight_bytes < 64 << 10 {
        problems.add("limits.in_flight_bytes", "expected at least 64KiB");
    }
    for (index, name) in config.log.context.iter().enumerate() {
        if name.trim().is_empty() {
            problems.add(&format!("log.context[{index}]"), "expected the name of a header");
        }
    }
    if let Some(Err(why)) = config.telemetry.otlp_endpoint.as_deref().map(telemetry::check) {
        problems.add("telemetry.otlp_endpoint", why);
    }
    let mut names = BTreeMap::new();
    for (index, one) in config.tables.iter().enumerate() {
        let path = format!("tables[{index}]");
        let whole = config.source.as_ref().map_or_else(|| one.name.clone(), |source| whole_name(source, one));
        match names.insert(whole, one.name.as_str()) {
            None => {}
            Some(before) if before == one.name => {
                problems.add(&format!("{path}.name"), format!("table {before} is there twice"));
            }
            Some(before) => {
                let says = format!("{} is table {before}, which is there already", one.name);
                problems.add(&format!("{path}.name"), says);
            }
        }
        if let Some(source) = &config.source {
            table(one, source.dialect(), &path, problems);
        }
        payload(&one.payload, config.object_store.is_some(), &path, problems);
        envelope(one, &path, problems);
        headers(one, &path, problems);
    }
    if let Some(spool) = &config.spool {
        let path = format!("tables[{}]", config.tables.len());
        table(spool, Dialect::Sqlite, &path, problems);
        payload(&spool.payload, config.object_store.is_some(), &path, problems);
        envelope(spool, &path, problems);
    }
}

/// The name of a table with the schema that it is in where nothing is said, as far as the configuration tells.
fn whole_name(source: &Source, table: &Table) -> String {
    let name = &table.name;
    if table.message_prefix().is_some() {
        return name.clone();
    }
    match source.dialect() {
        Dialect::Sqlite => name.to_lowercase(),
        _ if name.contains('.') => name.clone(),
        Dialect::Postgres => format!("public.{name}"),
        Dialect::Mysql => {
            let url = url::Url::parse(source.url.expose()).ok();
            let database = url.map(|url| url.path().trim_start_matches('/').to_owned()).unwrap_or_default();
            format!("{database}.{name}")
        }
    }
}

/// What envelopes, and a header that has all others, do not go with.
fn envelope(table: &Table, path: &str, problems: &mut Problems) {
    let at = |key: &str| format!("{path}.{key}");
    let (blob, payload) = (table.headers.blob.as_deref(), &table.payload);
    if blob.is_some() && table.envelope != Envelope::None {
        problems
            .add(&at("headers.blob"), "a CloudEvent has its context as attributes: leave one of them out");
    }
    let taken =
        |name: &str| ["id", "eventType", "version"].contains(&name) || tells_of_the_record(name, false);
    if blob.is_some_and(|name| name.trim().is_empty() || taken(name)) {
        problems
            .add(&at("headers.blob"), "expected the name of a header that the relay does not write itself");
    }
    if table.envelope == Envelope::CloudeventsStructured {
        if payload.encode.codec != Encoding::None {
            let why = "a structured CloudEvent is JSON: use cloudevents-binary, or kafka.compression";
            problems.add(&at("payload.encode.codec"), why);
        }
        if matches!(payload.oversize, Some(Oversize::ClaimCheck | Oversize::Chunk)) {
            let why = "a structured CloudEvent is one record: use cloudevents-binary, or park or dead_letter";
            problems.add(&at("payload.oversize"), why);
        }
    }
}

/// The last header of a name counts, so one that the configuration adds must not have a name of the relay's own.
fn headers(table: &Table, path: &str, problems: &mut Problems) {
    let (headers, columns) = (&table.headers, &table.columns);
    let in_envelope = table.envelope != Envelope::None;
    let is_written = |name: &str| match name {
        "id" => true,
        "eventType" => table.event_type_header() && columns.kind.is_some(),
        "version" => columns.version.is_some(),
        CONTENT_ENCODING => table.payload.encode.codec != Encoding::None,
        _ => tells_of_the_record(name, in_envelope),
    };
    let from = headers.from.iter().map(|name| ("from", name));
    let columns = headers.columns.iter().map(|(name, _)| ("columns", name));
    let fixed = headers.fixed.iter().map(|(name, _)| ("static", name));
    for (key, name) in from.chain(columns).chain(fixed) {
        let at = format!("{path}.headers.{key}");
        if name.trim().is_empty() {
            problems.add(&at, "expected the name of a header");
        } else if is_written(name) {
            problems.add(&at, format!("the relay writes header {name} itself; expected another name"));
        }
    }
}

fn source(source: &Source, problems: &mut Problems) {
    let url = source.url.expose();
    match url.split_once(':').map(|(scheme, _)| scheme) {
        Some("postgres" | "postgresql") if cfg!(feature = "postgres") =>
        {
            #[cfg(feature = "postgres")]
            if sqlx::postgres::PgConnectOptions::from_str(url).is_err() {
                problems.add("source.url", "not a URL such as postgres://user@host:5432/database");
            }
        }
        Some("sqlite") if cfg!(feature = "sqlite") => {
            if url.contains(":memory:") || url.contains("mode=memory") {
                problems.add("source.url", "a database in memory belongs to one connection: name a file");
            }
            #[cfg(feature = "sqlite")]
            if sqlx::sqlite::SqliteConnectOptions::from_str(url).is_err() {
                problems.add("source.url", "not a URL such as sqlite:///var/lib/app/shop.db");
            }
        }
        Some("mysql") if cfg!(feature = "mysql") => {
            #[cfg(feature = "mysql")]
            match mysql_async::Opts::from_url(url) {
                Ok(options) if options.db_name().is_none_or(str::is_empty) => {
                    problems.add("source.url", "expected a database in it: mysql://user@host:3306/database");
                }
                Ok(_) => {}
                // What it says names a parameter, and never its value.
                Err(error) => problems.add("source.url", url_problem(&error)),
            }
        }
        Some("mariadb") => problems.add("source.url", "write mysql:// for MariaDB too"),
        _ => problems.add(
            "source.url",
            "expected postgres://user@host:5432/database, mysql://user@host:3306/database or \
             sqlite://path/to/file.db",
        ),
    }
    for (key, file) in [
        ("source.password_file", &source.password_file),
        ("source.tls.ca_file", &source.tls.ca_file),
        ("source.tls.cert_file", &source.tls.cert_file),
        ("source.tls.key_file", &source.tls.key_file),
    ] {
        if let Some(file) = file
            && (file.as_os_str().is_empty() || file.is_dir())
        {
            problems.add(key, "expected a file");
        } else if let Some(file) = file
            && !file.is_file()
        {
            problems.warn(key, &format!("there is no file {} (yet)", file.display()));
        }
    }
    if source.password_file.is_some() && !source.password_command.is_empty() {
        problems.add("source.password_command", "password_file has it already; expected one of them");
    }
    if source.tls.cert_file.is_some() != source.tls.key_file.is_some() {
        problems.add("source.tls", "cert_file and key_file belong together");
    }
    if let Some(stream) = &source.stream {
        // PostgreSQL's own rule (src/backend/replication/slot.c, ReplicationSlotValidateName).
        let legal = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_';
        if stream.slot.is_empty() || stream.slot.len() > 63 || !stream.slot.chars().all(legal) {
            problems.add("source.stream.slot", "expected up to 63 of a-z, 0-9 and _");
        }
        if stream.publication.is_empty() || stream.publication.len() > 63 {
            problems.add("source.stream.publication", "expected a name of up to 63 bytes");
        }
        if stream.heartbeat < Duration::from_millis(100) {
            problems.add("source.stream.heartbeat", "expected at least 100ms");
        }
        // Rows that do not stay have a reader of their own, with the next number.
        if stream.server_id == u32::MAX {
            problems.add("source.stream.server_id", "expected a number from 1 to 4294967294");
        }
        if source.dialect() == Dialect::Sqlite {
            problems.add("source.stream", "SQLite has no log to be read; leave it out");
        }
    }
    if source.dialect() == Dialect::Mysql && source.tls.mode == TlsMode::VerifyCa {
        problems.add(
            "source.tls.mode",
            "the driver for MySQL checks the name with the certificate: expected verify-full, or require, which \
             checks neither",
        );
    }
    let plain = |c: char| c.is_ascii_alphanumeric() || c == '_';
    if source.relay_schema.is_empty() || !source.relay_schema.chars().all(plain) {
        problems.add("source.relay_schema", "expected letters, digits and _");
    }
}

#[cfg(feature = "mysql")]
fn url_problem(error: &mysql_async::UrlError) -> String {
    match error {
        mysql_async::UrlError::UnknownParameter { param } => format!("there is no parameter {param}"),
        mysql_async::UrlError::InvalidParamValue { param, .. } => {
            format!("parameter {param} has a wrong value")
        }
        _ => "not a URL such as mysql://user@host:3306/database".into(),
    }
}

/// librdkafka properties that are Whippet's business: name, the values that change nothing, and why
/// the others are refused.
const OURS: [(&str, &[&str], &str); 23] = [
    ("bootstrap.servers", &[], "set kafka.bootstrap_servers"),
    ("metadata.broker.list", &[], "set kafka.bootstrap_servers"),
    ("linger.ms", &[], "set kafka.linger"),
    ("queue.buffering.max.ms", &[], "set kafka.linger"),
    ("compression.type", &[], "set kafka.compression"),
    ("compression.codec", &[], "set kafka.compression"),
    ("acks", &["all", "-1"], "fewer acknowledgements lose events"),
    ("request.required.acks", &["all", "-1"], "fewer acknowledgements lose events"),
    ("enable.idempotence", &["true"], "without it a retry reorders events"),
    ("enable.gapless.guarantee", &["true"], "without it later events of a key pass a failed one"),
    ("max.in.flight", &["1", "2", "3", "4", "5"], "more than 5 reorder events"),
    ("max.in.flight.requests.per.connection", &["1", "2", "3", "4", "5"], "more than 5 reorder events"),
    ("message.timeout.ms", &["0"], "an expired event would let later ones pass"),
    ("delivery.timeout.ms", &["0"], "an expired event would let later ones pass"),
    ("message.send.max.retries", &["2147483647"], "retries never end"),
    ("retries", &["2147483647"], "retries never end"),
    ("partitioner", &["murmur2_random"], "keys have to land where Java producers put them"),
    ("transactional.id", &[], "the relay has one by the source; set kafka.delivery"),
    ("transaction.timeout.ms", &[], "a relay that dies must not hold up readers for more than 30 s"),
    ("queuing.strategy", &["fifo"], "it reorders events"),
    ("delivery.report.only.error", &["false"], "without reports nothing is ever settled"),
    ("statistics.interval.ms", &["5000"], "the relay reads them to see whether the client is alive"),
    ("allow.auto.create.topics", &["false"], "a topic is never created by accident"),
];

fn kafka(config: &Config, problems: &mut Problems) {
    if config.kafka.bootstrap_servers.trim().is_empty() {
        problems.add("kafka.bootstrap_servers", "expected host:port, comma-separated");
    }
    for (name, value) in &config.kafka.properties {
        let path = format!("kafka.properties.{name}");
        let ours = OURS.iter().find(|(ours, ..)| ours == name);
        match ours {
            Some((_, [], why)) => problems.add_key(&path, format!("refused: {why}")),
            Some((_, fine, why)) if !fine.contains(&value.expose()) => {
                problems.add(&path, format!("refused: {why}; leave it out"));
            }
            Some(_) => {}
            None => {
                // librdkafka checks name and value one by one, without connecting.
                let mut client = ClientConfig::new();
                client.set(name, value.expose());
                if let Err(KafkaError::ClientConfig(_, why, ..)) = client.create_native_config() {
                    // Its sentences may repeat the value, which may be a secret.
                    let why = without(&why, value.expose());
                    problems.add_key(&path, format!("librdkafka says: {why}"));
                }
            }
        }
    }
}

/// `text` with `value` hidden where it is a word of its own: `10` is found in `1000` too, and does not belong to it.
fn without(text: &str, value: &str) -> String {
    let is_part = |beside: Option<char>| beside.is_some_and(char::is_alphanumeric);
    let mut hidden = String::with_capacity(text.len());
    let mut seen = 0;
    for (at, _) in text.match_indices(value).filter(|_| !value.is_empty()) {
        let end = at + value.len();
        if !is_part(text[..at].chars().next_back()) && !is_part(text[end..].chars().next()) {
            hidden += &text[seen..at];
            hidden.push('…');
            seen = end;
        }
    }
    hidden + &text[seen..]
}

fn payload(payload: &Payload, has_store: bool, path: &str, problems: &mut Problems) {
    let at = |key: &str| format!("{path}.payload.{key}");
    if payload.oversize == Some(Oversize::ClaimCheck) && !has_store {
        problems.add(&at("oversize"), "claim_check needs object_store: where the payloads go");
    }
    if payload.reference.dialects.is_empty() {
        problems.add(&at("reference.dialects"), "expected whippet, bakdata or both: else nobody can read it");
    }
    if let Err(why) = reference_key(&payload.reference.key) {
        problems.add(&at("reference.key"), why);
    }
    if payload.chunk.size.is_some_and(|size| size < 1 << 10) {
        problems.add(&at("chunk.size"), "expected auto, or at least 1KiB");
    }
    let moves = payload.oversize.map_or(has_store, |oversize| oversize == Oversize::ClaimCheck);
    if moves && payload.reference.dialects.contains(&ReferenceDialect::Bakdata) {
        bakdata(payload, &at("encode.codec"), problems);
    }
}

/// The literal text of a key is as safe as what its names become.
fn reference_key(key: &str) -> Result<(), String> {
    let template = Template::parse(key).map_err(|error| format!("not a template: {error}"))?;
    let has = |name: &str| template.columns().any(|column| column == name);
    if !has("sha256") || !has("id") {
        let why = "a repeat must write the same object, and nothing else may";
        return Err(format!("expected {{id}} and {{sha256}} in it: {why}"));
    }
    match template.fill(|_| Some("x")) {
        Some(filled) if is_safe_key(&filled) => Ok(()),
        _ => {
            Err("expected A-Z, a-z, 0-9, . _ - and single slashes around its names, none at either end, and \
                  no . or .. between two: every reader has to make the same of its URI"
                .into())
        }
    }
}

/// What readers of dialect bakdata cannot decode: lz4 and snappy, which they expect in framings of Kafka's own,
/// and a payload that is encoded in its record, of which they are not told. Other readers can.
fn bakdata(payload: &Payload, path: &str, problems: &mut Problems) {
    let codec = payload.encode.codec;
    let alone = payload.reference.dialects.len() == 1;
    match codec {
        Encoding::None => {}
        Encoding::Lz4 | Encoding::Snappy if alone => problems.add(
            path,
            "readers of dialect bakdata decode gzip and zstd only; use one of those, or let other readers know \
             by dialect whippet",
        ),
        Encoding::Gzip | Encoding::Zstd if alone && payload.inline_max != Some(0) => problems.add(
            path,
            "readers of dialect bakdata are not told what is encoded in a record; leave it out, set inline_max: \
             0, or let other readers know by dialect whippet",
        ),
        Encoding::Gzip | Encoding::Zstd if payload.inline_max == Some(0) => {}
        _ => problems.warn(
            path,
            "readers of dialect bakdata decode gzip and zstd of objects only: not what is encoded and inline",
        ),
    }
}

fn table(table: &Table, dialect: Dialect, path: &str, problems: &mut Problems) {
    let at = |key: &str| format!("{path}.{key}");
    let only_in_log = table.message_prefix().is_some() || table.rows == Rows::Transient;
    if table.message_prefix().is_some() && dialect == Dialect::Mysql {
        problems.add(&at("name"), "MySQL has no logical messages; expected a table");
    } else if only_in_log && table.capture != Capture::Stream {
        problems.add(&at("capture"), "these events are in the log only; expected stream");
    }
    // MySQL's log alone tells which of the rows that are kept are new.
    let kept_by_the_log = dialect == Dialect::Mysql && table.after_publish == AfterPublish::Keep;
    if only_in_log && table.after_publish != AfterPublish::Delete && !kept_by_the_log {
        problems.add(&at("after_publish"), "nothing of these events stays; leave it out");
    }
    if table.message_prefix() == Some("") || table.message_prefix() == Some(HEARTBEAT_PREFIX) {
        problems.add(&at("name"), "expected message: and a prefix that is not the relay's own");
    }
    let parts: Vec<&str> = table.name.split('.').collect();
    let most = if dialect == Dialect::Sqlite { 1 } else { 2 };
    if table.message_prefix().is_some() {
        // A prefix may be any text.
    } else if parts.len() > most || parts.iter().any(|part| part.trim().is_empty()) {
        let shape = if most == 1 { "table" } else { "table or schema.table" };
        problems.add(&at("name"), format!("expected {shape}"));
    }
    let dead_letters = Some(table.dead_letter.topic.clone());
    for (key, template) in
        [("topic", &table.topic), ("key", &table.key), ("dead_letter.topic", &dead_letters)]
    {
        match template.as_deref().map(Template::parse) {
            Some(Err(error)) => problems.add(&at(key), format!("not a template: {error}")),
            Some(Ok(template)) if key != "key" && !template.may_be_topic() => problems.add(
                &at(key),
                "no name of a Kafka topic: 1 to 249 of letters, digits, '.', '_' and '-', and not . or ..",
            ),
            _ => {}
        }
    }
    if table.topic.is_none() && table.columns.topic.is_none() {
        problems.missing(&at("topic"), "a template such as orders.{aggregatetype}, or columns.topic");
    }
    if table.after_publish == AfterPublish::Mark && table.columns.published_at.is_none() {
        problems.missing(&at("columns.published_at"), "the column that after_publish: mark sets");
    }
    if table.after_publish == AfterPublish::Keep && !only_in_log {
        keep(table, dialect, &at, problems);
    }
    if table.poll.min_interval > table.poll.max_interval {
        problems.add(&at("poll.min_interval"), "longer than poll.max_interval");
    }
    if table.poll.max_interval.is_zero() {
        problems.add(&at("poll.max_interval"), "a pause of nothing would keep the database busy for nothing");
    }
    if table.poll.wake == Wake::Notify && dialect != Dialect::Postgres {
        problems.add(&at("poll.wake"), "notify needs PostgreSQL");
    }
    match (table.capture, dialect) {
        (Capture::Poll, _) | (_, Dialect::Postgres | Dialect::Mysql) => {}
        (_, Dialect::Sqlite) => problems.add(&at("capture"), "SQLite has no log to be read; expected poll"),
    }
    if table.retention.published.is_some() && table.after_publish == AfterPublish::Delete {
        problems.add(&at("retention.published"), "published rows stay with after_publish: mark or keep only");
    }
    if table.retry.initial > table.retry.max {
        problems.add(&at("retry.initial"), "longer than retry.max");
    }
    // An array of bytes in one message of the database: 1 GiB is PostgreSQL's limit for a value.
    if table.payload.max_bytes > 1 << 30 {
        problems.add(&at("payload.max_bytes"), "expected at most 1GiB");
    }
    if table.order == Order::Table && (table.key.is_some() || table.columns.key.is_some()) {
        problems.warn(&at("order"), "order: table is seen as such on a topic of one partition only");
    }
}

/// What tells which rows are published, where nothing is written into them.
fn keep(table: &Table, dialect: Dialect, at: &dyn Fn(&str) -> String, problems: &mut Problems) {
    if dialect == Dialect::Mysql {
        let says = "MySQL does not tell which rows a read could not see yet; expected delete or mark, or capture: stream, \
                    which goes by the binlog alone";
        problems.add(&at("after_publish"), says);
        return;
    }
    if table.columns.sequence.is_none() {
        problems
            .missing(&at("columns.sequence"), "the integer order column that after_publish: keep goes by");
    }
    match (dialect, &table.columns.tx) {
        (Dialect::Postgres, None) => problems.missing(
            &at("columns.tx"),
            "the column that after_publish: keep goes by: xid8 NOT NULL DEFAULT pg_current_xact_id()",
        ),
        (Dialect::Sqlite, Some(_)) => {
            problems.add(&at("columns.tx"), "SQLite's rows are kept by their number; leave it out");
        }
        (Dialect::Postgres, Some(_)) | (Dialect::Sqlite, None) | (Dialect::Mysql, _) => {}
    }
}
