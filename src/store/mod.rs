//! An object store by its URL: a local folder.

use std::{collections::BTreeMap, path::PathBuf, sync::Arc};

use bytes::Bytes;
use object_store::{ObjectStoreExt as _, local::LocalFileSystem, path::Path};

/// Why an object is not had, and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    #[error("the object store is away: {0}; it is tried again")]
    Away(String),
    #[error("the object store does not allow it: {0}; check the credentials and what they may do there")]
    Denied(String),
    #[error("there is no object {uri}; it was deleted, or a lifecycle rule took it")]
    NotFound { uri: String },
    #[error("the object {uri} has {size} bytes, and {at_most} are taken at most")]
    TooLarge { uri: String, size: u64, at_most: u64 },
    #[error("{uri} is not in {store}; only objects there are read")]
    Foreign { uri: String, store: String },
    #[error("{0}")]
    Misconfigured(String),
}

impl StoreError {
    /// Whether it passes by itself, so that trying again is enough.
    pub fn is_transient(&self) -> bool {
        matches!(self, StoreError::Away(_))
    }
}

/// A folder, and everything below it.
#[derive(Clone, Debug)]
pub struct Store {
    folder: PathBuf,
    objects: Arc<LocalFileSystem>,
}

impl Store {
    pub fn open(url: &str, _options: &BTreeMap<String, String>) -> Result<Store, StoreError> {
        let wrong =
            || StoreError::Misconfigured(format!("object_store.url: expected file:///folder, not {url}"));
        let folder = url.strip_prefix("file://").filter(|path| path.starts_with('/')).ok_or_else(wrong)?;
        Ok(Store { folder: folder.into(), objects: Arc::new(LocalFileSystem::new()) })
    }

    pub fn uri(&self, key: &str) -> String {
        format!("file://{}/{key}", self.folder.display())
    }

    pub async fn get(&self, uri: &str, at_most: u64) -> Result<Bytes, StoreError> {
        let base = self.uri("");
        let Some(key) = uri.strip_prefix(&base).filter(|key| !key.split('/').any(|part| part == "..")) else {
            return Err(StoreError::Foreign { uri: uri.into(), store: base });
        };
        let found = self.objects.get(&self.path(key)?).await.map_err(|error| failed(&error, uri))?;
        if found.meta.size > at_most {
            return Err(StoreError::TooLarge { uri: uri.into(), size: found.meta.size, at_most });
        }
        found.bytes().await.map_err(|error| failed(&error, uri))
    }

    pub async fn put(&self, key: &str, content: Bytes, _content_type: &str) -> Result<(), StoreError> {
        let put = self.objects.put(&self.path(key)?, content.into()).await;
        put.map(drop).map_err(|error| failed(&error, &self.uri(key)))
    }

    fn path(&self, key: &str) -> Result<Path, StoreError> {
        let path = format!("{}/{key}", self.folder.display());
        Path::parse(path.trim_start_matches('/'))
            .map_err(|error| StoreError::Misconfigured(error.to_string()))
    }
}

fn failed(error: &object_store::Error, uri: &str) -> StoreError {
    match error {
        object_store::Error::NotFound { .. } => StoreError::NotFound { uri: uri.into() },
        object_store::Error::PermissionDenied { .. } => StoreError::Denied(error.to_string()),
        other => StoreError::Away(other.to_string()),
    }
}
