use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{
    router::{Match, template},
    *,
};
use crate::config::{self, AfterPublish, Capture, Config, Order};

const POSTGRES: &str = r#"{
  "name": "outbox",
  "config": {
    "connector.class": "io.debezium.connector.postgresql.PostgresConnector",
    "plugin.name": "pgoutput",
    "database.hostname": "db.internal", "database.port": 5433, "database.user": "re lay",
    "database.password": "s3cret-of-db", "database.dbname": "shop", "database.sslmode": "verify-full",
    "database.sslrootcert": "/etc/tls/ca.pem",
    "topic.prefix": "shop", "slot.name": "outbox_slot", "publication.name": "outbox_publication",
    "table.include.list": "public\\.outbox, sales.events", "heartbeat.interval.ms": "5000",
    "snapshot.mode": "no_data", "tombstones.on.delete": "false",
    "key.converter": "org.apache.kafka.connect.storage.StringConverter",
    "value.converter": "io.debezium.converters.BinaryDataConverter",
    "transforms": "outbox",
    "transforms.outbox.type": "io.debezium.transforms.outbox.EventRouter",
    "transforms.outbox.table.field.event.id": "event_id",
    "transforms.outbox.table.field.event.key": "customer",
    "transforms.outbox.table.field.event.timestamp": "happened_at",
    "transforms.outbox.route.by.field": "kind",
    "transforms.outbox.route.topic.replacement": "events.${routedByValue}.v1",
    "transforms.outbox.table.fields.additional.placement": "type:header:eventType,tenant:header,shard:partition",
    "producer.override.bootstrap.servers": "kafka-1:9092,kafka-2:9092",
    "producer.override.linger.ms": "20", "producer.override.compression.type": "zstd",
    "producer.override.security.protocol": "SASL_SSL", "producer.override.sasl.mechanism": "SCRAM-SHA-512",
    "producer.override.sasl.jaas.config":
      "org.apache.kafka.common.security.scram.ScramLoginModule required username=\"relay\" password=\"s3cret-of-kafka\";",
    "topic.creation.default.partitions": "6", "topic.creation.default.replication.factor": "3"
  }
}"#;

fn imported(text: &str, rows: Option<Rows>) -> (Imported, Config) {
    let imported = debezium("outbox.json", text, rows).unwrap();
    let config = config::parse("imported", &imported.yaml, &BTreeMap::new());
    (imported, config.unwrap_or_else(|error| panic!("{error}")))
}

fn note<'a>(imported: &'a Imported, about: &str) -> &'a str {
    let note = imported.notes.iter().find(|note| note.about == about);
    &note.unwrap_or_else(|| panic!("no note about {about}: {:?}", imported.notes)).says
}

/// A connector of properties, with these beside what every one needs.
fn properties(more: &str) -> String {
    format!(
        "connector.class=io.debezium.connector.postgresql.PostgresConnector\nplugin.name=pgoutput\n\
         table.include.list=public.outbox\ntransforms=router\n\
         transforms.router.type=io.debezium.transforms.outbox.EventRouter\n{more}\n"
    )
}

#[test]
fn a_connector_becomes_an_equal_configuration() {
    let (imported, config) = imported(POSTGRES, None);
    let source = config.source.as_ref().unwrap();
    assert_eq!(source.url.expose(), "postgres://re%20lay@db.internal:5433/shop");
    assert_eq!(source.password_file.as_deref().unwrap().to_str(), Some("/run/secrets/db"));
    assert_eq!(source.tls.mode, config::TlsMode::VerifyFull);
    let stream = source.stream.as_ref().unwrap();
    assert_eq!(
        (&*stream.slot, &*stream.publication, stream.create),
        ("outbox_slot", "outbox_publication", true)
    );
    assert_eq!(stream.heartbeat.as_secs(), 5);
    assert_eq!(config.kafka.bootstrap_servers, "kafka-1:9092,kafka-2:9092");
    assert_eq!((config.kafka.linger.as_millis(), config.kafka.compression.as_str()), (20, "zstd"));
    assert_eq!((config.kafka.create_topics.enabled, config.kafka.create_topics.partitions), (true, 6));
    let property = |name: &str| config.kafka.properties[name].expose().to_owned();
    assert_eq!(
        (property("sasl.mechanisms"), property("sasl.username")),
        ("SCRAM-SHA-512".into(), "relay".into())
    );
    let names: Vec<&str> = config.tables.iter().map(|table| table.name.as_str()).collect();
    assert_eq!(names, ["public.outbox", "sales.events"]);
    let table = &config.tables[0];
    assert_eq!(
        (table.capture, table.rows, table.order),
        (Capture::Stream, config::Rows::Transient, Order::Key)
    );
    assert_eq!((&*table.columns.id, table.columns.key.as_deref()), ("event_id", Some("customer")));
    assert_eq!(table.columns.timestamp.as_deref(), Some("happened_at"));
    assert_eq!(table.columns.partition.as_deref(), Some("shard"));
    assert_eq!(table.topic.as_deref(), Some("events.{kind}.v1"));
    let headers = [("eventType", "type"), ("tenant", "tenant")].map(|(h, c)| (h.to_owned(), c.to_owned()));
    assert_eq!(table.headers.columns, headers);
    assert!(
        imported.yaml.contains("# Not needed here: tombstones.on.delete, topic.prefix.\n"),
        "{}",
        imported.yaml
    );
}

