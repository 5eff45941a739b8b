//! From the configuration of a table to what its source and its records need.

use crate::{
    config::{self, AfterPublish, Capture, Config, Dialect, Jitter, Order},
    record::{Envelope, LargeSpec, Oversize, Rules, Spec, Template, Watch, envelope::source_of},
    relay::retry::Policy,
    source::{
        database::{Piece, Placing, Rows, Shared, TableSpec},
        times::Unreadable,
    },
};

pub(super) fn policy(retry: &config::Retry) -> Policy {
    Policy { initial: retry.initial, max: retry.max, jitter: retry.jitter == Jitter::Full }
}

pub(super) fn record_spec(table: &config::Table, has_store: bool, watch: &Watch) -> Spec {
    let columns = &table.columns;
    Spec {
        id: columns.id.clone(),
        topic: columns.topic.clone(),
        key: columns.key.clone(),
        kind: columns.kind.clone(),
        payload: columns.payload.clone(),
        headers: columns.headers.clone(),
        partition: columns.partition.clone(),
        version: columns.version.clone(),
        tracing_span_context: columns.tracing_span_context.clone(),
        topic_template: table.topic.clone(),
        key_template: table.key.clone(),
        headers_from: table.headers.from.clone(),
        headers_columns: table.headers.columns.clone(),
        headers_static: table.headers.fixed.clone(),
        allow: table.headers.allow.clone(),
        deny: table.headers.deny.clone(),
        headers_max_bytes: table.headers.max_bytes,
        event_type_header: table.event_type_header(),
        blob: table.headers.blob.clone(),
        envelope: match table.envelope {
            config::Envelope::None => Envelope::None,
            config::Envelope::CloudeventsBinary => Envelope::Binary,
            config::Envelope::CloudeventsStructured => Envelope::Structured,
        },
        source: source_of(&table.name),
        dead_letter_topic: table.dead_letter.topic.clone(),
        large: large_spec(
            &table.payload,
            has_store && table.envelope != config::Envelope::CloudeventsStructured,
        ),
        watch: watch.clone(),
    }
}

fn large_spec(payload: &config::Payload, has_store: bool) -> LargeSpec {
    let (references, chunks) = (&payload.reference.dialects, &payload.chunk.dialects);
    LargeSpec {
        content_type: payload.content_type.clone(),
        encode: payload.encode.codec.codec().map(|codec| (codec, payload.encode.above)),
        inline_max: payload.inline_max,
        oversize: match payload.oversize {
            Some(config::Oversize::ClaimCheck) => Oversize::ClaimCheck,
            Some(config::Oversize::Chunk) => Oversize::Chunk,
            Some(config::Oversize::Park) => Oversize::Park,
            Some(config::Oversize::DeadLetter) => Oversize::DeadLetter,
            None if has_store => Oversize::ClaimCheck,
            None => Oversize::Fail,
        },
        reference_key: payload.reference.key.clone(),
        whippet: references.contains(&config::ReferenceDialect::Whippet),
        bakdata: references.contains(&config::ReferenceDialect::Bakdata),
        chunk_bytes: payload.chunk.size,
        silverback: chunks.contains(&config::ChunkDialect::Silverback),
        linkedin: chunks.contains(&config::ChunkDialect::Linkedin),
    }
}

/// What the sources of a configuration need of their tables.
pub fn table_specs(config: &Config) -> anyhow::Result<Vec<TableSpec>> {
    let spec = |table| -> anyhow::Result<TableSpec> {
        let spec = record_spec(table, config.object_store.is_some(), &Watch::default());
        Ok(table_spec(table, &Rules::compile(&spec)?, None))
    };
    config.tables.iter().map(spec).collect()
}

/// By what relays share a table, where they do: one that follows the log is as little cut into pieces as the
/// log, and one whose rows are kept has one frontier.
pub(super) fn shared(table: &config::Table, dialect: Dialect, buckets: u16) -> Option<Shared> {
    let is_shared = table.capture == Capture::Poll
        && table.after_publish != AfterPublish::Keep
        && table.order != Order::Table
        && dialect != Dialect::Sqlite;
    let key = match (&table.key, &table.columns.key, table.order) {
        (_, _, Order::None | Order::Table) => Vec::new(),
        (Some(template), _, Order::Key) => Template::parse(template)
            .map(|template| {
                template.map(|text| Piece::Text(text.to_owned()), |name| Piece::Column(name.to_owned()))
            })
            .unwrap_or_default(),
        (None, column, Order::Key) => column.iter().cloned().map(Piece::Column).collect(),
    };
    is_shared.then_some(Shared { buckets, key })
}

pub(super) fn table_spec(table: &config::Table, rules: &Rules, shared: Option<Shared>) -> TableSpec {
    let columns = &table.columns;
    TableSpec {
        name: table.name.clone(),
        rows: match (table.message_prefix(), table.rows) {
            (Some(prefix), _) => Rows::Messages { prefix: prefix.to_owned() },
            (None, config::Rows::Transient) => Rows::Transient,
            (None, config::Rows::Stay) => Rows::Stay,
        },
        columns: rules.columns().to_vec(),
        optional: rules
            .columns()
            .iter()
            .chain(&columns.sequence)
            .chain(&columns.published_at)
            .filter(|name| !columns.required.contains(*name))
            .cloned()
            .collect(),
        id: columns.id.clone(),
        payload: columns.payload.clone(),
        sequence: columns.sequence.clone(),
        order: table.order,
        timestamps: columns.timestamp.iter().chain(&columns.created_at).cloned().collect(),
        published_at: table.marked().cloned(),
        tx: table.kept_by().cloned(),
        after_publish: table.after_publish,
        retention: table.retention.published,
        max_payload: table.payload.max_bytes,
        shared,
        placing: Placing::default(),
        unreadable: Unreadable::default(),
    }
}
