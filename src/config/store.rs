//! `object_store`: where payloads go that Kafka does not take.

use std::collections::BTreeMap;

use schemars::JsonSchema;
use serde::Deserialize;

use super::Secret;
use crate::store::{Store, StoreError, is_in_the_clear};

/// A bucket, a container or a folder.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ObjectStore {
    /// s3://bucket/prefix, gs://bucket/prefix, az://container/prefix,
    /// abfss://container@account.dfs.core.windows.net/prefix or file:///folder
    pub url: String,
    /// As `object_store` names them, such as endpoint and region. One that ends in `_file` names a file
    /// with the value. Credentials that are not here come from the environment and from the platform.
    #[serde(default)]
    pub options: BTreeMap<String, Secret>,
}

impl ObjectStore {
    /// Connects to nothing. Options from files are read again while it is open.
    pub fn open(&self) -> Result<Store, StoreError> {
        let options = self.options.clone();
        let now =
            move || options.iter().map(|(name, value)| (name.clone(), value.expose_now().into())).collect();
        Store::following(&self.url, now)
    }

    /// The option by which payloads go over the network for anybody to read, unless another one says that it is meant.
    pub(super) fn in_the_clear(&self) -> Option<&str> {
        let is_meant = self.options.keys().any(|name| name.ends_with("allow_http"));
        let is_plain = |(name, value): &(&String, &Secret)| {
            (name.ends_with("endpoint") || name.ends_with("base_url")) && is_in_the_clear(value.expose())
        };
        self.options.iter().find(is_plain).filter(|_| !is_meant).map(|(name, _)| name.as_str())
    }
}
