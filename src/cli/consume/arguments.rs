//! What is asked for: the flags, over the relay's configuration where one is named.

use std::{collections::BTreeMap, path::PathBuf};

use anyhow::Context as _;

use crate::{
    config::{Config, Kafka, ObjectStore, Secret},
    consume::{Limits, Settings, Start},
    store::Store,
};

#[derive(Debug, clap::Args)]
#[command(group = clap::ArgGroup::new("store").args(["object_store", "config"]).multiple(true))]
pub struct Arguments {
    /// The configuration of the relay that wrote the topic: its brokers, their properties and its object
    /// store. What is given beside it wins.
    #[arg(long, short, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Kafka, as host:port, or several with commas between them.
    #[arg(long, env = "WHIPPET_BOOTSTRAP_SERVERS", required_unless_present = "config")]
    bootstrap_servers: Option<String>,
    /// May be given several times.
    #[arg(long, required = true)]
    topic: Vec<String>,
    /// Commits what was printed for this group, and begins there the next time. Without it all partitions
    /// are read and nothing is committed.
    #[arg(long)]
    group: Option<String>,
    /// Begin with the oldest record, where the group has committed nothing.
    #[arg(long)]
    from_beginning: bool,
    /// The only store that references are followed to: s3://, gs://, az:// or file://. Replaces that of
    /// the configuration, with its options.
    #[arg(long, value_name = "URL")]
    object_store: Option<String>,
    /// An option of the store, as KEY=VALUE.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair, requires = "store")]
    object_store_option: Vec<(String, String)>,
    /// The header that carries all context, where the relay has headers.blob.
    #[arg(long, value_name = "HEADER")]
    blob: Option<String>,
    /// End when so many events are printed. One that cannot be read is not: it is told on stderr.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    pub max: Option<u64>,
    /// Where events go.
    #[arg(long, value_name = "FILE", default_value = "-")]
    pub output: PathBuf,
    /// `json` is a line for each event; `raw` is the payloads and nothing else.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
    /// A property of librdkafka, as KEY=VALUE.
    #[arg(long, value_name = "KEY=VALUE", value_parser = pair)]
    property: Vec<(String, String)>,
}

#[derive(Clone, Copy, Debug, Default, clap::ValueEnum)]
pub enum Format {
    #[default]
    Json,
    Raw,
}

fn pair(text: &str) -> Result<(String, String), String> {
    let pair = text.split_once('=').filter(|(name, _)| !name.is_empty());
    pair.map(|(name, value)| (name.to_owned(), value.to_owned())).ok_or_else(|| "expected KEY=VALUE".into())
}

impl Arguments {
    pub fn settings(&self, config: Option<&Config>) -> Settings {
        let kafka = config.map(|config| &config.kafka);
        let servers = self.bootstrap_servers.as_deref();
        let servers = servers.or(kafka.map(|kafka| kafka.bootstrap_servers.as_str()));
        let configured = kafka.into_iter().flat_map(|kafka| &kafka.properties);
        let configured = configured.map(|(name, value)| (name.clone(), value.expose().to_owned()));
        Settings {
            group: self.group.clone(),
            topics: self.topic.clone(),
            start: if self.from_beginning { Start::Beginning } else { Start::End },
            limits: config.map_or_else(Limits::default, limits),
            blob: self.blob.clone().or_else(|| config.and_then(blob)),
            properties: configured.chain(self.property.iter().cloned()).collect(),
            token: kafka.and_then(Kafka::token_from),
            ..Settings::new(servers.unwrap_or_default(), &[])
        }
    }

    /// The store that references are followed to. Connects to nothing.
    pub fn store(&self, config: Option<&Config>) -> anyhow::Result<Option<Store>> {
        let configured = config.and_then(|config| config.object_store.as_ref());
        let (mut store, flag) = match (&self.object_store, configured) {
            (Some(url), _) => (ObjectStore { url: url.clone(), options: BTreeMap::new() }, "--object-store"),
            (None, Some(configured)) => (configured.clone(), "--object-store-option"),
            (None, None) if self.object_store_option.is_empty() => return Ok(None),
            (None, None) => anyhow::bail!(
                "--object-store-option: the configuration has no object_store; name one with --object-store"
            ),
        };
        let options = self.object_store_option.iter();
        store.options.extend(options.map(|(name, value)| (name.clone(), Secret::new(value))));
        store.open().map(Some).context(flag)
    }
}