/// Neither in the configuration nor in a note, whatever its name.
#[test]
fn nothing_secret_is_repeated() {
    let more = "producer.override.ssl.truststore.password=s3cret1\nproducer.override.ssl.keystore.key=s3cret2\n\
                database.sslpassword=s3cret3\nmy.api.token=s3cret4\nkey.converter.basic.auth.user.info=s3cret5\n\
                database.password=${file:/s3cret6:pw}\ncolumn.mask.hash.SHA-256.with.salt.s3=s3cret7\n\
                producer.override.sasl.jaas.config=Module required username=u password=s3cret8;\n\
                producer.override.sasl.oauthbearer.client.secret=s3cret9";
    for text in [POSTGRES, &properties(more)] {
        let (imported, _) = imported(text, None);
        let said = format!("{}{:?}", imported.yaml, imported.notes);
        assert!(!said.contains("s3cret"), "{said}");
    }
}

#[test]
fn rows_that_stay_are_polled_too_and_deleted() {
    let (imported, config) = imported(POSTGRES, Some(Rows::Table));
    let table = &config.tables[1];
    assert_eq!((table.capture, table.rows, table.order), (Capture::Auto, config::Rows::Stay, Order::Key));
    assert_eq!(table.columns.sequence.as_deref(), Some("seq"));
    assert_eq!(table.after_publish, AfterPublish::Delete);
    assert!(note(&imported, "columns.sequence").contains("ALTER TABLE public.outbox ADD COLUMN seq"));
    assert!(note(&imported, "after_publish").contains("delete these before the first start"));
}

#[test]
fn mysql_and_mariadb_have_their_database_in_the_url() {
    for class in
        ["io.debezium.connector.mysql.MySqlConnector", "io.debezium.connector.mariadb.MariaDbConnector"]
    {
        let text = format!(
            "connector.class={class}\ndatabase.hostname=mysql\ndatabase.user=relay\ndatabase.password=x\n\
             database.server.id=184054\ndatabase.include.list=shop\ntable.include.list=shop.outbox,other.outbox\n\
             database.ssl.mode=verify_identity\nschema.history.internal.kafka.bootstrap.servers=kafka:9092\n\
             transforms=outbox\ntransforms.outbox.type=io.debezium.transforms.outbox.EventRouter\n"
        );
        let (imported, config) = imported(&text, None);
        let source = config.source.as_ref().unwrap();
        assert_eq!(source.url.expose(), "mysql://relay@mysql:3306/shop");
        assert_eq!(source.stream.as_ref().unwrap().server_id, 184_054);
        assert_eq!(config.kafka.bootstrap_servers, "kafka:9092");
        let names: Vec<&str> = config.tables.iter().map(|table| table.name.as_str()).collect();
        assert_eq!(names, ["outbox", "other.outbox"]);
        assert_eq!(config.tables[0].capture, Capture::Auto);
        assert!(note(&imported, "rows").contains("found in the binlog only"));
    }
}

#[test]
fn debezium_server_has_other_names_for_the_same() {
    let (_, config) = imported(
        "debezium.source.connector.class=io.debezium.connector.postgresql.PostgresConnector\n\
         debezium.source.plugin.name=pgoutput\ndebezium.source.table.include.list=public.outbox\n\
         debezium.source.database.hostname=db\ndebezium.sink.type=kafka\n\
         debezium.sink.kafka.producer.bootstrap.servers=kafka:9092\ndebezium.format.key=json\n\
         debezium.format.key.schemas.enable=false\ndebezium.transforms=outbox\n\
         debezium.transforms.outbox.type=io.debezium.transforms.outbox.EventRouter\n",
        None,
    );
    assert_eq!(config.kafka.bootstrap_servers, "kafka:9092");
    assert_eq!(config.tables[0].key.as_deref(), Some("\"{aggregateid}\""));
}

