//! Deleting what is below a prefix: one person's payloads, when that person asks for it.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

use futures_util::{StreamExt as _, TryStreamExt as _};

use super::{Store, StoreError};

/// How many objects, and their bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Tally {
    pub objects: u64,
    pub bytes: u64,
}

impl Store {
    /// What is in the folder `prefix`; in the whole store where it is empty.
    pub async fn tally(&self, prefix: &str) -> Result<Tally, StoreError> {
        let add = async |sum: Tally, object: super::Object| {
            Ok(Tally { objects: sum.objects + 1, bytes: sum.bytes + object.size })
        };
        self.list(prefix).try_fold(Tally::default(), add).await
    }

    /// Deletes what is in the folder `prefix`. Where it fails, some of it may be gone.
    pub async fn purge(&self, prefix: &str) -> Result<Tally, StoreError> {
        let (path, uri) = (self.folder_path(prefix)?, self.uri(prefix));
        let bytes = Arc::new(AtomicU64::new(0));
        let counted = bytes.clone();
        let found = self.objects().list(Some(&path)).map_ok(move |meta| {
            counted.fetch_add(meta.size, Ordering::Relaxed);
            meta.location
        });
        let mut gone = self.objects().delete_stream(found.boxed());
        let mut objects = 0;
        while gone.try_next().await.map_err(|error| StoreError::of(&error, &uri))?.is_some() {
            objects += 1;
        }
        Ok(Tally { objects, bytes: bytes.load(Ordering::Relaxed) })
    }

    /// Whether the store keeps old versions of what is deleted; `None` where it cannot be asked.
    pub async fn keeps_versions(&self) -> Result<Option<bool>, StoreError> {
        match &self.bucket {
            Some(bucket) => bucket.keeps_versions().await.map(Some),
            None => Ok(None),
        }
    }
}