/// The header that has all context, if one table has it so.
fn blob(config: &Config) -> Option<String> {
    config.all_tables().find_map(|table| table.headers.blob.clone())
}

/// Whatever the relay lets through can be read, and no more of its events lie between the chunks of one
/// than are expected there.
fn limits(config: &Config) -> Limits {
    let usual = Limits::default();
    let largest = config.all_tables().map(|table| table.payload.max_bytes).max();
    let payload_bytes = largest.unwrap_or_default().max(usual.payload_bytes);
    Limits {
        payload_bytes,
        chunk_bytes: payload_bytes.max(usual.chunk_bytes),
        chunk_gap: i64::try_from(config.limits.in_flight_events).unwrap_or(i64::MAX).max(usual.chunk_gap),
        ..usual
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::config;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        arguments: Arguments,
    }

    fn asked(flags: &[&str]) -> Arguments {
        Line::parse_from([&["consume", "--topic", "t"], flags].concat()).arguments
    }

    fn configured(more: &str) -> Config {
        let yaml = format!(
            "source: {{ url: 'sqlite:///x.db' }}\n\
             kafka: {{ bootstrap_servers: 'config:1', properties: {{ security.protocol: ssl, client.id: relay }} }}\n\
             object_store: {{ url: 's3://payloads/shop', options: {{ region: eu-west-1, endpoint: 'https://minio' }} }}\n\
             {more}"
        );
        config::parse("test", &yaml, &BTreeMap::new()).unwrap()
    }

    const TABLES: &str = "tables: [{ name: outbox }]\n";

    #[test]
    fn the_configuration_is_enough_and_flags_win() {
        let config = configured(TABLES);
        let alone = asked(&["--config", "f"]);
        let settings = alone.settings(Some(&config));
        assert_eq!(settings.bootstrap_servers, "config:1");
        assert_eq!(settings.properties["security.protocol"], "ssl");
        assert_eq!(settings.properties["client.id"], "relay");
        assert_eq!(alone.store(Some(&config)).unwrap().unwrap().to_string(), "s3://payloads/shop");

        let flags = [
            "--config",
            "f",
            "--bootstrap-servers",
            "flag:1",
            "--property",
            "client.id=me",
            "--object-store",
        ];
        let both = asked(&[&flags[..], &["file:///payloads"]].concat());
        let settings = both.settings(Some(&config));
        assert_eq!(settings.bootstrap_servers, "flag:1");
        assert_eq!(settings.properties["security.protocol"], "ssl");
        assert_eq!(settings.properties["client.id"], "me");
        // A folder takes no options: those of the other store are not for this one.
        assert_eq!(both.store(Some(&config)).unwrap().unwrap().to_string(), "file:///payloads");

        let option = |option| asked(&["--config", "f", "--object-store-option", option]);
        assert!(option("region=eu-west-2").store(Some(&config)).is_ok());
        let error = option("endpoint=nonsense").store(Some(&config)).unwrap_err();
        assert!(format!("{error:#}").starts_with("--object-store-option: object_store.options.endpoint"));
    }

    #[test]
    fn what_the_relay_lets_through_can_be_read() {
        let large = configured(
            "limits: { in_flight_events: 250000 }\n\
             tables: [{ name: outbox, payload: { max_bytes: 1GiB } }, { name: other }]\n",
        );
        let limits = asked(&["--config", "f"]).settings(Some(&large)).limits;
        assert_eq!((limits.payload_bytes, limits.chunk_bytes), (1 << 30, 1 << 30));
        assert_eq!(limits.chunk_gap, 250_000);
        let settings = asked(&["--config", "f"]).settings(Some(&configured(TABLES)));
        assert_eq!((settings.limits, settings.blob), (Limits::default(), None));
        let blob = configured("tables: [{ name: a }, { name: b, headers: { blob: x-context } }]\n");
        assert_eq!(asked(&["--config", "f"]).settings(Some(&blob)).blob.as_deref(), Some("x-context"));
        assert_eq!(asked(&["--config", "f", "--blob", "y"]).settings(Some(&blob)).blob.as_deref(), Some("y"));
    }

    #[test]
    fn options_are_pairs() {
        assert_eq!(pair("a=b=c"), Ok(("a".into(), "b=c".into())));
        assert!(pair("a").is_err() && pair("=a").is_err());
    }
}