/// Each is named, with what to do.
#[test]
fn what_has_no_equal_is_said() {
    let router = "transforms.router";
    for (line, about, says) in [
        (
            format!("{router}.table.expand.json.payload=true"),
            format!("{router}.table.expand.json.payload"),
            "members that are null",
        ),
        (
            format!("{router}.route.tombstone.on.empty.payload=true"),
            format!("{router}.route.tombstone.on.empty.payload"),
            "write NULL",
        ),
        (
            format!("{router}.table.fields.additional.placement=a:envelope:b"),
            format!("{router}.table.fields.additional.placement"),
            "a in an envelope has no equal",
        ),
        (
            format!("{router}.table.op.invalid.behavior=fatal"),
            format!("{router}.table.op.invalid.behavior"),
            "ignored",
        ),
        (
            format!("{router}.table.field.event.schema.version=v"),
            format!("{router}.table.field.event.schema.version"),
            "no schema",
        ),
        (
            format!("{router}.predicate=isOutbox"),
            format!("{router}.predicate"),
            "only the tables that are named",
        ),
        (
            format!("{router}.tracing.operation.name=x"),
            format!("{router}.tracing.operation.name"),
            "goes out as it is",
        ),
        (
            format!("{router}.route.topic.regex=(.*)[.](.*)\n{router}.route.topic.replacement=$2"),
            format!("{router}.route.topic.replacement"),
            "wrong for you",
        ),
        (
            format!("{router}.route.topic.regex=(?<routedByValue>[a-z]+)"),
            format!("{router}.route.topic.regex"),
            "does not match",
        ),
        (format!("{router}.no.such.option=1"), format!("{router}.no.such.option"), "not understood"),
        (
            "transforms=router,cut\ntransforms.cut.type=x.Cut\ntransforms.cut.a=1".into(),
            "transforms.cut".into(),
            "x.Cut has no equal",
        ),
        ("predicates=isOutbox".into(), "predicates".into(), "no equal"),
        (
            "key.converter=io.confluent.connect.avro.AvroConverter".into(),
            "key.converter".into(),
            "AvroConverter has no equal",
        ),
        (
            "value.converter=org.apache.kafka.connect.json.JsonConverter".into(),
            "value.converter".into(),
            "no object with its schema",
        ),
        (String::new(), "key.converter, value.converter".into(), "StringConverter"),
        ("table.include.list=public.out.*".into(), "table.include.list".into(), "write out the outboxes"),
        ("table.include.list=".into(), "tables".into(), "write the outbox's name"),
        ("binary.handling.mode=base64".into(), "binary.handling.mode".into(), "bytes go out untouched"),
        ("producer.override.acks=1".into(), "producer.override.acks".into(), "always all"),
        (
            "producer.override.interceptor.classes=x".into(),
            "producer.override.interceptor.classes".into(),
            "not known here",
        ),
        ("producer.override.batch.size=many".into(), "producer.override.batch.size".into(), "left out"),
        ("plugin.name=decoderbufs".into(), "slot.name".into(), "decoderbufs cannot be read here"),
        ("signal.data.collection=public.s".into(), "signal.data.collection".into(), "replay"),
        ("errors.tolerance=all".into(), "errors.tolerance".into(), "parks its key"),
        ("a.thing=1".into(), "a.thing".into(), "not understood"),
        (
            "database.hostname=${env:PGHOST}".into(),
            "database.hostname".into(),
            "set the environment variable PGHOST",
        ),
        (
            "database.user=${file:/x:user}".into(),
            "database.user".into(),
            "set the environment variable DATABASE_USER",
        ),
    ] {
        let (imported, _) = imported(&properties(&line), None);
        let said = note(&imported, &about);
        assert!(said.contains(says), "{about}: {said}");
        let flat = imported.yaml.replace("\n#    ", "").replace("\n#     ", " ");
        assert!(flat.contains(&about), "{}", imported.yaml);
    }
}

/// JSON that was expanded and had no schema is the same JSON: of its converter nothing is to be said.
#[test]
fn of_a_json_converter_only_what_is_different_is_said() {
    let json = "key.converter=StringConverter\nvalue.converter=org.apache.kafka.connect.json.JsonConverter\n\
                value.converter.schemas.enable=false";
    let (quoted, _) = imported(&properties(json), None);
    assert!(note(&quoted, "value.converter").contains("not once more in quotes"));
    let expanded = format!("{json}\ntransforms.router.table.expand.json.payload=true");
    let (expanded, _) = imported(&properties(&expanded), None);
    assert!(expanded.notes.iter().all(|note| note.about != "value.converter"), "{:?}", expanded.notes);
    assert!(note(&expanded, "transforms.router.table.expand.json.payload").contains("the same JSON"));
}

/// Nothing but the table can bring back what a binlog no longer has.
#[test]
fn a_flag_that_cannot_be_had_is_said() {
    let text = properties("").replace("postgresql.PostgresConnector", "mysql.MySqlConnector");
    let (imported, config) = imported(&text, Some(Rows::Log));
    assert_eq!(config.tables[0].rows, config::Rows::Stay);
    assert!(note(&imported, "--rows transient").contains("PostgreSQL only"));
}

#[test]
fn what_is_no_outbox_connector_is_refused() {
    for (text, expected) in [
        ("{\"a\":", "neither JSON nor Java properties"),
        ("a=\\uZZZZ", "line 1"),
        ("[1]", "not a JSON object"),
        (r#"{"config": {"a": {"b": 1}}}"#, "the value of a is neither"),
        ("a=b", "no connector.class"),
        ("connector.class=io.debezium.connector.oracle.OracleConnector", "OracleConnector: only"),
        ("connector.class=io.debezium.connector.mysql.MySqlConnector", "changes of tables"),
    ] {
        let said = debezium("f", text, None).unwrap_err().to_string();
        assert!(said.contains(expected), "{text}: {said}");
    }
}

#[test]
fn a_pattern_of_one_group_is_a_template() {
    for (regex, replacement, expected) in [
        ("(?<routedByValue>.*)", "outbox.event.${routedByValue}", Ok(("outbox.event.{c}", Match::All))),
        ("(.*)", "$1", Ok(("{c}", Match::All))),
        ("^(.+)$", "a.$1-b", Ok(("a.{c}-b", Match::All))),
        (".*", "$0", Ok(("{c}", Match::All))),
        (".*", "all", Ok(("all", Match::All))),
        ("(?<x>[A-Z].*)", "e.${x}", Ok(("e.{c}", Match::Some))),
        ("(.*)", "a{b}\\$c", Ok(("a{{b}}$c", Match::All))),
        ("(.*)", "${other}", Err("a group that the pattern does not have")),
        ("(.*)", "$2", Err("a group that the pattern does not have")),
        ("(a)(b)", "$1", Err("a pattern with several groups")),
        ("(.*)Event", "$1", Err("a pattern with several groups")),
    ] {
        let found = template(regex, replacement, "c");
        assert_eq!(found, expected.map(|(topic, all)| (topic.to_owned(), all)), "{regex} {replacement}");
    }
}

proptest! {
    /// Whatever the values are, what is printed is YAML that can be read back, and valid where the names are.
    #[test]
    fn what_is_printed_is_always_yaml(
        column in "\\PC{1,12}", header in "\\PC{1,12}", host in "[a-z0-9.-]{1,12}", user in "\\PC{1,12}", odd in "\\PC{0,20}",
    ) {
        let config = serde_json::json!({
            "connector.class": "PostgresConnector", "database.hostname": host, "database.user": user,
            "table.include.list": "public.outbox", "slot.name": odd, "plugin.name": "pgoutput",
            "transforms": "o", "transforms.o.type": "io.debezium.transforms.outbox.EventRouter",
            "transforms.o.table.field.event.payload": column,
            "transforms.o.table.fields.additional.placement": format!("{column}:header:{header}"),
            "producer.override.client.id": odd,
            (format!("x.{odd}")): odd,
        });
        let imported = debezium(&odd, &config.to_string(), None).unwrap();
        match config::parse("imported", &imported.yaml, &BTreeMap::new()) {
            Ok(config) => {
                // A blank value is one that is not set.
                let named = Some(column.trim()).filter(|name| !name.is_empty());
                prop_assert_eq!(&config.tables[0].columns.payload, named.unwrap_or("payload"));
            }
            Err(error) => prop_assert!(!error.to_string().contains("malformed"), "{}\n{}", error, imported.yaml),
        }
    }
}
